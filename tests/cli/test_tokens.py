"""Training on documents, with tokenizers, from other runs, and evaluation: as it is typed."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch

from tests.cli.test_main import metrics, sentence_of
from x_transformers.cli.main import main
from x_transformers.training.files import read_weights
from x_transformers.training.run import load_run, tokenizer_of
from x_transformers.training.shards import is_held_out

SMALL = [
    *('--dim', '32', '--depth', '1', '--heads', '2', '--attn-dim-head', '64', '--threads', '1', '--batch', '2'),
    *('--seq-len', '32', '--warmup', '2', '--val-every', '4', '--val-bytes', '256', '--device', 'cpu'),
    *('--final-bytes', '512', '--sample-length', '8', '--steps', '6', '--save-every', '3'),
]  # fmt: skip
WORDS = [
    'the',
    'quick',
    'brown',
    'fox',
    'jumps',
    'over',
    'the',
    'lazy',
    'dog',
    'and',
    'then',
    'sleeps',
    'for',
    'a',
    'while',
    'in',
    'the',
    'warm',
    'sun',
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))


@pytest.fixture
def corpus(tmp_path):
    """400 documents of ten to thirty words."""
    draw = random.Random(0)
    texts = [' '.join(draw.choices(WORDS, k=draw.randint(10, 30))) for _ in range(400)]
    path = tmp_path / 'corpus.jsonl'
    path.write_text('\n'.join(json.dumps({'text': text}) for text in texts))
    return path


def train(data, run, *more):
    return ['train', '--data', str(data), '--run-dir', str(run), *SMALL, *more]


def test_a_bpe_run_is_trained_written_evaluated_and_resumed(tmp_path, corpus, capsys):
    bpe = ['--tokenizer', 'bpe', '--vocab', '300']
    whole = tmp_path / 'whole'
    assert main(train(corpus, whole, *bpe, '--json')) == 0
    out = capsys.readouterr()
    result = json.loads(out.out.splitlines()[-1])
    assert result['step'] == 6
    assert result['run'] == str(whole)
    assert (whole / 'tokenizer.json').exists()
    tokenizer = tokenizer_of(whole)
    assert load_run(whole, torch.device('cpu')).net.num_tokens == tokenizer.size <= 300
    assert [step for step, _ in metrics(whole, 'loss')] == list(range(1, 7))
    assert metrics(whole, 'bits_per_byte')[0][1] < metrics(whole, 'loss')[0][1] / math.log(2)

    part = tmp_path / 'part'
    assert main(train(corpus, part, *bpe, '--steps', '3', '--schedule', 'constant')) == 0
    assert main(['train', '--run-dir', str(part), '--resume', '--steps', '6']) == 0
    assert main(train(corpus, tmp_path / 'constant', *bpe, '--schedule', 'constant')) == 0
    assert metrics(part) == metrics(tmp_path / 'constant')
    capsys.readouterr()

    assert main(['generate', str(whole), '--prompt', 'the quick', '--length', '9', '--seed', '0']) == 0
    assert capsys.readouterr().out.startswith('the quick')
    assert main(['eval', str(whole), '--data', str(corpus), '--json', '--device', 'cpu']) == 0
    out = capsys.readouterr().out
    assert '95 % intervals' in out
    found = json.loads(out.splitlines()[-1])
    assert found['documents'] == 400
    assert found['loss']['low'] < found['loss']['value'] < found['loss']['high']
    assert found['perplexity']['value'] == pytest.approx(math.exp(found['loss']['value']))


def test_a_single_document_that_would_be_held_out_is_trained_on(tmp_path):
    draw = random.Random(0)
    texts = (' '.join(draw.choices(WORDS, k=400)) for _ in range(1000))
    path, run = tmp_path / 'one.txt', tmp_path / 'run'
    path.write_bytes(next(text for text in map(str.encode, texts) if is_held_out(text)))
    assert main(train(path, run, '--tokenizer', 'bpe', '--vocab', '300')) == 0
    # the tokenizer has read it, too: bytes alone, and their end, are 257 tokens
    assert tokenizer_of(run).size > 257


def test_prepared_tokens_are_used_again_by_another_run(tmp_path, corpus, capsys):
    for name in 'ab':
        assert main(train(corpus, tmp_path / name, '--tokenizer', 'bpe', '--vocab', '300')) == 0
    said = capsys.readouterr().out
    assert said.count('training a tokenizer') == 1
    assert said.count('prepared 400 documents') == 1
    assert metrics(tmp_path / 'a') == metrics(tmp_path / 'b')


def test_a_mixture_with_masks_and_several_sets(tmp_path, corpus, capsys):
    other = tmp_path / 'other.txt'
    other.write_text('1 2 3 4 5 6 7 8 9\n' * 300)
    run = tmp_path / 'run'
    more = ['--mask-documents', '--val-data', str(other), '--keep-best', '--keep', '2', '--sample-every', '3', '--ema', '0.9']
    assert main(train(f'{corpus}:0.7,{other}:0.3', run, *more)) == 0
    assert [step for step, _ in metrics(run, 'held_out_1_loss')] == [4, 6]
    assert [step for step, _ in metrics(run, 'other_bits_per_byte')] == [4, 6]
    assert sorted(path.name for path in run.glob('checkpoint-*')) == ['checkpoint-00000003', 'checkpoint-00000006']
    assert (run / 'best.safetensors').exists()
    assert (run / 'samples.txt').read_text().count('--- step') == 2
    logged = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
    assert {'grad_norm', 'lr', 'tokens_per_second', 'memory_bytes'} <= logged[0].keys()
    assert '--data must give each part of a mixture a weight' in sentence_of(capsys, train(f'{corpus}:0.7,x', tmp_path / 'r'))


def test_only_completions_are_predicted(tmp_path):
    """Prompts are noise, 2.08 nats a letter, and completions are one letter: predicting all would cost 1.7 at least."""
    draw = random.Random(0)
    path = tmp_path / 'pairs.jsonl'
    pairs = [{'prompt': ''.join(draw.choices('abcdefgh', k=20)), 'completion': 'z' * 4} for _ in range(400)]
    path.write_text('\n'.join(map(json.dumps, pairs)))
    run = tmp_path / 'run'
    assert main(train(path, run, '--steps', '40', '--sample-length', '0', '--save-every', '0')) == 0
    assert metrics(run, 'loss')[-1][1] < 1.2
    assert metrics(run, 'held_out_loss')[-1][1] < 1.2


def test_a_run_starts_from_another_one(tmp_path, corpus, capsys):
    first, text = tmp_path / 'first', tmp_path / 'text'
    text.write_text('a b c d e f g\n' * 300)
    assert main(train(corpus, first, '--tokenizer', 'bpe', '--vocab', '300')) == 0
    tuned = tmp_path / 'tuned'
    assert main(train(text, tuned, '--from', str(first), '--lr', '1e-9', '--muon-lr', '1e-9')) == 0
    before, after = read_weights(first / 'model.safetensors'), read_weights(tuned / 'model.safetensors')
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    assert tokenizer_of(tuned).digest() == tokenizer_of(first).digest()
    again = train(text, tmp_path / 'x', '--from', str(first))
    again[again.index('--depth') + 1] = '3'
    assert '--depth must be 1' in sentence_of(capsys, again)
    assert 'does not exist' in sentence_of(capsys, train(text, tmp_path / 'x', '--from', str(tmp_path / 'nowhere')))
    weights = train(text, tmp_path / 'y', '--from', str(first / 'model.safetensors'))
    assert 'must hold the weights of a model with these flags' in sentence_of(capsys, weights)
    assert not (tmp_path / 'y').exists()


def test_low_rank_changes_are_trained_and_merged(tmp_path, corpus, capsys):
    first, tuned = tmp_path / 'first', tmp_path / 'tuned'
    assert main(train(corpus, first)) == 0
    assert main(train(corpus, tuned, '--from', str(first), '--lora', '4', '--lr', '0.02')) == 0
    before, after = read_weights(first / 'model.safetensors'), read_weights(tuned / 'model.safetensors')
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    for name in changed:
        assert 'attn_layers' in name
        assert torch.linalg.matrix_rank(after[name] - before[name], atol=1e-5) <= 4
    assert main(['train', '--run-dir', str(tuned), '--resume', '--steps', '8']) == 0
    assert main(['generate', str(tuned), '--length', '3']) == 0
    assert '--lora must have weights to change' in sentence_of(capsys, train(corpus, tmp_path / 'x', '--lora', '4'))


@pytest.mark.parametrize(
    ('more', 'sentence'),
    [
        (['--tokenizer', 'nowhere.json'], '--tokenizer nowhere.json cannot be read'),
        (['--tokenizer', 'gpt2'], 'must be bytes, bpe, or a file that ends in'),
        (['--tokenizer', 'bpe', '--vocab', '3'], '--vocab must be at least 257'),
        (['--mask-documents', '--shift-tokens', '1'], 'must not be combined with --shift-tokens'),
        (['--tokenizer', 'bpe', '--vocab', '300', '--seq-len', '100000'], 'must hold a row of 100,000 tokens'),
        (['--log', 'trackio', '--tokenizer', 'bpe'], '--log trackio needs the package trackio'),
    ],
)
def test_bad_options_end_in_one_sentence(tmp_path, corpus, capsys, more, sentence):
    assert sentence in sentence_of(capsys, train(corpus, tmp_path / 'run', *more))
    assert not (tmp_path / 'run').exists()


def test_another_tokenizer_in_a_run_folder_is_refused(tmp_path, corpus, capsys):
    run = tmp_path / 'run'
    assert main(train(corpus, run, '--tokenizer', 'bpe', '--vocab', '300')) == 0
    (run / 'tokenizer.json').unlink()
    assert '--tokenizer must have the' in sentence_of(capsys, ['train', '--run-dir', str(run), '--resume'])
    assert '--tokenizer must have the' in sentence_of(capsys, ['generate', str(run)])
