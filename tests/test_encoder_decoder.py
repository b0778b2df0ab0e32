"""One sequence in, another one out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from x_transformers import XTransformer
from x_transformers.flags.base import FlagError, UnknownFlag
from x_transformers.losses import token_cross_entropy

PART: dict[str, Any] = {'num_tokens': 13, 'max_seq_len': 16, 'depth': 1, 'heads': 2, 'attn_dim_head': 8, 'verbose': False}
BOTH = {f'{prefix}_{name}': value for prefix in ('enc', 'dec') for name, value in PART.items()}


def build(**flags: Any) -> XTransformer:
    return XTransformer(**{'dim': 16, **BOTH, **flags}).eval()


@pytest.fixture
def src() -> Tensor:
    return torch.randint(1, 13, (2, 7))


@pytest.fixture
def tgt() -> Tensor:
    return torch.randint(1, 13, (2, 5))


def test_loss_by_hand(src: Tensor, tgt: Tensor) -> None:
    model = build()
    encoded = model.encoder(src, return_embeddings=True)
    logits = model.decoder.net(tgt, context=encoded)
    torch.testing.assert_close(model(src, tgt), token_cross_entropy(logits[:, :-1], tgt[:, 1:]))


@pytest.mark.parametrize('memory', [0, 2])
@pytest.mark.parametrize('prefix', [0, 3])
def test_padding_of_the_source_changes_nothing(memory: int, prefix: int, src: Tensor, tgt: Tensor) -> None:
    model = build(enc_num_memory_tokens=memory or None, dec_num_memory_tokens=memory or None)
    mask = torch.ones(2, 7).bool()
    mask[:, 4:] = False
    front = {'src_prepend_embeds': torch.randn(2, prefix, 16)} if prefix else {}
    torch.testing.assert_close(model(src, tgt, mask=mask, **front), model(src[:, :4], tgt, **front))
    generated = model.generate(src, tgt[:, :1], 4, mask=mask, temperature=0.0, **front)
    assert torch.equal(generated, model.generate(src[:, :4], tgt[:, :1], 4, temperature=0.0, **front))


def test_a_mask_between_positions_of_the_source(src: Tensor, tgt: Tensor) -> None:
    model, alone = build(), torch.eye(7).bool()
    embeds, _ = model.encode(src, attn_mask=alone)
    other = src.clone()
    other[:, 1:] = (other[:, 1:] + 1) % 13
    torch.testing.assert_close(model.encode(other, attn_mask=alone)[0][:, 0], embeds[:, 0])
    assert not torch.allclose(model.encode(other)[0][:, 0], model.encode(src)[0][:, 0])


def test_generate_is_greedy_step_by_step_and_leaves_the_mode_alone(src: Tensor) -> None:
    model = build().train()
    start = torch.ones(2, 1).long()
    got = model.generate(src, start, 4, temperature=0.0)
    assert model.encoder.training
    assert model.decoder.training
    model.eval()
    seq = start
    for _ in range(4):
        logits = model.decoder.net(seq, context=model.encoder(src, return_embeddings=True))
        seq = torch.cat((seq, logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(got, seq[:, 1:])


def test_one_embedding_for_both(src: Tensor, tgt: Tensor) -> None:
    model = build(tie_token_emb=True)
    assert model.encoder.token_emb is model.decoder.net.token_emb
    names = set(model.state_dict())
    assert {'encoder.token_emb.emb.weight', 'decoder.net.token_emb.emb.weight'} <= names
    both = build(tie_token_emb=True, dec_tie_embedding=True)
    both(src, tgt).backward()
    assert both.decoder.net.to_logits.weight is both.encoder.token_emb.emb.weight


def test_tokens_of_the_source_are_dropped_in_training_only(src: Tensor, tgt: Tensor) -> None:
    model = build(cross_attn_tokens_dropout=0.5)
    torch.testing.assert_close(model(src, tgt), model(src, tgt))
    model.train()
    losses = {round(model(src, tgt).item(), 5) for _ in range(12)}
    assert len(losses) > 1


def test_built_on_meta(src: Tensor, tgt: Tensor) -> None:
    with torch.device('meta'):
        model = build()
    model.to_empty(device='cpu').reset_parameters()
    assert model(src, tgt).isfinite()


@pytest.mark.parametrize(
    ('flags', 'says'),
    [
        ({'enc_dpth': 2}, 'enc_depth'),
        ({'dec_attn_kv_hads': 2}, 'dec_attn_kv_heads'),
        ({'depth': 2}, 'unrecognized kwargs'),
        ({'enc_dim': 16}, 'give dim itself'),
        ({'dec_causal': False}, 'dec_causal'),
        ({'encoder_depth': 2}, 'encoder_depth'),
        ({'tie_token_emb': True, 'enc_num_tokens': 4}, 'enc_num_tokens and dec_num_tokens'),
        ({'cross_attn_tokens_dropout': 1.0}, 'less than 1'),
    ],
)
def test_flags_that_cannot_be(flags: dict[str, Any], says: str) -> None:
    with pytest.raises(FlagError, match=says):
        build(**flags)


def test_missing_flags_are_named_together() -> None:
    with pytest.raises(UnknownFlag, match=r'(?s)enc_num_tokens.*dec_num_tokens'):
        XTransformer(dim=16, enc_depth=1, dec_depth=1)


def test_generate_takes_what_is_prepended_to_the_source(src: Tensor) -> None:
    model, front, start = build(), torch.randn(2, 3, 16), torch.ones(2, 1).long()
    mask = torch.arange(7).expand(2, -1) < torch.tensor([[7], [4]])
    got = model.generate(src, start, 4, mask=mask, src_prepend_embeds=front, temperature=0.0)
    encoded = model.encoder(src, mask=mask, prepend_embeds=front, return_embeddings=True)
    seen = torch.cat((torch.ones(2, 3, dtype=torch.bool), mask), dim=1)
    seq = start
    for _ in range(4):
        logits = model.decoder.net(seq, context=encoded, context_mask=seen)
        seq = torch.cat((seq, logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(got, seq[:, 1:])
