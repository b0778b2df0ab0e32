"""Rules between the parts of a stack; ``layers/plan.py`` checks the order of layers."""

from __future__ import annotations

from x_transformers.flags.attention import AttentionFlags
from x_transformers.flags.positions import ANY_POSITION_BIAS
from x_transformers.flags.rule import Rule, alike_of, how_many, is_on, rules_of
from x_transformers.flags.stack import StackFlags

POSITION_BIASES = (*ANY_POSITION_BIAS, 'attn_data_dependent_alibi')


def self_only(flags: StackFlags, part: str) -> list[str]:
    return [f'{part}{name}' for name in AttentionFlags.self_only() if is_on(flags, f'{part}{name}')]


# asked where flags differ between layers
SAME_IN_ALL_LAYERS = (
    *alike_of(StackFlags),
    Rule(
        (*ANY_POSITION_BIAS, 'heads'),
        lambda flags, dim: flags.position_bias is not None and flags.differs('heads'),
        'one position bias with an entry per head serves all layers',
        {'alibi_pos_bias': True, 'heads': (4, 2)},
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
    *rules_of(StackFlags),
    Rule(
        ('attn_path', 'rotary_pos_emb', 'rotary_xpos', 'polar_pos_emb'),
        lambda flags, dim: flags.attention.path and (flags.rotary or flags.polar),
        'its products are the positions, and turned queries and keys would not meet them',
        {'causal': True, 'attn_path': True, 'rotary_pos_emb': True},
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
        ('attn_flash_pack_seq', 'rotary_pos_emb'),
        lambda flags, dim: flags.attention.flash_pack_seq and flags.has_self_attention and not flags.rotary,
        'positions start again in every packed sequence, which is done for rotary positions',
        {'attn_flash_pack_seq': True},
        'Set [rotary_pos_emb].',
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
)
