"""ONNX with dynamic batch and length, verified with onnxruntime at shapes that were not traced."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves

from x_transformers.export.program import LEAST, ExportError, Range, Traced, What, evaluation, ranges, traced

NEEDS = "pip install 'x-transformers[export]'"


def onnx(
    model: nn.Module,
    path: str | PathLike[str],
    *,
    batch: Range = (1, 64),
    length: Range = (1, 4096),
    what: What = 'logits',
    mask: bool = False,
    tolerance: float = 1e-4,
) -> Path:
    """Write the model as ONNX, for any batch and length in these ranges; arguments as in ``export``.

    The file is run by onnxruntime at three shapes that were not traced, and compared with the model, before it gets its name.

    Raises:
        ExportError: a missing package, what cannot be exported, or a file whose numbers differ by more than ``tolerance``.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ExportError(f'{error.name} must be installed to write ONNX. Run: {NEEDS}') from error
    target = Path(path)
    if not target.parent.is_dir():
        raise ExportError(f'path must lie in a folder that exists, got {target}. Make {target.parent} first.')
    wanted = traced(model, batch, length, what, mask)
    with evaluation(wanted.module), TemporaryDirectory(dir=target.parent) as folder:
        written = Path(folder) / target.name
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            program = _converted(wanted)
        if program is None:
            raise ExportError('torch.onnx.export must return a program, but gave nothing. Is torch complete?')
        program.save(written)
        session = onnxruntime.InferenceSession(written, providers=['CPUExecutionProvider'])
        for args in unseen(wanted, *ranges(model, batch, length, LEAST[what])):
            _compare(session, wanted.module, args, tolerance)
        written.replace(target)
    return target


def _converted(wanted: Traced) -> Any:
    try:
        return torch.onnx.export(
            wanted.module, wanted.args, dynamo=True, dynamic_shapes=wanted.free, verbose=False, external_data=False
        )
    except torch.onnx.errors.OnnxExporterError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ExportError(
            f'model must be made of operations that ONNX has, but torch.onnx says: {str(cause).strip()[:300]} '
            'Leave out the flag that needs them, or write a .pt2 file.'
        ) from error


def unseen(wanted: Traced, batch: Range, length: Range) -> Iterator[tuple[Any, ...]]:
    """Arguments of three shapes, none of them the traced one."""
    traced_shape = tuple(wanted.args[0].shape[:2])
    shapes = [
        (low, n)
        for low in dict.fromkeys((batch[0], min(2, batch[1]), min(5, batch[1])))
        for n in dict.fromkeys((length[0], min(length[0] + 13, length[1]), min(length[0] + 70, length[1])))
        if (low, n) != traced_shape
    ]
    generator = torch.Generator().manual_seed(0)
    for nth, (b, n) in enumerate(shapes[:: max(1, len(shapes) // 3)][:3]):
        yield tuple(_reshaped(value, b, n, 3 + nth, generator) for value in wanted.args)


def _reshaped(value: Any, b: int, n: int, past: int, generator: torch.Generator) -> Any:
    if isinstance(value, list):
        return [
            tuple(torch.randn(b, *t.shape[1:-2], past, t.shape[-1], generator=generator).to(t) for t in tensors)
            for tensors in value
        ]
    if value.dtype == torch.bool:
        return torch.arange(n).expand(b, n) < torch.arange(n, n + b).unsqueeze(-1).clamp(max=n)
    if value.is_floating_point():
        return torch.randn(b, n, *value.shape[2:], generator=generator)
    return torch.randint(int(value.max()) + 1, (b, n), generator=generator)


def _compare(session: Any, module: nn.Module, args: tuple[Any, ...], tolerance: float) -> None:
    expected = [t for t in tree_leaves(module(*args)) if isinstance(t, Tensor)]
    leaves, _ = tree_flatten(args)
    names = [each.name for each in session.get_inputs()]
    shapes = [tuple(leaf.shape) for leaf in leaves]
    try:
        got = session.run(None, {name: leaf.cpu().numpy() for name, leaf in zip(names, leaves, strict=True)})
    except Exception as error:
        raise ExportError(
            f'the file must run at shapes {shapes}, but onnxruntime says: {str(error)[:300]} Something of the traced shape was '
            'written down as a constant. Give a narrower range.'
        ) from error
    for wanted, found in zip(expected, got, strict=True):
        gap = (wanted.cpu() - torch.from_numpy(found)).abs().max().item() if wanted.numel() else 0.0
        if not gap <= tolerance * max(1.0, wanted.abs().max().item()):
            raise ExportError(f'the file must give the numbers of the model at shapes {shapes}, but differs by {gap:.2g}.')
