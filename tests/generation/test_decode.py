from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.generation.toys import OldToy, Toy
from x_transformers.generation.decode import Reader, Tokens, decode, reads_new_tokens
from x_transformers.generation.keywords import NetKeywords

PROMPT = torch.tensor([[1, 2, 3], [4, 5, 6]])


def test_tokens_grow_are_cut_and_reordered() -> None:
    tokens = Tokens(PROMPT, room=1)
    expected = PROMPT
    for i in range(10):
        tokens.append(torch.full((2,), i))
        expected = torch.cat((expected, torch.full((2, 1), i)), 1)
    assert torch.equal(tokens.value, expected)
    tokens.cut(5)
    tokens.reorder(torch.tensor([1, 1, 0]))
    assert torch.equal(tokens.value, expected[[1, 1, 0], :5])
    tokens.extend(torch.ones(3, 2, dtype=torch.long))
    assert tokens.part(4).shape == (3, 3)
    vectors = Tokens(torch.randn(2, 3, 4), room=0)
    vectors.append(torch.zeros(2, 4))
    assert vectors.value.shape == (2, 4, 4)


def test_no_memory_is_taken_while_there_is_room() -> None:
    tokens = Tokens(PROMPT, room=50)
    place = tokens.value.data_ptr()
    for _ in range(50):
        tokens.append(torch.zeros(2, dtype=torch.long))
    assert tokens.value.data_ptr() == place


def test_who_reads_new_tokens() -> None:
    assert reads_new_tokens(Toy())
    assert not reads_new_tokens(OldToy(Toy()))

    class Hands(Toy):
        def forward(self, x: torch.Tensor, **given: Any) -> Any:
            return super().forward(x, **given)

    class Plain(Toy):
        reads_new_tokens = True

        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x)

    assert not reads_new_tokens(Hands())
    assert not reads_new_tokens(Plain())
    Hands.reads_new_tokens = True
    assert reads_new_tokens(Hands())


@pytest.mark.parametrize('old', [False, True])
@pytest.mark.parametrize('cache', [False, True])
@torch.no_grad()
def test_several_tokens_at_once_then_back(old: bool, cache: bool) -> None:
    toy = Toy().eval()
    net = OldToy(toy).eval() if old else toy
    reader, tokens = Reader(net, cache=cache), Tokens(PROMPT)
    reader.read(tokens)
    mark = reader.mark()
    tokens.extend(torch.tensor([[1, 2, 3], [3, 2, 1]]))
    assert torch.allclose(reader.read(tokens, last=3), toy(tokens.value)[:, -3:], atol=1e-5)
    tokens.cut(4)
    reader.rollback(4, mark)
    tokens.extend(torch.tensor([[6, 6], [5, 5]]))
    assert torch.allclose(reader.read(tokens, last=2), toy(tokens.value)[:, -2:], atol=1e-5)


@torch.no_grad()
def test_only_unseen_tokens_can_be_asked_about() -> None:
    reader, tokens = Reader(Toy()), Tokens(PROMPT)
    reader.read(tokens)
    tokens.append(torch.tensor([1, 1]))
    with pytest.raises(ValueError, match=r'at most 1, .*got 2'):
        reader.read(tokens, last=2)


@torch.no_grad()
def test_a_state_without_history_is_read_again() -> None:
    toy = Toy().eval()
    reader, tokens = Reader(toy), Tokens(PROMPT)
    reader.read(tokens)
    reader.cache.step(0).carry['hidden'] = torch.zeros(1, 2, 3)
    mark = reader.mark()
    tokens.extend(torch.tensor([[1, 2, 3], [3, 2, 1]]))
    reader.read(tokens)
    tokens.cut(5)
    reader.rollback(5, mark)
    assert reader.seen == 3
    tokens.append(torch.tensor([2, 2]))
    assert torch.allclose(reader.read(tokens), toy(tokens.value)[:, -1:], atol=1e-5)


@torch.no_grad()
def test_decode_is_endless_without_steps() -> None:
    toy, tokens = Toy().eval(), Tokens(PROMPT)
    stream = decode(Reader(toy), tokens, None, lambda logits: logits.argmax(-1))
    made = torch.stack([next(stream) for _ in range(70)], 1)
    assert torch.equal(made, tokens.part(3))


def test_decode_does_not_leak_its_gradient_mode() -> None:
    stream = decode(Reader(Toy()), Tokens(PROMPT), 2, lambda logits: logits.argmax(-1))
    next(stream)
    assert torch.is_grad_enabled()


def test_no_step_touches_more_than_the_new_token() -> None:
    """Neither ids nor keys are copied per token."""
    toy, tokens = Toy(limit=4096).eval(), Tokens(PROMPT, room=300)
    reader = Reader(toy, expected=300)
    stream = decode(reader, tokens, 300, lambda logits: logits.argmax(-1))
    next(stream)
    next(stream)
    keys = reader.cache.step(0).get('k').data_ptr()
    for _ in stream:
        assert reader.cache.step(0).get('k').data_ptr() == keys


# ---------------------------------------------------------------- keywords


def test_masks_behind_a_prefix() -> None:
    mask = torch.tensor([[True, False, True]])
    shown = torch.tensor([[False, True]])
    words = NetKeywords({'mask': mask, 'prepend_mask': shown, 'prepend_embeds': torch.zeros(1, 2, 4), 'x': 1}, 3, 6)
    first = words.whole(0, 3)
    assert set(first) == {'mask', 'prepend_mask', 'prepend_embeds', 'x'}
    later = words.continued(4, 5, rows=7, front=2)
    assert set(later) == {'mask', 'x'}
    assert later['mask'].tolist() == [[False, True, True, False, True, True, True]]
    # two rows have left the window
    assert words.continued(4, 5, rows=5, front=2)['mask'].tolist() == [[True, False, True, True, True]]


def test_an_attention_mask_is_cut_to_what_is_seen() -> None:
    dense = torch.rand(8, 8) > 0.5
    words = NetKeywords({'attn_mask': dense}, 3, 8)
    assert torch.equal(words.whole(2, 6)['attn_mask'], dense[2:6, 2:6])
    assert torch.equal(words.continued(5, 6, rows=4, front=0)['attn_mask'], dense[5:6, 2:6])


def test_rows_repeat_what_has_a_batch_axis() -> None:
    given = {
        'context': torch.randn(2, 5, 3),
        'embed_ids': {'a': torch.arange(2)[:, None]},
        'pos': torch.arange(2),
        'attn_mask': torch.ones(2, 2, dtype=torch.bool),
        'nested': [(torch.randn(2, 1), None)],
        'name': 'kept',
    }
    index = torch.tensor([0, 0, 1, 1])
    made = NetKeywords(given, 1, 2).rows(index, 2).given
    assert torch.equal(made['context'], given['context'][index])
    assert made['embed_ids']['a'].flatten().tolist() == [0, 0, 1, 1]
    assert made['pos'] is given['pos']
    assert made['attn_mask'] is given['attn_mask']
    assert made['nested'][0][0].shape == (4, 1)
    assert made['name'] == 'kept'
