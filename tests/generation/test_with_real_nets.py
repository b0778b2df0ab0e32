"""Generation with the package's own nets: with and without cache, for every kind of position."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper, XLAutoregressiveWrapper
from x_transformers.attention.inputs import Intermediates
from x_transformers.cache.intermediates import LayerIntermediates
from x_transformers.generation.decode import Reader, Tokens, modify_cached_kv
from x_transformers.generation.keywords import NetKeywords
from x_transformers.generation.prompts import prepare_prompts

POSITIONS: dict[str, dict[str, Any]] = {
    'absolute': {},
    'rotary': {'rotary_pos_emb': True},
    'xpos': {'rotary_pos_emb': True, 'rotary_xpos': True},
    'polar': {'polar_pos_emb': True},
    'alibi': {'alibi_pos_bias': True, 'disable_abs_pos_emb': True},
    't5': {'rel_pos_bias': True},
    'dynamic': {'dynamic_pos_bias': True, 'disable_abs_pos_emb': True},
    'shift': {'rotary_pos_emb': True, 'shift_tokens': 1},
    'gqa': {'rotary_pos_emb': True, 'attn_kv_heads': 1},
    'hybrid': {'rotary_pos_emb': True, 'attn_hybrid_module': 'gru'},
}
# a recurrent mixer would read the padding in front of a shorter prompt, which is refused
UNPADDED = [name for name in POSITIONS if name != 'hybrid']
# behind a prefix the padding stands between prefix and tokens; these go by given positions, not by counting rows
BEHIND_PREFIX = ['absolute', 'rotary', 'xpos', 'polar', 'alibi', 'gqa']


def net(kind: str = 'rotary', limit: int = 32, depth: int = 2, seed: int = 0, context: bool = False, **flags: Any) -> Any:
    torch.manual_seed(seed)
    options = dict(POSITIONS[kind])
    if options.get('attn_hybrid_module') == 'gru':
        options['attn_hybrid_module'] = nn.GRU(16, 16, batch_first=True)
    made = TransformerWrapper(
        num_tokens=11,
        max_seq_len=limit,
        attn_layers=Decoder(dim=16, depth=depth, heads=2, attn_dim_head=8, verbose=False, cross_attend=context, **options),
        **flags,
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(1.5).add_(torch.randn_like(parameter) * 0.3)
    return made.eval()


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 11, shape, generator=torch.Generator().manual_seed(seed))


def greedy(model: nn.Module, prompt: Tensor, steps: int, limit: int | None = None, **given: Any) -> list[int]:
    out = prompt
    with torch.no_grad():
        for _ in range(steps):
            window = out if limit is None else out[-limit:]
            out = torch.cat((out, model(window[None], **given)[0, -1].argmax()[None]))
    return out[len(prompt) :].tolist()


@pytest.mark.parametrize('kind', UNPADDED)
@pytest.mark.parametrize('cache_kv', [True, False])
def test_ragged_prompts_equal_single_ones(kind: str, cache_kv: bool) -> None:
    model = net(kind)
    rows = [ids(n, seed=n) for n in (5, 2, 3)]
    out = AutoregressiveWrapper(model).generate(rows, 8, temperature=0.0, cache_kv=cache_kv)
    assert out.tolist() == [greedy(model, row, 8) for row in rows]


@pytest.mark.parametrize('kind', BEHIND_PREFIX)
@pytest.mark.parametrize('cache_kv', [True, False])
def test_ragged_prompts_behind_a_prefix_equal_single_ones(kind: str, cache_kv: bool) -> None:
    model = net(kind)
    rows = [ids(n, seed=n) for n in (5, 2, 3)]
    prefix = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(0))
    out = AutoregressiveWrapper(model).generate(rows, 8, temperature=0.0, cache_kv=cache_kv, prepend_embeds=prefix)
    expected = [greedy(model, row, 8, prepend_embeds=front[None]) for row, front in zip(rows, prefix, strict=True)]
    assert out.tolist() == expected


@pytest.mark.parametrize('kind', ['rotary', 'xpos', 'alibi', 't5', 'dynamic', 'gqa', 'polar'])
@pytest.mark.parametrize('cache_kv', [True, False])
@pytest.mark.parametrize('ragged', [True, False])
def test_the_window_slides_with_one_layer(kind: str, cache_kv: bool, ragged: bool) -> None:
    """With a single layer what a cache remembers does not depend on what has left the window."""
    model = net(kind, limit=6, depth=1)
    rows = [ids(n, seed=n) for n in ((5, 2, 8) if ragged else (5, 5))]
    out = AutoregressiveWrapper(model).generate(rows, 10, temperature=0.0, cache_kv=cache_kv)
    assert out.tolist() == [greedy(model, row, 10, limit=6) for row in rows]


@torch.no_grad()
def test_a_prefix_leaves_the_window_row_by_row() -> None:
    """With one layer, a window over cached rows is a mask over all rows."""
    model = net('rotary', limit=4, depth=1)
    prefix = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    prompt = prepare_prompts([ids(3, seed=3), ids(1, seed=1)])
    tokens = Tokens(prompt.tokens)
    keywords = NetKeywords({'prepend_embeds': prefix}, 3, None)
    reader = Reader(model, start=prompt.start, most_pads=prompt.most_pads, keywords=keywords)
    for step in range(9):
        logits = reader.read(tokens)
        rows = 3 + tokens.length
        token = torch.arange(rows) - 3
        padding = (token >= 0) & (token < prompt.start[:, None])
        # padding stands in front of the prefix, and leaves first
        place = torch.where(padding, token, torch.where(token < 0, token + 3 + prompt.start[:, None], token + 3))
        seen = place >= max(rows - 4 - 3, 0)
        expected = model(
            tokens.value,
            prepend_embeds=prefix,
            pos=(torch.arange(tokens.length) - prompt.start[:, None]).clamp(min=0),
            self_attn_kv_mask=seen & ~padding,
        )
        assert torch.allclose(logits[:, -1], expected[:, -1], atol=1e-5), step
        tokens.append(logits[:, -1].argmax(-1))


@pytest.mark.parametrize('kind', ['absolute', 'rotary', 'shift', 'gqa', 'hybrid'])
@pytest.mark.parametrize('seed', range(3))
def test_beams_with_a_cache_equal_beams_without(kind: str, seed: int) -> None:
    model = AutoregressiveWrapper(net(kind, seed=seed, context=True))
    given = {
        'context': torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(seed)),
        'return_beams_and_scores': True,
    }
    if kind != 'hybrid':
        given['prompt_lens'] = torch.tensor([4, 2, 3])
    if kind not in ('shift', 'hybrid'):
        given['prepend_embeds'] = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(seed))
    found, scores = model.beam_search(ids(3, 4, seed=seed), 6, beams=3, **given)
    again, plain = model.beam_search(ids(3, 4, seed=seed), 6, beams=3, cache_kv=False, **given)
    assert torch.equal(found, again)
    assert torch.allclose(scores, plain, atol=1e-4)


@pytest.mark.parametrize('kind', ['absolute', 'rotary', 'alibi', 'shift', 'hybrid'])
@pytest.mark.parametrize('guess', ['model', 'lookup'])
def test_speculation_equals_greedy(kind: str, guess: str) -> None:
    model = AutoregressiveWrapper(net(kind))
    rows = [ids(n, seed=n) for n in ((5, 5, 5) if kind == 'hybrid' else (5, 2, 3))]
    speculation = {'prompt_lookup': 1} if guess == 'lookup' else {'draft_model': net('rotary', depth=1, seed=3)}
    expected = model.generate(rows, 12, temperature=0.0)
    assert torch.equal(model.generate(rows, 12, temperature=0.0, **speculation), expected)


@pytest.mark.parametrize('kind', ['absolute', 'rotary', 't5', 'alibi'])
@pytest.mark.parametrize('length', [1, 4, 7])
def test_segments_with_a_cache_equal_segments_without(kind: str, length: int) -> None:
    model = net(kind, limit=4, max_mem_len=4)
    prompts = ids(2, length)
    out = XLAutoregressiveWrapper(model).generate(prompts, 11, temperature=0.0)
    for row, got in zip(prompts, out, strict=True):
        seen, mems, first = row, None, 0
        with torch.no_grad():
            for _ in range(11):
                while len(seen) - first > 4:
                    mems = model(seen[None, first : first + 4], mems=mems, return_mems=True)[1]
                    first += 4
                seen = torch.cat((seen, model(seen[None, first:], mems=mems)[0, -1].argmax()[None]))
        assert got.tolist() == seen[length:].tolist()


@pytest.mark.parametrize('cache_kv', [True, False])
def test_tables_masks_and_sums_per_token(cache_kv: bool) -> None:
    model = net('rotary', embed_num_tokens={'kind': 4})
    kinds = torch.randint(0, 4, (2, 9), generator=torch.Generator().manual_seed(0))
    sums = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True, True, False, True], [False, True, True, True]])
    prompts = ids(2, 4)
    out = AutoregressiveWrapper(model).generate(
        prompts, 6, temperature=0.0, cache_kv=cache_kv, embed_ids={'kind': kinds}, sum_embeds=sums, mask=mask
    )
    seen = prompts
    with torch.no_grad():
        for _ in range(6):
            n = seen.shape[1]
            full = torch.cat((mask, torch.ones(2, n - 4, dtype=torch.bool)), 1)
            logits = model(seen, embed_ids={'kind': kinds[:, :n]}, sum_embeds=sums[:, :n], mask=full)
            seen = torch.cat((seen, logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(out, seen[:, 4:])


def test_what_cannot_be_cached_is_recomputed() -> None:
    model = net('rotary', num_memory_tokens=2)
    assert not model.can_cache_kv
    out = AutoregressiveWrapper(model).generate(ids(2, 4), 5, temperature=0.0)
    assert out.tolist() == [greedy(model, row, 5) for row in ids(2, 4)]


@pytest.mark.parametrize('front', [0, 2])
def test_losses_with_a_prefix(front: int) -> None:
    model = AutoregressiveWrapper(net('rotary', add_continuous_pred_head=True), mask_prob=0.3, add_attn_z_loss=True)
    prefix = torch.randn(2, front, 16) if front else None
    loss, (logits, _) = model(ids(2, 7), return_outputs=True, prepend_embeds=prefix)
    loss.backward()
    assert loss.isfinite()
    assert logits.shape == (2, 6, 11)


@pytest.mark.parametrize('kind', ['rotary', 'alibi', 'gqa', 'xpos'])
@torch.no_grad()
def test_cached_keys_changed_by_the_caller_are_used(kind: str) -> None:
    model = net(kind)
    _, seen = model(ids(2, 6), return_intermediates=True)
    expected = model(ids(2, 1), cache=seen.kv_cache.window(3), input_not_include_cache=True)
    modify_cached_kv(seen, lambda t: t[..., -3:, :])
    got = model(ids(2, 1), cache=seen, input_not_include_cache=True)
    assert torch.allclose(got, expected, atol=1e-5)
    _, untouched = model(ids(2, 6), return_intermediates=True)
    assert not torch.allclose(model(ids(2, 1), cache=untouched, input_not_include_cache=True), expected, atol=1e-3)


@torch.no_grad()
def test_intermediates_put_together_by_hand_continue_a_sequence() -> None:
    model = net('rotary', context=True)
    context = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    _, seen = model(ids(2, 6), return_intermediates=True, context=context)
    made = LayerIntermediates(
        attn_intermediates=[Intermediates(cached_kv=i.cached_kv, layer_type=i.layer_type) for i in seen.attn_intermediates],
        cache_length=6,
    )
    given = {'input_not_include_cache': True, 'context': context}
    expected = model(ids(2, 1), cache=seen, **given)
    assert torch.allclose(model(ids(2, 1), cache=made, **given), expected, atol=1e-5)


@pytest.mark.parametrize('front', [0, 3])
@pytest.mark.parametrize('flags', [{'condition': {'use_adaptive_rmsnorm': True, 'dim_condition': 16}}, {'in_attn_cond': {}}])
def test_what_is_given_per_token_belongs_to_its_token_with_and_without_a_cache(front: int, flags: dict[str, Any]) -> None:
    ((name, stack),) = flags.items()
    torch.manual_seed(0)
    layers = Decoder(dim=16, depth=1, heads=2, attn_dim_head=8, verbose=False, **stack)
    model = AutoregressiveWrapper(TransformerWrapper(num_tokens=16, max_seq_len=64, attn_layers=layers)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    prompt, steps = torch.randint(16, (2, 5)), 12
    given: dict[str, Any] = {name: torch.randn(2, front + 5 + steps - 1, 16)}
    if front:
        given['prepend_embeds'] = torch.randn(2, front, 16)
    made = model.generate(prompt, steps, temperature=0.0, **given)
    assert torch.equal(model.generate(prompt, steps, temperature=0.0, cache_kv=False, **given), made)
    told = model.net(torch.cat((prompt, made[:, :-1]), dim=1), **given)
    assert torch.equal(told[:, front + 4 :].argmax(-1), made)
