"""Full bandwidth: the deep layers' output at one token enters the shallow layers at the next token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from x_transformers.embedding.ids import token_ids
from x_transformers.flags.calls import BandwidthGenerateOptions
from x_transformers.flags.fit import check_added_losses
from x_transformers.flags.later_objectives import FullBandwidthOptions
from x_transformers.flags.objectives import options
from x_transformers.generation.modes import evaluating
from x_transformers.generation.prompts import (
    Prompts,
    check_reserved,
    checked_eos,
    checked_length,
    prepare_prompts,
    warn_of_end,
)
from x_transformers.generation.sampling import Filter, Sampler, resolve_filter, top_k
from x_transformers.latent_prediction import Discount, check_parameters
from x_transformers.layers.arguments import is_number
from x_transformers.losses import token_cross_entropy
from x_transformers.module import Module, empty_parameter
from x_transformers.norms import RMSNorm
from x_transformers.tensor_types import Float, Int

Pair = tuple[int, int]


class LossBreakdown(NamedTuple):
    first_pass_loss: Tensor
    feedback_pass_losses: tuple[Tensor, ...]
    all_pass_losses: tuple[Tensor, ...]


# ---------------------------------------------------------------- transitions


class Transition(Module):
    """From the last token's latent and the present stream to the new stream. forward: (b n d), (b n d) -> (b n d)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.latent_norm = RMSNorm(dim)
        self.stream_norm = RMSNorm(dim)
        self.norm = RMSNorm(dim)


class GLUCrossTransition(Transition):
    """``norm(W latent * sigmoid(U stream))``."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.to_state = nn.Linear(dim, dim, bias=False)
        self.to_gate = nn.Linear(dim, dim, bias=False)

    def forward(self, latent: Float[Tensor, '... d'], stream: Float[Tensor, '... d']) -> Float[Tensor, '... d']:
        gate = self.to_gate(self.stream_norm(stream)).sigmoid()
        out: Tensor = self.norm(self.to_state(self.latent_norm(latent)) * gate)
        return out


class LinearTransition(Transition):
    """``norm(W latent + U stream)``."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.to_state = nn.Linear(dim, dim, bias=False)
        self.to_stream = nn.Linear(dim, dim, bias=False)

    def forward(self, latent: Float[Tensor, '... d'], stream: Float[Tensor, '... d']) -> Float[Tensor, '... d']:
        out: Tensor = self.norm(self.to_state(self.latent_norm(latent)) + self.to_stream(self.stream_norm(stream)))
        return out


class GRUTransition(Transition):
    """``norm(lerp(stream, tanh(C [latent; stream]), sigmoid(G [latent; stream])))``; the gate starts nearly closed."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.to_candidate = nn.Linear(2 * dim, dim, bias=False)
        self.gate = nn.Linear(2 * dim, dim)
        self.init_own()

    @torch.no_grad()
    def init_own(self) -> None:
        nn.init.constant_(self.gate.bias, -1.0)

    def forward(self, latent: Float[Tensor, '... d'], stream: Float[Tensor, '... d']) -> Float[Tensor, '... d']:
        both = torch.cat((self.latent_norm(latent), self.stream_norm(stream)), dim=-1)
        out: Tensor = self.norm(stream.lerp(self.to_candidate(both).tanh(), self.gate(both).sigmoid()))
        return out


class ResidualTransition(Module):
    """``norm(stream + scale * W latent)``; the scale is learned and starts at 0.1."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.latent_norm = RMSNorm(dim)
        self.norm = RMSNorm(dim)
        self.proj = nn.Linear(dim, dim, bias=False)
        self.scale = empty_parameter()
        self.init_own()

    @torch.no_grad()
    def init_own(self) -> None:
        nn.init.constant_(self.scale, 0.1)

    def forward(self, latent: Float[Tensor, '... d'], stream: Float[Tensor, '... d']) -> Float[Tensor, '... d']:
        out: Tensor = self.norm(stream + self.scale * self.proj(self.latent_norm(latent)))
        return out


class ResidualGLUTransition(Module):
    """``norm(stream + scale * glu(latent, stream))``; the scale is learned and starts at 1."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.glu = GLUCrossTransition(dim)
        self.norm = RMSNorm(dim)
        self.scale = empty_parameter()
        self.init_own()

    @torch.no_grad()
    def init_own(self) -> None:
        nn.init.ones_(self.scale)

    def forward(self, latent: Float[Tensor, '... d'], stream: Float[Tensor, '... d']) -> Float[Tensor, '... d']:
        out: Tensor = self.norm(stream + self.scale * self.glu(latent, stream))
        return out


TRANSITIONS: dict[str, Callable[[int], nn.Module]] = {
    'glu': GLUCrossTransition,
    'residual': ResidualTransition,
    'gru': GRUTransition,
    'linear': LinearTransition,
    'residual_glu': ResidualGLUTransition,
}

SHORTCUTS: dict[str, Callable[[int], Iterable[Pair]]] = {
    'paper': lambda depth: [(depth, 1)],
    'prev': lambda depth: [(i, i - 1) for i in range(2, depth + 1)],
    'top_and_prev': lambda depth: [(depth, 1), *((i, i - 1) for i in range(2, depth + 1))],
    'prev_with_self': lambda depth: [(i, max(i - 1, 1)) for i in range(1, depth + 1)],
    'self': lambda depth: [(i, i) for i in range(1, depth + 1)],
    'full': lambda depth: [(i, 1) for i in range(1, depth + 1)],
    'dense': lambda depth: [(o, i) for o in range(1, depth + 1) for i in range(1, depth + 1)],
}


class FullBandwidth(Module):
    """Feedback from each token's deep blocks into the next token's shallow ones (https://arxiv.org/abs/2608.08888).

    Training runs the whole sequence several times; each pass after the first gives every position the deep latents of the
    previous pass at the previous position. Generation runs each token once, with the latents of the last one.

    Args:
        net: a ``TransformerWrapper`` around a ``Decoder`` with ``depth_scale_residual``, and ``tie_embedding`` and
            ``post_emb_norm`` of its own.
        temporal_parallel_passes: passes of training and of reading a prompt.
        recirc_pairs: pairs (block out of which, block into which), counted from 1, each with a transition of its own as a third
            entry if wanted; or one of 'paper' (the default), 'prev', 'top_and_prev', 'prev_with_self', 'self', 'full', 'dense'.
        transition: how latent and stream are joined: 'glu', 'residual', 'gru', 'linear' or 'residual_glu', or a function from
            the width to a module. ``transitions``: others for some pairs.
        feedback_pass_weight: weight of the passes after the first in the loss.
        jitter_noise_delta: uniform noise on the latents in training.
        dynamic_rollout_loss_weight: passes behind one with a loss above ``dynamic_loss_threshold`` count less, the faster the
            larger ``dynamic_loss_decay``.
        ignore_index, pad_value: targets excluded from the loss, and the id that replaces them in the input.

    Raises:
        ValueError: parameters out of range, or a net without what is needed.
    """

    def __init__(
        self,
        net: nn.Module,
        temporal_parallel_passes: int = 2,
        recirc_pairs: str | Iterable[Any] | None = None,
        transition: str | Callable[[int], nn.Module] | None = None,
        transitions: Mapping[Pair, str | Callable[[int], nn.Module]] | None = None,
        feedback_pass_weight: float = 1.0,
        ignore_index: int = -100,
        jitter_noise_delta: float = 0.02,
        dynamic_rollout_loss_weight: bool = False,
        dynamic_loss_decay: float = 0.5,
        dynamic_loss_threshold: float = 1.0,
        *,
        pad_value: int = 0,
    ) -> None:
        super().__init__()
        options(FullBandwidthOptions, 'FullBandwidth', locals())
        check_added_losses(net, 'FullBandwidth', needs=('flags', 'attn_layers'))
        model: Any = net
        flags, stack = model.flags, model.attn_layers
        depth: int = stack.depth
        check_parameters(
            'FullBandwidth',
            not stack.flags.depth_scale_residual and 'net must have depth_scale_residual=True in its stack.',
            not flags.tie_embedding and 'net must have tie_embedding=True.',
            not flags.post_emb_norm and 'net must have post_emb_norm=True.',
            not stack.causal and 'net must be causal; use a Decoder.',
            isinstance(recirc_pairs, str) and recirc_pairs not in SHORTCUTS
            and f'recirc_pairs must be one of {", ".join(SHORTCUTS)} or pairs, got {recirc_pairs!r}.',
        )  # fmt: skip
        self.net: Any = model
        self.max_seq_len = getattr(net, 'max_seq_len', 0)
        self.passes = temporal_parallel_passes
        by_pair = dict(transitions or {})
        self.transitions = nn.ModuleDict()
        self.pairs: list[Pair] = []
        for entry in self._entries(recirc_pairs, depth):
            if not isinstance(entry, (list, tuple)) or len(entry) not in (2, 3) or not all(map(is_number, entry[:2])):
                raise ValueError(
                    'recirc_pairs must be pairs (block out of which, block into which), each with a transition of its own '
                    f'behind it if wanted, got {entry!r}.'
                )
            out, into, *own = entry
            if not (1 <= out <= depth and 1 <= into <= depth) or (out, into) in self.pairs:
                raise ValueError(f'recirc_pairs must be different pairs of blocks 1 to {depth}, got {(out, into)}.')
            self.pairs.append((out, into))
            kind = own[0] if own else by_pair.get((out, into), transition)
            self.transitions[f'{out}->{into}'] = self._transition('glu' if kind is None else kind, model.dim)
        if not self.pairs:
            raise ValueError(f'recirc_pairs must name a pair of blocks at least, got {recirc_pairs!r} with {depth} blocks.')
        self.feedback_pass_weight = feedback_pass_weight
        self.ignore_index, self.pad_value = ignore_index, pad_value
        self.jitter_noise_delta = jitter_noise_delta
        self.dynamic_rollout_loss_weight = dynamic_rollout_loss_weight
        self.dynamic_loss_decay, self.dynamic_loss_threshold = dynamic_loss_decay, dynamic_loss_threshold

    @staticmethod
    def _entries(pairs: str | Iterable[Any] | None, depth: int) -> list[Any]:
        if pairs is None or isinstance(pairs, str):
            # a shortcut may name a pair twice
            return list(dict.fromkeys(SHORTCUTS[pairs or 'paper'](depth)))
        return list(pairs)

    @staticmethod
    def _transition(kind: str | Callable[[int], nn.Module], dim: int) -> nn.Module:
        if isinstance(kind, nn.Module):
            return kind
        if isinstance(kind, str) and kind not in TRANSITIONS:
            raise ValueError(f'transition must be one of {", ".join(TRANSITIONS)} or a function of the width, got {kind!r}.')
        return TRANSITIONS[kind](dim) if isinstance(kind, str) else kind(dim)

    # ------------------------------------------------------------ passes

    def _fused(self, latents: Mapping[int, Float[Tensor, 'b n d']]) -> dict[int, Callable[[Tensor], Tensor]]:
        """What happens to the stream that enters each block; ``latents`` are by block, moved to the positions they go to.

        A position whose latent is missing, the first of the sequence, keeps its stream: latents may be one shorter.
        """

        def enter(into: int, stream: Float[Tensor, 'b n d']) -> Float[Tensor, 'b n d']:
            for out in (out for out, to in self.pairs if to == into):
                latent = latents[out]
                kept = stream.shape[1] - latent.shape[1]
                fused = self.transitions[f'{out}->{into}'](latent, stream[:, kept:])
                stream = torch.cat((stream[:, :kept], fused), dim=1) if kept else fused
            return stream

        return {into: partial(enter, into) for _, into in self.pairs}

    def _latents(self, hiddens: Any) -> dict[int, Float[Tensor, 'b n d']]:
        return {out: hiddens[out - 1] for out, _ in self.pairs}

    def _jittered(self, latent: Float[Tensor, '... d']) -> Tensor:
        if not self.training or self.jitter_noise_delta == 0.0:
            return latent
        return latent + torch.empty_like(latent).uniform_(-self.jitter_noise_delta, self.jitter_noise_delta)

    def _passes(
        self, x: Int[Tensor, 'b n'], passes: int, kwargs: Mapping[str, Any]
    ) -> tuple[list[Float[Tensor, 'b n v']], Any]:
        """(the logits of each pass, the intermediates of the last)."""
        logits, record = self.net(x, return_intermediates=True, **kwargs)
        every = [logits]
        for _ in range(passes - 1):
            moved = {block: self._jittered(latent)[:, :-1] for block, latent in self._latents(record.block_hiddens).items()}
            # of a single token nothing is known before it
            fused = {} if x.shape[1] == 1 else {'transform_block_inputs': self._fused(moved)}
            logits, record = self.net(x, return_intermediates=True, **fused, **kwargs)
            every.append(logits)
        return every, record

    # ------------------------------------------------------------ training

    def forward(
        self,
        x: Int[Tensor, 'b n'],
        return_loss: bool = True,
        return_loss_breakdown: bool = False,
        return_all_pass_logits: bool = False,
        return_all: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The loss, or without ``return_loss`` the logits (b n v) of the last pass; further keywords go to the net.

        With ``return_loss_breakdown``, ``return_all_pass_logits`` or ``return_all`` a named tuple of it and what was asked for.
        """
        if x.ndim != 2 or x.shape[1] < 1 + return_loss:
            raise ValueError(f'x must be token ids (batch, at least {1 + return_loss} tokens), got shape {tuple(x.shape)}.')
        x = token_ids(x)
        tokens = x[:, :-1] if return_loss else x
        inputs = tokens
        if not 0 <= self.ignore_index < self.net.num_tokens:
            # an ignored index that is a token of the vocabulary is read as that token
            inputs = tokens.masked_fill(tokens == self.ignore_index, self.pad_value)
        every, _ = self._passes(inputs, self.passes, kwargs)
        breakdown = self._losses(every, x[:, 1:]) if return_loss else None
        main = every[-1] if breakdown is None else self._total(breakdown)
        parts: dict[str, Any] = {'loss' if return_loss else 'logits': main}
        if breakdown is not None and (return_loss_breakdown or return_all):
            parts['loss_breakdown'] = breakdown
        if return_all_pass_logits or return_all:
            parts['all_pass_logits'] = tuple(every)
        return _named(parts) if len(parts) > 1 else main

    def _losses(self, every: list[Float[Tensor, 'b n v']], labels: Int[Tensor, 'b n']) -> LossBreakdown:
        is_log_prob = bool(getattr(self.net, 'output_is_log_prob', False))
        measure = partial(token_cross_entropy, ignore_index=self.ignore_index, is_log_prob=is_log_prob)
        # feedback has nothing to say at the first position
        low = min(1, labels.shape[1] - 1)
        first, *feedback = (
            measure(logits[:, low if nth else 0 :], labels[:, low if nth else 0 :]) for nth, logits in enumerate(every)
        )
        return LossBreakdown(first, tuple(feedback), (first, *feedback))

    def _total(self, losses: LossBreakdown) -> Float[Tensor, '']:
        feedback = torch.stack(losses.feedback_pass_losses)
        if not self.dynamic_rollout_loss_weight:
            return losses.first_pass_loss + self.feedback_pass_weight * feedback.mean()
        discount, weights = Discount(self.dynamic_loss_decay, self.dynamic_loss_threshold), []
        for before, loss in zip(losses.all_pass_losses, losses.feedback_pass_losses, strict=False):
            discount.add(before)
            weights.append(discount.weight(loss))
        shares = torch.stack(weights)
        return losses.first_pass_loss + self.feedback_pass_weight * (shares * feedback).sum() / shares.sum()

    # ------------------------------------------------------------ generation

    @torch.no_grad()
    def generate(
        self,
        prompts: Prompts,
        seq_len: int,
        eos_token: int | None = None,
        temperature: float = 1.0,
        filter_logits_fn: str | Filter = top_k,
        filter_kwargs: Mapping[str, Any] | None = None,
        temporal_parallel_passes: int | None = None,
        process_prompt: bool = True,
        should_fuse_latent: Callable[[int], bool] | None = None,
        *,
        include_prompt: bool = False,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Int[Tensor, '... s']:
        """Sample ``seq_len`` tokens after prompts (..., t); the new tokens only, padded after the first ``eos_token``.

        Args:
            temporal_parallel_passes: passes over the prompt; those of training unless given.
            process_prompt: read the prompt with feedback; otherwise in one pass.
            should_fuse_latent: whether a new token gets the latents of the last one, by its number.
        """
        options(BandwidthGenerateOptions, 'generate', locals())
        check_reserved(kwargs)
        warn_of_end(self.net, eos_token)
        steps, eos = checked_length(seq_len), checked_eos(eos_token)
        prompt = prepare_prompts(prompts, None, self.pad_value)
        if prompt.start is not None:
            raise ValueError('prompts must have one length; generate from others one by one.')
        if not getattr(self.net, 'can_cache_kv', False):
            raise ValueError('net must be able to continue from a cache, which this one cannot.')
        sampler = Sampler(temperature, resolve_filter(filter_logits_fn), filter_kwargs or {}, generator)
        passes = (temporal_parallel_passes or self.passes) if process_prompt else 1
        ids, generated = prompt.tokens, []
        finished = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
        with evaluating(self):
            every, record = self._passes(ids, passes, kwargs)
            logits = every[-1]
            for step in range(steps):
                chosen = sampler(logits[:, -1])
                if eos is not None:
                    chosen = chosen.masked_fill(finished, self.pad_value)
                    finished = finished | (chosen == eos)
                generated.append(chosen)
                if step + 1 == steps or (eos is not None and bool(finished.all())):
                    break
                fuses = should_fuse_latent is None or should_fuse_latent(step)
                latents = {block: latent[:, -1:] for block, latent in self._latents(record.block_hiddens).items()}
                logits, record = self.net(
                    chosen.unsqueeze(1),
                    cache=record,
                    input_not_include_cache=True,
                    return_intermediates=True,
                    transform_block_inputs=self._fused(latents) if fuses else None,
                    **kwargs,
                )
        new = torch.stack(generated, dim=1) if generated else ids[:, :0]
        return prompt.unpack(torch.cat((ids, new), dim=1) if include_prompt else new)


def _named(parts: Mapping[str, Any]) -> Any:
    """A named tuple of what was asked for."""
    kind: Any = NamedTuple('FullBandwidthOutput', [(name, Any) for name in parts])  # type: ignore[misc]
    return kind(**parts)
