"""DPO teaches a language model which of two ways to go on is preferred (https://arxiv.org/abs/2305.18290).

The model learns to count from a number, half of the time up and half of the time down. Then it is shown pairs: up is preferred.
"""

from __future__ import annotations

import torch
from common import Run, figure
from torch import Tensor

from x_transformers import DPO, AutoregressiveWrapper, Decoder, TransformerWrapper
from x_transformers.drawing import name_beside

NUMBERS, LENGTH, BATCH = 16, 8, 32


def counted(starts: Tensor, direction: Tensor | int) -> Tensor:
    """From ``b 1`` starts to ``b n`` numbers, up (1) or down (-1), round the clock."""
    return (starts + direction * torch.arange(LENGTH)) % NUMBERS


def starts(rows: int) -> Tensor:
    return torch.randint(NUMBERS, (rows, 1))


def rates(model: AutoregressiveWrapper) -> tuple[float, float]:
    """The shares of samples that count up and that count down without a mistake."""
    first = starts(400)
    made = torch.cat((first, model.generate(first, LENGTH - 1, filter_logits_fn='top_p', filter_kwargs={'thres': 0.95})), dim=1)
    up, down = ((made == counted(first, way)).all(dim=-1).float().mean().item() for way in (1, -1))
    return up, down


def main() -> None:
    run = Run(__doc__, steps=600)
    layers = Decoder(dim=64, depth=2, heads=2, attn_dim_head=32, rotary_pos_emb=True, rotary_emb_dim=32, use_rmsnorm=True)
    net = TransformerWrapper(num_tokens=NUMBERS, max_seq_len=LENGTH, attn_layers=layers)

    model = AutoregressiveWrapper(net)
    both = torch.tensor([-1, 1])
    run.train(model, lambda: model(counted(starts(BATCH), both[torch.randint(2, (BATCH, 1))])), share=0.75, says='language')
    before = rates(model)

    # the first number after the prompt decides, so what counts is the probability of the response's own tokens
    dpo = DPO(net, beta=0.1, select_by_target=True)
    prompt = (torch.arange(LENGTH) < 1).expand(BATCH, -1)

    def preference() -> Tensor:
        first = starts(BATCH)
        return dpo(counted(first, 1), counted(first, -1), prompt_mask=prompt)

    losses = run.train(dpo, preference, share=0.25, lr=1e-3, weight_decay=0.0, says='preference')
    after = rates(model)

    made, axes = figure(1, 2, width=7, height=2.6)
    axes[0][0].plot(losses)
    axes[0][0].set(xlabel='step of DPO', ylabel='loss', title='preference')
    for offset, (says, pair) in enumerate((('before', before), ('after', after))):
        axes[0][1].bar([x + 0.4 * offset for x in range(3)], [*pair, 1 - sum(pair)], width=0.4, label=says)
    axes[0][1].set(xticks=[0.2, 1.2, 2.2], xticklabels=['up', 'down', 'neither'], ylim=(0, 1.02), title='samples')
    name_beside(axes[0][1])
    run.picture(made)
    run.check('samples that count up', after[0], at_least=0.95, baseline=f'{before[0]:.2f} did before DPO')


if __name__ == '__main__':
    main()
