"""Attention written out number by number, in double precision, for tests to compare with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from x_transformers.position.bias import Bias


class FixedBias(Bias):
    """A bias given as a tensor over own keys; columns in front get 0."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor

    def between(self, geometry, start, stop) -> Tensor:
        return self.tensor if self.tensor.shape[-2] == 1 else self.tensor[..., start:stop, :]

    def render(self, geometry) -> Tensor:
        return torch.nn.functional.pad(self.tensor, (geometry.front, 0))


def may_look(
    b, h, i, j, geometry, *, causal=False, past=None, ahead=None, keys=None, dense=None, front=None, prefix=None
) -> bool:
    own, query = j - geometry.front, i + geometry.first
    if dense is not None:
        full = torch.nn.functional.pad(dense, (geometry.keys - dense.shape[-1], 0), value=True)
        full = full[(None,) * (4 - full.ndim)]
        if not full[b % full.shape[0], h % full.shape[1], i, j]:
            return False
    if own < 0:
        return front is None or -own > front.shape[1] or bool(front[b, front.shape[1] + own])
    if keys is not None and not keys[b, own]:
        return False
    if past is not None and query - own > past:
        return False
    if ahead is not None and not causal and own - query > ahead:
        return False
    return not causal or own <= query or (prefix is not None and own < (prefix if isinstance(prefix, int) else int(prefix[b])))


def attention(q, k, v, geometry, *, scale, bias=None, clamp=None, sink=None, l2=False, **mask) -> Tensor:
    """Softmax attention over what may be seen; 0 where nothing may."""
    (batch, heads, queries, _), kv_heads = q.shape, k.shape[1]
    out = torch.zeros(batch, heads, queries, v.shape[-1], dtype=torch.float64)
    added = None if bias is None else bias.render(geometry).expand(batch, heads, queries, geometry.keys)
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                scores = {}
                for j in range(geometry.keys):
                    if may_look(b, h, i, j, geometry, **mask):
                        one, other = q[b, h, i].double(), k[b, h % kv_heads, j].double()
                        score = (-(one - other).square().sum() if l2 else one @ other) * scale
                        score = score + (0 if added is None else added[b, h, i, j].double())
                        scores[j] = clamp * torch.tanh(score / clamp) if clamp else score
                if not scores:
                    continue
                total = sum(math.exp(s) for s in scores.values()) + (0 if sink is None else math.exp(sink[h]))
                for j, s in scores.items():
                    out[b, h, i] += math.exp(s) / total * v[b, h % kv_heads, j].double()
    return out
