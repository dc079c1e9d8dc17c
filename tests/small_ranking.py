"""A ranking made by hand: random orders of the patches of a few images, and curves without a predictor."""

from pathlib import Path

import numpy as np
import torch

from smalti.data.images.folders import open_images
from smalti.data.order_files import OrderCache
from smalti.ranking.classes import orders_by_class
from smalti.ranking.curves import PrefixCurve, compare_curves
from smalti.ranking.diagnostics import agreement, describe_orders
from smalti.ranking.rank import Ranking

GRID = (4, 4)


def small_ranking(folder: Path, with_curves: bool = True, num_classes: int = 0) -> Ranking:
    """Orders ``collapse`` (with scores) and ``variance`` of all images of a folder, which are of classes in turn."""
    images = open_images(folder)
    rng = np.random.default_rng(0)
    count, num = len(images), GRID[0] * GRID[1]
    orders = {
        name: torch.from_numpy(np.stack([rng.permutation(num) for _ in range(count)]).astype(np.int16))
        for name in ("collapse", "variance")
    }
    scores = {"collapse": -orders["collapse"].long().argsort(1).float()}
    flips = np.zeros(count, dtype=bool)
    cache = OrderCache(
        Path("x.parquet"), GRID, 32, str(folder), "a toy", images.names, (None,) * count, flips, orders, scores
    )
    curves = {}
    if with_curves:
        counts, total = np.array([0, 4, 8, 16]), np.ones(count)
        for number, name in enumerate(("random", "collapse", "collapse_shuffled")):
            left = np.tile(1 - counts / num, (1, count, 1)) * (1 + 0.1 * number)
            curves[name] = PrefixCurve(counts, left, total, left, num)
    return Ranking(
        source="a <b> toy",
        data=str(folder),
        cache=cache,
        images=images,
        skipped=(),
        names=("collapse", "variance"),
        described={name: describe_orders(order.long(), GRID) for name, order in orders.items()},
        agreements={("collapse", "variance"): agreement(orders["collapse"].long(), orders["variance"].long())},
        against={"collapse": agreement(orders["collapse"].long(), orders["collapse"].long())},
        against_source="another run",
        curves=curves,
        curve_scores=compare_curves(curves) if curves else {},
        predictor="a predictor",
        scored_on="8 images",
        sentences=("Nothing is known.",),
        settings={"seed": 0},
        seconds=61.0,
        by_class={
            "collapse": orders_by_class(
                orders["collapse"].long(),
                [number % num_classes for number in range(count)],
                [f"<class> {number}" for number in range(num_classes)],
            )
        }
        if num_classes
        else {},
    )
