"""The HTML report of an experiment: one file with its pictures inside, light and dark, for screens and paper."""

# ruff: noqa: E501 (a template has the lines that it has)

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from x_transformers.evidence.experiment import Outcome
from x_transformers.evidence.findings import Findings, confidence_band, number, probability, signed, verdict_words
from x_transformers.training.errors import TrainingError

CLASSES = {'helps': 'helps', 'hurts': 'hurts', 'no difference': 'same', 'not resolved': 'open', 'failed': 'failed'}
CURVES = 6
"""Ideas whose curves are drawn, per task: those that differ most."""

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --ink: #1a1c1f; --soft: #5d646d; --line: #d9dde2; --paper: #ffffff; --panel: #f5f6f8;
  --helps: #0067a3; --hurts: #b84c00; --same: #6b7280; --open: #6f7782; --c0: #1a1c1f; --c1: #0072b2; --c2: #d55e00; --c3: #009e73;
  --c4: #cc79a7; --c5: #b8860b; --c6: #56b4e9; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #a0a7b0; --line: #3a4048; --paper: #15181c; --panel: #1e2228;
  --helps: #5cb8f2; --hurts: #ff9a52; --same: #a0a7b0; --open: #8b939d; --c0: #e6e8eb; --c1: #5cb8f2; --c2: #ff9a52; --c3: #3ddbb0;
  --c4: #e7a5ca; --c5: #f0c649; --c6: #9bd7f7; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 80rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
p { margin: .4rem 0; max-width: 46rem; }
.forest svg { min-width: 34rem; max-width: 56rem; }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .8rem; font-variant-numeric: tabular-nums; min-width: 100%; }
th, td { text-align: right; padding: .3rem; border-bottom: 1px solid var(--line); white-space: nowrap; vertical-align: top; }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child, .word { text-align: left; }
td:first-child { white-space: normal; min-width: 8rem; max-width: 18rem; overflow-wrap: anywhere; }
td.word { white-space: normal; min-width: 6.5rem; } td.verdict { min-width: 9.5rem; }
.helps { color: var(--helps); font-weight: 600; } .hurts { color: var(--hurts); font-weight: 600; } .same { color: var(--same); }
.open { color: var(--open); } .failed { color: var(--ink); font-style: italic; }
figure { margin: 1rem 0; } svg { display: block; max-width: 100%; height: auto; font: 12px system-ui, sans-serif; }
svg text { fill: var(--ink); } svg .name { paint-order: stroke; stroke: var(--paper); stroke-width: 4px; } svg .tick { fill: var(--soft); } svg .axis { stroke: var(--line); }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)); gap: 1rem; }
@media (max-width: 26rem) { .pair { grid-template-columns: 1fr; } body { padding: 1rem .75rem 2rem; } }
pre { background: var(--panel); border: 1px solid var(--line); padding: .75rem; white-space: pre-wrap; overflow-wrap: anywhere;
  font-size: .8rem; border-radius: 4px; }
nav { font-size: .9rem; columns: 14rem; } a { color: var(--helps); }
@media print { :root { color-scheme: light; --ink: #000; --soft: #444; --line: #bbb; --paper: #fff; --panel: #eee; --helps: #0067a3;
  --hurts: #b84c00; --same: #555; --open: #666; --c0: #000; --c1: #0072b2; --c2: #d55e00; --c3: #009e73; --c4: #cc79a7; --c5: #b8860b;
  --c6: #56b4e9; } tr, svg, h2 { break-inside: avoid; break-after: auto; } h2 { break-after: avoid; }
  body { max-width: none; font-size: 10pt; padding: 0; } .wide { overflow: visible; } table { font-size: 6.3pt; }
  th, td { padding: 1.5pt 3pt; } td.word { min-width: 0; } td.verdict { white-space: nowrap; }
  td:nth-child(n+10):nth-child(-n+12), th:nth-child(n+10):nth-child(-n+12) { display: none; } .pair { grid-template-columns: 1fr 1fr; }
  .forest svg { min-width: 0; max-width: 34rem; } nav { display: none; } }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p class="soft">{{ runs }} runs and timings are finished{% if missing %}, {{ missing }} are missing{% endif %}{% if date %} ({{ date }}){% endif %}.
Seeds are paired: an idea and the baseline share the data, its order, the evaluation rows, and the initial value of each
parameter with the same name. Intervals are 95 % intervals. p is corrected for the number of ideas of a task (Holm).</p>
{% for note in notes %}<p>{{ note }}</p>
{% endfor %}
{% if tasks | length > 1 %}<nav>{% for task in tasks %}<a href="#t{{ loop.index }}">{{ task.name }}</a><br>{% endfor %}</nav>{% endif %}
{% for task in tasks %}
<section id="t{{ loop.index }}">
<h2>{{ task.name }}: {{ task.metric }} <span class="soft">({{ task.better }} is better)</span></h2>
<div class="wide"><table>
<thead><tr><th>idea</th><th class="word">verdict</th><th>difference</th><th>95 % interval</th><th>p (Holm)</th><th class="word">at equal time</th>
<th>time</th><th>baseline</th><th>idea’s</th><th>parameters</th><th>FLOPs/token</th><th>MB/step</th><th>seeds</th></tr></thead>
<tbody>
{% for row in task.rows %}<tr><td>{{ row.idea }}</td>{% if row.kind == 'failed' %}<td class="word failed" colspan="12">{{ row.words }}</td></tr>
{% else %}<td class="word verdict {{ row.kind }}">{{ row.words }}</td><td>{{ row.difference }}</td>
<td>{{ row.interval }}</td><td title="uncorrected: {{ row.p }}">{{ row.p_holm }}</td>
<td class="word {{ row.second_kind }}">{{ row.second }}</td><td>{{ row.time }}</td><td>{{ row.baseline }}</td><td>{{ row.arm }}</td><td>{{ row.parameters }}</td><td>{{ row.flops }}</td>
<td>{{ row.bytes }}</td><td>{{ row.seeds }}</td></tr>
{% endif %}{% endfor %}</tbody></table></div>
<figure><div class="wide forest">{{ task.forest | safe }}</div><figcaption>Differences from the baseline with 95 % intervals. Right of the line is better. A difference
inside the grey band is too small to matter (δ).</figcaption></figure>
<div class="pair">
<figure>{{ task.curves | safe }}<figcaption>{{ task.metric[0] | upper }}{{ task.metric[1:] }}: the mean over seeds, with a band from the lowest to the highest. Shown are the ideas that differ most.</figcaption></figure>
<figure>{{ task.cost | safe }}<figcaption>Horizontal: the time of a step, where the baseline takes 1. Vertical: the difference from the baseline. Higher is better.</figcaption></figure>
</div>
</section>
{% endfor %}
<h2>How to repeat this</h2>
{% if command %}<p>The command:</p><pre>{{ command }}</pre>{% endif %}
<p>Every option:</p><pre>{{ options }}</pre>
</body>
</html>
"""


def render(report: Findings) -> str:
    try:
        from jinja2 import Environment
    except ImportError as error:
        raise TrainingError("the page needs jinja2: pip install 'x-transformers[ablate]'") from error
    about = report.about
    template = Environment(autoescape=True, trim_blocks=True).from_string(TEMPLATE)
    return template.render(
        title=about.get('title') or default_title(report),
        runs=report.runs,
        missing=report.missing,
        date=about.get('date'),
        notes=report.notes(),
        tasks=[task_values(report, task) for task in report.tasks()],
        command=about.get('command'),
        options=json.dumps(about.get('questions', {}), indent=2, default=list),
    )


def default_title(report: Findings) -> str:
    ideas = list(dict.fromkeys(outcome.idea for outcome in report.outcomes))
    comma = '; ' if any(',' in idea for idea in ideas) else ', '
    shown = comma.join(ideas) if len(ideas) <= 4 else f'{len(ideas)} ideas'
    verb = 'Does' if len(ideas) == 1 else 'Do'
    return f'{verb} {shown} help on {", ".join(report.tasks())}?'


def task_values(report: Findings, task: str) -> dict[str, Any]:
    these = [outcome for outcome in report.outcomes if outcome.task == task]
    return {
        'name': task,
        'metric': these[0].metric,
        'better': these[0].better,
        'rows': [row_values(outcome) for outcome in these],
        'forest': forest(these),
        'curves': curves(report, task, these),
        'cost': cost_plane(these),
    }


def row_values(outcome: Outcome) -> dict[str, str]:
    row = outcome.row()
    second = outcome.per_second.verdict if outcome.per_second else None
    return {
        'idea': outcome.idea,
        'baseline': number(outcome.baseline),
        'arm': number(outcome.arm),
        'difference': signed(row.get('difference')),
        'interval': '–' if row.get('low') is None else f'{signed(row["low"])} … {signed(row["high"])}',
        'p': probability(row.get('p')),
        'p_holm': probability(row.get('p_holm')),
        'words': verdict_words(outcome),
        'kind': CLASSES[outcome.verdict],
        'second': second or '–',
        'second_kind': CLASSES[second] if second else '',
        'time': f'{row["time"]:.2f} ×' if 'time' in row else '–',
        'parameters': f'{row["parameters"]:,.0f}' if 'parameters' in row else '–',
        'flops': f'{row["flops"]:,.0f}' if 'flops' in row else '–',
        'bytes': f'{row["bytes"] / 1e6:.1f}' if 'bytes' in row else '–',
        'seeds': str(row['seeds']),
    }


# ---------------------------------------------------------------- pictures


def escape(text: str) -> str:
    return text.replace('&', '&amp;').replace('<', '&lt;').replace('>', '&gt;').replace('"', '&quot;')


def abbreviated(text: str, most: int) -> str:
    return text if len(text) <= most else f'{text[: most - 1].rstrip(" ,")}…'


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between two ends."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    step = 10 ** math.floor(math.log10(raw))
    step *= next(factor for factor in (1, 2, 5, 10) if factor * step >= raw)
    first = math.ceil(low / step)
    return [step * i for i in range(first, math.floor(high / step) + 1)]


def limits(values: Sequence[float], share: float = 0.06) -> tuple[float, float]:
    low, high = min(values), max(values)
    space = (high - low) * share or abs(low) * share or 1.0
    return low - space, high + space


def forest(outcomes: Sequence[Outcome]) -> str:
    shown = [(o, c) for o in outcomes if (c := o.comparison) and math.isfinite(c.low)]
    if not shown:
        return '<p class="soft">There are no intervals yet. An interval needs two seeds.</p>'
    margin = next((o.margin for o in outcomes if o.margin is not None), 0.0)
    # one hopeless interval must not squeeze all others: what is wider than the rest is cut, with an arrow
    spread = sorted(max(abs(c.low), abs(c.high)) for _, c in shown)
    reach = max(abs(c.mean) for _, c in shown) * 1.25
    reach = max(reach, min(spread[-1], 2 * spread[len(spread) // 2]), 1.5 * margin) or 1.0
    name_width = min(230, 20 + 7 * max(len(o.idea) for o, _ in shown))
    wide, row, top = 760, 22, 8
    right, tall = wide - 20, top + row * len(shown) + 34

    def x(value: float) -> float:
        return name_width + (max(-reach, min(reach, value)) + reach) / (2 * reach) * (right - name_width)

    bottom = top + row * len(shown)
    parts = [f'<svg viewBox="0 0 {wide} {tall}" role="img" aria-label="differences with intervals">']
    if margin:
        band = f'width="{x(margin) - x(-margin):.1f}" height="{row * len(shown)}" fill="var(--panel)"'
        parts.append(f'<rect x="{x(-margin):.1f}" y="{top}" {band}/>')
    for value in ticks(-reach, reach, 6):
        parts.append(f'<line class="axis" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{top}" y2="{bottom}"/>')
        parts.append(f'<text class="tick" x="{x(value):.1f}" y="{bottom + 16}" text-anchor="middle">{signed(value)}</text>')
    parts.append(f'<line x1="{x(0):.1f}" x2="{x(0):.1f}" y1="{top}" y2="{bottom}" stroke="var(--ink)"/>')
    for place, (outcome, found) in enumerate(shown):
        y, colour = top + row * (place + 0.5), f'var(--{CLASSES[outcome.verdict]})'
        parts.append(
            f'<text x="{name_width - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(abbreviated(outcome.idea, 34))}</text>'
        )
        title = f'{outcome.idea}: {signed(found.mean)} ({signed(found.low)} … {signed(found.high)}), {outcome.verdict}'
        parts.append(f'<g><title>{escape(title)}</title>')
        parts.append(
            f'<line x1="{x(found.low):.1f}" x2="{x(found.high):.1f}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2.5"/>'
        )
        for end, sign in ((found.low, -1), (found.high, 1)):
            if abs(end) > reach:
                parts.append(f'<path d="M{x(end) + sign * 6:.1f} {y} l{-sign * 7} -4 v8 z" fill="{colour}"/>')
        parts.append(f'<circle cx="{x(found.mean):.1f}" cy="{y}" r="4.5" fill="{colour}"/></g>')
    return ''.join([*parts, '</svg>'])


def frame(
    low: float, high: float, left: float, right: float, wide: int, tall: int, names: tuple[str, str]
) -> tuple[Any, Any, list[str]]:
    """(x, y, the drawing so far) of a plot with axes; the box is inside 58 ... wide - 12, 10 ... tall - 40."""

    def x(value: float) -> float:
        return 58 + (value - left) / (right - left) * (wide - 70)

    def y(value: float) -> float:
        return tall - 40 - (value - low) / (high - low) * (tall - 50)

    parts = [f'<svg viewBox="0 0 {wide} {tall}" role="img" aria-label="{names[1]} over {names[0]}">']
    for value in ticks(low, high):
        parts.append(f'<line class="axis" x1="58" x2="{wide - 12}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text class="tick" x="52" y="{y(value) + 4:.1f}" text-anchor="end">{number(value, 3)}</text>')
    for value in ticks(left, right):
        text = number(value, 4)
        # a long number under the right end would be cut off there
        middle = min(x(value), wide - 4 * len(text))
        parts.append(f'<text class="tick" x="{middle:.1f}" y="{tall - 24}" text-anchor="middle">{text}</text>')
    parts.append(f'<text class="tick" x="{(58 + wide - 12) / 2}" y="{tall - 6}" text-anchor="middle">{names[0]}</text>')
    return x, y, parts


def curves(report: Findings, task: str, outcomes: Sequence[Outcome]) -> str:
    drawn = sorted((o for o in outcomes if o.curves), key=lambda o: -abs(o.comparison.mean) if o.comparison else 0.0)
    lines = [('baseline', confidence_band(report.baseline_curves.get(task, [])))]
    lines += [(outcome.idea, confidence_band(outcome.curves)) for outcome in drawn[:CURVES]]
    lines = [(name, band) for name, band in lines if band]
    if not lines:
        return '<p class="soft">No run is finished.</p>'
    low, high = limits([value for _, band in lines for point in band for value in point[2:]])
    wide, tall = 480, 300 + 16 * len(lines)
    x, y, parts = frame(low, high, 0, max(band[-1][0] for _, band in lines), wide, 300, ('steps', outcomes[0].metric))
    parts[0] = parts[0].replace(f'0 0 {wide} 300', f'0 0 {wide} {tall}')
    for index, (name, band) in enumerate(lines):
        colour = f'var(--c{index})'
        upper = [f'{x(s):.1f},{y(h):.1f}' for s, _, _, h in band]
        lower = [f'{x(s):.1f},{y(lo):.1f}' for s, _, lo, _ in reversed(band)]
        parts.append(f'<polygon points="{" ".join(upper + lower)}" fill="{colour}" opacity=".12"/>')
        line = ' '.join(f'{x(s):.1f},{y(m):.1f}' for s, m, _, _ in band)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="{2.4 if index == 0 else 1.6}"/>')
        at = 312 + 16 * index
        parts.append(f'<line x1="58" x2="78" y1="{at - 4}" y2="{at - 4}" stroke="{colour}" stroke-width="2.5"/>')
        parts.append(f'<text x="84" y="{at}">{escape(name)}</text>')
    return ''.join([*parts, '</svg>'])


def cost_plane(outcomes: Sequence[Outcome]) -> str:
    points = [(o, o.row()['time'], c.mean) for o in outcomes if (c := o.comparison) and o.cost is not None]
    if not points:
        return '<p class="soft">There are no timings.</p>'
    low, high = limits([0.0, *(mean for _, _, mean in points)])
    left, right = limits([1.0, *(time for _, time, _ in points)])
    wide, tall = 480, 300
    x, y, parts = frame(low, high, left, right, wide, tall, ('time of a step, baseline = 1', 'better by'))
    parts.append(f'<line x1="58" x2="{wide - 12}" y1="{y(0):.1f}" y2="{y(0):.1f}" stroke="var(--ink)"/>')
    parts.append(f'<line x1="{x(1):.1f}" x2="{x(1):.1f}" y1="10" y2="{tall - 40}" stroke="var(--ink)"/>')
    # names stand where there is room: the ideas that differ most have theirs written, the others show it under the pointer
    named = {id(o) for o, _, _ in sorted(points, key=lambda point: -abs(point[2]))[:8]}
    taken: list[tuple[float, float]] = []
    for outcome, time, mean in points:
        colour = f'var(--{CLASSES[outcome.verdict]})'
        title = f'{outcome.idea}: {signed(mean)} at {time:.2f} × the time'
        parts.append(
            f'<circle cx="{x(time):.1f}" cy="{y(mean):.1f}" r="4.5" fill="{colour}"><title>{escape(title)}</title></circle>'
        )
        if id(outcome) in named and all(abs(x(time) - a) > 90 or abs(y(mean) - b) > 13 for a, b in taken):
            taken.append((x(time), y(mean)))
            end = x(time) > wide - 140
            at = x(time) + (-8 if end else 8)
            anchor = 'end' if end else 'start'
            parts.append(
                f'<text x="{at:.1f}" y="{y(mean) + 4:.1f}" text-anchor="{anchor}" class="name">{escape(abbreviated(outcome.idea, 24))}</text>'
            )
    return ''.join([*parts, '</svg>'])
