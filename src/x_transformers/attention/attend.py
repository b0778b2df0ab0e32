"""Attention proper: scores, weights, output. Queries, keys and values come in, with heads already split."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.attention.arguments import boolean, broadcasts, numbers, shaped
from x_transformers.attention.geometry import ScoreShape
from x_transformers.attention.inputs import Intermediates
from x_transformers.attention.kernels.base import NO_MIXERS, CallFacts, Kernel, KernelArgs, Mixers, Needs
from x_transformers.attention.kernels.choose import choose_kernel, explain, forced_name
from x_transformers.attention.kernels.reference import maps_of
from x_transformers.attention.maps import NO_MAPS, Maps, Records
from x_transformers.attention.mask import Mask, PackedSequences
from x_transformers.attention.scores.additive import (
    AddBias,
    AddPrevious,
    AddToWeights,
    ApplyMask,
    RecordScores,
    RecordSimilarities,
    RecordWeights,
)
from x_transformers.attention.scores.base import Form, ScoreRule, ScoreRules
from x_transformers.attention.scores.composed import ComposeScores, ComposeWeights
from x_transformers.attention.scores.contextual import AddContextualPositions, Forget
from x_transformers.attention.scores.inverted import AverageKeys, CloseQueries, TurnScores
from x_transformers.attention.scores.path import PathSimilarity
from x_transformers.attention.scores.pointwise import RestoreSign, SoftClamp, SplitSign
from x_transformers.attention.scores.scalable import ScaleQueries, query_factor
from x_transformers.attention.scores.similarity import Distance, Similarity
from x_transformers.attention.scores.sink import DropSink, PutSink
from x_transformers.attention.scores.talking_heads import BranchOffScale, HeadMixer, MixScores, MixWeights, ScaleWeights
from x_transformers.attention.told import Composition, PathSteps
from x_transformers.attention.weights import NORMALIZERS, AttentionDropout, Softmax, WeightedSum, ZeroMaskedRows
from x_transformers.flags.attention import AttentionFlags
from x_transformers.flags.base import FlagError
from x_transformers.flags.constructors import only
from x_transformers.flags.rule import broken_rules, out_of_range, rules_of
from x_transformers.flags.scores import AttendFlags, ScoreFlags
from x_transformers.flags.signature import ClassSignature
from x_transformers.helpers import autocast_dtype, is_any, recall, remember, under_transform
from x_transformers.module import Module
from x_transformers.position.bias import Bias, DenseBias
from x_transformers.tensor_types import Bool, Float

if TYPE_CHECKING:
    from typing import Unpack

    from x_transformers.flags.keywords import AttendKeywords

BACKENDS = {
    'enable_flash': 'FLASH_ATTENTION',
    'enable_math': 'MATH',
    'enable_mem_efficient': 'EFFICIENT_ATTENTION',
    'enable_cudnn': 'CUDNN_ATTENTION',
}
# the definition: what happens to the scores, in this order, until they are an output
ORDER: tuple[type[ScoreRule], ...] = (
    ScaleQueries,
    Similarity,
    Distance,
    PathSimilarity,
    AddPrevious,
    RecordSimilarities,
    BranchOffScale,
    MixScores,
    ComposeScores,
    AddBias,
    SoftClamp,
    SplitSign,
    CloseQueries,
    ApplyMask,
    AddContextualPositions,
    Forget,
    PutSink,
    RecordScores,
    TurnScores,
    *NORMALIZERS,
    AverageKeys,
    RestoreSign,
    AddToWeights,
    RecordWeights,
    DropSink,
    AttentionDropout,
    MixWeights,
    ComposeWeights,
    ScaleWeights,
    WeightedSum,
    ZeroMaskedRows,
)


class Attend(Module):
    """out = weights(scores(q, k)) v. Query head h looks at key head h mod kv_heads.

    ``Attend(**flags)``; the flags are those of ``AttendFlags``. ``flash=True`` demands a fused kernel, one that never holds the
    score matrix, and refuses settings that none can carry; otherwise the best kernel for each call is chosen (``explain`` tells
    which, and why). A query with nothing to look at gives 0. Raises FlagError for settings that contradict each other.
    """

    __signature__: Any = ClassSignature(only(AttendFlags))

    # what kernels are given of the rules' parts
    pre_softmax_talking_heads: HeadMixer | None
    post_softmax_talking_heads: HeadMixer | None
    pre_scale_post_talking_heads: HeadMixer | None
    head_attn_sink: Tensor | None
    softmax_scales: Tensor | None

    def __init__(self, **flags: Unpack[AttendKeywords]) -> None:
        parsed = AttendFlags.parse(flags, where='Attend')
        wrong = broken_attend(parsed)
        if wrong:
            raise FlagError(*wrong)
        self._build(parsed)

    @classmethod
    def from_flags(cls, flags: AttendFlags) -> Self:
        """From flags that have been parsed and checked."""
        self = cls.__new__(cls)
        self._build(flags)
        return self

    def _build(self, flags: AttendFlags) -> None:
        super().__init__()
        self.flags = flags
        self.causal, self.heads, self.scale, self.flash = flags.causal, flags.heads, flags.scale, flags.flash
        self.dropout, self.l2_distance, self.add_zero_kv = flags.dropout, flags.l2_distance, flags.add_zero_kv
        self.softclamp = flags.logit_softclamp_value if flags.softclamp_logits else None
        self.inverted = flags.inverted_attention
        self.sigmoid, self.sparse_topk = flags.sigmoid, flags.sparse_topk
        self.backends = allowed_backends(flags.sdp_kwargs)
        # in the order of the flags, which is that of 2.16.1's parameters: optimizers count them
        names = list(ScoreFlags.flag_fields())
        for rule in sorted(ORDER, key=lambda rule: names.index(rule.name) if rule.name in names else len(names)):
            for name, part in rule.parts(flags).items():
                setattr(self, name, part)
        self.rule_types = tuple(rule for rule in ORDER if rule.is_on(flags))
        self.needs = Needs.of(self.rule_types, onnxable=flags.onnxable)
        self.init_own()

    @torch.no_grad()
    def init_own(self) -> None:
        for rule in self.rule_types:
            rule.init_parts(self)

    def rules(self) -> ScoreRules:
        """The rules that are on, in order, with what they own."""
        rules = (rule.from_flags(self.flags, self) for rule in self.rule_types)
        return tuple(rule for rule in rules if rule is not None)

    def run(
        self,
        q: Float[Tensor, 'b h i d'],
        k: Float[Tensor, 'b kh j d'],
        v: Float[Tensor, 'b kh j e'],
        *,
        mask: Mask,
        geometry: ScoreShape,
        bias: Bias | None = None,
        previous: Float[Tensor, 'b h i j'] | None = None,
        packed: PackedSequences | Mapping[str, Any] | None = None,
        rows: Bool[Tensor, 'b m'] | None = None,
        delta: Float[Tensor, '... n m'] | None = None,
        composition: Composition | None = None,
        steps: PathSteps | None = None,
        return_attn: bool = False,
        return_scores: bool = False,
    ) -> tuple[Float[Tensor, 'b h i e'], Maps]:
        """(output, maps). Causality is in the mask. ``return_attn``: the caller may read the maps; ``return_scores``: the next
        layer will. ``rows``: which queries are tokens; ``delta`` is added to the weights;
        ``composition`` mixes the heads, ``steps`` lie between keys and queries."""
        if self.add_zero_kv:
            k, v, geometry = F.pad(k, (0, 0, 1, 0)), F.pad(v, (0, 0, 1, 0)), geometry.with_front(1)
            previous = previous if previous is None or previous.shape[-1] == geometry.keys else F.pad(previous, (1, 0))
        if packed is not None:
            mask = mask.within(PackedSequences.of(packed, causal=mask.causal))
        args = KernelArgs(
            q,
            k,
            v,
            mask,
            geometry,
            self.rules,
            scale=q.shape[-1] ** -0.5 if self.scale is None else self.scale,
            bias=bias,
            previous=previous,
            rows=rows if self.inverted else None,
            delta=delta,
            factor=None if self.softmax_scales is None else query_factor(self.softmax_scales, mask, geometry),
            composition=composition,
            steps=steps,
            sink=self.head_attn_sink,
            softclamp=self.softclamp,
            sigmoid=self.sigmoid,
            topk=self.sparse_topk,
            mixers=self.mixers() if self.needs.whole else NO_MIXERS,
            l2_distance=self.l2_distance,
            dropout=self.dropout if self.training else 0.0,
            backends=self.backends,
            return_attn=return_attn,
            return_scores=return_scores,
            autocast=autocast_dtype(q),
        )
        out = self.kernel(args)(args)
        return out, self.maps(args) if return_attn or return_scores or args.records else NO_MAPS

    def kernel(self, args: KernelArgs) -> Kernel:
        """The kernel of a call, chosen once for all layers that share a mask and ask the same of it."""
        q, k, v, mask = args.q, args.k, args.v, args.mask
        learns = torch.is_grad_enabled() and (q.requires_grad, k.requires_grad, v.requires_grad)
        key = (
            'kernel', args.geometry, self.needs, q.shape[1], k.shape[1], q.shape[-1], v.shape[-1], q.dtype, args.autocast,
            q.device, learns, args.dropout > 0, args.return_scores, args.previous is None, args.delta is None,
            under_transform(), forced_name(),
        )  # fmt: skip
        found: Kernel | None = recall(mask.memo, key, args.bias)
        return remember(mask.memo, key, choose_kernel(self.needs, facts_of(args)), args.bias) if found is None else found

    def mixers(self) -> Mixers:
        """The matrices that mix heads, for kernels that know them."""
        before, after, around = (
            None if mixer is None else mixer.weight.flatten(1)
            for mixer in (self.pre_softmax_talking_heads, self.post_softmax_talking_heads, self.pre_scale_post_talking_heads)
        )
        # as in the rule the mixed scores are added to the scores
        before = None if before is None else before + torch.eye(before.shape[0], dtype=before.dtype, device=before.device)
        return before, after, around

    def maps(self, args: KernelArgs) -> Maps:
        sink = self.head_attn_sink is not None
        return Maps(args.records, sink=sink) if args.records else Maps(remake=partial(remade, args), sink=sink)

    def forward(
        self,
        q: Float[Tensor, 'b h i d'],
        k: Float[Tensor, '... j d'],
        v: Float[Tensor, '... j e'],
        mask: Bool[Tensor, '...'] | None = None,
        attn_bias: Float[Tensor, '... i j'] | None = None,
        prev_attn: Float[Tensor, 'b h i j'] | None = None,
        flash_pack_seq_kwargs: Mapping[str, Any] | None = None,
        *,
        around: Mapping[str, Any] | None = None,
    ) -> tuple[Float[Tensor, 'b h i e'], Intermediates]:
        """Attend, with everything given as tensors; ``around``: what ``run`` takes, as an attention layer gives it.

        ``mask`` is (b j), or broadcasts to (b h i j); True may be seen. ``attn_bias`` broadcasts to (b h i j). Keys and values
        are (b kv_heads j d), or (b j d) for a single head. ``flash_pack_seq_kwargs`` describe sequences packed into one row.
        """
        if around is not None:
            out, maps = self.run(q, k, v, **around)
            return out, Intermediates(maps=maps)
        k, v = (t.unsqueeze(1) if isinstance(t, Tensor) and t.ndim == 3 else t for t in (k, v))
        check_vectors(q, k, v)
        check_arguments(self, q, k, mask, prev_attn, flash_pack_seq_kwargs)
        may_look = Mask() if mask is None else Mask(keys=mask) if mask.ndim == 2 else Mask(dense=mask)
        bias = None
        if attn_bias is not None:
            bias = DenseBias(attn_bias)
        out, maps = self.run(
            q,
            k,
            v,
            mask=may_look.narrowed(self.causal, None, strict=self.flags.stick_breaking),
            geometry=ScoreShape(q.shape[-2], k.shape[-2]),
            bias=bias,
            previous=prev_attn,
            packed=flash_pack_seq_kwargs,
            return_attn=True,
        )
        return out, Intermediates(maps=maps)

    def explain(
        self, q: Float[Tensor, 'b h i d'], k: Float[Tensor, 'b kh j d'], v: Float[Tensor, 'b kh j e'], **given: Any
    ) -> str:
        """Which kernel a call would use, and why not another. Takes what ``run`` takes."""
        geometry = given.pop('geometry', None) or ScoreShape(q.shape[-2], k.shape[-2])
        mask = given.pop('mask', None) or Mask().narrowed(self.causal, None, strict=self.flags.stick_breaking)
        args = KernelArgs(
            q, k, v, mask, geometry, self.rules,
            scale=1.0, dropout=self.dropout if self.training else 0.0, autocast=autocast_dtype(q), **given,
        )  # fmt: skip
        return explain(self.needs, facts_of(args))


def facts_of(args: KernelArgs) -> CallFacts:
    """The facts of a job that kernels are chosen by."""
    q, k, v, mask, geometry = args.q, args.k, args.v, args.mask, args.geometry
    recording, limits_past = torch.is_grad_enabled(), mask.limits_past(geometry)
    limits_ahead = mask.limits_ahead(geometry)
    windows = ((limits_past, mask.past), (limits_ahead, mask.ahead))
    return CallFacts(
        device=q.device.type,
        dtype=args.autocast or q.dtype,
        gradients=recording and (q.requires_grad or k.requires_grad or v.requires_grad),
        dropout=args.dropout > 0,
        heads=q.shape[1],
        kv_heads=k.shape[1],
        key_dim=q.shape[-1],
        value_dim=v.shape[-1],
        geometry=geometry,
        plain_causal=mask.plain_causal(geometry),
        masked=mask.keys is not None or mask.dense is not None or mask.prefix is not None or limits_past or limits_ahead,
        windowed=not geometry.is_open and any(on and n is not None and 2 * n < geometry.own for on, n in windows),
        causal=mask.causal,
        packed=mask.packed is not None,
        biased=args.bias is not None,
        learned_bias=args.bias is not None and recording and args.bias.learns(geometry),
        by_distance=args.bias is not None and args.bias.by_distance,
        previous=args.previous is not None,
        delta=args.delta is not None,
        return_scores=args.return_scores,
        transformed=under_transform(),
        masked_heads=mask.dense is not None and mask.dense.ndim > 2 and mask.dense.shape[-3] != 1,
    )


def remade(args: KernelArgs) -> Records:
    """The maps, in the precision in which attention ran."""
    dtype = args.autocast
    if dtype is None and autocast_dtype(args.q) is None:
        return maps_of(args)
    with torch.autocast(args.q.device.type, dtype=dtype, enabled=dtype is not None):
        return maps_of(args)


def allowed_backends(sdp_kwargs: Mapping[str, bool]) -> tuple[str, ...] | None:
    """Names for torch's selector; None if all are allowed, so that nothing need be selected."""
    unknown = sorted(set(sdp_kwargs) - set(BACKENDS))
    if unknown:
        raise FlagError(f'sdp_kwargs knows {", ".join(BACKENDS)}, not {", ".join(unknown)}: leave it out.')
    if all(sdp_kwargs.get(name, True) for name in BACKENDS):
        return None
    allowed = tuple(BACKENDS[name] for name, on in sdp_kwargs.items() if on)
    if not allowed:
        raise FlagError('sdp_kwargs turns every backend off: leave at least enable_math on.')
    return allowed


def broken_attend(flags: AttendFlags) -> list[str]:
    """A sentence for everything that is wrong with ``Attend``'s flags."""
    known = AttendFlags.flag_fields()
    rules = [rule for rule in rules_of(AttentionFlags) if all(name in known for name in rule.flags)]
    wrong = [*out_of_range(flags, str).values(), *broken_rules(rules, flags, 0, str), *fused_refusals(flags)]
    if flags.heads is None:
        missing = dict.fromkeys(rule.name for rule in ORDER if rule.per_head and rule.is_on(flags))
        wrong += [f'`{name}` needs `heads`: it has parameters for each head. Give `heads`, too.' for name in missing]
    return wrong


def fused_refusals(flags: ScoreFlags, name: Callable[[str], str] = str) -> list[str]:
    """Why no fused kernel can do what flags with ``flash`` ask for; empty if one can, or if none is demanded.

    A position bias is no reason, learned or not: it is added to the scores as a mask is.
    """
    if not flags.flash:
        return []
    reasons: dict[str, None] = {}
    for rule in ORDER:
        if not rule.is_on(flags):
            continue
        if rule.unfused is not None:
            reasons[f'`{name(rule.name)}` needs the score matrix ({rule.unfused})'] = None
        elif flags.dropout > 0 and not_with_dropout(rule):
            reasons[f'`{name(rule.name)}` together with `{name("dropout")}` needs the score matrix'] = None
    return [f'`{name("flash")}=True` is not available: {reason}. Leave out one of them.' for reason in reasons]


def not_with_dropout(rule: type[ScoreRule]) -> bool:
    """Whether only those fused kernels carry a rule that have no dropout: all but torch's own attention."""
    return rule.form in (Form.POINTWISE, Form.WHOLE) or (rule.form is Form.WEIGHTS and rule is not Softmax)


def check_vectors(q: Any, k: Any, v: Any) -> None:
    """Queries, keys and values that go together."""
    for name, given in (('q', q), ('k', k), ('v', v)):
        shaped(name, given, None, None, None, None, says='(batch, heads, tokens, channels)')
        numbers(name, given)
    if q.shape[1] % k.shape[1]:
        raise ValueError(f'{q.shape[1]} query heads cannot share {k.shape[1]} key heads evenly')
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(f'each key needs one value: keys are {tuple(k.shape)}, values {tuple(v.shape)}')
    if q.shape[-1] != k.shape[-1] or not is_any(k.shape[0], 1, q.shape[0]):
        raise ValueError(
            f'k must have the batch and the channels of q, {q.shape[0]} and {q.shape[-1]}, got shape {tuple(k.shape)}.'
        )


def check_arguments(
    attend: Attend,
    q: Float[Tensor, 'b h i d'],
    k: Float[Tensor, 'b kh j d'],
    mask: Bool[Tensor, '...'] | None,
    prev_attn: Float[Tensor, 'b h i j'] | None,
    packed: Any,
) -> None:
    batch, heads, queries, keys = (*q.shape[:3], k.shape[2])
    if mask is not None:
        boolean('mask', mask)
        if mask.ndim == 2:
            shaped('mask', mask.expand(batch, -1) if len(mask) == 1 else mask, batch, keys, says='one entry per key')
        else:
            broadcasts('mask', mask, batch, heads, queries, (keys,))
    if prev_attn is not None:
        # a layer may have more keys in front than the one before
        columns = prev_attn.shape[-1:] if isinstance(prev_attn, Tensor) else ()
        broadcasts('prev_attn', prev_attn, batch, heads, queries, (keys, *columns))
    if prev_attn is not None and attend.flash:
        raise ValueError('prev_attn adds the scores of another layer, which flash=True never holds: leave one of the two out')
    if packed is not None and q.shape[0] != 1:
        raise ValueError(f'packed sequences lie end to end in one row: the batch must be 1, got {q.shape[0]}')
