"""The condition that adaptive norms and adaptive layer scales depend on."""

from __future__ import annotations

from torch import Tensor, nn

from x_transformers.helpers import is_any
from x_transformers.tensor_types import Float


def AdaptiveMLP(dim_condition: int, expansion: int) -> nn.Sequential:
    """One hidden layer in front of all adaptive parts, as in https://arxiv.org/abs/2212.09748: width times ``expansion``."""
    return nn.Sequential(nn.Linear(dim_condition, int(dim_condition * expansion), bias=False), nn.SiLU())


def read_condition(
    condition: Float[Tensor, 'b ... c'] | None, needed: bool, dim_condition: int, x: Float[Tensor, 'b n d'], mems: int = 0
) -> Float[Tensor, 'b #m c'] | None:
    """The caller's condition with a sequence axis: of 1, of the tokens of x, or of ``mems`` memories and the tokens. It is
    read in the precision of x.

    Raises ValueError if there is one and none is needed, or the other way round, or if it has the wrong shape.
    """
    if condition is None:
        if needed:
            raise ValueError(
                'condition must be given to the adaptive norms or the adaptive layer scale of this stack, got None. Pass '
                f'(batch, {dim_condition}) or (batch, sequence, {dim_condition}).'
            )
        return None
    if not needed:
        raise ValueError(
            'condition must be None in a stack where nothing depends on it. Build the stack with '
            'use_adaptive_layernorm, use_adaptive_rmsnorm or use_adaptive_layerscale.'
        )
    if not isinstance(condition, Tensor) or not condition.is_floating_point():
        got = condition.dtype if isinstance(condition, Tensor) else f'a {type(condition).__name__}'
        raise TypeError(f'condition must be a floating tensor (batch, {dim_condition}), or one row per token, got {got}.')
    batch, n = x.shape[:2]
    shape = tuple(condition.shape)
    wide = condition.unsqueeze(1) if condition.ndim == 2 else condition
    if wide.ndim != 3 or wide.shape[-1] != dim_condition or wide.shape[0] != batch:
        raise ValueError(
            f'condition must be (batch, {dim_condition}) or (batch, sequence, {dim_condition}) with batch {batch}, '
            f'got {shape}: the width is set by `dim_condition`'
        )
    if mems and wide.shape[1] == n and n > 1:
        raise ValueError(
            f'condition must begin with the rows of the memories, ({batch}, {mems} + {n}, {dim_condition}), or be one for '
            f'all, ({batch}, {dim_condition}), got {shape}. Memories are normed with a condition, too.'
        )
    if not is_any(wide.shape[1], 1, mems + n):
        behind = f' and mems {mems}' if mems else ''
        raise ValueError(
            f'condition must have one row for each of {n} tokens of x{behind}, got {wide.shape[1]} (condition is {shape}). '
            'Pass as many.'
        )
    return wide.to(x.dtype)


def of_tokens(condition: Float[Tensor, 'b #n c'], new: int) -> Float[Tensor, 'b #m c']:
    """The part about the newest ``new`` tokens, which is the last: it covers tokens of the call, never those of a cache."""
    length = condition.shape[1]
    return condition if is_any(length, 1, new) else condition.narrow(1, length - new, new)


def of_memories(condition: Float[Tensor, 'b #n c'], mems: int) -> Float[Tensor, 'b #m c']:
    """The part about ``mems`` memories: a condition is one for all, or begins with theirs."""
    return condition if condition.shape[1] == 1 else condition[:, :mems]
