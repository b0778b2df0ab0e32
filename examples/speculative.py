"""Speculative decoding: a small draft model guesses, the large one checks four guesses in one pass, the distribution stays.

Both are byte models of the standard library's source, trained for a moment. Shown: how many tokens each pass of the large
model yields, and that pairs of tokens are drawn as often as without the draft.
"""

from __future__ import annotations

import torch
from common import Run
from scipy.stats import chi2_contingency
from torch import Tensor

from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper
from x_transformers.helpers import identity
from x_transformers.training.data import load_corpus

LENGTH = 128


def byte_model(dim: int, depth: int) -> AutoregressiveWrapper:
    stack = Decoder(dim=dim, depth=depth, heads=2, rotary_pos_emb=True, use_rmsnorm=True, shift_tokens=1)
    return AutoregressiveWrapper(
        TransformerWrapper(num_tokens=256, max_seq_len=LENGTH, use_abs_pos_emb=False, attn_layers=stack)
    )


def counts(model: AutoregressiveWrapper, rows: int, draft: AutoregressiveWrapper | None) -> Tensor:
    """How often each letter, or anything else, stands at the second place after a prompt."""
    prompt = torch.tensor([list(b'    return self.')]).expand(rows, -1)
    guesses = {} if draft is None else {'draft_model': draft, 'lookahead': 2}
    second = model.generate(prompt, 2, filter_logits_fn=identity, **guesses)[:, 1]
    return torch.bincount((second - ord('a')).clamp(-1, 26) + 1, minlength=28)


def p_value(one: Tensor, other: Tensor) -> float:
    """Of a chi-square test that both were drawn from the same distribution; rare letters are counted together."""
    both = torch.stack((one, other))
    rare = both.sum(dim=0) < 20
    both = torch.cat((both[:, ~rare], both[:, rare].sum(dim=1, keepdim=True) + 1), dim=1)
    return float(chi2_contingency(both.numpy()).pvalue)


def main() -> None:
    run = Run(__doc__, steps=240)
    corpus = load_corpus(window=LENGTH)
    large, small = byte_model(128, 4), byte_model(64, 1)

    def batch() -> Tensor:
        starts = torch.randint(len(corpus.train) - LENGTH, (16,)).tolist()
        return torch.stack([corpus.train.window(start, LENGTH) for start in starts]).long()

    run.train(large, lambda: large(batch()), share=0.5, muon=large.net.muon_parameters(), says='large')
    run.train(small, lambda: small(batch()), share=0.5, muon=small.net.muon_parameters(), says='small')

    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    watching = large.net.register_forward_pre_hook(count)
    new = LENGTH - 8 if run.whole else 8
    for prompt in (b'import o', b'def read', b'    for ', b'class St')[: 4 if run.whole else 1]:
        made = large.generate(torch.tensor([list(prompt)]), new, temperature=0.8, draft_model=small, filter_logits_fn=identity)
        print(f'--- {prompt.decode()}{bytes(made[0].tolist()).decode(errors="replace")}')
    watching.remove()
    per_pass = new * (4 if run.whole else 1) / passes

    rows = 2000 if run.whole else 40
    plain, drafted, only_small = counts(large, rows, None), counts(large, rows, small), counts(small, rows, None)
    same, other = p_value(plain, drafted), p_value(plain, only_small)
    run.check('p-value of both distributions being equal', same, at_least=0.001, baseline=f"the small model's own: {other:.1g}")
    run.check('tokens per pass of the large model', per_pass, at_least=1.5, baseline='without a draft 1')


if __name__ == '__main__':
    main()
