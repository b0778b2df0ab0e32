"""Linear recurrences in chunks: matrix products within a chunk, a state between chunks.

All ratios of decays are exponentials of numbers that are not positive, so nothing overflows. The state is (b h k v).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.tensor_types import Float

Both = tuple[Float[Tensor, 'b h n v'], Float[Tensor, 'b h k v']]

DELTA_CHUNK = 64
# pairs within a chunk have a decay for each channel, so that their number counts
GATED_CHUNK = 16


def gated_delta_rule(
    q: Float[Tensor, 'b h n k'],
    k: Float[Tensor, 'b h n k'],
    v: Float[Tensor, 'b h n v'],
    log_decay: Float[Tensor, 'b h n'],
    beta: Float[Tensor, 'b h n'],
    state: Float[Tensor, 'b h k v'] | None = None,
    chunk: int = DELTA_CHUNK,
) -> Both:
    """(outputs, state behind the last token), https://arxiv.org/abs/2412.06464.

    ``S_t = exp(log_decay_t) S_{t-1}``, then ``S_t += k_t (beta_t (v_t - S_t^T k_t))^T`` and ``o_t = S_t^T q_t``.
    """
    n, size = q.shape[2], min(chunk, q.shape[2])
    state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3]) if state is None else state
    if n == 0:
        return v, state
    q, k, v = (_in_chunks(t, size) for t in (q, k, v))
    beta, decay = (_in_chunks(t.unsqueeze(-1), size) for t in (beta, log_decay))
    total = decay.cumsum(dim=-2)
    since = (total - total.transpose(-1, -2)).tril().exp().tril()
    # each token's correction depends on those before it in the chunk: a triangular system
    depends = (beta * (k @ k.transpose(-1, -2)) * since).tril(-1) + torch.eye(size, dtype=q.dtype, device=q.device)
    wanted = torch.cat((beta * v, beta * total.exp() * k), dim=-1)
    solved = torch.linalg.solve_triangular(depends, wanted, upper=False, unitriangular=True)
    own, of_state = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    seen, from_state = (q @ k.transpose(-1, -2)) * since, q * total.exp()
    left, through = k * (total[..., -1:, :] - total).exp(), total[..., -1:, :].exp()
    outs = []
    for index in range(q.shape[2]):
        change = own[:, :, index] - of_state[:, :, index] @ state
        outs.append(from_state[:, :, index] @ state + seen[:, :, index] @ change)
        state = through[:, :, index] * state + left[:, :, index].transpose(-1, -2) @ change
    return torch.cat(outs, dim=2)[:, :, :n], state


def gated_linear_attention(
    q: Float[Tensor, 'b h n k'],
    k: Float[Tensor, 'b h n k'],
    v: Float[Tensor, 'b h n v'],
    log_decay: Float[Tensor, 'b h n k'],
    state: Float[Tensor, 'b h k v'] | None = None,
    chunk: int = GATED_CHUNK,
) -> Both:
    """(outputs, state behind the last token), https://arxiv.org/abs/2312.06635.

    ``S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T`` and ``o_t = S_t^T q_t``.
    """
    n, size = q.shape[2], min(chunk, q.shape[2])
    state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3]) if state is None else state
    if n == 0:
        return v, state
    q, k, v, decay = (_in_chunks(t, size) for t in (q, k, v, log_decay))
    total = decay.cumsum(dim=-2)
    later = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1).unsqueeze(-1)
    since = (total.unsqueeze(-2) - total.unsqueeze(-3)).masked_fill(later, 0.0).exp().masked_fill(later, 0.0)
    seen = torch.einsum('bhcik,bhcjk,bhcijk->bhcij', q, k, since)
    own, from_state = seen @ v, q * total.exp()
    left, through = k * (total[..., -1:, :] - total).exp(), total[..., -1, :].exp()
    outs = []
    for index in range(q.shape[2]):
        outs.append(own[:, :, index] + from_state[:, :, index] @ state)
        state = through[:, :, index].unsqueeze(-1) * state + left[:, :, index].transpose(-1, -2) @ v[:, :, index]
    return torch.cat(outs, dim=2)[:, :, :n], state


def _in_chunks(t: Float[Tensor, 'b h n d'], size: int) -> Float[Tensor, 'b h c s d']:
    """Filled up with zeros: what is added neither decays the state nor writes to it."""
    chunks: Tensor = F.pad(t, (0, 0, 0, -t.shape[2] % size)).unflatten(2, (-1, size))
    return chunks
