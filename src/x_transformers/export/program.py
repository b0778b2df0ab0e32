"""``torch.export`` of a model's logits, its loss, or one cached step, with dynamic batch and length."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from x_transformers.cache.kv_cache import KVCache
from x_transformers.tensor_types import Bool, Float, Int, Shaped

What = Literal['logits', 'loss', 'step']
Range = tuple[int, int]
Past = list[tuple[Tensor, ...]]


# tokens: a loss of two would read a single one, whose axis an exporter takes to be broadcast
LEAST: dict[str, int] = {'logits': 1, 'step': 1, 'loss': 3}


class ExportError(ValueError):
    """A model, or a range of shapes, that cannot be exported."""


class Traced(NamedTuple):
    """What is traced: a module, example arguments, and which of their axes are free."""

    module: nn.Module
    args: tuple[Any, ...]
    free: tuple[Any, ...]
    names: tuple[str, ...]
    outputs: tuple[str, ...]


class LogitsModule(nn.Module):
    """A model as a function of its input, and of a mask if ``masked``."""

    def __init__(self, model: nn.Module, masked: bool) -> None:
        super().__init__()
        self.model = model
        self.masked = masked

    def forward(self, x: Shaped[Tensor, '...'], mask: Bool[Tensor, 'b n'] | None = None) -> Float[Tensor, '...']:
        out: Tensor = self.model(x, mask=mask) if self.masked else self.model(x)
        return out


class Step(nn.Module):
    """New tokens behind a past of plain tensors: ``(ids (b m), past) -> (logits (b m v), past)``.

    ``past`` has one tuple for each layer that remembers anything, of the tensors that its cache holds; ``empty(batch)`` is the
    past before the first token. Each grows along its axis -2. Hence the step is a function of tensors alone, and can be
    exported, or run by whatever keeps the tensors.

    Raises:
        ExportError: models that cannot be continued, or whose memory is not made of tensors that grow.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        net: Any = getattr(model, 'net', model)
        if not getattr(net, 'can_cache_kv', False):
            raise ExportError('model must be able to continue from a cache, which this one cannot. Export its logits instead.')
        self.net = net
        self.layout = self._layout()

    @torch.no_grad()
    def _layout(self) -> list[tuple[int, list[str]]]:
        """(execution step, names of its growing tensors), read off a short run."""
        training = self.net.training
        self.net.eval()
        try:
            device = next(self.net.parameters()).device
            ids = torch.zeros(1, 2, dtype=torch.long, device=device)
            _, record = self.net(ids, return_intermediates=True)
        finally:
            self.net.train(training)
        cache = KVCache.of(record)
        if cache is None:
            raise ExportError('model must return a cache with its intermediates.')
        layout, odd = [], []
        for index in sorted(cache.steps):
            layer = cache.steps[index]
            if layer.states or any(isinstance(value, Tensor) for value in layer.carry.values()):
                odd.append(index)
            elif layer.tapes:
                layout.append((index, sorted(layer.tapes)))
        if odd:
            raise ExportError(
                f'model must remember tensors that grow by one row per token, but layers {odd} hold a state of another kind '
                '(a recurrent module, for one). Export its logits instead.'
            )
        self._widths = [
            [cache.steps[index].tapes[name].value[0, ..., :0, :].shape for name in names] for index, names in layout
        ]
        self._carries = {index: dict(cache.steps[index].carry) for index, _ in layout}
        return layout

    def empty(self, batch: int) -> Past:
        """The past before the first token."""
        parameter = next(self.net.parameters())
        return [tuple(parameter.new_zeros(batch, *shape) for shape in shapes) for shapes in self._widths]

    def _cache(self, past: Past) -> KVCache:
        from x_transformers.cache.layer_cache import LayerCache
        from x_transformers.cache.tape import Tape

        length = past[0][0].shape[-2]
        cache = KVCache(length=length)
        for (index, names), tensors in zip(self.layout, past, strict=True):
            layer = LayerCache()
            layer.tapes = {name: Tape.of(tensor) for name, tensor in zip(names, tensors, strict=True)}
            layer.carry = dict(self._carries[index])
            cache.steps[index] = layer
        return cache

    def forward(self, ids: Int[Tensor, 'b m'], past: Past) -> tuple[Float[Tensor, 'b m v'], Past]:
        logits, record = self.net(ids, cache=self._cache(past), input_not_include_cache=True, return_intermediates=True)
        cache: Any = KVCache.of(record)
        following = [tuple(cache.steps[index].tapes[name].value for name in names) for index, names in self.layout]
        return logits, following


# ---------------------------------------------------------------- what is traced


def longest_input(model: nn.Module) -> int | None:
    """The longest sequence that a model with absolute positions takes."""
    net: Any = getattr(model, 'net', model)
    return int(net.max_seq_len) if getattr(net, 'has_absolute_positions', False) else None


def ranges(model: nn.Module, batch: Range, length: Range, least: int) -> tuple[Range, Range]:
    """Checked ranges of batch and length; a model with absolute positions ends where they end."""
    for name, (low, high) in (('batch', batch), ('length', length)):
        if not 1 <= low <= high:
            raise ExportError(f'{name} must be (least, most) with 1 <= least <= most, got {(low, high)}.')
    most = longest_input(model)
    low, high = max(length[0], least), length[1] if most is None else min(length[1], most)
    if low > high:
        raise ExportError(f'length must reach from at least {least} to at most {most}, got {length}.')
    return batch, (low, high)


def traced(model: nn.Module, batch: Range, length: Range, what: What, mask: bool) -> Traced:
    """The module that is exported, with example arguments in the middle of small ranges."""
    if what not in ('logits', 'loss', 'step'):
        raise ExportError(f"what must be 'logits', 'loss' or 'step', got {what!r}.")
    net: Any = getattr(model, 'net', model)
    batch, length = ranges(model, batch, length, LEAST[what])
    rows, tokens = Dim('batch', min=batch[0], max=batch[1]), Dim('length', min=length[0], max=length[1])
    b, n = min(max(batch[0], 3), batch[1]), min(max(length[0], 7), length[1])
    free_batch = {0: rows} if batch[0] < batch[1] else {}
    free_tokens = {1: tokens} if length[0] < length[1] else {}
    device = next(net.parameters()).device
    width = getattr(net, 'dim_in', None) or getattr(net, 'width_in', None)
    if getattr(net, 'num_tokens', None) is None and width is None:
        raise ExportError(
            f'model must be one of token ids or of vectors, got {type(net).__name__}. Export it by torch.export itself.'
        )
    if getattr(net, 'num_tokens', None) is not None:
        x = torch.randint(net.num_tokens, (b, n), device=device)
    else:
        x = torch.randn(b, n, int(width or 0), device=device)
    free = {**free_batch, **free_tokens}
    if what == 'step':
        step = Step(model)
        held = 5
        past = [tuple(t.new_zeros(*t.shape[:-2], held, t.shape[-1]) for t in tensors) for tensors in step.empty(b)]
        seen = Dim('past', min=1, max=max(2, length[1]))
        free_past = [tuple({**free_batch, t.ndim - 2: seen} for t in tensors) for tensors in past]
        return Traced(step, (x, past), (free, free_past), ('ids', 'past'), ('logits', 'past'))
    if what == 'loss':
        if net is model:
            raise ExportError("model must be a wrapper with a loss for what='loss', such as AutoregressiveWrapper.")
        return Traced(model, (x,), (free,), ('ids',), ('loss',))
    if mask and 'mask' not in inspect.signature(net.forward).parameters:
        raise ExportError(f'mask must be False for a {type(net).__name__}, which takes no mask. Leave it out.')
    module = LogitsModule(net, mask)
    if not mask:
        return Traced(module, (x,), (free,), ('x',), ('logits',))
    seen_mask = torch.ones(b, n, dtype=torch.bool, device=device)
    seen_mask[0, n // 2 :] = False
    return Traced(module, (x, seen_mask), (free, free), ('x', 'mask'), ('logits',))


@contextmanager
def evaluation(module: nn.Module) -> Iterator[None]:
    """In evaluation mode, every module getting its own mode back."""
    modes = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for each, mode in modes:
            each.training = mode


def export(
    model: nn.Module,
    *,
    batch: Range = (1, 64),
    length: Range = (1, 4096),
    what: What = 'logits',
    mask: bool = False,
) -> ExportedProgram:
    """A program of plain tensor operations, for any batch and length in these ranges.

    Args:
        model: a model of tokens or vectors, or a wrapper around one. It is exported in evaluation mode.
        batch, length: (least, most). A model with absolute positions takes no more than it has.
        what: 'logits', of ``model(x)``; 'loss', of a wrapper; 'step', of new tokens behind a past (see ``Step``).
        mask: the program takes a mask, too: True for tokens, False for padding.

    Raises:
        ExportError: what cannot be exported, with the reason.
    """
    wanted = traced(model, batch, length, what, mask)
    with evaluation(wanted.module):
        try:
            return torch.export.export(wanted.module, wanted.args, dynamic_shapes=wanted.free, strict=False)
        except (torch._dynamo.exc.UserError, torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode) as error:
            first = str(error).strip().splitlines()
            raise ExportError(
                f'model must be free of decisions that depend on batch or length for these ranges, but torch.export says: '
                f'{" ".join(first[:3])[:400]} Give a narrower range, or leave out the flag that decides.'
            ) from error


def save(program: ExportedProgram, path: str | PathLike[str]) -> Path:
    """Write a ``.pt2`` file; under its name there is either the whole file or what was there before."""
    target = Path(path)
    if not target.parent.is_dir():
        raise ExportError(f'path must lie in a folder that exists, got {target}. Make {target.parent} first.')
    with NamedTemporaryFile(dir=target.parent, prefix=f'.{target.name}.', suffix='.pt2', delete=False) as file:
        temporary = Path(file.name)
    try:
        torch.export.save(program, temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return target
