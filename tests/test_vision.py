"""Images in, classes out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from x_transformers import Encoder, ViTransformerWrapper
from x_transformers.flags.base import FlagError

STACK: dict[str, Any] = {'dim': 16, 'depth': 1, 'heads': 2, 'attn_dim_head': 8, 'verbose': False}


def build(**flags: Any) -> ViTransformerWrapper:
    given = {'image_size': 6, 'patch_size': 3, 'channels': 2, 'attn_layers': Encoder(**STACK), **flags}
    return ViTransformerWrapper(**given).eval()


def test_patches_go_row_by_row_and_channels_last() -> None:
    img = torch.arange(2 * 6 * 6).float().view(1, 2, 6, 6)
    patches = build().patches(img)
    assert patches.shape == (1, 4, 18)
    for number in range(4):
        top, left = 3 * (number // 2), 3 * (number % 2)
        wanted = [img[0, c, top + r, left + s].item() for r in range(3) for s in range(3) for c in range(2)]
        assert patches[0, number].tolist() == wanted


@pytest.mark.parametrize('registers', [0, 3])
@pytest.mark.parametrize('norm', [False, True])
def test_logits_by_hand(registers: int, norm: bool) -> None:
    model, img = build(num_classes=5, num_register_tokens=registers, post_emb_norm=norm), torch.randn(2, 2, 6, 6)
    x = model.post_emb_norm(model.patch_to_embedding(model.patches(img)) + model.pos_embedding)
    if registers:
        x = torch.cat((x, model.register_tokens.expand(2, -1, -1)), dim=1)
    embeds = model.attn_layers(x)[:, :4]
    logits = model.mlp_head(embeds.mean(1))
    torch.testing.assert_close(model(img), logits)
    torch.testing.assert_close(model(img, return_embeddings=True), embeds)
    both = model(img, return_logits_and_embeddings=True)
    torch.testing.assert_close(both, (logits, embeds))


def test_without_classes_the_mean_is_returned() -> None:
    model, img = build(), torch.randn(2, 2, 6, 6)
    torch.testing.assert_close(model(img), model(img, return_embeddings=True).mean(1))


def test_names_and_start() -> None:
    with torch.device('meta'):
        model = build(image_size=30, num_classes=5, num_register_tokens=40, post_emb_norm=True)
    model.to_empty(device='cpu').reset_parameters()
    names = [name for name in model.state_dict() if not name.startswith('attn_layers.')]
    assert names == [
        'pos_embedding',
        'register_tokens',
        'patch_to_embedding.0.gamma',
        'patch_to_embedding.1.weight',
        'patch_to_embedding.1.bias',
        'patch_to_embedding.2.gamma',
        'post_emb_norm.gamma',
        'mlp_head.weight',
        'mlp_head.bias',
    ]
    for table in (model.pos_embedding, model.register_tokens):
        assert table.std().item() == pytest.approx(1.0, rel=0.1)
    assert model(torch.randn(1, 2, 30, 30)).isfinite().all()


def test_every_parameter_learns() -> None:
    model = build(num_classes=5, num_register_tokens=2)
    model(torch.randn(2, 2, 6, 6)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize(
    ('flags', 'says'),
    [
        ({'image_size': 7}, 'patch_size'),
        ({'num_registers': 2}, 'num_register_tokens'),
        ({'attn_layers': nn.Linear(2, 2)}, 'got Linear'),
    ],
)
def test_flags_that_cannot_be(flags: dict[str, Any], says: str) -> None:
    with pytest.raises(FlagError, match=says):
        build(**flags)


@pytest.mark.parametrize('shape', [(2, 3, 6, 6), (2, 2, 6, 9), (2, 6, 6)])
def test_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r'\(batch, 2, 6, 6\)'):
        build()(torch.randn(shape))


def test_bytes_and_two_answers_at_once_are_refused() -> None:
    with pytest.raises(TypeError, match='255'):
        build()(torch.zeros(1, 2, 6, 6, dtype=torch.uint8))
    with pytest.raises(ValueError, match='exclude each other'):
        build()(torch.randn(1, 2, 6, 6), return_embeddings=True, return_logits_and_embeddings=True)
