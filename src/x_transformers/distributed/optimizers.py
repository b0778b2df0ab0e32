"""Muon where matrices are cut over processes: each matrix is put together on one of them, moved there, and cut again."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

from x_transformers.distributed.mesh import MeshError


class Muon(torch.optim.Muon):
    """``torch.optim.Muon`` with one gather and one scatter for each matrix that is cut by rows.

    The owner of a matrix does what one process would do with it, so the update is that of one process; the owners take turns.
    Momenta stay cut as their matrices are. Matrices that are not cut are moved by every process alike.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if closure is not None:
            raise MeshError('step must be called without a closure here, got one. Compute the loss before.')
        turn = 0
        for group in self.param_groups:
            for parameter in group['params']:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if 'momentum_buffer' not in state:
                    state['momentum_buffer'] = torch.zeros_like(parameter.grad)
                grad, mean = local(parameter.grad), local(state['momentum_buffer'])
                mean.lerp_(grad, 1 - group['momentum'])
                update = grad.lerp(mean, group['momentum']) if group['nesterov'] else mean
                moved = orthogonal(update, parameter, group, turn)
                turn += 1
                here, lr = local(parameter), group['lr']
                here.mul_(1 - lr * group['weight_decay'])
                here.add_(moved, alpha=-_adjust_lr(lr, group['adjust_lr_fn'], parameter.shape))


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def orthogonal(update: Tensor, parameter: Tensor, group: dict[str, Any], turn: int) -> Tensor:
    """This process's rows of the orthogonalised update of a whole matrix."""

    def whole(matrix: Tensor) -> Tensor:
        return _zeropower_via_newtonschulz(matrix, group['ns_coefficients'], group['ns_steps'], group['eps'])

    if not isinstance(parameter, DTensor):
        return whole(update)
    axes = [axis for axis, placement in enumerate(parameter.placements) if placement.is_shard()]
    if not axes or parameter.device_mesh.size(axes[0]) == 1:
        return whole(update)
    if len(axes) > 1 or parameter.placements[axes[0]] != Shard(0):
        raise MeshError(f'Muon must be given matrices that are cut by rows, got {parameter.placements}. Use --optimizer adamw.')
    mesh, axis = parameter.device_mesh, axes[0]
    size, ranks = mesh.size(axis), mesh.get_group(axis)
    owner = turn % size
    rows = -(-parameter.shape[0] // size)
    # the last parts may have fewer rows, or none; those who exchange them must all be of one size
    mine = update.new_zeros(rows, parameter.shape[1])
    mine[: update.shape[0]] = update
    is_owner = mesh.get_local_rank(axis) == owner
    parts = [torch.empty_like(mine) for _ in range(size)] if is_owner else None
    dist.gather(mine, parts, group=ranks, group_dst=owner)
    back = None
    if parts is not None:
        matrix = whole(torch.cat(parts)[: parameter.shape[0]]).to(update.dtype)
        padded = matrix.new_zeros(rows * size, parameter.shape[1])
        padded[: parameter.shape[0]] = matrix
        back = list(padded.split(rows))
    dist.scatter(mine, back, group=ranks, group_src=owner)
    return mine[: update.shape[0]]
