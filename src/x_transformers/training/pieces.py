"""Encoding of a text piece by piece with a cache, since most words of a corpus recur."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

# White_Space of Unicode: what GPT-2's pattern takes for blanks
BLANK = ' \t-\r\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000'
# a word, with the blanks in front of it
WORD = re.compile(f'[{BLANK}]*[^{BLANK}]+|[{BLANK}]+')
# GPT-2's own cuts, where there is nothing but ASCII: what is a letter elsewhere depends on the version of Unicode
PIECE = re.compile(r"'(?:[stmd]|re|ve|ll)| ?[A-Za-z]+| ?[0-9]+| ?[^ \t-\rA-Za-z0-9]+|[ \t-\r]+(?![^ \t-\r])|[ \t-\r]+")
# characters of pieces that are remembered at most; then all are forgotten
REMEMBERED = 1 << 23


class Pieces:
    """(texts) -> the ids of each, as ``encode`` gives them, for a tokenizer that cuts as GPT-2 does.

    Args:
        added: tokens that are found in a text before anything else is done with it.
    """

    def __init__(self, encode: Callable[[list[str]], list[Sequence[int]]], added: Sequence[str] = ()) -> None:
        self.encode = encode
        longest_first = sorted(map(re.escape, added), key=len, reverse=True)
        self.added = re.compile(f'({"|".join(longest_first)})') if added else None
        self.known: dict[str, bytes] = {}
        self.remembered = 0

    def __call__(self, texts: Sequence[str]) -> list[Sequence[int]]:
        cut = [self.cut(text) for text in texts]
        if self.remembered > REMEMBERED:
            self.known.clear()
            self.remembered = 0
        new = [piece for piece in dict.fromkeys(chain.from_iterable(cut)) if piece not in self.known]
        # as bytes they take little room, and are joined at once
        self.known.update(zip(new, (array('i', ids).tobytes() for ids in self.encode(new)), strict=True))
        self.remembered += sum(map(len, new))
        found = self.known.__getitem__
        return [memoryview(b''.join(map(found, pieces))).cast('i').tolist() for pieces in cut]

    def cut(self, text: str) -> list[str]:
        """The pieces of a text: no token reaches from one into the next."""
        if self.added is None or not self.added.search(text):
            return cut_plain(text)
        # every other one is an added token
        between = self.added.split(text)
        return [piece for at, part in enumerate(between) for piece in ([part] if at % 2 else cut_plain(part))]


def cut_plain(text: str) -> list[str]:
    if text.isascii():
        return PIECE.findall(text)
    return [piece for word in WORD.findall(text) for piece in (PIECE.findall(word) if word.isascii() else (word,))]


def cuts_like_gpt2(tokenizer: bytes) -> bool:
    """Whether a ``tokenizer.json`` cuts texts as GPT-2 does, byte-level BPE on words with a blank in front, and no more."""
    told: dict[str, Any] = json.loads(tokenizer)
    before, model = told.get('pre_tokenizer') or {}, told.get('model') or {}
    words = before.get('type') == 'ByteLevel' and before.get('use_regex') is True and before.get('add_prefix_space') is False
    plain = not any(told.get(name) for name in ('normalizer', 'truncation', 'padding')) and not model.get('dropout')
    whole = all(
        not any(each.get(name) for name in ('lstrip', 'rstrip', 'single_word')) for each in told.get('added_tokens', [])
    )
    return model.get('type') == 'BPE' and words and plain and whole


def added_tokens(tokenizer: bytes) -> list[str]:
    """The tokens that a ``tokenizer.json`` looks for in a text first."""
    return [each['content'] for each in json.loads(tokenizer).get('added_tokens', []) if each['content']]
