"""``x-transformers hf``: explain, import and export models in the Hugging Face format."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from x_transformers.saving.errors import FolderError


@dataclasses.dataclass(frozen=True)
class Explain:
    """Print the flags that correspond to a folder's config, as Python code that builds the model."""

    folder: Annotated[str, tyro.conf.Positional]
    """Folder in the Hugging Face format, or a name on the Hub."""
    json: bool = False
    """Print one line of JSON at the end."""

    def run(self) -> None:
        from x_transformers.hf import explain
        from x_transformers.saving.hub import fetched
        from x_transformers.saving.tensors import json_object

        config = json_object(fetched(self.folder) / 'config.json')
        python = explain(config)
        print(python)
        if self.json:
            print(json.dumps({'folder': self.folder, 'family': config.get('model_type'), 'python': python}))


@dataclasses.dataclass(frozen=True)
class Import:
    """Convert a folder in the Hugging Face format, with its tokenizer, to a folder of this library."""

    source: Annotated[str, tyro.conf.Positional]
    """Folder in the Hugging Face format, or a name on the Hub."""
    target: Annotated[str, tyro.conf.Positional]
    """Folder to write."""
    dtype: str | None = None
    """The dtype of the weights, such as bfloat16; None: the one that they are stored in."""
    json: bool = False
    """Print one line of JSON at the end."""

    def run(self) -> None:
        from x_transformers.hf import from_hf
        from x_transformers.hf.convert import copy_tokenizer
        from x_transformers.saving.hub import fetched

        source, target = fetched(self.source), Path(self.target)
        from_hf(source, dtype=dtype_named(self.dtype)).save_pretrained(target)
        report(target, copy_tokenizer(source, target), as_json=self.json)


@dataclasses.dataclass(frozen=True)
class Export:
    """Convert a folder of this library, with its tokenizer, to the Hugging Face format."""

    source: Annotated[str, tyro.conf.Positional]
    """Folder that save_pretrained, train or hf import wrote."""
    target: Annotated[str, tyro.conf.Positional]
    """Folder to write."""
    family: str | None = None
    """The model_type to write, such as llama; None: the one that was imported, or any that fits."""
    json: bool = False
    """Print one line of JSON at the end."""

    def run(self) -> None:
        from x_transformers.hf import to_hf
        from x_transformers.hf.convert import copy_tokenizer
        from x_transformers.module import Module
        from x_transformers.saving.tensors import json_object
        from x_transformers.training.build import NUM_BYTES
        from x_transformers.training.tokens import save_for_transformers

        source, target = Path(self.source), Path(self.target)
        model: Any = Module.from_pretrained(source)
        to_hf(model, target, family=self.family)
        names = copy_tokenizer(source, target)
        config = json_object(source / 'config.json')
        # of a run
        if 'training' in config and (names or config.get('vocabulary') in (None, NUM_BYTES)):
            names += save_for_transformers(target, model.max_seq_len)
        report(target, names, as_json=self.json)


def dtype_named(name: str | None) -> Any:
    import torch

    dtype = None if name is None else getattr(torch, name, None)
    if name is not None and not isinstance(dtype, torch.dtype):
        raise FolderError(f'--dtype must name a dtype of torch, such as bfloat16, got {name!r}.')
    return dtype


def report(target: Path, tokenizer: list[str], *, as_json: bool) -> None:
    print(f'wrote {target}' + (f' with {", ".join(tokenizer)}' if tokenizer else ', without a tokenizer'))
    if as_json:
        print(json.dumps({'folder': str(target), 'tokenizer': tokenizer}))


COMMANDS: dict[str, Callable[..., Any]] = {'explain': Explain, 'import': Import, 'export': Export}


def main(arguments: Sequence[str]) -> int:
    command = tyro.extras.subcommand_cli_from_dict(COMMANDS, args=list(arguments), prog='x-transformers hf')
    command.run()
    return 0
