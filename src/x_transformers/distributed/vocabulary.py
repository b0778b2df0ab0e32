"""Loss parallelism with tensor groups: each process holds the logits of a part of the vocabulary.

The rows of the head are sharded, and with a tied head those of the token table. A loss is computed from the logits of all
processes, a few rows at a time, with PyTorch's ``loss_parallel``; no process ever holds a whole row of logits. Calls that
return logits gather them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import RowwiseParallel, loss_parallel, parallelize_module
from torch.distributed.tensor.placement_types import Replicate

from x_transformers.autoregressive_wrapper import AutoregressiveWrapper
from x_transformers.distributed.moves import added_up, copied, cut_rows, whole_of
from x_transformers.heads import LinearLogits, TiedHead, linear_loss
from x_transformers.helpers import autocast_dtype, softclamp, without_autocast
from x_transformers.losses import at_least_single, check_targets, rows_at_once
from x_transformers.stack_wrapper import StackWrapper
from x_transformers.tensor_types import Float, Int


def cut_vocabulary(part: nn.Module, mesh: DeviceMesh) -> None:
    """Shard every head of ``part`` that is one linear map, in place; a tied one with its table."""
    for module in part.modules():
        if type(module) is LinearLogits:
            cut_rows(module, mesh)
            module.__class__ = LogitsOfSome
        elif type(module) is TiedHead:
            cut_table(module._embedding[0].emb, mesh)
            cut_rows(module, mesh)
            module.__class__ = TiedLogitsOfSome


def vocabulary_refusals(model: nn.Module, size: int) -> Iterator[str]:
    """One sentence for each property of a model that prevents sharding its vocabulary over ``size`` processes."""
    if not isinstance(model, (AutoregressiveWrapper, StackWrapper)):
        yield f'a model must be an AutoregressiveWrapper, or what it wraps, with --loss-parallel, got {type(model).__name__}.'
        return
    heads = [module for module in model.modules() if type(module) in (LinearLogits, TiedHead)]
    if not heads:
        yield 'a head must be one linear map with --loss-parallel, got none. Use --tensor alone.'
    for head in heads:
        tokens = head.weight.shape[0]  # type: ignore[index]
        if tokens < size:
            yield f'a vocabulary must have at least as many tokens as --tensor with --loss-parallel, got {tokens} for {size}.'


def cut_table(table: nn.Embedding, mesh: DeviceMesh) -> None:
    if isinstance(table.weight, DTensor):
        return
    style = RowwiseParallel(input_layouts=Replicate())
    style.src_data_rank = None
    table.register_forward_pre_hook(check_ids)
    parallelize_module(table, mesh, style)


def check_ids(table: nn.Module, args: tuple[Int[Tensor, '...'], ...]) -> None:
    """Refuse ids outside of the table, which would get a vector of zeros. Errors: ``IndexError``, as for a whole table."""
    ids, rows = args[0], table.num_embeddings
    if ids.device.type == 'cpu' and bool(((ids < 0) | (ids >= rows)).any()):  # type: ignore[operator]
        raise IndexError(f'ids must lie in 0 … {rows} - 1.')  # the lookup adds the details


class LogitsOfSome(LinearLogits):
    """A ``LinearLogits`` that is sharded by rows."""

    def forward(self, input: Float[Tensor, '... d'], targets: Int[Tensor, '...'] | None = None, **loss: Any) -> Tensor:
        return logits_or_loss(input, self.weight, self.bias, targets, **loss)


class TiedLogitsOfSome(TiedHead):
    """A ``TiedHead`` whose table is sharded by rows."""

    def forward(self, x: Float[Tensor, '... d'], targets: Int[Tensor, '...'] | None = None, **loss: Any) -> Tensor:
        return logits_or_loss(x, self.weight, self.bias, targets, **loss)


def logits_or_loss(
    x: Float[Tensor, '... d'],
    weight: Float[Tensor, 'v d'],
    bias: Float[Tensor, ' v'] | None,
    targets: Int[Tensor, '...'] | None,
    **loss: Any,
) -> Float[Tensor, '...']:
    """All logits, or with targets their loss, as for a whole head."""
    if targets is not None:
        return linear_loss(x, weight, bias, targets, measure=vocabulary_cross_entropy, **loss)
    whole, mesh = weight.shape[0], mesh_of(weight)
    own = F.linear(copied(x, mesh), local(weight, x.dtype), None if bias is None else local(bias, x.dtype))
    return whole_of(own, own.ndim - 1, whole, mesh, alike=True)


def mesh_of(weight: Float[Tensor, 'v d']) -> DeviceMesh:
    mesh: DeviceMesh = weight.device_mesh  # type: ignore[attr-defined]
    return mesh


def local(t: Any, dtype: torch.dtype) -> Tensor:
    """This process's rows, cast here because FSDP2 does not cast parameters that it does not gather."""
    rows: Tensor = t.to_local()
    return rows.to(dtype)


def vocabulary_cross_entropy(
    hidden: Float[Tensor, '... d'],
    weight: Float[Tensor, 'v d'],
    bias: Float[Tensor, ' v'] | None,
    targets: Int[Tensor, '...'],
    ignore_index: int = -100,
    softcap: float | None = None,
) -> Float[Tensor, '']:
    """``linear_cross_entropy`` of a weight and a bias that are sharded by rows (``DTensor``)."""
    check_targets('vocabulary_cross_entropy', hidden, targets, 'hidden')
    rows, wanted = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).long()
    dtype = autocast_dtype(rows) or rows.dtype
    plan = LossPlan(mesh_of(weight), weight.shape[0], ignore_index, softcap, rows_at_once(rows.device), torch.is_grad_enabled())
    with without_autocast(rows):
        own = local(weight, dtype), None if bias is None else local(bias, dtype)
        total: Tensor = _VocabularyLoss.apply(rows, *own, wanted, plan)  # type: ignore[no-untyped-call]
    count = (wanted != ignore_index).sum()
    # as for ordinary cross entropy, the mean of no tokens is NaN
    return torch.where(count > 0, total / count.clamp(min=1), torch.nan)


@dataclass(frozen=True)
class LossPlan:
    """The arguments of the sum of losses that are not tensors."""

    mesh: DeviceMesh
    classes: int
    ignore_index: int
    softcap: float | None
    chunk: int  # rows of logits held at a time
    with_grad: bool

    def loss(
        self,
        wanted: Int[Tensor, ' n'],
        rows: Float[Tensor, 'n d'],
        weight: Float[Tensor, 'w d'],
        bias: Float[Tensor, ' w'] | None = None,
    ) -> Float[Tensor, '']:
        logits = at_least_single(F.linear(rows, weight, bias))
        if self.softcap is not None:
            logits = softclamp(logits, self.softcap)
        shape = torch.Size((logits.shape[0], self.classes))
        spread = DTensor.from_local(logits, self.mesh, [Shard(1)], run_check=False, shape=shape, stride=(self.classes, 1))
        return F.cross_entropy(spread, wanted, ignore_index=self.ignore_index, reduction='sum')


class _VocabularyLoss(torch.autograd.Function):
    """The sum of the cross entropies. The forward computes its gradients, while it holds a few rows of logits.

    So ``loss_parallel``, which both passes need, is on only here.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Float[Tensor, 'n d'],
        weight: Float[Tensor, 'w d'],
        bias: Float[Tensor, ' w'] | None,
        wanted: Int[Tensor, ' n'],
        plan: LossPlan,
    ) -> Float[Tensor, '']:
        whole = [rows, weight] if bias is None else [rows, weight, bias]
        needs = [plan.with_grad and needed for needed in ctx.needs_input_grad[: len(whole)]]
        slopes = [torch.zeros_like(t) if needed else None for t, needed in zip(whole, needs, strict=True)]
        parameters = [t.detach().requires_grad_(needed) for t, needed in zip(whole[1:], needs[1:], strict=True)]
        total = rows.new_zeros((), dtype=torch.promote_types(rows.dtype, torch.float32))
        for start in range(0, rows.shape[0], plan.chunk):
            here = slice(start, start + plan.chunk)
            with torch.enable_grad(), loss_parallel():
                some = rows[here].to(weight.dtype).detach().requires_grad_(needs[0])
                loss: Any = plan.loss(wanted[here], some, *parameters)
                leaves = [leaf for leaf in (some, *parameters) if leaf.requires_grad]
                found = iter(torch.autograd.grad(loss, leaves) if leaves else ())
            total += loss.detach().to_local()
            # a row gets its gradient once, a parameter from every chunk
            places: tuple[Any, ...] = (here, ..., ...)
            for slope, part in zip(slopes, places, strict=False):
                if slope is not None:
                    slope[part] += next(found)
        if slopes[0] is not None:
            slopes[0] = added_up(slopes[0], plan.mesh)
        ctx.save_for_backward(*slopes, *[None] * (3 - len(slopes)))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, '']) -> tuple[Tensor | None, ...]:
        return (*(None if slope is None else slope * grad.to(slope.dtype) for slope in ctx.saved_tensors), None, None)
