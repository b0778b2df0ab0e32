"""The intermediates that a forward returns beside its output."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from x_transformers.cache.kv_cache import KVCache
from x_transformers.tensor_types import Float, Int

if TYPE_CHECKING:
    from x_transformers.attention.inputs import Intermediates


@dataclass
class LayerIntermediates:
    """Everything a stack, and the wrapper around it, can report; handed back as ``cache=`` it continues the sequence.

    - ``hiddens``: per self attention, the stream (b n d) that entered it; ``layer_hiddens``: what each branch saw;
      ``block_hiddens``: what left each executed block, the last one's being the stack's output;
    - ``last_hidden``, ``last_layer_hiddens``: the stack's output, and the part of it that belongs to tokens;
    - ``attn_intermediates``: one per executed attention, with maps that are computed when read;
    - ``exit_logits``, ``all_pred_logits``: of every step of a looped model; ``exit_indices``: the last step of each call;
      ``looped_prompt_kv_cache``: what each step has seen, where none was left out;
    - ``expert_loss``: of all layers of experts together, in training;
    - ``initial_embeds`` (also ``initial_embed``): the embeddings that entered the stack;
    - ``kv_cache``: the memory behind ``cached_kv``; ``cache_length``: how many rows have been seen.
    """

    hiddens: list[Float[Tensor, 'b n d']] | None = None
    last_hidden: Float[Tensor, 'b n d'] | None = None
    attn_intermediates: list[Intermediates] | None = None
    layer_hiddens: list[Float[Tensor, 'b n d']] | None = None
    attn_z_loss: Float[Tensor, ''] | None = None
    mems: Sequence[Float[Tensor, 'b l d']] | None = None
    last_layer_hiddens: Float[Tensor, 'b n d'] | None = None
    initial_embeds: Float[Tensor, 'b n d'] | None = None
    attn_pooled_tokens: Float[Tensor, 'b p d'] | None = None
    memory_tokens: Float[Tensor, 'b m d'] | None = None
    logit_entropies: Float[Tensor, 'b n'] | None = None
    logits: Tensor | tuple[Tensor, ...] | None = None
    block_hiddens: list[Float[Tensor, 'b n d']] | None = None
    exit_logits: list[Float[Tensor, 'b n 1']] | None = None
    all_pred_logits: list[Tensor | tuple[Tensor, ...]] | None = None
    exit_indices: Int[Tensor, 'b c'] | None = None
    looped_prompt_kv_cache: list[KVCache] | None = None
    cache_length: int = 0
    kv_cache: KVCache | None = None
    expert_loss: Float[Tensor, ''] | None = None

    @property
    def initial_embed(self) -> Float[Tensor, 'b n d'] | None:
        return self.initial_embeds

    @initial_embed.setter
    def initial_embed(self, value: Float[Tensor, 'b n d'] | None) -> None:
        self.initial_embeds = value


def with_cache(seen: LayerIntermediates, cache: KVCache) -> LayerIntermediates:
    """The same with another cache, also where attentions report theirs."""
    old = {} if seen.kv_cache is None else {id(layer): index for index, layer in seen.kv_cache.steps.items()}
    attentions = []
    for each in seen.attn_intermediates or []:
        index = None if each.cache is None else old.get(id(each.cache))
        if index is not None:
            each = copy(each)
            each.cache = cache.steps[index]
        attentions.append(each)
    return replace(seen, kv_cache=cache, cache_length=cache.length, attn_intermediates=attentions)


def get_cached_kvs(intermediates: LayerIntermediates) -> list[Any]:
    """The ``cached_kv`` of every attention, in execution order."""
    return [inter.cached_kv for inter in intermediates.attn_intermediates or []]


def self_attention_kvs(intermediates: LayerIntermediates) -> list[tuple[Tensor, Tensor | None]]:
    """The keys and values (b h n d) of the self attentions only: what may be routed into another model."""
    return [
        inter.cached_kv
        for inter in intermediates.attn_intermediates or []
        if inter.layer_type == 'a' and inter.cached_kv is not None
    ]
