"""The flags of one attention layer, in addition to ``scores.py`` and ``projections.py``: positions, values, latents.

What follows from them together stands beneath them: ``rotated_heads`` (how many of the last heads are rotated),
``key_heads_from_latent`` (key heads that ``to_k`` makes), ``orthogonal_outputs`` (how many copies of their values' width reach
``to_out``), ``caches_latent``, ``tied_to_causality``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from x_transformers.flags.base import flag
from x_transformers.flags.projections import ProjectionFlags
from x_transformers.flags.reasons import MIXES, STATE, SUMS
from x_transformers.flags.rule import Rule
from x_transformers.flags.scores import CAUSAL, COMPOSABLE, COPE, PATH

BELIEF = 'https://openreview.net/forum?id=Ard2QzPAUK'
EXCLUSIVE = 'https://arxiv.org/abs/2603.09078'
FORGETTING = 'https://openreview.net/forum?id=q2Lnyegkr8'
HYBRID = 'https://arxiv.org/abs/2411.13676'
LASER = 'https://arxiv.org/abs/2411.03493'
LATENT = 'https://arxiv.org/abs/2405.04434'
VALUE_RESIDUAL = ('https://arxiv.org/abs/2410.17897', 'https://arxiv.org/abs/2412.15113')


@dataclass(frozen=True, kw_only=True, repr=False)
class AttentionFlags(ProjectionFlags):
    """Every keyword of ``Attention`` except ``dim``; in a stack with ``attn_`` or ``cross_attn_`` in front."""

    max_attend_past: int | None = flag(
        None, 'Sliding window: a query attends to at most this many positions back.', low=0, self_only=True, often=True,
        traits='near_mems', family='positions',
    )  # fmt: skip
    max_attend_future: int | None = flag(
        None, 'Window of a layer that is not causal: a query attends to at most this many positions ahead.',
        paper='https://arxiv.org/abs/2004.05150', low=0, self_only=True, since='here', family='positions',
        excludes={
            'causal': (
                'a query of a causal layer sees nothing that comes after it',
                'Use a layer that is not causal, or leave out [max_attend_future].',
            ),
        },
    )  # fmt: skip
    rotate_num_heads: int | None = flag(
        None, 'Only this many of the heads, the last ones, get rotary positions; 0: none.', low=0, traits='set_by_stack',
        family='positions',
        excludes={
            'latent_rope_subheads': (
                'the heads beside the latent are the ones that are rotated', 'Leave out [rotate_num_heads].'
            ),
        },
        rules=(
            Rule(
                ('heads', 'rotate_num_heads'),
                lambda flags, dim: flags.rotate_num_heads is not None and flags.rotate_num_heads > flags.heads,
                'there are not that many heads', {'heads': 4, 'rotate_num_heads': 5}, 'Rotate at most {heads}.',
            ),
            Rule(
                ('rotate_num_heads', 'latent_rope_subheads', 'kv_heads', 'one_kv_head'),
                lambda flags, dim: (flags.rotated_heads or flags.heads) < flags.heads and flags.num_kv_heads != flags.heads,
                'some of the heads are rotated, but {heads} query heads share {num_kv_heads} key heads, so that a rotated '
                'query would meet a key that is not', {'heads': 4, 'rotate_num_heads': 2, 'kv_heads': 2},
                'Rotate all heads, or give every query head its own key head.', only_changed=True,
            ),
        ),
    )  # fmt: skip
    data_dependent_alibi: bool = flag(
        False, 'Forgetting attention: a distance penalty from learned gates of the tokens between.', paper=FORGETTING,
        self_only=True, formula='s_ij ← s_ij + Σ_{j < t ≤ i} log σ(f_t)', traits=('own_keys', 'built_causal'),
        family='positions', refused={'context': SUMS},
    )  # fmt: skip
    data_dependent_alibi_per_row: bool = flag(
        False, 'The gates depend on the query too.', paper=FORGETTING, parent='data_dependent_alibi', self_only=True,
        rules=(
            Rule(
                ('data_dependent_alibi_per_row', 'causal'),
                lambda flags, dim: flags.data_dependent_alibi and flags.data_dependent_alibi_per_row and not flags.causal,
                'gates per query are defined for causal attention',
                {'data_dependent_alibi': True, 'data_dependent_alibi_per_row': True},
                'Use a causal layer, or leave out [data_dependent_alibi_per_row].',
            ),
        ),
    )  # fmt: skip
    data_dependent_alibi_per_row_dim_head: int = flag(
        8, 'Width of the small queries and keys of these gates.', parent='data_dependent_alibi_per_row', low=1, self_only=True
    )
    data_dependent_alibi_kwargs: Mapping[str, Any] = flag(
        {}, 'More keywords for the forgetting bias: bias_init, post_log_scale.', parent='data_dependent_alibi', self_only=True,
        rules=(
            Rule(
                ('data_dependent_alibi_kwargs',),
                lambda flags, dim: bool(
                    {*flags.data_dependent_alibi_kwargs} - {'post_log_scale', 'bias_init'}
                    or (flags.data_dependent_alibi_per_row and 'bias_init' in flags.data_dependent_alibi_kwargs)
                ),
                'the known keywords are post_log_scale and, unless the gates are per row, bias_init',
                {'data_dependent_alibi': True, 'data_dependent_alibi_kwargs': {'bias': 1.0}}, 'Use those.',
            ),
        ),
    )  # fmt: skip
    use_cope: bool = flag(
        False, 'Contextual positions: each query counts the keys whose gate it opens.', paper=COPE, self_only=True,
        traits='built_causal', family='positions',
        needs={
            'causal': ('contextual positions count the keys between a query and an earlier key', CAUSAL + '[use_cope].')
        },
    )  # fmt: skip
    cope_max_pos: int = flag(16, 'Number of contextual positions.', paper=COPE, parent='use_cope', low=1, self_only=True)
    cope_soft_onehot_pos: bool = flag(
        False, 'Contextual positions mix all position embeddings by nearness.', paper=COPE, parent='use_cope', self_only=True
    )
    cope_talking_heads: bool = flag(
        False, 'Mix the heads before contextual positions are counted.', parent='use_cope', self_only=True,
        refused={'tensor': MIXES},
    )  # fmt: skip
    use_rel_proj_pos_bias: bool = flag(
        False, 'Relative projected bias: each query mixes learned functions of the distance into its own bias.', since='2.24.0',
        self_only=True, traits='near_mems', family='positions',
    )  # fmt: skip
    rel_proj_num_distance_basis: int = flag(
        16, 'Number of these functions.', parent='use_rel_proj_pos_bias', since='2.24.0', self_only=True, low=1
    )
    rel_proj_max_dist: int = flag(
        1024, 'Distances from here on have no bias.', parent='use_rel_proj_pos_bias', since='2.24.0', self_only=True, low=1
    )
    learned_value_residual_mix: bool = flag(
        False, "The weight of the first layer's values is learned, per token and head.", paper=VALUE_RESIDUAL,
        formula='v ← m v + (1 − m) v₁, m = σ(W x)', traits='set_by_stack', family='values',
    )  # fmt: skip
    orthog_projected_values: bool = flag(
        False, "Remove the component along the token's own values from the output.", paper=BELIEF, self_only=True,
        formula='o ← o − (o · v̂) v̂, v̂ = v / |v|', traits='own_keys', family='values',
        refused={'tensor': 'it takes all heads as one vector'},
    )  # fmt: skip
    orthog_projected_values_per_head: bool = flag(
        False, 'The same, and as in 2.16.1 over all heads too; with both flags the output is given twice.', paper=BELIEF,
        self_only=True, traits='own_keys', family='values', refused={'tensor': 'it takes all heads as one vector'},
    )  # fmt: skip
    laser: bool = flag(
        False, 'Attend over the exponentials of the values and take the logarithm.', paper=LASER,
        formula='o_i = log Σ_j w_ij exp(v_j)', family='values',
    )  # fmt: skip
    laser_softclamp_value: float = flag(
        15.0, 'Values are softly clamped to this before exp.', paper=LASER, parent='laser', above=0
    )
    qkv_receive_diff_residuals: bool = flag(
        False, 'The input is three views (3, b, n, d): one each for queries, keys and values.',
        traits=('set_by_stack', 'set_for_cross'), family='values',
    )  # fmt: skip
    use_latent_q: bool = flag(
        False, 'Queries are projected from a narrow latent.', paper=LATENT, family='heads',
        needs={'dim_latent_q': 'the width of the latent is missing'},
    )  # fmt: skip
    dim_latent_q: int | None = flag(None, "Width of the queries' latent.", paper=LATENT, parent='use_latent_q', low=1)
    use_latent_kv: bool = flag(
        False, 'Multi-head latent attention (MLA): keys and values are projected from a narrow latent, which the cache stores.',
        paper=LATENT, family='heads', needs={'dim_latent_kv': 'the width of the latent is missing'},
    )  # fmt: skip
    dim_latent_kv: int | None = flag(
        None, "Width of the keys' and values' latent.", paper=LATENT, parent='use_latent_kv', low=1
    )
    latent_rope_subheads: int | None = flag(
        None, 'This many key heads bypass the latent and carry the rotary positions.', paper=LATENT, parent='use_latent_kv',
        low=1, refused={'tensor': 'heads of two kinds stand one behind the other'},
        rules=(
            Rule(
                ('latent_rope_subheads', 'heads'),
                lambda flags, dim: flags.latent_rope_subheads is not None and flags.latent_rope_subheads >= flags.num_kv_heads,
                'no key head would be left that is made of the latent ({num_kv_heads} key heads)',
                {'heads': 4, 'use_latent_kv': True, 'dim_latent_kv': 8, 'latent_rope_subheads': 4},
                'Choose fewer than {num_kv_heads}.',
            ),
        ),
    )  # fmt: skip
    hybrid_module: nn.Module | None = flag(
        None, 'A module in parallel with attention, whose outputs are averaged; the module is copied.', paper=HYBRID,
        traits=('built_causal', 'needs_tokens', 'row_order'), example=nn.Identity(), family='values',
        refused={'tensor': 'its output is for all heads, of which each process has some', 'context': STATE},
    )  # fmt: skip
    hybrid_mask_kwarg: str | None = flag(
        None, "Name of the module's keyword that takes the padding mask, if the layer is not causal.", parent='hybrid_module'
    )
    hybrid_fold_axial_dim: int | None = flag(
        None, 'The module processes every n-th token: n short sequences instead of a long one.', parent='hybrid_module', low=1
    )
    hybrid_learned_mix: bool = flag(
        False, 'The mixture of attention and module is learned, per token and head.', paper=HYBRID, parent='hybrid_module'
    )
    canon: bool = flag(
        False, 'Queries, keys and values get a causal convolution over four tokens, added.',
        paper='https://arxiv.org/abs/2512.17351', self_only=True, since='here', family='positions',
        excludes={
            'dim_latent_kv': 'keys and values are made of the latent that is cached, and not token by token',
            'tensor_product': 'keys and values are put together of cached factors, and not token by token',
            'flash_pack_seq': 'a convolution would run from one packed sequence into the next',
        },
    )  # fmt: skip
    exclusive: bool = flag(
        False, "Remove from each head's output the component along the token's own value, as it is attended to.",
        paper=EXCLUSIVE,
        self_only=True, since='here', traits='own_keys', family='values',
        rules=(
            Rule(
                ('exclusive', 'value_dim_head', 'dim_head'), lambda flags, dim: flags.exclusive and flags.value_dim == 1,
                'of a value with one channel nothing would be left', {'exclusive': True, 'value_dim_head': 1},
                'Choose wider values.', only_changed=True,
            ),
        ),
    )  # fmt: skip
    composable: bool = flag(
        False, 'Dynamically composed heads: scores, and weights, of all heads are mixed by matrices of low rank and by gates '
        'that each query and each key makes of its token; they start as plain attention.', paper=COMPOSABLE, since='here',
        family='weights', refused={'tensor': MIXES},
    )  # fmt: skip
    composable_rank: int = flag(2, 'Rank of these matrices.', paper=COMPOSABLE, parent='composable', low=1, since='here')
    path: bool = flag(
        False, 'PaTH: a query meets a key through a Householder-like factor, I - β w wᵀ, of each token behind the key up to '
        'its own; w is made through a narrow middle and a convolution over three tokens, per key head.', paper=PATH,
        self_only=True, since='here', traits=('own_keys', 'built_causal', 'near_mems'), family='positions',
        refused={'tensor': 'one narrow middle serves all key heads'},
        needs={'causal': ('a path leads from a key to a later query', CAUSAL + '[path].')},
        excludes={'l2_distance': 'the path is one of products, not of distances'},
    )  # fmt: skip
    path_rank: int = flag(32, 'Width of that middle.', paper=PATH, parent='path', low=1, self_only=True, since='here')

    @cached_property
    def rotated_heads(self) -> int | None:
        """None: all of them, of queries and of keys."""
        return self.latent_rope_subheads if self.latent_rope_subheads is not None else self.rotate_num_heads

    @cached_property
    def key_heads_from_latent(self) -> int:
        return self.num_kv_heads - (self.latent_rope_subheads or 0)

    @property
    def caches_latent(self) -> bool:
        """Whether the cache keeps what keys and values are made of."""
        return self.use_latent_kv or self.tensor_product

    @cached_property
    def orthogonal_outputs(self) -> int:
        return max(1, self.orthog_projected_values + self.orthog_projected_values_per_head)

    @cached_property
    def tied_to_causality(self) -> tuple[str, ...]:
        """The flags that are on and were built for a layer that is causal, or for one that is not."""
        return tuple(name for name in self.having('built_causal') if getattr(self, name))
