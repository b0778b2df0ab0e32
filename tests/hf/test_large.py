"""Large folders: memory while they are read, and parameters that are spread over processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.hf.large import LARGE, SMALL, write
from tests.two_processes import attempt_all
from x_transformers.hf import from_hf
from x_transformers.hf.convert import family_of, keywords, rules_for
from x_transformers.saving.tensors import PIECE, Weights, json_object, pieces, rows_of_place


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='the peak is read from /proc')
def test_an_import_needs_a_tenth_more_than_the_model(tmp_path: Path) -> None:
    write(tmp_path, LARGE, shard=200 * 2**20)
    assert len(list(tmp_path.glob('*.safetensors'))) > 2
    command = [sys.executable, '-m', 'tests.hf.large', str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    model, growth = map(int, done.stdout.split())
    assert model > 500 * 2**20
    assert model < growth < 1.1 * model


@pytest.mark.slow
def test_each_process_keeps_its_part(tmp_path: Path) -> None:
    from tests.hf.large import spread_over_two

    write(tmp_path, SMALL, shard=4000)
    done, failed = attempt_all(spread_over_two, [str(tmp_path)])
    assert (done, failed) == (1, [])


def test_what_is_read_in_pieces_is_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, SMALL, shard=4000)
    whole, weights = from_hf(tmp_path, dtype=torch.float64), Weights(tmp_path)
    monkeypatch.setattr('x_transformers.saving.tensors.PIECE', 100)
    place = weights.places['model.embed_tokens.weight']
    assert [begin for begin, _ in pieces(place)][:3] == [0, 25, 50]
    for name, tensor in from_hf(tmp_path, dtype=torch.float64).state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name]), name
    assert weights.equal('lm_head.weight', 'lm_head.weight')
    assert not weights.equal('lm_head.weight', 'model.embed_tokens.weight')
    assert PIECE % 8 == 0


def whole(folder: Path) -> dict[str, Tensor]:
    """The tensors of ours, by the family's maps of whole tensors."""
    config, weights = json_object(folder / 'config.json'), Weights(folder)
    made: dict[str, Tensor] = {}
    for entry in rules_for(family_of(config), config, keywords(config), weights):
        made |= zip(entry.ours, entry.map.into(tuple(weights[name] for name in entry.theirs)), strict=True)
    return made


@pytest.mark.parametrize(
    'name', ['Llama', 'Qwen3', 'GPT-2', 'GPT-NeoX', 'gpt-oss', 'Mixtral', 'Phi', 'ModernBERT, biases, untied', 'ViT, classes']
)
def test_rows_that_are_read_one_after_the_other_go_where_the_map_says(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip('transformers', reason='the folders are written by transformers (extra: dev)')
    from tests.hf.published import CASES, noisy

    noisy(next(case for case in CASES if case.name == name).make()).save_pretrained(tmp_path)
    wanted = whole(tmp_path)
    monkeypatch.setattr('x_transformers.saving.tensors.PIECE', 300)
    place = max(Weights(tmp_path).places.values(), key=lambda place: len(place.shape) > 1 and place.shape[0])
    assert len(list(rows_of_place(place))) > 2
    for dtype in (torch.float32, torch.float64):
        for name, tensor in from_hf(tmp_path, dtype=dtype).named_parameters():
            assert torch.equal(tensor, wanted[name].to(dtype)), name
