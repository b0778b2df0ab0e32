"""From token ids to vectors: the token table, further tables that are added, and prepended embeddings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.helpers import default, is_any, l2norm
from x_transformers.module import Module, to_unit_length_
from x_transformers.position.absolute import Table, look_up
from x_transformers.tensor_types import Bool, Float, Int


class UnitTable(Table):
    """A table of vectors of unit length, at the start and after ``normalize_``. https://arxiv.org/abs/2410.01131"""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.normalize_()

    def normalize_(self) -> None:
        to_unit_length_(self.weight, -1)


class TokenEmbedding(Module):
    """A table of ``num_tokens`` token vectors of width ``dim``, of unit length with ``l2norm_embed``.

    The table starts from a normal distribution of variance 2 / dim (https://arxiv.org/abs/1502.01852), or of standard deviation
    1e-5 with ``l2norm_embed``: what counts then is the direction, which can turn quickly. ``init_std`` says otherwise. With
    ``unit`` its vectors have unit length, and ``normalize_`` of the table makes it so again.
    """

    def __init__(
        self, dim: int, num_tokens: int, l2norm_embed: bool = False, *, init_std: float | None = None, unit: bool = False
    ) -> None:
        super().__init__()
        self.l2norm_embed = l2norm_embed
        std = default(init_std, 1e-5 if l2norm_embed else math.sqrt(2 / dim))
        self.emb = UnitTable(num_tokens, dim, std=std) if unit else Table(num_tokens, dim, std=std)

    def init_(self) -> None:
        """Draw the table anew."""
        self.emb.reset_parameters()

    def forward(self, x: Int[Tensor, '...']) -> Float[Tensor, '... d']:
        """Raises TypeError for ids that are not integers, IndexError for ids beyond the table."""
        vectors = look_up(self.emb, x, 'x: token ids')
        return l2norm(vectors) if self.l2norm_embed else vectors


def check_mask(
    mask: Bool[Tensor, 'b n'] | None, batch: int, length: int, name: str = 'mask', of: str = 'one entry per token'
) -> None:
    """A mask says True where there is something to see, for every row of a batch."""
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f'{name} must be a boolean tensor (True: may be looked at), got a {type(mask).__name__}.')
    if mask.dtype != torch.bool:
        raise TypeError(
            f'{name} must be boolean (True: may be looked at), got {mask.dtype}. Use {name}.bool() if 1 means True.'
        )
    if mask.ndim != 2 or mask.shape[1] != length or not is_any(mask.shape[0], 1, batch):
        raise ValueError(f'{name} must have shape ({batch}, {length}), {of}, got {tuple(mask.shape)}.')


# ---------------------------------------------------------------- what is summed in


def named_tables(sizes: Mapping[str, int], dim: int) -> nn.ModuleDict | None:
    """Further tables by name; None without any. Their slots are called ``NAME_embed``."""
    if not sizes:
        return None
    return nn.ModuleDict({f'{name}_embed': Table(size, dim) for name, size in sizes.items()})


def add_named(
    x: Float[Tensor, '...'],
    tables: nn.ModuleDict | None,
    ids: Mapping[str, Int[Tensor, 'b m']],
    newest: Callable[[Int[Tensor, 'b n'], str], Int[Tensor, 'b n']],
    argument: str = 'embed_ids',
    flag: str = 'embed_num_tokens',
) -> Float[Tensor, 'b n d']:
    """Add to each token its row of every further table. The names must be exactly the tables'.

    ``newest`` takes from ids, and the name that they have in errors, those of the tokens in ``x``. ``argument`` and ``flag``
    are what the caller calls ids and tables.
    """
    if not isinstance(ids, Mapping) or not all(isinstance(each, Tensor) for each in ids.values()):
        raise TypeError(f'{argument} must be a dictionary from names to tensors of ids, got {_kinds(ids)}.')
    wanted = {key.removesuffix('_embed') for key in tables} if tables is not None else set()
    if wanted != set(ids):
        missing, unknown = sorted(wanted - set(ids)), sorted(set(ids) - wanted)
        raise ValueError(
            f'{argument} must name exactly what {flag} names, which is {sorted(wanted) or "nothing"}; '
            + '; '.join(f'{what}: {", ".join(names)}' for what, names in (('missing', missing), ('unknown', unknown)) if names)
            + '.'
        )
    for name, extra in ids.items():
        table: Any = tables[f'{name}_embed'] if tables is not None else None
        title = f'{argument}[{name!r}]'
        if extra.ndim != 2 or (x.ndim > 2 and not is_any(extra.shape[0], 1, x.shape[0])):
            raise ValueError(
                f'{title} must be ids (batch, tokens), as many rows as the tokens, got shape {tuple(extra.shape)}.'
            )
        x = x + look_up(table, newest(extra, title), title)
    return x


def _kinds(ids: Any) -> str:
    if isinstance(ids, Mapping):
        return 'one of ' + ', '.join(sorted({type(each).__name__ for each in ids.values()}))
    return f'a {type(ids).__name__}'


def scale_gradient(x: Float[Tensor, '...'], fraction: float) -> Tensor:
    """The same values, with ``fraction`` of the gradient (https://arxiv.org/abs/2105.13290)."""
    if fraction >= 1 or not x.requires_grad:
        return x
    return x * fraction + x.detach() * (1 - fraction)


# ---------------------------------------------------------------- what stands in front


def prepend_rows(
    rows: Float[Tensor, 'b p d'],
    x: Float[Tensor, 'b n d'],
    mask: Bool[Tensor, 'b n'] | None,
    rows_mask: Bool[Tensor, 'b p'] | None = None,
) -> tuple[Float[Tensor, 'b m d'], Bool[Tensor, 'b m'] | None]:
    """``rows`` in front of the sequence; its mask, if there is one of either, extended by True."""
    if mask is not None or rows_mask is not None:
        rows_mask = all_true(rows) if rows_mask is None else rows_mask
        mask = all_true(x) if mask is None else mask
        mask = torch.cat((rows_mask.expand(mask.shape[0], -1), mask.expand(rows_mask.shape[0], -1)), dim=1)
    return torch.cat((rows.to(x.dtype), x), dim=1), mask


def all_true(x: Float[Tensor, 'b n d']) -> Bool[Tensor, 'b n']:
    return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)


def true_in_front(mask: Bool[Tensor, 'b n'], rows: int) -> Bool[Tensor, 'b m']:
    return F.pad(mask, (rows, 0), value=True) if rows else mask
