from __future__ import annotations

import gzip

import pytest
import torch

from x_transformers.training import data
from x_transformers.training.data import Source, Text, find_sources, held_out_batches, load_corpus, sample_batch
from x_transformers.training.errors import DataError


def as_bytes(text: Text) -> bytes:
    return b''.join(text.chunks())


def of(*pieces: bytes) -> Text:
    return Text([torch.frombuffer(bytearray(piece), dtype=torch.uint8) for piece in pieces if piece])


def test_standard_library_is_found_without_its_tests_and_splits_by_file():
    sources = data.standard_library()
    names = [source.name for source in sources]
    assert 'dataclasses.py' in names
    assert names == sorted(names)
    assert not any(name.startswith('test/') or '/test' in name.rpartition('/')[0] for name in names)
    held = [source for source in sources if source.held_out]
    assert 0 < len(held) < len(sources) / 8
    assert [source.held_out for source in data.standard_library()] == [source.held_out for source in sources]


def test_split_does_not_depend_on_the_other_files(tmp_path):
    names = [f'file{index}.txt' for index in range(200)]
    alone = {name: Source(tmp_path / name, name).held_out for name in names}
    for name in names:
        (tmp_path / name).write_text(f'{name} ' * 20)
    sources = find_sources([str(tmp_path)])
    assert {source.name: source.held_out for source in sources} == alone
    corpus = load_corpus([str(tmp_path)], window=32)
    held = ''.join(f'{name} ' * 20 for name in sorted(names) if alone[name])
    assert as_bytes(corpus.held_out).decode() == held
    assert as_bytes(corpus.train).decode() == ''.join(f'{name} ' * 20 for name in sorted(names) if not alone[name])
    assert load_corpus([str(tmp_path)], window=32).fingerprint() == corpus.fingerprint()


def test_one_file_keeps_its_end_out(tmp_path):
    path = tmp_path / 'book'
    path.write_bytes(bytes(range(256)) * 20)
    corpus = load_corpus([str(path)], window=64)
    assert as_bytes(corpus.train) + as_bytes(corpus.held_out) == path.read_bytes()
    assert len(corpus.held_out) == 5120 // data.HOLD_OUT_ONE_IN


def test_files_folders_globs_and_gz_each_file_once(tmp_path):
    (tmp_path / 'sub').mkdir()
    (tmp_path / 'a.txt').write_bytes(b'A' * 10)
    (tmp_path / 'sub' / 'b.bin').write_bytes(bytes([0, 255, 13, 10]))
    (tmp_path / 'c.gz').write_bytes(gzip.compress(b'C' * 30))
    (tmp_path / '.hidden').write_bytes(b'no')
    by_folder = find_sources([str(tmp_path), str(tmp_path / 'a.txt'), str(tmp_path / '*.txt')])
    assert [source.name for source in by_folder] == ['a.txt', 'c.gz', 'sub/b.bin']
    assert as_bytes(data.read_text(by_folder)) == b'A' * 10 + b'C' * 30 + bytes([0, 255, 13, 10])
    assert [source.name for source in find_sources([str(tmp_path / '**' / '*.bin')])] == ['b.bin']


def test_large_files_are_mapped_and_read_the_same(tmp_path, monkeypatch):
    (tmp_path / 'large').write_bytes(bytes(range(200)))
    (tmp_path / 'small').write_bytes(b'xyz')
    monkeypatch.setattr(data, 'MAP_FROM', 100)
    text = data.read_text(find_sources([str(tmp_path)]))
    assert len(text.pieces) == 2
    assert as_bytes(text) == bytes(range(200)) + b'xyz'


def test_windows_cross_pieces():
    text = of(b'abc', b'', b'de', b'fghij')
    whole = b'abcdefghij'
    for start in range(11):
        for length in range(12):
            assert text.window(start, length).numpy().tobytes() == whole[start : start + length]
    for at in range(11):
        left, right = text.split(at)
        assert (as_bytes(left), as_bytes(right)) == (whole[:at], whole[at:])


def test_batches_depend_on_seed_and_index_alone():
    text = of(bytes(range(256)) * 8)
    first = sample_batch(text, batch=4, window=8, seed=1, index=5)
    assert torch.equal(first, sample_batch(text, batch=4, window=8, seed=1, index=5))
    assert not torch.equal(first, sample_batch(text, batch=4, window=8, seed=1, index=6))
    assert not torch.equal(first, sample_batch(text, batch=4, window=8, seed=2, index=5))
    assert first.dtype == torch.long
    assert ((first[:, 1:] - first[:, :-1]) % 256 == 1).all()


def test_sampling_reaches_both_ends():
    text = of(b'abcd')
    starts = {int(sample_batch(text, batch=1, window=3, seed=0, index=index)[0, 0]) for index in range(40)}
    assert starts == {ord('a'), ord('b')}


@pytest.mark.parametrize('length', [2, 5, 6, 9, 10, 11, 23])
def test_every_byte_but_the_first_is_predicted_once(length):
    text = of(bytes(range(length)))
    predicted = [int(b) for batch in held_out_batches(text, batch=2, window=5) for row in batch for b in row[1:]]
    assert sorted(predicted) == list(range(1, length))


def test_a_limit_spreads_windows():
    text = of(bytes(range(250)))
    batches = list(held_out_batches(text, batch=8, window=11, limit=50))
    firsts = [int(row[0]) for batch in batches for row in batch]
    assert firsts == [0, 50, 100, 150, 200]


@pytest.mark.parametrize(
    ('make', 'sentence'),
    [
        (lambda p: [str(p / 'nowhere')], 'there is no such file or folder'),
        (lambda p: [str(p / '*.nothing')], 'no file matches'),
        (lambda p: (p / 'empty').mkdir() or [str(p / 'empty')], 'the folder holds no files'),
        (lambda p: (p / 'zero').write_bytes(b'') or [str(p / 'zero')] if not (p / 'zero').write_bytes(b'') else [], 'empty'),
        (lambda p: [str(p / 'short')] if (p / 'short').write_bytes(b'abc') else [], '3 bytes are too few'),
        (lambda p: [str(p / 'bad.gz')] if (p / 'bad.gz').write_bytes(b'not gzip') else [], 'bad.gz cannot be read'),
        (lambda p: [str(p / 'cut.gz')] if (p / 'cut.gz').write_bytes(gzip.compress(b'a' * 999)[:-9]) else [], 'cannot be read'),
    ],
)  # fmt: skip
def test_bad_data_is_named(tmp_path, make, sentence):
    with pytest.raises(DataError, match=sentence):
        load_corpus(make(tmp_path), window=16)
