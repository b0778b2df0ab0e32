"""The types of ``rotary_scaling``, and the keywords of each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

ScalingSettings = Mapping[str, Any]

# the keywords of each type; those with a default may be left out
NEEDED: dict[str, tuple[str, ...]] = {
    'linear': ('factor',),
    'dynamic': ('factor', 'original_length'),
    'yarn': ('factor', 'original_length'),
    'llama3': ('factor', 'low_freq_factor', 'high_freq_factor', 'original_length'),
    'longrope': ('short_factor', 'long_factor', 'original_length'),
}
OPTIONAL: dict[str, dict[str, Any]] = {
    'linear': {},
    'dynamic': {},
    'yarn': {
        'beta_fast': 32.0, 'beta_slow': 1.0, 'attention_factor': None, 'mscale': None, 'mscale_all_dim': None, 'truncate': True,
    },
    'llama3': {},
    'longrope': {'factor': None, 'attention_factor': None},
}  # fmt: skip
# their frequencies depend on how long the sequence is
BY_LENGTH = ('dynamic', 'longrope')


def complaints(scaling: ScalingSettings, dim: int) -> list[str]:
    """What is wrong with a ``rotary_scaling``, in clauses."""
    kind = scaling.get('type')
    if kind not in NEEDED:
        return [f"'type' must be one of {', '.join(NEEDED)}, got {kind!r}"]
    known = {'type', *NEEDED[kind], *OPTIONAL[kind]}
    wrong = [f'{kind} needs {name!r}' for name in NEEDED[kind] if scaling.get(name) is None]
    wrong += [f'{kind} has no {name!r}, only {", ".join(sorted(known))}' for name in scaling if name not in known]
    for name, value in scaling.items():
        if name in ('type', 'truncate') or name not in known or value is None:
            continue
        if name in ('short_factor', 'long_factor'):
            if not isinstance(value, (list, tuple)) or len(value) != dim // 2 or min(value, default=0) <= 0:
                wrong.append(f'{name!r} must be {dim // 2} positive numbers, one for each pair of channels, got {value!r}')
        elif isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            wrong.append(f'{name!r} must be a positive number, got {value!r}')
        elif name == 'factor' and value < 1:
            wrong.append(f"'factor' must be at least 1, got {value!r}")
    return wrong


def settings_of(scaling: ScalingSettings | None) -> dict[str, Any]:
    """All keywords of a type, defaults among them."""
    return {} if scaling is None else {**OPTIONAL[scaling['type']], **scaling}
