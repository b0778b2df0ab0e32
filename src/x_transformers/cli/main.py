"""The command ``x-transformers``: choose the subcommand; bad input ends with one sentence and an exit status."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    'train': 'train a language model: on your files, or on the source of the standard library',
    'generate': 'write with a trained model',
    'chat': 'write in turn with a trained model',
    'eval': 'loss, perplexity and bits per byte of a trained model on other texts',
    'info': 'show what a set of flags builds: layers, parameters, operations, kernel, memory, cache',
    'plan': 'what a model would need on many devices: memory, operations, which grid fits',
    'ablate': 'train a baseline and ideas on the same seeds: which idea helps, with intervals and a page',
    'evidence': 'train on a published suite of tasks and show the result beside the published numbers',
    'export': 'write a trained model as a program (pt2, onnx) or as plain weights (safetensors)',
    'hf': 'explain, import and export models in the Hugging Face format',
    'bench': 'measure speed and memory against a minimal hand-written model (in a clone of the repository)',
}
TOGETHER = ('train',)  # commands that several processes run together
BAD_INPUT = 2
UNTIL_ENDED = 5.0  # seconds in which torchrun ends the others, once the main process has printed and ended
EXTRA = "the command line needs its extra: pip install '.[cli]' in a clone of the repository"


def usage() -> str:
    lines = ['usage: x-transformers COMMAND [OPTIONS]', '']
    lines += [f'  {name:10} {about}' for name, about in COMMANDS.items()]
    return '\n'.join([*lines, '', 'x-transformers COMMAND --help lists the options of a command.'])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ('-h', '--help'):
        print(usage())
        return 0 if arguments else BAD_INPUT
    if arguments[0] in ('-V', '--version'):
        from importlib.metadata import version

        print(version('x-transformers'))
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        return complain(f'there is no command {name!r}; the commands are {", ".join(COMMANDS)}')
    return run_command(name, rest)


def run_command(name: str, arguments: Sequence[str]) -> int:
    if name not in TOGETHER and (size := started_by_torchrun()) > 1:
        return complain(f'{name} must run in one process, got {size} from torchrun. Start x-transformers {name} without it.')
    try:
        command = import_module(f'x_transformers.cli.{name}')
    except ModuleNotFoundError as error:
        if error.name in ('tyro', 'tqdm'):
            return complain(EXTRA)
        raise
    from x_transformers.flags.base import FlagError
    from x_transformers.saving.errors import FolderError
    from x_transformers.training.errors import TrainingError

    try:
        return int(command.main(arguments))
    except (FlagError, FolderError, TrainingError) as error:
        return complain(str(error))
    except KeyboardInterrupt:
        print('\ninterrupted', file=sys.stderr)
        return 130
    except BrokenPipeError:
        # whoever reads the output has gone; what is still buffered must not raise again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def started_by_torchrun() -> int:
    """The number of processes that torchrun started; 1 without torchrun."""
    return int(os.environ.get('WORLD_SIZE', '1')) if 'TORCHELASTIC_RUN_ID' in os.environ else 1


def complain(sentence: str) -> int:
    """Print the sentence, under torchrun in the main process only. Returns the exit status."""
    if started_by_torchrun() > 1 and os.environ['RANK'] != '0':
        time.sleep(UNTIL_ENDED)
        return BAD_INPUT
    print(f'x-transformers: {sentence}', file=sys.stderr)
    return BAD_INPUT


def run() -> None:
    sys.exit(main())
