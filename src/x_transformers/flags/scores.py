"""The flags of the steps from scores to the output of attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from x_transformers.flags.base import Flags, flag
from x_transformers.flags.reasons import DRAWS, DROPS, MIXES, UNKNOWN
from x_transformers.flags.rule import Rule

LATER = '2.31.10'
SDP_KWARGS = {'enable_flash': True, 'enable_math': True, 'enable_mem_efficient': True}
SDP_BACKENDS = (*SDP_KWARGS, 'enable_cudnn')
CAUSAL = 'Use a causal layer, or leave out '
COG = 'https://openreview.net/forum?id=ezRrwwbxd0'
COPE = 'https://arxiv.org/abs/2405.18719'
INVERTED = 'https://openreview.net/forum?id=WgQZNoQ5AB'
TALKING = 'https://arxiv.org/abs/2003.02436'
TOPK = 'https://arxiv.org/abs/2505.22074'
COMPOSABLE = 'https://arxiv.org/abs/2405.08553'
PATH = 'https://arxiv.org/abs/2505.16381'


@dataclass(frozen=True, kw_only=True, repr=False)
class ScoreFlags(Flags):
    """What happens to scores until they are an output: keywords of ``Attention`` and of ``Attend``, the score rules' own."""

    heads: int | None = flag(None, 'Number of query heads.', low=1, family='heads')
    causal: bool = flag(
        False, 'A query attends to no later key.', traits=('set_by_stack', 'set_for_cross'), family='positions',
    )  # fmt: skip
    flash: bool = flag(False, 'Require a fused kernel; by default the best kernel for these flags is chosen.',
                       paper='https://arxiv.org/abs/2205.14135', family='kernels')  # fmt: skip
    dropout: float = flag(
        0.0, 'Dropout on the attention weights.', low=0.0, high=1.0, often=True, family='weights',
        refused={'tensor': DROPS, 'context': DRAWS},
    )  # fmt: skip
    pre_talking_heads: bool = flag(
        False, 'Add a mixture of the scores over the heads to the scores.', paper=TALKING,
        formula='s_h ← s_h + Σ_g W[h, g] s_g, before the softmax', family='weights', refused={'tensor': MIXES},
    )  # fmt: skip
    post_talking_heads: bool = flag(
        False, 'Mix the weights over the heads.', paper=TALKING, formula='w_h ← Σ_g W[h, g] w_g, after the softmax',
        family='weights', refused={'tensor': MIXES},
    )  # fmt: skip
    pre_scale_post_talking_heads: bool = flag(
        False, 'Multiply the weights by a mixture over the heads of the scores.', paper=TALKING, family='weights',
        refused={'tensor': MIXES},
    )  # fmt: skip
    sparse_topk: int | None = flag(
        None, 'Keep the highest scores of each query, this many (ties are all kept).', paper=TOPK, low=1, one_of='weights',
        formula='w_ij = softmax of the k highest s_ij of a query, 0 elsewhere', family='weights',
    )  # fmt: skip
    sparse_topk_straight_through: bool = flag(
        False, 'Sparse weights forward, the gradient of the dense softmax backward.', paper=TOPK, parent='sparse_topk'
    )
    hard: bool = flag(
        False, 'All weight on the highest score forward, the gradient of softmax backward.', one_of='weights',
        traits='needs_tokens', family='weights',
    )  # fmt: skip
    l2_distance: bool = flag(
        False, 'Scores are minus the squared distance of query and key.', paper='https://arxiv.org/abs/2006.04710',
        formula='s_ij = −scale · |q_i − k_j|²', family='weights',
        excludes={'weights': ('only one of them can be had', 'Keep one.')},
    )  # fmt: skip
    sigmoid: bool = flag(
        False, 'Weights are the sigmoid of each score.', paper='https://arxiv.org/abs/2409.04431', one_of='weights',
        formula='w_ij = σ(s_ij)', family='weights',
    )  # fmt: skip
    gumbel_softmax: bool = flag(
        False, 'Weights are sampled with Gumbel noise, in evaluation too.', paper='https://arxiv.org/abs/1611.01144',
        one_of='weights', formula='w_ij = softmax_j((s_ij + g_ij) / τ), g = −log(−log u)', traits='needs_tokens',
        family='weights', refused={'tensor': 'other noise would be drawn than in one process', 'context': DRAWS},
    )  # fmt: skip
    gumbel_softmax_temp: float = flag(1.0, 'Temperature of the Gumbel softmax.', parent='gumbel_softmax', above=0)
    gumbel_softmax_hard: bool = flag(True, 'Sampled weights are one-hot forward.', parent='gumbel_softmax')
    selective: bool = flag(
        False, 'The first head lets tokens reduce the attention of later tokens to earlier ones.',
        paper='https://arxiv.org/abs/2410.02703', self_only=True,
        traits=('built_causal', 'needs_tokens', 'no_cache'), family='weights',
        refused={
            'tensor': 'the first head decides for all, and one process has it',
            'context': 'what earlier queries see is not gathered',
        },
        needs={'causal': ('what a token takes away from later ones is defined for causal attention', CAUSAL + '[selective].')},
    )  # fmt: skip
    cog_signed: bool = flag(
        False, 'Softmax of the absolute scores, with the sign of the scores.', paper=COG,
        formula='w_ij = sign(s_ij) · softmax_j |s_ij|', family='weights',
    )  # fmt: skip
    custom_attn_fn: Callable[..., Any] | None = flag(
        None, 'Your own function from scores to weights.', example=abs, family='weights',
        refused={'tensor': UNKNOWN, 'context': 'it may look at other slices'},
        excludes={'weights': 'your own function takes the place of the other, which would do nothing'},
    )  # fmt: skip
    add_zero_kv: bool = flag(False, 'One key and value of zeros, so that a head can attend to nothing.',
                             paper='https://www.evanmiller.org/attention-is-off-by-one.html',
        formula='w_ij = exp(s_ij) / (1 + Σ_k exp(s_ik))', family='weights'
    )  # fmt: skip
    head_learned_sink: bool = flag(
        False, 'Attention sink: one learned score per head, without a value, that absorbs weight.',
        formula='w_ij = exp(s_ij) / (exp(z_h) + Σ_k exp(s_ik))', family='weights',
        rules=(
            Rule(
                ('head_learned_sink', 'sigmoid'),
                lambda flags, dim: flags.head_learned_sink and flags.sigmoid and flags.custom_attn_fn is None,
                'sigmoid weights do not compete, so a sink takes nothing away and would never learn',
                {'head_learned_sink': True, 'sigmoid': True},
            ),
        ),
    )  # fmt: skip
    softclamp_logits: bool = flag(
        False, 'Keep the scores inside a range with tanh.', paper='https://arxiv.org/abs/2408.00118',
        formula='s ← c · tanh(s / c)', family='weights',
    )  # fmt: skip
    logit_softclamp_value: float = flag(50.0, 'The largest absolute score.', parent='softclamp_logits', above=0)
    onnxable: bool = flag(False, 'Build the causal mask without triangular operations, for ONNX export.', family='kernels')
    flash_pack_seq: bool = flag(
        False, 'Several sequences are packed into one row; the call passes their boundaries.', family='kernels',
        excludes={
            ('selective', 'hybrid_module', 'path'): 'this would carry something from one packed sequence into the next'
        },
    )  # fmt: skip
    qk_norm: bool = flag(False, 'Unit-length queries and keys: cosine similarity.', paper='https://arxiv.org/abs/2010.04245',
                         often=True,
        formula='s_ij = g · (q_i · k_j) / (|q_i| |k_j|)', family='heads'
    )  # fmt: skip
    inverted_attention: bool = flag(
        False, 'Inverted (slot) attention: each key is distributed among the queries, and each query averages its share.',
        paper=INVERTED, since=LATER, traits=('built_causal', 'row_order', 'no_cache'), family='weights',
        excludes={
            'causal': (
                'later queries would take from what earlier ones see',
                'Use a layer that is not causal, or leave out [inverted_attention].',
            ),
            ('cog_signed', 'head_learned_sink', 'flash_pack_seq'): (
                'each key is shared out among the queries, of which these know nothing'
            ),
        },
    )  # fmt: skip
    scalable_softmax: bool = flag(
        False, 'Scores grow with the number n of keys that the query sees: times s · log n, s learned per head from 0.168 on, '
        'one over the mean of log n up to 1,024. Learned and zero keys count; biases do not grow.',
        paper='https://arxiv.org/abs/2501.19399', since='here', family='weights',
        excludes={
            ('sigmoid', 'softpick', 'stick_breaking', 'l2_distance', 'inverted_attention'): (
                'it sharpens a softmax of products over the keys of a query, of which there is none'
            ),
        },
    )  # fmt: skip
    softpick: bool = flag(
        False, 'Rectified softmax: weights are relu(exp(score) - 1) over the sum of |exp(score) - 1|, plus 1e-6; they can all '
        'be 0, and need no sink.', paper='https://arxiv.org/abs/2504.20966', one_of='weights', since='here', family='weights',
        excludes={
            ('head_learned_sink', 'add_zero_kv'): (
                'a score of 0 takes no weight, so a sink takes nothing away and would never learn', 'Leave out the sink.'
            ),
        },
    )  # fmt: skip
    stick_breaking: bool = flag(
        False, 'Stick-breaking attention: from the nearest key before the query on, each key takes the sigmoid of its score of '
        'what is left; the query does not see its own key, and what nobody takes is lost.',
        paper='https://arxiv.org/abs/2410.17980', one_of='weights', self_only=True, since='here',
        traits=('own_keys', 'built_causal'), family='weights',
        needs={'causal': ('the stick is broken from the nearest earlier key on', CAUSAL + '[stick_breaking].')},
        excludes={
            ('head_learned_sink', 'add_zero_kv', 'laser'): (
                'what lies in front of all keys takes only what they leave, so that a sink changes nothing, and the first '
                'query sees nothing, which has no logarithm'
            ),
        },
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, repr=False)
class AttendFlags(ScoreFlags):
    """Every keyword of ``Attend``, which has no projections of its own."""

    scale: float | None = flag(None, 'Factor of the scores; None: one over the root of the width of a key.')
    cope: nn.Module | None = flag(None, 'Contextual positions, a function of queries and scores.', paper=COPE)
    composable: bool = flag(False, 'Heads are mixed by what `run` is given as `composition`.', paper=COMPOSABLE, since='here')
    path: bool = flag(False, 'Queries meet keys through what `run` is given as `steps`.', paper=PATH, since='here')
    sdp_kwargs: Mapping[str, Any] = flag(SDP_KWARGS, "Which backends torch's scaled dot product attention may use.")
