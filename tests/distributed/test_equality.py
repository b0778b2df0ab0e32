"""Copies, shards, heads and features spread over processes: the loss and the gradients of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.equality import MODES, OF_FOUR, attempt, is_trainable, said
from tests.laws.combination import Combination, draw
from tests.two_processes import attempt_all, every_flag, with_modes
from x_transformers import AutoregressiveWrapper, XTransformer
from x_transformers.distributed.mesh import Degrees, MeshError, World
from x_transformers.distributed.parallelize import parallelize
from x_transformers.distributed.refusals import REFUSALS, is_set
from x_transformers.flags.base import FlagError
from x_transformers.flags.parts import PARTS, SET_BY_STACK
from x_transformers.flags.stack import StackFlags
from x_transformers.flags.wrapper import WrapperFlags

# what a slice takes from those before it
SLICED = [
    'decoder+rotary+kv_heads+glu', 'decoder+alibi+window', 'decoder+shift+latent_kv', 'cross+rotary_xpos', 'decoder+cope+tied',
    'decoder+residual_attn+value_residual+mem_kv', 'decoder+attn_mask_heads', 'decoder+layer_dropout',
]  # fmt: skip

# what crosses from one stage to the next: streams, values, scores, keys, inputs, mixtures, skips, the state of the generator
CROSSING = [
    'decoder+streams+value_residual', 'decoder+residual_attn+tied', 'decoder+kv_share+gumbel', 'decoder+lime', 'decoder+mudd',
    'decoder+unet', 'decoder+lambdas_start+attn_dropout', 'cross+reinject+emb_dropout', 'decoder+experts', 'decoder+weight_tie',
]  # fmt: skip

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason='torch was built without torch.distributed')

SOME = ['decoder+layer_dropout', 'decoder+execute_order+macaron', 'encoder+attn_pool', 'decoder+tied', 'decoder+streams']
# what a tensor group cuts: heads, grouped ones, one for all; gated features; what is made for each head; what is handed on
CUT = [
    'decoder+kv_heads+rotary+glu', 'encoder+one_kv_head+qkv_bias', 'cross+t5+sink+head_scale', 'prefix+forgetting',
    'decoder+mem_kv+qk_norm_dim_scale', 'decoder+value_residual+residual_attn', 'decoder+pre_talking',
    'decoder+attn_bias_whole+attn_mask_whole',
]  # fmt: skip
# what runs on slices, on all rows in a layer that runs on slices, and between layers; experts, and heads over a vocabulary
BESIDE = [
    'decoder+kv_heads+rotary+glu', 'cross+t5+sink+head_scale', 'decoder+streams', 'encoder+shift+layerscale', 'decoder+lime',
    'decoder+canon', 'prefix+value_embed', 'decoder+experts_shared', 'decoder+tied',
]  # fmt: skip


# a flag that does nothing beside the others is told, and changes nothing here
@pytest.mark.filterwarnings('ignore::x_transformers.InertFlagWarning')
@pytest.mark.slow
def test_some_are_equal() -> None:
    cases = [*SOME, *[str(case) for case in draw(12, seed=0) if fits(case)][:4]]
    modes = ['copies', 'shards+full', 'hybrid']
    names = with_modes(cases, modes) + with_modes([*SOME, *CUT], ['tensor', 'tensor+full']) + with_modes(SLICED, ['context'])
    names += with_modes(BESIDE, ['sequence', 'loss'])
    names += with_modes(CROSSING, ['pipeline'])
    done, failed = attempt_all(attempt, names)
    assert not failed, '\n'.join(failed)
    assert done == len(names)


@pytest.mark.deep
def test_every_flag_is_equal() -> None:
    cases = [str(case) for case in every_flag()]
    done, failed = attempt_all(attempt, with_modes(cases, list(MODES)))
    assert not failed, '\n'.join(failed)
    assert done == len(cases) * len(MODES)


@pytest.mark.deep
def test_every_flag_is_equal_on_two_axes() -> None:
    cases = [str(case) for case in every_flag()]
    done, failed = attempt_all(attempt, with_modes(cases, ['shards+tensor']), world=4)
    assert not failed, '\n'.join(failed)
    assert done == len(cases)


@pytest.mark.deep
def test_some_are_equal_on_two_axes() -> None:
    cases = [*SOME, *CUT, *SLICED, *BESIDE, *CROSSING]
    done, failed = attempt_all(attempt, with_modes(cases, list(OF_FOUR)), world=4)
    assert not failed, '\n'.join(failed)
    assert done == len(cases) * len(OF_FOUR)


# a flag that does nothing beside the others is told, and changes nothing here
@pytest.mark.filterwarnings('ignore::x_transformers.InertFlagWarning')
@pytest.mark.deep
def test_random_combinations_are_equal() -> None:
    cases = [str(case) for case in draw(60, seed=1) if fits(case)]
    assert len(cases) > 50
    done, failed = attempt_all(
        attempt, with_modes(cases, ['copies', 'shards', 'shards+every', 'tensor', 'sequence', 'loss', 'context', 'pipeline'])
    )
    assert not failed, '\n'.join(failed)
    assert done == 8 * len(cases)


@pytest.mark.parametrize('degrees', [Degrees(tensor=2), Degrees(context=2), Degrees(pipeline=2)])
def test_the_z_loss_is_refused(degrees: Degrees) -> None:
    world = World(None, degrees, torch.device('cpu'), 0, 2)  # type: ignore[arg-type]
    net = Combination.parse('decoder+rotary').build()
    with pytest.raises(MeshError, match='`add_attn_z_loss` must be left as it is'):
        parallelize(AutoregressiveWrapper(net, add_attn_z_loss=True), world)


def test_slices_are_compared() -> None:
    """Of the flags that a decoder can have, most are trained in slices, and not only refused."""
    cases = [case for case in every_flag() if case.kind == 'decoder']
    models = [(case, case.build()) for case in cases]
    trained = [case for case, net in models if is_trainable(case, net)]
    free = [
        net for case, net in models if case in trained and not any(said(AutoregressiveWrapper(net), Degrees(context=2), {}))
    ]
    assert len(free) > 0.7 * len(cases), (len(free), len(trained), len(cases))


def test_every_flag_is_compared() -> None:
    """By the flags themselves: one that no model of the sweep has would be neither proven nor refused."""
    compared = {name for case in every_flag() for name in (*case.flags, *case.wrapper)}
    # those of cross attentions are flags of the same class, and a refusal asks attentions of every kind
    compared |= {f'cross_{name}' for name in compared if name.startswith('attn_')}
    every = {*StackFlags.flag_fields(), *WrapperFlags.flag_fields()}
    every |= {prefix + name for prefix, part in PARTS.items() for name in part.flag_fields() if name not in SET_BY_STACK}
    assert every - compared == WIDTHS | IN_EVERY_MODEL | OF_A_CACHE | OWN_MODULES | OF_OBJECTIVES


# which a stack does not allow to differ from its own
WIDTHS = {'attn_dim_out', 'ff_dim_out', 'attn_dim_context', 'cross_attn_dim_out', 'cross_attn_dim_context'}
# sizes, and what makes a decoder, an encoder or a cross attender of a stack
IN_EVERY_MODEL = {'attn_layers', 'num_tokens', 'max_seq_len', 'causal', 'only_cross'}
OF_A_CACHE = {'max_mem_len', 'shift_mem_down', 'input_not_include_cache'}  # with which nothing is trained
OWN_MODULES = {'token_emb', 'to_logits'}  # tests/distributed/runs.py
OF_OBJECTIVES = {'attn_z_loss_weight'}  # tests/distributed/runs.py, and refused


def test_every_refusal_is_tried() -> None:
    """A flag without a group would never be compared, so that its row could be wrong, or missing."""
    models = [case.build(dtype=torch.float32) for case in every_flag() if case.kind != 'crosser']
    idle = {row.flag for row in REFUSALS if not any(is_set(model, row) for model in models)}
    assert idle == {'add_attn_z_loss'}  # which is no flag of a net


@pytest.mark.parametrize(
    ('case', 'tensor', 'said'),
    [
        ('decoder+no_abs', 3, 'number of heads must be a multiple of --tensor 3, got 4'),
        ('decoder+kv_heads', 4, 'number of heads of keys and values must be a multiple of --tensor 4, got 2'),
        ('decoder+dim_inner', 2, 'inner features of a feed-forward must be a multiple of --tensor 2, got 23'),
        ('decoder+pre_talking', 2, '`attn_pre_talking_heads` must be left as it is with tensor: it mixes all heads'),
    ],
)
def test_what_cannot_be_cut_is_refused(case: str, tensor: int, said: str) -> None:
    world = World(None, Degrees(tensor=tensor), torch.device('cpu'), 0, tensor)  # type: ignore[arg-type]
    with pytest.raises(MeshError, match=said):
        parallelize(Combination.parse(case).build(), world)


def test_what_goes_beside_heads_is_refused() -> None:
    alone, group = (World(None, Degrees(tensor=size), torch.device('cpu'), 0, size) for size in (1, 2))  # type: ignore[arg-type]
    with pytest.raises(MeshError, match=r'--sequence-parallel must go with --tensor 2 or more, got 1\. .* --loss-parallel'):
        parallelize(Combination.parse('decoder').build(), alone, sequence_parallel=True, loss_parallel=True)
    with pytest.raises(MeshError, match='`mv_split_residual` must be left as it is with sequence parallel'):
        parallelize(Combination.parse('decoder+mv_split').build(), group, sequence_parallel=True)
    model: Any = Combination.parse('decoder').build()
    model.attn_layers.layers[1] = torch.nn.Linear(16, 16)
    with pytest.raises(MeshError, match='modules of your own must be left out with --sequence-parallel, got Linear'):
        parallelize(model, group, sequence_parallel=True)
    model = Combination.parse('decoder').build()
    model.to_logits = torch.nn.Sequential(torch.nn.Linear(16, 24))
    with pytest.raises(MeshError, match='a head must be one linear map with --loss-parallel, got none'):
        parallelize(model, group, loss_parallel=True)
    with pytest.raises(MeshError, match='a model must be an AutoregressiveWrapper'):
        parallelize(torch.nn.Linear(2, 2), group, loss_parallel=True)


@pytest.mark.parametrize('degrees', [Degrees(tensor=2, replicate=2), Degrees(tensor=2, context=2)])
def test_groups_that_share_heads_have_no_copies(degrees: Degrees) -> None:
    """Their gradients would not be averaged."""
    world = World(None, degrees, torch.device('cpu'), 0, 4)  # type: ignore[arg-type]
    with pytest.raises(MeshError, match="shard must be 'full' or 'hybrid' where 2 groups of --tensor read different data"):
        parallelize(AutoregressiveWrapper(Combination.parse('decoder+no_abs').build()), world)


@pytest.mark.parametrize(
    ('degrees', 'how', 'said'),
    [
        (Degrees(pipeline=9), {}, '--pipeline must be at most 2, the number of blocks of layers, got 9'),
        (Degrees(pipeline=2, tensor=2), {}, '--tensor must be 1 with --pipeline'),
        (Degrees(pipeline=2, context=2), {}, '--context must be 1 with --pipeline'),
        (Degrees(pipeline=2, shard=2), {'shard': 'full'}, '--shard must be none with --pipeline'),
        (Degrees(pipeline=2), {'shard': 'full'}, '--shard must be none with --pipeline'),
    ],
)
def test_what_cannot_be_staged_is_refused(degrees: Degrees, how: dict[str, Any], said: str) -> None:
    world = World(None, degrees, torch.device('cpu'), 0, 18)  # type: ignore[arg-type]
    with pytest.raises(MeshError, match=said):
        parallelize(Combination.parse('decoder+no_abs').build(), world, **how)


def test_a_model_of_two_stacks_is_not_staged() -> None:
    world = World(None, Degrees(pipeline=2), torch.device('cpu'), 0, 2)  # type: ignore[arg-type]
    model = XTransformer(
        dim=16, enc_num_tokens=8, enc_depth=2, enc_max_seq_len=8, dec_num_tokens=8, dec_depth=2, dec_max_seq_len=8
    )
    with pytest.raises(MeshError, match='a model must be a TransformerWrapper, or AutoregressiveWrapper of one'):
        parallelize(model, world)


def fits(case: Combination) -> bool:
    """Whether the flags of a combination do not exclude each other."""
    try:
        case.build(dtype=torch.float32)
    except FlagError:
        return False
    return True


def test_a_grid_takes_the_rest() -> None:
    assert Degrees(replicate=-1).resolved(8) == Degrees(replicate=8)
    assert Degrees.of('full', tensor=2).resolved(8) == Degrees(shard=4, tensor=2)
    assert Degrees.of('hybrid', per_node=4).resolved(8) == Degrees(replicate=2, shard=4)


@pytest.mark.parametrize(
    ('degrees', 'said'),
    [
        (Degrees(replicate=3), 'must be 3'),
        (Degrees(shard=-1, tensor=3), 'multiple of 3'),
        (Degrees(replicate=-1, shard=-1), 'one axis alone'),
        (Degrees(shard=0), 'shard must be a positive number'),
    ],
)
def test_a_grid_that_does_not_fit_is_refused(degrees: Degrees, said: str) -> None:
    with pytest.raises(MeshError, match=said):
        degrees.resolved(4)
