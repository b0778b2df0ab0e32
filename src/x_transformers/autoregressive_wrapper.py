"""Language models: the next-token loss, and generation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from x_transformers.embedding.call import rows_in_front
from x_transformers.embedding.ids import beyond, training_ids
from x_transformers.embedding.loop import loss_of_loops
from x_transformers.flags.calls import BeamOptions, GenerationOptions
from x_transformers.flags.fit import check_future, check_net, expert_loss
from x_transformers.flags.objectives import AutoregressiveOptions, options
from x_transformers.generation import beam
from x_transformers.generation.contrastive import ContrastiveReader, FilterArgs, amateur_nets, check_same_vocabulary, unwrapped
from x_transformers.generation.decode import Reader, Tokens, decode, modify_cached_kv, no_program, reader_for
from x_transformers.generation.modes import eval_decorator, evaluating
from x_transformers.generation.prompts import (
    GenerateError,
    Lengths,
    Prompt,
    Prompts,
    align_right,
    check_reserved,
    checked_eos,
    checked_length,
    prepare_prompts,
    warn_of_end,
)
from x_transformers.generation.sampling import (
    FILTER_LOGITS_FN,
    Filter,
    Sampler,
    contrastive_decode_fn,
    gumbel_noise,
    gumbel_sample,
    min_p,
    resolve_filter,
    top_a,
    top_k,
    top_p,
)
from x_transformers.generation.speculative import LookupDrafter, ModelDrafter, SelfDrafter, speculate
from x_transformers.generation.texts import check_speculative, collected, run_text
from x_transformers.heads import LinearHead
from x_transformers.helpers import cast_tuple as _cast_tuple
from x_transformers.helpers import default, exists, identity, log, pad_at_dim, writes_program
from x_transformers.labelled import AskedLabels, answer_labels, check_unlabelled, one_of
from x_transformers.losses import later_token_loss, next_embedding_loss, packed_targets, token_cross_entropy, with_experts
from x_transformers.module import Module
from x_transformers.randomness import forgetful_mask
from x_transformers.tensor_types import Bool, Float, Int

if TYPE_CHECKING:
    from x_transformers.generation.continuation import Programs

# from so many logits on, a loss that is all that is wanted is computed without holding them
LARGE_LOGITS = 2**24

__all__ = [
    'FILTER_LOGITS_FN', 'AutoregressiveWrapper', 'GenerateError', 'align_right', 'cast_tuple', 'contrastive_decode_fn',
    'default', 'eval_decorator', 'exists', 'gumbel_noise', 'gumbel_sample', 'identity', 'join', 'log', 'min_p',
    'modify_cached_kv', 'pad_at_dim', 'top_a', 'top_k', 'top_p',
]  # fmt: skip


def cast_tuple(t: Any, length: int = 1) -> tuple[Any, ...]:
    """A tuple stays as it is; anything else, lists too, is repeated ``length`` times."""
    return _cast_tuple(t, length)


def join(arr: Sequence[str], delimiter: str = ', ') -> str:
    return delimiter.join(arr)


class AutoregressiveWrapper(Module):
    """Trains a net to predict the next token and generates with it.

    Args:
        net: a module with ``net(x, return_intermediates=True) -> (logits, intermediates)``, such as a ``TransformerWrapper``
            around a ``Decoder``.
        ignore_index: targets excluded from the loss; in the input they are replaced by ``pad_value``.
        pad_value: the id that replaces those, pads prompts on the left, and fills rows after an end token.
        mask_prob: fraction of the tokens, never the first, that no query may attend to (https://arxiv.org/abs/2210.13432).
        add_attn_z_loss: add the net's attention z-loss, weighted by its ``attn_z_loss_weight``.
        multi_token_loss_weight: weight of the loss of each head but the first, for nets with ``multi_token_heads``
            (https://arxiv.org/abs/2404.19737 sums them; https://arxiv.org/abs/2412.19437 has 0.3 for their mean).
        next_embed_loss_weight: weight of the loss on the next embedding, for nets with ``add_continuous_pred_head``.
        looped_loss_threshold_exit, looped_loss_slope, looped_exit_loss_weight: for the gates of a ``looped`` net: the gain of
            a step below which they are trained to open, the steepness, and the weight of their loss.
        allow_future: also train a net whose tokens attend to later tokens, such as an ``Encoder``. By default such a net can
            only be trained with a causal ``attn_mask``, as it would learn only to copy.
    """

    _programs: Programs | None = None  # compiled ones that read tokens, made when first asked for

    def __init__(
        self,
        net: nn.Module,
        ignore_index: int = -100,
        pad_value: int = 0,
        mask_prob: float = 0.0,
        add_attn_z_loss: bool = False,
        next_embed_loss_weight: float = 0.1,
        *,
        multi_token_loss_weight: float = 1.0,
        looped_loss_threshold_exit: float = 0.05,
        looped_loss_slope: float = 50.0,
        looped_exit_loss_weight: float = 1.0,
        allow_future: bool = False,
    ) -> None:
        super().__init__()
        looped = bool(getattr(net, 'looped', False))
        multi_token_heads = int(getattr(net, 'multi_token_heads', 1))
        add_continuous_pred_head = bool(getattr(net, 'add_continuous_pred_head', False))
        options(AutoregressiveOptions, 'AutoregressiveWrapper', locals())
        check_net(net, 'AutoregressiveWrapper', adds_expert_loss=True, reads_later_tokens=True)
        self.pad_value, self.ignore_index = pad_value, ignore_index
        self.net = net
        self.max_seq_len = getattr(net, 'max_seq_len', 0)
        self.mask_prob, self.add_attn_z_loss = mask_prob, add_attn_z_loss
        self.add_continuous_pred_head = add_continuous_pred_head
        self.allow_future, self.looped = allow_future, looped
        self.adds_expert_loss = expert_loss(net)
        threshold, slope = looped_loss_threshold_exit, looped_loss_slope
        self.looped_loss = {'threshold': threshold, 'slope': slope, 'exit_weight': looped_exit_loss_weight}
        self.multi_token_heads, self.multi_token_loss_weight = multi_token_heads, multi_token_loss_weight
        self.next_embed_loss_weight = next_embed_loss_weight

    # ------------------------------------------------------------ training

    def forward(
        self,
        x: Int[Tensor, 'b n'] | None = None,
        return_outputs: bool = False,
        prepend_embeds: Float[Tensor, 'b p d'] | None = None,
        lens: Int[Tensor, 'b'] | None = None,
        *,
        targets: Int[Tensor, 'b n'] | None = None,
        labels: Int[Tensor, 'b n'] | None = None,
        input_ids: Int[Tensor, 'b n'] | None = None,
        attention_mask: Bool[Tensor, 'b n'] | Int[Tensor, 'b n'] | None = None,
        num_items_in_batch: int | Int[Tensor, ''] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The mean loss of predicting ``x[:, 1:]``, or (loss, (logits (b, n - 1, v), intermediates)).

        ``lens``: the number of tokens of each row; the others are no targets, and padding in the input. ``targets``: what the
        output at each position must predict, if not the next token of ``x``; ``ignore_index`` marks positions without one.

        With ``attn_flash_pack_seq=True`` in the stack, one row may hold several documents: ``flash_pack_seq_kwargs=
        {'cu_seqlens_q': ends, 'cu_seqlens_k': ends}``, where ``ends`` holds the start of each document and the end of the
        row: [0, 5, 12] for documents of 5 and 7 tokens. A document attends only to itself, and its last token does not
        predict the first of the next.

        In training, the loss includes the expert loss of a stack with ``ff_experts``.

        With ``labels``, or ``input_ids`` in place of ``x``, the result is ``Labelled``, as trainers of other packages expect:
        ``logits`` (b n v) and, with labels, ``loss``. The wrapper shifts the labels, so they may be the ids; -100 is
        excluded. ``attention_mask``: 1 for tokens. ``num_items_in_batch``: the divisor of the sum over tokens.
        """
        if labels is not None or input_ids is not None:
            clashing = {'targets': targets, 'return_outputs': return_outputs}
            asked = AskedLabels(labels, attention_mask, num_items_in_batch, clashing)
            return answer_labels(self, one_of(x, input_ids), asked, dict(kwargs, prepend_embeds=prepend_embeds, lens=lens))
        check_unlabelled(attention_mask, num_items_in_batch)
        loss, logits, record = self.measured(x, prepend_embeds, lens, targets, return_outputs, **kwargs)
        return (loss, (logits[:, :-1], record)) if return_outputs else loss

    def measured(
        self, x: Any, prepend_embeds: Any, lens: Any, targets: Any, return_outputs: bool, **kwargs: Any
    ) -> tuple[Float[Tensor, ''], Any, Any]:
        """(loss, logits (b n v), intermediates), the latter two where outputs are asked for."""
        x = training_ids(x) if lens is None else x.masked_fill(beyond(training_ids(x), lens), self.ignore_index)
        # targets of the caller's own may be something else than what comes next
        check_future(self.net, kwargs, 'AutoregressiveWrapper', allowed=self.allow_future or targets is not None)
        prefix = rows_in_front(prepend_embeds)
        front = 0 if kwargs.get('excise_prepend_embeds') else prefix
        if targets is None:
            # outputs are not sliced, as a target that does not count costs less than a copy of them
            wanted = packed_targets(x, kwargs.get('flash_pack_seq_kwargs'), prefix, self.ignore_index)[:, 1:]
            targets = pad_at_dim(wanted, (0, 1), value=self.ignore_index)
        elif targets.shape != x.shape:
            raise ValueError(f'targets must have the shape of x, {tuple(x.shape)}, got {tuple(targets.shape)}.')
        elif lens is not None:
            targets = targets.masked_fill(beyond(x, lens), self.ignore_index)
        wanted = pad_at_dim(targets, (front, 0), value=self.ignore_index)
        inputs = x.masked_fill(x == self.ignore_index, self.pad_value)
        if self.mask_prob > 0.0:
            kwargs['self_attn_kv_mask'] = forgetful_mask(inputs, self.mask_prob, prefix, kwargs)
        if self.add_continuous_pred_head:
            kwargs['return_next_embed_pred'] = True
        if self.multi_token_heads > 1:
            kwargs['return_multi_token_logits'] = True
        if self.add_attn_z_loss:
            kwargs['return_attn_z_loss'] = True
        if self.adds_expert_loss and lens is not None and 'mask' not in kwargs:
            # what is no token counts for no expert
            kwargs['mask'] = ~beyond(x, lens)
        if self.looped:
            kwargs['looped_pred_all_logits'] = True
        elif not return_outputs and self._wants_loss_only(kwargs):
            return self._loss_only(wanted, inputs, {'prepend_embeds': prepend_embeds, **kwargs}), None, None
        out, intermediates = self.net(inputs, return_intermediates=True, prepend_embeds=prepend_embeds, **kwargs)
        logits, following = out if self.add_continuous_pred_head else (out, None)
        logits, *later = logits if self.multi_token_heads > 1 else (logits,)
        if self.looped:
            loss = loss_of_loops(intermediates, wanted, self.ignore_index, **self.looped_loss)
        else:
            loss = self._token_loss(logits, wanted)
        if self.add_attn_z_loss:
            loss = loss + intermediates.attn_z_loss
        loss = with_experts(loss, intermediates)
        if later:
            rows = [each[:, front:] for each in later]
            options = {'packing': kwargs.get('flash_pack_seq_kwargs'), 'front': prefix, **self._loss_kind}
            loss = loss + self.multi_token_loss_weight * later_token_loss(rows, targets, **options)
        if following is not None:
            predicted, embedded = (t[:, front:] for t in following)
            loss = loss + self.next_embed_loss_weight * next_embedding_loss(
                predicted, embedded, targets[:, :-1] != self.ignore_index
            )
        return loss, logits[:, front:], intermediates

    def _token_loss(self, logits: Any, targets: Int[Tensor, 'b m']) -> Float[Tensor, '']:
        if not isinstance(logits, Tensor):
            raise ValueError('net must have one output head for AutoregressiveWrapper. Build it with num_output_heads=1.')
        return token_cross_entropy(logits, targets, **self._loss_kind)

    @property
    def _loss_kind(self) -> dict[str, Any]:
        return {'ignore_index': self.ignore_index, 'is_log_prob': bool(getattr(self.net, 'output_is_log_prob', False))}

    def _wants_loss_only(self, kwargs: Mapping[str, Any]) -> bool:
        """Nobody reads what the net reports beside its output, and the net can leave it out."""
        return bool(getattr(self.net, 'reads_new_tokens', False)) and not any(name.startswith('return_') for name in kwargs)

    def _loss_only(
        self, targets: Int[Tensor, 'b m'], inputs: Int[Tensor, 'b n'], kwargs: Mapping[str, Any]
    ) -> Float[Tensor, '']:
        """The loss without intermediates and, where they would be large, without the logits."""
        head: LinearHead | None = getattr(self.net, 'loss_head', None)
        small = head is None or inputs.numel() * head.weight.shape[0] < LARGE_LOGITS
        experts = {'return_expert_loss': True} if self.adds_expert_loss and self.training else {}
        if head is None or small or 'to_logits_kwargs' in kwargs or writes_program():
            out = self.net(inputs, **kwargs, **experts)
            return with_experts(self._token_loss(out[0], targets), out[1]) if experts else self._token_loss(out, targets)
        # the head reads its weights in its own forward, wherever they are
        asked = {'targets': targets, 'ignore_index': self.ignore_index}
        loss = self.net(inputs, to_logits_kwargs=asked, **kwargs, **experts)
        return with_experts(*loss) if experts else loss

    # ------------------------------------------------------------ generation

    def generate(
        self,
        prompts: Prompts,
        seq_len: int,
        eos_token: int | None = None,
        temperature: float = 1.0,
        prompt_lens: Lengths | None = None,
        filter_logits_fn: str | Filter = top_k,
        restrict_to_max_seq_len: bool = True,
        amateur_model: nn.Module | Sequence[nn.Module] | None = None,
        filter_kwargs: Mapping[str, Any] | None = None,
        contrastive_decode_kwargs: FilterArgs | Sequence[FilterArgs] | None = None,
        cache_kv: bool = True,
        *,
        include_prompt: bool = False,
        stream: bool = False,
        generator: torch.Generator | None = None,
        draft_model: nn.Module | None = None,
        prompt_lookup: int | None = None,
        self_speculative: bool = False,
        lookahead: int = 4,
        compile: bool = False,
        return_intermediates: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Sample ``seq_len`` tokens after each prompt; the new tokens (..., s), s <= seq_len.

        Args:
            prompts: ids (..., t) with any leading axes, or a list of ids (t) of different lengths.
            seq_len: how many tokens to sample.
            eos_token: rows are padded after this token; generation ends when all rows have produced it.
            temperature: 0 takes the most likely token, without any filter.
            prompt_lens: the true lengths of right-padded prompts.
            filter_logits_fn, filter_kwargs: which tokens may be sampled: ``'top_k'`` (``frac_num_tokens=0.1``, or ``k``),
                ``'top_p'`` (``thres=0.9``), ``'min_p'`` (``min_p=0.1``), ``'top_a'`` (``min_p_pow=2.0``, ``min_p_ratio=0.02``),
                or a function (logits, **filter_kwargs). It sees the logits before the temperature divides them. The default
                keeps the likeliest tenth of the vocabulary; ``lambda logits: logits`` keeps all.
            restrict_to_max_seq_len: feed the net at most its last ``max_seq_len`` tokens.
            amateur_model: one or several models for contrastive decoding (https://arxiv.org/abs/2210.15097), with
                ``contrastive_decode_kwargs`` for each (alpha, beta); the filter is not used then.
            cache_kv: cache keys and values, if the net supports it.
            include_prompt: return the prompt, right-aligned, before the new tokens.
            stream: return an iterator over single tokens (...); the model stays in evaluation mode until the iterator is
                exhausted or closed.
            generator: makes sampling reproducible.
            draft_model, prompt_lookup, self_speculative: speculative decoding (https://arxiv.org/abs/2211.17192) with a smaller
                model, with what followed an earlier occurrence of the newest ``prompt_lookup`` tokens, or with the net's
                ``multi_token_heads``; ``lookahead`` draft tokens per pass. The distribution is exactly that of plain sampling.
            compile: decode with one compiled program, on buffers of fixed shape. The first call compiles for about a minute;
                later ones reuse the program if the batch size is the same and the text is about as long.
            return_intermediates: return (tokens, the net's intermediates of the last call); their cache holds all tokens but
                the last.
            kwargs: for the net, such as ``context``; a ``mask`` over the prompt is extended as the sequence grows.

        Raises ValueError (GenerateError, also an AssertionError, where upstream asserts) before anything is computed.
        """
        options(GenerationOptions, 'generate', locals())
        warn_of_end(self.net, eos_token)
        prompt, steps = self._prompt(prompts, prompt_lens, kwargs), checked_length(seq_len)
        filter_fn = resolve_filter(filter_logits_fn)
        nets = amateur_nets(amateur_model, default(contrastive_decode_kwargs, {'alpha': 0.1, 'beta': 0.5}))
        sampler = Sampler(temperature, identity if nets else filter_fn, filter_kwargs or {}, generator)
        tokens = Tokens(prompt.tokens, steps + max(lookahead, 0))
        models: list[nn.Module] = [self, *(net for net, _ in nets)]
        speculative = draft_model is not None or prompt_lookup is not None or self_speculative

        def reader(net: nn.Module) -> Reader:
            return reader_for(
                net,
                kwargs,
                prompt=prompt,
                steps=steps,
                cache=cache_kv,
                window=restrict_to_max_seq_len,
                programs=self._compiled(net, cached=cache_kv, speculative=speculative) if compile else None,
            )

        main = reader(self.net)
        main.keeps_intermediates = return_intermediates
        if return_intermediates and (stream or compile):
            raise GenerateError(
                'return_intermediates must go without stream and compile, which do not return them. Leave them out.'
            )
        rest: dict[str, Any] = {'eos': checked_eos(eos_token), 'pad': self.pad_value}
        for net, _ in nets:
            check_same_vocabulary(self.net, net, 'amateur')
        if speculative:
            check_speculative(self.net, draft_model, prompt_lookup, self_speculative, nets)
            if draft_model is not None:
                small = unwrapped(draft_model)
                check_same_vocabulary(self.net, small, 'draft model')
                models.append(draft_model)
                drafting = reader(small)
                if eos_token is None and steps > 0:
                    drafting.check_length(prompt.tokens.shape[1] + steps - 1, 'the draft model')
                drafter: Any = ModelDrafter(drafting, sampler)
            else:
                drafter = SelfDrafter(main, sampler) if self_speculative else LookupDrafter(prompt_lookup or 0)
            whole: Reader | ContrastiveReader = main
            generated = speculate(main, drafter, tokens, steps, sampler, lookahead, **rest)
        else:
            whole = ContrastiveReader(main, [(reader(net), options) for net, options in nets]) if nets else main
            generated = decode(whole, tokens, steps, sampler, check=whole.check_length, **rest)
        if eos_token is None and steps > 0:
            whole.check_length(prompt.tokens.shape[1] + steps - 1)
        run = run_text(models, generated, prompt)
        if stream:
            return run
        made_tokens = collected(run, prompt, include_prompt)
        return (made_tokens, main.intermediates) if return_intermediates else made_tokens

    def _compiled(self, net: nn.Module, *, cached: bool, speculative: bool) -> Programs:
        """The programs made so far; they are not copied or pickled with the model. Refused before anything is computed."""
        from x_transformers.generation.continuation import Programs, compile_refusals

        reasons = [name for name, applies in (('cache_kv=False', not cached), ('speculative decoding', speculative)) if applies]
        if reasons := [*reasons, *compile_refusals(net)]:
            raise no_program(reasons)
        if self._programs is None:
            self._programs = Programs()
        return self._programs

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_programs': None}

    def stream(self, prompts: Prompts, seq_len: int, *args: Any, **kwargs: Any) -> Iterator[Int[Tensor, '...']]:
        """``generate`` as an iterator over single tokens, each of the prompts' leading shape."""
        return iter(self.generate(prompts, seq_len, *args, stream=True, **kwargs))

    @torch.no_grad()
    def beam_search(
        self,
        prompts: Int[Tensor, '... t'],
        seq_len: int,
        beams: int = 4,
        return_beams_and_scores: bool = False,
        eos_token: int | None = None,
        temperature: float = 1.0,
        stochastic: bool = False,
        prompt_lens: Lengths | None = None,
        filter_logits_fn: str | Filter = identity,
        restrict_to_max_seq_len: bool = True,
        filter_kwargs: Mapping[str, Any] | None = None,
        cache_kv: bool = True,
        *,
        length_penalty: float = 0.0,
        include_prompt: bool = False,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Any:
        """The most likely continuation of each prompt (..., s), or all beams (k, ..., s) and scores (k, ...), best first.

        A score is the sum of the log probabilities of the generated tokens, without filter and temperature, divided by
        ``length ** length_penalty``. ``stochastic`` draws the proposals by ``filter(logits) / temperature`` with Gumbel noise
        instead of taking the best. A hypothesis that has produced ``eos_token`` is complete and padded.

        Args:
            prompts: ids (..., t) with any leading axes, or a list of ids (t) of different lengths.
            seq_len: how many tokens to find.
            beams: how many hypotheses are kept for each prompt.
            return_beams_and_scores: return all hypotheses and their scores, not only the best.
            eos_token: ends a hypothesis.
            temperature, filter_logits_fn, filter_kwargs: as in ``generate``, for sampled proposals.
            stochastic: sample the proposals.
            prompt_lens: the true lengths of right-padded prompts.
            restrict_to_max_seq_len: feed the net at most its last ``max_seq_len`` tokens.
            cache_kv: cache keys and values, if the net supports it.
            length_penalty: 0 compares sums of log probabilities, 1 compares means.
            include_prompt: return the prompt, right-aligned, before the new tokens.
            generator: makes sampling reproducible.
            kwargs: for the net, such as ``context``; a ``mask`` over the prompt is extended as the sequence grows.
        """
        options(BeamOptions, 'beam_search', locals())
        warn_of_end(self.net, eos_token)
        prompt, steps = self._prompt(prompts, prompt_lens, kwargs), checked_length(seq_len)
        sampler = Sampler(temperature, resolve_filter(filter_logits_fn), filter_kwargs or {}, generator)
        reader = reader_for(self.net, kwargs, prompt=prompt, steps=steps, cache=cache_kv, window=restrict_to_max_seq_len)
        if eos_token is None and steps > 0:
            reader.check_length(prompt.tokens.shape[1] + steps - 1)
        rules = beam.BeamRules(beams, sampler if stochastic else None, checked_eos(eos_token), self.pad_value, length_penalty)
        with evaluating(self):
            best, scores = beam.search(reader, Tokens(prompt.tokens, steps), steps, rules)
        if include_prompt:
            best = torch.cat((prompt.tokens.expand(beams, -1, -1), best), dim=-1)
        if not return_beams_and_scores:
            return prompt.unpack(best[0])
        return best.reshape(beams, *prompt.leading, -1), scores.reshape(beams, *prompt.leading)

    def _prompt(self, prompts: Any, lens: Any, kwargs: Mapping[str, Any]) -> Prompt:
        check_reserved(kwargs)
        if getattr(self.net, 'has_multiple_heads', False):
            raise GenerateError('net must have one output head for generation. Build it with num_output_heads=1.')
        return prepare_prompts(prompts, lens, self.pad_value, may_be_empty=kwargs.get('prepend_embeds') is not None)
