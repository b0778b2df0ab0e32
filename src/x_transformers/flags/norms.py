"""The flags of the norms in a stack, and of the conditions that norms and branches depend on.

Derived: ``norm_kind``; ``norm_needs_condition``, ``branch_needs_condition``, ``needs_condition``; ``condition_dim``, what the
caller gives, and ``condition_width``, what norms and scales receive.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from x_transformers.flags.base import flag
from x_transformers.flags.rule import Rule
from x_transformers.flags.structure import StructureFlags

ADAPTIVE_SCALE = 'https://arxiv.org/abs/2212.09748'

ADAPTIVE = ('use_adaptive_layernorm', 'use_adaptive_rmsnorm', 'use_adaptive_layerscale')


@dataclass(frozen=True, kw_only=True, repr=False)
class NormFlags(StructureFlags):
    """Flags of ``StackFlags``: which norm, and what its gains are made of."""

    use_scalenorm: bool = flag(
        False, 'Norms have one gain.', paper='https://arxiv.org/abs/1910.05895', one_of='norm', formula='g √d x / |x|',
        family='norms',
    )  # fmt: skip
    use_rmsnorm: bool = flag(
        False, 'RMS norm: norms do not subtract the mean.', paper='https://arxiv.org/abs/1910.07467', one_of='norm', often=True,
        formula='γ ⊙ √d x / |x|', family='norms',
    )  # fmt: skip
    use_dynamic_tanh: bool = flag(
        False, 'tanh in place of norms.', paper='https://arxiv.org/abs/2503.10622', one_of='norm',
        formula='γ ⊙ tanh(α x) + β', family='norms',
        rules=(
            Rule(
                ('use_dynamic_tanh', 'pre_norm', 'resi_dual'),
                lambda flags, dim: flags.use_dynamic_tanh and (not flags.pre_norm or flags.resi_dual),
                'tanh in the place of a norm must not lie on the residual stream',
                {'use_dynamic_tanh': True, 'pre_norm': False},
            ),
        ),
    )  # fmt: skip
    dynamic_tanh_init_alpha: float = flag(
        1.0, 'Factor inside tanh at the start.', paper='https://arxiv.org/abs/2503.10622', parent='use_dynamic_tanh'
    )
    use_derf: bool = flag(
        False, 'The error function in place of norms.', paper='https://arxiv.org/abs/2512.10938', one_of='norm',
        formula='γ ⊙ erf(α x + s) + β', family='norms',
    )  # fmt: skip
    use_simple_rmsnorm: bool = flag(False, 'RMS norms without gains.', one_of='norm', formula='√d x / |x|', family='norms')
    use_adaptive_layernorm: bool = flag(False, 'The gains of layer norms come from a condition.', one_of='norm', family='norms')
    use_adaptive_rmsnorm: bool = flag(False, 'The gains of RMS norms come from a condition.', one_of='norm', family='norms')
    use_adaptive_layerscale: bool = flag(
        False, 'Branches are scaled by a sigmoid gate of a condition.', paper=ADAPTIVE_SCALE, family='norms'
    )
    norm_add_unit_offset: bool = flag(True, 'Gains are stored minus 1, so that weight decay pulls to 1.', family='norms')
    dim_condition: int | None = flag(None, 'Width of the condition; None: dim.', parent=ADAPTIVE, low=1)
    adaptive_condition_mlp: bool = flag(False, 'The condition goes through a SiLU layer first.', parent=ADAPTIVE)
    adaptive_condition_mlp_expansion: int = flag(
        4, 'Width of that layer as a multiple.', parent='adaptive_condition_mlp', low=1
    )
    norm_eps: float | None = flag(
        None, 'Added under the root in norms; None: 1e-5 in layer norms, nothing in the others.', above=0, since='here',
        family='norms', excludes={('use_dynamic_tanh', 'use_derf'): 'there is no root that it could be added under'},
    )  # fmt: skip
    norm_bias: bool = flag(
        False, 'Layer norms have a bias.', since='here', family='norms',
        excludes={'norm': 'only layer norms have a bias that can be asked for'},
    )  # fmt: skip

    @cached_property
    def norm_kind(self) -> str:
        """The name of the norm: that of its flag without ``use_``."""
        return next((name.removeprefix('use_') for name in self.one_of('norm') if getattr(self, name)), 'layernorm')

    @cached_property
    def norm_needs_condition(self) -> bool:
        return self.use_adaptive_layernorm or self.use_adaptive_rmsnorm

    @cached_property
    def branch_needs_condition(self) -> bool:
        return self.use_adaptive_layerscale

    @cached_property
    def needs_condition(self) -> bool:
        return self.norm_needs_condition or self.branch_needs_condition

    @cached_property
    def condition_dim(self) -> int:
        return self.dim if self.dim_condition is None else self.dim_condition

    @cached_property
    def condition_width(self) -> int:
        return self.condition_dim * (self.adaptive_condition_mlp_expansion if self.adaptive_condition_mlp else 1)
