"""ViTransformerWrapper: images in, logits of classes or embeddings out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from x_transformers.embedding.build import stack_flags
from x_transformers.flags.constructors import only
from x_transformers.flags.fit import check_added_losses
from x_transformers.flags.rules import check_vision
from x_transformers.flags.signature import ClassSignature
from x_transformers.flags.vision import VisionFlags
from x_transformers.module import Module, empty_parameter
from x_transformers.norms import LayerNorm, entrance_norm
from x_transformers.tensor_types import Float

if TYPE_CHECKING:
    from typing import Unpack

    from x_transformers.flags.keywords import VisionKeywords


class ViTransformerWrapper(Module):
    """A vision transformer: a stack over the square patches of an image (https://arxiv.org/abs/2010.11929).

    The keywords are the fields of ``VisionFlags``; ``image_size``, ``patch_size`` and ``attn_layers`` are required. Register
    tokens (https://arxiv.org/abs/2309.16588) follow the patches and are dropped after the stack.

    Raises:
        FlagError: names every keyword that is unknown, has a wrong value, or conflicts with another.
    """

    __signature__: Any = ClassSignature(only(VisionFlags))
    reads = 'images'

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int],
        patch_size: int | tuple[int, int],
        attn_layers: nn.Module,
        **flags: Unpack[VisionKeywords],
    ) -> None:
        super().__init__()
        keywords = {'image_size': image_size, 'patch_size': patch_size, 'attn_layers': attn_layers, **flags}
        flags_ = VisionFlags.parse(keywords, where='ViTransformerWrapper')
        check_vision(flags_, stack_flags(attn_layers), type(self).__name__)
        check_added_losses(attn_layers, type(self).__name__)
        # kept for reading; the stack lives in its slot only
        self.flags = replace(flags_, attn_layers=nn.Identity())
        stack: Any = attn_layers
        dim, patch_dim = stack.dim, flags_.channels * math.prod(flags_.patch_sides)
        self.dim, self.image_size, self.patch_size, self.channels = dim, image_size, patch_size, flags_.channels
        self.cls_token = empty_parameter(1, dim) if flags_.use_cls_token else None
        self.pos_embedding = empty_parameter(1, flags_.num_patches + flags_.use_cls_token, dim)
        registers = flags_.num_register_tokens
        self.num_register_tokens = registers
        self.register_tokens = empty_parameter(registers, dim) if registers else None
        self.patch_to_embedding = nn.Sequential(
            LayerNorm(patch_dim) if flags_.patch_norm else nn.Identity(),
            nn.Linear(patch_dim, dim, bias=flags_.patch_bias),
            LayerNorm(dim) if flags_.patch_norm else nn.Identity(),
        )
        norm = entrance_norm(dim, stack) if flags_.post_emb_norm else nn.Identity()
        self.post_emb_norm = norm
        self.dropout = nn.Dropout(flags_.emb_dropout)
        self.attn_layers: Any = attn_layers
        self.mlp_head = (
            nn.Identity() if flags_.num_classes is None else nn.Linear(dim * (1 + flags_.cls_and_mean), flags_.num_classes)
        )
        self.init_own()

    @torch.no_grad()
    def init_own(self) -> None:
        nn.init.normal_(self.pos_embedding)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=0.02)

    def patches(self, img: Float[Tensor, 'b c h w']) -> Float[Tensor, 'b n p']:
        """Patches row by row; the features of each are ordered by row, column and channel."""
        (height, width), (down, across) = self.flags.image_sides, self.flags.patch_sides
        grid = img.reshape(img.shape[0], self.channels, height // down, down, width // across, across)
        width_of_patch = self.channels * down * across
        return grid.permute(0, 2, 4, 3, 5, 1).reshape(img.shape[0], self.flags.num_patches, width_of_patch)

    def embedded(self, img: Float[Tensor, 'b c h w']) -> Float[Tensor, 'b n d']:
        """What the stack is given: a cls token, patches row by row, registers."""
        wanted = (self.channels, *self.flags.image_sides)
        if not isinstance(img, Tensor):
            shape = f'(batch, {", ".join(map(str, wanted))})'
            raise TypeError(f'img must be a tensor of shape {shape}, got {type(img).__name__}. Stack images into one.')
        if img.ndim != 4 or tuple(img.shape[1:]) != wanted:
            raise ValueError(
                f'img must have shape (batch, {", ".join(map(str, wanted))}), as channels={self.channels} and '
                f'image_size={self.image_size} say, got {tuple(img.shape)}.'
            )
        if not img.is_floating_point():
            raise TypeError(f'img must be of floating dtype, got {img.dtype}. Bytes are scaled by img.float() / 255.')
        x = self.patch_to_embedding(self.patches(img.to(self.pos_embedding.dtype)))
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.to(x.dtype).expand(x.shape[0], -1, -1), x), dim=1)
        x = self.dropout(self.post_emb_norm(x + self.pos_embedding))
        if self.register_tokens is not None:
            x = torch.cat((x, self.register_tokens.to(x.dtype).expand(x.shape[0], -1, -1)), dim=1)
        tokens: Tensor = x
        return tokens

    def feature_maps(
        self, img: Float[Tensor, 'b c h w'], out_indices: Sequence[int] | None = None
    ) -> list[Float[Tensor, 'b d r s']]:
        """The outputs of blocks of the stack, as maps with a cell for each patch; cls and register tokens are omitted.

        ``out_indices``: the executed blocks, from 0, or from the last by negative numbers; None: all. The last map is taken
        after the final norm. Raises ValueError for a block that does not exist.
        """
        x = self.embedded(img)
        seen = self.attn_layers(x, **self.on_grid(x), return_hiddens=True)[1].block_hiddens
        chosen = range(len(seen)) if out_indices is None else tuple(out_indices)
        if any(isinstance(index, bool) or not -len(seen) <= index < len(seen) for index in chosen):
            raise ValueError(
                f'out_indices must be numbers of {len(seen)} blocks, from 0 to {len(seen) - 1}, got {out_indices}.'
            )
        front = 0 if self.cls_token is None else 1
        patches = (seen[index][:, front : front + self.flags.num_patches] for index in chosen)
        return [each.transpose(1, 2).unflatten(2, self.flags.grid) for each in patches]

    def forward(
        self, img: Float[Tensor, 'b c h w'], return_embeddings: bool = False, return_logits_and_embeddings: bool = False
    ) -> Any:
        """Logits (b classes); the mean embedding (b d) if there are no classes.

        ``return_embeddings``: an embedding per patch, (b n d), after those of a cls token and, if they are kept, of registers;
        ``return_logits_and_embeddings``: both.
        """
        if return_embeddings and return_logits_and_embeddings:
            raise ValueError(
                'return_embeddings and return_logits_and_embeddings must not both be True. The second returns both.'
            )
        x = self.embedded(img)
        out = self.attn_layers(x, **self.on_grid(x))
        length = x.shape[1] - self.num_register_tokens
        embeds, registers = out[:, :length], out[:, length:]
        pooled = self.pooled(embeds)
        if self.flags.keep_register_tokens:
            front = 0 if self.cls_token is None else 1
            embeds = torch.cat((embeds[:, :front], registers, embeds[:, front:]), dim=1)
        if return_embeddings:
            return embeds
        logits = self.mlp_head(pooled)
        return (logits, embeds) if return_logits_and_embeddings else logits

    def on_grid(self, x: Float[Tensor, 'b n d']) -> dict[str, Tensor]:
        """Positions, where the stack's are those of a grid: patches are its cells, other tokens are not turned."""
        if self.attn_layers.flags.rotary_axes is None:
            return {}
        front = 0 if self.cls_token is None else 1
        cells = torch.arange(self.flags.num_patches, device=x.device)
        return {'pos': nn.functional.pad(cells, (front, self.num_register_tokens))}

    def pooled(self, embeds: Float[Tensor, 'b n d']) -> Float[Tensor, 'b c']:
        """What logits are made of: the mean of the patches, the cls token, or both."""
        if self.cls_token is None:
            return embeds.mean(dim=1)
        cls, patches = embeds[:, 0], embeds[:, 1:]
        return torch.cat((cls, patches.mean(dim=1)), dim=-1) if self.flags.cls_and_mean else cls


class FeatureMaps(nn.Module):
    """An image model as a backbone, like ``features_only`` of timm: images in, a list of maps out.

    ``model``: a ``ViTransformerWrapper``, whose parameters are those of this module, under ``model``. ``out_indices``: the
    blocks whose outputs to return, see ``ViTransformerWrapper.feature_maps``. ``channels`` and ``reduction``: the features of
    a map, and the pixels of a side (height, width) that a cell covers.
    """

    def __init__(self, model: ViTransformerWrapper, out_indices: Sequence[int] | None = None) -> None:
        super().__init__()
        if not isinstance(model, ViTransformerWrapper):
            raise TypeError(f'model must be a ViTransformerWrapper, got a {type(model).__name__}.')
        self.model = model
        self.out_indices = None if out_indices is None else tuple(out_indices)
        self.channels, self.reduction = model.dim, model.flags.patch_sides

    def forward(self, img: Float[Tensor, 'b c h w']) -> list[Float[Tensor, 'b d r s']]:
        return self.model.feature_maps(img, self.out_indices)
