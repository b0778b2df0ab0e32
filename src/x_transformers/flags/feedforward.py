"""The flags of one feed-forward layer. Derived: ``activation`` (its name) and ``inner(dim)`` (the hidden width)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from x_transformers.flags.base import Flags, flag

ACTIVATIONS = ('relu', 'gelu', 'gelu_tanh', 'quick_gelu', 'silu')
GLU = 'https://arxiv.org/abs/2002.05202'
EXPERTS = 'https://arxiv.org/abs/2101.03961'
SHARED = 'https://arxiv.org/abs/2401.06066'
BIASED = 'https://arxiv.org/abs/2408.15664'


@dataclass(frozen=True, kw_only=True, repr=False)
class FeedForwardFlags(Flags):
    """Every keyword of ``FeedForward`` except ``dim``; in a stack with ``ff_`` in front."""

    dim_out: int | None = flag(None, 'Width of the output; None: the width of the input.', low=1)
    mult: float = flag(4, 'Hidden width as a multiple of the input width.', above=0, often=True)
    glu: bool = flag(
        False, 'Gated linear unit (GEGLU; SwiGLU with swish): half of the hidden layer gates the other half.', paper=GLU,
        often=True,
        formula='W_out (W_v x ⊙ act(W_g x))',
    )  # fmt: skip
    glu_mult_bias: bool = flag(False, 'A learned factor per hidden channel after the gate.', parent='glu')
    swish: bool = flag(
        False,
        'SiLU instead of GELU.',
        paper=GLU,
        often=True,
        formula='x σ(x)',
        one_of='activation',
    )
    relu_squared: bool = flag(
        False,
        'The square of ReLU instead of GELU.',
        paper='https://arxiv.org/abs/2109.08668',
        formula='max(0, x)²',
        one_of='activation',
    )
    solu: bool = flag(
        False,
        'Softmax linear units: LayerNorm(softmax(x) x).',
        paper='https://transformer-circuits.pub/2022/solu/index.html',
        formula='LayerNorm(softmax(x) ⊙ x)',
        one_of='activation',
    )
    custom_activation: Callable[..., Any] | str | None = flag(
        None, "Your own activation; it is copied. Or the name of one: 'relu', 'gelu', 'gelu_tanh', 'quick_gelu', 'silu'."
    )
    post_act_ln: bool = flag(False, 'Layer norm after the activation.', paper='https://arxiv.org/abs/2110.09456')
    dropout: float = flag(0.0, 'Dropout on the hidden layer.', low=0.0, high=1.0, often=True)
    sublayer_dropout: float = flag(0.0, "Dropout on the layer's output.", low=0.0, high=1.0)
    no_bias: bool = flag(False, 'No biases, except in the projection of a gated linear unit.')
    zero_init_output: bool = flag(False, 'The output projection starts at zero.')

    glu_bias: bool = flag(True, 'A bias in the projection of a gated linear unit.', parent='glu', since='here')
    dim_inner: int | None = flag(None, 'Hidden width; None: the input width times mult.', low=1, since='here')
    softclamp_value: float | None = flag(
        None, 'Keep the input of the activation inside a range with tanh.', since='2.19.0', above=0
    )
    glu_softclamp: bool = flag(
        False, 'Keep both factors of the gated linear unit inside a range with tanh; GELU or SiLU only.',
        paper='https://arxiv.org/abs/2607.24653', parent='glu', since='2.31.10',
    )  # fmt: skip
    glu_gate_softclamp_value: float = flag(
        4.0, 'The largest absolute value of the gate.', paper='https://arxiv.org/abs/2607.24653', parent='glu_softclamp',
        since='2.31.10', above=0,
    )  # fmt: skip
    glu_up_softclamp_value: float = flag(
        25.0, 'The largest absolute value of the other factor.', paper='https://arxiv.org/abs/2607.24653',
        parent='glu_softclamp', since='2.31.10', above=0,
    )  # fmt: skip
    output_proj_depth: int | None = flag(
        None, 'The output projection starts with variance 1 / (2 · width · this).', since='2.31.10', low=1
    )
    glu_clamp_value: float | None = flag(
        None, 'Clamp the gate below this number, and the other factor of the gated linear unit to ± it.', parent='glu',
        since='here', above=0,
    )  # fmt: skip
    glu_add_one: bool = flag(
        False, 'Add one to the factor of the gated linear unit without activation.', parent='glu', since='here'
    )
    unit_weights: bool = flag(
        False, 'Weights have unit length, there are no biases, and hidden units have learned gains; what enters the activation '
        'is times the root of the width, too. `ngpt` turns it on.', paper='https://arxiv.org/abs/2410.01131', since='here',
    )  # fmt: skip
    experts: int | None = flag(
        None, 'Mixture of experts: so many feed-forwards, of which each token goes through a few; none is full.',
        paper=EXPERTS, since='here', low=2,
    )  # fmt: skip
    experts_active: int = flag(
        2, 'Through how many experts a token goes.', paper=EXPERTS, parent='experts', since='here', low=1
    )
    shared_experts: int = flag(
        0, 'So many more experts that every token goes through, built as one of their width together.', paper=SHARED,
        parent='experts', since='here', low=0,
    )  # fmt: skip
    router: str = flag(
        'softmax', "The scores of experts: 'softmax' over all of them, or 'sigmoid' of each.",
        paper=(EXPERTS, 'https://arxiv.org/abs/2412.19437'), parent='experts', since='here', among=('softmax', 'sigmoid'),
    )  # fmt: skip
    router_normalize: bool = flag(
        True, 'The scores of the chosen experts are made to add up to one; False: they count as they are.', paper=SHARED,
        parent='experts', since='here',
    )  # fmt: skip
    router_scale: float = flag(
        1.0, 'A factor on what the routed experts say.', paper='https://arxiv.org/abs/2412.19437', parent='experts',
        since='here', above=0,
    )  # fmt: skip
    router_bias: bool = flag(False, 'A learned bias for each expert in the router.', parent='experts', since='here')
    router_balance: str = flag(
        'loss', "What keeps experts in balance: a 'loss', a 'bias' that `balance_experts_` moves after each step, or 'none'.",
        paper=(EXPERTS, BIASED), parent='experts', since='here', among=('loss', 'bias', 'none'),
    )  # fmt: skip
    router_balance_weight: float = flag(0.01, 'Weight of that loss.', paper=EXPERTS, parent='experts', since='here', low=0.0)
    router_balance_step: float = flag(
        0.001, 'How far that bias moves at a time.', paper=BIASED, parent='experts', since='here', above=0
    )
    router_z_loss_weight: float = flag(
        0.0, 'Weight of a loss on the square of the log of the sum of exponentials in the router.',
        paper='https://arxiv.org/abs/2202.08906', parent='experts', since='here', low=0.0,
    )  # fmt: skip

    @cached_property
    def expert_loss(self) -> bool:
        """Whether the experts of the layer give a loss that the objective has to add."""
        balanced = self.router_balance == 'loss' and self.router_balance_weight > 0
        return self.experts is not None and (balanced or self.router_z_loss_weight > 0)

    canon: bool = flag(
        False, 'The input of the activation gets a causal convolution over four tokens, added.',
        paper='https://arxiv.org/abs/2512.17351', since='here', traits='row_order',
    )  # fmt: skip

    @cached_property
    def activation(self) -> str:
        """``custom``, ``relu_squared``, ``solu``, ``swish`` or ``gelu``."""
        if self.custom_activation is not None:
            return 'custom'
        for name in self.one_of('activation'):
            if getattr(self, name):
                return name
        return 'gelu'

    def inner(self, dim: int) -> int:
        return int(dim * self.mult) if self.dim_inner is None else self.dim_inner
