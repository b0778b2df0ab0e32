"""A run folder is a model folder: ``from_pretrained`` reads what the trainer has written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from x_transformers import AutoregressiveWrapper, Decoder, NonAutoregressiveWrapper, TransformerWrapper
from x_transformers.cli.main import main
from x_transformers.hf import from_hf
from x_transformers.module import Module
from x_transformers.saving.errors import FolderError
from x_transformers.saving.folder import OF_RUNS
from x_transformers.training.run import load_run

# a run whose model is a Llama
LLAMA = ['--dim', '16', '--depth', '2', '--heads', '2', '--attn-dim-head', '8', '--rotary-emb-dim', '8', '--preset', 'llama',
         '--no-norm-add-unit-offset', '--norm-eps', '1e-5', '--no-ff-glu-bias', '--ff-dim-inner', '24']  # fmt: skip
SHORT = ['--steps', '2', '--batch', '2', '--val-every', '0', '--val-bytes', '32', '--final-bytes', '64', '--sample-length', '2',
         '--save-every', '0', '--device', 'cpu', '--threads', '1', '--seq-len', '16', '--ema', '0.9']  # fmt: skip


@pytest.fixture(scope='module')
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('here')
    (folder / 'text.txt').write_text('the quick brown fox jumps over the lazy dog\n' * 40)
    assert main(['train', '--run-dir', str(folder / 'run'), '--data', str(folder / 'text.txt'), *LLAMA, *SHORT]) == 0
    return folder / 'run'


def test_the_objective_or_its_model(run: Path) -> None:
    wanted, ids = load_run(str(run)).eval(), torch.randint(256, (2, 9))
    for cls in (AutoregressiveWrapper, Module):
        whole = cls.from_pretrained(str(run))
        assert type(whole) is AutoregressiveWrapper
        assert torch.equal(whole(ids), wanted(ids))
    alone = TransformerWrapper.from_pretrained(run)
    assert type(alone) is TransformerWrapper
    assert torch.equal(alone(ids), wanted.net(ids))
    assert not alone.training
    with pytest.raises(FolderError, match='holds a AutoregressiveWrapper, not a NonAutoregressiveWrapper'):
        NonAutoregressiveWrapper.from_pretrained(run)
    assert len(list(run.glob('*.safetensors'))) == 1


def test_a_run_of_an_earlier_version(run: Path, tmp_path: Path) -> None:
    old = shutil.copytree(run, tmp_path / 'old')
    config = json.loads((run / 'config.json').read_text())
    (old / 'config.json').write_text(json.dumps({name: config[name] for name in OF_RUNS}))
    ids = torch.randint(256, (1, 9))
    assert torch.equal(load_run(str(old)).eval()(ids), load_run(str(run)).eval()(ids))
    with pytest.raises(FolderError, match=r'a run of an earlier version: use x_transformers\.training\.run\.load_run'):
        AutoregressiveWrapper.from_pretrained(old)
    assert main(['train', '--run-dir', str(old), '--resume', '--steps', '3']) == 0
    assert torch.equal(load_run(old).eval()(ids), AutoregressiveWrapper.from_pretrained(old)(ids))


def test_a_trained_model_leaves_in_the_hugging_face_format(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(['hf', 'export', str(run), str(tmp_path / 'llama'), '--family', 'llama']) == 0
    assert 'with tokenizer.json, tokenizer_config.json' in capsys.readouterr().out
    ids = torch.randint(256, (2, 9))
    torch.testing.assert_close(from_hf(tmp_path / 'llama')(ids), load_run(run).eval().net(ids))


def test_a_model_of_a_model_folder_alone(tmp_path: Path) -> None:
    net = TransformerWrapper(num_tokens=9, max_seq_len=8, attn_layers=Decoder(dim=8, depth=1, heads=1)).eval()
    AutoregressiveWrapper(net).save_pretrained(tmp_path)
    ids = torch.randint(9, (1, 5))
    assert torch.equal(TransformerWrapper.from_pretrained(tmp_path)(ids), net(ids))
