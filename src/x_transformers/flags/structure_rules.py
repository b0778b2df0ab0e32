"""Which of the flags in ``structure.py`` exclude others of the stack."""

from __future__ import annotations

from x_transformers.flags.rule import Rule, how_many

STRUCTURE_RULES = (
    Rule(
        ('attn_aggregated_residuals', 'integrate_layers'),
        lambda flags, dim: flags.attn_aggregated_residuals and flags.integrate_layers,
        'each mixes the inputs of all layers so far',
        {'attn_aggregated_residuals': True, 'attn_aggregated_residual_kwargs': {'lora_rank': 2}, 'integrate_layers': True},
    ),
    Rule(
        ('attn_aggregated_residual_kwargs', 'dim'),
        lambda flags, dim: flags.attn_aggregated_residuals and not 0 < flags.aggregated_rank < dim,
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
    ),
    Rule(
        ('mv_split_residual', 'scale_residual', 'scale_residual_constant'),
        lambda flags, dim: flags.mv_split_residual and (flags.learns_residual_scale or flags.scale_residual_constant != 1),
        'the mean and the deviation have factors of their own',
        {'mv_split_residual': True, 'scale_residual': True},
        only_changed=True,
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
        ('pre_and_post_norm', 'resi_dual'),
        lambda flags, dim: flags.pre_and_post_norm and flags.resi_dual,
        'each says where the norms are',
        {'pre_and_post_norm': True, 'resi_dual': True},
    ),
    Rule(
        ('only_attn', 'layers_execute_order', 'unet_skips', 'macaron'),
        lambda flags, dim: flags.only_attn and how_many(flags, ('layers_execute_order', 'unet_skips', 'macaron')) > 0,
        'this counts on the feed-forwards of each block',
        {'only_attn': True, 'unet_skips': True},
        only_changed=True,
    ),
    Rule(
        ('only_attn', 'custom_layers'),
        lambda flags, dim: flags.only_attn and flags.custom_layers is not None and 'f' in flags.custom_layers,
        'the layers are spelt out, with feed-forwards',
        {'only_attn': True, 'custom_layers': ('a', 'f')},
    ),
)
