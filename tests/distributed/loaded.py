"""``[torchrun …] -m tests.distributed.loaded RUN``: a run is resumed, and what it has loaded compared with its checkpoint."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import torch

from tests.two_processes import whole
from x_transformers.cli.train import parse
from x_transformers.distributed.command import of_the_run
from x_transformers.distributed.engine import MeshEngine
from x_transformers.distributed.mesh import Degrees, start, stop
from x_transformers.training.checkpoint import load_checkpoint
from x_transformers.training.engine import Engine
from x_transformers.training.files import find_checkpoints
from x_transformers.training.run import RunConfig, prepare_run


def main(run: Path) -> None:
    asked: Any = parse(['--run-dir', str(run), '--resume'])
    options = of_the_run(asked)
    engine = Engine()
    if int(os.environ.get('WORLD_SIZE', '1')) > 1:
        degrees = Degrees.of(options.shard, tensor=options.tensor, context=options.context, pipeline=options.pipeline)
        engine = MeshEngine(start(degrees, 'cpu'), shard=options.shard)
    trainer = prepare_run(dataclasses.replace(RunConfig.read(run), options=options), lambda text: None, [], engine).trainer
    step, weights, state = load_checkpoint(find_checkpoints(run)[-1])
    assert trainer.step == step
    mine = {name: whole(tensor) for name, tensor in trainer.model.state_dict().items()}
    assert mine.keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in mine.items())
    compared = 0
    for optimizer, saved in zip(trainer.optimizers, state['optimizers'], strict=True):
        own = optimizer.state_dict()['state']
        assert own.keys() == saved['state'].keys()
        for number, values in saved['state'].items():
            for name, value in values.items():
                assert torch.equal(whole(own[number][name]), value), (number, name)
                compared += 1
    assert compared > len(mine)
    print(f'{len(mine)} weights and {compared} tensors of the optimizer are loaded bit for bit', flush=True)
    stop()


if __name__ == '__main__':
    main(Path(sys.argv[1]))
