"""Which flags of a model exclude each other, or do not fit its stack."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from x_transformers.flags.feedforward import ACTIVATIONS
from x_transformers.flags.rule import Rule, how_many
from x_transformers.flags.stack import ADAPTIVE, StackFlags
from x_transformers.flags.wrapper import WrapperFlags

if TYPE_CHECKING:
    from x_transformers.flags.wrapper import VisionFlags

HEADS = ('tie_embedding', 'num_output_heads', 'to_logits')
SHAPES = ('logits_scale', 'logits_softcap', 'logits_bias', 'logits_transform')
LOGITS = (*HEADS, 'multi_token_heads', 'mixture_of_softmax', 'sigsoftmax_logits', 'squeeze_out_last_dim', *SHAPES)
POOLS = WrapperFlags.one_of('pool')

# what stands beside the tokens, or makes them rows of another kind
UNLOOPED = ('recycling', 'num_memory_tokens', *POOLS, 'ff_deep_embed')

# rules of the model alone; ``dim`` is the stack's width
WRAPPER_RULES = (
    Rule(
        ('tie_embedding_scale', 'logits_scale'),
        lambda flags, dim: None not in (flags.tie_embedding_scale, flags.logits_scale),
        'each is the factor on the logits',
        {'tie_embedding': True, 'tie_embedding_scale': 0.5, 'logits_scale': 0.5},
    ),
    Rule(
        POOLS,
        lambda flags, dim: how_many(flags, POOLS) > 1,
        'each makes the output out of all tokens in its own way',
        {'average_pool_embed': True, 'use_cls_token': True},
        'Keep one.',
        only_changed=True,
    ),
    Rule(
        ('tie_embedding', 'emb_dim'),
        lambda flags, dim: flags.tie_embedding and flags.emb_dim not in (None, dim),
        'the stack gives {dim} channels, which the embedding table cannot be multiplied with',
        {'tie_embedding': True, 'emb_dim': 3},
    ),
    Rule(
        ('tie_embedding', 'token_emb'),
        lambda flags, dim: flags.tie_embedding and flags.token_emb is not None and not hasattr(flags.token_emb, 'emb'),
        'the logits need the table of a TokenEmbedding, its `emb`',
        {'tie_embedding': True, 'token_emb': nn.Embedding.from_pretrained(torch.zeros(2, 2))},
    ),
    Rule(
        ('bigram_hash_embed', 'token_emb'),
        lambda flags, dim: flags.bigram_hash_embed is not None and flags.token_emb is not None,
        'your own embedding may read anything, and pairs are made of token ids',
        {'bigram_hash_embed': 8, 'token_emb': nn.Identity()},
    ),
    Rule(
        ('tie_embedding', 'logits_dim'),
        lambda flags, dim: flags.tie_embedding and flags.logits_dim not in (None, flags.num_tokens),
        'the embedding table gives one logit per token ({num_tokens})',
        {'tie_embedding': True, 'logits_dim': 3},
    ),
    Rule(
        HEADS,
        lambda flags, dim: how_many(flags, HEADS) > 1,
        'each is a way to make the logits',
        {'tie_embedding': True, 'num_output_heads': 2},
        'Keep one.',
        only_changed=True,
    ),
    Rule(
        ('randomized_positions', 'memory_tokens_interspersed_every'),
        lambda flags, dim: flags.randomized_positions is not None and flags.memory_tokens_interspersed_every is not None,
        'memory tokens between the tokens have no positions of their own',
        {'randomized_positions': 16, 'num_memory_tokens': 2, 'memory_tokens_interspersed_every': 4},
    ),
    Rule(
        ('looped', *UNLOOPED),
        lambda flags, dim: flags.looped and how_many(flags, UNLOOPED) > 0,
        'the stack is run on its own output, row by row',
        {'looped': True, 'recycling': True},
        only_changed=True,
    ),
    Rule(
        ('return_only_embed', *LOGITS),
        lambda flags, dim: flags.return_only_embed and how_many(flags, LOGITS) > 0,
        'there are no logits that it could act on',
        {'return_only_embed': True, 'sigsoftmax_logits': True},
        only_changed=True,
        inert=True,
    ),
    Rule(
        ('logits_bias', 'to_logits'),
        lambda flags, dim: flags.logits_bias and flags.to_logits is not None,
        'your own head brings its bias',
        {'logits_bias': True, 'to_logits': nn.Identity()},
    ),
    Rule(
        ('logits_transform',),
        lambda flags, dim: flags.logits_transform not in (None, *ACTIVATIONS),
        f'the known names are {", ".join(ACTIVATIONS)}',
        {'logits_transform': 'tanh'},
        'Use one of those.',
    ),
    Rule(
        ('logits_transform', 'mixture_of_softmax'),
        lambda flags, dim: flags.logits_transform is not None and flags.mixture_of_softmax,
        'a mixture has maps of its own in front of the logits',
        {'logits_transform': 'gelu', 'mixture_of_softmax': True},
    ),
    Rule(
        ('mixture_of_softmax', 'num_output_heads'),
        lambda flags, dim: flags.mixture_of_softmax and flags.num_output_heads > 1,
        'the mixture is of one head',
        {'mixture_of_softmax': True, 'num_output_heads': 2},
    ),
    Rule(
        ('multi_token_heads', 'num_output_heads'),
        lambda flags, dim: flags.multi_token_heads > 1 and flags.num_output_heads > 1,
        'each head for a later token gives one set of logits',
        {'multi_token_heads': 2, 'num_output_heads': 2},
    ),
    Rule(
        ('multi_token_heads', *POOLS),
        lambda flags, dim: flags.multi_token_heads > 1 and how_many(flags, POOLS) > 0,
        'there is an output for the whole sequence, and no token that others would follow',
        {'multi_token_heads': 2, 'average_pool_embed': True},
        only_changed=True,
    ),
    Rule(
        ('scaled_sinu_pos_emb', 'use_abs_pos_emb'),
        lambda flags, dim: flags.scaled_sinu_pos_emb and not flags.use_abs_pos_emb,
        'the second turns the first off',
        {'scaled_sinu_pos_emb': True, 'use_abs_pos_emb': False},
        inert=True,
    ),
    Rule(
        ('scaled_sinu_pos_emb', 'max_seq_len'),
        lambda flags, dim: flags.scaled_sinu_pos_emb and not flags.max_seq_len,
        'a length of 0 turns absolute positions off',
        {'scaled_sinu_pos_emb': True, 'max_seq_len': 0},
        inert=True,
    ),
    Rule(
        ('scaled_sinu_pos_emb', 'emb_dim'),
        lambda flags, dim: flags.scaled_sinu_pos_emb and (flags.emb_dim or dim) % 2 != 0,
        'half of the channels are sines and half are cosines, so their number must be even',
        {'scaled_sinu_pos_emb': True, 'emb_dim': 3},
        'Choose an even width.',
    ),
    Rule(
        ('embed_num_tokens',),
        lambda flags, dim: any(not isinstance(size, int) or size < 1 for size in flags.embed_num_tokens.values()),
        'each name needs the size of its vocabulary, a whole number from 1',
        {'embed_num_tokens': {'kind': 0}},
        'Give sizes.',
    ),
)


class OnStack:
    """A model's flags together with those of its stack, for rules about both.

    ``left_to_right``: no token sees a later one, but for the prefix of a prefix decoder.
    """

    def __init__(self, flags: Any, stack: Any, left_to_right: bool = False) -> None:
        self.own, self.stack = flags, stack
        self.left_to_right = left_to_right or stack.causal

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own if name in self.own.flag_fields() else self.stack, name)

    def flag_fields(self) -> dict[str, Any]:
        return dict(self.own.flag_fields())

    def is_changed(self, name: str) -> bool:
        return bool((self.own if name in self.own.flag_fields() else self.stack).is_changed(name))


# keys and values do not see the stream itself
MIXTURES = ('qkv_receive_diff_residuals', 'integrate_layers', 'attn_aggregated_residuals', 'mudd')

# rules of a model with its stack
ON_STACK_RULES = (
    Rule(
        ('randomized_positions', 'max_seq_len'),
        lambda flags, dim: (
            flags.randomized_positions is not None
            and flags.use_abs_pos_emb
            and not flags.scaled_sinu_pos_emb
            and not flags.disables_abs_pos_emb
            and 0 < flags.max_seq_len < flags.randomized_positions
        ),
        'the table of absolute positions has {max_seq_len} rows',
        {'randomized_positions': 1000},
        'Enlarge [max_seq_len], or turn absolute positions off.',
    ),
    Rule(
        ('randomized_positions',),
        lambda flags, dim: (
            flags.randomized_positions is not None
            and not (flags.rotary or flags.polar or flags.position_bias)
            and (not flags.use_abs_pos_emb or not flags.max_seq_len or flags.disables_abs_pos_emb)
        ),
        'there are no positions that could be drawn',
        {'randomized_positions': 8, 'use_abs_pos_emb': False},
        'Leave it out, or give the model positions.',
        inert=True,
    ),
    Rule(
        ('ff_deep_embed',),
        lambda flags, dim: flags.ff_deep_embed and not flags.has_feedforward,
        'the stack has no feed-forward whose output it could multiply',
        {'ff_deep_embed': True, 'stack': {'only_attn': True}},
        'Leave it out, or use a stack with feed-forwards.',
        inert=True,
    ),
    Rule(
        ('looped', 'pre_and_post_norm'),
        lambda flags, dim: flags.looped and not flags.pre_and_post_norm,
        'only a normed output can go in again',
        {'looped': True},
        'Build the stack with pre_and_post_norm=True.',
    ),
    Rule(
        ('use_cls_token',),
        lambda both, dim: both.use_cls_token and both.left_to_right and both.has_self_attention,
        'the stack reads from left to right, so tokens in front of the sequence see nothing of it and the output is the same '
        'for any input',
        {'use_cls_token': True},
        'Use an Encoder, or average_pool_embed or attn_pool.',
    ),
    Rule(
        ('memory_tokens_interspersed_every', 'causal'),
        lambda both, dim: both.memory_tokens_interspersed_every is not None and not both.causal,
        'windows that begin with memory tokens are made for reading from left to right',
        {'num_memory_tokens': 2, 'memory_tokens_interspersed_every': 4},
        'Use a Decoder, or memory tokens in front only.',
    ),
    Rule(
        ('max_mem_len', 'mixer'),
        lambda both, dim: both.max_mem_len > 0 and both.mixer is not None,
        'a memory holds what attention saw, and not the state of a mixer',
        {'max_mem_len': 4, 'stack': {'mixer': 'gated_delta_rule', 'custom_layers': ('m', 'f', 'a', 'f')}},
    ),
    Rule(
        ('value_embed',),
        lambda both, dim: both.value_embed is not None and not both.has_self_attention,
        'the stack has no self attention whose values it could add to',
        {'value_embed': 1, 'stack': {'cross_attend': True, 'only_cross': True}},
        'Leave it out, or use a stack with self attention.',
    ),
    Rule(
        ('max_mem_len', 'value_embed'),
        lambda both, dim: both.max_mem_len > 0 and both.value_embed is not None,
        'a memory is a state of the stream, and the token that its values would be made of is not known any more',
        {'max_mem_len': 4, 'value_embed': 1},
    ),
    Rule(
        ('max_mem_len', *MIXTURES),
        lambda both, dim: both.max_mem_len > 0 and how_many(both, MIXTURES) > 0,
        'a memory is one state of the stream, and keys and values have inputs of their own',
        {'max_mem_len': 4, 'stack': {'integrate_layers': True}},
        only_changed=True,
    ),
)

# rules of a stack in a model that has nothing to tell it beside its input
ALONE_RULES = (
    Rule(
        ('cross_attend',),
        lambda flags, dim: flags.has_cross_attention,
        'there is no other sequence to attend to here',
        {'cross_attend': True},
        'Leave it out.',
    ),
    Rule(
        ADAPTIVE,
        lambda flags, dim: flags.needs_condition,
        'there is no condition here',
        {'use_adaptive_rmsnorm': True},
        'Leave it out.',
        only_changed=True,
    ),
)


def grid_refusals(flags: VisionFlags, stack: StackFlags) -> list[str]:
    """Rotary positions on another grid than that of the patches."""
    if stack.rotary_axes is None or stack.rotary_axes == flags.grid:
        return []
    return [
        f'`rotary_axes={stack.rotary_axes}` of `attn_layers`: the grid of the patches is {flags.grid} (rows, columns). '
        f'Set it to that, or leave it out.'
    ]


VISION_RULES = (
    Rule(
        ('image_size', 'patch_size'),
        lambda flags, dim: any(isinstance(size, tuple) and len(size) != 2 for size in (flags.image_size, flags.patch_size)),
        'a size is one side, or height and width',
        {'image_size': (8, 8, 3), 'patch_size': 4},
        'Give one number or two.',
    ),
    Rule(
        ('image_size', 'patch_size'),
        lambda flags, dim: any(image % patch for image, patch in zip(flags.image_sides, flags.patch_sides, strict=True)),
        'patches tile the image',
        {'image_size': 10, 'patch_size': 4},
        'Choose a divisor of {image_size}.',
    ),
)

__all__ = ['ADAPTIVE', 'ALONE_RULES', 'ON_STACK_RULES', 'VISION_RULES', 'WRAPPER_RULES', 'OnStack']
