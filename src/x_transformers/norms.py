"""Norms over the last axis, and the choice of one.

Three of them divide: by the standard deviation (layer norm) or by the length (scale and RMS norms). Two squash instead. A *unit
offset* keeps the learned gain as its difference from 1, so that weight decay pulls it towards 1 instead of 0.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.helpers import at_least, by_formula, default, is_any, single, under_transform, writes_program
from x_transformers.module import ConstantLinear, Module, empty_parameter
from x_transformers.tensor_types import Float

# ---------------------------------------------------------------- the two formulas

# below this length a vector counts as zero: it stays where it is instead of being blown up
MIN_LENGTH = 1e-12
# what layer norms add to the variance unless told otherwise
LAYER_NORM_EPS = 1e-5


def check_width(x: Float[Tensor, '... d'], gain: Float[Tensor, 'd']) -> None:
    """Raise ValueError for vectors that are not as wide as the norm."""
    if x.shape[-1:] != gain.shape:
        raise ValueError(f'x must have the {len(gain)} features of the norm in its last axis, got shape {tuple(x.shape)}.')


def layer_norm(
    x: Float[Tensor, '... d'],
    gain: Float[Tensor, 'd'] | None = None,
    bias: Float[Tensor, 'd'] | None = None,
    eps: float | None = None,
    *,
    unit_offset: bool = False,
) -> Float[Tensor, '... d']:
    """Zero mean and unit variance of the last axis, times ``gain``, plus ``bias``, in one kernel. ``eps`` (None: 1e-5) is
    added to the variance. ``unit_offset``: the factor is ``1 + gain``."""
    if gain is not None:
        check_width(x, gain)
        if unit_offset and bias is None and gain.dtype == x.dtype == torch.float32 and is_one_token(x):
            return with_offset(torch.layer_norm(x, x.shape[-1:], None, None, LAYER_NORM_EPS if eps is None else eps), gain)
        gain = gain + 1.0 if unit_offset else gain
    if gain is not None and gain.dtype != x.dtype:
        dtype = torch.promote_types(x.dtype, gain.dtype)
        x, gain, bias = x.to(dtype), gain.to(dtype), None if bias is None else bias.to(dtype)
    return torch.layer_norm(x, x.shape[-1:], gain, bias, LAYER_NORM_EPS if eps is None else eps)


def is_one_token(x: Float[Tensor, '... n d']) -> bool:
    """Whether each sequence has one token and no gradient is kept: then ``1 + gain`` is as much work as the norm."""
    return x.ndim > 1 and x.shape[-2] == 1 and not torch.is_grad_enabled()


def rms_norm(
    x: Float[Tensor, '... d'],
    gain: Float[Tensor, 'd'] | None = None,
    eps: float | None = None,
    *,
    unit_offset: bool = False,
) -> Float[Tensor, '... d']:
    """``x / max(|x|, 1e-12) * sqrt(d) * gain``: root mean square 1 of the last axis; a zero vector stays zero.

    With ``eps`` the formula is ``x / sqrt(mean(x²) + eps) * gain``. ``unit_offset``: the factor is ``1 + gain``.

    The formula is ``_rms_formula``. On a CPU its gradient is taken by hand, because the formula alone keeps and reads far more
    than it needs to: a training step of the norm would take three to four times as long. A compiler does as well by itself.
    """
    if gain is not None:
        check_width(x, gain)
    if gain is not None and gain.dtype != x.dtype:
        dtype = torch.promote_types(x.dtype, gain.dtype)
        x, gain = x.to(dtype), gain.to(dtype)
    learning = torch.is_grad_enabled() and (x.requires_grad or (gain is not None and gain.requires_grad))
    if not learning or writes_program() or not _has_by_hand(x):
        return _rms_formula(x, gain, eps, unit_offset)
    out: Tensor = _RMSNorm.apply(x, gain + 1.0 if unit_offset and gain is not None else gain, eps)[0]  # type: ignore[no-untyped-call]
    return out


def _has_by_hand(x: Float[Tensor, '... d']) -> bool:
    return x.device.type == 'cpu' and x.dtype in (torch.float32, torch.float64) and not under_transform()


def _inverse_rms(x: Float[Tensor, '... d'], eps: float | None, slopes: bool) -> Float[Tensor, '... 1']:
    """``slopes``: somebody may take them; without them a vector of zeros may be divided by anything."""
    if eps is not None:
        return (x.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    length = at_least(length, MIN_LENGTH) if slopes else length.clamp(min=MIN_LENGTH)
    # not sqrt(d) / length, which is the same operations behind two calls of Python
    scale: Tensor = length.reciprocal() * x.shape[-1] ** 0.5
    return scale


def _rms_formula(
    x: Float[Tensor, '... d'], gain: Float[Tensor, '... d'] | None, eps: float | None = None, unit_offset: bool = False
) -> Tensor:
    # half precision rounds once, at the end: neither 1e-12 nor the square of a long vector is a half
    wide = x if x.dtype == torch.float32 else single(x)
    slopes = torch.is_grad_enabled() or torch.autograd.forward_ad._current_level >= 0
    scaled = wide * _inverse_rms(wide, eps, slopes)
    if gain is not None:
        scaled = with_offset(scaled, gain, slopes) if unit_offset else scaled * gain
    return scaled if scaled.dtype == x.dtype else scaled.to(x.dtype)


def with_offset(x: Float[Tensor, '... d'], gain: Float[Tensor, 'd'], slopes: bool = False) -> Float[Tensor, '... d']:
    """``x * (1 + gain)``; without ``slopes`` as ``x + x * gain``, which is one operation.

    An operation with a number takes three times as long as one with tensors: for a single token as long as the whole norm.
    """
    return x * (gain + 1.0) if slopes else torch.addcmul(x, x, gain)


class _RMSNorm(torch.autograd.Function):
    """``_rms_formula`` with a short way back.

    The gradient of layer norm with a mean of 0 is that of RMS norm, less the mean of the incoming gradient; torch has a fused
    kernel for the former, so that one matrix-vector product and one sum are left.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Float[Tensor, '... d'], gain: Float[Tensor, '... d'] | None, eps: float | None) -> tuple[Tensor, Tensor]:
        inverse = _inverse_rms(x, eps, slopes=True)
        return (x * inverse if gain is None else (x * gain).mul_(inverse)), inverse

    @staticmethod
    def setup_context(
        ctx: Any,
        inputs: tuple[Float[Tensor, '... d'], Float[Tensor, '... d'] | None, float | None],
        output: tuple[Float[Tensor, '... d'], Float[Tensor, '... 1']],
    ) -> None:
        x, gain, ctx.eps = inputs
        inverse = output[1]
        ctx.mark_non_differentiable(inverse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, gain, inverse)

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, '... d'] | None, _: None) -> tuple[Tensor | None, Tensor | None, None]:
        if grad is None:
            return None, None, None
        x, gain, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():
            # a gradient of this gradient is wanted: let autograd see the whole formula
            of_x, of_gain = by_formula(partial(_rms_formula, eps=ctx.eps), (x, gain), (grad,))
            return of_x, of_gain, None
        with torch.autocast(x.device.type, enabled=False):
            needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False]
            shape = x.shape[-1:]
            zero = torch.zeros_like(inverse)
            grad_x, grad_gain, _ = torch.ops.aten.native_layer_norm_backward(
                grad.contiguous(), x.contiguous(), shape, zero, inverse, gain, None, needs
            )
            if needs[0]:
                mean = grad.mean(-1, keepdim=True) if gain is None else (grad @ gain).unsqueeze(-1) / shape[0]
                grad_x = grad_x + mean * inverse
        return grad_x, grad_gain, None


def _adaptive_gain(
    to_gamma: nn.Module, x: Float[Tensor, '... d'], condition: Float[Tensor, 'b #n c'] | Float[Tensor, 'b c']
) -> Float[Tensor, 'b #n d']:
    """The gain that a condition asks for; one for a whole sequence serves each of its tokens."""
    width: int = getattr(to_gamma, 'in_features', condition.shape[-1])
    if condition.ndim not in (2, 3) or condition.shape[-1] != width or not is_any(len(condition), 1, *x.shape[-3:-2]):
        raise ValueError(
            f'condition must be (batch, {width}) or (batch, tokens, {width}) for x of shape {tuple(x.shape)}, '
            f'got {tuple(condition.shape)}.'
        )
    gain: Tensor = to_gamma(condition.unsqueeze(1) if condition.ndim == 2 else condition)
    return gain + 1.0


# ---------------------------------------------------------------- dividing by the standard deviation


class LayerNorm(Module):
    """Layer norm, without a bias unless asked, https://arxiv.org/abs/1607.06450.

    forward: (… d) -> (… d). ``gamma`` starts such that the gain is 1, the bias ``beta`` at 0.
    """

    def __init__(self, dim: int, unit_offset: bool = False, *, bias: bool = False, eps: float | None = None) -> None:
        super().__init__()
        self.unit_offset = unit_offset
        self.eps = eps
        self.gamma = empty_parameter(dim)
        self.beta = empty_parameter(dim) if bias else None
        self.init_own()

    def init_own(self) -> None:
        nn.init.constant_(self.gamma, 1.0 - self.unit_offset)
        if self.beta is not None:
            nn.init.zeros_(self.beta)

    def forward(self, x: Float[Tensor, '... d']) -> Float[Tensor, '... d']:
        return layer_norm(x, self.gamma, self.beta, self.eps, unit_offset=self.unit_offset)


class AdaptiveLayerNorm(Module):
    """Layer norm whose gain is a linear map of a condition, https://arxiv.org/abs/2212.09748; the gain starts at 1.

    forward: x (… b n d), condition (b c) or (b n c).
    """

    def __init__(self, dim: int, dim_condition: int | None = None, *, eps: float | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.to_gamma = ConstantLinear(default(dim_condition, dim), dim, bias=False)

    def forward(
        self, x: Float[Tensor, '... d'], *, condition: Float[Tensor, 'b c'] | Float[Tensor, 'b #n c']
    ) -> Float[Tensor, '... d']:
        out: Tensor = layer_norm(x, eps=self.eps) * _adaptive_gain(self.to_gamma, x, condition)
        return out


# ---------------------------------------------------------------- dividing by the length


class ScaleNorm(Module):
    """RMS norm with one gain for all features, https://arxiv.org/abs/1910.05895. forward: (… d) -> (… d)."""

    def __init__(self, dim: int, unit_offset: bool = False, *, eps: float | None = None) -> None:
        super().__init__()
        self.unit_offset = unit_offset
        self.eps = eps
        self.scale = dim**0.5
        self.g = empty_parameter(1)
        self.init_own()

    def init_own(self) -> None:
        nn.init.constant_(self.g, 1.0 - self.unit_offset)

    def forward(self, x: Float[Tensor, '... d']) -> Float[Tensor, '... d']:
        gain = self.g + 1.0 if self.unit_offset else self.g
        return rms_norm(x, gain.expand(x.shape[-1]), self.eps)


class RMSNorm(Module):
    """Root mean square norm, https://arxiv.org/abs/1910.07467. forward: (… d) -> (… d).

    Args:
        dim: width of the last axis, d.
        unit_offset: the gain is kept as its difference from 1.
        eps: added to the mean square; None: by the dtype.
    """

    def __init__(self, dim: int, unit_offset: bool = False, *, eps: float | None = None) -> None:
        super().__init__()
        self.unit_offset = unit_offset
        self.eps = eps
        self.scale = dim**0.5
        self.g = empty_parameter(dim)
        self.init_own()

    def init_own(self) -> None:
        nn.init.constant_(self.g, 1.0 - self.unit_offset)

    def forward(self, x: Float[Tensor, '... d']) -> Float[Tensor, '... d']:
        return rms_norm(x, self.g, self.eps, unit_offset=self.unit_offset)


class AdaptiveRMSNorm(Module):
    """RMS norm whose gain is a linear map of a condition; the gain starts at 1.

    forward: x (… b n d), condition (b c) or (b n c).

    Args:
        dim, dim_condition: widths of x and of the condition, which is ``dim`` unless given.
        eps: added to the mean square; None: by the dtype.
    """

    def __init__(self, dim: int, dim_condition: int | None = None, *, eps: float | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.scale = dim**0.5
        self.to_gamma = ConstantLinear(default(dim_condition, dim), dim, bias=False)

    def forward(
        self, x: Float[Tensor, '... d'], *, condition: Float[Tensor, 'b c'] | Float[Tensor, 'b #n c']
    ) -> Float[Tensor, '... d']:
        out: Tensor = rms_norm(x, eps=self.eps) * _adaptive_gain(self.to_gamma, x, condition)
        return out


class SimpleRMSNorm(Module):
    """RMS norm without a gain, https://arxiv.org/abs/2307.14995. forward: (… d) -> (… d)."""

    def __init__(self, dim: int, eps: float | None = None, **kwargs: Any) -> None:
        super().__init__()
        self.eps = eps
        self.scale = dim**0.5

    def forward(self, x: Float[Tensor, '... d']) -> Float[Tensor, '... d']:
        return rms_norm(x, eps=self.eps)


class MultiheadRMSNorm(Module):
    """RMS norm of every head, each with a gain of its own that starts at 1. forward: (b h n d) -> (b h n d).

    A head that gives exactly nothing (its row sees nobody, or chose a sink) has no gradient: the norm's slope is 1e12 there.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.rmsnorm = SimpleRMSNorm(dim)
        self.gamma = empty_parameter(heads, 1, dim)
        self.init_own()

    def init_own(self) -> None:
        nn.init.zeros_(self.gamma)

    def forward(self, x: Float[Tensor, 'b h n d']) -> Float[Tensor, 'b h n d']:
        x = x.masked_fill((x == 0).all(dim=-1, keepdim=True), 0.0)
        out: Tensor = self.rmsnorm(x) * (self.gamma + 1.0)
        return out


# ---------------------------------------------------------------- squashing


class DynamicTanh(Module):
    """``tanh(a x) * gamma + beta`` in place of a norm, https://arxiv.org/abs/2503.10622. forward: (… d) -> (… d).

    ``gamma`` and ``beta`` of the constructor are accepted for the signature's sake: the gain starts at 1, the bias at 0.
    """

    def __init__(
        self, dim: int, init_alpha: float = 1.0, gamma: float = 1.0, beta: float = 0.0, unit_offset: bool = False
    ) -> None:
        super().__init__()
        self.init_alpha = init_alpha
        self.unit_offset = unit_offset
        # with a unit offset the learned scale, too, is kept as its difference from where it starts
        self.pre_tanh_scale_offset = init_alpha if unit_offset else 0.0
        self.gamma_offset = float(unit_offset)
        self.pre_tanh_scale = empty_parameter()
        self.gamma = empty_parameter(dim)
        self.beta = empty_parameter(dim)
        self.init_own()

    def init_own(self) -> None:
        nn.init.constant_(self.pre_tanh_scale, self.init_alpha - self.pre_tanh_scale_offset)
        nn.init.constant_(self.gamma, 1.0 - self.gamma_offset)
        nn.init.zeros_(self.beta)

    def forward(self, x: Float[Tensor, '... d']) -> Float[Tensor, '... d']:
        check_width(x, self.gamma)
        squashed = (x * (self.pre_tanh_scale + self.pre_tanh_scale_offset)).tanh()
        return squashed * (self.gamma + self.gamma_offset) + self.beta


class Derf(Module):
    """``erf(a x + s) * gamma + beta`` in place of a norm, https://arxiv.org/abs/2512.10938. forward: (… d) -> (… d)."""

    def __init__(self, dim: int, init_alpha: float = 0.5, init_bias: float = 0.0, unit_offset: bool = False) -> None:
        super().__init__()
        self.init_alpha = init_alpha
        self.init_bias = init_bias
        self.scale_offset = float(unit_offset)
        self.alpha = empty_parameter()
        self.s = empty_parameter()
        self.gamma = empty_parameter(dim)
        self.beta = empty_parameter(dim)
        self.init_own()

    def init_own(self) -> None:
        nn.init.constant_(self.alpha, self.init_alpha - self.scale_offset)
        nn.init.constant_(self.s, self.init_bias)
        nn.init.constant_(self.gamma, 1.0 - self.scale_offset)
        nn.init.zeros_(self.beta)

    def forward(self, x: Float[Tensor, '... d']) -> Float[Tensor, '... d']:
        check_width(x, self.gamma)
        squashed = torch.erf(x * (self.alpha + self.scale_offset) + self.s)
        return squashed * (self.gamma + self.scale_offset) + self.beta


# ---------------------------------------------------------------- the choice

NORMS: dict[str, type[Module]] = {
    'layernorm': LayerNorm,
    'scalenorm': ScaleNorm,
    'rmsnorm': RMSNorm,
    'simple_rmsnorm': SimpleRMSNorm,
    'dynamic_tanh': DynamicTanh,
    'derf': Derf,
    'adaptive_layernorm': AdaptiveLayerNorm,
    'adaptive_rmsnorm': AdaptiveRMSNorm,
}

# these take a condition, and have no unit offset: their gain is 1 plus a map of the condition anyway
ADAPTIVE_NORMS = frozenset({'adaptive_layernorm', 'adaptive_rmsnorm'})


def choose_norm(
    kind: str,
    dim: int,
    unit_offset: bool = False,
    dim_condition: int | None = None,
    init_alpha: float = 1.0,
    eps: float | None = None,
    bias: bool = False,
) -> Module:
    """The norm called ``kind`` (a key of ``NORMS``, or the flag's name: the same with ``use_`` in front).

    ``dim_condition`` is the width of an adaptive norm's condition (None: ``dim``), ``init_alpha`` where dynamic tanh starts.
    ``eps`` is what norms that divide add to the variance or the mean square; ``bias`` is for layer norms.
    Raises ValueError if there is no such norm.
    """
    kind = kind.removeprefix('use_')
    if kind not in NORMS:
        raise ValueError(f'kind must be one of {", ".join(NORMS)}, got {kind!r}.')
    if kind in ADAPTIVE_NORMS:
        return NORMS[kind](dim, dim_condition=dim_condition, eps=eps)
    if kind == 'dynamic_tanh':
        return DynamicTanh(dim, init_alpha=init_alpha, unit_offset=unit_offset)
    if kind == 'layernorm':
        return LayerNorm(dim, unit_offset=unit_offset, bias=bias, eps=eps)
    if kind == 'derf':
        return Derf(dim, unit_offset=unit_offset)
    return NORMS[kind](dim, unit_offset=unit_offset, eps=eps)


def entrance_norm(dim: int, stack: Any) -> LayerNorm:
    """A layer norm around a stack, whatever its own norms are: with their eps and, if they have one, a bias."""
    return LayerNorm(dim, bias=stack.flags.norm_bias, eps=stack.flags.norm_eps)
