"""Keys and values before a layer's own: learned memories, and those of another model. None of them has a position."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.attention.geometry import tiled_heads
from x_transformers.attention.qk_norm import unit_heads
from x_transformers.helpers import recall, remember
from x_transformers.tensor_types import Bool, Float

if TYPE_CHECKING:
    from x_transformers.attention.inputs import BranchInputs, ExtraKeys
    from x_transformers.attention.mask import Mask
    from x_transformers.attention.parts import AttentionParts
    from x_transformers.position.positions import Positions


class Fronted(NamedTuple):
    """Keys, values and mask with ``front`` more columns."""

    keys: Float[Tensor, 'b kh j d']
    values: Float[Tensor, 'b kh j e']
    mask: Mask
    front: int


def unplaced(keys: Float[Tensor, 'b kh m d'], positions: Positions | None, rotated_heads: int | None) -> Tensor:
    """Keys that have no position, as wide as those that have."""
    return keys if positions is None else positions.unplaced_keys(keys, rotated_heads)


def with_front(mask: Mask, visible: Bool[Tensor, 'b m'], behind: int) -> Mask:
    """The mask with columns in front that not all may see, then ``behind`` open ones. Made once for all layers."""
    key = ('extra', behind)
    cached: Mask | None = recall(mask.memo, key, visible)
    if cached is None:
        cached = remember(mask.memo, key, mask.having(front=F.pad(visible, (0, behind), value=True)), visible)
    return cached


def with_extra_keys(
    keys: Float[Tensor, 'b kh j d'],
    values: Float[Tensor, 'b kh j e'],
    mask: Mask,
    *,
    heads: int,
    memory: tuple[Float[Tensor, 'kh m d'], Float[Tensor, 'kh m e']] | None = None,
    extra: ExtraKeys | None = None,
    positions: Positions | None = None,
    rotated_heads: int | None = None,
) -> Fronted:
    """External keys, then memory keys, then the own ones.

    External keys with another number of heads than the own: both are repeated to all query heads, head h from head h mod their
    number.
    """
    front = 0
    if memory is not None:
        mem_k, mem_v = (t.expand(keys.shape[0], -1, -1, -1) for t in memory)
        keys = torch.cat((unplaced(mem_k, positions, rotated_heads).to(keys.dtype), keys), dim=-2)
        values = torch.cat((mem_v.to(values.dtype), values), dim=-2)
        front += mem_k.shape[-2]
    if extra is None:
        return Fronted(keys, values, mask, front)
    extra_k, extra_v = extra.keys, extra.values
    if extra_k.shape[1] != keys.shape[1]:
        keys, values, extra_k, extra_v = (tiled_heads(t, heads) for t in (keys, values, extra_k, extra_v))
    if extra.mask is not None:
        mask = with_front(mask, extra.mask, front)
    keys = torch.cat((unplaced(extra_k, positions, rotated_heads).to(keys.dtype), keys), dim=-2)
    values = torch.cat((extra_v.to(values.dtype), values), dim=-2)
    return Fronted(keys, values, mask, front + extra_k.shape[-2])


def with_keys_in_front(
    attn: AttentionParts, keys: Float[Tensor, 'b kh j d'], values: Float[Tensor, 'b kh j e'], mask: Mask, inputs: BranchInputs
) -> Fronted:
    """The same for a layer, whose memory keys have unit length over the whole head, whatever the groups of its norm."""
    memory = None
    if attn.mem_k is not None and attn.mem_v is not None:
        settings = attn.qk_norm_k_scale, attn.qk_norm_eps, attn.qk_norm_over_heads
        memory = unit_heads(attn.mem_k, 1, *settings) if attn.qk_norm else attn.mem_k, attn.mem_v
    return with_extra_keys(
        keys,
        values,
        mask,
        heads=attn.heads,
        memory=memory,
        extra=inputs.extra,
        positions=inputs.positions,
        rotated_heads=attn.rotated_heads,
    )
