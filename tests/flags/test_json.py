"""Flags as JSON, and stacks made of flags."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from torch import nn

from tests.laws.combination import Combination, rotated
from x_transformers import (
    CrossAttender,
    Decoder,
    Encoder,
    PrefixDecoder,
    TransformerWrapper,
    ViTransformerWrapper,
    per_layer,
)
from x_transformers.flags.base import FlagError, Flags, MissingFlag, UnknownFlag
from x_transformers.flags.plain import PerLayer
from x_transformers.flags.stack import StackFlags
from x_transformers.flags.vision import VisionFlags
from x_transformers.flags.wrapper import WrapperFlags
from x_transformers.layers.stack import AttentionLayers, TransformerBlock

SMALL: dict[str, Any] = {'dim': 16, 'depth': 2, 'heads': 2, 'attn_dim_head': 8, 'verbose': False}


def shapes(model: nn.Module) -> dict[str, Any]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def told(flags: StackFlags) -> dict[str, Any]:
    """All fields; lists inside of dictionaries become tuples on the way."""

    def tuples(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: tuples(entry) for name, entry in value.items()}
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    return {field.name: tuples(getattr(flags, field.name)) for field in dataclasses.fields(flags)}


def holds_code(flags: Flags) -> bool:
    """Whether the flags have a function or a module among their values, at any depth."""

    def code(value: Any) -> bool:
        if isinstance(value, dict):
            return any(map(code, value.values()))
        if isinstance(value, (tuple, list)):
            return any(map(code, value))
        return any(map(code, value.values)) if isinstance(value, PerLayer) else callable(value)

    return any(map(code, flags.keywords().values()))


@pytest.mark.filterwarnings('ignore::x_transformers.InertFlagWarning')
@pytest.mark.parametrize('case', rotated(), ids=str)
def test_every_flag_to_json_and_back(case: Combination) -> None:
    stack: Any = case.fresh().attn_layers
    if holds_code(stack.flags):
        with pytest.raises(FlagError, match='must be plain data'):
            stack.flags.to_json()
        read = stack.flags
    else:
        read = StackFlags.from_json(stack.flags.to_json())
        assert told(read) == told(stack.flags)
    made = type(stack).from_flags(read)
    assert told(made.flags) == told(stack.flags)
    assert made.plan == stack.plan
    assert shapes(made) == shapes(stack)


STACKS = {
    'layers': lambda: AttentionLayers(16, 2, 4),
    'causal layers': lambda: AttentionLayers(**SMALL, causal=True),
    'encoder': lambda: Encoder(**SMALL, ff_mult=(2, 3)),
    'decoder': lambda: Decoder(
        **{**SMALL, 'heads': (2, 1)}, attn_max_attend_past=(4, 8), ff_mult=lambda layer: 1 + layer, rotary_pos_emb=True,
        rotary_theta=per_layer((1e4, 1e6)),
    ),
    'depths': lambda: Decoder(**SMALL, depth_scale_residual=True),
    'prefix': lambda: PrefixDecoder(**SMALL, cross_attend=True, attn_flash=True),
    'crosser': lambda: CrossAttender(**SMALL, cross_attn_dim_context=12),
    'block': lambda: TransformerBlock(16, heads=2),
    'blocks': lambda: TransformerBlock(16, depth=2, pre_norm_has_final_norm=True, heads=2),
}  # fmt: skip


@pytest.mark.parametrize('name', STACKS)
def test_stacks_of_flags_are_those_of_keywords(name: str) -> None:
    stack = STACKS[name]()
    made = type(stack).from_flags(StackFlags.from_json(stack.flags.to_json()))
    assert type(made) is type(stack)
    assert made.flags == stack.flags
    assert shapes(made) == shapes(stack)
    assert (made.layer_types, made.is_causal) == (stack.layer_types, stack.is_causal)
    # what was made of flags is saved as what was made of keywords
    assert type(stack).from_flags(made.flags).flags == stack.flags


def test_a_class_and_flags_that_say_otherwise() -> None:
    with pytest.raises(
        FlagError, match=r'flags must have causal=False for Encoder, got True\. Use AttentionLayers\.from_flags\.'
    ):
        Encoder.from_flags(Decoder(**SMALL).flags)
    assert AttentionLayers.from_flags(Decoder(**SMALL).flags).causal


def test_flags_of_wrappers_are_given_their_stack() -> None:
    stack = Encoder(**SMALL)
    model = ViTransformerWrapper(image_size=(16, 8), patch_size=4, attn_layers=stack, use_cls_token=True)
    held = model.flags.to_json()
    assert json.loads(held) == {'image_size': [16, 8], 'patch_size': 4, 'use_cls_token': True}
    read = VisionFlags.from_json(held, attn_layers=model.flags.attn_layers)
    assert read == model.flags
    with pytest.raises(MissingFlag, match='VisionFlags needs `attn_layers`'):
        VisionFlags.from_json(held)
    wrapper = TransformerWrapper(num_tokens=9, max_seq_len=8, attn_layers=Decoder(**SMALL), tie_embedding=True)
    assert json.loads(wrapper.flags.to_json()) == {'num_tokens': 9, 'max_seq_len': 8, 'tie_embedding': True}
    assert WrapperFlags.from_json(wrapper.flags.to_json(), attn_layers=wrapper.flags.attn_layers) == wrapper.flags


def test_what_is_no_json_of_flags() -> None:
    for text, words in (
        ('{"dim": 16, "depth": 2, "atn_flash": true}', 'there is no flag `atn_flash`; did you mean `attn_flash`'),
        ('{"dim": 16, "depth": "two"}', '`depth` must be a whole number'),
        ('[1]', 'must be a JSON object of keywords, got a list'),
        ('{"dim": ', 'must be a JSON object of keywords, but cannot be read'),
    ):
        with pytest.raises(FlagError, match=words):
            StackFlags.from_json(text)
    with pytest.raises(UnknownFlag):
        StackFlags.from_json('{"dim": 16, "depth": 2, "atn_flash": true}')
    assert StackFlags.from_json('{"dim": 16, "depth": 2}', depth=3).depth == 3
