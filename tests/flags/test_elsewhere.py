"""Names from other libraries are answered with what is written here."""

from __future__ import annotations

import pytest
import torch

from x_transformers import Attention, AutoregressiveWrapper, Decoder, TransformerWrapper
from x_transformers.flags.base import UnknownFlag
from x_transformers.flags.elsewhere import OF_LAYERS, OF_MODELS, OWNERS, SAID_OTHERWISE, answer
from x_transformers.flags.parts import PARTS, keyword_names
from x_transformers.flags.stack import StackFlags
from x_transformers.flags.wrapper import WrapperFlags


def test_every_answer_names_a_keyword_that_exists():
    stack = {*StackFlags.flag_fields(), *(name for part in PARTS for name in keyword_names(part))}
    assert not set(OF_LAYERS.values()) - stack
    assert not set(OF_MODELS.values()) - set(WrapperFlags.flag_fields())
    assert not set(OF_LAYERS) & set(OF_MODELS)


def test_no_name_that_exists_is_answered():
    known = {*StackFlags.flag_fields(), *WrapperFlags.flag_fields(), *(n for part in PARTS for n in keyword_names(part))}
    assert not known & (set(OWNERS) | set(SAID_OTHERWISE))


@pytest.mark.parametrize(
    ('make', 'sentence'),
    [
        (lambda: Decoder(dim=32, depth=1, hidden_size=32), '`hidden_size`; here it is `dim`.'),
        (lambda: Decoder(dim=32, depth=1, num_key_value_heads=1), 'here it is `attn_kv_heads`.'),
        (lambda: Attention(dim=32, num_kv_heads=1), 'here it is `kv_heads`.'),
        (lambda: Decoder(dim=32, depth=1, vocab_size=8), 'here it is `num_tokens` of TransformerWrapper.'),
        (lambda: Decoder(dim=32, depth=1, swiglu=True), 'write `ff_glu=True, ff_swish=True`.'),
        (lambda: Decoder(dim=32, depth=1, ff_gul=True), 'did you mean `ff_glu`?'),
    ],
)
def test_a_constructor_answers(make, sentence):
    with pytest.raises(UnknownFlag) as error:
        make()
    assert sentence in str(error.value)


@pytest.mark.parametrize('name', ['top_k', 'top_p', 'do_sample', 'max_new_tokens', 'max_length', 'attention_mask', 'labels'])
def test_a_call_answers(name):
    model = AutoregressiveWrapper(
        TransformerWrapper(num_tokens=8, max_seq_len=8, attn_layers=Decoder(dim=16, depth=1, heads=2))
    )
    ids = torch.zeros(1, 2, dtype=torch.long)
    with pytest.raises(TypeError) as error:
        model.generate(ids, 2, **{name: 1})
    assert SAID_OTHERWISE[name] in str(error.value)


def test_what_is_written_instead_runs():
    model = AutoregressiveWrapper(
        TransformerWrapper(num_tokens=8, max_seq_len=8, attn_layers=Decoder(dim=16, depth=1, heads=2))
    )
    ids = torch.zeros(1, 2, dtype=torch.long)
    for name, given in (('top_k', {'k': 5}), ('top_p', {'thres': 0.9}), ('min_p', {'min_p': 0.05})):
        assert f"filter_logits_fn='{name}', filter_kwargs={given}" in SAID_OTHERWISE[name]
        assert model.generate(ids, 2, filter_logits_fn=name, filter_kwargs=given).shape == (1, 2)
    assert model.beam_search(ids, 2, beams=2).shape == (1, 2)


def test_an_unknown_name_has_no_answer():
    assert answer('nonsense', {'dim'}) is None
