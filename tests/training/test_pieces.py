"""Texts encoded piece by piece, each piece once, are what the tokenizer makes of them whole."""

from __future__ import annotations

import json
import random

import pytest

from x_transformers.training.pieces import Pieces, cuts_like_gpt2
from x_transformers.training.tokens import JsonTokenizer, train_bpe

pytest.importorskip('tokenizers')
# words, digits of several kinds, blanks of all kinds and what is none, contractions and what is none, an added token
SIGNS = [
    *' \n\t\r a1Z,.é漢🙂_\'"²Ⅷ٣ª\u0301\0\x0b\x0c\x1c\x1d\x1e\x1f\x7f\x85\xa0\u1680\u180e\u2003\u200b\u2028\u202f',
    *'\u205f\u3000\ufeff', '<|endoftext|>', '<|', "'ll", "'LL", "'d", '  ', 'the', 'cat',
]  # fmt: skip


@pytest.fixture(scope='module')
def tokenizer() -> JsonTokenizer:
    return train_bpe([b'the cat sat on the mat,\n\n    and the cat\'ll sit;  it isn\'t "here" 1234\r\n' * 9], 300)


def test_pieces_are_the_whole(tokenizer: JsonTokenizer) -> None:
    draw = random.Random(0)
    texts = [''.join(draw.choices(SIGNS, k=draw.randint(0, 30))) for _ in range(20_000)]
    assert isinstance(tokenizer.pieces, Pieces)
    whole = [encoding.ids for encoding in tokenizer.made.encode_batch(texts, add_special_tokens=False)]
    assert tokenizer.encode([text.encode() for text in texts]) == whole
    assert tokenizer.encode([b' the cat  the cat\n']) == [tokenizer.made.encode(' the cat  the cat\n').ids]
    assert len(tokenizer.pieces.known) < sum(map(len, texts)) / 2, 'pieces come again'


@pytest.mark.parametrize(
    ('part', 'value'),
    [
        ('normalizer', {'type': 'NFC'}),
        ('truncation', {'direction': 'Right', 'max_length': 3, 'strategy': 'LongestFirst', 'stride': 0}),
        ('pre_tokenizer', {'type': 'ByteLevel', 'add_prefix_space': True, 'trim_offsets': True, 'use_regex': True}),
        ('pre_tokenizer', {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': False}),
        ('pre_tokenizer', None),
    ],
)
def test_other_tokenizers_read_whole_texts(tokenizer: JsonTokenizer, part: str, value: object) -> None:
    changed = json.dumps(json.loads(tokenizer.data) | {part: value}).encode()
    assert cuts_like_gpt2(tokenizer.data)
    assert not cuts_like_gpt2(changed)
    other = JsonTokenizer(changed)
    assert not isinstance(other.pieces, Pieces)
    assert other.encode([b'the cat the cat']) == [other.made.encode('the cat the cat').ids]


def test_added_tokens_are_found_first(tokenizer: JsonTokenizer) -> None:
    told = json.loads(tokenizer.data)
    first = told['added_tokens'][0]
    for number, content in enumerate(('the cat', 'the cat sat', 'at', ' \n', '漢🙂'), tokenizer.size):
        told['added_tokens'].append(first | {'id': number, 'content': content, 'special': number % 2 == 0})
    other = JsonTokenizer(json.dumps(told).encode())
    assert isinstance(other.pieces, Pieces)
    draw = random.Random(1)
    texts = [''.join(draw.choices([*SIGNS, ' sat'], k=draw.randint(0, 30))) for _ in range(20_000)]
    whole = [encoding.ids for encoding in other.made.encode_batch(texts, add_special_tokens=False)]
    assert other.encode([text.encode() for text in texts]) == whole
    told['added_tokens'][-1]['lstrip'] = True
    assert not cuts_like_gpt2(json.dumps(told).encode())


def test_little_is_remembered(tokenizer: JsonTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('x_transformers.training.pieces.REMEMBERED', 20)
    pieces = tokenizer.pieces
    assert isinstance(pieces, Pieces)
    for number in range(50):
        text = f'{number} ' + chr(0x6F22 + number) * 9
        assert pieces([text]) == [tokenizer.made.encode(text).ids]
        assert sum(map(len, pieces.known)) <= 20 + len(text)
