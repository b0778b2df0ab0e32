"""Language modelling over segments, each of which remembers those before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.generation.decode import Reader, Tokens, decode
from x_transformers.generation.keywords import Keywords
from x_transformers.generation.modes import evaluating
from x_transformers.generation.prompts import checked_eos, checked_length, prepare
from x_transformers.generation.sampling import Filter, Sampler, resolve_filter, top_k
from x_transformers.losses import token_cross_entropy
from x_transformers.module import Module
from x_transformers.tensor_types import Float, Int

Mems = list[Tensor]


class SegmentReader:
    """Reads tokens in segments of ``net.max_seq_len``, each with the memories of the one before.

    Within a segment keys and values are cached. A segment that is complete is run once as a whole, with the memories that came
    into it: that gives what follows its last token and the memories for the next segment.
    """

    def __init__(self, net: nn.Module, size: int, mems: Mems | None, given: Mapping[str, Any]) -> None:
        self.net = net
        self.size = size
        self.mems = mems
        self.given = dict(given)
        self.first = 0
        self._reader = self._fresh()

    def _fresh(self) -> Reader:
        keywords = Keywords({**self.given, 'mems': self.mems}, 0, None)
        return Reader(self.net, window=False, keywords=keywords, expected=self.size, origin=self.first)

    def read(self, tokens: Tokens, last: int = 1) -> Float[Tensor, 'b k v']:
        logits = None
        while tokens.length - self.first >= self.size:
            segment = tokens.part(self.first, self.first + self.size)
            logits, self.mems = self.net(segment, mems=self.mems, return_mems=True, **self.given)
            self.first += self.size
            self._reader = self._fresh()
        return self._reader.read(tokens, last) if logits is None or self.first < tokens.length else logits[:, -last:]


class XLAutoregressiveWrapper(Module):
    """Trains and generates over segments of ``net.max_seq_len`` tokens (Transformer-XL, https://arxiv.org/abs/1901.02860).

    Args:
        net: a ``TransformerWrapper`` with ``max_mem_len`` > 0.
        ignore_index: targets left out of the loss; in the input they are replaced by ``pad_value``, unless they are tokens
            of the vocabulary.
        pad_value: the id for those and for everything after an end token.
        weight_by_valid: weigh each segment by its targets that count, which gives the mean over all of them; the default
            weighs by segment length, as the original does.
    """

    def __init__(self, net: nn.Module, ignore_index: int = -100, pad_value: int = 0, *, weight_by_valid: bool = False) -> None:
        super().__init__()
        self.pad_value = pad_value
        self.ignore_index = ignore_index
        self.net = net
        self.max_seq_len = getattr(net, 'max_seq_len', 0)
        self.weight_by_valid = weight_by_valid
        if self.max_seq_len < 1:
            raise ValueError(f'the net must have a max_seq_len, which is the length of a segment; got {self.max_seq_len}')

    def forward(self, x: Int[Tensor, 'b n'], mems: Mems | None = None, **kwargs: Any) -> Float[Tensor, '']:
        """The mean loss of predicting ``x[:, 1:]``, segment by segment."""
        if x.ndim != 2 or x.shape[1] < 2:
            raise ValueError(f'x must be token ids (batch, at least two tokens), got shape {tuple(x.shape)}')
        inputs, labels = x[:, :-1], x[:, 1:]
        if not 0 <= self.ignore_index < getattr(self.net, 'num_tokens', 0):
            # an ignored index that is a token of the vocabulary is read as that token
            inputs = inputs.masked_fill(inputs == self.ignore_index, self.pad_value)
        counts = (labels != self.ignore_index).sum() if self.weight_by_valid else labels.shape[1]
        losses = []
        for start in range(0, labels.shape[1], self.max_seq_len):
            segment = slice(start, start + self.max_seq_len)
            part, wanted = inputs[:, segment], labels[:, segment]
            logits, mems = self.net(part, mems=mems, return_mems=True, **kwargs)
            summed = token_cross_entropy(
                logits,
                wanted,
                ignore_index=self.ignore_index,
                is_log_prob=bool(getattr(self.net, 'output_is_log_prob', False)),
                reduction='sum',
            )
            valid = (wanted != self.ignore_index).sum()
            # a segment without a single valid target adds nothing
            share = summed if self.weight_by_valid else summed / valid.clamp(min=1) * wanted.shape[1]
            losses.append(share / counts)
        return torch.stack(losses).sum()

    @torch.no_grad()
    def generate(
        self,
        start_tokens: Tensor | list[Tensor],
        seq_len: int,
        eos_token: int | None = None,
        temperature: float = 1.0,
        filter_logits_fn: str | Filter = top_k,
        filter_kwargs: Mapping[str, Any] | None = None,
        mems: Mems | None = None,
        *,
        include_prompt: bool = False,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Int[Tensor, '... s']:
        """Sample ``seq_len`` tokens after prompts (..., t); the new tokens only, padded after the first ``eos_token``.

        Each token is predicted from the memories of the complete segments and the tokens since then; segments are counted
        from the start of the prompt. Other arguments as in ``AutoregressiveWrapper.generate``.
        """
        steps, eos = checked_length(seq_len), checked_eos(eos_token)
        prompt = prepare(start_tokens, None, self.pad_value)
        if prompt.start is not None:
            raise ValueError('prompts of different lengths do not share their segments; generate from them one by one')
        sampler = Sampler(temperature, resolve_filter(filter_logits_fn), filter_kwargs or {}, generator)
        tokens = Tokens(prompt.tokens, steps)
        with evaluating(self):
            reader = SegmentReader(self.net, self.max_seq_len, mems, kwargs)
            for _ in decode(reader, tokens, steps, sampler, eos=eos, pad=self.pad_value):
                pass
        return prompt.unpack(tokens.value if include_prompt else tokens.part(prompt.tokens.shape[1]))
