"""One attention layer: the order of its steps, each in a module of its own."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from x_transformers.attention import project
from x_transformers.attention.arguments import ARGUMENTS, branch_inputs
from x_transformers.attention.assemble import BIASES, attention_parts
from x_transformers.attention.attending import attended
from x_transformers.attention.composition import ComposeHeads
from x_transformers.attention.differential import Differential, paired_values
from x_transformers.attention.extra_keys import with_keys_in_front
from x_transformers.attention.gates import gate_channels, gated_heads
from x_transformers.attention.geometry import ScoreShape
from x_transformers.attention.heads import merge_heads, split_heads
from x_transformers.attention.inputs import BranchInputs, HandedKeys, Intermediates
from x_transformers.attention.parts import AttentionParts, Seen
from x_transformers.attention.path import HouseholderSteps
from x_transformers.attention.qk_clip import clip_queries_and_keys_
from x_transformers.attention.qk_norm import unit_heads
from x_transformers.attention.sharing import key_source, keys_handed
from x_transformers.attention.values import exclusive, laser_in, laser_out, orthogonal_to_values, own_values
from x_transformers.attention.weights import log_prob_from_hard_attend
from x_transformers.flags.attention import AttentionFlags
from x_transformers.flags.constructors import only
from x_transformers.flags.rule import effective
from x_transformers.flags.rules import check_attention
from x_transformers.flags.signature import ClassSignature, with_arguments
from x_transformers.position.bias import Bias, SumBias
from x_transformers.tensor_types import Bool, Float, Int

if TYPE_CHECKING:
    from typing import Unpack

    from x_transformers.flags.keywords import AttentionKeywords


class Attention(AttentionParts):
    """Multi-head attention, with a flag for each published variation.

    ``Attention(dim, **flags)``; the flags are those of ``AttentionFlags``, in a stack with the prefix ``attn_`` or
    ``cross_attn_``. Query head h uses key and value head h mod ``kv_heads``. The order of keys is: keys of another model,
    learned memory keys, then the layer's own keys: memories, past, new.

    Raises FlagError for flags that exclude each other, UnknownFlag for an unknown flag.
    """

    __signature__: Any = ClassSignature(only(AttentionFlags))

    # what is made of tokens for the scores, and of two softmaxes
    composition: ComposeHeads | None
    path_steps: HouseholderSteps | None
    differential: Differential | None

    def __init__(self, dim: int, **flags: Unpack[AttentionKeywords]) -> None:
        parsed = AttentionFlags.parse(flags, where='Attention')
        check_attention(parsed, dim)
        self._build(dim, parsed)

    @classmethod
    def from_flags(cls, dim: int, flags: AttentionFlags, *, shares_keys: bool = False) -> Self:
        """From flags that have been parsed and checked. ``shares_keys``: over the keys and values of an earlier layer."""
        self = cls.__new__(cls)
        self._build(dim, flags, shares_keys)
        return self

    def _build(self, dim: int, flags: AttentionFlags, shares_keys: bool = False) -> None:
        super().__init__()
        self.shares_keys = shares_keys
        self.flags = flags = effective(flags)
        self.dim, self.dim_context = dim, dim if flags.dim_context is None else flags.dim_context
        self.heads, self.kv_heads = flags.heads, flags.num_kv_heads
        self.dim_head, self.value_dim_head = flags.dim_head, flags.value_dim
        self.causal, self.max_attend_past, self.max_attend_future = flags.causal, flags.max_attend_past, flags.max_attend_future
        self.rotated_heads, self.separate_views = flags.rotated_heads, flags.qkv_receive_diff_residuals
        self.needing_own_keys = tuple(name for name in flags.having('own_keys') if getattr(flags, name))
        self.why_no_cache = tuple(name for name in flags.having('no_cache') if getattr(flags, name))
        self.can_cache_kv = not self.why_no_cache
        for name, part in attention_parts(dim, flags, shares_keys).items():
            setattr(self, name, part)
        self.has_bias = any(getattr(self, name) is not None for name in BIASES)
        self._keys_values = key_source(self)
        self.init_own()

    @torch.no_grad()
    def init_own(self) -> None:
        for ones in (self.qk_norm_q_scale, self.qk_norm_k_scale, self.head_scale_params):
            if ones is not None:
                nn.init.ones_(ones)
        for memories in (self.mem_k, self.mem_v):
            if memories is not None:
                nn.init.normal_(memories)

    # ------------------------------------------------------------ the layer

    @with_arguments(ARGUMENTS)
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
        """Attend. In every boolean mask, True marks a token, or a key that may be attended to.

        Args: as declared in ``attention/arguments.py``

        Returns the output (b n dim_out), or with ``return_intermediates`` or ``around`` (output, Intermediates).
        Raises ValueError or TypeError if an argument's shape or kind is wrong.
        """
        if around is not None:
            return self._attended(x, around)
        keywords = {
            'context': context, 'mask': mask, 'context_mask': context_mask, 'attn_mask': attn_mask, 'rel_pos': rel_pos,
            'attn_bias': attn_bias, 'rotary_pos_emb': rotary_pos_emb, 'context_rotary_pos_emb': context_rotary_pos_emb,
            'polar_pos_emb': polar_pos_emb, 'pos': pos, 'prev_attn': prev_attn, 'mem': mem, 'mem_mask': mem_mask,
            'return_intermediates': return_intermediates, 'cache': cache, 'value_residual': value_residual,
            'additional_key_values': additional_key_values, 'additional_key_value_mask': additional_key_value_mask,
            'kv_input_residual': kv_input_residual, 'flash_pack_seq_kwargs': flash_pack_seq_kwargs, 'causal': causal,
            'q_delta': q_delta, 'k_delta': k_delta, 'v_delta': v_delta, 'o_delta': o_delta, 'attn_delta': attn_delta,
        }  # fmt: skip
        out, intermediates = self._attended(x, branch_inputs(self, x, keywords))
        return (out, intermediates) if return_intermediates else out

    def _attended(self, x: Float[Tensor, '... n d'], inputs: BranchInputs) -> tuple[Float[Tensor, 'b n c'], Intermediates]:
        """The layer on x, (b n d) or with separate views (3 b n d)."""
        if self.shares_keys:
            inputs = inputs.having(mask=keys_handed(inputs).mask)
        seen = project.gather(self, x, inputs)
        q = self.queries(seen, inputs)
        k, v, values = self._keys_values(self, seen, inputs)
        handed = HandedKeys(k, v, values, inputs.mask) if inputs.hands_on_keys else None
        bias = self.bias(seen, inputs) if self.has_bias else inputs.bias
        causal = self.causal if inputs.causal is None else inputs.causal
        mask = inputs.mask.narrowed(causal, self.max_attend_past, self.max_attend_future, self.flags.stick_breaking)
        excluded = own_values(v, q.shape[-2], seen.mems, inputs.past) if self.flags.exclusive else None
        front = 0
        if self.mem_k is not None or inputs.extra is not None:
            k, v, mask, front = with_keys_in_front(self, k, v, mask, inputs)
        if self.differential is not None:
            v, excluded = paired_values(v), None if excluded is None else paired_values(excluded)
        if self.laser_clamp is not None:
            v = laser_in(v, self.laser_clamp)
        geometry = ScoreShape(queries=q.shape[-2], keys=k.shape[-2], front=front)
        out, report = attended(
            self.attend,
            q,
            k,
            v,
            mask=mask,
            bias=bias,
            previous=inputs.previous,
            geometry=geometry,
            packed=inputs.packed,
            rows=inputs.padding,
            delta=inputs.deltas.weights,
            steps=None if self.path_steps is None else self.path_steps(seen.x, inputs),
            composition=None if self.composition is None else self.composition(seen, inputs),
            return_attn=inputs.return_attn,
            return_scores=inputs.return_scores,
        )
        if inputs.return_scores or inputs.maps_now:
            # parameters that they are made of may be spread over processes again once this forward has ended
            _ = report.post_softmax_attn if inputs.maps_now else report.pre_softmax_attn
        # where nobody keeps them, their memory is free for what follows
        del q, k, v
        if self.laser_clamp is not None:
            out = laser_out(out, values.dtype)
        if excluded is not None:
            out = exclusive(out, excluded)
        if self.differential is not None:
            out = self.differential(out)
        result, hidden = self.read_out(out, values, seen.x, inputs)
        report.values, report.hybrid_hidden, report.cache, report.handed = values, hidden, inputs.past, handed
        if inputs.log_probs:
            report.log_probs = log_prob_from_hard_attend(report)
        return result, report

    # ------------------------------------------------------------ its steps

    def queries(self, seen: Seen, inputs: BranchInputs) -> Float[Tensor, 'b h n d']:
        """The queries, normed, with their positions."""
        # what most layers do without is asked here: a call that does nothing is made for each layer and token
        q: Tensor = self.to_q(seen.queries)
        if inputs.deltas.queries is not None:
            q = q + inputs.deltas.queries
        if self.convolutions is not None:
            q = project.convolved(self, 'q', q, inputs)
        q = split_heads(q, self.heads)
        if self.qk_norm:
            q = unit_heads(q, self.qk_norm_groups, self.qk_norm_q_scale, self.qk_norm_eps, self.qk_norm_over_heads)
        if self.q_rmsnorm is not None:
            q = self.q_rmsnorm(q).to(q.dtype)
        if inputs.positions is not None:
            q = inputs.positions.queries(q, self.rotated_heads)
        # those of unit length have their keys' gains, too
        return q if self.unit_gain is None else q * self.unit_gain().square().to(q.dtype)

    def read_out(
        self, out: Float[Tensor, 'b h n e'], values: Float[Tensor, 'b kh m e'], x: Float[Tensor, 'b n d'], inputs: BranchInputs
    ) -> tuple[Float[Tensor, 'b n c'], Any]:
        """What the layer writes of the attended values, and the hidden state of its hybrid module."""
        hidden = None
        if self.head_scale_params is not None or self.to_v_head_gate is not None or self.hybrid_module is not None:
            out, hidden = gated_heads(self, out, x, inputs)
        out = merge_heads(out)
        if inputs.deltas.heads is not None:
            out = out + inputs.deltas.heads
        if self.to_v_gate is not None or self.to_output_gate is not None:
            out = gate_channels(out, x, self.to_v_gate, self.to_output_gate, heads=self.heads, silu=self.gate_is_silu)
        if self.orthogonal_copies:
            out = orthogonal_to_values(out, values, self.heads, self.orthogonal_copies)
        out = self.to_out(out)
        if self.sublayer_dropout is not None:
            out = self.sublayer_dropout(out)
        # nothing is written for rows that are no tokens
        return out if inputs.rows is None else out.masked_fill(~inputs.rows.unsqueeze(-1), 0.0), hidden

    def bias(self, seen: Seen, inputs: BranchInputs) -> Bias | None:
        """What is added to the scores: the bias that is given and those that this layer makes of its input."""
        total = inputs.bias
        for name in BIASES:
            module = getattr(self, name)
            if module is None:
                continue
            bias: Bias = module.bias(seen.x, past=inputs.past, mem=inputs.mem, keys=inputs.mask.keys)
            total = bias if total is None or module.replaces else SumBias(total, bias)
        return total

    # ------------------------------------------------------------ training

    def muon_parameters(self) -> Iterator[nn.Parameter]:
        """The matrices that the Muon optimizer is meant for: of the values and of the output."""
        return chain(() if self.shares_keys else self.to_v.parameters(), self.to_out.parameters())

    @torch.no_grad()
    def qk_clip_(self, pre_softmax_attn: Float[Tensor, 'b h i j'] | Intermediates, tau: float = 100.0) -> None:
        """Shrink queries and keys of each head whose largest score exceeded ``tau``, so that it would have been ``tau``.

        The weights change in place, see ``attention/qk_clip.py``. https://arxiv.org/abs/2507.20534
        """
        clip_queries_and_keys_(self, pre_softmax_attn, tau)
