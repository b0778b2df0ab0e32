"""From the stack's output to logits: one head or many, tied, sigmoid-softmax, mixture of softmaxes, the next embedding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.embedding.token import TokenEmbedding
from x_transformers.feedforward import NAMED_ACTIVATIONS
from x_transformers.helpers import softclamp
from x_transformers.module import Module, empty_parameter
from x_transformers.tensor_types import Float

Logits = Tensor | tuple[Tensor, ...]


class TiedHead(Module):
    """Logits from the transposed token table (https://arxiv.org/abs/1608.05859). Its only parameter is a ``bias``, if asked."""

    def __init__(self, embedding: TokenEmbedding, bias: bool = False) -> None:
        super().__init__()
        # inside a tuple the embedding is not registered a second time, and still copied and pickled together with the model
        self._embedding = (embedding,)
        self.bias = empty_parameter(embedding.emb.num_embeddings) if bias else None
        self.init_own()

    def init_own(self) -> None:
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def weight(self) -> Float[Tensor, 'v d']:
        return self._embedding[0].emb.weight

    def forward(self, x: Float[Tensor, '... d']) -> Float[Tensor, '... v']:
        return F.linear(x, self.weight, self.bias)


class LinearHead(NamedTuple):
    """Logits as a loss can make them a few rows at a time: one linear map, a factor, a soft cap."""

    weight: Float[Tensor, 'v d']
    bias: Float[Tensor, ' v'] | None = None
    scale: float | None = None
    softcap: float | None = None


class OutputHeads(nn.ModuleList):
    """Several heads side by side; the logits are a tuple."""

    def forward(self, x: Float[Tensor, '... d'], **kwargs: Any) -> tuple[Float[Tensor, '... v'], ...]:
        return tuple(head(x, **kwargs) for head in self)


def choose_head(
    dim: int,
    num_logits: int,
    *,
    only_embed: bool = False,
    tied_to: TokenEmbedding | None = None,
    count: int = 1,
    own: Callable[..., Any] | None = None,
    bias: bool = False,
) -> Callable[..., Any] | None:
    """The first that applies: no head, the transposed token table, several heads, the user's own head, one linear map."""
    if only_embed:
        return None
    if tied_to is not None:
        return TiedHead(tied_to, bias)
    if count > 1:
        return OutputHeads([nn.Linear(dim, num_logits, bias=bias) for _ in range(count)])
    return own if own is not None else nn.Linear(dim, num_logits, bias=bias)


def mixture_modules(dim: int, k: int) -> tuple[nn.Module, nn.Module]:
    """(projection to the mixture's ``k`` vectors, weights of the mixture) of https://arxiv.org/abs/1711.03953."""
    return nn.Sequential(nn.Linear(dim, dim * k, bias=False), nn.Unflatten(-1, (k, dim))), nn.Linear(dim, k, bias=False)


class HeadTransform(nn.Sequential):
    """A linear map, an activation and a norm in front of the map to the logits, as in BERT (https://arxiv.org/abs/1810.04805)."""

    def __init__(self, dim: int, activation: str, norm: nn.Module, *, bias: bool = True) -> None:
        super().__init__(nn.Linear(dim, dim, bias=bias), NAMED_ACTIVATIONS[activation](), norm)


def next_embedding_head(dim: int) -> nn.Module:
    """Predicts the embedding of the next token."""
    return nn.Sequential(nn.Linear(dim, dim, bias=False), nn.SiLU(), nn.Linear(dim, dim, bias=False))


def sigsoftmax(logits: Float[Tensor, '... v']) -> Float[Tensor, '... v']:
    """Logits whose softmax is proportional to exp(z) sigmoid(z) (https://arxiv.org/abs/1805.10829)."""
    return logits + F.logsigmoid(logits)


def mix_softmaxes(logits: Float[Tensor, '... k v'], weights: Float[Tensor, '... k']) -> Float[Tensor, '... v']:
    """Log probabilities of ``k`` softmaxes mixed by the softmax of ``weights``; in float32 at least."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_probs = logits.to(wide).log_softmax(dim=-1)
    shares = weights.to(wide).log_softmax(dim=-1)
    return (log_probs + shares.unsqueeze(-1)).logsumexp(dim=-2)


@dataclass(frozen=True)
class HeadForm:
    """What happens to a head's numbers before they are logits."""

    sigsoftmax: bool = False
    squeeze: bool = False
    scale: float | None = None
    softcap: float | None = None

    @property
    def needs_all_logits(self) -> bool:
        """Whether more is done to them than a loss can do to a few rows at a time."""
        return self.sigsoftmax or self.squeeze

    def __call__(self, head: Callable[..., Any], x: Tensor, weights: Tensor | None, kwargs: Mapping[str, Any]) -> Logits:
        """Logits of ``x``, (b n d) or (b n k d) with a mixture, whose ``weights`` are (b n k)."""
        raw = head(x, **kwargs)
        return tuple(self.finish(each, weights) for each in raw) if isinstance(raw, tuple) else self.finish(raw, weights)

    def finish(self, logits: Tensor, weights: Tensor | None) -> Tensor:
        if self.scale is not None:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = softclamp(logits, self.softcap)
        if self.sigsoftmax:
            logits = sigsoftmax(logits)
        if weights is not None:
            logits = mix_softmaxes(logits, weights)
        return logits.squeeze(-1) if self.squeeze else logits


def map_logits(fn: Callable[[Tensor], Tensor], logits: Logits) -> Logits:
    return tuple(fn(each) for each in logits) if isinstance(logits, tuple) else fn(logits)
