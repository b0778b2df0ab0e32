"""Mixers with one matrix per head as their state: the gated delta rule, and gated linear attention."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.helpers import without_autocast
from x_transformers.mixers.kernels import run_delta, run_gated
from x_transformers.module import Module, branch_output, empty_parameter
from x_transformers.norms import MultiheadRMSNorm
from x_transformers.tensor_types import Bool, Float

State = dict[str, Tensor]

# gates of gated linear attention are taken to this root, so that they stay near one
TEMPERATURE = 16.0


class LinearMixer(Module):
    """What both have in common: heads, a norm per head, a gate on the output, and the way out.

    forward: (b n dim), the state that an earlier call has returned, and which rows are tokens -> ((b n dim), state). Rows that
    are no tokens leave the state as it is. The recurrence runs in float32 or wider.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        dim_head: int = 64,
        value_dim_head: int | None = None,
        conv: int = 0,
        zero_init_output: bool = False,
    ) -> None:
        super().__init__()
        for name, value, low in (('heads', heads, 1), ('dim_head', dim_head, 1), ('conv', conv, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f'{name} must be a whole number from {low}, got {value!r}.')
        self.heads, self.dim_head = heads, dim_head
        self.value_dim_head = dim_head if value_dim_head is None else value_dim_head
        keys, values = heads * dim_head, heads * self.value_dim_head
        self.sizes = [keys, keys, values]
        self.to_qkv = nn.Linear(dim, sum(self.sizes), bias=False)
        self.conv = empty_parameter(sum(self.sizes), conv) if conv else None
        self.to_gate = nn.Linear(dim, values, bias=False)
        self.norm = MultiheadRMSNorm(self.value_dim_head, heads)
        self.to_out = branch_output(values, dim, False, zero=zero_init_output)

    @torch.no_grad()
    def init_own(self) -> None:
        if self.conv is not None:
            bound = self.conv.shape[-1] ** -0.5
            nn.init.uniform_(self.conv, -bound, bound)

    def muon_parameters(self) -> list[Tensor]:
        """The weight matrices."""
        return [module.weight for module in self.modules() if isinstance(module, nn.Linear)]

    def forward(
        self, x: Float[Tensor, 'b n d'], state: State | None = None, mask: Bool[Tensor, 'b n'] | None = None
    ) -> tuple[Float[Tensor, 'b n d'], State]:
        hidden = None if mask is None else ~mask.unsqueeze(-1)
        rows = self.to_qkv(x)
        rows = rows if hidden is None else rows.masked_fill(hidden, 0.0)
        rows, recent = self._convolved(rows, None if state is None else state.get('recent'))
        # a convolution gives rows that are no tokens something of their neighbours
        rows = rows if hidden is None or recent is None else rows.masked_fill(hidden, 0.0)
        wide = torch.promote_types(x.dtype, torch.float32)
        gates = self.gates(x)
        with without_autocast(x):
            q, k, v = (self._split(part.to(wide)) for part in rows.split(self.sizes, dim=-1))
            out, memory = self.recur(gates.to(wide), q, k, v, None if state is None else state['memory'], mask)
            # normed first: half precision may not hold what a memory answers
            out = self.norm(out).to(rows.dtype).transpose(1, 2).flatten(2)
        out = self.to_out(out * F.silu(self.to_gate(x)))
        return out, {'memory': memory, **({} if recent is None else {'recent': recent})}

    def gates(self, x: Float[Tensor, 'b n d']) -> Float[Tensor, 'b n c']:
        """The gates of each token, before their nonlinearity: a linear map of it."""
        raise NotImplementedError(f'{type(self).__name__} must have `gates`')

    def recur(
        self,
        gates: Float[Tensor, 'b n c'],
        q: Float[Tensor, 'b h n k'],
        k: Float[Tensor, 'b h n k'],
        v: Float[Tensor, 'b h n v'],
        memory: Float[Tensor, 'b h k v'] | None,
        mask: Bool[Tensor, 'b n'] | None,
    ) -> tuple[Float[Tensor, 'b h n v'], Float[Tensor, 'b h k v']]:
        """(what the memory answers at each token, the memory behind the last)."""
        raise NotImplementedError(f'{type(self).__name__} must have `recur`')

    def _split(self, t: Float[Tensor, 'b n c']) -> Float[Tensor, 'b h n d']:
        heads: Tensor = t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return heads

    def _convolved(
        self, rows: Float[Tensor, 'b n c'], recent: Float[Tensor, 'b w c'] | None
    ) -> tuple[Float[Tensor, 'b n c'], Float[Tensor, 'b w c'] | None]:
        """(a causal convolution of each channel and SiLU, the last rows for the next call)."""
        if self.conv is None:
            return rows, None
        n, past = rows.shape[1], self.conv.shape[-1] - 1
        before = rows.new_zeros(rows.shape[0], past, rows.shape[2]) if recent is None else recent.to(rows.dtype)
        whole = torch.cat((before, rows), dim=1)
        weight = self.conv.to(rows.dtype)
        out = sum((whole[:, step : step + n] * weight[:, step] for step in range(1, past + 1)), whole[:, :n] * weight[:, 0])
        return F.silu(out), whole[:, n:]


class GatedDeltaRule(LinearMixer):
    """The memory forgets, and what is written replaces what was stored under the same key, https://arxiv.org/abs/2412.06464.

    Queries, keys and values go through a causal convolution of ``conv`` tokens and SiLU; queries and keys have unit length.
    How much is forgotten and written is decided per token and head.
    """

    def __init__(self, dim: int, *, conv: int = 4, **settings: Any) -> None:
        super().__init__(dim, conv=conv, **settings)
        self.to_beta = nn.Linear(dim, self.heads, bias=False)
        self.to_decay = nn.Linear(dim, self.heads, bias=False)
        self.log_rate = empty_parameter(self.heads)
        self.decay_bias = empty_parameter(self.heads)
        self.init_own()

    @torch.no_grad()
    def init_own(self) -> None:
        """Heads forget at different paces: rates from 1 to 16, times a step from 0.001 to 0.1."""
        super().init_own()
        nn.init.uniform_(self.log_rate, 1.0, 16.0).log_()
        step = nn.init.uniform_(self.decay_bias, math.log(0.001), math.log(0.1)).exp()
        self.decay_bias.copy_(step + torch.log(-torch.expm1(-step)))

    def gates(self, x: Float[Tensor, 'b n d']) -> Float[Tensor, 'b n c']:
        return torch.cat((self.to_beta(x), self.to_decay(x)), dim=-1)

    def recur(
        self,
        gates: Float[Tensor, 'b n c'],
        q: Float[Tensor, 'b h n k'],
        k: Float[Tensor, 'b h n k'],
        v: Float[Tensor, 'b h n v'],
        memory: Float[Tensor, 'b h k v'] | None,
        mask: Bool[Tensor, 'b n'] | None,
    ) -> Any:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        written, decay = gates.chunk(2, dim=-1)
        beta = written.sigmoid().transpose(1, 2)
        step = F.softplus(decay + self.decay_bias.to(gates.dtype))
        log_decay = (-self.log_rate.to(gates.dtype).exp() * step).transpose(1, 2)
        if mask is not None:
            hidden = ~mask.unsqueeze(1)
            beta, log_decay = beta.masked_fill(hidden, 0.0), log_decay.masked_fill(hidden, 0.0)
        return run_delta(q * self.dim_head**-0.5, k, v, log_decay, beta, memory)


class GatedLinearAttention(LinearMixer):
    """The memory forgets each key channel at its own pace, which the token decides, https://arxiv.org/abs/2312.06635.

    The gates come from a bottleneck of ``rank`` features.
    """

    def __init__(self, dim: int, *, rank: int = 16, **settings: Any) -> None:
        super().__init__(dim, **settings)
        self.to_decay = nn.Sequential(nn.Linear(dim, rank, bias=False), nn.Linear(rank, self.sizes[0]))
        self.init_own()

    def gates(self, x: Float[Tensor, 'b n d']) -> Float[Tensor, 'b n c']:
        gates: Tensor = self.to_decay(x)
        return gates

    def recur(
        self,
        gates: Float[Tensor, 'b n c'],
        q: Float[Tensor, 'b h n k'],
        k: Float[Tensor, 'b h n k'],
        v: Float[Tensor, 'b h n v'],
        memory: Float[Tensor, 'b h k v'] | None,
        mask: Bool[Tensor, 'b n'] | None,
    ) -> Any:
        log_decay = self._split(F.logsigmoid(gates) / TEMPERATURE)
        if mask is not None:
            log_decay = log_decay.masked_fill(~mask[:, None, :, None], 0.0)
        return run_gated(q * self.dim_head**-0.5, k, v, log_decay, memory)


NAMED: dict[str, type[LinearMixer]] = {
    'gated_delta_rule': GatedDeltaRule,
    'gated_linear_attention': GatedLinearAttention,
}
