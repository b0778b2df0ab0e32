"""Token losses, with and without the logits; z-loss; entropy."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from x_transformers.losses import calc_entropy, calc_z_loss, linear_cross_entropy, token_cross_entropy


def by_hand(logits: torch.Tensor, targets: torch.Tensor, ignore: int) -> torch.Tensor:
    losses = []
    for row, target in zip(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), strict=True):
        if target != ignore:
            losses.append(-(row[target] - row.exp().sum().log()))
    return torch.stack(losses).mean()


@pytest.fixture
def tokens() -> torch.Tensor:
    targets = torch.randint(0, 7, (2, 5))
    targets[0, 1] = targets[1, 4] = -100
    return targets


def test_token_cross_entropy_is_the_mean_over_counted_tokens(tokens: torch.Tensor) -> None:
    logits = torch.randn(2, 5, 7)
    expected = by_hand(logits, tokens, -100)
    torch.testing.assert_close(token_cross_entropy(logits, tokens), expected)
    torch.testing.assert_close(token_cross_entropy(logits.log_softmax(-1), tokens, is_log_prob=True), expected)
    torch.testing.assert_close(token_cross_entropy(logits, tokens, reduction='sum'), expected * 8)
    single = token_cross_entropy(logits, tokens, reduction='none')
    assert single.shape == (2, 5)
    assert single[0, 1] == 0
    torch.testing.assert_close(single.sum() / 8, expected)


def test_token_cross_entropy_takes_another_ignored_index() -> None:
    logits, targets = torch.randn(1, 4, 3), torch.tensor([[0, 2, 0, 1]])
    torch.testing.assert_close(token_cross_entropy(logits, targets, ignore_index=0), by_hand(logits, targets, 0))


@pytest.mark.parametrize('loss', [token_cross_entropy, lambda x, t: linear_cross_entropy(x, torch.randn(3, 7), None, t)])
def test_targets_of_another_shape_are_refused(loss: object) -> None:
    with pytest.raises(ValueError, match='one target for each row'):
        loss(torch.randn(2, 5, 7), torch.zeros(2, 4).long())  # type: ignore[operator]


@pytest.mark.parametrize('chunk', [1, 3, 10, 64, None])
@pytest.mark.parametrize('with_bias', [True, False])
@pytest.mark.parametrize('reduction', ['mean', 'sum'])
def test_chunked_loss_equals_the_two_steps_with_gradients(
    chunk: int | None, with_bias: bool, reduction: str, tokens: torch.Tensor
) -> None:
    hidden = torch.randn(2, 5, 4, dtype=torch.double)
    weight, bias = torch.randn(7, 4, dtype=torch.double), torch.randn(7, dtype=torch.double) if with_bias else None
    results = []
    for chunked in (True, False):
        given = [t.clone().requires_grad_() if t is not None else None for t in (hidden, weight, bias)]
        x, w, b = given
        assert x is not None
        assert w is not None
        if chunked:
            loss = linear_cross_entropy(x, w, b, tokens, chunk=chunk, reduction=reduction)
        else:
            loss = token_cross_entropy(F.linear(x, w, b), tokens, reduction=reduction)
        (loss * 1.7).backward()
        results.append([loss.detach(), *(t.grad for t in given if t is not None)])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize('wrong', [7, -1])
def test_targets_without_logits_are_named(tokens: torch.Tensor, wrong: int) -> None:
    tokens[1, 0] = wrong
    low, high = min(wrong, int(tokens[tokens >= 0].min())), int(tokens.max())
    says = (
        rf'targets must lie in 0 … 6, as there are logits of 7 tokens.* ignore_index=-100, but they range from {low} to {high}'
    )
    with pytest.raises(IndexError, match=says):
        token_cross_entropy(torch.randn(2, 5, 7), tokens)
    with pytest.raises(IndexError, match=says):
        linear_cross_entropy(torch.randn(2, 5, 3), torch.randn(7, 3), None, tokens)


def test_chunked_loss_passes_gradcheck() -> None:
    targets = torch.tensor([1, 0, -100, 2])
    given = [torch.randn(*shape, dtype=torch.double, requires_grad=True) for shape in ((4, 3), (5, 3), (5,))]
    assert torch.autograd.gradcheck(lambda x, w, b: linear_cross_entropy(x, w, b, targets, chunk=3), given)


def test_chunked_loss_of_nothing_is_not_a_number_and_has_zero_gradients() -> None:
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, None, torch.full((3,), -100))
    assert loss.isnan()
    assert F.cross_entropy(F.linear(hidden, weight), torch.full((3,), -100)).isnan()


def test_chunked_loss_without_gradient_and_with_frozen_weight(tokens: torch.Tensor) -> None:
    hidden, weight = torch.randn(2, 5, 4, requires_grad=True), torch.randn(7, 4)
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, None, tokens).requires_grad
    linear_cross_entropy(hidden, weight, None, tokens, chunk=4).backward()
    assert hidden.grad is not None
    wanted = torch.autograd.grad(token_cross_entropy(F.linear(hidden, weight), tokens), hidden)[0]
    torch.testing.assert_close(hidden.grad, wanted)


def test_chunked_loss_under_autocast_is_near_and_keeps_the_gradients_dtype(tokens: torch.Tensor) -> None:
    hidden, weight = torch.randn(2, 5, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    exact = linear_cross_entropy(hidden, weight, None, tokens)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, None, tokens, chunk=3)
    loss.backward()
    torch.testing.assert_close(loss, exact.detach(), atol=0.05, rtol=0.05)
    assert loss.dtype == torch.float32
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_chunked_loss_has_a_shape_on_the_meta_device() -> None:
    hidden, weight = torch.empty(2, 5, 4, device='meta'), torch.empty(7, 4, device='meta')
    loss = linear_cross_entropy(hidden, weight, None, torch.zeros(2, 5, dtype=torch.long, device='meta'))
    assert loss.is_meta
    assert loss.shape == ()


def test_chunked_loss_never_holds_all_logits() -> None:
    rows, classes = 64, 1000
    hidden, weight = torch.randn(rows, 4, requires_grad=True), torch.randn(classes, 4, requires_grad=True)
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        linear_cross_entropy(hidden, weight, None, torch.zeros(rows).long(), chunk=8).backward()
    assert largest == 8 * classes


def test_unknown_reduction_and_chunk_are_refused() -> None:
    with pytest.raises(ValueError, match="'mean' or 'sum'"):
        linear_cross_entropy(torch.randn(2, 3), torch.randn(4, 3), None, torch.zeros(2).long(), reduction='none')
    with pytest.raises(ValueError, match=r'chunk must be at least 1, .*got 0'):
        linear_cross_entropy(torch.randn(2, 3), torch.randn(4, 3), None, torch.zeros(2).long(), chunk=0)


def test_entropy_of_even_odds_is_the_logarithm_of_their_number() -> None:
    torch.testing.assert_close(calc_entropy(torch.zeros(2, 8)), torch.full((2,), math.log(8)))
    probs = torch.tensor([0.5, 0.25, 0.25, 0.0])
    torch.testing.assert_close(calc_entropy(probs, is_prob=True), torch.tensor(1.5 * math.log(2)))


@pytest.mark.parametrize('masked', [True, False])
def test_z_loss_squares_the_sum_over_layers(masked: bool) -> None:
    layers = [torch.randn(2, 3, 4, 5) for _ in range(2)]
    mask = torch.tensor([[True, True, False, False], [True, True, True, False]])
    total, count = 0.0, 0
    for b in range(2):
        for i in range(4):
            if masked and not mask[b, i]:
                continue
            count += 1
            for h in range(3):
                total += sum(layer[b, h, i].exp().sum().log().item() for layer in layers) ** 2
    got = calc_z_loss(layers, mask=mask if masked else None, weight=0.3)
    torch.testing.assert_close(got, torch.tensor(0.3 * total / count))


def test_z_loss_refuses_nothing_and_layers_that_do_not_match() -> None:
    with pytest.raises(ValueError, match='at least one layer, got none'):
        calc_z_loss([])
    with pytest.raises(ValueError, match='must agree in batch, heads and queries'):
        calc_z_loss([torch.randn(1, 2, 3, 3), torch.randn(1, 4, 3, 3)])
