"""The definition of attention: all rules in order, on the whole score matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from x_transformers.attention.kernels.base import CallFacts, KernelArgs, Needs
from x_transformers.attention.scores.base import ScoreState
from x_transformers.helpers import autocast_dtype
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
    """All maps of a call that another kernel has run."""
    state = state_of(args)
    state.wanted = ALL_MAPS
    for rule in args.rules():
        rule.apply(state)
        if 'weights' in state.records:
            break
    return state.records


def remade_maps(args: KernelArgs) -> dict[str, Tensor]:
    """All maps of a call, in the precision in which attention ran."""
    dtype = args.autocast
    if dtype is None and autocast_dtype(args.q) is None:
        return maps_of(args)
    with torch.autocast(args.q.device.type, dtype=dtype, enabled=dtype is not None):
        return maps_of(args)
