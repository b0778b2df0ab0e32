"""What was once found broken, each as small as it shows."""

from __future__ import annotations

import copy
import gc
import random
import sys
import threading
import warnings
import weakref

import pytest
import torch
from torch import Tensor, nn

from x_transformers import (
    DPO,
    AutoregressiveWrapper,
    BeliefStateWrapper,
    ContinuousAutoregressiveWrapper,
    ContinuousTransformerWrapper,
    Decoder,
    Encoder,
    EntropyBasedTokenizer,
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
from x_transformers.autoregressive_wrapper import gumbel_sample
from x_transformers.dpo import log_prob_from_model_and_seq
from x_transformers.flags.base import FlagError
from x_transformers.free_transformer import FreeTransformer
from x_transformers.gpt_vae import GPTVAE
from x_transformers.nonautoregressive_wrapper import gumbel_sample as masked_gumbel_sample
from x_transformers.up_wrapper import SyntheticDataGenerator

V, N = 24, 8


def stack(kind: type = Decoder, **flags: object) -> nn.Module:
    return kind(**{'dim': 16, 'depth': 2, 'heads': 2, 'attn_dim_head': 8, **flags})


def language_model(
    kind: type = Decoder, num_tokens: int = V, wrapper: dict | None = None, **flags: object
) -> TransformerWrapper:
    return TransformerWrapper(num_tokens=num_tokens, max_seq_len=32, attn_layers=stack(kind, **flags), **(wrapper or {}))


def ids(*shape: int, low: int = 1, high: int = V) -> Tensor:
    return torch.randint(low, high, shape)


def shaken(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


# ---------------------------------------------------------------- token ids of any dtype

INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.int64]


def losses_of_ids() -> dict[str, tuple]:
    """A function from ids to a number, for everything that is trained on ids."""
    dpo = shaken(DPO(language_model()))
    prompt = torch.arange(N)[None].expand(3, -1) < 3
    xval = XValAutoregressiveWrapper(
        XValTransformerWrapper(num_tokens=V, max_seq_len=32, numerical_token_id=3, attn_layers=stack())
    )
    numbers, mask = torch.randn(3, N), torch.arange(N)[None] < torch.tensor([[N], [5], [3]])
    masked = NonAutoregressiveWrapper(
        TransformerWrapper(num_tokens=V, max_seq_len=N, attn_layers=stack(Encoder)), mask_id=0, self_token_critic=True
    )
    translation = XTransformer(
        dim=16, enc_num_tokens=V, enc_max_seq_len=N, enc_depth=1, dec_num_tokens=V, dec_max_seq_len=N, dec_depth=1
    )
    several = MultiInputTransformerWrapper(num_tokens={'a': V, 'b': V}, max_seq_len=N, attn_layers=stack())
    belief = BeliefStateWrapper(language_model())
    vae = GPTVAE(num_tokens=V, dim=16, depth=1, enc_depth=1, max_seq_len=N, heads=2)
    free = FreeTransformer(num_tokens=V, dim=16, dec_head_depth=1, dec_tail_depth=1, max_seq_len=N, latent_bits=2, heads=2)
    machine = SyntheticDataGenerator(16, V)
    writer = AutoregressiveWrapper(language_model())
    return {
        'model': language_model(),
        'autoregressive': AutoregressiveWrapper(language_model()),
        'ignored': AutoregressiveWrapper(language_model(), ignore_index=5, pad_value=3),
        'xl': XLAutoregressiveWrapper(language_model(wrapper={'max_mem_len': 8})),
        'dpo': lambda x: dpo(x, x.flip(0), prompt_mask=prompt),
        'xval': lambda x: xval(x, numbers, mask=mask),
        'masked': lambda x: masked(x).loss,
        'translation': lambda x: translation(x, x),
        'several': lambda x: several({'a': x, 'b': x})['a'],
        'belief': belief,
        'vae': vae,
        'free': free,
        'machine': lambda x: machine(x)[0],
        'tokenizer': EntropyBasedTokenizer(language_model(), entropy_threshold=3.1),
        'generate': lambda x: writer.generate(x, 3),
        'beams': lambda x: writer.beam_search(x, 3),
    }


@pytest.mark.parametrize('name', list(losses_of_ids()))
def test_ids_of_every_integer_dtype_give_the_same(name: str) -> None:
    fn, x = losses_of_ids()[name], ids(3, N)

    def run(given: Tensor) -> Tensor:
        torch.manual_seed(0)
        random.seed(0)
        return fn(given)

    wanted = run(x)
    for dtype in INTEGERS:
        assert torch.equal(run(x.to(dtype)), wanted), dtype
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        with pytest.warns(UserWarning, match='whole numbers of torch') as caught:
            assert torch.equal(run(x.to(dtype)), wanted)
        assert caught[0].filename == __file__
    with pytest.raises(TypeError, match='must be integers'):
        run(x + 0.5)
    with pytest.raises(TypeError, match='must be integers'):
        run(x > 3)


# ---------------------------------------------------------------- half precision


@pytest.mark.parametrize('sample', [gumbel_sample, masked_gumbel_sample])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_gumbel_samples_in_half_precision_are_those_of_the_distribution(sample: object, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 2000) * 2
    best = logits[0].topk(100).indices
    logits = logits.to(dtype)
    mass = logits.float().softmax(-1)[0, best].sum()
    drawn = torch.isin(sample(logits.expand(20000, -1)), best).float().mean()
    assert abs(drawn - mass) < 0.015


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_losses_in_half_precision_are_single(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for name, fn in losses_of_ids().items():
        if not isinstance(fn, nn.Module) or name in ('model', 'tokenizer'):
            continue
        loss = fn.to(dtype)(ids(3, N))
        assert loss.dtype == torch.float32, name
    net = language_model().to(dtype)
    x = ids(2, N)
    logits = net(x).float()
    wanted = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    assert torch.allclose(AutoregressiveWrapper(net)(x), wanted, atol=1e-6)
    frames = ContinuousAutoregressiveWrapper(
        ContinuousTransformerWrapper(dim_in=4, dim_out=4, max_seq_len=N, attn_layers=stack())
    ).to(dtype)
    assert frames(torch.randn(2, N, 4).to(dtype)).dtype == torch.float32


# ---------------------------------------------------------------- modes


def test_overlapping_streams_leave_the_mode() -> None:
    model = AutoregressiveWrapper(language_model(layer_dropout=0.5))
    prompt = ids(1, 3)
    model.net.attn_layers.layers[0].eval()
    before = [module.training for module in model.modules()]
    first, second = model.stream(prompt, 4), model.stream(prompt, 4)
    next(first), next(second)
    list(first)
    assert not any(module.training for module in model.modules())
    list(second)
    assert [module.training for module in model.modules()] == before


def test_a_model_is_collected_with_a_stream_that_is_still_open(monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[object] = []
    monkeypatch.setattr(sys, 'unraisablehook', raised.append)
    model = AutoregressiveWrapper(language_model())
    alive = weakref.ref(model)
    model.open = model.stream(ids(1, 3), 4)
    next(model.open)
    del model
    gc.collect()
    assert alive() is None
    assert raised == []


@pytest.mark.parametrize('mode', [False, True])
def test_train_and_eval_during_a_stream_hold_afterwards(mode: bool) -> None:
    model = AutoregressiveWrapper(language_model())
    model.train(not mode)
    stream = model.stream(ids(1, 3), 4)
    next(stream)
    model.train(mode)
    next(stream)
    assert not model.net.attn_layers.training
    stream.close()
    assert all(module.training == mode for module in model.modules())


def test_only_the_part_that_was_switched_keeps_its_new_mode() -> None:
    model = AutoregressiveWrapper(language_model())
    stream = model.stream(ids(1, 3), 4)
    next(stream)
    model.net.attn_layers.eval()
    list(stream)
    assert model.training
    assert model.net.training
    assert not any(module.training for module in model.net.attn_layers.modules())


def test_threads_leave_the_mode() -> None:
    model = AutoregressiveWrapper(language_model())
    prompt = ids(1, 3)
    wanted = model.generate(prompt, 8, temperature=0.0)
    failed: list[object] = []

    def run(count: int) -> None:
        for index in range(count):
            if not torch.equal(model.generate(prompt, 8 - index, temperature=0.0), wanted[:, : 8 - index]):
                failed.append(index)

    threads = [threading.Thread(target=run, args=(4,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert all(module.training for module in model.modules())


def test_a_model_can_be_copied_while_it_streams() -> None:
    model = AutoregressiveWrapper(language_model())
    stream = model.stream(ids(1, 3), 4)
    next(stream)
    twin = copy.deepcopy(model).train()
    list(stream)
    assert twin.training
    assert model.training


# ---------------------------------------------------------------- masked generation


def masked_generation(**flags: object) -> NonAutoregressiveWrapper:
    net = TransformerWrapper(num_tokens=V, max_seq_len=N, attn_layers=stack(Encoder, **flags))
    return NonAutoregressiveWrapper(net, mask_id=0, self_token_critic=True, random_token_prob=0.0, steps=2)


def critic_reads_padding(model: NonAutoregressiveWrapper, **given: object) -> bool:
    mask = torch.arange(N)[None] < torch.tensor([[N], [5]])
    x = ids(2, N)
    seen = []
    for t in (x, x.masked_fill(~mask, 7)):
        torch.manual_seed(0)
        random.seed(0)
        seen.append(model(t, mask=mask, **given).critic_loss)
    return not torch.equal(*seen)


def test_the_critic_is_blind_to_padding() -> None:
    assert not critic_reads_padding(masked_generation())


def test_the_critic_is_told_context_and_condition() -> None:
    told = {'context': torch.randn(2, 3, 16), 'context_mask': torch.ones(2, 3, dtype=torch.bool)}
    for flags, given in (({'cross_attend': True}, told), ({'use_adaptive_rmsnorm': True}, {'condition': torch.randn(2, 16)})):
        model = masked_generation(**flags)
        assert model(ids(2, N), **given).critic_loss.isfinite()
        assert model.generate(2, **given).shape == (2, N)


def test_a_critic_of_its_own_is_told_the_mask() -> None:
    net = TransformerWrapper(num_tokens=V, max_seq_len=N, attn_layers=stack(Encoder, cross_attend=True))
    critic = TransformerWrapper(num_tokens=V, max_seq_len=N, logits_dim=1, attn_layers=stack(Encoder))
    model = NonAutoregressiveWrapper(net, mask_id=0, token_critic=critic, random_token_prob=0.0)
    assert not critic_reads_padding(model, context=torch.randn(2, 3, 16))


# ---------------------------------------------------------------- memories


def test_masks_of_memories_go_along_when_these_are_moved_down() -> None:
    moved = language_model(depth=3, wrapper={'max_mem_len': 4, 'shift_mem_down': 1}).eval()
    plain = language_model(depth=3, wrapper={'max_mem_len': 4}).eval()
    plain.load_state_dict(moved.state_dict())
    x = ids(2, 5)
    mems = [torch.randn(2, length, 16) for length in (4, 3, 2)]
    masks = [torch.rand(2, length) > 0.4 for length in (4, 3, 2)]
    wanted = plain(x, mems=mems[1:] + mems[:1], mem_masks=masks[1:] + masks[:1])
    assert torch.allclose(moved(x, mems=mems, mem_masks=masks), wanted, atol=1e-5)


def test_memories_of_no_length_are_none() -> None:
    net, x = language_model(wrapper={'max_mem_len': 4}).eval(), ids(2, 5)
    mems, masks = [torch.empty(2, 0, 16)] * 2, [torch.ones(2, 0, dtype=torch.bool)] * 2
    assert torch.equal(net(x, mems=mems, mem_masks=masks), net(x))
    with pytest.raises(TypeError, match='mem_masks must be a list'):
        net(x, mems=[torch.randn(2, 4, 16)] * 2, mem_masks=torch.ones(2, 4, dtype=torch.bool))


# ---------------------------------------------------------------- the z-loss of the attention


def z_loss(net: nn.Module, x: Tensor, **given: object) -> Tensor:
    return net(x, return_attn_z_loss=True, attn_z_loss_weight=1.0, **given)[1].attn_z_loss


@pytest.mark.parametrize('wrapper', [{}, {'num_memory_tokens': 2}], ids=str)
def test_the_z_loss_is_blind_to_padding(wrapper: dict) -> None:
    x, mask = ids(2, N), torch.arange(N)[None] < torch.tensor([[N], [4]])
    other = x.clone()
    other[1, 4:] = 7
    for kind in (Encoder, Decoder):
        net = language_model(kind, wrapper=wrapper)
        assert torch.equal(z_loss(net, x, mask=mask), z_loss(net, other, mask=mask))
    net = language_model(wrapper=wrapper, rotary_pos_emb=True)
    alone, rows = z_loss(net, x[:1, 3:]), torch.cat((torch.zeros(1, 3).long(), x[:1, 3:]), dim=1)
    assert torch.allclose(z_loss(net, rows, seq_start_pos=torch.tensor([3])), alone, rtol=1e-5)


def test_the_z_loss_of_rows_that_see_nothing_is_finite() -> None:
    x, empty = ids(2, N), torch.ones(N, N, dtype=torch.bool)
    empty[3] = False
    hidden = torch.tensor([[True] * N, [False] * N])
    context = torch.randn(2, 3, 16)
    for net, given in (
        (language_model(), {'attn_mask': empty}),
        (language_model(Encoder), {'mask': hidden}),
        (language_model(cross_attend=True), {'context': context, 'context_mask': torch.zeros(2, 3, dtype=torch.bool)}),
        (language_model(residual_attn=True), {'seq_start_pos': torch.tensor([0, 3])}),
    ):
        loss = z_loss(net, x, **given)
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
    model = AutoregressiveWrapper(language_model(), add_attn_z_loss=True)
    assert model(x, seq_start_pos=torch.tensor([0, 3])).isfinite()


# ---------------------------------------------------------------- ALiBi at positions of each head


def alibi(**flags: object) -> TransformerWrapper:
    return language_model(wrapper={'use_abs_pos_emb': False}, alibi_pos_bias=True, heads=4, **flags).eval()


@pytest.mark.parametrize('biased', [4, 2])
@pytest.mark.parametrize('kernel', ['reference', None])
def test_alibi_at_positions_of_each_head(biased: int, kernel: str | None) -> None:
    """Rows and columns of a grid as the positions of two heads, by a loop."""
    slopes = [0.5, 1.0, 0.25, 2.0][:biased]
    given = {} if biased == 4 else {'alibi_num_heads': biased}
    net = alibi(rel_pos_kwargs={'slopes': slopes}, attn_flash=kernel is None, **given)
    x, pos = ids(2, N), torch.randint(0, 20, (2, biased, N))
    bias = torch.zeros(2, 4, N, N)
    for b in range(2):
        for h in range(biased):
            for i in range(N):
                for j in range(N):
                    bias[b, h, i, j] = -slopes[h] * abs(int(pos[b, h, i]) - int(pos[b, h, j]))
    plain = language_model(wrapper={'use_abs_pos_emb': False}, heads=4).eval()
    plain.load_state_dict(net.state_dict())
    wanted = plain(x, attn_bias=bias)
    assert torch.allclose(net(x, pos=pos), wanted, atol=1e-5)
    _, cache = net(x[:, :5], pos=pos[..., :5], return_intermediates=True)
    for new in (pos, pos[..., 5:]):
        assert torch.allclose(net(x, pos=new, cache=cache)[:, -3:], wanted[:, -3:], atol=1e-5)
    _, cache = net(x[:, 5:7], pos=pos[..., 5:7], cache=cache, return_intermediates=True, input_not_include_cache=True)
    assert torch.allclose(net(x, pos=pos[..., 7:], cache=cache)[:, -1], wanted[:, -1], atol=1e-5)


def test_positions_of_each_head_in_generation_and_behind_a_prefix() -> None:
    net = alibi(rel_pos_kwargs={'slopes': [1.0, 1.0, 0.5, 0.5]})
    model, pos = AutoregressiveWrapper(net), torch.randint(0, 20, (2, 4, 12))
    prompt = ids(2, 5)
    cached, uncached = (model.generate(prompt, 7, temperature=0.0, pos=pos, cache_kv=c) for c in (True, False))
    assert torch.equal(cached, uncached)
    assert model.beam_search(prompt, 7, pos=pos, beams=2).shape == (2, 7)
    x, prefix = ids(2, N), torch.randn(2, 2, 16)
    assert net(x, pos=pos[..., :N], prepend_embeds=prefix).shape == (2, N + 2, V)
    rows = torch.cat((torch.zeros(2, 3).long(), x), dim=1)
    behind = torch.cat((torch.zeros(2, 4, 3).long(), pos[..., :N]), dim=-1)
    padded = net(rows, pos=behind, prepend_embeds=prefix, seq_start_pos=torch.tensor([3, 3]))
    assert torch.allclose(padded[:, -N:], net(x, pos=pos[..., :N], prepend_embeds=prefix)[:, -N:], atol=1e-5)


def test_positions_of_each_head_that_fit_nothing() -> None:
    pos = torch.zeros(2, 3, N, dtype=torch.long)
    for net, says in (
        (alibi(), 'each of the 4 heads'),
        (language_model(rel_pos_bias=True), 'without alibi_pos_bias'),
        (language_model(alibi_pos_bias=True), 'use_abs_pos_emb=False'),
        (language_model(alibi_pos_bias=True, rotary_pos_emb=True, verbose=False), 'all heads alike'),
    ):
        with pytest.raises(ValueError, match=says):
            net(ids(2, N), pos=pos)


# ---------------------------------------------------------------- what is built can run


def test_the_next_embedding_has_the_width_of_embeddings() -> None:
    net = language_model(wrapper={'emb_dim': 12, 'add_continuous_pred_head': True})
    assert AutoregressiveWrapper(net)(ids(2, N)).isfinite()


def test_recycled_rounds_have_factors_of_tokens() -> None:
    net = language_model(wrapper={'recycling': True, 'ff_deep_embed': True}).eval()
    x = ids(2, N)
    net(x, recycle_steps=2).sum().backward()
    assert net.ff_deep_embed.grad.abs().sum() > 0
    with torch.no_grad():
        net.ff_deep_embed.uniform_(0.5, 1.5)
        plain = language_model(wrapper={'ff_deep_embed': True}).eval()
        plain.load_state_dict(net.state_dict(), strict=False)
        assert torch.allclose(net(x, recycle_steps=1), plain(x))
        table = {'deep_embeds_and_ids': (net.ff_deep_embed, x)}
        fed = net.token_emb(x) + net.pos_emb(x)
        again = fed + net.recycled_proj(net.attn_layers(fed, **table))
        assert torch.allclose(net(x, recycle_steps=2), net.to_logits(net.attn_layers(again, **table)), atol=1e-5)


def test_the_free_transformer_reads_anew_what_cannot_be_remembered() -> None:
    model = FreeTransformer(
        num_tokens=9, dim=16, dec_head_depth=1, dec_tail_depth=1, max_seq_len=16, latent_bits=2, heads=2,
        dec_kwargs={'attn_selective': True},
    )  # fmt: skip
    prompt = ids(1, 3, high=9)
    cached, uncached = (model.generate(prompt, 8, temperature=0.0, use_kv_cache=c) for c in (True, False))
    assert torch.equal(cached, uncached)


BOTH = {
    'dim': 16, 'enc_num_tokens': 9, 'enc_depth': 1, 'enc_heads': 2, 'enc_max_seq_len': 8,
    'dec_num_tokens': 9, 'dec_depth': 1, 'dec_heads': 2, 'dec_max_seq_len': 8,
}  # fmt: skip


@pytest.mark.parametrize(
    'flags',
    [
        {'enc_use_cls_token': True}, {'enc_average_pool_embed': True}, {'enc_recycling': True},
        {'enc_use_adaptive_rmsnorm': True}, {'enc_embed_num_tokens': {'kind': 3}}, {'dec_use_cls_token': True},
        {'dec_average_pool_embed': True}, {'dec_num_output_heads': 2}, {'dec_use_adaptive_layernorm': True},
        {'dec_recycling': True}, {'dec_logits_dim': 3}, {'dec_embed_num_tokens': {'kind': 3}},
    ],
    ids=str,
)  # fmt: skip
def test_an_encoder_decoder_that_could_not_run_is_refused(flags: dict) -> None:
    with pytest.raises(FlagError, match=f'`{next(iter(flags))}='):
        XTransformer(**BOTH, **flags)


def test_keywords_of_encoder_and_decoder_without_effect_are_one_warning() -> None:
    given = {'enc_max_mem_len': 4, 'enc_attn_z_loss_weight': 0.5, 'enc_add_continuous_pred_head': True, 'enc_attn_pool': True}
    given |= {'dec_attn_qk_norm_scale': 3.0, 'enc_attn_qk_norm_groups': 2}
    with pytest.warns(InertFlagWarning) as caught:
        XTransformer(**BOTH, **given)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert all(f'`{name}=' in str(caught[0].message) for name in given)


@pytest.mark.parametrize('flags', [{'cross_attend': True}, {'use_adaptive_layernorm': True}], ids=str)
def test_models_that_are_told_nothing_beside_their_input(flags: dict) -> None:
    sizes = {'num_tokens': 9, 'dim': 16, 'max_seq_len': 8}
    free = {**sizes, 'dec_head_depth': 1, 'dec_tail_depth': 1, 'latent_bits': 2, 'heads': 2}
    for build in (
        lambda: ViTransformerWrapper(image_size=8, patch_size=4, attn_layers=stack(Encoder, **flags)),
        lambda: NeoMLP(dim_in=2, dim_hidden=2, dim_out=2, dim_model=8, depth=1, encoder_kwargs=flags),
        lambda: GPTVAE(**sizes, depth=1, enc_depth=1, dec_kwargs=flags),
        lambda: GPTVAE(**sizes, depth=1, enc_depth=1, enc_kwargs=flags),
        lambda: FreeTransformer(**free, dec_kwargs={'use_rmsnorm': False, **flags}),
    ):
        with pytest.raises(FlagError, match=next(iter(flags))):
            build()


def test_a_keyword_of_all_stacks_has_effect_if_it_has_in_one() -> None:
    free = {
        'num_tokens': 9,
        'dim': 16,
        'max_seq_len': 8,
        'dec_head_depth': 1,
        'dec_tail_depth': 1,
        'latent_bits': 2,
        'heads': 2,
    }
    FreeTransformer(**free, attn_selective=True)
    with pytest.warns(InertFlagWarning) as caught:
        FreeTransformer(**free, attn_qk_norm_scale=3.0, dim_latent=4, enc_kwargs={'dim_condition': 3})
    assert len(caught) == 1
    assert all(name in str(caught[0].message) for name in ('attn_qk_norm_scale', 'dim_latent', 'dim_condition'))


@pytest.mark.parametrize('kind', [Decoder, PrefixDecoder])
def test_class_tokens_of_a_stack_that_reads_from_left_to_right(kind: type) -> None:
    with pytest.raises(FlagError, match='use_cls_token'):
        language_model(kind, wrapper={'use_cls_token': True})


# ---------------------------------------------------------------- xVal


def test_a_mask_over_prefix_and_numbers() -> None:
    net = XValTransformerWrapper(num_tokens=V, max_seq_len=16, numerical_token_id=3, attn_layers=stack(Encoder))
    x, numbers, prefix = ids(2, N), torch.randn(2, N), torch.randn(2, 2, 16)
    mask = torch.arange(N)[None] < torch.tensor([[N], [5]])
    whole = torch.cat((torch.ones(2, 2, dtype=torch.bool), mask), dim=1)
    for one, other in zip(
        net(x, numbers, prepend_embeds=prefix, mask=whole), net(x, numbers, prepend_embeds=prefix, mask=mask), strict=True
    ):
        assert torch.equal(one, other)
    hidden = whole.clone()
    hidden[:, 0] = False
    shown = torch.tensor([[False, True]]).expand(2, -1)
    wanted = net(x, numbers, prepend_embeds=prefix, mask=mask, prepend_mask=shown)
    assert torch.equal(net(x, numbers, prepend_embeds=prefix, mask=hidden)[0], wanted[0])
    causal = XValTransformerWrapper(num_tokens=V, max_seq_len=16, numerical_token_id=3, attn_layers=stack())
    model = XValAutoregressiveWrapper(causal)
    assert torch.equal(
        model(x, numbers, prepend_embeds=prefix, mask=whole), model(x, numbers, prepend_embeds=prefix, mask=mask)
    )


# ---------------------------------------------------------------- preferences


def test_log_probabilities_of_a_sequence() -> None:
    net, x = language_model(), ids(2, N)
    wanted = net(x).log_softmax(dim=-1)[:, :-1].gather(-1, x[:, 1:, None]).squeeze(-1)
    assert torch.allclose(log_prob_from_model_and_seq(net, x), wanted, atol=1e-5)


def test_the_reference_of_a_tied_head_stays_what_it_was() -> None:
    model, x = DPO(language_model(wrapper={'tie_embedding': True})).eval(), ids(2, N)
    before = model.ref_model(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    assert torch.equal(model.ref_model(x), before)
    assert not torch.equal(model.policy_model(x), before)


def test_pads_that_are_no_token_are_not_looked_up() -> None:
    model = shaken(DPO(language_model(), pad_id=-1))
    other = DPO(language_model(), pad_id=0)
    other.load_state_dict(model.state_dict())
    x, y, prompt = ids(2, N), ids(2, N), torch.arange(N)[None].expand(2, -1) < 3
    x[1, 5:] = 0
    assert torch.equal(model(x.masked_fill(x == 0, -1), y, prompt_mask=prompt), other(x, y, prompt_mask=prompt))


# ---------------------------------------------------------------- packed sequences


def test_the_loss_of_packed_documents_is_that_of_each() -> None:
    net = language_model(
        rotary_pos_emb=True, attn_flash_pack_seq=True, verbose=False, attn_dim_head=8, wrapper={'use_abs_pos_emb': False}
    ).eval()
    model, documents = AutoregressiveWrapper(net), [ids(1, length) for length in (5, 3, 6)]
    ends = torch.tensor([0, 5, 8, 14], dtype=torch.int32)
    row, packing = torch.cat(documents, dim=1), {'cu_seqlens_q': ends, 'cu_seqlens_k': ends}
    alone = sum(model(document) * (document.shape[1] - 1) for document in documents) / (14 - 3)
    for asked in ({}, {'return_outputs': True}):
        loss = model(row, flash_pack_seq_kwargs=packing, **asked)
        assert torch.allclose(loss[0] if asked else loss, alone, atol=1e-5)


# ---------------------------------------------------------------- said by name, not by torch


@pytest.mark.parametrize(
    'flags',
    [{}, {'rotary_pos_emb': True}, {'alibi_pos_bias': True}, {'rel_pos_bias': True}, {'dynamic_pos_bias': True}],
    ids=str,
)
def test_sequences_without_tokens_and_batches_without_rows(flags: dict) -> None:
    net = language_model(verbose=False, **flags)
    assert net(ids(2, 0)).shape == (2, 0, V)
    assert net(ids(0, N)).shape == (0, N, V)


@pytest.mark.parametrize('flags', [{'attn_selective': True}, {'attn_hard': True}, {'attn_gumbel_softmax': True}], ids=str)
def test_attention_that_chooses_among_keys_needs_some(flags: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(flags))):
        language_model(**flags)(ids(2, 0))


def test_pools_and_images_of_nothing() -> None:
    assert language_model(Encoder, wrapper={'average_pool_embed': True})(ids(2, 0)).isfinite().all()
    net = ViTransformerWrapper(image_size=8, patch_size=4, num_classes=3, attn_layers=stack(Encoder))
    assert net(torch.randn(0, 3, 8, 8)).shape == (0, 3)
    assert EntropyBasedTokenizer(language_model(), 1.0)(ids(0, N)).shape == (0, 0)


def test_other_precisions_are_read_in_that_of_the_model() -> None:
    x, added, context = ids(2, N), torch.randn(2, N, 16), torch.randn(2, 3, 16)
    net = language_model(cross_attend=True).eval()
    wanted = net(x, context=context, sum_embeds=added)
    assert torch.allclose(net(x, context=context.double(), sum_embeds=added.double()), wanted, atol=1e-6)
    image = ViTransformerWrapper(image_size=8, patch_size=4, attn_layers=stack(Encoder))
    assert image(torch.randn(1, 3, 8, 8).double()).dtype == torch.float32
    frames = ContinuousTransformerWrapper(dim_in=4, dim_out=4, max_seq_len=N, attn_layers=stack())
    assert frames(torch.randn(2, N, 4).double()).dtype == torch.float32
    assert frames.bfloat16()(torch.randn(2, N, 4)).dtype == torch.bfloat16
    neurons = NeoMLP(dim_in=2, dim_hidden=2, dim_out=2, dim_model=8, depth=1)
    assert neurons(torch.randn(3, 2).double()).dtype == torch.float32


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_conditions_and_shifts_are_read_in_the_precision_of_the_model(dtype: torch.dtype) -> None:
    x, wide = ids(2, N), torch.randn(2, N, 16)
    for flags, given in (
        ({'use_adaptive_layernorm': True}, {'condition': wide}),
        ({}, {'in_attn_cond': wide}),
        ({}, {'self_attn_kv_residuals': wide}),
        ({'cross_attend': True}, {'context': wide, 'cross_attn_kv_residuals': wide}),
    ):
        net = language_model(**flags)
        other = {name: value.to(dtype) for name, value in given.items()}
        same = {name: value.float() for name, value in other.items()}
        assert torch.equal(net(x, **other), net(x, **same))


@pytest.mark.parametrize(
    ('given', 'says'),
    [
        ({'temperature': float('inf')}, 'finite'),
        ({'filter_logits_fn': 'min_p', 'filter_kwargs': {'min_p': 2.0}}, 'must leave at least one token'),
        ({'filter_logits_fn': lambda logits: logits - torch.inf}, 'must leave a token'),
        ({'draft_model': 'x'}, 'draft_model'),
        ({'return_attn': True}, 'return_attn must be left out'),
        ({'return_embeddings': True}, 'return_embeddings must be left out'),
        ({'logits_last': 1}, 'logits_last must be left out'),
        ({'seq_start_pos': torch.tensor([0, 1])}, 'prompt_lens'),
        ({'mask': [[True] * 5] * 2}, 'mask must be a tensor'),
        ({'amateur_model': True}, 'amateur_model'),
    ],
    ids=lambda part: '',
)
def test_generation_that_cannot_be(given: dict, says: str) -> None:
    with pytest.raises((ValueError, TypeError), match=says):
        AutoregressiveWrapper(language_model()).generate(ids(2, 5), 3, **given)


def test_an_amateur_leaves_a_token() -> None:
    model = AutoregressiveWrapper(language_model())
    with pytest.raises(ValueError, match='alpha must be a share'):
        model.generate(ids(2, 5), 3, amateur_model=language_model(), contrastive_decode_kwargs={'alpha': 1.5})


@pytest.mark.parametrize('given', [{'eos_token': 99}, {'lookahead': 7}, {'contrastive_decode_kwargs': {'alpha': 0.3}}], ids=str)
def test_arguments_of_generation_without_effect(given: dict) -> None:
    model = AutoregressiveWrapper(language_model())
    for call in (model.generate, lambda *args, **more: list(model.stream(*args, **more))):
        with pytest.warns(InertFlagWarning, match=next(iter(given))) as caught:
            call(ids(2, 5), 3, **given)
        assert len(caught) == 1
        assert caught[0].filename == __file__


@pytest.mark.parametrize('given', [{'temperature': 0.5}, {'filter_kwargs': {'k': 2}}], ids=str)
def test_arguments_of_beams_without_effect(given: dict) -> None:
    with pytest.warns(InertFlagWarning, match='stochastic'):
        AutoregressiveWrapper(language_model()).beam_search(ids(2, 5), 3, **given)


def test_arguments_of_a_model_that_cannot_be() -> None:
    net, x = language_model(), ids(2, N)
    with pytest.warns(InertFlagWarning, match='prepend_mask'):
        net(x, prepend_mask=torch.zeros(2, 3, dtype=torch.bool))
    for start in (torch.tensor([-3, 0]), torch.tensor([0, N + 1]), [0, 1]):
        with pytest.raises((ValueError, TypeError), match='seq_start_pos'):
            net(x, seq_start_pos=start)
    with pytest.raises(TypeError, match='mask must be a boolean tensor'):
        net(x, mask=[[True] * N] * 2)
    for depth in (1, 3):
        _, cache = language_model(depth=depth)(x[:, :3], return_intermediates=True)
        with pytest.raises(ValueError, match='cache must be of a stack like this one'):
            net(x, cache=cache)


@pytest.mark.parametrize('flags', [{}, {'gate_residual': True}, {'num_residual_streams': 2}, {'resi_dual': True}], ids=str)
def test_keywords_that_a_residual_does_not_have(flags: dict) -> None:
    with pytest.raises(FlagError, match='scale_residual_constantt'):
        Decoder(dim=16, depth=1, heads=2, residual_fn_kwargs={'scale_residual_constantt': 2.0}, **flags)
    Decoder(dim=16, depth=1, heads=2, residual_fn_kwargs={'scale_residual_constant': 2.0}, **flags)


# ---------------------------------------------------------------- keywords without effect


def test_copies_and_stored_models_are_silent(tmp_path) -> None:
    with pytest.warns(InertFlagWarning) as caught:
        net = language_model(attn_qk_norm_scale=3.0)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        copy.deepcopy(net)
        torch.save(net, tmp_path / 'net.pt')
        torch.load(tmp_path / 'net.pt', weights_only=False)
        net.load_state_dict(copy.deepcopy(net.state_dict()))
        language_model(attn_qk_norm_scale=10.0, cross_attn_head_scale=False, dim_condition=None)


def test_contradictions_and_unknown_names_stay_errors() -> None:
    for flags in ({'rotary_pos_emb': True, 'polar_pos_emb': True}, {'attn_qk_nrm': True}, {'cross_attn_headscale': True}):
        with pytest.raises(FlagError):
            language_model(**flags)
