"""Sequences of vectors: a transformer from vectors to vectors, with training and generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from x_transformers.cache.kv_cache import Cache
from x_transformers.embedding.build import build_entrance, build_positions, build_stack, stack_flags
from x_transformers.embedding.call import Memories, ModelArgs, call_of, check_frames, check_projected, last_positions
from x_transformers.embedding.memory_tokens import MemoryTokens
from x_transformers.embedding.rows import Rows
from x_transformers.flags.calls import FramesForwardOptions, FramesOptions, RolloutOptions
from x_transformers.flags.constructors import only
from x_transformers.flags.fit import check_future, check_net
from x_transformers.flags.objectives import ContinuousOptions, options
from x_transformers.flags.other_inputs import ContinuousFlags
from x_transformers.flags.rules import check_wrapper
from x_transformers.flags.signature import ClassSignature
from x_transformers.generation.decode import Reader, Tokens, decode, reader_for
from x_transformers.generation.keywords import NetKeywords
from x_transformers.generation.modes import evaluating
from x_transformers.generation.prompts import Lengths, Prompt, align_right, check_reserved, checked_length, right_aligned
from x_transformers.generation.sampling import check_temperature, sample_from_mean_variance
from x_transformers.generation.views import VectorView
from x_transformers.layers.checks import is_float, shape_of
from x_transformers.losses import at_least_single, shifted_mask
from x_transformers.module import Module
from x_transformers.returns import ReturnSpec
from x_transformers.stack_wrapper import Ends, StackWrapper
from x_transformers.tensor_types import Bool, Float, Int, Shaped

if TYPE_CHECKING:
    from typing import Unpack

    from x_transformers.flags.keywords import ContinuousKeywords

__all__ = [
    'ContinuousAutoregressiveWrapper',
    'ContinuousTransformerWrapper',
    'GaussianNLL',
    'masked_mean',
    'sample_from_mean_variance',
]

# arguments that say something of single frames, which a rollout moves to the right
OF_FRAMES = ('pos', 'sum_embeds', 'attn_mask', 'attn_bias', 'self_attn_kv_mask')


def masked_mean(t: Float[Tensor, 'b n ...'], mask: Bool[Tensor, 'b n'] | None = None) -> Float[Tensor, '']:
    """Mean over all entries at the positions that the mask names; NaN if it names none."""
    if mask is None:
        return t.mean()
    mask = mask.reshape(*mask.shape, *(1,) * (t.ndim - mask.ndim)).expand(t.shape)
    return t.masked_fill(~mask, 0.0).sum() / mask.sum()


class GaussianNLL(Module):
    """Negative log likelihood of each entry under (mean, variance), without the constant; unreduced."""

    def forward(self, pred: Float[Tensor, '2 ...'], target: Float[Tensor, '...']) -> Float[Tensor, '...']:
        mean, variance = pred
        variance = variance.clamp(min=1e-6)
        loss: Tensor = 0.5 * (variance.log() + (mean - target).square() / variance)
        return loss


class ContinuousTransformerWrapper(StackWrapper):
    """A stack of attention layers from vectors (b n dim_in) to vectors (b n dim_out).

    Inputs are projected to ``emb_dim``, where positions are added, and then to the stack's width. The keywords are the fields
    of ``ContinuousFlags``: ``attn_layers`` must be given.

    Raises:
        FlagError: names every keyword that is unknown, has a wrong value, or conflicts with another or with the stack.
    """

    __signature__: Any = ClassSignature(only(ContinuousFlags))

    def __init__(self, *, attn_layers: nn.Module, max_seq_len: int | None = None, **flags: Unpack[ContinuousKeywords]) -> None:
        super().__init__(Ends(embed_frames, read_frames))
        keywords = {'attn_layers': attn_layers, 'max_seq_len': max_seq_len, **flags}
        own = ContinuousFlags.parse(keywords, where='ContinuousTransformerWrapper')
        check_wrapper(own, stack_flags(attn_layers), where=type(self).__name__)
        # kept for reading; the modules live in their slots only
        self.flags = replace(own, attn_layers=nn.Identity(), project_in=None, project_out=None)
        build_positions(self, own, attn_layers)
        self.probabilistic = own.probabilistic
        self.dim_in, self.dim_out = own.dim_in, own.dim_out
        self.width_in = None if own.project_in is not None else own.dim_in or self.emb_dim
        self.reads = None if self.width_in is None else 'vectors'
        skips = own.use_identity_if_same_dim
        projects_in = own.dim_in is not None and not (skips and own.dim_in == self.emb_dim)
        self.project_in: nn.Module = own.project_in or (
            nn.Linear(own.dim_in, self.emb_dim, bias=False) if projects_in else nn.Identity()  # type: ignore[arg-type]
        )
        build_entrance(self, own, attn_layers)
        width = (own.dim_out or 0) * (2 if own.probabilistic else 1)
        projects_out = width > 0 and not (skips and width == self.dim)
        self.project_out: nn.Module = own.project_out or (
            nn.Linear(self.dim, width, bias=False) if projects_out else nn.Identity()
        )
        build_stack(self, own, attn_layers)
        self.init_own()

    def forward(
        self,
        x: Shaped[Tensor, 'b n ...'],
        return_embeddings: bool = False,
        return_intermediates: bool | Literal['cache'] = False,
        return_mems: bool = False,
        mask: Bool[Tensor, 'b n'] | None = None,
        lens: Int[Tensor, ' b'] | None = None,
        return_attn: bool = False,
        mems: Memories | None = None,
        mem_masks: Sequence[Bool[Tensor, 'b l']] | None = None,
        pos: Int[Tensor, '... n'] | Float[Tensor, '... n e'] | None = None,
        sum_embeds: Float[Tensor, 'b n e'] | None = None,
        prepend_embeds: Float[Tensor, 'b p e'] | None = None,
        prepend_mask: Bool[Tensor, 'b p'] | None = None,
        cache: Cache = None,
        input_not_include_cache: bool = False,
        seq_start_pos: Int[Tensor, ' b'] | None = None,
        *,
        logits_last: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Outputs (b n dim_out), or (2 b n dim_out) with ``probabilistic``: means and variances; or what ``return_*`` select.

        Args:
            mask: True for frames, False for padding; or ``lens``, the number of frames of each row.
            mems, mem_masks: memories of the last segment, one per self attention (https://arxiv.org/abs/1901.02860).
            pos: positions of the frames, (n,) or (b n); with a floating dtype, the position embeddings themselves.
            sum_embeds: embeddings to be added; ``prepend_embeds``, ``prepend_mask``: embeddings in front of the frames; outputs
                for them are returned as well.
            cache: a ``KVCache``, or the intermediates of an earlier call. Then ``x`` may be the new frames only, or the whole
                sequence, of which the model reads the new part; ``input_not_include_cache=True``: all of ``x`` is new.
            seq_start_pos: where each row's frames begin, for rows that are padded on the left.
            logits_last: return outputs for the last so many positions only.
            kwargs: passed to the stack: ``context``, ``context_mask``, ``attn_mask``, ``condition``, ...

        Returns:
            outputs or embeddings (b n d); then, wrapped around it: intermediates, memories, attention maps.
        """
        if self.width_in is not None:
            check_frames(x, self.width_in)
        elif not isinstance(x, Tensor) or x.ndim < 2:
            raise TypeError(f'x must be a tensor (batch, sequence, ...) that project_in reads, got {shape_of(x)}.')
        if lens is not None and mask is not None:
            raise ValueError('lens and mask must not both be given: both select frames. Leave out one of them.')
        lens = None if lens is None else torch.as_tensor(lens, device=x.device)
        keywords = {
            'return_embeddings': return_embeddings, 'return_intermediates': return_intermediates, 'return_mems': return_mems,
            'mask': mask, 'lens': lens, 'return_attn': return_attn, 'mems': mems, 'mem_masks': mem_masks, 'pos': pos,
            'sum_embeds': sum_embeds, 'prepend_embeds': prepend_embeds, 'prepend_mask': prepend_mask, 'cache': cache,
            'input_not_include_cache': input_not_include_cache, 'seq_start_pos': seq_start_pos, 'logits_last': logits_last,
            'kwargs': kwargs,
        }  # fmt: skip
        return self.run(call_of(self, x, keywords), ReturnSpec.of(keywords))


def embed_frames(
    model: ContinuousTransformerWrapper, x: Shaped[Tensor, 'b n ...'], call: ModelArgs, rows: Rows
) -> Float[Tensor, 'b n e']:
    # as everything that a caller adds, frames of another precision are read in that of the model
    matrix = getattr(model.project_in, 'weight', None)
    if matrix is not None and matrix.is_floating_point() and x.is_floating_point():
        x = x.to(matrix.dtype)
    vectors: Tensor = model.project_in(x)
    if model.width_in is None:
        check_projected('project_in', vectors, x, model.emb_dim)
    return vectors


def read_frames(
    model: ContinuousTransformerWrapper, h: Float[Tensor, 'b ... d'], call: ModelArgs, whole: bool
) -> tuple[Float[Tensor, '... o'], Float[Tensor, 'b ... d']]:
    out: Tensor = model.project_out(last_positions(h, call.logits_last))
    if not model.probabilistic:
        return out, h
    if out.shape[-1] % 2:
        raise ValueError(
            f'project_out of a probabilistic model must give a mean and a variance for each channel, got {out.shape[-1]} in '
            'the last axis. Make it even.'
        )
    # means and variances take turns along the channels
    mean, log_variance = out.unflatten(-1, (-1, 2)).unbind(dim=-1)
    return torch.stack((mean, log_variance.exp())), h


class ContinuousAutoregressiveWrapper(Module):
    """Trains a net to predict the next vector and generates with it.

    Args:
        net: a ``ContinuousTransformerWrapper`` around a ``Decoder``, whose outputs are as wide as its inputs.
        loss_fn: from (prediction, target) to unreduced losses; by default the Gaussian likelihood for ``probabilistic`` nets
            and the squared error for others.
        use_l1_loss: use the absolute error instead.
        equal_loss_weight_batch: weight all rows equally, whatever their length. The loss of a row is the sum over channels,
            averaged over positions.
        mask_by_target: count a position if the frame that it predicts is not padding. By default, as upstream, the input at
            that position decides, so the first frame of the padding is predicted too.
        allow_future: also train a net whose frames attend to later frames, such as an ``Encoder``.
    """

    def __init__(
        self,
        net: nn.Module,
        loss_fn: nn.Module | None = None,
        use_l1_loss: bool = False,
        equal_loss_weight_batch: bool = False,
        *,
        mask_by_target: bool = False,
        allow_future: bool = False,
    ) -> None:
        super().__init__()
        probabilistic = bool(getattr(net, 'probabilistic', False))
        options(ContinuousOptions, 'ContinuousAutoregressiveWrapper', locals())
        check_net(net, 'ContinuousAutoregressiveWrapper', of_tokens=False)
        self.probabilistic = probabilistic
        self.allow_future = allow_future
        self.net = net
        self.max_seq_len = getattr(net, 'max_seq_len', 0)
        usual: nn.Module = nn.L1Loss(reduction='none') if use_l1_loss else nn.MSELoss(reduction='none')
        self.loss_fn: nn.Module = loss_fn or (GaussianNLL() if self.probabilistic else usual)
        self.equal_loss_weight_batch = equal_loss_weight_batch
        self.mask_by_target = mask_by_target

    # ------------------------------------------------------------ training

    def forward(self, x: Float[Tensor, 'b n d'], rollout_steps: int = 1, **kwargs: Any) -> Float[Tensor, '']:
        """The mean loss of predicting ``x[:, 1:]``.

        Args:
            rollout_steps: with more than one, the net continues from its own predictions: ``forward_rollout``.
            kwargs: for the net; ``mask`` (b n) or (b n-1), or ``lens`` (b), select the frames that count.
        """
        options(FramesForwardOptions, 'ContinuousAutoregressiveWrapper', {'rollout_steps': rollout_steps})
        if rollout_steps != 1:
            return self.forward_rollout(x, rollout_steps, **kwargs)
        self._check_frames(x, kwargs, 2)
        check_future(self.net, kwargs, 'ContinuousAutoregressiveWrapper', allowed=self.allow_future)
        inputs, targets = shifted_mask(self._whole_mask(x, kwargs), x.shape[1])
        if inputs is not None and targets is None and self.mask_by_target:
            raise ValueError(f'mask must cover all {x.shape[1]} frames with mask_by_target=True, including the last target.')
        predicted = self.net(x[:, :-1], mask=inputs, **kwargs)
        if not isinstance(predicted, Tensor):
            raise TypeError(f'the net must return its outputs alone, got {type(predicted).__name__}. Leave out return_*.')
        return self._reduced(self.loss_fn(at_least_single(predicted), x[:, 1:]), targets if self.mask_by_target else inputs)

    def _reduced(self, loss: Float[Tensor, 'b n ...'], counts: Bool[Tensor, 'b n'] | None) -> Float[Tensor, '']:
        if loss.ndim == 0:
            if counts is not None or self.equal_loss_weight_batch:
                raise ValueError("loss_fn must return unreduced losses (reduction='none') where frames weigh differently")
            return loss
        if not self.equal_loss_weight_batch:
            return masked_mean(loss, counts)
        each = loss if loss.ndim == 2 else loss.flatten(2).sum(dim=-1)
        if counts is None:
            return each.mean()
        return (each.masked_fill(~counts, 0.0).sum(dim=1) / counts.sum(dim=1).clamp(min=1)).mean()

    def _check_frames(self, x: Float[Tensor, 'b n d'], kwargs: dict[str, Any], least: int) -> None:
        check_frames(x, getattr(self.net, 'width_in', None))
        if x.shape[1] < least:
            raise ValueError(f'x must hold at least {least} frames per row, to read and to predict; got {x.shape[1]}')
        if kwargs.get('prepend_embeds') is not None:
            raise ValueError('prepend_embeds must be None in training: their outputs have no target. Leave them out.')

    def _whole_mask(self, x: Float[Tensor, 'b n d'], kwargs: dict[str, Any]) -> Bool[Tensor, 'b m'] | None:
        """Takes ``mask`` or ``lens`` out of the net's keywords."""
        mask: Tensor | None = kwargs.pop('mask', None)
        lens = kwargs.pop('lens', None)
        if lens is None:
            return mask
        if mask is not None:
            raise ValueError('lens and mask must not both be given: both select frames. Leave out one of them.')
        lens = torch.as_tensor(lens, device=x.device)
        if lens.shape != x.shape[:1]:
            raise ValueError(f'lens must have one entry for each of the {x.shape[0]} rows, got shape {tuple(lens.shape)}')
        return Rows(new=x.shape[1], memory=MemoryTokens()).before(lens)

    # ------------------------------------------------------------ training on its own predictions

    def forward_rollout(self, x: Float[Tensor, 'b n d'], rollout_steps: int = 2, **kwargs: Any) -> Float[Tensor, '']:
        """The mean loss of ``rollout_steps`` predictions, each of which is fed back (https://ai.meta.com/vjepa/).

        In every row with more than that many frames, the net reads a context of random length, at least one frame. Then it
        predicts frame after frame, attending to all earlier ones. Gradients flow through its own predictions. Shorter rows do
        not count; if all are shorter, the loss is 0.
        """
        options(RolloutOptions, 'forward_rollout', {'rollout_steps': rollout_steps})
        self._check_frames(x, kwargs, rollout_steps + 1)
        check_future(self.net, kwargs, 'ContinuousAutoregressiveWrapper', allowed=self.allow_future)
        if moved := [name for name in OF_FRAMES if kwargs.get(name) is not None]:
            raise ValueError(
                f'{", ".join(moved)} must be None in a rollout, which moves frames. Leave out arguments per frame.'
            )
        lens = self._lengths(x, kwargs)
        enough = lens > rollout_steps
        x = x.masked_fill(~enough[:, None, None], 0.0)
        context = self._context_lengths(lens - rollout_steps)
        most = int(context.max())
        pads = most - context
        frames = Tokens(align_right(x[:, :most], context), 0)
        widest = int(pads.max())
        reader = Reader(
            self._view(),  # type: ignore[arg-type]
            window=False,
            start=pads if widest else None,
            most_pads=widest,
            keywords=NetKeywords(kwargs, most, most + rollout_steps - 1),
        )
        outputs: list[Tensor] = []
        for step in range(rollout_steps):
            if step:
                frames.append(self._frame(outputs[-1]))
            outputs.append(reader.read(frames)[:, -1])
        place = context[:, None] + torch.arange(rollout_steps, device=x.device)
        target = x[torch.arange(x.shape[0], device=x.device)[:, None], place.clamp(max=x.shape[1] - 1)]
        return self._rollout_loss(self._parts(torch.stack(outputs, dim=1)), target, enough)

    def _lengths(self, x: Float[Tensor, 'b n d'], kwargs: dict[str, Any]) -> Int[Tensor, ' b']:
        mask = self._whole_mask(x, kwargs)
        if mask is None:
            return torch.full(x.shape[:1], x.shape[1], device=x.device)
        shifted_mask(mask, x.shape[1])
        lens = mask.sum(dim=-1)
        if bool((mask != (torch.arange(mask.shape[1], device=x.device) < lens[:, None])).any()):
            raise ValueError('mask must have padding on the right only in a rollout, got gaps or padding on the left.')
        return lens

    def _context_lengths(self, most: Int[Tensor, ' b']) -> Int[Tensor, ' b']:
        """Uniform in 1 … most; 1 where there is no room."""
        most = most.clamp(min=1)
        drawn = (torch.rand(most.shape, device=most.device) * most).long()
        return torch.minimum(drawn, most - 1) + 1

    def _rollout_loss(
        self, predicted: Float[Tensor, '... b n d'], target: Float[Tensor, 'b n d'], enough: Bool[Tensor, ' b']
    ) -> Float[Tensor, '']:
        loss: Tensor = self.loss_fn(at_least_single(predicted), target)
        if loss.ndim == 0:
            if bool(enough.all()):
                return loss
            raise ValueError("loss_fn must return unreduced losses (reduction='none') where rows differ in length")
        each = loss.flatten(1).mean(dim=1)
        return each.masked_fill(~enough, 0.0).sum() / enough.sum().clamp(min=1)

    # ------------------------------------------------------------ generation

    def generate(
        self,
        start_tokens: Float[Tensor, 'b t d'] | Float[Tensor, 't d'],
        seq_len: int,
        temperature: float = 1.0,
        cache_kv: bool = True,
        *,
        prompt_lens: Lengths | None = None,
        include_prompt: bool = False,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Float[Tensor, 'b s d'] | Float[Tensor, 's d']:
        """``seq_len`` frames after each prompt; only these, unless ``include_prompt``.

        Args:
            start_tokens: the prompts (b t d), or one (t d).
            temperature: factor on the standard deviation of ``probabilistic`` nets; 0 takes the mean.
            cache_kv: cache keys and values, if the net supports it.
            prompt_lens: the true lengths of prompts that are padded on the right.
            include_prompt: return the prompt, right-aligned, before the new frames.
            generator: makes sampling reproducible.
            kwargs: for the net, such as ``context``; a ``mask`` over the prompt is extended as the sequence grows.

        Raises ValueError (GenerateError where the cache does not reach far enough) before anything is computed.
        """
        probabilistic = self.probabilistic
        options(FramesOptions, 'generate', locals())
        check_reserved(kwargs)
        check_temperature(temperature)
        steps, prompt = checked_length(seq_len), self._prompt(start_tokens, prompt_lens)
        if kwargs.get('lens') is not None:
            raise ValueError('lens must be None in generation: it would count generated frames. Pass prompt_lens.')
        tokens = Tokens(prompt.tokens, steps)
        reader = reader_for(
            self._view(),  # type: ignore[arg-type]
            kwargs,
            prompt=prompt,
            steps=steps,
            cache=cache_kv,
            window=True,
        )
        start = tokens.length
        if steps:
            reader.check_length(start + steps - 1)
        with evaluating(self):
            for _ in decode(reader, tokens, steps, lambda said: self._frame(said, temperature, generator)):
                pass
        return prompt.unpack(tokens.part(0 if include_prompt else start))

    def _prompt(self, start: Float[Tensor, '... t d'], lens: Lengths | None) -> Prompt:
        net: Any = self.net
        wide_in, wide_out = getattr(net, 'width_in', None), getattr(net, 'dim_out', None)
        if wide_in is not None and wide_out is not None and wide_in != wide_out:
            raise ValueError(f'net must have outputs as wide as its inputs for generation, got {wide_out} and {wide_in}.')
        if not is_float(start, 2, 3):
            raise (ValueError if isinstance(start, Tensor) else TypeError)(
                f'start_tokens must be frames (n d) or (b n d) of floating dtype, got {shape_of(start)}'
            )
        batch = start.detach()[None] if start.ndim == 2 else start.detach()
        check_frames(batch, wide_in)
        return right_aligned(batch, tuple(start.shape[:-2]), lens, 0.0)

    def _view(self) -> VectorView:
        """The net, its means and variances side by side."""
        return VectorView(self.net, lambda out: torch.cat(tuple(out), dim=-1) if self.probabilistic else out)

    def _parts(self, output: Float[Tensor, '... c']) -> Tensor:
        """Means and variances as the net returns them."""
        return torch.stack(output.chunk(2, dim=-1)) if self.probabilistic else output

    def _frame(
        self, output: Float[Tensor, 'b c'], temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Float[Tensor, 'b d']:
        """The next frame."""
        if not self.probabilistic:
            return output
        mean, variance = output.chunk(2, dim=-1)
        return mean if temperature == 0 else sample_from_mean_variance(mean, variance, 1e-5, temperature, generator)
