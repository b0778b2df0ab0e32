"""Which kernel runs: the first that refuses nothing and has no reservations, else the first that refuses nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from x_transformers.attention.kernels.base import CallFacts, Kernel, Needs
from x_transformers.attention.kernels.blocks import Blocks
from x_transformers.attention.kernels.flex import Flex
from x_transformers.attention.kernels.reference import Reference
from x_transformers.attention.kernels.sdpa import Sdpa
from x_transformers.attention.kernels.varlen import Varlen
from x_transformers.attention.scores.base import ScoreRules

KERNELS: tuple[Kernel, ...] = (Varlen(), Sdpa(), Flex(), Blocks(), Reference())
NAMES = tuple(kernel.name for kernel in KERNELS)

forced: ContextVar[str | None] = ContextVar('x_transformers_kernel', default=None)
any_forced = 0


@contextmanager
def use_kernel(name: str) -> Iterator[None]:
    """Run every attention inside on one kernel: ``varlen``, ``sdpa``, ``flex``, ``blocks`` or ``reference``.

    Where it cannot, attention raises ValueError with its reasons.
    """
    global any_forced
    if name not in NAMES:
        raise ValueError(f'there is no kernel {name!r}: choose one of {", ".join(NAMES)}')
    token = forced.set(name)
    any_forced += 1
    try:
        yield
    finally:
        any_forced -= 1
        forced.reset(token)


def forced_name() -> str | None:
    """Asked only while somebody forces a kernel: a compiler cannot look into a context variable."""
    return forced.get()


# what torch.compiler.assume_constant_result does, but that imports the whole compiler
forced_name._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choose_kernel(needs: Needs, call: CallFacts) -> Kernel:
    """The kernel for this call. Nothing but facts known before any number is looked at."""
    name = forced_name() if any_forced else None
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


def needs_of(settings: Mapping[str, Any]) -> Needs:
    """What settings, by the names of ``Attend``'s keywords, ask of a kernel."""

    def on(*names: str) -> tuple[str, ...]:
        return tuple(name for name in names if settings.get(name))

    weights = on('custom_attn_fn', 'sigmoid', 'hard', 'sparse_topk', 'gumbel_softmax')
    if weights[:1] == ('sparse_topk',):
        weights = on('sparse_topk_straight_through') or weights
    heads = ('pre_talking_heads', 'post_talking_heads', 'pre_scale_post_talking_heads')
    return Needs(
        weights=weights[0] if weights else 'softmax',
        whole=on(*heads, 'cog_signed', 'use_cope', 'cope', 'selective'),
        pointwise=on('softclamp_logits'),
        sink=bool(settings.get('head_learned_sink')),
        l2_distance=bool(settings.get('l2_distance')),
        onnxable=bool(settings.get('onnxable')),
    )


# rules that needs_of speaks of, and those that kernels do in their own way
KNOWN = frozenset({
    'similarity', 'residual_attn', 'record', 'attn_bias', 'mask', 'softclamp_logits', 'head_learned_sink', 'weights', 'dropout',
    'values', 'empty rows', 'pre_talking_heads', 'post_talking_heads', 'pre_scale_post_talking_heads', 'cog_signed', 'use_cope',
    'selective',
})  # fmt: skip


def with_rules(needs: Needs, rules: ScoreRules) -> Needs:
    """The same, with the rules that no kernel knows left to the reference."""
    return needs._replace(whole=(*needs.whole, *(rule.name for rule in rules if rule.name not in KNOWN)))
