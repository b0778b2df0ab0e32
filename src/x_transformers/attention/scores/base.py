"""What a score rule is, and the state that the rules change."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from x_transformers.attention.geometry import ScoreShape
from x_transformers.tensor_types import Bool, Float

if TYPE_CHECKING:
    from x_transformers.attention.mask import Mask
    from x_transformers.position.relative import Bias


class Form(Enum):
    """What a rule needs to be carried by a kernel that never holds the whole score matrix."""

    REWRITE = 'a change of queries and keys before they meet'
    BIAS = 'a number added to each score, known beforehand'
    POINTWISE = 'a function of one score at a time'
    SINK = 'one more term in the normaliser'
    MASK = 'who may look at whom'
    WEIGHTS = 'a softmax over each row'
    WHOLE = 'rows or heads together'


@dataclass
class ScoreState:
    """What one run of the reference works on: every rule reads it and writes on it, in order.

    ``scores`` become weights along the way, and these ``out``. ``wanted`` names the maps to record. ``shared`` says that
    somebody else holds the present ``scores`` (a record, or the backward of a mixer): do not change them in place.
    """

    q: Float[Tensor, 'b h i d']
    k: Float[Tensor, 'b kh j d']
    v: Float[Tensor, 'b kh j e']
    mask: Mask
    geometry: ScoreShape
    bias: Bias | None = None
    previous: Float[Tensor, 'b h i j'] | None = None
    wanted: tuple[str, ...] = ()
    records: dict[str, Tensor] = field(default_factory=dict)
    shared: bool = False
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
    def scores(self, scores: Tensor) -> None:
        self._scores = scores
        self.shared = False

    @property
    def out(self) -> Tensor:
        if self._out is None:
            raise RuntimeError('a rule asked for the output before the values were looked up')
        return self._out

    @out.setter
    def out(self, out: Tensor) -> None:
        self._out = out


class ScoreRule:
    """One line of the definition of attention: ``apply`` changes the state. Its form says which kernels can carry it."""

    name: ClassVar[str]
    form: ClassVar[Form]

    def apply(self, state: ScoreState) -> None:
        raise NotImplementedError


ScoreRules = tuple[ScoreRule, ...]


def rendered_bias(bias: Bias, geometry: ScoreShape) -> Float[Tensor, '#b #h #i j']:
    """A bias over all columns, one that is the same for all of them too."""
    rendered = bias.render(geometry)
    return rendered.expand(*rendered.shape[:-1], geometry.keys) if rendered.shape[-1] != geometry.keys else rendered
