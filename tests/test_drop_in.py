"""What code written for 2.16.1 does beside calling models: values by position, parts that are hooked, replaced or patched."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.objectives import decoder, ids
from x_transformers import (
    AutoregressiveWrapper,
    ContinuousAutoregressiveWrapper,
    ContinuousTransformerWrapper,
    Decoder,
    Encoder,
    FeedForward,
    TransformerWrapper,
    XValAutoregressiveWrapper,
    XValTransformerWrapper,
)
from x_transformers.attend import Intermediates
from x_transformers.autoregressive_wrapper import identity, top_k
from x_transformers.flags.base import FlagError
from x_transformers.x_transformers import AbsolutePositionalEmbedding

V, N, DIM = 7, 6, 16


def first_attention(net: Any) -> Any:
    return net.attn_layers.layers[0][1]


class Plain(nn.Module):
    """Attention as somebody's own module computes it, by the contract of the original."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal, self.told = causal, []

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, attn_bias: Any = None, prev_attn: Any = None
    ) -> tuple[Tensor, Any]:
        self.told.append((mask, attn_bias, prev_attn))
        sim = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        sim = sim if attn_bias is None else sim + attn_bias
        if self.causal:
            i, j = sim.shape[-2:]
            sim = sim.masked_fill(torch.ones(i, j, dtype=torch.bool).triu(j - i + 1), -1e9)
        sim = sim if mask is None else sim.masked_fill(~mask, -1e9)
        weights = sim.softmax(dim=-1)
        return weights @ v, Intermediates(post_softmax_attn=weights)


# ---------------------------------------------------------------- attention proper


@pytest.mark.parametrize('flags', [{}, {'alibi_pos_bias': True}, {'rotary_pos_emb': True}, {'attn_num_mem_kv': 2}], ids=str)
def test_a_module_in_the_place_of_attend_is_used(flags: dict[str, Any]) -> None:
    net, x = decoder(**flags).eval(), ids(2, N)
    expected, seen = net(x, return_attn=True)
    writer = AutoregressiveWrapper(net)
    text = writer.generate(x, 5, temperature=0.0)
    own = Plain(causal=True)
    first_attention(net).attend = own
    got, maps = net(x, return_attn=True)
    assert torch.allclose(got, expected, atol=1e-5)
    assert torch.allclose(maps[0], seen[0], atol=1e-5)
    assert len(own.told) == 1
    assert own.told[0][1] is None or own.told[0][1].ndim >= 2
    assert torch.equal(writer.generate(x, 5, temperature=0.0), text)


def test_such_a_module_is_told_the_mask() -> None:
    torch.manual_seed(0)
    net = TransformerWrapper(num_tokens=V, max_seq_len=N, attn_layers=Encoder(dim=DIM, depth=1, heads=2)).eval()
    x, mask = ids(2, N), torch.arange(N) < torch.tensor([[N], [3]])
    expected = net(x, mask=mask)
    own = Plain(causal=False)
    first_attention(net).attend = own
    assert torch.allclose(net(x, mask=mask)[mask], expected[mask], atol=1e-5)
    (told, *_), *_ = own.told
    assert torch.equal(told, mask[:, None, None].expand(2, 2, N, N))


def test_such_a_module_cannot_do_what_the_original_does_not_have() -> None:
    layer = first_attention(decoder())
    layer.attend = Plain(causal=True)
    x = torch.randn(2, N, DIM)
    with pytest.raises(ValueError, match='attend must be an Attend to take delta, got a Plain'):
        layer(x, attn_delta=torch.zeros(N, N))


def test_attend_is_called_as_a_module_and_its_hooks_see_the_weights() -> None:
    net, x, seen = decoder().eval(), ids(2, N), []
    expected = net(x, return_attn=True)[1]
    for _, block, _ in net.attn_layers.layers:
        if hasattr(block, 'attend'):
            block.attend.register_forward_hook(lambda _, given, out: seen.append((given[0].shape, out[1].post_softmax_attn)))
    net(x)
    assert [shape for shape, _ in seen] == [(2, 2, N, 8)] * 2
    assert all(torch.allclose(weights, wanted, atol=1e-6) for (_, weights), wanted in zip(seen, expected, strict=True))


@pytest.mark.parametrize('part', ['attention', 'attend', 'feed-forward', 'stack'])
def test_a_patched_forward_is_called(part: str) -> None:
    net, x, calls = decoder(), ids(2, N), []
    expected = net(x)
    module = {
        'attention': first_attention(net),
        'attend': first_attention(net).attend,
        'feed-forward': net.attn_layers.layers[1][1],
        'stack': net.attn_layers,
    }[part]
    original = module.forward
    module.forward = lambda *args, **kwargs: (calls.append(part), original(*args, **kwargs))[1]
    assert torch.equal(net(x), expected)
    assert calls == [part]


# ---------------------------------------------------------------- embeddings


def test_tables_may_be_replaced() -> None:
    net, x = decoder(length=8), ids(1, 12)
    with pytest.raises(ValueError, match='at most max_seq_len=8 tokens'):
        net(x)
    longer = AbsolutePositionalEmbedding(DIM, 20)
    with torch.no_grad():
        longer.emb.weight[:8] = net.pos_emb.emb.weight
    short = net(x[:, :8])
    net.pos_emb = longer
    assert torch.allclose(net(x)[:, :8], short, atol=1e-5)
    with pytest.raises(ValueError, match='at most max_seq_len=20 tokens'):
        net(ids(1, 21))


def test_an_embedding_of_vectors_may_take_the_place_of_the_table() -> None:
    net, x = decoder(), ids(2, N)
    expected, vectors = net(x), net.token_emb(x)
    net.token_emb = nn.Identity()
    assert torch.equal(net(vectors), expected)


@pytest.mark.parametrize('shape', [(DIM,), (1,), (N, DIM), (1, DIM), (1, N, DIM), (2, 1, DIM)], ids=str)
def test_what_is_added_may_have_fewer_axes(shape: tuple[int, ...]) -> None:
    net, x, added = decoder().eval(), ids(2, N), torch.randn(shape)
    assert torch.equal(net(x, sum_embeds=added), net(x, sum_embeds=added.expand(2, N, DIM)))


def test_what_is_added_to_a_text_covers_all_of_it() -> None:
    writer, x = AutoregressiveWrapper(decoder()), ids(2, 3)
    added = torch.randn(7, DIM)
    made = [writer.generate(x, 5, temperature=0.0, sum_embeds=added, cache_kv=cached) for cached in (True, False)]
    assert torch.equal(*made)
    with pytest.raises(ValueError, match=r'sum_embeds must cover the 7 tokens .*, got 3'):
        writer.generate(x, 5, sum_embeds=added[:3])


# ---------------------------------------------------------------- by position


def test_a_feed_forward_takes_its_parameters_by_position() -> None:
    # (dim, dim_out, mult, glu, glu_mult_bias, swish, relu_squared, solu, custom_activation, post_act_ln, dropout, ...)
    torch.manual_seed(0)
    given = FeedForward(DIM, 12, 2, True, True, True, False, False, None, True, 0.0, 0.1, True, False)
    torch.manual_seed(0)
    named = FeedForward(
        DIM, dim_out=12, mult=2, glu=True, glu_mult_bias=True, swish=True, post_act_ln=True, sublayer_dropout=0.1, no_bias=True
    )
    assert list(given.state_dict()) == list(named.state_dict())
    x = torch.randn(2, N, DIM)
    assert torch.equal(given.eval()(x), named.eval()(x))
    with pytest.raises(FlagError, match='at most 11 values must be given by position'):
        FeedForward(DIM, 12, 2, *[False] * 12)
    with pytest.raises(TypeError, match='glu must be given once'):
        FeedForward(DIM, 12, 2, True, glu=True)
    assert 'more' not in inspect.signature(FeedForward).parameters


def test_the_defaults_of_the_original_may_be_written_out() -> None:
    writer, x = AutoregressiveWrapper(decoder()), ids(2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        made = writer.generate(x, 4, None, 0.0, None, top_k, True, None, {}, {'alpha': 0.1, 'beta': 0.5}, True)
        assert torch.equal(made, writer.generate(x, 4, temperature=0.0))
        found = writer.beam_search(x, 4, 2, False, None, 1.0, False, None, identity, True, {}, True)
        assert torch.equal(found, writer.beam_search(x, 4, beams=2))


# ---------------------------------------------------------------- kinds of numbers


def test_numbers_of_an_integer_dtype_are_numbers() -> None:
    torch.manual_seed(0)
    net = XValTransformerWrapper(
        num_tokens=V, max_seq_len=N, numerical_token_id=3, attn_layers=Decoder(dim=DIM, depth=1, heads=2)
    )
    x, numbers = ids(2, N), torch.randint(-4, 5, (2, N))
    x[:, 2] = 3
    for got, expected in zip(net(x, numbers), net(x, numbers.float()), strict=True):
        assert torch.equal(got, expected)
    model = XValAutoregressiveWrapper(net)
    loss = model(x, numbers)
    loss.backward()
    assert torch.equal(loss, model(x, numbers.float()))
    made = model.generate(x, numbers, 3, temperature=0.0)
    assert made.sampled_numbers.is_floating_point()
    with pytest.raises(TypeError, match='x_num must be a tensor of numbers'):
        net(x, numbers > 0)


def test_a_temperature_of_a_net_that_draws_nothing_is_told() -> None:
    frames = ContinuousTransformerWrapper(max_seq_len=N, attn_layers=Decoder(dim=DIM, depth=1, heads=2))
    model, x = ContinuousAutoregressiveWrapper(frames), torch.randn(2, 3, DIM)
    assert torch.equal(model.generate(x, 2, temperature=0.0), model.generate(x, 2))
    with pytest.warns(UserWarning, match='nothing is drawn by a net without probabilistic=True'):
        model.generate(x, 2, 0.7)
    assert F.mse_loss(model.generate(x, 2), model.generate(x, 2)) == 0


@pytest.mark.parametrize('kind', ['bool', 'int', 'numpy.bool_', 'numpy.int64'])
def test_a_switch_is_whatever_is_true_or_false(kind: str) -> None:
    of_numpy = kind.partition('numpy.')[2]
    make: Any = getattr(pytest.importorskip('numpy'), of_numpy) if of_numpy else {'bool': bool, 'int': int}[kind]
    on, off = make(1), make(0)

    def built(switch: Any) -> Decoder:
        torch.manual_seed(0)
        return Decoder(dim=DIM, depth=1, heads=2, use_rmsnorm=switch, ff_glu=switch)

    assert repr(built(on)) == repr(built(True))
    assert built(on).flags == built(True).flags
    assert repr(built(off)) == repr(built(False))
    writer, x = AutoregressiveWrapper(decoder()), ids(2, 3)
    assert torch.equal(writer.generate(x, 3, temperature=0.0, include_prompt=on)[:, :3], x)
    for wrong in (2, -1, 'yes', None, 1.0):
        with pytest.raises(FlagError, match='`use_rmsnorm` must be True or False'):
            built(wrong)
