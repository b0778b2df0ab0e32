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
    assert [cache.length for cache in record.looped_prompt_kv_cache] == [6] * 3


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


@pytest.mark.parametrize(
    ('stack', 'model', 'call'),
    [
        ({}, {}, {'mask': torch.tensor([[False, True, True, True, True, True, True], [True] * 7])}),
        ({}, {}, {'pos': torch.tensor([0, 2, 4, 6, 8, 11, 12])}),
        ({}, {}, {'repeat_blocks': (0, 2)}),
        ({}, {'smear': True, 'bigram_hash_embed': 7}, {}),
        ({'shift_tokens': 1}, {}, {}),
        ({'mixer': 'gated_delta_rule', 'custom_layers': ('m', 'f', 'a', 'f')}, {}, {}),
        ({'attn_hybrid_module': nn.GRU(8, 8, batch_first=True)}, {}, {}),
        ({'rotary_pos_emb': False, 'polar_pos_emb': True}, {}, {}),
        ({'rotary_xpos': True}, {}, {}),
    ],
)
def test_each_loop_continues_its_cache_with_other_flags(stack: Any, model: Any, call: Any) -> None:
    looped, x = net(stack, **model), torch.randint(11, (2, 7))
    whole = looped(x, **call)
    outs, cache, low = [], None, 0
    for high in (4, 5, 7):
        part = {name: t[..., :high] if isinstance(t, torch.Tensor) else t for name, t in call.items()}
        if cache is not None and 'pos' in part:
            part['pos'] = part['pos'][low:]
        more = {} if cache is None else {'cache': cache, 'input_not_include_cache': True}
        out, cache = looped(x[:, low:high], return_intermediates=True, looped_inference=False, **more, **part)
        outs.append(out)
        low = high
    torch.testing.assert_close(torch.cat(outs, dim=1), whole, atol=2e-5, rtol=1e-4)


def by_loops(model: Any, prompt: list[int], count: int, threshold: float, every_place: bool) -> tuple[list[int], list[int]]:
    """Greedy generation with early exits, from sums over loops, tokens and heads: two layers, two heads of 4."""
    layers, inv = model.attn_layers, model.attn_layers.rotary_pos_emb.inv_freq

    def turned(t: Any, place: int) -> Any:
        out = t.clone()
        for pair, speed in enumerate(inv.tolist()):
            angle = torch.tensor(place * speed)
            a, b = t[:, 2 * pair], t[:, 2 * pair + 1]
            out[:, 2 * pair] = a * angle.cos() - b * angle.sin()
            out[:, 2 * pair + 1] = b * angle.cos() + a * angle.sin()
        return out

    def read(x: Any, past: list[Any], turns: bool) -> tuple[Any, list[Any]]:
        """One token behind those of ``past``: for each layer a list of (keys, values) by head."""
        left = []
        for layer in (0, 1):
            (before, _, after), attention, _ = layers.layers[2 * layer]
            h = before(x)
            q, k, v = (linear(h).view(2, 4) for linear in (attention.to_q, attention.to_k, attention.to_v))
            seen = [*past[layer], (k, v)]
            heads = []
            for head in range(2):
                places = range(len(seen)) if turns else [0] * len(seen)
                query = turned(q, places[-1])[head]
                scores = torch.stack([query @ turned(key, place)[head] for (key, _), place in zip(seen, places, strict=True)])
                weights = (scores / 2.0).softmax(0)
                heads.append(sum(weight * value[head] for weight, (_, value) in zip(weights, seen, strict=True)))
            x = after(x + attention.to_out(torch.cat(heads)))
            left.append((k, v))
            (before, _, after), branch, _ = layers.layers[2 * layer + 1]
            x = after(x + branch(before(x)[None, None])[0, 0])
        return x, left

    of_prompt: list[list[Any]] = [[[], []] for _ in range(3)]
    stream = [model.token_emb.emb.weight[token] for token in prompt]
    for loop in range(3):
        for index in range(len(prompt)):
            stream[index], left = read(stream[index], of_prompt[loop], True)
            of_prompt[loop] = [[*seen, new] for seen, new in zip(of_prompt[loop], left, strict=True)]
    token, made, leaves = int(model.to_logits(stream[-1]).argmax()), [], [2]
    newer: list[list[Any]] = [[], []]
    while len(made) < count - 1:
        made.append(token)
        x, stay = model.token_emb.emb.weight[token], 1.0
        for loop in range(3):
            past = [[*of_prompt[loop][layer], *newer[layer]] for layer in (0, 1)]
            x, left = read(x, past, every_place or loop == 0)
            stay *= 1.0 - float(model.exit_gate(x).sigmoid())
            if 1.0 - stay >= threshold or loop == 2:
                break
        leaves.append(loop)
        newer = [[*seen, new] for seen, new in zip(newer, left, strict=True)]
        token = int(model.to_logits(x).argmax())
    return [*made, token], leaves


@pytest.mark.parametrize('every_place', [False, True])
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_generation_is_the_loops(every_place: bool, seed: int) -> None:
    torch.manual_seed(seed)
    model = net(looped_positions=every_place)
    prompt = torch.randint(11, (1, 4))
    with torch.no_grad():
        made, seen = AutoregressiveWrapper(model).generate(
            prompt, 8, temperature=0.0, return_intermediates=True, looped_exit_prob_threshold=0.6
        )
        tokens, leaves = by_loops(model, prompt[0].tolist(), 8, 0.6, every_place)
    assert made[0].tolist() == tokens
    assert seen.exit_indices[0].tolist() == leaves


def test_places_of_a_token_that_is_read_alone() -> None:
    model, x = net(), torch.randint(11, (2, 7))
    every = net(looped_positions=True)
    every.load_state_dict(model.state_dict())
    outs = []
    for each in (model, every):
        _, cache = each(x[:, :6], return_intermediates=True)
        outs.append(each(x[:, 6:], cache=cache, input_not_include_cache=True, looped_steps=3))
    assert torch.allclose(outs[1][:, 0], every(x)[:, -1], atol=1e-5)
    assert not torch.allclose(outs[0], outs[1], atol=1e-3)


def test_a_prompt_of_one_token_may_leave_early() -> None:
    model, x = net(), torch.randint(11, (3, 1))
    logits, record = model(x, return_intermediates=True, looped_exit_prob_threshold=0.0, looped_pred_all_logits=True)
    assert record.exit_indices.tolist() == [[0]] * 3
    assert torch.equal(logits, record.all_pred_logits[0])
    assert torch.equal(model(x, looped_exit_prob_threshold=0.0), logits)
    assert len(model.train()(x, return_intermediates=True, looped_exit_prob_threshold=0.0)[1].exit_logits) == 3


def test_a_recurrent_state_keeps_every_loop_running() -> None:
    model = net({'mixer': 'gated_delta_rule', 'custom_layers': ('m', 'f', 'a', 'f')})
    _, seen = AutoregressiveWrapper(model).generate(
        torch.randint(11, (2, 4)), 5, return_intermediates=True, looped_exit_prob_threshold=0.0
    )
    assert seen.exit_indices.unique().tolist() == [2]


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
