"""The confusion matrix and everything that follows from it. E-numbers are those of the dense-evaluation spec."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch.testing import assert_close
from torchmetrics.functional.classification import multiclass_accuracy
from torchmetrics.functional.segmentation import mean_iou as oracle_mean_iou

from smalti.errors import ConfigError, DataError
from smalti.evaluation.metrics import (
    MATCHINGS,
    ConfusionMatrix,
    accuracy,
    balanced_accuracy,
    class_iou,
    class_recall,
    fold,
    iou_matrix,
    match_direct,
    match_hungarian,
    match_many_to_one,
    mean_iou,
    precision_matrix,
)


def count(target, pred, num_classes, num_preds=None):
    confusion = ConfusionMatrix(num_classes, num_preds)
    confusion.update(torch.as_tensor(target), torch.as_tensor(pred))
    return confusion.matrix


def random_matrix(seed, num_classes=5, num_preds=5, high=40):
    return torch.randint(0, high, (num_classes, num_preds), generator=torch.Generator().manual_seed(seed))


def test_e1_miou_of_eight_pixels():
    target, pred = [0, 0, 0, 1, 1, 2, 2, 255], [0, 0, 1, 1, 1, 0, 2, 2]
    matrix = count(target, pred, 3)
    assert matrix.tolist() == [[2, 1, 0], [0, 2, 0], [1, 0, 1]]
    assert_close(class_iou(matrix), torch.tensor([0.5, 2 / 3, 0.5]).double())
    assert_close(mean_iou(matrix), 5 / 9)
    with_absent = count(target, pred, 4)
    assert_close(mean_iou(with_absent, "zero"), 5 / 12)
    assert_close(mean_iou(with_absent, "skip"), 5 / 9)


def test_e2_hungarian_against_identity():
    matrix = torch.tensor([[1, 0, 3], [2, 1, 0], [0, 3, 0]])
    mapping = match_hungarian(matrix)
    assert mapping.tolist() == [1, 2, 0]
    matched = fold(matrix, mapping)
    assert_close(class_iou(matched), torch.tensor([0.75, 0.5, 0.75]).double())
    assert_close(mean_iou(matched), 2 / 3)
    assert_close(class_iou(fold(matrix, match_direct(matrix))), torch.tensor([1 / 6, 1 / 6, 0]).double())
    assert_close(mean_iou(matrix), 1 / 9)


def test_e3_clusters_left_over_go_to_class_zero():
    matrix = torch.tensor([[2, 2, 0], [0, 1, 3]])
    assert_close(iou_matrix(matrix), torch.tensor([[0.5, 0.4, 0], [0, 1 / 6, 0.75]]).double())
    mapping = match_hungarian(matrix)
    assert mapping.tolist() == [0, 0, 1]
    assert_close(class_iou(fold(matrix, mapping)), torch.tensor([0.8, 0.75]).double())
    assert_close(mean_iou(fold(matrix, mapping)), 0.775)


def test_e4_precision_favours_the_large_class_and_iou_does_not():
    matrix = torch.tensor([[17, 3], [0, 2]])
    by_precision, by_iou = (match_many_to_one(matrix, score) for score in ("precision", "iou"))
    assert by_precision.tolist() == [0, 0]
    assert_close(mean_iou(fold(matrix, by_precision)), 5 / 11)
    assert by_iou.tolist() == [0, 1]
    assert_close(class_iou(fold(matrix, by_iou)), torch.tensor([0.85, 0.4]).double())
    assert_close(mean_iou(fold(matrix, by_iou)), 0.625)


@pytest.mark.parametrize("score", ["iou", "precision"])
def test_e5_many_to_one(score):
    matrix = torch.tensor([[4, 2, 2, 0], [0, 0, 3, 1]])
    mapping = match_many_to_one(matrix, score)
    assert mapping.tolist() == [0, 0, 1, 1]
    assert_close(class_iou(fold(matrix, mapping)), torch.tensor([0.75, 2 / 3]).double())
    assert_close(mean_iou(fold(matrix, mapping)), 17 / 24)


def test_ties_go_to_the_lower_class():
    assert match_many_to_one(torch.tensor([[0, 2, 0], [0, 2, 1], [0, 2, 1]]), "precision").tolist() == [0, 0, 1]


@given(seed=st.integers(0, 10_000), num_classes=st.integers(2, 6), size=st.integers(1, 200))
def test_miou_and_accuracy_equal_torchmetrics(seed, num_classes, size):
    g = torch.Generator().manual_seed(seed)
    target, pred = (torch.randint(0, num_classes, (1, size), generator=g) for _ in range(2))
    matrix = count(target, pred, num_classes)
    per_class = oracle_mean_iou(pred, target, num_classes, per_class=True, input_format="index")[0]
    occurs = per_class >= 0  # torchmetrics writes -1 where a class occurs nowhere
    assert_close(class_iou(matrix)[occurs].float(), per_class[occurs])
    assert torch.equal(class_iou(matrix).isnan(), ~occurs)
    assert_close(mean_iou(matrix, "zero"), float(per_class.clamp(min=0).mean()), atol=1e-6, rtol=0)
    assert_close(accuracy(matrix), float((target == pred).float().mean()), atol=1e-6, rtol=0)
    present = class_recall(matrix)[~class_recall(matrix).isnan()]
    oracle = multiclass_accuracy(pred[0], target[0], num_classes, average="none")
    assert_close(present.float(), oracle[target[0].unique()])
    assert_close(balanced_accuracy(matrix), float(present.mean()))


@given(seed=st.integers(0, 10_000), num_classes=st.integers(2, 6), num_preds=st.integers(2, 9))
def test_matching_equals_scipy_on_one_minus_iou(seed, num_classes, num_preds):
    matrix = random_matrix(seed, num_classes, num_preds)
    cost = torch.empty(num_classes, num_preds, dtype=torch.float64)
    for g in range(num_classes):
        for p in range(num_preds):
            union = int(matrix[g].sum() + matrix[:, p].sum() - matrix[g, p])
            cost[g, p] = 1 - (int(matrix[g, p]) / union if union else 0)
    rows, columns = linear_sum_assignment(cost.numpy())
    mapping = match_hungarian(matrix)
    ours = sum(float(cost[mapping[p], p]) for p in columns)
    assert_close(ours, float(cost.numpy()[rows, columns].sum()))


@given(seed=st.integers(0, 10_000))
def test_hungarian_never_scores_below_identity_on_a_square_matrix(seed):
    matrix = random_matrix(seed)
    matched = iou_matrix(matrix)[match_hungarian(matrix), torch.arange(5)].sum()
    assert matched >= class_iou(matrix).nan_to_num(0).sum() - 1e-12


@given(seed=st.integers(0, 10_000), cut=st.integers(1, 99))
def test_counts_do_not_depend_on_how_pixels_are_batched(seed, cut):
    g = torch.Generator().manual_seed(seed)
    target, pred = (torch.randint(0, 4, (100,), generator=g) for _ in range(2))
    target[::7] = 255
    streamed = ConfusionMatrix(4)
    streamed.update(target[:cut], pred[:cut])
    streamed.update(target[cut:].to(torch.uint8), pred[cut:])
    assert torch.equal(streamed.matrix, count(target, pred, 4))
    assert streamed.matrix.sum() == (target != 255).sum()
    assert streamed.matrix.dtype == torch.int64


@pytest.mark.parametrize("matching", sorted(MATCHINGS))
def test_every_matching_recovers_a_perfect_labelling(matching):
    matrix = torch.diag(torch.tensor([5, 3, 9]))
    assert mean_iou(fold(matrix, MATCHINGS[matching](matrix))) == 1.0


def test_precision_of_a_cluster_that_never_occurs_is_zero():
    assert_close(precision_matrix(torch.tensor([[3, 0], [1, 0]])), torch.tensor([[0.75, 0], [0.25, 0]]).double())


def test_nothing_counted_is_nan_rather_than_a_score():
    empty = count([255, 255], [0, 1], 2)
    assert math.isnan(accuracy(empty))
    assert math.isnan(mean_iou(empty))


def test_values_outside_the_classes_are_named():
    with pytest.raises(DataError, match=r"ground truth has values 0\.\.3, but there are 3 classes"):
        count([0, 3], [0, 1], 3)
    with pytest.raises(DataError, match=r"prediction has values 0\.\.4, but there are 3 classes"):
        count([0, 2], [0, 4], 3)
    with pytest.raises(ConfigError, match="as many predictions as classes, got 3 and 2"):
        match_direct(torch.ones(2, 3, dtype=torch.int64))
