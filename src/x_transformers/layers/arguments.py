"""The arguments of a call, each declared once: axes, description, defaults for prepended rows, relation to the past.

Letters of axes: b batch, n tokens, i queries, j keys or a context, h heads, l memories, p prepended, m keys of another model,
d, e, c features, s layers. Several forms are divided by a bar: the number of axes tells which one is meant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor

from x_transformers.cache.kv_cache import Cache
from x_transformers.tensor_types import Shaped

PAIRS = 'i j | h i j | b h i j'


@dataclass(frozen=True)
class Argument:
    """One argument of a call.

    Args:
        axes: of the tensor, or of each tensor in a list or dictionary; ``floating``: of one that holds embeddings.
        says: one sentence.
        front: what stands in it for rows in front of the tokens (True, 0.0), where the caller says nothing of them.
        with_front: the caller says it for those, too.
        past: 'all' if it may also speak of tokens that a cache holds, 'new' if of the new ones alone.
        each_call: generation hands over its part for the tokens of each call; False: it belongs to the whole.
        needs: the argument without which it says nothing.
    """

    axes: str
    says: str
    floating: str = ''
    front: float | None = None
    with_front: bool = False
    past: Literal['all', 'new'] = 'new'
    each_call: bool = True
    needs: str | None = None

    def form(self, t: Shaped[Tensor, '...']) -> list[str]:
        """The letters of this tensor's axes; none if it has no form of the argument."""
        forms = self.floating if self.floating and t.is_floating_point() else self.axes
        return next((letters for each in forms.split('|') if len(letters := each.split()) == t.ndim), [])

    def axis(self, t: Shaped[Tensor, '...'], letter: str) -> int | None:
        """Where this tensor has the axis; None: nowhere."""
        letters = self.form(t)
        return letters.index(letter) if letter in letters else None

    def has(self, letter: str) -> bool:
        return letter in self.axes.replace('|', ' ').split()


def argument(axes: str, says: str, *, default: Any = None, **more: Any) -> Any:
    """A field that declares an argument; ``more`` as in ``Argument``."""
    declaration = Argument(axes, says, **more)
    if callable(default):
        return field(default_factory=default, metadata={'argument': declaration})
    return field(default=default, metadata={'argument': declaration})


def plain_argument(default: Any, says: str, **more: Any) -> Any:
    """A field that declares an argument of which nothing else need be known."""
    metadata = {'says': says, **more}
    return field(default_factory=default, metadata=metadata) if callable(default) else field(default=default, metadata=metadata)


def argument_sentences(kind: Any, prefix: str = '') -> dict[str, str]:
    """What each argument that a dataclass declares does, by its name in a call: with the prefix."""
    sentences = ((each.name, each.metadata.get('argument') or each.metadata.get('says')) for each in fields(kind))
    return {prefix + name: says.says if isinstance(says, Argument) else says for name, says in sentences if says is not None}


def arguments_of(kind: Any) -> dict[str, Argument]:
    """The declared arguments of a dataclass, by name."""
    return {each.name: each.metadata['argument'] for each in fields(kind) if 'argument' in each.metadata}


def needs_of(kind: Any) -> tuple[tuple[str, str], ...]:
    """(argument, the one without which it says nothing) of a dataclass."""
    # of an argument that is no tensor nothing else is declared
    pairs = [(each.name, getattr(each.metadata.get('argument'), 'needs', each.metadata.get('needs'))) for each in fields(kind)]
    return tuple((name, needs) for name, needs in pairs if needs is not None)


def without_needed(args: Any, needs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Those of ``needs_of`` that were given without what they need; a list of nothing but None is not given."""
    missing = []
    for name, needed in needs:
        value = getattr(args, name)
        if value is not None and getattr(args, needed) is None and (isinstance(value, Tensor) or any_given(value)):
            missing.append((name, needed))
    return missing


def any_given(value: Any) -> bool:
    return not isinstance(value, (list, tuple)) or any(each is not None for each in value)


def names_of(declared: Mapping[str, Argument], fits: Callable[[Argument], bool]) -> tuple[str, ...]:
    return tuple(name for name, each in declared.items() if fits(each))


def per_token(declared: Mapping[str, Argument], values: Mapping[str, Any]) -> Iterator[tuple[str, Tensor, int]]:
    """(name, tensor, axis of the tokens) of what was given for each token."""
    for name, each in declared.items():
        value = values.get(name)
        if isinstance(value, Tensor) and (axis := each.axis(value, 'n')) is not None:
            yield name, value, axis


def is_number(value: Any) -> bool:
    """Whether it is one whole number, which an exporter may keep open."""
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def shown_as(value: Any) -> str:
    """A value in an error: of a tensor its shape."""
    return f'a tensor of shape {tuple(value.shape)}' if isinstance(value, Tensor) else repr(value)


def check_number(name: str, value: Any, low: int | None = None) -> None:
    """An argument that is one whole number, or nothing."""
    counted = isinstance(value, Tensor) and value.ndim == 0 and not value.is_floating_point()
    fits = value is None or counted or (is_number(value) and (low is None or value >= low))
    if not fits:
        raise ValueError(f'{name} must be a whole number{"" if low is None else f" from {low}"}, got {shown_as(value)}')


def count_new(tokens: int, held: int, new_only: bool, cache_age: int | None) -> int:
    """How many of ``tokens`` tokens are new where a cache holds ``held`` of them.

    ``new_only``: all; ``cache_age``: the last so many (0: all). An input of more tokens than are held is the whole sequence,
    also where ``cache_age`` is 1, as a stack has it if nothing is said. Of a shorter one, the end of the sequence, the last
    token is new then, as callers of the original rely on; all of it is if ``cache_age`` is None.
    """
    if new_only:
        return tokens
    if cache_age not in (None, 1):
        if not 0 <= cache_age <= tokens:
            raise ValueError(
                f'cache_age must lie in 0 (all) to {tokens}, the tokens of x, got {cache_age}. Leave it out to have it counted.'
            )
        return cache_age or tokens
    if tokens > held:
        return tokens - held
    return tokens if cache_age is None else min(tokens, 1)


@dataclass
class StackArgs:
    """The keywords of a stack's forward, as the caller wrote them; ``prefix_attn_len`` is that of ``PrefixDecoder``."""

    context: Tensor | None = argument('b j c', 'The sequence that cross attention reads.')
    mask: Tensor | None = argument('b n', 'True for tokens, False for padding.', front=True, past='all')
    context_mask: Tensor | None = argument('b j', 'True for the tokens of `context`, False for its padding.', needs='context')
    attn_mask: Tensor | None = argument(PAIRS, 'True where a query may attend to a key.', front=True, past='all')
    self_attn_kv_mask: Tensor | None = argument(
        'b n', 'True for tokens that may be attended to; used in place of `mask`.', front=True, past='all'
    )
    mems: Sequence[Tensor | None] | None = argument(
        'b l d', 'Memories of an earlier segment, one per self attention, https://arxiv.org/abs/1901.02860.'
    )
    mem_masks: Sequence[Tensor | None] | None = argument(
        'b l', 'True for memories that may be attended to, one mask per self attention.', needs='mems'
    )
    seq_start_pos: Tensor | None = argument('b', 'Number of padding tokens on the left of each row.')
    seq_pos_offset: int | None = plain_argument(None, 'Offset that is added to the positions 0, 1, 2 …')
    cache: Cache = plain_argument(
        None,
        'Cache that an earlier call returned. If x is longer than the cached sequence, x is the whole sequence. Otherwise x is '
        'its end, and only the last token is new. Masks may cover the new tokens or all tokens.',
    )
    input_not_include_cache: bool = plain_argument(False, 'Treat all tokens of x as new, whatever the cache holds.')
    cache_age: int = plain_argument(1, 'Number of new tokens at the end of x; 0: all of x is new.')
    return_hiddens: bool | Literal['cache'] = plain_argument(
        False, "Also return LayerIntermediates. 'cache': with the cache only, without hidden states and attention maps."
    )
    rotary_pos_emb: Any = plain_argument(None, 'Precomputed rotary angles and scale.')
    polar_pos_emb: Any = plain_argument(None, 'Precomputed polar angles and bias.')
    pos: Tensor | None = argument('n | b n | b h n', 'Position ids, in place of 0, 1, 2 …', floating='n e | b n e', past='all')
    context_pos: Tensor | None = argument('j | b j', 'Position ids of the context.', needs='context')
    attn_bias: Tensor | None = argument(PAIRS, 'Bias that is added to the scores.', front=0.0, past='all')
    deep_embeds_and_ids: tuple[Tensor, Tensor] | None = plain_argument(
        None, 'Table of factors for feed-forwards, and the ids of the tokens in it.'
    )
    self_attn_additional_kv: Any = plain_argument(
        None,
        'Keys and values of another model: a list of pairs, or what its forward returned. If there are fewer pairs than '
        'layers, the top layers read them.',
    )
    additional_kv_mask: Tensor | None = argument(
        'b m', 'True for keys of the other model that may be attended to.', needs='self_attn_additional_kv'
    )
    detach_additional_kv: bool = plain_argument(False, 'Stop gradients at the keys and values of the other model.')
    route_additional_kv_to_top: bool = plain_argument(
        True, 'Give the keys of the other model to the top layers; False: to the bottom layers.'
    )
    condition: Tensor | None = argument('b c | b n c', 'Condition of the adaptive norms and scales.', with_front=True)
    in_attn_cond: Tensor | None = argument(
        'b d | b n d', 'Embedding that is added to the input of every branch.', with_front=True
    )
    layers_execute_order: Sequence[int] | None = plain_argument(None, 'Indices of the layers, in order of execution.')
    self_attn_kv_residuals: Tensor | None = argument(
        'b n d | s b n d',
        "Added to the input of self attention's keys and values: in the first layer, or in each layer.",
        with_front=True,
    )
    cross_attn_kv_residuals: Tensor | None = argument(
        'b j d | s b j d',
        "Added to the input of cross attention's keys and values: in the first layer, or in each layer.",
        needs='context',
    )
    flash_pack_seq_kwargs: Any = plain_argument(
        None, '`cu_seqlens_q` and `cu_seqlens_k` of the sequences that are packed into one row.'
    )
    flash_pack_seq_context_kwargs: Any = plain_argument(None, 'The same for the context.', needs='context')
    prefix_attn_len: int | Tensor | None = argument(
        'b', 'Length of the prefix that all tokens may attend to: one number, or one per row.'
    )
    repeat_blocks: Any = plain_argument(
        None,
        'Blocks that run several times: `(block, times)`, `((first, last), times)`, or a tuple of these, '
        'https://dnhkng.github.io/posts/rys/.',
    )
    transform_block_inputs: Any = plain_argument(
        None,
        'Functions that change the input of a block, by the number of the executed block, from 1; or one function '
        '(number, stream).',
    )
    causal: bool | None = plain_argument(None, 'Whether self attention is causal in this call; None: as the stack was built.')
    return_gumbel_log_probs: bool = plain_argument(
        False,
        'With `return_hiddens`, fill the `log_probs` (b h n) of each attention: log probabilities of the keys that hard or '
        'Gumbel attention chose.',
    )
    return_expert_loss: bool = plain_argument(False, 'Also return LayerIntermediates that hold the `expert_loss` only.')
    value_embeds_and_ids: tuple[Any, Tensor] | None = plain_argument(
        None, 'Modules (x, ids) -> (b kh n e) whose output is added to the values, by layer, and the ids.'
    )
    one_place: bool | None = plain_argument(
        None,
        'True: all rotary and polar positions of this call are equal. False: they may be in other calls of this sequence, so '
        'keys are cached without rotation.',
    )

    @property
    def wants_hiddens(self) -> bool:
        """Whether hidden states and maps are asked for, not the cache alone."""
        return bool(self.return_hiddens) and self.return_hiddens != 'cache'


DECLARED = arguments_of(StackArgs)
NEEDS = needs_of(StackArgs)
# what may be handed on to any stack
ARGUMENTS = tuple(each.name for each in fields(StackArgs) if each.name != 'prefix_attn_len')
