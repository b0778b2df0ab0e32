"""Whether a net fits an objective: inputs it needs but never receives, and whether it attends to its targets.

Asked of our own models only; what a net of the user's own does is its own affair.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.flags.attention import AttentionFlags
from x_transformers.flags.base import FlagError
from x_transformers.flags.feedforward import FeedForwardFlags
from x_transformers.flags.rule import Rule, broken_rules, how_many, refused_in
from x_transformers.flags.stack import StackFlags
from x_transformers.flags.wrapper import WrapperFlags
from x_transformers.flags.wrapper_rules import ALONE_RULES, OnStack
from x_transformers.helpers import values_known
from x_transformers.notices import warn_inert, written

# rules of a net whose outputs are predictions of single tokens
PER_TOKEN_RULES = refused_in(WrapperFlags, 'per token')

# rules of a net that is given nothing but tokens
TOLD_NOTHING_RULES = (*ALONE_RULES, *refused_in(WrapperFlags, 'told nothing'))


# what passes something from token to token by the order of the rows, whatever their positions and the mask say
BY_ORDER = (
    *(f'attn_{name}' for name in AttentionFlags.self_only()),
    *(f'attn_{name}' for name in AttentionFlags.having('row_order')),
    *(f'ff_{name}' for name in FeedForwardFlags.having('row_order')),
    *StackFlags.having('row_order'),
)

# rules of a stack that is given the same tokens twice in one row
TWICE_RULES = (
    Rule(
        BY_ORDER,
        lambda flags, dim: how_many(flags, BY_ORDER) > 0,
        'this needs the rows of one sequence, and here each token stands in two, told apart by positions and a mask only',
        {'shift_tokens': 1},
        'Leave it out.',
        only_changed=True,
    ),
    Rule(
        ('rotary_scaling',),
        lambda flags, dim: flags.rotary_by_length,
        'these frequencies depend on how long a sequence is, and here each token stands in two rows',
        {'rotary_pos_emb': True, 'rotary_scaling': {'type': 'dynamic', 'factor': 2.0, 'original_length': 4}},
        'Choose another one.',
    ),
)

# the same of the model around it
TWICE_MODEL_RULES = (
    *refused_in(WrapperFlags, 'twice'),
    Rule(
        ('randomized_positions',),
        lambda both, dim: both.randomized_positions is not None,
        'positions are given here, and none are drawn',
        {'randomized_positions': 32},
        'Leave it out.',
        inert=True,
    ),
)


def both_of(net: Any) -> OnStack | None:
    """The flags of one of our models and its stack; None for all others."""
    flags, stack = getattr(net, 'flags', None), getattr(getattr(net, 'attn_layers', None), 'flags', None)
    known = isinstance(stack, StackFlags) and hasattr(flags, 'flag_fields')
    return OnStack(flags, stack) if known else None


def check_net(
    net: Any,
    where: str,
    *,
    name: str = 'net',
    per_token: bool = True,
    told_nothing: bool = False,
    adds_expert_loss: bool = False,
    reads_later_tokens: bool = False,
    needs: Sequence[str] = (),
    of_tokens: bool = True,
) -> None:
    """Raise FlagError for what is no model, and for flags with which an objective can never run.

    ``of_tokens``: it reads ids, which a stack by itself does not.
    """
    check_module(net, where, name)
    check_bare(net, where, name, of_tokens)
    check_added_losses(net, where, name=name, needs=needs, experts=not adds_expert_loss, later_tokens=not reads_later_tokens)
    rules = (*(PER_TOKEN_RULES if per_token else ()), *(TOLD_NOTHING_RULES if told_nothing else ()))
    check_rules(rules, net, where, f'{name} has ')


def check_bare(net: nn.Module, where: str, name: str, of_tokens: bool) -> None:
    """Raise FlagError for an objective in place of its net, a stack in place of a model around it, a model of other inputs.

    A model of ours that reads anything but ids says so in ``reads``.
    """
    kind = type(net).__name__
    ours = type(net).__module__.startswith(f'{__package__.partition(".")[0]}.')
    if ours and hasattr(net, 'generate') and isinstance(getattr(net, 'net', None), nn.Module):
        raise FlagError(f'{where}: {name} must be a net that gives logits, got the objective {kind}. Give its .net.')
    if ours and hasattr(net, 'generate') and not hasattr(net, 'net'):
        raise FlagError(f'{where}: {name} must be a net that gives logits, got a {kind}, which is an objective. It needs none.')
    other = getattr(net, 'reads', None) if ours else None
    if other is not None and (of_tokens or other != 'vectors'):
        raise FlagError(
            f'{where}: {name} must be a model that reads {"tokens" if of_tokens else "vectors"}, got a {kind}, which reads '
            f'{other}. Give a {"TransformerWrapper" if of_tokens else "ContinuousTransformerWrapper"}.'
        )
    if of_tokens and isinstance(getattr(net, 'flags', None), StackFlags):
        raise FlagError(
            f'{where}: {name} must be a model that reads tokens, got a {kind}, a stack. '
            f'Give TransformerWrapper(num_tokens=..., max_seq_len=..., attn_layers={kind}(...)).'
        )


def check_module(net: Any, where: str, name: str = 'net', needs: Sequence[str] = ()) -> None:
    """Raise FlagError for what is no model: None, a class, or a module without the attributes that are read here."""
    kind = f'the class {net.__name__}' if isinstance(net, type) else repr(net) if net is None else f'a {type(net).__name__}'
    if not isinstance(net, nn.Module):
        raise FlagError(f'{where}: {name} must be a model, a torch Module, got {kind}. Build the model and give that.')
    if absent := [each for each in needs if not hasattr(net, each)]:
        raise FlagError(
            f'{where}: {name} must have the attributes {", ".join(needs)}, as models of this package have, got {kind} without '
            f'{", ".join(absent)}. Give it such a model, or set them on your own.'
        )


def check_rules(rules: Iterable[Rule], net: Any, where: str, subject: str = '') -> None:
    """Ask those rules whose flags a net has: one error for all that are broken, a warning for what does nothing."""
    both = both_of(net)
    if both is None:
        return
    known = {*both.own.flag_fields(), *both.stack.flag_fields()}
    applicable = [rule for rule in rules if all(flag in known for flag in rule.flags)]
    if sentences := broken_rules(applicable, both, both.stack.dim, written):
        raise FlagError(*(f'{where}: {subject}{sentence}' for sentence in sentences))
    warn_inert(where, broken_rules(applicable, both, both.stack.dim, written, inert=True))


def check_twice(net: Any, where: str) -> None:
    """Raise FlagError for flags that go wrong where each token stands in two rows, one behind the other."""
    both = both_of(net)
    if both is not None and (sentences := broken_rules(TWICE_RULES, both.stack, both.stack.dim, written)):
        raise FlagError(*(f'{where}: `attn_layers` of net has {sentence}' for sentence in sentences))
    check_rules(TWICE_MODEL_RULES, net, where, 'net has ')


def expert_loss(net: Any) -> bool:
    """Whether a net, or a stack, has experts that give a loss in training."""
    flags = getattr(getattr(net, 'attn_layers', net), 'flags', None)
    return isinstance(flags, StackFlags) and flags.expert_loss


def has_added_losses(net: Any) -> bool:
    """Whether a net has losses of its own, of experts or of later tokens, that ``AutoregressiveWrapper`` alone adds."""
    return expert_loss(net) or getattr(net, 'multi_token_heads', 1) > 1


def check_added_losses(
    net: Any,
    where: str,
    *,
    name: str = 'net',
    needs: Sequence[str] = (),
    experts: bool = True,
    later_tokens: bool = True,
) -> None:
    """Raise FlagError for what is no model, and for experts or heads of later tokens whose loss an objective would not add."""
    check_module(net, where, name, needs)
    if later_tokens:
        check_later_tokens(net, where)
    if experts and expert_loss(net):
        raise FlagError(
            f"{where}: `{written('ff_router_balance')}` must be 'bias' or 'none' and "
            f'`{written("ff_router_z_loss_weight")}` 0, got experts with a loss, which AutoregressiveWrapper alone adds. '
            "Set `ff_router_balance='bias'`."
        )


def check_later_tokens(net: Any, where: str) -> None:
    """Raise FlagError for heads of later tokens that an objective would not train."""
    heads = getattr(net, 'multi_token_heads', 1)
    if heads > 1:
        raise FlagError(
            f'{where}: `{written("multi_token_heads")}` must be 1, got {heads}: the heads of later tokens are trained by '
            'AutoregressiveWrapper alone. Leave it out.'
        )


def check_alone(stack: Any, where: str, *, context: bool = False) -> None:
    """Raise FlagError for a stack that needs more than its input; ``context``: it is given another sequence."""
    check_added_losses(stack, where)
    rules = [rule for rule in ALONE_RULES if not (context and 'cross_attend' in rule.flags)]
    if sentences := broken_rules(rules, stack.flags, stack.dim, written):
        raise FlagError(*(f'{where}: {sentence}' for sentence in sentences))


# ---------------------------------------------------------------- the future


def sees_future(net: Any) -> bool:
    """Whether one of our own stacks shows tokens what comes after them. Nothing is said of classes that forward otherwise."""
    from x_transformers.layers.stack import AttentionLayers
    from x_transformers.stack_wrapper import StackWrapper

    stack = getattr(net, 'attn_layers', None)
    if not isinstance(net, StackWrapper) or not isinstance(stack, AttentionLayers) or stack.is_causal:
        return False
    if not type(net).forward.__module__.startswith('x_transformers.') or 'forward' in vars(net):
        return False
    if not type(stack).forward.__module__.startswith('x_transformers.') or 'forward' in vars(stack):
        return False
    shifts = any(layer.shift > 0 for layer in stack.plan.layers)
    return stack.flags.has_self_attention or shifts


def check_future(net: Any, keywords: Mapping[str, Any], where: str, *, allowed: bool) -> None:
    """Raise FlagError if a net would be trained to predict tokens that it sees, and ``attn_mask`` does not hide them."""
    if allowed or not sees_future(net) or keywords.get('attn_bias') is not None or hides_future(keywords.get('attn_mask')):
        return
    raise FlagError(
        f'{where}: net must not see the tokens that it is to predict, but its stack is an {type(net.attn_layers).__name__}, '
        'in which every token sees all others. Use a Decoder, give a causal attn_mask, or set allow_future=True.'
    )


def hides_future(mask: Any) -> bool:
    """Whether a mask (True: may look) shows no query a key behind it."""
    if not isinstance(mask, Tensor) or mask.ndim < 2 or mask.dtype != torch.bool:
        return False
    if not values_known(mask):
        return True
    # keys in front of the tokens come first
    return not bool(mask.triu(1 + mask.shape[-1] - mask.shape[-2]).any())
