"""The input rows of the stack in one call: memory and cls tokens, prepended embeddings, tokens; with a cache only new ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.cache.kv_cache import KVCache
from x_transformers.embedding.memory_tokens import MemoryTokens
from x_transformers.embedding.token import check_mask
from x_transformers.helpers import is_any, values_known
from x_transformers.layers.arguments import DECLARED, count_new, per_token
from x_transformers.tensor_types import Bool, Int, Shaped


class Permutation(NamedTuple):
    """For each batch row, which of its rows comes where, and the way back."""

    there: Int[Tensor, 'b n']
    back: Int[Tensor, 'b n']

    def permute(self, t: Shaped[Tensor, '#b n ...']) -> Tensor:
        """``t`` (b n …) in the other order; what stands before its last n rows, for memories, stays there."""
        extra = t.shape[1] - self.there.shape[1]
        laid = gathered(t[:, max(extra, 0) :], self.there)
        return laid if extra <= 0 else torch.cat((t[:, :extra].expand(laid.shape[0], *t[:, :extra].shape[1:]), laid), dim=1)

    def restore(self, t: Shaped[Tensor, '#b n ...']) -> Tensor:
        return gathered(t, self.back)


def _is_wide(mask: Any, length: int) -> bool:
    """Whether a mask covers what stands in front of the tokens, too."""
    return isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == length


def gathered(t: Shaped[Tensor, '#b n ...'], index: Int[Tensor, 'b n']) -> Tensor:
    index = index.view(*index.shape, *(1,) * (t.ndim - 2)).expand(-1, -1, *t.shape[2:])
    return t.expand(index.shape[0], *t.shape[1:]).gather(1, index)


@dataclass(frozen=True)
class Rows:
    """How the tokens of a call lie in the sequence [memory tokens, cls tokens, prepended embeddings, tokens] of the stack.

    - ``new``: tokens to be processed, the last of those given; ``held``: tokens that the cache still holds;
    - ``seen``: position of the first new token, ``begin``: of the first token held;
    - ``front``: cls tokens and prepended embeddings; ``front_held``: those of them that the cache still holds.
    """

    new: int
    # no default: a compiler does not follow an object that is one
    memory: MemoryTokens
    front: int = 0
    held: int = 0
    seen: int | Int[Tensor, ' 1'] = 0
    front_held: int = 0
    cached: bool = False
    begin: int | Int[Tensor, ' 1'] = 0

    @classmethod
    def of_call(
        cls,
        tokens: int,
        front: int,
        memory: MemoryTokens,
        cache: KVCache | None = None,
        *,
        new_only: bool = False,
        cache_age: int | None = None,
    ) -> Rows:
        """Tell new tokens from seen ones.

        With a cache, an input of no more tokens than it holds is new; a longer one is the whole sequence, of which the tail is
        new. ``new_only`` says that everything is new, ``cache_age`` how many of the last tokens are (0: all).
        """
        if cache is None or (cache.cursor is None and cache.length == 0):
            return cls(new=tokens, front=front, memory=memory)
        front = cache.front or front
        cursor = cache.cursor
        if cursor is not None:
            held = cursor.capacity - tokens - cache.front_held
            return cls(
                new=tokens, front=front, held=held, seen=cursor.seen - front, front_held=cache.front_held, cached=True,
                memory=memory, begin=cursor.seen - cursor.row + (cache.front_held - front),
            )  # fmt: skip
        held = cache.retained
        front_held = max(front - (cache.length - held), 0)
        held -= front_held
        new = count_new(tokens, held, new_only, None if cache_age is None else min(cache_age, tokens))
        seen = cache.length - front
        return cls(
            new=new, front=front, held=held, seen=seen, front_held=front_held, cached=True, memory=memory, begin=seen - held
        )  # fmt: skip

    @property
    def tokens(self) -> int:
        """Tokens that can be looked at: held and new."""
        return self.held + self.new

    @property
    def front_keys(self) -> int:
        """Rows in front of the tokens that can be looked at, memory tokens among them."""
        return self.front_held if self.cached else self.front + self.memory.count

    # ------------------------------------------------------------ what the caller gave, as the stack needs it

    def newest(self, t: Shaped[Tensor, '...'], name: str, axis: int = 1) -> Tensor:
        """The part that belongs to the new tokens, of something given for them or for all tokens."""
        length = t.shape[axis] if t.ndim > axis >= 0 else 0
        if length < self.new or (length > self.new and not self.cached):
            raise ValueError(f'{name} must have one entry for each of the {self.new} tokens, got shape {tuple(t.shape)}.')
        return t if length == self.new else t.narrow(axis, length - self.new, self.new)

    def summand(self, t: Shaped[Tensor, '...'], name: str) -> Tensor:
        """``newest`` of something that is added to the tokens, (b n …); one entry for all of them will do."""
        return t if t.ndim > 1 and t.shape[1] == 1 else self.newest(t, name)

    def mask(
        self, mask: Bool[Tensor, 'b n'] | None, prepend_mask: Bool[Tensor, 'b p'] | None, batch: int, device: torch.device
    ) -> Bool[Tensor, 'b m'] | None:
        """The mask over cls tokens, prepended embeddings and tokens that can be looked at; None if neither mask is given."""
        if mask is None and prepend_mask is None:
            return None
        front = self.front_held if self.cached else self.front
        if self.cached and (_is_wide(mask, self.new) or _is_wide(mask, front + self.tokens)) and mask is not None:
            # the stack remembers the mask of what it has seen; or all of it is here
            check_mask(mask, batch, mask.shape[1])
            return mask
        if mask is not None and prepend_mask is None and self.front and _is_wide(mask, self.front + self.tokens):
            check_mask(mask, batch, mask.shape[1])
            return mask
        check_mask(
            mask, batch, self.tokens, of='one entry per token' + (', those in the cache included' if self.cached else '')
        )
        tokens = mask if mask is not None else torch.ones(batch, self.tokens, dtype=torch.bool, device=device)
        if prepend_mask is not None:
            shown = prepend_mask[:, max(prepend_mask.shape[1] - front, 0) :]
            tokens = torch.cat((shown.expand(batch, -1), tokens.expand(batch, -1)), dim=1)
        return F.pad(tokens, (front + self.tokens - tokens.shape[1], 0), value=True)

    def before(self, lens: Int[Tensor, ' b']) -> Bool[Tensor, 'b n']:
        """The mask over the tokens that can be looked at, of rows that are ``lens`` tokens long."""
        if lens.ndim != 1 or lens.is_floating_point() or lens.dtype == torch.bool:
            raise TypeError(f'lens must be one whole number per row, got {lens.dtype} of shape {tuple(lens.shape)}.')
        if lens.numel() and values_known(lens):
            low, high = int(lens.min()), int(lens.max())
            if low < 0 or (isinstance(self.seen, int) and high > self.seen + self.new):
                raise ValueError(
                    f'lens must lie in 0 to {self.seen + self.new}, the tokens of the sequence, got {low} to {high}. Pass '
                    'shorter lengths.'
                )
        return torch.arange(self.tokens, device=lens.device) + self.begin < lens.unsqueeze(-1)

    def positions(self, pos: Int[Tensor, '...'] | None) -> Int[Tensor, '...'] | None:
        """Positions given for the tokens, behind those of the rows in front; None: the stack counts by itself."""
        offset = self.front + self.memory.count
        if pos is None or offset == 0 or not is_any(pos.shape[-1], self.tokens, self.new):
            return pos
        if self.memory.every:
            raise ValueError(
                'pos must be None with memory_tokens_interspersed_every: the memory tokens between the tokens would need '
                'positions too. Leave it out: positions are counted over the longer sequence.'
            )
        if pos.shape[-1] != self.tokens:
            return pos + offset
        front = torch.arange(offset - self.front_keys, offset, device=pos.device, dtype=pos.dtype)
        return torch.cat((front.expand(*pos.shape[:-1], -1), pos + offset), dim=-1)

    def padding_first(self, seq_start_pos: Int[Tensor, ' b'] | None) -> Permutation | None:
        """How rows are to be laid so that padding on the left stands in front of everything; None if it does already.

        Then the rows in front are as far from the tokens as without padding, whatever the stack does with distances.
        """
        front = self.front + self.memory.count
        if seq_start_pos is None or self.cached or front == 0:
            return None
        start = seq_start_pos.unsqueeze(-1)
        place = torch.arange(front + self.tokens, device=start.device)
        there = torch.where(place < start, place + front, torch.where(place < start + front, place - start, place))
        back = torch.where(place < front, place + start, torch.where(place - front < start, place - front, place))
        return Permutation(there, back)

    def stretched(self, more: dict[str, Any], mems: int = 0) -> dict[str, Any]:
        """Masks and biases of the stack that were given for the tokens only, extended for the rows in front.

        With a cache, what was given for each token of the whole sequence is cut to the new ones; a condition may begin with
        that of ``mems`` memories.
        """
        more = self._new_parts(more, mems) if self.cached else more
        extra = self.front_keys
        more = dict(more)
        if more.get('prefix_attn_len') is not None:
            more['prefix_attn_len'] = self._prefix(more['prefix_attn_len'])
        if not extra:
            return more
        keys = more.get('self_attn_kv_mask')
        if keys is not None and keys.shape[-1] == self.tokens:
            keys = F.pad(keys, (extra - self.memory.count, 0), value=True)
            more['self_attn_kv_mask'] = self.memory.mask(keys) if self.memory else keys
        for name, declared in DECLARED.items():
            dense = more.get(name)
            if not declared.has('i') or dense is None or dense.shape[-1] != self.tokens:
                continue
            if self.memory.every:
                raise ValueError(f'{name} with memory_tokens_interspersed_every must be given for the longer sequence.')
            if self.cached and dense.shape[-2] > self.new:
                dense = dense[..., -self.new :, :]
            top = 0 if self.cached else extra
            more[name] = F.pad(dense, (extra, 0, top, 0), value=declared.front)
        return more

    def _prefix(self, tokens: int | Int[Tensor, '...']) -> int | Int[Tensor, '...']:
        """How many rows of the stack a prefix of so many tokens takes, with all that stands in front; none: no rows."""
        return (tokens + self.front + self.memory.count) * (tokens > 0)

    def _new_parts(self, more: dict[str, Any], mems: int) -> dict[str, Any]:
        more = dict(more)
        wanted = {name: each for name, each in DECLARED.items() if each.with_front}
        for name, value, axis in per_token(wanted, more):
            first = mems if name == 'condition' else 0
            if value.shape[axis] > first + self.new:
                newest = value.narrow(axis, value.shape[axis] - self.new, self.new)
                more[name] = torch.cat((value.narrow(axis, 0, first), newest), dim=axis) if first else newest
        return more

    def token_ids(self, ids: Int[Tensor, 'b n'], value: int) -> Int[Tensor, 'b m']:
        """Token ids of all new rows, ``value`` for those that are no tokens."""
        if self.cached:
            return ids
        ids = F.pad(ids, (self.front, 0), value=value)
        return self.memory.ids(ids, value) if self.memory else ids


def permuted_keywords(kwargs: dict[str, Any], order: Permutation) -> dict[str, Any]:
    """The stack's keywords for rows that are laid in another order."""
    kwargs = dict(kwargs)
    rows = order.there.shape[1]
    for name, declared in DECLARED.items():
        if declared.has('i') and name in kwargs:
            raise ValueError(
                f'{name} must be None with seq_start_pos and rows in front (prepended, cls or memory): padding moves to the '
                f'front, so that every batch row would need its own {name}. Run prompts of different lengths one by one.'
            )
    for name, value, axis in per_token(DECLARED, kwargs):
        if value.shape[axis] < rows:
            continue
        batch = DECLARED[name].axis(value, 'b')
        if batch is None:
            value, batch, axis = value.unsqueeze(0), 0, axis + 1
        kwargs[name] = order.permute(value.movedim((batch, axis), (0, 1))).movedim((0, 1), (batch, axis))
    for name in ('deep_embeds_and_ids', 'value_embeds_and_ids'):
        if name in kwargs:
            tables, ids = kwargs[name]
            kwargs[name] = tables, order.permute(ids)
    return kwargs
