"""One implementation in one process: reads workload names, runs one step of each, answers with what it cost.

python benchmarks/worker.py ours|floor|hf      (driven by benchmarks/bench.py over its standard input)
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

LENGTH, VOCABULARY, WIDE = 1024, 256, 50257
MODERN = {'rotary_pos_emb': True, 'attn_kv_heads': 2, 'ff_glu': True, 'ff_swish': True, 'use_rmsnorm': True, 'ff_no_bias': True}
FEATURES: dict[str, dict[str, Any]] = {
    'plain': {},
    'alibi': {'alibi_pos_bias': True},
    't5_bias': {'rel_pos_bias': True},
    'dynamic_bias': {'dynamic_pos_bias': True},
    'mem_kv16': {'attn_num_mem_kv': 16},
    'value_residual': {'add_value_residual': True},
    'shift_tokens': {'shift_tokens': 1},
    'macaron': {'macaron': True},
    'sandwich_norm': {'sandwich_norm': True},
    'qk_norm': {'attn_qk_norm': True},
    'streams4': {'num_residual_streams': 4},
    'window128': {'attn_max_attend_past': 128},
    'softclamp': {'attn_softclamp_logits': True},
    'head_sink': {'attn_head_learned_sink': True},
    'sigmoid': {'attn_sigmoid': True},
    'talking_heads': {'attn_pre_talking_heads': True},
    'sparse_topk8': {'attn_sparse_topk': 8},
}
# beside what a feature is timed, where that is not the plain model: one with as many layers
BESIDE: dict[str, dict[str, Any]] = {'macaron': {'custom_layers': ('f', 'a', 'f') * 6}}
Step = Callable[[], Any]


def ids(rows: int, length: int, vocabulary: int = VOCABULARY) -> Tensor:
    return torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))


def training(loss: Callable[[], Tensor], model: torch.nn.Module) -> Step:
    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        return value

    return step


class Growth:
    """How many times as long a token takes behind 2,016 others as behind 224, the reading of those aside."""

    def __init__(self, generate: Callable[[Tensor, int], Any], tokens: int = 160) -> None:
        self.generate, self.tokens = generate, tokens

    def __call__(self) -> float:
        near, far = (self.seconds(ids(1, length)) for length in (224, 2016))
        return far / near

    def seconds(self, prompt: Tensor) -> float:
        first = seconds_of(lambda: self.generate(prompt, 1))
        return seconds_of(lambda: self.generate(prompt, 1 + self.tokens)) - first


class Ours:
    """Whatever ``x_transformers`` this interpreter imports."""

    def decoder(self, vocabulary: int = VOCABULARY, length: int = LENGTH, **flags: Any) -> Any:
        from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

        flags = {'dim': 512, 'depth': 6, 'heads': 8} | flags
        return AutoregressiveWrapper(
            TransformerWrapper(num_tokens=vocabulary, max_seq_len=length, attn_layers=Decoder(**flags))
        )

    def prepare(self, name: str) -> tuple[Step, torch.nn.Module]:
        from x_transformers import Encoder, TransformerWrapper, ViTransformerWrapper, XTransformer

        kind, *rest = name.split('/')
        flags = MODERN if 'modern' in rest else {}
        if kind == 'train':
            model, x = self.decoder(**flags), ids(2, LENGTH)
            return training(lambda: model(x), model), model
        if kind == 'streams':
            model, x = self.decoder(num_residual_streams=4), ids(1, LENGTH)
            return training(lambda: model(x), model), model
        if kind == 'vocab':
            model, x = self.decoder(WIDE), ids(2, LENGTH, WIDE)
            return training(lambda: model(x), model), model
        if kind == 'feature':
            chosen = BESIDE.get(rest[1], {}) if rest[0] == 'beside' else FEATURES[rest[0]]
            model, x = self.decoder(**chosen), ids(1, LENGTH)
            return training(lambda: model(x), model), model
        if kind == 'compiled':
            model, prompt, compiles = self.decoder(length=4096, **flags).eval(), ids(1, 32), rest[0] != 'beside'
            return lambda: model.generate(prompt, 256, temperature=0.0, compile=compiles), model
        if kind == 'prefill':
            model, x = self.decoder(length=2048, **flags).eval(), ids(1, 2048)
            return torch.no_grad()(lambda: model.net(x)), model
        if kind == 'decode':
            model, prompt = self.decoder(length=4096, **flags).eval(), ids(int(rest[1][1:]), 32)
            return lambda: model.generate(prompt, 256, temperature=0.0), model
        if kind == 'growth':
            model = self.decoder(length=4096, **flags).eval()
            return Growth(lambda prompt, steps: model.generate(prompt, steps, temperature=0.0)), model
        if kind == 'encoder':
            stack = Encoder(dim=512, depth=6, heads=8)
            model, x = TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=LENGTH, attn_layers=stack), ids(2, LENGTH)
            mask = torch.arange(LENGTH) < torch.tensor([[LENGTH], [700]])
            return training(lambda: model(x, mask=mask).square().mean(), model), model
        if kind == 'vit':
            stack = Encoder(dim=512, depth=6, heads=8)
            model = ViTransformerWrapper(image_size=256, patch_size=16, num_classes=1000, attn_layers=stack)
            images = torch.randn(4, 3, 256, 256)
            return training(lambda: model(images).square().mean(), model), model
        if kind == 'encdec':
            shape = {'num_tokens': VOCABULARY, 'depth': 3, 'heads': 8, 'max_seq_len': LENGTH}
            sides = {f'{side}_{key}': value for side in ('enc', 'dec') for key, value in shape.items()}
            model, x = XTransformer(dim=512, **sides), ids(2, LENGTH)
            return training(lambda: model(x, x), model), model
        if kind == 'xl':
            return self.memories()
        raise ValueError(f'unknown workload {name}')

    def memories(self) -> tuple[Step, torch.nn.Module]:
        from x_transformers import Decoder, TransformerWrapper, XLAutoregressiveWrapper

        segment = {'max_seq_len': LENGTH // 2, 'max_mem_len': LENGTH // 2}
        stack = Decoder(dim=512, depth=6, heads=8, **MODERN)
        model = XLAutoregressiveWrapper(TransformerWrapper(num_tokens=VOCABULARY, attn_layers=stack, **segment))
        x = ids(2, LENGTH + 1)
        return training(lambda: model(x), model), model


class TheFloor:
    def prepare(self, name: str) -> tuple[Step, torch.nn.Module]:
        from floor import Floor, FloorStreams, FloorVision

        kind, *rest = name.split('/')
        modern = 'modern' in rest
        if kind in ('train', 'vocab'):
            vocabulary = WIDE if kind == 'vocab' else VOCABULARY
            model, x = Floor(vocabulary=vocabulary, length=LENGTH, modern=modern), ids(2, LENGTH, vocabulary)
            return training(lambda: model.loss(x), model), model
        if kind == 'streams':
            model, x = FloorStreams(vocabulary=VOCABULARY, length=LENGTH), ids(1, LENGTH)
            return training(lambda: model.loss(x), model), model
        if kind == 'prefill':
            model, x = Floor(vocabulary=VOCABULARY, length=2048, modern=modern), ids(1, 2048)
            return torch.no_grad()(lambda: model(x)), model
        if kind == 'decode':
            model, prompt = Floor(vocabulary=VOCABULARY, length=4096, modern=modern), ids(int(rest[1][1:]), 32)
            return lambda: model.generate(prompt, 256), model
        if kind == 'growth':
            model = Floor(vocabulary=VOCABULARY, length=4096, modern=modern)
            return Growth(model.generate), model
        if kind == 'encoder':
            model, x = Floor(vocabulary=VOCABULARY, length=LENGTH, causal=False), ids(2, LENGTH)
            mask = torch.arange(LENGTH) < torch.tensor([[LENGTH], [700]])
            return training(lambda: model(x, mask=mask).square().mean(), model), model
        if kind == 'vit':
            model, images = FloorVision(), torch.randn(4, 3, 256, 256)
            return training(lambda: model(images).square().mean(), model), model
        if kind == 'encdec':
            encoder = Floor(vocabulary=VOCABULARY, length=LENGTH, causal=False, depth=3)
            decoder = Floor(vocabulary=VOCABULARY, length=LENGTH, cross=True, depth=3)
            both, x = torch.nn.ModuleList((encoder, decoder)), ids(2, LENGTH)
            return training(lambda: decoder.loss(x, context=encoder.hidden(x)), both), both
        if kind == 'xl':
            model, x = Floor(vocabulary=VOCABULARY, length=LENGTH, modern=True), ids(2, LENGTH + 1)
            return training(lambda: model.segments_loss(x, LENGTH // 2), model), model
        raise ValueError(f'unknown workload {name}')


def saved_megabytes(step: Step, model: torch.nn.Module) -> float:
    """What one step keeps for its backward, parameters aside."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(seen.values()) / 2**20


def peak_megabytes(step: Step, model: torch.nn.Module) -> float | None:
    """How far one step goes above what is held before it; None where the system does not tell."""
    status = Path('/proc/self/status')
    try:
        model.zero_grad(set_to_none=True)
        gc.collect()
        # memory that earlier steps have given back, but the allocator has not, would hide what this one takes
        ctypes.CDLL(None).malloc_trim(0)
        Path('/proc/self/clear_refs').write_text('5')
        before = resident(status, 'VmRSS')
        step()
        return (resident(status, 'VmHWM') - before) / 1024
    except (OSError, AttributeError):
        return None


def beside_plain(maker: Any, name: str) -> Callable[[str], dict[str, Any]]:
    """A feature and, in turn with it in the same process, the model without it."""
    (step, model), (plain, plain_model) = maker.prepare(name), maker.prepare(name.replace('/', '/beside/'))
    step()
    plain()
    turns = [0]

    def answer(action: str) -> dict[str, Any]:
        if action == 'memory':
            if not name.startswith('feature/'):
                return {'peak_mb': peak_megabytes(step, model)}
            megabytes = {'saved_mb': saved_megabytes(step, model), 'plain_saved_mb': saved_megabytes(plain, plain_model)}
            return {'peak_mb': peak_megabytes(step, model), **megabytes}
        turns[0] += 1
        order = (step, plain) if turns[0] % 2 else (plain, step)
        times = {each: seconds_of(each) for each in order}
        return {'seconds': times[step], 'plain_seconds': times[plain]}

    return answer


def alone(maker: Any, name: str) -> Callable[[str], dict[str, Any]]:
    step, model = maker.prepare(name)
    step()

    def answer(action: str) -> dict[str, Any]:
        if name.startswith('growth/'):
            return {'seconds': step()} if action == 'time' else {}
        if action == 'time':
            return {'seconds': seconds_of(step)}
        saved = {} if name.split('/')[0] in ('decode', 'prefill') else {'saved_mb': saved_megabytes(step, model)}
        return {'peak_mb': peak_megabytes(step, model), **saved}

    return answer


def seconds_of(step: Step) -> float:
    start = time.thread_time()
    step()
    return time.thread_time() - start


def resident(status: Path, name: str) -> int:
    return int(next(line for line in status.read_text().splitlines() if line.startswith(name)).split()[1])


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.filterwarnings('ignore')
    if sys.argv[1] == 'hf':
        # this file is loaded a second time under its own name, for what both use
        from hugging_face import HuggingFace

        maker: Any = HuggingFace()
    else:
        maker = {'ours': Ours, 'floor': TheFloor}[sys.argv[1]]()
    name, answer = None, None
    for line in sys.stdin:
        wanted, action = line.split()
        if wanted != name or answer is None:
            answer = None
            gc.collect()
            beside = wanted.startswith(('feature/', 'compiled/'))
            try:
                name, answer = wanted, (beside_plain if beside else alone)(maker, wanted)
            except NotImplementedError as missing:
                print(json.dumps({'missing': str(missing)}), flush=True)
                continue
        print(json.dumps(answer(action)), flush=True)


if __name__ == '__main__':
    main()
