"""The base of our modules: it separates construction from filling, so a model can be built on the meta device."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from x_transformers.saving.made import Made
from x_transformers.tensor_types import Float, Shaped


def reset_parameters(module: nn.Module) -> None:
    """Fill a module and everything below it, whoever wrote it."""
    own = getattr(module, 'reset_parameters', None)
    if own is None:
        for child in module.children():
            reset_parameters(child)
    else:
        own()


class Modes:
    """The modes that modules are to have when nobody needs them in evaluation mode any more.

    Generation may overlap: two streams of one model, or two threads. So openings are counted for each module.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        # how often opened, the mode to come back to
        self.held: WeakKeyDictionary[nn.Module, tuple[int, bool]] = WeakKeyDictionary()
        # how often somebody called train() or eval() while a module was held
        self.changes = 0
        self.here = threading.local()

    def open(self, modules: Iterable[nn.Module]) -> None:
        with self.lock:
            for module in modules:
                count, mode = self.held.get(module, (0, module.training))
                # a module that is in training mode though it is held was put there by somebody
                self.held[module] = count + 1, mode or module.training

    def close(self, modules: Iterable[nn.Module]) -> None:
        with self.lock:
            for module in modules:
                # a stream that is still open when its model is collected, or the interpreter ends, may find nothing
                count, mode = self.held.pop(module, (0, module.training))
                if count > 1:
                    self.held[module] = count - 1, mode
                else:
                    module.training = mode or module.training

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Calls of ``eval()`` in here are not those of a user."""
        self.here.unseen = True
        try:
            yield
        finally:
            self.here.unseen = False

    def asked(self, root: nn.Module, mode: bool) -> None:
        """Somebody has called ``root.train(mode)``."""
        if not self.held or getattr(self.here, 'unseen', False):
            return
        with self.lock:
            self.changes += 1
            for module in root.modules():
                if module in self.held:
                    self.held[module] = self.held[module][0], mode


modes = Modes()


class Module(Made):
    """A module whose ``reset_parameters`` fills everything below it, in any order and any number of times.

    A subclass with parameters or buffers of its own creates them with ``torch.empty``, fills them in ``init_own`` and calls
    ``init_own`` at the end of its constructor. No parent changes what a child has filled: a child with an unusual start is of
    a class that knows it (``ConstantLinear``). Hence ``to_empty(device=...)``, then ``reset_parameters()``, gives a new model.
    """

    # what accelerate keeps on one device: layers read the weights of their parts
    _no_split_modules: ClassVar[list[str]] = ['Layer']

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        modes.asked(self, mode)
        return self

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for child in self.children():
            reset_parameters(child)
        self.init_own()

    # ------------------------------------------------------------ a model is a folder

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model into a folder: ``config.json`` with its flags, its weights as safetensors, a model card.

        Raises FlagError if a flag is no plain data, such as a function.
        """
        from x_transformers.saving.folder import save_model

        save_model(self, folder)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """The model of this class that ``save_pretrained`` has written, in evaluation mode; or a name on the Hugging Face Hub.

        ``dtype``: of its floating weights; None: as they are stored. Raises FolderError if the folder holds no such model.
        """
        from x_transformers.saving.folder import load
        from x_transformers.saving.hub import fetched

        model: Self = load(cls, fetched(folder), device=device, dtype=dtype)
        return model

    def push_to_hub(self, repo_id: str, **keywords: Any) -> str:
        """Upload what ``save_pretrained`` writes, by ``huggingface_hub``; ``keywords`` are those of its ``ModelHubMixin``."""
        from x_transformers.saving.hub import push

        return push(self, self.save_pretrained, repo_id, **keywords)


class ExactBuffers(Module):
    """Keeps the buffers that ``exact_buffers`` names in float32 or wider when the model is cast to half precision.

    A frequency that is rounded to a half is wrong by whole turns after some hundred positions.
    """

    exact_buffers: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn: Callable[[Shaped[Tensor, '...']], Shaped[Tensor, '...']], recurse: bool = True) -> Self:
        exact = {name: self._buffers[name] for name in self.exact_buffers}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in exact.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = before.to(after.device)
        return self


class ConstantLinear(nn.Linear):
    """A linear map that starts from one weight and one bias: a branch that starts silent, a gate that starts open."""

    def __init__(
        self, dim_in: int, dim_out: int, bias: bool = True, weight_value: float = 0.0, bias_value: float = 0.0
    ) -> None:
        self.weight_value = weight_value
        self.bias_value = bias_value
        super().__init__(dim_in, dim_out, bias=bias)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, self.weight_value)
        if self.bias is not None:
            nn.init.constant_(self.bias, self.bias_value)


class DepthScaledLinear(nn.Linear):
    """A linear map that starts with variance 1 / (2 · width · depth), for the output of a branch ``depth`` blocks deep."""

    def __init__(self, dim_in: int, dim_out: int, bias: bool = True, *, depth: int) -> None:
        self.depth = depth
        super().__init__(dim_in, dim_out, bias=bias)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.normal_(self.weight, std=(2 * self.in_features * self.depth) ** -0.5)


class UnitLinear(nn.Linear):
    """A linear map between the width and something else, whose weights have unit length along the width.

    So they start; ``normalize_`` makes it so again after an optimizer's step. ``writes``: the width is that of the output.
    https://arxiv.org/abs/2410.01131
    """

    def __init__(self, dim_in: int, dim_out: int, bias: bool = True, *, writes: bool = False) -> None:
        self.writes = writes
        super().__init__(dim_in, dim_out, bias=bias)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.normalize_()

    def normalize_(self) -> None:
        to_unit_length_(self.weight, 0 if self.writes else -1)


@torch.no_grad()
def to_unit_length_(weight: Float[Tensor, '...'], axis: int) -> None:
    """Scale in place, so that every vector along this axis has unit length; a zero stays zero."""
    length = torch.linalg.vector_norm(weight, dim=axis, keepdim=True)
    weight.div_(length.clamp(min=torch.finfo(weight.dtype).tiny))


def unit_modules(model: nn.Module) -> list[Any]:
    """The modules whose weights have unit length (``ngpt``)."""
    return [module for module in model.modules() if callable(getattr(module, 'normalize_', None))]


def stream_linear(dim_in: int, dim_out: int, *, bias: bool, unit: bool) -> nn.Linear:
    """A linear map of the stream, with weights of unit length if asked."""
    return UnitLinear(dim_in, dim_out, bias) if unit else nn.Linear(dim_in, dim_out, bias=bias)


def branch_output(
    dim_in: int, dim_out: int, bias: bool, *, zero: bool = False, depth: int | None = None, unit: bool = False
) -> nn.Linear:
    """The last linear map of a branch: it may start at zero, smaller the deeper it is, or with unit length."""
    if unit:
        return UnitLinear(dim_in, dim_out, bias, writes=True)
    if zero:
        return ConstantLinear(dim_in, dim_out, bias=bias)
    return nn.Linear(dim_in, dim_out, bias=bias) if depth is None else DepthScaledLinear(dim_in, dim_out, bias, depth=depth)


class Dropout(nn.Dropout):
    """Dropout that is no operation at all where nothing is dropped: it would be called for every token that is decoded."""

    def forward(self, t: Float[Tensor, '...']) -> Tensor:
        if not self.training or self.p == 0.0:
            return t
        dropped: Tensor = super().forward(t)
        return dropped


def empty_parameter(*shape: int) -> nn.Parameter:
    """A parameter that ``init_own`` will fill."""
    return nn.Parameter(torch.empty(shape))


def spread_as(value: Shaped[Tensor, '...'], parameter: Shaped[Tensor, '...']) -> Tensor:
    """``value`` in the dtype of a parameter of the same shape; spread over processes as it is, each of which takes its part."""
    value = value.to(device=parameter.device, dtype=parameter.dtype)
    mesh = getattr(parameter, 'device_mesh', None)
    if mesh is None:
        return value
    if hasattr(value, 'device_mesh'):
        spread: Tensor = value.redistribute(placements=parameter.placements)  # type: ignore[attr-defined]
        return spread
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, mesh, parameter.placements, src_data_rank=None)  # type: ignore[attr-defined]


def own_part(t: Shaped[Tensor, '...']) -> Tensor:
    """What this process has of a tensor that may be spread over processes."""
    return t.to_local() if hasattr(t, 'to_local') else t


@torch.no_grad()
def fill(parameter: Shaped[Tensor, '...'], value: Shaped[Tensor, '...']) -> None:
    """Put ``value`` into a parameter, which may be spread over processes."""
    parameter.copy_(spread_as(value, parameter))


def is_bare(module: nn.Module) -> bool:
    """Whether a call of this module is its forward and nothing else: no hook, of those who shard either, no other method, and
    no program that it was compiled to."""
    # asked several times for each layer and token: one expression, with no call in it
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or 'forward' in module.__dict__
        or module._compiled_call_impl is not None
        or _global_forward_hooks
        or _global_forward_pre_hooks
        or _global_backward_hooks
        or _global_backward_pre_hooks
    )


def is_heard(module: nn.Module) -> bool:
    """Whether somebody listens to calls of this module, or has put a method in the place of its own.

    Those who shard a module listen, too, but to gather its weights and not for what comes out.
    """
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    heard = any(not str(hook.__module__).startswith('torch.distributed.') for each in hooks if each for hook in each.values())
    return heard or 'forward' in module.__dict__


def is_sharded(module: nn.Module) -> bool:
    """Whether parameters in it are only there while their module runs (FSDP2)."""
    fsdp = sys.modules.get('torch.distributed.fsdp')
    return fsdp is not None and any(isinstance(each, fsdp.FSDPModule) for each in module.modules())


def run_through(module: nn.Module, x: Float[Tensor, '...']) -> Tensor:
    """``module(x)``, where nobody compiles. Of a sequence that nobody listens to the parts are called, but for idle ones."""
    if type(module) is not nn.Sequential or not is_bare(module):
        out: Tensor = module(x)
        return out
    for part in module._modules.values():
        if type(part) is nn.Sequential and is_bare(part):
            for inner in part._modules.values():
                x = inner(x)
        elif type(part) is not Dropout or part.training or not is_bare(part):
            x = part(x)
    return x


def untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is exactly of this class and nobody listens, so that its formula may be had without calling it."""
    return type(module) is kind and not is_heard(module)


def last_rows(t: Shaped[Tensor, '... n c'], n: int) -> Tensor:
    """The newest ``n`` rows of axis -2."""
    return t[..., t.shape[-2] - n :, :]
