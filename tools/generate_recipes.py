"""Write the tables of docs/recipes.md and docs/evidence.md from the results that are kept beside them."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from kept import DOCS, RECIPES, Kept, recipes, suites

from x_transformers.cache.kv_cache import KVCache
from x_transformers.cli.evidence import row_of, table
from x_transformers.evidence.experiment import Experiment, Outcome, Question
from x_transformers.evidence.findings import number, probability, signed, verdict_words
from x_transformers.evidence.suites import SUITES
from x_transformers.evidence.tasks.data import ByteText
from x_transformers.flags.presets import PRESETS

PAGES = {name: DOCS / f'{name}.md' for name in ('recipes', 'evidence')}


def blocks() -> dict[str, str]:
    """What stands between the marks of a page, by the name of the mark."""
    found = {f'recipe {kept.name}': recipe_table(kept) for kept in recipes()}
    found |= {f'suite {kept.name}': suite_table(kept) for kept in suites()}
    return found | {'presets': preset_table()}


def preset_table() -> str:
    lines = ['| preset | description | flags |', '| --- | --- | --- |']
    for name, made in PRESETS.items():
        flags = ', '.join(f'{flag}={value!r}' for flag, value in made.flags.items())
        lines.append(f'| `{name}` | {made.says} | `{flags}` |')
    return '\n'.join(lines)


def recipe_table(kept: Kept) -> str:
    made, parts = kept.as_shown(), []
    for asked in made.questions:
        parts += [f'*{asked.title[0].upper()}{asked.title[1:]}:*'] if len(made.questions) > 1 else []
        parts.append(question_table(made, asked))
    runs = [line for line in kept.lines().values() if 'seed' in line]
    wanted = sum(asked.seeds * (len(asked.arms) + 1) for asked in made.questions)
    dates = sorted({line['date'] for line in runs})
    done = f'{len(runs)} of {wanted} runs ({dates[-1]})' if dates else f'0 of {wanted} runs'
    seeds = next((o.comparison.seeds for o in made.outcomes({}) if o.comparison), 0)
    said = f'{done}, {seeds} paired seeds, {made.questions[0].settings.steps} steps'
    return '\n\n'.join([*parts, f'{said}: `x-transformers ablate docs/recipes/{kept.name}.toml`.'])


def question_table(made: Experiment, asked: Question) -> str:
    outcomes, task = made.answer(asked, {}), asked.the_task()
    cached = isinstance(task, ByteText)
    columns = ('difference, 95 % interval', 'p (Holm)', 'verdict', 'at equal time', 'time')
    head = ['idea', f'{task.metric} ({task.better} is better)', *columns, *(['cache'] if cached else [])]
    first = next((o for o in outcomes if o.baseline is not None), None)
    cells = ['baseline', '–' if first is None else number(first.baseline), '', '', '', '', '1 ×']
    lines = ['| ' + ' | '.join(head) + ' |', '|' + ' --- |' * len(head)]
    lines.append('| ' + ' | '.join([*cells, *([cache_of(asked, asked.base)] if cached else [])]) + ' |')
    for outcome, arm in zip(outcomes, asked.arms, strict=True):
        row = [outcome.idea, *cells_of(outcome), *([cache_of(asked, asked.flags_of(arm))] if cached else [])]
        lines.append('| ' + ' | '.join(row) + ' |')
    return '\n'.join(lines)


def cells_of(outcome: Outcome) -> list[str]:
    row = outcome.row()
    if outcome.comparison is None and not outcome.failed:
        return ['–', '–', '–', 'not run', '–', '–']
    interval = '' if row.get('low') is None else f' ({signed(row["low"])} … {signed(row["high"])})'
    second = outcome.per_second.verdict if outcome.per_second else '–'
    time = f'{row["time"]:.2f} ×' if 'time' in row else '–'
    return [
        number(outcome.arm),
        f'{signed(row.get("difference"))}{interval}',
        probability(row.get('p_holm')),
        verdict_words(outcome),
        second,
        time,
    ]


def cache_of(asked: Question, flags: dict[str, Any] | Any) -> str:
    """Kilobytes that are kept of one row of training while it is written byte by byte."""
    task: Any = asked.the_task()
    network: Any = task.model(flags).net.eval()
    ids = torch.zeros(1, task.length, dtype=torch.long)
    with torch.no_grad():
        _, intermediates = network(ids, return_intermediates=True)
        cache = KVCache.of(intermediates)
        limit = network.attn_layers.flags.layer(0).attention.max_attend_past
        if cache is None:
            return 'none'
        # what lies behind every window is not looked at again
        share = 1.0 if limit is None else min(1.0, (limit + 1) / task.length)
    return f'{share * cache.bytes() / 1000:.1f} kB'


def suite_table(kept: Kept) -> str:
    suite, made = SUITES[kept.name](), kept.as_shown()
    rows = [row_of(made, q, entry.published) for q, entry in zip(made.questions, suite.entries, strict=True)]
    lines = [f'{suite.about} [paper]({suite.paper}). {suite.reduced}', '', table(rows, markdown=True), '']
    ran = sum(row['seeds'] for row in rows)
    dates = sorted({line['date'] for line in kept.lines().values()})
    when = f' ({dates[-1]})' if dates else ''
    lines.append(f'{ran} of {len(rows) * made.questions[0].seeds} runs are done{when}: `x-transformers evidence {kept.name}`.')
    pairs = zip(rows, suite.entries, strict=True)
    apart = [sentence for row, entry in pairs if (sentence := difference(row, entry.why))]
    return '\n'.join([*lines, *(['', *apart] if apart else [])])


def difference(row: dict[str, Any], why: str) -> str:
    """Whether a published number lies outside of our interval, and why as far as it is known."""
    if row['low'] is None:
        return ''
    outside = [value for value in row['published'].values() if not row['low'] <= value <= row['high']]
    found = ', '.join(f'{value:g}' for value in outside)
    lies = 'lies' if len(outside) == 1 else 'lie'
    why = why or 'Beside the reduced sizes, we do not know why.'
    return f'* {row["row"]}: published {found} {lies} outside our interval. {why}' if outside else ''


def filled(text: str, made: dict[str, str]) -> str:
    """A page with its marks filled in."""

    def fill(found: re.Match[str]) -> str:
        return f'<!-- {found[1]} -->\n{made[found[1]]}\n<!-- end -->'

    return re.sub(r'<!-- ((?:recipe|suite) [\w-]+|presets) -->\n.*?<!-- end -->', fill, text, flags=re.DOTALL)


def main() -> None:
    made = blocks()
    for page in PAGES.values():
        page.write_text(filled(page.read_text(encoding='utf-8'), made), encoding='utf-8')
        print(f'wrote {page}')


if __name__ == '__main__':
    main()


__all__ = ['RECIPES', 'blocks', 'filled']
