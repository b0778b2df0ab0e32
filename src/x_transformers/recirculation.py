"""Recirculation: run each token a second time, with a deep layer's input mixed into a shallow layer's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.cache.intermediates import LayerIntermediates
from x_transformers.cache.kv_cache import Cache, KVCache
from x_transformers.embedding.call import last_positions
from x_transformers.flags.calls import LearnOptions, MixOptions
from x_transformers.flags.fit import check_added_losses
from x_transformers.flags.later_objectives import RecirculationOptions
from x_transformers.flags.objectives import options
from x_transformers.helpers import cast_tuple, default
from x_transformers.latent_prediction import check_parameters, mlp
from x_transformers.layers.arguments import is_number
from x_transformers.module import Module
from x_transformers.tensor_types import Float, Int


class RecirculationMixer(Module):
    """Weights per channel for source and destination, from both. forward: (b n d), (b n d) -> alpha, beta (b n d).

    They start near 0.1 and 0.9.
    """

    def __init__(self, dim: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = default(hidden, dim)
        self.input_norm = nn.LayerNorm(2 * dim)
        self.mlp = mlp([2 * dim, hidden, hidden, 2 * dim])
        self.init_own()

    @torch.no_grad()
    def init_own(self) -> None:
        last: Any = self.mlp[-1]
        nn.init.normal_(last.weight, std=0.02)
        alpha, beta = last.bias.chunk(2)
        alpha.copy_(torch.full_like(alpha, 0.1).logit())
        beta.copy_(torch.full_like(beta, 0.9).logit())

    def forward(self, source: Float[Tensor, 'b n d'], destination: Float[Tensor, 'b n d']) -> tuple[Tensor, Tensor]:
        alpha, beta = self.mlp(self.input_norm(torch.cat((source, destination), dim=-1))).sigmoid().chunk(2, dim=-1)
        return alpha, beta


class Recirculation(Module):
    """A net that reads each token twice (https://arxiv.org/abs/2608.17981).

    The first pass gives the logits. The second pass replaces the stream that enters ``destination_layer`` by a mixture with
    the one that entered ``source_layer``, scaled to its length; later tokens attend to the keys and values of this pass. It
    can be used wherever the net can, such as in ``AutoregressiveWrapper``. Tokens are read one by one.

    Args:
        net: a ``TransformerWrapper`` around a causal stack that can be cached, with one residual stream.
        source_layer, destination_layer: attention layers by their index, or tuples of them; destinations are shallower.
        alpha, beta: weights of source and destination; ``beta`` is one minus ``alpha`` unless given.
        ramp_steps: ``alpha`` grows to its value over so many tokens.
        use_learned: weights per channel come from a ``RecirculationMixer`` of width ``learned_hidden``.

    Raises:
        ValueError: a layer does not exist, or the net cannot be cached.
    """

    can_cache_kv = True
    reads_new_tokens = True

    def __init__(
        self,
        net: nn.Module,
        source_layer: int | Sequence[int],
        destination_layer: int | Sequence[int],
        alpha: float = 0.15,
        beta: float | None = None,
        ramp_steps: int = 10,
        use_learned: bool = False,
        learned_hidden: int | None = None,
    ) -> None:
        super().__init__()
        options(RecirculationOptions, 'Recirculation', locals())
        check_added_losses(net, 'Recirculation', needs=('attn_layers',))
        model: Any = net
        stack = model.attn_layers
        sources, destinations = (
            cast_tuple(tuple(each) if isinstance(each, list) else each) for each in (source_layer, destination_layer)
        )
        count = stack.num_attn_layers
        for name, each in (('source_layer', sources), ('destination_layer', destinations)):
            if not all(map(is_number, each)):
                raise ValueError(f'Recirculation: {name} must be the index of an attention layer, or several, got {each}.')
        check_parameters(
            'Recirculation',
            len(sources) != len(destinations)
            and f'source_layer and destination_layer must pair up, got {sources} and {destinations}.',
            any(not 0 <= index < count for index in (*sources, *destinations))
            and f'layers must be 0 to {count - 1}, as there are {count} self attentions, got {sources} and {destinations}.',
            any(d >= s for s, d in zip(sources, destinations, strict=False))
            and f'each destination must be shallower than its source, got {sources} and {destinations}.',
            len(set(destinations)) != len(destinations) and f'destinations must differ, got {destinations}.',
            not model.can_cache_kv and 'net must be able to continue from a cache, which this one cannot.',
            stack.flags.streams > 1 and 'net must have one residual stream; leave out num_residual_streams.',
        )  # fmt: skip
        self.net: Any = model
        # under both names, as in checkpoints of 2.31.10
        self.attn_layers: Any = stack
        self.max_seq_len = getattr(net, 'max_seq_len', 0)
        self.can_cache_kv_outside_max_seq_len = bool(getattr(net, 'can_cache_kv_outside_max_seq_len', True))
        self.pairs = tuple(zip(sources, destinations, strict=True))
        self.alpha, self.beta, self.ramp_steps = alpha, beta, ramp_steps
        self.learned_mixers = (
            nn.ModuleList([RecirculationMixer(model.dim, learned_hidden) for _ in self.pairs]) if use_learned else None
        )

    @property
    def output_is_log_prob(self) -> bool:
        return bool(getattr(self.net, 'output_is_log_prob', False))

    # ------------------------------------------------------------ one token

    def mix(self, hiddens: Sequence[Float[Tensor, 'b n d']], step: int = 0) -> dict[int, Float[Tensor, 'b 1 d']]:
        """What is to enter each destination at the last position; ``hiddens`` entered the attention layers.

        ``step`` says how many tokens came before.
        """
        options(MixOptions, 'mix', {'step': step})
        mixed = {}
        for index, (source, destination) in enumerate(self.pairs):
            z_s, z_d = hiddens[source][:, -1:], hiddens[destination][:, -1:]
            if self.learned_mixers is None:
                ramped = self.alpha * (1.0 if self.ramp_steps == 0 else min(step / self.ramp_steps, 1.0))
                alpha: Any = ramped
                beta: Any = default(self.beta, 1.0 - ramped)
            else:
                alpha, beta = self.learned_mixers[index](z_s, z_d)
            length = z_d.norm(dim=-1, keepdim=True) / z_s.norm(dim=-1, keepdim=True).clamp(min=1e-12)
            mixed[destination] = alpha * z_s * length + beta * z_d
        return mixed

    @contextmanager
    def _replaced(self, mixed: Mapping[int, Float[Tensor, 'b 1 d']]) -> Iterator[None]:
        """While this is open, the streams that enter the destinations are these."""
        stack = self.net.attn_layers
        layers = [index for index, kind in enumerate(stack.layer_types) if kind == 'a']
        hooks = []
        for destination, z in mixed.items():

            def enter(_: nn.Module, args: tuple[Any, ...], z: Float[Tensor, 'b n d'] = z) -> tuple[Any, ...]:
                return (z.to(args[0].dtype), *args[1:])

            hooks.append(stack.layers[layers[destination]].register_forward_pre_hook(enter))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _token(
        self, ids: Int[Tensor, 'b 1'], cache: KVCache | None, kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, KVCache | None]:
        """(the logits of the first reading, the cache of the second)."""
        keywords = {'return_intermediates': True, 'input_not_include_cache': True, **kwargs}
        logits, record = self.net(ids, cache=cache, **keywords)
        step = 0 if cache is None else cache.length - cache.front
        with self._replaced(self.mix(record.hiddens, step)):
            _, again = self.net(ids, cache=cache, **keywords)
        return logits, again.kv_cache

    # ------------------------------------------------------------ as a net

    def forward(
        self,
        x: Int[Tensor, 'b n'],
        return_intermediates: bool = False,
        cache: Cache = None,
        input_not_include_cache: bool = False,
        logits_last: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits (b n v) of the tokens that the cache has not seen; with ``return_intermediates`` their cache too.

        Keywords beyond these go to the net and must hold for single tokens.
        """
        seen = KVCache.of(cache)
        if seen is not None and not input_not_include_cache:
            x = x[:, seen.length - seen.front :]
        if x.ndim != 2 or x.shape[1] < 1:
            raise ValueError(f'x must be token ids (batch, at least one new token), got shape {tuple(x.shape)}.')
        outs = []
        for token in x.split(1, dim=1):
            logits, seen = self._token(token, seen, kwargs)
            outs.append(logits)
        out = last_positions(torch.cat(outs, dim=1), logits_last)
        return (
            (out, LayerIntermediates(kv_cache=seen, cache_length=seen.length if seen else 0)) if return_intermediates else out
        )

    def learn_parameters(
        self, x: Int[Tensor, 'b n'], steps: int = 100, lr: float = 1e-3, ignore_index: int = -100, **kwargs: Any
    ) -> float:
        """Train the mixers alone on the next tokens of ``x``; the last loss. The net stays as it is.

        Raises ValueError without ``use_learned``.
        """
        options(LearnOptions, 'learn_parameters', locals())
        if self.learned_mixers is None:
            raise ValueError('use_learned must be True: without mixers there is nothing to learn.')
        optimizer = torch.optim.Adam(self.learned_mixers.parameters(), lr=lr)
        wanted = [parameter.requires_grad for parameter in self.net.parameters()]
        self.net.requires_grad_(False)
        try:
            for _ in range(steps):
                logits = self(x[:, :-1].masked_fill(x[:, :-1] == ignore_index, 0), **kwargs)
                loss = F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten().long(), ignore_index=ignore_index)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        finally:
            for parameter, needed in zip(self.net.parameters(), wanted, strict=True):
                parameter.requires_grad_(needed)
        return float(loss.detach())
