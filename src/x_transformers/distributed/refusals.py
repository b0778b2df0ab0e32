"""Which kind of parallelism cannot be had, and with which flag: one table, asked before anything starts.

Everything that is not refused here gives the loss and the gradients of one process, as ``tests/distributed`` proves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import nn

from x_transformers.attention.attention import Attention
from x_transformers.distributed.context import sliced_refusals
from x_transformers.distributed.degrees import Degrees, MeshError
from x_transformers.distributed.sequence import sequence_refusals
from x_transformers.distributed.stages import staged_refusals
from x_transformers.distributed.tensor import check_divides
from x_transformers.distributed.vocabulary import vocabulary_refusals
from x_transformers.feedforward import FeedForward
from x_transformers.flags.base import default_of

# whole kinds: each is refused under every flag
NOT_TOGETHER = {
    'shard': '--shard must be none with --pipeline: stages whose parameters lie in parts are not built.',
    'tensor': '--tensor must be 1 with --pipeline: stages whose heads are shared are not built.',
    'context': '--context must be 1 with --pipeline: stages of slices are not built.',
}
NOT_PROVEN = {
    'compile': '--compile must be off with several processes: it is not proven that results stay the same.',
    'checkpointing selective': '--checkpointing must be none or full: selective gave wrong gradients with '
    '`gate_residual` and `attn_hybrid_module`.',
    'offload': '--offload must be off: it moves shards between a GPU and the CPU, which has not been tried.',
}


def is_loss(value: Any) -> bool:
    return bool(value == 'loss')


def is_name(value: Any) -> bool:
    return isinstance(value, str)


class Refusal(NamedTuple):
    kind: str  # of parallelism, a column of the table in docs/scaling.md
    flag: str
    reason: str
    allowed: Callable[[Any], bool] | None = None  # values of the flag that are not refused


KINDS = (
    'shard none', 'shard full', 'shard hybrid', 'checkpoint', 'tensor', 'sequence parallel', 'loss parallel', 'context',
    'pipeline',
)  # fmt: skip

MIXES = 'it mixes all heads, of which each process has some'
DROPS = 'other units would be dropped than in one process'
DRAWS = 'other numbers would be drawn than in one process'
SUMS = 'sums over the slices before are not gathered'
UNIT = 'gains and lengths of weights are cut neither by heads nor by features'
BEFORE = 'the token before a slice is not gathered'
AGAIN = 'the stack is run again'
UNKNOWN = 'it may look at what other processes have'

# a flag that gives other numbers under one of these kinds, or cannot run, has its row here
REFUSALS: tuple[Refusal, ...] = (
    Refusal('tensor', 'attn_pre_talking_heads', MIXES),
    Refusal('tensor', 'attn_post_talking_heads', MIXES),
    Refusal('tensor', 'attn_pre_scale_post_talking_heads', MIXES),
    Refusal('tensor', 'attn_cope_talking_heads', MIXES),
    Refusal('tensor', 'attn_composable', MIXES),
    Refusal('tensor', 'attn_differential', 'heads come in pairs, of which each process may have one'),
    Refusal('tensor', 'attn_tensor_product', 'the factors of all heads lie side by side'),
    Refusal('tensor', 'attn_path', 'one narrow middle serves all key heads'),
    Refusal('tensor', 'rotary_axes_mixed', 'each key head turns in its own way, and positions are made for all of them'),
    Refusal('tensor', 'attn_output_gate', 'it reads all heads, of which each process has some'),
    Refusal('tensor', 'attn_project_out', 'its output would be some heads only'),
    Refusal('tensor', 'ngpt', UNIT),
    Refusal('tensor', 'attn_unit_weights', UNIT),
    Refusal('tensor', 'ff_unit_weights', UNIT),
    Refusal('tensor', 'attn_selective', 'the first head decides for all, and one process has it'),
    Refusal('tensor', 'attn_orthog_projected_values', 'it takes all heads as one vector'),
    Refusal('tensor', 'attn_orthog_projected_values_per_head', 'it takes all heads as one vector'),
    Refusal('tensor', 'attn_latent_rope_subheads', 'heads of two kinds stand one behind the other'),
    Refusal('tensor', 'attn_hybrid_module', 'its output is for all heads, of which each process has some'),
    Refusal('tensor', 'rotate_num_heads', 'the last of all heads are counted'),
    Refusal('tensor', 'attn_gumbel_softmax', 'other noise would be drawn than in one process'),
    Refusal('tensor', 'attn_dropout', DROPS),
    Refusal('tensor', 'ff_dropout', DROPS),
    Refusal('tensor', 'attn_custom_attn_fn', UNKNOWN),
    Refusal('tensor', 'ff_custom_activation', UNKNOWN, allowed=is_name),
    Refusal('tensor', 'ff_solu', 'it norms all inner features, of which each process has some'),
    Refusal('tensor', 'ff_post_act_ln', 'it norms all inner features, of which each process has some'),
    Refusal('tensor', 'add_attn_z_loss', 'it reads the attention maps of all heads'),
    Refusal('sequence parallel', 'mv_split_residual', 'its residual is a mean over all rows before'),
    Refusal('context', 'attn_data_dependent_alibi', SUMS),
    Refusal('context', 'attn_hybrid_module', 'its state comes from the slice before'),
    Refusal('context', 'mixer', 'its state comes from the slice before'),
    Refusal('context', 'ff_experts', 'their load is balanced over whole sequences'),
    Refusal('context', 'attn_selective', 'what earlier queries see is not gathered'),
    Refusal('context', 'attn_gumbel_softmax', DRAWS),
    Refusal('context', 'attn_dropout', DRAWS),
    Refusal('context', 'ff_dropout', DRAWS),
    Refusal('context', 'attn_sublayer_dropout', DRAWS),
    Refusal('context', 'ff_sublayer_dropout', DRAWS),
    Refusal('context', 'emb_dropout', DRAWS),
    Refusal('context', 'layer_dropout', 'a slice that follows others drops no layer'),
    Refusal('context', 'cross_attn_tokens_dropout', DRAWS),
    Refusal('context', 'mv_split_residual', SUMS),
    Refusal('context', 'num_memory_tokens', 'the first slice alone would have them'),
    Refusal('context', 'randomized_positions', DRAWS),
    Refusal('context', 'recycling', AGAIN),
    Refusal('context', 'looped', AGAIN),
    Refusal('context', 'smear', BEFORE),
    Refusal('context', 'bigram_hash_embed', BEFORE),
    Refusal('context', 'attn_custom_attn_fn', 'it may look at other slices'),
    Refusal('context', 'add_attn_z_loss', 'it is a mean over the whole sequence'),
    Refusal('context', 'multi_token_heads', 'what they are to predict may lie in the next slice'),
    Refusal('context', 'add_continuous_pred_head', 'its loss compares neighbours, which may lie in two slices'),
    Refusal('pipeline', 'ff_router_balance', 'all processes count together how often experts are chosen', allowed=is_loss),
    Refusal('pipeline', 'add_attn_z_loss', 'it reads the attention maps of all layers'),
    Refusal('pipeline', 'layer_dropout', 'what a layer that is left out hands on is missing in the next stage'),
    Refusal('pipeline', 'recycling', AGAIN),
    Refusal('pipeline', 'looped', AGAIN),
    Refusal('pipeline', 'add_continuous_pred_head', 'it compares with the embeddings, which the first stage has'),
)

# what modules are told without the name of their branch in front
BRANCHES: tuple[tuple[str, type[nn.Module]], ...] = (('attn_', Attention), ('ff_', FeedForward))


def refusals(model: nn.Module, kinds: set[str]) -> Iterator[str]:
    """A sentence for each flag of the model that one of these kinds of parallelism cannot do."""
    for refusal in REFUSALS:
        if refusal.kind in kinds and is_set(model, refusal):
            yield f'`{refusal.flag}` must be left as it is with {refusal.kind}: {refusal.reason}.'


def is_set(model: nn.Module, refusal: Refusal) -> bool:
    for prefix, kind in BRANCHES:
        if refusal.flag.startswith(prefix):
            name = refusal.flag.removeprefix(prefix)
            return any(differs(module, name, refusal.allowed) for module in model.modules() if isinstance(module, kind))
    return any(differs(module, refusal.flag, refusal.allowed) for module in model.modules())


def differs(module: Any, name: str, allowed: Callable[[Any], bool] | None) -> bool:
    """Whether a flag of the module has another value than its default, and none that is allowed."""
    flags: Any = getattr(module, 'flags', None)
    field = type(flags).flag_fields().get(name) if hasattr(type(flags), 'flag_fields') else None
    if field is None:
        # objectives keep their keywords as attributes
        value, usual = getattr(module, name, False) is True, False
    else:
        value, usual = getattr(flags, name), default_of(field)
    return bool(value != usual) and not (allowed is not None and allowed(value))


def option_refusals(
    degrees: Degrees,
    *,
    compile: bool,
    offload: bool,
    shard: str = 'none',
    checkpoint: Any = 'none',
    sequence_parallel: bool = False,
    loss_parallel: bool = False,
) -> list[str]:
    """A sentence for each option that is refused whatever the flags."""
    together = NOT_TOGETHER if degrees.pipeline > 1 else {}
    # with shard the number of those that share a parameter may be one, or not known yet
    parts = shard != 'none'
    found = [said for name, said in together.items() if getattr(degrees, name) > 1 or (parts and name == 'shard')]
    asked = {'compile': compile, 'offload': offload, 'checkpointing selective': checkpoint == 'selective'}
    if degrees.tensor == 1:
        beside = {'sequence-parallel': sequence_parallel, 'loss-parallel': loss_parallel}
        found += [
            f'--{name} must go with --tensor 2 or more, got 1. Leave it out, or give --no-{name} to a run that had it.'
            for name, on in beside.items()
            if on
        ]
    return found + [sentence for name, sentence in NOT_PROVEN.items() if asked[name]]


def check(
    model: nn.Module,
    degrees: Degrees,
    *,
    shard: str,
    checkpoint: Any,
    precision: str | None,
    compile: bool,
    offload: bool,
    sequence_parallel: bool = False,
    loss_parallel: bool = False,
) -> None:
    """Refuse what cannot be done, naming all of it.

    Errors: ``MeshError``.
    """
    found = option_refusals(
        degrees, compile=compile, offload=offload, shard=shard, checkpoint=checkpoint, sequence_parallel=sequence_parallel,
        loss_parallel=loss_parallel,
    )  # fmt: skip
    if precision is not None and shard == 'none':
        found.append('precision must be None for copies, got bf16: their weights stay as they are. Use autocast, or shard.')
    if checkpoint not in ('none', 'full', 'selective') and not (isinstance(checkpoint, int) and checkpoint >= 1):
        found.append(f"checkpoint must be 'none', 'full' or a number of layers, got {checkpoint!r}.")
    if shard == 'none' and degrees.shard > 1:
        found.append(f"shard must be 'full' or 'hybrid' where {degrees.shard} processes hold parts of a parameter, got 'none'.")
    kinds = {f'shard {shard}', *(() if checkpoint == 'none' else ('checkpoint',))}
    if degrees.tensor > 1:
        kinds.add('tensor')
        found += tensor_refusals(model, degrees, shard)
    if sequence_parallel:
        kinds.add('sequence parallel')
        found += sequence_refusals(model)
    if loss_parallel:
        kinds.add('loss parallel')
        found += vocabulary_refusals(model, degrees.tensor)
    if degrees.context > 1:
        kinds.add('context')
        found += sliced_refusals(model)
    if degrees.pipeline > 1:
        kinds.add('pipeline')
        found += staged_refusals(model, degrees.pipeline)
    found += refusals(model, kinds)
    if found:
        raise MeshError(' '.join(found))


def tensor_refusals(model: nn.Module, degrees: Degrees, shard: str) -> Iterator[str]:
    if shard == 'none' and degrees.replicate > 1:
        yield f"shard must be 'full' or 'hybrid' where {degrees.replicate} groups of --tensor read different data, got 'none'."
    yield from check_divides(model, degrees.tensor)
