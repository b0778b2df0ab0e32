from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.generation.toys import Toy
from x_transformers.xl_autoregressive_wrapper import XLAutoregressiveWrapper


class XLToy(Toy):
    """Memories are the embeddings of the last segment, which are attended to in front of the cached keys."""

    def forward(
        self,
        x: Tensor,
        return_mems: bool = False,
        mems: list[Tensor] | None = None,
        input_not_include_cache: bool = False,
        logits_last: int | None = None,
        **given: Any,
    ) -> Any:
        self.mem = mems[0] if mems else None
        out = super().forward(x, logits_last=logits_last, **given)
        return (out, [self.emb[x].detach()]) if return_mems else out

    def attend(self, h: Tensor, k: Tensor, v: Tensor, *rest: Any, **more: Any) -> Tensor:
        if self.mem is not None:
            k = torch.cat(((self.mem @ self.k)[:, None], k), -2)
            v = torch.cat(((self.mem @ self.v)[:, None], v), -2)
        return super().attend(h, k, v, *rest, **more)


def by_hand(net: XLToy, prompt: list[int], steps: int, mems: list[Tensor] | None = None) -> list[int]:
    """Every token from the memories of the complete segments and the tokens since, all recomputed."""
    net.eval()
    seen, size, incoming = list(prompt), net.max_seq_len, mems
    with torch.no_grad():
        for _ in range(steps):
            carried, first = incoming, 0
            while len(seen) - first > size:
                carried = net(torch.tensor([seen[first : first + size]]), mems=carried, return_mems=True)[1]
                first += size
            seen.append(int(net(torch.tensor([seen[first:]]), mems=carried)[0, -1].argmax()))
    return seen[len(prompt) :]


@pytest.mark.parametrize('length', [1, 3, 4, 5, 8, 9])
@pytest.mark.parametrize('seed', range(3))
def test_generation_across_segments_equals_recomputation(length: int, seed: int) -> None:
    net = XLToy(limit=4, seed=seed)
    prompts = torch.randint(0, 7, (2, length), generator=torch.Generator().manual_seed(seed))
    out = XLAutoregressiveWrapper(net).generate(prompts, 11, temperature=0.0)
    assert out.tolist() == [by_hand(net, row.tolist(), 11) for row in prompts]


def test_within_a_segment_single_tokens_are_fed() -> None:
    net = XLToy(limit=4)
    XLAutoregressiveWrapper(net).generate(torch.tensor([[1, 2]]), 6, temperature=0.0)
    assert net.fed == [2, 1, 4, 1, 1, 1]


def test_generation_goes_on_from_given_memories() -> None:
    net = XLToy(limit=4)
    mems = [torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(0))]
    out = XLAutoregressiveWrapper(net).generate(torch.tensor([1, 2]), 7, temperature=0.0, mems=mems)
    assert out.tolist() == by_hand(net, [1, 2], 7, mems)
    assert out.tolist() != by_hand(net, [1, 2], 7)


def test_ends_axes_and_filters() -> None:
    net = XLToy(limit=4)
    model = XLAutoregressiveWrapper(net, pad_value=0)
    free = model.generate(torch.tensor([[1, 2], [3, 4]]), 9, temperature=0.0)
    eos = int(free[0, 3])
    ended = model.generate(torch.tensor([[[eos, 2]], [[3, 4]]]), 9, temperature=0.0, eos_token=eos)
    assert ended.shape[:2] == (2, 1)
    ended = model.generate(torch.tensor([[1, 2], [3, 4]]), 9, temperature=0.0, eos_token=eos)
    for got, row in zip(ended.tolist(), free.tolist(), strict=True):
        expected = row[: row.index(eos) + 1] if eos in row else row
        assert got == (expected + [0] * 9)[: len(got)]
    assert torch.equal(
        model.generate(torch.tensor([[1, 2], [3, 4]]), 9, filter_logits_fn='top_k', filter_kwargs={'k': 1}), free
    )
    prompts = torch.tensor([[1, 2], [3, 4]])
    assert torch.equal(model.generate(prompts, 2, temperature=0.0, include_prompt=True)[:, :2], prompts)
    assert model.generate(prompts, 0).shape == (2, 0)
    net.train()
    model.generate(prompts, 1)
    assert net.training


@pytest.mark.parametrize('by_count', [False, True])
def test_loss_over_segments(by_count: bool) -> None:
    net = XLToy(limit=3, seed=2).eval()
    x = torch.tensor([[1, 2, 3, -100, -100, -100, -100, 1, 2], [4, 5, 6, 0, -100, -100, -100, 3, -100]])
    loss = XLAutoregressiveWrapper(net, weight_by_valid=by_count)(x)
    inputs, labels, mems, terms, sizes = x[:, :-1].clamp(min=0), x[:, 1:], None, [], []
    for first in range(0, 8, 3):
        part, wanted = inputs[:, first : first + 3], labels[:, first : first + 3]
        logits, mems = net(part, mems=mems, return_mems=True)
        log_probs = logits.log_softmax(-1)
        cells = [-log_probs[b, i, wanted[b, i]] for b in range(2) for i in range(wanted.shape[1]) if wanted[b, i] != -100]
        terms.append(torch.stack(cells) if cells else torch.zeros(0))
        sizes.append(wanted.shape[1])
    if by_count:
        expected = torch.cat(terms).mean()
    else:
        expected = sum(size / 8 * (term.mean() if len(term) else 0) for size, term in zip(sizes, terms, strict=True))
    assert [len(term) for term in terms] == [5, 0, 3]
    assert torch.allclose(loss, expected)
    loss.backward()
    assert net.emb.grad.isfinite().all()


def test_bad_input() -> None:
    class Unbounded(nn.Module):
        max_seq_len = 0

    with pytest.raises(ValueError, match='max_seq_len'):
        XLAutoregressiveWrapper(Unbounded())
    model = XLAutoregressiveWrapper(XLToy(limit=4))
    with pytest.raises(ValueError, match='must have one length'):
        model.generate([torch.tensor([1]), torch.tensor([1, 2])], 3)
    with pytest.raises(ValueError, match='seq_len'):
        model.generate(torch.tensor([1]), -1)
    with pytest.raises(AssertionError, match='filter_logits_fn'):
        model.generate(torch.tensor([1]), 1, filter_logits_fn='no')
    with pytest.raises(ValueError, match='at least two'):
        model(torch.tensor([[1]]))
