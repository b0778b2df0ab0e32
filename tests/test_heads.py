"""From the stack's output to logits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from x_transformers.embedding.token import TokenEmbedding
from x_transformers.heads import (
    HeadForm,
    OutputHeads,
    TiedHead,
    choose_head,
    map_logits,
    mix_softmaxes,
    mixture_modules,
    sigsoftmax,
)


def test_which_head_is_chosen() -> None:
    emb, own = TokenEmbedding(4, 7), nn.Linear(4, 2)
    assert choose_head(4, 7, only_embed=True, tied_to=emb, count=3) is None
    assert isinstance(choose_head(4, 7, tied_to=emb, count=3), TiedHead)
    assert isinstance(choose_head(4, 7, count=3, own=own), OutputHeads)
    assert choose_head(4, 7, own=own) is own
    plain = choose_head(4, 7)
    assert isinstance(plain, nn.Linear)
    assert plain.bias is None
    assert plain.weight.shape == (7, 4)


def test_tied_head_owns_nothing_and_follows_copies() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = TokenEmbedding(4, 7)
            self.head = TiedHead(self.emb)

    model, x = Model(), torch.randn(2, 3, 4)
    assert list(model.state_dict()) == ['emb.emb.weight']
    torch.testing.assert_close(model.head(x), x @ model.emb.emb.weight.t())
    twin = copy.deepcopy(model)
    assert twin.head.weight is twin.emb.emb.weight
    assert twin.head.weight is not model.emb.emb.weight


def test_several_heads_are_a_tuple() -> None:
    heads, x = choose_head(4, 7, count=2), torch.randn(2, 3, 4)
    assert isinstance(heads, OutputHeads)
    out = heads(x)
    assert isinstance(out, tuple)
    torch.testing.assert_close(out[1], heads[1](x))
    assert sorted(heads.state_dict()) == ['0.weight', '1.weight']
    doubled = map_logits(lambda t: 2 * t, out)
    torch.testing.assert_close(doubled[0], 2 * out[0])


def test_sigsoftmax_is_proportional_to_exp_times_sigmoid() -> None:
    z = torch.randn(5, 7)
    weights = z.exp() * z.sigmoid()
    torch.testing.assert_close(sigsoftmax(z).softmax(-1), weights / weights.sum(-1, keepdim=True))


def test_mixture_of_softmaxes() -> None:
    logits, weights = torch.randn(2, 3, 4, 7), torch.randn(2, 3, 4)
    wanted = sum(weights.softmax(-1)[..., k, None] * logits[..., k, :].softmax(-1) for k in range(4))
    assert isinstance(wanted, torch.Tensor)
    got = mix_softmaxes(logits, weights)
    torch.testing.assert_close(got, wanted.log())
    torch.testing.assert_close(got.exp().sum(-1), torch.ones(2, 3))
    assert mix_softmaxes(logits.bfloat16(), weights.bfloat16()).dtype == torch.float32


def test_mixture_modules() -> None:
    project, weigh = mixture_modules(6, 3)
    x = torch.randn(2, 5, 6)
    assert project(x).shape == (2, 5, 3, 6)
    assert weigh(x).shape == (2, 5, 3)
    assert list(project.state_dict()) == ['0.weight']
    torch.testing.assert_close(project(x)[..., 1, :], x @ project.get_parameter('0.weight')[6:12].t())


@pytest.mark.parametrize('count', [1, 2])
def test_form_of_the_logits(count: int) -> None:
    head, x = choose_head(4, 1, count=count), torch.randn(2, 3, 4)
    assert head is not None
    out = HeadForm(sigsoftmax=True, squeeze=True)(head, x, None, {})
    first, raw = (out, head(x)) if count == 1 else (out[0], head(x)[0])
    torch.testing.assert_close(first, sigsoftmax(raw).squeeze(-1))
