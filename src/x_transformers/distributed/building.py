"""Construction of a pipeline stage: build every layer in turn, and free those of other stages at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils.weak import WeakIdKeyDictionary

from x_transformers.distributed.stages import network, places_of, staged_refusals
from x_transformers.layers.layer import Layer
from x_transformers.training.randomness import random_state, restore_random_state

Named = set[tuple[int, str]]  # which layer that took its place in any stack, and a name in it


def build_stage(make: Callable[[], nn.Module], stage: int, stages: int) -> nn.Module:
    """The model of ``make``, with numbers for this stage, and for what no layer holds.

    It draws the same numbers in the same order as one process does. It never holds more than one layer of another stage.
    """
    before = random_state()
    placed: list[Layer] = []
    with torch.device('meta'), told_of_layers(placed.append):
        form = make()
    restore_random_state(before)
    if any(staged_refusals(form, stages)):
        return make()
    names, numbers = elsewhere(form, placed, stage, stages), count()
    # what layers share they share afterwards, too
    left = WeakIdKeyDictionary()

    def let_go(layer: Layer) -> None:
        number = next(numbers)
        for path, module in layer.named_modules(remove_duplicate=False):
            for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
                if (number, f'{path}.{name}') in names:
                    if parameter not in left:
                        left[parameter] = nn.Parameter(torch.empty_like(parameter, device='meta'), parameter.requires_grad)
                    module._parameters[name] = left[parameter]

    with told_of_layers(let_go):
        return make()


def elsewhere(form: nn.Module, placed: Sequence[Layer], stage: int, stages: int) -> Named:
    """The parameters of layers that only other stages hold. Modules that existed before ``make`` ran are left as they are.

    Args:
        form: the model on the meta device.
        placed: the layers of all its stacks, in the order in which they were made.
    """
    net = network(form)
    places, own = places_of(form, net, stages), set(net.attn_layers.layers)
    return {
        (number, f'{path}.{name}')
        for number, layer in enumerate(placed)
        if layer in own
        for path, module in layer.named_modules(remove_duplicate=False)
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        if parameter.is_meta and stage not in places[parameter]
    }


@contextmanager
def told_of_layers(tell: Callable[[Layer], object]) -> Iterator[None]:
    """A context in which ``tell`` is called with each layer that is put into a stack."""

    def placed(parent: nn.Module, name: str, module: nn.Module | None) -> None:
        if isinstance(module, Layer):
            tell(module)

    hook = register_module_module_registration_hook(placed)
    try:
        yield
    finally:
        hook.remove()
