"""Tensor parallelism: each process holds some heads of every attention and some inner features of every feed-forward.

Between layers, every process holds the whole stream. A branch starts with a copy whose gradients are summed, and ends with a
sum over the processes. Parameters are DTensors. A branch runs on its local rows like a branch with fewer heads, so its code
does not change.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from x_transformers.attention.attention import Attention
from x_transformers.attention.inputs import BranchInputs, ExtraKeys
from x_transformers.attention.maps import Maps
from x_transformers.convolution import CausalConvolution
from x_transformers.distributed.degrees import MeshError
from x_transformers.distributed.moves import (
    Entry,
    Swap,
    added_up,
    all_rows,
    copied,
    cut_parameter,
    entries_of,
    length_of,
    summed_rows,
)
from x_transformers.distributed.units import stacks_of
from x_transformers.embedding.values import TokenValues
from x_transformers.feedforward import FeedForward
from x_transformers.position.bias import DenseBias
from x_transformers.position.forgetting import PerRowDataDependentAlibi
from x_transformers.tensor_types import Float, Int, Shaped


class Cut(NamedTuple):
    """How a parameter is sharded: along ``axis``, which lists heads or features, ``runs`` times in a row."""

    axis: int
    of_keys: bool = False  # heads of keys and values; otherwise those of queries
    runs: int = 1


# by name in an attention; all others stay whole
HEADS = {
    'to_q': Cut(0),
    'qk_norm_q_scale': Cut(0),
    'q_rmsnorm': Cut(0),
    'to_k': Cut(0, of_keys=True),
    'to_v': Cut(0, of_keys=True),
    'qk_norm_k_scale': Cut(0, of_keys=True),
    'k_rmsnorm': Cut(0, of_keys=True),
    'value_rmsnorm': Cut(0, of_keys=True),
    'mem_k': Cut(0, of_keys=True),
    'mem_v': Cut(0, of_keys=True),
    'to_value_residual_mix': Cut(0, of_keys=True),
    'head_scale_params': Cut(1),
    'to_v_head_gate': Cut(0),
    'to_v_gate.weight': Cut(0),
    'to_v_gate.bias': Cut(0),
    'to_v_gate.up': Cut(0),
    'attend.head_attn_sink': Cut(0),
    'attend.softmax_scales': Cut(0),
    'rel_proj_pos_bias.to_distance_weights': Cut(0),
    'data_dependent_alibi.to_forget_gates': Cut(0),
    'convolutions.q': Cut(1),
    'convolutions.k': Cut(1, of_keys=True),
    'convolutions.v': Cut(1, of_keys=True),
}
# modules of an attention that have a number of heads
COUNTING = ('rel_proj_pos_bias', 'data_dependent_alibi')
# arguments of an attention that is not called by a stack
PLAIN = {'context', 'mask', 'context_mask'}
# by name in a feed-forward; a gated one lists values, then gates
FEATURES = {'ff.0.proj': Cut(0, runs=2), 'ff.0.mult_bias': Cut(0), 'ff.0.0': Cut(0), 'ff.0.canon': Cut(1)}


def cut_branches(model: nn.Module, mesh: DeviceMesh, dtype: torch.dtype | None = None) -> None:
    """Shard every attention and feed-forward of ``model`` in place. ``dtype``: the dtype that they run in, if not their own.

    Errors: ``MeshError`` naming the sizes that ``mesh`` does not divide.
    """
    for module in model.modules():
        if isinstance(module, Attention) and not is_cut(module):
            parallelize_module(module, mesh, HeadParallel(dtype))
        elif isinstance(module, FeedForward) and not is_cut(module):
            if module.flags.experts is None:
                parallelize_module(module, mesh, FeatureParallel(dtype))
            else:
                from x_transformers.distributed.experts import ExpertParallel

                parallelize_module(module.ff, mesh, ExpertParallel(dtype))


def is_cut(module: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def check_divides(model: nn.Module, size: int) -> Iterator[str]:
    """One sentence for each number of heads or features that ``size`` does not divide."""
    wrong: dict[str, None] = {}
    for module in model.modules():
        numbers = {}
        if isinstance(module, Attention):
            numbers = {'heads': module.heads}
            if not all_keys(module.heads, module.kv_heads, size):
                numbers['heads of keys and values'] = module.kv_heads
        elif isinstance(module, FeedForward) and module.flags.experts is None:
            numbers = {'inner features of a feed-forward': output_of(module).in_features}
        elif isinstance(module, FeedForward):
            numbers = {'experts': module.flags.experts or 0}
        for name, number in numbers.items():
            if number % size:
                wrong[f'the number of {name} must be a multiple of --tensor {size}, got {number}. Choose another.'] = None
    yield from wrong


# ---------------------------------------------------------------- a branch, cut


def placement_of(cut: Cut, groups: int) -> Placement:
    """Query heads are listed group by group, and each process holds some of each group."""
    runs = cut.runs * groups
    return Shard(cut.axis) if runs == 1 else _StridedShard(cut.axis, split_factor=runs)


def found_in(table: dict[str, Cut], name: str) -> Cut | None:
    return next((cut for key, cut in table.items() if name == key or name.startswith(f'{key}.')), None)


class BranchParallel(ParallelStyle):
    """Shards a branch. While it runs, local rows replace its parameters."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.dtype = dtype

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        entries: list[Entry] = []
        output = self.output(module)
        for path, owner in module.named_modules():
            for name, parameter in list(owner.named_parameters(recurse=False)):
                placement = self.placement(module, owner, f'{path}.{name}' if path else name, parameter)
                if placement is not None:
                    cut_parameter(owner, name, device_mesh, placement)
                if (owner, name) != (output, 'bias'):
                    entries.append(Entry(owner, name))
        self.narrow(module)
        swap = Swap(entries, device_mesh, self.dtype)
        self.adding = OutputSum(device_mesh)
        module.register_forward_pre_hook(partial(self.enter, swap=swap), with_kwargs=True)
        module.register_forward_hook(swap.leave, always_call=True)
        module.register_forward_hook(self.leave, with_kwargs=True)
        output.register_forward_pre_hook(self.adding.enter)
        output.register_forward_hook(self.adding.leave, always_call=True)
        return module

    def placement(self, module: Any, owner: nn.Module, path: str, parameter: Float[Tensor, '...']) -> Placement | None:
        raise NotImplementedError

    def output(self, module: Any) -> nn.Linear:
        """The last linear map of the branch, which reads the sharded features."""
        raise NotImplementedError

    def narrow(self, module: Any) -> None:
        """Set the other attributes of a branch with fewer heads."""

    def enter(self, module: Any, args: Any, kwargs: dict[str, Any], *, swap: Swap) -> tuple[Any, dict[str, Any]]:
        raise NotImplementedError

    def leave(self, module: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        """After the branch has run."""

    def input(self, x: Float[Tensor, '... d'], kwargs: dict[str, Any]) -> Float[Tensor, '... d']:
        """The input with all rows. If it was a slice, the output is one, too."""
        mesh, whole = self.adding.mesh, length_of(kwargs.get('around'))
        self.adding.to_slices = whole > 0
        return all_rows(x, whole, mesh, alike=False) if whole else copied(x, mesh)


class FeatureParallel(BranchParallel):
    """Shards a feed-forward by its inner features."""

    def placement(self, module: FeedForward, owner: nn.Module, path: str, parameter: Float[Tensor, '...']) -> Placement | None:
        if owner is self.output(module):
            return Shard(1) if parameter.ndim == 2 else None
        cut = found_in(FEATURES, path)
        if cut is not None and isinstance(owner, CausalConvolution) and module.flags.glu:
            cut = cut._replace(runs=2)
        return None if cut is None else placement_of(cut, 1)

    def output(self, module: FeedForward) -> nn.Linear:
        return output_of(module)

    def enter(self, module: Any, args: Any, kwargs: dict[str, Any], *, swap: Swap) -> tuple[Any, dict[str, Any]]:
        x, *rest = args
        swap.enter()
        return (self.input(x, kwargs), *rest), kwargs


def output_of(module: FeedForward) -> nn.Linear:
    return [part for part in module.ff.children() if isinstance(part, nn.Linear)][-1]


class HeadParallel(BranchParallel):
    """Shards an attention by its heads."""

    share: HeadShare

    def placement(self, module: Attention, owner: nn.Module, path: str, parameter: Float[Tensor, '...']) -> Placement | None:
        share = self.share
        if owner is self.output(module):
            return placement_of(Cut(1), share.groups) if parameter.ndim == 2 else None
        cut = found_in(HEADS, path)
        # one gain for all heads
        if cut is None or parameter.shape[cut.axis] == 1:
            return None
        if cut.of_keys:
            return None if share.all_keys else placement_of(cut, 1)
        if owner is getattr(module.data_dependent_alibi, 'to_forget_gates', (None,))[0]:
            # gates for both directions, or queries and keys of the gates
            per_row = isinstance(module.data_dependent_alibi, PerRowDataDependentAlibi)
            cut = cut._replace(runs=1 if module.causal and not per_row else 2)
        return placement_of(cut, share.groups)

    def output(self, module: Attention) -> nn.Linear:
        out: Any = module.to_out
        linear: nn.Linear = out if isinstance(out, nn.Linear) else out[0]
        return linear

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        attn: Any = module
        self.share = HeadShare(attn.heads, attn.kv_heads, device_mesh)
        return super()._apply(module, device_mesh)

    def narrow(self, module: Attention) -> None:
        module.heads, module.kv_heads = len(self.share.queries), len(self.share.keys)
        for name in COUNTING:
            if getattr(module, name) is not None:
                getattr(module, name).heads = module.heads

    def leave(self, module: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        around: BranchInputs | None = kwargs.get('around')
        # scores for the next layer stay: it has the same heads
        if around is not None and not around.return_scores:
            out[1].maps = NoMaps()

    def enter(self, module: Any, args: Any, kwargs: dict[str, Any], *, swap: Swap) -> tuple[Any, dict[str, Any]]:
        x, *rest = args
        if 'around' in kwargs:
            kwargs = kwargs | {'around': self.share.of(kwargs['around'])}
        elif kwargs.keys() - PLAIN or any(isinstance(each, Tensor) and each.ndim > 3 for each in rest):
            raise MeshError('an attention that is spread must be called by its stack, got a call of its own. Call the model.')
        else:
            # only a context, as in pooling
            rest = [each if each is None else copied(each, swap.mesh) for each in rest]
        swap.enter()
        return (self.input(x, kwargs), *rest), kwargs


class NoMaps(Maps):
    """Replaces maps, which would contain only some of the heads."""

    def read(self, what: str) -> Tensor | None:
        raise MeshError('attention maps must not be read with --tensor: each process has some heads. Use --shard full alone.')


def all_keys(heads: int, kv_heads: int, size: int) -> bool:
    """Whether every process holds all key heads, because there are too few to divide; each serves some of its query heads."""
    return kv_heads % size != 0 and heads % size == 0 and heads // size % kv_heads == 0


class HeadShare:
    """The heads of one process: some of the key heads, and the query heads of each group that use them."""

    def __init__(self, heads: int, kv_heads: int, mesh: DeviceMesh) -> None:
        rank, size = mesh.get_local_rank(), mesh.size()
        self.mesh = mesh
        self.heads, self.kv_heads = heads, kv_heads
        self.all_keys = all_keys(heads, kv_heads, size)
        # the number of groups of query heads that list the key heads in order
        self.groups = 1 if self.all_keys else heads // kv_heads
        keys, queries = torch.arange(kv_heads), torch.arange(heads).view(self.groups, -1)
        self.keys = keys if self.all_keys else keys.chunk(size)[rank]
        self.queries = queries.chunk(size, dim=1)[rank].flatten()

    def of(self, given: BranchInputs) -> BranchInputs:
        """The inputs of the branch for these heads."""
        if any(delta is not None for delta in given.deltas):
            raise MeshError('deltas inside attention must be left out with --tensor, got some. Use --shard full alone.')
        changed: dict[str, Any] = {}
        for name in ('context', 'mem', 'kv_shift'):
            tensor = getattr(given, name)
            if tensor is not None:
                changed[name] = copied(tensor, self.mesh)
        if given.extra is not None:
            keys, values, mask = given.extra
            changed['extra'] = ExtraKeys(
                self.some_keys(copied(keys, self.mesh)), self.some_keys(copied(values, self.mesh)), mask
            )
        if given.token_values is not None:
            module, ids = given.token_values
            changed['token_values'] = TokenValues(partial(self.some_values, module), ids)
        if isinstance(given.bias, DenseBias):
            changed['bias'] = DenseBias(self.some(copied(given.bias.bias, self.mesh)))
        dense = given.mask.dense
        if dense is not None and dense.ndim > 2:
            changed['mask'] = given.mask.having(dense=self.some(dense))
        return given.having(**changed) if changed else given

    def some(self, t: Shaped[Tensor, '...'], axis: int = -3) -> Shaped[Tensor, '...']:
        """The entries of a tensor for these query heads; an axis of 1 stays."""
        return t if t.shape[axis] == 1 else t.index_select(axis, self.queries.to(t.device))

    def some_keys(self, t: Float[Tensor, 'b h j c']) -> Float[Tensor, 'b k j c']:
        """The heads of another model's keys or values that these query heads use: head h mod their number."""
        index = self.keys if t.shape[1] == self.kv_heads else self.queries % t.shape[1]
        return t.index_select(1, index.to(t.device))

    def some_values(self, module: Any, x: Float[Tensor, 'b n d'], ids: Int[Tensor, 'b n']) -> Float[Tensor, 'b h n c']:
        """The values for these key heads, from a module that is whole on every process."""
        swap = Swap(entries_of(module), self.mesh)
        swap.enter()
        try:
            return self.some_keys(module(x, ids))
        finally:
            swap.leave()


class OutputSum:
    """Sums the output of a branch over the processes, and then adds its bias once.

    ``to_slices``: each process needs only its own rows of the sum.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self.bias: nn.Parameter | None = None
        self.to_slices = False

    def enter(self, module: nn.Module, args: Any) -> None:
        self.bias, module._parameters['bias'] = module._parameters['bias'], None

    def leave(self, module: nn.Module, args: Any, out: Float[Tensor, '... d'] | None) -> Tensor | None:
        bias, self.bias = self.bias, None
        module._parameters['bias'] = bias
        if out is None:
            # a recomputed layer stops as soon as all saved tensors are there
            return None
        if self.to_slices:
            part = summed_rows(out, self.mesh)
            return part if bias is None else part + copied(bias, self.mesh)
        whole = added_up(out, self.mesh)
        return whole if bias is None else whole + bias


# ---------------------------------------------------------------- biases of a whole stack


def cut_biases(model: nn.Module, mesh: DeviceMesh) -> None:
    """Make the position biases of a stack for the heads of this process. Their few parameters stay whole."""
    for stack in stacks_of(model):
        flags = stack.flags
        share = HeadShare(flags.heads, flags.attention.num_kv_heads, mesh)
        rel_pos = stack.rel_pos
        if rel_pos is not None:
            for name, axis in (('of_distances', 0), ('of_heads', 1)):
                setattr(rel_pos, name, partial(some_heads, getattr(rel_pos, name), share, axis))
        if stack.polar_pos_emb is not None:
            stack.polar_pos_emb.register_forward_hook(partial(some_polar, share))


def some_heads(make: Any, share: HeadShare, axis: int, distances: Int[Tensor, '...']) -> Float[Tensor, '...']:
    return share.some(copied(make(distances), share.mesh), axis)


def some_polar(
    share: HeadShare, module: nn.Module, args: Any, out: tuple[Float[Tensor, '#b n d'], Float[Tensor, 'h 1 d']]
) -> tuple[Tensor, Tensor]:
    angles, bias = out
    return angles, share.some(copied(bias, share.mesh))
