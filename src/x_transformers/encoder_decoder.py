"""XTransformer: an encoder and a decoder, for sequence-to-sequence tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from x_transformers.autoregressive_wrapper import AutoregressiveWrapper
from x_transformers.flags.base import FlagError, UnknownFlag, unknown_flags
from x_transformers.flags.constructors import DECODER, ENCODER, PAIR, SET_FOR_STACK, side
from x_transformers.flags.fit import PER_TOKEN_RULES, TOLD_NOTHING_RULES, check_added_losses, check_rules
from x_transformers.flags.objectives import XTransformerOptions, options
from x_transformers.flags.rule import Rule, how_many
from x_transformers.flags.signature import ClassSignature
from x_transformers.flags.wrapper import WrapperFlags
from x_transformers.generation.modes import evaluating
from x_transformers.helpers import groupby_prefix_and_trim
from x_transformers.layers.drop import dropout_seq
from x_transformers.layers.stack import Decoder, Encoder
from x_transformers.module import Module
from x_transformers.notices import renamed, told_once
from x_transformers.tensor_types import Bool, Float, Int
from x_transformers.transformer_wrapper import TransformerWrapper

if TYPE_CHECKING:
    from typing import Unpack

    from x_transformers.flags.keywords import PairKeywords

# of one side, as its model and its stack have them
MODEL_NAMES = side('')[0].names()
STACK_NAMES = [name for group in side('')[1:] for name in group.keywords()]


# the part's keywords with which it could never run, and those that nobody asks it for
TOLD_NOTHING = tuple(rule for rule in TOLD_NOTHING_RULES if 'cross_attend' not in rule.flags)
MEMORIES = WrapperFlags.having('asked_for')
UNREAD = (*MEMORIES, *WrapperFlags.having('of_outputs'))
ENCODER_RULES = (
    *TOLD_NOTHING,
    Rule(
        ('average_pool_embed', 'use_cls_token'),
        lambda both, dim: both.average_pool_embed or both.use_cls_token,
        'the decoder attends to an embedding of each token, and there is one for all of them',
        {'average_pool_embed': True},
        'Leave it out.',
        only_changed=True,
    ),
    Rule(
        UNREAD,
        lambda both, dim: how_many(both, UNREAD) > 0,
        'nothing but the embeddings of the encoder is used',
        {'max_mem_len': 4},
        'Leave it out.',
        only_changed=True,
        inert=True,
    ),
)
DECODER_RULES = (
    *TOLD_NOTHING,
    *PER_TOKEN_RULES,
    Rule(
        ('logits_dim', 'num_tokens'),
        lambda both, dim: both.logits_dim not in (None, both.num_tokens),
        'the loss needs a logit for each token',
        {'logits_dim': 3},
        'Leave it out.',
    ),
    Rule(
        MEMORIES,
        lambda both, dim: how_many(both, MEMORIES) > 0,
        'nobody asks the decoder for it',
        {'max_mem_len': 4},
        'Leave it out.',
        only_changed=True,
        inert=True,
    ),
)


class XTransformer(Module):
    """An encoder, and a decoder that attends to its output (https://arxiv.org/abs/1706.03762).

    Args:
        dim: width of both.
        tie_token_emb: the decoder uses the encoder's token embedding.
        ignore_index, pad_value: targets excluded from the loss, and the token that replaces them in the input.
        cross_attn_tokens_dropout: in training, the fraction of the encoder's output that is hidden from the decoder.
        flags: the keywords of ``TransformerWrapper`` and of the stacks, with the prefix ``enc_`` or ``dec_``; ``num_tokens``
            and ``max_seq_len`` of both are required.
    """

    __signature__: Any = ClassSignature(PAIR)

    @told_once
    def __init__(
        self,
        *,
        dim: int,
        tie_token_emb: bool = False,
        ignore_index: int = -100,
        pad_value: int = 0,
        cross_attn_tokens_dropout: float = 0.0,
        **flags: Unpack[PairKeywords],
    ) -> None:
        super().__init__()
        options(XTransformerOptions, 'XTransformer', locals())
        enc, rest = groupby_prefix_and_trim(ENCODER, flags)
        dec, rest = groupby_prefix_and_trim(DECODER, rest)
        check_side_names(enc, dec, rest)
        enc_wrapper, enc_stack = split_side(enc)
        dec_wrapper, dec_stack = split_side(dec)
        if tie_token_emb:
            check_tied(enc_wrapper, dec_wrapper)
        self.cross_attn_tokens_dropout = cross_attn_tokens_dropout
        with renamed(lambda name: ENCODER + name):
            stack = Encoder(dim=dim, **enc_stack)
            self.encoder = TransformerWrapper(**enc_wrapper, return_only_embed=True, attn_layers=stack)
            check_rules(ENCODER_RULES, self.encoder, 'XTransformer')
            check_added_losses(self.encoder, 'XTransformer')
        if tie_token_emb:
            dec_wrapper['token_emb'] = self.encoder.token_emb
        with renamed(lambda name: DECODER + name):
            decoder = TransformerWrapper(**dec_wrapper, attn_layers=Decoder(dim=dim, cross_attend=True, **dec_stack))
            check_rules(DECODER_RULES, decoder, 'XTransformer')
            self.decoder = AutoregressiveWrapper(decoder, ignore_index=ignore_index, pad_value=pad_value)

    def encode(
        self,
        src: Int[Tensor, 'b n'],
        mask: Bool[Tensor, 'b n'] | None = None,
        attn_mask: Bool[Tensor, '... n n'] | None = None,
        src_prepend_embeds: Float[Tensor, 'b p d'] | None = None,
    ) -> tuple[Float[Tensor, 'b m d'], Bool[Tensor, 'b m'] | None]:
        """(the decoder's context, its mask): the embeddings of ``src_prepend_embeds`` and ``src``."""
        if isinstance(src, Tensor) and src.shape[-1] == 0 and src_prepend_embeds is None:
            raise ValueError(f'The source must hold at least one token, got shape {tuple(src.shape)}.')
        keywords = {} if attn_mask is None else {'attn_mask': attn_mask}
        encoded = self.encoder(src, mask=mask, prepend_embeds=src_prepend_embeds, return_embeddings=True, **keywords)
        if mask is not None and encoded.shape[1] > mask.shape[1]:
            in_front = mask.new_ones(mask.shape[0], encoded.shape[1] - mask.shape[1])
            mask = torch.cat((in_front, mask), dim=1)
        return encoded, mask

    @torch.no_grad()
    def generate(
        self,
        seq_in: Int[Tensor, 'b n'],
        seq_out_start: Int[Tensor, 'b t'],
        seq_len: int,
        mask: Bool[Tensor, 'b n'] | None = None,
        attn_mask: Bool[Tensor, '... n n'] | None = None,
        src_prepend_embeds: Float[Tensor, 'b p d'] | None = None,
        **kwargs: Any,
    ) -> Int[Tensor, 'b s']:
        """The continuation of ``seq_out_start`` by ``seq_len`` tokens.

        Args:
            seq_in: the source.
            seq_out_start: the beginning of the target, such as a start token.
            mask: True for the source's tokens, False for its padding.
            attn_mask: which query may attend to which key in the encoder.
            src_prepend_embeds: embeddings before the source.
            kwargs: for ``AutoregressiveWrapper.generate``.
        """
        with evaluating(self.encoder):
            encoded, mask = self.encode(seq_in, mask, attn_mask, src_prepend_embeds)
        generated: Tensor = self.decoder.generate(seq_out_start, seq_len, context=encoded, context_mask=mask, **kwargs)
        return generated

    def forward(
        self,
        src: Int[Tensor, 'b n'],
        tgt: Int[Tensor, 'b t'],
        mask: Bool[Tensor, 'b n'] | None = None,
        attn_mask: Bool[Tensor, '... n n'] | None = None,
        src_prepend_embeds: Float[Tensor, 'b p d'] | None = None,
    ) -> Float[Tensor, '']:
        """The loss of predicting each token of ``tgt`` from those before it and from ``src``."""
        encoded, mask = self.encode(src, mask, attn_mask, src_prepend_embeds)
        if self.training and self.cross_attn_tokens_dropout > 0:
            encoded, mask = dropout_seq(encoded, mask, self.cross_attn_tokens_dropout)
        loss: Tensor = self.decoder(tgt, context=encoded, context_mask=mask)
        return loss


def split_side(flags: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the model's keywords, the stack's)."""
    return {k: v for k, v in flags.items() if k in MODEL_NAMES}, {k: v for k, v in flags.items() if k not in MODEL_NAMES}


def check_side_names(enc: Mapping[str, Any], dec: Mapping[str, Any], rest: Mapping[str, Any]) -> None:
    """Raise one error for all names that are unknown, set here, or missing."""
    where = 'XTransformer'
    wrong = []
    for prefix, keywords in ((ENCODER, enc), (DECODER, dec)):
        for name in sorted(set(SET_FOR_STACK) & set(keywords)):
            way = 'give dim itself, it is that of both' if name == 'dim' else 'leave it out'
            wrong.append(f'{where}: unrecognized kwargs: `{prefix}{name}` is set by the encoder-decoder; {way}.')
        missing = [f'`{prefix}{name}`' for name in ('num_tokens', 'max_seq_len') if name not in keywords]
        if missing:
            wrong.append(f'{where} needs {", ".join(missing)}.')
    known = {*MODEL_NAMES, *STACK_NAMES}
    prefixed = [prefix + name for prefix in (ENCODER, DECODER) for name in sorted(known)]
    unknown = [
        *rest,
        *(
            prefix + name
            for prefix, keywords in ((ENCODER, enc), (DECODER, dec))
            for name in keywords
            if name not in known.union(SET_FOR_STACK)
        ),
    ]
    if unknown:
        options = ['dim', 'tie_token_emb', 'ignore_index', 'pad_value', 'cross_attn_tokens_dropout', *prefixed]
        wrong.extend(unknown_flags(unknown, where=where, known=options).sentences)
    if wrong:
        raise UnknownFlag(*wrong)


def check_tied(enc: Mapping[str, Any], dec: Mapping[str, Any]) -> None:
    """Raise unless one token embedding fits both."""
    for name in ('num_tokens', 'emb_dim', 'l2norm_embed'):
        if enc.get(name) != dec.get(name):
            raise FlagError(
                f'XTransformer: enc_{name} and dec_{name} must be equal with tie_token_emb=True, got {enc.get(name)} and '
                f'{dec.get(name)}. Give both the same.'
            )
    if dec.get('token_emb') is not None:
        raise FlagError(
            "XTransformer: dec_token_emb must be None with tie_token_emb=True, which uses the encoder's token embedding. "
            'Leave it out.'
        )
