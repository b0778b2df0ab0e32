"""``x-transformers export``: three forms of a trained model, and ten lines that read one without this library."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from x_transformers import Decoder, TransformerWrapper
from x_transformers.cli.main import BAD_INPUT, main
from x_transformers.saving.plain import from_plain
from x_transformers.training.run import load_run

ROOT = Path(__file__).parents[2]
SMALL = ['--dim', '16', '--depth', '1', '--heads', '2', '--attn-dim-head', '8', '--seq-len', '32', '--rotary-pos-emb']
SHORT = ['--steps', '2', '--batch', '2', '--val-every', '0', '--val-bytes', '32', '--final-bytes', '64', '--sample-length', '2',
         '--save-every', '0', '--device', 'cpu', '--threads', '1']  # fmt: skip


@pytest.fixture(scope='module')
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('here') / 'runs'
    text = folder.parent / 'text.txt'
    text.write_text('the quick brown fox jumps over the lazy dog\n' * 40)
    assert main(['train', '--run-dir', str(folder / 'mine'), '--data', str(text), *SMALL, *SHORT]) == 0
    return folder / 'mine'


def told(run: Path, form: str, capsys: pytest.CaptureFixture[str], *more: str) -> dict:
    assert main(['export', str(run), '--format', form, '--length', '1:32', '--json', *more]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.slow
def test_a_program_for_torch(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = told(run, 'pt2', capsys, '--out', str(tmp_path / 'mine.pt2'), '--batch', '1:4')
    assert (said['format'], said['what'], said['batch'], said['length']) == ('pt2', 'logits', [1, 4], [1, 32])
    model, ids = load_run(str(run)).eval(), torch.randint(256, (3, 20))
    program = torch.export.load(said['file']).module()
    torch.testing.assert_close(program(ids), model.net(ids), atol=1e-5, rtol=0)
    assert [file.name for file in tmp_path.iterdir()] == ['mine.pt2']
    assert said['bytes'] == (tmp_path / 'mine.pt2').stat().st_size


@pytest.mark.slow
def test_ten_lines_without_this_library(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip('onnxruntime', reason='the extra `export` is not installed')
    assert told(run, 'onnx', capsys)['file'] == str(run / 'model.onnx')
    consumer = re.search(r'```py\n(.*?)```', (ROOT / 'docs/export.md').read_text(encoding='utf-8'), re.DOTALL)[1]
    assert len(consumer.strip().splitlines()) <= 10
    code = f"{consumer}\nimport sys\nassert not {{'x_transformers', 'torch'}} & set(sys.modules)\n"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=run.parents[1])
    assert done.returncode == 0, done.stderr
    model = load_run(run).eval()
    wanted = model.generate(torch.tensor([list(b'def ')]), 20, temperature=0.0)
    assert done.stdout.strip() == repr(b'def ' + bytes(wanted[0].tolist()))


def test_plain_weights_and_model_folders(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = told(run, 'safetensors', capsys)
    assert 'batch' not in said
    with safe_open(said['file'], framework='pt') as file:
        names, flags = set(file.keys()), json.loads(file.metadata()['flags'])
        again = from_plain(flags)
        again.load_state_dict({name: file.get_tensor(name) for name in names})
    ids = torch.randint(256, (1, 9))
    assert torch.equal(again.eval().net(ids), load_run(run).eval().net(ids))
    small = TransformerWrapper(num_tokens=9, max_seq_len=9, attn_layers=Decoder(dim=8, depth=1, heads=1), tie_embedding=True)
    small.save_pretrained(tmp_path / 'folder')
    said = told(tmp_path / 'folder', 'safetensors', capsys)
    assert said['parameters'] == sum(p.numel() for p in small.parameters())


@pytest.mark.parametrize(
    ('more', 'says'),
    [
        (['--length', 'many'], r'--length must be LEAST:MOST, such as 1:64, or one number, got .many.'),
        (['--batch', '4:2'], r'was not written: batch must be \(least, most\)'),
        (['--out', 'nowhere/model.pt2'], r'--out must be a file in a folder that exists'),
        (['--what', 'loss', '--length', '2'], r'length must reach from at least 3'),
    ],
)
def test_bad_input_is_one_sentence(
    more: list[str], says: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(['export', str(run), '--format', 'pt2', *more]) == BAD_INPUT
    said = capsys.readouterr().err
    assert re.search(says, said), said
    assert len(said.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
    assert not (run / 'model.pt2').exists()


def test_a_folder_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['export', str(tmp_path), '--format', 'pt2']) == BAD_INPUT
    assert 'holds no run' in capsys.readouterr().err
