"""BERT, RoBERTa, XLM-RoBERTa and DistilBERT.

Ids of segments are passed as ``token_emb_kwargs={'token_type_ids': ids}``; poolers are omitted. RoBERTa counts positions behind
the id of its padding, so the first vectors of its table belong to no token and are omitted, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
from x_transformers.hf.llama import ATTENTION, FORWARD
from x_transformers.hf.maps import Map, behind, scaled


def bert(config: Config) -> Plain:
    return typed_encoder(config, head_for_words(config, ('ForMaskedLM', 'ForPreTraining'), ('hidden_act', 'gelu')))


def roberta(config: Config) -> Plain:
    model = typed_encoder(config, head_for_words(config, ('ForMaskedLM',), None))
    places, unused = config.need('max_position_embeddings'), unused_places(config)
    if places <= unused:
        config.wrong.append(f'`max_position_embeddings` must be above `pad_token_id` + 1, {unused}, got {places}')
    return {**model, 'max_seq_len': places - unused}


def unused_places(config: Config) -> int:
    """How many vectors of positions come before that of the first token."""
    return int(config.get('pad_token_id', 1)) + 1


def typed_encoder(config: Config, head: Plain) -> Plain:
    dim, heads, tokens = config.need('hidden_size'), config.need('num_attention_heads'), config.need('vocab_size')
    config.only('is_decoder', False, 'this family is read as an encoder')
    config.only('add_cross_attention', False, 'this family is read as an encoder')
    config.only('position_embedding_type', 'absolute', 'relative positions of keys are not there')
    stack = layer_normed(
        config, 'Encoder', dim=dim, depth=config.need('num_hidden_layers'), heads=heads,
        inner=config.need('intermediate_size'), act=('hidden_act', 'gelu'), eps=config.get('layer_norm_eps', 1e-12),
        pre_norm=False,
    )  # fmt: skip
    types = config.get('type_vocab_size', 2)
    return {
        'class': 'TransformerWrapper',
        'num_tokens': tokens,
        'max_seq_len': config.need('max_position_embeddings'),
        'token_emb': {'class': 'TypedTokenEmbedding', 'dim': dim, 'num_tokens': tokens, 'num_types': types},
        'post_emb_norm': True,
        **head,
        'attn_layers': stack,
    }


def distilbert(config: Config) -> Plain:
    dim = config.need('dim')
    # what the table of positions has started from
    config.skip('sinusoidal_pos_embds')
    stack = layer_normed(
        config, 'Encoder', dim=dim, depth=config.need('n_layers'), heads=config.need('n_heads'),
        inner=config.need('hidden_dim'), act=('activation', 'gelu'), eps=1e-12, pre_norm=False,
    )  # fmt: skip
    return {
        'class': 'TransformerWrapper',
        'num_tokens': config.need('vocab_size'),
        'max_seq_len': config.need('max_position_embeddings'),
        'post_emb_norm': True,
        **head_for_words(config, ('ForMaskedLM',), ('activation', 'gelu')),
        'attn_layers': stack,
    }


def head_for_words(config: Config, ends: Sequence[str], act: tuple[str, str] | None) -> Plain:
    """``ends``: how the architectures with a head for masked words end; ``act``: the key of its activation and the usual one,
    None: it is GELU."""
    tied = config.get('tie_word_embeddings', True)
    if headless(config.architecture):
        return {'return_only_embed': True}
    check_head(config, *ends)
    name = 'gelu' if act is None else config.get(*act)
    if name not in NAMES_OF_ACTIVATIONS:
        config.wrong.append(f'`{act and act[0]}` is {name!r}: the head has {", ".join(NAMES_OF_ACTIVATIONS)}')
    head = {'logits_bias': True, 'logits_transform': NAMES_OF_ACTIVATIONS.get(name)}
    return {**({'tie_embedding': True} if tied else {}), **head}


# ---------------------------------------------------------------- weights


@dataclass(frozen=True)
class TheirNames:
    """What the families call the parts. ``projections``: of queries, keys, values and outputs; ``norms``: behind attention and
    behind the feed-forward; ``head``: its map, norm and the map to logits; ``biases``: the names of the bias of logits, of
    which the first counts, where the head is tied and where it is not."""

    base: str
    layer: str
    projections: tuple[str, ...]
    forward: tuple[str, str]
    norms: tuple[str, str]
    head: tuple[str, str, str]
    biases: tuple[tuple[str, ...], tuple[str, ...]]


def encoder_rules(names: TheirNames, model: Plain, unused: int = 0) -> list[KeyRule]:
    """``unused``: the number of vectors of positions in front that belong to no token."""
    stack, embeddings, theirs = model['attn_layers'], f'{names.base}.embeddings', f'{names.base}.{names.layer}.{{i}}'
    # ours are multiplied by dim ** -0.5
    places = behind(unused).then(scaled(stack['dim'] ** 0.5))
    rules = [
        rule(f'{embeddings}.word_embeddings.weight', 'token_emb.emb.weight'),
        rule(f'{embeddings}.position_embeddings.weight', 'pos_emb.emb.weight', places),
        *layer_norm_rules(f'{embeddings}.LayerNorm', 'post_emb_norm'),
    ]
    if 'token_emb' in model:
        rules.append(rule(f'{embeddings}.token_type_embeddings.weight', 'token_emb.types.weight'))
    for name, ours in zip(names.projections, ('to_q', 'to_k', 'to_v', 'to_out'), strict=True):
        rules += weight_and_bias(f'{theirs}.{name}', f'{ATTENTION}.1.{ours}')
    for name, ours in zip(names.forward, ('0.0', '2'), strict=True):
        rules += weight_and_bias(f'{theirs}.{name}', f'{FORWARD}.1.ff.{ours}')
    for name, ours in zip(names.norms, (ATTENTION, FORWARD), strict=True):
        rules += layer_norm_rules(f'{theirs}.{name}', f'{ours}.0.2')
    return [*for_layers(rules, stack['depth']), *head_rules(names, model)]


def head_rules(names: TheirNames, model: Plain) -> list[KeyRule]:
    if 'logits_transform' not in model:
        return []
    dense, norm, logits = names.head
    rules = [*weight_and_bias(dense, 'logits_transform.0'), *layer_norm_rules(norm, 'logits_transform.2')]
    tied = bool(model.get('tie_embedding'))
    biases = names.biases[0 if tied else 1]
    # the other is there, but counts only where it is tied to the first
    one = Map(lambda t: t[:1], lambda t: t[:1] * len(biases))
    rules.append(rule(biases, 'to_logits.bias', one))
    return rules if tied else [*rules, rule(f'{logits}.weight', 'to_logits.weight')]


LAYER: dict[str, Any] = {
    'layer': 'encoder.layer',
    'projections': ('attention.self.query', 'attention.self.key', 'attention.self.value', 'attention.output.dense'),
    'forward': ('intermediate.dense', 'output.dense'),
    'norms': ('attention.output.LayerNorm', 'output.LayerNorm'),
}
BERT_NAMES = TheirNames(
    'bert', **LAYER,
    head=('cls.predictions.transform.dense', 'cls.predictions.transform.LayerNorm', 'cls.predictions.decoder'),
    biases=(('cls.predictions.bias',), ('cls.predictions.decoder.bias', 'cls.predictions.bias')),
)  # fmt: skip
ROBERTA_NAMES = TheirNames(
    'roberta', **LAYER, head=('lm_head.dense', 'lm_head.layer_norm', 'lm_head.decoder'),
    biases=(('lm_head.bias',), ('lm_head.decoder.bias', 'lm_head.bias')),
)  # fmt: skip
DISTILBERT_NAMES = TheirNames(
    'distilbert', 'transformer.layer', projections=tuple(f'attention.{name}_lin' for name in ('q', 'k', 'v', 'out')),
    forward=('ffn.lin1', 'ffn.lin2'), norms=('sa_layer_norm', 'output_layer_norm'),
    head=('vocab_transform', 'vocab_layer_norm', 'vocab_projector'),
    biases=(('vocab_projector.bias',), ('vocab_projector.bias',)),
)  # fmt: skip

UNUSED = r'(bert\.|roberta\.)?pooler\..*|.*position_ids|cls\.predictions\.decoder\.(bias|weight)|cls\.seq_relationship\..*'
BERT = Family(('bert',), bert, lambda config, model: encoder_rules(BERT_NAMES, model), prefix='bert.', unused=UNUSED)
ROBERTA = Family(
    ('roberta', 'xlm-roberta'),
    roberta,
    lambda config, model: encoder_rules(ROBERTA_NAMES, model, unused_places(config)),
    prefix='roberta.',
    unused=rf'{UNUSED}|lm_head\.decoder\.(bias|weight)',
)
DISTILBERT = Family(
    ('distilbert',),
    distilbert,
    lambda config, model: encoder_rules(DISTILBERT_NAMES, model),
    prefix='distilbert.',
    unused=r'vocab_projector\.weight',
)
