"""The flags of one attention layer. What follows from them together is in ``attention_facts.py``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from torch import nn

from x_transformers.flags.attention_facts import AttentionFacts
from x_transformers.flags.base import Flags, flag

DEFAULT_DIM_HEAD = 64
LATER = '2.31.10'
SDP_KWARGS = {'enable_flash': True, 'enable_math': True, 'enable_mem_efficient': True}

COG = 'https://openreview.net/forum?id=ezRrwwbxd0'
COPE = 'https://arxiv.org/abs/2405.18719'
FORGETTING = 'https://openreview.net/forum?id=q2Lnyegkr8'
HYBRID = 'https://arxiv.org/abs/2411.13676'
LASER = 'https://arxiv.org/abs/2411.03493'
LATENT = 'https://arxiv.org/abs/2405.04434'
BELIEF = 'https://openreview.net/forum?id=Ard2QzPAUK'
INVERTED = 'https://openreview.net/forum?id=WgQZNoQ5AB'
TALKING = 'https://arxiv.org/abs/2003.02436'
TOPK = 'https://arxiv.org/abs/2505.22074'
ATTENTION_PAPER = 'https://arxiv.org/abs/1706.03762'
COMPOSABLE = 'https://arxiv.org/abs/2405.08553'
DIFFERENTIAL = 'https://arxiv.org/abs/2410.05258'
EXCLUSIVE = 'https://arxiv.org/abs/2603.09078'
HYBRID_GATES = 'https://arxiv.org/abs/2608.11805'
PATH = 'https://arxiv.org/abs/2505.16381'
TENSOR_PRODUCT = 'https://arxiv.org/abs/2501.06425'
VALUE_RESIDUAL = ('https://arxiv.org/abs/2410.17897', 'https://arxiv.org/abs/2412.15113')


@dataclass(frozen=True, kw_only=True, repr=False)
class ScoreFlags(Flags):
    """What happens to scores until they are an output: keywords of ``Attention`` and of ``Attend``, the score rules' own."""

    heads: int | None = flag(None, 'Number of query heads.', low=1)
    causal: bool = flag(False, 'A query sees no key to its right.')
    flash: bool = flag(False, 'Insist on a fused kernel; without it the best kernel for these flags is chosen.',
                       paper='https://arxiv.org/abs/2205.14135')  # fmt: skip
    dropout: float = flag(0.0, 'Dropout on the attention weights.', low=0.0, high=1.0, often=True)
    pre_talking_heads: bool = flag(
        False,
        'Add a mixture of the scores over the heads to the scores.',
        paper=TALKING,
        formula='s_h ← s_h + Σ_g W[h, g] s_g, before the softmax',
    )
    post_talking_heads: bool = flag(
        False,
        'Mix the weights over the heads.',
        paper=TALKING,
        formula='w_h ← Σ_g W[h, g] w_g, after the softmax',
    )
    pre_scale_post_talking_heads: bool = flag(
        False, 'Multiply the weights by a mixture over the heads of the scores.', paper=TALKING
    )
    sparse_topk: int | None = flag(
        None,
        'Keep the highest scores of each query, this many (ties are all kept).',
        paper=TOPK,
        low=1,
        one_of='weights',
        formula='w_ij = softmax of the k highest s_ij of a query, 0 elsewhere',
    )
    sparse_topk_straight_through: bool = flag(
        False, 'Sparse weights forward, the gradient of the dense softmax backward.', paper=TOPK, parent='sparse_topk'
    )
    hard: bool = flag(
        False,
        'All weight on the highest score forward, the gradient of softmax backward.',
        one_of='weights',
        traits='needs_tokens',
    )
    l2_distance: bool = flag(
        False,
        'Scores are minus the squared distance of query and key.',
        paper='https://arxiv.org/abs/2006.04710',
        formula='s_ij = −scale · |q_i − k_j|²',
    )
    sigmoid: bool = flag(
        False,
        'Weights are the sigmoid of each score.',
        paper='https://arxiv.org/abs/2409.04431',
        one_of='weights',
        formula='w_ij = σ(s_ij)',
    )
    gumbel_softmax: bool = flag(
        False,
        'Weights are sampled with Gumbel noise, in evaluation too.',
        paper='https://arxiv.org/abs/1611.01144',
        one_of='weights',
        formula='w_ij = softmax_j((s_ij + g_ij) / τ), g = −log(−log u)',
        traits='needs_tokens',
    )
    gumbel_softmax_temp: float = flag(1.0, 'Temperature of the Gumbel softmax.', parent='gumbel_softmax', above=0)
    gumbel_softmax_hard: bool = flag(True, 'Sampled weights are one-hot forward.', parent='gumbel_softmax')
    selective: bool = flag(
        False, 'Tokens, through the first head, lower what later tokens may see of earlier ones.',
        paper='https://arxiv.org/abs/2410.02703', self_only=True, traits=('built_causal', 'needs_tokens'))  # fmt: skip
    cog_signed: bool = flag(
        False,
        'Softmax of the absolute scores, with the sign of the scores.',
        paper=COG,
        formula='w_ij = sign(s_ij) · softmax_j |s_ij|',
    )
    custom_attn_fn: Callable[..., Any] | None = flag(None, 'Your own function from scores to weights.')
    add_zero_kv: bool = flag(False, 'One key and value of zeros, so that a head can look at nothing.',
                             paper='https://www.evanmiller.org/attention-is-off-by-one.html',
        formula='w_ij = exp(s_ij) / (1 + Σ_k exp(s_ik))',
    )  # fmt: skip
    head_learned_sink: bool = flag(
        False,
        'Attention sink: one learned score per head that takes weight and gives nothing.',
        formula='w_ij = exp(s_ij) / (exp(z_h) + Σ_k exp(s_ik))',
    )
    softclamp_logits: bool = flag(
        False,
        'Keep the scores inside a range with tanh.',
        paper='https://arxiv.org/abs/2408.00118',
        formula='s ← c · tanh(s / c)',
    )
    logit_softclamp_value: float = flag(50.0, 'The largest absolute score.', parent='softclamp_logits', above=0)
    onnxable: bool = flag(False, 'Build the causal mask without triangular operations, for ONNX export.')
    flash_pack_seq: bool = flag(False, 'Several sequences lie behind each other in one row; the call gives their boundaries.')
    qk_norm: bool = flag(False, 'Unit-length queries and keys: cosine similarity.', paper='https://arxiv.org/abs/2010.04245',
                         often=True,
        formula='s_ij = g · (q_i · k_j) / (|q_i| |k_j|)',
    )  # fmt: skip
    inverted_attention: bool = flag(
        False, 'Inverted (slot) attention: each key is shared out among the queries, and each query averages what it got.',
        paper=INVERTED, since=LATER, traits=('built_causal', 'row_order'))  # fmt: skip
    scalable_softmax: bool = flag(
        False, 'Scores grow with the number n of keys that the query sees: times s · log n, s learned per head from 0.168 on, '
        'one over the mean of log n up to 1,024. Learned and zero keys count; biases do not grow.',
        paper='https://arxiv.org/abs/2501.19399', since='here')  # fmt: skip
    softpick: bool = flag(
        False, 'Rectified softmax: weights are relu(exp(score) - 1) over the sum of |exp(score) - 1|, plus 1e-6; they can all '
        'be 0, and need no sink.', paper='https://arxiv.org/abs/2504.20966', one_of='weights', since='here')  # fmt: skip
    stick_breaking: bool = flag(
        False, 'Stick-breaking attention: from the nearest key before the query on, each key takes the sigmoid of its score of '
        'what is left; the query does not see its own key, and what nobody takes is lost.',
        paper='https://arxiv.org/abs/2410.17980', one_of='weights', self_only=True, since='here',
        traits=('own_keys', 'built_causal'))  # fmt: skip


@dataclass(frozen=True, kw_only=True, repr=False)
class AttendFlags(ScoreFlags):
    """Every keyword of ``Attend``, which has no projections of its own."""

    scale: float | None = flag(None, 'Factor of the scores; None: one over the root of the width of a key.')
    cope: nn.Module | None = flag(None, 'Contextual positions, a function of queries and scores.', paper=COPE)
    composable: bool = flag(False, 'Heads are mixed by what `run` is given as `composition`.', paper=COMPOSABLE, since='here')
    path: bool = flag(False, 'Queries meet keys through what `run` is given as `steps`.', paper=PATH, since='here')
    sdp_kwargs: Mapping[str, Any] = flag(SDP_KWARGS, "Which backends torch's scaled dot product attention may use.")


@dataclass(frozen=True, kw_only=True, repr=False)
class AttentionFlags(AttentionFacts, ScoreFlags):
    """Every keyword of ``Attention`` except ``dim``; in a stack with ``attn_`` or ``cross_attn_`` in front."""

    dim_head: int = flag(DEFAULT_DIM_HEAD, 'Width of one query and key head.', low=1, often=True)
    heads: int = flag(8, 'Number of query heads.', low=1)
    dim_context: int | None = flag(None, 'Width of the sequence that keys and values are made of; None: the width of x.', low=1)
    dim_out: int | None = flag(None, 'Width of the output; None: the width of x.', low=1)
    attend_sdp_kwargs: Mapping[str, Any] = flag(
        SDP_KWARGS, "Which backends torch's scaled dot product attention may use: enable_flash, enable_math, "
        'enable_mem_efficient, enable_cudnn.',
    )  # fmt: skip
    one_kv_head: bool = flag(
        False,
        'Multi-query attention (MQA): all query heads share one key and value head.',
        paper='https://arxiv.org/abs/1911.02150',
    )
    kv_heads: int | None = flag(
        None, 'Grouped-query attention (GQA): number of key and value heads; query head h uses head h mod kv_heads.',
        paper='https://arxiv.org/abs/2305.13245', low=1, often=True,
    )  # fmt: skip
    value_dim_head: int | None = flag(None, 'Width of one value head; None: dim_head.', low=1)
    num_mem_kv: int = flag(
        0, 'Learned keys and values in front of all others, always visible.', paper='https://arxiv.org/abs/1907.01470', low=0
    )
    qk_norm_groups: int = flag(1, 'Normalise each head in this many chunks.', parent='qk_norm', low=1)
    qk_norm_scale: float = flag(10.0, 'Factor of the cosine similarities.', parent='qk_norm')
    qk_norm_dim_scale: bool = flag(
        False, 'Learned gains per channel after the norm.', paper='https://arxiv.org/abs/2302.05442', parent='qk_norm'
    )
    value_rmsnorm: bool = flag(False, 'RMS norm of each value head.')
    head_scale: bool = flag(
        False,
        'A learned factor for the output of each head.',
        paper='https://arxiv.org/abs/2110.09456',
        formula='o_h ← γ_h · o_h',
    )
    gate_value_heads: bool = flag(
        False, 'A sigmoid gate per token and head, so that a head can do nothing.', paper='https://arxiv.org/abs/2306.12929'
    )
    gate_values: bool = flag(
        False,
        'A gate per token and channel on the aggregated values.',
        formula='o ← o ⊙ σ(W x)',
    )
    swiglu_values: bool = flag(
        False, 'The gate of the values is SiLU instead of sigmoid.', parent=('gate_values', 'output_gate')
    )
    on_attn: bool = flag(
        False, 'Attention on attention: the output projection is a gated linear unit.', paper='https://arxiv.org/abs/1908.06954'
    )
    zero_init_output: bool = flag(False, 'The output projection starts at zero.')
    sublayer_dropout: float = flag(0.0, "Dropout on the layer's output.", low=0.0, high=1.0)
    max_attend_past: int | None = flag(
        None, 'Sliding window: a query sees at most this many positions back.', low=0, self_only=True, often=True
    )
    max_attend_future: int | None = flag(
        None,
        'Window of a layer that is not causal: a query sees at most this many positions ahead.',
        paper='https://arxiv.org/abs/2004.05150',
        low=0,
        self_only=True,
        since='here',
    )
    rotate_num_heads: int | None = flag(None, 'Only this many of the heads, the last ones, get rotary positions.', low=1)
    data_dependent_alibi: bool = flag(
        False,
        'Forgetting attention: a distance penalty from learned gates of the tokens between.',
        paper=FORGETTING,
        self_only=True,
        formula='s_ij ← s_ij + Σ_{j < t ≤ i} log σ(f_t)',
        traits=('own_keys', 'built_causal'),
    )
    data_dependent_alibi_per_row: bool = flag(
        False, 'The gates depend on the query too.', paper=FORGETTING, parent='data_dependent_alibi', self_only=True
    )
    data_dependent_alibi_per_row_dim_head: int = flag(
        8, 'Width of the small queries and keys of these gates.', parent='data_dependent_alibi_per_row', low=1, self_only=True
    )
    data_dependent_alibi_kwargs: Mapping[str, Any] = flag(
        {}, 'More keywords for the forgetting bias: bias_init, post_log_scale.', parent='data_dependent_alibi', self_only=True
    )
    use_cope: bool = flag(
        False,
        'Contextual positions: each query counts the keys it opens a gate for.',
        paper=COPE,
        self_only=True,
        traits='built_causal',
    )
    cope_max_pos: int = flag(16, 'Number of contextual positions.', paper=COPE, parent='use_cope', low=1, self_only=True)
    cope_soft_onehot_pos: bool = flag(
        False, 'Contextual positions mix all position embeddings by nearness.', paper=COPE, parent='use_cope', self_only=True
    )
    cope_talking_heads: bool = flag(
        False, 'Mix the heads before contextual positions are counted.', parent='use_cope', self_only=True
    )
    use_rel_proj_pos_bias: bool = flag(
        False,
        'Relative projected bias: each query mixes learned functions of the distance into its own bias.',
        since='2.24.0',
        self_only=True,
    )
    rel_proj_num_distance_basis: int = flag(
        16, 'Number of these functions.', parent='use_rel_proj_pos_bias', since='2.24.0', self_only=True, low=1
    )
    rel_proj_max_dist: int = flag(
        1024, 'Distances from here on have no bias.', parent='use_rel_proj_pos_bias', since='2.24.0', self_only=True, low=1
    )
    learned_value_residual_mix: bool = flag(
        False,
        "How much of the first layer's values is mixed in is learned, per token and head.",
        paper=VALUE_RESIDUAL,
        formula='v ← m v + (1 − m) v₁, m = σ(W x)',
    )
    orthog_projected_values: bool = flag(
        False,
        "Give the output without its component along the token's own values.",
        paper=BELIEF,
        self_only=True,
        formula='o ← o − (o · v̂) v̂, v̂ = v / |v|',
        traits='own_keys',
    )
    orthog_projected_values_per_head: bool = flag(
        False,
        'The same, and as in 2.16.1 over all heads too; with both flags the output is given twice.',
        paper=BELIEF,
        self_only=True,
        traits='own_keys',
    )
    laser: bool = flag(
        False,
        'Attend over the exponentials of the values and take the logarithm.',
        paper=LASER,
        formula='o_i = log Σ_j w_ij exp(v_j)',
    )
    laser_softclamp_value: float = flag(
        15.0, 'Values are softly clamped to this before exp.', paper=LASER, parent='laser', above=0
    )
    qkv_receive_diff_residuals: bool = flag(
        False, 'The input is three views (3, b, n, d): one each for queries, keys and values.'
    )
    use_latent_q: bool = flag(False, 'Queries are made of a narrow latent.', paper=LATENT)
    dim_latent_q: int | None = flag(None, "Width of the queries' latent.", paper=LATENT, parent='use_latent_q', low=1)
    use_latent_kv: bool = flag(
        False,
        'Multi-head latent attention (MLA): keys and values are made of a narrow latent, which is what the cache keeps.',
        paper=LATENT,
    )
    dim_latent_kv: int | None = flag(
        None, "Width of the keys' and values' latent.", paper=LATENT, parent='use_latent_kv', low=1
    )
    latent_rope_subheads: int | None = flag(
        None, 'This many key heads bypass the latent and carry the rotary positions.', paper=LATENT, parent='use_latent_kv',
        low=1,
    )  # fmt: skip
    hybrid_module: nn.Module | None = flag(
        None,
        'A module that runs beside attention and is averaged with it; it is copied.',
        paper=HYBRID,
        traits=('built_causal', 'needs_tokens', 'row_order'),
    )
    hybrid_mask_kwarg: str | None = flag(
        None, "Name of the module's keyword that takes the padding mask, if the layer is not causal.", parent='hybrid_module'
    )
    hybrid_fold_axial_dim: int | None = flag(
        None, 'The module sees every n-th token: so many short sequences instead of a long one.', parent='hybrid_module', low=1
    )
    hybrid_learned_mix: bool = flag(
        False, 'The mixture of attention and module is learned, per token and head.', paper=HYBRID, parent='hybrid_module'
    )

    qkv_bias: bool | tuple[str, ...] = flag(
        False, "Biases in the projections of queries, keys and values; or only in those named: ('q', 'v').", since='here'
    )
    out_bias: bool = flag(False, 'A bias in the output projection.', since='here')
    scale: float | None = flag(
        None, 'Factor of the scores; None: dim_head ** -0.5, or qk_norm_scale.', paper=ATTENTION_PAPER, since='here'
    )
    qk_norm_shared_gain: bool = flag(
        False, 'One gain per channel for all heads.', paper='https://arxiv.org/abs/2302.05442', parent='qk_norm_dim_scale',
        since='here',
    )  # fmt: skip
    qk_norm_eps: float | None = flag(
        None, 'Added to the mean square of a head before its norm; None: nothing.', parent='qk_norm', above=0, since='here'
    )
    output_proj_depth: int | None = flag(
        None, 'The output projection starts with variance 1 / (2 · width · this).', since='2.31.10', low=1
    )

    qk_rmsnorm: bool = flag(False, 'RMS norm of each query and key head, with gains.', since=LATER)
    k_rmsnorm: bool = flag(False, 'RMS norm of each key head alone, with gains.', since=LATER)
    gate_values_rank: int | None = flag(
        None, 'The gate on the aggregated values is made through this many channels, and starts half open.',
        parent='gate_values', since=LATER, low=1,
    )  # fmt: skip
    gate_values_headwise: bool = flag(
        False, 'That gate is one number per head, and starts half open.', parent='gate_values', since=LATER
    )
    output_gate: bool = flag(
        False, 'A gate on the aggregated values that is made of them, too; one with that of `gate_values` if both are on.',
        paper=HYBRID_GATES, since=LATER,
    )  # fmt: skip
    output_gate_rank: int | None = flag(
        None, 'This gate is made through so many channels.', paper=HYBRID_GATES, parent='output_gate', since=LATER, low=1
    )
    output_gate_headwise: bool = flag(
        False, 'This gate is one number per head.', paper=HYBRID_GATES, parent='output_gate', since=LATER
    )
    low_rank_silu_gates: bool = flag(
        True, 'Gates of low rank have a SiLU between their two maps.', parent=('gate_values_rank', 'output_gate_rank'),
        since=LATER,
    )  # fmt: skip
    canon: bool = flag(
        False, 'Queries, keys and values get a causal convolution over four tokens, added.',
        paper='https://arxiv.org/abs/2512.17351', self_only=True, since='here',
    )  # fmt: skip
    exclusive: bool = flag(
        False, "Each head's output without its component along the token's own value, as that is attended to.",
        paper=EXCLUSIVE, self_only=True, since='here', traits='own_keys',
    )  # fmt: skip
    differential: bool = flag(
        False, 'Differential attention: neighbouring heads are a pair that shares its two values side by side, and gives the '
        'difference of its two softmaxes, the second times a learned λ, then an RMS norm and the factor 1 - λ_init.',
        paper=DIFFERENTIAL, since='here',
    )  # fmt: skip
    differential_lambda_init: float | None = flag(
        None, 'Where λ starts; None: 0.8 - 0.6 · exp(-0.3 · (l - 1)) in block l, counted from 1.', paper=DIFFERENTIAL,
        parent='differential', low=0.0, below=1.0, since='here',
    )  # fmt: skip
    composable: bool = flag(
        False, 'Dynamically composed heads: scores, and weights, of all heads are mixed by matrices of low rank and by gates '
        'that each query and each key makes of its token; they start as plain attention.', paper=COMPOSABLE, since='here',
    )  # fmt: skip
    composable_rank: int = flag(2, 'Rank of these matrices.', paper=COMPOSABLE, parent='composable', low=1, since='here')
    tensor_product: bool = flag(
        False, 'Tensor product attention: queries, keys and values are means of outer products of a vector over heads and one '
        'over channels, both made of the token; the cache keeps the vectors of keys and values.', paper=TENSOR_PRODUCT,
        since='here',
    )  # fmt: skip
    tensor_product_q_rank: int = flag(
        6, 'Number of outer products of a query.', paper=TENSOR_PRODUCT, parent='tensor_product', low=1, since='here'
    )
    tensor_product_kv_rank: int = flag(
        2, 'Number of outer products of a key, and of a value.', paper=TENSOR_PRODUCT, parent='tensor_product', low=1,
        since='here',
    )  # fmt: skip
    path: bool = flag(
        False, 'PaTH: a query meets a key through a Householder-like factor, I - β w wᵀ, of each token behind the key up to '
        'its own; w is made through a narrow middle and a convolution over three tokens, per key head.',
        paper=PATH, self_only=True, since='here', traits=('own_keys', 'built_causal'),
    )  # fmt: skip
    path_rank: int = flag(32, 'Width of that middle.', paper=PATH, parent='path', low=1, self_only=True, since='here')
    project_out: bool | None = flag(None, 'False: no output projection, the heads side by side are the output.', since=LATER)

    def at_depth(self, block: int) -> Self:
        """The flags of a layer in this block, counted from 1."""
        if not self.differential or self.differential_lambda_init is not None:
            return self
        return replace(self, differential_lambda_init=0.8 - 0.6 * math.exp(-0.3 * (block - 1)))
