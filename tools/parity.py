"""Write the table of docs/hugging_face.md: how far our models are from those of transformers."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
PAGE = ROOT / 'docs/hugging_face.md'


def shown(gap: float) -> str:
    return '0' if gap == 0 else f'{gap:.0e}'.replace('e-0', 'e-')


def row(case: object) -> str:
    from tests.hf.published import cache_gap, export_gap, greedy, half_gap, import_gap, left_gap

    theirs, model, gap = import_gap(case)
    halves = ' / '.join(map(shown, half_gap(theirs)))
    cells = [case.name, shown(gap), shown(export_gap(theirs, model)), halves]
    if case.writes:
        same, ties = greedy(theirs, model)
        cells += [
            shown(left_gap(theirs, model)),
            shown(cache_gap(theirs, model)),
            f'same, {ties}' if same else f'other, {ties}',
        ]
    else:
        cells += ['', '', '']
    return f'| {" | ".join(cells)} |'


def main() -> None:
    from tests.hf.published import CASES

    warnings.filterwarnings('ignore')
    names = ('model', 'import', 'export', 'bfloat16', 'left padding', 'cache', 'greedy')
    head = [f'| {" | ".join(names)} |', f'| {" | ".join("---" for _ in names)} |']
    table = '\n'.join([*head, *(row(case) for case in CASES)])
    text = PAGE.read_text(encoding='utf-8')
    before, _, rest = text.partition('<!-- parity -->\n')
    behind = rest.partition('<!-- /parity -->')[2]
    text = f'{before}<!-- parity -->\n{table}\n<!-- /parity -->{behind}'
    PAGE.write_text(text, encoding='utf-8')
    print(table)


if __name__ == '__main__':
    main()
