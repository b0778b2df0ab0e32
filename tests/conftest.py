"""Options of the test run: ``--shapes`` checks annotated shapes in every test, ``--device cuda`` moves the tests there
(``elsewhere``: to a device that every machine can pretend to have), ``--seed`` draws other random numbers.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.on_device import enter
from tests.poison import poisoned
from tests.shapes import shapes_checked

# one file per room whose every call is checked for shapes, and whose fresh memory holds NaN; none of them hands over wrong
# shapes on purpose, or compiles
REPRESENTATIVE = (
    'attention/test_latent.py',
    'cache/test_tape.py',
    'embedding/test_pooling.py',
    'generation/test_beam.py',
    'layers/test_residual.py',
    'position/test_polar.py',
    'test_feedforward.py',
    'test_losses.py',
    'test_norms.py',
    'test_vision.py',
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption('--shapes', action='store_true', help='check the annotated shapes of every call, in all tests')
    parser.addoption('--seed', default='0', help='random numbers of every test follow from this and from its name')
    parser.addoption('--device', default='cpu', help='where tensors and modules are made, such as cuda')


def pytest_configure(config: pytest.Config) -> None:
    enter(config.getoption('--device'))


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """The same numbers in every run, alone or in company, so that a failure can be repeated."""
    seed = zlib.crc32(f'{request.config.getoption("--seed")} {request.node.nodeid}'.encode())
    torch.manual_seed(seed)
    random.seed(seed)


@pytest.fixture(scope='module', autouse=True)
def strict_room(request: pytest.FixtureRequest) -> Iterator[Any]:
    path = request.path.relative_to(Path(__file__).parent).as_posix()
    if path in REPRESENTATIVE:
        with shapes_checked(), poisoned():
            yield
    elif request.config.getoption('--shapes'):
        with shapes_checked():
            yield
    else:
        yield
