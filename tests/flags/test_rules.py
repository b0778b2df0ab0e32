"""Each rule is triggered by its own example, all broken ones come in one error, and fine combinations pass."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
from torch import nn

from x_transformers.attention.attend import ORDER
from x_transformers.attention.refusals import not_with_dropout
from x_transformers.flags.attention import AttentionFlags
from x_transformers.flags.base import FlagError, Flags, as_tuple, default_of, flag
from x_transformers.flags.feedforward import FeedForwardFlags
from x_transformers.flags.other_inputs import ContinuousFlags, MultiInputFlags, XValFlags
from x_transformers.flags.rule import Rule, broken_rules, rules_of
from x_transformers.flags.rules import (
    check_attention,
    check_feedforward,
    check_stack,
    check_vision,
    check_wrapper,
    rules_of_model,
)
from x_transformers.flags.stack import StackFlags
from x_transformers.flags.stack_rules import STACK_RULES
from x_transformers.flags.vision import VisionFlags
from x_transformers.flags.wrapper import WrapperFlags
from x_transformers.flags.wrapper_rules import ALONE_RULES
from x_transformers.notices import InertFlagWarning

DIM = 16


def stack(**flags):
    # one of the examples spells out the layers instead of giving a depth
    return StackFlags.parse({'dim': DIM, 'depth': 2} | flags, where='Decoder')


def wrapper(**flags):
    needed = {'num_tokens': 8, 'max_seq_len': 8, 'attn_layers': nn.Identity()}
    return WrapperFlags.parse(needed | flags, where='TransformerWrapper')


def refused(check, *args) -> FlagError:
    with pytest.raises(FlagError) as caught:
        check(*args)
    for sentence in caught.value.sentences:
        assert not re.search(r'\[\w+\]|\{\w+\}', sentence), f'a placeholder was left in: {sentence}'
        assert sentence.rstrip().endswith('.'), sentence
    return caught.value


def warned(check, *args) -> str:
    """The one warning about everything that does nothing."""
    with pytest.warns(InertFlagWarning) as caught:
        check(*args)
    assert len(caught) == 1
    text = str(caught[0].message)
    assert not re.search(r'\[\w+\]|\{\w+\}', text), f'a placeholder was left in: {text}'
    return text


def sentence_of(rule, check, *args) -> str:
    """The one sentence that this rule made, from its subject on."""
    beginning = rule.why.split('{')[0].split('[')[0]
    if rule.inert:
        before, found, _ = warned(check, *args).partition(beginning)
        assert found, rule
        return before.rpartition('. ')[2] + found
    error = refused(check, *args)
    sentences = [sentence for sentence in error.sentences if beginning in sentence]
    assert len(sentences) == 1, (rule, error.sentences)
    return sentences[0]


@pytest.mark.parametrize('rule', rules_of(AttentionFlags), ids=lambda rule: rule.flags[0])
def test_rules_of_attention(rule):
    sentence = sentence_of(rule, check_attention, AttentionFlags.parse(rule.example, where='Attention'), DIM, 'attn_')
    assert f'`attn_{next(name for name in rule.flags if name in rule.example)}=' in sentence


@pytest.mark.parametrize('rule', rules_of(FeedForwardFlags), ids=lambda rule: rule.flags[0])
def test_rules_of_feedforward(rule):
    sentence = sentence_of(rule, check_feedforward, FeedForwardFlags.parse(rule.example, where='FeedForward'), DIM, 'ff_')
    assert f'`ff_{next(name for name in rule.flags if name in rule.example)}=' in sentence


@pytest.mark.parametrize('rule', STACK_RULES, ids=lambda rule: f'{rule.flags[0]}')
def test_rules_of_a_stack(rule):
    sentence = sentence_of(rule, check_stack, stack(**rule.example))
    assert f'`{next(name for name in rule.flags if name in rule.example)}=' in sentence


@pytest.mark.parametrize('rule', rules_of(WrapperFlags), ids=lambda rule: rule.flags[0])
def test_rules_of_a_model(rule):
    own = dict(rule.example)
    stack_flags = stack(**({'causal': True} if 'use_cls_token' in rule.flags[:1] else {}), **own.pop('stack', {}))
    sentence = sentence_of(rule, check_wrapper, wrapper(**own), stack_flags)
    assert f'`{next(name for name in rule.flags if name in own)}=' in sentence


OTHER_MODELS: dict[type[Flags], dict] = {
    ContinuousFlags: {'attn_layers': nn.Identity()},
    MultiInputFlags: {'num_tokens': {'note': 8}, 'max_seq_len': 8, 'attn_layers': nn.Identity()},
    XValFlags: {'num_tokens': 8, 'max_seq_len': 8, 'numerical_token_id': 0, 'attn_layers': nn.Identity()},
}


@pytest.mark.parametrize(
    ('cls', 'rule'),
    [(cls, rule) for cls in OTHER_MODELS for rule in rules_of_model(cls)],
    ids=lambda part: part.flags[0] if isinstance(part, Rule) else part.__name__,
)
def test_rules_of_models_of_other_inputs(cls, rule):
    own = dict(rule.example)
    stack_flags = stack(**{'dim': own.pop('dim', DIM)} | own.pop('stack', {}))
    flags = cls.parse(OTHER_MODELS[cls] | own, where=cls.__name__)
    assert f'`{next(name for name in rule.flags if name in own)}=' in sentence_of(rule, check_wrapper, flags, stack_flags)


@pytest.mark.parametrize('rule', rules_of(VisionFlags), ids=lambda rule: rule.flags[0])
def test_rules_of_an_image_model(rule):
    flags = VisionFlags.parse(rule.example | {'attn_layers': nn.Identity()}, where='ViTransformerWrapper')
    sentence_of(rule, check_vision, flags, stack())


@pytest.mark.parametrize('rule', ALONE_RULES, ids=lambda rule: rule.flags[0])
def test_a_model_that_is_told_nothing_beside_its_input(rule):
    flags = VisionFlags(image_size=8, patch_size=4, attn_layers=nn.Identity())
    assert f'`{next(iter(rule.example))}=' in sentence_of(rule, check_vision, flags, stack(**rule.example))


# ---------------------------------------------------------------- rules that fields say


@dataclass(frozen=True, kw_only=True, repr=False)
class Toy(Flags):
    one: bool = flag(False, 'A switch.', excludes={'two': 'they quarrel', ('norm', 'width'): ('it is alone', 'Be [one].')})
    two: bool = flag(False, 'Another.', idle_with={'width': 'it looks elsewhere'}, needs={'three': 'it stands on it'})
    three: bool = flag(False, 'What another needs.', needs={'width': 'it is as wide'})
    width: int | None = flag(None, 'A number.', low=1, parent='three')
    red: bool = flag(False, 'One of a group.', one_of='norm')
    blue: bool = flag(False, 'One of a group.', one_of='norm', excludes={'nobody': 'no such flag is here'})


def told(inert: bool = False, **flags) -> list[str]:
    return broken_rules(rules_of(Toy), Toy(**flags), DIM, str, inert=inert)


def test_what_fields_say_are_rules():
    assert told() == told(one=True) == told(red=True, three=True, width=3) == []
    assert told(one=True, two=True, three=True, width=3) == [
        '`one=True` with `two=True`: they quarrel. Leave out one of them.',
        '`one=True` with `width=3`: it is alone. Be `one`.',
    ]
    assert told(one=True, blue=True) == ['`one=True` with `blue=True`: it is alone. Be `one`.']
    assert told(two=True) == ['`two=True` with `three=False`: it stands on it. Set `three`, or leave out `two`.']
    assert told(three=True) == ['`three=True`: it is as wide. Give `width`.']
    assert told(red=True, blue=True) == ['`red=True` with `blue=True`: a stack has one kind of norm. Keep one.']
    assert told(inert=True, two=True, three=True, width=3) == [
        '`two=True` with `width=3`: it looks elsewhere. Leave out one of them.'
    ]
    # a field may be shared with a class that has more flags
    assert not any('nobody' in rule.flags for rule in rules_of(Toy))
    assert len(rules_of(Toy)) == 6
    for rule in rules_of(Toy):
        assert len(told(rule.inert, **rule.example)) >= 1, rule


@pytest.mark.parametrize('cls', [AttentionFlags, FeedForwardFlags, StackFlags, WrapperFlags, VisionFlags])
def test_rules_name_flags(cls):
    for name, field in cls.flag_fields().items():
        for word in ('excludes', 'idle_with', 'needs'):
            for other in (each for others in field.metadata[word] for each in as_tuple(others)):
                known = cls.one_of(other) or cls.having(other) or cls.switched_on(other)
                assert known, f'{name} {word} {other}, which is no flag, no group and no trait'


NOT_FUSED = sorted({rule.name for rule in ORDER if rule.unfused is not None})
WITHOUT_DROPOUT = sorted({rule.name for rule in ORDER if rule.unfused is None and not_with_dropout(rule)})


@pytest.mark.parametrize('name', NOT_FUSED)
def test_what_a_fused_kernel_cannot_do(name):
    given = {name: {'custom_attn_fn': abs}.get(name, True)}
    given |= {'sparse_topk': 3} if name == 'sparse_topk_straight_through' else {}
    causal = name != 'inverted_attention'  # a softmax over queries would see later ones
    error = refused(check_attention, AttentionFlags(flash=True, causal=causal, **given), DIM, 'attn_')
    assert f'`attn_flash=True` is not available: `attn_{name}` needs the score matrix' in str(error)
    check_attention(AttentionFlags(causal=causal, **given), DIM)


@pytest.mark.parametrize('name', WITHOUT_DROPOUT)
def test_what_a_fused_kernel_cannot_do_with_dropout(name):
    given = {name: {'sparse_topk': 3}.get(name, True)}
    error = refused(check_attention, AttentionFlags(flash=True, dropout=0.1, **given), DIM, 'attn_')
    assert f'not available: `attn_{name}` together with `attn_dropout` needs the score matrix' in str(error)
    check_attention(AttentionFlags(flash=True, **given), DIM)
    check_attention(AttentionFlags(dropout=0.1, **given), DIM)


def test_what_a_fused_kernel_can_do():
    flags = AttentionFlags(
        flash=True, l2_distance=True, num_mem_kv=2, add_zero_kv=True, kv_heads=2, laser=True, max_attend_past=3
    )
    check_attention(flags, DIM)
    check_stack(stack(rel_pos_bias=True, attn_flash=True))
    check_stack(stack(dynamic_pos_bias=True, attn_flash=True))


def test_all_broken_rules_come_in_one_error():
    flags = stack(
        use_rmsnorm=True,
        use_scalenorm=True,
        rotary_xpos=True,
        attn_kv_heads=3,
        attn_one_kv_head=True,
        ff_relu_squared=True,
        ff_swish=True,
        attn_dropout=1.5,
    )
    error = refused(check_stack, flags)
    text = str(error)
    assert '`use_scalenorm=True` with `use_rmsnorm=True`: a stack has one kind of norm. Keep one.' in text
    assert '`rotary_xpos=True` with `causal=False`' in text
    assert '`attn_one_kv_head=True` with `attn_kv_heads=3`' in text
    assert '`ff_swish=True` with `ff_relu_squared=True`' in text
    assert '`attn_dropout=1.5`: it must be at most 1' in text
    assert len(error.sentences) == 5


def test_everything_without_effect_comes_in_one_warning():
    flags = {'attn_gumbel_softmax_temp': 2.0, 'dim_condition': 8, 'cross_attn_head_scale': True, 'ff_glu_mult_bias': True}
    text = warned(check_stack, stack(**flags))
    assert text.startswith('AttentionLayers: 4 keywords have no effect. ')
    assert '`attn_gumbel_softmax_temp=2.0` does nothing without `attn_gumbel_softmax`' in text
    for name in flags:
        assert f'`{name}' in text
    text = warned(check_stack, stack(depth=None, custom_layers=('f',), attn_head_scale=True))
    assert "`attn_head_scale`: there is no attention. Set a layer 'a', or leave this out." in text
    text = warned(check_stack, stack(depth=None, custom_layers=('a',), ff_mult=3.0))
    assert "`ff_mult`: there is no feed-forward. Set a layer 'f', or leave this out." in text


def test_layers_that_are_spelt_out_have_cross_attention_without_its_flag():
    check_stack(stack(depth=None, custom_layers=('a', 'c', 'f'), cross_attend=True, cross_attn_tokens_dropout=0.5))


def test_names_in_sentences_are_those_that_the_user_wrote():
    text = str(refused(check_stack, stack(heads=4, attn_kv_heads=3)))
    assert '`heads=4` with `attn_kv_heads=3`' in text
    text = str(refused(check_stack, stack(heads=4, cross_attend=True, attn_hard=True, cross_attn_sigmoid=True)))
    assert '`attn_hard=True` with `cross_attn_sigmoid=True`' in text
    text = str(refused(check_attention, AttentionFlags(heads=4, kv_heads=3), DIM))
    assert '`heads=4` with `kv_heads=3`' in text


def test_a_rule_broken_by_self_and_cross_attention_is_said_once():
    error = refused(check_stack, stack(heads=4, cross_attend=True, attn_kv_heads=3))
    assert len(error.sentences) == 1


# ---------------------------------------------------------------- sub-options


def off_parent_values():
    """For each sub-option of every class: a value that differs from its default."""
    for cls in (AttentionFlags, FeedForwardFlags, StackFlags, WrapperFlags):
        for name, field in cls.flag_fields().items():
            parents = as_tuple(field.metadata['parent'])
            if parents:
                yield pytest.param(cls, name, parents, id=f'{cls.__name__}-{name}')


def other_value(cls: type[Flags], name: str):
    default = default_of(cls.flag_fields()[name])
    given = {
        'hybrid_mask_kwarg': 'mask',
        'rotary_scaling': {'type': 'linear', 'factor': 2.0},
        'rotary_layout': 'halves',
        'mixer_kwargs': {'heads': 2},
        'rotary_axes': (2, 3),
        'differential_lambda_init': 0.5,
        'router': 'sigmoid',
        'router_balance': 'bias',
        'rel_pos_kwargs': {'slopes': [1.0]},
        'data_dependent_alibi_kwargs': {'post_log_scale': 2.0},
        'attn_aggregated_residual_kwargs': {'lora_rank': 2},
    }
    if name in given:
        return given[name]
    if isinstance(default, bool):
        return not default
    if name == 'cross_attn_tokens_dropout':
        return 0.5
    return 2 if default is None else default + 1


@pytest.mark.parametrize(('cls', 'name', 'parents'), list(off_parent_values()))
def test_a_sub_option_without_its_parent_does_nothing(cls, name, parents):
    value = other_value(cls, name)
    if cls is AttentionFlags:
        text = warned(check_attention, AttentionFlags(causal=True, **{name: value}), DIM)
    elif cls is FeedForwardFlags:
        text = warned(check_feedforward, FeedForwardFlags(**{name: value}), DIM)
    elif cls is StackFlags:
        text = warned(check_stack, stack(causal=True, **{name: value}))
    else:
        text = warned(check_wrapper, wrapper(**{name: value}), stack(causal=True))
    assert text.count('does nothing without') == 1
    assert f'`{name}=' in text
    for parent in parents:
        assert f'`{parent}`' in text


@pytest.mark.parametrize('cls', [AttentionFlags, FeedForwardFlags, StackFlags, WrapperFlags])
def test_defaults_written_out_are_never_refused(cls):
    defaults = {name: default_of(field) for name, field in cls.flag_fields().items() if name not in ('dim', 'depth')}
    if cls is AttentionFlags:
        check_attention(AttentionFlags.parse(defaults, where='x'), DIM)
    elif cls is FeedForwardFlags:
        check_feedforward(FeedForwardFlags.parse(defaults, where='x'), DIM)
    elif cls is StackFlags:
        check_stack(stack(**defaults))
    else:
        needed = ('num_tokens', 'max_seq_len', 'attn_layers')
        check_wrapper(wrapper(**{name: value for name, value in defaults.items() if name not in needed}), stack())


def test_turning_off_for_cross_attention_what_it_takes_over_needs_no_more_words():
    check_stack(stack(cross_attend=True, attn_qk_norm=True, attn_qk_norm_scale=5, cross_attn_qk_norm=False))


# ---------------------------------------------------------------- ranges and layouts


@pytest.mark.parametrize(
    'flags',
    [
        {'heads': 0},
        {'dim': 0},
        {'num_residual_streams': 0},
        {'attn_dropout': -0.1},
        {'cross_attend': True, 'cross_attn_tokens_dropout': 1.1},
        {'rotary_pos_emb': True, 'rotary_interpolation_factor': 0.5},
        {'attn_softclamp_logits': True, 'attn_logit_softclamp_value': 0.0},
        {'attn_num_mem_kv': -1},
        {'ff_mult': 0},
    ],
)
def test_numbers_out_of_range(flags):
    name = list(flags)[-1]
    assert f'`{name}={flags[name]}`: it must be ' in str(refused(check_stack, stack(**flags)))


@pytest.mark.parametrize(
    ('flags', 'words'),
    [
        ({'depth': None}, 'depth'),
        ({'layer_dropout': (0.1,)}, 'layer_dropout'),
        ({'layers_execute_order': (0, 9)}, 'layers_execute_order'),
        ({'par_ratio': 99}, 'par_ratio'),
        ({'depth': None, 'custom_layers': ('a', 'x')}, 'custom_layers'),
        ({'depth': 1, 'unet_skips': True}, 'unet_skips'),
    ],
)
def test_layouts_that_cannot_be(flags, words):
    with pytest.raises(FlagError, match=words):
        check_stack(stack(**flags))


def test_cross_attention_flags_without_cross_attention():
    assert '`cross_attn_head_scale`: there is no cross attention. Set `cross_attend`' in warned(
        check_stack, stack(cross_attn_head_scale=True)
    )
    check_stack(stack(cross_attn_head_scale=False))


# ---------------------------------------------------------------- combinations that are fine


@pytest.mark.parametrize(
    'flags',
    [
        {'attn_num_mem_kv': 2, 'attn_value_dim_head': 8},
        {'attn_value_rmsnorm': True, 'attn_kv_heads': 2},
        {'causal': True, 'attn_use_cope': True, 'attn_cope_soft_onehot_pos': True},
        {'polar_pos_emb': True, 'attn_kv_heads': 2, 'attn_num_mem_kv': 2, 'polar_bias_uniform_init': True},
        {'zero_init_branch_output': True, 'attn_on_attn': True},
        {'unet_skips': True, 'cross_attend': True, 'depth': 4},
        {'unet_skips': True, 'macaron': True, 'depth': 4},
        {'add_value_residual': True, 'attn_kv_heads': 2},
        {'attn_hybrid_module': nn.Linear(DIM, 512)},
        {'causal': True, 'attn_data_dependent_alibi': True, 'cross_attend': True},
        {'causal': True, 'attn_selective': True, 'cross_attend': True},
        {'num_residual_streams': 2, 'reinject_input': True, 'learned_reinject_input_gate': True},
        {'attn_head_learned_sink': True, 'residual_attn': True},
        {'residual_attn': True, 'attn_pre_scale_post_talking_heads': True},
        {'rotary_pos_emb': True, 'rel_pos_bias': True},
        {'num_residual_streams': 2, 'hyper_conn_sinkhorn_iters': 3, 'hyper_conn_doubly_stochastic': True},
        {'resi_dual': True, 'resi_dual_scale': 0.5},
        {'rotary_pos_emb': True, 'attn_dim_head': 4},
    ],
)
def test_combinations_that_work(flags):
    check_stack(stack(**flags))


@pytest.mark.parametrize('name', ['attn_dim_out', 'ff_dim_out', 'attn_dim_context'])
def test_widths_of_branches_are_those_of_the_stack(name):
    check_stack(stack(**{name: DIM}))
    assert f'`{name}=3`' in str(refused(check_stack, stack(**{name: 3})))


def test_models_that_work():
    check_wrapper(wrapper(l2norm_embed=True, scaled_sinu_pos_emb=True), stack())
    check_wrapper(wrapper(sigsoftmax_logits=True, num_output_heads=2), stack())
    check_wrapper(wrapper(num_memory_tokens=2, memory_tokens_interspersed_every=4), stack(causal=True))
    # the default asks for absolute positions, which rotary positions turn off
    check_wrapper(wrapper(use_abs_pos_emb=True), stack(rotary_pos_emb=True))
    check_wrapper(wrapper(shift_mem_down=1, max_mem_len=4), stack(causal=True))
