"""An extension of the site generator: docstrings that are put together at import are shown as ``help`` shows them."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import griffe


class RuntimeDocs(griffe.Extension):
    def on_function_instance(self, *, func: griffe.Function, **_: Any) -> None:
        """Of forwards whose source says ``Args: as declared in …`` (``with_arguments``)."""
        if func.docstring is None or '\nArgs: as declared' not in func.docstring.value:
            return
        found: Any = importlib.import_module(func.module.path)
        for name in func.path.removeprefix(f'{func.module.path}.').split('.'):
            found = getattr(found, name)
        func.docstring.value = inspect.cleandoc(found.__doc__)
