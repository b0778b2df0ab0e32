"""The models of tasks: a loss over the queried positions, and the metrics of an evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.autoregressive_wrapper import AutoregressiveWrapper
from x_transformers.flags.fit import check_added_losses, has_added_losses
from x_transformers.flags.other_inputs import ContinuousFlags
from x_transformers.flags.wrapper import WrapperFlags
from x_transformers.module import Module
from x_transformers.tensor_types import Float, Int
from x_transformers.training.build import split_flags

IGNORE = -100
"""The target of a position that asks nothing."""
SHARES = frozenset({'accuracy', 'balanced_accuracy', 'exact'})
"""What ``measure`` returns that lies between 0 and 1."""


@dataclass(frozen=True)
class Batch:
    """Rows of a task.

    ``inputs`` are token ids (b n), pairs of ids that share a position (b n 2), or vectors (b n d). ``targets`` (b n) are ids,
    ``IGNORE`` where nothing is asked. ``positions`` (n) stand in the place of 0 ... n-1. ``values`` (b p d) are the vectors
    among which targets are numbered, for tasks over vectors.
    """

    inputs: Tensor
    targets: Tensor
    positions: Tensor | None = None
    values: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        moved = (None if t is None else t.to(device, non_blocking=non_blocking) for t in self.tensors())
        return Batch(*moved)  # type: ignore[arg-type]

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.inputs, self.targets, self.positions, self.values

    def part(self, start: int, stop: int) -> Batch:
        """Some of the rows."""
        values = None if self.values is None else self.values[start:stop]
        return Batch(self.inputs[start:stop], self.targets[start:stop], self.positions, values)

    def __len__(self) -> int:
        return len(self.inputs)


def on_device_of(model: nn.Module, batch: Batch) -> Batch:
    device = next(model.parameters()).device
    return batch if batch.inputs.device == device else batch.to(device)


class AnswerModel(Module):
    """A model around a network: the loss of a batch, from logits at the asked positions alone.

    ``objective`` trains networks that have losses of their own, of experts or of later tokens; it is asked in training only.
    """

    def __init__(self, net: nn.Module, objective: AutoregressiveWrapper | None = None) -> None:
        super().__init__()
        if objective is None:
            check_added_losses(net, type(self).__name__)
        self.net = net
        self.objective = objective

    def forward(self, batch: Batch) -> Float[Tensor, '']:
        if self.objective is None:
            return F.cross_entropy(*self.answers(batch))
        batch = on_device_of(self, batch)
        inputs, keywords = self.given(batch)
        loss: Tensor = self.objective(inputs, targets=batch.targets, **keywords)
        return loss

    def given(self, batch: Batch) -> tuple[Int[Tensor, 'b n'], dict[str, Any]]:
        """(ids, keywords) of the network."""
        keywords: dict[str, Any] = {} if batch.positions is None else {'pos': batch.positions}
        if batch.inputs.ndim == 2:
            return batch.inputs, keywords
        return batch.inputs[..., 0], {**keywords, 'embed_ids': {'second': batch.inputs[..., 1]}}

    def answers(self, batch: Batch) -> tuple[Float[Tensor, 'a v'], Int[Tensor, ' a']]:
        """(logits, targets) of the asked positions."""
        batch = on_device_of(self, batch)
        asked = batch.targets != IGNORE
        targets = batch.targets[asked]
        inputs, keywords = self.given(batch)
        head = getattr(self.net, 'linear_head', None)
        if head is None:
            logits = self.net(inputs, **keywords)
            return logits[asked], targets
        # the vocabulary is the widest matrix of small models, and few positions ask
        hidden = self.net(inputs, return_embeddings=True, **keywords)
        weight, bias = self.net.linear_head  # type: ignore[misc]
        return F.linear(hidden[asked], weight, bias), targets


class VectorModel(AnswerModel):
    """Vectors in, a vector out at each position; it is scored against the ``values`` of its row."""

    def answers(self, batch: Batch) -> tuple[Float[Tensor, 'a v'], Int[Tensor, ' a']]:
        batch = on_device_of(self, batch)
        asked = batch.targets != IGNORE
        outputs = self.net(batch.inputs)
        if batch.values is None:
            return outputs[asked], batch.targets[asked]
        scores = torch.einsum('bnd,bpd->bnp', outputs, batch.values)
        return scores[asked], batch.targets[asked]


class PooledModel(Module):
    """One answer for each row (b 1), from an output that is made of the whole row.

    ``head``: from pooled tokens to logits, where the network itself ends with the tokens.
    """

    def __init__(self, net: nn.Module, head: nn.Module | None = None) -> None:
        super().__init__()
        self.net, self.head = net, head

    def forward(self, batch: Batch) -> Float[Tensor, '']:
        return F.cross_entropy(*self.answers(batch))

    def answers(self, batch: Batch) -> tuple[Float[Tensor, 'b v'], Int[Tensor, ' b']]:
        batch = on_device_of(self, batch)
        pooled = self.net(batch.inputs).flatten(1)
        return pooled if self.head is None else self.head(pooled), batch.targets[:, 0]


def build_language_model(flags: Mapping[str, Any], *, num_tokens: int, max_seq_len: int, **more: Any) -> nn.Module:
    """``TransformerWrapper`` around a ``Decoder``. Flags may name ``max_seq_len`` themselves."""
    from x_transformers import Decoder, TransformerWrapper

    wrapper, stack = split_flags(flags)
    keywords = {'num_tokens': num_tokens, 'max_seq_len': max_seq_len, **more, **wrapper}
    network: nn.Module = TransformerWrapper(attn_layers=Decoder(**stack), **keywords)
    return network


def build_token_model(flags: Mapping[str, Any], *, num_tokens: int, max_seq_len: int, **more: Any) -> AnswerModel:
    net = build_language_model(flags, num_tokens=num_tokens, max_seq_len=max_seq_len, **more)
    return AnswerModel(net, AutoregressiveWrapper(net, ignore_index=IGNORE) if has_added_losses(net) else None)


def build_vector_model(flags: Mapping[str, Any], *, dim_in: int, dim_out: int, max_seq_len: int) -> VectorModel:
    from x_transformers import ContinuousTransformerWrapper, Decoder

    wrapper, stack = split_flags(flags, ContinuousFlags)
    keywords = {'dim_in': dim_in, 'dim_out': dim_out, 'max_seq_len': max_seq_len, **wrapper}
    return VectorModel(ContinuousTransformerWrapper(attn_layers=Decoder(**stack), **keywords))


def build_pooled_model(flags: Mapping[str, Any], *, num_tokens: int, classes: int, max_seq_len: int) -> PooledModel:
    """An encoder with one output for a row: of the mean of all tokens, unless flags say another way."""
    from x_transformers import Encoder, TransformerWrapper

    wrapper, stack = split_flags(flags)
    if not any(wrapper.get(name) for name in WrapperFlags.one_of('pool')):
        wrapper['average_pool_embed'] = True
    keywords = {'num_tokens': num_tokens, 'max_seq_len': max_seq_len, 'logits_dim': classes, **wrapper}
    network = TransformerWrapper(attn_layers=Encoder(**stack), **keywords)
    if not wrapper.get('attn_pool'):
        return PooledModel(network)
    width = wrapper.get('dim_pooled_tokens') or stack['dim']
    return PooledModel(network, nn.Linear(width * wrapper.get('num_pooled_tokens', 1), classes))


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Without gradients and dropout; the state of the random generator is put back."""
    training, state = model.training, torch.get_rng_state()
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
        torch.set_rng_state(state)


def measure(model: nn.Module, batch: Batch, rows_at_once: int = 256) -> dict[str, float]:
    """Loss and accuracy at the answers, the accuracy averaged over classes, and the share of rows without a mistake."""
    losses, hits, classes = [], [], []
    parameter = next(model.parameters())
    with in_eval_mode(model):
        for start in range(0, len(batch), rows_at_once):
            part = batch.part(start, start + rows_at_once).to(parameter.device)
            logits, targets = model.answers(part)  # type: ignore[operator]
            losses.append(F.cross_entropy(logits.float(), targets, reduction='none').cpu())
            hits.append((logits.argmax(dim=-1) == targets).cpu())
            classes.append(targets.cpu())
    hit, kind = torch.cat(hits).double(), torch.cat(classes)
    row = (batch.targets != IGNORE).nonzero()[:, 0]
    right = torch.ones(len(batch), dtype=torch.double).scatter_reduce(0, row, hit, 'amin')
    count = kind.bincount().double()
    per_class = kind.bincount(weights=hit)[count > 0] / count[count > 0]
    return {
        'loss': torch.cat(losses).double().mean().item(),
        'accuracy': hit.mean().item(),
        'balanced_accuracy': per_class.mean().item(),
        'exact': right.mean().item(),
    }
