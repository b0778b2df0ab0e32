"""``x-transformers info``: layers, parameters, operations, kernel and cache of a set of flags."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import tyro
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from x_transformers.attention import attend
from x_transformers.attention.kernels.base import CallFacts, Kernel, KernelArgs, Needs
from x_transformers.attention.kernels.choose import KERNELS, explain
from x_transformers.attention.kernels.facts import facts_of
from x_transformers.cache.kv_cache import KVCache
from x_transformers.cli.options import GROUPS, ModelOptions, all_keywords, model_fields, preset_option
from x_transformers.cli.parse import parse_typed, typed_names
from x_transformers.cli.toml import config_path, from_file
from x_transformers.flags.base import FlagError, shown
from x_transformers.flags.presets import preset_sentences
from x_transformers.flags.stack import StackFlags
from x_transformers.layers.plan import KINDS, LayerPlan, LayerSpec, plan_layers
from x_transformers.tensor_types import Shaped
from x_transformers.training.build import NUM_BYTES, USUAL_PRESET, build_network, choose_device, refuse_inert
from x_transformers.training.errors import TrainingError
from x_transformers.training.run import RunConfig

ABOUT = """Show the layers, parameters, operations, attention kernels and cache for a set of flags.

The model is built without memory, so the command works for models of any size.
"""


@dataclasses.dataclass(frozen=True)
class InfoOptions:
    run: str | None = None
    """Use the model of this run folder instead of the flags given here."""
    config: str | None = None
    """TOML file with any of these options; the command line overrides it."""
    seq_len: int = 256
    """Bytes per sequence."""
    device: str = 'auto'
    """The device that the attention kernel is chosen for."""
    bf16: bool = False
    """Compute in bfloat16."""
    training: bool = True
    """Describe a training step (with gradients and dropout) instead of an evaluation."""
    json: bool = False
    """Print one line of JSON at the end."""


def info_class() -> type:
    fields: list[tuple[str, Any, Any]] = [
        ('options', Annotated[InfoOptions, tyro.conf.arg(name='')], dataclasses.field(default_factory=InfoOptions)),
        ('preset', preset_option(), dataclasses.field(default=None)),
        *model_fields(),
    ]
    command = dataclasses.make_dataclass('Info', fields, frozen=True)
    command.__doc__ = ABOUT
    return command


def parse(arguments: Sequence[str]) -> tuple[dict[str, Any], InfoOptions]:
    command = info_class()
    path = config_path(arguments)
    file = from_file(path, InfoOptions, arguments)
    default = command(options=InfoOptions(**file.own | {'config': path}), preset=file.preset, **file.groups)
    read = parse_typed(default, arguments, 'x-transformers info')
    options: InfoOptions = read.options
    if options.seq_len < 1:
        raise TrainingError(f'--seq-len must be at least 1, got {options.seq_len}')
    if options.run is not None:
        return RunConfig.read(Path(options.run)).flags, options
    flags = ModelOptions(**{group: getattr(read, group) for group in GROUPS}).given() | file.only_here
    flags = flags | {'max_seq_len': flags.get('max_seq_len', options.seq_len)}
    refuse_inert(flags, typed_names(arguments, all_keywords()) | file.names)
    return flags, options


def main(arguments: Sequence[str]) -> int:
    try:
        return show_info(arguments)
    except FlagError as error:
        file = from_file(config_path(arguments), InfoOptions, arguments)
        own = typed_names(arguments, all_keywords()) | file.names
        raise FlagError(*error.sentences, *preset_sentences(error, file.preset or USUAL_PRESET, own)) from error


def show_info(arguments: Sequence[str]) -> int:
    flags, options = parse(arguments)
    device, here = device_asked(options.device)
    vocabulary = NUM_BYTES if options.run is None else RunConfig.read(Path(options.run)).vocabulary
    with torch.device('meta'):
        network = build_network(flags, vocabulary).train(options.training)
    stack_flags: StackFlags = network.attn_layers.flags  # type: ignore[union-attr, assignment]
    try:
        seen = look(network, options)
    except ValueError as error:  # of a sequence of this length
        raise TrainingError(f'--seq-len {options.seq_len} does not fit this model: {error}') from error
    kept = kept_bytes(flags, options, device, vocabulary) if options.training and here else None
    plan = plan_layers(stack_flags)
    summary = Summary.of(network, seen, kept, options)
    parts = [
        summary.lines(plan, stack_flags),
        layer_lines(plan, stack_flags),
        parameter_lines(network),
        [
            f'operations for {options.seq_len} bytes at once (multiply and add count as two)',
            f'  forward   {seen.flops / options.seq_len:>15,.0f} per byte',
            f'  training  {3 * seen.flops / options.seq_len:>15,.0f} per byte (forward and backward)',
        ],
        kept_lines(kept, options, device) if options.training else [],
        cache_lines(network, seen, options),
        kernel_lines(seen.calls, device),
    ]
    print('\n\n'.join('\n'.join(lines) for lines in parts if lines))
    if options.json:
        print(json.dumps(dataclasses.asdict(summary) | {'layers': ''.join(plan.kinds)}))
    return 0


def device_asked(name: str) -> tuple[torch.device, bool]:
    """The device, and whether it is here: which kernel it would choose can be told without it."""
    try:
        return choose_device(name), True
    except TrainingError:
        try:
            device = torch.device(name)
        except RuntimeError:
            raise TrainingError(f'--device must be cpu, cuda, mps or another kind of device, got {name!r}.') from None
        return device, False


# what is found out by a forward without numbers


@dataclasses.dataclass(frozen=True)
class Measured:
    flops: int
    cache_bytes: int
    calls: list[tuple[Needs, CallFacts]]


def look(network: nn.Module, options: InfoOptions) -> Measured:
    """Send a sequence without numbers through the model and watch."""
    ids = torch.zeros(1, options.seq_len, dtype=torch.long, device='meta')
    counter = FlopCounterMode(display=False)
    with watched_choices() as calls, torch.set_grad_enabled(options.training), counter:
        dtype = torch.bfloat16 if options.bf16 else next(network.parameters()).dtype
        _, intermediates = network.to(dtype)(ids, return_intermediates=True)
    cache = KVCache.of(intermediates)
    return Measured(counter.get_total_flops(), 0 if cache is None else cache.bytes(), calls)


@contextmanager
def watched_choices() -> Iterator[list[tuple[Needs, CallFacts]]]:
    """What every attention asks of a kernel."""
    calls: list[tuple[Needs, CallFacts]] = []

    def note(needs: Needs, args: KernelArgs) -> Kernel:
        calls.append((needs, facts_of(args)))
        return KERNELS[-1]  # the reference: others may ask more of a device than to have no numbers

    with mock.patch.object(attend, 'kernel_of', note):
        yield calls


def kept_bytes(flags: dict[str, Any], options: InfoOptions, device: torch.device, vocabulary: int = NUM_BYTES) -> int:
    """What a forward keeps for its backward, beside the parameters: found out on tensors that have a device but no numbers."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    kept: dict[int, tuple[Tensor, int]] = {}
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device):
        network = build_network(flags, vocabulary).train()
        if options.bf16:
            halve(network)
        own = {parameter.untyped_storage()._cdata for parameter in network.parameters()}

        def keep(tensor: Shaped[Tensor, '...']) -> Shaped[Tensor, '...']:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                # the tensor is held, so that no other one takes its place
                kept[storage._cdata] = tensor, storage.nbytes()
            return tensor

        ids = torch.zeros(1, options.seq_len, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            network(ids)
    return sum(size for _, size in kept.values())


def halve(network: nn.Module) -> None:
    """What ``network.bfloat16()`` does, which cannot exchange parameters that have a device but no numbers."""
    halves: dict[nn.Parameter, nn.Parameter] = {}
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter not in halves:
                halves[parameter] = nn.Parameter(parameter.detach().to(torch.bfloat16), parameter.requires_grad)
            setattr(module, name, halves[parameter])
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                setattr(module, name, buffer.to(torch.bfloat16))


# what is shown


@dataclasses.dataclass(frozen=True)
class Summary:
    """The figures of a model; bytes are those of its dtype, and None where they cannot be told here."""

    parameters: int
    parameter_bytes: int
    flops_per_token: float
    cache_bytes: int
    kept_bytes: int | None
    seq_len: int

    @classmethod
    def of(cls, network: nn.Module, seen: Measured, kept: int | None, options: InfoOptions) -> Summary:
        parameters = list(network.parameters())
        count, size = sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters)
        return cls(count, size, seen.flops / options.seq_len, seen.cache_bytes, kept, options.seq_len)

    def lines(self, plan: LayerPlan, flags: StackFlags) -> list[str]:
        """What is worth knowing first."""
        kept = '' if self.kept_bytes is None else f', {megabytes(self.kept_bytes)} kept for the backward'
        return [
            f'{repeated(plan)}, width {flags.dim}, {shown(flags.heads)} heads of {shown(flags.attn_dim_head)}',
            f'{self.parameters:,} parameters in {megabytes(self.parameter_bytes)}; for a sequence of {self.seq_len} a cache of '
            f'{megabytes(self.cache_bytes)}{kept}',
        ]


def megabytes(count: int) -> str:
    return f'{count / 1e6:,.1f} MB'


def repeated(plan: LayerPlan) -> str:
    """``12 x (self attention, feed-forward)``: the shortest pattern that gives all layers."""
    kinds = plan.kinds
    period = next((n for n in range(1, len(kinds) + 1) if len(kinds) % n == 0 and kinds[:n] * (len(kinds) // n) == kinds), 0)
    if not period:
        return 'no layers'
    return f'{len(kinds) // period} x ({", ".join(KINDS[kind] for kind in kinds[:period])})'


def layer_lines(plan: LayerPlan, flags: StackFlags) -> list[str]:
    """The kinds of layers in their order; one by one, with what is special about each, if anything is."""
    lines = [f'layers: {"".join(plan.kinds)}']
    notes = [layer_notes(spec, flags) for spec in plan.layers]
    if any(notes):
        for spec, words in zip(plan.layers, notes, strict=True):
            lines.append(f'  {spec.index:3}  {KINDS[spec.kind]:16}{", ".join(words)}'.rstrip())
    if plan.order != tuple(range(len(plan.layers))):
        lines.append(f'  executed in the order {", ".join(map(str, plan.order))}')
    return lines


def layer_notes(spec: LayerSpec, flags: StackFlags) -> list[str]:
    notes = [
        note
        for wanted, note in (
            (spec.half, 'counts half'),
            (spec.shift, f'shifted by {spec.shift}'),
            (spec.dropout, f'dropped with probability {spec.dropout}'),
            (spec.views > 1, f'{spec.views} views of the past'),
            (spec.skip_from is not None, f'joined with layer {spec.skip_from}'),
        )
        if wanted
    ]
    return [*notes, *(f'{name}={shown(value)}' for name, value in flags.varying_at(spec.index).items())]


def parameter_lines(network: nn.Module) -> list[str]:
    """Parameters by the class of the module that owns them; each counted once."""
    counts: dict[str, int] = {}
    seen: set[int] = set()
    for owner, module in owners(network):
        for parameter in module.parameters():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                counts[owner] = counts.get(owner, 0) + parameter.numel()
    total = sum(counts.values())
    lines = [f'parameters: {total:,}']
    for owner, count in sorted(counts.items(), key=lambda item: -item[1]):
        lines.append(f'  {owner:24}{count:>14,}  {100 * count / max(total, 1):5.1f} %')
    return lines


def owners(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(owner, module) from the inside out: branches, norms, residuals, then what is left of the stack and around it."""
    stack: Any = network.attn_layers
    plan = plan_layers(stack.flags)
    for spec, layer in zip(plan.layers, stack.layers, strict=True):
        norms, branch, residual = layer
        yield KINDS[spec.kind], branch
        yield 'norms', norms
        yield 'residuals', residual
    yield 'norms', stack.final_norm
    yield 'rest of the stack', stack
    for name, child in network.named_children():
        yield {'token_emb': 'token embedding', 'to_logits': 'logits', 'pos_emb': 'position embedding'}.get(name, name), child
    yield 'rest', network


def kept_lines(kept: int | None, options: InfoOptions, device: torch.device) -> list[str]:
    if kept is None:
        return [f'kept for the backward: can be told where {device.type} is']
    return [f'kept for the backward: {kept / options.seq_len:,.0f} bytes per byte of text, without those of the loss']


def cache_lines(network: Any, seen: Measured, options: InfoOptions) -> list[str]:
    if not network.can_cache_kv:
        return ['cache: none, these flags need the whole sequence at every step']
    return [f'cache: {seen.cache_bytes / options.seq_len:,.0f} bytes per byte of text and sequence']


def kernel_lines(calls: list[tuple[Needs, CallFacts]], device: torch.device) -> list[str]:
    """One paragraph per different demand; on the meta device nothing runs, so the choice is asked for on the real one."""
    counts: dict[str, int] = {}
    for needs, call in calls:
        text = explain(needs, call._replace(device=device.type))
        counts[text] = counts.get(text, 0) + 1
    lines = [f'attention kernels on {device.type}']
    for text, count in counts.items():
        first, *others = text.splitlines()
        lines.append(f'  {first} ({count} of {len(calls)} layers)')
        lines += [f'    {other}' for other in others]
    return lines
