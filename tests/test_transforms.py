"""What torch makes of a model: gradients of single rows by ``torch.func``, traces, and runs without numbers."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, vmap

from x_transformers import (
    DPO,
    AutoregressiveWrapper,
    BeliefStateWrapper,
    ContinuousAutoregressiveWrapper,
    ContinuousTransformerWrapper,
    Decoder,
    Encoder,
    TransformerWrapper,
    XValAutoregressiveWrapper,
    XValTransformerWrapper,
)

STACK: dict[str, Any] = {'dim': 16, 'depth': 2, 'heads': 2, 'attn_dim_head': 8, 'verbose': False}
ROWS, LENGTH = 3, 6
IDS = torch.randint(1, 24, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
LENS = torch.tensor([6, 4, 2])


def net(kind: type = Decoder, **flags: Any) -> TransformerWrapper:
    torch.manual_seed(0)
    return TransformerWrapper(num_tokens=24, max_seq_len=64, attn_layers=kind(**STACK, **flags)).eval()


def of_frames() -> ContinuousAutoregressiveWrapper:
    torch.manual_seed(0)
    frames = ContinuousTransformerWrapper(dim_in=3, dim_out=3, max_seq_len=16, attn_layers=Decoder(**STACK))
    return ContinuousAutoregressiveWrapper(frames.eval())


def of_numbers() -> XValAutoregressiveWrapper:
    torch.manual_seed(0)
    numbers = XValTransformerWrapper(num_tokens=24, max_seq_len=16, numerical_token_id=3, attn_layers=Decoder(**STACK))
    return XValAutoregressiveWrapper(numbers.eval())


def preferring() -> DPO:
    model = DPO(net(), pad_id=0).eval()
    with torch.no_grad():
        for parameter in model.policy_model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


Case = tuple[Callable[[], nn.Module], tuple[Tensor, ...], dict[str, Tensor]]
LOSSES: dict[str, Case] = {
    'tokens': (lambda: AutoregressiveWrapper(net()), (IDS,), {}),
    'padding on the left': (
        lambda: AutoregressiveWrapper(net(rotary_pos_emb=True)), (IDS,), {'seq_start_pos': torch.tensor([0, 1, 2])}
    ),
    'lengths': (lambda: AutoregressiveWrapper(net()), (IDS,), {'lens': LENS}),
    'layers that are run again': (lambda: AutoregressiveWrapper(net(gradient_checkpointing=True)).train(), (IDS,), {}),
    'frames with lengths': (of_frames, (torch.randn(ROWS, LENGTH, 3),), {'lens': LENS}),
    'numbers': (of_numbers, (IDS, torch.randn(ROWS, LENGTH)), {}),
    'belief states': (lambda: BeliefStateWrapper(net()), (IDS,), {'lens': LENS}),
    'preferences': (preferring, (IDS, IDS.flip(1)), {'prompt_mask': (torch.arange(LENGTH) < 2).expand(ROWS, -1)}),
}  # fmt: skip


@pytest.mark.parametrize('name', LOSSES)
def test_gradients_of_single_rows(name: str) -> None:
    make, args, told = LOSSES[name]
    model = make()
    parameters = {each: p.detach() for each, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], *rows: Tensor) -> Tensor:
        given = [row.unsqueeze(0) for row in rows]
        named = dict(zip(told, given[len(args) :], strict=True))
        result: Tensor = functional_call(model, parameters, tuple(given[: len(args)]), named)
        return result

    found = vmap(grad(loss), in_dims=(None, *[0] * (len(args) + len(told))))(parameters, *args, *told.values())
    model = make()
    for row in range(ROWS):
        model.zero_grad()
        one = slice(row, row + 1)
        model(*(t[one] for t in args), **{each: t[one] for each, t in told.items()}).backward()
        for each, parameter in model.named_parameters():
            expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(
                found[each][row], expected, atol=1e-5, rtol=1e-4, msg=lambda m, each=each: f'{each}: {m}'
            )


@pytest.mark.parametrize('name', ['padding on the left', 'lengths', 'numbers', 'belief states'])
def test_without_numbers_nothing_is_read_off_tensors(name: str) -> None:
    make, args, told = LOSSES[name]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        loss = make()(*map(mode.from_tensor, args), **{each: mode.from_tensor(t) for each, t in told.items()})
    assert loss.shape == ()


TRACED: dict[str, Callable[[], nn.Module]] = {
    'a decoder': lambda: net(rotary_pos_emb=True),
    'an encoder': lambda: net(Encoder),
    'biases by distance': lambda: net(alibi_pos_bias=True),
    'experts': lambda: net(ff_experts=4),
    'interspersed memory tokens': lambda: TransformerWrapper(
        num_tokens=24, max_seq_len=64, num_memory_tokens=1, memory_tokens_interspersed_every=4, attn_layers=Decoder(**STACK)
    ).eval(),
    'memory keys and few key heads': lambda: net(attn_num_mem_kv=2, attn_kv_heads=1),
}


@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::torch.jit.TracerWarning')
@pytest.mark.parametrize('name', TRACED)
def test_a_trace_serves_other_batches_and_lengths(name: str) -> None:
    model = TRACED[name]()
    # with its check, which runs without gradients what was traced with them
    traced = torch.jit.trace(model, (IDS,))
    torch.jit.save(traced, io.BytesIO())
    with torch.no_grad():
        quiet = torch.jit.trace(model, (IDS,), check_trace=False)
        for shape in ((ROWS, LENGTH), (1, 3), (2, 40)):
            ids = torch.randint(0, 24, shape)
            torch.testing.assert_close(traced(ids), model(ids), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(quiet(ids), model(ids), atol=1e-5, rtol=1e-4)
