"""PyTorch's scaled dot product attention."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.attention.geometry import tiled_heads
from x_transformers.attention.kernels.base import (
    CallFacts,
    KernelArgs,
    Needs,
    merged_mask,
    regrouped,
    usual_refusals,
)
from x_transformers.attention.scores.similarity import as_products
from x_transformers.helpers import by_formula, writes_program
from x_transformers.tensor_types import Float


def writes_more_than_it_reads(call: CallFacts) -> bool:
    """Whether a head's mask or bias over all pairs is larger than its queries, keys and values together."""
    shape = call.geometry
    if shape.is_open:
        return False
    return shape.queries * shape.keys > shape.queries * call.key_dim + shape.keys * (call.key_dim + call.value_dim)


def copies_pay(args: KernelArgs, lead: int) -> bool:
    """Whether the pairs that a mask would hold are more numbers than those of queries and keys that are copied instead."""
    shape, width = args.geometry, args.q.shape[-1]
    # a channel that hides padding takes eight columns, of keys too
    copied = (shape.queries + lead) * width if args.mask.keys is None else (shape.queries + lead + shape.keys) * (width + 8)
    return shape.queries * shape.keys > copied


class Sdpa:
    """A softmax over scores with a mask and a bias. Sinks ride as one more key, distances as more channels."""

    name = 'sdpa'

    def refusals(self, needs: Needs, call: CallFacts) -> tuple[str, ...]:
        reasons = [f'{rule} changes individual scores, which this kernel does not support' for rule in needs.pointwise]
        return (*usual_refusals(needs, call), *reasons)

    def reservations(self, needs: Needs, call: CallFacts) -> tuple[str, ...]:
        reasons = []
        if call.return_scores:
            reasons.append('the next layer wants the scores, which would be computed a second time')
        if call.device == 'cpu':
            if call.dropout:
                reasons.append('with dropout it holds the whole score matrix on CPU, slower than the reference')
            if call.learned_bias or (needs.sink and call.gradients):
                reasons.append('a bias that learns makes it hold the whole score matrix on CPU')
            large = writes_more_than_it_reads(call)
            if call.by_distance and large:
                reasons.append('a bias by distance would be written out for all pairs')
            if call.windowed and large:
                reasons.append('it looks at keys outside the window, too')
        return tuple(reasons)

    def __call__(self, args: KernelArgs) -> Float[Tensor, 'b h i e']:
        q, k, v = unified(args)
        if args.l2_distance:
            q, k = as_products(q, k, whole=args.sink is not None)
        # without asking for causality, which one query at the end has by itself
        alone = type(args.geometry.queries) is int and args.geometry.queries == 1
        lead = None if alone else lead_of(args)
        if lead is not None:
            return with_lead(q, k, v, args, lead)
        added, causal = (added_mask(args, q), False) if alone else additive_mask(args, q)
        if args.sink is not None:
            k, v, added = with_sink(args, k, v, added, q)
        width = v.shape[-1]
        if args.geometry.queries > 1:
            q, k, v = of_one_width(q, k, v)
        if args.backends is None:
            out = over_heads(q, k, v, added, causal, args)
        else:
            from torch.nn.attention import SDPBackend, sdpa_kernel

            with sdpa_kernel([getattr(SDPBackend, name) for name in args.backends]):
                out = over_heads(q, k, v, added, causal, args)
        out = out if out.shape[-1] == width else out[..., :width]
        if added is not None and q.device.type != 'cpu':
            open_rows = args.mask.open_rows(args.geometry, q.device)
            out = out if open_rows is None else out.masked_fill(~open_rows, 0.0)
        return out


def unified(args: KernelArgs) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values in one precision: autocast's where it is on."""
    q = args.q if args.factor is None else args.queries
    k, v, dtype = args.k, args.v, args.autocast
    if dtype is None or q.dtype == torch.float64:
        if q.dtype == k.dtype == v.dtype:
            return q, k, v
        dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def lead_of(args: KernelArgs) -> int | None:
    """How many queries to put in front, so that the kernel's own causality does what the mask asks; None if it cannot.

    Keys in front and memories are seen by all queries: with as many queries in front, whose output is dropped, the rest is
    causal. Padded keys are kept out by a channel of their own.
    """
    mask, geometry = args.mask, args.geometry
    if geometry.is_open or not mask.limits_future(geometry) or mask.limits_past(geometry):
        return None
    if args.bias is not None or args.sink is not None or args.backends is not None:
        return None
    if any(part is not None for part in (mask.front, mask.prefix, mask.dense, mask.packed)):
        return None
    lead = geometry.keys - geometry.queries
    if lead < 0 or 4 * lead > geometry.queries or not copies_pay(args, lead):
        return None
    if mask.keys is None:
        return lead or None
    # other devices have kernels that take a small mask as it is, and prefer the width of heads as it is
    return lead if args.q.device.type == 'cpu' else None


def with_lead(
    q: Float[Tensor, 'b h i d'], k: Float[Tensor, 'b kh j d'], v: Float[Tensor, 'b kh j e'], args: KernelArgs, lead: int
) -> Float[Tensor, 'b h i e']:
    """Causal attention behind ``lead`` more queries."""
    width, keys = v.shape[-1], args.mask.keys
    if keys is not None:
        # a channel that is 1 in queries and, in keys that nobody may see, so low that nothing is left of them
        lowest = torch.finfo(q.dtype).min / (8 * max(1.0, abs(args.scale)))
        seen = F.pad(keys, (args.geometry.front, 0), value=True)[:, None, :, None]
        channel = k.new_zeros(()).expand(seen.shape).masked_fill(~seen, lowest).expand(-1, k.shape[1], -1, -1)
        # eight of them, for the kernels' sake
        q, k = (
            torch.cat((F.pad(q, (0, 7)), torch.ones_like(q[..., :1])), dim=-1),
            torch.cat((F.pad(k, (0, 7)), channel), dim=-1),
        )
    q, k, v = of_one_width(q, k, v)
    out = over_heads(F.pad(q, (0, 0, lead, 0)) if lead else q, k, v, None, True, args)
    out = out[..., lead:, :width]
    open_rows = args.mask.open_rows(args.geometry, q.device)
    return out if open_rows is None else out.masked_fill(~open_rows, 0.0)


def additive_mask(args: KernelArgs, q: Float[Tensor, 'b h i d']) -> tuple[Tensor | None, bool]:
    """(what is added to the scores, whether the kernel's own causality is asked)."""
    if args.bias is None and args.sink is None and args.mask.plain_causal(args.geometry):
        return None, True
    return added_mask(args, q), False


def added_mask(args: KernelArgs, q: Float[Tensor, 'b h i d']) -> Tensor | None:
    """Bias and mask, causality included, as one tensor to add."""
    # a row of -inf gives exactly 0 on CPU. Elsewhere kernels differ, so there rows are zeroed afterwards
    mask_value = float('-inf') if q.is_cpu else torch.finfo(q.dtype).min / 2
    return merged_mask(args.mask, args.bias, args.geometry, dtype=q.dtype, device=q.device, mask_value=mask_value)


def with_sink(
    args: KernelArgs,
    k: Float[Tensor, 'b kh j d'],
    v: Float[Tensor, 'b kh j e'],
    added: Float[Tensor, '#b #h #i j'] | None,
    q: Float[Tensor, 'b h i d'],
) -> tuple[Tensor, Tensor, Tensor]:
    """One zero key with no value in front, whose score is the sink."""
    if args.sink is None:
        raise ValueError('sink must be given to be put in front, got None. Give one.')
    column = args.sink.to(q.dtype).view(1, -1, 1, 1)
    if added is None:
        added = torch.zeros(1, 1, 1, k.shape[-2], dtype=q.dtype, device=q.device)
    rows = max(added.shape[0], 1), column.shape[1], added.shape[2]
    added = torch.cat((column.expand(*rows, 1), added.expand(*rows, -1)), dim=-1)
    return F.pad(k, (0, 0, 1, 0)), F.pad(v, (0, 0, 1, 0)), added


def of_one_width(
    q: Float[Tensor, 'b h i d'], k: Float[Tensor, 'b kh j d'], v: Float[Tensor, 'b kh j e']
) -> tuple[Tensor, Tensor, Tensor]:
    """The narrower of keys and values filled up with zeros: the fast kernels want one width."""
    more = v.shape[-1] - k.shape[-1]
    if more > 0:
        return F.pad(q, (0, more)), F.pad(k, (0, more)), v
    return q, k, (F.pad(v, (0, -more)) if more < 0 else v)


def over_heads(
    q: Float[Tensor, 'b h i d'],
    k: Float[Tensor, 'b kh j d'],
    v: Float[Tensor, 'b kh j e'],
    added: Float[Tensor, '#b #h #i j'] | None,
    causal: bool,
    args: KernelArgs,
) -> Float[Tensor, 'b h i e']:
    """Run it, with query head h looking at key head h mod kv_heads."""
    heads, kv_heads = q.shape[1], k.shape[1]
    if heads == kv_heads:
        return run_sdpa(q, k, v, added, causal, args)
    groups = heads // kv_heads
    if q.shape[2] == 1:
        # the queries of a group are the rows of one key head: nothing is repeated
        rows = q.view(q.shape[0], groups, kv_heads, -1).transpose(1, 2)
        if added is not None and added.shape[1] != 1:
            added = added.view(added.shape[0], groups, kv_heads, -1).transpose(1, 2)
        return run_sdpa(rows, k, v, added, False, args).transpose(1, 2).reshape(q.shape[0], heads, 1, -1)
    if added is None or (added.shape[1] == 1 and q.device.type == 'cpu'):
        # torch pairs query head h with key head h // group: bring ours into that order and back
        if kv_heads == 1:
            return run_sdpa(q, k, v, added, causal, args, enable_gqa=True)
        out = run_sdpa(regrouped(q, groups), k, v, added, causal, args, enable_gqa=True)
        return regrouped(out, kv_heads)
    if kv_heads == 1:
        return run_sdpa(q, k.expand(-1, heads, -1, -1), v.expand(-1, heads, -1, -1), added, causal, args)
    return run_sdpa(q, tiled_heads(k, heads), tiled_heads(v, heads), added, causal, args)


def run_sdpa(
    q: Float[Tensor, 'b h i d'],
    k: Float[Tensor, 'b kh j d'],
    v: Float[Tensor, 'b kh j e'],
    added: Float[Tensor, '#b #h #i j'] | None,
    causal: bool,
    args: KernelArgs,
    enable_gqa: bool = False,
) -> Tensor:
    tensors = (q, k, v) if added is None else (q, k, v, added)
    learning = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if learning and q.device.type == 'cpu' and not writes_program() and all(type(t) is Tensor for t in tensors):
        choice = torch._fused_sdp_choice(q, k, v, added, args.dropout, causal, scale=args.scale, enable_gqa=enable_gqa)
        if choice == FLASH:
            out: Tensor = FlashOnCPU.apply(q, k, v, added, causal, args.scale, enable_gqa)  # type: ignore[no-untyped-call]
            return out
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=added, dropout_p=args.dropout, is_causal=causal, scale=args.scale, enable_gqa=enable_gqa
    )


# what torch._fused_sdp_choice calls its flash kernel
FLASH = 1


class FlashOnCPU(torch.autograd.Function):
    """The kernel that torch chooses on a CPU, with a backward that can be differentiated, which torch's own cannot."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Float[Tensor, 'b h i d'],
        k: Float[Tensor, 'b kh j d'],
        v: Float[Tensor, 'b kh j e'],
        added: Float[Tensor, '#b #h #i j'] | None,
        causal: bool,
        scale: float,
        enable_gqa: bool,
    ) -> Tensor:
        out: Tensor
        out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=added, scale=scale
        )
        ctx.save_for_backward(q, k, v, added, out, logsumexp)
        ctx.settings = causal, scale, enable_gqa
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Float[Tensor, 'b h i e']) -> tuple[Tensor | None, ...]:
        q, k, v, added, out, logsumexp = ctx.saved_tensors
        (causal, scale, enable_gqa), (grad,) = ctx.settings, grads
        if not torch.is_grad_enabled():
            gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad, q, k, v, out, logsumexp, 0.0, causal, attn_mask=added, scale=scale
            )
            return *gradients, None, None, None, None
        # a gradient of this gradient is wanted: let autograd see plain operations
        math = partial(torch.ops.aten._scaled_dot_product_attention_math, scale=scale, enable_gqa=enable_gqa)
        slopes = by_formula(lambda q, k, v: math(q, k, v, added, 0.0, causal)[0], (q, k, v), (grad,))
        return *slopes, None, None, None, None
