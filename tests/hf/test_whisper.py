"""The encoder of Whisper: a whole model is read, the encoder is written; it starts from sinusoids; lengths."""

from __future__ import annotations

import json

import pytest
import torch

from tests.hf.published import WHISPER, build, noisy
from x_transformers import Encoder
from x_transformers.hf import from_hf, to_hf
from x_transformers.hf.modules import WhisperEncoder


def small():
    return WhisperEncoder(attn_layers=Encoder(dim=8, depth=1, heads=2, attn_dim_head=4), num_mels=3, max_seq_len=10).eval()


def test_shorter_sounds_and_padding(tmp_path):
    model, x = small(), torch.randn(2, 3, 13)
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    out = model(x, mask=mask)
    assert out.shape == (2, 7, 8)
    model.save_pretrained(tmp_path / 'ours')
    assert torch.equal(WhisperEncoder.from_pretrained(tmp_path / 'ours').eval()(x, mask=mask), out)
    for wrong in (torch.randn(2, 3, 21), torch.randn(2, 4, 13), torch.randn(3, 13)):
        with pytest.raises(ValueError, match=r'at most 20 frames, got'):
            model(wrong)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('cls', ['WhisperModel', 'WhisperForConditionalGeneration'])
def test_a_whole_model_gives_its_encoder(cls, tmp_path):
    pytest.importorskip('transformers', reason='the models to compare with are those of transformers (extra: dev)')
    fresh = build(cls, 'WhisperConfig', WHISPER)
    torch.testing.assert_close(from_hf(fresh).pos_emb, type(from_hf(fresh))(
        attn_layers=Encoder(dim=32, depth=1), num_mels=8, max_seq_len=20).pos_emb)  # fmt: skip
    theirs = noisy(fresh)
    model, x = from_hf(theirs), torch.randn(2, 8, 40)
    assert not model.pos_emb.requires_grad
    torch.testing.assert_close(model(x), theirs.get_encoder()(x).last_hidden_state, atol=1e-4, rtol=0)
    to_hf(model, tmp_path / 'encoder')
    assert json.loads((tmp_path / 'encoder/config.json').read_text())['architectures'] == ['WhisperEncoder']
    again = type(theirs.get_encoder()).from_pretrained(tmp_path / 'encoder').eval()
    torch.testing.assert_close(again(x).last_hidden_state, model(x), atol=1e-4, rtol=0)
