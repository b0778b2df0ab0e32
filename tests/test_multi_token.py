"""Heads for later tokens: their logits, their loss, their guesses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers import (
    DPO,
    AutoregressiveWrapper,
    Decoder,
    Encoder,
    EntropyBasedTokenizer,
    NonAutoregressiveWrapper,
    TransformerWrapper,
    XLAutoregressiveWrapper,
    XTransformer,
)
from x_transformers.flags.base import FlagError
from x_transformers.generation.decode import Reader, Tokens
from x_transformers.generation.prompts import GenerateError
from x_transformers.generation.sampling import Sampler
from x_transformers.generation.speculative import SelfDrafter, Tally, speculate
from x_transformers.notices import InertFlagWarning

V, DIM = 11, 16


def build(heads: int = 3, stack: dict[str, Any] | None = None, **wrapper: Any) -> TransformerWrapper:
    torch.manual_seed(0)
    layers = Decoder(dim=DIM, depth=2, heads=2, attn_dim_head=8, **(stack or {}))
    net = TransformerWrapper(num_tokens=V, max_seq_len=32, attn_layers=layers, multi_token_heads=heads, **wrapper)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return net.double()


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def logits_by_hand(net: Any, x: Tensor) -> Tensor:
    """(k b n v), token by token: the unembedding of h, and of h + W2 gelu(W1 norm(h))."""
    h = net(x, return_embeddings=True)
    out = torch.empty(net.multi_token_heads, *x.shape, V, dtype=h.dtype)
    weight = net.to_logits.weight
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            out[0, b, t] = weight @ h[b, t]
            for i, block in enumerate(net.later_tokens, 1):
                first, second = block.ff.ff[0][0], block.ff.ff[-1]
                normed = (h[b, t] - h[b, t].mean()) / (h[b, t].var(unbiased=False) + 1e-5).sqrt() * block.norm.gamma
                inner = F.gelu(first.weight @ normed + first.bias)
                out[i, b, t] = weight @ (h[b, t] + second.weight @ inner + second.bias)
    return out


def loss_by_hand(logits: Tensor, x: Tensor, weight: float, documents: Tensor | None = None) -> Tensor:
    """The sum over heads of the mean of -log p(x[t + i] | x[: t + 1]) over the targets that count."""
    total = logits.new_zeros(())
    for i in range(1, logits.shape[0] + 1):
        terms = []
        for b in range(x.shape[0]):
            for t in range(x.shape[1] - i):
                same = documents is None or documents[t] == documents[t + i]
                if x[b, t + i] != -100 and same:
                    terms.append(-logits[i - 1, b, t].log_softmax(-1)[x[b, t + i]])
        if terms:
            total = total + (1.0 if i == 1 else weight) * torch.stack(terms).mean()
    return total


def test_logits_are_those_of_the_formula() -> None:
    net, x = build(), ids(2, 7)
    got = net(x, return_multi_token_logits=True)
    assert torch.allclose(torch.stack(got), logits_by_hand(net, x))
    assert torch.equal(got[0], net(x))
    last = net(x, return_multi_token_logits=True, logits_last=2)
    assert all(torch.allclose(few, whole[:, -2:]) for few, whole in zip(last, got, strict=True))
    (logits, embeds), record = net(
        x, return_multi_token_logits=True, return_logits_and_embeddings=True, return_intermediates=True
    )
    assert torch.allclose(torch.stack(logits), torch.stack(got))
    assert torch.equal(embeds, net(x, return_embeddings=True))
    assert record.attn_intermediates is not None


@pytest.mark.parametrize('weight', [1.0, 0.3])
def test_loss_is_that_of_the_formula(weight: float) -> None:
    net, x = build(4), ids(3, 8)
    x[0, 5:], x[1, 3] = -100, -100
    given = {} if weight == 1.0 else {'multi_token_loss_weight': weight}
    model = AutoregressiveWrapper(net, **given)
    wanted = loss_by_hand(logits_by_hand(net, x.clamp(min=0)), x, weight)
    loss, (logits, _) = model(x, return_outputs=True)
    assert torch.allclose(loss, wanted)
    assert torch.allclose(model(x), wanted)
    assert torch.equal(logits, net(x.clamp(min=0))[:, :-1])
    assert not torch.allclose(loss, loss_by_hand(logits[None], x, weight))


def test_padding_by_lengths_and_targets_of_ones_own() -> None:
    net, x, lens = build(), ids(2, 8), torch.tensor([8, 4])
    model = AutoregressiveWrapper(net)
    cut = x.clone()
    cut[1, 4:] = -100
    wanted = loss_by_hand(logits_by_hand(net, cut.clamp(min=0)), cut, 1.0)
    assert torch.allclose(model(x, lens=lens), wanted)
    assert torch.allclose(model(cut, targets=F.pad(cut[:, 1:], (0, 1), value=-100)), wanted)


@pytest.mark.parametrize('excised', [False, True])
def test_what_is_prepended_predicts_nothing(excised: bool) -> None:
    net, x, prefix = build(), ids(2, 6), torch.randn(2, 3, DIM, dtype=torch.float64)
    logits = torch.stack(net(x, prepend_embeds=prefix, return_multi_token_logits=True))
    loss = AutoregressiveWrapper(net)(x, prepend_embeds=prefix, excise_prepend_embeds=excised)
    assert torch.allclose(loss, loss_by_hand(logits[:, :, 3:], x, 1.0))


@pytest.mark.parametrize('prefix', [0, 2])
def test_no_document_predicts_the_next_one(prefix: int) -> None:
    net = build(stack={'rotary_pos_emb': True, 'attn_flash_pack_seq': True, 'verbose': False}, use_abs_pos_emb=False)
    x, lengths = ids(1, 12), (5, 1, 6)
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    ends = torch.tensor([0, prefix + 5, prefix + 6, prefix + 12], dtype=torch.int32)
    given = {'flash_pack_seq_kwargs': {'cu_seqlens_q': ends, 'cu_seqlens_k': ends}}
    if prefix:
        given['prepend_embeds'] = torch.randn(1, prefix, DIM, dtype=torch.float64)
    logits = torch.stack(net(x, return_multi_token_logits=True, **given))[:, :, prefix:]
    assert torch.allclose(AutoregressiveWrapper(net)(x, **given), loss_by_hand(logits, x, 1.0, documents))


def test_rows_too_short_for_a_head_leave_it_out() -> None:
    net, x = build(4), ids(2, 3)
    loss = AutoregressiveWrapper(net)(x)
    assert torch.allclose(loss, loss_by_hand(logits_by_hand(net, x), x, 1.0))


def test_off_is_nothing_and_on_is_trained() -> None:
    plain, net = build(1), build(2)
    more = {name for name, _ in net.named_parameters()} - {name for name, _ in plain.named_parameters()}
    assert more
    assert all(name.startswith('later_tokens.0.') for name in more)
    assert {name for name, _ in plain.named_parameters()} <= {name for name, _ in net.named_parameters()}
    AutoregressiveWrapper(net)(ids(2, 6)).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in net.later_tokens.parameters())


@pytest.mark.parametrize(
    'wrapper',
    [{'tie_embedding': True, 'logits_softcap': 3.0}, {'mixture_of_softmax': True}, {'add_continuous_pred_head': True}],
    ids=str,
)
def test_with_other_heads(wrapper: dict[str, Any]) -> None:
    net, x = build(**wrapper), ids(2, 7)
    model = AutoregressiveWrapper(net, **({'next_embed_loss_weight': 0.0} if 'add_continuous_pred_head' in wrapper else {}))
    logits = torch.stack(net(x, return_multi_token_logits=True))
    # of what are log probabilities already, log_softmax changes nothing
    assert torch.allclose(model(x), loss_by_hand(logits, x, 1.0))


def test_the_other_way_round_is_refused_by_name() -> None:
    with pytest.raises(FlagError, match='num_output_heads'):
        build(num_output_heads=2)
    with pytest.raises(FlagError, match='average_pool_embed'):
        build(average_pool_embed=True)
    with pytest.warns(InertFlagWarning, match='multi_token_heads'):
        assert build(return_only_embed=True).later_tokens is None
    with pytest.raises(ValueError, match='Build the model with multi_token_heads'):
        build(1)(ids(1, 4), return_multi_token_logits=True)
    with pytest.raises(FlagError, match='multi_token_loss_weight'):
        AutoregressiveWrapper(build(), multi_token_loss_weight=-1.0)


def encoder() -> TransformerWrapper:
    layers = Encoder(dim=DIM, depth=1, heads=2)
    return TransformerWrapper(num_tokens=V, max_seq_len=8, multi_token_heads=2, attn_layers=layers)


@pytest.mark.parametrize(
    'make',
    [lambda: XLAutoregressiveWrapper(build()), lambda: DPO(build()), lambda: NonAutoregressiveWrapper(encoder(), mask_id=0)],
    ids=['xl', 'dpo', 'masked'],
)
def test_objectives_that_do_not_train_the_heads_refuse_them(make: Any) -> None:
    with pytest.raises(FlagError, match='multi_token_heads'):
        make()


def test_who_reads_the_first_head_alone_takes_it() -> None:
    assert EntropyBasedTokenizer(build(), 1.0)(ids(2, 6)).shape[0] == 2


def test_a_decoder_of_a_pair_has_them_too() -> None:
    model = XTransformer(
        dim=DIM,
        enc_num_tokens=V,
        enc_depth=1,
        enc_heads=2,
        enc_max_seq_len=8,
        dec_num_tokens=V,
        dec_depth=1,
        dec_heads=2,
        dec_max_seq_len=8,
        dec_multi_token_heads=2,
    )
    model(ids(2, 5), ids(2, 6)).backward()
    assert all(parameter.grad.any() for parameter in model.decoder.net.later_tokens.parameters())


# ---------------------------------------------------------------- the heads guess


STACKS = [{'rotary_pos_emb': True}, {'rotary_pos_emb': True, 'shift_tokens': 1}, {'mixer': 'gated_delta_rule'}]


@pytest.mark.parametrize('stack', STACKS, ids=str)
@pytest.mark.parametrize('cache_kv', [True, False])
def test_greedy_is_plain_greedy(stack: dict[str, Any], cache_kv: bool) -> None:
    if 'mixer' in stack:
        stack = {**stack, 'custom_layers': ('m', 'f', 'a', 'f')}
    model = AutoregressiveWrapper(build(4, stack))
    prompt = ids(3, 5)
    wanted = model.generate(prompt, 16, temperature=0.0)
    assert torch.equal(model.generate(prompt, 16, temperature=0.0, self_speculative=True, cache_kv=cache_kv), wanted)
    few = model.generate(prompt, 16, temperature=0.0, self_speculative=True, lookahead=1, cache_kv=cache_kv)
    assert torch.equal(few, wanted)


def test_ragged_prompts_and_ends() -> None:
    model = AutoregressiveWrapper(build(3, {'rotary_pos_emb': True}))
    prompts = [ids(4), ids(2, seed=1), ids(6, seed=2)]
    wanted = model.generate(prompts, 12, temperature=0.0)
    assert torch.equal(model.generate(prompts, 12, temperature=0.0, self_speculative=True), wanted)
    eos = int(wanted[0, 3])
    wanted = model.generate(prompts, 12, temperature=0.0, eos_token=eos)
    assert torch.equal(model.generate(prompts, 12, temperature=0.0, eos_token=eos, self_speculative=True), wanted)


def counting(heads: int) -> Any:
    """A net that has learnt to count."""
    torch.manual_seed(0)
    layers = Decoder(dim=32, depth=1, heads=2, rotary_pos_emb=True)
    net = TransformerWrapper(num_tokens=V, max_seq_len=0, multi_token_heads=heads, attn_layers=layers)
    model = AutoregressiveWrapper(net)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    row = torch.arange(2 * V) % V
    for _ in range(60):
        loss = model(torch.stack([row.roll(-start) for start in range(V)]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_heads_that_are_right_save_passes() -> None:
    model, tally, sampler = counting(4), Tally(), Sampler(0.0)
    reader = Reader(model.net)
    tokens = Tokens(torch.tensor([[3, 4, 5], [8, 9, 10]]))
    made = list(speculate(reader, SelfDrafter(reader, sampler), tokens, 17, sampler, lookahead=8, tally=tally))
    assert torch.equal(torch.stack(made, dim=1), (torch.tensor([[6], [0]]) + torch.arange(17)) % V)
    # the prompt gives one token, each pass behind it three guesses and one more
    assert tally.passes == 5
    assert tally.accepted == tally.drafted == 12


@torch.no_grad()
def test_the_distribution_is_that_of_plain_sampling() -> None:
    """All 27 sequences of three tokens: a chi-square test against the exact chances. The second token is the first guess."""
    torch.manual_seed(0)
    layers = Decoder(dim=DIM, depth=1, heads=2, rotary_pos_emb=True)
    net = TransformerWrapper(num_tokens=3, max_seq_len=0, multi_token_heads=2, attn_layers=layers).eval()
    for parameter in net.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    prompt, model = torch.tensor([[1, 2]]), AutoregressiveWrapper(net)
    given = {'filter_logits_fn': lambda logits: logits, 'self_speculative': True}
    sizes = [2] * 250 + [10] * 50 + [500] * 10
    made = torch.cat([model.generate(prompt.expand(rows, -1), 3, **given) for rows in sizes])
    every = torch.cartesian_prod(*[torch.arange(3)] * 3)
    log_probs = net(torch.cat((prompt.expand(27, -1), every), dim=1)).log_softmax(-1)
    expected = log_probs[:, 1:4].gather(-1, every.unsqueeze(-1)).sum(dim=(1, 2)).exp() * len(made)
    counts = (made.unsqueeze(1) == every).all(dim=-1).sum(dim=0)
    assert expected.min() > 5
    # exceeded once in ten thousand times with 26 degrees of freedom
    assert ((counts - expected).square() / expected).sum() < 61.66


@pytest.mark.parametrize(
    ('heads', 'given', 'says'),
    [
        (1, {}, 'multi_token_heads=2'),
        (2, {'prompt_lookup': 2}, 'prompt_lookup and self_speculative'),
        (2, {'compile': True}, 'speculative decoding'),
        (2, {'amateur_model': build(1)}, 'amateur_model'),
    ],
    ids=str,
)
def test_what_cannot_guess_is_refused(heads: int, given: dict[str, Any], says: str) -> None:
    with pytest.raises(GenerateError, match=says):
        AutoregressiveWrapper(build(heads)).generate(ids(1, 4), 4, self_speculative=True, **given)


def test_a_model_without_logits_says_so() -> None:
    with pytest.warns(InertFlagWarning, match='multi_token_heads'):
        net = TransformerWrapper(
            num_tokens=9,
            max_seq_len=8,
            attn_layers=Decoder(dim=8, depth=1, heads=1),
            return_only_embed=True,
            multi_token_heads=2,
        )
    with pytest.raises(ValueError, match='model without logits, which was built with return_only_embed=True'):
        net(torch.zeros(1, 3).long(), return_multi_token_logits=True)
