"""Rows longer than those of training with T5's bias as it starts here, and with a start of a fiftieth of that.

    python benchmarks/start_of_bias.py            sorting and copying, three seeds each; twelve runs of about 20 seconds
    python benchmarks/start_of_bias.py --seeds 1

The bias starts from normal values times the root of the width of a head, as in the interface that the package follows; so large
a bias decides at first where a head looks. The sizes are those of `x-transformers evidence length`.
"""

from __future__ import annotations

import argparse
import json

import torch
from torch import nn

from x_transformers.cli.evidence import suite_questions
from x_transformers.evidence.execute import LAST, one_thread, prepared_model, quiet
from x_transformers.evidence.experiment import Question
from x_transformers.evidence.suites import SUITES
from x_transformers.evidence.training import train_arm
from x_transformers.position.relative import RelativePositionBias

SHARE = 0.02


def shrink(model: nn.Module, share: float) -> None:
    """Multiply what every T5 bias starts from."""
    found = [module for module in model.modules() if isinstance(module, RelativePositionBias)]
    if not found:
        raise ValueError('the model must have a T5 bias, got none. Set rel_pos_bias.')
    with torch.no_grad():
        for module in found:
            module.relative_attention_bias.weight.mul_(share)


def accuracies(asked: Question, seed: int, share: float) -> tuple[float, float]:
    """(beyond the lengths of training, inside them), the means of the last evaluations."""
    task = asked.the_task()
    with quiet():
        model = prepared_model(task, asked.base, seed, 'cpu')
        shrink(model, share)
        last = [measures for _, measures in train_arm(task, model, asked.settings, seed)[-LAST:]]
    beyond, inside = (sum(measures[name] for measures in last) / len(last) for name in ('accuracy', 'accuracy_inside'))
    return beyond, inside


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, default=3)
    options = parser.parse_args()
    one_thread()
    for asked in suite_questions(SUITES['length'](), seeds=options.seeds, steps=None):
        if asked.title not in ('copy, T5 bias', 'sort, T5 bias'):
            continue
        for share in (1.0, SHARE):
            found = [accuracies(asked, seed, share) for seed in range(options.seeds)]
            beyond, inside = ([round(value, 4) for value in values] for values in zip(*found, strict=True))
            print(json.dumps({'row': asked.title, 'start': share, 'accuracy': beyond, 'inside': inside}), flush=True)


if __name__ == '__main__':
    main()
