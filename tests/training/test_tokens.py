from __future__ import annotations

import base64

import pytest

from x_transformers.training.errors import DataError, TrainingError
from x_transformers.training.options import TrainOptions
from x_transformers.training.run import RunConfig, begin
from x_transformers.training.tokens import END, Bytes, load_tokenizer, train_bpe

TEXT = b'the quick brown fox jumps over the lazy dog; \xc3\xa9t\xc3\xa9 \xe2\x82\xac\n' * 40


def test_bytes_are_tokens():
    tokenizer = Bytes()
    assert tokenizer.decode(tokenizer.encode([b'\x00\xffa'])[0]) == b'\x00\xffa'
    assert tokenizer.size == 256


def test_a_bpe_is_trained_saved_and_loaded(tmp_path):
    tokenizer = train_bpe([TEXT], 300)
    assert tokenizer.size <= 300
    [ids] = tokenizer.encode([TEXT])
    assert len(ids) < len(TEXT) / 2
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.decode([tokenizer.end]) == END.encode()
    assert END.encode() not in tokenizer.decode(tokenizer.encode([b'<|endoftext'])[0])
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.encode([TEXT]) == [ids]
    assert again.digest() == tokenizer.digest() == train_bpe([TEXT], 300).digest()


def test_a_sentencepiece_model_is_read(tmp_path):
    sentencepiece = pytest.importorskip('sentencepiece')
    import io

    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.decode().splitlines()), model_writer=made, vocab_size=60, model_type='bpe', minloglevel=2
    )
    path = tmp_path / 'own.model'
    path.write_bytes(made.getvalue())
    tokenizer = load_tokenizer(path)
    assert tokenizer.size == 60
    assert tokenizer.decode(tokenizer.encode([b'the lazy dog'])[0]) == b'the lazy dog'
    assert tokenizer.end is not None
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).digest() == tokenizer.digest()


def test_ranks_of_tiktoken_are_read(tmp_path):
    pytest.importorskip('tiktoken')
    tokens = [bytes([byte]) for byte in range(256)] + [b'th', b'the', b' q']
    path = tmp_path / 'ranks.tiktoken'
    path.write_bytes(b'\n'.join(base64.b64encode(token) + f' {rank}'.encode() for rank, token in enumerate(tokens)))
    tokenizer = load_tokenizer(path)
    assert tokenizer.size == 260
    [ids] = tokenizer.encode([TEXT])
    assert 257 in ids
    assert tokenizer.decode(ids) == TEXT


@pytest.mark.parametrize(
    ('name', 'content', 'sentence'),
    [
        ('t.json', b'{}', 'must be a tokenizer.json'),
        ('t.json', None, 'cannot be read: No such file'),
        ('t.model', b'no', 'must be a sentencepiece model'),
        ('t.tiktoken', b'no', 'must hold a base64 token and a rank'),
        ('t.txt', b'', 'must be bytes, bpe, or a file that ends in .json'),
    ],
)
def test_files_that_are_no_tokenizers_are_refused(tmp_path, name, content, sentence):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        load_tokenizer(tmp_path / name)


def test_a_vocabulary_must_hold_all_bytes():
    with pytest.raises(TrainingError, match='--vocab must be at least 257'):
        train_bpe([TEXT], 256)


def test_a_run_keeps_the_tokenizer_of_the_run_that_it_starts_from(tmp_path):
    pytest.importorskip('tokenizers')
    first, other = tmp_path / 'first', tmp_path / 'other'
    for folder, size in ((first, 300), (other, 310)):
        folder.mkdir()
        train_bpe([bytes(range(256)), b' '.join(str(number).encode() for number in range(3000))], size).save(folder)
    flags = {'dim': 16, 'depth': 1, 'heads': 2, 'attn_dim_head': 8, 'max_seq_len': 8}
    RunConfig(flags, TrainOptions(tokenizer='bpe'), vocabulary=300).write(first)

    def start(tokenizer, typed=('tokenizer',)):
        options = TrainOptions(from_run=str(first), run_dir=str(tmp_path / 'new'), tokenizer=tokenizer)
        return begin(flags, options, typed=typed)

    assert start('bytes', typed=()).vocabulary == 300
    assert start(str(first / 'tokenizer.json')).vocabulary == 300
    wrongs = {'bpe': 'a new one', 'bytes': 'another one of 256', str(other / 'tokenizer.json'): 'another one of 310'}
    for wrong, told in wrongs.items():
        with pytest.raises(TrainingError, match=f'--tokenizer must be that of .*, of 300 tokens.*, got {told}'):
            start(wrong)
