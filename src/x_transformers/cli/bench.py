"""``x-transformers bench``: speed and memory against a minimal hand-written model."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import x_transformers
from x_transformers.training.errors import TrainingError

WHERE_TO_GET = (
    'the benchmarks are not part of the installed package. Run the command inside a clone of the repository after '
    '`pip install -e .`, or set X_TRANSFORMERS_BENCHMARKS to a folder with bench.py, worker.py and floor.py.'
)


def benchmarks() -> Path:
    """The folder ``benchmarks`` of the checkout that this package, or the working directory, belongs to."""
    named = os.environ.get('X_TRANSFORMERS_BENCHMARKS')
    checkout = Path(x_transformers.__file__).parents[2]
    candidates = [Path(named)] if named else [checkout / 'benchmarks', Path.cwd() / 'benchmarks']
    for folder in candidates:
        if all((folder / name).is_file() for name in ('bench.py', 'worker.py', 'floor.py')):
            return folder
    raise TrainingError(WHERE_TO_GET)


def main(arguments: Sequence[str]) -> int:
    """Hand the options on to ``benchmarks/bench.py``, whose ``--help`` lists them."""
    return subprocess.run([sys.executable, str(benchmarks() / 'bench.py'), *arguments], check=False).returncode
