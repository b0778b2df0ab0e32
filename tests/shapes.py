"""Annotations such as ``Float[Tensor, 'b n d']`` checked at run time: kind of number, number of axes, equal names equal sizes.

``pytest --shapes`` checks every call of the package in every test; without it the files in ``conftest.REPRESENTATIVE`` are
checked. A call is judged after it has returned, so that a function's own complaints about its arguments are heard first.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import re
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Union, get_args, get_origin

import torch
from torch import Tensor

import x_transformers
from x_transformers.tensor_types import Shape

Sizes = dict[str, int]
WORD = re.compile(r'\([^)]*\)|\S+')


class ShapeError(TypeError):
    """A tensor is not what the annotation says."""


# ---------------------------------------------------------------- one tensor


def kind_fits(t: Tensor, kind: str) -> bool:
    if kind == 'any':
        return True
    if kind == 'complex':
        return t.is_complex()
    if kind == 'float':
        return t.is_floating_point()
    is_bool = t.dtype == torch.bool
    return is_bool if kind == 'bool' else not (is_bool or t.is_floating_point() or t.is_complex())


def axis_fits(size: int, word: str, sizes: Sizes) -> bool:
    """``n``, ``3``, ``#h`` (or 1), ``i|1``; a product or a sum says nothing here."""
    if '|' in word:
        return any(axis_fits(size, one, sizes) for one in sorted(word.split('|'), key=str.isidentifier))
    if word.startswith('#'):
        return size == 1 or axis_fits(size, word[1:], sizes)
    if word.isdigit():
        return size == int(word)
    return sizes.setdefault(word, size) == size if word.isidentifier() and word != '_' else True


def fits(t: Tensor, shape: Shape, sizes: Sizes) -> bool:
    """Whether ``t`` is of this shape; ``sizes`` learns its names."""
    words = WORD.findall(shape.axes)
    if not kind_fits(t, shape.kind):
        return False
    if '...' in words:
        place = words.index('...')
        behind = len(words) - place - 1
        if t.ndim < len(words) - 1:
            return False
        pairs = [*zip(t.shape, words[:place], strict=False)]
        pairs += zip(t.shape[t.ndim - behind :], words[place + 1 :], strict=True) if behind else ()
    else:
        if t.ndim != len(words):
            return False
        pairs = [*zip(t.shape, words, strict=True)]
    return all(axis_fits(size, word, sizes) for size, word in pairs)


# ---------------------------------------------------------------- any value


def matches(value: Any, hint: Any, sizes: Sizes) -> bool:
    """Whether the tensors in ``value`` are as the hint says. What holds no tensor, or has no such hint, is let through."""
    origin = get_origin(hint)
    if origin is Annotated:
        shape = next((extra for extra in hint.__metadata__ if isinstance(extra, Shape)), None)
        return shape is None or not isinstance(value, Tensor) or fits(value, shape, sizes)
    if origin in (Union, types.UnionType):
        return any_matches(value, get_args(hint), sizes)
    if isinstance(value, Tensor) or not isinstance(value, (tuple, list)):
        return True
    inner = get_args(hint)
    if origin is tuple and inner and inner[-1] is not Ellipsis:
        return len(value) != len(inner) or all(matches(one, each, sizes) for one, each in zip(value, inner, strict=True))
    if origin is not None and isinstance(origin, type) and issubclass(origin, Sequence) and inner:
        # lengths may differ from entry to entry
        return all(matches(one, inner[0], dict(sizes)) for one in value)
    return True


def any_matches(value: Any, hints: Sequence[Any], sizes: Sizes) -> bool:
    if isinstance(value, Tensor):
        hints = [hint for hint in hints if hint is Tensor or hint is Any or get_origin(hint) is Annotated]
    for hint in hints:
        tried = dict(sizes)
        if matches(value, hint, tried):
            sizes.update(tried)
            return True
    return not hints or not isinstance(value, Tensor)


# ---------------------------------------------------------------- functions


def says_shapes(hint: Any) -> bool:
    if get_origin(hint) is Annotated:
        return any(isinstance(extra, Shape) for extra in hint.__metadata__)
    return any(says_shapes(inner) for inner in get_args(hint))


def shape_hints(fn: Any) -> dict[str, Any]:
    """The annotations that speak of shapes; one that needs names known to the type checker alone is passed over."""
    found = {}
    for name, hint in getattr(fn, '__annotations__', {}).items():
        try:
            hint = eval(hint, fn.__globals__) if isinstance(hint, str) else hint
        except (NameError, AttributeError, TypeError):
            continue
        if says_shapes(hint):
            found[name] = hint
    return found


def checked(fn: Callable[..., Any]) -> Callable[..., Any] | None:
    """``fn`` that raises ShapeError where it was given, or gave back, something else than it says; None: it says nothing."""
    hints = shape_hints(fn)
    if not hints or inspect.isgeneratorfunction(fn):
        return None
    signature = inspect.signature(fn)
    names = list(signature.parameters)
    plain = not any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values())

    @functools.wraps(fn)
    def inner(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return fn(*args, **kwargs)
        out = fn(*args, **kwargs)
        given = dict(zip(names, args, strict=False)) | kwargs if plain else signature.bind(*args, **kwargs).arguments
        sizes: Sizes = {}
        for name, hint in hints.items():
            value = out if name == 'return' else given.get(name)
            if not matches(value, hint, sizes):
                where = f'{fn.__module__}.{fn.__qualname__}'
                raise ShapeError(f'{where}: {name} is annotated {said(hint)}, but is {shown(value)}; sizes: {sizes}')
        return out

    return inner


def said(hint: Any) -> str:
    if get_origin(hint) is Annotated:
        return ' '.join(f'{extra.kind} ({extra.axes})' for extra in hint.__metadata__)
    return ' or '.join(said(inner) for inner in get_args(hint)) or str(hint)


def shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f'{value.dtype} {tuple(value.shape)}'
    return f'[{", ".join(map(shown, value))}]' if isinstance(value, (tuple, list)) else repr(value)[:60]


# ---------------------------------------------------------------- the whole package


def modules() -> Iterator[types.ModuleType]:
    for info in pkgutil.walk_packages(x_transformers.__path__, 'x_transformers.'):
        if '__main__' not in info.name and not info.name.startswith('x_transformers.cli'):
            yield importlib.import_module(info.name)


def own_functions(module: types.ModuleType) -> Iterator[tuple[Any, str, Any, Callable[..., Any]]]:
    """(where it stands, its name, as it stands there, the function) for all functions and methods that a module defines."""
    for name, thing in list(vars(module).items()):
        if getattr(thing, '__module__', None) != module.__name__:
            continue
        if isinstance(thing, types.FunctionType):
            yield module, name, thing, thing
        elif isinstance(thing, type) and not issubclass(thing, torch.autograd.Function):
            for attribute, held in list(vars(thing).items()):
                fn = held.__func__ if isinstance(held, (classmethod, staticmethod)) else held
                if isinstance(fn, types.FunctionType) and fn.__module__ == module.__name__:
                    yield thing, attribute, held, fn


@functools.cache
def swaps() -> list[tuple[Any, str, Any, Any]]:
    """(where, name, plain, checked) for every place in the package from which a function is called."""
    loaded = list(modules())
    found, by_id = [], {}
    for module in loaded:
        for where, name, held, fn in own_functions(module):
            new: Any = checked(fn)
            if new is None:
                continue
            by_id[id(fn)] = (fn, new)
            if isinstance(held, (classmethod, staticmethod)):
                new = type(held)(new)
            found.append((where, name, held, new))
    for module in loaded:
        for name, thing in vars(module).items():
            if id(thing) in by_id and thing.__module__ != module.__name__:
                found.append((module, name, thing, by_id[id(thing)][1]))
    return found


@contextmanager
def shapes_checked() -> Iterator[None]:
    for where, name, _, new in swaps():
        setattr(where, name, new)
    try:
        yield
    finally:
        for where, name, plain, _ in swaps():
            setattr(where, name, plain)
