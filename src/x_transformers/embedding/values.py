"""Value embeddings: a gated row of a separate table, added to a token's values in some attention layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from x_transformers.embedding.rows import Rows
from x_transformers.module import ConstantLinear, Module
from x_transformers.position.absolute import Table, look_up
from x_transformers.tensor_types import Float, Int

if TYPE_CHECKING:
    from x_transformers.flags.wrapper import WrapperFlags


class ValueEmbed(Module):
    """``2 σ(w_h · x[:c]) * E[token]`` for each key head h, from modded-nanogpt (https://github.com/KellerJordan/modded-nanogpt).

    forward: what the values are made of (b n d) and token ids (b n), -1 for rows that are no tokens -> (b kh n e).
    ``gate_dim`` is c: so many channels decide. The gate starts at 1.
    """

    def __init__(self, num_tokens: int, dim: int, heads: int, value_dim: int, gate_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.gate_dim = min(gate_dim, dim)
        self.table = Table(num_tokens, heads * value_dim, std=dim**-0.5)
        self.to_gate = ConstantLinear(self.gate_dim, heads, bias=False)

    def forward(self, x: Float[Tensor, 'b n d'], ids: Int[Tensor, 'b n']) -> Float[Tensor, 'b kh n e']:
        vectors = look_up(self.table, ids.clamp(min=0), 'token ids').masked_fill((ids < 0).unsqueeze(-1), 0.0)
        gates = 2.0 * self.to_gate(x[..., : self.gate_dim]).sigmoid()
        out: Tensor = vectors.unflatten(-1, (self.heads, -1)) * gates.unsqueeze(-1)
        return out.transpose(1, 2)


class TokenValues(NamedTuple):
    """What one attention adds to its values: of these tokens."""

    module: Callable[[Tensor, Tensor], Tensor]
    ids: Int[Tensor, 'b n']


def value_tables(flags: WrapperFlags, stack: Any) -> nn.ModuleDict | None:
    """One for every ``value_embed``-th self attention that makes values, counted from the last, by the number of its layer."""
    if flags.value_embed is None:
        return None
    layers = [layer.index for layer in stack.plan.layers if layer.kind == 'a' and layer.keys_from is None]
    tables = {}
    for index in layers[::-1][:: flags.value_embed][::-1]:
        own = stack.flags.layer(index).attention
        tables[str(index)] = ValueEmbed(
            flags.num_tokens, stack.dim, own.num_kv_heads, own.value_dim, flags.value_embed_gate_dim
        )
    return nn.ModuleDict(tables)


def of_layer(pair: tuple[Mapping[str, nn.Module], Int[Tensor, 'b n']] | None, layer: int) -> TokenValues | None:
    """What the attention in this layer adds, if it adds anything."""
    if pair is None or str(layer) not in pair[0]:
        return None
    return TokenValues(pair[0][str(layer)], pair[1])


def factors_of_tokens(
    table: Float[Tensor, 'v l d'], ids: Int[Tensor, 'b n'], rows: Rows
) -> tuple[Float[Tensor, 'v l d'], Int[Tensor, 'b n']]:
    """(a factor per token, layer and channel; ids of all rows). Rows that are no tokens have the factor one."""
    if rows.cached or not rows.front_keys:
        return table, ids
    return torch.cat((table, torch.ones_like(table[:1]))), rows.token_ids(ids, len(table))


def tables_of_tokens(model: Any, x: Int[Tensor, 'b n'], rows: Rows) -> dict[str, Any]:
    """The stack's keywords that hold a model's tables, with the ids to look up."""
    kwargs: dict[str, Any] = {}
    if model.ff_deep_embed is None and model.value_embeds is None:
        return kwargs
    ids = rows.newest(x, 'x').long()
    if model.ff_deep_embed is not None:
        kwargs['deep_embeds_and_ids'] = factors_of_tokens(model.ff_deep_embed, ids, rows)
    if model.value_embeds is not None:
        kwargs['value_embeds_and_ids'] = model.value_embeds, rows.token_ids(ids, -1) if rows.front_keys else ids
    return kwargs
