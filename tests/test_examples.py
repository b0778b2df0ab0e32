from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = [
    Path(__file__).parents[1] / 'examples' / f'{name}.py' for name in ('attention_maps', 'cached_decoding', 'copy_task')
]


@pytest.mark.slow
@pytest.mark.parametrize('path', EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path):
    result = runpy.run_path(str(path))['main']()
    if path.stem == 'copy_task':
        assert result > 0.9
