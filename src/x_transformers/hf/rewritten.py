"""Equivalent flags: a model of this library rewritten with the flags of published models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from x_transformers.hf.family import Plain
from x_transformers.norms import LAYER_NORM_EPS, MIN_LENGTH
from x_transformers.tensor_types import Shaped


@torch.no_grad()
def in_their_words(model: Any, plain: Plain, own: dict[str, Shaped[Tensor, '...']]) -> tuple[Plain, dict[str, Tensor]]:
    """(keywords, parameters) of a model that says the same: gains instead of their difference from 1, an eps that is no more
    than nothing, sizes instead of shares, a bias of zeros where the other one is there.

    Stacks with values by layer stay as they are.
    """
    if plain['class'] != 'TransformerWrapper' or model.attn_layers.flags.varying:
        return plain, own
    flags, stack, own = model.attn_layers.flags, dict(plain['attn_layers']), dict(own)
    if flags.norm_add_unit_offset:
        stack['norm_add_unit_offset'] = False
        for name, module in model.named_modules():
            if getattr(module, 'unit_offset', False):
                gain = next(key for key in (f'{name}.g', f'{name}.gamma') if key in own)
                own[gain] = own[gain] + 1.0
    if flags.norm_eps is None:
        stack['norm_eps'] = MIN_LENGTH if flags.use_rmsnorm else LAYER_NORM_EPS
    if flags.rotary:
        stack['rotary_emb_dim'] = flags.rotary_dim
        stack.pop('rotary_whole_head', None)
    if stack.pop('attn_one_kv_head', False):
        stack['attn_kv_heads'] = 1
    stack.pop('ff_mult', None)
    stack['ff_dim_inner'] = flags.feedforward.inner(stack['dim'])
    if flags.feedforward.glu and flags.feedforward.no_bias and flags.feedforward.glu_bias:
        stack['ff_no_bias'] = False
        own |= {
            name.removesuffix('weight') + 'bias': tensor.new_zeros(tensor.shape[0])
            for name, tensor in own.items()
            if name.endswith('.ff.2.weight')
        }
    return {**plain, 'attn_layers': stack}, own
