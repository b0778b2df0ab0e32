"""Pooling of a sequence to one or a few vectors: attention pooling, averages, cls tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.cache.intermediates import LayerIntermediates
from x_transformers.flags.base import FlagError
from x_transformers.helpers import default, masked_mean
from x_transformers.module import Module, empty_parameter
from x_transformers.notices import one_warning, renamed
from x_transformers.tensor_types import Bool, Float


class AttentionPool(Module):
    """Learned queries attend over a sequence (https://arxiv.org/abs/1810.00825).

    Args:
        dim: width of the queries and of the result.
        num_pooled_tokens: number of learned queries; 0: none, the call gives ``queries``.
        dim_context: width of the sequence; ``dim`` unless given.
        add_residual: add the queries to the result (without blocks, which have their own residuals).
        depth: more than one takes whole cross-attending blocks.
        heads, dim_head: of the attention.
        use_transformer_blocks: blocks with feed-forwards, even for ``depth=1``.
        squeeze_output: drop the axis of the single pooled token.
        attn_kwargs: further flags of the attention, without prefix.
    """

    def __init__(
        self,
        dim: int,
        num_pooled_tokens: int = 1,
        dim_context: int | None = None,
        add_residual: bool = False,
        depth: int = 1,
        heads: int = 8,
        dim_head: int = 64,
        use_transformer_blocks: bool | None = None,
        squeeze_output: bool | None = None,
        attn_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        blocks = default(use_transformer_blocks, depth > 1)
        self.squeeze_output = default(squeeze_output, False)
        self.add_residual = add_residual
        self._check(depth, blocks, num_pooled_tokens)
        width, more = default(dim_context, dim), dict(attn_kwargs or {})
        self.queries = empty_parameter(num_pooled_tokens, dim) if num_pooled_tokens else None
        self.pooler: nn.Module
        if blocks:
            from x_transformers.layers.stack import CrossAttender

            flags = {'attn_dim_head': dim_head, **{f'attn_{name}': value for name, value in more.items()}}
            with one_warning('AttentionPool'), renamed(lambda name: name.removeprefix('attn_')):
                self.pooler = CrossAttender(dim=dim, depth=depth, heads=heads, cross_attn_dim_context=width, **flags)
        else:
            from x_transformers.attention.attention import Attention

            self.pooler = Attention(dim, dim_context=width, heads=heads, **{'dim_head': dim_head, **more})
        self.init_own()

    def _check(self, depth: int, blocks: bool, tokens: int) -> None:
        wrong = []
        if depth < 1:
            wrong.append(f'AttentionPool: depth must be at least 1, got {depth}.')
        if tokens < 0:
            wrong.append(f'AttentionPool: num_pooled_tokens must be at least 0, got {tokens}.')
        if depth > 1 and not blocks:
            wrong.append(f'AttentionPool: depth={depth} needs use_transformer_blocks=True; a single attention has depth 1.')
        if self.add_residual and blocks:
            wrong.append(
                'AttentionPool: add_residual=True is for a single attention; transformer blocks have their own residuals.'
            )
        if self.squeeze_output and tokens != 1:
            wrong.append(f'AttentionPool: squeeze_output=True needs num_pooled_tokens=1, got {tokens}.')
        if wrong:
            raise FlagError(*wrong)

    @torch.no_grad()
    def init_own(self) -> None:
        if self.queries is not None:
            nn.init.normal_(self.queries, std=0.01)

    def forward(
        self,
        context: Float[Tensor, 'b n c'],
        mask: Bool[Tensor, 'b n'] | None = None,
        queries: Float[Tensor, 'b p d'] | None = None,
        **kwargs: Any,
    ) -> Float[Tensor, 'b p d'] | Float[Tensor, 'b d']:
        """Returns (b p d), or (b d) with ``squeeze_output``. ``kwargs`` go to the attention, or to the blocks.

        Raises ValueError if ``queries`` are missing, or given where they are learned.
        """
        queries = self._queries(queries, context.shape[0])
        pooled: Tensor = self.pooler(queries, context, context_mask=mask, **kwargs)
        if self.add_residual:
            pooled = pooled + queries
        return pooled.squeeze(1) if self.squeeze_output else pooled

    def _queries(self, queries: Float[Tensor, 'b p d'] | None, batch: int) -> Float[Tensor, 'b p d']:
        if self.queries is not None:
            if queries is not None:
                raise ValueError(
                    f'queries must not be given: this pool has learned {self.queries.shape[0]}. '
                    'Leave them out, or build it with num_pooled_tokens=0.'
                )
            return self.queries.expand(batch, -1, -1)
        if queries is None:
            raise ValueError('queries must be given, (b p d): this pool was built with num_pooled_tokens=0, got none.')
        return queries


def average(x: Float[Tensor, 'b n d'], mask: Bool[Tensor, 'b n'] | None) -> Float[Tensor, 'b d']:
    """Mean over the tokens that the mask names; 0 where there are none."""
    return masked_mean(x, mask, dim=1) if x.shape[1] else x.sum(dim=1)


def read_cls(x: Float[Tensor, 'b n d'], count: int) -> tuple[Tensor, Float[Tensor, 'b m d']]:
    """(the ``count`` cls tokens in front, (b d) if there is one and (b c d) otherwise; the rest)."""
    cls, rest = x[:, :count], x[:, count:]
    return cls.squeeze(1) if count == 1 else cls, rest


def pooled(
    model: Any, h: Float[Tensor, 'b n d'], keys: Bool[Tensor, '#b m'] | None, record: LayerIntermediates, whole_record: bool
) -> tuple[Float[Tensor, 'b ... d'], Float[Tensor, 'b ... p'] | None]:
    """(what logits are made of, what is returned in their place), of the output of a model's stack."""
    mask = None if keys is None else keys[:, keys.shape[1] - h.shape[1] :]
    if model.average_pool_embed:
        return average(h, mask), None
    if model.cls_token is not None:
        h, record.last_layer_hiddens = read_cls(h, model.num_cls_tokens)
        return h, None
    if model.attn_pool is None or not (model.pools_in_place_of_logits or whole_record):
        return h, None
    record.attn_pooled_tokens = model.attn_pool(h, mask)
    return h, record.attn_pooled_tokens if model.pools_in_place_of_logits else None
