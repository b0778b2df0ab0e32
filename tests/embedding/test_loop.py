"""Looped models against loops over steps and tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper


def net(stack: dict[str, Any] | None = None, **flags: Any) -> Any:
    layers = Decoder(
        dim=8,
        depth=2,
        heads=2,
        attn_dim_head=4,
        verbose=False,
        **{'pre_and_post_norm': True, 'rotary_pos_emb': True, **(stack or {})},
    )
    model = TransformerWrapper(
        num_tokens=11, max_seq_len=32, attn_layers=layers, **{'looped': True, 'max_looped_steps': 3, **flags}
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model.eval()


def test_the_stack_runs_on_its_own_output() -> None:
    model, x = net(), torch.randint(11, (2, 6))
    logits, record = model(x, return_intermediates=True, looped_pred_all_logits=True)
    h = model.token_emb(x)
    for step in range(3):
        h = model.attn_layers(h)
        assert torch.allclose(record.exit_logits[step], model.exit_gate(h), atol=1e-5)
        assert torch.allclose(record.all_pred_logits[step], model.to_logits(h), atol=1e-5)
    assert torch.allclose(logits, model.to_logits(h), atol=1e-5)
    assert torch.allclose(model(x, looped_steps=1), record.all_pred_logits[0], atol=1e-5)


@pytest.mark.parametrize('steps', [1, 3])
@pytest.mark.parametrize('front', [0, 2])
def test_the_loss_is_the_formula(steps: int, front: int) -> None:
    settings = {'looped_loss_threshold_exit': 0.1, 'looped_loss_slope': 5.0, 'looped_exit_loss_weight': 0.3}
    wrapper = AutoregressiveWrapper(net(max_looped_steps=steps), **settings)
    x = torch.randint(11, (2, 6))
    x[0, 3] = -100
    more = {'prepend_embeds': torch.randn(2, front, 8)} if front else {}
    _, record = wrapper.net(x.clamp(min=0), return_intermediates=True, looped_pred_all_logits=True, **more)
    main, gates, count = 0.0, 0.0, 0
    for b in range(2):
        for n in range(5):
            if x[b, n + 1] < 0:
                continue
            count += 1
            losses = [F.cross_entropy(logits[b, front + n], x[b, n + 1]).item() for logits in record.all_pred_logits]
            left = 1.0
            for step in range(steps):
                gate = record.exit_logits[step][b, front + n, 0]
                leaves = gate.sigmoid().item() if step < steps - 1 else 1.0
                main += left * leaves * losses[step] / steps
                left *= 1.0 - leaves
                if step < steps - 1:
                    wanted = torch.tensor(5.0 * (losses[step + 1] - losses[step] + 0.1)).sigmoid()
                    gates += F.binary_cross_entropy_with_logits(gate, wanted).item() / (steps - 1)
    assert wrapper(x, **more).item() == pytest.approx((main + 0.3 * gates) / count, rel=1e-4)


def test_the_last_step_and_every_gate_but_its_own_are_trained() -> None:
    wrapper = AutoregressiveWrapper(net()).train()
    wrapper(torch.randint(11, (2, 8))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in wrapper.parameters())


def test_without_exits_each_loop_continues_its_own_cache() -> None:
    model, x = net(), torch.randint(11, (2, 7))
    _, cache = model(x[:, :4], return_intermediates=True)
    outs = []
    for low, high in ((4, 5), (5, 7)):
        out, cache = model(
            x[:, low:high], cache=cache, input_not_include_cache=True, return_intermediates=True, looped_inference=False
        )
        outs.append(out)
    assert torch.allclose(torch.cat(outs, dim=1), model(x)[:, 4:], atol=1e-5)


def test_rows_leave_early_on_their_own() -> None:
    wrapper, prompt = AutoregressiveWrapper(net()), torch.randint(11, (3, 4))
    told, record = wrapper.generate(prompt, 6, temperature=0.0, return_intermediates=True, looped_exit_prob_threshold=0.6)
    assert record.exit_indices.shape == (3, 6)
    assert record.exit_indices.unique().numel() > 1
    for row in range(3):
        alone, single = wrapper.generate(
            prompt[row : row + 1], 6, temperature=0.0, return_intermediates=True, looped_exit_prob_threshold=0.6
        )
        assert torch.equal(alone[0], told[row])
        assert torch.equal(single.exit_indices[0], record.exit_indices[row])


@pytest.mark.parametrize(
    ('call', 'says'),
    [
        (lambda: net({'pre_and_post_norm': False}), 'pre_and_post_norm=True'),
        (lambda: net(recycling=True), 'recycling'),
        (lambda: net()(torch.zeros(1, 3).long(), looped_steps=0), 'looped_steps must be at least 1'),
        (lambda: net(looped=False, max_looped_steps=4)(torch.zeros(1, 3).long(), looped_steps=2), 'looped=True'),
        (lambda: AutoregressiveWrapper(net()).generate(torch.zeros(1, 3).long(), 2, compile=True), 'looped'),
    ],
)
def test_refusals(call: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()
