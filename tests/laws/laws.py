"""The laws. Each is a function of a combination that raises ``Broken`` with a sentence, or returns.

All run in double precision, so that a difference is a difference of meaning.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.laws.arguments import Arguments
from tests.laws.combination import Combination, tokens
from tests.laws.groups import LENGTH, TOKENS
from x_transformers.flags.attention import AttentionFlags
from x_transformers.flags.base import FlagError
from x_transformers.generation.continuation import Continuation, compile_refusals, own_copy

ROWS = 3
TOLERANCE = 1e-5


class Broken(AssertionError):
    """A law does not hold."""


def must(condition: bool, sentence: str) -> None:
    if not condition:
        raise Broken(sentence)


def must_equal(got: Tensor, want: Tensor, what: str) -> None:
    must(got.shape == want.shape, f'{what}: shape {tuple(got.shape)} against {tuple(want.shape)}')
    scale = max(1.0, want.detach().abs().max().item()) if want.numel() else 1.0
    gap = (got - want).abs().max().item() if want.numel() else 0.0
    must(gap <= TOLERANCE * scale, f'{what}: differ by {gap:.2g} (values up to {scale:.2g})')


def row(index: int) -> slice:
    return slice(index, index + 1)


def finite(case: Combination) -> None:
    """Outputs and gradients are finite, in eval and in training mode, and every parameter gets a gradient."""
    model = case.build()
    x, given = tokens(ROWS), case.inputs(ROWS).part()
    # the constructor has warned that it does nothing there
    idle = () if model.attn_layers.flags.has_feedforward else ('ff_deep_embed',)
    for mode in (False, True):
        model.train(mode)
        torch.manual_seed(0)
        out = case.call(model, x, given)
        must(bool(out.isfinite().all()), f'output not finite (training={mode})')
        model.zero_grad()
        (out * torch.arange(out.numel(), dtype=out.dtype).cos().view_as(out)).sum().backward()
        for name, parameter in model.named_parameters():
            if not mode and not case.has(
                'execute_order', 'only_embed', 'attn_pool', 'attn_pool_deep'
            ):  # an order may leave layers out
                must(parameter.grad is not None or name in idle, f'{name} gets no gradient')
            if parameter.grad is not None:
                must(bool(parameter.grad.isfinite().all()), f'gradient of {name} not finite (training={mode})')


@torch.no_grad()
def causal(case: Combination) -> None:
    """Changing what comes later changes nothing earlier."""
    if not case.causal or case.random:
        return
    model = case.build()
    x, given = tokens(ROWS), case.inputs(ROWS).part()
    before = case.call(model, x, given)
    for cut in (max(1, case.free_from), 4, LENGTH - 1):
        changed = x.clone()
        changed[:, cut:] = (changed[:, cut:] + 7) % TOKENS
        must_equal(case.call(model, changed, given)[:, :cut], before[:, :cut], f'position {cut} and later are seen from before')


@torch.no_grad()
def row_independent(case: Combination) -> None:
    """A row gives the same alone as among others."""
    if case.random:
        return
    model = case.build()
    x, given = tokens(ROWS), case.inputs(ROWS)
    together = case.call(model, x, given.part())
    for each in range(ROWS):
        alone = case.call(model, x[row(each)], given.part(row(each)))
        must_equal(alone, together[row(each)], f'row {each} alone')


@torch.no_grad()
def padding_blind(case: Combination) -> None:
    """Right padding under a mask: a row gives what it gives alone and cut, and what stands in the padding is not seen."""
    if case.random:
        # kept as in the original: feed-forwards are not told of the mask, so the last token takes features of the first pad
        return
    model = case.build()
    x, given = tokens(ROWS), case.inputs(ROWS)
    lengths = torch.tensor([LENGTH, 5, 3])
    mask = torch.arange(LENGTH) < lengths[:, None]
    padded = case.call(model, x, given.part(), mask=mask)
    noise = torch.where(mask, x, (x + 11) % TOKENS)
    noisy = case.call(model, noise, given.part(), mask=mask)
    for each, length in enumerate(lengths.tolist()):
        alone = case.call(model, x[row(each), :length], given.part(row(each), 0, length))
        within = row(each) if case.pooled else (row(each), slice(0, length))
        must(bool(padded[within].isfinite().all()), 'not finite under a mask')
        must_equal(noisy[within], padded[within], 'the padding is seen')
        must_equal(padded[within], alone, f'row {each}, padded from {length} to {LENGTH}')


@torch.no_grad()
def left_padding_blind(case: Combination) -> None:
    """Left padding under ``seq_start_pos``: a row gives what it gives alone."""
    if case.random or not case.causal:
        return
    model = case.build()
    # a caller's positions are counted from where the caller says
    x, given = tokens(ROWS), case.inputs(ROWS).without({'pos'})
    starts = torch.tensor([0, 3, 6])
    if left_padding_refused(case):
        try:
            case.call(model, x, given.part(), seq_start_pos=starts)
        except ValueError:
            return
        raise Broken('left padding is taken, though it cannot be right')
    padded = case.call(model, x, given.part(), seq_start_pos=starts)
    for each, start in enumerate(starts.tolist()):
        alone = case.call(model, x[row(each), start:], given.part(row(each), start))
        must_equal(padded[row(each), start:], alone, f'row {each}, {start} pads on the left')


def left_padding_refused(case: Combination) -> bool:
    """A module of the user's own would read the padding; rows in front would move the entries of a dense mask."""
    front = case.has('memory_tokens', 'interspersed', 'prepend', 'excise_prepend')
    dense = any(name.startswith(('attn_mask', 'attn_bias')) for name in case.names)
    near = case.has('mems') and any(f'attn_{name}' in case.flags for name in AttentionFlags.having('near_mems'))
    return has_hybrid(case) or case.has('mixer_own') or (front and dense) or case.has('interspersed') or near


def has_hybrid(case: Combination) -> bool:
    return any('hybrid' in name for name in case.names)


def can_cache(model: nn.Module) -> bool:
    return bool(model.can_cache_kv)  # type: ignore[union-attr]


def has_state(case: Combination) -> bool:
    return has_hybrid(case) or any(name.startswith('mixer') for name in case.names)


@torch.no_grad()
def cached_is_full(case: Combination) -> None:
    """Decoding with a cache, one token or several at a time, whole sequence or new tokens only, equals the full forward."""
    decodes_as_in_full(case, case.build())


@torch.no_grad()
def decodes_as_in_full(case: Combination, model: nn.Module) -> None:
    if case.random or not case.causal:
        return
    x, given = tokens(ROWS), case.inputs(ROWS)
    if not can_cache(model):
        _, cache = case.call(model, x[:, :4], given.part(stop=4), return_intermediates=True)
        try:
            case.call(model, x[:, :5], given.part(stop=5), cache=cache, return_intermediates=True)
        except ValueError:
            return
        raise Broken('says that it cannot be cached, and yet takes a cache')
    full = case.call(model, x, given.part())
    for whole in (False, True):
        cache, done = None, 0
        for upto in (4, 5, 6, LENGTH):
            piece = x[:, :upto] if whole or cache is None else x[:, done:upto]
            extra = {} if cache is None else {'cache': cache, 'input_not_include_cache': not whole}
            part = given.part(stop=upto, new=upto - piece.shape[1])
            out, cache = case.call(model, piece, part, return_intermediates=True, **extra)
            must_equal(out[:, done - upto :], full[:, done:upto], f'tokens {done} to {upto} with a cache (whole={whole})')
            done = upto


@torch.no_grad()
def cache_operations(case: Combination) -> None:
    """Rolled back = never appended; reordered = a permuted batch; an old cache can be continued twice; ragged prompts."""
    if case.random or not case.causal:
        return
    model = case.build()
    if not can_cache(model):
        return
    x, given = tokens(ROWS), case.inputs(ROWS)
    _, first = case.call(model, x[:, :4], given.part(stop=4), return_intermediates=True)
    new = {'return_intermediates': True, 'input_not_include_cache': True}
    want, _ = case.call(model, x[:, 4:6], given.part(stop=6, new=4), cache=first, **new)
    again, _ = case.call(model, x[:, 4:6], given.part(stop=6, new=4), cache=first, **new)
    must_equal(again, want, 'an old cache continued a second time')
    front = first.kv_cache.front
    if not has_state(case):  # a recurrent state cannot be rolled back, and says so
        wrong = (x[:, 4:7] + 5) % TOKENS
        _, longer = case.call(model, wrong, given.part(stop=7, new=4), cache=first, **new)
        back, _ = case.call(model, x[:, 4:6], given.part(stop=6, new=4), cache=longer.kv_cache.rollback(front + 4), **new)
        must_equal(back, want, 'after a rollback')
    order = torch.tensor([2, 0, 0])
    mixed, _ = case.call(model, x[order, 4:6], given.part(order, stop=6, new=4), cache=first.kv_cache.reorder(order), **new)
    must_equal(mixed, want[order], 'after a reorder')
    if left_padding_refused(case):
        return
    # behind padding, not all of a prefix would lie in the first call
    given = given.without({'prefix_attn_len', 'pos'})
    starts = torch.tensor([0, 2, 3])
    full = case.call(model, x, given.part(), seq_start_pos=starts)
    out, cache = case.call(model, x[:, :5], given.part(stop=5), seq_start_pos=starts, return_intermediates=True)
    for step in range(5, LENGTH):
        piece, part = x[:, step : step + 1], given.part(stop=step + 1, new=step)
        out, cache = case.call(model, piece, part, seq_start_pos=starts, cache=cache, **new)
        must_equal(out, full[:, step : step + 1], f'step {step} of left-padded prompts with a cache')


CAPACITY = LENGTH + 5


def behind_fixed(given: Arguments, start: int, stop: int) -> dict[str, Any]:
    """The arguments for tokens ``start`` to ``stop`` behind a cache of fixed capacity: about pairs, as wide as the capacity."""
    part = given.part(stop=stop, new=start)
    front = part['prepend_embeds'].shape[1] if 'prepend_embeds' in part else 0
    for name, value in (('attn_mask', True), ('attn_bias', 0.0)):
        if name in part:
            part[name] = F.pad(part[name][..., start:stop, :], (0, CAPACITY - front - stop), value=value)
    if 'pos' in part:
        part['pos'] = part['pos'][..., start:stop]
    return part


# all that is refused behind a cache of fixed capacity
REFUSED = (
    'mixer',
    'attn_selective',
    'attn_hybrid_module',
    'num_memory_tokens',
    'use_cls_token',
    'recycling',
    'TransformerWrapper',
)


@torch.no_grad()
def continuations_are_full(case: Combination, compiled: bool = False) -> None:
    """Tokens read in memory of fixed shape, one or several at a time, give what they give in whole; compiled, by one graph."""
    if case.random or not case.causal:
        return
    model = case.build()
    if reasons := compile_refusals(model):
        must(all(reason.startswith(REFUSED) for reason in reasons), f'refused: {reasons}')
        return
    x, asks = tokens(ROWS), case.asks
    for starts in (None, torch.tensor([0, 2, 3])):
        given, left = case.inputs(ROWS), {}
        if starts is not None:
            if compiled or left_padding_refused(case):
                continue
            given, left = given.without({'prefix_attn_len', 'pos'}), {'seq_start_pos': starts}
        full = case.call(model, x, given.part(), **left)
        _, cache = case.call(model, x[:, :4], given.part(stop=4), return_intermediates=True, **left)
        going_on, graphs = Continuation(model, cache, capacity=CAPACITY), []
        if compiled:
            step = own_copy(going_on._step)
            count: Any = lambda graph, _, graphs=graphs: graphs.append(graph) or graph  # noqa: E731
            going_on._read = torch.compile(step, fullgraph=True, dynamic=False, backend=count)
        for start, stop in pairwise(range(4, LENGTH + 1) if compiled else (4, 5, 6, 8, LENGTH)):
            new = x[:, start:stop]
            out = case.read(going_on.read(new, **behind_fixed(given, start, stop), **left, **asks), new)
            must_equal(out, full[:, start:stop], f'tokens {start} to {stop} in memory of fixed shape ({left})')
        must(len(graphs) == int(compiled), f'{len(graphs)} graphs')


def segments_promised(case: Combination) -> bool:
    """Whether memories carry all that later tokens need of earlier ones.

    A memory is the input of a self attention (https://arxiv.org/abs/1901.02860), which is all that its keys and values are made
    of. With every state kept, a segment gives what it gives as a part of the whole. Not so where earlier *queries*, or anything
    but keys and values, matter to later tokens:

    - selective attention masks keys by what earlier queries have selected;
    - tokens that are shifted take features of their neighbour, and recurrent modules a state, which no memory holds;
    - separate mixtures of the streams for keys and values: a memory is one state for both;
    - memory tokens and what is prepended stand in front of every segment anew, and what is said about pairs of tokens, or about
      keys in general, is said about one segment.
    """
    carried_otherwise = {
        'selective',
        'mv_split',
        'mv_split_learned',
        'aggregated_qkv',
        'smear',
        'canon',
        'canon_a',
        'canon_b',
        'canon_c',
        'canon_d',
        'bigram',
        'bigram_smear',
        'shift',
        'shift_two',
        'streams_qkv',
        'memory_tokens',
        'interspersed',
        'recycling',
    }
    said_of_one = {'mems', 'prepend', 'excise_prepend', 'kv_shift', 'additional_kv', 'additional_cache'}
    dense = any(name.startswith(('attn_mask', 'attn_bias')) for name in case.names)
    return not (has_state(case) or dense or case.has(*carried_otherwise, *said_of_one))


@torch.no_grad()
def segments_are_whole(case: Combination) -> None:
    """Segments that are given the memories of those before them give what they give as parts of one sequence."""
    if case.random or not case.causal or case.kind == 'crosser' or not segments_promised(case):
        return
    try:
        model = case.build(max_mem_len=LENGTH)
    except FlagError:
        return  # mixtures over depth: keys and values have inputs of their own
    x, given = tokens(ROWS), case.inputs(ROWS)
    whole = case.call(model, x, given.part())
    spread = given.given['pos'].value if 'pos' in given.given else torch.arange(LENGTH)
    mems: Any = None
    for start, stop in ((0, 4), (4, 7), (7, LENGTH)):
        part = given.part(start=start, stop=stop)
        if start:
            part.pop('prefix_attn_len', None)  # it lies in the first segment
        # what is said of the memories too: absolute positions begin anew otherwise, and memories are normed by who reads them
        part['pos'] = spread[..., :stop]
        if case.has('condition_per_token'):
            part['condition'] = given.given['condition'].part(slice(None), 0, stop)
        out, record = case.call(model, x[:, start:stop], part, mems=mems, return_mems=True, return_intermediates=True)
        must_equal(out, whole[:, start:stop], f'tokens {start} to {stop}, with the memories of those before')
        mems = record.mems
        must(all(mem.shape[1] == stop for mem in mems), f'memories of {[mem.shape[1] for mem in mems]} states, not {stop}')


def kernels_agree(case: Combination) -> None:
    """The kernel that is chosen gives what the reference gives, gradients too, with and without a mask."""
    from x_transformers.attention.kernels.choose import use_kernel

    if case.random:
        return
    model = case.build()
    x, given = tokens(ROWS), case.inputs(ROWS).part()
    mask = torch.arange(LENGTH) < torch.tensor([LENGTH, 6, 3])[:, None]
    for extra in ({}, {'mask': mask}):
        results = []
        for kernel in (None, 'reference'):
            model.zero_grad()
            if kernel is None:
                out = case.call(model, x, given, **extra)
            else:
                with use_kernel(kernel):
                    out = case.call(model, x, given, **extra)
            weights = torch.arange(out.numel(), dtype=out.dtype).cos().view_as(out)
            if extra and not case.pooled:
                weights = weights * mask.view(*mask.shape, *(1,) * (out.ndim - 2))
            (out * weights).sum().backward()
            gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            results.append((out.detach()[mask] if extra and not case.pooled else out.detach(), gradients))
        must_equal(results[0][0], results[1][0], f'output against the reference kernel ({"mask" if extra else "no mask"})')
        must_equal(results[0][1], results[1][1], f'gradients against the reference kernel ({"mask" if extra else "no mask"})')


def checkpoints_agree(case: Combination) -> None:
    """Branches that run again in the backward pass, in training, change neither outputs nor gradients, nor what is drawn."""
    models = []
    for again in (False, True):
        torch.manual_seed(0)
        models.append(case.build(stack={'gradient_checkpointing': again}))
    trained_alike(case, *models)


def trained_alike(case: Combination, plain: nn.Module, other: nn.Module) -> None:
    """The same output and gradients in training."""
    x, given = tokens(ROWS), case.inputs(ROWS).part()
    mask = torch.arange(LENGTH) < torch.tensor([LENGTH, 6, 3])[:, None]
    results = []
    for model in (plain, other):
        model.train()
        torch.manual_seed(0)
        random.seed(0)
        out = case.call(model, x, given, mask=mask)
        (out * torch.arange(out.numel(), dtype=out.dtype).cos().view_as(out)).sum().backward()
        # a wrapper around a module puts its own name into those of the parameters
        named = ((name.replace('_checkpoint_wrapped_module.', ''), p.grad) for name, p in model.named_parameters())
        results.append((out.detach(), {name: grad for name, grad in named if grad is not None}))
    (want, expected), (got, gradients) = results
    must_equal(got, want, 'output with checkpoints')
    must(gradients.keys() == expected.keys(), f'other parameters get gradients: {sorted(gradients.keys() ^ expected.keys())}')
    for name, gradient in expected.items():
        must_equal(gradients[name], gradient, f'gradient of {name} with checkpoints')


@torch.no_grad()
def survives_copies(case: Combination) -> None:
    """Saved and loaded, deep-copied, or built on the meta device and loaded: the same."""
    if case.random:
        return
    model = case.build()
    x, given = tokens(ROWS), case.inputs(ROWS).part()
    want = case.call(model, x, given)
    other = case.build(seed=5)
    other.load_state_dict(model.state_dict(), strict=True)
    must_equal(case.call(other, x, given), want, 'after save and load')
    must_equal(case.call(copy.deepcopy(model), x, given), want, 'after a deep copy')
    if has_hybrid(case) or case.has('custom_activation'):
        return  # these bring modules of the user, which are not built on the meta device
    with torch.device('meta'):
        hollow = case.build()
    hollow = hollow.to_empty(device=next(model.parameters()).device)
    for tensor in (*hollow.parameters(), *hollow.buffers()):
        tensor.fill_(float('nan') if tensor.is_floating_point() else 0)
    hollow.reset_parameters()
    must(bool(case.call(hollow.double(), x, given).isfinite().all()), 'built on the meta device and filled: not finite')
    hollow.load_state_dict(model.state_dict(), strict=True)
    must_equal(case.call(hollow, x, given), want, 'built on the meta device, filled and loaded')


def half_precision(case: Combination) -> None:
    """Finite in bf16 autocast, gradients too."""
    model = case.build(dtype=torch.float32)
    x, given = tokens(ROWS), case.inputs(ROWS, dtype=torch.float32).part()
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        out = case.call(model, x, given)
        out.float().square().mean().backward()
    must(bool(out.isfinite().all()), 'not finite under bf16 autocast')
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            must(bool(parameter.grad.isfinite().all()), f'gradient of {name} not finite under bf16 autocast')


LAWS: tuple[Callable[[Combination], None], ...] = (
    finite,
    causal,
    row_independent,
    padding_blind,
    left_padding_blind,
    cached_is_full,
    cache_operations,
    continuations_are_full,
    segments_are_whole,
    kernels_agree,
    checkpoints_agree,
    survives_copies,
    half_precision,
)


@torch.no_grad()
def compiles(case: Combination) -> None:
    """One graph without a break, and the same result (deep sweep only: slow)."""
    model = case.build()
    x, given = tokens(ROWS), case.inputs(ROWS).part()
    mask = torch.arange(LENGTH) < torch.tensor([LENGTH, 6, 3])[:, None]
    compiled = torch.compile(model, fullgraph=True, backend='eager')
    torch.manual_seed(0)
    # the hybrid modules here are recurrent, at which torch breaks the graph unless told otherwise
    with torch._dynamo.config.patch(allow_rnn=True):
        got = case.call(compiled, x, given, mask=mask)
    if not case.random:
        want = case.call(model, x, given, mask=mask)
        must_equal(*((got, want) if case.pooled else (got[mask], want[mask])), 'compiled')


def continuation_compiles(case: Combination) -> None:
    continuations_are_full(case, compiled=True)


DEEP_LAWS = (*LAWS, compiles, continuation_compiles)
