"""Residual paths, each against its formula written as loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from x_transformers.layers.hyper_connections import HyperConnection, sinkhorn
from x_transformers.layers.residual import (
    DualStreams,
    GRUGating,
    OrthogonalResidual,
    ParallelStreams,
    ResiDual,
    Residual,
    write_stream,
)
from x_transformers.layers.stack import Decoder
from x_transformers.layers.stream_steps import read_formula, read_streams

B, N, D, S = 2, 3, 4, 3


def drawn(module: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def test_residual() -> None:
    path = drawn(Residual(D, scale_residual=True, scale_residual_constant=0.5))
    x, out = torch.randn(B, N, D), torch.randn(B, N, D)
    seen, rest = path.read(x)
    assert seen is x
    torch.testing.assert_close(path.write(out, rest), out + 0.5 * x * path.residual_scale)
    torch.testing.assert_close(path(out, *path.prepare(x)[1:2]), path.write(out, rest))


@pytest.mark.parametrize('scaled', [False, True])
def test_orthogonal_residual_is_taken_token_by_token(scaled: bool) -> None:
    path = drawn(OrthogonalResidual(D, scale_residual=scaled))
    x, out = torch.randn(B, N, D), torch.randn(B, N, D)
    _, rest = path.read(x)
    found = path.write(out, rest)
    for b in range(B):
        for n in range(N):
            stream = x[b, n] * path.residual_scale if scaled else x[b, n]
            along = sum(out[b, n, i] * stream[i] for i in range(D)) / sum(stream[i] ** 2 for i in range(D))
            torch.testing.assert_close(found[b, n], stream + out[b, n] - along * stream)
    assert path.write(out, torch.zeros_like(x)).isfinite().all()


def test_residual_starts_as_a_sum() -> None:
    x, out = torch.randn(B, N, D), torch.randn(B, N, D)
    assert torch.equal(Residual(D).write(out, x), out + x)
    assert torch.equal(Residual(D, scale_residual=True).write(out, x), out + x)


def test_gru_gate() -> None:
    path = drawn(GRUGating(D, scale_residual=True))
    x, out = torch.randn(B, N, D), torch.randn(B, N, D)
    got = path.write(out, path.read(x)[1])
    gru = path.gru
    for b in range(B):
        for n in range(N):
            state = x[b, n] * path.residual_scale
            from_input = gru.weight_ih @ out[b, n] + gru.bias_ih
            from_state = gru.weight_hh @ state + gru.bias_hh
            (ri, zi, ni), (rh, zh, nh) = from_input.split(D), from_state.split(D)
            reset, update = sigmoid(ri + rh), sigmoid(zi + zh)
            candidate = (ni + reset * nh).tanh()
            torch.testing.assert_close(got[b, n], (1 - update) * candidate + update * state)


@pytest.mark.parametrize('views', [1, 3])
@pytest.mark.parametrize('doubly_stochastic', [False, True])
def test_hyper_connection(views: int, doubly_stochastic: bool) -> None:
    path = drawn(
        HyperConnection(D, layer_index=1, num_residual_streams=S, num_input_views=views, doubly_stochastic=doubly_stochastic)
    )
    streams, out = torch.randn(B * S, N, D), torch.randn(B, N, D)
    seen, rest = path.read(streams)
    written = path.write(out, rest)
    assert seen.shape == ((B, N, D) if views == 1 else (3, B, N, D))
    for b in range(B):
        for n in range(N):
            rows = [streams[b * S + s, n] for s in range(S)]
            normed = [(r - r.mean()) / (r.var(unbiased=False) + 1e-5).sqrt() * path.norm.weight for r in rows]
            alpha = torch.stack(
                [path.static_alpha[s] + path.dynamic_alpha_scale * (normed[s] @ path.dynamic_alpha_fn) for s in range(S)]
            )
            for v in range(views):
                want = sum(sigmoid(alpha[s, v]) * rows[s] for s in range(S))
                torch.testing.assert_close((seen if views == 1 else seen[v])[b, n], want)
            mixing = torch.ones(S, S)
            if doubly_stochastic:
                mixing = alpha[:, views:].softmax(dim=0)
                for _ in range(5):
                    mixing = mixing / mixing.sum(dim=1, keepdim=True)
                    mixing = mixing / mixing.sum(dim=0, keepdim=True)
            for t in range(S):
                beta = path.static_beta[t] + path.dynamic_beta_scale * 2 * sigmoid(normed[t] @ path.dynamic_beta_fn)
                want = sum(mixing[s, t] * rows[s] for s in range(S)) + 2 * sigmoid(beta) * out[b, n]
                torch.testing.assert_close(written[b * S + t, n], want)


def test_hyper_connection_as_the_original_calls_it() -> None:
    path = drawn(HyperConnection(D, layer_index=0, num_residual_streams=S))
    streams, out = torch.randn(B * S, N, D), torch.randn(B, N, D)
    seen, residual, extra = path.prepare(streams)
    assert residual.shape == streams.shape
    want, rest = path.read(streams)
    assert torch.equal(seen, want)
    torch.testing.assert_close(path(out, residual, **extra), path.write(out, rest))
    with pytest.raises(ValueError, match='beta'):
        path(out, residual)


def test_hyper_connection_starts_as_described() -> None:
    path = HyperConnection(D, layer_index=4, num_residual_streams=S)
    assert torch.equal(path.static_alpha[:, 0], torch.tensor([0.0, 1.0, 0.0]))
    _, (_, beta) = path.read(torch.zeros(S, 1, D))
    torch.testing.assert_close(beta, torch.full_like(beta, 2 * float(sigmoid(torch.tensor(1.01)))))


def test_sinkhorn_is_doubly_stochastic() -> None:
    matrix = sinkhorn(torch.randn(5, 4, 4), iters=30)
    torch.testing.assert_close(matrix.sum(dim=-1), torch.ones(5, 4), atol=1e-3, rtol=0)
    torch.testing.assert_close(matrix.sum(dim=-2), torch.ones(5, 4), atol=1e-5, rtol=0)
    assert sinkhorn(torch.randn(2, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_parallel_streams() -> None:
    x, embedding = torch.randn(B, N, D), torch.randn(S, D)
    streams = ParallelStreams(S)
    opened = streams.open(x, embedding)
    assert torch.equal(opened[1 * S + 2], x[1] + embedding[2])
    torch.testing.assert_close(streams.close(opened, lambda t: t * 2), 2 * (S * x + embedding.sum(dim=0)))
    each_row = torch.arange(B, dtype=torch.float32)[:, None]
    assert torch.equal(streams.condition(each_row)[:S], torch.zeros(S, 1))


def test_residual_of_two_streams() -> None:
    def norm(t: Tensor) -> Tensor:
        return t / (1 + t.abs())

    streams, path = DualStreams(0.1), ResiDual(0.1)
    x, outs = torch.randn(B, N, D), torch.randn(4, B, N, D)
    held = streams.open(x)
    post, pre = x, 0.1 * x
    for out in outs:
        seen, rest = path.read(held)
        assert torch.equal(seen, post)
        held = path.norm_after(norm, path.write(out, rest))
        post, pre = norm(post + out), pre + 0.1 * out
    torch.testing.assert_close(streams.close(held, norm), post + norm(pre))


def test_resi_dual_stack_by_hand() -> None:
    torch.manual_seed(0)
    stack = Decoder(dim=8, depth=2, heads=2, attn_dim_head=4, resi_dual=True, resi_dual_scale=0.1)
    x = torch.randn(2, 5, 8)
    post, pre = x, 0.1 * x
    for norms, branch, _ in stack.layers:
        assert norms[0] is None
        out = branch(post)
        post, pre = norms[2](post + out), pre + 0.1 * out
    torch.testing.assert_close(stack(x), post + stack.final_norm(pre))


def test_scale_of_resi_dual_changes_nothing_but_the_range() -> None:
    torch.manual_seed(0)
    one = Decoder(dim=8, depth=2, heads=2, attn_dim_head=4, resi_dual=True)
    tenth = Decoder(dim=8, depth=2, heads=2, attn_dim_head=4, resi_dual=True, resi_dual_scale=0.1)
    tenth.load_state_dict(one.state_dict())
    # large, so that the epsilon of the final norm does not count
    x = 100 * torch.randn(2, 5, 8)
    torch.testing.assert_close(one(x), tenth(x), atol=1e-4, rtol=0)


def test_further_keywords_of_the_residual_reach_it() -> None:
    stack = Decoder(dim=8, depth=1, heads=2, attn_dim_head=4, residual_fn_kwargs={'scale_residual': True})
    assert stack.layers[0].residual.residual_scale.shape == (8,)


def paths() -> list[HyperConnection]:
    return [
        drawn(HyperConnection(D, layer_index=1, num_residual_streams=S, num_input_views=views, doubly_stochastic=stochastic))
        for views in (1, 3)
        for stochastic in (False, True)
    ]


@pytest.mark.parametrize('path', paths(), ids=lambda path: f'{path.num_input_views} {path.doubly_stochastic}')
def test_gradients_of_streams_are_those_of_the_formulas(path: HyperConnection, monkeypatch: pytest.MonkeyPatch) -> None:
    path = path.double()
    streams, out = (torch.randn(*shape, N, D, dtype=torch.float64, requires_grad=True) for shape in ((B * S,), (B,)))

    def step() -> list[Tensor]:
        seen, rest = path.read(streams)
        written = path.write(out, rest)
        weights = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view_as(t) for t in (seen, written)]
        leaves = [streams, out, *path.parameters()]
        loss = (seen * weights[0]).sum() + (written * weights[1]).sum()
        first = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)
        # and once more: the gradient of the gradients' size
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves, materialize_grads=True)
        return [
            seen,
            written,
            *first,
            *second,
            *torch.autograd.grad(step_loss(path, streams, out), leaves, materialize_grads=True),
        ]

    got = step()
    monkeypatch.setattr('x_transformers.layers.stream_steps.by_hand', lambda *tensors: False)
    for number, (one, other) in enumerate(zip(got, step(), strict=True)):
        torch.testing.assert_close(one, other, msg=lambda m, number=number: f'{number}: {m}')


class Step(torch.nn.Module):
    def __init__(self, path: HyperConnection) -> None:
        super().__init__()
        self.path = path

    def forward(self, streams: Tensor, out: Tensor) -> Tensor:
        return step_loss(self.path, streams, out)


def step_loss(path: HyperConnection, streams: Tensor, out: Tensor) -> Tensor:
    seen, rest = path.read(streams)
    return seen.square().sum() + path.write(out, rest).cos().sum()


@pytest.mark.parametrize('wanted', [0, 1])
def test_streams_of_which_one_half_is_used(wanted: int) -> None:
    path = drawn(HyperConnection(D, layer_index=0, num_residual_streams=S))
    streams = torch.randn(B * S, N, D, requires_grad=True)
    separate, share = streams.unflatten(0, (-1, S)), torch.rand(B, S, N, requires_grad=True)
    for leaf in (streams, share):
        one = torch.autograd.grad(
            read_streams(separate, share)[wanted].cos().sum(), leaf, allow_unused=True, materialize_grads=True
        )
        other = torch.autograd.grad(
            read_formula(separate, share)[wanted].cos().sum(), leaf, allow_unused=True, materialize_grads=True
        )
        torch.testing.assert_close(one, other)
    assert path.read(streams)[0].requires_grad


def test_gradients_of_each_sample_by_vmap() -> None:
    path = drawn(HyperConnection(D, layer_index=0, num_residual_streams=S))
    streams, out = torch.randn(4, S, N, D), torch.randn(4, 1, N, D)

    def loss(parameters: dict[str, Tensor], streams: Tensor, out: Tensor) -> Tensor:
        return torch.func.functional_call(Step(path), parameters, (streams, out))

    parameters = {name: p.detach() for name, p in Step(path).named_parameters()}
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, streams, out)
    for row in range(4):
        alone = torch.func.grad(loss)(parameters, streams[row], out[row])
        for name, gradient in alone.items():
            torch.testing.assert_close(each[name][row], gradient, msg=lambda m, name=name: f'{name}: {m}')


def test_a_residual_is_called_where_somebody_listens() -> None:
    residual, x = Residual(16), torch.randn(2, 3, 16)
    heard: list[int] = []
    torch.testing.assert_close(write_stream(residual, x, x), 2 * x)
    handle = residual.register_forward_hook(lambda *_: heard.append(1))
    torch.testing.assert_close(write_stream(residual, x, x), 2 * x)
    handle.remove()
    assert heard == [1]
    residual.forward = lambda out, rest: out
    torch.testing.assert_close(write_stream(residual, x, x), x)
