"""Granite: a Llama with constant factors on embeddings, scores, branches and logits."""

from __future__ import annotations

from x_transformers.hf.family import Config, Family, Plain, activation
from x_transformers.hf.llama import UNUSED, biases, decoder, llama_rules


def granite(config: Config) -> Plain:
    branches = float(config.get('residual_multiplier', 1.0))
    embeddings, divisor = float(config.get('embedding_multiplier', 1.0)), float(config.get('logits_scaling', 1.0))
    if divisor == 0.0:
        config.wrong.append('`logits_scaling` is 0, and logits are divided by it')
    model = decoder(
        config,
        **activation(config, 'hidden_act', 'silu'),
        **biases(config),
        **({} if branches == 1.0 else {'scale_residual': branches}),
        attn_scale=float(config.get('attention_multiplier', 1.0)),
    )
    if embeddings != 1.0:
        model['embed_scale'] = embeddings
    if divisor not in (0.0, 1.0) and 'return_only_embed' not in model:
        model['logits_scale'] = 1.0 / divisor
    return model


GRANITE = Family(('granite',), granite, llama_rules, prefix='model.', unused=UNUSED)
