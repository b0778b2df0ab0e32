"""The arguments of a model's forward, and their validation before any computation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from x_transformers.cache.kv_cache import Cache, KVCache
from x_transformers.embedding.ids import token_ids
from x_transformers.embedding.token import check_mask
from x_transformers.helpers import default, is_any, values_known
from x_transformers.layers.arguments import (
    DECLARED,
    Argument,
    argument,
    arguments_of,
    check_number,
    needs_of,
    plain_argument,
    without_needed,
)
from x_transformers.layers.checks import check_names, check_prefix, check_steps, is_int
from x_transformers.layers.plan import ATTENTIONS
from x_transformers.notices import warn_inert
from x_transformers.randomness import sorted_places
from x_transformers.tensor_types import Bool, Float, Int, Shaped

Memories = Sequence[Float[Tensor, 'b l d']]


# of the forward of a model of tokens, what is no field of ``ModelArgs``
ARGUMENTS = {
    'x': 'Token ids; None if there are only `prepend_embeds`.',
    'attn_z_loss_weight': 'Weight of the attention z-loss; None: the value of the constructor.',
    'transform_block_inputs': 'Functions that change the input of a block, by the number of the executed block, or one '
    'function (number, x). The function of block 1 changes the token embeddings, unless `transform_token_embeds` is given.',
    'kwargs': 'Arguments of the stack: `context`, `context_mask`, `attn_mask`, `condition`, ...',
}


@dataclass(frozen=True)
class ModelArgs:
    """The arguments of one forward, without those that say what is returned.

    ``x`` is what the sequence's length is read from: token ids (b n), vectors (b n d), or one of several inputs.
    """

    x: Tensor
    mask: Bool[Tensor, 'b n'] | None = None
    lens: Int[Tensor, ' b'] | None = argument('b', 'Number of tokens in each row.')
    numbers: Float[Tensor, 'b n'] | None = argument('b n', 'Values of the number tokens.', each_call=False)
    mems: Sequence[Float[Tensor, 'b l d']] | None = None
    mem_masks: Sequence[Bool[Tensor, 'b l']] | None = None
    recycle_steps: int | None = plain_argument(None, 'Number of times the output is fed back, with `recycling`.')
    loop: Any = None
    pos: Tensor | None = plain_argument(None, 'Position ids of the tokens; with a floating dtype, their position embeddings.')
    prepend_embeds: Float[Tensor, 'b p e'] | None = argument(
        'b p e', 'Embeddings in front of the tokens. Their outputs are returned as well.'
    )
    prepend_mask: Bool[Tensor, '#b p'] | None = argument(
        'b p', 'True for prepended embeddings that may be attended to.', needs='prepend_embeds'
    )
    embed_ids: Mapping[str, Int[Tensor, 'b n']] = argument(
        'b n', 'Ids for each table of `embed_num_tokens`, by name.', default=dict
    )
    sum_embeds: Float[Tensor, '#b #n e'] | None = argument(
        'e | n e | b n e', 'Embeddings that are added to the token embeddings.'
    )
    seq_start_pos: Int[Tensor, ' b'] | None = None
    cache: KVCache | None = plain_argument(
        None,
        'A `KVCache`, or the intermediates of an earlier call. With it, `x` holds the new tokens only, or the whole sequence; '
        'then only the tokens that the cache lacks are processed.',
    )
    new_only: bool = False
    cache_age: int | None = None
    token_emb_kwargs: Mapping[str, Any] = plain_argument(dict, 'Keywords that are passed to your own `token_emb`.')
    to_logits_kwargs: Mapping[str, Any] = plain_argument(dict, 'Keywords that are passed to your own `to_logits`.')
    logits_last: int | None = plain_argument(None, 'Number of last positions to compute logits for; None: all.')
    excise_prepend_embeds: bool = plain_argument(False, 'Leave the prepended embeddings out of the output.')
    detach_mems: bool = plain_argument(True, 'Detach the returned memories.')
    transform_token_embeds: Callable[[Tensor], Tensor] | None = plain_argument(
        None, 'Function that changes the token embeddings before positions are added.'
    )
    more: dict[str, Any] = field(default_factory=dict)
    # what the model is to remember of the new tokens (b n …), by name
    kept: dict[str, Tensor] = field(default_factory=dict)

    @property
    def pos_ids(self) -> Int[Tensor, '...'] | None:
        """Positions as numbers; those of floating dtype are embeddings already."""
        return None if self.pos is None or self.pos.is_floating_point() else self.pos

    @property
    def prepended(self) -> int:
        """How many embeddings stand in front of the tokens."""
        return rows_in_front(self.prepend_embeds)


# of every model, and of the stack that its other keywords go to
OF_MODELS: dict[str, Argument] = DECLARED | arguments_of(ModelArgs)
CALLED = tuple(each.name for each in fields(ModelArgs) if each.name != 'x')
NEEDS = needs_of(ModelArgs)


def along_tokens(name: str, value: Any) -> bool:
    """Whether an argument speaks of single tokens, or of rows in front of them: by its axes, or as a count of tokens."""
    declared = OF_MODELS.get(name)
    if declared is None:
        return False
    letters = declared.form(value) if isinstance(value, Tensor) else declared.axes.replace('|', ' ').split()
    return letters == ['b'] or not {'n', 'i', 'p', 'l'}.isdisjoint(letters)


def rows_in_front(embeds: Any) -> int:
    """How many embeddings are prepended."""
    if embeds is None:
        return 0
    if not isinstance(embeds, Tensor) or embeds.ndim != 3 or not embeds.is_floating_point():
        got = f'{embeds.dtype} of shape {tuple(embeds.shape)}' if isinstance(embeds, Tensor) else f'a {type(embeds).__name__}'
        raise TypeError(f'prepend_embeds must be a floating tensor (batch, length, width), got {got}.')
    return embeds.shape[1]


def call_of(model: Any, x: Any, keywords: Mapping[str, Any], **changed: Any) -> ModelArgs:
    """The arguments of a forward in one object: of its keywords those that ``ModelArgs`` has, ``changed`` in place of them, and
    ``kwargs``, which go to the stack as they are.

    A forward writes them out: older compilers of torch cannot read ``locals()`` of a function that another one calls.
    """
    more = keywords['kwargs']
    if more:
        check_names(model, more)
    arguments = {name: keywords[name] for name in CALLED if keywords.get(name) is not None} | changed
    mems, mem_masks = keywords['mems'], keywords['mem_masks']
    # memories of no length are none, and have no masks
    if check_list(mems, 'mems') and not any(mem is not None and mem.shape[1] for mem in mems or ()):
        mems = mem_masks = None
    check_list(mem_masks, 'mem_masks')
    check_number('cache_age', more.get('cache_age'), low=0)
    if isinstance(added := arguments.get('sum_embeds'), Tensor):
        # what is added may have fewer axes, as in any sum
        arguments['sum_embeds'] = added[(None,) * (3 - added.ndim)]
    arguments['mems'] = moved_down(mems, model.shift_mem_down)
    arguments['mem_masks'] = moved_down(mem_masks, model.shift_mem_down)
    arguments['cache'] = KVCache.of(keywords['cache'], attention_steps(model.attn_layers, keywords['cache'], more))
    arguments['new_only'] = default(keywords['input_not_include_cache'], model.input_not_include_cache)
    arguments['cache_age'] = more.pop('cache_age', None)
    return ModelArgs(x, more=more, **arguments)


def attention_steps(stack: Any, cache: Cache, more: Mapping[str, Any]) -> list[int] | None:
    """The steps that the keys of intermediates put together by hand belong to."""
    if cache is None or isinstance(cache, KVCache):
        return None
    order, repeats = more.get('layers_execute_order'), more.get('repeat_blocks')
    return [step.index for step in check_steps(stack, order, repeats) if step.kind in ATTENTIONS]


def randomly_placed(call: ModelArgs, among: int) -> ModelArgs:
    """The call with positions of memories and tokens drawn from 0 … ``among`` - 1, unless it says where they are."""
    if call.pos is not None or call.cache is not None:
        return call
    count = call.x.shape[1] + longest(call.mems)
    if count > among:
        raise ValueError(
            f'randomized_positions must be at least the number of tokens, got {among} for {count}. Enlarge it, or cut x.'
        )
    return replace(call, pos=sorted_places(count, among, call.x.device))


def longest(mems: Memories | None) -> int:
    """How many rows the longest of the memories has."""
    return max([0, *(mem.shape[1] for mem in mems or ())])


def last_positions(t: Shaped[Tensor, 'b n ...'], count: int | None) -> Tensor:
    return t if count is None or count >= t.shape[1] else t[:, t.shape[1] - count :]


def ids_or_none(
    x: Int[Tensor, 'b n ...'] | None, prepend_embeds: Float[Tensor, 'b p e'] | None, *, own_table: bool = False
) -> Int[Tensor, 'b n']:
    """The token ids; no tokens at all where only embeddings were given. A table of the user's own may read more axes."""
    if x is None:
        if rows_in_front(prepend_embeds) == 0 or prepend_embeds is None:
            raise ValueError('x is None: without token ids there must be prepend_embeds.')
        return torch.empty(prepend_embeds.shape[0], 0, dtype=torch.long, device=prepend_embeds.device)
    if not own_table or not isinstance(x, Tensor):
        x = token_ids(x)
    if x.ndim < 2 or (x.ndim > 2 and not own_table):
        raise ValueError(f'x must be a batch of sequences (b n), got shape {tuple(x.shape)}. A single one is x.unsqueeze(0).')
    return x


def check_list(entries: Any, name: str) -> bool:
    """Whether there is a list with an entry for each self attention."""
    if entries is not None and not isinstance(entries, (list, tuple)):
        raise TypeError(f'{name} must be a list with one tensor for each self attention, got {type(entries).__name__}')
    for index, entry in enumerate(entries or ()):
        if entry is not None and (not isinstance(entry, Tensor) or entry.ndim < 2):
            got = tuple(entry.shape) if isinstance(entry, Tensor) else type(entry).__name__
            raise TypeError(f'{name}[{index}] must be a tensor (batch, memories, ...) or None, got {got}')
    return entries is not None


def moved_down(entries: Sequence[Any] | None, layers: int) -> list[Any] | None:
    """What belongs to memories, as the layers see them: layer i looks at those of layer i + ``layers``."""
    return None if entries is None else [*entries[layers:], *entries[:layers]]


def no_padding(
    h: Float[Tensor, 'b n d'], mask: Bool[Tensor, '#b m'] | None, start: Int[Tensor, ' b'] | None
) -> Bool[Tensor, 'b n'] | None:
    """Which rows of a stack are no padding, by a mask over those seen and these, or by where each sequence starts."""
    shown = None if mask is None else mask[:, mask.shape[1] - h.shape[1] :].expand(h.shape[0], -1)
    if start is None:
        return shown
    behind = torch.arange(h.shape[1], device=h.device) >= start.unsqueeze(-1)
    return behind if shown is None else shown & behind


def check_added(call: ModelArgs, batch: int, dim: int, absolute: bool) -> None:
    """Positions, and what is added to the embeddings, fit batch and width. Lengths are checked where they are cut."""
    start = call.seq_start_pos
    if start is not None and not isinstance(start, Tensor):
        raise TypeError(f'seq_start_pos must be a tensor of whole numbers, one per row, got a {type(start).__name__}.')
    if start is not None and (start.shape != (batch,) or not is_int(start, 1)):
        raise ValueError(
            f'seq_start_pos must be one whole number per row, ({batch},), got {start.dtype} of shape {tuple(start.shape)}.'
        )
    if start is not None and start.numel() and values_known(start) and call.cache is None:
        low, high, length = int(start.min()), int(start.max()), call.x.shape[1]
        if low < 0 or high > length:
            raise ValueError(
                f'seq_start_pos must lie in 0 … {length}, the tokens of a row, got {low} to {high}. It counts the pads '
                'in front of each row.'
            )
    if call.prepend_embeds is None and call.prepend_mask is not None:
        width = call.prepend_mask.shape[-1] if isinstance(call.prepend_mask, Tensor) and call.prepend_mask.ndim else 0
        check_mask(call.prepend_mask, batch, width, 'prepend_mask', 'one entry per prepended embedding')
    # behind a cache they may speak of what is in it
    for name, needed in without_needed(call, NEEDS) if call.cache is None else ():
        warn_inert('forward', [f'`{name}` does nothing without `{needed}`. Give these, or leave this out.'])
    check_prefix(call.more.get('prefix_attn_len'), batch)
    if call.pos is not None:
        if not isinstance(call.pos, Tensor) or call.pos.is_complex():
            got = call.pos.dtype if isinstance(call.pos, Tensor) else f'a {type(call.pos).__name__}'
            raise TypeError(f'pos must be a tensor of positions or of their embeddings, got {got}.')
        axes = call.pos.shape[:-1] if call.pos_ids is not None else call.pos.shape[:-2]
        # of (b h n) the stack says whether it has heads with positions of their own
        fits = (not axes or is_any(axes[0], 1, batch)) and len(axes) <= (2 if call.pos_ids is not None else 1)
        if call.pos.ndim == 0 or not fits:
            raise ValueError(
                f'pos must be one position per token, (n) or ({batch} n), or their embeddings, (n e) or ({batch} n e), '
                f'got {call.pos.dtype} of shape {tuple(call.pos.shape)}.'
            )
        if absolute and call.pos_ids is not None and call.pos.ndim == 3:
            raise ValueError(
                'pos must be (tokens,) or (batch, tokens) for absolute positions, which are added to tokens, got (b h n). '
                'Build the model with use_abs_pos_emb=False.'
            )
        if call.pos_ids is None and not is_any(call.pos.shape[-1], 1, dim):
            raise ValueError(
                f'pos must be of width {dim} if it is of floating dtype, as it holds embeddings, got '
                f'{tuple(call.pos.shape)}. Pass whole numbers, or embeddings of that width.'
            )
    added = call.sum_embeds
    if added is not None and (not isinstance(added, Tensor) or not added.is_floating_point()):
        got = added.dtype if isinstance(added, Tensor) else f'a {type(added).__name__}'
        raise TypeError(f'sum_embeds must be a floating tensor ({batch}, tokens, {dim}), got {got}.')
    if added is not None and (added.ndim != 3 or not (is_any(added.shape[0], 1, batch) and is_any(added.shape[-1], 1, dim))):
        raise ValueError(f'sum_embeds must have shape ({batch}, tokens, {dim}), got {tuple(added.shape)}.')


def check_last(count: int, is_sequence: bool) -> None:
    """``logits_last`` asks for one position at least, of a model that reads each position."""
    if not is_sequence:
        raise ValueError(f'logits_last must be None for a model with logits of pooled tokens, got {count}.')
    check_number('logits_last', count, low=1)


def check_prepended(embeds: Float[Tensor, 'b p e'], mask: Bool[Tensor, 'b p'] | None, batch: int, dim: int) -> None:
    if embeds.shape[0] != batch or embeds.shape[-1] != dim:
        raise ValueError(f'prepend_embeds must have shape ({batch}, length, {dim}), got {tuple(embeds.shape)}.')
    check_mask(mask, batch, embeds.shape[1], 'prepend_mask', 'one entry per prepended embedding')


def check_projected(name: str, vectors: Any, x: Shaped[Tensor, 'b n ...'], width: int) -> None:
    """What a module of the caller's makes of its inputs is a vector for each place."""
    expected = (*x.shape[:2], width)
    if not isinstance(vectors, Tensor) or vectors.shape != expected or not vectors.is_floating_point():
        got = f'{vectors.dtype} of shape {tuple(vectors.shape)}' if isinstance(vectors, Tensor) else type(vectors).__name__
        raise ValueError(f'{name} must give a vector of width {width} for each place of x, {expected}, got {got}.')


def check_frames(x: Float[Tensor, 'b n d'], width: int | None = None) -> None:
    """Frames are a batch of sequences of vectors."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f'x must be a tensor of floating dtype, got {kind}. Token ids go through TransformerWrapper.')
    if x.ndim != 3:
        raise ValueError(f'x must be a batch of sequences of vectors (b n d), got shape {tuple(x.shape)}')
    if width is not None and x.shape[-1] != width:
        raise ValueError(f'x must hold vectors of width {width}, got shape {tuple(x.shape)}')
