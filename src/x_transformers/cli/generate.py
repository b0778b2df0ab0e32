"""``x-transformers generate``."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from x_transformers.training.errors import TrainingError


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
    """Write with a trained model; the text is shown as it is sampled."""

    run: Annotated[str, tyro.conf.Positional]
    """Run folder, as written by x-transformers train; or a model folder with a tokenizer, as written by hf import."""
    prompt: str = '\n'
    """Beginning of the text."""
    length: int = 400
    """Tokens (bytes, if the run has no tokenizer) to write after the prompt."""
    samples: int = 1
    """Number of texts, one after the other."""
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
    json: bool = False
    """Print one line of JSON with the texts at the end."""

    def check(self) -> None:
        if self.length < 0:
            raise TrainingError(f'--length must not be negative, but is {self.length}')
        if self.samples < 1:
            raise TrainingError(f'--samples must be at least 1, but is {self.samples}')
        if not self.temperature >= 0:
            raise TrainingError(f'--temperature must not be negative, but is {self.temperature}')
        if self.top_k is not None and self.top_k < 1:
            raise TrainingError(f'--top-k must be at least 1, but is {self.top_k}')
        for name, value in (('--top-p', self.top_p), ('--min-p', self.min_p)):
            if value is not None and not 0 <= value <= 1:
                raise TrainingError(f'{name} must be between 0 and 1, but is {value}')
        if not self.prompt:
            raise TrainingError('--prompt must not be empty: the model needs a byte to start from')


def main(arguments: Sequence[str]) -> int:
    options = tyro.cli(GenerateOptions, args=list(arguments), prog='x-transformers generate')
    options.check()

    import torch
    from torch import nn

    from x_transformers.hf.text import is_model_folder, language_model
    from x_transformers.training.build import choose_device
    from x_transformers.training.run import load_run, tokenizer_of
    from x_transformers.training.sample import as_text, sample_text
    from x_transformers.training.tokens import load_tokenizer

    folder, device = Path(options.run), choose_device(options.device)
    model: nn.Module
    if is_model_folder(folder):
        model, tokenizer = language_model(folder, device), load_tokenizer(folder)
    else:
        model, tokenizer = load_run(folder, device), tokenizer_of(folder)
    if options.seed is not None:
        torch.manual_seed(options.seed)
    else:
        torch.seed()
    texts = []
    for number in range(options.samples):
        if options.samples > 1:
            print(f'{"" if number == 0 else chr(10)}--- {number + 1} of {options.samples}')
        sys.stdout.write(options.prompt)
        pieces = sample_text(
            model, tokenizer, options.prompt.encode('utf-8', 'surrogateescape'), options.length,
            temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, min_p=options.min_p,
        )  # fmt: skip
        written = []
        for text in as_text(pieces):
            written.append(text)
            sys.stdout.write(text)
            sys.stdout.flush()
        sys.stdout.write('\n')
        texts.append(''.join(written))
    if options.json:
        print(json.dumps({'run': options.run, 'prompt': options.prompt, 'texts': texts}))
    return 0
