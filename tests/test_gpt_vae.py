from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.objectives import builds_on_meta, ids, saved_and_loaded, shaken
from x_transformers.gpt_vae import GPTVAE


def bare(**given: Any) -> GPTVAE:
    sizes: dict[str, Any] = {'num_tokens': 7, 'dim': 16, 'depth': 1, 'enc_depth': 1, 'max_seq_len': 12, 'dim_latent': 4}
    return GPTVAE(**(sizes | {'heads': 2, 'attn_dim_head': 8} | given))


def model(seed: int = 0, **given: Any) -> GPTVAE:
    torch.manual_seed(seed)
    return shaken(bare(**given)).eval()


def without_prefix(net: GPTVAE, seq: Tensor) -> Tensor:
    logits = net.decoder(seq.clamp(min=0))[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), seq[:, 1:].flatten(), ignore_index=-1)


def test_loss() -> None:
    net, seq = model(vae_kl_loss_weight=0.3, vae_kl_div_floor=0.05), ids(2, 8)
    torch.manual_seed(1)
    total, (ar_loss, kl_loss) = net(seq, return_all_losses=True)
    torch.manual_seed(1)
    latents, (mean, log_variance) = net.encode_to_latents(seq, return_mean_log_var=True)
    pooled = net.encoder(seq, mask=torch.ones_like(seq, dtype=torch.bool))
    torch.testing.assert_close(torch.cat((mean, log_variance), dim=-1), net.to_latent_mean_log_variance(pooled))
    prefix = net.from_latent_to_prepend_token(latents)[:, None]
    logits = net.decoder(seq, prepend_embeds=prefix)[:, 1:-1]
    torch.testing.assert_close(ar_loss, F.cross_entropy(logits.flatten(0, 1), seq[:, 1:].flatten()))
    expected = 0.0
    for row in range(2):
        for m, s in zip(mean[row].tolist(), log_variance[row].exp().sqrt().tolist(), strict=True):
            normal = torch.distributions.Normal
            cost = torch.distributions.kl_divergence(normal(m, s), normal(0.0, 1.0)).item()
            expected += max(0.0, cost - 0.05) / 2
    assert kl_loss.item() == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(total, ar_loss + 0.3 * kl_loss)


def test_latents_are_gaussian_in_evaluation_mode_too() -> None:
    """Mean and standard deviation of 20000 draws, within 5 of their own deviations."""
    net, seq = model(), ids(1, 8)
    torch.manual_seed(0)
    latents, (mean, log_variance) = net.encode_to_latents(seq.expand(20_000, -1), return_mean_log_var=True)
    std = (0.5 * log_variance[0]).exp()
    assert bool(((latents.mean(dim=0) - mean[0]).abs() < 5 * std / 20_000**0.5).all())
    assert bool(((latents.std(dim=0) / std - 1).abs() < 5 / (2 * 20_000) ** 0.5).all())
    runs = [net.encode_to_latents(seq, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    torch.testing.assert_close(*runs)


@pytest.mark.parametrize('rotary', [False, True])
def test_a_hidden_prefix_is_no_prefix(rotary: bool) -> None:
    """In the original it moves the positions of the tokens."""
    net, seq = model(latents_dropout_prob=1.0, dec_kwargs={'rotary_pos_emb': rotary}).train(), ids(2, 8)
    _, (ar_loss, _) = net(seq, return_all_losses=True)
    torch.testing.assert_close(ar_loss, without_prefix(net, seq))
    net.eval()
    _, (ar_loss, _) = net(seq, return_all_losses=True)
    assert not torch.allclose(ar_loss, without_prefix(net, seq))


def test_share_of_hidden_prefixes() -> None:
    """Within 5 standard deviations over 20000 rows."""
    net = model(latents_dropout_prob=0.3).train()
    torch.manual_seed(0)
    visible = net.visible_prefix(20_000)
    assert visible is not None
    assert visible.shape == (20_000, 1)
    assert visible.float().mean().item() == pytest.approx(0.7, abs=5 * (0.21 / 20_000) ** 0.5)
    assert net.eval().visible_prefix(3) is None


def test_pads() -> None:
    """The default pad_id of -1 raises an index error in the original; what is padded is not read."""
    net, seq = model(), ids(2, 8)
    seq[1, 5:] = -1
    _, (mean, _) = net.encode_to_latents(seq, return_mean_log_var=True)
    _, (alone, _) = net.encode_to_latents(seq[1:, :5], return_mean_log_var=True)
    torch.testing.assert_close(mean[1:], alone)
    torch.manual_seed(1)
    _, (ar_loss, _) = net(seq, return_all_losses=True)
    torch.manual_seed(1)
    prefix = net.from_latent_to_prepend_token(net.encode_to_latents(seq))[:, None]
    logits = net.decoder(seq.clamp(min=0), prepend_embeds=prefix)[:, 1:-1]
    torch.testing.assert_close(ar_loss, F.cross_entropy(logits.flatten(0, 1), seq[:, 1:].flatten(), ignore_index=-1))


def test_latents_of_another_sequence() -> None:
    net, seq, other = model(), ids(2, 8), ids(2, 5, seed=1)
    torch.manual_seed(1)
    _, (_, kl_loss) = net(seq, seq_for_latents=other, return_all_losses=True)
    torch.manual_seed(1)
    _, (_, expected) = net(other, return_all_losses=True)
    torch.testing.assert_close(kl_loss, expected)


def test_generation_behind_a_latent() -> None:
    net, prompts = model(dec_kwargs={'rotary_pos_emb': True}), ids(2, 3)
    latents = torch.randn(2, 4)
    out = prompts
    for _ in range(5):
        prefix = net.from_latent_to_prepend_token(latents)[:, None]
        out = torch.cat((out, net.decoder(out, prepend_embeds=prefix)[:, -1:].argmax(dim=-1)), dim=1)

    def run(prompts: Any, latents: Any = None, **given: Any) -> Any:
        return net.generate(prompts, 5, latents=latents, temperature=0.0, **given).tolist()

    assert run(prompts, latents) == out[:, 3:].tolist()
    assert run(prompts, latents, include_prompt=True) == out.tolist()
    assert run(prompts, latents, cache_kv=False) == out[:, 3:].tolist()
    assert run(prompts, latents.tolist()) == out[:, 3:].tolist()
    assert run(prompts[0], latents[0]) == out[0, 3:].tolist()
    assert run(prompts, latents[0])[0] == out[0, 3:].tolist()
    assert run(list(prompts), latents) == out[:, 3:].tolist()
    assert run(prompts[:, None], latents) == out[:, None, 3:].tolist()
    assert run(prompts) == net.ar_wrapped_decoder.generate(prompts, 5, temperature=0.0).tolist()


def test_the_latent_is_sampled_in_evaluation_mode() -> None:
    """In the original the encoder drops out while generating, if the model is being trained."""
    net = model(enc_kwargs={'attn_dropout': 0.9, 'ff_dropout': 0.9})
    prompts, source = ids(1, 3), ids(1, 8, seed=1)

    def run() -> Tensor:
        return net.generate(prompts, 8, seq_for_latents=source, generator=torch.Generator().manual_seed(1))

    calm = run()
    net.train()
    assert torch.equal(run(), calm)
    net.encoder.eval()
    with pytest.raises(TypeError):
        net.generate(prompts, 3, no_such_keyword=1)
    assert net.training
    assert net.decoder.training
    assert not net.encoder.training


def test_latents_of_one_sequence_for_several_prompts() -> None:
    net = model()
    generators = [torch.Generator().manual_seed(2) for _ in range(2)]
    latents = net.encode_to_latents(ids(1, 8), generator=generators[0])
    made = net.generate(ids(3, 2), 4, seq_for_latents=ids(1, 8), temperature=0.0, generator=generators[1])
    assert made.tolist() == net.generate(ids(3, 2), 4, latents=latents, temperature=0.0).tolist()


def test_another_encoder() -> None:
    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = nn.Embedding(7, 16)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.emb(x).sum(dim=1)

    net = model(encoder=Pool())
    assert isinstance(net.encoder, Pool)
    assert bool(net(ids(2, 8)).isfinite())


def test_state() -> None:
    net = model()
    own = {k: tuple(v.shape) for k, v in net.state_dict().items() if not k.startswith(('encoder.', 'decoder.', 'ar_'))}
    assert own == {
        'to_latent_mean_log_variance.0.weight': (8, 16),
        'to_latent_mean_log_variance.0.bias': (8,),
        'from_latent_to_prepend_token.0.weight': (16, 4),
        'from_latent_to_prepend_token.0.bias': (16,),
    }
    decoder = {k.removeprefix('decoder.') for k in net.state_dict() if k.startswith('decoder.')}
    assert {k.removeprefix('ar_wrapped_decoder.net.') for k in net.state_dict() if k.startswith('ar_')} == decoder
    twin = saved_and_loaded(net, model(seed=4))
    given: dict[str, Any] = {'latents': torch.ones(4), 'temperature': 0.0}
    assert torch.equal(twin.generate(ids(2, 3), 5, **given), net.generate(ids(2, 3), 5, **given))


def test_built_on_meta() -> None:
    builds_on_meta(bare)


def test_bad_input_is_named() -> None:
    net = model()
    with pytest.raises(ValueError, match='latents and seq_for_latents must not both'):
        net.generate(ids(2, 3), 2, latents=torch.ones(4), seq_for_latents=ids(2, 3))
    for latents in (torch.ones(3), torch.ones(3, 4), torch.ones(2, 5)):
        with pytest.raises(ValueError, match='latents must have shape'):
            net.generate(ids(2, 3), 2, latents=latents)
    with pytest.raises(ValueError, match='to encode'):
        net.generate(ids(2, 3), 2, seq_for_latents=ids(3))
    with pytest.raises(ValueError, match='latents_dropout_prob'):
        bare(latents_dropout_prob=1.5)
