from __future__ import annotations

from typing import Any

import pytest

from x_transformers.flags.base import FlagError
from x_transformers.flags.stack import StackFlags
from x_transformers.layers.plan import LayerPlan, plan_layers, plan_skips


def plan(**flags: Any) -> LayerPlan:
    return plan_layers(StackFlags.parse({'dim': 8, **flags}))


@pytest.mark.parametrize(
    ('flags', 'kinds'),
    [
        ({'depth': 2}, 'afaf'),
        ({'depth': 2, 'cross_attend': True}, 'acfacf'),
        ({'depth': 2, 'cross_attend': True, 'only_cross': True}, 'cfcf'),
        ({'depth': 2, 'macaron': True}, 'faffaf'),
        ({'depth': 1, 'macaron': True, 'cross_attend': True}, 'facf'),
        ({'depth': 6, 'par_ratio': 4}, 'affaffafffff'),
        ({'depth': 4, 'par_ratio': 3, 'cross_attend': True}, 'acacacacffff'),
        ({'depth': 4, 'sandwich_coef': 2}, 'aaafafff'),
        ({'depth': 3, 'weight_tie_layers': True}, 'af'),
        ({'custom_layers': ('a', 'f', 'f', 'c')}, 'affc'),
        ({'depth': 9, 'custom_layers': ('f', 'a')}, 'fa'),
    ],
)
def test_layouts(flags: dict[str, Any], kinds: str) -> None:
    assert ''.join(plan(**flags).kinds) == kinds


def test_tied_layers_are_executed_depth_times_and_count_as_depth_one() -> None:
    tied = plan(depth=3, weight_tie_layers=True)
    assert tied.order == (0, 1, 0, 1, 0, 1)
    assert tied.depth == 1
    assert [(step.index, step.layer, step.kind, step.nth) for step in tied.steps()][2:4] == [(2, 0, 'a', 1), (3, 1, 'f', 1)]


def test_depth_is_the_number_of_steps_where_none_is_given() -> None:
    assert plan(custom_layers=('a', 'f', 'f')).depth == 3
    assert plan(custom_layers=('a', 'f'), layers_execute_order=(0, 1, 1)).depth == 3
    assert plan(depth=5).depth == 5


def test_an_order_at_the_call_replaces_the_plans_own() -> None:
    usual = plan(depth=2, layers_execute_order=(2, 3))
    assert [step.layer for step in usual.steps()] == [2, 3]
    steps = usual.steps((0, 0, 1))
    assert [(step.layer, step.nth) for step in steps] == [(0, 0), (0, 1), (1, 0)]


def test_every_feed_forward_is_halved_by_macaron_and_by_nothing_else() -> None:
    assert [layer.half for layer in plan(depth=1, macaron=True).layers] == [True, False, True]
    assert not any(layer.half for layer in plan(depth=2).layers)


def test_one_number_or_one_per_layer() -> None:
    assert [layer.shift for layer in plan(depth=1, shift_tokens=2).layers] == [2, 2]
    assert [layer.shift for layer in plan(depth=1, shift_tokens=(1, 0)).layers] == [1, 0]
    assert [layer.dropout for layer in plan(depth=1, layer_dropout=(0.5, 0.0)).layers] == [0.5, 0.0]


def test_unet_joins_the_halves_in_reverse_order() -> None:
    assert {layer.index: layer.skip_from for layer in plan(depth=4, unet_skips=True).layers if layer.skip_from is not None} == {
        4: 2,
        6: 0,
    }


@pytest.mark.parametrize(
    ('flags', 'skips'),
    [
        ({'depth': 5}, {8: 0, 6: 2}),
        ({'depth': 2, 'macaron': True}, {3: 0}),
        ({'depth': 4, 'cross_attend': True}, {6: 3, 9: 0}),
        ({'custom_layers': ('a', 'f', 'a', 'a', 'f')}, {4: 0, 3: 1}),
        ({'depth': 2, 'sandwich_coef': 1}, {3: 0, 2: 1}),
    ],
)
def test_unet_with_any_block(flags: dict[str, Any], skips: dict[int, int]) -> None:
    layers = plan(unet_skips=True, **flags).layers
    assert {layer.index: layer.skip_from for layer in layers if layer.skip_from is not None} == skips


def test_one_block_has_no_skips() -> None:
    assert plan_skips((0,)) == {}


def test_views() -> None:
    lime = plan(depth=3, integrate_layers=True)
    assert [layer.views for layer in lime.layers] == [1, 1, 3, 1, 3, 1]
    assert [lime.mixed_views(index) for index in range(6)] == [1, 1, 3, 1, 3, 1]
    hyper = plan(depth=2, num_residual_streams=2, qkv_receive_diff_residuals=True, cross_attend=True)
    assert [layer.views for layer in hyper.layers] == [3, 1, 1, 3, 1, 1]


@pytest.mark.parametrize(
    ('flags', 'sentence'),
    [
        ({'custom_layers': ('a', 'x')}, 'unknown: x'),
        ({'custom_layers': ()}, 'one layer or more'),
        ({}, '`depth` must be given'),
        ({'depth': 2, 'par_ratio': 9}, 'must lie in 2 to 4'),
        ({'depth': 2, 'cross_attend': True, 'par_ratio': 2}, 'Choose a larger ratio'),
        ({'depth': 1, 'layers_execute_order': (0, 2)}, r'from 0 to 1, got .*2'),
        ({'depth': 1, 'layers_execute_order': ()}, r'got \(\)'),
        ({'depth': 1, 'shift_tokens': (1, 1, 1)}, 'each of 2 layers, got 3'),
    ],
)
def test_refusals(flags: dict[str, Any], sentence: str) -> None:
    with pytest.raises(FlagError, match=sentence):
        plan(**flags)
