"""TransformerWrapper: tokens in, logits out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.cache.intermediates import LayerIntermediates
from x_transformers.cache.kv_cache import Cache, KVCache
from x_transformers.embedding.call import Call, check_prepended, ids_or_none, last_positions
from x_transformers.embedding.memory_tokens import MemoryTokens
from x_transformers.embedding.pooling import AttentionPool, average, read_cls
from x_transformers.embedding.recycle import recycle, rounds
from x_transformers.embedding.rows import Rows
from x_transformers.embedding.token import TokenEmbedding, add_named, named_tables, scale_gradient
from x_transformers.flags.base import FlagError
from x_transformers.flags.rules import check_wrapper
from x_transformers.flags.stack import StackFlags
from x_transformers.flags.wrapper import WrapperFlags
from x_transformers.heads import HeadForm, Logits, TiedHead, choose_head, mixture_modules, next_embedding_head
from x_transformers.helpers import always, default
from x_transformers.module import Module, empty_parameter
from x_transformers.norms import LayerNorm
from x_transformers.position.absolute import AbsolutePositionalEmbedding, ScaledSinusoidalEmbedding
from x_transformers.returns import Asked, next_memories
from x_transformers.tensor_types import Bool, Float, Int


class TransformerWrapper(Module):
    """A stack of attention layers with everything around it: token and position embeddings in front, logits behind.

    Its keywords are the fields of ``WrapperFlags``: ``num_tokens``, ``max_seq_len`` and ``attn_layers`` must be given.

    Raises:
        FlagError: naming every keyword that is unknown, of the wrong kind, or at odds with another or with the stack.
    """

    # with a cache it is enough to be given the new tokens, and logits can be had for the last positions only
    reads_new_tokens = True

    def __init__(self, *, num_tokens: int, max_seq_len: int, attn_layers: nn.Module, **flags: Any) -> None:
        super().__init__()
        given = {'num_tokens': num_tokens, 'max_seq_len': max_seq_len, 'attn_layers': attn_layers, **flags}
        flags_ = WrapperFlags.parse(given, where='TransformerWrapper')
        check_wrapper(flags_, stack_flags(attn_layers))
        # kept for reading; the modules live in their slots only
        self.flags = replace(flags_, attn_layers=nn.Identity(), token_emb=None, to_logits=None)
        self._build_embedding(flags_)
        self._build_pooling(flags_)
        self._build_heads(flags_)
        self.attn_layers: Any = attn_layers
        self.max_mem_len, self.shift_mem_down = flags_.max_mem_len, flags_.shift_mem_down
        self.can_cache_kv = not self._why_no_cache() and bool(attn_layers.can_cache_kv)
        self.can_cache_kv_outside_max_seq_len = not self.has_absolute_positions
        self.input_not_include_cache = flags_.input_not_include_cache
        self.init_own()

    def _build_embedding(self, flags: WrapperFlags) -> None:
        stack: Any = flags.attn_layers
        dim: int = stack.dim
        emb_dim: int = default(flags.emb_dim, dim)
        self.dim, self.emb_dim, self.num_tokens, self.max_seq_len = dim, emb_dim, flags.num_tokens, flags.max_seq_len
        self.num_cls_tokens = flags.num_cls_tokens
        self.l2norm_embed = flags.l2norm_embed
        own = flags.token_emb
        self.token_emb: Any = TokenEmbedding(emb_dim, flags.num_tokens, flags.l2norm_embed) if own is None else own
        self._own_token_emb = own is not None
        absolute = flags.use_abs_pos_emb and flags.max_seq_len > 0 and not stack.disable_abs_pos_emb
        self.has_absolute_positions = absolute
        self.pos_emb: Any
        if not absolute:
            self.pos_emb = always(0)
        elif flags.scaled_sinu_pos_emb:
            self.pos_emb = ScaledSinusoidalEmbedding(emb_dim)
        else:
            # with unit length only the direction counts, which turns quickly from a small start
            std = 1e-5 if flags.l2norm_embed else 1.0
            self.pos_emb = AbsolutePositionalEmbedding(emb_dim, flags.max_seq_len, flags.l2norm_embed, init_std=std)
        self.embeds = named_tables(flags.embed_num_tokens, emb_dim)
        self.ff_deep_embed = empty_parameter(flags.num_tokens, stack.depth, dim) if flags.ff_deep_embed else None
        self.emb_frac_gradient = flags.emb_frac_gradient
        self.post_emb_norm = LayerNorm(emb_dim) if flags.post_emb_norm else nn.Identity()
        self.emb_dropout = nn.Dropout(flags.emb_dropout)
        self.project_emb = nn.Linear(emb_dim, dim) if emb_dim != dim else nn.Identity()
        self.recycling, self.train_max_recycle_steps = flags.recycling, flags.train_max_recycle_steps
        self.recycled_proj = nn.Linear(dim, dim, bias=False) if flags.recycling else None
        self.cls_token = empty_parameter(flags.num_cls_tokens, dim) if flags.use_cls_token else None
        self.num_memory_tokens = flags.num_mem_tokens
        self.memory_tokens = empty_parameter(self.num_memory_tokens, dim) if self.num_memory_tokens else None
        self.memory_tokens_interspersed_every = flags.memory_tokens_interspersed_every

    def _build_pooling(self, flags: WrapperFlags) -> None:
        stack: Any = flags.attn_layers
        self.average_pool_embed = flags.average_pool_embed
        self.attn_pool = None
        if flags.attn_pool:
            self.attn_pool = AttentionPool(
                default(flags.dim_pooled_tokens, self.dim),
                dim_context=self.dim,
                num_pooled_tokens=flags.num_pooled_tokens,
                depth=flags.attn_pool_depth,
                heads=stack.attn_heads,
                dim_head=stack.attn_dim_head,
            )

    def _build_heads(self, flags: WrapperFlags) -> None:
        self.output_is_log_prob = flags.mixture_of_softmax
        self.to_mixture, self.combine_mixture = None, None
        if flags.mixture_of_softmax:
            self.to_mixture, self.combine_mixture = mixture_modules(self.dim, flags.mixture_of_softmax_k)
        self.head_form = HeadForm(flags.sigsoftmax_logits, flags.squeeze_out_last_dim)
        self.has_multiple_heads = flags.num_output_heads > 1
        self.to_logits = choose_head(
            self.dim,
            default(flags.logits_dim, flags.num_tokens),
            only_embed=flags.return_only_embed,
            tied_to=self.token_emb if flags.tie_embedding else None,
            count=flags.num_output_heads,
            own=flags.to_logits,
        )
        self.add_continuous_pred_head = flags.add_continuous_pred_head
        self.to_next_embed_pred = next_embedding_head(self.dim) if flags.add_continuous_pred_head else None

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

    @torch.no_grad()
    def init_(self) -> None:
        """Draw the token table anew, and that of the positions with ``l2norm_embed``."""
        if hasattr(self.token_emb, 'init_'):
            self.token_emb.init_()
        if self.l2norm_embed and isinstance(self.pos_emb, Module):
            self.pos_emb.reset_parameters()

    # ------------------------------------------------------------ for those who work on the stack or on the loss

    def attn_qk_clip_(self, intermediates: LayerIntermediates, tau: float = 100.0) -> None:
        """Shrink queries and keys whose scores exceeded ``tau`` (https://arxiv.org/abs/2507.20534)."""
        self.attn_layers.attn_qk_clip_(intermediates, tau=tau)

    def muon_parameters(self) -> list[nn.Parameter]:
        """The matrices that an optimizer for matrices should take."""
        parameters: list[nn.Parameter] = self.attn_layers.muon_parameters()
        return parameters

    @property
    def linear_head(self) -> tuple[Tensor, Tensor | None] | None:
        """(weight, bias) if the logits are one linear map of the embeddings, so that a loss needs no logits; else None."""
        pooled = self.average_pool_embed or self.cls_token is not None or self._pools_in_place_of_logits
        head = self.to_logits
        if pooled or self.to_mixture is not None or self.head_form != HeadForm():
            return None
        if type(head) is TiedHead:
            return head.weight, None
        if type(head) is nn.Linear and not head._forward_hooks and not head._forward_pre_hooks:
            return head.weight, head.bias
        return None

    @property
    def _pools_in_place_of_logits(self) -> bool:
        return self.attn_pool is not None and not self.attn_layers.causal

    # ------------------------------------------------------------ forward

    def forward(
        self,
        x: Int[Tensor, 'b n'] | None,
        return_embeddings: bool = False,
        return_logits_and_embeddings: bool = False,
        return_intermediates: bool = False,
        return_embeddings_and_intermediates: bool = False,
        return_logit_entropies: bool = False,
        return_next_embed_pred: bool = False,
        mask: Bool[Tensor, 'b n'] | None = None,
        return_mems: bool = False,
        return_attn: bool = False,
        mems: Sequence[Float[Tensor, 'b l d']] | None = None,
        mem_masks: Sequence[Bool[Tensor, 'b l']] | None = None,
        recycle_steps: int | None = None,
        pos: Tensor | None = None,
        prepend_embeds: Float[Tensor, 'b p e'] | None = None,
        prepend_mask: Bool[Tensor, 'b p'] | None = None,
        embed_ids: Mapping[str, Int[Tensor, 'b n']] | None = None,
        sum_embeds: Float[Tensor, 'b n e'] | None = None,
        return_attn_z_loss: bool = False,
        attn_z_loss_weight: float | None = None,
        seq_start_pos: Int[Tensor, ' b'] | None = None,
        cache: Cache = None,
        input_not_include_cache: bool | None = None,
        token_emb_kwargs: Mapping[str, Any] | None = None,
        to_logits_kwargs: Mapping[str, Any] | None = None,
        logits_last: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits (b n v), or what the ``return_*`` arguments ask for.

        Args:
            x: token ids; None: there are only ``prepend_embeds``.
            mask: True for tokens, False for padding.
            mems, mem_masks: memories of the last segment, one per self attention (https://arxiv.org/abs/1901.02860).
            recycle_steps: how often the output is fed back, with ``recycling``.
            pos: positions of the tokens, (n,) or (b n); of floating dtype: their position embeddings themselves.
            prepend_embeds, prepend_mask: embeddings in front of the tokens; outputs for them are returned as well.
            embed_ids: ids for each table of ``embed_num_tokens``; ``sum_embeds``: embeddings to be added.
            attn_z_loss_weight: unless given, that of the constructor.
            seq_start_pos: where each row's tokens begin, for prompts that are padded on the left.
            cache: a ``KVCache``, or the intermediates of an earlier call. Then ``x`` may be the new tokens only, or the whole
                sequence, whose unseen tail is taken; ``input_not_include_cache=True`` says that all of it is new.
            logits_last: logits for the last so many positions only.
            kwargs: handed on to the stack: ``context``, ``context_mask``, ``attn_mask``, ``condition``, ...

        Returns:
            The first that applies of: (logits, embeddings); (embeddings, intermediates); embeddings; attention-pooled tokens;
            logits. Then, wrapped around it: next-embedding prediction, memories, intermediates, attention maps.
        """
        asked = Asked(
            embeddings=return_embeddings,
            logits_and_embeddings=return_logits_and_embeddings,
            intermediates=return_intermediates,
            embeddings_and_intermediates=return_embeddings_and_intermediates,
            logit_entropies=return_logit_entropies,
            next_embed_pred=return_next_embed_pred,
            mems=return_mems,
            attn=return_attn,
            attn_z_loss=return_attn_z_loss,
            z_loss_weight=default(attn_z_loss_weight, self.flags.attn_z_loss_weight),
        )
        call = Call(
            x=ids_or_none(x, prepend_embeds),
            mask=mask,
            mems=self._mems(mems),
            mem_masks=mem_masks,
            recycle_steps=recycle_steps,
            pos=pos,
            prepend_embeds=prepend_embeds,
            prepend_mask=prepend_mask,
            embed_ids=embed_ids or {},
            sum_embeds=sum_embeds,
            seq_start_pos=seq_start_pos,
            cache=KVCache.of(cache),
            new_only=default(input_not_include_cache, self.input_not_include_cache),
            cache_age=kwargs.pop('cache_age', None),
            token_emb_kwargs=token_emb_kwargs or {},
            to_logits_kwargs=to_logits_kwargs or {},
            logits_last=logits_last,
            more=kwargs,
        )
        return self.run(call, asked)

    def run(self, call: Call, asked: Asked) -> Any:
        """Embed the new tokens, put what belongs in front of them, run the stack, take that out again, pool, read out."""
        has_head = self.to_logits is not None
        asked.check(has_head=has_head, predicts_next=self.to_next_embed_pred is not None)
        rows = self._rows(call)
        initial = self._embed(call, rows)
        keys = rows.mask(call.mask, call.prepend_mask, initial.shape[0], initial.device)
        h, record = self._through_stack(initial, keys, call, rows, asked)
        record.initial_embeds = initial
        h, pooled = self._pool(h, keys, record, asked)
        logits, embeds = None, h
        if asked.logits(has_head=has_head, pooled=pooled is not None):
            logits, embeds = self._logits(h, call, whole=asked.logits_and_embeddings)
        return asked.answer(
            x=embeds,
            logits=logits,
            pooled=pooled,
            has_head=has_head,
            record=record,
            next_embed=lambda: (self.to_next_embed_pred(h), initial),  # type: ignore[misc]
            mems=lambda: next_memories(record.hiddens or [], call.mems, self.max_mem_len),
        )

    # ------------------------------------------------------------ the rooms of the forward

    def _why_no_cache(self) -> list[str]:
        """What makes the outputs of seen tokens depend on new ones, or needs rows that a cache does not hold."""
        reasons = {
            'num_memory_tokens': self.num_memory_tokens > 0,
            'recycling': self.recycling,
            'use_cls_token': self.cls_token is not None,
            'average_pool_embed': self.average_pool_embed,
        }
        return [name for name, is_so in reasons.items() if is_so]

    def _rows(self, call: Call) -> Rows:
        front = 0 if self.cls_token is None else self.num_cls_tokens
        if call.prepend_embeds is not None:
            front += call.prepend_embeds.shape[1]
        memory = MemoryTokens(self.num_memory_tokens, self.memory_tokens_interspersed_every)
        given = call.x.shape[1]
        rows = Rows.lay(given, front, call.cache, new_only=call.new_only, cache_age=call.cache_age, memory=memory)
        if rows.cached and (reasons := self._why_no_cache()):
            raise ValueError(
                f'cache: a model with {", ".join(reasons)} cannot go on from a cache; give the whole sequence instead.'
            )
        if memory.every and call.seq_start_pos is not None:
            raise ValueError(
                'seq_start_pos with memory_tokens_interspersed_every: padding on the left would move the windows that the '
                'memory tokens stand in; run prompts of different lengths one by one.'
            )
        if (
            isinstance(self.pos_emb, AbsolutePositionalEmbedding)
            and call.pos is None
            and rows.seen + rows.new > self.max_seq_len
        ):
            raise ValueError(
                f'x: the sequence of {rows.seen + rows.new} tokens is longer than max_seq_len={self.max_seq_len}, '
                'beyond which there are no absolute positions; cut it, or use rotary_pos_emb=True.'
            )
        return rows

    def _embed(self, call: Call, rows: Rows) -> Float[Tensor, 'b n e']:
        """Embeddings of the new tokens, behind those that are prepended."""
        x = rows.newest(call.x, 'x')
        embeds: Tensor = self.token_emb(x, **call.token_emb_kwargs)
        if call.pos is not None and call.pos_ids is None:
            embeds = embeds + rows.newest(call.pos, 'pos', axis=call.pos.ndim - 2)
        elif self.has_absolute_positions:
            pos = call.pos_ids
            pos = pos if pos is None else rows.newest(pos, 'pos', axis=pos.ndim - 1)
            embeds = embeds + self.pos_emb(x, pos=pos, seq_start_pos=call.seq_start_pos, offset=rows.seen)
        embeds = add_named(embeds, self.embeds, call.embed_ids, rows.summand)
        if call.sum_embeds is not None:
            embeds = embeds + rows.summand(call.sum_embeds, 'sum_embeds')
        embeds = self.post_emb_norm(embeds)
        if call.prepend_embeds is not None:
            check_prepended(call.prepend_embeds, call.prepend_mask, embeds.shape[0], self.emb_dim)
            if not rows.cached:
                embeds = torch.cat((call.prepend_embeds.to(embeds.dtype), embeds), dim=1)
        return scale_gradient(embeds, self.emb_frac_gradient)

    def _through_stack(
        self, embeds: Float[Tensor, 'b n e'], keys: Bool[Tensor, 'b m'] | None, call: Call, rows: Rows, asked: Asked
    ) -> tuple[Float[Tensor, 'b n d'], LayerIntermediates]:
        """The stack, with cls and memory tokens in front; memory tokens are taken out again."""
        h = self.project_emb(self.emb_dropout(embeds))
        if self.cls_token is not None:
            h = torch.cat((self.cls_token.to(h.dtype).expand(h.shape[0], -1, -1), h), dim=1)
        length = h.shape[1]
        if rows.memory:
            h, keys = rows.memory.insert(self.memory_tokens, h, keys)  # type: ignore[arg-type]
        given = self._for_stack(keys, call, rows)

        def run(x: Tensor) -> tuple[Tensor, LayerIntermediates]:
            if asked.record:
                out: tuple[Tensor, LayerIntermediates] = self.attn_layers(x, return_hiddens=True, **given)
                return out
            return self.attn_layers(x, **given), LayerIntermediates()

        longest = self.train_max_recycle_steps
        steps = rounds(call.recycle_steps, recycling=self.recycling, training=self.training, longest=longest)
        h, record = recycle(run, h, self.recycled_proj, steps)
        if rows.memory:
            h, record.memory_tokens = rows.memory.remove(h, length)
        if record.kv_cache is not None:
            record.kv_cache.front = rows.front
        record.last_layer_hiddens = h
        return h, record

    def _for_stack(self, keys: Bool[Tensor, 'b m'] | None, call: Call, rows: Rows) -> dict[str, Any]:
        """The stack's keywords; only those that say something."""
        given = {
            'mask': keys,
            'cache': call.cache,
            'mems': call.mems,
            'mem_masks': call.mem_masks,
            'pos': rows.positions(call.pos_ids, call.seq_start_pos),
            'seq_start_pos': call.seq_start_pos,
            **rows.stretched(call.more),
        }
        if rows.cached:
            given['input_not_include_cache'] = True
        if call.seq_start_pos is not None and rows.front_keys:
            given['front_tokens'] = rows.front_keys
        if self.ff_deep_embed is not None and not self.recycling:
            given['deep_embeds_and_ids'] = self._deep_embeds(call, rows)
        return {name: value for name, value in given.items() if value is not None}

    def _deep_embeds(self, call: Call, rows: Rows) -> tuple[Float[Tensor, 'v l d'], Int[Tensor, 'b n']]:
        """(a factor per token, layer and channel; ids of all rows). Rows that are no tokens have the factor one."""
        ids = rows.newest(call.x, 'x').long()
        table: Any = self.ff_deep_embed
        if rows.cached or not rows.front_keys:
            return table, ids
        return torch.cat((table, torch.ones_like(table[:1]))), rows.token_ids(ids, self.num_tokens)

    def _mems(self, mems: Sequence[Float[Tensor, 'b l d']] | None) -> Sequence[Float[Tensor, 'b l d']] | None:
        """Memories as the layers see them: moved down by ``shift_mem_down``; None if there is nothing in them."""
        if mems is None or not any(mem.shape[1] for mem in mems):
            return None
        shift = self.shift_mem_down
        return [*mems[shift:], *mems[:shift]]

    def _pool(
        self, h: Float[Tensor, 'b n d'], keys: Bool[Tensor, 'b m'] | None, record: LayerIntermediates, asked: Asked
    ) -> tuple[Tensor, Tensor | None]:
        """(what logits are made of, what is returned in their place)."""
        mask = None if keys is None else keys[:, keys.shape[1] - h.shape[1] :]
        if self.average_pool_embed:
            return average(h, mask), None
        if self.cls_token is not None:
            h, record.last_layer_hiddens = read_cls(h, self.num_cls_tokens)
            return h, None
        if self.attn_pool is None or not (self._pools_in_place_of_logits or asked.record):
            return h, None
        record.attn_pooled_tokens = self.attn_pool(h, mask)
        return h, record.attn_pooled_tokens if self._pools_in_place_of_logits else None

    def _logits(self, h: Tensor, call: Call, whole: bool) -> tuple[Logits, Tensor]:
        """(logits, embeddings they were made of: with a mixture its vectors (b n k d))."""
        if call.logits_last is not None:
            if h.ndim != 3 or self.cls_token is not None:
                raise ValueError(f'logits_last={call.logits_last}: the logits of this model are those of pooled tokens.')
            if call.logits_last < 1:
                raise ValueError(f'logits_last is {call.logits_last}; at least the last position must be read.')
        embeds = last_positions(h, None if whole else call.logits_last)
        weights = None if self.combine_mixture is None else self.combine_mixture(embeds)
        embeds = embeds if self.to_mixture is None else self.to_mixture(embeds)
        read = last_positions(embeds, call.logits_last)
        weights = None if weights is None else last_positions(weights, call.logits_last)
        return self.head_form(self.to_logits, read, weights, call.to_logits_kwargs), embeds  # type: ignore[arg-type]


def stack_flags(stack: nn.Module) -> StackFlags:
    flags = getattr(stack, 'flags', None)
    if not isinstance(flags, StackFlags):
        raise FlagError(
            'attn_layers must be a stack made of AttentionLayers (Encoder, Decoder, PrefixDecoder, CrossAttender or a '
            f'subclass), got {type(stack).__name__}.'
        )
    return flags
