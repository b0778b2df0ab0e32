"""What int8 weights of torchao cost or save: the time of a token, compiled, against the same model as it was.

``python benchmarks/int8.py``: width 1,024, one row, float32 and bfloat16, one thread. Both write in turns, and the median
of the ratios is what counts: a machine that slows down slows both.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper


def seconds(model: AutoregressiveWrapper, tokens: int) -> float:
    """Of writing so many tokens."""
    prompt = torch.zeros(1, 8, dtype=torch.long)
    started = time.perf_counter()
    model.generate(prompt, tokens, temperature=0.0, compile=True)
    return time.perf_counter() - started


def ratios(options: argparse.Namespace, dtype: torch.dtype) -> list[float]:
    """Time with int8 weights over time without, once for each round."""
    heads = options.width // 64
    layers = Decoder(
        dim=options.width, depth=options.depth, heads=heads, rotary_pos_emb=True, use_rmsnorm=True, attn_kv_heads=heads // 4,
        ff_glu=True, ff_no_bias=True,
    )  # fmt: skip
    net = TransformerWrapper(num_tokens=256, max_seq_len=512, attn_layers=layers).to(dtype)
    plain = AutoregressiveWrapper(net).eval()
    quantized = copy.deepcopy(plain)
    quantize_(quantized, Int8WeightOnlyConfig())
    for each in (plain, quantized):
        seconds(each, options.tokens)
    return [seconds(quantized, options.tokens) / seconds(plain, options.tokens) for _ in range(options.rounds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--width', type=int, default=1024)
    parser.add_argument('--depth', type=int, default=4)
    parser.add_argument('--tokens', type=int, default=48)
    parser.add_argument('--rounds', type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        found = sorted(ratios(options, dtype))
        print(
            f'{dtype}: {statistics.median(found):.2f} times the time of the model as it was '
            f'(from {found[0]:.2f} to {found[-1]:.2f} in {len(found)} rounds)',
            flush=True,
        )


if __name__ == '__main__':
    main()
