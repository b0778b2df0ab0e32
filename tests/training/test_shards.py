from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from x_transformers.training import shards
from x_transformers.training.data import Source
from x_transformers.training.errors import DataError
from x_transformers.training.shards import TokenText, is_held_out, prepare_shards
from x_transformers.training.tokens import Bytes, train_bpe


@pytest.fixture
def corpus(tmp_path):
    """300 documents in two files, and what they hold."""
    texts = [f'document number {number} ' * (1 + number % 5) for number in range(300)]
    for name, part in (('a.jsonl', texts[:200]), ('b.jsonl', texts[200:])):
        (tmp_path / name).write_text('\n'.join(json.dumps({'text': text}) for text in part))
    return [Source(tmp_path / name, name) for name in ('a.jsonl', 'b.jsonl')], [text.encode() for text in texts]


def whole(text: TokenText) -> bytes:
    return bytes(text.window(0, len(text)).tolist())


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(shards, 'PART_BYTES', 2000)
    monkeypatch.setattr(shards, 'ENCODE_BYTES', 300)


def test_documents_become_tokens_once(tmp_path, corpus, monkeypatch):
    sources, texts = corpus
    made = prepare_shards(sources, Bytes(), cache=tmp_path / 'cache')
    assert whole(made.train) == b''.join(text for text in texts if not is_held_out(text))
    assert whole(made.held_out) == b''.join(text for text in texts if is_held_out(text))
    assert made.train.documents + made.held_out.documents == 300
    assert 0 < made.held_out.documents < 40
    assert len(made.train.parts) > 3
    assert made.train.bytes_per_token == 1.0
    monkeypatch.setattr(shards, 'read_documents', None)  # nothing is read again
    again = prepare_shards(sources, Bytes(), cache=tmp_path / 'cache')
    assert whole(again.train) == whole(made.train)
    assert again.digest == made.digest


def test_other_contents_or_settings_are_another_corpus(tmp_path, corpus):
    sources, _ = corpus
    digests = {prepare_shards(sources, Bytes(), cache=tmp_path / 'cache').digest}
    digests.add(prepare_shards(sources, Bytes(), separator=b'x', cache=tmp_path / 'cache').digest)
    digests.add(prepare_shards(sources[:1], Bytes(), cache=tmp_path / 'cache').digest)
    sources[0].path.write_text(sources[0].path.read_text().replace('document', 'Document'))
    digests.add(prepare_shards(sources, Bytes(), cache=tmp_path / 'cache').digest)
    assert len(digests) == 4


def test_a_bpe_corpus_has_ends_between_documents(tmp_path, corpus):
    sources, texts = corpus
    tokenizer = train_bpe(texts, 300)
    made = prepare_shards(sources, tokenizer, cache=tmp_path / 'cache')
    ids = made.train.window(0, len(made.train))
    assert made.train.parts[0].tokens.dtype == torch.uint16
    pieces = tokenizer.decode(ids.tolist()).split(b'<|endoftext|>')
    assert pieces == [text for text in texts if not is_held_out(text)] + [b'']
    assert made.train.bytes_per_token == pytest.approx(sum(map(len, pieces)) / len(ids))


def test_an_interrupted_preparation_goes_on_behind_its_last_part(tmp_path, corpus, monkeypatch):
    sources, _ = corpus
    wanted = prepare_shards(sources, Bytes(), cache=tmp_path / 'whole')

    class Killed(BaseException):
        pass

    real, count = shards._write_side, []

    def die(folder, number, side, made):
        count.append(number)
        if number == 3 and side == 'held_out':
            raise Killed
        return real(folder, number, side, made)

    monkeypatch.setattr(shards, '_write_side', die)
    with pytest.raises(Killed):
        prepare_shards(sources, Bytes(), cache=tmp_path / 'cache')
    monkeypatch.setattr(shards, '_write_side', real)
    encoded = []

    class Counting(Bytes):
        def encode(self, texts):
            encoded.extend(texts)
            return super().encode(texts)

    [journal] = (tmp_path / 'cache').rglob('parts.jsonl')
    with open(journal, 'a') as file:
        file.write('{"read": 12, "tra')  # a line that was being written
    said = []
    got = prepare_shards(sources, Counting(), cache=tmp_path / 'cache', say=said.append)
    assert whole(got.train) == whole(wanted.train)
    assert whole(got.held_out) == whole(wanted.held_out)
    assert 'interrupted after' in said[0]
    assert len(encoded) < 250


@pytest.mark.parametrize('name', ['tokens', 'ends', 'prompts'])
def test_damaged_shards_are_refused(tmp_path, corpus, name):
    sources, _ = corpus
    prepare_shards(sources, Bytes(), cache=tmp_path / 'cache')
    path = sorted((tmp_path / 'cache').rglob(f'*.train.{name}'))[1]
    data = path.read_bytes()
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(DataError, match='got another checksum'):
        prepare_shards(sources, Bytes(), cache=tmp_path / 'cache')
    path.write_bytes(data[:-1])
    with pytest.raises(DataError, match='must be a shard of'):
        prepare_shards(sources, Bytes(), cache=tmp_path / 'cache')
    path.unlink()
    with pytest.raises(DataError, match='cannot be read'):
        prepare_shards(sources, Bytes(), cache=tmp_path / 'cache')


def test_windows_spans_and_splits_agree_with_the_documents(tmp_path, corpus):
    sources, texts = corpus
    text = prepare_shards(sources, Bytes(), cache=tmp_path / 'cache').train
    ids, spans = whole(text), list(text.document_spans())
    assert [ids[a:b] for a, b in spans] == [t for t in texts if not is_held_out(t)]
    for start in range(0, len(text), 397):
        assert bytes(text.window(start, 100).tolist()) == ids[start : start + 100]
        found = [(start + a, start + b) for a, b, _ in text.spans(start, 100)]
        assert found == [(a, b) for a, b in spans if b > start and a < start + 100]
    for at in (0, 1, 1500, 2100, len(text)):
        left, right = text.split(at)
        assert whole(left) + whole(right) == ids
        cut = [(a, min(b, at)) for a, b in spans if a < at]
        assert list(left.document_spans()) == cut


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """40 MB of text under a limit on memory, which 1 GB would not break either."""
    program = (
        'import json, resource, sys; from pathlib import Path\n'
        'from x_transformers.training.shards import prepare_shards; from x_transformers.training import shards\n'
        'from x_transformers.training.data import Source; from x_transformers.training.tokens import Bytes\n'
        'shards.PART_BYTES = 1 << 22; path = Path(sys.argv[1])\n'
        'before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n'
        'made = prepare_shards([Source(path, "x")], Bytes(), cache=path.parent / "cache")\n'
        'print(len(made.train) + len(made.held_out), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)'
    )
    path = tmp_path / 'x.txt'
    with open(path, 'wb') as file:
        for number in range(40):
            file.write((f'{number} some words and a line of them\n' * 40_000)[: 1 << 20].encode())
    done = subprocess.run([sys.executable, '-c', program, str(path)], capture_output=True, text=True, check=True)
    tokens, grown = map(int, done.stdout.split())
    assert tokens == path.stat().st_size
    assert grown < 40_000  # KiB; the maps of the files are a part of it
