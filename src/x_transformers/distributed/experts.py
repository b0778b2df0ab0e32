"""Expert parallelism in a tensor group: each process holds some of the experts and all tokens.

Every process routes every token, and runs its own experts on the tokens routed to them; the outputs are summed. No token is
sent or dropped, and the balancing terms are equal on all processes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from x_transformers.distributed.moves import Swap, added_up, copied, cut_rows, entries_of
from x_transformers.experts import Experts, Routed
from x_transformers.tensor_types import Float


class ExpertParallel(ParallelStyle):
    """The experts of a feed-forward. Each process holds the whole router. A shared feed-forward is cut separately."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.dtype = dtype

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        experts: Any = module
        for linear in (experts.first, experts.last):
            cut_rows(linear, device_mesh)
        swap = Swap(entries_of(experts.first, experts.between, experts.last), device_mesh, self.dtype)
        experts.register_forward_pre_hook(swap.enter)
        experts.register_forward_hook(swap.leave, always_call=True)
        experts._on_chosen = partial(on_some, experts, device_mesh)
        return module


def on_some(experts: Experts, mesh: DeviceMesh, x: Float[Tensor, 't d'], routed: Routed) -> Float[Tensor, 't e']:
    """``Experts._on_chosen`` for the experts of this process, summed over all processes."""
    count, active = experts.first.weight.shape[0], routed.chosen.shape[1]
    chosen = routed.chosen.flatten() - mesh.get_local_rank() * count
    # tokens of other processes' experts are sorted to the end
    chosen = torch.where((chosen >= 0) & (chosen < count), chosen, count)
    counts = chosen.new_zeros(count + 1).index_add(0, chosen, torch.ones_like(chosen))[:count]
    order = chosen.argsort(stable=True)[: int(counts.sum())]
    token = order // active
    hidden = experts.between(experts.first(copied(x, mesh).index_select(0, token), counts))
    out = experts.last(hidden, counts)
    shares = copied(routed.shares, mesh).flatten().index_select(0, order)
    out = out * shares.unsqueeze(-1).to(out.dtype)
    return added_up(out.new_zeros(x.shape[0], out.shape[-1]).index_add(0, token, out), mesh)
