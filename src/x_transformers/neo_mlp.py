"""NeoMLP: a multi-layer perceptron whose neurons are tokens, https://openreview.net/forum?id=A8Vuf2e8y6."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.flags.fit import check_alone
from x_transformers.flags.objectives import NeoMLPOptions, options
from x_transformers.layers.stack import Encoder
from x_transformers.module import Module, empty_parameter
from x_transformers.notices import told_once
from x_transformers.tensor_types import Float


class RandomFourier(Module):
    """``cos(2 pi (w x + b))`` with frequencies that stay as they are drawn."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(1, dim).requires_grad_(False)

    def forward(self, t: Float[Tensor, '... 1']) -> Float[Tensor, '... d']:
        angles: Tensor = self.proj(t)
        return (2 * math.pi * angles).cos()


class NeoMLP(Module):
    """A multi-layer perceptron whose input, hidden and output neurons are tokens that attend to each other.

    Args:
        dim_in, dim_hidden, dim_out: the numbers of neurons of each kind.
        dim_model: width of a neuron's token.
        depth: layers of the bidirectional transformer between them.
        encoder_kwargs: further keywords of that ``Encoder``.
    """

    reads = 'a number for each input neuron'

    @told_once
    def __init__(
        self,
        *,
        dim_in: int,
        dim_hidden: int,
        dim_out: int,
        dim_model: int,
        depth: int,
        encoder_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        options(NeoMLPOptions, 'NeoMLP', locals())
        self.dim_in, self.dim_hidden, self.dim_out = dim_in, dim_hidden, dim_out
        self.input_embed = empty_parameter(dim_in, dim_model)
        self.hidden_embed = empty_parameter(dim_hidden, dim_model)
        self.output_embed = empty_parameter(dim_out, dim_model)
        self.random_fourier = nn.Sequential(RandomFourier(dim_model), nn.Linear(dim_model, dim_model))
        keywords: dict[str, Any] = {'attn_dim_head': 16, 'heads': 4} if encoder_kwargs is None else encoder_kwargs
        self.transformer = Encoder(dim=dim_model, depth=depth, **keywords)
        check_alone(self.transformer, 'NeoMLP')
        self.to_output_weights = empty_parameter(dim_out, dim_model)
        self.to_output_bias = empty_parameter(dim_out)
        self.init_own()

    def init_own(self) -> None:
        for embed in (self.input_embed, self.hidden_embed, self.output_embed):
            nn.init.normal_(embed, std=0.02)
        nn.init.normal_(self.to_output_weights)
        nn.init.zeros_(self.to_output_bias)

    def forward(self, x: Float[Tensor, '... i'], return_embeds: bool = False) -> Any:
        """Map ``(dim_in,)`` or ``(b, dim_in)`` to ``dim_out`` numbers; optionally also the three kinds of neurons' states."""
        if not isinstance(x, Tensor):
            raise TypeError(f'x must be a tensor, got a {type(x).__name__}. Make one by torch.tensor(...).')
        if x.ndim not in (1, 2) or x.shape[-1] != self.dim_in or not x.is_floating_point():
            raise ValueError(
                f'x must be floating point of shape ({self.dim_in},) or (batch, {self.dim_in}), got {x.dtype} {tuple(x.shape)}'
            )
        # in the precision of the model
        batch = (x if x.ndim == 2 else x[None]).to(self.input_embed.dtype)
        inputs = self.random_fourier(batch[..., None]) + self.input_embed
        rows = batch.shape[0]
        neurons = torch.cat((inputs, self.hidden_embed.expand(rows, -1, -1), self.output_embed.expand(rows, -1, -1)), dim=1)
        states = self.transformer(neurons).split((self.dim_in, self.dim_hidden, self.dim_out), dim=1)
        out = (states[-1] * self.to_output_weights).sum(dim=-1) + self.to_output_bias
        if x.ndim == 1:
            out, states = out[0], tuple(state[0] for state in states)
        return (out, states) if return_embeds else out
