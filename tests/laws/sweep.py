"""``python -m tests.laws.sweep --count 2000 --seed N``: the laws over many random combinations, and what broke."""

from __future__ import annotations

import argparse
import collections
import sys
import time
import traceback
import warnings

import torch

from tests import elsewhere
from tests.laws.combination import HYBRIDS, Combination, draw, singles
from tests.laws.groups import GROUPS
from tests.laws.laws import DEEP_LAWS, LAWS, Broken, checkpoints_agree, half_precision
from tests.on_device import enter
from x_transformers import InertFlagWarning
from x_transformers.flags.base import FlagError

# autocast and the engine of checkpoints are not told of a device that is pretended; neither are torch's recurrent kernels
UNTOLD = (half_precision, checkpoints_agree)
RECURRENT = HYBRIDS | {entry.name for entry in GROUPS if 'gate_residual' in entry.flags}


def told() -> str:
    """The exception at hand in one line: where it was raised and what it says."""
    kind, error, _ = sys.exc_info()
    place = traceback.extract_tb(error.__traceback__)[-1]  # type: ignore[union-attr]
    return f'{place.filename.rpartition("/")[2]}:{place.lineno} {kind.__name__}: {error}'  # type: ignore[union-attr]


def check(case: Combination, laws: tuple) -> tuple[str, str]:
    """('refused' | 'kept' | 'inert' | 'broken' | 'crashed', what happened). 'inert': kept, with flags that do nothing."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always', InertFlagWarning)
            case.build()
    except FlagError as refusal:
        return 'refused', str(refusal)
    except Exception:
        return 'crashed', 'constructor: ' + told()
    inert = [str(each.message) for each in caught if each.category is InertFlagWarning]
    for law in laws:
        try:
            law(case)
        except Broken as broken:
            return 'broken', f'{law.__name__}: {broken}'
        except Exception:
            return 'crashed', f'{law.__name__}: ' + told()
    return ('inert', inert[0]) if inert else ('kept', '')


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--count', type=int, default=500)
    parser.add_argument('--seed', type=int, default=time.time_ns() % 1_000_000)
    parser.add_argument('--singles', action='store_true', help='every flag alone instead of random combinations')
    parser.add_argument('--part', help='with --singles: only those of these kinds or groups, separated by commas')
    parser.add_argument('--deep', action='store_true', help='also torch.compile')
    parser.add_argument('--device', default='cpu', help='such as cuda; elsewhere: one that every machine can pretend to have')
    parser.add_argument('--only', help='one combination, as printed')
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings('ignore')
    print(f'seed {options.seed}')
    if options.only:
        cases = [Combination.parse(options.only)]
    else:
        cases = singles(options.part) if options.singles else draw(options.count, options.seed)
    laws = DEEP_LAWS if options.deep else LAWS
    if options.device == elsewhere.NAME:
        laws = tuple(law for law in laws if law not in UNTOLD)
        cases = [case for case in cases if not case.has(*RECURRENT)]
    outcomes: collections.Counter[str] = collections.Counter()
    enter(options.device)
    for case in cases:
        outcome, why = check(case, laws)
        outcomes[outcome] += 1
        if outcome in ('broken', 'crashed') or (options.singles and outcome in ('refused', 'inert')):
            print(f'{outcome.upper()} {case}\n    {why.strip()}', flush=True)
        torch.compiler.reset() if options.deep else None
    print(', '.join(f'{count} {outcome}' for outcome, count in sorted(outcomes.items())))
    return 1 if outcomes['broken'] or outcomes['crashed'] else 0


if __name__ == '__main__':
    sys.exit(main())
