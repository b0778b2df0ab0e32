"""Transformers in which each published idea is a flag. Public names are loaded when they are first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from x_transformers.attention.attention import Attention as Attention
    from x_transformers.autoregressive_wrapper import AutoregressiveWrapper as AutoregressiveWrapper
    from x_transformers.belief_state_wrapper import BeliefStateWrapper as BeliefStateWrapper
    from x_transformers.block_diffusion import BlockDiffusionWrapper as BlockDiffusionWrapper
    from x_transformers.continuous import ContinuousAutoregressiveWrapper as ContinuousAutoregressiveWrapper
    from x_transformers.continuous import ContinuousTransformerWrapper as ContinuousTransformerWrapper
    from x_transformers.dpo import DPO as DPO
    from x_transformers.embedding.pooling import AttentionPool as AttentionPool
    from x_transformers.encoder_decoder import XTransformer as XTransformer
    from x_transformers.entropy_based_tokenizer import EntropyBasedTokenizer as EntropyBasedTokenizer
    from x_transformers.feedforward import FeedForward as FeedForward
    from x_transformers.flags.per_layer import layer_schedule as layer_schedule
    from x_transformers.flags.per_layer import per_layer as per_layer
    from x_transformers.generation.continuation import Continuation as Continuation
    from x_transformers.helpers import default_device as default_device
    from x_transformers.layers.stack import CrossAttender as CrossAttender
    from x_transformers.layers.stack import Decoder as Decoder
    from x_transformers.layers.stack import Encoder as Encoder
    from x_transformers.layers.stack import PrefixDecoder as PrefixDecoder
    from x_transformers.layers.stack import TransformerBlock as TransformerBlock
    from x_transformers.multi_input import MultiInputTransformerWrapper as MultiInputTransformerWrapper
    from x_transformers.neo_mlp import NeoMLP as NeoMLP
    from x_transformers.next_latent_wrapper import NextLatentWrapper as NextLatentWrapper
    from x_transformers.nonautoregressive_wrapper import NonAutoregressiveWrapper as NonAutoregressiveWrapper
    from x_transformers.norms import AdaptiveRMSNorm as AdaptiveRMSNorm
    from x_transformers.norms import RMSNorm as RMSNorm
    from x_transformers.notices import InertFlagWarning as InertFlagWarning
    from x_transformers.transformer_wrapper import TransformerWrapper as TransformerWrapper
    from x_transformers.vision import ViTransformerWrapper as ViTransformerWrapper
    from x_transformers.xl_autoregressive_wrapper import XLAutoregressiveWrapper as XLAutoregressiveWrapper
    from x_transformers.xval import XValAutoregressiveWrapper as XValAutoregressiveWrapper
    from x_transformers.xval import XValTransformerWrapper as XValTransformerWrapper

# public name: the module that defines it
_HOME = {
    'AdaptiveRMSNorm': 'norms',
    'Attention': 'attention.attention',
    'AttentionPool': 'embedding.pooling',
    'AutoregressiveWrapper': 'autoregressive_wrapper',
    'BeliefStateWrapper': 'belief_state_wrapper',
    'BlockDiffusionWrapper': 'block_diffusion',
    'Continuation': 'generation.continuation',
    'ContinuousAutoregressiveWrapper': 'continuous',
    'ContinuousTransformerWrapper': 'continuous',
    'CrossAttender': 'layers.stack',
    'DPO': 'dpo',
    'Decoder': 'layers.stack',
    'Encoder': 'layers.stack',
    'EntropyBasedTokenizer': 'entropy_based_tokenizer',
    'FeedForward': 'feedforward',
    'InertFlagWarning': 'notices',
    'MultiInputTransformerWrapper': 'multi_input',
    'NeoMLP': 'neo_mlp',
    'NextLatentWrapper': 'next_latent_wrapper',
    'NonAutoregressiveWrapper': 'nonautoregressive_wrapper',
    'PrefixDecoder': 'layers.stack',
    'RMSNorm': 'norms',
    'TransformerBlock': 'layers.stack',
    'TransformerWrapper': 'transformer_wrapper',
    'ViTransformerWrapper': 'vision',
    'XLAutoregressiveWrapper': 'xl_autoregressive_wrapper',
    'XTransformer': 'encoder_decoder',
    'XValAutoregressiveWrapper': 'xval',
    'XValTransformerWrapper': 'xval',
    'default_device': 'helpers',
    'layer_schedule': 'flags.per_layer',
    'per_layer': 'flags.per_layer',
}

# modules that upstream's top level has imported as a side effect, so that `x_transformers.attend` is there without an import
_MODULES = (
    'x_transformers',
    'attend',
    'free_transformer',
    'gpt_vae',
    'up_wrapper',
    *sorted({h for h in _HOME.values() if '.' not in h}),
)

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f'{__name__}.{_HOME[name]}'), name)
    elif name in _MODULES:
        value = import_module(f'{__name__}.{name}')
    else:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_MODULES})
