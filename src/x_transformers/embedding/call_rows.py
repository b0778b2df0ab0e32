"""The rows of one call of a model: arranged by its arguments, and checked against the model's flags."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from x_transformers.embedding.call import Memories, ModelArgs, longest
from x_transformers.embedding.memory_tokens import MemoryTokens
from x_transformers.embedding.rows import Rows
from x_transformers.position.absolute import AbsolutePositionalEmbedding
from x_transformers.tensor_types import Int


def behind_mems(pos: Int[Tensor, '...'], mems: Memories | None, rows: Rows) -> Int[Tensor, '...']:
    """Positions of the tokens, of some that may begin with those of the memories, which rotary positions need."""
    length = longest(mems)
    return pos[..., length:] if length and pos.shape[-1] == length + rows.tokens else pos


def rows_of_call(model: Any, call: ModelArgs) -> Rows:
    """The rows of one forward of a model. Raises ValueError where they do not go together with its flags."""
    memory = MemoryTokens(model.num_memory_tokens, model.memory_tokens_interspersed_every)
    front = call.prepended + (0 if model.cls_token is None else model.num_cls_tokens)
    rows = Rows.of_call(call.x.shape[1], front, memory, call.cache, new_only=call.new_only, cache_age=call.cache_age)
    if rows.cached and (reasons := model.why_no_cache):
        raise ValueError(f'cache must be None for a model with {", ".join(reasons)}. Pass the whole sequence instead.')
    if memory.every and call.seq_start_pos is not None:
        raise ValueError(
            'seq_start_pos must be None with memory_tokens_interspersed_every: padding on the left would move the windows '
            'of the memory tokens. Run prompts of different lengths one by one.'
        )
    if (
        isinstance(model.pos_emb, AbsolutePositionalEmbedding)
        and call.pos is None
        and isinstance(rows.seen, int)
        and rows.seen + rows.new > model.pos_emb.max_seq_len
    ):
        raise ValueError(
            f'x must have at most max_seq_len={model.pos_emb.max_seq_len} tokens, the number of absolute positions, got '
            f'{rows.seen + rows.new}. Shorten it, or use rotary_pos_emb=True.'
        )
    return rows
