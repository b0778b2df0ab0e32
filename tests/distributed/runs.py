"""``python -m tests.distributed.runs [name …]``: what two processes train, save, read and write, against what one does."""

from __future__ import annotations

import copy
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.distributed.equality import every_loss_by_its_head
from tests.distributed.staged import check_staged
from tests.laws.combination import Combination
from tests.two_processes import WORLD, attempt_all, check_equal, whole
from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper
from x_transformers.distributed.engine import MeshEngine
from x_transformers.distributed.mesh import Degrees, MeshError, World, start
from x_transformers.distributed.parallelize import Filling, parallelize
from x_transformers.distributed.staged import StagedEngine
from x_transformers.training import files
from x_transformers.training.checkpoint import load_checkpoint
from x_transformers.training.engine import Engine
from x_transformers.training.errors import CheckpointError
from x_transformers.training.files import find_checkpoints
from x_transformers.training.options import TrainerOptions
from x_transformers.training.trainer import Trainer

Worlds = dict[str, World]
GRIDS = {
    'copies': Degrees(replicate=2),
    'shards': Degrees(shard=2),
    'tensor': Degrees(tensor=2),
    'context': Degrees(context=2),
    'sequence': Degrees(tensor=2),
    'stages': Degrees(pipeline=2),
}
SHARD = {'copies': 'none', 'shards': 'full', 'tensor': 'none', 'context': 'full', 'sequence': 'none', 'stages': 'none'}
MORE: dict[str, dict[str, Any]] = {'sequence': {'sequence_parallel': True, 'loss_parallel': True}}


def make(dtype: torch.dtype = torch.float64, **flags: Any) -> nn.Module:
    # one parameter without an axis in each layer, grouped heads, a tied head
    flags = {'attn_kv_heads': 2, 'rotary_pos_emb': True, 'use_dynamic_tanh': True, 'ff_glu': True} | flags
    stack = Decoder(dim=16, depth=2, heads=4, attn_dim_head=4, verbose=False, **flags)
    # a vocabulary that two do not divide
    net = TransformerWrapper(num_tokens=33, max_seq_len=16, attn_layers=stack, tie_embedding=True)
    return AutoregressiveWrapper(net).to(dtype)


class Rows:
    """Eight random rows for each index, of which a process reads its part."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    def batch(self, index: int) -> Tensor:
        return torch.randint(32, (8, 12), generator=torch.Generator().manual_seed(index))[self.rank :: self.size]

    def predictions(self, batch: Tensor) -> int:
        return batch.shape[0] * (batch.shape[1] - 1)


def trainer(engine: Engine, model: nn.Module, options: TrainerOptions, **more: Any) -> Trainer:
    return Trainer(model, Rows(engine.rank, engine.world_size), options, engine=engine, **more)


def on(world: World, name: str, model: nn.Module, **how: Any) -> tuple[MeshEngine, nn.Module]:
    kind = StagedEngine if name == 'stages' else MeshEngine
    engine = kind(world, shard=SHARD[name], **MORE.get(name, {}), **how)  # type: ignore[arg-type]
    return engine, engine.spread(copy.deepcopy(model))


def held(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a state this process has a part of: not what other stages have."""
    return {name: tensor for name, tensor in state.items() if not tensor.is_meta}


def of_all(names: Iterable[Any]) -> set[Any]:
    """The names that any process has."""
    everywhere: list[Any] = [None] * WORLD
    dist.all_gather_object(everywhere, list(names))
    return {name for each in everywhere for name in each}


def gap(model: nn.Module, other: nn.Module) -> float:
    mine, its = model.state_dict(), other.state_dict()
    assert mine.keys() == its.keys()
    both = [name for name in held(mine) if name in held(its)]
    assert len(both) > len(mine) / 3
    return max((whole(mine[name]).double() - whole(its[name]).double()).abs().max().item() for name in both)


def losses_agree(worlds: Worlds, folder: Path, dtype: torch.dtype, limit: float, **options: Any) -> None:
    torch.manual_seed(1)
    model = make(dtype)
    given = TrainerOptions(**{'steps': 10, 'lr': 1e-2, 'clip': 0.2, 'grad_accum': 2, 'ema': 0.9, **options})
    alone_model = copy.deepcopy(model)
    alone = trainer(Engine(), alone_model, given)
    alone.train()
    assert max(record['grad_norm'] for record in alone.history.steps) > 2 * given.clip, 'clipping must matter'
    for name, world in worlds.items():
        engine, mine = on(world, name, model, checkpoint='full' if name == 'shards' else 'none')
        run = trainer(engine, mine, given)
        with every_loss_by_its_head(name == 'sequence'):
            run.train()
        for record, want in zip(run.history.steps, alone.history.steps, strict=True):
            for key in ('loss', 'grad_norm'):
                assert abs(record[key] - want[key]) <= limit * max(1.0, want[key]), (name, record, want)
        assert gap(mine, alone_model) <= 10 * limit, (name, gap(mine, alone_model))
        assert run.averaged is not None
        assert alone.averaged is not None
        for key, average in held(run.averaged.averages).items():
            expected = alone.averaged.averages[key]
            assert (whole(average) - expected).abs().max() <= max(10 * limit, 1e-6), (name, key)


def adamw_in_double_precision(worlds: Worlds, folder: Path) -> None:
    losses_agree(worlds, folder, torch.float64, 1e-8)


def adamw_in_single_precision(worlds: Worlds, folder: Path) -> None:
    losses_agree(worlds, folder, torch.float32, 1e-4)


def muon_moves_whole_matrices(worlds: Worlds, folder: Path) -> None:
    """A matrix is moved where it is whole, so the update is that of one process, but for how gradients are summed."""
    losses_agree(worlds, folder, torch.float64, 1e-5, optimizer='muon', steps=4, muon_lr=1e-2)


def a_checkpoint_goes_on_elsewhere(worlds: Worlds, folder: Path) -> None:
    options = TrainerOptions(steps=3, lr=1e-2, optimizer='muon', ema=0.9)
    longer = TrainerOptions(steps=6, lr=1e-2, optimizer='muon', ema=0.9, schedule='constant')
    torch.manual_seed(1)
    model = make()
    for name, world in worlds.items():
        engine, mine = on(world, name, model)
        first = trainer(engine, mine, options, store=engine.store(folder / name))
        first.train()
        (path,) = find_checkpoints(folder / name)
        step, weights, state = load_checkpoint(path)
        assert step == 3
        kept = {key: whole(tensor) for key, tensor in held(mine.state_dict()).items()}
        assert all(torch.equal(weights[key], tensor) for key, tensor in kept.items())
        alone_model = make()
        alone = trainer(Engine(), alone_model, longer)
        alone.resume(step, weights, state)
        for optimizer, its in zip(first.optimizers, alone.optimizers, strict=True):
            mine_state, its_state = optimizer.state_dict()['state'], its.state_dict()['state']
            assert of_all(mine_state) == set(its_state)
            for number in mine_state:
                for key, value in its_state[number].items():
                    assert torch.equal(whole(mine_state[number][key]), value), (name, number, key)
        alone.train()
        for other, elsewhere in worlds.items():
            second, there = on(elsewhere, other, make())
            again = trainer(second, there, longer)
            again.resume(*second.read(path))
            loaded = {key: whole(tensor) for key, tensor in held(there.state_dict()).items()}
            assert all(torch.equal(tensor, weights[key]) for key, tensor in loaded.items()), (name, other)
            again.train()
            for record, want in zip(again.history.steps, alone.history.steps, strict=True):
                assert abs(record['loss'] - want['loss']) <= 1e-5, (name, other, record, want)
    # what one process has written is read by several
    single = trainer(Engine(), copy.deepcopy(model), options, store=Engine().store(folder / f'alone-{dist.get_rank()}'))
    single.train()
    (path,) = find_checkpoints(folder / f'alone-{dist.get_rank()}')
    for name, world in worlds.items():
        engine, mine = on(world, name, make())
        trainer(engine, mine, longer).resume(*engine.read(path))
        assert gap(mine, single.model) == 0.0, name


def a_damaged_checkpoint_is_refused(worlds: Worlds, folder: Path) -> None:
    engine, mine = on(worlds['shards'], 'shards', make())
    trainer(engine, mine, TrainerOptions(steps=1), store=engine.store(folder)).train()
    (path,) = find_checkpoints(folder)
    dist.barrier()
    if dist.get_rank() == 0:
        (damaged,) = path.glob('__1_*')
        data = bytearray(damaged.read_bytes())
        data[-1] ^= 1
        damaged.write_bytes(bytes(data))
    dist.barrier()
    with pytest.raises(CheckpointError, match='damaged'):
        load_checkpoint(path)
    # one process reads that file, and all are told
    with pytest.raises(CheckpointError, match='damaged'):
        engine.read(path)


def what_the_main_process_cannot_do_ends_all(worlds: Worlds, folder: Path) -> None:
    engine = MeshEngine(worlds['copies'])
    with pytest.raises(MeshError if dist.get_rank() else KeyError), engine.main_first():
        raise KeyError('such as a file that cannot be read')
    with engine.main_first():
        pass


def saving_goes_on_beside_training(worlds: Worlds, folder: Path) -> None:
    """While the main process is still writing, all take steps; what is written is what there was."""
    write = files.write_synced
    for name in ('shards', 'tensor', 'stages'):
        torch.manual_seed(1)
        engine, mine = on(worlds[name], name, make())
        run = trainer(engine, mine, TrainerOptions(steps=4, save_every=100, ema=0.9), store=engine.store(folder / name))
        go_on = threading.Event()

        def slowly(path: Path, data: bytes, go_on: Any = go_on) -> None:
            assert go_on.wait(60)
            write(path, data)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, 'write_synced', slowly)
            run.one_step()
            run.step += 1
            then = {key: whole(tensor).clone() for key, tensor in held(mine.state_dict()).items()}
            averages = {key: whole(tensor).clone() for key, tensor in held(run.averaged.averages).items()}  # type: ignore[union-attr]
            run.save()
            for _ in range(2):
                run.one_step()
                assert run.store.finished() == [], name  # type: ignore[union-attr]
            assert find_checkpoints(folder / name) == []
            go_on.set()
            run.store.wait()  # type: ignore[union-attr]
        (path,) = find_checkpoints(folder / name)
        step, weights, state = load_checkpoint(path)
        assert step == 1
        assert [key for key, tensor in then.items() if not torch.equal(weights[key], tensor)] == [], name
        assert all(torch.equal(state['averaged']['averages'][key], tensor) for key, tensor in averages.items())
        assert any(not torch.equal(whole(tensor), then[key]) for key, tensor in held(mine.state_dict()).items())
        # for use there are the averages
        published = files.read_weights(folder / name / files.WEIGHTS)
        assert published.keys() == weights.keys()
        assert all(
            torch.equal(published[key].float(), average.to(published[key].dtype).float()) for key, average in averages.items()
        )


def a_full_disk_stops_all_in_one_step(worlds: Worlds, folder: Path) -> None:
    engine, mine = on(worlds['shards'], 'shards', make())
    run = trainer(engine, mine, TrainerOptions(steps=6, save_every=2), store=engine.store(folder))
    first, synced = [True], files.write_synced

    def full(path: Path, data: bytes) -> None:
        if path.name == files.MANIFEST and not first:
            raise OSError(28, 'No space left on device')
        if path.name == files.MANIFEST:
            first.clear()
        synced(path, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, 'write_synced', full)
        with pytest.raises(CheckpointError, match='No space left on device'):
            run.train()
    stopped: list[Any] = [None] * WORLD
    dist.all_gather_object(stopped, run.step)
    assert stopped[0] == stopped[1]
    assert 4 <= run.step <= 6
    (path,) = find_checkpoints(folder)
    assert load_checkpoint(path)[0] == 2


def text_is_written_from_shards(worlds: Worlds, folder: Path) -> None:
    torch.manual_seed(1)
    model: Any = make().eval()
    prompt = torch.randint(32, (2, 4))
    want = model.generate(prompt, 8, temperature=0.0)
    for name, world in worlds.items():
        _, mine = on(world, name, model)
        writer: Any = mine.eval()
        assert torch.equal(writer.generate(prompt, 8, temperature=0.0), want), name
        one_by_one = torch.stack(list(writer.generate(prompt, 8, temperature=0.0, stream=True)), dim=-1)
        assert torch.equal(one_by_one, want), name
        if name != 'stages':
            writer(prompt).backward()  # and it can still be trained


def a_model_without_numbers_is_filled_alike(worlds: Worlds, folder: Path) -> None:
    found = []
    for name, world in worlds.items():
        with torch.device('meta'):
            model = make(torch.float32)
        engine = MeshEngine(world, shard=SHARD[name], **MORE.get(name, {}))  # type: ignore[arg-type]
        mine = engine.spread(model, seed=5)
        found.append({key: whole(tensor) for key, tensor in held(mine.state_dict()).items()})
        assert all(tensor.isfinite().all() for tensor in found[-1].values())
        assert engine.model is mine
    assert all(found[0][key].std() > 0 for key in found[0] if key.endswith(('to_q.weight', 'emb.weight')))
    with torch.device('meta'):
        alone = make(torch.float32)
    Filling(alone, torch.device('cpu'), 5).fill(alone)
    assert all(tensor.isfinite().all() for tensor in alone.state_dict().values())


def layers_are_left_out_alike(worlds: Worlds, folder: Path) -> None:
    """Layer dropout is decided alike, unit dropout is not, but in a tensor group, where all have the same rows."""
    for name in ('copies', 'shards', 'tensor'):
        torch.manual_seed(1)
        flags = {'layer_dropout': 0.5, 'attn_sublayer_dropout' if name == 'tensor' else 'attn_dropout': 0.2}
        engine, mine = on(worlds[name], name, make(**flags))
        run = trainer(engine, mine, TrainerOptions(steps=4))
        run.train()
        engine.begin_step(0, 3)
        drawn: list[Any] = [None] * WORLD
        dist.all_gather_object(drawn, float(torch.rand(())))
        assert (drawn[0] == drawn[1]) is (name == 'tensor')


def stages_hide_the_same_keys(worlds: Worlds, folder: Path) -> None:
    """What is drawn in front of the layers is drawn in all stages, what is drawn in layers goes on where it stood."""
    case = Combination.parse('decoder+ff_dropout')
    torch.manual_seed(0)
    check_staged(case, AutoregressiveWrapper(case.build(), mask_prob=0.3), worlds['stages'], {})


def options_of_the_objective_are_spread(worlds: Worlds, folder: Path) -> None:
    """Those that are not refused: keys that are hidden, the loss on attention maps, weights of the losses of other heads."""
    tried: tuple[tuple[str, dict[str, Any]], ...] = (
        ('decoder', {'mask_prob': 0.3, 'ignore_index': 5, 'pad_value': 1}),
        ('decoder+kv_heads', {'add_attn_z_loss': True}),
        ('decoder+multi_token', {'multi_token_loss_weight': 0.3}),
        ('decoder+next_embed', {'next_embed_loss_weight': 0.7}),
        ('decoder+looped', {'looped_loss_threshold_exit': 0.1, 'looped_loss_slope': 5.0, 'looped_exit_loss_weight': 0.3}),
        ('decoder+experts_biased', {}),
        ('encoder', {'allow_future': True}),
    )
    for name in ('copies', 'shards', 'tensor', 'sequence'):
        world, how = worlds[name], {'shard': SHARD[name], **MORE.get(name, {})}
        for text, options in tried:
            case = Combination.parse(text)
            if 'add_attn_z_loss' in options and name in ('tensor', 'sequence'):
                with pytest.raises(MeshError, match='`add_attn_z_loss` must be left as it is'):
                    parallelize(AutoregressiveWrapper(case.build(), **options), world, **how)
                continue
            with every_loss_by_its_head(name == 'sequence'):
                check_equal(
                    case, partial(spread, world, how), (world.data_rank, world.data_size), objective=options
                )  # fmt: skip


def spread(world: World, how: dict[str, Any], model: nn.Module) -> None:
    parallelize(model, world, **how)


def modules_of_ones_own_are_spread(worlds: Worlds, folder: Path) -> None:
    """A table and a head that the user has made."""
    torch.manual_seed(1)
    model: Any = make()
    own = {'token_emb': nn.Embedding(33, 16).double(), 'to_logits': nn.Linear(16, 33).double()}
    stack = model.net.attn_layers
    model = AutoregressiveWrapper(TransformerWrapper(num_tokens=33, max_seq_len=16, attn_layers=stack, **own)).double()  # type: ignore[arg-type]
    options = TrainerOptions(steps=3, lr=1e-2)
    alone = trainer(Engine(), copy.deepcopy(model), options)
    alone.train()
    for name, world in worlds.items():
        if name == 'sequence':
            with pytest.raises(MeshError, match='a head must be one linear map with --loss-parallel'):
                on(world, name, model)
            continue
        engine, mine = on(world, name, model)
        run = trainer(engine, mine, options)
        run.train()
        assert run.history.losses == pytest.approx(alone.history.losses, abs=1e-8), name
        assert gap(mine, alone.model) <= 1e-7, name


CASES: dict[str, Callable[[Worlds, Path], None]] = {
    case.__name__: case
    for case in (
        adamw_in_double_precision, adamw_in_single_precision, muon_moves_whole_matrices, a_checkpoint_goes_on_elsewhere,
        a_damaged_checkpoint_is_refused, what_the_main_process_cannot_do_ends_all, saving_goes_on_beside_training,
        a_full_disk_stops_all_in_one_step,
        text_is_written_from_shards, a_model_without_numbers_is_filled_alike,
        layers_are_left_out_alike, stages_hide_the_same_keys, options_of_the_objective_are_spread,
        modules_of_ones_own_are_spread,
    )
}  # fmt: skip


@cache
def worlds() -> Worlds:
    return {name: start(degrees, 'cpu') for name, degrees in GRIDS.items()}


def attempt(folder: Path, name: str) -> None:
    for kind in (*GRIDS, f'alone-{dist.get_rank()}'):
        (folder / name / kind).mkdir(parents=True, exist_ok=True)
    CASES[name](worlds(), folder / name)


def run(names: list[str], folder: Path) -> str:
    """What failed."""
    done, failed = attempt_all(partial(attempt, folder), names)
    assert done == len(names)
    return '\n'.join(failed)


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as made:
        print(run(sys.argv[1:] or list(CASES), Path(made)) or 'all passed')
