"""Biases that depend on the distance of query and key."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from math import log
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from x_transformers.flags.base import FlagError
from x_transformers.helpers import is_any, recall, recomputed_part, remember, without_autocast
from x_transformers.module import Module, is_sharded
from x_transformers.norms import LayerNorm
from x_transformers.position.bias import Bias
from x_transformers.tensor_types import Float, Int

if TYPE_CHECKING:
    from x_transformers.attention.geometry import ScoreShape


class RelativeBias(Bias):
    """ALiBi, T5 or dynamic bias for one call.

    ``positions`` are those that the user gave, (j) or (b j), memories and cached keys included; without them keys are counted.
    ``queries``: numbers of the queries among them, if they are not the last. ``device``: of the tokens; None: that of the
    module, whose parameters may be elsewhere while it does not run. Raises ValueError if there are fewer positions than keys.
    """

    def __init__(
        self,
        module: nn.Module,
        positions: Int[Tensor, 'j'] | Int[Tensor, 'b j'] | None = None,
        queries: Int[Tensor, 'i'] | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.queries = queries
        self.module = cast('DistanceBias', module)
        self.device = self.module.device if device is None else device
        self.positions = positions

    def between(self, geometry: ScoreShape, start: int, stop: int) -> Float[Tensor, '#b h r j']:
        if self.positions is None:
            bias: Tensor = self.module.by_index(geometry.first + start, stop - start, geometry.own, self.device)
        else:
            positions = self.positions.shape[-1]
            if positions < geometry.own:
                raise ValueError(
                    f'pos must hold a position for each of the {geometry.own} keys, got {positions}. '
                    'Include positions for memories and cached tokens.'
                )
            keys = self.positions[..., positions - geometry.own :]
            if self.queries is None:
                queries = keys[..., geometry.first + start : geometry.first + stop]
            else:
                queries = keys.index_select(-1, self.queries[start:stop])
            bias = self.module.forward_custom_pos(queries, keys)
        return bias if bias.ndim == 4 else bias.unsqueeze(0)

    def strip(self, geometry: ScoreShape, rows: int, low: int, high: int) -> Float[Tensor, '1 h r m'] | None:
        if not self.by_distance:
            return None
        key = ('strip', rows, low, high, torch.is_grad_enabled(), recomputed_part())
        cached: Tensor | None = recall(self._rendered, key)
        if cached is None:
            cached = remember(self._rendered, key, self.module.by_index(-low, rows, high - low, self.device).unsqueeze(0))
        return cached

    @property
    def by_distance(self) -> bool:
        return self.positions is None

    @property
    def needs_gradient(self) -> bool:
        return any(parameter.requires_grad for parameter in self.module.parameters())

    def learns(self, geometry: ScoreShape) -> bool:
        return self.needs_gradient


# ---------------------------------------------------------------- biases by distance


def along_diagonals(values: Float[Tensor, 'h m'], i: int, j: int) -> Float[Tensor, 'h i j']:
    """``values[c - r + i - 1]`` at row r and column c, of i + j - 1 values.

    Row 0 begins with value number i - 1, and every later row one value further left.
    """
    if not torch.compiler.is_compiling():
        # what comes of it takes after the strides of what goes in, and one with heads or rows as its fastest axis would be slow
        return values.unfold(-1, j, 1).flip(-2).contiguous()
    # the window of ``unfold`` has one size for ever; so here rows of i + j values are written one after the other and read in
    # rows of i + j - 1, by which each begins one value earlier
    place = torch.arange(i + j, device=values.device)
    last, numbers = place[-1:], place + (i - 1)
    # a remainder, in operations of tensors alone: exporters know no other one by an open length
    numbers = numbers - (numbers > last) * (last + 1)
    turned = values.index_select(-1, numbers.clamp(max=i + j - 2))
    flat = turned.unsqueeze(-2).expand(-1, i, -1).reshape(values.shape[0], i * (i + j))
    return flat[:, : i * (i + j - 1)].view(values.shape[0], i, i + j - 1)[..., :j].contiguous()


class DistanceBias(Module):
    """A bias that depends on key position minus query position only, and not on the input.

    forward: (i, j) -> (h i j), i queries right-aligned with j keys.
    """

    def forward(self, i: int, j: int) -> Float[Tensor, 'h i j']:
        return self.by_index(j - i, i, j, self.device)

    def by_index(self, first: int, i: int, j: int, device: torch.device) -> Float[Tensor, 'h i j']:
        """Queries at first … first+i-1, keys at 0 … j-1.

        There are i + j - 1 distances, so that many numbers are computed and laid out along the diagonals.
        """
        if i == 0 or j == 0:
            none = self.of_distances(torch.zeros(1, dtype=torch.long, device=device))
            return none.new_zeros(none.shape[0], i, j)
        distances = torch.arange(i + j - 1, device=device) - (first + i - 1)
        return along_diagonals(self.of_distances(distances).contiguous(), i, j)

    def of_distances(self, distances: Int[Tensor, 'm']) -> Float[Tensor, 'h m']:
        raise NotImplementedError

    def forward_custom_pos(
        self,
        pos_i: Int[Tensor, 'i'] | Int[Tensor, 'b i'] | Int[Tensor, 'b h i'],
        pos_j: Int[Tensor, 'j'] | Int[Tensor, 'b j'] | Int[Tensor, 'b h j'] | None = None,
    ) -> Float[Tensor, 'h i j'] | Float[Tensor, 'b h i j']:
        """The same for positions that are given, one for all heads or one for each; keys are at those of the queries unless
        told."""
        pos_j = pos_i if pos_j is None else pos_j
        for name, pos in (('pos_i', pos_i), ('pos_j', pos_j)):
            if pos.ndim not in (1, 2, 3):
                raise ValueError(f'{name} must be positions (n), (b n) or (b h n), got shape {tuple(pos.shape)}.')
        distances = pos_j.unsqueeze(-2) - pos_i.unsqueeze(-1)
        if distances.ndim == 4:
            return self.of_heads(distances)
        bias = self.of_distances(distances.flatten())
        return bias.reshape(bias.shape[0], *distances.shape).movedim(0, -3)

    def of_heads(self, distances: Int[Tensor, 'b h i j']) -> Float[Tensor, 'b h i j']:
        """Each head at distances of its own."""
        raise ValueError(
            f'pos must be (tokens,) or (batch, tokens) for a {type(self).__name__}, got (b h n), positions for each head. '
            'Use alibi_pos_bias=True.'
        )

    @property
    def device(self) -> torch.device:
        return next(iter((*self.parameters(), *self.buffers()))).device


class RelativePositionBias(DistanceBias):
    """A learned number for each head and bucket of distances, as in T5, https://arxiv.org/abs/1910.10683, times ``scale``.

    Near distances have a bucket each, those up to ``max_distance`` share buckets of logarithmic width, all beyond are in the
    last.
    Not causal: half of the buckets are for keys that come later.
    """

    def __init__(
        self, scale: float, causal: bool = False, num_buckets: int = 32, max_distance: int = 128, heads: int = 8
    ) -> None:
        super().__init__()
        self.scale = scale
        self.causal = causal
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.relative_attention_bias = nn.Embedding(num_buckets, heads)

    def buckets(self, distances: Int[Tensor, '...']) -> Int[Tensor, '...']:
        """The bucket of each distance, key minus query."""
        back = -distances
        if self.causal:
            buckets, base = self.num_buckets, torch.zeros_like(back)
            back = back.clamp(min=0)
        else:
            buckets = self.num_buckets // 2
            base = (back < 0).long() * buckets
            back = back.abs()
        exact = buckets // 2
        growth = (back.clamp(min=max(exact, 1)).float() / max(exact, 1)).log() / log(self.max_distance / max(exact, 1))
        shared = exact + (growth * (buckets - exact)).long()
        return base + torch.where(back < exact, back, shared.clamp(max=buckets - 1))

    def of_distances(self, distances: Int[Tensor, 'm']) -> Float[Tensor, 'h m']:
        values: Tensor = self.relative_attention_bias(self.buckets(distances))
        return values.t() * self.scale


def in_precision(module: nn.Module, x: Float[Tensor, 'm c'], dtype: torch.dtype) -> Float[Tensor, 'm d']:
    """``module(x)``, computed with its parameters in a wider precision. Where these are elsewhere now, in their own."""
    held = {name: t for name, t in chain(module.named_parameters(), module.named_buffers()) if t.is_floating_point()}
    if all(t.dtype == dtype for t in held.values()):
        out: Tensor = module(x)
    elif any(t.is_meta for t in held.values()) or is_sharded(module):
        out = module(x.to(next(iter(held.values())).dtype)).to(dtype)
    else:
        out = functional_call(module, {name: t.to(dtype) for name, t in held.items()}, (x,))
    return out


class DynamicPositionBias(DistanceBias):
    """A bias that a small network computes from the distance (of its logarithm, with ``log_distance``).

    https://arxiv.org/abs/2108.00154, https://arxiv.org/abs/2111.09883. Raises FlagError if ``depth`` is less than 1.
    """

    def __init__(self, dim: int, *, heads: int, depth: int, log_distance: bool = False, norm: bool = False) -> None:
        super().__init__()
        if depth < 1:
            raise FlagError(f'depth must be at least 1, got {depth}. Give the network of the dynamic position bias a layer.')
        self.log_distance = log_distance
        layers: list[nn.Module] = []
        for index in range(depth):
            linear = nn.Linear(dim if index else 1, dim)
            norms = [nn.LayerNorm(dim) if index else LayerNorm(dim)] if norm else []
            layers.append(nn.Sequential(linear, *norms, nn.SiLU()))
        self.mlp = nn.ModuleList([*layers, nn.Linear(dim, heads)])

    def of_distances(self, distances: Int[Tensor, 'm']) -> Float[Tensor, 'h m']:
        weight = cast(nn.Linear, self.mlp[-1]).weight
        single = torch.promote_types(weight.dtype, torch.float32)
        back = (-distances).to(single)
        if self.log_distance:
            back = back.sign() * (back.abs() + 1.0).log()
        hidden = back.unsqueeze(-1)
        # half precision knows no odd number above 256, or 2048
        with without_autocast(hidden):
            for layer in self.mlp:
                hidden = in_precision(layer, hidden, single)
        return hidden.t()


class AlibiPositionalBias(DistanceBias):
    """Minus the distance, times a slope for each head, https://arxiv.org/abs/2108.12409.

    The first ``heads`` of ``total_heads`` have slopes: powers of two, or those given. The others are not biased.
    Raises FlagError if ``slopes`` are not one for each head, or if there are more heads than total heads.
    """

    slopes: Tensor

    def __init__(self, heads: int, total_heads: int | None = None, slopes: Sequence[float] | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.total_heads = heads if total_heads is None else total_heads
        self.given_slopes = None if slopes is None else [float(slope) for slope in slopes]
        if not 0 < heads <= self.total_heads:
            raise FlagError(f'heads must lie in 1 to {self.total_heads}, all heads, got {heads}. Give ALiBi fewer.')
        if self.given_slopes is not None and len(self.given_slopes) != heads:
            raise FlagError(
                f'slopes must have one entry for each of {heads} heads, got {len(self.given_slopes)}. Give one for each.'
            )
        self.register_buffer('slopes', torch.empty(self.total_heads, 1, 1), persistent=False)
        self.init_own()

    @staticmethod
    def slopes_of(heads: int) -> list[float]:
        """Powers of ``2 ** (-8 / heads)``; unless ``heads`` is a power of two, some of twice as many heads fill the gap."""
        power = 1 << (heads.bit_length() - 1)
        slopes = [2.0 ** (-8.0 * (h + 1) / power) for h in range(power)]
        if power == heads:
            return slopes
        return slopes + AlibiPositionalBias.slopes_of(2 * power)[0::2][: heads - power]

    def init_own(self) -> None:
        slopes = self.given_slopes or self.slopes_of(self.heads)
        slopes = slopes + [0.0] * (self.total_heads - self.heads)
        self.slopes.copy_(torch.tensor(slopes, device=self.slopes.device).view(-1, 1, 1))

    def of_distances(self, distances: Int[Tensor, 'm']) -> Float[Tensor, 'h m']:
        return -distances.abs() * self.slopes.squeeze(-1)

    def of_heads(self, distances: Int[Tensor, 'b h i j']) -> Float[Tensor, 'b h i j']:
        heads = distances.shape[1]
        if not is_any(heads, 1, self.heads, self.total_heads):
            raise ValueError(
                f'pos must have positions for each of the {self.heads} heads that are biased, (batch, {self.heads}, tokens), '
                f'got {heads} heads'
            )
        biased = -distances[:, : self.heads].abs() * self.slopes[: self.heads]
        return F.pad(biased, (0, 0, 0, 0, 0, self.total_heads - self.heads))
