"""A module in parallel with attention, such as a recurrent network; their outputs are mixed (Hymba).

https://arxiv.org/abs/2411.13676
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from x_transformers.attention.heads import split_heads
from x_transformers.helpers import pad_at_dim
from x_transformers.module import Module, last_rows
from x_transformers.tensor_types import Bool, Float, Shaped

if TYPE_CHECKING:
    from x_transformers.cache.layer_cache import LayerCache

BY_TOKEN = (
    nn.Linear,
    nn.Identity,
    nn.Dropout,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GELU,
    nn.ReLU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Tanh,
    nn.GLU,
)


class FoldAxially(Module):
    """Run ``fn`` on every ``axial_dim``-th token: a sequence of n tokens becomes ``axial_dim`` sequences in the batch.

    Token ``m * axial_dim + r`` of row b is token m of row ``b * axial_dim + r``; the end is padded with zeros, and cropped from
    the first tensor of the output, which alone is unfolded. Keywords that are (b, n, ...) tensors are folded too.
    """

    def __init__(self, axial_dim: int, fn: nn.Module) -> None:
        super().__init__()
        if axial_dim < 1:
            raise ValueError(f'axial_dim must be at least 1, got {axial_dim}')
        self.fn = fn
        self.axial_dim = axial_dim

    def fold(self, t: Shaped[Tensor, 'b n ...']) -> Tensor:
        a = self.axial_dim
        t = pad_at_dim(t, (0, -t.shape[1] % a), dim=1)
        folded: Tensor = t.unflatten(1, (-1, a)).transpose(1, 2).flatten(0, 1)
        return folded

    def unfold(self, t: Shaped[Tensor, '(b a) n ...'], length: int) -> Tensor:
        whole: Tensor = t.unflatten(0, (-1, self.axial_dim)).transpose(1, 2).flatten(1, 2)
        return whole[:, :length]

    def forward(self, x: Float[Tensor, 'b n d'], *args: Any, **kwargs: Any) -> Any:
        if self.axial_dim == 1:
            return self.fn(x, *args, **kwargs)
        per_token = {name for name, value in kwargs.items() if isinstance(value, Tensor) and value.shape[:2] == x.shape[:2]}
        kwargs = {name: self.fold(value) if name in per_token else value for name, value in kwargs.items()}
        leaves, structure = tree_flatten(self.fn(self.fold(x), *args, **kwargs))
        leaves[0] = self.unfold(leaves[0], x.shape[1])
        return tree_unflatten(leaves, structure)


def output_and_hidden(result: Any) -> tuple[Tensor, Any]:
    """(output, hidden state) of what a module returned: ``(output, hidden, ...)``, or only an output."""
    leaves = tree_flatten(result)[0]
    if isinstance(result, (tuple, list)) and len(result) > 1:
        return leaves[0], result[1]
    return leaves[0], leaves[1] if len(leaves) > 1 else None


def works_by_token(module: nn.Module) -> bool:
    """Whether each token's output surely depends on that token alone."""
    if isinstance(module, FoldAxially):
        return works_by_token(module.fn)
    if isinstance(module, nn.Sequential):
        return all(works_by_token(child) for child in module)
    return isinstance(module, BY_TOKEN)


def run_module(module: nn.Module, x: Float[Tensor, 'b n d'], past: LayerCache | None, **kwargs: Any) -> tuple[Tensor, Any]:
    """(output for the tokens of x, hidden state), continuing what the cache has seen.

    A module that returns a hidden state (``(output, hidden)``, as ``nn.GRU``) is given it at the next step. Of any other the
    cache keeps the inputs, and it is run on all of them; likewise when the sequence is folded, since the next token then
    belongs to another part of the state.
    """
    if past is None or works_by_token(module):
        return output_and_hidden(module(x, **kwargs))
    if 'hybrid' in past.carry:
        out, hidden = output_and_hidden(module(x, past.carry['hybrid'], **kwargs))
        past.carry['hybrid'] = hidden
        return out, hidden
    if past.get('hybrid') is None:
        if past.length > x.shape[1]:
            raise ValueError(
                'cache must hold the state of the hybrid module, which a cached_kv set by hand lacks. Pass the cache of an '
                'earlier call.'
            )
        out, hidden = output_and_hidden(module(x, **kwargs))
        if hidden is not None and not (isinstance(module, FoldAxially) and module.axial_dim > 1):
            past.carry['hybrid'] = hidden
            if isinstance(getattr(module, 'fn', module), nn.RNNBase):
                past.carry_axis['hybrid'] = 1
        else:
            past.extend(hybrid=x)
        return out, hidden
    (whole,) = past.extend(hybrid=x)
    out, hidden = output_and_hidden(module(whole, **kwargs))
    return last_rows(out, x.shape[1]), hidden


def mix_hybrid(
    out: Float[Tensor, 'b h n e'],
    other: Float[Tensor, 'b ... c'],
    norms: nn.ModuleList,
    share: Float[Tensor, 'b n h'] | None,
) -> Float[Tensor, 'b h n e']:
    """The mean of both after a norm of each, or ``share`` (its sigmoid, per token and head) of the module."""
    heads, width = out.shape[1], out.shape[-1]
    if other.ndim == 3:
        if other.shape[-1] != heads * width:
            raise ValueError(
                f'hybrid_module must return (b, n, {heads * width}), heads times the width of a value head, '
                f'got {tuple(other.shape)}'
            )
        other = split_heads(other, heads)
    out, other = norms[0](out), norms[1](other)
    if share is None:
        return 0.5 * (out + other)
    return torch.lerp(out, other, share.sigmoid().transpose(1, 2).unsqueeze(-1).to(out.dtype))


def module_input(
    x: Float[Tensor, 'b n d'], name: str | None, padding: Bool[Tensor, 'b n'] | None, causal: bool
) -> tuple[Float[Tensor, 'b n d'], dict[str, Any]]:
    """(what the module reads, its keywords): the padding mask (True: a token) under the module's own keyword.

    A causal module, or one without such a keyword, is not told: it reads zeros where there is no token.
    """
    if name is not None and not causal:
        return x, {name: padding}
    return x if padding is None else x.masked_fill(~padding.unsqueeze(-1), 0.0), {}
