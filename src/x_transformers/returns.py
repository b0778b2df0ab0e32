"""The table of return conventions: what a call returns, and in which form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

import torch
from torch import Tensor

from x_transformers.cache.intermediates import LayerIntermediates
from x_transformers.heads import HeadLogits, map_logits
from x_transformers.layers.arguments import plain_argument
from x_transformers.losses import calc_entropy
from x_transformers.tensor_types import Float


@dataclass(frozen=True)
class ReturnSpec:
    """The ``return_*`` arguments of one call."""

    embeddings: bool = plain_argument(
        False, 'Return the embeddings (b n d) that the logits are computed from, in place of the logits.'
    )
    logits_and_embeddings: bool = plain_argument(False, 'Return the pair (logits, embeddings).')
    intermediates: bool | Literal['cache'] = plain_argument(
        False,
        "Also return LayerIntermediates: hidden states, scores and weights, and the cache. 'cache': with the cache only, so "
        'that hidden states and attention maps are not kept.',
    )
    embeddings_and_intermediates: bool = plain_argument(
        False, 'Return the pair (embeddings, LayerIntermediates), without logits.'
    )
    logit_entropies: bool = plain_argument(
        False, 'Compute the entropies of the logits (b n), in `intermediates.logit_entropies`.'
    )
    next_embed_pred: bool = plain_argument(
        False, 'Also return the prediction of the next embedding, with `add_continuous_pred_head`.'
    )
    mems: bool = plain_argument(False, 'Also return the memories for the next segment.')
    attn: bool = plain_argument(False, 'Also return the attention maps, one per attention.')
    attn_z_loss: bool = plain_argument(False, 'Compute the attention z-loss, in the intermediates.')
    z_loss_weight: float = 1e-4
    expert_loss: bool = plain_argument(
        False, 'Also return intermediates; they hold the `expert_loss` only, unless `return_intermediates` is given.'
    )
    multi_token_logits: bool = plain_argument(
        False, 'Return a tuple of logits, one for each of `multi_token_heads`; the first is for the next token.'
    )

    @classmethod
    def of(cls, keywords: Mapping[str, Any], z_loss_weight: float = 1e-4) -> Self:
        """From the keywords of a forward, those ``return_…`` that it has."""
        return cls(z_loss_weight=z_loss_weight, **{name: keywords[full] for name, full in RETURNED if full in keywords})

    @property
    def intermediates_too(self) -> bool:
        """Intermediates are the second part of the result: asked for, or needed to carry what was asked for."""
        return bool(self.intermediates) or self.logit_entropies or self.attn_z_loss

    @property
    def record(self) -> bool:
        """The stack must report what happened inside."""
        return self.whole_record or self.intermediates == 'cache'

    @property
    def whole_record(self) -> bool:
        """Not the cache alone."""
        others = self.logit_entropies or self.attn_z_loss or self.embeddings_and_intermediates or self.mems or self.attn
        return others or (bool(self.intermediates) and self.intermediates != 'cache')

    def check(self, *, has_head: bool, predicts_next: bool, predicts_later: bool) -> None:
        needs_head = {
            'return_logits_and_embeddings': self.logits_and_embeddings,
            'return_logit_entropies': self.logit_entropies,
            'return_multi_token_logits': self.multi_token_logits,
        }
        for name, asked in needs_head.items():
            if asked and not has_head:
                raise ValueError(
                    f'{name} must be False for a model without logits, which was built with return_only_embed=True.'
                )
        if self.attn_z_loss and not isinstance(self.z_loss_weight, (int, float, Tensor)):
            raise TypeError(f'attn_z_loss_weight must be a number, got {self.z_loss_weight!r}.')
        if self.next_embed_pred and not predicts_next:
            raise ValueError(
                'return_next_embed_pred must be False without that head. Build the model with add_continuous_pred_head=True.'
            )
        if self.multi_token_logits and not predicts_later:
            raise ValueError(
                'return_multi_token_logits must be False with one head. Build the model with multi_token_heads=2, or more.'
            )

    def logits(self, *, has_head: bool, pooled: bool) -> bool:
        """Whether anyone will see logits. ``pooled``: attention-pooled tokens are returned in their place."""
        if not has_head:
            return False
        if self.logits_and_embeddings or self.logit_entropies:
            return True
        if self.embeddings or self.embeddings_and_intermediates:
            return False
        return not pooled or self.record

    def result(
        self,
        *,
        x: Float[Tensor, 'b ... d'],
        logits: HeadLogits | None,
        pooled: Float[Tensor, 'b ... p'] | None,
        has_head: bool,
        next_embed: Callable[[], tuple[Float[Tensor, 'b n e'], Float[Tensor, 'b n e']]],
        record: LayerIntermediates,
        mems: Callable[[], Sequence[Float[Tensor, 'b l d']]],
    ) -> Any:
        """The result of the call. ``x``: embeddings; ``pooled``: what is returned in the place of logits, if anything."""
        out: Any
        if self.logits_and_embeddings:
            out = (logits, x)
        elif self.embeddings_and_intermediates:
            out = (x, record)
        elif self.embeddings or not has_head:
            out = x
        elif pooled is not None:
            out, record.logits = pooled, logits
        else:
            out = logits
        if self.next_embed_pred:
            out = (out, next_embed())
        if self.logit_entropies and logits is not None:
            record.logit_entropies = map_logits(calc_entropy, logits)  # type: ignore[assignment]
        if self.mems:
            record.mems = mems()
            if not self.intermediates_too and not self.expert_loss:
                return out, record.mems
        if self.intermediates_too or self.expert_loss:
            return out, record
        if self.attn:
            return out, [each.post_softmax_attn for each in record.attn_intermediates or []]
        return out


RETURNED = tuple((each.name, f'return_{each.name}') for each in fields(ReturnSpec))


def scores(record: LayerIntermediates) -> list[Float[Tensor, 'b h i j']]:
    """The attention scores of every layer that has any."""
    every = (each.pre_softmax_attn for each in record.attn_intermediates or [])
    return [each for each in every if each is not None]


def next_memories(
    hiddens: Sequence[Float[Tensor, 'b n d']], mems: Sequence[Float[Tensor, 'b l d']] | None, longest: int, detach: bool = True
) -> list[Float[Tensor, 'b m d']]:
    """Per self attention the last ``longest`` states of its memories and this segment, without gradients if ``detach``.

    https://arxiv.org/abs/1901.02860
    """
    if mems:
        hiddens = [torch.cat((mem, hidden), dim=1) for mem, hidden in zip(mems, hiddens, strict=True)]
    newest = [hidden[:, max(hidden.shape[1] - longest, 0) :] for hidden in hiddens]
    return [hidden.detach() for hidden in newest] if detach else newest
