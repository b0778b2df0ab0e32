"""Forgetting attention: a bias that depends on the tokens, through gates that suppress earlier keys.

https://openreview.net/forum?id=q2Lnyegkr8. A gate lies between each token and the one before; a query sees a key through all
gates between the two, so their logarithms add up. The gates (or what makes them) of earlier tokens are kept in the cache, and
those of memories are computed from the memories, so that a sequence in pieces gives what it gives in whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.attention.geometry import ScoreShape
from x_transformers.flags.base import FlagError
from x_transformers.module import Module
from x_transformers.position.bias import Bias, DenseBias
from x_transformers.tensor_types import Bool, Float, Int

if TYPE_CHECKING:
    from x_transformers.cache.layer_cache import LayerCache


class GateLinear(nn.Linear):
    """A linear map whose bias starts at one value."""

    def __init__(self, dim_in: int, dim_out: int, bias_value: float) -> None:
        self.bias_value = bias_value
        super().__init__(dim_in, dim_out)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.constant_(self.bias, self.bias_value)


class ForgetBias(Bias):
    """Differences of running sums of log gates: from the key up to the query, and for keys that come later, from query to key.

    ``sums`` (b h j) and ``later`` (b h j), None if there are no later keys, cover all own keys; queries are the last ones, or
    those with the numbers ``queries``.
    """

    def __init__(
        self, sums: Float[Tensor, 'b h j'], later: Float[Tensor, 'b h j'] | None, queries: Int[Tensor, 'i'] | None = None
    ) -> None:
        super().__init__()
        self.sums = sums
        self.later = later
        self.queries = queries

    def between(self, geometry: ScoreShape, start: int, stop: int) -> Float[Tensor, 'b h r j']:
        def rows(t: Float[Tensor, '... n']) -> Tensor:
            if self.queries is not None:
                return t.index_select(-1, self.queries[start:stop])
            return t[..., geometry.first + start : geometry.first + stop]

        bias = rows(self.sums).unsqueeze(-1) - self.sums.unsqueeze(-2)
        if self.later is None:
            return bias
        ahead = self.later.unsqueeze(-2) - rows(self.later).unsqueeze(-1)
        index = torch.arange(geometry.own, device=bias.device)
        return torch.where(index <= rows(index).unsqueeze(-1), bias, ahead)


class ForgetGates(Module):
    """What both kinds of gates share. forward: (b n dim) -> (b heads n n), the bias of a whole sequence."""

    # forget gates stand in the place of any other bias
    replaces = True

    def forward(self, x: Float[Tensor, 'b n d']) -> Float[Tensor, 'b h n n']:
        return self.bias(x).render(ScoreShape(x.shape[-2], x.shape[-2]))

    def bias(
        self,
        x: Float[Tensor, 'b n d'] | Float[Tensor, '3 b n d'],
        past: LayerCache | None = None,
        mem: Float[Tensor, 'b l d'] | None = None,
        keys: Bool[Tensor, 'b j'] | None = None,
    ) -> Bias:
        """For the new tokens ``x`` (of three views, the queries') behind the memories and the tokens of the cache.

        Keys that nobody sees, where ``keys`` is False, stand in nobody's way: their gates are open.
        """
        raise NotImplementedError(f'{type(self).__name__} must have a `bias`')


class DataDependentAlibi(ForgetGates):
    """One gate for each token and head; not causal: a second one for looking ahead.

    The gates start nearly open: their bias is ``bias_init``. ``post_log_scale`` multiplies their logarithms.
    forward: (b n dim) -> (b heads n n). ``bias``: the same for a branch with a cache or memories.
    """

    def __init__(self, dim: int, heads: int, causal: bool = True, bias_init: float = 5.0, post_log_scale: float = 1.0) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.post_log_scale = post_log_scale
        self.to_forget_gates = nn.Sequential(GateLinear(dim, heads if causal else heads * 2, bias_init), nn.LogSigmoid())

    def bias(
        self,
        x: Float[Tensor, 'b n d'] | Float[Tensor, '3 b n d'],
        past: LayerCache | None = None,
        mem: Float[Tensor, 'b l d'] | None = None,
        keys: Bool[Tensor, 'b j'] | None = None,
    ) -> Bias:
        new = self.gates(_first_view(x))
        queries = placed_queries(past, new.shape[-2], mem)
        if keys is not None:
            shown = keys[:, keys.shape[1] - new.shape[-2] :] if queries is None else keys.index_select(1, queries)
            new = new.masked_fill(~shown.unsqueeze(-1), 0.0)
        sums = new.cumsum(dim=-2)
        if past is not None:
            # a running sum needs no more than its last value to go on
            before = past.get('forget')
            check_gates(past, before, new.shape[-2])
            sums = sums if before is None else sums + past.newest(before, 1, 0)
            (sums,) = past.extend(forget=sums)
        if mem is not None:
            of_mem = self.gates(mem)
            if keys is not None:
                of_mem = of_mem.masked_fill(~keys[:, : mem.shape[1]].unsqueeze(-1), 0.0)
            of_mem = of_mem.cumsum(dim=-2)
            sums = torch.cat((of_mem - of_mem[..., -1:, :], sums), dim=-2)
        sums = sums.transpose(-1, -2)
        if self.causal:
            return ForgetBias(sums, None, queries)
        back, ahead = sums.chunk(2, dim=-2)
        return ForgetBias(back, ahead, queries)

    def gates(self, x: Float[Tensor, 'b n d']) -> Float[Tensor, 'b n g']:
        """Logarithms, in float32 or wider, for many of them are added up."""
        logs: Tensor = self.to_forget_gates(x) * self.post_log_scale
        return logs.to(torch.promote_types(logs.dtype, torch.float32))


class PerRowDataDependentAlibi(ForgetGates):
    """A gate for each pair of query and key: small queries and keys of ``dim_head`` channels decide how far it is open.

    forward: (b n dim) -> (b heads n n); ``bias``: the same for a branch with a cache or memories.
    Raises FlagError unless ``causal``: there is no gate that looks ahead.
    """

    def __init__(self, dim: int, heads: int, causal: bool = True, dim_head: int = 8, post_log_scale: float = 1.0) -> None:
        super().__init__()
        if not causal:
            raise FlagError(
                'causal must be True with data_dependent_alibi_per_row, whose gates look back only. Use causal=True, or '
                'leave it out.'
            )
        self.heads = heads
        self.dim_head = dim_head
        self.scale = dim_head**-0.5
        self.post_log_scale = post_log_scale
        self.to_forget_gates = nn.Sequential(nn.Linear(dim, heads * dim_head * 2, bias=False))

    def bias(
        self,
        x: Float[Tensor, 'b n d'] | Float[Tensor, '3 b n d'],
        past: LayerCache | None = None,
        mem: Float[Tensor, 'b l d'] | None = None,
        keys: Bool[Tensor, 'b j'] | None = None,
    ) -> Bias:
        q, k = self.heads_of(_first_view(x))
        if past is not None:
            check_gates(past, past.get('forget'), k.shape[-2])
            (k,) = past.extend(forget=k)
        if mem is not None:
            k = torch.cat((self.heads_of(mem)[1], k), dim=-2)
        i, j = q.shape[-2], k.shape[-2]
        logs = F.logsigmoid((q @ k.transpose(-1, -2)) * self.scale) * self.post_log_scale
        logs = logs.to(torch.promote_types(logs.dtype, torch.float32))
        index = torch.arange(j, device=x.device)
        queries = placed_queries(past, i, mem)
        queries = index[j - i :] if queries is None else queries
        logs = logs.masked_fill(index >= queries.unsqueeze(-1), 0.0)
        if keys is not None:
            logs = logs.masked_fill(~keys[:, None, None, :], 0.0)
        # added up from the query back to the key
        return DenseBias(logs.flip(-1).cumsum(dim=-1).flip(-1))

    def heads_of(self, x: Float[Tensor, 'b n d']) -> tuple[Float[Tensor, 'b h n c'], Float[Tensor, 'b h n c']]:
        """Small queries and keys."""
        both: Tensor = self.to_forget_gates(x)
        q, k = both.view(*both.shape[:-1], 2, self.heads, self.dim_head).unbind(-3)
        return q.transpose(-2, -3), k.transpose(-2, -3)


def check_gates(past: LayerCache, gates: Float[Tensor, 'b ...'] | None, new: int) -> None:
    """Raise ValueError if the cache has keys of earlier tokens, but not their gates."""
    if gates is None and past.length > new:
        raise ValueError(
            'the cache must hold the forget gates of earlier tokens, got keys alone. Continue from the cache that a call '
            'returned, not from a cached_kv set by hand.'
        )


def placed_queries(past: LayerCache | None, new: int, mem: Float[Tensor, 'b l d'] | None) -> Int[Tensor, 'i'] | None:
    """Numbers of the new tokens among memories and cached rows, where they are not the last ones."""
    if past is None or past.cursor is None:
        return None
    rows = past.cursor.rows(0, new)
    return rows if mem is None else rows + mem.shape[1]


def _first_view(x: Float[Tensor, '... n d']) -> Tensor:
    return x[0] if x.ndim == 4 else x
