from __future__ import annotations

import contextlib
import io
import re

import pytest

from x_transformers.cli import train
from x_transformers.cli.options import GROUPS, all_keywords, group_class, group_keywords, is_refused
from x_transformers.flags.base import FlagError
from x_transformers.training.build import QUICKSTART
from x_transformers.training.errors import TrainingError


def test_no_options_give_the_quickstart_model():
    read = train.parse([])
    assert read.flags == QUICKSTART | {'max_seq_len': read.options.seq_len}
    assert read.typed == frozenset()


def test_every_keyword_that_can_be_typed_has_an_option_with_its_sentence():
    typed = {field for group in GROUPS for field in group_class(group).__dataclass_fields__}
    code_only = set(all_keywords()) - typed
    assert code_only >= {'token_emb', 'to_logits', 'attn_custom_attn_fn'}
    for name in code_only:
        assert not all_keywords()[name].has_option
    shown = help_text('--help-all')
    for name in typed:
        assert (f'--{name.replace("_", "-")} ' in shown) == (not is_refused(name)), name
        sentence = ' '.join(all_keywords()[name].metadata['says'].replace(',', ' ').split())
        assert is_refused(name) or sentence in shown, name


def help_text(option: str) -> str:
    text = io.StringIO()
    with contextlib.redirect_stdout(text), pytest.raises(SystemExit) as stop:
        train.parse([option])
    assert stop.value.code == 0
    return ' '.join(text.getvalue().replace('│', ' ').replace(',', ' ').split())


def test_the_short_help_lists_what_matters_and_names_the_long_one():
    shown = help_text('--help')
    options = re.findall(r'(?<= )--(?!no-)[a-z][a-z0-9-]+', shown)
    assert {'data', 'run-dir', 'steps', 'dim', 'depth', 'heads'} <= {name.removeprefix('--') for name in options}
    assert len(set(options)) <= 40
    assert 'Files folders or globs to train on' in shown
    [rest] = re.findall(r'(\d+) more options', shown)
    assert int(rest) > 150


def test_what_every_command_refuses_is_not_offered():
    assert is_refused('cross_attend')
    assert is_refused('only_cross')
    assert is_refused('cross_attn_kv_heads')
    assert not is_refused('attn_kv_heads')


def test_flags_of_all_kinds_reach_the_constructors():
    typed = '--depth 3 --attn-qk-norm --no-ff-glu --attn-kv-heads None --layer-dropout 0.1 --rotary-emb-dim 16 --lr 0.5'
    read = train.parse([*typed.split(), '--layers-execute-order', '0', '1', '0', '1', '--data', 'a', 'b'])
    flags, options = read.flags, read.options
    assert read.typed_flags == {
        'depth', 'attn_qk_norm', 'ff_glu', 'attn_kv_heads', 'layer_dropout', 'rotary_emb_dim', 'layers_execute_order',
    }  # fmt: skip
    assert read.typed == read.typed_flags | {'lr', 'data'}
    assert flags['depth'] == 3
    assert flags['attn_qk_norm'] is True
    assert 'ff_glu' not in flags
    assert 'attn_kv_heads' not in flags
    assert flags['layer_dropout'] == 0.1
    assert flags['rotary_emb_dim'] == 16
    assert flags['layers_execute_order'] == (0, 1, 0, 1)
    assert (options.lr, options.data) == (0.5, ('a', 'b'))


def test_cross_attention_flags_are_only_passed_when_given():
    assert not any(name.startswith('cross_attn_') for name in train.parse([]).flags)
    flags = train.parse(['--cross-attn-qk-norm', 'False', '--attn-qk-norm']).flags
    assert flags['cross_attn_qk_norm'] is False
    assert flags['attn_qk_norm'] is True


def test_a_file_gives_options_and_the_command_line_overrides_it(tmp_path):
    path = tmp_path / 'run.toml'
    path.write_text('depth = 7\nattn-qk-norm = true\nlr = 1\nsteps = 9\ndata = ["x"]\n[rel_pos_kwargs]\nscale = 2.0\n')
    read = train.parse(['--config', str(path), '--steps', '11', '--no-attn-qk-norm'])
    flags, options = read.flags, read.options
    assert read.typed == {'config', 'depth', 'attn_qk_norm', 'lr', 'steps', 'data', 'rel_pos_kwargs'} - {'config'}
    assert flags['depth'] == 7
    assert 'attn_qk_norm' not in flags
    assert flags['rel_pos_kwargs'] == {'scale': 2.0}
    assert (options.lr, options.steps, options.data) == (1, 11, ('x',))


def test_a_single_source_in_a_file_needs_no_list(tmp_path):
    path = tmp_path / 'run.toml'
    path.write_text('data = "books/*.txt"\n')
    assert train.parse(['--config', str(path)]).options.data == ('books/*.txt',)


@pytest.mark.parametrize(
    ('text', 'error', 'sentence'),
    [
        ('dpth = 3\n', FlagError, 'no flag `dpth`; did you mean `depth`'),
        ('depth = "three"\n', FlagError, '`depth` must be a whole number'),
        ('steps = "many"\n', FlagError, '`steps` cannot be'),
        ('optimizer = "adam"\n', FlagError, '`optimizer` cannot be'),
        ('depth = \n', TrainingError, 'not valid TOML'),
        (None, TrainingError, 'cannot be read: No such file'),
    ],
)
def test_bad_files_are_named(tmp_path, text, error, sentence):
    path = tmp_path / 'run.toml'
    if text is not None:
        path.write_text(text)
    with pytest.raises(error, match=sentence) as caught:
        train.parse(['--config', str(path)])
    assert str(path) in str(caught.value)


def test_groups_do_not_share_names():
    names = [name for group in GROUPS for name in group_keywords(group)]
    assert len(names) == len(set(names))
