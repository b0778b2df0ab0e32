"""Sequences that are laid end to end into one row give what each gives alone, gradients too, under every flag of a stack."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.laws.combination import Combination, shaken
from tests.laws.groups import CROSSER, DECODER, ENCODER, GROUPS, Group
from x_transformers.attention.kernels.choose import use_kernel
from x_transformers.flags.base import FlagError
from x_transformers.layers.stack import AttentionLayers, CrossAttender, Decoder, Encoder

DIM, STARTS, CONTEXT_STARTS = 16, (0, 3, 4, 9), (0, 2, 6, 7)


def built(cls: type[AttentionLayers], **flags: Any) -> Any:
    torch.manual_seed(0)
    flags = {'dim': DIM, 'depth': 2, 'heads': 2, 'attn_dim_head': 6, 'verbose': False} | flags
    return shaken(cls(**flags), 0).double().eval()


def told(queries: tuple[int, ...], keys: tuple[int, ...]) -> dict[str, Tensor]:
    return {'cu_seqlens_q': torch.tensor(queries, dtype=torch.int32), 'cu_seqlens_k': torch.tensor(keys, dtype=torch.int32)}


PACKED = {'flash_pack_seq_kwargs': told(STARTS, STARTS)}


def pieces(starts: tuple[int, ...]) -> list[slice]:
    return [slice(*pair) for pair in pairwise(starts)]


def must_be_alone(stack: Any, packed: dict[str, Any], context: Tensor | None = None, **given: Any) -> None:
    """Outputs and the gradients of the input and of every parameter."""
    torch.manual_seed(1)
    x = torch.randn(1, STARTS[-1], DIM, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(1, STARTS[-1], DIM, dtype=torch.float64)
    leaves = [x, *stack.parameters()]
    together = stack(x, **given, **packed, **({} if context is None else {'context': context}))
    alone = [
        stack(x[:, piece], **given, **({} if context is None else {'context': context[:, other]}))
        for piece, other in zip(pieces(STARTS), pieces(CONTEXT_STARTS), strict=True)
    ]
    want = torch.cat(alone, dim=1)
    torch.testing.assert_close(together, want)
    options = {'allow_unused': True, 'materialize_grads': True}
    gradients = torch.autograd.grad((together * weight).sum(), leaves, retain_graph=True, **options)
    for gradient, other in zip(gradients, torch.autograd.grad((want * weight).sum(), leaves, **options), strict=True):
        torch.testing.assert_close(gradient, other)


@pytest.mark.parametrize('kernel', ['reference', 'sdpa', 'blocks'])
@pytest.mark.parametrize('cls', [Decoder, Encoder])
@pytest.mark.parametrize('flags', [{}, {'attn_kv_heads': 1, 'attn_num_mem_kv': 2}, {'attn_max_attend_past': 1}], ids=str)
def test_packed_sequences_are_alone(cls: type[AttentionLayers], flags: dict[str, Any], kernel: str) -> None:
    stack = built(cls, attn_flash_pack_seq=True, rotary_pos_emb=True, **flags)
    with use_kernel(kernel):
        must_be_alone(stack, PACKED)


def test_packed_sequences_with_packed_contexts() -> None:
    context = torch.randn(1, CONTEXT_STARTS[-1], DIM, dtype=torch.float64)
    packing = {'flash_pack_seq_context_kwargs': told(STARTS, CONTEXT_STARTS)}
    must_be_alone(built(CrossAttender, cross_attn_flash_pack_seq=True), packing, context)
    both = built(Decoder, cross_attend=True, rotary_pos_emb=True, attn_flash_pack_seq=True, cross_attn_flash_pack_seq=True)
    must_be_alone(both, {**packing, **PACKED}, context)


ALONE = [group for group in GROUPS if group.flags and not group.random and not group.only_training and group.kinds - {CROSSER}]


@pytest.mark.parametrize('entry', ALONE, ids=lambda entry: entry.name)
def test_packed_sequences_are_alone_under_every_flag(entry: Group) -> None:
    kind = DECODER if DECODER in entry.kinds else ENCODER
    case = Combination(kind if kind in entry.kinds else min(entry.kinds), (entry.name,))
    crosses = 'cross_attend' in case.flags
    flags = {'rotary_pos_emb': True} | case.flags | {'attn_flash_pack_seq': True}
    flags |= {'cross_attn_flash_pack_seq': True} if crosses else {}
    try:
        stack = shaken(case.fresh(stack=flags).attn_layers, 0).double().eval()
    except FlagError as refusal:
        if not re.search('flash_pack_seq|rotary', str(refusal)):
            raise
        return
    given = {name: value for name, value in case.inputs(1).part(new=0).items() if name == 'condition' and value.ndim == 2}
    if 'condition' in case.inputs(1).given and not given:
        return  # one for each token
    if crosses:
        context = torch.randn(1, CONTEXT_STARTS[-1], DIM, dtype=torch.float64)
        packing = PACKED | {'flash_pack_seq_context_kwargs': told(STARTS, CONTEXT_STARTS)}
        must_be_alone(stack, packing, context, **given)
    else:
        must_be_alone(stack, PACKED, **given)


X = torch.randn(1, 9, DIM)


@pytest.mark.parametrize(
    ('given', 'sentence'),
    [
        ({'flash_pack_seq_kwargs': told((0, 3, 7), (0, 3, 7))}, r'must begin with 0 and end with the 9 tokens .* \[0, 3, 7\]'),
        ({'flash_pack_seq_kwargs': told((1, 3, 9), (1, 3, 9))}, 'must begin with 0'),
        ({**PACKED, 'mems': [X, X]}, 'mems must be None with'),
        ({**PACKED, 'mask': torch.ones(1, 9, dtype=torch.bool)}, 'mask must be left out with'),
    ],
)
def test_what_does_not_fit(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        built(Decoder, rotary_pos_emb=True, attn_flash_pack_seq=True).float()(X, **given)
