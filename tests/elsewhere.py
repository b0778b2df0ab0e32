"""A second device that any machine has: its tensors lie in the memory of the CPU and are counted by it, under another name.

What a GPU refuses, this refuses: an operation on tensors of two devices. So every law can be held to it without a GPU.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

NAME = 'elsewhere'


@cache
def device() -> torch.device:
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME)  # type: ignore[no-untyped-call]
    return torch.device(NAME, 0)


class Far(Tensor):
    """A tensor that says it lies elsewhere."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Far:
        made: Far = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=device()
        )
        made.held = held
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})  # type: ignore[attr-defined]
        if func == Tensor.data.__set__:  # type: ignore[attr-defined]
            args[0].held = args[1].held
        return out

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __format__(self, spec: str) -> str:
        return format(self.held, spec)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f'Far({self.held})'

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Elsewhere(TorchDispatchMode):
    """Inside, that device exists."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


# what may have tensors of two devices
CROSSES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default, torch.ops.aten.index.Tensor}


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors: list[Tensor] = []
    tree_map_only(Tensor, tensors.append, (args, kwargs))
    far = [each for each in tensors if isinstance(each, Far)]
    asked = kwargs.get('device')
    to_far = far if asked is None else torch.device(asked).type == NAME
    if not far and not to_far:
        return func(*args, **kwargs)
    near = [each for each in tensors if not isinstance(each, Far) and each.ndim]
    if far and near and func not in CROSSES:
        raise RuntimeError(f'{func}: tensors lie on two devices: {[(each.device.type, tuple(each.shape)) for each in tensors]}')
    if asked is not None:
        kwargs = kwargs | {'device': torch.device('cpu')}
    plain, given = tree_map_only(Far, lambda each: each.held, (args, kwargs))
    out = func(*plain, **given)
    if func is torch.ops.aten.copy_.default:
        return args[0]
    if asked is not None and not to_far:
        # what is already in the memory of the CPU must still be a copy, as it would be from a GPU
        return out.clone() if any(out is each.held for each in far) else out
    out = tree_map_only(Tensor, Far, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if far else out
