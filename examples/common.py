"""What the examples share: ``--steps``, the training loop with its bar, pictures, and the figure that has to be reached.

An example reads

    run = Run(__doc__, steps=600)
    model = ...
    run.train(model, lambda: model(batch()))
    run.picture(figure)                                          # runs/examples/NAME.png
    run.check('accuracy', accuracy, at_least=0.99, baseline='guessing reaches 0.1')

and lies beside this file. Its name must not be that of a module of Python's own library, which it would hide.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from x_transformers.drawing import panels, save_figure, settings

PICTURES = Path('runs/examples')


class Run:
    """One run of an example: what the command line said, and what became of it.

    Args:
        about: the example's docstring.
        steps: training steps of a whole run. ``--steps N`` asks for another number; the figure is then shown, not asserted.
        seed: of everything random.
    """

    def __init__(self, about: str | None, *, steps: int, seed: int = 0) -> None:
        self.name = Path(sys.argv[0]).stem
        parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument('--steps', type=int, help=f'training steps, {steps} if not given; others assert nothing')
        parser.add_argument('--seed', type=int, default=seed, help=f'of everything random, {seed} if not given')
        given = parser.parse_args()
        if given.steps is not None and given.steps < 1:
            parser.error(f'--steps must be at least 1, got {given.steps}')
        self.steps: int = steps if given.steps is None else given.steps
        self.whole = given.steps is None
        self.started = time.perf_counter()
        self.losses: list[float] = []
        torch.manual_seed(given.seed)
        random.seed(given.seed)

    def train(
        self,
        model: nn.Module | Iterable[nn.Parameter],
        loss_of: Callable[[], Tensor],
        *,
        share: float = 1.0,
        lr: float = 3e-3,
        weight_decay: float = 0.01,
        muon: Iterable[nn.Parameter] = (),
        says: str = 'training',
        after_step: Callable[[], Any] | None = None,
    ) -> list[float]:
        """``share`` of the run's steps of AdamW on ``loss_of()``, warmed up and cooled down; the losses.

        The matrices in ``muon``, such as ``net.muon_parameters()``, are moved by Muon instead. A model is in training mode
        meanwhile and in evaluation mode afterwards.
        """
        steps = max(1, round(self.steps * share))
        parameters = list(model.parameters() if isinstance(model, nn.Module) else model)
        parameters = [p for p in parameters if p.requires_grad]
        matrices = set(muon)
        rest = [p for p in parameters if p not in matrices]
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)
        ]
        if matrices:
            moved = [p for p in parameters if p in matrices]
            optimizers.append(
                torch.optim.Muon(moved, lr=3 * lr, weight_decay=weight_decay, adjust_lr_fn='match_rms_adamw')
            )  # fmt: skip
        peaks = [optimizer.param_groups[0]['lr'] for optimizer in optimizers]
        warmup = max(1, steps // 20)
        if isinstance(model, nn.Module):
            model.train()
        losses = []
        with tqdm(range(steps), desc=f'{self.name}: {says}', leave=False, mininterval=0.5) as bar:
            for step in bar:
                height = min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))
                loss = loss_of()
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                for optimizer, peak in zip(optimizers, peaks, strict=True):
                    optimizer.param_groups[0]['lr'] = peak * height
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                if after_step is not None:
                    after_step()
                losses.append(loss.item())
                bar.set_postfix_str(f'loss {losses[-1]:.3f}', refresh=False)
        if isinstance(model, nn.Module):
            model.eval()
        self.losses += losses
        return losses

    def picture(self, figure: Any, name: str | None = None) -> None:
        """Save a matplotlib figure as ``runs/examples/NAME.png``."""
        PICTURES.mkdir(parents=True, exist_ok=True)
        path = PICTURES / f'{name or self.name}.png'
        save_figure(figure, path)
        tqdm.write(f'{self.name}: wrote {path}')

    def check(
        self, what: str, value: float, *, at_least: float | None = None, at_most: float | None = None, baseline: str
    ) -> None:
        """Print a figure beside its baseline; after a whole run, end with an error if it is missed."""
        value = float(value)
        if (at_least is None) == (at_most is None):
            raise TypeError('give one of at_least and at_most')
        reached = value >= at_least if at_least is not None else value <= (at_most or 0.0)
        asked = f'at least {at_least:.4g}' if at_least is not None else f'at most {at_most:.4g}'
        seconds = time.perf_counter() - self.started
        line = f'{self.name}: {what} {value:.4g} ({asked} wanted; {baseline}) after {self.steps} steps, {seconds:.0f} s'
        tqdm.write(line)
        if self.whole and not reached:
            raise SystemExit(f'{self.name} missed its figure: {what} is {value:.4g}, {asked} was wanted.')


def counted(rows: int, length: int, symbols: int, *, steps: int = 5) -> Tensor:
    """Sequences that count modulo ``symbols`` (rows, length); each begins anywhere, and its step is 1 to ``steps``."""
    begin, step = torch.randint(symbols, (rows, 1)), torch.randint(1, steps + 1, (rows, 1))
    return (begin + step * torch.arange(length)) % symbols


def figure(rows: int, columns: int, *, width: float, height: float) -> Any:
    """(matplotlib figure, its axes as an array of rows and columns); needs no display."""
    import matplotlib

    matplotlib.rcParams.update(settings())
    return panels(rows, columns, width=width, height=height)


def show_image(axis: Any, pixels: Tensor, title: str = '', *, right: bool = True) -> None:
    """Draw pixels (rows, columns), dark where they are large; the title is red if it is wrong."""
    axis.imshow(pixels.numpy(), cmap='gray_r')
    axis.set_title(title, fontsize=9, color='black' if right else 'red')
    axis.axis('off')
