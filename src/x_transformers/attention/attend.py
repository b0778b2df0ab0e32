"""The attention operation: scores, weights, output. Inputs are queries, keys and values, already split into heads."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.attention.arguments import check_attend, check_vectors
from x_transformers.attention.geometry import ScoreShape
from x_transformers.attention.inputs import Intermediates
from x_transformers.attention.kernels.backends import allowed_backends
from x_transformers.attention.kernels.base import NO_MIXERS, KernelArgs, Needs
from x_transformers.attention.kernels.choose import explain, kernel_of
from x_transformers.attention.kernels.facts import facts_of
from x_transformers.attention.kernels.reference import remade_maps
from x_transformers.attention.maps import NO_MAPS, Maps
from x_transformers.attention.mask import Mask, PackedSequences
from x_transformers.attention.of_tokens import Composition, PathSteps
from x_transformers.attention.refusals import broken_attend
from x_transformers.attention.scores.additive import (
    AddBias,
    AddPrevious,
    AddToWeights,
    ApplyMask,
    RecordScores,
    RecordSimilarities,
    RecordWeights,
)
from x_transformers.attention.scores.base import ScoreRule, ScoreRules
from x_transformers.attention.scores.composed import ComposeScores, ComposeWeights
from x_transformers.attention.scores.contextual import AddContextualPositions, Forget
from x_transformers.attention.scores.inverted import AverageKeys, CloseQueries, TurnScores
from x_transformers.attention.scores.path import PathSimilarity
from x_transformers.attention.scores.pointwise import RestoreSign, SoftClamp, SplitSign
from x_transformers.attention.scores.scalable import ScaleQueries, query_factor
from x_transformers.attention.scores.similarity import Distance, Similarity
from x_transformers.attention.scores.sink import DropSink, PutSink
from x_transformers.attention.scores.talking_heads import (
    BranchOffScale,
    HeadMixer,
    MixScores,
    MixWeights,
    ScaleWeights,
    mixing_matrices,
)
from x_transformers.attention.weights import NORMALIZERS, AttentionDropout, WeightedSum, ZeroMaskedRows
from x_transformers.flags.base import FlagError
from x_transformers.flags.constructors import only
from x_transformers.flags.scores import AttendFlags, ScoreFlags
from x_transformers.flags.signature import ClassSignature
from x_transformers.helpers import autocast_dtype
from x_transformers.module import Module
from x_transformers.position.bias import Bias, DenseBias
from x_transformers.tensor_types import Bool, Float

if TYPE_CHECKING:
    from typing import Unpack

    from x_transformers.flags.keywords import AttendKeywords

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
        wrong = broken_attend(parsed, ORDER)
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
            mixers=mixing_matrices(self) if self.needs.whole else NO_MIXERS,
            l2_distance=self.l2_distance,
            dropout=self.dropout if self.training else 0.0,
            backends=self.backends,
            return_attn=return_attn,
            return_scores=return_scores,
            autocast=autocast_dtype(q),
        )
        out = kernel_of(self.needs, args)(args)
        return out, self.maps(args) if return_attn or return_scores or args.records else NO_MAPS

    def maps(self, args: KernelArgs) -> Maps:
        sink = self.head_attn_sink is not None
        return Maps(args.records, sink=sink) if args.records else Maps(remake=partial(remade_maps, args), sink=sink)

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
        check_attend(q, k, mask, prev_attn, flash_pack_seq_kwargs, flash=self.flash)
        may_look = Mask() if mask is None else Mask(keys=mask) if mask.ndim == 2 else Mask(dense=mask)
        out, maps = self.run(
            q,
            k,
            v,
            mask=may_look.narrowed(self.causal, None, strict=self.flags.stick_breaking),
            geometry=ScoreShape(q.shape[-2], k.shape[-2]),
            bias=None if attn_bias is None else DenseBias(attn_bias),
            previous=prev_attn,
            packed=flash_pack_seq_kwargs,
            return_attn=True,
        )
        return out, Intermediates(maps=maps)

    def explain(
        self, q: Float[Tensor, 'b h i d'], k: Float[Tensor, 'b kh j d'], v: Float[Tensor, 'b kh j e'], **arguments: Any
    ) -> str:
        """Which kernel a call would use, and why not another. Takes what ``run`` takes."""
        geometry = arguments.pop('geometry', None) or ScoreShape(q.shape[-2], k.shape[-2])
        mask = arguments.pop('mask', None) or Mask().narrowed(self.causal, None, strict=self.flags.stick_breaking)
        args = KernelArgs(
            q, k, v, mask, geometry, self.rules,
            scale=1.0, dropout=self.dropout if self.training else 0.0, autocast=autocast_dtype(q), **arguments,
        )  # fmt: skip
        return explain(self.needs, facts_of(args))
