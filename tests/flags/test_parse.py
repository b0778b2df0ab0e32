"""Keywords become flags: prefixes, kinds of values, unknown names, signatures."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
from torch import nn

from x_transformers.flags.attention import AttentionFlags
from x_transformers.flags.base import REQUIRED, FlagError, MissingFlag, UnknownFlag, as_tuple, default_of, type_hints
from x_transformers.flags.feedforward import FeedForwardFlags
from x_transformers.flags.parts import SET_BY_STACK, keyword_names
from x_transformers.flags.stack import StackFlags
from x_transformers.flags.vision import VisionFlags
from x_transformers.flags.wrapper import WrapperFlags
from x_transformers.layers.stack import AttentionLayers

ALL = (AttentionFlags, FeedForwardFlags, StackFlags, WrapperFlags, VisionFlags)


def stack(**flags):
    return StackFlags.parse({'dim': 16, 'depth': 2, 'heads': 4} | flags, where='Decoder')


@pytest.mark.parametrize('cls', ALL)
def test_every_flag_says_what_it_does_in_one_sentence(cls):
    for name, field in cls.flag_fields().items():
        says = field.metadata['says']
        assert says.endswith('.'), name
        assert len(says) > 10, name
        for paper in as_tuple(field.metadata['paper']):
            assert paper.startswith('https://'), name
        for parent in as_tuple(field.metadata['parent']):
            assert parent in cls.flag_fields(), f'{name}: its parent {parent} is no flag'


@pytest.mark.parametrize('cls', ALL)
def test_every_default_is_of_its_own_kind_and_in_its_range(cls):
    defaults = {name: default_of(field) for name, field in cls.flag_fields().items() if default_of(field) is not REQUIRED}
    values, wrong = cls.read(defaults, where='x')
    assert wrong == []
    assert values == defaults
    assert set(type_hints(cls)) >= set(cls.flag_fields())


def test_the_keywords_of_the_original_are_all_there_and_later_ones_say_since_when():
    classes = AttentionFlags, FeedForwardFlags, StackFlags, WrapperFlags
    counts = [sum(field.metadata['since'] == '2.16.1' for field in cls.flag_fields().values()) for cls in classes]
    # ``dim`` comes on top for attention
    assert counts == [70 - 1, 13, 73, 38]


def test_prefixes_reach_their_parts():
    flags = stack(
        attn_dim_head=8, attn_qk_norm=True, cross_attend=True, cross_attn_qk_norm=False, cross_attn_kv_heads=2, ff_glu=True
    )
    assert flags.attention.dim_head == 8
    assert flags.attention.qk_norm
    assert flags.attention.heads == 4
    assert flags.attention.num_kv_heads == 4
    assert flags.cross_attention.dim_head == 8, 'what is said for attention holds for cross attention'
    assert not flags.cross_attention.qk_norm, 'unless something else is said there'
    assert flags.cross_attention.num_kv_heads == 2
    assert flags.feedforward.glu
    assert flags.attn_dim_head == 8


def test_a_flag_of_the_stack_that_begins_like_a_prefix_stays_with_the_stack():
    assert stack(cross_attend=True, cross_attn_tokens_dropout=0.5).cross_attn_tokens_dropout == 0.5


def test_cross_attention_takes_over_nothing_that_needs_one_sequence():
    flags = stack(
        causal=True, cross_attend=True, attn_selective=True, attn_max_attend_past=3, attn_num_mem_kv=2, attn_head_scale=True
    )
    assert flags.attention.selective
    assert flags.attention.max_attend_past == 3
    for name in AttentionFlags.self_only():
        assert not flags.cross_attention.is_changed(name)
    assert flags.cross_attention.num_mem_kv == 2
    assert flags.cross_attention.head_scale
    assert not flags.cross_attention.causal


def test_another_way_to_choose_key_heads_for_cross_attention():
    flags = stack(cross_attend=True, attn_kv_heads=2, cross_attn_one_kv_head=True)
    assert flags.attention.num_kv_heads == 2
    assert flags.cross_attention.num_kv_heads == 1
    flags = stack(cross_attend=True, attn_one_kv_head=True, cross_attn_kv_heads=2)
    assert flags.cross_attention.num_kv_heads == 2


@pytest.mark.parametrize('name', SET_BY_STACK)
def test_what_the_stack_sets_has_no_prefix(name):
    with pytest.raises(UnknownFlag, match=f'`attn_{name}` is set by the stack; use `{name}`'):
        stack(**{f'attn_{name}': 1})


def test_unknown_names_all_at_once_each_with_the_nearest():
    with pytest.raises(TypeError) as caught:
        stack(attn_kv_head=2, ff_gluu=True, rotary_pos_embd=True, zzz=1)
    error = caught.value
    assert isinstance(error, (FlagError, ValueError, AssertionError))
    for name, near in (('attn_kv_head', 'attn_kv_heads'), ('ff_gluu', 'ff_glu'), ('rotary_pos_embd', 'rotary_pos_emb')):
        assert any(f'`{name}`; did you mean `{near}`?' in sentence for sentence in error.sentences)
    assert any('`zzz`' in sentence and 'did you mean' not in sentence for sentence in error.sentences)
    assert 'unrecognized kwargs' in str(error)
    assert len(error.sentences) == 4


def test_unknown_names_of_a_part_by_itself():
    with pytest.raises(UnknownFlag, match='did you mean `kv_heads`'):
        AttentionFlags.parse({'kv_head': 2}, where='Attention')
    with pytest.raises(UnknownFlag, match='did you mean `enc_glu`'):
        FeedForwardFlags.parse({'gluu': True}, where='FeedForward', prefix='enc_')


def test_missing_flags():
    with pytest.raises(MissingFlag, match='TransformerWrapper needs `max_seq_len`, `attn_layers`'):
        WrapperFlags.parse({'num_tokens': 5}, where='TransformerWrapper')


@pytest.mark.parametrize(
    ('flags', 'sentence'),
    [
        ({'heads': 'four'}, r"`heads` must be a whole number, got 'four' \(of type str\)"),
        ({'heads': True}, '`heads` must be a whole number'),
        ({'ff_glu': 2}, '`ff_glu` must be True or False'),
        ({'ff_mult': '4'}, '`ff_mult` must be a number'),
        ({'attn_custom_attn_fn': 3}, '`attn_custom_attn_fn` must be a function or a module or None'),
        ({'attn_attend_sdp_kwargs': [1]}, '`attn_attend_sdp_kwargs` must be a dictionary'),
        ({'layers_execute_order': (0, 'a')}, '`layers_execute_order` must be a tuple'),
        ({'cross_attn_dim_head': 2.5}, '`cross_attn_dim_head` must be a whole number'),
        ({'attn_hybrid_module': int}, '`attn_hybrid_module` must be a torch Module or None'),
    ],
)
def test_values_of_the_wrong_kind(flags, sentence):
    with pytest.raises(FlagError, match=sentence):
        stack(**flags)


def test_values_of_the_wrong_kind_all_at_once():
    with pytest.raises(FlagError) as caught:
        stack(heads=1.5, ff_glu='yes', attn_flash=None)
    assert len(caught.value.sentences) == 3


def test_lists_become_tuples():
    flags = stack(layers_execute_order=[0, 1, 0, 1], layer_dropout=[0.0, 0.1, 0.0, 0.1], custom_layers='afaf')
    assert flags.layers_execute_order == (0, 1, 0, 1)
    assert flags.layer_dropout == (0.0, 0.1, 0.0, 0.1)
    assert flags.custom_layers == ('a', 'f', 'a', 'f')


def test_flags_are_values():
    flags = stack(rotary_pos_emb=True, attn_kv_heads=2)
    assert flags == stack(rotary_pos_emb=True, attn_kv_heads=2)
    assert flags.norm_kind == 'layernorm'
    assert copy.deepcopy(flags) == flags
    assert pickle.loads(pickle.dumps(flags)) == flags
    with pytest.raises(AttributeError):
        flags.heads = 3
    assert repr(flags) == 'StackFlags(dim=16, depth=2, heads=4, rotary_pos_emb=True)'


def test_a_default_given_in_words_is_no_change():
    flags = AttentionFlags.parse({'qk_norm_scale': 10, 'heads': 8, 'flash': False}, where='Attention')
    assert flags.changed() == {}


def test_default_dictionaries_are_not_shared():
    first, second = AttentionFlags(), AttentionFlags()
    assert first.attend_sdp_kwargs == second.attend_sdp_kwargs
    assert first.attend_sdp_kwargs is not second.attend_sdp_kwargs


def test_signatures():
    signature = StackFlags.signature()
    assert list(signature.parameters)[:4] == ['dim', 'depth', 'heads', 'causal']
    assert signature.parameters['heads'].default == 8
    assert signature.parameters['dim'].default is inspect.Parameter.empty
    assert AttentionFlags.signature().parameters['dim_head'].default == 64
    assert list(WrapperFlags.signature().parameters)[:3] == ['num_tokens', 'max_seq_len', 'attn_layers']
    of_class = inspect.signature(AttentionLayers).parameters
    assert of_class['heads'].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert of_class['rotary_pos_emb'].kind is inspect.Parameter.KEYWORD_ONLY


def test_keyword_names_know_what_the_stack_sets():
    assert 'attn_heads' not in keyword_names('attn_')
    assert 'attn_flash' in keyword_names('attn_')
    assert 'cross_attn_learned_value_residual_mix' in keyword_names('cross_attn_')
    assert len(keyword_names('ff_')) == len(FeedForwardFlags.flag_fields())


# ---------------------------------------------------------------- derived values


def test_derived_values_of_attention():
    flags = AttentionFlags(heads=4, one_kv_head=True, dim_head=16)
    assert (flags.num_kv_heads, flags.value_dim, flags.score_scale) == (1, 16, 0.25)
    flags = AttentionFlags(heads=4, kv_heads=2, value_dim_head=3, qk_norm=True, sigmoid=True)
    assert (flags.num_kv_heads, flags.value_dim, flags.score_scale) == (2, 3, 10.0)
    latent = AttentionFlags(heads=4, latent_rope_subheads=1)
    assert (latent.rotated_heads, latent.key_heads_from_latent) == (1, 3)
    assert AttentionFlags().orthogonal_outputs == 1
    assert AttentionFlags(orthog_projected_values=True, orthog_projected_values_per_head=True).orthogonal_outputs == 2


@pytest.mark.parametrize(
    ('flags', 'disabled'),
    [
        ({}, False),
        ({'rel_pos_bias': True}, True),
        ({'rotary_pos_emb': True}, True),
        ({'rotary_xpos': True}, True),
        ({'polar_pos_emb': True}, True),
        ({'alibi_pos_bias': True}, False),
        ({'dynamic_pos_bias': True}, False),
        ({'rotary_pos_emb': True, 'disable_abs_pos_emb': False}, False),
        ({'disable_abs_pos_emb': True}, True),
    ],
)
def test_which_positions_turn_absolute_positions_off(flags, disabled):
    assert stack(causal=True, **flags).disables_abs_pos_emb is disabled


def test_derived_values_of_a_stack():
    flags = stack(use_adaptive_rmsnorm=True, dim_condition=6, adaptive_condition_mlp=True, attn_dim_head=32)
    assert (flags.norm_kind, flags.needs_condition) == ('adaptive_rmsnorm', True)
    assert (flags.condition_dim, flags.condition_width) == (6, 24)
    assert flags.rotary_dim == 16
    assert stack(alibi_pos_bias=True).position_bias == 'alibi_pos_bias'
    assert stack().position_bias is None
    assert not stack(cross_attend=True, only_cross=True).has_self_attention
    assert stack(resi_dual=True).post_norm


def test_the_first_self_attention_has_nothing_to_mix_with():
    flags = stack(add_value_residual=True, integrate_layers=True)
    first, later = flags.self_attention_flags(first=True), flags.self_attention_flags(first=False)
    assert (first.learned_value_residual_mix, first.qkv_receive_diff_residuals) == (False, False)
    assert (later.learned_value_residual_mix, later.qkv_receive_diff_residuals) == (True, True)
    hyper = stack(num_residual_streams=2, qkv_receive_diff_residuals=True)
    assert hyper.self_attention_flags(first=True).qkv_receive_diff_residuals
    assert not stack(add_value_residual=False).attention.learned_value_residual_mix


def test_all_branches_start_at_zero_together():
    flags = stack(zero_init_branch_output=True, cross_attend=True)
    assert flags.attention.zero_init_output
    assert flags.cross_attention.zero_init_output
    assert flags.feedforward.zero_init_output


def test_modules_are_taken_as_they_are():
    module = nn.Linear(2, 2)
    assert AttentionFlags.parse({'hybrid_module': module}, where='Attention').hybrid_module is module


def test_formulas_are_one_line_and_belong_to_flags_that_compute():
    classes = (StackFlags, AttentionFlags, FeedForwardFlags, WrapperFlags)
    formulas = [field.metadata['formula'] for cls in classes for field in cls.flag_fields().values()]
    given = [formula for formula in formulas if formula is not None]
    assert len(given) > 30
    assert not [formula for formula in given if '\n' in formula or len(formula) > 100 or '`' in formula]
