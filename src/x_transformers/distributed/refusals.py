"""Which flag cannot be used with which kind of parallelism, and why: one table, asked before anything starts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

if TYPE_CHECKING:
    from x_transformers.distributed.mesh import Degrees

# whole kinds that do not exist here yet
NOT_BUILT = {
    'tensor': '--tensor must be 1: tensor parallelism is not built. Use --shard full.',
    'context': '--context must be 1: context parallelism is not built. Use --shard full and activation checkpointing.',
    'pipeline': '--pipeline must be 1: pipeline parallelism is not built. Use --shard full or hybrid.',
}


class Refusal(NamedTuple):
    kind: str  # the kind of parallelism that the flag cannot have
    flag: str
    reason: str


REFUSALS: tuple[Refusal, ...] = ()


def refusals(model: nn.Module, kinds: set[str]) -> Iterator[str]:
    """A sentence for each flag of the model that one of these kinds of parallelism cannot do."""
    for refusal in REFUSALS:
        if refusal.kind in kinds and is_set(model, refusal.flag):
            yield f'{refusal.flag} cannot be used with {refusal.kind}: {refusal.reason}.'


def is_set(model: nn.Module, flag: str) -> bool:
    return any(bool(getattr(getattr(module, 'flags', None), flag, False)) for module in model.modules())


def check(model: nn.Module, degrees: Degrees, *, shard: str, checkpoint: Any, precision: str | None, offload: bool) -> None:
    """Refuse what cannot be done, naming all of it.

    Errors: ``MeshError``.
    """
    from x_transformers.distributed.mesh import MeshError

    found = [sentence for name, sentence in NOT_BUILT.items() if getattr(degrees, name) > 1]
    if precision is not None and shard == 'none':
        found.append('precision must be None for copies, got bf16: their weights stay as they are. Use autocast, or shard.')
    if offload and shard == 'none':
        found.append('offload must be False for copies, got True: only shards move to the CPU. Use --shard full.')
    if checkpoint not in ('none', 'full', 'selective') and not (isinstance(checkpoint, int) and checkpoint >= 1):
        found.append(f"checkpoint must be 'none', 'full', 'selective' or a number of layers, got {checkpoint!r}.")
    found += refusals(model, {f'shard {shard}', *(() if checkpoint == 'none' else ('checkpoint',))})
    if found:
        raise MeshError(' '.join(found))
