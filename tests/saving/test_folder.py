"""Models as folders: saved, read again, refused."""

from __future__ import annotations

import json
import struct
import sys

import pytest
import torch
from torch import nn

from x_transformers import AutoregressiveWrapper, Decoder, Encoder, TransformerWrapper, ViTransformerWrapper, XTransformer
from x_transformers.flags.base import FlagError, UnknownFlag
from x_transformers.flags.per_layer import per_layer
from x_transformers.saving import tensors
from x_transformers.saving.errors import FolderError
from x_transformers.saving.tensors import Weights


def language_model(**flags):
    torch.manual_seed(0)
    stack = Decoder(dim=16, depth=2, heads=2, rotary_pos_emb=True, shift_tokens=(0, 1, 0, 1))
    return TransformerWrapper(num_tokens=20, max_seq_len=32, attn_layers=stack, **flags).eval()


def same_weights(a: nn.Module, b: nn.Module) -> None:
    one, other = a.state_dict(), b.state_dict()
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_a_language_model_comes_back(tmp_path):
    model = AutoregressiveWrapper(language_model(tie_embedding=True), ignore_index=-5)
    model.save_pretrained(tmp_path / 'model')
    assert sorted(file.name for file in tmp_path.iterdir()) == ['model'], 'nothing is left beside it'
    assert sorted(file.name for file in (tmp_path / 'model').iterdir()) == ['README.md', 'config.json', 'model.safetensors']
    again = AutoregressiveWrapper.from_pretrained(tmp_path / 'model')
    same_weights(model, again)
    assert again.ignore_index == -5
    assert not again.training
    ids = torch.randint(0, 20, (2, 9))
    torch.testing.assert_close(model.net(ids), again.net(ids), rtol=0, atol=0)
    config = json.loads((tmp_path / 'model/config.json').read_text())
    assert config['model']['net']['attn_layers']['shift_tokens'] == [0, 1, 0, 1]
    assert 'AutoregressiveWrapper.from_pretrained' in (tmp_path / 'model/README.md').read_text()


def test_tied_weights_are_written_once(tmp_path):
    model = XTransformer(
        dim=16, tie_token_emb=True, enc_num_tokens=9, enc_max_seq_len=8, enc_depth=1, enc_heads=2, dec_num_tokens=9,
        dec_max_seq_len=8, dec_depth=1, dec_heads=2,
    )  # fmt: skip
    model.save_pretrained(tmp_path / 'model')
    names = set(Weights(tmp_path / 'model'))
    assert 'encoder.token_emb.emb.weight' in names
    assert 'decoder.net.token_emb.emb.weight' not in names
    again = XTransformer.from_pretrained(tmp_path / 'model')
    assert again.decoder.net.token_emb is again.encoder.token_emb
    same_weights(model, again)


def test_images_and_dtypes(tmp_path):
    model = ViTransformerWrapper(
        image_size=(8, 12), patch_size=4, num_classes=3, use_cls_token=True, patch_norm=False,
        attn_layers=Encoder(dim=16, depth=1, heads=2),
    )  # fmt: skip
    model.save_pretrained(tmp_path / 'model')
    again = ViTransformerWrapper.from_pretrained(tmp_path / 'model', dtype=torch.bfloat16)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    img = torch.randn(2, 3, 8, 12)
    again = ViTransformerWrapper.from_pretrained(tmp_path / 'model')
    torch.testing.assert_close(model.eval()(img), again(img))


def test_saving_again_leaves_no_old_weights_and_no_foreign_file_is_touched(tmp_path, monkeypatch):
    model = language_model()
    monkeypatch.setattr(tensors, 'SHARD', 4096)
    monkeypatch.setattr(tensors.write_tensors, '__kwdefaults__', {'shard': 4096})
    model.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob('model-*-of-*.safetensors'))) > 1
    assert (tmp_path / 'model.safetensors.index.json').exists()
    for name in ('notes.txt', 'best.safetensors'):
        (tmp_path / name).write_text('mine')
    same_weights(model, TransformerWrapper.from_pretrained(tmp_path))
    monkeypatch.setattr(tensors.write_tensors, '__kwdefaults__', {'shard': 2**30})
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.glob('*.safetensors*')} == {'model.safetensors', 'best.safetensors'}
    assert all((tmp_path / name).read_text() == 'mine' for name in ('notes.txt', 'best.safetensors'))
    same_weights(model, TransformerWrapper.from_pretrained(tmp_path))


def test_values_that_differ_between_layers(tmp_path):
    stack = Decoder(
        dim=16, depth=2, heads=2, attn_max_attend_past=(None, 3), ff_mult=lambda layer: layer + 1,
        attn_qkv_bias=per_layer((('q',), True)),
    )  # fmt: skip
    model = TransformerWrapper(num_tokens=20, max_seq_len=32, attn_layers=stack).eval()
    model.save_pretrained(tmp_path)
    again = TransformerWrapper.from_pretrained(tmp_path)
    same_weights(model, again)
    assert again.attn_layers.flags.changed() == stack.flags.changed()
    ids = torch.randint(0, 20, (2, 9))
    torch.testing.assert_close(model(ids), again(ids), rtol=0, atol=0)


def test_a_function_cannot_be_saved(tmp_path):
    model = TransformerWrapper(
        num_tokens=5, max_seq_len=4, attn_layers=Decoder(dim=8, depth=1, heads=2, ff_custom_activation=torch.sin)
    )
    with pytest.raises(FlagError, match='ff_custom_activation must be plain data'):
        model.save_pretrained(tmp_path / 'model')
    assert not (tmp_path / 'model').exists()


def edit(folder, change):
    config = json.loads((folder / 'config.json').read_text())
    change(config)
    (folder / 'config.json').write_text(json.dumps(config))


@pytest.mark.parametrize(
    ('change', 'error', 'says'),
    [
        (lambda c: c['model'].update(colour='red'), UnknownFlag, '`colour`'),
        (lambda c: c['model']['attn_layers'].update(attn_kv_head=2), UnknownFlag, 'did you mean `attn_kv_heads`'),
        (lambda c: c.update(more=1), FolderError, "unknown keys 'more'"),
        (lambda c: c.update(format_version=99), FolderError, 'Install a newer one'),
        (lambda c: c.update(format='other'), FolderError, 'must have "format"'),
        (lambda c: c['model'].update({'class': 'Cipher'}), FolderError, "no model class 'Cipher'"),
        (lambda c: c['model']['attn_layers'].update(depth=3, shift_tokens=[0, 1] * 3), FolderError, 'missing: .*layers.4'),
        (lambda c: c['model']['attn_layers'].update(depth=1, shift_tokens=[0, 1]), FolderError, 'left over: .*layers.2'),
        (lambda c: c['model'].update(num_tokens=21), FolderError, r'of another shape: token_emb.emb.weight is \(20, 16\)'),
    ],
)
def test_configs_that_are_refused(tmp_path, change, error, says):
    language_model().save_pretrained(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(error, match=says):
        TransformerWrapper.from_pretrained(tmp_path)


def test_another_class_is_refused(tmp_path):
    language_model().save_pretrained(tmp_path)
    with pytest.raises(FolderError, match=r'holds a TransformerWrapper, not a XTransformer'):
        XTransformer.from_pretrained(tmp_path)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-10])


def foreign(file):
    file.write_bytes(struct.pack('<Q', 20) + b'not json at all ....' + b'0' * 50)


def unsupported(file):
    header = json.dumps({'a': {'dtype': 'C64', 'shape': [1], 'data_offsets': [0, 8]}}).encode()
    file.write_bytes(struct.pack('<Q', len(header)) + header + b'0' * 8)


@pytest.mark.parametrize(
    ('spoil', 'says'),
    [
        (lambda file: file.unlink(), 'holds no weights'),
        (truncate, 'is truncated'),
        (foreign, 'no safetensors file'),
        (lambda file: file.write_bytes(b'abc'), 'truncated, or no safetensors'),
        (unsupported, 'of dtype C64, which is not supported'),
    ],
)
def test_weights_that_are_refused(tmp_path, spoil, says):
    language_model().save_pretrained(tmp_path)
    spoil(tmp_path / 'model.safetensors')
    with pytest.raises(FolderError, match=says) as caught:
        TransformerWrapper.from_pretrained(tmp_path)
    assert '\n' not in str(caught.value)


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(FolderError, match='is no folder'):
        TransformerWrapper.from_pretrained(tmp_path / 'nothing')
    with pytest.raises(FolderError, match=r'has no config.json'):
        TransformerWrapper.from_pretrained(tmp_path)


def test_pushing_writes_the_same_folder(tmp_path, monkeypatch):
    hub = pytest.importorskip('huggingface_hub', reason='push_to_hub needs huggingface_hub (extra: hf)')
    seen = {}

    class Api:
        """The Hub's interface, whose uploads stay here."""

        def __init__(self, *args, **kwargs):
            pass

        def create_repo(self, repo_id, **kwargs):
            return type('Repo', (), {'repo_id': repo_id})()

        def upload_folder(self, *, repo_id, folder_path, **kwargs):
            from pathlib import Path

            seen[repo_id] = {file.name: file.read_bytes() for file in Path(folder_path).iterdir()}
            return 'the address'

    monkeypatch.setattr(sys.modules[hub.ModelHubMixin.__module__], 'HfApi', Api)
    model = language_model()
    assert model.push_to_hub('me/model') == 'the address'
    model.save_pretrained(tmp_path)
    written = seen['me/model']
    assert {'config.json', 'model.safetensors', 'README.md'} <= set(written)
    assert written['config.json'] == (tmp_path / 'config.json').read_bytes()
    assert written['model.safetensors'] == (tmp_path / 'model.safetensors').read_bytes()
