from __future__ import annotations

import math
import random
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.objectives import builds_on_meta, encoder, ids, likely, saved_and_loaded, shaken
from x_transformers import Decoder, InertFlagWarning, NonAutoregressiveWrapper, TransformerWrapper, nonautoregressive_wrapper
from x_transformers.flags.base import FlagError
from x_transformers.nonautoregressive_wrapper import (
    Losses,
    SelfCritic,
    cosine_schedule,
    get_mask_subset_prob,
    gumbel_sample,
    linear_schedule,
    top_k,
)

MASK = 6
PLAIN: dict[str, Any] = {'no_replace_prob': 0.0, 'random_token_prob': 0.0, 'use_simple_mdlm_loss_weight': False}


def model(seed: int = 0, net: Any = None, **given: Any) -> NonAutoregressiveWrapper:
    torch.manual_seed(seed)
    made = NonAutoregressiveWrapper(net or encoder(seed=seed), mask_id=MASK, **given)
    shaken(made)
    return made


class Critic(nn.Module):
    """Finds larger ids more suspicious."""

    def forward(self, x: Tensor) -> Tensor:
        return x[..., None].float() - 3


# which positions are chosen


@pytest.mark.parametrize(('prob', 'count'), [(0.1, 1), (0.15, 2), (0.3, 3), (0.5, 4), (0.0, 0), (1.0, 7)])
def test_size_of_subsets(prob: float, count: int) -> None:
    mask = torch.zeros(3, 12, dtype=torch.bool)
    mask[:, 2:9] = True
    chosen = get_mask_subset_prob(mask, prob)
    assert chosen.sum(dim=-1).tolist() == [count] * 3
    assert not (chosen & ~mask).any()


def test_size_of_subsets_by_row() -> None:
    mask = torch.ones(3, 10, dtype=torch.bool)
    mask[2, 1:] = False
    assert get_mask_subset_prob(mask, torch.tensor([0.0, 0.25, 0.9]), min_mask=2).sum(dim=-1).tolist() == [2, 3, 1]


def test_every_position_is_chosen_equally_often() -> None:
    """Each share within 5 standard deviations of 3/7 over 20000 draws."""
    torch.manual_seed(0)
    mask = torch.zeros(20_000, 9, dtype=torch.bool)
    mask[:, 1:8] = True
    rates = get_mask_subset_prob(mask, 0.3).float().mean(dim=0)[1:8]
    assert (rates - 3 / 7).abs().max().item() < 5 * math.sqrt(3 / 7 * 4 / 7 / 20_000)


def test_masked_positions_follow_the_schedule() -> None:
    net = model(**PLAIN)
    torch.manual_seed(0)
    sizes = []
    for _ in range(300):
        times = torch.empty(4).uniform_(0, 1)
        chosen = get_mask_subset_prob(torch.ones(4, 6, dtype=torch.bool), net.schedule_fn(times), min_mask=1)
        assert chosen.sum(dim=-1).tolist() == [max(math.ceil((1 - t) * 6 - 1e-6), 1) for t in times.tolist()]
        sizes += chosen.sum(dim=-1).tolist()
    assert set(sizes) == {1, 2, 3, 4, 5, 6}


def test_gumbel_sampling() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0])
    drawn = gumbel_sample(logits.expand(20_000, -1), temperature=0.7)
    assert likely(torch.bincount(drawn, minlength=4), (logits / 0.7).softmax(dim=-1))


def test_top_k_keeps_the_rest_of_the_threshold() -> None:
    logits = torch.randn(2, 3, 10)
    kept = top_k(logits, thres=0.7)
    assert kept.isfinite().sum(dim=-1).unique().tolist() == [4], '(1 - 0.7) * 10 is a little above 3'
    torch.testing.assert_close(kept[kept.isfinite()], logits[kept.isfinite()])
    assert bool((kept.amax(dim=-1) == logits.amax(dim=-1)).all())


def test_what_becomes_of_masked_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A share stays as it is; of the others, random_token_prob of what is left becomes random; the rest is hidden."""
    net = model(no_replace_prob=0.2, random_token_prob=0.25)
    monkeypatch.setattr(nonautoregressive_wrapper, 'coin_flip', lambda: True)
    monkeypatch.setattr(torch, 'randint_like', lambda x, low, high: torch.full_like(x, 5))
    x = torch.zeros(400, 20, dtype=torch.long)
    chosen = torch.zeros_like(x, dtype=torch.bool)
    chosen[:, 3:18] = True
    made = net.corrupted(x, chosen)
    assert ((made == 0) & chosen).sum(dim=-1).unique().tolist() == [3]
    assert (made == 5).sum(dim=-1).unique().tolist() == [math.ceil(0.25 * 0.8 * 12)]
    assert (made == MASK).sum(dim=-1).unique().tolist() == [15 - 3 - 3]
    assert not ((made != x) & ~chosen).any()
    monkeypatch.setattr(nonautoregressive_wrapper, 'coin_flip', lambda: False)
    assert torch.equal(net.corrupted(x, chosen) == MASK, chosen)


# the loss


def rerun(net: NonAutoregressiveWrapper, x: Tensor, seed: int, **given: Any) -> tuple[Losses, Tensor, Tensor]:
    """The losses, the times and the chosen positions of one seeded call."""
    torch.manual_seed(seed)
    losses = net(x, **given)
    torch.manual_seed(seed)
    times = torch.empty(len(x)).uniform_(0, 1)
    chosen = get_mask_subset_prob(torch.ones_like(x, dtype=torch.bool), net.schedule_fn(times), min_mask=1)
    return losses, times, chosen


@pytest.mark.parametrize('schedule', ['linear', 'cosine', lambda t: 1 - t * t])
@pytest.mark.parametrize('weighted', [False, True])
def test_loss_by_loop(schedule: Any, weighted: bool) -> None:
    net = model(schedule=schedule, **(PLAIN | {'use_simple_mdlm_loss_weight': weighted})).eval()
    x = ids(5, 6, tokens=6)
    losses, times, chosen = rerun(net, x, seed=3)
    logits = net.net(x.masked_fill(chosen, MASK))
    terms = []
    for row in range(5):
        t = times[row].item()
        if schedule == 'linear':
            weight = 1 / max(1 - t, 1 / 6)
        elif schedule == 'cosine':
            weight = math.pi / 2 * math.sin(math.pi * t / 2) / max(math.cos(math.pi * t / 2), 1 / 6)
        else:
            weight = 2 * t / max(1 - t * t, 1 / 6)
        for position in chosen[row].nonzero().flatten().tolist():
            terms.append((weight if weighted else 1.0) * F.cross_entropy(logits[row, position], x[row, position]))
    torch.testing.assert_close(losses.loss, torch.stack(terms).mean())
    assert losses.critic_loss is None
    torch.testing.assert_close(losses.generator_loss, losses.loss)


@pytest.mark.parametrize('schedule', [linear_schedule, cosine_schedule])
def test_the_weight_of_masked_diffusion_is_positive(schedule: Any) -> None:
    """In the original it is negative, so that training unlearns."""
    net, times = model(schedule=schedule), torch.linspace(0.05, 0.8, 20)
    weight = net.loss_weight(times)
    assert bool((weight > 0).all())
    slope = (schedule(times + 1e-3) - schedule(times - 1e-3)) / 2e-3
    torch.testing.assert_close(weight, -slope / schedule(times), rtol=1e-3, atol=1e-3)


def test_the_weight_of_the_original_is_there_on_demand() -> None:
    net, times = model(mdlm_weight_of_the_original=True), torch.linspace(0.1, 0.9, 5)
    torch.testing.assert_close(net.loss_weight(times), -1 / times)


def test_training_lowers_the_cross_entropy() -> None:
    torch.manual_seed(0)
    random.seed(0)
    net = NonAutoregressiveWrapper(encoder(), mask_id=MASK)
    x = ids(8, 6, tokens=2)
    x[:, 1:] = x[:, :1]
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(60):
        loss = net(x).loss
        assert loss.item() > 0
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.use_simple_mdlm_loss_weight = False
    assert sum(net(x).loss.item() for _ in range(10)) / 10 < 1.0


def test_padding_is_left_out() -> None:
    net = model(**PLAIN).eval()
    mask = torch.arange(6).expand(3, -1) < torch.tensor([[6], [3], [4]])
    x = ids(3, 6, tokens=6)
    losses = []
    for filler in (0, 5):
        torch.manual_seed(1)
        losses.append(net(x.masked_fill(~mask, filler), mask=mask).loss)
    torch.testing.assert_close(losses[0], losses[1])


def test_self_conditioning_is_told_embeddings_of_the_masked_input() -> None:
    """Also where the embedding is narrower than the model, which fails in the original."""
    for narrow in ({}, {'emb_dim': 8}):
        net = model(net=encoder(**narrow), self_cond=True, self_cond_train_prob=1.0, **PLAIN).eval()
        x = ids(3, 6, tokens=6)
        losses, _, chosen = rerun(net, x, seed=2)
        hidden = x.masked_fill(chosen, MASK)
        told = net.to_self_cond(net.net(hidden, return_embeddings=True).detach())
        logits = net.net(hidden, sum_embeds=told)
        torch.testing.assert_close(losses.loss, F.cross_entropy(logits[chosen], x[chosen]))
        net.self_cond_train_prob = 0.0
        losses, _, chosen = rerun(net, x, seed=2)
        logits = net.net(hidden, sum_embeds=net.to_self_cond(net.null_embed).expand(3, 6, -1))
        torch.testing.assert_close(losses.loss, F.cross_entropy(logits[chosen], x[chosen]))


@pytest.mark.parametrize('masked_only', [True, False])
def test_what_the_critic_is_told_to_find(masked_only: bool) -> None:
    """Unreal is what was filled in wrongly; the original also calls visible tokens so, where the net would say others."""
    net = model(token_critic=Critic(), critic_sees_masked_only=masked_only, critic_loss_weight=0.5, **PLAIN).eval()
    x = ids(4, 6, tokens=6)
    losses, _, chosen = rerun(net, x, seed=4, generator_sample_temperature=1e-10)
    sampled = net.net(x.masked_fill(chosen, MASK)).argmax(dim=-1)
    filled = torch.where(chosen, sampled, x)
    unreal = (filled if masked_only else sampled) != x
    expected = F.binary_cross_entropy_with_logits(filled.float() - 3, unreal.float())
    torch.testing.assert_close(losses.critic_loss, expected)
    torch.testing.assert_close(losses.loss, losses.generator_loss + 0.5 * expected)


def test_training_one_part_only() -> None:
    net, x = model(self_token_critic=True), ids(4, 6, tokens=6)
    assert isinstance(net.token_critic, SelfCritic)
    losses = net(x, only_train_generator=True)
    assert losses.critic_loss is None
    losses.loss.backward()
    assert net.token_critic.to_logits.weight.grad is None
    net.zero_grad()
    losses = net(x, only_train_critic=True)
    assert losses.generator_loss is None
    losses.loss.backward()
    assert net.token_critic.to_logits.weight.grad is not None
    assert net.net.to_logits.weight.grad is None, 'the logits were made without gradient'
    with pytest.raises(ValueError, match='must be False without a critic'):
        model()(x, only_train_critic=True)
    with pytest.raises(ValueError, match='must not both be True'):
        net(x, only_train_critic=True, only_train_generator=True)


# generation


class Told(nn.Module):
    """A net that always says the same sequence, and remembers what it read."""

    def __init__(self, says: Tensor, sure: Tensor) -> None:
        super().__init__()
        self.says, self.sure = says, sure
        self.max_seq_len, self.num_tokens, self.emb_dim = len(says), 8, 4
        self.attn_layers = nn.Module()
        self.attn_layers.dim = 4
        self.parameter = nn.Parameter(torch.zeros(()))
        self.read: list[Tensor] = []

    def forward(self, x: Tensor, **given: Any) -> Any:
        self.read.append(x)
        logits = F.one_hot(self.says, 8) * self.sure[:, None] + self.parameter
        return logits.expand(len(x), -1, -1), torch.zeros(*x.shape, 4)


@pytest.mark.parametrize(
    ('schedule', 'steps', 'counts'),
    [('linear', 10, [10, 9, 8, 7, 6, 5, 3, 3, 1, 1]), ('cosine', 5, [10, 9, 8, 5, 3])],
)
def test_the_surest_stay_and_fewer_are_hidden_in_each_round(schedule: str, steps: int, counts: list[int]) -> None:
    """Counts are cut, not rounded, and in single precision (0.4 * 10 is a little below 4), as in the original."""
    sure = torch.tensor([20.0, 11.0, 18.0, 13.0, 16.0, 15.0, 14.0, 17.0, 12.0, 19.0]) / 4
    net = Told(torch.arange(10) % 6, sure)
    out = NonAutoregressiveWrapper(net, mask_id=7, steps=steps, schedule=schedule).generate(batch_size=2, start_temperature=0.0)
    assert out.tolist() == [(torch.arange(10) % 6).tolist()] * 2
    assert [int((x[0] == 7).sum()) for x in net.read] == counts
    for x in net.read[1:]:
        hidden = x[0] == 7
        assert sure[hidden].max() < sure[~hidden].min()


def test_accepted_tokens_stay_unless_asked() -> None:
    """With a critic that dislikes large ids, what was accepted is hidden again only with can_mask_prev_unmasked."""
    for again in (False, True):
        torch.manual_seed(0)
        net = model(can_mask_prev_unmasked=again, steps=6, token_critic=Critic())
        seen: list[Tensor] = []
        net.net.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        for seed in range(4):
            torch.manual_seed(seed)
            seen.clear()
            net.generate(batch_size=8, start_temperature=3.0, filter_thres=None)
            back = [((old != MASK) & (new == MASK)).any().item() for old, new in pairwise(seen)]
            if any(back):
                break
        assert any(back) == again


@pytest.mark.parametrize('given', [{}, {'self_cond': True}, {'self_token_critic': True}, {'token_critic': Critic()}])
def test_generation(given: dict[str, Any]) -> None:
    net = model(steps=4, **given)
    assert net.generate().shape == (6,)
    runs = [net.generate(batch_size=3, generator=torch.Generator().manual_seed(2)) for _ in range(2)]
    assert runs[0].shape == (3, 6)
    assert torch.equal(runs[0], runs[1])


def test_one_round_samples_every_position_from_the_net() -> None:
    net = model(net=encoder(length=1), steps=1).eval()
    logits = net.net(torch.tensor([[MASK]]))[0, 0].detach()
    torch.manual_seed(0)
    net.steps = 2  # the first of two rounds is at half the temperature, the second all but greedy
    drawn = net.generate(batch_size=20_000, start_temperature=2.0, filter_thres=None)[:, 0]
    assert likely(torch.bincount(drawn, minlength=7), logits.softmax(dim=-1))


def test_modes_come_back_after_exceptions() -> None:
    net = model()
    net.net.attn_layers.eval()
    with pytest.raises(TypeError):
        net.generate(no_such_keyword=1)
    assert net.training
    assert net.net.training
    assert not net.net.attn_layers.training


# the rest


def test_state() -> None:
    net = model(self_cond=True, self_token_critic=True)
    keys = list(net.net.state_dict())
    own = {k: tuple(v.shape) for k, v in net.state_dict().items() if 'net.' not in k}
    assert own == {
        'null_embed': (16,),
        'to_self_cond.weight': (16, 16),
        'token_critic.to_logits.weight': (1, 16),
        'token_critic.to_logits.bias': (1,),
    }
    assert {*(f'net.{k}' for k in keys), *(f'token_critic.net.{k}' for k in keys), *own} == set(net.state_dict())
    twin = saved_and_loaded(net, model(seed=3, self_cond=True, self_token_critic=True))
    runs = [each.generate(batch_size=2, generator=torch.Generator().manual_seed(1)) for each in (net, twin)]
    assert torch.equal(*runs)


def test_built_on_meta() -> None:
    builds_on_meta(lambda: NonAutoregressiveWrapper(encoder(), mask_id=MASK, self_cond=True, self_token_critic=True))


@pytest.mark.parametrize(
    ('given', 'says'),
    [
        ({'mask_id': 7}, 'mask_id'),
        ({'schedule': 'square'}, 'schedule'),
        ({'token_critic': Critic(), 'self_token_critic': True}, 'token_critic'),
        ({'steps': 0}, 'steps'),
        ({'no_replace_prob': 1.5}, 'no_replace_prob'),
        ({'random_token_prob': -0.1}, 'random_token_prob'),
    ],
)
def test_bad_flags_are_named(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        NonAutoregressiveWrapper(encoder(), **({'mask_id': MASK} | given))


def test_bad_input_is_named() -> None:
    net = model()
    for error in (ValueError, AssertionError):
        with pytest.raises(error, match='max_seq_len'):
            net(ids(2, 5))
    with pytest.raises(ValueError, match='mask must'):
        net(ids(2, 6), mask=torch.ones(2, 5, dtype=torch.bool))
    for given in ({'batch_size': 0}, {'start_temperature': -1.0}, {'filter_thres': 1.0}):
        with pytest.raises(ValueError, match=next(iter(given))):
            net.generate(**given)


def test_what_would_do_nothing_is_refused() -> None:
    net = TransformerWrapper(num_tokens=7, max_seq_len=6, attn_layers=Decoder(dim=8, depth=1, heads=2, attn_dim_head=4))
    with pytest.raises(FlagError, match='`net` must have a bidirectional stack, got Decoder'):
        NonAutoregressiveWrapper(net, mask_id=MASK)
    alone = model()
    with pytest.warns(InertFlagWarning, match=r'noise_level_scale=2\.0. does nothing without .token_critic. or'):
        alone.generate(noise_level_scale=2.0)
    assert model(self_token_critic=True).generate(noise_level_scale=2.0).shape == (6,)
