"""A sentence becomes one vector by attention pooling, and the vector tells what kind of text it is.

The sentences are pieces of Python's own library: code, comments, or documentation strings.
"""

from __future__ import annotations

import ast
import io
import tokenize
from itertools import product

import torch
import torch.nn.functional as F
from common import Run, figure
from torch import Tensor, nn

from x_transformers import Encoder, TransformerWrapper
from x_transformers.training.data import standard_library

KINDS, LENGTH, BATCH, FILES = ('code', 'comment', 'docstring'), 40, 32, 150
PAD = 0


def pieces(source: str) -> list[tuple[int, str]]:
    """(kind, text) of all lines of a file that are long enough, without what would give them away: '#', quotes, indents."""
    docs = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and (doc := ast.get_docstring(node))
        for line in doc.splitlines()
    }
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    comments = {token.string.strip('# ') for token in tokens if token.type == tokenize.COMMENT}
    inside = {
        n
        for token in tokens
        if token.type in (tokenize.STRING, tokenize.COMMENT)
        for n in range(token.start[0], token.end[0] + 1)
    }
    code = {line.strip() for n, line in enumerate(source.splitlines(), start=1) if n not in inside}
    return [
        (kind, text.strip()) for kind, texts in enumerate((code, comments, docs)) for text in texts if len(text.strip()) >= 20
    ]


def found(files: list) -> tuple[Tensor, Tensor]:
    """Texts as padded bytes ``b n`` and their kinds ``b``, as many of each kind."""
    kinds: list[list[list[int]]] = [[], [], []]
    for source in files:
        try:
            for kind, text in pieces(source.path.read_text('utf-8')):
                given = list(text.encode())[:LENGTH]
                kinds[kind].append(given + [PAD] * (LENGTH - len(given)))
        except (SyntaxError, tokenize.TokenError, UnicodeDecodeError):
            continue
    count = min(map(len, kinds))
    chosen = [torch.tensor(texts)[torch.randperm(len(texts))[:count]] for texts in kinds]
    return torch.cat(chosen), torch.arange(3).repeat_interleave(count)


def main() -> None:
    run = Run(__doc__, steps=700)
    files = standard_library()
    files = [files[index] for index in torch.randperm(len(files))[:FILES].tolist()]
    texts, kinds = found(files[: FILES * 3 // 4])
    test_texts, test_kinds = found(files[FILES * 3 // 4 :])
    layers = Encoder(dim=64, depth=2, heads=2, attn_dim_head=32, rotary_pos_emb=True, rotary_emb_dim=32, use_rmsnorm=True)
    net = TransformerWrapper(num_tokens=256, max_seq_len=LENGTH, use_abs_pos_emb=False, attn_pool=True, attn_layers=layers)
    model = nn.ModuleDict({'net': net, 'head': nn.Linear(64, len(KINDS))})

    def logits(given: Tensor) -> Tensor:
        pooled = net(given, mask=given != PAD)  # b 1 d: one pooled token per row
        return model['head'](pooled.squeeze(1))

    def loss() -> Tensor:
        rows = torch.randint(len(texts), (BATCH,))
        return F.cross_entropy(logits(texts[rows]), kinds[rows])

    run.train(model, loss, lr=2e-3, muon=net.muon_parameters())
    with torch.no_grad():
        guesses = logits(test_texts).argmax(dim=-1)
    confusion = torch.zeros(3, 3).index_put((test_kinds, guesses), torch.tensor(1.0), accumulate=True)

    made, axes = figure(1, 1, width=3.4, height=3)
    axes[0][0].imshow(confusion.numpy(), cmap='Blues')
    for true, guess in product(range(3), range(3)):
        axes[0][0].text(guess, true, int(confusion[true, guess]), ha='center')
    axes[0][0].set(xticks=range(3), xticklabels=KINDS, yticks=range(3), yticklabels=KINDS, xlabel='guessed', ylabel='is')
    run.picture(made)
    right = (guesses == test_kinds).float().mean()
    run.check('lines of unseen files put right', right, at_least=0.75, baseline='guessing reaches 0.33')


if __name__ == '__main__':
    main()
