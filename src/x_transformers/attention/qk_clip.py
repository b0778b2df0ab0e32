"""QK-clip: scale down the weights of queries and keys whose scores grow too large. https://arxiv.org/abs/2507.20534"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from x_transformers.attention.inputs import Intermediates
from x_transformers.attention.tensor_product import KeyValueFactors, OuterProducts
from x_transformers.module import spread_as
from x_transformers.tensor_types import Float

if TYPE_CHECKING:
    from x_transformers.attention.parts import AttentionParts


@torch.no_grad()
def largest_scores(scores: Sequence[Float[Tensor, 'b h i j']], has_sink: bool) -> Float[Tensor, '1 h 1 k']:
    """Per head the largest score of each call, as scores; with a sink there is a column in front that is none."""
    columns = [t[..., has_sink:].amax(dim=(0, 2, 3)) for t in scores]
    return torch.stack([columns[0], *columns] if has_sink else columns, dim=-1)[None, :, None]


def clip_attentions_(attentions: Sequence[Any], seen: Sequence[Intermediates], tau: float) -> None:
    """Clip each attention by what was ``seen`` of every run; one that ran several times once.

    Raises ValueError if their numbers differ.
    """
    if len(seen) != len(attentions):
        raise ValueError(
            f'intermediates must be those of {len(attentions)} attentions, one for each executed layer, got {len(seen)}. '
            'Pass those of a whole forward.'
        )
    scores: dict[Any, list[Tensor]] = {}
    for attention, run in zip(attentions, seen, strict=True):
        if run.pre_softmax_attn is not None:
            scores.setdefault(attention, []).append(run.pre_softmax_attn)
    for attention, runs in scores.items():
        attention.qk_clip_(largest_scores(runs, attention.flags.head_learned_sink), tau=tau)


def score_factors(scores: Float[Tensor, 'b h i j'], tau: float) -> Float[Tensor, 'h']:
    """min(tau / largest score, 1) of each head; 1 where the largest is not positive."""
    largest = scores.float().amax(dim=(0, 2, 3))
    return torch.where(largest > tau, tau / largest.clamp(min=tau), 1.0)


def split_factors(factors: Float[Tensor, 'h'], kv_heads: int) -> tuple[Float[Tensor, 'h'], Float[Tensor, 'kh']]:
    """Factors of queries and keys whose product is each head's, neither above 1. Query head h has key head h mod kv_heads."""
    keys = factors.sqrt().unflatten(0, (-1, kv_heads)).amax(dim=0)
    return factors / keys.repeat(factors.shape[0] // kv_heads), keys


def scale_rows_(weight: Float[Tensor, '(h d) ...'], factors: Float[Tensor, 'h']) -> None:
    """Times a factor per head, whose rows lie together."""
    if factors.numel():
        rows = factors.to(weight.device).repeat_interleave(weight.shape[0] // factors.numel())
        weight.mul_(spread_as(rows.unsqueeze(-1).expand(weight.shape), weight))


def clip_queries_and_keys_(attn: AttentionParts, scores: Float[Tensor, 'b h i j'] | Intermediates, tau: float) -> None:
    if isinstance(scores, Intermediates):
        maps = scores.pre_softmax_attn
        if maps is None:
            raise ValueError(
                'intermediates must hold pre_softmax_attn, got None. Run attention with return_intermediates=True.'
            )
        scores = maps
    if scores.ndim != 4 or scores.shape[1] != attn.heads:
        raise ValueError(
            f'scores must be (b, {attn.heads}, i, j), one map for each head, got shape {tuple(scores.shape)}. Pass those of '
            'a call.'
        )
    if tau <= 0:
        raise ValueError(f'tau must be positive, got {tau}')
    if attn.flags.head_learned_sink:
        # the sink's column, put in front, is no product of a query and a key
        scores = scores[..., 1:]
    if attn.shares_keys:
        # the keys are another layer's
        clip_projection_(attn.to_q, attn.to_latent_q, score_factors(scores, tau))
        return
    queries, keys = split_factors(score_factors(scores, tau), attn.kv_heads)
    through_latent = attn.flags.key_heads_from_latent
    clip_projection_(attn.to_q, attn.to_latent_q, queries)
    clip_projection_(attn.to_k, attn.to_latent_kv, keys[:through_latent])
    if attn.to_rotateable_k is not None:
        scale_rows_(attn.to_rotateable_k.weight, keys[through_latent:])
    if attn.mem_k is not None:
        factors = keys[:, None, None].to(attn.mem_k.device).expand(attn.mem_k.shape)
        attn.mem_k.mul_(spread_as(factors, attn.mem_k))


def clip_projection_(
    projection: nn.Linear | OuterProducts, latent: nn.Linear | KeyValueFactors | None, factors: Float[Tensor, 'h']
) -> None:
    """Of outer products the numbers of each head, which lie in front of the factors that ``latent`` makes."""
    if isinstance(projection, nn.Linear):
        scale_rows_(projection.weight, factors)
        if projection.bias is not None:
            scale_rows_(projection.bias.unsqueeze(-1), factors)
        return
    of_keys = latent.of_keys if isinstance(latent, KeyValueFactors) else latent
    if of_keys is not None:
        over_channels = factors.new_ones(projection.rank * projection.width)
        scale_rows_(of_keys.weight, torch.cat((factors.repeat_interleave(projection.rank), over_channels)))
