"""Training, checkpoints and generation of two processes are those of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.runs import CASES, run

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason='torch was built without torch.distributed')


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    assert run(list(CASES), tmp_path) == ''
