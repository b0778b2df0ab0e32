"""A net's keywords per token, sliced or extended to the tokens of one step."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from x_transformers.cache.kv_cache import KVCache
from x_transformers.embedding.call import OF_MODELS
from x_transformers.generation.prompts import GenerateError
from x_transformers.helpers import pad_at_dim
from x_transformers.layers.arguments import names_of
from x_transformers.tensor_types import Bool, Int, Shaped

# True beyond the prompt: a new token is never padding
EXTENDED = names_of(OF_MODELS, lambda each: each.has('n') and each.front is True)
# one entry per token: must cover everything that will be fed
COVERING = names_of(OF_MODELS, lambda each: each.has('n') and each.front is not True and each.each_call)
# one entry per pair of tokens, and what stands where there is none
PAIRS = {name: each.front or 0.0 for name, each in OF_MODELS.items() if each.has('i')}
FRONT = names_of(OF_MODELS, lambda each: each.has('p'))
# those that have entries for what is prepended, too
WITH_FRONT = names_of(OF_MODELS, lambda each: each.with_front)


def reads_new_tokens(net: nn.Module) -> bool:
    """Whether a net takes new tokens alone, several at a time, and can limit its logits to the last positions.

    It says so by the keywords of its ``forward``, or by an attribute of this name if ``forward`` hands any keyword on.
    """
    keywords = inspect.signature(net.forward).parameters
    hands_on = any(keyword.kind is inspect.Parameter.VAR_KEYWORD for keyword in keywords.values())
    named = {'input_not_include_cache', 'logits_last'} <= set(keywords)
    return named or (hands_on and bool(getattr(net, 'reads_new_tokens', False)))


class NetKeywords:
    """The keywords given to ``generate`` for the net.

    Args:
        given: as the caller gave them; those that are not mentioned above go to the net unchanged.
        prompt: tokens of the prompt, which ``mask`` covers.
        total: tokens that will be fed in all; None if that is open.
    """

    def __init__(self, given: Mapping[str, Any], prompt: int, total: int | None) -> None:
        self.given = dict(given)
        self.prompt = prompt
        self.total = total
        self._check()

    def _check(self) -> None:
        for name in (*EXTENDED, *PAIRS):
            value = self.given.get(name)
            if value is not None and not isinstance(value, Tensor):
                raise TypeError(f'{name} must be a tensor, got a {type(value).__name__}. Make one by torch.tensor(...).')
        for name in EXTENDED:
            mask = self.given.get(name)
            if mask is not None and mask.shape[-1] < self.prompt:
                raise GenerateError(
                    f'{name} must cover the {self.prompt} tokens of the prompt, got {mask.shape[-1]}. Extend it; tokens '
                    'that are generated are visible.'
                )
        for name in COVERING:
            for t in _tensors(self.given.get(name)):
                axis = token_axis(name, t)
                if axis is not None and t.shape[axis] != 1:
                    self._covers(name, t.shape[axis], self._front_of(name))
        for name in PAIRS:
            pairs = self.given.get(name)
            if pairs is not None:
                for length in pairs.shape[-2:]:
                    if length != 1:
                        self._covers(name, length)

    def _front_of(self, name: str) -> int:
        """How many entries stand in front of those for tokens."""
        prepended = self.given.get('prepend_embeds')
        return prepended.shape[1] if name in WITH_FRONT and prepended is not None else 0

    def _covers(self, name: str, length: int, front: int = 0) -> None:
        needed = front + (self.prompt if self.total is None else self.total)
        if length < needed:
            raise GenerateError(
                f'{name} must cover the {needed} tokens that will be fed to the net, got {length}. Give it for the prompt '
                'and for all tokens that are to be generated but the last.'
            )

    def whole(self, low: int, high: int) -> dict[str, Any]:
        """For a call that is fed tokens ``low`` to ``high``, with nothing remembered."""
        return self._cut(low, high, low, fronted=True)

    def continued(self, low: int, high: int, rows: int, front: int) -> dict[str, Any]:
        """For a call that is fed tokens ``low`` to ``high`` and sees ``rows`` rows, those fed and those remembered.

        What was prepended, ``front`` rows, is remembered already.
        """
        cut = self._cut(low, high, max(high - rows, 0), fronted=False)
        prefix = cut.pop('prepend_mask', None)
        cut.pop('prepend_embeds', None)
        for name in EXTENDED:
            mask = cut.get(name)
            if mask is None:
                continue
            if rows > mask.shape[-1] and front:
                shown = prefix if prefix is not None and name == 'mask' else mask.new_ones((mask.shape[0], front))
                mask = torch.cat((shown, mask), dim=-1)
            cut[name] = mask[..., -rows:]
        return cut

    def _cut(self, low: int, high: int, seen_from: int, *, fronted: bool) -> dict[str, Any]:
        cut = dict(self.given)
        for name in EXTENDED:
            if cut.get(name) is not None:
                cut[name] = _extended(cut[name], high)[..., seen_from:high]
        for name in COVERING:
            if cut.get(name) is not None:
                front = self._front_of(name)
                part = partial(_part, name, front + low, front + high, front if fronted else 0)
                cut[name] = tree_map(part, cut[name])
        for name in PAIRS:
            if cut.get(name) is not None:
                pairs = cut[name]
                pairs = pairs if pairs.shape[-2] == 1 else pairs[..., low:high, :]
                cut[name] = pairs if pairs.shape[-1] == 1 else pairs[..., seen_from:high]
        return cut

    def fixed(self, low: int, high: int, first: int, columns: int) -> dict[str, Any]:
        """For a call that is fed tokens ``low`` to ``high`` behind a cache of fixed capacity.

        The cache remembers masks, so that those of the new tokens are enough. It has ``columns`` places for tokens, of which
        number ``first`` is the first.
        """
        cut = self._cut(low, high, first, fronted=False)
        for name in FRONT:
            cut.pop(name, None)
        for name in EXTENDED:
            if cut.get(name) is not None:
                cut[name] = _extended(self.given[name], high)[..., low:high]
        for name, value in PAIRS.items():
            pairs = cut.get(name)
            if pairs is not None and pairs.shape[-1] != 1:
                cut[name] = pad_at_dim(pairs, (0, columns - pairs.shape[-1]), value=value)
        # cut out of something longer, each would have strides of its own, for which a program would be made anew
        for name in (*EXTENDED, *COVERING, *PAIRS):
            if cut.get(name) is not None:
                cut[name] = tree_map(lambda t: t.contiguous() if isinstance(t, Tensor) else t, cut[name])
        return cut

    def rows(self, index: Int[Tensor, ' r'], batch: int) -> NetKeywords:
        """The keywords of batch rows ``index``."""

        def gather(name: str, value: Any) -> Any:
            declared = OF_MODELS.get(name)

            def one(t: Any) -> Any:
                if not isinstance(t, Tensor) or t.ndim == 0:
                    return t
                # of what is not known the batch is taken to come first
                axis = 0 if declared is None or not declared.form(t) else declared.axis(t, 'b')
                return t if axis is None or t.shape[axis] != batch else t.index_select(axis, index.to(t.device))

            if name == 'self_attn_additional_kv' and isinstance(source := getattr(value, 'kv_cache', value), KVCache):
                return source.reorder(index)
            return tree_map(one, value)

        twin = NetKeywords({}, self.prompt, self.total)
        twin.given = {name: gather(name, value) for name, value in self.given.items()}
        return twin


def token_axis(name: str, t: Shaped[Tensor, '...']) -> int | None:
    """The axis of ``t`` along which each token has an entry; None: it is the same for all tokens."""
    return OF_MODELS[name].axis(t, 'n')


def _part(name: str, low: int, high: int, front: int, t: Any) -> Any:
    """Entries ``low`` to ``high``, behind the first ``front`` ones."""
    axis = token_axis(name, t) if isinstance(t, Tensor) else None
    if axis is None or t.shape[axis] == 1:
        return t
    part = t.narrow(axis, low, high - low)
    return torch.cat((t.narrow(axis, 0, front), part), dim=axis) if front else part


def _extended(mask: Bool[Tensor, 'b n'], length: int) -> Bool[Tensor, 'b m']:
    missing = length - mask.shape[-1]
    return pad_at_dim(mask, (0, missing), value=True) if missing > 0 else mask


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return list(value.values()) if isinstance(value, Mapping) else []
