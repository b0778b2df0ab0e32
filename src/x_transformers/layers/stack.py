"""The stack of layers: self attention, cross attention and feed-forwards around a residual stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from x_transformers.attention.inputs import Intermediates
from x_transformers.cache.intermediates import LayerIntermediates
from x_transformers.cache.kv_cache import Cache
from x_transformers.flags.constructors import STACK
from x_transformers.flags.per_layer import Each, per_layer
from x_transformers.flags.rules import check_stack
from x_transformers.flags.signature import ClassSignature, with_arguments
from x_transformers.flags.stack import StackFlags
from x_transformers.helpers import Identity, softclamp
from x_transformers.layers.across_depth import between
from x_transformers.layers.arguments import StackArgs, argument_sentences
from x_transformers.layers.assemble import attributes, choose_streams, depth_parts, position_parts, warn_of_leaks
from x_transformers.layers.call import Around, Carry, Inputs, Record
from x_transformers.layers.choose import make_layer, make_norm
from x_transformers.layers.decided import keywords_of_flags, with_own
from x_transformers.layers.drop import is_dropped
from x_transformers.layers.layer import Layer
from x_transformers.layers.optimizing import OptimizedStack
from x_transformers.layers.plan import LayerPlan, Step, exchanged_plan, plan_layers
from x_transformers.layers.prepare import prepare
from x_transformers.layers.slots import call_norm, can_cache
from x_transformers.module import empty_parameter, is_sharded
from x_transformers.norms import rms_norm
from x_transformers.tensor_types import Bool, Float, Int

if TYPE_CHECKING:
    from typing import Unpack

    from x_transformers.flags.keywords import BlockKeywords, CrossAttenderKeywords, EncoderKeywords, StackKeywords


class AttentionLayers(OptimizedStack):
    """A transformer without embedding and head: (b n dim) -> (b n dim).

    ``AttentionLayers(dim, depth, heads, causal, **flags)``; the flags are those of ``StackFlags``. Flags of the parts have the
    prefix ``attn_``, ``cross_attn_`` or ``ff_``. ``self.flags`` holds the flags, ``self.plan`` the order of layers.

    Raises FlagError if flags exclude each other, UnknownFlag for an unknown flag.
    """

    # left to right but for a prefix, though ``causal`` is False
    has_prefix = False
    # the flags that a subclass sets by itself
    decides: ClassVar[Mapping[str, bool]] = {}

    __signature__: Any = ClassSignature(STACK)

    def __init__(
        self, dim: int, depth: int | None = None, heads: Each[int] = 8, causal: bool = False, **flags: Unpack[StackKeywords]
    ) -> None:
        super().__init__()
        parsed = StackFlags.parse(
            {'dim': dim, 'depth': depth, 'heads': heads, 'causal': causal, **flags}, where=type(self).__name__
        )
        check_stack(parsed, type(self).__name__)
        # values per layer as they are, not the function that they came from
        values = {name: per_layer(value) for name, value in parsed.varying.items()}
        args, keywords = self.made_with
        self.made_with = args, {name: values.get(name, value) for name, value in keywords.items()}
        self._build(parsed, plan_layers(parsed))
        self.init_own()

    @classmethod
    def from_flags(cls, flags: StackFlags) -> Self:
        """A stack as from these keywords; modules among them are the same. FlagError for what the class sets otherwise."""
        return cls(**keywords_of_flags(cls, flags))

    # ------------------------------------------------------------ building

    def _build(self, flags: StackFlags, plan: LayerPlan) -> None:
        self.flags, self._plan = flags, plan
        self.dim, self.causal, self.is_causal = flags.dim, flags.causal, flags.causal or self.has_prefix
        self.layer_types, self.layers_execute_order = plan.kinds, plan.order
        self.streams = choose_streams(flags)
        for name, value in attributes(flags, plan).items():
            setattr(self, name, value)
        self.layers = nn.ModuleList(make_layer(flags, spec, self.is_causal) for spec in plan.layers)
        self.final_norm = make_norm(flags) if flags.has_final_norm else Identity()
        self.stream_emb = empty_parameter(flags.streams, flags.dim) if flags.streams > 1 else None
        warn_of_leaks(flags, self.is_causal)
        # what reaches over several layers, then positions
        for name, part in (depth_parts(flags, plan) | position_parts(flags)).items():
            setattr(self, name, part)

    def init_own(self) -> None:
        if self.stream_emb is not None:
            nn.init.zeros_(self.stream_emb)

    @property
    def plan(self) -> LayerPlan:
        """The order of layers: as built, or as ``layers``, ``layer_types`` and ``layers_execute_order`` say now."""
        plan = self._plan
        kinds, order = tuple(self.layer_types), tuple(self.layers_execute_order)
        if kinds == plan.kinds and order == plan.order and len(self.layers) == len(kinds):
            return plan
        return exchanged_plan(plan, kinds, order, len(self.layers), self.flags)

    @property
    def can_cache_kv(self) -> bool:
        """Whether decoding may go on from a cache, with the modules that are there now."""
        if (known := self.__dict__.get('can_cache_kv')) is not None:
            return bool(known)
        kinds = zip(self._layers(), self.layer_types, strict=False)
        return all(can_cache(layer.branch, kind, self.causal) for layer, kind in kinds)

    @can_cache_kv.setter
    def can_cache_kv(self, value: bool) -> None:
        self.__dict__['can_cache_kv'] = value

    # ------------------------------------------------------------ running

    def _layers(self) -> list[Any]:
        return [entry if type(entry) is Layer else Layer.of(entry) for entry in self.layers]

    def run(self, x: Float[Tensor, 'b n d'], call: Inputs) -> tuple[Float[Tensor, 'b n d'], Record]:
        """All steps on x. ``call`` comes from ``prepare``; what was asked for is in the record."""
        record = Record(wanted=call.return_attn, cache=call.cache)
        streams, carry = self.enter(x)
        return self.leave(self.walk(streams, call, carry, record), call, carry, record), record

    def carry(self) -> Carry:
        """For what the layers of one call hand on; nothing yet."""
        mixes, shares = self.layer_integrators is not None, self.plan.keys_from
        return Carry(self.hands_on_scores, self.add_value_residual, mixes, keys_from=shares)

    def enter(self, x: Float[Tensor, 'b n d']) -> tuple[Tensor, Carry]:
        """The streams that enter the first layer."""
        carry = self.carry()
        carry.first = None if self.lambdas is None else self.streams.beside(rms_norm(x))
        return self.streams.open(x, self.stream_emb), carry

    def walk(self, streams: Float[Tensor, '... n d'], call: Inputs, carry: Carry, record: Record) -> Tensor:
        """The streams behind the steps of ``call``, in front of which ``carry`` and ``record`` are."""
        condition = call.condition if self.norm_need_condition else None
        wide_condition = None if condition is None else self.streams.condition(condition)
        layers, maps_now = self._layers(), call.return_attn and is_sharded(self)
        joins = self.unet_skips or self.lambdas is not None
        enters = self.mudd is not None or call.return_attn or call.transform_block is not None
        for step in call.steps:
            if enters and step.block:
                streams = between(self.mudd, self._begin_block(step.block, streams, call, record), carry)
            if joins:
                streams = self._join(step, streams, carry)
            around = self._around(step, call, carry, streams, maps_now)
            written, report = layers[step.layer](streams, condition, wide_condition, around)
            if around.entered is not None:
                carry.enter(around.entered)
                record.enter(step, around.entered, call.injected)
            if around.drop is True:
                record.leave_out(step)
                continue
            streams = torch.where(around.drop, streams, written) if isinstance(around.drop, Tensor) else written
            if report is not None:
                carry.take(step, report)
            if record.wanted or (report is not None and report.expert_loss is not None):
                record.leave(step, report)
            # the next layer runs without these, unless somebody keeps them
            del around, written, report
        return streams

    def leave(self, streams: Float[Tensor, '... n d'], call: Inputs, carry: Carry, record: Record) -> Float[Tensor, 'b n d']:
        """What comes out behind the last layer."""
        condition = call.condition if self.norm_need_condition else None
        streams = between(self.mudd, streams, carry)
        if record.wanted:
            record.layer_hiddens.append(self.streams.last(streams))
        streams = streams if self.softclamp_value is None else softclamp(streams, self.softclamp_value)
        if call.cache is not None:
            call.cache.advance(call.span.new)
        out: Tensor = self.streams.close(streams, lambda t: call_norm(self.final_norm, t, condition))
        if record.wanted:
            record.block_hiddens.append(out)
        return out

    def _around(self, step: Step, call: Inputs, carry: Carry, streams: Float[Tensor, '... n d'], maps_now: bool) -> Around:
        training = self.training
        inputs = call.for_step(step, carry, self.cross_attn_tokens_dropout if training else 0.0)
        inputs.maps_now = maps_now
        return Around(
            inputs,
            injected=call.injected,
            mem_condition=None if inputs.mem is None else call.condition_of_memory(inputs.mem),
            mixture=None if self.layer_integrators is None else self._mixture(step),
            tokens=call.padding,
            before=carry.seen.copy() if carry.mixes else (),
            views=carry.views if step.kind == 'a' else None,
            shows=call.return_attn,
            # caches hold all layers
            drop=training and not call.continues and is_dropped(self.layer_dropouts[step.layer], streams.device),
            checkpoint=training and self.flags.gradient_checkpointing,
        )

    def _begin_block(self, block: int, streams: Float[Tensor, '... n d'], call: Inputs, record: Record) -> Tensor:
        """The streams that enter the ``block``-th executed block, changed as the caller wishes."""
        if record.wanted and block > 1:
            record.block_hiddens.append(self.streams.last(streams))
        return streams if call.transform_block is None else call.transform_block(block, streams)

    def _mixture(self, step: Step) -> nn.Module:
        """What mixes the inputs of all layers so far: one for each step, or for each layer where any number can be mixed."""
        mixture: nn.Module = self.layer_integrators[step.layer if self.flags.aggregates else step.index]
        return mixture

    def _join(self, step: Step, streams: Float[Tensor, '... n d'], carry: Carry) -> Tensor:
        """What enters a layer: the stream, maybe with the stack's input; U-Net: joined with what an earlier layer saw."""
        if self.lambdas is not None:
            streams = self.lambdas(streams, carry.first, step.layer)
        carry.skips[step.layer] = streams
        combine = self.skip_combines[step.layer]
        if combine is None:
            return streams
        joined: Tensor = combine(streams, carry.skips)
        return joined

    @with_arguments(argument_sentences(StackArgs))
    def forward(
        self,
        x: Float[Tensor, 'b n d'],
        context: Float[Tensor, 'b j c'] | None = None,
        mask: Bool[Tensor, 'b t'] | None = None,
        context_mask: Bool[Tensor, 'b j'] | None = None,
        attn_mask: Bool[Tensor, '... i j'] | None = None,
        self_attn_kv_mask: Bool[Tensor, 'b k'] | None = None,
        mems: Sequence[Float[Tensor, 'b l d'] | None] | None = None,
        mem_masks: Sequence[Bool[Tensor, 'b l'] | None] | None = None,
        seq_start_pos: Int[Tensor, 'b'] | None = None,
        seq_pos_offset: int | None = None,
        cache: Cache = None,
        input_not_include_cache: bool = False,
        cache_age: int = 1,
        return_hiddens: bool | Literal['cache'] = False,
        rotary_pos_emb: tuple[Float[Tensor, '... p r'], Float[Tensor, '... p r'] | float] | None = None,
        polar_pos_emb: tuple[Float[Tensor, '... p r'], Float[Tensor, 'h 1 r']] | None = None,
        pos: Int[Tensor, '... n'] | None = None,
        context_pos: Int[Tensor, '... j'] | None = None,
        attn_bias: Float[Tensor, '... i j'] | None = None,
        deep_embeds_and_ids: tuple[Float[Tensor, 't l d'], Int[Tensor, 'b n']] | None = None,
        self_attn_additional_kv: Any = None,
        additional_kv_mask: Bool[Tensor, 'b m'] | None = None,
        detach_additional_kv: bool = False,
        route_additional_kv_to_top: bool = True,
        condition: Float[Tensor, 'b ... c'] | None = None,
        in_attn_cond: Float[Tensor, 'b ... d'] | None = None,
        layers_execute_order: Sequence[int] | None = None,
        self_attn_kv_residuals: Float[Tensor, '... n d'] | None = None,
        cross_attn_kv_residuals: Float[Tensor, '... j c'] | None = None,
        flash_pack_seq_kwargs: dict[str, Any] | None = None,
        flash_pack_seq_context_kwargs: dict[str, Any] | None = None,
        repeat_blocks: Any = None,
        transform_block_inputs: Any = None,
        causal: bool | None = None,
        return_gumbel_log_probs: bool = False,
        return_expert_loss: bool = False,
        value_embeds_and_ids: tuple[Mapping[str, nn.Module], Int[Tensor, 'b n']] | None = None,
        one_place: bool | None = None,
    ) -> Tensor | tuple[Tensor, LayerIntermediates]:
        """Run the stack. In every boolean mask, True marks a token, or a key that may be attended to.

        Args: as declared in ``layers/arguments.py``

        Returns (b n dim), or with ``return_hiddens`` (that, LayerIntermediates). With a cache only the new tokens come back.
        Raises ValueError or TypeError, before anything is computed, if an argument does not fit.
        """
        return self.outputs(x, StackArgs(
            context, mask, context_mask, attn_mask, self_attn_kv_mask, mems, mem_masks, seq_start_pos, seq_pos_offset, cache,
            input_not_include_cache, cache_age, return_hiddens, rotary_pos_emb, polar_pos_emb, pos, context_pos, attn_bias,
            deep_embeds_and_ids, self_attn_additional_kv, additional_kv_mask, detach_additional_kv, route_additional_kv_to_top,
            condition, in_attn_cond, layers_execute_order, self_attn_kv_residuals, cross_attn_kv_residuals,
            flash_pack_seq_kwargs, flash_pack_seq_context_kwargs, None, repeat_blocks, transform_block_inputs, causal,
            return_gumbel_log_probs, return_expert_loss, value_embeds_and_ids, one_place,
        ))  # fmt: skip

    def outputs(self, x: Float[Tensor, 'b n d'], args: StackArgs) -> Tensor | tuple[Tensor, LayerIntermediates]:
        """``forward`` with its keywords in one object."""
        x, call = prepare(self, x, args)
        out, record = self.run(x, call)
        if not args.return_hiddens:
            return (out, LayerIntermediates(expert_loss=record.expert_loss)) if args.return_expert_loss else out
        length = call.span.new if call.cache is None else call.cache.length
        return out, record.report(out, length)


class Encoder(AttentionLayers):
    """A bidirectional stack: every token attends to every other."""

    __signature__ = ClassSignature(STACK, 'causal')
    decides: ClassVar[Mapping[str, bool]] = {'causal': False}

    def __init__(self, **flags: Unpack[EncoderKeywords]) -> None:
        super().__init__(**with_own(Encoder, flags))


class Decoder(AttentionLayers):
    """A causal stack: each token attends to itself and to earlier tokens."""

    __signature__ = ClassSignature(STACK, 'causal')
    decides: ClassVar[Mapping[str, bool]] = {'causal': True}

    def __init__(self, **flags: Unpack[EncoderKeywords]) -> None:
        super().__init__(**with_own(Decoder, flags))


class PrefixDecoder(AttentionLayers):
    """Prefix tokens attend to the whole prefix, others to themselves and earlier tokens, https://arxiv.org/abs/1910.10683.

    forward takes ``prefix_attn_len``, a number or one per row (b); without it the stack is causal. Keys are counted from the
    first token of x. ``causal`` is False as in the original; a cache may be used if the first call holds the whole prefix.
    """

    __signature__ = ClassSignature(STACK, 'causal')
    has_prefix = True
    decides: ClassVar[Mapping[str, bool]] = {'causal': False}

    def __init__(self, **flags: Unpack[EncoderKeywords]) -> None:
        super().__init__(**with_own(PrefixDecoder, flags))

    def forward(
        self,
        x: Float[Tensor, 'b n d'],
        *args: Any,
        attn_mask: Bool[Tensor, '... i j'] | None = None,
        prefix_attn_len: int | Int[Tensor, 'b'] | None = None,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, LayerIntermediates]:
        kwargs.update(attn_mask=attn_mask, prefix_attn_len=prefix_attn_len)
        return self.outputs(x, StackArgs(*args, **kwargs))


class TransformerBlock(AttentionLayers):
    """One block, or ``depth`` of them, without a final norm: a part for your own model."""

    __signature__ = ClassSignature(STACK)

    def __init__(
        self, dim: int, *, depth: int = 1, pre_norm_has_final_norm: bool = False, **flags: Unpack[BlockKeywords]
    ) -> None:
        super().__init__(dim, depth=depth, pre_norm_has_final_norm=pre_norm_has_final_norm, **flags)


class CrossAttender(AttentionLayers):
    """A stack of cross attention and feed-forwards, without self attention."""

    __signature__ = ClassSignature(STACK, 'cross_attend', 'only_cross')
    decides: ClassVar[Mapping[str, bool]] = {'cross_attend': True, 'only_cross': True}

    def __init__(self, **flags: Unpack[CrossAttenderKeywords]) -> None:
        super().__init__(**with_own(CrossAttender, flags))


__all__ = ['AttentionLayers', 'CrossAttender', 'Decoder', 'Encoder', 'Intermediates', 'PrefixDecoder', 'TransformerBlock']
