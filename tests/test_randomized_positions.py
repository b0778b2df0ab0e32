"""Positions that are drawn while training: a sorted random subset of a longer range."""

from __future__ import annotations

import pytest
import torch

from x_transformers import AutoregressiveWrapper, Decoder, Encoder, TransformerWrapper
from x_transformers.flags.base import FlagError
from x_transformers.randomness import sorted_places

STACK = {'dim': 16, 'depth': 1, 'heads': 2, 'attn_dim_head': 8, 'verbose': False}
KINDS = [{}, {'rotary_pos_emb': True}, {'alibi_pos_bias': True}, {'rel_pos_bias': True}, {'polar_pos_emb': True}]


def made(among=20, **flags):
    torch.manual_seed(0)
    return TransformerWrapper(
        num_tokens=9, max_seq_len=20, attn_layers=Decoder(**STACK, **flags), randomized_positions=among
    ).double()


def test_every_subset_is_as_likely_as_every_other():
    torch.manual_seed(0)
    drawn = [tuple(sorted_places(2, 4).tolist()) for _ in range(3000)]
    subsets = {(a, b) for a in range(4) for b in range(a + 1, 4)}
    assert set(drawn) == subsets
    # the standard error of each count is 20
    assert all(abs(drawn.count(subset) - 500) < 100 for subset in subsets)


@pytest.mark.parametrize('flags', KINDS, ids=str)
def test_training_is_as_if_the_drawn_positions_were_given(flags):
    model, ids = made(**flags), torch.randint(0, 9, (2, 6))
    torch.manual_seed(3)
    out = model(ids)
    torch.manual_seed(3)
    pos = sorted_places(6, 20)
    assert pos.tolist() != list(range(6))
    torch.testing.assert_close(model(ids, pos=pos), out)
    torch.manual_seed(3)
    torch.testing.assert_close(model(ids), out)
    assert not torch.allclose(model(ids), out)


@pytest.mark.parametrize('flags', KINDS, ids=str)
def test_in_evaluation_nothing_is_drawn(flags):
    model, ids = made(**flags).eval(), torch.randint(0, 9, (2, 6))
    state = torch.get_rng_state()
    out = model(ids)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(out, model(ids, pos=torch.arange(6)))


def test_memories_have_drawn_positions_too():
    model, ids = made(rotary_pos_emb=True), torch.randint(0, 9, (2, 6))
    mems = [torch.randn(2, 4, 16).double()]
    torch.manual_seed(3)
    out = model(ids, mems=mems)
    torch.manual_seed(3)
    torch.testing.assert_close(model(ids, mems=mems, pos=sorted_places(10, 20)), out)


def test_an_objective_trains_with_them_and_a_compiler_draws_them():
    model, ids = made(rotary_pos_emb=True), torch.randint(0, 9, (2, 7))
    loss = AutoregressiveWrapper(model)
    loss(ids).backward()
    assert all(p.grad is not None for p in model.parameters())
    compiled = torch.compile(model, fullgraph=True, backend='eager')
    assert not torch.allclose(compiled(ids), compiled(ids))


def test_too_few_positions_are_told():
    with pytest.raises(ValueError, match='must be at least the number of tokens, got 5 for 6'):
        made(among=5)(torch.zeros(1, 6, dtype=torch.long))
    with pytest.raises(FlagError, match='the table of absolute positions has 20 rows'):
        made(among=21)
    TransformerWrapper(num_tokens=9, max_seq_len=0, attn_layers=Encoder(**STACK, rotary_pos_emb=True), randomized_positions=99)
