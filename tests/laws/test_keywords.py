"""Every keyword of a net in ``generate``: with a cache as without one, and as a loop by hand; and it matters."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.citations import pieces
from tests.laws.combination import shaken
from x_transformers import AutoregressiveWrapper, Decoder, InertFlagWarning, PrefixDecoder, TransformerWrapper
from x_transformers.generation.prompts import RESERVED
from x_transformers.layers.arguments import ARGUMENTS

V, DIM, ROWS, PROMPT, STEPS = 24, 16, 2, 4, 5
FED = PROMPT + STEPS - 1
RELATIVE = {'rotary_pos_emb': True}


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ids(*shape: int, high: int = V, seed: int = 2) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Keyword:
    """``value`` covers all tokens that will be fed; ``tokens``: the axes that a loop cuts."""

    value: Any
    tokens: tuple[int, ...] = ()
    flags: dict[str, Any] = field(default_factory=dict)
    wrapper: dict[str, Any] = field(default_factory=dict)
    beside: dict[str, Any] = field(default_factory=dict)
    kind: type = Decoder

    def cut(self, length: int) -> Any:
        value = self.value
        for axis in self.tokens:
            value = value.narrow(axis, 0, length)
        return value


HIDES = torch.arange(FED).expand(ROWS, -1) != 1
SEES = torch.ones(FED, FED, dtype=torch.bool).tril() & ((torch.arange(FED)[:, None] + torch.arange(FED)) % 3 != 1)
SEES |= torch.eye(FED, dtype=torch.bool)
CROSS, CONTEXT = {'cross_attend': True}, {'context': normal(ROWS, 3, DIM, seed=3)}
PREFIX = {'prepend_embeds': normal(ROWS, 2, DIM, seed=4)}
MEMS = {'mems': [normal(ROWS, 3, DIM, seed=5), normal(ROWS, 3, DIM, seed=6)]}
KEYS = [(3 * normal(ROWS, 2, 3, 8, seed=7), 3 * normal(ROWS, 2, 3, 8, seed=8))]
LOOPED: dict[str, Any] = {'flags': {'pre_and_post_norm': True}, 'wrapper': {'looped': True, 'max_looped_steps': 3}}

KEYWORDS: dict[str, Keyword] = {
    'mask': Keyword(HIDES, (1,)),
    'self_attn_kv_mask': Keyword(HIDES, (1,)),
    'attn_mask': Keyword(SEES, (0, 1)),
    'attn_bias': Keyword(3 * normal(FED, FED), (0, 1)),
    'pos': Keyword(torch.arange(FED) * 2, (0,), RELATIVE),
    'sum_embeds': Keyword(normal(ROWS, FED, DIM), (1,)),
    'embed_ids': Keyword({}, (), {}, {'embed_num_tokens': {'kind': 5}}),
    'condition': Keyword(3 * normal(ROWS, FED, DIM), (1,), {'use_adaptive_layernorm': True}),
    'in_attn_cond': Keyword(normal(ROWS, FED, DIM), (1,)),
    'self_attn_kv_residuals': Keyword(normal(2, ROWS, FED, DIM), (2,)),
    'context': Keyword(CONTEXT['context'], (), CROSS),
    'context_mask': Keyword(torch.tensor([[True, False, True]] * ROWS), (), CROSS, {}, CONTEXT),
    'context_pos': Keyword(torch.tensor([0, 5, 9]), (), CROSS | RELATIVE, {}, CONTEXT),
    'cross_attn_kv_residuals': Keyword(3 * normal(2, ROWS, 3, DIM), (), CROSS, {}, CONTEXT),
    'mems': Keyword(MEMS['mems'], (), RELATIVE, {'max_mem_len': 3}),
    'mem_masks': Keyword([torch.tensor([[True, False, False]] * ROWS)] * 2, (), RELATIVE, {'max_mem_len': 3}, MEMS),
    'prepend_embeds': Keyword(PREFIX['prepend_embeds']),
    'prepend_mask': Keyword(torch.tensor([[True, False]] * ROWS), (), {}, {}, PREFIX),
    'prefix_attn_len': Keyword(3, (), {}, {}, {}, PrefixDecoder),
    'seq_pos_offset': Keyword(30, (), RELATIVE | {'attn_num_mem_kv': 2}),
    'layers_execute_order': Keyword((1, 0, 3, 2)),
    'repeat_blocks': Keyword((0, 2)),
    'transform_token_embeds': Keyword(torch.sin),
    'transform_block_inputs': Keyword({2: torch.sin}),
    'self_attn_additional_kv': Keyword(KEYS),
    'additional_kv_mask': Keyword(torch.tensor([[True, False, False]] * ROWS), (), {}, {}, {'self_attn_additional_kv': KEYS}),
    'route_additional_kv_to_top': Keyword(False, (), {}, {}, {'self_attn_additional_kv': KEYS}),
    'looped_steps': Keyword(1, **LOOPED),
}

LEAVE = 'tests/embedding/test_loop.py::test_rows_leave_early_on_their_own'
# keywords that change no token, or that generation refuses, and why
CHANGE_NOTHING = {
    'causal': 'a decoder is so already: tests/attention/test_arguments.py::test_a_stack_is_causal_by_call',
    'attn_z_loss_weight': 'weighs a loss that nobody asks for',
    'detach_mems': 'memories are not returned here',
    'detach_additional_kv': 'nothing is trained here',
    'excise_prepend_embeds': 'only the last output is read',
    'return_hiddens': 'the model sets it',
    'return_gumbel_log_probs': 'only what is reported',
    'looped_pred_all_logits': 'only what is reported',
    'looped_inference': 'with a cache only: ' + LEAVE,
    'looped_exit_prob_threshold': 'with a cache only: ' + LEAVE,
    'token_emb_kwargs': 'for a table of your own',
    'to_logits_kwargs': 'for a head of your own',
    'recycle_steps': 'no cache: tests/test_defects.py::test_recycled_rounds_have_factors_of_tokens',
    'rotary_pos_emb': 'ready-made angles cover one call, and no further token',
    'polar_pos_emb': 'ready-made angles cover one call, and no further token',
    'deep_embeds_and_ids': 'the model sets it, from ff_deep_embed',
    'value_embeds_and_ids': 'the model sets it',
    'one_place': 'the model sets it, of loops: tests/embedding/test_loop.py::test_places_of_a_token_that_is_read_alone',
    'flash_pack_seq_kwargs': 'packed documents do not go on',
    'flash_pack_seq_context_kwargs': 'packed documents do not go on',
}


def names_of_a_net() -> set[str]:
    """By the declarations: of the model's call and of its stack's."""
    own = set(inspect.signature(TransformerWrapper.forward).parameters) - {'self', 'x', 'kwargs'}
    return {name for name in own | set(ARGUMENTS) if not name.startswith('return_') and name not in RESERVED} | {
        'prefix_attn_len'
    }


def test_every_keyword_of_a_net_is_tried_or_named() -> None:
    assert names_of_a_net() == (set(KEYWORDS) | set(CHANGE_NOTHING)) - {'return_hiddens', 'return_gumbel_log_probs'}


@pytest.mark.parametrize('name', CHANGE_NOTHING)
def test_tests_that_are_named_exist(name: str) -> None:
    for word in CHANGE_NOTHING[name].split():
        if word.startswith('tests/'):
            path, _, test = word.partition('::')
            assert test in pieces(path)


def net(case: Keyword) -> TransformerWrapper:
    torch.manual_seed(0)
    flags = {'dim': DIM, 'depth': 2, 'heads': 2, 'attn_dim_head': 8, 'verbose': False} | case.flags
    model = TransformerWrapper(num_tokens=V, max_seq_len=64, attn_layers=case.kind(**flags), **case.wrapper)
    shaken(model, 0)
    return model.double().eval()  # type: ignore[return-value]


def by_hand(model: TransformerWrapper, prompt: Tensor, given: Callable[[int], dict[str, Any]]) -> Tensor:
    out = prompt
    for _ in range(STEPS):
        out = torch.cat((out, model(out, **given(out.shape[1]))[:, -1:].argmax(dim=-1)), dim=1)
    return out[:, PROMPT:]


@torch.no_grad()
@pytest.mark.parametrize('name', KEYWORDS)
def test_a_keyword_of_the_net_in_generation(name: str) -> None:
    case = KEYWORDS[name]
    if name == 'embed_ids':
        kinds = ids(ROWS, FED, high=5)
        whole, part = {'kind': kinds}, lambda length: {'kind': kinds[:, :length]}
    else:
        whole, part = case.value, case.cut
    model, prompt = net(case), ids(ROWS, PROMPT)
    writer = AutoregressiveWrapper(model)
    given = case.beside | {name: whole}
    cached, uncached = (writer.generate(prompt, STEPS, temperature=0.0, cache_kv=cache, **given) for cache in (True, False))
    wanted = by_hand(model, prompt, lambda length: case.beside | {name: part(length)})
    assert torch.equal(uncached, wanted), 'uncached is not by hand'
    assert torch.equal(cached, wanted), 'cached is not by hand'
    beams = writer.beam_search(prompt, STEPS, beams=1, **given)
    assert torch.equal(beams, wanted), 'one beam is not greedy'
    full = {'x': torch.cat((prompt, wanted), dim=1)[:, :FED]}
    try:
        bare = model(**full, **case.beside)
    except ValueError:
        return  # without it there is no answer
    told = model(**full, **case.beside, **{name: part(FED)})
    assert told.shape != bare.shape or not torch.allclose(told, bare), f'{name} changes nothing'


@pytest.mark.filterwarnings('error')
def test_what_is_said_without_effect_is_told() -> None:
    with pytest.raises(InertFlagWarning, match='prepend_mask'):
        net(KEYWORDS['mask'])(ids(ROWS, PROMPT), prepend_mask=torch.ones(ROWS, 2, dtype=torch.bool))
