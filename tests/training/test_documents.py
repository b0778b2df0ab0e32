from __future__ import annotations

import gzip
import json

import pytest

from x_transformers.training import documents
from x_transformers.training.data import Source
from x_transformers.training.documents import Document, read_documents
from x_transformers.training.errors import DataError


def read(path, separator=None):
    return list(read_documents(Source(path, path.name), separator))


def packed(data, suffix):
    if suffix == '.gz':
        return gzip.compress(data)
    if suffix == '.zst':
        return pytest.importorskip('zstandard').compress(data)
    return data


@pytest.mark.parametrize('suffix', ['', '.gz', '.zst'])
def test_lines_of_json(tmp_path, suffix):
    records = [{'text': 'eins'}, {'content': 'zw\u00f6lf'}, {'prompt': 'a?', 'completion': 'b'}, {'text': ''}]
    path = tmp_path / f'x.jsonl{suffix}'
    path.write_bytes(packed(b'\n\n'.join(json.dumps(record).encode() for record in records), suffix))
    assert read(path) == [Document(b'eins'), Document('zw\u00f6lf'.encode()), Document(b'a?b', 2)]


@pytest.mark.parametrize('suffix', ['', '.gz', '.zst'])
def test_text_is_split_at_the_separator_and_never_lost(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(documents, 'PIECE', 7)
    parts = [b'one', b'two and more\nlines', b'', b'three'] * 5
    path = tmp_path / f'x.txt{suffix}'
    path.write_bytes(packed(b'<>\n'.join(parts), suffix))
    assert [document.text for document in read(path, b'<>\n')] == [part for part in parts if part]


def test_text_without_separator_is_cut_between_lines_or_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, 'PIECE', 10)
    path = tmp_path / 'x'
    text = 'abc\ndefgh\nij\u20ac\u20ac\u20ac\u20ac\u20ac\u20acé\u20acz' * 3
    path.write_text(text, encoding='utf-8')
    found = [document.text for document in read(path)]
    assert b''.join(found).decode() == text
    assert len(found) > 5
    for piece in found:
        piece.decode()
    path.write_bytes(bytes([0x80] * 50))  # no text at all
    assert b''.join(document.text for document in read(path)) == bytes([0x80] * 50)


def test_parquet_and_a_folder_of_datasets(tmp_path):
    arrow, parquet = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    table = arrow.table({'id': [1, 2, 3], 'text': ['eins', 'zwei', 'drei']})
    parquet.write_table(table, tmp_path / 'x.parquet', row_group_size=2)
    with arrow.OSFile(str(tmp_path / 'data-0.arrow'), 'wb') as file, arrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    wanted = [Document(b'eins'), Document(b'zwei'), Document(b'drei')]
    assert read(tmp_path / 'x.parquet') == wanted
    assert read(tmp_path / 'data-0.arrow') == wanted
    pairs = arrow.table({'prompt': ['a'], 'completion': ['bc']})
    parquet.write_table(pairs, tmp_path / 'y.parquet')
    assert read(tmp_path / 'y.parquet') == [Document(b'abc', 1)]


@pytest.mark.parametrize(
    ('name', 'content', 'sentence'),
    [
        ('x.jsonl', b'{"text": "a"}\n{"text": ', 'line 2 must be a JSON object'),
        ('x.jsonl', b'[1]', 'line 1 must be a JSON object, got list'),
        ('x.jsonl', b'{"body": "a"}', 'must have `text`, `content`, or `prompt` and `completion`, got body'),
        ('x.jsonl', b'{"text": 3}', '`text` must be text, got int'),
        ('x.parquet', b'no parquet at all', 'cannot be read as parquet'),
        ('x.arrow', b'no arrow at all', 'cannot be read as arrow'),
        ('x.txt.zst', b'no zstd', 'cannot be read'),
        ('x.txt.gz', gzip.compress(b'a' * 999, mtime=0)[:-9], 'cannot be read'),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(tmp_path, name, content, sentence):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=sentence) as caught:
        read(path)
    assert name in str(caught.value)


def test_records_that_are_too_large_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, 'LARGEST_RECORD', 50)
    path = tmp_path / 'x.jsonl'
    path.write_text(json.dumps({'text': 'a' * 60}))
    with pytest.raises(DataError, match='line 1 must be a record of at most 1 GiB'):
        read(path)
    path = tmp_path / 'x.txt'
    path.write_text('a' * 60)
    with pytest.raises(DataError, match='must hold the --document-separator within 1 GiB'):
        read(path, b'|')


@pytest.mark.parametrize('texts', [['a' * 60], ['b', 'a' * 60]], ids=len)
def test_rows_that_are_too_large_are_refused(tmp_path, monkeypatch, texts):
    """Alone in its group, whose size is known before it is read, or beside smaller ones."""
    arrow, parquet = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    monkeypatch.setattr(documents, 'LARGEST_RECORD', 50)
    table = arrow.table({'text': texts})
    parquet.write_table(table, tmp_path / 'x.parquet')
    with arrow.OSFile(str(tmp_path / 'x.arrow'), 'wb') as file, arrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    for name in ('x.parquet', 'x.arrow'):
        with pytest.raises(DataError, match=f'{name}, row {len(texts) - 1} must be a record of at most 1 GiB'):
            read(tmp_path / name)


def test_few_large_rows_are_read_at_once(tmp_path, monkeypatch):
    arrow, parquet = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    path = tmp_path / 'x.parquet'
    texts = [f'{number:03}' * (1 << 21) for number in range(30)]
    parquet.write_table(arrow.table({'text': texts}), path, use_dictionary=False)
    asked = []
    batches = parquet.ParquetFile.iter_batches

    def counted(self, **given):
        asked.append(given['batch_size'])
        return batches(self, **given)

    monkeypatch.setattr(parquet.ParquetFile, 'iter_batches', counted)
    assert [document.text.decode() for document in read(path)] == texts
    assert asked == [10]
