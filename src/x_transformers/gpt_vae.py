"""A GPT conditioned on one latent prefix token, trained as a variational autoencoder (https://arxiv.org/abs/2304.13705)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from x_transformers.autoregressive_wrapper import AutoregressiveWrapper
from x_transformers.embedding.ids import token_ids, training_ids
from x_transformers.flags.calls import DrawingOptions, PosteriorOptions
from x_transformers.flags.constructors import SHARED
from x_transformers.flags.fit import check_alone
from x_transformers.flags.objectives import GPTVAEOptions, options
from x_transformers.flags.signature import ClassSignature
from x_transformers.generation.modes import eval_decorator
from x_transformers.layers.checks import of_width
from x_transformers.layers.stack import Decoder, Encoder
from x_transformers.losses import at_least_single
from x_transformers.module import Module
from x_transformers.notices import kept_back, told_once, warn_inert_in_all
from x_transformers.tensor_types import Bool, Float, Int
from x_transformers.transformer_wrapper import TransformerWrapper

if TYPE_CHECKING:
    from typing import Unpack

    from x_transformers.flags.keywords import SharedKeywords


class GPTVAE(Module):
    """Encodes a sequence into a Gaussian latent, and decodes it autoregressively with that latent as a prefix.

    Args:
        num_tokens, dim, depth, enc_depth, max_seq_len: of the model; ``enc_depth`` layers encode, ``depth`` decode.
        dim_latent: width of the latent; ``dim`` by default.
        attn_dim_head, heads: of both stacks.
        kwargs: further keywords of both stacks; ``enc_kwargs`` and ``dec_kwargs`` are those of one.
        vae_kl_loss_weight: weight of the divergence from the standard normal.
        vae_kl_div_floor: divergence per latent dimension without a loss.
        latents_dropout_prob: fraction of rows, in training, whose prefix is dropped.
        pad_id: targets to ignore; the encoder does not attend to such inputs.
        encoder: a module in place of the default one, tokens and ``mask`` to ``b d``.
    """

    __signature__: Any = ClassSignature(SHARED)

    @told_once
    def __init__(
        self,
        *,
        num_tokens: int,
        dim: int,
        depth: int,
        enc_depth: int,
        max_seq_len: int,
        dim_latent: int | None = None,
        attn_dim_head: int = 64,
        heads: int = 8,
        enc_kwargs: dict[str, Any] | None = None,
        dec_kwargs: dict[str, Any] | None = None,
        vae_kl_loss_weight: float = 1.0,
        vae_kl_div_floor: float = 0.0,
        latents_dropout_prob: float = 0.5,
        pad_id: int = -1,
        encoder: nn.Module | None = None,
        **kwargs: Unpack[SharedKeywords],
    ) -> None:
        super().__init__()
        options(GPTVAEOptions, 'GPTVAE', locals())
        dim_latent = dim if dim_latent is None else dim_latent
        shared: dict[str, Any] = {'dim': dim, 'attn_dim_head': attn_dim_head, 'heads': heads} | kwargs
        self.num_tokens, self.dim, self.dim_latent, self.pad_id = num_tokens, dim, dim_latent, pad_id
        parts: list[tuple[list[str], Any]] = []
        if encoder is None:
            with kept_back() as inert:
                stack = Encoder(depth=enc_depth, **(shared | (enc_kwargs or {})))
            parts.append((inert, enc_kwargs or {}))
            check_alone(stack, 'GPTVAE')
            encoder = TransformerWrapper(
                num_tokens=num_tokens,
                max_seq_len=max_seq_len + 1,
                return_only_embed=True,
                average_pool_embed=True,
                attn_layers=stack,
            )
        self.encoder = encoder
        self.to_latent_mean_log_variance = nn.Sequential(nn.Linear(dim, 2 * dim_latent))
        self.from_latent_to_prepend_token = nn.Sequential(nn.Linear(dim_latent, dim))
        with kept_back() as inert:
            layers = Decoder(depth=depth, **(shared | (dec_kwargs or {})))
        warn_inert_in_all('GPTVAE', [*parts, (inert, dec_kwargs or {})])
        check_alone(layers, 'GPTVAE')
        self.decoder = TransformerWrapper(num_tokens=num_tokens, max_seq_len=max_seq_len, attn_layers=layers)
        self.ar_wrapped_decoder = AutoregressiveWrapper(self.decoder, ignore_index=pad_id)
        self.vae_kl_loss_weight = vae_kl_loss_weight
        self.vae_kl_div_floor = vae_kl_div_floor
        self.latents_dropout_prob = latents_dropout_prob

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def encode_to_latents(
        self, seq: Int[Tensor, 'b n'], return_mean_log_var: bool = False, generator: torch.Generator | None = None
    ) -> Any:
        """A sample of each row's latent, ``b z``; optionally also its mean and log-variance."""
        options(PosteriorOptions, 'encode_to_latents', {'return_mean_log_var': return_mean_log_var, 'generator': generator})
        seq = token_ids(seq, 'seq')
        if seq.ndim != 2 or seq.shape[1] == 0:
            raise ValueError(f'the sequence to encode must be tokens (batch, length), not empty; got {tuple(seq.shape)}')
        mask = seq != self.pad_id
        pooled = of_width(self.encoder(seq.masked_fill(~mask, 0), mask=mask), self.dim, 'encoder')
        mean, log_variance = self.to_latent_mean_log_variance(pooled).chunk(2, dim=-1)
        latents = mean + (0.5 * log_variance).exp() * torch.zeros_like(mean).normal_(generator=generator)
        return (latents, (mean, log_variance)) if return_mean_log_var else latents

    def visible_prefix(self, rows: int) -> Bool[Tensor, 'b 1'] | None:
        """Which rows see their prefix; None: all. A row without it is as if it had none, positions included."""
        if not self.training or self.latents_dropout_prob <= 0:
            return None
        return torch.rand(rows, 1, device=self.device) >= self.latents_dropout_prob

    def forward(
        self, seq: Int[Tensor, 'b n'], seq_for_latents: Int[Tensor, 'b m'] | None = None, return_all_losses: bool = False
    ) -> Any:
        """The loss of decoding ``seq`` from the latent of ``seq_for_latents`` (itself by default), plus the divergence."""
        seq = training_ids(seq, 'seq')
        source = seq if seq_for_latents is None else token_ids(seq_for_latents, 'seq_for_latents')
        latents, (mean, log_variance) = self.encode_to_latents(source, return_mean_log_var=True)
        prefix = self.from_latent_to_prepend_token(latents)[:, None]
        visible = self.visible_prefix(len(seq))
        masked: dict[str, Any] = {} if visible is None else {'prepend_mask': visible}
        decoding_loss = self.ar_wrapped_decoder(seq, prepend_embeds=prefix, **masked)

        mean, log_variance = at_least_single(mean), at_least_single(log_variance)
        divergence = 0.5 * (log_variance.exp() + mean.square() - log_variance - 1.0)
        kl_loss = (divergence - self.vae_kl_div_floor).relu().sum(dim=-1).mean()
        total = decoding_loss + kl_loss * self.vae_kl_loss_weight
        return (total, (decoding_loss, kl_loss)) if return_all_losses else total

    @torch.no_grad()
    @eval_decorator
    def generate(
        self,
        prompts: Int[Tensor, '... n'] | list[Int[Tensor, ' n']],
        seq_len: int,
        latents: Float[Tensor, '... z'] | Sequence[float] | None = None,
        seq_for_latents: Int[Tensor, 'b m'] | None = None,
        generator: torch.Generator | None = None,
        **generate_kwargs: Any,
    ) -> Int[Tensor, '... s']:
        """New tokens for given latents, those of a sequence, or none; otherwise like ``AutoregressiveWrapper.generate``.

        Args:
            prompts: ids ``(..., n)``, or a list of ids of different lengths.
            seq_len: how many tokens to write.
            latents: one ``(z,)`` for all prompts, or one for each ``(b, z)``.
            seq_for_latents: a sequence to take the latents from, one row or ``b``; not together with ``latents``.
            generator: makes sampling reproducible, that of the latents too.
            generate_kwargs: of ``AutoregressiveWrapper.generate``.
        """
        options(DrawingOptions, 'generate', {'generator': generator})
        if latents is not None and seq_for_latents is not None:
            raise ValueError(
                'latents and seq_for_latents must not both be given: each decides the prefix. Leave out one of them.'
            )
        if seq_for_latents is not None:
            latents = self.encode_to_latents(seq_for_latents, generator=generator)
        if latents is not None:
            rows = math.prod(prompts.shape[:-1]) if isinstance(prompts, Tensor) else len(prompts)
            prefix = self.from_latent_to_prepend_token(self.as_latents(latents, rows))
            generate_kwargs['prepend_embeds'] = prefix[:, None]
        out: Tensor = self.ar_wrapped_decoder.generate(prompts, seq_len, generator=generator, **generate_kwargs)
        return out

    def as_latents(self, latents: Any, rows: int) -> Float[Tensor, 'b z']:
        like = next(self.from_latent_to_prepend_token.parameters())
        codes = torch.as_tensor(latents, dtype=like.dtype, device=like.device)
        if codes.shape not in ((self.dim_latent,), (rows, self.dim_latent), (1, self.dim_latent)):
            raise ValueError(
                f'latents must have shape ({self.dim_latent},) or ({rows}, {self.dim_latent}), got {tuple(codes.shape)}'
            )
        return codes.expand(rows, -1)
