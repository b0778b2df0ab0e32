"""Products of weights with one row, in a form that a compiler reads faster than the library's matrix product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from x_transformers.tensor_types import Float

# strips of the weights that are read side by side: one processor core alone waits for memory less often then
STRIPS = 4


class OneRow(TorchFunctionMode):
    """Inside, a linear map of one row is a sum over each row of the weights.

    For code that is compiled for a CPU; run as it stands, it would write out every product.
    """

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and is_one_row(*args, **(kwargs or {})):
            return by_strips(*args, **(kwargs or {}))
        if func is Tensor.unflatten:
            # this method is written in Python, in words that a compiler does not follow from here
            func = torch.unflatten
        return func(*args, **(kwargs or {}))


def is_one_row(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:  # noqa: A002: named as in F.linear
    in_single = input.dtype == weight.dtype and input.dtype in (torch.float32, torch.float64)
    return input.numel() == input.shape[-1] and input.device.type == 'cpu' and in_single


def by_strips(
    input: Float[Tensor, '*1 d'],  # noqa: A002: named as in F.linear
    weight: Float[Tensor, 'e d'],
    bias: Float[Tensor, ' e'] | None = None,
) -> Float[Tensor, '*1 e']:
    """``F.linear(input, weight, bias)`` of one row."""
    # a tensor with strides of its own lies in memory: what makes the row is not computed again for each row of the weights
    row = torch.as_strided(input.contiguous(), (1, weight.shape[1]), (weight.shape[1], 1))
    even = len(weight) // STRIPS * STRIPS
    strips = [*weight[:even].unflatten(0, (STRIPS, -1)).unbind(0), weight[even:]]
    out = torch.cat([(strip * row).sum(-1) for strip in strips if len(strip)])
    if bias is not None:
        out = out + bias
    return out.view(*input.shape[:-1], -1)
