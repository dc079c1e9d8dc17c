"""Orders of patches class by class: is an order that of the class, of the image, or of neither?

Source: Guo et al., arXiv:2511.22281v2, Fig. 5, which shows orders of a few classes and finds them moderately consistent
within a class and across classes. Decoded, they are nearly the same for all classes: two images of a class correlate by
0.947 to 0.965, two images of different classes by 0.942 to 0.952.
Letters: M images, m of them in a class, N patches.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from smalti.functional.graphs import ranks_of
from smalti.functional.orders import image_dependence

FEWEST = 2
"""Classes of fewer images are left out."""
CLASS_UNITS = {
    "num_images": "images of the class",
    "static_ratio": "fraction of rank variance explained by position in the class; chance: 1/images, 1: all the same",
    "same_class": "mean rank correlation of two images of the class",
    "other_classes": "mean rank correlation of an image of the class with one of another class",
}
"""Numbers of :class:`ClassOrders` -> their meaning."""


@dataclass(frozen=True)
class ClassOrders:
    """The orders of one class; see :data:`CLASS_UNITS`."""

    name: str
    num_images: int
    static_ratio: float
    same_class: float
    other_classes: float
    mean_rank: Float[Tensor, " N"]
    """Mean rank of each patch, 0..N-1; 0 is first."""

    def to_json(self) -> dict[str, Any]:
        """Plain values; the mean ranks in raster order."""
        numbers = {name: getattr(self, name) for name in CLASS_UNITS}
        return {"name": self.name, **numbers, "mean_rank": [round(rank, 3) for rank in self.mean_rank.tolist()]}


def orders_by_class(
    orders: Int[Tensor, "M N"], labels: Sequence[int | None], names: Sequence[str]
) -> tuple[ClassOrders, ...]:
    """Statistics of the orders of each class that has at least two images; empty if fewer than two classes have.

    Args:
        orders: orders of images, N of at least 2.
        labels: class of each image; None: unknown, left out.
        names: of the classes.
    """
    rows = {number: [row for row, label in enumerate(labels) if label == number] for number in range(len(names))}
    rows = {number: places for number, places in rows.items() if len(places) >= FEWEST}
    if len(rows) < 2 or orders.shape[1] < 2:
        return ()
    ranks = ranks_of(orders).double()
    unit = torch.nn.functional.normalize(ranks - ranks.mean(1, keepdim=True), dim=1)
    sums = {number: unit[places].sum(0) for number, places in rows.items()}
    total, num = torch.stack(list(sums.values())).sum(0), sum(map(len, rows.values()))
    found = []
    for number, places in rows.items():
        own, count = sums[number], len(places)
        # mean over pairs of products = (square of the sum - squares of the terms) / number of pairs
        same = (float(own @ own) - count) / (count * (count - 1))
        other = float(own @ (total - own)) / (count * (num - count))
        ratio = image_dependence(orders[places])["position_variance_ratio"]
        found.append(ClassOrders(names[number], count, ratio, same, other, ranks[places].mean(0)))
    return tuple(found)


def conclude_classes(by_class: Mapping[str, Sequence[ClassOrders]]) -> list[str]:
    """One sentence for each order: rank correlations within a class and across classes, mean over the images."""
    sentences = []
    for order, classes in by_class.items():
        weights = [one.num_images for one in classes]
        same, other = (
            math.fsum(w * getattr(one, name) for w, one in zip(weights, classes, strict=True)) / sum(weights)
            for name in ("same_class", "other_classes")
        )
        sentences.append(
            f"{order}: two images of a class have rank correlation {same:.2f}, images of different classes {other:.2f} "
            f"({len(classes)} classes)."
        )
    return sentences
