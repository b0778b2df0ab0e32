"""Residuals of later releases, each against its formula written as a loop."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tests.laws.combination import shaken
from x_transformers import Decoder, Encoder, InertFlagWarning, TransformerWrapper
from x_transformers.flags.base import FlagError

SMALL = {'dim': 8, 'depth': 2, 'heads': 2, 'attn_dim_head': 4, 'verbose': False}
RANK = {'attn_aggregated_residuals': True, 'attn_aggregated_residual_kwargs': {'lora_rank': 3}}
GATED = {'num_residual_streams': 3, 'gated_multi_residual': True, 'residual_fn_kwargs': {'read_gate_rank': 4}}
X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def made(stack=Decoder, **flags):
    return shaken(stack(**SMALL | flags), 0).double().eval()


# ---------------------------------------------------------------- attention over depth


def rms(x, norm):
    return x / (x.square().mean() + torch.finfo(torch.float64).eps).sqrt() * norm.weight


@pytest.mark.parametrize('views', [False, True])
def test_each_branch_sees_a_mixture_weighted_by_attention_over_depth(views):
    """https://arxiv.org/abs/2603.15031, token by token."""
    stack = made(**RANK, **({'qkv_receive_diff_residuals': True} if views else {}))
    x, seen = X, []
    for layer, mixture, kind in zip(stack.layers, stack.layer_integrators, stack.plan.kinds, strict=True):
        seen.append(x)
        count = 3 if views and kind == 'a' else 1
        mixed = torch.zeros(count, *x.shape, dtype=x.dtype)
        for row in range(2):
            for token in range(5):
                own = x[row, token]
                down = mixture.to_query[1].down.weight @ rms(own, mixture.to_query[0])
                for view in range(count):
                    correction = mixture.to_query[1].up.weight[view * 8 : (view + 1) * 8] @ down
                    query = rms(own + correction, mixture.norm)
                    scores = torch.stack([query @ rms(h[row, token], mixture.to_keys) for h in seen]) / math.sqrt(8)
                    for weight, h in zip(scores.softmax(dim=0), seen, strict=True):
                        mixed[view, row, token] += weight * h[row, token]
        h = mixed if count == 3 else mixed[0]
        x = x + layer.branch(layer.norms[0](h))
    assert torch.allclose(stack(X), stack.final_norm(x))


def test_shared_layers_have_one_mixture_for_any_number_of_inputs():
    stack = made(**RANK, weight_tie_layers=True)
    assert len(stack.layer_integrators) == 2
    assert stack(X, layers_execute_order=(0, 1) * 4).shape == X.shape


@pytest.mark.parametrize(
    ('flags', 'without', 'says'),
    [
        (RANK | {'depth_scale_residual': 0.5}, RANK, 'depth_scale_residual=0.5'),
        (RANK | {'depth_scale_residual': True}, RANK, 'depth_scale_residual=True'),
        (RANK | {'integrate_layers': True}, {'integrate_layers': True}, 'and the second does'),
        ({'attn_aggregated_residuals': True, 'integrate_layers': True}, {'integrate_layers': True}, 'and the second does'),
    ],
)
def test_what_attention_residuals_and_mixtures_leave_without_effect(flags, without, says):
    torch.manual_seed(0)
    with pytest.warns(InertFlagWarning, match=says):
        stack = Decoder(**SMALL, **flags)
    torch.manual_seed(0)
    plain = Decoder(**SMALL, **without)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, stack.state_dict()[name])
    assert len(plain.state_dict()) == len(stack.state_dict())
    assert torch.equal(stack(X.float()), plain(X.float()))


@pytest.mark.parametrize(
    ('flags', 'says'),
    [
        ({'attn_aggregated_residuals': True}, r'the rank \(64\) must be at least 1 and less than the width'),
        (RANK | {'attn_aggregated_residual_kwargs': {'lora_rank': 2, 'rank': 1}}, 'the known keywords are'),
        ({'mv_split_residual': True, 'gate_residual': True}, 'each is a way to write'),
        ({'mv_split_residual': True, 'num_residual_streams': 2}, 'each is a way to write'),
        ({'mv_split_residual': True, 'scale_residual': True}, 'factors of their own'),
        ({'parallel_block': True, 'gate_residual': True}, 'each is a way to write'),
        ({'parallel_block': True, 'custom_layers': ('a', 'f')}, 'these layouts have none'),
        ({'parallel_block': True, 'layers_execute_order': (1, 0)}, 'these layouts have none'),
        ({'parallel_block': True, 'only_attn': True}, 'has none beside it'),
        ({'parallel_block': True, 'pre_norm': False}, 'no sum of their own'),
        ({'parallel_block': True, 'scale_residual': True}, 'learns a factor'),
        ({'parallel_block': True, 'layer_dropout': (0.0, 0.1, 0.0, 0.0)}, 'cannot be left out'),
        (GATED | {'residual_fn_kwargs': {}}, 'the rank of the gates is missing'),
        (GATED | {'sandwich_norm': True}, 'the gates norm what they read'),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(flags, says):
    with pytest.raises(FlagError, match=says):
        Decoder(**SMALL | flags)


# ---------------------------------------------------------------- side by side


@pytest.mark.parametrize(
    ('flags', 'size'),
    [({}, 2), ({'sandwich_norm': True}, 2), ({'macaron': True}, 3), ({'cross_attend': True}, 3), ({'scale_residual': 0.5}, 2)],
)
def test_layers_of_a_block_read_what_enters_it(flags, size):
    """https://arxiv.org/abs/2204.02311, block by block."""
    stack = made(parallel_block=True, **flags)
    context = {'context': X.flip(1)} if 'cross_attend' in flags else {}
    x = X
    for start in range(0, len(stack.layers), size):
        total = x
        for at in range(start, start + size):
            layer = stack.layers[at]
            before, behind, after = layer.norms
            assert after is None
            out = layer.branch(before(x), **(context if stack.plan.kinds[at] == 'c' else {}))
            out = out if behind is None else behind(out)
            total = total + out * flags.get('scale_residual', 1.0)
        x = total
    said, seen = stack(X, **context, return_hiddens=True)
    assert torch.allclose(said, stack.final_norm(x))
    assert torch.allclose(seen.layer_hiddens[-1], x)


def test_blocks_side_by_side_are_shared_and_decoded():
    layers = Decoder(**SMALL, parallel_block=True, weight_tie_layers=True, rotary_pos_emb=True)
    assert len(layers.layers) == 2
    net = shaken(TransformerWrapper(num_tokens=9, max_seq_len=12, attn_layers=layers), 0).double().eval()
    ids = torch.randint(0, 9, (2, 8), generator=torch.Generator().manual_seed(0))
    _, cache = net(ids[:, :3], return_intermediates=True)
    assert torch.allclose(net(ids, cache=cache)[:, -5:], net(ids)[:, 3:])


# ---------------------------------------------------------------- mean and deviation


@pytest.mark.parametrize('stack', [Encoder, Decoder])
@pytest.mark.parametrize('learned', [False, True])
def test_mean_and_deviation_are_written_by_different_factors(stack, learned):
    """https://arxiv.org/abs/2605.06169; in a causal stack with the mean so far."""
    net = made(stack, mv_split_residual=True, residual_fn_kwargs={'learned': learned})
    mask = torch.tensor([[True] * 5, [True, True, True, False, False]])
    x = X
    for layer in net.layers:
        out = layer.branch(layer.norms[0](x), **({'mask': mask} if hasattr(layer.branch, 'to_q') else {}))
        residual, following = layer.residual, torch.zeros_like(x)
        for row in range(2):
            for token in range(5):
                counted = [at for at in range(5) if mask[row, at] and (stack is Encoder or at <= token)]
                mean = torch.stack([out[row, at] for at in counted]).mean(dim=0)
                rest = torch.stack([x[row, at] for at in counted]).mean(dim=0)
                alpha = residual.to_alpha(mean) if learned else residual.alpha
                beta = residual.to_beta(mean) if learned else residual.beta
                following[row, token] = x[row, token] + (out[row, token] - mean) * beta + (mean - rest) * alpha
        x = following
    assert torch.allclose(net(X, mask=mask)[mask], net.final_norm(x)[mask])


def test_the_mean_so_far_is_decoded_from_the_cache():
    layers = Decoder(**SMALL, mv_split_residual=True, rotary_pos_emb=True)
    net = shaken(TransformerWrapper(num_tokens=9, max_seq_len=12, attn_layers=layers), 0).double().eval()
    ids = torch.randint(0, 9, (2, 8), generator=torch.Generator().manual_seed(0))
    whole = net(ids)
    _, cache = net(ids[:, :3], return_intermediates=True)
    chunk, cache = net(ids[:, :6], cache=cache, return_intermediates=True)
    assert torch.allclose(chunk[:, -3:], whole[:, 3:6])
    back = cache.kv_cache.rollback(4)
    again = net(ids[:, 4:8], cache=back, input_not_include_cache=True)
    assert torch.allclose(again, whole[:, 4:8])


# ---------------------------------------------------------------- gated streams


def test_streams_are_read_and_written_through_gates():
    """https://qwen.ai/blog?id=qwen3.8-flash-next, with a loop over streams."""
    stack = made(**GATED)
    assert all(norm is None for layer in stack.layers for norm in layer.norms), 'no norm before, behind or after'
    assert list(stack.final_norm.parameters())
    streams = [X + stack.stream_emb[s] for s in range(3)]
    for layer in stack.layers:
        gates = layer.residual
        normed = [s / s.square().mean(dim=-1, keepdim=True).sqrt() * gates.read_gain[i] for i, s in enumerate(streams)]
        narrow = nn.functional.silu(torch.cat(normed, dim=-1) / 3 @ gates.to_bottleneck.weight.T) * gates.dynamic_gate_scale
        read = (narrow @ gates.to_read_gate.weight.T).view(2, 5, 3, 8)
        h = sum((read[:, :, i] + gates.static_read_logit[0, i]).sigmoid() * normed[i] for i in range(3)) / 3
        out = layer.branch(h)
        for i in range(3):
            factor = 2 * ((narrow @ gates.to_write_gate.weight.T)[..., i] + gates.static_write_logit[i]).sigmoid()
            streams[i] = streams[i] + factor.unsqueeze(-1) * out
    assert torch.allclose(stack(X), stack.final_norm(sum(streams)))


def test_gated_streams_have_the_keys_of_the_later_release():
    keys = {name.removeprefix('layers.0.2.'): tuple(t.shape) for name, t in Decoder(**SMALL | GATED).state_dict().items()}
    wanted = {
        'read_gain': (3, 8), 'static_read_logit': (1, 3, 8), 'static_write_logit': (3,), 'dynamic_gate_scale': (),
        'to_bottleneck.weight': (4, 24), 'to_read_gate.weight': (24, 4), 'to_write_gate.weight': (3, 4),
    }  # fmt: skip
    assert wanted.items() <= keys.items()
    views = Decoder(**SMALL | GATED, qkv_receive_diff_residuals=True)
    assert views.layers[0].residual.static_read_logit.shape == (3, 3, 8)
    assert views(X.float()).shape == X.shape
