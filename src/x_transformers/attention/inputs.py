"""The inputs of a layer's branch, and the intermediates that attention returns."""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from x_transformers.attention.mask import Mask
from x_transformers.tensor_types import Bool, Float

if TYPE_CHECKING:
    from x_transformers.attention.maps import Maps
    from x_transformers.cache.layer_cache import LayerCache
    from x_transformers.embedding.values import TokenValues
    from x_transformers.position.bias import Bias
    from x_transformers.position.positions import Positions

CachedKeys = tuple[Tensor, Tensor | None]


class ExtraKeys(NamedTuple):
    """Keys and values from another model, put in front of the own ones. They are not rotated."""

    keys: Float[Tensor, 'b kh m d']
    values: Float[Tensor, 'b kh m e']
    mask: Bool[Tensor, 'b m'] | None = None


class HandedKeys(NamedTuple):
    """Keys and values, normed and placed, for layers that share them: all rows; the new tokens' own values; who is a token."""

    keys: Float[Tensor, 'b kh j d']
    values: Float[Tensor, 'b kh j e']
    own: Float[Tensor, 'b kh m e']
    mask: Mask


class Deltas(NamedTuple):
    """What a call adds inside attention: to projected queries, keys and values, to the heads, to the weights.

    https://arxiv.org/abs/2605.12357, https://openreview.net/forum?id=uomCTwGflg
    """

    queries: Float[Tensor, '... hd'] | None = None
    keys: Float[Tensor, '... hd'] | None = None
    values: Float[Tensor, '... he'] | None = None
    heads: Float[Tensor, '... he'] | None = None
    weights: Float[Tensor, '#b #h n j'] | None = None


class BranchInputs:
    """What surrounds one branch, attention, cross attention or feed-forward, in a call. Everything is optional.

    ``mask`` says who may look over the branch's own keys: memories, past, new. ``past`` is the cache of this
    execution step; without one nothing is kept. ``return_attn``: somebody may read the attention maps;
    ``return_scores``: the next layer will, for residual attention. ``maps_now``: the maps are made before the forward ends.
    ``hands_on_keys``: later layers share keys and values; ``shared``: those of an earlier one.
    ``tokens``: which new rows are tokens; ``padding``: which of them neighbours may take features of. ``causal``: in this call,
    whatever the layer was built for. ``log_probs``: of the keys that hard attention chooses.

    It is no dataclass: casts of mixed precision would rebuild one, and copy the cache in it.
    """

    def __init__(
        self,
        *,
        context: Float[Tensor, 'b j c'] | None = None,
        mask: Mask | None = None,
        rows: Bool[Tensor, 'b n'] | None = None,
        bias: Bias | None = None,
        positions: Positions | None = None,
        mem: Float[Tensor, 'b l d'] | None = None,
        previous: Float[Tensor, 'b h i j'] | None = None,
        first_values: Float[Tensor, 'b kh j e'] | None = None,
        extra: ExtraKeys | None = None,
        kv_shift: Float[Tensor, 'b n d'] | None = None,
        past: LayerCache | None = None,
        packed: Any = None,
        tokens: Bool[Tensor, 'b n'] | None = None,
        padding: Bool[Tensor, 'b n'] | None = None,
        condition: Float[Tensor, 'b ... c'] | None = None,
        deep_embed: Float[Tensor, 'b n d'] | None = None,
        token_values: TokenValues | None = None,
        return_attn: bool = False,
        return_scores: bool = False,
        maps_now: bool = False,
        deltas: Deltas = Deltas(),  # noqa: B008 (it never changes)
        causal: bool | None = None,
        log_probs: bool = False,
        hands_on_keys: bool = False,
        shared: HandedKeys | None = None,
    ) -> None:
        self.hands_on_keys = hands_on_keys
        self.shared = shared
        self.context = context
        self.mask = Mask() if mask is None else mask
        self.rows = rows
        self.bias = bias
        self.positions = positions
        self.mem = mem
        self.previous = previous
        self.first_values = first_values
        self.extra = extra
        self.kv_shift = kv_shift
        self.past = past
        self.packed = packed
        self.tokens = tokens
        self.padding = padding
        self.condition = condition
        self.deep_embed = deep_embed
        self.token_values = token_values
        self.return_attn = return_attn
        self.return_scores = return_scores
        self.maps_now = maps_now
        self.deltas = deltas
        self.causal = causal
        self.log_probs = log_probs

    def having(self, **changed: Any) -> BranchInputs:
        """A copy in which some are others."""
        other = copy(self)
        other.__dict__.update(changed)
        return other


class LazyMap:
    """An attribute that is read from ``maps`` unless somebody sets it."""

    def __init__(self, of_maps: str) -> None:
        self.of_maps = of_maps

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, report: Intermediates | None, owner: type) -> Float[Tensor, 'b h i j'] | None:
        if report is None:
            return None
        value = report._maps_set[self.name]
        if value is not None or report.maps is None:
            return value
        computed: Tensor | None = getattr(report.maps, self.of_maps)
        return computed

    def __set__(self, report: Intermediates, value: Float[Tensor, 'b h i j'] | None) -> None:
        report._maps_set[self.name] = value


class Intermediates:
    """What one attention reports.

    ``qk_similarities`` (scores before biases and masks), ``pre_softmax_attn`` (scores that the weights are made of) and
    ``post_softmax_attn`` (weights before dropout), all (b h i j), are computed when they are first read, if not given;
    gradients flow through them. ``cached_kv`` is (keys, values) of this layer so far, keys neither rotated nor repeated, or
    (latent, rotated-head keys) with a latent; assigning it replaces the cache. ``log_probs`` (b h i) are those of the keys
    that hard attention has chosen, if the call asked for them. A feed-forward of experts reports its ``expert_loss`` alone.
    """

    qk_similarities = LazyMap('qk_similarities')
    pre_softmax_attn = LazyMap('pre_softmax')
    post_softmax_attn = LazyMap('post_softmax')

    def __init__(
        self,
        qk_similarities: Float[Tensor, 'b h i j'] | None = None,
        pre_softmax_attn: Float[Tensor, 'b h i j'] | None = None,
        post_softmax_attn: Float[Tensor, 'b h i j'] | None = None,
        values: Float[Tensor, 'b kh m e'] | None = None,
        cached_kv: CachedKeys | None = None,
        layer_type: str | None = None,
        hybrid_hidden: Any = None,
        log_probs: Float[Tensor, 'b h i'] | None = None,
        *,
        expert_loss: Float[Tensor, ''] | None = None,
        maps: Maps | None = None,
        cache: LayerCache | None = None,
    ) -> None:
        self._maps_set: dict[str, Tensor | None] = {
            'qk_similarities': qk_similarities,
            'pre_softmax_attn': pre_softmax_attn,
            'post_softmax_attn': post_softmax_attn,
        }
        self._cached_kv = cached_kv
        self.values = values
        self.layer_type = layer_type
        self.hybrid_hidden = hybrid_hidden
        self.log_probs = log_probs
        self.expert_loss = expert_loss
        self.maps = maps
        self.cache = cache
        self.handed: HandedKeys | None = None

    @property
    def cached_kv(self) -> CachedKeys | None:
        if self._cached_kv is not None or self.cache is None:
            return self._cached_kv
        return cached_keys(self.cache)

    @cached_kv.setter
    def cached_kv(self, value: CachedKeys | None) -> None:
        self._cached_kv = value
        self.cache = None

    def to_tuple(self) -> tuple[Tensor | None, ...]:
        """(qk_similarities, pre_softmax_attn, post_softmax_attn)."""
        return self.qk_similarities, self.pre_softmax_attn, self.post_softmax_attn

    def __repr__(self) -> str:
        shape = None if self.values is None else tuple(self.values.shape)
        return f'Intermediates(layer_type={self.layer_type!r}, values={shape}, cached={self.cached_kv is not None})'


def cached_keys(cache: LayerCache) -> CachedKeys | None:
    """What one attention has cached: (keys, values), or (latent, rotated-head keys or None). Keys are given back unrotated."""
    latent = cache.get('latent')
    if latent is not None:
        return latent, cache.get('k_rope')
    keys, values, angles = cache.get('k'), cache.get('v'), cache.get('angles')
    if keys is None or values is None:
        return None
    if angles is None:
        return keys, values
    from x_transformers.position.positions import unrotated

    return unrotated(keys, angles, cache.carry.get('rotated_heads'), cache.carry.get('rotary_form')), values
