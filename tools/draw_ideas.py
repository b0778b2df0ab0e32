"""Draw docs/assets/ideas.png: who looks at whom under some flags. Needs matplotlib.

Every map is read from an attention of the library, of one sequence of tokens that come from a slowly turning direction.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from x_transformers.drawing import panels, save_figure, style

PATH = Path(__file__).parent.parent / 'docs/assets/ideas.png'
N, DIM = 24, 32
WEIGHTS: dict[str, dict[str, Any]] = {
    'plain': {},
    'window\nattn_max_attend_past=5': {'attn_max_attend_past': 5},
    'highest scores\nattn_sparse_topk=3': {'attn_sparse_topk': 3},
    'sigmoid\nattn_sigmoid': {'attn_sigmoid': True},
    'signed\nattn_cog_signed': {'attn_cog_signed': True},
    'selective\nattn_selective': {'attn_selective': True},
}
BIASES: dict[str, dict[str, Any]] = {
    'ALiBi\nalibi_pos_bias': {'alibi_pos_bias': True},
    'T5\nrel_pos_bias': {'rel_pos_bias': True, 'rel_pos_num_buckets': 8, 'rel_pos_max_distance': 24},
    'dynamic\ndynamic_pos_bias': {'dynamic_pos_bias': True},
    'forgetting\nattn_data_dependent_alibi': {'attn_data_dependent_alibi': True},
    'xPos\nrotary_xpos': {'rotary_xpos': True, 'rotary_xpos_scale_base': 16, 'rotary_emb_dim': 16},
    'a prefix\nPrefixDecoder': {'prefix': 8},
}


def tokens() -> Tensor:
    """Neighbours are alike, and so are tokens eight places apart."""
    torch.manual_seed(0)
    place = torch.arange(N)[:, None] * torch.tensor([2 * torch.pi / 8, 2 * torch.pi / 40])
    wave = torch.cat((place.sin(), place.cos()), dim=-1) @ torch.randn(4, DIM)
    return (wave + 0.3 * torch.randn(N, DIM))[None]


def drawn(prefix: int | None = None, **flags: Any) -> Tensor:
    """The weights (or, of a signed attention, signed ones) of the first head of one layer, (n n)."""
    from x_transformers import Decoder, PrefixDecoder

    torch.manual_seed(1)
    kind = Decoder if prefix is None else PrefixDecoder
    stack = kind(dim=DIM, depth=1, heads=2, attn_dim_head=16, verbose=False, **flags).eval()
    with torch.no_grad():
        attention: Any = stack.layers[0].inside
        attention.to_k.weight.copy_(attention.to_q.weight)
        for name, parameter in stack.named_parameters():
            if 'rel_pos' in name or 'forget' in name:
                parameter.copy_(torch.randn_like(parameter) * 0.4)
        given = {} if prefix is None else {'prefix_attn_len': prefix}
        _, seen = stack(tokens(), return_hiddens=True, **given)
    weights: Tensor = seen.attn_intermediates[0].post_softmax_attn[0, 0].detach()
    return weights


def main() -> None:
    with style():
        figure, rows = panels(2, 6, width=12, height=4.8)
        for axes, row in zip(rows, (WEIGHTS, BIASES), strict=True):
            for axis, (title, flags) in zip(axes, row.items(), strict=True):
                weights = drawn(**flags)
                signed = bool((weights < 0).any())
                most = weights.abs().quantile(0.98).item()
                low, colours = (-most, 'PuOr') if signed else (0.0, 'viridis')
                axis.imshow(weights, cmap=colours, vmin=low, vmax=most)
                axis.set_title(title, fontsize=8)
                axis.set_xticks([])
                axis.set_yticks([])
        print(f'wrote {save_figure(figure, PATH)}')


if __name__ == '__main__':
    main()
