"""One latent per sequence of vectors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from x_transformers.continuous_autoencoder import ContinuousTransformerAutoencoder


def autoencoder(**more: Any) -> Any:
    given = {'dim': 8, 'enc_depth': 1, 'dec_depth': 1, 'max_seq_len': 12, 'heads': 2, 'attn_dim_head': 4, 'verbose': False}
    model = ContinuousTransformerAutoencoder(**{**given, **more})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model.eval()


def test_no_output_sees_the_vector_that_it_predicts() -> None:
    model, x = autoencoder(dim_input=5), torch.randn(1, 6, 5)
    latent = torch.randn(1, 8)
    before = model.decode(latent, x)
    x[:, 3] += 1.0
    after = model.decode(latent, x)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4], after[:, 4])


@pytest.mark.parametrize(('loss_type', 'power'), [('l1', 1), ('l2', 2)])
@pytest.mark.parametrize('kind', ['deterministic', 'variational'])
def test_loss_of_padded_rows_is_that_of_the_rows_alone(loss_type: str, power: int, kind: str) -> None:
    model = autoencoder(loss_type=loss_type, bottleneck_type=kind, dim_latent=3)
    x, lens = torch.randn(2, 6, 8), torch.tensor([6, 3])
    torch.manual_seed(0)
    _, losses = model(x, lens, return_all_losses=True, return_unreduced_loss=True)
    torch.manual_seed(0)
    latents = model.encode(x, lens)
    for b, n in enumerate(lens.tolist()):
        predicted = model.decode(latents[b : b + 1], x[b : b + 1, :n])
        expected = (predicted - x[b : b + 1, :n]).abs().pow(power).mean()
        assert losses.reconstruction[b].item() == pytest.approx(expected.item(), rel=1e-4)
    assert losses.bottleneck.shape == (2,)
    assert (losses.bottleneck > 0).all() == (kind == 'variational')


def test_a_hidden_latent_is_hidden() -> None:
    model, x = autoencoder(), torch.randn(2, 4, 8)
    keep = torch.tensor([True, False])
    first, second = (model.decode(torch.randn(2, 8), x, keep) for _ in range(2))
    assert not torch.allclose(first[0], second[0])
    # the first position has nothing else to look at, but what is at it
    assert torch.allclose(first[1, 1:], second[1, 1:], atol=1e-6)


def test_training_drops_latents_and_every_gradient_is_finite() -> None:
    model = autoencoder(latents_dropout_prob=0.5, bottleneck_type='variational').train()
    model(torch.randn(8, 6, 8)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_one_vector_is_a_sequence() -> None:
    assert autoencoder()(torch.randn(2, 1, 8)).isfinite()


@pytest.mark.parametrize(
    ('broken', 'says'),
    [({'loss_type': 'l3'}, "loss_type='l3'.*must be"), ({'bottleneck_type': 'x'}, "bottleneck_type='x'.*must be"),
     ({'latents_dropout_prob': 1.0}, 'latents_dropout_prob')],
)  # fmt: skip
def test_refusals(broken: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        autoencoder(**broken)


def test_mask_or_lens() -> None:
    with pytest.raises(ValueError, match='lens and mask must not both be given'):
        autoencoder()(torch.randn(1, 3, 8), torch.tensor([2]), mask=torch.ones(1, 3).bool())


def test_vectors_are_compared_by_absolute_differences_unless_asked() -> None:
    model, x = autoencoder(), torch.randn(2, 5, 8)
    assert model.loss_type == 'l1'
    squared = autoencoder(loss_type='l2')
    squared.load_state_dict(model.state_dict())
    assert model.eval()(x).item() != pytest.approx(squared.eval()(x).item(), rel=1e-3)
