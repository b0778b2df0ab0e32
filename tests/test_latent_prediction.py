"""Objectives on latents against loops over positions, rollouts and directions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers import AutoregressiveWrapper, Decoder, NextLatentWrapper, TransformerWrapper
from x_transformers.gpt_lejepa import LatentAutoregressive
from x_transformers.latent_prediction import Discount, frozen_logits, masked_average, normalized_weights, sigreg

DIM = 8


def net(**flags: Any) -> TransformerWrapper:
    layers = Decoder(dim=DIM, depth=2, heads=2, attn_dim_head=4, verbose=False, rotary_pos_emb=True)
    return TransformerWrapper(num_tokens=11, max_seq_len=16, attn_layers=layers, **flags)


def randomized(module: nn.Module) -> Any:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module.eval()


def test_sigreg_is_the_integral_over_directions() -> None:
    x = torch.randn(2, 5, 3)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    torch.manual_seed(1)
    told = sigreg(x, mask, num_slices=4, domain=(-2.0, 2.0), num_knots=7)
    torch.manual_seed(1)
    directions = F.normalize(torch.randn(3, 4), dim=0)
    rows, step, total = x[mask], 4 / 6, 0.0
    for direction in directions.t():
        values = []
        for k in range(7):
            t = -2 + k * step
            phi = sum(complex(math.cos(t * float(row @ direction)), math.sin(t * float(row @ direction))) for row in rows) / 8
            values.append(abs(phi - math.exp(-t * t / 2)) ** 2 * math.exp(-t * t / 2))
        total += step * (sum(values) - (values[0] + values[-1]) / 2)
    assert told.item() == pytest.approx(total / 4, rel=1e-4)


def test_sigreg_is_small_for_a_normal_distribution_and_large_for_a_point() -> None:
    normal, point = sigreg(torch.randn(1, 4000, 4)), sigreg(torch.full((1, 4000, 4), 0.7))
    assert normal < 0.01 < 0.1 < point


def test_discount_counts_what_was_lost_before() -> None:
    discount = Discount(decay=2.0, threshold=0.1)
    first, second = torch.tensor([[0.3, 0.05, 1.0]]), torch.tensor([[0.5, 0.4]])
    assert torch.equal(discount.weight(first), torch.ones(1, 3))
    discount.add(first)
    discount.add(second)
    expected = [math.exp(-2 * (0.2 + 0.4)), math.exp(-2 * (0.0 + 0.3))]
    assert torch.allclose(discount.weight(second), torch.tensor([expected]))


@pytest.mark.parametrize('weights', [(1.0,), (0.0, 0.0), (1.0, -1.0)])
def test_rollout_weights_that_make_no_sense_are_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match='must be 2 numbers'):
        normalized_weights(weights, 2, 'rollout_weights')


@pytest.mark.parametrize('flags', [{}, {'tie_embedding': True}, {'sigsoftmax_logits': True}])
def test_frozen_logits_are_the_logits_and_reach_no_parameter(flags: dict[str, Any]) -> None:
    model = randomized(net(**flags))
    x = torch.randint(11, (2, 6))
    logits, hidden = model(x, return_logits_and_embeddings=True)
    leaf = hidden.detach().requires_grad_()
    frozen = frozen_logits(model, leaf)
    assert torch.allclose(frozen, logits, atol=1e-6)
    frozen.square().sum().backward()
    assert leaf.grad is not None
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize('loss_type', ['smooth_l1', 'mse', 'mse_and_cosine_sim'])
@pytest.mark.parametrize('dynamic', [True, False])
def test_next_latent_is_the_formula(loss_type: str, dynamic: bool) -> None:
    rollouts, shares = 2, (0.75, 0.25)
    model = randomized(
        NextLatentWrapper(
            net(), dim=DIM, num_rollouts=rollouts, loss_type=loss_type, rollout_weights=(3.0, 1.0),
            dynamic_rollout_loss_weight=dynamic, next_latent_loss_weight=0.5, kl_loss_weight=0.2,
            **({'dynamic_loss_decay': 0.7} if dynamic else {}),
        )
    )  # fmt: skip
    x = torch.randint(11, (2, 7))
    x[1, 4] = -100
    ids = x.clamp(min=0)
    logits, h = model.net(ids, return_logits_and_embeddings=True)
    embeds = model.net.token_emb(ids)

    def element(a: Tensor, b: Tensor) -> Tensor:
        if loss_type == 'smooth_l1':
            return torch.where((a - b).abs() < 1, (a - b).square() / 2, (a - b).abs() - 0.5).mean()
        squared = (a - b).square().mean()
        return squared if loss_type == 'mse' else 0.1 * squared + 0.9 * (1 - (a @ b) / (a.norm() * b.norm()))

    latent_sums, kl_sums, counts = [0.0] * rollouts, [0.0] * rollouts, [0] * rollouts
    ce = [F.cross_entropy(logits[b, i], x[b, i + 1]) for b in range(2) for i in range(6) if x[b, i + 1] >= 0]
    for b in range(2):
        for i in range(7):
            z, lost = h[b, i], 0.0
            for k in range(1, rollouts + 1):
                if i + k >= 7:
                    break
                z = z + model.dynamics_model.net(torch.cat((z, embeds[b, i + k])))
                weight = math.exp(-0.7 * lost) if dynamic else 1.0
                loss = element(z, h[b, i + k])
                lost += loss.item()
                if x[b, i + k] < 0:
                    continue
                p, q = (model.net.to_logits(t).softmax(-1) for t in (h[b, i + k], z))
                latent_sums[k - 1] += weight * loss.item()
                kl_sums[k - 1] += weight * (p * (p / q).log()).sum().item()
                counts[k - 1] += 1
    parts = [sum(s * t / c for s, t, c in zip(shares, sums, counts, strict=True)) for sums in (latent_sums, kl_sums)]
    loss, told = model(x, return_loss_breakdown=True)
    assert told.ce.item() == pytest.approx(torch.stack(ce).mean().item(), rel=1e-5)
    assert told.next_latent.item() == pytest.approx(parts[0], rel=1e-4)
    assert told.kl.item() == pytest.approx(parts[1], rel=1e-4)
    assert loss.item() == pytest.approx(told.ce.item() + 0.5 * parts[0] + 0.2 * parts[1], rel=1e-4)


def test_next_latent_with_tied_head_and_sigreg_trains_and_its_net_generates() -> None:
    model = NextLatentWrapper(net(tie_embedding=True), dim=DIM, sigreg_loss_weight=0.1, num_rollouts=3)
    x = torch.randint(11, (4, 12))
    model(x).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert AutoregressiveWrapper(model.net).generate(x[:, :3], 4).shape == (4, 4)


def test_a_gru_rolls_out_from_the_embedding() -> None:
    model = randomized(NextLatentWrapper(net(), dim=DIM, dynamics_type='gru'))
    latent, action = torch.randn(2, 3, DIM), torch.randn(2, 3, DIM)
    told, _ = model.dynamics_model(latent, action, None)
    for b in range(2):
        for n in range(3):
            _, state = model.dynamics_model.gru(action[b, n][None, None], latent[b, n][None, None])
            assert torch.allclose(told[b, n], state[0, 0], atol=1e-6)


@pytest.mark.parametrize(
    ('broken', 'says'),
    [
        ({'num_rollouts': 0}, 'num_rollouts=0.*must be at least 1'),
        ({'loss_type': 'l3'}, 'loss_type must be one of'),
        ({'dynamics_type': 'custom'}, 'dynamics_network must be given'),
        ({'dim': 4}, "dim must be the net's width 8"),
    ],
)
def test_next_latent_refuses(broken: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        NextLatentWrapper(net(), **{'dim': DIM, **broken})


def test_sequences_too_short_for_the_rollouts_are_refused() -> None:
    with pytest.raises(ValueError, match='more than 3 tokens'):
        NextLatentWrapper(net(), dim=DIM, num_rollouts=2)(torch.zeros(1, 3).long())
    with pytest.raises(ValueError, match='more than 3 tokens'):
        LatentAutoregressive(net(), dim=DIM, num_rollouts=2)(torch.zeros(1, 3).long())


def test_a_loss_that_is_reduced_already_is_refused() -> None:
    model = NextLatentWrapper(net(), dim=DIM, loss_type=nn.MSELoss())
    with pytest.raises(ValueError, match=r"gives a loss for each position, \(2, 6\).* got shape \(\).*reduction='none'"):
        model(torch.zeros(2, 7).long())
    whole, each = (NextLatentWrapper(net(), dim=DIM, loss_type=kind) for kind in ('mse', nn.MSELoss(reduction='none')))
    each.load_state_dict(whole.state_dict())
    x = torch.randint(11, (2, 7))
    assert torch.equal(whole(x), each(x))


@pytest.mark.parametrize('index', [2, -3])
def test_predictors_read_an_attention_that_there_is(index: int) -> None:
    with pytest.raises(ValueError, match=f'predictor_input_hiddens_index must name one of the 2 self attentions, got {index}'):
        LatentAutoregressive(net(), dim=DIM, predictor_input_hiddens_index=index)


def test_joint_embedding_loss_is_the_formula() -> None:
    model = randomized(
        LatentAutoregressive(net(), dim=DIM, num_rollouts=2, rollout_loss_weights=(1.0, 3.0), sigreg_loss_weight=0.0)
    )
    x = torch.randint(11, (2, 6))
    x[0, 3] = -100
    ids = x.clamp(min=0)
    embeds, record = model.net(ids, return_embeddings_and_intermediates=True)
    start, sums, counts = record.hiddens[-1], [0.0, 0.0], [0, 0]
    for b in range(2):
        for i in range(6):
            p = start[b, i]
            for k in (1, 2):
                if i + k >= 6:
                    break
                p = model.to_next_embed_pred(torch.cat((p, model.action_emb(ids[b, i + k]))))
                if x[b, i + k] >= 0:
                    a, t = p / p.norm(), embeds[b, i + k] / embeds[b, i + k].norm()
                    sums[k - 1] += (a - t).square().mean().item()
                    counts[k - 1] += 1
    loss, told = model(x, return_loss_breakdown=True)
    expected = 0.25 * sums[0] / counts[0] + 0.75 * sums[1] / counts[1]
    assert told.l2.item() == pytest.approx(expected, rel=1e-4)
    assert loss.item() == pytest.approx(told.ce.item() + expected, rel=1e-5)


def test_without_its_gradient_the_probe_teaches_the_net_nothing() -> None:
    model = LatentAutoregressive(net(), dim=DIM, frac_gradient=0.0, sigreg_loss_weight=0.0)
    _, told = model(torch.randint(11, (2, 8)), return_loss_breakdown=True)
    told.ce.backward()
    reached = {name for name, p in model.net.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached == {name for name in reached if name.startswith('to_logits')} != set()
    assert AutoregressiveWrapper(model.net).generate(torch.zeros(1, 2).long(), 3).shape == (1, 3)


def test_a_mean_over_nothing_is_zero() -> None:
    assert masked_average(torch.ones(1, 3), torch.zeros(1, 3).bool()) == 0
