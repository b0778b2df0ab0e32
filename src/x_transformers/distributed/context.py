"""Context parallelism: each process holds a slice of every sequence, and attends to the keys and values of earlier slices.

The model sees a slice as new tokens behind a cache, so positions, masks and biases need no change. A layer gets the rows of
earlier slices from the other processes when it reads its cache. So every model that can be decoded from a cache can be trained
in slices. A process with a late slice attends to more keys than one with an early slice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from x_transformers.autoregressive_wrapper import AutoregressiveWrapper
from x_transformers.cache.kv_cache import KVCache
from x_transformers.cache.layer_cache import LayerCache
from x_transformers.cache.tape import Tape
from x_transformers.distributed.degrees import MeshError
from x_transformers.distributed.moves import all_rows
from x_transformers.helpers import pad_at_dim
from x_transformers.tensor_types import Float, Int
from x_transformers.transformer_wrapper import TransformerWrapper

# arguments of a call that all processes need whole
PASSED = {'context', 'context_mask'}
# arguments that are whole, or have an entry for each token
PER_TOKEN = {'condition', 'in_attn_cond'}
# masks of pairs, of which each process needs the rows of its slice
MASK = 'attn_mask'


def sliced_refusals(model: nn.Module) -> Iterator[str]:
    """One sentence for each property of a model, other than flags, that prevents training in slices."""
    if not isinstance(model, AutoregressiveWrapper) or type(model.net) is not TransformerWrapper:
        yield f'a model must be an AutoregressiveWrapper of a TransformerWrapper with --context, got {type(model).__name__}.'
        return
    net = model.net
    if not net.can_cache_kv or not net.attn_layers.is_causal or net.attn_layers.has_prefix:
        yield 'a model must look back only, and be able to decode from a cache, with --context. Use --shard full alone.'
    if model.mask_prob > 0.0:
        yield 'mask_prob must be 0 with --context: it hides keys of the whole sequence.'


class Sliced:
    """The forward of a model on this process's slice of each sequence: (b n) -> its part of the mean loss.

    The parts of all processes of a context group add up to the loss of one process.
    """

    def __init__(self, model: Any, mesh: DeviceMesh) -> None:
        self.model, self.mesh = model, mesh
        self.rank, self.size = mesh.get_local_rank(), mesh.size()

    def __call__(self, x: Int[Tensor, 'b n'], **given: Any) -> Float[Tensor, '']:
        self._check(given)
        ignored = self.model.ignore_index
        targets = given.pop('targets', None)
        if targets is None:
            x, targets = x[:, :-1], x[:, 1:]
        # padding at the end, which nobody attends to: all slices have the same length
        more = -x.shape[1] % self.size
        x, targets = pad_at_dim(x, (0, more), value=self.model.pad_value), pad_at_dim(targets, (0, more), value=ignored)
        width = x.shape[1] // self.size
        own = slice(self.rank * width, (self.rank + 1) * width)
        if MASK in given:
            shown = pad_at_dim(pad_at_dim(given[MASK], (0, more)), (0, more), dim=-2)
            given[MASK] = shown[..., own, : own.stop]
        for name in PER_TOKEN & given.keys():
            if given[name].ndim > 2:
                given[name] = pad_at_dim(given[name], (0, more), dim=1)[:, own]
        cache = GatheredCache(self.mesh, self.rank * width, self.model.net.attn_layers)
        wanted = targets[:, own]
        loss: Tensor = self.model(x[:, own], targets=wanted, cache=cache, **given)
        count, of = (wanted != ignored).sum(), (targets != ignored).sum()
        # the mean of no tokens is NaN
        share = count.to(loss.dtype) / of.clamp(min=1).to(loss.dtype)
        part: Tensor = torch.where(count > 0, loss, 0.0 * loss.nan_to_num()) * share
        return part

    @staticmethod
    def _check(given: Mapping[str, Any]) -> None:
        if wrong := sorted(given.keys() - PASSED - PER_TOKEN - {'targets', MASK}):
            raise MeshError(f'{", ".join(wrong)} must be left out with --context: each process has a slice. Use --shard full.')


class GatheredCache(KVCache):
    """The cache of the earlier slices, gathered when it is read."""

    __slots__ = ('mesh', 'stack')

    def __init__(self, mesh: DeviceMesh, before: int, stack: nn.Module) -> None:
        super().__init__(before)
        self.mesh, self.stack = mesh, stack
        # it is still empty, so there is nothing to check
        self.known = id(stack)

    @property
    def retained(self) -> int:
        return self._length

    def step(self, index: int) -> LayerCache:
        layer = self.steps.get(index)
        if layer is None:
            layer = self.steps[index] = GatheredTapes(self.mesh)
        return layer

    def fork(self) -> KVCache:
        return GatheredCache(self.mesh, self._length, self.stack)


class GatheredTapes(LayerCache):
    """The buffers of one step. Appending adds the rows of all slices up to this one."""

    __slots__ = ('mesh',)

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self.mesh = mesh

    def extend(self, **new: Float[Tensor, '... m d']) -> tuple[Tensor, ...]:
        whole = []
        for name, rows in new.items():
            length = rows.shape[-2]
            every = all_rows(rows, length * self.mesh.size(), self.mesh, alike=False)
            held = every[..., : (self.mesh.get_local_rank() + 1) * length, :]
            self.tapes[name] = Tape.of(held)
            whole.append(held)
        return tuple(whole)

    def fixed(self, name: str, tensor: Float[Tensor, '... n d']) -> None:
        """Each process holds the whole context. A layer that is recomputed for its gradients computes these keys again."""
