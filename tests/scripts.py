"""Scripts of ``tools/`` and ``benchmarks/``, imported as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def load_script(path: str) -> Any:
    """The module of a file of the repository, as ``tools/generate_features.py``, anew at each call."""
    # a name of its own, under which dataclasses and pickles look for what the module defines
    name = f'script_{Path(path).stem}'
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    if spec is None or spec.loader is None:
        raise ImportError(f'path must be that of a Python file, got {path}.')
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
