"""The laws of the edges: half precision, adapters, caches made or reordered by others, masked tokens, overlapping texts."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tests.laws.combination import Combination, tokens
from tests.laws.groups import DIM, LENGTH, TOKENS
from tests.laws.laws import ROWS, can_cache, decodes_as_in_full, has_hybrid, left_padding_refused, must, must_equal
from tests.laws.wrapper_laws import NOT_GENERATED
from tests.objectives import Around
from x_transformers import AutoregressiveWrapper
from x_transformers.attention.inputs import Intermediates
from x_transformers.cache.intermediates import LayerIntermediates

# ---------------------------------------------------------------- half precision

# how far outputs of two layers may lie from those in double precision with the same weights, as a share of their spread:
# each of some thirty operations in a row rounds by half a unit in the last of 8 or 11 digits
BOUNDS = {torch.bfloat16: 0.24, torch.float16: 0.03}
# what is chosen by comparing two numbers jumps where these are nearly equal
CHOOSES = {'hard', 'sparse_topk', 'sparse_topk_through', 'selective', 'cope_onehot', 'gumbel', 'gumbel_soft'}
FAR = 4000


def spread(t: Tensor) -> float:
    return float(t.double().square().mean().sqrt())


def must_be_near(got: Tensor, want: Tensor, dtype: torch.dtype, what: str) -> None:
    must(bool(got.isfinite().all()), f'{what} in {dtype}: not finite')
    gap = spread(got.double() - want) / max(spread(want), 1e-3)
    must(gap <= BOUNDS[dtype], f'{what} in {dtype}: {gap:.3g} of the spread away from double precision')


def narrowed(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    def one(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: one(each) for name, each in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(one(each) for each in value)
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: one(value) for name, value in given.items()}


@torch.no_grad()
def half_precision_is_near(case: Combination) -> None:
    """bf16 and fp16 give what double precision gives for the same rounded weights, within ``BOUNDS``; also far from 0, and
    behind padding on the left."""
    if case.random or case.has('additional_cache'):
        return
    for dtype in BOUNDS:
        torch.manual_seed(0)
        narrow = case.build(dtype=torch.float32).to(dtype)
        wide: Any = copy.deepcopy(narrow).double()
        x, given = tokens(ROWS), case.inputs(ROWS, dtype=torch.float32)
        calls: list[tuple[str, Any, dict[str, Any]]] = [('output', given, {})]
        if case.causal and not left_padding_refused(case):
            calls.append(('padded', given.without({'pos'}), {'seq_start_pos': torch.tensor([0, 3, 6])}))
        # a decay that halves with every few tokens leaves no number so far away
        if not wide.has_absolute_positions and not case.has('pos', 'pos_rows', 'xpos_base'):
            calls.append(('far away', given, {'seq_pos_offset': FAR}))
        for what, arguments, more in calls:
            part = narrowed(arguments.part(), dtype)
            got = case.call(narrow, x, part, **more)
            want = case.call(wide, x, narrowed(part, torch.float64), **more)
            if case.has(*CHOOSES):
                must(bool(got.isfinite().all()), f'{what} in {dtype}: not finite')
                continue
            if what == 'padded':
                shown = torch.arange(LENGTH) >= more['seq_start_pos'][:, None]
                got, want = got[shown], want[shown]
            must_be_near(got, want, dtype, what)


def hostile_vectors_are_harmless(case: Combination) -> None:
    """A token of zeros, and one whose length is beyond the largest number, in half precision: all is finite, gradients too."""
    if case.kind == 'crosser':
        return
    for dtype in BOUNDS:
        torch.manual_seed(0)
        stack: Any = case.build(dtype=torch.float32).to(dtype).attn_layers
        x = torch.randn(2, LENGTH, DIM, generator=torch.Generator().manual_seed(3))
        # every layer writes the sum of all streams into each of them
        x[0, 4], x[1, 2] = 0.0, 1.7e4 * x[1, 2].sign() / stack.flags.num_residual_streams ** len(stack.layers)
        x = x.to(dtype).requires_grad_()
        given = {'context': x.detach()} if case.kind == 'cross' else {}
        if stack.need_condition:
            given['condition'] = torch.zeros(2, stack.dim_condition)
        out = stack(x, **given)
        must(bool(out.isfinite().all()), f'{dtype}: outputs are not finite')
        out.float().square().mean().backward()
        must(bool(x.grad.isfinite().all()), f'{dtype}: gradients are not finite')  # type: ignore[union-attr]


# ---------------------------------------------------------------- adapters


class Adapter(nn.Module):
    """A low-rank change beside a linear map, whose weight and bias it shows as its own, as adapters do."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, weight = base, base.weight
        self.down = nn.Parameter(torch.randn(weight.shape[1], 2, dtype=weight.dtype) * 0.3)
        self.up = nn.Parameter(torch.randn(2, weight.shape[0], dtype=weight.dtype) * 0.3)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down @ self.up


class Added(nn.Module):
    """The same as a parametrization of the weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(weight.shape[1], 2, dtype=weight.dtype) * 0.3)
        self.up = nn.Parameter(torch.randn(2, weight.shape[0], dtype=weight.dtype) * 0.3)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.down @ self.up).t()


def adapted(model: nn.Module, wrap: bool) -> list[nn.Parameter]:
    """An adapter on every linear map of the stack; those of the adapters that learn."""
    torch.manual_seed(5)
    learning: list[nn.Parameter] = []
    maps = [(holder, name, child) for holder in model.attn_layers.modules() for name, child in holder.named_children()]  # type: ignore[union-attr]
    for holder, name, child in maps:
        if not isinstance(child, nn.Linear):
            continue
        if wrap:
            made: nn.Module = Adapter(child)
            setattr(holder, name, made) if not name.isdigit() else holder.__setitem__(int(name), made)  # type: ignore[operator]
        else:
            made = Added(child.weight)
            parametrize.register_parametrization(child, 'weight', made)
        learning += [made.down, made.up]  # type: ignore[list-item]
    return learning


def adapters_are_called(case: Combination) -> None:
    """Whatever stands in the place of a linear map is called: it learns, and cached steps give what the whole gives."""
    if has_hybrid(case):
        return  # a module of the user's own
    for wrap in (True, False):
        model = case.build()
        plain = [p.requires_grad for p in model.parameters()]
        learning = adapted(model, wrap)
        must(len(learning) > 0 or not any(plain), 'no linear map was found')
        out = case.call(model, tokens(ROWS), case.inputs(ROWS).part())
        (out * torch.arange(out.numel(), dtype=out.dtype).cos().view_as(out)).sum().backward()
        if not case.has('execute_order', 'only_embed', 'attn_pool', 'attn_pool_deep'):
            silent = sum(p.grad is None for p in learning)
            must(silent == 0, f'{silent} of {len(learning)} parts of adapters were not called ({wrap=})')
        decodes_as_in_full(case, model)


# ---------------------------------------------------------------- caches of others


@torch.no_grad()
def rebuilt_caches_continue(case: Combination) -> None:
    """A cache put together of ``cached_kv`` goes on as the cache does that a call returned, or is refused by name."""
    if case.random or not case.causal or not can_cache(case.build(dtype=torch.float32)):
        return
    model = case.build()
    # what the original's caches know nothing of
    x, given = tokens(ROWS), case.inputs(ROWS).without({'prepend_embeds', 'attn_mask', 'attn_bias', 'excise_prepend_embeds'})
    full = case.call(model, x, given.part())
    _, record = case.call(model, x[:, :6], given.part(stop=6), return_intermediates=True)
    held = [Intermediates(cached_kv=each.cached_kv, layer_type=each.layer_type) for each in record.attn_intermediates]
    made = LayerIntermediates(attn_intermediates=held, cache_length=6)
    try:
        out, _ = case.call(model, x, given.part(new=0), cache=made, return_intermediates=True)
    except (ValueError, TypeError) as refusal:
        must('cache' in str(refusal), f'refused without a word on the cache: {refusal}')
        return
    must_equal(out[:, -3:], full[:, 6:], 'behind a cache put together by hand')


@torch.no_grad()
def foreign_nets_write_alike(case: Combination) -> None:
    """Beams around a net by the original's contract, which reorder its cache, find what they find around ours."""
    if case.random or not case.causal or case.inputs(1).given or case.has(*NOT_GENERATED):
        return
    net: Any = case.build()
    if not can_cache(net) or case.has('sparse_topk', 'sparse_topk_through', 'hard'):
        return
    options: dict[str, Any] = {'beams': 2, 'return_beams_and_scores': True}
    x = tokens(ROWS, 4, seed=4)
    found, scores = AutoregressiveWrapper(net).beam_search(x, 4, **options)
    again, scored = AutoregressiveWrapper(Around(net)).beam_search(x, 4, **options)
    must_equal(scored, scores, 'scores of beams around a foreign net')
    must_equal(again.double(), found.double(), 'beams around a foreign net')


@torch.no_grad()
def masked_tokens_are_appended(case: Combination) -> None:
    """Tokens that a mask hides, appended with the cache, are as hidden as in the whole sequence."""
    if case.random or not case.causal or not can_cache(case.build(dtype=torch.float32)):
        return
    model = case.build()
    x, given = tokens(ROWS), case.inputs(ROWS)
    mask = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    mask[0, 3:5], mask[1, 6] = False, False
    full = case.call(model, x, given.part(), mask=mask)
    noise = torch.where(mask, x, (x + 11) % TOKENS)
    must_equal(case.call(model, noise, given.part(), mask=mask)[mask], full[mask], 'what a mask hides is seen')
    cache, done = None, 0
    for upto in (3, 5, 8, LENGTH):
        extra = {} if cache is None else {'cache': cache, 'input_not_include_cache': True}
        part = given.part(stop=upto, new=done)
        out, cache = case.call(model, x[:, done:upto], part, mask=mask[:, done:upto], return_intermediates=True, **extra)
        shown = mask[:, done:upto]
        must_equal(out[shown], full[:, done:upto][shown], f'masked tokens {done} to {upto}, appended with a cache')
        done = upto


# ---------------------------------------------------------------- the z-loss, modes


@torch.no_grad()
def the_z_loss_is_blind(case: Combination) -> None:
    """What stands in the padding changes the z-loss of the attention by nothing, and a row of padding leaves it finite."""
    if case.random or 'a' not in case.build(dtype=torch.float32).attn_layers.plan.kinds:
        return
    model = case.build()
    x, given = tokens(ROWS), case.inputs(ROWS).part()
    mask = torch.arange(LENGTH) < torch.tensor([LENGTH, 5, 3])[:, None]
    noise = torch.where(mask, x, (x + 11) % TOKENS)

    def loss(ids: Tensor, shown: Tensor) -> Tensor:
        out = model(ids, **given, mask=shown, return_attn_z_loss=True, attn_z_loss_weight=1.0)
        found: Tensor = out[1].attn_z_loss
        return found

    try:
        plain = loss(x, mask)
    except ValueError as refusal:
        must('z_loss' in str(refusal), f'refused without a word on the z-loss: {refusal}')
        return
    must_equal(loss(noise, mask), plain, 'the padding counts in the z-loss')
    empty = mask.clone()
    empty[1] = False
    must(bool(loss(x, empty).isfinite()), 'a row of padding makes the z-loss infinite')


@torch.no_grad()
def texts_may_overlap(case: Combination) -> None:
    """Two texts written at the same time are those written alone, and leave every module in the mode that it had."""
    if case.random or not case.causal or case.inputs(1).given or case.has(*NOT_GENERATED):
        return
    model = AutoregressiveWrapper(case.build())
    prompts = [tokens(1, 4, seed=seed) for seed in (4, 5)]
    alone = [model.generate(prompt, 4, temperature=0.0) for prompt in prompts]
    model.train()
    model.net.attn_layers.layers[0].eval()
    before = [module.training for module in model.modules()]
    streams = [model.stream(prompt, 4, temperature=0.0) for prompt in prompts]
    written: list[list[Tensor]] = [[], []]
    for turn in (0, 1, 0, 1, 0, 0, 1, 1):
        written[turn].append(next(streams[turn]))
    for stream in streams:
        stream.close()
    must([module.training for module in model.modules()] == before, 'two texts at the same time leave another mode')
    for texts, want in zip(written, alone, strict=True):
        must_equal(torch.stack(texts, dim=-1).view_as(want).double(), want.double(), 'a text written beside another')


EDGE_LAWS = (
    half_precision_is_near,
    hostile_vectors_are_harmless,
    adapters_are_called,
    rebuilt_caches_continue,
    foreign_nets_write_alike,
    masked_tokens_are_appended,
    the_z_loss_is_blind,
    texts_may_overlap,
)
