"""Which models can be read by a stepper: all whose flags are listed here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from x_transformers.attention.attention import Attention
from x_transformers.attention.kernels import choose
from x_transformers.feedforward import FeedForward
from x_transformers.layers.layer import Layer
from x_transformers.layers.residual import ResidualPath
from x_transformers.layers.stack import AttentionLayers
from x_transformers.stepping.attention import front_rows, runs_directly
from x_transformers.transformer_wrapper import TransformerWrapper

if TYPE_CHECKING:
    from x_transformers.cache.kv_cache import KVCache
    from x_transformers.flags.base import Flags

WRAPPER = frozenset({
    'num_tokens', 'max_seq_len', 'attn_layers', 'emb_dim', 'max_mem_len', 'shift_mem_down', 'emb_dropout', 'post_emb_norm',
    'tie_embedding', 'logits_dim', 'use_abs_pos_emb', 'scaled_sinu_pos_emb', 'l2norm_embed', 'emb_frac_gradient',
    'attn_z_loss_weight', 'token_emb', 'mixture_of_softmax', 'mixture_of_softmax_k', 'sigsoftmax_logits', 'to_logits',
    'add_continuous_pred_head', 'input_not_include_cache',
})  # fmt: skip
STACK = frozenset({
    'dim', 'depth', 'heads', 'causal', 'cross_attend', 'only_cross', 'use_scalenorm', 'use_rmsnorm', 'use_dynamic_tanh',
    'dynamic_tanh_init_alpha', 'use_derf', 'use_simple_rmsnorm', 'norm_add_unit_offset', 'alibi_pos_bias', 'alibi_num_heads',
    'rel_pos_bias', 'rel_pos_num_buckets', 'rel_pos_max_distance', 'dynamic_pos_bias', 'dynamic_pos_bias_log_distance',
    'dynamic_pos_bias_mlp_depth', 'dynamic_pos_bias_norm', 'rel_pos_kwargs', 'rotary_pos_emb', 'rotary_emb_dim',
    'rotary_interpolation_factor', 'rotary_base_rescale_factor', 'rotate_num_heads', 'weight_tie_layers', 'custom_layers',
    'layers_execute_order', 'sandwich_coef', 'par_ratio', 'macaron', 'pre_norm', 'pre_norm_has_final_norm', 'sandwich_norm',
    'gate_residual', 'scale_residual', 'scale_residual_constant', 'residual_fn_kwargs', 'softclamp_output',
    'softclamp_output_value', 'zero_init_branch_output', 'layer_dropout', 'cross_attn_tokens_dropout', 'disable_abs_pos_emb',
    'use_layerscale', 'layerscale_init_value', 'num_residual_streams', 'hyper_conn_sinkhorn_iters',
    'hyper_conn_doubly_stochastic', 'add_value_residual', 'learned_value_residual_mix', 'verbose', 'resi_dual',
    'resi_dual_scale', 'gradient_checkpointing',
})  # fmt: skip
ATTENTION = frozenset({
    'dim_head', 'heads', 'dim_context', 'dim_out', 'causal', 'flash', 'dropout', 'pre_talking_heads', 'post_talking_heads',
    'pre_scale_post_talking_heads', 'sparse_topk', 'sparse_topk_straight_through', 'hard', 'l2_distance', 'sigmoid',
    'cog_signed', 'custom_attn_fn', 'add_zero_kv', 'head_learned_sink', 'softclamp_logits', 'logit_softclamp_value',
    'onnxable', 'attend_sdp_kwargs', 'one_kv_head', 'kv_heads', 'value_dim_head', 'num_mem_kv', 'qk_norm', 'qk_norm_groups',
    'qk_norm_scale', 'qk_norm_dim_scale', 'value_rmsnorm', 'head_scale', 'gate_value_heads', 'gate_values', 'swiglu_values',
    'on_attn', 'zero_init_output', 'sublayer_dropout', 'max_attend_past', 'rotate_num_heads', 'learned_value_residual_mix',
    'orthog_projected_values', 'orthog_projected_values_per_head', 'laser', 'laser_softclamp_value',
})  # fmt: skip
# of the context, whose values are not those of the token
CROSS = ATTENTION - {
    'orthog_projected_values',
    'orthog_projected_values_per_head',
    'max_attend_past',
    'learned_value_residual_mix',
}
# methods that somebody may have put in the place of a module's own, such as a profiler
ENTRANCES = ('run', 'forward')
KEYWORDS = frozenset({'context', 'context_mask'})
NOTHING: Mapping[str, Any] = MappingProxyType({})


def refusals(net: nn.Module, given: Mapping[str, Any] = NOTHING) -> list[str]:
    """Why single tokens must take the general way just now; empty: a stepper can read them.

    ``given``: keywords that the net is called with.
    """
    return [*model_refusals(net, given), *state_refusals(net)]


def model_refusals(net: nn.Module, given: Mapping[str, Any] = NOTHING, *, fixed: bool = False) -> list[str]:
    """The same, for what is so at any time. ``fixed``: in a memory of fixed shape, for a compiler."""
    if type(net) is not TransformerWrapper or not plain_parts(net):
        return [f'{type(net).__name__} is not a TransformerWrapper of the library, or parts of it have been exchanged']
    named = [name for name, value in given.items() if value is not None and name not in KEYWORDS]
    return [*flag_refusals(net, fixed), *(f'{name} was given' for name in named)]


def plain_parts(net: nn.Module) -> bool:
    """Whether stack, attentions and feed-forwards are the library's own, and nobody listens."""
    stack: Any = net.attn_layers
    for layer in stack.layers:
        own = (
            type(layer) is Layer and type(layer.inside) in (Attention, FeedForward) and isinstance(layer.residual, ResidualPath)
        )
        if not own:
            return False
    for module in net.modules():
        for base in (Attention, FeedForward):
            if isinstance(module, base) and type(module) is not base:
                return False
        if isinstance(module, AttentionLayers) and type(module).run is not AttentionLayers.run:
            return False
        if module._forward_hooks or module._forward_pre_hooks or not vars(module).keys().isdisjoint(ENTRANCES):
            return False
    return True


def flag_refusals(net: Any, fixed: bool) -> list[str]:
    stack: AttentionLayers = net.attn_layers
    found = [*unlisted(net.flags, WRAPPER), *unlisted(stack.flags, STACK)]
    if stack.flags.cross_attend and stack.add_value_residual:
        found.append('add_value_residual with cross_attend')
    for step in stack.plan.steps():
        inside: Any = stack.layers[step.layer].inside
        if step.kind == 'f':
            continue
        cross = step.kind == 'c'
        found += unlisted(inside.flags, CROSS if cross else ATTENTION, 'cross_attn_' if cross else 'attn_')
        found += attention_refusals(inside, fixed, beside=cross or stack.rel_pos is not None)
    if fixed:
        parts = {'a bias of positions': stack.rel_pos is not None, 'cross_attend': stack.flags.cross_attend}
        found += [name for name, is_there in parts.items() if is_there]
    if stack.plan.count('a') == 0:
        found.append('a stack without self attention')
    return list(dict.fromkeys(found))


def attention_refusals(attn: Attention, fixed: bool, beside: bool) -> Iterator[str]:
    """``beside``: it attends to a context, or positions are added to its scores."""
    front = front_rows(attn) > 0
    if front and attn.max_attend_past is not None:
        yield 'keys in front together with attn_max_attend_past'
    # where more than one call of a kernel is needed, the definition puts the zero key there itself
    if attn.attend.add_zero_kv and not runs_directly(attn.attend):
        yield 'attn_add_zero_kv with changed scores or weights'
    if attn.attend.add_zero_kv and beside:
        yield 'attn_add_zero_kv with cross attention or a bias of positions'
    if attn.dim_head % 2:
        yield 'heads of odd width'
    if fixed and not runs_directly(attn.attend):
        yield 'attention with changed scores or weights'


def unlisted(flags: Flags, carried: frozenset[str], prefix: str = '') -> list[str]:
    return [prefix + name for name in flags.changed() if name not in carried]


def state_refusals(net: nn.Module) -> Iterator[str]:
    """What is so now and may be otherwise at the next call."""
    device = next(net.parameters()).device.type
    if net.training:
        yield 'the model is in training mode'
    if choose.forced_name() is not None:
        yield 'a kernel is forced'
    if torch.is_autocast_enabled(device):
        yield 'autocast is on'


def cache_refusals(net: Any, cache: KVCache, limit: int | None, total: int | None, padded: bool) -> list[str]:
    """What about a beginning speaks against going on from it in steps. ``total``: tokens there will be; None: that is open."""
    stack: AttentionLayers = net.attn_layers
    found = []
    attentions: list[Any] = [stack.layers[step.layer].inside for step in stack.plan.steps() if step.kind != 'f']
    crosses_limit = limit is not None and (total is None or total > limit)
    if cache.front:
        found.append('something was prepended')
    if crosses_limit and (padded or any(front_rows(attn) for attn in attentions)):
        found.append('keys in front or padding on the left, in a window that moves')
    if padded and stack.flags.depends_on_places:
        found.append('padding on the left of positions that are counted from each beginning')
    held = {name for layer in cache for name in layer.tapes}
    if not held <= {'k', 'v', 'angles'} or any(layer.states or layer.carry.keys() - {'rotated_heads'} for layer in cache):
        found.append('the cache holds more than keys and values')
    return found
