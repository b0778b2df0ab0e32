"""The definition of attention: the rules, one after the other, on the whole score matrix."""

from __future__ import annotations

from torch import Tensor

from x_transformers.attention.kernels.base import CallFacts, KernelArgs, Needs
from x_transformers.attention.scores.base import ScoreState
from x_transformers.tensor_types import Float

ALL_MAPS = ('similarities', 'scores', 'weights')


class Reference:
    """Carries everything. Its order of rules is what every other kernel must agree with."""

    name = 'reference'

    def refusals(self, needs: Needs, call: CallFacts) -> tuple[str, ...]:
        return ()

    def reservations(self, needs: Needs, call: CallFacts) -> tuple[str, ...]:
        return ()

    def __call__(self, args: KernelArgs) -> Float[Tensor, 'b h i e']:
        state = state_of(args)
        for rule in args.rules():
            rule.apply(state)
        args.records.update(state.records)
        return state.out


def state_of(args: KernelArgs) -> ScoreState:
    wanted = ALL_MAPS if args.return_attn else ('scores',) if args.return_scores else ()
    return ScoreState(
        args.q,
        args.k,
        args.v,
        args.mask,
        args.geometry,
        args.scale,
        args.bias,
        args.previous,
        wanted=wanted,
        rows=args.rows,
        delta=args.delta,
        factor=args.factor,
        composition=args.composition,
        steps=args.steps,
    )


def maps_of(args: KernelArgs) -> dict[str, Tensor]:
    """All maps of a job that another kernel has done."""
    state = state_of(args)
    state.wanted = ALL_MAPS
    for rule in args.rules():
        rule.apply(state)
        if 'weights' in state.records:
            break
    return state.records
