"""One attention layer: the order of its steps, each in a module of its own."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from x_transformers.attention import latent, project, tensor_product
from x_transformers.attention.assemble import BIASES, build_attend, build_convolutions, build_hybrid, build_output
from x_transformers.attention.attending import attended
from x_transformers.attention.composition import ComposeHeads
from x_transformers.attention.differential import Differential, paired_values
from x_transformers.attention.extra_keys import with_extra_keys
from x_transformers.attention.gates import gate_channels, gate_heads, open_gate, output_gate, value_gate
from x_transformers.attention.geometry import ScoreShape, tiled_heads
from x_transformers.attention.hybrid import mix_hybrid, module_input, run_module
from x_transformers.attention.inputs import BranchInputs, HandedKeys, Intermediates
from x_transformers.attention.parts import Seen
from x_transformers.attention.path import HouseholderSteps
from x_transformers.attention.project import merge_heads, split_heads
from x_transformers.attention.qk_clip import clip_queries_and_keys_
from x_transformers.attention.qk_norm import unit_heads
from x_transformers.attention.tensor_product import KeyValueFactors, OuterProducts
from x_transformers.attention.values import exclusive, laser_in, laser_out, mix_tokens, mix_values, own_values
from x_transformers.attention.weights import log_prob_from_hard_attend
from x_transformers.flags.attention import AttentionFlags
from x_transformers.flags.constructors import only
from x_transformers.flags.rule import effective
from x_transformers.flags.rules import check_attention
from x_transformers.flags.signature import ClassSignature
from x_transformers.helpers import without_component
from x_transformers.module import Module, empty_parameter, stream_linear
from x_transformers.norms import MultiheadRMSNorm
from x_transformers.position.bias import Bias, SumBias
from x_transformers.tensor_types import Bool, Float, Int
from x_transformers.unit_weights import UnitGain

if TYPE_CHECKING:
    from typing import Unpack

    from x_transformers.flags.keywords import AttentionKeywords


class Attention(Module):
    """Multi-head attention with everything that has been tried on it.

    ``Attention(dim, **flags)``; the flags are those of ``AttentionFlags``, in a stack with ``attn_`` or ``cross_attn_`` before.
    Query head h uses key and value head h mod ``kv_heads``. Own keys are ordered memories, past, new; in front of them lie keys
    of another model, then learned memory keys.

    Raises FlagError for flags that exclude each other and UnknownFlag for a name that no flag has.
    """

    __signature__: Any = ClassSignature(only(AttentionFlags))

    to_q: nn.Linear | OuterProducts
    to_k: nn.Linear | OuterProducts
    to_v: nn.Linear | OuterProducts
    to_latent_q: nn.Linear | None
    to_latent_kv: nn.Linear | KeyValueFactors | None

    def __init__(self, dim: int, **flags: Unpack[AttentionKeywords]) -> None:
        parsed = AttentionFlags.parse(flags, where='Attention')
        check_attention(parsed, dim)
        self._build(dim, parsed)

    @classmethod
    def from_flags(cls, dim: int, flags: AttentionFlags) -> Self:
        """From flags that have been parsed and checked."""
        self = cls.__new__(cls)
        self._build(dim, flags)
        return self

    def _build(self, dim: int, flags: AttentionFlags) -> None:
        super().__init__()
        self.flags = flags = effective(flags)
        self.dim = dim
        self.heads, self.kv_heads = flags.heads, flags.num_kv_heads
        self.dim_head, self.value_dim_head = flags.dim_head, flags.value_dim
        self.dim_context = dim if flags.dim_context is None else flags.dim_context
        self.causal = flags.causal
        self.max_attend_past = flags.max_attend_past
        self.max_attend_future = flags.max_attend_future
        self.rotated_heads = flags.rotated_heads
        self.separate_views = flags.qkv_receive_diff_residuals
        self.needing_own_keys = tuple(name for name in flags.having('own_keys') if getattr(flags, name))
        self.can_cache_kv = not (flags.selective or flags.inverted_attention)
        self._build_projections()
        self._build_keys_and_values()
        self._build_output()
        self.init_own()

    def _build_projections(self) -> None:
        flags = self.flags
        dim_q, dim_k = self.dim, self.dim_context
        self.to_latent_q = self.to_latent_kv = self.to_rotateable_k = None
        if flags.dim_latent_q is not None:
            self.to_latent_q = nn.Linear(dim_q, flags.dim_latent_q, bias=False)
            dim_q = flags.dim_latent_q
        if flags.dim_latent_kv is not None:
            self.to_latent_kv = nn.Linear(dim_k, flags.dim_latent_kv, bias=False)
            if flags.latent_rope_subheads is not None:
                self.to_rotateable_k = nn.Linear(dim_k, self.dim_head * flags.latent_rope_subheads, bias=False)
            dim_k = flags.dim_latent_kv
        if flags.tensor_product:
            made = tensor_product.projections(dim_q, dim_k, flags)
            self.to_latent_q, self.to_latent_kv, self.to_q, self.to_k, self.to_v = made
            dim_q = made.to_q.channels
        else:
            unit, keys = flags.unit_weights, flags.key_heads_from_latent
            self.to_q = stream_linear(dim_q, self.heads * self.dim_head, bias=flags.has_bias('q'), unit=unit)
            self.to_k = stream_linear(dim_k, keys * self.dim_head, bias=flags.has_bias('k'), unit=unit)
            self.to_v = stream_linear(dim_k, self.kv_heads * self.value_dim_head, bias=flags.has_bias('v'), unit=unit)
        self._keys_values = project.keys_values if self.to_latent_kv is None else latent.latent_keys_values
        self.to_value_residual_mix = None
        if flags.learned_value_residual_mix:
            # decided by the tokens that the values belong to: of a context, if that has a width of its own
            dim_mix = dim_q if self.dim_context == self.dim else self.dim_context
            self.to_value_residual_mix = nn.Sequential(nn.Linear(dim_mix, self.kv_heads), nn.Sigmoid())

    def _build_keys_and_values(self) -> None:
        flags, heads, kv_heads, dim_head = self.flags, self.heads, self.kv_heads, self.dim_head
        self.qk_norm, self.qk_norm_groups = flags.qk_norm or flags.unit_weights, flags.qk_norm_groups
        self.unit_gain = UnitGain(heads, 1, dim_head, held=self.dim**-0.5) if flags.unit_weights else None
        gains = flags.qk_norm and flags.qk_norm_dim_scale
        self.qk_norm_eps = flags.qk_norm_eps
        q_gains, k_gains = (1, 1) if flags.qk_norm_shared_gain else (heads, kv_heads)
        self.qk_norm_q_scale = empty_parameter(q_gains, 1, dim_head) if gains else None
        self.qk_norm_k_scale = empty_parameter(k_gains, 1, dim_head) if gains else None
        self.q_rmsnorm = MultiheadRMSNorm(dim_head, heads) if flags.qk_rmsnorm else None
        self.k_rmsnorm = MultiheadRMSNorm(dim_head, kv_heads) if flags.qk_rmsnorm or flags.k_rmsnorm else None
        self.value_rmsnorm = MultiheadRMSNorm(self.value_dim_head, kv_heads) if flags.value_rmsnorm else None
        self.laser_clamp = flags.laser_softclamp_value if flags.laser else None
        self.num_mem_kv = flags.num_mem_kv
        self.mem_k = empty_parameter(kv_heads, flags.num_mem_kv, dim_head) if flags.num_mem_kv else None
        self.mem_v = empty_parameter(kv_heads, flags.num_mem_kv, self.value_dim_head) if flags.num_mem_kv else None
        for name, build in BIASES.items():
            setattr(self, name, build(self.dim, flags))
        self.has_bias = any(getattr(self, name) is not None for name in BIASES)
        self.composition = ComposeHeads.from_flags(self.dim, flags)
        self.path_steps = HouseholderSteps.from_flags(self.dim, flags)
        self.differential = Differential.from_flags(flags)
        self.attend = build_attend(flags)
        self.convolutions = build_convolutions(flags)

    def _build_output(self) -> None:
        flags, heads, value_dim = self.flags, self.heads, self.value_dim_head
        self.head_scale_params = empty_parameter(1, heads, 1, 1) if flags.head_scale else None
        self.to_v_head_gate = open_gate(self.dim, heads) if flags.gate_value_heads else None
        self.to_v_gate = value_gate(self.dim, flags)
        self.to_output_gate = output_gate(flags)
        self.gate_is_silu = flags.swiglu_values
        self.hybrid_module = build_hybrid(flags)
        self.hybrid_norms = self.hybrid_mix = None
        if self.hybrid_module is not None:
            self.hybrid_norms = nn.ModuleList([MultiheadRMSNorm(value_dim, heads), MultiheadRMSNorm(value_dim, heads)])
            if flags.hybrid_learned_mix:
                self.hybrid_mix = nn.Linear(self.dim, heads, bias=False)
        self.orthogonal_copies = flags.orthog_projected_values + flags.orthog_projected_values_per_head
        self.to_out = build_output(self.dim, flags)
        self.sublayer_dropout = nn.Dropout(flags.sublayer_dropout) if flags.sublayer_dropout > 0 else None

    @torch.no_grad()
    def init_own(self) -> None:
        for ones in (self.qk_norm_q_scale, self.qk_norm_k_scale, self.head_scale_params):
            if ones is not None:
                nn.init.ones_(ones)
        for memories in (self.mem_k, self.mem_v):
            if memories is not None:
                nn.init.normal_(memories)

    # ------------------------------------------------------------ the layer

    def forward(
        self,
        x: Float[Tensor, 'b n d'] | Float[Tensor, '3 b n d'],
        context: Float[Tensor, 'b j c'] | None = None,
        mask: Bool[Tensor, 'b t'] | None = None,
        context_mask: Bool[Tensor, 'b k'] | None = None,
        attn_mask: Bool[Tensor, '... n j'] | None = None,
        rel_pos: nn.Module | None = None,
        attn_bias: Float[Tensor, '... n j'] | None = None,
        rotary_pos_emb: tuple[Float[Tensor, '... p r'], Float[Tensor, '... p r'] | float] | None = None,
        context_rotary_pos_emb: tuple[Float[Tensor, '... pk r'], Float[Tensor, '... pk r'] | float] | None = None,
        polar_pos_emb: tuple[Float[Tensor, '... p r'], Float[Tensor, 'h 1 r']] | None = None,
        pos: Int[Tensor, '... n'] | None = None,
        prev_attn: Float[Tensor, 'b h n j'] | None = None,
        mem: Float[Tensor, 'b l d'] | None = None,
        mem_mask: Bool[Tensor, 'b l'] | None = None,
        return_intermediates: bool = False,
        cache: Intermediates | None = None,
        value_residual: Float[Tensor, 'b kh v e'] | None = None,
        additional_key_values: tuple[Float[Tensor, 'b kh m d'], Float[Tensor, 'b kh m e']] | None = None,
        additional_key_value_mask: Bool[Tensor, 'b m'] | None = None,
        kv_input_residual: Float[Tensor, 'b j c'] | None = None,
        flash_pack_seq_kwargs: dict[str, Any] | None = None,
        *,
        causal: bool | None = None,
        q_delta: Float[Tensor, '... (h d)'] | None = None,
        k_delta: Float[Tensor, '... (kh d)'] | None = None,
        v_delta: Float[Tensor, '... (kh e)'] | None = None,
        o_delta: Float[Tensor, '... (h e)'] | None = None,
        attn_delta: Float[Tensor, '... n j'] | None = None,
        around: BranchInputs | None = None,
    ) -> Float[Tensor, 'b n o'] | tuple[Float[Tensor, 'b n o'], Intermediates]:
        """Attend. Every boolean mask: True is a token, or may be seen.

        - ``context``: attend over it instead of x; ``context_mask``: its tokens (without a context: the own keys, in place of
          ``mask``). ``mask``: the tokens of x; other rows of the output are zero, unless a cache is given, and without a
          context they are not seen either. With a cache key masks cover past and new keys.
        - ``attn_mask`` (n j), (h n j) or (b h n j): who sees whom. ``attn_bias``, likewise: added to the scores; or
          ``rel_pos``, a module that makes such a bias, at positions ``pos``.
        - ``rotary_pos_emb``: (angles (1|b m r), scale), at least as many as keys; ``context_rotary_pos_emb``: those of the
          context's keys; ``polar_pos_emb``: (angles (1|b m d), bias (h 1 d)).
        - ``prev_attn``: scores of an earlier layer, added. ``value_residual``: the first layer's values, mixed in.
        - ``mem`` (b l d), ``mem_mask``: tokens in front of the keys. ``kv_input_residual``: added to the input of both.
        - ``additional_key_values``: keys and values in front of all, whose heads divide the query heads.
        - ``cache``: the intermediates of an earlier call; x is what comes after.
        - ``flash_pack_seq_kwargs``: ``cu_seqlens_q`` and ``cu_seqlens_k`` where one row packs several sequences.
        - ``causal``: in this call, whatever the layer was built for.
        - ``q_delta``, ``k_delta``, ``v_delta``: added to what is projected (k and v: with memories); ``o_delta``: to the heads
          side by side, before they are gated; ``attn_delta`` (n j), (h n j) or (b h n j): to the weights.

        - ``around``: all of these at once, checked, as a stack gives them.

        Returns the output (b n dim_out), or with ``return_intermediates`` or ``around`` (output, Intermediates).
        Raises ValueError or TypeError if an argument's shape or kind is wrong.
        """
        if around is not None:
            return self._attended(x, around)
        given = {
            'context': context, 'mask': mask, 'context_mask': context_mask, 'attn_mask': attn_mask, 'rel_pos': rel_pos,
            'attn_bias': attn_bias, 'rotary_pos_emb': rotary_pos_emb, 'context_rotary_pos_emb': context_rotary_pos_emb,
            'polar_pos_emb': polar_pos_emb, 'pos': pos, 'prev_attn': prev_attn, 'mem': mem, 'mem_mask': mem_mask,
            'return_intermediates': return_intermediates, 'cache': cache, 'value_residual': value_residual,
            'additional_key_values': additional_key_values, 'additional_key_value_mask': additional_key_value_mask,
            'kv_input_residual': kv_input_residual, 'flash_pack_seq_kwargs': flash_pack_seq_kwargs, 'causal': causal,
            'q_delta': q_delta, 'k_delta': k_delta, 'v_delta': v_delta, 'o_delta': o_delta, 'attn_delta': attn_delta,
        }  # fmt: skip
        from x_transformers.attention.arguments import branch_inputs

        out, intermediates = self._attended(x, branch_inputs(self, x, given))
        return (out, intermediates) if return_intermediates else out

    def _attended(self, x: Float[Tensor, '... n d'], given: BranchInputs) -> tuple[Float[Tensor, 'b n c'], Intermediates]:
        """The layer on x, (b n d) or with separate views (3 b n d)."""
        seen = project.gather(self, x, given)
        q = self.queries(seen, given)
        k, v, own = self._keys_values(self, seen, given)
        handed = HandedKeys(k, v, own, given.mask) if given.hands_on_keys else None
        if given.positions is not None or self.unit_gain is not None:
            q = self.placed_queries(q, given)
        bias = self.bias(seen, given) if self.has_bias else given.bias
        causal = self.causal if given.causal is None else given.causal
        mask = given.mask.narrowed(causal, self.max_attend_past, self.max_attend_future, self.flags.stick_breaking)
        excluded = own_values(v, q.shape[-2], seen.mems, given.past) if self.flags.exclusive else None
        front = 0
        if self.mem_k is not None or given.extra is not None:
            k, v, mask, front = with_extra_keys(
                k,
                v,
                mask,
                heads=self.heads,
                memory=self.memory(),
                extra=given.extra,
                positions=given.positions,
                rotated_heads=self.rotated_heads,
            )
        if self.differential is not None:
            v, excluded = paired_values(v), None if excluded is None else paired_values(excluded)
        if self.laser_clamp is not None:
            v = laser_in(v, self.laser_clamp)
        geometry = ScoreShape(queries=q.shape[-2], keys=k.shape[-2], front=front)
        out, told = attended(
            self.attend,
            q,
            k,
            v,
            mask=mask,
            bias=bias,
            previous=given.previous,
            geometry=geometry,
            packed=given.packed,
            rows=given.padding,
            delta=given.deltas.weights,
            steps=None if self.path_steps is None else self.path_steps(seen.x, given),
            composition=None if self.composition is None else self.composition(seen, given),
            return_attn=given.return_attn,
            return_scores=given.return_scores,
        )
        if given.return_scores or given.maps_now:
            # parameters that they are made of may be spread over processes again once this forward has ended
            _ = told.post_softmax_attn if given.maps_now else told.pre_softmax_attn
        # where nobody keeps them, their memory is free for what follows
        del q, k, v
        if self.laser_clamp is not None:
            out = laser_out(out, own.dtype)
        if excluded is not None:
            out = exclusive(out, excluded)
        if self.differential is not None:
            out = self.differential(out)
        result, hidden = self.read_out(out, own, seen.x, given)
        report = self.report(told, own, given, hidden)
        report.handed = handed
        return result, report

    # ------------------------------------------------------------ its steps

    def queries(self, seen: Seen, given: BranchInputs) -> Float[Tensor, 'b h n d']:
        """The queries, normed but without positions."""
        # what most layers do without is asked here: a call that does nothing is made for each layer and token
        q = self.to_q(seen.queries)
        if given.deltas.queries is not None:
            q = q + given.deltas.queries
        if self.convolutions is not None:
            q = project.convolved(self, 'q', q, given)
        q = split_heads(q, self.heads)
        return self.normed_queries(q) if self.qk_norm or self.q_rmsnorm is not None else q

    def read_out(
        self, out: Float[Tensor, 'b h n e'], own: Float[Tensor, 'b kh m e'], x: Float[Tensor, 'b n d'], given: BranchInputs
    ) -> tuple[Float[Tensor, 'b n c'], Any]:
        """What the layer writes of the attended values, and the hidden state of its hybrid module."""
        hidden = None
        if self.head_scale_params is not None or self.to_v_head_gate is not None or self.hybrid_module is not None:
            out, hidden = self.gated_heads(out, x, given)
        out = merge_heads(out)
        if given.deltas.heads is not None:
            out = out + given.deltas.heads
        if self.to_v_gate is not None or self.to_output_gate is not None:
            out = self.gated_channels(out, x)
        out = self.to_out(self.orthogonal_to(out, own) if self.orthogonal_copies else out)
        written = given.rows is None and self.sublayer_dropout is None
        return out if written else self.written(out, given.rows), hidden

    def written(self, out: Float[Tensor, 'b n c'], rows: Bool[Tensor, 'b n'] | None) -> Float[Tensor, 'b n c']:
        """What the layer writes: some of it left out in training, and nothing for rows that are no tokens."""
        out = out if self.sublayer_dropout is None else self.sublayer_dropout(out)
        return out if rows is None else out.masked_fill(~rows.unsqueeze(-1), 0.0)

    def normed_queries(self, q: Float[Tensor, 'b h n d']) -> Float[Tensor, 'b h n d']:
        if self.qk_norm:
            q = unit_heads(q, self.qk_norm_groups, self.qk_norm_q_scale, self.qk_norm_eps)
        return q if self.q_rmsnorm is None else self.q_rmsnorm(q).to(q.dtype)

    def placed_queries(self, q: Float[Tensor, 'b h n d'], given: BranchInputs) -> Float[Tensor, 'b h n e']:
        """Queries with their positions; those of unit length have their keys' gains, too."""
        q = q if given.positions is None else given.positions.queries(q, self.rotated_heads)
        return q if self.unit_gain is None else q * self.unit_gain().square().to(q.dtype)

    def normed_keys(self, k: Float[Tensor, 'b kh m d']) -> Float[Tensor, 'b kh m d']:
        if self.qk_norm:
            k = unit_heads(k, self.qk_norm_groups, self.qk_norm_k_scale, self.qk_norm_eps)
        return k if self.k_rmsnorm is None else self.k_rmsnorm(k).to(k.dtype)

    def mixed_values(self, own: Float[Tensor, 'b kh m e'], seen: Seen, given: BranchInputs) -> Float[Tensor, 'b kh m e']:
        """Values mixed with the first layer's, if there are any."""
        if given.first_values is None:
            return own
        mix = self.to_value_residual_mix
        return mix_values(own, given.first_values, None if mix is None else mix(mix_tokens(self, seen, given)))

    def normed_values(self, v: Float[Tensor, 'b kh m e']) -> Float[Tensor, 'b kh m e']:
        return v if self.value_rmsnorm is None else self.value_rmsnorm(v).to(v.dtype)

    def memory(self) -> tuple[Tensor, Tensor] | None:
        """The learned keys (of unit length over the whole head, whatever the groups) and values."""
        if self.mem_k is None or self.mem_v is None:
            return None
        if not self.qk_norm:
            return self.mem_k, self.mem_v
        return unit_heads(self.mem_k, 1, self.qk_norm_k_scale, self.qk_norm_eps), self.mem_v

    def bias(self, seen: Seen, given: BranchInputs) -> Bias | None:
        """What is added to the scores: the bias that is given and those that this layer makes of its input."""
        total = given.bias
        for name in BIASES:
            made = getattr(self, name)
            if made is None:
                continue
            bias: Bias = made.bias(seen.x, past=given.past, mem=given.mem, keys=given.mask.keys)
            total = bias if total is None or made.replaces else SumBias(total, bias)
        return total

    def gated_heads(
        self, out: Float[Tensor, 'b h n e'], x: Float[Tensor, 'b n d'], given: BranchInputs
    ) -> tuple[Float[Tensor, 'b h n e'], Any]:
        """Head scale, head gates, then the mixture with the hybrid module, whose hidden state is returned too."""
        if self.head_scale_params is not None:
            out = out * self.head_scale_params
        if self.to_v_head_gate is not None:
            out = gate_heads(out, x, self.to_v_head_gate)
        if self.hybrid_module is None or self.hybrid_norms is None:
            return out, None
        x_shown, keywords = module_input(x, self.flags.hybrid_mask_kwarg, given.padding, self.causal)
        other, hidden = run_module(self.hybrid_module, x_shown, given.past, **keywords)
        return mix_hybrid(out, other, self.hybrid_norms, None if self.hybrid_mix is None else self.hybrid_mix(x)), hidden

    def gated_channels(self, merged: Float[Tensor, 'b n (h e)'], x: Float[Tensor, 'b n d']) -> Float[Tensor, 'b n (h e)']:
        return gate_channels(merged, x, self.to_v_gate, self.to_output_gate, heads=self.heads, silu=self.gate_is_silu)

    def orthogonal_to(self, merged: Float[Tensor, 'b n (h e)'], own: Float[Tensor, 'b kh m e']) -> Float[Tensor, 'b n c']:
        """Each token's output without its component along the token's own values, once for each of the two flags.

        As in 2.16.1 the flag that is named after heads takes all heads as one vector, too.
        """
        own = tiled_heads(own[..., own.shape[-2] - merged.shape[-2] :, :], self.heads)
        return torch.cat([without_component(merged, merge_heads(own))] * self.orthogonal_copies, dim=-1)

    def report(self, told: Intermediates, own: Float[Tensor, 'b kh m e'], given: BranchInputs, hidden: Any) -> Intermediates:
        """What the scores and weights were, with what else the layer has to say."""
        told.values, told.hybrid_hidden, told.cache = own, hidden, given.past
        if given.log_probs:
            told.log_probs = log_prob_from_hard_attend(told)
        return told

    # ------------------------------------------------------------ training

    def muon_parameters(self) -> Iterator[nn.Parameter]:
        """The matrices that the Muon optimizer is meant for: of the values and of the output."""
        return chain(self.to_v.parameters(), self.to_out.parameters())

    @torch.no_grad()
    def qk_clip_(self, pre_softmax_attn: Float[Tensor, 'b h i j'] | Intermediates, tau: float = 100.0) -> None:
        """Shrink queries and keys of each head whose largest score exceeded ``tau``, so that it would have been ``tau``.

        A head's factor min(tau / largest, 1) goes into its rows of ``to_q`` and ``to_k`` in equal parts. Where query heads
        share a key head, the keys take the part of the head that needs least, and the queries the rest: the scores of every
        head get exactly its own factor, and no weight grows. https://arxiv.org/abs/2507.20534
        """
        clip_queries_and_keys_(self, pre_softmax_attn, tau)
