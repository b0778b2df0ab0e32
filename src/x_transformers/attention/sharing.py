"""Attention that reuses the keys and values of an earlier layer, https://arxiv.org/abs/2405.12981.

Such a layer has no projection of keys and values, and its cache holds neither. Learned memory keys are its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from x_transformers.attention import latent, project
from x_transformers.attention.inputs import BranchInputs, HandedKeys
from x_transformers.attention.parts import AttentionParts, Seen
from x_transformers.attention.project import KeysValues


def without_own_keys(parts: dict[str, Any]) -> dict[str, Any]:
    """The parts of an attention without those that make keys and values."""
    parts = parts | dict.fromkeys(('to_latent_kv', 'to_rotateable_k', 'to_k', 'to_v', 'to_value_residual_mix'))
    parts['k_rmsnorm'] = parts['value_rmsnorm'] = None
    if parts['mem_k'] is None:
        parts['qk_norm_k_scale'] = None
    if parts['convolutions'] is not None:
        del parts['convolutions']['k'], parts['convolutions']['v']
    return parts


def key_source(attn: AttentionParts) -> Callable[[AttentionParts, Seen, BranchInputs], KeysValues]:
    """What makes the keys and values of a layer."""
    if attn.shares_keys:
        return shared_keys_values
    return project.keys_values if attn.to_latent_kv is None else latent.latent_keys_values


def keys_handed(inputs: BranchInputs) -> HandedKeys:
    """The keys and values of the earlier layer. Raises ValueError if it has not run."""
    if inputs.shared is None:
        raise ValueError('shared must hold the keys of the earlier layer, got None. Run the layers in their order.')
    return inputs.shared


def shared_keys_values(attn: AttentionParts, seen: Seen, inputs: BranchInputs) -> KeysValues:
    """Normed and with their positions, as the earlier layer made them."""
    handed = keys_handed(inputs)
    return KeysValues(handed.keys, handed.values, handed.own)
