"""Check flags against all rules and raise one error that names every broken one.

The rules are rows in ``attention_rules.py``, ``stack_rules.py`` and ``wrapper_rules.py``; two more kinds follow from the fields
themselves: a number out of its range, and a sub-option without its parent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from x_transformers.attention.attend import fused_refusals
from x_transformers.flags.attention import AttentionFlags
from x_transformers.flags.attention_rules import ATTENTION_RULES, FEEDFORWARD_RULES
from x_transformers.flags.base import FlagError, Flags
from x_transformers.flags.feedforward import FeedForwardFlags
from x_transformers.flags.parts import SET_BY_STACK
from x_transformers.flags.rule import Name, Rule, broken_rules, is_on, orphans, out_of_range
from x_transformers.flags.stack import StackFlags
from x_transformers.flags.stack_rules import SAME_IN_ALL_LAYERS, STACK_RULES
from x_transformers.flags.wrapper import VisionFlags
from x_transformers.flags.wrapper_rules import ON_STACK_RULES, VISION_RULES, WRAPPER_RULES, OnStack
from x_transformers.layers.plan import plan_layers


def check_attention(flags: AttentionFlags, dim: int, prefix: str = '') -> None:
    """Raise FlagError if the flags of an attention layer of width ``dim`` break a rule."""
    refuse(broken_attention(flags, dim, lambda name: prefix + name))


def check_feedforward(flags: FeedForwardFlags, dim: int, prefix: str = '') -> None:
    """Raise FlagError if the flags of a feed-forward layer of width ``dim`` break a rule."""
    refuse(broken_feedforward(flags, dim, lambda name: prefix + name))


def check_stack(flags: StackFlags) -> None:
    """Raise FlagError if the flags of a stack, those of its parts included, break a rule."""
    if not flags.varying:
        refuse(broken_stack(flags))
    else:
        refuse([*broken_rules(SAME_IN_ALL_LAYERS, flags, flags.dim, str), *broken_layers(flags)])
    broken_plan(flags)


def broken_stack(flags: StackFlags, kinds: str = 'acf') -> list[str]:
    """What is wrong with a stack, and with its layers of these ``kinds``."""
    broken = [*out_of_range(flags, str).values(), *orphans(flags, str), *broken_rules(STACK_RULES, flags, flags.dim, str)]
    return broken + broken_parts(flags, kinds)


def broken_parts(flags: StackFlags, kinds: str) -> list[str]:
    broken = []
    if 'a' in kinds and (flags.has_self_attention or not flags.has_cross_attention):
        broken += broken_attention(flags.attention, flags.dim, stack_name('attn_'))
    if 'c' in kinds:
        broken += broken_cross_attention(flags)
    if 'f' in kinds:
        broken += broken_feedforward(flags.feedforward, flags.dim, stack_name('ff_'))
    return broken


def broken_layers(flags: StackFlags) -> list[str]:
    """What is wrong in single layers. Of a part's rule, the layers are named that break it, unless all of its kind do."""
    said: list[str] = []
    kinds = flags.kinds
    for kind in 'acf':
        found: dict[str, list[int]] = {}
        layers = [index for index, its in enumerate(kinds) if its == kind]
        # a part without a layer may have flags that nothing can be done with
        for index, own in [(index, flags.layer(index)) for index in layers] or [(-1, flags)]:
            said += broken_stack(own, '')
            for sentence in broken_parts(own, kind):
                found.setdefault(sentence, []).append(index)
        for sentence, where in found.items():
            named = f'In layer{"s" * (len(where) > 1)} {", ".join(map(str, where))}: '
            said.append(sentence if len(where) >= len(layers) else named + sentence)
    return said


def check_wrapper(flags: Flags, stack: StackFlags, rules: Iterable[Rule] = ()) -> None:
    """Raise FlagError if the flags of a model break a rule, by themselves or with the flags of its stack.

    Of the rules of ``TransformerWrapper`` those are asked whose flags the model has; ``rules`` are the model's own.
    """
    own = flags.flag_fields()
    general = [rule for rule in WRAPPER_RULES if all(name in own for name in rule.flags)]
    on_stack = [rule for rule in ON_STACK_RULES if all(name in own or is_stack_flag(name) for name in rule.flags)]
    refuse(
        [
            *out_of_range(flags, str).values(),
            *orphans(flags, str),
            *broken_rules([*general, *rules], flags, stack.dim, str),
            *(
                sentence
                for layer in (stack.by_layer if stack.varying else (stack,))
                for sentence in broken_rules(on_stack, OnStack(flags, layer), stack.dim, str)
            ),
        ]
    )


def check_vision(flags: VisionFlags, stack: StackFlags) -> None:
    """Raise FlagError if the flags of an image model break a rule."""
    refuse([*out_of_range(flags, str).values(), *orphans(flags, str), *broken_rules(VISION_RULES, flags, stack.dim, str)])


# ---------------------------------------------------------------- the parts of a check


def refuse(sentences: Iterable[str]) -> None:
    """Raise one error with all sentences, each once; with none, do nothing."""
    sentences = list(dict.fromkeys(sentences))
    if sentences:
        raise FlagError(*sentences)


def broken_attention(
    flags: AttentionFlags, dim: int, name: Name, skip: Callable[[str, tuple[str, ...]], bool] = lambda flag, parents: False
) -> list[str]:
    broken = [
        *out_of_range(flags, name).values(),
        *orphans(flags, name, skip),
        *broken_rules(ATTENTION_RULES, flags, dim, name),
    ]
    # the scores that residual attention hands on are the stack's affair
    broken += fused_refusals(flags, name)
    return broken


def broken_feedforward(flags: FeedForwardFlags, dim: int, name: Name) -> list[str]:
    return [*out_of_range(flags, name).values(), *orphans(flags, name), *broken_rules(FEEDFORWARD_RULES, flags, dim, name)]


def broken_cross_attention(flags: StackFlags) -> list[str]:
    if not flags.has_cross_attention:
        given = ', '.join(f'`cross_attn_{name}`' for name in sorted(flags.cross_given) if is_on(flags.cross_attention, name))
        return [f'{given}: there is no cross attention. Set `cross_attend`, or leave this out.'] if given else []
    usual = 'cross_attn_' if flags.cross_given else 'attn_'

    def name(flag: str) -> str:
        if flag in flags.cross_given:
            return f'cross_attn_{flag}'
        if flags.cross_attention.is_changed(flag) or flag in SET_BY_STACK:
            return stack_name('attn_')(flag)
        return usual + flag

    def taken_over(flag: str, parents: tuple[str, ...]) -> bool:
        # attn_qk_norm_scale is no mistake where cross_attn_qk_norm=False turns off only what was taken over
        return flag not in flags.cross_given and any(parent in flags.cross_given for parent in parents)

    return broken_attention(flags.cross_attention, flags.dim, name, taken_over)


def broken_plan(flags: StackFlags) -> None:
    """Raise FlagError if the layers cannot be laid out."""
    plan = plan_layers(flags)
    if flags.unet_skips and all(layer.skip_from is None for layer in plan.layers):
        refuse(['`unet_skips=True`: with fewer than two blocks there is nothing to skip. Choose a larger `depth`.'])


def is_stack_flag(name: str) -> bool:
    """Whether a stack has this flag, by the name that it has in the stack or in one of its parts."""
    return name in StackFlags.flag_fields() or name in AttentionFlags.flag_fields()


def stack_name(prefix: str) -> Name:
    """The name of a part's flag in its stack: a few have no prefix, because the stack sets them."""
    return lambda flag: flag if prefix == 'attn_' and flag in SET_BY_STACK else prefix + flag


__all__ = [
    'check_attention',
    'check_feedforward',
    'check_stack',
    'check_vision',
    'check_wrapper',
]
