"""A combination of flag groups, and the model it builds."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tests.laws.arguments import Arguments, Draw
from tests.laws.groups import (
    BY_NAME,
    CAUSAL,
    CONTEXT_LENGTH,
    CROSS,
    CROSSER,
    DECODER,
    DEPTH,
    DIM,
    DIM_HEAD,
    ENCODER,
    GROUPS,
    HEADS,
    LENGTH,
    MEMORIES,
    PREFIX,
    TOKENS,
    Group,
    Recurrent,
    no_inputs,
)
from x_transformers import CrossAttender, Decoder, Encoder, PrefixDecoder, TransformerWrapper, per_layer
from x_transformers.flags.parts import PARTS
from x_transformers.layers.checks import check_steps

STACKS = {DECODER: Decoder, CROSS: Decoder, ENCODER: Encoder, PREFIX: PrefixDecoder, CROSSER: CrossAttender}
LONGEST_PREFIX = 3


@dataclass(frozen=True)
class Combination:
    """What was drawn. ``str`` gives a text from which ``parse`` makes it again.

    ``apart``: groups whose flags only the last layer of their kind has, written with a ~ behind them.
    """

    kind: str
    names: tuple[str, ...]
    apart: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return '+'.join((self.kind, *(f'{name}~' if name in self.apart else name for name in self.names)))

    @staticmethod
    def parse(text: str) -> Combination:
        kind, *written = text.split('+')
        apart = frozenset(name.removesuffix('~') for name in written if name.endswith('~'))
        return Combination(kind, tuple(name.removesuffix('~') for name in written), apart)

    @property
    def groups(self) -> list[Group]:
        return [BY_NAME[name] for name in self.names]

    @cached_property
    def random(self) -> bool:
        return any(entry.random for entry in self.groups)

    @cached_property
    def flags(self) -> dict[str, Any]:
        flags: dict[str, Any] = {}
        for entry in self.groups:
            flags.update(of_the_last_layer(entry.flags) if entry.name in self.apart else entry.flags)
        flags = {'dim': DIM, 'heads': HEADS, 'attn_dim_head': DIM_HEAD, 'verbose': False} | flags
        if 'custom_layers' not in flags:
            flags['depth'] = DEPTH
        if self.kind == CROSS:
            flags['cross_attend'] = True
        return flags

    @cached_property
    def wrapper(self) -> dict[str, Any]:
        return {name: value for entry in self.groups for name, value in entry.wrapper.items()}

    def build(self, seed: int = 0, dtype: torch.dtype = torch.float64, **more: Any) -> nn.Module:
        """The model in eval mode, every parameter moved off its start so that zero-initialized parts are active."""
        return shaken(self.fresh(**more), seed).to(dtype).eval()

    def fresh(self, leave_out: str | None = None, stack: Mapping[str, Any] | None = None, **wrapper: Any) -> nn.Module:
        """The model as it is born; without one of its keywords, or with more for its stack or its wrapper."""
        flags = {name: value for name, value in {**self.flags, **(stack or {})}.items() if name != leave_out}
        wrapper = {name: value for name, value in (self.wrapper | wrapper).items() if name != leave_out}
        if 'depth' not in flags and 'custom_layers' not in flags:
            flags['depth'] = DEPTH
        if 'attn_hybrid_module' in flags:
            flags['attn_hybrid_module'] = Recurrent(HEADS * flags.get('attn_value_dim_head', DIM_HEAD))
        layers = STACKS[self.kind](**flags)
        return TransformerWrapper(num_tokens=TOKENS, max_seq_len=2 * LENGTH, attn_layers=layers, **wrapper)

    @cached_property
    def attentions(self) -> int:
        """How many self attentions a forward executes."""
        stack: Any = self.build(dtype=torch.float32).attn_layers
        return sum(step.kind == 'a' for step in check_steps(stack, None))

    def inputs(self, rows: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Arguments:
        """Every argument of the call but the tokens."""
        generator = torch.Generator().manual_seed(seed)
        mems = MEMORIES if self.has('mems') else 0
        draw = Draw(rows, generator, dtype, self.flags, self.wrapper, self.attentions if self.counts else 0, mems)
        given: dict[str, Any] = {}
        for entry in self.groups:
            given.update(entry.inputs(draw))
        if self.kind in (CROSS, CROSSER):
            given['context'] = draw.normal(rows, CONTEXT_LENGTH, DIM)
            given['context_mask'] = torch.arange(CONTEXT_LENGTH) < draw.whole(2, CONTEXT_LENGTH + 1, rows)[:, None]
        if self.kind == PREFIX:
            given['prefix_attn_len'] = draw.whole(1, LONGEST_PREFIX + 1, rows)
        return Arguments(given, LENGTH)

    @property
    def counts(self) -> bool:
        return bool({'mems', 'kv_shift'} & set(self.names))

    def call(self, model: nn.Module, x: Tensor, given: dict[str, Any], **more: Any) -> Any:
        """The model's answer about the tokens ``x``, as one tensor; with its intermediates if these are asked for."""
        out = model(x, **given, **self.asks, **more)
        return (self.read(out[0], x), out[1]) if more.get('return_intermediates') else self.read(out, x)

    @property
    def asks(self) -> dict[str, bool]:
        """What must be asked for, so that everything which the model says is seen."""
        asked = {
            'return_next_embed_pred': 'add_continuous_pred_head' in self.wrapper,
            # without a head of the next token there are none of later ones, as the constructor says
            'return_multi_token_logits': 'multi_token_heads' in self.wrapper and 'return_only_embed' not in self.wrapper,
        }
        return {name: True for name, wanted in asked.items() if wanted}

    def read(self, out: Any, x: Tensor) -> Tensor:
        if 'add_continuous_pred_head' in self.wrapper:
            logits, (predicted, _) = out
            logits = self.read_logits(logits, x)
            if 'attn_pool' in self.wrapper:
                return logits  # attention pools for the logits, the next embedding is still predicted by each token
            predicted = predicted if self.pooled else self.read_tokens(predicted, x)
            shape = predicted.shape[:1] if self.pooled else predicted.shape[:2]
            return torch.cat((logits.reshape(*shape, -1), predicted.reshape(*shape, -1)), dim=-1)
        return self.read_logits(out, x)

    def read_logits(self, out: Any, x: Tensor) -> Tensor:
        if isinstance(out, tuple):  # of several heads
            out = torch.stack(out, dim=-1)
        return out if self.pooled else self.read_tokens(out, x)

    @staticmethod
    def read_tokens(out: Tensor, x: Tensor) -> Tensor:
        """Without what was prepended."""
        return out[:, max(out.shape[1] - x.shape[1], 0) :]

    @property
    def pooled(self) -> bool:
        """One answer for the whole sequence."""
        # attention pools in place of logits: a model without a head still answers for each token
        instead = 'attn_pool' in self.wrapper and 'return_only_embed' not in self.wrapper
        return instead or bool({'average_pool_embed', 'use_cls_token'} & set(self.wrapper))

    @property
    def causal(self) -> bool:
        return self.kind in CAUSAL and not self.pooled

    @property
    def free_from(self) -> int:
        """Tokens before it may see each other."""
        return LONGEST_PREFIX if self.kind == PREFIX else 0

    def has(self, *names: str) -> bool:
        return bool(set(names) & set(self.names))


def shaken(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model


def tokens(rows: int, length: int = LENGTH, seed: int = 2) -> Tensor:
    """Ids, none twice in a row: without positions equal tokens have equal scores, of which rounding picks one."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(TOKENS, generator=generator)[:length] for _ in range(rows)])


BIASES = {name for name, entry in BY_NAME.items() if {'alibi_pos_bias', 'rel_pos_bias', 'dynamic_pos_bias'} & set(entry.flags)}
OWN_BIASES = {'attn_bias', 'attn_bias_heads', 'attn_bias_whole'}


PER_TOKEN = {'condition_per_token', 'in_attn_cond_per_token', 'kv_shift'}
# without blocks that repeat, or with something for each attention
NO_BLOCKS = {
    'lime', 'lime_relu', 'custom_layers', 'par_ratio', 'only_attn_ratio', 'sandwich_coef', 'execute_order', 'mems', 'kv_shift',
    'additional_kv', 'additional_cache', 'unet', 'mudd', 'mixer_delta', 'mixer_gated', 'mixer_own', 'mixer_per_layer',
}  # fmt: skip
# a module of the user's own writes as many channels as the heads of one kind of layer have
HYBRIDS = {entry.name for entry in GROUPS if 'attn_hybrid_module' in entry.flags}
FOR_HEADS = {'attn_mask_heads', 'attn_mask_whole', 'attn_bias_heads', 'attn_bias_whole', 'additional_kv', 'additional_cache'}
FRONT = {'memory_tokens', 'interspersed', 'prepend', 'excise_prepend', 'cls', 'cls_two'}


def contradicts(names: set[str]) -> bool:
    """Whether two arguments of the call say the same thing twice, which is refused there."""
    injected = names & {'in_attn_cond', 'in_attn_cond_per_token'}
    return (
        bool(injected and names & {'reinject', 'reinject_gate'})
        or bool(names & OWN_BIASES and names & BIASES)
        or len(names & OWN_BIASES) > 1
        # rows in front would need entries too
        or bool(names & PER_TOKEN and names & FRONT)
        # memory tokens between the tokens would need entries too
        or (
            'interspersed' in names
            and any(name.startswith(('attn_mask', 'attn_bias')) or name in ('pos', 'pos_rows') for name in names)
        )
        # what is given for each head, or of heads of one width, fits no layer with others
        or bool('per_layer_heads' in names and names & FOR_HEADS)
        or bool(names & {'per_layer_heads', 'per_layer_dim_head', 'per_layer_cross'} and names & HYBRIDS)
        or bool('per_layer_dim_head' in names and 'additional_cache' in names)
        or bool('repeat_blocks' in names and names & NO_BLOCKS)
        # positions must then be given for the memories too
        or bool('mems' in names and names & {'pos', 'pos_rows'})
        # experts are kept in balance in one way
        or bool('experts_biased' in names and names & {'experts_shared', 'experts_raw', 'experts_gated'})
        # places on a grid are not numbers
        or ('context_pos' in names and any(name.startswith('rotary_axes') for name in names))
    )


def of_the_last_layer(flags: dict[str, Any]) -> dict[str, Any]:
    """These flags of layers as tuples, with which all layers but the last of their kind have the defaults."""
    usual = {name: part.default(name.removeprefix(prefix)) for name in flags for prefix, part in [part_of(name)]}
    return {name: per_layer((*[usual[name]] * (DEPTH - 1), value)) for name, value in flags.items()}


def part_of(name: str) -> tuple[str, Any]:
    """(prefix, flags) of the part of a stack that a keyword belongs to."""
    fields = ((prefix, part) for prefix, part in PARTS.items() if name.startswith(prefix))
    return next((found for found in fields if name.removeprefix(found[0]) in found[1].flag_fields()), ('', None))


# groups that can be of one layer alone: flags of layers, each of which is one value, and no argument of the call
SINGLE = {
    entry.name
    for entry in GROUPS
    if entry.flags
    and not entry.wrapper
    and entry.inputs is no_inputs
    and all(part_of(name)[0] and not (callable(value) or isinstance(value, tuple)) for name, value in entry.flags.items())
}
# what layers share has one shape
ALIKE = {entry.name for entry in GROUPS if entry.flags.keys() & {'attn_dim_head', 'attn_value_dim_head', 'attn_kv_heads'}}


def draw(count: int, seed: int, most: int = 6) -> list[Combination]:
    """``count`` distinct combinations of one to ``most`` groups, in every third of which some are of one layer alone."""
    source, of_layers = random.Random(seed), random.Random(f'{seed} layers')
    found: dict[Combination, None] = {}
    while len(found) < count:
        kind = source.choice((DECODER, DECODER, DECODER, ENCODER, ENCODER, CROSS, CROSS, PREFIX, CROSSER))
        fitting = [entry.name for entry in GROUPS if kind in entry.kinds]
        names = source.sample(fitting, source.randint(1, most))
        if contradicts(set(names)):
            continue
        apart = frozenset(name for name in sorted(names) if name in SINGLE and of_layers.random() < 0.5)
        apart = apart if of_layers.random() < 1 / 3 else frozenset()
        apart = apart - ALIKE if set(names) & (FOR_HEADS | HYBRIDS) else apart
        found.setdefault(Combination(kind, tuple(sorted(names)), apart))
    return list(found)


def rotated(entries: Sequence[Group] = GROUPS) -> list[Combination]:
    """Every group alone in a decoder, or else in the first kind that it fits, and in one more kind, which goes round."""
    cases: dict[Combination, None] = {}
    for index, entry in enumerate(entries):
        kinds = sorted(entry.kinds - {DECODER}) or [DECODER]
        for kind in (DECODER if DECODER in entry.kinds else kinds[0], kinds[index % len(kinds)]):
            cases[Combination(kind, (entry.name,))] = None
    return list(cases)


def singles(part: str | None = None) -> list[Combination]:
    """Every group alone, in every kind of model that it fits; or only these kinds or groups, separated by commas."""
    every = [Combination(kind, (entry.name,)) for entry in GROUPS for kind in sorted(entry.kinds)]
    wanted = set(part.split(',')) if part else set()
    return [case for case in every if not wanted or {case.kind, *case.names} & wanted]
