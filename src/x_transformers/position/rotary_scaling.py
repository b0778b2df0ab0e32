"""Rotary frequencies for sequences longer than in training: linear, dynamic, YaRN, Llama 3, LongRoPE."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.flags.rotary_scaling import ScalingSettings, settings_of
from x_transformers.tensor_types import Bool, Float


def scaled_frequencies(
    inv_freq: Float[Tensor, 'p'], scaling: ScalingSettings | None, *, base: float, dim: int
) -> Float[Tensor, 'p']:
    """The frequencies of a type that does not look at the length; of the others those of short sequences."""
    change = CHANGES.get('' if scaling is None else scaling['type'])
    return inv_freq if change is None else change(inv_freq, settings_of(scaling), base, dim)


def length_scaled(
    inv_freq: Float[Tensor, 'p'],
    scaling: ScalingSettings,
    pos: Float[Tensor, '#b n'],
    seen: Bool[Tensor, 'b j'] | None = None,
    *,
    dim: int,
) -> Float[Tensor, '#b 1 p']:
    """The frequencies for sequences that reach as far as ``pos``, of a type in ``BY_LENGTH``. ``seen``: which of the last
    positions are tokens."""
    settings = settings_of(scaling)
    original = settings['original_length']
    if pos.shape[-1] == 0:
        return inv_freq[None, None]
    if seen is not None:
        hidden = F.pad(~seen, (pos.shape[-1] - seen.shape[-1], 0), value=False)
        pos = pos.masked_fill(hidden, 0)
    length = (pos.amax(dim=-1) + 1).to(inv_freq.dtype)[:, None, None]
    if settings['type'] == 'longrope':
        short, long = (inv_freq.new_tensor(settings[name]) for name in ('short_factor', 'long_factor'))
        divided: Tensor = inv_freq / torch.where(length > original, long, short)
        return divided
    factor = settings['factor']
    stretched = factor * length.clamp(min=original) / original - (factor - 1)
    # base ** (-k / dim) of a base that is stretched ** (dim / (dim - 2)) times as large
    channels = torch.arange(0, dim, 2, device=inv_freq.device, dtype=inv_freq.dtype)
    # of a single pair, whose frequency is 1 for any base, the exponent is 0
    stretch: Tensor = stretched ** (-channels / max(dim - 2, 1))
    return inv_freq * stretch


def attention_factor(scaling: ScalingSettings | None) -> float:
    """What queries and keys are multiplied by, so that scores keep their spread."""
    settings = settings_of(scaling)
    if settings.get('attention_factor') is not None:
        return float(settings['attention_factor'])
    if settings.get('type') == 'yarn':
        if settings['mscale'] and settings['mscale_all_dim']:
            return _spread(settings['factor'], settings['mscale']) / _spread(settings['factor'], settings['mscale_all_dim'])
        return _spread(settings['factor'])
    if settings.get('type') == 'longrope' and settings['factor'] is not None and settings['factor'] > 1:
        return math.sqrt(1 + math.log(settings['factor']) / math.log(settings['original_length']))
    return 1.0


def _spread(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


# ---------------------------------------------------------------- the types


def linear(inv_freq: Float[Tensor, 'p'], settings: dict[str, Any], base: float, dim: int) -> Tensor:
    """Positions divided by the factor, https://arxiv.org/abs/2306.15595."""
    return inv_freq / float(settings['factor'])


def yarn(inv_freq: Float[Tensor, 'p'], settings: dict[str, Any], base: float, dim: int) -> Tensor:
    """Slow pairs are interpolated, fast ones are left, those between are mixed, https://arxiv.org/abs/2309.00071."""

    def pair_with(rotations: float) -> float:
        """The pair that turns so many times over the original length."""
        return dim * math.log(settings['original_length'] / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_with(settings['beta_fast']), pair_with(settings['beta_slow'])
    if settings['truncate']:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if high == low else high
    pairs = torch.arange(inv_freq.shape[0], device=inv_freq.device, dtype=inv_freq.dtype)
    interpolated = ((pairs - low) / (high - low)).clamp(0, 1)
    return inv_freq * (1 - interpolated) + inv_freq / float(settings['factor']) * interpolated


def llama3(inv_freq: Float[Tensor, 'p'], settings: dict[str, Any], base: float, dim: int) -> Tensor:
    """Wavelengths longer than a part of the original length are stretched, short ones left, https://arxiv.org/abs/2407.21783."""
    low, high = float(settings['low_freq_factor']), float(settings['high_freq_factor'])
    waves = float(settings['original_length']) * inv_freq / (2 * math.pi)
    kept = ((waves - low) / (high - low)).clamp(0, 1)
    return inv_freq * kept + inv_freq / float(settings['factor']) * (1 - kept)


CHANGES: dict[str, Callable[[Tensor, dict[str, Any], float, int], Tensor]] = {'linear': linear, 'yarn': yarn, 'llama3': llama3}
