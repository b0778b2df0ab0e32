"""The normalized transformer against its formulas, https://arxiv.org/abs/2410.01131, token by token."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.laws.combination import shaken
from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper
from x_transformers.flags.base import FlagError
from x_transformers.module import UnitLinear, reset_parameters, unit_modules
from x_transformers.training.options import TrainerOptions
from x_transformers.training.trainer import Trainer

DIM, HEADS, WIDTH, TOKENS = 8, 2, 4, 11
SMALL: dict[str, Any] = {'dim': DIM, 'depth': 2, 'heads': HEADS, 'attn_dim_head': WIDTH, 'verbose': False, 'ngpt': True}


def net(wrapper: dict[str, Any] | None = None, **flags: Any) -> Any:
    layers = Decoder(**SMALL | {'rotary_pos_emb': True} | flags)
    return TransformerWrapper(num_tokens=TOKENS, max_seq_len=32, attn_layers=layers, **(wrapper or {}))


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum().sqrt()


def turned(t: Tensor, place: int, speeds: list[float]) -> Tensor:
    out = t.clone()
    for pair, speed in enumerate(speeds):
        angle = place * speed
        out[2 * pair] = t[2 * pair] * math.cos(angle) - t[2 * pair + 1] * math.sin(angle)
        out[2 * pair + 1] = t[2 * pair + 1] * math.cos(angle) + t[2 * pair] * math.sin(angle)
    return out


def attended(attn: Any, stream: list[Tensor], speeds: list[float]) -> list[Tensor]:
    """s_qk scales both, behind the rotation; the factor of scores is the root of the head's width."""
    gains = attn.unit_gain.gain[:, 0] * DIM**0.5
    outs = []
    for i, x in enumerate(stream):
        heads = []
        for head in range(HEADS):
            part = slice(head * WIDTH, (head + 1) * WIDTH)
            query = gains[head] * turned(unit(attn.to_q.weight[part] @ x), i, speeds)
            scores, values = [], []
            for j in range(i + 1):
                key = gains[head] * turned(unit(attn.to_k.weight[part] @ stream[j]), j, speeds)
                scores.append(WIDTH**0.5 * (query @ key))
                values.append(attn.to_v.weight[part] @ stream[j])
            weights = torch.stack(scores).softmax(0)
            heads.append(sum(weight * value for weight, value in zip(weights, values, strict=True)))
        outs.append(attn.to_out.weight @ torch.cat(heads))
    return outs


def fed(ff: Any, x: Tensor, gated: bool) -> Tensor:
    """u s_u times the activation of v s_v and the root of the width."""
    first = ff.ff[0]
    if not gated:
        gain, hidden = first[1].gain.gain, first[0].weight @ x
        return ff.ff[2].weight @ F.gelu(hidden * gain * DIM**0.5)
    both = first.proj.weight @ x
    up, gate = both[: len(both) // 2], both[len(both) // 2 :]
    return ff.ff[2].weight @ (up * first.mult_bias * F.silu(gate * first.act.gain.gain * DIM**0.5))


@pytest.mark.parametrize('gated', [False, True])
@pytest.mark.parametrize('tied', [False, True])
def test_the_model_is_the_formula(gated: bool, tied: bool) -> None:
    model = net({'tie_embedding': tied}, **({'ff_glu': True, 'ff_swish': True} if gated else {}))
    model = shaken(model, 0).double().eval()
    x = torch.randint(TOKENS, (1, 5))
    stack, speeds = model.attn_layers, model.attn_layers.rotary_pos_emb.inv_freq.tolist()
    stream = [unit(model.token_emb.emb.weight[token]) for token in x[0]]
    for layer, kind in zip(stack.layers, stack.plan.kinds, strict=True):
        out = attended(layer.branch, stream, speeds) if kind == 'a' else [fed(layer.branch, h, gated) for h in stream]
        # held at 1 / sqrt(dim), and counts as 0.05
        share = layer.residual.share.gain.abs() * 0.05 * DIM**0.5
        stream = [unit(h + share * (unit(new) - h)) for h, new in zip(stream, out, strict=True)]
    table = model.token_emb.emb.weight if tied else model.to_logits.weight
    logits = torch.stack([table @ h * model.to_logits.gain.gain * DIM**0.5 for h in stream])
    torch.testing.assert_close(model(x)[0], logits)


def lengths(model: nn.Module) -> list[Tensor]:
    axes = [0 if getattr(each, 'writes', False) else -1 for each in unit_modules(model)]
    return [each.weight.norm(dim=axis) for each, axis in zip(unit_modules(model), axes, strict=True)]


def test_weights_start_with_unit_length_and_factors_at_their_start() -> None:
    model = net()
    for _ in range(2):
        assert len(lengths(model)) == 2 + 2 * (4 + 2)
        assert all(torch.allclose(each, torch.ones_like(each)) for each in lengths(model))
        for layer in model.attn_layers.layers:
            assert torch.allclose(layer.residual.share(), torch.full((DIM,), 0.05))
        assert torch.allclose(model.attn_layers.layers[0].branch.unit_gain(), torch.ones(HEADS, 1, WIDTH))
        assert torch.allclose(model.to_logits.gain(), torch.ones(TOKENS))
        reset_parameters(model)
    assert all(module.bias is None for module in model.modules() if isinstance(module, UnitLinear))
    assert not any('norm' in name for name, _ in model.named_parameters())


def test_weights_have_unit_length_after_each_step() -> None:
    model = AutoregressiveWrapper(net())
    model.net.token_emb.emb.weight.data.mul_(3.0)
    model.net.normalize_weights_()
    assert torch.allclose(model.net.token_emb.emb.weight.norm(dim=-1), torch.ones(TOKENS))

    def batch(index: int) -> Tensor:
        return torch.randint(TOKENS, (4, 9), generator=torch.Generator().manual_seed(index))

    before = [each.weight.clone() for each in unit_modules(model)]
    Trainer(model, batch, TrainerOptions(steps=3, lr=1e-2, warmup=0)).train()
    assert all(torch.allclose(each, torch.ones_like(each)) for each in lengths(model))
    assert not any(torch.equal(old, each.weight) for old, each in zip(before, unit_modules(model), strict=True))


def test_the_rate_of_the_residual() -> None:
    layers = Decoder(**SMALL, residual_fn_kwargs={'rate': 0.2})
    assert torch.allclose(layers.layers[0].residual.share(), torch.full((DIM,), 0.2))


@pytest.mark.parametrize(
    ('flags', 'says'),
    [
        ({'use_rmsnorm': True}, 'has unit length'),
        ({'pre_norm': False}, 'has unit length'),
        ({'depth_scale_residual': 0.5}, 'has unit length'),
        ({'gate_residual': True}, 'each is a way to write'),
        ({'num_residual_streams': 2}, 'each is a way to write'),
        ({'polar_pos_emb': True}, 'twice the width'),
        ({'attn_qk_norm': True}, 'and so have queries and keys'),
        ({'attn_use_latent_kv': True, 'attn_dim_latent_kv': 4}, 'weights of plain projections'),
        ({'ff_experts': 4}, 'weights of plain linear maps'),
        ({'residual_fn_kwargs': {'speed': 1.0}}, 'speed'),
    ],
)
def test_refusals(flags: dict[str, Any], says: str) -> None:
    with pytest.raises(FlagError, match=says):
        Decoder(**SMALL | flags)
