from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.generation.toys import OldToy, Toy, greedy
from x_transformers import Decoder, TransformerWrapper, autoregressive_wrapper
from x_transformers.autoregressive_wrapper import AutoregressiveWrapper, eval_decorator

NETS = {
    'toy': lambda **k: Toy(**k),
    'absolute': lambda **k: Toy(absolute=True, **k),
    'old': lambda **k: OldToy(Toy(**k)),
    'old absolute': lambda **k: OldToy(Toy(absolute=True, **k)),
}


def inner(net: nn.Module) -> Toy:
    return net.toy if isinstance(net, OldToy) else net


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 7, shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- greedy decoding equals recomputation


@pytest.mark.parametrize('name', NETS)
@pytest.mark.parametrize('cache_kv', [True, False])
def test_greedy_equals_recomputing_each_row(name: str, cache_kv: bool) -> None:
    net = NETS[name]()
    prompts = ids(3, 4)
    out = AutoregressiveWrapper(net).generate(prompts, 6, temperature=0.0, cache_kv=cache_kv)
    assert out.tolist() == [greedy(inner(net), row.tolist(), 6) for row in prompts]


@pytest.mark.parametrize('name', ['toy', 'old'])
@pytest.mark.parametrize('cache_kv', [True, False])
@pytest.mark.parametrize('length', [3, 5, 9])
def test_the_window_slides(name: str, cache_kv: bool, length: int) -> None:
    net = NETS[name](limit=5)
    prompts = ids(2, length)
    out = AutoregressiveWrapper(net).generate(prompts, 8, temperature=0.0, cache_kv=cache_kv)
    assert out.tolist() == [greedy(inner(net), row.tolist(), 8, limit=5) for row in prompts]


def test_without_restriction_everything_is_seen() -> None:
    net = Toy(limit=5)
    prompts = ids(2, 4)
    for cache_kv in (True, False):
        out = AutoregressiveWrapper(net).generate(prompts, 8, temperature=0.0, cache_kv=cache_kv, restrict_to_max_seq_len=False)
        assert out.tolist() == [greedy(net, row.tolist(), 8) for row in prompts]


def test_new_tokens_alone_are_fed() -> None:
    net, old = Toy(), OldToy(Toy())
    AutoregressiveWrapper(net).generate(ids(2, 4), 4, temperature=0.0)
    AutoregressiveWrapper(old).generate(ids(2, 4), 4, temperature=0.0)
    assert net.fed == [4, 1, 1, 1]
    assert old.fed == [4, 1, 1, 1]


@pytest.mark.parametrize('name', NETS)
@pytest.mark.parametrize('cache_kv', [True, False])
@pytest.mark.parametrize('limit', [32, 6])
def test_prompts_of_several_lengths(name: str, cache_kv: bool, limit: int) -> None:
    net = NETS[name](limit=limit)
    if 'absolute' in name and limit == 6 and cache_kv:
        pytest.skip('refused, see below')
    rows = [ids(n, seed=n) for n in (5, 2, 3)]
    expected = [greedy(inner(net), row.tolist(), 7, limit=limit) for row in rows]
    model = AutoregressiveWrapper(net)
    assert model.generate(rows, 7, temperature=0.0, cache_kv=cache_kv).tolist() == expected
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=3)
    again = model.generate(padded, 7, temperature=0.0, cache_kv=cache_kv, prompt_lens=torch.tensor([5, 2, 3]))
    assert again.tolist() == expected


def test_any_leading_axes() -> None:
    model = AutoregressiveWrapper(Toy())
    prompts = ids(2, 3, 4)
    flat = model.generate(prompts.view(6, 4), 5, temperature=0.0)
    assert torch.equal(model.generate(prompts, 5, temperature=0.0), flat.view(2, 3, 5))
    assert torch.equal(model.generate(prompts[0, 0], 5, temperature=0.0), flat[0])
    assert torch.equal(
        model.generate(prompts, 5, temperature=0.0, prompt_lens=torch.full((2, 3), 2)),
        model.generate(prompts[..., :2], 5, temperature=0.0),
    )


def test_include_prompt_and_no_new_tokens() -> None:
    model = AutoregressiveWrapper(Toy())
    prompts = ids(2, 4)
    whole = model.generate(prompts, 3, temperature=0.0, include_prompt=True)
    assert torch.equal(whole, torch.cat((prompts, model.generate(prompts, 3, temperature=0.0)), 1))
    assert model.generate(prompts, 0, eos_token=1).shape == (2, 0)
    assert model.generate(prompts[0], 0).shape == (0,)
    assert torch.equal(model.generate(prompts, 0, include_prompt=True), prompts)


# ---------------------------------------------------------------- the end token


class Scripted(nn.Module):
    """Expects a given sequence, whatever it reads."""

    max_seq_len, num_tokens, can_cache_kv = 64, 7, False

    def __init__(self, rows: list[list[int]], prompt: int) -> None:
        super().__init__()
        self.rows, self.prompt = torch.tensor(rows), prompt

    def forward(self, x: Tensor, return_intermediates: bool = False, cache: None = None) -> tuple[Tensor, None]:
        step = x.shape[1] - self.prompt
        return F.one_hot(self.rows[:, step], 7).float()[:, None].expand(-1, x.shape[1], -1), None


@pytest.mark.parametrize(('pad', 'eos'), [(0, 2), (2, 2)])
def test_after_its_end_a_row_is_padded_and_all_ended_means_stop(pad: int, eos: int) -> None:
    net = Scripted([[4, 2, 5, 5, 5], [3, 3, 3, 2, 6]], prompt=3)
    model = AutoregressiveWrapper(net, pad_value=pad)
    prompts = torch.tensor([[2, 2, 1], [1, 2, 2]])
    out = model.generate(prompts, 5, eos_token=eos, temperature=0.0)
    assert out.tolist() == [[4, 2, pad, pad], [3, 3, 3, 2]]


# ---------------------------------------------------------------- keywords of the net


@pytest.mark.parametrize('cache_kv', [True, False])
@pytest.mark.parametrize('limit', [32, 6])
def test_a_mask_over_the_prompt_is_extended(cache_kv: bool, limit: int) -> None:
    net = Toy(limit=limit)
    prompt = ids(2, 5)
    mask = torch.tensor([[True, False, True, True, True], [True, True, False, False, True]])
    out = AutoregressiveWrapper(net).generate(prompt, 5, temperature=0.0, cache_kv=cache_kv, mask=mask)
    for row, kept, got in zip(prompt, mask, out, strict=True):
        seen, expected = row.tolist(), []
        for _ in range(5):
            full = torch.cat((kept, torch.ones(len(seen) - 5, dtype=torch.bool)))[None]
            with torch.no_grad():
                nxt = int(net.eval()(torch.tensor([seen[-limit:]]), mask=full[:, -limit:])[0, -1].argmax())
            seen.append(nxt)
            expected.append(nxt)
        assert got.tolist() == expected


@pytest.mark.parametrize('cache_kv', [True, False])
def test_prefix_with_masks(cache_kv: bool) -> None:
    net = Toy()
    prefix = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    out = AutoregressiveWrapper(net).generate(ids(2, 4), 5, temperature=0.0, cache_kv=cache_kv, prepend_embeds=prefix)
    for row, front, got in zip(ids(2, 4), prefix, out, strict=True):
        assert got.tolist() == greedy(net, row.tolist(), 5, prepend_embeds=front[None])


@pytest.mark.parametrize('cache_kv', [True, False])
def test_embeddings_per_token_are_cut(cache_kv: bool) -> None:
    net = Toy()
    extra = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(1))
    out = AutoregressiveWrapper(net).generate(ids(1, 4), 5, temperature=0.0, cache_kv=cache_kv, sum_embeds=extra)
    seen = ids(1, 4)[0].tolist()
    for _ in range(5):
        with torch.no_grad():
            seen.append(int(net.eval()(torch.tensor([seen]), sum_embeds=extra[:, : len(seen)])[0, -1].argmax()))
    assert out[0].tolist() == seen[4:]


# ---------------------------------------------------------------- sampling, streaming, modes


def test_a_generator_makes_it_reproducible() -> None:
    model = AutoregressiveWrapper(Toy())

    def made(seed: int) -> Tensor:
        return model.generate(ids(2, 3), 12, filter_logits_fn='min_p', generator=torch.Generator().manual_seed(seed))

    assert torch.equal(made(3), made(3))
    assert not torch.equal(made(3), made(4))


def test_draws_are_one_multinomial_per_step() -> None:
    net = Toy()
    torch.manual_seed(5)
    out = AutoregressiveWrapper(net).generate(ids(2, 3), 4, temperature=0.7, filter_logits_fn='top_k', filter_kwargs={'k': 3})
    torch.manual_seed(5)
    seen = ids(2, 3)
    with torch.no_grad():
        for _ in range(4):
            logits = autoregressive_wrapper.top_k(net.eval()(seen)[:, -1], k=3)
            seen = torch.cat((seen, torch.multinomial((logits / 0.7).softmax(-1), 1)), 1)
    assert torch.equal(out, seen[:, 3:])


def test_sampling_follows_the_distribution() -> None:
    net = Toy()
    torch.manual_seed(0)
    n = 20_000
    got = AutoregressiveWrapper(net).generate(ids(1, 3).expand(n, -1), 1, temperature=2.0, filter_logits_fn=lambda t: t)
    with torch.no_grad():
        expected = (net.eval()(ids(1, 3))[0, -1] / 2.0).softmax(-1)
    counts = torch.bincount(got.flatten(), minlength=7).double()
    chi = ((counts - n * expected) ** 2 / (n * expected)).sum()
    # 6 degrees of freedom: 27.86 is exceeded once in ten thousand times
    assert chi < 27.86


def test_streaming_gives_the_same_tokens_and_holds_the_mode_until_closed() -> None:
    model = AutoregressiveWrapper(Toy())
    expected = model.generate(ids(2, 3, 4), 5, temperature=0.0)
    model.train()
    stream = model.stream(ids(2, 3, 4), 5, temperature=0.0)
    assert model.training
    parts = [next(stream)]
    assert not model.net.training
    assert torch.is_grad_enabled()
    parts += list(stream)
    assert model.net.training
    assert torch.equal(torch.stack(parts, -1), expected)
    stream = model.stream(ids(1, 3), 5, temperature=0.0)
    next(stream)
    stream.close()
    assert model.net.training


def test_modes_of_all_submodules_are_restored_after_an_exception() -> None:
    model = AutoregressiveWrapper(Toy())
    model.train()
    model.net.dropout.eval()

    def broken(logits: Tensor) -> Tensor:
        assert not model.net.training
        raise RuntimeError('broken')

    with pytest.raises(RuntimeError, match='broken'):
        model.generate(ids(1, 3), 2, filter_logits_fn=broken)
    assert model.training
    assert model.net.training
    assert not model.net.dropout.training


def test_eval_decorator() -> None:
    class Own(nn.Module):
        @eval_decorator
        def mode(self, fail: bool = False) -> bool:
            if fail:
                raise KeyError
            return self.training

    own = Own()
    assert own.mode() is False
    with pytest.raises(KeyError):
        own.mode(fail=True)
    assert own.training


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ('error', 'says', 'prompts', 'given'),
    [
        (AssertionError, 'filter_logits_fn', ids(1, 3), {'filter_logits_fn': 'topp'}),
        (ValueError, 'temperature', ids(1, 3), {'temperature': -1.0}),
        (ValueError, 'temperature', ids(1, 3), {'temperature': float('nan')}),
        (ValueError, 'seq_len', ids(1, 3), {'seq_len': -1}),
        (ValueError, 'prompts must have at least one token', ids(2, 0), {}),
        (ValueError, 'must have at least one row', ids(0, 3), {}),
        (ValueError, 'single number', torch.tensor(3), {}),
        (AssertionError, 'got an empty list', [], {}),
        (ValueError, 'prompt 1 must hold at least 1', [ids(2), ids(0)], {}),
        (ValueError, 'prompt 1 of the list', [ids(2), ids(1, 2)], {}),
        (AssertionError, 'prompt_lens must be None', [ids(2)], {'prompt_lens': torch.tensor([1])}),
        (ValueError, 'at most 3, .*got 4', ids(1, 3), {'prompt_lens': torch.tensor([4])}),
        (ValueError, 'prompt 0 must hold at least 1', ids(1, 3), {'prompt_lens': torch.tensor([0])}),
        (ValueError, 'each of 1 prompts, got 2', ids(1, 3), {'prompt_lens': [1, 2]}),
        (TypeError, 'prompt_lens must be integers', ids(1, 3), {'prompt_lens': torch.tensor([1.0])}),
        (TypeError, 'prompts must be integers', torch.randn(1, 3), {}),
        (TypeError, 'list', 'abc', {}),
        (ValueError, 'mask must cover the 3 tokens .*, got 2', ids(1, 3), {'mask': torch.ones(1, 2, dtype=torch.bool)}),
        (ValueError, 'pos must cover the 6 tokens .*, got 3', ids(1, 3), {'pos': torch.arange(3)}),
        (ValueError, 'condition must cover the 6 tokens .*, got 3', ids(1, 3), {'condition': torch.zeros(1, 3, 8)}),
        (ValueError, 'sum_embeds must cover the 6 tokens .*, got 3', ids(1, 3), {'sum_embeds': torch.zeros(1, 3, 8)}),
        (ValueError, 'attn_mask must cover the 6 .*, got 3', ids(1, 3), {'attn_mask': torch.ones(3, 3, dtype=torch.bool)}),
        (ValueError, 'draft_model and prompt_lookup', ids(1, 3), {'draft_model': Toy(), 'prompt_lookup': 1}),
        (ValueError, 'lookahead', ids(1, 3), {'draft_model': Toy(), 'lookahead': 0}),
        (ValueError, 'prompt_lookup', ids(1, 3), {'prompt_lookup': 0}),
        (ValueError, 'draft model must have .* 7 tokens, got 5', ids(1, 3), {'draft_model': Toy(vocabulary=5)}),
        (ValueError, 'amateur must have .* 7 tokens, got 5', ids(1, 3), {'amateur_model': Toy(vocabulary=5)}),
        (AssertionError, 'each of the 2 amateurs, got 1', ids(1, 3), {'amateur_model': (Toy(), Toy())}),
        (TypeError, 'amateur_model', ids(1, 3), {'amateur_model': ['no']}),
    ],
)
def test_bad_input_is_refused_before_anything_is_computed(error: type, says: str, prompts: object, given: dict) -> None:
    net = Toy()
    given = {'seq_len': 4, **given}
    with pytest.raises(error, match=says):
        AutoregressiveWrapper(net).generate(prompts, **given)
    assert net.fed == []


def test_a_cache_with_absolute_positions_ends_at_the_maximum() -> None:
    net = Toy(absolute=True, limit=6)
    model = AutoregressiveWrapper(net)
    assert model.generate(ids(1, 4), 3, temperature=0.0).shape == (1, 3)
    net.fed.clear()
    for kind in (AssertionError, ValueError):
        with pytest.raises(kind, match=r'at most max_seq_len=6 tokens .*rotary'):
            model.generate(ids(1, 4), 4, temperature=0.0)
    assert net.fed == []
    free = model.generate(ids(1, 4), 4, temperature=0.0, cache_kv=False)
    assert free.shape == (1, 4)
    never = next(token for token in range(7) if token not in free)
    with pytest.raises(AssertionError, match='rotary'):
        model.generate(ids(1, 4), 4, temperature=0.0, eos_token=never)
    net.can_cache_kv = False
    assert model.generate(ids(1, 4), 4, temperature=0.0).shape == (1, 4)


# ---------------------------------------------------------------- the loss


class Language(nn.Module):
    """A net whose outputs depend on each input token alone; records what it was given."""

    max_seq_len, num_tokens, can_cache_kv = 16, 7, True

    def __init__(self, log_prob: bool = False, predicts: bool = False) -> None:
        super().__init__()
        made = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(7, 7, generator=made))
        self.emb = nn.Parameter(torch.randn(7, 5, generator=made))
        self.output_is_log_prob, self.add_continuous_pred_head = log_prob, predicts

    def forward(self, x, return_intermediates, prepend_embeds=None, return_next_embed_pred=False, **given):
        self.given = given
        logits, embedded = self.table[x], self.emb[x]
        if prepend_embeds is not None:
            front = prepend_embeds.shape[1]
            logits, embedded = F.pad(logits, (0, 0, front, 0), value=9.0), F.pad(embedded, (0, 0, front, 0), value=9.0)
        out = logits.log_softmax(-1) if self.output_is_log_prob else logits
        if return_next_embed_pred:
            out = (out, (embedded * 2, embedded))
        from types import SimpleNamespace

        return out, SimpleNamespace(attn_z_loss=torch.tensor(0.25))


@pytest.mark.parametrize('log_prob', [False, True])
@pytest.mark.parametrize('front', [0, 2])
def test_loss_is_the_mean_over_targets_that_count(log_prob: bool, front: int) -> None:
    net = Language(log_prob)
    x = torch.tensor([[1, 2, 3, -100], [4, -100, 5, 6]])
    prefix = torch.zeros(2, front, 5) if front else None
    loss, (logits, _) = AutoregressiveWrapper(net, pad_value=6)(x, return_outputs=True, prepend_embeds=prefix)
    terms = []
    for row in x.tolist():
        for now, following in pairwise(row):
            if following != -100:
                terms.append(-net.table[6 if now == -100 else now].log_softmax(-1)[following])
    assert torch.allclose(loss, torch.stack(terms).mean())
    assert logits.shape == (2, 3, 7)
    assert torch.allclose(logits[0, 1].softmax(-1), net.table[2].softmax(-1))


def test_loss_without_a_target_is_not_a_number() -> None:
    assert AutoregressiveWrapper(Language())(torch.tensor([[1, -100]])).isnan()


def test_z_loss_is_added() -> None:
    x = ids(2, 5)
    plain, more = AutoregressiveWrapper(Language())(x), AutoregressiveWrapper(Language(), add_attn_z_loss=True)(x)
    assert torch.allclose(more - plain, torch.tensor(0.25))


@pytest.mark.parametrize('front', [0, 2])
def test_next_embedding_loss(front: int) -> None:
    net = Language(predicts=True)
    x = torch.tensor([[1, 2, 3], [4, 5, -100]])
    prefix = torch.zeros(2, front, 5) if front else None
    loss = AutoregressiveWrapper(net, next_embed_loss_weight=0.5)(x, prepend_embeds=prefix)
    plain = AutoregressiveWrapper(Language())(x)
    pairs = [(1, 2), (2, 3), (4, 5)]
    expected = torch.stack([(2 * net.emb[a] - net.emb[b]).abs().mean() for a, b in pairs]).mean()
    assert torch.allclose(loss, plain + 0.5 * expected)
    loss.backward()
    # the goal is not pulled towards the prediction: token 3 is only ever a goal
    assert net.emb.grad[3].eq(0).all()


@pytest.mark.parametrize('front', [0, 3])
def test_forgetful_mask(front: int) -> None:
    model = AutoregressiveWrapper(Language(), mask_prob=0.4)
    prefix = torch.zeros(64, front, 5) if front else None
    counts = torch.zeros(10)
    for seed in range(30):
        torch.manual_seed(seed)
        model(ids(64, 10), prepend_embeds=prefix)
        mask = model.net.given['self_attn_kv_mask']
        assert mask.shape == (64, 10 + front)
        assert mask[:, : front + 1].all()
        assert (~mask).sum(1).eq(4).all()
        counts += (~mask[:, front:]).sum(0)
    # each of the nine positions is hidden at the same rate, 4 / 9, within five standard deviations
    n = 30 * 64
    assert ((counts[1:] - n * 4 / 9).abs() < 5 * (n * 4 / 9 * 5 / 9) ** 0.5).all()


def test_forgetful_mask_shows_nothing_that_the_callers_masks_hide() -> None:
    model, x = AutoregressiveWrapper(Language(), mask_prob=0.4), ids(2, 6)
    real, front = torch.arange(6) >= torch.tensor([[0], [3]]), torch.tensor([[True, False]]).expand(2, -1)
    given = {'prepend_embeds': torch.zeros(2, 2, 5), 'prepend_mask': front}
    for name in ('mask', 'self_attn_kv_mask'):
        torch.manual_seed(0)
        model(x, prepend_embeds=given['prepend_embeds'])
        alone = model.net.given['self_attn_kv_mask']
        torch.manual_seed(0)
        model(x, **given, **{name: real})
        assert torch.equal(model.net.given['self_attn_kv_mask'], alone & torch.cat((front, real), dim=1))


def test_forgetful_mask_draws_in_upstream_order() -> None:
    model = AutoregressiveWrapper(Language(), mask_prob=0.5)
    torch.manual_seed(1)
    model(ids(2, 6))
    torch.manual_seed(1)
    noise = torch.randn(2, 6)
    noise[:, 0] = -1e30
    expected = torch.ones(2, 6).scatter(1, noise.topk(3, -1).indices, 0).bool()
    assert torch.equal(model.net.given['self_attn_kv_mask'], expected)


def test_bad_training_input() -> None:
    for share in (1.0, -0.1):
        with pytest.raises(AssertionError, match='mask_prob'):
            AutoregressiveWrapper(Language(), mask_prob=share)
    model = AutoregressiveWrapper(Language())
    with pytest.raises(ValueError, match='batch, sequence'):
        model(ids(4))
    with pytest.raises(ValueError, match='two tokens'):
        model(ids(2, 1))
    with pytest.raises(TypeError, match='float32'):
        model(torch.randn(2, 4))


def test_several_heads_are_refused() -> None:
    net = Toy()
    net.has_multiple_heads = True
    with pytest.raises(ValueError, match='num_output_heads'):
        AutoregressiveWrapper(net).generate(ids(1, 3), 2)


def test_every_public_helper_is_there() -> None:
    names = (
        'exists default identity join cast_tuple log pad_at_dim align_right eval_decorator gumbel_noise gumbel_sample '
        'modify_cached_kv top_k top_p top_a min_p FILTER_LOGITS_FN contrastive_decode_fn'
    )
    for name in names.split():
        assert hasattr(autoregressive_wrapper, name), name
    assert autoregressive_wrapper.cast_tuple([1], 2) == ([1], [1])
    assert autoregressive_wrapper.cast_tuple(1) == (1,)
    assert autoregressive_wrapper.join(['a', 'b']) == 'a, b'


@pytest.mark.parametrize(
    'options', [{}, {'tie_embedding': True}, {'mixture_of_softmax': True}, {'num_memory_tokens': 2}], ids=str
)
@pytest.mark.parametrize('prefix', [0, 3])
def test_loss_without_logits_equals_the_loss_of_the_logits(
    options: dict[str, Any], prefix: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = Decoder(dim=16, depth=1, heads=2, attn_dim_head=8)
    model = AutoregressiveWrapper(TransformerWrapper(num_tokens=11, max_seq_len=16, attn_layers=stack, **options))
    x = torch.randint(0, 11, (2, 9))
    x[0, 6:] = -100
    front = {'prepend_embeds': torch.randn(2, prefix, 16)} if prefix else {}
    results = []
    for least in (2**24, 0):
        monkeypatch.setattr('x_transformers.autoregressive_wrapper.LARGE_LOGITS', least)
        model.zero_grad()
        loss = model(x, **front)
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(model(x, return_outputs=True, **front)[0].detach(), results[0][0])


@pytest.mark.parametrize('large', [False, True])
def test_targets_say_what_each_output_predicts(large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoregressive_wrapper, 'LARGE_LOGITS', 0 if large else 2**40)
    net = TransformerWrapper(num_tokens=9, max_seq_len=8, attn_layers=Decoder(dim=16, depth=1, heads=2))
    model, x = AutoregressiveWrapper(net), ids(2, 6)
    following = torch.cat((x[:, 1:], torch.full((2, 1), -100)), dim=1)
    torch.testing.assert_close(model(x, targets=following), model(x))
    own = ids(2, 6, seed=1).masked_fill(torch.tensor([False, True, False, False, True, False]), -100)
    wanted = F.cross_entropy(net(x).flatten(0, 1), own.flatten(), ignore_index=-100)
    torch.testing.assert_close(model(x, targets=own), wanted)
    with pytest.raises(ValueError, match='targets must have the shape of x'):
        model(x, targets=own[:, :-1])


def test_lens_leave_targets_out():
    stack = Decoder(dim=16, depth=1, heads=2, attn_dim_head=8)
    model = AutoregressiveWrapper(TransformerWrapper(num_tokens=9, max_seq_len=8, attn_layers=stack))
    ids, lens = torch.randint(1, 9, (3, 8)), torch.tensor([8, 5, 2])
    marked = ids.masked_fill(torch.arange(8) >= lens[:, None], -100)
    assert torch.equal(model(ids, lens=lens), model(marked))
    for wrong in (torch.tensor([1, 2]), torch.tensor([1.0, 2.0, 3.0]), [1, 2, 3]):
        with pytest.raises(ValueError, match='lens must be one whole number per row'):
            model(ids, lens=wrong)


def test_the_loss_of_an_excised_prefix_is_that_of_the_tokens():
    stack = Decoder(dim=16, depth=1, heads=2, attn_dim_head=8)
    model = AutoregressiveWrapper(TransformerWrapper(num_tokens=9, max_seq_len=8, attn_layers=stack))
    ids, prefix = torch.randint(1, 9, (3, 8)), torch.randn(3, 2, 16)
    assert torch.allclose(model(ids, prepend_embeds=prefix), model(ids, prepend_embeds=prefix, excise_prepend_embeds=True))
