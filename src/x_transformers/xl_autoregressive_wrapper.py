"""Language modelling over segments, each of which attends to memories of earlier ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.embedding.ids import token_ids
from x_transformers.fast_weights import (
    EpisodicNet,
    Path,
    TestTimeTraining,
    TTTMetaLearningTargetKLLoss,
    TTTNextLatentPredictionLoss,
    check_apart,
    check_low_rank,
    make_fast,
    make_low_rank,
    module_at,
    pair_of,
    sample_losses,
)
from x_transformers.flags.calls import WritingOptions, XLForwardOptions
from x_transformers.flags.fit import check_future, check_net
from x_transformers.flags.objectives import XLOptions, options
from x_transformers.generation.decode import Reader, Tokens, decode
from x_transformers.generation.keywords import NetKeywords
from x_transformers.generation.modes import evaluating
from x_transformers.generation.prompts import (
    Prompts,
    check_reserved,
    checked_eos,
    checked_length,
    prepare_prompts,
    warn_of_end,
)
from x_transformers.generation.sampling import Filter, Sampler, resolve_filter, top_k
from x_transformers.latent_prediction import check_parameters
from x_transformers.losses import token_cross_entropy
from x_transformers.module import Module
from x_transformers.tensor_types import Float, Int

Mems = list[Tensor]

__all__ = ['TTTMetaLearningTargetKLLoss', 'TTTNextLatentPredictionLoss', 'XLAutoregressiveWrapper']


class SegmentReader:
    """Reads tokens in segments of ``net.max_seq_len``, each with the memories of the one before.

    Within a segment keys and values are cached. A segment that is complete is run once as a whole, with the memories that came
    into it: that gives what follows its last token and the memories for the next segment.
    """

    def __init__(self, net: nn.Module, size: int, mems: Mems | None, given: Mapping[str, Any], first: int = 0) -> None:
        self.net = net
        self.size = size
        self.mems = mems
        self.given = dict(given)
        self.first = first
        self._reader = self._fresh()

    def _fresh(self) -> Reader:
        keywords = NetKeywords({**self.given, 'mems': self.mems}, 0, None)
        return Reader(self.net, window=False, keywords=keywords, expected=self.size, origin=self.first)

    def read(self, tokens: Tokens, last: int = 1) -> Float[Tensor, 'b k v']:
        logits = None
        while tokens.length - self.first >= self.size:
            segment = tokens.part(self.first, self.first + self.size)
            logits, self.mems = self.net(segment, mems=self.mems, return_mems=True, **self.given)
            self.first += self.size
            self._reader = self._fresh()
        return self._reader.read(tokens, last) if logits is None or self.first < tokens.length else logits[:, -last:]


class XLAutoregressiveWrapper(Module):
    """Trains and generates over segments of ``net.max_seq_len`` tokens (Transformer-XL, https://arxiv.org/abs/1901.02860).

    With ``ttt_module_paths``, some modules are trained while the sequence is read (https://arxiv.org/abs/2512.23675): every
    sample begins with a copy of their weights, and each segment updates it. Training differentiates through these steps.

    Args:
        net: a ``TransformerWrapper`` with ``max_mem_len`` > 0.
        ignore_index: targets excluded from the loss; in the input they are replaced by ``pad_value``, unless they are tokens
            of the vocabulary.
        pad_value: the id that replaces those, and everything after an end token.
        tbptt_steps: gradients reach back over this many segments, through memories and trained weights.
        ttt_module_paths: dotted paths of the net's modules, or pairs of them: the gradient of the first updates the second.
        ttt_lr, ttt_wd: step size and weight decay of each update.
        ttt_use_muon, ttt_muon_steps, ttt_muon_lr: update matrices by orthogonalized gradients, with a separate step size.
        ttt_low_rank_paths: pairs (path, rank): only a low-rank part of this linear map is trained, which is added to it, or
            replaces it with ``ttt_low_rank_replaces``, as in 2.31.10.
        ttt_custom_loss_module: (intermediates, mask) -> losses per token or per sample, in place of the next token's.
        ttt_next_latent_loss: use the loss of predicting the next hidden state.
        episodic_mem_len: the number of learned keys and values for each self attention; their path is ``episodic_mems``.
        weight_by_valid: weight each segment by its number of counted targets, which gives the mean over all of them; the
            default weights by segment length, as the original does.
        allow_future: also train a net whose tokens attend to later tokens, such as an ``Encoder``.

    Raises:
        ValueError: parameters out of range, or paths that the net does not have.
    """

    def __init__(
        self,
        net: nn.Module,
        ignore_index: int = -100,
        pad_value: int = 0,
        tbptt_steps: int = 1,
        ttt_module_paths: Sequence[Path] = (),
        ttt_lr: float = 1e-3,
        ttt_wd: float = 0.01,
        ttt_use_muon: bool = False,
        ttt_muon_steps: int = 5,
        ttt_muon_lr: float = 1e-2,
        ttt_low_rank_paths: Sequence[tuple[str, int]] = (),
        ttt_custom_loss_module: nn.Module | None = None,
        ttt_next_latent_loss: bool = False,
        episodic_mem_len: int = 0,
        *,
        ttt_low_rank_replaces: bool = False,
        weight_by_valid: bool = False,
        allow_future: bool = False,
    ) -> None:
        super().__init__()
        check_net(net, 'XLAutoregressiveWrapper')
        max_seq_len = getattr(net, 'max_seq_len', 0)
        options(XLOptions, 'XLAutoregressiveWrapper', locals())
        paths = [*ttt_module_paths, *(path for path, _ in ttt_low_rank_paths)]
        check_parameters(
            'XLAutoregressiveWrapper',
            bool(paths) and tbptt_steps < 2 and f'tbptt_steps must be at least 2 with test-time training, got {tbptt_steps}.',
            ttt_custom_loss_module is not None and ttt_next_latent_loss
            and 'ttt_custom_loss_module and ttt_next_latent_loss both say what is trained on. Give one of them.',
            not paths and (ttt_next_latent_loss or ttt_custom_loss_module is not None or ttt_use_muon)
            and 'ttt_module_paths or ttt_low_rank_paths must name what is trained on the way.',
        )  # fmt: skip
        self.pad_value = pad_value
        self.ignore_index = ignore_index
        self.net: Any = EpisodicNet(net, episodic_mem_len) if episodic_mem_len else net
        self.max_seq_len = max_seq_len
        self.allow_future = allow_future
        self.weight_by_valid = weight_by_valid
        self.tbptt_steps = tbptt_steps
        # all are looked up before the first is wrapped, so that a net is whole after an error
        for path, rank in ttt_low_rank_paths:
            check_low_rank(self.net, path, rank)
        for part in chain.from_iterable(map(pair_of, ttt_module_paths)):
            module_at(self.net, part)
        check_apart(chain.from_iterable(map(pair_of, paths)))
        for path, rank in ttt_low_rank_paths:
            make_low_rank(self.net, path, rank, ttt_low_rank_replaces)
        self.ttt = self._training_on_the_way(paths, ttt_lr, ttt_wd, ttt_muon_steps if ttt_use_muon else None, ttt_muon_lr)
        self.ttt_custom_loss_module: nn.Module | None = ttt_custom_loss_module
        if ttt_next_latent_loss:
            self.ttt_custom_loss_module = TTTNextLatentPredictionLoss(net.dim)  # type: ignore[arg-type]

    def _training_on_the_way(
        self, paths: Sequence[Path], lr: float, weight_decay: float, muon_steps: int | None, muon_lr: float
    ) -> TestTimeTraining | None:
        if not paths:
            return None
        pairs = [(make_fast(self.net, source), make_fast(self.net, target)) for source, target in map(pair_of, paths)]
        return TestTimeTraining(pairs, lr=lr, weight_decay=weight_decay, muon_steps=muon_steps, muon_lr=muon_lr)

    # ------------------------------------------------------------ training

    def forward(
        self,
        x: Int[Tensor, 'b n'],
        mems: Mems | None = None,
        dropout_mems: bool = False,
        ttt_recurrent_steps: int = 1,
        **kwargs: Any,
    ) -> Float[Tensor, '']:
        """The mean loss of predicting ``x[:, 1:]``, segment by segment.

        Args:
            mems: initial memories.
            dropout_mems: ignore the memories.
            ttt_recurrent_steps: with test-time training, how often each segment is read, with an update between; the last
                reading counts.
        """
        keywords = {'dropout_mems': dropout_mems, 'ttt_recurrent_steps': ttt_recurrent_steps}
        options(XLForwardOptions, 'XLAutoregressiveWrapper', keywords)
        x = token_ids(x)
        check_future(self.net, kwargs, 'XLAutoregressiveWrapper', allowed=self.allow_future)
        if x.ndim != 2 or x.shape[1] < 2:
            raise ValueError(f'x must be token ids (batch, at least two tokens), got shape {tuple(x.shape)}')
        if ttt_recurrent_steps > 1 and self.ttt is None:
            raise ValueError(
                f'ttt_recurrent_steps must be 1, or more with test-time training, got {ttt_recurrent_steps}. '
                'Give ttt_module_paths in the constructor.'
            )
        inputs, labels = x[:, :-1], x[:, 1:]
        if not 0 <= self.ignore_index < getattr(self.net, 'num_tokens', 0):
            # an ignored index that is a token of the vocabulary is read as that token
            inputs = inputs.masked_fill(inputs == self.ignore_index, self.pad_value)
        with self._fast_weights(x.shape[0], attached=torch.is_grad_enabled()):
            loss = self._loss(inputs, labels, mems, dropout_mems, ttt_recurrent_steps, kwargs)
        return loss if torch.is_grad_enabled() else loss.detach()

    @contextmanager
    def _fast_weights(self, batch: int, attached: bool) -> Iterator[None]:
        """With test-time training: weights per sample, and gradients, whether the caller wants them or not."""
        if self.ttt is None:
            yield
            return
        with torch.enable_grad(), self.ttt.of(batch, attached):
            yield

    def _loss(
        self,
        inputs: Int[Tensor, 'b n'],
        labels: Int[Tensor, 'b n'],
        mems: Mems | None,
        dropout_mems: bool,
        recurrent_steps: int,
        kwargs: Mapping[str, Any],
    ) -> Float[Tensor, '']:
        length = labels.shape[1]
        counts = (labels != self.ignore_index).sum() if self.weight_by_valid else length
        losses = []
        for nth, start in enumerate(range(0, length, self.max_seq_len), start=1):
            segment = slice(start, start + self.max_seq_len)
            wanted = labels[:, segment]
            updates = recurrent_steps - (segment.stop >= length)
            logits, mems = self._segment(
                inputs[:, segment], wanted, None if dropout_mems else mems, recurrent_steps, updates, kwargs
            )
            summed = token_cross_entropy(
                logits, wanted, ignore_index=self.ignore_index, is_log_prob=self._is_log_prob, reduction='sum'
            )
            valid = (wanted != self.ignore_index).sum()
            # a segment without a single valid target adds nothing
            share = summed if self.weight_by_valid else summed / valid.clamp(min=1) * wanted.shape[1]
            losses.append(share / counts)
            if nth % self.tbptt_steps == 0:
                mems = None if mems is None else [mem.detach() for mem in mems]
                if self.ttt is not None:
                    self.ttt.detach()
        return torch.stack(losses).sum()

    @property
    def _is_log_prob(self) -> bool:
        return bool(getattr(self.net, 'output_is_log_prob', False))

    def _segment(
        self,
        part: Int[Tensor, 'b n'],
        wanted: Int[Tensor, 'b n'],
        mems: Mems | None,
        readings: int,
        updates: int,
        kwargs: Mapping[str, Any],
    ) -> tuple[Float[Tensor, 'b n v'], Mems | None]:
        """(logits, memories) of the last of several readings; the first ``updates`` ones move the fast weights."""
        logits, intermediates, following = self._read(part, mems, kwargs)
        for nth in range(1, readings + 1):
            if nth > 1:
                logits, intermediates, following = self._read(part, mems, kwargs)
            if self.ttt is not None and nth <= updates:
                self._adapt(logits, intermediates, wanted, keep_graph=nth == readings)
        return logits, following

    def _read(self, part: Int[Tensor, 'b n'], mems: Mems | None, kwargs: Mapping[str, Any]) -> tuple[Tensor, Any, Mems | None]:
        """(logits, intermediates if test-time training needs them, memories)."""
        attached = self.tbptt_steps > 1 and torch.is_grad_enabled()
        keywords = {**kwargs, **({'detach_mems': False} if attached else {})}
        if self.ttt_custom_loss_module is None:
            logits, following = self.net(part, mems=mems, return_mems=True, **keywords)
            return logits, None, following
        logits, intermediates = self.net(part, mems=mems, return_mems=True, return_intermediates=True, **keywords)
        return logits, intermediates, intermediates.mems

    def _adapt(self, logits: Float[Tensor, 'b n v'], intermediates: Any, wanted: Int[Tensor, 'b n'], keep_graph: bool) -> None:
        """One update of the fast weights by what this segment says."""
        ttt: Any = self.ttt
        counts = wanted != self.ignore_index
        if self.ttt_custom_loss_module is None:
            losses = token_cross_entropy(
                logits, wanted, ignore_index=self.ignore_index, is_log_prob=self._is_log_prob, reduction='none'
            )
        else:
            losses = self.ttt_custom_loss_module(intermediates, mask=counts)
        ttt.update(sample_losses(losses, counts), second_order=self.training, keep_graph=keep_graph)

    # ------------------------------------------------------------ generation

    @torch.no_grad()
    def generate(
        self,
        start_tokens: Prompts,
        seq_len: int,
        eos_token: int | None = None,
        temperature: float = 1.0,
        filter_logits_fn: str | Filter = top_k,
        filter_kwargs: Mapping[str, Any] | None = None,
        mems: Mems | None = None,
        *,
        include_prompt: bool = False,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Int[Tensor, '... s']:
        """Sample ``seq_len`` tokens after prompts (..., t); the new tokens only, padded after the first ``eos_token``.

        Each token is predicted from the memories of the complete segments and the tokens since then; segments are counted
        from the start of the prompt, on which test-time training works. Other arguments as in
        ``AutoregressiveWrapper.generate``.
        """
        options(WritingOptions, 'generate', locals())
        check_reserved(kwargs)
        warn_of_end(self.net, eos_token)
        steps, eos = checked_length(seq_len), checked_eos(eos_token)
        prompt = prepare_prompts(start_tokens, None, self.pad_value)
        if prompt.start is not None:
            raise ValueError('start_tokens must have one length: rows share their segments. Generate from them one by one.')
        sampler = Sampler(temperature, resolve_filter(filter_logits_fn), filter_kwargs or {}, generator)
        tokens = Tokens(prompt.tokens, steps)
        with evaluating(self), self._fast_weights(tokens.batch, attached=False):
            mems, first = self._prompt(prompt.tokens, mems, kwargs)
            reader = SegmentReader(self.net, self.max_seq_len, mems, kwargs, first)
            for _ in decode(reader, tokens, steps, sampler, eos=eos, pad=self.pad_value):
                pass
        return prompt.unpack(tokens.value if include_prompt else tokens.part(prompt.tokens.shape[1]))

    def _prompt(self, tokens: Int[Tensor, 'b n'], mems: Mems | None, kwargs: Mapping[str, Any]) -> tuple[Mems | None, int]:
        """Train the fast weights on the prompt: (memories of its complete segments, the token behind them)."""
        if self.ttt is None:
            return mems, 0
        inputs, labels, first = tokens[:, :-1], tokens[:, 1:], 0
        for start in range(0, inputs.shape[1], self.max_seq_len):
            segment = slice(start, start + self.max_seq_len)
            _, following = self._segment(inputs[:, segment], labels[:, segment], mems, 1, 1, kwargs)
            self.ttt.detach()
            if segment.stop <= inputs.shape[1]:
                mems, first = None if following is None else [mem.detach() for mem in following], segment.stop
        return mems, first
