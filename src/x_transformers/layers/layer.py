"""One layer: norms, a branch, and its way around the branch."""

from __future__ import annotations

import inspect
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from x_transformers.attention.attention import Attention
from x_transformers.attention.sharing import SharingAttention
from x_transformers.feedforward import FeedForward
from x_transformers.flags.base import unknown_flags
from x_transformers.layers.branch import AdaptiveLayerScale, Canon, LayerScale, Scale, ShiftTokens, innermost, run_checkpointed
from x_transformers.layers.gated_streams import GatedMultiResidual
from x_transformers.layers.hyper_connections import HyperConnection
from x_transformers.layers.plan import block_numbers
from x_transformers.layers.residual import (
    GRUGating,
    OrthogonalResidual,
    ParallelBlock,
    ResiDual,
    Residual,
    ResidualPath,
    SphereResidual,
    read_foreign,
    write_stream,
)
from x_transformers.layers.slots import call_branch, call_norm, split_result
from x_transformers.layers.split_residual import MVSplitResidual
from x_transformers.mixers.choose import make_mixer
from x_transformers.norms import choose_norm
from x_transformers.tensor_types import Float

if TYPE_CHECKING:
    from x_transformers.attention.inputs import Intermediates
    from x_transformers.flags.stack import StackFlags
    from x_transformers.layers.call import Around
    from x_transformers.layers.plan import LayerSpec

# what a list of modules has in the place of a forward
EMPTY = nn.ModuleList.forward


class Layer(nn.ModuleList):
    """[[norm before, norm behind, norm after], branch, residual]: indices as in the original, so checkpoints fit.

    Any of them may be exchanged for a module of one's own, see ``docs/own_modules.md``.
    """

    def __init__(
        self,
        before: nn.Module | None,
        behind: nn.Module | None,
        after: nn.Module | None,
        branch: nn.Module,
        residual: nn.Module,
        scale: float = 1.0,
        norm_scale: float = 1.0,
    ) -> None:
        norms = nn.ModuleList()
        for index, norm in enumerate((before, behind, after)):
            norms.add_module(str(index), norm)
        super().__init__([norms, branch, residual])
        # a constant factor on what the branch writes
        self.scale = scale
        # and on what the norm before it gives
        self.norm_scale = norm_scale

    @classmethod
    def of(cls, parts: Any) -> nn.Module:
        """A layer of a triple (norms, branch, residual), as the original has them; a layer, or what wraps one, as it is."""
        if isinstance(parts, nn.Module) and not (isinstance(parts, nn.ModuleList) and type(parts).forward is EMPTY):
            return parts
        norms, branch, residual = parts
        before, behind, after = (*norms, None, None, None)[:3]
        return cls(before, behind, after, branch, residual)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if self.scale != 1.0:
            name_as_unwrapped(state_dict, f'{prefix}1.', self.branch)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    # read from the dictionary of children: indexing a ModuleList takes several times as long, at every step of decoding

    @property
    def norms(self) -> nn.ModuleList:
        return cast(nn.ModuleList, self._modules['0'])

    @property
    def branch(self) -> nn.Module:
        return self._modules['1']

    @property
    def residual(self) -> Any:
        return self._modules['2']

    @property
    def inside(self) -> nn.Module:
        """The attention or feed-forward, without what is wrapped around it."""
        return innermost(self.branch)

    def forward(
        self,
        streams: Float[Tensor, '... n d'],
        condition: Float[Tensor, 'b ... c'] | None,
        wide_condition: Float[Tensor, 'w ... c'] | None,
        around: Around,
    ) -> tuple[Tensor, Intermediates | None]:
        """(the streams with what the branch has to say, what its attention reports).

        ``wide_condition`` is the condition for every row of the streams. What mixed precision is to cast goes in by itself.
        """
        norms, branch, residual = self._modules.values()
        before, behind, after = norms._modules.values()
        h, rest = residual.read(streams) if isinstance(residual, ResidualPath) else read_foreign(residual, streams)
        h = h if around.as_it_is else around.enter(h)
        if around.drop is True:
            return streams, None
        h = self.norm_before(before, h if around.injected is None else h + around.injected, condition)
        given = around.given
        if given.mem is not None:
            given = given.having(mem=self.norm_before(before, given.mem, around.mem_condition))
        run = run_checkpointed if around.checkpoint else call_branch
        out, seen = run(branch, h, given), None
        if isinstance(out, tuple):
            out, seen = split_result(out)
        del h
        out = out if behind is None else call_norm(behind, out, condition)
        written = write_stream(residual, out if self.scale == 1.0 else out * self.scale, rest, around)
        return (written if after is None else norm_after(after, residual, written, wide_condition)), seen

    def norm_before(
        self, norm: nn.Module | None, x: Float[Tensor, '... n d'], condition: Float[Tensor, 'b ... c'] | None
    ) -> Tensor:
        """Pre-norm, of the branch's input and of memories, and its constant factor."""
        if norm is not None:
            x = norm(x) if condition is None else call_norm(norm, x, condition)
        return x if self.norm_scale == 1.0 else x * self.norm_scale


def name_as_unwrapped(state: dict[str, Any], prefix: str, branch: nn.Module) -> None:
    """Rename what 2.31.10 saved of a branch wrapped for a constant factor, which puts one more ``fn.`` into keys."""
    own = branch.state_dict().keys()
    for key in [key for key in state if key.startswith(prefix) and key[len(prefix) :] not in own]:
        name = key[len(prefix) :].replace('fn.', '', 1)
        if name in own:
            state[prefix + name] = state.pop(key)


def norm_after(
    norm: nn.Module, residual: nn.Module, streams: Float[Tensor, '... n d'], condition: Float[Tensor, 'b ... c'] | None
) -> Tensor:
    """Post-norm, of the stream after the layer."""
    if isinstance(residual, ResidualPath):
        return residual.norm_after(partial(call_norm, norm, condition=condition), streams)
    return call_norm(norm, streams, condition)


def make_norm(flags: StackFlags) -> nn.Module:
    return choose_norm(
        flags.norm_kind,
        flags.dim,
        unit_offset=flags.norm_add_unit_offset,
        dim_condition=flags.condition_width,
        init_alpha=flags.dynamic_tanh_init_alpha,
        eps=flags.norm_eps,
        bias=flags.norm_bias,
    )


def choose_branch(flags: StackFlags, spec: LayerSpec, causal: bool) -> nn.Module:
    """What the layer does, inside what scales its output and shifts its input."""
    branch: nn.Module
    block = block_numbers(flags)[spec.index]
    if spec.kind == 'a':
        kind = Attention if spec.keys_from is None else SharingAttention
        branch = kind.from_flags(flags.dim, flags.self_attention_flags(first=spec.first).at_depth(block))
    elif spec.kind == 'm':
        branch = make_mixer(flags)
    elif spec.kind == 'c':
        branch = Attention.from_flags(flags.dim, flags.cross_attention.at_depth(block))
    else:
        branch = FeedForward.from_flags(flags.dim, flags.feedforward)
    if spec.half:
        branch = Scale(0.5, branch)
    if spec.shift > 0:
        branch = ShiftTokens(range(0 if causal else -spec.shift, spec.shift + 1), branch)
    if flags.has_canon({'a': 'a', 'f': 'c'}.get(spec.kind, '-')):
        branch = Canon(flags.dim, branch)
    if flags.use_layerscale:
        branch = LayerScale(branch, flags.dim, flags.layerscale_init_value, unit_offset=flags.norm_add_unit_offset)
    elif flags.use_adaptive_layerscale:
        branch = AdaptiveLayerScale(branch, flags.dim, flags.condition_width)
    return branch


# the ways to join a branch to the stream, the first that is on
RESIDUALS: tuple[type[ResidualPath], ...] = (
    ResiDual, ParallelBlock, GatedMultiResidual, HyperConnection, GRUGating, OrthogonalResidual, MVSplitResidual,
    SphereResidual, Residual,
)  # fmt: skip
# all of them are told these, as in the original, and some have no use for them
SCALES = ('scale_residual', 'scale_residual_constant')


def choose_residual(flags: StackFlags, spec: LayerSpec, causal: bool) -> ResidualPath:
    """How the branch is joined to the stream. Raises FlagError for keywords that it does not have, though it takes any."""
    path = next(path for path in RESIDUALS if path.is_on(flags))
    known = {*inspect.signature(path.__init__).parameters, *SCALES} - {'self', 'dim', 'kwargs'}
    if unknown := [name for name in flags.residual_fn_kwargs if name not in known]:
        raise unknown_flags(unknown, where=f'residual_fn_kwargs of {path.__name__}', known=sorted(known))
    made = path.from_flags(flags, spec)
    made.is_causal = causal
    return made


def make_layer(flags: StackFlags, spec: LayerSpec, causal: bool) -> Layer:
    """The modules of one layer. ResiDual brings a norm after each layer of its own accord.

    A prefix decoder is ``causal`` whatever its flag says.
    """
    flags = flags.layer(spec.index)
    before = flags.pre_norm and not (flags.resi_dual or flags.gated_streams or flags.ngpt)
    return Layer(
        before=make_norm(flags) if before and flags.norm_before else None,
        behind=make_norm(flags) if before and flags.sandwich_norm else None,
        after=make_norm(flags) if flags.post_norm else None,
        branch=choose_branch(flags, spec, causal),
        residual=choose_residual(flags, spec, causal),
        scale=flags.branch_scale,
        norm_scale=block_numbers(flags)[spec.index] ** -0.5 if flags.layer_norm_scaling else 1.0,
    )
