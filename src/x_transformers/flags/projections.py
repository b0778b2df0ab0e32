"""The flags around the scores of an attention layer: heads, projections, norms of heads, gates.

What follows from them together stands beneath them: ``num_kv_heads``, ``value_dim`` (the width of one value head),
``score_scale`` (the factor of the scores), ``dim_attended`` (the width of the heads side by side), ``gate_starts_open``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

from x_transformers.flags.base import flag
from x_transformers.flags.reasons import DRAWS, UNIT
from x_transformers.flags.rule import Rule
from x_transformers.flags.scores import LATER, SDP_BACKENDS, SDP_KWARGS, ScoreFlags

DEFAULT_DIM_HEAD = 64

ATTENTION_PAPER = 'https://arxiv.org/abs/1706.03762'
DIFFERENTIAL = 'https://arxiv.org/abs/2410.05258'
HYBRID_GATES = 'https://arxiv.org/abs/2608.11805'
NGPT = 'https://arxiv.org/abs/2410.01131'
TENSOR_PRODUCT = 'https://arxiv.org/abs/2501.06425'


@dataclass(frozen=True, kw_only=True, repr=False)
class ProjectionFlags(ScoreFlags):
    """Base of ``AttentionFlags``: from tokens to heads, and from heads back to channels."""

    dim_head: int = flag(DEFAULT_DIM_HEAD, 'Width of one query and key head.', low=1, often=True, family='heads')
    heads: int = flag(8, 'Number of query heads.', low=1, traits=('set_by_stack', 'set_for_cross'), family='heads')
    dim_context: int | None = flag(
        None, 'Width of the sequence that keys and values are projected from; None: the width of x.', low=1, family='heads'
    )
    dim_out: int | None = flag(None, 'Width of the output; None: the width of x.', low=1, family='heads')
    attend_sdp_kwargs: Mapping[str, Any] = flag(
        SDP_KWARGS, "Which backends torch's scaled dot product attention may use: enable_flash, enable_math, "
        'enable_mem_efficient, enable_cudnn.', family='kernels',
        rules=(
            Rule(
                ('attend_sdp_kwargs',), lambda flags, dim: bool(set(flags.attend_sdp_kwargs) - set(SDP_BACKENDS)),
                f'the known keywords are {", ".join(SDP_BACKENDS)}', {'attend_sdp_kwargs': {'enable_fast': True}}, 'Use those.',
            ),
            Rule(
                ('attend_sdp_kwargs',), lambda flags, dim: not any(flags.attend_sdp_kwargs.values()), 'no backend is left',
                {'attend_sdp_kwargs': {'enable_math': False}}, 'Enable one.',
            ),
        ),
    )  # fmt: skip
    one_kv_head: bool = flag(
        False, 'Multi-query attention (MQA): all query heads share one key and value head.',
        paper='https://arxiv.org/abs/1911.02150', family='heads',
        excludes={'kv_heads': 'both say how many key and value heads there are'},
    )  # fmt: skip
    kv_heads: int | None = flag(
        None, 'Grouped-query attention (GQA): number of key and value heads; query head h uses head h mod kv_heads.',
        paper='https://arxiv.org/abs/2305.13245', low=1, often=True, family='heads',
        rules=(
            Rule(
                ('heads', 'kv_heads'), lambda flags, dim: flags.heads % flags.num_kv_heads != 0,
                'the query heads share the key heads evenly, so the second number must divide the first',
                {'heads': 8, 'kv_heads': 3}, 'Choose a divisor of {heads}.',
            ),
        ),
    )  # fmt: skip
    value_dim_head: int | None = flag(None, 'Width of one value head; None: dim_head.', low=1, family='heads')
    num_mem_kv: int = flag(
        0, 'Learned keys and values before all others, always visible.', paper='https://arxiv.org/abs/1907.01470', low=0,
        family='weights',
    )  # fmt: skip
    qk_norm_groups: int = flag(
        1, 'Normalize each head in this many chunks.', parent='qk_norm', low=1,
        rules=(
            Rule(
                ('qk_norm_groups', 'dim_head'), lambda flags, dim: flags.qk_norm and flags.dim_head % flags.qk_norm_groups != 0,
                'a head is cut into chunks of one size', {'qk_norm': True, 'qk_norm_groups': 3, 'dim_head': 64},
                'Choose a divisor of {dim_head}.',
            ),
            Rule(
                ('qk_norm_groups', 'dim_head'),
                lambda flags, dim: flags.qk_norm and flags.qk_norm_groups > 1 and flags.dim_head // flags.qk_norm_groups <= 2,
                'the cosine of chunks with two channels or one says too little; a chunk needs more than 2',
                {'qk_norm': True, 'qk_norm_groups': 32, 'dim_head': 64}, 'Choose fewer groups.',
            ),
        ),
    )  # fmt: skip
    qk_norm_scale: float = flag(10.0, 'Factor of the cosine similarities.', parent='qk_norm')
    qk_norm_dim_scale: bool = flag(
        False, 'Learned gains per channel after the norm.', paper='https://arxiv.org/abs/2302.05442', parent='qk_norm'
    )
    value_rmsnorm: bool = flag(False, 'RMS norm of each value head.', family='values')
    head_scale: bool = flag(
        False, 'A learned factor for the output of each head.', paper='https://arxiv.org/abs/2110.09456',
        formula='o_h ← γ_h · o_h', family='values',
    )  # fmt: skip
    gate_value_heads: bool = flag(
        False, 'A sigmoid gate per token and head, so that a head can output nothing.', paper='https://arxiv.org/abs/2306.12929',
        family='values',
    )  # fmt: skip
    gate_values: bool = flag(
        False, 'A gate per token and channel on the aggregated values.', formula='o ← o ⊙ σ(W x)', family='values'
    )
    swiglu_values: bool = flag(
        False, 'The gate of the values is SiLU instead of sigmoid.', parent=('gate_values', 'output_gate')
    )
    on_attn: bool = flag(
        False, 'Attention on attention: the output projection is a gated linear unit.',
        paper='https://arxiv.org/abs/1908.06954', family='values',
    )  # fmt: skip
    zero_init_output: bool = flag(False, 'The output projection starts at zero.', family='heads')
    sublayer_dropout: float = flag(
        0.0, "Dropout on the layer's output.", low=0.0, high=1.0, family='heads', refused={'context': DRAWS},
    )  # fmt: skip
    qkv_bias: bool | tuple[str, ...] = flag(
        False, "Biases in the projections of queries, keys and values; or only in those named: ('q', 'v').", since='here',
        family='heads',
        rules=(
            Rule(
                ('qkv_bias',),
                lambda flags, dim: not isinstance(flags.qkv_bias, bool) and not set(flags.qkv_bias) <= set('qkv'),
                "the projections are called 'q', 'k' and 'v'", {'qkv_bias': ('q', 'o')}, 'Use those, or True for all.',
            ),
        ),
    )  # fmt: skip
    out_bias: bool = flag(False, 'A bias in the output projection.', since='here', family='heads')
    scale: float | None = flag(
        None, 'Factor of the scores; None: dim_head ** -0.5, or qk_norm_scale.', paper=ATTENTION_PAPER, since='here',
        family='weights',
        excludes={'qk_norm': ('with cosine similarities the factor is [qk_norm_scale]', 'Give [qk_norm_scale].')},
    )  # fmt: skip
    qk_norm_shared_gain: bool = flag(
        False, 'One gain per channel for all heads.', paper='https://arxiv.org/abs/2302.05442', parent='qk_norm_dim_scale',
        since='here',
    )  # fmt: skip
    qk_norm_eps: float | None = flag(
        None, 'Added to the mean square of a head before its norm; None: nothing.', parent='qk_norm', above=0, since='here'
    )
    qk_norm_over_heads: bool = flag(
        False, 'One norm over all heads of a token together, instead of one of each head.', paper='https://arxiv.org/abs/2501.00656',
        parent='qk_norm', since='here', formula='q_h ← q_h / √(Σ_g |q_g|²), and keys likewise',
        refused={'tensor': 'it norms all heads, of which each process has some'},
        excludes={'qk_norm_groups': 'one norms all heads at once, the other chunks of each head'},
    )  # fmt: skip
    output_proj_depth: int | None = flag(
        None, 'The output projection starts with variance 1 / (2 · width · this).', since='2.31.10', low=1, family='heads'
    )
    unit_weights: bool = flag(
        False, 'Weights, queries and keys have unit length, scores are times the root of dim_head and the square of a learned '
        'gain per head and channel, behind the rotation. `ngpt` turns it on.', paper=NGPT, since='here', family='heads',
        refused={'tensor': UNIT},
        excludes={
            (
                'qk_norm', 'qk_rmsnorm', 'k_rmsnorm', 'use_latent_q', 'use_latent_kv', 'tensor_product', 'on_attn',
                'zero_init_output', 'output_proj_depth',
            ): 'weights of plain projections have unit length, and so have queries and keys',
        },
    )  # fmt: skip
    qk_rmsnorm: bool = flag(
        False, 'RMS norm of each query and key head, with gains.', since=LATER, family='heads',
        excludes={'k_rmsnorm': 'the first norms keys already'},
    )  # fmt: skip
    k_rmsnorm: bool = flag(False, 'RMS norm of each key head alone, with gains.', since=LATER, family='heads')
    gate_values_rank: int | None = flag(
        None, 'The rank of the gate on the aggregated values, which starts half open.',
        parent='gate_values', since=LATER, low=1, excludes={'gate_values_headwise': 'a gate per head is narrow already'},
        rules=(
            Rule(
                ('gate_values_rank',),
                lambda flags, dim: (
                    flags.gate_values_rank is not None and flags.gate_values_rank >= max(dim, flags.dim_attended)
                ),
                'both widths of the gate, {dim} and {dim_attended}, are no larger, so that it saves nothing',
                {'gate_values': True, 'gate_values_rank': 100_000}, 'Choose less than the larger of the two.',
            ),
        ),
    )  # fmt: skip
    gate_values_headwise: bool = flag(
        False, 'That gate is one number per head, and starts half open.', parent='gate_values', since=LATER
    )
    output_gate: bool = flag(
        False, 'A gate on the aggregated values that is computed from them; it is one gate with `gate_values` if both are on.',
        paper=HYBRID_GATES, since=LATER, family='values',
        refused={'tensor': 'it reads all heads, of which each process has some'},
    )  # fmt: skip
    output_gate_rank: int | None = flag(
        None, 'The rank of this gate.', paper=HYBRID_GATES, parent='output_gate', since=LATER, low=1,
        excludes={'output_gate_headwise': 'a gate per head is narrow already'},
        rules=(
            Rule(
                ('output_gate_rank',),
                lambda flags, dim: flags.output_gate_rank is not None and flags.output_gate_rank >= flags.dim_attended,
                'the width of the gate, {dim_attended}, is no larger, so that it saves nothing',
                {'output_gate': True, 'output_gate_rank': 100_000}, 'Choose less than {dim_attended}.',
            ),
        ),
    )  # fmt: skip
    output_gate_headwise: bool = flag(
        False, 'This gate is one number per head.', paper=HYBRID_GATES, parent='output_gate', since=LATER
    )
    low_rank_silu_gates: bool = flag(
        True, 'Gates of low rank have a SiLU between their two maps.', parent=('gate_values_rank', 'output_gate_rank'),
        since=LATER,
    )  # fmt: skip
    differential: bool = flag(
        False, 'Differential attention: neighbouring heads are a pair that shares its two values side by side, and gives the '
        'difference of its two softmaxes, the second times a learned λ, then an RMS norm and the factor 1 - λ_init.',
        paper=DIFFERENTIAL, since='here', family='weights',
        refused={'tensor': 'heads come in pairs, of which each process may have one'},
        rules=(
            Rule(
                ('differential', 'heads', 'kv_heads', 'one_kv_head'),
                lambda flags, dim: flags.differential and (flags.heads % 2 != 0 or flags.num_kv_heads % 2 != 0),
                'two heads are a pair, with two keys and values: {heads} query heads and {num_kv_heads} key heads must be even '
                'numbers', {'differential': True, 'heads': 4, 'one_kv_head': True}, 'Choose an even number of both.',
                only_changed=True,
            ),
        ),
    )  # fmt: skip
    differential_lambda_init: float | None = flag(
        None, 'Where λ starts; None: 0.8 - 0.6 · exp(-0.3 · (l - 1)) in block l, counted from 1.', paper=DIFFERENTIAL,
        parent='differential', low=0.0, below=1.0, since='here',
    )  # fmt: skip
    tensor_product: bool = flag(
        False, 'Tensor product attention: queries, keys and values are means of outer products of a vector over heads and one '
        'over channels, both made of the token; the cache keeps the vectors of keys and values.', paper=TENSOR_PRODUCT,
        since='here', family='heads', refused={'tensor': 'the factors of all heads lie side by side'},
        excludes={
            ('use_latent_q', 'use_latent_kv', 'qkv_bias'): (
                'outer products take the place of the projections, and are latents already'
            ),
        },
    )  # fmt: skip
    tensor_product_q_rank: int = flag(
        6, 'Number of outer products of a query.', paper=TENSOR_PRODUCT, parent='tensor_product', low=1, since='here'
    )
    tensor_product_kv_rank: int = flag(
        2, 'Number of outer products of a key, and of a value.', paper=TENSOR_PRODUCT, parent='tensor_product', low=1,
        since='here',
    )  # fmt: skip
    project_out: bool | None = flag(
        None, 'False: no output projection; the output is the concatenated heads.', since=LATER, family='heads',
        refused={'tensor': 'its output would be some heads only'},
        rules=(
            Rule(
                ('project_out',),
                lambda flags, dim: (
                    flags.project_out is False and flags.dim_attended * flags.orthogonal_outputs != (flags.dim_out or dim)
                ),
                'without a projection the {dim_attended} channels of the heads must be as many as those of the output',
                {'project_out': False, 'heads': 8, 'dim_head': 100}, 'Choose heads as wide as the output, or leave it out.',
            ),
            Rule(
                ('project_out', 'on_attn'), lambda flags, dim: flags.project_out is False and flags.on_attn,
                'attention on attention is an output projection',
                {'project_out': False, 'heads': 1, 'dim_head': 64, 'on_attn': True},
            ),
            Rule(
                ('project_out', 'out_bias'), lambda flags, dim: flags.project_out is False and flags.out_bias,
                'the bias is that of the output projection',
                {'project_out': False, 'heads': 1, 'dim_head': 64, 'out_bias': True},
            ),
        ),
    )  # fmt: skip

    @cached_property
    def num_kv_heads(self) -> int:
        if self.one_kv_head:
            return 1
        return self.heads if self.kv_heads is None else self.kv_heads

    @cached_property
    def value_dim(self) -> int:
        return self.dim_head if self.value_dim_head is None else self.value_dim_head

    @cached_property
    def score_scale(self) -> float:
        if self.scale is not None:
            return self.scale
        if self.unit_weights:
            return float(self.dim_head**0.5)
        return float(self.qk_norm_scale) if self.qk_norm else self.dim_head**-0.5

    def has_bias(self, name: str) -> bool:
        """Whether the projection called 'q', 'k' or 'v' has a bias."""
        return self.qkv_bias if isinstance(self.qkv_bias, bool) else name in self.qkv_bias

    @cached_property
    def gate_starts_open(self) -> bool:
        """Whether ``gate_values`` alone is asked for, which is the gate of 2.16.1."""
        return self.gate_values_rank is None and not (self.gate_values_headwise or self.output_gate)

    @cached_property
    def dim_attended(self) -> int:
        """Width of the heads side by side."""
        return self.heads * self.value_dim

    def at_depth(self, block: int) -> Self:
        """The flags of a layer in this block, counted from 1."""
        if not self.differential or self.differential_lambda_init is not None:
            return self
        return replace(self, differential_lambda_init=0.8 - 0.6 * math.exp(-0.3 * (block - 1)))
