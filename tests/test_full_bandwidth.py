"""Feedback from deep blocks into the shallow blocks of the next token."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from x_transformers import Decoder, TransformerWrapper
from x_transformers.full_bandwidth import SHORTCUTS, TRANSITIONS, FullBandwidth


def net(**flags: Any) -> TransformerWrapper:
    layers = Decoder(dim=8, depth=2, heads=2, attn_dim_head=4, rotary_pos_emb=True, depth_scale_residual=True, verbose=False)
    given = {'tie_embedding': True, 'post_emb_norm': True, **flags}
    return TransformerWrapper(num_tokens=11, max_seq_len=32, attn_layers=layers, **given)


def model(**more: Any) -> Any:
    made = FullBandwidth(net(), **more)
    for name, parameter in made.named_parameters():
        if parameter.ndim > 1 or name.endswith('gamma'):
            nn.init.normal_(parameter, std=0.4)
    return made.eval()


@pytest.mark.parametrize(
    ('name', 'pairs'),
    [
        ('paper', {(3, 1)}), ('prev', {(2, 1), (3, 2)}), ('top_and_prev', {(3, 1), (2, 1), (3, 2)}),
        ('prev_with_self', {(1, 1), (2, 1), (3, 2)}), ('self', {(1, 1), (2, 2), (3, 3)}), ('full', {(1, 1), (2, 1), (3, 1)}),
        ('dense', {(o, i) for o in (1, 2, 3) for i in (1, 2, 3)}),
    ],
)  # fmt: skip
def test_shortcuts(name: str, pairs: set[tuple[int, int]]) -> None:
    assert set(SHORTCUTS[name](3)) == pairs


@pytest.mark.parametrize('kind', sorted(TRANSITIONS))
def test_transitions_have_unit_size_and_start_as_they_should(kind: str) -> None:
    transition = TRANSITIONS[kind](16)
    out = transition(torch.randn(2, 3, 16), torch.randn(2, 3, 16))
    assert torch.allclose(out.square().mean(dim=-1), torch.ones(2, 3), atol=1e-4)


def test_each_position_is_given_what_the_last_pass_knew_before_it() -> None:
    made = model(temporal_parallel_passes=3, recirc_pairs=[(2, 1), (1, 2)])
    x = torch.randint(11, (2, 6))
    logits, record = made.net(x, return_intermediates=True)
    for _ in range(2):
        before = record.block_hiddens

        def fuse(depth: int, stream: Any, before: Any = before) -> Any:
            out = {1: 2, 2: 1}[depth]
            rows = [stream[:, 0]]
            for n in range(1, 6):
                rows.append(made.transitions[f'{out}->{depth}'](before[out - 1][:, n - 1], stream[:, n]))
            return torch.stack(rows, dim=1)

        logits, record = made.net(x, return_intermediates=True, transform_block_inputs=fuse)
    assert torch.allclose(made(x, return_loss=False), logits, atol=1e-5)


@pytest.mark.parametrize('dynamic', [True, False])
def test_the_loss_is_made_of_the_passes(dynamic: bool) -> None:
    of_dynamic = {'dynamic_loss_decay': 0.8, 'dynamic_loss_threshold': 0.5} if dynamic else {}
    made = model(
        temporal_parallel_passes=3, feedback_pass_weight=0.3, dynamic_rollout_loss_weight=dynamic, **of_dynamic
    )  # fmt: skip
    x = torch.randint(11, (2, 7))
    x[0, 3] = -100
    told = made(x, return_all=True)
    first, *feedback = (
        F.cross_entropy(logits[:, bool(nth) :].flatten(0, 1), x[:, 1 + bool(nth) :].flatten())
        for nth, logits in enumerate(told.all_pass_logits)
    )
    assert torch.allclose(told.loss_breakdown.first_pass_loss, first)
    assert torch.allclose(torch.stack(told.loss_breakdown.feedback_pass_losses), torch.stack(feedback))
    weights, lost = [], 0.0
    for before in (first, feedback[0]):
        lost += max(0.0, before.item() - 0.5)
        weights.append(math.exp(-0.8 * lost) if dynamic else 1.0)
    mean = sum(w * loss.item() for w, loss in zip(weights, feedback, strict=True)) / sum(weights)
    assert told.loss.item() == pytest.approx(first.item() + 0.3 * mean, rel=1e-5)


def test_future_tokens_are_not_seen() -> None:
    made, x = model(temporal_parallel_passes=3, recirc_pairs='dense'), torch.randint(11, (1, 8))
    y = x.clone()
    y[0, 5] = (y[0, 5] + 1) % 11
    a, b = made(x, return_loss=False), made(y, return_loss=False)
    assert torch.allclose(a[:, :5], b[:, :5], atol=1e-6)
    assert not torch.allclose(a[:, 5:], b[:, 5:])


def test_generation_feeds_each_token_what_the_last_one_knew() -> None:
    made, prompt = model(), torch.randint(11, (2, 4))
    told = made.generate(prompt, 5, temperature=0.0, process_prompt=False)
    logits, record = made.net(prompt, return_intermediates=True)
    for n in range(5):
        token = logits[:, -1].argmax(-1)
        assert torch.equal(token, told[:, n])
        latent = record.block_hiddens[1][:, -1:]
        logits, record = made.net(
            token[:, None], cache=record, input_not_include_cache=True, return_intermediates=True,
            transform_block_inputs={1: lambda t, latent=latent: made.transitions['2->1'](latent, t)},
        )  # fmt: skip


def test_rows_that_ended_are_padded_and_all_of_them_end_it() -> None:
    made, prompt = model(), torch.randint(11, (3, 4))
    free = made.generate(prompt, 8, temperature=0.0)
    eos = int(free[0, 2])
    told = made.generate(prompt, 8, temperature=0.0, eos_token=eos)
    for row, wanted in zip(told, free, strict=True):
        end = (wanted == eos).nonzero()
        length = int(end[0]) + 1 if len(end) else told.shape[1]
        assert torch.equal(row[:length], wanted[:length])
        assert (row[length:] == 0).all()


def test_a_veto_gives_nothing_to_new_tokens() -> None:
    made, prompt = model(), torch.randint(11, (2, 4))
    told = made.generate(prompt, 5, temperature=0.0, process_prompt=False, should_fuse_latent=lambda step: False)
    ids = prompt
    for _ in range(5):
        ids = torch.cat((ids, made.net(ids)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(told, ids[:, 4:])


def test_every_parameter_is_trained() -> None:
    made = FullBandwidth(net(), recirc_pairs='top_and_prev', transitions={(2, 1): 'gru'}).train()
    made(torch.randint(11, (2, 8))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters())


@pytest.mark.parametrize(
    ('more', 'flags', 'says'),
    [
        ({'temporal_parallel_passes': 1}, {}, 'temporal_parallel_passes=1.*must be at least 2'),
        ({'recirc_pairs': 'sideways'}, {}, 'recirc_pairs must be one of'),
        ({'recirc_pairs': [(3, 1)]}, {}, 'blocks 1 to 2'),
        ({'recirc_pairs': ()}, {}, 'recirc_pairs must name a pair of blocks at least'),
        ({'transition': 'glue'}, {}, 'transition must be one of'),
        ({}, {'tie_embedding': False}, 'tie_embedding=True'),
    ],
)
def test_refusals(more: dict[str, Any], flags: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        FullBandwidth(net(**flags), **more)
