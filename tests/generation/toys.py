"""Tiny nets that obey the contract of generation, in loop-free but plain formulas."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.cache.intermediates import LayerIntermediates
from x_transformers.cache.kv_cache import KVCache


class Toy(nn.Module):
    """One causal attention with a linear distance penalty: a windowed cache equals a recomputed window exactly.

    Reads new tokens alone (``input_not_include_cache``, ``logits_last``), as the wrappers of the package do.
    """

    has_multiple_heads = False
    output_is_log_prob = False

    def __init__(self, vocabulary: int = 7, dim: int = 8, limit: int = 32, absolute: bool = False, seed: int = 1) -> None:
        super().__init__()
        made = torch.Generator().manual_seed(seed)

        def table(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=made))

        self.num_tokens, self.max_seq_len = vocabulary, limit
        self.emb, self.places = table(vocabulary, dim), table(limit + 1, dim)
        self.q, self.k, self.v, self.out = table(dim, dim), table(dim, dim), table(dim, dim), table(dim, vocabulary)
        self.absolute = absolute
        self.can_cache_kv = True
        self.can_cache_kv_outside_max_seq_len = not absolute
        self.dropout = nn.Dropout(0.5)
        self.fed: list[int] = []

    def embed(self, x: Tensor, first: int, start: Tensor | None, given: dict[str, Any]) -> Tensor:
        e = self.emb[x]
        if given.get('sum_embeds') is not None:
            e = e + given['sum_embeds']
        if self.absolute:
            place = torch.arange(first, first + x.shape[1])
            if start is not None:
                place = (place - start[:, None]).clamp(min=0)
            e = e + self.places[place]
        return e

    def attend(self, h: Tensor, k: Tensor, v: Tensor, start: Tensor | None, given: dict[str, Any], evicted: int = 0) -> Tensor:
        i, j = h.shape[1], k.shape[-2]
        scores = torch.einsum('bid,bhjd->bij', h @ self.q, k) / 8
        ahead = torch.arange(j)[None] - torch.arange(j - i, j)[:, None]
        scores = scores + 0.3 * ahead
        visible = (ahead <= 0).expand(h.shape[0], i, j)
        if start is not None:
            visible = visible & (torch.arange(j) + evicted >= start[:, None])[:, None]
        if given.get('mask') is not None:
            assert given['mask'].shape[-1] == j, (given['mask'].shape, j)
            visible = visible & given['mask'][:, None]
        attn = scores.masked_fill(~visible, -1e9).softmax(-1)
        out = torch.einsum('bij,bhjd->bid', attn, v) - 0.5 * h
        if given.get('context') is not None:
            out = out + given['context'].mean(1, keepdim=True)
        return self.dropout(nn.functional.layer_norm(out, out.shape[-1:])) @ self.out * 0.5

    def forward(
        self,
        x: Tensor,
        return_intermediates: bool = False,
        cache: Any = None,
        input_not_include_cache: bool = False,
        logits_last: int | None = None,
        seq_start_pos: Tensor | None = None,
        prepend_embeds: Tensor | None = None,
        **given: Any,
    ) -> Any:
        self.fed.append(x.shape[1])
        past = KVCache.of(cache)
        past = KVCache() if past is None else past.fork()
        h = self.embed(x, past.length - past.front, seq_start_pos, given)
        if prepend_embeds is not None:
            assert past.length == 0
            past.front = prepend_embeds.shape[1]
            h = torch.cat((prepend_embeds, h), 1)
        k, v = past.step(0).extend(k=(h @ self.k)[:, None], v=(h @ self.v)[:, None])
        past.advance(h.shape[1])
        logits = self.attend(h, k, v, seq_start_pos, given, evicted=past.length - past.retained)
        if logits_last is not None:
            logits = logits[:, -logits_last:]
        return (logits, LayerIntermediates(kv_cache=past, cache_length=past.length)) if return_intermediates else logits


class OldToy(nn.Module):
    """The same net by the older contract: always given the whole window, it processes the newest token if it has a cache."""

    def __init__(self, toy: Toy) -> None:
        super().__init__()
        self.toy = toy
        self.fed: list[int] = []
        for name in ('num_tokens', 'max_seq_len', 'can_cache_kv', 'can_cache_kv_outside_max_seq_len'):
            setattr(self, name, getattr(toy, name))

    def forward(self, x: Tensor, return_intermediates: bool = False, cache: Any = None, **given: Any) -> Any:
        toy, start = self.toy, given.get('seq_start_pos')
        h = toy.embed(x, 0, start, given)
        if cache is not None:
            h = h[:, -1:]
        self.fed.append(h.shape[1])
        k, v = (h @ toy.k)[:, None], (h @ toy.v)[:, None]
        if cache is not None:
            past = cache.attn_intermediates[0].cached_kv
            k, v = torch.cat((past[0], k), -2), torch.cat((past[1], v), -2)
        logits = toy.attend(h, k, v, start, given)
        inter = LayerIntermediates(attn_intermediates=[SimpleNamespace(layer_type='a', cached_kv=(k, v))])
        return (logits, inter) if return_intermediates else logits


def greedy(toy: Toy, ids: list[int], steps: int, limit: int | None = None, **given: Any) -> list[int]:
    """Plain greedy decoding of one sequence, recomputing everything."""
    out = list(ids)
    with torch.no_grad():
        for _ in range(steps):
            window = out if limit is None else out[-limit:]
            out.append(int(toy.eval()(torch.tensor([window]), **given)[0, -1].argmax()))
    return out[len(ids) :]
