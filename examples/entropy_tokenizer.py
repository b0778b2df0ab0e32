"""A small model of bytes cuts text where it is surprised: at the starts of words (https://arxiv.org/abs/2412.09871)."""

from __future__ import annotations

import torch
from common import Run, figure
from torch import Tensor

from x_transformers import AutoregressiveWrapper, Decoder, EntropyBasedTokenizer, TransformerWrapper
from x_transformers.entropy_based_tokenizer import calc_entropy_from_logits
from x_transformers.training.data import load_corpus, sample_batch

WINDOW, BATCH, SHOWN, CUT = 128, 16, 300, 0.2


def starts_word(text: str, at: int) -> bool:
    """A letter, digit or underscore behind anything else."""
    inside = [c.isalnum() or c == '_' for c in text[at - 1 : at + 1]]
    return inside == [False, True]


def main() -> None:
    run = Run(__doc__, steps=500)
    corpus = load_corpus(window=WINDOW)
    layers = Decoder(dim=96, depth=3, heads=3, attn_dim_head=32, rotary_pos_emb=True, rotary_emb_dim=32, use_rmsnorm=True)
    model = TransformerWrapper(num_tokens=256, max_seq_len=512, use_abs_pos_emb=False, attn_layers=layers)
    trained = AutoregressiveWrapper(model)
    batches = iter(range(run.steps))

    def loss() -> Tensor:
        return trained(sample_batch(corpus.train, batch=BATCH, window=WINDOW + 1, seed=0, index=next(batches)))

    run.train(trained, loss, lr=4e-3)

    # a threshold that cuts behind every fifth byte
    texts = sample_batch(corpus.held_out, batch=64, window=WINDOW, seed=1, index=0)
    with torch.no_grad():
        entropies = calc_entropy_from_logits(model(texts))
    tokenizer = EntropyBasedTokenizer(model, entropy_threshold=entropies.flatten().quantile(1 - CUT).item())

    hits = cuts = words = places = 0
    for row, segments in zip(texts, tokenizer(texts, return_segmented_seq=True), strict=True):
        text = bytes(row.tolist()).decode('latin-1')
        ends = torch.tensor([len(segment) for segment in segments]).cumsum(0)[:-1].tolist()
        hits += sum(starts_word(text, at) for at in ends)
        cuts += len(ends)
        words += sum(starts_word(text, at) for at in range(1, len(text)))
        places += len(text) - 1

    shown = corpus.held_out.window(2000, SHOWN).long()
    cut = tokenizer(shown, return_segmented_seq=True)
    print('|'.join(bytes(segment.tolist()).decode('latin-1') for segment in cut))

    made, axes = figure(1, 1, width=9, height=2.4)
    line = shown[:70]
    with torch.no_grad():
        height = calc_entropy_from_logits(model(line[None]))[0].tolist()
    axes[0][0].bar(range(1, len(line)), height[:-1], color=['C1' if h >= tokenizer.entropy_threshold else 'C0' for h in height])
    axes[0][0].axhline(tokenizer.entropy_threshold, color='grey', linewidth=0.8)
    axes[0][0].set_xticks(range(len(line)), [chr(c) if c != 10 else '↵' for c in line.tolist()], family='monospace', fontsize=8)
    axes[0][0].set_ylabel('entropy before it, nats')
    run.picture(made)
    chance = words / places
    run.check('cuts at starts of words', hits / cuts, at_least=2 * chance, baseline=f'cutting anywhere reaches {chance:.3f}')


if __name__ == '__main__':
    main()
