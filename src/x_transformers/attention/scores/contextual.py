"""Scores that depend on the other scores of their row or column: CoPE, selective attention."""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.attention.geometry import ScoreShape
from x_transformers.attention.mask import Mask
from x_transformers.attention.scores.base import Form, ScoreRule, ScoreState
from x_transformers.attention.scores.talking_heads import kept_finite, mix_heads
from x_transformers.flags.scores import ScoreFlags
from x_transformers.helpers import max_neg_value
from x_transformers.module import Module, empty_parameter
from x_transformers.tensor_types import Bool, Float


class HeadConvolution(nn.Conv2d):
    """A 1x1 convolution over heads with the usual random start."""

    def __init__(self, heads: int) -> None:
        super().__init__(heads, heads, 1, bias=False)

    def forward(self, input: Float[Tensor, 'b h i j']) -> Tensor:
        return mix_heads(self.weight, input)


class CoPE(Module):
    """Contextual position encoding: the position of a key is how many keys behind it the query lets count.

    https://arxiv.org/abs/2405.18719, appendix B. ``soft_onehot`` spreads a fractional position over all positions, by
    softmax(-distance / temperature), instead of interpolating between its two neighbours; ``talking_heads`` mixes the scores
    of all heads before they are counted.
    """

    positions: Tensor

    def __init__(
        self,
        dim: int,
        heads: int,
        max_pos: int,
        soft_onehot: bool = False,
        talking_heads: bool = False,
        soft_onehot_temp: float = 5e-2,
    ) -> None:
        super().__init__()
        self.max_pos = max_pos
        self.pos_emb = empty_parameter(max_pos, dim)
        self.talking_heads = HeadConvolution(heads) if talking_heads else None
        self.soft_onehot = soft_onehot
        self.soft_onehot_temp = soft_onehot_temp
        if soft_onehot:
            self.register_buffer('positions', torch.empty(max_pos))
        self.init_own()

    @torch.no_grad()
    def init_own(self) -> None:
        nn.init.zeros_(self.pos_emb)
        if self.soft_onehot:
            self.positions.copy_(torch.arange(self.max_pos))

    def forward(
        self,
        query: Float[Tensor, 'b h i d'],
        attn_logits: Float[Tensor, 'b h i j'],
        allowed: Bool[Tensor, '#b #h i j'] | None = None,
    ) -> Float[Tensor, 'b h i j']:
        """What is added to the scores. ``allowed`` says which keys count; without it those that are not in the future."""
        counted = attn_logits
        if self.talking_heads is not None:
            if allowed is None:
                allowed = Mask(causal=True).rendered(ScoreShape(*attn_logits.shape[-2:]), attn_logits.device)
            counted = self.talking_heads(kept_finite(counted))
            if allowed is not None:
                counted = counted.masked_fill(~allowed, max_neg_value(counted))
        position = counted.sigmoid().flip(-1).cumsum(dim=-1).flip(-1).clamp(max=self.max_pos - 1)
        by_position = query @ self.pos_emb.to(query.dtype).t()
        return self.soft(by_position, position) if self.soft_onehot else self.interpolated(by_position, position)

    def interpolated(
        self, by_position: Float[Tensor, 'b h i p'], position: Float[Tensor, 'b h i j']
    ) -> Float[Tensor, 'b h i j']:
        below, above = position.floor(), position.ceil()
        at_below, at_above = by_position.gather(-1, below.long()), by_position.gather(-1, above.long())
        return at_below.lerp(at_above, (position - below).to(at_below.dtype))

    def soft(self, by_position: Float[Tensor, 'b h i p'], position: Float[Tensor, 'b h i j']) -> Float[Tensor, 'b h i j']:
        distance = (position[..., None] - self.positions).abs()
        share = (-distance / self.soft_onehot_temp).softmax(dim=-1)
        return (share.to(by_position.dtype) @ by_position[..., None]).squeeze(-1)


class AddContextualPositions(ScoreRule):
    """CoPE on the masked scores."""

    name = 'use_cope'
    form = Form.WHOLE
    unfused = 'positions are counted from the scores'

    def __init__(self, cope: nn.Module) -> None:
        self.cope = cope

    @classmethod
    def is_on(cls, flags: ScoreFlags) -> bool:
        return bool(getattr(flags, 'use_cope', False)) or getattr(flags, 'cope', None) is not None

    @classmethod
    def parts(cls, flags: ScoreFlags) -> dict[str, nn.Module | nn.Parameter | None]:
        return {'cope': getattr(flags, 'cope', None)}

    @classmethod
    def from_flags(cls, flags: ScoreFlags, parts: Any) -> Self | None:
        return None if parts.cope is None else cls(parts.cope)

    def apply(self, state: ScoreState) -> None:
        added = (
            self.cope(state.q, state.scores, state.allowed) if isinstance(self.cope, CoPE) else self.cope(state.q, state.scores)
        )
        state.scores = state.scores + added


def selective_attn(
    sim: Float[Tensor, 'b h i j'],
    sim_head_gate: Float[Tensor, 'b i j'] | None = None,
    no_mask_sos: bool = True,
    tokens: Bool[Tensor, 'b i'] | None = None,
) -> Float[Tensor, 'b h i j']:
    """Scores less what earlier queries decided to forget of each key, https://arxiv.org/abs/2410.02703.

    A query's decisions are the positive scores of head 0 (or of ``sim_head_gate``), masked before. It never hides itself, nor
    keys in front of the sequence, nor, with ``no_mask_sos``, the first token. ``tokens`` says which queries are no padding:
    padding decides nothing, and the first token is the first that is none.
    """
    gate = (sim[:, 0] if sim_head_gate is None else sim_head_gate).relu()
    queries, keys = gate.shape[-2:]
    first = keys - queries
    key = torch.arange(keys, device=sim.device)
    query = torch.arange(first, keys, device=sim.device)[:, None]
    # of equal numbers argmax takes the first
    sos = first if tokens is None else first + tokens.long().argmax(dim=-1)[:, None, None]
    may_hide = (key > sos if no_mask_sos else key >= first) & (key != query)
    if tokens is not None:
        may_hide = may_hide & tokens[:, :, None]
    forgotten = F.pad(gate.masked_fill(~may_hide, 0.0), (0, 0, 1, -1)).cumsum(dim=-2)
    return sim - forgotten[:, None]


class Forget(ScoreRule):
    """Selective attention."""

    name = 'selective'
    form = Form.WHOLE
    unfused = 'what earlier rows see changes the scores of later rows'

    def apply(self, state: ScoreState) -> None:
        seen = state.mask.keys
        state.scores = selective_attn(state.scores, tokens=None if seen is None else seen[:, -state.geometry.queries :])
