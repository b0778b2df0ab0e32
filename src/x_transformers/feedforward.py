"""The feed-forward branch: two linear maps and an activation, gated or not."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.convolution import CausalConvolution
from x_transformers.flags.constructors import only
from x_transformers.flags.feedforward import FeedForwardFlags
from x_transformers.flags.rule import effective
from x_transformers.flags.rules import check_feedforward
from x_transformers.flags.signature import ClassSignature
from x_transformers.helpers import Sequential, is_any, softclamp, writes_program
from x_transformers.module import Dropout, Module, branch_output, empty_parameter, run_through, stream_linear
from x_transformers.norms import LayerNorm
from x_transformers.tensor_types import Float
from x_transformers.unit_weights import GainedActivation

if TYPE_CHECKING:
    from typing import Unpack

    from x_transformers.attention.inputs import BranchInputs
    from x_transformers.experts import Experts
    from x_transformers.flags.keywords import FeedForwardKeywords


class ReluSquared(Module):
    """``relu(x) ** 2``, https://arxiv.org/abs/2109.08668. forward: (…) -> (…)."""

    def forward(self, x: Float[Tensor, '...']) -> Float[Tensor, '...']:
        return F.relu(x).square()


class QuickGELU(Module):
    """``x * sigmoid(1.702 x)``, the quick form of GELU, https://arxiv.org/abs/1606.08415. forward: (…) -> (…)."""

    def forward(self, x: Float[Tensor, '...']) -> Float[Tensor, '...']:
        return x * torch.sigmoid(1.702 * x)


class SoLU(Module):
    """``softmax(x) * x``, normed; Elhage et al. 2022, https://transformer-circuits.pub/2022/solu. forward: (… d) -> (… d)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = LayerNorm(dim)

    def forward(self, x: Float[Tensor, '... d']) -> Float[Tensor, '... d']:
        out: Tensor = self.norm(x.softmax(dim=-1) * x)
        return out


class Activation(Module):
    """A user's function as a module. forward: (…) -> (…)."""

    def __init__(self, fn: Callable[[Float[Tensor, '... d']], Float[Tensor, '... d']]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Float[Tensor, '...']) -> Float[Tensor, '...']:
        return self.fn(x)


def gelu_tanh() -> nn.Module:
    return nn.GELU(approximate='tanh')


NAMED_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    'relu': nn.ReLU,
    'gelu': nn.GELU,
    'gelu_tanh': gelu_tanh,
    'quick_gelu': QuickGELU,
    'silu': nn.SiLU,
}


class Clamped(Module):
    """An activation of ``limit * tanh(x / limit)``. forward: (…) -> (…)."""

    def __init__(self, limit: float, activation: nn.Module) -> None:
        super().__init__()
        self.limit = limit
        self.activation = activation

    def forward(self, x: Float[Tensor, '...']) -> Float[Tensor, '...']:
        out: Tensor = self.activation(softclamp(x, self.limit))
        return out


class ClampedGate(Module):
    """GELU or SiLU whose linear factor is clamped: ``limit * tanh(x / limit) * Φ(x)`` or ``* σ(x)``,
    https://arxiv.org/abs/2607.24653. forward: (…) -> (…)."""

    def __init__(self, limit: float, silu: bool = False) -> None:
        super().__init__()
        self.limit = limit
        self.silu = silu

    def forward(self, x: Float[Tensor, '...']) -> Float[Tensor, '...']:
        gate = x.sigmoid() if self.silu else 0.5 * (1.0 + torch.erf(x * 0.5**0.5))
        return softclamp(x, self.limit) * gate


class Gate(Module):
    """One half of the features, times the activation of the other, https://arxiv.org/abs/2002.05202.

    forward: (… 2d) -> (… d). ``mult_bias`` adds a learned factor per feature, which starts at 1. ``limit``: the half without
    activation becomes ``limit * tanh(x / limit)``. ``clamp``: it is kept within ± that number, and the other half below it.
    ``add_one``: it counts from one.
    """

    def __init__(
        self,
        dim: int,
        activation: nn.Module,
        mult_bias: bool = False,
        limit: float | None = None,
        clamp: float | None = None,
        add_one: bool = False,
    ) -> None:
        super().__init__()
        self.limit, self.clamp, self.add_one = limit, clamp, add_one
        self.act = activation
        self.mult_bias = empty_parameter(dim) if mult_bias else 1.0
        self.init_own()

    def init_own(self) -> None:
        if isinstance(self.mult_bias, Tensor):
            nn.init.ones_(self.mult_bias)

    @staticmethod
    def settings(flags: FeedForwardFlags) -> dict[str, Any]:
        """The keywords that the flags say."""
        return {
            'mult_bias': flags.glu_mult_bias or flags.unit_weights,
            'limit': flags.glu_up_softclamp_value if flags.glu_softclamp else None,
            'clamp': flags.glu_clamp_value,
            'add_one': flags.glu_add_one,
        }

    def gated(self, both: Float[Tensor, '... c']) -> Float[Tensor, '... d']:
        value, gate = both.chunk(2, dim=-1)
        if self.limit is not None:
            value = softclamp(value, self.limit)
        if self.clamp is not None:
            value, gate = value.clamp(-self.clamp, self.clamp), gate.clamp(max=self.clamp)
        out: Tensor = (value + 1.0 if self.add_one else value) * self.act(gate)
        return out * self.mult_bias if isinstance(self.mult_bias, Tensor) else out

    def forward(self, both: Float[Tensor, '... c']) -> Float[Tensor, '... d']:
        return self.gated(both)


class GLU(Gate):
    """Gated linear unit, https://arxiv.org/abs/2002.05202: one half of a linear map, times the activation of the other.

    forward: (… dim_in) -> (… dim_out). The keywords are those of ``Gate``, and ``bias``: that of the linear map.
    """

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        activation: nn.Module,
        mult_bias: bool = False,
        bias: bool = True,
        canon: bool = False,
        unit: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(dim_out, activation, mult_bias, **settings)
        self.canon = CausalConvolution(dim_out * 2, 'inside') if canon else None
        self.proj = stream_linear(dim_in, dim_out * 2, bias=bias, unit=unit)

    def forward(self, x: Float[Tensor, '... c'], around: BranchInputs | None = None) -> Float[Tensor, '... d']:
        return self.gated(convolved_hidden(self.canon, self.proj(x), around))


class Convolved(nn.Sequential):
    """A linear map, a convolution over tokens, and an activation. forward: (… n c) -> (… n d)."""

    def __init__(self, linear: nn.Linear, activation: nn.Module) -> None:
        super().__init__(linear, activation)
        self.canon = CausalConvolution(linear.out_features, 'inside')

    def forward(self, x: Float[Tensor, '... n c'], around: BranchInputs | None = None) -> Float[Tensor, '... n d']:
        out: Tensor = self[1](convolved_hidden(self.canon, self[0](x), around))
        return out


def convolved_hidden(
    convolution: CausalConvolution | None, x: Float[Tensor, '... n d'], around: BranchInputs | None
) -> Float[Tensor, '... n d']:
    if convolution is None:
        return x
    out: Tensor = convolution(x) if around is None else convolution(x, around.padding, around.past)
    return out


class InnerFirst(nn.Sequential):
    """Modules one after the other, of which the first is told what surrounds the branch. forward: (… n c) -> (… n e)."""

    def forward(self, x: Float[Tensor, '... n c'], around: BranchInputs | None = None) -> Float[Tensor, '... n e']:
        first, *rest = self
        x = first(x, around)
        for module in rest:
            x = module(x)
        return x


class FeedForward(Module):
    """Linear map to ``dim * mult`` features, activation, linear map to ``dim_out`` (None: ``dim``).

    The keywords are those of ``FeedForwardFlags``; ``FeedForward.from_flags(dim, flags)`` takes them already parsed.
    forward: (… n dim) -> (… n dim_out), times ``deep_embed`` (b n dim_out) if there is one. With ``experts``, a stack is also
    given what keeps them in balance: (output, ``Intermediates``).
    Raises ValueError if the last axis of the input is not ``dim``.
    """

    __signature__: Any = ClassSignature(only(FeedForwardFlags))

    def __init__(
        self, dim: int, dim_out: int | None = None, mult: float = 4, *more: Any, **flags: Unpack[FeedForwardKeywords]
    ) -> None:
        super().__init__()
        named = FeedForwardFlags.by_position(more, behind='mult', where='FeedForward')
        if twice := [name for name in named if name in flags]:
            raise TypeError(f'FeedForward: {", ".join(twice)} must be given once, by position or by name, got both.')
        parsed = FeedForwardFlags.parse({'dim_out': dim_out, 'mult': mult, **named, **flags}, where='FeedForward')
        check_feedforward(parsed, dim)
        self._build(dim, parsed)

    @classmethod
    def from_flags(cls, dim: int, flags: FeedForwardFlags) -> FeedForward:
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._build(dim, flags)
        return self

    def _build(self, dim: int, flags: FeedForwardFlags) -> None:
        self.dim = dim
        self.flags = flags = effective(flags)
        dim_out = dim if flags.dim_out is None else flags.dim_out
        dim_inner = flags.inner(dim)
        activation = choose_activation(flags, dim_inner)
        unit, biased = flags.unit_weights, not (flags.no_bias or flags.unit_weights)
        if unit:
            activation = GainedActivation(dim_inner, dim, activation)
        if flags.experts is not None:
            self.ff: nn.Module = self._experts(dim, dim_out, flags, activation)
            return
        first = (
            GLU(
                dim,
                dim_inner,
                activation,
                bias=flags.glu_bias and not unit,
                canon=flags.canon,
                unit=unit,
                **Gate.settings(flags),
            )
            if flags.glu
            else (Convolved if flags.canon else nn.Sequential)(
                stream_linear(dim, dim_inner, bias=biased, unit=unit), activation
            )
        )
        self.ff = Sequential(
            first,
            LayerNorm(dim_inner) if flags.post_act_ln else None,
            Dropout(flags.dropout),
            branch_output(dim_inner, dim_out, biased, zero=flags.zero_init_output, depth=flags.output_proj_depth, unit=unit),
            Dropout(flags.sublayer_dropout) if flags.sublayer_dropout > 0.0 else None,
        )
        if flags.canon:
            self.ff = InnerFirst(*self.ff)

    @staticmethod
    def _experts(dim: int, dim_out: int, flags: FeedForwardFlags, activation: nn.Module) -> Experts:
        # registers operators with PyTorch, so only where they are used
        from x_transformers.experts import Experts

        width = flags.inner(dim)
        between = Sequential(
            Gate(width, activation, **Gate.settings(flags)) if flags.glu else activation,
            LayerNorm(width) if flags.post_act_ln else None,
            Dropout(flags.dropout),
        )
        shared = None
        if flags.shared_experts:
            one = replace(flags, experts=None, dim_inner=width * flags.shared_experts, sublayer_dropout=0.0)
            shared = FeedForward.from_flags(dim, one)
        gate = nn.Linear(dim, 1, bias=False) if flags.shared_experts and flags.shared_experts_gate else None
        return Experts(dim, dim_out, flags, between, shared, gate)

    @property
    def balances_by_bias(self) -> bool:
        """Whether ``balance_experts_`` has anything to do."""
        return self.flags.experts is not None and self.flags.router_balance == 'bias'

    def balance_experts_(self) -> None:
        """Move the biases that keep experts in balance; without such, do nothing. https://arxiv.org/abs/2408.15664"""
        if self.balances_by_bias:
            self.ff.router.balance_()  # type: ignore[union-attr, operator]

    def muon_parameters(self) -> list[Tensor]:
        """The weight matrices: what the Muon optimizer is meant for."""
        return [module.weight for module in self.modules() if isinstance(module, nn.Linear)]

    def forward(
        self,
        x: Float[Tensor, '... n d'],
        deep_embed: Float[Tensor, 'b n e'] | None = None,
        *,
        around: BranchInputs | None = None,
    ) -> Any:
        deep_embed = deep_embed if around is None else around.deep_embed
        if not isinstance(x, Tensor):
            raise TypeError(f'x must be a tensor of {self.dim} features in its last axis, got {type(x).__name__}.')
        if x.shape[-1] != self.dim:
            raise ValueError(
                f'x must have {self.dim} features in its last axis, got shape {tuple(x.shape)}. '
                f'Project it first, or build FeedForward(dim={x.shape[-1]}).'
            )
        if deep_embed is not None and around is None:
            check_factors(deep_embed, (*x.shape[:-1], self.flags.dim_out or self.dim))
        if self.flags.experts is not None:
            return self._by_experts(x, deep_embed, around)
        out: Tensor
        if self.flags.canon:
            out = self.ff(x, around)
        elif writes_program():
            out = self.ff(x)
        else:
            piece = self._piece(x) if x.numel() > self.dim * self.dim else None
            out = run_through(self.ff, x) if piece is None else self._in_pieces(x, piece)
        return out if deep_embed is None else out * deep_embed

    def _by_experts(
        self, x: Float[Tensor, '... n d'], deep_embed: Float[Tensor, '... n d'] | None, around: BranchInputs | None
    ) -> Any:
        """The output; inside a stack also what keeps the experts in balance, as attention reports what it has seen."""
        out, loss = self.ff(x, None if around is None else around.tokens)
        out = F.dropout(out, self.flags.sublayer_dropout, self.training) if self.flags.sublayer_dropout else out
        out = out if deep_embed is None else out * deep_embed
        if around is None or loss is None:
            return out
        from x_transformers.attention.inputs import Intermediates

        return out, Intermediates(expert_loss=loss)

    def _piece(self, x: Float[Tensor, '... n d']) -> int | None:
        """How many tokens at a time where no gradient keeps the inner features and nobody else sees them; None: all at once.

        So many that their inner features take no more memory than x, or than the weights that make them, whichever is more.
        Asked of an x that is larger than the square of its width.
        """
        if torch.is_grad_enabled() or self.training:
            return None
        heard = any(module._forward_hooks or module._forward_pre_hooks for module in self.ff.modules())
        if self.flags.custom_activation is not None or heard:
            return None
        piece = max(self.dim, x.numel() // (self.flags.inner(self.dim) * (2 if self.flags.glu else 1)))
        return piece if piece * self.dim < x.numel() else None

    def _in_pieces(self, x: Float[Tensor, '... n d'], piece: int) -> Float[Tensor, '... n e']:
        first, *rest = x.reshape(-1, self.dim).split(piece)
        out = run_through(self.ff, first)
        whole = out.new_empty(x.numel() // self.dim, out.shape[-1])
        whole[:piece] = out
        for number, part in enumerate(rest, start=1):
            whole[number * piece : number * piece + part.shape[0]] = run_through(self.ff, part)
        return whole.view(*x.shape[:-1], -1)


def check_factors(deep_embed: Any, shape: tuple[int, ...]) -> None:
    """Raise ValueError for what cannot be multiplied with an output of this shape."""
    got = tuple(deep_embed.shape) if isinstance(deep_embed, Tensor) else type(deep_embed).__name__
    fits = isinstance(got, tuple) and len(got) <= len(shape)
    if not fits or any(not is_any(n, 1, m) for n, m in zip(reversed(got), reversed(shape), strict=False)):
        raise ValueError(f'deep_embed must be factors of the output, a tensor of shape {shape}, got {got}.')


def choose_activation(flags: FeedForwardFlags, dim: int) -> nn.Module:
    """The activation that the flags name; a user's own is copied, so that no two layers share its parameters."""
    custom = flags.custom_activation
    activation: nn.Module
    if isinstance(custom, str):
        activation = NAMED_ACTIVATIONS[custom]()
    elif custom is not None:
        activation = deepcopy(custom) if isinstance(custom, nn.Module) else Activation(custom)
    elif flags.relu_squared:
        activation = ReluSquared()
    elif flags.solu:
        activation = SoLU(dim)
    elif flags.glu_softclamp:
        activation = ClampedGate(flags.glu_gate_softclamp_value, silu=flags.swish)
    else:
        activation = nn.SiLU() if flags.swish else nn.GELU()
    return activation if flags.softclamp_value is None or flags.glu else Clamped(flags.softclamp_value, activation)
