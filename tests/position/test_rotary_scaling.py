"""Rotary flags against their formulas, one pair of channels at a time."""

from __future__ import annotations

import math

import pytest
import torch

from x_transformers import Decoder, Encoder, TransformerWrapper
from x_transformers.flags.base import FlagError
from x_transformers.position.rotary import RotaryEmbedding

DIM, BASE, ORIGINAL = 8, 500.0, 32


def frequencies(**scaling):
    return RotaryEmbedding(DIM, base=BASE, scaling=scaling or None).inv_freq


def plain():
    return [BASE ** (-2 * k / DIM) for k in range(DIM // 2)]


def close(found, wanted):
    torch.testing.assert_close(found.double(), torch.tensor(wanted).double(), rtol=1e-5, atol=1e-7)


def test_the_base_of_the_wavelengths_is_a_flag():
    stack = Decoder(dim=16, depth=1, heads=2, attn_dim_head=8, rotary_pos_emb=True, rotary_emb_dim=8, rotary_theta=BASE)
    close(stack.rotary_pos_emb.inv_freq, plain())


def test_linear():
    close(frequencies(type='linear', factor=4.0), [f / 4 for f in plain()])


def test_llama3():
    found = frequencies(type='llama3', factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=ORIGINAL)
    wanted = []
    for f in plain():
        wave = 2 * math.pi / f
        if wave < ORIGINAL / 4:
            wanted.append(f)
        elif wave > ORIGINAL:
            wanted.append(f / 8)
        else:
            smooth = (ORIGINAL / wave - 1) / (4 - 1)
            wanted.append((1 - smooth) * f / 8 + smooth * f)
    assert len({round(w / f, 4) for w, f in zip(wanted, plain(), strict=True)}) == 3, 'all three cases are tried'
    close(found, wanted)


@pytest.mark.parametrize('truncate', [True, False])
def test_yarn(truncate):
    found = frequencies(type='yarn', factor=4.0, original_length=ORIGINAL, beta_fast=4.0, beta_slow=0.5, truncate=truncate)
    # the pair that turns r times over the original length
    pair = {r: DIM * math.log(ORIGINAL / (r * 2 * math.pi)) / (2 * math.log(BASE)) for r in (4.0, 0.5)}
    low, high = (math.floor(pair[4.0]), math.ceil(pair[0.5])) if truncate else (pair[4.0], pair[0.5])
    low = max(low, 0)
    wanted = []
    for k, f in enumerate(plain()):
        ramp = min(max((k - low) / (high - low), 0), 1)
        wanted.append(f * (1 - ramp) + f / 4 * ramp)
    close(found, wanted)


def test_yarn_multiplies_queries_and_keys_and_the_cache_undoes_it():
    factor = 0.1 * math.log(4.0) + 1
    scaling = {'type': 'yarn', 'factor': 4.0, 'original_length': ORIGINAL}
    assert RotaryEmbedding(DIM, scaling=scaling).attention_factor == pytest.approx(factor)
    assert RotaryEmbedding(DIM, scaling={**scaling, 'attention_factor': 1.25}).attention_factor == 1.25
    mscale = RotaryEmbedding(DIM, scaling={**scaling, 'mscale': 1.0, 'mscale_all_dim': 0.5}).attention_factor
    assert mscale == pytest.approx(factor / (0.05 * math.log(4.0) + 1))
    x = torch.randn(2, 6, 16)
    for layout in ('interleaved', 'halves'):
        flags = {'rotary_pos_emb': True, 'rotary_emb_dim': 4, 'rotary_layout': layout}
        torch.manual_seed(0)
        stack = Decoder(dim=16, depth=1, heads=2, attn_dim_head=8, rotary_scaling=scaling, **flags)
        _, record = stack(x, return_hiddens=True)
        attention = stack.layers[0].inside
        normed = stack.layers[0].norm_before(stack.layers[0].norms[0], x, None)
        wanted = attention.to_k(normed).view(2, 6, 2, 8).transpose(1, 2)
        torch.testing.assert_close(record.attn_intermediates[0].cached_kv[0], wanted)


def test_dynamic():
    embedding = RotaryEmbedding(DIM, base=BASE, scaling={'type': 'dynamic', 'factor': 2.0, 'original_length': ORIGINAL})
    for length in (10, 32, 50, 100):
        angles, scale = embedding.halves(torch.arange(length))
        stretched = BASE * max(1, 2.0 * length / ORIGINAL - 1) ** (DIM / (DIM - 2))
        wanted = [[p * stretched ** (-2 * k / DIM) for k in range(DIM // 2)] for p in range(length)]
        assert scale == 1.0
        torch.testing.assert_close(angles[0], torch.tensor(wanted), rtol=1e-4, atol=1e-4)


def test_dynamic_with_a_single_pair():
    """Its frequency is base ** 0, however far the base is stretched."""
    embedding = RotaryEmbedding(2, scaling={'type': 'dynamic', 'factor': 2.0, 'original_length': 4})
    angles, _ = embedding(torch.arange(9))
    torch.testing.assert_close(angles.squeeze()[..., 0], torch.arange(9.0))


def test_longrope():
    short, long = (1.0, 1.1, 1.2, 1.3), (2.0, 3.0, 4.0, 5.0)
    scaling = {'type': 'longrope', 'short_factor': short, 'long_factor': long, 'original_length': ORIGINAL, 'factor': 4.0}
    embedding = RotaryEmbedding(DIM, base=BASE, scaling=scaling)
    assert embedding.attention_factor == pytest.approx(math.sqrt(1 + math.log(4) / math.log(ORIGINAL)))
    for length, factors in ((32, short), (33, long)):
        angles, _ = embedding.halves(torch.arange(length))
        wanted = [[p * f / factor for f, factor in zip(plain(), factors, strict=True)] for p in range(length)]
        torch.testing.assert_close(angles[0], torch.tensor(wanted), rtol=1e-4, atol=1e-4)


def test_the_length_is_that_of_the_tokens_of_a_row():
    scaling = {'type': 'dynamic', 'factor': 2.0, 'original_length': 4}
    torch.manual_seed(0)
    stack = Encoder(dim=16, depth=2, heads=2, attn_dim_head=8, rotary_pos_emb=True, rotary_scaling=scaling)
    x = torch.randn(1, 9, 16)
    mask = torch.arange(9)[None] < 6
    torch.testing.assert_close(stack(x, mask=mask)[:, :6], stack(x[:, :6]), rtol=1e-4, atol=1e-5)
    left = stack(torch.cat((torch.randn(1, 3, 16), x[:, :6]), dim=1), seq_start_pos=torch.tensor([3]))
    torch.testing.assert_close(left[:, 3:], stack(x[:, :6]), rtol=1e-4, atol=1e-5)


def test_halves_turn_the_k_th_channels_of_both_halves():
    embedding = RotaryEmbedding(6, base=BASE, layout='halves')
    freqs, _ = embedding(torch.arange(5))
    torch.testing.assert_close(freqs[0, :, :3], freqs[0, :, 3:])
    torch.manual_seed(0)
    stack = Decoder(
        dim=16, depth=1, heads=2, attn_dim_head=8, rotary_pos_emb=True, rotary_emb_dim=6, rotary_layout='halves',
        rotary_theta=BASE,
    )  # fmt: skip
    x = torch.randn(1, 5, 16)
    _, record = stack(x, return_hiddens=True)
    attention = stack.layers[0].inside
    normed = stack.layers[0].norm_before(stack.layers[0].norms[0], x, None)
    q, k = (to(normed).view(5, 2, 8) for to in (attention.to_q, attention.to_k))

    def turned(t, position):
        out = t.clone()
        for pair in range(3):
            angle = position * BASE ** (-2 * pair / 6)
            a, b = t[pair], t[pair + 3]
            out[pair] = a * math.cos(angle) - b * math.sin(angle)
            out[pair + 3] = b * math.cos(angle) + a * math.sin(angle)
        return out

    scores = record.attn_intermediates[0].pre_softmax_attn
    for head in range(2):
        for i in range(5):
            for j in range(i + 1):
                wanted = turned(q[i, head], i) @ turned(k[j, head], j) * 8**-0.5
                torch.testing.assert_close(scores[0, head, i, j], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('layout', ['interleaved', 'halves'])
@pytest.mark.parametrize('kind', ['yarn', 'dynamic'])
def test_cached_steps_say_what_the_whole_sequence_says_within_the_original_length(layout, kind):
    torch.manual_seed(0)
    model = TransformerWrapper(
        num_tokens=20,
        max_seq_len=64,
        attn_layers=Decoder(
            dim=16,
            depth=2,
            heads=2,
            rotary_pos_emb=True,
            rotary_layout=layout,
            rotary_scaling={'type': kind, 'factor': 2.0, 'original_length': 32},
        ),
    ).eval()
    ids = torch.randint(0, 20, (2, 12))
    whole = model(ids)
    cache = None
    for t in range(12):
        logits, record = model(ids[:, t : t + 1], cache=cache, return_intermediates=True, input_not_include_cache=True)
        cache = record.kv_cache
        torch.testing.assert_close(logits[:, 0], whole[:, t], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ('scaling', 'says'),
    [
        ({'type': 'ntk'}, "'type' must be one of linear, dynamic, yarn, llama3, longrope, got 'ntk'"),
        ({'type': 'yarn', 'factor': 4.0}, "yarn needs 'original_length'"),
        ({'type': 'linear', 'factor': 4.0, 'beta': 1}, "linear has no 'beta'"),
        ({'type': 'linear', 'factor': 0.5}, "'factor' must be at least 1"),
        (
            {'type': 'longrope', 'short_factor': (1.0,), 'long_factor': (1.0,), 'original_length': 4},
            'must be 4 positive numbers',
        ),
    ],
)
def test_complaints(scaling, says):
    with pytest.raises(FlagError, match='rotary_scaling') as caught:
        Decoder(dim=16, depth=1, heads=2, attn_dim_head=16, rotary_pos_emb=True, rotary_emb_dim=8, rotary_scaling=scaling)
    assert says in str(caught.value)


def test_whole_heads_turn_as_channels_that_are_counted() -> None:
    for dim_head in (6, 8):
        sizes = {'dim': 16, 'depth': 1, 'heads': 2, 'attn_dim_head': dim_head, 'rotary_pos_emb': True}
        stack, x = Decoder(**sizes, rotary_whole_head=True), torch.randn(2, 9, 16)
        counted, half = Decoder(**sizes, rotary_emb_dim=dim_head), Decoder(**sizes)
        for other in (counted, half):
            other.load_state_dict(dict(stack.named_parameters()), strict=False)
        assert stack.rotary_pos_emb.inv_freq.shape == (dim_head // 2,)
        torch.testing.assert_close(stack(x), counted(x))
        assert not torch.allclose(stack(x), half(x))
