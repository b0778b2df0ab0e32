"""Every flag of every group does something, and every flag of the wrapper is in a group or named here."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.citations import missing
from tests.laws.combination import Combination, shaken, tokens
from tests.laws.groups import DECODER, GROUPS, LENGTH, TOKENS, Group
from tests.laws.laws import ROWS
from x_transformers import Decoder, InertFlagWarning, TransformerWrapper
from x_transformers.flags.base import FlagError
from x_transformers.flags.wrapper import WrapperFlags

# keywords of TransformerWrapper that no group draws, and the tests of them
WRAPPED = 'tests/test_transformer_wrapper.py::'
NOT_DRAWN = {
    # every combination has these
    'num_tokens': 'tests/laws/combination.py::fresh',
    'max_seq_len': 'tests/laws/combination.py::fresh',
    'attn_layers': 'tests/laws/combination.py::fresh',
    'max_mem_len': 'tests/laws/laws.py::segments_are_whole',
    'shift_mem_down': 'tests/laws/test_effects.py::test_memories_are_shifted_down',
    'attn_z_loss_weight': WRAPPED + 'test_z_loss_weight_of_the_constructor_is_the_default',
    'train_max_recycle_steps': WRAPPED + 'test_rounds_of_recycling_are_drawn_in_training',
    'input_not_include_cache': WRAPPED + 'test_all_is_new_if_the_caller_says_so',
    'looped': 'tests/embedding/test_loop.py::net',
    'max_looped_steps': 'tests/embedding/test_loop.py::test_the_loss_is_the_formula',
    'looped_positions': 'tests/embedding/test_loop.py::test_generation_is_the_loops',
    'token_emb': WRAPPED + 'test_your_own_embedding_is_started_too',
    'to_logits': WRAPPED + 'test_linear_head_gives_the_loss_without_logits',
}


# what keeps experts in balance is a loss beside the output, or moves a buffer after a step
EXPERTS = 'tests/test_experts.py::'
BESIDE_THE_OUTPUT = {
    'ff_router_balance': EXPERTS + 'test_losses_of_the_tokens_alone',
    'ff_router_balance_weight': EXPERTS + 'test_losses_of_the_tokens_alone',
    'ff_router_balance_step': EXPERTS + 'test_a_bias_brings_experts_into_balance',
    'ff_router_z_loss_weight': EXPERTS + 'test_losses_of_the_tokens_alone',
}


@pytest.mark.parametrize(('name', 'citation'), BESIDE_THE_OUTPUT.items())
def test_what_works_beside_the_output_has_the_test_that_is_named(name: str, citation: str) -> None:
    assert not missing(citation, name.removeprefix('ff_'))


def test_every_flag_of_the_wrapper_is_drawn_or_named() -> None:
    drawn = {name for entry in GROUPS for name in entry.wrapper}
    assert set(WrapperFlags.flag_fields()) - drawn == set(NOT_DRAWN)


@pytest.mark.parametrize(('name', 'citation'), NOT_DRAWN.items())
def test_what_is_not_drawn_has_the_test_that_is_named(name: str, citation: str) -> None:
    assert not missing(citation, name)


def test_names_of_groups_are_unique() -> None:
    names = [entry.name for entry in GROUPS]
    assert len(set(names)) == len(names)


def each_flag() -> list[Any]:
    return [
        pytest.param(entry, name, id=f'{entry.name}-{name}')
        for entry in GROUPS
        if not entry.same
        for name in (*entry.flags, *entry.wrapper)
        if name not in BESIDE_THE_OUTPUT
    ]


def seen(case: Combination, model: nn.Module, training: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """(the output, the gradients) on fixed inputs; with the same random numbers every time."""
    torch.manual_seed(0)
    random.seed(0)  # layers are left out by it, with this seed the last of four
    mask = torch.arange(LENGTH) < torch.tensor([LENGTH, 6, 3])[:, None]
    mask[0, 3] = False  # causal or not, somebody could see it
    out = case.call(model.double().train(training), tokens(ROWS), case.inputs(ROWS).part(), mask=mask)
    (out * torch.arange(out.numel(), dtype=out.dtype).cos().view_as(out)).sum().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def differ(one: Tensor, other: Tensor) -> bool:
    return one.shape != other.shape or not torch.allclose(one, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(('entry', 'name'), each_flag())
def test_every_flag_does_something(entry: Group, name: str) -> None:
    """Without it there are other parameters, other values at the start, another output or other gradients."""
    case = Combination(DECODER if DECODER in entry.kinds else min(entry.kinds), (entry.name,))
    torch.manual_seed(0)
    flagged = case.fresh()
    try:
        torch.manual_seed(0)
        plain = case.fresh(leave_out=name)
    except (FlagError, InertFlagWarning):
        return  # what others depend on; each of them is tested
    have, had = dict(flagged.named_parameters()), dict(plain.named_parameters())
    if {key: p.shape for key, p in have.items()} != {key: p.shape for key, p in had.items()}:
        return
    if any(differ(have[key], had[key]) for key in have):
        return
    shaken(flagged, 0)
    plain.load_state_dict(have, strict=False)
    with_it = seen(case, flagged, entry.only_training)
    try:
        without = seen(case, plain, entry.only_training)
    except (ValueError, TypeError):
        return  # the flag makes an argument of the call meaningful
    gradients = with_it[1].keys() != without[1].keys() or any(differ(with_it[1][key], without[1][key]) for key in without[1])
    assert gradients or differ(with_it[0], without[0]), f'{name} of {case} changes nothing'


@pytest.mark.parametrize('entry', [entry for entry in GROUPS if not (entry.flags or entry.wrapper)], ids=lambda e: e.name)
def test_every_argument_does_something(entry: Group) -> None:
    case = Combination(DECODER if DECODER in entry.kinds else min(entry.kinds), (entry.name,))
    model = case.build()
    given = case.inputs(ROWS).part()
    bare = Combination(case.kind, ()).inputs(ROWS).part()
    assert differ(case.call(model, tokens(ROWS), given), case.call(model, tokens(ROWS), bare))


@torch.no_grad()
def test_memories_are_shifted_down() -> None:
    """Each layer looks at what a layer above it left."""
    made = []
    for shift in (0, 1):
        torch.manual_seed(0)
        stack = Decoder(dim=16, depth=3, heads=2, attn_dim_head=8, rotary_pos_emb=True)
        made.append(
            TransformerWrapper(
                num_tokens=TOKENS, max_seq_len=LENGTH, attn_layers=stack, max_mem_len=4, shift_mem_down=shift
            ).eval()
        )
    plain, shifted = made
    x = tokens(ROWS)
    _, mems = plain(x[:, :4], return_mems=True)
    want = plain(x[:, 4:], mems=[mems[1], mems[2], mems[0]])
    torch.testing.assert_close(shifted(x[:, 4:], mems=mems), want)
    assert differ(plain(x[:, 4:], mems=mems), want)
