"""``python -m tests.hf.large FOLDER``: import a folder; prints the model's bytes and by how many this process grew at most."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.two_processes import whole
from x_transformers import Decoder, TransformerWrapper
from x_transformers.hf import from_hf
from x_transformers.saving import tensors

# 536 MiB in float32
LARGE = {'vocab_size': 32000, 'hidden_size': 1024, 'intermediate_size': 2816, 'num_hidden_layers': 6}
SMALL = {'vocab_size': 40, 'hidden_size': 32, 'intermediate_size': 44, 'num_hidden_layers': 2}


def write(folder: Path, sizes: dict[str, int], shard: int) -> None:
    """A Llama of these sizes in several files."""
    heads = {'num_attention_heads': 8, 'num_key_value_heads': 4}
    folder.mkdir(exist_ok=True)
    config = {'model_type': 'llama', 'architectures': ['LlamaForCausalLM'], 'rms_norm_eps': 1e-5, **sizes, **heads}
    (folder / 'config.json').write_text(json.dumps(config))
    torch.manual_seed(0)
    tensors.write_tensors(
        folder, ((name, torch.rand(shape)) for name, shape in shapes(sizes)), metadata={'format': 'pt'}, shard=shard
    )


def shapes(sizes: dict[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    dim, inner, words = sizes['hidden_size'], sizes['intermediate_size'], sizes['vocab_size']
    yield 'model.embed_tokens.weight', (words, dim)
    for layer in range(sizes['num_hidden_layers']):
        its = f'model.layers.{layer}'
        for name, rows in {'q': dim, 'k': dim // 2, 'v': dim // 2, 'o': dim}.items():
            yield f'{its}.self_attn.{name}_proj.weight', (rows, dim)
        yield f'{its}.mlp.gate_proj.weight', (inner, dim)
        yield f'{its}.mlp.up_proj.weight', (inner, dim)
        yield f'{its}.mlp.down_proj.weight', (dim, inner)
        yield f'{its}.input_layernorm.weight', (dim,)
        yield f'{its}.post_attention_layernorm.weight', (dim,)
    yield 'model.norm.weight', (dim,)
    yield 'lm_head.weight', (words, dim)


def peak() -> int:
    """The most bytes that this process has had (ru_maxrss begins with those of the process that started it)."""
    status = Path('/proc/self/status').read_text(encoding='utf-8')
    return 1024 * int(re.search(r'VmHWM:\s+(\d+) kB', status)[1])


def spread_over_two(folder: str) -> None:
    """Each process has its part of every tensor, and together they are what one process reads."""

    def prepare(model: TransformerWrapper) -> None:
        for layer in model.attn_layers.layers:
            fully_shard(layer)
        fully_shard(model)

    spread = from_hf(folder, prepare=prepare)
    alone = dict(from_hf(folder).named_parameters())
    for name, parameter in spread.named_parameters():
        if not isinstance(parameter, DTensor) or parameter.to_local().numel() >= parameter.numel() > 1:
            raise AssertionError(f'{name} is not spread')
        if not torch.equal(whole(parameter), alone[name]):
            raise AssertionError(f'{name} differs in process {dist.get_rank()}')


if __name__ == '__main__':
    TransformerWrapper(num_tokens=9, max_seq_len=9, attn_layers=Decoder(dim=8, depth=1, heads=1))
    before = peak()
    model = from_hf(sys.argv[1])
    print(sum(p.numel() * p.element_size() for p in model.parameters()), peak() - before)
