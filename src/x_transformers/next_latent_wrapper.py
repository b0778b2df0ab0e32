"""A language model that also predicts its own next latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.flags.fit import check_added_losses
from x_transformers.flags.later_objectives import NextLatentOptions
from x_transformers.flags.objectives import options
from x_transformers.latent_prediction import (
    SIGREG_KWARGS,
    Discount,
    check_parameters,
    frozen_logits,
    masked_average,
    mlp,
    normalized_weights,
    rollout_inputs,
    sigreg,
)
from x_transformers.losses import token_cross_entropy
from x_transformers.module import Module
from x_transformers.tensor_types import Bool, Float, Int

LOSS_TYPES = ('smooth_l1', 'mse', 'mse_and_cosine_sim')


class Losses(NamedTuple):
    """The parts of the loss, before they are weighted."""

    ce: Tensor
    next_latent: Tensor
    kl: Tensor
    sigreg: Tensor


class ResidualDynamics(Module):
    """The next latent as a step from the present one: ``z + f([z; action])``, where f starts at zero."""

    def __init__(self, dim: int, dim_hidden: int, num_layers: int) -> None:
        super().__init__()
        widths = [2 * dim, *[dim_hidden] * (num_layers - 1), dim]
        self.net = nn.Sequential(nn.LayerNorm(2 * dim), mlp(widths, zero_last=True))

    def forward(self, latent: Float[Tensor, 'b n d'], action: Float[Tensor, 'b n d'], state: Any) -> tuple[Tensor, Any]:
        step: Tensor = self.net(torch.cat((latent, action), dim=-1))
        return latent + step, state


class GRUDynamics(Module):
    """A GRU whose hidden state is the latent and whose input is the action."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gru = nn.GRU(dim, dim, batch_first=True)

    def forward(self, latent: Float[Tensor, 'b n d'], action: Float[Tensor, 'b n d'], state: Any) -> tuple[Tensor, Any]:
        # each position is a sequence of its own, of one step
        rows, hidden = action.reshape(-1, 1, action.shape[-1]), latent.reshape(1, -1, latent.shape[-1])
        out, _ = self.gru(rows, hidden.contiguous())
        return out.reshape(latent.shape), state


class CustomDynamics(Module):
    """A network of the user's own: ``network(latent, action)``."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, latent: Float[Tensor, 'b n d'], action: Float[Tensor, 'b n d'], state: Any) -> tuple[Tensor, Any]:
        return self.network(latent, action), state


class NextLatentWrapper(Module):
    """Next-token prediction together with prediction of the next latents, https://arxiv.org/abs/2511.05963.

    From the final embedding of a position, a small network predicts the embeddings of the following positions, given their
    tokens. The loss compares them with the actual embeddings, and compares the distributions that the head computes from both.

    Args:
        net: a ``TransformerWrapper`` around a ``Decoder`` of width ``dim``.
        num_rollouts: how many positions ahead are predicted.
        loss_type: 'smooth_l1', 'mse', 'mse_and_cosine_sim' (https://arxiv.org/abs/2606.30534), or a module from
            (prediction, target) to unreduced losses.
        dynamics_type: 'residual', 'gru', or 'custom' with ``dynamics_network(latent, action) -> latent``.
        dynamics_hidden_dim, dynamics_num_layers: size of that network.
        next_latent_loss_weight, kl_loss_weight, sigreg_loss_weight: weights of the losses other than the next token's;
            ``sigreg_loss_kwargs``: keywords of the regularizer.
        rollout_weights: a weight per rollout; by default equal.
        dynamic_rollout_loss_weight: reduce the weight of rollouts after a bad prediction, more with larger
            ``dynamic_loss_decay``.
        ignore_index, pad_value: targets excluded from the loss, and the id that replaces them in the input.

    Raises:
        ValueError: parameters are out of range or do not fit the net.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        dim: int,
        num_rollouts: int = 1,
        loss_type: str | nn.Module = 'smooth_l1',
        dynamics_type: str = 'residual',
        dynamics_network: nn.Module | None = None,
        dynamics_hidden_dim: int | None = None,
        dynamics_num_layers: int = 3,
        next_latent_loss_weight: float = 1.0,
        kl_loss_weight: float = 1.0,
        ignore_index: int = -100,
        pad_value: int = 0,
        rollout_weights: Sequence[float] | None = None,
        sigreg_loss_weight: float = 0.0,
        sigreg_loss_kwargs: Mapping[str, Any] | None = None,
        dynamic_rollout_loss_weight: bool = True,
        dynamic_loss_decay: float = 1.0,
    ) -> None:
        super().__init__()
        options(NextLatentOptions, 'NextLatentWrapper', locals())
        custom = dynamics_type == 'custom'
        mixture = getattr(net, 'to_mixture', None) is not None
        check_added_losses(net, 'NextLatentWrapper', needs=('token_emb',))
        check_parameters(
            'NextLatentWrapper',
            isinstance(loss_type, str) and loss_type not in LOSS_TYPES
            and f'loss_type must be one of {", ".join(LOSS_TYPES)} or a module, got {loss_type!r}.',
            custom != (dynamics_network is not None)
            and "dynamics_network must be given with dynamics_type='custom', and only then.",
            mixture and kl_loss_weight > 0
            and 'kl_loss_weight must be 0 for a net with mixture_of_softmax, whose head does not read the embeddings alone.',
            getattr(net, 'dim', dim) != dim and f"dim must be the net's width {getattr(net, 'dim', dim)}, got {dim}.",
            getattr(net, 'emb_dim', dim) != dim and f'emb_dim of the net must be {dim}, got {getattr(net, "emb_dim", dim)}.',
        )  # fmt: skip
        self.net: Any = net
        self.token_emb: Any = net.token_emb
        self.max_seq_len = getattr(net, 'max_seq_len', 0)
        self.num_rollouts = num_rollouts
        self.loss_type = loss_type if isinstance(loss_type, str) else None
        self.loss_fn = loss_type if isinstance(loss_type, nn.Module) else None
        if dynamics_network is not None:
            self.dynamics_model: nn.Module = CustomDynamics(dynamics_network)
        elif dynamics_type == 'gru':
            self.dynamics_model = GRUDynamics(dim)
        else:
            self.dynamics_model = ResidualDynamics(dim, dynamics_hidden_dim or dim, dynamics_num_layers)
        self.next_latent_loss_weight, self.kl_loss_weight = next_latent_loss_weight, kl_loss_weight
        self.ignore_index, self.pad_value = ignore_index, pad_value
        self.rollout_weights = normalized_weights(rollout_weights, num_rollouts, 'rollout_weights')
        self.sigreg_loss_weight = sigreg_loss_weight
        self.sigreg_loss_kwargs = {**SIGREG_KWARGS, **(sigreg_loss_kwargs or {})}
        self.dynamic_rollout_loss_weight, self.dynamic_loss_decay = dynamic_rollout_loss_weight, dynamic_loss_decay

    def element_loss(self, predicted: Float[Tensor, 'b n d'], target: Float[Tensor, 'b n d']) -> Float[Tensor, 'b n']:
        """The loss of each position: a mean over channels."""
        if self.loss_fn is not None:
            loss: Tensor = self.loss_fn(predicted, target)
            each = loss.mean(dim=-1) if loss.ndim == 3 else loss
            if each.shape != predicted.shape[:-1]:
                raise ValueError(
                    f'loss_type must be a module that gives a loss for each position, {tuple(predicted.shape[:-1])}, or each '
                    f"channel, got shape {tuple(loss.shape)}. Build it with reduction='none'."
                )
            return each
        if self.loss_type == 'smooth_l1':
            return F.smooth_l1_loss(predicted, target, reduction='none').mean(dim=-1)
        squared = F.mse_loss(predicted, target, reduction='none').mean(dim=-1)
        if self.loss_type == 'mse':
            return squared
        return 0.1 * squared + 0.9 * (1.0 - F.cosine_similarity(predicted, target, dim=-1))

    def forward(self, x: Int[Tensor, 'b n'], return_loss_breakdown: bool = False, **kwargs: Any) -> Any:
        """The loss, or (loss, Losses(ce, next_latent, kl, sigreg)); further keywords go to the net.

        Raises ValueError if the sequences are too short for the rollouts.
        """
        x, inputs, valid = rollout_inputs(x, self.num_rollouts, self.ignore_index, self.pad_value)
        logits, hidden = self.net(inputs, return_logits_and_embeddings=True, **kwargs)
        is_log_prob = bool(getattr(self.net, 'output_is_log_prob', False))
        ce = token_cross_entropy(logits[:, :-1], x[:, 1:], ignore_index=self.ignore_index, is_log_prob=is_log_prob)
        next_latent, kl = self._rollout(hidden, inputs, valid)
        spread = hidden.new_zeros(())
        if self.sigreg_loss_weight > 0.0:
            spread = sigreg(hidden, valid, **self.sigreg_loss_kwargs)
        loss = ce + self.next_latent_loss_weight * next_latent + self.kl_loss_weight * kl + self.sigreg_loss_weight * spread
        return (loss, Losses(ce, next_latent, kl, spread)) if return_loss_breakdown else loss

    def _rollout(
        self, hidden: Float[Tensor, 'b n d'], ids: Int[Tensor, 'b n'], valid: Bool[Tensor, 'b n']
    ) -> tuple[Tensor, Tensor]:
        """(loss on latents, divergence of the distributions that they imply)."""
        actions = self.token_emb(ids).detach()
        target, latent, state = hidden.detach(), hidden, None
        wanted = frozen_logits(self.net, target).log_softmax(dim=-1) if self.kl_loss_weight > 0.0 else None
        discount = Discount(self.dynamic_loss_decay)
        total, divergence = hidden.new_zeros(()), hidden.new_zeros(())
        for ahead, share in enumerate(self.rollout_weights, start=1):
            latent, state = self.dynamics_model(latent[:, : hidden.shape[1] - ahead], actions[:, ahead:], state)
            loss, counts = self.element_loss(latent, target[:, ahead:]), valid[:, ahead:]
            weight = discount.weight(loss) if self.dynamic_rollout_loss_weight else torch.ones_like(loss)
            total = total + share * masked_average(weight * loss, counts)
            if wanted is not None:
                predicted = frozen_logits(self.net, latent).log_softmax(dim=-1)
                apart = F.kl_div(predicted, wanted[:, ahead:], reduction='none', log_target=True).sum(dim=-1)
                divergence = divergence + share * masked_average(weight * apart, counts)
            discount.add(loss)
        return total, divergence
