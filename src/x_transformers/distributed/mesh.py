"""Processes in a grid: how many hold copies of the model, how many share one, and which of them this process is."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from x_transformers.training.errors import TrainingError

Shard = Literal['none', 'full', 'hybrid']


class MeshError(TrainingError):
    """The processes do not make up the grid that was asked for."""


@dataclass(frozen=True)
class Degrees:
    """How many processes along each axis of the grid; -1 stands for all that are left, for one axis at most.

    Processes along ``replicate`` and ``shard`` read different data: the first hold copies, the second parts of each parameter.
    ``tensor``, ``context`` and ``pipeline`` must be 1 where ``refusals.py`` says so.
    """

    replicate: int = 1
    shard: int = 1
    tensor: int = 1
    context: int = 1
    pipeline: int = 1

    @classmethod
    def of(cls, shard: Shard, *, tensor: int = 1, per_node: int | None = None) -> Degrees:
        """The grid of an option: copies, parts over all processes, or parts within a node and copies between nodes."""
        if shard == 'none':
            return cls(replicate=-1, tensor=tensor)
        if shard == 'full':
            return cls(shard=-1, tensor=tensor)
        within = int(os.environ.get('LOCAL_WORLD_SIZE', '1')) if per_node is None else per_node
        return cls(replicate=-1, shard=max(within // tensor, 1), tensor=tensor)

    def resolved(self, world_size: int) -> Degrees:
        """With the axis that takes the rest filled in.

        Errors: ``MeshError`` naming what does not fit.
        """
        values = {name: getattr(self, name) for name in AXES}
        wrong = [
            f'{name} must be a positive number, or -1, got {value}.' for name, value in values.items() if value < 1 != -value
        ]
        rest = [name for name, value in values.items() if value == -1]
        if len(rest) > 1:
            wrong.append(f'one axis alone may take the rest (-1), got {" and ".join(rest)}.')
        if wrong:
            raise MeshError(' '.join(wrong))
        known = 1
        for value in values.values():
            known *= max(value, 1)
        grid = ' times '.join(f'{name} {value}' for name, value in values.items() if value > 1)
        if rest and world_size % known:
            raise MeshError(f'the number of processes must be a multiple of {known} ({grid}), got {world_size}. Start others.')
        if not rest and world_size != known:
            raise MeshError(f'the number of processes must be {known} ({grid or "one"}), got {world_size}. Start as many.')
        return Degrees(**{name: world_size // known if value == -1 else value for name, value in values.items()})


AXES = ('replicate', 'shard', 'tensor', 'context', 'pipeline')


@dataclass(frozen=True)
class World:
    """The grid, and this process in it."""

    mesh: DeviceMesh  # axes: replicate, shard, tensor
    degrees: Degrees
    device: torch.device
    rank: int
    size: int

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    @property
    def data_size(self) -> int:
        """How many processes read different data."""
        return self.degrees.replicate * self.degrees.shard

    @property
    def data_rank(self) -> int:
        return self.rank // self.degrees.tensor % self.data_size

    @cached_property
    def data_mesh(self) -> DeviceMesh:
        """One axis of all processes that read different data."""
        return self.mesh['replicate', 'shard']._flatten('data')

    def barrier(self) -> None:
        dist.barrier()


def start(degrees: Degrees | None = None, device: str = 'auto', *, timeout: float = 600.0) -> World:
    """Join the processes that ``torchrun`` (or Slurm with the same variables) has started; the grid that they make up.

    Args:
        degrees: None takes all processes as copies.
        device: cpu, cuda, or auto: the accelerator whose number is the process's number on its node, else the CPU.
        timeout: seconds after which a process that hears nothing from another gives up.

    Errors: ``MeshError`` before anything is started, when the number of processes does not fit.
    """
    size = int(os.environ.get('WORLD_SIZE', '1'))
    whole = (degrees or Degrees(replicate=-1)).resolved(size)
    from x_transformers.distributed.refusals import option_refusals

    if wrong := option_refusals(whole, compile=False, offload=False):
        raise MeshError(' '.join(wrong))
    place = local_device(device)
    if not dist.is_initialized():
        backend = 'gloo' if place.type == 'cpu' else dist.get_default_backend_for_device(place)
        if 'RANK' not in os.environ and size == 1:
            store = torch._C._distributed_c10d.HashStore()
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timedelta(seconds=timeout))
        else:
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    shape = (whole.replicate, whole.shard, whole.tensor)
    mesh = init_device_mesh(place.type, shape, mesh_dim_names=('replicate', 'shard', 'tensor'))
    return World(mesh, whole, place, dist.get_rank(), size)


def local_device(name: str) -> torch.device:
    """The device of this process: one accelerator for each process of a node."""
    if name == 'auto':
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        name = (
            'cpu' if found is None or not dist.is_backend_available(dist.get_default_backend_for_device(found)) else found.type
        )
    if name == 'cpu':
        return torch.device('cpu')
    device = torch.device(name.partition(':')[0], int(os.environ.get('LOCAL_RANK', '0')))
    torch.accelerator.set_device_index(device)
    return device


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
