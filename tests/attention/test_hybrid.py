from __future__ import annotations

import pytest
import torch
from torch import nn

from x_transformers.attention.attention import Attention
from x_transformers.attention.hybrid import FoldAxially

B, N, D, H, W, E = 2, 7, 12, 2, 6, 4


class RunningMean(nn.Module):
    """Causal, without a state: the mean of all tokens so far."""

    def __init__(self, dim, dim_out):
        super().__init__()
        self.proj = nn.Linear(dim, dim_out)

    def forward(self, x):
        return self.proj(x).cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]


def hybrid(module, **flags):
    torch.manual_seed(0)
    return Attention(D, heads=H, dim_head=W, value_dim_head=E, hybrid_module=module, **flags)


MODULES = {
    'gru': lambda: nn.GRU(D, H * E, batch_first=True),
    'lstm': lambda: nn.LSTM(D, H * E, batch_first=True),
    'linear': lambda: nn.Linear(D, H * E),
    'stateless': lambda: RunningMean(D, H * E),
}


def test_tokens_are_dealt_to_sequences_and_back():
    class Positions(nn.Module):
        def forward(self, x, mask=None):
            assert mask is None or mask.shape == x.shape[:2]
            return x + 100 * torch.arange(x.shape[1])[:, None], x

    x = torch.arange(14.0).reshape(2, 7, 1)
    out, hidden = FoldAxially(3, Positions())(x, mask=torch.ones(2, 7, dtype=torch.bool))
    assert hidden.shape == (6, 3, 1)
    assert hidden[1, :, 0].tolist() == [1, 4, 0]
    for n in range(7):
        assert out[1, n, 0] == x[1, n, 0] + 100 * (n // 3)


@pytest.mark.parametrize('mix', [False, True])
def test_output_is_a_mixture_of_normed_heads(mix):
    given = nn.GRU(D, H * E, batch_first=True)
    attn = hybrid(given, hybrid_learned_mix=mix)
    assert attn.hybrid_module is not given
    for p in attn.parameters():
        nn.init.normal_(p)
    x = torch.randn(B, N, D)
    out, inter = attn(x, return_intermediates=True)
    other, hidden = attn.hybrid_module(x)
    v = attn.to_v(x).unflatten(-1, (H, E)).transpose(1, 2)
    branches = [inter.post_softmax_attn @ v, other.unflatten(-1, (H, E)).transpose(1, 2)]
    branches = [t / t.norm(dim=-1, keepdim=True) * E**0.5 for t in branches]
    a, b = (t * (norm.gamma + 1) for t, norm in zip(branches, attn.hybrid_norms, strict=True))
    share = attn.hybrid_mix(x).sigmoid().transpose(1, 2)[..., None] if mix else 0.5
    expected = ((1 - share) * a + share * b).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out, attn.to_out(expected), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(inter.hybrid_hidden, hidden)


@pytest.mark.parametrize('name', MODULES)
@pytest.mark.parametrize('fold', [None, 1, 3])
def test_cached_equals_full(name, fold):
    attn = hybrid(MODULES[name](), hybrid_fold_axial_dim=fold, causal=True)
    x, cache, outs = torch.randn(B, N, D), None, []
    for start, end in ((0, 3), (3, 4), (4, 7)):
        out, cache = attn(x[:, start:end], cache=cache, return_intermediates=True)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), attn(x))


def test_states_are_reordered_with_the_cache():
    attn = hybrid(MODULES['gru'](), causal=True)
    x = torch.randn(B, N, D)
    _, cache = attn(x[:, :4], return_intermediates=True)
    cache.cache = cache.cache.reordered(torch.tensor([1, 0]))
    torch.testing.assert_close(attn(x[:, 4:].flip(0), cache=cache), attn(x)[:, 4:].flip(0))


def test_names_in_checkpoints():
    plain = hybrid(MODULES['gru'](), hybrid_learned_mix=True).state_dict()
    folded = hybrid(MODULES['gru'](), hybrid_fold_axial_dim=1).state_dict()
    assert 'hybrid_module.weight_ih_l0' in plain
    assert 'hybrid_module.fn.weight_ih_l0' in folded
    assert plain['hybrid_mix.weight'].shape == (H, D)
    assert plain['hybrid_norms.0.gamma'].shape == plain['hybrid_norms.1.gamma'].shape == (H, 1, E)


class Masked(nn.Linear):
    seen = None

    def forward(self, x, keep='nothing'):
        Masked.seen = keep
        return super().forward(x)


@pytest.mark.parametrize('causal', [False, True])
def test_padding_mask_is_handed_on_unless_causal(causal):
    attn = hybrid(Masked(D, H * E), hybrid_mask_kwarg='keep', causal=causal)
    mask = torch.ones(B, N, dtype=torch.bool)
    attn(torch.randn(B, N, D), mask=mask)
    assert isinstance(Masked.seen, str) if causal else Masked.seen is mask


def test_wrong_width_is_named():
    with pytest.raises(ValueError, match='hybrid_module must return'):
        hybrid(nn.Linear(D, 3))(torch.randn(B, N, D))
