"""Rotary positions on a grid against their formula, pair by pair."""

from __future__ import annotations

import cmath

import pytest
import torch

from x_transformers import Encoder, ViTransformerWrapper
from x_transformers.flags.base import FlagError
from x_transformers.position.grid import GridRotary
from x_transformers.position.positions import RotaryPositions

B, H, D = 2, 4, 14


def cell(number, axes):
    """The place of a token along each axis."""
    found = []
    for length in reversed(axes[1:]):
        found.insert(0, number % length)
        number //= length
    return [number, *found]


def turned(vector, angles, layout):
    """Each pair as a complex number, turned by its angle."""
    out, pairs = vector.clone(), len(angles)
    for p, angle in enumerate(angles):
        a, b = (2 * p, 2 * p + 1) if layout == 'interleaved' else (p, p + pairs)
        number = complex(vector[a], vector[b]) * cmath.exp(1j * angle)
        out[a], out[b] = number.real, number.imag
    return out


@pytest.mark.parametrize('layout', ['interleaved', 'halves'])
@pytest.mark.parametrize(('axes', 'dim'), [((3, 4), 8), ((2, 3, 2), 12), ((2, 3), 6)])
def test_each_pair_turns_by_one_axis(axes, dim, layout):
    torch.manual_seed(0)
    positions, base = [0, 1, 5, 11, 30], 100.0
    t = torch.randn(B, H, len(positions), D, dtype=torch.float64)
    grid = GridRotary(dim, axes, base=base, layout=layout, interpolation_factor=2.0)
    found = RotaryPositions(*grid(torch.tensor(positions)), layout=layout).queries(t)
    count, pairs = len(axes), dim // 2
    for n, number in enumerate(positions):
        place = cell(number, axes)
        of_axis = -(-pairs // count)
        angles = [place[count - 1 - p % count] / 2.0 * base ** (-(p // count) / of_axis) for p in range(pairs)]
        for b in range(B):
            for h in range(H):
                torch.testing.assert_close(found[b, h, n], turned(t[b, h, n], angles, layout), atol=1e-5, rtol=0)


@pytest.mark.parametrize('layout', ['interleaved', 'halves'])
def test_each_pair_of_each_key_head_turns_by_its_own_sum(layout):
    torch.manual_seed(0)
    axes, dim, kv_heads = (3, 4), 8, 2
    grid = GridRotary(dim, axes, layout=layout, heads=kv_heads)
    q, k = torch.randn(B, H, 12, D).double(), torch.randn(B, kv_heads, 12, D).double()
    places = RotaryPositions(*grid(torch.arange(12)), layout=layout)
    for t, found in ((q, places.queries(q)), (k, places.keys(k))):
        for h in range(t.shape[1]):
            for n in range(12):
                place = cell(n, axes)
                angles = [sum(place[a] * grid.directions[h % kv_heads, a, p].item() for a in range(2)) for p in range(dim // 2)]
                torch.testing.assert_close(found[1, h, n], turned(t[1, h, n], angles, layout), atol=1e-5, rtol=0)


def test_directions_start_orthogonal_with_the_frequencies_of_the_axes():
    directions = GridRotary(8, (3, 4), base=100.0, heads=5).directions
    for p, length in enumerate((1.0, 1.0, 0.1, 0.1)):
        torch.testing.assert_close(directions[:, :, p].norm(dim=-1), torch.full((5,), length))
    torch.testing.assert_close((directions[..., 0] * directions[..., 1]).sum(-1), torch.zeros(5), atol=1e-6, rtol=0)
    assert (directions[0] - directions[1]).abs().max() > 0.01


STACK = {'dim': 16, 'heads': 2, 'attn_dim_head': 8, 'verbose': False, 'rotary_pos_emb': True, 'rotary_axes': (2, 3)}


def test_mixed_directions_of_each_layer_learn():
    model = Encoder(**STACK, depth=2, attn_kv_heads=1, rotary_axes_mixed=True, macaron=True)
    model(torch.randn(1, 6, 16)).square().sum().backward()
    directions = {name: p for name, p in model.named_parameters() if 'directions' in name}
    assert [tuple(p.shape) for p in directions.values()] == [(1, 2, 2)] * 2
    assert all(p.grad.abs().max() > 0 for p in directions.values())


@pytest.mark.parametrize('more', [{}, {'use_cls_token': True, 'num_register_tokens': 2}], ids=str)
def test_an_image_is_a_grid_and_other_tokens_are_not_turned(more):
    torch.manual_seed(0)
    model = ViTransformerWrapper(
        image_size=(4, 6), patch_size=2, attn_layers=Encoder(**STACK, depth=1), channels=1, **more
    ).eval()
    seen = []
    model.attn_layers.rotary_pos_emb.register_forward_hook(lambda module, given, out: seen.append((given[0], out[0])))
    out = model(torch.randn(2, 1, 4, 6), return_embeddings=True)
    assert out.shape[1] == 6 + bool(more)
    front = int(bool(more))
    (pos, angles) = seen[0]
    assert pos.tolist() == [0] * front + [0, 1, 2, 3, 4, 5] + [0, 0] * front
    # the two pairs: columns, rows
    for number in range(6):
        assert angles[0, front + number, ::2].tolist() == pytest.approx([number % 3, number // 3])


def test_what_is_no_grid_is_refused():
    with pytest.raises(FlagError, match='the grid of the patches is'):
        ViTransformerWrapper(image_size=8, patch_size=2, attn_layers=Encoder(**STACK, depth=1))
    cross = Encoder(**STACK, depth=1, cross_attend=True)
    with pytest.raises(ValueError, match='context_pos must not be given with rotary_axes'):
        cross(torch.randn(1, 6, 16), context=torch.randn(1, 3, 16), context_pos=torch.arange(3))
