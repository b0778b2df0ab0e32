"""Layouts, norms and factors of a stack, blocks that run several times, and functions of what enters them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.laws.combination import shaken
from x_transformers import Decoder, Encoder, InertFlagWarning, TransformerBlock, TransformerWrapper
from x_transformers.flags.base import FlagError
from x_transformers.module import DepthScaledLinear, reset_parameters

SMALL = {'dim': 16, 'depth': 3, 'heads': 2, 'attn_dim_head': 8, 'verbose': False}


def made(stack=Decoder, **flags):
    return shaken(stack(**SMALL | flags), 0).double().eval()


def model(**flags):
    layers = Decoder(**SMALL | flags)
    return shaken(TransformerWrapper(num_tokens=11, max_seq_len=12, attn_layers=layers), 0).double().eval()


X = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
IDS = torch.randint(0, 11, (2, 7), generator=torch.Generator().manual_seed(4))


# ---------------------------------------------------------------- layouts and norms


@pytest.mark.parametrize(
    ('flags', 'kinds'),
    [
        ({}, 'aaa'),
        ({'cross_attend': True}, 'acacac'),
        ({'par_ratio': 2, 'depth': 2}, 'a'),
        ({'sandwich_coef': 2}, 'aaa'),
        ({'custom_layers': ('a', 'a'), 'depth': None}, 'aa'),
    ],
)
def test_only_attn_leaves_out_the_feed_forwards(flags, kinds):
    assert ''.join(Decoder(**SMALL | flags, only_attn=True).plan.kinds) == kinds


def test_macaron_has_no_effect_without_feed_forwards():
    with pytest.warns(InertFlagWarning, match='macaron'):
        assert ''.join(Decoder(**SMALL, only_attn=True, macaron=True).plan.kinds) == 'aaa'


@pytest.mark.parametrize(
    'flags', [{'custom_layers': ('a', 'f'), 'depth': None}, {'unet_skips': True}, {'layers_execute_order': (0, 1)}]
)
def test_only_attn_is_refused_where_the_feed_forwards_are_counted_on(flags):
    with pytest.raises(FlagError, match='only_attn'):
        Decoder(**SMALL | flags, only_attn=True)


def test_pre_and_post_norm_norms_before_the_branch_and_after_the_sum():
    stack = made(pre_and_post_norm=True)
    x = X
    for layer in stack.layers:
        before, behind, after = layer.norms
        assert behind is None
        x = after(x + layer.branch(before(x)))
    assert torch.allclose(stack(X), x)
    assert not list(stack.final_norm.parameters())


def test_pre_and_post_norm_without_pre_norm_is_post_norm():
    both, post = Decoder(**SMALL, pre_and_post_norm=True, pre_norm=False), Decoder(**SMALL, pre_norm=False)
    assert list(both.state_dict()) == list(post.state_dict())


def test_transformer_block_is_a_block_without_final_norm():
    block = TransformerBlock(16, heads=2, attn_dim_head=8, verbose=False)
    assert block.plan.kinds == ('a', 'f')
    assert not block.causal
    twin = Encoder(**SMALL | {'depth': 1}, pre_norm_has_final_norm=False)
    twin.load_state_dict(block.state_dict())
    assert torch.equal(block(X.float()), twin(X.float()))
    assert TransformerBlock(16, depth=2, causal=True).plan.kinds == ('a', 'f', 'a', 'f')


# ---------------------------------------------------------------- factors of branches


@pytest.mark.parametrize('flags', [{'depth_scale_residual': 0.3}, {'scale_residual': 0.3}])
def test_a_number_scales_what_branches_write(flags):
    stack, plain = made(**flags), made()
    assert list(stack.state_dict()) == list(plain.state_dict()), 'no learned factor, and no other key'
    x = X
    for layer in stack.layers:
        x = x + 0.3 * layer.branch(layer.norms[0](x))
    assert torch.allclose(stack(X), stack.final_norm(x))


def test_depth_scale_residual_wins_over_a_number_of_scale_residual():
    assert Decoder(**SMALL, depth_scale_residual=0.5, scale_residual=0.1).layers[0].scale == 0.5


def test_the_factor_is_behind_a_sandwich_norm():
    stack = made(sandwich_norm=True, depth_scale_residual=0.3)
    x = X
    for layer in stack.layers:
        x = x + 0.3 * layer.norms[1](layer.branch(layer.norms[0](x)))
    assert torch.allclose(stack(X), stack.final_norm(x))


@pytest.mark.parametrize('flags', [{}, {'shift_tokens': 1}, {'use_layerscale': True, 'macaron': True}])
def test_checkpoints_of_layers_that_were_wrapped_for_a_factor_load(flags):
    stack = made(depth_scale_residual=0.3, **flags)
    wrapped = {
        '.'.join((*parts[:3], 'fn', *parts[3:])) if (parts := key.split('.'))[::2][:2] == ['layers', '1'] else key: tensor
        for key, tensor in stack.state_dict().items()
    }
    assert wrapped.keys() != stack.state_dict().keys()
    fresh = Decoder(**SMALL, depth_scale_residual=0.3, **flags).to(X.dtype).eval()
    fresh.load_state_dict(wrapped, strict=True)
    assert torch.equal(fresh(X), stack(X))
    with pytest.raises(RuntimeError, match='Unexpected key'):
        Decoder(**SMALL, **flags).load_state_dict(wrapped)


def test_output_projections_start_smaller_the_deeper_they_are():
    torch.manual_seed(0)
    stack = Decoder(dim=64, depth=4, heads=4, attn_dim_head=64, cross_attend=True, depth_scale_residual=True, verbose=False)
    for _ in range(2):
        for index, layer in enumerate(stack.layers):
            last = layer.branch.ff[2] if stack.plan.kinds[index] == 'f' else layer.branch.to_out
            wanted = (2 * last.in_features * (index // 3 + 1)) ** -0.5
            assert last.weight.std().item() == pytest.approx(wanted, rel=0.05)
        reset_parameters(stack)


@pytest.mark.parametrize('flags', [{'attn_on_attn': True}, {'zero_init_branch_output': True}])
def test_whatever_projection_there_is_starts_so(flags):
    stack = Decoder(**SMALL, depth_scale_residual=True, **flags)
    scaled = [module for module in stack.modules() if isinstance(module, DepthScaledLinear)]
    assert len(scaled) == (0 if 'zero_init_branch_output' in flags else 6)
    if not scaled:
        assert not stack.layers[0].branch.to_out.weight.any()


@pytest.mark.parametrize(('flags', 'size'), [({}, 2), ({'macaron': True}, 3), ({'sandwich_norm': True}, 2)])
def test_deeper_norms_give_less(flags, size):
    """https://arxiv.org/abs/2502.05795: both branches of block l read norm(x) / sqrt(l)."""
    stack, plain = made(layer_norm_scaling=True, **flags), made(**flags)
    assert list(stack.state_dict()) == list(plain.state_dict())
    x = X
    for index, layer in enumerate(stack.layers):
        before, behind, _ = layer.norms
        out = layer.branch(before(x) / (index // size + 1) ** 0.5)
        x = x + (out if behind is None else behind(out))
    assert torch.allclose(stack(X), stack.final_norm(x))


@pytest.mark.parametrize('flags', [{'pre_norm': False}, {'resi_dual': True}, {'weight_tie_layers': True}])
def test_norm_scaling_needs_norms_of_numbered_blocks(flags):
    with pytest.raises(FlagError, match='in front of each branch'):
        Decoder(**SMALL, layer_norm_scaling=True, **flags)


# ---------------------------------------------------------------- blocks that run several times


@pytest.mark.parametrize(
    ('repeats', 'blocks'),
    [
        ((1, 2), (0, 1, 1, 2)),
        (((0, 1), 2), (0, 1, 0, 1, 2)),
        (((0, 2), ((1, 2), 3)), (0, 0, 1, 2, 1, 2, 1, 2)),
    ],
)
def test_blocks_are_repeated(repeats, blocks):
    stack = made()
    order = tuple(layer for block in blocks for layer in (2 * block, 2 * block + 1))
    out, record = stack(X, repeat_blocks=repeats, return_hiddens=True)
    assert torch.equal(out, stack(X, layers_execute_order=order))
    assert len(record.attn_intermediates) == len(record.block_hiddens) == len(blocks)


def test_shared_layers_are_blocks_as_often_as_they_run():
    stack = made(weight_tie_layers=True)
    assert torch.equal(stack(X, repeat_blocks=(0, 3)), stack(X, layers_execute_order=(0, 1) * 5))


def test_repeated_blocks_are_decoded_from_the_cache():
    net = model(rotary_pos_emb=True)
    whole = net(IDS, repeat_blocks=((0, 1), 2))
    cache, got = None, []
    for end in (3, 4, 5, 7):
        out, cache = net(IDS[:, :end], repeat_blocks=((0, 1), 2), cache=cache, return_intermediates=True)
        got.append(out[:, -(end - len(torch.cat(got, dim=1)[0]) if got else end) :])
    assert torch.allclose(torch.cat(got, dim=1), whole)


@pytest.mark.parametrize('repeats', [(3, 2), ((1, 0), 2), (0, 0), 5, (((0, 1), 2), (1, 3)), ((0, 1, 2), 2), ()])
def test_blocks_that_are_not_there_are_refused(repeats):
    if repeats == ():
        stack = made()
        assert torch.equal(stack(X, repeat_blocks=()), stack(X))
        return
    with pytest.raises(ValueError, match='repeat_blocks must'):
        made()(X, repeat_blocks=repeats)


@pytest.mark.parametrize('flags', [{'custom_layers': ('a', 'f'), 'depth': None}, {'integrate_layers': True}])
def test_a_stack_without_blocks_repeats_none(flags):
    with pytest.raises(ValueError, match='repeat_blocks must be left out with'):
        made(**flags)(X, repeat_blocks=(0, 2))


# ---------------------------------------------------------------- what enters blocks


def by_hand(stack, x, change):
    hiddens = []
    for index, layer in enumerate(stack.layers):
        if index % 2 == 0:
            hiddens.append(x)
            x = change(index // 2 + 1, x)
        x = x + layer.branch(layer.norms[0](x))
    return stack.final_norm(x), hiddens[1:]


def test_functions_change_what_enters_blocks():
    stack = made()
    changes = {2: torch.tanh, 3: torch.sin}
    out, record = stack(X, transform_block_inputs=changes, return_hiddens=True)
    wanted, hiddens = by_hand(stack, X, lambda block, x: changes.get(block, lambda t: t)(x))
    assert torch.allclose(out, wanted)
    for got, hidden in zip(record.block_hiddens, [*hiddens, wanted], strict=True):
        assert torch.allclose(got, hidden)
    double = stack(X, transform_block_inputs=lambda block, x: x * block)
    assert torch.allclose(double, by_hand(stack, X, lambda block, x: x * block)[0])


def test_blocks_are_counted_as_they_are_executed():
    seen = []
    made()(X, repeat_blocks=(1, 2), transform_block_inputs=lambda block, x: seen.append(block) or x)
    assert seen == [1, 2, 3, 4]
    seen.clear()
    made(custom_layers=('a', 'f', 'f'), depth=None)(X, transform_block_inputs=lambda block, x: seen.append(block) or x)
    assert seen == [1, 2, 3]


def test_a_model_changes_token_embeddings_in_place_of_the_first_block_s_input():
    net = model()
    embeds = net.token_emb(IDS).tanh() + net.pos_emb(IDS)
    wanted = net.to_logits(net.attn_layers(embeds))
    for keywords in (
        {'transform_token_embeds': torch.tanh},
        {'transform_block_inputs': {1: torch.tanh}},
        {'transform_block_inputs': lambda block, x: x.tanh() if block == 1 else x},
        {'transform_token_embeds': torch.tanh, 'transform_block_inputs': {1: torch.sin}},
    ):
        assert torch.allclose(net(IDS, **keywords), wanted)


@pytest.mark.parametrize('given', [{0: torch.tanh}, {1: 3}, 7, {'a': torch.tanh}])
def test_other_things_than_functions_are_refused(given):
    with pytest.raises(TypeError, match='transform_block_inputs must be'):
        made()(X, transform_block_inputs=given)


@pytest.mark.parametrize('change', [lambda x: None, lambda x: x[:, :2], lambda x: x.sum(dim=-1)])
def test_what_functions_give_fits_in_the_place_of_their_input(change):
    for keywords in ({'transform_token_embeds': change}, {'transform_block_inputs': {2: change}}):
        with pytest.raises(
            ValueError, match=rf'{next(iter(keywords))} must give a tensor of the shape of its input, \(2, 7, 16\)'
        ):
            model()(IDS, **keywords)


def test_a_table_of_ones_own_has_the_width_of_the_model():
    net = TransformerWrapper(num_tokens=11, max_seq_len=12, token_emb=nn.Embedding(11, 7), attn_layers=Decoder(**SMALL))
    with pytest.raises(ValueError, match=r'token_emb must give a vector of width 16 for each place of x, \(2, 7, 16\), got'):
        net(IDS)


# ---------------------------------------------------------------- prefixes, memories, heads


@pytest.mark.parametrize('heads', [1, 2])
def test_excised_prefixes_have_no_outputs(heads):
    layers = Decoder(**SMALL)
    net = TransformerWrapper(num_tokens=11, max_seq_len=12, attn_layers=layers, num_output_heads=heads)
    net = shaken(net, 0).double().eval()
    prefix = torch.randn(2, 3, 16, dtype=torch.float64)
    whole, cut = net(IDS, prepend_embeds=prefix), net(IDS, prepend_embeds=prefix, excise_prepend_embeds=True)
    for one, other in zip(whole, cut, strict=True) if heads > 1 else [(whole, cut)]:
        assert torch.equal(one[:, 3:], other)
    both = net(IDS, prepend_embeds=prefix, excise_prepend_embeds=True, return_logits_and_embeddings=True)
    assert both[1].shape == (2, 7, 16)
    assert net(IDS, prepend_embeds=prefix, excise_prepend_embeds=True, return_embeddings=True).shape == (2, 7, 16)


def test_gradients_flow_into_memories_that_are_not_detached():
    layers = Decoder(**SMALL, rotary_pos_emb=True)
    net = TransformerWrapper(num_tokens=11, max_seq_len=8, max_mem_len=4, attn_layers=layers)
    for detach in (True, False):
        net.zero_grad()
        _, mems = net(IDS[:, :4], return_mems=True, detach_mems=detach)
        assert all(mem.requires_grad is not detach for mem in mems[1:])
    _, mems = net(IDS[:, :4], return_mems=True, detach_mems=False)
    net(IDS[:, 4:], mems=mems).sum().backward()
    assert net.token_emb.emb.weight.grad[IDS[:, :4].unique()].abs().sum() > 0


def test_the_tied_head_s_factor():
    net = TransformerWrapper(
        num_tokens=11, max_seq_len=8, tie_embedding=True, tie_embedding_scale=0.25, attn_layers=Decoder(**SMALL)
    )
    embeds = net(IDS, return_embeddings=True)
    assert torch.allclose(net(IDS), 0.25 * embeds @ net.token_emb.emb.weight.T, atol=1e-6)
    head = net.loss_head
    assert head.bias is None
    assert torch.allclose(nn.functional.linear(embeds, head.weight) * head.scale, net(IDS), atol=1e-6)
    with pytest.raises(FlagError, match='each is the factor on the logits'):
        TransformerWrapper(
            num_tokens=11, max_seq_len=8, tie_embedding=True, tie_embedding_scale=0.5, logits_scale=0.5,
            attn_layers=Decoder(**SMALL),
        )  # fmt: skip
