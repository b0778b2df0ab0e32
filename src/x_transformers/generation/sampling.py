"""Sampling from the logits of one position: filters, noise, and the choice of a token."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.generation.prompts import GenerateError
from x_transformers.helpers import log, max_neg_value
from x_transformers.tensor_types import Float, Int, Shaped

Filter = Callable[..., Tensor]


def top_k(logits: Float[Tensor, '... v'], frac_num_tokens: float = 0.1, k: int | None = None) -> Float[Tensor, '... v']:
    """Keep the ``k`` largest logits, or a fraction of the vocabulary (rounded up); the rest becomes -inf."""
    vocabulary = logits.shape[-1]
    wanted = math.ceil(frac_num_tokens * vocabulary) if k is None else k
    if wanted < 1:
        raise ValueError(f'top_k must keep at least one token, got k={k}, frac_num_tokens={frac_num_tokens}')
    values, indices = logits.topk(min(wanted, vocabulary), dim=-1)
    return torch.full_like(logits, -torch.inf).scatter(-1, indices, values)


def top_p(logits: Float[Tensor, '... v'], thres: float = 0.9) -> Float[Tensor, '... v']:
    """Keep the most likely tokens until their mass passes ``thres``; the one that crosses it stays.

    Nucleus sampling, https://arxiv.org/abs/1904.09751.
    """
    ordered, indices = logits.sort(descending=True, dim=-1)
    mass = ordered.softmax(dim=-1).cumsum(dim=-1)
    remove = F.pad(mass > thres, (1, -1), value=False)
    return torch.empty_like(logits).scatter_(-1, indices, ordered.masked_fill(remove, -torch.inf))


def top_a(logits: Float[Tensor, '... v'], min_p_pow: float = 2.0, min_p_ratio: float = 0.02) -> Float[Tensor, '... v']:
    """Remove tokens whose probability is below ``min_p_ratio * max(p) ** min_p_pow``."""
    probs = logits.softmax(dim=-1)
    limit = probs.amax(dim=-1, keepdim=True).pow(min_p_pow) * min_p_ratio
    return logits.masked_fill(probs < limit, -torch.inf)


def min_p(logits: Float[Tensor, '... v'], min_p: float = 0.1) -> Float[Tensor, '... v']:
    """Remove tokens whose probability is below ``min_p`` times the largest one (https://arxiv.org/abs/2407.01082)."""
    probs = logits.softmax(dim=-1)
    return logits.masked_fill(probs < min_p * probs.amax(dim=-1, keepdim=True), -torch.inf)


FILTER_LOGITS_FN: dict[str, Filter] = {'top_p': top_p, 'top_k': top_k, 'top_a': top_a, 'min_p': min_p}


def resolve_filter(given: str | Filter) -> Filter:
    """A filter by its name, or the callable itself."""
    if callable(given):
        return given
    if given not in FILTER_LOGITS_FN:
        raise GenerateError(
            f'filter_logits_fn must be a callable (logits, **filter_kwargs) or one of {sorted(FILTER_LOGITS_FN)}, got '
            f'{given!r}. Name one of them.'
        )
    return FILTER_LOGITS_FN[given]


def contrastive_decode_fn(
    expert_logits: Float[Tensor, '... v'],
    amateur_logits: Float[Tensor, '... v'],
    alpha: float | Float[Tensor, ''] = 0.1,
    beta: float = 0.5,
) -> Float[Tensor, '... v']:
    """What an expert prefers more than an amateur does, among what the expert finds likely.

    Algorithm 2 in the appendix of https://arxiv.org/abs/2309.09117. Tokens less likely than ``alpha`` times the expert's best
    become the most negative finite number.
    """
    if expert_logits.shape != amateur_logits.shape:
        raise ValueError(
            f'expert and amateur must share one vocabulary, got logits {tuple(expert_logits.shape)} and '
            f'{tuple(amateur_logits.shape)}. Use models of one tokenizer.'
        )
    if isinstance(alpha, Tensor):
        reach: float | Tensor = log(alpha)
    else:
        reach = math.log(alpha) if alpha > 0 else -math.inf
    cutoff = expert_logits.amax(dim=-1, keepdim=True) + reach
    contrast = (1.0 + beta) * expert_logits - beta * amateur_logits
    return contrast.masked_fill(expert_logits < cutoff, max_neg_value(expert_logits))


def gumbel_noise(t: Float[Tensor, '...'], generator: torch.Generator | None = None) -> Tensor:
    """Standard Gumbel noise of the shape of ``t``, in single precision at least.

    Half precision knows a few hundred uniform numbers near 1, and with them the largest of the noise is always the same.
    """
    dtype = torch.promote_types(t.dtype, torch.float32)
    uniform = torch.zeros_like(t, dtype=dtype).uniform_(0, 1, generator=generator)
    return -log(-log(uniform))


def gumbel_sample(
    logits: Float[Tensor, '... v'],
    temperature: float = 1.0,
    eps: float = 1e-6,
    generator: torch.Generator | None = None,
) -> Int[Tensor, '...']:
    """A sample of ``softmax(logits / temperature)``: the largest of the perturbed logits."""
    return (logits / max(temperature, eps) + gumbel_noise(logits, generator)).argmax(dim=-1)


def check_callable(fn: Callable[..., Shaped[Tensor, '...']], tensors: int, options: Mapping[str, Any], name: str) -> None:
    """Raise unless ``fn`` can be called with so many tensors and these keywords."""
    if not isinstance(options, Mapping):
        raise TypeError(f'{name} must be a dictionary of keywords, got {options!r}')
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):
        return  # written in another language: it will say itself what it does not take
    try:
        signature.bind(*[None] * tensors, **options)
    except TypeError:
        takes = ', '.join(list(signature.parameters)[tensors:]) or 'none'
        raise TypeError(
            f'{name} must be keywords of {getattr(fn, "__name__", fn)}, which takes {takes}, got {dict(options)}. Leave the '
            'others out.'
        ) from None


def check_keeps(fn: Callable[..., Float[Tensor, '... v']], options: Mapping[str, Any]) -> None:
    """Raise if one of our own filters, with these keywords, removes even the likeliest token."""
    if fn not in FILTER_LOGITS_FN.values():
        return
    try:
        kept = fn(torch.tensor([3.0, 2.0, 1.0, 0.0]), **options)
    except TypeError:
        raise TypeError(f'filter_kwargs {dict(options)} must be numbers') from None
    if not bool(kept.isfinite().any()):
        raise GenerateError(
            f'filter_kwargs must leave at least one token that {fn.__name__} may keep, got {dict(options)}. Choose a '
            'smaller threshold.'
        )


def check_temperature(temperature: float) -> None:
    try:
        fits = bool(temperature >= 0)
    except (TypeError, RuntimeError):
        raise TypeError(f'temperature must be a number, got {temperature!r}') from None
    if not fits or temperature == math.inf:
        raise ValueError(f'temperature must be 0 (greedy) or positive and finite, got {temperature}')


@dataclass(frozen=True)
class Sampler:
    """Chooses one token per row of logits (b v); temperature 0 takes the most likely one, without any filter.

    The filter sees the logits before they are divided by the temperature. ``generator`` makes the draws reproducible.
    """

    temperature: float = 1.0
    filter_fn: Filter = top_k
    filter_kwargs: Mapping[str, Any] = field(default_factory=dict)
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        check_callable(self.filter_fn, 1, self.filter_kwargs, 'filter_kwargs')
        check_keeps(self.filter_fn, self.filter_kwargs)

    def probs(self, logits: Float[Tensor, '... v']) -> Float[Tensor, '... v']:
        """The distribution that is sampled; with temperature 0 all mass is on the most likely token."""
        if self.temperature == 0:
            return torch.zeros_like(logits).scatter_(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
        return (self.filter_fn(logits, **self.filter_kwargs) / self.temperature).softmax(dim=-1)

    def __call__(self, logits: Float[Tensor, 'b v']) -> Int[Tensor, ' b']:
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        return self.draw(self.probs(logits))

    def draw(self, probs: Float[Tensor, 'b v']) -> Int[Tensor, ' b']:
        try:
            return torch.multinomial(probs, 1, generator=self.generator).squeeze(-1)
        except RuntimeError as error:
            if 'probabilit' not in str(error) and 'multinomial' not in str(error):
                raise
        name = getattr(self.filter_fn, '__name__', 'filter_logits_fn')
        raise GenerateError(
            f'{name} with filter_kwargs={dict(self.filter_kwargs)} must leave a token whose logit is a number, got none. '
            'Change the filter; without one, the net itself gives logits that are no numbers.'
        )


def pick_token(
    logits: Float[Tensor, 'b v'],
    temperature: float = 1.0,
    filter_logits_fn: str | Filter = top_k,
    filter_kwargs: Mapping[str, Any] | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, ' b']:
    """One token per row, by the rules of ``Sampler``."""
    return Sampler(temperature, resolve_filter(filter_logits_fn), filter_kwargs or {}, generator)(logits)


def sample_from_mean_variance(
    mean: Float[Tensor, '...'],
    variance: Float[Tensor, '...'],
    eps: float = 1e-5,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Float[Tensor, '...']:
    """A sample of a normal distribution whose deviation is ``temperature`` times the root of ``max(variance, eps)``.

    Gradients reach mean and variance (https://arxiv.org/abs/1312.6114).
    """
    check_temperature(temperature)
    noise = torch.randn(mean.shape, dtype=mean.dtype, device=mean.device, generator=generator)
    return mean + noise * (variance.clamp(min=eps).sqrt() * temperature)
