from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from x_transformers.training.build import QUICKSTART, build_model, choose_device
from x_transformers.training.errors import TrainingError

SMALL = QUICKSTART | {'dim': 32, 'depth': 1, 'max_seq_len': 16}


def test_importing_draws_no_random_numbers():
    """Else the first model of a process would not be the one that its seed gives."""
    program = (
        'import torch; before = torch.get_rng_state(); import x_transformers\n'
        'from x_transformers import TransformerWrapper, Decoder, Encoder, AutoregressiveWrapper\n'
        'from x_transformers import ViTransformerWrapper, XTransformer\n'
        'raise SystemExit(not torch.equal(before, torch.get_rng_state()))'
    )
    assert subprocess.run([sys.executable, '-c', program]).returncode == 0


def test_the_seed_gives_the_model_and_its_loss():
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        model = build_model(SMALL)
        losses.append(model(torch.arange(32).view(2, 16)).item())
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    'flags',
    [{'cross_attend': True}, {'num_output_heads': 2}, {'logits_dim': 3}, {'return_only_embed': True}, {'ff_dim_out': 7}],
)
def test_models_that_are_no_language_models_over_bytes_are_refused(flags):
    with pytest.raises(TrainingError, match=f'--{next(iter(flags)).replace("_", "-")} '):
        build_model(SMALL | flags)


def test_devices():
    assert choose_device('cpu') == torch.device('cpu')
    with pytest.raises(TrainingError, match='--device nothing cannot be used here'):
        choose_device('nothing')
