"""What a kernel is told, and what it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from x_transformers.attention.geometry import ScoreShape
from x_transformers.attention.mask import Mask
from x_transformers.attention.scores.base import ScoreRules
from x_transformers.tensor_types import Float

if TYPE_CHECKING:
    from x_transformers.position.relative import Bias


class Needs(NamedTuple):
    """What one ``Attend`` asks of a kernel, fixed when it is built.

    ``whole`` and ``pointwise`` name the rules of that form, ``weights`` the function that turns scores into weights.
    """

    weights: str = 'softmax'
    whole: tuple[str, ...] = ()
    pointwise: tuple[str, ...] = ()
    sink: bool = False
    l2_distance: bool = False
    onnxable: bool = False


class CallFacts(NamedTuple):
    """What one call asks of a kernel: no tensor's values, only facts known beforehand."""

    device: str
    dtype: torch.dtype
    gradients: bool
    dropout: bool
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    geometry: ScoreShape
    plain_causal: bool = False
    masked: bool = False
    windowed: bool = False
    causal: bool = False
    packed: bool = False
    biased: bool = False
    learned_bias: bool = False
    by_distance: bool = False
    previous: bool = False
    return_scores: bool = False
    masked_heads: bool = False


# what mixes heads: scores before the softmax, weights behind it, scores that weights are multiplied by
Mixers = tuple[Float[Tensor, 'h h'] | None, Float[Tensor, 'h h'] | None, Float[Tensor, 'h h'] | None]
NO_MIXERS: Mixers = (None, None, None)


@dataclass
class KernelArgs:
    """Everything a kernel works on. Zero keys are already in front; causality is in the mask."""

    q: Float[Tensor, 'b h i d']
    k: Float[Tensor, 'b kh j d']
    v: Float[Tensor, 'b kh j e']
    mask: Mask
    geometry: ScoreShape
    rules: Callable[[float], ScoreRules]
    scale: float
    bias: Bias | None = None
    previous: Float[Tensor, 'b h i j'] | None = None
    sink: Float[Tensor, 'h'] | None = None
    softclamp: float | None = None
    sigmoid: bool = False
    topk: int | None = None
    mixers: Mixers = NO_MIXERS
    l2_distance: bool = False
    dropout: float = 0.0
    backends: tuple[str, ...] | None = None
    return_attn: bool = False
    return_scores: bool = False
    records: dict[str, Tensor] = field(default_factory=dict)


class Kernel(Protocol):
    """A way to run attention. ``refusals`` are reasons why it cannot, ``reservations`` why another should be preferred."""

    name: str

    def refusals(self, needs: Needs, call: CallFacts) -> tuple[str, ...]: ...

    def reservations(self, needs: Needs, call: CallFacts) -> tuple[str, ...]: ...

    def __call__(self, args: KernelArgs) -> Float[Tensor, 'b h i e']: ...


def usual_refusals(
    needs: Needs, call: CallFacts, *, weights: tuple[str, ...] = ('softmax',), whole: tuple[str, ...] = ()
) -> list[str]:
    """What a fused kernel cannot do unless it says so: other weights than ``weights``, rules on whole rows but ``whole``."""
    reasons = [f'{rule} needs whole rows or all heads of the score matrix' for rule in needs.whole if rule not in whole]
    if needs.weights not in weights:
        reasons.append(f'{needs.weights} is not {"a softmax" if len(weights) == 1 else "one of " + ", ".join(weights)}')
    if needs.onnxable:
        reasons.append('onnxable asks for plain operations')
    if call.previous:
        reasons.append('the scores of the layer before are added')
    return reasons


def autocast_dtype(t: Tensor) -> torch.dtype | None:
    """The precision that autocast wants, where it is on (it is not defined on the meta device)."""
    kind = t.device.type
    if kind == 'meta' or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def regrouped(t: Float[Tensor, 'b (x y) i d'], first: int) -> Float[Tensor, 'b (y x) i d']:
    """Heads seen as (first, second), in the order (second, first)."""
    return t.view(t.shape[0], first, -1, *t.shape[2:]).transpose(1, 2).flatten(1, 2)


def tiled(t: Float[Tensor, 'b kh j d'], heads: int) -> Float[Tensor, 'b h j d']:
    """Keys or values for every query head: query head h looks at head h mod kv_heads. One head broadcasts."""
    kv_heads = t.shape[1]
    return t if kv_heads in (1, heads) else t.repeat(1, heads // kv_heads, 1, 1)
