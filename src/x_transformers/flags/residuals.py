"""The flags of what branches write to the stream, and of the place of norms.

Derived: ``post_norm``, ``ends_in_norm``; ``learns_residual_scale``; ``disables_abs_pos_emb``, which is ``disable_abs_pos_emb``
or its default resolved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from x_transformers.flags.base import flag
from x_transformers.flags.layouts import LayoutFlags
from x_transformers.flags.reasons import DRAWS, SUMS, UNIT
from x_transformers.flags.rule import Rule

NGPT = 'https://arxiv.org/abs/2410.01131'
REALFORMER = 'https://arxiv.org/abs/2012.11747'
RESI_DUAL = 'https://arxiv.org/abs/2304.14802'
SANDWICH = 'https://arxiv.org/abs/2105.13290'
T5 = 'https://arxiv.org/abs/1910.10683'

# reasons that several flags have
HANDED_ON = 'scores are handed on to the next layer, and a fused kernel never has them'
SAME_HEADS = 'scores are handed on from layer to layer, so all need as many heads'
UNIT_STREAM = 'the stream, and what branches write, has unit length'


@dataclass(frozen=True, kw_only=True, repr=False)
class ResidualFlags(LayoutFlags):
    """Flags of ``StackFlags``: residuals, norms around branches, scores that are handed on."""

    residual_attn: bool = flag(
        False, "Residual attention: scores are added to the next self attention's scores.", paper=REALFORMER,
        family='residuals', excludes={'attn_flash': HANDED_ON},
        alike=(
            Rule(
                ('residual_attn', 'heads'), lambda flags, dim: flags.residual_attn and flags.differs('heads'), SAME_HEADS,
                {'residual_attn': True, 'heads': (4, 2)},
            ),
        ),
    )  # fmt: skip
    cross_residual_attn: bool = flag(
        False, "Scores are added to the next cross attention's scores.", paper=REALFORMER, family='residuals',
        excludes={'cross_attn_flash': HANDED_ON},
        rules=(
            Rule(
                ('cross_residual_attn',), lambda flags, dim: flags.cross_residual_attn and not flags.has_cross_attention,
                'there is no cross attention', {'cross_residual_attn': True}, 'Set [cross_attend], or leave this out.',
                inert=True,
            ),
        ),
        alike=(
            Rule(
                ('cross_residual_attn', 'heads'), lambda flags, dim: flags.cross_residual_attn and flags.cross_differs('heads'),
                SAME_HEADS, {'cross_attend': True, 'cross_residual_attn': True, 'heads': (4, 2)},
            ),
        ),
    )  # fmt: skip
    pre_norm: bool = flag(True, 'Norm before each branch; False: after each residual sum.', family='norms')
    pre_norm_has_final_norm: bool = flag(True, 'A norm at the end of a pre-norm stack.', family='norms')
    sandwich_norm: bool = flag(
        False, 'Also a norm after each branch.', paper=SANDWICH, family='norms',
        rules=(
            Rule(
                ('sandwich_norm', 'pre_norm', 'resi_dual'),
                lambda flags, dim: flags.sandwich_norm and (not flags.pre_norm or flags.resi_dual),
                'a sandwich has a norm in front of the branch, and post-norm has none',
                {'sandwich_norm': True, 'pre_norm': False},
            ),
        ),
    )  # fmt: skip
    gate_residual: bool = flag(
        False, 'GRU cells in place of residual sums.', paper='https://arxiv.org/abs/1910.06764', one_of='residual',
        family='residuals',
    )  # fmt: skip
    orthog_residual: bool = flag(
        False, 'Add only the component orthogonal to the stream, token by token.', paper='https://arxiv.org/abs/2505.11881',
        since='2.18.0', one_of='residual', family='residuals'
    )  # fmt: skip
    scale_residual: bool | float = flag(
        False, "Learned factors on the residual; a number: a constant factor on the branches' outputs instead.",
        paper='https://arxiv.org/abs/2110.09456', formula='x ← γ ⊙ x + f(x)', family='residuals',
        rules=(
            Rule(
                ('scale_residual', 'num_residual_streams'),
                lambda flags, dim: flags.learns_residual_scale and flags.streams > 1,
                'hyper connections learn their own factors', {'scale_residual': True, 'num_residual_streams': 2}, inert=True,
            ),
        ),
    )  # fmt: skip
    scale_residual_constant: float = flag(
        1.0, 'A constant factor on the residual.', paper='https://arxiv.org/abs/2203.00555', each='layer',
        formula='x ← c x + f(x)', family='residuals',
        idle_with={'residual': 'only a plain residual sum has a constant factor'},
    )  # fmt: skip
    residual_fn_kwargs: Mapping[str, Any] = flag({}, 'More keywords for the residual.', family='residuals')
    shift_tokens: int | tuple[int, ...] = flag(
        0, 'Replace part of the channels of each token by those of tokens next to it, up to this far; one or per layer.',
        low=0, each='layer',
        traits='row_order', family='layers',
        excludes={'attn_flash_pack_seq': 'tokens would be shifted from one packed sequence into the next'},
    )  # fmt: skip
    softclamp_output: bool = flag(
        False, 'Keep the output inside a range with tanh.', paper='https://arxiv.org/abs/2408.00118',
        formula='y ← c · tanh(y / c)', family='norms',
    )  # fmt: skip
    softclamp_output_value: float = flag(30.0, 'The largest absolute output.', parent='softclamp_output', above=0)
    zero_init_branch_output: bool = flag(False, 'Initialize the output of all branches at zero.', family='residuals')
    layer_dropout: float | tuple[float, ...] = flag(
        0.0, 'In training, skip layers with this probability; one value or one per layer.', paper='https://arxiv.org/abs/1603.09382',
        low=0.0, high=1.0, each='layer', family='layers',
        refused={
            'context': 'a slice that follows others drops no layer',
            'pipeline': 'what a layer that is left out hands on is missing in the next stage',
        },
    )  # fmt: skip
    cross_attn_tokens_dropout: float = flag(
        0.0, 'In training, drop this fraction of the context.', parent='cross_attend', low=0.0, high=1.0,
        refused={'context': DRAWS},
    )  # fmt: skip
    disable_abs_pos_emb: bool | None = flag(
        None,
        'The model adds no absolute positions; None: True with T5 bias, rotary and polar positions.',
        family='positions',
    )
    pre_and_post_norm: bool = flag(
        False, 'Norm before each branch and again after each residual sum; no final norm.', since='2.17.0', family='norms',
        excludes={'resi_dual': 'each says where the norms are'},
    )  # fmt: skip
    norm_before: bool = flag(
        True, 'Branches have a norm before them, unless norms come after the sum; False: they read the stream without a norm.',
        paper='https://arxiv.org/abs/2501.00656', since='here', each='layer', family='norms',
        rules=(
            Rule(
                ('norm_before', 'pre_norm', 'resi_dual', 'gated_multi_residual'),
                lambda flags, dim: not flags.norm_before and (not flags.pre_norm or flags.resi_dual or flags.gated_streams),
                'no norm stands before a branch there', {'norm_before': False, 'pre_norm': False}, 'Leave out [norm_before].',
            ),
        ),
    )  # fmt: skip
    layer_norm_scaling: bool = flag(
        False, 'The output of the norm before a branch is divided by the square root of the block number, counted from 1.',
        paper='https://arxiv.org/abs/2502.05795', since='here', family='norms',
        rules=(
            Rule(
                ('layer_norm_scaling', 'pre_norm', 'resi_dual', 'gated_multi_residual', 'weight_tie_layers'),
                lambda flags, dim: (
                    flags.layer_norm_scaling
                    and (not flags.pre_norm or flags.resi_dual or flags.gated_streams or flags.weight_tie_layers)
                ),
                'it scales the norm in front of each branch, by the number of its block',
                {'layer_norm_scaling': True, 'pre_norm': False}, 'Use pre-norm layers that are not shared.', only_changed=True,
            ),
        ),
    )  # fmt: skip
    depth_scale_residual: bool | float = flag(
        False,
        'Output projections start smaller the deeper they are, with variance 1 / (2 · width · block); a number: a constant '
        "factor on the branches' outputs instead.",
        paper=('https://arxiv.org/abs/2309.16620', 'https://arxiv.org/abs/2310.02244'), since='2.31.10', family='residuals',
        rules=(
            Rule(
                ('depth_scale_residual', 'attn_aggregated_residuals'),
                lambda flags, dim: flags.depth_scale_residual is not False and flags.attn_aggregated_residuals,
                'what branches see is a weighted mean already, which does not grow with the depth',
                {
                    'depth_scale_residual': True, 'attn_aggregated_residuals': True,
                    'attn_aggregated_residual_kwargs': {'lora_rank': 2},
                },
                inert=True,
            ),
        ),
    )  # fmt: skip
    mv_split_residual: bool = flag(
        False, 'Branches write the mean over time (so far, in causal stacks) and the deviation from it with different factors.',
        paper='https://arxiv.org/abs/2605.06169', since='2.19.0', one_of='residual', traits='row_order', family='residuals',
        refused={'sequence parallel': 'its residual is a mean over all rows before', 'context': SUMS},
        excludes={'attn_flash_pack_seq': 'its means would run over all sequences of a row'},
        rules=(
            Rule(
                ('mv_split_residual', 'scale_residual', 'scale_residual_constant'),
                lambda flags, dim: (
                    flags.mv_split_residual
                    and (flags.learns_residual_scale or flags.scale_residual_constant != 1)
                ),
                'the mean and the deviation have factors of their own', {'mv_split_residual': True, 'scale_residual': True},
                only_changed=True,
            ),
        ),
    )  # fmt: skip
    parallel_block: bool = flag(
        False, 'All layers of a block read its input, each through its own norm, and their outputs are added to it.',
        paper='https://arxiv.org/abs/2204.02311', since='here', one_of='residual',
        formula='x ← x + attention(norm₁ x) + feed-forward(norm₂ x)', traits='entering', family='layers',
        excludes={
            ('layout', 'layers_execute_order'): 'layers side by side are those of one block, and these layouts have none',
            'layer_dropout': 'the first layer of a block hands on to the others what they read, so it cannot be left out',
        },
        rules=(
            Rule(
                ('parallel_block', 'only_attn', 'only_cross', 'cross_attend'),
                lambda flags, dim: flags.parallel_block and flags.only_attn and (flags.only_cross or not flags.cross_attend),
                'a block of one layer has none beside it', {'parallel_block': True, 'only_attn': True}, only_changed=True,
            ),
            Rule(
                ('parallel_block', 'pre_norm', 'pre_and_post_norm'),
                lambda flags, dim: flags.parallel_block and flags.post_norm,
                'layers side by side have no sum of their own that a norm could follow',
                {'parallel_block': True, 'pre_norm': False}, only_changed=True,
            ),
            Rule(
                ('parallel_block', 'scale_residual'), lambda flags, dim: flags.parallel_block and flags.learns_residual_scale,
                'only a plain residual sum learns a factor', {'parallel_block': True, 'scale_residual': True},
            ),
        ),
    )  # fmt: skip
    ngpt: bool = flag(
        False, 'Normalized transformer: stream, weights, queries and keys have unit length, there are no norms, and no biases '
        "in feed-forwards; each branch turns the stream by a learned share per channel, which starts at 0.05 ('rate' of "
        'residual_fn_kwargs). Weights keep their length by `normalize_weights_()` after each step of an optimizer.', paper=NGPT,
        since='here', one_of='residual', formula='x ← norm(x + |α| (norm(branch(x)) − x))', family='residuals',
        refused={'tensor': UNIT},
        excludes={
            (
                'norm', 'sandwich_norm', 'pre_and_post_norm', 'layer_norm_scaling', 'scale_residual', 'scale_residual_constant',
                'depth_scale_residual', 'zero_init_branch_output',
            ): UNIT_STREAM,
        },
        rules=(
            Rule(
                ('ngpt', 'pre_norm'), lambda flags, dim: flags.ngpt and not flags.pre_norm, UNIT_STREAM,
                {'ngpt': True, 'pre_norm': False},
            ),
        ),
    )  # fmt: skip
    resi_dual: bool = flag(
        False, 'ResiDual: post-norm layers, and the sum of all branches is added at the end.', paper=RESI_DUAL, since='here',
        one_of='residual', traits='entering', family='norms',
    )  # fmt: skip
    resi_dual_scale: float = flag(1.0, 'Factor of the second residual.', paper=RESI_DUAL, parent='resi_dual', since='here')

    @property
    def post_norm(self) -> bool:
        """Norms stand behind the residual sums."""
        return not self.pre_norm or self.resi_dual or self.pre_and_post_norm

    @property
    def learns_residual_scale(self) -> bool:
        return self.scale_residual is True

    @property
    def ends_in_norm(self) -> bool:
        """Norms stand so that the stream needs one at the end of the stack."""
        before_alone = self.pre_norm and self.pre_norm_has_final_norm and not self.pre_and_post_norm and not self.ngpt
        return self.resi_dual or before_alone

    def constant_scale(self, *, by_depth: bool) -> float:
        """The constant factor on what branches write, of ``depth_scale_residual`` or else of ``scale_residual``."""
        for scale in (by_depth and self.depth_scale_residual, self.scale_residual):
            if not isinstance(scale, bool):
                return float(scale)
        return 1.0

    @cached_property
    def disables_abs_pos_emb(self) -> bool:
        if self.disable_abs_pos_emb is not None:
            return self.disable_abs_pos_emb
        return self.rel_pos_bias or self.rotary or self.polar

    def keywords_of_part(self, part: str, typed: Mapping[str, Any]) -> dict[str, Any]:
        """A part's keywords with those that the stack sets."""
        keywords = super().keywords_of_part(part, typed)
        if self.ngpt:
            keywords['unit_weights'] = True
        if self.zero_init_branch_output:
            keywords['zero_init_output'] = True
        return keywords
