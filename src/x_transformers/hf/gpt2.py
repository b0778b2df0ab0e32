"""GPT-2."""

from __future__ import annotations

from x_transformers.hf.family import (
    Config,
    Family,
    KeyRule,
    Plain,
    activation_named,
    check_head,
    for_layers,
    headless,
    layer_norm_rules,
    layer_normed,
    rule,
)
from x_transformers.hf.llama import logits_rules
from x_transformers.hf.maps import TRANSPOSED, chain, scaled, split

# of heads that this library does not read
SUMMARY = ('summary_type', 'summary_use_proj', 'summary_activation', 'summary_proj_to_labels', 'summary_first_dropout')


def gpt2(config: Config) -> Plain:
    check_head(config, 'LMHeadModel')
    dim, heads, depth = config.need('n_embd'), config.need('n_head'), config.need('n_layer')
    config.only('add_cross_attention', False, 'decoders with a context are read from T5 only')
    config.skip(*SUMMARY)
    config.skip('reorder_and_upcast_attn', 'n_ctx')
    scale = (dim // heads) ** -0.5 if config.get('scale_attn_weights', True) else 1.0
    by_layer = config.get('scale_attn_by_inverse_layer_idx', False)
    scales = {'attn_scale': [scale / (layer + 1) for layer in range(depth)]} if by_layer else {'attn_scale': scale}
    tied = bool(config.get('tie_word_embeddings', True))
    head: Plain = {'return_only_embed': True} if headless(config.architecture) else {'tie_embedding': True} if tied else {}
    stack = layer_normed(
        config, 'Decoder', dim=dim, depth=depth, heads=heads, inner=config.get('n_inner', 4 * dim),
        act=('activation_function', 'gelu_new'), eps=config.get('layer_norm_epsilon', 1e-5),
        **({} if scales == {'attn_scale': (dim // heads) ** -0.5} else scales),
    )  # fmt: skip
    sizes = {'num_tokens': config.need('vocab_size'), 'max_seq_len': config.need('n_positions')}
    return {'class': 'TransformerWrapper', **sizes, **head, 'attn_layers': stack}


def gpt2_rules(config: Config, model: Plain) -> list[KeyRule]:
    stack, theirs = model['attn_layers'], 'transformer.h.{i}'
    attention, forward = 'attn_layers.layers.{a}', 'attn_layers.layers.{f}'
    projections = tuple(f'{attention}.1.to_{name}' for name in 'qkv')
    rules = [
        rule('transformer.wte.weight', 'token_emb.emb.weight'),
        # ours are multiplied by dim ** -0.5
        rule('transformer.wpe.weight', 'pos_emb.emb.weight', scaled(stack['dim'] ** 0.5)),
        *layer_norm_rules(f'{theirs}.ln_1', f'{attention}.0.0'),
        *layer_norm_rules(f'{theirs}.ln_2', f'{forward}.0.0'),
        *layer_norm_rules('transformer.ln_f', 'attn_layers.final_norm'),
        rule(
            f'{theirs}.attn.c_attn.weight', tuple(f'{name}.weight' for name in projections), chain(split(3, dim=1), TRANSPOSED)
        ),
        rule(f'{theirs}.attn.c_attn.bias', tuple(f'{name}.bias' for name in projections), split(3)),
    ]
    linears = {
        f'{theirs}.attn.c_proj': f'{attention}.1.to_out',
        f'{theirs}.mlp.c_fc': f'{forward}.1.ff.0.0',
        f'{theirs}.mlp.c_proj': f'{forward}.1.ff.2',
    }
    for name, ours in linears.items():
        rules += [rule(f'{name}.weight', f'{ours}.weight', TRANSPOSED), rule(f'{name}.bias', f'{ours}.bias')]
    return for_layers([*rules, *logits_rules(model)], stack['depth'])


def gpt2_config(model: Plain) -> Plain:
    """For a model that was made here."""
    stack = model['attn_layers']
    return {
        'architectures': ['GPT2LMHeadModel'],
        'model_type': 'gpt2',
        'vocab_size': model['num_tokens'],
        'n_positions': model['max_seq_len'],
        'n_embd': stack['dim'],
        'n_layer': stack['depth'],
        'n_head': stack.get('heads', 8),
        'n_inner': stack.get('ff_dim_inner'),
        'activation_function': activation_named(stack),
        'layer_norm_epsilon': stack.get('norm_eps'),
        'tie_word_embeddings': model.get('tie_embedding', False),
        # ids that the families are used to, and this model may not have
        'bos_token_id': None,
        'eos_token_id': None,
    }


GPT2 = Family(
    ('gpt2',),
    gpt2,
    gpt2_rules,
    prefix='transformer.',
    unused=r'(transformer\.)?h\.\d+\.attn\.(masked_)?bias',
    config_of=gpt2_config,
)
