"""From a forward's keywords to ``Inputs``: compute once per call what all layers share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from x_transformers.attention.mask import Mask, Placed
from x_transformers.cache.cursor import Cursor
from x_transformers.cache.kv_cache import KVCache
from x_transformers.helpers import counted
from x_transformers.layers.across_depth import injection
from x_transformers.layers.arguments import StackArgs, count_new
from x_transformers.layers.call import OWN_STEP, Inputs, SelfMasks, Span
from x_transformers.layers.checks import (
    check_cache,
    check_call,
    check_input,
    check_steps,
    runs_causally,
)
from x_transformers.layers.condition import of_memories, of_tokens, read_condition
from x_transformers.layers.external import external_keys
from x_transformers.layers.history import check_history
from x_transformers.layers.plan import ATTENTIONS
from x_transformers.layers.positions import (
    cross_positions,
    cross_positions_of_layers,
    custom_positions,
    packed,
    position_bias,
    positions,
    positions_of_layers,
)
from x_transformers.layers.repeat import block_transform
from x_transformers.tensor_types import Bool, Float

if TYPE_CHECKING:
    from x_transformers.layers.parts import StackParts


def prepare(stack: StackParts, x: Float[Tensor, 'b n d'], args: StackArgs) -> tuple[Float[Tensor, 'b m d'], Inputs]:
    """(the tokens that are new, everything else that the layers need).

    Raises ValueError or TypeError, before anything is computed, if an argument does not fit the stack or another argument.
    """
    check_input(stack, x, args)
    # once for a text: a cache that this stack has handed out has passed
    passed = getattr(args.cache, 'known', None) == id(stack)
    if not passed:
        check_cache(stack, args)
    steps = check_steps(stack, args.layers_execute_order, args.repeat_blocks)
    cache = KVCache.of(args.cache, [step.index for step in steps if step.kind in ATTENTIONS])
    if cache is not None and not passed:
        check_history(stack, cache, steps)
    check_call(stack, args, span := read_span(x, args, cache), steps)
    normed_mems = span.mems if stack.norm_need_condition else 0
    condition = read_condition(args.condition, stack.need_condition, stack.dim_condition, x, normed_mems)
    working = cache.fork() if cache is not None else KVCache() if args.return_hiddens else None
    if working is not None:
        working.pos_offset = pos_offset(args, cache)
        working.known = None if cache is None else id(stack)
    x = span.newest(x) if span.new != span.length else x
    pos = custom_positions(stack, args, span, working)
    starts = start_mask(args, span)
    base = self_mask(stack, args, span, working, starts)
    cross_places = cross_positions(stack, args, span, pos, working)
    places = positions(stack, args, span, pos, working, base.keys)
    mems = tuple(args.mems or ())
    if condition is not None and stack.adaptive_mlp is not None:
        condition = stack.adaptive_mlp(condition)
    inputs = Inputs(
        steps=steps,
        span=span,
        masks=SelfMasks(base, span.held, mems, tuple(args.mem_masks or ())),
        cross_mask=Mask(keys=args.context_mask),
        # as what is prepended, a context of another precision is read in that of the sequence
        context=args.context if args.context is None else args.context.to(x.dtype),
        rows=None if args.mask is None else span.newest(args.mask),
        padding=padding(args, span, starts),
        shift_padding=shift_padding(stack, args, span, starts, working),
        bias=position_bias(stack, args, span, pos, working),
        positions=places,
        positions_of_layers=positions_of_layers(stack, args, span, pos, working, base.keys, places),
        cross_positions=cross_places,
        cross_positions_of_layers=cross_positions_of_layers(stack, args, span, pos, working, cross_places),
        mems=mems,
        extra=external_keys(stack, args, steps, span.batch),
        self_kv_shift=kv_shifts(args.self_attn_kv_residuals, x.dtype, span),
        cross_kv_shift=kv_shifts(args.cross_attn_kv_residuals, x.dtype),
        packed=packed(args.flash_pack_seq_kwargs, runs_causally(stack, args)),
        cross_packed=packed(args.flash_pack_seq_context_kwargs, False),
        condition=None if condition is None else of_tokens(condition, span.new),
        mem_condition=None if condition is None or not normed_mems else of_memories(condition, normed_mems),
        injected=injection(x, in_attn_condition(args, span, x), stack.reinject_input_proj, stack.learned_reinject_input_gate),
        deep_table=args.deep_embeds_and_ids[0] if args.deep_embeds_and_ids else None,
        deep_ids=span.newest(args.deep_embeds_and_ids[1]) if args.deep_embeds_and_ids else None,
        value_embeds=token_values(args, span),
        cache=working,
        transform_block=block_transform(args.transform_block_inputs),
        continues=cache is not None and span.past > 0,
        return_attn=args.wants_hiddens,
        causal=args.causal,
        log_probs=args.wants_hiddens and args.return_gumbel_log_probs,
    )
    return x, inputs


# ---------------------------------------------------------------- where the tokens lie


def read_span(x: Float[Tensor, 'b n d'], args: StackArgs, cache: KVCache | None) -> Span:
    """Which of the tokens are new, and where they lie."""
    batch, length = x.shape[:2]
    offset = pos_offset(args, cache)
    if cache is not None and cache.cursor is not None:
        return fixed_span(x, args, cache, cache.cursor, offset)
    past = 0 if cache is None else cache.retained
    if cache is not None and past:
        check_batch(cache, batch)
    new = length
    if cache is not None:
        new = count_new(length, past, args.input_not_include_cache, args.cache_age)
    mems = memory_length(args)
    dropped = 0 if cache is None else cache.length - past
    before = 0 if cache is None else cache.uncounted
    return Span(
        device=x.device,
        batch=batch,
        length=length,
        new=new,
        past=past,
        mems=mems,
        begin=dropped + before + offset,
        dropped=dropped,
        uncounted=before,
    )


def pos_offset(args: StackArgs, cache: KVCache | None) -> int:
    """What is added to counted positions. The cache keeps it, for a sequence that goes on."""
    if args.seq_pos_offset is not None:
        return args.seq_pos_offset
    return 0 if cache is None else cache.pos_offset


def fixed_span(x: Float[Tensor, 'b n d'], args: StackArgs, cache: KVCache, cursor: Cursor, offset: int) -> Span:
    """Behind a cache of fixed capacity all of x is new, and everything that depends on how far it is written is a tensor."""
    batch, length = x.shape[:2]
    if length > cursor.capacity:
        raise ValueError(f'x must be at most the {cursor.capacity} tokens that the cache has room for, got {length}')
    dropped = cursor.seen - cursor.row
    return Span(
        device=x.device,
        batch=batch,
        length=length,
        new=length,
        past=cursor.capacity - length,
        mems=memory_length(args),
        begin=dropped + (offset + cache.uncounted) if offset + cache.uncounted else dropped,
        dropped=dropped,
        placed=cursor.row,
        uncounted=cache.uncounted,
    )


def memory_length(args: StackArgs) -> int:
    entries = () if args.mems is None or isinstance(args.mems, Tensor) else args.mems
    return max([0, *[mem.shape[1] for mem in entries if isinstance(mem, Tensor) and mem.ndim == 3]])


def check_batch(cache: KVCache, batch: int) -> None:
    for layer in cache:
        for tape in layer.tapes.values():
            if tape.batch != batch:
                raise ValueError(f'cache must be of batch {batch}, as x is, got {tape.batch}. Reorder the cache to these rows.')
            return


# ---------------------------------------------------------------- masks


def start_mask(args: StackArgs, span: Span) -> Bool[Tensor, 'b j'] | None:
    """Left padding, over past and new tokens: what lies before each row's start is padding."""
    start = args.seq_start_pos
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
    stack: StackParts, args: StackArgs, span: Span, cache: KVCache | None, starts: Bool[Tensor, 'b j'] | None
) -> Mask:
    """Who may look at whom among past and new tokens; attention adds its own causality and window."""
    keys = held_mask(args.mask if args.self_attn_kv_mask is None else args.self_attn_kv_mask, span, cache)
    if starts is not None:
        keys = starts if keys is None else keys & starts
    dense = args.attn_mask
    if dense is not None:
        dense = span.newest(dense, axis=dense.ndim - 2)
    prefix = args.prefix_attn_len
    if prefix is not None:
        if args.seq_start_pos is not None:
            # it counts tokens, and not the padding in front of them
            prefix = prefix + args.seq_start_pos
        # rows that have left the cache's window are counted too
        prefix = prefix - span.dropped
    cursor = None if cache is None else cache.cursor
    return Mask(
        causal=(stack.is_causal and not stack.causal) if args.causal is None else args.causal,
        past=None if cursor is None or cursor.reach is None else cursor.reach - 1,
        keys=keys,
        prefix=prefix,
        dense=dense,
        placed=None if cursor is None else Placed(cursor.row, span.new, span.held),
    )


def padding(args: StackArgs, span: Span, starts: Bool[Tensor, 'b j'] | None) -> Bool[Tensor, 'b n'] | None:
    """Which new tokens are tokens."""
    mask = None if args.mask is None else span.newest(args.mask)
    if starts is None:
        return mask
    starts = span.newest(starts)
    return starts if mask is None else mask & starts


def shift_padding(
    stack: StackParts, args: StackArgs, span: Span, starts: Bool[Tensor, 'b j'] | None, cache: KVCache | None
) -> Bool[Tensor, 'b n'] | None:
    """Which new tokens feed-forward layers may take features of.

    In a causal stack nobody but padding sees what is padded on the right, and recorded outputs hold what padding sees.
    """
    tokens = padding(args, span, starts)
    if tokens is None or args.mask is None or cache is not None or not runs_causally(stack, args):
        return tokens
    followed = (tokens.flip(-1).cumsum(-1) > 0).flip(-1)
    return tokens | ~followed


# ---------------------------------------------------------------- conditions, what is added


def in_attn_condition(args: StackArgs, span: Span, x: Float[Tensor, 'b n d']) -> Tensor | None:
    cond = args.in_attn_cond
    if cond is None:
        return None
    cond = cond.to(x.dtype)
    return cond.unsqueeze(1) if cond.ndim == 2 else span.newest(cond)


def token_values(args: StackArgs, span: Span) -> tuple[Any, Tensor] | None:
    """(what adds to the values of layers, ids of the new tokens)."""
    pair = args.value_embeds_and_ids
    return None if pair is None else (pair[0], span.newest(pair[1]))


def kv_shifts(shifts: Float[Tensor, '... n d'] | None, dtype: torch.dtype, span: Span | None = None) -> tuple[Tensor, ...]:
    """One for each layer of the kind; three axes are for the first layer alone."""
    if shifts is None:
        return ()
    shifts = (shifts.unsqueeze(0) if shifts.ndim == 3 else shifts).to(dtype)
    if span is not None and shifts.shape[2] != 1:
        shifts = span.newest(shifts, axis=2)
    return tuple(shifts.unbind(0))
