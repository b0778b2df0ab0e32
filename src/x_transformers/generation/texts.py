"""From single tokens to the text that a call of generation returns, and what generation refuses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.generation.modes import evaluating
from x_transformers.generation.prompts import GenerateError, Prompt
from x_transformers.tensor_types import Int


def run_text(models: Sequence[nn.Module], made: Iterator[Tensor], prompt: Prompt) -> Iterator[Int[Tensor, '...']]:
    with evaluating(*models) as mode:
        for token in made:
            yield prompt.unpack(token)
            mode.again()


def collected(run: Iterator[Tensor], prompt: Prompt, include_prompt: bool) -> Int[Tensor, '... s']:
    parts = [t.unsqueeze(-1) for t in run]
    if include_prompt or not parts:
        parts.insert(0, prompt.unpack(prompt.tokens if include_prompt else prompt.tokens[:, :0]))
    return torch.cat(parts, dim=-1)


def check_speculative(draft: nn.Module | None, lookup: int | None, amateurs: Sequence[Any]) -> None:
    if draft is not None and lookup is not None:
        raise GenerateError('draft_model and prompt_lookup are two ways to guess; give one of them')
    if amateurs:
        raise GenerateError('amateur_model cannot be combined with speculative decoding (draft_model, prompt_lookup)')
