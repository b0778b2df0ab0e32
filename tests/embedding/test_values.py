"""Token tables that add to the values of attentions, as a loop."""

from __future__ import annotations

import pytest
import torch

from tests.laws.combination import shaken
from x_transformers import Decoder, Encoder, TransformerWrapper
from x_transformers.flags.base import FlagError

STACK = {'dim': 8, 'depth': 3, 'heads': 4, 'attn_dim_head': 4, 'attn_kv_heads': 2, 'verbose': False, 'rotary_pos_emb': True}
IDS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])


def made(kind=Decoder, stack=None, **flags):
    net = TransformerWrapper(num_tokens=11, max_seq_len=12, attn_layers=kind(**STACK | (stack or {})), **flags)
    return shaken(net, 0).double().eval()


@pytest.mark.parametrize('kind', [Decoder, Encoder])
def test_values_get_the_row_of_their_token_through_a_gate_per_key_head(kind):
    net = made(kind, value_embed=1, value_embed_gate_dim=3)
    _, record = net(IDS, return_intermediates=True)
    for nth, seen in enumerate(record.attn_intermediates):
        layer, own = net.attn_layers.layers[2 * nth], net.value_embeds[str(2 * nth)]
        x = layer.norms[0](record.hiddens[nth])
        plain = (x @ layer.branch.to_v.weight.T).view(2, 6, 2, 4)
        for row in range(2):
            for token in range(6):
                for head in range(2):
                    gate = 2 * (own.to_gate.weight[head] @ x[row, token, :3]).sigmoid()
                    entry = own.table.weight[IDS[row, token], head * 4 : head * 4 + 4]
                    assert torch.allclose(seen.values[row, head, token], plain[row, token, head] + gate * entry)
        attended = seen.post_softmax_attn @ seen.values[:, [0, 1, 0, 1]]
        written = attended.transpose(1, 2).flatten(2) @ layer.branch.to_out.weight.T
        assert torch.allclose(record.layer_hiddens[2 * nth + 1], record.hiddens[nth] + written)


@pytest.mark.parametrize(('every', 'layers'), [(1, ['0', '2', '4']), (2, ['0', '4']), (3, ['4']), (9, ['4'])])
def test_every_so_many_layers_the_last_among_them(every, layers):
    assert list(made(value_embed=every).value_embeds) == layers


def test_tables_fit_layers_of_different_shape():
    net = made(value_embed=1, stack={'attn_kv_heads': (2, 1, 4), 'attn_value_dim_head': (4, 6, 2)})
    assert [table.table.weight.shape[1] for table in net.value_embeds.values()] == [8, 6, 8]
    assert net(IDS).isfinite().all()


def test_rows_in_front_are_no_tokens():
    net = made(value_embed=1, num_memory_tokens=2)
    front = torch.randn(2, 3, 8, dtype=torch.float64)
    _, record = net(IDS, prepend_embeds=front, return_intermediates=True)
    layer = net.attn_layers.layers[0]
    x = layer.norms[0](record.hiddens[0])
    plain = (x @ layer.branch.to_v.weight.T).view(2, 11, 2, 4).transpose(1, 2)
    values = record.attn_intermediates[0].values
    assert torch.allclose(values[:, :, :5], plain[:, :, :5])
    assert not torch.isclose(values[:, :, 5:], plain[:, :, 5:]).all(dim=-1).any()


def test_the_gate_starts_at_one():
    torch.manual_seed(0)
    net = TransformerWrapper(num_tokens=11, max_seq_len=12, attn_layers=Decoder(**STACK), value_embed=3)
    own = net.value_embeds['4']
    x = torch.randn(2, 6, 8)
    assert torch.equal(own(x, IDS), own.table(IDS).view(2, 6, 2, 4).transpose(1, 2))


def test_what_does_not_fit_is_refused():
    with pytest.raises(FlagError, match='no self attention'):
        made(value_embed=1, stack={'cross_attend': True, 'only_cross': True, 'rotary_pos_emb': False})
    with pytest.raises(FlagError, match='the token that its values'):
        made(value_embed=1, max_mem_len=4)
    stack = Decoder(**STACK)
    with pytest.raises(TypeError, match='value_embeds_and_ids must be a pair'):
        stack(torch.randn(2, 6, 8), value_embeds_and_ids=IDS)
    with pytest.raises(ValueError, match='ids of value_embeds_and_ids must be'):
        stack(torch.randn(2, 6, 8), value_embeds_and_ids=({}, IDS[:, :3]))
