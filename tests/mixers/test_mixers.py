"""Mixers: chunks against their recurrent definition, the protocol, and stacks without attention."""

from __future__ import annotations

import sys
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper
from x_transformers.flags.base import FlagError
from x_transformers.mixers import kernels
from x_transformers.mixers.chunks import gated_delta_rule, gated_linear_attention
from x_transformers.mixers.linear import GatedDeltaRule, GatedLinearAttention

B, H, K, V = 2, 3, 4, 5


def delta_by_steps(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """https://arxiv.org/abs/2412.06464, token by token: S_t = S_{t-1} (a (I - b k k^T)) + b v k^T, of values by keys."""
    outs, s = [], state.transpose(-1, -2)
    for t in range(q.shape[2]):
        a, b = log_decay[:, :, t].exp()[..., None, None], beta[:, :, t][..., None, None]
        key, value = k[:, :, t].unsqueeze(-1), v[:, :, t].unsqueeze(-1)
        eye = torch.eye(q.shape[-1], dtype=q.dtype)
        s = s @ (a * (eye - b * key @ key.transpose(-1, -2))) + b * value @ key.transpose(-1, -2)
        outs.append((s @ q[:, :, t].unsqueeze(-1)).squeeze(-1))
    return torch.stack(outs, dim=2), s.transpose(-1, -2)


def gated_by_steps(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """https://arxiv.org/abs/2312.06635, token by token: S_t = diag(a) S_{t-1} + k v^T."""
    outs, s = [], state
    for t in range(q.shape[2]):
        s = log_decay[:, :, t].exp().unsqueeze(-1) * s + k[:, :, t].unsqueeze(-1) @ v[:, :, t].unsqueeze(-2)
        outs.append((q[:, :, t].unsqueeze(-2) @ s).squeeze(-2))
    return torch.stack(outs, dim=2), s


def drawn(n: int, kind: str, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(n)
    q, k, v = (torch.randn(B, H, n, width) for width in (K, K, V))
    state = torch.randn(B, H, K, V)
    if kind == 'delta':
        made = [q, F.normalize(k, dim=-1), v, -2 * torch.rand(B, H, n), torch.rand(B, H, n), state]
    else:
        # far below what exp(-decay) could be held in
        made = [q, k, v, -30 * torch.rand(B, H, n, K) ** 2, state]
    return [t.to(dtype).requires_grad_() for t in made]


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('n', [1, 7, 16, 64, 150])
@pytest.mark.parametrize('kind', ['delta', 'gated'])
def test_chunks_equal_the_recurrence_and_its_gradients(kind: str, n: int, dtype: torch.dtype) -> None:
    chunked, stepped = (gated_delta_rule, delta_by_steps) if kind == 'delta' else (gated_linear_attention, gated_by_steps)
    inputs = drawn(n, kind, dtype)
    got, want = chunked(*inputs), stepped(*inputs)
    tolerance = {'atol': 1e-4, 'rtol': 1e-4} if dtype == torch.float32 else {'atol': 1e-10, 'rtol': 1e-10}
    weights = [torch.randn(t.shape, dtype=dtype) for t in want]
    gradients = [
        torch.autograd.grad(sum((t * w).sum() for t, w in zip(both, weights, strict=True)), inputs) for both in (got, want)
    ]
    for ours, theirs in zip((*got, *gradients[0]), (*want, *gradients[1]), strict=True):
        scale = max(1.0, theirs.abs().max().item())
        torch.testing.assert_close(ours / scale, theirs / scale, **tolerance)


@pytest.mark.parametrize('kind', [GatedDeltaRule, GatedLinearAttention])
@pytest.mark.parametrize('conv', [0, 3])
def test_a_state_goes_on_where_it_ended_and_padding_leaves_it(kind: type[Any], conv: int) -> None:
    torch.manual_seed(0)
    mixer = kind(8, heads=2, dim_head=4, conv=conv).double()
    x = torch.randn(2, 70, 8, dtype=torch.double)
    whole, last = mixer(x)
    state, outs = None, []
    for start, stop in pairwise((0, 3, 4, 40, 41, 70)):
        out, state = mixer(x[:, start:stop], state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, dim=1), whole)
    torch.testing.assert_close(state, last)
    noise = torch.cat((torch.randn(2, 5, 8, dtype=torch.double), x), dim=1)
    padded, after = mixer(noise, mask=torch.arange(75).expand(2, -1) >= 5)
    torch.testing.assert_close(padded[:, 5:], whole)
    torch.testing.assert_close(after, last)


def test_the_delta_rule_is_the_formula_of_its_projections() -> None:
    torch.manual_seed(0)
    mixer = GatedDeltaRule(6, heads=2, dim_head=3, value_dim_head=4, conv=2).double()
    x = torch.randn(1, 9, 6, dtype=torch.double)
    rows = F.linear(x, mixer.to_qkv.weight)
    before = F.pad(rows, (0, 0, 1, 0))[:, :-1]
    rows = F.silu(before * mixer.conv[:, 0] + rows * mixer.conv[:, 1])
    q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in rows.split([6, 6, 8], dim=-1))
    beta = mixer.to_beta(x).sigmoid().transpose(1, 2)
    decay = -(mixer.log_rate.exp() * F.softplus(mixer.to_decay(x) + mixer.decay_bias)).transpose(1, 2)
    out, _ = delta_by_steps(
        F.normalize(q, dim=-1) / 3**0.5, F.normalize(k, dim=-1), v, decay, beta, torch.zeros(1, 2, 3, 4, dtype=torch.double)
    )
    normed = out / out.square().mean(dim=-1, keepdim=True).sqrt()
    want = mixer.to_out(normed.transpose(1, 2).flatten(2) * F.silu(mixer.to_gate(x)))
    torch.testing.assert_close(mixer(x)[0], want, atol=1e-6, rtol=1e-6)
    rates = mixer.log_rate.exp()
    assert ((rates >= 1) & (rates <= 16)).all()
    steps = F.softplus(mixer.decay_bias)
    assert ((steps >= 0.000999) & (steps <= 0.1001)).all()


@pytest.mark.parametrize('kind', [GatedDeltaRule, GatedLinearAttention])
def test_mixers_run_on_the_meta_device(kind: type[nn.Module]) -> None:
    mixer = kind(16, heads=2, dim_head=8).to('meta')
    out, state = mixer(torch.empty(1, 3, 16, device='meta'))
    assert out.is_meta
    assert out.shape == (1, 3, 16)
    assert state['memory'].is_meta


def model(layers: tuple[str, ...] = ('m', 'f', 'm', 'f'), **flags: Any) -> TransformerWrapper:
    torch.manual_seed(0)
    own = {'mixer_kwargs': {'dim_head': 8}} if isinstance(flags.get('mixer', ''), str) else {}
    stack = Decoder(
        **{'dim': 16, 'heads': 2, 'custom_layers': layers, 'mixer': 'gated_delta_rule', 'verbose': False, **own, **flags}
    )
    return TransformerWrapper(num_tokens=20, max_seq_len=64, attn_layers=stack).double().eval()


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 20, shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize('mixer', ['gated_delta_rule', 'gated_linear_attention'])
@pytest.mark.parametrize('layers', [('m', 'f', 'm', 'f'), ('m', 'f', 'm', 'f', 'a', 'f')])
def test_a_cache_goes_on_in_new_tokens_and_in_the_whole(layers: tuple[str, ...], mixer: str) -> None:
    net, x = model(layers, mixer=mixer, rotary_pos_emb=True), ids(2, 12)
    full = net(x)
    for whole in (False, True):
        cache, done = None, 0
        for upto in (4, 5, 9, 12):
            piece = x[:, :upto] if whole or cache is None else x[:, done:upto]
            extra = {} if cache is None else {'cache': cache, 'input_not_include_cache': not whole}
            out, cache = net(piece, return_intermediates=True, **extra)
            torch.testing.assert_close(out[:, done - upto :], full[:, done:upto])
            done = upto
        assert cache.kv_cache.length == 12
    wrapper = AutoregressiveWrapper(net)
    prompts = [x[0, :5], x[1, :3]]
    made = wrapper.generate(prompts, 6, temperature=0.0)
    for row, prompt in enumerate(prompts):
        torch.testing.assert_close(made[row], wrapper.generate(prompt[None], 6, temperature=0.0, cache_kv=False)[0])
    drafted = wrapper.generate(x[:, :5], 6, temperature=0.0, prompt_lookup=1)
    assert torch.equal(drafted, wrapper.generate(x[:, :5], 6, temperature=0.0))


def test_a_state_is_reordered_and_cannot_be_rolled_back() -> None:
    net, x = model(), ids(2, 6)
    _, seen = net(x[:, :4], return_intermediates=True)
    order = torch.tensor([1, 0, 1])
    out, _ = net(x[order, 4:], cache=seen.kv_cache.reorder(order), input_not_include_cache=True, return_intermediates=True)
    torch.testing.assert_close(out, net(x)[order, 4:])
    with pytest.raises(ValueError, match=r'to be rolled back, got a state without history \(state\)'):
        seen.kv_cache.rollback(2)
    with pytest.raises(ValueError, match='mixer, whose state is no tape'):
        AutoregressiveWrapper(net).generate(x, 4, compile=True)


def test_packed_sequences_are_alone() -> None:
    torch.manual_seed(0)
    layers = ('m', 'f', 'm', 'f', 'a', 'f')
    stack = Decoder(
        dim=16,
        heads=2,
        attn_dim_head=8,
        custom_layers=layers,
        mixer=('gated_delta_rule', 'gated_linear_attention'),
        rotary_pos_emb=True,
        attn_flash_pack_seq=True,
    ).double()
    x, starts = torch.randn(1, 9, 16, dtype=torch.double), (0, 3, 4, 9)
    ends = torch.tensor(starts, dtype=torch.int32)
    packed = stack(x, flash_pack_seq_kwargs={'cu_seqlens_q': ends, 'cu_seqlens_k': ends})
    torch.testing.assert_close(packed, torch.cat([stack(x[:, slice(*pair)]) for pair in pairwise(starts)], dim=1))


class NoState(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.map = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.map(x)


class Liar(NoState):
    def forward(self, x: Tensor, state: Tensor | None) -> Tensor:  # type: ignore[override]
        return self.map(x)


class Shorter(NoState):
    def forward(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, None]:  # type: ignore[override]
        return self.map(x)[:, :1], None


class Grown(NoState):
    """One that keeps the protocol only once it is somewhere else."""

    runs = False

    def forward(self, x: Tensor, state: Tensor | None) -> Tensor:  # type: ignore[override]
        if not self.runs:
            raise RuntimeError('no kernel here')
        return self.map(x)


class Deaf(NoState):
    def forward(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        whole = self.map(x).cumsum(dim=1) + (0.0 if state is None else state)
        return whole, whole[:, -1:]


@pytest.mark.parametrize(
    ('flags', 'words'),
    [
        ({'mixer': None}, "what the layers 'm' are is missing"),
        ({'mixer': 'mamba'}, 'the known names are'),
        ({'mixer': NoState}, r'forward\(x, state\)'),
        ({'mixer': Liar}, r'Liar.forward must return \(y, state\)'),
        ({'mixer': Shorter}, r'y of shape \(1, 2, …\)'),
        ({'mixer': lambda dim: 3}, r'forward\(x, state\)'),
        ({'mixer_kwargs': {'speed': 3}}, 'must be made of the width'),
        ({'mixer_kwargs': {'heads': 0}}, 'heads must be a whole number from 1'),
        ({'mixer': ('gated_delta_rule',) * 3}, 'at most one value for each of the 2 mixer layers'),
        ({'custom_layers': ('a', 'f')}, "no layer is a mixer, 'm'"),
    ],
)
def test_refusals(flags: dict[str, Any], words: str) -> None:
    with pytest.raises(FlagError, match=words):
        Decoder(**{'dim': 16, 'heads': 2, 'custom_layers': ('m', 'f', 'm', 'f'), 'mixer': 'gated_delta_rule', **flags})


def test_what_breaks_the_protocol_in_a_call_is_told() -> None:
    net = model(mixer=Grown)
    Grown.runs = True
    with pytest.raises(ValueError, match=r'Grown.forward must return \(y, state\)'):
        net(ids(1, 4))
    Grown.runs = False
    with pytest.raises(ValueError, match='with Deaf, which would remember'):
        model(mixer=Deaf)(ids(2, 4), seq_start_pos=torch.tensor([0, 1]))
    with pytest.raises(FlagError, match='not the state of a mixer'):
        TransformerWrapper(num_tokens=4, max_seq_len=4, max_mem_len=2, attn_layers=model().attn_layers)


def test_half_precision_is_finite() -> None:
    for kind in (GatedDeltaRule, GatedLinearAttention):
        for dtype in (torch.float16, torch.bfloat16):
            torch.manual_seed(0)
            mixer = kind(16, heads=2, dim_head=8).to(dtype)
            x = (30 * torch.randn(2, 90, 16)).to(dtype).requires_grad_()
            out, state = mixer(x)
            assert state['memory'].dtype == torch.float32
            (out.float() / 30).square().mean().backward()
            assert all(p.grad.isfinite().all() for p in (x, *mixer.parameters())), (kind, dtype)  # type: ignore[union-attr]


def test_mixers_start_as_the_stack_says() -> None:
    net = model(zero_init_branch_output=True)
    assert (net.attn_layers.layers[0].inside.to_out.weight == 0).all()
    assert net.attn_layers.layers[0].inside.heads == 2
    assert net.attn_layers.layers[0].inside.to_qkv.weight in set(net.muon_parameters())


def test_kernels_are_given_what_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their layout has heads behind the tokens; in place of the package stands one that computes by our chunks."""

    def delta(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
        assert given['scale'] == 1.0
        assert given['output_final_state']
        g, beta = given['g'].transpose(1, 2), given['beta'].transpose(1, 2)
        out, state = gated_delta_rule(*(t.transpose(1, 2) for t in (q, k, v)), g, beta, given['initial_state'])
        return out.transpose(1, 2), state

    def gated(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
        g = given['g'].transpose(1, 2)
        out, state = gated_linear_attention(*(t.transpose(1, 2) for t in (q, k, v)), g, given['initial_state'])
        return out.transpose(1, 2), state

    called = []
    for name, function, ours in (
        ('gated_delta_rule', 'chunk_gated_delta_rule', delta),
        ('gla', 'chunk_gla', gated),
    ):
        module: Any = ModuleType(f'fla.ops.{name}')
        setattr(module, function, lambda *args, ours=ours, **given: called.append(ours) or ours(*args, **given))
        monkeypatch.setitem(sys.modules, 'fla', ModuleType('fla'))
        monkeypatch.setitem(sys.modules, 'fla.ops', ModuleType('fla.ops'))
        monkeypatch.setitem(sys.modules, f'fla.ops.{name}', module)
    for kind in (GatedDeltaRule, GatedLinearAttention):
        torch.manual_seed(0)
        mixer, x = kind(8, heads=2, dim_head=4), torch.randn(2, 20, 8)
        _, state = mixer(x)
        want = mixer(x, state)
        monkeypatch.setattr(kernels, 'wanted', lambda q: True)
        torch.testing.assert_close(mixer(x, state), want)
        monkeypatch.setattr(kernels, 'wanted', lambda q: False)
    assert called == [delta, gated]
