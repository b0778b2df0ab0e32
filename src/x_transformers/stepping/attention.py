"""One query through one attention: keys and values lie in a memory with room for those that follow."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.attention.gates import gate_channels, gate_heads
from x_transformers.attention.geometry import ScoreShape
from x_transformers.attention.mask import Mask
from x_transformers.attention.values import laser_in, laser_out, mix_values
from x_transformers.tensor_types import Bool, Float

if TYPE_CHECKING:
    from x_transformers.attention.attend import Attend
    from x_transformers.attention.attention import Attention
    from x_transformers.cache.kv_cache import LayerCache
    from x_transformers.position.bias import Bias
    from x_transformers.stepping.place import Place


def runs_directly(attend: Attend) -> bool:
    """Whether one call of PyTorch's attention is all there is to it."""
    needs = attend.needs
    rules = needs.weights != 'softmax' or needs.whole or needs.pointwise or needs.sink or needs.l2_distance or needs.onnxable
    return not rules and attend.backends is None


def front_rows(attn: Attention) -> int:
    """Learned keys and the zero key, which lie in front of all others."""
    return attn.num_mem_kv + attn.attend.add_zero_kv


class AttentionStep:
    """What self and cross attention have in common.

    ``keys``, ``values`` (b kh r d): the memory, front rows first. ``biased``: positions are added to the scores.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, attn: Attention, biased: bool = False) -> None:
        self.attn = attn
        self.heads, self.kv_heads = attn.heads, attn.kv_heads
        self.front = front_rows(attn)
        self.scale: float = attn.dim_head**-0.5 if attn.attend.scale is None else attn.attend.scale
        self.direct = runs_directly(attn.attend) and not biased
        self.gates_heads = attn.head_scale_params is not None or attn.to_v_head_gate is not None

    def _fronts(self, like_keys: Tensor, like_values: Tensor) -> tuple[Tensor, Tensor]:
        """Zero key and learned keys, and their values, for this batch."""
        attn, batch = self.attn, like_keys.shape[0]
        keys, values = [], []
        if attn.attend.add_zero_kv:
            keys.append(torch.zeros_like(like_keys[:, :, :1]))
            values.append(torch.zeros_like(like_values[:, :, :1]))
        memory = attn.memory()
        if memory is not None:
            keys.append(memory[0].to(like_keys.dtype).expand(batch, -1, -1, -1))
            values.append(self._stored(memory[1].to(like_values.dtype)).expand(batch, -1, -1, -1))
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)

    def _stored(self, v: Tensor) -> Tensor:
        clamp = self.attn.laser_clamp
        return v if clamp is None else laser_in(v, clamp)

    def _split(self, t: Float[Tensor, 'b 1 c'], heads: int) -> Float[Tensor, 'b h 1 d']:
        return t.view(t.shape[0], 1, heads, -1).transpose(1, 2)

    def _attend(
        self, q: Float[Tensor, 'b h 1 d'], k: Tensor, v: Tensor, mask: Tensor | None, bias: Bias | None = None
    ) -> Tensor:
        """(b h 1 e); ``mask`` (b 1 1 n)."""
        batch, kv_heads = q.shape[0], self.kv_heads
        if not self.direct:
            own = None if mask is None else mask[:, 0, 0, self.front :].expand(batch, -1)
            geometry = ScoreShape(queries=1, keys=k.shape[2], front=self.front)
            out: Tensor = self.attn.attend.run(q, k, v, mask=Mask(keys=own), geometry=geometry, bias=bias)[0]
            return out
        if kv_heads == self.heads:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        # the queries of a group are the rows of one key head: nothing is repeated
        rows = q.view(batch, self.heads // kv_heads, kv_heads, -1).transpose(1, 2)
        out = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=self.scale)
        return out.transpose(1, 2).reshape(batch, self.heads, 1, -1)

    def _finished(self, out: Float[Tensor, 'b h 1 e'], x: Tensor, own: Tensor | None) -> Float[Tensor, 'b 1 c']:
        attn = self.attn
        if attn.laser_clamp is not None:
            out = laser_out(out)
        if self.gates_heads:
            out = out if attn.head_scale_params is None else out * attn.head_scale_params
            out = gate_heads(out, x, attn.to_v_head_gate)
        merged = out.reshape(out.shape[0], 1, -1)
        if attn.to_v_gate is not None:
            merged = gate_channels(merged, x, attn.to_v_gate, attn.gate_is_silu)
        if own is not None and attn.orthogonal_copies:
            merged = attn.orthogonal_to(merged, own)
        result: Tensor = attn.to_out(merged)
        return result


class SelfStep(AttentionStep):
    """Self attention of one new token."""

    def __init__(self, attn: Attention, held: LayerCache, room: int, biased: bool, value_residual: bool) -> None:
        super().__init__(attn, biased)
        self.value_residual = value_residual
        self.rotates = False
        self.take(held, room)

    def take(self, held: LayerCache, room: int) -> None:
        """Begin with what a cache holds, in memory for ``room`` tokens."""
        k, v = held.get('k'), held.get('v')
        if k is None or v is None:
            raise ValueError('the cache holds no keys and values of this attention')
        self.rotates = held.get('angles') is not None
        shape = (*k.shape[:2], self.front + room)
        self.keys, self.values = k.new_empty((*shape, k.shape[-1])), v.new_empty((*shape, v.shape[-1]))
        self.fill(k, v)

    def fill(self, k: Float[Tensor, 'b kh n d'], v: Float[Tensor, 'b kh n e']) -> None:
        front, end = self.front, self.front + k.shape[2]
        if front:
            self.keys[:, :, :front], self.values[:, :, :front] = self._fronts(k, v)
        self.keys[:, :, front:end], self.values[:, :, front:end] = k, self._stored(v)

    def silence(self, tokens: int) -> None:
        """Zeros behind so many tokens: what is masked must still be numbers."""
        for memory in (self.keys, self.values):
            memory[:, :, self.front + tokens :] = 0.0

    def widen(self, rows: int) -> None:
        """Room for ``rows`` rows in all."""
        more = rows - self.keys.shape[2]
        self.keys, self.values = F.pad(self.keys, (0, 0, 0, more)), F.pad(self.values, (0, 0, 0, more))

    def __call__(self, x: Float[Tensor, 'b 1 d'], place: Place) -> Float[Tensor, 'b 1 c']:
        attn = self.attn
        q = attn.normed_queries(self._split(attn.to_q(x), self.heads))
        k = attn.normed_keys(self._split(attn.to_k(x), self.kv_heads))
        own = v = self._split(attn.to_v(x), self.kv_heads)
        if self.value_residual:
            v = self._mixed(x, own, place)
        v = self._stored(attn.normed_values(v))
        if self.rotates:
            q, k = self._turned(q, place), self._turned(k, place)
        keys, values = place.put(self.keys, k), place.put(self.values, v)
        out = self._attend(q, keys, values, place.mask, place.bias)
        return self._finished(out, x, own)

    def _mixed(self, x: Tensor, own: Tensor, place: Place) -> Tensor:
        first = place.first_values
        if first is None:
            place.first_values = own
            return own
        mix = self.attn.to_value_residual_mix
        return mix_values(own, first, None if mix is None else mix(x))

    def _turned(self, t: Float[Tensor, 'b h 1 d'], place: Place) -> Float[Tensor, 'b h 1 d']:
        heads = self.attn.rotated_heads
        if heads is None or heads >= t.shape[1]:
            return place.turned(t)
        still = t.shape[1] - heads
        return torch.cat((t[:, :still], place.turned(t[:, still:])), dim=1)


class CrossStep(AttentionStep):
    """Cross attention of one new token: keys and values of the context do not change."""

    mask: Bool[Tensor, 'b 1 1 n'] | None

    def __init__(self, attn: Attention, held: LayerCache, context_mask: Bool[Tensor, 'b j'] | None) -> None:
        super().__init__(attn)
        k, v = held.get('k'), held.get('v')
        if k is None or v is None:
            raise ValueError('the cache holds no keys and values of the context')
        v = self._stored(v)
        if self.front:
            front_k, front_v = self._fronts(k, v)
            k, v = torch.cat((front_k, k), dim=2), torch.cat((front_v, v), dim=2)
        self.keys, self.values = k, v
        self.mask = None if context_mask is None else F.pad(context_mask, (self.front, 0), value=True)[:, None, None]
        if self.mask is not None and k.device.type != 'cpu':
            # a context may hide all of its keys, which fused kernels elsewhere do not answer with 0
            self.direct = False

    def __call__(self, x: Float[Tensor, 'b 1 d'], place: Place) -> Float[Tensor, 'b 1 c']:
        attn = self.attn
        q = attn.normed_queries(self._split(attn.to_q(x), self.heads))
        return self._finished(self._attend(q, self.keys, self.values, self.mask), x, None)
