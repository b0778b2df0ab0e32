"""Write the pictures in docs/masks.md, each drawn from the mask that attention itself would use, and the table of arguments."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from x_transformers.attention.geometry import ScoreShape
from x_transformers.attention.mask import Mask, PackedSequences
from x_transformers.embedding.call import OF_MODELS

PATH = Path(__file__).parent.parent / 'docs/masks.md'
N = 6
FULL = ScoreShape(N, N)
STARTS = torch.tensor([0, 2, 6])


def padding(*lengths: int) -> Tensor:
    return torch.arange(N) < torch.tensor(lengths)[:, None]


# name of the picture: (mask, geometry)
PICTURES: dict[str, tuple[Mask, ScoreShape]] = {
    'encoder': (Mask(), FULL),
    'causal': (Mask(causal=True), FULL),
    'padding': (Mask(causal=True, keys=padding(6, 4)), FULL),
    'left padding': (Mask(causal=True, keys=torch.arange(N) >= torch.tensor([[0], [2]])), FULL),
    'window': (Mask(causal=True, past=2), FULL),
    'window in an encoder': (Mask(past=2), FULL),
    'window on both sides': (Mask(past=2, ahead=1), FULL),
    'prefix': (Mask(causal=True, prefix=torch.tensor([2, 4])), FULL),
    'dense': (Mask(causal=True, dense=torch.eye(N, dtype=torch.bool) | (torch.arange(N) % 2 == 0)), FULL),
    'packed': (Mask(causal=True, packed=PackedSequences(STARTS, STARTS)), FULL),
    'memory keys': (Mask(causal=True), ScoreShape(N, N + 2, 2)),
    'mems': (Mask(causal=True), ScoreShape(N, N + 3)),
    'cache': (Mask(causal=True), ScoreShape(2, N)),
}


def drawn(mask: Mask, geometry: ScoreShape) -> str:
    """One grid per row of the batch, side by side: queries go down, keys to the right."""
    allowed = mask.rendered(geometry)
    if allowed is None:
        allowed = torch.ones(1, 1, geometry.queries, geometry.keys, dtype=torch.bool)
    grids = [row[0].expand(geometry.queries, geometry.keys) for row in allowed]
    return '\n'.join(
        '     '.join(' '.join('■' if seen else '·' for seen in grid[query].tolist()) for grid in grids)
        for query in range(geometry.queries)
    )


def table() -> str:
    """One row for each argument of a call that has axes, from its declaration."""
    lines = ['| argument | axes | says | in front of the tokens | may cover |', '| --- | --- | --- | --- | --- |']
    for name, each in OF_MODELS.items():
        forms = ', '.join(f'({form.strip()})' for form in each.axes.split('|'))
        forms += f'; of floats ({each.floating.replace(" | ", "), (")})' if each.floating else ''
        front = 'given too' if each.with_front else '' if each.front is None else f'`{each.front}`'
        covers = (
            '' if not (each.has('n') or each.has('i')) else 'new tokens, or all' if each.past == 'all' else 'the tokens of x'
        )
        needs = f' Needs `{each.needs}`.' if each.needs else ''
        lines.append(f'| `{name}` | {forms} | {each.says}{needs} | {front} | {covers} |')
    return '\n'.join(lines)


def generated() -> str:
    """The text of the file, with its pictures drawn anew."""

    def picture(found: re.Match[str]) -> str:
        return f'<!-- picture: {found[1]} -->\n```text\n{drawn(*PICTURES[found[1]])}\n```'

    text = re.sub(r'<!-- picture: ([\w ]+) -->\n```text\n.*?```', picture, PATH.read_text(encoding='utf-8'), flags=re.DOTALL)
    block = re.compile(r'(<!-- arguments with axes -->\n).*?(<!-- end of arguments with axes -->)', re.DOTALL)
    return block.sub(lambda found: f'{found[1]}{table()}\n{found[2]}', text)


if __name__ == '__main__':
    PATH.write_text(generated(), encoding='utf-8')
    print(f'wrote {PATH}')
