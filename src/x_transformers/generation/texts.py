"""From single tokens to the result of a generation call, and the refusals of generation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.generation.modes import evaluating
from x_transformers.generation.prompts import GenerateError, Prompt
from x_transformers.tensor_types import Int


def run_text(models: Sequence[nn.Module], tokens: Iterator[Int[Tensor, ' b']], prompt: Prompt) -> Iterator[Int[Tensor, '...']]:
    with evaluating(*models) as mode:
        for token in tokens:
            yield prompt.unpack(token)
            mode.again()


def collected(run: Iterator[Int[Tensor, '...']], prompt: Prompt, include_prompt: bool) -> Int[Tensor, '... s']:
    parts = [t.unsqueeze(-1) for t in run]
    if include_prompt or not parts:
        parts.insert(0, prompt.unpack(prompt.tokens if include_prompt else prompt.tokens[:, :0]))
    return torch.cat(parts, dim=-1)


def check_speculative(
    net: nn.Module, draft: nn.Module | None, lookup: int | None, own_heads: bool, amateurs: Sequence[Any]
) -> None:
    ways = {'draft_model': draft is not None, 'prompt_lookup': lookup is not None, 'self_speculative': own_heads}
    names = [name for name, is_given in ways.items() if is_given]
    if len(names) > 1:
        raise GenerateError(f'at most one of {" and ".join(names)} must be given, got {len(names)}. Leave out the others.')
    if own_heads and getattr(net, 'multi_token_heads', 1) < 2:
        raise GenerateError(
            'self_speculative must go with a net that has heads for later tokens, got one without. '
            'Build it with multi_token_heads=2, or more.'
        )
    if amateurs:
        raise GenerateError(f'amateur_model must be None with speculative decoding ({", ".join(ways)}). Leave out one of them.')
