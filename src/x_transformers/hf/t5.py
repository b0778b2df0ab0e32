"""T5 1.0 and 1.1: an ``XTransformer``; the encoder alone is a ``TransformerWrapper`` without logits."""

from __future__ import annotations

from x_transformers.hf.family import Config, Family, KeyRule, Plain, activation, for_layers, rule
from x_transformers.hf.maps import JOINED


def stack_keywords(config: Config, depth: int) -> Plain:
    kind = config.get('feed_forward_proj', 'relu')
    gated = kind.startswith('gated-')
    name = kind.removeprefix('gated-')
    # what is called gated-gelu is the tanh form
    act = Config({'model_type': config.kind, 'feed_forward_proj': 'gelu_new' if gated and name == 'gelu' else name})
    inner = activation(act, 'feed_forward_proj', 'relu')
    config.wrong += act.wrong
    buckets, farthest = config.get('relative_attention_num_buckets', 32), config.get('relative_attention_max_distance', 128)
    if buckets > farthest:
        config.wrong.append(
            f'`relative_attention_num_buckets` is {buckets} and `relative_attention_max_distance` {farthest}: '
            'there are at most as many buckets as distances'
        )
    return {
        'depth': depth,
        'heads': config.need('num_heads'),
        'attn_dim_head': config.need('d_kv'),
        # queries and keys are not divided by the root of their width
        'attn_scale': 1.0,
        'use_rmsnorm': True,
        'norm_add_unit_offset': False,
        'norm_eps': config.get('layer_norm_epsilon', 1e-6),
        'rel_pos_bias': True,
        'rel_pos_num_buckets': buckets,
        'rel_pos_max_distance': farthest,
        'rel_pos_kwargs': {'scale': 1.0},
        'ff_dim_inner': config.need('d_ff'),
        'ff_no_bias': True,
        **({'ff_glu': True, 'ff_glu_bias': False} if gated else {}),
        **inner,
        'verbose': False,
    }


def t5(config: Config) -> Plain:
    config.skip('dense_act_fn', 'is_gated_act', 'initializer_factor', 'tie_encoder_decoder')
    dim, tokens, depth = config.need('d_model'), config.need('vocab_size'), config.need('num_layers')
    tied = bool(config.get('tie_word_embeddings', True))
    scaled = bool(config.get('scale_decoder_outputs', tied))
    sizes = {'num_tokens': tokens, 'max_seq_len': config.get('n_positions', 512)}
    encoder = stack_keywords(config, depth)
    if config.architecture == 'T5EncoderModel':
        stack = {'class': 'Encoder', 'dim': dim, **encoder}
        config.skip('num_decoder_layers')
        return {'class': 'TransformerWrapper', **sizes, 'return_only_embed': True, 'attn_layers': stack}
    config.only('is_decoder', False, 'this family is read as encoder and decoder')
    head = {**({'tie_embedding': True} if tied else {}), **({'logits_scale': dim**-0.5} if scaled else {})}
    decoder = stack_keywords(config, config.get('num_decoder_layers', depth))
    return {
        'class': 'XTransformer',
        'dim': dim,
        'tie_token_emb': True,
        **{f'enc_{name}': value for name, value in {**sizes, **encoder}.items()},
        **{f'dec_{name}': value for name, value in {**sizes, **head, **decoder}.items()},
    }


def t5_attention_rules(theirs: str, ours: str, layer: str) -> list[KeyRule]:
    names = {'q': 'to_q', 'k': 'to_k', 'v': 'to_v', 'o': 'to_out'}
    return [rule(f'{theirs}.{name}.weight', f'{ours}.layers.{layer}.1.{to}.weight') for name, to in names.items()]


def half_rules(theirs: str, ours: str, cross: bool, gated: bool) -> list[KeyRule]:
    """The rules of one stack."""
    first, last = ('{s}', '{g}') if cross else ('{a}', '{f}')
    block = f'{theirs}.block.{{i}}.layer'
    forward, number = f'{ours}.layers.{last}', 2 if cross else 1
    dense = f'{block}.{number}.DenseReluDense'
    rules = [
        *t5_attention_rules(f'{block}.0.SelfAttention', ours, first),
        rule(f'{block}.0.layer_norm.weight', f'{ours}.layers.{first}.0.0.g'),
        rule(f'{block}.{number}.layer_norm.weight', f'{forward}.0.0.g'),
        rule(f'{dense}.wo.weight', f'{forward}.1.ff.2.weight'),
        rule(f'{theirs}.final_layer_norm.weight', f'{ours}.final_norm.g'),
        # one table, that of the first layer, is used by all
        rule(
            f'{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias.weight',
            f'{ours}.rel_pos.relative_attention_bias.weight',
        ),
    ]
    if cross:
        rules += t5_attention_rules(f'{block}.1.EncDecAttention', ours, '{c}')
        rules.append(rule(f'{block}.1.layer_norm.weight', f'{ours}.layers.{{c}}.0.0.g'))
    if gated:
        rules.append(rule((f'{dense}.wi_1.weight', f'{dense}.wi_0.weight'), f'{forward}.1.ff.0.proj.weight', JOINED))
    else:
        rules.append(rule(f'{dense}.wi.weight', f'{forward}.1.ff.0.0.weight'))
    return rules


def t5_rules(config: Config, model: Plain) -> list[KeyRule]:
    if model['class'] == 'TransformerWrapper':
        stack = model['attn_layers']
        alone = half_rules('encoder', 'attn_layers', False, bool(stack.get('ff_glu')))
        return for_layers([rule('shared.weight', 'token_emb.emb.weight'), *alone], stack['depth'])
    gated = bool(model.get('enc_ff_glu'))
    rules = [
        rule('shared.weight', 'encoder.token_emb.emb.weight'),
        *for_layers(half_rules('encoder', 'encoder.attn_layers', False, gated), model['enc_depth']),
        *for_layers(half_rules('decoder', 'decoder.net.attn_layers', True, gated), model['dec_depth']),
    ]
    if not model.get('dec_tie_embedding'):
        rules.append(rule('lm_head.weight', 'decoder.net.to_logits.weight'))
    return rules


T5 = Family(
    ('t5',), t5, t5_rules, unused=r'(encoder|decoder)\.embed_tokens\.weight|.*EncDecAttention\.relative_attention_bias\.weight'
)
