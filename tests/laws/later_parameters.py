"""What is seen of every objective that 2.16.1 does not have with some of its parameters, as in ``parameters.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.laws.parameters import (
    CAUSAL,
    DIM,
    LENS,
    SHOWN,
    TOKEN,
    N,
    Sampled,
    Target,
    V,
    With,
    holed,
    ids,
    moved,
    net,
    normal,
    of_call,
    seeded,
    shapes_of,
    written_first,
)
from x_transformers import Decoder, NextLatentWrapper, TransformerWrapper, XLAutoregressiveWrapper
from x_transformers.continuous_autoencoder import ContinuousTransformerAutoencoder, VariationalBottleneck
from x_transformers.discover_wrapper import DiscoverDecoder, TPREncoder
from x_transformers.fast_weights import TTTNextLatentPredictionLoss
from x_transformers.free_transformer import BinaryMapper
from x_transformers.full_bandwidth import FullBandwidth, LinearTransition
from x_transformers.gpt_lejepa import LatentAutoregressive
from x_transformers.recirculation import Recirculation
from x_transformers.xm_latent_decoder import XMLatentDecoder

PATH = 'attn_layers.layers.1.1.ff.2'
SIGREG = {'num_slices': 5}


def deep(**flags: Any) -> Any:
    """Two layers, with what feedback needs."""
    layers = Decoder(dim=DIM, depth=2, heads=2, attn_dim_head=8, rotary_pos_emb=True, depth_scale_residual=True, verbose=False)
    given = {'num_tokens': V, 'max_seq_len': 2 * N, 'tie_embedding': True, 'post_emb_norm': True, **flags}
    return moved(TransformerWrapper(attn_layers=layers, **given))


def bandwidth(call: Any = None, x: Any = None, **given: Any) -> Any:
    model: Any = moved(FullBandwidth(deep(), **given))
    return model(holed() if x is None else x, **(call or {})), shapes_of(model)


def bandwidth_written(**given: Any) -> Any:
    model: Any = moved(FullBandwidth(deep()))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    return (model.generate(ids(2, 7), 9, **given),)


def joint(call: Any = None, x: Any = None, **given: Any) -> Any:
    model: Any = moved(LatentAutoregressive(net(depth=2), **{'dim': DIM, 'sigreg_loss_kwargs': SIGREG} | given))
    loss = model(holed() if x is None else x, **(call or {}))
    first = loss[0] if isinstance(loss, tuple) else loss
    first.backward()
    return loss, model.net.token_emb.emb.weight.grad, shapes_of(model)


def following_latents(call: Any = None, x: Any = None, **given: Any) -> Any:
    model: Any = moved(NextLatentWrapper(net(), **{'dim': DIM, 'num_rollouts': 2} | given))
    return model(holed() if x is None else x, **(call or {})), shapes_of(model)


def twice(call: Any = None, **given: Any) -> Any:
    model: Any = moved(Recirculation(net(depth=3), **{'source_layer': 2, 'destination_layer': 1, 'ramp_steps': 3} | given))
    return model(ids(), **(call or {})), shapes_of(model)


def learned(**given: Any) -> Any:
    model: Any = Recirculation(net(depth=2), 1, 0, use_learned=True)
    return model.learn_parameters(**{'x': ids(), 'steps': 2} | given), list(model.learned_mixers.parameters())


def candidates(call: Any = None, x: Any = None, **given: Any) -> Any:
    model: Any = moved(XMLatentDecoder(net(), **{'num_latents': 2} | given))
    sizes: list[int] = []
    model.net.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    losses = [model(holed() if x is None else x, **(call or {})) for _ in range(3)]
    return losses, sizes, shapes_of(model)


def candidates_written(best: bool = False, **given: Any) -> Any:
    model: Any = moved(XMLatentDecoder(net(), num_latents=2))
    return (model.generate_with_candidate_latents if best else model.generate)(ids(2, 3), 4, temperature=0.0, **given)


SIZES = {'dim': DIM, 'enc_depth': 1, 'dec_depth': 1, 'max_seq_len': 2 * N, 'heads': 2, 'attn_dim_head': 8, 'verbose': False}


def told_again(call: Any = None, encode: bool = False, **given: Any) -> Any:
    model: Any = moved(ContinuousTransformerAutoencoder(**SIZES | given))
    if encode:
        return model.encode(normal(2, N, DIM), **(call or {}))
    x = normal(2, N, model.dim_input)
    return [model(x, **(call or {})) for _ in range(3)], shapes_of(model)


def bound(call: Any = None, **given: Any) -> Any:
    model: Any = moved(TPREncoder(**{'dim': DIM, 'num_fillers': V, 'num_roles': N, 'filler_dim': 4, 'role_dim': 4} | given))
    roles = torch.arange(N).expand(2, -1)
    if call is not None:
        return model.fit(ids(), roles, normal(2, DIM), **{'steps': 3} | call), list(model.parameters())
    return model(ids() % model.filler_emb.num_embeddings, roles % model.role_emb.num_embeddings), shapes_of(model)


def said_again(**given: Any) -> Any:
    model: Any = DiscoverDecoder(**{'decoder': net(), 'num_fillers': V, 'bos_id': 0, 'pad_id': 1, 'max_seq_len': 4} | given)
    encodings = model(ids())
    return encodings, model.decode(encodings), model.decode(encodings, torch.tensor([3, 2])), model.num_fillers


def adapted(call: Any = None, **given: Any) -> Any:
    torch.manual_seed(1)
    made = net(depth=2, rotary_pos_emb=True, wrapper={'max_seq_len': 4, 'max_mem_len': 4, 'use_abs_pos_emb': False})
    model: Any = XLAutoregressiveWrapper(made, **{'tbptt_steps': 3, 'ttt_module_paths': (PATH,), 'ttt_lr': 0.3} | given)
    loss = model(ids(2, 12), **(call or {}))
    loss.backward()
    return loss, [p.grad for p in model.parameters()], shapes_of(model)


def bits(call: Any = None, train: bool = True, **given: Any) -> Any:
    mapper: Any = BinaryMapper(**{'bits': 3} | given)
    logits = (9 * normal(4, 5, mapper.bits)).requires_grad_()
    out, cost = mapper.train(train)(logits, **(call or {}))
    return out, cost, out.requires_grad


LOW_RANK = {'ttt_low_rank_paths': ((PATH, 2),), 'ttt_module_paths': ()}
MUON = {'ttt_use_muon': True}

LATER = (
    Target(
        'FullBandwidth', FullBandwidth.__init__, bandwidth,
        {
            'temporal_parallel_passes': 3, 'recirc_pairs': 'dense', 'transition': 'linear',
            'transitions': {(2, 1): LinearTransition}, 'feedback_pass_weight': 0.3, 'ignore_index': With(TOKEN, {'x': ids()}),
            'jitter_noise_delta': 0.5, 'dynamic_rollout_loss_weight': With(True, {'temporal_parallel_passes': 3}),
            'dynamic_loss_decay': With(3.0, {'dynamic_rollout_loss_weight': True, 'temporal_parallel_passes': 3}),
            'dynamic_loss_threshold': With(0.1, {'dynamic_rollout_loss_weight': True, 'temporal_parallel_passes': 3}),
            'pad_value': 3,
        },
        ('net',),
    ),
    Target('FullBandwidth.forward', FullBandwidth.forward, lambda **call: bandwidth(call, x=ids()), {}, ('x',)),
    Target(
        'FullBandwidth.generate', FullBandwidth.generate, bandwidth_written,
        {
            'eos_token': Sampled(written_first(bandwidth_written)), 'temperature': 0.0, 'filter_logits_fn': 'min_p',
            'filter_kwargs': {'k': 1}, 'temporal_parallel_passes': 4, 'should_fuse_latent': lambda step: False,
            'generator': Sampled(seeded),
        },
        ('prompts', 'seq_len'),
    ),
    Target(
        'LatentAutoregressive', LatentAutoregressive.__init__, joint,
        {
            'sigreg_loss_weight': 0.5, 'l2_loss_weight': 3.0, 'num_rollouts': 2,
            'rollout_loss_weights': With([3.0, 1.0], {'num_rollouts': 2}), 'sigreg_loss_kwargs': {'num_slices': 7},
            'frac_gradient': 1.0, 'predictor_input_hiddens_index': None, 'ce_probe_module': nn.Linear(DIM, DIM),
            'predict_next_embed_with_action': With(False, {'predict_next_embed_no_action': True}),
            'ignore_index': With(TOKEN, {'x': ids()}), 'pad_value': 3,
        },
        ('net', 'dim'),
    ),
    Target('LatentAutoregressive.forward', LatentAutoregressive.forward, of_call(joint), {}, ('x',)),
    Target(
        'NextLatentWrapper', NextLatentWrapper.__init__, following_latents,
        {
            'num_rollouts': 1, 'loss_type': 'mse', 'dynamics_type': 'gru',
            'dynamics_hidden_dim': 5,
            'dynamics_num_layers': 2, 'next_latent_loss_weight': 3.0, 'kl_loss_weight': 3.0,
            'ignore_index': With(TOKEN, {'x': ids()}), 'pad_value': 3, 'rollout_weights': [3.0, 1.0],
            'sigreg_loss_weight': With(0.5, {'sigreg_loss_kwargs': None}),
            'sigreg_loss_kwargs': With({'num_slices': 7}, {'sigreg_loss_weight': 0.5}), 'dynamic_loss_decay': 3.0,
        },
        ('net', 'dim'), {'dynamics_network': 'tests/test_latent_prediction.py'},
    ),
    Target('NextLatentWrapper.forward', NextLatentWrapper.forward, of_call(following_latents), {}, ('x',)),
    Target(
        'Recirculation', Recirculation.__init__, twice,
        {
            'source_layer': (2,), 'destination_layer': 0, 'alpha': 0.7, 'beta': 0.2, 'ramp_steps': 0,
            'learned_hidden': With(5, {'use_learned': True, 'ramp_steps': 10}),
            'use_learned': With(True, {'ramp_steps': 10}),
        },
        ('net', 'source_layer'),
    ),
    Target(
        'Recirculation.forward', Recirculation.forward, of_call(twice), {'logits_last': 2}, ('x',),
        dict.fromkeys(('cache', 'input_not_include_cache'), 'tests/test_recirculation.py'),
    ),
    Target(
        'Recirculation.learn_parameters', Recirculation.learn_parameters, learned,
        {'steps': 1, 'lr': 0.1, 'ignore_index': TOKEN}, ('x',),
    ),
    Target(
        'XMLatentDecoder', XMLatentDecoder.__init__, candidates,
        {
            'num_latents': 3, 'latent_dim': 5, 'candidates': 3, 'max_batch_size': 1, 'ignore_index': With(TOKEN, {'x': ids()}),
            'latent_drop_prob': 0.9, 'repulsive_loss_weight': 0.5,
            'winner_fn': lambda losses, *_: losses.argmax(dim=-1),
            'winner_fns': [lambda losses, *_: losses.argmax(dim=-1)] * 2,
        },
        ('net',), {'dim': 'tests/test_xm_latent_decoder.py'},
    ),
    Target(
        'XMLatentDecoder.forward', XMLatentDecoder.forward, of_call(candidates),
        {'latents': normal(2, 2, 2, DIM), 'active_latent_index': With(1, {'active_latent_index': 0}), 'mask': SHOWN}, ('x',),
    ),
    Target(
        'XMLatentDecoder.generate', XMLatentDecoder.generate, candidates_written, {'latents': 9 * normal(2, 2, DIM)},
        ('start_tokens', 'seq_len'),
    ),
    Target(
        'XMLatentDecoder.generate_with_candidate_latents', XMLatentDecoder.generate_with_candidate_latents,
        lambda **given: candidates_written(best=True, return_best_latents=given.pop('return_best_latents', True), **given),
        {
            'winner_fn': lambda logits: logits.new_zeros(len(logits), dtype=torch.long),
            'winner_fns': [lambda logits: logits.new_zeros(len(logits), dtype=torch.long)] * 2,
            'active_latent_index': 1, 'return_best_latents': False, 'net_kwargs': {'attn_mask': CAUSAL[:1, :1]},
        },
        ('start_tokens', 'seq_len'), {'net_kwargs': 'tests/test_xm_latent_decoder.py'},
    ),
    Target(
        'ContinuousTransformerAutoencoder', ContinuousTransformerAutoencoder.__init__, told_again,
        {
            'dim': 32, 'enc_depth': 2, 'dec_depth': 2, 'max_seq_len': 20, 'dim_input': 5, 'dim_latent': 5, 'heads': 1,
            'attn_dim_head': 4, 'bottleneck': VariationalBottleneck(DIM, DIM), 'bottleneck_type': 'variational',
            'deterministic_bottleneck_kwargs': {'activation': torch.tanh},
            'variational_bottleneck_kwargs': With({'kl_loss_weight': 9.0}, {'bottleneck_type': 'variational'}),
            'loss_type': 'l2', 'enc_kwargs': {'attn_kv_heads': 1}, 'dec_kwargs': {'attn_kv_heads': 1},
            'latents_dropout_prob': 0.0,
        },
    ),
    Target(
        'ContinuousTransformerAutoencoder.encode', ContinuousTransformerAutoencoder.encode,
        lambda **call: told_again(call, encode=True, bottleneck_type='variational'),
        {'lens': LENS, 'mask': SHOWN, 'return_unreduced_loss': With(True, {'return_aux_loss': True})}, ('x',),
    ),
    Target(
        'ContinuousTransformerAutoencoder.forward', ContinuousTransformerAutoencoder.forward, of_call(told_again),
        {'lens': LENS, 'mask': SHOWN}, ('x',),
    ),
    Target(
        'TPREncoder', TPREncoder.__init__, bound,
        {'dim': 8, 'num_fillers': 5, 'num_roles': 3, 'filler_dim': 3, 'role_dim': 3, 'mlp_dim': 7},
    ),
    Target(
        'TPREncoder.fit', TPREncoder.fit, of_call(bound),
        {'mask': SHOWN, 'steps': 2, 'batch_size': 1, 'lr': 0.1}, ('fillers', 'roles', 'encodings'),
    ),
    Target(
        'DiscoverDecoder', DiscoverDecoder.__init__, said_again,
        {'num_fillers': 5, 'bos_id': 3, 'pad_id': 2, 'max_seq_len': 3, 'enc_pos': 2}, ('decoder',),
    ),
    Target(
        'XLAutoregressiveWrapper (test-time training)', XLAutoregressiveWrapper.__init__, adapted,
        {
            'tbptt_steps': 2, 'ttt_module_paths': (('attn_layers.layers.0.1.to_q', 'attn_layers.layers.0.1.to_k'),),
            'ttt_lr': 0.9, 'ttt_wd': 0.9, 'ttt_muon_steps': With(1, MUON), 'ttt_muon_lr': With(0.9, MUON),
            'ttt_low_rank_paths': (('attn_layers.layers.0.1.to_q', 2),),
            'ttt_low_rank_replaces': With(True, LOW_RANK),
            'ttt_custom_loss_module': TTTNextLatentPredictionLoss(DIM), 'episodic_mem_len': 2,
        },
        ('net',),
        dict.fromkeys(
            ('ignore_index', 'pad_value', 'weight_by_valid', 'allow_future'), 'tests/laws/parameters.py, without such training'
        ),
    ),
    Target(
        'XLAutoregressiveWrapper.forward (test-time training)', XLAutoregressiveWrapper.forward, of_call(adapted),
        {'ttt_recurrent_steps': 2, 'mems': [normal(2, 3, DIM)] * 2, 'dropout_mems': True}, ('x',),
    ),
    Target('BinaryMapper', BinaryMapper.__init__, bits, {'bits': 2, 'kl_loss_threshold': 0.0}),
    Target(
        'BinaryMapper.forward', BinaryMapper.forward, of_call(bits),
        {'temperature': 9.0, 'straight_through': False, 'calc_aux_loss': False}, ('logits',),
    ),
)  # fmt: skip
