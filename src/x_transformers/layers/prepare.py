"""From a forward's keywords to ``Inputs``: what all layers share is made here, once per call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.attention.mask import Mask, PackedSequences, Placed, places
from x_transformers.cache.kv_cache import Cursor, KVCache
from x_transformers.helpers import exists
from x_transformers.layers.across_depth import injection
from x_transformers.layers.call import OWN_STEP, Given, Inputs, SelfMasks, Span, counted
from x_transformers.layers.checks import (
    check_cache,
    check_call,
    check_history,
    check_input,
    check_steps,
    is_float,
    runs_causally,
    shape_of,
)
from x_transformers.layers.condition import of_memories, read_condition
from x_transformers.layers.external import external_keys
from x_transformers.layers.repeat import block_transform
from x_transformers.tensor_types import Bool, Float, Int

if TYPE_CHECKING:
    from x_transformers.layers.stack import AttentionLayers
    from x_transformers.position.bias import Bias
    from x_transformers.position.positions import Positions


def prepare(stack: AttentionLayers, x: Float[Tensor, 'b n d'], given: Given) -> tuple[Float[Tensor, 'b m d'], Inputs]:
    """(the tokens that are new, everything else that the layers need).

    Raises ValueError or TypeError, before anything is computed, if an argument does not fit the stack or another argument.
    """
    check_input(stack, x)
    # once for a text: a cache that this stack has handed out has passed
    passed = getattr(given.cache, 'known', None) == id(stack)
    if not passed:
        check_cache(stack, given)
    steps = check_steps(stack, given.layers_execute_order, given.repeat_blocks)
    cache = KVCache.of(given.cache, [step.index for step in steps if step.kind != 'f'])
    if cache is not None and not passed:
        check_history(stack, cache, steps)
    span = read_span(x, given, cache)
    check_call(stack, given, span, steps)
    normed_mems = span.mems if stack.norm_need_condition else 0
    condition = read_condition(given.condition, stack.need_condition, stack.dim_condition, span.batch, span.given, normed_mems)
    extra = external_keys(stack, given, steps, span.batch)
    working = cache.fork() if cache is not None else KVCache() if given.return_hiddens else None
    if working is not None:
        working.pos_offset = pos_offset(given, cache)
        working.known = None if cache is None else id(stack)
    x = span.newest(x) if span.new != span.given else x
    pos = custom_positions(stack, given, span, working)
    starts = start_mask(given, span)
    base = self_mask(stack, given, span, working, starts)
    cross_places = cross_positions(stack, given, span, pos, working)
    places = positions(stack, given, span, pos, working, base.keys)
    mems = tuple(given.mems or ())
    if condition is not None and stack.adaptive_mlp is not None:
        condition = stack.adaptive_mlp(condition)
    inputs = Inputs(
        steps=steps,
        span=span,
        masks=SelfMasks(base, span.held, mems, tuple(given.mem_masks or ())),
        cross_mask=Mask(keys=given.context_mask),
        # as what is prepended, a context of another precision is read in that of the sequence
        context=given.context if given.context is None else given.context.to(x.dtype),
        rows=None if given.mask is None else span.newest(given.mask),
        padding=padding(given, span, starts),
        shift_padding=shift_padding(stack, given, span, starts, working),
        bias=position_bias(stack, given, span, pos, working),
        positions=places,
        positions_of_layers=positions_of_layers(stack, given, span, pos, working, base.keys, places),
        cross_positions=cross_places,
        cross_positions_of_layers=cross_positions_of_layers(stack, given, span, pos, working, cross_places),
        mems=mems,
        extra=extra,
        self_kv_shift=kv_shifts(given.self_attn_kv_residuals, span),
        cross_kv_shift=kv_shifts(given.cross_attn_kv_residuals),
        packed=packed(given.flash_pack_seq_kwargs, runs_causally(stack, given)),
        cross_packed=packed(given.flash_pack_seq_context_kwargs, False),
        condition=None if condition is None else span.newest(condition),
        mem_condition=None if condition is None or not normed_mems else of_memories(condition, normed_mems),
        injected=injection(x, in_attn_condition(given, span), stack.reinject_input_proj, stack.learned_reinject_input_gate),
        deep_table=given.deep_embeds_and_ids[0] if given.deep_embeds_and_ids else None,
        deep_ids=span.newest(given.deep_embeds_and_ids[1]) if given.deep_embeds_and_ids else None,
        cache=working,
        transform_block=block_transform(given.transform_block_inputs),
        continues=cache is not None and span.past > 0,
        return_attn=given.return_hiddens,
        causal=given.causal,
        log_probs=given.return_gumbel_log_probs and given.return_hiddens,
    )
    return x, inputs


# ---------------------------------------------------------------- where the tokens lie


def read_span(x: Float[Tensor, 'b n d'], given: Given, cache: KVCache | None) -> Span:
    """Which of the tokens are new, and where they lie."""
    batch, length = x.shape[:2]
    offset = pos_offset(given, cache)
    if cache is not None and cache.cursor is not None:
        return fixed_span(batch, length, given, cache, cache.cursor, offset)
    past = 0 if cache is None else cache.retained
    if cache is not None and past:
        check_batch(cache, batch)
    new = unseen(length, past, given) if cache is not None else length
    mems = memory_length(given)
    dropped = 0 if cache is None else cache.length - past
    before = 0 if cache is None else cache.uncounted
    return Span(
        batch=batch,
        given=length,
        new=new,
        past=past,
        mems=mems,
        begin=dropped + before + offset,
        dropped=dropped,
        uncounted=before,
    )


def pos_offset(given: Given, cache: KVCache | None) -> int:
    """What is added to counted positions. The cache keeps it, for a sequence that goes on."""
    if given.seq_pos_offset is not None:
        return given.seq_pos_offset
    return 0 if cache is None else cache.pos_offset


def fixed_span(batch: int, length: int, given: Given, cache: KVCache, cursor: Cursor, offset: int) -> Span:
    """Behind a cache of fixed capacity all of x is new, and everything that depends on how far it is written is a tensor."""
    if length > cursor.capacity:
        raise ValueError(f'x must be at most the {cursor.capacity} tokens that the cache has room for, got {length}')
    dropped = cursor.seen - cursor.row
    return Span(
        batch=batch,
        given=length,
        new=length,
        past=cursor.capacity - length,
        mems=memory_length(given),
        begin=dropped + (offset + cache.uncounted) if offset + cache.uncounted else dropped,
        dropped=dropped,
        placed=cursor.row,
        uncounted=cache.uncounted,
    )


def memory_length(given: Given) -> int:
    entries = () if given.mems is None or isinstance(given.mems, Tensor) else given.mems
    return max([0, *[mem.shape[1] for mem in entries if isinstance(mem, Tensor) and mem.ndim == 3]])


def unseen(length: int, past: int, given: Given) -> int:
    """How many of ``length`` tokens come after the ``past`` ones."""
    if given.input_not_include_cache:
        return length
    if given.cache_age != 1:
        if not 0 <= given.cache_age <= length:
            raise ValueError(
                f'cache_age={given.cache_age} asks for the last {given.cache_age} tokens of x, which has {length}: '
                'it must lie between 0 (all of them) and that number'
            )
        return given.cache_age or length
    return length if length <= past else length - past


def check_batch(cache: KVCache, batch: int) -> None:
    for layer in cache:
        for tape in layer.tapes.values():
            if tape.batch != batch:
                raise ValueError(
                    f'the cache was made for batch {tape.batch}, but x has batch {batch}: reorder the cache to these rows'
                )
            return


# ---------------------------------------------------------------- masks


def start_mask(given: Given, span: Span) -> Bool[Tensor, 'b j'] | None:
    """Left padding, over past and new tokens: what lies before each row's start is padding."""
    start = given.seq_start_pos
    if start is None:
        return None
    return counted(span.dropped, span.held, start.device) >= start.unsqueeze(-1)


def held_mask(mask: Bool[Tensor, 'b n'] | None, span: Span, cache: KVCache | None) -> Bool[Tensor, 'b j'] | None:
    """The caller's mask over past and new tokens. The cache keeps it, so that the next call may leave out the past's."""
    known = None if cache is None or OWN_STEP not in cache.steps else cache.step(OWN_STEP).get('mask')
    if mask is None and known is None:
        return None
    if mask is None or mask.shape[1] != span.held or span.placed is not None:
        new = torch.ones(span.batch, span.new, dtype=torch.bool, device=known.device) if mask is None else span.newest(mask)  # type: ignore[union-attr]
        if span.placed is not None and cache is not None:
            (whole,) = cache.step(OWN_STEP).extend(mask=new.expand(span.batch, -1).unsqueeze(-1))
            return whole.squeeze(-1)
        past = new.new_ones(span.batch, span.past) if known is None else known.squeeze(-1)
        mask = torch.cat((past, new), dim=-1) if span.past else new
    if cache is not None:
        cache.step(OWN_STEP).replace(mask=mask.unsqueeze(-1))
    return mask


def self_mask(
    stack: AttentionLayers, given: Given, span: Span, cache: KVCache | None, starts: Bool[Tensor, 'b j'] | None
) -> Mask:
    """Who may look at whom among past and new tokens; attention adds its own causality and window."""
    keys = held_mask(given.mask if given.self_attn_kv_mask is None else given.self_attn_kv_mask, span, cache)
    if starts is not None:
        keys = starts if keys is None else keys & starts
    dense = given.attn_mask
    if dense is not None:
        dense = span.newest(dense, axis=dense.ndim - 2)
    prefix = given.prefix_attn_len
    if prefix is not None:
        if given.seq_start_pos is not None:
            # it counts tokens, and not the padding in front of them
            prefix = prefix + given.seq_start_pos
        # rows that have left the cache's window are counted too
        prefix = prefix - span.dropped
    cursor = None if cache is None else cache.cursor
    return Mask(
        causal=(stack.is_causal and not stack.causal) if given.causal is None else given.causal,
        past=None if cursor is None or cursor.reach is None else cursor.reach - 1,
        keys=keys,
        prefix=prefix,
        dense=dense,
        placed=None if cursor is None else Placed(cursor.row, span.new, span.held),
    )


def padding(given: Given, span: Span, starts: Bool[Tensor, 'b j'] | None) -> Bool[Tensor, 'b n'] | None:
    """Which new tokens are tokens."""
    mask = None if given.mask is None else span.newest(given.mask)
    if starts is None:
        return mask
    starts = span.newest(starts)
    return starts if mask is None else mask & starts


def shift_padding(
    stack: AttentionLayers, given: Given, span: Span, starts: Bool[Tensor, 'b j'] | None, cache: KVCache | None
) -> Bool[Tensor, 'b n'] | None:
    """Which new tokens feed-forward layers may take features of.

    In a causal stack nobody but padding sees what is padded on the right, and recorded outputs hold what padding sees.
    """
    tokens = padding(given, span, starts)
    if tokens is None or given.mask is None or cache is not None or not runs_causally(stack, given):
        return tokens
    followed = (tokens.flip(-1).cumsum(-1) > 0).flip(-1)
    return tokens | ~followed


def packed(kwargs: Any, causal: bool) -> PackedSequences | None:
    return None if kwargs is None else PackedSequences.of(kwargs, causal=causal)


# ---------------------------------------------------------------- positions


def custom_positions(stack: AttentionLayers, given: Given, span: Span, cache: KVCache | None) -> Tensor | None:
    """The caller's ``pos`` for memories, past and new tokens, if anything here depends on it; None: count."""
    if not stack.uses_positions:
        return None
    pos = given.pos
    known = None if cache is None or OWN_STEP not in cache.steps else cache.step(OWN_STEP).get('pos')
    if pos is None and known is None:
        return None
    if pos is not None:
        if (
            not isinstance(pos, Tensor)
            or pos.dtype == torch.bool
            or pos.ndim not in (1, 2, 3)
            or pos.shape[0] not in ((span.batch, 1) if pos.ndim > 1 else (pos.shape[0],))
        ):
            raise ValueError(f'pos must be one position per token, (tokens,) or ({span.batch}, tokens), but is {shape_of(pos)}')
        if pos.ndim == 3 and not stack.flags.alibi_pos_bias:
            raise ValueError(
                f'pos of shape {tuple(pos.shape)} has positions for each head, which only a stack with alibi_pos_bias=True has '
                f'a use for; others take (tokens,) or ({span.batch}, tokens)'
            )
        if pos.ndim == 3 and (stack.rotary_pos_emb is not None or stack.polar_pos_emb is not None):
            raise ValueError('pos of shape (batch, heads, tokens) is for ALiBi alone: all heads are rotated alike')
        if pos.ndim == 3 and pos.shape[1] not in (1, stack.flags.alibi_heads, stack.flags.heads):
            raise ValueError(
                f'pos must have positions for each of the {stack.flags.alibi_heads} heads with a bias, '
                f'({span.batch}, {stack.flags.alibi_heads}, tokens), but is {shape_of(pos)}'
            )
        if span.mems and pos.shape[-1] in (span.given, span.new) and pos.shape[-1] < span.whole:
            raise ValueError(
                f'pos has {pos.shape[-1]} positions, but keys are {span.mems} memories and {span.held} tokens: '
                f'with mems it must cover them too, {span.whole} in all'
            )
        if pos.shape[-1] not in (span.given, span.new, span.held, span.whole):
            raise ValueError(f'pos has {pos.shape[-1]} positions, but x has {span.given} tokens (pos is {shape_of(pos)})')
    if cache is not None and span.placed is not None:
        new = counted(span.begin + span.first, span.new, span.placed.device) if pos is None else pos
        return _by_head(cache.step(OWN_STEP).extend(pos=_kept(new, span))[0])
    whole = _whole_positions(pos, known, span)
    if cache is not None:
        cache.step(OWN_STEP).replace(pos=_kept(whole[..., span.mems :], span))
    return whole


def _kept(pos: Int[Tensor, '...'], span: Span) -> Int[Tensor, 'b n h']:
    """Positions (n), (b n) or (b h n) as the cache keeps them."""
    by_head = pos if pos.ndim == 3 else pos.unsqueeze(-2)
    return by_head.expand(span.batch, *by_head.shape[-2:]).transpose(1, 2)


def _by_head(kept: Int[Tensor, 'b n h']) -> Int[Tensor, '...']:
    """What ``_kept`` has made, (b n), or (b h n) where heads have positions of their own."""
    return kept.squeeze(-1) if kept.shape[-1] == 1 else kept.transpose(1, 2)


def _whole_positions(pos: Tensor | None, known: Tensor | None, span: Span) -> Tensor:
    if pos is not None and pos.shape[-1] == span.whole:
        return pos
    if pos is None:
        pos = counted(span.begin + span.first, span.new, known.device)  # type: ignore[union-attr]
    elif pos.shape[-1] == span.held:
        return pos
    pos = pos[..., pos.shape[-1] - span.new :]
    past = counted(span.begin, span.past, pos.device) if known is None else _by_head(known)
    if past.ndim == pos.ndim == 1:
        return torch.cat((past.to(pos.dtype), pos))
    # positions of rows, or of heads, are the same for those that have none of their own
    axes = max(past.ndim, pos.ndim)
    past, pos = (t.unsqueeze(1) if t.ndim == 2 and axes == 3 else t for t in (past, pos))
    outer = torch.broadcast_shapes(past.shape[:-1], pos.shape[:-1])
    return torch.cat((past.to(pos.dtype).expand(*outer, -1), pos.expand(*outer, -1)), dim=-1)


def _table(
    stack: AttentionLayers,
    span: Span,
    pos: Tensor | None,
    only_new: bool,
    begins: Int[Tensor, 'b 1'] | None = None,
    window: int | Int[Tensor, '#b 1'] = 0,
) -> Tensor:
    """Positions for a table of angles, of all keys, or of memories and new tokens; counted from where each row begins.

    ``window``: of the first token in sight, as counted from there.
    """
    if pos is not None:
        if not only_new:
            return pos
        new = span.newest(pos, axis=pos.ndim - 1)
        return torch.cat((pos[..., : span.mems], new), dim=-1) if span.mems else new
    count = span.positions(next(stack.parameters()).device, only_new)
    if not span.mems or (begins is None and isinstance(window, int)):
        return count if begins is None else count - begins
    # memories lie before the first token in sight of each row, and not before its padding
    mems = count[: span.mems] + (window - span.dropped - span.uncounted)
    tokens = count[span.mems :] if begins is None else count[span.mems :] - begins
    if mems.ndim == tokens.ndim == 1:
        return torch.cat((mems, tokens))
    rows = max(t.shape[0] for t in (mems, tokens) if t.ndim == 2)
    return torch.cat((mems.expand(rows, -1), tokens.expand(rows, -1)), dim=-1)


def window_begin(
    span: Span, begins: Int[Tensor, 'b 1'] | None, cursor: Cursor | None
) -> int | Int[Tensor, ' 1'] | Int[Tensor, 'b 1']:
    """How far behind the first token of each row the first one that the newest sees is: rows that have left, but for padding.

    Without ``begins`` rows begin at 0.
    """
    gone = span.dropped + span.uncounted if span.uncounted else span.dropped
    if cursor is not None and cursor.reach is not None:
        gone = gone + (cursor.row + span.new - cursor.reach).clamp(min=0)
    return gone if begins is None or (isinstance(gone, int) and gone == 0) else (gone - begins).clamp(min=0)


def packed_positions(given: Given, span: Span) -> Int[Tensor, '1 n'] | None:
    """Every packed sequence begins anew."""
    sequences = packed(given.flash_pack_seq_kwargs, False)
    return None if sequences is None else places(sequences.starts_q, span.given)


def seen_so_far(span: Span, seen: Bool[Tensor, 'b j'] | None) -> Bool[Tensor, '#b j'] | None:
    """``seen`` without the rows of a fixed capacity that are not yet written."""
    if span.placed is None:
        return seen
    written = torch.arange(span.held, device=span.placed.device) < span.placed + span.new
    return written[None] if seen is None else seen & written


def from_outside(given: Given) -> bool:
    """Whether queries meet keys whose places do not move along with theirs."""
    return given.self_attn_additional_kv is not None or given.context_pos is not None


def row_begins(stack: AttentionLayers, given: Given, span: Span, cache: KVCache | None) -> Int[Tensor, 'b 1'] | None:
    """Where rows with padding on the left begin, if that counts; the cache keeps what the first keys were turned by."""
    if not (stack.depends_on_places or from_outside(given) or (span.mems and stack.uses_positions)):
        return None
    # also where the padding is out of sight, and nobody speaks of it any more
    known = None if cache is None or OWN_STEP not in cache.steps else cache.step(OWN_STEP).get('begins')
    if known is None:
        if given.seq_start_pos is None:
            return None
        known = given.seq_start_pos[:, None, None]
        if cache is not None:
            cache.step(OWN_STEP).fixed('begins', known)
    return known[:, 0]


def rotates_only_new(stack: AttentionLayers, cache: KVCache | None) -> bool:
    """Whether keys of the past have been rotated: not those made of a latent, nor those cached by hand."""
    rotary = stack.rotary_pos_emb
    latent = any(flags.use_latent_kv for flags in stack.flags.attentions)
    if rotary is None or rotary.scale is not None or latent or not keys_last(stack):
        return False
    tapes = [] if cache is None else [layer.tapes for layer in cache]
    return all('angles' in held for held in tapes if 'k' in held and not held['k'].fixed)


def keys_last(stack: AttentionLayers) -> bool:
    """Whether a key that is turned stays what it is: not if the length counts, nor where places count from the window's
    beginning and what queries meet there (contextual positions) cannot be turned along."""
    rotaries: list[Any] = [stack.rotary_pos_emb, *(stack.other_rotaries or ())]
    by_length = any(rotary.depends_on_length for rotary in rotaries)
    return not by_length and not any(flags.use_cope for flags in stack.flags.attentions)


def positions(
    stack: AttentionLayers,
    given: Given,
    span: Span,
    pos: Tensor | None,
    cache: KVCache | None,
    seen: Bool[Tensor, 'b j'] | None,
    embedding: Any = None,
) -> Positions | None:
    """Where queries and keys of self attention are. ``seen``: which of past and new are tokens.

    ``embedding``: of the rotary positions, where layers have several; None: that of the first.
    """
    rotary, polar = given.rotary_pos_emb, given.polar_pos_emb
    if rotary is not None and polar is not None:
        raise ValueError('rotary_pos_emb and polar_pos_emb were both given: keys are rotated or polar, not both')
    if not any(exists(part) for part in (rotary, polar, stack.rotary_pos_emb, stack.polar_pos_emb)):
        return None
    from x_transformers.position.positions import PolarPositions, Positions, RotaryPositions

    for ready in (rotary, polar):
        if isinstance(ready, Positions):
            return ready
    if rotary is None and polar is None:
        pos = packed_positions(given, span) if pos is None else pos
        only_new = rotates_only_new(stack, cache)
        begins = row_begins(stack, given, span, cache)
        window = window_begin(span, begins, None if cache is None else cache.cursor)
        table = _table(stack, span, pos, only_new, begins, window)
        # caller's positions are what they are; of counted ones the window's first is 0, where it matters
        counts = pos is None and not (isinstance(window, int) and window == 0)
        counts = counts and (stack.depends_on_places or from_outside(given))
        made: Positions
        if stack.polar_pos_emb is not None:
            made = PolarPositions(*stack.polar_pos_emb(table - window if counts else table))
        else:
            embedding = stack.rotary_pos_emb if embedding is None else embedding
            seen = seen_so_far(span, seen) if embedding.depends_on_length else None
            lasting = keys_last(stack)
            again = counts and not (lasting and embedding.scale is None)
            angles = embedding(table - window if again else table, centred=not from_outside(given), seen=seen)
            made = RotaryPositions(*angles, layout=embedding.layout, lasting=lasting)
            if counts and not again:
                first = window if isinstance(window, Tensor) else torch.tensor([window], device=table.device)
                made.begin_window(embedding(first)[0])
        if span.placed is not None and not only_new:
            made.place_queries(span.new_rows(table.device, span.mems))
        return made
    name, pair = ('rotary_pos_emb', rotary) if polar is None else ('polar_pos_emb', polar)
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not is_float(pair[0], 2, 3):
        raise TypeError(f'{name} must be what the embedding returns, (angles, scale or bias), but is {shape_of(pair)}')
    layout = stack.flags.rotary_layout
    return RotaryPositions(*pair, layout=layout) if polar is None else PolarPositions(*pair)


def positions_of_layers(
    stack: AttentionLayers,
    given: Given,
    span: Span,
    pos: Tensor | None,
    cache: KVCache | None,
    seen: Bool[Tensor, 'b j'] | None,
    first: Positions | None,
) -> tuple[Positions | None, ...]:
    """The positions of each layer where rotary bases or scalings differ; () where ``first`` serves all, as the caller's do."""
    if stack.other_rotaries is None or given.rotary_pos_emb is not None or given.polar_pos_emb is not None:
        return ()
    made = [first, *(positions(stack, given, span, pos, cache, seen, other) for other in stack.other_rotaries)]
    return tuple(made[which] for which in stack.rotary_of_layer)


def cross_positions_of_layers(
    stack: AttentionLayers, given: Given, span: Span, pos: Tensor | None, cache: KVCache | None, first: Positions | None
) -> tuple[Positions | None, ...]:
    """The same of the layers of cross attention."""
    if stack.other_rotaries is None or first is None:
        return ()
    made = [first, *(cross_positions(stack, given, span, pos, cache, other) for other in stack.other_rotaries)]
    return tuple(made[which] for which in stack.rotary_of_layer)


def cross_positions(
    stack: AttentionLayers, given: Given, span: Span, pos: Tensor | None, cache: KVCache | None, embedding: Any = None
) -> Positions | None:
    """Where queries and the context's keys are, if the caller says where the context is; ``embedding`` as in ``positions``."""
    if given.context_pos is None:
        return None
    from x_transformers.position.positions import RotaryPositions

    rotary: Any = stack.rotary_pos_emb if embedding is None else embedding
    pos = packed_positions(given, span) if pos is None else pos
    begins = row_begins(stack, given, span, cache)
    window = window_begin(span, begins, None if cache is None else cache.cursor)
    table = _table(stack, span, pos, True, begins, window)
    table = table - window if pos is None else table
    own = given.rotary_pos_emb or rotary(table, centred=False)
    of_context = rotary(given.context_pos, centred=False)
    return RotaryPositions(own[0], own[1], of_context, layout=rotary.layout, lasting=not rotary.depends_on_length)


def position_bias(stack: AttentionLayers, given: Given, span: Span, pos: Tensor | None, cache: KVCache | None) -> Bias | None:
    """What is added to the scores of self attention: by position, or the caller's own."""
    if stack.rel_pos is None and given.attn_bias is None:
        return None
    from x_transformers.position.bias import DenseBias
    from x_transformers.position.relative import RelativeBias

    if stack.rel_pos is None:
        bias = cast(Tensor, given.attn_bias)
        if span.mems and bias.shape[-1] == span.held:
            bias = F.pad(bias, (span.mems, 0))
        return DenseBias(span.newest(bias, axis=bias.ndim - 2))
    if given.attn_bias is not None:
        raise ValueError(
            f'attn_bias was given to a stack whose scores already have a bias ({stack.flags.position_bias}): '
            'leave out one of them, or add your own to a bias module'
        )
    if pos is None and span.mems:
        begins = row_begins(stack, given, span, cache)
        window = window_begin(span, begins, None if cache is None else cache.cursor)
        pos = None if begins is None and isinstance(window, int) else _table(stack, span, None, False, begins, window)
    if span.placed is None:
        return RelativeBias(stack.rel_pos, positions=pos)
    if pos is None:
        pos = span.positions(span.placed.device)
    return RelativeBias(stack.rel_pos, positions=pos, queries=span.new_rows(pos.device, span.mems))


# ---------------------------------------------------------------- conditions, what is added


def in_attn_condition(given: Given, span: Span) -> Tensor | None:
    cond = given.in_attn_cond
    if cond is None:
        return None
    return cond.unsqueeze(1) if cond.ndim == 2 else span.newest(cond)


def kv_shifts(shifts: Tensor | None, span: Span | None = None) -> tuple[Tensor, ...]:
    """One for each layer of the kind; three axes are for the first layer alone."""
    if shifts is None:
        return ()
    shifts = shifts.unsqueeze(0) if shifts.ndim == 3 else shifts
    if span is not None and shifts.shape[2] != 1:
        shifts = span.newest(shifts, axis=2)
    return tuple(shifts.unbind(0))
