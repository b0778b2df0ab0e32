"""MultiInputTransformerWrapper: several token ids at each position, and logits for each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from x_transformers.cache.kv_cache import Cache
from x_transformers.embedding.build import build_entrance, build_positions, build_stack, stack_flags
from x_transformers.embedding.call import Memories, ModelArgs, call_of, last_positions
from x_transformers.embedding.ids import token_ids
from x_transformers.embedding.rows import Rows
from x_transformers.embedding.token import add_named, named_tables
from x_transformers.flags.constructors import only
from x_transformers.flags.other_inputs import MultiInputFlags
from x_transformers.flags.rules import check_wrapper
from x_transformers.flags.signature import ClassSignature
from x_transformers.helpers import default
from x_transformers.returns import ReturnSpec
from x_transformers.stack_wrapper import Ends, StackWrapper
from x_transformers.tensor_types import Bool, Float, Int

if TYPE_CHECKING:
    from typing import Unpack

    from x_transformers.flags.keywords import MultiInputKeywords


class MultiInputTransformerWrapper(StackWrapper):
    """A transformer whose positions hold one token of every input, such as pitch and length of a note; embeddings are added.

    The keywords are the fields of ``MultiInputFlags``; ``num_tokens`` (a vocabulary for each name), ``max_seq_len`` and
    ``attn_layers`` are required.

    Raises:
        FlagError: names every keyword that is unknown, has a wrong value, or conflicts with another or with the stack.
    """

    __signature__: Any = ClassSignature(only(MultiInputFlags))
    reads = 'a dictionary of token ids'

    def __init__(
        self,
        *,
        max_seq_len: int,
        attn_layers: nn.Module,
        num_tokens: Mapping[str, int] | None = None,
        **flags: Unpack[MultiInputKeywords],
    ) -> None:
        super().__init__(Ends(embed_inputs, read_inputs))
        keywords = {'num_tokens': num_tokens or {}, 'max_seq_len': max_seq_len, 'attn_layers': attn_layers, **flags}
        own = MultiInputFlags.parse(keywords, where='MultiInputTransformerWrapper')
        check_wrapper(own, stack_flags(attn_layers), where=type(self).__name__)
        # kept for reading; the stack lives in its slot only
        self.flags = replace(own, attn_layers=nn.Identity())
        self.num_tokens = dict(own.num_tokens)
        build_positions(self, own, attn_layers)
        self.embeds = named_tables(own.num_tokens, self.emb_dim)
        build_entrance(self, own, attn_layers)
        self.to_logits: nn.ModuleDict | None = None
        if not own.return_only_embed:
            heads = {name: nn.Linear(self.dim, size, bias=False) for name, size in own.num_tokens.items()}
            self.to_logits = nn.ModuleDict(heads)
        build_stack(self, own, attn_layers)
        self.init_own()

    def forward(
        self,
        x: Mapping[str, Int[Tensor, 'b n']],
        return_embeddings: bool = False,
        return_logits_and_embeddings: bool = False,
        return_intermediates: bool | Literal['cache'] = False,
        mask: Bool[Tensor, 'b n'] | None = None,
        return_mems: bool = False,
        return_attn: bool = False,
        mems: Memories | None = None,
        mem_masks: Sequence[Bool[Tensor, 'b l']] | None = None,
        pos: Int[Tensor, '... n'] | Float[Tensor, '... n e'] | None = None,
        prepend_embeds: Float[Tensor, 'b p e'] | None = None,
        prepend_mask: Bool[Tensor, 'b p'] | None = None,
        sum_embeds: Float[Tensor, 'b n e'] | None = None,
        return_attn_z_loss: bool = False,
        attn_z_loss_weight: float | None = None,
        seq_start_pos: Int[Tensor, ' b'] | None = None,
        cache: Cache = None,
        *,
        input_not_include_cache: bool | None = None,
        logits_last: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits by name, each (b n v), or what the ``return_*`` arguments select.

        Args:
            x: ids for every name of ``num_tokens``, and for no other.
            mems, mem_masks: memories of the last segment, one per self attention (https://arxiv.org/abs/1901.02860).
            pos: positions, (n,) or (b n); with a floating dtype, the position embeddings themselves.
            prepend_embeds, prepend_mask: embeddings in front; outputs for them are returned as well.
            sum_embeds: embeddings to be added.
            attn_z_loss_weight: overrides that of the constructor.
            seq_start_pos: where each row begins, for rows that are padded on the left.
            cache: a ``KVCache``, or the intermediates of an earlier call. Then ``x`` may be new only, or the whole sequence,
                whose unseen tail is taken; ``input_not_include_cache=True`` says that all of it is new.
            logits_last: return logits for the last so many positions only.
            kwargs: passed to the stack: ``context``, ``context_mask``, ``attn_mask``, ``condition``, ...

        Returns:
            The first that applies of: (logits, embeddings); embeddings; logits. Then, wrapped around it: memories,
            intermediates, attention maps.
        """
        x = self._ids(x)
        keywords = {
            'return_embeddings': return_embeddings, 'return_logits_and_embeddings': return_logits_and_embeddings,
            'return_intermediates': return_intermediates, 'mask': mask, 'return_mems': return_mems, 'return_attn': return_attn,
            'mems': mems, 'mem_masks': mem_masks, 'pos': pos, 'prepend_embeds': prepend_embeds, 'prepend_mask': prepend_mask,
            'sum_embeds': sum_embeds, 'return_attn_z_loss': return_attn_z_loss, 'seq_start_pos': seq_start_pos, 'cache': cache,
            'input_not_include_cache': input_not_include_cache, 'logits_last': logits_last, 'kwargs': kwargs,
        }  # fmt: skip
        returns = ReturnSpec.of(keywords, default(attn_z_loss_weight, self.flags.attn_z_loss_weight))
        return self.run(call_of(self, next(iter(x.values())), keywords, embed_ids=x), returns)

    def _ids(self, x: Any) -> dict[str, Int[Tensor, 'b n']]:
        """The ids of each input. Names and their like are checked where ids are looked up."""
        if not isinstance(x, Mapping) or not x:
            raise TypeError(f'x must be a dictionary of token ids for {", ".join(self.num_tokens)}, got {type(x).__name__}')
        ids_by_name = {name: token_ids(ids, f'x[{name!r}]') for name, ids in x.items()}
        shapes = {name: tuple(ids.shape) for name, ids in ids_by_name.items()}
        if len(set(shapes.values())) > 1 or any(len(shape) != 2 for shape in shapes.values()):
            raise ValueError(f'x: all inputs must be batches of sequences (b n) of one shape, got {shapes}')
        return ids_by_name


def embed_inputs(
    model: MultiInputTransformerWrapper, x: Int[Tensor, 'b n'], call: ModelArgs, rows: Rows
) -> Float[Tensor, 'b n e']:
    return add_named(torch.zeros((), device=x.device), model.embeds, call.embed_ids, rows.newest, 'x', 'num_tokens')


def read_inputs(
    model: MultiInputTransformerWrapper, h: Float[Tensor, 'b n d'], call: ModelArgs, whole: bool
) -> tuple[dict[str, Float[Tensor, 'b n v']], Float[Tensor, 'b n d']]:
    heads: Any = model.to_logits
    read = last_positions(h, call.logits_last)
    return {name: head(read) for name, head in heads.items()}, h
