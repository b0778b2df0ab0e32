"""Going on from a cache in memory of fixed shape, eager and compiled, gives what the cache itself gives."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from x_transformers import AutoregressiveWrapper, Continuation, Decoder, TransformerWrapper, XTransformer
from x_transformers.generation.continuation import Programs, compile_refusals

MODERN: dict[str, Any] = {'rotary_pos_emb': True, 'attn_kv_heads': 2, 'ff_glu': True, 'ff_swish': True, 'use_rmsnorm': True}
LENGTH = 48


def model(wrapper: dict[str, Any] | None = None, **flags: Any) -> AutoregressiveWrapper:
    torch.manual_seed(0)
    flags = {'dim': 32, 'depth': 1, 'heads': 4, 'attn_dim_head': 8, 'verbose': False} | flags
    net = TransformerWrapper(num_tokens=40, max_seq_len=LENGTH, attn_layers=Decoder(**flags), **(wrapper or {}))
    return AutoregressiveWrapper(net).eval()


def prompts(rows: int, length: int) -> Tensor:
    return torch.randint(1, 40, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same graph without code generation: fast to make, and it fails on the same breaks."""
    compiler = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda fn, options=None, **rest: compiler(fn, backend='eager', **rest))


# ---------------------------------------------------------------- Continuation


@pytest.mark.parametrize('flags', [{}, MODERN, {'alibi_pos_bias': True}, {'shift_tokens': 1}], ids=str)
def test_one_token_or_several(flags: dict[str, Any]) -> None:
    net, ids = model(**flags).net, prompts(2, 12)
    full = net(ids)
    cache = net(ids[:, :4], return_intermediates=True)[1]
    going_on = Continuation(net, cache, capacity=12)
    for start, stop in ((4, 5), (5, 9), (9, 12)):
        torch.testing.assert_close(going_on.read(ids[:, start:stop]), full[:, start:stop], atol=2e-6, rtol=1e-5)
    assert cache.kv_cache.retained == 4
    with pytest.raises(ValueError, match='ids must be at most 0 tokens, as 12 of capacity=12 are taken, got 1'):
        going_on.read(ids[:, :1])


def test_a_cache_of_fixed_capacity() -> None:
    net, ids = model(**MODERN).net, prompts(2, 8)
    with torch.no_grad():
        cache = net(ids[:, :4], return_intermediates=True)[1].kv_cache.fixed(10)
        assert (cache.length, cache.retained) == (4, 4)
        assert cache.visible().tolist() == [[True] * 4 + [False] * 6]
        full = net(ids)
        torch.testing.assert_close(net(ids[:, 4:6], cache=cache), full[:, 4:6], atol=2e-6, rtol=1e-5)
        assert (cache.length, cache.retained) == (6, 6)
        back = cache.rollback(5)
        torch.testing.assert_close(net(ids[:, 5:8], cache=back), full[:, 5:8], atol=2e-6, rtol=1e-5)
        wider = back.fixed(20)
        assert (wider.retained, wider.visible().shape) == (8, (1, 20))
        with pytest.raises(ValueError, match='capacity must be at least the 8 rows that are held, got 7'):
            back.fixed(7)
    with pytest.raises(ValueError, match='gradients must be off'):
        net(ids[:, 5:6], cache=cache)


def test_absolute_positions_end() -> None:
    net, ids = model().net, prompts(1, LENGTH)
    going_on = Continuation(net, net(ids[:, :-1], return_intermediates=True)[1], capacity=LENGTH + 16)
    going_on.read(ids[:, -1:])
    with pytest.raises(ValueError, match=f'ids must end before position .*, got position {LENGTH + 1}'):
        going_on.read(ids[:, -1:])


@pytest.mark.parametrize(
    ('made', 'named'),
    [
        (model({'num_memory_tokens': 2}), 'num_memory_tokens'),
        (model(attn_selective=True), 'attn_selective'),
        (model(attn_hybrid_module=torch.nn.GRU(32, 32, batch_first=True)), 'attn_hybrid_module'),
    ],
)
def test_what_cannot_be_is_refused_by_name(made: AutoregressiveWrapper, named: str) -> None:
    assert any(named in reason for reason in compile_refusals(made.net))
    with pytest.raises(ValueError, match=f'compile=True is not available with: .*{named}'):
        made.generate(prompts(1, 3), 4, compile=True)


# ---------------------------------------------------------------- generate(compile=True)


@pytest.mark.parametrize(('more', 'named'), [({'cache_kv': False}, 'cache_kv=False'), ({'prompt_lookup': 2}, 'speculative')])
def test_a_program_needs_single_tokens_behind_a_cache(more: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        model().generate(prompts(1, 3), 4, compile=True, **more)


def generated(made: Any, *args: Any, **given: Any) -> None:
    want = made.generate(*args, temperature=0.0, **given)
    assert torch.equal(made.generate(*args, temperature=0.0, compile=True, **given), want)


@pytest.mark.usefixtures('eager')
@pytest.mark.parametrize(
    'flags',
    [
        MODERN,
        {'attn_num_mem_kv': 2, 'alibi_pos_bias': True},
        {'attn_softclamp_logits': True, 'attn_pre_talking_heads': True, 'residual_attn': True},
        {'attn_use_latent_kv': True, 'attn_dim_latent_kv': 8, 'integrate_layers': True},
    ],
    ids=str,
)
def test_one_program_serves_many_texts(flags: dict[str, Any]) -> None:
    made, programs = model(**flags), []
    for length in (5, 9):
        generated(made, prompts(2, length), 12)
        programs.append(*made._programs.kept)
    assert programs[0] is programs[1]


@pytest.mark.usefixtures('eager')
def test_a_window_moves_over_the_memory() -> None:
    generated(model({'use_abs_pos_emb': False}, rotary_pos_emb=True), prompts(2, 9), 2 * LENGTH)


@pytest.mark.usefixtures('eager')
def test_padded_prompts() -> None:
    made = model(rotary_pos_emb=True)
    for lens in ([9, 4], [2, 9]):
        generated(made, prompts(2, 9), 12, prompt_lens=torch.tensor(lens))
    assert len(made._programs.kept) == 1


@pytest.mark.usefixtures('eager')
def test_keywords_for_each_token() -> None:
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, :2] = False
    pairs = torch.rand(16, 16, generator=torch.Generator().manual_seed(0)) < 0.8
    given = {'mask': mask, 'attn_mask': pairs | torch.eye(16, dtype=torch.bool), 'prepend_embeds': torch.randn(2, 3, 32)}
    generated(model(rotary_pos_emb=True), prompts(2, 5), 12, **given)


@pytest.mark.usefixtures('eager')
def test_an_encoder_with_decoder() -> None:
    torch.manual_seed(0)
    sides = {'num_tokens': 40, 'depth': 1, 'heads': 4, 'max_seq_len': LENGTH, 'attn_dim_head': 8}
    made = XTransformer(dim=32, **{f'{side}_{name}': value for side in ('enc', 'dec') for name, value in sides.items()}).eval()
    source, mask = prompts(2, 7), torch.arange(7) < torch.tensor([[7], [4]])
    generated(made, source, torch.ones(2, 1, dtype=torch.long), 20, mask=mask)


@pytest.mark.usefixtures('eager')
def test_a_program_sees_weights_that_have_changed() -> None:
    made = model()
    generated(made, prompts(2, 6), 12)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += torch.randn_like(parameter)
    generated(made, prompts(2, 6), 12)
    assert len(made._programs.kept) == 1


@pytest.mark.usefixtures('eager')
def test_programs_do_not_crowd_each_other_out() -> None:
    """A compiler keeps only a few programs of one function."""
    made = model()
    for rows in range(1, 7):
        made.generate(prompts(rows, 4), 3, compile=True)
    assert len(made._programs.kept) == Programs.KEPT
    assert copy.deepcopy(made)._programs is None
    assert pickle.loads(pickle.dumps(made))._programs is None


@pytest.mark.usefixtures('eager')
def test_texts_that_are_written_at_the_same_time_have_a_program_each() -> None:
    made, one, other = model(), prompts(1, 5), prompts(2, 5)[1:]
    given: dict[str, Any] = {'temperature': 0.0, 'compile': True}
    stream = made.stream(one, 12, **given)
    tokens = [next(stream)]
    second = made.generate(other, 12, **given)
    tokens += list(stream)
    assert torch.equal(torch.stack(tokens, -1), made.generate(one, 12, temperature=0.0))
    assert torch.equal(second, made.generate(other, 12, temperature=0.0))


@pytest.mark.usefixtures('eager')
def test_a_program_made_in_inference_mode_leaves_no_trace() -> None:
    made, prompt = model(), prompts(1, 5)
    with torch.inference_mode():
        inside = made.generate(prompt, 12, temperature=0.0, compile=True)
    assert torch.equal(made.generate(prompt, 12, temperature=0.0, compile=True), inside)


@pytest.mark.deep
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('flags', [{}, MODERN], ids=str)
def test_compiled_code_reads_the_same(flags: dict[str, Any]) -> None:
    net, ids = model(**flags).net, prompts(2, 14)
    full = net(ids)
    going_on = Continuation(net, net(ids[:, :6], return_intermediates=True)[1], capacity=64, compile=True)
    for at in range(6, 14):
        torch.testing.assert_close(going_on.read(ids[:, at : at + 1]), full[:, at : at + 1], atol=1e-5, rtol=1e-5)


def test_a_condition_for_memories_and_tokens_reaches_the_new_token() -> None:
    torch.manual_seed(0)
    layers = Decoder(dim=16, depth=1, heads=2, attn_dim_head=8, rotary_pos_emb=True, use_adaptive_rmsnorm=True, verbose=False)
    model = TransformerWrapper(num_tokens=11, max_seq_len=16, max_mem_len=4, attn_layers=layers).eval()
    x, mems, condition = torch.randint(11, (1, 6)), [torch.randn(1, 3, 16)], torch.randn(1, 9, 16)
    expected = model(x, mems=mems, condition=condition)[:, -1:]
    _, record = model(x[:, :5], mems=mems, condition=condition[:, :8], return_intermediates=True)
    going = Continuation(model, record.kv_cache, capacity=12)
    newest = torch.cat((condition[:, :3], condition[:, -1:]), dim=1)
    assert torch.allclose(going.read(x[:, 5:], mems=mems, condition=newest), expected, atol=1e-5)
