"""The score rule interface, and the state that rules change."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, Self

from torch import Tensor, nn

from x_transformers.attention.geometry import ScoreShape
from x_transformers.flags.scores import ScoreFlags
from x_transformers.tensor_types import Bool, Float

if TYPE_CHECKING:
    from x_transformers.attention.mask import Mask
    from x_transformers.attention.of_tokens import Composition, PathSteps
    from x_transformers.position.bias import Bias


class Form(Enum):
    """What a rule needs to be carried by a kernel that never holds the whole score matrix."""

    REWRITE = 'a change of queries and keys before they meet'
    BIAS = 'a number added to each score, known beforehand'
    POINTWISE = 'a function of one score at a time'
    SINK = 'one more term in the normalizer'
    MASK = 'who may look at whom'
    WEIGHTS = 'a function from each row of scores to weights'
    WHOLE = 'rows or heads together'
    DROPOUT = 'weights that are left out at random'
    RECORD = 'nothing: it only keeps what is there'
    OUTPUT = 'weights times values'


@dataclass
class ScoreState:
    """What one run of the reference works on: every rule reads it and changes it, in order.

    ``scores`` become weights along the way, and these ``out``. ``wanted`` names the maps to record. ``shared`` says that
    somebody else holds the present ``scores`` (a record, or the backward of a mixer): do not change them in place.
    ``rows`` tells which queries are tokens, ``delta`` is added to the weights, ``inverted`` says that keys are shared out,
    ``factor`` multiplies the queries, ``composition`` says how heads are mixed,
    ``steps`` what lies between keys and queries.
    """

    q: Float[Tensor, 'b h i d']
    k: Float[Tensor, 'b kh j d']
    v: Float[Tensor, 'b kh j e']
    mask: Mask
    geometry: ScoreShape
    scale: float
    bias: Bias | None = None
    previous: Float[Tensor, 'b h i j'] | None = None
    wanted: tuple[str, ...] = ()
    records: dict[str, Tensor] = field(default_factory=dict)
    shared: bool = False
    rows: Bool[Tensor, 'b i'] | None = None
    delta: Float[Tensor, '... n m'] | None = None
    inverted: bool = False
    factor: Float[Tensor, '#b h #i 1'] | None = None
    composition: Composition | None = None
    steps: PathSteps | None = None
    allowed: Bool[Tensor, '#b #h i j'] | None = None
    sign: Tensor | None = None
    gamma: Tensor | None = None
    _scores: Tensor | None = None
    _out: Tensor | None = None

    @property
    def scores(self) -> Tensor:
        if self._scores is None:
            raise RuntimeError('a rule asked for the scores before queries and keys met')
        return self._scores

    @scores.setter
    def scores(self, scores: Float[Tensor, 'b h i j']) -> None:
        self._scores = scores
        self.shared = False

    @property
    def out(self) -> Tensor:
        if self._out is None:
            raise RuntimeError('a rule asked for the output before the values were summed')
        return self._out

    @out.setter
    def out(self, out: Float[Tensor, 'b h i e']) -> None:
        self._out = out


class ScoreRule:
    """One line of the definition of attention: ``apply`` changes the state.

    ``name`` is the flag that turns the rule on; a rule whose name is no flag is always on. ``form`` says which kernels could
    carry it, ``unfused`` why no fused kernel does (None: at least one does, in all combinations that its form allows).
    ``per_head``: its parameters are counted by heads.
    """

    name: ClassVar[str]
    form: ClassVar[Form]
    unfused: ClassVar[str | None] = 'no fused kernel knows it'
    per_head: ClassVar[bool] = False

    @classmethod
    def is_on(cls, flags: ScoreFlags) -> bool:
        value = getattr(flags, cls.name, True)
        return value is not None and value is not False

    @classmethod
    def parts(cls, flags: ScoreFlags) -> dict[str, nn.Module | nn.Parameter | None]:
        """The parameters and modules that ``Attend`` owns for this rule, by their name in its state; None where it is off."""
        return {}

    @classmethod
    def init_parts(cls, parts: Any) -> None:
        """Fill bare parameters; modules fill their own."""

    @classmethod
    def from_flags(cls, flags: ScoreFlags, parts: Any) -> Self | None:
        """The rule, or None where it is off. ``parts`` is the ``Attend`` that owns what ``parts`` made."""
        return cls() if cls.is_on(flags) else None

    def apply(self, state: ScoreState) -> None:
        raise NotImplementedError


ScoreRules = tuple[ScoreRule, ...]
