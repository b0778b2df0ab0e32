"""Layers that share keys and values, https://arxiv.org/abs/2405.12981."""

from __future__ import annotations

import pytest
import torch

from tests.laws.combination import Combination, shaken
from tests.laws.laws import cache_operations
from x_transformers import AutoregressiveWrapper, Decoder, Encoder, TransformerWrapper
from x_transformers.flags.base import FlagError

SMALL = {'dim': 8, 'depth': 4, 'heads': 2, 'attn_dim_head': 4, 'verbose': False}
X = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
IDS = torch.randint(0, 11, (2, 7), generator=torch.Generator().manual_seed(4))


def made(kind=Decoder, **flags):
    return shaken(kind(**SMALL | flags), 0).double().eval()


@pytest.mark.parametrize('kind', [Decoder, Encoder])
@pytest.mark.parametrize(('every', 'sources'), [(2, [0, 0, 4, 4]), (3, [0, 0, 0, 6])])
def test_a_group_attends_over_the_keys_of_its_first(kind, every, sources):
    stack = made(kind, kv_share_every=every)
    x, held = X, {}
    for nth, source in enumerate(sources):
        attention, ff = stack.layers[2 * nth], stack.layers[2 * nth + 1]
        h = attention.norms[0](x)
        if source == 2 * nth:
            held[source] = [
                linear(h).view(2, 6, 2, 4).transpose(1, 2) for linear in (attention.branch.to_k, attention.branch.to_v)
            ]
        keys, values = held[source]
        q = attention.branch.to_q(h).view(2, 6, 2, 4).transpose(1, 2)
        out = torch.zeros(2, 6, 2, 4, dtype=torch.float64)
        for token in range(6):
            seen = token + 1 if kind is Decoder else 6
            weights = (q[:, :, token, None] * keys[:, :, :seen]).sum(-1).mul(4**-0.5).softmax(dim=-1)
            out[:, token] = (weights.unsqueeze(-1) * values[:, :, :seen]).sum(dim=2)
        x = x + attention.branch.to_out(out.flatten(2))
        x = x + ff.branch(ff.norms[0](x))
    assert torch.allclose(stack(X), stack.final_norm(x))


def test_the_others_have_neither_projections_nor_cache():
    layers = Decoder(**SMALL, kv_share_every=2, rotary_pos_emb=True, attn_qk_norm=True, attn_qk_norm_dim_scale=True)
    net = shaken(TransformerWrapper(num_tokens=11, max_seq_len=16, attn_layers=layers), 0).double().eval()
    names = [name for name, _ in layers.layers[2].named_parameters()]
    assert not [name for name in names if 'to_k' in name or 'to_v' in name or 'k_scale' in name]
    _, seen = net(IDS, return_intermediates=True)
    tapes = {index: set(seen.kv_cache.step(index).tapes) for index in (0, 2, 4, 6)}
    assert tapes[2] == tapes[6] == set()
    assert {'k', 'v'} <= tapes[0]
    plain = TransformerWrapper(num_tokens=11, max_seq_len=16, attn_layers=Decoder(**SMALL, rotary_pos_emb=True)).double()
    _, whole = plain(IDS, return_intermediates=True)
    # half of the keys and values; all layers share the positions
    positions = IDS.shape[-1] * 2 * 8  # an angle for each pair of channels
    assert 2 * (seen.kv_cache.bytes() - positions) == whole.kv_cache.bytes() - positions
    model = AutoregressiveWrapper(net)
    with_it = model.generate(IDS, 6, temperature=0.0)
    assert torch.equal(with_it, model.generate(IDS, 6, temperature=0.0, cache_kv=False))


def test_clipped_queries_bring_the_scores_down():
    stack = made(kv_share_every=2)
    with torch.no_grad():
        stack.layers[2].branch.to_q.weight.mul_(50.0)
    _, seen = stack(X, return_hiddens=True)
    largest = seen.attn_intermediates[1].pre_softmax_attn.amax(dim=(0, 2, 3))
    assert (largest > 1.0).all()
    stack.layers[2].branch.qk_clip_(seen.attn_intermediates[1], tau=1.0)
    keys = stack(X, return_hiddens=True)[1].attn_intermediates[1].pre_softmax_attn.amax(dim=(0, 2, 3))
    assert torch.allclose(keys, torch.ones(2, dtype=torch.float64))
    assert [p.shape for p in stack.layers[2].branch.muon_parameters()] == [torch.Size((8, 8))]


@pytest.mark.parametrize(
    ('flags', 'says'),
    [
        ({'weight_tie_layers': True}, 'each once'),
        ({'layers_execute_order': (0, 1, 2, 3)}, 'each once'),
        ({'layer_dropout': 0.1}, 'cannot be left out'),
        ({'attn_dim_head': (4, 4, 4, 2)}, 'need the same shape'),
        ({'rotary_pos_emb': True, 'rotary_theta': (10.0, 100.0)}, 'need the same shape and positions'),
    ],
)
def test_what_does_not_fit_is_refused(flags, says):
    with pytest.raises(FlagError, match=says):
        Decoder(**SMALL | {'kv_share_every': 2} | flags)


def test_an_order_without_the_first_is_refused():
    with pytest.raises(ValueError, match='which shares its keys and values'):
        made(kv_share_every=2)(X, layers_execute_order=(2, 3))
    with pytest.raises(ValueError, match='shared must hold the keys of the earlier layer'):
        made(kv_share_every=2).layers[2].branch(X)


def test_the_state_of_a_module_beside_shared_keys_is_reordered():
    cache_operations(Combination.parse('decoder+hybrid+kv_share'))
