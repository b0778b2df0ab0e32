"""ModernBERT: layers with a two-sided window and a separate rotary base, between layers with full attention."""

from __future__ import annotations

from x_transformers.hf.family import (
    BIASES,
    NAMES_OF_ACTIVATIONS,
    Config,
    Family,
    KeyRule,
    Plain,
    activation,
    check_head,
    for_layers,
    headless,
    layer_norm_rules,
    one_or_each,
    rotary_by_kind,
    rule,
    weight_and_bias,
)
from x_transformers.hf.llama import ATTENTION, FORWARD, layer_kinds
from x_transformers.hf.maps import HALVES_SWAPPED, SAME, apart, chain, paired, split

THETAS = {'full_attention': ('global_rope_theta', 160000.0), 'sliding_attention': ('local_rope_theta', 10000.0)}


def modernbert(config: Config) -> Plain:
    dim, heads, depth = config.need('hidden_size'), config.need('num_attention_heads'), config.need('num_hidden_layers')
    config.skip('classifier_pooling', 'deterministic_flash_attn', 'sparse_prediction', 'sparse_pred_ignore_index')
    config.skip('layer_norm_eps', 'position_embedding_type', 'reference_compile', 'repad_logits_with_grad', 'local_attention')
    period = config.get('global_attn_every_n_layers', 3)
    kinds = layer_kinds(config, ['sliding_attention' if layer % period else 'full_attention' for layer in range(depth)])
    reach = config.get('local_attention', 128) // 2
    window = one_or_each([reach if kind == 'sliding_attention' else None for kind in kinds])
    turned = rotary_by_kind(config, dim // heads, kinds, THETAS, scaled=tuple(THETAS))
    bias, inner_bias = bool(config.get('attention_bias', False)), bool(config.get('mlp_bias', False))
    return {
        'class': 'TransformerWrapper',
        'num_tokens': config.need('vocab_size'),
        'max_seq_len': config.get('max_position_embeddings', 8192),
        'post_emb_norm': True,
        **masked_head(config),
        'attn_layers': {
            'class': 'Encoder',
            'dim': dim,
            'depth': depth,
            'heads': heads,
            'attn_dim_head': dim // heads,
            **(BIASES if bias else {}),
            **({} if window is None else {'attn_max_attend_past': window, 'attn_max_attend_future': window}),
            'rotary_pos_emb': True,
            **turned,
            # what comes out of the norm of the embeddings is normed
            'norm_before': (False, *(True,) * (2 * depth - 1)),
            'norm_add_unit_offset': False,
            'norm_bias': bool(config.get('norm_bias', False)),
            'norm_eps': config.get('norm_eps', 1e-5),
            'ff_glu': True,
            'ff_dim_inner': config.need('intermediate_size'),
            'ff_no_bias': not inner_bias,
            'ff_glu_bias': inner_bias,
            **activation(config, 'hidden_activation', 'gelu'),
            'verbose': False,
        },
    }


def masked_head(config: Config) -> Plain:
    tied, bias = bool(config.get('tie_word_embeddings', True)), bool(config.get('decoder_bias', True))
    act, inner = config.get('classifier_activation', 'gelu'), bool(config.get('classifier_bias', False))
    if headless(config.architecture):
        return {'return_only_embed': True}
    check_head(config, 'ForMaskedLM')
    if act not in NAMES_OF_ACTIVATIONS:
        config.wrong.append(f'`classifier_activation` is {act!r}: the head has {", ".join(NAMES_OF_ACTIVATIONS)}')
    head = {'logits_transform': NAMES_OF_ACTIVATIONS.get(act), 'logits_transform_bias': inner, 'logits_bias': bias}
    return {**({'tie_embedding': True} if tied else {}), **head}


def modernbert_rules(config: Config, model: Plain) -> list[KeyRule]:
    stack, theirs = model['attn_layers'], 'model.layers.{i}'
    heads, dim_head, norm_bias = int(stack['heads']), int(stack['attn_dim_head']), bool(stack['norm_bias'])
    bias, inner_bias = bool(stack.get('attn_qkv_bias')), not stack['ff_no_bias']
    turn = paired(heads, dim_head)
    fused = chain(split(3), apart(turn, turn, SAME))
    projections = [f'{ATTENTION}.1.to_{name}' for name in 'qkv']
    kinds = ('weight', 'bias') if bias else ('weight',)
    rules = [
        rule('model.embeddings.tok_embeddings.weight', 'token_emb.emb.weight'),
        *layer_norm_rules('model.embeddings.norm', 'post_emb_norm', norm_bias),
        *layer_norm_rules('model.final_norm', 'attn_layers.final_norm', norm_bias),
        *(rule(f'{theirs}.attn.Wqkv.{kind}', tuple(f'{name}.{kind}' for name in projections), fused) for kind in kinds),
        *weight_and_bias(f'{theirs}.attn.Wo', f'{ATTENTION}.1.to_out', bias=bias),
        *layer_norm_rules(f'{theirs}.mlp_norm', f'{FORWARD}.0.0', norm_bias),
        *weight_and_bias(f'{theirs}.mlp.Wi', f'{FORWARD}.1.ff.0.proj', HALVES_SWAPPED, bias=inner_bias),
        *weight_and_bias(f'{theirs}.mlp.Wo', f'{FORWARD}.1.ff.2', bias=inner_bias),
    ]
    rules = for_layers(rules, stack['depth'])
    first = layer_norm_rules(f'{theirs}.attn_norm', f'{ATTENTION}.0.0', norm_bias)
    rules += [entry.at(layer) for layer in range(1, stack['depth']) for entry in first]
    if 'logits_transform' in model:
        rules += weight_and_bias('head.dense', 'logits_transform.0', bias=bool(model['logits_transform_bias']))
        rules += layer_norm_rules('head.norm', 'logits_transform.2', norm_bias)
        rules += [rule('decoder.bias', 'to_logits.bias')] if model['logits_bias'] else []
        rules += [] if model.get('tie_embedding') else [rule('decoder.weight', 'to_logits.weight')]
    return rules


MODERNBERT = Family(('modernbert',), modernbert, modernbert_rules, prefix='model.', unused=r'.*rotary_emb\..*inv_freq')
