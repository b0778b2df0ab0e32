"""``x-transformers ablate``: measure whether ideas help."""

from __future__ import annotations

import argparse
import io
import re
import shlex
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from x_transformers.evidence.estimate import estimated_seconds, in_words
from x_transformers.evidence.experiment import BASELINE, Arm, Experiment, Question, folder_name
from x_transformers.evidence.findings import signed
from x_transformers.evidence.plan import arm_of, noise_arms, pairs_of, question, read_plan
from x_transformers.evidence.report import Report, make_report
from x_transformers.evidence.runs import ArmRun, Job
from x_transformers.evidence.statistics import scipy_stats
from x_transformers.evidence.tasks import TASKS
from x_transformers.flags.presets import help_text
from x_transformers.training.errors import TrainingError

ABOUT = """Train a baseline and ideas on the same seeds. Report for each idea whether it helps.

An idea is a set of flags of the constructors. Its row shows the difference from the baseline, a 95 % interval and a verdict
(helps, hurts, no difference, not resolved), after equal steps and at equal time. All runs are in one folder. The same command
with --resume continues what was stopped.
"""
EXAMPLES = """examples:
  x-transformers ablate --task mqar --base depth=1 --idea shift_tokens=1 --seeds 5
  x-transformers ablate --profile quick --idea ff_glu=true,ff_swish=true
  x-transformers ablate ideas.toml --workers 2 --budget 30m
  x-transformers ablate --task bytes --data my_text/ --idea "swiglu: ff_glu=true,ff_swish=true" --power 0.005
  x-transformers ablate --task my_task.py:Reversal --idea rotary_pos_emb=true
"""
# the share of the time in which intervals are computed for the bar
LOOKING = 0.01
# sizes at which one idea with three seeds takes less than ten minutes of two cores, with the baseline
SMALL: dict[str, Any] = {'dim': 64, 'depth': 2, 'heads': 2, 'attn_dim_head': 32}
PROFILES: dict[str, list[dict[str, Any]]] = {
    'quick': [
        {'label': 'recall', 'task': 'mqar', 'options': {'vocabulary': 64, 'length': 32, 'rows_per_step': 32}, 'steps': 1000},
        {
            'label': 'longer copy',
            'task': 'length/copy',
            'options': {'trained': 10, 'tested': 20, 'rows_per_step': 32},
            'steps': 1000,
        },
        {'label': 'bytes', 'task': 'bytes', 'options': {'length': 128, 'rows_per_step': 8}, 'steps': 500},
    ],
    'full': [
        {'label': 'recall', 'task': 'mqar', 'options': {'vocabulary': 256}, 'steps': 3000},
        {'label': 'forgetting', 'task': 'mqar/forgetting', 'options': {'vocabulary': 256}, 'steps': 3000},
        {'label': 'fuzzy recall', 'task': 'mad/fuzzy', 'steps': 1500},
        {'label': 'compression', 'task': 'mad/compression', 'steps': 1500},
        {'label': 'longer copy', 'task': 'length/copy', 'steps': 3000},
        {'label': 'longer parity', 'task': 'length/parity', 'steps': 3000},
        {'label': 'depo', 'task': 'depo', 'options': {'words': 12}, 'steps': 3000},
        {'label': 'bytes', 'task': 'bytes', 'options': {'length': 256}, 'steps': 2000},
    ],
}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        'x-transformers ablate', description=ABOUT, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add('plan', nargs='?', help='TOML file with tasks, baseline and ideas')
    add('--task', action='append', default=[], help=f'{", ".join(TASKS)}, or FILE.py:CLASS. Repeat it for several tables')
    add(
        '--profile',
        choices=sorted(PROFILES),
        help='predefined sets of tasks. quick takes about nine minutes of one processor for one idea and three seeds',
    )
    add('--option', action='append', default=[], metavar='NAME=VALUE', help='an option of the task, such as vocabulary=256')
    add('--data', action='append', default=[], help='file or folder with text for the task bytes')
    add('--preset', help=f'named flags of the baseline. --base overrides them. {help_text()}')
    add('--base', action='append', default=[], metavar='FLAG=VALUE', help='flags of the baseline, on top of those of the task')
    add(
        '--idea',
        action='append',
        default=[],
        metavar='FLAG=VALUE,...',
        help='the flags of one idea. A name may come first: "swiglu: ff_glu=true,ff_swish=true"',
    )
    add('--select', action='append', default=[], metavar='NAME', help='run only these ideas of the file')
    add('--seeds', type=int, help='number of paired seeds (default 3)')
    add('--steps', type=int, help='optimizer steps of a run (default: those of the task)')
    add('--lr', type=float, help='highest learning rate (default: that of the task)')
    add('--optimizer', choices=['adamw', 'muon'], help='the optimizer of all runs (default adamw)')
    add('--evaluations', type=int, help='evaluations in a run (default 10)')
    add('--workers', type=int, help='number of processes, one thread each (default 1). 0 runs all in this process')
    add('--device', help='cpu (the default), cuda, cuda:1, ... Several workers share it')
    add('--out', help='folder for runs and reports (default: one below runs/ablate)')
    add('--resume', action='store_true', help='continue in a folder that holds runs of this experiment')
    add('--only', choices=['failed'], help='failed: repeat the runs that failed, and no others')
    add('--shard', metavar='I/N', help='run the I-th of N parts, for several machines that share a folder')
    add('--budget', metavar='TIME', help='start no run after this time: 90s, 30m, 2h')
    add('--noise', action='store_true', help='compare the baseline with itself on other seeds. Ideas must exceed this noise')
    add(
        '--repetitions',
        type=int,
        metavar='N',
        help='repeat --noise N times with new seeds each time (default 1)',
    )
    add('--power', type=float, metavar='D', help='also print how many seeds would find a difference of D')
    add('--ladder', metavar='1,2', help='repeat at these multiples of the width. An idea must help at all of them to scale')
    add('--lr-grid', metavar='0.5,1,2', help='factors of the learning rate, chosen for each idea on seeds that no verdict uses')
    add('--tracker', metavar='PATH', help='MODULE:FUNCTION, called with each row at the end')
    add('--json', action='store_true', help='print only the line of JSON')
    return made


def numbers_of(text: str | Sequence[float] | None, option: str) -> tuple[float, ...]:
    if text is None:
        return ()
    try:
        found = tuple(float(part) for part in text.split(',')) if isinstance(text, str) else tuple(map(float, text))
    except (TypeError, ValueError) as error:
        raise TrainingError(
            f'{option} must be numbers with commas between them, got {text!r}. Write {option} 0.5,1,2.'
        ) from error
    if not found or min(found) <= 0:
        raise TrainingError(f'{option} must be above 0, got {text!r}. Write {option} 0.5,1,2.')
    return found


def seconds_of(text: str | None) -> float | None:
    if text is None:
        return None
    found = re.fullmatch(r'(\d+(?:\.\d*)?)\s*([smh]?)', text.strip())
    if found is None:
        raise TrainingError(f'--budget must be a time such as 90s, 30m or 2h, got {text!r}. Write --budget 30m.')
    return float(found[1]) * {'s': 1, '': 60, 'm': 60, 'h': 3600}[found[2]]


def shard_of(text: str | None) -> tuple[int, int]:
    if text is None:
        return 1, 1
    found = re.fullmatch(r'(\d+)/(\d+)', text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise TrainingError(f'--shard must be I/N with I from 1 to N, got {text!r}. Write --shard 1/4, --shard 2/4, ...')
    return int(found[1]), int(found[2])


def check_at_least(value: int, low: int, option: str) -> int:
    if value < low:
        raise TrainingError(f'{option} must be at least {low}, got {value}. Take a larger number.')
    return value


def questions_of(options: argparse.Namespace) -> tuple[tuple[Question, ...], dict[str, list[str]], dict[str, Any]]:
    """(what is asked, the widths of each task, options that a file gave)."""
    entries: list[dict[str, Any]] = []
    base: dict[str, Any] = {}
    ideas: list[Arm] = []
    settings: dict[str, Any] = {}
    more: dict[str, Any] = {}
    if options.plan is not None:
        plan = read_plan(options.plan)
        entries, base, ideas = [dict(entry) for entry in plan.tasks], dict(plan.base), list(plan.ideas)
        settings, more = dict(plan.settings), dict(plan.more)
    if options.task or options.profile:
        own = pairs_of(options.option, '--option')
        entries = [{'task': name, 'options': own} for name in options.task]
        if options.profile:
            entries += [dict(entry) for entry in PROFILES[options.profile]]
            base = {**SMALL, **base} if options.profile == 'quick' else base
    elif options.option:
        for entry in entries:
            entry['options'] = {**entry.get('options', {}), **pairs_of(options.option, '--option')}
    refuse_unread(options, entries)
    if options.data:
        for entry in entries:
            if entry['task'] in ('bytes', 'bytes/longer'):
                entry['options'] = {**entry.get('options', {}), 'data': tuple(options.data)}
    if not entries:
        raise TrainingError('--task must say what to learn, got none. Write --task mqar, --profile quick, or give a TOML file.')
    if options.preset:
        base['preset'] = options.preset
    base |= pairs_of(options.base, '--base')
    ideas = selected(ideas, options.select)
    ideas += [arm_of(text) for text in options.idea]
    if options.noise:
        ideas = noise_arms(check_at_least(1 if options.repetitions is None else options.repetitions, 1, '--repetitions'))
    if not ideas:
        raise TrainingError('--idea must name at least one idea, got none. Write --idea shift_tokens=1, or --noise.')
    for name in ('steps', 'lr', 'optimizer', 'evaluations'):
        if getattr(options, name) is not None:
            settings[name] = getattr(options, name)
            for entry in entries:
                entry.pop(name, None)
    seeds = check_at_least(int(options.seeds if options.seeds is not None else more.get('seeds', 3)), 1, '--seeds')
    widths = numbers_of(options.ladder or more.get('ladder'), '--ladder') or (None,)
    grid = numbers_of(options.lr_grid or more.get('lr_grid'), '--lr-grid')
    device = str(options.device or more.get('device', 'cpu'))
    asked: list[Question] = []
    ladder: dict[str, list[str]] = {}
    for entry in entries:
        for width in widths:
            made = question(
                entry, base, ideas, seeds=seeds, settings=settings, width=width, lr_grid=grid, device=device
            )  # fmt: skip
            asked.append(made)
            ladder.setdefault(str(entry['task']), []).append(made.title)
    return tuple(asked), ladder if len(widths) > 1 else {}, more


def refuse_unread(options: argparse.Namespace, entries: Sequence[Mapping[str, Any]]) -> None:
    """Refuse options that would do nothing beside the others."""
    if options.option and options.profile:
        raise TrainingError(
            '--option must go with --task or a file, got --profile, whose sizes are set. Name its tasks instead.'
        )
    if options.data and entries and not any(str(entry['task']).startswith('bytes') for entry in entries):
        tasks = ', '.join(str(entry['task']) for entry in entries)
        raise TrainingError(f'--data must go with the task bytes, got {tasks}. Leave it out, or add --task bytes.')
    if options.power is not None and not options.power > 0:
        raise TrainingError(f'--power must be above 0, got {options.power:g}. Write for example --power 0.005.')
    if options.noise and options.idea:
        raise TrainingError(f'--noise must go without --idea, got {options.idea[0]!r}. Leave out one of the two.')
    if options.repetitions is not None and not options.noise:
        raise TrainingError(f'--repetitions must go with --noise, got {options.repetitions}. Add --noise, or leave it out.')


def selected(ideas: Sequence[Arm], names: Sequence[str]) -> list[Arm]:
    """The ideas of these names; all of them where no name is given."""
    wanted = [name for text in names for name in text.split(',')]
    unknown = [name for name in wanted if name not in {arm.name for arm in ideas}]
    if unknown:
        known = ', '.join(arm.name for arm in ideas) or 'none'
        raise TrainingError(f'--select must name ideas of the file, got {", ".join(unknown)}. Choose among {known}.')
    return [arm for arm in ideas if not wanted or arm.name in wanted]


# ---------------------------------------------------------------- what is seen while it runs


class Live:
    """A bar with the number of finished runs, the interval of the idea that finished last, and the time left."""

    def __init__(self, experiment: Experiment, total: int, silent: bool) -> None:
        try:
            from tqdm import tqdm
        except ImportError as error:
            raise TrainingError("the command needs tqdm: pip install 'x-transformers[ablate]'") from error
        live = sys.stderr.isatty()
        form = '{l_bar}{bar}| {n}/{total} runs, {remaining} left{postfix}'
        self.bar = tqdm(
            total=total, file=sys.stderr, dynamic_ncols=live, ncols=None if live else 120, disable=silent,
            mininterval=0.1 if live else 20, bar_format=form,
        )  # fmt: skip
        self.experiment = experiment
        self.next_look = 0.0

    def told(self, job: Job) -> None:
        now = time.monotonic()
        if isinstance(job, ArmRun) and not self.bar.disable and now >= self.next_look:
            self.bar.set_postfix_str(self.interval_of(job), refresh=False)
            # the interval of one among many ideas takes the results of all of them
            self.next_look = now + (time.monotonic() - now) / LOOKING
        self.bar.update(1)

    def interval_of(self, job: ArmRun) -> str:
        for asked in self.experiment.questions:
            for arm in asked.arms:
                if asked.task == job.task and self.experiment.run(asked, arm, job.seed - arm.other_seeds).hash == job.hash:
                    found = [o for o in self.experiment.answer(asked, {}) if o.idea == arm.name]
                    if found and (c := found[0].comparison) is not None:
                        low_high = f' ({signed(c.low)} … {signed(c.high)})' if c.seeds > 1 else ''
                        return f'{asked.title}: {arm.name} better by {signed(c.mean)}{low_high}'
        return ''


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(list(arguments))
    asked, ladder, more = questions_of(options)
    check_device({question.device for question in asked})
    tracker = tracker_of(options.tracker)
    scipy_stats()
    budget, shard = seconds_of(options.budget), shard_of(options.shard)
    default_workers = more.get('workers', 1)
    workers = check_at_least(int(options.workers if options.workers is not None else default_workers), 0, '--workers')
    folder = Path(options.out or more.get('out') or Path('runs/ablate') / folder_name(asked))
    experiment = Experiment(asked, folder)
    broken = experiment.check()
    if options.only and not (folder / 'experiment.json').exists():
        raise TrainingError(f'--only failed must have a folder with runs, got {folder}. Run the command without --only first.')
    experiment.open(options.resume or options.only is not None or shard != (1, 1))
    jobs = experiment.selection_jobs(broken) + experiment.jobs(broken)
    if options.only:
        failed = [job for job in jobs if experiment.store.failure(job)]
        for job in failed:
            experiment.store.forget_failure(job)
        jobs = failed
    mine = [job for job in jobs if int(job.hash, 16) % shard[1] == shard[0] - 1]
    missing = [job for job in mine if not experiment.store.settled(job)]
    said = io.StringIO() if options.json else sys.stderr
    for made in asked:
        print(
            f'{made.title}: {amount(len(made.arms), "idea")}, {amount(made.seeds, "seed")}, '
            f'{amount(made.settings.steps, "step")}, {flags_text(made.base)}',
            file=said,
        )
    print(f'{len(missing)} runs and timings to do in {folder}{time_of(experiment, missing, workers, options.json)}', file=said)
    live = Live(experiment, len(missing), options.json)
    stopped = False
    try:
        experiment.go(
            workers=workers, told=live.told, budget=budget, shard=shard, broken=broken, only=jobs if options.only else None
        )
    except KeyboardInterrupt:
        stopped = True
    finally:
        live.bar.close()
    about = {
        'command': shlex.join(['x-transformers', 'ablate', *arguments]),
        'ladder': ladder,
        'date': time.strftime('%Y-%m-%d'),
    }
    report = make_report(experiment, broken, about)
    page = report.write()
    extra: dict[str, Any] = {}
    if options.power is not None:
        extra['power'] = report.power(options.power)
    if tracker is not None:
        for row in report.rows:
            tracker(row)
    if not options.json:
        show_report(report, extra.get('power', []), options.power, stopped)
        print(f'page: {page}\npictures: {folder / "forest.png"}, {folder / "curves.png"}')
    print(report.json(**extra))
    if stopped:
        return 130
    return 1 if all(outcome.verdict == 'failed' for outcome in report.outcomes) else 0


def time_of(experiment: Experiment, missing: Sequence[Job], workers: int, silent: bool) -> str:
    """About how long it takes, where anybody reads it."""
    seconds = None if silent or not missing else estimated_seconds(experiment, missing, workers)
    if seconds is None:
        return ''
    return f', about {in_words(seconds)} with {amount(max(1, workers), "free processor")}'


def amount(number: int, thing: str) -> str:
    return f'{number} {thing}' + ('' if number == 1 else 's')


def show_report(report: Report, power: Sequence[Mapping[str, Any]], difference: float | None, stopped: bool) -> None:
    """The outcome in words."""
    print(report.table())
    for note in report.notes():
        print(note)
    for line in power:
        seeds = 'more than 10,000' if line['seeds'] is None else line['seeds']
        print(f'{line["task"]}: {line["idea"]}: {seeds} seeds find a difference of {difference:g} with probability 0.8')
    if stopped:
        print('Stopped. Finished runs are kept. Run the same command with --resume to continue.')


def flags_text(flags: Any) -> str:
    return ' '.join(f'{name}={value}' for name, value in flags.items())


def check_device(names: Collection[str]) -> None:
    """Refuse a device that is not there before runs fail on it."""
    from x_transformers.training.build import choose_device

    for name in names:
        choose_device(name)


def tracker_of(path: str | None) -> Callable[[dict[str, Any]], Any] | None:
    """The user's function that takes every row, found before anything runs."""
    from importlib import import_module

    if path is None:
        return None
    module, _, name = path.partition(':')
    try:
        found: Callable[[dict[str, Any]], Any] = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise TrainingError(
            f'--tracker must be MODULE:FUNCTION that can be imported, got {path!r}: {error}. Correct the path.'
        ) from error
    return found


__all__ = ['BASELINE', 'PROFILES', 'main', 'parser']
