"""Attention that reuses the keys and values of an earlier layer, https://arxiv.org/abs/2405.12981."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.attention.attention import Attention
from x_transformers.attention.inputs import BranchInputs, Intermediates
from x_transformers.attention.parts import AttentionParts, Seen
from x_transformers.attention.project import KeysValues
from x_transformers.attention.qk_clip import clip_projection_, score_factors
from x_transformers.flags.attention import AttentionFlags
from x_transformers.tensor_types import Float


class SharingAttention(Attention):
    """Attention over the keys and values of the layer that ``BranchInputs.shared`` comes from, normed and placed there.

    It has no projection of keys and values, and its cache holds neither. Learned memory keys are its own.
    """

    def _build(self, dim: int, flags: AttentionFlags) -> None:
        super()._build(dim, flags)
        self._keys_values = shared_keys_values

    def _parts(self) -> dict[str, Any]:
        parts = super()._parts()
        parts |= dict.fromkeys(('to_latent_kv', 'to_rotateable_k', 'to_k', 'to_v', 'to_value_residual_mix'))
        parts['k_rmsnorm'] = parts['value_rmsnorm'] = None
        if parts['mem_k'] is None:
            parts['qk_norm_k_scale'] = None
        if parts['convolutions'] is not None:
            del parts['convolutions']['k'], parts['convolutions']['v']
        return parts

    def _attended(self, x: Float[Tensor, '... n d'], inputs: BranchInputs) -> tuple[Float[Tensor, 'b n c'], Intermediates]:
        if inputs.shared is None:
            raise ValueError(
                'shared is missing: this layer attends over the keys of an earlier one, which must run before it. '
                'Run the layers in their order.'
            )
        return super()._attended(x, inputs.having(mask=inputs.shared.mask))

    def muon_parameters(self) -> Iterator[nn.Parameter]:
        return self.to_out.parameters()

    @torch.no_grad()
    def qk_clip_(self, pre_softmax_attn: Float[Tensor, 'b h i j'] | Intermediates, tau: float = 100.0) -> None:
        """As in ``Attention``, by the queries alone: the keys are another layer's."""
        scores = pre_softmax_attn.pre_softmax_attn if isinstance(pre_softmax_attn, Intermediates) else pre_softmax_attn
        if scores is None or scores.ndim != 4 or scores.shape[1] != self.heads or tau <= 0:
            raise ValueError(f'qk_clip_ must be given scores (b, {self.heads}, i, j) and a tau above 0. Give those of a call.')
        factors = score_factors(scores[..., self.flags.head_learned_sink :], tau)
        clip_projection_(self.to_q, self.to_latent_q, factors)


def shared_keys_values(attn: AttentionParts, seen: Seen, given: BranchInputs) -> KeysValues:
    handed: Any = given.shared
    return KeysValues(handed.keys, handed.values, handed.own)
