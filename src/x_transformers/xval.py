"""xVal: a number is one token whose vector is scaled by the number (https://arxiv.org/abs/2310.02989)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from x_transformers.cache.kv_cache import Cache
from x_transformers.embedding.build import build_entrance, build_positions, build_stack, stack_flags
from x_transformers.embedding.call import Memories, ModelArgs, call_of, last_positions
from x_transformers.embedding.ids import token_ids
from x_transformers.embedding.rows import Rows
from x_transformers.embedding.token import TokenEmbedding
from x_transformers.flags.calls import CachedWritingOptions
from x_transformers.flags.constructors import only
from x_transformers.flags.fit import check_added_losses, check_future
from x_transformers.flags.objectives import XValOptions, options
from x_transformers.flags.other_inputs import XValFlags
from x_transformers.flags.rules import check_wrapper
from x_transformers.flags.signature import ClassSignature
from x_transformers.generation.decode import Tokens, decode, reader_for
from x_transformers.generation.modes import evaluating
from x_transformers.generation.prompts import Lengths, Prompt, check_reserved, checked_length, right_aligned
from x_transformers.generation.sampling import Filter, Sampler, resolve_filter, top_k
from x_transformers.generation.views import VectorView
from x_transformers.heads import TiedHead
from x_transformers.helpers import default, values_known
from x_transformers.losses import at_least_single, shifted_mask, token_cross_entropy
from x_transformers.module import Module
from x_transformers.returns import ReturnSpec
from x_transformers.stack_wrapper import Ends, StackWrapper
from x_transformers.tensor_types import Bool, Float, Int

if TYPE_CHECKING:
    from typing import Unpack

    from x_transformers.flags.keywords import XValKeywords

__all__ = ['GenerateReturn', 'LossBreakdown', 'XValAutoregressiveWrapper', 'XValTransformerWrapper']


class LossBreakdown(NamedTuple):
    """The two losses of every position: 0 where there is nothing to predict, or no number."""

    cross_entropy_loss: Float[Tensor, 'b n']
    numerical_mse_loss: Float[Tensor, 'b n']


class GenerateReturn(NamedTuple):
    """What was generated; numbers are NaN where the token is no number."""

    sampled_token_ids: Int[Tensor, 'b s']
    sampled_numbers: Float[Tensor, 'b s']
    is_number_mask: Bool[Tensor, 'b s']


def read_numbers(
    ids: Int[Tensor, 'b n'], numbers: Float[Tensor, 'b n'], token: int, elsewhere: float
) -> tuple[Bool[Tensor, 'b n'], Float[Tensor, 'b n']]:
    """(where the numbers are, the numbers with ``elsewhere`` at all other tokens). Only there they may be NaN."""
    if not isinstance(numbers, Tensor) or numbers.is_complex() or numbers.dtype == torch.bool:
        kind = numbers.dtype if isinstance(numbers, Tensor) else type(numbers).__name__
        raise TypeError(f'x_num must be a tensor of numbers, got {kind}')
    numbers = numbers if numbers.is_floating_point() else numbers.to(torch.get_default_dtype())
    if ids.ndim != 2 or numbers.shape != ids.shape:
        raise ValueError(
            f'x and x_num must be batches of sequences (b n) of one shape, got {tuple(ids.shape)} and {tuple(numbers.shape)}'
        )
    is_number = ids == token
    numbers = torch.where(is_number, numbers, elsewhere)
    if values_known(numbers) and bool(numbers.isnan().any()):
        raise ValueError(
            f'x_num must be a number at each number token ({token}), got NaN at {int(numbers.isnan().sum())} of them. '
            'Pass a number there, or another token.'
        )
    return is_number, numbers


class XValTransformerWrapper(StackWrapper):
    """A transformer whose tokens may be numbers: the number token's embedding is multiplied by the number.

    The keywords are the fields of ``XValFlags``; ``num_tokens``, ``max_seq_len``, ``numerical_token_id`` and ``attn_layers``
    must be given.

    Raises:
        FlagError: names every keyword that is unknown, has a wrong value, or conflicts with another or with the stack.
    """

    __signature__: Any = ClassSignature(only(XValFlags))
    reads = 'token ids and their numbers'

    def __init__(
        self,
        *,
        num_tokens: int,
        max_seq_len: int,
        numerical_token_id: int,
        attn_layers: nn.Module,
        **flags: Unpack[XValKeywords],
    ) -> None:
        super().__init__(Ends(embed_numbers, read_tokens_and_numbers))
        sizes = {'num_tokens': num_tokens, 'max_seq_len': max_seq_len, 'numerical_token_id': numerical_token_id}
        own = XValFlags.parse({**sizes, 'attn_layers': attn_layers, **flags}, where='XValTransformerWrapper')
        check_wrapper(own, stack_flags(attn_layers), where=type(self).__name__)
        # kept for reading; the stack lives in its slot only
        self.flags = replace(own, attn_layers=nn.Identity())
        self.num_tokens, self.numerical_token_id = own.num_tokens, own.numerical_token_id
        stack: Any = attn_layers
        self.token_emb = TokenEmbedding(default(own.emb_dim, stack.dim), own.num_tokens, init_std=1.0)
        build_positions(self, own, attn_layers)
        build_entrance(self, own, attn_layers)
        untied = None if own.tie_embedding else nn.Linear(self.dim, default(own.logits_dim, own.num_tokens))
        self.to_logits: nn.Module = TiedHead(self.token_emb) if untied is None else untied
        self.to_numerical_output = nn.Sequential(nn.Linear(self.dim, 1), nn.Flatten(-2))
        build_stack(self, own, attn_layers)
        self.init_own()

    def forward(
        self,
        x: Int[Tensor, 'b n'],
        x_num: Float[Tensor, 'b n'],
        return_embeddings: bool = False,
        return_intermediates: bool | Literal['cache'] = False,
        return_mems: bool = False,
        mask: Bool[Tensor, 'b n'] | None = None,
        return_attn: bool = False,
        mems: Memories | None = None,
        pos: Int[Tensor, '... n'] | Float[Tensor, '... n e'] | None = None,
        prepend_embeds: Float[Tensor, 'b p e'] | None = None,
        *,
        prepend_mask: Bool[Tensor, 'b p'] | None = None,
        mem_masks: Sequence[Bool[Tensor, 'b l']] | None = None,
        sum_embeds: Float[Tensor, 'b n e'] | None = None,
        seq_start_pos: Int[Tensor, ' b'] | None = None,
        cache: Cache = None,
        input_not_include_cache: bool = False,
        logits_last: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """(logits (b n v), numbers (b n)), or what the ``return_*`` arguments select.

        Args:
            x, x_num: tokens, and the numbers of those that are ``numerical_token_id``; other values are ignored.
            mask: True for tokens, False for padding.
            mems, mem_masks: memories of the last segment, one per self attention (https://arxiv.org/abs/1901.02860).
            pos: positions of the tokens, (n,) or (b n); with a floating dtype, the position embeddings themselves.
            prepend_embeds, prepend_mask: embeddings in front of the tokens; outputs for them are returned as well.
            sum_embeds: embeddings to be added; ``seq_start_pos``: where each row begins, if padded on the left.
            cache: a ``KVCache``, or the intermediates of an earlier call. Then the input may be new only, or the whole
                sequence, of which the model reads the new part; ``input_not_include_cache=True``: all of ``x`` is new.
            logits_last: return outputs for the last so many positions only.
            kwargs: passed to the stack: ``context``, ``context_mask``, ``attn_mask``, ``condition``, ...

        Returns:
            outputs or embeddings (b n d); then, wrapped around it: memories, intermediates, attention maps.
        """
        x = token_ids(x)
        _, numbers = read_numbers(x, x_num, self.numerical_token_id, elsewhere=1.0)
        keywords = {
            'return_embeddings': return_embeddings, 'return_intermediates': return_intermediates, 'return_mems': return_mems,
            'mask': mask, 'return_attn': return_attn, 'mems': mems, 'pos': pos, 'prepend_embeds': prepend_embeds,
            'prepend_mask': prepend_mask, 'mem_masks': mem_masks, 'sum_embeds': sum_embeds, 'seq_start_pos': seq_start_pos,
            'cache': cache, 'input_not_include_cache': input_not_include_cache, 'logits_last': logits_last, 'kwargs': kwargs,
        }  # fmt: skip
        return self.run(call_of(self, x, keywords, numbers=numbers), ReturnSpec.of(keywords))


def embed_numbers(model: XValTransformerWrapper, x: Int[Tensor, 'b n'], call: ModelArgs, rows: Rows) -> Float[Tensor, 'b n e']:
    vectors: Tensor = model.token_emb(x)
    if call.numbers is None:
        return vectors
    return vectors * rows.newest(call.numbers, 'x_num').to(vectors.dtype).unsqueeze(-1)


def read_tokens_and_numbers(
    model: XValTransformerWrapper, h: Float[Tensor, 'b n d'], call: ModelArgs, whole: bool
) -> tuple[tuple[Float[Tensor, 'b n v'], Float[Tensor, 'b n']], Float[Tensor, 'b n d']]:
    read = last_positions(h, call.logits_last)
    return (model.to_logits(read), model.to_numerical_output(read)), h


class XValAutoregressiveWrapper(Module):
    """Trains an ``XValTransformerWrapper`` to predict the next token and number, and generates with it.

    Args:
        net: such as ``XValTransformerWrapper`` around a ``Decoder``.
        ignore_index: targets excluded from the loss; in the input they are replaced by ``pad_value``, unless they are a token.
        numerical_loss_weight: weight of the squared error of the numbers.
        allow_future: also train a net whose tokens attend to later tokens, such as an ``Encoder``.
    """

    def __init__(
        self,
        net: nn.Module,
        ignore_index: int = -100,
        pad_value: int = 0,
        numerical_loss_weight: float = 1.0,
        *,
        allow_future: bool = False,
    ) -> None:
        super().__init__()
        options(XValOptions, 'XValAutoregressiveWrapper', locals())
        check_added_losses(net, 'XValAutoregressiveWrapper', needs=('numerical_token_id',))
        self.allow_future = allow_future
        self.net: Any = net
        self.max_seq_len = getattr(net, 'max_seq_len', 0)
        self.numerical_loss_weight = numerical_loss_weight
        self.ignore_index = ignore_index
        self.pad_value = pad_value

    def forward(
        self, x: Int[Tensor, 'b n'], x_num: Float[Tensor, 'b n'], return_loss_breakdown: bool = False, **kwargs: Any
    ) -> Any:
        """The loss, averaged over all targets that count: cross entropy, and the squared error of those that are numbers.

        Args:
            return_loss_breakdown: also return both losses of every position, as ``LossBreakdown``.
            kwargs: for the net; ``mask`` may be (b n), or (b n-1), which then serves inputs and targets alike; behind
                ``prepend_embeds`` it may cover these, too.
        """
        token = self.net.numerical_token_id
        x = token_ids(x)
        check_future(self.net, kwargs, 'XValAutoregressiveWrapper', allowed=self.allow_future)
        if x.ndim != 2 or x.shape[1] < 2:
            raise ValueError(f'x must hold at least two tokens per row, to read and to predict; got shape {tuple(x.shape)}')
        is_number, numbers = read_numbers(x, x_num, token, elsewhere=0.0)
        own_mask = kwargs.pop('mask', None)
        before, mask = self._cut_mask(own_mask, x.shape[1], kwargs.get('prepend_embeds'))
        inputs, targets = shifted_mask(mask, x.shape[1])
        targets = default(targets, inputs)
        inputs = inputs if before is None or inputs is None else torch.cat((before, inputs), dim=1)
        logits, predicted = self.net(self._filled(x[:, :-1]), numbers[:, :-1], mask=inputs, **kwargs)
        front = logits.shape[1] - x.shape[1] + 1
        wanted = x[:, 1:] if targets is None else x[:, 1:].masked_fill(~targets, self.ignore_index)
        counts = wanted != self.ignore_index
        entropy = token_cross_entropy(logits[:, front:], wanted, ignore_index=self.ignore_index, reduction='none')
        error = (at_least_single(predicted[:, front:]) - numbers[:, 1:]).square()
        error = error.masked_fill(~(is_number[:, 1:] & counts), 0.0)
        loss = (entropy + error * self.numerical_loss_weight).sum() / counts.sum()
        return (loss, LossBreakdown(entropy, error)) if return_loss_breakdown else loss

    @staticmethod
    def _cut_mask(
        mask: Bool[Tensor, 'b t'] | None, length: int, prefix: Float[Tensor, 'b p e'] | None
    ) -> tuple[Bool[Tensor, 'b p'] | None, Tensor | None]:
        """(the part of a mask over what is prepended, if it covers that, too; the part over the tokens)."""
        front = 0 if prefix is None else prefix.shape[1]
        widths = {length, length - 1}
        if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] not in widths and mask.shape[1] - front in widths:
            return mask[:, :front], mask[:, front:]
        return None, mask

    def _filled(self, ids: Int[Tensor, 'b n']) -> Int[Tensor, 'b n']:
        """An ignored index that is no token cannot be looked up."""
        if 0 <= self.ignore_index < self.net.num_tokens:
            return ids
        return ids.masked_fill(ids == self.ignore_index, self.pad_value)

    # ------------------------------------------------------------ generation

    def generate(
        self,
        start_tokens: Int[Tensor, 'b t'],
        start_numbers: Float[Tensor, 'b t'],
        seq_len: int,
        filter_logits_fn: str | Filter = top_k,
        filter_kwargs: Mapping[str, Any] | None = None,
        temperature: float = 1.0,
        *,
        cache_kv: bool = True,
        prompt_lens: Lengths | None = None,
        include_prompt: bool = False,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> GenerateReturn:
        """``seq_len`` tokens and numbers after each prompt; only these, unless ``include_prompt``.

        Args:
            start_tokens, start_numbers: the prompts.
            filter_logits_fn: a name of ``FILTER_LOGITS_FN`` or a callable (logits, **filter_kwargs).
            temperature: 0 takes the most likely token, without any filter.
            cache_kv: remember keys and values, if the net can and the sequence stays within ``max_seq_len``; beyond that the
                last ``max_seq_len`` tokens are read anew each time.
            prompt_lens: the true lengths of prompts that are padded on the right.
            include_prompt: return the prompt, right-aligned, before the new tokens.
            generator: makes sampling reproducible.
            kwargs: for the net, such as ``context``; a ``mask`` over the prompt is extended as the sequence grows.
        """
        options(CachedWritingOptions, 'generate', locals())
        check_reserved(kwargs)
        steps = checked_length(seq_len)
        sampler = Sampler(temperature, resolve_filter(filter_logits_fn), filter_kwargs or {}, generator)
        prompt = self._prompt(start_tokens, start_numbers, prompt_lens)
        tokens = Tokens(prompt.tokens, steps)
        start, limit = tokens.length, self.max_seq_len or 0
        within = limit == 0 or start + steps - 1 <= limit
        view = VectorView(self.net, answer=_side_by_side, ask=_ids_and_numbers)
        net: Any = view
        reader = reader_for(net, kwargs, prompt=prompt, steps=steps, cache=cache_kv and within, window=True)

        def pick(outputs: Float[Tensor, 'b k']) -> Float[Tensor, 'b 2']:
            ids = sampler(outputs[:, :-1])
            return torch.stack((ids.to(prompt.tokens.dtype), outputs[:, -1].to(prompt.tokens.dtype)), dim=-1)

        with evaluating(self):
            for _ in decode(reader, tokens, steps, pick):
                pass
        ids, numbers = _ids_and_numbers(tokens.part(0 if include_prompt else start))
        is_number = ids == self.net.numerical_token_id
        numbers = numbers.to(start_numbers.dtype if start_numbers.is_floating_point() else torch.get_default_dtype())
        return GenerateReturn(ids, numbers.masked_fill(~is_number, torch.nan), is_number)

    def _prompt(self, ids: Int[Tensor, '... t'], numbers: Float[Tensor, '... t'], lens: Lengths | None) -> Prompt:
        """A token as a vector of its id and its number."""
        ids = token_ids(ids, 'start_tokens')
        _, numbers = read_numbers(ids, numbers, self.net.numerical_token_id, elsewhere=1.0)
        # float32 counts to 2 ** 24
        wide = torch.float32 if self.net.num_tokens <= 2**24 else torch.float64
        dtype = torch.promote_types(numbers.dtype, wide)
        pairs = torch.stack((self._filled(ids).to(dtype), numbers.detach().to(dtype)), dim=-1)
        return right_aligned(pairs, tuple(ids.shape[:1]), lens, self.pad_value)


def _ids_and_numbers(pairs: Float[Tensor, 'b n 2']) -> tuple[Int[Tensor, 'b n'], Float[Tensor, 'b n']]:
    return pairs[..., 0].long(), pairs[..., 1]


def _side_by_side(outputs: tuple[Float[Tensor, 'b n v'], Float[Tensor, 'b n']]) -> Float[Tensor, 'b n k']:
    logits, numbers = outputs
    return torch.cat((logits, numbers.unsqueeze(-1)), dim=-1)
