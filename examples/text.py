"""A language model over bytes: the source of Python's own standard library, files held out, against gzip.

Afterwards it writes: once keeping only tokens nearly as likely as the best (min-p), once preferring what the model has learnt
since an early snapshot of itself (contrastive decoding).
"""

from __future__ import annotations

import copy
import gzip
import math

import torch
from common import Run
from torch import Tensor

from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper
from x_transformers.training.data import held_out_batches, load_corpus

LENGTH, HELD_OUT = 256, 100_000


def main() -> None:
    run = Run(__doc__, steps=230)
    corpus = load_corpus(window=LENGTH)
    net = TransformerWrapper(
        num_tokens=256,
        max_seq_len=LENGTH,
        use_abs_pos_emb=False,
        attn_layers=Decoder(dim=96, depth=3, heads=3, rotary_pos_emb=True, use_rmsnorm=True, ff_glu=True, shift_tokens=1),
    )
    model = AutoregressiveWrapper(net)

    def loss() -> Tensor:
        starts = torch.randint(len(corpus.train) - LENGTH, (8,)).tolist()
        return model(torch.stack([corpus.train.window(start, LENGTH) for start in starts]).long())

    run.train(model, loss, share=0.1, muon=net.muon_parameters(), says='young')
    young = copy.deepcopy(model)
    run.train(model, loss, share=0.9, muon=net.muon_parameters(), says='grown up')

    text, _ = corpus.held_out.split(HELD_OUT if run.whole else 2_000)
    nats = count = 0
    with torch.no_grad():
        for x in held_out_batches(text, batch=16, window=LENGTH):
            nats += model(x).item() * (x.numel() - len(x))
            count += x.numel() - len(x)
    bits = nats / count / math.log(2)
    packed = 8 * len(gzip.compress(text.window(0, len(text)).numpy().tobytes(), 9)) / len(text)

    prompt, length = torch.tensor([list(b'def __init__(self, ')]), 200 if run.whole else 5
    by_min_p = model.generate(prompt, length, filter_logits_fn='min_p', filter_kwargs={'min_p': 0.1})
    contrastive = model.generate(prompt, length, amateur_model=young, temperature=0.7)
    for how, made in (('min-p', by_min_p), ('contrastive', contrastive)):
        print(f'--- {how}\n{bytes(torch.cat((prompt, made), dim=1)[0].tolist()).decode(errors="replace")}')
    print('---')
    run.check('bits per byte of files held out', bits, at_most=packed, baseline=f'gzip -9 needs {packed:.3f}')


if __name__ == '__main__':
    main()
