"""Shared by ``generate`` and ``chat``: open a model, choose its next token, display text."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from x_transformers.training.errors import TrainingError

if TYPE_CHECKING:
    from torch import nn

    from x_transformers.training.tokens import Tokenizer

# everything below the space but tab and line break, delete, and the second set of control characters
CONTROL = re.compile('[\x00-\x08\x0b-\x1f\x7f-\x9f]')


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """How the next token is chosen."""

    length: int = 400
    """Most tokens (bytes, if the run has no tokenizer) to write after the prompt."""
    temperature: float = 1.0
    """Below 1 favours likely tokens; 0 always takes the likeliest."""
    top_k: int | None = None
    """Sample only from this many of the likeliest tokens."""
    top_p: float | None = 0.95
    """Only the likeliest tokens that together have this probability; None: no such limit."""
    min_p: float | None = None
    """Only tokens at least this probable relative to the likeliest."""
    seed: int | None = None
    """Seed of the choice; None: another text each time."""
    device: str = 'cpu'
    """cpu, cuda, ...; auto: the first accelerator there is."""

    def faults(self) -> list[str]:
        """A sentence for each value that makes no sense."""
        wrong = []
        if self.length < 0:
            wrong.append(f'--length must be at least 0, got {self.length}.')
        if not self.temperature >= 0:
            wrong.append(f'--temperature must be at least 0, got {self.temperature}.')
        if self.top_k is not None and self.top_k < 1:
            wrong.append(f'--top-k must be at least 1, got {self.top_k}.')
        for name, value in (('--top-p', self.top_p), ('--min-p', self.min_p)):
            if value is not None and not 0 <= value <= 1:
                wrong.append(f'{name} must be between 0 and 1, got {value}.')
        return wrong

    def check(self) -> None:
        if wrong := self.faults():
            raise TrainingError(' '.join(wrong))


class Writer(NamedTuple):
    """A trained model with its tokenizer."""

    model: nn.Module
    tokenizer: Tokenizer

    def write(self, prompt: str, options: SampleOptions) -> Iterator[str]:
        """What comes after the prompt, as it is sampled."""
        from x_transformers.training.sample import as_text, sample_text

        return as_text(
            sample_text(
                self.model, self.tokenizer, prompt.encode('utf-8', 'surrogateescape'), options.length,
                temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, min_p=options.min_p,
            )
        )  # fmt: skip


def open_writer(run: str, options: SampleOptions) -> Writer:
    """The model of a run folder, or of a model folder with a tokenizer; the seed is set."""
    import torch

    from x_transformers.hf.text import is_model_folder, language_model
    from x_transformers.training.build import choose_device
    from x_transformers.training.run import load_run, tokenizer_of
    from x_transformers.training.tokens import load_tokenizer

    folder, device = Path(run), choose_device(options.device)
    model: Any
    if is_model_folder(folder):
        model, tokenizer = language_model(folder, device), load_tokenizer(folder)
    else:
        model, tokenizer = load_run(folder, device), tokenizer_of(folder)
    if options.seed is None:
        torch.seed()
    else:
        torch.manual_seed(options.seed)
    return Writer(model, tokenizer)


def printable(text: str, stream: TextIO) -> str:
    """Text for a terminal: a control character, which could move the cursor or change colours, is shown as its number."""
    return CONTROL.sub(lambda found: f'\\x{ord(found[0]):02x}', text) if stream.isatty() else text


def show(text: str) -> None:
    sys.stdout.write(printable(text, sys.stdout))
    sys.stdout.flush()
