"""Which of the flags in ``structure.py`` exclude others of the stack."""

from __future__ import annotations

from x_transformers.flags.rule import Rule, how_many, is_on
from x_transformers.flags.stack import StackFlags

MIXERS = ('gated_delta_rule', 'gated_linear_attention')
# layouts that repeat no block, and orders that may take one apart
LAYOUTS = ('custom_layers', 'sandwich_coef', 'par_ratio', 'layers_execute_order')

LAMBDAS = ('residual_lambdas', 'embed_lambdas')

SHARED = (
    'heads',
    'attn_kv_heads',
    'attn_one_kv_head',
    'attn_dim_head',
    'attn_value_dim_head',
    'rotary_theta',
    'rotary_scaling',
)

# asked where flags differ between layers
SAME_KEYS = Rule(
    ('kv_share_every', *SHARED),
    lambda flags, dim: (
        flags.kv_share_every is not None
        and (
            flags.differs('num_kv_heads', 'dim_head', 'value_dim')
            or bool({'rotary_theta', 'rotary_scaling'} & {*flags.varying})
        )
    ),
    'keys and values of one layer are those of others, so these need the same shape and positions',
    {'kv_share_every': 2, 'attn_value_dim_head': (8, 4)},
    only_changed=True,
)

# what lays out layers in another way than block after block, each of which begins with self attention
UNBLOCKED = (*LAYOUTS, 'weight_tie_layers', 'macaron', 'only_cross')
# what has no place, or no effect, where vectors have unit length
NORMED = (
    'pre_norm', 'sandwich_norm', 'pre_and_post_norm', 'layer_norm_scaling', *StackFlags.one_of('norm'), 'scale_residual',
    'scale_residual_constant', 'depth_scale_residual', 'zero_init_branch_output',
)  # fmt: skip
# what decides, too, about what enters a layer
ENTERING = (
    'integrate_layers', 'attn_aggregated_residuals', 'qkv_receive_diff_residuals', 'unet_skips', *LAMBDAS,
    'num_residual_streams', 'resi_dual', 'parallel_block',
)  # fmt: skip
# of rotary positions, what is about positions in a line
LINE = ('rotary_xpos', 'rotary_scaling', 'rotary_base_rescale_factor')

STRUCTURE_RULES = (
    Rule(
        ('mudd', *UNBLOCKED),
        lambda flags, dim: flags.mudd and how_many(flags, UNBLOCKED) > 0,
        'its mixtures stand between blocks that begin with self attention, each once',
        {'mudd': True, 'macaron': True},
        only_changed=True,
    ),
    Rule(
        ('mudd', *ENTERING),
        lambda flags, dim: flags.mudd and how_many(flags, ENTERING) > 0,
        'each decides what enters a layer',
        {'mudd': True, 'unet_skips': True},
        only_changed=True,
    ),
    Rule(
        ('mixer', 'custom_layers'),
        lambda flags, dim: flags.mixer is not None and 'm' not in (flags.custom_layers or ()),
        "no layer is a mixer, 'm'",
        {'mixer': 'gated_delta_rule'},
        "Spell out the layers, such as ('m', 'f', 'm', 'f', 'a', 'f').",
    ),
    Rule(
        ('custom_layers', 'mixer'),
        lambda flags, dim: flags.mixer is None and 'm' in (flags.custom_layers or ()),
        "what the layers 'm' are is missing",
        {'custom_layers': ('m', 'f')},
        'Give [mixer].',
    ),
    Rule(
        ('mixer',),
        lambda flags, dim: isinstance(flags.mixer, str) and flags.mixer not in MIXERS,
        f'the known names are {", ".join(MIXERS)}',
        {'mixer': 'mamba', 'custom_layers': ('m', 'f')},
        'Use one of those, or give a class.',
    ),
    Rule(
        ('kv_share_every', 'weight_tie_layers', 'layers_execute_order'),
        lambda flags, dim: (
            flags.kv_share_every is not None and (flags.weight_tie_layers or flags.layers_execute_order is not None)
        ),
        'the first layer of a group makes keys and values for those that follow, each once',
        {'kv_share_every': 2, 'weight_tie_layers': True},
        only_changed=True,
    ),
    Rule(
        ('kv_share_every', 'layer_dropout'),
        lambda flags, dim: flags.kv_share_every is not None and is_on(flags, 'layer_dropout'),
        'the first layer of a group hands on keys and values to the others, so it cannot be left out',
        {'kv_share_every': 2, 'layer_dropout': 0.5},
    ),
    Rule(
        ('kv_share_every',),
        lambda flags, dim: flags.kv_share_every is not None and flags.kinds.count('a') < 2,
        'there are not two self attentions that could share',
        {'kv_share_every': 2, 'depth': 1},
        'Leave it out.',
        inert=True,
    ),
    Rule(
        ('canon',),
        lambda flags, dim: not set(flags.canon or ()) <= set('abcd'),
        "the places are 'a', 'b', 'c' and 'd'",
        {'canon': ('a', 'e')},
        'Use some of those.',
    ),
    Rule(
        ('canon', 'attn_flash_pack_seq'),
        lambda flags, dim: bool(flags.canon) and any(part.flash_pack_seq for part in flags.attentions),
        'a convolution would run from one packed sequence into the next',
        {'canon': ('a',), 'attn_flash_pack_seq': True, 'rotary_pos_emb': True},
    ),
    Rule(
        ('ff_canon', 'attn_flash_pack_seq'),
        lambda flags, dim: (
            not flags.canon
            and any(part.flash_pack_seq for part in flags.attentions)
            and any(layer.feedforward.canon for layer in (flags.by_layer if flags.varying else (flags,)))
        ),
        'a convolution would run from one packed sequence into the next',
        {'ff_canon': True, 'attn_flash_pack_seq': True, 'rotary_pos_emb': True},
    ),
    Rule(
        ('layer_norm_scaling', 'pre_norm', 'resi_dual', 'gated_multi_residual', 'weight_tie_layers'),
        lambda flags, dim: (
            flags.layer_norm_scaling
            and (not flags.pre_norm or flags.resi_dual or flags.gated_streams or flags.weight_tie_layers)
        ),
        'it scales the norm in front of each branch, by the number of its block',
        {'layer_norm_scaling': True, 'pre_norm': False},
        'Use pre-norm layers that are not shared.',
        only_changed=True,
    ),
    Rule(
        ('rotary_axes',),
        lambda flags, dim: flags.rotary_axes is not None and len(flags.rotary_axes) not in (2, 3),
        'a grid has two or three axes',
        {'rotary_pos_emb': True, 'rotary_axes': (4,)},
        'Give (rows, columns), or (frames, rows, columns).',
    ),
    Rule(
        ('rotary_axes', *LINE),
        lambda flags, dim: flags.rotary_axes is not None and how_many(flags, LINE) > 0,
        'that is about distances in one line, and tokens lie on a grid',
        {'rotary_pos_emb': True, 'rotary_axes': (4, 4), 'rotary_scaling': {'type': 'linear', 'factor': 2.0}},
        only_changed=True,
    ),
    Rule(
        ('rotary_axes', 'rotary_emb_dim'),
        lambda flags, dim: flags.rotary_axes is not None and flags.rotary_dim < 2 * len(flags.rotary_axes),
        'each axis turns at least one pair of channels, but {rotary_dim} channels turn',
        {'rotary_pos_emb': True, 'rotary_axes': (4, 4), 'rotary_emb_dim': 2},
        'Turn more channels.',
        only_changed=True,
    ),
    Rule(
        ('rotary_whole_head', 'rotary_emb_dim'),
        lambda flags, dim: flags.rotary_whole_head and flags.rotary_emb_dim is not None,
        'the one rotates all channels of a head, the other so many',
        {'rotary_pos_emb': True, 'rotary_whole_head': True, 'rotary_emb_dim': 4},
        'Leave one of them out.',
        only_changed=True,
    ),
    Rule(
        ('rotary_axes_mixed', 'rotate_num_heads', 'attn_latent_rope_subheads'),
        lambda flags, dim: flags.rotary_axes_mixed and flags.attention.rotated_heads is not None,
        'each head turns in its own way, so all of them turn',
        {'rotary_pos_emb': True, 'rotary_axes': (4, 4), 'rotary_axes_mixed': True, 'rotate_num_heads': 2},
        only_changed=True,
    ),
    Rule(
        ('rotary_axes_mixed', 'kv_share_every'),
        lambda flags, dim: flags.rotary_axes_mixed and flags.kv_share_every is not None,
        'each layer turns its queries and keys in its own way',
        {'rotary_pos_emb': True, 'rotary_axes': (4, 4), 'rotary_axes_mixed': True, 'kv_share_every': 2},
    ),
    Rule(
        (*LAMBDAS, 'resi_dual', 'parallel_block'),
        lambda flags, dim: (
            any(getattr(flags, name) is not False for name in LAMBDAS) and (flags.resi_dual or flags.parallel_block)
        ),
        'there are two streams, of which one only adds up, and no single stream that enters a layer',
        {'embed_lambdas': True, 'resi_dual': True},
        only_changed=True,
    ),
    Rule(
        ('attn_aggregated_residuals', 'integrate_layers'),
        lambda flags, dim: flags.attn_aggregated_residuals and flags.integrate_layers,
        'either would mix the inputs of all layers so far, and the second does',
        {'attn_aggregated_residuals': True, 'attn_aggregated_residual_kwargs': {'lora_rank': 2}, 'integrate_layers': True},
        inert=True,
    ),
    Rule(
        ('attn_aggregated_residual_kwargs', 'dim'),
        lambda flags, dim: flags.aggregates and not 0 < flags.aggregated_rank < dim,
        'the rank ({aggregated_rank}) must be at least 1 and less than the width',
        {'attn_aggregated_residuals': True, 'attn_aggregated_residual_kwargs': {'lora_rank': 999}},
        'Give a lora_rank below {dim}.',
    ),
    Rule(
        ('attn_aggregated_residual_kwargs',),
        lambda flags, dim: bool(set(flags.attn_aggregated_residual_kwargs) - {'lora_rank', 'lora_activation'}),
        'the known keywords are lora_rank and lora_activation',
        {'attn_aggregated_residuals': True, 'attn_aggregated_residual_kwargs': {'lora_rank': 2, 'rank': 3}},
        'Use those.',
    ),
    Rule(
        ('depth_scale_residual', 'attn_aggregated_residuals'),
        lambda flags, dim: flags.depth_scale_residual is not False and flags.attn_aggregated_residuals,
        'what branches see is a weighted mean already, which does not grow with the depth',
        {
            'depth_scale_residual': True,
            'attn_aggregated_residuals': True,
            'attn_aggregated_residual_kwargs': {'lora_rank': 2},
        },
        inert=True,
    ),
    Rule(
        ('mv_split_residual', 'scale_residual', 'scale_residual_constant'),
        lambda flags, dim: flags.mv_split_residual and (flags.learns_residual_scale or flags.scale_residual_constant != 1),
        'the mean and the deviation have factors of their own',
        {'mv_split_residual': True, 'scale_residual': True},
        only_changed=True,
    ),
    Rule(
        ('parallel_block', *LAYOUTS),
        lambda flags, dim: flags.parallel_block and how_many(flags, LAYOUTS) > 0,
        'layers side by side are those of one block, and these layouts have none',
        {'parallel_block': True, 'sandwich_coef': 1},
        only_changed=True,
    ),
    Rule(
        ('parallel_block', 'only_attn', 'only_cross', 'cross_attend'),
        lambda flags, dim: flags.parallel_block and flags.only_attn and (flags.only_cross or not flags.cross_attend),
        'a block of one layer has none beside it',
        {'parallel_block': True, 'only_attn': True},
        only_changed=True,
    ),
    Rule(
        ('parallel_block', 'pre_norm', 'pre_and_post_norm'),
        lambda flags, dim: flags.parallel_block and flags.post_norm,
        'layers side by side have no sum of their own that a norm could follow',
        {'parallel_block': True, 'pre_norm': False},
        only_changed=True,
    ),
    Rule(
        ('parallel_block', 'scale_residual'),
        lambda flags, dim: flags.parallel_block and flags.learns_residual_scale,
        'only a plain residual sum learns a factor',
        {'parallel_block': True, 'scale_residual': True},
    ),
    Rule(
        ('parallel_block', 'layer_dropout'),
        lambda flags, dim: flags.parallel_block and is_on(flags, 'layer_dropout'),
        'the first layer of a block hands on to the others what they read, so it cannot be left out',
        {'parallel_block': True, 'layer_dropout': 0.5},
    ),
    Rule(
        ('mv_split_residual', 'attn_flash_pack_seq'),
        lambda flags, dim: flags.mv_split_residual and any(part.flash_pack_seq for part in flags.attentions),
        'its means would run over all sequences of a row',
        {'mv_split_residual': True, 'attn_flash_pack_seq': True},
    ),
    Rule(
        ('gated_multi_residual', 'num_residual_streams', 'residual_fn_kwargs'),
        lambda flags, dim: flags.gated_streams and not flags.residual_fn_kwargs.get('read_gate_rank', 0) > 0,
        'the rank of the gates is missing',
        {'gated_multi_residual': True, 'num_residual_streams': 2},
        'Give read_gate_rank in [residual_fn_kwargs].',
    ),
    Rule(
        ('gated_multi_residual', 'sandwich_norm', 'pre_and_post_norm', 'pre_norm', 'hyper_conn_doubly_stochastic'),
        lambda flags, dim: (
            flags.gated_streams
            and (flags.sandwich_norm or flags.pre_and_post_norm or not flags.pre_norm or flags.hyper_conn_doubly_stochastic)
        ),
        'the gates norm what they read, and the streams are not mixed',
        {
            'gated_multi_residual': True,
            'num_residual_streams': 2,
            'residual_fn_kwargs': {'read_gate_rank': 2},
            'sandwich_norm': True,
        },
        only_changed=True,
    ),
    Rule(
        ('ngpt', *NORMED),
        lambda flags, dim: flags.ngpt and (how_many(flags, NORMED) > 0 or not flags.pre_norm),
        'the stream, and what branches write, has unit length',
        {'ngpt': True, 'sandwich_norm': True},
        only_changed=True,
    ),
    Rule(
        ('ngpt', 'attn_unit_weights', 'polar_pos_emb'),
        lambda flags, dim: flags.polar and any(part.unit_weights for part in flags.attentions),
        'polar positions make queries and keys of twice the width, which have no unit length',
        {'ngpt': True, 'polar_pos_emb': True},
        only_changed=True,
    ),
    Rule(
        ('pre_and_post_norm', 'resi_dual'),
        lambda flags, dim: flags.pre_and_post_norm and flags.resi_dual,
        'each says where the norms are',
        {'pre_and_post_norm': True, 'resi_dual': True},
    ),
    Rule(
        ('only_attn', 'layers_execute_order', 'unet_skips'),
        lambda flags, dim: flags.only_attn and how_many(flags, ('layers_execute_order', 'unet_skips')) > 0,
        'this counts on the feed-forwards of each block',
        {'only_attn': True, 'unet_skips': True},
        only_changed=True,
    ),
    Rule(
        ('only_attn', 'macaron'),
        lambda flags, dim: flags.only_attn and flags.macaron,
        'there is no feed-forward that could stand on both sides of attention',
        {'only_attn': True, 'macaron': True},
        inert=True,
    ),
    Rule(
        ('only_attn', 'custom_layers'),
        lambda flags, dim: flags.only_attn and flags.custom_layers is not None and 'f' in flags.custom_layers,
        'the layers are spelt out, with feed-forwards',
        {'only_attn': True, 'custom_layers': ('a', 'f')},
    ),
)
