"""Collectives of a group: copies, sums, slices, sharded parameters and their gathering."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from x_transformers.attention.inputs import BranchInputs
from x_transformers.tensor_types import Float, Shaped


def copied(t: Shaped[Tensor, '...'], mesh: DeviceMesh) -> Shaped[Tensor, '...']:
    """``t``, which all processes hold and use differently; its gradients are summed over them."""
    if not t.requires_grad:
        return t
    return DTensor.from_local(t, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


def added_up(t: Float[Tensor, '...'], mesh: DeviceMesh) -> Float[Tensor, '...']:
    """The sum over the processes, which all of them use in the same way."""
    return DTensor.from_local(t, mesh, [Partial()], run_check=False).redistribute(placements=[Replicate()]).to_local()


def slice_of(t: Float[Tensor, '... n d'], mesh: DeviceMesh) -> Float[Tensor, '... m d']:
    """This process's rows of a tensor that all hold; its gradient is gathered from all rows."""
    return DTensor.from_local(t, mesh, [Replicate()], run_check=False).redistribute(placements=[along_rows(t)]).to_local()


def summed_rows(t: Float[Tensor, '... n d'], mesh: DeviceMesh) -> Float[Tensor, '... m d']:
    """This process's rows of the sum over the processes."""
    return DTensor.from_local(t, mesh, [Partial()], run_check=False).redistribute(placements=[along_rows(t)]).to_local()


def all_rows(t: Float[Tensor, '... m d'], whole: int, mesh: DeviceMesh, *, alike: bool) -> Float[Tensor, '... n d']:
    """Gather the ``whole`` rows. ``alike``: all processes use them in the same way; otherwise gradients are summed."""
    return whole_of(t, t.ndim - 2, whole, mesh, alike=alike)


def whole_of(t: Shaped[Tensor, '...'], axis: int, whole: int, mesh: DeviceMesh, *, alike: bool) -> Shaped[Tensor, '...']:
    """Gather along any axis, as ``all_rows`` does along the rows."""
    shape = torch.Size((*t.shape[:axis], whole, *t.shape[axis + 1 :]))
    stride = torch.empty(shape, device='meta').stride()
    spread = DTensor.from_local(t.contiguous(), mesh, [Shard(axis)], run_check=False, shape=shape, stride=stride)
    return spread.redistribute(placements=[Replicate()]).to_local(grad_placements=[Replicate() if alike else Partial()])


def along_rows(t: Shaped[Tensor, '... n d']) -> Shard:
    return Shard(t.ndim - 2)


class SlicedInputs(BranchInputs):
    """The inputs of a branch that reads a slice of a sequence of ``whole`` rows; 0: the whole sequence.

    ``cut_to``: the branch got all rows and returns its slice of them.
    """

    whole: int
    cut_to: int

    @classmethod
    def of(cls, given: BranchInputs, whole: int) -> SlicedInputs:
        made = cls.__new__(cls)
        made.__dict__.update(given.__dict__, whole=whole, cut_to=0)
        return made


def length_of(given: Any) -> int:
    """The number of all rows if the branch reads a slice of them; otherwise 0."""
    return given.whole if isinstance(given, SlicedInputs) else 0


def cut_parameter(owner: nn.Module, name: str, mesh: DeviceMesh, placement: Placement) -> None:
    """Keep this process's share of a parameter that is equal on all processes, in place and without communication."""
    whole: Tensor = getattr(owner, name)
    share = distribute_tensor(whole.detach(), mesh, [placement], src_data_rank=None)
    setattr(owner, name, nn.Parameter(share, requires_grad=whole.requires_grad))


def cut_rows(module: nn.Module, mesh: DeviceMesh) -> None:
    """Shard the first axis of the module's own parameters."""
    for name, _ in list(module.named_parameters(recurse=False)):
        cut_parameter(module, name, mesh, Shard(0))


class Entry(NamedTuple):
    """A parameter by its owner and name."""

    owner: nn.Module
    name: str


def entries_of(*modules: nn.Module, without: frozenset[nn.Module] = frozenset()) -> list[Entry]:
    """Every parameter of the modules, except those of the modules ``without``."""
    owners = dict.fromkeys(each for module in modules for each in module.modules() if each not in without)
    return [Entry(owner, name) for owner in owners for name, _ in owner.named_parameters(recurse=False)]


class Swap:
    """Replaces parameters by local tensors while a module runs."""

    def __init__(self, entries: list[Entry], mesh: DeviceMesh, dtype: torch.dtype | None = None) -> None:
        self.entries, self.mesh, self.dtype = entries, mesh, dtype
        self.held: list[nn.Parameter | None] = []

    def enter(self, *args: Any) -> None:
        self.held = [owner._parameters[name] for owner, name in self.entries]
        for (owner, name), parameter in zip(self.entries, self.held, strict=True):
            if parameter is not None:
                # as functional_call does; a replicated parameter contributes to the output on every process
                here = parameter.to_local() if isinstance(parameter, DTensor) else copied(parameter, self.mesh)
                # FSDP2 does not cast parameters that it does not gather
                owner._parameters[name] = here if self.dtype is None else here.to(self.dtype)  # type: ignore[assignment]

    def leave(self, *args: Any) -> None:
        held, self.held = self.held, []
        for (owner, name), parameter in zip(self.entries, held, strict=False):
            owner._parameters[name] = parameter
