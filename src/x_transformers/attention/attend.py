"""Attention proper: scores, weights, output. Queries, keys and values come in, with heads already split."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.attention.geometry import ScoreShape
from x_transformers.attention.inputs import Intermediates
from x_transformers.attention.kernels.base import NO_MIXERS, CallFacts, KernelArgs, Mixers, Needs, autocast_dtype
from x_transformers.attention.kernels.choose import choose_kernel, explain, needs_of, with_rules
from x_transformers.attention.kernels.reference import maps_of
from x_transformers.attention.maps import Maps, Records
from x_transformers.attention.mask import Mask, PackedSequences
from x_transformers.attention.scores.additive import AddBias, AddPrevious, ApplyMask, RecordMap
from x_transformers.attention.scores.base import ScoreRule, ScoreRules
from x_transformers.attention.scores.contextual import AddContextualPositions, Forget
from x_transformers.attention.scores.pointwise import RestoreSign, SoftClamp, SplitSign
from x_transformers.attention.scores.similarity import Similarity
from x_transformers.attention.scores.sink import DropSink, PutSink
from x_transformers.attention.scores.talking_heads import BranchOffScale, HeadMixer, MixScores, MixWeights, ScaleWeights
from x_transformers.attention.weights import Dropout, Normalize, WeightedSum, WeightFunction, ZeroMaskedRows, choose_weights
from x_transformers.flags.attention_rules import fused_refusals
from x_transformers.flags.base import FlagError
from x_transformers.module import Module, empty_parameter
from x_transformers.tensor_types import Bool, Float

if TYPE_CHECKING:
    from x_transformers.position.relative import Bias

BACKENDS = {
    'enable_flash': 'FLASH_ATTENTION',
    'enable_math': 'MATH',
    'enable_mem_efficient': 'EFFICIENT_ATTENTION',
    'enable_cudnn': 'CUDNN_ATTENTION',
}
ALL_BACKENDS = {'enable_flash': True, 'enable_math': True, 'enable_mem_efficient': True}
ONE_OF = ('sigmoid', 'hard', 'l2_distance', 'gumbel_softmax', 'sparse_topk')
NEED_HEADS = ('pre_talking_heads', 'post_talking_heads', 'pre_scale_post_talking_heads', 'head_learned_sink')


class Attend(Module):
    """out = weights(scores(q, k)) v. Query head h looks at key head h mod kv_heads.

    ``flash=True`` demands a fused kernel, one that never holds the score matrix, and refuses settings that none can carry;
    otherwise the best kernel for each call is chosen (``explain`` tells which, and why). A query with nothing to look at
    gives 0. Raises FlagError for settings that contradict each other.
    """

    def __init__(
        self,
        *,
        dropout: float = 0.0,
        causal: bool = False,
        heads: int | None = None,
        pre_talking_heads: bool = False,
        post_talking_heads: bool = False,
        pre_scale_post_talking_heads: bool = False,
        sparse_topk: int | None = None,
        sparse_topk_straight_through: bool = False,
        scale: float | None = None,
        qk_norm: bool = False,
        l2_distance: bool = False,
        sigmoid: bool = False,
        gumbel_softmax: bool = False,
        gumbel_softmax_temp: float = 1.0,
        gumbel_softmax_hard: bool = True,
        cog_signed: bool = False,
        custom_attn_fn: WeightFunction | None = None,
        flash: bool = False,
        softclamp_logits: bool = False,
        logit_softclamp_value: float = 50.0,
        add_zero_kv: bool = False,
        head_learned_sink: bool = False,
        selective: bool = False,
        hard: bool = False,
        cope: nn.Module | None = None,
        onnxable: bool = False,
        sdp_kwargs: Mapping[str, bool] = ALL_BACKENDS,
        flash_pack_seq: bool = False,
    ) -> None:
        super().__init__()
        settings = {name: value for name, value in locals().items() if name not in ('self', '__class__')}
        check(settings)
        self.causal, self.heads, self.scale, self.flash = causal, heads, scale, flash
        self.dropout, self.l2_distance, self.add_zero_kv, self.cog_signed = dropout, l2_distance, add_zero_kv, cog_signed
        self.softclamp = logit_softclamp_value if softclamp_logits else None
        self.selective, self.flash_pack_seq = selective, flash_pack_seq
        self.backends = allowed_backends(sdp_kwargs)
        self.sigmoid, self.sparse_topk = sigmoid, sparse_topk
        self.weight_function = choose_weights(
            qk_norm=qk_norm,
            sigmoid=sigmoid,
            hard=hard,
            sparse_topk=sparse_topk,
            sparse_topk_straight_through=sparse_topk_straight_through,
            gumbel_softmax=gumbel_softmax,
            gumbel_softmax_temp=gumbel_softmax_temp,
            gumbel_softmax_hard=gumbel_softmax_hard,
            custom_attn_fn=custom_attn_fn,
        )[1]
        self.pre_softmax_talking_heads = HeadMixer(heads or 0) if pre_talking_heads else None
        self.post_softmax_talking_heads = HeadMixer(heads or 0) if post_talking_heads else None
        self.pre_scale_post_talking_heads = HeadMixer(heads or 0) if pre_scale_post_talking_heads else None
        self.head_attn_sink = empty_parameter(heads or 0) if head_learned_sink else None
        self.cope = cope
        self.needs: Needs = with_rules(needs_of(settings), self.rules(scale=1.0))
        self.init_own()

    @torch.no_grad()
    def init_own(self) -> None:
        if self.head_attn_sink is not None:
            nn.init.zeros_(self.head_attn_sink)

    def rules(self, scale: float) -> ScoreRules:
        """The definition: what happens to the scores, in this order, until they are an output."""
        before, after, around = (
            self.pre_softmax_talking_heads,
            self.post_softmax_talking_heads,
            self.pre_scale_post_talking_heads,
        )
        rules: tuple[ScoreRule | None, ...] = (
            Similarity(scale, self.l2_distance),
            AddPrevious(),
            RecordMap('similarities'),
            BranchOffScale(around) if around is not None else None,
            MixScores(before) if before is not None else None,
            AddBias(),
            SoftClamp(self.softclamp) if self.softclamp is not None else None,
            SplitSign() if self.cog_signed else None,
            ApplyMask(),
            AddContextualPositions(self.cope) if self.cope is not None else None,
            Forget() if self.selective else None,
            PutSink(self.head_attn_sink) if self.head_attn_sink is not None else None,
            RecordMap('scores'),
            Normalize(self.weight_function),
            RestoreSign() if self.cog_signed else None,
            RecordMap('weights'),
            DropSink() if self.head_attn_sink is not None else None,
            Dropout(self.dropout) if self.dropout > 0 and self.training else None,
            MixWeights(after) if after is not None else None,
            ScaleWeights() if around is not None else None,
            WeightedSum(),
            ZeroMaskedRows(),
        )
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
        return_attn: bool = False,
        return_scores: bool = False,
    ) -> tuple[Float[Tensor, 'b h i e'], Maps]:
        """(output, maps). Causality is in the mask. ``return_attn``: the caller may read the maps; ``return_scores``: the next
        layer will."""
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
        )
        out = choose_kernel(self.needs, facts_of(args))(args)
        return out, self.maps(args)

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
        if args.records or not (args.return_attn or args.return_scores):
            return Maps(args.records, sink=sink)
        return Maps(remake=partial(remade, args, autocast_dtype(args.q)), sink=sink)

    def forward(
        self,
        q: Float[Tensor, 'b h i d'],
        k: Float[Tensor, '... j d'],
        v: Float[Tensor, '... j e'],
        mask: Bool[Tensor, '...'] | None = None,
        attn_bias: Float[Tensor, '... i j'] | None = None,
        prev_attn: Float[Tensor, 'b h i j'] | None = None,
        flash_pack_seq_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[Float[Tensor, 'b h i e'], Intermediates]:
        """Attend, with everything given as tensors.

        ``mask`` is (b j), or broadcasts to (b h i j); True may be seen. ``attn_bias`` broadcasts to (b h i j). Keys and values
        are (b kv_heads j d), or (b j d) for a single head. ``flash_pack_seq_kwargs`` describe sequences packed into one row.
        """
        k, v = (t.unsqueeze(1) if t.ndim == 3 else t for t in (k, v))
        check_call(self, q, k, v, mask, prev_attn, flash_pack_seq_kwargs)
        may_look = Mask() if mask is None else Mask(keys=mask) if mask.ndim == 2 else Mask(dense=mask)
        bias = None
        if attn_bias is not None:
            from x_transformers.position.relative import DenseBias

            bias = DenseBias(attn_bias)
        out, maps = self.run(
            q,
            k,
            v,
            mask=may_look.narrowed(self.causal, None),
            geometry=ScoreShape(q.shape[-2], k.shape[-2]),
            bias=bias,
            previous=prev_attn,
            packed=flash_pack_seq_kwargs,
            return_attn=True,
        )
        return out, Intermediates(maps=maps)

    def explain(self, q: Tensor, k: Tensor, v: Tensor, **given: Any) -> str:
        """Which kernel a call would use, and why not another. Takes what ``run`` takes."""
        geometry = given.pop('geometry', None) or ScoreShape(q.shape[-2], k.shape[-2])
        mask = given.pop('mask', None) or Mask().narrowed(self.causal, None)
        args = KernelArgs(
            q, k, v, mask, geometry, self.rules, scale=1.0, dropout=self.dropout if self.training else 0.0, **given
        )
        return explain(self.needs, facts_of(args))


def facts_of(args: KernelArgs) -> CallFacts:
    """The facts of a job that kernels are chosen by."""
    q, k, v, mask, geometry = args.q, args.k, args.v, args.mask, args.geometry
    recording, limits_past = torch.is_grad_enabled(), mask.limits_past(geometry)
    return CallFacts(
        device=q.device.type,
        dtype=autocast_dtype(q) or q.dtype,
        gradients=recording and (q.requires_grad or k.requires_grad or v.requires_grad),
        dropout=args.dropout > 0,
        heads=q.shape[1],
        kv_heads=k.shape[1],
        key_dim=q.shape[-1],
        value_dim=v.shape[-1],
        geometry=geometry,
        plain_causal=mask.plain_causal(geometry),
        masked=mask.keys is not None or mask.dense is not None or mask.prefix is not None or limits_past,
        windowed=limits_past and mask.past is not None and 2 * mask.past < geometry.own,
        causal=mask.causal,
        packed=mask.packed is not None,
        biased=args.bias is not None,
        learned_bias=args.bias is not None and recording and args.bias.learns(geometry),
        by_distance=args.bias is not None and args.bias.by_distance,
        previous=args.previous is not None,
        return_scores=args.return_scores,
        masked_heads=mask.dense is not None and mask.dense.ndim > 2 and mask.dense.shape[-3] != 1,
    )


def remade(args: KernelArgs, dtype: torch.dtype | None) -> Records:
    """The maps, in the precision in which attention ran."""
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


def check(settings: Mapping[str, Any]) -> None:
    """Raise one FlagError that names everything wrong with ``Attend``'s settings."""
    wrong = []
    chosen = [name for name in ONE_OF if settings[name]]
    if len(chosen) > 1:
        wrong.append(f'{" and ".join(chosen)} exclude each other: each is a way to compare or to weigh. Keep one of them.')
    if settings['selective'] and not settings['causal']:
        wrong.append(
            'selective needs causal=True: what earlier queries forget is an order in time. Leave it out, or set causal.'
        )
    if settings['flash']:
        known = {**settings, 'use_cope': settings['cope'] is not None}
        reasons = fused_refusals(lambda flag: bool(known[flag]))
        wrong += [f'flash=True cannot be had: {reason}. Leave one of the two out.' for reason in reasons]
    if settings['logit_softclamp_value'] <= 0:
        wrong.append(f'logit_softclamp_value must be above 0, got {settings["logit_softclamp_value"]}.')
    if settings['heads'] is None:
        missing = [name for name in NEED_HEADS if settings[name]]
        wrong += [f'{name} has parameters for each head: give heads, too.' for name in missing]
    topk = settings['sparse_topk']
    if topk is not None and topk < 1:
        wrong.append(f'sparse_topk must keep at least 1 key, got {topk}.')
    if not 0 <= settings['dropout'] < 1:
        wrong.append(f'dropout must be at least 0 and below 1, got {settings["dropout"]}.')
    if wrong:
        raise FlagError(*wrong)


def check_call(
    attend: Attend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, prev_attn: Tensor | None, packed: Any
) -> None:
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f'mask must be boolean, True where a key may be seen, got {mask.dtype}: write mask.bool()')
    if mask is not None and mask.ndim not in (2, 3, 4):
        raise ValueError(f'mask must be (batch, keys) or broadcast to (batch, heads, queries, keys), got {tuple(mask.shape)}')
    if q.shape[1] % k.shape[1]:
        raise ValueError(f'{q.shape[1]} query heads cannot share {k.shape[1]} key heads evenly')
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(f'each key needs one value: keys are {tuple(k.shape)}, values {tuple(v.shape)}')
    if prev_attn is not None and attend.flash:
        raise ValueError('prev_attn adds the scores of another layer, which flash=True never holds: leave one of the two out')
    if packed is not None and q.shape[0] != 1:
        raise ValueError(f'packed sequences lie end to end in one row: the batch must be 1, got {q.shape[0]}')
