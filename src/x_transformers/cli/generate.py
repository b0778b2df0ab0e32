"""``x-transformers generate``: write text with a trained model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Annotated

import tyro

from x_transformers.cli.writing import SampleOptions, open_writer, show


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions(SampleOptions):
    """Generate text with a trained model; the text is shown as it is sampled."""

    run: Annotated[str, tyro.conf.Positional]
    """Run folder, as written by x-transformers train; or a model folder with a tokenizer, as written by hf import."""
    prompt: str = '\n'
    """Beginning of the text."""
    samples: int = 1
    """Number of texts, one after the other."""
    json: bool = False
    """Print one line of JSON with the texts at the end."""

    def faults(self) -> list[str]:
        wrong = super().faults()
        if self.samples < 1:
            wrong.append(f'--samples must be at least 1, got {self.samples}.')
        if not self.prompt:
            wrong.append('--prompt must hold a token to start from, got nothing.')
        return wrong


def main(arguments: Sequence[str]) -> int:
    options = tyro.cli(GenerateOptions, args=list(arguments), prog='x-transformers generate')
    options.check()
    writer = open_writer(options.run, options)
    texts = []
    for number in range(options.samples):
        if options.samples > 1:
            print(f'{"" if number == 0 else chr(10)}--- {number + 1} of {options.samples}')
        show(options.prompt)
        written = []
        for text in writer.write(options.prompt, options):
            written.append(text)
            show(text)
        show('\n')
        texts.append(''.join(written))
    if options.json:
        print(json.dumps({'run': options.run, 'prompt': options.prompt, 'texts': texts}))
    return 0
