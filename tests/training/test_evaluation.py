from __future__ import annotations

import math
import random

import pytest
import torch

from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper
from x_transformers.training.documents import Document
from x_transformers.training.errors import DataError
from x_transformers.training.evaluation import evaluate, ratio
from x_transformers.training.tokens import Bytes, train_bpe

CPU = torch.device('cpu')


def model_of(size):
    torch.manual_seed(0)
    layers = Decoder(dim=16, depth=1, heads=2, rotary_pos_emb=True)
    return AutoregressiveWrapper(TransformerWrapper(num_tokens=size, max_seq_len=64, attn_layers=layers)).eval()


def test_the_loss_of_each_document_is_the_models_own():
    model, texts = model_of(256), [b'a document', b'another, longer document', b'x' * 5]
    with torch.no_grad():
        nats = [model(torch.tensor([list(text)])).item() * (len(text) - 1) for text in texts]
    found = evaluate(model, Bytes(), [Document(text) for text in texts], window=64, batch=2, device=CPU)
    total = sum(len(text) - 1 for text in texts)
    assert (found.documents, found.tokens, found.bytes) == (3, total, total)
    assert found.loss.value == pytest.approx(sum(nats) / total, rel=1e-5)
    assert found.perplexity.value == pytest.approx(math.exp(found.loss.value))
    assert found.bits_per_byte.value == pytest.approx(found.loss.value / math.log(2))


def test_windows_predict_every_byte_once_and_prompts_are_only_read():
    model, text = model_of(256), bytes(range(40, 90))
    nats = 0.0
    with torch.no_grad():
        for start in range(0, 49, 7):
            row = torch.tensor([list(text[start : start + 8])])
            nats += model(row).item() * (row.shape[1] - 1)
        whole = torch.tensor([list(text)])
        targets = torch.cat((whole[:, 1:], torch.tensor([[-100]])), dim=1)
        targets[:, :19] = -100
        after = model(whole, targets=targets).item()
    found = evaluate(model, Bytes(), [Document(text)], window=8, batch=3, device=CPU)
    assert found.tokens == 49
    assert found.loss.value == pytest.approx(nats / 49, rel=1e-5)
    prompted = evaluate(model, Bytes(), [Document(text, prompt=20)], window=64, batch=3, device=CPU)
    assert (prompted.tokens, prompted.bytes) == (30, 30)
    assert prompted.loss.value == pytest.approx(after, rel=1e-5)


def test_a_tokenizer_with_an_end_predicts_the_first_token_too():
    tokenizer = train_bpe([b'some words and more words ' * 20], 280)
    text = b'words and more'
    [ids] = tokenizer.encode([text])
    model = model_of(tokenizer.size)
    with torch.no_grad():
        wanted = model(torch.tensor([[tokenizer.end, *ids]])).item()
    found = evaluate(model, tokenizer, [Document(text)], window=64, batch=3, device=CPU)
    assert (found.tokens, found.bytes) == (len(ids), len(text))
    assert found.loss.value == pytest.approx(wanted, rel=1e-5)
    assert found.loss.low is None
    with pytest.raises(DataError, match='must hold tokens to predict'):
        evaluate(model, tokenizer, [], window=64, batch=3, device=CPU)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    """Documents of random lengths whose losses are drawn around 2 per token, with a spread of their own."""
    draw = random.Random(0)
    hits = 0
    for _ in range(400):
        sizes = [draw.randint(20, 200) for _ in range(60)]
        amounts = [size * draw.gauss(2.0, 0.5) for size in sizes]
        found = ratio(amounts, sizes)
        hits += found.low < 2.0 < found.high
    assert 0.91 < hits / 400 < 0.98
