"""The training engine for several processes: the methods that the loop of ``training/trainer.py`` calls, for a grid."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from x_transformers.distributed import checkpoint
from x_transformers.distributed.context import Sliced
from x_transformers.distributed.mesh import MeshError, Shard, World, is_lost
from x_transformers.distributed.parallelize import Checkpointing, parallelize
from x_transformers.module import fill, own_part
from x_transformers.randomness import decide_alike
from x_transformers.tensor_types import Float, Shaped, StateDict
from x_transformers.training.checkpoint import load_checkpoint
from x_transformers.training.ema import WRAPPED
from x_transformers.training.engine import Engine


class MeshEngine(Engine):
    """A grid of processes. All run the same loop. Those that read different data read different rows of each batch."""

    def __init__(
        self,
        world: World,
        *,
        shard: Shard = 'none',
        precision: Literal['bf16'] | None = None,
        checkpoint: Checkpointing = 'none',
        compile: bool = False,
        offload: bool = False,
        sequence_parallel: bool = False,
        loss_parallel: bool = False,
    ) -> None:
        self.world = world
        self.rank, self.world_size, self.is_main = world.data_rank, world.data_size, world.is_main
        self.averages, self.repeats = world.averages, world.degrees.context
        self.device, self.devices = world.device, world.size
        self.shard = shard
        self.options: dict[str, Any] = {
            'precision': precision,
            'checkpoint': checkpoint,
            'compile': compile,
            'offload': offload,
            'sequence_parallel': sequence_parallel,
            'loss_parallel': loss_parallel,
        }
        self.model: nn.Module | None = None

    def build(self, make: Callable[[], nn.Module], device: torch.device, seed: int) -> nn.Module:
        """The model, distributed. Sharded parameters are built on the meta device and filled part by part."""
        if self.shard == 'none':
            model = make()
        else:
            with torch.device('meta'):
                model = make()
        return self.spread(model, seed)

    def spread(self, model: nn.Module, seed: int = 0) -> nn.Module:
        self.model = parallelize(model, self.world, shard=self.shard, seed=seed, **self.options)
        return self.model

    def forward(self, model: nn.Module, compiled: bool) -> Callable[..., Any]:
        # compile each layer separately
        return model if self.world.degrees.context == 1 else Sliced(model, self.world.context_mesh)

    def is_lost(self, error: BaseException) -> bool:
        return is_lost(error)

    def begin_step(self, seed: int, step: int) -> None:
        """Random numbers depend on seed and step alone. Decisions are equal on all processes; dropout differs between data."""
        decide_alike(seed, step)
        random.seed(number_of(seed, step))
        torch.manual_seed(number_of(seed, step, self.rank))

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        model: Any = self.model
        # only processes that read different data reduce their gradients
        if hasattr(model, 'set_requires_gradient_sync'):
            model.set_requires_gradient_sync(last)
        yield

    def total(self, value: Shaped[Tensor, '...']) -> Shaped[Tensor, '...']:
        value = value.detach().clone().to(self.device)
        dist.all_reduce(value, group=self.world.data_mesh.get_group())
        return value

    def agree(self, number: int) -> int:
        largest = torch.tensor(number, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def grad_norm(self, parameters: Iterable[nn.Parameter]) -> Float[Tensor, '']:
        by_axes: dict[tuple[str, ...], list[Tensor]] = {}
        for grad in (p.grad for p in parameters if p.grad is not None):
            by_axes.setdefault(cut_along(grad), []).append(own_part(grad))
        squares = torch.zeros((), device=self.device, dtype=torch.float64)
        for axes, parts in sorted(by_axes.items()):
            own = torch.stack(torch._foreach_norm(parts)).to(squares.device).double().square().sum()
            for axis in axes:
                dist.all_reduce(own, group=self.world.mesh.get_group(axis))
            squares = squares + own
        return squares.sqrt()

    def clip(self, parameters: Iterable[nn.Parameter], most: float, norm: Float[Tensor, '']) -> None:
        grads = [p.grad for p in parameters if p.grad is not None]
        share = (most / (norm + 1e-6)).clamp(max=1.0)
        for grad in grads:
            part = own_part(grad)
            part.mul_(share.to(part.device))

    # checkpoints

    def store(self, run: Path, keep: int = 1) -> Any:
        return checkpoint.DistributedCheckpoints(run, keep, self.world)

    def read(self, path: Path) -> tuple[int, dict[str, Tensor], dict[str, Any]]:
        """Read a checkpoint that any number of processes wrote. Each process reads its own part."""
        if not checkpoint.is_distributed(path):
            return load_checkpoint(path)
        manifest = checkpoint.verified(path, self.world)
        model: Any = self.model
        state = model.state_dict()
        named = {name.replace(WRAPPED, ''): p for name, p in model.named_parameters() if p.requires_grad}

        def template(name: str, entry: Any) -> Shaped[Tensor, '...']:
            kind, _, rest = name.partition('.')
            like = (
                state.get(rest)
                if kind == 'model'
                else named.get(rest.removeprefix('averages.'))
                if kind == 'averaged'
                else None
            )
            if kind == 'optimizers':
                like = next((p for p in named.values() if p.shape == entry.size and isinstance(p, DTensor)), None)
            if like is None or like.shape != entry.size:
                return torch.empty(entry.size, dtype=entry.properties.dtype)
            return checkpoint.empty_like(like, entry.properties.dtype)

        weights, tensors, rest = checkpoint.read(path, template)
        return int(manifest['step']), weights, checkpoint.put_back(rest, tensors)

    def load_model(self, model: nn.Module, state: StateDict) -> None:
        own = model.state_dict()
        if own.keys() != state.keys():
            other = sorted(own.keys() ^ state.keys())
            raise ValueError(
                f"state must have the names of the model's weights, got other ones: {', '.join(other[:3])}. Load it into "
                'the model that it was saved from.'
            )
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                raise ValueError(f'{name} must have the shape {tuple(tensor.shape)}, got {tuple(state[name].shape)}')
            if not tensor.is_meta:
                fill(tensor, state[name])

    def load_optimizers(self, model: nn.Module, optimizers: list[Optimizer], states: list[dict[str, Any]]) -> None:
        """States are identified by the index of their parameter, which is the same in every grid."""
        for optimizer, given in zip(optimizers, states, strict=True):
            parameters = [p for group in optimizer.param_groups for p in group['params']]
            spread = {
                int(number): {name: as_its_parameter(value, parameters[int(number)]) for name, value in values.items()}
                for number, values in given['state'].items()
            }
            optimizer.load_state_dict({'state': spread, 'param_groups': given['param_groups']})

    @contextmanager
    def main_first(self) -> Iterator[None]:
        failed = torch.zeros((), dtype=torch.int32)
        group = self.world.patient
        if not self.is_main:
            dist.broadcast(failed, 0, group=group)
            if failed:
                raise MeshError('the main process must go on first, got an error there, which it tells.')
        try:
            yield
        except BaseException:
            failed.fill_(1)
            raise
        finally:
            if self.is_main:
                dist.broadcast(failed, 0, group=group)

    def barrier(self) -> None:
        self.world.barrier()


def number_of(*parts: int) -> int:
    """A seed that depends on all of the numbers."""
    return int.from_bytes(hashlib.blake2b('/'.join(map(str, parts)).encode(), digest_size=7).digest(), 'big')


def as_its_parameter(value: Any, parameter: Float[Tensor, '...']) -> Any:
    """A whole tensor of a parameter's shape, with that parameter's placements."""
    if not isinstance(value, Tensor) or not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    if isinstance(value, DTensor) and value.device_mesh != parameter.device_mesh:
        value = value.full_tensor()
    target = torch.empty_like(parameter, dtype=value.dtype)
    fill(target, value)
    return target


def cut_along(tensor: Shaped[Tensor, '...']) -> tuple[str, ...]:
    """The axes of the grid along which a tensor is sharded."""
    if not isinstance(tensor, DTensor):
        return ()
    names = tensor.device_mesh.mesh_dim_names or ()
    return tuple(name for name, placement in zip(names, tensor.placements, strict=True) if not placement.is_replicate())
