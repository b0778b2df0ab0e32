"""Arguments of a call are declared once, and what treats them follows the declarations."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch

from x_transformers import Decoder, TransformerWrapper
from x_transformers.attention.attention import Attention
from x_transformers.embedding.call import OF_MODELS
from x_transformers.embedding.memory_tokens import MemoryTokens
from x_transformers.embedding.rows import Rows
from x_transformers.generation import keywords
from x_transformers.layers.arguments import DECLARED, NEEDS, Argument, StackArgs, count_new

LETTERS = set('bnijhlpmdecs')


@pytest.mark.parametrize('name', OF_MODELS)
def test_a_declaration_is_complete(name: str) -> None:
    each = OF_MODELS[name]
    forms = [form.split() for form in f'{each.axes}|{each.floating or each.axes}'.split('|')]
    assert all(set(form) <= LETTERS and len(set(form)) == len(form) for form in forms)
    # the number of axes says which form is meant
    own = [len(form.split()) for form in each.axes.split('|')]
    assert len(set(own)) == len(own)
    assert re.fullmatch(r'[A-Z].*\.', each.says) or each.says.endswith('…')
    assert each.needs is None or each.needs in OF_MODELS or each.needs == 'self_attn_additional_kv'


# a value of each argument that says nothing alone; those of the wrapper warn
ALONE = {
    'context_mask': torch.ones(2, 5, dtype=torch.bool),
    'mem_masks': [torch.ones(2, 3, dtype=torch.bool)],
    'context_pos': torch.arange(5),
    'additional_kv_mask': torch.ones(2, 3, dtype=torch.bool),
    'cross_attn_kv_residuals': torch.randn(2, 5, 16),
    'flash_pack_seq_context_kwargs': {},
}


@pytest.mark.parametrize(('name', 'needed'), NEEDS)
def test_an_argument_is_refused_without_what_it_needs(name: str, needed: str) -> None:
    stack = Decoder(dim=16, depth=1, heads=2)
    with pytest.raises(ValueError, match=f'{name} must go with {needed}, got it alone'):
        stack(torch.randn(2, 5, 16), **{name: ALONE[name]})
    # nothing is said by a list of nothing
    stack(torch.randn(2, 5, 16), mem_masks=[None])


def test_axes_are_found_by_form() -> None:
    pos = DECLARED['pos']
    assert pos.axis(torch.zeros(3, dtype=torch.long), 'n') == 0
    assert pos.axis(torch.zeros(3, dtype=torch.long), 'b') is None
    assert pos.axis(torch.zeros(2, 4, 3, dtype=torch.long), 'n') == 2
    assert pos.axis(torch.zeros(2, 3, 8), 'n') == 1
    assert DECLARED['self_attn_kv_residuals'].axis(torch.zeros(1, 2, 3, 8), 'b') == 1
    assert DECLARED['condition'].axis(torch.zeros(2, 8), 'n') is None
    assert Argument('b n', 'x.').form(torch.zeros(2, 3, 4)) == []


def test_generation_reads_what_is_declared() -> None:
    assert set(keywords.EXTENDED) == {'mask', 'self_attn_kv_mask'}
    assert set(keywords.COVERING) == {
        'embed_ids', 'sum_embeds', 'pos', 'condition', 'in_attn_cond', 'self_attn_kv_residuals',
    }  # fmt: skip
    assert keywords.PAIRS == {'attn_mask': True, 'attn_bias': 0.0}
    assert set(keywords.WITH_FRONT) == {'condition', 'in_attn_cond', 'self_attn_kv_residuals'}


@pytest.mark.parametrize(
    ('given', 'held', 'new_only', 'age', 'new'),
    [
        (3, 5, False, None, 3),
        (3, 5, False, 1, 1),
        (0, 5, False, 1, 0),
        (8, 5, False, 1, 3),
        (8, 5, True, None, 8),
        (8, 5, False, 2, 2),
        (8, 5, False, 0, 8),
    ],
)
def test_new_tokens_are_counted_by_one_rule(given: int, held: int, new_only: bool, age: int | None, new: int) -> None:
    assert count_new(given, held, new_only, age) == new


def test_an_age_beyond_the_tokens_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r'cache_age must lie in 0 \(all\) to 3, .* got 9. Leave it out'):
        count_new(3, 5, False, 9)
    # a model takes it for all that there are, as the original does
    assert Rows.of_call(3, 0, MemoryTokens(0, None), None, cache_age=9).new == 3


def test_what_is_added_to_keys_moves_with_its_token_behind_padding_on_the_left() -> None:
    torch.manual_seed(0)
    stack = Decoder(dim=16, depth=2, heads=2, attn_dim_head=8, rotary_pos_emb=True)
    net = TransformerWrapper(num_tokens=11, max_seq_len=0, attn_layers=stack).eval()
    x, front = torch.randint(0, 11, (1, 4)), torch.randn(1, 2, 16)
    added = torch.randn(2, 1, 6, 16)
    wanted = net(x, prepend_embeds=front, self_attn_kv_residuals=added)
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.long), x), dim=1)
    # entries for what is prepended, then for the pads, then for the tokens
    wide = torch.cat((added[:, :, :2], torch.randn(2, 1, 3, 16), added[:, :, 2:]), dim=2)
    got = net(padded, prepend_embeds=front, self_attn_kv_residuals=wide, seq_start_pos=torch.tensor([3]))
    torch.testing.assert_close(got[:, -4:], wanted[:, -4:])


def test_a_stack_hands_on_its_arguments_in_the_order_of_their_declaration() -> None:
    """They stand there in a row."""
    seen: list[StackArgs] = []

    class Listening(Decoder):
        def outputs(self, x: Any, given: StackArgs) -> Any:
            seen.append(given)
            return x

    names = [name for name in inspect.signature(Decoder.forward).parameters if name not in ('self', 'x')]
    stack = Listening(dim=8, depth=1, heads=1)
    stack.forward(torch.zeros(1, 1, 8), **{name: name for name in names})
    assert {name: getattr(seen[0], name) for name in names} == {name: name for name in names}


@pytest.mark.parametrize('model', [Attention, Decoder, TransformerWrapper])
def test_help_says_what_every_argument_does(model: Any) -> None:
    names = set(inspect.signature(model.forward).parameters) - {'self'}
    said = set(re.findall(r'^    (\w+): [A-Z`]', model.forward.__doc__, re.MULTILINE))
    # a stack and an attention say in the first line what x is
    assert said | {'x'} == names
