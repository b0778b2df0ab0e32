from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.objectives import builds_on_meta, decoder, ids, likely, saved_and_loaded, shaken
from x_transformers import BeliefStateWrapper


def model(seed: int = 0, shared: bool = False, rotary: bool = True, length: int = 12, **given: Any) -> BeliefStateWrapper:
    backward = None if shared else decoder(seed=seed + 1, rotary_pos_emb=rotary, length=length)
    made = BeliefStateWrapper(decoder(seed=seed, rotary_pos_emb=rotary, length=length), backward, **given)
    shaken(made)
    return made.eval()


def forward_state(net: BeliefStateWrapper, tokens: Tensor) -> Tensor:
    return net.forward_decoder(tokens[None], return_embeddings=True)[0, -1]


def backward_state(net: BeliefStateWrapper, suffix: Tensor) -> Tensor:
    front = net.suffix_token[None, None]
    return net.backward_decoder(suffix.flip(0)[None], prepend_embeds=front, return_embeddings=True)[0, -1]


def by_loops(net: BeliefStateWrapper, row: Tensor) -> dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]]:
    """For each pair (i, j): the loss of the next token, of the previous one, and the pair of embeddings."""
    found = {}
    n = len(row)
    for i in range(n):
        for j in range(i + 2, n + 1):
            both = torch.cat((forward_state(net, row[: i + 1]), backward_state(net, row[j:])))
            following, previous = net.text_head(both).chunk(2)
            found[i, j] = (F.cross_entropy(following, row[i + 1]), F.cross_entropy(previous, row[j - 1]), both)
    return found


@pytest.mark.parametrize('shared', [False, True])
def test_loss_is_the_double_loop(shared: bool) -> None:
    net, seq = model(shared=shared), ids(2, 6)
    losses = [loss for row in seq for pair in by_loops(net, row).values() for loss in pair[:2]]
    assert len(losses) == 2 * 2 * (6 * 5 // 2)
    torch.testing.assert_close(net(seq), torch.stack(losses).mean())


def test_the_double_loop_with_lengths() -> None:
    net, seq, lens = model(), ids(3, 7), [7, 2, 5]
    losses = [x for row, n in zip(seq, lens, strict=True) for pair in by_loops(net, row[:n]).values() for x in pair[:2]]
    torch.testing.assert_close(net(seq, lens=torch.tensor(lens)), torch.stack(losses).mean())


def test_padded_equals_unpadded() -> None:
    """In the original the loss depends on what the pads are."""
    net, row = model(), ids(1, 5)
    plain = net(row)
    for filler in (0, 3):
        padded = F.pad(row, (0, 4), value=filler)
        torch.testing.assert_close(net(padded, lens=torch.tensor([5])), plain)


def test_gradients_are_those_of_the_double_loop() -> None:
    net, seq = model(), ids(1, 5)
    net(seq).backward()
    got = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    torch.stack([x for pair in by_loops(net, seq[0]).values() for x in pair[:2]]).mean().backward()
    assert set(got) == {name for name, p in net.named_parameters() if p.grad is not None}
    for name, p in net.named_parameters():
        if name in got:
            torch.testing.assert_close(got[name], p.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_few_pairs_at_once_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    net, seq = model(pred_distance=True), ids(2, 6)
    whole = net(seq)
    monkeypatch.setattr('x_transformers.belief_state_wrapper.PAIRS_AT_ONCE', 4)
    torch.testing.assert_close(net(seq), whole)


def test_the_distance_is_predicted_beside() -> None:
    net, seq = model(pred_distance=True, pred_distance_loss_weight=0.3, max_pred_distance=4), ids(2, 6)
    text, off = [], []
    for row in seq:
        for (i, j), (following, previous, both) in by_loops(net, row).items():
            text += [following, previous]
            off.append(F.cross_entropy(net.to_distance_logits(both), torch.tensor(min(j - i, 3))))
    torch.testing.assert_close(net(seq), torch.stack(text).mean() + 0.3 * torch.stack(off).mean())


def test_backward_weight_scales_text_only() -> None:
    """In the original the loss of the distance is scaled too, and what is ignored counts in the mean."""
    given = {'pred_distance': True, 'backward_ar_loss_weight': 0.5}
    net, seq, lens = model(**given), ids(2, 6), [6, 4]
    text, off = [], []
    for row, n in zip(seq, lens, strict=True):
        for (i, j), (following, previous, both) in by_loops(net, row[:n]).items():
            text += [following, 0.5 * previous]
            off.append(F.cross_entropy(net.to_distance_logits(both), torch.tensor(j - i)))
    torch.testing.assert_close(net(seq, lens=torch.tensor(lens)), torch.stack(text).mean() + torch.stack(off).mean())


@pytest.mark.parametrize('per_direction', [False, True])
def test_weights_by_pair_always_count(per_direction: bool) -> None:
    """In the original only if the backward weight is not 1."""
    net, seq = model(), ids(1, 5)

    def weigh(pairs: Tensor) -> Tensor:
        distance = (pairs[:, 1] - pairs[:, 0]).float()
        return torch.stack((distance, distance**2), dim=-1) if per_direction else distance

    losses = []
    for (i, j), (following, previous, _) in by_loops(net, seq[0]).items():
        losses += [(j - i) * following, (j - i) ** (2 if per_direction else 1) * previous]
    torch.testing.assert_close(net(seq, loss_weight_by_fb_indices=weigh), torch.stack(losses).mean())


def test_pairs_of_weight_zero_are_not_computed() -> None:
    net, seq = model(), ids(2, 6)

    def late(pairs: Tensor) -> Tensor:
        return (pairs[:, 0] >= 3).float()

    losses = [
        loss if i >= 3 else 0.0 * loss
        for row in seq
        for (i, j), (following, previous, _) in by_loops(net, row).items()
        for loss in (following, previous)
    ]
    seen: list[int] = []
    net.text_head.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[1]))
    loss = net(seq, loss_weight_by_fb_indices=late)
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    # (3, 5), (3, 6), (4, 6) of 15 pairs, and the first, which always stays
    assert seen == [4]
    assert net(seq, loss_weight_by_fb_indices=lambda pairs: torch.zeros(len(pairs))) == 0


def test_the_distance_that_is_told_matters() -> None:
    """In the original its parameters get no gradient."""
    net, seq = model(cond_on_distance=True, cond_on_distance_prob=0.999999), ids(1, 5)
    plain = net(seq)
    net.train()
    told = net(seq)
    told.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in net.to_distance_cond.parameters())
    losses = []
    for i in range(5):
        for j in range(i + 2, 6):
            both = torch.cat((forward_state(net, seq[0, : i + 1]), backward_state(net, seq[0, j:])))
            following, previous = net.text_head(both * net.to_distance_cond(torch.tensor([j - i]))[0]).chunk(2)
            losses += [F.cross_entropy(following, seq[0, i + 1]), F.cross_entropy(previous, seq[0, j - 1])]
    torch.testing.assert_close(told, torch.stack(losses).mean())
    assert not torch.allclose(told, plain)


def test_a_share_of_the_pairs() -> None:
    net = model(train_frac_forward_backward_pairs=0.3)
    torch.manual_seed(0)
    counts = torch.zeros(10)
    index = {(i, j): k for k, (i, j) in enumerate((i, j) for i in range(5) for j in range(i + 2, 6))}
    for _ in range(4000):
        pairs = net.pairs(5).tolist()
        assert len(pairs) == 3
        assert len({tuple(pair) for pair in pairs}) == 3
        counts[index[tuple(pairs[0])]] += 1
    assert likely(counts, torch.full((10,), 0.1))
    # all that is drawn may lie beyond short rows
    few = model(train_frac_forward_backward_pairs=0.01)
    losses = torch.stack([few(ids(1, 9), lens=torch.tensor([2])) for _ in range(10)])
    assert bool(losses.isfinite().all())


@pytest.mark.parametrize('cache_kv', [False, True])
@pytest.mark.parametrize('suffix', [None, ids(3, seed=5), ids(2, 3, seed=5)])
def test_generation_forwards(cache_kv: bool, suffix: Tensor | None) -> None:
    net, prompts = model(), ids(2, 3)
    out = net.generate_with_suffix_cond(prompts, 5, temperature=0.0, suffix=suffix, cache_kv=cache_kv)
    for row in range(2):
        tokens = prompts[row]
        end = prompts[0, :0] if suffix is None else suffix if suffix.ndim == 1 else suffix[row]
        behind = backward_state(net, end)
        for _ in range(5):
            following, _ = net.text_head(torch.cat((forward_state(net, tokens), behind))).chunk(2)
            tokens = torch.cat((tokens, following.argmax()[None]))
        assert out[row].tolist() == tokens[3:].tolist()


@pytest.mark.parametrize('cache_kv', [False, True])
def test_generation_backwards(cache_kv: bool) -> None:
    net, prompts = model(), ids(2, 3)
    generator = torch.Generator().manual_seed(3)
    start = torch.randint(0, 7, (2, 1), generator=torch.Generator().manual_seed(3))
    out = net.generate_with_suffix_cond(
        prompts, 4, temperature=0.0, decode_backwards=True, cache_kv=cache_kv, generator=generator, include_prompt=True
    )
    for row in range(2):
        tokens = prompts[row]
        ahead = forward_state(net, start[row])
        for _ in range(4):
            _, previous = net.text_head(torch.cat((ahead, backward_state(net, tokens)))).chunk(2)
            tokens = torch.cat((previous.argmax()[None], tokens))
        assert out[row].tolist() == tokens.flip(0).tolist()


@pytest.mark.parametrize('backwards', [False, True])
def test_prompts_of_several_lengths_and_axes(backwards: bool) -> None:
    net = model()
    rows = [ids(n, seed=n) for n in (4, 2, 3)]

    def run(prompts: Any) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        given = {'decode_backwards': backwards, 'generator': generator, 'cache_kv': True}
        return net.generate_with_suffix_cond(prompts, 4, temperature=0.0, **given)

    if not backwards:
        assert run(rows).tolist() == [run(row).tolist() for row in rows]
    assert run(ids(2, 2, 3)).shape == (2, 2, 4)
    assert run(ids(3)).shape == (4,)
    same = [ids(3, seed=1), ids(3, seed=2)]
    assert run(same).tolist() == run(torch.stack(same)).tolist()


@pytest.mark.parametrize('cache_kv', [False, True])
def test_backwards_with_prompts_of_several_lengths(cache_kv: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    net = model()
    monkeypatch.setattr(torch, 'randint', lambda low, high, shape, **_: torch.full(shape, 2))
    given = {'temperature': 0.0, 'decode_backwards': True, 'cache_kv': cache_kv}
    rows = [ids(n, seed=n) for n in (4, 2, 3)]
    together = net.generate_with_suffix_cond(rows, 4, **given)
    assert together.tolist() == [net.generate_with_suffix_cond(row, 4, **given).tolist() for row in rows]


def test_sampling() -> None:
    net, prompt = model(), ids(2)
    pair = torch.cat((forward_state(net, prompt), backward_state(net, prompt[:0])))
    probs = (net.text_head(pair).chunk(2)[0] / 0.8).softmax(dim=-1).detach()
    torch.manual_seed(0)
    drawn = net.generate_with_suffix_cond(prompt.expand(20_000, -1), 1, temperature=0.8, filter_kwargs={'min_p': 0.0})
    assert likely(torch.bincount(drawn[:, 0], minlength=7), probs)
    runs = [net.generate_with_suffix_cond(prompt, 8, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert runs[0].tolist() == runs[1].tolist()


def test_modes_come_back_after_exceptions() -> None:
    net = model().train()
    net.backward_decoder.eval()
    with pytest.raises(RuntimeError, match='broken'):
        net.generate_with_suffix_cond(ids(1, 3), 2, filter_logits_fn=broken)
    assert net.training
    assert not net.backward_decoder.training
    assert net.forward_decoder.training


def broken(logits: Tensor, **given: Any) -> Tensor:
    raise RuntimeError('broken')


def test_state() -> None:
    net = model(pred_distance=True, cond_on_distance=True, backward_ar_loss_weight=0.5)
    own = {k: tuple(v.shape) for k, v in net.state_dict().items() if '_decoder.' not in k}
    assert own == {
        'suffix_token': (16,),
        'loss_weights': (2,),
        'text_head.0.weight': (16, 32),
        'text_head.0.bias': (16,),
        'text_head.2.weight': (14, 16),
        'text_head.2.bias': (14,),
        'to_distance_logits.0.weight': (16, 32),
        'to_distance_logits.0.bias': (16,),
        'to_distance_logits.2.weight': (12, 16),
        'to_distance_logits.2.bias': (12,),
        'to_distance_cond.1.weight': (16, 1),
        'to_distance_cond.1.bias': (16,),
        'to_distance_cond.3.weight': (32, 16),
        'to_distance_cond.3.bias': (32,),
    }
    assert net.loss_weights.tolist() == [1.0, 0.5]
    twin = model(seed=5, pred_distance=True, cond_on_distance=True, backward_ar_loss_weight=0.5)
    torch.testing.assert_close(saved_and_loaded(net, twin)(ids(2, 6)), net(ids(2, 6)))


def test_built_on_meta() -> None:
    built = builds_on_meta(lambda: BeliefStateWrapper(decoder(), decoder(), backward_ar_loss_weight=0.25))
    assert built.loss_weights.tolist() == [1.0, 0.25]  # type: ignore[operator, union-attr]


@pytest.mark.parametrize(
    ('given', 'says'),
    [
        ({'backward_decoder': decoder(tokens=8)}, 'num_tokens'),
        ({'backward_decoder': decoder(dim=32)}, 'emb_dim'),
        ({'cond_on_distance_prob': 1.0}, 'cond_on_distance_prob'),
        ({'train_frac_forward_backward_pairs': 0.0}, 'train_frac_forward_backward_pairs'),
    ],
)
def test_bad_flags_are_named(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        BeliefStateWrapper(decoder(), **given)


@pytest.mark.parametrize(
    ('given', 'says'),
    [
        ({'seq_len': -1}, 'seq_len'),
        ({'temperature': -1.0}, 'temperature'),
        ({'filter_logits_fn': 'best'}, 'filter_logits_fn'),
        ({'prompts': ids(2, 0)}, 'prompts'),
        ({'prompts': torch.rand(2, 3)}, 'prompts'),
        ({'suffix': ids(3, 4)}, 'suffix'),
        ({'suffix': ids(4), 'decode_backwards': True}, 'suffix'),
    ],
)
def test_bad_input_is_named(given: dict[str, Any], says: str) -> None:
    with pytest.raises((ValueError, TypeError), match=says):
        model().generate_with_suffix_cond(**({'prompts': ids(2, 3), 'seq_len': 2} | given))


def test_bad_sequences_are_named() -> None:
    net = model()
    with pytest.raises(ValueError, match=r'^seq must'):
        net(ids(2, 1))
    for lens in (torch.tensor([5]), torch.tensor([1, 5]), torch.tensor([3, 6])):
        with pytest.raises(ValueError, match=r'^lens must'):
            net(ids(2, 5), lens=lens)
    with pytest.raises(ValueError, match='loss_weight_by_fb_indices'):
        net(ids(2, 5), loss_weight_by_fb_indices=lambda pairs: pairs.float().mean())


def test_nothing_to_generate() -> None:
    net = model()
    assert net.generate_with_suffix_cond(ids(2, 3), 0).shape == (2, 0)
    assert net.generate_with_suffix_cond(ids(2, 0), 3, decode_backwards=True).shape == (2, 3)
