"""Flag groups: the units from which random combinations are drawn. Each is one idea, with what it needs to be switched on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.laws.arguments import Along, Draw
from x_transformers import per_layer

DECODER, ENCODER, CROSS, PREFIX, CROSSER = 'decoder', 'encoder', 'cross', 'prefix', 'crosser'
EVERYWHERE = frozenset({DECODER, ENCODER, CROSS, PREFIX, CROSSER})
SELF = EVERYWHERE - {CROSSER}  # has self attention
CAUSAL = frozenset({DECODER, CROSS, PREFIX})
STRICT = frozenset({DECODER, CROSS})  # nobody sees anything later
WHOLE = frozenset({DECODER, ENCODER})  # blocks are self attention and feed-forward

DIM, HEADS, DIM_HEAD, DEPTH = 16, 4, 8, 2
TOKENS, LENGTH, MEMORIES, CONTEXT_LENGTH = 24, 9, 3, 5

Inputs = Callable[[Draw], dict[str, Tensor | Along]]


def no_inputs(draw: Draw) -> dict[str, Tensor | Along]:
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
    same: bool = False  # another way to the same numbers


def condition(draw: Draw) -> dict[str, Tensor | Along]:
    return {'condition': draw.normal(draw.rows, draw.flags.get('dim_condition', DIM))}


def condition_per_token(draw: Draw) -> dict[str, Tensor | Along]:
    """With memories, theirs in front."""
    made = draw.normal(draw.rows, draw.mems + LENGTH, DIM)
    return {'condition': Along(made, tokens=(1,), like_x=True, front=draw.mems)}


def in_attn_cond(draw: Draw) -> dict[str, Tensor | Along]:
    return {'in_attn_cond': draw.normal(draw.rows, DIM)}


def in_attn_cond_per_token(draw: Draw) -> dict[str, Tensor | Along]:
    return {'in_attn_cond': Along(draw.normal(draw.rows, LENGTH, DIM), tokens=(1,), like_x=True)}


def who_sees_whom(*leading: int) -> Inputs:
    """A random mask in which every token sees itself; -1 stands for the batch."""

    def make(draw: Draw) -> dict[str, Tensor | Along]:
        shape = [draw.rows if size < 0 else size for size in leading]
        allowed = draw.chance(*shape, LENGTH, LENGTH) | torch.eye(LENGTH, dtype=torch.bool)
        axes = (len(shape), len(shape) + 1)
        return {'attn_mask': Along(allowed, rows=0 if -1 in leading else None, tokens=axes)}

    return make


def own_bias(*leading: int) -> Inputs:
    def make(draw: Draw) -> dict[str, Tensor | Along]:
        shape = [draw.rows if size < 0 else size for size in leading]
        axes = (len(shape), len(shape) + 1)
        bias = draw.normal(*shape, LENGTH, LENGTH)
        return {'attn_bias': Along(bias, rows=0 if -1 in leading else None, tokens=axes)}

    return make


def own_positions(draw: Draw) -> dict[str, Tensor | Along]:
    return {'pos': Along(draw.whole(1, 3, LENGTH).cumsum(dim=-1) - 1, rows=None, tokens=(0,))}


def own_positions_per_row(draw: Draw) -> dict[str, Tensor | Along]:
    return {'pos': Along(draw.whole(1, 3, draw.rows, LENGTH).cumsum(dim=-1) - 1, tokens=(1,))}


def context_positions(draw: Draw) -> dict[str, Tensor | Along]:
    return {'context_pos': Along(draw.whole(1, 3, CONTEXT_LENGTH).cumsum(dim=-1), rows=None)}


def top(value: Any) -> Any:
    """Of a flag that differs between layers, the value of the top layer."""
    return value[-1] if isinstance(value, tuple) else value


def keys_of_another(draw: Draw) -> dict[str, Tensor | Along]:
    """Keys and values for the top layer, of which some rows have fewer."""
    heads, width = top(draw.flags.get('attn_kv_heads', 2)), draw.flags.get('attn_value_dim_head', DIM_HEAD)
    pairs = [(draw.normal(draw.rows, heads, 4, DIM_HEAD), draw.normal(draw.rows, heads, 4, width))]
    mask = torch.arange(4) >= draw.whole(0, 3, draw.rows)[:, None]
    return {'self_attn_additional_kv': Along(pairs), 'additional_kv_mask': mask}


def cache_of_another(draw: Draw) -> dict[str, Tensor | Along]:
    """What another stack has cached."""
    from x_transformers import Decoder

    stack = Decoder(
        dim=DIM,
        depth=2,
        heads=HEADS,
        attn_dim_head=DIM_HEAD,
        attn_value_dim_head=draw.flags.get('attn_value_dim_head', DIM_HEAD),
    )
    with torch.no_grad():
        _, record = stack.to(draw.dtype)(draw.normal(draw.rows, 4, DIM), return_hiddens=True)
    return {'self_attn_additional_kv': Along(record.kv_cache)}


def memories(draw: Draw) -> dict[str, Tensor | Along]:
    mems = [draw.normal(draw.rows, MEMORIES, DIM) for _ in range(draw.attentions)]
    mask = torch.arange(MEMORIES) >= draw.whole(0, 3, draw.rows)[:, None]
    return {'mems': Along(mems), 'mem_masks': Along([mask] * draw.attentions)}


def prepended(draw: Draw) -> dict[str, Tensor | Along]:
    return {'prepend_embeds': draw.normal(draw.rows, 2, draw.wrapper.get('emb_dim', DIM))}


def more_ids(draw: Draw) -> dict[str, Tensor | Along]:
    return {'embed_ids': Along({'kind': draw.whole(0, 5, draw.rows, LENGTH)}, tokens=(1,))}


def summed(draw: Draw) -> dict[str, Tensor | Along]:
    return {'sum_embeds': Along(draw.normal(draw.rows, LENGTH, draw.wrapper.get('emb_dim', DIM)), tokens=(1,))}


def key_shifts(draw: Draw) -> dict[str, Tensor | Along]:
    shifts = draw.normal(draw.attentions, draw.rows, LENGTH, DIM)
    return {'self_attn_kv_residuals': Along(shifts, rows=1, tokens=(2,), like_x=True)}


def context_shifts(draw: Draw) -> dict[str, Tensor | Along]:
    return {'cross_attn_kv_residuals': Along(draw.normal(1, draw.rows, CONTEXT_LENGTH, DIM), rows=1)}


def twice(draw: Draw) -> dict[str, Tensor | Along]:
    return {'recycle_steps': Along(2, rows=None)}


def packed(draw: Draw) -> dict[str, Tensor | Along]:
    """Three sequences in the one row that there may be."""
    starts = torch.tensor((0, 3, 4, LENGTH), dtype=torch.int32)
    return {'flash_pack_seq_kwargs': Along({'cu_seqlens_q': starts, 'cu_seqlens_k': starts}, rows=None)}


def repeated(draw: Draw) -> dict[str, Tensor | Along]:
    return {'repeat_blocks': Along((0, 2), rows=None)}


def transformed(draw: Draw) -> dict[str, Tensor | Along]:
    return {'transform_block_inputs': Along({1: torch.tanh, 2: torch.sin}, rows=None)}


def excised(draw: Draw) -> dict[str, Tensor | Along]:
    return {**prepended(draw), 'excise_prepend_embeds': Along(True, rows=None)}


class Recurrent(nn.Module):
    """A causal mixer that can go on from its hidden state."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gru = nn.GRU(DIM, width, batch_first=True)

    def forward(self, x: Tensor, hidden: Tensor | None = None, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.gru(x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 1.0), hidden)


class Running(nn.Module):
    """A mixer that follows the protocol: a map of the sum of everything so far."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.map = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        whole = x.cumsum(dim=1) if state is None else state + x.cumsum(dim=1)
        return self.map(whole), whole[:, -1:]


def group(name: str, kinds: frozenset[str] = EVERYWHERE, *, wrapper: dict[str, Any] | None = None, inputs: Inputs = no_inputs,
          random: bool = False, only_training: bool = False, same: bool = False, **flags: Any) -> Group:  # fmt: skip
    return Group(name, flags, wrapper or {}, kinds, inputs, random, only_training, same)


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
    group('qk_rmsnorm', attn_qk_rmsnorm=True),
    group('k_rmsnorm', attn_k_rmsnorm=True),
    group('gate_rank', attn_gate_values=True, attn_gate_values_rank=4),
    group('gate_headwise', attn_gate_values=True, attn_gate_values_headwise=True),
    group('output_gate', attn_output_gate=True),
    group('output_gate_headwise', attn_output_gate=True, attn_output_gate_headwise=True, attn_swiglu_values=True),
    group(
        'gates_together',
        attn_gate_values=True,
        attn_output_gate=True,
        attn_output_gate_rank=5,
        attn_low_rank_silu_gates=False,
    ),
    group('no_projection', attn_project_out=False, attn_value_dim_head=DIM // HEADS),
    group('l2_distance', attn_l2_distance=True),
    group('pre_talking', attn_pre_talking_heads=True),
    group('post_talking', attn_post_talking_heads=True),
    group('pre_scale_post_talking', attn_pre_scale_post_talking_heads=True),
    group('softclamp', attn_softclamp_logits=True, attn_logit_softclamp_value=3.0),
    group('cog', attn_cog_signed=True),
    group('cope', STRICT, attn_use_cope=True, attn_cope_max_pos=4),
    group('cope_talking', STRICT, attn_use_cope=True, attn_cope_max_pos=4, attn_cope_talking_heads=True),
    group('cope_onehot', STRICT, attn_use_cope=True, attn_cope_max_pos=4, attn_cope_soft_onehot_pos=True),
    group('scalable_softmax', attn_scalable_softmax=True),
    group('selective', STRICT, attn_selective=True),
    group('sink', attn_head_learned_sink=True),
    group('sigmoid', attn_sigmoid=True),
    group('hard', attn_hard=True),
    group('gumbel', attn_gumbel_softmax=True, random=True),
    group('softpick', attn_softpick=True),
    group('stick_breaking', STRICT, attn_stick_breaking=True),
    group('sparse_topk', attn_sparse_topk=3),
    group('sparse_topk_through', attn_sparse_topk=3, attn_sparse_topk_straight_through=True),
    group('custom_fn', attn_custom_attn_fn=lambda scores: scores.softmax(dim=-1) * 0.5),
    group('window', SELF, attn_max_attend_past=3),
    group('window_both', frozenset({ENCODER}), attn_max_attend_past=2, attn_max_attend_future=2),
    group('laser', attn_laser=True),
    group('laser_clamp', attn_laser=True, attn_laser_softclamp_value=4.0),
    group('orthog', SELF, attn_orthog_projected_values=True),
    group('orthog_heads', SELF, attn_orthog_projected_values_per_head=True),
    group('orthog_both', SELF, attn_orthog_projected_values=True, attn_orthog_projected_values_per_head=True),
    group('differential', attn_differential=True),
    group('differential_start', attn_differential=True, attn_differential_lambda_init=0.5),
    group('composable', attn_composable=True),
    group('composable_rank', attn_composable=True, attn_composable_rank=1),
    group('tensor_product', attn_tensor_product=True),
    group(
        'tensor_product_ranks',
        attn_tensor_product=True,
        attn_tensor_product_q_rank=1,
        attn_tensor_product_kv_rank=3,
        rotary_pos_emb=True,
    ),
    group('exclusive', SELF, attn_exclusive=True),
    group('latent_q', attn_use_latent_q=True, attn_dim_latent_q=6),
    group('latent_kv', attn_use_latent_kv=True, attn_dim_latent_kv=6),
    group('mla', attn_use_latent_kv=True, attn_dim_latent_kv=6, attn_latent_rope_subheads=2, rotary_pos_emb=True),
    group('hybrid', CAUSAL, attn_hybrid_module=Recurrent(HEADS * DIM_HEAD)),
    group('hybrid_mix', CAUSAL, attn_hybrid_module=Recurrent(HEADS * DIM_HEAD), attn_hybrid_learned_mix=True),
    group('hybrid_fold', CAUSAL, attn_hybrid_module=Recurrent(HEADS * DIM_HEAD), attn_hybrid_fold_axial_dim=1),
    group('zero_init', zero_init_branch_output=True),
    # what a query sees depends on the other queries
    group('inverted', frozenset({ENCODER, CROSSER}), attn_inverted_attention=True),
    group('attn_dropout', attn_dropout=0.2, only_training=True),
    group('sublayer_dropout', attn_sublayer_dropout=0.2, ff_sublayer_dropout=0.2, only_training=True),
    group('onnxable', attn_onnxable=True, same=True),
    group('zero_output', attn_zero_init_output=True, ff_zero_init_output=True),
    group('gumbel_soft', attn_gumbel_softmax=True, attn_gumbel_softmax_hard=False, attn_gumbel_softmax_temp=2.0, random=True),
    group('hybrid_mask', frozenset({ENCODER}), attn_hybrid_module=Recurrent(HEADS * DIM_HEAD), attn_hybrid_mask_kwarg='mask'),
    group('qkv_bias', attn_qkv_bias=True),
    group('qv_bias', attn_qkv_bias=('q', 'v')),
    group('out_bias', attn_out_bias=True),
    group('attn_scale', attn_scale=0.7),
    group('qk_norm_shared', attn_qk_norm=True, attn_qk_norm_dim_scale=True, attn_qk_norm_shared_gain=True),
    group('qk_norm_eps', attn_qk_norm=True, attn_qk_norm_eps=0.3),
    group('qk_norm_over_heads', attn_qk_norm=True, attn_qk_norm_dim_scale=True, attn_qk_norm_over_heads=True),
    group('no_causal_flash', attn_flash=True, same=True),
    group(
        'math_only',
        attn_attend_sdp_kwargs={'enable_flash': False, 'enable_math': True, 'enable_mem_efficient': False},
        same=True,
    ),
)

POSITIONS = (
    group('rotary', SELF, rotary_pos_emb=True),
    group('rotary_dim', SELF, rotary_pos_emb=True, rotary_emb_dim=2),
    group('rotary_whole', SELF, rotary_pos_emb=True, rotary_whole_head=True),
    group('rotary_xpos', STRICT, rotary_xpos=True),
    group('rotary_scaled', SELF, rotary_pos_emb=True, rotary_interpolation_factor=2.0, rotary_base_rescale_factor=2.0),
    group('rotary_theta', SELF, rotary_pos_emb=True, rotary_theta=100.0),
    group('rotary_axes', SELF, rotary_pos_emb=True, rotary_axes=(3, 3)),
    group('rotary_axes_three', SELF, rotary_pos_emb=True, rotary_axes=(2, 2, 2), rotary_emb_dim=6, rotary_layout='halves'),
    group('rotary_axes_mixed', SELF, rotary_pos_emb=True, rotary_axes=(3, 3), rotary_axes_mixed=True),
    group('rotary_halves', SELF, rotary_pos_emb=True, rotary_layout='halves'),
    group('rotary_by_layer', SELF, rotary_pos_emb=True, rotary_theta=(100.0, 10.0)),
    group('rope_linear', SELF, rotary_pos_emb=True, rotary_scaling={'type': 'linear', 'factor': 3.0}),
    group('rope_yarn', SELF, rotary_pos_emb=True, rotary_scaling={'type': 'yarn', 'factor': 4.0, 'original_length': 20}),
    group(
        'rope_yarn_halves',
        SELF,
        rotary_pos_emb=True,
        rotary_layout='halves',
        rotary_scaling={'type': 'yarn', 'factor': 4.0, 'original_length': 20},
    ),
    group(
        'rope_llama3',
        SELF,
        rotary_pos_emb=True,
        rotary_scaling={
            'type': 'llama3',
            'factor': 4.0,
            'low_freq_factor': 1.0,
            'high_freq_factor': 4.0,
            'original_length': 20,
        },
    ),
    # a longer sequence turns earlier tokens otherwise, so only a stack that sees everything at once obeys all laws
    group(
        'rope_dynamic',
        frozenset({ENCODER}),
        rotary_pos_emb=True,
        rotary_scaling={'type': 'dynamic', 'factor': 2.0, 'original_length': 4},
    ),
    group(
        'rope_longrope',
        frozenset({ENCODER}),
        rotary_pos_emb=True,
        rotary_scaling={'type': 'longrope', 'short_factor': (1.0, 1.5), 'long_factor': (2.0, 4.0), 'original_length': 4},
    ),
    group('rotate_num_heads', SELF, rotary_pos_emb=True, rotate_num_heads=2),
    group('rotate_none', SELF, rotary_pos_emb=True, rotate_num_heads=per_layer((None, 0))),
    group('polar', SELF, polar_pos_emb=True),
    group('polar_uniform', SELF, polar_pos_emb=True, polar_bias_uniform_init=True),
    group('path', STRICT, attn_path=True),
    group('path_rank', STRICT, attn_path=True, attn_path_rank=3),
    group('alibi', SELF, alibi_pos_bias=True),
    group('alibi_heads', SELF, alibi_pos_bias=True, alibi_num_heads=2),
    group('alibi_slopes', SELF, alibi_pos_bias=True, rel_pos_kwargs={'slopes': [0.9, 0.6, 0.3, 0.1]}),
    group('t5', SELF, rel_pos_bias=True, rel_pos_num_buckets=8, rel_pos_max_distance=16),
    group('dynamic', SELF, dynamic_pos_bias=True),
    group('dynamic_norm', SELF, dynamic_pos_bias=True, dynamic_pos_bias_log_distance=True, dynamic_pos_bias_norm=True),
    group('forgetting', SELF, attn_data_dependent_alibi=True),
    group('rel_proj', SELF, attn_use_rel_proj_pos_bias=True, attn_rel_proj_num_distance_basis=3, attn_rel_proj_max_dist=6),
    group('forgetting_row', STRICT, attn_data_dependent_alibi=True, attn_data_dependent_alibi_per_row=True),
    group('dynamic_deep', SELF, dynamic_pos_bias=True, dynamic_pos_bias_mlp_depth=3),
    group('forgetting_kwargs', SELF, attn_data_dependent_alibi=True, attn_data_dependent_alibi_kwargs={'bias_init': 1.0}),
    group(
        'forgetting_row_dim',
        STRICT,
        attn_data_dependent_alibi=True,
        attn_data_dependent_alibi_per_row=True,
        attn_data_dependent_alibi_per_row_dim_head=4,
    ),
    group('xpos_base', STRICT, rotary_xpos=True, rotary_xpos_scale_base=8),
    group('no_stack_abs', disable_abs_pos_emb=True),
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
    group('norm_eps', norm_eps=0.3),
    group('rmsnorm_eps', use_rmsnorm=True, norm_eps=0.3),
    group('adaptive_eps', use_adaptive_rmsnorm=True, norm_eps=0.3, inputs=condition),
    group('norm_bias', norm_bias=True),
    group('no_unit_offset', norm_add_unit_offset=False),
    group('post_norm', pre_norm=False),
    group('no_final_norm', pre_norm_has_final_norm=False),
    group('sandwich_norm', sandwich_norm=True),
    group('norm_behind_alone', sandwich_norm=True, norm_before=False),
    group('norm_not_first', norm_before=lambda layer: layer > 0),
    group('macaron', macaron=True),
    group('sandwich_coef', sandwich_coef=1),
    group('par_ratio', WHOLE, par_ratio=2),
    group('weight_tie', weight_tie_layers=True),
    group('custom_layers', WHOLE, custom_layers=('a', 'f', 'a', 'f', 'f')),
    group('execute_order', WHOLE, layers_execute_order=(0, 1, 0, 1, 2, 3)),
    group('gate_residual', gate_residual=True),
    group('orthog_residual', orthog_residual=True),
    group('ngpt', ngpt=True),
    group('ngpt_glu', ngpt=True, ff_glu=True, ff_swish=True, attn_kv_heads=2),
    group('unit_attention', attn_unit_weights=True),
    group('unit_ff', ff_unit_weights=True),
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
    group('resi_dual_scale', resi_dual=True, resi_dual_scale=0.5),
    group('tanh_alpha', use_dynamic_tanh=True, dynamic_tanh_init_alpha=0.5),
    group('dim_condition', use_adaptive_rmsnorm=True, dim_condition=6, inputs=condition),
    group(
        'mlp_expansion',
        use_adaptive_rmsnorm=True,
        adaptive_condition_mlp=True,
        adaptive_condition_mlp_expansion=2,
        inputs=condition,
    ),
    group('condition_per_token', use_adaptive_layernorm=True, inputs=condition_per_token),
    group('in_attn_cond_per_token', inputs=in_attn_cond_per_token),
    group('streams_sinkhorn', num_residual_streams=2, hyper_conn_doubly_stochastic=True, hyper_conn_sinkhorn_iters=2),
    group('shift_two', WHOLE, shift_tokens=(0, 2, 1, 0)),
    group('softclamp_output', softclamp_output=True, softclamp_output_value=5.0),
    group('only_attn', only_attn=True),
    group('only_attn_ratio', WHOLE, only_attn=True, par_ratio=2),
    group('pre_and_post_norm', pre_and_post_norm=True),
    group('depth_scale', depth_scale_residual=True),
    group('branch_scale', depth_scale_residual=0.5),
    group('branch_scale_residual', scale_residual=0.7),
    group('aggregated', attn_aggregated_residuals=True, attn_aggregated_residual_kwargs={'lora_rank': 4}),
    group(
        'aggregated_qkv',
        attn_aggregated_residuals=True,
        attn_aggregated_residual_kwargs={'lora_rank': 4, 'lora_activation': nn.SiLU()},
        qkv_receive_diff_residuals=True,
    ),
    group('mv_split', mv_split_residual=True),
    group('mv_split_learned', mv_split_residual=True, residual_fn_kwargs={'learned': True, 'init_alpha': 0.5}),
    group('parallel_block', parallel_block=True),
    group('gated_streams', num_residual_streams=2, gated_multi_residual=True, residual_fn_kwargs={'read_gate_rank': 3}),
    group('norm_scaling', layer_norm_scaling=True),
    group('canon_a', SELF, canon='a'),
    group('canon_b', SELF, attn_canon=True),
    group('canon_c', canon=('c',)),
    group('canon_d', ff_canon=True),
    group('canon', SELF, canon='abcd', ff_glu=True),
    group('kv_share', SELF, kv_share_every=2),
    group('mudd', SELF, mudd=True),
    group('lambdas', residual_lambdas=True, embed_lambdas=True),
    group('lambdas_start', residual_lambdas=(1.1, 0.9), embed_lambdas=0.3),
    group(
        'mixer_delta',
        WHOLE,
        custom_layers=('m', 'f', 'a', 'f'),
        mixer='gated_delta_rule',
        mixer_kwargs={'heads': 2, 'dim_head': 4, 'value_dim_head': 6},
    ),
    group(
        'mixer_gated',
        WHOLE,
        custom_layers=('m', 'f', 'a', 'f'),
        mixer='gated_linear_attention',
        mixer_kwargs={'dim_head': 3, 'rank': 2, 'conv': 2},
    ),
    group('mixer_own', WHOLE, custom_layers=('m', 'f', 'a', 'f'), mixer=Running),
    group(
        'mixer_per_layer',
        WHOLE,
        custom_layers=('m', 'm', 'a', 'f'),
        mixer=('gated_linear_attention', 'gated_delta_rule'),
        mixer_kwargs=({'rank': 2}, {'conv': 3}),
    ),
    group('layer_dropout', layer_dropout=0.3, only_training=True),
    group('cross_dropout', frozenset({CROSS}), cross_attn_tokens_dropout=0.6, only_training=True),
)

FEEDFORWARD = (
    group('glu', ff_glu=True),
    group('glu_mult_bias', ff_glu=True, ff_glu_mult_bias=True),
    group('swish', ff_swish=True),
    group('relu_squared', ff_relu_squared=True),
    group('solu', ff_solu=True),
    group('ff_softclamp', ff_softclamp_value=0.5),
    group('glu_softclamp', ff_glu=True, ff_glu_softclamp=True),
    group(
        'glu_softclamp_values',
        ff_glu=True,
        ff_swish=True,
        ff_glu_softclamp=True,
        ff_glu_gate_softclamp_value=0.5,
        ff_glu_up_softclamp_value=0.7,
    ),
    group('output_proj_depth', attn_output_proj_depth=3, ff_output_proj_depth=2),
    group('post_act_ln', ff_post_act_ln=True),
    group('no_bias', ff_no_bias=True),
    group('ff_mult', ff_mult=2),
    group('glu_bias', ff_glu=True, ff_glu_bias=False),
    group('dim_inner', ff_dim_inner=23),
    group('named_activation', ff_custom_activation='gelu_tanh'),
    group('glu_clamp', ff_glu=True, ff_glu_clamp_value=0.5, ff_glu_add_one=True),
    group('experts', ff_experts=4),
    group('experts_raw', ff_experts=4, ff_experts_active=1, ff_router_normalize=False, ff_router_balance='none'),
    # both are active: no rounding changes the choice
    group('experts_gated', ff_experts=2, ff_shared_experts=1, ff_shared_experts_gate=True, ff_router_balance='none'),
    group(
        'experts_shared',
        ff_experts=6,
        ff_experts_active=3,
        ff_shared_experts=2,
        ff_router='sigmoid',
        ff_router_scale=1.5,
        ff_router_balance='bias',
        ff_router_balance_step=0.1,
        ff_router_z_loss_weight=0.1,
    ),
    group(
        'experts_biased',
        ff_glu=True,
        ff_experts=4,
        ff_custom_activation='quick_gelu',
        ff_glu_clamp_value=1.0,
        ff_glu_add_one=True,
        ff_router_bias=True,
        ff_router_balance_weight=0.5,
    ),
    group('per_layer_experts', ff_experts=(None, 4)),
    group('ff_dropout', ff_dropout=0.2, only_training=True),
    group('custom_activation', ff_custom_activation=nn.Tanh()),
)

# flags that differ between layers; the last value is the one that other groups know
PER_LAYER = (
    group('per_layer_heads', heads=(2, 4)),
    group('per_layer_dim_head', SELF, attn_dim_head=(6, 8)),
    group('per_layer_kv_heads', SELF, attn_kv_heads=(4, 2)),
    group('per_layer_window', SELF, attn_max_attend_past=(3, None)),
    group('per_layer_weights', SELF, attn_sigmoid=(True, False), attn_num_mem_kv=(0, 3)),
    group('per_layer_norms', SELF, attn_qk_norm=lambda layer: layer % 2 == 0, attn_head_scale=(False, True)),
    group('per_layer_latent', SELF, attn_use_latent_kv=(True, False), attn_dim_latent_kv=(6, None)),
    group('per_layer_cross', frozenset({CROSS, CROSSER}), cross_attn_dim_head=(6, 4), cross_attn_gate_values=(False, True)),
    group('per_layer_ff', ff_mult=(4, 1.5), ff_glu=lambda layer: layer == 1),
    group('per_layer_activation', ff_custom_activation=per_layer((nn.Tanh(), None))),
    group('per_layer_residual', scale_residual_constant=lambda layer: 1 - 0.1 * layer),
)

WRAPPER = (
    group('emb_dim', wrapper={'emb_dim': 12}),
    group('tied', wrapper={'tie_embedding': True}),
    group('tied_scale', wrapper={'tie_embedding': True, 'tie_embedding_scale': 0.3}),
    group('l2norm_embed', wrapper={'l2norm_embed': True}),
    group('post_emb_norm', wrapper={'post_emb_norm': True}),
    group('frac_gradient', wrapper={'emb_frac_gradient': 0.3}),
    group('logits_dim', wrapper={'logits_dim': 7}),
    group('memory_tokens', wrapper={'num_memory_tokens': 2}),
    group('mixture', wrapper={'mixture_of_softmax': True, 'mixture_of_softmax_k': 2}),
    group('sigsoftmax', wrapper={'sigsoftmax_logits': True}),
    group('deep_embed', wrapper={'ff_deep_embed': True}),
    group('interspersed', STRICT, wrapper={'num_memory_tokens': 2, 'memory_tokens_interspersed_every': 4}),
    group('output_heads', wrapper={'num_output_heads': 2}),
    group('multi_token', wrapper={'multi_token_heads': 3}),
    group('next_embed', wrapper={'add_continuous_pred_head': True}),
    group('only_embed', wrapper={'return_only_embed': True}),
    group('squeezed', wrapper={'logits_dim': 1, 'squeeze_out_last_dim': True}),
    group('recycling', wrapper={'recycling': True}, inputs=twice),
    group('embed_ids', wrapper={'embed_num_tokens': {'kind': 5}}, inputs=more_ids),
    group('average', WHOLE, wrapper={'average_pool_embed': True}),
    group('cls', frozenset({ENCODER, CROSSER}), wrapper={'use_cls_token': True}),
    group('cls_two', frozenset({ENCODER}), wrapper={'use_cls_token': True, 'num_cls_tokens': 2}),
    group('attn_pool', frozenset({ENCODER}), wrapper={'attn_pool': True, 'num_pooled_tokens': 2}),
    group('attn_pool_deep', frozenset({ENCODER}), wrapper={'attn_pool': True, 'attn_pool_depth': 2, 'dim_pooled_tokens': 6}),
    group('embed_scale', wrapper={'embed_scale': 3.0}),
    group('logits_scale', wrapper={'logits_scale': 0.5}),
    group('logits_softcap', wrapper={'logits_softcap': 2.0}),
    group('logits_bias', wrapper={'logits_bias': True}),
    group('tied_bias', wrapper={'logits_bias': True, 'tie_embedding': True}),
    group('logits_transform', wrapper={'logits_transform': 'gelu'}),
    group('logits_transform_bias', wrapper={'logits_transform': 'relu', 'logits_transform_bias': False}),
    group('smear', wrapper={'smear': True}),
    group('bigram', wrapper={'bigram_hash_embed': 13}),
    group('bigram_smear', wrapper={'bigram_hash_embed': 13, 'smear': True}),
    group('value_embed', SELF, wrapper={'value_embed': 1}),
    group('value_embed_some', SELF, wrapper={'value_embed': 2, 'value_embed_gate_dim': 3}),
    group('randomized_positions', wrapper={'randomized_positions': 2 * LENGTH}, only_training=True),
    group('emb_dropout', wrapper={'emb_dropout': 0.2}, only_training=True),
)

CALLS = (
    group('attn_mask', SELF, inputs=who_sees_whom()),
    group('attn_mask_heads', SELF, inputs=who_sees_whom(HEADS)),
    group('attn_mask_rows', SELF, inputs=who_sees_whom(-1, 1)),
    group('attn_mask_whole', SELF, inputs=who_sees_whom(-1, HEADS)),
    group('attn_bias', SELF, inputs=own_bias()),
    group('attn_bias_heads', SELF, inputs=own_bias(HEADS)),
    group('attn_bias_whole', SELF, inputs=own_bias(-1, HEADS)),
    group('pos', inputs=own_positions),
    group('pos_rows', inputs=own_positions_per_row),
    group('context_pos', frozenset({CROSS, CROSSER}), rotary_pos_emb=True, inputs=context_positions),
    group('additional_kv', SELF, inputs=keys_of_another),
    group('additional_cache', SELF, inputs=cache_of_another),
    group('mems', SELF, inputs=memories),
    group('prepend', inputs=prepended),
    group('sum_embeds', inputs=summed),
    group('repeat_blocks', inputs=repeated),
    group('transform_blocks', inputs=transformed),
    group('excise_prepend', inputs=excised),
    group('kv_shift', SELF, inputs=key_shifts),
    group('context_shift', frozenset({CROSS, CROSSER}), inputs=context_shifts),
)

# drawn by no law, as each has tests of its own; what several processes make of them is compared all the same
ASIDE = (
    group('looped', STRICT, pre_and_post_norm=True, wrapper={'looped': True, 'max_looped_steps': 2}),
    group(
        'looped_positions',
        STRICT,
        pre_and_post_norm=True,
        rotary_pos_emb=True,
        wrapper={'looped': True, 'looped_positions': True},
    ),
    group('recycling_drawn', wrapper={'recycling': True, 'train_max_recycle_steps': 3}, only_training=True),
    group('run_again', gradient_checkpointing=True, same=True),
    group('packed', WHOLE, rotary_pos_emb=True, attn_flash_pack_seq=True, inputs=packed),
)

GROUPS: tuple[Group, ...] = ATTENTION + POSITIONS + STACK + FEEDFORWARD + PER_LAYER + WRAPPER + CALLS
BY_NAME = {entry.name: entry for entry in (*GROUPS, *ASIDE)}
