"""A backend for ``torch.compile`` that counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Graphs(list):
    """Runs the graphs as they are and keeps them."""

    def __call__(self, graph: torch.fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        self.append(graph)
        return graph.forward
