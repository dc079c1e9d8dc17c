"""Schedules against known values."""

import math

import pytest

from smalti.functional.schedules import half_cosine


def test_a_half_cosine_starts_and_ends_at_its_ends() -> None:
    assert half_cosine(0.9995, 1.0, 0.0) == 0.9995 and half_cosine(0.9995, 1.0, 1.0) == 1.0
    assert half_cosine(3.0, 1.0, 0.5) == pytest.approx(2.0)


def test_a_quarter_of_the_way_is_known() -> None:  # known answer: (1 + cos(pi/4)) / 2
    assert half_cosine(1.0, 0.0, 0.25) == pytest.approx((1 + math.sqrt(0.5)) / 2)
