"""The call of a module in a slot of a layer: the library's own with all arguments, any other with ``x`` alone."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from x_transformers.attention.inputs import Intermediates
from x_transformers.tensor_types import Float

if TYPE_CHECKING:
    from x_transformers.attention.inputs import BranchInputs

Result = tuple[Tensor, Intermediates | None]

# under this name a cache holds the state of a module that follows the protocol
STATE = 'state'


# what a signature may have beside named parameters: any keyword, and a second input
ANY = '**'
SECOND = 'a second input'

# by class. A weak dictionary costs several calls each time, for each layer and token; some libraries make classes without end
_ACCEPTED: dict[type, frozenset[str]] = {}
MOST = 1024


def accepted(forward: Any, bound: bool) -> frozenset[str]:
    """The names of parameters, ``ANY`` and ``SECOND`` if they apply."""
    try:
        parameters = list(inspect.signature(forward).parameters.values())[0 if bound else 1 :]
    except (TypeError, ValueError):
        # written in C or the like: it takes an input, and nothing is known of more
        return frozenset()
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    inputs = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(inputs) > 1 or any(p.kind is p.VAR_POSITIONAL for p in parameters):
        names.add(SECOND)
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        names.add(ANY)
    return frozenset(names)


def class_accepts(kind: type, what: str) -> bool:
    known = _ACCEPTED.get(kind)
    if known is None:
        if len(_ACCEPTED) == MOST:
            _ACCEPTED.clear()
        known = _ACCEPTED[kind] = accepted(kind.forward, bound=False)  # type: ignore[attr-defined]
    return what in known


# what ``torch.compiler.assume_constant_result`` says, which would import the compiler
class_accepts._dynamo_marked_constant = True  # type: ignore[attr-defined]


def accepts(module: nn.Module, what: str) -> bool:
    """Whether ``module.forward`` takes this; a method that somebody put into the object counts, too."""
    own = module.__dict__.get('forward')
    if own is None:
        return class_accepts(type(module), what)
    return what in accepted(own, bound=True)


def wraps(module: nn.Module) -> nn.Module | None:
    """The block inside a foreign module that hands all of its keywords on, or None."""
    return next((child for child in module.children() if takes_around(child)), None)


def takes_around(module: nn.Module) -> bool:
    """Whether it is called with ``around``: it names this keyword, or hands on any to a block of the library."""
    if accepts(module, 'around'):
        return True
    return accepts(module, ANY) and (getattr(type(module), 'hands_on', False) or wraps(module) is not None)


def has_state(module: nn.Module) -> bool:
    """Whether it follows the protocol ``forward(x, state) -> (y, state)``."""
    return accepts(module, STATE)


def broken_promise(module: nn.Module, result: Any, x: Float[Tensor, 'b n d']) -> str | None:
    """What is wrong with what such a forward has returned for ``x``, as a sentence."""
    fits = isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], Tensor)
    if fits and result[0].shape[:2] == x.shape[:2]:
        return None
    return (
        f'{type(module).__name__}.forward must return (y, state) with y of shape ({x.shape[0]}, {x.shape[1]}, …), '
        'as its keyword `state` promises. Return both, the state behind the last row.'
    )


def can_cache(module: nn.Module, kind: str, causal: bool = False) -> bool:
    """Whether a token may be decoded by this branch without running it on those before.

    ``causal``: the branch has to see to it itself that no token sees a later one. What is not said counts as the slot
    suggests: a module in the place of attention mixes tokens, one in the place of a feed-forward does not.
    """
    mixes: bool | None = getattr(module, 'mixes_tokens', None)
    if takes_around(module):
        if causal and kind == 'a' and getattr(module, 'causal', True) is False:
            return False
        says_so: bool | None = getattr(module, 'can_cache_kv', None)
        inside = module.fn if getattr(type(module), 'hands_on', False) else wraps(module)
        if says_so is not None or inside is None:
            return says_so is not False
        return can_cache(inside, kind, causal)  # type: ignore[arg-type]
    return has_state(module) or not (kind != 'f' if mixes is None else mixes)


def split_result(out: tuple[Any, ...]) -> Result:
    """(output, what attention reports) of a branch that returns several things."""
    seen = out[1] if len(out) > 1 else None
    return out[0], seen if isinstance(seen, Intermediates) else None


def call_branch(branch: nn.Module, x: Float[Tensor, '... n d'], around: BranchInputs) -> Any:
    """The branch on x: its output, or (output, Intermediates)."""
    # most classes say so themselves, which is asked first: for each layer and token
    if ('forward' not in branch.__dict__ and class_accepts(type(branch), 'around')) or takes_around(branch):
        return branch(x, around=around)
    if not has_state(branch):
        return branch(x)
    return call_with_state(branch, x, around)


def call_with_state(branch: nn.Module, x: Float[Tensor, 'b n d'], around: BranchInputs) -> Float[Tensor, 'b n d']:
    """A module that follows the protocol, with its state of this execution step.

    Sequences that are packed into one row become rows of their own. A module that takes ``mask`` is told which rows are tokens
    (True); any other reads zeros where there is none, and cannot be given padding on the left, which it would remember.
    """
    past, tokens, packed = around.past, around.tokens, around.packed
    kwargs: dict[str, Any] = {}
    if packed is not None:
        x, tokens = packed.unpacked(x)
    if tokens is not None and accepts(branch, 'mask'):
        kwargs['mask'] = tokens
    elif tokens is not None:
        x = x.masked_fill(~tokens.unsqueeze(-1), 0.0)
    result = branch(x, None if past is None else past.carry.get(STATE), **kwargs)
    if (wrong := broken_promise(branch, result, x)) is not None:
        raise ValueError(wrong)
    out: Tensor = result[0]
    if packed is not None:
        out = packed.packed_again(out)
        return out
    if past is not None:
        past.carry[STATE] = result[1]
        past.carry_axis[STATE] = 0
        # so that a stack without attention knows how many rows it has seen
        past.extend(rows=x.new_zeros(*x.shape[:2], 1, dtype=torch.bool))
    return out


def call_norm(norm: nn.Module | None, x: Float[Tensor, '... d'], condition: Float[Tensor, 'b ... c'] | None) -> Tensor:
    """``norm(x)``, with the condition where there is one that it takes; ``x`` itself without a norm."""
    if norm is None:
        return x
    out: Tensor = norm(x) if condition is None or not takes_condition(norm) else norm(x, condition=condition)
    return out


def takes_condition(norm: nn.Module) -> bool:
    return accepts(norm, 'condition') or accepts(norm, ANY)
