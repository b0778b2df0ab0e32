"""The facts of a call by which kernels are chosen, from its arguments."""

from __future__ import annotations

import torch

from x_transformers.attention.kernels.base import CallFacts, KernelArgs
from x_transformers.helpers import under_transform


def facts_of(args: KernelArgs) -> CallFacts:
    """The facts of a call that kernels are chosen by."""
    q, k, v, mask, geometry = args.q, args.k, args.v, args.mask, args.geometry
    recording, limits_past = torch.is_grad_enabled(), mask.limits_past(geometry)
    limits_ahead = mask.limits_ahead(geometry)
    windows = ((limits_past, mask.past), (limits_ahead, mask.ahead))
    return CallFacts(
        device=q.device.type,
        dtype=args.autocast or q.dtype,
        gradients=recording and (q.requires_grad or k.requires_grad or v.requires_grad),
        dropout=args.dropout > 0,
        heads=q.shape[1],
        kv_heads=k.shape[1],
        key_dim=q.shape[-1],
        value_dim=v.shape[-1],
        geometry=geometry,
        plain_causal=mask.plain_causal(geometry),
        masked=mask.keys is not None or mask.dense is not None or mask.prefix is not None or limits_past or limits_ahead,
        windowed=not geometry.is_open and any(on and n is not None and 2 * n < geometry.own for on, n in windows),
        causal=mask.causal,
        packed=mask.packed is not None,
        biased=args.bias is not None,
        learned_bias=args.bias is not None and recording and args.bias.learns(geometry),
        by_distance=args.bias is not None and args.bias.by_distance,
        previous=args.previous is not None,
        delta=args.delta is not None,
        return_scores=args.return_scores,
        transformed=under_transform(),
        masked_heads=mask.dense is not None and mask.dense.ndim > 2 and mask.dense.shape[-3] != 1,
    )
