"""From flags to the model to train: a byte-level language model with its next-token loss."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from x_transformers.flags.base import FlagError, Flags
from x_transformers.flags.fit import PER_TOKEN_RULES
from x_transformers.flags.presets import PRESETS
from x_transformers.flags.stack import StackFlags
from x_transformers.flags.wrapper import WrapperFlags
from x_transformers.flags.wrapper_rules import ALONE_RULES
from x_transformers.notices import InertFlagWarning, unlogged
from x_transformers.training.errors import TrainingError

if TYPE_CHECKING:
    from x_transformers.autoregressive_wrapper import AutoregressiveWrapper

NUM_BYTES = 256

# a small model with the habits of today; whoever names a flag changes just that one
SIZES: dict[str, Any] = {'dim': 192, 'depth': 5, 'heads': 3}
USUAL_PRESET = 'quickstart'
QUICKSTART: dict[str, Any] = {**SIZES, **PRESETS[USUAL_PRESET].flags}

# flags that ask for something that a byte-level language model is not given, or that take away what it needs: those that no
# model alone with its tokens has, and some that are refused for the data's sake
UNFIT = {
    **{name: rule.why for rule in (*PER_TOKEN_RULES, *ALONE_RULES) for name in rule.flags},
    'only_cross': 'there is no other sequence to attend to here',
    'embed_num_tokens': 'the data hold nothing but bytes',
    'squeeze_out_last_dim': 'the loss needs logits for every byte',
    'attn_flash_pack_seq': 'each row holds one sequence',
}


def default_flag(name: str) -> Any:
    """The default of one of these flags; False for those of parts."""
    return next((cls.default(name) for cls in (WrapperFlags, StackFlags) if name in cls.flag_fields()), False)


def check_fit(flags: Mapping[str, Any], vocabulary: int = NUM_BYTES) -> None:
    """Refuse flags that no language model over so many tokens can have."""
    for name, reason in UNFIT.items():
        if flags.get(name, default_flag(name)) != default_flag(name):
            raise TrainingError(f'--{name.replace("_", "-")} does not fit a language model over bytes: {reason}')
    if flags.get('logits_dim') not in (None, vocabulary):
        raise TrainingError(f'--logits-dim must be {vocabulary}, the size of the vocabulary, got {flags["logits_dim"]}.')
    for name in ('attn_dim_out', 'ff_dim_out'):
        if flags.get(name) not in (None, flags.get('dim')):
            raise TrainingError(
                f'--{name.replace("_", "-")} must be the --dim of the model, for the result is added to its input'
            )


def split_flags(flags: Mapping[str, Any], model: type[Flags] = WrapperFlags) -> tuple[dict[str, Any], dict[str, Any]]:
    """(keywords of the model around a stack, of which ``model`` are the flags, and keywords of the stack)."""
    own = model.flag_fields()
    return (
        {name: value for name, value in flags.items() if name in own},
        {name: value for name, value in flags.items() if name not in own},
    )


def build_network(flags: Mapping[str, Any], vocabulary: int = NUM_BYTES) -> nn.Module:
    """``TransformerWrapper(Decoder)``; ``flags`` are the keywords of both, flat, with ``max_seq_len``.

    Errors: ``FlagError`` for flags that exclude each other, ``TrainingError`` for those that make no language model.
    """
    from x_transformers import Decoder, TransformerWrapper

    check_fit(flags, vocabulary)
    wrapper, stack = split_flags(flags)
    missing = [name for name in ('dim', 'depth') if stack.get(name) is None]
    if missing:
        raise TrainingError(f'the flags of the model must hold {" and ".join(missing)}, got {sorted(flags)}.')
    with warnings.catch_warnings():
        # flags come from a stored configuration or from the default model, too: see refuse_inert for those that were typed
        warnings.simplefilter('ignore', InertFlagWarning)
        network: nn.Module = TransformerWrapper(num_tokens=vocabulary, attn_layers=Decoder(**stack), **wrapper)
    return network


def refuse_inert(flags: Mapping[str, Any], typed: Collection[str]) -> None:
    """Refuse flags that somebody typed and that have no effect.

    Errors: ``FlagError`` with the sentences about them.
    """
    from x_transformers import Decoder, TransformerWrapper

    if not typed or flags.get('dim') is None or flags.get('depth') is None:
        return
    wrapper, stack = split_flags(flags)
    with warnings.catch_warnings(record=True) as caught, torch.device('meta'), unlogged():
        warnings.simplefilter('always', InertFlagWarning)
        TransformerWrapper(num_tokens=NUM_BYTES, attn_layers=Decoder(**stack), **wrapper)
    told = [str(warning.message) for warning in caught if issubclass(warning.category, InertFlagWarning)]
    found = [text for text in told if any(f'`{name}`' in text for name in typed)]
    if found:
        raise FlagError(*found)


def build_model(flags: Mapping[str, Any], vocabulary: int = NUM_BYTES) -> AutoregressiveWrapper:
    """``AutoregressiveWrapper`` around the network: token ids (b n) in, loss out."""
    from x_transformers import AutoregressiveWrapper

    return AutoregressiveWrapper(build_network(flags, vocabulary))


def network_of(model: nn.Module) -> nn.Module:
    net = model.net
    if not isinstance(net, nn.Module):
        raise TypeError(f'{type(model).__name__}.net must be a module, but is a {type(net).__name__}')
    return net


def reading_arguments(model: nn.Module) -> dict[str, Any]:
    """Keywords that the network of a language model needs when it is evaluated or writes, and draws itself in training."""
    net = getattr(model, 'net', None)
    return {'recycle_steps': net.train_max_recycle_steps} if getattr(net, 'recycling', False) else {}  # type: ignore[union-attr]


def device_of(model: nn.Module) -> torch.device:
    """Where a model is; parameters without numbers are on other processes."""
    return next(p.device for p in model.parameters() if not p.is_meta)


def choose_device(name: str) -> torch.device:
    """``auto``: the first accelerator there is, else the CPU."""
    if name == 'auto':
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device('cpu')
    try:
        device = torch.device(name)
        probe: Tensor = torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise TrainingError(f'--device {name} cannot be used here: {str(error).splitlines()[0]}') from error
    return probe.device
