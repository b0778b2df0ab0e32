"""``x-transformers export``: write a model as a program, as ONNX or as safetensors."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from x_transformers.training.errors import TrainingError

Format = Literal['pt2', 'onnx', 'safetensors']
RANGE = re.compile(r'(\d+)(?::(\d+))?')


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Write a trained model in a format that runs, or can be read, without this library."""

    run: Annotated[str, tyro.conf.Positional]
    """Run folder, as written by x-transformers train; or a model folder, as written by save_pretrained or hf import."""
    format: Format
    """pt2: a program for torch; onnx: one for onnxruntime; safetensors: the weights only, with the flags in the metadata."""
    out: str | None = None
    """File to write; None: model.pt2, model.onnx or weights.safetensors in the folder of the model."""
    what: Literal['logits', 'loss', 'step'] = 'logits'
    """What the program computes; step: new tokens, given a past of plain tensors."""
    batch: str = '1:64'
    """Minimum and maximum number of rows, or one number."""
    length: str = '1:4096'
    """Minimum and maximum number of tokens, or one number; absolute positions limit the maximum."""
    mask: bool = False
    """The program also takes a mask: True for tokens, False for padding."""
    json: bool = False
    """Print one line of JSON at the end."""

    @property
    def target(self) -> Path:
        usual = 'weights.safetensors' if self.format == 'safetensors' else f'model.{self.format}'
        return Path(self.run) / usual if self.out is None else Path(self.out)


def range_of(option: str, text: str) -> tuple[int, int]:
    match = RANGE.fullmatch(text)
    if match is None:
        raise TrainingError(f'{option} must be LEAST:MOST, such as 1:64, or one number, got {text!r}.')
    return int(match[1]), int(match[2] or match[1])


def open_model(run: str) -> Any:
    from x_transformers.hf.text import is_model_folder
    from x_transformers.module import Module
    from x_transformers.training.run import load_run

    folder = Path(run)
    return Module.from_pretrained(folder) if is_model_folder(folder) else load_run(folder).eval()


def write_program(options: ExportOptions, model: Any, batch: tuple[int, int], length: tuple[int, int]) -> None:
    from x_transformers.export import ExportError, export, onnx, save
    from x_transformers.saving.folder import write_model_weights

    settings: dict[str, Any] = {'batch': batch, 'length': length, 'what': options.what, 'mask': options.mask}
    try:
        if options.format == 'safetensors':
            write_model_weights(model, options.target)
        elif options.format == 'onnx':
            onnx(model, options.target, **settings)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                save(export(model, **settings), options.target)
    except (ExportError, OSError) as error:
        raise TrainingError(f'{options.target} was not written: {" ".join(str(error).split())}') from error


def main(arguments: Sequence[str]) -> int:
    options = tyro.cli(ExportOptions, args=list(arguments), prog='x-transformers export')
    batch, length = range_of('--batch', options.batch), range_of('--length', options.length)
    if options.target.is_dir() or not options.target.parent.is_dir():
        raise TrainingError(f'--out must be a file in a folder that exists, got {options.target}.')
    model = open_model(options.run)
    write_program(options, model, batch, length)
    size = options.target.stat().st_size
    if options.json:
        summary = {'run': options.run, 'format': options.format, 'file': str(options.target), 'bytes': size}
        program = {} if options.format == 'safetensors' else {'what': options.what, 'batch': batch, 'length': length}
        print(json.dumps(summary | program | {'parameters': sum(p.numel() for p in model.parameters())}))
    else:
        print(f'wrote {options.target}: {size:,} bytes')
    return 0
