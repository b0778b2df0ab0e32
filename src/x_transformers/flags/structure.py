"""Flags of a stack that 2.16.1 does not have: its structure, its residuals, what enters it, positions on a grid.

Derived: ``branch_scale``, the constant factor on what branches write.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from x_transformers.flags.base import flag
from x_transformers.flags.layered import LayeredFlags

HYPER = ('https://arxiv.org/abs/2409.19606', 'https://arxiv.org/abs/2512.24880')
RESI_DUAL = 'https://arxiv.org/abs/2304.14802'
ROTARY = 'https://arxiv.org/abs/2104.09864'
GRID = 'https://arxiv.org/abs/2403.13298'
LAMBDAS = 'https://github.com/KellerJordan/modded-nanogpt'
NGPT = 'https://arxiv.org/abs/2410.01131'
AGGREGATED = ('https://arxiv.org/abs/2603.15031', 'https://arxiv.org/abs/2601.21582')

ANY_ROTARY = ('rotary_pos_emb', 'rotary_xpos')


@dataclass(frozen=True, kw_only=True, repr=False)
class StructureFlags(LayeredFlags):
    """Base of ``StackFlags``; in the signature these stand behind those of 2.16.1."""

    if TYPE_CHECKING:
        # of 2.16.1
        scale_residual: bool | float
        num_residual_streams: int
        integrate_layers: bool
        zero_init_branch_output: bool

    mixer: Callable[..., Any] | str | None = flag(
        None,
        "What layers 'm' of custom_layers are: 'gated_delta_rule', 'gated_linear_attention', or a class or function that makes "
        'of the width a module with forward(x, state) -> (y, state).',
        paper=('https://arxiv.org/abs/2412.06464', 'https://arxiv.org/abs/2312.06635'), since='here', each='mixer',
        traits='row_order', family='layers'
    )  # fmt: skip
    mixer_kwargs: Mapping[str, Any] = flag(
        {}, 'Keywords of the mixer, such as heads, dim_head, conv and rank of ours.', parent='mixer', since='here', each='mixer'
    )
    only_attn: bool = flag(
        False, 'No feed-forwards.', paper='https://arxiv.org/abs/2607.18363', since='2.31.10', family='layers'
    )
    pre_and_post_norm: bool = flag(
        False, 'Norm before each branch and again after each residual sum; no final norm.', since='2.17.0', family='norms'
    )
    depth_scale_residual: bool | float = flag(
        False,
        'Output projections start smaller the deeper they are, with variance 1 / (2 · width · block); a number: a constant '
        "factor on the branches' outputs instead.",
        paper=('https://arxiv.org/abs/2309.16620', 'https://arxiv.org/abs/2310.02244'), since='2.31.10', family='residuals'
    )  # fmt: skip

    attn_aggregated_residuals: bool = flag(
        False, 'Attention residuals: each branch sees a mixture of the inputs of all layers so far, weighted by attention.',
        paper=AGGREGATED, since='2.17.0', traits='across_layers', family='residuals'
    )  # fmt: skip
    attn_aggregated_residual_kwargs: Mapping[str, Any] = flag(
        {}, 'Of the queries of that attention: lora_rank (64), lora_activation.', paper=AGGREGATED,
        parent='attn_aggregated_residuals', since='2.17.0',
    )  # fmt: skip
    mv_split_residual: bool = flag(
        False, 'The mean over time (so far, in causal stacks) and the deviation from it are written by different factors.',
        paper='https://arxiv.org/abs/2605.06169', since='2.19.0', one_of='residual', traits='row_order', family='residuals'
    )  # fmt: skip
    parallel_block: bool = flag(
        False, 'The layers of a block all read what enters it, each through its own norm, and their outputs are added to it.',
        paper='https://arxiv.org/abs/2204.02311', since='here', one_of='residual',
        formula='x ← x + attention(norm₁ x) + feed-forward(norm₂ x)', family='layers'
    )  # fmt: skip
    rotary_axes: tuple[int, ...] | None = flag(
        None, 'Rotary positions on a grid: tokens are its cells, row by row, such as (14, 14) for rows and columns, or '
        '(8, 14, 14) with frames in front; the first axis may go on. Pairs of channels belong to the axes in turn, the last '
        'axis first; the paper takes rotary_theta=100.', paper=GRID, parent='rotary_pos_emb', low=1, since='here',
    )  # fmt: skip
    rotary_axes_mixed: bool = flag(
        False, 'Each pair turns by a learned sum over the axes, of its own in each layer and key head; it starts along random '
        'orthogonal directions.', paper=GRID, parent='rotary_axes', since='here',
    )  # fmt: skip
    gated_multi_residual: bool = flag(
        False, 'Streams are read and written through low-rank gates per channel; residual_fn_kwargs needs read_gate_rank.',
        paper='https://qwen.ai/blog?id=qwen3.8-flash-next', parent='num_residual_streams', since='2.31.10',
    )  # fmt: skip
    norm_before: bool = flag(
        True, 'Branches have a norm before them, unless norms stand after the sum; False: they read the stream as it is.',
        paper='https://arxiv.org/abs/2501.00656', since='here', each='layer', family='norms'
    )  # fmt: skip

    layer_norm_scaling: bool = flag(
        False, 'What the norm before a branch gives is divided by the square root of the number of its block, counted from 1.',
        paper='https://arxiv.org/abs/2502.05795', since='here', family='norms'
    )  # fmt: skip
    canon: tuple[str, ...] | None = flag(
        None, "Causal convolutions over four tokens, added to their input: before self attention ('a'), of its queries, keys "
        "and values ('b'), before a feed-forward ('c'), inside it ('d'); any of these letters.",
        paper='https://arxiv.org/abs/2512.17351', since='here', traits='row_order', family='layers'
    )  # fmt: skip
    kv_share_every: int | None = flag(
        None, 'So many self attentions in a row share the keys and values of the first of them, which alone has a cache.',
        paper='https://arxiv.org/abs/2405.12981', since='here', low=2, traits='across_layers', family='layers'
    )  # fmt: skip
    mudd: bool = flag(
        False, 'Between blocks, four mixtures of what entered and left all blocks so far, with weights made of each token: for '
        'queries, keys, values and the stream; one mixture at the end.',
        paper='https://arxiv.org/abs/2502.12170', since='here', traits=('across_layers', 'no_blocks'), family='residuals'
    )  # fmt: skip
    residual_lambdas: bool | float = flag(
        False, 'Before each layer, attention or feed-forward, the stream is multiplied by a learned number of that layer, '
        'which starts at 1; a number: it starts there.',
        paper=LAMBDAS, since='here', each='layer', traits='across_layers', family='residuals'
    )  # fmt: skip
    embed_lambdas: bool | float = flag(
        False, "Before each layer the stack's input, RMS-normed, is added times a learned number of that layer, "
        'which starts at 0; a number: it starts there.',
        paper=LAMBDAS, since='here', each='layer', traits='across_layers', family='residuals'
    )  # fmt: skip

    ngpt: bool = flag(
        False, 'Normalized transformer: stream, weights, queries and keys have unit length, there are no norms, and no biases '
        "in feed-forwards; each branch turns the stream by a learned share per channel, which starts at 0.05 ('rate' of "
        'residual_fn_kwargs). Weights keep their length by `normalize_weights_()` after each step of an optimizer.',
        paper=NGPT, since='here', one_of='residual', family='residuals',
        formula='x ← norm(x + |α| (norm(branch(x)) − x))',
    )  # fmt: skip

    def told_to_part(self, part: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """A part's keywords with those that the stack sets."""
        told = dict(given)
        if self.ngpt:
            told['unit_weights'] = True
        if self.zero_init_branch_output:
            told['zero_init_output'] = True
        if self.has_canon({'attn_': 'b', 'ff_': 'd'}.get(part, '-')):
            told['canon'] = True
        return told

    def has_canon(self, letter: str) -> bool:
        return letter in (self.canon or ())

    def starts(self, name: str, usual: float) -> tuple[float, ...] | None:
        """Where a learned number of each layer starts; None if no layer has it."""
        values = [getattr(self.layer(index), name) for index in range(len(self.kinds))]
        if all(value is False for value in values):
            return None
        return tuple(usual if isinstance(value, bool) else float(value) for value in values)

    resi_dual: bool = flag(
        False,
        'ResiDual: post-norm layers, and the sum of all branches is added at the end.',
        paper=RESI_DUAL,
        since='here',
        one_of='residual',
        family='norms',
    )
    resi_dual_scale: float = flag(1.0, 'Factor of the second residual.', paper=RESI_DUAL, parent='resi_dual', since='here')
    hyper_conn_doubly_stochastic: bool = flag(
        False, 'Streams are mixed by a doubly stochastic matrix; False: each stream carries their sum.', paper=HYPER,
        parent='num_residual_streams', since='here',
    )  # fmt: skip
    gradient_checkpointing: bool = flag(
        False, 'In training, branches keep only their input for the backward pass and run again there: less memory, more time.',
        paper='https://arxiv.org/abs/1604.06174', since='here', family='layers'
    )  # fmt: skip
    rotary_theta: float = flag(
        10000.0, 'Base of the wavelengths: the slowest pair turns once in about 2π times this many tokens.', paper=ROTARY,
        parent=ANY_ROTARY, above=0, since='here', each='attention',
    )  # fmt: skip
    rotary_whole_head: bool = flag(
        False, 'Rotate all channels of each head.', paper=ROTARY, parent=ANY_ROTARY, since='here'
    )  # fmt: skip
    rotary_scaling: Mapping[str, Any] | None = flag(
        None, "Other frequencies for longer sequences: {'type': 'linear', 'factor': 4.0}, or dynamic, yarn, llama3, longrope.",
        paper=('https://arxiv.org/abs/2309.00071', 'https://arxiv.org/abs/2407.21783', 'https://arxiv.org/abs/2402.13753'),
        parent=ANY_ROTARY, since='here', each='attention',
    )  # fmt: skip
    rotary_layout: str = flag(
        'interleaved', "Which channels turn together: neighbours, or 'halves': the k-th of both halves.", parent=ANY_ROTARY,
        since='here',
    )  # fmt: skip
    norm_eps: float | None = flag(
        None,
        'Added under the root in norms; None: 1e-5 in layer norms, nothing in the others.',
        above=0,
        since='here',
        family='norms',
    )
    norm_bias: bool = flag(False, 'Layer norms have a bias.', since='here', family='norms')

    @property
    def mixes_layers(self) -> bool:
        """Branches see mixtures of what entered all layers so far."""
        return self.integrate_layers or self.attn_aggregated_residuals

    @property
    def aggregates(self) -> bool:
        """They are attention residuals."""
        return self.attn_aggregated_residuals and not self.integrate_layers

    @property
    def gated_streams(self) -> bool:
        return self.gated_multi_residual and self.num_residual_streams > 1

    @property
    def aggregated_rank(self) -> int:
        return int(self.attn_aggregated_residual_kwargs.get('lora_rank', 64))

    @property
    def branch_scale(self) -> float:
        """The constant factor on what branches write."""
        by_depth = False if self.attn_aggregated_residuals else self.depth_scale_residual
        for given in (by_depth, self.scale_residual):
            if not isinstance(given, bool):
                return float(given)
        return 1.0
