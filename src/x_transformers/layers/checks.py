"""Validation of a call's arguments: each error names the argument, the requirement, the value and the remedy."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from x_transformers.attention.mask import PackedSequences
from x_transformers.cache.kv_cache import KVCache
from x_transformers.flags.elsewhere import answer_of_call
from x_transformers.helpers import is_any, values_known
from x_transformers.layers.arguments import ARGUMENTS, NEEDS, check_number, is_number, without_needed
from x_transformers.layers.branch import innermost
from x_transformers.layers.plan import KINDS, Step, check_order
from x_transformers.layers.repeat import repeated_steps
from x_transformers.layers.slots import accepts, has_state, takes_around
from x_transformers.tensor_types import Shaped

if TYPE_CHECKING:
    from x_transformers.cache.kv_cache import KVCache
    from x_transformers.layers.arguments import StackArgs
    from x_transformers.layers.call import Span
    from x_transformers.layers.parts import StackParts


def of_width(out: Any, width: int, name: str) -> Tensor:
    """What a module of the user's own has said, whose last axis must have this width."""
    if not isinstance(out, Tensor) or out.ndim == 0 or out.shape[-1] != width:
        raise ValueError(f'{name} must return a tensor whose last axis has {width} entries, got {shape_of(out)}.')
    return out


def shape_of(value: Any) -> str:
    return f'{tuple(value.shape)} of {value.dtype}' if isinstance(value, Tensor) else f'a {type(value).__name__}'


def is_float(value: Any, *dims: int) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim in dims


def is_bool(value: Any, *dims: int) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bool and value.ndim in dims


def is_int(value: Any, *dims: int) -> bool:
    numbers = isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    return numbers and value.ndim in dims


def check_names(model: Any, names: Iterable[str]) -> None:
    """Keywords that a model hands on to its stack are some that the stack has."""
    unknown = [name for name in names if name not in ARGUMENTS]
    parameters = inspect.signature(model.attn_layers.forward).parameters.values() if unknown else ()
    # a stack of the user's own may take what it likes
    if not unknown or any(p.kind is p.VAR_KEYWORD or p.name in unknown for p in parameters):
        return
    known = [*inspect.signature(model.forward).parameters, *ARGUMENTS]
    near = [match for name in unknown for match in difflib.get_close_matches(name, known, n=1)]
    answers = [f'{name}: {answer}' for name in unknown if (answer := answer_of_call(name)) is not None]
    if answers:
        hint = ' '.join(answers)
    else:
        hint = f'did you mean {" or ".join(near)}?' if near else f'those of the stack are {", ".join(ARGUMENTS)}.'
    raise TypeError(f'there is no argument {" or ".join(unknown)}; {hint}')


def check_input(stack: StackParts, x: Any, args: StackArgs) -> None:
    check_number('seq_pos_offset', args.seq_pos_offset)
    check_number('cache_age', args.cache_age, low=0)
    if not is_float(x, 3) or x.shape[-1] != stack.dim:
        raise ValueError(
            f'x must be (batch, sequence, {stack.dim}) of floating point numbers, got {shape_of(x)}; '
            'token ids need an embedding first, as in TransformerWrapper'
        )
    attention = stack.flags.attention
    if x.shape[1] == 0 and (names := [name for name in attention.having('needs_tokens') if getattr(attention, name)]):
        raise ValueError(
            f'x must hold at least one token per row for {", ".join(f"attn_{name}" for name in names)}, '
            f'got shape {tuple(x.shape)}'
        )


def check_steps(stack: StackParts, order: Sequence[int] | None, repeats: Any = None) -> tuple[Step, ...]:
    """The steps of a call, in the caller's order if there is one, or with some blocks repeated."""
    if repeats is not None:
        return repeated_steps(stack.flags, stack.plan, repeats, order)
    if order is None:
        return stack.plan.steps()
    if isinstance(order, (str, Tensor)) or not isinstance(order, Sequence):
        raise TypeError(f'layers_execute_order must be a tuple of layer indices, got {shape_of(order)}')
    order = tuple(order)
    check_order(order, len(stack.plan.layers))
    usual = stack.plan.order
    if stack.flags.mudd and order != usual:
        raise ValueError(
            'layers_execute_order must be left out with mudd, whose mixtures are made for all blocks in their order.'
        )
    if stack.flags.integrate_layers:
        fits = len(order) <= len(usual) and all(
            stack.plan.layers[new].views == stack.plan.layers[old].views for new, old in zip(order, usual, strict=False)
        )
        if not fits:
            raise ValueError(
                f'layers_execute_order must take the steps {usual}, or fewer of them, with integrate_layers, got {order}: '
                'each has a mixture that is made for its layer. Swap layers of one kind.'
            )
    for position, layer in enumerate(order):
        source = stack.plan.layers[layer].skip_from
        if source is not None and source not in order[:position]:
            raise ValueError(
                f'layers_execute_order must execute layer {source} before layer {layer}, whose U-Net skip reads its input, '
                f'got {order}. Put it in front.'
            )
        source = stack.plan.layers[layer].keys_from
        if source is not None and source not in order[:position]:
            raise ValueError(
                f'layers_execute_order must execute layer {source} before layer {layer}, which shares its keys and values, '
                f'got {order}. Put it in front.'
            )
    return stack.plan.steps(order)


def check_per_token(name: str, t: Shaped[Tensor, 'b n'], span: Span, whole: bool = True) -> None:
    """Something with one entry per token: of x, or of past and new tokens."""
    # compared one by one: an exporter's open lengths have no hash
    lengths = (span.length, span.new, span.held) if whole else (span.length, span.new)
    if t.shape[0] != span.batch or not any(t.shape[1] == length for length in lengths):
        wanted = ' or '.join(str(length) for length in sorted(set(lengths)))
        raise ValueError(
            f'{name} must be (batch, tokens) = ({span.batch}, {wanted}), got {tuple(t.shape)}'
            + (f'; the cache holds {span.past} tokens' if span.past else '')
        )


def check_token_mask(name: str, mask: Any, span: Span) -> None:
    if not is_bool(mask, 2):
        raise TypeError(f'{name} must be a boolean tensor (batch, tokens), True where there is a token, got {shape_of(mask)}')
    check_per_token(name, mask, span)


def check_masks(stack: StackParts, args: StackArgs, span: Span) -> None:
    for name in ('mask', 'self_attn_kv_mask'):
        mask = getattr(args, name)
        if mask is not None:
            check_token_mask(name, mask, span)
    start = args.seq_start_pos
    if start is not None and (not is_int(start, 1) or start.shape[0] != span.batch):
        raise ValueError(
            f'seq_start_pos must be ({span.batch},) whole numbers, the number of padded tokens on the left of each row, '
            f'got {shape_of(start)}'
        )
    check_prefix(args.prefix_attn_len, span.batch)
    external = args.self_attn_additional_kv is not None
    if args.attn_mask is not None:
        if not is_bool(args.attn_mask, 2, 3, 4):
            raise TypeError(
                'attn_mask must be boolean, True where a query may see a key, and (i, j), (heads, i, j) or '
                f'(batch, heads, i, j), got {shape_of(args.attn_mask)}'
            )
        check_pairs('attn_mask', args.attn_mask, stack, span, external)
    if args.attn_bias is not None:
        if not is_float(args.attn_bias, 2, 3, 4):
            raise TypeError(
                'attn_bias must be floating point numbers (i, j), (heads, i, j) or (batch, heads, i, j), '
                f'got {shape_of(args.attn_bias)}'
            )
        check_pairs('attn_bias', args.attn_bias, stack, span, external)


def check_prefix(prefix: Any, batch: int) -> None:
    """A number of tokens, or one for each row."""
    fits = is_number(prefix) and prefix >= 0
    if prefix is not None and not fits and not (is_int(prefix, 0, 1) and is_any(prefix.numel(), 1, batch)):
        raise ValueError(
            f'prefix_attn_len must be a whole number from 0, or ({batch},) of them, one per row, got {shape_of(prefix)}'
        )


def check_pairs(name: str, t: Shaped[Tensor, '... i j'], stack: StackParts, span: Span, external: bool) -> None:
    """Something per pair of query and key: rows of new tokens or of all, columns at least of those rows' tokens."""
    rows, columns = t.shape[-2:]
    heads = ' and '.join(map(str, dict.fromkeys(flags.heads for flags in stack.flags.attentions)))
    heads_fit = t.ndim < 3 or all(is_any(t.shape[-3], 1, flags.heads) for flags in stack.flags.attentions)
    batch_fits = t.ndim < 4 or is_any(t.shape[0], 1, span.batch)
    # memory keys may be covered too; columns for another model's keys are counted where those are known
    front = max([0, *[flags.num_mem_kv + flags.add_zero_kv for flags in stack.flags.attentions]])
    wide_enough = (
        is_any(columns, 1, span.held) or span.whole <= columns <= span.whole + front or (external and columns > span.whole)
    )
    if not is_any(rows, 1, span.length, span.new, span.held) or not wide_enough or not heads_fit or not batch_fits:
        raise ValueError(
            f'{name} must end in ({span.new}, {span.whole}): {span.new} queries and '
            f'{span.whole} keys ({span.mems} memories, {span.past} cached, {span.new} new), with {heads} heads or '
            f'1 and batch {span.batch} or 1 in front, got {tuple(t.shape)}'
        )


def check_context(stack: StackParts, args: StackArgs, batch: int) -> None:
    context, crosses = args.context, 'c' in stack.plan.kinds
    if context is None:
        if crosses:
            raise ValueError(
                'context must be given to a stack with cross attention (cross_attend), got None. Pass context=(b, j, width).'
            )
        return
    if not crosses:
        raise ValueError('context must be None in a stack without cross attention. Build it with cross_attend=True.')
    width = stack.flags.cross_attention.dim_context or stack.dim
    if not is_float(context, 3) or context.shape[-1] != width or context.shape[0] != batch:
        raise ValueError(
            f'context must be ({batch}, tokens, {width}) of floating point numbers, got {shape_of(context)}; '
            'another width is set by cross_attn_dim_context'
        )
    mask = args.context_mask
    if mask is not None and (not is_bool(mask, 2) or mask.shape != context.shape[:2]):
        raise ValueError(f'context_mask must be boolean and {tuple(context.shape[:2])}, got {shape_of(mask)}')
    pos = args.context_pos
    if pos is not None and (not isinstance(pos, Tensor) or pos.ndim not in (1, 2) or pos.shape[-1] != context.shape[1]):
        raise ValueError(
            f'context_pos must give one position for each of {context.shape[1]} context tokens, (j,) or (batch, j), '
            f'got {shape_of(pos)}'
        )
    if pos is not None and stack.rotary_pos_emb is None:
        raise ValueError('context_pos must be None without rotary_pos_emb=True. Leave it out.')


def check_mems(stack: StackParts, args: StackArgs, steps: tuple[Step, ...], batch: int) -> None:
    if args.mems is None and args.mem_masks is None:
        return
    layers = sum(step.kind == 'a' for step in steps)
    for name in ('mems', 'mem_masks'):
        entries = getattr(args, name)
        if entries is not None and (isinstance(entries, Tensor) or len(entries) != layers):
            got = shape_of(entries) if isinstance(entries, Tensor) else f'a list of {len(entries)}'
            raise ValueError(f'{name} must be a list with one entry for each of {layers} executed self attentions, got {got}')
    if args.mems is None:
        return
    for index, mem in enumerate(args.mems):
        if mem is not None and (not is_float(mem, 3) or mem.shape[0] != batch or mem.shape[-1] != stack.dim):
            raise ValueError(f'mems[{index}] must be ({batch}, memories, {stack.dim}), got {shape_of(mem)}')
        mask = None if args.mem_masks is None else args.mem_masks[index]
        if mask is not None and (mem is None or not is_bool(mask, 2) or mask.shape != mem.shape[:2]):
            wanted = 'None, since mems has none' if mem is None else f'boolean and {tuple(mem.shape[:2])}'
            raise ValueError(f'mem_masks[{index}] must be {wanted}, got {shape_of(mask)}')
    if len({mem.shape[1] for mem in args.mems if mem is not None}) > 1 and (
        stack.flags.residual_attn or stack.flags.kv_share_every
    ):
        raise ValueError(
            'mems must be equally long in all layers with residual_attn or kv_share_every, which hand on scores or keys'
        )


def check_shifts(name: str, shifts: Any, kind: str, batch: int, length: int, width: int) -> None:
    """Residuals of keys and values: (b n d) for the first layer, or (layers b n d); n may be 1, the same for all tokens."""
    fitting = ((batch, length, width), (batch, 1, width))
    if shifts is not None and (not is_float(shifts, 3, 4) or not is_any(tuple(shifts.shape[-3:]), *fitting)):
        raise ValueError(
            f'{name} must be ({batch}, {length}, {width}) for the first {KINDS[kind]}, or (layers, {batch}, {length}, {width})'
            f', got {shape_of(shifts)}'
        )


def check_deep_embeds(stack: StackParts, pair: Any, span: Span) -> None:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError('deep_embeds_and_ids must be a pair: a table (tokens, layers, dim) and token ids (batch, sequence)')
    table, ids = pair
    if not is_float(table, 3) or table.shape[-1] != stack.dim:
        raise ValueError(f'the table of deep_embeds_and_ids must be (tokens, layers, {stack.dim}), got {shape_of(table)}')
    if not is_int(ids, 2):
        raise ValueError(f'the ids of deep_embeds_and_ids must be whole numbers (batch, sequence), got {shape_of(ids)}')
    check_per_token('the ids of deep_embeds_and_ids', ids, span)


def check_value_embeds(pair: Any, span: Span) -> None:
    whole = isinstance(pair, (tuple, list)) and len(pair) == 2 and is_int(pair[1], 2)
    if not whole or not isinstance(pair[0], (Mapping, nn.ModuleDict)):
        raise TypeError('value_embeds_and_ids must be a pair: modules by the number of their layer, and ids (batch, sequence)')
    check_per_token('the ids of value_embeds_and_ids', pair[1], span)


def runs_causally(stack: StackParts, args: StackArgs) -> bool:
    """Whether tokens see none to their right, but for a prefix: as built, or as this call says."""
    return stack.is_causal if args.causal is None else args.causal


def check_causal(stack: StackParts, causal: Any) -> None:
    if causal is None:
        return
    if not isinstance(causal, bool):
        raise TypeError(f'causal must be True, False or None, got {causal!r}.')
    tied = [f'attn_{name}' for flags in stack.flags.attentions for name in flags.tied_to_causality]
    tied += ['shift_tokens'] * any(layer.shift for layer in stack.plan.layers)
    tied += ['mv_split_residual'] * bool(stack.flags.mv_split_residual)
    if causal != stack.is_causal and tied:
        raise ValueError(
            f'causal must be {stack.is_causal}, as this stack was built, got {causal}: '
            f'{", ".join(dict.fromkeys(tied))} depends on it. Build a stack for each.'
        )


def check_cache(stack: StackParts, args: StackArgs) -> None:
    if args.cache is None:
        return
    if not runs_causally(stack, args):
        raise ValueError(
            'cache must be None in a stack that is not causal. Build a Decoder or PrefixDecoder, or pass the whole sequence.'
        )
    if not stack.can_cache_kv:
        raise ValueError(
            'cache must be None with selective or inverted attention, attention that is not causal, or a module of your '
            'own that mixes tokens. Pass the whole sequence, or give the module forward(x, state) -> (y, state).'
        )
    held = getattr(args.cache, 'kv_cache', args.cache)
    # how far a cache of fixed capacity is written is a tensor; it was made of one that has passed
    if (
        isinstance(held, KVCache)
        and held.cursor is None
        and held.length
        and args.layers_execute_order is None
        and args.repeat_blocks is None
    ):
        check_layers_of_cache(stack, held)


def check_layers_of_cache(stack: StackParts, cache: KVCache) -> None:
    """A cache must be of a stack with these layers: one without some of them would be read as if those had seen nothing."""
    kept = {index for index in cache.steps if index >= 0}
    steps = stack.plan.steps()
    beyond = [index for index in kept if index >= len(steps)]
    attends = [type(getattr(layer, 'inside', None)).__name__ == 'Attention' for layer in stack.layers]
    own = [step.index for step in steps if step.kind == 'a' and attends[step.layer]]
    missing = [index for index in own if index not in kept]
    if beyond or (missing and kept):
        raise ValueError(
            f'cache must be of a stack like this one, with {len(steps)} layers, got one that holds layers {sorted(kept)}. '
            'Give the cache that this model returned.'
        )


def check_packing(stack: StackParts, args: StackArgs, batch: int, n: int) -> None:
    for kwargs, names, part in (
        ('flash_pack_seq_kwargs', ('mask', 'attn_mask', 'self_attn_kv_mask', 'seq_start_pos'), 'attention'),
        ('flash_pack_seq_context_kwargs', ('context_mask',), 'cross_attention'),
    ):
        packing = getattr(args, kwargs)
        if packing is None:
            continue
        if not getattr(stack.flags, part).flash_pack_seq:
            raise ValueError(
                f'{kwargs} must be None in a stack without attn_flash_pack_seq=True. Build it with that flag, or leave '
                f'{kwargs} out.'
            )
        if batch != 1:
            raise ValueError(f'{kwargs}: packed sequences lie in one row, so the batch must be 1, got {batch}')
        also = [name for name in names if getattr(args, name) is not None]
        if also:
            raise ValueError(
                f'{", ".join(also)} must be left out with {kwargs}, which says who sees whom. Pass {kwargs} alone.'
            )
        before = [name for name in ('mems', 'cache') if getattr(args, name) is not None and part == 'attention']
        if before:
            raise ValueError(
                f'{" and ".join(before)} must be None with {kwargs}: a past belongs to one sequence. Run that one alone.'
            )
        keys = n if part == 'attention' or args.context is None else args.context.shape[1]
        check_whole(kwargs, PackedSequences.of(packing), n, keys)


def check_whole(kwargs: str, packed: PackedSequences, queries: int, keys: int) -> None:
    """Whether packed sequences fill their row; known only where tensors may be read."""
    for name, starts, length in (('cu_seqlens_q', packed.starts_q, queries), ('cu_seqlens_k', packed.starts_k, keys)):
        if not values_known(starts) or (int(starts[0]), int(starts[-1])) == (0, length):
            continue
        raise ValueError(
            f'{kwargs}: {name} must begin with 0 and end with the {length} tokens of its row, got {starts.tolist()}; '
            'rows in front of the tokens count, and padding is a sequence of its own'
        )


def without_mask(stack: StackParts, steps: Sequence[Step]) -> str | None:
    """The class of a module with a state that cannot be told which rows are tokens, if there is one."""
    layers = stack._layers()
    for step in steps:
        branch = innermost(getattr(layers[step.layer], 'branch', layers[step.layer]))
        if not takes_around(branch) and has_state(branch) and not accepts(branch, 'mask'):
            return type(branch).__name__
    return None


def check_left_padding(stack: StackParts, args: StackArgs, steps: tuple[Step, ...]) -> None:
    """Some parts would read the padding, or count it."""
    attentions = stack.flags.attentions
    if any(flags.hybrid_module is not None for flags in attentions):
        raise ValueError(
            'seq_start_pos must be None with attn_hybrid_module, which would read the padding on the left. Run rows of '
            'different lengths one by one.'
        )
    if deaf := without_mask(stack, steps):
        raise ValueError(
            f'seq_start_pos must be None with {deaf}, which would remember the padding on the left. Give its forward a '
            'keyword `mask` (True: a token), or run rows one by one.'
        )
    # asked last, and of few calls: it looks through all flags, and generation checks each token's call
    near = (name for flags in attentions for name in flags.having('near_mems') if getattr(flags, name))
    if args.mems and (name := next(near, None)) is not None:
        raise ValueError(
            f'seq_start_pos must be left out with mems and attn_{name}, which would count the padding between memories and '
            'tokens. Run rows of different lengths one by one.'
        )


def check_call(stack: StackParts, args: StackArgs, span: Span, steps: tuple[Step, ...]) -> None:
    """Everything that can be told from shapes and kinds, before anything is computed."""
    for name, needed in without_needed(args, NEEDS):
        raise ValueError(f'{name} must go with {needed}, got it alone. Give {needed}, too, or leave {name} out.')
    check_causal(stack, args.causal)
    check_masks(stack, args, span)
    if args.seq_start_pos is not None:
        check_left_padding(stack, args, steps)
    check_context(stack, args, span.batch)
    check_mems(stack, args, steps, span.batch)
    check_packing(stack, args, span.batch, span.length)
    if args.deep_embeds_and_ids is not None:
        check_deep_embeds(stack, args.deep_embeds_and_ids, span)
    if args.value_embeds_and_ids is not None:
        check_value_embeds(args.value_embeds_and_ids, span)
    check_shifts('self_attn_kv_residuals', args.self_attn_kv_residuals, 'a', span.batch, span.length, stack.dim)
    if args.context is not None:
        length, width = args.context.shape[1:]
        check_shifts('cross_attn_kv_residuals', args.cross_attn_kv_residuals, 'c', span.batch, length, width)
    cond = args.in_attn_cond
    if cond is None:
        return
    if stack.flags.reinject_input:
        raise ValueError(
            'in_attn_cond and reinject_input must not both be given: both are added in every layer. Leave one out.'
        )
    fits = is_float(cond, 2, 3) and cond.shape[0] == span.batch and cond.shape[-1] == stack.dim
    if not fits or (cond.ndim == 3 and not is_any(cond.shape[1], 1, span.length, span.new)):
        raise ValueError(
            f'in_attn_cond must be ({span.batch}, {stack.dim}) or ({span.batch}, {span.length}, {stack.dim}), '
            f'got {shape_of(cond)}'
        )
