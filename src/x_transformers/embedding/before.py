"""Embeddings that include the previous token: its vector (smear), or a vector of both (bigram hash)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.module import ConstantLinear, Module, empty_parameter
from x_transformers.position.absolute import Table, look_up
from x_transformers.tensor_types import Bool, Float, Int, Shaped

if TYPE_CHECKING:
    from x_transformers.cache.kv_cache import KVCache
    from x_transformers.embedding.call import ModelArgs
    from x_transformers.embedding.rows import Rows

# the cache of what a model itself remembers of its tokens, beside those of the stack and of its steps
MODEL_STEP = -2
# two odd factors, so that neighbouring ids lie far from each other in a table
SPREAD = (0x9E3779B1, 0x85EBCA77)


class Smear(Module):
    """``x_t + scale * σ(w · x_t) * x_{t-1}``, from modded-nanogpt (https://github.com/KellerJordan/modded-nanogpt).

    forward: embeddings (b n d), and those of the tokens before them -> (b n d). ``scale`` starts at 0, and the gate half open.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.to_gate = ConstantLinear(dim, 1, bias=False)
        self.scale = empty_parameter(1)
        self.init_own()

    def init_own(self) -> None:
        nn.init.zeros_(self.scale)

    def forward(self, x: Float[Tensor, 'b n d'], before: Float[Tensor, 'b n d']) -> Float[Tensor, 'b n d']:
        out: Tensor = x + self.scale[0] * self.to_gate(x).sigmoid() * before
        return out


class BigramHash(Module):
    """A vector for each pair of a token and the one before it: the row ``hash(pair) % (size - 1)`` of a table of ``size`` rows.

    Tokens with nothing before them share the last row. From modded-nanogpt; the hash is ours. The table starts at zero.
    forward: ids (b n), and one more than the id before each (0: there is none), (b n) -> (b n d).
    """

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.size = size
        self.table = Table(size, dim, std=0.0)

    def rows(self, ids: Int[Tensor, 'b n'], before: Int[Tensor, 'b n']) -> Int[Tensor, 'b n']:
        mixed = (ids * SPREAD[0]) ^ (before * SPREAD[1])
        return torch.where(before == 0, self.size - 1, mixed.remainder(self.size - 1))

    def forward(self, ids: Int[Tensor, 'b n'], before: Int[Tensor, 'b n']) -> Float[Tensor, 'b n d']:
        return look_up(self.table, self.rows(ids, before), 'bigrams')


def token_rows(call: ModelArgs, rows: Rows, device: torch.device) -> Bool[Tensor, 'b n'] | None:
    """Which of the new tokens are no padding, as mask and starts of the call say; None: all."""
    mask = call.mask if call.lens is None else rows.before(call.lens)
    shown = None
    # what is wrong with a mask is said where the stack's mask is made
    if isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.ndim == 2 and mask.shape[1] >= rows.new:
        shown = mask[:, mask.shape[1] - rows.new :]
    if call.seq_start_pos is None:
        return shown
    behind = torch.arange(rows.new, device=device) + rows.seen >= call.seq_start_pos.unsqueeze(-1)
    return behind if shown is None else shown & behind


def one_before(new: Shaped[Tensor, 'b n c'], name: str, call: ModelArgs, rows: Rows) -> Tensor:
    """Of something per new token (b n c), that of the token before each of them; zeros where there is none, or padding.

    The cache holds it under ``name``; whoever makes the next one takes it from ``call.kept``.
    """
    tokens = token_rows(call, rows, new.device)
    if tokens is not None:
        new = new.masked_fill(~tokens.unsqueeze(-1), 0)
    last = new.new_zeros(new.shape[0], 1, new.shape[2])
    if rows.cached and call.cache is not None:
        past = call.cache.step(MODEL_STEP) if MODEL_STEP in call.cache.steps else None
        held = None if past is None else past.get(name)
        if past is None or held is None:
            raise ValueError(
                f'cache must hold the tokens that {name} looks back at, got keys and values alone. '
                'Continue from the cache that a call returned.'
            )
        # a window may have left nothing
        last = torch.cat((last, past.newest(held, 1, 0).to(new.dtype)), dim=1)[:, -1:]
        if call.cache.cursor is not None:
            past.extend(**{name: new})
    call.kept[name] = new
    return torch.cat((last, new), dim=1)[:, : new.shape[1]]


def store_kept(cache: KVCache, call: ModelArgs, rows: Rows) -> None:
    """Put what was kept of the new tokens into the cache that goes out, which has a row for each row of the stack."""
    if not call.kept or cache.cursor is not None:
        return
    front = 0 if rows.cached else rows.front
    cache.step(MODEL_STEP).extend(**{name: F.pad(new, (0, 0, front, 0)) for name, new in call.kept.items()})
