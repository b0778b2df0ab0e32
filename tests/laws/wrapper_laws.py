"""The laws for the models around a stack: tokens, vectors, numbers, several inputs, and generation with any combination."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.laws.arguments import Along, Arguments
from tests.laws.combination import Combination, contradicts, shaken
from tests.laws.groups import CROSS, DECODER, DIM, GROUPS, LENGTH, MEMORIES, PREFIX, TOKENS
from tests.laws.laws import ROWS, Broken, must, must_equal, row
from x_transformers import (
    AutoregressiveWrapper,
    ContinuousAutoregressiveWrapper,
    ContinuousTransformerWrapper,
    Decoder,
    Encoder,
    MultiInputTransformerWrapper,
    TransformerWrapper,
    XValAutoregressiveWrapper,
    XValTransformerWrapper,
)

EMB_DIM, DIM_IN = 12, 5

# what is drawn: keywords of the model, of its stack, and what is given at the call
MODEL_OPTIONS: dict[str, dict[str, Any]] = {
    'memory': {'num_memory_tokens': 2},
    'no_abs': {'use_abs_pos_emb': False},
    'sinusoidal': {'scaled_sinu_pos_emb': True},
    'emb_dim': {'emb_dim': EMB_DIM},
    'post_emb_norm': {'post_emb_norm': True},
}
STACK_OPTIONS: dict[str, dict[str, Any]] = {
    'rotary': {'rotary_pos_emb': True},
    'alibi': {'alibi_pos_bias': True},
    'value_residual': {'add_value_residual': True},
    'streams': {'num_residual_streams': 2},
}
CALL_OPTIONS = ('mems', 'mem_masks', 'prepend', 'prepend_mask', 'sum_embeds', 'pos', 'self_attn_kv_mask')
KINDS = ('tokens', 'vectors', 'likelihoods', 'numbers', 'several')


@dataclass(frozen=True)
class Wrapped:
    """A model of one kind around a decoder or an encoder, with some options."""

    kind: str
    causal: bool
    names: tuple[str, ...]

    def __str__(self) -> str:
        return '+'.join((self.kind, 'decoder' if self.causal else 'encoder', *self.names))

    def has(self, *names: str) -> bool:
        return bool(set(names) & set(self.names))

    def build(self, seed: int = 0, **more: Any) -> nn.Module:
        stack_flags: dict[str, Any] = {'dim': DIM, 'depth': 2, 'heads': 2, 'attn_dim_head': 8, 'verbose': False}
        for name in self.names:
            stack_flags |= STACK_OPTIONS.get(name, {})
            more |= MODEL_OPTIONS.get(name, {})
        stack = (Decoder if self.causal else Encoder)(**stack_flags)
        more |= {'attn_layers': stack, 'max_seq_len': 2 * LENGTH}
        return shaken(BUILDERS[self.kind](**more), seed).double().eval()

    def inputs(self, seed: int = 1) -> tuple[Arguments, Arguments]:
        """(what goes in, everything else)."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        ids = torch.randint(0, TOKENS, (ROWS, LENGTH), generator=generator)
        x: dict[str, Any] = {
            'tokens': {'x': ids},
            'vectors': {'x': normal(ROWS, LENGTH, DIM_IN)},
            'likelihoods': {'x': normal(ROWS, LENGTH, DIM_IN)},
            'numbers': {'x': ids, 'x_num': normal(ROWS, LENGTH)},
            'several': {'x': {'pitch': ids, 'length': ids % 7}},
        }[self.kind]
        width = EMB_DIM if self.has('emb_dim') else DIM
        given: dict[str, Any] = {}
        if self.has('mems'):
            given['mems'] = Along([normal(ROWS, MEMORIES, DIM) for _ in range(2)])
        if self.has('mem_masks'):
            shown = torch.arange(MEMORIES) >= torch.tensor([0, 1, MEMORIES])[:, None]
            given['mem_masks'] = Along([shown, shown])
        if self.has('prepend', 'prepend_mask'):
            given['prepend_embeds'] = normal(ROWS, 2, width)
        if self.has('prepend_mask'):
            given['prepend_mask'] = torch.arange(2) >= torch.tensor([0, 1, 2])[:, None]
        if self.has('sum_embeds'):
            given['sum_embeds'] = Along(normal(ROWS, LENGTH, width), tokens=(1,))
        if self.has('pos'):
            given['pos'] = Along(torch.randint(1, 3, (LENGTH,), generator=generator).cumsum(0) - 1, rows=None, tokens=(0,))
        if self.has('self_attn_kv_mask'):
            shown = torch.rand(ROWS, LENGTH, generator=generator) < 0.7
            shown[:, 0] = True
            given['self_attn_kv_mask'] = Along(shown, tokens=(1,))
        return Arguments({name: Along(value, tokens=(1,)) for name, value in x.items()}, LENGTH), Arguments(given, LENGTH)

    def call(self, model: nn.Module, x: dict[str, Any], given: dict[str, Any], **more: Any) -> Any:
        """One tensor (b n k) about the positions of ``x``; with what else was asked for."""
        out = model(**x, **given, **more)
        asked = any(more.get(name) for name in ('return_intermediates', 'return_mems', 'return_attn'))
        length = next(iter(x.values()))
        length = (next(iter(length.values())) if isinstance(length, dict) else length).shape[1]
        if asked:
            return self.read(out[0], length), out[1]
        return self.read(out, length)

    def read(self, out: Any, length: int) -> Tensor:
        if self.kind == 'likelihoods' and out.ndim == 4:
            out = torch.cat(out.unbind(0), dim=-1)
        elif self.kind == 'numbers' and isinstance(out, tuple):
            out = torch.cat((out[0], out[1].unsqueeze(-1)), dim=-1)
        elif isinstance(out, dict):
            out = torch.cat([out[name] for name in sorted(out)], dim=-1)
        return out[:, max(out.shape[1] - length, 0) :]


def continuous(probabilistic: bool) -> Callable[..., nn.Module]:
    def build(**flags: Any) -> nn.Module:
        return ContinuousTransformerWrapper(**{'dim_in': DIM_IN, 'dim_out': 3, 'probabilistic': probabilistic} | flags)

    return build


BUILDERS: dict[str, Callable[..., nn.Module]] = {
    'tokens': lambda **flags: TransformerWrapper(num_tokens=TOKENS, **flags),
    'vectors': continuous(False),
    'likelihoods': continuous(True),
    'numbers': lambda **flags: XValTransformerWrapper(num_tokens=TOKENS, numerical_token_id=3, **flags),
    'several': lambda **flags: MultiInputTransformerWrapper(num_tokens={'pitch': TOKENS, 'length': 7}, **flags),
}


def draw_wrapped(count: int, seed: int) -> list[Wrapped]:
    """Every kind around a decoder and an encoder without options, and ``count`` random ones."""
    source = random.Random(seed)
    options = (*MODEL_OPTIONS, *STACK_OPTIONS, *CALL_OPTIONS)
    found = {Wrapped(kind, causal, ()): None for kind in KINDS for causal in (True, False)}
    while len(found) < count + 2 * len(KINDS):
        names = set(source.sample(options, source.randint(1, 5)))
        names |= {'mems'} if 'mem_masks' in names else set()
        if names >= {'mems', 'pos'} or names >= {'no_abs', 'sinusoidal'}:
            continue
        kind = source.choice(KINDS)
        if kind == 'numbers':
            names -= {'post_emb_norm'}  # it has no such keyword
        found.setdefault(Wrapped(kind, source.random() < 0.6, tuple(sorted(names))))
    return list(found)


# ---------------------------------------------------------------- laws


def finite(case: Wrapped) -> None:
    """Outputs and gradients are finite, and every parameter gets a gradient."""
    model = case.build()
    x, given = case.inputs()
    out = case.call(model, x.part(), given.part())
    must(bool(out.isfinite().all()), 'output not finite')
    (out * torch.arange(out.numel(), dtype=out.dtype).cos().view_as(out)).sum().backward()
    for name, parameter in model.named_parameters():
        must(parameter.grad is not None and bool(parameter.grad.isfinite().all()), f'{name}: gradient missing or not finite')


@torch.no_grad()
def causal(case: Wrapped) -> None:
    if not case.causal:
        return
    model = case.build()
    x, given = case.inputs()
    other, _ = case.inputs(seed=9)
    before = case.call(model, x.part(), given.part())
    for cut in (1, 5, LENGTH - 1):
        mixed = joined(x.part(stop=cut), other.part(start=cut))
        must_equal(case.call(model, mixed, given.part())[:, :cut], before[:, :cut], f'position {cut} and later are seen')


def joined(left: Any, right: Any) -> Any:
    if isinstance(left, dict):
        return {name: joined(left[name], right[name]) for name in left}
    return torch.cat((left, right), dim=1)


@torch.no_grad()
def rows_and_padding(case: Wrapped) -> None:
    """A row gives the same alone as among others, and under a mask (or ``lens``) what it gives cut."""
    model = case.build()
    x, given = case.inputs()
    together = case.call(model, x.part(), given.part())
    lengths = torch.tensor([LENGTH, 5, 2])
    mask = torch.arange(LENGTH) < lengths[:, None]
    # of two masks over keys the one for keys alone counts there: padding is then seen
    blind = not case.has('self_attn_kv_mask')
    padded = case.call(model, x.part(), given.part(), mask=mask)
    if case.kind in ('vectors', 'likelihoods'):
        must_equal(case.call(model, x.part(), given.part(), lens=lengths), padded, 'lens against mask')
    for each, length in enumerate(lengths.tolist()):
        alone = case.call(model, x.part(row(each)), given.part(row(each)))
        must_equal(alone, together[row(each)], f'row {each} alone')
        cut = case.call(model, x.part(row(each), 0, length), given.part(row(each), 0, length))
        if blind:
            must_equal(padded[row(each), :length], cut, f'row {each}, padded from {length} to {LENGTH}')


@torch.no_grad()
def cached_is_full(case: Wrapped) -> None:
    if not case.causal:
        return
    model: Any = case.build()
    x, given = case.inputs()
    if not model.can_cache_kv:
        _, cache = case.call(model, x.part(stop=4), given.part(stop=4), return_intermediates=True)
        try:
            case.call(model, x.part(stop=5), given.part(stop=5), cache=cache, return_intermediates=True)
        except ValueError:
            return
        raise Broken('says that it cannot be cached, and yet takes a cache')
    full = case.call(model, x.part(), given.part())
    for whole in (False, True):
        cache, done = None, 0
        for upto in (4, 5, LENGTH):
            piece = x.part(stop=upto) if whole or cache is None else x.part(start=done, stop=upto)
            extra = {} if cache is None else {'cache': cache, 'input_not_include_cache': not whole}
            out, cache = case.call(model, piece, given.part(stop=upto), return_intermediates=True, **extra)
            must_equal(out[:, done - upto :], full[:, done:upto], f'tokens {done} to {upto} with a cache (whole={whole})')
            done = upto


@torch.no_grad()
def segments_are_whole(case: Wrapped) -> None:
    """With the memories of the first segment, the second gives what it gives in the whole."""
    if not case.causal or case.has('memory', 'prepend', 'prepend_mask', 'mems', 'self_attn_kv_mask'):
        return
    model = case.build(max_mem_len=LENGTH)
    x, given = case.inputs()
    whole = case.call(model, x.part(), given.part())
    _, mems = case.call(model, x.part(stop=5), given.part(stop=5), return_mems=True)
    part = given.part(start=5) | {'pos': given.given['pos'].value if case.has('pos') else torch.arange(LENGTH)}
    out, _ = case.call(model, x.part(start=5), part, mems=mems, return_mems=True)
    must_equal(out, whole[:, 5:], 'the second segment, with the memories of the first')


RETURNS = {
    'tokens': ('embeddings', 'logits_and_embeddings', 'intermediates', 'embeddings_and_intermediates', 'logit_entropies',
               'attn_z_loss', 'mems', 'attn'),
    'vectors': ('embeddings', 'intermediates', 'mems', 'attn'),
    'likelihoods': ('embeddings', 'intermediates', 'mems', 'attn'),
    'numbers': ('embeddings', 'intermediates', 'mems', 'attn'),
    'several': ('embeddings', 'logits_and_embeddings', 'intermediates', 'attn_z_loss', 'mems', 'attn'),
}  # fmt: skip


@torch.no_grad()
def every_return(case: Wrapped) -> None:
    """Whatever is asked for, outputs and embeddings are the same numbers, and the form is that of the documentation."""
    model = case.build(max_mem_len=4)
    x, given = case.inputs()
    plain = model(**x.part(), **given.part())
    embeds = model(**x.part(), **given.part(), return_embeddings=True)
    names = RETURNS[case.kind]
    subsets = [subset for size in (1, 2, 3) for subset in itertools.combinations(names, size)]
    for subset in random.Random(str(case)).sample(subsets, min(10, len(subsets))):
        out = model(**x.part(), **given.part(), **{f'return_{name}': True for name in subset})
        record_too = bool({'intermediates', 'logit_entropies', 'attn_z_loss'} & set(subset))
        if record_too or {'mems', 'attn'} & set(subset):
            out, second = out
            if record_too:
                must(('mems' not in subset) == (second.mems is None), f'{subset}: memories in the intermediates')
                must(('attn_z_loss' not in subset) == (second.attn_z_loss is None), f'{subset}: z-loss in the intermediates')
            else:
                must(len(second) == 2, f'{subset}: {len(second)} memories or maps of 2 layers')
            if 'mems' in subset:
                mems = second.mems if record_too else second
                must(all(mem.shape == (ROWS, 4, DIM) for mem in mems), f'{subset}: memories of shape {mems[0].shape}')
        if 'logits_and_embeddings' in subset:
            same(out[0], plain, f'{subset}: outputs')
            same(out[1], embeds, f'{subset}: embeddings')
        elif 'embeddings_and_intermediates' in subset:
            same(out[0], embeds, f'{subset}: embeddings')
            must(len(out[1].attn_intermediates) == 2, f'{subset}: intermediates of 2 layers')
        else:
            same(out, embeds if 'embeddings' in subset else plain, f'{subset}: result')


def same(got: Any, want: Any, what: str) -> None:
    if isinstance(want, Tensor):
        must_equal(got, want, what)
        return
    pairs = [(got[name], want[name]) for name in want] if isinstance(want, dict) else list(zip(got, want, strict=True))
    for each, wanted in pairs:
        must_equal(each, wanted, what)


@torch.no_grad()
def survives_copies(case: Wrapped) -> None:
    model = case.build()
    x, given = case.inputs()
    want = case.call(model, x.part(), given.part())
    must_equal(case.call(copy.deepcopy(model), x.part(), given.part()), want, 'after a deep copy')
    with torch.device('meta'):
        hollow: Any = case.build()
    hollow = hollow.to_empty(device=next(model.parameters()).device)
    for tensor in (*hollow.parameters(), *hollow.buffers()):
        tensor.fill_(float('nan') if tensor.is_floating_point() else 0)
    hollow.reset_parameters()
    must(bool(case.call(hollow.double(), x.part(), given.part()).isfinite().all()), 'built on the meta device: not finite')
    hollow.load_state_dict(model.state_dict(), strict=True)
    must_equal(case.call(hollow, x.part(), given.part()), want, 'built on the meta device, filled and loaded')


GENERATING: dict[str, Callable[..., Any]] = {
    'tokens': AutoregressiveWrapper,
    'vectors': ContinuousAutoregressiveWrapper,
    'likelihoods': ContinuousAutoregressiveWrapper,
    'numbers': XValAutoregressiveWrapper,
}


@torch.no_grad()
def generates_alike(case: Wrapped) -> None:
    """With a cache what comes without; a ragged prompt gives what its row gives alone."""
    if not case.causal or case.kind not in GENERATING or case.has('pos', 'sum_embeds', 'self_attn_kv_mask'):
        return
    # frames are as wide as what is read of them
    wide = {'dim_out': DIM_IN} if case.kind in ('vectors', 'likelihoods') else {}
    model = GENERATING[case.kind](case.build(**wide))
    x, given = case.inputs()

    def made(rows: slice = slice(None), length: int = 5, **more: Any) -> Tensor:
        prompts = (value[rows, :length] for value in x.part(stop=5).values())
        out = model.generate(*prompts, seq_len=4, temperature=0.0, **given.part(rows), **more)
        if isinstance(out, Tensor):
            return out.double()
        return torch.cat((out.sampled_token_ids.double(), out.sampled_numbers.double().nan_to_num()), dim=1)

    cached = made()
    must_equal(made(cache_kv=False), cached, 'with a cache')
    if case.has('mems', 'prepend', 'prepend_mask'):
        return
    lengths = [5, 2, 3]
    ragged = made(prompt_lens=torch.tensor(lengths))
    for each, length in enumerate(lengths):
        must_equal(ragged[row(each)], made(row(each), length), f'prompt {each} of {length} tokens')


WRAPPER_LAWS = (
    finite,
    causal,
    rows_and_padding,
    cached_is_full,
    segments_are_whole,
    every_return,
    generates_alike,
    survives_copies,
)


# ---------------------------------------------------------------- generation

# no logits over the vocabulary, or an argument that must cover tokens yet to come
NOT_GENERATED = {'output_heads', 'next_embed', 'only_embed', 'squeezed', 'logits_dim', 'average', 'cls', 'recycling'}
NOT_GENERATED |= {'embed_ids', 'sum_embeds', 'kv_shift', 'pos', 'pos_rows', 'condition_per_token', 'in_attn_cond_per_token'}
# what is generated may repeat itself, and of equal scores rounding picks the best
NOT_GENERATED |= {'sparse_topk', 'sparse_topk_through', 'hard'}


def draw_generating(count: int, seed: int) -> list[Combination]:
    source = random.Random(seed)
    found: dict[Combination, None] = {}
    while len(found) < count:
        kind = source.choice((DECODER, DECODER, CROSS, PREFIX))
        fitting = [
            entry.name
            for entry in GROUPS
            if kind in entry.kinds
            and entry.name not in NOT_GENERATED
            and not entry.random
            and not entry.name.startswith(('attn_mask', 'attn_bias'))
        ]
        names = source.sample(fitting, source.randint(1, 4))
        if not contradicts(set(names)):
            found.setdefault(Combination(kind, tuple(sorted(names))))
    return list(found)


@torch.no_grad()
def generates(case: Combination) -> None:
    """With a cache the same tokens as without; a ragged prompt the same as alone; beams too, with their scores."""
    net: Any = case.build()
    model = AutoregressiveWrapper(net)
    x = torch.randint(0, TOKENS, (ROWS, 5), generator=torch.Generator().manual_seed(4))
    given = case.inputs(ROWS)
    greedy: dict[str, Any] = {'temperature': 0.0}
    plain = model.generate(x, 4, cache_kv=False, **greedy, **given.part())
    if net.can_cache_kv:
        must_equal(model.generate(x, 4, **greedy, **given.part()).double(), plain.double(), 'with a cache')
    options: dict[str, Any] = {'beams': 2, 'return_beams_and_scores': True}
    found, scores = model.beam_search(x, 3, cache_kv=False, **options, **given.part())
    if net.can_cache_kv:
        again, scored = model.beam_search(x, 3, **options, **given.part())
        must_equal(scored, scores, 'scores of beams with a cache')
        must_equal(again.double(), found.double(), 'beams with a cache')
    if any('hybrid' in name for name in case.names) or case.has('interspersed', 'mems'):
        return
    lengths = [5, 2, 3]
    given = given.without({'prefix_attn_len'})
    for cached in (True, False):
        ragged = model.generate(x, 4, prompt_lens=torch.tensor(lengths), cache_kv=cached, **greedy, **given.part())
        for each, length in enumerate(lengths):
            alone = model.generate(x[row(each), :length], 4, cache_kv=cached, **greedy, **given.part(row(each)))
            must_equal(ragged[row(each)].double(), alone.double(), f'prompt {each} of {length} tokens (cache={cached})')
