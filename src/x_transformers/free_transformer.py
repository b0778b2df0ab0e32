"""The Free Transformer: a decoder conditioned on a latent code at its middle layer, https://arxiv.org/abs/2510.17558."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.embedding.ids import token_ids
from x_transformers.flags.base import FlagError
from x_transformers.flags.calls import BitsForwardOptions, FreeGenerateOptions, LatentsOptions
from x_transformers.flags.constructors import INNER
from x_transformers.flags.fit import check_alone
from x_transformers.flags.later_objectives import BitsOptions
from x_transformers.flags.objectives import FreeTransformerOptions, options
from x_transformers.flags.signature import ClassSignature
from x_transformers.generation.decode import Tokens, decode
from x_transformers.generation.modes import eval_decorator
from x_transformers.generation.prompts import checked_length, prepare_prompts
from x_transformers.generation.sampling import Filter, Sampler, resolve_filter, top_p
from x_transformers.helpers import is_any, values_known
from x_transformers.layers.stack import CrossAttender, Decoder
from x_transformers.losses import token_cross_entropy
from x_transformers.module import Module, empty_parameter
from x_transformers.notices import kept_back, told_once, warn_inert_in_all
from x_transformers.tensor_types import Bool, Float, Int

if TYPE_CHECKING:
    from typing import Unpack

    from x_transformers.flags.keywords import InnerKeywords


class BinaryMapper(Module):
    """Samples a code of ``bits`` bits and lets the gradient through; bit j has weight ``2 ** j``.

    Args:
        bits: the number of bits; codes are one-hot of width ``2 ** bits``.
        kl_loss_threshold: nats of information per code without a loss.
    """

    power_two: Tensor
    codes: Tensor

    def __init__(self, bits: int = 1, kl_loss_threshold: float = math.log(2)) -> None:
        super().__init__()
        options(BitsOptions, 'BinaryMapper', locals())
        self.bits = bits
        self.num_codes = 2**bits
        self.kl_loss_threshold = kl_loss_threshold
        self.register_buffer('power_two', torch.empty(bits, dtype=torch.long), persistent=False)
        self.register_buffer('codes', torch.empty(self.num_codes, bits), persistent=False)
        self.init_own()

    def init_own(self) -> None:
        self.power_two.copy_(2 ** torch.arange(self.bits))
        self.codes.copy_((torch.arange(self.num_codes)[:, None] // 2 ** torch.arange(self.bits)) % 2)

    def entropy(self, logits: Float[Tensor, '... c']) -> Float[Tensor, '...']:
        """Of the independent bits together, in nats."""
        p = logits.sigmoid()
        return -(p * F.logsigmoid(logits) + (1 - p) * F.logsigmoid(-logits)).sum(dim=-1)

    def code_probabilities(self, logits: Float[Tensor, '... c']) -> Float[Tensor, '... k']:
        """The probability of every code: the product over its bits."""
        return (F.logsigmoid(logits) @ self.codes.T + F.logsigmoid(-logits) @ (1 - self.codes).T).exp()

    def forward(
        self,
        logits: Float[Tensor, '... c'],
        temperature: float = 1.0,
        straight_through: bool | None = None,
        calc_aux_loss: bool | None = None,
    ) -> tuple[Float[Tensor, '... k'], Float[Tensor, '']]:
        """One-hot codes, and what they cost above the threshold; both flags follow the training mode unless given."""
        keywords = {'temperature': temperature, 'straight_through': straight_through, 'calc_aux_loss': calc_aux_loss}
        options(BitsForwardOptions, 'BinaryMapper', keywords)
        if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.shape[-1:] != (self.bits,):
            kind = f'{logits.dtype} of shape {tuple(logits.shape)}' if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f'logits must be floating, with {self.bits} channels, one per bit, got {kind}.')
        straight_through = self.training if straight_through is None else straight_through
        calc_aux_loss = self.training if calc_aux_loss is None else calc_aux_loss
        chosen = torch.rand_like(logits) <= (logits / temperature).sigmoid()
        index = (chosen * self.power_two).sum(dim=-1)
        one_hot = F.one_hot(index, self.num_codes).to(logits.dtype)

        aux_loss = logits.new_zeros(())
        if calc_aux_loss:
            divergence = self.bits * math.log(2) - self.entropy(logits)
            aux_loss = (divergence - self.kl_loss_threshold).relu().mean()
        if straight_through:
            soft = self.code_probabilities(logits)
            one_hot = one_hot + soft - soft.detach()
        return one_hot, aux_loss


def threshold_of(keywords: Mapping[str, Any] | None, usual: float) -> float:
    """What a code may carry for free, by the keywords for the codes or else by the model's own."""
    if unknown := sorted(set(keywords or {}) - {'kl_loss_threshold'}):
        raise FlagError(
            f'binary_mapper_kwargs must name kl_loss_threshold alone, got {", ".join(unknown)}. Give the bits of a code as '
            'latent_bits.'
        )
    return float((keywords or {}).get('kl_loss_threshold', usual))


class FreeTransformer(Module):
    """A decoder whose second half is conditioned on a latent code, which an encoder infers in training.

    Args:
        num_tokens, dim: vocabulary and width.
        dec_head_depth, dec_tail_depth: the number of layers before and after the latent enters; the head may be 0.
        max_seq_len: stored only for callers that read it.
        enc_depth: the number of cross-attention layers that infer the latent.
        dim_latent: accepted only for callers that pass it; the code's width is ``2 ** latent_bits``.
        attn_dim_head, heads: of all stacks.
        kwargs: further keywords of all stacks; ``enc_kwargs`` and ``dec_kwargs`` are those of one kind.
        latent_bits, per_token_latents, kl_loss_threshold, binary_mapper_kwargs: of the codes.
        kl_loss_weight, latent_dropout_prob: of training.
        pad_id: targets to ignore; such inputs are embedded as token 0.
    """

    __signature__: Any = ClassSignature(INNER)

    @told_once
    def __init__(
        self,
        *,
        num_tokens: int,
        dim: int,
        dec_head_depth: int,
        dec_tail_depth: int,
        max_seq_len: int,
        enc_depth: int = 1,
        dim_latent: int | None = None,
        attn_dim_head: int = 64,
        heads: int = 8,
        latent_bits: int = 16,
        per_token_latents: bool = True,
        kl_loss_threshold: float = math.log(2),
        binary_mapper_kwargs: dict[str, Any] | None = None,
        enc_kwargs: dict[str, Any] | None = None,
        dec_kwargs: dict[str, Any] | None = None,
        kl_loss_weight: float = 1.0,
        latent_dropout_prob: float = 0.0,
        pad_id: int = -1,
        **kwargs: Unpack[InnerKeywords],
    ) -> None:
        super().__init__()
        options(FreeTransformerOptions, 'FreeTransformer', locals())
        shared: dict[str, Any] = {'dim': dim, 'attn_dim_head': attn_dim_head, 'heads': heads}
        shared |= {'rotary_pos_emb': True, 'use_rmsnorm': True} | kwargs
        self.dim, self.max_seq_len = dim, max_seq_len
        self.query_token_for_latents = empty_parameter(dim)
        self.token_emb = nn.Embedding(num_tokens, dim)
        self.token_unembed = nn.Linear(dim, num_tokens, bias=False)
        with kept_back() as inert_in_encoder:
            self.encoder = CrossAttender(depth=enc_depth, **(shared | (enc_kwargs or {})))
        check_alone(self.encoder, 'FreeTransformer', context=True)
        self.to_latent_bit_logits = nn.Linear(dim, latent_bits, bias=False)
        self.from_latent_to_condition = nn.Linear(2**latent_bits, dim, bias=False)
        self.latent_dropout = nn.Dropout(latent_dropout_prob)
        self.binary_mapper = BinaryMapper(latent_bits, threshold_of(binary_mapper_kwargs, kl_loss_threshold))
        decoder = shared | (dec_kwargs or {})
        with kept_back() as inert_in_decoder:
            self.decoder_head = (
                Decoder(depth=dec_head_depth, pre_norm_has_final_norm=False, **decoder) if dec_head_depth > 0 else None
            )
            self.decoder_tail = Decoder(depth=dec_tail_depth, **decoder)
        check_alone(self.decoder_tail, 'FreeTransformer')
        parts = [(inert_in_encoder, enc_kwargs or {}), (inert_in_decoder, dec_kwargs or {})]
        warn_inert_in_all('FreeTransformer', parts)
        self.per_token_latents = per_token_latents
        self.kl_loss_weight = kl_loss_weight
        self.pad_id = pad_id
        self.init_own()

    def init_own(self) -> None:
        nn.init.normal_(self.query_token_for_latents, std=0.01)

    @property
    def device(self) -> torch.device:
        return self.query_token_for_latents.device

    def embed(self, seq: Int[Tensor, 'b n']) -> Float[Tensor, 'b n d']:
        embedded: Tensor = self.token_emb(seq.masked_fill(seq == self.pad_id, 0))
        return embedded

    def head(self, seq: Int[Tensor, 'b n']) -> Float[Tensor, 'b n d']:
        embedded = self.embed(seq)
        return embedded if self.decoder_head is None else self.decoder_head(embedded)

    def encode_to_latents(
        self,
        decoder_head_embeds: Float[Tensor, 'b n d'],
        mask: Bool[Tensor, 'b n'] | None = None,
        return_kl_loss: bool = False,
        per_token_latents: bool | None = None,
    ) -> Any:
        """One-hot codes ``b n k``, or ``b 1 k`` for the whole sequence; optionally what they cost."""
        options(LatentsOptions, 'encode_to_latents', {'return_kl_loss': return_kl_loss, 'per_token_latents': per_token_latents})
        per_token = self.per_token_latents if per_token_latents is None else per_token_latents
        rows, length, _ = decoder_head_embeds.shape
        queries = self.query_token_for_latents.expand(rows, length if per_token else 1, -1)
        pos = torch.arange(length, device=self.device)
        rotated: dict[str, Any] = {'pos': pos, 'context_pos': pos} if per_token else {}
        encoded = self.encoder(queries, context=decoder_head_embeds, context_mask=mask, **rotated)
        one_hot, kl_loss = self.binary_mapper(self.to_latent_bit_logits(encoded), calc_aux_loss=return_kl_loss)
        return (one_hot, kl_loss) if return_kl_loss else one_hot

    def forward(
        self, seq: Int[Tensor, 'b n'], seq_for_latents: Int[Tensor, 'b m'] | None = None, return_all_losses: bool = False
    ) -> Any:
        """Next-token loss given codes found in the sequence itself, or one code found in ``seq_for_latents``."""
        seq = token_ids(seq, 'seq')
        check_token_ids('seq', seq, at_least=2)
        if seq_for_latents is not None:
            seq_for_latents = token_ids(seq_for_latents, 'seq_for_latents')
            check_token_ids('seq_for_latents', seq_for_latents, at_least=1, rows=len(seq))
        inputs, labels = seq[:, :-1], seq[:, 1:]
        hidden = self.head(inputs)
        if seq_for_latents is None:
            latents, kl_loss = self.encode_to_latents(hidden, return_kl_loss=True)
        else:
            latents, kl_loss = self.encode_to_latents(self.head(seq_for_latents), per_token_latents=False, return_kl_loss=True)
        condition = self.from_latent_to_condition(self.latent_dropout(latents))
        logits = self.token_unembed(self.decoder_tail(hidden, self_attn_kv_residuals=condition))
        ar_loss = token_cross_entropy(logits, labels, ignore_index=self.pad_id)
        total = ar_loss + self.kl_loss_weight * kl_loss
        return (total, (ar_loss, kl_loss)) if return_all_losses else total

    def as_condition(self, latents: Any, rows: int, total: int) -> Float[Tensor, 'b m d'] | None:
        """What the tail is told: codes by number, one-hot or soft, one per row (m = 1) or one per position."""
        if latents is None:
            return None
        codes = torch.as_tensor(latents, device=self.device)
        num_codes, to_condition = self.binary_mapper.num_codes, self.from_latent_to_condition
        if codes.is_floating_point():
            if codes.ndim == 0 or codes.shape[-1] != num_codes:
                raise ValueError(
                    f'latents must be whole numbers or have {num_codes} channels, one per code; got shape {tuple(codes.shape)}'
                )
            condition: Tensor = to_condition(codes.to(to_condition.weight.dtype))
        else:
            if values_known(codes) and bool(((codes < 0) | (codes >= num_codes)).any()):
                raise ValueError(f'latents must be codes from 0 to {num_codes - 1}, got {codes.tolist()}')
            # the map of a one-hot code is a column of its weight
            condition = F.embedding(codes.long(), to_condition.weight.t())
        if condition.ndim < 3:
            condition = condition.reshape(-1, 1, condition.shape[-1])
        if condition.ndim != 3 or not is_any(condition.shape[0], 1, rows) or 1 < condition.shape[1] < total - 1:
            raise ValueError(
                f'latents must be one, one for each of the {rows} rows, or one for each of the {total - 1} positions that '
                f'are read, got shape {tuple(codes.shape)}. Pass one of these.'
            )
        return condition.expand(rows, -1, -1)

    @torch.no_grad()
    @eval_decorator
    def generate(
        self,
        prompts: Int[Tensor, '... n'],
        seq_len: int,
        latents: Any = None,
        filter_logits_fn: str | Filter = top_p,
        logit_filter_kwargs: dict[str, Any] | None = None,
        use_kv_cache: bool = True,
        include_prompt: bool = True,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, '... m']:
        """Prompt and continuation, ``seq_len`` tokens in all; without the prompt if ``include_prompt`` is False.

        Args:
            latents: code numbers or soft codes (k = ``2 ** bits`` channels): one for all, one per row (``b`` or ``b k``),
                or one per position (``b seq_len`` or ``b seq_len k``); without them the tail has no condition.
            use_kv_cache: feed only new tokens, to head and tail alike, if both can be cached.
            generator: makes sampling reproducible.
        """
        options(FreeGenerateOptions, 'generate', locals())
        prompt = prepare_prompts(prompts)
        if prompt.start is not None:
            raise ValueError('prompts must have one length here; run prompts of different lengths one by one')
        rows, length = prompt.tokens.shape
        if checked_length(seq_len) < length:
            raise ValueError(f'seq_len counts the prompt too, so it must be at least {length} here; got {seq_len}')
        filter_kwargs = {'thres': 0.9} if logit_filter_kwargs is None else logit_filter_kwargs
        reader = FreeReader(self, self.as_condition(latents, rows, seq_len), use_kv_cache)
        pick = Sampler(temperature, resolve_filter(filter_logits_fn), filter_kwargs, generator)
        tokens = Tokens(prompt.tokens, room=seq_len - length)
        for _ in decode(reader, tokens, seq_len - length, pick):
            pass
        return prompt.unpack(tokens.part(0 if include_prompt else length))


def check_token_ids(name: str, seq: Int[Tensor, 'b n'], at_least: int, rows: int | None = None) -> None:
    if seq.ndim != 2 or seq.shape[1] < at_least or (rows is not None and len(seq) != rows):
        wanted = 'batch' if rows is None else rows
        raise ValueError(f'{name} must be tokens ({wanted}, length) with length at least {at_least}, got {tuple(seq.shape)}')


class FreeReader:
    """Reads head and tail with a cache each, telling the tail the condition; for the decode loop."""

    def __init__(self, model: FreeTransformer, condition: Float[Tensor, 'b m d'] | None, caching: bool) -> None:
        stacks = [stack for stack in (model.decoder_head, model.decoder_tail) if stack is not None]
        # as everywhere, what cannot be remembered is read anew
        caching = caching and all(stack.can_cache_kv for stack in stacks)
        self.model, self.condition, self.caching = model, condition, caching
        self.head_cache: Any = None
        self.tail_cache: Any = None
        self.seen = 0

    def condition_of_new(self, length: int) -> Float[Tensor, 'b m d'] | None:
        """The part of the condition that belongs to the tokens not yet read."""
        if self.condition is None or self.condition.shape[1] == 1:
            return self.condition
        return self.condition[:, self.seen : length]

    def read(self, tokens: Tokens) -> Float[Tensor, 'b 1 v']:
        model = self.model
        hidden = model.embed(tokens.part(self.seen))
        keywords: dict[str, Any] = {'return_hiddens': True, 'input_not_include_cache': True}
        head_cache = None
        if model.decoder_head is not None:
            hidden, head_cache = model.decoder_head(hidden, cache=self.head_cache, **keywords)
        hidden, tail_cache = model.decoder_tail(
            hidden, cache=self.tail_cache, self_attn_kv_residuals=self.condition_of_new(tokens.length), **keywords
        )
        if self.caching:
            self.head_cache, self.tail_cache, self.seen = head_cache, tail_cache, tokens.length
        logits: Tensor = model.token_unembed(hidden[:, -1:])
        return logits
