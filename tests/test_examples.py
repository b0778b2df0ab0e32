"""Every example runs; whether it reaches its figure is for `make examples` to say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(path for path in (ROOT / 'examples').glob('*.py') if path.stem != 'common')
TRAINED = [path for path in EXAMPLES if 'Run(__doc__' in path.read_text(encoding='utf-8')]


@pytest.mark.slow
@pytest.mark.parametrize('path', EXAMPLES, ids=lambda path: path.stem)
def test_example_runs_for_two_steps(path, tmp_path):
    environment = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT / 'src')}
    done = subprocess.run(
        [sys.executable, '-W', 'error', str(path), '--steps', '2'],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    if path in TRAINED:
        assert re.search(rf'^{path.stem}: .*wanted; .* after 2 steps', done.stdout, re.MULTILINE), done.stdout
        assert 'it/s' in done.stderr or 's/it' in done.stderr, 'no progress bar'


def test_examples_are_short_and_hide_no_module_of_python():
    for path in EXAMPLES:
        assert len(path.read_text(encoding='utf-8').splitlines()) <= 100, path.stem
        assert path.stem not in sys.stdlib_module_names, f'{path.stem} would be imported instead of the module of that name'


def test_every_trained_example_asserts_a_figure():
    assert len(TRAINED) >= 23
    for path in TRAINED:
        assert 'run.check(' in path.read_text(encoding='utf-8'), path.stem


@pytest.mark.parametrize(
    ('bound', 'value', 'good'), [('at_least', 0.5, True), ('at_least', 0.4, False), ('at_most', 0.6, False)]
)
def test_a_missed_figure_ends_a_whole_run_with_a_sentence(bound, value, good):
    code = f'from common import Run; Run("x", steps=1).check("share", {value}, {bound}=0.5, baseline="none")'
    environment = os.environ | {'PYTHONPATH': f'{ROOT / "src"}{os.pathsep}{ROOT / "examples"}'}
    whole = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True)
    assert (whole.returncode == 0) is good
    assert good or 'missed its figure: share is' in whole.stderr
    short = subprocess.run([sys.executable, '-c', code, '--steps', '1'], env=environment, capture_output=True, text=True)
    assert short.returncode == 0
    assert '0.5 wanted; none' in short.stdout
