"""The floor: the least a transformer can be. Hand-written, pre-norm, on PyTorch's fused attention, with a static cache.

Nothing here is an option that is tested at run time beyond the two recipes, ``plain`` and ``modern``. It is the
yardstick of the benchmarks: what a researcher would write for one model, and nothing else.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Cache = list[tuple[Tensor, Tensor]]


class Attention(nn.Module):
    def __init__(
        self, dim: int, heads: int, kv_heads: int, dim_head: int, causal: bool, dim_context: int | None = None
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.causal = heads, kv_heads, causal
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_k = nn.Linear(dim_context or dim, kv_heads * dim_head, bias=False)
        self.to_v = nn.Linear(dim_context or dim, kv_heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(self, x: Tensor, angles: Tensor | None, cache: tuple[Tensor, Tensor] | None, at: int,
                mask: Tensor | None = None, context: Tensor | None = None) -> Tensor:  # fmt: skip
        source = x if context is None else context
        q = self.to_q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k = self.to_k(source).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        v = self.to_v(source).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        causal = self.causal and context is None and x.shape[1] > 1
        if cache is not None:
            keys, values = cache
            end = at + x.shape[1]
            keys[:, :, at:end], values[:, :, at:end] = k, v
            k, v = keys[:, :, :end], values[:, :, :end]
        grouped = self.kv_heads != self.heads
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
        return self.to_out(out.transpose(1, 2).flatten(2))


def rotate(t: Tensor, angles: Tensor) -> Tensor:
    """Rotary positions by complex multiplication; half of the channels are rotated."""
    r = 2 * angles.shape[-1]
    turned = torch.view_as_real(torch.view_as_complex(t[..., :r].unflatten(-1, (-1, 2))) * angles).flatten(-2)
    return torch.cat((turned, t[..., r:]), dim=-1)


class Norm(nn.Module):
    def __init__(self, dim: int, modern: bool) -> None:
        super().__init__()
        self.weight, self.modern = nn.Parameter(torch.ones(dim)), modern

    def forward(self, x: Tensor) -> Tensor:
        if self.modern:
            return F.rms_norm(x, self.weight.shape, self.weight)
        return F.layer_norm(x, self.weight.shape, self.weight)


class FeedForward(nn.Module):
    def __init__(self, dim: int, modern: bool) -> None:
        super().__init__()
        self.modern = modern
        self.up = nn.Linear(dim, 4 * dim * (2 if modern else 1))
        self.down = nn.Linear(4 * dim, dim, bias=not modern)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        if self.modern:
            value, gate = h.chunk(2, dim=-1)
            return self.down(value * F.silu(gate))
        return self.down(F.gelu(h))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, kv_heads: int, modern: bool, causal: bool, cross: bool) -> None:
        super().__init__()
        self.norm1, self.attn = Norm(dim, modern), Attention(dim, heads, kv_heads, 64, causal)
        self.cross = Attention(dim, heads, kv_heads, 64, False) if cross else None
        self.norm_cross = Norm(dim, modern) if cross else None
        self.norm2, self.ff = Norm(dim, modern), FeedForward(dim, modern)

    def forward(self, x: Tensor, angles: Tensor | None, cache: tuple[Tensor, Tensor] | None, at: int,
                mask: Tensor | None, context: Tensor | None) -> Tensor:  # fmt: skip
        x = x + self.attn(self.norm1(x), angles, cache, at, mask)
        if self.cross is not None and self.norm_cross is not None:
            x = x + self.cross(self.norm_cross(x), None, None, 0, context=context)
        return x + self.ff(self.norm2(x))

    def with_memory(self, x: Tensor, mem: Tensor | None, angles: Tensor, mask: Tensor | None) -> Tensor:
        attn, seen = self.attn, self.norm1(x)
        keys = seen if mem is None else torch.cat((self.norm1(mem), seen), dim=1)
        q = rotate(attn.to_q(seen).unflatten(-1, (attn.heads, -1)).transpose(1, 2), angles[-x.shape[1] :])
        k = rotate(attn.to_k(keys).unflatten(-1, (attn.kv_heads, -1)).transpose(1, 2), angles)
        v = attn.to_v(keys).unflatten(-1, (attn.kv_heads, -1)).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        x = x + attn.to_out(out.transpose(1, 2).flatten(2))
        return x + self.ff(self.norm2(x))


class Streams(nn.Module):
    """How one branch reads and writes several residual streams (hyper-connections), as its formulas stand in the paper.

    Every stream carries on the sum of all, as in x-transformers 2.16.1.
    """

    def __init__(self, dim: int, streams: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, bias=False)
        self.dynamic = nn.Linear(dim, 2, bias=False)
        self.static_alpha, self.static_beta = nn.Parameter(torch.zeros(streams, 1)), nn.Parameter(torch.ones(streams, 1))
        self.scale_alpha, self.scale_beta = nn.Parameter(torch.tensor(0.01)), nn.Parameter(torch.tensor(0.01))

    def read(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (b s n d): (what the branch is given, how much of its output each stream takes)."""
        alpha, beta = self.dynamic(self.norm(x)).unbind(-1)
        share = (self.static_alpha + self.scale_alpha * alpha).sigmoid()
        return (x * share[..., None]).sum(1), 2 * (self.static_beta + self.scale_beta * 2 * beta.sigmoid()).sigmoid()

    def write(self, x: Tensor, out: Tensor, beta: Tensor) -> Tensor:
        return x.sum(1, keepdim=True) + beta[..., None] * out[:, None]


class FloorStreams(nn.Module):
    """The plain recipe with several residual streams."""

    def __init__(self, *, vocabulary: int, length: int, streams: int = 4) -> None:
        super().__init__()
        self.floor, self.count = Floor(vocabulary=vocabulary, length=length), streams
        self.streams = nn.ModuleList(Streams(512, streams) for _ in range(2 * len(self.floor.blocks)))

    def loss(self, ids: Tensor) -> Tensor:
        floor = self.floor
        x = floor.embed(ids) + floor.positions.weight[: ids.shape[1]]
        x = x[:, None].expand(-1, self.count, -1, -1)
        steps = iter(self.streams)
        for block in floor.blocks:
            h, beta = (streams := next(steps)).read(x)
            x = streams.write(x, block.attn(block.norm1(h), None, None, 0), beta)
            h, beta = (streams := next(steps)).read(x)
            x = streams.write(x, block.ff(block.norm2(h)), beta)
        logits = floor.head(floor.norm(x.sum(1)))[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


class Floor(nn.Module):
    """Tokens in, logits out."""

    angles: Tensor

    def __init__(self, *, vocabulary: int, length: int, modern: bool = False, causal: bool = True, cross: bool = False,
                 dim: int = 512, depth: int = 6, heads: int = 8) -> None:  # fmt: skip
        super().__init__()
        kv_heads = 2 if modern else heads
        self.modern, self.kv_heads = modern, kv_heads
        self.embed = nn.Embedding(vocabulary, dim)
        self.positions = None if modern else nn.Embedding(length, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, kv_heads, modern, causal, cross) for _ in range(depth))
        self.norm = Norm(dim, modern)
        self.head = nn.Linear(dim, vocabulary, bias=False)
        pace = 10000.0 ** (-torch.arange(0, 32, 2) / 32)
        turns = torch.arange(length)[:, None] * pace
        self.register_buffer('angles', torch.polar(torch.ones_like(turns), turns), persistent=False)

    def cache(self, rows: int, length: int) -> Cache:
        return [
            (torch.zeros(rows, self.kv_heads, length, 64), torch.zeros(rows, self.kv_heads, length, 64)) for _ in self.blocks
        ]

    def hidden(self, ids: Tensor, cache: Cache | None = None, at: int = 0, mask: Tensor | None = None,
               context: Tensor | None = None) -> Tensor:  # fmt: skip
        n = ids.shape[1]
        x = self.embed(ids)
        if self.positions is not None:
            x = x + self.positions.weight[at : at + n]
        angles = self.angles[at : at + n] if self.modern else None
        key_mask = None if mask is None else mask[:, None, None, :]
        for index, block in enumerate(self.blocks):
            x = block(x, angles, None if cache is None else cache[index], at, key_mask, context)
        return self.norm(x)

    def forward(self, ids: Tensor, mask: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        return self.head(self.hidden(ids, mask=mask, context=context))

    def loss(self, ids: Tensor, context: Tensor | None = None) -> Tensor:
        logits = self(ids, context=context)[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    def segments_loss(self, ids: Tensor, length: int) -> Tensor:
        """Transformer-XL, modern recipe: each segment also looks at what entered the layers in the one before."""
        inputs, wanted = ids[:, :-1], ids[:, 1:]
        total, mems = ids.new_zeros((), dtype=torch.float32), [None] * len(self.blocks)
        for start in range(0, inputs.shape[1], length):
            x, heard = self.embed(inputs[:, start : start + length]), []
            n, held = x.shape[1], 0 if mems[0] is None else mems[0].shape[1]
            mask = torch.ones(n, held + n, dtype=torch.bool).tril(held) if held else None
            for block, mem in zip(self.blocks, mems, strict=True):
                heard.append(x.detach())
                x = block.with_memory(x, mem, self.angles[: held + n], mask)
            mems = heard
            logits = self.head(self.norm(x)).flatten(0, 1)
            total = total + F.cross_entropy(logits, wanted[:, start : start + length].flatten(), reduction='sum')
        return total / wanted.numel()

    @torch.no_grad()
    def generate(self, prompt: Tensor, steps: int) -> Tensor:
        """Greedy decoding with a static cache."""
        rows, start = prompt.shape
        cache = self.cache(rows, start + steps)
        out = torch.empty(rows, start + steps, dtype=torch.long)
        out[:, :start] = prompt
        unseen, at = prompt, 0
        for position in range(start, start + steps):
            logits = self.head(self.hidden(unseen, cache, at)[:, -1])
            out[:, position] = logits.argmax(dim=-1)
            unseen, at = out[:, position : position + 1], position
        return out[:, start:]


class FloorVision(nn.Module):
    """Patches in, classes out."""

    def __init__(self, *, image: int = 256, patch: int = 16, classes: int = 1000, dim: int = 512, depth: int = 6) -> None:
        super().__init__()
        self.patch = patch
        count, width = (image // patch) ** 2, 3 * patch**2
        self.norm_in, self.project, self.norm_out = Norm(width, False), nn.Linear(width, dim), Norm(dim, False)
        self.positions = nn.Parameter(torch.randn(1, count, dim))
        self.blocks = nn.ModuleList(Block(dim, 8, 8, False, False, False) for _ in range(depth))
        self.norm, self.head = Norm(dim, False), nn.Linear(dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        p = self.patch
        patches = images.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
        x = self.norm_out(self.project(self.norm_in(patches))) + self.positions
        for block in self.blocks:
            x = block(x, None, None, 0, None, None)
        return self.head(self.norm(x).mean(dim=1))
