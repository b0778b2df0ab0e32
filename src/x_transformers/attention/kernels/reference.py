"""The definition of attention: the rules, one after the other, on the whole score matrix."""

from __future__ import annotations

from torch import Tensor

from x_transformers.attention.kernels.base import Call, Job, Needs
from x_transformers.attention.scores.base import Sheet
from x_transformers.tensor_types import Float

ALL_MAPS = ('similarities', 'scores', 'weights')


class Reference:
    """Carries everything. Its order of rules is what every other kernel must agree with."""

    name = 'reference'

    def refusals(self, needs: Needs, call: Call) -> tuple[str, ...]:
        return ()

    def reservations(self, needs: Needs, call: Call) -> tuple[str, ...]:
        return ()

    def __call__(self, job: Job) -> Float[Tensor, 'b h i e']:
        sheet = sheet_of(job)
        for rule in job.rules(job.scale):
            rule.apply(sheet)
        job.records.update(sheet.records)
        return sheet.out


def sheet_of(job: Job) -> Sheet:
    wanted = ALL_MAPS if job.keep else ('scores',) if job.hand_on else ()
    return Sheet(job.q, job.k, job.v, job.mask, job.where, job.bias, job.previous, wanted=wanted)


def maps_of(job: Job) -> dict[str, Tensor]:
    """All maps of a job that another kernel has done."""
    sheet = sheet_of(job)
    sheet.wanted = ALL_MAPS
    for rule in job.rules(job.scale):
        rule.apply(sheet)
        if 'weights' in sheet.records:
            break
    return sheet.records
