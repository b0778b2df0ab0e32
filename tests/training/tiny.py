"""A language model small enough that a test can train it: one hidden layer over the last byte, with dropout."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.training.checkpoint import Checkpoints, load_checkpoint
from x_transformers.training.corpus import ByteData
from x_transformers.training.data import Corpus, Text
from x_transformers.training.options import TrainOptions
from x_transformers.training.randomness import seed_everything
from x_transformers.training.report import Metrics
from x_transformers.training.run import Run
from x_transformers.training.tokens import Bytes
from x_transformers.training.trainer import Trainer


class TinyModel(nn.Module):
    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, dim)
        self.hidden = nn.Linear(dim, dim)
        self.drop = nn.Dropout(0.2)
        self.out = nn.Linear(dim, 256)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.drop(self.hidden(self.embed(ids[:, :-1])).relu())
        return F.cross_entropy(self.out(hidden).flatten(0, 1), ids[:, 1:].flatten())


def make_text(length: int, seed: int) -> Text:
    generator = torch.Generator().manual_seed(seed)
    return Text([torch.randint(97, 105, (length,), generator=generator, dtype=torch.uint8)])


def make_corpus() -> Corpus:
    return Corpus(make_text(4000, 0), make_text(500, 1), 'made up')


def make_run(folder: Path, **changes: object) -> Run:
    """A run of the tiny model in a folder, at its beginning."""
    given = {'steps': 12, 'batch': 4, 'seq_len': 16, 'lr': 0.03, 'warmup': 2, 'val_every': 5, 'save_every': 4, 'val_bytes': 64}
    options = TrainOptions(**(given | {'device': None} | changes))  # type: ignore[arg-type]
    folder.mkdir(parents=True, exist_ok=True)
    seed_everything(options.seed)
    data, metrics = ByteData(make_corpus(), Bytes()), Metrics(folder)
    model = TinyModel()
    trainer = Trainer(
        model, data.batches(options), options, callbacks=[metrics], matrices=[model.hidden.weight], store=Checkpoints(folder)
    )  # fmt: skip
    run = Run(folder, options, data, trainer, metrics)
    trainer.evaluate = run.evaluate
    return run


def resumed(run: Run, path: Path) -> Run:
    run.trainer.resume(*load_checkpoint(path))
    return run
