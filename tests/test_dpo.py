from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.objectives import builds_on_meta, decoder, ids, saved_and_loaded, shaken
from x_transformers import DPO

PROMPT = torch.tensor([[True] * 3 + [False] * 5, [True] * 2 + [False] * 6])


def trained(**given: Any) -> DPO:
    """A policy that has moved away from its reference."""
    model = DPO(decoder(), **given)
    shaken(model.policy_model)
    return model


def log_probs(net: Any, row: Tensor) -> list[float]:
    """Entry t: of token t + 1 after the tokens up to t."""
    table = net(row[None])[0].log_softmax(dim=-1).detach()
    return [float(table[t, row[t + 1]]) for t in range(len(row) - 1)]


def by_hand(model: DPO, pairs: list[tuple[Tensor, Tensor]], chosen: list[list[list[int]]], total: bool = False) -> float:
    """The loss; ``chosen``: for each row and side the predictions that count."""
    losses = []
    for (good, bad), places in zip(pairs, chosen, strict=True):
        margin = 0.0
        for sign, row, at in ((1, good, places[0]), (-1, bad, places[1])):
            for side, net in ((1, model.policy_model), (-1, model.ref_model)):
                scores = [log_probs(net, row)[t] for t in at]
                margin += sign * side * (sum(scores) if total else sum(scores) / len(scores))
        losses.append(math.log(1 + math.exp(-model.beta * margin)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize('total', [False, True])
def test_loss_by_hand(total: bool) -> None:
    model = trained(beta=0.7, reduction='sum' if total else 'mean')
    good, bad = ids(2, 8), ids(2, 8, seed=1)
    loss = model(good, bad, prompt_mask=PROMPT)
    places = [[list(range(3, 7))] * 2, [list(range(2, 7))] * 2]
    expected = by_hand(model, list(zip(good, bad, strict=True)), places, total)
    assert loss.item() == pytest.approx(expected, abs=1e-5)


def test_the_loss_starts_at_ln_2() -> None:
    model = DPO(decoder())
    assert model(ids(2, 8), ids(2, 8, seed=1), prompt_mask=PROMPT).item() == pytest.approx(math.log(2), abs=1e-6)


def test_predictions_made_from_response_tokens_count_by_default() -> None:
    """The first response token is left out and the first pad counted in, unless predictions are selected by their target."""
    good, bad = ids(1, 8, tokens=6) + 1, ids(1, 8, tokens=6, seed=1) + 1
    good[0, 6:], bad[0, 5:] = 0, 0
    pairs, prompt = [(good[0], bad[0])], PROMPT[:1]
    model = trained(pad_id=0)
    expected = by_hand(model, pairs, [[[3, 4, 5], [3, 4]]])
    assert model(good, bad, prompt_mask=prompt).item() == pytest.approx(expected, abs=1e-5)
    model.select_by_target = True
    expected = by_hand(model, pairs, [[[2, 3, 4], [2, 3]]])
    assert model(good, bad, prompt_mask=prompt).item() == pytest.approx(expected, abs=1e-5)


def test_padding_is_not_seen_when_selected_by_target() -> None:
    model = trained(select_by_target=True, pad_id=0)
    good, bad = ids(2, 8, tokens=6) + 1, ids(2, 8, tokens=6, seed=1) + 1
    plain = model(good[:, :6], bad[:, :6], prompt_mask=PROMPT[:, :6])
    good[:, 6:], bad[:, 6:] = 0, 0
    torch.testing.assert_close(model(good, bad, prompt_mask=PROMPT), plain)


def test_given_masks_win_over_pads() -> None:
    model = trained(pad_id=3)
    good, bad = ids(2, 8), ids(2, 8, seed=1)
    everything = torch.ones_like(good, dtype=torch.bool)
    masks = {'preferred_seq_mask': everything, 'unpreferred_seq_mask': everything}
    loss = model(good, bad, prompt_mask=PROMPT, **masks)
    model.pad_id = None
    torch.testing.assert_close(loss, model(good, bad, prompt_mask=PROMPT))
    torch.testing.assert_close(loss, model(good, bad, prompt_mask=PROMPT[:, :-1]))


def test_only_the_policy_learns() -> None:
    model = trained()
    model(ids(2, 8), ids(2, 8, seed=1), prompt_mask=PROMPT).backward()
    assert all(p.grad is not None for p in model.policy_model.parameters())
    assert all(p.grad is None for p in model.ref_model.parameters())
    assert not model.ref_model.training


def test_parameters_are_the_policys_with_any_argument() -> None:
    model = DPO(decoder())
    mine = list(model.policy_model.parameters())
    assert [id(p) for p in model.parameters(recurse=True)] == [id(p) for p in mine]
    assert list(model.parameters(recurse=False)) == []


def test_learning_moves_the_margin() -> None:
    torch.manual_seed(0)
    model = DPO(decoder())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    good, bad = ids(2, 8), ids(2, 8, seed=1)
    for _ in range(10):
        loss = model(good, bad, prompt_mask=PROMPT)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.6


def test_state() -> None:
    model = trained()
    policy = list(model.policy_model.state_dict())
    assert list(model.state_dict()) == [f'policy_model.{k}' for k in policy] + [f'ref_model.{k}' for k in policy]
    twin = saved_and_loaded(model, DPO(decoder(seed=3)))
    given = (ids(2, 8), ids(2, 8, seed=1))
    torch.testing.assert_close(twin(*given, prompt_mask=PROMPT), model(*given, prompt_mask=PROMPT))


def test_built_on_meta_the_reference_is_the_policy() -> None:
    model = builds_on_meta(lambda: DPO(decoder()))
    for ours, reference in zip(model.policy_model.parameters(), model.ref_model.parameters(), strict=True):
        torch.testing.assert_close(ours, reference)


@pytest.mark.parametrize(
    ('given', 'says'),
    [
        ({'prompt_mask': PROMPT.int()}, 'prompt_mask'),
        ({'prompt_mask': PROMPT[:, :4]}, 'prompt_mask'),
        ({'preferred_seq_mask': PROMPT[:1]}, 'preferred_seq_mask'),
        ({'unpreferred_seq_mask': PROMPT.float()}, 'unpreferred_seq_mask'),
        ({'unpreferred_seq': ids(2, 7)}, 'unpreferred_seq'),
    ],
)
def test_bad_input_is_named(given: dict[str, Any], says: str) -> None:
    call = {'preferred_seq': ids(2, 8), 'unpreferred_seq': ids(2, 8), 'prompt_mask': PROMPT} | given
    with pytest.raises(ValueError, match=rf'\b{says}\b'):
        DPO(decoder())(**call)
    with pytest.raises(ValueError, match='reduction'):
        DPO(decoder(), reduction='median')
    with pytest.raises(ValueError, match='beta'):
        DPO(decoder(), beta=0.0)
