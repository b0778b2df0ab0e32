"""The flags of an image model around a stack."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from x_transformers.flags.base import REQUIRED, Flags, flag
from x_transformers.flags.rule import Rule


def sides(size: int | tuple[int, ...]) -> tuple[int, int]:
    """(height, width) of what is given by one side or by both."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


@dataclass(frozen=True, kw_only=True, repr=False)
class VisionFlags(Flags):
    """Every keyword of ``ViTransformerWrapper``."""

    image_size: int | tuple[int, ...] = flag(
        REQUIRED, 'Side of the image; or its height and width.', low=1,
        rules=(
            Rule(
                ('image_size', 'patch_size'),
                lambda flags, dim: any(
                    isinstance(size, tuple) and len(size) != 2 for size in (flags.image_size, flags.patch_size)
                ),
                'a size is one side, or height and width', {'image_size': (8, 8, 3), 'patch_size': 4},
                'Give one number or two.',
            ),
            Rule(
                ('image_size', 'patch_size'),
                lambda flags, dim: any(
                    image % patch for image, patch in zip(flags.image_sides, flags.patch_sides, strict=True)
                ),
                'patches tile the image', {'image_size': 10, 'patch_size': 4}, 'Choose a divisor of {image_size}.',
            ),
        ),
    )  # fmt: skip
    patch_size: int | tuple[int, ...] = flag(REQUIRED, 'Side of a patch; or its height and width.', low=1)
    attn_layers: nn.Module = flag(REQUIRED, 'The stack, usually an Encoder.')
    channels: int = flag(3, 'Channels of the image.', low=1)
    num_classes: int | None = flag(None, 'Number of logits; None: the pooled embedding is returned.', low=1)
    post_emb_norm: bool = flag(False, 'Layer norm of the embedded patches.')
    num_register_tokens: int = flag(
        0, 'Learned tokens behind the patches that are dropped afterwards.', paper='https://arxiv.org/abs/2309.16588', low=0
    )
    emb_dropout: float = flag(0.0, 'Dropout on the embedded patches.', low=0.0, high=1.0)
    patch_norm: bool = flag(True, 'Layer norms around the map that embeds patches.', since='here')
    patch_bias: bool = flag(True, 'A bias in the map that embeds patches.', since='here')
    use_cls_token: bool = flag(
        False, 'Logits of a learned token in front of the patches, which has a position too.',
        paper='https://arxiv.org/abs/2010.11929', since='here',
    )  # fmt: skip
    cls_and_mean: bool = flag(
        False, 'Logits of that token beside the mean of the patches.', paper='https://arxiv.org/abs/2304.07193',
        parent='use_cls_token', since='here',
    )  # fmt: skip
    keep_register_tokens: bool = flag(
        False, 'The embeddings hold the register tokens too, in front of the patches.', parent='num_register_tokens',
        since='here',
    )  # fmt: skip

    @property
    def image_sides(self) -> tuple[int, int]:
        return sides(self.image_size)

    @property
    def patch_sides(self) -> tuple[int, int]:
        return sides(self.patch_size)

    @property
    def grid(self) -> tuple[int, ...]:
        """Patches in a column, and in a row."""
        return tuple(image // patch for image, patch in zip(self.image_sides, self.patch_sides, strict=True))

    @property
    def num_patches(self) -> int:
        return math.prod(self.grid)
