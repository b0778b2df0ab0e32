"""Write the table of docs/scaling.md: which kind of parallelism goes with which flag, as the refusals themselves say."""

from __future__ import annotations

from pathlib import Path

from x_transformers.distributed.refusals import KINDS, NOT_PROVEN, NOT_TOGETHER, REFUSALS

PATH = Path(__file__).parent.parent / 'docs/scaling.md'
BEGIN, END = '<!-- table -->', '<!-- end of table -->'


def table() -> str:
    """One row for each flag that some kind refuses, and one column for each kind; then what is refused whatever the flags."""
    flags = list(dict.fromkeys(refusal.flag for refusal in REFUSALS))
    kinds = [kind for kind in KINDS if any(refusal.kind == kind for refusal in REFUSALS)]
    said = {(refusal.kind, refusal.flag): refusal.reason for refusal in REFUSALS}
    equal = [kind for kind in KINDS if kind not in kinds]
    lines = [
        f'Every flag gives equal results with {", ".join(equal)}. Flags that this table does not name do with all '
        'kinds. A flag refused with tensor is also refused with sequence and loss parallel, which are used together with it.',
        '',
    ]
    lines += [f'| flag | {" | ".join(kinds)} |', f'| --- |{" --- |" * len(kinds)}']
    lines += [f'| `{flag}` | ' + ' | '.join(said.get((kind, flag), 'equal') for kind in kinds) + ' |' for flag in flags]
    lines += ['', '| refused with every flag | error message |', '| --- | --- |']
    lines += [f'| `--pipeline` with `--{name}` | {sentence} |' for name, sentence in NOT_TOGETHER.items()]
    lines += [f'| `--{name}` | {sentence} |' for name, sentence in NOT_PROVEN.items()]
    return '\n'.join(lines)


def generated() -> str:
    before, _, rest = PATH.read_text(encoding='utf-8').partition(BEGIN)
    _, _, after = rest.partition(END)
    return f'{before}{BEGIN}\n{table()}\n{END}{after}'


if __name__ == '__main__':
    PATH.write_text(generated(), encoding='utf-8')
    print(f'wrote {PATH}')
