"""Every option of every command is tried: it works, or is refused in a sentence. None ends in a traceback."""

from __future__ import annotations

import dataclasses
import os
import shutil
import types
import warnings
from typing import Any, Literal, get_args, get_origin

import pytest

from x_transformers.cli.generate import GenerateOptions
from x_transformers.cli.info import InfoOptions
from x_transformers.cli.main import BAD_INPUT, main
from x_transformers.cli.options import GROUPS, all_keywords, group_class, group_keywords
from x_transformers.flags.base import as_tuple, kinds_of, type_hints
from x_transformers.training.options import TrainOptions

SMALL = ['--dim', '16', '--depth', '1', '--heads', '2', '--attn-dim-head', '8', '--seq-len', '16', '--device', 'cpu']
SHORT = [
    *('--threads', '1', '--batch', '2', '--steps', '2', '--val-every', '0', '--val-bytes', '32'),
    *('--final-bytes', '64', '--sample-length', '2', '--save-every', '0'),
]
WORDS = {
    'device': ['cpu', 'nothing'],
    'custom_layers': ['a f'],
    'layers_execute_order': ['0 1 0'],
    'attn_hybrid_mask_kwarg': ['mask'],
}


def typed(name: str, value: str) -> list[str]:
    option = f'--{name.replace("_", "-")}'
    known = all_keywords().get(name)
    if value in ('True', 'False') and not (known is not None and types.NoneType in known.plain_kinds):
        return [option if value == 'True' else f'--no-{name.replace("_", "-")}']
    return [option, *value.split()]


def values(name: str, kinds: tuple[Any, ...]) -> list[str]:
    """What to try: for each kind of value something that may be right, and something odd."""
    if name in WORDS:
        return WORDS[name]
    found: list[str] = []
    for kind in kinds:
        if get_origin(kind) is Literal:
            found += [str(word) for word in get_args(kind)]
        elif kind is bool:
            found += ['True', 'False']
        elif kind is int:
            found += ['2', '0']
        elif kind is float:
            found += ['0.5', '-1']
        elif kind is str:
            found += ['word']
        elif get_origin(kind) is tuple:
            found += ['1 2'] if get_args(kind)[0] is not str else ['a b']
    return found


def parents(name: str) -> list[str]:
    """The options that give this one something to do."""
    keyword = all_keywords()[name]
    parent = as_tuple(keyword.metadata['parent'] or ())
    if not parent:
        return []
    prefix = name.removesuffix(keyword.field_name)
    over = prefix + parent[0]
    known = all_keywords().get(over)
    if known is None or not known.has_option:
        return []
    first = '2' if bool not in known.plain_kinds else 'True'
    return [*parents(over), *typed(over, first)]


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str | None:
    """What is wrong with how a command ends, if anything."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            status = main(arguments)
    except SystemExit as stop:  # tyro's own message
        status = stop.code if isinstance(stop.code, int) else BAD_INPUT
    except BaseException as error:
        return f'{" ".join(arguments)}: {type(error).__name__}: {error}'
    said = capsys.readouterr().err
    if status not in (0, BAD_INPUT) or 'Traceback' in said:
        return f'{" ".join(arguments)}: status {status}, {said[-200:]}'
    if status == BAD_INPUT and 'x-transformers: ' not in said and 'full helptext' not in said:
        return f'{" ".join(arguments)}: no sentence, {said[-200:]}'
    return None


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """Pictures and compressors take most of the time of a run of two steps, and no option changes them."""
    import x_transformers.training.report as report
    import x_transformers.training.run as training_run

    monkeypatch.chdir(tmp_path)
    (tmp_path / 'text').write_text('the quick brown fox jumps over the lazy dog\n' * 40)
    monkeypatch.setattr(training_run, 'draw_losses', lambda *given: None)
    monkeypatch.setattr(report, 'lzma', types.SimpleNamespace(compress=lambda data, preset: data))


def everything(more: list[str], capsys: pytest.CaptureFixture[str], *, train_only: bool = False) -> list[str]:
    """Two steps of training and what the run says; then the model writes; then it is looked at without being built."""
    if os.path.exists('run'):
        shutil.rmtree('run')
    wrong = [run(['train', '--data', 'text', '--run-dir', 'run', *SMALL, *SHORT, *more], capsys)]
    if os.path.exists('run/model.safetensors') and not train_only:
        wrong.append(run(['generate', 'run', '--length', '3', '--seed', '0'], capsys))
    if not train_only:
        wrong.append(run(['info', *SMALL, *more], capsys))
    return [text for text in wrong if text is not None]


@pytest.mark.slow
@pytest.mark.parametrize('group', [group for group in GROUPS if group != 'cross_attention'])
def test_every_flag_of_the_model(group, capsys):
    wrong: list[str] = []
    for field in dataclasses.fields(group_class(group)):
        keyword = group_keywords(group)[field.name]
        kinds = tuple(kind for kind in keyword.plain_kinds if kind is not types.NoneType)
        for value in values(field.name, kinds):
            if kinds[0] is bool and value == str(field.default):
                continue  # that is tried with every other option
            wrong += everything([*parents(field.name), *typed(field.name, value)], capsys)
    assert not wrong, '\n'.join(wrong)


@pytest.mark.slow
def test_every_flag_of_cross_attention_is_refused_or_has_no_effect(capsys):
    wrong: list[str] = []
    for field in dataclasses.fields(group_class('cross_attention')):
        kinds = tuple(kind for kind in group_keywords('cross_attention')[field.name].plain_kinds if kind is not types.NoneType)
        value = values(field.name, kinds)[0]
        option = f'--{field.name.replace("_", "-")}'
        wrong += everything([option, *value.split()], capsys, train_only=True)
    assert not wrong, '\n'.join(wrong)


@pytest.mark.slow
def test_every_option_of_the_run(capsys):
    wrong: list[str] = []
    hints = type_hints(TrainOptions)
    for field in dataclasses.fields(TrainOptions):
        if field.name in ('data', 'run_dir', 'resume', 'compile', 'device'):  # other tests have these
            continue
        kinds = tuple(kind for kind in kinds_of(hints[field.name]) if kind is not types.NoneType)
        for value in values(field.name, kinds):
            wrong += everything(typed(field.name, value), capsys, train_only=True)
    assert not wrong, '\n'.join(wrong)


@pytest.mark.parametrize('options', [GenerateOptions, InfoOptions])
def test_every_option_of_generate_and_info(options, capsys):
    main(['train', '--data', 'text', '--run-dir', 'run', *SMALL, *SHORT])
    wrong: list[str | None] = []
    hints = type_hints(options)
    for field in dataclasses.fields(options):
        if options is GenerateOptions and field.name == 'run':
            continue
        kinds = tuple(kind for kind in kinds_of(hints[field.name]) if kind is not types.NoneType)
        for value in values(field.name, kinds):
            command = ['generate', 'run', '--length', '3'] if options is GenerateOptions else ['info', *SMALL]
            wrong.append(run([*command, *typed(field.name, value)], capsys))
    assert not any(wrong), '\n'.join(filter(None, wrong))
