"""Write the table of docs/scaling.md: which kind of parallelism goes with which flag, as the refusals themselves say."""

from __future__ import annotations

from pathlib import Path

from x_transformers.distributed.refusals import KINDS, NOT_BUILT, NOT_PROVEN, REFUSALS

PATH = Path(__file__).parent.parent / 'docs/scaling.md'
BEGIN, END = '<!-- table -->', '<!-- end of table -->'


def table() -> str:
    lines = ['| asked for | refused with | what is said |', '| --- | --- | --- |']
    lines += [f'| {kind} parallelism | every flag | {sentence} |' for kind, sentence in NOT_BUILT.items()]
    lines += [f'| `--{name}` | every flag | {sentence} |' for name, sentence in NOT_PROVEN.items()]
    for kind in KINDS:
        rows = [refusal for refusal in REFUSALS if refusal.kind == kind]
        lines += [f'| `{kind}` | `{refusal.flag}` | {refusal.reason} |' for refusal in rows]
        if not rows:
            lines.append(f'| `{kind}` | no flag | |')
    return '\n'.join(lines)


def generated() -> str:
    before, _, rest = PATH.read_text(encoding='utf-8').partition(BEGIN)
    _, _, after = rest.partition(END)
    return f'{before}{BEGIN}\n{table()}\n{END}{after}'


if __name__ == '__main__':
    PATH.write_text(generated(), encoding='utf-8')
    print(f'wrote {PATH}')
