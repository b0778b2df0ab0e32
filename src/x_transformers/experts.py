"""Mixture of experts: a router sends each token to a few of many feed-forwards.

https://arxiv.org/abs/2101.03961, https://arxiv.org/abs/2401.06066, https://arxiv.org/abs/2408.15664
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.flags.feedforward import FeedForwardFlags
from x_transformers.grouped import GroupedLinear, combine, dispatch, transformed
from x_transformers.helpers import is_traced, without_autocast
from x_transformers.module import ExactBuffers, Module, empty_parameter
from x_transformers.tensor_types import Bool, Float, Int


class Routed(NamedTuple):
    """Which experts each token goes through, and how much each of them counts; ``loss``: what keeps experts in balance."""

    chosen: Int[Tensor, 't k']
    shares: Float[Tensor, 't k']
    loss: Float[Tensor, ''] | None


class Router(ExactBuffers):
    """The experts of each token: those with the highest scores, which are computed in float32 or wider.

    With ``router_balance='bias'`` a correction is added to the scores for the choice alone, and ``balance_`` moves it.
    forward: (t dim), and which rows are tokens (t) -> ``Routed``.
    """

    exact_buffers = ('correction', 'load')
    decayed_parameters = ('weight',)

    weight: nn.Parameter
    bias: nn.Parameter | None
    correction: Tensor | None
    load: Tensor | None

    def __init__(self, dim: int, flags: FeedForwardFlags) -> None:
        super().__init__()
        self.flags = flags
        experts = flags.experts or 1
        self.weight = empty_parameter(experts, dim)
        self.bias = empty_parameter(experts) if flags.router_bias else None
        corrected = flags.router_balance == 'bias'
        self.register_buffer('correction', torch.empty(experts) if corrected else None)
        # how often each expert was chosen since the correction has moved
        self.register_buffer('load', torch.empty(experts) if corrected else None, persistent=False)
        self.init_own()

    @torch.no_grad()
    def init_own(self) -> None:
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        for buffer in (self.correction, self.load):
            if buffer is not None:
                buffer.zero_()

    def logits(self, x: Float[Tensor, 't d']) -> Float[Tensor, 't e']:
        wide = torch.promote_types(x.dtype, torch.float32)
        with without_autocast(x):
            return F.linear(x.to(wide), self.weight.to(wide), None if self.bias is None else self.bias.to(wide))

    def forward(self, x: Float[Tensor, 't d'], tokens: Bool[Tensor, ' t'] | None = None) -> Routed:
        flags, logits = self.flags, self.logits(x)
        softmax = flags.router == 'softmax'
        log_scores = logits.log_softmax(dim=-1) if softmax else F.logsigmoid(logits)
        ranking = logits if self.correction is None else log_scores.exp() + self.correction
        chosen = ranking.topk(flags.experts_active, dim=-1).indices
        chosen_scores = log_scores.gather(-1, chosen)
        # among themselves the scores of the chosen are a softmax of their logarithms
        shares = (chosen_scores.softmax(dim=-1) if flags.router_normalize else chosen_scores.exp()) * flags.router_scale
        if not self.training:
            return Routed(chosen, shares, None)
        counted = torch.ones_like(logits[:, 0]) if tokens is None else tokens.to(logits.dtype)
        times = torch.zeros_like(logits[0]).index_add(0, chosen.flatten(), counted.repeat_interleave(chosen.shape[1]))
        self._note(times)
        return Routed(chosen, shares, self._loss(logits, log_scores, times, counted))

    def _note(self, times: Float[Tensor, ' e']) -> None:
        """A branch that runs again for its gradients counts twice, as all experts do, which changes no comparison."""
        if self.load is not None and torch.is_grad_enabled() and not transformed():
            self.load += times.detach().to(self.load.dtype)

    def _loss(
        self,
        logits: Float[Tensor, 't e'],
        log_scores: Float[Tensor, 't e'],
        times: Float[Tensor, ' e'],
        counted: Float[Tensor, ' t'],
    ) -> Float[Tensor, ''] | None:
        """Experts · Σ (share of the choices) · (mean score) of each expert, which is one in balance; and the z-loss."""
        flags, rows, parts = self.flags, counted.sum().clamp(min=1.0), []
        if flags.router_balance == 'loss' and flags.router_balance_weight > 0.0:
            scores = log_scores.exp()
            scores = scores if flags.router == 'softmax' else scores / scores.sum(dim=-1, keepdim=True).clamp(min=1e-20)
            mean = (scores * counted.unsqueeze(-1)).sum(dim=0) / rows
            share = times.detach() / (rows * flags.experts_active)
            parts.append(flags.router_balance_weight * logits.shape[-1] * (share * mean).sum())
        if flags.router_z_loss_weight > 0.0:
            squares = logits.logsumexp(dim=-1).square() * counted
            parts.append(flags.router_z_loss_weight * squares.sum() / rows)
        return sum(parts[1:], parts[0]) if parts else None

    @torch.no_grad()
    def balance_(self) -> None:
        """Raise the correction of experts that were chosen less often than the mean since the last call, lower the others'."""
        if self.correction is None or self.load is None:
            return
        load = self.load.clone()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(load)
        self.correction += self.flags.router_balance_step * torch.sign(load.mean() - load)
        self.load.zero_()


class Experts(Module):
    """The routed experts, and beside them one feed-forward that every token goes through (the shared experts), which a gate
    per token may weigh (https://arxiv.org/abs/2407.10671).

    ``first`` and ``last`` are the maps of all experts; what stands ``between`` them (activation, norm, dropout) they have in
    common. forward: (… dim), and which rows are tokens (…) -> ((… dim_out), the loss that keeps experts in balance).
    No token is dropped, however many choose the same expert.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        flags: FeedForwardFlags,
        between: nn.Module,
        shared: nn.Module | None,
        shared_gate: nn.Module | None = None,
    ) -> None:
        super().__init__()
        experts, inner = flags.experts or 1, flags.inner(dim)
        self.router = Router(dim, flags)
        first_bias = flags.glu_bias if flags.glu else not flags.no_bias
        self.first = GroupedLinear(experts, dim, inner * (2 if flags.glu else 1), first_bias)
        self.between = between
        self.last = GroupedLinear(
            experts, inner, dim_out, not flags.no_bias, zero=flags.zero_init_output, depth=flags.output_proj_depth
        )
        self.shared = shared
        self.shared_gate = shared_gate

    def forward(
        self, x: Float[Tensor, '... d'], tokens: Bool[Tensor, '...'] | None = None
    ) -> tuple[Float[Tensor, '... e'], Float[Tensor, ''] | None]:
        rows = x.reshape(-1, x.shape[-1])
        routed = self.router(rows, None if tokens is None else tokens.reshape(-1))
        run = self._on_all if transformed() or is_traced() or torch.compiler.is_exporting() else self._on_chosen
        out = run(rows, routed)
        out = out.view(*x.shape[:-1], out.shape[-1])
        if self.shared is None:
            return out, routed.loss
        shared = self.shared(x)
        return out + (shared if self.shared_gate is None else shared * self.shared_gate(x).sigmoid()), routed.loss

    def _on_chosen(self, x: Float[Tensor, 't d'], routed: Routed) -> Float[Tensor, 't e']:
        """Each expert on the tokens that have chosen it."""
        active = routed.chosen.shape[1]
        chosen = routed.chosen.flatten()
        order = chosen.argsort(stable=True)
        counts = chosen.new_zeros(self.first.weight.shape[0]).index_add(0, chosen, torch.ones_like(chosen))
        back = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
        hidden = self.between(self.first(dispatch(x, order, back, active), counts))
        out = self.last(hidden, counts)
        out = out * routed.shares.flatten().index_select(0, order).unsqueeze(-1).to(out.dtype)
        return combine(out, order, back, active)

    def _on_all(self, x: Float[Tensor, 't d'], routed: Routed) -> Float[Tensor, 't e']:
        """Every expert on every token, most of which count nothing: the same without any number that depends on the choice."""
        experts = self.first.weight.shape[0]
        weights = x.new_zeros(x.shape[0], experts, dtype=routed.shares.dtype).scatter(1, routed.chosen, routed.shares)
        hidden = self.between(self.first.of_all(x.unsqueeze(0)))
        return torch.einsum('etd,te->td', self.last.of_all(hidden), weights.to(hidden.dtype))
