"""A language model whose latents predict each other, with a probe for the tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.embedding.token import scale_gradient
from x_transformers.flags.fit import check_added_losses
from x_transformers.flags.later_objectives import LatentAutoregressiveOptions
from x_transformers.flags.objectives import options
from x_transformers.helpers import l2norm
from x_transformers.latent_prediction import (
    SIGREG_KWARGS,
    check_parameters,
    masked_average,
    mlp,
    normalized_weights,
    rollout_inputs,
    sigreg,
)
from x_transformers.losses import token_cross_entropy
from x_transformers.module import Module
from x_transformers.norms import RMSNorm
from x_transformers.tensor_types import Bool, Float, Int


class Losses(NamedTuple):
    """The parts of the loss, before they are weighted."""

    ce: Tensor
    l2: Tensor
    l2_no_action: Tensor
    sigreg: Tensor


def projector(dim_in: int, dim: int) -> list[nn.Module]:
    """RMS norm and three linear maps, ``2 * dim`` wide inside, with leaky rectifiers between."""
    return [RMSNorm(dim_in, unit_offset=False), *mlp([dim_in, 2 * dim, 2 * dim, dim], nn.LeakyReLU)]


class LatentAutoregressive(Module):
    """Joint-embedding prediction for language models (https://arxiv.org/abs/2511.08544, https://arxiv.org/abs/2509.14252).

    From the hidden state of a position, a predictor rolls out the embeddings of the following positions, given their tokens.
    The regularizer SIGReg prevents the embeddings from collapsing. A probe predicts the tokens; it replaces the net's head, so
    generation works as before.

    Args:
        net: a ``TransformerWrapper`` around a ``Decoder`` of width ``dim``. Its ``to_logits`` is replaced.
        sigreg_loss_weight: the weight of the regularizer; that of the prediction is ``1 - sigreg_loss_weight``.
            ``sigreg_loss_kwargs``: keywords of the regularizer.
        l2_loss_weight: weight of the prediction.
        num_rollouts, rollout_loss_weights: how many positions ahead, with a weight each.
        frac_gradient: this share of the probe's gradient reaches the net.
        predict_next_cosine_sim: predictions and targets are normalized to unit length.
        predictor_input_hiddens_index: the attention layer whose input the predictor reads; None: the final embedding.
        predict_next_embed_with_action, predict_next_embed_no_action: predictors that know the token, and that do not.
        detach_target: no gradient reaches the targets.
        ce_probe_module: a module of your own from embeddings to what the old head reads, in place of the probe's maps.
        ignore_index, pad_value: targets excluded from the loss, and the id that replaces them in the input.

    Raises:
        ValueError: parameters out of range.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        dim: int,
        sigreg_loss_weight: float = 0.05,
        l2_loss_weight: float = 1.0,
        num_rollouts: int = 1,
        rollout_loss_weights: Sequence[float] | None = None,
        sigreg_loss_kwargs: Mapping[str, Any] | None = None,
        frac_gradient: float = 0.0,
        predict_next_cosine_sim: bool = True,
        predictor_input_hiddens_index: int | None = -1,
        predict_next_embed_with_action: bool = True,
        predict_next_embed_no_action: bool = False,
        detach_target: bool = True,
        ce_probe_module: nn.Module | None = None,
        ignore_index: int = -100,
        pad_value: int = 0,
    ) -> None:
        super().__init__()
        options(LatentAutoregressiveOptions, 'LatentAutoregressive', locals())
        check_added_losses(net, 'LatentAutoregressive')
        plan = getattr(getattr(net, 'attn_layers', None), 'plan', None)
        layers = None if plan is None else [step.kind for step in plan.steps()].count('a')
        check_parameters(
            'LatentAutoregressive',
            not (predict_next_embed_with_action or predict_next_embed_no_action)
            and 'predict_next_embed_with_action or predict_next_embed_no_action must be True.',
            predictor_input_hiddens_index is not None and layers is not None
            and not -layers <= predictor_input_hiddens_index < layers
            and f'predictor_input_hiddens_index must name one of the {layers} self attentions, got '
                f'{predictor_input_hiddens_index}.',
            getattr(net, 'to_logits', None) is None and 'net must have a head, to_logits, which the probe reads into.',
        )  # fmt: skip
        model: Any = net
        self.net = model
        self.max_seq_len = getattr(net, 'max_seq_len', 0)
        probe = projector(dim, dim) if ce_probe_module is None else [ce_probe_module]
        self.net.to_logits = nn.Sequential(*probe, model.to_logits)
        self.action_emb = nn.Embedding(model.num_tokens, dim) if predict_next_embed_with_action else None
        self.to_next_embed_pred = nn.Sequential(*projector(2 * dim, dim)) if predict_next_embed_with_action else None
        self.to_next_embed_no_action_pred = nn.Sequential(*projector(dim, dim)) if predict_next_embed_no_action else None
        self.num_rollouts = num_rollouts
        self.rollout_loss_weights = rollout_loss_weights
        self.sigreg_loss_weight, self.l2_loss_weight = sigreg_loss_weight, l2_loss_weight
        self.sigreg_loss_kwargs = {**SIGREG_KWARGS, **(sigreg_loss_kwargs or {})}
        self.frac_gradient = frac_gradient
        self.predict_next_cosine_sim = predict_next_cosine_sim
        self.predictor_input_hiddens_index = predictor_input_hiddens_index
        self.detach_target = detach_target
        self.ignore_index, self.pad_value = ignore_index, pad_value
        self.shares = normalized_weights(rollout_loss_weights, num_rollouts, 'rollout_loss_weights')

    def forward(self, x: Int[Tensor, 'b n'], return_loss_breakdown: bool = False, **kwargs: Any) -> Any:
        """The loss, or (loss, Losses(ce, l2, l2_no_action, sigreg)); further keywords go to the net.

        Raises ValueError if the sequences are too short for the rollouts.
        """
        x, inputs, valid = rollout_inputs(x, self.num_rollouts, self.ignore_index, self.pad_value)
        embeds, intermediates = self.net(inputs, return_embeddings_and_intermediates=True, **kwargs)
        logits = self.net.to_logits(scale_gradient(embeds, self.frac_gradient))
        ce = token_cross_entropy(logits[:, :-1], x[:, 1:], ignore_index=self.ignore_index)
        index = self.predictor_input_hiddens_index
        start = embeds if index is None else intermediates.hiddens[index]
        l2 = l2_no_action = spread = embeds.new_zeros(())
        if self.to_next_embed_pred is not None and self.action_emb is not None:
            l2 = self._rollout(self.to_next_embed_pred, start, embeds, valid, self.action_emb(inputs))
        if self.to_next_embed_no_action_pred is not None:
            l2_no_action = self._rollout(self.to_next_embed_no_action_pred, start, embeds, valid, None)
        if self.sigreg_loss_weight > 0.0:
            spread = torch.stack([sigreg(each, valid, **self.sigreg_loss_kwargs) for each in (embeds, start)]).mean()
        weight = self.sigreg_loss_weight
        loss = ce + (1.0 - weight) * (l2 + l2_no_action) * self.l2_loss_weight + weight * spread
        return (loss, Losses(ce, l2, l2_no_action, spread)) if return_loss_breakdown else loss

    def _rollout(
        self,
        predictor: nn.Module,
        predicted: Float[Tensor, 'b n d'],
        embeds: Float[Tensor, 'b n d'],
        valid: Bool[Tensor, 'b n'],
        actions: Float[Tensor, 'b n d'] | None,
    ) -> Float[Tensor, '']:
        target = embeds.detach() if self.detach_target else embeds
        total = embeds.new_zeros(())
        for ahead, share in enumerate(self.shares, start=1):
            predicted = predicted[:, : embeds.shape[1] - ahead]
            predicted = predictor(predicted if actions is None else torch.cat((predicted, actions[:, ahead:]), dim=-1))
            pair = (predicted, target[:, ahead:])
            if self.predict_next_cosine_sim:
                pair = (l2norm(pair[0]), l2norm(pair[1]))
            total = total + share * masked_average(F.mse_loss(*pair, reduction='none'), valid[:, ahead:])
        return total
