"""Contrastive decoding: prefer tokens that an expert finds more likely than its amateurs do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from x_transformers.generation.decode import Reader, Tokens
from x_transformers.generation.prompts import GenerateError
from x_transformers.generation.sampling import check_callable, contrastive_decode_fn
from x_transformers.tensor_types import Float, Int

FilterArgs = Mapping[str, Any]


def unwrapped(model: nn.Module) -> nn.Module:
    """The net inside an autoregressive wrapper, or the net itself."""
    inner = getattr(model, 'net', None)
    return inner if isinstance(inner, nn.Module) and hasattr(model, 'generate') else model


def amateur_nets(
    models: nn.Module | Sequence[nn.Module] | None, options: FilterArgs | Sequence[FilterArgs]
) -> list[tuple[nn.Module, FilterArgs]]:
    """Each amateur net with its options."""
    if models is None:
        return []
    many = isinstance(models, (list, tuple, nn.ModuleList))
    nets: list[Any] = list(models) if many else [models]  # type: ignore[arg-type]
    settings = [options] if isinstance(options, Mapping) else list(options)
    for net in nets:
        if not isinstance(net, nn.Module):
            raise TypeError(f'amateur_model must be a module or a list or tuple of modules, got {type(net).__name__}')
    if len(nets) != len(settings):
        raise GenerateError(
            f'contrastive_decode_kwargs must hold one dict for each of the {len(nets)} amateurs, got {len(settings)}.'
        )
    for setting in settings:
        check_callable(contrastive_decode_fn, 2, setting, 'contrastive_decode_kwargs')
        alpha = setting.get('alpha', 0.1)
        for name, value in setting.items():
            if not isinstance(value, (int, float)) and not (isinstance(value, Tensor) and value.numel() == 1):
                raise TypeError(f'contrastive_decode_kwargs: {name} must be a number, got {value!r}')
        if not isinstance(alpha, Tensor) and not 0 <= alpha <= 1:
            raise ValueError(
                f'contrastive_decode_kwargs: alpha must be a share of the likeliest token, 0 to 1, got {alpha}. Beyond 1 no '
                'token is left.'
            )
    return [(unwrapped(net), setting) for net, setting in zip(nets, settings, strict=True)]


def check_same_vocabulary(expert: nn.Module, other: nn.Module, role: str) -> None:
    """Refuse two nets that are known to have different vocabularies."""
    ours, theirs = getattr(expert, 'num_tokens', None), getattr(other, 'num_tokens', None)
    if ours is not None and theirs is not None and ours != theirs:
        raise GenerateError(
            f'the {role} must have the vocabulary of the net, {ours} tokens, got {theirs}. Use one that was trained with '
            'the same tokenizer.'
        )


class ContrastiveReader:
    """An expert and its amateurs, reading the same tokens, each with a cache and a window of its own."""

    def __init__(self, expert: Reader, amateurs: Sequence[tuple[Reader, FilterArgs]]) -> None:
        self.expert = expert
        self.amateurs = amateurs

    def check_length(self, total: int) -> None:
        self.expert.check_length(total)
        for reader, _ in self.amateurs:
            reader.check_length(total, 'the amateur')

    def read(self, tokens: Tokens, last: int = 1) -> Float[Tensor, 'b k v']:
        logits = self.expert.read(tokens, last)
        for reader, options in self.amateurs:
            logits = contrastive_decode_fn(logits, reader.read(tokens, last), **options)
        return logits

    def reorder(self, index: Int[Tensor, ' r'], repeated_from: int | None = None) -> None:
        for reader in (self.expert, *(reader for reader, _ in self.amateurs)):
            reader.reorder(index, repeated_from)
