"""The kernels of flash-linear-attention, if that package is installed and the tensors are on a GPU."""

from __future__ import annotations

import sys
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from x_transformers.mixers.chunks import Both, gated_delta_rule, gated_linear_attention
from x_transformers.tensor_types import Float


@cache
def installed() -> bool:
    return 'fla' in sys.modules or find_spec('fla') is not None


def wanted(q: Float[Tensor, 'b h n k']) -> bool:
    """Whether a kernel may run: it knows no double precision, and takes no part in graphs and transforms of ``torch.func``."""
    if torch.compiler.is_compiling() or not q.is_cuda or q.dtype == torch.float64:
        return False
    return installed() and not torch._C._are_functorch_transforms_active()


def run_delta(
    q: Float[Tensor, 'b h n k'],
    k: Float[Tensor, 'b h n k'],
    v: Float[Tensor, 'b h n v'],
    log_decay: Float[Tensor, 'b h n'],
    beta: Float[Tensor, 'b h n'],
    state: Float[Tensor, 'b h k v'] | None,
) -> Both:
    """``gated_delta_rule``, by a kernel if there is one."""
    if not wanted(q):
        return gated_delta_rule(q, k, v, log_decay, beta, state)
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return _by_token(chunk_gated_delta_rule, q, k, v, state, g=log_decay.transpose(1, 2), beta=beta.transpose(1, 2))


def run_gated(
    q: Float[Tensor, 'b h n k'],
    k: Float[Tensor, 'b h n k'],
    v: Float[Tensor, 'b h n v'],
    log_decay: Float[Tensor, 'b h n k'],
    state: Float[Tensor, 'b h k v'] | None,
) -> Both:
    """``gated_linear_attention``, by a kernel if there is one."""
    if not wanted(q):
        return gated_linear_attention(q, k, v, log_decay, state)
    from fla.ops.gla import chunk_gla

    return _by_token(chunk_gla, q, k, v, state, g=log_decay.transpose(1, 2))


def _by_token(
    kernel: Any,
    q: Float[Tensor, 'b h n k'],
    k: Float[Tensor, 'b h n k'],
    v: Float[Tensor, 'b h n v'],
    state: Float[Tensor, 'b h k v'] | None,
    **more: Float[Tensor, 'b n h ...'],
) -> Both:
    """These kernels have heads behind the tokens."""
    q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))
    more = {name: t.contiguous() for name, t in more.items()}
    out, state = kernel(q, k, v, scale=1.0, initial_state=state, output_final_state=True, **more)
    return out.transpose(1, 2), state
