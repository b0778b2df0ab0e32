"""Looped language models: run the stack several times on its own output; a gate decides when to stop.

https://arxiv.org/abs/2510.25741
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.cache.intermediates import LayerIntermediates
from x_transformers.cache.kv_cache import KVCache
from x_transformers.cache.layer_cache import LayerCache
from x_transformers.cache.tape import Tape
from x_transformers.embedding.call import ModelArgs
from x_transformers.embedding.recycle import recycle, rounds
from x_transformers.helpers import default
from x_transformers.latent_prediction import masked_average
from x_transformers.layers.arguments import shown_as
from x_transformers.layers.checks import check_steps
from x_transformers.losses import token_cross_entropy
from x_transformers.tensor_types import Bool, Float, Int

RunStack = Callable[..., tuple[Tensor, LayerIntermediates]]


# the arguments of a forward that are of loops
OF_LOOPS = {
    'looped_steps': 'With `looped`, run the stack so often; by default up to `max_looped_steps` times.',
    'looped_pred_all_logits': 'Keep the logits of every step in `intermediates.all_pred_logits`; by default in training.',
    'looped_inference': 'With a cache, a token that is read alone stops when the probabilities of its gates add up.',
    'looped_exit_prob_threshold': 'To what these probabilities must add up.',
}


@dataclass(frozen=True)
class LoopCall:
    """What one forward says of its loops.

    ``steps``: that many; None: as many as the model was made for, of which a gate may save some. ``all_logits``: keep the
    logits of every step; None: in training. ``exits``: with a cache, stop when the gates' probabilities reach ``threshold``.
    """

    steps: int | None = None
    all_logits: bool | None = None
    exits: bool = True
    threshold: float = 0.9

    def check(self, looped: bool) -> None:
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, (int, float)):
            raise ValueError(f'looped_exit_prob_threshold must be a number, got {shown_as(self.threshold)}.')
        # field by field: a compiler that keeps numbers open cannot compare the objects
        set_by_caller = (
            self.steps is not None or self.all_logits is not None or not self.exits or self.threshold != LoopCall.threshold
        )
        if not looped and set_by_caller:
            raise ValueError('looped_... arguments must go to a model with looped=True. Build it so, or leave them out.')
        if self.steps is not None and (not isinstance(self.steps, int) or self.steps < 1):
            raise ValueError(f'looped_steps must be at least 1, a whole number, got {self.steps!r}.')


def run_rounds(
    model: Any, run: RunStack, h: Float[Tensor, 'b n d'], call: ModelArgs
) -> tuple[Float[Tensor, 'b n d'], LayerIntermediates]:
    """A model's stack, as often as it is to be run."""
    if model.exit_gate is None:
        longest = model.train_max_recycle_steps
        steps = rounds(call.recycle_steps, recycling=model.recycling, training=model.training, longest=longest)
        return recycle(run, h, model.recycled_proj, steps)
    order, repeats = call.more.get('layers_execute_order'), call.more.get('repeat_blocks')
    outputs, h, record = run_loops(
        run,
        h,
        model.exit_gate,
        call.loop,
        most=model.max_looped_steps,
        cache=call.cache,
        size=len(check_steps(model.attn_layers, order, repeats)),
        every_place=model.looped_positions,
    )
    if default(call.loop.all_logits, model.training):
        record.all_pred_logits = [model.read_out(each, call)[0] for each in outputs]
    return h, record


def run_loops(
    run: RunStack,
    x: Float[Tensor, 'b n d'],
    gate: nn.Module,
    call: LoopCall,
    *,
    most: int,
    cache: KVCache | None,
    size: int,
    every_place: bool = False,
) -> tuple[list[Float[Tensor, 'b n d']], Float[Tensor, 'b n d'], LayerIntermediates]:
    """(the output of every step, that of each row's last step, the record of the last).

    ``size`` is the number of execution steps of one loop. Each loop has a cache of its own for what was read with several
    tokens at once; a token that is read alone leaves in all of them the keys and values of its last step. It has its place in
    the first loop and none in later ones, as in 2.31.10, unless ``every_place``.
    """
    steps = most if call.steps is None else call.steps
    before = split_by_loop(cache, size)
    if cache is not None and len(before) != steps:
        raise ValueError(f'looped_steps must be {len(before)} with this cache, which was made so, got {steps}.')
    exits = None if cache is None else cache.steps[steps * size]
    alone = call.exits and x.shape[1] == 1
    early = alone and call.steps is None and not gate.training
    exit_index = torch.full((x.shape[0],), steps - 1, device=x.device)
    going = torch.ones_like(exit_index, dtype=torch.bool)
    left, out = x.new_ones(x.shape[0], dtype=torch.float32), x
    outputs, gates, caches, losses = [], [], [], []
    for step in range(steps):
        more: dict[str, Any] = {} if every_place else {'one_place': alone and cache is not None and step > 0}
        x, record = run(x, **more) if cache is None else run(x, cache=before[step], **more)
        # a state belongs to its loop: a token that has left would be missing in those behind it
        early = early and (record.kv_cache is None or record.kv_cache.can_rollback)
        outputs.append(x)
        gates.append(gate(x))
        caches.append(record.kv_cache)
        losses.append(record.expert_loss)
        out = torch.where(going[:, None, None], x, out) if early else x
        if early:
            left = left * (1.0 - gates[-1][:, 0, 0].float().sigmoid())
            # what has left is one less what is left; a row leaves once
            leaves = going & (1.0 - left >= call.threshold)
            exit_index = exit_index.masked_fill(leaves, step)
            going = going & ~leaves
            if not bool(going.any()):
                break
    record.exit_logits = gates
    record.expert_loss = summed_losses(losses)
    if caches[0] is not None:
        record.kv_cache, record.exit_indices = of_all_loops(
            caches, before, exit_index, exits, size=size, steps=steps, early=early
        )
        record.cache_length = record.kv_cache.length
        record.looped_prompt_kv_cache = None if early else [each for each in caches if each is not None]
    else:
        record.exit_indices = exit_index[:, None] if early else exit_index[:1, None]
    return outputs, out, record


def summed_losses(losses: list[Float[Tensor, ''] | None]) -> Float[Tensor, ''] | None:
    """The sum of those that are there."""
    known = [loss for loss in losses if loss is not None]
    return sum(known[1:], known[0]) if known else None


# ---------------------------------------------------------------- one cache for all loops


def split_by_loop(cache: KVCache | None, size: int) -> list[KVCache]:
    """The caches of the loops: the steps of loop i are those from ``i * size`` on, the record of exits is behind the last.

    What belongs to no layer, at numbers below 0, is the same for all.
    """
    if cache is None:
        return []
    loops = []
    for low in range(0, max(cache.steps), size):
        part = cache.fork()
        own = {index: layer for index, layer in part.steps.items() if index < 0}
        part.steps = own | {index - low: layer for index, layer in part.steps.items() if low <= index < low + size}
        loops.append(part)
    return loops


def of_all_loops(
    caches: list[KVCache | None],
    before: list[KVCache],
    exit_index: Int[Tensor, ' b'],
    exits: LayerCache | None,
    *,
    size: int,
    steps: int,
    early: bool,
) -> tuple[KVCache, Int[Tensor, '...']]:
    """(one cache of all loops, the index of the last step of every call)."""
    parts: list[Any] = list(caches)
    whole: Any = parts[0].fork()
    own = {index: layer for index, layer in whole.steps.items() if index < 0}
    layers = _shared(parts, before, exit_index, steps) if early else [_layers(part) for part in parts]
    whole.steps = own | {loop * size + index: layer for loop, part in enumerate(layers) for index, layer in part.items()}
    new = whole.length - (before[0].length if before else 0)
    rows = exit_index[:, None, None].expand(-1, new, 1)
    record = LayerCache()
    if exits is not None:
        record.tapes, record.carry = {'exit': exits.tapes['exit'].append(rows)}, dict(exits.carry)
    else:
        record.tapes, record.carry = {'exit': Tape.of(rows.contiguous())}, {'first': new}
    whole.steps[steps * size] = record
    if not before and not early:
        # nobody could leave
        return whole, exit_index[:1, None]
    return whole, record.tapes['exit'].value[:, record.carry['first'] - 1 :, 0]


def _layers(part: KVCache) -> dict[int, LayerCache]:
    return {index: layer for index, layer in part.steps.items() if index >= 0}


def _shared(parts: list[Any], before: list[KVCache], exit_index: Int[Tensor, ' b'], steps: int) -> list[dict[int, LayerCache]]:
    """The layers of all loops, with what each row's last step left of the newest token."""
    rows = torch.arange(exit_index.shape[0], device=exit_index.device)
    shared = []
    for loop in range(steps):
        held = _layers(before[loop].fork()) if before else {}
        for index, layer in _layers(parts[0]).items():
            kept = held.setdefault(index, LayerCache())
            past = dict(kept.tapes)
            for name, tape in layer.tapes.items():
                if tape.fixed:
                    kept.tapes[name] = past.get(name, tape)
                    continue
                newest = torch.stack([each.steps[index].tapes[name].value[..., -1:, :] for each in parts])
                chosen = newest[exit_index.clamp(max=len(parts) - 1), rows]
                kept.tapes[name] = past[name].append(chosen) if name in past else Tape.of(chosen)
            kept.carry = dict(layer.carry)
        shared.append(held)
    return shared


# ---------------------------------------------------------------- the loss


def looped_loss(
    losses: list[Float[Tensor, 'b n']],
    gates: list[Float[Tensor, 'b n']],
    counts: Bool[Tensor, 'b n'],
    *,
    threshold: float,
    slope: float,
    exit_weight: float,
) -> Float[Tensor, '']:
    """The mean over steps and tokens of the losses, each weighted by the probability to leave there, and the gates' loss.

    A gate is to open where the next step lowers the loss by less than ``threshold``, the more surely the larger ``slope``. As
    in 2.31.10 the mean is over steps, too: one K-th of the expected loss of K steps.
    """
    left, weighted = torch.ones_like(losses[0]), []
    for step, loss in enumerate(losses):
        leaves = gates[step].float().sigmoid() if step < len(losses) - 1 else torch.ones_like(left)
        weighted.append((left * leaves).detach() * loss)
        left = left * (1.0 - leaves)
    total = masked_average(torch.stack(weighted).mean(dim=0), counts)
    if len(losses) == 1:
        return total
    ones = []
    for step in range(len(losses) - 1):
        wanted = (slope * (losses[step + 1] - losses[step] + threshold)).sigmoid().detach()
        ones.append(F.binary_cross_entropy_with_logits(gates[step].float(), wanted.float(), reduction='none'))
    return total + exit_weight * masked_average(torch.stack(ones).mean(dim=0), counts)


def loss_of_loops(
    intermediates: LayerIntermediates, targets: Int[Tensor, 'b m'], ignore_index: int, **settings: float
) -> Float[Tensor, '']:
    """``looped_loss`` of what a looped model has reported; a prefix has no gates of its own in it."""
    every: Any = intermediates.all_pred_logits
    losses = [token_cross_entropy(logits, targets, ignore_index=ignore_index, reduction='none') for logits in every]
    gates = [gate[:, gate.shape[1] - targets.shape[1] :, 0] for gate in intermediates.exit_logits or []]
    return looped_loss(losses, gates, targets != ignore_index, **settings)
