"""The flags of one feed-forward layer. Derived: ``activation`` (its name) and ``inner(dim)`` (the hidden width)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from x_transformers.flags.base import Flags, flag
from x_transformers.flags.reasons import DRAWS, DROPS, UNIT, UNKNOWN
from x_transformers.flags.rule import Rule

ACTIVATIONS = ('relu', 'gelu', 'gelu_tanh', 'quick_gelu', 'silu')
GLU = 'https://arxiv.org/abs/2002.05202'
EXPERTS = 'https://arxiv.org/abs/2101.03961'
SHARED = 'https://arxiv.org/abs/2401.06066'
BIASED = 'https://arxiv.org/abs/2408.15664'


def idle_unless_balanced_by(way: str, name: str, example: Mapping[str, Any] | None = None) -> Rule:
    """A setting of one way to keep experts in balance does nothing beside another way."""
    return Rule(
        (name, 'router_balance'),
        lambda flags, dim: flags.experts is not None and flags.is_changed(name) and flags.router_balance != way,
        f'no {way} keeps these experts in balance',
        {'experts': 4, **(example or {}), name: 0.1},
        inert=True,
    )


@dataclass(frozen=True, kw_only=True, repr=False)
class FeedForwardFlags(Flags):
    """Every keyword of ``FeedForward`` except ``dim``; in a stack with ``ff_`` in front."""

    dim_out: int | None = flag(None, 'Width of the output; None: the width of the input.', low=1)
    mult: float = flag(
        4, 'Hidden width as a multiple of the input width.', above=0, often=True,
        rules=(
            Rule(
                ('mult',), lambda flags, dim: flags.inner(dim) < 1,
                'the hidden layer would have no channel (input width {dim})', {'mult': 0.01}, 'Choose a larger one.',
            ),
        ),
    )  # fmt: skip
    glu: bool = flag(
        False, 'Gated linear unit (GEGLU; SwiGLU with swish): half of the hidden layer gates the other half.', paper=GLU,
        often=True,
        formula='W_out (W_v x ⊙ act(W_g x))',
    )  # fmt: skip
    glu_mult_bias: bool = flag(False, 'A learned factor per hidden channel after the gate.', parent='glu')
    swish: bool = flag(False, 'SiLU instead of GELU.', paper=GLU, often=True, formula='x σ(x)', one_of='activation')
    relu_squared: bool = flag(
        False, 'The square of ReLU instead of GELU.', paper='https://arxiv.org/abs/2109.08668', formula='max(0, x)²',
        one_of='activation',
    )  # fmt: skip
    solu: bool = flag(
        False, 'Softmax linear units: LayerNorm(softmax(x) x).', paper='https://transformer-circuits.pub/2022/solu/index.html',
        formula='LayerNorm(softmax(x) ⊙ x)', one_of='activation',
        refused={'tensor': 'it norms all inner features, of which each process has some'},
    )  # fmt: skip
    custom_activation: Callable[..., Any] | str | None = flag(
        None, "Your own activation; it is copied. Or the name of one: 'relu', 'gelu', 'gelu_tanh', 'quick_gelu', 'silu'.",
        example=abs, refused={'tensor': (UNKNOWN, str)},
        idle_with={'activation': 'your own activation takes the place of the other, which would do nothing'},
        rules=(
            Rule(
                ('custom_activation',),
                lambda flags, dim: isinstance(flags.custom_activation, str) and flags.custom_activation not in ACTIVATIONS,
                f'the known names are {", ".join(ACTIVATIONS)}', {'custom_activation': 'gelu_new'},
                'Use one of those, or give a function.',
            ),
        ),
    )  # fmt: skip
    post_act_ln: bool = flag(
        False, 'Layer norm after the activation.', paper='https://arxiv.org/abs/2110.09456',
        refused={'tensor': 'it norms all inner features, of which each process has some'},
    )  # fmt: skip
    dropout: float = flag(
        0.0, 'Dropout on the hidden layer.', low=0.0, high=1.0, often=True, refused={'tensor': DROPS, 'context': DRAWS},
    )  # fmt: skip
    sublayer_dropout: float = flag(0.0, "Dropout on the layer's output.", low=0.0, high=1.0, refused={'context': DRAWS})
    no_bias: bool = flag(False, 'No biases, except in the projection of a gated linear unit.')
    zero_init_output: bool = flag(False, 'The output projection starts at zero.')

    glu_bias: bool = flag(True, 'A bias in the projection of a gated linear unit.', parent='glu', since='here')
    dim_inner: int | None = flag(
        None, 'Hidden width; None: the input width times mult.', low=1, since='here',
        excludes={'mult': 'both say how wide the hidden layer is'},
    )  # fmt: skip
    softclamp_value: float | None = flag(
        None, 'Keep the input of the activation inside a range with tanh.', since='2.19.0', above=0,
        idle_with={'glu': ('a gated linear unit has two inputs to clamp', 'Use [glu_softclamp].')},
    )  # fmt: skip
    glu_softclamp: bool = flag(
        False, 'Keep both factors of the gated linear unit inside a range with tanh; GELU or SiLU only.',
        paper='https://arxiv.org/abs/2607.24653', parent='glu', since='2.31.10',
        rules=(
            Rule(
                ('glu_softclamp', 'relu_squared', 'solu', 'custom_activation'),
                lambda flags, dim: flags.glu_softclamp and flags.activation not in ('gelu', 'swish'),
                'the clamped gate is defined for GELU and SiLU', {'glu': True, 'glu_softclamp': True, 'relu_squared': True},
                only_changed=True,
            ),
        ),
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
        rules=(
            Rule(
                ('glu_clamp_value', 'glu_softclamp'),
                lambda flags, dim: flags.glu and flags.glu_clamp_value is not None and flags.glu_softclamp,
                'each keeps both factors inside a range', {'glu': True, 'glu_clamp_value': 7.0, 'glu_softclamp': True},
            ),
        ),
    )  # fmt: skip
    glu_add_one: bool = flag(
        False, 'Add one to the factor of the gated linear unit without activation.', parent='glu', since='here'
    )
    unit_weights: bool = flag(
        False, 'Weights have unit length, there are no biases, and hidden units have learned gains; what enters the activation '
        'is times the root of the width, too. `ngpt` turns it on.', paper='https://arxiv.org/abs/2410.01131', since='here',
        refused={'tensor': UNIT},
        excludes={
            ('experts', 'zero_init_output', 'output_proj_depth'): (
                'weights of plain linear maps have unit length, from the start'
            ),
        },
    )  # fmt: skip
    experts: int | None = flag(
        None, 'Mixture of experts: the number of feed-forwards, of which each token passes through a few; no token is dropped.',
        paper=EXPERTS, since='here', low=2, refused={'context': 'their load is balanced over whole sequences'},
    )  # fmt: skip
    experts_active: int = flag(
        2, 'The number of experts per token.', paper=EXPERTS, parent='experts', since='here', low=1,
        rules=(
            Rule(
                ('experts_active', 'experts'),
                lambda flags, dim: flags.experts is not None and flags.experts_active > flags.experts,
                'a token cannot go through more experts than there are', {'experts': 4, 'experts_active': 5},
                'Choose at most {experts}.',
            ),
            Rule(
                ('experts_active', 'router_normalize'),
                lambda flags, dim: flags.experts is not None and flags.experts_active == 1 and flags.router_normalize,
                'the share of a single expert is always one, so that the router would learn nothing',
                {'experts': 4, 'experts_active': 1}, 'Set [router_normalize] to False.',
            ),
        ),
    )  # fmt: skip
    shared_experts: int = flag(
        0, 'The number of additional experts for every token, built as one of their joint width.', paper=SHARED,
        parent='experts', since='here', low=0,
    )  # fmt: skip
    shared_experts_gate: bool = flag(
        False, 'A sigmoid gate per token on the output of the shared experts.', paper='https://arxiv.org/abs/2407.10671',
        parent='shared_experts', since='here', formula='y ← Σ_e g_e f_e(x) + σ(w · x) f_shared(x)',
    )  # fmt: skip
    router: str = flag(
        'softmax', "The scores of experts: 'softmax' over all of them, or 'sigmoid' of each.",
        paper=(EXPERTS, 'https://arxiv.org/abs/2412.19437'), parent='experts', since='here', among=('softmax', 'sigmoid'),
    )  # fmt: skip
    router_normalize: bool = flag(
        True, 'Normalize the scores of the chosen experts to sum to one; False: use them unnormalized.', paper=SHARED,
        parent='experts', since='here',
    )  # fmt: skip
    router_scale: float = flag(
        1.0, 'A factor on the output of the routed experts.', paper='https://arxiv.org/abs/2412.19437', parent='experts',
        since='here', above=0,
    )  # fmt: skip
    router_bias: bool = flag(False, 'A learned bias for each expert in the router.', parent='experts', since='here')
    router_balance: str = flag(
        'loss', "What keeps experts in balance: a 'loss', a 'bias' that `balance_experts_` moves after each step, or 'none'.",
        paper=(EXPERTS, BIASED), parent='experts', since='here', among=('loss', 'bias', 'none'),
        refused={'pipeline': 'all processes count together how often experts are chosen'},
    )  # fmt: skip
    router_balance_weight: float = flag(
        0.01, 'Weight of that loss.', paper=EXPERTS, parent='experts', since='here', low=0.0,
        rules=(idle_unless_balanced_by('loss', 'router_balance_weight', {'router_balance': 'bias'}),),
    )  # fmt: skip
    router_balance_step: float = flag(
        0.001, 'The step size of that bias.', paper=BIASED, parent='experts', since='here', above=0,
        rules=(idle_unless_balanced_by('bias', 'router_balance_step'),),
    )  # fmt: skip
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
        excludes={'experts': 'an expert reads single tokens, which have no neighbours there'},
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
