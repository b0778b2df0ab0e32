"""The positions of one call: of tokens, cached tokens and a context, and biases by position."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.attention.mask import PackedSequences, places
from x_transformers.cache.cursor import Cursor
from x_transformers.cache.kv_cache import KVCache
from x_transformers.helpers import counted, exists, is_any
from x_transformers.layers.arguments import StackArgs
from x_transformers.layers.call import OWN_STEP, Span
from x_transformers.layers.checks import (
    is_float,
    shape_of,
)
from x_transformers.tensor_types import Bool, Int

if TYPE_CHECKING:
    from x_transformers.layers.parts import StackParts
    from x_transformers.position.bias import Bias
    from x_transformers.position.positions import Positions


def custom_positions(stack: StackParts, args: StackArgs, span: Span, cache: KVCache | None) -> Tensor | None:
    """The caller's ``pos`` for memories, past and new tokens, if anything here depends on it; None: count."""
    if not stack.uses_positions:
        return None
    pos = args.pos
    known = None if cache is None or OWN_STEP not in cache.steps else cache.step(OWN_STEP).get('pos')
    if pos is None and known is None:
        return None
    if pos is not None:
        if (
            not isinstance(pos, Tensor)
            or pos.dtype == torch.bool
            or pos.ndim not in (1, 2, 3)
            or (pos.ndim > 1 and not is_any(pos.shape[0], span.batch, 1))
        ):
            raise ValueError(f'pos must be one position per token, (tokens,) or ({span.batch}, tokens), got {shape_of(pos)}')
        if pos.ndim == 3 and not stack.flags.alibi_pos_bias:
            raise ValueError(
                f'pos must be (tokens,) or ({span.batch}, tokens) without alibi_pos_bias=True, got {tuple(pos.shape)}: '
                'positions for each head are for ALiBi. Pass those of the tokens.'
            )
        if pos.ndim == 3 and (stack.rotary_pos_emb is not None or stack.polar_pos_emb is not None):
            raise ValueError(
                'pos must be (tokens,) or (batch, tokens) with rotary or polar positions, which rotate all heads alike, '
                'got (batch, heads, tokens). Pass those of the tokens.'
            )
        if pos.ndim == 3 and not is_any(pos.shape[1], 1, stack.flags.alibi_heads, stack.flags.heads):
            raise ValueError(
                f'pos must have positions for each of the {stack.flags.alibi_heads} heads with a bias, '
                f'({span.batch}, {stack.flags.alibi_heads}, tokens), got {shape_of(pos)}'
            )
        if span.mems and is_any(pos.shape[-1], span.length, span.new) and pos.shape[-1] < span.whole:
            raise ValueError(
                f'pos must have {span.whole} positions with mems, those of {span.mems} memories and {span.held} tokens, got '
                f'{pos.shape[-1]}. Pass those of the memories too.'
            )
        if not is_any(pos.shape[-1], span.length, span.new, span.held, span.whole):
            raise ValueError(
                f'pos must have one position for each of {span.length} tokens of x, got {pos.shape[-1]} (pos is '
                f'{shape_of(pos)}). Pass as many.'
            )
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


def _whole_positions(pos: Int[Tensor, '... n'] | None, known: Int[Tensor, 'b p h'] | None, span: Span) -> Tensor:
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
    stack: StackParts,
    span: Span,
    pos: Int[Tensor, '... n'] | None,
    only_new: bool,
    begins: Int[Tensor, 'b 1'] | None = None,
    window: int | Int[Tensor, '...'] = 0,
) -> Tensor:
    """Positions for a table of angles, of all keys, or of memories and new tokens; counted from where each row begins.

    ``window``: of the first token in sight, as counted from there.
    """
    if pos is not None:
        if not only_new:
            return pos
        new = span.newest(pos, axis=pos.ndim - 1)
        return torch.cat((pos[..., : span.mems], new), dim=-1) if span.mems else new
    count = span.positions(span.device, only_new)
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


def packed(kwargs: Any, causal: bool) -> PackedSequences | None:
    return None if kwargs is None else PackedSequences.of(kwargs, causal=causal)


def packed_positions(args: StackArgs, span: Span) -> Int[Tensor, '1 n'] | None:
    """Every packed sequence begins anew."""
    sequences = packed(args.flash_pack_seq_kwargs, False)
    return None if sequences is None else places(sequences.starts_q, span.length)


def seen_so_far(span: Span, seen: Bool[Tensor, 'b j'] | None) -> Bool[Tensor, '#b j'] | None:
    """``seen`` without the rows of a fixed capacity that are not yet written."""
    if span.placed is None:
        return seen
    written = torch.arange(span.held, device=span.placed.device) < span.placed + span.new
    return written[None] if seen is None else seen & written


def from_outside(args: StackArgs) -> bool:
    """Whether queries meet keys whose places do not move along with theirs."""
    return args.self_attn_additional_kv is not None or args.context_pos is not None


def row_begins(stack: StackParts, args: StackArgs, span: Span, cache: KVCache | None) -> Int[Tensor, 'b 1'] | None:
    """Where rows with padding on the left begin, if that counts; the cache keeps what the first keys were turned by."""
    if not (stack.depends_on_places or from_outside(args) or (span.mems and stack.uses_positions)):
        return None
    # also where the padding is out of sight, and nobody speaks of it any more
    known = None if cache is None or OWN_STEP not in cache.steps else cache.step(OWN_STEP).get('begins')
    if known is None:
        if args.seq_start_pos is None:
            return None
        known = args.seq_start_pos[:, None, None]
        if cache is not None:
            cache.step(OWN_STEP).fixed('begins', known)
    return known[:, 0]


def rotates_only_new(stack: StackParts, args: StackArgs, cache: KVCache | None) -> bool:
    """Whether keys of the past have been rotated: not those made of a latent, cached by hand, or at one place in some calls."""
    rotary = stack.rotary_pos_emb
    latent = any(flags.caches_latent for flags in stack.flags.attentions)
    if rotary is None or rotary.scale is not None or latent or args.one_place is not None or not keys_last(stack):
        return False
    tapes = [] if cache is None else [layer.tapes for layer in cache]
    return all('angles' in held for held in tapes if 'k' in held and not held['k'].fixed)


def keys_last(stack: StackParts) -> bool:
    """Whether a key that is turned stays what it is: not if the length counts, nor where places count from the window's
    beginning and that turns keys otherwise (on a grid), or what queries meet (contextual positions) cannot be turned along."""
    rotaries: list[Any] = [stack.rotary_pos_emb, *(stack.other_rotaries or ())]
    moving = any(rotary.depends_on_length or not rotary.by_distance for rotary in rotaries)
    return not moving and not any(flags.use_cope for flags in stack.flags.attentions)


def positions(
    stack: StackParts,
    args: StackArgs,
    span: Span,
    pos: Int[Tensor, '... n'] | None,
    cache: KVCache | None,
    seen: Bool[Tensor, 'b j'] | None,
    embedding: Any = None,
) -> Positions | None:
    """Where queries and keys of self attention are. ``seen``: which of past and new are tokens.

    ``embedding``: of the rotary positions, where layers have several; None: that of the first.
    """
    rotary, polar = args.rotary_pos_emb, args.polar_pos_emb
    if rotary is not None and polar is not None:
        raise ValueError(
            'rotary_pos_emb and polar_pos_emb must not both be given: keys are rotated or polar. Leave out one of them.'
        )
    if not any(exists(part) for part in (rotary, polar, stack.rotary_pos_emb, stack.polar_pos_emb)):
        return None
    from x_transformers.position.positions import PolarPositions, Positions, RotaryPositions

    for ready in (rotary, polar):
        if isinstance(ready, Positions):
            return ready
    if rotary is None and polar is None:
        pos = packed_positions(args, span) if pos is None else pos
        only_new = rotates_only_new(stack, args, cache)
        begins = row_begins(stack, args, span, cache)
        window = window_begin(span, begins, None if cache is None else cache.cursor)
        table = _table(stack, span, pos, only_new, begins, window)
        table = torch.zeros_like(table) if args.one_place else table
        # caller's positions are what they are; of counted ones the window's first is 0, where it matters
        counts = pos is None and not args.one_place and not (isinstance(window, int) and window == 0)
        counts = counts and (stack.depends_on_places or from_outside(args))
        result: Positions
        if stack.polar_pos_emb is not None:
            result = PolarPositions(*stack.polar_pos_emb(table - window if counts else table))
        else:
            embedding = stack.rotary_pos_emb if embedding is None else embedding
            seen = seen_so_far(span, seen) if embedding.depends_on_length else None
            lasting = keys_last(stack) and args.one_place is None
            again = counts and not (lasting and embedding.scale is None)
            angles = embedding(table - window if again else table, centred=not from_outside(args), seen=seen)
            result = RotaryPositions(*angles, layout=embedding.layout, lasting=lasting)
            if counts and not again:
                first = window if isinstance(window, Tensor) else torch.tensor([window], device=table.device)
                result.begin_window(embedding(first)[0])
        if span.placed is not None and not only_new:
            result.place_queries(span.new_rows(table.device, span.mems))
        return result
    name, pair = ('rotary_pos_emb', rotary) if polar is None else ('polar_pos_emb', polar)
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not is_float(pair[0], 2, 3):
        raise TypeError(f'{name} must be what the embedding returns, (angles, scale or bias), got {shape_of(pair)}')
    layout = stack.flags.rotary_layout
    return RotaryPositions(*pair, layout=layout) if polar is None else PolarPositions(*pair)


def positions_of_layers(
    stack: StackParts,
    args: StackArgs,
    span: Span,
    pos: Int[Tensor, '... n'] | None,
    cache: KVCache | None,
    seen: Bool[Tensor, 'b j'] | None,
    first: Positions | None,
) -> tuple[Positions | None, ...]:
    """The positions of each layer where rotary bases or scalings differ; () where ``first`` serves all, as the caller's do."""
    if stack.other_rotaries is None or args.rotary_pos_emb is not None or args.polar_pos_emb is not None:
        return ()
    of_rotaries = [first, *(positions(stack, args, span, pos, cache, seen, other) for other in stack.other_rotaries)]
    return tuple(of_rotaries[which] for which in stack.rotary_of_layer)


def cross_positions_of_layers(
    stack: StackParts,
    args: StackArgs,
    span: Span,
    pos: Int[Tensor, '... n'] | None,
    cache: KVCache | None,
    first: Positions | None,
) -> tuple[Positions | None, ...]:
    """The same of the layers of cross attention."""
    if stack.other_rotaries is None or first is None:
        return ()
    of_rotaries = [first, *(cross_positions(stack, args, span, pos, cache, other) for other in stack.other_rotaries)]
    return tuple(of_rotaries[which] for which in stack.rotary_of_layer)


def cross_positions(
    stack: StackParts,
    args: StackArgs,
    span: Span,
    pos: Int[Tensor, '... n'] | None,
    cache: KVCache | None,
    embedding: Any = None,
) -> Positions | None:
    """Where queries and the context's keys are, if the caller says where the context is; ``embedding`` as in ``positions``."""
    if args.context_pos is None:
        return None
    if stack.flags.rotary_axes is not None:
        raise ValueError('context_pos must not be given with rotary_axes: the context is no part of the grid. Leave it out.')
    from x_transformers.position.positions import RotaryPositions

    rotary: Any = stack.rotary_pos_emb if embedding is None else embedding
    pos = packed_positions(args, span) if pos is None else pos
    begins = row_begins(stack, args, span, cache)
    window = window_begin(span, begins, None if cache is None else cache.cursor)
    table = _table(stack, span, pos, True, begins, window)
    table = table - window if pos is None else table
    own = args.rotary_pos_emb or rotary(table, centred=False)
    of_context = rotary(args.context_pos, centred=False)
    return RotaryPositions(own[0], own[1], of_context, layout=rotary.layout, lasting=not rotary.depends_on_length)


def position_bias(
    stack: StackParts, args: StackArgs, span: Span, pos: Int[Tensor, '... n'] | None, cache: KVCache | None
) -> Bias | None:
    """What is added to the scores of self attention: by position, or the caller's own."""
    if stack.rel_pos is None and args.attn_bias is None:
        return None
    from x_transformers.position.bias import DenseBias
    from x_transformers.position.relative import RelativeBias

    if stack.rel_pos is None:
        bias = cast(Tensor, args.attn_bias)
        if span.mems and bias.shape[-1] == span.held:
            bias = F.pad(bias, (span.mems, 0))
        return DenseBias(span.newest(bias, axis=bias.ndim - 2))
    if args.attn_bias is not None:
        raise ValueError(
            f'attn_bias must be None in a stack whose scores have a bias ({stack.flags.position_bias}). Leave out one of '
            'them, or add your own to a bias module.'
        )
    if pos is None and span.mems:
        begins = row_begins(stack, args, span, cache)
        window = window_begin(span, begins, None if cache is None else cache.cursor)
        pos = None if begins is None and isinstance(window, int) else _table(stack, span, None, False, begins, window)
    if span.placed is None:
        return RelativeBias(stack.rel_pos, positions=pos, device=span.device)
    if pos is None:
        pos = span.positions(span.device)
    queries = span.new_rows(pos.device, span.mems)
    return RelativeBias(stack.rel_pos, positions=pos, queries=queries, device=span.device)
