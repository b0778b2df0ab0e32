"""Pictures of one block under each residual scheme, as SVG that takes the colours of the page around it."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import NamedTuple

GAP, HEIGHT, WIDE, LEFT = 34, 30, 132, 46
ATTENTION, FORWARD = 'attention', 'feed-forward'
# where branches come back to the stream
JOINS = ('+', 'GRU', 'spread')


@dataclass(frozen=True)
class Branch:
    """One way around the stream: boxes from its fork to its join."""

    boxes: tuple[str, ...]


class Scheme(NamedTuple):
    """The flags that give it, its sentence, and from the bottom to the top either boxes on the stream or branches beside it."""

    flags: dict[str, object]
    says: str
    steps: tuple[str | tuple[Branch, ...], ...]
    streams: int = 1


def around(*boxes: str) -> tuple[Branch, ...]:
    return (Branch(boxes),)


SCHEMES: dict[str, Scheme] = {
    'pre-norm': Scheme(
        {}, 'The default: norm in front of each branch, nothing but sums on the stream.',
        (around('norm', ATTENTION), '+', around('norm', FORWARD), '+'),
    ),
    'post-norm': Scheme(
        {'pre_norm': False}, 'As in the first paper: each sum is normed.',
        (around(ATTENTION), '+', 'norm', around(FORWARD), '+', 'norm'),
    ),
    'sandwich norm': Scheme(
        {'sandwich_norm': True}, 'A second norm behind each branch.',
        (around('norm', ATTENTION, 'norm'), '+', around('norm', FORWARD, 'norm'), '+'),
    ),
    'parallel block': Scheme(
        {'parallel_block': True}, 'Both branches read what enters the block, each through its own norm.',
        ((Branch(('norm', ATTENTION)), Branch(('norm', FORWARD))), '+'),
    ),
    'macaron': Scheme(
        {'macaron': True}, 'Half a feed-forward before and half after attention.',
        (around('norm', FORWARD, '× ½'), '+', around('norm', ATTENTION), '+', around('norm', FORWARD, '× ½'), '+'),
    ),
    'scaled residual': Scheme(
        {'scale_residual': True}, 'A learned factor on the stream at each sum.',
        (around('norm', ATTENTION), '× s', '+', around('norm', FORWARD), '× s', '+'),
    ),
    'gated residual': Scheme(
        {'gate_residual': True}, 'A GRU cell takes the place of each sum.',
        (around('norm', ATTENTION), 'GRU', around('norm', FORWARD), 'GRU'),
    ),
    'LayerScale': Scheme(
        {'use_layerscale': True}, 'A learned factor per channel on each branch.',
        (around('norm', ATTENTION, '× γ'), '+', around('norm', FORWARD, '× γ'), '+'),
    ),
    'hyper-connections': Scheme(
        {'num_residual_streams': 4}, 'Several streams: each branch reads a learned mixture of them and writes to all.',
        ('mix', around('norm', ATTENTION), 'spread', 'mix', around('norm', FORWARD), 'spread'), streams=4,
    ),
}  # fmt: skip


def box(x: float, y: float, text: str, width: float = WIDE) -> str:
    return (
        f'<rect x="{x - width / 2:g}" y="{y - HEIGHT / 2:g}" width="{width:g}" height="{HEIGHT}" rx="5" class="box"/>'
        f'<text x="{x:g}" y="{y + 4:g}">{escape(text)}</text>'
    )


def circle(x: float, y: float, text: str) -> str:
    return f'<circle cx="{x:g}" cy="{y:g}" r="11" class="join"/><text x="{x:g}" y="{y + 4.5:g}">{escape(text)}</text>'


def line(*points: tuple[float, float], arrow: bool = False) -> str:
    path = ' '.join(f'{x:g},{y:g}' for x, y in points)
    tip = ' marker-end="url(#tip)"' if arrow else ''
    return f'<polyline points="{path}" class="wire"{tip}/>'


def rise_of(part: str | tuple[Branch, ...], step: float) -> float:
    """How much higher the next part stands; what is beside a branch takes no height of its own."""
    if isinstance(part, tuple):
        return step * max(len(branch.boxes) for branch in part)
    return GAP if part in JOINS else 0.0 if part.startswith('×') else step


def diagram(scheme: Scheme) -> str:
    """The block as SVG: the input at the bottom, the output at the top, the stream on the left."""
    step = HEIGHT + GAP
    rises = [rise_of(part, step) for part in scheme.steps]
    height = sum(rises) + 2 * GAP
    widest = max(len(part) for part in scheme.steps if isinstance(part, tuple))
    width = LEFT + 40 + widest * (WIDE + 18) + 10
    offsets = [7.0 * (n - (scheme.streams - 1) / 2) for n in range(scheme.streams)]
    drawn = [line((LEFT + o, height - 4), (LEFT + o, 8), arrow=n == scheme.streams // 2) for n, o in enumerate(offsets)]
    y = fork = height - GAP
    joins: list[tuple[float, float]] = []
    for part, rise in zip(scheme.steps, rises, strict=True):
        if isinstance(part, tuple):
            fork = y
            for column, branch in enumerate(part):
                x = LEFT + 40 + WIDE / 2 + column * (WIDE + 18)
                drawn.append(line((LEFT, y), (x, y), (x, y - rise)))
                drawn += [box(x, y - rise * (n + 0.5) / len(branch.boxes), name) for n, name in enumerate(branch.boxes)]
                joins.append((x, y - rise))
        elif part in JOINS:
            drawn += [line(join, (LEFT + (12 if part == '+' else 30), join[1]), arrow=True) for join in joins]
            drawn.append(circle(LEFT, y, part) if part == '+' else box(LEFT, y, part, 58))
            joins = []
        else:
            # beside a branch, on the stream that goes past it
            drawn.append(box(LEFT, (fork + y) / 2 if joins else y - rise / 2, part, 58))
        y -= rise
    marker = '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    marker += '<path d="M0 0 L8 4 L0 8 z" class="tip"/></marker></defs>'
    return f'<svg class="block" viewBox="0 0 {width:g} {height:g}" width="{width:g}" role="img">{marker}{"".join(drawn)}</svg>'
