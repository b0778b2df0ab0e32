"""Mixture of experts against its formula, token by token."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers import (
    AutoregressiveWrapper,
    Decoder,
    Encoder,
    FeedForward,
    NonAutoregressiveWrapper,
    TransformerWrapper,
    ViTransformerWrapper,
)
from x_transformers.attention.inputs import BranchInputs
from x_transformers.flags.base import FlagError

DIM = 6


def layer(**flags: Any) -> FeedForward:
    torch.manual_seed(0)
    made = FeedForward(DIM, **{'experts': 4, 'mult': 2, **flags}).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, dtype=torch.double))
    return made


def tokens(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 5)), DIM, dtype=torch.double, generator=torch.Generator().manual_seed(1))


def scores_of(ff: FeedForward, x: Tensor) -> Tensor:
    router: Any = ff.ff.router
    logits = x @ router.weight.t() + (0.0 if router.bias is None else router.bias)
    return logits.softmax(-1) if ff.flags.router == 'softmax' else logits.sigmoid()


def expert(ff: FeedForward, index: int, x: Tensor) -> Tensor:
    """One expert on one token, as gpt-oss has it where its flags are on."""
    first, last = ff.ff.first, ff.ff.last
    hidden = first.weight[index] @ x + (0.0 if first.bias is None else first.bias[index])
    if ff.flags.glu:
        up, gate = hidden.chunk(2)
        limit = ff.flags.glu_clamp_value
        if limit is not None:
            up, gate = up.clamp(-limit, limit), gate.clamp(max=limit)
        hidden = (up + ff.flags.glu_add_one) * gate * torch.sigmoid((1.702 if ff.flags.custom_activation else 1.0) * gate)
    else:
        hidden = F.gelu(hidden)
    return last.weight[index] @ hidden + (0.0 if last.bias is None else last.bias[index])


def formula(ff: FeedForward, x: Tensor) -> Tensor:
    """Token by token: the best experts, each times its share."""
    flags, rows = ff.flags, []
    for token in x.reshape(-1, DIM):
        scores = scores_of(ff, token)
        correction = ff.ff.router.correction
        best = sorted(range(len(scores)), key=lambda e: -(scores[e] + (0.0 if correction is None else correction[e])).item())
        best = best[: flags.experts_active]
        whole = sum(scores[e] for e in best) if flags.router_normalize else 1.0
        row = sum(flags.router_scale * scores[e] / whole * expert(ff, e, token) for e in best)
        shared = 0.0 if ff.ff.shared is None else ff.ff.shared(token[None])[0]
        if flags.shared_experts_gate:
            shared = shared / (1 + torch.exp(-(ff.ff.shared_gate.weight[0] @ token)))
        rows.append(row + shared)
    return torch.stack(rows).view(*x.shape[:-1], -1)


VARIANTS: dict[str, dict[str, Any]] = {
    'plain': {},
    'raw': {'router_normalize': False, 'experts_active': 1},
    'no_bias': {'no_bias': True, 'experts_active': 4},
    'sigmoid': {'router': 'sigmoid', 'router_scale': 2.5, 'router_balance': 'bias', 'shared_experts': 2},
    'gated': {'router_normalize': False, 'shared_experts': 1, 'shared_experts_gate': True},
    'swiglu': {'glu': True, 'swish': True, 'dim_out': 5},
    'gpt_oss': {
        'glu': True,
        'custom_activation': 'quick_gelu',
        'glu_clamp_value': 0.4,
        'glu_add_one': True,
        'router_bias': True,
        'experts_active': 3,
    },
}


@pytest.mark.parametrize('flags', VARIANTS.values(), ids=VARIANTS)
def test_every_token_goes_through_its_best_experts(flags: dict[str, Any]) -> None:
    ff, x = layer(**flags), tokens().requires_grad_()
    if ff.ff.router.correction is not None:
        ff.ff.router.correction.copy_(torch.tensor([0.3, -0.2, 0.1, 0.0]))
    got, want = ff(x), formula(ff, x)
    torch.testing.assert_close(got, want)
    inputs = [x, *ff.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad(got.square().sum(), inputs), torch.autograd.grad(want.square().sum(), inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize('name', ['raw', 'sigmoid', 'gated', 'gpt_oss'])
def test_every_way_to_compute_them_gives_the_same(name: str) -> None:
    ff, x = layer(**VARIANTS[name]), tokens()
    want = ff(x)
    routed = ff.ff.router(x.reshape(-1, DIM))
    every = ff.ff._on_all(x.reshape(-1, DIM), routed).view(*want.shape)
    if ff.ff.shared is not None:
        gate = 1.0 if ff.ff.shared_gate is None else ff.ff.shared_gate(x).sigmoid()
        every = every + gate * ff.ff.shared(x)
    torch.testing.assert_close(every, want)
    torch.testing.assert_close(torch.func.vmap(ff)(x), want)
    torch.compiler.reset()
    compiled = torch.compile(ff, fullgraph=True, backend='aot_eager')
    got = compiled(x)
    torch.testing.assert_close(got, want)
    parameters = list(ff.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(got.square().sum(), parameters), torch.autograd.grad(want.square().sum(), parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_no_token_is_dropped_where_all_choose_the_same() -> None:
    ff = layer(router_bias=True, router_normalize=False)
    with torch.no_grad():
        ff.ff.router.bias.copy_(torch.tensor([50.0, 40.0, 0.0, 0.0]))
    x = tokens(1, 64)
    assert ff.ff.router(x[0]).chosen.unique().tolist() == [0, 1]
    torch.testing.assert_close(ff(x), formula(ff, x))


def losses(ff: FeedForward, rows: list[Tensor]) -> float:
    """The loss of balance and the z-loss, as sums over tokens and experts."""
    flags, count = ff.flags, ff.flags.experts or 0
    scores = [scores_of(ff, row) for row in rows]
    total = 0.0
    if flags.router_balance == 'loss':
        for index in range(count):
            best = [each.topk(flags.experts_active).indices.tolist() for each in scores]
            share = sum(index in chosen for chosen in best) / (len(rows) * flags.experts_active)
            mean = sum((each[index] / each.sum()).item() for each in scores) / len(rows)
            total += flags.router_balance_weight * count * share * mean
    router: Any = ff.ff.router
    for row in rows:
        logits = (router.weight @ row + (0.0 if router.bias is None else router.bias)).tolist()
        total += flags.router_z_loss_weight * math.log(sum(map(math.exp, logits))) ** 2 / len(rows)
    return total


@pytest.mark.parametrize('router', ['softmax', 'sigmoid'])
@pytest.mark.parametrize('balance', ['loss', 'none'])
def test_losses_of_the_tokens_alone(router: str, balance: str) -> None:
    weight = {'router_balance_weight': 0.3} if balance == 'loss' else {}
    ff, x = layer(router=router, router_balance=balance, router_z_loss_weight=0.2, **weight), tokens(2, 4)
    padding = torch.tensor([[True, True, False, True], [True, False, False, False]])
    _, seen = ff(x, around=BranchInputs(tokens=padding))
    assert seen.expert_loss.item() == pytest.approx(losses(ff, list(x[padding])))
    _, seen = ff(x, around=BranchInputs())
    assert seen.expert_loss.item() == pytest.approx(losses(ff, list(x.reshape(-1, DIM))))
    assert isinstance(ff.eval()(x, around=BranchInputs()), Tensor)


def test_a_balanced_router_has_the_loss_of_its_weight() -> None:
    ff = FeedForward(DIM, experts=4, router_balance_weight=0.5, router_bias=True)
    with torch.no_grad():
        ff.ff.router.weight.copy_(10 * torch.eye(4, DIM))
    x = torch.eye(4, DIM)[None]
    _, seen = ff(x + x.roll(1, dims=1), around=BranchInputs())
    assert seen.expert_loss.item() == pytest.approx(0.5)


def test_a_bias_brings_experts_into_balance() -> None:
    """https://arxiv.org/abs/2408.15664: one step up for experts that were chosen too seldom, one down for the others."""
    ff, x = layer(router_balance='bias', router_balance_step=0.01, router_bias=True), tokens(8, 16)
    router: Any = ff.ff.router
    with torch.no_grad():
        router.bias.copy_(torch.tensor([2.0, 1.0, 0.0, 0.0]))

    def spread() -> Tensor:
        return router.eval()(x.reshape(-1, DIM)).chosen.flatten().bincount(minlength=4)

    before = spread()
    router.train()
    ff(x)
    ff.balance_experts_()
    assert torch.equal(router.correction, 0.01 * torch.sign(before.double().mean() - before))
    for _ in range(100):
        ff(x)
        ff.balance_experts_()
    after = spread()
    assert ff(tokens(0)).shape == (0, DIM)
    assert before.max() > 1.5 * before.double().mean()
    assert after.max() < 1.15 * after.double().mean()
    # the choice alone has changed: what a chosen expert counts does not depend on the correction
    routed = router(x.reshape(-1, DIM))
    found = scores_of(ff, x.reshape(-1, DIM)).gather(-1, routed.chosen)
    torch.testing.assert_close(routed.shares, found / found.sum(-1, keepdim=True))
    # the correction is saved, and what was counted is not
    assert 'ff.router.correction' in ff.state_dict()
    assert 'ff.router.load' not in ff.state_dict()
    state = router.correction.clone()
    ff.balance_experts_()
    ff.eval()(x)
    ff.balance_experts_()
    assert torch.equal(router.correction, state)


def model(kind: type[Decoder] | type[Encoder] = Decoder, **flags: Any) -> TransformerWrapper:
    torch.manual_seed(0)
    stack = kind(dim=16, depth=2, heads=2, attn_dim_head=8, ff_experts=4, **flags)
    return TransformerWrapper(num_tokens=20, max_seq_len=16, attn_layers=stack)


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 20, shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize('flags', [{}, {'gradient_checkpointing': True}, {'ff_router_z_loss_weight': 0.1}])
def test_the_loss_of_experts_reaches_the_objective(flags: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = model(**flags), ids(2, 12)
    wrapper = AutoregressiveWrapper(net)
    alone = wrapper.eval()(x)
    _, seen = net.train()(x, return_expert_loss=True)
    assert seen.expert_loss > 0
    assert seen.hiddens is None
    _, whole = net(x, return_intermediates=True)
    torch.testing.assert_close(whole.expert_loss, seen.expert_loss)
    together = wrapper.train()(x)
    torch.testing.assert_close(together, alone + seen.expert_loss)
    torch.testing.assert_close(wrapper(x, return_outputs=True)[0], together)
    # also where the logits are never held
    monkeypatch.setattr('x_transformers.autoregressive_wrapper.LARGE_LOGITS', 0)
    torch.testing.assert_close(wrapper(x), together)
    together.backward()
    router: Any = net.attn_layers.layers[1][1].ff.router
    assert router.weight.grad.norm() > 0


def test_padding_counts_for_no_expert() -> None:
    wrapper = AutoregressiveWrapper(model(ff_router_z_loss_weight=1.0)).double()
    x = ids(2, 12)
    short = x.clone()
    short[:, 7:] = 0
    lens = torch.tensor([7, 7])
    torch.testing.assert_close(wrapper(short, lens=lens), wrapper(x[:, :7]))
    # padding on the left
    _, alone = wrapper.net(x, return_expert_loss=True)
    _, padded = wrapper.net(F.pad(x, (3, 0)), seq_start_pos=torch.tensor([3, 3]), return_expert_loss=True)
    torch.testing.assert_close(padded.expert_loss, alone.expert_loss)


def test_loops_add_up_their_losses() -> None:
    net = TransformerWrapper(
        num_tokens=20,
        max_seq_len=16,
        attn_layers=Decoder(dim=16, depth=1, heads=2, attn_dim_head=8, ff_experts=4, pre_and_post_norm=True),
        looped=True,
        max_looped_steps=3,
    )
    _, once = net(ids(2, 8), return_expert_loss=True, looped_steps=1)
    _, thrice = net(ids(2, 8), return_expert_loss=True, looped_steps=3)
    assert thrice.expert_loss > 2 * once.expert_loss


def test_a_loss_that_nobody_would_add_is_refused() -> None:
    with pytest.raises(FlagError, match=r'NonAutoregressiveWrapper.*must be .bias. or .none.'):
        NonAutoregressiveWrapper(model(Encoder), mask_id=1)
    NonAutoregressiveWrapper(model(Encoder, ff_router_balance='bias'), mask_id=1)
    with pytest.raises(FlagError, match='ViTransformerWrapper'):
        ViTransformerWrapper(
            image_size=4, patch_size=2, attn_layers=Encoder(dim=8, depth=1, heads=1, attn_dim_head=8, ff_experts=(3,))
        )


@pytest.mark.parametrize(
    ('flags', 'words'),
    [
        ({'experts': 1}, 'at least 2'),
        ({'experts': 4, 'experts_active': 5}, 'more experts than there are'),
        ({'experts': 4, 'experts_active': 1}, 'would learn nothing'),
        ({'experts': 4, 'router': 'hash'}, "'softmax' or 'sigmoid'"),
        ({'experts': 4, 'router_balance': 'hope'}, "'loss' or 'bias' or 'none'"),
    ],
)
def test_refusals(flags: dict[str, Any], words: str) -> None:
    with pytest.raises(FlagError, match=words):
        FeedForward(DIM, **flags)


def test_half_precision_is_finite_and_routes_in_single() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        ff = FeedForward(DIM, experts=4, router_bias=True, router_balance='bias').to(dtype)
        assert ff.ff.router.correction.dtype == torch.float32
        x = (50 * torch.randn(3, 5, DIM)).to(dtype).requires_grad_()
        out = ff(x)
        out.float().square().mean().backward()
        assert out.dtype == dtype
        assert all(parameter.grad.isfinite().all() for parameter in (x, *ff.parameters()))  # type: ignore[union-attr]
    single = FeedForward(DIM, experts=4)
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        assert single(torch.randn(2, DIM)).dtype == torch.bfloat16
        assert single.ff.router(torch.randn(2, DIM)).shares.dtype == torch.float32


def test_a_trainer_moves_the_bias() -> None:
    from x_transformers.training.options import TrainerOptions
    from x_transformers.training.trainer import Trainer

    wrapper = AutoregressiveWrapper(model(ff_router_balance='bias'))
    Trainer(wrapper, lambda step: ids(4, 12), TrainerOptions(steps=3)).train()
    router: Any = wrapper.net.attn_layers.layers[1][1].ff.router
    assert router.correction.abs().max().item() == pytest.approx(0.003, abs=0.0011)


def test_matrices_of_experts_decay_and_dense_ones_go_to_muon() -> None:
    from x_transformers.training.optimizers import decays

    ff = FeedForward(DIM, experts=4, shared_experts=1, router_bias=True)
    decayed = {name for name, parameter in ff.named_parameters() if decays(ff)[parameter]}
    shared = {'ff.shared.ff.0.0.weight', 'ff.shared.ff.3.weight', 'ff.shared.ff.2.weight'}
    assert decayed - shared == {'ff.router.weight', 'ff.first.weight', 'ff.last.weight'}
    assert all(parameter.ndim == 2 for parameter in ff.muon_parameters())


def test_without_experts_nothing_changes() -> None:
    assert list(FeedForward(4).state_dict()) == ['ff.0.0.weight', 'ff.0.0.bias', 'ff.2.weight', 'ff.2.bias']
    flags = FeedForward(4).flags
    assert not replace(flags, router_z_loss_weight=1.0).expert_loss
    assert replace(flags, experts=3).expert_loss
