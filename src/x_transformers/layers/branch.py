"""Wrappers around a branch: scales of its output, shifts of its input.

Each wrapper holds the branch as ``fn``, hands on the keywords that it is called with, and changes only the first of several
outputs. A stack gives all keywords at once, as ``around``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from x_transformers.convolution import CausalConvolution
from x_transformers.helpers import default, pad_at_dim, under_transform
from x_transformers.layers.slots import call_branch
from x_transformers.module import ConstantLinear, Module, empty_parameter, is_heard
from x_transformers.tensor_types import Bool, Float

if TYPE_CHECKING:
    from x_transformers.attention.inputs import BranchInputs
    from x_transformers.cache.layer_cache import LayerCache


def change_first(out: Any, change: Callable[[Float[Tensor, '... d']], Float[Tensor, '... d']]) -> Any:
    """``change`` applied to a result, or to the first entry of several."""
    if isinstance(out, tuple):
        return (change(out[0]), *out[1:])
    return change(out)


def handed_on(branch: nn.Module, x: Float[Tensor, '... n d'], keywords: dict[str, Any]) -> Any:
    """The branch with the keywords that a wrapper was called with."""
    around: BranchInputs | None = keywords.get('around')
    return branch(x, **keywords) if around is None else call_branch(branch, x, around)


def run_checkpointed(branch: nn.Module, x: Float[Tensor, '... n d'], around: BranchInputs) -> Any:
    """``call_branch`` that keeps x and runs again for its gradients (a compiler decides for itself what to keep).

    Transforms of ``torch.func`` cannot run a part again.
    """
    if around.past is not None or not torch.is_grad_enabled() or torch.compiler.is_compiling() or under_transform():
        return call_branch(branch, x, around)
    from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

    # a second run that stops where all is there again would leave out the hooks at the end
    with set_checkpoint_early_stop(not any(map(is_heard, branch.modules()))):
        return checkpoint(call_branch, branch, x, around, use_reentrant=False)


def innermost(branch: nn.Module) -> nn.Module:
    """The attention or feed-forward inside all wrappers."""
    while isinstance(branch, (Scale, LayerScale, AdaptiveLayerScale, ShiftTokens, Canon)):
        branch = branch.fn
    return branch


class Scale(Module):
    """The branch's output times a constant."""

    hands_on = True

    def __init__(self, value: float, fn: nn.Module) -> None:
        super().__init__()
        self.value = value
        self.fn = fn

    def forward(self, x: Float[Tensor, '... d'], **kwargs: Any) -> Any:
        return change_first(handed_on(self.fn, x, kwargs), lambda out: out * self.value)


class LayerScale(Module):
    """The branch's output times a learned gain per feature that starts at ``init_value``, https://arxiv.org/abs/2103.17239."""

    hands_on = True

    def __init__(self, fn: nn.Module, dim: int, init_value: float = 0.0, unit_offset: bool = False) -> None:
        super().__init__()
        self.unit_offset = unit_offset
        self.init_value = init_value
        self.fn = fn
        self.gamma = empty_parameter(dim)
        self.init_own()

    def init_own(self) -> None:
        nn.init.constant_(self.gamma, self.init_value - self.unit_offset)

    def _scaled(self, out: Float[Tensor, '... d']) -> Float[Tensor, '... d']:
        return out * (self.gamma + 1.0 if self.unit_offset else self.gamma)

    def forward(self, x: Float[Tensor, '... d'], **kwargs: Any) -> Any:
        return change_first(handed_on(self.fn, x, kwargs), self._scaled)


class AdaptiveLayerScale(Module):
    """The branch's output times a sigmoid gate that depends on a condition, nearly closed at first.

    A companion of adaptive norms, https://arxiv.org/abs/2212.09748. Condition: (b c) or (b n c).
    """

    hands_on = True

    def __init__(self, fn: nn.Module, dim: int, dim_condition: int | None = None, init_bias_value: float = -2.0) -> None:
        super().__init__()
        self.fn = fn
        self.to_gamma = ConstantLinear(default(dim_condition, dim), dim, bias_value=init_bias_value)

    def _gate(self, condition: Float[Tensor, 'b ... c'] | None) -> Float[Tensor, 'b #n d']:
        if condition is None:
            raise ValueError('condition must be given to the adaptive layer scale. Pass condition=(batch, features).')
        gate: Tensor = self.to_gamma(condition.unsqueeze(1) if condition.ndim == 2 else condition).sigmoid()
        return gate

    def forward(self, x: Float[Tensor, '... d'], *, condition: Float[Tensor, 'b ... c'] | None = None, **kwargs: Any) -> Any:
        around: BranchInputs | None = kwargs.get('around')
        gate = self._gate(condition if around is None else around.condition)
        return change_first(handed_on(self.fn, x, kwargs), lambda out: out * gate)


def shift(t: Float[Tensor, 'b n d'], amount: int, mask: Bool[Tensor, 'b n'] | None = None) -> Float[Tensor, 'b n d']:
    """``t`` delayed by ``amount`` tokens (negative: advanced), zeros where nothing comes from; masked tokens count as zeros."""
    if amount == 0:
        return t
    n = t.shape[-2]
    amount = max(-n, min(n, amount))
    if mask is not None:
        if mask.shape != t.shape[:-1]:
            raise ValueError(f'mask must have one entry per token of t, {tuple(t.shape[:-1])}, got {tuple(mask.shape)}.')
        t = t.masked_fill(~mask.unsqueeze(-1), 0.0)
    return pad_at_dim(t, (amount, -amount), dim=-2)


class ShiftTokens(Module):
    """The features in equal chunks, chunk ``k`` delayed by ``shifts[k]`` tokens; what is left over stays. (RWKV, B. Peng.)

    With a cache the tokens before come from its 'shift' tape, so a step sees what the whole sequence would. Tokens that are
    masked out (``mask``, or ``BranchInputs.padding``) are zeros to others.
    """

    hands_on = True

    def __init__(self, shifts: Sequence[int], fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn
        self.shifts = tuple(shifts)

    def _chunks(self, dim: int) -> list[tuple[int, int, int]]:
        """(shift, first feature, last feature) of each chunk that moves."""
        width = dim // len(self.shifts)
        return [(by, nth * width, (nth + 1) * width) for nth, by in enumerate(self.shifts) if by != 0 and width > 0]

    def moves(self, dim: int) -> bool:
        return bool(self._chunks(dim))

    def forward(self, x: Float[Tensor, '... n d'], **kwargs: Any) -> Any:
        around: BranchInputs | None = kwargs.get('around')
        shifted = self.shifted(x, kwargs.get('mask')) if around is None else self.shifted(x, around.padding, around.past)
        return handed_on(self.fn, shifted, kwargs)

    def shifted(
        self, x: Float[Tensor, '... n d'], mask: Bool[Tensor, 'b n'] | None = None, past: LayerCache | None = None
    ) -> Float[Tensor, '... n d']:
        chunks = self._chunks(x.shape[-1])
        if not chunks:
            return x
        n, begin, end = x.shape[-2], chunks[0][1], chunks[-1][2]
        front, back = max(0, *self.shifts), max(0, *(-by for by in self.shifts))
        moving = x[..., begin:end]
        if mask is not None:
            moving = moving.masked_fill(~mask.unsqueeze(-1), 0.0)
        if past is not None:
            # tapes have the batch in front, views of q, k and v are in front of the batch
            has_views = x.ndim == 4
            (seen,) = past.extend(shift=moving.transpose(0, 1) if has_views else moving)
            seen = past.newest(seen, front, n)
            moving = seen.transpose(0, 1) if has_views else seen
        moving = pad_at_dim(moving, (front + n - moving.shape[-2], back), dim=-2)
        parts, upto = [], 0
        for by, first, last in chunks:
            if first > upto:
                parts.append(x[..., upto:first])
            parts.append(moving[..., front - by : front - by + n, first - begin : last - begin])
            upto = last
        if upto < x.shape[-1]:
            parts.append(x[..., upto:])
        return torch.cat(parts, dim=-1)


class Canon(Module):
    """A causal convolution of what the branch reads, https://arxiv.org/abs/2512.17351. Memories are read as they are."""

    hands_on = True

    def __init__(self, dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn
        self.convolution = CausalConvolution(dim, 'before')

    def forward(self, x: Float[Tensor, '... n d'], **kwargs: Any) -> Any:
        around: BranchInputs | None = kwargs.get('around')
        mixed = self.convolution(x, kwargs.get('mask')) if around is None else self.convolution(x, around.padding, around.past)
        return handed_on(self.fn, mixed, kwargs)


def name_as_unwrapped(state: dict[str, Any], prefix: str, branch: nn.Module) -> None:
    """Rename what 2.31.10 saved of a branch wrapped for a constant factor, which puts one more ``fn.`` into keys."""
    own = branch.state_dict().keys()
    for key in [key for key in state if key.startswith(prefix) and key[len(prefix) :] not in own]:
        name = key[len(prefix) :].replace('fn.', '', 1)
        if name in own:
            state[prefix + name] = state.pop(key)
