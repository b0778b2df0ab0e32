"""The state of one call of the stack: the caller's inputs, what layers pass on, what the caller receives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.attention.inputs import BranchInputs, ExtraKeys, HandedKeys, Intermediates
from x_transformers.attention.mask import Mask, PackedSequences, Placed
from x_transformers.cache.intermediates import LayerIntermediates
from x_transformers.cache.kv_cache import KVCache
from x_transformers.embedding.values import of_layer
from x_transformers.helpers import counted, is_any
from x_transformers.layers.drop import dropout_seq
from x_transformers.layers.plan import ATTENTIONS, Step
from x_transformers.tensor_types import Bool, Float, Int, Shaped

if TYPE_CHECKING:
    from x_transformers.position.bias import Bias
    from x_transformers.position.positions import Positions

# the cache of the stack itself, beside those of its steps: masks and positions that the caller gave
OWN_STEP = -1


@dataclass(frozen=True)
class Span:
    """Where the tokens of this call lie.

    ``length`` tokens came in, of which ``new`` are unseen; the cache holds ``past`` rows beside them, memories ``mems`` rows
    before those. ``begin`` is the position of the first row held; ``dropped`` rows have left the window of the cache, and
    ``uncounted`` ones before it began to count.

    In a cache of fixed capacity the new tokens are not the last rows: ``placed`` is the number of the first of them.
    ``device`` is that of the tokens: parameters may be elsewhere while their module does not run.
    """

    device: torch.device
    batch: int
    length: int
    new: int
    past: int
    mems: int
    begin: int | Int[Tensor, ' 1']
    dropped: int | Int[Tensor, ' 1'] = 0
    placed: Int[Tensor, ' 1'] | None = None
    uncounted: int = 0

    @property
    def held(self) -> int:
        """Rows that self attention looks at, without memories."""
        return self.past + self.new

    @property
    def whole(self) -> int:
        return self.mems + self.past + self.new

    @property
    def first(self) -> int | Int[Tensor, ' 1']:
        """Number of the first new token among the rows held."""
        return self.past if self.placed is None else self.placed

    def new_rows(self, device: torch.device, mems: int = 0) -> Int[Tensor, ' n']:
        """Numbers of the new tokens among ``mems`` memories and the rows held."""
        return counted(self.first + mems, self.new, device)

    def positions(self, device: torch.device, only_new: bool = False) -> Int[Tensor, ' m']:
        """Positions by counting, of memories and the rows held; ``only_new``: of memories and the new tokens."""
        if not only_new:
            return counted(self.begin - self.mems, self.whole, device)
        new = counted(self.begin + self.first, self.new, device)
        return torch.cat((counted(self.begin - self.mems, self.mems, device), new)) if self.mems else new

    def newest(self, t: Shaped[Tensor, '...'], axis: int = 1) -> Tensor:
        """Of something per token, the part that belongs to the new tokens."""
        length = t.shape[axis]
        if is_any(length, 1, self.new):
            return t
        if self.placed is not None:
            return t.index_select(axis, self.new_rows(t.device, length - self.held))
        return t.narrow(axis, length - self.new, self.new)


class SelfMasks:
    """One mask for all self attentions, or one for each mask over memories: layers with equal questions share one object."""

    def __init__(
        self,
        base: Mask,
        held: int,
        mems: Sequence[Float[Tensor, 'b l d'] | None] = (),
        mem_masks: Sequence[Bool[Tensor, 'b l'] | None] = (),
    ) -> None:
        # ``base`` is about past and new tokens, ``held`` of them
        self.base = base
        self.held = held
        self.mems = mems
        self.mem_masks = mem_masks
        self.made: list[tuple[int, Tensor | None, Mask]] = [(0, None, base)]

    def of(self, nth: int) -> Mask:
        """The mask of the ``nth`` self attention."""
        mem = _at(self.mems, nth)
        length = 0 if mem is None else mem.shape[1]
        mem_mask = _at(self.mem_masks, nth) if length else None
        for made_length, made_for, mask in self.made:
            if made_length == length and made_for is mem_mask:
                return mask
        self.made.append((length, mem_mask, self._make(length, mem_mask)))
        return self.made[-1][-1]

    def _make(self, length: int, mem_mask: Bool[Tensor, 'b l'] | None) -> Mask:
        base = self.base
        keys = base.keys
        if mem_mask is not None:
            shown = mem_mask.new_ones(mem_mask.shape[0], self.held) if keys is None else keys
            keys = torch.cat((mem_mask, shown), dim=-1)
        elif keys is not None:
            keys = F.pad(keys, (length, 0), value=True)
        placed = base.placed
        if placed is not None:
            placed = Placed(placed.first + length, placed.queries, placed.keys + length)
        return base.having(keys=keys, prefix=None if base.prefix is None else base.prefix + length, placed=placed)


@dataclass(frozen=True)
class Inputs:
    """What the caller gave, checked and made ready once for all layers of a call."""

    steps: tuple[Step, ...]
    span: Span
    masks: SelfMasks
    cross_mask: Mask = field(default_factory=lambda: Mask())
    context: Float[Tensor, 'b j c'] | None = None
    rows: Bool[Tensor, 'b n'] | None = None
    padding: Bool[Tensor, 'b n'] | None = None
    shift_padding: Bool[Tensor, 'b n'] | None = None
    bias: Bias | None = None
    positions: Positions | None = None
    positions_of_layers: tuple[Positions | None, ...] = ()
    cross_positions: Positions | None = None
    cross_positions_of_layers: tuple[Positions | None, ...] = ()
    mems: tuple[Tensor | None, ...] = ()
    extra: tuple[ExtraKeys | None, ...] = ()
    self_kv_shift: tuple[Tensor, ...] = ()
    cross_kv_shift: tuple[Tensor, ...] = ()
    packed: PackedSequences | None = None
    cross_packed: PackedSequences | None = None
    condition: Float[Tensor, 'b #n c'] | None = None
    mem_condition: Float[Tensor, 'b #m c'] | None = None
    injected: Float[Tensor, 'b #n d'] | None = None
    deep_table: Float[Tensor, 't l d'] | None = None
    deep_ids: Int[Tensor, 'b n'] | None = None
    value_embeds: tuple[Any, Int[Tensor, 'b n']] | None = None
    cache: KVCache | None = None
    transform_block: Callable[[int, Tensor], Tensor] | None = None
    continues: bool = False
    return_attn: bool = False
    causal: bool | None = None
    log_probs: bool = False

    def deep_embed(self, nth: int) -> Float[Tensor, 'b n d'] | None:
        """The factor of the ``nth`` feed-forward; there may be fewer than feed-forwards."""
        if self.deep_table is None or self.deep_ids is None or nth >= self.deep_table.shape[1]:
            return None
        return F.embedding(self.deep_ids, self.deep_table[:, nth])

    def for_step(self, step: Step, carry: Carry, context_dropout: float = 0.0) -> BranchInputs:
        """What the branch of one step is given; a memory still has to be normed by its layer."""
        cache = self.cache
        past = None if cache is None else cache.steps.get(step.index) or cache.step(step.index)
        if step.kind not in ATTENTIONS:
            return BranchInputs(
                mask=self.masks.base,
                tokens=self.padding,
                deep_embed=self.deep_embed(step.nth) if step.kind == 'f' and self.deep_table is not None else None,
                padding=self.shift_padding,
                packed=self.packed if step.kind == 'm' else None,
                past=past,
                condition=self.condition,
            )
        inputs = BranchInputs(
            tokens=self.padding,
            mask=self.masks.base,
            rows=self.rows,
            previous=carry.previous.get(step.kind),
            first_values=carry.first_values.get(step.kind),
            padding=self.padding,
            past=past,
            condition=self.condition,
            return_attn=self.return_attn,
            return_scores=step.kind in carry.hands_on_scores,
            log_probs=self.log_probs,
        )
        if step.kind == 'a':
            self._for_self(inputs, step)
            if carry.keys_from:
                inputs.hands_on_keys = step.layer in carry.keys_from.values()
                inputs.shared = carry.keys.get(carry.keys_from.get(step.layer, -1))
        else:
            self._for_cross(inputs, step, context_dropout)
        return inputs

    def _for_self(self, inputs: BranchInputs, step: Step) -> None:
        inputs.mem = _at(self.mems, step.nth) if self.mems else None
        if inputs.mem is not None:
            inputs.mask = self.masks.of(step.nth)
        inputs.bias = self.bias
        # where there is none there is no call either: this is asked for each layer and token
        own = _at(self.positions_of_layers, step.layer) if self.positions_of_layers else None
        inputs.positions = own or self.positions
        inputs.extra = _at(self.extra, step.nth) if self.extra else None
        inputs.kv_shift = _at(self.self_kv_shift, step.nth) if self.self_kv_shift else None
        inputs.packed = self.packed
        inputs.causal = self.causal
        inputs.token_values = None if self.value_embeds is None else of_layer(self.value_embeds, step.layer)

    def condition_of_memory(self, mem: Float[Tensor, 'b l d']) -> Float[Tensor, 'b #l c'] | None:
        """What the norm of a memory depends on; a shorter memory ends where the others end."""
        known = self.mem_condition
        return known if known is None or known.shape[1] == 1 else known[:, self.span.mems - mem.shape[1] :]

    def _for_cross(self, inputs: BranchInputs, step: Step, dropout: float) -> None:
        inputs.context, inputs.mask = self.context, self.cross_mask
        inputs.kv_shift = _at(self.cross_kv_shift, step.nth)
        if dropout > 0.0 and not self.continues and inputs.context is not None:
            # every layer drops from the whole context, so that dropping does not add up over layers
            shift, inputs.kv_shift = inputs.kv_shift, None
            whole = inputs.context if shift is None else inputs.context + shift
            inputs.context, keys = dropout_seq(whole, self.cross_mask.keys, dropout)
            inputs.mask = Mask(keys=keys)
        inputs.positions = _at(self.cross_positions_of_layers, step.layer) or self.cross_positions
        inputs.packed = self.cross_packed


def _at(items: Sequence[Any], index: int) -> Any:
    return items[index] if index < len(items) else None


class Around:
    """What surrounds one execution of a layer, as it is when the layer is entered.

    A layer may run a second time for its gradients, so it changes nothing here but ``entered``, which is the same both times;
    what layers hand on is taken from what it returns. No dataclass, for the reason of ``BranchInputs``.
    """

    def __init__(
        self,
        inputs: BranchInputs,
        *,
        injected: Float[Tensor, 'b #n d'] | None = None,
        mem_condition: Float[Tensor, 'b #l c'] | None = None,
        mixture: nn.Module | None = None,
        before: Sequence[Float[Tensor, 'b n d']] = (),
        views: Float[Tensor, '3 b n d'] | None = None,
        shows: bool = False,
        drop: bool | Bool[Tensor, ''] = False,
        checkpoint: bool = False,
        tokens: Bool[Tensor, 'b n'] | None = None,
    ) -> None:
        """
        Args:
            inputs: those of the branch; its memory is not normed yet.
            injected: added to the branch's input.
            mem_condition: what the norm of the memory depends on.
            mixture: mixes ``before``, what entered the earlier layers, with what enters this one.
            views: what queries, keys and values are made of, in place of the stream.
            shows: somebody wants to know what enters.
            drop: the branch is left out.
            checkpoint: the branch runs again for its gradients.
            tokens: which of the new rows are tokens; None: all.
        """
        self.inputs = inputs
        self.injected = injected
        self.mem_condition = mem_condition
        self.mixture = mixture
        self.before = before
        self.views = views
        self.shows = shows
        self.drop = drop
        self.checkpoint = checkpoint
        self.tokens = tokens
        self.entered: Tensor | None = None
        # nobody listens to what enters, and nothing takes its place
        self.as_it_is = views is None and mixture is None and not shows

    def enter(self, h: Float[Tensor, '... n d']) -> Tensor:
        """What the layer sees of h: with LIMe a mixture of all that layers so far were about to see."""
        h = h if self.views is None else self.views
        if self.shows or self.mixture is not None:
            self.entered = h
        if self.mixture is None:
            return h
        mixed: Tensor = self.mixture(h, [*self.before, h])
        return mixed


@dataclass
class Carry:
    """What layers hand on to later ones.

    ``seen``: what entered each layer so far, for mixtures over depth; ``skips``: the stream that entered each layer, by layer;
    ``first_values`` and ``previous`` (scores): by kind of attention; ``first``: the stack's normed input, if layers ask for it;
    ``keys``: of the layers that others share keys and values with, which ``keys_from`` tells. ``blocks``: what entered blocks
    so far, and ``views``: what the queries, keys and values of this one are made of, with ``mudd``.
    """

    hands_on_scores: tuple[str, ...] = ()
    hands_on_values: bool = False
    mixes: bool = False
    seen: list[Tensor] = field(default_factory=list)
    skips: dict[int, Tensor] = field(default_factory=dict)
    first_values: dict[str, Tensor] = field(default_factory=dict)
    previous: dict[str, Tensor] = field(default_factory=dict)
    first: Tensor | None = None
    keys_from: Mapping[int, int] = field(default_factory=dict)
    keys: dict[int, HandedKeys] = field(default_factory=dict)
    blocks: list[Tensor] = field(default_factory=list)
    views: Tensor | None = None

    def enter(self, h: Float[Tensor, '... n d']) -> None:
        """``h`` entered a layer."""
        if self.mixes:
            self.seen.append(h)

    def take(self, step: Step, seen: Intermediates | None) -> None:
        """Keep what the next layers need of this attention."""
        if seen is None or not (self.hands_on_values or self.hands_on_scores or seen.handed is not None):
            return
        if seen.handed is not None:
            self.keys[step.layer], seen.handed = seen.handed, None
        if self.hands_on_values and step.kind not in self.first_values and seen.values is not None:
            self.first_values[step.kind] = seen.values
        scores = None if seen.maps is None or step.kind not in self.hands_on_scores else seen.maps.next_layer_scores
        if scores is not None:
            self.previous[step.kind] = scores


@dataclass
class Record:
    """What goes back to the caller, by execution step, if it was asked for. A layer that was left out has empty entries."""

    wanted: bool
    intermediates: list[Intermediates] = field(default_factory=list)
    hiddens: list[Tensor] = field(default_factory=list)
    layer_hiddens: list[Tensor] = field(default_factory=list)
    block_hiddens: list[Tensor] = field(default_factory=list)
    cache: KVCache | None = None
    expert_loss: Float[Tensor, ''] | None = None

    def enter(self, step: Step, h: Float[Tensor, '... n d'], injected: Float[Tensor, 'b #n d'] | None) -> None:
        """``h`` is about to enter the layer: (b n d), or one each for queries, keys and values; ``injected`` is added to it."""
        if not self.wanted:
            return
        self.layer_hiddens.append(h)
        if step.kind == 'a':
            # a memory is looked at through keys and values, as the tokens were
            h = h if h.ndim == 3 else h[1:].mean(dim=0)
            self.hiddens.append(h if injected is None else h + injected)

    def leave(self, step: Step, seen: Intermediates | None) -> None:
        if seen is not None and seen.expert_loss is not None:
            self.expert_loss = seen.expert_loss if self.expert_loss is None else self.expert_loss + seen.expert_loss
        if not self.wanted or step.kind not in ATTENTIONS:
            return
        seen = Intermediates() if seen is None else seen
        seen.layer_type = step.kind
        self.intermediates.append(seen)

    def leave_out(self, step: Step) -> None:
        """The layer was dropped; a cache that misses a layer cannot be continued."""
        self.leave(step, None)
        self.cache = None

    def report(self, last: Float[Tensor, '... n d'], length: int) -> LayerIntermediates:
        return LayerIntermediates(
            hiddens=self.hiddens,
            last_hidden=last,
            attn_intermediates=self.intermediates,
            layer_hiddens=self.layer_hiddens,
            block_hiddens=self.block_hiddens,
            cache_length=length,
            kv_cache=self.cache,
            expert_loss=self.expert_loss,
        )
