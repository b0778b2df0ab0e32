"""Flag groups: the units from which random combinations are drawn. Each is one idea, with what it needs to be switched on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

DECODER, ENCODER, CROSS = 'decoder', 'encoder', 'cross'
EVERYWHERE = frozenset({DECODER, ENCODER, CROSS})
CAUSAL = frozenset({DECODER, CROSS})

DIM, HEADS, DIM_HEAD, DEPTH = 16, 4, 8, 2
TOKENS, LENGTH = 24, 9

Inputs = Callable[[int, torch.Generator, torch.dtype], dict[str, Tensor]]


def no_inputs(rows: int, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
    return {}


@dataclass(frozen=True)
class Group:
    """One idea: its flags, where it makes sense, and what it needs at the call."""

    name: str
    flags: dict[str, Any] = field(default_factory=dict)  # keywords of the stack
    wrapper: dict[str, Any] = field(default_factory=dict)  # keywords of TransformerWrapper
    kinds: frozenset[str] = EVERYWHERE
    inputs: Inputs = no_inputs
    random: bool = False  # draws random numbers in eval mode too: equalities are not tested
    only_training: bool = False  # changes nothing in eval mode


def condition(rows: int, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
    return {'condition': torch.randn(rows, DIM, generator=generator, dtype=dtype)}


def in_attn_cond(rows: int, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
    return {'in_attn_cond': torch.randn(rows, DIM, generator=generator, dtype=dtype)}


class Recurrent(nn.Module):
    """A causal mixer that can go on from its hidden state."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gru = nn.GRU(DIM, width, batch_first=True)

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.gru(x, hidden)


def group(name: str, kinds: frozenset[str] = EVERYWHERE, *, wrapper: dict[str, Any] | None = None, inputs: Inputs = no_inputs,
          random: bool = False, only_training: bool = False, **flags: Any) -> Group:  # fmt: skip
    return Group(name, flags, wrapper or {}, kinds, inputs, random, only_training)


ATTENTION = (
    group('kv_heads', attn_kv_heads=2),
    group('one_kv_head', attn_one_kv_head=True),
    group('value_dim_head', attn_value_dim_head=6),
    group('mem_kv', attn_num_mem_kv=3),
    group('zero_kv', attn_add_zero_kv=True),
    group('qk_norm', attn_qk_norm=True),
    group('qk_norm_groups', attn_qk_norm=True, attn_qk_norm_groups=2, attn_qk_norm_scale=6),
    group('qk_norm_dim_scale', attn_qk_norm=True, attn_qk_norm_dim_scale=True),
    group('value_rmsnorm', attn_value_rmsnorm=True),
    group('head_scale', attn_head_scale=True),
    group('gate_value_heads', attn_gate_value_heads=True),
    group('gate_values', attn_gate_values=True),
    group('swiglu_values', attn_gate_values=True, attn_swiglu_values=True),
    group('on_attn', attn_on_attn=True),
    group('l2_distance', attn_l2_distance=True),
    group('pre_talking', attn_pre_talking_heads=True),
    group('post_talking', attn_post_talking_heads=True),
    group('pre_scale_post_talking', attn_pre_scale_post_talking_heads=True),
    group('softclamp', attn_softclamp_logits=True, attn_logit_softclamp_value=3.0),
    group('cog', attn_cog_signed=True),
    group('cope', CAUSAL, attn_use_cope=True, attn_cope_max_pos=4),
    group('cope_talking', CAUSAL, attn_use_cope=True, attn_cope_max_pos=4, attn_cope_talking_heads=True),
    group('cope_onehot', CAUSAL, attn_use_cope=True, attn_cope_max_pos=4, attn_cope_soft_onehot_pos=True),
    group('selective', CAUSAL, attn_selective=True),
    group('sink', attn_head_learned_sink=True),
    group('sigmoid', attn_sigmoid=True),
    group('hard', attn_hard=True),
    group('gumbel', attn_gumbel_softmax=True, random=True),
    group('sparse_topk', attn_sparse_topk=3),
    group('sparse_topk_through', attn_sparse_topk=3, attn_sparse_topk_straight_through=True),
    group('custom_fn', attn_custom_attn_fn=lambda scores: scores.softmax(dim=-1) * 0.5),
    group('window', attn_max_attend_past=3),
    group('laser', attn_laser=True),
    group('laser_clamp', attn_laser=True, attn_laser_softclamp_value=4.0),
    group('orthog', attn_orthog_projected_values=True),
    group('orthog_heads', attn_orthog_projected_values_per_head=True),
    group('orthog_both', attn_orthog_projected_values=True, attn_orthog_projected_values_per_head=True),
    group('latent_q', attn_use_latent_q=True, attn_dim_latent_q=6),
    group('latent_kv', attn_use_latent_kv=True, attn_dim_latent_kv=6),
    group('mla', attn_use_latent_kv=True, attn_dim_latent_kv=6, attn_latent_rope_subheads=2, rotary_pos_emb=True),
    group('hybrid', CAUSAL, attn_hybrid_module=Recurrent(HEADS * DIM_HEAD)),
    group('hybrid_mix', CAUSAL, attn_hybrid_module=Recurrent(HEADS * DIM_HEAD), attn_hybrid_learned_mix=True),
    group('hybrid_fold', CAUSAL, attn_hybrid_module=Recurrent(HEADS * DIM_HEAD), attn_hybrid_fold_axial_dim=1),
    group('zero_init', zero_init_branch_output=True),
    group('attn_dropout', attn_dropout=0.2, only_training=True),
    group('sublayer_dropout', attn_sublayer_dropout=0.2, ff_sublayer_dropout=0.2, only_training=True),
    group('onnxable', attn_onnxable=True),
    group('no_causal_flash', attn_flash=True),
)

POSITIONS = (
    group('rotary', rotary_pos_emb=True),
    group('rotary_dim', rotary_pos_emb=True, rotary_emb_dim=2),
    group('rotary_xpos', CAUSAL, rotary_xpos=True),
    group('rotary_scaled', rotary_pos_emb=True, rotary_interpolation_factor=2.0, rotary_base_rescale_factor=2.0),
    group('rotate_num_heads', rotary_pos_emb=True, rotate_num_heads=2),
    group('polar', polar_pos_emb=True),
    group('polar_uniform', polar_pos_emb=True, polar_bias_uniform_init=True),
    group('alibi', alibi_pos_bias=True),
    group('alibi_heads', alibi_pos_bias=True, alibi_num_heads=2),
    group('t5', rel_pos_bias=True, rel_pos_num_buckets=8, rel_pos_max_distance=16),
    group('dynamic', dynamic_pos_bias=True),
    group('dynamic_norm', dynamic_pos_bias=True, dynamic_pos_bias_log_distance=True, dynamic_pos_bias_norm=True),
    group('forgetting', attn_data_dependent_alibi=True),
    group('forgetting_row', CAUSAL, attn_data_dependent_alibi=True, attn_data_dependent_alibi_per_row=True),
    group('sinusoidal', wrapper={'scaled_sinu_pos_emb': True}),
    group('no_abs', wrapper={'use_abs_pos_emb': False}),
)

STACK = (
    group('scalenorm', use_scalenorm=True),
    group('rmsnorm', use_rmsnorm=True),
    group('simple_rmsnorm', use_simple_rmsnorm=True),
    group('dynamic_tanh', use_dynamic_tanh=True),
    group('derf', use_derf=True),
    group('adaptive_layernorm', use_adaptive_layernorm=True, inputs=condition),
    group('adaptive_rmsnorm', use_adaptive_rmsnorm=True, inputs=condition),
    group('adaptive_mlp', use_adaptive_rmsnorm=True, adaptive_condition_mlp=True, inputs=condition),
    group('adaptive_layerscale', use_adaptive_layerscale=True, inputs=condition),
    group('layerscale', use_layerscale=True, layerscale_init_value=0.5),
    group('no_unit_offset', norm_add_unit_offset=False),
    group('post_norm', pre_norm=False),
    group('no_final_norm', pre_norm_has_final_norm=False),
    group('sandwich_norm', sandwich_norm=True),
    group('macaron', macaron=True),
    group('sandwich_coef', sandwich_coef=1),
    group('par_ratio', frozenset({DECODER, ENCODER}), par_ratio=2),
    group('weight_tie', weight_tie_layers=True),
    group('custom_layers', frozenset({DECODER, ENCODER}), custom_layers=('a', 'f', 'a', 'f', 'f')),
    group('execute_order', frozenset({DECODER, ENCODER}), layers_execute_order=(0, 1, 0, 1, 2, 3)),
    group('gate_residual', gate_residual=True),
    group('scale_residual', scale_residual=True),
    group('scale_residual_constant', scale_residual_constant=0.7),
    group('streams', num_residual_streams=2),
    group('streams_doubly', num_residual_streams=2, hyper_conn_doubly_stochastic=True),
    group('streams_qkv', num_residual_streams=2, qkv_receive_diff_residuals=True),
    group('lime', integrate_layers=True),
    group('lime_relu', integrate_layers=True, layer_integrate_use_softmax=False),
    group('unet', unet_skips=True),
    group('reinject', reinject_input=True),
    group('reinject_gate', reinject_input=True, learned_reinject_input_gate=True),
    group('in_attn_cond', inputs=in_attn_cond),
    group('value_residual', add_value_residual=True),
    group('value_residual_fixed', add_value_residual=True, learned_value_residual_mix=False),
    group('residual_attn', residual_attn=True),
    group('cross_residual_attn', frozenset({CROSS}), cross_residual_attn=True),
    group('shift', shift_tokens=1),
    group('resi_dual', resi_dual=True),
    group('softclamp_output', softclamp_output=True, softclamp_output_value=5.0),
    group('layer_dropout', layer_dropout=0.3, only_training=True),
    group('cross_dropout', frozenset({CROSS}), cross_attn_tokens_dropout=0.3, only_training=True),
)

FEEDFORWARD = (
    group('glu', ff_glu=True),
    group('glu_mult_bias', ff_glu=True, ff_glu_mult_bias=True),
    group('swish', ff_swish=True),
    group('relu_squared', ff_relu_squared=True),
    group('solu', ff_solu=True),
    group('post_act_ln', ff_post_act_ln=True),
    group('no_bias', ff_no_bias=True),
    group('ff_mult', ff_mult=2),
    group('custom_activation', ff_custom_activation=nn.Tanh()),
)

WRAPPER = (
    group('emb_dim', wrapper={'emb_dim': 12}),
    group('tied', wrapper={'tie_embedding': True}),
    group('l2norm_embed', wrapper={'l2norm_embed': True}),
    group('post_emb_norm', wrapper={'post_emb_norm': True}),
    group('frac_gradient', wrapper={'emb_frac_gradient': 0.3}),
    group('logits_dim', wrapper={'logits_dim': 7}),
    group('memory_tokens', wrapper={'num_memory_tokens': 2}),
    group('mixture', wrapper={'mixture_of_softmax': True, 'mixture_of_softmax_k': 2}),
    group('sigsoftmax', wrapper={'sigsoftmax_logits': True}),
    group('deep_embed', wrapper={'ff_deep_embed': True}),
    group('emb_dropout', wrapper={'emb_dropout': 0.2}, only_training=True),
)

GROUPS: tuple[Group, ...] = ATTENTION + POSITIONS + STACK + FEEDFORWARD + WRAPPER
BY_NAME = {entry.name: entry for entry in GROUPS}
