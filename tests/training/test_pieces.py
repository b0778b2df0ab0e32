"""Texts encoded piece by piece, each piece once, are what the tokenizer makes of them whole."""

from __future__ import annotations

import json
import random

import pytest

from x_transformers.training.pieces import Pieces, splits_at_blanks
from x_transformers.training.tokens import JsonTokenizer, train_bpe

pytest.importorskip('tokenizers')
# words, blanks of all kinds, contractions, an added token
SIGNS = [*' \n\t\r a1,.é漢🙂_', '\xa0', '\u3000', '\x0b', '\x1c', '\x85', '\u200b', '<|endoftext|>', "'ll", '  ', 'the', 'cat']


@pytest.fixture(scope='module')
def tokenizer() -> JsonTokenizer:
    return train_bpe([b'the cat sat on the mat,\n\n    and the cat\'ll sit;  it isn\'t "here" 1234\r\n' * 9], 300)


def test_pieces_are_the_whole(tokenizer: JsonTokenizer) -> None:
    draw = random.Random(0)
    texts = [''.join(draw.choices(SIGNS, k=draw.randint(0, 30))) for _ in range(5000)]
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
    assert splits_at_blanks(tokenizer.data)
    assert not splits_at_blanks(changed)
    other = JsonTokenizer(changed)
    assert not isinstance(other.pieces, Pieces)
    assert other.encode([b'the cat the cat']) == [other.made.encode('the cat the cat').ids]


def test_an_added_token_with_a_blank_is_no_piece(tokenizer: JsonTokenizer) -> None:
    told = json.loads(tokenizer.data)
    told['added_tokens'][0]['content'] = 'the cat'
    assert not splits_at_blanks(json.dumps(told).encode())
