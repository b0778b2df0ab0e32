"""Layers are called as modules, and anybody's module works in a slot of a layer."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers import Attention, AutoregressiveWrapper, Decoder, FeedForward, TransformerWrapper
from x_transformers.attention.inputs import BranchInputs
from x_transformers.cache.layer_cache import LayerCache
from x_transformers.layers.branch import Scale
from x_transformers.layers.layer import Layer
from x_transformers.layers.residual import Residual
from x_transformers.layers.slots import can_cache
from x_transformers.randomness import decide_alike, happens, whole

SMALL: dict[str, Any] = {'dim': 16, 'depth': 2, 'heads': 2, 'attn_dim_head': 8, 'rotary_pos_emb': True}


def model(**flags: Any) -> TransformerWrapper:
    torch.manual_seed(0)
    return TransformerWrapper(num_tokens=11, max_seq_len=32, attn_layers=Decoder(**{**SMALL, **flags})).eval()


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 11, shape)


class PlainFF(nn.Module):
    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return F.gelu(self.linear(x))


class Mean(nn.Module):
    """Attention's place taken by the mean of all tokens so far."""

    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1) / torch.arange(1, x.shape[1] + 1).unsqueeze(-1)


class CausalConv(nn.Module):
    """A convolution over the last three tokens, which mixes tokens and says so."""

    mixes_tokens = True

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.conv = nn.Conv1d(dim, dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2)


class ConvWithState(nn.Module):
    """The same, with the last two tokens as its state."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.conv = nn.Conv1d(dim, dim, 3)

    def forward(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        before = x.new_zeros(x.shape[0], 2, x.shape[2]) if state is None else state
        whole = torch.cat((before, x), dim=1)
        return self.conv(whole.transpose(1, 2)).transpose(1, 2), whole[:, -2:]


class Around(nn.Module):
    """A module put around a block, which hands on what it is given."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.calls = 0

    def forward(self, x: Tensor, **kwargs: Any) -> Any:
        self.calls += 1
        return self.block(x, **kwargs)


def equal_when_cached(net: TransformerWrapper, batch: int = 2) -> None:
    """Generation and, where there is a cache, token by token."""
    wrapper, prompt = AutoregressiveWrapper(net), ids(batch, 5)
    cached = wrapper.generate(prompt, 6, temperature=0.0)
    assert torch.equal(cached, wrapper.generate(prompt, 6, temperature=0.0, cache_kv=False))
    if not net.can_cache_kv:
        return
    whole, cache, outs = ids(batch, 7), None, []
    for piece in whole.split([3, 1, 2, 1], dim=1):
        out, cache = net(piece, return_intermediates=True, cache=cache, input_not_include_cache=True)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, dim=1), net(whole))


# ---------------------------------------------------------------- hooks


@pytest.mark.parametrize('checkpointing', [False, True])
def test_hooks_fire_once_per_execution(checkpointing: bool) -> None:
    net = model(gradient_checkpointing=checkpointing, sandwich_norm=True, use_layerscale=True).train()
    fired: Counter[str] = Counter()
    for name, module in net.attn_layers.layers.named_modules(prefix='attn_layers.layers'):
        module.register_forward_hook(lambda *_, name=name: fired.update([name]))
        module.register_full_backward_hook(lambda *_, name=name: fired.update([f'backward {name}']))
    net(ids(2, 6)).square().mean().backward()
    for index, layer in enumerate(net.attn_layers.layers):
        path = f'attn_layers.layers.{index}'
        again = 2 if checkpointing else 1
        once, inside = ('', '.0.0', '.0.1', '.2'), ('.1', '.1.fn')
        for name, times in [(path + part, 1) for part in once] + [(path + part, again) for part in inside]:
            assert fired[name] == times, name
            assert fired[f'backward {name}'] == 1, name
        assert isinstance(layer, Layer)


def test_what_a_hook_returns_counts() -> None:
    net, x = model(), ids(1, 4)
    plain = net(x)
    handle = net.attn_layers.layers[1][1].register_forward_hook(lambda module, args, out: torch.zeros_like(out))
    assert not torch.equal(net(x), plain)
    handle.remove()
    assert torch.equal(net(x), plain)


def test_a_subclass_of_a_block_is_called() -> None:
    class Loud(FeedForward):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return 2.0 * super().forward(x, *args, **kwargs)

    class Silent(FeedForward):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros_like(x)

    net, x = model(), ids(1, 4)
    plain = net.attn_layers.layers[1][1]
    seen = []
    plain.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    net(x)
    for kind, times in ((Loud, 2.0), (Silent, 0.0)):
        other = kind(16)
        other.load_state_dict(plain.state_dict())
        net.attn_layers.layers[1][1] = other
        got = []
        other.register_forward_hook(lambda module, args, out, got=got: got.append(out))
        net(x)
        torch.testing.assert_close(got[0], seen[0][1] * times)


# ---------------------------------------------------------------- foreign modules


@pytest.mark.parametrize('checkpointing', [False, True])
@pytest.mark.parametrize('place', ['a', 'f'])
def test_a_foreign_block_is_called_and_learns(checkpointing: bool, place: str) -> None:
    net = model(gradient_checkpointing=checkpointing, macaron=True).train()
    where = net.attn_layers.layer_types.index(place)
    block = PlainFF()
    net.attn_layers.layers[where][1] = block
    net(ids(2, 6)).square().mean().backward()
    assert block.calls == 1 + checkpointing
    assert block.linear.weight.grad is not None
    assert block.linear.weight.grad.abs().sum() > 0


def test_a_foreign_block_inside_a_wrapper() -> None:
    net = model(use_layerscale=True, shift_tokens=1, layerscale_init_value=1.0)
    block = PlainFF()
    net.attn_layers.layers[1][1].fn.fn = block
    equal_when_cached(net)
    assert net.can_cache_kv
    assert block.calls > 0


def test_a_foreign_block_compiles() -> None:
    net, x = model(), ids(1, 5)
    net.attn_layers.layers[0][1], net.attn_layers.layers[1][1] = Mean(), nn.Sequential(nn.Linear(16, 16), nn.GELU())
    want = net(x)
    torch.testing.assert_close(torch.compile(net, backend='eager', fullgraph=True)(x), want)


# torch hides this warning of its own from users, but not from filters that make errors of warnings
@pytest.mark.filterwarnings('ignore:The .grad attribute')
def test_a_layer_compiles_by_itself() -> None:
    net, x = model(), ids(1, 5)
    want, graphs = net(x), []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    for layer in net.attn_layers.layers:
        layer.compile(backend=backend, fullgraph=True)
    torch.testing.assert_close(net(x), want)
    assert graphs


@pytest.mark.parametrize(
    ('place', 'block', 'caches'),
    [
        ('f', PlainFF, True),
        ('f', CausalConv, False),
        ('f', ConvWithState, True),
        ('a', Mean, False),
        ('a', CausalConv, False),
        ('a', ConvWithState, True),
    ],
)
def test_a_foreign_block_decodes_as_in_full(place: str, block: type[nn.Module], caches: bool) -> None:
    net = model()
    assert net.can_cache_kv
    net.attn_layers.layers[net.attn_layers.layer_types.index(place)][1] = block()
    assert net.can_cache_kv == net.attn_layers.can_cache_kv == caches
    equal_when_cached(net)


def test_attention_that_sees_ahead_is_not_decoded_from_a_cache() -> None:
    net, x = model(), ids(1, 4)
    slot = net.attn_layers.layer_types.index('a')
    own = Attention(net.attn_layers.dim, heads=2)
    net.attn_layers.layers[slot][1] = Scale(0.5, own)
    assert not net.can_cache_kv
    with pytest.raises(ValueError, match='not causal'):
        net(ids(1, 6), cache=model()(x, return_intermediates=True)[1])
    own.causal = True
    assert net.can_cache_kv
    equal_when_cached(net)


def test_what_a_block_says_of_itself_later_counts() -> None:
    net = model()
    net.attn_layers.layers[0][1] = block = Mean()
    assert not net.can_cache_kv
    block.mixes_tokens = False
    assert net.can_cache_kv
    net.can_cache_kv = False
    assert not net.can_cache_kv
    assert net.attn_layers.can_cache_kv


@pytest.mark.parametrize('place', ['a', 'f'])
def test_a_module_around_a_block(place: str) -> None:
    net, x = model(), ids(1, 6)
    layer = net.attn_layers.layers[net.attn_layers.layer_types.index(place)]
    want = net(x)
    layer[1] = around = Around(layer[1])
    torch.testing.assert_close(net(x), want)
    assert around.calls == 1
    assert net.can_cache_kv
    equal_when_cached(net)
    # what is inside of it counts
    around.block = CausalConv()
    assert net.can_cache_kv == can_cache(around, place)


def test_foreign_norms_and_residuals() -> None:
    net, x = model(sandwich_norm=True), ids(2, 6)
    layer = net.attn_layers.layers[0]
    layer[0][0], layer[0][1] = nn.LayerNorm(16), nn.RMSNorm(16)
    net(x)
    seen = []
    layer.register_forward_hook(lambda module, args, out: seen.append((args[0], out[0])))
    branch: list[Tensor] = []
    layer[0][1].register_forward_hook(lambda module, args, out: branch.append(out))

    class Half(nn.Module):
        def forward(self, out: Tensor, stream: Tensor) -> Tensor:
            return out + 0.5 * stream

    class Prepared(nn.Module):
        def prepare(self, stream: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
            return stream * 2.0, stream, {'share': 0.25}

        def forward(self, out: Tensor, stream: Tensor, *, share: float) -> Tensor:
            return share * out + stream

    formulas = {
        Half: lambda out, stream: out + 0.5 * stream,
        Prepared: lambda out, stream: 0.25 * out + stream,
        nn.Tanh: lambda out, stream: stream + out.tanh(),
    }
    for kind, formula in formulas.items():
        layer[2] = kind()
        seen.clear(), branch.clear()
        net(x)
        torch.testing.assert_close(seen[0][1], formula(branch[0], seen[0][0]))
        equal_when_cached(net)


def test_attention_takes_what_surrounds_it() -> None:
    attn, x = Attention(16, heads=2, dim_head=8, causal=True), torch.randn(1, 4, 16)
    out, seen = attn(x, around=BranchInputs(past=LayerCache()))
    torch.testing.assert_close(out, attn(x))
    assert seen.cached_kv[0].shape[2] == 4


# ---------------------------------------------------------------- layers exchanged as a whole


class Exchanging(Decoder):
    """Runs other layers in every second call, as subclasses of the original do."""

    def put(self, layers: Any, kinds: tuple[str, ...]) -> None:
        self.layers = layers
        self.layer_types = kinds
        self.layer_dropouts = (0.0,) * len(kinds)


def triple(block: nn.Module) -> nn.ModuleList:
    return nn.ModuleList([nn.ModuleList([nn.LayerNorm(16), None, None]), block, Residual(16)])


@pytest.mark.parametrize('plain_list', [False, True])
def test_layers_are_exchanged_between_calls(plain_list: bool) -> None:
    stack = Exchanging(**SMALL)
    net = TransformerWrapper(num_tokens=11, max_seq_len=32, attn_layers=stack).eval()
    x, before = ids(2, 6), net(ids(2, 6)).shape
    old, old_kinds = stack.layers, stack.layer_types
    blocks = [triple(PlainFF()), triple(Attention(16, heads=2, dim_head=8, causal=True)), triple(nn.Linear(16, 16))]
    if plain_list:
        del stack.layers
        stack.put([list(each) for each in blocks], ('f', 'a', 'f'))
    else:
        stack.put(nn.ModuleList(blocks), ('f', 'a', 'f'))
    assert [step.kind for step in stack.plan.steps()] == ['f', 'a', 'f']
    assert net(x).shape == before
    assert blocks[0][1].calls == 1
    equal_when_cached(net)
    stack.put(nn.ModuleList([triple(Mean()), *blocks]), ('a', 'f', 'a', 'f')) if not plain_list else None
    assert net.can_cache_kv == plain_list
    if plain_list:
        del stack.layers
    stack.put(old, old_kinds)
    assert net.can_cache_kv
    assert len(stack.plan.steps()) == 4


def test_layers_and_their_kinds_must_fit() -> None:
    net = model()
    net.attn_layers.layer_types = ('a', 'f', 'f')
    with pytest.raises(ValueError, match='layer_types must name the kind of each of the 4 layers'):
        net(ids(1, 3))
    lime = model(integrate_layers=True)
    lime.attn_layers.layer_types = ('f', 'a', 'a', 'f')
    with pytest.raises(ValueError, match='integrate_layers'):
        lime(ids(1, 3))


# ---------------------------------------------------------------- what lies outside of layers


@pytest.mark.parametrize('tied', [False, True])
def test_a_head_gives_the_loss_in_its_own_forward(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = TransformerWrapper(num_tokens=11, max_seq_len=32, tie_embedding=tied, attn_layers=Decoder(**SMALL))
    wrapper, x = AutoregressiveWrapper(net), ids(2, 9)
    want = wrapper(x)
    monkeypatch.setattr('x_transformers.autoregressive_wrapper.LARGE_LOGITS', 0)
    shapes: list[tuple[int, ...]] = []
    forward = type(net.to_logits).forward

    def spied(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = forward(self, *args, **kwargs)
        shapes.append(tuple(out.shape))
        return out

    with monkeypatch.context() as patch:
        patch.setattr(type(net.to_logits), 'forward', spied)
        patch.setattr('x_transformers.heads.gives_loss', lambda head: True)
        patch.setattr('x_transformers.transformer_wrapper.gives_loss', lambda head: True)
        torch.testing.assert_close(wrapper(x), want)
    assert shapes == [()]
    # whoever listens to the head gets logits
    heard: list[tuple[int, ...]] = []
    net.to_logits.register_forward_hook(lambda module, args, out: heard.append(tuple(out.shape)))
    torch.testing.assert_close(wrapper(x), want)
    assert [shape[-1] for shape in heard] == [11]


def test_decisions_follow_from_a_seed_and_a_step() -> None:
    def drawn(seed: int | None, step: int = 0) -> list[Any]:
        decide_alike(seed, step)
        return [happens(0.5) for _ in range(20)] + [whole(1, 4) for _ in range(20)]

    random.seed(1)
    try:
        first = drawn(3, 5)
        assert drawn(3, 5) == first
        assert drawn(3, 6) != first
        assert drawn(4, 5) != first
        unasked = drawn(None)
    finally:
        decide_alike(None)
    random.seed(1)
    assert unasked == [random.random() < 0.5 for _ in range(20)] + [random.randint(1, 4) for _ in range(20)]
