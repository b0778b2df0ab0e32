"""What experts cost: a training step of a mixture of experts against that of one feed-forward of the active width.

``python benchmarks/experts.py``: width 512, 4,096 tokens, float32, one thread, forward and backward. The two are timed in
turns, and the median of the ratios is what counts: a machine that slows down slows both.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from x_transformers import FeedForward


def seconds(feedforward: FeedForward, x: torch.Tensor) -> float:
    """Of one step."""
    feedforward.zero_grad()
    started = time.perf_counter()
    feedforward(x).square().mean().backward()
    return time.perf_counter() - started


def ratios(options: argparse.Namespace) -> list[float]:
    """Time with experts over time without, once for each round."""
    inner = options.width * options.mult
    experts = FeedForward(
        options.width, experts=options.experts, experts_active=options.active, dim_inner=inner // options.active
    )
    plain = FeedForward(options.width, dim_inner=inner)
    x = torch.randn(1, options.tokens, options.width, requires_grad=True)
    for each in (experts, plain):
        seconds(each, x)
    return [seconds(experts, x) / seconds(plain, x) for _ in range(options.rounds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--width', type=int, default=512)
    parser.add_argument('--tokens', type=int, default=4096)
    parser.add_argument('--experts', type=int, default=8)
    parser.add_argument('--active', type=int, default=2)
    parser.add_argument('--mult', type=int, default=4, help='width of all active experts together, as a multiple')
    parser.add_argument('--rounds', type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = sorted(ratios(options))
    print(
        f'{options.experts} experts, {options.active} active: {statistics.median(found):.2f} times a feed-forward of the same '
        f'active width (from {found[0]:.2f} to {found[-1]:.2f} in {len(found)} rounds)'
    )


if __name__ == '__main__':
    main()
