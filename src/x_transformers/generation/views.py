"""Adapters for the decode loop: nets with inputs or outputs of several tensors of ids, as one vector in and one out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from x_transformers.tensor_types import Float, Shaped


class VectorView:
    """A net as one from vectors (b n c) to vectors (b n k). Its attributes are the net's.

    Args:
        answer: from the net's output to one tensor (b n k).
        ask: from vectors to the net's positional arguments; the vectors themselves unless given.
    """

    def __init__(
        self,
        net: nn.Module,
        answer: Callable[[Any], Float[Tensor, 'b n c']],
        ask: Callable[[Float[Tensor, 'b n c']], tuple[Shaped[Tensor, 'b n'], ...]] | None = None,
    ) -> None:
        self.net = net
        self.answer = answer
        self.ask = ask

    def __getattr__(self, name: str) -> Any:
        return getattr(self.net, name)

    def __call__(self, x: Shaped[Tensor, 'b n ...'], **kwargs: Any) -> Any:
        out = self.net(*((x,) if self.ask is None else self.ask(x)), **kwargs)
        if kwargs.get('return_intermediates'):
            return self.answer(out[0]), out[1]
        return self.answer(out)
