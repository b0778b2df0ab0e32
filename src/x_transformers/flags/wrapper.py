"""The flags of the models around a stack: tokens and images.

Derived, WrapperFlags: ``num_mem_tokens`` (memory tokens as a number).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from x_transformers.flags.base import REQUIRED, Flags, flag

XL = 'https://arxiv.org/abs/1901.02860'
MEMORY = 'https://arxiv.org/abs/2006.11527'
MIXTURE = 'https://arxiv.org/abs/1711.03953'


LOOPED = 'https://arxiv.org/abs/2510.25741'


@dataclass(frozen=True, kw_only=True, repr=False)
class WrapperFlags(Flags):
    """Every keyword of ``TransformerWrapper``."""

    num_tokens: int = flag(REQUIRED, 'Size of the vocabulary.', low=1, family='embedding')
    max_seq_len: int = flag(
        REQUIRED, 'Longest sequence, for absolute positions; 0: no absolute positions.', low=0, family='embedding'
    )
    attn_layers: nn.Module = flag(REQUIRED, 'The stack: Encoder, Decoder, PrefixDecoder or CrossAttender.', family='embedding')
    embed_num_tokens: Mapping[str, int] = flag(
        {}, 'More embeddings that are summed in: name and size of each vocabulary.', family='embedding'
    )
    emb_dim: int | None = flag(None, "Width of the embeddings; None: the stack's width.", low=1, family='embedding')
    max_mem_len: int = flag(
        0, 'Number of hidden states kept per layer as memories for the next segment.', paper=XL, low=0, family='memories'
    )
    shift_mem_down: int = flag(
        0, 'Layers look at the memories of the layer this far above.', paper='https://arxiv.org/abs/2012.15688', low=0,
        family='memories',
    )  # fmt: skip
    emb_dropout: float = flag(0.0, 'Dropout on the embeddings.', low=0.0, high=1.0, family='embedding')
    post_emb_norm: bool = flag(False, 'Layer norm of the embeddings.', family='embedding')
    num_memory_tokens: int | None = flag(
        None, 'Learned tokens in front of the sequence.', paper=MEMORY, low=0, traits='no_cache', family='memories'
    )
    memory_tokens_interspersed_every: int | None = flag(
        None, 'Put the memory tokens in front of every window of this many tokens.', parent='num_memory_tokens', low=1
    )
    tie_embedding: bool = flag(False, 'Logits from the transposed token embedding.', paper='https://arxiv.org/abs/1608.05859',
                               often=True, family='embedding')  # fmt: skip
    logits_dim: int | None = flag(None, 'Number of logits; None: num_tokens.', low=1, family='output')
    return_only_embed: bool = flag(False, 'No logits: the model returns its embeddings.', family='output')
    num_output_heads: int = flag(1, 'Number of heads; with several the logits are a tuple.', low=1, family='output')
    multi_token_heads: int = flag(
        1, 'Heads for so many next tokens. The first is the usual one; each other is a residual block in front of the same map '
        'to logits. `return_multi_token_logits=True` returns all.', paper='https://arxiv.org/abs/2404.19737', low=1,
        since='here', family='output'
    )  # fmt: skip
    use_abs_pos_emb: bool = flag(True, 'Absolute positions, unless the stack turns them off.', family='embedding')
    scaled_sinu_pos_emb: bool = flag(
        False,
        'Sinusoidal positions with a learned scale instead of a table.',
        paper='https://arxiv.org/abs/1706.03762',
        family='embedding',
    )
    l2norm_embed: bool = flag(False, 'Unit-length token and position embeddings.', family='embedding')
    recycling: bool = flag(
        False,
        'Feed the output back into the input several times.',
        paper='https://www.nature.com/articles/s41586-021-03819-2',
        traits='no_cache',
        family='memories',
    )
    train_max_recycle_steps: int = flag(
        4, 'In training the number of rounds is drawn from 1 to this.', parent='recycling', low=1
    )
    looped: bool = flag(
        False,
        'Run the stack several times on its own output, until a gate says that it is enough.',
        paper=LOOPED,
        since='2.31.10',
        family='memories',
    )
    max_looped_steps: int = flag(4, 'So often at most.', paper=LOOPED, parent='looped', low=1, since='2.31.10')
    looped_positions: bool = flag(
        False,
        'A token that is read alone has its rotary or polar position in every loop, as in training; without it in the first '
        'loop only, as in 2.31.10.',
        paper=LOOPED,
        parent='looped',
        since='here',
    )
    emb_frac_gradient: float = flag(
        1.0,
        'Fraction of the gradient that reaches the embeddings.',
        paper='https://arxiv.org/abs/2105.13290',
        low=0.0,
        high=1.0,
        family='embedding',
    )
    attn_z_loss_weight: float = flag(
        1e-4,
        'Weight of the z-loss of the attention scores, when the call asks for it.',
        paper='https://arxiv.org/abs/2202.08906',
        family='output',
    )
    average_pool_embed: bool = flag(
        False, 'Logits of the mean of all tokens.', one_of='pool', traits='no_cache', family='output'
    )
    use_cls_token: bool = flag(
        False, 'Logits of learned tokens in front of the sequence.', one_of='pool', traits='no_cache', family='output'
    )
    num_cls_tokens: int = flag(1, 'Number of these tokens.', parent='use_cls_token', low=1)
    attn_pool: bool = flag(False, 'Learned queries attend over the output.', one_of='pool', family='output')
    num_pooled_tokens: int = flag(1, 'Number of these queries.', parent='attn_pool', low=1)
    attn_pool_depth: int = flag(1, 'Depth of the pooling; more than 1: a stack of cross attention.', parent='attn_pool', low=1)
    dim_pooled_tokens: int | None = flag(
        None, "Width of the pooled tokens; None: the stack's width.", parent='attn_pool', low=1
    )
    squeeze_out_last_dim: bool = flag(False, 'Drop the last axis of the logits when its size is 1.', family='output')
    token_emb: nn.Module | Callable[..., Any] | None = flag(None, 'Your own token embedding.', family='embedding')
    mixture_of_softmax: bool = flag(
        False,
        'The output is a mixture of softmaxes, as log probabilities.',
        paper=MIXTURE,
        formula='p = Σ_m π_m softmax(z_m), π = softmax(W x)',
        family='output',
    )
    mixture_of_softmax_k: int = flag(
        4, 'Number of softmaxes in the mixture.', paper=MIXTURE, parent='mixture_of_softmax', low=1
    )
    sigsoftmax_logits: bool = flag(
        False,
        'Add the logarithm of their sigmoid to the logits.',
        paper='https://arxiv.org/abs/1805.10829',
        formula='p ∝ exp(z) σ(z)',
        family='output',
    )
    ff_deep_embed: bool = flag(
        False, "A learned factor per token, layer and channel on the feed-forwards' output.", family='embedding'
    )
    to_logits: Callable[..., Any] | None = flag(None, 'Your own head.', family='output')
    add_continuous_pred_head: bool = flag(False, 'A second head that predicts the next embedding.', family='output')
    input_not_include_cache: bool = flag(False, 'With a cache, the input is always new tokens only.', family='memories')
    embed_scale: float | None = flag(
        None,
        'Factor on the token embeddings; None: 1.',
        paper='https://arxiv.org/abs/1706.03762',
        since='here',
        family='embedding',
    )
    logits_scale: float | None = flag(
        None, 'Factor on the logits, before the soft cap; None: 1.', since='here', family='output'
    )
    logits_softcap: float | None = flag(
        None, 'Keep the logits between minus this and this, with tanh.', paper='https://arxiv.org/abs/2408.00118', above=0,
        since='here',
        formula='z ← c · tanh(z / c)', family='output'
    )  # fmt: skip
    logits_bias: bool = flag(False, 'A bias per logit, with a tied table too.', since='here', family='output')
    logits_transform: str | None = flag(
        None, "A linear map, the activation of this name and a norm, in front of the map to the logits (BERT's head).",
        paper='https://arxiv.org/abs/1810.04805', since='here', family='output'
    )  # fmt: skip
    logits_transform_bias: bool = flag(True, 'A bias in that linear map.', parent='logits_transform', since='here')
    tie_embedding_scale: float | None = flag(
        None, 'Factor of the logits from the token embedding; None: 1 (dim ** -0.5 from 2.31.10 on).', parent='tie_embedding',
        since='2.31.10',
    )  # fmt: skip

    smear: bool = flag(
        False, 'Each token embedding gets a learned, gated part of that before it.',
        paper='https://github.com/KellerJordan/modded-nanogpt', since='here', family='embedding'
    )  # fmt: skip

    bigram_hash_embed: int | None = flag(
        None, 'Rows of a table whose vector for each token and the one before it, found by a hash, is added to the embedding.',
        paper='https://github.com/KellerJordan/modded-nanogpt', since='here', low=2, family='embedding'
    )  # fmt: skip

    value_embed: int | None = flag(
        None, 'Every so many self attentions, the last among them, add to their values a row of a token table of their own, '
        'gated for each key head.',
        paper='https://github.com/KellerJordan/modded-nanogpt', since='here', low=1, family='embedding'
    )  # fmt: skip
    value_embed_gate_dim: int = flag(
        12, 'So many channels decide about the gates, or all of them.', parent='value_embed', since='here', low=1
    )

    randomized_positions: int | None = flag(
        None, 'While training, positions are a sorted random subset of 0 … this - 1, one for the whole batch and drawn anew in '
        'every forward; in evaluation they are counted as usual.', paper='https://arxiv.org/abs/2305.16843', low=1,
        since='here', family='embedding'
    )  # fmt: skip

    @property
    def logits_factor(self) -> float | None:
        return self.logits_scale if self.tie_embedding_scale is None else self.tie_embedding_scale

    @cached_property
    def num_mem_tokens(self) -> int:
        return self.num_memory_tokens or 0


def sides(size: int | tuple[int, ...]) -> tuple[int, int]:
    """(height, width) of what is given by one side or by both."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


@dataclass(frozen=True, kw_only=True, repr=False)
class VisionFlags(Flags):
    """Every keyword of ``ViTransformerWrapper``."""

    image_size: int | tuple[int, ...] = flag(REQUIRED, 'Side of the image; or its height and width.', low=1)
    patch_size: int | tuple[int, ...] = flag(REQUIRED, 'Side of a patch; or its height and width.', low=1)
    attn_layers: nn.Module = flag(REQUIRED, 'The stack, usually an Encoder.')
    channels: int = flag(3, 'Channels of the image.', low=1)
    num_classes: int | None = flag(None, 'Number of logits; None: the pooled embedding is returned.', low=1)
    post_emb_norm: bool = flag(False, 'Layer norm of the embedded patches.')
    num_register_tokens: int = flag(
        0, 'Learned tokens behind the patches that are dropped afterwards.', paper='https://arxiv.org/abs/2309.16588', low=0
    )
    emb_dropout: float = flag(0.0, 'Dropout on the embedded patches.', low=0.0, high=1.0)
    patch_norm: bool = flag(True, 'Layer norms around the map that embeds patches.', since='here')
    patch_bias: bool = flag(True, 'A bias in the map that embeds patches.', since='here')
    use_cls_token: bool = flag(
        False, 'Logits of a learned token in front of the patches, which has a position too.',
        paper='https://arxiv.org/abs/2010.11929', since='here',
    )  # fmt: skip
    cls_and_mean: bool = flag(
        False, 'Logits of that token beside the mean of the patches.', paper='https://arxiv.org/abs/2304.07193',
        parent='use_cls_token', since='here',
    )  # fmt: skip
    keep_register_tokens: bool = flag(
        False, 'The embeddings hold the register tokens too, in front of the patches.', parent='num_register_tokens',
        since='here',
    )  # fmt: skip

    @cached_property
    def image_sides(self) -> tuple[int, int]:
        return sides(self.image_size)

    @cached_property
    def patch_sides(self) -> tuple[int, int]:
        return sides(self.patch_size)

    @cached_property
    def grid(self) -> tuple[int, ...]:
        """Patches in a column, and in a row."""
        return tuple(image // patch for image, patch in zip(self.image_sides, self.patch_sides, strict=True))

    @cached_property
    def num_patches(self) -> int:
        return math.prod(self.grid)


def of_token_models() -> dict[str, str]:
    """The keywords of ``TransformerWrapper``, and that they are: what an error says where they are given to something else."""
    return dict.fromkeys(WrapperFlags.flag_fields(), 'TransformerWrapper, a model of tokens')
