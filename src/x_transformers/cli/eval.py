"""``x-transformers eval``: the loss of a trained model on other texts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from x_transformers.training.errors import TrainingError


@dataclasses.dataclass(frozen=True)
class EvalOptions:
    """Loss, perplexity and bits per byte of a trained model on documents, each with a 95 % interval over them."""

    run: Annotated[str, tyro.conf.Positional]
    """Run folder, as written by x-transformers train."""
    data: tuple[str, ...] = ()
    """Files, folders or globs: text, jsonl, parquet, also as .gz or .zst."""
    document_separator: str | None = None
    """Text between two documents of a text file; None: each file is one, cut at every 1 MiB."""
    seq_len: int | None = None
    """Tokens per sequence; None: as many as in training."""
    batch: int = 8
    """Sequences per batch."""
    device: str = 'auto'
    """cpu, cuda, ...; auto: the first accelerator there is, else the CPU."""
    json: bool = False
    """Print one line of JSON at the end."""

    def check(self) -> None:
        wrong = [] if self.data else ['--data must name files or folders, got nothing.']
        if self.seq_len is not None and self.seq_len < 2:
            wrong.append(f'--seq-len must be at least 2, got {self.seq_len}.')
        if self.batch < 1:
            wrong.append(f'--batch must be at least 1, got {self.batch}.')
        if wrong:
            raise TrainingError(' '.join(wrong))


def main(arguments: Sequence[str]) -> int:
    options = tyro.cli(EvalOptions, args=list(arguments), prog='x-transformers eval')
    options.check()

    from x_transformers.training.build import choose_device
    from x_transformers.training.corpus import separator_of
    from x_transformers.training.data import find_sources
    from x_transformers.training.documents import read_documents
    from x_transformers.training.evaluation import evaluate
    from x_transformers.training.run import RunConfig, load_run, tokenizer_of

    run = Path(options.run)
    config, device = RunConfig.read(run), choose_device(options.device)
    model, tokenizer = load_run(run, device), tokenizer_of(run)
    separator = separator_of(options.document_separator)
    documents = (document for source in find_sources(options.data) for document in read_documents(source, separator))
    evaluation = evaluate(
        model, tokenizer, documents, window=options.seq_len or config.options.seq_len, batch=options.batch, device=device
    )
    print(evaluation)
    if options.json:
        print(json.dumps({'run': options.run} | dataclasses.asdict(evaluation)))
    return 0
