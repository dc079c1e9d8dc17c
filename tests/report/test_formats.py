"""Numbers and settings as people write them."""

import math

from smalti.report.formats import as_float, decimals, duration, plain


def test_numbers_have_the_digits_that_matter():
    assert [decimals(value) for value in (0.5, 1234.5, math.nan)] == ["0.500", "1,234.5", "–"]
    assert math.isnan(as_float("high")) and as_float(2) == 2.0


def test_durations_are_written_in_the_units_that_matter():
    assert [duration(seconds) for seconds in (59, 59.6, 3700)] == ["59 s", "1 min 00 s", "1 h 01 min"]


def test_settings_are_written_without_brackets():
    assert plain({"lr": 0.1, "betas": [0.9, 0.95]}) == "lr 0.1, betas 0.9, 0.95"
    assert plain(None) == plain([]) == plain({}) == "–"
