"""Which flags of a stack exclude each other; the order of layers has its own checks in ``layers/plan.py``."""

from __future__ import annotations

from x_transformers.flags.attention import AttentionFlags
from x_transformers.flags.position_facts import ANY_POSITION_BIAS
from x_transformers.flags.rule import Rule, how_many, is_on
from x_transformers.flags.stack import StackFlags
from x_transformers.flags.structure_rules import SAME_KEYS, STRUCTURE_RULES

POSITION_BIASES = (*ANY_POSITION_BIAS, 'attn_data_dependent_alibi')
LAYOUTS_OF_PAIRS = ('interleaved', 'halves')
LAYOUTS = ('custom_layers', 'sandwich_coef', 'par_ratio')
NORMS = StackFlags.one_of('norm')
RESIDUALS = StackFlags.one_of('residual')


def rotated_channels(flags: StackFlags) -> int:
    """Channels are rotated in pairs, so an odd number is rounded up."""
    return flags.rotary_dim + flags.rotary_dim % 2


def self_only(flags: StackFlags, part: str) -> list[str]:
    return [f'{part}{name}' for name in AttentionFlags.self_only() if is_on(flags, f'{part}{name}')]


# asked where flags differ between layers: what layers share or hand on needs the same everywhere
SAME_IN_ALL_LAYERS = (
    Rule(
        ('residual_attn', 'heads'),
        lambda flags, dim: flags.residual_attn and flags.differs('heads'),
        'scores are handed on from layer to layer, so all need as many heads',
        {'residual_attn': True, 'heads': (4, 2)},
    ),
    Rule(
        ('cross_residual_attn', 'heads'),
        lambda flags, dim: flags.cross_residual_attn and flags.cross_differs('heads'),
        'scores are handed on from layer to layer, so all need as many heads',
        {'cross_attend': True, 'cross_residual_attn': True, 'heads': (4, 2)},
    ),
    Rule(
        ('add_value_residual', 'heads', 'attn_kv_heads', 'attn_one_kv_head', 'attn_dim_head', 'attn_value_dim_head'),
        lambda flags, dim: flags.add_value_residual and flags.differs('num_kv_heads', 'value_dim'),
        "the first layer's values are mixed into those of all layers, so these need the same shape",
        {'add_value_residual': True, 'attn_value_dim_head': (8, 4)},
        only_changed=True,
    ),
    Rule(
        (
            'add_value_residual',
            'heads',
            'cross_attn_kv_heads',
            'cross_attn_one_kv_head',
            'cross_attn_dim_head',
            'cross_attn_value_dim_head',
        ),
        lambda flags, dim: flags.add_value_residual and flags.cross_differs('num_kv_heads', 'value_dim'),
        "the first layer's values are mixed into those of all layers, so these need the same shape",
        {'cross_attend': True, 'add_value_residual': True, 'cross_attn_value_dim_head': (8, 4)},
        only_changed=True,
    ),
    SAME_KEYS,
    Rule(
        (*ANY_POSITION_BIAS, 'heads'),
        lambda flags, dim: flags.position_bias is not None and flags.differs('heads'),
        'one position bias with an entry per head serves all layers',
        {'alibi_pos_bias': True, 'heads': (4, 2)},
        only_changed=True,
    ),
    Rule(
        ('polar_pos_emb', 'heads', 'attn_dim_head'),
        lambda flags, dim: flags.polar and flags.differs('heads', 'dim_head'),
        'one learned angle per head and channel serves all layers',
        {'polar_pos_emb': True, 'attn_dim_head': (8, 4)},
        only_changed=True,
    ),
    Rule(
        ('attn_flash_pack_seq',),
        lambda flags, dim: flags.differs('flash_pack_seq'),
        'the boundaries of packed sequences hold in all layers',
        {'rotary_pos_emb': True, 'attn_flash_pack_seq': (True, False)},
        'Give one value.',
    ),
    Rule(
        ('cross_attn_flash_pack_seq',),
        lambda flags, dim: flags.cross_differs('flash_pack_seq'),
        'the boundaries of packed sequences hold in all layers',
        {'cross_attend': True, 'cross_attn_flash_pack_seq': (True, False)},
        'Give one value.',
    ),
    Rule(
        ('cross_attn_dim_context',),
        lambda flags, dim: flags.cross_differs('dim_context'),
        'all layers attend to one context',
        {'cross_attend': True, 'cross_attn_dim_context': (8, 4)},
        'Give one width.',
    ),
)

STACK_RULES = (
    Rule(
        NORMS,
        lambda flags, dim: how_many(flags, NORMS) > 1,
        'a stack has one kind of norm',
        {'use_rmsnorm': True, 'use_scalenorm': True},
        'Keep one.',
        only_changed=True,
    ),
    Rule(
        ('norm_bias', *NORMS),
        lambda flags, dim: flags.norm_bias and flags.norm_kind != 'layernorm',
        'only layer norms have a bias that can be asked for',
        {'norm_bias': True, 'use_rmsnorm': True},
        only_changed=True,
    ),
    Rule(
        ('norm_eps', 'use_dynamic_tanh', 'use_derf'),
        lambda flags, dim: flags.norm_eps is not None and (flags.use_dynamic_tanh or flags.use_derf),
        'there is no root that it could be added under',
        {'norm_eps': 1e-6, 'use_derf': True},
        only_changed=True,
    ),
    Rule(
        ('use_layerscale', 'use_adaptive_layerscale'),
        lambda flags, dim: flags.use_layerscale and flags.use_adaptive_layerscale,
        'a branch is scaled once',
        {'use_layerscale': True, 'use_adaptive_layerscale': True},
    ),
    Rule(
        ('rotary_pos_emb', 'rotary_xpos', 'polar_pos_emb'),
        lambda flags, dim: flags.rotary and flags.polar,
        'both turn queries and keys by their positions',
        {'rotary_pos_emb': True, 'polar_pos_emb': True},
        only_changed=True,
    ),
    Rule(
        ('attn_path', 'rotary_pos_emb', 'rotary_xpos', 'polar_pos_emb'),
        lambda flags, dim: flags.attention.path and (flags.rotary or flags.polar),
        'its products are the positions, and turned queries and keys would not meet them',
        {'causal': True, 'attn_path': True, 'rotary_pos_emb': True},
        only_changed=True,
    ),
    Rule(
        ('polar_pos_emb', 'attn_use_cope'),
        lambda flags, dim: flags.polar and flags.attention.use_cope,
        'contextual positions are asked by queries as wide as a head, and polar ones are twice as wide',
        {'causal': True, 'polar_pos_emb': True, 'attn_use_cope': True},
    ),
    Rule(
        ('rotary_xpos', 'causal'),
        lambda flags, dim: flags.rotary_xpos and not flags.causal,
        'the decay with the distance would grow towards the right',
        {'rotary_xpos': True},
        'Use a causal stack, or plain [rotary_pos_emb].',
    ),
    Rule(
        ('rotary_emb_dim', 'attn_dim_head'),
        lambda flags, dim: flags.rotary and rotated_channels(flags) > flags.attn_dim_head,
        'more channels (in pairs) would be rotated than a head has',
        {'rotary_pos_emb': True, 'rotary_emb_dim': 66},
        'Rotate at most {attn_dim_head}.',
    ),
    Rule(
        ('rotary_base_rescale_factor', 'rotary_emb_dim'),
        lambda flags, dim: flags.rotary and flags.rotary_base_rescale_factor != 1 and flags.rotary_dim == 2,
        'one pair of channels has one wavelength, 2π, which no base can stretch',
        {'rotary_pos_emb': True, 'rotary_base_rescale_factor': 2.0, 'rotary_emb_dim': 2},
        'Rotate more channels.',
    ),
    Rule(
        ('rotary_layout',),
        lambda flags, dim: flags.rotary_layout not in LAYOUTS_OF_PAIRS,
        f'the layouts are {" and ".join(LAYOUTS_OF_PAIRS)}',
        {'rotary_pos_emb': True, 'rotary_layout': 'half'},
        'Use one of those.',
    ),
    Rule(
        ('rotary_layout', 'rotary_emb_dim'),
        lambda flags, dim: flags.rotary and flags.rotary_layout == 'halves' and flags.rotary_dim % 2 != 0,
        'two halves have an even number of channels',
        {'rotary_pos_emb': True, 'rotary_layout': 'halves', 'rotary_emb_dim': 5},
    ),
    Rule(
        ('rotary_scaling',),
        lambda flags, dim: bool(flags.rotary_scaling_complaints),
        '{rotary_scaling_complaints}',
        {'rotary_pos_emb': True, 'rotary_scaling': {'type': 'yarn', 'factor': 2.0}},
        'Give what its type needs.',
    ),
    Rule(
        ('rotary_scaling', 'attn_flash_pack_seq'),
        lambda flags, dim: flags.rotary_by_length and flags.attention.flash_pack_seq,
        'these frequencies depend on how long a sequence is, and a packed row holds several',
        {
            'rotary_pos_emb': True,
            'rotary_scaling': {'type': 'dynamic', 'factor': 2.0, 'original_length': 4},
            'attn_flash_pack_seq': True,
        },
    ),
    Rule(
        ('rotary_scaling', 'rotary_interpolation_factor', 'rotary_base_rescale_factor', 'rotary_xpos'),
        lambda flags, dim: (
            flags.rotary_scaling is not None
            and how_many(flags, ('rotary_interpolation_factor', 'rotary_base_rescale_factor', 'rotary_xpos')) > 0
        ),
        'each is a way to reach longer sequences',
        {'rotary_pos_emb': True, 'rotary_scaling': {'type': 'linear', 'factor': 2.0}, 'rotary_interpolation_factor': 2.0},
        'Keep one.',
        only_changed=True,
    ),
    Rule(
        POSITION_BIASES,
        lambda flags, dim: how_many(flags, POSITION_BIASES) > 1,
        'a stack has one position bias',
        {'alibi_pos_bias': True, 'rel_pos_bias': True},
        'Keep one.',
        only_changed=True,
    ),
    Rule(
        ('alibi_num_heads', 'heads'),
        lambda flags, dim: flags.alibi_heads > flags.heads,
        'there are not that many heads',
        {'alibi_pos_bias': True, 'alibi_num_heads': 9},
        'Choose at most {heads}.',
    ),
    Rule(
        ('rel_pos_num_buckets', 'rel_pos_max_distance'),
        lambda flags, dim: flags.rel_pos_bias and flags.rel_pos_num_buckets > flags.rel_pos_max_distance,
        'there would be more buckets than distances',
        {'rel_pos_bias': True, 'rel_pos_max_distance': 16},
        'Choose at most as many buckets as the largest distance.',
    ),
    Rule(
        ('rel_pos_num_buckets', 'causal'),
        lambda flags, dim: flags.rel_pos_bias and not flags.causal and flags.rel_pos_num_buckets < 4,
        'each direction needs two buckets',
        {'rel_pos_bias': True, 'rel_pos_num_buckets': 2},
        'Choose at least 4.',
    ),
    Rule(
        ('sandwich_norm', 'pre_norm', 'resi_dual'),
        lambda flags, dim: flags.sandwich_norm and (not flags.pre_norm or flags.resi_dual),
        'a sandwich has a norm in front of the branch, and post-norm has none',
        {'sandwich_norm': True, 'pre_norm': False},
    ),
    Rule(
        ('norm_before', 'pre_norm', 'resi_dual', 'gated_multi_residual'),
        lambda flags, dim: not flags.norm_before and (not flags.pre_norm or flags.resi_dual or flags.gated_streams),
        'no norm stands before a branch there',
        {'norm_before': False, 'pre_norm': False},
        'Leave out [norm_before].',
    ),
    Rule(
        ('use_dynamic_tanh', 'pre_norm', 'resi_dual'),
        lambda flags, dim: flags.use_dynamic_tanh and (not flags.pre_norm or flags.resi_dual),
        'tanh in the place of a norm must not lie on the residual stream',
        {'use_dynamic_tanh': True, 'pre_norm': False},
    ),
    Rule(
        RESIDUALS,
        lambda flags, dim: how_many(flags, RESIDUALS) > 1,
        'each is a way to write a branch back to the residual',
        {'gate_residual': True, 'num_residual_streams': 2},
        only_changed=True,
    ),
    Rule(
        ('scale_residual_constant', *RESIDUALS),
        lambda flags, dim: flags.scale_residual_constant != 1 and how_many(flags, RESIDUALS) > 0,
        'only a plain residual sum has a constant factor',
        {'scale_residual_constant': 0.5, 'gate_residual': True},
        only_changed=True,
        inert=True,
    ),
    Rule(
        ('scale_residual', 'num_residual_streams'),
        lambda flags, dim: flags.learns_residual_scale and flags.streams > 1,
        'hyper connections learn their own factors',
        {'scale_residual': True, 'num_residual_streams': 2},
        inert=True,
    ),
    Rule(
        ('qkv_receive_diff_residuals',),
        lambda flags, dim: flags.qkv_receive_diff_residuals and flags.streams == 1 and not flags.mixes_layers,
        'there is only one view of the residual to make queries, keys and values of',
        {'qkv_receive_diff_residuals': True},
        'Set [num_residual_streams] above 1, [integrate_layers] or [attn_aggregated_residuals].',
    ),
    Rule(
        ('integrate_layers', 'weight_tie_layers'),
        lambda flags, dim: flags.integrate_layers and flags.weight_tie_layers,
        'the mixture of all layers so far has one weight per layer, and a shared layer is many',
        {'integrate_layers': True, 'weight_tie_layers': True},
    ),
    Rule(
        ('integrate_layers', 'layers_execute_order'),
        lambda flags, dim: (
            flags.integrate_layers
            and flags.layers_execute_order is not None
            and flags.layers_execute_order != tuple(range(len(flags.layers_execute_order)))
        ),
        'the mixture of all layers so far has one weight per layer, in their order',
        {'integrate_layers': True, 'layers_execute_order': (1, 0, 2, 3)},
    ),
    Rule(
        ('only_cross', 'custom_layers'),
        lambda flags, dim: flags.only_cross and flags.custom_layers is not None and 'a' in flags.custom_layers,
        'the layers are spelt out, with self attention',
        {'cross_attend': True, 'only_cross': True, 'custom_layers': ('a', 'c', 'f')},
    ),
    Rule(
        ('cross_attend', 'custom_layers'),
        lambda flags, dim: flags.custom_layers is not None and flags.cross_attend != ('c' in flags.custom_layers),
        "a stack attends to a context exactly if it has layers of kind 'c'",
        {'custom_layers': ('a', 'c', 'f')},
        "Set [cross_attend] together with a layer 'c', or neither.",
    ),
    Rule(
        ('depth', 'custom_layers', 'layers_execute_order'),
        lambda flags, dim: None not in (flags.depth, flags.custom_layers, flags.layers_execute_order),
        'the number of layers would be said three times',
        {'custom_layers': ('a', 'f'), 'layers_execute_order': (0, 1)},
        'Leave out [depth].',
    ),
    Rule(
        LAYOUTS,
        lambda flags, dim: how_many(flags, LAYOUTS) > 1,
        'each lays out the layers in its own way',
        {'sandwich_coef': 1, 'par_ratio': 2},
        'Keep one.',
        only_changed=True,
    ),
    Rule(
        ('weight_tie_layers', *LAYOUTS, 'layers_execute_order'),
        lambda flags, dim: flags.weight_tie_layers and how_many(flags, (*LAYOUTS, 'layers_execute_order')) > 0,
        'shared weights repeat the plain block',
        {'weight_tie_layers': True, 'sandwich_coef': 1},
        only_changed=True,
    ),
    Rule(
        ('weight_tie_layers', 'depth'),
        lambda flags, dim: flags.weight_tie_layers and flags.depth is None,
        'the number of repetitions is missing',
        {'weight_tie_layers': True, 'depth': None},
        'Give [depth].',
    ),
    Rule(
        ('sandwich_coef', 'depth'),
        lambda flags, dim: flags.sandwich_coef is not None and flags.sandwich_coef > (flags.depth or 0),
        'not more attention layers can be moved to the front than there are blocks',
        {'sandwich_coef': 9},
        'Choose at most {depth}.',
    ),
    Rule(
        ('unet_skips', 'weight_tie_layers'),
        lambda flags, dim: flags.unet_skips and flags.weight_tie_layers,
        'the second half would be the same layers as the first',
        {'unet_skips': True, 'weight_tie_layers': True},
    ),
    Rule(
        ('residual_attn', 'attn_flash'),
        lambda flags, dim: flags.residual_attn and flags.attention.flash,
        'scores are handed on to the next layer, and a fused kernel never has them',
        {'residual_attn': True, 'attn_flash': True},
    ),
    Rule(
        ('cross_residual_attn', 'cross_attn_flash'),
        lambda flags, dim: flags.cross_residual_attn and flags.cross_attention.flash,
        'scores are handed on to the next layer, and a fused kernel never has them',
        {'cross_attend': True, 'cross_residual_attn': True, 'cross_attn_flash': True},
    ),
    Rule(
        ('cross_residual_attn',),
        lambda flags, dim: flags.cross_residual_attn and not flags.has_cross_attention,
        'there is no cross attention',
        {'cross_residual_attn': True},
        'Set [cross_attend], or leave this out.',
        inert=True,
    ),
    Rule(
        ('attn_flash_pack_seq', 'rotary_pos_emb'),
        lambda flags, dim: flags.attention.flash_pack_seq and flags.has_self_attention and not flags.rotary,
        'positions start again in every packed sequence, which is done for rotary positions',
        {'attn_flash_pack_seq': True},
        'Set [rotary_pos_emb].',
    ),
    Rule(
        ('attn_flash_pack_seq', 'shift_tokens'),
        lambda flags, dim: flags.attention.flash_pack_seq and is_on(flags, 'shift_tokens'),
        'tokens would be shifted from one packed sequence into the next',
        {'attn_flash_pack_seq': True, 'rotary_pos_emb': True, 'shift_tokens': 1},
    ),
    Rule(
        ('attn_dim_context', 'dim'),
        lambda flags, dim: flags.has_self_attention and flags.attention.dim_context not in (None, dim),
        'self attention has no other sequence',
        {'attn_dim_context': 3},
        'For cross attention it is [cross_attn_dim_context].',
    ),
    Rule(
        ('attn_dim_out', 'dim'),
        lambda flags, dim: flags.has_self_attention and flags.attention.dim_out not in (None, dim),
        'a branch is added to the residual, so it has its width',
        {'attn_dim_out': 3},
        'Leave out [attn_dim_out].',
    ),
    Rule(
        ('cross_attn_dim_out', 'dim'),
        lambda flags, dim: flags.has_cross_attention and flags.cross_attention.dim_out not in (None, dim),
        'a branch is added to the residual, so it has its width',
        {'cross_attend': True, 'cross_attn_dim_out': 3},
        'Leave out [cross_attn_dim_out].',
    ),
    Rule(
        ('ff_dim_out', 'dim'),
        lambda flags, dim: flags.feedforward.dim_out not in (None, dim),
        'a branch is added to the residual, so it has its width',
        {'ff_dim_out': 3},
        'Leave out [ff_dim_out].',
    ),
    Rule(
        tuple(f'cross_attn_{name}' for name in AttentionFlags.self_only()),
        lambda flags, dim: bool(self_only(flags, 'cross_attn_')),
        'this needs the order of one sequence, and cross attention looks at another one',
        {'cross_attend': True, 'cross_attn_selective': True},
        'Use it for self attention, with attn_ in front.',
        only_changed=True,
    ),
    Rule(
        tuple(f'attn_{name}' for name in AttentionFlags.self_only()),
        lambda flags, dim: bool(self_only(flags, 'attn_')) and not flags.has_self_attention and flags.has_cross_attention,
        'this needs the order of one sequence, and this stack has no self attention',
        {'cross_attend': True, 'only_cross': True, 'causal': True, 'attn_selective': True},
        'Leave it out.',
        only_changed=True,
        inert=True,
    ),
    *STRUCTURE_RULES,
)
