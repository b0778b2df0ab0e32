"""The page on which flags are tried out: its figures are those of ``x-transformers info``, its pictures those of the modules.

Figures are measured at one and two blocks; the page adds up, for blocks are alike and branches independent of each other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from block_diagrams import SCHEMES, diagram
from torch import Tensor

from x_transformers.attention.geometry import ScoreShape
from x_transformers.attention.mask import Mask
from x_transformers.cli.info import InfoOptions, Summary, look
from x_transformers.position.relative import AlibiPositionalBias
from x_transformers.position.rotary import RotaryEmbedding, apply_rotary_pos_emb
from x_transformers.training.build import build_network

ROOT = Path(__file__).parent.parent
SEQ_LEN, VOCABULARY, DRAWN = 1024, 256, 24
WIDTHS = {'256': 256, '512': 512, '1024': 1024}
DIM_HEAD = 64

# of each choice, its options: the label, and the flags that it sets
KEYS: dict[str, dict[str, Any]] = {
    'one per query head': {},
    '2 (grouped)': {'attn_kv_heads': 2},
    '1 (multi-query)': {'attn_kv_heads': 1},
}
POSITIONS: dict[str, dict[str, Any]] = {
    'learned, absolute': {},
    'rotary': {'rotary_pos_emb': True},
    'ALiBi': {'alibi_pos_bias': True},
    'none': {'disable_abs_pos_emb': True},
}
WINDOWS: dict[str, dict[str, Any]] = {'all of the past': {}, 'the last 128 tokens': {'attn_max_attend_past': 127}}
FORWARDS: dict[str, dict[str, Any]] = {
    'GELU, 4 x': {},
    'SwiGLU, 4 x': {'ff_glu': True, 'ff_swish': True},
    'ReLU², 4 x': {'ff_relu_squared': True},
}
NORMS: dict[str, dict[str, Any]] = {'layer norm': {}, 'RMS norm': {'use_rmsnorm': True}}
FIGURES = ('parameters', 'flops_per_token', 'cache_bytes')


def figures(width: int, depth: int, flags: dict[str, Any]) -> tuple[float, ...]:
    """What ``info`` tells of a decoder."""
    options = InfoOptions(seq_len=SEQ_LEN, training=False)
    given = {'dim': width, 'depth': depth, 'heads': width // DIM_HEAD, 'attn_dim_head': DIM_HEAD, 'max_seq_len': SEQ_LEN}
    with torch.device('meta'):
        network = build_network(given | flags, VOCABULARY).eval()
    summary = Summary.of(network, look(network, options), None, options)
    return tuple(getattr(summary, name) for name in FIGURES)


def parts(width: int, flags: dict[str, Any]) -> tuple[list[float], list[float]]:
    """(of one block, of what is around the blocks)."""
    one, two = figures(width, 1, flags), figures(width, 2, flags)
    block = [second - first for first, second in zip(one, two, strict=True)]
    return block, [first - each for first, each in zip(one, block, strict=True)]


def less(a: tuple[list[float], list[float]], b: tuple[list[float], list[float]]) -> list[list[float]]:
    return [[x - y for x, y in zip(left, right, strict=True)] for left, right in zip(a, b, strict=True)]


def measured() -> dict[str, Any]:
    """Of each width: every attention with the plain rest, and what the other choices add to that."""
    found: dict[str, Any] = {}
    for label, width in WIDTHS.items():
        attention = {
            f'{keys}|{positions}|{window}': parts(width, KEYS[keys] | POSITIONS[positions] | WINDOWS[window])
            for keys in KEYS
            for positions in POSITIONS
            for window in WINDOWS
        }
        plain = parts(width, {})
        # a macaron has two feed-forwards, so that these two choices are no sum
        blocks = {
            f'{scheme}|{forward}': dict(SCHEMES[scheme].flags) | FORWARDS[forward] for scheme in SCHEMES for forward in FORWARDS
        }
        added = {name: less(parts(width, flags), plain) for name, flags in (blocks | NORMS).items()}
        found[label] = {'attention': attention, 'added': added}
    return found


def masks() -> dict[str, list[list[int]]]:
    """Who sees whom, as attention itself would mask it; the window is drawn smaller than it is."""
    shape = ScoreShape(DRAWN, DRAWN)
    drawn = {'all of the past': Mask(causal=True), 'the last 128 tokens': Mask(causal=True, past=6)}
    return {name: mask.rendered(shape)[0, 0].expand(DRAWN, DRAWN).int().tolist() for name, mask in drawn.items()}  # type: ignore[index]


def scores() -> dict[str, list[list[float]]]:
    """What positions do to the score of a query and a key that are equal, at each pair of places; 1 is the highest."""
    alibi = AlibiPositionalBias(4)(DRAWN, DRAWN)[1]
    rotary = RotaryEmbedding(DIM_HEAD // 2)
    ones = torch.ones(1, 1, DRAWN, DIM_HEAD // 2)
    turned = apply_rotary_pos_emb(ones, rotary.forward_from_seq_len(DRAWN)[0])
    flat = torch.ones(DRAWN, DRAWN)
    return {
        'learned, absolute': rounded(flat),
        'none': rounded(flat),
        'ALiBi': rounded(alibi.exp()),
        'rotary': rounded((turned @ turned.mT)[0, 0] / (DIM_HEAD // 2)),
    }


def rounded(matrix: Tensor) -> list[list[float]]:
    return [[round(value, 3) for value in row] for row in matrix.tolist()]


def data() -> dict[str, Any]:
    choices = {
        'keys': KEYS, 'positions': POSITIONS, 'window': WINDOWS, 'forward': FORWARDS, 'norm': NORMS,
        'scheme': {name: dict(scheme.flags) for name, scheme in SCHEMES.items()},
    }  # fmt: skip
    return {
        'widths': WIDTHS,
        'dim_head': DIM_HEAD,
        'seq_len': SEQ_LEN,
        'vocabulary': VOCABULARY,
        'choices': choices,
        'measured': measured(),
        'masks': masks(),
        'scores': scores(),
        'blocks': {name: {'svg': diagram(scheme), 'says': scheme.says} for name, scheme in SCHEMES.items()},
    }


def page() -> str:
    """The page in Markdown; ``explore.js`` fills it from the figures in it."""
    text = (ROOT / 'tools/explore.md').read_text(encoding='utf-8')
    blocks = ''.join(
        f'<figure class="scheme">{diagram(scheme)}<figcaption><strong>{name}</strong> {scheme.says}</figcaption></figure>'
        for name, scheme in SCHEMES.items()
    )
    found = json.dumps(data(), separators=(',', ':')).replace('</', '<\\/')
    return text.replace('<!-- data -->', f'<script type="application/json" id="explore-data">{found}</script>').replace(
        '<!-- blocks -->', f'<div class="schemes">{blocks}</div>'
    )


if __name__ == '__main__':
    print(len(page()))
