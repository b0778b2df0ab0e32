"""The call of a layer's attention operation, which is ours or a module that the user has set."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from x_transformers.attention.attend import Attend
from x_transformers.attention.geometry import ScoreShape
from x_transformers.attention.inputs import Intermediates
from x_transformers.attention.mask import Mask
from x_transformers.module import is_bare, is_heard
from x_transformers.position.bias import Bias, rendered_bias
from x_transformers.tensor_types import Float

# what intermediates hold of scores and weights
MAPS = ('qk_similarities', 'pre_softmax_attn', 'post_softmax_attn')


def attended(
    attend: nn.Module,
    q: Float[Tensor, 'b h i d'],
    k: Float[Tensor, 'b kh j d'],
    v: Float[Tensor, 'b kh j e'],
    *,
    mask: Mask,
    geometry: ScoreShape,
    bias: Bias | None = None,
    previous: Float[Tensor, 'b h i j'] | None = None,
    **more: Any,
) -> tuple[Float[Tensor, 'b h i e'], Intermediates]:
    """What a layer's ``attend`` says, ours or a module of the user's own by the contract of the original.

    Such a module is called with queries, keys, values, and with ``mask`` (b h i j), ``attn_bias`` and ``prev_attn`` where they
    are; it returns (output, intermediates). Hooks on ours can read the maps.
    """
    if type(attend) is Attend and is_bare(attend):
        out, maps = attend.run(q, k, v, mask=mask, geometry=geometry, bias=bias, previous=previous, **more)
        return out, Intermediates(maps=maps)
    if isinstance(attend, Attend):
        around = {'mask': mask, 'geometry': geometry, 'bias': bias, 'previous': previous, **more}
        around['return_attn'] = around['return_attn'] or is_heard(attend)
        out, seen = attend(q, k, v, around=around)
        return out, seen
    if taken := [name for name in ('packed', 'delta', 'composition', 'steps') if more[name] is not None]:
        raise ValueError(
            f'attend must be an Attend to take {", ".join(taken)}, got a {type(attend).__name__}. Leave out the flags that '
            'make it.'
        )
    shown = mask.rendered(geometry, q.device)
    # not every module lets axes of length 1 stand for longer ones
    whole = None if shown is None else shown[(None,) * (4 - shown.ndim)].expand(*q.shape[:-1], geometry.keys)
    out, seen = attend(
        q, k, v, mask=whole, attn_bias=None if bias is None else rendered_bias(bias, geometry), prev_attn=previous
    )
    if isinstance(seen, Intermediates):
        return out, seen
    return out, Intermediates(*(getattr(seen, name, None) for name in MAPS))
