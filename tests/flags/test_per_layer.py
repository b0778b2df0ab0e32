"""Keywords with a value for each layer: what they mean, what is refused, and what is built of them."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from tests.laws.combination import shaken
from x_transformers import Decoder, Encoder, TransformerWrapper, layer_schedule, per_layer
from x_transformers.flags.base import FlagError
from x_transformers.flags.rules import check_stack
from x_transformers.flags.stack import StackFlags
from x_transformers.flags.stack_rules import SAME_IN_ALL_LAYERS

SMALL = {'dim': 16, 'depth': 4, 'heads': 4, 'attn_dim_head': 8, 'verbose': False}


def parse(**flags):
    return StackFlags.parse(SMALL | flags, where='Decoder')


def values(stack, kind, name):
    return [getattr(layer.inside.flags, name) for layer, its in zip(stack.layers, stack.plan.kinds, strict=True) if its == kind]


# ---------------------------------------------------------------- what is meant


def test_a_tuple_holds_one_value_for_each_layer_of_the_kind():
    stack = Decoder(
        **SMALL, attn_max_attend_past=(1, 2, 3, 4), ff_mult=(4, 3, 2, 1), cross_attend=True, cross_attn_kv_heads=(1, 2, 4, 4)
    )
    assert values(stack, 'a', 'max_attend_past') == [1, 2, 3, 4]
    assert values(stack, 'f', 'mult') == [4, 3, 2, 1]
    assert values(stack, 'c', 'kv_heads') == [1, 2, 4, 4]


def test_a_shorter_tuple_repeats_and_is_cut_at_the_depth():
    stack = Decoder(**SMALL | {'depth': 5}, attn_max_attend_past=(128, None))
    assert values(stack, 'a', 'max_attend_past') == [128, None, 128, None, 128]


def test_a_function_is_asked_with_the_index_of_the_layer_among_its_kind():
    stack = Decoder(**SMALL, macaron=True, attn_qk_norm=lambda layer: layer >= 2, ff_mult=lambda layer: 1 + layer)
    assert values(stack, 'a', 'qk_norm') == [False, False, True, True]
    assert values(stack, 'f', 'mult') == [1, 2, 3, 4, 5, 6, 7, 8]


def test_flags_that_are_tuples_or_functions_themselves_take_per_layer_only():
    plain = Decoder(**SMALL, ff_custom_activation=torch.tanh, attn_custom_attn_fn=torch.sigmoid)
    assert values(plain, 'f', 'custom_activation') == [torch.tanh] * 4
    assert values(plain, 'a', 'custom_attn_fn') == [torch.sigmoid] * 4
    mixed = Decoder(
        **SMALL, ff_custom_activation=per_layer((torch.tanh, None)), attn_custom_attn_fn=per_layer(lambda layer: None)
    )
    assert values(mixed, 'f', 'custom_activation') == [torch.tanh, None, torch.tanh, None]
    assert values(mixed, 'a', 'custom_attn_fn') == [None] * 4


def test_flags_of_the_stack_may_differ_where_they_are_about_single_layers():
    stack = Decoder(
        **SMALL | {'heads': (4, 2)}, layer_dropout=per_layer((0.1, 0.2)), shift_tokens=per_layer(lambda layer: layer % 2)
    )
    assert values(stack, 'a', 'heads') == [4, 2, 4, 2]
    assert stack.layer_dropouts == [0.1, 0.2] * 4
    assert [spec.shift for spec in stack.plan.layers] == [0, 1] * 4
    stack = Decoder(**SMALL, scale_residual_constant=lambda layer: 1 / (1 + layer))
    assert [layer.residual.scale_residual_constant for layer in stack.layers] == [1 / (1 + layer) for layer in range(8)]


def test_cross_attention_takes_over_only_what_is_the_same_in_all_layers():
    flags = parse(cross_attend=True, attn_dim_head=(8, 4), attn_num_mem_kv=2)
    assert [cross.dim_head for cross in flags.cross_attentions] == [64] * 4
    assert flags.cross_attentions[0].num_mem_kv == 2
    assert [own.dim_head for own in flags.attentions] == [8, 4, 8, 4]


def test_every_layer_has_flags_of_its_own():
    flags = parse(attn_kv_heads=(1, 4), ff_glu=(True, False))
    assert flags.varying == {'attn_kv_heads': (1, 4, 1, 4), 'ff_glu': (True, False, True, False)}
    assert flags.is_changed('attn_kv_heads')
    assert 'attn_kv_heads=(1, 4, 1, 4)' in repr(flags)
    assert [flags.layer(index).attention.kv_heads for index in (0, 2, 4, 6)] == [1, 4, 1, 4]
    assert [flags.layer(index).feedforward.glu for index in (1, 3, 5, 7)] == [True, False, True, False]
    assert flags.varying_at(3) == {'ff_glu': False}
    for twin in (copy.deepcopy(flags), pickle.loads(pickle.dumps(flags))):
        assert twin == flags
    same = parse()
    assert same.layer(3) is same, 'where nothing differs, nothing is made'


def test_layers_that_are_executed_several_times_count_once():
    stack = Decoder(**SMALL | {'depth': 6}, weight_tie_layers=True, ff_mult=(2,))
    assert values(stack, 'f', 'mult') == [2]
    with pytest.raises(FlagError, match='at most one value for each of the 1 feed-forward layers, got 2'):
        Decoder(**SMALL, weight_tie_layers=True, ff_mult=(2, 1))


# ---------------------------------------------------------------- schedules


def test_layer_schedule_runs_from_the_first_to_the_last_layer():
    assert layer_schedule(4, 1, 3) == pytest.approx((4, 2.5, 1))
    assert layer_schedule(1, 4, 4, 'linear') == pytest.approx((1, 2, 3, 4))
    for layer, value in enumerate(layer_schedule(3, 1, 7)):
        assert value == pytest.approx(3 + (1 - 3) * 0.5 * (1 - math.cos(math.pi * layer / 6)))
    assert layer_schedule(0, 8, 3, lambda start, end, t: start + (end - start) * t**2) == (0, 2, 8)
    stack = Decoder(**SMALL | {'depth': 3}, ff_mult=layer_schedule(4, 1, 3))
    assert [layer.branch.ff[0][0].out_features for layer in stack.layers if hasattr(layer.branch, 'ff')] == [64, 40, 16]


@pytest.mark.parametrize(
    ('call', 'says'),
    [
        (lambda: layer_schedule(1, 2, 1), '`depth` must be a whole number from 2, got 1'),
        (lambda: layer_schedule(1, 2, 4, 'square'), "`schedule` must be 'linear', 'cosine' or a function"),
        (lambda: per_layer(3), '`per_layer` must be given a sequence or a function'),
        (lambda: per_layer('abc'), '`per_layer` must be given a sequence or a function'),
    ],
)
def test_wrong_schedules_are_told(call, says):
    with pytest.raises(FlagError, match=says):
        call()


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ('flags', 'says'),
    [
        ({'attn_dim_head': ()}, '`attn_dim_head` must hold a value for each self attention layer, got an empty tuple'),
        ({'ff_mult': [1, 2, 3, 4, 5]}, 'at most one value for each of the 4 feed-forward layers, got 5'),
        ({'ff_glu': lambda layer: 'yes'}, "must be True or False in every layer, got 'yes' .* in feed-forward layer 0"),
        ({'ff_mult': (1, 'x')}, "`ff_mult` must be a number in every layer, got 'x' .* in feed-forward layer 1"),
        ({'attn_kv_heads': lambda layer: 4 // layer}, 'got ZeroDivisionError: .* for layer 0'),
        ({'cross_attn_dim_head': (4, 8)}, '`cross_attn_dim_head` must be one value, as there is no cross attention layer'),
        ({'cross_attend': True, 'only_cross': True, 'attn_dim_head': (4, 8)}, 'there is no self attention layer'),
        ({'use_rmsnorm': per_layer((True, False))}, '`use_rmsnorm` must be one value for the whole stack'),
        ({'depth': (1, 2)}, '`depth` must be a whole number or None'),
        ({'attn_kv_heads': (4, 3)}, 'In layers 2, 6: `heads=4` with `attn_kv_heads=3`'),
        ({'attn_dim_head': (4, 0, 4, 4)}, 'In layer 2: `attn_dim_head=0`: it must be at least 1'),
        ({'attn_kv_heads': (3, 3)}, '^`heads=4` with `attn_kv_heads=3`'),
        ({'ff_solu': (False, True), 'ff_swish': True}, 'In layers 3, 7: .*there is one activation'),
        ({'attn_dim_head': (8, 4), 'rotary_pos_emb': True, 'rotary_emb_dim': 8}, 'more channels'),
    ],
)  # fmt: skip
def test_what_fits_no_layer_is_a_sentence_in_the_constructor(flags, says):
    with pytest.raises(FlagError, match=says):
        Decoder(**SMALL | flags)


def test_all_that_is_wrong_is_told_at_once():
    with pytest.raises(FlagError) as raised:
        Decoder(**SMALL, attn_kv_heads=(), ff_mult=(1, 2, 3, 4, 5))
    assert len(raised.value.sentences) == 2


@pytest.mark.parametrize('rule', SAME_IN_ALL_LAYERS, ids=lambda rule: '-'.join(rule.flags[:2]))
def test_what_layers_share_must_be_the_same_in_all(rule):
    flags = parse(**rule.example)
    with pytest.raises(FlagError) as raised:
        check_stack(flags)
    assert rule.why in str(raised.value)


# ---------------------------------------------------------------- what is built


def test_equal_values_in_all_layers_are_the_stack_without_tuples():
    torch.manual_seed(0)
    one = Decoder(**SMALL, attn_qk_norm=True, ff_mult=2, rotary_pos_emb=True)
    torch.manual_seed(0)
    many = Decoder(**SMALL, attn_qk_norm=(True,), ff_mult=lambda layer: 2, rotary_pos_emb=True)
    assert {name: t.shape for name, t in one.state_dict().items()} == {name: t.shape for name, t in many.state_dict().items()}
    x = torch.randn(2, 5, 16)
    assert torch.equal(one(x), many(x))


def test_layers_of_other_shapes_are_decoded_from_the_cache():
    """Widths, heads, key heads and windows differ; chunks and then single tokens give the whole sequence's logits."""
    layers = Decoder(
        **SMALL | {'heads': (2, 4), 'attn_dim_head': (8, 6, 4)},
        attn_kv_heads=(1, 2),
        attn_value_dim_head=(None, 6),
        attn_max_attend_past=(2, None, None),
        ff_mult=(1, 2),
        rotary_pos_emb=True,
    )
    model = shaken(TransformerWrapper(num_tokens=9, max_seq_len=16, attn_layers=layers), 0).double().eval()
    ids = torch.randint(0, 9, (3, 10))
    whole = model(ids)
    got, cache = [], None
    for begin, end in ((0, 3), (3, 7), (7, 8), (8, 9), (9, 10)):
        out, cache = model(ids[:, :end], cache=cache, return_intermediates=True)
        got.append(out[:, -(end - begin) :])
    assert torch.allclose(torch.cat(got, dim=1), whole, atol=1e-10)
    kv = [inter.cached_kv[0].shape for inter in cache.attn_intermediates]
    assert [(shape[1], shape[3]) for shape in kv] == [(1, 8), (2, 6), (1, 4), (2, 8)]


def test_a_copy_of_a_function_is_not_kept():
    """A stack whose values came from a function can be pickled."""
    stack = Encoder(**SMALL, ff_glu=lambda layer: layer == 0)
    twin = pickle.loads(pickle.dumps(stack))
    x = torch.randn(1, 3, 16)
    assert torch.equal(stack(x), twin(x))


def test_a_users_activation_is_copied_for_each_layer():
    own = nn.PReLU()
    stack = Encoder(**SMALL, ff_custom_activation=per_layer((own, None)))
    copies = [module for module in stack.modules() if isinstance(module, nn.PReLU)]
    assert len(copies) == 2
    assert own not in copies
