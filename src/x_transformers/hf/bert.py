"""BERT. Ids of segments are passed as ``token_emb_kwargs={'token_type_ids': ids}``; the pooler is omitted."""

from __future__ import annotations

from x_transformers.hf.family import (
    NAMES_OF_ACTIVATIONS,
    Config,
    Family,
    KeyRule,
    Plain,
    check_head,
    for_layers,
    headless,
    layer_norm_rules,
    layer_normed,
    rule,
    weight_and_bias,
)
from x_transformers.hf.maps import Map, scaled


def bert(config: Config) -> Plain:
    dim, heads, tokens = config.need('hidden_size'), config.need('num_attention_heads'), config.need('vocab_size')
    config.only('is_decoder', False, 'this family is read as an encoder')
    config.only('add_cross_attention', False, 'this family is read as an encoder')
    config.only('position_embedding_type', 'absolute', 'relative positions of keys are not there')
    config.skip('layer_norm_eps')
    act = config.get('hidden_act', 'gelu')
    head: Plain = {'return_only_embed': True}
    if not headless(config.architecture):
        check_head(config, 'ForMaskedLM', 'ForPreTraining')
        if act not in NAMES_OF_ACTIVATIONS:
            config.wrong.append(f'`hidden_act` is {act!r}: the head has {", ".join(NAMES_OF_ACTIVATIONS)}')
        tied = {'tie_embedding': True} if config.get('tie_word_embeddings', True) else {}
        head = {**tied, 'logits_bias': True, 'logits_transform': NAMES_OF_ACTIVATIONS.get(act)}
    config.skip('tie_word_embeddings')
    return {
        'class': 'TransformerWrapper',
        'num_tokens': tokens,
        'max_seq_len': config.need('max_position_embeddings'),
        'token_emb': {
            'class': 'TypedTokenEmbedding', 'dim': dim, 'num_tokens': tokens, 'num_types': config.get('type_vocab_size', 2),
        },
        'post_emb_norm': True,
        **head,
        'attn_layers': layer_normed(
            config, 'Encoder', dim=dim, depth=config.need('num_hidden_layers'), heads=heads,
            inner=config.need('intermediate_size'), act=('hidden_act', 'gelu'), eps=config.get('layer_norm_eps', 1e-12),
            pre_norm=False,
        ),
    }  # fmt: skip


def bert_rules(config: Config, model: Plain) -> list[KeyRule]:
    stack, theirs, embeddings = model['attn_layers'], 'bert.encoder.layer.{i}', 'bert.embeddings'
    attention, forward = 'attn_layers.layers.{a}', 'attn_layers.layers.{f}'
    rules = [
        rule(f'{embeddings}.word_embeddings.weight', 'token_emb.emb.weight'),
        rule(f'{embeddings}.token_type_embeddings.weight', 'token_emb.types.weight'),
        # ours are multiplied by dim ** -0.5
        rule(f'{embeddings}.position_embeddings.weight', 'pos_emb.emb.weight', scaled(stack['dim'] ** 0.5)),
        *layer_norm_rules(f'{embeddings}.LayerNorm', 'post_emb_norm'),
        *weight_and_bias(f'{theirs}.attention.self.query', f'{attention}.1.to_q'),
        *weight_and_bias(f'{theirs}.attention.self.key', f'{attention}.1.to_k'),
        *weight_and_bias(f'{theirs}.attention.self.value', f'{attention}.1.to_v'),
        *weight_and_bias(f'{theirs}.attention.output.dense', f'{attention}.1.to_out'),
        *layer_norm_rules(f'{theirs}.attention.output.LayerNorm', f'{attention}.0.2'),
        *weight_and_bias(f'{theirs}.intermediate.dense', f'{forward}.1.ff.0.0'),
        *weight_and_bias(f'{theirs}.output.dense', f'{forward}.1.ff.2'),
        *layer_norm_rules(f'{theirs}.output.LayerNorm', f'{forward}.0.2'),
    ]
    if 'logits_transform' in model:
        head = 'cls.predictions'
        rules += [
            *weight_and_bias(f'{head}.transform.dense', 'logits_transform.0'),
            *layer_norm_rules(f'{head}.transform.LayerNorm', 'logits_transform.2'),
        ]
        if model.get('tie_embedding'):
            rules.append(rule(f'{head}.bias', 'to_logits.bias'))
        else:
            # the second bias is there, but counts only where it is tied to the first
            biases = Map(lambda t: t[:1], lambda t: (t[0], t[0]))
            rules.append(rule((f'{head}.decoder.bias', f'{head}.bias'), 'to_logits.bias', biases))
            rules.append(rule(f'{head}.decoder.weight', 'to_logits.weight'))
    return for_layers(rules, stack['depth'])


UNUSED = r'(bert\.)?pooler\..*|.*position_ids|cls\.predictions\.decoder\.(bias|weight)|cls\.seq_relationship\..*'
BERT = Family(('bert',), bert, bert_rules, prefix='bert.', unused=UNUSED)
