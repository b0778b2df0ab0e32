from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.objectives import builds_on_meta, ids, likely, saved_and_loaded, shaken
from x_transformers.flags.base import FlagError
from x_transformers.free_transformer import BinaryMapper, FreeTransformer

CODES = 8


def bare(**given: Any) -> FreeTransformer:
    sizes: dict[str, Any] = {'num_tokens': 7, 'dim': 16, 'dec_head_depth': 1, 'dec_tail_depth': 2, 'max_seq_len': 12}
    return FreeTransformer(**(sizes | {'heads': 2, 'attn_dim_head': 8, 'latent_bits': 3} | given))


def model(seed: int = 0, **given: Any) -> FreeTransformer:
    torch.manual_seed(seed)
    return shaken(bare(**given)).eval()


# codes


def bits(code: int, count: int) -> list[int]:
    return [code >> j & 1 for j in range(count)]


def test_codes_are_little_endian() -> None:
    logits = torch.tensor([[50.0, -50.0, 50.0], [-50.0, 50.0, 50.0]])
    one_hot, cost = BinaryMapper(3).eval()(logits)
    assert one_hot.argmax(dim=-1).tolist() == [1 + 4, 2 + 4]
    assert one_hot.sum(dim=-1).tolist() == [1.0, 1.0]
    assert cost.item() == 0.0


def test_keywords_of_the_codes() -> None:
    made = bare(kl_loss_threshold=0.5, binary_mapper_kwargs={'kl_loss_threshold': 0.1})
    assert made.binary_mapper.kl_loss_threshold == bare(kl_loss_threshold=0.1).binary_mapper.kl_loss_threshold
    assert bare(kl_loss_threshold=0.5).binary_mapper.kl_loss_threshold != made.binary_mapper.kl_loss_threshold
    with pytest.raises(FlagError, match='binary_mapper_kwargs must name kl_loss_threshold alone, got bits'):
        bare(binary_mapper_kwargs={'bits': 3})


def test_codes_are_drawn_bit_by_bit() -> None:
    torch.manual_seed(0)
    logits, temperature = torch.tensor([0.3, -1.0, 2.0]), 1.7
    p = (logits / temperature).sigmoid().tolist()
    probs = [math.prod(q if b else 1 - q for q, b in zip(p, bits(code, 3), strict=True)) for code in range(CODES)]
    one_hot, _ = BinaryMapper(3).eval()(logits.expand(20_000, -1), temperature=temperature)
    assert likely(one_hot.sum(dim=0), torch.tensor(probs))


def test_gradient_is_that_of_the_product_over_bits() -> None:
    logits = torch.randn(2, 4, 3, dtype=torch.double, requires_grad=True)
    upstream = torch.randn(2, 4, CODES, dtype=torch.double)
    mapper = BinaryMapper(3).double()
    one_hot, _ = mapper(logits, calc_aux_loss=False)
    assert bool(((one_hot.detach() - one_hot.detach().round()).abs() < 1e-12).all())
    (one_hot * upstream).sum().backward()
    twin = logits.detach().clone().requires_grad_()
    p = twin.sigmoid()
    product = torch.stack(
        [math.prod(p[..., j] if b else 1 - p[..., j] for j, b in enumerate(bits(code, 3))) for code in range(CODES)], dim=-1
    )
    (product * upstream).sum().backward()
    torch.testing.assert_close(logits.grad, twin.grad)
    still, _ = mapper(logits, straight_through=False)
    assert not still.requires_grad


def test_cost_of_a_code() -> None:
    """Nats below the full entropy and above the threshold; the temperature does not count."""
    logits = torch.tensor([[0.0, 0.0, 0.0], [9.0, -9.0, 9.0], [0.5, 2.0, -1.0]])
    mapper, costs = BinaryMapper(3, kl_loss_threshold=0.2), []
    for row in logits.sigmoid().tolist():
        entropy = -sum(p * math.log(p) + (1 - p) * math.log(1 - p) for p in row)
        costs.append(max(0.0, 3 * math.log(2) - entropy - 0.2))
    assert costs[0] == 0.0
    assert mapper(logits, temperature=3.0)[1].item() == pytest.approx(sum(costs) / 3, abs=1e-5)
    assert mapper.eval()(logits)[1].item() == 0.0
    assert mapper(logits, calc_aux_loss=True)[1].item() == pytest.approx(sum(costs) / 3, abs=1e-5)


# the loss


def loss_by_hand(net: FreeTransformer, seq: Tensor, condition: Tensor) -> Tensor:
    hidden = net.token_emb(seq[:, :-1].clamp(min=0))
    hidden = hidden if net.decoder_head is None else net.decoder_head(hidden)
    logits = net.decoder_tail(hidden, self_attn_kv_residuals=condition) @ net.token_unembed.weight.t()
    return F.cross_entropy(logits.flatten(0, 1), seq[:, 1:].flatten(), ignore_index=-1)


@pytest.mark.parametrize('head', [0, 1])
@pytest.mark.parametrize('per_token', [True, False])
def test_loss(head: int, per_token: bool) -> None:
    net, seq = model(dec_head_depth=head, per_token_latents=per_token, kl_loss_weight=0.3, kl_loss_threshold=0.1), ids(2, 8)
    torch.manual_seed(3)
    total, (ar_loss, kl_loss) = net(seq, return_all_losses=True)
    torch.manual_seed(3)
    one_hot = net.encode_to_latents(net.head(seq[:, :-1]))
    assert one_hot.shape == (2, 7 if per_token else 1, CODES)
    condition = one_hot @ net.from_latent_to_condition.weight.t()
    torch.testing.assert_close(ar_loss, loss_by_hand(net, seq, condition))
    assert kl_loss.item() > 0
    torch.testing.assert_close(total, ar_loss + 0.3 * kl_loss)


def test_one_code_of_another_sequence() -> None:
    net, seq, other = model(), ids(2, 8), ids(2, 5, seed=1)
    torch.manual_seed(3)
    _, (ar_loss, _) = net(seq, seq_for_latents=other, return_all_losses=True)
    torch.manual_seed(3)
    one_hot = net.encode_to_latents(net.head(other), per_token_latents=False)
    assert one_hot.shape == (2, 1, CODES)
    torch.testing.assert_close(ar_loss, loss_by_hand(net, seq, one_hot @ net.from_latent_to_condition.weight.t()))


def test_the_condition_enters_the_first_layer_of_the_tail_only() -> None:
    """Keys and values there see it; a query's own residual does not, so that one token alone is moved by its value only."""
    net = model(dec_tail_depth=2)
    given: list[Any] = []
    for layer in net.decoder_tail.layers:
        layer[1].register_forward_pre_hook(
            lambda module, inputs, keywords: given.append(keywords['around'].kv_shift), with_kwargs=True
        )
    condition = torch.randn(1, 1, 16)
    net.decoder_tail(torch.randn(1, 3, 16), self_attn_kv_residuals=condition)
    assert given[0] is not None
    assert all(shift is None for shift in given[1:])


def test_pads_within_the_input() -> None:
    """The default pad_id of -1 raises an index error in the original."""
    net, seq = model(), ids(2, 8)
    seq[1, 5:] = -1
    torch.manual_seed(3)
    _, (ar_loss, _) = net(seq, return_all_losses=True)
    torch.manual_seed(3)
    one_hot = net.encode_to_latents(net.head(seq[:, :-1]))
    torch.testing.assert_close(ar_loss, loss_by_hand(net, seq, one_hot @ net.from_latent_to_condition.weight.t()))


def test_masked_keys_are_not_read_for_latents() -> None:
    net, embeds = model(), torch.randn(1, 5, 16)
    found = []
    for filler in (0.0, 3.0):
        embeds[:, 3:] = filler
        torch.manual_seed(0)
        mask = torch.tensor([[True] * 3 + [False] * 2])
        one_hot, kl_loss = net.encode_to_latents(embeds, mask=mask, return_kl_loss=True, per_token_latents=False)
        found.append((one_hot, kl_loss))
    torch.testing.assert_close(found[0], found[1])


def test_gradients_reach_everything() -> None:
    net = model(kl_loss_threshold=0.0).train()
    net(ids(2, 8)).backward()
    for name, p in net.named_parameters():
        assert p.grad is not None, name
        assert bool(p.grad.isfinite().all()), name


# generation


@pytest.mark.parametrize('head', [0, 1])
@pytest.mark.parametrize('per_position', [False, True])
def test_cached_is_uncached_is_by_hand(head: int, per_position: bool) -> None:
    net, prompts = model(dec_head_depth=head), ids(2, 3)
    codes = torch.randint(0, CODES, (2, 9) if per_position else (2,), generator=torch.Generator().manual_seed(1))
    condition = net.from_latent_to_condition.weight.t()[codes]
    condition = condition if per_position else condition[:, None]
    out = prompts
    for _ in range(6):
        hidden = net.head(out)
        told = condition[:, : out.shape[1]]
        logits = net.token_unembed(net.decoder_tail(hidden, self_attn_kv_residuals=told))
        out = torch.cat((out, logits[:, -1:].argmax(dim=-1)), dim=1)
    for cached in (True, False):
        made = net.generate(prompts, 9, latents=codes, temperature=0.0, use_kv_cache=cached)
        assert made.tolist() == out.tolist()
    assert net.generate(prompts, 9, codes, temperature=0.0, include_prompt=False).tolist() == out[:, 3:].tolist()


def test_ways_to_give_a_code() -> None:
    net, prompts = model(), ids(2, 3)

    def run(latents: Any) -> list[list[int]]:
        made: list[list[int]] = net.generate(prompts, 9, latents=latents, temperature=0.0).tolist()
        return made

    one_hot = F.one_hot(torch.tensor(5), CODES).float()
    same = [5, [5, 5], torch.tensor([5, 5]), one_hot, one_hot.expand(2, -1), one_hot.expand(2, 9, -1), [[5] * 9] * 2]
    assert all(run(latents) == run(5) for latents in same)
    read = ids(2, 5)
    logits = [
        net.token_unembed(net.decoder_tail(net.head(read), self_attn_kv_residuals=net.as_condition(code, 2, 9)))
        for code in (None, 5, 6)
    ]
    assert not torch.allclose(logits[0], logits[1])
    assert not torch.allclose(logits[1], logits[2])
    soft = torch.randn(2, CODES).softmax(dim=-1)
    assert run(soft)[1] == net.generate(prompts[1:], 9, latents=soft[1:], temperature=0.0)[0].tolist()


def test_sampling() -> None:
    net, prompt = model(), ids(1, 2)
    logits = net.token_unembed(net.decoder_tail(net.head(prompt)))[0, -1].detach()
    torch.manual_seed(0)
    made = net.generate(prompt.expand(20_000, -1), 3, logit_filter_kwargs={'thres': 1.0})
    assert likely(torch.bincount(made[:, 2], minlength=7), logits.softmax(dim=-1))
    runs = [net.generate(prompt, 12, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*runs)


def test_generation_runs_in_evaluation_mode() -> None:
    """In the original dropout stays active."""
    net = model(attn_dropout=0.5, ff_dropout=0.5)
    made = net.generate(ids(2, 3), 9, temperature=0.0)
    net.train()
    assert torch.equal(net.generate(ids(2, 3), 9, temperature=0.0), made)
    net.decoder_tail.eval()
    with pytest.raises(RuntimeError, match='broken'):
        net.generate(ids(2, 3), 9, filter_logits_fn=broken)
    assert net.training
    assert net.encoder.training
    assert not net.decoder_tail.training


def broken(logits: Tensor, **given: Any) -> Tensor:
    raise RuntimeError('broken')


def test_any_leading_axes() -> None:
    net = model()
    assert net.generate(ids(3), 5).shape == (5,)
    assert net.generate(ids(2, 2, 3), 5, include_prompt=False).shape == (2, 2, 2)
    assert net.generate(ids(2, 3), 3).tolist() == ids(2, 3).tolist()


# the rest


def test_state() -> None:
    net = model()
    own = {k: tuple(v.shape) for k, v in net.state_dict().items() if not k.startswith(('encoder.', 'decoder_'))}
    assert own == {
        'query_token_for_latents': (16,),
        'token_emb.weight': (7, 16),
        'token_unembed.weight': (7, 16),
        'to_latent_bit_logits.weight': (3, 16),
        'from_latent_to_condition.weight': (16, 8),
    }
    assert {k.split('.')[0] for k in net.state_dict()} - {k.split('.')[0] for k in own} == {
        'encoder',
        'decoder_head',
        'decoder_tail',
    }
    assert model(dec_head_depth=0).decoder_head is None
    twin = saved_and_loaded(net, model(seed=4))
    torch.testing.assert_close(twin.generate(ids(2, 3), 9, 2, temperature=0.0), net.generate(ids(2, 3), 9, 2, temperature=0.0))


def test_built_on_meta() -> None:
    net: Any = builds_on_meta(bare)
    assert net.binary_mapper.power_two.tolist() == [1, 2, 4]
    assert net.binary_mapper.codes.tolist() == [bits(code, 3) for code in range(CODES)]


@pytest.mark.parametrize(
    ('given', 'says'),
    [
        ({'prompts': ids(2, 0)}, 'prompts'),
        ({'prompts': [ids(3), ids(2)]}, 'prompts'),
        ({'seq_len': 2}, 'seq_len'),
        ({'seq_len': -1}, 'seq_len'),
        ({'latents': CODES}, 'latents'),
        ({'latents': -1}, 'latents'),
        ({'latents': [1, 2, 3]}, 'latents'),
        ({'latents': torch.rand(2, 5)}, 'latents'),
        ({'latents': torch.rand(2, 4, CODES)}, 'latents'),
        ({'temperature': -1.0}, 'temperature'),
        ({'filter_logits_fn': 'best'}, 'filter_logits_fn'),
    ],
)
def test_bad_input_is_named(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        model().generate(**({'prompts': ids(2, 3), 'seq_len': 9} | given))


def test_other_bad_input_is_named() -> None:
    net = model()
    with pytest.raises(ValueError, match=r'^seq must'):
        net(ids(2, 1))
    with pytest.raises(ValueError, match=r'^seq_for_latents must'):
        net(ids(2, 5), seq_for_latents=ids(1, 5))
    with pytest.raises(ValueError, match='dec_tail_depth'):
        bare(dec_tail_depth=0)
    with pytest.raises(ValueError, match='bits'):
        BinaryMapper(0)
    with pytest.raises(ValueError, match='channels'):
        BinaryMapper(3)(torch.randn(2, 4))
