"""Beam search finds likely continuations that greedy decoding walks past.

The sequences are those of a random chain over 24 tokens: from some tokens almost anything may follow, from others hardly more
than one token. The likeliest next token often leads to where nothing is likely. What the best continuation is can be computed
from the chain itself; the model has only seen samples.
"""

from __future__ import annotations

import torch
from common import Run, figure
from torch import Tensor

from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper
from x_transformers.drawing import name_beside

TOKENS, LENGTH, AHEAD, BEAMS = 24, 32, 6, (1, 2, 4, 8, 16)


def chain() -> Tensor:
    """Probabilities (from, to): half of the tokens have few successors, the others many."""
    spread = torch.where(torch.arange(TOKENS) % 2 == 0, 0.1, 1.0)
    weights = torch.distributions.Gamma(spread, torch.ones(TOKENS)).sample((TOKENS,)).T + 1e-6
    return weights / weights.sum(dim=-1, keepdim=True)


def sampled(probabilities: Tensor, rows: int) -> Tensor:
    tokens = [torch.randint(TOKENS, (rows,))]
    for _ in range(LENGTH - 1):
        tokens.append(probabilities[tokens[-1]].multinomial(1).squeeze(-1))
    return torch.stack(tokens, dim=1)


def log_likelihood(probabilities: Tensor, start: Tensor, continuation: Tensor) -> Tensor:
    """Of each row's continuation, under the chain."""
    before = torch.cat((start, continuation[:, :-1]), dim=1)
    return probabilities[before, continuation].log().sum(dim=1)


def best_possible(probabilities: Tensor) -> Tensor:
    """The log likelihood of the most likely continuation of every token, by dynamic programming (Viterbi's)."""
    best = torch.zeros(TOKENS)
    for _ in range(AHEAD):
        best = (probabilities.log() + best).max(dim=-1).values
    return best


def main() -> None:
    run = Run(__doc__, steps=400)
    probabilities = chain()
    model = AutoregressiveWrapper(
        TransformerWrapper(
            num_tokens=TOKENS, max_seq_len=LENGTH, attn_layers=Decoder(dim=64, depth=1, heads=2, attn_dim_head=32)
        )
    )
    run.train(model, lambda: model(sampled(probabilities, 64)))

    starts = torch.arange(TOKENS)[:, None]
    best = best_possible(probabilities)
    greedy = log_likelihood(probabilities, starts, model.generate(starts, AHEAD, temperature=0.0))
    found = {width: log_likelihood(probabilities, starts, model.beam_search(starts, AHEAD, beams=width)) for width in BEAMS}
    for width, reached in found.items():
        exact = (best - reached < 1e-3).float().mean()
        print(f'{width:2d} beams: log likelihood {reached.mean():.2f}, the best of all for {exact:.0%} of the starts')

    drawn, axes = figure(1, 2, width=8.0, height=2.8)
    axes[0][0].plot(BEAMS, [reached.mean() for reached in found.values()], marker='o')
    axes[0][0].axhline(float(best.mean()), color='grey', linewidth=0.8, linestyle='--')
    axes[0][0].set_xscale('log', base=2)
    axes[0][0].set(xlabel='beams', ylabel='mean log likelihood', title='dashed: the best of all')
    order = best.argsort()
    for label, reached in (('best of all', best), (f'{BEAMS[-1]} beams', found[BEAMS[-1]]), ('greedy', greedy)):
        axes[0][1].plot(reached[order].numpy(), '.', label=label)
    axes[0][1].set(xlabel='first token', xticks=[])
    name_beside(axes[0][1])
    run.picture(drawn)
    closed = (found[BEAMS[-1]] - greedy).mean() / (best - greedy).mean()
    others = f'log likelihoods: greedy {greedy.mean():.2f}, beams {found[BEAMS[-1]].mean():.2f}, best of all {best.mean():.2f}'
    run.check('share of the way from greedy decoding to the best of all', closed, at_least=0.9, baseline=others)


if __name__ == '__main__':
    main()
