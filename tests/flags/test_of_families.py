"""Flags that published models need, each against its formula."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from x_transformers import Attention, AutoregressiveWrapper, Decoder, Encoder, FeedForward, TransformerWrapper
from x_transformers.flags.base import FlagError
from x_transformers.norms import choose_norm, rms_norm


def shaken(module: nn.Module) -> nn.Module:
    """With noise on every parameter, so that nothing is left at a start that hides it."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return module.eval()


# ---------------------------------------------------------------- norms


@pytest.mark.parametrize('kind', ['rmsnorm', 'simple_rmsnorm', 'scalenorm'])
def test_eps_stands_under_the_root_of_the_mean_square(kind):
    norm = shaken(choose_norm(kind, 4, eps=0.5))
    x = torch.tensor([[0.1, -0.2, 0.3, 0.0], [3.0, 1.0, -2.0, 0.5]])
    root = [math.sqrt(sum(v * v for v in row) / 4 + 0.5) for row in x.tolist()]
    wanted = torch.stack([row / r for row, r in zip(x, root, strict=True)])
    torch.testing.assert_close(norm(x), wanted * norm.g if hasattr(norm, 'g') else wanted)


def test_eps_stands_under_the_root_of_the_variance_and_the_bias_is_added():
    norm = shaken(choose_norm('layernorm', 4, eps=0.5, bias=True, unit_offset=True))
    x = torch.randn(3, 4)
    mean = x.sum(-1, keepdim=True) / 4
    variance = ((x - mean) ** 2).sum(-1, keepdim=True) / 4
    torch.testing.assert_close(norm(x), (x - mean) / (variance + 0.5).sqrt() * (1 + norm.gamma) + norm.beta)


@pytest.mark.parametrize('with_gain', [True, False])
def test_gradients_of_the_root_mean_square_with_eps(with_gain):
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    gain = torch.randn(5, dtype=torch.float64, requires_grad=True) if with_gain else None
    given = (x, gain) if with_gain else (x,)
    assert torch.autograd.gradcheck(lambda *t: rms_norm(*t, eps=0.3) if with_gain else rms_norm(t[0], None, 0.3), given)
    assert torch.autograd.gradgradcheck(lambda *t: rms_norm(*t, eps=0.3) if with_gain else rms_norm(t[0], None, 0.3), given)


def test_a_stack_tells_all_its_norms_and_that_of_the_embeddings():
    model = TransformerWrapper(
        num_tokens=5,
        max_seq_len=4,
        post_emb_norm=True,
        attn_layers=Decoder(dim=8, depth=1, heads=2, norm_eps=0.25, norm_bias=True, sandwich_norm=True),
    )
    norms = [module for module in model.modules() if type(module).__name__ == 'LayerNorm']
    assert len(norms) == 2 * 2 + 1 + 1
    assert all(norm.eps == 0.25 and norm.beta is not None for norm in norms)
    with pytest.raises(FlagError, match='only layer norms have a bias'):
        Decoder(dim=8, depth=1, use_rmsnorm=True, norm_bias=True)
    with pytest.raises(FlagError, match='no root'):
        Decoder(dim=8, depth=1, use_derf=True, norm_eps=1e-6)


# ---------------------------------------------------------------- attention


def test_biases_of_projections_by_formula():
    attention = shaken(Attention(6, heads=2, dim_head=3, qkv_bias=('q', 'v'), out_bias=True, scale=0.7))
    assert attention.to_k.bias is None
    x = torch.randn(1, 4, 6)
    q, k, v = (to(x).view(4, 2, 3) for to in (attention.to_q, attention.to_k, attention.to_v))
    rows = []
    for i in range(4):
        heads = []
        for h in range(2):
            weights = torch.stack([q[i, h] @ k[j, h] * 0.7 for j in range(4)]).softmax(0)
            heads.append(sum(weights[j] * v[j, h] for j in range(4)))
        rows.append(attention.to_out.weight @ torch.cat(heads) + attention.to_out.bias)
    torch.testing.assert_close(attention(x)[0], torch.stack(rows))
    torch.testing.assert_close(attention.to_q(x), F.linear(x, attention.to_q.weight) + attention.to_q.bias)


def test_all_projections_have_biases_with_true_and_none_by_default():
    for given, has in ((True, 'qkv'), (False, ''), (('k',), 'k'), ('qv', 'qv')):
        attention = Attention(6, heads=2, dim_head=3, qkv_bias=given)
        assert ''.join(name for name in 'qkv' if getattr(attention, f'to_{name}').bias is not None) == has
    with pytest.raises(FlagError, match="called 'q', 'k' and 'v'"):
        Attention(6, heads=2, dim_head=3, qkv_bias=('o',))


def test_clipping_shrinks_biases_too():
    torch.manual_seed(0)
    attention = shaken(Attention(6, heads=2, dim_head=3, qkv_bias=True))
    x = torch.randn(2, 5, 6) * 4
    _, seen = attention(x, return_intermediates=True)
    before = seen.pre_softmax_attn.detach().amax(dim=(0, 2, 3))
    tau = float(before.min()) / 2
    attention.qk_clip_(seen, tau=tau)
    _, seen = attention(x, return_intermediates=True)
    torch.testing.assert_close(seen.pre_softmax_attn.detach().amax(dim=(0, 2, 3)), torch.full((2,), tau))


@pytest.mark.parametrize('kv_heads', [2, 1])
def test_one_gain_for_all_heads_and_eps_of_the_heads_norm(kv_heads):
    attention = shaken(
        Attention(
            6, heads=2, dim_head=3, kv_heads=kv_heads, qk_norm=True, qk_norm_dim_scale=True, qk_norm_shared_gain=True,
            qk_norm_eps=0.2, qk_norm_scale=1.5,
        )
    )  # fmt: skip
    assert attention.qk_norm_q_scale.shape == attention.qk_norm_k_scale.shape == (1, 1, 3)
    x = torch.randn(1, 4, 6)
    _, seen = attention(x, return_intermediates=True)

    def normed(t, gain):
        return t / math.sqrt(sum(v * v for v in t.detach().tolist()) + 3 * 0.2) * gain.flatten()

    q, k = attention.to_q(x).view(4, 2, 3), attention.to_k(x).view(4, kv_heads, 3)
    for h in range(2):
        for i in range(4):
            for j in range(4):
                left = normed(q[i, h], attention.qk_norm_q_scale)
                right = normed(k[j, h % kv_heads], attention.qk_norm_k_scale)
                torch.testing.assert_close(seen.pre_softmax_attn[0, h, i, j], left @ right * 1.5)


@pytest.mark.parametrize('kv_heads', [2, 1])
@pytest.mark.parametrize('eps', [0.2, None])
def test_one_norm_over_all_heads(kv_heads, eps):
    """https://arxiv.org/abs/2501.00656: queries, and keys, of a token are normed before they are heads."""
    attention = shaken(
        Attention(
            6, heads=2, dim_head=3, kv_heads=kv_heads, qk_norm=True, qk_norm_dim_scale=True, qk_norm_over_heads=True,
            qk_norm_eps=eps, qk_norm_scale=1.5, num_mem_kv=1,
        )
    )  # fmt: skip
    x = torch.randn(1, 4, 6)
    _, seen = attention(x, return_intermediates=True)

    def normed(token, gains):
        length = math.sqrt(sum(v * v for head in token.tolist() for v in head) + token.numel() * (eps or 0.0))
        return [head / length * gain for head, gain in zip(token, gains.flatten(1), strict=True)]

    keys = [attention.mem_k[:, 0], *attention.to_k(x).view(4, kv_heads, 3)]
    for i, query in enumerate(attention.to_q(x).view(4, 2, 3)):
        for j, key in enumerate(keys):
            left, right = normed(query, attention.qk_norm_q_scale), normed(key, attention.qk_norm_k_scale)
            for h in range(2):
                torch.testing.assert_close(seen.pre_softmax_attn[0, h, i, j], left[h] @ right[h % kv_heads] * 1.5)
    with pytest.raises(FlagError, match='one norms all heads at once'):
        Attention(6, heads=2, dim_head=6, qk_norm=True, qk_norm_groups=2, qk_norm_over_heads=True)


def test_a_factor_beside_cosine_similarities_is_refused():
    with pytest.raises(FlagError, match='Give `attn_qk_norm_scale`'):
        Decoder(dim=8, depth=1, attn_scale=0.5, attn_qk_norm=True)


# ---------------------------------------------------------------- feed-forward


def test_hidden_width_and_bias_of_the_gate():
    forward = FeedForward(6, glu=True, glu_bias=False, dim_inner=7, no_bias=True, swish=True)
    assert [tuple(p.shape) for p in forward.parameters()] == [(14, 6), (6, 7)]
    x = torch.randn(2, 6)
    up, gate = F.linear(x, forward.ff[0].proj.weight).split(7, dim=-1)
    torch.testing.assert_close(forward(x), F.linear(up * gate * torch.sigmoid(gate), forward.ff[-1].weight))
    with pytest.raises(FlagError, match='how wide the hidden layer is'):
        FeedForward(6, mult=2, dim_inner=7)


@pytest.mark.parametrize(
    ('name', 'formula'),
    [
        ('relu', lambda x: max(x, 0.0)),
        ('gelu', lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2)))),
        ('gelu_tanh', lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
        ('quick_gelu', lambda x: x / (1 + math.exp(-1.702 * x))),
        ('silu', lambda x: x / (1 + math.exp(-x))),
    ],
)
def test_activations_by_name(name, formula):
    forward = FeedForward(3, custom_activation=name)
    values = [-2.0, -0.3, 0.0, 0.7, 3.0]
    torch.testing.assert_close(forward.ff[0][1](torch.tensor(values)), torch.tensor([formula(v) for v in values]))


def test_an_unknown_activation_is_refused():
    with pytest.raises(FlagError, match='the known names are relu'):
        Encoder(dim=8, depth=1, ff_custom_activation='gelu_new')


# ---------------------------------------------------------------- logits


def net(**flags):
    torch.manual_seed(0)
    stack = Decoder(dim=8, depth=1, heads=2, attn_dim_head=4, norm_eps=0.1, norm_bias=True)
    return shaken(TransformerWrapper(num_tokens=11, max_seq_len=16, attn_layers=stack, **flags))


@pytest.mark.parametrize('tied', [True, False])
def test_scale_soft_cap_and_bias_of_logits(tied):
    model = net(tie_embedding=tied, logits_scale=3.0, logits_softcap=2.0, logits_bias=True)
    ids = torch.randint(0, 11, (2, 5))
    h = model(ids, return_embeddings=True)
    weight = model.token_emb.emb.weight if tied else model.to_logits.weight
    raw = (h @ weight.t() + model.to_logits.bias) * 3.0
    torch.testing.assert_close(model(ids), 2.0 * (raw / 2.0).tanh())
    assert 'to_logits.bias' in model.state_dict()


def test_transform_in_front_of_the_logits():
    model = net(logits_transform='gelu', tie_embedding=True)
    ids = torch.randint(0, 11, (2, 5))
    h = model(ids, return_embeddings=True)
    linear, _, norm = model.logits_transform
    inner = F.gelu(F.linear(h, linear.weight, linear.bias))
    wanted = F.layer_norm(inner, (8,), norm.gamma, norm.beta, 0.1) @ model.token_emb.emb.weight.t()
    torch.testing.assert_close(model(ids), wanted)
    assert model.linear_head is None
    assert net(logits_transform='gelu', logits_transform_bias=False).logits_transform[0].bias is None


def test_embeddings_times_a_factor_but_not_positions():
    model, plain = net(embed_scale=3.0, tie_embedding=True), net(tie_embedding=True)
    ids = torch.randint(0, 11, (1, 4))
    seen = [m(ids, return_intermediates=True)[1].initial_embeds for m in (model, plain)]
    vectors = plain.token_emb(ids)
    torch.testing.assert_close(seen[0] - seen[1], 2.0 * vectors)


@pytest.mark.parametrize(
    'flags', [{}, {'logits_softcap': 2.0}, {'logits_scale': 0.5, 'logits_softcap': 2.0, 'logits_bias': True}]
)
def test_the_loss_without_logits_has_factor_and_cap(flags, monkeypatch):
    model = AutoregressiveWrapper(net(**flags))
    model.train()
    ids = torch.randint(0, 11, (3, 9))
    usual = model(ids)
    usual.backward()
    wanted = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    monkeypatch.setattr('x_transformers.autoregressive_wrapper.LARGE_LOGITS', 0)
    chunked = model(ids)
    assert model.net.loss_head is not None
    chunked.backward()
    torch.testing.assert_close(chunked, usual)
    for found, expected in zip([p.grad for p in model.parameters() if p.grad is not None], wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
