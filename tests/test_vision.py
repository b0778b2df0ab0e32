"""Images in, classes out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from x_transformers import Encoder, ViTransformerWrapper
from x_transformers.flags.base import FlagError
from x_transformers.vision import FeatureMaps

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
    with pytest.raises(ValueError, match='must not both be True'):
        build()(torch.randn(1, 2, 6, 6), return_embeddings=True, return_logits_and_embeddings=True)


def of_patches(**flags):
    from x_transformers import Encoder, ViTransformerWrapper

    torch.manual_seed(0)
    stack = Encoder(dim=16, depth=1, heads=2)
    return ViTransformerWrapper(image_size=(4, 6), patch_size=(2, 3), channels=2, attn_layers=stack, **flags).eval()


def test_patches_that_are_not_square_are_read_row_by_row():
    model = of_patches()
    img = torch.arange(2 * 4 * 6.0).view(1, 2, 4, 6)
    patches = model.patches(img)
    assert patches.shape == (1, 4, 12)
    for number, (top, left) in enumerate(((0, 0), (0, 3), (2, 0), (2, 3))):
        wanted = [img[0, c, top + y, left + x] for y in range(2) for x in range(3) for c in range(2)]
        torch.testing.assert_close(patches[0, number], torch.stack(wanted))
    with pytest.raises(ValueError, match=r'\(batch, 2, 4, 6\)'):
        model(torch.randn(1, 2, 6, 4))


def test_a_cls_token_has_a_position_and_makes_the_logits():
    model = of_patches(use_cls_token=True, num_classes=3, patch_norm=False, patch_bias=False)
    assert model.pos_embedding.shape == (1, 5, 16)
    linear = model.patch_to_embedding[1]
    assert linear.bias is None
    img = torch.randn(2, 2, 4, 6)
    rows = torch.cat((model.cls_token.expand(2, 1, -1), model.patches(img) @ linear.weight.t()), dim=1) + model.pos_embedding
    wanted = model.attn_layers(rows)
    torch.testing.assert_close(model(img, return_embeddings=True), wanted)
    torch.testing.assert_close(model(img), model.mlp_head(wanted[:, 0]))


def test_registers_that_are_kept_stand_between_cls_token_and_patches():
    model = of_patches(use_cls_token=True, cls_and_mean=True, num_classes=3, num_register_tokens=2, keep_register_tokens=True)
    img = torch.randn(2, 2, 4, 6)
    logits, embeds = model(img, return_logits_and_embeddings=True)
    assert embeds.shape == (2, 7, 16)
    wanted = torch.cat((embeds[:, 0], embeds[:, 3:].mean(dim=1)), dim=-1)
    torch.testing.assert_close(logits, model.mlp_head(wanted))


def test_sizes_of_images_are_one_number_or_two():
    from x_transformers import Encoder, ViTransformerWrapper
    from x_transformers.flags.base import FlagError

    with pytest.raises(FlagError, match='one side, or height and width'):
        ViTransformerWrapper(image_size=(4, 4, 4), patch_size=2, attn_layers=Encoder(dim=16, depth=1))
    with pytest.raises(FlagError, match='patches tile the image'):
        ViTransformerWrapper(image_size=(4, 6), patch_size=4, attn_layers=Encoder(dim=16, depth=1))


@pytest.mark.parametrize('extra', [{}, {'use_cls_token': True, 'num_register_tokens': 3}], ids=['patches', 'cls and registers'])
def test_feature_maps_are_the_patches_that_leave_blocks(extra: dict[str, Any]) -> None:
    stack = Encoder(**{**STACK, 'depth': 3})
    model, img = build(image_size=(6, 12), attn_layers=stack, **extra), torch.randn(2, 2, 6, 12)
    left: list[torch.Tensor] = []
    for layer in stack.layers[1::2]:
        layer.register_forward_hook(lambda module, args, out: left.append(out[0]))
    maps = FeatureMaps(model)(img)
    front = 1 if extra else 0
    wanted = [*left[:2], stack.final_norm(left[2])]
    assert [tuple(each.shape) for each in maps] == [(2, 16, 2, 4)] * 3
    for each, tokens in zip(maps, wanted, strict=True):
        for row in range(2):
            for column in range(4):
                torch.testing.assert_close(each[:, :, row, column], tokens[:, front + 4 * row + column])
    embeds = model(img, return_embeddings=True)[:, front:]
    torch.testing.assert_close(maps[-1].flatten(2).transpose(1, 2), embeds)


def test_chosen_maps_have_gradients() -> None:
    model, img = build(attn_layers=Encoder(**{**STACK, 'depth': 3})), torch.randn(1, 2, 6, 6)
    backbone = FeatureMaps(model, out_indices=(0, -2))
    assert (backbone.channels, backbone.reduction) == (16, (3, 3))
    every = model.feature_maps(img)
    first, second = backbone(img)
    torch.testing.assert_close((first, second), (every[0], every[1]))
    second.square().sum().backward()
    reached = [layer[1] for layer in model.attn_layers.layers]
    assert all(parameter.grad.abs().sum() > 0 for part in reached[:4] for parameter in part.parameters())
    assert all(parameter.grad is None for part in reached[4:] for parameter in part.parameters())


def test_maps_of_blocks_that_there_are_not() -> None:
    model, img = build(), torch.randn(1, 2, 6, 6)
    for wrong in ((1,), (-2,), (True,)):
        with pytest.raises(ValueError, match=r'out_indices must be numbers of 1 blocks, from 0 to 0, got'):
            model.feature_maps(img, wrong)
    with pytest.raises(TypeError, match='model must be a ViTransformerWrapper, got a Encoder'):
        FeatureMaps(Encoder(**STACK))
