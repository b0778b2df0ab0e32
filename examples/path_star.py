"""Star graphs, where predicting the next token fails: a belief state transformer finds the path (https://arxiv.org/abs/2410.23506).

Two arms lead away from a node. Given all edges, shuffled, and the end of one arm, the path to it is to be written. Every
step but the first is easy, so a model that only learns to predict the next token never finds out which arm is meant.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import Run, figure
from torch import Tensor

from x_transformers import AutoregressiveWrapper, BeliefStateWrapper, Decoder, TransformerWrapper
from x_transformers.drawing import name_beside

ARMS, LENGTH, BATCH = 2, 4, 128
NODES = 1 + ARMS * (LENGTH - 1)
EDGES = ARMS * (LENGTH - 1)
PROMPT = EDGES + 2  # the edges, the goal, the start


def graphs(rows: int) -> Tensor:
    """Rows of: edges, each one token, goal, start, the rest of the path; an edge from a to b is token NODES (1 + a) + b."""
    nodes = torch.rand(rows, NODES).argsort(dim=-1)
    start = nodes[:, :1]
    arms = torch.cat((start[:, None].expand(-1, ARMS, -1), nodes[:, 1:].unflatten(1, (ARMS, -1))), dim=-1)
    edges = (NODES * (1 + arms[..., :-1]) + arms[..., 1:]).flatten(1)
    edges = edges.gather(1, torch.rand(rows, EDGES).argsort(dim=-1))
    path = arms[:, 0]
    return torch.cat((edges, path[:, -1:], path), dim=-1)


def decoder(depth: int) -> TransformerWrapper:
    layers = Decoder(dim=64, depth=depth, heads=2, attn_dim_head=32, use_rmsnorm=True)
    return TransformerWrapper(num_tokens=NODES * (NODES + 1), max_seq_len=PROMPT + LENGTH, attn_layers=layers)


def solved(paths: Tensor, tests: Tensor) -> float:
    return (paths == tests[:, PROMPT:]).all(dim=-1).float().mean().item()


def main() -> None:
    run = Run(__doc__, steps=1100)
    tests = graphs(500)

    def answers(pairs: Tensor) -> Tensor:
        """The graph itself is random: only pairs whose prefix holds all of it teach anything."""
        return (pairs[:, 0] >= PROMPT - 1).float()

    net = decoder(depth=2)

    def next_token() -> Tensor:
        batch = graphs(BATCH)
        return F.cross_entropy(net(batch[:, :-1])[:, PROMPT - 1 :].flatten(0, 1), batch[:, PROMPT:].flatten())

    plain_losses = run.train(net, next_token, share=0.35, lr=6e-3, muon=net.muon_parameters(), says='next token')
    plain = AutoregressiveWrapper(net)
    plain_rate = solved(plain.generate(tests[:, :PROMPT], LENGTH - 1, temperature=0.0), tests)

    # the paths are short, so that reading them backwards takes one layer
    ahead, behind = decoder(depth=2), decoder(depth=1)
    belief = BeliefStateWrapper(ahead, behind)
    losses = run.train(
        belief, lambda: belief(graphs(BATCH), loss_weight_by_fb_indices=answers), share=0.65, lr=6e-3,
        muon=[*ahead.muon_parameters(), *behind.muon_parameters()], says='belief state',
    )  # fmt: skip
    # the path is written forwards, before an empty suffix: what is to come was learned by predicting it backwards
    rate = solved(belief.generate_with_suffix_cond(tests[:, :PROMPT], LENGTH - 1, temperature=0.0), tests)

    made, axes = figure(1, 2, width=7, height=2.6)
    for label, curve in (('next token', plain_losses), ('belief state', losses)):
        axes[0][0].plot([loss / curve[0] for loss in curve], label=label, linewidth=0.8)
    axes[0][0].set(xlabel='step', ylabel='loss, share of the first')
    name_beside(axes[0][0])
    axes[0][1].bar(['next token', 'belief state'], [plain_rate, rate], color=['C0', 'C1'])
    axes[0][1].axhline(1 / ARMS, color='grey', linewidth=0.8, linestyle='--')
    axes[0][1].set(ylabel='paths found', ylim=(0, 1.02))
    run.picture(made)
    run.check(
        'paths found', rate, at_least=0.95, baseline=f'next-token prediction finds {plain_rate:.2f}, guessing the arm 0.5'
    )


if __name__ == '__main__':
    main()
