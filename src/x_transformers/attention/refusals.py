"""Refusals of score flags: the rules that they break, and the flags that no fused kernel supports."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from x_transformers.attention.scores.base import Form, ScoreRule
from x_transformers.attention.weights import Softmax
from x_transformers.flags.attention import AttentionFlags
from x_transformers.flags.rule import broken_rules, out_of_range, rules_of
from x_transformers.flags.scores import AttendFlags, ScoreFlags

Order = Sequence[type[ScoreRule]]


def broken_attend(flags: AttendFlags, order: Order) -> list[str]:
    """A sentence for everything that is wrong with ``Attend``'s flags; ``order`` holds all score rules."""
    known = AttendFlags.flag_fields()
    rules = [rule for rule in rules_of(AttentionFlags) if all(name in known for name in rule.flags)]
    wrong = [*out_of_range(flags, str).values(), *broken_rules(rules, flags, 0, str), *fused_refusals(flags, order)]
    if flags.heads is None:
        missing = dict.fromkeys(rule.name for rule in order if rule.per_head and rule.is_on(flags))
        wrong += [f'`{name}` needs `heads`: it has parameters for each head. Give `heads`, too.' for name in missing]
    return wrong


def fused_refusals(flags: ScoreFlags, order: Order, name: Callable[[str], str] = str) -> list[str]:
    """Why no fused kernel can do what flags with ``flash`` ask for; empty if one can, or if none is demanded.

    A position bias is no reason, learned or not: it is added to the scores as a mask is.
    """
    if not flags.flash:
        return []
    reasons: dict[str, None] = {}
    for rule in order:
        if not rule.is_on(flags):
            continue
        if rule.unfused is not None:
            reasons[f'`{name(rule.name)}` needs the score matrix ({rule.unfused})'] = None
        elif flags.dropout > 0 and not_with_dropout(rule):
            reasons[f'`{name(rule.name)}` together with `{name("dropout")}` needs the score matrix'] = None
    return [f'`{name("flash")}=True` is not available: {reason}. Leave out one of them.' for reason in reasons]


def not_with_dropout(rule: type[ScoreRule]) -> bool:
    """Whether only those fused kernels carry a rule that have no dropout: all but torch's own attention."""
    return rule.form in (Form.POINTWISE, Form.WHOLE) or (rule.form is Form.WEIGHTS and rule is not Softmax)
