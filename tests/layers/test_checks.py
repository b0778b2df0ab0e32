"""What does not fit is told before anything is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from x_transformers.layers.stack import AttentionLayers, CrossAttender, Decoder, Encoder

DIM = 8
SMALL: dict[str, Any] = {'dim': DIM, 'depth': 2, 'heads': 2, 'attn_dim_head': 4, 'verbose': False}
X = torch.randn(2, 5, DIM)
ONES = torch.ones(2, 5, dtype=torch.bool)


def pair(heads: int = 2, length: int = 3, width: int = 4, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, heads, length, width), torch.randn(batch, heads, length, width)


@pytest.mark.parametrize(
    ('flags', 'given', 'sentence'),
    [
        ({}, {'x': torch.zeros(2, 5, dtype=torch.long)}, 'x must be .*token ids need an embedding'),
        ({}, {'x': torch.randn(2, 5, 9)}, r'x must be \(batch, sequence, 8\)'),
        ({}, {'mask': ONES.float()}, 'mask must be a boolean tensor'),
        ({}, {'mask': ONES[:, :4]}, r'mask must be .*\(2, 5\), got \(2, 4\)'),
        ({}, {'mask': ONES[:1]}, 'mask must be'),
        ({}, {'self_attn_kv_mask': ONES[:, :3]}, 'self_attn_kv_mask must be'),
        ({}, {'attn_mask': torch.ones(5, 5)}, 'attn_mask must be boolean'),
        ({}, {'attn_mask': torch.ones(5, 4, dtype=torch.bool)}, r'attn_mask must end in \(5, 5\)'),
        ({}, {'attn_mask': torch.ones(3, 5, 5, dtype=torch.bool)}, 'with 2 heads or 1'),
        ({}, {'attn_bias': torch.ones(4, 5)}, r'attn_bias must end in \(5, 5\)'),
        ({}, {'attn_bias': ONES}, 'attn_bias must be floating point'),
        ({'alibi_pos_bias': True}, {'attn_bias': torch.ones(5, 5)}, 'whose scores have a bias'),
        ({}, {'seq_start_pos': torch.zeros(2)}, 'seq_start_pos must be'),
        ({}, {'seq_start_pos': torch.zeros(3, dtype=torch.long)}, 'seq_start_pos must be'),
        ({}, {'context': X}, 'without cross attention'),
        ({}, {'context_mask': ONES}, 'context_mask must go with context, got it alone'),
        ({'cross_attend': True}, {}, 'context must be given'),
        ({'cross_attend': True}, {'context': X[:1]}, 'context must be'),
        ({'cross_attend': True, 'cross_attn_dim_context': 3}, {'context': X}, r'context must be \(2, tokens, 3\)'),
        ({'cross_attend': True}, {'context': X, 'context_mask': ONES.float()}, 'context_mask must be boolean'),
        ({'cross_attend': True}, {'context': X, 'context_pos': torch.arange(5)}, 'rotary_pos_emb'),
        (
            {'cross_attend': True, 'rotary_pos_emb': True},
            {'context': X, 'context_pos': torch.arange(4)},
            'context_pos must give',
        ),
        ({}, {'mems': [X]}, 'one entry for each of 2 executed self attentions, got a list of 1'),
        ({}, {'mems': X}, 'mems must be a list'),
        ({}, {'mems': [X[:1], X]}, r'mems\[0\] must be \(2, memories, 8\)'),
        ({}, {'mem_masks': [ONES, None]}, 'mem_masks must go with mems, got it alone'),
        ({}, {'mems': [X, X], 'mem_masks': [ONES[:, :2], None]}, r'mem_masks\[0\] must be boolean and \(2, 5\)'),
        ({}, {'mems': [X, None], 'mem_masks': [None, ONES]}, r'mem_masks\[1\] must be None'),
        ({'rotary_pos_emb': True}, {'pos': torch.arange(4)}, 'each of 5 tokens of x, got 4'),
        ({'rotary_pos_emb': True}, {'pos': torch.zeros(3, 5)}, 'pos must be one position per token'),
        ({'rotary_pos_emb': True}, {'pos': torch.zeros(2, 5, 8)}, 'without alibi_pos_bias=True'),
        ({'rotary_pos_emb': True}, {'pos': torch.arange(5), 'mems': [X, X]}, 'must have 10 positions with mems'),
        ({}, {'rotary_pos_emb': (X, 1.0), 'polar_pos_emb': (X, X)}, 'not both be given'),
        ({}, {'rotary_pos_emb': torch.randn(5)}, 'what the embedding returns'),
        ({}, {'condition': torch.randn(2, 8)}, 'where nothing depends on it'),
        ({'use_adaptive_layernorm': True}, {}, 'condition must be given'),
        (
            {'use_adaptive_layernorm': True, 'dim_condition': 3},
            {'condition': torch.randn(2, 4)},
            r'condition must be \(batch, 3\)',
        ),
        ({'use_adaptive_rmsnorm': True}, {'condition': torch.randn(2, 4, 8)}, 'one row for each of 5 tokens of x, got 4'),
        (
            {'use_adaptive_rmsnorm': True},
            {'condition': X, 'mems': [X, X]},
            r'begin with the rows of the memories, \(2, 5 \+ 5, 8\)',
        ),
        (
            {'use_adaptive_rmsnorm': True},
            {'condition': X, 'mems': [X[:, :2]] * 2},
            r'begin with the rows of the memories, \(2, 2 \+ 5, 8\)',
        ),
        ({'use_adaptive_rmsnorm': True}, {'condition': X[:, :4], 'mems': [X] * 2}, 'each of 5 tokens of x and mems 5, got 4'),
        ({}, {'in_attn_cond': torch.randn(2, 7)}, 'in_attn_cond must be'),
        ({}, {'in_attn_cond': torch.randn(2, 4, 8)}, 'in_attn_cond must be'),
        ({'reinject_input': True}, {'in_attn_cond': torch.randn(2, 8)}, 'Leave one out'),
        ({}, {'layers_execute_order': (0, 4)}, r'from 0 to 3, got .*4'),
        ({}, {'layers_execute_order': ()}, r'got \(\)'),
        ({}, {'layers_execute_order': torch.arange(2)}, 'must be a tuple'),
        ({'unet_skips': True}, {'layers_execute_order': (2, 3)}, 'execute layer 0 before layer 2'),
        ({'integrate_layers': True}, {'layers_execute_order': (0, 1, 2, 3, 2)}, 'with integrate_layers'),
        ({'integrate_layers': True}, {'layers_execute_order': (2, 3)}, 'with integrate_layers'),
        ({}, {'self_attn_kv_residuals': torch.randn(2, 4, 8)}, 'self_attn_kv_residuals must be'),
        ({}, {'cross_attn_kv_residuals': X}, 'cross_attn_kv_residuals must go with context'),
        ({}, {'deep_embeds_and_ids': torch.randn(3, 2, 8)}, 'must be a pair'),
        ({}, {'deep_embeds_and_ids': (torch.randn(3, 2, 9), torch.zeros(2, 5, dtype=torch.long))}, 'the table of'),
        ({}, {'deep_embeds_and_ids': (torch.randn(3, 2, 8), torch.zeros(2, 4, dtype=torch.long))}, 'the ids of'),
        ({}, {'self_attn_additional_kv': 3}, 'must be a list of'),
        ({}, {'self_attn_additional_kv': [pair(width=5)]}, r'must be 4 \(keys\) and 4 \(values\) wide'),
        ({}, {'self_attn_additional_kv': [pair(heads=3)]}, 'divides the 2 heads here, got 3'),
        ({}, {'self_attn_additional_kv': [pair(batch=1)]}, 'must agree in batch'),
        ({}, {'self_attn_additional_kv': [X]}, 'must be a pair of keys'),
        ({}, {'self_attn_additional_kv': [pair()], 'additional_kv_mask': ONES}, r'boolean and \(2, 3\)'),
        ({}, {'additional_kv_mask': ONES}, 'additional_kv_mask must go with self_attn_additional_kv'),
        ({}, {'flash_pack_seq_kwargs': {}}, 'without attn_flash_pack_seq=True'),
    ],
)
def test_sentences(flags: dict[str, Any], given: dict[str, Any], sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = Decoder(**SMALL, **flags)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError('something was computed')

    monkeypatch.setattr(AttentionLayers, 'run', fail)
    with pytest.raises((ValueError, TypeError), match=sentence):
        stack(given.get('x', X), **{name: value for name, value in given.items() if name != 'x'})


def test_caches_that_do_not_fit() -> None:
    stack, encoder = Decoder(**SMALL), Encoder(**SMALL)
    _, seen = stack(X, return_hiddens=True)
    with pytest.raises(ValueError, match='not causal'):
        encoder(X, cache=seen)
    with pytest.raises(ValueError, match='of batch 1, as x is, got 2'):
        stack(X[:1], cache=seen)
    with pytest.raises(ValueError, match=r'cache_age must lie in 0 \(all\) to 5'):
        stack(X, cache=seen, cache_age=9)
    with pytest.raises(ValueError, match='the cache holds 5 tokens'):
        stack(X[:, :1], cache=seen, mask=ONES[:, :3])
    with pytest.raises(TypeError, match='cache must be'):
        stack(X, cache=X)
    with pytest.raises(ValueError, match='selective'):
        Decoder(**SMALL, attn_selective=True)(X, cache=seen)


def test_a_cross_attender_needs_its_context_and_nothing_else() -> None:
    assert CrossAttender(**SMALL)(X, context=X).shape == X.shape
    with pytest.raises(ValueError, match='mems must be a list with one entry for each of 0'):
        CrossAttender(**SMALL)(X, context=X, mems=[X])
