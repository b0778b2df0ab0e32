"""Construction of the parts around a model's stack from its flags: tables, positions, learned rows, heads.

A model calls these in the order in which its modules are to stand, and ``init_own`` last.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from x_transformers.embedding.before import BigramHash, Smear
from x_transformers.embedding.pooling import AttentionPool
from x_transformers.embedding.token import TokenEmbedding, named_tables
from x_transformers.embedding.values import value_tables
from x_transformers.flags.base import FlagError, Flags
from x_transformers.flags.stack import StackFlags
from x_transformers.flags.wrapper import WrapperFlags
from x_transformers.heads import HeadForm, HeadTransform, LaterToken, choose_head, mixture_modules, next_embedding_head
from x_transformers.helpers import always, default
from x_transformers.module import Dropout, empty_parameter
from x_transformers.norms import entrance_norm
from x_transformers.position.absolute import AbsolutePositionalEmbedding, ScaledSinusoidalEmbedding


def build_embedding(model: Any, flags: WrapperFlags) -> None:
    """From token ids to vectors: the table of tokens, further tables, positions, the way to the stack's width."""
    stack: Any = flags.attn_layers
    emb_dim = default(flags.emb_dim, stack.dim)
    model.num_tokens = flags.num_tokens
    model.l2norm_embed = flags.l2norm_embed
    model._own_token_emb = flags.token_emb is not None
    model.token_emb = flags.token_emb
    if not model._own_token_emb:
        model.token_emb = TokenEmbedding(emb_dim, flags.num_tokens, flags.l2norm_embed, unit=stack.flags.ngpt)
    model.embed_scale = flags.embed_scale
    build_positions(model, flags, stack, flags.l2norm_embed)
    model.embeds = named_tables(flags.embed_num_tokens, emb_dim)
    size = flags.bigram_hash_embed
    model.bigram = None if size is None else BigramHash(size, emb_dim)
    model.smear = Smear(emb_dim) if flags.smear else None
    model.ff_deep_embed = empty_parameter(flags.num_tokens, stack.depth, stack.dim) if flags.ff_deep_embed else None
    model.value_embeds = value_tables(flags, stack)
    build_entrance(model, flags, flags.attn_layers)


def build_positions(model: Any, flags: Flags, stack: Any, l2norm_embed: bool = False) -> None:
    """Widths, and positions of width ``emb_dim``."""
    model.dim = stack.dim
    model.emb_dim = default(flag_or_default(flags, 'emb_dim'), model.dim)
    model.max_seq_len = flag_or_default(flags, 'max_seq_len') or 0
    model.has_absolute_positions = (
        flag_or_default(flags, 'use_abs_pos_emb') and model.max_seq_len > 0 and not stack.disable_abs_pos_emb
    )
    if not model.has_absolute_positions:
        model.pos_emb = always(0)
    elif flag_or_default(flags, 'scaled_sinu_pos_emb'):
        model.pos_emb = ScaledSinusoidalEmbedding(model.emb_dim)
    else:
        # with unit length only the direction counts, which turns quickly from a small start
        std = 1e-5 if l2norm_embed else 1.0
        model.pos_emb = AbsolutePositionalEmbedding(model.emb_dim, model.max_seq_len, l2norm_embed, init_std=std)


def build_entrance(model: Any, flags: Flags, stack: Any) -> None:
    """From the embeddings to the stack's width; what is fed back; learned rows in front."""
    model.emb_frac_gradient = flag_or_default(flags, 'emb_frac_gradient')
    model.post_emb_norm = entrance_norm(model.emb_dim, stack) if flag_or_default(flags, 'post_emb_norm') else nn.Identity()
    model.emb_dropout = Dropout(flag_or_default(flags, 'emb_dropout'))
    model.project_emb = nn.Linear(model.emb_dim, model.dim) if model.emb_dim != model.dim else nn.Identity()
    model.recycling = flag_or_default(flags, 'recycling')
    model.train_max_recycle_steps = flag_or_default(flags, 'train_max_recycle_steps')
    model.recycled_proj = nn.Linear(model.dim, model.dim, bias=False) if model.recycling else None
    model.looped = flag_or_default(flags, 'looped')
    model.max_looped_steps = flag_or_default(flags, 'max_looped_steps')
    model.looped_positions = flag_or_default(flags, 'looped_positions')
    model.exit_gate = nn.Linear(model.dim, 1, bias=False) if model.looped else None
    model.num_cls_tokens = flag_or_default(flags, 'num_cls_tokens')
    model.cls_token = empty_parameter(model.num_cls_tokens, model.dim) if flag_or_default(flags, 'use_cls_token') else None
    model.num_memory_tokens = flag_or_default(flags, 'num_memory_tokens') or 0
    model.memory_tokens = empty_parameter(model.num_memory_tokens, model.dim) if model.num_memory_tokens else None
    model.memory_tokens_interspersed_every = flag_or_default(flags, 'memory_tokens_interspersed_every')
    model.average_pool_embed = flag_or_default(flags, 'average_pool_embed')


def build_stack(model: Any, flags: Flags, stack: nn.Module) -> None:
    """The stack itself, and what depends on it."""
    model.attn_layers = stack
    model.max_mem_len = flag_or_default(flags, 'max_mem_len')
    model.shift_mem_down = flag_or_default(flags, 'shift_mem_down')
    model.randomized_positions = flag_or_default(flags, 'randomized_positions')
    model.can_cache_kv_outside_max_seq_len = not model.has_absolute_positions
    model.input_not_include_cache = flag_or_default(flags, 'input_not_include_cache')
    # flags that make outputs of seen tokens depend on new ones, or need rows that a cache does not hold
    model.why_no_cache = [name for name in flags.having('no_cache') if getattr(flags, name)]


def build_pooling(model: Any, flags: WrapperFlags) -> None:
    """Tokens that are pooled by attention, and take the place of logits."""
    stack: Any = flags.attn_layers
    if flags.attn_pool:
        model.attn_pool = AttentionPool(
            default(flags.dim_pooled_tokens, model.dim),
            dim_context=model.dim,
            num_pooled_tokens=flags.num_pooled_tokens,
            depth=flags.attn_pool_depth,
            heads=stack.attn_heads,
            dim_head=stack.attn_dim_head,
        )


def build_heads(model: Any, flags: WrapperFlags) -> None:
    """From the stack's output to logits of the next token, of later ones, and to its embedding."""
    model.output_is_log_prob = flags.mixture_of_softmax
    model.to_mixture, model.combine_mixture = None, None
    if flags.mixture_of_softmax:
        model.to_mixture, model.combine_mixture = mixture_modules(model.dim, flags.mixture_of_softmax_k)
    model.head_form = HeadForm(flags.sigsoftmax_logits, flags.squeeze_out_last_dim, flags.logits_factor, flags.logits_softcap)
    model.has_multiple_heads = flags.num_output_heads > 1
    model.to_logits = choose_head(
        model.dim,
        default(flags.logits_dim, flags.num_tokens),
        only_embed=flags.return_only_embed,
        tied_to=model.token_emb if flags.tie_embedding else None,
        count=flags.num_output_heads,
        own=flags.to_logits,
        bias=flags.logits_bias,
        unit=stack_flags(flags.attn_layers).ngpt,
    )
    model.logits_transform = None
    if flags.logits_transform is not None:
        norm = entrance_norm(model.dim, flags.attn_layers)
        model.logits_transform = HeadTransform(model.dim, flags.logits_transform, norm, bias=flags.logits_transform_bias)
    model.multi_token_heads = 1 if flags.return_only_embed else flags.multi_token_heads
    later = [LaterToken(model.dim, entrance_norm(model.dim, flags.attn_layers)) for _ in range(1, model.multi_token_heads)]
    model.later_tokens = nn.ModuleList(later) if later else None
    model.add_continuous_pred_head = flags.add_continuous_pred_head
    model.to_next_embed_pred = next_embedding_head(model.dim, model.emb_dim) if flags.add_continuous_pred_head else None


def flag_or_default(flags: Flags, name: str) -> Any:
    """A flag's value; the default of ``TransformerWrapper`` for a model that has no such flag."""
    return getattr(flags, name) if name in flags.flag_fields() else WrapperFlags.default(name)


def stack_flags(stack: nn.Module) -> StackFlags:
    flags = getattr(stack, 'flags', None)
    if not isinstance(flags, StackFlags):
        raise FlagError(
            'attn_layers must be a stack made of AttentionLayers (Encoder, Decoder, PrefixDecoder, CrossAttender or a '
            f'subclass), got {type(stack).__name__}.'
        )
    return flags
