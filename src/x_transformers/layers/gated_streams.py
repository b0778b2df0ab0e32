"""Several residual streams, read and written through low-rank gates, https://qwen.ai/blog?id=qwen3.8-flash-next."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.layers.residual import ResidualPath
from x_transformers.module import ConstantLinear, empty_parameter, fill
from x_transformers.norms import rms_norm
from x_transformers.tensor_types import Float

if TYPE_CHECKING:
    from x_transformers.flags.stack import StackFlags
    from x_transformers.layers.plan import LayerSpec


class GatedMultiResidual(ResidualPath):
    """One layer's gates over ``num_residual_streams`` streams.

    Every stream is normed; the branch reads their mean, each channel of each stream through a sigmoid gate, and writes to every
    stream by a factor between 0 and 2. Both gates depend on all streams through ``read_gate_rank`` features. read: (b s) n d ->
    b n d, or ``num_input_views`` inputs, v b n d. write: b n d -> (b s) n d.
    """

    name = 'gated_streams'

    @classmethod
    def from_flags(cls, flags: StackFlags, spec: LayerSpec) -> GatedMultiResidual:
        settings: dict[str, Any] = {
            'layer_index': spec.index,
            'num_residual_streams': flags.num_residual_streams,
            'num_input_views': 1 if flags.mixes_layers else spec.views,
        }
        return cls(flags.dim, **{**settings, **flags.residual_fn_kwargs})

    def __init__(
        self, dim: int, *, layer_index: int, num_residual_streams: int, read_gate_rank: int, num_input_views: int = 1
    ) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.num_residual_streams = streams = num_residual_streams
        self.num_input_views = views = num_input_views
        self.read_gain = empty_parameter(streams, dim)
        self.static_read_logit = empty_parameter(views, streams, dim)
        self.static_write_logit = empty_parameter(streams)
        self.dynamic_gate_scale = empty_parameter()
        self.to_bottleneck = nn.Linear(streams * dim, read_gate_rank, bias=False)
        self.to_read_gate = ConstantLinear(read_gate_rank, views * streams * dim, bias=False)
        self.to_write_gate = ConstantLinear(read_gate_rank, streams, bias=False)
        self.init_own()

    @torch.no_grad()
    def init_own(self) -> None:
        nn.init.ones_(self.read_gain)
        start = torch.zeros(self.static_read_logit.shape, device=self.static_read_logit.device)
        start[:, self.layer_index % self.num_residual_streams] = 1.0
        fill(self.static_read_logit, start)
        nn.init.zeros_(self.static_write_logit)
        nn.init.constant_(self.dynamic_gate_scale, 0.01)

    def read(self, streams: Float[Tensor, '(b s) n d']) -> tuple[Tensor, Any]:
        separate = streams.unflatten(0, (-1, self.num_residual_streams)).transpose(1, 2)
        normed = rms_norm(separate) * self.read_gain
        narrow = F.silu(self.to_bottleneck(normed.flatten(-2) / self.num_residual_streams)) * self.dynamic_gate_scale
        logits = self.to_read_gate(narrow).unflatten(-1, self.static_read_logit.shape) + self.static_read_logit
        seen = (logits.sigmoid() * normed.unsqueeze(2)).mean(dim=3).movedim(2, 0)
        factors = 2.0 * (self.to_write_gate(narrow) + self.static_write_logit).sigmoid()
        return (seen if self.num_input_views > 1 else seen[0]), (separate, factors)

    def write(self, out: Float[Tensor, 'b n d'], rest: Any) -> Float[Tensor, '(b s) n d']:
        separate, factors = rest
        written: Tensor = separate + factors.unsqueeze(-1) * out.unsqueeze(2)
        return written.transpose(1, 2).flatten(0, 1)
