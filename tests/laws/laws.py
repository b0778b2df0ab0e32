"""The laws. Each is a function of a combination that raises ``Broken`` with a sentence, or returns.

All run in double precision, so that a difference is a difference of meaning.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.laws.combination import Combination, tokens
from tests.laws.groups import LENGTH, TOKENS

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


def rows_of(given: dict[str, Any], rows: Any) -> dict[str, Any]:
    return {name: value[rows] for name, value in given.items()}


def finite(case: Combination) -> None:
    """Outputs and gradients are finite, in eval and in training mode, and every parameter gets a gradient."""
    model = case.build()
    x, given = tokens(ROWS), case.inputs(ROWS)
    for mode in (False, True):
        model.train(mode)
        torch.manual_seed(0)
        out = model(x, **given)
        must(bool(out.isfinite().all()), f'output not finite (training={mode})')
        model.zero_grad()
        (out * torch.arange(out.numel(), dtype=out.dtype).cos().view_as(out)).sum().backward()
        for name, parameter in model.named_parameters():
            if not mode and 'execute_order' not in case.names:  # an order may leave layers out
                must(parameter.grad is not None, f'{name} gets no gradient')
            if parameter.grad is not None:
                must(bool(parameter.grad.isfinite().all()), f'gradient of {name} not finite (training={mode})')


@torch.no_grad()
def causal(case: Combination) -> None:
    """Changing what comes later changes nothing earlier."""
    if not case.causal or case.random:
        return
    model = case.build()
    x, given = tokens(ROWS), case.inputs(ROWS)
    before = model(x, **given)
    for cut in (1, 4, LENGTH - 1):
        changed = x.clone()
        changed[:, cut:] = (changed[:, cut:] + 7) % TOKENS
        must_equal(model(changed, **given)[:, :cut], before[:, :cut], f'position {cut} and later are seen from before')


@torch.no_grad()
def row_independent(case: Combination) -> None:
    """A row gives the same alone as among others."""
    if case.random:
        return
    model = case.build()
    x, given = tokens(ROWS), case.inputs(ROWS)
    together = model(x, **given)
    for row in range(ROWS):
        alone = model(x[row : row + 1], **rows_of(given, slice(row, row + 1)))
        must_equal(alone, together[row : row + 1], f'row {row} alone')


@torch.no_grad()
def padding_blind(case: Combination) -> None:
    """Right padding under a mask: a row gives what it gives alone and cut, and what stands in the padding is not seen."""
    if case.random or ('shift' in case.names and not case.causal):
        # kept as in the original: feed-forwards are not told of the mask, so the last token takes features of the first pad
        return
    model = case.build()
    x, given = tokens(ROWS), case.inputs(ROWS)
    lengths = torch.tensor([LENGTH, 5, 2])
    mask = torch.arange(LENGTH) < lengths[:, None]
    padded = model(x, mask=mask, **given)
    must(bool(padded[mask].isfinite().all()), 'not finite under a mask')
    noise = torch.where(mask, x, (x + 11) % TOKENS)
    must_equal(model(noise, mask=mask, **given)[mask], padded[mask], 'the padding is seen')
    for row, length in enumerate(lengths.tolist()):
        alone = model(x[row : row + 1, :length], **rows_of(given, slice(row, row + 1)))
        must_equal(padded[row : row + 1, :length], alone, f'row {row}, padded from {length} to {LENGTH}')


@torch.no_grad()
def left_padding_blind(case: Combination) -> None:
    """Left padding under ``seq_start_pos``: a row gives what it gives alone."""
    if case.random or not case.causal:
        return
    model = case.build()
    x, given = tokens(ROWS), case.inputs(ROWS)
    starts = torch.tensor([0, 3, 6])
    if has_hybrid(case):
        # a module of the user's own would read the padding: refused before anything runs
        try:
            model(x, seq_start_pos=starts, **given)
        except ValueError:
            return
        raise Broken('a hybrid module takes left padding')
    padded = model(x, seq_start_pos=starts, **given)
    for row, start in enumerate(starts.tolist()):
        alone = model(x[row : row + 1, start:], **rows_of(given, slice(row, row + 1)))
        must_equal(padded[row : row + 1, start:], alone, f'row {row}, {start} pads on the left')


def has_hybrid(case: Combination) -> bool:
    return any('hybrid' in name for name in case.names)


def can_cache(model: nn.Module) -> bool:
    return bool(model.can_cache_kv)  # type: ignore[union-attr]


@torch.no_grad()
def cached_is_full(case: Combination) -> None:
    """Decoding with a cache, one token or several at a time, whole sequence or new tokens only, equals the full forward."""
    if case.random or not case.causal:
        return
    model = case.build()
    x, given = tokens(ROWS), case.inputs(ROWS)
    if not can_cache(model):
        _, cache = model(x[:, :4], return_intermediates=True, **given)
        try:
            model(x[:, :5], cache=cache, return_intermediates=True, **given)
        except ValueError:
            return
        raise Broken('says that it cannot be cached, and yet takes a cache')
    full = model(x, **given)
    for whole in (False, True):
        cache, done = None, 0
        for upto in (4, 5, 6, LENGTH):
            piece = x[:, :upto] if whole or cache is None else x[:, done:upto]
            extra = {} if cache is None else {'cache': cache, 'input_not_include_cache': not whole}
            out, cache = model(piece, return_intermediates=True, **extra, **given)
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
    _, first = model(x[:, :4], return_intermediates=True, **given)
    new = {'return_intermediates': True, 'input_not_include_cache': True}
    want, _ = model(x[:, 4:6], cache=first, **new, **given)
    again, _ = model(x[:, 4:6], cache=first, **new, **given)
    must_equal(again, want, 'an old cache continued a second time')
    if not has_hybrid(case):  # a recurrent state cannot be rolled back, and says so
        wrong = (x[:, 4:7] + 5) % TOKENS
        _, longer = model(wrong, cache=first, **new, **given)
        back, _ = model(x[:, 4:6], cache=longer.kv_cache.rollback(4), **new, **given)
        must_equal(back, want, 'after a rollback')
    order = torch.tensor([2, 0, 0])
    mixed, _ = model(x[order, 4:6], cache=first.kv_cache.reorder(order), **new, **rows_of(given, order))
    must_equal(mixed, want[order], 'after a reorder')
    if has_hybrid(case):
        return
    starts = torch.tensor([0, 2, 3])
    full = model(x, seq_start_pos=starts, **given)
    out, cache = model(x[:, :5], seq_start_pos=starts, return_intermediates=True, **given)
    for step in range(5, LENGTH):
        out, cache = model(x[:, step : step + 1], seq_start_pos=starts, cache=cache, **new, **given)
        must_equal(out, full[:, step : step + 1], f'step {step} of left-padded prompts with a cache')


def kernels_agree(case: Combination) -> None:
    """The kernel that is chosen gives what the reference gives, gradients too, with and without a mask."""
    from x_transformers.attention.kernels.choose import use_kernel

    if case.random:
        return
    model = case.build()
    x, given = tokens(ROWS), case.inputs(ROWS)
    mask = torch.arange(LENGTH) < torch.tensor([LENGTH, 6, 3])[:, None]
    for extra in ({}, {'mask': mask}):
        results = []
        for kernel in (None, 'reference'):
            model.zero_grad()
            if kernel is None:
                out = model(x, **extra, **given)
            else:
                with use_kernel(kernel):
                    out = model(x, **extra, **given)
            weights = torch.arange(out.numel(), dtype=out.dtype).cos().view_as(out)
            if extra:
                weights = weights * mask.view(*mask.shape, *(1,) * (out.ndim - 2))
            (out * weights).sum().backward()
            gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            results.append((out.detach()[mask] if extra else out.detach(), gradients))
        must_equal(results[0][0], results[1][0], f'output against the reference kernel ({"mask" if extra else "no mask"})')
        must_equal(results[0][1], results[1][1], f'gradients against the reference kernel ({"mask" if extra else "no mask"})')


@torch.no_grad()
def survives_copies(case: Combination) -> None:
    """Saved and loaded, deep-copied, or built on the meta device and loaded: the same."""
    if case.random:
        return
    model = case.build()
    x, given = tokens(ROWS), case.inputs(ROWS)
    want = model(x, **given)
    other = case.build(seed=5)
    other.load_state_dict(model.state_dict(), strict=True)
    must_equal(other(x, **given), want, 'after save and load')
    must_equal(copy.deepcopy(model)(x, **given), want, 'after a deep copy')
    if has_hybrid(case) or 'custom_activation' in case.names:
        return  # these bring modules of the user, which are not built on the meta device
    with torch.device('meta'):
        hollow = case.build()
    hollow = hollow.to_empty(device='cpu')
    for tensor in (*hollow.parameters(), *hollow.buffers()):
        tensor.fill_(float('nan') if tensor.is_floating_point() else 0)
    hollow.reset_parameters()
    must(bool(hollow.double()(x, **given).isfinite().all()), 'built on the meta device and filled: not finite')
    hollow.load_state_dict(model.state_dict(), strict=True)
    must_equal(hollow(x, **given), want, 'built on the meta device, filled and loaded')


def half_precision(case: Combination) -> None:
    """Finite in bf16 autocast, gradients too."""
    model = case.build(dtype=torch.float32)
    x, given = tokens(ROWS), case.inputs(ROWS, dtype=torch.float32)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out = model(x, **given)
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
    kernels_agree,
    survives_copies,
    half_precision,
)


@torch.no_grad()
def compiles(case: Combination) -> None:
    """One graph without a break, and the same result (deep sweep only: slow)."""
    model = case.build()
    x, given = tokens(ROWS), case.inputs(ROWS)
    mask = torch.arange(LENGTH) < torch.tensor([LENGTH, 6, 3])[:, None]
    compiled = torch.compile(model, fullgraph=True, backend='eager')
    torch.manual_seed(0)
    got = compiled(x, mask=mask, **given)
    if not case.random:
        must_equal(got[mask], model(x, mask=mask, **given)[mask], 'compiled')


DEEP_LAWS = (*LAWS, compiles)
