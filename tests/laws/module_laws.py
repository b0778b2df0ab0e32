"""Laws of modules: whoever listens to one, wraps it or exchanges it is served, under every flag."""

from __future__ import annotations

import collections
import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.laws.combination import Combination, tokens
from tests.laws.groups import DIM
from tests.laws.laws import ROWS, decodes_as_in_full, must, trained_alike
from x_transformers.layers.checks import check_steps

Fired = collections.Counter[int]


def listen(modules: list[nn.Module]) -> tuple[Fired, list[Any]]:
    """How often each module, by its identity, is called from now on; the handles of the hooks."""
    fired: Fired = collections.Counter()
    return fired, [module.register_forward_hook(lambda module, args, out: fired.update([id(module)])) for module in modules]


def memories_of(case: Combination, given: dict[str, Any], nth: int) -> bool:
    """Whether a norm is called for a memory, too."""
    mems = given.get('mems')
    return mems is not None and nth < len(mems)


def hooks_fire(case: Combination, checkpointing: bool = False) -> None:
    """Once per execution on each layer, branch and norm, again where checkpointing runs a branch a second time; on the head."""
    if checkpointing and case.flags.get('gradient_checkpointing') is not None:
        return
    model: Any = case.fresh(stack={'gradient_checkpointing': True} if checkpointing else None).double()
    model.train(checkpointing or model.training)
    stack = model.attn_layers
    stack.layer_dropouts = [0.0] * len(stack.layer_dropouts)
    given = case.inputs(ROWS).part()
    silent = model.pools_in_place_of_logits or isinstance(model.to_logits, nn.ModuleList)
    heads = [] if silent or model.to_logits is None else [model.to_logits]
    final = [] if isinstance(stack.final_norm, nn.Identity) else [stack.final_norm]
    layers = list(stack.layers)
    norms = [norm for layer in layers for norm in layer.norms if norm is not None]
    parts = [layer.inside for layer in layers] + [layer.branch for layer in layers] + [layer.residual for layer in layers]
    fired, handles = listen(list({id(m): m for m in (*layers, *norms, *parts, *heads, *final)}.values()))
    rounds = given.get('recycle_steps', 1) if case.wrapper.get('recycling') else 1
    out = case.call(model, tokens(ROWS), given)
    steps = check_steps(stack, given.get('layers_execute_order'), given.get('repeat_blocks'))
    times = collections.Counter(step.layer for step in steps)
    in_front = collections.Counter(step.layer for step in steps if step.kind == 'a' and memories_of(case, given, step.nth))
    counted = dict(fired)

    def check(module: nn.Module | None, want: int, what: str) -> None:
        if module is not None:
            must(fired[id(module)] == want, f'{what} was heard {fired[id(module)]} times of {want}')

    for index, layer in enumerate(layers):
        ran = times[index] * rounds
        check(layer, ran, f'layer {index}')
        before, behind, after = layer.norms._modules.values()
        check(before, ran + in_front[index] * rounds, f'the norm before layer {index}')
        check(behind, ran, f'the norm behind layer {index}')
        check(after, ran, f'the norm after layer {index}')
        for module in {id(m): m for m in (layer.inside, layer.branch, layer.residual)}.values():
            check(module, ran, f'{type(module).__name__} of layer {index}')
    for module in heads:
        must(fired[id(module)] > 0, 'the head was not heard')
    for module in final:
        must(fired[id(module)] >= 1, 'the final norm was not heard')
    if checkpointing:
        out.square().mean().backward()
        for index, layer in enumerate(layers):
            # of several rounds only the last one has gradients
            want = counted[id(layer.inside)] + times[index] if times[index] else 0
            check(layer.inside, want, f'{type(layer.inside).__name__} of layer {index}, run again,')
            check(layer, times[index] * rounds, f'layer {index}, not run again,')
    for handle in handles:
        handle.remove()


def hooks_fire_again(case: Combination) -> None:
    hooks_fire(case, checkpointing=True)


class ByToken(nn.Module):
    """Somebody's feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh()


class CausalConv(ByToken):
    """Somebody's module that mixes tokens, and says so."""

    mixes_tokens = True

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x) + 0.5 * F.pad(x, (0, 0, 1, -1))).tanh()


class ConvWithState(ByToken):
    """The same with a state: the last token."""

    def forward(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        before = x.new_zeros(x.shape[0], 1, x.shape[2]) if state is None else state
        return (self.linear(x) + 0.5 * torch.cat((before, x), dim=1)[:, :-1]).tanh(), x[:, -1:]


def exchange(model: Any, kind: str, block: nn.Module) -> bool:
    """The first branch of this kind for another, inside of what is wrapped around it; False if there is none."""
    stack = model.attn_layers
    for index, own in enumerate(stack.layer_types):
        if own == kind:
            holder, name = stack.layers[index], '1'
            while hasattr(type(holder._modules[name]), 'hands_on'):
                holder, name = holder._modules[name], 'fn'
            setattr(holder, name, block.double().train(model.training))
            return True
    return False


BLOCKS = (ByToken, CausalConv, ConvWithState)


def foreign_block_runs(case: Combination, kind: type[ByToken]) -> None:
    """A plain module in the place of a feed-forward is called and learns, and what mixes tokens decodes as in full."""
    model: Any = case.build()
    block = kind()
    if not exchange(model, 'f', block):
        return
    fired, handles = listen([block])
    x, given = tokens(ROWS), case.inputs(ROWS).part()
    case.call(model, x, given).square().mean().backward()
    if given.get('layers_execute_order') is None:
        must(fired[id(block)] > 0, f'{kind.__name__} was not called')
        gradient = block.linear.weight.grad
        must(gradient is not None and bool(gradient.isfinite().all()), f'{kind.__name__} got no gradient')
    for handle in handles:
        handle.remove()
    must(not (model.can_cache_kv and kind is CausalConv), 'a cache misses what a convolution has seen')
    decodes_as_in_full(case, model)


def foreign_blocks_run(case: Combination) -> None:
    for kind in BLOCKS:
        foreign_block_runs(case, kind)


def layers_run_again(case: Combination) -> None:
    """Torch's own checkpointing around every layer runs it again, and changes neither output nor gradients."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    plain = case.build()
    model = copy.deepcopy(plain)
    stack: Any = model.attn_layers
    inside = [layer.inside for layer in stack.layers]
    for index, layer in enumerate(stack.layers):
        stack.layers[index] = checkpoint_wrapper(layer)
    fired: Fired = collections.Counter()
    for module in inside:
        module.register_forward_pre_hook(lambda module, args: fired.update([id(module)]))
    trained_alike(case, plain, model)
    if not case.random:
        # of several rounds only the last one has gradients
        ran = [fired[id(module)] for module in inside if fired[id(module)]]
        must(all(times > 1 for times in ran), f'layers ran {ran} times, so none of them again')


MODULE_LAWS = (hooks_fire, hooks_fire_again, foreign_blocks_run, layers_run_again)
