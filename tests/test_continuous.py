"""ContinuousTransformerWrapper and ContinuousAutoregressiveWrapper."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from x_transformers import (
    AutoregressiveWrapper,
    ContinuousAutoregressiveWrapper,
    ContinuousTransformerWrapper,
    Decoder,
    Encoder,
    InertFlagWarning,
)
from x_transformers.continuous import GaussianNLL, masked_mean, sample_from_mean_variance
from x_transformers.flags.base import FlagError, UnknownFlag

B, N, D = 3, 7, 5
STACK = {'dim': 16, 'depth': 2, 'heads': 2, 'attn_dim_head': 8, 'verbose': False}


def make(stack: dict | None = None, layers: type = Decoder, **flags) -> ContinuousTransformerWrapper:
    torch.manual_seed(0)
    given = {'dim_in': D, 'dim_out': D, 'max_seq_len': 16, **flags}
    return ContinuousTransformerWrapper(attn_layers=layers(**STACK, **(stack or {})), **given).eval()


def train(net: ContinuousTransformerWrapper, **options) -> ContinuousAutoregressiveWrapper:
    return ContinuousAutoregressiveWrapper(net, **options)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(B, N, D, generator=torch.Generator().manual_seed(1))


LENS = torch.tensor([7, 4, 5])
VARIANTS = [{}, {'probabilistic': True}, {'emb_dim': 12, 'post_emb_norm': True}, {'scaled_sinu_pos_emb': True}]


# ---------------------------------------------------------------- what is computed


def test_order_of_what_happens_to_the_inputs(x):
    net = make(emb_dim=12, post_emb_norm=True)
    more, front = torch.randn(B, N, 12), torch.randn(B, 2, 12)
    embeds = net.post_emb_norm(net.project_in(x) + net.pos_emb(x) + more)
    h = net.attn_layers(net.project_emb(torch.cat((front, embeds), dim=1)))
    got = net(x, sum_embeds=more, prepend_embeds=front)
    assert got.shape == (B, N + 2, D)
    torch.testing.assert_close(got, net.project_out(h))
    assert net.project_in.weight.shape == (12, D)
    assert net.project_emb.weight.shape == (16, 12)


def test_means_and_variances_take_turns_along_the_channels(x):
    net = make(probabilistic=True)
    mean, variance = net(x)
    raw = net.project_out(net(x, return_embeddings=True))
    torch.testing.assert_close(mean, raw[..., 0::2])
    torch.testing.assert_close(variance, raw[..., 1::2].exp())
    assert make(probabilistic=True, dim_out=None)(x).shape == (2, B, N, 8)


def test_lens_are_a_mask_of_the_first_frames(x):
    net = make(layers=Encoder)
    mask = torch.arange(N) < LENS[:, None]
    torch.testing.assert_close(net(x, lens=LENS), net(x, mask=mask))
    assert not torch.allclose(net(x), net(x, mask=mask))


@pytest.mark.parametrize('given', ['lens', 'mask', 'nothing', 'front'])
@pytest.mark.parametrize('probabilistic', [False, True])
def test_pooling_is_over_the_frames_that_count(x, given, probabilistic):
    net = make(layers=Encoder, average_pool_embed=True, probabilistic=probabilistic, num_memory_tokens=2)
    mask = torch.arange(N) < LENS[:, None]
    front = torch.randn(B, 2, 16)
    asked = {
        'lens': {'lens': LENS}, 'mask': {'mask': mask}, 'nothing': {}, 'front': {'lens': LENS, 'prepend_embeds': front}
    }[given]  # fmt: skip
    plain = make(layers=Encoder, probabilistic=probabilistic, num_memory_tokens=2)
    plain.load_state_dict(net.state_dict())
    h = plain(x, return_embeddings=True, **asked)
    extra = 2 if given == 'front' else 0
    rows = [h[b, : extra + (N if given == 'nothing' else int(LENS[b]))].mean(dim=0) for b in range(B)]
    pooled = torch.stack(rows)
    torch.testing.assert_close(net(x, return_embeddings=True, **asked), pooled)
    out = net(x, **asked)
    assert out.shape == ((2, B, D) if probabilistic else (B, D))
    torch.testing.assert_close(out[0] if probabilistic else out, net.project_out(pooled)[:, :: 2 if probabilistic else 1])


def test_memory_tokens_stand_in_front_of_what_is_prepended(x):
    net = make(num_memory_tokens=3)
    front = torch.randn(B, 2, 16)
    out, record = net(x, prepend_embeds=front, return_intermediates=True)
    assert out.shape == (B, N + 2, D)
    embeds = torch.cat((front, net.project_in(x) + net.pos_emb(x)), dim=1)
    h = net.attn_layers(torch.cat((net.memory_tokens.expand(B, -1, -1), embeds), dim=1))
    torch.testing.assert_close(out, net.project_out(h[:, 3:]))
    torch.testing.assert_close(record.memory_tokens, h[:, :3])


def test_returned_memories_are_of_this_segment_unless_asked(x):
    net = make(max_mem_len=4, stack={'rotary_pos_emb': True})
    longer = make(max_mem_len=9, stack={'rotary_pos_emb': True}, extend_mems=True)
    _, mems = net(x[:, :3], return_mems=True)
    assert isinstance(mems, tuple)
    assert [mem.shape[1] for mem in mems] == [3, 3]
    out, (again, _) = net(x[:, 3:5], mems=mems, return_mems=True)
    assert again.shape[1] == 2
    assert not again.requires_grad
    torch.testing.assert_close(out, net(x[:, :5])[:, 3:])
    _, joined = longer(x[:, 3:], mems=mems, return_mems=True)
    assert joined[0].shape[1] == 7
    torch.testing.assert_close(joined[0][:, :3], mems[0])


RETURNS = ('return_embeddings', 'return_intermediates', 'return_mems', 'return_attn')


@pytest.mark.parametrize('asked', [names for k in range(5) for names in itertools.combinations(RETURNS, k)])
def test_every_combination_of_returns(x, asked):
    net = make(max_mem_len=4)
    out = net(x, **dict.fromkeys(asked, True))
    base = net(x, return_embeddings=True) if 'return_embeddings' in asked else net(x)
    if 'return_intermediates' in asked:
        out, record = out
        assert len(record.attn_intermediates) == 2
        assert (record.mems is not None) == ('return_mems' in asked)
    elif 'return_mems' in asked:
        out, mems = out
        assert [mem.shape for mem in mems] == [(B, 4, 16)] * 2
    elif 'return_attn' in asked:
        out, maps = out
        torch.testing.assert_close(maps[0].sum(dim=-1), torch.ones(B, 2, N))
    torch.testing.assert_close(out, base)


# ---------------------------------------------------------------- laws


@pytest.mark.parametrize('flags', [*VARIANTS, {'num_memory_tokens': 2}])
def test_no_frame_sees_a_later_one(x, flags):
    net = make(**flags)
    changed = x.clone()
    changed[:, 4:] += 1
    torch.testing.assert_close(net(x)[..., :4, :], net(changed)[..., :4, :])
    assert not torch.allclose(net(x)[..., 4:, :], net(changed)[..., 4:, :])


@pytest.mark.parametrize('layers', [Decoder, Encoder])
@pytest.mark.parametrize('flags', [{}, {'num_memory_tokens': 2}, {'probabilistic': True}])
def test_padding_is_not_seen_and_rows_are_independent(x, layers, flags):
    net = make(layers=layers, **flags)
    out = net(x, lens=LENS)
    changed = x.clone()
    for b in range(B):
        changed[b, LENS[b] :] = 9.0
    other = net(changed, lens=LENS)
    for b in range(B):
        length = int(LENS[b])
        torch.testing.assert_close(out[..., b, :length, :], other[..., b, :length, :])
        torch.testing.assert_close(out[..., b, :length, :], net(x[b : b + 1, :length])[..., 0, :, :])


@pytest.mark.parametrize('stack', [{}, {'rotary_pos_emb': True}, {'alibi_pos_bias': True}])
def test_left_padding_is_not_seen(x, stack):
    net = make(stack)
    start = N - LENS
    moved = torch.zeros_like(x)
    for b in range(B):
        moved[b, start[b] :] = x[b, : LENS[b]]
    out = net(moved, seq_start_pos=start)
    for b in range(B):
        torch.testing.assert_close(out[b, start[b] :], net(x[b : b + 1, : LENS[b]])[0])


@pytest.mark.parametrize('stack', [{}, {'rotary_pos_emb': True}])
@pytest.mark.parametrize('whole', [False, True])
@pytest.mark.parametrize('flags', VARIANTS[:3])
@pytest.mark.parametrize('front', [0, 2])
def test_cached_is_uncached(x, stack, whole, flags, front):
    net = make(stack, **flags)
    prefix = {'prepend_embeds': torch.randn(B, front, net.emb_dim)} if front else {}
    expected = net(x, **prefix)
    out, record = net(x[:, :3], return_intermediates=True, **prefix)
    parts = [out]
    for low, high in ((3, 4), (4, 6), (6, 7)):
        new = {'x': x[:, :high]} if whole else {'x': x[:, low:high], 'input_not_include_cache': True}
        out, record = net(cache=record, return_intermediates=True, **new)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, dim=-2), expected)


def test_outputs_for_the_last_positions_only(x):
    net = make(probabilistic=True)
    torch.testing.assert_close(net(x, logits_last=2), net(x)[:, :, -2:])


@pytest.mark.parametrize('flags', [*VARIANTS, {'num_memory_tokens': 2}, {'max_seq_len': None}])
def test_saved_loaded_and_built_without_memory(x, flags):
    net = make(**flags)
    twin = make(**flags)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.load_state_dict(net.state_dict())
    torch.testing.assert_close(twin(x), net(x))
    with torch.device('meta'):
        empty = make(**flags)
    assert empty(x.to('meta')).is_meta
    filled = empty.to_empty(device='cpu')
    filled.reset_parameters()
    assert torch.isfinite(filled(x)).all()
    for (name, one), other in zip(net.state_dict().items(), filled.state_dict().values(), strict=True):
        assert math.isclose(one.std(correction=0), other.std(correction=0), rel_tol=0.7, abs_tol=0.05), name


# ---------------------------------------------------------------- losses


def test_parts_of_losses():
    mean, variance, target = torch.randn(2, 3), torch.rand(2, 3) + 0.1, torch.randn(2, 3)
    full = torch.distributions.Normal(mean, variance.sqrt()).log_prob(target)
    torch.testing.assert_close(GaussianNLL()(torch.stack((mean, variance)), target), -full - 0.5 * math.log(2 * math.pi))
    t, mask = torch.randn(2, 3, 4), torch.tensor([[True, False, True], [False, True, False]])
    torch.testing.assert_close(masked_mean(t, mask), t[mask].mean())
    torch.testing.assert_close(masked_mean(t), t.mean())
    torch.manual_seed(0)
    many = sample_from_mean_variance(torch.full((40000,), 2.0), torch.full((40000,), 9.0), temperature=0.5)
    assert abs(many.mean() - 2.0) < 5 * 1.5 / 200
    assert abs(many.std() - 1.5) < 5 * 1.5 / math.sqrt(80000)


@pytest.mark.parametrize('by_target', [False, True])
@pytest.mark.parametrize('equal', [False, True])
@pytest.mark.parametrize('kind', ['mse', 'l1', 'nll', 'own'])
def test_loss_by_position(x, by_target, equal, kind):
    net = make(probabilistic=kind == 'nll')
    own = nn.SmoothL1Loss(reduction='none') if kind == 'own' else None
    wrapped = train(net, loss_fn=own, use_l1_loss=kind == 'l1', equal_loss_weight_batch=equal, mask_by_target=by_target)
    mask = torch.arange(N) < LENS[:, None]
    predicted = net(x[:, :-1], mask=mask[:, :-1])
    rows = []
    for b in range(B):
        entries = []
        for j in range(N - 1):
            if not (j + 1 if by_target else j) < LENS[b]:
                continue
            target = x[b, j + 1]
            if kind == 'nll':
                entries.append(GaussianNLL()(predicted[:, b, j], target))
            else:
                miss = predicted[b, j] - target
                entries.append({'mse': miss**2, 'l1': miss.abs()}.get(kind) if own is None else own(predicted[b, j], target))
        rows.append(torch.stack(entries))
    expected = torch.stack([row.sum() / len(row) for row in rows]).mean() if equal else torch.cat(rows).mean()
    torch.testing.assert_close(wrapped(x, lens=LENS), expected)
    torch.testing.assert_close(wrapped(x, mask=mask), expected)
    if not by_target:
        torch.testing.assert_close(wrapped(x, mask=mask[:, :-1]), expected)


# ---------------------------------------------------------------- rollout


def rollout_by_hand(wrapped, x, steps, context, lens):
    """Without padding, without a cache: row by row the whole sequence again for every frame."""
    losses = []
    for b in range(len(x)):
        if lens[b] <= steps:
            continue
        seen, said = x[b : b + 1, : context[b]], []
        for _ in range(steps):
            said.append(wrapped.net(seen)[..., -1, :])
            seen = torch.cat((seen, (said[-1][0] if wrapped.probabilistic else said[-1])[:, None]), dim=1)
        target = x[b : b + 1, context[b] : context[b] + steps]
        losses.append(wrapped.loss_fn(torch.stack(said, dim=-2), target).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize('flags', [{}, {'probabilistic': True}, {'num_memory_tokens': 2}])
@pytest.mark.parametrize('stack', [{}, {'rotary_pos_emb': True}])
@pytest.mark.parametrize('given', [None, 'lens', 'mask'])
def test_rollout_goes_on_from_its_own_predictions(x, flags, stack, given, monkeypatch):
    wrapped = train(make(stack, **flags))
    lens = torch.tensor([7, 2, 5]) if given else torch.full((B,), N)
    context = torch.tensor([4, 1, 2])
    monkeypatch.setattr(wrapped, '_context_lengths', lambda most: context)
    # samples without noise are means
    monkeypatch.setattr(torch, 'randn', lambda *shape, **options: torch.zeros(*shape))
    kwargs = {None: {}, 'lens': {'lens': lens}, 'mask': {'mask': torch.arange(N) < lens[:, None]}}[given]
    loss = wrapped(x, rollout_steps=3, **kwargs)
    expected = rollout_by_hand(wrapped, x, 3, context, lens)
    torch.testing.assert_close(loss, expected)
    got = torch.autograd.grad(loss, list(wrapped.parameters()), allow_unused=True)
    wanted = torch.autograd.grad(expected, list(wrapped.parameters()), allow_unused=True)
    for (name, _), one, other in zip(wrapped.named_parameters(), got, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4, msg=name)


def test_lengths_of_contexts_are_uniform():
    wrapped = train(make())
    torch.manual_seed(0)
    drawn = wrapped._context_lengths(torch.full((30000,), 5))
    counts = torch.bincount(drawn, minlength=6)
    assert counts[0] == 0
    assert len(counts) == 6
    # five standard deviations of a binomial
    assert (counts[1:] - 6000).abs().max() < 5 * math.sqrt(30000 * 0.2 * 0.8)
    assert wrapped._context_lengths(torch.tensor([0, -3, 1])).tolist() == [1, 1, 1]


def test_rollout_of_rows_that_are_all_too_short(x):
    wrapped = train(make())
    loss = wrapped(x, rollout_steps=3, lens=torch.tensor([1, 3, 0]))
    assert loss == 0
    loss.backward()
    assert all((parameter.grad == 0).all() for parameter in wrapped.parameters() if parameter.grad is not None)


# ---------------------------------------------------------------- generation


@pytest.mark.parametrize('cache_kv', [False, True])
@pytest.mark.parametrize('stack', [{}, {'rotary_pos_emb': True}])
@pytest.mark.parametrize('flags', [{}, {'probabilistic': True}, {'num_memory_tokens': 2}])
def test_generation_feeds_outputs_back(x, cache_kv, stack, flags):
    net = make(stack, **flags)
    wrapped = train(net).train()
    made = wrapped.generate(x, 4, temperature=0.0, cache_kv=cache_kv)
    assert wrapped.training
    assert net.training
    seen = x
    net.eval()
    for _ in range(4):
        out = net(seen)
        seen = torch.cat((seen, (out[0] if net.probabilistic else out)[:, -1:]), dim=1)
    torch.testing.assert_close(made, seen[:, N:])
    single = wrapped.generate(x[0], 4, temperature=0.0, include_prompt=True)
    torch.testing.assert_close(single, seen[0])
    assert wrapped.generate(x, 0).shape == (B, 0, D)


def test_generation_of_prompts_of_different_lengths(x):
    wrapped = train(make())
    made = wrapped.generate(x, 3, prompt_lens=LENS)
    for b in range(B):
        torch.testing.assert_close(made[b], wrapped.generate(x[b, : LENS[b]], 3))


def test_generation_beyond_the_window(x):
    plain = train(make(max_seq_len=6))
    made = plain.generate(x, 3, cache_kv=False)
    torch.testing.assert_close(made[:, 0], plain.net(x[:, -6:])[:, -1])
    torch.testing.assert_close(made[:, 1], plain.net(torch.cat((x, made[:, :1]), dim=1)[:, -6:])[:, -1])
    with pytest.raises(ValueError, match='max_seq_len'):
        plain.generate(x, 3)
    # with one layer a frame that is held knows nothing of those that have left
    rotary = train(ContinuousTransformerWrapper(
        dim_in=D, dim_out=D, max_seq_len=6, attn_layers=Decoder(**{**STACK, 'depth': 1}, rotary_pos_emb=True)
    ))  # fmt: skip
    torch.testing.assert_close(rotary.generate(x, 5), rotary.generate(x, 5, cache_kv=False))


def test_sampling_is_reproducible_and_has_the_net_s_variance(x):
    net = make(probabilistic=True)
    wrapped = train(net)
    one, two = (wrapped.generate(x, 3, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, wrapped.generate(x, 3, generator=torch.Generator().manual_seed(6)))
    mean, variance = net(x[:1])[:, 0, -1]
    many = wrapped.generate(x[:1].expand(4000, -1, -1), 1, temperature=0.5, generator=torch.Generator().manual_seed(7))
    deviation = 0.5 * variance.sqrt()
    assert ((many[:, 0].mean(dim=0) - mean).abs() < 5 * deviation / math.sqrt(4000)).all()
    assert ((many[:, 0].std(dim=0) - deviation).abs() < 5 * deviation / math.sqrt(8000)).all()


# ---------------------------------------------------------------- bad input


def refuse(error, match, call, *args, **kwargs):
    with pytest.raises(error, match=match):
        call(*args, **kwargs)


def test_flags_that_do_not_go_together():
    refuse(FlagError, 'project_in', make, project_in=nn.Linear(D, 16))
    refuse(FlagError, 'project_out', make, project_out=nn.Linear(16, D))
    refuse(UnknownFlag, 'dim_in', make, dim_inn=3)
    with pytest.warns(InertFlagWarning, match='max_seq_len'):
        make(max_seq_len=None, scaled_sinu_pos_emb=True)
    with pytest.warns(InertFlagWarning, match='max_mem_len'):
        make(extend_mems=True)
    refuse(FlagError, 'use_l1_loss', train, make(probabilistic=True), use_l1_loss=True)
    refuse(FlagError, 'loss_fn', train, make(), loss_fn=nn.MSELoss(), use_l1_loss=True)


def test_inputs_that_do_not_fit(x):
    net, pooling = make(), make(average_pool_embed=True)
    wrapped = train(net)
    refuse(ValueError, 'width 5', net, torch.randn(B, N, 4))
    refuse(ValueError, 'b n d', net, torch.randn(N, D))
    refuse(TypeError, 'floating', net, torch.zeros(B, N, D, dtype=torch.long))
    refuse(ValueError, 'lens and mask', net, x, lens=LENS, mask=torch.ones(B, N, dtype=torch.bool))
    refuse(ValueError, '0 to 7, the tokens of the sequence', net, x, lens=LENS + 1)
    refuse(TypeError, 'whole number', net, x, lens=LENS.float())
    refuse(ValueError, 'pooled', pooling, x, logits_last=1)
    refuse(ValueError, 'prepend_embeds', wrapped, x, prepend_embeds=x)
    refuse(ValueError, 'at least 2', wrapped, x[:, :1])
    refuse(ValueError, 'mask must cover', wrapped, x, mask=torch.ones(B, N + 1, dtype=torch.bool))
    refuse(ValueError, 'unreduced', train(net, loss_fn=nn.MSELoss()), x, lens=LENS)
    refuse(ValueError, 'last target', train(net, mask_by_target=True), x, mask=torch.ones(B, N - 1, dtype=torch.bool))
    refuse(ValueError, 'at least 8', wrapped, x, rollout_steps=N)
    refuse(ValueError, 'rollout_steps', wrapped, x, rollout_steps=0)
    refuse(ValueError, 'sum_embeds', wrapped, x, rollout_steps=2, sum_embeds=x)
    refuse(ValueError, 'gaps', wrapped, x, rollout_steps=2, mask=torch.arange(N).expand(B, N) > 2)
    refuse(ValueError, 'temperature', wrapped.generate, x, 2, temperature=-1.0)
    refuse(TypeError, 'temperature', wrapped.generate, x, 2, temperature=torch.tensor([0.5, 0.7]))
    refuse(ValueError, 'seq_len', wrapped.generate, x, -1)
    refuse(ValueError, 'must have at least one token', wrapped.generate, x[:, :0], 2)
    refuse(ValueError, 'start_tokens', wrapped.generate, x[0, 0], 2)
    refuse(ValueError, 'prompt_lens', wrapped.generate, x, 2, lens=LENS)
    refuse(ValueError, 'got 4 and 5', train(make(dim_out=4)).generate, x, 2)


@pytest.mark.parametrize(('dim_out', 'probabilistic', 'projects'), [(16, False, False), (5, False, True), (8, True, False)])
def test_use_identity_if_same_dim_leaves_out_projections(dim_out: int, probabilistic: bool, projects: bool) -> None:
    layers = Decoder(dim=16, depth=1, heads=2, attn_dim_head=8)
    flags = {'dim_in': 16, 'dim_out': dim_out, 'probabilistic': probabilistic, 'use_identity_if_same_dim': True}
    model = ContinuousTransformerWrapper(max_seq_len=8, attn_layers=layers, **flags)
    assert isinstance(model.project_in, nn.Identity)
    assert isinstance(model.project_out, nn.Identity) == (not projects)


# ---------------------------------------------------------------- projections of one's own


def test_a_projection_of_ones_own_reads_what_it_likes():
    ids, films = torch.randint(0, 24, (B, N)), torch.randn(B, N, 2, 3, 3)
    layers = Decoder(**STACK, rotary_pos_emb=True)
    by_table = ContinuousTransformerWrapper(project_in=nn.Embedding(24, 16), attn_layers=layers).eval()
    torch.testing.assert_close(by_table(ids), layers(by_table.project_in(ids)))
    of_films = ContinuousTransformerWrapper(project_in=nn.Sequential(nn.Flatten(2), nn.Linear(18, 16)), attn_layers=layers)
    torch.testing.assert_close(of_films(films), layers(of_films.project_in(films)))
    logits = ContinuousTransformerWrapper(project_in=nn.Embedding(24, 16), dim_out=24, attn_layers=layers)
    assert AutoregressiveWrapper(logits)(ids).isfinite()


@pytest.mark.parametrize('projection', [nn.Linear(D, 7), nn.GRU(D, 16, batch_first=True), nn.Flatten(1)])
def test_a_projection_of_ones_own_gives_a_vector_for_each_place(x, projection):
    net = ContinuousTransformerWrapper(project_in=projection, attn_layers=Decoder(**STACK))
    with pytest.raises(ValueError, match=r'project_in must give a vector of width 16 for each place of x, \(3, 7, 16\), got'):
        net(x)


def test_a_projection_of_ones_own_is_given_a_sequence():
    net = ContinuousTransformerWrapper(project_in=nn.Embedding(24, 16), attn_layers=Decoder(**STACK))
    for wrong in (torch.ones(3).long(), [[1, 2]]):
        with pytest.raises(TypeError, match='x must be a tensor'):
            net(wrong)


def test_a_projection_out_of_a_probabilistic_model_gives_pairs(x):
    net = make(dim_out=None, probabilistic=True, project_out=nn.Linear(16, 5))
    with pytest.raises(ValueError, match='a mean and a variance for each channel, got 5'):
        net(x)
