"""Check flags against all rules: one error that names every broken one, one warning that names every flag without effect.

Most rules stand at the fields (``rules_of``); those about the parts of a stack together are rows in ``stack_rules.py``. Two
more kinds follow from the fields: a number out of its range, which is an error, and a sub-option without its parent, which has
no effect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from x_transformers.attention.attend import ORDER
from x_transformers.attention.refusals import fused_refusals
from x_transformers.flags.attention import AttentionFlags
from x_transformers.flags.base import FlagError, Flags
from x_transformers.flags.feedforward import FeedForwardFlags
from x_transformers.flags.parts import SET_BY_STACK
from x_transformers.flags.rule import Name, Rule, broken_rules, orphans, out_of_range, rules_of
from x_transformers.flags.stack import StackFlags
from x_transformers.flags.stack_rules import SAME_IN_ALL_LAYERS, STACK_RULES
from x_transformers.flags.vision import VisionFlags
from x_transformers.flags.wrapper_rules import ALONE_RULES, OnStack, grid_refusals
from x_transformers.layers.plan import plan_layers
from x_transformers.notices import warn_inert, written


def check_attention(flags: AttentionFlags, dim: int, prefix: str = '', *, where: str = 'Attention') -> None:
    """Raise FlagError if the flags of an attention layer of width ``dim`` break a rule."""

    def name(flag: str) -> str:
        return written(prefix + flag)

    refuse(broken_attention(flags, dim, name))
    warn_inert(where, inert_attention(flags, dim, name))


def check_feedforward(flags: FeedForwardFlags, dim: int, prefix: str = '', *, where: str = 'FeedForward') -> None:
    """Raise FlagError if the flags of a feed-forward layer of width ``dim`` break a rule."""

    def name(flag: str) -> str:
        return written(prefix + flag)

    refuse(broken_feedforward(flags, dim, name))
    warn_inert(where, inert_feedforward(flags, dim, name))


def check_stack(flags: StackFlags, where: str = 'AttentionLayers') -> None:
    """Raise FlagError if the flags of a stack, those of its parts included, break a rule."""
    if not flags.varying:
        refuse(broken_stack(flags))
    else:
        refuse([*broken_rules(SAME_IN_ALL_LAYERS, flags, flags.dim, written), *broken_layers(flags)])
    check_plan(flags)
    warn_inert(where, inert_stack(flags) if not flags.varying else inert_layers(flags))


def broken_stack(flags: StackFlags, kinds: str = 'acf') -> list[str]:
    """What is wrong with a stack, and with its layers of these ``kinds``."""
    broken = [*out_of_range(flags, written).values(), *broken_rules(STACK_RULES, flags, flags.dim, written)]
    return broken + broken_parts(flags, kinds)


def broken_parts(flags: StackFlags, kinds: str) -> list[str]:
    broken = []
    if 'a' in kinds and (flags.has_self_attention or not flags.has_cross_attention):
        broken += broken_attention(flags.attention, flags.dim, stack_name('attn_'))
    if 'c' in kinds and flags.has_cross_attention:
        broken += broken_attention(flags.cross_attention, flags.dim, cross_name(flags))
    if 'f' in kinds:
        broken += broken_feedforward(flags.feedforward, flags.dim, stack_name('ff_'))
    return broken


def broken_layers(flags: StackFlags) -> list[str]:
    """What is wrong in single layers. Of a part's rule, the layers are named that break it, unless all of its kind do."""
    sentences: list[str] = []
    kinds = flags.kinds
    for kind in 'acf':
        layers_of_sentence: dict[str, list[int]] = {}
        layers = [index for index, its in enumerate(kinds) if its == kind]
        # a part without a layer may have flags that nothing can be done with
        for index, own in [(index, flags.layer(index)) for index in layers] or [(-1, flags)]:
            sentences += broken_stack(own, '')
            for sentence in broken_parts(own, kind):
                layers_of_sentence.setdefault(sentence, []).append(index)
        for sentence, where in layers_of_sentence.items():
            named = f'In layer{"s" * (len(where) > 1)} {", ".join(map(str, where))}: '
            sentences.append(sentence if len(where) >= len(layers) else named + sentence)
    return sentences


def check_wrapper(flags: Flags, stack: StackFlags, *, where: str = 'TransformerWrapper', left_to_right: bool = False) -> None:
    """Raise FlagError if the flags of a model break a rule, by themselves or with the flags of its stack."""
    both = [OnStack(flags, layer, left_to_right) for layer in (stack.by_layer if stack.varying else (stack,))]
    rules = rules_of_model(type(flags))
    broken = (sentence for each in both for sentence in broken_rules(rules, each, stack.dim, written))
    refuse([*out_of_range(flags, written).values(), *broken])
    idle = in_all(broken_rules(rules, each, stack.dim, written, inert=True) for each in both)
    warn_inert(where, [*orphans(flags, written), *idle])


def rules_of_model(cls: type[Flags]) -> list[Rule]:
    """The rules of a model around a stack. A field shared with another model may bring rules about flags that are not here."""
    return [rule for rule in rules_of(cls) if all(name in cls.flag_fields() or is_stack_flag(name) for name in rule.flags)]


def check_vision(flags: VisionFlags, stack: StackFlags, where: str = 'ViTransformerWrapper') -> None:
    """Raise FlagError if the flags of an image model break a rule."""
    refuse(
        [
            *out_of_range(flags, written).values(),
            *broken_rules(rules_of(VisionFlags), flags, stack.dim, written),
            *grid_refusals(flags, stack),
            *broken_rules(ALONE_RULES, stack, stack.dim, written),
        ]
    )
    warn_inert(where, orphans(flags, written))


# ---------------------------------------------------------------- the parts of a check


def refuse(sentences: Iterable[str]) -> None:
    """Raise one error with all sentences, each once; with none, do nothing."""
    sentences = list(dict.fromkeys(sentences))
    if sentences:
        raise FlagError(*sentences)


def broken_attention(flags: AttentionFlags, dim: int, name: Name) -> list[str]:
    broken = [*out_of_range(flags, name).values(), *broken_rules(rules_of(AttentionFlags), flags, dim, name)]
    # the scores that residual attention hands on are the stack's affair
    broken += fused_refusals(flags, ORDER, name)
    return broken


def inert_attention(
    flags: AttentionFlags, dim: int, name: Name, skip: Callable[[str, tuple[str, ...]], bool] = lambda flag, parents: False
) -> list[str]:
    return [*orphans(flags, name, skip), *broken_rules(rules_of(AttentionFlags), flags, dim, name, inert=True)]


def broken_feedforward(flags: FeedForwardFlags, dim: int, name: Name) -> list[str]:
    return [*out_of_range(flags, name).values(), *broken_rules(rules_of(FeedForwardFlags), flags, dim, name)]


def inert_feedforward(flags: FeedForwardFlags, dim: int, name: Name) -> list[str]:
    return [*orphans(flags, name), *broken_rules(rules_of(FeedForwardFlags), flags, dim, name, inert=True)]


def in_all(lists: Iterable[list[str]]) -> list[str]:
    """The sentences that are said every time."""
    first, *rest = [*lists] or [[]]
    return [sentence for sentence in first if all(sentence in other for other in rest)]


def inert_layers(flags: StackFlags) -> list[str]:
    """A sentence for each flag that does nothing in any layer of its kind, of a stack whose layers differ."""
    kinds = flags.kinds
    inert = in_all(inert_stack(flags.layer(index), '') for index in range(len(kinds)))
    for kind in 'acf':
        layers = [index for index, its in enumerate(kinds) if its == kind]
        inert += in_all(inert_parts(flags.layer(index), kind) for index in layers) if layers else inert_parts(flags, kind)
    return inert


def inert_stack(flags: StackFlags, kinds: str = 'acf') -> list[str]:
    """A sentence for each flag of a stack, and of its layers of these ``kinds``, that does nothing."""

    def spelt_out(flag: str, parents: tuple[str, ...]) -> bool:
        # layers that are spelt out may be cross attention without cross_attend
        return 'cross_attend' in parents and flags.has_cross_attention

    inert = [*orphans(flags, written, spelt_out), *broken_rules(STACK_RULES, flags, flags.dim, written, inert=True)]
    return inert + inert_parts(flags, kinds)


def inert_parts(flags: StackFlags, kinds: str) -> list[str]:
    inert: list[str] = []
    if 'a' in kinds and flags.has_self_attention:
        inert += inert_attention(flags.attention, flags.dim, stack_name('attn_'))
    elif 'a' in kinds and not flags.has_cross_attention:
        inert += without_part(flags.attention, 'attn_', 'attention', "a layer 'a'", flags.attn_given)
    if 'c' in kinds and flags.has_cross_attention:

        def taken_over(flag: str, parents: tuple[str, ...]) -> bool:
            # attn_qk_norm_scale is no mistake where cross_attn_qk_norm=False turns off only what was taken over
            return flag not in flags.cross_given and any(parent in flags.cross_given for parent in parents)

        inert += inert_attention(flags.cross_attention, flags.dim, cross_name(flags), taken_over)
    elif 'c' in kinds:
        inert += without_part(flags.cross_attention, 'cross_attn_', 'cross attention', 'cross_attend', flags.cross_given)
    if 'f' in kinds and flags.has_feedforward:
        inert += inert_feedforward(flags.feedforward, flags.dim, stack_name('ff_'))
    elif 'f' in kinds:
        inert += without_part(flags.feedforward, 'ff_', 'feed-forward', "a layer 'f'", flags.ff_given)
    return inert


def without_part(part: Flags, prefix: str, kind: str, way: str, given: Iterable[str]) -> list[str]:
    """One sentence for the flags of a part that the stack does not have."""
    names = [f'`{stack_name(prefix)(name)}`' for name in sorted(given) if part.is_changed(name)]
    way = f'`{written(way)}`' if way.isidentifier() else way
    return [f'{", ".join(names)}: there is no {kind}. Set {way}, or leave this out.'] if names else []


def cross_name(flags: StackFlags) -> Name:
    """The name of a flag of cross attention as it was given: with ``cross_attn_``, or with ``attn_`` for both."""
    usual = 'cross_attn_' if flags.cross_given else 'attn_'

    def name(flag: str) -> str:
        if flag in flags.cross_given:
            return written(f'cross_attn_{flag}')
        if flags.cross_attention.is_changed(flag) or flag in SET_BY_STACK:
            return stack_name('attn_')(flag)
        return written(usual + flag)

    return name


def check_plan(flags: StackFlags) -> None:
    """Raise FlagError if the layers cannot be laid out."""
    plan = plan_layers(flags)
    if flags.unet_skips and all(layer.skip_from is None for layer in plan.layers):
        refuse(['`unet_skips=True`: with fewer than two blocks there is nothing to skip. Choose a larger `depth`.'])


def is_stack_flag(name: str) -> bool:
    """Whether a stack has this flag, by the name that it has in the stack or in one of its parts."""
    return name in StackFlags.flag_fields() or name in AttentionFlags.flag_fields()


def stack_name(prefix: str) -> Name:
    """The name of a part's flag in its stack: a few have no prefix, because the stack sets them."""
    return lambda flag: written(flag if prefix == 'attn_' and flag in SET_BY_STACK else prefix + flag)


__all__ = [
    'check_attention',
    'check_feedforward',
    'check_stack',
    'check_vision',
    'check_wrapper',
]
