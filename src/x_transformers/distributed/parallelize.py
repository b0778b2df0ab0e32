"""Parallelize a model in place: first tensor and slice parallelism, then checkpointing, compiling, and sharding.

The model's own code does not change. Layers are units: their weights are gathered when they run and freed afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as Cut
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from x_transformers.cache.layer_cache import LayerCache
from x_transformers.distributed.mesh import Shard, World
from x_transformers.distributed.pipeline import Pipeline
from x_transformers.distributed.refusals import check
from x_transformers.distributed.sequence import slice_stacks
from x_transformers.distributed.tensor import cut_biases, cut_branches
from x_transformers.distributed.units import layers_of, stacks_of, units
from x_transformers.distributed.vocabulary import cut_vocabulary
from x_transformers.layers.call import Around
from x_transformers.module import Module, own_part
from x_transformers.tensor_types import Float

# methods that run the model without its forward
METHODS = ('generate', 'beam_search')

Checkpointing = Literal['none', 'full', 'selective'] | int


def parallelize(
    model: nn.Module,
    world: World,
    *,
    shard: Shard = 'none',
    precision: Literal['bf16'] | None = None,
    checkpoint: Checkpointing = 'none',
    compile: bool = False,
    reshard: bool = True,
    offload: bool = False,
    sequence_parallel: bool = False,
    loss_parallel: bool = False,
    seed: int = 0,
) -> nn.Module:
    """Distribute ``model`` over the processes of ``world``, in place. Returns the model.

    Args:
        shard: none: each process holds a copy (DDP); full: shards over all processes (FSDP2); hybrid: shards within a node,
            copies between nodes.
        precision: bf16: weights are gathered and used in bfloat16, gradients are summed in float32. Only with ``shard``.
        checkpoint: full: recompute each layer for its gradients; a number: every n-th layer; selective: keep the results of
            matrix products and recompute all others.
        compile: compile each layer separately.
        reshard: free a layer's gathered weights after its forward, and gather them again for its gradients.
        offload: keep shards, gradients and the optimizer's state in CPU memory.
        sequence_parallel: between branches, each process of a tensor group holds a slice of the sequence.
        loss_parallel: each process of a tensor group computes the logits of a part of the vocabulary.
        seed: for the initial values of a model on the meta device, which are the same on every grid.

    Call ``randomness.decide_alike(seed, step)`` before each step if layers are dropped or repeated at random.

    Errors: ``MeshError`` naming the flags that this kind of parallelism does not support.
    """
    check(
        model, world.degrees, shard=shard, checkpoint=checkpoint, precision=precision, compile=compile, offload=offload,
        sequence_parallel=sequence_parallel, loss_parallel=loss_parallel,
    )  # fmt: skip
    if not (on_meta(model) or world.degrees.pipeline > 1 or lies_on(model, world.device)):
        model = model.to(world.device)
    if world.degrees.tensor > 1:
        cut_biases(model, world.mesh['tensor'])
    if sequence_parallel:
        slice_stacks(model, world.mesh['tensor'])
    if checkpoint != 'none':
        checkpoint_layers(model, checkpoint)
    if compile:
        for layer in layers_of(model):
            layer.compile()
    if shard != 'none':
        shard_layers(
            model, world, precision=precision, reshard=reshard, offload=offload, loss_parallel=loss_parallel, seed=seed
        )
        return model
    Filling(model, world.device, seed).fill(model)
    if world.degrees.pipeline > 1:
        Pipeline(model, world)
    elif world.degrees.tensor > 1:
        cut_layers(model, world, loss_parallel)
    else:
        replicate(model, process_group=world.data_mesh.get_group(), find_unused_parameters=may_leave_out(model))
    return model


def cut_layers(part: nn.Module, world: World, loss_parallel: bool, dtype: torch.dtype | None = None) -> None:
    """Keep this process's share of all layers of ``part``. ``dtype``: the dtype that branches run in."""
    cut_branches(part, world.mesh['tensor'], dtype)
    if loss_parallel:
        cut_vocabulary(part, world.mesh['tensor'])


def may_leave_out(model: nn.Module) -> bool:
    """Whether some parameters may have no gradient in a step: DDP must then search for them, or it would wait."""
    for stack in stacks_of(model):
        if any(chance > 0 for chance in stack.layer_dropouts) or len(set(stack.layers_execute_order)) < len(stack.layers):
            return True
    if any(getattr(module, 'attn_pool', None) is not None for module in model.modules()):
        return True
    # gates get gradients from the loss of an objective; a single round has no gate
    return any(getattr(module, 'exit_gate', None) is not None and (module is model or module.max_looped_steps == 1)
               for module in model.modules())  # fmt: skip


# activation checkpointing


def checkpoint_layers(model: nn.Module, how: Checkpointing) -> None:
    """Wrap layers so that they are recomputed for their gradients."""
    every = how if isinstance(how, int) else 1
    keywords: dict[str, Any] = {} if how != 'selective' else {'context_fn': keep_products}
    for stack in stacks_of(model):
        wrapped: dict[nn.Module, nn.Module] = {}
        for index, layer in enumerate(stack.layers):
            if index % every == 0:
                wrapped.setdefault(layer, checkpoint_wrapper(layer, checkpoint_fn=run_again, **keywords))
                stack.layers[index] = wrapped[layer]


def run_again(
    layer: nn.Module, streams: Float[Tensor, '... n d'], condition: Any, wide_condition: Any, around: Around, **how: Any
) -> Any:
    """Run a layer under checkpointing, unless it writes into a cache, which it would do twice."""
    if type(around.inputs.past) is LayerCache:
        return layer(streams, condition, wide_condition, around)
    return checkpoint(layer, streams, condition, wide_condition, around, use_reentrant=False, **how)


def keep_products() -> Any:
    """A policy that keeps the results of matrix products and of fused attention, which are expensive."""
    names = (
        'mm', 'addmm', 'bmm', '_scaled_dot_product_flash_attention', '_scaled_dot_product_flash_attention_for_cpu',
        '_scaled_dot_product_efficient_attention', '_scaled_dot_product_cudnn_attention',
    )  # fmt: skip
    dear = {getattr(torch.ops.aten, name).default for name in names}

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in dear else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


# sharding


def shard_layers(
    model: nn.Module,
    world: World,
    *,
    precision: str | None,
    reshard: bool,
    offload: bool,
    loss_parallel: bool,
    seed: int,
) -> None:
    """FSDP2 with one unit for each layer, one for the embedding and head, and the whole model as the root."""
    degrees = world.degrees
    mesh: DeviceMesh = world.mesh['replicate', 'shard'] if degrees.replicate > 1 else world.mesh['shard']
    policy = MixedPrecisionPolicy()
    if precision == 'bf16':
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    offloading = CPUOffloadPolicy() if offload else OffloadPolicy()

    parts = world.mesh['shard'].size()
    axis_of = partial(free_axis, size=parts)

    def how(unit: list[nn.Module]) -> dict[str, Any]:
        kept = kept_of(*unit, size=parts)
        return {'mesh': mesh, 'mp_policy': policy, 'offload_policy': offloading, 'ignored_params': kept} | (
            {'shard_placement_fn': axis_of} if degrees.tensor > 1 else {}
        )

    def ready(part: nn.Module) -> None:
        filling.fill(part)
        if degrees.tensor > 1:
            cut_layers(part, world, loss_parallel, policy.param_dtype)

    filling = Filling(model, world.device, seed)
    for unit in units(model):
        for part in unit:
            ready(part)
        fully_shard(unit[0] if len(unit) == 1 else unit, reshard_after_forward=reshard, **how(unit))
    ready(model)
    fully_shard(model, **how([model]))
    group, size = world.data_mesh.get_group(), world.averages

    def average(parameter: Float[Tensor, '...']) -> None:
        if parameter.grad is not None:
            dist.all_reduce(own_part(parameter.grad).div_(size), group=group)

    for parameter in kept_of(model, size=parts):
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(average)
    model.register_forward_hook(reshard_unless_trained)
    for name in METHODS:
        if hasattr(model, name):
            gather_in(model, name)


def reshard_unless_trained(model: Any, args: Any, out: Any) -> None:
    """Free the gathered weights of the root after a forward without gradients."""
    if not torch.is_grad_enabled():
        model.reshard()


def gather_in(model: Any, name: str) -> None:
    """Gather the weights in a method that runs the model without its forward, also if it is a generator."""
    register_fsdp_forward_method(model, name)
    inner = getattr(model, name)

    def method(*args: Any, **kwargs: Any) -> Any:
        try:
            out = inner(*args, **kwargs)
        finally:
            model.reshard()
        return one_by_one(out) if isinstance(out, Iterator) else out

    def one_by_one(made: Iterator[Any]) -> Iterator[Any]:
        model.unshard()
        try:
            yield from made
        finally:
            model.reshard()

    setattr(model, name, method)


def kept_of(*modules: nn.Module, size: int) -> set[nn.Parameter]:
    """Parameters without an axis to shard. Every process keeps them and averages their gradients."""
    every = (parameter for module in modules for parameter in module.parameters())
    return {parameter for parameter in every if is_kept(parameter, size)}


def is_kept(parameter: Float[Tensor, '...'], size: int) -> bool:
    if parameter.ndim == 0:
        return True
    return cut_axis(parameter) is not None and free_axis(parameter, size) is None


def cut_axis(parameter: Float[Tensor, '...']) -> int | None:
    """The axis along which a tensor group shards a parameter."""
    if not isinstance(parameter, DTensor):
        return None
    names = parameter.device_mesh.mesh_dim_names or ()
    placement: Any = dict(zip(names, parameter.placements, strict=True)).get('tensor')
    return getattr(placement, 'dim', None)


def free_axis(parameter: Float[Tensor, '...'], size: int) -> Cut | None:
    """Another axis of such a parameter, for FSDP2. None: the first axis, or there is none."""
    taken = cut_axis(parameter)
    if taken is None:
        return None
    return next((Cut(axis) for axis, n in enumerate(parameter.shape) if axis != taken and n % size == 0 and n > 1), None)


# filling a model on the meta device


def on_meta(model: nn.Module) -> bool:
    return any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def lies_on(model: nn.Module, device: torch.device) -> bool:
    return all(tensor.device == device for tensor in (*model.parameters(), *model.buffers()))


class Filling:
    """Fills a model on the meta device, part by part. A model with values stays as it is.

    Every process draws the same random numbers on every grid, and keeps its share of each part. So no process ever holds more
    than one whole part.
    """

    def __init__(self, model: nn.Module, device: torch.device, seed: int) -> None:
        self.needed = on_meta(model)
        self.device = device
        self.done: set[nn.Module] = set()
        if self.needed:
            torch.manual_seed(seed)

    @torch.no_grad()
    def fill(self, part: nn.Module) -> None:
        if not self.needed:
            return
        fresh = [module for module in part.modules() if module not in self.done]
        for module in fresh:
            module.to_empty(device=self.device, recurse=False)
        self._reset(part)
        self.done.update(fresh)

    def _reset(self, module: nn.Module) -> None:
        if module in self.done:
            return
        own = getattr(type(module), 'reset_parameters', None)
        if own is not None and own is not Module.reset_parameters:
            module.reset_parameters()  # type: ignore[operator]
            return
        for child in module.children():
            self._reset(child)
        if isinstance(module, Module):
            module.init_own()
