"""Encoders with decoders, and images, under their laws."""

from __future__ import annotations

import pytest

from tests.laws.pair_laws import PAIR_LAWS, PICTURE_LAWS, Pair, Picture, draw_pairs, draw_pictures
from tests.laws.test_laws import SEED
from tests.laws.test_wrappers import PART


@pytest.mark.parametrize('case', draw_pairs(PART // 2, SEED), ids=str)
def test_encoder_with_decoder(case: Pair) -> None:
    for law in PAIR_LAWS:
        law(case)


@pytest.mark.parametrize('case', draw_pictures(PART // 4, SEED), ids=str)
def test_images(case: Picture) -> None:
    for law in PICTURE_LAWS:
        law(case)
