"""What a training run can be told. Each field is an option of the command line, and a key of its TOML file."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from x_transformers.training.errors import TrainingError

# what may differ between a run and its continuation: where and how often, never what is computed
FREE_ON_RESUME = {
    'data', 'device', 'threads', 'compile', 'tensorboard', 'save_every', 'sample_prompt', 'sample_length',
}  # fmt: skip


@dataclass(frozen=True)
class TrainOptions:
    data: tuple[str, ...] = ()
    """Files, folders or globs to learn from, as bytes; .gz is unpacked. Not given: the source of Python's standard library."""
    run_dir: str = 'runs/quickstart'
    """Folder for what the run writes; one that already holds a run is only touched with --resume."""
    resume: bool = False
    """Continue the run in --run-dir from its last checkpoint."""
    seed: int = 0
    """Seed of the weights and of the order of the data."""
    device: str = 'auto'
    """cpu, cuda, cuda:1, mps, ...; auto: the first accelerator there is, else the CPU."""
    threads: int | None = None
    """Threads on the CPU; None: PyTorch's choice."""
    compile: bool = False
    """Compile the model with torch.compile."""
    bf16: bool = False
    """Compute in bfloat16 where that is safe (autocast); weights stay in float32."""

    steps: int = 450
    """Number of optimiser steps."""
    batch: int = 8
    """Sequences per micro-batch."""
    grad_accum: int = 1
    """Micro-batches per step, whose gradients are averaged."""
    seq_len: int = 256
    """Bytes per sequence; all but the first are predicted."""

    optimizer: Literal['muon', 'adamw'] = 'muon'
    """muon: Muon for the matrices of attention and feed-forward, AdamW for the rest; adamw: AdamW for all."""
    lr: float = 3e-3
    """Highest learning rate of AdamW."""
    muon_lr: float = 1e-2
    """Highest learning rate of Muon, in AdamW's scale (updates are matched to AdamW's size)."""
    beta1: float = 0.9
    """AdamW's decay of the mean of the gradients."""
    beta2: float = 0.95
    """AdamW's decay of the mean of their squares."""
    weight_decay: float = 0.1
    """Decay of the matrices; vectors (norms, biases) and embeddings do not decay."""
    clip: float = 1.0
    """Largest norm of the gradient; 0: no clipping."""
    schedule: Literal['cosine', 'linear', 'constant'] = 'cosine'
    """How the learning rate falls after the warm-up."""
    warmup: int = 30
    """Steps over which the learning rate rises."""
    final_lr: float = 0.0
    """Learning rate of the last step, as a share of the highest."""

    val_every: int = 100
    """Steps between validations on the held-out text; 0: only at the end."""
    val_bytes: int = 32_768
    """Bytes that such a validation looks at, spread over the held-out text."""
    final_bytes: int = 1_000_000
    """Bytes at the start of the held-out text that the final figure and the compressors are measured on."""
    save_every: int = 50
    """Steps between checkpoints; 0: only at the end and when interrupted."""
    sample_prompt: str = 'def '
    """Beginning of the sample that is written at the end."""
    sample_length: int = 400
    """Bytes of that sample; 0: none."""
    tensorboard: bool = False
    """Log for TensorBoard too (it needs the extra `tensorboard`)."""

    def check(self) -> None:
        """Refuse numbers that make no sense, naming the first."""
        least: dict[str, float] = {
            'steps': 1, 'batch': 1, 'grad_accum': 1, 'seq_len': 2, 'warmup': 0, 'val_every': 0, 'val_bytes': 1,
            'final_bytes': 2, 'save_every': 0, 'sample_length': 0, 'lr': 0, 'muon_lr': 0, 'weight_decay': 0, 'clip': 0,
            'beta1': 0, 'beta2': 0, 'final_lr': 0, 'seed': 0,
        }  # fmt: skip
        for name, low in least.items():
            if not getattr(self, name) >= low:
                raise TrainingError(f'{option(name)} must be at least {low:g}, but is {getattr(self, name):g}')
        for name in ('beta1', 'beta2'):
            if getattr(self, name) >= 1:
                raise TrainingError(f'{option(name)} must be below 1, but is {getattr(self, name):g}')
        if self.threads is not None and self.threads < 1:
            raise TrainingError(f'--threads must be at least 1, but is {self.threads}')
        if self.sample_length and not self.sample_prompt:
            raise TrainingError('--sample-prompt must not be empty: the sample needs a first byte')

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {'data': list(self.data)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainOptions:
        known = {field.name for field in dataclasses.fields(cls)}
        kept = {name: value for name, value in values.items() if name in known}
        return cls(**kept | {'data': tuple(kept.get('data', ()))})


def option(name: str) -> str:
    """A field's name as typed on the command line."""
    return f'--{name.replace("_", "-")}'


def merge_for_resume(given: TrainOptions, saved: TrainOptions) -> TrainOptions:
    """The saved options, with what may change on resuming taken from the command line where it is not the default.

    Errors: ``TrainingError`` for an option that was given, differs from the run's, and would change what is computed.
    """
    usual = TrainOptions()
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(TrainOptions):
        value, before, default = (getattr(source, field.name) for source in (given, saved, usual))
        if field.name in ('run_dir', 'resume'):
            changes[field.name] = value
        elif value in (default, before):
            continue
        elif field.name in FREE_ON_RESUME:
            changes[field.name] = value
        else:
            raise TrainingError(
                f'{option(field.name)} {value} differs from the {before} that this run was started with; '
                'a resumed run keeps its options: leave it out, or start a new run in another --run-dir'
            )
    return dataclasses.replace(saved, **changes)
