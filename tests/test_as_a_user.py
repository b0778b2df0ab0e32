"""Programs as users of 2.16.1 write them: they run as they stand, with every warning an error."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from x_transformers import (
    DPO,
    AutoregressiveWrapper,
    BeliefStateWrapper,
    ContinuousAutoregressiveWrapper,
    ContinuousTransformerWrapper,
    CrossAttender,
    Decoder,
    Encoder,
    EntropyBasedTokenizer,
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
from x_transformers.autoregressive_wrapper import (
    min_p,
    modify_cached_kv,
    top_a,
    top_k,
    top_p,
)
from x_transformers.free_transformer import FreeTransformer
from x_transformers.gpt_vae import GPTVAE
from x_transformers.up_wrapper import UniversalPretrainWrapper
from x_transformers.x_transformers import (
    AbsolutePositionalEmbedding,
    AlibiPositionalBias,
    Attention,
    AttentionLayers,
    FeedForward,
    RelativePositionBias,
    RotaryEmbedding,
    ScaledSinusoidalEmbedding,
    TokenEmbedding,
    get_cached_kvs,
)


def test_a_translator() -> None:
    m = XTransformer(
        dim=64,
        enc_num_tokens=256,
        enc_depth=2,
        enc_heads=4,
        enc_max_seq_len=32,
        dec_num_tokens=256,
        dec_depth=2,
        dec_heads=4,
        dec_max_seq_len=32,
        tie_token_emb=True,
    )
    src = torch.randint(0, 256, (2, 32))
    src_mask = torch.ones_like(src).bool()
    tgt = torch.randint(0, 256, (2, 32))
    loss = m(src, tgt, mask=src_mask)
    loss.backward()
    g = m.generate(src, tgt[:, :1], 10, mask=src_mask)
    assert g.shape == (2, 10)
    g = m.generate(
        src[:1],
        torch.ones((1, 1)).long(),
        10,
        eos_token=3,
        temperature=0.5,
        filter_logits_fn='top_p',
        filter_kwargs={'thres': 0.9},
    )


def test_a_language_model() -> None:
    model = TransformerWrapper(num_tokens=20000, max_seq_len=64, attn_layers=Decoder(dim=32, depth=2, heads=2))
    x = torch.randint(0, 256, (1, 64))
    assert model(x).shape == (1, 64, 20000)
    model = AutoregressiveWrapper(model)
    model(x).backward()
    assert model.generate(torch.ones(1, 1).long(), 5).shape == (1, 5)
    assert model.generate(torch.ones(4).long(), 5, temperature=1.0).shape == (5,)


def test_an_encoder() -> None:
    m = TransformerWrapper(num_tokens=200, max_seq_len=64, attn_layers=Encoder(dim=32, depth=2, heads=2))
    x = torch.randint(0, 200, (1, 64))
    mask = torch.ones_like(x).bool()
    assert m(x, mask=mask).shape == (1, 64, 200)
    e = m(x, mask=mask, return_embeddings=True)
    assert e.shape == (1, 64, 32)


def test_captions_of_images() -> None:
    enc = ViTransformerWrapper(image_size=32, patch_size=8, attn_layers=Encoder(dim=32, depth=1, heads=2))
    dec = TransformerWrapper(num_tokens=200, max_seq_len=64, attn_layers=Decoder(dim=32, depth=1, heads=2, cross_attend=True))
    img = torch.randn(1, 3, 32, 32)
    cap = torch.randint(0, 200, (1, 64))
    encoded = enc(img, return_embeddings=True)
    assert dec(cap, context=encoded).shape == (1, 64, 200)
    w = AutoregressiveWrapper(dec)
    w(cap, context=encoded).backward()
    w.generate(cap[:, :1], 5, context=encoded)


def test_a_classifier_of_images() -> None:
    m = ViTransformerWrapper(
        image_size=32, patch_size=8, num_classes=10, num_register_tokens=2, attn_layers=Encoder(dim=32, depth=1, heads=2)
    )
    logits = m(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 10)
    F.cross_entropy(logits, torch.tensor([1, 2])).backward()
    _l, _e = m(torch.randn(2, 3, 32, 32), return_logits_and_embeddings=True)


def test_an_image_as_a_prefix() -> None:
    vit = ViTransformerWrapper(image_size=32, patch_size=8, attn_layers=Encoder(dim=32, depth=1, heads=2))
    m = AutoregressiveWrapper(
        TransformerWrapper(
            num_tokens=200,
            max_seq_len=128,
            attn_layers=Decoder(dim=32, depth=1, heads=2, rotary_pos_emb=True, use_rmsnorm=True, ff_glu=True, ff_swish=True),
        )
    )
    e = vit(torch.randn(1, 3, 32, 32), return_embeddings=True)
    x = torch.randint(0, 200, (1, 16))
    m(x, prepend_embeds=e).backward()
    assert m.generate(x[:, :3], 5, prepend_embeds=e).shape == (1, 5)


def test_memories_of_segments() -> None:
    m = TransformerWrapper(
        num_tokens=200, max_seq_len=16, max_mem_len=32, attn_layers=Decoder(dim=32, depth=2, heads=2, rel_pos_bias=True)
    )
    seg = torch.randint(0, 200, (1, 16))
    _l1, m1 = m(seg, return_mems=True)
    _l2, m2 = m(seg, mems=m1, return_mems=True)
    _l3, _m3 = m(seg, mems=m2, return_mems=True)
    xl = XLAutoregressiveWrapper(m)
    loss = xl(torch.randint(0, 200, (1, 49)))
    loss.backward()
    s = xl.generate(start_tokens=torch.ones(1, 20).long(), seq_len=20)
    assert s.shape == (1, 20)


def test_memories_moved_down() -> None:
    m = TransformerWrapper(
        num_tokens=200,
        max_seq_len=16,
        max_mem_len=16,
        shift_mem_down=1,
        attn_layers=Decoder(dim=32, depth=3, heads=2, rotary_pos_emb=True),
    )
    _, a = m(torch.randint(0, 200, (1, 16)), return_mems=True)
    assert m(torch.randint(0, 200, (1, 16)), mems=a, return_mems=True)[0].shape == (1, 16, 200)


def test_sequences_of_vectors() -> None:
    m = ContinuousTransformerWrapper(dim_in=8, dim_out=8, max_seq_len=32, attn_layers=Encoder(dim=32, depth=2, heads=2))
    x = torch.randn(1, 32, 8)
    mask = torch.ones(1, 32).bool()
    assert m(x, mask=mask).shape == (1, 32, 8)
    d = ContinuousTransformerWrapper(dim_in=8, dim_out=8, max_seq_len=32, attn_layers=Decoder(dim=32, depth=2, heads=2))
    w = ContinuousAutoregressiveWrapper(d)
    w(x, mask=mask).backward()
    assert w.generate(torch.randn(1, 8), 6).shape == (6, 8)
    assert w.generate(torch.randn(2, 3, 8), 6).shape == (2, 6, 8)
    w(x, lens=torch.tensor([20])).backward()
    p = ContinuousAutoregressiveWrapper(
        ContinuousTransformerWrapper(
            dim_in=8, dim_out=8, max_seq_len=32, probabilistic=True, attn_layers=Decoder(dim=32, depth=1, heads=2)
        )
    )
    p(torch.randn(3, 16, 8)).backward()
    p(torch.randn(3, 16, 8), rollout_steps=2).backward()
    p.generate(torch.randn(1, 8), 4)


def test_numbers_among_tokens() -> None:
    m = XValTransformerWrapper(
        num_tokens=4, numerical_token_id=3, max_seq_len=64, attn_layers=Decoder(dim=32, depth=1, heads=2)
    )
    w = XValAutoregressiveWrapper(m)
    ids = torch.randint(0, 4, (1, 33))
    nums = torch.randn(1, 33)
    mask = torch.ones(1, 33).bool()
    loss = w(ids, nums, mask=mask)
    loss.backward()
    a, _b, _is_num = w.generate(torch.randint(0, 4, (1, 1)), torch.randn(1, 1), 10)
    assert a.shape == (1, 10)
    loss, _bd = w(ids, nums, return_loss_breakdown=True)


def test_masked_generation() -> None:
    net = TransformerWrapper(
        num_tokens=21, max_seq_len=16, attn_layers=Encoder(dim=32, depth=2, heads=2, dynamic_pos_bias=True)
    )
    m = NonAutoregressiveWrapper(net, steps=4, mask_id=20, schedule='cosine', self_token_critic=True, self_cond=True)
    l = m(torch.randint(0, 20, (2, 16)))
    l.loss.backward()
    assert m.generate(batch_size=2).shape == (2, 16)
    critic = TransformerWrapper(num_tokens=21, max_seq_len=16, logits_dim=1, attn_layers=Encoder(dim=32, depth=1, heads=2))
    m = NonAutoregressiveWrapper(net, steps=4, mask_id=20, token_critic=critic)
    m(torch.randint(0, 20, (2, 16))).loss.backward()
    m.generate(2, start_temperature=1.0, filter_thres=0.9)


def test_several_inputs() -> None:
    m = MultiInputTransformerWrapper(
        num_tokens={'note': 20000, 'pitch': 32, 'tone': 16},
        max_seq_len=64,
        return_only_embed=True,
        attn_layers=Decoder(dim=32, depth=1, heads=2),
    )
    x = {
        'note': torch.randint(0, 20000, (2, 64)),
        'pitch': torch.randint(0, 32, (2, 64)),
        'tone': torch.randint(0, 16, (2, 64)),
    }
    assert m(x).shape == (2, 64, 32)
    m = MultiInputTransformerWrapper(
        num_tokens={'note': 200, 'pitch': 32}, max_seq_len=64, attn_layers=Decoder(dim=32, depth=1, heads=2)
    )
    o = m({'note': x['pitch'], 'pitch': x['pitch']})
    assert o['note'].shape == (2, 64, 200)


def test_several_outputs() -> None:
    m = TransformerWrapper(
        num_tokens=200,
        max_seq_len=64,
        num_output_heads=2,
        embed_num_tokens={'kind': 5},
        attn_layers=Decoder(dim=32, depth=1, heads=2),
    )
    a, b = m(torch.randint(0, 200, (2, 64)), embed_ids={'kind': torch.randint(0, 5, (2, 64))})
    assert a.shape == b.shape


def test_a_belief_state() -> None:
    m = BeliefStateWrapper(
        forward_decoder=TransformerWrapper(
            num_tokens=256, max_seq_len=32, attn_layers=Decoder(dim=32, depth=1, heads=2, rotary_pos_emb=True)
        ),
        backward_decoder=TransformerWrapper(
            num_tokens=256, max_seq_len=32, attn_layers=Decoder(dim=32, depth=1, heads=2, rotary_pos_emb=True)
        ),
    )
    s = torch.randint(0, 256, (2, 16))
    m(s).backward()
    m(s, lens=torch.tensor([9, 16])).backward()
    assert m.generate_with_suffix_cond(torch.randint(0, 256, (2, 3)), 5, cache_kv=True).shape == (2, 5)
    m.generate_with_suffix_cond(torch.randint(0, 256, (2, 3)), 5, suffix=torch.randint(0, 256, (4,)), decode_backwards=False)
    m.generate_with_suffix_cond(torch.randint(0, 256, (2, 3)), 5, decode_backwards=True)
    m2 = BeliefStateWrapper(
        TransformerWrapper(num_tokens=256, max_seq_len=32, attn_layers=Decoder(dim=32, depth=1, heads=2)),
        pred_distance=True,
        cond_on_distance=True,
    )
    m2(s).backward()


def test_preferences() -> None:
    m = TransformerWrapper(num_tokens=256, max_seq_len=32, attn_layers=Decoder(dim=32, depth=1, heads=2))
    d = DPO(m)
    a, b = torch.randint(0, 256, (2, 2, 32))
    pm = torch.zeros(2, 32).bool()
    pm[:, :5] = True
    d(a, b, prompt_mask=pm).backward()
    opt = torch.optim.Adam(d.parameters())
    opt.step()
    assert d(
        a, b, prompt_mask=pm, preferred_seq_mask=torch.ones(2, 32).bool(), unpreferred_seq_mask=torch.ones(2, 32).bool()
    ).isfinite()


def test_neurons_as_tokens() -> None:
    m = NeoMLP(dim_in=5, dim_hidden=7, dim_out=6, depth=2, dim_model=32)
    x = torch.randn(3, 5)
    assert m(x).shape == (3, 6)
    _o, (_i, _h, _e) = m(x, return_embeds=True)
    assert m(torch.randn(5)).shape == (6,)


def test_a_tokenizer_by_entropy() -> None:
    m = TransformerWrapper(num_tokens=20000, max_seq_len=64, attn_layers=Decoder(dim=32, depth=1, heads=2))
    t = EntropyBasedTokenizer(m, entropy_threshold=9.738)
    s = torch.randint(0, 20000, (2, 64))
    t(s)
    t(s, return_segmented_seq=True)
    t(s[0], return_segmented_seq=True)
    assert len(t(s, lens=torch.tensor([10, 64]), return_segmented_seq=True)) == 2


def test_universal_pretraining() -> None:
    m = TransformerWrapper(num_tokens=256, max_seq_len=32, attn_layers=Decoder(dim=32, depth=1, heads=2))
    u = UniversalPretrainWrapper(m, seq_len=16, batch_size=4, num_reset=2, buffer_size=16)
    u().backward()
    assert m.token_emb.emb.weight.grad.isfinite().all()


def test_latents() -> None:
    f = FreeTransformer(
        num_tokens=256, dim=32, heads=2, dec_head_depth=1, dec_tail_depth=1, max_seq_len=32, latent_bits=4, pad_id=-1
    )
    s = torch.randint(0, 256, (2, 32))
    loss, (_ar, _kl) = f(s, return_all_losses=True)
    loss.backward()
    f.generate(s[:, :1], 16, latents=2)
    f(s, s)
    f.generate(s[:, :1], 16, latents=torch.tensor([1, 2]))
    v = GPTVAE(num_tokens=256, dim=32, depth=1, enc_depth=1, heads=2, max_seq_len=32)
    l, (_a, _k) = v(s, return_all_losses=True)
    l.backward()
    v.generate(s[:, :1], 8, seq_for_latents=s)
    z = v.encode_to_latents(s)
    assert v.generate(s[:, :1], 8, latents=z).shape == (2, 8)


def test_a_loop_with_a_cache() -> None:
    m = TransformerWrapper(
        num_tokens=50, max_seq_len=32, attn_layers=Decoder(dim=32, depth=2, heads=2, rotary_pos_emb=True)
    ).eval()
    x = torch.randint(0, 50, (1, 4))
    cache = None
    out = x
    for _ in range(6):
        logits, cache = m(out, return_intermediates=True, cache=cache)
        out = torch.cat((out, logits[:, -1:].argmax(-1)), 1)
    want = m(out[:, :-1]).argmax(-1)[:, 3:]
    assert torch.equal(want, out[:, 4:])
    kv = get_cached_kvs(cache)
    assert len(kv) == 2
    modify_cached_kv(cache, lambda t: t[..., -5:, :])


def test_stacks_of_ones_own() -> None:

    class Mine(AttentionLayers):
        def __init__(self, **kw):
            super().__init__(causal=True, **kw)

    m = TransformerWrapper(num_tokens=50, max_seq_len=32, attn_layers=Mine(dim=32, depth=2, heads=2))
    m(torch.randint(0, 50, (1, 8)))

    class Rev(AttentionLayers):
        def forward(self, x, **kw):
            keep = (self.layers, self.layer_types, self.layer_dropouts)
            self.layers, self.layer_types, self.layer_dropouts = (
                nn.ModuleList(list(self.layers)[2:]),
                self.layer_types[2:],
                self.layer_dropouts[2:],
            )
            try:
                return super().forward(x, **kw)
            finally:
                self.layers, self.layer_types, self.layer_dropouts = keep

    m = TransformerWrapper(num_tokens=50, max_seq_len=32, attn_layers=Rev(dim=32, depth=2, heads=2, causal=True))
    assert m(torch.randint(0, 50, (1, 8))).shape == (1, 8, 50)


def test_parts_alone() -> None:
    a = Attention(dim=32, heads=2, causal=True)
    _o, _inter = a(torch.randn(1, 8, 32), return_intermediates=True)
    a(torch.randn(1, 8, 32))
    Attention(dim=32, heads=2)(torch.randn(1, 8, 32), context=torch.randn(1, 5, 32), context_mask=torch.ones(1, 5).bool())
    FeedForward(32, glu=True)(torch.randn(1, 8, 32))
    CrossAttender(dim=32, depth=1, heads=2)(
        torch.randn(1, 8, 32), context=torch.randn(1, 4, 32), context_mask=torch.ones(1, 4).bool()
    )
    e = Encoder(dim=32, depth=2, heads=2)
    e(torch.randn(1, 8, 32), mask=torch.ones(1, 8).bool())
    _o, i = e(torch.randn(1, 8, 32), return_hiddens=True)
    assert all(part is not None for part in (i.hiddens, i.attn_intermediates[0].post_softmax_attn))


def test_flags_of_a_stack() -> None:
    flags = [
        {'attn_num_mem_kv': 4},
        {'attn_one_kv_head': True},
        {'attn_talking_heads': True},
        {'attn_pre_talking_heads': True, 'attn_post_talking_heads': True},
        {'attn_sparse_topk': 4},
        {'attn_kv_heads': 1},
        {'ff_relu_squared': True},
        {'attn_on_attn': True},
        {'residual_attn': True},
        {'sandwich_coef': 1},
        {'macaron': True},
        {'use_rmsnorm': True},
        {'use_scalenorm': True},
        {'gate_residual': True},
        {'resi_dual': True, 'pre_norm': False},
        {'shift_tokens': 1},
        {'sandwich_norm': True},
        {'attn_qk_norm': True},
        {'attn_qk_norm': True, 'attn_qk_norm_dim_scale': True},
        {'attn_flash': True},
        {'alibi_pos_bias': True, 'alibi_num_heads': 1},
        {'rotary_xpos': True},
        {'dynamic_pos_bias': True, 'dynamic_pos_bias_log_distance': False},
        {'num_residual_streams': 2},
        {'integrate_layers': True},
        {'attn_hybrid_module': nn.GRU(32, 128, batch_first=True)},
        {'attn_gate_value_heads': True},
        {'attn_laser': True},
        {'attn_selective': True},
        {'attn_softclamp_logits': True},
        {'add_value_residual': True, 'learned_value_residual_mix': True},
        {'unet_skips': True},
        {'weight_tie_layers': True},
        {'layer_dropout': 0.1},
        {'cross_residual_attn': True},
        {'layers_execute_order': (0, 1, 0, 1)},
        {'attn_data_dependent_alibi': True},
        {'ff_no_bias': True, 'ff_post_act_ln': True},
        {'softclamp_output': True},
        {'reinject_input': True},
        {'use_derf': True},
        {'polar_pos_emb': True},
    ]
    bad = []
    for f in flags:
        if 'attn_talking_heads' in f or 'cross_residual_attn' in f:
            continue
        try:
            m = TransformerWrapper(num_tokens=50, max_seq_len=32, attn_layers=Decoder(dim=32, depth=2, heads=2, **f))
            m(torch.randint(0, 50, (1, 8))).sum().backward()
        except Exception as e:
            bad.append((f, type(e).__name__, str(e)[:200]))
    assert not bad, bad


def test_flags_of_a_model() -> None:
    flags = [
        {'num_memory_tokens': 4},
        {'l2norm_embed': True},
        {'use_abs_pos_emb': False},
        {'scaled_sinu_pos_emb': True},
        {'post_emb_norm': True},
        {'tie_embedding': True},
        {'emb_dim': 16},
        {'emb_frac_gradient': 0.1},
        {'mixture_of_softmax': True},
        {'sigsoftmax_logits': True},
        {'recycling': True, 'train_max_recycle_steps': 2},
        {'average_pool_embed': True},
        {'return_only_embed': True},
        {'add_continuous_pred_head': True},
        {'ff_deep_embed': True},
        {'emb_dropout': 0.1},
        {'attn_z_loss_weight': 0.001},
        {'memory_tokens_interspersed_every': 4, 'num_memory_tokens': 2},
    ]
    bad = []
    for f in flags:
        try:
            m = TransformerWrapper(num_tokens=50, max_seq_len=32, attn_layers=Decoder(dim=32, depth=1, heads=2), **f)
            m(torch.randint(0, 50, (1, 8)))
        except Exception as e:
            bad.append((f, type(e).__name__, str(e)[:200]))
    for f in [
        {'use_cls_token': True},
        {'use_cls_token': True, 'squeeze_out_last_dim': True, 'logits_dim': 1},
        {'average_pool_embed': True, 'logits_dim': 3},
        {'attn_pool': True, 'logits_dim': 3},
    ]:
        try:
            m = TransformerWrapper(num_tokens=50, max_seq_len=32, attn_layers=Encoder(dim=32, depth=1, heads=2), **f)
            m(torch.randint(0, 50, (1, 8)))
        except Exception as e:
            bad.append((f, type(e).__name__, str(e)[:200]))
    assert not bad, bad


def test_ways_to_write() -> None:
    net = TransformerWrapper(num_tokens=50, max_seq_len=32, attn_layers=Decoder(dim=32, depth=1, heads=2, rotary_pos_emb=True))
    am = TransformerWrapper(num_tokens=50, max_seq_len=32, attn_layers=Decoder(dim=16, depth=1, heads=2, rotary_pos_emb=True))
    w = AutoregressiveWrapper(net, mask_prob=0.15, pad_value=0, ignore_index=-100, add_attn_z_loss=True)
    x = torch.randint(0, 50, (2, 10))
    w(x).backward()
    _l, (_lo, _i) = w(x, return_outputs=True)
    for f in (top_a, top_k, top_p, min_p, 'top_k', 'min_p'):
        w.generate(x, 4, filter_logits_fn=f)
    w.generate([x[0, :4], x[1, :6]], 5)
    w.generate(x, 5, prompt_lens=torch.tensor([3, 10]))
    w.generate(x, 5, eos_token=4)
    w.generate(x, 5, amateur_model=am, contrastive_decode_kwargs={'alpha': 0.1, 'beta': 0.5})
    w.beam_search(x, 5, beams=3)
    w.beam_search(x, 5, beams=3, return_beams_and_scores=True)
    w.generate(x, 5, restrict_to_max_seq_len=False)
    w.generate(x, 40, cache_kv=False)
    assert w.beam_search(
        x, 5, beams=3, stochastic=True, temperature=1.5, filter_logits_fn=top_k, filter_kwargs={'k': 5}
    ).shape == (2, 5)


def test_a_condition() -> None:
    m = TransformerWrapper(
        num_tokens=50,
        max_seq_len=32,
        attn_layers=Decoder(
            dim=32, depth=2, heads=2, dim_condition=8, use_adaptive_layernorm=True, use_adaptive_layerscale=True
        ),
    )
    x = torch.randint(0, 50, (2, 8))
    m(x, condition=torch.randn(2, 8))
    m(x, condition=torch.randn(2, 8, 8))
    assert AutoregressiveWrapper(m).generate(x, 4, condition=torch.randn(2, 8)).shape == (2, 4)


def test_what_a_call_returns(tmp_path) -> None:
    m = TransformerWrapper(num_tokens=50, max_seq_len=32, attn_layers=Decoder(dim=32, depth=2, heads=2))
    x = torch.randint(0, 50, (2, 8))
    _, i = m(x, return_intermediates=True, return_attn_z_loss=True)
    assert i.attn_z_loss > 0
    _, i = m(x, return_logit_entropies=True)
    assert i.logit_entropies.shape == (2, 8)
    _lo, at = m(x, return_attn=True)
    assert len(at) == 2
    _lo, _e = m(x, return_logits_and_embeddings=True)
    _e, i = m(x, return_embeddings_and_intermediates=True)
    m.attn_qk_clip_(i, tau=100)
    m(x, sum_embeds=torch.randn(2, 8, 32))
    m(x, self_attn_kv_residuals=torch.randn(2, 8, 32))
    ps = m.muon_parameters()
    assert ps
    torch.save(m.state_dict(), tmp_path / 'sd.pt')
    m.load_state_dict(torch.load(tmp_path / 'sd.pt'))


def test_keys_of_another_model() -> None:
    m = TransformerWrapper(num_tokens=50, max_seq_len=32, attn_layers=Decoder(dim=32, depth=2, heads=2))
    x = torch.randint(0, 50, (2, 8))
    _, i = m(x, return_intermediates=True)
    m(x, self_attn_additional_kv=i)
    m(x, self_attn_additional_kv=i, detach_additional_kv=True, route_additional_kv_to_top=False)
    mm = [a.cached_kv for a in i.attn_intermediates]
    assert m(x, self_attn_additional_kv=mm).shape == (2, 8, 50)


def test_a_prefix() -> None:
    m = TransformerWrapper(num_tokens=50, max_seq_len=32, attn_layers=PrefixDecoder(dim=32, depth=2, heads=2))
    x = torch.randint(0, 50, (2, 8))
    m(x, prefix_attn_len=torch.tensor([3, 2]))
    m(x, prefix_attn_len=3)
    AutoregressiveWrapper(m)(x, prefix_attn_len=3).backward()
    assert m.token_emb.emb.weight.grad.isfinite().all()


def test_positions() -> None:
    e = Encoder(dim=32, depth=1, heads=2, rotary_pos_emb=True)
    e(torch.randn(1, 8, 32), pos=torch.arange(8))
    e(torch.randn(1, 8, 32), rotary_pos_emb=e.rotary_pos_emb(torch.arange(8)))
    r = RotaryEmbedding(16)
    r.forward_from_seq_len(8)
    r(torch.arange(8))
    AlibiPositionalBias(4, 8)(8, 8)
    ScaledSinusoidalEmbedding(16)(torch.randn(1, 4, 16))
    AbsolutePositionalEmbedding(16, 8)(torch.randn(1, 4, 16))
    TokenEmbedding(16, 5)(torch.randint(0, 5, (1, 4)))
    RelativePositionBias(scale=4.0, causal=True, num_buckets=32, max_distance=128, heads=2)(8, 8)
    a = Decoder(dim=32, depth=1, heads=2, alibi_pos_bias=True)
    assert a(torch.randn(1, 8, 32), pos=torch.arange(8)[None]).shape == (1, 8, 32)


def test_training_in_mixed_precision() -> None:
    m = AutoregressiveWrapper(
        TransformerWrapper(
            num_tokens=50, max_seq_len=32, attn_layers=Decoder(dim=32, depth=2, heads=2, rotary_pos_emb=True, attn_flash=True)
        )
    )
    opt = torch.optim.AdamW(m.parameters(), lr=0.001)
    sc = torch.amp.GradScaler('cpu', enabled=False)
    for _ in range(2):
        for _ in range(2):
            with torch.autocast('cpu', dtype=torch.bfloat16):
                loss = m(torch.randint(0, 50, (2, 16))) / 2
            sc.scale(loss).backward()
        torch.nn.utils.clip_grad_norm_(m.parameters(), 0.5)
        sc.step(opt)
        sc.update()
        opt.zero_grad()
    m.eval()
    assert m.generate(torch.randint(0, 50, (3,)), 8).shape == (8,)


def test_a_compiled_model() -> None:
    m = TransformerWrapper(num_tokens=50, max_seq_len=32, attn_layers=Decoder(dim=32, depth=1, heads=2))
    c = torch.compile(m, backend='eager')
    assert c(torch.randint(0, 50, (2, 8))).shape == (2, 8, 50)
