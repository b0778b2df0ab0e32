"""Small helper functions, each defined once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import reduce, wraps
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map

from x_transformers.tensor_types import Bool, Float, Int, Shaped

T = TypeVar('T')

# ---------------------------------------------------------------- made once

# a list and not a dictionary: sizes that a compiler or an exporter keeps open can be compared, but have no hash
Memo = list[tuple[tuple[Any, ...], Any, Any]]


def recall(memo: Memo, key: tuple[Any, ...], owner: Any = None) -> Any:
    """What was made before for the same plain numbers and the same object: once for a call, shared by all its layers."""
    for have, belongs_to, value in memo:
        if belongs_to is owner and have == key:
            return value
    return None


def remember(memo: Memo, key: tuple[Any, ...], value: Any, owner: Any = None) -> Any:
    memo.append((key, owner, value))
    return value


# ---------------------------------------------------------------- counting


def counted(first: int | Int[Tensor, ' 1'], count: int, device: torch.device) -> Int[Tensor, ' n']:
    """``first``, ``first + 1``, … , ``count`` of them."""
    if isinstance(first, Tensor):
        return torch.arange(count, device=device) + first
    return torch.arange(first, first + count, device=device)


# ---------------------------------------------------------------- presence


def default_device() -> torch.device:
    """The first that there is of an XPU, a CUDA GPU, Apple's GPU and the CPU."""
    if torch.xpu.is_available():
        return torch.device('xpu')
    if torch.cuda.is_available():
        return torch.device('cuda')
    return torch.device('mps' if torch.backends.mps.is_available() else 'cpu')


def exists(value: Any) -> bool:
    return value is not None


def default(value: Any, fallback: Any) -> Any:
    """``value`` unless it is None; a callable fallback is called."""
    if value is not None:
        return value
    return fallback() if callable(fallback) else fallback


def first(items: Iterable[T], default: T | None = None) -> T | None:
    return next(iter(items), default)


def is_empty(items: Any) -> bool:
    return len(items) == 0


def cast_tuple(value: Any, depth: int = 1) -> tuple[Any, ...]:
    """A tuple stays as it is; anything else, lists too, is repeated ``depth`` times."""
    return value if isinstance(value, tuple) else (value,) * depth


def divisible_by(numerator: int, denominator: int) -> bool:
    return numerator % denominator == 0


def at_most_one_of(*flags: Any) -> bool:
    return sum(bool(flag) for flag in flags) <= 1


def maybe(fn: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """``fn`` that hands a None first argument back untouched."""
    if fn is None:
        return identity

    @wraps(fn)
    def inner(value: Any, *args: Any, **kwargs: Any) -> Any:
        return fn(value, *args, **kwargs) if value is not None else value

    return inner


# ---------------------------------------------------------------- callables that return the same thing


def identity(value: T, *args: Any, **kwargs: Any) -> T:
    return value


class always:
    """A callable that always returns one value."""

    def __init__(self, val: Any) -> None:
        self.val = val

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.val


class equals:
    def __init__(self, val: Any) -> None:
        self.val = val

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> bool:
        return bool(x == self.val)


class not_equals:
    def __init__(self, val: Any) -> None:
        self.val = val

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> bool:
        return bool(x != self.val)


# ---------------------------------------------------------------- tensors


def under_transform() -> bool:
    """Whether a transform of ``torch.func``, or forward-mode differentiation, looks at what is computed now.

    Custom backwards and fused kernels know neither: plain operations do.
    """
    return torch._C._functorch.maybe_current_level() is not None or torch.autograd.forward_ad._current_level >= 0


# a compiler cannot look into it, and need not: see ``forced_name`` in attention/kernels/choose.py
under_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_any(size: Any, *sizes: Any) -> bool:
    """Whether a size is one of these. A compiler that keeps one of them open compares them by ``==``, but not by ``in``."""
    return any(size == each for each in sizes)


def writes_program() -> bool:
    """Whether a compiler or a trace writes down the operations of now, for other inputs and without our backwards."""
    return torch.compiler.is_compiling() or is_traced()


def is_traced() -> bool:
    """Whether ``torch.jit.trace`` writes them down."""
    return bool(torch._C._get_tracing_state())


def values_known(t: Shaped[Tensor, '...']) -> bool:
    """Whether numbers may be read off a tensor now, to check them.

    Not while a program is compiled or traced, nor under a transform of ``torch.func``, nor of meta and fake tensors.
    """
    if writes_program() or under_transform():
        return False
    return not (t.is_meta or isinstance(t, FakeTensor))


def by_formula(
    formula: Callable[..., Any], tensors: Sequence[Shaped[Tensor, '...'] | None], grads: Sequence[Shaped[Tensor, '...'] | None]
) -> tuple[Tensor | None, ...]:
    """The backward of a custom function by its formula in plain operations, which can be differentiated again."""
    with torch.enable_grad():
        # one of them may have been made of another: what comes that way is not ours
        tensors = tuple(None if t is None else t.view_as(t) for t in tensors)
        out = formula(*tensors)
    outs = out if isinstance(out, tuple) else (out,)
    reached = [(o, g) for o, g in zip(outs, grads, strict=True) if g is not None and o.requires_grad]
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    slopes = iter(
        torch.autograd.grad([o for o, _ in reached], wanted, [g for _, g in reached], create_graph=True, allow_unused=True)
    )
    return tuple(next(slopes) if t is not None and t.requires_grad else None for t in tensors)


def single(t: Float[Tensor, '...']) -> Tensor:
    """In single precision or better."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def log(t: Float[Tensor, '...'], eps: float = 1e-20) -> Tensor:
    """Natural logarithm of ``max(t, eps)``, which in half precision would be 0."""
    return single(t).clamp(min=eps).log().to(t.dtype)


def max_neg_value(t: Float[Tensor, '...']) -> float:
    """Minus the largest finite number of ``t``'s dtype: what forbidden scores are set to."""
    return -torch.finfo(t.dtype).max


def at_least(length: Float[Tensor, '... 1'], least: float) -> Float[Tensor, '... 1']:
    """Lengths to divide by. What has none, which is no direction, is divided by infinity: it stays 0 and gets no gradient,
    where ``least`` would make one of 1e12, and infinity of that in half precision."""
    return length.clamp(min=least).masked_fill(length == 0, torch.inf)


def minus_rounding(threshold: Float[Tensor, '... 1']) -> Float[Tensor, '... 1']:
    """A threshold, lowered by a few roundings, so that numbers which only rounding tells apart are on the same side of it.

    In half precision it stays: numbers that are so close are equal there.
    """
    rounding = min(torch.finfo(threshold.dtype).eps, torch.finfo(torch.float32).eps)
    return threshold - 16 * rounding * threshold.abs()


def topk_threshold(scores: Float[Tensor, '... j'], count: int) -> Float[Tensor, '... 1']:
    """The least of the ``count`` largest scores of each row, minus rounding."""
    return minus_rounding(scores.topk(count, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True))


def l2norm(t: Float[Tensor, '... d'], groups: int = 1, eps: float | None = None) -> Float[Tensor, '... d']:
    """Unit length of the last axis, or of each of its ``groups`` equal consecutive chunks.

    With ``eps`` the square of the length is increased by ``eps`` per channel; without it only a length below 1e-12 counts as
    1e-12.
    """
    if groups > 1:
        if not divisible_by(t.shape[-1], groups):
            raise ValueError(f'groups must divide the last axis of t, got {groups} groups of shape {tuple(t.shape)}.')
        return l2norm(t.unflatten(-1, (groups, -1)), eps=eps).flatten(-2)
    # neither 1e-12 nor the square of a long vector is a half
    wide = single(t)
    if eps is None:
        return (wide / at_least(torch.linalg.vector_norm(wide, dim=-1, keepdim=True), 1e-12)).to(t.dtype)
    return (wide * (wide.square().sum(dim=-1, keepdim=True) + eps * t.shape[-1]).rsqrt()).to(t.dtype)


def softclamp(t: Float[Tensor, '...'], value: float) -> Tensor:
    """``value * tanh(t / value)``: nearly t when small, never beyond ``value``."""
    return (t / value).tanh() * value


def masked_mean(t: Float[Tensor, 'b ...'], mask: Bool[Tensor, 'b n'] | None = None, dim: int = 1) -> Tensor:
    """Mean over ``dim``, of the entries whose mask is True if there is one (0 where there are none)."""
    if mask is None:
        return t.mean(dim=dim)
    while mask.ndim < t.ndim:
        mask = mask.unsqueeze(-1)
    total = t.masked_fill(~mask, 0.0).sum(dim=dim)
    return total / mask.sum(dim=dim).clamp(min=1)


def pad_at_dim(t: Shaped[Tensor, '...'], pad: tuple[int, int], dim: int = -1, value: float = 0.0) -> Tensor:
    """Pad one axis on its left and right; negative amounts crop."""
    if pad == (0, 0):
        return t
    after = t.ndim - dim - 1 if dim >= 0 else -dim - 1
    return F.pad(t, (0, 0) * after + pad, value=value)


def or_reduce(masks: list[Bool[Tensor, '...']]) -> Tensor:
    return reduce(torch.Tensor.__or__, masks)


def detach_all(tree: Any) -> Any:
    """Detach every tensor of a tree that requires a gradient."""

    def detach(value: Any) -> Any:
        return value.detach() if isinstance(value, Tensor) and value.requires_grad else value

    return tree_map(detach, tree)


def without_component(
    out: Float[Tensor, '... d'], along: Float[Tensor, '... d'], dtype: torch.dtype = torch.float64
) -> Float[Tensor, '... d']:
    """``out`` without its component along ``along``, each last axis a vector of its own, computed in ``dtype``.

    Of a token that sees itself alone nothing is left: a norm behind would take what rounding leaves for a direction.
    """
    x, unit = out.to(dtype), F.normalize(along.to(dtype), dim=-1)
    left = x - (x * unit).sum(dim=-1, keepdim=True) * unit
    rounding = x.shape[-1] * torch.finfo(torch.promote_types(out.dtype, torch.float32)).eps * x.abs().amax(dim=-1, keepdim=True)
    return left.where(left.abs().amax(dim=-1, keepdim=True) > rounding, 0.0).to(out.dtype)


def orthog_project(x: Float[Tensor, 'b ...'], y: Float[Tensor, 'b ...']) -> Tensor:
    """``x`` without its component along ``y``; all axes but the first are one vector, in float64."""
    flat_x, flat_y = x.flatten(1).double(), y.flatten(1).double()
    along = F.normalize(flat_y, dim=-1)
    return (flat_x - (flat_x * along).sum(-1, keepdim=True) * along).view_as(x).to(x.dtype)


# ---------------------------------------------------------------- modules


class Identity(nn.Module):
    """Returns its first argument, whatever else it is given."""

    def forward(self, t: Any, *args: Any, **kwargs: Any) -> Any:
        return t


def Sequential(*modules: nn.Module | None) -> nn.Sequential:
    """``nn.Sequential`` of those that are not None."""
    return nn.Sequential(*[module for module in modules if module is not None])


def init_zero_(layer: nn.Module) -> None:
    """Zero ``.weight`` and, if there is one, ``.bias``."""
    nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
    if getattr(layer, 'bias', None) is not None:
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]


# ---------------------------------------------------------------- dictionaries of keywords


def pick_and_pop(keys: Iterable[str], d: dict[str, Any]) -> dict[str, Any]:
    return {key: d.pop(key) for key in keys}


def group_dict_by_key(cond: Callable[[str], bool], d: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(entries whose key fulfils ``cond``, the rest)."""
    matching = {key: value for key, value in d.items() if cond(key)}
    return matching, {key: value for key, value in d.items() if key not in matching}


def string_begins_with(prefix: str, string: str) -> bool:
    return string.startswith(prefix)


def group_by_key_prefix(prefix: str, d: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    return group_dict_by_key(lambda key: string_begins_with(prefix, key), d)


def groupby_prefix_and_trim(prefix: str, d: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """As ``group_by_key_prefix``, with the prefix cut off."""
    matching, rest = group_by_key_prefix(prefix, d)
    return {key[len(prefix) :]: value for key, value in matching.items()}, rest


# ---------------------------------------------------------------- gradients


def recomputed_part() -> Hashable:
    """What tells apart the parts of a forward that activation checkpointing runs again; None outside of any.

    A tensor that learns, made inside of such a part and kept for later ones, would be missing when the part is run again.
    Checkpointing says what it keeps through hooks on saved tensors, and has hooks of its own for each part and each run.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return None
    return cast(Hashable, torch._C._autograd._top_saved_tensors_default_hooks(False))


def autocast_dtype(t: Shaped[Tensor, '...']) -> torch.dtype | None:
    """The precision that autocast wants, where it is on (it is not defined on the meta device)."""
    # asked first, as reading a device's name takes long: it is asked for each attention and token
    if not torch._C._is_any_autocast_enabled():
        return None
    kind = t.device.type
    return None if kind == 'meta' or not torch.is_autocast_enabled(kind) else torch.get_autocast_dtype(kind)


def without_autocast(t: Shaped[Tensor, '...']) -> AbstractContextManager[Any]:
    """Precisions are ours to choose, on the way back too, which may run with autocast or without."""
    return nullcontext() if autocast_dtype(t) is None else torch.autocast(t.device.type, enabled=False)
