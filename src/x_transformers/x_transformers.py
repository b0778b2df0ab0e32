"""Upstream's module path for most names; it imports each from the module that defines it.

There is no ``__all__`` on purpose: code in the wild imports ``*`` from here and expects the helpers and torch's names, too.
"""

# ruff: noqa: F401
# mypy: implicit-reexport

from __future__ import annotations

import math
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from random import random, randrange

import torch
import torch.nn.functional as F
from einops import pack, rearrange, reduce, repeat, unpack
from einops.layers.torch import Rearrange
from torch import Tensor, cat, einsum, is_tensor, nn, stack, tensor
from torch.amp import autocast
from torch.nn import Module, ModuleDict, ModuleList

from x_transformers.attend import Attend, Intermediates, log_prob_from_hard_attend
from x_transformers.attention.attention import Attention
from x_transformers.attention.hybrid import FoldAxially
from x_transformers.attention.scores.contextual import CoPE
from x_transformers.autoregressive_wrapper import AutoregressiveWrapper
from x_transformers.cache.intermediates import LayerIntermediates, get_cached_kvs
from x_transformers.embedding.pooling import AttentionPool
from x_transformers.embedding.token import TokenEmbedding
from x_transformers.encoder_decoder import XTransformer
from x_transformers.feedforward import GLU, FeedForward, ReluSquared, SoLU
from x_transformers.flags.per_layer import layer_schedule
from x_transformers.helpers import (
    Identity,
    Sequential,
    always,
    at_most_one_of,
    cast_tuple,
    default,
    default_device,
    detach_all,
    divisible_by,
    equals,
    exists,
    first,
    group_by_key_prefix,
    group_dict_by_key,
    groupby_prefix_and_trim,
    identity,
    init_zero_,
    is_empty,
    l2norm,
    log,
    masked_mean,
    max_neg_value,
    maybe,
    not_equals,
    or_reduce,
    orthog_project,
    pad_at_dim,
    pick_and_pop,
    softclamp,
    string_begins_with,
)
from x_transformers.layers.across_depth import ConcatCombine, DynamicLIMe
from x_transformers.layers.branch import AdaptiveLayerScale, LayerScale, Scale, ShiftTokens, shift
from x_transformers.layers.drop import dropout_seq
from x_transformers.layers.hyper_connections import HyperConnection, sinkhorn
from x_transformers.layers.residual import GRUGating, Residual
from x_transformers.layers.stack import AttentionLayers, CrossAttender, Decoder, Encoder, PrefixDecoder, TransformerBlock
from x_transformers.losses import calc_entropy, calc_z_loss
from x_transformers.norms import (
    AdaptiveLayerNorm,
    AdaptiveRMSNorm,
    Derf,
    DynamicTanh,
    LayerNorm,
    MultiheadRMSNorm,
    RMSNorm,
    ScaleNorm,
    SimpleRMSNorm,
)
from x_transformers.position.absolute import AbsolutePositionalEmbedding, ScaledSinusoidalEmbedding
from x_transformers.position.forgetting import DataDependentAlibi, PerRowDataDependentAlibi
from x_transformers.position.polar import PolarEmbedding, apply_polar_pos_emb
from x_transformers.position.relative import AlibiPositionalBias, DynamicPositionBias, RelativePositionBias
from x_transformers.position.rotary import RotaryEmbedding, apply_rotary_pos_emb, rotate_half
from x_transformers.transformer_wrapper import TransformerWrapper
from x_transformers.vision import ViTransformerWrapper

DEFAULT_DIM_HEAD = 64
LinearNoBias = partial(nn.Linear, bias=False)
