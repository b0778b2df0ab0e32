from __future__ import annotations

import pytest
import torch

from tests.generation.toys import OldToy, Toy
from x_transformers.autoregressive_wrapper import AutoregressiveWrapper, contrastive_decode_fn

PROMPT = torch.tensor([[1, 2, 3], [4, 5, 6]])


def by_hand(expert: Toy, amateurs: list[tuple[Toy, dict]], steps: int) -> torch.Tensor:
    out = PROMPT
    with torch.no_grad():
        for _ in range(steps):
            logits = expert.eval()(out[:, -expert.max_seq_len :])[:, -1]
            for net, options in amateurs:
                logits = contrastive_decode_fn(logits, net.eval()(out[:, -net.max_seq_len :])[:, -1], **options)
            out = torch.cat((out, logits.argmax(-1, keepdim=True)), 1)
    return out[:, 3:]


@pytest.mark.parametrize('cache_kv', [True, False])
@pytest.mark.parametrize('limit', [32, 5])
def test_an_amateur_has_its_own_cache_and_window(cache_kv: bool, limit: int) -> None:
    expert, amateur = Toy(seed=1, limit=9), Toy(seed=2, limit=limit)
    expected = by_hand(expert, [(amateur, {})], 8)
    for given in (amateur, AutoregressiveWrapper(amateur), (amateur,), [amateur], OldToy(amateur)):
        options = [{}] if isinstance(given, (list, tuple)) else {}
        out = AutoregressiveWrapper(expert).generate(
            PROMPT, 8, temperature=0.0, cache_kv=cache_kv, amateur_model=given, contrastive_decode_kwargs=options
        )
        assert torch.equal(out, expected)


def test_several_amateurs_one_after_the_other() -> None:
    expert, nets = Toy(seed=1), [Toy(seed=2), Toy(seed=3)]
    options = ({'alpha': 0.05, 'beta': 0.3}, {'alpha': 0.2, 'beta': 0.8})
    out = AutoregressiveWrapper(expert).generate(
        PROMPT, 6, temperature=0.0, amateur_model=tuple(nets), contrastive_decode_kwargs=options
    )
    assert torch.equal(out, by_hand(expert, list(zip(nets, options, strict=True)), 6))


def test_the_contrast_matters_and_modes_come_back() -> None:
    expert, amateur = Toy(seed=1), Toy(seed=2)
    amateur.dropout.eval()
    model = AutoregressiveWrapper(expert)
    plain = model.generate(PROMPT, 8, temperature=0.0)
    strong = model.generate(
        PROMPT, 8, temperature=0.0, amateur_model=amateur, contrastive_decode_kwargs={'beta': 3.0, 'alpha': 0.01}
    )
    assert not torch.equal(plain, strong)
    assert (amateur.training, amateur.dropout.training, model.training) == (True, False, True)


def test_an_amateur_with_absolute_positions_ends_where_its_cache_does() -> None:
    with pytest.raises(AssertionError, match='the amateur'):
        AutoregressiveWrapper(Toy()).generate(PROMPT, 9, amateur_model=Toy(absolute=True, limit=6))
