"""A combination of flag groups, and the model it builds."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tests.laws.groups import (
    BY_NAME,
    CROSS,
    DECODER,
    DEPTH,
    DIM,
    DIM_HEAD,
    ENCODER,
    GROUPS,
    HEADS,
    LENGTH,
    TOKENS,
    Group,
    Recurrent,
)
from x_transformers import Decoder, Encoder, TransformerWrapper

CONTEXT_LENGTH = 5


@dataclass(frozen=True)
class Combination:
    """What was drawn. ``str`` gives a text from which ``parse`` makes it again."""

    kind: str
    names: tuple[str, ...]

    def __str__(self) -> str:
        return '+'.join((self.kind, *self.names))

    @staticmethod
    def parse(text: str) -> Combination:
        kind, *names = text.split('+')
        return Combination(kind, tuple(names))

    @property
    def groups(self) -> list[Group]:
        return [BY_NAME[name] for name in self.names]

    @cached_property
    def random(self) -> bool:
        return any(entry.random for entry in self.groups)

    def build(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The model in eval mode, every parameter moved off its start so that zero-initialised parts are active."""
        flags: dict[str, Any] = {}
        wrapper: dict[str, Any] = {}
        for entry in self.groups:
            flags.update(entry.flags)
            wrapper.update(entry.wrapper)
        flags = {'dim': DIM, 'heads': HEADS, 'attn_dim_head': DIM_HEAD, 'verbose': False} | flags
        if 'attn_hybrid_module' in flags:
            flags['attn_hybrid_module'] = Recurrent(HEADS * flags.get('attn_value_dim_head', DIM_HEAD))
        if 'custom_layers' not in flags:
            flags['depth'] = DEPTH
        if self.kind == CROSS:
            flags['cross_attend'] = True
        stack = Encoder(**flags) if self.kind == ENCODER else Decoder(**flags)
        model = TransformerWrapper(num_tokens=TOKENS, max_seq_len=2 * LENGTH, attn_layers=stack, **wrapper)
        return shaken(model, seed).to(dtype).eval()

    def inputs(self, rows: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """Every per-row argument of the call but the tokens."""
        generator = torch.Generator().manual_seed(seed)
        given: dict[str, Tensor] = {}
        for entry in self.groups:
            given.update(entry.inputs(rows, generator, dtype))
        if self.kind == CROSS:
            given['context'] = torch.randn(rows, CONTEXT_LENGTH, DIM, generator=generator, dtype=dtype)
            lengths = torch.randint(2, CONTEXT_LENGTH + 1, (rows,), generator=generator)
            given['context_mask'] = torch.arange(CONTEXT_LENGTH) < lengths[:, None]
        return given

    @property
    def causal(self) -> bool:
        return self.kind != ENCODER


def shaken(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model


def tokens(rows: int, length: int = LENGTH, seed: int = 2) -> Tensor:
    return torch.randint(0, TOKENS, (rows, length), generator=torch.Generator().manual_seed(seed))


# these say the same thing twice at the call, where it is refused
CONTRADICTIONS = ({'in_attn_cond', 'reinject'}, {'in_attn_cond', 'reinject_gate'})


def draw(count: int, seed: int, most: int = 6) -> list[Combination]:
    """``count`` distinct combinations of one to ``most`` groups."""
    source = random.Random(seed)
    found: dict[Combination, None] = {}
    while len(found) < count:
        kind = source.choice((DECODER, DECODER, ENCODER, CROSS))
        fitting = [entry.name for entry in GROUPS if kind in entry.kinds]
        names = source.sample(fitting, source.randint(1, most))
        if any(pair <= set(names) for pair in CONTRADICTIONS):
            continue
        found.setdefault(Combination(kind, tuple(sorted(names))))
    return list(found)


def singles() -> list[Combination]:
    """Every group alone, in every kind of model that it fits."""
    return [Combination(kind, (entry.name,)) for entry in GROUPS for kind in sorted(entry.kinds)]
