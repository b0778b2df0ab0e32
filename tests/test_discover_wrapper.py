"""Tensor product probes and their roles."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from x_transformers import Decoder, TransformerWrapper
from x_transformers.discover_wrapper import SCHEMES, DiscoverDecoder, TPREncoder, num_roles_for_scheme, role_ids_for_tokens

ROWS = torch.tensor([[1, 4, 2, 0], [2, 2, 0, 0], [3, 0, 0, 0]])
LENS = torch.tensor([4, 2, 1])


def expected(scheme: str, row: list[int], place: int) -> int:
    last = len(row) - 1
    if scheme == 'left_to_right':
        return place
    if scheme == 'right_to_left':
        return last - place
    if scheme == 'bidirectional':
        a, b = last - place, place
        return (a + b) * (a + b + 1) // 2 + b
    before, behind = ([5, *row, 5][place], [5, *row, 5][place + 2])
    return before * 6 + behind if scheme == 'wickel' else 0


@pytest.mark.parametrize('scheme', SCHEMES)
def test_roles(scheme: str) -> None:
    told = role_ids_for_tokens(ROWS, LENS, scheme, max_seq_len=4, num_fillers=5)
    assert told.max() < num_roles_for_scheme(scheme, 4, 5)
    for row, length, roles in zip(ROWS.tolist(), LENS.tolist(), told.tolist(), strict=True):
        assert roles[:length] == [expected(scheme, row[:length], place) for place in range(length)]
        assert roles[length:] == [0] * (4 - length)


def test_unknown_schemes_and_long_rows_are_refused() -> None:
    with pytest.raises(ValueError, match='scheme must be one of'):
        num_roles_for_scheme('middle_out', 4, 5)
    with pytest.raises(ValueError, match='max_seq_len=3'):
        role_ids_for_tokens(ROWS, LENS, 'left_to_right', max_seq_len=3, num_fillers=5)


def test_state_is_the_sum_of_bound_pairs() -> None:
    probe = TPREncoder(dim=6, num_fillers=5, num_roles=4, filler_dim=3, role_dim=2, mlp_dim=7)
    for parameter in probe.parameters():
        nn.init.normal_(parameter)
    roles, mask = torch.randint(4, (3, 4)), torch.arange(4) < LENS[:, None]
    told = probe.state(ROWS, roles, mask)
    for b in range(3):
        total = probe.bias.clone()
        for n in range(int(LENS[b])):
            pair = torch.outer(probe.filler_emb.weight[ROWS[b, n]], probe.role_emb.weight[roles[b, n]])
            total = total + (probe.binding * pair).sum(dim=(1, 2))
        assert torch.allclose(told[b], total, atol=1e-5)
    assert torch.allclose(probe(ROWS, roles, mask), probe.mlp(told), atol=1e-6)


def test_a_probe_fits_what_is_a_tensor_product() -> None:
    truth = TPREncoder(dim=6, num_fillers=5, num_roles=4, filler_dim=3, role_dim=3)
    for parameter in truth.parameters():
        nn.init.normal_(parameter, std=0.5)
    words, roles = torch.randint(5, (512, 4)), torch.arange(4).expand(512, -1)
    probe = TPREncoder(dim=6, num_fillers=5, num_roles=4)
    before = (probe(words, roles) - truth(words, roles)).square().mean()
    after = probe.fit(words, roles, truth(words, roles), steps=300, batch_size=256)
    assert after < 0.1 * before.item()


def model() -> DiscoverDecoder:
    layers = Decoder(dim=8, depth=1, heads=2, attn_dim_head=4, rotary_pos_emb=True, verbose=False)
    net = TransformerWrapper(num_tokens=12, max_seq_len=16, attn_layers=layers)
    return DiscoverDecoder(decoder=net, num_fillers=10, bos_id=10, pad_id=11, max_seq_len=6).eval()


def test_an_encoding_is_the_embedding_of_the_last_token() -> None:
    made, words = model(), torch.randint(10, (3, 5))
    mask = torch.arange(5) < torch.tensor([5, 2, 3])[:, None]
    embeds: Tensor = made.decoder(words, mask=mask, return_embeddings=True)
    assert torch.equal(made.encode(words, mask), torch.stack((embeds[0, 4], embeds[1, 1], embeds[2, 2])))


def test_decoding_agrees_with_teaching() -> None:
    made, encodings = model(), torch.randn(3, 8)
    lens = torch.tensor([4, 2, 6])
    written = made.decode(encodings, lens)
    assert written.shape == (3, 6)
    assert all((row[length:] == 11).all() for row, length in zip(written, lens, strict=True))
    whole = made.decode(encodings)
    assert torch.equal(made.teach(encodings, whole).argmax(-1), whole)


def test_surgery_adds_the_difference_of_readouts() -> None:
    made, encodings = model(), torch.randn(2, 8)
    probe = TPREncoder(dim=8, num_fillers=10, num_roles=6)
    nn.init.normal_(probe.binding)
    old, new, roles = torch.randint(10, (2, 4)), torch.randint(10, (2, 4)), torch.arange(4).expand(2, -1)
    told = made.surgery(encodings, probe, (old, roles), (new, roles))
    assert torch.equal(told, made.decode(encodings + probe(new, roles) - probe(old, roles)))
