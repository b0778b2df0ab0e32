"""Texts of four thousand tokens in half precision: what a layer of sharp attention says is what double precision says.

Errors of positions grow with the distance, so a short text shows none of them.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from x_transformers import Decoder, TransformerWrapper

LENGTH, TOKENS, DIM = 4096, 24, 32

# for each layer, as a share of the spread of the outputs; the parts of a text that are compared have 256 tokens
BOUNDS = {torch.bfloat16: 0.02, torch.float16: 0.0025}
PART = 256

ROTARY = {'rotary_pos_emb': True}
NO_TABLE = {'use_abs_pos_emb': False}
FLAGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    'table': ({}, {}),
    'sinusoidal': ({'scaled_sinu_pos_emb': True}, {}),
    'rotary': ({}, ROTARY),
    'theta': ({}, ROTARY | {'rotary_theta': 1e6}),
    'xpos': ({}, ROTARY | {'rotary_xpos': True}),
    'interpolated': ({}, ROTARY | {'rotary_interpolation_factor': 8.0}),
    'polar': ({}, {'polar_pos_emb': True}),
    'alibi': (NO_TABLE, {'alibi_pos_bias': True}),
    'alibi_slopes': (NO_TABLE, {'alibi_pos_bias': True, 'rel_pos_kwargs': {'slopes': [0.07, 0.3]}}),
    't5': ({}, {'rel_pos_bias': True}),
    'dynamic': (NO_TABLE, {'dynamic_pos_bias': True}),
    'dynamic_norm': (NO_TABLE, {'dynamic_pos_bias': True, 'dynamic_pos_bias_norm': True}),
    'dynamic_log': (NO_TABLE, {'dynamic_pos_bias': True, 'dynamic_pos_bias_log_distance': True}),
    'forgetting': (NO_TABLE, {'attn_data_dependent_alibi': True}),
    'window': ({}, ROTARY | {'attn_max_attend_past': 300}),
    'unit': ({}, ROTARY | {'attn_qk_norm': True}),
    'laser': ({}, ROTARY | {'attn_laser': True}),
    'memory_keys': ({}, ROTARY | {'attn_num_mem_kv': 3}),
    'clamped': ({}, ROTARY | {'attn_softclamp_logits': True}),
    'distance': ({}, ROTARY | {'attn_l2_distance': True}),
    'sigmoid': ({}, ROTARY | {'attn_sigmoid': True}),
    'shared': ({}, ROTARY | {'attn_kv_heads': 1}),
    'latent': ({}, {'attn_use_latent_kv': True, 'attn_dim_latent_kv': 16}),
    'delta': ({}, {'custom_layers': ('m', 'a'), 'mixer': 'gated_delta_rule'}),
    'linear': ({}, {'custom_layers': ('m', 'a'), 'mixer': 'gated_linear_attention'}),
}
# what holds the whole score matrix takes longer
LONGER: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    'sink': ({}, ROTARY | {'attn_head_learned_sink': True}),
    'selective': ({}, {'attn_selective': True}),
    'contextual': ({}, {'attn_use_cope': True}),
    'stick_breaking': ({}, {'attn_stick_breaking': True}),
    'talking_heads': ({}, ROTARY | {'attn_pre_talking_heads': True}),
}


@torch.no_grad()
def sharp(name: str) -> TransformerWrapper:
    """One layer whose scores and outputs are as large as those of trained models."""
    wrapper, flags = (FLAGS | LONGER)[name]
    torch.manual_seed(0)
    given = {'custom_layers': ('a',), 'verbose': False} | flags
    stack = Decoder(dim=DIM, depth=1, heads=2, attn_dim_head=DIM, **given)
    net = TransformerWrapper(num_tokens=TOKENS, max_seq_len=LENGTH, attn_layers=stack, **wrapper).eval()
    for part, factor in (('to_q', 4.0), ('to_k', 4.0), ('to_out', 8.0)):
        for where, module in stack.named_modules():
            if where.endswith(f'.{part}') and hasattr(module, 'weight'):
                module.weight.mul_(factor)
    return net


def text(rows: int = 1) -> Tensor:
    return torch.randint(0, TOKENS, (rows, LENGTH), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def gaps(net: TransformerWrapper, dtype: torch.dtype, **given: Any) -> list[float]:
    """How far the outputs are from those in double precision with the same rounded weights, part by part of the text."""
    wide: Any = copy.deepcopy(net).to(dtype).double()
    got, want = net.to(dtype)(text(), **given).double(), wide(text(), **given)
    assert got.isfinite().all()
    spread = float(want.square().mean().sqrt())
    return [float(each.square().mean().sqrt()) / spread for each in (got - want).split(PART, dim=1)]


@pytest.mark.parametrize('dtype', BOUNDS, ids=str)
@pytest.mark.parametrize('name', [*FLAGS, *(pytest.param(name, marks=pytest.mark.deep) for name in LONGER)])
def test_half_precision_is_near_all_along_a_long_text(name: str, dtype: torch.dtype) -> None:
    net: Any = sharp(name)
    assert max(gaps(net, dtype)) <= BOUNDS[dtype] * len(net.attn_layers.layers)


@pytest.mark.parametrize('dtype', BOUNDS, ids=str)
def test_behind_a_thousand_pads(dtype: torch.dtype) -> None:
    assert max(gaps(sharp('rotary'), dtype, seq_start_pos=torch.tensor([1024]))[4:]) <= BOUNDS[dtype]


@pytest.mark.parametrize('dtype', BOUNDS, ids=str)
def test_rounded_frequencies_would_be_seen(dtype: torch.dtype) -> None:
    net: Any = sharp('rotary')
    wide = copy.deepcopy(net).to(dtype).double()
    frequencies = net.attn_layers.rotary_pos_emb.inv_freq
    frequencies.copy_(frequencies.to(dtype))
    with torch.no_grad():
        got, want = net.to(dtype)(text()).double(), wide(text())
    gap = (got - want)[:, -PART:].square().mean().sqrt() / want.square().mean().sqrt()
    assert gap > 4 * BOUNDS[dtype]


@pytest.mark.parametrize('log_distance', [False, True])
@pytest.mark.parametrize('norm', [False, True])
def test_distances_of_a_dynamic_bias_are_not_rounded(log_distance: bool, norm: bool) -> None:
    """Half precision knows no odd number above 256, or 2048; autocast is half precision, too."""
    flags = {'dynamic_pos_bias': True, 'dynamic_pos_bias_norm': norm, 'dynamic_pos_bias_log_distance': log_distance}
    torch.manual_seed(0)
    bias: Any = Decoder(dim=DIM, depth=1, heads=2, verbose=False, **flags).rel_pos
    distances = torch.arange(-LENGTH, LENGTH)
    for dtype in BOUNDS:
        narrow = copy.deepcopy(bias).to(dtype)
        want = copy.deepcopy(narrow).double().of_distances(distances)
        assert torch.allclose(narrow.of_distances(distances).double(), want, rtol=1e-5, atol=1e-3)
        with torch.autocast(distances.device.type, dtype=dtype):
            inside = bias.of_distances(distances)
        assert torch.equal(inside, bias.of_distances(distances))
    half = copy.deepcopy(bias).bfloat16()
    half.of_distances(distances).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in half.parameters())
