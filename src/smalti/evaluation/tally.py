"""Contribution of each image to a score, to compute intervals over images.

Letters: n images, G groups (usually classes), S repetitions (such as clusterings with different seeds), R resamplings.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int, Integer
from torch import Tensor

from smalti.evaluation.metrics import IGNORE, Absent, ConfusionMatrix, fold


@dataclass(frozen=True)
class Tally:
    """A score as the mean over groups of ratios of sums over images: ``mean_g sum_n part / sum_n whole``.

    Accuracy has one group, parts of 0 or 1 and wholes of 1; balanced accuracy has one group per class; mIoU has
    intersections and unions in pixels; for the mean of one number per image, parts are the numbers and wholes 1.
    """

    part: np.ndarray
    """``(n, G)`` or ``(n, S, G)`` numerators."""
    whole: np.ndarray
    """Denominators of the same shape; 0 if an image doesn't contribute to a group."""
    absent: Absent = "skip"
    """Score of a group whose wholes are all 0: ``zero``, or ``skip`` it."""

    def __post_init__(self) -> None:
        assert self.part.shape == self.whole.shape and self.part.ndim in (2, 3), (self.part.shape, self.whole.shape)

    def __len__(self) -> int:
        return len(self.part)

    def by_group(self, groups: Sequence[str]) -> "Tally":
        """The same score as a sum over groups of images.

        Args:
            groups: group of each image.
        """
        assert len(groups) == len(self), (len(groups), len(self))
        names, places = np.unique(np.asarray(groups), return_inverse=True)
        part, whole = np.zeros((2, len(names), *self.part.shape[1:]))
        np.add.at(part, places, self.part)
        np.add.at(whole, places, self.whole)
        return Tally(part, whole, self.absent)

    def score(self) -> float:
        """The score over all images."""
        return float(self.scores(np.ones((1, len(self))))[0])

    def scores(self, weights: np.ndarray) -> np.ndarray:
        """``(R,)`` scores, where image n counts ``weights[r, n]`` times; NaN if nothing is left to score.

        Args:
            weights: ``(R, n)`` counts, such as those of a bootstrap.
        """
        shape = (len(weights), *self.part.shape[1:])
        part = (weights @ self.part.reshape(len(self), -1)).reshape(shape)
        whole = (weights @ self.whole.reshape(len(self), -1)).reshape(shape)
        counts = whole > 0
        ratio = np.divide(part, whole, out=np.zeros(shape), where=counts)
        if self.absent == "zero":
            means = ratio.mean(-1)
        else:
            number = counts.sum(-1)
            means = np.divide(ratio.sum(-1), number, out=np.full(shape[:-1], np.nan), where=number > 0)
        return means if means.ndim == 1 else means.mean(-1)


def tally_mean(values: Sequence[float] | np.ndarray | Tensor) -> Tally:
    """Plain mean of one number per image; NaN is skipped."""
    numbers = np.asarray(values, dtype=np.float64)[:, None]
    known = np.isfinite(numbers)
    return Tally(np.where(known, numbers, 0.0), known.astype(np.float64))


def tally_labels(
    target: Integer[Tensor, " r"], pred: Integer[Tensor, " r"], num_classes: int, places: Sequence[int], num_images: int
) -> dict[str, Tally]:
    """``top1`` and ``balanced_top1``, the mean of each class's recall.

    Args:
        target: classes of the readable images.
        pred: predicted classes of the readable images.
        num_classes: G.
        places: indices of those images, 0..num_images-1.
        num_images: n, including images that aren't readable.
    """
    whole, part = np.zeros((2, num_images, num_classes))
    whole[list(places), target.cpu().numpy()] = 1
    part[list(places), target.cpu().numpy()] = (target == pred).cpu().numpy()
    top1 = Tally(part.sum(1, keepdims=True), whole.sum(1, keepdims=True))
    return {"top1": top1, "balanced_top1": Tally(part, whole)}


class PixelTally:
    """Confusion matrix of a segmentation, and intersection and union of each class in each image.

    Args:
        num_classes: G.
        num_images: n.
        ignore: ignored ground-truth value.
        device: device of the batches.
    """

    def __init__(
        self, num_classes: int, num_images: int, ignore: int = IGNORE, device: torch.device | str = "cpu"
    ) -> None:
        self.confusion = ConfusionMatrix(num_classes, ignore=ignore, device=device)
        self._num_images = num_images
        self._counts: dict[int, Tensor] = {}  # sparse: an image has few pairs of classes

    def update(
        self, target: Integer[Tensor, "B M1 M2"], pred: Integer[Tensor, "B M1 M2"], places: Sequence[int]
    ) -> None:
        """Count a batch.

        Args:
            target: classes, 0..G-1 or ``ignore``.
            pred: classes, 0..G-1.
            places: indices of the images, 0..n-1; each occurs once.

        Raises:
            DataError: if a value lies outside its range.
        """
        for truth, guess, place in zip(target, pred, places, strict=True):
            one = ConfusionMatrix(self.confusion.num_classes, ignore=self.confusion.ignore, device=truth.device)
            one.update(truth, guess)
            self.confusion.matrix += one.matrix
            self._counts[place] = one.matrix.cpu().to_sparse()

    def renamed(self, mapping: Int[Tensor, " G"]) -> "PixelTally":
        """The tally of the predictions ``mapping[pred]``, for a mapping that is determined after counting."""
        tally = PixelTally(self.confusion.num_classes, self._num_images, self.confusion.ignore)
        tally.confusion.matrix = fold(self.confusion.matrix, mapping)
        tally._counts = {place: fold(matrix.to_dense(), mapping).to_sparse() for place, matrix in self._counts.items()}
        return tally

    def iou(self, absent: Absent) -> Tally:
        """Mean IoU."""
        intersection, target, pred = self._sums()
        return Tally(intersection, target + pred - intersection, absent)

    def recall(self) -> Tally:
        """Mean pixel accuracy over the classes that occur."""
        intersection, target, _ = self._sums()
        return Tally(intersection, target)

    def pixel_accuracy(self) -> Tally:
        """Fraction of labelled pixels that are predicted correctly."""
        intersection, target, _ = self._sums()
        return Tally(intersection.sum(1, keepdims=True), target.sum(1, keepdims=True))

    def _sums(self) -> np.ndarray:
        """``(3, n, G)`` pixels of each class: correct, in the ground truth, predicted."""
        sums = np.zeros((3, self._num_images, self.confusion.num_classes))
        for place, sparse in self._counts.items():
            matrix = sparse.to_dense()
            sums[:, place] = torch.stack([matrix.diagonal(), matrix.sum(1), matrix.sum(0)]).numpy()
        return sums


def join_repetitions(tallies: Sequence[Tally]) -> Tally:
    """Combine repetitions of one score on the same images, which are averaged: ``(n, G)`` each -> ``(n, S, G)``."""
    return Tally(
        np.stack([tally.part for tally in tallies], axis=1),
        np.stack([tally.whole for tally in tallies], axis=1),
        tallies[0].absent,
    )
