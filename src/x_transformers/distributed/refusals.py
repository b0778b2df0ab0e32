"""Which kind of parallelism cannot be had, and with which flag: one table, asked before anything starts.

Everything that is not refused here gives the loss and the gradients of one process, as ``tests/distributed`` proves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from x_transformers.distributed.degrees import Degrees, MeshError

# whole kinds: each is refused under every flag
NOT_BUILT = {
    'tensor': '--tensor must be 1: tensor parallelism is not built. Use --shard full.',
    'context': '--context must be 1: context parallelism is not built. Use --shard full and --checkpointing full.',
    'pipeline': '--pipeline must be 1: pipeline parallelism is not built. Use --shard full or hybrid.',
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


KINDS = ('shard none', 'shard full', 'shard hybrid', 'checkpoint')

# a flag that gives other numbers under one of these kinds gets its row here; none of them does
REFUSALS: tuple[Refusal, ...] = ()


def refusals(model: nn.Module, kinds: set[str]) -> Iterator[str]:
    """A sentence for each flag of the model that one of these kinds of parallelism cannot do."""
    for refusal in REFUSALS:
        if refusal.kind in kinds and is_set(model, refusal.flag):
            yield f'{refusal.flag} must be off with {refusal.kind}: {refusal.reason}.'


def is_set(model: nn.Module, flag: str) -> bool:
    return any(bool(getattr(getattr(module, 'flags', None), flag, False)) for module in model.modules())


def option_refusals(degrees: Degrees, *, compile: bool, offload: bool, checkpoint: Any = 'none') -> list[str]:
    """A sentence for each option that is refused whatever the flags."""
    found = [sentence for name, sentence in NOT_BUILT.items() if getattr(degrees, name) > 1]
    asked = {'compile': compile, 'offload': offload, 'checkpointing selective': checkpoint == 'selective'}
    return found + [sentence for name, sentence in NOT_PROVEN.items() if asked[name]]


def check(
    model: nn.Module, degrees: Degrees, *, shard: str, checkpoint: Any, precision: str | None, compile: bool, offload: bool
) -> None:
    """Refuse what cannot be done, naming all of it.

    Errors: ``MeshError``.
    """
    found = option_refusals(degrees, compile=compile, offload=offload, checkpoint=checkpoint)
    if precision is not None and shard == 'none':
        found.append('precision must be None for copies, got bf16: their weights stay as they are. Use autocast, or shard.')
    if checkpoint not in ('none', 'full', 'selective') and not (isinstance(checkpoint, int) and checkpoint >= 1):
        found.append(f"checkpoint must be 'none', 'full' or a number of layers, got {checkpoint!r}.")
    if shard == 'none' and degrees.shard > 1:
        found.append(f"shard must be 'full' or 'hybrid' where {degrees.shard} processes hold parts of a parameter, got 'none'.")
    found += refusals(model, {f'shard {shard}', *(() if checkpoint == 'none' else ('checkpoint',))})
    if found:
        raise MeshError(' '.join(found))
