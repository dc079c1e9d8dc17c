"""Classification and segmentation metrics, computed from a confusion matrix.

Letters: G classes of the ground truth, P predicted classes or clusters; ``C[g, p]`` counts what has ground truth g and
prediction p. Nothing else is stored, so memory is G * P numbers for any data set.
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from smalti.errors import ConfigError, DataError

IGNORE = 255

Absent = Literal["zero", "skip"]
Matching = Literal["direct", "hungarian", "many-to-one-iou", "many-to-one-precision"]


class ConfusionMatrix:
    """Counts of ground truth against prediction, updated batch by batch.

    Args:
        num_classes: G.
        num_preds: P; None: G.
        ignore: ignored ground-truth value.
        device: device of the counts; batches must be on the same device.
    """

    def __init__(
        self,
        num_classes: int,
        num_preds: int | None = None,
        ignore: int = IGNORE,
        device: torch.device | str = "cpu",
    ) -> None:
        self.num_classes = num_classes
        self.num_preds = num_classes if num_preds is None else num_preds
        self.ignore = ignore
        self.matrix = torch.zeros(self.num_classes, self.num_preds, dtype=torch.int64, device=device)
        """``(G, P)`` int64 counts so far."""

    def update(self, target: Integer[Tensor, "*S"], pred: Integer[Tensor, "*S"]) -> None:
        """Count one batch of any shape.

        Args:
            target: ground truth, 0..G-1 or ``ignore``.
            pred: predictions, 0..P-1; read only where the ground truth is not ignored.

        Raises:
            DataError: if a value lies outside its range.
        """
        valid = target != self.ignore
        truth, guess = target[valid].long(), pred[valid].long()
        for name, values, count in (("ground truth", truth, self.num_classes), ("prediction", guess, self.num_preds)):
            if values.numel() and (values.min() < 0 or values.max() >= count):
                raise DataError(
                    f"{name} has values {int(values.min())}..{int(values.max())}, but there are {count} classes: "
                    f"0..{count - 1} and {self.ignore} for ignored pixels are allowed"
                )
        counts = torch.bincount(truth * self.num_preds + guess, minlength=self.matrix.numel())
        self.matrix += counts.view_as(self.matrix)


def iou_matrix(matrix: Int[Tensor, "G P"]) -> Float[Tensor, "G P"]:
    """Intersection over union of each class with each prediction, float64; 0 if neither occurs."""
    union = matrix.sum(1, keepdim=True) + matrix.sum(0, keepdim=True) - matrix
    return _ratio(matrix, union)


def precision_matrix(matrix: Int[Tensor, "G P"]) -> Float[Tensor, "G P"]:
    """Fraction of each prediction that belongs to each class, float64; 0 for a prediction that never occurs."""
    return _ratio(matrix, matrix.sum(0, keepdim=True).expand_as(matrix))


def match_direct(matrix: Int[Tensor, "G P"]) -> Int[Tensor, " P"]:
    """Identity mapping, prediction p -> class p, for heads trained with labels.

    Raises:
        ConfigError: if the numbers of predictions and classes differ.
    """
    num_classes, num_preds = matrix.shape
    if num_classes != num_preds:
        raise ConfigError(f"direct matching needs as many predictions as classes, got {num_preds} and {num_classes}")
    return torch.arange(num_preds)


def match_hungarian(matrix: Int[Tensor, "G P"]) -> Int[Tensor, " P"]:
    """The one-to-one mapping prediction -> class with the largest sum of IoU; unmatched predictions go to class 0."""
    from scipy.optimize import linear_sum_assignment  # heavy, and only needed here

    classes, preds = linear_sum_assignment(iou_matrix(matrix).cpu().numpy(), maximize=True)
    mapping = torch.zeros(matrix.shape[1], dtype=torch.int64)
    mapping[torch.from_numpy(preds)] = torch.from_numpy(classes)
    return mapping


def match_many_to_one(matrix: Int[Tensor, "G P"], score: Literal["iou", "precision"] = "iou") -> Int[Tensor, " P"]:
    """Mapping of each prediction to the class with the best score; ties go to the lower class.

    Precision maps a cluster to its majority class, which favours large classes; IoU is fairer to rare ones.
    """
    scores = iou_matrix(matrix) if score == "iou" else precision_matrix(matrix)
    return scores.argmax(0).cpu()


MATCHINGS: dict[Matching, Callable[[Tensor], Tensor]] = {
    "direct": match_direct,
    "hungarian": match_hungarian,
    "many-to-one-iou": lambda matrix: match_many_to_one(matrix, "iou"),
    "many-to-one-precision": lambda matrix: match_many_to_one(matrix, "precision"),
}


def fold(matrix: Int[Tensor, "G P"], mapping: Int[Tensor, " P"]) -> Int[Tensor, "G G"]:
    """The square matrix after mapping predictions to classes: column p is added to column ``mapping[p]``."""
    folded = torch.zeros(len(matrix), len(matrix), dtype=matrix.dtype, device=matrix.device)
    return folded.index_add_(1, mapping.to(matrix.device), matrix)


def class_iou(matrix: Int[Tensor, "G G"]) -> Float[Tensor, " G"]:
    """IoU of each class, tp / (tp + fp + fn), float64; NaN for a class in neither ground truth nor prediction."""
    union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    return matrix.diagonal().double() / union  # 0 / 0 is NaN


def mean_iou(matrix: Int[Tensor, "G G"], absent: Absent = "skip") -> float:
    """Mean of :func:`class_iou` over the classes.

    Args:
        matrix: ``(G, G)``, predictions already mapped to classes.
        absent: score of a class in neither ground truth nor prediction: ``zero`` (Leopart, NeCo: the mean is over all
            G), or ``skip`` it (mmsegmentation, DINOv3).
    """
    return _mean(class_iou(matrix), absent)


def class_recall(matrix: Int[Tensor, "G G"]) -> Float[Tensor, " G"]:
    """Recall of each class, float64; NaN for a class without ground truth."""
    return matrix.diagonal().double() / matrix.sum(1)


def accuracy(matrix: Int[Tensor, "G G"]) -> float:
    """Fraction of all counted pixels or images that are predicted correctly; NaN if nothing was counted."""
    return float(matrix.diagonal().sum().double() / matrix.sum())


def balanced_accuracy(matrix: Int[Tensor, "G G"]) -> float:
    """Mean of :func:`class_recall` over the classes that occur."""
    return _mean(class_recall(matrix), "skip")


def class_f1(matrix: Int[Tensor, "G G"]) -> Float[Tensor, " G"]:
    """F1 of each class, 2 tp / (2 tp + fp + fn), float64; NaN for a class in neither ground truth nor prediction."""
    return 2 * matrix.diagonal().double() / (matrix.sum(0) + matrix.sum(1))  # 0 / 0 is NaN


def macro_f1(matrix: Int[Tensor, "G G"]) -> float:
    """Mean of :func:`class_f1` over the classes that occur."""
    return _mean(class_f1(matrix), "skip")


def cohen_kappa(matrix: Int[Tensor, "*R G G"]) -> Float[Tensor, "*R"]:
    """Agreement beyond chance, (p_o - p_e) / (1 - p_e), of one or many confusion matrices, float64, at most 1.

    NaN if nothing was counted, or if ground truth and prediction have only one class, the same.

    Source: Cohen, Educational and Psychological Measurement 20(1), 1960, Eq. (1).
    """
    total = matrix.sum((-2, -1)).double()
    observed = matrix.diagonal(dim1=-2, dim2=-1).sum(-1) / total
    expected = (matrix.sum(-1).double() * matrix.sum(-2)).sum(-1) / total.square()
    beyond = 1 - expected
    return torch.where(beyond > 0, (observed - expected) / beyond, torch.nan)


def _mean(values: Float[Tensor, " G"], absent: Absent) -> float:
    return float(values.nanmean() if absent == "skip" else values.nan_to_num(0.0).mean())


def _ratio(counts: Int[Tensor, "G P"], total: Int[Tensor, "G P"]) -> Float[Tensor, "G P"]:
    return counts.double() / total.clamp(min=1)
