"""One token through a stack: its layers in the order of execution, with nothing left to ask."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.feedforward import GLU, ReluSquared
from x_transformers.helpers import identity, softclamp
from x_transformers.layers.branch import LayerScale, Scale
from x_transformers.layers.layer import Layer
from x_transformers.layers.residual import Norm, Residual
from x_transformers.module import ConstantLinear
from x_transformers.norms import MIN_LENGTH, LayerNorm, RMSNorm
from x_transformers.stepping.attention import AttentionStep, CrossStep, SelfStep
from x_transformers.tensor_types import Bool, Float

if TYPE_CHECKING:
    from x_transformers.cache.kv_cache import KVCache
    from x_transformers.layers.plan import Step
    from x_transformers.layers.stack import AttentionLayers
    from x_transformers.stepping.place import Place

Branch = Callable[[Tensor, 'Place'], Tensor]


# a CPU multiplies weights by so many tokens faster than tokens by weights
COLUMNS_PAY = range(6, 65)
POINTWISE = (nn.GELU, nn.SiLU, ReluSquared)


class FeedForwardStep:
    """The linear maps and activations of a feed-forward, without the dropouts between them."""

    def __init__(self, feedforward: nn.Module) -> None:
        parts = flattened(feedforward.ff)  # type: ignore[arg-type]
        self.parts = [part for part in parts if not isinstance(part, nn.Dropout)]
        self.in_columns = suits_columns(self.parts)

    def __call__(self, x: Float[Tensor, 'b 1 d'], place: Place) -> Float[Tensor, 'b 1 e']:
        if self.in_columns and x.shape[0] in COLUMNS_PAY and x.device.type == 'cpu':
            return columns_forward(self.parts, x.squeeze(1)).unsqueeze(1)
        for part in self.parts:
            x = part(x)
        return x


def suits_columns(parts: list[nn.Module]) -> bool:
    """Whether it is linear, activation, linear, and the activation does not care which axis is which."""
    *first, last = parts
    if type(last) not in (nn.Linear, ConstantLinear):
        return False
    match first:
        case [GLU() as gated]:
            return type(gated.act) in POINTWISE and not isinstance(gated.mult_bias, Tensor)
        case [nn.Linear(), activation]:
            return type(activation) in POINTWISE
    return False


def columns_forward(parts: list[Any], x: Float[Tensor, 'b d']) -> Float[Tensor, 'b e']:
    """``parts`` one after the other, with the tokens as columns."""
    first, *_, last = parts
    if isinstance(first, GLU):
        value, gate = times(first.proj, x.t()).chunk(2, dim=0)
        h = value * first.act(gate)
    else:
        h = parts[1](times(first, x.t()))
    return times(last, h).t().contiguous()


def times(linear: nn.Linear, columns: Float[Tensor, 'c b']) -> Float[Tensor, 'd b']:
    if linear.bias is None:
        return torch.mm(linear.weight, columns)
    return torch.addmm(linear.bias.unsqueeze(1), linear.weight, columns)


def flattened(sequential: nn.Module) -> list[nn.Module]:
    """The modules of a sequence, those of sequences inside it too."""
    found: list[nn.Module] = []
    for part in sequential.children():
        found += flattened(part) if isinstance(part, nn.Sequential) else [part]
    return found


def norm_step(norm: nn.Module) -> Norm:
    """A norm whose gain is made once, in one kernel; for norms of other kinds the module itself."""
    gain = norm.gain.detach() if isinstance(norm, (LayerNorm, RMSNorm)) else None
    if gain is None or gain.dtype not in (torch.float32, torch.float64):
        return norm
    if isinstance(norm, LayerNorm):
        return partial(F.layer_norm, normalized_shape=gain.shape, weight=gain)
    # the square of the least length is added where the definition takes the larger of the two: no difference in these numbers
    return partial(F.rms_norm, normalized_shape=gain.shape, weight=gain, eps=MIN_LENGTH**2 / len(gain))


class Scaled:
    """A branch whose output is multiplied, by a constant or by a gain per feature."""

    def __init__(self, wrapper: Scale | LayerScale, branch: Branch) -> None:
        self.wrapper, self.branch = wrapper, branch

    def __call__(self, x: Tensor, place: Place) -> Tensor:
        wrapper, out = self.wrapper, self.branch(x, place)
        return out * wrapper.value if isinstance(wrapper, Scale) else wrapper._scaled(out)


class LayerStep:
    """Norms, branch and residual path of one execution step."""

    def __init__(self, layer: Layer, branch: Branch, norm: Callable[[nn.Module], Norm]) -> None:
        self.layer, self.branch = layer, branch
        norms = layer.norms._modules
        self.before = None if norms['0'] is None else norm(norms['0'])
        residual = layer.residual
        sums = type(residual) is Residual and residual.residual_scale is None and residual.scale_residual_constant == 1.0
        self.plain = sums and self.before is not None and norms['1'] is None and norms['2'] is None

    def __call__(self, streams: Tensor, place: Place) -> Tensor:
        if self.plain and self.before is not None:
            return self.branch(self.before(streams), place) + streams
        layer = self.layer
        h, rest = layer.residual.read(streams)
        out = self.branch(h if self.before is None else self.before(h), place)
        return layer.norm_after(layer.residual.write(layer.norm_behind(out, None), rest), None)


class StackStep:
    """``AttentionLayers.run`` for one token that continues a cache.

    ``lasting``: it will be used again after the weights have changed, so that nothing may be made of them in advance.
    """

    def __init__(
        self,
        stack: AttentionLayers,
        cache: KVCache,
        room: int,
        context_mask: Bool[Tensor, 'b j'] | None = None,
        lasting: bool = False,
    ) -> None:
        self.stack = stack
        norm: Callable[[nn.Module], Norm] = identity if lasting else norm_step
        self.final_norm = norm(stack.final_norm)
        self.attentions: list[SelfStep] = []
        self.layers = [
            LayerStep(stack.layers[step.layer], self._branch(step, cache, room, context_mask), norm)  # type: ignore[arg-type]
            for step in stack.plan.steps()
        ]

    def _branch(self, step: Step, cache: KVCache, room: int, context_mask: Tensor | None) -> Branch:
        layer: Any = self.stack.layers[step.layer]
        wrappers, inside = [], layer.branch
        while inside is not layer.inside:
            wrappers.append(inside)
            inside = inside.fn
        branch: Branch
        if step.kind == 'f':
            branch = FeedForwardStep(inside)
        elif step.kind == 'c':
            branch = CrossStep(inside, cache.step(step.index), context_mask)
        else:
            stack = self.stack
            branch = SelfStep(inside, cache.step(step.index), room, stack.rel_pos is not None, stack.add_value_residual)
            self.attentions.append(branch)
        for wrapper in reversed(wrappers):
            branch = Scaled(wrapper, branch)
        return branch

    def take(self, cache: KVCache) -> None:
        """Another text: its keys and values into the same memory, zeros behind them."""
        steps = [step for step in self.stack.plan.steps() if step.kind == 'a']
        for step, attention in zip(steps, self.attentions, strict=True):
            held = cache.step(step.index)
            k, v = held.get('k'), held.get('v')
            if k is not None and v is not None:
                attention.fill(k, v)
                attention.silence(k.shape[2])

    @property
    def rows(self) -> int:
        """Rows of the memory, those in front too."""
        return self.attentions[0].keys.shape[2] if self.attentions else 0

    def widen(self, rows: int) -> None:
        for attention in self.attentions:
            attention.widen(rows)

    def __call__(self, x: Float[Tensor, 'b 1 d'], place: Place) -> Float[Tensor, 'b 1 d']:
        stack = self.stack
        streams = stack.streams.open(x, stack.stream_emb)
        for layer in self.layers:
            streams = layer(streams, place)
        if stack.softclamp_value is not None:
            streams = softclamp(streams, stack.softclamp_value)
        return stack.streams.close(streams, self.final_norm)


__all__ = ['AttentionStep', 'StackStep']
