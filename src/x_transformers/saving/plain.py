"""Models as plain data for JSON: the class and the keywords with which it was made."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import x_transformers
from x_transformers.flags.base import FlagError, UnknownFlag
from x_transformers.flags.plain import plain, value_from_plain
from x_transformers.saving.errors import FolderError
from x_transformers.saving.made import Made

# classes that are saved with models but are not names of the top level
OTHERS = {
    'AttentionLayers': 'x_transformers.layers.stack',
    'TokenEmbedding': 'x_transformers.embedding.token',
    'SelfCritic': 'x_transformers.nonautoregressive_wrapper',
    'FreeTransformer': 'x_transformers.free_transformer',
    'GPTVAE': 'x_transformers.gpt_vae',
    'UniversalPretrainWrapper': 'x_transformers.up_wrapper',
    'SyntheticDataGenerator': 'x_transformers.up_wrapper',
    'LatentAutoregressive': 'x_transformers.gpt_lejepa',
    'XMLatentDecoder': 'x_transformers.xm_latent_decoder',
    'DiscoverDecoder': 'x_transformers.discover_wrapper',
    'ContinuousTransformerAutoencoder': 'x_transformers.continuous_autoencoder',
    'WhisperEncoder': 'x_transformers.hf.modules',
    'TypedTokenEmbedding': 'x_transformers.hf.modules',
}


def class_named(name: Any, extra: type | None = None) -> type[Made]:
    """The class of the library of that name, or ``extra``, the caller's own."""
    if extra is not None and name == extra.__name__:
        return extra
    cls: Any = None
    if name in OTHERS:
        cls = getattr(import_module(OTHERS[name]), name)
    elif name in x_transformers.__all__:
        cls = getattr(x_transformers, name)
    if not (isinstance(cls, type) and issubclass(cls, Made)):
        raise FolderError(f'There is no model class {name!r} in this version of the library.')
    return cls


def keywords_of(model: Made) -> dict[str, Any]:
    """The keywords that a model was made with; modules among them are those that it holds now."""
    args, kwargs = model.made_with
    cls = type(model)
    bound = inspect.signature(cls.__init__).bind(model, *args, **kwargs)
    keywords: dict[str, Any] = {}
    for name, value in list(bound.arguments.items())[1:]:
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            keywords.update(value)
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            raise FlagError(f'{cls.__name__} was made with unnamed arguments, which a file cannot name. Give keywords.')
        else:
            keywords[name] = value
    return {name: getattr(model, name, value) if isinstance(value, nn.Module) else value for name, value in keywords.items()}


def to_plain(model: nn.Module) -> dict[str, Any]:
    """``{'class': ..., **keywords}`` of a model. Raises FlagError naming all keywords that a file cannot hold."""
    wrong: list[str] = []
    described = _plain_module(model, type(model).__name__, wrong)
    if wrong:
        raise FlagError(*wrong)
    return described


def _plain_module(model: nn.Module, path: str, wrong: list[str]) -> dict[str, Any]:
    if not isinstance(model, Made) or not hasattr(model, 'made_with'):
        wrong.append(f'{path} must be a model of the library to be saved with its flags, got {type(model).__name__}.')
        return {}
    flags = {name: plain(value, f'{path}: {name}', wrong, _described) for name, value in keywords_of(model).items()}
    return {'class': type(model).__name__, **flags}


def _described(value: Any, path: str, wrong: list[str]) -> dict[str, Any] | None:
    return _plain_module(value, path, wrong) if isinstance(value, Made) else None


def from_plain(held: Mapping[str, Any], extra: type | None = None) -> Made:
    """The model that ``to_plain`` describes, untrained. Raises UnknownFlag for keywords that its class does not have."""
    cls = class_named(held.get('class'), extra)
    keywords = {name: value_from_plain(value, from_plain) for name, value in held.items() if name != 'class'}
    known = inspect.signature(cls.__init__).parameters
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values()):
        unknown = [name for name in keywords if name not in known]
        if unknown:
            raise UnknownFlag(*(f'{cls.__name__}: there is no keyword `{name}`.' for name in unknown))
    return cls(**keywords)


class Unfilled(TorchFunctionMode):
    """Tensors without memory are not filled: for that torch would load its compiler, 80 MB of it."""

    FILLS = frozenset({Tensor.normal_, Tensor.uniform_, Tensor.fill_, Tensor.zero_, Tensor.copy_, Tensor.erfinv_})

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in self.FILLS or getattr(func, '__module__', None) == 'torch.nn.init':
            filled = args[0] if args else (kwargs or {}).get('tensor')
            if isinstance(filled, Tensor) and filled.is_meta:
                return filled
        return func(*args, **(kwargs or {}))


@contextmanager
def without_memory() -> Iterator[None]:
    """Models are built in here on the meta device."""
    with torch.device('meta'), Unfilled():
        yield
