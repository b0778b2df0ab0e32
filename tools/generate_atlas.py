"""Write docs/atlas.md and its heat map from docs/atlas/results.jsonl: every idea on every task, with a verdict."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from kept import ROOT, THE_ATLAS

from x_transformers.evidence.experiment import Arm, Experiment, Outcome
from x_transformers.evidence.findings import number, probability, signed, verdict_words

PAGE, PICTURE = ROOT / 'docs/atlas.md', ROOT / 'docs/assets/atlas.svg'

# what others say of an idea, from their logs; the idea of the atlas that comes nearest
PUBLIC = (
    ('the input and a factor of the stream before each layer', 'stream-and-input-scalars', '+', '+', '+', ''),
    ('value embeddings', 'value-embeddings', '+', '+', '', ''),
    ('logit soft cap', 'logit-soft-cap', '+', '+', 'used', ''),
    ('smear: a gated part of the token before', 'smear', '+', '0, then +', '+', ''),
    ('output gate per head', 'head-gates', '+', '0', '+', 'needed'),
    ('remove the part along the own value', 'exclusive', '+', '+ per step, − per second', '+', '+, slower'),
    ('U-net skips', 'unet-skips', '+', '−', '', ''),
    ('MUDD skips', 'mudd', '+', '', '', ''),
    ('composable heads', 'composable', '+', '', '', ''),
    ('hyper-connections', 'hyper-connections', '+, later replaced', '', '', ''),
    ('attention and feed-forward in parallel', 'parallel-block', '', '', '+', '−, faster'),
    ('bigram-hash embedding', 'bigram-hash', '+', '+, 0 when deeper', '+, dropped', ''),
    ('partial rotary positions (half of the channels)', 'rotary', 'used', '−', '+', 'used'),
    ('dynamic tanh', 'dynamic-tanh', '', '− at every tuning', '', ''),
    ('ReLU²', 'relu-squared', 'used', '+', '+ (leaky)', ''),
    ('SwiGLU', 'swiglu', '', '−', '', '(Shazeer, Narang: +)'),
    ('RMS norm', 'rmsnorm', 'used', 'used', 'used', 'used'),
    ('window in all layers (a pattern there)', 'window', '+', 'default', 'used', ''),
    ('mixture of experts', 'experts', '', '+ per step, − per second', '', 'base'),
)
LOGS = ('modded-nanogpt', 'nanochat log', 'parameter-golf 2026', 'Marin')
COLOURS = {'helps': '#0072b2', 'hurts': '#d55e00', 'no difference': '#8a8f98', 'not resolved': '#c9cdd3', 'failed': '#333333'}
WORDS = {
    'no difference': 'no difference',
    'not resolved': 'not resolved',
    'failed': 'failed',
    'helps': 'helps',
    'hurts': 'hurts',
}


def flags_text(arm: Arm) -> str:
    return ', '.join(f'{name}={value!r}' for name, value in arm.flags.items())


def generated() -> tuple[str, str]:
    """(the page, the picture)."""
    made, lines = THE_ATLAS.as_shown(), list(THE_ATLAS.lines().values())
    outcomes = made.outcomes({})
    by = {(outcome.task, outcome.idea): outcome for outcome in outcomes}
    tasks = [q.title for q in made.questions]
    arms = made.questions[0].arms
    runs = [line for line in lines if 'seed' in line]
    wanted = len(tasks) * (len(arms) + 1) * made.questions[0].seeds
    dates = sorted({line['date'] for line in lines})
    when = '' if not dates else f' ({dates[0]})' if len(dates) == 1 else f' ({dates[0]} to {dates[-1]})'
    done = f'{len(runs)} of {wanted} runs are done{when}'
    text = [
        '# Atlas of ideas',
        '',
        f'This page measures {len(arms)} ideas on {len(tasks)} tasks with {made.questions[0].seeds} paired seeds. A run takes',
        f'seconds. {done}. `make atlas` runs what is missing and writes',
        'this page. `docs/atlas/results.jsonl` stores the results; `docs/atlas/atlas.toml` defines tasks, sizes and ideas.',
        '[ablate.md](ablate.md) explains the verdicts and their calibration.',
        '',
        '**Read with care.** These are small models, trained for a few hundred steps. An idea that helps here is worth a trial',
        'elsewhere, and no more: ranks at two sizes of 1.2 and 3 billion parameters correlate at −0.27',
        '([2605.20798](https://arxiv.org/abs/2605.20798)). With three seeds and so many ideas, p is corrected strictly, and',
        'many ideas stay *not resolved*. Ideas about several widths, such as μP, cannot show an effect at one width:',
        '[recipes.md](recipes.md#a-rate-for-another-width) has the verdict.',
        '',
        '![Every idea on every task](assets/atlas.svg)',
        '',
        '## Tasks',
        '',
        '| task | runs | baseline | σ over seeds | δ | helps | hurts | no difference | not resolved | failed | not run |',
        '| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |',
    ]
    for q in made.questions:
        these = [by[q.title, arm.name] for arm in arms]
        base = next((o.baseline_values for o in these if o.baseline_values), [])
        mean = sum(base) / len(base) if base else None
        sigma = math.sqrt(sum((v - mean) ** 2 for v in base) / (len(base) - 1)) if mean is not None and len(base) > 1 else None
        margin = next((o.margin for o in these if o.margin is not None), None)
        ran = [o for o in these if o.comparison is not None or o.failed]
        counts = [sum(o.verdict == verdict for o in ran) for verdict in COLOURS]
        count = sum(line['task'] == q.title for line in runs)
        cells = (
            *(f'{q.title} ({these[0].metric}, {these[0].better} is better)', count, number(mean), number(sigma, 2)),
            *(number(margin, 2), *counts, len(these) - len(ran)),
        )
        text.append('| ' + ' | '.join(map(str, cells)) + ' |')
    text += [
        '',
        'Where δ is large, because the seeds of the baseline differ by as much, *no difference above δ* says little.',
        *public_table(made, by),
        '',
        '## Ideas',
        '',
        'The command of an idea does its runs and those of the baseline, and has the same differences. Intervals, p and',
        'verdicts of this page are those of all ideas together: their variances are pooled and p is corrected for their',
        'number, so that an idea alone may have a verdict where it has none here. The whole:',
        '`x-transformers ablate docs/atlas/atlas.toml`.',
        '',
    ]
    for arm in arms:
        text += [f'### {arm.name}', '', f'`{flags_text(arm)}`', '', *idea_table([by[task, arm.name] for task in tasks], arm)]
    return '\n'.join(text).rstrip() + '\n', heat_map(made, by)


def public_table(made: Experiment, by: dict[tuple[str, str], Outcome]) -> list[str]:
    tasks = [q.title for q in made.questions]
    about = 'The public verdicts are about language models of other sizes: + helps, − hurts, 0 neither.'
    lines = ['', '## Beside public verdicts', '', about, '']
    lines += ['| idea | ' + ' | '.join(LOGS) + ' | ours |', '|' + ' --- |' * (len(LOGS) + 2)]
    for words, idea, *logs in PUBLIC:
        ours = [f'{task}: {short(by[task, idea])}' for task in tasks if (task, idea) in by]
        lines.append(f'| [{words}](#{idea}) | ' + ' | '.join(logs) + f' | {"; ".join(ours)} |')
    return lines


def short(outcome: Outcome) -> str:
    if outcome.comparison is None and not outcome.failed:
        return 'not run'
    return WORDS[outcome.verdict]


def idea_table(outcomes: Sequence[Outcome], arm: Arm) -> list[str]:
    lines = ['| task | difference | 95 % interval | p (Holm) | verdict | at equal time | time | seeds |', '|' + ' --- |' * 8]
    for outcome in outcomes:
        row = outcome.row()
        if outcome.comparison is None and not outcome.failed:
            lines.append(f'| {outcome.task} | – | – | – | not run | – | – | 0 |')
            continue
        interval = '–' if row.get('low') is None else f'{signed(row["low"])} … {signed(row["high"])}'
        second = outcome.per_second.verdict if outcome.per_second else '–'
        time = f'{row["time"]:.2f} ×' if 'time' in row else '–'
        words = verdict_words(outcome)
        cells = (signed(row.get('difference')), interval, probability(row.get('p_holm')), words, second, time, row['seeds'])
        lines.append(f'| {outcome.task} | ' + ' | '.join(map(str, cells)) + ' |')
    return [*lines, '', f'`x-transformers ablate docs/atlas/atlas.toml --select {arm.name}`', '']


def heat_map(made: Experiment, by: dict[tuple[str, str], Outcome]) -> str:
    """Ideas down, tasks across: the colour says the verdict, the number how many σ of the baseline."""
    tasks, arms = [q.title for q in made.questions], made.questions[0].arms
    left, wide, row, top = 170, 120, 20, 40
    width, height = left + wide * len(tasks) + 12, top + row * len(arms) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for column, task in enumerate(tasks):
        parts.append(f'<text x="{left + wide * (column + 0.5)}" y="26" text-anchor="middle" font-weight="600">{task}</text>')
    for line, arm in enumerate(arms):
        y = top + row * line
        parts.append(f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">{arm.name}</text>')
        for column, task in enumerate(tasks):
            outcome = by[task, arm.name]
            x = left + wide * column
            if outcome.comparison is None and not outcome.failed:
                parts.append(f'<text x="{x + wide / 2}" y="{y + 14}" text-anchor="middle" fill="#999999">not run</text>')
                continue
            colour = COLOURS[outcome.verdict]
            difference = outcome.row().get('difference')
            words = 'failed' if outcome.failed else signed(difference, 2)
            ink = '#1a1c1f' if outcome.verdict == 'not resolved' else '#ffffff'
            title = f'{arm.name} on {task}: {verdict_words(outcome)}'.replace('&', '&amp;').replace('<', '&lt;')
            parts.append(
                f'<g><title>{title}</title>'
                f'<rect x="{x + 1}" y="{y + 1}" width="{wide - 2}" height="{row - 2}" fill="{colour}"/>'
            )
            parts.append(f'<text x="{x + wide / 2}" y="{y + 14}" text-anchor="middle" fill="{ink}">{words}</text></g>')
    x = left
    for verdict, colour in COLOURS.items():
        y = top + row * len(arms) + 14
        parts.append(
            f'<rect x="{x}" y="{y}" width="12" height="12" fill="{colour}"/><text x="{x + 17}" y="{y + 11}">{verdict}</text>'
        )
        x += 30 + 7 * len(verdict)
    return '\n'.join([*parts, '</svg>']) + '\n'


if __name__ == '__main__':
    if not THE_ATLAS.results.exists():
        sys.exit(f'{THE_ATLAS.results.relative_to(ROOT)} is not there: make atlas')
    page, picture = generated()
    PAGE.write_text(page, encoding='utf-8')
    PICTURE.write_text(picture, encoding='utf-8')
    print(f'wrote {PAGE} and {PICTURE}')
    print(json.dumps({'page': str(PAGE.relative_to(ROOT)), 'lines': len(THE_ATLAS.lines())}))
