"""Write docs/kernels.md: what each kernel of attention carries, and which one runs, as the kernels themselves say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from x_transformers.attention.attend import ORDER
from x_transformers.attention.geometry import ScoreShape
from x_transformers.attention.kernels.base import CallFacts, Needs
from x_transformers.attention.kernels.choose import KERNELS, choose_kernel
from x_transformers.flags.attention import AttentionFlags

PATH = Path(__file__).parent.parent / 'docs/kernels.md'

# (how it is asked for, settings of attention, facts of the call)
ROWS: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    ('nothing but causality', {}, {}),
    ('a padding mask', {}, {'plain_causal': False, 'masked': True}),
    ('`attn_mask` with a head axis', {}, {'plain_causal': False, 'masked': True, 'masked_heads': True}),
    ('`attn_max_attend_past`', {}, {'plain_causal': False, 'masked': True, 'windowed': True}),
    ('`attn_max_attend_future`, in an encoder', {}, {'plain_causal': False, 'causal': False, 'masked': True, 'windowed': True}),
    ('`attn_num_mem_kv`, `attn_add_zero_kv`', {}, {'plain_causal': False, 'geometry': ScoreShape(1024, 1028, 4)}),
    ('`attn_kv_heads`, `attn_one_kv_head`', {}, {'kv_heads': 2}),
    ('`attn_value_dim_head`', {}, {'value_dim': 48}),
    ('`alibi_pos_bias`', {}, {'plain_causal': False, 'biased': True, 'by_distance': True}),
    (
        '`rel_pos_bias`, `dynamic_pos_bias`, `attn_data_dependent_alibi`',
        {},
        {'plain_causal': False, 'biased': True, 'learned_bias': True},
    ),
    ('`attn_bias` at the call', {}, {'plain_causal': False, 'biased': True}),
    ('packed sequences', {}, {'plain_causal': False, 'packed': True}),
    ('`attn_dropout`, in training', {}, {'dropout': True}),
    ('`attn_qk_norm`', {'qk_norm': True}, {}),
    ('`attn_l2_distance`', {'l2_distance': True}, {}),
    ('`attn_scalable_softmax`', {'scalable_softmax': True}, {}),
    ('`attn_softclamp_logits`', {'softclamp_logits': True}, {}),
    ('`attn_head_learned_sink`', {'head_learned_sink': True}, {}),
    ('`attn_sigmoid`', {'sigmoid': True}, {}),
    ('`attn_sparse_topk`', {'sparse_topk': 8}, {}),
    ('`attn_sparse_topk_straight_through`', {'sparse_topk': 8, 'sparse_topk_straight_through': True}, {}),
    ('`attn_hard`', {'hard': True}, {}),
    ('`attn_gumbel_softmax`', {'gumbel_softmax': True}, {}),
    ('`attn_softpick`', {'softpick': True}, {}),
    ('`attn_stick_breaking`', {'stick_breaking': True}, {}),
    ('`attn_custom_attn_fn`', {'custom_attn_fn': torch.relu}, {}),
    ('`attn_pre_talking_heads`', {'pre_talking_heads': True}, {}),
    ('`attn_post_talking_heads`', {'post_talking_heads': True}, {}),
    ('`attn_pre_scale_post_talking_heads`', {'pre_scale_post_talking_heads': True}, {}),
    ('`attn_cog_signed`', {'cog_signed': True}, {}),
    ('`attn_use_cope`', {'use_cope': True}, {}),
    ('`attn_selective`', {'selective': True}, {}),
    ('`residual_attn`: scores of the layer before', {}, {'previous': True, 'return_scores': True}),
    ('`attn_onnxable`', {'onnxable': True}, {}),
)
GPU: dict[str, Any] = {'device': 'cuda', 'dtype': torch.bfloat16}
CPU: dict[str, Any] = {'device': 'cpu', 'dtype': torch.float32}
HEADS: dict[str, Any] = {'heads': 8, 'kv_heads': 8, 'key_dim': 64, 'value_dim': 64}
ABOUT = """# Kernels

This page says how attention is computed. `make docs` generates it from the declarations of the kernels. A kernel may be faster
than the reference, but it must give the same result. Tests compare each kernel with the reference, including gradients. If a
kernel does not support a rule, the reference runs. For each call, the library runs the first kernel that has no refusal and no
reservation. `Attend.explain` names it and gives the reasons against the others. The context manager
`x_transformers.attention.kernels.choose.use_kernel('blocks')` forces one kernel, for comparisons.

| kernel | description |
| --- | --- |
| varlen | `torch.nn.attention.varlen`: packed sequences, on a GPU in half precision |
| sdpa | `torch.nn.functional.scaled_dot_product_attention` |
| flex | `torch.nn.attention.flex_attention`, compiled; it skips blocks that are masked entirely. No backward on a CPU |
| blocks | plain tensor operations on blocks of queries; the backward recomputes each block |
| reference | the definition: all rules on the whole score matrix |

`attn_flash=True` requires one of the first four. The constructor refuses it with flags that none of them supports.

## What each supports

The reference supports everything. "Yes" means in training, in half precision on a GPU or in single precision on a CPU,
whichever the kernel prefers. A number refers to a reason below the table.
"""


def needs(settings: dict[str, Any]) -> Needs:
    flags = AttentionFlags(**settings)
    return Needs.of((rule for rule in ORDER if rule.is_on(flags)), onnxable=flags.onnxable)


def facts(place: dict[str, Any], changed: dict[str, Any], *, gradients: bool = True) -> CallFacts:
    plain = {'gradients': gradients, 'dropout': False, 'geometry': ScoreShape(1024, 1024), 'plain_causal': True, 'causal': True}
    return CallFacts(**{**place, **HEADS, **plain, **changed})


def alone(geometry: ScoreShape) -> ScoreShape:
    """The same for one query, as in decoding."""
    return ScoreShape(1, geometry.keys, geometry.front)


def told(refusals: tuple[str, ...], settings: dict[str, Any]) -> list[str]:
    """The reasons, without the name of the row that they stand in."""
    names = '|'.join(settings)
    return [re.sub(rf'^({names}) ', 'this ', reason) for reason in refusals] if settings else list(refusals)


def generated() -> str:
    """The text of the file."""
    fused, reasons, lines = KERNELS[:-1], [], [ABOUT]
    lines += ['| asked for | ' + ' | '.join(kernel.name for kernel in fused) + ' |', '| --- |' + ' --- |' * len(fused)]
    for title, settings, changed in ROWS:
        cells = []
        for kernel in fused:
            # varlen is about packed sequences: otherwise it has nothing to say
            more = {**changed, 'packed': True} if kernel.name == 'varlen' else changed
            found = [told(kernel.refusals(needs(settings), facts(place, more)), settings) for place in (GPU, CPU)]
            if not all(found):
                cells.append('yes')
                continue
            reasons += [reason for reason in found[0] if reason not in reasons]
            cells.append(', '.join(str(reasons.index(reason) + 1) for reason in found[0]))
        lines.append(f'| {title} | ' + ' | '.join(cells) + ' |')
    lines += ['', *(f'{number}. {reason}' for number, reason in enumerate(reasons, 1)), '']
    lengths = 'The columns show training with 1,024 queries and 1,024 keys, and decoding one query.'
    lines += ['## Which one runs', '', lengths, '']
    lines += ['| asked for | GPU, bf16 | GPU, one query | CPU, float32 | CPU, one query |', '| --- |' + ' --- |' * 4]
    for title, settings, changed in ROWS:
        cells = []
        for place in (GPU, CPU):
            cells.append(choose_kernel(needs(settings), facts(place, changed)).name)
            one = {
                **changed,
                'geometry': alone(changed.get('geometry', ScoreShape(1024, 1024))),
                'plain_causal': False,
                'dropout': False,
            }
            one['learned_bias'] = False
            cells.append(choose_kernel(needs(settings), facts(place, one, gradients=False)).name)
        lines.append(f'| {title} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    PATH.write_text(generated(), encoding='utf-8')
    print(f'wrote {PATH}')
