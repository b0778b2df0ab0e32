"""The flags of one attention layer. What follows from them together is in ``attention_facts.py``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from torch import nn

from x_transformers.flags.attention_facts import AttentionFacts
from x_transformers.flags.base import flag
from x_transformers.flags.scores import COMPOSABLE, COPE, LATER, PATH, SDP_KWARGS, ScoreFlags

DEFAULT_DIM_HEAD = 64

FORGETTING = 'https://openreview.net/forum?id=q2Lnyegkr8'
HYBRID = 'https://arxiv.org/abs/2411.13676'
LASER = 'https://arxiv.org/abs/2411.03493'
LATENT = 'https://arxiv.org/abs/2405.04434'
BELIEF = 'https://openreview.net/forum?id=Ard2QzPAUK'
ATTENTION_PAPER = 'https://arxiv.org/abs/1706.03762'
DIFFERENTIAL = 'https://arxiv.org/abs/2410.05258'
NGPT = 'https://arxiv.org/abs/2410.01131'
EXCLUSIVE = 'https://arxiv.org/abs/2603.09078'
HYBRID_GATES = 'https://arxiv.org/abs/2608.11805'
TENSOR_PRODUCT = 'https://arxiv.org/abs/2501.06425'
VALUE_RESIDUAL = ('https://arxiv.org/abs/2410.17897', 'https://arxiv.org/abs/2412.15113')


@dataclass(frozen=True, kw_only=True, repr=False)
class AttentionFlags(AttentionFacts, ScoreFlags):
    """Every keyword of ``Attention`` except ``dim``; in a stack with ``attn_`` or ``cross_attn_`` in front."""

    dim_head: int = flag(DEFAULT_DIM_HEAD, 'Width of one query and key head.', low=1, often=True, family='heads')
    heads: int = flag(8, 'Number of query heads.', low=1, family='heads')
    dim_context: int | None = flag(
        None, 'Width of the sequence that keys and values are made of; None: the width of x.', low=1, family='heads'
    )
    dim_out: int | None = flag(None, 'Width of the output; None: the width of x.', low=1, family='heads')
    attend_sdp_kwargs: Mapping[str, Any] = flag(
        SDP_KWARGS, "Which backends torch's scaled dot product attention may use: enable_flash, enable_math, "
        'enable_mem_efficient, enable_cudnn.', family='kernels'
    )  # fmt: skip
    one_kv_head: bool = flag(
        False,
        'Multi-query attention (MQA): all query heads share one key and value head.',
        paper='https://arxiv.org/abs/1911.02150',
        family='heads',
    )
    kv_heads: int | None = flag(
        None, 'Grouped-query attention (GQA): number of key and value heads; query head h uses head h mod kv_heads.',
        paper='https://arxiv.org/abs/2305.13245', low=1, often=True, family='heads'
    )  # fmt: skip
    value_dim_head: int | None = flag(None, 'Width of one value head; None: dim_head.', low=1, family='heads')
    num_mem_kv: int = flag(
        0,
        'Learned keys and values in front of all others, always visible.',
        paper='https://arxiv.org/abs/1907.01470',
        low=0,
        family='weights',
    )
    qk_norm_groups: int = flag(1, 'Normalize each head in this many chunks.', parent='qk_norm', low=1)
    qk_norm_scale: float = flag(10.0, 'Factor of the cosine similarities.', parent='qk_norm')
    qk_norm_dim_scale: bool = flag(
        False, 'Learned gains per channel after the norm.', paper='https://arxiv.org/abs/2302.05442', parent='qk_norm'
    )
    value_rmsnorm: bool = flag(False, 'RMS norm of each value head.', family='values')
    head_scale: bool = flag(
        False,
        'A learned factor for the output of each head.',
        paper='https://arxiv.org/abs/2110.09456',
        formula='o_h ← γ_h · o_h',
        family='values',
    )
    gate_value_heads: bool = flag(
        False,
        'A sigmoid gate per token and head, so that a head can do nothing.',
        paper='https://arxiv.org/abs/2306.12929',
        family='values',
    )
    gate_values: bool = flag(
        False, 'A gate per token and channel on the aggregated values.', formula='o ← o ⊙ σ(W x)', family='values'
    )
    swiglu_values: bool = flag(
        False, 'The gate of the values is SiLU instead of sigmoid.', parent=('gate_values', 'output_gate')
    )
    on_attn: bool = flag(
        False,
        'Attention on attention: the output projection is a gated linear unit.',
        paper='https://arxiv.org/abs/1908.06954',
        family='values',
    )
    zero_init_output: bool = flag(False, 'The output projection starts at zero.', family='heads')
    sublayer_dropout: float = flag(0.0, "Dropout on the layer's output.", low=0.0, high=1.0, family='heads')
    max_attend_past: int | None = flag(
        None,
        'Sliding window: a query sees at most this many positions back.',
        low=0,
        self_only=True,
        often=True,
        family='positions',
    )
    max_attend_future: int | None = flag(
        None,
        'Window of a layer that is not causal: a query sees at most this many positions ahead.',
        paper='https://arxiv.org/abs/2004.05150',
        low=0,
        self_only=True,
        since='here',
        family='positions',
    )
    rotate_num_heads: int | None = flag(
        None, 'Only this many of the heads, the last ones, get rotary positions.', low=1, family='positions'
    )
    data_dependent_alibi: bool = flag(
        False,
        'Forgetting attention: a distance penalty from learned gates of the tokens between.',
        paper=FORGETTING,
        self_only=True,
        formula='s_ij ← s_ij + Σ_{j < t ≤ i} log σ(f_t)',
        traits=('own_keys', 'built_causal'),
        family='positions',
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
        family='positions',
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
        family='positions',
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
        family='values',
    )
    orthog_projected_values: bool = flag(
        False,
        "Give the output without its component along the token's own values.",
        paper=BELIEF,
        self_only=True,
        formula='o ← o − (o · v̂) v̂, v̂ = v / |v|',
        traits='own_keys',
        family='values',
    )
    orthog_projected_values_per_head: bool = flag(
        False,
        'The same, and as in 2.16.1 over all heads too; with both flags the output is given twice.',
        paper=BELIEF,
        self_only=True,
        traits='own_keys',
        family='values',
    )
    laser: bool = flag(
        False,
        'Attend over the exponentials of the values and take the logarithm.',
        paper=LASER,
        formula='o_i = log Σ_j w_ij exp(v_j)',
        family='values',
    )
    laser_softclamp_value: float = flag(
        15.0, 'Values are softly clamped to this before exp.', paper=LASER, parent='laser', above=0
    )
    qkv_receive_diff_residuals: bool = flag(
        False, 'The input is three views (3, b, n, d): one each for queries, keys and values.', family='values'
    )
    use_latent_q: bool = flag(False, 'Queries are made of a narrow latent.', paper=LATENT, family='heads')
    dim_latent_q: int | None = flag(None, "Width of the queries' latent.", paper=LATENT, parent='use_latent_q', low=1)
    use_latent_kv: bool = flag(
        False,
        'Multi-head latent attention (MLA): keys and values are made of a narrow latent, which is what the cache keeps.',
        paper=LATENT,
        family='heads',
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
        family='values',
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
        False,
        "Biases in the projections of queries, keys and values; or only in those named: ('q', 'v').",
        since='here',
        family='heads',
    )
    out_bias: bool = flag(False, 'A bias in the output projection.', since='here', family='heads')
    scale: float | None = flag(
        None,
        'Factor of the scores; None: dim_head ** -0.5, or qk_norm_scale.',
        paper=ATTENTION_PAPER,
        since='here',
        family='weights',
    )
    qk_norm_shared_gain: bool = flag(
        False, 'One gain per channel for all heads.', paper='https://arxiv.org/abs/2302.05442', parent='qk_norm_dim_scale',
        since='here',
    )  # fmt: skip
    qk_norm_eps: float | None = flag(
        None, 'Added to the mean square of a head before its norm; None: nothing.', parent='qk_norm', above=0, since='here'
    )
    output_proj_depth: int | None = flag(
        None, 'The output projection starts with variance 1 / (2 · width · this).', since='2.31.10', low=1, family='heads'
    )

    unit_weights: bool = flag(
        False, 'Weights, queries and keys have unit length, scores are times the root of dim_head and the square of a learned '
        'gain per head and channel, behind the rotation. `ngpt` turns it on.', paper=NGPT, since='here', family='heads',
    )  # fmt: skip
    qk_rmsnorm: bool = flag(False, 'RMS norm of each query and key head, with gains.', since=LATER, family='heads')
    k_rmsnorm: bool = flag(False, 'RMS norm of each key head alone, with gains.', since=LATER, family='heads')
    gate_values_rank: int | None = flag(
        None, 'The gate on the aggregated values is made through this many channels, and starts half open.',
        parent='gate_values', since=LATER, low=1,
    )  # fmt: skip
    gate_values_headwise: bool = flag(
        False, 'That gate is one number per head, and starts half open.', parent='gate_values', since=LATER
    )
    output_gate: bool = flag(
        False, 'A gate on the aggregated values that is made of them, too; one with that of `gate_values` if both are on.',
        paper=HYBRID_GATES, since=LATER, family='values'
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
        paper='https://arxiv.org/abs/2512.17351', self_only=True, since='here', family='positions'
    )  # fmt: skip
    exclusive: bool = flag(
        False, "Each head's output without its component along the token's own value, as that is attended to.",
        paper=EXCLUSIVE, self_only=True, since='here', traits='own_keys', family='values'
    )  # fmt: skip
    differential: bool = flag(
        False, 'Differential attention: neighbouring heads are a pair that shares its two values side by side, and gives the '
        'difference of its two softmaxes, the second times a learned λ, then an RMS norm and the factor 1 - λ_init.',
        paper=DIFFERENTIAL, since='here', family='weights'
    )  # fmt: skip
    differential_lambda_init: float | None = flag(
        None, 'Where λ starts; None: 0.8 - 0.6 · exp(-0.3 · (l - 1)) in block l, counted from 1.', paper=DIFFERENTIAL,
        parent='differential', low=0.0, below=1.0, since='here',
    )  # fmt: skip
    composable: bool = flag(
        False, 'Dynamically composed heads: scores, and weights, of all heads are mixed by matrices of low rank and by gates '
        'that each query and each key makes of its token; they start as plain attention.', paper=COMPOSABLE, since='here',
        family='weights',
    )  # fmt: skip
    composable_rank: int = flag(2, 'Rank of these matrices.', paper=COMPOSABLE, parent='composable', low=1, since='here')
    tensor_product: bool = flag(
        False, 'Tensor product attention: queries, keys and values are means of outer products of a vector over heads and one '
        'over channels, both made of the token; the cache keeps the vectors of keys and values.', paper=TENSOR_PRODUCT,
        since='here', family='heads'
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
        paper=PATH, self_only=True, since='here', traits=('own_keys', 'built_causal'), family='positions'
    )  # fmt: skip
    path_rank: int = flag(32, 'Width of that middle.', paper=PATH, parent='path', low=1, self_only=True, since='here')
    project_out: bool | None = flag(
        None, 'False: no output projection, the heads side by side are the output.', since=LATER, family='heads'
    )

    def at_depth(self, block: int) -> Self:
        """The flags of a layer in this block, counted from 1."""
        if not self.differential or self.differential_lambda_init is not None:
            return self
        return replace(self, differential_lambda_init=0.8 - 0.6 * math.exp(-0.3 * (block - 1)))
