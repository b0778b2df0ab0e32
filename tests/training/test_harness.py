"""What a model answers to lm-evaluation-harness, against loops over tokens; and one of its tasks where it is installed."""

from __future__ import annotations

import pytest
import torch

from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper
from x_transformers.training.errors import TrainingError
from x_transformers.training.harness import Answers, for_harness, greedy
from x_transformers.training.tokens import Bytes


@pytest.fixture
def model():
    torch.manual_seed(0)
    layers = Decoder(dim=16, depth=1, heads=2, attn_dim_head=8, rotary_pos_emb=True)
    return AutoregressiveWrapper(TransformerWrapper(num_tokens=256, max_seq_len=8, attn_layers=layers)).eval()


def log_probability(model, seen: bytes, then: int) -> float:
    return float(model.net(torch.tensor([list(seen)]))[0, -1].log_softmax(-1)[then])


@torch.no_grad()
def test_a_continuation(model):
    answers = Answers(model, Bytes())
    value, likeliest = answers.likelihood('ab ', 'cd')
    # the blank belongs to what is asked
    wanted = sum(log_probability(model, b'\nab cd'[:at], b'\nab cd'[at]) for at in (3, 4, 5))
    assert value == pytest.approx(wanted, abs=1e-4)
    assert not likeliest
    best = int(model.net(torch.tensor([list(b'\nab')]))[0, -1].argmax())
    assert answers.scores([*b'\nab', best], 1)[1]
    # of a context that is too long the end is seen
    assert answers.likelihood('x' * 30, 'y')[0] == pytest.approx(log_probability(model, b'x' * 8, ord('y')), abs=1e-4)


@torch.no_grad()
def test_a_whole_text(model):
    text = b'the quick brown fox'
    whole, wanted = b'\n' + text, 0.0
    for at in range(1, len(whole)):
        # windows of 8; the last one reaches back
        begin = 0 if at <= 8 else 8 if at <= 16 else len(whole) - 1 - 8
        wanted += log_probability(model, whole[begin:at], whole[at])
    assert Answers(model, Bytes()).of_text(text.decode()) == pytest.approx(wanted, abs=1e-3)


def test_greedy_texts(model):
    answers = Answers(model, Bytes())
    text = answers.written('ab', [], 5)
    written = model.generate(torch.tensor([list(b'\nab')]), 5, temperature=0.0)[0].tolist()
    assert text == bytes(written).decode(errors='replace')
    assert greedy(answers, 'ab', {'until': text[2], 'max_gen_toks': 5}) == text[: text.index(text[2])]
    with pytest.raises(TrainingError, match='must be greedy'):
        greedy(answers, 'ab', {'do_sample': True})


def test_without_the_package_its_name_is_told(model, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'lm_eval.api.model', None)
    with pytest.raises(TrainingError, match='pip install lm-eval'):
        for_harness(model, Bytes())


@pytest.mark.filterwarnings('ignore')
def test_a_task_of_the_harness(model):
    lm_eval = pytest.importorskip('lm_eval', reason='lm-eval changes the versions of other packages, and is no extra')
    from datasets import Dataset
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.task import ConfigurableTask

    asked = for_harness(model, Bytes())
    assert isinstance(asked, LM)
    request = Instance(request_type='loglikelihood', doc={}, arguments=('ab', 'cd'), idx=0)
    assert asked.loglikelihood([request]) == [Answers(model, Bytes()).likelihood('ab', 'cd')]
    rows = Dataset.from_list([{'question': 'ab', 'options': ['c', 'd'], 'right': 1}] * 4)
    task = ConfigurableTask(config={
        'task': 'two', 'custom_dataset': lambda **_: {'test': rows}, 'output_type': 'multiple_choice', 'test_split': 'test',
        'doc_to_text': '{{question}}', 'doc_to_choice': '{{options}}', 'doc_to_target': '{{right}}', 'target_delimiter': '',
    })  # fmt: skip
    found = lm_eval.simple_evaluate(model=asked, tasks=[task], bootstrap_iters=0)
    answers = Answers(model, Bytes())
    wanted = answers.likelihood('ab', 'd')[0] > answers.likelihood('ab', 'c')[0]
    assert found['results']['two']['acc,none'] == float(wanted)
