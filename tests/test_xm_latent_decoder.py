"""Hard choices among latent prefixes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers import Decoder, TransformerWrapper
from x_transformers.xm_latent_decoder import XMLatentDecoder, jensen_shannon


def decoder(**more: Any) -> Any:
    layers = Decoder(dim=8, depth=1, heads=2, attn_dim_head=4, rotary_pos_emb=True, verbose=False)
    model = XMLatentDecoder(TransformerWrapper(num_tokens=11, max_seq_len=32, attn_layers=layers), **more)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model.eval()


def test_divergence_of_distributions() -> None:
    logits = torch.randn(2, 3, 4, 5)
    told = jensen_shannon(logits)
    for b in range(2):
        for n in range(4):
            p = logits[b, :, n].softmax(-1)
            mean = p.mean(0)
            assert told[b, n].item() == pytest.approx(sum((q * (q / mean).log()).sum().item() for q in p) / 3, abs=1e-6)


@pytest.mark.parametrize('size', [None, 2])
def test_the_loss_is_that_of_each_row_s_winner(size: int | None) -> None:
    model = decoder(num_latents=2, candidates=3, max_batch_size=size, latent_dim=5, repulsive_loss_weight=0.3)
    x, latents = torch.randint(11, (2, 6)), torch.randn(2, 3, 2, 5)
    x[0, 3] = -100
    losses, apart, every = [], [], []
    for b in range(2):
        row = []
        for k in range(3):
            out = model.net(x[b : b + 1].clamp(min=0), prepend_embeds=model.latent_proj(latents[b, k])[None])[0, 2:]
            row.append(F.cross_entropy(out[:-1], x[b, 1:]))
            every.append(out)
        losses.append(torch.stack(row).min())
        divergence = jensen_shannon(torch.stack(every[-3:])[None, :, :-1])[0]
        apart += [divergence[n] for n in range(5) if x[b, n + 1] >= 0]
    expected = torch.stack(losses).mean() - 0.3 * torch.stack(apart).mean()
    assert model(x, latents=latents, active_latent_index=0).item() == pytest.approx(expected.item(), rel=1e-5)


def test_candidates_share_all_slots_but_one() -> None:
    drawn = decoder(num_latents=3, candidates=4).draw(2, 1, torch.device('cpu'))
    assert torch.equal(drawn[:, :1, [0, 2]].expand(-1, 4, -1, -1), drawn[:, :, [0, 2]])
    assert drawn[0, :, 1].unique(dim=0).shape[0] == 4


def test_padding_is_neither_seen_nor_predicted() -> None:
    model, latents = decoder(num_latents=2), torch.randn(2, 2, 2, 8)
    x, mask = torch.randint(11, (2, 6)), torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]]).bool()
    y = x.masked_fill(~mask, 9)
    told = [model(t, latents=latents, mask=mask, active_latent_index=0) for t in (x, y)]
    assert torch.allclose(*told)
    alone = [model(x[b : b + 1, :n], latents=latents[b : b + 1], active_latent_index=0) for b, n in ((0, 6), (1, 3))]
    assert torch.allclose(told[0], torch.stack(alone).mean(), atol=1e-6)


@pytest.mark.parametrize('masked', [True, False])
def test_a_dropped_prefix_is_no_prefix(masked: bool) -> None:
    model = decoder(latent_drop_prob=0.999999).train()
    x = torch.randint(11, (2, 6))
    mask = torch.ones_like(x).bool() if masked else None
    expected = F.cross_entropy(model.net(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    assert model(x, mask=mask).item() == pytest.approx(expected.item(), rel=1e-5)


def test_generation_takes_latents_and_every_keyword_of_sampling() -> None:
    model, start, latents = decoder(num_latents=2), torch.randint(11, (2, 3)), torch.randn(2, 2, 8)
    made = [model.generate(start, 5, latents=latents, temperature=0.0, cache_kv=cached) for cached in (True, False)]
    assert torch.equal(*made)
    made, best = model.generate_with_candidate_latents(
        start, 4, temperature=0.7, filter_kwargs={'k': 3}, cache_kv=False, return_best_latents=True
    )
    assert made.shape == (2, 4)
    assert best.shape == (2, 2, 8)


def test_the_winner_of_generation_is_named_by_a_function_of_logits() -> None:
    model, start, seen = decoder(num_latents=2, candidates=3), torch.randint(11, (2, 3)), []

    def last(logits: Tensor) -> Tensor:
        seen.append(tuple(logits.shape))
        return torch.full((2,), 2)

    model.generate_with_candidate_latents(start, 2, winner_fn=last, active_latent_index=1)
    assert seen == [(2, 3, 3, 11)]


@pytest.mark.parametrize(
    ('call', 'says'),
    [
        (lambda m: m(torch.zeros(1, 1).long()), 'at least two tokens'),
        (lambda m: m(torch.zeros(1, 4).long(), active_latent_index=7), 'one of the 4 slots'),
        (lambda m: m(torch.zeros(1, 4).long(), latents=torch.zeros(1, 2, 3, 8)), 'latents must have shape'),
        (lambda m: decoder(candidates=0), 'candidates=0.*must be at least 1'),
        (lambda m: decoder(latent_drop_prob=1.0), 'latent_drop_prob=1.0.*must be less than 1'),
    ],
)
def test_refusals(call: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call(decoder())
