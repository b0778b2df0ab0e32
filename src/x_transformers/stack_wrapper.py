"""The base of all models around a stack: prepended rows, positions, memories, cache, and the order of a forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.cache.intermediates import LayerIntermediates
from x_transformers.embedding.before import store_kept
from x_transformers.embedding.call import (
    Memories,
    ModelArgs,
    check_added,
    check_last,
    check_prepended,
    last_positions,
    longest,
    no_padding,
    randomly_placed,
)
from x_transformers.embedding.call_rows import behind_mems, rows_of_call
from x_transformers.embedding.loop import run_rounds
from x_transformers.embedding.pooling import pooled
from x_transformers.embedding.rows import Rows, permuted_keywords
from x_transformers.embedding.token import scale_gradient
from x_transformers.embedding.values import tables_of_tokens
from x_transformers.losses import calc_z_loss
from x_transformers.optimizing import OptimizedModel
from x_transformers.returns import ReturnSpec, next_memories, scores
from x_transformers.tensor_types import Bool, Float, Shaped


@dataclass(frozen=True)
class Ends:
    """The two functions in which models around a stack differ; the first argument of each is the model.

    Args:
        embed: (model, x, call, rows) -> the new inputs as vectors (b n e) of width ``emb_dim``, without positions.
        read: (model, h, call, whole) -> what the model says at each position of h (b n d), at the last ones only if the call
            asks so; and the embeddings that this is made of, those of all positions if ``whole``.
    """

    embed: Callable[[Any, Shaped[Tensor, 'b n ...'], ModelArgs, Rows], Float[Tensor, 'b n e']]
    read: Callable[[Any, Float[Tensor, 'b ... d'], ModelArgs, bool], tuple[Any, Float[Tensor, 'b ... d']]]


class StackWrapper(OptimizedModel):
    """Inputs become vectors, go through a stack, and its output is read out.

    What differs between models is their ``ends`` and their flags; a flag that they do not have is at its default. Modules and
    numbers are made by the functions of ``embedding/build.py``.
    """

    # with a cache it is enough to be given what is new, and outputs can be had for the last positions only
    reads_new_tokens = True

    flags: Any
    dim: int
    emb_dim: int
    token_emb: Any
    # zero where ``has_absolute_positions`` is False
    pos_emb: Any
    has_absolute_positions: bool
    randomized_positions: int | None
    looped: bool
    post_emb_norm: nn.Module
    emb_dropout: nn.Module
    emb_frac_gradient: float
    project_emb: nn.Module
    cls_token: nn.Parameter | None
    num_cls_tokens: int
    memory_tokens: nn.Parameter | None
    max_mem_len: int
    # flags that make outputs of seen tokens depend on new ones, or need rows that a cache does not hold
    why_no_cache: list[str]

    def __init__(self, ends: Ends) -> None:
        super().__init__()
        self.ends = ends
        # what only models of tokens build
        self._own_token_emb = False
        self.ff_deep_embed: nn.Parameter | None = None
        self.value_embeds: nn.ModuleDict | None = None
        self.attn_pool: nn.Module | None = None
        self.later_tokens: nn.ModuleList | None = None
        self.to_next_embed_pred: nn.Module | None = None

    @torch.no_grad()
    def init_own(self) -> None:
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=0.02)
        if self.memory_tokens is not None:
            nn.init.normal_(self.memory_tokens)
        if self.ff_deep_embed is not None:
            nn.init.ones_(self.ff_deep_embed)
        if self._own_token_emb and hasattr(self.token_emb, 'init_'):
            self.token_emb.init_()

    @property
    def has_head(self) -> bool:
        """Whether the model has an output head; without one it returns the embeddings."""
        return getattr(self, 'to_logits', True) is not None

    @property
    def pools_in_place_of_logits(self) -> bool:
        """Whether tokens pooled by attention are the result."""
        return self.attn_pool is not None and not self.attn_layers.causal

    @property
    def can_cache_kv(self) -> bool:
        """Whether decoding may go on from a cache, with the modules that are there now."""
        if (known := self.__dict__.get('can_cache_kv')) is not None:
            return bool(known)
        # where tokens see later ones, what is remembered of them is out of date with every new one
        stack = self.attn_layers
        return not self.why_no_cache and bool(stack.can_cache_kv) and bool(stack.is_causal)

    @can_cache_kv.setter
    def can_cache_kv(self, value: bool) -> None:
        self.__dict__['can_cache_kv'] = value

    # ------------------------------------------------------------ forward

    def run(self, call: ModelArgs, returns: ReturnSpec) -> Any:
        """Embed what is new, put in front of it what belongs there, run the stack, take that out again, pool, read out."""
        returns.check(
            has_head=self.has_head,
            predicts_next=self.to_next_embed_pred is not None,
            predicts_later=self.later_tokens is not None,
        )
        if self.randomized_positions is not None and self.training:
            call = randomly_placed(call, self.randomized_positions)
        rows = rows_of_call(self, call)
        initial = self._embed(call, rows)
        mask = call.mask if call.lens is None else rows.before(call.lens)
        keys = rows.mask(mask, call.prepend_mask, initial.shape[0], initial.device)
        h, record = self._through_stack(initial, keys, call, rows, returns)
        record.initial_embeds = initial
        h, in_place = pooled(self, h, keys, record, returns.whole_record)
        if call.excise_prepend_embeds and call.prepend_embeds is not None and not rows.cached and self._is_sequence(h):
            h, initial = (t[:, call.prepend_embeds.shape[1] :] for t in (h, initial))
        logits, embeds = None, h
        if returns.logits(has_head=self.has_head, pooled=in_place is not None):
            logits, embeds = self.read_out(h, call, whole=returns.logits_and_embeddings)
            logits = (logits, *self._later_logits(h, call)) if returns.multi_token_logits else logits
        return returns.result(
            x=embeds,
            logits=logits,
            pooled=in_place,
            has_head=self.has_head,
            record=record,
            next_embed=lambda: (self.to_next_embed_pred(h), initial),  # type: ignore[misc]
            mems=lambda: self._next_mems(record, call),
        )

    # ------------------------------------------------------------ the steps of the forward

    def _embed(self, call: ModelArgs, rows: Rows) -> Float[Tensor, 'b n e']:
        """Embeddings of what is new, behind those that are prepended."""
        x = rows.newest(call.x, 'x')
        check_added(call, x.shape[0], self.emb_dim, self.has_absolute_positions)
        embeds = self.ends.embed(self, x, call, rows)
        if call.pos is not None and call.pos_ids is None:
            embeds = embeds + rows.newest(call.pos, 'pos', axis=call.pos.ndim - 2)
        elif self.has_absolute_positions:
            pos = call.pos_ids
            pos = pos if pos is None else rows.newest(behind_mems(pos, call.mems, rows), 'pos', axis=pos.ndim - 1)
            embeds = embeds + self.pos_emb(x, pos=pos, seq_start_pos=call.seq_start_pos, offset=rows.seen)
        if call.sum_embeds is not None:
            embeds = embeds + rows.summand(call.sum_embeds, 'sum_embeds').to(embeds.dtype)
        embeds = self.post_emb_norm(embeds)
        if call.prepend_embeds is not None:
            check_prepended(call.prepend_embeds, call.prepend_mask, embeds.shape[0], self.emb_dim)
            if not rows.cached:
                embeds = torch.cat((call.prepend_embeds.to(embeds.dtype), embeds), dim=1)
        return scale_gradient(embeds, self.emb_frac_gradient)

    def _enter(self, embeds: Float[Tensor, 'b n e']) -> Float[Tensor, 'b m d']:
        """The stack's input, cls tokens in front, without memory tokens."""
        h: Tensor = self.project_emb(self.emb_dropout(embeds))
        return h if self.cls_token is None else torch.cat((self.cls_token.to(h.dtype).expand(h.shape[0], -1, -1), h), dim=1)

    def _through_stack(
        self, x: Float[Tensor, 'b n e'], keys: Bool[Tensor, '#b m'] | None, call: ModelArgs, rows: Rows, returns: ReturnSpec
    ) -> tuple[Float[Tensor, 'b r d'], LayerIntermediates]:
        """The stack, with memory tokens among its rows; they are taken out again."""
        h = self._enter(x)
        length = h.shape[1]
        if rows.memory:
            h, keys = rows.memory.insert(self.memory_tokens, h, keys)  # type: ignore[arg-type]
        keywords = self._for_stack(keys, call, rows)
        order = rows.padding_first(call.seq_start_pos)
        if order is not None:
            h, keywords = order.permute(h), permuted_keywords(keywords, order)

        reports: dict[str, Any] = {}
        if returns.record:
            reports = {'return_hiddens': returns.whole_record or 'cache'}
        elif returns.expert_loss:
            reports = {'return_expert_loss': True}

        def run(x: Float[Tensor, 'b n d'], **changed: Any) -> tuple[Tensor, LayerIntermediates]:
            out: Any = self.attn_layers(x, **reports, **{**keywords, **changed})
            return out if reports else (out, LayerIntermediates())

        h, record = run_rounds(self, run, h, call)
        if returns.attn_z_loss:
            counts = no_padding(h, keywords.get('mask'), None if rows.cached else call.seq_start_pos)
            record.attn_z_loss = calc_z_loss(scores(record), counts, returns.z_loss_weight)
        if order is not None:
            h = order.restore(h)
        if rows.memory:
            h, record.memory_tokens = rows.memory.remove(h, length)
        if record.kv_cache is not None:
            record.kv_cache.front = rows.front
            store_kept(record.kv_cache, call, rows)
        record.last_layer_hiddens = h
        return h, record

    def _for_stack(self, keys: Bool[Tensor, 'b m'] | None, call: ModelArgs, rows: Rows) -> dict[str, Any]:
        """The stack's keywords; only those that say something."""
        keywords = {
            'mask': keys,
            'cache': call.cache,
            'mems': call.mems,
            'mem_masks': call.mem_masks,
            'pos': rows.positions(call.pos_ids),
            'seq_start_pos': call.seq_start_pos,
            **tables_of_tokens(self, call.x, rows),
            **rows.stretched(call.more, longest(call.mems) if self.attn_layers.norm_need_condition else 0),
        }
        if rows.cached:
            keywords['input_not_include_cache'] = True
        return {name: value for name, value in keywords.items() if value is not None}

    def _next_mems(self, record: LayerIntermediates, call: ModelArgs) -> Memories:
        extends = getattr(self.flags, 'extend_mems', None)
        mems = next_memories(record.hiddens or [], None if extends is False else call.mems, self.max_mem_len, call.detach_mems)
        # models that have the flag return a tuple, as upstream
        return mems if extends is None else tuple(mems)

    def _is_sequence(self, h: Float[Tensor, 'b ... d']) -> bool:
        """Whether ``h`` still has a position for each token."""
        return h.ndim == 3 and self.cls_token is None

    def read_out(self, h: Float[Tensor, 'b ... d'], call: ModelArgs, whole: bool = False) -> tuple[Any, Tensor]:
        """(what the model says, for the last positions only if so asked; the embeddings)."""
        if call.logits_last is not None:
            check_last(call.logits_last, self._is_sequence(h))
        return self.ends.read(self, h, call, whole)

    def _later_logits(self, h: Float[Tensor, 'b n d'], call: ModelArgs) -> list[Any]:
        """The logits (b n v) of each token behind the next one."""
        if call.logits_last is not None:
            check_last(call.logits_last, self._is_sequence(h))
        read = last_positions(h, call.logits_last)
        return [self.read_out(block(read), call)[0] for block in self.later_tokens or ()]
