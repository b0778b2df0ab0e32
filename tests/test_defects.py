"""What was once found broken, each as small as it shows."""

from __future__ import annotations

import copy
import random
import threading

import pytest
import torch
from torch import Tensor, nn

from x_transformers import (
    DPO,
    AutoregressiveWrapper,
    BeliefStateWrapper,
    ContinuousAutoregressiveWrapper,
    ContinuousTransformerWrapper,
    Decoder,
    Encoder,
    EntropyBasedTokenizer,
    MultiInputTransformerWrapper,
    NonAutoregressiveWrapper,
    TransformerWrapper,
    XLAutoregressiveWrapper,
    XTransformer,
    XValAutoregressiveWrapper,
    XValTransformerWrapper,
)
from x_transformers.autoregressive_wrapper import gumbel_sample
from x_transformers.free_transformer import FreeTransformer
from x_transformers.gpt_vae import GPTVAE
from x_transformers.nonautoregressive_wrapper import gumbel_sample as masked_gumbel_sample
from x_transformers.up_wrapper import SyntheticDataGenerator

V, N = 24, 8


def stack(kind: type = Decoder, **flags: object) -> nn.Module:
    return kind(**{'dim': 16, 'depth': 2, 'heads': 2, 'attn_dim_head': 8, **flags})


def language_model(
    kind: type = Decoder, num_tokens: int = V, wrapper: dict | None = None, **flags: object
) -> TransformerWrapper:
    return TransformerWrapper(num_tokens=num_tokens, max_seq_len=32, attn_layers=stack(kind, **flags), **(wrapper or {}))


def ids(*shape: int, low: int = 1, high: int = V) -> Tensor:
    return torch.randint(low, high, shape)


def shaken(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


# ---------------------------------------------------------------- token ids of any dtype

INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.int64]


def losses_of_ids() -> dict[str, tuple]:
    """A function from ids to a number, for everything that is trained on ids."""
    dpo = shaken(DPO(language_model()))
    prompt = torch.arange(N)[None].expand(3, -1) < 3
    xval = XValAutoregressiveWrapper(
        XValTransformerWrapper(num_tokens=V, max_seq_len=32, numerical_token_id=3, attn_layers=stack())
    )
    numbers, mask = torch.randn(3, N), torch.arange(N)[None] < torch.tensor([[N], [5], [3]])
    masked = NonAutoregressiveWrapper(
        TransformerWrapper(num_tokens=V, max_seq_len=N, attn_layers=stack(Encoder)), mask_id=0, self_token_critic=True
    )
    translation = XTransformer(
        dim=16, enc_num_tokens=V, enc_max_seq_len=N, enc_depth=1, dec_num_tokens=V, dec_max_seq_len=N, dec_depth=1
    )
    several = MultiInputTransformerWrapper(num_tokens={'a': V, 'b': V}, max_seq_len=N, attn_layers=stack())
    belief = BeliefStateWrapper(language_model())
    vae = GPTVAE(num_tokens=V, dim=16, depth=1, enc_depth=1, max_seq_len=N, heads=2)
    free = FreeTransformer(num_tokens=V, dim=16, dec_head_depth=1, dec_tail_depth=1, max_seq_len=N, latent_bits=2, heads=2)
    machine = SyntheticDataGenerator(16, V)
    writer = AutoregressiveWrapper(language_model())
    return {
        'model': language_model(),
        'autoregressive': AutoregressiveWrapper(language_model()),
        'ignored': AutoregressiveWrapper(language_model(), ignore_index=5, pad_value=3),
        'xl': XLAutoregressiveWrapper(language_model(wrapper={'max_mem_len': 8})),
        'dpo': lambda x: dpo(x, x.flip(0), prompt_mask=prompt),
        'xval': lambda x: xval(x, numbers, mask=mask),
        'masked': lambda x: masked(x).loss,
        'translation': lambda x: translation(x, x),
        'several': lambda x: several({'a': x, 'b': x})['a'],
        'belief': belief,
        'vae': vae,
        'free': free,
        'machine': lambda x: machine(x)[0],
        'tokenizer': EntropyBasedTokenizer(language_model(), entropy_threshold=3.1),
        'generate': lambda x: writer.generate(x, 3),
        'beams': lambda x: writer.beam_search(x, 3),
    }


@pytest.mark.parametrize('name', list(losses_of_ids()))
def test_ids_of_every_integer_dtype_give_the_same(name: str) -> None:
    fn, x = losses_of_ids()[name], ids(3, N)

    def run(given: Tensor) -> Tensor:
        torch.manual_seed(0)
        random.seed(0)
        return fn(given)

    wanted = run(x)
    for dtype in INTEGERS:
        assert torch.equal(run(x.to(dtype)), wanted), dtype
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        with pytest.warns(UserWarning, match='whole numbers of torch') as caught:
            assert torch.equal(run(x.to(dtype)), wanted)
        assert caught[0].filename == __file__
    with pytest.raises(TypeError, match='must be integers'):
        run(x + 0.5)
    with pytest.raises(TypeError, match='must be integers'):
        run(x > 3)


# ---------------------------------------------------------------- half precision


@pytest.mark.parametrize('sample', [gumbel_sample, masked_gumbel_sample])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_gumbel_samples_in_half_precision_are_those_of_the_distribution(sample: object, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 2000) * 2
    best = logits[0].topk(100).indices
    logits = logits.to(dtype)
    mass = logits.float().softmax(-1)[0, best].sum()
    drawn = torch.isin(sample(logits.expand(20000, -1)), best).float().mean()
    assert abs(drawn - mass) < 0.015


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_losses_in_half_precision_are_single(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for name, fn in losses_of_ids().items():
        if not isinstance(fn, nn.Module) or name in ('model', 'tokenizer'):
            continue
        loss = fn.to(dtype)(ids(3, N))
        assert loss.dtype == torch.float32, name
    net = language_model().to(dtype)
    x = ids(2, N)
    logits = net(x).float()
    wanted = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    assert torch.allclose(AutoregressiveWrapper(net)(x), wanted, atol=1e-6)
    frames = ContinuousAutoregressiveWrapper(
        ContinuousTransformerWrapper(dim_in=4, dim_out=4, max_seq_len=N, attn_layers=stack())
    ).to(dtype)
    assert frames(torch.randn(2, N, 4).to(dtype)).dtype == torch.float32


# ---------------------------------------------------------------- modes


def test_overlapping_streams_leave_the_mode() -> None:
    model = AutoregressiveWrapper(language_model(layer_dropout=0.5))
    prompt = ids(1, 3)
    model.net.attn_layers.layers[0].eval()
    before = [module.training for module in model.modules()]
    first, second = model.stream(prompt, 4), model.stream(prompt, 4)
    next(first), next(second)
    list(first)
    assert not any(module.training for module in model.modules())
    list(second)
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize('mode', [False, True])
def test_train_and_eval_during_a_stream_hold_afterwards(mode: bool) -> None:
    model = AutoregressiveWrapper(language_model())
    model.train(not mode)
    stream = model.stream(ids(1, 3), 4)
    next(stream)
    model.train(mode)
    next(stream)
    assert not model.net.attn_layers.training
    stream.close()
    assert all(module.training == mode for module in model.modules())


def test_only_the_part_that_was_switched_keeps_its_new_mode() -> None:
    model = AutoregressiveWrapper(language_model())
    stream = model.stream(ids(1, 3), 4)
    next(stream)
    model.net.attn_layers.eval()
    list(stream)
    assert model.training
    assert model.net.training
    assert not any(module.training for module in model.net.attn_layers.modules())


def test_threads_leave_the_mode() -> None:
    model = AutoregressiveWrapper(language_model())
    prompt = ids(1, 3)
    wanted = model.generate(prompt, 8, temperature=0.0)
    failed: list[object] = []

    def run(count: int) -> None:
        for index in range(count):
            if not torch.equal(model.generate(prompt, 8 - index, temperature=0.0), wanted[:, : 8 - index]):
                failed.append(index)

    threads = [threading.Thread(target=run, args=(4,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert all(module.training for module in model.modules())


def test_a_model_can_be_copied_while_it_streams() -> None:
    model = AutoregressiveWrapper(language_model())
    stream = model.stream(ids(1, 3), 4)
    next(stream)
    twin = copy.deepcopy(model).train()
    list(stream)
    assert twin.training
    assert model.training


# ---------------------------------------------------------------- masked generation


def masked_generation(**flags: object) -> NonAutoregressiveWrapper:
    net = TransformerWrapper(num_tokens=V, max_seq_len=N, attn_layers=stack(Encoder, **flags))
    return NonAutoregressiveWrapper(net, mask_id=0, self_token_critic=True, random_token_prob=0.0, steps=2)


def test_the_critic_is_blind_to_padding() -> None:
    model, mask = masked_generation(), torch.arange(N)[None] < torch.tensor([[N], [5]])
    x = ids(2, N)
    other = x.clone()
    other[1, 5:] = 7
    seen = []
    for t in (x, other):
        torch.manual_seed(0)
        random.seed(0)
        seen.append(model(t, mask=mask).critic_loss)
    assert torch.equal(*seen)


def test_the_critic_is_told_context_and_condition() -> None:
    told = {'context': torch.randn(2, 3, 16), 'context_mask': torch.ones(2, 3, dtype=torch.bool)}
    for flags, given in (({'cross_attend': True}, told), ({'use_adaptive_rmsnorm': True}, {'condition': torch.randn(2, 16)})):
        model = masked_generation(**flags)
        assert model(ids(2, N), **given).critic_loss.isfinite()
        assert model.generate(2, **given).shape == (2, N)


def test_a_critic_of_its_own_is_told_the_mask() -> None:
    net = TransformerWrapper(num_tokens=V, max_seq_len=N, attn_layers=stack(Encoder, cross_attend=True))
    critic = TransformerWrapper(num_tokens=V, max_seq_len=N, logits_dim=1, attn_layers=stack(Encoder))
    model = NonAutoregressiveWrapper(net, mask_id=0, token_critic=critic, random_token_prob=0.0)
    x, mask, context = ids(2, N), torch.arange(N)[None] < torch.tensor([[N], [5]]), torch.randn(2, 3, 16)
    other = x.clone()
    other[1, 5:] = 7
    seen = []
    for t in (x, other):
        torch.manual_seed(0)
        random.seed(0)
        seen.append(model(t, mask=mask, context=context).critic_loss)
    assert torch.equal(*seen)


# ---------------------------------------------------------------- memories


def test_masks_of_memories_go_along_when_these_are_moved_down() -> None:
    moved = language_model(depth=3, wrapper={'max_mem_len': 4, 'shift_mem_down': 1}).eval()
    plain = language_model(depth=3, wrapper={'max_mem_len': 4}).eval()
    plain.load_state_dict(moved.state_dict())
    x = ids(2, 5)
    mems = [torch.randn(2, length, 16) for length in (4, 3, 2)]
    masks = [torch.rand(2, length) > 0.4 for length in (4, 3, 2)]
    wanted = plain(x, mems=mems[1:] + mems[:1], mem_masks=masks[1:] + masks[:1])
    assert torch.allclose(moved(x, mems=mems, mem_masks=masks), wanted, atol=1e-5)


def test_memories_of_no_length_are_none() -> None:
    net, x = language_model(wrapper={'max_mem_len': 4}).eval(), ids(2, 5)
    mems, masks = [torch.empty(2, 0, 16)] * 2, [torch.ones(2, 0, dtype=torch.bool)] * 2
    assert torch.equal(net(x, mems=mems, mem_masks=masks), net(x))
    with pytest.raises(TypeError, match='mem_masks must be a list'):
        net(x, mems=[torch.randn(2, 4, 16)] * 2, mem_masks=torch.ones(2, 4, dtype=torch.bool))
