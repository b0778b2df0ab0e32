"""Wrong arguments at the doors that users stand before: one sentence that names the argument, what was got and what was wanted.

What is wrong inside a stack's own call is in ``layers/test_checks.py``, excluded flags are in ``flags/test_rules.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from x_transformers import (
    DPO,
    Attention,
    AutoregressiveWrapper,
    BeliefStateWrapper,
    ContinuousAutoregressiveWrapper,
    ContinuousTransformerWrapper,
    Decoder,
    Encoder,
    EntropyBasedTokenizer,
    FeedForward,
    InertFlagWarning,
    MultiInputTransformerWrapper,
    NeoMLP,
    NonAutoregressiveWrapper,
    PrefixDecoder,
    TransformerWrapper,
    ViTransformerWrapper,
    XLAutoregressiveWrapper,
    XTransformer,
    XValAutoregressiveWrapper,
    XValTransformerWrapper,
)
from x_transformers.block_diffusion import BlockDiffusionWrapper
from x_transformers.free_transformer import BinaryMapper, FreeTransformer
from x_transformers.full_bandwidth import FullBandwidth
from x_transformers.gpt_lejepa import LatentAutoregressive
from x_transformers.gpt_vae import GPTVAE
from x_transformers.next_latent_wrapper import NextLatentWrapper
from x_transformers.recirculation import Recirculation
from x_transformers.up_wrapper import UniversalPretrainWrapper, random_sequences
from x_transformers.x_transformers import (
    AdaptiveLayerNorm,
    AdaptiveRMSNorm,
    AlibiPositionalBias,
    Derf,
    DynamicTanh,
    LayerNorm,
    RMSNorm,
    l2norm,
    shift,
)
from x_transformers.xm_latent_decoder import XMLatentDecoder

STACK: dict[str, Any] = {'dim': 16, 'depth': 2, 'heads': 2, 'attn_dim_head': 8, 'verbose': False}
TOKENS, LENGTH, LONGEST = 11, 6, 8
IDS = torch.randint(0, TOKENS, (2, LENGTH))
ONES = torch.ones(2, LENGTH, dtype=torch.bool)
VECTORS = torch.randn(2, LENGTH, 16)
LATE = torch.zeros(2, LONGEST + 1, dtype=torch.long)

FF = 'attn_layers.layers.3.1.ff.2'
Call = Callable[[], Any]


def net(stack: type = Decoder, wrapper: dict[str, Any] | None = None, **flags: Any) -> TransformerWrapper:
    return TransformerWrapper(
        **{'num_tokens': TOKENS, 'max_seq_len': LONGEST, 'attn_layers': stack(**STACK, **flags)} | (wrapper or {})
    )


def refuses(call: Call, *words: str) -> None:
    """A sentence, of the family that a caller expects, with these words and without the traces of torch."""
    with pytest.raises((ValueError, TypeError, IndexError)) as caught:
        call()
    said = str(caught.value)
    assert all(word in said for word in words), f'{words} in: {said}'
    assert len(said) > 20
    assert '\n\n' not in said
    assert not any(trace in said for trace in ('size of tensor', 'mat1', 'expected scalar type', 'unexpected keyword')), said


def case(name: str, call: Call, *words: str) -> Any:
    return pytest.param(call, words, id=name)


def attention(**flags: Any) -> Attention:
    return Attention(16, **{'heads': 2, 'dim_head': 8} | flags)


PAIR = (torch.randn(2, 2, 3, 8), torch.randn(2, 2, 3, 8))


@pytest.mark.parametrize(
    ('call', 'words'),
    [
        case('float tokens', lambda: net()(IDS + 0.5), 'x', 'float32'),
        case('boolean tokens', lambda: net()(ONES), 'x', 'bool'),
        case('one sequence without batch', lambda: net()(IDS[0]), 'x', '(6,)', 'unsqueeze'),
        case('three axes', lambda: net()(IDS[None]), 'x', '(1, 2, 6)'),
        case('ids too large', lambda: net()(IDS + TOKENS), 'x', '11'),
        case('ids negative', lambda: net()(IDS - TOKENS), 'x', '11'),
        case('tokens as a list', lambda: net()([[1, 2]]), 'x', 'list'),
        case('no tokens at all', lambda: net()(None), 'x', 'prepend_embeds'),
        case('too long', lambda: net()(LATE), 'max_seq_len=8', '9'),
        case('float mask', lambda: net()(IDS, mask=ONES.float()), 'mask', 'float32', 'bool'),
        case('a mask of nothing', lambda: net()(IDS, prepend_mask=[True]), 'prepend_mask', 'boolean tensor', 'list'),
        case('a mask of nothing for more rows', lambda: net()(IDS, prepend_mask=LATE.bool().expand(3, -1, -1)[:, 0]), '(3, 9)'),
        case('rounds as a tensor', lambda: net()(IDS, recycle_steps=ONES), 'recycle_steps', 'whole number'),
        case('last positions as a list', lambda: net()(IDS, logits_last=[1]), 'logits_last', 'whole number from 1', '[1]'),
        case('a threshold as a tensor', lambda: net()(IDS, looped_exit_prob_threshold=VECTORS), 'threshold', '(2, 6, 16)'),
        case('position embeddings of another width', lambda: net()(IDS, pos=VECTORS[..., :5]), 'pos', 'width 16', '(2, 6, 5)'),
        case('whole-number mask', lambda: net()(IDS, mask=ONES.long()), 'mask', 'int64', 'bool'),
        case('mask too short', lambda: net()(IDS, mask=ONES[:, :4]), 'mask', '(2, 4)', '6'),
        case('mask of another batch', lambda: net()(IDS, mask=ONES[:1]), 'mask', '(1, 6)', '2'),
        case('mask with three axes', lambda: net()(IDS, mask=ONES[None]), 'mask', '(1, 2, 6)'),
        case('attn_mask of numbers', lambda: net()(IDS, attn_mask=torch.ones(6, 6)), 'attn_mask', 'float32', 'boolean'),
        case('attn_mask too small', lambda: net()(IDS, attn_mask=torch.ones(5, 5).bool()), 'attn_mask', '(5, 5)', '(6, 6)'),
        case('context without cross attention', lambda: net()(IDS, context=VECTORS), 'context', 'cross_attend'),
        case('cross attention without context', lambda: net(cross_attend=True)(IDS), 'context must be given', 'None'),
        case('context of ids', lambda: net(cross_attend=True)(IDS, context=IDS), 'context', 'int64', '16'),
        case('context of another width', lambda: net(cross_attend=True)(IDS, context=VECTORS[..., :9]), 'context', '9', '16'),
        case('context of another batch', lambda: net(cross_attend=True)(IDS, context=VECTORS[:1]), 'context', '(1, 6, 16)'),
        case(
            'float context mask',
            lambda: net(cross_attend=True)(IDS, context=VECTORS, context_mask=ONES.float()),
            'context_mask', 'boolean', 'float32',
        ),
        case('context_mask alone', lambda: net()(IDS, context_mask=ONES), 'context_mask', 'context'),
        case('misspelt argument', lambda: net()(IDS, retrun_mems=True), 'retrun_mems', 'return_mems'),
        case('condition missing', lambda: net(use_adaptive_layernorm=True)(IDS), 'condition must be given'),
        case(
            'condition too narrow',
            lambda: net(use_adaptive_layernorm=True, dim_condition=4)(IDS, condition=torch.randn(2, 5)),
            'condition', '(2, 5)', '4',
        ),
        case('condition for nobody', lambda: net()(IDS, condition=torch.randn(2, 16)), 'condition', 'nothing'),
        case('pos too short', lambda: net(rotary_pos_emb=True)(IDS, pos=torch.arange(4)), 'pos', '4', '6'),
        case('pos beyond the table', lambda: net()(IDS, pos=torch.arange(6) + 4), 'pos', '8'),
        case('pos of another batch', lambda: net()(IDS, pos=torch.zeros(3, 6, dtype=torch.long)), 'pos', '(3, 6)'),
        case('order out of range', lambda: net()(IDS, layers_execute_order=(0, 9)), 'layers_execute_order', '9', '0 to 3'),
        case('mems for too few layers', lambda: net()(IDS, mems=[VECTORS]), 'mems', '2', '1'),
        case('mems of another batch', lambda: net()(IDS, mems=[VECTORS[:1]] * 2), 'mems[0]', '(1, 6, 16)'),
        case('mems of another width', lambda: net()(IDS, mems=[VECTORS[..., :4]] * 2), 'mems[0]', '(2, 6, 4)'),
        case(
            'external heads that do not divide',
            lambda: net()(IDS, self_attn_additional_kv=[(torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4, 8))] * 2),
            'divides the 2 heads', 'got 3',
        ),
        case(
            'external mask too long',
            lambda: net()(IDS, self_attn_additional_kv=[PAIR] * 2, additional_kv_mask=ONES),
            'additional_kv_mask', '(2, 3)', '(2, 6)',
        ),
        case('prepended embeddings too narrow', lambda: net()(IDS, prepend_embeds=VECTORS[..., :4]), 'prepend_embeds', '16'),
        case(
            'prepended mask of numbers',
            lambda: net()(IDS, prepend_embeds=VECTORS, prepend_mask=ONES.float()),
            'prepend_mask', 'bool',
        ),
        case('summed embeddings too short', lambda: net()(IDS, sum_embeds=VECTORS[:, :4]), 'sum_embeds', '6'),
        case('summed embeddings too narrow', lambda: net()(IDS, sum_embeds=VECTORS[..., :4]), 'sum_embeds', '16'),
        case('embed_ids nobody asked for', lambda: net()(IDS, embed_ids={'kind': IDS}), 'embed_ids', 'kind'),
        case(
            'embed_ids out of range',
            lambda: net(wrapper={'embed_num_tokens': {'kind': 3}})(IDS, embed_ids={'kind': IDS + 3}),
            'kind', '3',
        ),
        case('start of another batch', lambda: net()(IDS, seq_start_pos=torch.zeros(3, dtype=torch.long)), 'seq_start_pos'),
        case('recycle steps without recycling', lambda: net()(IDS, recycle_steps=2), 'recycle_steps', 'recycling'),
        case('prefix of floats', lambda: net(PrefixDecoder)(IDS, prefix_attn_len=torch.ones(2)), 'prefix_attn_len', 'float32'),
        case('prefix of another batch', lambda: net(PrefixDecoder)(IDS, prefix_attn_len=IDS[0, :3]), 'prefix_attn_len'),
        case('prefix of nothing', lambda: net(PrefixDecoder)(IDS, prefix_attn_len='3'), 'prefix_attn_len', 'str'),
        case('prefix of less than nothing', lambda: net(PrefixDecoder)(IDS, prefix_attn_len=-1), 'prefix_attn_len', 'from 0'),
        case('prepended list', lambda: net()(IDS, prepend_embeds=[[0.5]]), 'prepend_embeds', 'list', 'floating'),
        case('prepended number', lambda: net()(IDS, prepend_embeds=torch.tensor(1.0)), 'prepend_embeds', '()'),
        case('prepended ids', lambda: AutoregressiveWrapper(net())(IDS, prepend_embeds=IDS), 'prepend_embeds', 'int64'),
        case('positions as a list', lambda: net()(IDS, pos=[0, 1, 2]), 'pos', 'list'),
        case('offset of a half', lambda: net()(IDS, seq_pos_offset=0.5), 'seq_pos_offset', '0.5'),
        case('age in words', lambda: net()(IDS, cache_age='one'), 'cache_age', "'one'"),
        case('age before birth', lambda: net()(IDS, cache_age=-1), 'cache_age', 'from 0'),
        case('weight in words', lambda: net()(IDS, return_attn_z_loss=True, attn_z_loss_weight='x'), 'attn_z_loss_weight'),
        case('summed ids', lambda: net()(IDS, sum_embeds=torch.ones(2, 6, 16).long()), 'sum_embeds', 'int64'),
        case('condition of ids', lambda: net(use_adaptive_layernorm=True)(IDS, condition=IDS), 'condition', 'int64'),
        case('condition as a list', lambda: net(use_adaptive_layernorm=True)(IDS, condition=[1.0]), 'condition', 'list'),
        case('half a round', lambda: net(wrapper={'recycling': True})(IDS, recycle_steps=1.5), 'recycle_steps', '1.5'),
        case('rounds in words', lambda: net(wrapper={'recycling': True})(IDS, recycle_steps='2'), 'recycle_steps'),
        case(
            'embed_ids of another batch',
            lambda: net(wrapper={'embed_num_tokens': {'kind': 9}})(IDS, embed_ids={'kind': IDS[:1].expand(3, -1)}),
            'kind', '(3, 6)',
        ),
        case(
            'embed_ids without names',
            lambda: net(wrapper={'embed_num_tokens': {'kind': 9}})(IDS, embed_ids=[IDS]), 'embed_ids', 'list',
        ),
        case('packing as a list', lambda: net(attn_flash_pack_seq=True)(IDS[:1], flash_pack_seq_kwargs=[3]), 'flash_pack'),
        case('prefix of a decoder', lambda: net()(IDS, prefix_attn_len=3), 'prefix_attn_len'),
        case('embeddings of what has none', lambda: net()(IDS, return_next_embed_pred=True), 'return_next_embed_pred'),
    ],
)  # fmt: skip
def test_calls_of_a_token_model(call: Call, words: tuple[str, ...]) -> None:
    refuses(call, *words)


def test_decoding_past_the_end() -> None:
    model = net()
    _, seen = model(LATE[:, :LONGEST], return_intermediates=True)
    refuses(lambda: model(LATE[:, :1], cache=seen), 'max_seq_len=8', '9')
    refuses(lambda: model(IDS, cache='yes'), 'cache', 'str')
    refuses(lambda: model(IDS[:1, :1], cache=net()(IDS, return_intermediates=True)[1]), 'cache', 'batch')
    refuses(lambda: net(Encoder)(IDS[:, :1], cache=net()(IDS, return_intermediates=True)[1]), 'cache', 'causal')


@pytest.mark.parametrize(
    ('call', 'words'),
    [
        case('ids', lambda: attention()(IDS), 'x', '(2, 6)', '16'),
        case('whole numbers', lambda: attention()(VECTORS.long()), 'x', 'int64', 'floating'),
        case('another width', lambda: attention()(VECTORS[..., :5]), 'x', '16', '(2, 6, 5)'),
        case('no tensor', lambda: attention()([1.0]), 'x', 'list'),
        case('float mask', lambda: attention()(VECTORS, mask=ONES.float()), 'mask', 'boolean', 'float32'),
        case('short mask', lambda: attention()(VECTORS, mask=ONES[:, 1:]), 'mask', '(2, 5)', '6'),
        case('context width', lambda: attention(dim_context=4)(VECTORS, context=VECTORS), 'context', '4', '(2, 6, 16)'),
        case('context missing', lambda: attention(dim_context=4)(VECTORS), 'context must be given', '4'),
        case('bias of another size', lambda: attention()(VECTORS, attn_bias=torch.zeros(5, 6)), 'attn_bias', '(5, 6)', '6'),
        case('boolean bias', lambda: attention()(VECTORS, attn_bias=torch.ones(6, 6).bool()), 'attn_bias', 'bool'),
        case('views missing', lambda: attention(qkv_receive_diff_residuals=True)(VECTORS), 'x', '3'),
        case(
            'external keys',
            lambda: attention()(VECTORS, additional_key_values=(PAIR[0][:, :, :, :4], PAIR[1])),
            'additional_key_values', '8',
        ),
        case(
            'external heads',
            lambda: attention(heads=4, dim_head=4)(VECTORS, additional_key_values=(torch.randn(2, 3, 2, 4),) * 2),
            '3 heads', '4',
        ),
        case('memories too narrow', lambda: attention()(VECTORS, mem=VECTORS[..., :3]), 'mem', '16', '(2, 6, 3)'),
        case('mem_mask alone', lambda: attention()(VECTORS, mem_mask=ONES), 'mem_mask', 'mem'),
        case('too few angles', lambda: attention()(VECTORS, rotary_pos_emb=(torch.randn(1, 4, 4), 1.0)), 'rotary', '4', '6'),
        case('feed-forward width', lambda: FeedForward(16)(VECTORS[..., :3]), 'x', '16', '(2, 6, 3)'),
    ],
)  # fmt: skip
def test_calls_of_parts(call: Call, words: tuple[str, ...]) -> None:
    refuses(call, *words)


@pytest.mark.parametrize(
    ('call', 'words'),
    [
        case('misspelt', lambda: Decoder(**STACK, rotary_pos_em=True), 'rotary_pos_em`', 'rotary_pos_emb`'),
        case('of a part', lambda: Decoder(**STACK, ff_gluu=True), 'ff_gluu', 'ff_glu'),
        case('heads that do not divide', lambda: Decoder(**STACK | {'heads': 3}, attn_kv_heads=2), 'kv_heads', '3', '2'),
        case('wrong kind', lambda: Decoder(**STACK, rotary_pos_emb='yes'), 'rotary_pos_emb', 'yes'),
        case('wrong range', lambda: Decoder(**STACK, layer_dropout=1.5), 'layer_dropout', '1.5'),
        case('no depth', lambda: Decoder(dim=16), 'depth'),
        case('no stack', lambda: TransformerWrapper(num_tokens=3, max_seq_len=4, attn_layers=3), 'attn_layers'),
        case('no tokens', lambda: net(wrapper={'num_tokens': 0}), 'num_tokens', '0'),
        case('tied to another width', lambda: net(wrapper={'tie_embedding': True, 'emb_dim': 4}), 'tie_embedding', 'emb_dim'),
        case(
            'image not divisible',
            lambda: ViTransformerWrapper(image_size=9, patch_size=2, attn_layers=Encoder(**STACK)),
            'patch_size', '9', '2',
        ),
        case('order beyond layers', lambda: Decoder(**STACK, layers_execute_order=(0, 7)), 'layers_execute_order', '7'),
        case('unknown layer kind', lambda: Decoder(**STACK | {'depth': None}, custom_layers=('a', 'x')), 'custom_layers', 'x'),
    ],
)  # fmt: skip
def test_flags(call: Call, words: tuple[str, ...]) -> None:
    refuses(call, *words)


@pytest.mark.parametrize(
    ('call', 'words'),
    [
        case('part of nobody', lambda: Decoder(**STACK, cross_attn_qk_norm=True), 'cross_attn_', 'cross_attend'),
        case('sub-option alone', lambda: Decoder(**STACK, attn_qk_norm_groups=2), 'qk_norm_groups', 'qk_norm'),
        case('sub-option of a bias', lambda: Decoder(**STACK, rel_pos_num_buckets=4), 'rel_pos_num_buckets', 'rel_pos_bias'),
        case('sub-option of a feed-forward', lambda: FeedForward(8, glu_mult_bias=True), 'glu_mult_bias', 'glu'),
        case('wrapper sub-option', lambda: net(wrapper={'num_cls_tokens': 2}), 'num_cls_tokens', 'use_cls_token'),
    ],
)  # fmt: skip
def test_flags_without_effect(call: Call, words: tuple[str, ...]) -> None:
    with pytest.warns(InertFlagWarning) as caught:
        call()
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert all(word in str(caught[0].message) for word in words)


def gpt(**flags: Any) -> AutoregressiveWrapper:
    return AutoregressiveWrapper(net(**flags))


def frames(**flags: Any) -> ContinuousTransformerWrapper:
    return ContinuousTransformerWrapper(dim_in=3, dim_out=3, max_seq_len=LONGEST, attn_layers=Decoder(**STACK), **flags)


def vae() -> GPTVAE:
    return GPTVAE(num_tokens=TOKENS, enc_depth=1, max_seq_len=LONGEST, dim_latent=2, **STACK)


def free() -> FreeTransformer:
    small = {name: value for name, value in STACK.items() if name != 'depth'}
    return FreeTransformer(
        num_tokens=TOKENS, dec_head_depth=1, dec_tail_depth=1, max_seq_len=LONGEST, latent_bits=2, **small
    )  # fmt: skip


def pair() -> XTransformer:
    sizes = {'num_tokens': TOKENS, 'max_seq_len': LONGEST, 'depth': 1, 'heads': 2, 'verbose': False}
    return XTransformer(dim=16, **{f'{side}_{name}': size for side in ('enc', 'dec') for name, size in sizes.items()})


@pytest.mark.parametrize(
    ('call', 'words'),
    [
        case('empty prompt', lambda: gpt().generate(IDS[:, :0], 2), 'prompt'),
        case('nothing to generate', lambda: gpt().generate(IDS, -1), 'seq_len', '-1'),
        case('negative temperature', lambda: gpt().generate(IDS, 1, temperature=-1.0), 'temperature', '-1'),
        case('unknown filter', lambda: gpt().generate(IDS, 1, filter_logits_fn='top_q'), 'top_q', 'top_k'),
        case('half a token', lambda: gpt().generate(IDS, 2.5), 'seq_len', '2.5'),
        case('temperature in words', lambda: gpt().generate(IDS, 1, temperature='hot'), 'temperature', 'hot'),
        case('lengths beyond the prompts', lambda: gpt().generate(IDS, 2, prompt_lens=[7, 6]), 'prompt_lens', '7', '6'),
        case('ends as a list', lambda: gpt().generate(IDS, 1, eos_token=[1, 2]), 'eos_token', '[1, 2]', 'afterwards'),
        case('ends of beams', lambda: gpt().beam_search(IDS, 1, eos_token=[1, 2]), 'eos_token', '[1, 2]'),
        case('end below all tokens', lambda: gpt().generate(IDS, 1, eos_token=-1), 'eos_token', '-1'),
        case(
            'end of segments',
            lambda: XLAutoregressiveWrapper(net(wrapper={'max_mem_len': 4})).generate(IDS, 1, eos_token=1.5),
            'eos_token', '1.5',
        ),
        case('keywords of another filter', lambda: gpt().generate(IDS, 1, filter_kwargs={'q': 1}), 'filter_kwargs', 'top_k'),
        case(
            'amateur of another vocabulary',
            lambda: gpt().generate(IDS, 1, amateur_model=net(wrapper={'num_tokens': 5})),
            'amateur', '5', '11',
        ),
        case(
            'keywords of no contrast',
            lambda: gpt().generate(IDS, 1, amateur_model=net(), contrastive_decode_kwargs={'gamma': 1}),
            'contrastive_decode_kwargs', 'gamma', 'alpha',
        ),
        case('mask over half of a prompt', lambda: gpt().generate(IDS, 1, mask=ONES[:, :3]), 'mask', '3', '6'),
        case('prompt beyond the window', lambda: gpt().generate(LATE, 2), 'max_seq_len=8', '10'),
        case('memories of no list', lambda: net()(IDS, mems='all'), 'mems', 'str'),
        case(
            'memories of another model',
            lambda: XLAutoregressiveWrapper(net(wrapper={'max_mem_len': 4})).generate(IDS, 1, mems=[VECTORS[..., :9]] * 2),
            'mems[0]', '16', '(2, 6, 9)',
        ),
        case('too long to learn', lambda: gpt()(torch.zeros(1, 20, dtype=torch.long)), 'max_seq_len=8', '20'),
        case('one token', lambda: gpt()(IDS[:, :1]), '1'),
        case('float tokens', lambda: gpt()(VECTORS), 'x'),
        case('frames too wide', lambda: frames()(torch.randn(2, 5, 4)), '3', '(2, 5, 4)'),
        case('frames as ids', lambda: frames()(IDS), 'x'),
        case('lens too long', lambda: frames()(torch.randn(2, 5, 3), lens=torch.tensor([5, 6])), 'lens', '6', '5'),
        case(
            'lens and mask',
            lambda: frames()(torch.randn(2, 6, 3), lens=torch.tensor([5, 6]), mask=ONES),
            'lens', 'mask',
        ),
        case(
            'roll-out longer than the sequence',
            lambda: ContinuousAutoregressiveWrapper(frames())(torch.randn(2, 5, 3), rollout_steps=9),
            'at least 10 frames', '5',
        ),
        case(
            'half a step of a roll-out',
            lambda: ContinuousAutoregressiveWrapper(frames())(torch.randn(2, 5, 3), rollout_steps=2.5),
            'rollout_steps', '2.5',
        ),
        case(
            'lengths beyond the first frames',
            lambda: ContinuousAutoregressiveWrapper(frames()).generate(torch.randn(2, 5, 3), 1, prompt_lens=[6, 5]),
            'prompt_lens', '6', '5',
        ),
        case('latents of another width', lambda: vae().generate(IDS, 1, latents=[1.0, 2.0, 3.0]), 'latents', '(2,)', '(3,)'),
        case('codes of another width', lambda: free().generate(IDS, 8, latents=torch.zeros(2, 5)), 'latents', '4', '(2, 5)'),
        case(
            'numbers that are none',
            lambda: XValTransformerWrapper(
                num_tokens=5, numerical_token_id=4, max_seq_len=8, attn_layers=Decoder(**STACK))(
                torch.full((2, 4), 4), torch.full((2, 4), torch.nan)),
            'x_num', 'NaN', '8',
        ),
        case(
            'suffix of nothing',
            lambda: BeliefStateWrapper(net(), net()).generate_with_suffix_cond(IDS, 1, suffix=IDS[:, :0]),
            'suffix', 'at least one token',
        ),
        case('source of nothing', lambda: pair().generate(IDS[:, :0], IDS, 1), 'source', '(2, 0)'),
        case('image as a list', lambda: ViTransformerWrapper(
            image_size=8, patch_size=4, attn_layers=Encoder(**STACK))([[0.5]]), 'img', '(batch, 3, 8, 8)', 'list'),
        case('image of another size', lambda: ViTransformerWrapper(
            image_size=4, patch_size=2, attn_layers=Encoder(**STACK))(torch.randn(1, 3, 6, 6)), '4', '6'),
        case('image with another depth', lambda: ViTransformerWrapper(
            image_size=4, patch_size=2, attn_layers=Encoder(**STACK))(torch.randn(1, 1, 4, 4)), '3', '1'),
        case(
            'inputs with other names',
            lambda: MultiInputTransformerWrapper(
                num_tokens={'note': 5}, max_seq_len=8, attn_layers=Decoder(**STACK))({'pitch': IDS % 5}),
            'note', 'pitch',
        ),
        case(
            'numbers missing',
            lambda: XValTransformerWrapper(
                num_tokens=5, numerical_token_id=4, max_seq_len=8, attn_layers=Decoder(**STACK))(IDS % 5, torch.randn(2, 4)),
            'x_num', '(2, 4)',
        ),
        case('mask beyond the table', lambda: NonAutoregressiveWrapper(net(Encoder), mask_id=TOKENS), 'mask_id', '11'),
        case('segments of nothing', lambda: XLAutoregressiveWrapper(net(wrapper={'max_mem_len': 4}))(IDS[:, :1]), '1'),
        case('preferences of two lengths', lambda: DPO(net())(IDS, IDS[:, :4], prompt_mask=ONES), 'unpreferred_seq', '(2, 4)'),
        case(
            'two directions of other vocabularies',
            lambda: BeliefStateWrapper(net(), net(wrapper={'num_tokens': 5})),
            'num_tokens', '5', '11',
        ),
        case('marks of a prompt as a list', lambda: DPO(net())(IDS, IDS, prompt_mask=[[True]]), 'prompt_mask', 'list'),
        case('lengths as a list', lambda: BeliefStateWrapper(net())(IDS, lens=[3, 4]), 'lens', 'list'),
        case(
            'weights that are no function',
            lambda: BeliefStateWrapper(net())(IDS, loss_weight_by_fb_indices=3), 'loss_weight_by_fb_indices', '3',
        ),
        case(
            'hidden tokens as a list',
            lambda: NonAutoregressiveWrapper(net(Encoder), mask_id=0)(torch.ones(2, 8).long(), mask=[True]), 'mask', 'list',
        ),
        case(
            'keywords of a filter as a list',
            lambda: XLAutoregressiveWrapper(net(wrapper={'max_mem_len': 4})).generate(IDS, 2, filter_kwargs=[3]),
            'filter_kwargs', '[3]',
        ),
        case(
            'contrast in words',
            lambda: AutoregressiveWrapper(net()).generate(
                IDS, 2, amateur_model=net(), contrastive_decode_kwargs={'alpha': 'x'}),
            'alpha', "'x'",
        ),
        case(
            'frames as a list',
            lambda: ContinuousAutoregressiveWrapper(ContinuousTransformerWrapper(
                dim_in=4, dim_out=4, max_seq_len=8, attn_layers=Decoder(**STACK))).generate([[1.0] * 4], 2),
            'start_tokens', 'list',
        ),
        case(
            'one number for a text',
            lambda: GPTVAE(num_tokens=9, dim=16, depth=1, enc_depth=1, max_seq_len=8)(torch.tensor(1)), 'seq', '()',
        ),
        case('encoder without a size', lambda: XTransformer(dim=16, dec_num_tokens=5, dec_max_seq_len=4), 'enc_num_tokens'),
    ],
)  # fmt: skip
def test_objectives(call: Call, words: tuple[str, ...]) -> None:
    refuses(call, *words)


def test_a_refused_call_leaves_the_model_as_it_was() -> None:
    model = gpt().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for bad in (IDS + 0.5, IDS + TOKENS, LATE[:, :0]):
        with pytest.raises((ValueError, TypeError, IndexError)):
            model.generate(bad, 2)
        assert model.training
    after: dict[str, Tensor] = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    'name', ['value_embed', 'smear', 'bigram_hash_embed', 'ff_deep_embed', 'looped', 'multi_token_heads', 'tie_embedding']
)
def test_ideas_of_tokens_in_models_without_them(name: str) -> None:
    says = f'no flag `{name}`; it is a keyword of TransformerWrapper'
    refuses(lambda: Decoder(**STACK, **{name: True}), says)
    refuses(lambda: ContinuousTransformerWrapper(dim_in=4, max_seq_len=8, attn_layers=Decoder(**STACK), **{name: True}), says)


@pytest.mark.parametrize(
    ('ways', 'words'),
    [
        ({'ttt_module_paths': (FF, 'attn_layers.layers.9')}, ("must name a module of the net, got 'attn_layers.layers.9'",)),
        ({'ttt_module_paths': ((FF, 'nowhere'),)}, ("must name a module of the net, got 'nowhere'",)),
        ({'ttt_module_paths': (3,)}, ('ttt_module_paths must hold dotted paths', 'got 3')),
        ({'ttt_low_rank_paths': ((FF, 2), ('nowhere', 2))}, ('ttt_low_rank_paths', "got 'nowhere'")),
        ({'ttt_low_rank_paths': ((FF, 99),)}, ('must lie in 1 to 16, got 99',)),
        ({'ttt_module_paths': (FF, FF.rpartition('.')[0])}, ('apart from each other', f'{FF!r}, which is a part of it')),
        ({'ttt_module_paths': (FF.rpartition('.')[0],), 'ttt_low_rank_paths': ((FF, 2),)}, ('apart from each other',)),
    ],
)
def test_a_path_that_is_not_there_leaves_the_net_as_it_was(ways: dict[str, Any], words: tuple[str, ...]) -> None:
    model = net(wrapper={'max_mem_len': 4})
    before = str(model)
    refuses(lambda: XLAutoregressiveWrapper(model, tbptt_steps=2, **ways), *words)
    assert str(model) == before


@pytest.mark.parametrize(
    ('call', 'words'),
    [
        ({'looped_steps': 1.5}, ('looped_steps', 'got 1.5')),
        ({'looped_steps': 'all'}, ('looped_steps', "got 'all'")),
        ({'looped_exit_prob_threshold': None}, ('looped_exit_prob_threshold must be a number', 'got None')),
    ],
)
def test_how_often_a_model_loops(call: dict[str, Any], words: tuple[str, ...]) -> None:
    model = net(wrapper={'looped': True}, pre_and_post_norm=True)
    refuses(lambda: model(IDS, **call), *words)


def test_more_loops_than_the_cache_was_made_for() -> None:
    model = net(wrapper={'looped': True, 'max_looped_steps': 2}, pre_and_post_norm=True)
    _, seen = model(IDS, return_intermediates=True)
    refuses(lambda: model(IDS[:, :1], cache=seen, input_not_include_cache=True, looped_steps=5), 'must be 2', 'got 5')


OBJECTIVES: dict[str, Callable[[Any], Any]] = {
    'AutoregressiveWrapper': AutoregressiveWrapper,
    'XLAutoregressiveWrapper': XLAutoregressiveWrapper,
    'NonAutoregressiveWrapper': lambda it: NonAutoregressiveWrapper(it, mask_id=1),
    'BlockDiffusionWrapper': lambda it: BlockDiffusionWrapper(it, mask_id=1),
    'BeliefStateWrapper': BeliefStateWrapper,
    'DPO': DPO,
    'EntropyBasedTokenizer': lambda it: EntropyBasedTokenizer(it, 1.0),
    'ContinuousAutoregressiveWrapper': ContinuousAutoregressiveWrapper,
    'XValAutoregressiveWrapper': XValAutoregressiveWrapper,
    'UniversalPretrainWrapper': UniversalPretrainWrapper,
    'NextLatentWrapper': lambda it: NextLatentWrapper(it, dim=16),
    'LatentAutoregressive': lambda it: LatentAutoregressive(it, dim=16),
    'Recirculation': lambda it: Recirculation(it, 0, 1),
    'FullBandwidth': FullBandwidth,
    'XMLatentDecoder': XMLatentDecoder,
}


@pytest.mark.parametrize('name', OBJECTIVES)
@pytest.mark.parametrize('given', [None, 'model.pt', TransformerWrapper], ids=['nothing', 'a path', 'a class'])
def test_an_objective_is_given_a_model(name: str, given: Any) -> None:
    refuses(lambda: OBJECTIVES[name](given), name, 'must be a model', 'got', 'Build the model')


@pytest.mark.parametrize(
    ('name', 'lacks'),
    [
        ('BeliefStateWrapper', 'emb_dim'),
        ('NonAutoregressiveWrapper', 'max_seq_len'),
        ('UniversalPretrainWrapper', 'num_tokens'),
        ('XValAutoregressiveWrapper', 'numerical_token_id'),
        ('NextLatentWrapper', 'token_emb'),
        ('Recirculation', 'attn_layers'),
        ('FullBandwidth', 'flags'),
    ],
)
def test_a_model_of_ones_own_has_what_an_objective_reads_of_it(name: str, lacks: str) -> None:
    refuses(lambda: OBJECTIVES[name](nn.Linear(2, 2)), name, 'got a Linear without', lacks)


@pytest.mark.parametrize(
    ('call', 'words'),
    [
        case('whole numbers', lambda: BinaryMapper(bits=3)(torch.ones(2, 3).long()), 'logits', 'floating', 'int64'),
        case('another width', lambda: BinaryMapper(bits=3)(torch.ones(2, 4)), 'logits', '3 channels', '(2, 4)'),
        case('one number', lambda: BinaryMapper(bits=3)(torch.tensor(0.5)), 'logits', '3 channels', '()'),
        case('a list', lambda: BinaryMapper(bits=3)([0.5] * 3), 'logits', 'list'),
        case('fewer rows than none', lambda: random_sequences(5, 4, -3, 2), 'num_samples_random', 'from 0', '-3'),
        case('half a token', lambda: random_sequences(5, 2.5, 3, 2), 'seq_len', '2.5'),
        case('no token', lambda: random_sequences(0, 4, 3, 2), 'num_tokens', 'from 1'),
    ],
)
def test_codes_and_random_rows(call: Call, words: tuple[str, ...]) -> None:
    refuses(call, *words)


ALIBI = AlibiPositionalBias(heads=2)
NORMS = (LayerNorm, RMSNorm, DynamicTanh, Derf)


@pytest.mark.parametrize('kind', NORMS)
def test_a_norm_of_another_width(kind: Any) -> None:
    refuses(lambda: kind(16)(VECTORS[..., :5]), 'x must have the 16 features of the norm', '(2, 6, 5)')


@pytest.mark.parametrize('kind', [AdaptiveLayerNorm, AdaptiveRMSNorm])
@pytest.mark.parametrize('shape', [(2, 5), (3, 4), (4,), (2, 6, 5)], ids=str)
def test_a_norm_with_a_condition_that_does_not_fit(kind: Any, shape: tuple[int, ...]) -> None:
    refuses(lambda: kind(16, 4)(VECTORS, condition=torch.randn(shape)), 'condition must be (batch, 4)', str(shape))


@pytest.mark.parametrize(
    ('call', 'words'),
    [
        case('no input', lambda: FeedForward(16)(None), 'x must be a tensor', '16', 'NoneType'),
        case('factors of too few tokens', lambda: FeedForward(16)(VECTORS, VECTORS[:, :3]), 'deep_embed', '(2, 3, 16)'),
        case('factors as a number', lambda: FeedForward(16)(VECTORS, 0.5), 'deep_embed', 'float'),
        case('no source', lambda: pair()(None, IDS), 'x', 'prepend_embeds'),
    ],
)
def test_branches_by_themselves(call: Call, words: tuple[str, ...]) -> None:
    refuses(call, *words)


def test_a_source_may_be_embeddings_alone() -> None:
    assert pair()(None, IDS, src_prepend_embeds=VECTORS).isfinite()
    assert pair().generate(None, IDS[:, :1], 3, src_prepend_embeds=VECTORS).shape == (2, 3)


@pytest.mark.parametrize('name', ['AutoregressiveWrapper', 'XLAutoregressiveWrapper', 'DPO', 'EntropyBasedTokenizer'])
def test_neither_a_stack_nor_an_objective_is_a_model_of_tokens(name: str) -> None:
    refuses(lambda: OBJECTIVES[name](Decoder(**STACK)), name, 'must be a model that reads tokens', 'got a Decoder, a stack')
    refuses(lambda: OBJECTIVES[name](gpt()), name, 'got the objective AutoregressiveWrapper', 'Give its .net')


OF_OTHER_INPUTS: dict[str, Callable[[], nn.Module]] = {
    'vectors': lambda: ContinuousTransformerWrapper(dim_in=3, attn_layers=Decoder(**STACK)),
    'token ids and their numbers': lambda: XValTransformerWrapper(
        num_tokens=TOKENS, max_seq_len=LONGEST, numerical_token_id=3, attn_layers=Decoder(**STACK)
    ),
    'a dictionary of token ids': lambda: MultiInputTransformerWrapper(
        num_tokens={'a': 3}, max_seq_len=8, attn_layers=Decoder(**STACK)
    ),
    'images': lambda: ViTransformerWrapper(image_size=4, patch_size=2, attn_layers=Encoder(**STACK)),
    'a number for each input neuron': lambda: NeoMLP(dim_in=2, dim_hidden=2, dim_out=2, dim_model=16, depth=1),
}


@pytest.mark.parametrize('name', ['AutoregressiveWrapper', 'DPO', 'EntropyBasedTokenizer', 'ContinuousAutoregressiveWrapper'])
@pytest.mark.parametrize('reads', OF_OTHER_INPUTS)
def test_an_objective_is_given_a_model_of_its_inputs(name: str, reads: str) -> None:
    if (name, reads) == ('ContinuousAutoregressiveWrapper', 'vectors'):
        return
    refuses(lambda: OBJECTIVES[name](OF_OTHER_INPUTS[reads]()), name, 'must be a model that reads', f'which reads {reads}')


@pytest.mark.parametrize('name', ['AutoregressiveWrapper', 'DPO', 'EntropyBasedTokenizer'])
def test_an_objective_without_a_net_is_no_net(name: str) -> None:
    refuses(lambda: OBJECTIVES[name](pair()), name, 'got a XTransformer, which is an objective')


def test_a_stack_is_a_model_of_vectors() -> None:
    assert ContinuousAutoregressiveWrapper(Decoder(**STACK))(VECTORS).isfinite()


def test_tokens_are_not_shifted_by_less_than_none() -> None:
    refuses(lambda: Decoder(**STACK, shift_tokens=-1), 'shift_tokens', 'at least 0')
    refuses(lambda: Decoder(**STACK, shift_tokens=(1, 0, -1, 0)), 'shift_tokens', 'at least 0')


@pytest.mark.parametrize(
    ('call', 'words'),
    [
        case(
            'angles alone',
            lambda: attention()(VECTORS, rotary_pos_emb=VECTORS[..., :8]),
            'rotary_pos_emb',
            'scale',
            '(2, 6, 8)',
        ),
        case('angles of no kind', lambda: attention()(VECTORS, polar_pos_emb=[1, 2]), 'polar_pos_emb', 'angles', 'list'),
        case('groups that do not divide', lambda: l2norm(VECTORS, groups=3), 'groups', '3', '(2, 6, 16)'),
        case('a mask of fewer tokens', lambda: shift(VECTORS, 1, mask=ONES[:, :3]), 'mask', '(2, 6)', '(2, 3)'),
        case('positions of four axes', lambda: ALIBI.forward_custom_pos(torch.zeros(1, 1, 1, 1)), '(b h n)', '(1, 1, 1, 1)'),
        case('one position', lambda: ALIBI.forward_custom_pos(torch.tensor(1)), '(b h n)', '()'),
        case('keys of four axes', lambda: ALIBI.forward_custom_pos(torch.arange(3), torch.zeros(1, 1, 1, 1)), 'pos_j'),
    ],
)
def test_helpers_by_themselves(call: Call, words: tuple[str, ...]) -> None:
    refuses(call, *words)
