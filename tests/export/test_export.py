"""Exported programs give the numbers of the model at shapes that were not traced."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from x_transformers import AutoregressiveWrapper, ContinuousTransformerWrapper, Decoder, Encoder, TransformerWrapper
from x_transformers.export import ExportError, Step, export, onnx, save

VARIANTS: dict[str, dict[str, Any]] = {
    'absolute': {},
    'rotary': {'rotary_pos_emb': True},
    'modern': {'rotary_pos_emb': True, 'attn_kv_heads': 2, 'use_rmsnorm': True, 'ff_glu': True},
    'alibi': {'alibi_pos_bias': True},
    't5': {'rel_pos_bias': True},
    'dynamic': {'dynamic_pos_bias': True},
    'window': {'rotary_pos_emb': True, 'attn_max_attend_past': 8},
    'softclamp': {'attn_softclamp_logits': True},
    'memory keys': {'attn_num_mem_kv': 4},
    'streams': {'num_residual_streams': 2},
    'latent': {'attn_use_latent_kv': True, 'attn_dim_latent_kv': 8},
    'shift': {'shift_tokens': 1},
    'sink': {'attn_head_learned_sink': True},
    'lime': {'integrate_layers': True},
    'value residual': {'add_value_residual': True},
    'talking heads': {'attn_pre_talking_heads': True},
}
FAST = ('rotary', 'alibi', 'window')


def model(stack: type = Decoder, **flags: Any) -> TransformerWrapper:
    layers = stack(dim=32, depth=2, heads=4, attn_dim_head=8, verbose=False, **flags)
    return TransformerWrapper(num_tokens=32, max_seq_len=512, attn_layers=layers).eval()


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, 32, shape)


def marked(names: Any, fast: tuple[str, ...]) -> list[Any]:
    return [pytest.param(name, marks=() if name in fast else pytest.mark.deep) for name in names]


@pytest.mark.slow
@pytest.mark.parametrize('name', marked(VARIANTS, FAST))
@torch.no_grad()
def test_logits_at_any_batch_and_length(name: str) -> None:
    net = model(**VARIANTS[name])
    program = export(net, length=(1, 400)).module()
    for shape in ((1, 1), (2, 70), (5, 300)):
        x = ids(*shape)
        assert torch.allclose(program(x), net(x), atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_an_encoder_with_its_mask() -> None:
    net = model(Encoder, rotary_pos_emb=True)
    program = export(net, length=(1, 400), mask=True).module()
    x, mask = ids(3, 50), torch.arange(50) < torch.tensor([[50], [20], [1]])
    assert torch.allclose(program(x, mask), net(x, mask=mask), atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_vectors() -> None:
    layers = Decoder(dim=32, depth=1, heads=4, attn_dim_head=8, rotary_pos_emb=True, verbose=False)
    net = ContinuousTransformerWrapper(dim_in=5, dim_out=3, max_seq_len=0, attn_layers=layers).eval()
    x = torch.randn(2, 40, 5)
    assert torch.allclose(export(net, length=(1, 100)).module()(x), net(x), atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_the_loss() -> None:
    wrapper = AutoregressiveWrapper(model(rotary_pos_emb=True)).eval()
    program = export(wrapper, length=(3, 300), what='loss').module()
    x = ids(2, 90)
    assert torch.allclose(program(x), wrapper(x), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('name', marked([name for name in VARIANTS if name != 'absolute'], ('modern',)))
@torch.no_grad()
def test_steps_behind_a_past_of_plain_tensors_are_the_whole(name: str) -> None:
    net = model(**VARIANTS[name])
    step = Step(net)
    program = export(net, length=(1, 300), what='step').module()
    x = ids(2, 9)
    first, past = step(x[:, :4], step.empty(2))
    outs = [first]
    for low, high in ((4, 7), (7, 8), (8, 9)):
        out, past = program(x[:, low:high], past)
        outs.append(out)
    assert torch.allclose(torch.cat(outs, dim=1), net(x), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('name', marked(VARIANTS, ('modern',)))
def test_onnx_is_checked_at_other_shapes_before_it_gets_its_name(name: str, tmp_path: Path) -> None:
    pytest.importorskip('onnxruntime', reason='the extra `export` is not installed')
    path = onnx(model(**VARIANTS[name]), tmp_path / 'model.onnx', length=(1, 300))
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


@pytest.mark.slow
def test_a_saved_program_runs_without_this_library(tmp_path: Path) -> None:
    net, x = model(rotary_pos_emb=True), ids(2, 33)
    path = save(export(net, length=(1, 100)), tmp_path / 'model.pt2')
    torch.save((x, net(x).detach()), tmp_path / 'expected.pt')
    code = (
        'import sys, torch\n'
        f'x, expected = torch.load({str(tmp_path / "expected.pt")!r})\n'
        f'out = torch.export.load({str(path)!r}).module()(x)\n'
        "assert 'x_transformers' not in sys.modules\n"
        'print(torch.allclose(out, expected, atol=1e-5))'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == 'True', done.stderr


@pytest.mark.parametrize(
    ('more', 'says'),
    [
        ({'what': 'weights'}, "what must be 'logits'"),
        ({'length': (4, 2)}, 'length must be'),
        ({'batch': (0, 2)}, 'batch must be'),
        ({'what': 'loss'}, 'must be a wrapper with a loss'),
        ({'length': (600, 700)}, 'length must reach'),
    ],
)
def test_what_cannot_be_exported_is_refused(more: dict[str, Any], says: str) -> None:
    with pytest.raises(ExportError, match=says):
        export(model(), **more)


def test_steps_of_models_without_a_past_are_refused() -> None:
    with pytest.raises(ExportError, match='continue from a cache'):
        Step(model(attn_selective=True))
    with pytest.raises(ExportError, match='state of another kind'):
        Step(model(attn_hybrid_module=torch.nn.GRU(32, 32, batch_first=True)))


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match='folder that exists'):
        onnx(model(), tmp_path / 'nowhere' / 'model.onnx')
