"""Tokens of a text from those of its pieces, each of which is encoded once: most words of a corpus come again and again."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

# a word, with the blanks in front of it
PIECE = re.compile(r'[ \t\r\n]*[^ \t\r\n]+|[ \t\r\n]+')
# other blanks may stand in one token with these, so that a piece would end within it
OTHER_BLANKS = re.compile('[\x0b\x0c\x1c-\x1f\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]')
# pieces that are remembered at most; then all are forgotten
REMEMBERED = 1 << 20


class Pieces:
    """(texts) -> the ids of each, as ``encode`` gives them, where no token reaches over a blank behind a word."""

    def __init__(self, encode: Callable[[list[str]], list[Sequence[int]]]) -> None:
        self.encode = encode
        self.known: dict[str, Sequence[int]] = {}

    def __call__(self, texts: Sequence[str]) -> list[Sequence[int]]:
        cut = [[text] if OTHER_BLANKS.search(text) else PIECE.findall(text) for text in texts]
        if len(self.known) > REMEMBERED:
            self.known.clear()
        new = [piece for piece in dict.fromkeys(chain.from_iterable(cut)) if piece not in self.known]
        self.known.update(zip(new, self.encode(new), strict=True))
        found = self.known.__getitem__
        return [list(chain.from_iterable(map(found, pieces))) for pieces in cut]


def splits_at_blanks(tokenizer: bytes) -> bool:
    """Whether a ``tokenizer.json`` cuts texts as GPT-2 does, byte-level BPE on words with a blank in front, and no more."""
    told: dict[str, Any] = json.loads(tokenizer)
    before, model = told.get('pre_tokenizer') or {}, told.get('model') or {}
    words = before.get('type') == 'ByteLevel' and before.get('use_regex') is True and before.get('add_prefix_space') is False
    plain = not any(told.get(name) for name in ('normalizer', 'truncation', 'padding')) and not model.get('dropout')
    whole = all(
        not any(each.get(name) for name in ('lstrip', 'rstrip', 'single_word')) and not re.search(r'\s', each['content'])
        for each in told.get('added_tokens', [])
    )
    return model.get('type') == 'BPE' and words and plain and whole
