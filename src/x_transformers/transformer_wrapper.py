"""TransformerWrapper: tokens in, logits out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from x_transformers.cache.kv_cache import Cache
from x_transformers.embedding.before import BigramHash, Smear, one_before
from x_transformers.embedding.build import build_embedding, build_heads, build_pooling, build_stack, stack_flags
from x_transformers.embedding.call import ARGUMENTS, ModelArgs, call_of, check_projected, ids_or_none, last_positions
from x_transformers.embedding.loop import OF_LOOPS, LoopCall
from x_transformers.embedding.rows import Rows
from x_transformers.embedding.token import TokenEmbedding, add_named
from x_transformers.flags.constructors import only
from x_transformers.flags.rules import check_wrapper
from x_transformers.flags.signature import ClassSignature, with_arguments
from x_transformers.flags.wrapper import WrapperFlags
from x_transformers.heads import HeadForm, HeadLogits, LinearHead, gives_loss
from x_transformers.helpers import default
from x_transformers.layers.arguments import StackArgs, argument_sentences
from x_transformers.layers.repeat import block_transform, check_in_place, later_blocks
from x_transformers.module import Module
from x_transformers.returns import ReturnSpec
from x_transformers.stack_wrapper import Ends, StackWrapper
from x_transformers.tensor_types import Bool, Float, Int

if TYPE_CHECKING:
    from typing import Unpack

    from x_transformers.flags.keywords import WrapperKeywords


class TransformerWrapper(StackWrapper):
    """A transformer over tokens: token and position embeddings, a stack of attention layers, and an output head.

    The keywords are the fields of ``WrapperFlags``; ``num_tokens``, ``max_seq_len`` and ``attn_layers`` are required.

    Raises:
        FlagError: names every keyword that is unknown, has a wrong value, or conflicts with another or with the stack.
    """

    # beside the tokens' own vectors, None unless a flag asks for them
    embed_scale: float | None
    embeds: nn.ModuleDict | None
    bigram: BigramHash | None
    smear: Smear | None
    l2norm_embed: bool
    # from vectors to logits
    to_logits: Any
    head_form: HeadForm
    to_mixture: nn.Module | None
    combine_mixture: nn.Module | None
    logits_transform: nn.Module | None

    __signature__: Any = ClassSignature(only(WrapperFlags))

    def __init__(self, *, num_tokens: int, max_seq_len: int, attn_layers: nn.Module, **flags: Unpack[WrapperKeywords]) -> None:
        super().__init__(Ends(embed_tokens, read_tokens))
        keywords = {'num_tokens': num_tokens, 'max_seq_len': max_seq_len, 'attn_layers': attn_layers, **flags}
        flags_ = WrapperFlags.parse(keywords, where='TransformerWrapper')
        left_to_right = bool(getattr(attn_layers, 'is_causal', False))
        check_wrapper(flags_, stack_flags(attn_layers), where=type(self).__name__, left_to_right=left_to_right)
        # kept for reading; the modules live in their slots only
        self.flags = replace(flags_, attn_layers=nn.Identity(), token_emb=None, to_logits=None)
        build_embedding(self, flags_)
        build_pooling(self, flags_)
        build_heads(self, flags_)
        build_stack(self, flags_, attn_layers)
        self.init_own()

    @torch.no_grad()
    def init_(self) -> None:
        """Initialize the token table again, and with ``l2norm_embed`` the position table."""
        if hasattr(self.token_emb, 'init_'):
            self.token_emb.init_()
        if self.l2norm_embed and isinstance(self.pos_emb, Module):
            self.pos_emb.reset_parameters()

    # ------------------------------------------------------------ for those who work on the loss

    @property
    def linear_head(self) -> tuple[Tensor, Tensor | None] | None:
        """(weight, bias) if the logits are one linear map of the embeddings, so that a loss needs no logits; else None."""
        head = self.loss_head
        return None if head is None or self.head_form != HeadForm() else (head.weight, head.bias)

    @property
    def loss_head(self) -> LinearHead | None:
        """What a loss needs that makes the logits a few rows at a time; None if it needs all of them.

        Then ``to_logits_kwargs=dict(targets=…)`` gives the cross entropy in the place of logits, which are never held.
        """
        pooled = self.average_pool_embed or self.cls_token is not None or self.pools_in_place_of_logits
        head, form = self.to_logits, self.head_form
        if pooled or self.to_mixture is not None or self.logits_transform is not None or form.needs_all_logits:
            return None
        return LinearHead(head.weight, head.bias, form.scale, form.softcap) if gives_loss(head) else None

    # ------------------------------------------------------------ forward

    @with_arguments(
        ARGUMENTS, OF_LOOPS, argument_sentences(ReturnSpec, 'return_'), *map(argument_sentences, (ModelArgs, StackArgs))
    )
    def forward(
        self,
        x: Int[Tensor, 'b n'] | None,
        return_embeddings: bool = False,
        return_logits_and_embeddings: bool = False,
        return_intermediates: bool | Literal['cache'] = False,
        return_embeddings_and_intermediates: bool = False,
        return_logit_entropies: bool = False,
        return_next_embed_pred: bool = False,
        mask: Bool[Tensor, 'b t'] | None = None,
        return_mems: bool = False,
        return_attn: bool = False,
        mems: Sequence[Float[Tensor, 'b l d']] | None = None,
        mem_masks: Sequence[Bool[Tensor, 'b l']] | None = None,
        recycle_steps: int | None = None,
        pos: Int[Tensor, '... n'] | Float[Tensor, '... n e'] | None = None,
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
        detach_mems: bool = True,
        excise_prepend_embeds: bool = False,
        transform_token_embeds: Callable[[Float[Tensor, 'b n e']], Float[Tensor, 'b n e']] | None = None,
        transform_block_inputs: Any = None,
        looped_steps: int | None = None,
        looped_pred_all_logits: bool | None = None,
        looped_inference: bool = True,
        looped_exit_prob_threshold: float = 0.9,
        return_expert_loss: bool = False,
        return_multi_token_logits: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Logits (b n v), or what the ``return_*`` arguments select.

        Args: as declared in ``embedding/call.py``, ``returns.py`` and ``layers/arguments.py``

        Returns:
            The first that applies of: (logits, embeddings); (embeddings, intermediates); embeddings; attention-pooled tokens;
            logits. Then, wrapped around it: next-embedding prediction, memories, intermediates, attention maps.
        """
        change = block_transform(transform_block_inputs)
        if change is not None:
            kwargs['transform_block_inputs'] = partial(later_blocks, change)
            if transform_token_embeds is None:
                transform_token_embeds = partial(change, 1)
        ids = ids_or_none(x, prepend_embeds, own_table=self._own_token_emb or not isinstance(self.token_emb, TokenEmbedding))
        loop = LoopCall(looped_steps, looped_pred_all_logits, looped_inference, looped_exit_prob_threshold)
        loop.check(self.looped)
        keywords = {
            'return_embeddings': return_embeddings, 'return_logits_and_embeddings': return_logits_and_embeddings,
            'return_intermediates': return_intermediates,
            'return_embeddings_and_intermediates': return_embeddings_and_intermediates,
            'return_logit_entropies': return_logit_entropies, 'return_next_embed_pred': return_next_embed_pred, 'mask': mask,
            'return_mems': return_mems, 'return_attn': return_attn, 'mems': mems, 'mem_masks': mem_masks,
            'recycle_steps': recycle_steps, 'pos': pos, 'prepend_embeds': prepend_embeds, 'prepend_mask': prepend_mask,
            'embed_ids': embed_ids, 'sum_embeds': sum_embeds, 'return_attn_z_loss': return_attn_z_loss,
            'seq_start_pos': seq_start_pos, 'cache': cache, 'input_not_include_cache': input_not_include_cache,
            'token_emb_kwargs': token_emb_kwargs, 'to_logits_kwargs': to_logits_kwargs, 'logits_last': logits_last,
            'detach_mems': detach_mems, 'excise_prepend_embeds': excise_prepend_embeds,
            'transform_token_embeds': transform_token_embeds, 'return_expert_loss': return_expert_loss,
            'return_multi_token_logits': return_multi_token_logits, 'kwargs': kwargs,
        }  # fmt: skip
        returns = ReturnSpec.of(keywords, default(attn_z_loss_weight, self.flags.attn_z_loss_weight))
        return self.run(call_of(self, ids, keywords, loop=loop), returns)


def embed_tokens(model: TransformerWrapper, x: Int[Tensor, 'b n ...'], call: ModelArgs, rows: Rows) -> Float[Tensor, 'b n e']:
    vectors: Tensor = model.token_emb(x, **call.token_emb_kwargs)
    check_projected('token_emb', vectors, x, model.emb_dim)
    vectors = vectors if model.embed_scale is None else vectors * model.embed_scale
    if call.transform_token_embeds is not None:
        entering, vectors = vectors, call.transform_token_embeds(vectors)
        check_in_place('transform_token_embeds', vectors, entering)
    vectors = add_named(vectors, model.embeds, call.embed_ids, rows.summand)
    if model.bigram is not None:
        ids = x.long()
        vectors = vectors + model.bigram(ids, one_before(ids.unsqueeze(-1) + 1, 'bigram', call, rows).squeeze(-1))
    if model.smear is not None:
        vectors = model.smear(vectors, one_before(vectors, 'smear', call, rows))
    return vectors


def read_tokens(
    model: TransformerWrapper, h: Float[Tensor, 'b ... d'], call: ModelArgs, whole: bool
) -> tuple[HeadLogits, Float[Tensor, 'b ... d']]:
    """(logits, embeddings they were made of: with a mixture its vectors (b n k d))."""
    embeds = last_positions(h, None if whole else call.logits_last)
    weights = None if model.combine_mixture is None else model.combine_mixture(embeds)
    embeds = embeds if model.to_mixture is None else model.to_mixture(embeds)
    read = last_positions(embeds, call.logits_last)
    read = read if model.logits_transform is None else model.logits_transform(read)
    weights = None if weights is None else last_positions(weights, call.logits_last)
    return model.head_form(model.to_logits, read, weights, call.to_logits_kwargs), embeds
