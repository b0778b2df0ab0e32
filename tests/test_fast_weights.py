"""Test-time training against loops over samples and segments."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers import Decoder, TransformerWrapper, XLAutoregressiveWrapper
from x_transformers.fast_weights import FastWeights, LowRank, orthogonalized
from x_transformers.xl_autoregressive_wrapper import TTTNextLatentPredictionLoss

SIZE, PATH = 4, 'attn_layers.layers.1.1.ff.2'


def net(**flags: Any) -> TransformerWrapper:
    layers = Decoder(dim=8, depth=2, heads=2, attn_dim_head=4, rotary_pos_emb=True, verbose=False, **flags)
    model = TransformerWrapper(num_tokens=11, max_seq_len=SIZE, max_mem_len=SIZE, attn_layers=layers)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


def wrapper(model: TransformerWrapper | None = None, **more: Any) -> Any:
    given = {'tbptt_steps': 8, 'ttt_module_paths': (PATH,), 'ttt_lr': 0.3, 'ttt_wd': 0.2, **more}
    return XLAutoregressiveWrapper(net() if model is None else model, **given).eval()


def by_hand(model: nn.Module, row: Tensor, readings: int = 1) -> tuple[float, Any]:
    """The loss of one sample whose map is trained by plain gradient descent, segment by segment; and the trained net."""
    plain: Any = deepcopy(model)
    moving = plain.get_submodule(PATH)
    inputs, labels, mems, total = row[None, :-1], row[None, 1:], None, 0.0
    for start in range(0, labels.shape[1], SIZE):
        part, wanted = inputs[:, start : start + SIZE], labels[:, start : start + SIZE]
        for reading in range(readings):
            logits, following = plain(part, mems=mems, return_mems=True)
            loss = F.cross_entropy(logits[0], wanted[0])
            if start + SIZE < labels.shape[1] or reading < readings - 1:
                gradients = torch.autograd.grad(loss, list(moving.parameters()))
                with torch.no_grad():
                    for parameter, gradient in zip(moving.parameters(), gradients, strict=True):
                        parameter -= 0.3 * gradient + 0.3 * 0.2 * parameter
        mems = following
        total += loss.item() * wanted.shape[1] / labels.shape[1]
    return total, plain


@pytest.mark.parametrize('readings', [1, 2])
def test_each_sample_is_trained_alone(readings: int) -> None:
    model, x = net(), torch.randint(11, (3, 3 * SIZE + 2))
    expected = sum(by_hand(model, row, readings)[0] for row in x) / 3
    told = wrapper(deepcopy(model))
    assert told(x, ttt_recurrent_steps=readings).item() == pytest.approx(expected, rel=1e-4)


def test_nothing_is_left_behind_and_another_batch_works() -> None:
    model = wrapper()
    before = deepcopy(model.state_dict())
    x = torch.randint(11, (2, 9))
    first = model(x)
    assert all(each.fast is None for each in model.modules() if isinstance(each, FastWeights))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model(torch.randint(11, (3, 9)))
    assert torch.equal(model(x), first)
    assert model.net(x[:, :3]).shape == (2, 3, 11)


def test_the_loss_of_evaluation_has_gradients_and_needs_none() -> None:
    model, x = wrapper(), torch.randint(11, (2, 9))
    loss = model(x)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        without = model(x)
    assert not without.requires_grad
    assert torch.allclose(loss, without, atol=1e-6)


def test_orthogonalised_gradients_have_singular_values_near_one() -> None:
    values = torch.linalg.svdvals(orthogonalized(torch.randn(3, 6, 4), steps=5))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_muon_moves_matrices_and_plain_descent_moves_the_rest() -> None:
    x = torch.randint(11, (2, 9))
    assert not torch.allclose(wrapper(ttt_use_muon=True)(x), wrapper()(x))


def test_source_and_target_must_have_one_form() -> None:
    with pytest.raises(ValueError, match='same shapes'):
        wrapper(ttt_module_paths=((PATH, 'attn_layers.layers.0.1.to_q'),))


def test_low_rank_keeps_the_trained_map() -> None:
    model, x = net(), torch.randint(11, (2, 9))
    told = wrapper(deepcopy(model), ttt_module_paths=(), ttt_low_rank_paths=((PATH, 2),), ttt_lr=0.0)
    expected = wrapper(deepcopy(model), ttt_lr=0.0)
    assert torch.allclose(told(x), expected(x), atol=1e-6)
    low = told.net.get_submodule(PATH).module
    assert isinstance(low, LowRank)
    assert sorted(low.state_dict()) == ['bias', 'weight', 'weight_a', 'weight_b']
    replaced = wrapper(ttt_module_paths=(), ttt_low_rank_paths=((PATH, 2),), ttt_low_rank_replaces=True)
    assert sorted(replaced.net.get_submodule(PATH).module.state_dict()) == ['bias', 'weight_a', 'weight_b']


def test_only_the_low_rank_part_moves() -> None:
    model = wrapper(ttt_module_paths=(), ttt_low_rank_paths=((PATH, 2),))
    seen = []
    module = model.net.get_submodule(PATH)
    module.register_forward_pre_hook(lambda each, _: seen.append({k: v.detach().clone() for k, v in (each.fast or {}).items()}))
    model(torch.randint(11, (2, 9)))
    moved = {name for name in seen[0] if not torch.equal(seen[0][name], seen[-1][name])}
    assert moved == {'weight_a', 'weight_b'}


def test_episodic_memories_are_extra_keys_and_may_be_trained() -> None:
    x = torch.randint(11, (2, 9))
    fixed = XLAutoregressiveWrapper(net(), episodic_mem_len=3, tbptt_steps=2).eval()
    pairs = [(k.expand(2, -1, -1, -1), v.expand(2, -1, -1, -1)) for k, v in zip(*fixed.net.episodic_mems.mem_kv, strict=True)]
    plain = XLAutoregressiveWrapper(fixed.net.net, tbptt_steps=2).eval()
    assert torch.allclose(fixed(x), plain(x, self_attn_additional_kv=pairs), atol=1e-6)
    trained = XLAutoregressiveWrapper(net(), episodic_mem_len=3, tbptt_steps=4, ttt_module_paths=('episodic_mems', 'to_logits'))
    assert trained.eval()(x).isfinite()
    assert isinstance(trained.net.net.to_logits, FastWeights)


def test_a_loss_of_one_s_own() -> None:
    class Loss(nn.Module):
        def forward(self, intermediates: Any, mask: Tensor) -> Tensor:
            return intermediates.last_hidden.square().mean(dim=(1, 2))

    x = torch.randint(11, (2, 9))
    told = [wrapper(net(), **more)(x) for more in ({}, {'ttt_custom_loss_module': Loss()}, {'ttt_next_latent_loss': True})]
    assert all(each.isfinite() for each in told)


def test_prediction_of_the_next_state() -> None:
    class Record:
        last_hidden = torch.randn(1, 4, 8)

    loss, mask = TTTNextLatentPredictionLoss(8, loss_type='mse'), torch.tensor([[True, True, True, False]])
    told, hidden = loss(Record, mask), Record.last_hidden
    expected = [(loss.predictor(hidden[0, i]) - hidden[0, i + 1]).square().mean() for i in range(2)]
    assert torch.allclose(told[0, :2], torch.stack(expected))
    assert told[0, 2] == 0


def test_generation_goes_on_from_what_the_prompt_taught() -> None:
    model = net().eval()
    told = wrapper(deepcopy(model))
    prompt = torch.randint(11, (2, 2 * SIZE + 3))
    made = told.generate(prompt, 3, temperature=0.0)
    for row, new in zip(prompt, made, strict=True):
        plain, mems = deepcopy(model), None
        moving = plain.get_submodule(PATH)
        for start in range(0, row.shape[0] - 1, SIZE):
            part, wanted = row[None, start : min(start + SIZE, len(row) - 1)], row[start + 1 : start + 1 + SIZE]
            logits, following = plain(part, mems=mems, return_mems=True)
            gradients = torch.autograd.grad(F.cross_entropy(logits[0], wanted), list(moving.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(moving.parameters(), gradients, strict=True):
                    parameter -= 0.3 * gradient + 0.3 * 0.2 * parameter
            mems = following if start + SIZE < len(row) else mems
        expected = XLAutoregressiveWrapper(plain).generate(row[None, 2 * SIZE :], 3, temperature=0.0, mems=mems)
        assert torch.equal(new, expected[0])


@pytest.mark.parametrize(
    ('broken', 'says'),
    [
        ({'tbptt_steps': 1}, 'tbptt_steps must be at least 2'),
        ({'ttt_module_paths': ('nowhere.at.all',)}, 'must name a module'),
        ({'ttt_module_paths': (), 'ttt_next_latent_loss': True, 'ttt_lr': 1e-3, 'ttt_wd': 0.01}, 'must name what is trained'),
        ({'ttt_low_rank_paths': ((PATH, 99),)}, 'the rank of'),
        ({'ttt_low_rank_paths': (('attn_layers.layers.1.1', 2),)}, 'must be a linear map'),
    ],
)
def test_refusals(broken: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        wrapper(**broken)


def test_modules_with_nothing_to_train_are_refused() -> None:
    with pytest.raises(ValueError, match='must have parameters'):
        wrapper(ttt_module_paths=('attn_layers.layers.0.1.attend',))


def test_modules_that_take_more_than_a_tensor_are_refused() -> None:
    fast = FastWeights(nn.Bilinear(2, 2, 2))
    fast.start(1, attached=False)
    with pytest.raises(ValueError, match='Name the linear maps inside'):
        fast(torch.zeros(1, 2), torch.zeros(1, 2))


def test_recurrent_steps_without_training_on_the_way_are_refused() -> None:
    with pytest.raises(ValueError, match='ttt_recurrent_steps must be 1'):
        XLAutoregressiveWrapper(net())(torch.randint(11, (1, 9)), ttt_recurrent_steps=2)
