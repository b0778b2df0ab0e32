"""The flags of models whose inputs are vectors, several ids per position, or numbers among tokens.

What they share with ``TransformerWrapper`` is declared there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from x_transformers.flags.base import REQUIRED, Flags, default_of, flag
from x_transformers.flags.rule import Rule
from x_transformers.flags.wrapper import WrapperFlags, of_token_models

STACK = 'The stack: Encoder, Decoder, PrefixDecoder or CrossAttender.'
XVAL = 'https://arxiv.org/abs/2310.02989'


def same(name: str) -> Any:
    """The flag of this name of ``TransformerWrapper``."""
    its_field = WrapperFlags.flag_fields()[name]
    return dataclasses.field(default=default_of(its_field), metadata=its_field.metadata)


def bad_names(names: Mapping[str, Any]) -> list[str]:
    """Those that no key of a ``torch.nn.ModuleDict`` can have."""
    taken = nn.ModuleDict()
    return [name for name in names if not isinstance(name, str) or not name or '.' in name or hasattr(taken, name)]


class OtherInputs(Flags):
    """Base of these: what they lack of ``TransformerWrapper`` is said to be its own."""

    @classmethod
    def elsewhere(cls) -> Mapping[str, str]:
        return of_token_models()


@dataclass(frozen=True, kw_only=True, repr=False)
class ContinuousFlags(OtherInputs):
    """Every keyword of ``ContinuousTransformerWrapper``."""

    attn_layers: nn.Module = flag(REQUIRED, STACK)
    max_seq_len: int | None = flag(
        None, 'Longest sequence, for absolute positions; None or 0: no absolute positions, no window.', low=0
    )
    dim_in: int | None = flag(
        None, 'Width of the inputs, which are then projected; None: no projection.', low=1,
        excludes={'project_in': 'each is a projection of the inputs'},
    )  # fmt: skip
    dim_out: int | None = flag(
        None, 'Width of the outputs; None: no projection.', low=1,
        excludes={'project_out': 'each is a projection to the outputs'},
    )  # fmt: skip
    emb_dim: int | None = same('emb_dim')
    max_mem_len: int = same('max_mem_len')
    num_memory_tokens: int | None = same('num_memory_tokens')
    post_emb_norm: bool = same('post_emb_norm')
    emb_dropout: float = same('emb_dropout')
    use_abs_pos_emb: bool = same('use_abs_pos_emb')
    scaled_sinu_pos_emb: bool = same('scaled_sinu_pos_emb')
    average_pool_embed: bool = flag(False, 'One output for a sequence, of the mean over time.', traits='no_cache')
    probabilistic: bool = flag(
        False, 'The outputs are means and variances.',
        rules=(
            Rule(
                ('probabilistic', 'dim_out'),
                lambda flags, dim: flags.probabilistic and flags.dim_out is None and flags.project_out is None and dim % 2 != 0,
                'without a projection the {dim} channels of the stack are means and variances in turn, so they must be even',
                {'probabilistic': True, 'dim': 7}, 'Give `dim_out`.',
            ),
        ),
    )  # fmt: skip
    project_in: nn.Module | None = flag(None, 'Your own projection of the inputs.', example=nn.Identity())
    project_out: nn.Module | None = flag(None, 'Your own projection to the outputs.', example=nn.Identity())
    use_identity_if_same_dim: bool = flag(
        False, 'No projection where the width of inputs or outputs is that of the embeddings.', since='2.31.10'
    )
    extend_mems: bool = flag(
        False,
        'Memories that are returned go on from those given, as those of token models do; off: they are of this segment only.',
        parent='max_mem_len',
    )


@dataclass(frozen=True, kw_only=True, repr=False)
class MultiInputFlags(OtherInputs):
    """Every keyword of ``MultiInputTransformerWrapper``."""

    num_tokens: Mapping[str, int] = flag(
        {}, 'The inputs: name and size of the vocabulary of each.',
        rules=(
            Rule(
                ('num_tokens',),
                lambda flags, dim: (
                    not flags.num_tokens
                    or any(
                        not isinstance(size, int) or isinstance(size, bool) or size < 1 for size in flags.num_tokens.values()
                    )
                ),
                'there must be at least one input, and each name needs the size of its vocabulary, a whole number from 1',
                {'num_tokens': {'note': 0}}, 'Give names and sizes.',
            ),
            Rule(
                ('num_tokens',), lambda flags, dim: bool(bad_names(flags.num_tokens)),
                'a name must be a string without dots that is no method of a torch.nn.ModuleDict, such as keys or type',
                {'num_tokens': {'note.pitch': 3}}, 'Choose other names.',
            ),
        ),
    )  # fmt: skip
    max_seq_len: int = same('max_seq_len')
    attn_layers: nn.Module = flag(REQUIRED, STACK)
    emb_dim: int | None = same('emb_dim')
    max_mem_len: int = same('max_mem_len')
    shift_mem_down: int = same('shift_mem_down')
    emb_dropout: float = same('emb_dropout')
    post_emb_norm: bool = same('post_emb_norm')
    num_memory_tokens: int | None = same('num_memory_tokens')
    memory_tokens_interspersed_every: int | None = same('memory_tokens_interspersed_every')
    return_only_embed: bool = same('return_only_embed')
    use_abs_pos_emb: bool = same('use_abs_pos_emb')
    scaled_sinu_pos_emb: bool = same('scaled_sinu_pos_emb')
    emb_frac_gradient: float = same('emb_frac_gradient')
    attn_z_loss_weight: float = same('attn_z_loss_weight')


@dataclass(frozen=True, kw_only=True, repr=False)
class XValFlags(OtherInputs):
    """Every keyword of ``XValTransformerWrapper``."""

    num_tokens: int = same('num_tokens')
    max_seq_len: int = same('max_seq_len')
    numerical_token_id: int = flag(
        REQUIRED, 'The token that stands for a number.', paper=XVAL, low=0,
        rules=(
            Rule(
                ('numerical_token_id', 'num_tokens'), lambda flags, dim: flags.numerical_token_id >= flags.num_tokens,
                'the number token must be one of the vocabulary, 0 … {num_tokens} - 1', {'numerical_token_id': 50},
                'Choose a smaller id or a larger vocabulary.',
            ),
        ),
    )  # fmt: skip
    attn_layers: nn.Module = flag(REQUIRED, STACK)
    emb_dim: int | None = same('emb_dim')
    logits_dim: int | None = same('logits_dim')
    tie_embedding: bool = same('tie_embedding')
    max_mem_len: int = same('max_mem_len')
    num_memory_tokens: int | None = same('num_memory_tokens')
    emb_dropout: float = same('emb_dropout')
    use_abs_pos_emb: bool = same('use_abs_pos_emb')
    scaled_sinu_pos_emb: bool = same('scaled_sinu_pos_emb')
