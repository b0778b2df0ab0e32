"""The drop-in surface: names, paths and attributes that other packages use."""

from __future__ import annotations

import importlib
import subprocess
import sys
from typing import Any

import pytest
import torch

import x_transformers
from x_transformers import Decoder, TransformerWrapper


def words(text: str) -> list[str]:
    return text.split()


CLASSES = words("""
LayerIntermediates always not_equals equals Identity ReluSquared SoLU TokenEmbedding AbsolutePositionalEmbedding
ScaledSinusoidalEmbedding RelativePositionBias CoPE DynamicPositionBias AlibiPositionalBias DataDependentAlibi
PerRowDataDependentAlibi RotaryEmbedding PolarEmbedding Scale LayerNorm AdaptiveLayerNorm ScaleNorm RMSNorm
AdaptiveRMSNorm SimpleRMSNorm MultiheadRMSNorm DynamicTanh Derf Residual GRUGating HyperConnection DynamicLIMe
ShiftTokens FoldAxially LayerScale AdaptiveLayerScale ConcatCombine GLU FeedForward Attention AttentionLayers Encoder
Decoder PrefixDecoder CrossAttender AttentionPool ViTransformerWrapper TransformerWrapper XTransformer Attend
Intermediates AutoregressiveWrapper
""")
FUNCTIONS = words("""
exists default identity first is_empty cast_tuple divisible_by at_most_one_of maybe detach_all Sequential log
max_neg_value l2norm softclamp masked_mean pad_at_dim or_reduce orthog_project get_cached_kvs calc_entropy calc_z_loss
init_zero_ pick_and_pop group_dict_by_key string_begins_with group_by_key_prefix groupby_prefix_and_trim dropout_seq
rotate_half apply_rotary_pos_emb apply_polar_pos_emb sinkhorn shift layer_schedule default_device log_prob_from_hard_attend
""")
BORROWED = words("""
torch nn F rearrange repeat einsum Tensor partial wraps math
""")
ATTEND = words("""
Intermediates Attend selective_attn qk_l2_dist_squared one_hot_straight_through sparse_topk_attn
log_prob_from_hard_attend create_causal_mask onnx_create_causal_mask softclamp exists default at_most_one_of compact
pack_one unpack_one once print_once
""")
AUTOREGRESSIVE = words("""
top_k top_p top_a min_p FILTER_LOGITS_FN contrastive_decode_fn log gumbel_noise gumbel_sample align_right pad_at_dim
eval_decorator exists default identity join cast_tuple modify_cached_kv AutoregressiveWrapper
""")


@pytest.mark.parametrize('name', x_transformers.__all__)
def test_public_names(name: str) -> None:
    found = getattr(x_transformers, name)
    assert callable(found)
    assert found.__name__ == name
    assert name in dir(x_transformers)


def test_every_name_can_be_imported_at_once() -> None:
    space: dict[str, Any] = {}
    exec('from x_transformers.x_transformers import *', space)
    missing = [name for name in [*CLASSES, *FUNCTIONS, *BORROWED] if name not in space]
    assert not missing
    assert space['DEFAULT_DIM_HEAD'] == 64
    assert space['LinearNoBias'](2, 3).bias is None
    assert space['torch'] is torch
    assert not hasattr(importlib.import_module('x_transformers.x_transformers'), '__all__')


@pytest.mark.parametrize(('module', 'names'), [('attend', ATTEND), ('autoregressive_wrapper', AUTOREGRESSIVE)])
def test_names_of_modules(module: str, names: list[str]) -> None:
    found = importlib.import_module(f'x_transformers.{module}')
    assert not [name for name in names if not hasattr(found, name)]


def test_classes_are_the_same_by_every_path() -> None:
    big = importlib.import_module('x_transformers.x_transformers')
    for name in x_transformers.__all__:
        if hasattr(big, name):
            assert getattr(big, name) is getattr(x_transformers, name)
    assert x_transformers.x_transformers is big


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match='no attribute'):
        _ = x_transformers.Decodr  # type: ignore[attr-defined]


def test_attributes_that_others_read() -> None:
    stack = Decoder(dim=16, depth=2, heads=2, attn_dim_head=8)
    model = TransformerWrapper(num_tokens=5, max_seq_len=8, attn_layers=stack, emb_dim=6)
    read = {
        'emb_dim': 6,
        'num_tokens': 5,
        'max_seq_len': 8,
        'max_mem_len': 0,
        'shift_mem_down': 0,
        'num_cls_tokens': 1,
        'num_memory_tokens': 0,
        'has_multiple_heads': False,
        'output_is_log_prob': False,
        'add_continuous_pred_head': False,
        'recycling': False,
        'input_not_include_cache': False,
        'can_cache_kv': True,
        'can_cache_kv_outside_max_seq_len': False,
    }
    assert {name: getattr(model, name) for name in read} == read
    assert model.token_emb.emb.weight.shape == (5, 6)
    assert model.attn_layers is stack
    assert (stack.dim, stack.depth, stack.attn_heads, stack.attn_dim_head, stack.causal) == (16, 2, 2, 8, True)
    for norms, branch, residual in stack.layers:
        assert len(norms) == 3
        assert callable(branch)
        assert callable(residual)


def test_importing_loads_little() -> None:
    heavy = ('torch._dynamo', 'torch.nn.attention.flex_attention', 'einops', 'matplotlib', 'tqdm')
    code = (
        'import sys, torch; before = set(sys.modules); import x_transformers; '
        'from x_transformers import TransformerWrapper, Decoder; '
        f'print([m for m in {heavy!r} if m in sys.modules and m not in before])'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == '[]'
