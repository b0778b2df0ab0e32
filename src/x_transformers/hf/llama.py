"""Llama 2, 3 and 3.1, and the families that differ from it in a few keys: Mistral, Qwen2, Qwen3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from x_transformers.hf.family import (
    BIASES,
    Config,
    Family,
    KeyRule,
    Plain,
    activation,
    activation_named,
    check_head,
    for_layers,
    headless,
    one_or_each,
    rotary,
    rule,
)
from x_transformers.hf.maps import JOINED, SAME, Map, chain, paired, regrouped_heads, reshaped, scaled, shifted


def decoder(config: Config, **more: Any) -> Plain:
    """The keywords of a pre-norm decoder with RMS norms, rotary positions and a gated feed-forward.

    ``more``: of the stack; ``rotary``: what ``rotary`` gives, if it is asked otherwise.
    """
    dim, heads = config.need('hidden_size'), config.need('num_attention_heads')
    dim_head = head_width(config)
    turned = more.pop('rotary') if 'rotary' in more else rotary(config, dim_head)
    mlp_bias = bool(config.get('mlp_bias', False))
    stack: Plain = {
        'class': 'Decoder',
        'dim': dim,
        'depth': config.need('num_hidden_layers'),
        'heads': heads,
        'attn_dim_head': dim_head,
        **kv_heads_of(config),
        'use_rmsnorm': True,
        'norm_add_unit_offset': False,
        'norm_eps': config.get('rms_norm_eps', 1e-6),
        'rotary_pos_emb': True,
        **turned,
        'ff_glu': True,
        'ff_dim_inner': config.need('intermediate_size'),
        'ff_no_bias': not mlp_bias,
        'ff_glu_bias': mlp_bias,
        'verbose': False,
        **more,
    }
    return wrapper(config, stack)


def head_width(config: Config) -> int:
    return int(config.get('head_dim', config.need('hidden_size') // config.need('num_attention_heads')))


def kv_heads_of(config: Config) -> Plain:
    heads = config.need('num_attention_heads')
    kv_heads = config.get('num_key_value_heads', heads)
    if kv_heads < 1 or heads % kv_heads:
        config.wrong.append(f'`num_key_value_heads` must divide `num_attention_heads`, {heads}, got {kv_heads}')
    return {} if kv_heads == heads else {'attn_kv_heads': kv_heads}


def wrapper(config: Config, stack: Plain, **more: Any) -> Plain:
    check_head(config, 'ForCausalLM')
    tied = bool(config.get('tie_word_embeddings', False))
    head: Plain = {'return_only_embed': True} if headless(config.architecture) else {'tie_embedding': True} if tied else {}
    return {
        'class': 'TransformerWrapper',
        'num_tokens': config.need('vocab_size'),
        'max_seq_len': longest_text(config, stack),
        **head,
        **more,
        'attn_layers': stack,
    }


def longest_text(config: Config, stack: Plain) -> int:
    """How far a text may go before its beginning is forgotten: frequencies that are stretched as it grows reach further."""
    scaling, length = stack.get('rotary_scaling'), config.get('max_position_embeddings', 2048)
    if isinstance(scaling, Mapping) and scaling['type'] == 'dynamic':
        return int(length * scaling['factor'])
    return int(length)


def biases(config: Config) -> Plain:
    has = bool(config.get('attention_bias', False))
    return dict(BIASES) if has else {}


def llama(config: Config) -> Plain:
    return decoder(config, **activation(config, 'hidden_act', 'silu'), **biases(config))


def mistral(config: Config) -> Plain:
    return decoder(config, **activation(config, 'hidden_act', 'silu'), **windows(config))


def windows(config: Config, usual: list[str] | None = None) -> Plain:
    """``attn_max_attend_past`` where some of the layers attend to a window only.

    ``usual``: the kinds of layers, full or sliding, if the config has none. None: all are sliding.
    """
    window = config.get('sliding_window')
    kinds = layer_kinds(config, ['sliding_attention'] * config.need('num_hidden_layers') if usual is None else usual)
    if window is None or 'sliding_attention' not in kinds:
        return {}
    return {'attn_max_attend_past': one_or_each([window - 1 if kind == 'sliding_attention' else None for kind in kinds])}


def windows_if_used(config: Config, usual: list[str] | None = None) -> Plain:
    """``windows`` of a family whose configs say whether they are used."""
    return windows(config, usual) if config.get('use_sliding_window', False) else {}


def layer_kinds(config: Config, usual: list[str]) -> list[str]:
    """What each layer's attention is, full or sliding."""
    kinds = list(config.get('layer_types', usual))[: config.need('num_hidden_layers')]
    unknown = sorted(set(kinds) - {'sliding_attention', 'full_attention'})
    if unknown:
        config.wrong.append(f'`layer_types` has {", ".join(unknown)}: layers are full_attention or sliding_attention')
    return kinds


def qwen_windows(config: Config) -> Plain:
    config.skip('max_window_layers', 'sliding_window', 'layer_types')
    depth, first = config.need('num_hidden_layers'), config.get('max_window_layers', 28)
    return windows_if_used(config, ['full_attention' if layer < first else 'sliding_attention' for layer in range(depth)])


def qwen2(config: Config) -> Plain:
    return decoder(config, **activation(config, 'hidden_act', 'silu'), **qwen_windows(config), attn_qkv_bias=True)


def head_norms(config: Config, scale: float) -> Plain:
    """RMS norms of queries and keys, with one gain for all heads."""
    return {
        'attn_qk_norm': True, 'attn_qk_norm_dim_scale': True, 'attn_qk_norm_shared_gain': True, 'attn_qk_norm_scale': scale,
        'attn_qk_norm_eps': config.get('rms_norm_eps', 1e-6),
    }  # fmt: skip


def qwen3(config: Config) -> Plain:
    dim_head = config.get('head_dim', 128)
    norms = head_norms(config, dim_head**-0.5)
    return decoder(config, **activation(config, 'hidden_act', 'silu'), **qwen_windows(config), **biases(config), **norms)


# ---------------------------------------------------------------- weights


ATTENTION, FORWARD = 'attn_layers.layers.{a}', 'attn_layers.layers.{f}'


def attention_rules(theirs: str, stack: Plain, unit_offset: bool = False, out: str = 'o_proj') -> list[KeyRule]:
    """Projections of queries, keys, values and outputs, biases, norms of heads, sinks.

    ``unit_offset``: gains of heads are stored as the difference from 1; ``out``: their name of the output projection.
    """
    heads, dim_head = int(stack['heads']), int(stack['attn_dim_head'])
    kv_heads = int(stack.get('attn_kv_heads', heads))
    turned = stack.get('rotary_emb_dim', dim_head) if stack.get('rotary_pos_emb') else 0
    turn, turn_keys = (paired(count, dim_head, turned) if turned else SAME for count in (heads, kv_heads))
    maps: dict[str, Map] = {'q': chain(turn, regrouped_heads(heads, kv_heads)), 'k': turn_keys, 'v': SAME}
    ours = f'{ATTENTION}.1'
    rules = [rule(f'{theirs}.{name}_proj.weight', f'{ours}.to_{name}.weight', map) for name, map in maps.items()]
    rules.append(rule(f'{theirs}.{out}.weight', f'{ours}.to_out.weight', regrouped_heads(heads, kv_heads, dim=1)))
    if stack.get('attn_qkv_bias'):
        rules += [rule(f'{theirs}.{name}_proj.bias', f'{ours}.to_{name}.bias', map) for name, map in maps.items()]
    if stack.get('attn_out_bias'):
        rules.append(rule(f'{theirs}.{out}.bias', f'{ours}.to_out.bias'))
    if stack.get('attn_qk_norm_over_heads'):
        for name, count in (('q', heads), ('k', kv_heads)):
            width = count * dim_head
            gains = chain(maps[name], scaled(width**0.5), reshaped((count, 1, dim_head), (width,)))
            rules.append(rule(f'{theirs}.{name}_norm.weight', f'{ours}.qk_norm_{name}_scale', gains))
    elif stack.get('attn_qk_norm'):
        gain = chain(
            shifted(1.0) if unit_offset else SAME,
            paired(1, dim_head, turned) if turned else SAME,
            scaled(dim_head**0.5),
            reshaped((1, 1, dim_head), (dim_head,)),
        )
        rules += [rule(f'{theirs}.{name}_norm.weight', f'{ours}.qk_norm_{name}_scale', gain) for name in 'qk']
    if stack.get('attn_head_learned_sink'):
        rules.append(rule(f'{theirs}.sinks', f'{ours}.attend.head_attn_sink', regrouped_heads(heads, kv_heads)))
    return rules


def logits_rules(model: Plain, theirs: str = 'lm_head.weight') -> list[KeyRule]:
    """Of the weight of the logits, if the model has one of its own."""
    own = not model.get('tie_embedding') and not model.get('return_only_embed')
    return [rule(theirs, 'to_logits.weight')] if own else []


def ends(model: Plain) -> list[KeyRule]:
    """Of the token table, the final norm and the logits."""
    return [
        rule('model.embed_tokens.weight', 'token_emb.emb.weight'),
        rule('model.norm.weight', 'attn_layers.final_norm.g'),
        *logits_rules(model),
    ]


def fused_rules(theirs: str, fused: Map, bias: bool) -> list[KeyRule]:
    """Of one linear map that gives queries, keys and values."""
    return [
        rule(f'{theirs}.{kind}', tuple(f'{ATTENTION}.1.to_{name}.{kind}' for name in 'qkv'), fused)
        for kind in (('weight', 'bias') if bias else ('weight',))
    ]


def gated_rules(theirs: str, bias: bool, ours: str = f'{FORWARD}.1.ff') -> list[KeyRule]:
    both = (f'{theirs}.up_proj', f'{theirs}.gate_proj')
    kinds = ('weight', 'bias') if bias else ('weight',)
    rules = [rule(tuple(f'{name}.{kind}' for name in both), f'{ours}.0.proj.{kind}', JOINED) for kind in kinds]
    return rules + [rule(f'{theirs}.down_proj.{kind}', f'{ours}.2.{kind}') for kind in kinds]


def pre_norm_rules(model: Plain, forward: list[KeyRule], attention: list[KeyRule] | None = None) -> list[KeyRule]:
    """``forward``: the rules of the feed-forward; ``attention``: those of attention, None: one map for each of its parts."""
    stack, layer = model['attn_layers'], 'model.layers.{i}'
    rules = [
        *ends(model),
        rule(f'{layer}.input_layernorm.weight', f'{ATTENTION}.0.0.g'),
        rule(f'{layer}.post_attention_layernorm.weight', f'{FORWARD}.0.0.g'),
        *(attention_rules(f'{layer}.self_attn', stack) if attention is None else attention),
        *forward,
    ]
    return for_layers(rules, stack['depth'])


def llama_rules(config: Config, model: Plain) -> list[KeyRule]:
    return pre_norm_rules(model, gated_rules('model.layers.{i}.mlp', not model['attn_layers']['ff_no_bias']))


def llama_config(model: Plain) -> Plain:
    """For a model that was made here."""
    stack = model['attn_layers']
    heads = stack.get('heads', 8)
    scaling = dict(stack.get('rotary_scaling') or {})
    rope: Plain = {'rope_theta': stack.get('rotary_theta', 10000.0), 'rope_type': scaling.pop('type', 'default'), **scaling}
    if 'original_length' in rope:
        rope['original_max_position_embeddings'] = rope.pop('original_length')
    return {
        'architectures': ['LlamaForCausalLM'],
        'model_type': 'llama',
        'vocab_size': model['num_tokens'],
        'hidden_size': stack['dim'],
        'intermediate_size': stack.get('ff_dim_inner') or int(stack['dim'] * stack.get('ff_mult', 4)),
        'num_hidden_layers': stack['depth'],
        'num_attention_heads': heads,
        'num_key_value_heads': 1 if stack.get('attn_one_kv_head') else stack.get('attn_kv_heads', heads),
        'head_dim': stack.get('attn_dim_head', 64),
        'hidden_act': activation_named(stack),
        'max_position_embeddings': model['max_seq_len'],
        'rms_norm_eps': stack.get('norm_eps') or 1e-12,
        'tie_word_embeddings': model.get('tie_embedding', False),
        'attention_bias': bool(stack.get('attn_qkv_bias', False)),
        'mlp_bias': not stack.get('ff_no_bias', False),
        'rope_parameters': rope,
        # ids that the families are used to, and this model may not have
        'bos_token_id': None,
        'eos_token_id': None,
    }


def mistral_config(model: Plain) -> Plain:
    """For a model that was made here."""
    past = model['attn_layers'].get('attn_max_attend_past')
    own = {key: value for key, value in llama_config(model).items() if key not in ('attention_bias', 'mlp_bias')}
    return {
        **own,
        'model_type': 'mistral',
        'architectures': ['MistralForCausalLM'],
        'sliding_window': None if past is None else past + 1,
    }


UNUSED = r'.*rotary_emb\.inv_freq'
LLAMA = Family(('llama',), llama, llama_rules, prefix='model.', unused=UNUSED, config_of=llama_config)
MISTRAL = Family(('mistral', 'ministral'), mistral, llama_rules, prefix='model.', unused=UNUSED, config_of=mistral_config)
QWEN2 = Family(('qwen2',), qwen2, llama_rules, prefix='model.', unused=UNUSED)
QWEN3 = Family(('qwen3',), qwen3, llama_rules, prefix='model.', unused=UNUSED)
