"""The process grid: how many processes replicate the model, how many share it, and the position of this process."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import Store

from x_transformers.distributed.degrees import AXES, Degrees, MeshError, Shard
from x_transformers.distributed.meeting import meet
from x_transformers.distributed.refusals import option_refusals
from x_transformers.training.build import choose_device

__all__ = ['AXES', 'Degrees', 'MeshError', 'Shard', 'World', 'is_lost', 'local_device', 'start', 'stop']

PATIENT = 1e7  # seconds: months


@dataclass(frozen=True)
class World:
    """The grid, and the position of this process in it."""

    mesh: DeviceMesh  # axes: pipeline where there are stages, replicate, shard (slices of a sequence among them), tensor
    degrees: Degrees
    device: torch.device
    rank: int
    size: int
    timeout: float = 600.0  # seconds to wait for another process before giving up

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    @property
    def data_size(self) -> int:
        """How many processes read different data."""
        return self.degrees.replicate * self.degrees.shard

    @property
    def data_rank(self) -> int:
        return self.rank // (self.degrees.tensor * self.degrees.context) % self.data_size

    @property
    def averages(self) -> int:
        """How many processes gradients are averaged over: those that read different data, or different slices of them."""
        return self.data_size * self.degrees.context

    @cached_property
    def context_mesh(self) -> DeviceMesh:
        """One axis of the processes that have slices of the same sequences."""
        degrees = self.degrees
        shape = (self.data_size, degrees.context, degrees.tensor)
        made = init_device_mesh(self.device.type, shape, mesh_dim_names=('data', 'context', 'tensor'))
        return giving_up_after(self.timeout, made)['context']

    @cached_property
    def data_mesh(self) -> DeviceMesh:
        """One axis of all processes that read different data, or different slices of them."""
        return giving_up_after(self.timeout, self.mesh['replicate', 'shard']._flatten('data'))

    @cached_property
    def aside(self) -> dist.ProcessGroup:
        """A second group of all processes, on their CPUs, for messages in the background of training steps."""
        return self._group(self.timeout)

    @cached_property
    def patient(self) -> dist.ProcessGroup:
        """A group without a timeout, for work such as tokenizing a corpus. The death of a process is still noticed."""
        return self._group(PATIENT)

    def _group(self, timeout: float) -> dist.ProcessGroup:
        made: dist.ProcessGroup = dist.new_group(backend='gloo', timeout=timedelta(seconds=timeout))
        return made

    def barrier(self) -> None:
        dist.barrier()


def start(degrees: Degrees | None = None, device: str = 'auto', *, timeout: float = 600.0, store: Store | None = None) -> World:
    """Join the processes that ``torchrun`` (or Slurm with the same variables) started. Returns their grid.

    Args:
        degrees: None: all processes hold copies.
        device: cpu, cuda, or auto: the accelerator whose number is the process's number on its node, else the CPU.
        timeout: seconds to wait for another process before giving up.
        store: by which these processes, and no others, find each other; None: they meet first.

    Errors: ``MeshError`` before anything is started, when the number of processes does not fit.
    """
    size = int(os.environ.get('WORLD_SIZE', '1'))
    whole = (degrees or Degrees(replicate=-1)).resolved(size)
    if wrong := option_refusals(whole, compile=False, offload=False):
        raise MeshError(' '.join(wrong))
    place = local_device(device)
    if not dist.is_initialized():
        backend = 'gloo' if place.type == 'cpu' else dist.get_default_backend_for_device(place)
        if 'RANK' not in os.environ and size == 1:
            store = torch._C._distributed_c10d.HashStore()
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timedelta(seconds=timeout))
        else:
            own = store or meet(timeout=timeout).store
            rank = int(os.environ['RANK'])
            dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
    sizes = {'replicate': whole.replicate, 'shard': whole.shard * whole.context, 'tensor': whole.tensor}
    if whole.pipeline > 1:
        sizes = {'pipeline': whole.pipeline, **sizes}
    mesh = init_device_mesh(place.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    giving_up_after(timeout, mesh)
    return World(mesh, whole, place, dist.get_rank(), size, timeout)


def giving_up_after(seconds: float, mesh: DeviceMesh) -> DeviceMesh:
    """The same grid, whose groups wait as long as all processes together do; PyTorch gives them half an hour."""
    for group in mesh.get_all_groups():
        if dist.get_backend(group) in ('gloo', 'nccl'):
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)
    return mesh


def local_device(name: str) -> torch.device:
    """The device of this process: each process of a node has its own accelerator.

    Errors: ``TrainingError`` if the device does not exist.
    """
    if name == 'auto':
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        name = (
            'cpu' if found is None or not dist.is_backend_available(dist.get_default_backend_for_device(found)) else found.type
        )
    if name == 'cpu':
        return torch.device('cpu')
    device = choose_device(f'{name.partition(":")[0]}:{os.environ.get("LOCAL_RANK", "0")}')
    torch.accelerator.set_device_index(device)
    return device


def is_lost(error: BaseException) -> bool:
    """Whether an error means that another process is gone or does not answer."""
    if not isinstance(error, RuntimeError):
        return False
    text = str(error)
    signs = ('Connection closed by peer', 'Connection reset by peer', 'Timed out waiting', 'gloo', 'Broken pipe')
    return isinstance(error, (dist.DistError, dist.DistBackendError)) or any(sign in text for sign in signs)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
