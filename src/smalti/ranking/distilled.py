"""Orders that a run of ``ranker`` predicts, and how well they agree with the teacher that they were learned from.

Letters: B images, S side of the squares, N patches.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Int, Num
from torch import Tensor

from smalti.data.images.folders import open_images
from smalti.data.images.image_set import ImageSet, as_text
from smalti.data.order_files import DISTILLED, OrderCache, read_orders
from smalti.errors import SmaltiError
from smalti.functional.orders import rank_correlation, static_order
from smalti.methods.ranker import DistilledRanker
from smalti.ranking.diagnostics import spread_evenly
from smalti.ranking.rankers import Ranked, Ranker, Stopwatch, rank_by_score
from smalti.runs.config import RunConfig

_COMPARED = 2048
"""Images for the agreement, at most."""


class NetworkRanker(Ranker):
    """``distilled``: scores of a run of ``ranker``.

    Args:
        method: in eval mode, on the device where it shall run.
        config: settings of the run.
        source: see :class:`~smalti.ranking.rankers.Ranker`.
    """

    gives = (DISTILLED, "variance")
    default = (DISTILLED,)

    def __init__(self, method: DistilledRanker, config: RunConfig, source: str) -> None:
        encoder, size = method.encoder, config.data.image_size
        super().__init__(size, encoder.in_chans, encoder.check_size(size, size), source)
        self.method, self.config = method, config

    def _rank(self, images: Num[Tensor, "B C S S"], names: Sequence[str]) -> dict[str, Ranked]:
        if not names:
            return {}
        watch = Stopwatch()
        scores = self.method.scores(self.method.encoder.normalize(images))
        return {DISTILLED: watch.stop(rank_by_score(scores.float()))}


@dataclasses.dataclass(frozen=True)
class TeacherAgreement:
    """Spearman's correlation of three orders with the teacher's, means over images."""

    order: str
    """Name of the teacher's order."""
    file: str
    """The teacher's file."""
    num_images: int
    held_out: bool
    """Whether the ranker was not trained on these images."""
    distilled: float
    """Of the ranker's order."""
    static: float
    """Of one order for all images: that of the mean ranks in the teacher's orders of the training images."""
    other_image: float
    """Of the teacher's order of another image."""

    @property
    def sentence(self) -> str:
        """The numbers in words."""
        images = f"{self.num_images:,} images that it was {'not ' if self.held_out else ''}trained on"
        verdict = (
            "it has learned to look at the image"
            if self.distilled > self.static + SEEN
            else "one order for all images is as good"
        )
        return (
            f"distilled and the teacher's {self.order} correlate by {self.distilled:.3f} on {images}; the static order "
            f"by {self.static:.3f}, the order of another image by {self.other_image:.3f}: {verdict}."
        )


SEEN = 0.02
"""Difference of correlations from which on a ranker counts as better than the static order."""


def agree_with_teacher(ranker: NetworkRanker, cache: OrderCache, images: ImageSet) -> TeacherAgreement | None:
    """Compare a ranker's orders with its teacher's, on images that it was not trained on if the teacher has such.

    Args:
        ranker: the ranker.
        cache: its orders of these images.
        images: the images that were ranked.

    Returns:
        None if the teacher's file is gone, or has orders of fewer than two of the images.
    """
    own = ranker.config.method
    file, order = getattr(own, "orders", None), str(getattr(own, "order", ""))
    if file is None or not Path(file).is_file():
        return None
    try:
        teacher = read_orders(file)
        trained = _training_names(ranker.config)
    except SmaltiError:
        return None
    known = set(teacher.images)
    shared = [name for name in images.names if as_text(name) in known and as_text(name) not in teacher.unreadable]
    held_out = [name for name in shared if name not in trained]
    chosen = held_out if len(held_out) > 1 else shared
    if len(chosen) < 2 or teacher.grid != cache.grid:
        return None
    some = [chosen[place] for place in spread_evenly(len(chosen), _COMPARED)]
    flips = [False] * len(some)
    theirs, ours = teacher.orders(order, some, flips), cache.orders(DISTILLED, some, flips)
    learned = [name for name in trained if as_text(name) in known and as_text(name) not in teacher.unreadable]
    static = static_order(teacher.orders(order, learned, [False] * len(learned)) if learned else theirs)
    return TeacherAgreement(
        order=order,
        file=str(file),
        num_images=len(some),
        held_out=len(held_out) > 1,
        distilled=_mean(ours, theirs),
        static=_mean(static.expand_as(theirs), theirs),
        other_image=_mean(theirs.roll(1, 0), theirs),
    )


def _mean(first: Int[Tensor, "M N"], second: Int[Tensor, "M N"]) -> float:
    return float(rank_correlation(first, second).mean())


def _training_names(config: RunConfig) -> set[str]:
    """Names of the images that a run was trained on, relative to its data."""
    images = open_images(str(config.data.path), class_depth=config.data.class_depth)
    return set(images.training().names)
