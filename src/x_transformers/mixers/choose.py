"""The choice of the module for a layer 'm'."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from x_transformers.flags.base import FlagError
from x_transformers.layers.slots import broken_promise, has_state
from x_transformers.mixers.linear import NAMED

if TYPE_CHECKING:
    from x_transformers.flags.stack import StackFlags


def make_mixer(flags: StackFlags) -> nn.Module:
    """The mixer of one layer, of its flags: one of ours by its name, or whatever the caller's own class or function makes.

    Raises FlagError if it cannot be made, or does not follow the protocol.
    """
    mixer: str | Callable[..., Any] | None = flags.mixer
    settings: Mapping[str, Any] = flags.mixer_kwargs
    if mixer is None:
        raise FlagError("`mixer` must be given with 'm' in `custom_layers`: it says what these layers are. Name one.")
    if isinstance(mixer, str):
        usual = {'heads': flags.heads, 'zero_init_output': flags.zero_init_branch_output}
        mixer, settings = NAMED[mixer], {**usual, **settings}
    try:
        module = mixer(flags.dim, **settings)
    except (TypeError, ValueError) as error:
        raise FlagError(f'`mixer` must be made of the width and `mixer_kwargs`, got {type(error).__name__}: {error}') from error
    if not isinstance(module, nn.Module) or not has_state(module):
        raise FlagError(
            f'`mixer` must make modules with forward(x, state) -> (y, state), got {type(module).__name__}. '
            'Give its forward a keyword `state`, which is None at first.'
        )
    if type(module) not in NAMED.values() and (wrong := tried(module, flags.dim)) is not None:
        raise FlagError(f'`mixer`: {wrong}')
    return module


def tried(mixer: nn.Module, dim: int) -> str | None:
    """What is wrong with what it returns for two rows of zeros, if it runs where it is: some have kernels for a GPU alone."""
    like = next((p for p in mixer.parameters() if p.is_floating_point()), torch.empty(0))
    x, modes = torch.zeros(1, 2, dim, device=like.device, dtype=like.dtype), [(each, each.training) for each in mixer.modules()]
    mixer.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            result = mixer(x, None)
    except Exception:
        return None
    finally:
        for each, mode in modes:
            each.training = mode
    return broken_promise(mixer, result, x)
