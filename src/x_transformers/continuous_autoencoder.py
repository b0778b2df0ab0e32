"""An autoencoder of sequences of vectors: one latent per sequence, from which a decoder reconstructs the sequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.continuous import ContinuousTransformerWrapper
from x_transformers.flags.calls import EncodeOptions
from x_transformers.flags.constructors import SHARED
from x_transformers.flags.later_objectives import BottleneckOptions, FramesAutoencoderOptions
from x_transformers.flags.objectives import options
from x_transformers.flags.signature import ClassSignature
from x_transformers.helpers import masked_mean
from x_transformers.layers.checks import of_width
from x_transformers.layers.stack import Decoder, Encoder
from x_transformers.module import Module
from x_transformers.tensor_types import Bool, Float, Int

if TYPE_CHECKING:
    from typing import Unpack

    from x_transformers.flags.keywords import SharedKeywords


class Losses(NamedTuple):
    """The parts of the loss, each a mean or one per row."""

    reconstruction: Tensor
    bottleneck: Tensor


class DeterministicBottleneck(Module):
    """A linear map and an activation. forward: (b d) -> ((b l), zeros (b))."""

    def __init__(
        self, dim: int, dim_latent: int, activation: Callable[[Float[Tensor, 'b d']], Float[Tensor, 'b d']] | None = None
    ) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, dim_latent)
        self.activation = activation

    def forward(self, pooled: Float[Tensor, 'b d']) -> tuple[Float[Tensor, 'b l'], Float[Tensor, ' b']]:
        latents: Tensor = self.proj(pooled)
        if self.activation is not None:
            latents = self.activation(latents)
        return latents, latents.new_zeros(latents.shape[0])


class VariationalBottleneck(Module):
    """A normal distribution per sequence, sampled by reparametrization. forward: (b d) -> ((b l), divergence (b)).

    The divergence is that from a standard normal distribution, a sum over channels times ``kl_loss_weight``.
    """

    def __init__(self, dim: int, dim_latent: int, kl_loss_weight: float = 1.0) -> None:
        super().__init__()
        options(BottleneckOptions, 'VariationalBottleneck', locals())
        self.to_mean_log_var = nn.Sequential(nn.Linear(dim, dim_latent * 2))
        self.kl_loss_weight = kl_loss_weight

    def forward(self, pooled: Float[Tensor, 'b d']) -> tuple[Float[Tensor, 'b l'], Float[Tensor, ' b']]:
        mean, log_variance = self.to_mean_log_var(pooled).chunk(2, dim=-1)
        latents = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        divergence = 0.5 * (log_variance.exp() + mean.square() - log_variance - 1.0).sum(dim=-1)
        return latents, divergence * self.kl_loss_weight


class ContinuousTransformerAutoencoder(Module):
    """Encoder, bottleneck, decoder over vectors (b n dim_input), https://www.pi.website/research/rlt.

    The mean of the encoder's output goes through the bottleneck and stands in front of the decoder, which predicts each vector
    from those before it.

    Args:
        dim, enc_depth, dec_depth: width of both stacks, and their depths.
        heads, attn_dim_head: of both stacks; ``max_seq_len``: longest sequence.
        dim_input, dim_latent: width of the vectors and of the latent; ``dim`` unless given.
        bottleneck: a module of your own, (b dim) -> (latents (b dim_latent), loss (b)); or by ``bottleneck_type``
            'deterministic' or 'variational', with ``deterministic_bottleneck_kwargs`` or ``variational_bottleneck_kwargs``.
        loss_type: 'l1' or 'l2'.
        latents_dropout_prob: in training, how often a row's latent is hidden from the decoder.
        enc_kwargs, dec_kwargs, kwargs: flags of the encoder, of the decoder, of both.

    Raises:
        ValueError: parameters out of range; FlagError for flags, as the stacks do.
    """

    __signature__: Any = ClassSignature(SHARED)

    def __init__(
        self,
        *,
        dim: int,
        enc_depth: int,
        dec_depth: int,
        max_seq_len: int,
        dim_input: int | None = None,
        dim_latent: int | None = None,
        bottleneck: nn.Module | None = None,
        bottleneck_type: str = 'deterministic',
        deterministic_bottleneck_kwargs: Mapping[str, Any] | None = None,
        variational_bottleneck_kwargs: Mapping[str, Any] | None = None,
        loss_type: str = 'l1',
        attn_dim_head: int = 64,
        heads: int = 8,
        enc_kwargs: Mapping[str, Any] | None = None,
        dec_kwargs: Mapping[str, Any] | None = None,
        latents_dropout_prob: float = 0.5,
        **kwargs: Unpack[SharedKeywords],
    ) -> None:
        super().__init__()
        options(FramesAutoencoderOptions, 'ContinuousTransformerAutoencoder', locals())
        self.dim, self.max_seq_len, self.loss_type = dim, max_seq_len, loss_type
        self.dim_input, self.dim_latent = dim_input or dim, dim_latent or dim
        self.latents_dropout_prob = latents_dropout_prob
        flags = {'dim': dim, 'heads': heads, 'attn_dim_head': attn_dim_head, **kwargs}
        ends: dict[str, Any] = {'max_seq_len': max_seq_len, 'dim_in': None if self.dim_input == dim else self.dim_input}
        self.encoder = ContinuousTransformerWrapper(
            attn_layers=Encoder(**{**flags, 'depth': enc_depth, **(enc_kwargs or {})}), **ends
        )
        if bottleneck is not None:
            self.bottleneck = bottleneck
        elif bottleneck_type == 'variational':
            self.bottleneck = VariationalBottleneck(dim, self.dim_latent, **(variational_bottleneck_kwargs or {}))
        else:
            self.bottleneck = DeterministicBottleneck(dim, self.dim_latent, **(deterministic_bottleneck_kwargs or {}))
        self.from_latent_to_prepend_token = nn.Sequential(nn.Linear(self.dim_latent, dim))
        self.decoder = ContinuousTransformerWrapper(
            attn_layers=Decoder(**{**flags, 'depth': dec_depth, **(dec_kwargs or {})}), dim_out=ends['dim_in'], **ends
        )

    def _mask(
        self, x: Float[Tensor, 'b n d'], lens: Int[Tensor, ' b'] | None, mask: Bool[Tensor, 'b n'] | None
    ) -> Bool[Tensor, 'b n'] | None:
        if lens is not None and mask is not None:
            raise ValueError('lens and mask must not both be given: both select vectors. Leave out one of them.')
        if lens is None:
            return mask
        return torch.arange(x.shape[1], device=x.device) < lens.unsqueeze(-1)

    def encode(
        self,
        x: Float[Tensor, 'b n c'],
        lens: Int[Tensor, ' b'] | None = None,
        return_aux_loss: bool = False,
        return_unreduced_loss: bool = False,
        *,
        mask: Bool[Tensor, 'b n'] | None = None,
    ) -> Any:
        """Latents (b l), or (latents, the bottleneck's loss: a mean, or one per row with ``return_unreduced_loss``)."""
        keywords = {'return_aux_loss': return_aux_loss, 'return_unreduced_loss': return_unreduced_loss}
        options(EncodeOptions, 'encode', keywords)
        mask = self._mask(x, lens, mask)
        embeds: Tensor = self.encoder(x, mask=mask, return_embeddings=True)
        latents, loss = self.bottleneck(masked_mean(embeds, mask))
        latents = of_width(latents, self.dim_latent, 'bottleneck')
        if not return_aux_loss:
            return latents
        return latents, loss if return_unreduced_loss else loss.mean()

    def decode(
        self,
        latents: Float[Tensor, 'b l'],
        x: Float[Tensor, 'b n c'],
        keep: Bool[Tensor, ' b'] | None = None,
        mask: Bool[Tensor, 'b n'] | None = None,
    ) -> Float[Tensor, 'b n c']:
        """Each vector of x, predicted from the latent and the vectors before it; rows not in ``keep`` do not see the latent."""
        prefix = self.from_latent_to_prepend_token(latents).unsqueeze(1)
        inputs = x[:, :-1]
        shown = None if keep is None else keep.unsqueeze(-1)
        out: Tensor = self.decoder(
            inputs, prepend_embeds=prefix, prepend_mask=shown, mask=None if mask is None else mask[:, :-1]
        )
        return out

    def forward(
        self,
        x: Float[Tensor, 'b n c'],
        lens: Int[Tensor, ' b'] | None = None,
        return_all_losses: bool = False,
        return_unreduced_loss: bool = False,
        *,
        mask: Bool[Tensor, 'b n'] | None = None,
    ) -> Any:
        """The loss, or (loss, Losses(reconstruction, bottleneck)); one per row with ``return_unreduced_loss``.

        Raises ValueError if a sequence is empty.
        """
        if x.ndim != 3 or x.shape[1] < 1 or x.shape[-1] != self.dim_input:
            raise ValueError(f'x must be vectors (batch, at least one, {self.dim_input}), got shape {tuple(x.shape)}.')
        mask = self._mask(x, lens, mask)
        latents, bottleneck = self.encode(x, return_aux_loss=True, return_unreduced_loss=True, mask=mask)
        keep = None
        if self.training and self.latents_dropout_prob > 0.0:
            keep = torch.rand(x.shape[0], device=x.device) >= self.latents_dropout_prob
        predicted = self.decode(latents, x, keep, mask)
        measure = F.l1_loss if self.loss_type == 'l1' else F.mse_loss
        reconstruction = masked_mean(measure(predicted, x, reduction='none').mean(dim=-1), mask)
        losses = Losses(reconstruction, bottleneck)
        if not return_unreduced_loss:
            losses = Losses(*(part.mean() for part in losses))
        loss = losses.reconstruction + losses.bottleneck
        return (loss, losses) if return_all_losses else loss
