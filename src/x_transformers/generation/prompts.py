"""Prompts: a tensor with any leading axes, a list of different lengths, or a tensor with lengths."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from x_transformers.embedding.ids import token_ids
from x_transformers.notices import warn_inert
from x_transformers.tensor_types import Int, Shaped

# what generation tells a net beside return_...
RESERVED = ('logits_last', 'cache', 'input_not_include_cache', 'cache_age', 'seq_start_pos')


class GenerateError(ValueError, AssertionError):
    """Generation cannot go on as asked. (Also an AssertionError, for callers that catch one.)"""


# what generation begins with: ids with any leading axes, or a list of different lengths; how many of each count
Prompts = Int[Tensor, '... t'] | list[Int[Tensor, ' t']]
Lengths = Int[Tensor, '...'] | Sequence[int]


def whole_number(value: Any, name: str) -> int:
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f'{name} must be a whole number, got {value!r}')


def check_reserved(kwargs: Mapping[str, Any]) -> None:
    """Raise for keywords of the net that generation sets by itself."""
    taken = [name for name in kwargs if name.startswith('return_') or name in RESERVED]
    if taken:
        raise GenerateError(
            f'{", ".join(taken)} must be left out: generation itself decides what the net returns and remembers. Give the '
            'lengths of rows as prompt_lens.'
        )


def checked_length(seq_len: int) -> int:
    steps = whole_number(seq_len, 'seq_len')
    if steps < 0:
        raise ValueError(f'seq_len must be a whole number from 0, the number of tokens to generate, got {seq_len!r}. Give one.')
    return steps


def checked_eos(eos_token: int | None) -> int | None:
    if eos_token is None:
        return None
    if isinstance(eos_token, (list, tuple)):
        raise TypeError(f'eos_token must be one token id, got {eos_token!r}. For several, cut what was generated afterwards.')
    token = whole_number(eos_token, 'eos_token')
    if token < 0:
        raise ValueError(f'eos_token must be a token id, 0 or more; got {token}')
    return token


def warn_of_end(net: Any, eos_token: Any) -> None:
    """An end token that a net does not have never ends anything."""
    size = getattr(net, 'num_tokens', None)
    if isinstance(eos_token, int) and isinstance(size, int) and eos_token >= size:
        warn_inert('generate', [f'`eos_token={eos_token}` is no token of the net, which has {size}, so nothing ends there.'])


def align_right(t: Shaped[Tensor, 'b n ...'], lens: Int[Tensor, ' b'], pad_id: float = 0) -> Tensor:
    """Move the first ``lens`` entries of each row of ``t`` (b n ...) to the right end, with ``pad_id`` in front of them."""
    batch, n = t.shape[:2]
    place = torch.arange(n, device=t.device) - (n - lens)[:, None]
    rows = torch.arange(batch, device=t.device)[:, None]
    moved = t[rows, place.clamp(min=0)]
    padding = (place < 0).view(batch, n, *(1,) * (t.ndim - 2))
    return moved.masked_fill(padding, pad_id)


def flattened(t: Shaped[Tensor, '... n']) -> tuple[Tensor, tuple[int, ...]]:
    """(t as one batch (b n), the leading axes it had)."""
    if t.ndim == 0:
        raise ValueError('a prompt must have a sequence axis, got a single number. Use prompt[None] for one token.')
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1]), tuple(t.shape[:-1])


def restored(t: Shaped[Tensor, 'b ...'], leading: tuple[int, ...]) -> Tensor:
    """Give the batch axis of ``t`` (b ...) its original axes back."""
    return t.reshape((*leading, *t.shape[1:]))


@dataclass(frozen=True)
class Prompt:
    """Prompts as one batch of right-aligned tokens: ids (b t) or vectors (b t d).

    ``start``: how many pads stand in front of each row, None if there are none; ``leading``: the axes to give back.
    """

    tokens: Tensor
    start: Int[Tensor, ' b'] | None
    most_pads: int
    leading: tuple[int, ...]

    def unpack(self, rows: Shaped[Tensor, 'b ...']) -> Tensor:
        """Give the batch axis of ``rows`` (b ...) its original axes back."""
        return restored(rows, self.leading)


def prepare_prompts(
    prompts: Int[Tensor, '... t'] | Sequence[Int[Tensor, ' t']],
    lens: Lengths | None = None,
    pad_value: int = 0,
    may_be_empty: bool = False,
) -> Prompt:
    """Check prompts and bring them into one batch. ``may_be_empty``: something else stands in front of the tokens."""
    if isinstance(prompts, (list, tuple)):
        if lens is not None:
            raise GenerateError(
                'prompt_lens must be None with a list of prompts, each of which has its own length. Leave it out.'
            )
        prompts, lens = _from_list(prompts)
    if not isinstance(prompts, Tensor):
        raise TypeError(f'prompts must be a tensor of token ids or a list of such, got {type(prompts).__name__}')
    flat, leading = flattened(token_ids(prompts, 'prompts'))
    return right_aligned(flat, leading, lens, pad_value, may_be_empty)


def right_aligned(
    tokens: Shaped[Tensor, 'b t ...'],
    leading: tuple[int, ...],
    lens: Lengths | None = None,
    pad_value: float = 0,
    may_be_empty: bool = False,
) -> Prompt:
    """A batch (b t ...) of ids or vectors, of which the first ``lens`` count, as a ``Prompt``."""
    if tokens.shape[0] == 0:
        raise ValueError(f'prompts must have at least one row, got shape {tuple(tokens.shape)}. Give one.')
    if lens is None:
        if tokens.shape[1] == 0 and not may_be_empty:
            raise ValueError('prompts must have at least one token to start from, got none. Give one, or prepend_embeds.')
        return Prompt(tokens, None, 0, leading)
    length, most = tokens.shape[1], _check_lens(lens, tokens, may_be_empty)
    if most == 0:
        return Prompt(tokens, None, 0, leading)
    lengths = torch.as_tensor(lens, device=tokens.device).reshape(-1).long()
    return Prompt(align_right(tokens, lengths, pad_value), length - lengths, most, leading)


def _from_list(prompts: Sequence[Int[Tensor, ' t']]) -> tuple[Tensor, list[int]]:
    if len(prompts) == 0:
        raise GenerateError('prompts must have at least one entry, got an empty list. Give one.')
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, Tensor) or prompt.ndim != 1:
            shape = tuple(prompt.shape) if isinstance(prompt, Tensor) else type(prompt).__name__
            raise ValueError(f'prompt {index} of the list must be a tensor with one axis, got {shape}')
    rows = [token_ids(prompt, f'prompt {index}') for index, prompt in enumerate(prompts)]
    return pad_sequence(rows, batch_first=True), [len(prompt) for prompt in prompts]


def _check_lens(lens: Int[Tensor, '...'] | Sequence[int], tokens: Shaped[Tensor, 'b t ...'], may_be_empty: bool) -> int:
    """The largest number of pads that the lengths leave."""
    flat = torch.as_tensor(lens).reshape(-1)
    batch, length = tokens.shape[:2]
    if flat.is_floating_point() or flat.dtype == torch.bool:
        raise TypeError(f'prompt_lens must be integers, got {flat.dtype}')
    if flat.shape[0] != batch:
        raise ValueError(
            f'prompt_lens must have one entry for each of {batch} prompts, got {flat.shape[0]}. Give one for each.'
        )
    values = flat.tolist()
    if max(values) > length:
        raise ValueError(
            f'prompt_lens must be at most {length}, the length of the prompts, got {max(values)}. Give lengths without padding.'
        )
    least = 0 if may_be_empty else 1
    if min(values) < least:
        raise ValueError(
            f'prompt {values.index(min(values))} must hold at least {least} tokens, got {min(values)}. Give it one.'
        )
    return length - int(min(values))
