"""The flags of a token model around a stack. ``OnStack`` checks their rules with the flags of the stack.

Derived, WrapperFlags: ``num_mem_tokens`` (memory tokens as a number).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from x_transformers.flags.base import REQUIRED, Flags, flag
from x_transformers.flags.feedforward import ACTIVATIONS
from x_transformers.flags.reasons import AGAIN, BEFORE, DRAWS, WHOLE
from x_transformers.flags.rule import Rule, how_many

XL = 'https://arxiv.org/abs/1901.02860'
MEMORY = 'https://arxiv.org/abs/2006.11527'
MIXTURE = 'https://arxiv.org/abs/1711.03953'
LOOPED = 'https://arxiv.org/abs/2510.25741'

# of the stack: keys and values do not see the stream itself
MIXTURES = ('qkv_receive_diff_residuals', 'integrate_layers', 'attn_aggregated_residuals', 'mudd')


@dataclass(frozen=True, kw_only=True, repr=False)
class WrapperFlags(Flags):
    """Every keyword of ``TransformerWrapper``."""

    num_tokens: int = flag(REQUIRED, 'Size of the vocabulary.', low=1, family='embedding')
    max_seq_len: int = flag(
        REQUIRED, 'Longest sequence, for absolute positions; 0: no absolute positions.', low=0, family='embedding'
    )
    attn_layers: nn.Module = flag(REQUIRED, 'The stack: Encoder, Decoder, PrefixDecoder or CrossAttender.', family='embedding')
    embed_num_tokens: Mapping[str, int] = flag(
        {}, 'More embeddings that are summed in: name and size of each vocabulary.', example={'kind': 2}, family='embedding',
        refused={'told nothing': 'a call must give ids for these embeddings, and nobody can give them here'},
        rules=(
            Rule(
                ('embed_num_tokens',),
                lambda flags, dim: any(not isinstance(size, int) or size < 1 for size in flags.embed_num_tokens.values()),
                'each name needs the size of its vocabulary, a whole number from 1', {'embed_num_tokens': {'kind': 0}},
                'Give sizes.',
            ),
        ),
    )  # fmt: skip
    emb_dim: int | None = flag(None, "Width of the embeddings; None: the stack's width.", low=1, family='embedding')
    max_mem_len: int = flag(
        0, 'Number of hidden states kept per layer as memories for the next segment.', paper=XL, low=0, traits='asked_for',
        family='memories',
        excludes={
            'value_embed': (
                'a memory is a state of the stream, and the token that its values would be made of is not known any more'
            ),
        },
        rules=(
            Rule(
                ('max_mem_len', 'mixer'), lambda flags, dim: flags.max_mem_len > 0 and flags.mixer is not None,
                'a memory holds what attention saw, and not the state of a mixer',
                {'max_mem_len': 4, 'stack': {'mixer': 'gated_delta_rule', 'custom_layers': ('m', 'f', 'a', 'f')}},
            ),
            Rule(
                ('max_mem_len', *MIXTURES), lambda flags, dim: flags.max_mem_len > 0 and how_many(flags, MIXTURES) > 0,
                'a memory is one state of the stream, and keys and values have inputs of their own',
                {'max_mem_len': 4, 'stack': {'integrate_layers': True}}, only_changed=True,
            ),
        ),
    )  # fmt: skip
    shift_mem_down: int = flag(
        0, 'Layers attend to the memories of the layer this far above.', paper='https://arxiv.org/abs/2012.15688', low=0,
        traits='asked_for', family='memories',
    )  # fmt: skip
    emb_dropout: float = flag(
        0.0, 'Dropout on the embeddings.', low=0.0, high=1.0, family='embedding', refused={'context': DRAWS},
    )  # fmt: skip
    post_emb_norm: bool = flag(False, 'Layer norm of the embeddings.', family='embedding')
    num_memory_tokens: int | None = flag(
        None, 'Learned tokens before the sequence.', paper=MEMORY, low=0, traits='no_cache', family='memories',
        refused={
            'context': 'the first slice alone would have them',
            'twice': 'memory tokens see all tokens and are seen by all, so that they would show what is to be predicted',
        },
    )  # fmt: skip
    memory_tokens_interspersed_every: int | None = flag(
        None, 'Insert the memory tokens before every window of this many tokens.', parent='num_memory_tokens', low=1,
        rules=(
            Rule(
                ('memory_tokens_interspersed_every', 'causal'),
                lambda flags, dim: flags.memory_tokens_interspersed_every is not None and not flags.causal,
                'windows that begin with memory tokens are made for reading from left to right',
                {'num_memory_tokens': 2, 'memory_tokens_interspersed_every': 4},
                'Use a Decoder, or memory tokens in front only.',
            ),
        ),
    )  # fmt: skip
    tie_embedding: bool = flag(
        False, 'Logits from the transposed token embedding.', paper='https://arxiv.org/abs/1608.05859', often=True,
        family='embedding', one_of='head', traits='of_logits',
        rules=(
            Rule(
                ('tie_embedding', 'emb_dim'), lambda flags, dim: flags.tie_embedding and flags.emb_dim not in (None, dim),
                'the stack gives {dim} channels, which the embedding table cannot be multiplied with',
                {'tie_embedding': True, 'emb_dim': 3},
            ),
            Rule(
                ('tie_embedding', 'token_emb'),
                lambda flags, dim: (
                    flags.tie_embedding and flags.token_emb is not None and not hasattr(flags.token_emb, 'emb')
                ),
                'the logits need the table of a TokenEmbedding, its `emb`', {'tie_embedding': True, 'token_emb': nn.Identity()},
            ),
            Rule(
                ('tie_embedding', 'logits_dim'),
                lambda flags, dim: flags.tie_embedding and flags.logits_dim not in (None, flags.num_tokens),
                'the embedding table gives one logit per token ({num_tokens})', {'tie_embedding': True, 'logits_dim': 3},
            ),
        ),
    )  # fmt: skip
    logits_dim: int | None = flag(None, 'Number of logits; None: num_tokens.', low=1, traits='of_outputs', family='output')
    return_only_embed: bool = flag(
        False, 'No logits: the model returns its embeddings.', family='output', refused={'per token': 'there are no logits'},
        idle_with={'of_logits': 'there are no logits that it could act on'},
    )  # fmt: skip
    num_output_heads: int = flag(
        1, 'Number of heads; with several the logits are a tuple.', low=1, one_of='head', traits='of_logits', family='output',
        refused={'per token': 'there are several outputs for a token, and this needs one (num_output_heads=1)'},
    )  # fmt: skip
    multi_token_heads: int = flag(
        1, 'Heads for this many next tokens. The first is the usual one; each other is a residual block before the same map '
        'to logits. `return_multi_token_logits=True` returns all.', paper='https://arxiv.org/abs/2404.19737', low=1,
        since='here', traits=('of_logits', 'of_outputs'), family='output',
        refused={'context': 'what they are to predict may lie in the next slice'},
        excludes={
            'num_output_heads': 'each head for a later token gives one set of logits',
            'pool': 'there is an output for the whole sequence, and no token that others would follow',
        },
    )  # fmt: skip
    use_abs_pos_emb: bool = flag(True, 'Absolute positions, unless the stack turns them off.', family='embedding')
    scaled_sinu_pos_emb: bool = flag(
        False, 'Sinusoidal positions with a learned scale instead of a table.', paper='https://arxiv.org/abs/1706.03762',
        family='embedding',
        rules=(
            Rule(
                ('scaled_sinu_pos_emb', 'use_abs_pos_emb'),
                lambda flags, dim: flags.scaled_sinu_pos_emb and not flags.use_abs_pos_emb, 'the second turns the first off',
                {'scaled_sinu_pos_emb': True, 'use_abs_pos_emb': False}, inert=True,
            ),
            Rule(
                ('scaled_sinu_pos_emb', 'max_seq_len'), lambda flags, dim: flags.scaled_sinu_pos_emb and not flags.max_seq_len,
                'a length of 0 turns absolute positions off', {'scaled_sinu_pos_emb': True, 'max_seq_len': 0}, inert=True,
            ),
            Rule(
                ('scaled_sinu_pos_emb', 'emb_dim'),
                lambda flags, dim: flags.scaled_sinu_pos_emb and (flags.emb_dim or dim) % 2 != 0,
                'half of the channels are sines and half are cosines, so their number must be even',
                {'scaled_sinu_pos_emb': True, 'emb_dim': 3}, 'Choose an even width.',
            ),
        ),
    )  # fmt: skip
    l2norm_embed: bool = flag(False, 'Unit-length token and position embeddings.', family='embedding')
    recycling: bool = flag(
        False, 'Feed the output back into the input several times.', paper='https://www.nature.com/articles/s41586-021-03819-2',
        traits='no_cache', family='memories',
        refused={
            'context': AGAIN,
            'pipeline': AGAIN,
            'told nothing': 'a call must say how often the output is fed back, and nobody can say it here',
        },
    )  # fmt: skip
    train_max_recycle_steps: int = flag(
        4, 'In training, the number of rounds is drawn from 1 to this.', parent='recycling', low=1
    )
    looped: bool = flag(
        False, 'Run the stack several times on its own output, until a gate decides to stop.', paper=LOOPED,
        since='2.31.10', family='memories', refused={'context': AGAIN, 'pipeline': AGAIN},
        excludes={
            ('recycling', 'num_memory_tokens', 'pool', 'ff_deep_embed'): 'the stack is run on its own output, row by row'
        },
        rules=(
            Rule(
                ('looped', 'pre_and_post_norm'), lambda flags, dim: flags.looped and not flags.pre_and_post_norm,
                'only a normed output can go in again', {'looped': True}, 'Build the stack with pre_and_post_norm=True.',
            ),
        ),
    )  # fmt: skip
    max_looped_steps: int = flag(4, 'The maximum number of runs.', paper=LOOPED, parent='looped', low=1, since='2.31.10')
    looped_positions: bool = flag(
        False,
        'A token that is read alone has its rotary or polar position in every loop, as in training; without it in the first '
        'loop only, as in 2.31.10.', paper=LOOPED, parent='looped', since='here',
    )  # fmt: skip
    emb_frac_gradient: float = flag(
        1.0, 'Fraction of the gradient that reaches the embeddings.', paper='https://arxiv.org/abs/2105.13290', low=0.0,
        high=1.0, family='embedding',
    )  # fmt: skip
    attn_z_loss_weight: float = flag(
        1e-4, 'Weight of the z-loss of the attention scores, when the call asks for it.',
        paper='https://arxiv.org/abs/2202.08906', traits='asked_for', family='output',
    )  # fmt: skip
    average_pool_embed: bool = flag(
        False, 'Logits of the mean of all tokens.', one_of='pool', traits='no_cache', family='output',
        refused={'per token': WHOLE},
    )  # fmt: skip
    use_cls_token: bool = flag(
        False, 'Logits of learned tokens before the sequence.', one_of='pool', traits='no_cache', family='output',
        refused={'per token': WHOLE},
        rules=(
            Rule(
                ('use_cls_token',), lambda flags, dim: flags.use_cls_token and flags.left_to_right and flags.has_self_attention,
                'the stack reads from left to right, so tokens in front of the sequence see nothing of it and the output '
                'is the same for any input', {'use_cls_token': True}, 'Use an Encoder, or average_pool_embed or attn_pool.',
            ),
        ),
    )  # fmt: skip
    num_cls_tokens: int = flag(1, 'Number of these tokens.', parent='use_cls_token', low=1)
    attn_pool: bool = flag(
        False, 'Learned queries attend over the output.', one_of='pool', traits='of_outputs', family='output',
        refused={'per token': WHOLE},
    )  # fmt: skip
    num_pooled_tokens: int = flag(1, 'Number of these queries.', parent='attn_pool', low=1)
    attn_pool_depth: int = flag(1, 'Depth of the pooling; more than 1: a stack of cross attention.', parent='attn_pool', low=1)
    dim_pooled_tokens: int | None = flag(
        None, "Width of the pooled tokens; None: the stack's width.", parent='attn_pool', low=1
    )
    squeeze_out_last_dim: bool = flag(
        False, 'Drop the last axis of the logits when its size is 1.', family='output', traits='of_logits',
    )  # fmt: skip
    token_emb: nn.Module | Callable[..., Any] | None = flag(
        None, 'Your own token embedding.', family='embedding', example=nn.Identity(),
    )  # fmt: skip
    mixture_of_softmax: bool = flag(
        False, 'The output is a mixture of softmaxes, as log probabilities.', paper=MIXTURE,
        formula='p = Σ_m π_m softmax(z_m), π = softmax(W x)', family='output', traits='of_logits',
        excludes={'num_output_heads': 'the mixture is of one head'},
    )  # fmt: skip
    mixture_of_softmax_k: int = flag(
        4, 'Number of softmaxes in the mixture.', paper=MIXTURE, parent='mixture_of_softmax', low=1
    )
    sigsoftmax_logits: bool = flag(
        False, 'Add the logarithm of their sigmoid to the logits.', paper='https://arxiv.org/abs/1805.10829',
        formula='p ∝ exp(z) σ(z)', family='output', traits='of_logits',
    )  # fmt: skip
    ff_deep_embed: bool = flag(
        False, "A learned factor per token, layer and channel on the feed-forwards' output.", family='embedding',
        rules=(
            Rule(
                ('ff_deep_embed',), lambda flags, dim: flags.ff_deep_embed and not flags.has_feedforward,
                'the stack has no feed-forward whose output it could multiply',
                {'ff_deep_embed': True, 'stack': {'only_attn': True}}, 'Leave it out, or use a stack with feed-forwards.',
                inert=True,
            ),
        ),
    )  # fmt: skip
    to_logits: Callable[..., Any] | None = flag(
        None, 'Your own head.', family='output', one_of='head', traits='of_logits', example=nn.Identity(),
    )  # fmt: skip
    add_continuous_pred_head: bool = flag(
        False, 'A second head that predicts the next embedding.', traits='of_outputs', family='output',
        refused={
            'context': 'its loss compares neighbours, which may lie in two slices',
            'pipeline': 'it compares with the embeddings, which the first stage has',
        },
    )  # fmt: skip
    input_not_include_cache: bool = flag(
        False, 'With a cache, the input is always new tokens only.', traits='asked_for', family='memories',
    )  # fmt: skip
    embed_scale: float | None = flag(
        None, 'Factor on the token embeddings; None: 1.', paper='https://arxiv.org/abs/1706.03762', since='here',
        family='embedding',
    )  # fmt: skip
    logits_scale: float | None = flag(
        None, 'Factor on the logits, before the soft cap; None: 1.', since='here', family='output', traits='of_logits',
    )  # fmt: skip
    logits_softcap: float | None = flag(
        None, 'Keep the logits between minus this and this, with tanh.', paper='https://arxiv.org/abs/2408.00118', above=0,
        since='here', formula='z ← c · tanh(z / c)', family='output', traits='of_logits',
    )  # fmt: skip
    logits_bias: bool = flag(
        False, 'A bias per logit, with a tied table too.', since='here', family='output', traits='of_logits',
        excludes={'to_logits': 'your own head brings its bias'},
    )  # fmt: skip
    logits_transform: str | None = flag(
        None, "A linear map, the activation of this name and a norm, in front of the map to the logits (BERT's head).",
        paper='https://arxiv.org/abs/1810.04805', since='here', family='output', traits='of_logits', example='gelu',
        excludes={'mixture_of_softmax': 'a mixture has maps of its own in front of the logits'},
        rules=(
            Rule(
                ('logits_transform',), lambda flags, dim: flags.logits_transform not in (None, *ACTIVATIONS),
                f'the known names are {", ".join(ACTIVATIONS)}', {'logits_transform': 'tanh'}, 'Use one of those.',
            ),
        ),
    )  # fmt: skip
    logits_transform_bias: bool = flag(True, 'A bias in that linear map.', parent='logits_transform', since='here')
    tie_embedding_scale: float | None = flag(
        None, 'Factor of the logits from the token embedding; None: 1 (dim ** -0.5 from 2.31.10 on).', parent='tie_embedding',
        since='2.31.10',
        rules=(
            Rule(
                ('tie_embedding_scale', 'logits_scale'),
                lambda flags, dim: None not in (flags.tie_embedding_scale, flags.logits_scale),
                'each is the factor on the logits', {'tie_embedding': True, 'tie_embedding_scale': 0.5, 'logits_scale': 0.5},
            ),
        ),
    )  # fmt: skip

    smear: bool = flag(
        False, 'Each token embedding adds a learned, gated part of the previous one.',
        paper='https://github.com/KellerJordan/modded-nanogpt', since='here', family='embedding',
        refused={
            'context': BEFORE,
            'twice': 'the embedding in the row before is mixed in, and here each token stands in two rows',
        },
    )  # fmt: skip

    bigram_hash_embed: int | None = flag(
        None, 'Rows of a table whose vector for each token and the one before it, found by a hash, is added to the embedding.',
        paper='https://github.com/KellerJordan/modded-nanogpt', since='here', low=2, family='embedding',
        refused={
            'context': BEFORE,
            'twice': 'pairs are made with the token in the row before, and here each token stands in two rows',
        },
        excludes={'token_emb': 'your own embedding may read anything, and pairs are made of token ids'},
    )  # fmt: skip

    value_embed: int | None = flag(
        None, 'Every so many self attentions, the last among them, add to their values a row of a token table of their own, '
        'gated for each key head.', paper='https://github.com/KellerJordan/modded-nanogpt', since='here', low=1,
        family='embedding',
        rules=(
            Rule(
                ('value_embed',), lambda flags, dim: flags.value_embed is not None and not flags.has_self_attention,
                'the stack has no self attention whose values it could add to',
                {'value_embed': 1, 'stack': {'cross_attend': True, 'only_cross': True}},
                'Leave it out, or use a stack with self attention.',
            ),
        ),
    )  # fmt: skip
    value_embed_gate_dim: int = flag(
        12, 'The gates read this many channels, or all of them.', parent='value_embed', since='here', low=1
    )

    randomized_positions: int | None = flag(
        None, 'While training, positions are a sorted random subset of 0 … this - 1, one for the whole batch and drawn anew in '
        'every forward; in evaluation they are counted as usual.', paper='https://arxiv.org/abs/2305.16843', low=1,
        since='here', family='embedding', refused={'context': DRAWS},
        excludes={'memory_tokens_interspersed_every': 'memory tokens between the tokens have no positions of their own'},
        rules=(
            Rule(
                ('randomized_positions', 'max_seq_len'),
                lambda flags, dim: (
                    flags.randomized_positions is not None
                    and flags.use_abs_pos_emb
                    and not flags.scaled_sinu_pos_emb
                    and not flags.disables_abs_pos_emb
                    and 0 < flags.max_seq_len < flags.randomized_positions
                ),
                'the table of absolute positions has {max_seq_len} rows', {'randomized_positions': 1000},
                'Enlarge [max_seq_len], or turn absolute positions off.',
            ),
            Rule(
                ('randomized_positions',),
                lambda flags, dim: (
                    flags.randomized_positions is not None
                    and not (flags.rotary or flags.polar or flags.position_bias)
                    and (not flags.use_abs_pos_emb or not flags.max_seq_len or flags.disables_abs_pos_emb)
                ),
                'there are no positions that could be drawn', {'randomized_positions': 8, 'use_abs_pos_emb': False},
                'Leave it out, or give the model positions.', inert=True,
            ),
        ),
    )  # fmt: skip

    @property
    def logits_factor(self) -> float | None:
        return self.logits_scale if self.tie_embedding_scale is None else self.tie_embedding_scale

    @cached_property
    def num_mem_tokens(self) -> int:
        return self.num_memory_tokens or 0


def of_token_models() -> dict[str, str]:
    """The keywords of ``TransformerWrapper``, and that they are: what an error says where they are given to something else."""
    return dict.fromkeys(WrapperFlags.flag_fields(), 'TransformerWrapper, a model of tokens')
