"""FlexAttention on GPU: biases, soft clamp, windows and masks in one compiled kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from x_transformers.attention.kernels.base import CallFacts, KernelArgs, Needs, usual_refusals
from x_transformers.attention.kernels.sdpa import unified
from x_transformers.attention.scores.similarity import as_products
from x_transformers.helpers import recall, remember
from x_transformers.notices import warn_user
from x_transformers.position.bias import rendered_bias
from x_transformers.tensor_types import Float, Int

BLOCK = 128


class Flex:
    """A softmax over scores with bias, soft clamp, sink and mask, that skips blocks in which nobody may look."""

    name = 'flex'

    def refusals(self, needs: Needs, call: CallFacts) -> tuple[str, ...]:
        reasons = usual_refusals(needs, call)
        if call.dropout:
            reasons.append('it has no dropout')
        if call.dtype == torch.float64:
            reasons.append('it has no double precision')
        if call.device == 'cpu' and call.gradients:
            reasons.append('it has no backward on CPU')
        if call.device != 'cpu' and call.biased and call.dtype == torch.float32:
            reasons.append('in float32 a tile of the bias does not fit into the memory that a GPU has for it')
        if call.key_dim < 16 or call.value_dim < 16:
            reasons.append('heads are narrower than 16')
        return tuple(reasons)

    def reservations(self, needs: Needs, call: CallFacts) -> tuple[str, ...]:
        reasons = []
        if call.device == 'cpu':
            reasons.append('on CPU it is not worth compiling')
        if call.return_scores:
            reasons.append('the next layer wants the scores, which would be computed a second time')
        if call.geometry.queries < BLOCK:
            reasons.append('there is less than one block of queries')
        if call.learned_bias:
            reasons.append('a bias that learns is read and written number by number')
        return tuple(reasons)

    def __call__(self, args: KernelArgs) -> Float[Tensor, 'b h i e']:
        from torch.nn.attention.flex_attention import AuxRequest

        q, k, v = unified(args)
        if args.l2_distance:
            q, k = as_products(q, k, whole=args.sink is not None or args.softclamp is not None)
            missing = -q.shape[-1] % 16
            q, k = torch.nn.functional.pad(q, (0, missing)), torch.nn.functional.pad(k, (0, missing))
        heads, kv_heads = q.shape[1], k.shape[1]
        order = paired_heads(heads, kv_heads, q.device)
        out, aux = run_compiled(
            q.device.type,
            q if order is None else q[:, order],
            k,
            v,
            score_mod=score_mod(args, order),
            block_mask=block_mask(args, q, order),
            scale=args.scale,
            enable_gqa=heads != kv_heads,
            return_aux=AuxRequest(lse=args.sink is not None),
        )
        if order is not None:
            back = order.argsort()
            out = out[:, back]
        if args.sink is not None:
            lse = aux.lse if order is None else aux.lse[:, back]
            out = out * (lse - args.sink.view(1, -1, 1)).sigmoid()[..., None].to(out.dtype)
        open_rows = args.mask.open_rows(args.geometry, q.device)
        if open_rows is not None:
            out = out.masked_fill(~open_rows, 0.0)
        return cast(Tensor, out)


@cache
def compiled(device: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # on CPU, where only a test asks for it, it is not worth compiling. Without fullgraph torch would silently go on with the
    # whole score matrix once it has compiled more forms than it keeps
    run: Any = flex_attention if device == 'cpu' else torch.compile(flex_attention, fullgraph=True)
    return cast(Callable[..., Any], run)


def run_compiled(device: str, *args: Any, **keywords: Any) -> Any:
    """The compiled kernel; what was compiled before is let go of when there is no room for one more form."""
    if torch.compiler.is_compiling():
        return compiled(device)(*args, **keywords)
    from torch._C._dynamo.eval_frame import reset_code
    from torch._dynamo import config
    from torch._dynamo.exc import FailOnRecompileLimitHit
    from torch.nn.attention.flex_attention import flex_attention

    try:
        return compiled(device)(*args, **keywords)
    except FailOnRecompileLimitHit:
        warn_user(
            f'torch keeps {config.recompile_limit} compiled forms of attention, and this is one more: all are compiled anew. '
            'Raise torch._dynamo.config.recompile_limit if that happens often.'
        )
        reset_code(flex_attention.__code__)
        return compiled(device)(*args, **keywords)


def paired_heads(heads: int, kv_heads: int, device: torch.device) -> Tensor | None:
    """Our query head at each place of torch's order, in which head h looks at key head h // group. None: the same."""
    if kv_heads in (1, heads):
        return None
    return torch.arange(heads, device=device).view(-1, kv_heads).t().flatten()


def score_mod(args: KernelArgs, order: Int[Tensor, ' h'] | None) -> Callable[..., Tensor] | None:
    """Bias, then soft clamp."""
    bias = None if args.bias is None else rendered_bias(args.bias, args.geometry)
    clamp = args.softclamp
    if bias is None and clamp is None:
        return None
    # numbers that differ from length to length would be compiled again with each
    rows, heads, many = (False,) * 3 if bias is None else tuple(size > 1 for size in bias.shape[:3])

    def change(
        score: Float[Tensor, ''], b: Int[Tensor, ''], h: Int[Tensor, ''], i: Int[Tensor, ''], j: Int[Tensor, '']
    ) -> Tensor:
        if bias is not None:
            head = h if order is None else order[h]
            score = score + bias[b if rows else 0, head if heads else 0, i if many else 0, j]
        if clamp is not None:
            score = torch.tanh(score / clamp) * clamp
        return score

    return change


def of_distance(past: int | None, ahead: int | None, front: int, first: int, i: Int[Tensor, ''], j: Int[Tensor, '']) -> Tensor:
    """Whether query ``i`` may look at key ``j``, by their distance; rows in front are seen by all."""
    seen = i >= 0
    if ahead is not None:
        seen = seen & (j - front <= i + first + ahead)
    if past is not None:
        seen = seen & (i + first - (j - front) <= past)
    return seen if ahead is None and past is None else seen | (j < front)


@lru_cache(maxsize=32)
def distance_mask(past: int | None, ahead: int | None, front: int, first: int, queries: int, keys: int, device: str) -> Any:
    """The blocks of a mask that depends on nothing but these numbers: made once for all calls of a shape."""
    from torch.nn.attention.flex_attention import create_block_mask

    def may_look(b: Int[Tensor, ''], h: Int[Tensor, ''], i: Int[Tensor, ''], j: Int[Tensor, '']) -> Tensor:
        return of_distance(past, ahead, front, first, i, j)

    # what is kept may be of use in training, too
    with torch.inference_mode(False):
        return create_block_mask(may_look, None, None, queries, keys, device=device)


def block_mask(args: KernelArgs, q: Float[Tensor, 'b h i d'], order: Int[Tensor, ' h'] | None) -> Any:
    """Who may look at whom, and which blocks can be skipped; made once for the layers of a call."""
    from torch.nn.attention.flex_attention import create_block_mask

    mask, geometry = args.mask, args.geometry
    if mask.trivial:
        return None
    key = ('flex', geometry.queries, geometry.keys, geometry.front, q.shape[1])
    cached = recall(mask.memo, key)
    if cached is not None:
        return cached
    apart = mask if mask.prefix is not None else mask.apart_from_distance()
    allowed = apart.rendered(geometry, q.device)
    past, ahead = (None, None) if mask.prefix is not None else mask.limits(geometry)
    front, first = geometry.front, geometry.first
    if allowed is None and not torch.compiler.is_compiling():
        return distance_mask(past, ahead, front, first, geometry.queries, geometry.keys, str(q.device))
    batch, heads, rows = (None,) * 3 if allowed is None else tuple(size if size > 1 else None for size in allowed.shape[:3])
    many_heads, many_rows, several = heads is not None, rows is not None, batch is not None

    def may_look(b: Int[Tensor, ''], h: Int[Tensor, ''], i: Int[Tensor, ''], j: Int[Tensor, '']) -> Tensor:
        seen = of_distance(past, ahead, front, first, i, j)
        if allowed is not None:
            head = h if order is None else order[h]
            seen = seen & allowed[b if several else 0, head if many_heads else 0, i if many_rows else 0, j]
        return seen

    blocks = create_block_mask(may_look, batch, heads, geometry.queries, geometry.keys, device=str(q.device))
    return remember(mask.memo, key, blocks)
