"""A stepper reads token by token what the general way reads, and says what it cannot."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper, XTransformer
from x_transformers.attention.kernels.choose import use_kernel
from x_transformers.generation import decode
from x_transformers.profiling import annotate
from x_transformers.stepping.model import CompiledStepper, Programs, Stepper
from x_transformers.stepping.one_row import OneRow
from x_transformers.stepping.refusals import refusals
from x_transformers.stepping.stack import COLUMNS_PAY, FeedForwardStep

MODERN: dict[str, Any] = {'rotary_pos_emb': True, 'attn_kv_heads': 2, 'ff_glu': True, 'ff_swish': True, 'use_rmsnorm': True}
LENGTH = 48


def model(wrapper: dict[str, Any] | None = None, **flags: Any) -> AutoregressiveWrapper:
    torch.manual_seed(0)
    flags = {'dim': 32, 'depth': 2, 'heads': 4, 'attn_dim_head': 8, 'verbose': False} | flags
    net = TransformerWrapper(num_tokens=40, max_seq_len=LENGTH, attn_layers=Decoder(**flags), **(wrapper or {}))
    return AutoregressiveWrapper(net).eval()


def prompts(rows: int, length: int) -> Tensor:
    return torch.randint(1, 40, (rows, length), generator=torch.Generator().manual_seed(1))


def logits_of(
    made: nn.Module, steps: bool, monkeypatch: pytest.MonkeyPatch, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor, bool]:
    """(tokens, logits that each was chosen by, whether a stepper read)."""
    seen: list[Tensor] = []
    stepped = []
    read = decode.Reader.read

    def watched(self: decode.Reader, tokens: Any, last: int = 1) -> Tensor:
        seen.append(read(self, tokens, last))
        stepped.append(self.stepper is not None)
        return seen[-1]

    with monkeypatch.context() as patch:
        patch.setattr(decode.Reader, 'read', watched)
        patch.setattr(decode, 'STEPS_PAY_FROM', 2 if steps else 10**9)
        out = made.generate(*args, temperature=0.0, **kwargs)  # type: ignore[operator]
    return out, torch.stack(seen), any(stepped)


@pytest.mark.parametrize('flags', [{}, MODERN], ids=['plain', 'modern'])
@pytest.mark.parametrize('rows', [1, 8])
@pytest.mark.parametrize('ragged', [False, True])
def test_generation_by_steps_is_generation(
    flags: dict[str, Any], rows: int, ragged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, prompt = model(**flags), prompts(rows, 9)
    lens = torch.arange(9, 9 - rows, -1) if ragged else None
    given = {'prompt_lens': lens}
    tokens, logits, stepped = logits_of(made, True, monkeypatch, prompt, 30, **given)
    want, wanted, general = logits_of(made, False, monkeypatch, prompt, 30, **given)
    assert stepped
    assert not general
    assert torch.equal(tokens, want)
    torch.testing.assert_close(logits, wanted, atol=2e-6, rtol=1e-5)


def test_a_window_moves_over_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    made, prompt = model(**MODERN), prompts(2, 9)
    tokens, logits, stepped = logits_of(made, True, monkeypatch, prompt, 2 * LENGTH)
    want, wanted, _ = logits_of(made, False, monkeypatch, prompt, 2 * LENGTH)
    assert stepped
    assert torch.equal(tokens, want)
    torch.testing.assert_close(logits, wanted, atol=2e-6, rtol=1e-5)


def test_an_encoder_with_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    sides = {'num_tokens': 40, 'depth': 2, 'heads': 4, 'max_seq_len': LENGTH, 'attn_dim_head': 8}
    made = XTransformer(dim=32, **{f'{side}_{name}': value for side in ('enc', 'dec') for name, value in sides.items()}).eval()
    source, mask = prompts(2, 7), torch.arange(7) < torch.tensor([[7], [4]])
    start = torch.ones(2, 1, dtype=torch.long)
    tokens, logits, stepped = logits_of(made, True, monkeypatch, source, start, 20, mask=mask)
    want, wanted, _ = logits_of(made, False, monkeypatch, source, start, 20, mask=mask)
    assert stepped
    assert torch.equal(tokens, want)
    torch.testing.assert_close(logits, wanted, atol=2e-6, rtol=1e-5)


def test_memory_grows_when_more_follows_than_was_expected() -> None:
    made = model().net
    ids = prompts(2, 40)
    full = made(ids)
    with torch.no_grad():
        cache = made(ids[:, :4], return_intermediates=True)[1].kv_cache
        stepper = Stepper(made, cache, room=1)
        for at in range(4, 40):
            torch.testing.assert_close(stepper.read(ids[:, at : at + 1]), full[:, at : at + 1], atol=2e-6, rtol=1e-5)
    assert cache.retained == 4


@pytest.mark.parametrize(
    'flags', [{}, {'ff_glu': True}, {'ff_relu_squared': True, 'ff_no_bias': True}, {'ff_post_act_ln': True}]
)
def test_a_feed_forward_with_tokens_as_columns(flags: dict[str, Any]) -> None:
    feedforward = model(**flags).net.attn_layers.layers[1].inside
    step, x = FeedForwardStep(feedforward), torch.randn(COLUMNS_PAY.start, 1, 32)
    assert step.in_columns == ('ff_post_act_ln' not in flags)
    torch.testing.assert_close(step(x, None), feedforward(x), atol=2e-6, rtol=1e-5)  # type: ignore[arg-type]


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ('flags', 'named'),
    [
        ({'shift_tokens': 1}, 'shift_tokens'),
        ({'attn_use_latent_kv': True, 'attn_dim_latent_kv': 8}, 'attn_use_latent_kv'),
        ({'attn_num_mem_kv': 2, 'attn_max_attend_past': 4}, 'attn_max_attend_past'),
        ({'attn_add_zero_kv': True, 'attn_softclamp_logits': True}, 'attn_add_zero_kv'),
    ],
)
def test_refusals_name_the_flag(flags: dict[str, Any], named: str) -> None:
    assert any(named in reason for reason in refusals(model(**flags).net))


def test_what_is_so_now_is_asked_too() -> None:
    net = model().net
    assert refusals(net) == []
    assert refusals(net, {'mask': torch.ones(1, 3, dtype=torch.bool)}) == ['mask was given']
    with use_kernel('reference'):
        assert refusals(net) == ['a kernel is forced']
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert refusals(net) == ['autocast is on']
    assert refusals(net.train()) == ['the model is in training mode']


def test_whoever_listens_hears_the_general_way() -> None:
    made = model()
    heard: list[int] = []
    made.net.attn_layers.register_forward_hook(lambda *_: heard.append(1))
    made.generate(prompts(1, 3), 12)
    assert len(heard) == 12


def test_a_profile_shows_the_rooms_of_the_general_way() -> None:
    net = model().net
    with annotate(net):
        assert len(refusals(net)) == 1
    assert refusals(net) == []


def test_a_part_of_the_users_own_is_not_bypassed() -> None:
    class Other(type(model().net.attn_layers)):  # type: ignore[misc]
        def run(self, *args: Any, **kwargs: Any) -> Any:
            return super().run(*args, **kwargs)

    net = TransformerWrapper(num_tokens=40, max_seq_len=LENGTH, attn_layers=Other(dim=32, depth=1, heads=4)).eval()
    assert len(refusals(net)) == 1


# ---------------------------------------------------------------- compiled


@pytest.mark.parametrize(
    ('flags', 'reason'),
    [
        ({'alibi_pos_bias': True}, 'a bias of positions'),
        ({'attn_sigmoid': True}, 'changed scores'),
        ({'shift_tokens': 1}, 'shift'),
    ],
)
def test_a_program_that_cannot_be_had_is_refused_by_name(flags: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=f'compile=True cannot be had with: .*{reason}'):
        model(**flags).generate(prompts(1, 3), 4, compile=True)


@pytest.mark.parametrize(('more', 'named'), [({'cache_kv': False}, 'cache_kv=False'), ({'prompt_lookup': 2}, 'speculative')])
def test_a_program_needs_single_steps_behind_a_cache(more: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        model().generate(prompts(1, 3), 4, compile=True, **more)


def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same graph without code generation: fast to make, and it fails on the same breaks."""
    compiler = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda fn, options=None, **rest: compiler(fn, backend='eager', **rest))


@pytest.mark.parametrize(
    'flags',
    [
        {},
        MODERN,
        {'attn_num_mem_kv': 2},
        {'attn_add_zero_kv': True},
        {**MODERN, 'attn_max_attend_past': 4},
        {'num_residual_streams': 2},
    ],
    ids=str,
)
@pytest.mark.parametrize('rows', [1, 2])
def test_one_program_serves_many_texts(flags: dict[str, Any], rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    eager(monkeypatch)
    made, programs = model(depth=1, **flags), []
    for length in (5, 9):
        prompt = prompts(rows, length)
        assert torch.equal(made.generate(prompt, 20, temperature=0.0, compile=True), made.generate(prompt, 20, temperature=0.0))
        assert made._programs is not None
        programs.append(*made._programs.kept.values())
    assert programs[0] is programs[1]


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('width', [1, 3, 8, 11])
@pytest.mark.parametrize('shape', [(1, 1, 6), (6,), (2, 1, 6)])
def test_a_linear_map_of_one_row_is_a_sum_over_rows_of_the_weights(bias: bool, width: int, shape: tuple[int, ...]) -> None:
    linear, x = nn.Linear(6, width, bias=bias), torch.randn(*shape)
    products = Counter()
    with torch.no_grad(), products, OneRow():
        out = linear(x)
    assert products.matrix == (0 if x.numel() == 6 else 1)
    torch.testing.assert_close(out, linear(x))


class Counter(TorchDispatchMode):
    """How many matrix products the library is asked for."""

    matrix = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.matrix += func.overloadpacket in (torch.ops.aten.addmm, torch.ops.aten.mm, torch.ops.aten.linear)
        return func(*args, **(kwargs or {}))


def test_a_program_for_padded_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    eager(monkeypatch)
    made = model(depth=1)
    for lens in ([9, 4], [2, 9]):
        given = {'prompt_lens': torch.tensor(lens), 'temperature': 0.0}
        assert torch.equal(made.generate(prompts(2, 9), 20, compile=True, **given), made.generate(prompts(2, 9), 20, **given))


def test_a_program_sees_weights_that_have_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    eager(monkeypatch)
    made, prompt = model(depth=1), prompts(2, 6)
    made.generate(prompt, 20, temperature=0.0, compile=True)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += torch.randn_like(parameter)
    assert torch.equal(made.generate(prompt, 20, temperature=0.0, compile=True), made.generate(prompt, 20, temperature=0.0))
    assert made._programs is not None
    assert len(made._programs.kept) == 1


@pytest.mark.parametrize('wrapper', [{'num_memory_tokens': 2}, {'use_cls_token': True}])
def test_a_model_without_a_cache_cannot_be_compiled_for_steps(wrapper: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f'compile=True cannot be had with: {next(iter(wrapper))}'):
        model(wrapper).generate(prompts(1, 3), 4, compile=True)


def test_programs_do_not_crowd_each_other_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler keeps only a few programs of one function."""
    eager(monkeypatch)
    made = model(depth=1)
    for rows in range(1, 12):
        made.generate(prompts(rows, 4), 3, compile=True)
    assert made._programs is not None
    assert len(made._programs.kept) == Programs.KEPT


def test_programs_are_not_copied_with_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    eager(monkeypatch)
    made = model(depth=1)
    made.generate(prompts(1, 4), 3, compile=True)
    assert made._programs is not None
    assert copy.deepcopy(made)._programs is None
    assert pickle.loads(pickle.dumps(made))._programs is None


@pytest.mark.deep
@pytest.mark.filterwarnings('ignore')
def test_compiled_code_reads_the_same() -> None:
    for flags, rows in itertools.product(({}, MODERN), (1, 2)):
        made = model(depth=1, **flags)
        cache = made.net(prompts(rows, 6), return_intermediates=True)[1].kv_cache
        with torch.no_grad():
            compiled, plain = CompiledStepper(made.net, cache, room=58), Stepper(made.net, cache, room=58)
            for at in range(8):
                new = prompts(rows, 20)[:, at : at + 1]
                torch.testing.assert_close(compiled.read(new), plain.read(new), atol=1e-5, rtol=1e-5)


def test_texts_that_are_written_at_the_same_time_have_a_program_each(monkeypatch: pytest.MonkeyPatch) -> None:
    eager(monkeypatch)
    made, one, other = model(depth=1), prompts(1, 5), prompts(2, 5)[1:]
    given: dict[str, Any] = {'temperature': 0.0, 'compile': True}
    stream = made.stream(one, 12, **given)
    tokens = [next(stream)]
    second = made.generate(other, 12, **given)
    tokens += list(stream)
    assert torch.equal(torch.stack(tokens, -1), made.generate(one, 12, temperature=0.0))
    assert torch.equal(second, made.generate(other, 12, temperature=0.0))


def test_a_program_made_in_inference_mode_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    eager(monkeypatch)
    made, prompt = model(depth=1), prompts(1, 5)
    with torch.inference_mode():
        inside = made.generate(prompt, 12, temperature=0.0, compile=True)
    assert torch.equal(made.generate(prompt, 12, temperature=0.0, compile=True), inside)


def test_a_zero_key_beside_a_bias_of_positions_takes_the_general_way() -> None:
    net = model(attn_add_zero_kv=True, alibi_pos_bias=True).net
    assert refusals(net) == ['attn_add_zero_kv with cross attention or a bias of positions']
