"""PaTH: each token contributes one transformation between an earlier key and a later query. https://arxiv.org/abs/2505.16381"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from x_transformers.attention.of_tokens import PathSteps
from x_transformers.helpers import l2norm
from x_transformers.module import Module, empty_parameter
from x_transformers.position.forgetting import placed_queries
from x_transformers.tensor_types import Bool, Float, Int

if TYPE_CHECKING:
    from x_transformers.attention.inputs import BranchInputs
    from x_transformers.cache.layer_cache import LayerCache
    from x_transformers.flags.attention import AttentionFlags

TAPS = 3


class HouseholderSteps(Module):
    """A unit vector w and a strength β in (0, 2) for each token and key head, of which H = I - β w wᵀ is made.

    w is a map of the token through ``rank`` channels, mixed with that of the two tokens before. Tokens that a mask hides change
    nothing, and are not mixed in. The cache keeps w and β, and what the mixture needs of the newest tokens.
    """

    def __init__(self, dim: int, kv_heads: int, dim_head: int, rank: int) -> None:
        super().__init__()
        self.kv_heads = kv_heads
        self.to_vectors = nn.Sequential(nn.Linear(dim, rank, bias=False), nn.Linear(rank, kv_heads * dim_head, bias=False))
        self.taps = empty_parameter(TAPS, kv_heads * dim_head)
        self.to_strength = nn.Linear(dim, kv_heads)
        self.init_own()

    @classmethod
    def from_flags(cls, dim: int, flags: AttentionFlags) -> HouseholderSteps | None:
        return cls(dim, flags.num_kv_heads, flags.dim_head, flags.path_rank) if flags.path else None

    @torch.no_grad()
    def init_own(self) -> None:
        nn.init.uniform_(self.taps, -(TAPS**-0.5), TAPS**-0.5)

    def forward(self, x: Float[Tensor, 'b n d'], inputs: BranchInputs) -> PathSteps:
        past, keys, mem = inputs.past, inputs.mask.keys, inputs.mem
        n, mems = x.shape[-2], 0 if mem is None else mem.shape[-2]
        queries = placed_queries(past, n, mem)
        shown = None if keys is None else keys[:, -n:] if queries is None else keys.index_select(1, queries)
        vectors = hidden_as_zero(self.to_vectors(x), shown)
        whole = vectors if past is None else past.extend(path_input=vectors)[0]
        parts = []
        if mem is not None:
            shown_mem = None if keys is None else keys[:, :mems]
            of_mem = hidden_as_zero(self.to_vectors(mem), shown_mem)
            whole = torch.cat((of_mem, whole), dim=-2)
            parts.append(self.steps(self.mixed(of_mem, mems), mem, shown_mem))
        new = self.steps(self.mixed(newest(whole, n, past, mems), n), x, shown)
        parts.append(new if past is None else past.extend(path=new)[0])
        steps = torch.cat(parts, dim=-2) if mem is not None else parts[0]
        return PathSteps(steps[..., :-1], steps[..., -1], queries)

    def mixed(self, vectors: Float[Tensor, 'b m c'], n: int) -> Float[Tensor, 'b n c']:
        """Each of the last n with its two neighbours before; zeros in the place of those that there are not."""
        padded = nn.functional.pad(vectors, (0, 0, max(n + TAPS - 1 - vectors.shape[-2], 0), 0))
        taps = self.taps.to(padded.dtype)
        mixed = padded[..., :n, :] * taps[0]
        for tap in range(1, TAPS):
            mixed = mixed + padded[..., tap : tap + n, :] * taps[tap]
        return mixed

    def steps(
        self, vectors: Float[Tensor, 'b n c'], x: Float[Tensor, 'b n d'], shown: Bool[Tensor, 'b n'] | None
    ) -> Float[Tensor, 'b kh n e']:
        """w, and β as one more channel, as the cache keeps them: never less exact than float32, for many are multiplied."""
        wide = torch.promote_types(vectors.dtype, torch.float32)
        w = l2norm(vectors.to(wide).unflatten(-1, (self.kv_heads, -1)))
        strength = hidden_as_zero(2 * self.to_strength(x).to(wide).sigmoid(), shown)
        return torch.cat((w, strength.unsqueeze(-1)), dim=-1).transpose(1, 2)


def hidden_as_zero(t: Float[Tensor, 'b n c'], shown: Bool[Tensor, 'b n'] | None) -> Float[Tensor, 'b n c']:
    return t if shown is None else t.masked_fill(~shown.unsqueeze(-1), 0.0)


def newest(whole: Float[Tensor, 'b m c'], n: int, past: LayerCache | None, mems: int) -> Float[Tensor, 'b k c']:
    """The rows of the n newest tokens and of the two before them, as far as there are any. Memories lie in front."""
    before = TAPS - 1
    if past is None or past.cursor is None:
        return whole[..., max(0, whole.shape[-2] - n - before) :, :]
    rows: Int[Tensor, ' k'] = past.cursor.rows(before, n) + mems
    return whole.index_select(-2, rows.clamp(min=0)).masked_fill((rows < 0).unsqueeze(-1), 0.0)
