"""``x-transformers chat``: an interactive dialogue with a model."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated

import tyro

from x_transformers.cli.writing import SampleOptions, Writer, open_writer, show


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatOptions(SampleOptions):
    """Chat with a trained model: it reads each line that you type after all earlier text.

    Ctrl-C ends an answer, Ctrl-D the conversation. A model of plain text goes on with yours; one that was trained on
    conversations needs its own marks, as in --before '\\nUser: ' --after '\\nAssistant: ' --stop '\\nUser: '.
    """

    run: Annotated[str, tyro.conf.Positional]
    """Run folder, as written by x-transformers train; or a model folder with a tokenizer, as written by hf import."""
    before: str = ''
    """Text before each line that you type (\\n is a line break)."""
    after: str = '\\n'
    """Text after each line that you type."""
    stop: str | None = None
    """Text that ends an answer; None: only --length ends it."""
    json: bool = False
    """Print one line of JSON with the whole text at the end."""

    def faults(self) -> list[str]:
        wrong = super().faults()
        if self.stop == '':
            wrong.append('--stop must hold text, got nothing.')
        if not self.before + self.after:
            wrong.append('--before or --after must hold text, for the model needs a token to start from.')
        return wrong


def main(arguments: Sequence[str]) -> int:
    options = tyro.cli(ChatOptions, args=list(arguments), prog='x-transformers chat')
    options.check()
    writer = open_writer(options.run, options)
    before, after, stop = (text and text.replace('\\n', '\n') for text in (options.before, options.after, options.stop))
    text, turns = '', []
    for line in typed_lines():
        text += f'{before}{line}{after}'
        answer = answered(writer, text, options, stop)
        text += answer
        turns.append({'line': line, 'answer': answer})
    if options.json:
        print(json.dumps({'run': options.run, 'turns': turns}))
    return 0


def typed_lines() -> Iterator[str]:
    """What is typed, a line at a time, until the end of the input."""
    live = sys.stdin.isatty()
    while True:
        if live:
            show('> ')
        line = sys.stdin.readline()
        if not line:
            if live:
                show('\n')
            return
        yield line.rstrip('\n')


def answered(writer: Writer, text: str, options: SampleOptions, stop: str | None) -> str:
    """Show the answer as it comes; what was shown. An interrupt ends it."""
    answer = ''
    # text that may be the beginning of ``stop`` is held back
    shown = 0
    try:
        for piece in writer.write(text, options):
            answer += piece
            if stop is not None and stop in answer:
                answer = answer[: answer.index(stop)]
                break
            ready = len(answer) - held_back(answer, stop)
            show(answer[shown:ready])
            shown = ready
    except KeyboardInterrupt:
        pass
    show(answer[shown:] + '\n')
    return answer


def held_back(text: str, stop: str | None) -> int:
    """How many of the last characters of ``text`` are a beginning of ``stop``."""
    return next((n for n in range(len(stop or '') - 1, 0, -1) if text.endswith((stop or '')[:n])), 0)
