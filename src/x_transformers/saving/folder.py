"""Saving a model as a folder, and loading a model from one."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.flags.base import FlagError
from x_transformers.saving.errors import FolderError
from x_transformers.saving.made import Made
from x_transformers.saving.plain import from_plain, to_plain, without_memory
from x_transformers.saving.tensors import INDEX, WEIGHTS, TensorSource, Weights, json_object, write_tensors
from x_transformers.tensor_types import Shaped, StateDict

CONFIG, CARD = 'config.json', 'README.md'
FORMAT = 'x_transformers'
# what models compute in
COMPUTED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# raised when an older library could no longer read a folder
VERSION = 1
HEADER = ('format', 'format_version', 'library_version', 'model', 'tied', 'hf')
# what the trainer writes beside these: a run folder is a model folder, too
OF_RUNS = ('flags', 'training', 'corpus', 'vocabulary', 'torch')


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A new folder beside ``folder`` that takes its name when everything is written; files that others put there stay."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists() and not folder.is_dir():
        raise FolderError(f'{folder} must be a folder or a new name, but is a file.')
    fresh = Path(tempfile.mkdtemp(prefix=f'.{folder.name}-', dir=folder.parent))
    try:
        yield fresh
        fresh.chmod(0o755)
        if not folder.exists():
            fresh.rename(folder)
            return
        names = {file.name for file in fresh.iterdir()}
        # weights of an earlier save would be taken for some of this one's
        stale = [folder / WEIGHTS, folder / INDEX, *folder.glob('model-*-of-*.safetensors')]
        for file in fresh.iterdir():
            file.replace(folder / file.name)
        for file in stale:
            if file.name not in names:
                file.unlink(missing_ok=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def library_version() -> str:
    try:
        return version('x-transformers')
    except PackageNotFoundError:
        return 'unknown'


def once_each(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(every tensor under its first name, the names of others that are the same: their first name)."""
    first: dict[int, str] = {}
    kept: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    # keep_vars: the parameters themselves, by which sharing is told
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in first:
            same[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            kept[name] = tensor
    return kept, same


def model_config(model: Made) -> dict[str, Any]:
    """What ``config.json`` says of a model."""
    _, same = once_each(model)
    return {
        'format': FORMAT,
        'format_version': VERSION,
        'library_version': library_version(),
        'model': to_plain(model),
        **({'tied': same} if same else {}),
        **({'hf': model.hf_config} if getattr(model, 'hf_config', None) is not None else {}),
    }


def save_model(model: Made, folder: str | Path) -> None:
    """Write ``config.json``, ``model.safetensors`` and, unless there is one, a model card. Existing weights are replaced."""
    folder = Path(folder)
    config = model_config(model)
    tensors, _ = once_each(model)
    with written_whole(folder) as fresh:
        write_tensors(fresh, tensors.items(), metadata={'format': 'pt'})
        (fresh / CONFIG).write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')
        if not (folder / CARD).exists():
            (fresh / CARD).write_text(card(model, config['model']), encoding='utf-8')


def write_model_weights(model: Made, target: Path) -> None:
    """One safetensors file: tied weights once, the flags as JSON in its metadata. It takes its name when all is written."""
    tensors, same = once_each(model)
    metadata = {'format': 'pt', 'flags': json.dumps(to_plain(model)), 'tied': json.dumps(same)}
    with tempfile.TemporaryDirectory(prefix=f'.{target.name}-', dir=target.parent) as folder:
        write_tensors(Path(folder), tensors.items(), metadata=metadata, shard=None)
        (Path(folder) / WEIGHTS).replace(target)


def card(model: nn.Module, plain: Mapping[str, Any]) -> str:
    count = sum(parameter.numel() for parameter in model.parameters())
    flags = json.dumps(plain, indent=2)
    return (
        '---\nlibrary_name: x-transformers\ntags:\n- x-transformers\n- pytorch\n---\n\n'
        f'# {plain["class"]}\n\n{count:,} parameters.\n\n'
        f'```python\nfrom x_transformers import {plain["class"]}\n\n'
        f"model = {plain['class']}.from_pretrained('path/of/this/folder')\n```\n\n## Flags\n\n```json\n{flags}\n```\n"
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The config of one of our folders. Raises FolderError for any other."""
    if not folder.is_dir():
        raise FolderError(f'{folder} is no folder.')
    config = json_object(folder / CONFIG)
    if config.get('format') != FORMAT:
        kind = config.get('model_type')
        hint = f' Its model_type is {kind!r}: use x_transformers.hf.from_hf.' if kind else ''
        if 'training' in config and 'flags' in config:
            hint = ' It is a run of an earlier version: use x_transformers.training.run.load_run.'
        raise FolderError(f'{folder / CONFIG} must have "format": "{FORMAT}", got {config.get("format")!r}.{hint}')
    if not isinstance(config.get('format_version'), int) or config['format_version'] > VERSION:
        raise FolderError(
            f'{folder / CONFIG} is of format version {config.get("format_version")!r}, and this library reads {VERSION}. '
            'Install a newer one.'
        )
    unknown = [name for name in config if name not in (*HEADER, *OF_RUNS)]
    if unknown or not isinstance(config.get('model'), Mapping):
        what = f'unknown keys {", ".join(map(repr, unknown))}' if unknown else "no 'model'"
        raise FolderError(f'{folder / CONFIG} has {what}; its keys are {", ".join(HEADER)}.')
    return config


def load(
    cls: type[Made], folder: str | Path, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Any:
    """A model in evaluation mode from a folder that ``save_model`` or the trainer has written, one tensor at a time.

    ``cls``: what it must be, or the model inside of it, which is then returned alone. ``dtype``: of floating weights; None: as
    they are stored. Raises FolderError for a folder that does not hold such a model, UnknownFlag for flags that this version
    does not know.
    """
    folder = Path(folder)
    config = read_config(folder)
    check_asked(dtype)
    name = config['model'].get('class')
    with without_memory():
        model = from_plain(config['model'], extra=cls)
    asked = model_within(model, cls)
    if asked is None:
        raise FolderError(f'{folder} holds a {name}, not a {cls.__name__}. Use {name}.from_pretrained.')
    weights = Weights(folder)
    same = config.get('tied', {})
    wanted, _ = once_each(model)
    check_weight_names(folder, wanted, weights, same)
    check_dtypes(folder, {name: weights.stored(name).dtype for name, t in wanted.items() if t.is_floating_point()}, dtype)
    fill_model(model, {target: weights.stored(target) for target in wanted}, device=device, dtype=dtype)
    if 'hf' in config:
        model.hf_config = config['hf']
    return asked.eval()


def model_within(model: Any, cls: type[Made]) -> Made | None:
    """The model itself, or the first below its objectives (``net``) that is of this class."""
    while model is not None and not isinstance(model, cls):
        model = getattr(model, 'net', None)
    return model


def check_weight_names(folder: Path, wanted: StateDict, weights: Weights, same: Mapping[str, str]) -> None:
    missing = [name for name in wanted if name not in weights]
    left = [name for name in weights if name not in wanted and name not in same]
    shapes = [
        f'{name} is {weights.shape(name)} in the file and {tuple(t.shape)} in the model'
        for name, t in wanted.items()
        if name in weights and weights.shape(name) != tuple(t.shape)
    ]
    refuse_weights(folder, missing, left, shapes)


def check_asked(dtype: torch.dtype | None) -> None:
    """Raises FolderError for a dtype that no model computes in."""
    if dtype is not None and dtype not in COMPUTED:
        raise FolderError(f'dtype must be one of {", ".join(map(str, COMPUTED))}, got {dtype}.')


def check_dtypes(folder: Path, stored: Mapping[str, torch.dtype], dtype: torch.dtype | None) -> None:
    """Raises FolderError for weights in a dtype that no model computes in, unless they are turned into another.

    ``stored``: of each floating tensor's name; ``dtype``: what they are turned into.
    """
    for name, kind in stored.items():
        if not kind.is_floating_point:
            raise FolderError(f'{folder}: {name} must hold floating numbers, got {kind}. Weights in integers are not read.')
        if kind not in COMPUTED and dtype is None:
            raise FolderError(f'{folder}: {name} is {kind}, in which no model computes. Give dtype, such as torch.bfloat16.')


def refuse_weights(folder: Path, missing: list[str], left: list[str], shapes: list[str]) -> None:
    """Raise one FolderError for names that are missing, left over or of another shape."""
    parts = [
        f'{what}: {", ".join(names[:5])}{f" and {len(names) - 5} more" if len(names) > 5 else ""}'
        for what, names in (('missing', missing), ('left over', left), ('of another shape', shapes))
        if names
    ]
    if parts:
        raise FolderError(f'The weights in {folder} do not fit its config: {"; ".join(parts)}.')


@torch.no_grad()
def fill_model(
    model: nn.Module,
    sources: Mapping[str, TensorSource],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Give a model that was built on the meta device its tensors, one after the other.

    Buffers without a source are made as the constructors make them. A parameter that several modules share stays shared. Of a
    parameter that is spread over processes (a DTensor) each process reads all and keeps its part.
    """
    device = torch.get_default_device() if device is None else torch.device(device)
    fresh_buffers(model, device)
    slots: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for slot, parameter in module._parameters.items():
            if parameter is not None:
                slots.setdefault(id(parameter), []).append((module, slot))
    named = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    # all of the model's memory is taken before anything is read: what is let go of in between leaves no holes in it
    memory = {name: room(named[name], source.dtype, device, dtype) for name, source in sources.items() if name not in buffers}
    for name, source in sources.items():
        if name in buffers:
            source.into(buffers[name])
            continue
        old = named[name]
        new = nn.Parameter(filled_parameter(old, memory.pop(name), source), requires_grad=old.requires_grad)
        for module, slot in slots[id(old)]:
            module._parameters[slot] = new
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if left:
        raise FolderError(f'No tensor was given for {", ".join(left[:5])}.')


def room(
    old: Shaped[Tensor, '...'], stored: torch.dtype, device: torch.device, dtype: torch.dtype | None
) -> Shaped[Tensor, '...'] | None:
    """Memory for a parameter; None for one that is spread over processes."""
    if hasattr(old, 'placements'):
        return None
    return torch.empty(old.shape, dtype=dtype if dtype is not None and stored.is_floating_point else stored, device=device)


def filled_parameter(old: Any, new: Shaped[Tensor, '...'] | None, source: TensorSource) -> Shaped[Tensor, '...']:
    """A parameter's numbers, in its memory or in that of this process's part."""
    if new is not None:
        source.into(new)
        return new
    from torch.distributed.tensor import distribute_tensor

    mesh = old.device_mesh
    whole = torch.empty(old.shape, dtype=old.dtype, device=mesh.device_type)
    source.into(whole)
    return distribute_tensor(whole, mesh, old.placements, src_data_rank=None)


def fresh_buffers(model: nn.Module, device: torch.device) -> None:
    """Buffers on the meta device become real ones, filled as the constructors fill them."""
    for module in model.modules():
        if not any(buffer is not None and buffer.is_meta for buffer in module._buffers.values()):
            continue
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
        if isinstance(module, Made):
            module.init_own()
        elif hasattr(module, 'reset_parameters'):
            raise FlagError(f'{type(module).__name__} has buffers that cannot be made again.')


__all__ = ['card', 'fill_model', 'load', 'once_each', 'read_config', 'refuse_weights', 'save_model', 'written_whole']
