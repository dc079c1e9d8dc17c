"""Tallies: scores as sums over images."""

import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, jaccard_score

from smalti.evaluation.tally import PixelTally, Tally, join_repetitions, tally_labels, tally_mean


def test_a_mean_leaves_out_what_is_not_a_number():
    tally = tally_mean([0.25, math.nan, 0.75])
    assert tally.score() == 0.5
    assert tally.scores(np.array([[2.0, 5.0, 1.0]]))[0] == (2 * 0.25 + 0.75) / 3
    assert math.isnan(tally.scores(np.array([[0.0, 1.0, 0.0]]))[0])


def test_an_absent_group_is_skipped_or_counts_zero():
    part, whole = np.array([[1.0, 0.0, 3.0]]), np.array([[2.0, 0.0, 4.0]])
    assert Tally(part, whole, "skip").score() == (0.5 + 0.75) / 2
    assert Tally(part, whole, "zero").score() == (0.5 + 0.75) / 3


@given(seed=st.integers(0, 10_000), num_classes=st.integers(2, 5))
def test_label_scores_equal_scikit_learns_however_often_an_image_counts(seed, num_classes):
    rng = np.random.default_rng(seed)
    target, pred = torch.from_numpy(rng.integers(0, num_classes, (2, 20)))
    tallies = tally_labels(target, pred, num_classes, list(range(0, 40, 2)), 40)
    weights = rng.integers(0, 3, 40).astype(float)
    times = weights[::2].astype(int)
    if not times.sum():
        return
    t, p = (values.numpy().repeat(times) for values in (target, pred))
    assert math.isclose(tallies["top1"].scores(weights[None])[0], (t == p).mean())
    present = p[np.isin(p, t)], t[np.isin(p, t)]
    expected = np.mean([(p[t == c] == c).mean() for c in np.unique(t)])
    assert math.isclose(tallies["balanced_top1"].scores(weights[None])[0], expected)
    if len(present[0]) == len(p):
        assert math.isclose(expected, balanced_accuracy_score(t, p))


@given(seed=st.integers(0, 10_000))
def test_miou_equals_scikit_learns_and_that_of_the_confusion_matrix(seed):
    rng = np.random.default_rng(seed)
    target, pred = torch.from_numpy(rng.integers(0, 3, (2, 4, 6, 6)))
    tally = PixelTally(3, 4)
    tally.update(target[2:], pred[2:], [2, 3])
    tally.update(target[:2], pred[:2], [0, 1])
    expected = jaccard_score(target.flatten(), pred.flatten(), average="macro", labels=[0, 1, 2])
    assert math.isclose(tally.iou("zero").score(), expected)
    assert math.isclose(tally.pixel_accuracy().score(), float((target == pred).double().mean()))
    one = tally.iou("zero").scores(np.array([[0.0, 1, 0, 0]]))[0]
    assert math.isclose(one, jaccard_score(target[1].flatten(), pred[1].flatten(), average="macro", labels=[0, 1, 2]))


def test_ignored_pixels_count_nowhere():
    tally = PixelTally(2, 1)
    tally.update(torch.tensor([[[0, 255], [1, 255]]]), torch.tensor([[[0, 1], [0, 1]]]), [0])
    assert tally.pixel_accuracy().score() == 0.5
    assert tally.iou("skip").score() == (1 / 2 + 0 / 1) / 2


def test_repetitions_are_averaged_after_the_groups():
    one = Tally(np.array([[1.0, 0.0]]), np.array([[2.0, 0.0]]))
    two = Tally(np.array([[1.0, 1.0]]), np.array([[1.0, 2.0]]))
    assert join_repetitions([one, two]).score() == (0.5 + 0.75) / 2
