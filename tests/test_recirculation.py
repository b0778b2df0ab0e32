"""Tokens that are read twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from x_transformers import AutoregressiveWrapper, Decoder, Encoder, TransformerWrapper
from x_transformers.recirculation import Recirculation, RecirculationMixer


def net(**flags: Any) -> TransformerWrapper:
    given = {'dim': 8, 'depth': 3, 'heads': 2, 'attn_dim_head': 4, 'rotary_pos_emb': True, 'verbose': False, **flags}
    model = TransformerWrapper(num_tokens=11, max_seq_len=32, attn_layers=Decoder(**given))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model.eval()


@torch.no_grad()
def test_the_second_reading_begins_with_the_mixture() -> None:
    """Against a loop that runs the layers itself: later tokens see the keys of the second reading, logits are of the first."""
    plain = net(depth=2)
    model = Recirculation(plain, source_layer=1, destination_layer=0, alpha=0.4, ramp_steps=2)
    x = torch.randint(11, (2, 5))
    told = model(x)
    stack = plain.attn_layers
    replaced: list[dict[str, Any]] = []
    for step in range(5):
        # keys of earlier tokens come from streams that were replaced: run them again, with the streams as they were mixed
        def enter(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
            stream = given[0].clone()
            for place, z in enumerate(replaced):
                stream[:, place] = z['z']
            return (stream, *given[1:])

        hook = stack.layers[0].register_forward_pre_hook(enter)
        logits, record = plain(x[:, : step + 1], return_intermediates=True)
        hook.remove()
        assert torch.allclose(logits[:, -1], told[:, step], atol=1e-5)
        a = 0.4 * min(step / 2, 1.0)
        z_s, z_d = record.hiddens[1][:, -1], record.hiddens[0][:, -1]
        replaced.append({'z': a * z_s * z_d.norm(dim=-1, keepdim=True) / z_s.norm(dim=-1, keepdim=True) + (1 - a) * z_d})


def test_without_weight_on_the_source_nothing_changes() -> None:
    plain = net()
    x = torch.randint(11, (2, 6))
    assert torch.allclose(Recirculation(plain, 2, 0, alpha=0.0)(x), plain(x), atol=1e-5)


def test_it_matters_where_the_branches_give_nothing() -> None:
    plain = net()
    nn.init.zeros_(plain.attn_layers.layers[0][1].to_out.weight)
    x = torch.randint(11, (1, 6))
    assert not torch.allclose(Recirculation(plain, 2, 0, alpha=0.5, ramp_steps=0)(x), plain(x), atol=1e-3)


@pytest.mark.parametrize('learned', [True, False])
def test_cached_and_uncached_generation_agree(learned: bool) -> None:
    how = {'use_learned': True} if learned else {'alpha': 0.3}
    model = Recirculation(net(), source_layer=(2, 1), destination_layer=(1, 0), **how).eval()
    writer, prompt = AutoregressiveWrapper(model), torch.randint(11, (2, 4))
    made = [writer.generate(prompt, 6, temperature=0.0, cache_kv=cached) for cached in (True, False)]
    assert torch.equal(*made)


def test_continuing_a_cache_is_reading_the_whole() -> None:
    model, x = Recirculation(net(), 2, 1, alpha=0.3), torch.randint(11, (2, 7))
    _, cache = model(x[:, :3], return_intermediates=True)
    assert torch.allclose(model(x, cache=cache), model(x)[:, 3:], atol=1e-5)


def test_a_mixer_starts_near_a_tenth() -> None:
    alpha, beta = RecirculationMixer(8)(torch.randn(2, 3, 8), torch.randn(2, 3, 8))
    assert alpha.mean().item() == pytest.approx(0.1, abs=0.02)
    assert beta.mean().item() == pytest.approx(0.9, abs=0.02)


def test_only_the_mixers_learn() -> None:
    model = Recirculation(net(), 2, 0, use_learned=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.learn_parameters(torch.randint(11, (4, 6)), steps=2)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in moved if name.startswith('learned_mixers')} != set()
    assert all(parameter.requires_grad for parameter in model.net.parameters())


@pytest.mark.parametrize(
    ('layers', 'says'),
    [((0, 2), 'shallower'), ((9, 0), '0 to 2'), (((2, 1), (0,)), 'pair up'), (((2, 1), (0, 0)), 'must differ')],
)
def test_layers_that_make_no_sense_are_refused(layers: tuple[Any, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Recirculation(net(), *layers)


def test_nets_that_cannot_do_it_are_refused() -> None:
    with pytest.raises(ValueError, match='one residual stream'):
        Recirculation(net(num_residual_streams=2), 2, 0)
    with pytest.raises(ValueError, match='use_learned must be True'):
        Recirculation(net(), 2, 0).learn_parameters(torch.zeros(1, 3).long())
    pooled = TransformerWrapper(
        num_tokens=11, max_seq_len=8, average_pool_embed=True, attn_layers=Encoder(dim=8, depth=2, heads=2, verbose=False)
    )
    with pytest.raises(ValueError, match='continue from a cache'):
        Recirculation(pooled, 1, 0)
