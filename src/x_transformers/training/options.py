"""The options of a training run. Each field is an option of the command line, and a key of its TOML file."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from x_transformers.flags.base import kinds_of, one_kind, type_hints
from x_transformers.training.errors import TrainingError

# over how many processes a model is spread, beside its batch; what a tensor group may share besides
AXES = ('tensor', 'context', 'pipeline')
WITH_TENSOR = ('sequence_parallel', 'loss_parallel')

# what may differ between a run and its continuation: where, how often and how long, never what a step computes
FREE_ON_RESUME = {
    'data', 'data_cache', 'device', 'threads', 'compile', 'log', 'tensorboard', 'val_every', 'val_bytes', 'val_data',
    'final_bytes', 'save_every', 'keep', 'keep_best', 'sample_prompt', 'sample_length', 'sample_every', 'steps', 'peak_flops',
    'exit_on_term', 'json', 'auto_resume', 'shard', 'checkpointing', 'offload', 'timeout', *AXES, *WITH_TENSOR,
}  # fmt: skip

# (lowest, below which it must stay) of each number
RANGES: dict[str, tuple[float, float]] = {
    'steps': (1, math.inf), 'grad_accum': (1, math.inf), 'lr': (0, math.inf), 'muon_lr': (0, math.inf), 'beta1': (0, 1),
    'beta2': (0, 1), 'weight_decay': (0, math.inf), 'clip': (0, math.inf), 'warmup': (0, math.inf), 'final_lr': (0, math.inf),
    'ema': (0, 1), 'val_every': (0, math.inf), 'save_every': (0, math.inf), 'seed': (0, 2**63), 'batch': (1, math.inf),
    'seq_len': (2, math.inf), 'val_bytes': (1, math.inf), 'final_bytes': (2, math.inf), 'sample_length': (0, math.inf),
    'threads': (1, math.inf), 'vocab': (257, math.inf), 'keep': (1, math.inf), 'sample_every': (0, math.inf),
    'lora': (0, math.inf), 'exit_on_term': (0, 256), 'peak_flops': (1, math.inf),
    'mup_base': (1, math.inf), 'tensor': (1, math.inf), 'context': (1, math.inf), 'pipeline': (1, math.inf),
    'timeout': (1, 1e8),
}  # fmt: skip


def often(default: Any) -> Any:
    """A field that the short help of the command lists."""
    return dataclasses.field(default=default, metadata={'often': True})


@dataclass(frozen=True)
class TrainerOptions:
    """What the training loop itself needs; ``Trainer`` takes these in memory, without any file."""

    steps: int = 1000
    """Number of optimizer steps."""
    grad_accum: int = 1
    """Micro-batches per step, whose gradients are averaged."""
    optimizer: Literal['muon', 'adamw', 'sgd'] = 'adamw'
    """muon: Muon for the matrices of attention and feed-forward, AdamW for the rest; adamw or sgd: for all parameters."""
    lr: float = 1e-3
    """Highest learning rate of AdamW (or SGD)."""
    muon_lr: float = 1e-2
    """Highest learning rate of Muon, in AdamW's scale (updates are matched to AdamW's size)."""
    mup: bool = False
    """What was tuned at the width --mup-base holds at this one: rates and starts by the rules of μP; AdamW only."""
    mup_base: int = 256
    """The width at which --lr was tuned; heads are in proportion."""
    beta1: float = 0.9
    """AdamW's decay of the mean of the gradients (SGD's momentum)."""
    beta2: float = 0.95
    """AdamW's decay of the mean of their squares."""
    weight_decay: float = 0.1
    """Decay of the weights of linear maps; gains, norms, biases, embeddings and memories do not decay."""
    clip: float = 1.0
    """Largest norm of the gradient; 0: no clipping."""
    schedule: Literal['cosine', 'wsd', 'linear', 'constant'] = 'cosine'
    """How the learning rate falls after the warm-up; wsd: it stays, then falls linearly."""
    warmup: int = 0
    """Steps over which the learning rate rises."""
    decay_share: float = 0.2
    """Share of all steps over which the schedule wsd falls."""
    final_lr: float = 0.0
    """Learning rate of the last step, as a share of the highest."""
    ema: float = 0.0
    """Decay of a moving average of the weights, which is then what is evaluated and written; 0: none."""
    precision: Literal['fp32', 'bf16'] = 'fp32'
    """bf16: compute in bfloat16 where that is safe (autocast); weights stay in float32."""
    compile: bool = often(False)
    """Compile the model with torch.compile."""
    seed: int = often(0)
    """Seed of everything random: the weights, the order of the data, dropout."""
    device: str | None = None
    """cpu, cuda, cuda:1, mps, ...; auto: the first accelerator there is, else the CPU; None: where the model is."""
    val_every: int = 100
    """Steps between evaluations; 0: only at the end."""
    save_every: int = 0
    """Steps between checkpoints; 0: only at the end and when interrupted."""

    def faults(self) -> list[str]:
        """A sentence for each value that makes no sense."""
        found = []
        hints = type_hints(type(self))
        for field in dataclasses.fields(self):
            value, hint = getattr(self, field.name), hints[field.name]
            if not fits(value, hint):
                literal = get_origin(hint) is Literal
                wanted = ' or '.join(get_args(hint) if literal else (one_kind(kind)[0] for kind in kinds_of(hint)))
                found.append(f'{option(field.name)} must be {wanted}, got {value!r}.')
            elif field.name in RANGES and value is not None:
                low, high = RANGES[field.name]
                # `not >=` refuses what is not a number, too
                if not value >= low or not value < high:
                    bounds = f'at least {low:g}' + (f' and below {high:g}' if high < math.inf else '')
                    found.append(f'{option(field.name)} must be {bounds}, got {value:g}.')
        if self.mup and self.optimizer != 'adamw':
            found.append(f'--mup must go with --optimizer adamw, for which its rules are, got {self.optimizer!r}.')
        if not 0 < self.decay_share <= 1:
            found.append(f'--decay-share must be above 0 and at most 1, got {self.decay_share:g}.')
        return found

    def check(self) -> None:
        """Refuse values that make no sense, naming all of them."""
        found = self.faults()
        if found:
            raise TrainingError(' '.join(found))


@dataclass(frozen=True)
class TrainOptions(TrainerOptions):
    """Options of ``x-transformers train``, in addition to the flags of the model."""

    data: tuple[str, ...] = often(())
    """Files, folders or globs to train on: text, jsonl, parquet, folders that `datasets` has saved, each also as .gz or .zst.

    A mixture has weights, as in a/:0.7,b/:0.3. By default: the source of Python's standard library."""
    tokenizer: str = often('bytes')
    """bytes; bpe: train one on the data; or a file that ends in .json (tokenizers), .model (sentencepiece) or .tiktoken."""
    vocab: int = often(8192)
    """Vocabulary size of a trained tokenizer."""
    document_separator: str | None = None
    """Text between two documents of a text file (\\n is a line break); None: each file is one, cut at every 1 MiB."""
    mask_documents: bool = False
    """Documents in one sequence do not attend to each other, and none predicts the first token of the next."""
    data_cache: str | None = None
    """Folder for tokenized data, which later runs reuse; None: x-transformers in $XDG_CACHE_HOME, or in ~/.cache."""
    from_run: str | None = often(None)
    """Start from the weights (and flags) of this run folder, or from a file of weights; --from is the same."""
    lora: int = often(0)
    """LoRA: train only changes of this rank to the linear maps of the layers; 0: train all weights."""
    run_dir: str = often('runs/quickstart')
    """Output folder of the run; a folder that already holds a run is only changed with --resume."""
    resume: bool = often(False)
    """Continue the run in --run-dir from its last checkpoint; with more --steps also one that has finished."""
    auto_resume: bool = False
    """--resume if --run-dir holds a run, else a new run: for those who start the same command again, as torchrun does."""
    device: str | None = often('auto')
    """cpu, cuda, cuda:1, mps, ...; auto: the first accelerator there is, else the CPU."""
    threads: int | None = None
    """Threads on the CPU; None: PyTorch's choice."""
    bf16: bool = False
    """The same as --precision bf16."""
    shard: Literal['none', 'full', 'hybrid'] = often('none')
    """With torchrun: none: replicas; full: shards over all processes; hybrid: shards within a node, replicas across nodes."""
    tensor: int = 1
    """With torchrun: the number of processes that divide the heads, features and experts of each layer."""
    sequence_parallel: bool = False
    """With --tensor: between branches, each process of a group holds a slice of every sequence."""
    loss_parallel: bool = False
    """With --tensor: each process of a group holds the logits of a part of the vocabulary."""
    context: int = 1
    """With torchrun: the number of processes that divide each sequence."""
    pipeline: int = 1
    """With torchrun: the number of pipeline stages."""
    checkpointing: Literal['none', 'full', 'selective'] = 'none'
    """With torchrun: what the backward recomputes; full: all of each layer; selective: all but matrix products."""
    offload: bool = False
    """With --shard: keep weights, gradients and optimizer state in CPU memory."""
    timeout: float = 600.0
    """With torchrun: seconds after which a process gives up on another that does not respond."""

    steps: int = often(450)
    """Number of optimizer steps."""
    batch: int = often(8)
    """Sequences per micro-batch, over all processes."""
    seq_len: int = often(256)
    """Bytes per sequence; all but the first are predicted."""

    optimizer: Literal['muon', 'adamw', 'sgd'] = often('muon')
    """muon: Muon for the matrices of attention and feed-forward, AdamW for the rest; adamw or sgd: for all parameters."""
    lr: float = often(3e-3)
    """Highest learning rate of AdamW (or SGD)."""
    warmup: int = 30
    """Steps over which the learning rate rises."""

    val_data: tuple[str, ...] = often(())
    """More files or folders to evaluate on, each as a separate set."""
    val_bytes: int = 32_768
    """Bytes that a validation during training reads, spread over the held-out text."""
    final_bytes: int = 1_000_000
    """Bytes at the start of the held-out text on which the final figure and the compressors are measured."""
    save_every: int = 50
    """Steps between checkpoints; 0: only at the end and when interrupted."""
    keep: int = 1
    """Number of newest checkpoints to keep."""
    keep_best: bool = False
    """Also keep the weights with the lowest held-out loss, as best.safetensors."""
    sample_every: int = 0
    """Steps between samples while training, written to samples.txt; 0: only at the end."""
    sample_prompt: str = 'def '
    """Beginning of the sample that is written at the end."""
    sample_length: int = 400
    """Bytes of that sample; 0: none."""
    log: tuple[Literal['tensorboard', 'trackio', 'wandb'], ...] = ()
    """Loggers in addition to metrics.jsonl; each needs its package."""
    tensorboard: bool = False
    """The same as --log tensorboard."""
    peak_flops: float | None = None
    """Peak operations per second of the device, to log the fraction reached; None: known for some GPUs."""
    exit_on_term: int | None = None
    """Exit status after SIGTERM, when everything is saved; None: 143."""
    json: bool = often(False)
    """Print one line of JSON with the results at the end."""

    def faults(self) -> list[str]:
        found = super().faults()
        if (self.sample_length or self.sample_every) and not self.sample_prompt:
            found.append('--sample-prompt must not be empty, got nothing: the sample needs a first byte.')
        if self.lora and self.from_run is None:
            found.append('--lora must have weights to change, got none. Name them with --from.')
        return found

    def to_json(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainOptions:
        """Errors: ``ValueError`` for a value of the wrong type."""
        known = {field.name for field in dataclasses.fields(cls)}
        kept = {name: value for name, value in values.items() if name in known}
        tupled: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in kept.items()}
        read = cls(**tupled)
        found = read.faults()
        if found:
            raise ValueError(' '.join(found))
        return read


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the type of a field."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    return any(one_kind(kind)[1](value) for kind in kinds_of(hint))


def option(name: str) -> str:
    """A field's name as typed on the command line."""
    return f'--{name.replace("_", "-")}'


def merge_for_resume(given: TrainOptions, saved: TrainOptions, typed: Collection[str]) -> TrainOptions:
    """The saved options, with what was typed and may change on resuming.

    Args:
        typed: names of the fields that were typed or stand in the file: others say nothing, whatever their value.

    Errors: ``TrainingError`` for an option that was typed, differs from the run's, and would change what is computed.
    """
    changes: dict[str, Any] = {'run_dir': given.run_dir, 'resume': given.resume}
    wrong = []
    for field in dataclasses.fields(TrainOptions):
        value, before = getattr(given, field.name), getattr(saved, field.name)
        if field.name in changes or field.name not in typed or value == before:
            continue
        if field.name in FREE_ON_RESUME:
            changes[field.name] = value
        else:
            wrong.append(f'{option(field.name)} must be {before}, with which this run was started, got {value}.')
    if wrong:
        raise TrainingError(
            ' '.join(wrong) + ' A resumed run keeps its options: leave them out, or start a new run in another --run-dir.'
        )
    return dataclasses.replace(saved, **changes)
