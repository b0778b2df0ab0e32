"""Refusals: which flag each kind of parallelism does not support; one table, checked before anything starts.

``tests/distributed`` proves that everything else gives the loss and the gradients of one process.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from x_transformers.attention.attention import Attention
from x_transformers.distributed.context import sliced_refusals
from x_transformers.distributed.degrees import Degrees, MeshError
from x_transformers.distributed.sequence import sequence_refusals
from x_transformers.distributed.stages import staged_refusals
from x_transformers.distributed.tensor import check_divides
from x_transformers.distributed.vocabulary import vocabulary_refusals
from x_transformers.feedforward import FeedForward
from x_transformers.flags.attention import AttentionFlags
from x_transformers.flags.base import Flags, default_of
from x_transformers.flags.feedforward import FeedForwardFlags
from x_transformers.flags.objectives import AutoregressiveOptions
from x_transformers.flags.rule import reasons_in
from x_transformers.flags.stack import StackFlags
from x_transformers.flags.wrapper import WrapperFlags

# whole kinds: each is refused under every flag
NOT_TOGETHER = {
    'shard': '--shard must be none with --pipeline: stages whose parameters lie in parts are not built.',
    'tensor': '--tensor must be 1 with --pipeline: stages whose heads are shared are not built.',
    'context': '--context must be 1 with --pipeline: stages of slices are not built.',
}
NOT_PROVEN = {
    'compile': '--compile must be off with several processes: it is not proven that results stay the same.',
    'checkpointing selective': '--checkpointing must be none or full: selective gave wrong gradients with '
    '`gate_residual` and `attn_hybrid_module`.',
    'offload': '--offload must be off: it moves shards between a GPU and the CPU, which has not been tried.',
}


class Refusal(NamedTuple):
    kind: str  # of parallelism, a column of the table in docs/scaling.md
    flag: str
    reason: str
    allowed: type | None = None  # values of the flag that are not refused


KINDS = (
    'shard none', 'shard full', 'shard hybrid', 'checkpoint', 'tensor', 'sequence parallel', 'loss parallel', 'context',
    'pipeline',
)  # fmt: skip

# whose fields say what is refused, and what stands in front of their names
OWNERS: tuple[tuple[str, type[Flags]], ...] = (
    ('attn_', AttentionFlags), ('ff_', FeedForwardFlags), ('', StackFlags), ('', WrapperFlags), ('', AutoregressiveOptions),
)  # fmt: skip


# a flag that gives other numbers under one of these kinds, or cannot run, says so at its field
REFUSALS = tuple(
    Refusal(kind, prefix + name, reason, allowed)
    for kind in KINDS
    for prefix, cls in OWNERS
    for name, (reason, allowed) in reasons_in(cls, kind).items()
)

# what modules are told without the name of their branch in front
BRANCHES: tuple[tuple[str, type[nn.Module]], ...] = (('attn_', Attention), ('ff_', FeedForward))


def refusals(model: nn.Module, kinds: set[str]) -> Iterator[str]:
    """One sentence for each flag of the model that one of these kinds of parallelism does not support."""
    for refusal in REFUSALS:
        if refusal.kind in kinds and is_set(model, refusal):
            yield f'`{refusal.flag}` must be left as it is with {refusal.kind}: {refusal.reason}.'


def is_set(model: nn.Module, refusal: Refusal) -> bool:
    for prefix, kind in BRANCHES:
        if refusal.flag.startswith(prefix):
            name = refusal.flag.removeprefix(prefix)
            return any(differs(module, name, refusal.allowed) for module in model.modules() if isinstance(module, kind))
    return any(differs(module, refusal.flag, refusal.allowed) for module in model.modules())


def differs(module: Any, name: str, allowed: type | None) -> bool:
    """Whether a flag of the module differs from its default and has no allowed value."""
    flags: Any = getattr(module, 'flags', None)
    field = type(flags).flag_fields().get(name) if hasattr(type(flags), 'flag_fields') else None
    if field is None:
        # objectives keep their keywords as attributes
        value, usual = getattr(module, name, False) is True, False
    else:
        value, usual = getattr(flags, name), default_of(field)
    return bool(value != usual) and not (allowed is not None and isinstance(value, allowed))


def option_refusals(
    degrees: Degrees,
    *,
    compile: bool,
    offload: bool,
    shard: str = 'none',
    checkpoint: Any = 'none',
    sequence_parallel: bool = False,
    loss_parallel: bool = False,
) -> list[str]:
    """One sentence for each option that is refused under all flags."""
    together = NOT_TOGETHER if degrees.pipeline > 1 else {}
    # with shard the number of those that share a parameter may be one, or not known yet
    parts = shard != 'none'
    found = [said for name, said in together.items() if getattr(degrees, name) > 1 or (parts and name == 'shard')]
    asked = {'compile': compile, 'offload': offload, 'checkpointing selective': checkpoint == 'selective'}
    if degrees.tensor == 1:
        beside = {'sequence-parallel': sequence_parallel, 'loss-parallel': loss_parallel}
        found += [
            f'--{name} must go with --tensor 2 or more, got 1. Leave it out, or give --no-{name} to a run that had it.'
            for name, on in beside.items()
            if on
        ]
    return found + [sentence for name, sentence in NOT_PROVEN.items() if asked[name]]


def check(
    model: nn.Module,
    degrees: Degrees,
    *,
    shard: str,
    checkpoint: Any,
    precision: str | None,
    compile: bool,
    offload: bool,
    sequence_parallel: bool = False,
    loss_parallel: bool = False,
) -> None:
    """Refuse all unsupported flags and options in one error.

    Errors: ``MeshError``.
    """
    found = option_refusals(
        degrees, compile=compile, offload=offload, shard=shard, checkpoint=checkpoint, sequence_parallel=sequence_parallel,
        loss_parallel=loss_parallel,
    )  # fmt: skip
    if precision is not None and shard == 'none':
        found.append('precision must be None for copies, got bf16: their weights stay as they are. Use autocast, or shard.')
    if checkpoint not in ('none', 'full', 'selective') and not (isinstance(checkpoint, int) and checkpoint >= 1):
        found.append(f"checkpoint must be 'none', 'full' or a number of layers, got {checkpoint!r}.")
    if shard == 'none' and degrees.shard > 1:
        found.append(f"shard must be 'full' or 'hybrid' where {degrees.shard} processes hold parts of a parameter, got 'none'.")
    kinds = {f'shard {shard}', *(() if checkpoint == 'none' else ('checkpoint',))}
    if degrees.tensor > 1:
        kinds.add('tensor')
        found += tensor_refusals(model, degrees, shard)
    if sequence_parallel:
        kinds.add('sequence parallel')
        found += sequence_refusals(model)
    if loss_parallel:
        kinds.add('loss parallel')
        found += vocabulary_refusals(model, degrees.tensor)
    if degrees.context > 1:
        kinds.add('context')
        found += sliced_refusals(model)
    if degrees.pipeline > 1:
        kinds.add('pipeline')
        found += staged_refusals(model, degrees.pipeline)
    found += refusals(model, kinds)
    if found:
        raise MeshError(' '.join(found))


def tensor_refusals(model: nn.Module, degrees: Degrees, shard: str) -> Iterator[str]:
    groups = degrees.replicate * degrees.context
    if shard == 'none' and groups > 1:
        what = 'data' if degrees.context == 1 else 'data, or different slices of them'
        yield f"shard must be 'full' or 'hybrid' where {groups} groups of --tensor read different {what}, got 'none'."
    yield from check_divides(model, degrees.tensor)
