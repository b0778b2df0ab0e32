"""Import and export: a config becomes keywords, and weights are copied one tensor at a time."""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.autoregressive_wrapper import AutoregressiveWrapper
from x_transformers.flags.base import FlagError, Flags
from x_transformers.hf.family import Config, Family, KeyRule, Plain, headless
from x_transformers.hf.reading import sources_of
from x_transformers.hf.rewritten import in_their_words
from x_transformers.module import Module
from x_transformers.saving.errors import FolderError
from x_transformers.saving.folder import check_asked, check_dtypes, fill_model, refuse_weights, written_whole
from x_transformers.saving.hub import fetched
from x_transformers.saving.plain import from_plain, to_plain, without_memory
from x_transformers.saving.tensors import TensorSource, Weights, json_object, write_tensors

# the model_type of a config: the file of its family, the name of the family there
FAMILIES = {
    'llama': ('llama', 'LLAMA'),
    'mistral': ('llama', 'MISTRAL'),
    'ministral': ('llama', 'MISTRAL'),
    'qwen2': ('llama', 'QWEN2'),
    'qwen3': ('llama', 'QWEN3'),
    'mixtral': ('mixtral', 'MIXTRAL'),
    'qwen2_moe': ('mixtral', 'QWEN2_MOE'),
    'qwen3_moe': ('mixtral', 'QWEN3_MOE'),
    'granite': ('granite', 'GRANITE'),
    'smollm3': ('smollm3', 'SMOLLM3'),
    'olmo2': ('olmo', 'OLMO2'),
    'olmo3': ('olmo', 'OLMO3'),
    'olmoe': ('olmo', 'OLMOE'),
    'phi': ('phi', 'PHI'),
    'phi3': ('phi3', 'PHI3'),
    'starcoder2': ('starcoder2', 'STARCODER2'),
    'falcon': ('falcon', 'FALCON'),
    'gpt_oss': ('gpt_oss', 'GPT_OSS'),
    'gpt_neox': ('neox', 'GPT_NEOX'),
    'gpt2': ('gpt2', 'GPT2'),
    'gptj': ('phi', 'GPTJ'),
    'bert': ('bert', 'BERT'),
    'roberta': ('bert', 'ROBERTA'),
    'xlm-roberta': ('bert', 'ROBERTA'),
    'distilbert': ('bert', 'DISTILBERT'),
    'modernbert': ('modernbert', 'MODERNBERT'),
    'gemma': ('gemma', 'GEMMA'),
    'gemma2': ('gemma', 'GEMMA2'),
    'gemma3_text': ('gemma', 'GEMMA3'),
    't5': ('t5', 'T5'),
    'whisper': ('whisper', 'WHISPER'),
    'vit': ('vit', 'VIT'),
    'dinov2_with_registers': ('vit', 'DINOV2'),
}
# what stands beside the weights and belongs to the text
TOKENIZER = (
    'tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json', 'vocab.json', 'merges.txt', 'vocab.txt',
    'tokenizer.model', 'added_tokens.json', 'generation_config.json', 'preprocessor_config.json', 'chat_template.jinja',
)  # fmt: skip


def family_of(config: Mapping[str, Any]) -> Family:
    """Raises FlagError for a model_type that no family has."""
    kind = config.get('model_type')
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise FlagError(f'`model_type` must be one of {", ".join(FAMILIES)}, got {kind!r}. There is no other yet.')
    file, name = FAMILIES[kind]
    family: Family = getattr(import_module(f'x_transformers.hf.{file}'), name)
    return family


def keywords(config: Mapping[str, Any]) -> Plain:
    """The class and the keywords of the model that a config describes, as plain data; nothing is built.

    Raises FlagError that names each key that cannot be expressed, and what is missing.
    """
    reader, family = Config(config), family_of(config)
    try:
        made = family.keywords(reader)
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        # a value that has been found wrong leads to others; where all have been looked at, this is a mistake of the family's
        if not reader.wrong and not reader.unchecked:
            raise
        suspects = ' or '.join(f'`{key}`, {reader.values[key]!r},' for key in sorted(reader.unchecked))
        reader.wrong = reader.wrong or [f'{suspects} holds something that cannot be read ({error})']
        made = {}
    reader.finish()
    return made


def from_hf(
    path_or_model: Any,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    prepare: Callable[[Any], Any] | None = None,
) -> Any:
    """A model of this library with the weights of a folder in the Hugging Face format, in evaluation mode.

    Args:
        path_or_model: the folder, a name on the Hub, or a model of ``transformers``.
        dtype: of the weights; None: as they are stored.
        device: where they go, one tensor after the other; None: the default device.
        prepare: is called with the model on the meta device, before any weight goes in. It may spread parameters over a mesh
            (``fully_shard``): each process then reads every tensor and keeps its part.

    Raises FlagError if the config cannot be expressed by flags, FolderError if the weights do not fit it. Both are found out
    before any weight is read.
    """
    if not isinstance(path_or_model, (str, Path)):
        with tempfile.TemporaryDirectory() as made:
            path_or_model.save_pretrained(made)
            return from_hf(made, dtype=dtype, device=device, prepare=prepare)
    folder = fetched(path_or_model)
    config = json_object(folder / 'config.json')
    if config.get('format') == 'x_transformers':
        raise FolderError(f'{folder} must be in the Hugging Face format, got a folder of this library. Use from_pretrained.')
    plain = keywords(config)
    family = family_of(config)
    check_asked(dtype)
    with without_memory():
        model = built(plain, config)
    weights = Weights(folder)
    rules = rules_for(family, config, plain, weights)
    check_dtypes(
        folder, {name: weights.stored(name).dtype for entry in rules for name in entry.theirs if name in weights}, dtype
    )
    sources = checked_sources(folder, model, rules, weights, family, plain)
    if prepare is not None:
        if dtype is not None:
            model.to(dtype)
        prepare(model)
    fill_model(model, sources, device=device, dtype=dtype)
    model.hf_config = dict(config)
    return model.eval()


def built(plain: Plain, config: Mapping[str, Any]) -> Any:
    try:
        return from_plain(plain)
    except FlagError as error:
        raise FlagError(f'{config["model_type"]}: the config becomes flags that do not fit together. {error}') from error


def rules_for(family: Family, config: Mapping[str, Any], plain: Plain, weights: Mapping[str, Any]) -> list[KeyRule]:
    """The family's rules with the names as this file has them: with the prefix or without, old or new."""
    rules = family.rules(Config(config), plain)
    if not family.prefix or any(name.startswith(family.prefix) for name in weights):
        return rules
    return [KeyRule(tuple(name.removeprefix(family.prefix) for name in r.theirs), r.ours, r.map) for r in rules]


def checked_sources(
    folder: Path, model: nn.Module, rules: list[KeyRule], weights: Weights, family: Family, plain: Plain
) -> dict[str, TensorSource]:
    """For each tensor of ours, what makes it. Raises FolderError, before any tensor is read, if names or shapes do not fit."""
    wanted = {name: tuple(t.shape) for name, t in own_tensors(model).items()}
    used = {name for r in rules for name in r.theirs}
    unused = re.compile(family.unused or r'(?!)')
    tied = bool(plain.get('tie_embedding') or plain.get('tie_token_emb'))
    # a table without rows is stored, and says nothing
    left = [name for name in weights if name not in used and not unused.fullmatch(name) and 0 not in weights.shape(name)]
    heads = [name for name in left if tied and name in ('lm_head.weight', 'embed_out.weight')]
    missing = [name for r in rules for name in r.theirs if name not in weights]
    given = {name for r in rules for name in r.ours}
    missing += [f'{name} (of ours)' for name in wanted if name not in given]
    shapes = [] if missing else list(other_shapes(rules, weights, wanted))
    refuse_weights(folder, missing, [name for name in left if name not in heads], shapes)
    if heads:
        check_tied_head(folder, heads[0], rules, weights)
    sources: dict[str, TensorSource] = {}
    for entry in rules:
        sources |= sources_of(entry, weights)
    return sources


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters of a model, those that are shared once."""
    return dict(model.named_parameters())


def other_shapes(rules: list[KeyRule], weights: Weights, wanted: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """Found out on the meta device: maps are run on tensors without memory."""
    for entry in rules:
        empty = tuple(torch.empty(weights.shape(name), device='meta') for name in entry.theirs)
        try:
            shapes = [tuple(t.shape) for t in entry.map.into(empty)]
        except (RuntimeError, ValueError, IndexError):
            yield f'{", ".join(entry.theirs)} is {", ".join(str(tuple(t.shape)) for t in empty)}'
            continue
        for name, shape in zip(entry.ours, shapes, strict=True):
            if name in wanted and shape != wanted[name]:
                theirs = ', '.join(f'{n} {weights.shape(n)}' for n in entry.theirs)
                yield f'{theirs} gives {shape}, but the config wants {wanted[name]}'


def check_tied_head(folder: Path, head: str, rules: list[KeyRule], weights: Weights) -> None:
    """A head that is stored beside a table it is tied to must be that table."""
    table = next(r.theirs[0] for r in rules if r.ours[0].endswith('token_emb.emb.weight'))
    if not weights.equal(head, table):
        raise FolderError(f'{folder}: the config ties {head} to {table}, but they differ. Set tie_word_embeddings to false.')


# ---------------------------------------------------------------- out


def to_hf(model: Module, folder: str | Path, *, family: str | None = None) -> None:
    """Write a model in the Hugging Face format: ``config.json`` and safetensors files.

    A model that came from there takes its own config back; for one that was made here ``family`` (None: any that fits) makes a
    config. Of an objective (``AutoregressiveWrapper``) the model inside is written. Raises FlagError that names the flags which
    the family does not have.
    """
    folder = Path(folder)
    inner: Any = model.net if isinstance(model, AutoregressiveWrapper) else model
    write_converted(inner, folder, family)


def write_converted(model: Module, folder: Path, family: str | None) -> None:
    plain, own = to_plain(model), own_tensors(model)
    if own_config(model, family) is None:
        plain, own = in_their_words(model, plain, own)
    config = matching_config(model, plain, family)
    chosen = family_of(config)
    if chosen.exported_as:
        config = {**config, 'architectures': [chosen.exported_as]}
    rules = chosen.rules(Config(config), keywords(config))
    if chosen.prefix and is_headless(config):
        rules = [KeyRule(tuple(name.removeprefix(chosen.prefix) for name in r.theirs), r.ours, r.map) for r in rules]
    dtype = next((t.dtype for t in own.values() if t.is_floating_point()), torch.float32)
    config = {**config, 'dtype': str(dtype).removeprefix('torch.')}
    config.pop('torch_dtype', None)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        with torch.no_grad():
            for entry in rules:
                made = entry.map.back(tuple(own[name].detach() for name in entry.ours))
                # a part that is a view of a larger tensor would be saved with all of it
                yield from ((name, t.clone()) for name, t in zip(entry.theirs, made, strict=True))

    with written_whole(folder) as fresh:
        write_tensors(fresh, tensors(), metadata={'format': 'pt'})
        (fresh / 'config.json').write_text(json.dumps(config, indent=2, sort_keys=True) + '\n', encoding='utf-8')


def is_headless(config: Mapping[str, Any]) -> bool:
    return headless(Config(config).architecture)


def own_config(model: Module, family: str | None) -> Plain | None:
    """The config that a model came with, if it is of the family."""
    known: Plain | None = getattr(model, 'hf_config', None)
    return known if known is not None and family in (None, known.get('model_type')) else None


def matching_config(model: Module, plain: Plain, family: str | None) -> Plain:
    """A config whose keywords build this very model."""
    known = own_config(model, family)
    if known is not None:
        differing = differences(plain, keywords(known))
        if differing:
            raise FlagError(f'to_hf: the model differs from the config it came with in {"; ".join(differing)}.')
        return dict(known)
    by_layer = getattr(getattr(getattr(model, 'attn_layers', None), 'flags', None), 'varying', {})
    if by_layer:
        raise FlagError(f'to_hf: {", ".join(by_layer)} must be one value for all layers, got {by_layer}.')
    reasons: list[tuple[int, str]] = []
    for kind in [family] if family is not None else FAMILIES:
        made = family_of({'model_type': kind}).config_of
        if made is None:
            continue
        try:
            config = made(plain)
            differing = differences(plain, keywords(config))
        except (FlagError, KeyError, TypeError) as error:
            reasons.append((sys.maxsize, f'{kind}: {error}'))
            continue
        if not differing:
            return config
        reasons.append((len(differing), f'{kind} does not have {"; ".join(differing)}.'))
    nearest = min(reasons, default=(0, f'There is no config of {family} for models that were made here.'))[1]
    raise FlagError(f'to_hf: no family has this model. {nearest} Models of the preset hf-llama go out.')


def differences(plain: Plain, wanted: Plain) -> list[str]:
    """Flags in which two models differ, whatever was left at its default."""
    with without_memory():
        one, other = (flat(from_plain(each)) for each in (plain, wanted))
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    return [f'{name}={one.get(name)!r} (it would be {other.get(name)!r})' for name in names]


# flags that change nothing in evaluation, or not what a model computes
FREE = re.compile(
    r'(.*zero_init_(branch_)?output|.*dropout.*|.*verbose|.*gradient_checkpointing|.*flash|.*attend_sdp_kwargs|.*attn_z_loss_weight|.*onnxable)'
)


def flat(model: nn.Module, path: str = '') -> dict[str, Any]:
    """All flags of a model that are not at their default, and those of the modules in it, by name."""
    flags = getattr(model, 'flags', None)
    found: dict[str, Any] = {f'{path}class': type(model).__name__}
    parts = {'': flags, **{f'{name}.': getattr(flags, name, None) for name in ('attention', 'cross_attention', 'feedforward')}}
    for prefix, part in parts.items():
        changed = part.changed() if isinstance(part, Flags) else {}
        found |= {f'{path}{prefix}{name}': value for name, value in changed.items() if not isinstance(value, nn.Module)}
    for name, child in model.named_children():
        if isinstance(child, Module) and (hasattr(child, 'flags') or name in ('decoder', 'encoder', 'net')):
            found |= flat(child, f'{path}{name}.')
    crosses = any('cross_attend' in name for name in found)
    unused = [] if crosses else [name for name in found if 'cross_attention.' in name]
    return {name: value for name, value in found.items() if not FREE.fullmatch(name) and name not in unused}


# ---------------------------------------------------------------- folders


def explain(config: Mapping[str, Any]) -> str:
    """The keywords of a config, as Python that builds the model."""
    return as_python(keywords(config))


def as_python(plain: Any, indent: int = 0) -> str:
    space = ' ' * (indent + 4)
    if isinstance(plain, Mapping) and 'class' in plain:
        inside = ''.join(f'{space}{name}={as_python(value, indent + 4)},\n' for name, value in plain.items() if name != 'class')
        return f'{plain["class"]}(\n{inside}{" " * indent})'
    return repr(plain)


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """The files of the tokenizer, if there are any; their names. Those that the model before had in ``target`` are removed."""
    names = [name for name in TOKENIZER if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, target / name)
    for name in set(TOKENIZER) - set(names):
        (target / name).unlink(missing_ok=True)
    return names
