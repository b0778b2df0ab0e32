"""The belief state transformer: predict the next token after a prefix and the previous one before a suffix, from both
(https://arxiv.org/abs/2410.23506)."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from x_transformers.generation.decode import Tokens, decode
from x_transformers.generation.modes import eval_decorator
from x_transformers.generation.prompts import flattened, restored
from x_transformers.generation.sampling import Sampler, min_p, resolve_filter
from x_transformers.module import Module, empty_parameter
from x_transformers.tensor_types import Bool, Float, Int

# pairs of a prefix and a suffix whose logits exist at one time
PAIRS_AT_ONCE = 4096

PairWeights = Callable[[Int[Tensor, 'p 2']], Tensor]


class DistanceCondition(Module):
    """A gate over the pair of embeddings that tells how far apart prefix and suffix are."""

    def __init__(self, dim: int, longest: int) -> None:
        super().__init__()
        self.longest = longest
        # the slots 1 and 3 are those of the maps in existing checkpoints
        self.add_module('1', nn.Linear(1, dim))
        self.add_module('3', nn.Linear(dim, 2 * dim))

    def forward(self, distance: Int[Tensor, 'p']) -> Float[Tensor, 'p e']:
        first, second = self.children()
        share = (distance / self.longest)[:, None].to(first.weight.dtype)  # type: ignore[operator]
        gate: Tensor = second(F.leaky_relu(first(share)))
        return gate.sigmoid()


class BeliefStateWrapper(Module):
    """Two decoders, one reading forwards and one backwards, and a head over every pair of prefix and later suffix.

    Args:
        forward_decoder, backward_decoder: causal ``TransformerWrapper``s over the same tokens; without the second the first
            reads in both directions.
        train_frac_forward_backward_pairs: share of the pairs, drawn anew each time, that are trained on.
        text_head: a module from ``2 d`` to ``2 v`` in place of the default one.
        backward_ar_loss_weight: weight of predicting the previous token.
        pred_distance, pred_distance_loss_weight, max_pred_distance: also predict how far apart prefix and suffix are.
        cond_on_distance, cond_on_distance_prob: tell the head that distance, in this share of the training steps.
    """

    loss_weights: Tensor

    def __init__(
        self,
        forward_decoder: nn.Module,
        backward_decoder: nn.Module | None = None,
        train_frac_forward_backward_pairs: float = 1.0,
        text_head: nn.Module | None = None,
        backward_ar_loss_weight: float = 1.0,
        pred_distance: bool = False,
        pred_distance_loss_weight: float = 1.0,
        cond_on_distance: bool = False,
        cond_on_distance_prob: float = 0.5,
        max_pred_distance: int | None = None,
    ) -> None:
        super().__init__()
        self.forward_decoder: Any = forward_decoder
        self.backward_decoder: Any = forward_decoder if backward_decoder is None else backward_decoder
        check_decoders(self.forward_decoder, self.backward_decoder, cond_on_distance_prob, train_frac_forward_backward_pairs)
        dim = self.forward_decoder.attn_layers.dim
        self.num_tokens, self.max_seq_len = self.forward_decoder.num_tokens, self.forward_decoder.max_seq_len
        self.suffix_token = empty_parameter(self.forward_decoder.emb_dim)
        self.text_head = text_head or nn.Sequential(
            nn.Linear(2 * dim, dim), nn.LeakyReLU(), nn.Linear(dim, 2 * self.num_tokens)
        )
        self.max_pred_distance = max_pred_distance or self.max_seq_len
        self.pred_distance, self.pred_distance_loss_weight = pred_distance, pred_distance_loss_weight
        if pred_distance:
            self.to_distance_logits = nn.Sequential(
                nn.Linear(2 * dim, dim), nn.LeakyReLU(), nn.Linear(dim, self.max_pred_distance)
            )
        self.cond_on_distance, self.cond_on_distance_prob = cond_on_distance, cond_on_distance_prob
        if cond_on_distance:
            self.to_distance_cond = DistanceCondition(dim, self.max_pred_distance)
        self.train_frac_fb_pairs = train_frac_forward_backward_pairs
        self.backward_ar_loss_weight = backward_ar_loss_weight
        self.register_buffer('loss_weights', torch.empty(2))
        self.init_own()

    def init_own(self) -> None:
        nn.init.normal_(self.suffix_token, std=0.02)
        self.loss_weights.copy_(torch.tensor([1.0, self.backward_ar_loss_weight]))

    # ------------------------------------------------------------ training

    def suffix(self, rows: int) -> Float[Tensor, 'b 1 d']:
        return self.suffix_token.expand(rows, 1, -1)

    def backward_embeds(self, seq: Int[Tensor, 'b n'], lens: Int[Tensor, 'b']) -> Float[Tensor, 'b m d']:
        """Entry j is the state after the suffix that starts at j; entry ``lens`` the one of the empty suffix."""
        rows, length = seq.shape
        reading = reversed_rows(length, lens)
        embeds = self.backward_decoder(seq.gather(1, reading), prepend_embeds=self.suffix(rows), return_embeddings=True)
        back = reversed_rows(length + 1, lens + 1)
        out: Tensor = embeds.gather(1, back[..., None].expand_as(embeds))
        return out

    def pairs(self, length: int) -> Int[Tensor, 'p 2']:
        """(end of the prefix i, start of the suffix j) with at least one token between, all or a share of them."""
        device = self.suffix_token.device
        i, j = torch.meshgrid(torch.arange(length, device=device), torch.arange(length + 1, device=device), indexing='ij')
        pairs = torch.stack((i, j), dim=-1)[j - i >= 2]
        if self.train_frac_fb_pairs >= 1.0:
            return pairs
        kept = max(int(len(pairs) * self.train_frac_fb_pairs), 1)
        return pairs[torch.randperm(len(pairs), device=device)[:kept]]

    def pair_losses(
        self,
        ahead: Float[Tensor, 'b n d'],
        behind: Float[Tensor, 'b m d'],
        seq: Int[Tensor, 'b n'],
        pairs: Int[Tensor, 'p 2'],
        told: bool,
    ) -> tuple[Float[Tensor, 'b p 2'], Float[Tensor, 'b p'] | None]:
        """Cross entropy of the next and of the previous token, and of the distance if it is to be predicted."""
        i, j = pairs.unbind(dim=-1)
        both = torch.cat((ahead[:, i], behind[:, j]), dim=-1)
        given = both * self.to_distance_cond(j - i) if told else both
        logits = self.text_head(given).unflatten(-1, (2, self.num_tokens))
        labels = torch.stack((seq[:, i + 1], seq[:, j - 1]), dim=-1)
        text = F.cross_entropy(logits.flatten(0, 2), labels.flatten(), reduction='none').view(labels.shape)
        if not self.pred_distance or told:
            return text, None
        distance = (j - i).clamp(max=self.max_pred_distance - 1).expand(len(seq), -1)
        off = F.cross_entropy(self.to_distance_logits(both).flatten(0, 1), distance.flatten(), reduction='none')
        return text, off.view(distance.shape)

    def forward(
        self,
        seq: Int[Tensor, 'b n'],
        lens: Int[Tensor, 'b'] | None = None,
        loss_weight_by_fb_indices: PairWeights | None = None,
    ) -> Float[Tensor, '']:
        """The loss over pairs of prefix and suffix within each row's ``lens`` tokens.

        ``loss_weight_by_fb_indices`` maps pairs ``p 2`` to weights ``p`` or ``p 2`` (next, previous token).
        """
        check_sequence(seq, lens)
        rows, length = seq.shape
        lengths = torch.full((rows,), length, device=seq.device) if lens is None else lens
        ahead = self.forward_decoder(seq, return_embeddings=True)
        behind = self.backward_embeds(seq, lengths)
        pairs = self.pairs(length)
        told = self.cond_on_distance and self.training and random.random() < self.cond_on_distance_prob

        results = [
            checkpoint(self.pair_losses, ahead, behind, seq, part, told, use_reentrant=False)
            for part in pairs.split(PAIRS_AT_ONCE)
        ]
        text = torch.cat([result[0] for result in results], dim=1)
        counts = pairs[:, 1] <= lengths[:, None]
        weights = self.loss_weights.to(text.dtype).expand(len(pairs), 2)
        if loss_weight_by_fb_indices is not None:
            given = loss_weight_by_fb_indices(pairs)
            weights = weights * (given if given.ndim == 2 else given[:, None])
        loss = mean_where(text * weights, counts[..., None].expand_as(text))
        if results and results[0][1] is not None:
            off = torch.cat([result[1] for result in results], dim=1)
            loss = loss + self.pred_distance_loss_weight * mean_where(off, counts)
        return loss

    # ------------------------------------------------------------ generation

    @torch.no_grad()
    @eval_decorator
    def generate_with_suffix_cond(
        self,
        prompts: Int[Tensor, '... n'],
        seq_len: int,
        temperature: float = 1.25,
        cache_kv: bool = False,
        suffix: Int[Tensor, '... m'] | None = None,
        filter_logits_fn: Any = min_p,
        filter_kwargs: dict[str, Any] | None = None,
        decode_backwards: bool = False,
        include_prompt: bool = False,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Int[Tensor, '... k']:
        """New tokens after a prompt and before a suffix; with ``decode_backwards`` those before the prompt, last one first."""
        if suffix is not None and decode_backwards:
            raise ValueError('suffix is what forward decoding leads to; with decode_backwards=True leave it out')
        filter_kwargs = {'min_p': 0.1} if filter_kwargs is None else filter_kwargs
        pick = Sampler(temperature, resolve_filter(filter_logits_fn), filter_kwargs, generator)
        batch, lead = flattened(prompts)
        reader, read = self.reader(batch, suffix, decode_backwards, cache_kv, kwargs)
        tokens = Tokens(read, room=seq_len)
        for _ in decode(reader, tokens, seq_len, pick):
            pass
        return restored(tokens.part(0 if include_prompt else read.shape[1]), lead)

    def reader(
        self,
        prompts: Int[Tensor, 'b n'],
        suffix: Int[Tensor, '... m'] | None,
        backwards: bool,
        caching: bool,
        kwargs: dict[str, Any],
    ) -> tuple[BeliefReader, Int[Tensor, 'b k']]:
        """What the decode loop reads with, and the tokens that it reads first."""
        rows = len(prompts)
        front = {'prepend_embeds': self.suffix(rows)}
        if backwards:
            # written before anything is known of the beginning: one random token stands for it
            start = torch.randint(0, self.num_tokens, (rows, 1), device=prompts.device)
            fixed = self.forward_decoder(start, return_embeddings=True, **kwargs)[:, -1]
            return BeliefReader(self, self.backward_decoder, fixed, True, caching, front | kwargs), prompts.flip(1)
        behind = prompts[:, :0]
        if suffix is not None:
            behind = (suffix.expand(rows, -1) if suffix.ndim == 1 else suffix).flip(1)
        fixed = self.backward_decoder(behind, return_embeddings=True, **front, **kwargs)[:, -1]
        return BeliefReader(self, self.forward_decoder, fixed, False, caching, kwargs), prompts


class BeliefReader:
    """Reads one decoder's newest embedding beside a fixed one of the other, for the decode loop."""

    def __init__(
        self,
        wrapper: BeliefStateWrapper,
        decoder: Any,
        fixed: Float[Tensor, 'b d'],
        backwards: bool,
        caching: bool,
        kwargs: dict[str, Any],
    ) -> None:
        self.text_head = wrapper.text_head
        self.decoder, self.fixed, self.backwards, self.kwargs = decoder, fixed, backwards, kwargs
        self.caching = caching and decoder.can_cache_kv
        self.cache: Any = None
        self.seen = 0

    def read(self, tokens: Tokens) -> Float[Tensor, 'b 1 v']:
        given = {} if self.cache is None else {'cache': self.cache, 'input_not_include_cache': True}
        embeds, intermediates = self.decoder(
            tokens.part(self.seen), return_embeddings=True, return_intermediates=True, **given, **self.kwargs
        )
        if self.caching:
            self.cache, self.seen = intermediates, tokens.length
        pair = (self.fixed, embeds[:, -1]) if self.backwards else (embeds[:, -1], self.fixed)
        ahead, before = self.text_head(torch.cat(pair, dim=-1)).chunk(2, dim=-1)
        logits: Tensor = before if self.backwards else ahead
        return logits[:, None]


def reversed_rows(length: int, lens: Int[Tensor, 'b']) -> Int[Tensor, 'b n']:
    """Indices that turn the first ``lens`` entries of each row round and leave the rest."""
    seq = torch.arange(length, device=lens.device)
    back = lens[:, None] - 1 - seq
    return torch.where(back >= 0, back, seq)


def mean_where(values: Tensor, counted: Bool[Tensor, '...']) -> Float[Tensor, '']:
    return values.masked_fill(~counted, 0.0).sum() / counted.sum()


def check_decoders(forward: Any, backward: Any, probability: float, share: float) -> None:
    broken = []
    for name in ('emb_dim', 'num_tokens'):
        if getattr(forward, name) != getattr(backward, name):
            broken.append(
                f'the two decoders must have the same {name}, got {getattr(forward, name)} and {getattr(backward, name)}'
            )
    if not (forward.attn_layers.causal and backward.attn_layers.causal):
        broken.append('both decoders must be causal (a Decoder)')
    if not 0 < probability < 1:
        broken.append(f'cond_on_distance_prob must lie between 0 and 1, both excluded; got {probability}')
    if not 0 < share <= 1:
        broken.append(f'train_frac_forward_backward_pairs must be above 0 and at most 1, got {share}')
    if broken:
        raise ValueError('; '.join(broken))


def check_sequence(seq: Tensor, lens: Tensor | None) -> None:
    if seq.ndim != 2 or seq.shape[1] < 2:
        raise ValueError(f'seq must be tokens of shape (batch, length) with at least 2 of them, got {tuple(seq.shape)}')
    if lens is None:
        return
    if lens.shape != seq.shape[:1]:
        raise ValueError(f'lens must hold one length per row, shape ({seq.shape[0]},), got {tuple(lens.shape)}')
    if bool((lens < 2).any()) or bool((lens > seq.shape[1]).any()):
        raise ValueError(f'lens must lie between 2 and the length of the sequence, {seq.shape[1]}; got {lens.tolist()}')
