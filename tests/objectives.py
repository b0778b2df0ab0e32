"""What the tests of the objectives share: tiny nets, and laws that every objective obeys."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers import Decoder, Encoder, TransformerWrapper


def decoder(tokens: int = 7, length: int = 12, dim: int = 16, seed: int = 0, **given: Any) -> TransformerWrapper:
    torch.manual_seed(seed)
    stack = Decoder(dim=dim, depth=2, heads=2, attn_dim_head=8, **given)
    return shaken(TransformerWrapper(num_tokens=tokens, max_seq_len=length, attn_layers=stack))


def encoder(tokens: int = 7, length: int = 6, dim: int = 16, seed: int = 0, **given: Any) -> TransformerWrapper:
    torch.manual_seed(seed)
    stack = Encoder(dim=dim, depth=1, heads=2, attn_dim_head=8)
    return shaken(TransformerWrapper(num_tokens=tokens, max_seq_len=length, attn_layers=stack, **given))


class Around(nn.Module):
    """A net by the contract of the original around ours: it is given the whole window and what the call before returned."""

    can_cache_kv = can_cache_kv_outside_max_seq_len = True

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net, self.max_seq_len = net, net.max_seq_len

    def forward(self, x: Tensor, return_intermediates: bool = False, cache: Any = None, seq_start_pos: Any = None) -> Any:
        return self.net(x, return_intermediates=return_intermediates, cache=cache, seq_start_pos=seq_start_pos)


def shaken(net: Any) -> Any:
    """Every parameter off its start, so that no part is silent."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return net


def ids(*shape: int, tokens: int = 7, seed: int = 0) -> Tensor:
    return torch.randint(0, tokens, shape, generator=torch.Generator().manual_seed(seed))


def builds_on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """Built without memory and filled afterwards, the model is finite everywhere and has the same state dict."""
    with torch.device('meta'):
        model = build()
    model.to_empty(device=torch.empty(0).device)
    with torch.no_grad():
        for t in (*model.parameters(), *model.buffers()):
            t.fill_(float('nan') if t.is_floating_point() else -1)
    model.reset_parameters()  # type: ignore[operator]
    plain = build()
    assert list(model.state_dict()) == list(plain.state_dict())
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        assert not t.is_floating_point() or bool(t.isfinite().all()), name
    return model


def saved_and_loaded(model: nn.Module, twin: nn.Module) -> nn.Module:
    """``twin`` with what a file of ``model`` holds."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    twin.load_state_dict(torch.load(file))
    return twin


def likely(counts: Counter[Any] | Tensor, expected: Tensor) -> bool:
    """Whether counts of categories agree with their probabilities, by a chi-square test with p > 1e-4.

    By the cube-root approximation of Wilson and Hilferty the statistic is below its limit at 3.72 standard deviations.
    """
    observed = counts if isinstance(counts, Tensor) else torch.tensor([counts[k] for k in range(len(expected))])
    total = float(observed.sum())
    kept = expected > 0
    assert int(observed[~kept].sum()) == 0, 'something impossible was drawn'
    observed, wanted = observed[kept].double(), expected[kept].double() * total
    assert float(wanted.min()) >= 5, 'too few draws for a chi-square test'
    statistic = float(((observed - wanted) ** 2 / wanted).sum())
    freedom = len(wanted) - 1
    spread = 2 / (9 * freedom)
    return statistic < freedom * (1 - spread + 3.72 * math.sqrt(spread)) ** 3
