"""Packed sequences on GPU: a variable-length kernel, which computes no scores across sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from x_transformers.attention.geometry import tiled_heads
from x_transformers.attention.kernels.base import CallFacts, KernelArgs, Needs, regrouped, usual_refusals
from x_transformers.attention.kernels.sdpa import unified
from x_transformers.tensor_types import Float

# whether torch lets query heads share a key head here
KNOWS_GROUPS = tuple(int(number) for number in torch.__version__.split('.')[:2]) >= (2, 12)


class Varlen:
    """``torch.nn.attention.varlen``: a causal or full softmax inside each packed sequence, in half precision."""

    name = 'varlen'

    def refusals(self, needs: Needs, call: CallFacts) -> tuple[str, ...]:
        if not call.packed:
            return ('no packed sequences',)
        reasons = usual_refusals(needs, call)
        reasons += [f'{rule} changes individual scores, which this kernel does not support' for rule in needs.pointwise]
        if call.device != 'cuda' or call.dtype not in (torch.float16, torch.bfloat16):
            reasons.append(f'it runs in half precision on CUDA, not in {call.dtype} on {call.device}')
        if call.masked:
            reasons.append('it supports no mask other than the causal one')
        if call.biased or needs.sink or needs.l2_distance:
            reasons.append('it supports only dot products of queries and keys as scores')
        if call.geometry.front:
            reasons.append('keys are prepended to the sequence')
        if call.key_dim != call.value_dim:
            reasons.append('keys and values differ in width')
        if call.dropout:
            reasons.append('it has no dropout')
        return tuple(reasons)

    def reservations(self, needs: Needs, call: CallFacts) -> tuple[str, ...]:
        return ('the next layer wants the scores, which would be computed a second time',) if call.return_scores else ()

    def __call__(self, args: KernelArgs) -> Float[Tensor, '1 h i e']:
        from torch.nn.attention.varlen import varlen_attn

        packed = args.mask.packed
        if packed is None:
            raise ValueError('packed must be given to the varlen kernel, got None. Pack the sequences.')
        q, k, v = unified(args)
        heads, kv_heads = q.shape[1], k.shape[1]
        shares = heads != kv_heads and KNOWS_GROUPS
        if not shares:
            k, v = tiled_heads(k, heads), tiled_heads(v, heads)
        more: dict[str, Any] = {'enable_gqa': True} if shares else {}
        paired = shares and kv_heads > 1
        if paired:
            q = regrouped(q, heads // kv_heads)
        rows: Any = varlen_attn(
            q[0].transpose(0, 1),
            k[0].transpose(0, 1),
            v[0].transpose(0, 1),
            packed.starts_q.int(),
            packed.starts_k.int(),
            packed.longest_q or args.geometry.queries,
            packed.longest_k or args.geometry.own,
            scale=args.scale,
            window_size=(-1, 0) if args.mask.causal else (-1, -1),
            **more,
        )
        out: Tensor = rows.transpose(0, 1)[None]
        return regrouped(out, kv_heads) if paired else out
