"""The belief state transformer: predict, for a prefix and a suffix, the next and the previous token
(https://arxiv.org/abs/2410.23506)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from x_transformers.embedding.ids import token_ids
from x_transformers.flags.calls import BeliefGenerateOptions
from x_transformers.flags.fit import check_net
from x_transformers.flags.objectives import BeliefStateOptions, options
from x_transformers.generation.decode import Tokens, decode, reader_for
from x_transformers.generation.modes import eval_decorator
from x_transformers.generation.prompts import check_reserved, checked_length, prepare_prompts
from x_transformers.generation.sampling import Filter, Sampler, min_p, resolve_filter
from x_transformers.generation.views import VectorView
from x_transformers.helpers import under_transform, values_known
from x_transformers.layers.checks import is_int, of_width, shape_of
from x_transformers.losses import token_cross_entropy
from x_transformers.module import Module, empty_parameter
from x_transformers.randomness import happens
from x_transformers.tensor_types import Float, Int

# pairs of a prefix and a suffix whose logits exist at one time
PAIRS_AT_ONCE = 4096

PairWeights = Callable[[Int[Tensor, 'p 2']], Tensor]


class ShareOf(nn.Module):
    """Whole numbers as shares of the largest, each a vector of one number."""

    def __init__(self, largest: int) -> None:
        super().__init__()
        self.largest = largest

    def forward(self, number: Int[Tensor, 'p']) -> Float[Tensor, 'p 1']:
        return (number / self.largest)[:, None]


class BeliefStateWrapper(Module):
    """Two decoders, one forwards and one backwards, with a head over every pair of a prefix and a later suffix.

    Args:
        forward_decoder, backward_decoder: causal ``TransformerWrapper``s over the same tokens; without the second, the first
            reads in both directions.
        train_frac_forward_backward_pairs: fraction of the pairs to train on, sampled in each call.
        text_head: a module from ``2 d`` to ``2 v`` in place of the default one.
        backward_ar_loss_weight: weight of predicting the previous token.
        pred_distance, pred_distance_loss_weight, max_pred_distance: also predict how far apart prefix and suffix are.
        cond_on_distance, cond_on_distance_prob: condition the head on that distance, in this fraction of the training steps.
    """

    forward_decoder: Any
    backward_decoder: Any
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
        options(BeliefStateOptions, 'BeliefStateWrapper', locals())
        self.forward_decoder = forward_decoder
        self.backward_decoder = forward_decoder if backward_decoder is None else backward_decoder
        check_decoders(self.forward_decoder, self.backward_decoder)
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
            # a gate over the pair of embeddings that tells how far apart prefix and suffix are
            self.to_distance_cond = nn.Sequential(
                ShareOf(self.max_pred_distance), nn.Linear(1, dim), nn.LeakyReLU(), nn.Linear(dim, 2 * dim), nn.Sigmoid()
            )
        self.train_frac_fb_pairs = train_frac_forward_backward_pairs
        self.backward_ar_loss_weight = backward_ar_loss_weight
        self.register_buffer('loss_weights', torch.empty(2))
        self.init_own()

    def init_own(self) -> None:
        nn.init.normal_(self.suffix_token, std=0.02)
        self.loss_weights.copy_(torch.tensor([1.0, self.backward_ar_loss_weight]))

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
        pairs = torch.triu_indices(length, length + 1, 2, device=device).t()
        if self.train_frac_fb_pairs >= 1.0:
            return pairs
        kept = max(int(len(pairs) * self.train_frac_fb_pairs), 1)
        return pairs[torch.randperm(len(pairs), device=device)[:kept]]

    def weighed(self, pairs: Int[Tensor, 'p 2'], weigh: PairWeights | None) -> tuple[Int[Tensor, 'q 2'], Float[Tensor, 'q 2']]:
        """(the pairs that say something, the weights of their two losses): pairs of weight 0 need not be computed."""
        weights = self.loss_weights.expand(len(pairs), 2)
        if weigh is None or not len(pairs):
            return pairs, weights
        weights = weights * pair_weights(weigh, pairs)
        if self.pred_distance or weights.requires_grad or torch.compiler.is_compiling():
            return pairs, weights
        # one always stays, so that there is a loss
        used = (weights != 0).any(dim=-1).index_fill(0, torch.zeros(1, dtype=torch.long, device=pairs.device), True)
        return pairs[used], weights[used]

    def pair_losses(
        self,
        ahead: Float[Tensor, 'b n d'],
        behind: Float[Tensor, 'b m d'],
        seq: Int[Tensor, 'b n'],
        pairs: Int[Tensor, 'p 2'],
        on_distance: bool,
    ) -> tuple[Float[Tensor, 'b p 2'], Float[Tensor, 'b p'] | None]:
        """Cross entropy of the next and of the previous token, and of the distance if it is to be predicted."""
        i, j = pairs.unbind(dim=-1)
        both = torch.cat((ahead[:, i], behind[:, j]), dim=-1)
        conditioned = both * self.to_distance_cond(j - i).to(both.dtype) if on_distance else both
        logits = of_width(self.text_head(conditioned), 2 * self.num_tokens, 'text_head').unflatten(-1, (2, self.num_tokens))
        labels = torch.stack((seq[:, i + 1], seq[:, j - 1]), dim=-1)
        text = token_cross_entropy(logits, labels, reduction='none')
        if not self.pred_distance or on_distance:
            return text, None
        distance = (j - i).clamp(max=self.max_pred_distance - 1).expand(len(seq), -1)
        return text, token_cross_entropy(self.to_distance_logits(both), distance, reduction='none')

    def forward(
        self,
        seq: Int[Tensor, 'b n'],
        lens: Int[Tensor, 'b'] | None = None,
        loss_weight_by_fb_indices: PairWeights | None = None,
    ) -> Float[Tensor, '']:
        """The loss over pairs of prefix and suffix within each row's ``lens`` tokens.

        ``loss_weight_by_fb_indices`` maps pairs ``p 2`` to weights ``p`` or ``p 2`` (next, previous token).
        """
        seq = token_ids(seq, 'seq')
        check_sequence(seq, lens)
        rows, length = seq.shape
        lengths = torch.full((rows,), length, device=seq.device) if lens is None else lens
        ahead = self.forward_decoder(seq, return_embeddings=True)
        behind = self.backward_embeds(seq, lengths)
        pairs = self.pairs(length)
        total = (pairs[:, 1] <= lengths[:, None]).sum()
        pairs, weights = self.weighed(pairs, loss_weight_by_fb_indices)
        on_distance = self.cond_on_distance and self.training and happens(self.cond_on_distance_prob)

        # transforms of torch.func cannot run a part again
        part_losses: Any = self.pair_losses if under_transform() else partial(checkpoint, self.pair_losses, use_reentrant=False)
        results = [part_losses(ahead, behind, seq, part, on_distance) for part in pairs.split(PAIRS_AT_ONCE)]
        text = torch.cat([result[0] for result in results], dim=1)
        counts = pairs[:, 1] <= lengths[:, None]
        weighted = (text * weights.to(text.dtype)).masked_fill(~counts[..., None], 0.0)
        # 0 where nothing counts: of a drawn share of the pairs all may lie beyond short rows
        loss: Tensor = weighted.sum() / (2 * total).clamp(min=1)
        if results and results[0][1] is not None:
            off = torch.cat([result[1] for result in results], dim=1)
            off = off.masked_fill(~counts, 0.0).sum() / total.clamp(min=1)
            loss = loss + self.pred_distance_loss_weight * off
        return loss

    @torch.no_grad()
    @eval_decorator
    def generate_with_suffix_cond(
        self,
        prompts: Int[Tensor, '... n'] | Sequence[Int[Tensor, 'n']],
        seq_len: int,
        temperature: float = 1.25,
        cache_kv: bool = False,
        suffix: Int[Tensor, '... m'] | None = None,
        filter_logits_fn: str | Filter = min_p,
        filter_kwargs: dict[str, Any] | None = None,
        decode_backwards: bool = False,
        include_prompt: bool = False,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Int[Tensor, '... k']:
        """New tokens after a prompt and before a suffix; with ``decode_backwards`` those before the prompt, last one first.

        Args:
            prompts: ids ``(..., n)``, or a list of ids of different lengths.
            seq_len: how many tokens to write.
            temperature: 0 takes the most likely token, without any filter.
            cache_kv: cache keys and values, if the decoder supports it; the tokens are the same.
            suffix: ids, the same for all prompts or one row for each; without it the end is unconstrained.
            filter_logits_fn, filter_kwargs: a name of ``FILTER_LOGITS_FN`` or a callable, and its keywords.
            decode_backwards: generate the tokens before the prompts.
            include_prompt: return the prompt before the new tokens, as it was read (backwards, if so decoded).
            generator: makes sampling reproducible.
            kwargs: for the decoders.
        """
        options(BeliefGenerateOptions, 'generate_with_suffix_cond', locals())
        check_reserved(kwargs)
        if suffix is not None and decode_backwards:
            raise ValueError('suffix must be None with decode_backwards=True. Leave it out.')
        steps = checked_length(seq_len)
        filter_kwargs = {'min_p': 0.1} if filter_kwargs is None else filter_kwargs
        pick = Sampler(temperature, resolve_filter(filter_logits_fn), filter_kwargs, generator)
        prompt = prepare_prompts(turned(prompts) if decode_backwards else prompts, may_be_empty=decode_backwards)
        rows, keywords = len(prompt.tokens), {'return_embeddings': True, **kwargs}
        if decode_backwards:
            # written before anything is known of the beginning: one random token stands for it
            start = torch.randint(0, self.num_tokens, (rows, 1), device=prompt.tokens.device, generator=generator)
            fixed = self.forward_decoder(start, **keywords)[:, -1]
            keywords['prepend_embeds'] = self.suffix(rows)
        else:
            behind = suffix_rows(None if suffix is None else token_ids(suffix, 'suffix'), prompt.tokens).flip(1)
            fixed = self.backward_decoder(behind, prepend_embeds=self.suffix(rows), **keywords)[:, -1]
        net: Any = self.beside(fixed, decode_backwards)
        reader = reader_for(net, keywords, prompt=prompt, steps=steps, cache=cache_kv, window=True)
        tokens = Tokens(prompt.tokens, room=steps)
        for _ in decode(reader, tokens, steps, pick, check=reader.check_length):
            pass
        return prompt.unpack(tokens.part(0 if include_prompt else prompt.tokens.shape[1]))

    def beside(self, fixed: Float[Tensor, 'b d'], backwards: bool) -> VectorView:
        """The decoder of one direction as a net from tokens to logits, beside a fixed embedding of the other direction."""

        def answer(embeds: Float[Tensor, 'b n d']) -> Float[Tensor, 'b n v']:
            other = fixed[:, None].expand(-1, embeds.shape[1], -1)
            pair = (other, embeds) if backwards else (embeds, other)
            both = of_width(self.text_head(torch.cat(pair, dim=-1)), 2 * self.num_tokens, 'text_head')
            following, previous = both.chunk(2, dim=-1)
            logits: Tensor = previous if backwards else following
            return logits

        return VectorView(self.backward_decoder if backwards else self.forward_decoder, answer)


def turned(prompts: Any) -> Any:
    """Prompts from their last token to their first."""
    return prompts.flip(-1) if isinstance(prompts, Tensor) else [prompt.flip(-1) for prompt in prompts]


def suffix_rows(suffix: Int[Tensor, '... m'] | None, prompts: Int[Tensor, 'b n']) -> Int[Tensor, 'b m']:
    """The suffix of each row; an empty one if there is none."""
    if suffix is None:
        return prompts[:, :0]
    if suffix.ndim and not suffix.shape[-1]:
        raise ValueError('suffix must hold at least one token, got none. Leave it out if the end is not given.')
    rows = suffix.reshape(-1, suffix.shape[-1]) if suffix.ndim else suffix
    if rows.ndim != 2 or len(rows) not in (1, len(prompts)):
        raise ValueError(
            f'suffix must be tokens (length,), or one row for each of the {len(prompts)} prompts; got {tuple(suffix.shape)}'
        )
    return rows.expand(len(prompts), -1)


def reversed_rows(length: int, lens: Int[Tensor, 'b']) -> Int[Tensor, 'b n']:
    """Indices that turn the first ``lens`` entries of each row round and leave the rest."""
    seq = torch.arange(length, device=lens.device)
    back = lens[:, None] - 1 - seq
    return torch.where(back >= 0, back, seq)


def pair_weights(weigh: PairWeights, pairs: Int[Tensor, 'p 2']) -> Float[Tensor, 'p #w']:
    if not callable(weigh):
        raise TypeError(f'loss_weight_by_fb_indices must be a function of pairs (p 2), got {weigh!r}')
    weights = weigh(pairs)
    if not isinstance(weights, Tensor) or tuple(weights.shape) not in ((len(pairs),), (len(pairs), 2)):
        raise ValueError(
            f'loss_weight_by_fb_indices must return one weight per pair, shape ({len(pairs)},), or one per pair and direction, '
            f'({len(pairs)}, 2); got {shape_of(weights)}'
        )
    return weights if weights.ndim == 2 else weights[:, None]


def check_decoders(forward: Any, backward: Any) -> None:
    for name, decoder in (('forward_decoder', forward), ('backward_decoder', backward)):
        check_net(decoder, 'BeliefStateWrapper', name=name, told_nothing=True, needs=('emb_dim', 'num_tokens', 'attn_layers'))
    broken = []
    for name in ('emb_dim', 'num_tokens'):
        if getattr(forward, name) != getattr(backward, name):
            broken.append(
                f'the two decoders must have the same {name}, got {getattr(forward, name)} and {getattr(backward, name)}'
            )
    if not (forward.attn_layers.is_causal and backward.attn_layers.is_causal):
        broken.append('both decoders must be causal (a Decoder)')
    if broken:
        raise ValueError('; '.join(broken))


def check_sequence(seq: Int[Tensor, 'b n'], lens: Int[Tensor, ' b'] | None) -> None:
    if seq.ndim != 2 or seq.shape[1] < 2:
        raise ValueError(f'seq must be tokens of shape (batch, length) with at least 2 of them, got {tuple(seq.shape)}')
    if lens is None:
        return
    if not is_int(lens, 1) or lens.shape != seq.shape[:1]:
        raise ValueError(f'lens must hold one length per row, a tensor of shape ({seq.shape[0]},), got {shape_of(lens)}')
    if values_known(lens) and bool(((lens < 2) | (lens > seq.shape[1])).any()):
        raise ValueError(f'lens must lie between 2 and the length of the sequence, {seq.shape[1]}; got {lens.tolist()}')
