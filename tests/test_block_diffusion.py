from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.laws.combination import Combination, tokens
from tests.laws.groups import ENCODER, GROUPS, PREFIX
from tests.objectives import builds_on_meta, ids, likely, saved_and_loaded, shaken
from x_transformers import BlockDiffusionWrapper, Decoder, Encoder, InertFlagWarning, PrefixDecoder, TransformerWrapper
from x_transformers.block_diffusion import BlockReader, causal_blocks, two_streams
from x_transformers.flags.base import FlagError
from x_transformers.flags.fit import TWICE_MODEL_RULES, TWICE_RULES

MASK, V = 6, 7


def net(kind: Any = PrefixDecoder, seed: int = 0, length: int = 12, **flags: Any) -> TransformerWrapper:
    torch.manual_seed(seed)
    stack = kind(**{'dim': 16, 'depth': 2, 'heads': 2, 'attn_dim_head': 8} | flags)
    made: TransformerWrapper = shaken(TransformerWrapper(num_tokens=V, max_seq_len=length, attn_layers=stack)).double().eval()
    return made


def model(kind: Any = PrefixDecoder, size: int = 3, given: dict[str, Any] | None = None, **flags: Any) -> BlockDiffusionWrapper:
    return BlockDiffusionWrapper(net(kind, **flags), **{'mask_id': MASK, 'block_size': size} | (given or {})).eval()


def text(rows: int, length: int, seed: int = 0) -> Tensor:
    return ids(rows, length, tokens=MASK, seed=seed)


def alone(made: BlockDiffusionWrapper, clean: Tensor, noisy: Tensor, **given: Any) -> Tensor:
    """What the net says of each block by itself: a call for each, on earlier blocks as they are and this one with its noise."""
    size, said = made.block_size, []
    for begin in range(0, clean.shape[1], size):
        rows = torch.cat((clean[:, :begin], noisy[:, begin : begin + size]), dim=1)
        n = rows.shape[1]
        seen = torch.tensor([[key // size <= query // size for key in range(n)] for query in range(n)])
        told = {name: value[:, :n] if name == 'mask' else value for name, value in given.items()}
        said.append(made.net(rows, attn_mask=seen, **made.opened(n), **told)[:, begin:])
    return torch.cat(said, dim=1)


# who sees whom


def test_masks_by_loop() -> None:
    n, size = 7, 3
    both = two_streams(n, size)
    for query, key in itertools.product(range(2 * n), range(2 * n)):
        own, other = (query % n) // size, (key % n) // size
        clean_query, clean_key = query < n, key < n
        if clean_query:
            wanted = clean_key and other <= own
        else:
            wanted = other < own if clean_key else other == own
        assert bool(both[query, key]) == wanted, (query, key)
    assert torch.equal(causal_blocks(n, size), both[:n, :n])


# the loss


@pytest.mark.parametrize('kind', [PrefixDecoder, Encoder])
@pytest.mark.parametrize(('length', 'size'), [(9, 3), (8, 3), (6, 1), (5, 8)])
@torch.no_grad()
def test_loss_by_loop(kind: Any, length: int, size: int) -> None:
    """The mean over tokens of -log p / t of those that are hidden, each block computed alone."""
    made = model(kind, size)
    x = text(2, length)
    torch.manual_seed(1)
    times, hidden = made.draw(x)
    torch.manual_seed(1)
    got = made(x)
    said = alone(made, x, x.masked_fill(hidden, MASK)).log_softmax(dim=-1)
    total = 0.0
    for row, place in itertools.product(range(2), range(length)):
        if hidden[row, place]:
            total -= said[row, place, x[row, place]].item() / times[row, place].item()
    assert hidden.any()
    assert got.item() == pytest.approx(total / (2 * length), rel=1e-6)


def of_every_flag(kind: str) -> Iterator[tuple[str, BlockDiffusionWrapper | None, dict[str, Any]]]:
    """(the flag's group, a model with it, what its calls are told), or no model where it is refused."""
    for group in GROUPS:
        if kind not in group.kinds or group.random:
            continue
        case = Combination(kind, (group.name,))
        try:
            made = BlockDiffusionWrapper(case.build(), mask_id=23, block_size=3)
            given = case.inputs(2).part()
            given.pop('prefix_attn_len', None)
            made.check_keywords(given)
        except (ValueError, InertFlagWarning):
            yield group.name, None, {}
        else:
            yield group.name, made, given


@pytest.mark.parametrize('kind', [PREFIX, ENCODER])
@torch.no_grad()
def test_one_pass_equals_blocks_alone_under_every_flag(kind: str) -> None:
    """Of each flag either the net is refused, or its blocks computed together are what they are alone."""
    equal, refused = 0, set()
    for flag, made, given in of_every_flag(kind):
        if made is None:
            refused.add(flag)
            continue
        x = tokens(2, 8)
        noisy = x.masked_fill(torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.5, 23)
        together, each = made.logits(x, noisy, **given), alone(made, x, noisy, **given)
        torch.testing.assert_close(together, each, rtol=1e-8, atol=1e-8, msg=lambda said, name=flag: f'{name}: {said}')
        equal += 1
    assert equal > 100
    assert refused >= {
        'window',
        'shift',
        'canon_c',
        'canon_d',
        'memory_tokens',
        'smear',
        'bigram',
        'prepend',
        'attn_mask',
        'randomized_positions',
    }


def test_draws_have_their_probabilities() -> None:
    """One time for each block, from the range; a token is hidden with its time as probability (5 standard deviations)."""
    made = model(size=4, given={'time_low': 0.3, 'time_high': 0.8})
    torch.manual_seed(0)
    times, hidden = made.draw(torch.zeros(5_000, 8, dtype=torch.long))
    assert torch.equal(times[:, :1].expand(-1, 4), times[:, :4])
    assert not torch.equal(times[:, 0], times[:, 4])
    assert 0.3 <= times.min().item() < 0.31
    assert 0.79 < times.max().item() <= 0.8
    off = (hidden.double() - times).mean().item()
    assert abs(off) < 5 * math.sqrt(0.25 / hidden.numel())
    assert abs(((hidden.double() - times) * (times - 0.55)).mean().item()) < 5 * math.sqrt(0.25 * 0.25**2 / hidden.numel())


@torch.no_grad()
def test_the_loss_bounds_the_likelihood() -> None:
    """With blocks of one token the hidden token is predicted from all before it: the bound is the likelihood itself."""
    made = model(size=1)
    x = text(2, 4)
    hidden = torch.ones_like(x, dtype=torch.bool)
    exact = made.loss(x, hidden.double(), hidden).item()
    losses = torch.stack([made(x.repeat(50, 1)) for _ in range(60)])
    # the weight 1 / t makes a few draws large, so the spread of the mean is measured
    assert abs(losses.mean().item() - exact) < 5 * losses.std().item() / math.sqrt(len(losses))


@torch.no_grad()
def test_padding_is_left_out() -> None:
    made = model()
    x = text(2, 8)
    mask = torch.arange(8) < torch.tensor([[8], [5]])
    torch.manual_seed(3)
    times, hidden = made.draw(x)
    hidden[:, 1] = True
    got = made.loss(x, times, hidden, mask)
    parts = [made.loss(x[[row], :n], times[[row], :n], hidden[[row], :n]) * n for row, n in ((0, 8), (1, 5))]
    torch.testing.assert_close(got, sum(parts, torch.tensor(0.0)) / 13)
    other = torch.where(mask, x, (x + 1) % MASK)
    torch.testing.assert_close(made.loss(other, times, hidden, mask), got)


def test_gradients_are_finite_and_reach_everything() -> None:
    made = model().train()
    torch.manual_seed(0)
    made(text(4, 9)).backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
    assert made.net.token_emb.emb.weight.grad.abs().sum() > 0


def test_nothing_hidden_gives_a_loss_of_nothing() -> None:
    made = model()
    x = text(2, 6)
    loss = made.loss(x, torch.ones(2, 6), torch.zeros(2, 6, dtype=torch.bool))
    assert loss.item() == 0.0
    loss.backward()


# generation


@pytest.mark.parametrize('kind', [PrefixDecoder, Encoder])
@pytest.mark.parametrize('known', [0, 2, 3, 5])
def test_samples(kind: Any, known: int) -> None:
    """Of the length that was asked for, behind the prompt as it was, without the mask, the same again under a generator."""
    made = model(kind)
    prompts = text(2, known)

    def write(seed: int, **given: Any) -> Tensor:
        return made.generate(prompts, 7, generator=torch.Generator().manual_seed(seed), **given)

    out = write(0)
    assert out.shape == (2, 7)
    assert bool(((out >= 0) & (out < V) & (out != MASK)).all())
    assert torch.equal(out, write(0))
    assert not torch.equal(out, write(1))
    assert torch.equal(write(0, include_prompt=True), torch.cat((prompts, out), dim=1))
    assert torch.equal(write(0, cache_kv=False), out)


def test_prompts_keep_their_axes() -> None:
    made = model()
    assert made.generate(text(4, 3).view(2, 2, 3), 4).shape == (2, 2, 4)
    assert made.generate(text(1, 3)[0], 4).shape == (4,)
    assert made.generate(text(2, 3), 0).shape == (2, 0)


@torch.no_grad()
def test_generation_by_loop() -> None:
    """Greedy, one token in each round: the turn of each is drawn first, and each is the likeliest given what is settled."""
    made = model()
    prompts = text(1, 4)
    got = made.generate(prompts, 4, temperature=0.0, generator=torch.Generator().manual_seed(5), include_prompt=True)
    seq, generator = torch.cat((prompts, torch.full((1, 5), MASK)), dim=1), torch.Generator().manual_seed(5)
    for begin in (3, 6):
        hidden = [place for place in range(begin, begin + 3) if place >= 4]
        chance = torch.rand(1, 3, generator=generator)[0]
        for place in sorted(hidden, key=lambda place: chance[place - begin].item()):
            said = alone(made, seq[:, : begin + 3], seq[:, : begin + 3])[0, place]
            said[MASK] = -math.inf
            seq[0, place] = said.argmax()
    assert torch.equal(got, seq[:, :8])


@torch.no_grad()
def test_one_block_is_drawn_from_its_distribution() -> None:
    """Of two tokens in random order, the counts are those of the two orders, half and half (chi-square, p > 1e-4)."""
    made = model(size=2, length=4)
    count = 20_000
    out = made.generate(torch.zeros(count, 0, dtype=torch.long), 2, generator=torch.Generator().manual_seed(0))

    def told(block: Tensor) -> Tensor:
        return alone(made, block, block)[..., :MASK].softmax(dim=-1)

    first = told(torch.full((1, 2), MASK))[0]
    expected = torch.zeros(MASK, MASK, dtype=torch.double)
    for token in range(MASK):
        expected[token] += 0.5 * first[0, token] * told(torch.tensor([[token, MASK]]))[0, 1]
        expected[:, token] += 0.5 * first[1, token] * told(torch.tensor([[MASK, token]]))[0, 0]
    assert likely(torch.bincount(out[:, 0] * MASK + out[:, 1], minlength=MASK**2), expected.flatten())


@pytest.mark.parametrize(('steps', 'rounds'), [(None, 4), (1, 1), (2, 2), (3, 3), (9, 4)])
def test_rounds_and_what_the_cache_saves(steps: int | None, rounds: int) -> None:
    made = model(size=4, length=16)
    lengths: list[int] = []
    made.net.attn_layers.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    made.generate(text(2, 8), 8, steps=steps)
    assert lengths == [8, *[4] * rounds, 4, *[4] * rounds]
    lengths.clear()
    made.generate(text(2, 8), 8, steps=steps, cache_kv=False)
    assert lengths == [*[12] * rounds, *[16] * rounds]


@pytest.mark.parametrize('flags', [{}, {'rotary_pos_emb': True}, {'alibi_pos_bias': True}, {'attn_use_latent_kv': True,
                         'attn_dim_latent_kv': 6}, {'residual_attn': True}, {'add_value_residual': True}], ids=str)  # fmt: skip
def test_cached_equals_recomputed(flags: dict[str, Any]) -> None:
    made = model(length=16, **flags)
    out = [made.generate(text(2, 4), 11, generator=torch.Generator().manual_seed(0), cache_kv=cache) for cache in (True, False)]
    assert torch.equal(*out)


@torch.no_grad()
def test_a_cached_block_is_a_recomputed_one_under_every_flag() -> None:
    """Two blocks are remembered one after the other, and what is read of a third one twice, with other noise, is forgotten."""
    equal = 0
    for flag, made, given in of_every_flag(PREFIX):
        if made is None or not made.net.can_cache_kv:
            continue
        x = tokens(2, 9)
        cached, whole = (BlockReader(made, given, caches=caches) for caches in (True, False))
        for begin, noisy in ((0, 1), (3, 0), (6, 2), (6, 1)):
            block = x[:, begin : begin + 3].clone()
            block[:, noisy] = 23
            read = [reader.read(x[:, :begin], block) for reader in (cached, whole)]
            torch.testing.assert_close(*read, rtol=1e-8, atol=1e-8, msg=lambda said, name=flag: f'{name}: {said}')
        equal += 1
    assert equal > 100


def test_modes_come_back() -> None:
    made = model().train()
    made.generate(text(1, 2), 3)
    assert made.training
    assert made.net.training


# what is refused


@pytest.mark.parametrize(
    'rule', [*TWICE_RULES, *(rule for rule in TWICE_MODEL_RULES if not rule.inert)], ids=lambda r: r.flags[-1]
)
def test_what_would_show_the_answer_is_refused(rule: Any) -> None:
    own = TransformerWrapper.__signature__.parameters
    stack = {'dim': 16, 'depth': 1, 'heads': 2} | {name: value for name, value in rule.example.items() if name not in own}
    around = {name: value for name, value in rule.example.items() if name in own}
    made = TransformerWrapper(num_tokens=V, max_seq_len=12, attn_layers=Encoder(**stack), **around)
    with pytest.raises(FlagError, match=rule.flags[-1] if len(rule.flags) == 1 else 'shift_tokens'):
        BlockDiffusionWrapper(made, mask_id=MASK)


def test_refusals() -> None:
    with pytest.raises(FlagError, match='PrefixDecoder'):
        model(Decoder)
    with pytest.raises(FlagError, match='block_size'):
        model(size=0)
    with pytest.raises(FlagError, match='time_low'):
        model(given={'time_low': 0.5, 'time_high': 0.5})
    with pytest.raises(ValueError, match='mask_id must be one of the 7'):
        model(given={'mask_id': 7})
    made = model()
    with pytest.raises(ValueError, match='at most max_seq_len=12'):
        made(text(1, 13))
    with pytest.raises(ValueError, match='at most max_seq_len=12'):
        made.generate(text(1, 6), 7)
    with pytest.raises(ValueError, match='mask must be boolean'):
        made(text(1, 6), mask=torch.ones(1, 6))
    with pytest.raises(ValueError, match='attn_mask must not be given'):
        made(text(1, 6), attn_mask=torch.ones(6, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match='prefix_attn_len must not be given'):
        made.generate(text(1, 6), 3, prefix_attn_len=2)
    with pytest.raises(FlagError, match='steps'):
        made.generate(text(1, 6), 3, steps=0)


def test_built_empty_saved_and_loaded() -> None:
    builds_on_meta(lambda: BlockDiffusionWrapper(net().float(), mask_id=MASK))
    twin = saved_and_loaded(model(), model(seed=1))
    assert isinstance(twin, BlockDiffusionWrapper)
    assert torch.equal(*(made.generate(text(2, 3), 6, temperature=0.0, generator=torch.Generator().manual_seed(0))
                         for made in (twin, model())))  # fmt: skip


def test_conditions_reach_the_net() -> None:
    made = model(cross_attend=True)
    context = torch.randn(2, 4, 16, dtype=torch.double)
    x, hidden = text(2, 6), torch.ones(2, 6, dtype=torch.bool)
    losses = [made.loss(x, hidden.double(), hidden, context=scale * context).item() for scale in (1.0, -1.0)]
    assert losses[0] != losses[1]
    assert made.generate(text(2, 2), 4, context=context).shape == (2, 4)
