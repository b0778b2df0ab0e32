"""Kernel choice: the first without refusals and reservations, else the first without refusals."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from x_transformers.attention.kernels.base import CallFacts, Kernel, KernelArgs, Needs
from x_transformers.attention.kernels.blocks import Blocks
from x_transformers.attention.kernels.facts import facts_of
from x_transformers.attention.kernels.flex import Flex
from x_transformers.attention.kernels.reference import Reference
from x_transformers.attention.kernels.sdpa import Sdpa
from x_transformers.attention.kernels.varlen import Varlen
from x_transformers.helpers import recall, remember, under_transform

KERNELS: tuple[Kernel, ...] = (Varlen(), Sdpa(), Flex(), Blocks(), Reference())
NAMES = tuple(kernel.name for kernel in KERNELS)

forced: ContextVar[str | None] = ContextVar('x_transformers_kernel', default=None)


@contextmanager
def use_kernel(name: str) -> Iterator[None]:
    """Run every attention inside on one kernel: ``varlen``, ``sdpa``, ``flex``, ``blocks`` or ``reference``.

    Where it cannot, attention raises ValueError with its reasons. A compiled program keeps the choice that held when it was
    compiled.
    """
    if name not in NAMES:
        raise ValueError(f'name must be one of {", ".join(NAMES)}, got {name!r}.')
    token = forced.set(name)
    try:
        yield
    finally:
        forced.reset(token)


def forced_name() -> str | None:
    return forced.get()


# a compiler cannot look into a context variable. This is what torch.compiler.assume_constant_result does, but that imports the
# whole compiler
forced_name._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choose_kernel(needs: Needs, call: CallFacts) -> Kernel:
    """The kernel for this call. Nothing but facts known before any number is looked at."""
    name = forced_name()
    if name is not None:
        kernel = KERNELS[NAMES.index(name)]
        reasons = kernel.refusals(needs, call)
        if reasons:
            raise ValueError(f'the {name} kernel cannot run this attention: {"; ".join(reasons)}')
        return kernel
    fallback: Kernel | None = None
    for kernel in KERNELS:
        if kernel.refusals(needs, call):
            continue
        if not kernel.reservations(needs, call):
            return kernel
        fallback = fallback or kernel
    return fallback or KERNELS[-1]


def kernel_of(needs: Needs, args: KernelArgs) -> Kernel:
    """The kernel of a call, chosen once for all layers that share a mask and ask the same of it."""
    q, k, v, mask = args.q, args.k, args.v, args.mask
    learns = torch.is_grad_enabled() and (q.requires_grad, k.requires_grad, v.requires_grad)
    key = (
        'kernel', args.geometry, needs, q.shape[1], k.shape[1], q.shape[-1], v.shape[-1], q.dtype, args.autocast,
        q.device, learns, args.dropout > 0, args.return_scores, args.previous is None, args.delta is None,
        under_transform(), forced_name(),
    )  # fmt: skip
    known: Kernel | None = recall(mask.memo, key, args.bias)
    return remember(mask.memo, key, choose_kernel(needs, facts_of(args)), args.bias) if known is None else known


def explain(needs: Needs, call: CallFacts) -> str:
    """Which kernel would run, and what each other one has against it."""
    chosen = choose_kernel(needs, call)
    lines = [f'{chosen.name} runs this attention']
    for kernel in KERNELS:
        if kernel is chosen:
            continue
        refusals, reservations = kernel.refusals(needs, call), kernel.reservations(needs, call)
        if refusals:
            lines.append(f'{kernel.name} cannot: {"; ".join(refusals)}')
        elif reservations:
            lines.append(f'{kernel.name} could, but: {"; ".join(reservations)}')
        else:
            lines.append(f'{kernel.name} could')
    return '\n'.join(lines)
