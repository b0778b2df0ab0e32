"""SmolLM3: a Llama in which some of the layers read no positions."""

from __future__ import annotations

from x_transformers.hf.family import Config, Family, Plain, activation, one_or_each
from x_transformers.hf.llama import UNUSED, biases, decoder, llama_rules, windows_if_used


def smollm3(config: Config) -> Plain:
    config.values.setdefault('no_rope_layer_interval', 4)
    depth, period = config.need('num_hidden_layers'), config.need('no_rope_layer_interval')
    turns = list(config.get('no_rope_layers', [int((layer + 1) % period != 0) for layer in range(depth)]))[:depth]
    if len(turns) < depth:
        config.wrong.append(f'`no_rope_layers` must hold a number for each of the {depth} layers, got {len(turns)}')
    if not any(turns):
        config.wrong.append('`no_rope_layers` is 0 in every layer: this family is read with positions in some of them')
    config.values.setdefault('rope_theta', 2e6)
    config.values.setdefault('tie_word_embeddings', True)
    config.skip('sliding_window', 'layer_types')
    # windows are usual where there are no positions
    usual = ['full_attention' if turn else 'sliding_attention' for turn in turns]
    still = one_or_each([None if turn else 0 for turn in turns])
    return decoder(
        config,
        **activation(config, 'hidden_act', 'silu'),
        **biases(config),
        **windows_if_used(config, usual),
        **({} if still is None else {'rotate_num_heads': still}),
    )


SMOLLM3 = Family(('smollm3',), smollm3, llama_rules, prefix='model.', unused=UNUSED)
