"""Rotary positions against the rotation written out pair by pair."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch import Tensor

from x_transformers import Decoder
from x_transformers.flags.base import FlagError
from x_transformers.position.positions import RotaryPositions, RotaryTable
from x_transformers.position.rotary import RotaryEmbedding, apply_rotary_pos_emb, rotate_half


def placed(emb: RotaryEmbedding, pos: Tensor) -> RotaryPositions:
    return RotaryPositions(*emb(pos))


def rotated(t: Tensor, angle_of: callable, scale_of: callable = lambda b, n, k: 1.0) -> Tensor:
    """The definition, one pair after the other; angle_of(batch, row, pair) is None where nothing turns."""
    out = t.clone()
    for b in range(t.shape[0]):
        for n in range(t.shape[2]):
            for k in range(t.shape[3] // 2):
                angle = angle_of(b, n, k)
                if angle is None:
                    continue
                s = scale_of(b, n, k)
                x, y = t[b, :, n, 2 * k], t[b, :, n, 2 * k + 1]
                out[b, :, n, 2 * k] = s * (x * math.cos(angle) - y * math.sin(angle))
                out[b, :, n, 2 * k + 1] = s * (y * math.cos(angle) + x * math.sin(angle))
    return out


@pytest.mark.parametrize('dim', [2, 4, 8])
def test_rotation(dim: int) -> None:
    emb = RotaryEmbedding(dim, base_rescale_factor=2.0, interpolation_factor=1.5)
    base = 10000 * 2.0 ** (dim / (dim - 2)) if dim > 2 else 10000
    assert list(emb.state_dict()) == ['inv_freq']
    freqs, scale = emb.forward_from_seq_len(7)
    assert freqs.shape == (1, 7, dim)
    assert scale == 1.0
    assert torch.equal(freqs[..., ::2], freqs[..., 1::2])
    t = torch.randn(2, 3, 5, 8)

    def angle(b: int, n: int, k: int) -> float | None:
        return (n + 2) * base ** (-2 * k / dim) / 1.5 if 2 * k < dim else None

    expected = rotated(t, angle)
    torch.testing.assert_close(apply_rotary_pos_emb(t, freqs, scale), expected, atol=1e-5, rtol=1e-5)
    positions = RotaryPositions(freqs, scale)
    torch.testing.assert_close(positions.queries(t), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(positions.keys(t), expected, atol=1e-5, rtol=1e-5)
    back = RotaryTable(positions.new_angles(5)).rotated(positions.keys(t), None, back=True)
    torch.testing.assert_close(back, t, atol=1e-5, rtol=1e-5)
    assert positions.cache_form == 'positioned'
    some = positions.queries(t, heads=2)
    torch.testing.assert_close(some, torch.cat((t[:, :1], expected[:, 1:]), dim=1), atol=1e-5, rtol=1e-5)


def test_xpos() -> None:
    emb = RotaryEmbedding(4, use_xpos=True, scale_base=16)
    assert list(emb.state_dict()) == ['inv_freq', 'scale']
    pos = torch.tensor([[0, 1, 2, 3, 4], [3, 4, 5, 6, 8]])
    freqs, scale = emb(pos)
    zeta = [(2 * k + 0.4 * 4) / (1.4 * 4) for k in range(2)]
    t = torch.randn(2, 3, 5, 8)

    def angle(b: int, n: int, k: int) -> float | None:
        return float(pos[b, n]) * 10000 ** (-2 * k / 4) if k < 2 else None

    def grow(b: int, n: int, k: int) -> float:
        return zeta[k] ** ((float(pos[b, n]) - 9 // 2) / 16)

    positions = RotaryPositions(freqs, scale)
    assert positions.cache_form == 'raw'
    queries = rotated(t, angle, grow)
    keys = rotated(t, angle, lambda b, n, k: 1 / grow(b, n, k))
    torch.testing.assert_close(positions.queries(t), queries, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(positions.keys(t), keys, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(apply_rotary_pos_emb(t, freqs, scale), queries, atol=1e-5, rtol=1e-5)


def test_tables_are_aligned_on_the_right() -> None:
    emb = RotaryEmbedding(4)
    positions = placed(emb, torch.arange(-3, 6))
    k = torch.randn(2, 2, 9, 4)
    whole = positions.keys(k)
    torch.testing.assert_close(positions.keys(k[:, :, -2:]), whole[:, :, -2:])
    torch.testing.assert_close(positions.keys(k[:, :, :3], before=6), whole[:, :, :3])
    torch.testing.assert_close(positions.queries(k[:, :, -1:]), whole[:, :, -1:])
    with pytest.raises(ValueError, match=r'cover all 10 keys, .*got 9'):
        positions.keys(torch.randn(2, 2, 10, 4))
    with pytest.raises(ValueError, match='at most the 2 channels of a head, got 4'):
        positions.keys(torch.randn(2, 2, 9, 2))
    with pytest.raises(ValueError, match=r'cover all 10 keys, .*got 9'):
        apply_rotary_pos_emb(torch.randn(2, 2, 10, 4), emb(torch.arange(9))[0])


def test_cross_attention_takes_keys_from_the_context() -> None:
    emb = RotaryEmbedding(4)
    own = RotaryPositions(*emb(torch.arange(5)))
    cross = RotaryPositions(*emb(torch.arange(5)), context=emb(torch.arange(10, 17)))
    q, k = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 7, 4)
    torch.testing.assert_close(cross.queries(q), own.queries(q))
    torch.testing.assert_close(cross.keys(k), apply_rotary_pos_emb(k, emb(torch.arange(10, 17))[0]))


def test_scores_depend_on_distance_only() -> None:
    emb = RotaryEmbedding(8)
    q, k = torch.randn(1, 1, 6, 8), torch.randn(1, 1, 6, 8)
    near, far = placed(emb, torch.arange(6)), placed(emb, torch.arange(50, 56))
    scores = [p.queries(q) @ p.keys(k).transpose(-1, -2) for p in (near, far)]
    torch.testing.assert_close(*scores, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('layout', ['contiguous', 'transposed', 'odd offset'])
def test_gradients_and_layouts(layout: str) -> None:
    emb = RotaryEmbedding(4).double()
    freqs = emb(torch.arange(3))[0].requires_grad_()
    t = torch.randn(1, 2, 3, 6, dtype=torch.double)
    if layout == 'transposed':
        t = torch.randn(1, 3, 2, 6, dtype=torch.double).transpose(1, 2)
    if layout == 'odd offset':
        t = torch.randn(1, 2, 3, 7, dtype=torch.double)[..., 1:]
    t.requires_grad_()
    assert torch.autograd.gradcheck(lambda t, f: apply_rotary_pos_emb(t, f), (t, freqs))
    assert torch.autograd.gradcheck(lambda t, f: RotaryPositions(f).queries(t), (t, freqs))


def test_standalone_ranks() -> None:
    freqs, _ = RotaryEmbedding(4)(torch.arange(5))
    t = torch.randn(2, 5, 6)
    expected = apply_rotary_pos_emb(t.unsqueeze(1), freqs).squeeze(1)
    torch.testing.assert_close(apply_rotary_pos_emb(t, freqs), expected)
    torch.testing.assert_close(apply_rotary_pos_emb(t[0], freqs[0]), expected[0])
    assert rotate_half(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [-2.0, 1.0, -4.0, 3.0]


def test_odd_widths() -> None:
    freqs, _ = RotaryEmbedding(3)(torch.arange(5))
    assert freqs.shape == (1, 5, 4)  # one channel more than asked for, as in the original
    t = torch.randn(1, 2, 5, 7)
    expected = rotated(t, lambda b, n, k: n * 10000 ** (-2 * k / 3) if k < 2 else None)
    torch.testing.assert_close(RotaryPositions(freqs).keys(t), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(apply_rotary_pos_emb(t, freqs), expected, atol=1e-5, rtol=1e-5)


def test_half_precision_keeps_exact_angles() -> None:
    t = torch.randn(1, 1, 3, 8)
    pos = torch.tensor([4001, 4002, 4003])
    full = placed(RotaryEmbedding(8), pos).queries(t)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        half = placed(RotaryEmbedding(8), pos).queries(t.bfloat16())
        alone = apply_rotary_pos_emb(t.bfloat16(), RotaryEmbedding(8)(pos)[0])
    assert half.dtype == alone.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), full, atol=0.03, rtol=0.03)
    torch.testing.assert_close(alone, half)


def test_compiled_is_the_same() -> None:
    emb = RotaryEmbedding(4, use_xpos=True)

    def run(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        positions = placed(emb, torch.arange(5))
        return positions.queries(q, heads=1), positions.keys(k)

    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        compiled = torch.compile(run, backend='eager', fullgraph=True)
        found = compiled(q, k)
    for one, other in zip(found, run(q, k), strict=True):
        torch.testing.assert_close(one, other)


def test_builds_without_memory() -> None:
    with torch.device('meta'):
        emb = RotaryEmbedding(6, use_xpos=True)
    assert emb(torch.arange(3, device='meta'))[0].shape == (1, 3, 6)
    emb.to_empty(device='cpu')
    emb.reset_parameters()
    for name, value in RotaryEmbedding(6, use_xpos=True).state_dict().items():
        assert torch.equal(emb.state_dict()[name], value)


def test_refusals() -> None:
    with pytest.raises(FlagError, match=r'at least 1, .*got 0\.5'):
        RotaryEmbedding(4, interpolation_factor=0.5)
    with pytest.raises(FlagError, match='at least one pair'):
        RotaryEmbedding(0)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    'flags', [{'rotary_pos_emb': True}, {'rotary_pos_emb': True, 'rotary_xpos': True}, {'polar_pos_emb': True}], ids=str
)
def test_a_model_that_is_cast_to_half_precision_keeps_its_frequencies(dtype: torch.dtype, flags: dict) -> None:
    net = Decoder(dim=32, depth=1, heads=2, attn_dim_head=16, verbose=False, **flags)
    exact = {name: buffer.clone() for name, buffer in net.named_buffers()}
    half = copy.deepcopy(net).to(dtype)
    assert exact
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    for model in (half, copy.deepcopy(half).float(), copy.deepcopy(half).double()):
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer.float(), exact[name]), name
    x = torch.randn(1, 64, 32)
    assert half(x.to(dtype)).dtype == dtype
    assert half.to(device='meta').get_buffer(next(iter(exact))).is_meta
