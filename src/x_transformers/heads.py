"""Output heads: one or many, tied, sigmoid-softmax, mixture of softmaxes, the next embedding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.embedding.token import TokenEmbedding
from x_transformers.feedforward import NAMED_ACTIVATIONS, FeedForward
from x_transformers.helpers import softclamp
from x_transformers.layers.slots import class_accepts
from x_transformers.losses import linear_cross_entropy
from x_transformers.module import Module, empty_parameter, is_heard, to_unit_length_
from x_transformers.tensor_types import Float, Int, Shaped
from x_transformers.unit_weights import UnitGain

HeadLogits = Tensor | tuple[Tensor, ...]


def linear_loss(
    x: Float[Tensor, '... d'],
    weight: Float[Tensor, 'v d'],
    bias: Float[Tensor, ' v'] | None,
    targets: Int[Tensor, '...'],
    ignore_index: int = -100,
    scale: float | None = None,
    softcap: float | None = None,
    measure: Callable[..., Float[Tensor, '...']] = linear_cross_entropy,
) -> Float[Tensor, '']:
    """The cross entropy of logits that are never held: one linear map, times ``scale``, capped; by ``measure``."""
    if scale is not None:
        # the factor is that of the logits, a bias among them
        x, bias = x * scale, None if bias is None else bias * scale
    return measure(x, weight, bias, targets, ignore_index=ignore_index, softcap=softcap)


class LinearLogits(nn.Linear):
    """Logits by one linear map; or with ``targets`` the loss of them, see ``linear_loss``."""

    def forward(self, input: Float[Tensor, '... d'], targets: Int[Tensor, '...'] | None = None, **loss: Any) -> Tensor:
        if targets is None:
            return F.linear(input, self.weight, self.bias)
        return linear_loss(input, self.weight, self.bias, targets, **loss)


class TiedHead(Module):
    """Logits from the transposed token table (https://arxiv.org/abs/1608.05859). Its only parameter is a ``bias``, if asked.

    With ``targets`` the loss, see ``linear_loss``. Shard it together with the table, whose weight it reads.
    """

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

    def table(self, x: Float[Tensor, '... d']) -> Float[Tensor, 'v d']:
        """The weight, where ``x`` is. One that is there only while its module runs (offloaded) is read by running it."""
        weight = self.weight
        if weight.device == x.device:
            return weight
        if not weight.is_meta:
            return weight.to(x.device)
        whole: Tensor = self._embedding[0].emb(torch.arange(weight.shape[0], device=x.device))
        return whole

    def forward(self, x: Float[Tensor, '... d'], targets: Int[Tensor, '...'] | None = None, **loss: Any) -> Tensor:
        if targets is None:
            return F.linear(x, self.table(x), self.bias)
        return linear_loss(x, self.table(x), self.bias, targets, **loss)


class UnitLogits(LinearLogits):
    """Logits by vectors of unit length, times a learned gain for each."""

    def __init__(self, dim: int, num_logits: int, bias: bool = False) -> None:
        super().__init__(dim, num_logits, bias=bias)
        self.gain = UnitGain(num_logits, held=dim**-0.5)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.normalize_()
        # not yet there while it is built
        if 'gain' in self._modules:
            self.gain.reset_parameters()

    def normalize_(self) -> None:
        to_unit_length_(self.weight, -1)

    def forward(self, input: Float[Tensor, '... d'], *_: Any, **__: Any) -> Tensor:
        out: Tensor = super().forward(input) * self.gain()
        return out


class UnitTiedHead(TiedHead):
    """Logits from a token table of vectors of unit length, times a learned gain for each."""

    def __init__(self, embedding: TokenEmbedding, bias: bool = False) -> None:
        super().__init__(embedding, bias)
        rows, dim = embedding.emb.weight.shape
        self.gain = UnitGain(rows, held=dim**-0.5)

    def forward(self, x: Float[Tensor, '... d'], *_: Any, **__: Any) -> Tensor:
        out: Tensor = super().forward(x) * self.gain()
        return out


def is_tied(module: nn.Module) -> bool:
    """Whether a head reads the token table, which is not registered there."""
    return isinstance(module, TiedHead)


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


def gives_loss(head: Any) -> bool:
    """Whether the loss may be had without logits: the head is one linear map, as it was made, and nobody waits for logits."""
    own = isinstance(head, (LinearLogits, TiedHead)) and class_accepts(type(head), 'targets')
    if not (own or type(head) is nn.Linear) or is_heard(head):
        return False
    # weights of other kinds, such as quantized ones, know products, but no gradients that are written by hand
    return type(head.weight) in (nn.Parameter, Tensor) or hasattr(head.weight, 'device_mesh')


def head_loss(head: Any, x: Float[Tensor, '... d'], **loss: Any) -> Float[Tensor, '']:
    """The loss by a head that ``gives_loss``, in its own forward; an ordinary linear map knows no targets, and is read."""
    out: Tensor = linear_loss(x, head.weight, head.bias, **loss) if type(head) is nn.Linear else head(x, **loss)
    return out


def choose_head(
    dim: int,
    num_logits: int,
    *,
    only_embed: bool = False,
    tied_to: TokenEmbedding | None = None,
    count: int = 1,
    own: Callable[..., Any] | None = None,
    bias: bool = False,
    unit: bool = False,
) -> Callable[..., Any] | None:
    """The first that applies: no head, the transposed token table, several heads, the user's own head, one linear map.

    ``unit``: of vectors of unit length, with a learned gain for each logit.
    """
    if only_embed:
        return None
    if tied_to is not None:
        return (UnitTiedHead if unit else TiedHead)(tied_to, bias)
    linear = UnitLogits if unit else LinearLogits
    if count > 1:
        return OutputHeads([linear(dim, num_logits, bias=bias) for _ in range(count)])
    return own if own is not None else linear(dim, num_logits, bias=bias)


def mixture_modules(dim: int, k: int) -> tuple[nn.Module, nn.Module]:
    """(projection to the mixture's ``k`` vectors, weights of the mixture) of https://arxiv.org/abs/1711.03953."""
    return nn.Sequential(nn.Linear(dim, dim * k, bias=False), nn.Unflatten(-1, (k, dim))), nn.Linear(dim, k, bias=False)


class HeadTransform(nn.Sequential):
    """A linear map, an activation and a norm in front of the map to the logits, as in BERT (https://arxiv.org/abs/1810.04805)."""

    def __init__(self, dim: int, activation: str, norm: nn.Module, *, bias: bool = True) -> None:
        super().__init__(nn.Linear(dim, dim, bias=bias), NAMED_ACTIVATIONS[activation](), norm)


class LaterToken(Module):
    """The stack's output as the logits of a later token are made of it: with a normed feed-forward's added. (… d) -> (… d).

    https://arxiv.org/abs/2404.19737
    """

    def __init__(self, dim: int, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.ff = FeedForward(dim)

    def forward(self, x: Float[Tensor, '... d']) -> Float[Tensor, '... d']:
        out: Tensor = x + self.ff(self.norm(x))
        return out


def next_embedding_head(dim: int, emb_dim: int) -> nn.Module:
    """Predicts the embedding of the next token."""
    return nn.Sequential(nn.Linear(dim, dim, bias=False), nn.SiLU(), nn.Linear(dim, emb_dim, bias=False))


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

    def __call__(
        self,
        head: Callable[..., Any],
        x: Float[Tensor, '... d'],
        weights: Float[Tensor, 'b n k'] | None,
        kwargs: Mapping[str, Any],
    ) -> HeadLogits:
        """Logits of ``x``, (b n d) or (b n k d) with a mixture, whose ``weights`` are (b n k)."""
        if 'targets' in kwargs and gives_loss(head):
            return head_loss(head, x, **kwargs, scale=self.scale, softcap=self.softcap)
        raw = head(x, **kwargs)
        return tuple(self.finish(each, weights) for each in raw) if isinstance(raw, tuple) else self.finish(raw, weights)

    def finish(self, logits: Float[Tensor, '... v'], weights: Float[Tensor, 'b n k'] | None) -> Tensor:
        if self.scale is not None:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = softclamp(logits, self.softcap)
        if self.sigsoftmax:
            logits = sigsoftmax(logits)
        if weights is not None:
            logits = mix_softmaxes(logits, weights)
        return logits.squeeze(-1) if self.squeeze else logits


def map_logits(fn: Callable[[Float[Tensor, '... v']], Shaped[Tensor, '...']], logits: HeadLogits) -> HeadLogits:
    return tuple(fn(each) for each in logits) if isinstance(logits, tuple) else fn(logits)
