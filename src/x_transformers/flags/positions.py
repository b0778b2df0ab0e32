"""The flags of positions that all layers share, and properties derived from them.

Derived: ``rotary``, ``rotary_dim``, ``rotary_by_length``; ``polar``; ``position_bias``, the flag's name or None;
``alibi_heads``; ``depends_on_places``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from x_transformers.flags.base import flag
from x_transformers.flags.norms import NormFlags
from x_transformers.flags.rotary_scaling import BY_LENGTH, complaints
from x_transformers.flags.rule import Rule

DYNAMIC = 'https://arxiv.org/abs/2108.00154'
GRID = 'https://arxiv.org/abs/2403.13298'
NOPE = 'https://arxiv.org/abs/2501.18795'
POLAR = 'https://arxiv.org/abs/2509.10534'
ROTARY = 'https://arxiv.org/abs/2104.09864'
T5 = 'https://arxiv.org/abs/1910.10683'
XPOS = 'https://arxiv.org/abs/2212.10554'

# a reason that two rules have
ALL_TURN = 'each head turns in its own way, so all of them turn'

ANY_POSITION_BIAS = ('alibi_pos_bias', 'rel_pos_bias', 'dynamic_pos_bias')
ANY_ROTARY = ('rotary_pos_emb', 'rotary_xpos')


@dataclass(frozen=True, kw_only=True, repr=False)
class PositionFlags(NormFlags):
    """Flags of ``StackFlags``: biases by distance, rotary and polar positions."""

    alibi_pos_bias: bool = flag(
        False, 'ALiBi: a penalty that grows with the distance, one slope per head.', paper='https://arxiv.org/abs/2108.12409',
        formula='s_ij ← s_ij − m_h |i − j|', family='positions',
    )  # fmt: skip
    alibi_num_heads: int | None = flag(
        None, 'Only the first heads get a penalty, this many; None: all.', parent='alibi_pos_bias', low=1,
        rules=(
            Rule(
                ('alibi_num_heads', 'heads'), lambda flags, dim: flags.alibi_heads > flags.heads,
                'there are not that many heads', {'alibi_pos_bias': True, 'alibi_num_heads': 9}, 'Choose at most {heads}.',
            ),
        ),
    )  # fmt: skip
    rel_pos_bias: bool = flag(
        False, 'A learned bias per bucket of distances (T5 relative positions).', paper=T5,
        formula='s_ij ← s_ij + √d_head · b_h[bucket(i − j)]', family='positions',
    )  # fmt: skip
    rel_pos_num_buckets: int = flag(
        32, 'Number of buckets.', paper=T5, parent='rel_pos_bias', low=2,
        rules=(
            Rule(
                ('rel_pos_num_buckets', 'rel_pos_max_distance'),
                lambda flags, dim: flags.rel_pos_bias and flags.rel_pos_num_buckets > flags.rel_pos_max_distance,
                'there would be more buckets than distances', {'rel_pos_bias': True, 'rel_pos_max_distance': 16},
                'Choose at most as many buckets as the largest distance.',
            ),
            Rule(
                ('rel_pos_num_buckets', 'causal'),
                lambda flags, dim: flags.rel_pos_bias and not flags.causal and flags.rel_pos_num_buckets < 4,
                'each direction needs two buckets', {'rel_pos_bias': True, 'rel_pos_num_buckets': 2}, 'Choose at least 4.',
            ),
        ),
    )  # fmt: skip
    rel_pos_max_distance: int = flag(128, 'Distances from here on share a bucket.', paper=T5, parent='rel_pos_bias', low=2)
    dynamic_pos_bias: bool = flag(
        False, 'A small network computes the bias of each distance.', paper=DYNAMIC, family='positions'
    )
    dynamic_pos_bias_log_distance: bool = flag(
        False, 'The network reads the logarithm of the distance.', paper='https://arxiv.org/abs/2111.09883',
        parent='dynamic_pos_bias',
    )  # fmt: skip
    dynamic_pos_bias_mlp_depth: int = flag(2, 'Depth of that network.', parent='dynamic_pos_bias', low=1)
    dynamic_pos_bias_norm: bool = flag(False, 'Norms inside that network.', parent='dynamic_pos_bias')
    rel_pos_kwargs: Mapping[str, Any] = flag(
        {}, 'More keywords for the position bias, such as slopes for ALiBi.', parent=ANY_POSITION_BIAS
    )
    rotary_pos_emb: bool = flag(False, 'Rotary positions (RoPE): rotate queries and keys by their positions.', paper=ROTARY,
                                often=True,
        formula='channels 2p, 2p + 1 of q_i and k_i turn by i · 10000^(−2p / d_rotated)', family='positions'
    )  # fmt: skip
    rotary_emb_dim: int | None = flag(
        None, 'Rotate this many channels of each head; None: half.', paper=ROTARY, parent=ANY_ROTARY, low=2,
        rules=(
            Rule(
                ('rotary_emb_dim', 'attn_dim_head'),
                lambda flags, dim: flags.rotary and flags.rotary_dim + flags.rotary_dim % 2 > flags.attn_dim_head,
                'more channels (in pairs) would be rotated than a head has', {'rotary_pos_emb': True, 'rotary_emb_dim': 66},
                'Rotate at most {attn_dim_head}.',
            ),
        ),
    )  # fmt: skip
    rotary_xpos: bool = flag(
        False, 'Rotary positions that also decay with the distance; turns them on.', paper=XPOS, family='positions',
        needs={
            'causal': (
                'the decay with the distance would grow towards the right', 'Use a causal stack, or plain [rotary_pos_emb].'
            ),
        },
    )  # fmt: skip
    rotary_interpolation_factor: float = flag(
        1.0, 'Divide positions by this, for longer sequences.', paper='https://arxiv.org/abs/2306.15595', parent=ANY_ROTARY,
        low=1.0,
    )  # fmt: skip
    rotary_xpos_scale_base: float = flag(
        512, 'How slowly the decay grows with the distance.', paper=XPOS, parent='rotary_xpos', above=0
    )
    rotary_base_rescale_factor: float = flag(
        1.0, 'Stretch the wavelengths for longer sequences (NTK-aware scaling).', above=0, parent=ANY_ROTARY,
        paper='https://www.reddit.com/r/LocalLLaMA/comments/14lz7j5/',
        rules=(
            Rule(
                ('rotary_base_rescale_factor', 'rotary_emb_dim'),
                lambda flags, dim: flags.rotary and flags.rotary_base_rescale_factor != 1 and flags.rotary_dim == 2,
                'one pair of channels has one wavelength, 2π, which no base can stretch',
                {'rotary_pos_emb': True, 'rotary_base_rescale_factor': 2.0, 'rotary_emb_dim': 2}, 'Rotate more channels.',
            ),
        ),
    )  # fmt: skip
    rotate_num_heads: int | None = flag(
        None, 'Rotate only this many heads of self attention, the last ones; 0 in some of the layers: these read no positions.',
        paper=(ROTARY, NOPE), parent=ANY_ROTARY, low=0, each='attention',
        refused={'tensor': 'the last of all heads are counted'},
        rules=(
            Rule(
                ('rotate_num_heads', 'rotary_pos_emb', 'rotary_xpos'),
                lambda flags, dim: flags.rotary and flags.rotate_num_heads == 0,
                'no head turns, so that rotary positions do nothing', {'rotary_pos_emb': True, 'rotate_num_heads': 0},
                'Give 0 to some of the layers only.', only_changed=True, inert=True,
            ),
        ),
    )  # fmt: skip
    polar_pos_emb: bool = flag(
        False, 'Polar positions: content sets the length, position the angle.', paper=POLAR, family='positions',
        excludes={
            ('rotary_pos_emb', 'rotary_xpos'): 'both turn queries and keys by their positions',
            'attn_use_cope': 'contextual positions are asked by queries as wide as a head, and polar ones are twice as wide',
            ('ngpt', 'attn_unit_weights'): 'it makes queries and keys of twice the width, which have no unit length',
        },
        alike=(
            Rule(
                ('polar_pos_emb', 'heads', 'attn_dim_head'),
                lambda flags, dim: flags.polar and flags.differs('heads', 'dim_head'),
                'one learned angle per head and channel serves all layers', {'polar_pos_emb': True, 'attn_dim_head': (8, 4)},
                only_changed=True,
            ),
        ),
    )  # fmt: skip
    polar_bias_uniform_init: bool = flag(
        False, 'The learned angles start spread instead of at zero.', paper=POLAR, parent='polar_pos_emb'
    )
    rotary_axes: tuple[int, ...] | None = flag(
        None, 'Rotary positions on a grid: tokens are its cells, row by row, such as (14, 14) for rows and columns, or '
        '(8, 14, 14) with frames in front; the first axis may go on. Pairs of channels belong to the axes in turn, the last '
        'axis first; the paper takes rotary_theta=100.', paper=GRID, parent='rotary_pos_emb', low=1, since='here',
        example=(4, 4),
        excludes={
            ('rotary_xpos', 'rotary_scaling', 'rotary_base_rescale_factor'): (
                'that is about distances in one line, and tokens lie on a grid'
            ),
        },
        rules=(
            Rule(
                ('rotary_axes',), lambda flags, dim: flags.rotary_axes is not None and len(flags.rotary_axes) not in (2, 3),
                'a grid has two or three axes', {'rotary_pos_emb': True, 'rotary_axes': (4,)},
                'Give (rows, columns), or (frames, rows, columns).',
            ),
            Rule(
                ('rotary_axes', 'rotary_emb_dim'),
                lambda flags, dim: flags.rotary_axes is not None and flags.rotary_dim < 2 * len(flags.rotary_axes),
                'each axis turns at least one pair of channels, but {rotary_dim} channels turn',
                {'rotary_pos_emb': True, 'rotary_axes': (4, 4), 'rotary_emb_dim': 2}, 'Turn more channels.', only_changed=True,
            ),
        ),
    )  # fmt: skip
    rotary_axes_mixed: bool = flag(
        False, 'Each pair turns by a learned sum over the axes, of its own in each layer and key head; it starts along random '
        'orthogonal directions.', paper=GRID, parent='rotary_axes', since='here',
        refused={'tensor': 'each key head turns in its own way, and positions are made for all of them'},
        excludes={
            ('rotate_num_heads', 'attn_latent_rope_subheads'): ALL_TURN,
            'kv_share_every': 'each layer turns its queries and keys in its own way',
        },
        rules=(
            Rule(
                ('rotary_axes_mixed', 'rotate_num_heads'),
                lambda flags, dim: flags.rotary_axes_mixed and flags.rotate_num_heads == 0, ALL_TURN,
                {'rotary_pos_emb': True, 'rotary_axes': (4, 4), 'rotary_axes_mixed': True, 'rotate_num_heads': 0},
            ),
        ),
    )  # fmt: skip
    rotary_theta: float = flag(
        10000.0, 'Base of the wavelengths: the slowest pair turns once in about 2π times this many tokens.', paper=ROTARY,
        parent=ANY_ROTARY, above=0, since='here', each='attention',
    )  # fmt: skip
    rotary_whole_head: bool = flag(
        False, 'Rotate all channels of each head.', paper=ROTARY, parent=ANY_ROTARY, since='here',
        excludes={
            'rotary_emb_dim': ('the one rotates all channels of a head, the other so many', 'Leave one of them out.'),
        },
    )  # fmt: skip
    rotary_scaling: Mapping[str, Any] | None = flag(
        None, "Other frequencies for longer sequences: {'type': 'linear', 'factor': 4.0}, or dynamic, yarn, llama3, longrope.",
        paper=('https://arxiv.org/abs/2309.00071', 'https://arxiv.org/abs/2407.21783', 'https://arxiv.org/abs/2402.13753'),
        parent=ANY_ROTARY, since='here', each='attention', example={'type': 'linear', 'factor': 2.0},
        excludes={
            ('rotary_interpolation_factor', 'rotary_base_rescale_factor', 'rotary_xpos'): (
                'each is a way to reach longer sequences', 'Keep one.'
            ),
        },
        rules=(
            Rule(
                ('rotary_scaling',), lambda flags, dim: bool(flags.rotary_scaling_complaints),
                'its type and its numbers do not fit: {rotary_scaling_complaints}',
                {'rotary_pos_emb': True, 'rotary_scaling': {'type': 'yarn', 'factor': 2.0}}, 'Give what its type needs.',
            ),
            Rule(
                ('rotary_scaling', 'attn_flash_pack_seq'),
                lambda flags, dim: flags.rotary_by_length and flags.attention.flash_pack_seq,
                'these frequencies depend on how long a sequence is, and a packed row holds several', {
                    'rotary_pos_emb': True, 'attn_flash_pack_seq': True,
                    'rotary_scaling': {'type': 'dynamic', 'factor': 2.0, 'original_length': 4},
                },
            ),
        ),
    )  # fmt: skip
    rotary_layout: str = flag(
        'interleaved', "Which channels turn together: neighbours, or 'halves': the k-th of both halves.", parent=ANY_ROTARY,
        since='here', among=('interleaved', 'halves'),
        rules=(
            Rule(
                ('rotary_layout', 'rotary_emb_dim'),
                lambda flags, dim: flags.rotary and flags.rotary_layout == 'halves' and flags.rotary_dim % 2 != 0,
                'two halves have an even number of channels',
                {'rotary_pos_emb': True, 'rotary_layout': 'halves', 'rotary_emb_dim': 5},
            ),
        ),
    )  # fmt: skip

    @cached_property
    def rotary(self) -> bool:
        return self.rotary_pos_emb or self.rotary_xpos

    @cached_property
    def depends_on_places(self) -> bool:
        """Whether a turned query meets something that is not turned: learned keys have no place, contextual positions neither.
        Or whether scales that cancel in products, those of xpos, are compared by distance. Or whether the length counts. Or
        whether channels that turn together have gains of their own behind the turn, as queries of unit length have.

        Then it matters where a row begins; otherwise only distances between places do.
        """
        on_grid = self.rotary and self.rotary_axes is not None
        return (
            on_grid
            or self.rotary_by_length
            or any(
                attention.num_mem_kv > 0
                or attention.use_cope
                or (self.rotary_xpos and attention.l2_distance)
                or (self.rotary and attention.unit_weights)
                for attention in self.attentions
            )
        )

    @cached_property
    def rotary_dim(self) -> int:
        narrowest = min((flags.dim_head for flags in self.attentions), default=self.attn_dim_head)
        usual = narrowest if self.rotary_whole_head else narrowest // 2
        return usual if self.rotary_emb_dim is None else self.rotary_emb_dim

    @cached_property
    def rotary_by_length(self) -> bool:
        """Whether the frequencies of any layer depend on how long the sequence is."""
        scalings = self.varying.get('rotary_scaling', (self.rotary_scaling,))
        return any(scaling is not None and scaling.get('type') in BY_LENGTH for scaling in scalings)

    @cached_property
    def rotary_scaling_complaints(self) -> str:
        return '' if self.rotary_scaling is None else '; '.join(complaints(self.rotary_scaling, self.rotary_dim))

    @cached_property
    def polar(self) -> bool:
        return self.polar_pos_emb

    @cached_property
    def position_bias(self) -> str | None:
        """The flag that chose a position bias of the stack: alibi_pos_bias, rel_pos_bias, dynamic_pos_bias or None."""
        return next((name for name in ANY_POSITION_BIAS if getattr(self, name)), None)

    @cached_property
    def alibi_heads(self) -> int:
        return self.heads if self.alibi_num_heads is None else self.alibi_num_heads
