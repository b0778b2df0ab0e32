"""ViTransformerWrapper: images in, classes out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.flags.rules import check_vision
from x_transformers.flags.signature import ClassSignature
from x_transformers.flags.wrapper import VisionFlags
from x_transformers.module import Module, empty_parameter
from x_transformers.norms import LayerNorm
from x_transformers.stack_wrapper import stack_flags
from x_transformers.tensor_types import Float


class ViTransformerWrapper(Module):
    """An image, cut into square patches, through a stack (https://arxiv.org/abs/2010.11929).

    Its keywords are the fields of ``VisionFlags``: ``image_size``, ``patch_size`` and ``attn_layers`` must be given. Register
    tokens (https://arxiv.org/abs/2309.16588) stand behind the patches and are dropped after the stack.

    Raises:
        FlagError: naming every keyword that is unknown, of the wrong kind, or at odds with another.
    """

    __signature__: Any = ClassSignature(VisionFlags)

    def __init__(self, *, image_size: int, patch_size: int, attn_layers: nn.Module, **flags: Any) -> None:
        super().__init__()
        given = {'image_size': image_size, 'patch_size': patch_size, 'attn_layers': attn_layers, **flags}
        flags_ = VisionFlags.parse(given, where='ViTransformerWrapper')
        check_vision(flags_, stack_flags(attn_layers), type(self).__name__)
        # kept for reading; the stack lives in its slot only
        self.flags = replace(flags_, attn_layers=nn.Identity())
        stack: Any = attn_layers
        dim, patch_dim = stack.dim, flags_.channels * patch_size**2
        self.dim, self.image_size, self.patch_size, self.channels = dim, image_size, patch_size, flags_.channels
        self.pos_embedding = empty_parameter(1, flags_.num_patches, dim)
        registers = flags_.num_register_tokens
        self.num_register_tokens = registers
        self.register_tokens = empty_parameter(registers, dim) if registers else None
        self.patch_to_embedding = nn.Sequential(LayerNorm(patch_dim), nn.Linear(patch_dim, dim), LayerNorm(dim))
        norm = LayerNorm(dim, bias=stack.flags.norm_bias, eps=stack.flags.norm_eps) if flags_.post_emb_norm else nn.Identity()
        self.post_emb_norm = norm
        self.dropout = nn.Dropout(flags_.emb_dropout)
        self.attn_layers: Any = attn_layers
        self.mlp_head = nn.Identity() if flags_.num_classes is None else nn.Linear(dim, flags_.num_classes)
        self.init_own()

    @torch.no_grad()
    def init_own(self) -> None:
        nn.init.normal_(self.pos_embedding)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens)

    def patches(self, img: Float[Tensor, 'b c h w']) -> Float[Tensor, 'b n p']:
        """Patches row by row; the features of each are ordered by row, column and channel."""
        size = self.patch_size
        side = self.image_size // size
        grid = img.reshape(img.shape[0], self.channels, side, size, side, size)
        return grid.permute(0, 2, 4, 3, 5, 1).reshape(img.shape[0], side * side, self.channels * size**2)

    def forward(
        self, img: Float[Tensor, 'b c h w'], return_embeddings: bool = False, return_logits_and_embeddings: bool = False
    ) -> Any:
        """Logits (b classes); the mean embedding (b d) if there are no classes.

        ``return_embeddings``: an embedding per patch, (b n d); ``return_logits_and_embeddings``: both.
        """
        if return_embeddings and return_logits_and_embeddings:
            raise ValueError('return_embeddings and return_logits_and_embeddings exclude each other; the second returns both.')
        wanted = (self.channels, self.image_size, self.image_size)
        if img.ndim != 4 or tuple(img.shape[1:]) != wanted:
            raise ValueError(
                f'img must have shape (batch, {", ".join(map(str, wanted))}), as channels={self.channels} and '
                f'image_size={self.image_size} say, got {tuple(img.shape)}.'
            )
        if not img.is_floating_point():
            raise TypeError(f'img must be of floating dtype, got {img.dtype}; bytes are scaled by img.float() / 255.')
        x = self.patch_to_embedding(self.patches(img.to(self.pos_embedding.dtype))) + self.pos_embedding
        x = self.dropout(self.post_emb_norm(x))
        length = x.shape[1]
        if self.register_tokens is not None:
            x = torch.cat((x, self.register_tokens.to(x.dtype).expand(x.shape[0], -1, -1)), dim=1)
        embeds = self.attn_layers(x)[:, :length]
        if return_embeddings:
            return embeds
        logits = self.mlp_head(embeds.mean(dim=1))
        return (logits, embeds) if return_logits_and_embeddings else logits
