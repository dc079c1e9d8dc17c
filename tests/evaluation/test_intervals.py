"""Intervals hold what they promise."""

import math

import numpy as np
import pytest
from scipy import stats

from smalti.errors import ConfigError, DataError, ShapeError
from smalti.evaluation.intervals import (
    Resampled,
    difference,
    few_seeds,
    group_images,
    interval,
    resample,
    widening,
)
from smalti.evaluation.tally import tally_mean


def test_one_seed_is_the_bootstrap_over_images():
    values = np.random.default_rng(0).random(60)
    found = interval(resample([tally_mean(values)], resamplings=4000))
    reference = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=4000, rng=1).confidence_interval
    assert found.over == "images"
    assert math.isclose(found.mean, values.mean())
    spread = reference.high - reference.low
    assert abs(found.low - reference.low) < 0.1 * spread and abs(found.high - reference.high) < 0.1 * spread


def test_seeds_alone_give_about_students_interval():
    scores = np.array([0.4, 0.5, 0.6])
    found = interval(Resampled(scores, None))
    half = stats.t.ppf(0.975, 2) * scores.std(ddof=1) / math.sqrt(3)
    assert found.over == "seeds"
    assert 0.9 < (found.high - found.low) / (2 * half) < 1.15


@pytest.mark.parametrize(("num_seeds", "seed_sd", "image_sd"), [(3, 0.02, 0.1), (3, 0.0, 0.1), (5, 0.05, 0.05)])
def test_intervals_hold_the_truth_as_often_as_they_say(num_seeds, seed_sd, image_sd):
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        shared = rng.normal(0, image_sd, 40)
        tallies = [
            tally_mean(0.5 + rng.normal(0, seed_sd) + shared + rng.normal(0, image_sd / 3, 40))
            for _ in range(num_seeds)
        ]
        found = interval(resample(tallies, trial, 300), seed=trial)
        hits += found.low <= 0.5 <= found.high
    # 200 trials of a true 95 %: below 0.905 once in 300 times
    assert hits / 200 >= 0.905


def test_pairs_cancel_what_images_share():
    rng = np.random.default_rng(0)
    hard = rng.random(50)
    ours, theirs = (resample([tally_mean(hard + shift)]) for shift in (0.02, 0.0))
    paired = difference(ours, theirs)
    assert math.isclose(paired.mean, 0.02) and not paired.holds_zero
    assert paired.high - paired.low < 1e-9
    assert interval(ours).low < interval(theirs).high  # the intervals themselves overlap widely


def test_no_seed_and_no_image_to_draw_leave_no_interval():
    found = interval(Resampled(np.array([0.7]), None))
    assert found.over == "nothing" and math.isnan(found.low) and found.holds_zero


def test_widening_makes_up_for_few_seeds():
    assert widening(1) == 0
    assert math.isclose(widening(3), math.sqrt(3 / 2) * 4.302653 / 1.959964, rel_tol=1e-6)
    assert widening(1000) < 1.005


def test_other_numbers_of_images_or_seeds_are_refused():
    with pytest.raises(ShapeError, match=r"evaluated on \[2, 3\] images"):
        resample([tally_mean([1, 0]), tally_mean([1, 0, 1])])
    one, two = (Resampled(np.zeros(number), None) for number in (1, 2))
    with pytest.raises(ShapeError, match="1 seeds against 2"):
        difference(one, two)


def test_copies_of_an_image_in_one_group_count_as_one():
    values = np.random.default_rng(0).random(20)
    copies, groups = np.repeat(values, 10), np.repeat([f"video{n:02d}" for n in range(20)], 10).tolist()
    once, pretended = interval(resample([tally_mean(values)])), interval(resample([tally_mean(copies)]))
    grouped = interval(resample([tally_mean(copies)], groups=groups))
    assert grouped.over == "groups" and math.isclose(grouped.mean, values.mean())
    width = {name: one.high - one.low for name, one in zip("opg", (once, pretended, grouped), strict=True)}
    assert math.isclose(width["g"], widening(20) * width["o"], rel_tol=1e-6)
    assert 0.2 < width["p"] / width["o"] < 0.45  # ten times the images: 1 / sqrt(10) of the width, not deserved


def test_intervals_over_few_groups_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(1)
    hits, groups = 0, np.repeat([str(n) for n in range(6)], 8).tolist()
    for trial in range(200):
        values = 0.5 + np.repeat(rng.normal(0, 0.1, 6), 8) + rng.normal(0, 0.05, 48)
        found = interval(resample([tally_mean(values)], trial, 300, groups=groups))
        hits += found.low <= 0.5 <= found.high
    assert hits / 200 >= 0.905


def test_a_group_is_the_first_group_of_the_pattern_or_the_whole_match():
    names = ("a/p1_x.png", "b/p1_y.png", "a/p22_x.png")
    assert group_images(names, r"p(\d+)_") == ("1", "1", "22")
    assert group_images(names, r"p\d+") == ("p1", "p1", "p22")
    assert group_images(names, r"^[^/]+") == ("a", "b", "a")
    with pytest.raises(DataError, match=r"eval.groups=_x: does not match b/p1_y.png; every"):
        group_images(names, "_x")
    with pytest.raises(DataError, match="all 3 evaluated images are in one group, 'png'"):
        group_images(names, "png")
    with pytest.raises(ConfigError, match="not a regular expression"):
        group_images(names, "(")


def test_few_seeds_get_a_note_on_their_limits():
    assert "not the randomness of training" in few_seeds(1)
    assert "widened by a factor of 9" in few_seeds(2) and few_seeds(3) == ""
