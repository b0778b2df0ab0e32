"""Dynamically composable heads (DCMHA): the tokens determine how heads are mixed.

https://arxiv.org/abs/2405.08553
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.attention.of_tokens import Composition
from x_transformers.attention.parts import Seen
from x_transformers.attention.project import append_to_past, held_rows
from x_transformers.helpers import single
from x_transformers.module import ConstantLinear, Module
from x_transformers.tensor_types import Float

if TYPE_CHECKING:
    from x_transformers.attention.inputs import BranchInputs
    from x_transformers.flags.attention import AttentionFlags


class HeadMatrices(Module):
    """For each token two maps, heads -> ``rank`` -> heads, and a gate per head: (b n d) -> (b n (2 rank + 1) heads).

    The first map has root mean square 1 over the heads; the second and the gates start at zero.
    """

    def __init__(self, dim: int, heads: int, rank: int) -> None:
        super().__init__()
        self.heads, self.rank = heads, rank
        hidden = 2 * rank * heads
        self.to_hidden = nn.Linear(dim, hidden, bias=False)
        self.to_first = nn.Linear(hidden, rank * heads, bias=False)
        self.to_second = ConstantLinear(hidden, rank * heads, bias=False)
        self.to_gate = ConstantLinear(dim, heads, bias=False)

    def forward(self, x: Float[Tensor, 'b n d']) -> Float[Tensor, 'b n c']:
        hidden = F.gelu(self.to_hidden(x))
        first = single(self.to_first(hidden)).unflatten(-1, (self.rank, self.heads))
        first = F.rms_norm(first, (self.heads,), eps=1e-6).flatten(-2)
        second, gate = self.to_second(hidden), self.to_gate(x).tanh()
        return torch.cat((first.to(second.dtype), second, gate.to(second.dtype)), dim=-1)


class ComposeHeads(Module):
    """What queries and keys say, each before and behind the softmax. What keys have said is kept in the cache."""

    def __init__(self, dim: int, dim_context: int, heads: int, rank: int) -> None:
        super().__init__()
        self.scores_by_query, self.weights_by_query = (HeadMatrices(dim, heads, rank) for _ in range(2))
        self.scores_by_key, self.weights_by_key = (HeadMatrices(dim_context, heads, rank) for _ in range(2))

    @classmethod
    def from_flags(cls, dim: int, flags: AttentionFlags) -> ComposeHeads | None:
        if not flags.composable:
            return None
        return cls(dim, flags.dim_context or dim, flags.heads, flags.composable_rank)

    def forward(self, seen: Seen, inputs: BranchInputs) -> Composition:
        cross = inputs.context is not None
        if cross and inputs.past is not None and held_rows(inputs.past, 'compose'):
            of_keys = cast(Tensor, inputs.past.get('compose'))
        else:
            new = torch.cat((self.scores_by_key(seen.keys), self.weights_by_key(seen.keys)), dim=-1)
            (of_keys,) = append_to_past(inputs.past, seen.mems, cross, compose=new)
        return Composition(self.scores_by_query(seen.x), self.weights_by_query(seen.x), *of_keys.chunk(2, dim=-1))
