"""The order of layers as data, computed from the flags before any module exists.

Layers are letters: ``a`` self attention, ``c`` cross attention, ``f`` feed-forward, ``m`` mixer. A *step* is one execution of a
layer, so a layer that is executed twice has two steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from x_transformers.flags.base import FlagError
from x_transformers.helpers import exists


class Layout(Protocol):
    """The flags that decide the order of layers, as ``StackFlags`` has them."""

    @classmethod
    def having(cls, trait: str) -> tuple[str, ...]: ...
    @property
    def depth(self) -> int | None: ...
    @property
    def cross_attend(self) -> bool: ...
    @property
    def only_cross(self) -> bool: ...
    @property
    def only_attn(self) -> bool: ...
    @property
    def macaron(self) -> bool: ...
    @property
    def custom_layers(self) -> tuple[str, ...] | None: ...
    @property
    def layers_execute_order(self) -> tuple[int, ...] | None: ...
    @property
    def weight_tie_layers(self) -> bool: ...
    @property
    def par_ratio(self) -> int | None: ...
    @property
    def sandwich_coef(self) -> int | None: ...
    @property
    def integrate_layers(self) -> bool: ...
    @property
    def qkv_receive_diff_residuals(self) -> bool: ...
    @property
    def unet_skips(self) -> bool: ...
    @property
    def mudd(self) -> bool: ...
    @property
    def kv_share_every(self) -> int | None: ...
    @property
    def shift_tokens(self) -> int | tuple[int, ...]: ...
    @property
    def layer_dropout(self) -> float | tuple[float, ...]: ...


KINDS = {'a': 'self attention', 'c': 'cross attention', 'f': 'feed-forward', 'm': 'mixer'}
# those with keys and values
ATTENTIONS = 'ac'


@dataclass(frozen=True)
class LayerSpec:
    """What is to be built at one place of the stack, with the flags that ``StackFlags.layer(index)`` gives.

    ``nth``: its number among the layers of its kind. ``first``: the first of its kind. ``half``: its output counts half
    (macaron). ``views``: how many tensors its branch is given (3: one each for queries, keys and values). ``skip_from``: the
    layer whose incoming stream is combined with its own (U-Net). ``keys_from``: the layer whose keys and values it shares.
    """

    index: int
    kind: str
    nth: int = 0
    first: bool = False
    half: bool = False
    shift: int = 0
    dropout: float = 0.0
    views: int = 1
    skip_from: int | None = None
    keys_from: int | None = None


@dataclass(frozen=True)
class Step:
    """One execution: the ``index``-th of the call, of layer ``layer``, and the ``nth`` of its kind.

    ``block``: which executed block it begins, counted from 1; 0: it is in the middle of one.
    """

    index: int
    layer: int
    kind: str
    nth: int
    block: int = 0


@dataclass(frozen=True)
class LayerPlan:
    """All layers, the order in which they are executed unless the caller says otherwise, and where blocks begin."""

    layers: tuple[LayerSpec, ...]
    order: tuple[int, ...]
    blocks: tuple[int, ...]
    depth: int
    # layers of a block; 1 where they do not repeat one block
    block_size: int = 1

    def __post_init__(self) -> None:
        # computed now, as the compiler cannot trace a cached property that is still to be filled
        _ = self.own_steps, self.keys_from

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        return tuple(layer.kind for layer in self.layers)

    def count(self, kind: str) -> int:
        return self.kinds.count(kind)

    def steps(self, order: tuple[int, ...] | None = None) -> tuple[Step, ...]:
        """The steps of one call, in the given order or the plan's own."""
        return self.own_steps if order is None else _steps(self.kinds, order, 1)

    @cached_property
    def own_steps(self) -> tuple[Step, ...]:
        return _steps(self.kinds, self.order, self.block_size)

    def repeated(self, blocks: Sequence[int]) -> tuple[Step, ...]:
        """The steps that execute these of the blocks."""
        size = self.block_size
        order = tuple(layer for block in blocks for layer in self.order[block * size : (block + 1) * size])
        return _steps(self.kinds, order, size)

    @cached_property
    def keys_from(self) -> dict[int, int]:
        """For each layer that shares keys and values, the layer that it has them from."""
        return {layer.index: layer.keys_from for layer in self.layers if layer.keys_from is not None}

    def mixed_views(self, index: int) -> int:
        """How many views the mixture of earlier layers gives to step ``index`` of the plan's own order."""
        return self.layers[self.order[index]].views


def _steps(kinds: tuple[str, ...], order: tuple[int, ...], block_size: int) -> tuple[Step, ...]:
    steps, seen = [], dict.fromkeys(KINDS, 0)
    for index, layer in enumerate(order):
        kind = kinds[layer]
        block = 0 if index % block_size else index // block_size + 1
        steps.append(Step(index, layer, kind, seen[kind], block))
        seen[kind] += 1
    return tuple(steps)


def default_block(flags: Layout) -> str:
    """The letters that repeat: attention, maybe to a context too, and a feed-forward; macaron puts another one in front."""
    if flags.cross_attend:
        block = 'cf' if flags.only_cross else 'acf'
    else:
        block = 'af'
    block = 'f' + block if flags.macaron else block
    return block.replace('f', '') if flags.only_attn else block


def plan_kinds(flags: Layout) -> tuple[str, ...]:
    """The letters of all layers."""
    block = default_block(flags)
    if flags.custom_layers is not None:
        return tuple(flags.custom_layers)
    if flags.depth is None:
        raise FlagError(
            '`depth` must be given, the number of blocks, unless `custom_layers` names the layers. Give one of the two.'
        )
    if flags.par_ratio is not None:
        return _without_feedforward(flags, _thinned(block, flags.depth, flags.par_ratio))
    if flags.sandwich_coef is not None:
        coef = flags.sandwich_coef
        return _without_feedforward(flags, 'a' * coef + block * (flags.depth - coef) + 'f' * coef)
    return tuple(block * (1 if flags.weight_tie_layers else flags.depth))


def _without_feedforward(flags: Layout, letters: str) -> tuple[str, ...]:
    """The layout is made first: of layers that were counted in it, ``only_attn`` drops the feed-forwards."""
    return tuple(letters.replace('f', '') if flags.only_attn else letters)


def _thinned(block: str, depth: int, ratio: int) -> str:
    """Attention spread over the first two thirds, feed-forwards everywhere else, https://arxiv.org/abs/1911.09483.

    Raises FlagError if the layers cannot be spread with that ratio.
    """
    total = depth * len(block)
    attention = block.replace('f', '')
    if not 1 < ratio <= total:
        raise FlagError(
            f'`par_ratio` must lie in 2 to {total} ({depth} blocks of {len(block)} layers), got {ratio}: '
            'it is the number of layers per attention layer.'
        )
    count = total // ratio
    cut = (total * 2) // 3
    width = (cut + cut // count) // count
    if width < len(attention):
        raise FlagError(
            f'`par_ratio` must leave at least {len(attention)} layers for the attention layers ({attention!r}), got '
            f'{ratio}, which leaves {width}. Choose a larger ratio.'
        )
    spread = attention + 'f' * (width - len(attention))
    return (spread * count).ljust(total, 'f')


def plan_order(flags: Layout, layers: int) -> tuple[int, ...]:
    """Indices of layers in the order of execution."""
    if flags.weight_tie_layers:
        return tuple(range(layers)) * (flags.depth or 1)
    if flags.layers_execute_order is None:
        return tuple(range(layers))
    order = tuple(flags.layers_execute_order)
    check_order(order, layers)
    return order


def check_order(order: Sequence[int], layers: int) -> None:
    """Raise FlagError, a ValueError, if an execution order is empty or names a layer that is not there."""
    wrong = [index for index in order if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < layers]
    if wrong or not order:
        raise FlagError(
            f'`layers_execute_order` must name one layer or more, from 0 to {layers - 1}, got {order}. Name layers that '
            'there are.'
        )


def block_size(flags: Layout) -> int:
    """How many layers make a block. Layers that do not repeat one block are blocks of their own."""
    irregular = exists(flags.custom_layers) or exists(flags.par_ratio) or exists(flags.sandwich_coef)
    return 1 if irregular else len(default_block(flags))


def block_starts(flags: Layout, layers: int) -> tuple[int, ...]:
    """Where blocks begin."""
    return tuple(range(0, layers, block_size(flags)))


def block_numbers(flags: Layout) -> tuple[int, ...]:
    """For each layer, which block it is in, counted from 1."""
    size = block_size(flags)
    return tuple(layer // size + 1 for layer in range(len(plan_kinds(flags))))


def plan_skips(blocks: tuple[int, ...]) -> dict[int, int]:
    """U-Net: the layers that begin the second half of the blocks, and the ones in the first half that each is joined with.

    The last block is joined with the first one, and so on inwards; of an odd number the middle block is left alone.
    """
    half = len(blocks) // 2
    return {blocks[len(blocks) - 1 - nth]: blocks[nth] for nth in range(half)}


def plan_sharing(flags: Layout, kinds: Sequence[str]) -> dict[int, int]:
    """The self attentions that share keys and values, and the layer that each has them from."""
    every = flags.kv_share_every
    if every is None:
        return {}
    own = [index for index, kind in enumerate(kinds) if kind == 'a']
    return {index: own[nth // every * every] for nth, index in enumerate(own) if nth % every}


def _per_layer(name: str, value: float | Sequence[float], layers: int) -> tuple[float, ...]:
    if isinstance(value, (int, float)):
        return (value,) * layers
    if len(value) != layers:
        raise FlagError(
            f'`{name}` must have one entry for each of {layers} layers, got {len(value)}. Give one number, or one per layer.'
        )
    return tuple(value)


def _views(flags: Layout, kind: str, is_first: bool) -> int:
    """Self attention may be given queries, keys and values of their own, by LIMe or by hyper-connections."""
    if kind != 'a':
        return 1
    if flags.integrate_layers or flags.mudd:
        # the very first one has nothing to choose from
        return 1 if is_first else 3
    return 3 if flags.qkv_receive_diff_residuals else 1


def plan_layers(flags: Layout) -> LayerPlan:
    """Everything about the order of layers that follows from the flags.

    Raises FlagError if the flags leave no order, or a tuple has not one entry per layer.
    """
    kinds = plan_kinds(flags)
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown or not kinds:
        raise FlagError(
            f'`custom_layers` must name one layer or more, each by a letter of {", ".join(KINDS)}, got {kinds}'
            + (f' (unknown: {", ".join(unknown)}).' if unknown else '.')
        )
    count = len(kinds)
    order = plan_order(flags, count)
    blocks = block_starts(flags, count)
    skips = plan_skips(blocks) if flags.unet_skips else {}
    shifts = _per_layer('shift_tokens', flags.shift_tokens, count)
    dropouts = _per_layer('layer_dropout', flags.layer_dropout, count)
    firsts = {kind: kinds.index(kind) for kind in set(kinds)}
    sources = plan_sharing(flags, kinds)
    layers = tuple(
        LayerSpec(
            index=index,
            kind=kind,
            nth=kinds[:index].count(kind),
            first=firsts[kind] == index,
            half=flags.macaron and kind == 'f',
            shift=int(shifts[index]),
            dropout=dropouts[index],
            views=_views(flags, kind, firsts[kind] == index),
            skip_from=skips.get(index),
            keys_from=sources.get(index),
        )
        for index, kind in enumerate(kinds)
    )
    depth = len(order) if flags.depth is None else flags.depth
    return LayerPlan(
        layers=layers,
        order=order,
        blocks=blocks,
        depth=1 if flags.weight_tie_layers else depth,
        block_size=1 if exists(flags.layers_execute_order) else block_size(flags),
    )


def exchanged_plan(plan: LayerPlan, kinds: Sequence[str], order: tuple[int, ...], layers: int, flags: Layout) -> LayerPlan:
    """The plan of a stack whose layers somebody has exchanged for others: one kind for each, all once and one after the other.

    An order of one's own stays, and so does the usual one where only kinds have changed.
    Raises ValueError if kinds and layers do not fit each other, or what reaches over several layers.
    """
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown or len(kinds) != layers:
        raise ValueError(
            f'layer_types must name the kind of each of the {layers} layers, by a letter of {", ".join(KINDS)}, got {kinds}. '
            'Exchange layers, layer_types and layer_dropouts together.'
        )
    across = [name for name in flags.having('across_layers') if getattr(flags, name) not in (False, None)]
    if across and tuple(kinds) != plan.kinds:
        raise ValueError(
            f'layer_types must stay {plan.kinds} in a stack with {" and ".join(across)}, which was made for them, got {kinds}. '
            'Build the stack without it, or exchange modules inside of the layers.'
        )
    if order == plan.order and layers != len(plan.layers):
        order = tuple(range(layers))
    check_order(order, layers)
    known = plan.layers if tuple(kinds) == plan.kinds else tuple(LayerSpec(index, kind) for index, kind in enumerate(kinds))
    return LayerPlan(layers=known, order=order, blocks=tuple(range(layers)), depth=plan.depth)
