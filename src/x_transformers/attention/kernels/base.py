"""The kernel interface: requirements, facts of a call, and arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from x_transformers.attention.geometry import ScoreShape
from x_transformers.attention.mask import Mask
from x_transformers.attention.of_tokens import Composition, PathSteps
from x_transformers.attention.scores.base import Form, ScoreRule, ScoreRules
from x_transformers.attention.scores.scalable import scaled_queries
from x_transformers.helpers import recall, remember
from x_transformers.position.bias import Bias, rendered_bias
from x_transformers.tensor_types import Bool, Float, Shaped


class Needs(NamedTuple):
    """What one ``Attend`` asks of a kernel, fixed when it is built: its rules, by what they need.

    ``weights`` is the function from scores to weights; ``whole`` and ``pointwise`` name the rules of that form, ``unfused``
    those that no fused kernel carries, each with the reason.
    """

    weights: str = 'softmax'
    whole: tuple[str, ...] = ()
    pointwise: tuple[str, ...] = ()
    sink: bool = False
    l2_distance: bool = False
    onnxable: bool = False
    unfused: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, rules: Iterable[type[ScoreRule]], *, onnxable: bool = False) -> Needs:
        """Of the rules that are on. A rule that says nothing of kernels is left to the reference."""
        rules = tuple(rules)

        def names(form: Form) -> tuple[str, ...]:
            return tuple(dict.fromkeys(rule.name for rule in rules if rule.form is form and rule.unfused is None))

        return cls(
            weights=next((rule.name for rule in rules if rule.form is Form.WEIGHTS), 'softmax'),
            whole=names(Form.WHOLE),
            pointwise=names(Form.POINTWISE),
            sink=bool(names(Form.SINK)),
            l2_distance='l2_distance' in names(Form.REWRITE),
            onnxable=onnxable,
            unfused=tuple(dict.fromkeys((rule.name, rule.unfused) for rule in rules if rule.unfused is not None)),
        )


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
    delta: bool = False
    return_scores: bool = False
    masked_heads: bool = False
    transformed: bool = False


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
    rules: Callable[[], ScoreRules]
    scale: float
    bias: Bias | None = None
    previous: Float[Tensor, 'b h n m'] | None = None
    rows: Bool[Tensor, 'b i'] | None = None
    delta: Float[Tensor, '... n m'] | None = None
    factor: Float[Tensor, '#b h #i 1'] | None = None
    composition: Composition | None = None
    steps: PathSteps | None = None
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
    # the precision that autocast wants, where it is on
    autocast: torch.dtype | None = None
    records: dict[str, Tensor] = field(default_factory=dict)

    @property
    def queries(self) -> Float[Tensor, 'b h i d']:
        """The queries as they meet the keys."""
        return self.q if self.factor is None else scaled_queries(self.q, self.factor)


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
    reasons = [f'{rule} needs the score matrix ({why})' for rule, why in needs.unfused]
    reasons += [f'{rule} needs whole rows or all heads of the score matrix' for rule in needs.whole if rule not in whole]
    if needs.weights not in (*weights, *(rule for rule, _ in needs.unfused)):
        reasons.append(f'{needs.weights} is not {"a softmax" if len(weights) == 1 else "one of " + ", ".join(weights)}')
    if call.transformed:
        reasons.append('torch.func and forward-mode differentiation look at plain operations only')
    if needs.onnxable:
        reasons.append('onnxable requires plain operations')
    if call.previous:
        reasons.append('the scores of the previous layer are added')
    if call.delta:
        reasons.append('something is added to the weights')
    return reasons


def regrouped(t: Shaped[Tensor, 'b (x y) i d'], first: int) -> Shaped[Tensor, 'b (y x) i d']:
    """Heads seen as (first, second), in the order (second, first)."""
    return t.view(t.shape[0], first, -1, *t.shape[2:]).transpose(1, 2).flatten(1, 2)


def merged_mask(
    mask: Mask, bias: Bias | None, geometry: ScoreShape, *, dtype: torch.dtype, device: torch.device, mask_value: float
) -> Float[Tensor, '#b #h #i j'] | None:
    """Bias and mask as one tensor to add, ``mask_value`` where nobody may look; None where there is neither.

    Made once for all layers; one that needs a gradient is made anew, so that checkpointed layers may run it again.
    """
    key = ('merged', geometry.queries, geometry.keys, geometry.front, dtype, mask_value, torch.is_grad_enabled())
    cached: tuple[Tensor | None] | None = recall(mask.memo, key, bias)
    if cached is not None:
        return cached[0]
    allowed = mask.rendered(geometry, device)
    added = None if bias is None else rendered_bias(bias, geometry).to(dtype)
    if allowed is not None:
        added = torch.zeros((), dtype=dtype, device=device) if added is None else added
        added = added.masked_fill(~allowed, mask_value) if added.ndim else torch.where(allowed, added, mask_value)
    if added is None or not added.requires_grad:
        remember(mask.memo, key, (added,), bias)
    return added
