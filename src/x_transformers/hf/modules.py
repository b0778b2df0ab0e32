"""Modules that published models need beside those that flags build."""

from __future__ import annotations

from torch import Tensor

from x_transformers.module import Module
from x_transformers.position.absolute import Table, look_up
from x_transformers.tensor_types import Float, Int


class TypedTokenEmbedding(Module):
    """Token vectors plus those of the segment that a token belongs to, as in BERT (https://arxiv.org/abs/1810.04805).

    forward: x (b n) and, by ``token_emb_kwargs``, ``token_type_ids`` (b n); without them all tokens are of type 0.
    """

    def __init__(self, dim: int, num_tokens: int, num_types: int) -> None:
        super().__init__()
        self.emb = Table(num_tokens, dim, std=0.02)
        self.types = Table(num_types, dim, std=0.02)

    def forward(self, x: Int[Tensor, 'b n'], token_type_ids: Int[Tensor, 'b n'] | None = None) -> Float[Tensor, 'b n d']:
        vectors = look_up(self.emb, x, 'x: token ids')
        if token_type_ids is None:
            return vectors + look_up(self.types, x.new_zeros(x.shape), 'token_type_ids')
        # with a cache the ids of all tokens may be given, of which the newest are asked
        return vectors + look_up(self.types, token_type_ids[..., -x.shape[-1] :], 'token_type_ids')
