"""The laws for models that are no stack with one sequence: encoder and decoder together, and images."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.laws.combination import shaken
from tests.laws.groups import DIM, LENGTH, TOKENS
from tests.laws.laws import ROWS, Broken, must, must_equal, row
from x_transformers import Encoder, ViTransformerWrapper, XTransformer

TARGET = 5

# keywords of either side; 'tied', 'prepended' and 'attn_mask' are of both, or of the call
SIDES: dict[str, dict[str, Any]] = {
    'memory': {'num_memory_tokens': 2},
    'rotary': {'rotary_pos_emb': True},
    'sinusoidal': {'scaled_sinu_pos_emb': True},
    'alibi': {'alibi_pos_bias': True},
    'rel_pos': {'rel_pos_bias': True},
    'one_kv_head': {'attn_one_kv_head': True},
    'streams': {'num_residual_streams': 2},
    'qk_norm': {'attn_qk_norm': True},
    'softclamp': {'attn_softclamp_logits': True},
}
ONLY_DECODER: dict[str, dict[str, Any]] = {
    'cross_residual': {'residual_attn': True, 'cross_residual_attn': True},
    'value_residual': {'add_value_residual': True},
    'cross_gates': {'cross_attn_gate_values': True},
    'shift_tokens': {'shift_tokens': 1},
}
OPTIONS = (*(f'enc_{name}' for name in SIDES), *(f'dec_{name}' for name in (*SIDES, *ONLY_DECODER)), 'tied', 'prepended')


@dataclass(frozen=True)
class Pair:
    """An ``XTransformer`` with some options."""

    names: tuple[str, ...]

    def __str__(self) -> str:
        return '+'.join(('pair', *self.names))

    def build(self, seed: int = 0) -> XTransformer:
        flags: dict[str, Any] = {'tie_token_emb': 'tied' in self.names}
        for side in ('enc', 'dec'):
            flags |= {
                f'{side}_num_tokens': TOKENS,
                f'{side}_max_seq_len': 2 * LENGTH,
                f'{side}_depth': 2,
                f'{side}_heads': 2,
                f'{side}_attn_dim_head': 8,
                f'{side}_verbose': False,
            }
        flags |= {'dec_cross_attn_dim_head': 8}
        for name in self.names:
            side, _, option = name.partition('_')
            own = SIDES.get(option) or ONLY_DECODER.get(option) or {}
            flags |= {f'{side}_{key}': value for key, value in own.items()}
        model = shaken(XTransformer(dim=DIM, **flags), seed)
        return model.double().eval()  # type: ignore[return-value]

    def inputs(self, seed: int = 1) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        source = torch.randint(0, TOKENS, (ROWS, LENGTH), generator=generator)
        target = torch.randint(0, TOKENS, (ROWS, TARGET), generator=generator)
        given = {}
        if 'prepended' in self.names:
            given['src_prepend_embeds'] = torch.randn(ROWS, 2, DIM, generator=generator, dtype=torch.float64)
        return source, target, given

    def logits(
        self, model: XTransformer, source: Tensor, target: Tensor, mask: Tensor | None, given: dict[str, Tensor]
    ) -> Tensor:
        encoded, mask = model.encode(source, mask, **given)
        out: Tensor = model.decoder.net(target, context=encoded, context_mask=mask)
        return out


def draw_pairs(count: int, seed: int) -> list[Pair]:
    """One without options, and ``count`` random ones."""
    source = random.Random(seed)
    found = {Pair(()): None}
    while len(found) < count + 1:
        names = set(source.sample(OPTIONS, source.randint(1, 5)))
        if any({f'{side}_alibi', f'{side}_rel_pos'} <= names for side in ('enc', 'dec')):
            continue
        found.setdefault(Pair(tuple(sorted(names))))
    return list(found)


def of_row(given: dict[str, Tensor], which: slice) -> dict[str, Tensor]:
    return {name: value[which] for name, value in given.items()}


@torch.no_grad()
def rows_padding_and_causality(case: Pair) -> None:
    """A row says the same alone, and with its source cut where the mask ends; targets do not see what follows them."""
    model = case.build()
    source, target, given = case.inputs()
    other, later, _ = case.inputs(seed=9)
    lengths = torch.tensor([LENGTH, 5, 1])
    mask = torch.arange(LENGTH) < lengths[:, None]
    whole = case.logits(model, source, target, None, given)
    padded = case.logits(model, source, target, mask, given)
    noise = case.logits(model, torch.where(mask, source, other), target, mask, given)
    must_equal(noise, padded, 'other tokens in the padding of the source')
    for each, length in enumerate(lengths.tolist()):
        alone = case.logits(model, source[row(each)], target[row(each)], None, of_row(given, row(each)))
        must_equal(alone, whole[row(each)], f'row {each} alone')
        cut = case.logits(model, source[row(each), :length], target[row(each)], None, of_row(given, row(each)))
        must_equal(padded[row(each)], cut, f'row {each}, its source padded from {length} to {LENGTH}')
    mixed = torch.cat((target[:, :3], later[:, 3:]), dim=1)
    must_equal(case.logits(model, source, mixed, mask, given)[:, :3], padded[:, :3], 'later tokens of the target are seen')


@torch.no_grad()
def generation_is_cached(case: Pair) -> None:
    """With a cache the same tokens as without; from a padded source the same as from the cut one; beams too."""
    model = case.build()
    source, target, given = case.inputs()
    lengths = torch.tensor([LENGTH, 5, 1])
    mask = torch.arange(LENGTH) < lengths[:, None]
    start, greedy = target[:, :2], {'temperature': 0.0}
    plain = model.generate(source, start, 4, mask=mask, cache_kv=False, **given, **greedy)
    must_equal(model.generate(source, start, 4, mask=mask, **given, **greedy).double(), plain.double(), 'with a cache')
    for each, length in enumerate(lengths.tolist()):
        part = of_row(given, row(each))
        alone = model.generate(source[row(each), :length], start[row(each)], 4, **part, **greedy)
        must_equal(alone.double(), plain[row(each)].double(), f'row {each} alone, source of {length} tokens')
    encoded, context_mask = model.encode(source, mask, **given)
    asked: dict[str, Any] = {'beams': 2, 'return_beams_and_scores': True, 'context': encoded, 'context_mask': context_mask}
    found, scores = model.decoder.beam_search(start, 3, cache_kv=False, **asked)
    again, scored = model.decoder.beam_search(start, 3, **asked)
    must_equal(scored, scores, 'scores of beams with a cache')
    must_equal(again.double(), found.double(), 'beams with a cache')


def gradients_reach_everything(case: Pair) -> None:
    model = case.build().train()
    source, target, given = case.inputs()
    model(source, target, mask=torch.arange(LENGTH) < torch.tensor([LENGTH, 5, 2])[:, None], **given).backward()
    for name, parameter in model.named_parameters():
        must(parameter.grad is not None and bool(parameter.grad.isfinite().all()), f'{name}: gradient missing or not finite')


@torch.no_grad()
def copies(case: Pair | Picture) -> None:
    """A deep copy says the same; so does one built on the meta device, filled, and loaded."""
    model = case.build()
    want = case.said(model) if isinstance(case, Picture) else said(case, model)
    twin = copy.deepcopy(model)
    with torch.device('meta'):
        hollow: Any = case.build()
    hollow = hollow.to_empty(device=next(model.parameters()).device)
    for tensor in (*hollow.parameters(), *hollow.buffers()):
        tensor.fill_(float('nan') if tensor.is_floating_point() else 0)
    hollow.reset_parameters()
    hollow = hollow.double()
    hollow.load_state_dict(model.state_dict(), strict=True)
    for name, other in (('a deep copy', twin), ('one built on the meta device', hollow)):
        got = case.said(other) if isinstance(case, Picture) else said(case, other)
        must_equal(got, want, name)


@torch.no_grad()
def said(case: Pair, model: XTransformer) -> Tensor:
    source, target, given = case.inputs()
    return case.logits(model, source, target, None, given)


PAIR_LAWS = (rows_padding_and_causality, generation_is_cached, gradients_reach_everything, copies)

# ---------------------------------------------------------------- images

PICTURE_OPTIONS: dict[str, dict[str, Any]] = {
    'registers': {'num_register_tokens': 2},
    'norm': {'post_emb_norm': True},
    'classes': {'num_classes': 3},
}
STACKS: dict[str, dict[str, Any]] = {
    'rotary': {'rotary_pos_emb': True},
    'streams': {'num_residual_streams': 2},
    'value_residual': {'add_value_residual': True},
    'sandwich': {'sandwich_norm': True},
    'mem_kv': {'attn_num_mem_kv': 2},
}
SIZE, PATCH = 6, 2


@dataclass(frozen=True)
class Picture:
    """A ``ViTransformerWrapper`` with some options."""

    names: tuple[str, ...]

    def __str__(self) -> str:
        return '+'.join(('picture', *self.names))

    def build(self, seed: int = 0) -> nn.Module:
        flags: dict[str, Any] = {}
        stack: dict[str, Any] = {'dim': DIM, 'depth': 2, 'heads': 2, 'attn_dim_head': 8, 'verbose': False}
        for name in self.names:
            flags |= PICTURE_OPTIONS.get(name, {})
            stack |= STACKS.get(name, {})
        model = ViTransformerWrapper(image_size=SIZE, patch_size=PATCH, attn_layers=Encoder(**stack), **flags)
        return shaken(model, seed).double().eval()

    def images(self) -> Tensor:
        return torch.randn(ROWS, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    @torch.no_grad()
    def said(self, model: nn.Module) -> Tensor:
        out: Tensor = model(self.images())
        return out


def draw_pictures(count: int, seed: int) -> list[Picture]:
    source = random.Random(seed)
    options = (*PICTURE_OPTIONS, *STACKS)
    found = {Picture(()): None}
    while len(found) < count + 1:
        found.setdefault(Picture(tuple(sorted(source.sample(options, source.randint(1, 4))))))
    return list(found)


@torch.no_grad()
def returns_and_rows(case: Picture) -> None:
    """A row says the same alone; embeddings and logits are the same numbers in every form, one per patch."""
    model = case.build()
    images = case.images()
    logits, embeds = model(images, return_logits_and_embeddings=True)
    must(tuple(embeds.shape) == (ROWS, (SIZE // PATCH) ** 2, DIM), f'embeddings of shape {tuple(embeds.shape)}')
    must_equal(model(images), logits, 'logits alone')
    must_equal(model(images, return_embeddings=True), embeds, 'embeddings alone')
    if 'classes' not in case.names:
        must_equal(logits, embeds.mean(dim=1), 'without classes: the mean of the embeddings')
    for each in range(ROWS):
        must_equal(model(images[row(each)]), logits[row(each)], f'row {each} alone')
    changed = images.clone()
    changed[..., :PATCH, :PATCH] += 1.0
    if torch.equal(model(changed), logits):
        raise Broken('the first patch is not seen')


def every_parameter_learns(case: Picture) -> None:
    model = case.build()
    out = model(case.images())
    (out * torch.arange(out.numel(), dtype=out.dtype).cos().view_as(out)).sum().backward()
    for name, parameter in model.named_parameters():
        must(parameter.grad is not None and bool(parameter.grad.isfinite().all()), f'{name}: gradient missing or not finite')


PICTURE_LAWS = (returns_and_rows, every_parameter_learns, copies)
