"""One layer: norms, a branch, and its residual connection."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from x_transformers.layers.branch import innermost, name_as_unwrapped, run_checkpointed
from x_transformers.layers.residual import ResidualPath, read_foreign, write_stream
from x_transformers.layers.slots import call_branch, call_norm, split_result
from x_transformers.tensor_types import Float

if TYPE_CHECKING:
    from x_transformers.attention.inputs import Intermediates
    from x_transformers.layers.call import Around

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
        inputs = around.inputs
        if inputs.mem is not None:
            inputs = inputs.having(mem=self.norm_before(before, inputs.mem, around.mem_condition))
        run = run_checkpointed if around.checkpoint else call_branch
        out, report = run(branch, h, inputs), None
        if isinstance(out, tuple):
            out, report = split_result(out)
        del h
        out = out if behind is None else call_norm(behind, out, condition)
        written = write_stream(residual, out if self.scale == 1.0 else out * self.scale, rest, around)
        return (written if after is None else norm_after(after, residual, written, wide_condition)), report

    def norm_before(
        self, norm: nn.Module | None, x: Float[Tensor, '... n d'], condition: Float[Tensor, 'b ... c'] | None
    ) -> Tensor:
        """Pre-norm, of the branch's input and of memories, and its constant factor."""
        if norm is not None:
            x = norm(x) if condition is None else call_norm(norm, x, condition)
        return x if self.norm_scale == 1.0 else x * self.norm_scale


def norm_after(
    norm: nn.Module, residual: nn.Module, streams: Float[Tensor, '... n d'], condition: Float[Tensor, 'b ... c'] | None
) -> Tensor:
    """Post-norm, of the stream after the layer."""
    if isinstance(residual, ResidualPath):
        return residual.norm_after(partial(call_norm, norm, condition=condition), streams)
    return call_norm(norm, streams, condition)
