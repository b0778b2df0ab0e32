"""Which flags of an attention or feed-forward layer exclude each other."""

from __future__ import annotations

from torch import nn

from x_transformers.flags.feedforward import ACTIVATIONS, FeedForwardFlags
from x_transformers.flags.rule import Rule, how_many
from x_transformers.flags.scores import SDP_KWARGS, ScoreFlags

WEIGHTS = ScoreFlags.one_of('weights')
OTHER_PROJECTIONS = ('use_latent_q', 'use_latent_kv', 'qkv_bias')
NO_SOFTMAX = ('sigmoid', 'softpick', 'stick_breaking', 'l2_distance', 'inverted_attention')  # of products over keys
STARTS = ('zero_init_output', 'output_proj_depth')
UNLIKE_UNITS = ('qk_norm', 'qk_rmsnorm', 'k_rmsnorm', 'use_latent_q', 'use_latent_kv', 'tensor_product', 'on_attn', *STARTS)
SWITCHES = FeedForwardFlags.one_of('activation')
BACKENDS = (*SDP_KWARGS, 'enable_cudnn')

ATTENTION_RULES = (
    Rule(
        ('canon', 'use_latent_kv'),
        lambda flags, dim: flags.canon and flags.dim_latent_kv is not None,
        'keys and values are made of the latent that is cached, and not token by token',
        {'canon': True, 'use_latent_kv': True, 'dim_latent_kv': 4},
    ),
    Rule(
        ('canon', 'tensor_product'),
        lambda flags, dim: flags.canon and flags.tensor_product,
        'keys and values are put together of cached factors, and not token by token',
        {'canon': True, 'tensor_product': True},
    ),
    Rule(
        ('canon', 'flash_pack_seq'),
        lambda flags, dim: flags.canon and flags.flash_pack_seq,
        'a convolution would run from one packed sequence into the next',
        {'canon': True, 'flash_pack_seq': True},
    ),
    Rule(
        ('one_kv_head', 'kv_heads'),
        lambda flags, dim: flags.one_kv_head and flags.kv_heads is not None,
        'both say how many key and value heads there are',
        {'one_kv_head': True, 'kv_heads': 2},
    ),
    Rule(
        ('heads', 'kv_heads'),
        lambda flags, dim: flags.heads % flags.num_kv_heads != 0,
        'the query heads share the key heads evenly, so the second number must divide the first',
        {'heads': 8, 'kv_heads': 3},
        'Choose a divisor of {heads}.',
    ),
    Rule(
        ('heads', 'rotate_num_heads'),
        lambda flags, dim: flags.rotate_num_heads is not None and flags.rotate_num_heads > flags.heads,
        'there are not that many heads',
        {'heads': 4, 'rotate_num_heads': 5},
        'Rotate at most {heads}.',
    ),
    Rule(
        ('rotate_num_heads', 'latent_rope_subheads'),
        lambda flags, dim: flags.rotate_num_heads is not None and flags.latent_rope_subheads is not None,
        'the heads beside the latent are the ones that are rotated',
        {'rotate_num_heads': 2, 'use_latent_kv': True, 'dim_latent_kv': 8, 'latent_rope_subheads': 2},
        'Leave out [rotate_num_heads].',
    ),
    Rule(
        ('rotate_num_heads', 'latent_rope_subheads', 'kv_heads', 'one_kv_head'),
        lambda flags, dim: (flags.rotated_heads or flags.heads) < flags.heads and flags.num_kv_heads != flags.heads,
        'some of the heads are rotated, but {heads} query heads share {num_kv_heads} key heads, so that a rotated query would '
        'meet a key that is not',
        {'heads': 4, 'rotate_num_heads': 2, 'kv_heads': 2},
        'Rotate all heads, or give every query head its own key head.',
        only_changed=True,
    ),
    Rule(
        ('latent_rope_subheads', 'heads'),
        lambda flags, dim: flags.latent_rope_subheads is not None and flags.latent_rope_subheads >= flags.num_kv_heads,
        'no key head would be left that is made of the latent ({num_kv_heads} key heads)',
        {'heads': 4, 'use_latent_kv': True, 'dim_latent_kv': 8, 'latent_rope_subheads': 4},
        'Choose fewer than {num_kv_heads}.',
    ),
    Rule(
        ('use_latent_q',),
        lambda flags, dim: flags.use_latent_q and flags.dim_latent_q is None,
        'the width of the latent is missing',
        {'use_latent_q': True},
        'Give [dim_latent_q].',
    ),
    Rule(
        ('use_latent_kv',),
        lambda flags, dim: flags.use_latent_kv and flags.dim_latent_kv is None,
        'the width of the latent is missing',
        {'use_latent_kv': True},
        'Give [dim_latent_kv].',
    ),
    Rule(
        ('qk_norm_groups', 'dim_head'),
        lambda flags, dim: flags.qk_norm and flags.dim_head % flags.qk_norm_groups != 0,
        'a head is cut into chunks of one size',
        {'qk_norm': True, 'qk_norm_groups': 3, 'dim_head': 64},
        'Choose a divisor of {dim_head}.',
    ),
    Rule(
        ('qk_norm_groups', 'dim_head'),
        lambda flags, dim: flags.qk_norm and flags.qk_norm_groups > 1 and flags.dim_head // flags.qk_norm_groups <= 2,
        'the cosine of chunks with two channels or one says too little; a chunk needs more than 2',
        {'qk_norm': True, 'qk_norm_groups': 32, 'dim_head': 64},
        'Choose fewer groups.',
    ),
    Rule(
        ('scale', 'qk_norm'),
        lambda flags, dim: flags.scale is not None and flags.qk_norm,
        'with cosine similarities the factor is [qk_norm_scale]',
        {'scale': 0.5, 'qk_norm': True},
        'Give [qk_norm_scale].',
    ),
    Rule(
        ('unit_weights', *UNLIKE_UNITS),
        lambda flags, dim: flags.unit_weights and how_many(flags, UNLIKE_UNITS) > 0,
        'weights of plain projections have unit length, and so have queries and keys',
        {'unit_weights': True, 'qk_norm': True},
        only_changed=True,
    ),
    Rule(
        ('qk_rmsnorm', 'k_rmsnorm'),
        lambda flags, dim: flags.qk_rmsnorm and flags.k_rmsnorm,
        'the first norms keys already',
        {'qk_rmsnorm': True, 'k_rmsnorm': True},
    ),
    Rule(
        ('gate_values_rank', 'gate_values_headwise'),
        lambda flags, dim: flags.gate_values_rank is not None and flags.gate_values_headwise,
        'a gate per head is narrow already',
        {'gate_values': True, 'gate_values_rank': 4, 'gate_values_headwise': True},
    ),
    Rule(
        ('output_gate_rank', 'output_gate_headwise'),
        lambda flags, dim: flags.output_gate_rank is not None and flags.output_gate_headwise,
        'a gate per head is narrow already',
        {'output_gate': True, 'output_gate_rank': 4, 'output_gate_headwise': True},
    ),
    Rule(
        ('gate_values_rank',),
        lambda flags, dim: flags.gate_values_rank is not None and flags.gate_values_rank >= max(dim, flags.dim_attended),
        'both widths of the gate, {dim} and {dim_attended}, are no larger, so that it saves nothing',
        {'gate_values': True, 'gate_values_rank': 100_000},
        'Choose less than the larger of the two.',
    ),
    Rule(
        ('output_gate_rank',),
        lambda flags, dim: flags.output_gate_rank is not None and flags.output_gate_rank >= flags.dim_attended,
        'the width of the gate, {dim_attended}, is no larger, so that it saves nothing',
        {'output_gate': True, 'output_gate_rank': 100_000},
        'Choose less than {dim_attended}.',
    ),
    Rule(
        ('project_out',),
        lambda flags, dim: (
            flags.project_out is False and flags.dim_attended * flags.orthogonal_outputs != (flags.dim_out or dim)
        ),
        'without a projection the {dim_attended} channels of the heads must be as many as those of the output',
        {'project_out': False, 'heads': 8, 'dim_head': 100},
        'Choose heads as wide as the output, or leave it out.',
    ),
    Rule(
        ('project_out', 'on_attn'),
        lambda flags, dim: flags.project_out is False and flags.on_attn,
        'attention on attention is an output projection',
        {'project_out': False, 'heads': 1, 'dim_head': 64, 'on_attn': True},
    ),
    Rule(
        ('project_out', 'out_bias'),
        lambda flags, dim: flags.project_out is False and flags.out_bias,
        'the bias is that of the output projection',
        {'project_out': False, 'heads': 1, 'dim_head': 64, 'out_bias': True},
    ),
    Rule(
        ('path', 'causal'),
        lambda flags, dim: flags.path and not flags.causal,
        'a path leads from a key to a later query',
        {'path': True},
        'Use a causal layer, or leave out [path].',
    ),
    Rule(
        ('path', 'l2_distance'),
        lambda flags, dim: flags.path and flags.l2_distance,
        'the path is one of products, not of distances',
        {'causal': True, 'path': True, 'l2_distance': True},
    ),
    Rule(
        ('tensor_product', *OTHER_PROJECTIONS),
        lambda flags, dim: flags.tensor_product and how_many(flags, OTHER_PROJECTIONS) > 0,
        'outer products take the place of the projections, and are latents already',
        {'tensor_product': True, 'use_latent_q': True, 'dim_latent_q': 8},
        only_changed=True,
    ),
    Rule(
        ('differential', 'heads', 'kv_heads', 'one_kv_head'),
        lambda flags, dim: flags.differential and (flags.heads % 2 != 0 or flags.num_kv_heads % 2 != 0),
        'two heads are a pair, with two keys and values: {heads} query heads and {num_kv_heads} key heads must be even numbers',
        {'differential': True, 'heads': 4, 'one_kv_head': True},
        'Choose an even number of both.',
        only_changed=True,
    ),
    Rule(
        ('exclusive', 'value_dim_head', 'dim_head'),
        lambda flags, dim: flags.exclusive and flags.value_dim == 1,
        'of a value with one channel nothing would be left',
        {'exclusive': True, 'value_dim_head': 1},
        'Choose wider values.',
        only_changed=True,
    ),
    Rule(
        ('qkv_bias',),
        lambda flags, dim: not isinstance(flags.qkv_bias, bool) and not set(flags.qkv_bias) <= set('qkv'),
        "the projections are called 'q', 'k' and 'v'",
        {'qkv_bias': ('q', 'o')},
        'Use those, or True for all.',
    ),
    Rule(
        (*WEIGHTS, 'l2_distance'),
        lambda flags, dim: how_many(flags, (*WEIGHTS, 'l2_distance')) > 1,
        'only one of them can be had',
        {'sigmoid': True, 'hard': True},
        'Keep one.',
        only_changed=True,
    ),
    Rule(
        ('custom_attn_fn', *WEIGHTS),
        lambda flags, dim: flags.custom_attn_fn is not None and how_many(flags, WEIGHTS) > 0,
        'your own function takes the place of the other, which would do nothing',
        {'custom_attn_fn': abs, 'sigmoid': True},
        only_changed=True,
    ),
    Rule(
        ('head_learned_sink', 'sigmoid'),
        lambda flags, dim: flags.head_learned_sink and flags.sigmoid and flags.custom_attn_fn is None,
        'sigmoid weights do not compete, so a sink takes nothing away and would never learn',
        {'head_learned_sink': True, 'sigmoid': True},
    ),
    Rule(
        ('softpick', 'head_learned_sink', 'add_zero_kv'),
        lambda flags, dim: flags.softpick and (flags.head_learned_sink or flags.add_zero_kv),
        'a score of 0 takes no weight, so a sink takes nothing away and would never learn',
        {'softpick': True, 'head_learned_sink': True},
        'Leave out the sink.',
        only_changed=True,
    ),
    Rule(
        ('selective', 'causal'),
        lambda flags, dim: flags.selective and not flags.causal,
        'what a token takes away from later ones is defined for causal attention',
        {'selective': True},
        'Use a causal layer, or leave out [selective].',
    ),
    Rule(
        ('inverted_attention', 'causal'),
        lambda flags, dim: flags.inverted_attention and flags.causal,
        'later queries would take from what earlier ones see',
        {'inverted_attention': True, 'causal': True},
        'Use a layer that is not causal, or leave out [inverted_attention].',
    ),
    Rule(
        ('inverted_attention', 'cog_signed', 'head_learned_sink', 'flash_pack_seq'),
        lambda flags, dim: (
            flags.inverted_attention and how_many(flags, ('cog_signed', 'head_learned_sink', 'flash_pack_seq')) > 0
        ),
        'each key is shared out among the queries, of which these know nothing',
        {'inverted_attention': True, 'head_learned_sink': True},
        only_changed=True,
    ),
    Rule(
        ('max_attend_future', 'causal'),
        lambda flags, dim: flags.max_attend_future is not None and flags.causal,
        'a query of a causal layer sees nothing that comes after it',
        {'max_attend_future': 2, 'causal': True},
        'Use a layer that is not causal, or leave out [max_attend_future].',
    ),
    Rule(
        ('scalable_softmax', *NO_SOFTMAX),
        lambda flags, dim: flags.scalable_softmax and how_many(flags, NO_SOFTMAX) > 0,
        'it sharpens a softmax of products over the keys of a query, of which there is none',
        {'scalable_softmax': True, 'sigmoid': True},
        only_changed=True,
    ),
    Rule(
        ('stick_breaking', 'causal'),
        lambda flags, dim: flags.stick_breaking and not flags.causal,
        'the stick is broken from the nearest earlier key on',
        {'stick_breaking': True},
        'Use a causal layer, or leave out [stick_breaking].',
    ),
    Rule(
        ('stick_breaking', 'head_learned_sink', 'add_zero_kv', 'laser'),
        lambda flags, dim: flags.stick_breaking and how_many(flags, ('head_learned_sink', 'add_zero_kv', 'laser')) > 0,
        'what lies in front of all keys takes only what they leave, so that a sink changes nothing, and the first query sees '
        'nothing, which has no logarithm',
        {'causal': True, 'stick_breaking': True, 'head_learned_sink': True},
        only_changed=True,
    ),
    Rule(
        ('use_cope', 'causal'),
        lambda flags, dim: flags.use_cope and not flags.causal,
        'contextual positions count the keys between a query and an earlier key',
        {'use_cope': True},
        'Use a causal layer, or leave out [use_cope].',
    ),
    Rule(
        ('data_dependent_alibi_per_row', 'causal'),
        lambda flags, dim: flags.data_dependent_alibi and flags.data_dependent_alibi_per_row and not flags.causal,
        'gates per query are defined for causal attention',
        {'data_dependent_alibi': True, 'data_dependent_alibi_per_row': True},
        'Use a causal layer, or leave out [data_dependent_alibi_per_row].',
    ),
    Rule(
        ('data_dependent_alibi_kwargs',),
        lambda flags, dim: bool(
            set(flags.data_dependent_alibi_kwargs)
            - ({'post_log_scale'} if flags.data_dependent_alibi_per_row else {'post_log_scale', 'bias_init'})
        ),
        'the known keywords are post_log_scale and, unless the gates are per row, bias_init',
        {'data_dependent_alibi': True, 'data_dependent_alibi_kwargs': {'bias': 1.0}},
        'Use those.',
    ),
    Rule(
        ('attend_sdp_kwargs',),
        lambda flags, dim: bool(set(flags.attend_sdp_kwargs) - set(BACKENDS)),
        f'the known keywords are {", ".join(BACKENDS)}',
        {'attend_sdp_kwargs': {'enable_fast': True}},
        'Use those.',
    ),
    Rule(
        ('attend_sdp_kwargs',),
        lambda flags, dim: not any(flags.attend_sdp_kwargs.values()),
        'no backend is left',
        {'attend_sdp_kwargs': {'enable_math': False}},
        'Enable one.',
    ),
    Rule(
        ('flash_pack_seq', 'selective', 'hybrid_module', 'path'),
        lambda flags, dim: flags.flash_pack_seq and how_many(flags, ('selective', 'hybrid_module', 'path')) > 0,
        'this would carry something from one packed sequence into the next',
        {'causal': True, 'flash_pack_seq': True, 'selective': True},
        only_changed=True,
    ),
)

FEEDFORWARD_RULES = (
    Rule(
        ('canon', 'experts'),
        lambda flags, dim: flags.canon and flags.experts is not None,
        'an expert reads single tokens, which have no neighbours there',
        {'canon': True, 'experts': 4},
    ),
    Rule(
        SWITCHES,
        lambda flags, dim: how_many(flags, SWITCHES) > 1,
        'there is one activation',
        {'relu_squared': True, 'solu': True},
        'Keep one.',
        only_changed=True,
    ),
    Rule(
        ('custom_activation', *SWITCHES),
        lambda flags, dim: flags.custom_activation is not None and how_many(flags, SWITCHES) > 0,
        'your own activation takes the place of the other, which would do nothing',
        {'custom_activation': nn.Tanh(), 'swish': True},
        only_changed=True,
        inert=True,
    ),
    Rule(
        ('custom_activation',),
        lambda flags, dim: isinstance(flags.custom_activation, str) and flags.custom_activation not in ACTIVATIONS,
        f'the known names are {", ".join(ACTIVATIONS)}',
        {'custom_activation': 'gelu_new'},
        'Use one of those, or give a function.',
    ),
    Rule(
        ('mult', 'dim_inner'),
        lambda flags, dim: flags.is_changed('mult') and flags.dim_inner is not None,
        'both say how wide the hidden layer is',
        {'mult': 2, 'dim_inner': 30},
    ),
    Rule(
        ('glu_softclamp', 'relu_squared', 'solu', 'custom_activation'),
        lambda flags, dim: flags.glu_softclamp and flags.activation not in ('gelu', 'swish'),
        'the clamped gate is defined for GELU and SiLU',
        {'glu': True, 'glu_softclamp': True, 'relu_squared': True},
        only_changed=True,
    ),
    Rule(
        ('unit_weights', 'experts', *STARTS),
        lambda flags, dim: flags.unit_weights and how_many(flags, ('experts', *STARTS)) > 0,
        'weights of plain linear maps have unit length, from the start',
        {'unit_weights': True, 'experts': 4},
        only_changed=True,
    ),
    Rule(
        ('softclamp_value', 'glu'),
        lambda flags, dim: flags.softclamp_value is not None and flags.glu,
        'a gated linear unit has two inputs to clamp',
        {'glu': True, 'softclamp_value': 2.0},
        'Use [glu_softclamp].',
        inert=True,
    ),
    Rule(
        ('experts_active', 'experts'),
        lambda flags, dim: flags.experts is not None and flags.experts_active > flags.experts,
        'a token cannot go through more experts than there are',
        {'experts': 4, 'experts_active': 5},
        'Choose at most {experts}.',
    ),
    Rule(
        ('experts_active', 'router_normalize'),
        lambda flags, dim: flags.experts is not None and flags.experts_active == 1 and flags.router_normalize,
        'the share of a single expert is always one, so that the router would learn nothing',
        {'experts': 4, 'experts_active': 1},
        'Set [router_normalize] to False.',
    ),
    Rule(
        ('router_balance_weight', 'router_balance'),
        lambda flags, dim: (
            flags.experts is not None and flags.is_changed('router_balance_weight') and flags.router_balance != 'loss'
        ),
        'no loss keeps these experts in balance',
        {'experts': 4, 'router_balance': 'bias', 'router_balance_weight': 0.1},
        inert=True,
    ),
    Rule(
        ('router_balance_step', 'router_balance'),
        lambda flags, dim: (
            flags.experts is not None and flags.is_changed('router_balance_step') and flags.router_balance != 'bias'
        ),
        'no bias keeps these experts in balance',
        {'experts': 4, 'router_balance_step': 0.1},
        inert=True,
    ),
    Rule(
        ('glu_clamp_value', 'glu_softclamp'),
        lambda flags, dim: flags.glu and flags.glu_clamp_value is not None and flags.glu_softclamp,
        'each keeps both factors inside a range',
        {'glu': True, 'glu_clamp_value': 7.0, 'glu_softclamp': True},
    ),
    Rule(
        ('mult',),
        lambda flags, dim: flags.inner(dim) < 1,
        'the hidden layer would have no channel (input width {dim})',
        {'mult': 0.01},
        'Choose a larger one.',
    ),
)
