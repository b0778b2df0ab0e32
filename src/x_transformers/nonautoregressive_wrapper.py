"""Masked generation: predict masked tokens, and mask the least certain again (https://arxiv.org/abs/1904.09324,
https://arxiv.org/abs/2202.04200); the loss may be weighted as in masked diffusion (https://arxiv.org/abs/2406.07524)."""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad_and_value, vmap

from x_transformers.embedding.ids import token_ids
from x_transformers.flags.base import FlagError
from x_transformers.flags.calls import MaskedForwardOptions, MaskedGenerateOptions
from x_transformers.flags.fit import check_net
from x_transformers.flags.objectives import MaskedOptions, options
from x_transformers.generation.modes import eval_decorator
from x_transformers.generation.prompts import check_reserved
from x_transformers.helpers import exists
from x_transformers.layers.checks import is_bool, of_width, shape_of
from x_transformers.losses import at_least_single, token_cross_entropy
from x_transformers.module import Module, empty_parameter
from x_transformers.randomness import happens
from x_transformers.tensor_types import Bool, Float, Int

Schedule = Callable[[Tensor], Tensor]


class LengthError(ValueError, AssertionError):
    """A sequence of another length than the wrapper works on; callers that catch the original's AssertionError still do."""


class Losses(NamedTuple):
    """What ``NonAutoregressiveWrapper`` returns; a part that was not computed is None."""

    loss: Tensor
    generator_loss: Tensor | None
    critic_loss: Tensor | None


def top_k(logits: Float[Tensor, '... v'], thres: float = 0.9) -> Float[Tensor, '... v']:
    """Keep the best ``ceil((1 - thres) * v)`` logits, remove the others."""
    k = math.ceil((1 - thres) * logits.shape[-1])
    best = logits.topk(k, dim=-1)
    return torch.full_like(logits, -math.inf).scatter(-1, best.indices, best.values)


def log(t: Float[Tensor, '...'], eps: float = 1e-10) -> Tensor:
    return (t + eps).log()


def gumbel_noise(t: Float[Tensor, '...'], generator: torch.Generator | None = None) -> Tensor:
    """Like the one of ``generation.sampling``, but for the ``log`` above; so are the numbers of a seed."""
    dtype = torch.promote_types(t.dtype, torch.float32)
    return -log(-log(torch.zeros_like(t, dtype=dtype).uniform_(0, 1, generator=generator)))


def gumbel_sample(
    t: Float[Tensor, '...'], temperature: float = 1.0, dim: int = -1, generator: torch.Generator | None = None
) -> Tensor:
    """A sample of ``softmax(t / temperature)``."""
    return (t / max(temperature, 1e-10) + gumbel_noise(t, generator)).argmax(dim=dim)


def sample_prob(prob: float) -> bool:
    return happens(prob)


def coin_flip() -> bool:
    return sample_prob(0.5)


def get_mask_subset_prob(mask: Bool[Tensor, 'b n'], prob: float | Float[Tensor, 'b'], min_mask: int = 0) -> Bool[Tensor, 'b n']:
    """In each row a random subset of the True positions: the share ``prob``, rounded up, at least ``min_mask``."""
    share = prob[:, None] if isinstance(prob, Tensor) else prob
    there = mask.sum(dim=-1, keepdim=True)
    wanted = (there * share).clamp(min=min_mask)
    scores = torch.rand(mask.shape, device=mask.device).masked_fill(~mask, -1.0)
    rank = scores.argsort(dim=-1, descending=True).argsort(dim=-1)
    return (rank < wanted) & mask


def linear_schedule(t: Float[Tensor, '...']) -> Tensor:
    return 1 - t


def cosine_schedule(t: Float[Tensor, '...']) -> Tensor:
    """https://arxiv.org/abs/2202.04200"""
    return torch.cos(t * math.pi / 2)


SCHEDULES: dict[str, Schedule] = {'linear': linear_schedule, 'cosine': cosine_schedule}


def choose_schedule(schedule: str | Schedule) -> Schedule:
    if callable(schedule):
        return schedule
    if schedule not in SCHEDULES:
        raise ValueError(f'schedule must be one of {", ".join(SCHEDULES)} or a function of the time, got {schedule!r}')
    return SCHEDULES[schedule]


class SelfCritic(Module):
    """A critic made of the embeddings of the generator, ``net``, and one linear map."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.to_logits = nn.Linear(net.attn_layers.dim, 1)  # type: ignore[arg-type]

    def forward(self, x: Int[Tensor, 'b n'], **kwargs: Any) -> Float[Tensor, 'b n 1']:
        judged: Tensor = self.to_logits(self.net(x, return_embeddings=True, **kwargs))
        return judged


class NonAutoregressiveWrapper(Module):
    """Trains a bidirectional net to predict masked tokens, and generates by iterative unmasking.

    Args:
        net: a ``TransformerWrapper`` over an ``Encoder``.
        mask_id: the mask token; must have a row in the net's embedding.
        steps: the number of iterations of generation.
        self_cond, self_cond_train_prob: condition on the embeddings of the previous iteration, in this fraction of training.
        no_replace_prob, random_token_prob: fraction of the chosen positions left unchanged, or replaced by random tokens.
        schedule: 'linear', 'cosine' or a differentiable function from time (0 to 1) to the masked fraction (1 to 0).
        can_mask_prev_unmasked: whether an accepted token may be masked again.
        token_critic: a net from tokens to ``b n 1`` that predicts which tokens are not real
            (https://aclanthology.org/2021.naacl-main.409/).
        self_token_critic: the critic is the generator itself with one linear map.
        critic_loss_weight: weight of the critic's loss.
        use_simple_mdlm_loss_weight: weight by ``-schedule'(t) / schedule(t)``, the bound of masked diffusion.
        mdlm_weight_of_the_original: weight by ``schedule'(t) / (1 - schedule(t))`` instead, which is negative: only to
            reproduce the original's numbers; minimizing it unlearns.
        critic_sees_masked_only: label only predicted tokens as unreal. False: the original's labels, which call a visible
            token unreal wherever the generator would have predicted another one.
    """

    net: Any

    def __init__(
        self,
        net: nn.Module,
        *,
        mask_id: int,
        steps: int = 18,
        self_cond: bool = False,
        self_cond_train_prob: float = 0.75,
        no_replace_prob: float = 0.15,
        random_token_prob: float = 0.1,
        schedule: str | Schedule = 'linear',
        can_mask_prev_unmasked: bool = False,
        token_critic: nn.Module | None = None,
        self_token_critic: bool = False,
        critic_loss_weight: float = 1.0,
        use_simple_mdlm_loss_weight: bool = True,
        mdlm_weight_of_the_original: bool = False,
        critic_sees_masked_only: bool = True,
    ) -> None:
        super().__init__()
        options(MaskedOptions, 'NonAutoregressiveWrapper', locals())
        check_net(net, 'NonAutoregressiveWrapper', needs=('attn_layers', 'emb_dim', 'num_tokens', 'max_seq_len'))
        if getattr(net.attn_layers, 'causal', False):
            raise FlagError(
                f'`net` must have a bidirectional stack, got {type(net.attn_layers).__name__}: masked tokens attend to both '
                'sides. Build it around an Encoder.'
            )
        self.net = net
        dim, emb_dim = self.net.attn_layers.dim, self.net.emb_dim
        self.max_seq_len, self.num_tokens = self.net.max_seq_len, self.net.num_tokens
        if not 0 <= mask_id < self.num_tokens:
            raise ValueError(f'mask_id must be one of the {self.num_tokens} tokens of the net, got {mask_id}')
        self.mask_id, self.steps = mask_id, steps
        self.no_replace_prob, self.random_token_prob = no_replace_prob, random_token_prob
        self.schedule_fn = choose_schedule(schedule)
        self.can_mask_prev_unmasked = can_mask_prev_unmasked
        self.self_cond, self.self_cond_train_prob = self_cond, self_cond_train_prob
        if self_cond:
            self.null_embed = empty_parameter(dim)
            self.to_self_cond = nn.Linear(dim, emb_dim, bias=False)
        self.token_critic = SelfCritic(net) if self_token_critic else token_critic
        self.critic_loss_weight = critic_loss_weight
        self.use_simple_mdlm_loss_weight = use_simple_mdlm_loss_weight
        self.mdlm_weight_of_the_original = mdlm_weight_of_the_original
        self.critic_sees_masked_only = critic_sees_masked_only
        self.init_own()

    def init_own(self) -> None:
        if self.self_cond:
            nn.init.normal_(self.null_embed)

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.net.parameters()).device
        return device

    def corrupted(self, x: Int[Tensor, 'b n'], mask: Bool[Tensor, 'b n']) -> Int[Tensor, 'b n']:
        """The input with the chosen positions hidden; some of them are left as they are, some get a random token."""
        to_hide, masked, left = mask, x, 1.0
        if self.no_replace_prob > 0 and coin_flip():
            left -= self.no_replace_prob
            to_hide = to_hide & ~get_mask_subset_prob(mask, self.no_replace_prob)
        if self.random_token_prob > 0 and coin_flip():
            to_replace = get_mask_subset_prob(to_hide, self.random_token_prob * left)
            masked = torch.where(to_replace, torch.randint_like(x, 0, self.num_tokens), masked)
            to_hide = to_hide & ~to_replace
        return masked.masked_fill(to_hide, self.mask_id)

    def self_condition(self, masked: Int[Tensor, 'b n'], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        """What the net is told of a previous round: nothing learned yet, or its own embeddings."""
        if not self.self_cond:
            return {}
        known = self.null_embed.expand(*masked.shape, -1)
        if sample_prob(self.self_cond_train_prob):
            with torch.no_grad():
                known = self.net(masked, return_embeddings=True, **kwargs)
        return {'sum_embeds': self.to_self_cond(known)}

    def loss_weight(self, times: Float[Tensor, 'b']) -> Float[Tensor, 'b']:
        slope: Tensor
        share: Tensor
        slope, share = vmap(grad_and_value(self.schedule_fn))(times)
        if self.mdlm_weight_of_the_original:
            return slope / (1 - share)
        return -slope / share.clamp(min=1 / self.max_seq_len)

    def forward(
        self,
        x: Int[Tensor, 'b n'],
        only_train_generator: bool = False,
        only_train_critic: bool = False,
        generator_sample_temperature: float | None = None,
        mask: Bool[Tensor, 'b n'] | None = None,
        **kwargs: Any,
    ) -> Losses:
        """The losses on sequences of exactly ``max_seq_len`` tokens; ``mask`` (True = text) excludes padding."""
        keywords = {
            'only_train_generator': only_train_generator,
            'only_train_critic': only_train_critic,
            'generator_sample_temperature': generator_sample_temperature,
        }
        options(MaskedForwardOptions, 'NonAutoregressiveWrapper', keywords)
        x = token_ids(x)
        self.check(x, mask, only_train_generator, only_train_critic)
        text = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
        kwargs = kwargs if mask is None else {'mask': mask, **kwargs}
        times = torch.empty(len(x), device=x.device).uniform_(0, 1)
        chosen = get_mask_subset_prob(text, self.schedule_fn(times), min_mask=1)
        masked = self.corrupted(x, chosen)
        net_kwargs, kwargs = kwargs, kwargs | self.self_condition(masked, kwargs)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not only_train_critic):
            logits = self.net(masked, **kwargs)
        is_log_prob = getattr(self.net, 'output_is_log_prob', False)
        loss = token_cross_entropy(logits[chosen], x[chosen], is_log_prob=is_log_prob, reduction='none')
        if self.use_simple_mdlm_loss_weight:
            loss = loss * self.loss_weight(times)[:, None].expand(x.shape)[chosen]
        loss = loss.mean()
        if self.token_critic is None or only_train_generator:
            return Losses(loss, loss, None)

        temperature = random.random() if generator_sample_temperature is None else generator_sample_temperature
        sampled = gumbel_sample(logits, temperature=temperature)
        filled = torch.where(chosen, sampled, x)
        unreal = (filled if self.critic_sees_masked_only else sampled) != x
        judged = self.judge(filled, net_kwargs)
        judged = at_least_single(judged[text])
        critic_loss = F.binary_cross_entropy_with_logits(judged, unreal[text].to(judged.dtype))
        if only_train_critic:
            return Losses(critic_loss, None, critic_loss)
        return Losses(loss + self.critic_loss_weight * critic_loss, loss, critic_loss)

    def check(self, x: Int[Tensor, 'b n'], mask: Bool[Tensor, 'b n'] | None, only_generator: bool, only_critic: bool) -> None:
        if x.ndim != 2 or x.shape[1] != self.max_seq_len:
            raise LengthError(f'x must have shape (batch, {self.max_seq_len}), the full max_seq_len; got {tuple(x.shape)}')
        if mask is not None and (not is_bool(mask, 2) or mask.shape != x.shape):
            raise ValueError(f'mask must be boolean of shape {tuple(x.shape)}, got {shape_of(mask)}')
        if only_generator and only_critic:
            raise ValueError('only_train_generator and only_train_critic must not both be True. Leave out one of them.')
        if only_critic and self.token_critic is None:
            raise ValueError(
                'only_train_critic must be False without a critic. Build it with token_critic or self_token_critic=True.'
            )

    @torch.no_grad()
    @eval_decorator
    def generate(
        self,
        batch_size: int | None = None,
        start_temperature: float = 1.0,
        filter_thres: float | None = 0.7,
        noise_level_scale: float = 1.0,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Int[Tensor, '... n']:
        """Sequences of ``max_seq_len`` tokens: all masked at first, fewer in each of ``steps`` iterations.

        Args:
            batch_size: rows ``(batch_size, n)``; one sequence ``(n,)`` without it.
            start_temperature: the temperature of the first iteration; it falls to 0 in the last.
            filter_thres: the fraction of the vocabulary that is never sampled; None: any token may be sampled.
            noise_level_scale: scale of the noise added to the critic's scores; without a critic there is no noise, and it must
                keep its default, or be 0.
            generator: makes sampling reproducible.
            kwargs: for the net.
        """
        token_critic = self.token_critic
        options(MaskedGenerateOptions, 'generate', locals())
        check_reserved(kwargs)
        rows = 1 if batch_size is None else batch_size
        seq = torch.full((rows, self.max_seq_len), self.mask_id, device=self.device)
        hidden = torch.ones_like(seq, dtype=torch.bool)
        shares = self.schedule_fn(torch.linspace(0, 1, self.steps + 1, device=self.device)[1:])
        still_hidden = (shares * self.max_seq_len).long().clamp(min=0).tolist()
        known = self.null_embed.expand(*seq.shape, -1) if self.self_cond else None
        for step, count in enumerate(still_hidden, start=1):
            annealing = (self.steps - step) / self.steps
            net_kwargs = kwargs if known is None else {**kwargs, 'sum_embeds': self.to_self_cond(known)}
            logits, embeds = self.net(seq, return_logits_and_embeddings=True, **net_kwargs)
            known = embeds if self.self_cond else None
            if filter_thres is not None:
                logits = top_k(logits, filter_thres)
            sampled = gumbel_sample(logits, temperature=max(start_temperature * annealing, 1e-3), generator=generator)
            seq = torch.where(hidden, sampled, seq)
            doubt = self.doubt(seq, sampled, logits, noise_level_scale * annealing, generator, kwargs)
            if not self.can_mask_prev_unmasked:
                doubt = doubt.masked_fill(~hidden, -torch.finfo(doubt.dtype).max)
            worst = doubt.topk(count, dim=-1).indices
            hidden = torch.zeros_like(hidden).scatter(1, worst, True)
            seq = seq.masked_fill(hidden, self.mask_id)
        return seq if exists(batch_size) else seq[0]

    def judge(self, seq: Int[Tensor, 'b n'], net_kwargs: dict[str, Any]) -> Float[Tensor, 'b n']:
        """What the critic says of each token. The net's own critic is told what the net is told; another one what it takes."""
        critic: Any = self.token_critic
        if not isinstance(critic, SelfCritic):
            net_kwargs = {name: value for name, value in net_kwargs.items() if critic_takes(critic, name)}
        judged = of_width(critic(seq, **net_kwargs), 1, 'token_critic').squeeze(-1)
        return judged

    def doubt(
        self,
        seq: Int[Tensor, 'b n'],
        sampled: Int[Tensor, 'b n'],
        logits: Float[Tensor, 'b n v'],
        noise: float,
        generator: torch.Generator | None,
        net_kwargs: dict[str, Any],
    ) -> Float[Tensor, 'b n']:
        """How little each token is to be trusted: the critic's word, or what the generator left to other tokens."""
        if self.token_critic is not None:
            judged = self.judge(seq, net_kwargs)
            return judged + noise * gumbel_noise(judged, generator)
        return 1 - logits.softmax(dim=-1).gather(-1, sampled[..., None]).squeeze(-1)


def critic_takes(critic: nn.Module, name: str) -> bool:
    """Whether a critic of the user's own can be told this: it has an argument of this name, or a stack that needs it."""
    stack: Any = getattr(critic, 'attn_layers', None)
    if name.startswith('context') and stack is not None:
        return bool(getattr(stack, 'cross_attend', False))
    if name == 'condition' and stack is not None:
        return bool(getattr(stack, 'need_condition', False))
    return name in inspect.signature(critic.forward).parameters and name != 'sum_embeds'
