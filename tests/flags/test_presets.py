"""One registry of presets: each builds, one stands in the place of another, all commands take them, errors name them."""

from __future__ import annotations

import pytest
import torch

from x_transformers.cli import info, train
from x_transformers.cli.main import main
from x_transformers.cli.options import all_keywords
from x_transformers.evidence.experiment import Arm, Experiment
from x_transformers.evidence.plan import question
from x_transformers.evidence.tasks import make_task
from x_transformers.flags.base import FlagError
from x_transformers.flags.presets import PRESETS, preset, with_preset, without_presets
from x_transformers.training.build import QUICKSTART, SIZES, build_network
from x_transformers.training.errors import TrainingError

# those that make no language model
OTHERS = {'classifier'}
SMALL = {'dim': 32, 'depth': 2, 'heads': 4, 'max_seq_len': 16}


@pytest.mark.parametrize('name', sorted(set(PRESETS) - OTHERS))
def test_a_preset_builds_a_language_model(name: str) -> None:
    network = build_network({**SMALL, **preset(name)})
    assert network(torch.zeros(1, 4, dtype=torch.long)).shape == (1, 4, 256)


@pytest.mark.parametrize('name', PRESETS)
def test_a_preset_decides_what_any_preset_decides(name: str) -> None:
    flags = preset(name)
    assert flags.keys() == without_presets().keys()
    assert PRESETS[name].flags.items() <= flags.items()
    for flag, value in flags.items():
        if flag not in PRESETS[name].flags:
            assert value == all_keywords()[flag].default, flag
    assert PRESETS[name].flags.keys().isdisjoint(SIZES)
    # a flag at its default would say nothing
    assert all(value != without_presets()[flag] for flag, value in PRESETS[name].flags.items())


def test_what_stands_beside_a_preset_is_kept() -> None:
    assert with_preset({'depth': 3}) == {'depth': 3}
    flags = with_preset({'preset': 'llama', 'use_rmsnorm': False, 'depth': 3})
    assert flags == {**preset('llama'), 'use_rmsnorm': False, 'depth': 3}


@pytest.mark.parametrize('command', [train, info])
def test_a_command_takes_a_preset_and_typed_flags_override_it(command) -> None:
    def flags_of(*arguments: str):
        read = command.parse(list(arguments))
        return getattr(read, 'flags', None) or read[0]

    usual = flags_of()
    assert {name: value for name, value in usual.items() if name != 'max_seq_len'} == QUICKSTART
    for name in sorted(set(PRESETS) - OTHERS):
        wanted = {**SIZES, **PRESETS[name].flags, 'max_seq_len': usual['max_seq_len']}
        assert flags_of('--preset', name) == wanted
        assert flags_of(f'--preset={name}', '--attn-qk-norm') == wanted | {'attn_qk_norm': True}
    assert 'rotary_pos_emb' not in flags_of('--preset', 'llama', '--no-rotary-pos-emb')


def test_a_file_names_a_preset_too_and_the_command_line_wins(tmp_path) -> None:
    path = tmp_path / 'run.toml'
    path.write_text('preset = "llama"\nff_glu = false\nff_swish = false\n')
    flags = train.parse(['--config', str(path)]).flags
    assert flags['use_rmsnorm'] is True
    assert 'ff_glu' not in flags
    assert 'zero_init_branch_output' not in flags
    assert train.parse(['--config', str(path), '--preset', 'gpt2']).flags['tie_embedding'] is True


@pytest.mark.parametrize('command', ['train', 'info', 'plan', 'ablate'])
def test_the_help_shows_every_preset(command: str, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, '--help'])
    assert stop.value.code == 0
    # the help breaks lines at blanks and behind hyphens
    shown = ''.join(capsys.readouterr().out.replace('│', ' ').split())
    for name, made in PRESETS.items():
        assert ''.join(f'{name}:{made.says}'.split()) in shown


def test_errors_name_the_preset(capsys) -> None:
    for arguments, words in (
        (
            ['info', '--preset', 'lama'],
            "preset must be one of quickstart, gpt2, llama, modern, .* got 'lama'. Did you mean llama?",
        ),
        (['info', '--use-scalenorm'], 'the default of the preset quickstart; add `--no-use-rmsnorm`'),
        (['info', '--preset', 'llama', '--use-scalenorm'], 'the default of the preset llama; add `--no-use-rmsnorm`'),
        (['ablate', '--task', 'mqar', '--preset', 'lama', '--idea', 'depth=2'], 'Did you mean llama?'),
        (
            ['ablate', '--task', 'mqar', '--preset', 'llama', '--base', 'use_scalenorm=true', '--idea', 'depth=2'],
            'the default of the preset llama; add `use_rmsnorm=false`',
        ),
    ):
        assert main(arguments) == 2
        said = capsys.readouterr().err
        first, _, last = words.partition(' .* ')
        assert first in said
        assert last in said


def test_a_flag_that_somebody_typed_is_not_blamed_on_the_preset(capsys) -> None:
    assert main(['info', '--preset', 'llama', '--use-scalenorm', '--use-rmsnorm']) == 2
    assert 'preset' not in capsys.readouterr().err


def test_ideas_are_presets_and_what_breaks_them_is_told(tmp_path) -> None:
    arms = [
        Arm('modern', {'preset': 'modern'}),
        Arm('scale', {'use_scalenorm': True}),
        Arm('gpt2', {'preset': 'gpt2', 'norm_bias': False}),
    ]
    asked = question({'task': 'mqar'}, {'preset': 'llama'}, arms, seeds=2, settings={})
    modern, scale, gpt2 = (asked.flags_of(arm) for arm in asked.arms)
    assert modern['attn_qk_norm'] is True
    assert scale['use_rmsnorm'] is True
    assert gpt2['tie_embedding'] is True
    # what is at its default is not named, so that the hash of a run does not depend on what other presets there are
    assert gpt2.keys().isdisjoint({'rotary_pos_emb', 'norm_bias', 'shift_tokens'})
    assert asked.base.keys() == {*make_task('mqar').flags, *PRESETS['llama'].flags}
    broken = Experiment((asked,), tmp_path).check()
    assert list(broken) == [('mqar', 'scale')]
    assert 'the default of the preset llama; add `use_rmsnorm=false`' in broken['mqar', 'scale']
    with pytest.raises(FlagError, match='preset must be one of'):
        question({'task': 'mqar'}, {'preset': 'nothing'}, arms, seeds=2, settings={})


def test_a_resumed_run_keeps_its_preset(tmp_path, capsys) -> None:
    text = tmp_path / 'text'
    text.write_bytes(b'a line of text\n' * 100)
    run = ['train', '--data', str(text), '--run-dir', str(tmp_path / 'run'), '--dim', '16', '--depth', '1', '--heads', '2']
    short = [
        '--seq-len',
        '16',
        '--batch',
        '2',
        '--val-bytes',
        '32',
        '--final-bytes',
        '64',
        '--sample-length',
        '2',
        '--threads',
        '1',
    ]
    assert main([*run, *short, '--preset', 'llama', '--steps', '2', '--device', 'cpu']) == 0
    again = ['train', '--run-dir', str(tmp_path / 'run'), '--resume', '--steps', '3']
    assert main([*again, '--preset', 'llama']) == 0
    capsys.readouterr()
    assert main([*again, '--preset', 'gpt2']) == 2
    assert 'with which this run was started' in capsys.readouterr().err


def test_config_needs_a_value() -> None:
    with pytest.raises(TrainingError, match='--preset needs the name of a preset'):
        train.parse(['--preset'])
