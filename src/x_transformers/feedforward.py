"""The feed-forward branch: two linear maps and an activation, gated or not."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.flags.constructors import only
from x_transformers.flags.feedforward import FeedForwardFlags
from x_transformers.flags.rule import effective
from x_transformers.flags.rules import check_feedforward
from x_transformers.flags.signature import ClassSignature
from x_transformers.helpers import Sequential, softclamp
from x_transformers.module import Dropout, Module, branch_output, empty_parameter
from x_transformers.norms import LayerNorm
from x_transformers.tensor_types import Float

if TYPE_CHECKING:
    from typing import Unpack

    from x_transformers.attention.inputs import BranchInputs
    from x_transformers.flags.keywords import FeedForwardKeywords


# tokens at a time where no gradient is wanted: in larger pieces the inner features only leave the processor's cache
PIECE = 512


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

    def __init__(self, fn: Callable[[Tensor], Tensor]) -> None:
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


class GLU(Module):
    """Gated linear unit, https://arxiv.org/abs/2002.05202: one half of a linear map, times the activation of the other.

    forward: (… dim_in) -> (… dim_out). ``mult_bias`` adds a learned factor per feature, which starts at 1. ``limit``: the half
    without activation becomes ``limit * tanh(x / limit)``.
    """

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        activation: nn.Module,
        mult_bias: bool = False,
        bias: bool = True,
        limit: float | None = None,
    ) -> None:
        super().__init__()
        self.limit = limit
        self.act = activation
        self.proj = nn.Linear(dim_in, dim_out * 2, bias=bias)
        self.mult_bias = empty_parameter(dim_out) if mult_bias else 1.0
        self.init_own()

    def init_own(self) -> None:
        if isinstance(self.mult_bias, Tensor):
            nn.init.ones_(self.mult_bias)

    def forward(self, x: Float[Tensor, '... c']) -> Float[Tensor, '... d']:
        value, gate = self.proj(x).chunk(2, dim=-1)
        if self.limit is not None:
            value = softclamp(value, self.limit)
        out: Tensor = value * self.act(gate)
        return out * self.mult_bias if isinstance(self.mult_bias, Tensor) else out


class FeedForward(Module):
    """Linear map to ``dim * mult`` features, activation, linear map to ``dim_out`` (None: ``dim``).

    The keywords are those of ``FeedForwardFlags``; ``FeedForward.from_flags(dim, flags)`` takes them already parsed.
    forward: (… n dim) -> (… n dim_out), times ``deep_embed`` (b n dim_out) if there is one.
    Raises ValueError if the last axis of the input is not ``dim``.
    """

    __signature__: Any = ClassSignature(only(FeedForwardFlags))

    def __init__(self, dim: int, dim_out: int | None = None, mult: float = 4, **flags: Unpack[FeedForwardKeywords]) -> None:
        super().__init__()
        parsed = FeedForwardFlags.parse({'dim_out': dim_out, 'mult': mult, **flags}, where='FeedForward')
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
        first = (
            GLU(
                dim,
                dim_inner,
                activation,
                mult_bias=flags.glu_mult_bias,
                bias=flags.glu_bias,
                limit=flags.glu_up_softclamp_value if flags.glu_softclamp else None,
            )
            if flags.glu
            else nn.Sequential(nn.Linear(dim, dim_inner, bias=not flags.no_bias), activation)
        )
        self.ff = Sequential(
            first,
            LayerNorm(dim_inner) if flags.post_act_ln else None,
            Dropout(flags.dropout),
            branch_output(dim_inner, dim_out, not flags.no_bias, zero=flags.zero_init_output, depth=flags.output_proj_depth),
            Dropout(flags.sublayer_dropout) if flags.sublayer_dropout > 0.0 else None,
        )

    def muon_parameters(self) -> list[Tensor]:
        """The weight matrices: what the Muon optimizer is meant for."""
        return [module.weight for module in self.modules() if isinstance(module, nn.Linear)]

    def forward(
        self,
        x: Float[Tensor, '... n d'],
        deep_embed: Float[Tensor, 'b n e'] | None = None,
        *,
        around: BranchInputs | None = None,
    ) -> Float[Tensor, '... n e']:
        deep_embed = deep_embed if around is None else around.deep_embed
        if x.shape[-1] != self.dim:
            raise ValueError(
                f'the feed-forward takes inputs of {self.dim} features, but x has {x.shape[-1]} in its last axis '
                f'(shape {tuple(x.shape)}): project it first, or build FeedForward(dim={x.shape[-1]})'
            )
        out = self._in_pieces(x) if self._takes_pieces(x) else self.ff(x)
        return out if deep_embed is None else out * deep_embed

    def _takes_pieces(self, x: Float[Tensor, '... n d']) -> bool:
        """Whether the inner features of all tokens need not be there at once: no gradient keeps them, nobody else sees them."""
        # asked first: a compiler would bind the number of tokens to what is compared with it
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or self.training or x.numel() <= PIECE * self.dim:
            return False
        heard = any(module._forward_hooks or module._forward_pre_hooks for module in self.ff.modules())
        return self.flags.custom_activation is None and not heard

    def _in_pieces(self, x: Float[Tensor, '... n d']) -> Float[Tensor, '... n e']:
        first, *rest = x.reshape(-1, self.dim).split(PIECE)
        out: Tensor = self.ff(first)
        whole = out.new_empty(x.numel() // self.dim, out.shape[-1])
        whole[:PIECE] = out
        for number, piece in enumerate(rest, start=1):
            whole[number * PIECE : number * PIECE + piece.shape[0]] = self.ff(piece)
        return whole.view(*x.shape[:-1], -1)


def choose_activation(flags: FeedForwardFlags, dim: int) -> nn.Module:
    """The activation that the flags name; a user's own is copied, so that no two layers share its parameters."""
    custom = flags.custom_activation
    made: nn.Module
    if isinstance(custom, str):
        made = NAMED_ACTIVATIONS[custom]()
    elif custom is not None:
        made = deepcopy(custom) if isinstance(custom, nn.Module) else Activation(custom)
    elif flags.relu_squared:
        made = ReluSquared()
    elif flags.solu:
        made = SoLU(dim)
    elif flags.glu_softclamp:
        made = ClampedGate(flags.glu_gate_softclamp_value, silu=flags.swish)
    else:
        made = nn.SiLU() if flags.swish else nn.GELU()
    return made if flags.softclamp_value is None else Clamped(flags.softclamp_value, made)
