"""The flags of a stack, with the flags of its parts.

Derived values, for those who build from the flags: ``norm_kind``; ``norm_needs_condition``,
``branch_needs_condition``, ``needs_condition``; ``condition_dim``, what the caller gives, and ``condition_width``,
what norms and scales receive; ``rotary``, ``rotary_dim``, ``polar``; ``position_bias``, the flag's name or None;
``alibi_heads``; ``disables_abs_pos_emb``, which is ``disable_abs_pos_emb`` or its default resolved;
``has_self_attention``, ``has_cross_attention``; ``separate_views``: queries, keys and values have inputs of their
own; ``streams``; ``attn_dim_head``; ``self_attention_flags(first=...)``. ``layer(index)`` are the flags of one layer,
``attentions`` and ``cross_attentions`` those of all layers with heads, for flags that differ between layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

from x_transformers.flags.attention import VALUE_RESIDUAL, AttentionFlags
from x_transformers.flags.base import REQUIRED, FlagError, flag, type_hints
from x_transformers.flags.feedforward import FeedForwardFlags
from x_transformers.flags.layered import split_by_layer
from x_transformers.flags.parts import PARTS, cross_inherits, first_prefix, keyword_names, split_parts
from x_transformers.flags.per_layer import PerLayer, takes
from x_transformers.flags.position_facts import ANY_POSITION_BIAS, PositionFacts
from x_transformers.flags.structure import ANY_ROTARY, HYPER, ROTARY, StructureFlags

ADAPTIVE_SCALE = 'https://arxiv.org/abs/2212.09748'
DYNAMIC = 'https://arxiv.org/abs/2108.00154'
LIME = 'https://arxiv.org/abs/2502.09245'
POLAR = 'https://arxiv.org/abs/2509.10534'
REALFORMER = 'https://arxiv.org/abs/2012.11747'
REINJECT = ('https://arxiv.org/abs/1909.01377', 'https://arxiv.org/abs/2410.03020', 'https://arxiv.org/abs/2105.04090')
SANDWICH = 'https://arxiv.org/abs/2105.13290'
T5 = 'https://arxiv.org/abs/1910.10683'
XPOS = 'https://arxiv.org/abs/2212.10554'


CROSS_NAMES = frozenset(keyword_names('cross_attn_'))

ADAPTIVE = ('use_adaptive_layernorm', 'use_adaptive_rmsnorm', 'use_adaptive_layerscale')


@dataclass(frozen=True, kw_only=True, repr=False)
class StackFlags(PositionFacts, StructureFlags):
    """Every keyword of ``AttentionLayers``; the parts' keywords come with ``attn_``, ``cross_attn_`` and ``ff_`` in front."""

    dim: int = flag(REQUIRED, 'Width of the stack.', low=1, often=True, family='layers')
    depth: int | None = flag(None, 'Number of blocks.', low=0, often=True, family='layers')
    heads: int = flag(8, 'Number of query heads.', low=1, each='attention', often=True, family='layers')
    causal: bool = flag(False, 'A token sees no token to its right.', family='layers')
    cross_attend: bool = flag(False, 'Blocks also attend to another sequence, the context.', family='layers')
    only_cross: bool = flag(False, 'Blocks attend to the context only.', parent='cross_attend')
    use_scalenorm: bool = flag(
        False,
        'Norms have one gain.',
        paper='https://arxiv.org/abs/1910.05895',
        one_of='norm',
        formula='g √d x / |x|',
        family='norms',
    )
    use_rmsnorm: bool = flag(
        False,
        'RMS norm: norms do not subtract the mean.',
        paper='https://arxiv.org/abs/1910.07467',
        one_of='norm',
        often=True,
        formula='γ ⊙ √d x / |x|',
        family='norms',
    )
    use_dynamic_tanh: bool = flag(
        False,
        'tanh in the place of norms.',
        paper='https://arxiv.org/abs/2503.10622',
        one_of='norm',
        formula='γ ⊙ tanh(α x) + β',
        family='norms',
    )
    dynamic_tanh_init_alpha: float = flag(
        1.0, 'Factor inside tanh at the start.', paper='https://arxiv.org/abs/2503.10622', parent='use_dynamic_tanh'
    )
    use_derf: bool = flag(
        False,
        'The error function in the place of norms.',
        paper='https://arxiv.org/abs/2512.10938',
        one_of='norm',
        formula='γ ⊙ erf(α x + s) + β',
        family='norms',
    )
    use_simple_rmsnorm: bool = flag(False, 'RMS norms without gains.', one_of='norm', formula='√d x / |x|', family='norms')
    use_adaptive_layernorm: bool = flag(False, 'The gains of layer norms come from a condition.', one_of='norm', family='norms')
    use_adaptive_rmsnorm: bool = flag(False, 'The gains of RMS norms come from a condition.', one_of='norm', family='norms')
    use_adaptive_layerscale: bool = flag(
        False, 'Branches are scaled by a sigmoid gate of a condition.', paper=ADAPTIVE_SCALE, family='norms'
    )
    norm_add_unit_offset: bool = flag(True, 'Gains are stored minus 1, so that weight decay pulls to 1.', family='norms')
    dim_condition: int | None = flag(None, 'Width of the condition; None: dim.', parent=ADAPTIVE, low=1)
    adaptive_condition_mlp: bool = flag(False, 'The condition goes through a SiLU layer first.', parent=ADAPTIVE)
    adaptive_condition_mlp_expansion: int = flag(
        4, 'Width of that layer as a multiple.', parent='adaptive_condition_mlp', low=1
    )
    alibi_pos_bias: bool = flag(
        False,
        'ALiBi: a penalty that grows with the distance, one slope per head.',
        paper='https://arxiv.org/abs/2108.12409',
        formula='s_ij ← s_ij − m_h |i − j|',
        family='positions',
    )
    alibi_num_heads: int | None = flag(
        None, 'Only the first heads get a penalty, this many; None: all.', parent='alibi_pos_bias', low=1
    )
    rel_pos_bias: bool = flag(
        False,
        'A learned bias per bucket of distances (T5 relative positions).',
        paper=T5,
        formula='s_ij ← s_ij + √d_head · b_h[bucket(i − j)]',
        family='positions',
    )
    rel_pos_num_buckets: int = flag(32, 'Number of buckets.', paper=T5, parent='rel_pos_bias', low=2)
    rel_pos_max_distance: int = flag(128, 'Distances from here on share a bucket.', paper=T5, parent='rel_pos_bias', low=2)
    dynamic_pos_bias: bool = flag(False, 'A small network makes the bias of each distance.', paper=DYNAMIC, family='positions')
    dynamic_pos_bias_log_distance: bool = flag(
        False, 'The network sees the logarithm of the distance.', paper='https://arxiv.org/abs/2111.09883',
        parent='dynamic_pos_bias',
    )  # fmt: skip
    dynamic_pos_bias_mlp_depth: int = flag(2, 'Depth of that network.', parent='dynamic_pos_bias', low=1)
    dynamic_pos_bias_norm: bool = flag(False, 'Norms inside that network.', parent='dynamic_pos_bias')
    rel_pos_kwargs: Mapping[str, Any] = flag(
        {}, 'More keywords for the position bias, such as slopes for ALiBi.', parent=ANY_POSITION_BIAS
    )
    rotary_pos_emb: bool = flag(False, 'Rotary positions (RoPE): rotate queries and keys by their positions.', paper=ROTARY,
                                often=True,
        formula='channels 2p, 2p + 1 of q_i and k_i turn by i · 10000^(−2p / d_rotated)', family='positions'
    )  # fmt: skip
    rotary_emb_dim: int | None = flag(
        None, 'Rotate this many channels of each head; None: half.', paper=ROTARY, parent=ANY_ROTARY, low=2
    )
    rotary_xpos: bool = flag(
        False, 'Rotary positions that also decay with the distance; turns them on.', paper=XPOS, family='positions'
    )
    rotary_interpolation_factor: float = flag(
        1.0, 'Divide positions by this, for longer sequences.', paper='https://arxiv.org/abs/2306.15595', parent=ANY_ROTARY,
        low=1.0,
    )  # fmt: skip
    rotary_xpos_scale_base: float = flag(
        512, 'How slowly the decay grows with the distance.', paper=XPOS, parent='rotary_xpos', above=0
    )
    rotary_base_rescale_factor: float = flag(
        1.0, 'Stretch the wavelengths for longer sequences (NTK-aware scaling).', above=0, parent=ANY_ROTARY,
        paper='https://www.reddit.com/r/LocalLLaMA/comments/14lz7j5/',
    )  # fmt: skip
    rotate_num_heads: int | None = flag(
        None, 'Rotate only this many heads of self attention, the last ones.', parent=ANY_ROTARY, low=1, each='attention'
    )
    polar_pos_emb: bool = flag(
        False, 'Polar positions: content sets the length, position the angle.', paper=POLAR, family='positions'
    )
    polar_bias_uniform_init: bool = flag(
        False, 'The learned angles start spread instead of at zero.', paper=POLAR, parent='polar_pos_emb'
    )
    weight_tie_layers: bool = flag(
        False, 'All blocks share one set of weights.', paper='https://arxiv.org/abs/1909.11942', family='layers'
    )
    custom_layers: tuple[str, ...] | None = flag(
        None,
        "The layers one by one: 'a' attention, 'c' cross attention, 'f' feed-forward, 'm' mixer.",
        traits='no_blocks',
        family='layers',
    )
    layers_execute_order: tuple[int, ...] | None = flag(
        None, 'The order in which the layers run; repeats and gaps are allowed.', traits='no_blocks', family='layers'
    )
    sandwich_coef: int | None = flag(
        None, 'This many attention layers first and feed-forwards last.', paper='https://arxiv.org/abs/1911.03864', low=1,
        traits='no_blocks', family='layers'
    )  # fmt: skip
    par_ratio: int | None = flag(
        None, 'Fewer attention layers: one in this many layers, none in the last third.', paper='https://arxiv.org/abs/2009.04534',
        low=2, traits='no_blocks', family='layers'
    )  # fmt: skip
    macaron: bool = flag(
        False, 'Half a feed-forward before and half after attention.', paper='https://arxiv.org/abs/1906.02762', family='layers'
    )
    residual_attn: bool = flag(
        False, "Residual attention: scores are added to the next self attention's scores.", paper=REALFORMER, family='residuals'
    )
    cross_residual_attn: bool = flag(
        False, "Scores are added to the next cross attention's scores.", paper=REALFORMER, family='residuals'
    )
    pre_norm: bool = flag(True, 'Norm before each branch; False: after each residual sum.', family='norms')
    pre_norm_has_final_norm: bool = flag(True, 'A norm at the end of a pre-norm stack.', family='norms')
    sandwich_norm: bool = flag(False, 'Norm also behind each branch.', paper=SANDWICH, family='norms')
    gate_residual: bool = flag(
        False,
        'GRU cells in the place of residual sums.',
        paper='https://arxiv.org/abs/1910.06764',
        one_of='residual',
        family='residuals',
    )
    orthog_residual: bool = flag(
        False, 'Add only what is orthogonal to the stream, token by token.', paper='https://arxiv.org/abs/2505.11881',
        since='2.18.0', one_of='residual', family='residuals'
    )  # fmt: skip
    scale_residual: bool | float = flag(
        False, "Learned factors on the residual; a number: a constant factor on the branches' outputs instead.",
        paper='https://arxiv.org/abs/2110.09456',
        formula='x ← γ ⊙ x + f(x)', family='residuals'
    )  # fmt: skip
    scale_residual_constant: float = flag(
        1.0,
        'A constant factor on the residual.',
        paper='https://arxiv.org/abs/2203.00555',
        each='layer',
        formula='x ← c x + f(x)',
        family='residuals',
    )
    residual_fn_kwargs: Mapping[str, Any] = flag({}, 'More keywords for the residual.', family='residuals')
    shift_tokens: int | tuple[int, ...] = flag(
        0,
        'Give part of the channels of the tokens next to it, this far; one or per layer.',
        low=0,
        each='layer',
        traits='row_order',
        family='layers',
    )
    softclamp_output: bool = flag(
        False,
        'Keep the output inside a range with tanh.',
        paper='https://arxiv.org/abs/2408.00118',
        formula='y ← c · tanh(y / c)',
        family='norms',
    )
    softclamp_output_value: float = flag(30.0, 'The largest absolute output.', parent='softclamp_output', above=0)
    zero_init_branch_output: bool = flag(False, 'All branches start at zero.', family='residuals')
    layer_dropout: float | tuple[float, ...] = flag(
        0.0,
        'In training, leave out layers with this probability; one or per layer.',
        paper='https://arxiv.org/abs/1603.09382',
        low=0.0,
        high=1.0,
        each='layer',
        family='layers',
    )
    cross_attn_tokens_dropout: float = flag(
        0.0, 'In training, drop this fraction of the context.', parent='cross_attend', low=0.0, high=1.0
    )
    disable_abs_pos_emb: bool | None = flag(
        None,
        'The model around adds no absolute positions; None: so with T5 bias, rotary and polar positions.',
        family='positions',
    )
    use_layerscale: bool = flag(
        False,
        'LayerScale: learned factors on the branches.',
        paper='https://arxiv.org/abs/2103.17239',
        formula='x ← x + γ ⊙ f(x)',
        family='residuals',
    )
    layerscale_init_value: float = flag(0.0, 'These factors at the start.', parent='use_layerscale', each='layer')
    unet_skips: bool = flag(
        False,
        'U-Net skips: later blocks see what earlier blocks saw, in reverse order.',
        traits='across_layers',
        family='residuals',
    )
    integrate_layers: bool = flag(
        False, 'Each branch sees a learned mixture of the inputs of all layers so far.', paper=LIME,
        traits=('across_layers', 'no_blocks'), family='residuals'
    )  # fmt: skip
    layer_integrate_use_softmax: bool = flag(
        True, 'The mixture is a softmax; False: ReLU.', paper=LIME, parent='integrate_layers'
    )
    num_residual_streams: int = flag(
        1, 'Hyper connections: number of residual streams.', paper=HYPER, low=1, one_of='residual', family='residuals'
    )
    hyper_conn_sinkhorn_iters: int = flag(
        5,
        'Rounds that make the mixing of the streams doubly stochastic.',
        paper=HYPER,
        parent='hyper_conn_doubly_stochastic',
        low=1,
    )
    qkv_receive_diff_residuals: bool = flag(
        False, 'Queries, keys and values of self attention are made of different mixtures.', family='residuals'
    )
    reinject_input: bool = flag(False, 'A projection of the input enters every layer.', paper=REINJECT, family='residuals')
    learned_reinject_input_gate: bool = flag(False, 'A gate per token on what is injected.', paper=REINJECT, family='residuals')
    add_value_residual: bool = flag(
        False, 'Mix values with those of the first layer.', paper=VALUE_RESIDUAL, family='residuals'
    )
    learned_value_residual_mix: bool = flag(
        True, 'How much is learned per token and head.', paper=VALUE_RESIDUAL, parent='add_value_residual'
    )
    verbose: bool = flag(True, 'Warn about doubtful settings.', family='layers')

    attention: AttentionFlags = field(default_factory=AttentionFlags)
    cross_attention: AttentionFlags = field(default_factory=AttentionFlags)
    feedforward: FeedForwardFlags = field(default_factory=FeedForwardFlags)
    # the names that were given with cross_attn_ in front; the others came from attn_
    cross_given: frozenset[str] = frozenset()
    # keywords with a value for each layer of their kind; the fields hold those of the first
    varying: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    # the names that were given with attn_ and ff_ in front
    attn_given: frozenset[str] = frozenset()
    ff_given: frozenset[str] = frozenset()

    # ---------------------------------------------------------------- from keywords

    @classmethod
    def parse(cls, given: Mapping[str, Any], *, where: str = 'AttentionLayers', prefix: str = '') -> Self:
        """Flags of a stack and its parts from flat keywords: ``attn_`` for attention, ``cross_attn_`` laid over it for cross
        attention, ``ff_`` for feed-forwards. Errors as ``Flags.parse``; a name that only the stack may set
        (``attn_heads``) is unknown."""
        own, parts = split_parts(given, cls.flag_fields(), where=where, prefix=prefix)
        cls.check_complete(own, where=where, prefix=prefix)
        apart: dict[str, PerLayer] = {}
        own = split_by_layer(own, cls, '', apart, own=True)
        for part, part_flags in PARTS.items():
            parts[part] = split_by_layer(parts[part], part_flags, part, apart)
        values, wrong = cls.read(own, where=where, prefix=prefix)
        read: dict[str, dict[str, Any]] = {}
        for part, part_flags in PARTS.items():
            read[part], more = part_flags.read(parts[part], where=where, prefix=prefix + part)
            wrong += more
        if wrong:
            raise FlagError(*wrong)
        stack = cls(**values)
        if stack.depth_scale_residual is True and not stack.attn_aggregated_residuals:
            apart = stack.depths(parts) | apart
        varying = stack.spread(apart, prefix)
        for name, over in varying.items():
            part = first_prefix(name) or ''
            if part and name not in cls.flag_fields():
                read[part][name.removeprefix(part)] = over[0]
            else:
                value: Any = over if takes(type_hints(cls)[name])[0] else over[0]
                stack = dataclasses.replace(stack, **{name: value})
        inherited = {
            name: value
            for name, value in read['attn_'].items()
            if f'attn_{name}' not in varying and cross_inherits(name, read['cross_attn_'])
        }
        read = {part: stack.told_to_part(part, its) for part, its in read.items()}
        return dataclasses.replace(
            stack,
            attention=AttentionFlags(**stack.told_to_attention, **read['attn_']),
            cross_attention=AttentionFlags(heads=stack.heads, **(inherited | read['cross_attn_'])),
            feedforward=FeedForwardFlags(**read['ff_']),
            cross_given=frozenset(name.removeprefix('cross_attn_') for name in given if name in CROSS_NAMES),
            varying={name: over for name, over in varying.items() if getattr(stack, name, None) != over},
            attn_given=given_to('attn_', given),
            ff_given=given_to('ff_', given),
        )

    # ---------------------------------------------------------------- derived

    @property
    def post_norm(self) -> bool:
        """Norms stand behind the residual sums."""
        return not self.pre_norm or self.resi_dual or self.pre_and_post_norm

    @property
    def told_to_attention(self) -> dict[str, Any]:
        """What the stack sets on self attention."""
        return {
            'heads': self.heads,
            'causal': self.causal,
            'qkv_receive_diff_residuals': self.separate_views,
            'learned_value_residual_mix': self.add_value_residual and self.learned_value_residual_mix,
            'rotate_num_heads': self.rotate_num_heads,
        }

    def self_attention_flags(self, *, first: bool) -> AttentionFlags:
        """Flags of the first self-attention module (no values to mix with, no past layers to mix), or of a later one."""
        if not first:
            return self.attention
        views = self.separate_views and not (self.integrate_layers or self.mudd)
        return dataclasses.replace(self.attention, learned_value_residual_mix=False, qkv_receive_diff_residuals=views)

    @cached_property
    def attn_dim_head(self) -> int:
        return self.attention.dim_head

    @cached_property
    def norm_kind(self) -> str:
        """The name of the norm: that of its flag without ``use_``."""
        return next((name.removeprefix('use_') for name in self.one_of('norm') if getattr(self, name)), 'layernorm')

    @cached_property
    def norm_needs_condition(self) -> bool:
        return self.use_adaptive_layernorm or self.use_adaptive_rmsnorm

    @cached_property
    def branch_needs_condition(self) -> bool:
        return self.use_adaptive_layerscale

    @cached_property
    def needs_condition(self) -> bool:
        return self.norm_needs_condition or self.branch_needs_condition

    @cached_property
    def condition_dim(self) -> int:
        return self.dim if self.dim_condition is None else self.dim_condition

    @cached_property
    def condition_width(self) -> int:
        return self.condition_dim * (self.adaptive_condition_mlp_expansion if self.adaptive_condition_mlp else 1)

    @cached_property
    def has_self_attention(self) -> bool:
        if self.custom_layers is not None:
            return 'a' in self.custom_layers
        return not (self.cross_attend and self.only_cross)

    @cached_property
    def has_cross_attention(self) -> bool:
        return 'c' in self.custom_layers if self.custom_layers is not None else self.cross_attend

    @cached_property
    def has_feedforward(self) -> bool:
        return not self.only_attn and 'f' in (self.custom_layers or 'f')

    @cached_property
    def separate_views(self) -> bool:
        return self.qkv_receive_diff_residuals or self.integrate_layers or self.mudd

    @property
    def has_final_norm(self) -> bool:
        before_alone = self.pre_norm and self.pre_norm_has_final_norm and not self.pre_and_post_norm and not self.ngpt
        return self.gated_streams or self.resi_dual or before_alone

    @property
    def learns_residual_scale(self) -> bool:
        return self.scale_residual is True

    @cached_property
    def streams(self) -> int:
        return self.num_residual_streams


def given_to(part: str, given: Mapping[str, Any]) -> frozenset[str]:
    """The names of a part's keywords among those of its stack."""
    known = frozenset(keyword_names(part))
    return frozenset(name.removeprefix(part) for name in given if name in known)
