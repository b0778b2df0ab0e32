"""ViT and DINOv2 with registers: images in, embeddings of all tokens or logits out. The pooler is omitted."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from x_transformers.hf.family import (
    Config,
    Family,
    KeyRule,
    Plain,
    for_layers,
    layer_norm_rules,
    layer_normed,
    rule,
    weight_and_bias,
)
from x_transformers.hf.maps import HALVES_SWAPPED, Map, each, reshaped
from x_transformers.tensor_types import Float


def vision(config: Config, inner: int, stack: Plain, **more: Any) -> Plain:
    """``inner``: the feed-forward's width; ``stack``: further keywords of the stack, ``more``: of the model."""
    dim, heads = config.need('hidden_size'), config.need('num_attention_heads')
    layers = layer_normed(
        config, 'Encoder', dim=dim, depth=config.need('num_hidden_layers'), heads=heads, inner=inner,
        act=('hidden_act', 'gelu'), eps=config.get('layer_norm_eps', 1e-12), attn_qkv_bias=bool(config.get('qkv_bias', True)),
        **stack,
    )  # fmt: skip
    return {
        'class': 'ViTransformerWrapper',
        'image_size': config.get('image_size', 224),
        'patch_size': config.get('patch_size', 16),
        'channels': config.get('num_channels', 3),
        'patch_norm': False,
        'use_cls_token': True,
        **classes(config),
        **more,
        'attn_layers': layers,
    }


def classes(config: Config) -> Plain:
    """The number of classes of a model with a head, from the names of its labels."""
    if not config.architecture.endswith('ForImageClassification'):
        if config.architecture and not config.architecture.endswith('Model'):
            config.wrong.append(f'`architectures` is {config.architecture}: heads are those of image classification, or none')
        return {}
    return {'num_classes': len(config.get('id2label', {0: '', 1: ''}))}


def vit(config: Config) -> Plain:
    config.skip('encoder_stride', 'pooler_output_size', 'pooler_act')
    return vision(config, config.need('intermediate_size'), {})


def dinov2(config: Config) -> Plain:
    config.skip('layerscale_value', 'reshape_hidden_states', 'stage_names', 'out_features', 'out_indices')
    config.only('apply_layernorm', True, 'the final norm cannot be left out of the embeddings alone')
    inner = int(config.need('hidden_size') * config.get('mlp_ratio', 4))
    stack: Plain = {'use_layerscale': True, 'layerscale_init_value': 1.0}
    if config.get('use_swiglu_ffn', False):
        # the activation that the config names counts in the other kind
        inner = (int(inner * 2 / 3) + 7) // 8 * 8
        stack |= {'ff_glu': True, 'ff_swish': True, 'ff_relu_squared': False, 'ff_custom_activation': None}
    registers = config.get('num_register_tokens', 4)
    kept = {'num_register_tokens': registers, 'keep_register_tokens': True} if registers else {}
    more = {**kept, 'cls_and_mean': True} if config.architecture.endswith('ForImageClassification') else kept
    return vision(config, inner, stack, **more)


# ---------------------------------------------------------------- weights


def of_patches(model: Plain) -> Map:
    """A convolution's kernel (d c h w) is a linear map of patches whose features are ordered by row, column and channel."""
    size, channels = model['patch_size'], model['channels']
    height, width = (size, size) if isinstance(size, int) else size

    def into(t: Float[Tensor, 'd c h w']) -> Float[Tensor, 'd p']:
        return t.permute(0, 2, 3, 1).reshape(t.shape[0], -1)

    def back(t: Float[Tensor, 'd p']) -> Float[Tensor, 'd c h w']:
        return t.reshape(t.shape[0], height, width, channels).permute(0, 3, 1, 2).contiguous()

    return each(into, back)


def embedding_rules(prefix: str, model: Plain) -> list[KeyRule]:
    dim, theirs = model['attn_layers']['dim'], f'{prefix}embeddings'
    rules = [
        rule(f'{theirs}.cls_token', 'cls_token', reshaped((1, dim), (1, 1, dim))),
        rule(f'{theirs}.position_embeddings', 'pos_embedding'),
        rule(f'{theirs}.patch_embeddings.projection.weight', 'patch_to_embedding.1.weight', of_patches(model)),
        rule(f'{theirs}.patch_embeddings.projection.bias', 'patch_to_embedding.1.bias'),
        *layer_norm_rules(f'{prefix}layernorm', 'attn_layers.final_norm'),
    ]
    return [*rules, *weight_and_bias('classifier', 'mlp_head')] if 'num_classes' in model else rules


def self_attention_rules(theirs: str, ours: str, model: Plain) -> list[KeyRule]:
    bias = bool(model['attn_layers'].get('attn_qkv_bias'))
    names = {'query': 'to_q', 'key': 'to_k', 'value': 'to_v'}
    rules = [
        entry
        for name, to in names.items()
        for entry in weight_and_bias(f'{theirs}.attention.{name}', f'{ours}.{to}', bias=bias)
    ]
    return [*rules, *weight_and_bias(f'{theirs}.output.dense', f'{ours}.to_out')]


def vit_rules(config: Config, model: Plain) -> list[KeyRule]:
    layer, attention, forward = 'vit.encoder.layer.{i}', 'attn_layers.layers.{a}', 'attn_layers.layers.{f}'
    rules = [
        *embedding_rules('vit.', model),
        *self_attention_rules(f'{layer}.attention', f'{attention}.1', model),
        *layer_norm_rules(f'{layer}.layernorm_before', f'{attention}.0.0'),
        *layer_norm_rules(f'{layer}.layernorm_after', f'{forward}.0.0'),
        *weight_and_bias(f'{layer}.intermediate.dense', f'{forward}.1.ff.0.0'),
        *weight_and_bias(f'{layer}.output.dense', f'{forward}.1.ff.2'),
    ]
    return for_layers(rules, model['attn_layers']['depth'])


def dinov2_rules(config: Config, model: Plain) -> list[KeyRule]:
    prefix, stack = 'dinov2_with_registers.', model['attn_layers']
    layer, attention, forward = f'{prefix}encoder.layer.{{i}}', 'attn_layers.layers.{a}', 'attn_layers.layers.{f}'
    dim, registers = stack['dim'], model.get('num_register_tokens', 0)
    inner = f'{forward}.1.fn.ff'
    rules = [
        *embedding_rules(prefix, model),
        *self_attention_rules(f'{layer}.attention', f'{attention}.1.fn', model),
        *layer_norm_rules(f'{layer}.norm1', f'{attention}.0.0'),
        *layer_norm_rules(f'{layer}.norm2', f'{forward}.0.0'),
        rule(f'{layer}.layer_scale1.lambda1', f'{attention}.1.gamma'),
        rule(f'{layer}.layer_scale2.lambda1', f'{forward}.1.gamma'),
    ]
    if registers:
        tokens = reshaped((registers, dim), (1, registers, dim))
        rules.append(rule(f'{prefix}embeddings.register_tokens', 'register_tokens', tokens))
    if stack.get('ff_glu'):
        # theirs is the gate before the value
        rules += weight_and_bias(f'{layer}.mlp.weights_in', f'{inner}.0.proj', HALVES_SWAPPED)
        rules += weight_and_bias(f'{layer}.mlp.weights_out', f'{inner}.2')
    else:
        rules += [*weight_and_bias(f'{layer}.mlp.fc1', f'{inner}.0.0'), *weight_and_bias(f'{layer}.mlp.fc2', f'{inner}.2')]
    return for_layers(rules, stack['depth'])


VIT = Family(('vit',), vit, vit_rules, prefix='vit.', unused=r'(vit\.)?pooler\..*')
DINOV2 = Family(
    ('dinov2_with_registers',), dinov2, dinov2_rules, prefix='dinov2_with_registers.',
    unused=r'(dinov2_with_registers\.)?embeddings\.mask_token',
)  # fmt: skip
