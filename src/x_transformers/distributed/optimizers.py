"""Optimizers of sharded parameters: AdamW updates shards; Muon gathers each matrix on one process."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

from x_transformers.distributed.mesh import MeshError
from x_transformers.module import own_part
from x_transformers.tensor_types import Float, Shaped


class AdamW(torch.optim.AdamW):
    """``torch.optim.AdamW`` on this process's shards: the update is elementwise, so shards change as the whole would.

    Parameters may be sharded over different grids, or not at all. The state has the placements of the parameters.
    """

    def _init_group(self, group: Any, *lists: list[Shaped[Tensor, '...']]) -> Any:
        out = super()._init_group(group, *lists)  # type: ignore[no-untyped-call]
        for tensors in lists:
            tensors[:] = map(own_part, tensors)
        return out


class Muon(torch.optim.Muon):
    """``torch.optim.Muon`` with one gather and one scatter for each matrix that is sharded by rows.

    One process computes the update of a whole matrix; processes take turns. So the update is that of a single process. Momenta
    keep the placements of their matrices. Every process updates the matrices that are not sharded.
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
                grad, mean = own_part(parameter.grad), own_part(state['momentum_buffer'])
                mean.lerp_(grad, 1 - group['momentum'])
                update = grad.lerp(mean, group['momentum']) if group['nesterov'] else mean
                moved = orthogonal(update, parameter, group, turn)
                turn += 1
                here, lr = own_part(parameter), group['lr']
                here.mul_(1 - lr * group['weight_decay'])
                here.add_(moved, alpha=-_adjust_lr(lr, group['adjust_lr_fn'], parameter.shape))


def orthogonal(
    update: Float[Tensor, 'r c'], parameter: Float[Tensor, 'n c'], group: dict[str, Any], turn: int
) -> Float[Tensor, 'r c']:
    """This process's rows of the orthogonalized update of a whole matrix."""

    def whole(matrix: Float[Tensor, 'n c']) -> Float[Tensor, 'n c']:
        return _zeropower_via_newtonschulz(matrix, group['ns_coefficients'], group['ns_steps'], group['eps'])

    if not isinstance(parameter, DTensor):
        return whole(update)
    mesh, placements = parameter.device_mesh, parameter.placements
    axes = [axis for axis, placement in enumerate(placements) if not placement.is_replicate() and mesh.size(axis) > 1]
    if not axes:
        return whole(update)
    if len(axes) > 1 or placements[axes[0]] != Shard(0):
        # sharded by columns, by strided rows, or both: every process gathers the matrix
        shape, stride = parameter.shape, parameter.stride()
        spread = DTensor.from_local(update, mesh, placements, run_check=False, shape=shape, stride=stride)
        return own_part(distribute_tensor(whole(spread.full_tensor()), mesh, placements, src_data_rank=None))
    axis = axes[0]
    size, ranks = mesh.size(axis), mesh.get_group(axis)
    owner = turn % size
    rows = -(-parameter.shape[0] // size)
    # the last shards may have fewer rows, or none, but gather and scatter need equal sizes
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
