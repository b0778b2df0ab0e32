"""Block diffusion: autoregressive over blocks, masked diffusion within each block
(https://arxiv.org/abs/2503.09573)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.embedding.call import along_tokens
from x_transformers.embedding.ids import token_ids
from x_transformers.flags.base import FlagError
from x_transformers.flags.calls import BlockGenerateOptions
from x_transformers.flags.fit import check_net, check_twice
from x_transformers.flags.objectives import BlockDiffusionOptions, options
from x_transformers.generation.modes import eval_decorator
from x_transformers.generation.prompts import check_reserved, checked_length, flattened, restored
from x_transformers.generation.sampling import Filter, Sampler, resolve_filter
from x_transformers.helpers import default, identity
from x_transformers.layers.checks import is_bool, shape_of
from x_transformers.losses import token_cross_entropy
from x_transformers.module import Module
from x_transformers.tensor_types import Bool, Float, Int

IGNORED = -100


def block_of(length: int, size: int, device: torch.device | None = None) -> Int[Tensor, ' n']:
    """The number of the block that each of ``length`` tokens belongs to; the last block may be shorter."""
    return torch.arange(length, device=device) // size


def causal_blocks(length: int, size: int, device: torch.device | None = None) -> Bool[Tensor, 'n n']:
    """Who sees whom among clean tokens: those of the own block and of earlier ones."""
    block = block_of(length, size, device)
    return block[:, None] >= block


def two_streams(length: int, size: int, device: torch.device | None = None) -> Bool[Tensor, 'm m']:
    """Who sees whom among ``length`` clean tokens and, behind them, the same tokens with noise.

    Clean tokens see clean ones, by block. Those with noise see the noise of their own block and clean tokens of earlier ones.
    """
    block = block_of(length, size, device)
    query, key = block[:, None], block
    clean = torch.cat((query >= key, torch.zeros_like(query >= key)), dim=1)
    noisy = torch.cat((query > key, query == key), dim=1)
    return torch.cat((clean, noisy), dim=0)


class BlockDiffusionWrapper(Module):
    """Trains a net to predict the masked tokens of a block, given the earlier blocks, and generates block after block.

    Args:
        net: a ``TransformerWrapper`` over a ``PrefixDecoder``, which caches earlier blocks, or over an ``Encoder``, which reads
            them again.
        mask_id: the mask token; must have a row in the net's embedding, and must not occur in texts.
        block_size: the number of tokens in a block. 1: a language model; the whole length: masked diffusion.
        time_low, time_high: the range of the masked fraction, drawn for each block separately. A narrower range (0.3 to 0.8)
            makes gradients less noisy; the loss is a bound of the likelihood only with the range from 0 to 1.
    """

    net: Any

    def __init__(
        self,
        net: nn.Module,
        *,
        mask_id: int,
        block_size: int = 8,
        time_low: float = 1e-3,
        time_high: float = 1.0,
    ) -> None:
        super().__init__()
        options(BlockDiffusionOptions, 'BlockDiffusionWrapper', locals())
        check_net(net, 'BlockDiffusionWrapper')
        check_twice(net, 'BlockDiffusionWrapper')
        if getattr(getattr(net, 'attn_layers', None), 'causal', True):
            raise FlagError(
                '`net` must have a stack without a causal mask of its own, got '
                f'{type(getattr(net, "attn_layers", net)).__name__}: within a block, tokens attend to both sides. '
                'Build it around a PrefixDecoder, which caches, or an Encoder.'
            )
        self.net = net
        self.num_tokens, self.max_seq_len = self.net.num_tokens, self.net.max_seq_len
        if not 0 <= mask_id < self.num_tokens:
            raise ValueError(f'mask_id must be one of the {self.num_tokens} tokens of the net, got {mask_id}')
        self.mask_id, self.block_size = mask_id, block_size
        self.time_low, self.time_high = time_low, time_high
        self.has_prefix = bool(getattr(self.net.attn_layers, 'has_prefix', False))

    # ------------------------------------------------------------ training

    def draw(self, x: Int[Tensor, 'b n']) -> tuple[Float[Tensor, 'b n'], Bool[Tensor, 'b n']]:
        """(the time of each token, the same in a block; which tokens are hidden, each with its time as probability)."""
        block = block_of(x.shape[1], self.block_size, x.device)
        times = torch.empty(len(x), -(-x.shape[1] // self.block_size), device=x.device)
        times = times.uniform_(self.time_low, self.time_high)[:, block]
        return times, torch.rand(x.shape, device=x.device) < times

    def forward(self, x: Int[Tensor, 'b n'], mask: Bool[Tensor, 'b n'] | None = None, **kwargs: Any) -> Float[Tensor, '']:
        """The mean loss per token (nats); with times from 0 to 1, a bound of the negative log likelihood.

        ``mask``: True for text; no token attends to the rest, which is padding. ``kwargs`` are for the net, such as
        ``context``; arguments with an axis of tokens are refused.
        """
        x = token_ids(x)
        self.check(x, mask, kwargs)
        times, hidden = self.draw(x)
        return self.loss(x, times, hidden, mask, **kwargs)

    def loss(
        self,
        x: Int[Tensor, 'b n'],
        times: Float[Tensor, 'b n'],
        hidden: Bool[Tensor, 'b n'],
        mask: Bool[Tensor, 'b n'] | None = None,
        **kwargs: Any,
    ) -> Float[Tensor, '']:
        """The loss for one draw of times and hidden tokens: all blocks in one pass over the clean tokens and the noisy ones."""
        logits = self.logits(x, x.masked_fill(hidden, self.mask_id), mask, **kwargs)
        text = torch.ones_like(hidden) if mask is None else mask
        targets = x.masked_fill(~(hidden & text), IGNORED)
        is_log_prob = bool(getattr(self.net, 'output_is_log_prob', False))
        losses = token_cross_entropy(logits, targets, IGNORED, is_log_prob=is_log_prob, reduction='none')
        return (losses / times).sum() / text.sum()

    def logits(
        self, clean: Int[Tensor, 'b n'], noisy: Int[Tensor, 'b n'], mask: Bool[Tensor, 'b n'] | None = None, **kwargs: Any
    ) -> Float[Tensor, 'b n v']:
        """What the net says at each noisy token, which sees its own block as it is and earlier blocks clean."""
        n, place = clean.shape[1], torch.arange(clean.shape[1], device=clean.device)
        keywords = kwargs if mask is None else {'mask': torch.cat((mask, mask), dim=1), **kwargs}
        logits: Tensor = self.net(
            torch.cat((clean, noisy), dim=1),
            pos=torch.cat((place, place)),
            attn_mask=two_streams(n, self.block_size, clean.device),
            logits_last=n,
            **self.opened(2 * n),
            **keywords,
        )
        return logits

    def opened(self, rows: int) -> dict[str, int]:
        """What makes a prefix decoder show all of ``rows`` tokens, of which the mask then hides some."""
        return {'prefix_attn_len': rows} if self.has_prefix else {}

    def check(self, x: Int[Tensor, 'b n'], mask: Bool[Tensor, 'b n'] | None, kwargs: Mapping[str, Any]) -> None:
        if x.ndim != 2 or x.shape[1] == 0:
            raise ValueError(f'x must have shape (batch, tokens) with at least one token, got {tuple(x.shape)}')
        if self.net.has_absolute_positions and x.shape[1] > self.max_seq_len:
            raise ValueError(f'x must have at most max_seq_len={self.max_seq_len} tokens, got {x.shape[1]}. Cut it.')
        if mask is not None and (not is_bool(mask, 2) or mask.shape != x.shape):
            raise ValueError(f'mask must be boolean of shape {tuple(x.shape)}, got {shape_of(mask)}')
        self.check_keywords(kwargs)

    def check_keywords(self, kwargs: Mapping[str, Any]) -> None:
        check_reserved(kwargs)
        if taken := [name for name, value in kwargs.items() if value is not None and along_tokens(name, value)]:
            raise ValueError(
                f'{", ".join(taken)} must not be given: it belongs to tokens or to rows in front of them, and each token is '
                'read twice, clean and with noise. Leave it out.'
            )

    # ------------------------------------------------------------ generation

    @torch.no_grad()
    @eval_decorator
    def generate(
        self,
        prompts: Int[Tensor, '... t'],
        seq_len: int,
        *,
        steps: int | None = None,
        temperature: float = 1.0,
        filter_logits_fn: str | Filter = identity,
        filter_kwargs: Mapping[str, Any] | None = None,
        cache_kv: bool = True,
        include_prompt: bool = False,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Int[Tensor, '... s']:
        """``seq_len`` tokens after each prompt, block after block; within a block, tokens are sampled in random order.

        Args:
            prompts: ids (..., t) with any leading axes; t may be 0, and need not be a multiple of the block size.
            seq_len: how many tokens to generate.
            steps: iterations for a block, each of which samples an equal share of its tokens; None: one token each, which is
                exact. Fewer are faster and less exact: the tokens of one iteration are sampled independently.
            temperature: 0 takes the most likely token, without any filter.
            filter_logits_fn, filter_kwargs: which tokens may be sampled, as in ``AutoregressiveWrapper.generate``; all unless
                given.
            cache_kv: cache keys and values of earlier blocks, if the net supports it.
            include_prompt: return the prompt before the new tokens.
            generator: makes sampling reproducible; on the device of the prompts.
            kwargs: for the net, such as ``context``.
        """
        options(BlockGenerateOptions, 'generate', locals())
        self.check_keywords(kwargs)
        flat, leading = flattened(token_ids(prompts, 'prompts'))
        sampler = Sampler(temperature, resolve_filter(filter_logits_fn), filter_kwargs or {}, generator)
        known, end = flat.shape[1], flat.shape[1] + checked_length(seq_len)
        limit = self.max_seq_len if self.net.has_absolute_positions else end + self.block_size
        if end > limit:
            raise ValueError(f'prompts and seq_len must have at most max_seq_len={limit} tokens together, got {end}.')
        whole = min(-(-end // self.block_size) * self.block_size, limit)
        seq = torch.cat((flat, flat.new_full((len(flat), whole - known), self.mask_id)), dim=1)
        first = known - known % self.block_size
        reader = BlockReader(self, kwargs, caches=cache_kv and self.has_prefix and self.net.can_cache_kv)
        for begin in range(first, end, self.block_size):
            stop = min(begin + self.block_size, whole)
            hidden = torch.arange(begin, stop, device=seq.device) >= known
            block = self.settle(reader, seq[:, :begin], seq[:, begin:stop], hidden.expand(len(seq), -1), steps, sampler)
            seq = torch.cat((seq[:, :begin], block, seq[:, stop:]), dim=1)
        return restored(seq[:, 0 if include_prompt else known : end], leading)

    def settle(
        self,
        reader: BlockReader,
        before: Int[Tensor, 'b s'],
        block: Int[Tensor, 'b k'],
        hidden: Bool[Tensor, 'b k'],
        steps: int | None,
        sampler: Sampler,
    ) -> Int[Tensor, 'b k']:
        """The block with its hidden tokens drawn, in ``steps`` rounds of equal size."""
        count = int(hidden[0].sum())
        rounds = min(default(steps, count), count)
        chance = torch.rand(block.shape, device=block.device, generator=sampler.generator).masked_fill(~hidden, torch.inf)
        turn = chance.argsort(dim=-1).argsort(dim=-1)
        for done in range(rounds):
            now = (turn >= done * count // rounds) & (turn < (done + 1) * count // rounds)
            logits = reader.read(before, block)
            if self.mask_id < logits.shape[-1]:
                logits = logits.index_fill(-1, torch.tensor(self.mask_id, device=logits.device), -torch.inf)
            drawn = sampler(logits.flatten(0, 1)).view(block.shape)
            block = torch.where(now, drawn, block)
        return block


class BlockReader:
    """Reads a block with noise behind clean ones, whose keys and values it remembers if the net ``caches``."""

    def __init__(self, model: BlockDiffusionWrapper, keywords: Mapping[str, Any], caches: bool) -> None:
        self.model, self.keywords, self.caches = model, keywords, caches
        self.cache: Any = None
        self.seen = 0

    def read(self, before: Int[Tensor, 'b s'], block: Int[Tensor, 'b k']) -> Float[Tensor, 'b k v']:
        """Logits of the block's tokens. ``before`` is longer than at the last call, or the same."""
        if not self.caches:
            whole: Tensor = self._call(torch.cat((before, block), dim=1), logits_last=block.shape[1])
            return whole
        if before.shape[1] > self.seen:
            _, self.cache = self._call(
                before[:, self.seen :],
                cache=self.cache,
                input_not_include_cache=True,
                return_intermediates=True,
                logits_last=1,
            )
            self.seen = before.shape[1]
        # a cache is a value: what this call adds to it is forgotten
        past = {} if self.cache is None else {'cache': self.cache, 'input_not_include_cache': True}
        logits: Tensor = self._call(block, **past)
        return logits

    def _call(self, x: Int[Tensor, 'b n'], **more: Any) -> Any:
        rows = x.shape[1] + (self.seen if 'cache' in more else 0)
        shown = causal_blocks(rows, self.model.block_size, x.device)[rows - x.shape[1] :]
        return self.model.net(x, attn_mask=shown, **self.model.opened(rows), **more, **self.keywords)
