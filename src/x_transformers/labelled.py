"""The output of a language model for given labels: loss and logits by name, as trainers of other packages expect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node

from x_transformers.embedding.ids import beyond
from x_transformers.flags.calls import LabelledOptions
from x_transformers.flags.objectives import options
from x_transformers.helpers import pad_at_dim
from x_transformers.tensor_types import Bool, Float, Int

# what carries no loss, as these packages mark it
IGNORED = -100


class Labelled(dict[str, Tensor]):
    """``loss``, where there are labels, and ``logits``, as items and as attributes."""

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f'there is no {name!r}, only {", ".join(self)}') from None


# sharding and exporters look for tensors in a module's output there
register_pytree_node(
    Labelled,
    lambda found: (list(found.values()), list(found)),
    lambda values, names: Labelled(zip(names, values, strict=True)),
    serialized_type_name='x_transformers.labelled.Labelled',
)


@dataclass(frozen=True)
class AskedLabels:
    """``others``: arguments that do not go with these, by name."""

    labels: Int[Tensor, 'b n'] | None
    attention_mask: Bool[Tensor, 'b n'] | Int[Tensor, 'b n'] | None
    num_items_in_batch: int | Int[Tensor, ''] | None
    others: Mapping[str, Any]


def one_of(x: Int[Tensor, 'b n'] | None, input_ids: Int[Tensor, 'b n'] | None) -> Any:
    if (x is None) == (input_ids is None):
        raise TypeError(f'ids must be given once, as x or as input_ids, got {"neither" if x is None else "both"}.')
    return input_ids if x is None else x


def check_unlabelled(attention_mask: Any, num_items_in_batch: Any) -> None:
    """Raises ValueError for what belongs to labels, without them."""
    for name, value in {'attention_mask': attention_mask, 'num_items_in_batch': num_items_in_batch}.items():
        if value is not None:
            raise ValueError(f'{name} must go with labels or input_ids, got it alone. Give labels, or a mask as mask=.')


def answer_labels(model: Any, x: Int[Tensor, 'b n'], asked: AskedLabels, keywords: dict[str, Any]) -> Labelled:
    """``model``: an ``AutoregressiveWrapper``; ``keywords``: further keywords of its call."""
    clash = [name for name, value in asked.others.items() if value is not None and value is not False]
    if clash:
        raise ValueError(f'{", ".join(clash)} must not go with labels or input_ids, which are an answer of their own.')
    if asked.attention_mask is not None:
        keywords['mask'] = as_mask(asked.attention_mask, x)
    if asked.labels is None:
        if asked.num_items_in_batch is not None:
            options(LabelledOptions, 'AutoregressiveWrapper', {'num_items_in_batch': asked.num_items_in_batch})
        if keywords.pop('lens') is not None:
            raise ValueError('lens must go with labels: it says which of them count. Give labels, or attention_mask.')
        return Labelled(logits=model.net(x, **keywords))
    labels, lens = checked_labels(asked.labels, x), keywords.get('lens')
    left_out = (labels == IGNORED) if lens is None else (labels == IGNORED) | beyond(x, lens)
    targets = pad_at_dim(labels.masked_fill(left_out, model.ignore_index)[:, 1:], (0, 1), value=model.ignore_index)
    loss, logits, _ = model.measured(x, keywords.pop('prepend_embeds'), keywords.pop('lens'), targets, True, **keywords)
    if asked.num_items_in_batch is not None:
        loss = summed(loss, (targets != model.ignore_index).sum(), asked.num_items_in_batch)
    return Labelled(loss=loss, logits=logits)


def summed(loss: Float[Tensor, ''], count: Int[Tensor, ''], items: int | Int[Tensor, '']) -> Float[Tensor, '']:
    """The mean over ``count`` tokens as their sum, divided by ``items``; nothing of nothing is 0."""
    options(LabelledOptions, 'AutoregressiveWrapper', {'num_items_in_batch': items, 'labels': count})
    return torch.where(count > 0, loss, torch.zeros_like(loss)) * (count / items)


def checked_labels(labels: Any, x: Int[Tensor, 'b n']) -> Int[Tensor, 'b n']:
    shaped = isinstance(labels, Tensor) and labels.shape == x.shape
    if not shaped or labels.is_floating_point() or labels.dtype == torch.bool:
        got = f'{tuple(labels.shape)} of {labels.dtype}' if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(
            f'labels must be whole numbers of the shape of the ids, {tuple(x.shape)}, got {got}. '
            'They may be the ids themselves: they are shifted here.'
        )
    ids: Tensor = labels
    return ids


def as_mask(mask: Any, x: Int[Tensor, 'b n']) -> Bool[Tensor, 'b n']:
    if not isinstance(mask, Tensor) or mask.shape != x.shape:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f'attention_mask must have the shape of the ids, {tuple(x.shape)}, got {got}. Its 1 is a token.')
    return mask.bool()
