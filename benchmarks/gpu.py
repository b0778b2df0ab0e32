"""What a CPU cannot show, in order of importance, within a time: ``python benchmarks/gpu.py --budget 480`` (or ``make gpu``).

Each measurement is written as soon as it is there, so that a run that was stopped goes on. What did not run is listed.
On a CPU everything runs at toy size, which shows that the script works, and nothing about a GPU.

    --budget SECONDS    no measurement is begun after that
    --all               every flag in place of the sample
    --out FOLDER        gpu.json and gpu.md
    --device NAME       cuda where there is one, else cpu
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from x_transformers import AutoregressiveWrapper, Decoder, FeedForward, TransformerWrapper
from x_transformers.attention.kernels.choose import use_kernel
from x_transformers.training.speed import peak_of, training_flops

# one for each part of a model: (name, keywords of the stack)
SAMPLE: dict[str, dict[str, Any]] = {
    'plain': {},
    'rotary': {'rotary_pos_emb': True},
    'alibi': {'alibi_pos_bias': True},
    'rel_pos_bias': {'rel_pos_bias': True},
    'dynamic_bias': {'dynamic_pos_bias': True},
    'rmsnorm': {'use_rmsnorm': True},
    'sandwich_norm': {'sandwich_norm': True},
    'macaron': {'macaron': True},
    'shift_tokens': {'shift_tokens': 1},
    'value_residual': {'add_value_residual': True},
    'residual_attn': {'residual_attn': True},
    'streams': {'num_residual_streams': 4},
    'gate_residual': {'gate_residual': True},
    'layerscale': {'use_layerscale': True},
    'kv_heads': {'attn_kv_heads': 1},
    'window': {'attn_max_attend_past': 32},
    'softclamp': {'attn_softclamp_logits': True},
    'qk_norm': {'attn_qk_norm': True},
    'talking_heads': {'attn_pre_talking_heads': True},
    'sparse_topk': {'attn_sparse_topk': 8},
    'mem_kv': {'attn_num_mem_kv': 4},
    'gate_values': {'attn_gate_values': True},
    'glu': {'ff_glu': True, 'ff_swish': True},
    'relu_squared': {'ff_relu_squared': True},
}
# shares of a peak that others reach on an H100, to compare with
ANCHORS = {'50M': (1.67e6, 0.398), '124M': (463e3, None)}
KERNELS = (
    ('sdpa', 'plain'), ('sdpa', 'kv_heads'), ('sdpa', 'window'), ('sdpa', 'alibi'), ('sdpa', 'mem_kv'), ('sdpa', 'qk_norm'),
    ('flex', 'softclamp'), ('flex', 'alibi'), ('flex', 'window'), ('flex', 'kv_heads'), ('flex', 'rel_pos_bias'),
    ('blocks', 'softclamp'), ('blocks', 'talking_heads'), ('blocks', 'sparse_topk'),
)  # fmt: skip
# a block of FlexAttention's has 128 queries: two of them and a rest
KERNEL_LENGTH = 300
Result = dict[str, Any]


class Place:
    """A device, and how large things are on it."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.gpu = self.device.type == 'cuda'
        self.name = torch.cuda.get_device_name(self.device) if self.gpu else platform.processor() or 'cpu'
        self.peak = peak_of(self.device)

    def model(self, flags: dict[str, Any], *, dim: int = 32, depth: int = 2, tokens: int = 64, length: int = 64) -> Any:
        torch.manual_seed(0)
        heads = max(2, dim // 64)
        given = {'dim': dim, 'depth': depth, 'heads': heads, 'attn_dim_head': dim // heads, 'verbose': False, **flags}
        with self.device:
            return AutoregressiveWrapper(
                TransformerWrapper(num_tokens=tokens, max_seq_len=length, attn_layers=Decoder(**given))
            )

    def rows(self, batch: int, length: int, tokens: int = 64) -> Tensor:
        return torch.randint(tokens, (batch, length), generator=torch.Generator().manual_seed(1)).to(self.device)

    def wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, act: Callable[[], Any], times: int) -> float:
        """Of one call, the best of three rounds."""
        act()
        found = []
        for _ in range(3):
            self.wait()
            began = time.perf_counter()
            for _ in range(times):
                act()
            self.wait()
            found.append((time.perf_counter() - began) / times)
        return min(found)

    def half(self) -> Any:
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


def gradients(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, all gradients in one vector)."""
    model.zero_grad()
    loss = model(ids)
    loss.backward()
    return loss.detach().float(), torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])


# the measurements


def half_precision(place: Place, flags: dict[str, Any]) -> Result:
    """Loss and gradients in bf16 against float32; causal: later tokens change nothing that was said before."""
    model, ids = place.model(flags), place.rows(2, 64)
    loss, grads = gradients(model, ids)
    with place.half():
        half, its = gradients(model, ids)
    changed = ids.clone()
    changed[:, 40:] = (changed[:, 40:] + 1) % 64
    with torch.no_grad(), place.half():
        net = model.eval().net
        leak = (net(ids)[:, :40] - net(changed)[:, :40]).abs().max()
    off = float((half - loss).abs() / loss)
    angle = float(torch.nn.functional.cosine_similarity(grads, its, dim=0))
    return {
        'loss_off': off,
        'gradient_cosine': angle,
        'leak': float(leak),
        'good': off < 0.02 and angle > 0.98 and float(leak) == 0,
    }


def kernel(place: Place, name: str, flags: dict[str, Any]) -> Result:
    """A kernel against the reference, with gradients: in float32, and in bf16 against float32."""
    model, ids = place.model(flags, dim=128, length=KERNEL_LENGTH), place.rows(2, KERNEL_LENGTH)
    with use_kernel('reference'):
        loss, grads = gradients(model, ids)
    found: Result = {}
    # half precision is off by a cosine of 0.98 at most, as above
    for precision, inside, limit in (('float32', nullcontext(), 1e-4), ('bf16', place.half(), 0.2)):
        try:
            with use_kernel(name), inside:
                its_loss, its = gradients(model, ids)
        except ValueError as error:
            found['left_out'] = f'{precision}: {error}'
            continue
        off = float((its - grads).norm() / grads.norm())
        found |= {f'{precision}_loss_off': float((its_loss - loss).abs()), f'{precision}_gradient_off': off}
        found['good'] = off < limit and found.get('good', True)
    return found


def no_synchronisation(place: Place, flags: dict[str, Any]) -> Result:
    """A training step in which the host never waits for the device. Only a GPU can tell."""
    if not place.gpu:
        return {'left_out': 'needs CUDA'}
    model, ids = place.model(flags), place.rows(2, 64)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        with place.half():
            loss = model(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    torch.cuda.set_sync_debug_mode('error')
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode('default')
    return {'good': True}


def one_graph(place: Place, flags: dict[str, Any]) -> Result:
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(place.model(flags), backend=counter, fullgraph=True)
    compiled(place.rows(2, 64)).backward()
    return {'graphs': counter.frame_count, 'good': counter.frame_count == 1}


def training_speed(
    place: Place, flags: dict[str, Any], *, dim: int, depth: int, tokens: int, batch: int, length: int
) -> Result:
    """Tokens per second and the share of the peak of a whole step."""
    model, ids = place.model(flags, dim=dim, depth=depth, tokens=tokens, length=length), place.rows(batch, length, tokens)
    flops = training_flops(model, ids)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    forward = torch.compile(model) if place.gpu else model

    def step() -> None:
        with place.half():
            loss = forward(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = place.seconds(step, 10 if place.gpu else 1)
    found: Result = {
        'parameters': sum(p.numel() for p in model.parameters()),
        'tokens_per_second': batch * length / seconds,
        'mfu': flops / seconds / place.peak if place.peak else None,
    }
    return found | ({'memory_gib': torch.cuda.max_memory_allocated(place.device) / 2**30} if place.gpu else {})


def copying(place: Place) -> Result:
    """Bytes read and written in a second by a plain copy, to which decoding is compared."""
    block = torch.empty(2**30 if place.gpu else 2**20, dtype=torch.uint8, device=place.device)
    target = torch.empty_like(block)
    return {'bytes_per_second': 2 * block.numel() / place.seconds(lambda: target.copy_(block), 10)}


def decoding(place: Place, *, dim: int, depth: int, batch: int, compiled: bool) -> Result:
    """Tokens per second behind the first 64, and the bytes of weights read for them as a share of what a copy moves."""
    model = place.model({'rotary_pos_emb': True}, dim=dim, depth=depth, length=512).eval()
    if place.gpu:
        model = model.bfloat16()
    prompt, short, long = place.rows(batch, 16), *((64, 256) if place.gpu else (4, 8))

    def write(length: int) -> float:
        def act() -> Tensor:
            return model.generate(prompt, length, temperature=0.0, compile=compiled)

        # the first texts compile and record
        act()
        return place.seconds(act, 1)

    steps = (long - short) / max(write(long) - write(short), 1e-9)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    share = size * steps / copying(place)['bytes_per_second']
    return {'parameters': sum(p.numel() for p in model.parameters()), 'tokens_per_second': batch * steps, 'bandwidth': share}


def packing(place: Place) -> Result:
    """Documents of different lengths in one row against one row for each, padded: the useful tokens of a second."""
    dim, lengths = (512, (900, 300, 500, 348)) if place.gpu else (32, (30, 10, 16, 8))
    whole, longest = sum(lengths), max(lengths)
    padded = place.model({'rotary_pos_emb': True}, dim=dim, length=whole)
    packed = place.model({'rotary_pos_emb': True, 'attn_flash_pack_seq': True, 'attn_flash': True}, dim=dim, length=whole)
    ids, mask = place.rows(len(lengths), longest), torch.zeros(len(lengths), longest, dtype=torch.bool, device=place.device)
    for row, length in enumerate(lengths):
        mask[row, :length] = True
    kept = torch.arange(len(lengths), device=place.device).repeat_interleave(torch.tensor(lengths, device=place.device))
    one = place.rows(1, whole)
    with place.half():
        apart = place.seconds(lambda: padded(ids, mask=mask).backward(), 3)
        if not place.gpu:
            return {'padded_tokens_per_second': whole / apart, 'left_out': 'packed attention needs CUDA'}
        starts = torch.nn.functional.pad(torch.tensor(lengths, device=place.device).cumsum(0), (1, 0)).int()
        pack = {'cu_seqlens_q': starts, 'cu_seqlens_k': starts, 'max_seqlen_q': longest, 'max_seqlen_k': longest}
        together = place.seconds(lambda: packed(one, flash_pack_seq_kwargs=pack).backward(), 3)
        with torch.no_grad():
            net = packed.eval().net
            alone = torch.cat([net(part) for part in one.split(lengths, dim=1)], dim=1)
            off = float((net(one, flash_pack_seq_kwargs=pack) - alone).norm() / alone.norm())
    found: Result = {'padded_tokens_per_second': whole / apart, 'packed_tokens_per_second': kept.numel() / together}
    return found | {'off': off, 'good': off < 0.02}


def experts(place: Place, *, dim: int, tokens: int) -> Result:
    """A step of eight experts, two of them active, against one feed-forward of the same active width."""
    with place.device:
        mixed, plain = FeedForward(dim, experts=8, experts_active=2, dim_inner=2 * dim), FeedForward(dim, dim_inner=4 * dim)
        x = torch.randn(1, tokens, dim, requires_grad=True)

    def step(part: FeedForward) -> None:
        with place.half():
            part(x).square().mean().backward()

    return {'times_a_feedforward': place.seconds(lambda: step(mixed), 5) / place.seconds(lambda: step(plain), 5)}


def plan(place: Place, flags: dict[str, dict[str, Any]]) -> Iterator[tuple[str, Callable[[], Result]]]:
    """(name, measurement) in order of importance."""
    for name, given in flags.items():
        yield f'bf16/{name}', lambda given=given: half_precision(place, given)
    for name, flag in KERNELS:
        yield f'kernel/{name}/{flag}', lambda name=name, flag=flag: kernel(place, name, SAMPLE[flag])
    for name, given in flags.items():
        yield f'sync/{name}', lambda given=given: no_synchronisation(place, given)
    modern = {'rotary_pos_emb': True, 'use_rmsnorm': True, 'ff_glu': True, 'ff_swish': True, 'ff_no_bias': True}
    large = (
        {'50M': (512, 8, 32768, 64, 1024), '124M': (768, 12, 50304, 32, 1024)}
        if place.gpu
        else {'50M': (32, 1, 64, 2, 32), '124M': (32, 2, 64, 2, 32)}
    )
    for name, (dim, depth, tokens, batch, length) in large.items():
        sizes = {'dim': dim, 'depth': depth, 'tokens': tokens, 'batch': batch, 'length': length}
        yield f'train/{name}', lambda sizes=sizes: training_speed(place, modern, **sizes)
    yield 'packing', lambda: packing(place)
    yield 'experts', lambda: experts(place, dim=1024 if place.gpu else 32, tokens=16384 if place.gpu else 64)
    yield 'copy', lambda: copying(place)
    decoders = {'150M': (1024, 12), '1.3B': (2560, 16)} if place.gpu else {'150M': (32, 1), '1.3B': (32, 2)}
    for name, (dim, depth) in decoders.items():
        for batch, compiled in ((1, True), (8, True), (1, False)):
            size = {'dim': dim, 'depth': depth, 'batch': batch, 'compiled': compiled and place.gpu}
            yield f'decode/{name}/b{batch}{"" if compiled else "/eager"}', lambda size=size: decoding(place, **size)
    for name, given in flags.items():
        yield f'graphs/{name}', lambda given=given: one_graph(place, given)
    small = (
        {'dim': 512, 'depth': 4, 'tokens': 256, 'batch': 16, 'length': 1024}
        if place.gpu
        else {'dim': 32, 'depth': 1, 'tokens': 64, 'batch': 2, 'length': 32}
    )
    for name, given in flags.items():
        yield f'share/{name}', lambda given=given: training_speed(place, given, **small)


def every_flag() -> dict[str, dict[str, Any]]:
    """All groups of flags of the laws that need nothing at the call."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from tests.laws.groups import DECODER, GROUPS, no_inputs

    fitting = [group for group in GROUPS if DECODER in group.kinds and group.inputs is no_inputs and not group.wrapper]
    return SAMPLE | {group.name: dict(group.flags) for group in fitting}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--budget', type=float, default=480.0)
    parser.add_argument('--all', action='store_true')
    parser.add_argument('--out', type=Path, default=Path('build/gpu'))
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--only', default='', help='names that begin so; several with commas between')
    asked = parser.parse_args(arguments)
    place, began = Place(asked.device), time.monotonic()
    asked.out.mkdir(parents=True, exist_ok=True)
    path = asked.out / 'gpu.json'
    about = {'device': place.name, 'type': place.device.type, 'torch': torch.__version__}
    found: dict[str, Any] = {'about': about, 'results': {}, 'left': []}
    if path.exists() and (before := json.loads(path.read_text())).get('about') == about:
        found['results'] = before['results']
    found['left'] = []
    for name, measure in plan(place, every_flag() if asked.all else SAMPLE):
        if name in found['results'] or not name.startswith(tuple(asked.only.split(','))):
            continue
        if time.monotonic() - began > asked.budget:
            found['left'].append(name)
            continue
        try:
            found['results'][name] = measure()
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            found['results'][name] = {
                'error': f'{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ""}',
                'where': f'{Path(where.filename).name}:{where.lineno}',
                'good': False,
            }
        print(name, found['results'][name], flush=True)
        write(path, found)
    write(path, found)
    bad = [name for name, result in found['results'].items() if result.get('good') is False]
    print(f'{len(found["results"])} measured, {len(found["left"])} left, {len(bad)} not as wanted; written to {asked.out}')
    return 1 if bad else 0


def write(path: Path, found: dict[str, Any]) -> None:
    for target, text in ((path, json.dumps(found, indent=1)), (path.with_suffix('.md'), page(found))):
        temporary = target.with_name(f'.{target.name}')
        temporary.write_text(text + '\n')
        os.replace(temporary, target)


def page(found: dict[str, Any]) -> str:
    about = found['about']
    lines = [f'# {about["device"]}', '', f'torch {about["torch"]}, {about["type"]}.']
    if about['type'] != 'cuda':
        lines.append('This is no GPU: models are of toy size, and the figures say nothing about one.')
    lines += ['', '| measurement | result |', '| --- | --- |']
    for name, result in found['results'].items():
        told = ', '.join(
            f'{key} {value:.4g}' if isinstance(value, float) else f'{key} {value}' for key, value in result.items()
        )
        lines.append(f'| {name} | {told} |')
    for name, (speed, share) in ANCHORS.items():
        lines.append(f'| to compare: {name} of others on an H100 | {speed:.3g} tokens per second, mfu {share or "not told"} |')
    lines += ['', 'Did not run: ' + (', '.join(found['left']) or 'nothing') + '.']
    return '\n'.join(lines)


if __name__ == '__main__':
    sys.exit(main())
