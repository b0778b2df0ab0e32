"""Presets: named sets of flags, as in known models or as measured in docs/recipes.md.

A preset says nothing of sizes. It decides every flag that any preset decides, so that one can stand in the place of another.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Any

from x_transformers.flags.base import FlagError, default_of
from x_transformers.flags.parts import PARTS, first_prefix
from x_transformers.flags.stack import StackFlags
from x_transformers.flags.wrapper import WrapperFlags


@dataclasses.dataclass(frozen=True)
class Preset:
    says: str
    flags: Mapping[str, Any]


LLAMA = {'rotary_pos_emb': True, 'use_rmsnorm': True, 'ff_glu': True, 'ff_swish': True, 'ff_no_bias': True}

PRESETS: dict[str, Preset] = {
    'quickstart': Preset(
        'the default of `train`, which is llama with one key head, a narrower feed-forward, branches initialized at zero',
        {**LLAMA, 'attn_kv_heads': 1, 'ff_mult': 3.0, 'zero_init_branch_output': True},
    ),
    'gpt2': Preset(
        'learned positions, layer norms and projections with biases, GELU, tied embedding',
        {
            'norm_bias': True,
            'attn_qkv_bias': True,
            'attn_out_bias': True,
            'ff_custom_activation': 'gelu_tanh',
            'tie_embedding': True,
        },
    ),
    'llama': Preset('rotary positions, RMS norms, SwiGLU, no biases', LLAMA),
    'modern': Preset(
        'llama, normalized queries and keys, branches initialized at zero',
        {**LLAMA, 'attn_qk_norm': True, 'zero_init_branch_output': True},
    ),
    'small-lm': Preset(
        'llama, shifted tokens, a value residual, branches initialized at zero',
        {**LLAMA, 'shift_tokens': 1, 'add_value_residual': True, 'zero_init_branch_output': True},
    ),
    'small-cache': Preset(
        'llama with one key head and a window of 64',
        {**LLAMA, 'attn_kv_heads': 1, 'attn_max_attend_past': 64},
    ),
    'long-context': Preset('llama with a window of 64', {**LLAMA, 'attn_max_attend_past': 64}),
    'recall': Preset('llama, shifted tokens', {**LLAMA, 'shift_tokens': 1}),
    'classifier': Preset('the mean of all tokens, for an encoder; no language model', {'average_pool_embed': True}),
    'hf-llama': Preset(
        'llama exactly as published, in the form that `hf export` writes',
        {**LLAMA, 'rotary_whole_head': True, 'norm_add_unit_offset': False, 'norm_eps': 1e-5, 'ff_glu_bias': False},
    ),
}


def preset(name: str) -> dict[str, Any]:
    """Every flag that presets decide, with its value in this one.

    Errors: ``FlagError`` for a preset that does not exist.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(str(name), PRESETS, n=1)
        hint = f' Did you mean {near[0]}?' if near else ''
        raise FlagError(f'preset must be one of {", ".join(PRESETS)}, got {name!r}.{hint}')
    return {**without_presets(), **PRESETS[name].flags}


@cache
def without_presets() -> dict[str, Any]:
    """The constructors' own defaults of the flags that presets decide."""
    return {name: default_of_flag(name) for name in dict.fromkeys(flag for preset in PRESETS.values() for flag in preset.flags)}


def default_of_flag(name: str) -> Any:
    """The default of a keyword of ``TransformerWrapper`` or ``Decoder``."""
    for flags in (WrapperFlags, StackFlags):
        if name in flags.flag_fields():
            return default_of(flags.flag_fields()[name])
    part = first_prefix(name) or ''
    return default_of(PARTS[part].flag_fields()[name.removeprefix(part)])


def with_preset(flags: Mapping[str, Any]) -> dict[str, Any]:
    """``flags`` with what the preset that they may name decides; what stands beside it is kept."""
    own = dict(flags)
    name = own.pop('preset', None)
    return own if name is None else {**preset(name), **own}


def without_usual(flags: Mapping[str, Any]) -> dict[str, Any]:
    """``flags`` without those at their defaults that presets decide: a new preset must change nothing for the others."""
    usual = without_presets()
    return {name: value for name, value in flags.items() if name not in usual or value != usual[name]}


def preset_sentences(
    error: FlagError, name: str, own: Collection[str], way: Callable[[str, Any], str] | None = None
) -> list[str]:
    """Which of the flags that the error names are those of the preset, as nobody gave them: one sentence each.

    ``own``: the names of those that somebody gave. ``way`` says of a flag and its value what changes it.
    """
    text, way = ' '.join(error.sentences), way or option_against
    values = {flag: value for flag, value in PRESETS[name].flags.items() if f'`{flag}' in text and flag not in own}
    return [f'`{flag}={value!r}`: the default of the preset {name}; {way(flag, value)}.' for flag, value in values.items()]


def option_against(flag: str, value: Any) -> str:
    """What to type against a flag."""
    option = flag.replace('_', '-')
    return f'add `--no-{option}`' if value is True else f'`--{option}` changes it'


def word_against(flag: str, value: Any) -> str:
    """What to write against a flag where flags are words, as in --base and --idea."""
    return f'add `{flag}=false`' if value is True else f'`{flag}=...` changes it'


def help_text() -> str:
    """Every preset with its sentence."""
    return '; '.join(f'{name}: {preset.says}' for name, preset in PRESETS.items())
