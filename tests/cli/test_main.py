"""The commands as they are typed. Most run in this process: ``main`` returns the exit status."""

from __future__ import annotations

import io
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.kept import kept_by
from x_transformers.cli.main import main
from x_transformers.cli.writing import Writer, printable
from x_transformers.training.errors import CheckpointError
from x_transformers.training.lock import locked

SMALL = [
    *('--dim', '32', '--depth', '1', '--heads', '2', '--attn-dim-head', '64', '--attn-kv-heads', '1', '--threads', '1'),
    *('--batch', '2', '--seq-len', '32', '--warmup', '2', '--val-every', '4', '--val-bytes', '128', '--device', 'cpu'),
    *('--final-bytes', '512', '--sample-length', '8', '--attn-dropout', '0.1'),
]  # fmt: skip
COMMAND = [sys.executable, '-m', 'x_transformers']


@pytest.fixture
def text(tmp_path):
    path = tmp_path / 'text'
    path.write_text('the quick brown fox jumps over the lazy dog\n' * 200)
    return path


def train(text, run, *more, steps=8):
    return ['train', '--data', str(text), '--run-dir', str(run), '--steps', str(steps), '--save-every', '3', *SMALL, *more]


def metrics(run, key='bits_per_byte'):
    lines = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
    return [(line['step'], line[key]) for line in lines if key in line]


def sentence_of(capsys, arguments):
    """The one sentence of a refused command."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert 'Traceback' not in captured.err
    assert captured.err.count('x-transformers: ') == 1
    return captured.err.partition('x-transformers: ')[2]


def test_a_run_writes_its_files_and_generate_reads_them(tmp_path, text, capsys):
    run = tmp_path / 'run'
    assert main(train(text, run)) == 0
    out = capsys.readouterr().out
    assert 'gzip -9' in out
    assert 'xz -9' in out
    assert {path.name for path in run.iterdir()} == {
        'config.json', 'model.safetensors', 'metrics.jsonl', 'loss.png', 'sample.txt', 'checkpoint-00000008',
    }  # fmt: skip
    assert (run / 'loss.png').read_bytes().startswith(b'\x89PNG')
    assert (run / 'sample.txt').read_bytes().startswith(b'def ')
    assert len((run / 'sample.txt').read_bytes()) == len(b'def ') + 8 + 1
    assert [step for step, _ in metrics(run)] == list(range(1, 9))
    assert [step for step, _ in metrics(run, 'held_out_bits_per_byte')] == [4, 8]
    assert [step for step, _ in metrics(run, 'final')] == [8]

    generate = ['generate', str(run), '--prompt', 'the ', '--length', '20', '--seed', '3', '--samples', '2', '--top-k', '5']
    assert main(generate) == 0
    first = capsys.readouterr().out
    assert first.count('the ') >= 2
    assert main(generate) == 0
    assert capsys.readouterr().out == first
    assert main(['info', '--run', str(run)]) == 0
    assert 'layers: af' in capsys.readouterr().out


@pytest.mark.slow
def test_cached_and_uncached_writing_agree(tmp_path, text, capsys):
    """Beyond max_seq_len the window moves; greedy text must begin the same as a shorter one."""
    run = tmp_path / 'run'
    assert main(train(text, run, '--use-abs-pos-emb', '--no-rotary-pos-emb')) == 0
    capsys.readouterr()
    greedy = ['generate', str(run), '--prompt', 'the quick', '--temperature', '0', '--length']
    assert main([*greedy, '20']) == 0
    short = capsys.readouterr().out
    assert main([*greedy, '60']) == 0
    assert capsys.readouterr().out.startswith(short.rstrip('\n'))


@pytest.mark.slow
def test_resume_after_a_kill_is_exact(tmp_path, text):
    assert main(train(text, tmp_path / 'whole', steps=40)) == 0
    run = tmp_path / 'killed'
    process = subprocess.Popen([*COMMAND, *train(text, run, steps=40)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None and not list(run.glob('checkpoint-*')):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert list(run.glob('checkpoint-*'))
    assert main(['train', '--run-dir', str(run), '--resume']) == 0
    assert metrics(run) == metrics(tmp_path / 'whole')
    assert metrics(run, 'held_out_bits_per_byte') == metrics(tmp_path / 'whole', 'held_out_bits_per_byte')
    assert (run / 'model.safetensors').read_bytes() == (tmp_path / 'whole' / 'model.safetensors').read_bytes()


def test_a_finished_run_is_not_trained_again(tmp_path, text, capsys):
    run = tmp_path / 'run'
    assert main(train(text, run)) == 0
    before = metrics(run)
    assert main(['train', '--run-dir', str(run), '--resume']) == 0
    assert metrics(run) == before


def test_the_same_command_begins_a_run_and_continues_it(tmp_path, text, capsys):
    run = tmp_path / 'run'
    for steps in (2, 4):
        assert main(train(text, run, '--auto-resume', steps=steps)) == 0
    assert capsys.readouterr().out.count('resuming') == 1
    whole = tmp_path / 'whole'
    assert main(train(text, whole, steps=2)) == 0
    assert main(['train', '--run-dir', str(whole), '--resume', '--steps', '4']) == 0
    assert (run / 'model.safetensors').read_bytes() == (whole / 'model.safetensors').read_bytes()
    said = sentence_of(capsys, train(text, run, '--auto-resume', '--lr', '0.5'))
    assert '--lr must be 0.003, with which this run was started, got 0.5.' in said


def test_a_run_folder_that_holds_a_run_is_refused_and_kept(tmp_path, text, capsys):
    run = tmp_path / 'run'
    assert main(train(text, run)) == 0
    content = {path: path.read_bytes() for path in run.rglob('*') if path.is_file()}
    capsys.readouterr()
    assert 'already holds a run: continue it with --resume' in sentence_of(capsys, train(text, run))
    for change, sentence in (
        (['--depth', '3'], '--depth must be 1, with which this run was started, got 3.'),
        (['--lr', '0.5'], '--lr must be 0.003, with which this run was started, got 0.5.'),
        (['--steps', '7'], '--steps must be at least 8, which this run has done already, got 7.'),
    ):
        assert sentence in sentence_of(capsys, ['train', '--run-dir', str(run), '--resume', *change])
    other = tmp_path / 'other'
    other.write_text('something else ' * 300)
    change = ['train', '--run-dir', str(run), '--resume', '--data', str(other)]
    assert 'the data are not those' in sentence_of(capsys, change)
    assert {path: path.read_bytes() for path in run.rglob('*') if path.is_file()} == content


def test_damaged_runs_are_refused(tmp_path, text, capsys):
    run = tmp_path / 'run'
    assert main(train(text, run)) == 0
    capsys.readouterr()
    weights = run / 'model.safetensors'
    weights.write_bytes(weights.read_bytes()[:-10])
    assert 'model.safetensors is truncated' in sentence_of(capsys, ['generate', str(run)])
    state = run / 'checkpoint-00000008' / 'state.pt'
    state.write_bytes(state.read_bytes()[:-10])
    assert 'state.pt is truncated' in sentence_of(capsys, ['train', '--run-dir', str(run), '--resume'])
    (run / 'config.json').write_text('{"flags": ')
    assert 'config.json cannot be read as JSON' in sentence_of(capsys, ['generate', str(run)])


@pytest.mark.slow
def test_a_full_disk_ends_in_a_sentence_and_keeps_the_last_checkpoint(tmp_path, text):
    """A limit on the size of files stands for a full disk: the system refuses the write in the same place."""
    run = tmp_path / 'run'
    assert main(train(text, run, steps=8)) == 0
    [before] = run.glob('checkpoint-*')
    content = {path: path.read_bytes() for path in before.iterdir()}
    config = json.loads((run / 'config.json').read_text())
    config['training']['steps'] = 20
    (run / 'config.json').write_text(json.dumps(config))

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = subprocess.run(
        [*COMMAND, 'train', '--run-dir', str(run), '--resume'], capture_output=True, text=True, preexec_fn=limit
    )
    assert done.returncode == 2
    assert 'Traceback' not in done.stderr
    assert 'cannot be written' in done.stderr
    assert 'checkpoint-00000008 is complete and untouched' in done.stderr
    assert {path: path.read_bytes() for path in before.iterdir()} == content
    assert sorted(path.name for path in run.glob('*checkpoint*')) == ['checkpoint-00000008']


@pytest.mark.parametrize(
    ('more', 'sentence'),
    [
        (['--steps', '0'], '--steps must be at least 1'),
        (['--lr', '-1'], '--lr must be at least 0'),
        (['--beta2', '1'], '--beta2 must be at least 0 and below 1'),
        (['--device', 'cuda:99'], '--device cuda:99 cannot be used here'),
        (['--device', 'potato'], '--device potato cannot be used here'),
        (['--data', 'nowhere.txt'], '--data nowhere.txt: there is no such file or folder'),
        (['--seq-len', '100000'], 'bytes are too few'),
        (['--no-rotary-pos-emb', '--max-seq-len', '16'], 'cannot be trained on 32 bytes (--seq-len): '),
        (['--cross-attend'], '--cross-attend does not fit'),
        (['--use-scalenorm'], '`use_scalenorm=True` with `use_rmsnorm=True`'),
        (['--attn-dim-head', '0'], '`attn_dim_head=0`: it must be'),
        (['--config', 'nowhere.toml'], '--config nowhere.toml cannot be read'),
        (['--config'], '--config needs the path'),
    ],
)
def test_bad_options_end_in_one_sentence(tmp_path, text, capsys, more, sentence):
    run = tmp_path / 'run'
    assert sentence in sentence_of(capsys, train(text, run, *more))
    assert not (run / 'model.safetensors').exists()
    assert not (run / 'config.json').exists()


@pytest.mark.parametrize(
    ('arguments', 'sentence'),
    [
        (['fly'], "there is no command 'fly'"),
        (['generate', 'nowhere'], 'nowhere: there is no such run folder'),
        (['generate', 'nowhere', '--length', '-1'], '--length must be at least 0, got -1.'),
        (['generate', 'nowhere', '--prompt', ''], '--prompt must hold a token to start from'),
        (['generate', 'nowhere', '--top-p', '2'], '--top-p must be between 0 and 1'),
        (['info', '--run', 'nowhere'], 'nowhere: there is no such run folder'),
        (['train', '--resume', '--run-dir', 'nowhere'], 'nowhere: there is no such run folder'),
    ],
)
def test_bad_commands_end_in_one_sentence(tmp_path, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    assert sentence in sentence_of(capsys, arguments)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_run_is_named(tmp_path, text, capsys):
    assert 'holds no run: config.json is missing' in sentence_of(capsys, ['generate', str(tmp_path)])
    assert 'is a file, not a folder' in sentence_of(capsys, train(text, text))


def test_help_and_version(capsys):
    assert main(['--help']) == 0
    assert 'x-transformers COMMAND --help' in capsys.readouterr().out
    assert main([]) == 2
    for command in ('train', 'generate', 'info'):
        with pytest.raises(SystemExit) as stop:
            main([command, '--help'])
        assert stop.value.code == 0


def test_unknown_options_are_all_named_with_what_they_may_mean(capsys):
    said = sentence_of(capsys, ['train', '--dpeth', '3', '--hidden-size', '64', '--out', 'a', '--vocab-size', '9'])
    assert '--dpeth; did you mean --depth?' in said
    assert '--hidden-size; here it is --dim.' in said
    assert '--out; here it is --run-dir.' in said
    assert '--vocab-size; here it is --vocab.' in said


def test_a_closed_pipe_is_no_error(tmp_path, text):
    done = subprocess.run(
        f'"{sys.executable}" -m x_transformers train --help | head -1',
        shell=True,
        capture_output=True,
        text=True,
        env=os.environ,
    )
    assert 'Traceback' not in done.stderr


def test_info_shows_layers_parameters_operations_kernel_and_cache(capsys):
    assert main(['info', '--depth', '2', '--dim', '64', '--device', 'cpu', '--seq-len', '64']) == 0
    out = capsys.readouterr().out
    assert 'layers: afaf' in out
    assert 'self attention' in out
    # one head of 64 for keys and one for values, four bytes each, two layers; rotary may keep the positions of the keys too
    [cache] = re.findall(r'cache: ([\d,]+) bytes per byte', out)
    assert 1024 <= int(cache.replace(',', '')) <= 1024 + 2 * 4 * 32
    assert 'sdpa runs this attention (2 of 2 layers)' in out
    assert 'reference could' in out


def test_info_shows_the_values_of_each_layer(capsys, tmp_path):
    typed = ['info', '--depth', '2', '--dim', '64', '--device', 'cpu', '--seq-len', '64']
    assert main([*typed, '--heads', '2', '--attn-kv-heads', '1', '2', '--ff-mult', '4', '1.5']) == 0
    out = capsys.readouterr().out
    for layer, note in enumerate(('attn_kv_heads=1', 'ff_mult=4', 'attn_kv_heads=2', 'ff_mult=1.5')):
        assert re.search(rf'^ +{layer}  .*{note}', out, re.MULTILINE), note
    config = tmp_path / 'model.toml'
    config.write_text('attn-kv-heads = [1, 2]\nff-mult = [4, 1.5]\nff-glu = [true, false]\n')
    assert main([*typed, '--heads', '2', '--config', str(config)]) == 0
    assert 'ff_mult=1.5, ff_glu=False' in capsys.readouterr().out
    config.write_text('ff-mult = [4, 1.5, 1]\n')
    assert main([*typed, '--config', str(config)]) != 0
    assert 'at most one value for each of the 2 feed-forward layers' in capsys.readouterr().err
    assert main(['info', '--depth', '2', '--attn-sparse-topk', '4', '--device', 'cpu']) == 0
    assert 'sdpa cannot: ' in capsys.readouterr().out


@pytest.mark.parametrize('more', [(), ('--attn-kv-heads', '1', '--ff-glu'), ('--attn-max-attend-past', '8')])
def test_info_knows_what_a_forward_keeps_for_its_backward(more):
    from x_transformers.cli.info import kept_bytes, parse
    from x_transformers.training.build import build_network

    flags, options = parse(['--depth', '2', '--dim', '64', '--heads', '2', '--device', 'cpu', '--seq-len', '32', *more])
    network = build_network(flags).train()
    with kept_by(network) as kept:
        network(torch.zeros(1, 32, dtype=torch.long))
    assert kept_bytes(flags, options, torch.device('cpu')) == kept.bytes > 0


def test_bench_hands_its_options_on_or_says_where_the_benchmarks_are(tmp_path, monkeypatch, capfd):
    assert main(['bench', '--help']) == 0
    assert '--rounds' in capfd.readouterr().out
    monkeypatch.setenv('X_TRANSFORMERS_BENCHMARKS', str(tmp_path))
    assert main(['bench']) == 2
    assert 'inside a clone of the repository' in capfd.readouterr().err


# ---------------------------------------------------------------- what once went wrong in a run folder


def test_final_weights_are_written_by_a_resume_after_a_kill_before_them(tmp_path, text, capsys):
    """Killed between the last checkpoint and model.safetensors, which is written behind it."""
    run = tmp_path / 'run'
    assert main(train(text, run)) == 0
    wanted = (run / 'model.safetensors').read_bytes()
    (run / 'model.safetensors').write_bytes(b'those of an earlier step')
    assert main(['train', '--run-dir', str(run), '--resume']) == 0
    assert (run / 'model.safetensors').read_bytes() == wanted
    (run / 'model.safetensors').unlink()
    assert main(['train', '--run-dir', str(run), '--resume']) == 0
    assert (run / 'model.safetensors').read_bytes() == wanted


def test_the_seed_seeds_layer_dropout(tmp_path, text):
    more = ['--layer-dropout', '0.5', '--sample-length', '0', '--seed', '4']
    for name in 'ab':
        random.seed(name)
        assert main(train(text, tmp_path / name, '--depth', '2', *more)) == 0
    assert metrics(tmp_path / 'a') == metrics(tmp_path / 'b')


def test_a_run_folder_in_use_is_refused_and_left_alone(tmp_path, text, capsys):
    run = tmp_path / 'deep' / 'run'
    with locked(run, create=True):
        assert 'another process is working on it' in sentence_of(capsys, train(text, run))
        assert 'another process is working on it' in sentence_of(capsys, ['train', '--run-dir', str(run), '--resume'])
        assert [path.name for path in run.iterdir()] == ['.lock']
    assert list(tmp_path.iterdir()) == [text]
    assert main(train(text, run)) == 0
    assert not (run / '.lock').exists()


def test_the_lock_of_a_dead_process_does_not_last(tmp_path):
    program = (
        'import sys, os; from pathlib import Path; from x_transformers.training.lock import locked\n'
        'with locked(Path(sys.argv[1]), create=True): os._exit(9)'
    )
    run = tmp_path / 'run'
    assert subprocess.run([sys.executable, '-c', program, str(run)]).returncode == 9
    assert (run / '.lock').exists()
    with locked(run, create=False), pytest.raises(CheckpointError, match='another process'), locked(run, create=False):
        pass


def test_typed_options_count_on_resuming_also_when_they_equal_the_defaults(tmp_path, text, capsys):
    run = tmp_path / 'run'
    assert main(train(text, run, '--lr', '0.01', '--val-every', '7', '--depth', '2')) == 0
    resume = ['train', '--run-dir', str(run), '--resume']
    assert '--lr must be 0.01, with which this run was started, got 0.003' in sentence_of(capsys, [*resume, '--lr', '0.003'])
    assert '--depth must be 2, with which this run was started, got 5' in sentence_of(capsys, [*resume, '--depth', '5'])
    before = json.loads((run / 'config.json').read_text())
    assert main([*resume, '--val-every', '100']) == 0
    after = json.loads((run / 'config.json').read_text())
    assert (before['training'].pop('val_every'), after['training'].pop('val_every')) == (7, 100)
    assert after['training'].pop('resume')
    assert after['training'] == {name: value for name, value in before['training'].items() if name != 'resume'}


def test_a_finished_run_can_be_trained_longer(tmp_path, text):
    run = tmp_path / 'run'
    more = ['--schedule', 'constant', '--val-every', '0']
    assert main(train(text, run, *more)) == 0
    assert main(['train', '--run-dir', str(run), '--resume', '--steps', '12']) == 0
    assert main(train(text, tmp_path / 'whole', *more, steps=12)) == 0
    assert metrics(run) == metrics(tmp_path / 'whole')
    assert main(['train', '--run-dir', str(run), '--resume']) == 0  # 12 are its steps now
    assert len(metrics(run)) == 12


def test_a_failed_run_leaves_no_folder(tmp_path, text, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)
    run = tmp_path / 'run'
    assert '--log tensorboard needs the package tensorboard' in sentence_of(capsys, train(text, run, '--tensorboard'))
    assert not run.exists()
    assert '--lr must be' in sentence_of(capsys, train(text, run, '--lr', '-1', '--steps', '0'))
    assert not run.exists()


@pytest.mark.parametrize(
    ('more', 'sentence'),
    [
        (['--seed', '9' * 20], '--seed must be at least 0 and below'),
        (['--attn-pool'], '--attn-pool does not fit a language model over bytes: there is an output for the whole sequence'),
        (['--lr', '-1', '--steps', '0'], '--steps must be at least 1, got 0. --lr must be at least 0, got -1.'),
    ],
)
def test_options_that_led_to_tracebacks_are_refused(tmp_path, text, capsys, more, sentence):
    assert sentence in sentence_of(capsys, train(text, tmp_path / 'run', *more))
    assert not (tmp_path / 'run').exists()


def test_a_recycling_model_is_trained_evaluated_and_writes(tmp_path, text, capsys):
    run = tmp_path / 'run'
    assert main(train(text, run, '--recycling')) == 0
    assert len((run / 'sample.txt').read_bytes()) == len(b'def ') + 8 + 1
    assert main(['generate', str(run), '--length', '3', '--temperature', '0']) == 0


@pytest.mark.parametrize(
    'more', [('--bf16',), ('--attn-softclamp-logits',), ('--bf16', '--attn-softclamp-logits', '--tie-embedding')]
)
def test_info_of_a_model_in_half_precision_or_with_a_soft_clamp(capsys, more):
    sizes = {}
    for given in ((), more):
        assert main(['info', '--depth', '1', '--dim', '64', '--seq-len', '200', '--device', 'cpu', *given]) == 0
        out = capsys.readouterr().out
        sizes[given] = [int(re.search(rf'{name}: ([\d,]+) bytes', out)[1].replace(',', '')) for name in ('backward', 'cache')]
    if '--bf16' in more:
        assert sizes[more][1] < 0.6 * sizes[()][1]


def test_a_prompt_that_is_no_utf8_is_bytes(tmp_path, text):
    run = tmp_path / 'run'
    assert main(train(text, run, '--sample-prompt', os.fsdecode(b'\xff!'))) == 0
    assert (run / 'sample.txt').read_bytes().startswith(b'\xff!')


def test_files_of_a_run_that_are_not_what_they_should_be(tmp_path, text, capsys):
    run = tmp_path / 'run'
    assert main(train(text, run)) == 0
    resume = ['train', '--run-dir', str(run), '--resume']
    log = run / 'metrics.jsonl'
    content = log.read_bytes()
    log.write_bytes(b'\xff\n')
    assert 'metrics.jsonl must hold lines of JSON' in sentence_of(capsys, resume)
    log.unlink()
    log.mkdir()
    assert 'metrics.jsonl cannot be read: Is a directory' in sentence_of(capsys, resume)
    log.rmdir()
    log.write_bytes(content)
    config = json.loads((run / 'config.json').read_text())
    for wrong in ({'batch': 'eight'}, {'lr': None}, {'steps': 2.5}, {'data': [3]}):
        (run / 'config.json').write_text(json.dumps(config | {'training': config['training'] | wrong}))
        assert 'is not the configuration of a run' in sentence_of(capsys, resume)
    (run / 'config.json').write_text(json.dumps(config | {'flags': {'depth': 'many'}}))
    assert 'depth' in sentence_of(capsys, resume)


def test_a_pipe_is_no_data(tmp_path, capsys):
    os.mkfifo(tmp_path / 'pipe')
    assert 'must be a file or a folder, got a pipe' in sentence_of(capsys, train(tmp_path / 'pipe', tmp_path / 'run'))


def test_what_several_processes_cannot_share_is_refused_once(tmp_path, text, capsys, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setenv('RANK', '0')
    said = sentence_of(capsys, train(text, tmp_path / 'run', '--batch', '3'))
    assert '--batch must be a multiple of 2' in said
    staged = train(text, tmp_path / 'run', '--batch', '4', '--pipeline', '2')
    assert '--shard must be none with --pipeline' in sentence_of(capsys, [*staged, '--shard', 'full'])
    assert '--mup must be off with --pipeline' in sentence_of(capsys, [*staged, '--mup'])
    monkeypatch.setenv('RANK', '1')
    assert main(train(text, tmp_path / 'run', '--batch', '3')) == 2
    assert capsys.readouterr().err == ''
    monkeypatch.setenv('WORLD_SIZE', '1')
    assert 'torchrun' in sentence_of(capsys, train(text, tmp_path / 'run', '--tensor', '2'))
    assert '--loss-parallel must be off' in sentence_of(capsys, train(text, tmp_path / 'run', '--loss-parallel'))
    assert list(tmp_path.iterdir()) == [text]


@pytest.mark.parametrize('arguments', [['eval', 'run'], ['plan', '--gpus', '0'], ['fly']])
def test_what_one_process_does_is_refused_once_under_torchrun(capsys, monkeypatch, arguments):
    monkeypatch.setattr('x_transformers.cli.main.UNTIL_ENDED', 0.0)
    for name, value in (('WORLD_SIZE', '2'), ('TORCHELASTIC_RUN_ID', 'none'), ('RANK', '0')):
        monkeypatch.setenv(name, value)
    said = sentence_of(capsys, arguments)
    assert f'{arguments[0]} must run in one process, got 2 from torchrun' in said or "no command 'fly'" in said
    monkeypatch.setenv('RANK', '1')
    assert main(arguments) == 2
    assert capsys.readouterr().err == ''


def test_an_error_about_the_default_model_says_so(tmp_path, text, capsys):
    said = sentence_of(capsys, train(text, tmp_path / 'run', '--use-scalenorm'))
    assert '`use_rmsnorm=True`: the default of the preset quickstart; add `--no-use-rmsnorm`.' in said
    said = sentence_of(capsys, train(text, tmp_path / 'run', '--use-scalenorm', '--use-rmsnorm'))
    assert 'preset' not in said


def test_flags_without_effect_are_refused_if_they_were_typed(tmp_path, text, capsys):
    said = sentence_of(capsys, train(text, tmp_path / 'run', '--cross-attn-qk-norm', 'True'))
    assert '`cross_attn_qk_norm`: there is no cross attention' in said
    assert not (tmp_path / 'run').exists()
    assert main(train(text, tmp_path / 'run', '--no-ff-glu')) == 0


@pytest.mark.parametrize(('more', 'status'), [([], 143), (['--exit-on-term', '0'], 0)])
def test_the_status_after_a_signal(tmp_path, text, more, status, monkeypatch):
    from x_transformers.training import trainer

    real = trainer.Trainer.tell

    def tell(self, record):
        real(self, record)
        if record['step'] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(trainer.Trainer, 'tell', tell)
    assert main(train(text, tmp_path / 'run', *more)) == status
    assert [path.name for path in (tmp_path / 'run').glob('checkpoint-*')] == ['checkpoint-00000002']


def test_every_command_ends_in_one_line_of_json(tmp_path, text, capsys):
    run = tmp_path / 'run'
    keys = {}
    for command in (
        [*train(text, run), '--json', '--peak-flops', '1e12'],
        ['generate', str(run), '--length', '5', '--seed', '1', '--json'],
        ['eval', str(run), '--data', str(text), '--json'],
        ['info', '--run', str(run), '--json'],
        ['plan', '--dim', '32', '--depth', '1', '--seq-len', '32', '--json'],
    ):
        assert main(command) == 0
        keys[command[0]] = json.loads(capsys.readouterr().out.splitlines()[-1]).keys()
    assert keys['train'] >= {'run', 'step', 'loss', 'model', 'gzip', 'xz', 'seconds'}
    assert keys['generate'] == {'run', 'prompt', 'texts'}
    assert keys['eval'] >= {'loss', 'perplexity', 'bits_per_byte'}
    assert keys['info'] >= {'parameters', 'flops_per_token', 'cache_bytes', 'kept_bytes'}
    assert keys['plan'] == {'parameters', 'flops_per_step', 'batch', 'grids'}
    assert all(0 < share < 1 for _, share in metrics(run, 'mfu'))


def test_chat_reads_on_behind_all_that_was_written(tmp_path, text, capsys, monkeypatch):
    run = tmp_path / 'run'
    assert main(train(text, run)) == 0
    capsys.readouterr()
    monkeypatch.setattr(sys, 'stdin', io.StringIO('the quick\nbrown fox\n'))
    given = ['--before', 'Q: ', '--after', r'\nA: ', '--length', '12', '--seed', '0']
    assert main(['chat', str(run), *given, '--json']) == 0
    turns = json.loads(capsys.readouterr().out.splitlines()[-1])['turns']
    assert [turn['line'] for turn in turns] == ['the quick', 'brown fox']
    seen = []
    monkeypatch.setattr(
        Writer, 'write', lambda self, prompt, options: seen.append(prompt) or iter(('an', 's', 'wer\nQ', ': no'))
    )
    monkeypatch.setattr(sys, 'stdin', io.StringIO('one\ntwo\n'))
    assert main(['chat', str(run), *given, '--stop', r'\nQ: ']) == 0
    assert seen == ['Q: one\nA: ', 'Q: one\nA: answerQ: two\nA: ']
    assert capsys.readouterr().out == 'answer\nanswer\n'


def test_an_interrupt_ends_an_answer_of_chat_not_the_conversation(tmp_path, text, capsys, monkeypatch):
    run = tmp_path / 'run'
    assert main(train(text, run)) == 0
    capsys.readouterr()

    def interrupted(self, prompt, options):
        yield 'half'
        raise KeyboardInterrupt

    monkeypatch.setattr(Writer, 'write', interrupted)
    monkeypatch.setattr(sys, 'stdin', io.StringIO('one\ntwo\n'))
    assert main(['chat', str(run)]) == 0
    assert capsys.readouterr().out == 'half\nhalf\n'
    assert sentence_of(capsys, ['chat', str(run), '--stop', '', '--temperature', '-1']).count('must') == 2


def test_a_terminal_is_not_given_control_characters():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    text = 'a\x1b[31mb\tc\n\x07\x9b'
    assert printable(text, Terminal()) == r'a\x1b[31mb' + '\tc\n' + r'\x07\x9b'
    assert printable(text, io.StringIO()) == text


@pytest.mark.skipif(torch.cuda.is_available(), reason='cuda is here')
def test_info_answers_for_a_device_that_is_not_here(capsys):
    assert main(['info', '--depth', '1', '--dim', '64', '--device', 'cuda', '--seq-len', '64', '--json']) == 0
    out = capsys.readouterr().out
    assert '1 x (self attention, feed-forward), width 64' in out
    assert 'attention kernels on cuda' in out
    assert 'sdpa runs this attention' in out
    assert json.loads(out.splitlines()[-1])['kept_bytes'] is None
    assert '--device must be' in sentence_of(capsys, ['info', '--device', 'nonsense'])


@pytest.mark.slow
def test_the_first_samples_are_text(tmp_path, capsys):
    """A short run on the standard library, and the defaults of ``generate``: blanks are likely, and feed on themselves."""
    from x_transformers.cli.generate import GenerateOptions
    from x_transformers.training.run import load_run
    from x_transformers.training.sample import sample_text
    from x_transformers.training.tokens import Bytes

    small = [
        '--dim',
        '64',
        '--depth',
        '2',
        '--heads',
        '2',
        '--seq-len',
        '128',
        '--steps',
        '150',
        '--threads',
        '1',
        '--device',
        'cpu',
    ]
    assert main(['train', '--run-dir', str(tmp_path / 'run'), *small, '--val-every', '0', '--sample-length', '0']) == 0
    model, defaults = load_run(tmp_path / 'run', torch.device('cpu')), GenerateOptions(run='')
    blank = 0
    for seed in range(20):
        torch.manual_seed(seed)
        written = b''.join(
            sample_text(
                model, Bytes(), defaults.prompt.encode(), 150, temperature=defaults.temperature, top_k=defaults.top_k,
                top_p=defaults.top_p, min_p=defaults.min_p,
            )
        )  # fmt: skip
        blank += len(written.split()) < 5 or sum(bytes([byte]).isspace() for byte in written) > 0.8 * len(written)
    assert blank <= 1
