"""Linear maps of many experts: one product for each, and torch's product of all at once."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from x_transformers.grouped import GroupedLinear, by_group, combine, dispatch, has_kernel, in_one_product

COUNTS = torch.tensor([5, 0, 3, 8])


@pytest.mark.parametrize('biased', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_one_product_is_that_of_each_group(dtype: torch.dtype, biased: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 24, dtype=dtype)
    weight, bias = torch.randn(4, 32, 24, dtype=dtype), torch.randn(4, 32, dtype=dtype) if biased else None
    found = []
    for product in (lambda *t: by_group(*t, COUNTS.tolist()), lambda *t: in_one_product(*t, COUNTS)):
        leaves = [t if t is None else t.clone().requires_grad_() for t in (x, weight, bias)]
        out = product(*leaves)
        out.mul(torch.linspace(-1, 1, out.numel()).to(dtype).view_as(out)).sum().backward()
        found.append([out, *(t.grad for t in leaves if t is not None)])
    # the bias is added after one rounding more, of numbers up to 16
    near = {'atol': 1e-5, 'rtol': 1e-5} if dtype == torch.float32 else {'atol': 16 * 2**-8, 'rtol': 2**-8}
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, **near)


def test_the_kernel_is_for_half_precision_on_a_device() -> None:
    class OnDevice:
        is_cuda, dtype = True, torch.bfloat16

    weight = torch.zeros(4, 32, 24)
    assert has_kernel(OnDevice(), weight)  # type: ignore[arg-type]
    assert not has_kernel(OnDevice(), weight[:, :, :21])  # type: ignore[arg-type]
    assert not has_kernel(torch.zeros(2, 24, dtype=torch.bfloat16, device='cpu'), weight)


def test_the_module_is_a_loop_over_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module, x = GroupedLinear(4, 24, 32, bias=True), torch.randn(16, 24)
    rows, begin = [], 0
    for expert, count in enumerate(COUNTS.tolist()):
        rows.append(F.linear(x[begin : begin + count], module.weight[expert], module.bias[expert]))  # type: ignore[index]
        begin += count
    torch.testing.assert_close(module(x, COUNTS), torch.cat(rows))
    monkeypatch.setattr('x_transformers.grouped.has_kernel', lambda x, weight: True)
    torch.testing.assert_close(module(x, COUNTS), torch.cat(rows))


@pytest.mark.filterwarnings('ignore:.*torch.jit.script')  # torch's own, when forward mode is first used
def test_rows_spread_and_gathered_are_adjoint() -> None:
    """Against plain indexing: values, gradients, gradients of gradients, and forward mode."""
    t, active, d = 5, 2, 3
    chosen = torch.stack([torch.randperm(4)[:active] for _ in range(t)]).flatten()
    order = chosen.argsort(stable=True)
    back = order.argsort()
    rows, many = torch.randn(t, d, dtype=torch.float64), torch.randn(t * active, d, dtype=torch.float64)
    assert torch.equal(dispatch(rows, order, back, active), rows[order // active])
    want = torch.zeros_like(rows).index_add(0, order // active, many)
    torch.testing.assert_close(combine(many, order, back, active), want)
    for act, x in ((dispatch, rows), (combine, many)):
        one = partial(act, order=order, back=back, active=active)
        x.requires_grad_()
        assert torch.autograd.gradcheck(one, (x,), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(lambda x, one=one: one(x).square(), (x,))
