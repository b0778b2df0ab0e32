"""Branches that run again in the backward pass give the same gradients, and keep less."""

from __future__ import annotations

import random

import pytest
import torch

from tests.kept import kept_by
from x_transformers import Decoder, Encoder, TransformerWrapper
from x_transformers.attention.kernels import block_steps

FLAGS = [
    {},
    {'attn_dropout': 0.3, 'ff_dropout': 0.3, 'layer_dropout': 0.2},
    {'rel_pos_bias': True},
    {'rel_pos_bias': True, 'attn_dropout': 0.3},
    {'dynamic_pos_bias': True, 'attn_softclamp_logits': True},
    {'alibi_pos_bias': True},
    {'polar_pos_emb': True},
    {'rotary_pos_emb': True, 'attn_kv_heads': 2, 'num_residual_streams': 2},
    {'attn_data_dependent_alibi': True},
    {'add_value_residual': True, 'residual_attn': True},
    {'cross_attend': True, 'shift_tokens': 1},
]


def step(stack: type, flags: dict, again: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """(loss, gradients, bytes kept for the backward pass) of a training step."""
    torch.manual_seed(0)
    layers = stack(dim=16, depth=3, heads=4, attn_dim_head=8, gradient_checkpointing=again, **flags)
    model = TransformerWrapper(num_tokens=11, max_seq_len=16, attn_layers=layers)
    given = {'context': torch.randn(2, 5, 16)} if flags.get('cross_attend') else {}
    mask = torch.arange(12) < torch.tensor([12, 7])[:, None]
    torch.manual_seed(1)
    random.seed(0)
    with kept_by(model) as kept:
        loss = model(torch.randint(0, 11, (2, 12)), mask=mask, **given)[mask].square().mean()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, kept.bytes


@pytest.mark.parametrize('flags', FLAGS, ids=str)
@pytest.mark.parametrize('stack', [Decoder, Encoder])
def test_equal_gradients(stack, flags, monkeypatch):
    monkeypatch.setattr(block_steps, 'block_rows', lambda width: 4)
    loss, gradients, kept = step(stack, flags, False)
    loss_again, gradients_again, kept_again = step(stack, flags, True)
    assert loss == loss_again
    assert gradients.keys() == gradients_again.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[name], gradient, msg=lambda text, name=name: f'{name}: {text}')
    assert kept_again < 0.6 * kept


def test_no_checkpoints_outside_training(monkeypatch):
    import torch.utils.checkpoint

    monkeypatch.setattr(torch.utils.checkpoint, 'checkpoint', None)
    stack = Decoder(dim=16, depth=1, heads=2, gradient_checkpointing=True)
    assert stack.eval()(torch.randn(1, 3, 16)).shape == (1, 3, 16)
    with torch.no_grad():
        assert stack.train()(torch.randn(1, 3, 16)).shape == (1, 3, 16)
    with pytest.raises(TypeError):
        stack(torch.randn(1, 3, 16))
