"""What every protocol is given: an encoder, labelled data, and the common settings of an evaluation."""

from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import torch

from smalti.data.dataset import Dataset, Labelled
from smalti.models.encoder import ClassHead, Encoder

Progress = Callable[[str, int, int], None]
"""``progress(what, done, total)``."""
NUM_SHOWN = 8
"""Test samples whose predictions are kept for figures."""
T = TypeVar("T")
D = TypeVar("D", bound=Dataset)


def spread(number: int, few: int) -> tuple[int, ...]:
    """At most ``few`` of the indices 0..number-1, evenly spaced, ascending."""
    return tuple(sorted({i * number // few for i in range(few)})) if number else ()


def own_head(encoder: Encoder, classes: tuple[str, ...]) -> ClassHead | None:
    """The classification head stored with the encoder, if its classes are those of the data."""
    head = encoder.class_head
    if head is None or len(head.weight) != len(classes) or (head.classes and head.classes != classes):
        return None
    return head


class EvaluationContext(Generic[D]):
    """One encoder on one labelled data set. Protocols for images get :class:`~smalti.evaluation.features.Features`.

    Args:
        encoder: encoder in eval mode, on the device to use.
        data: training and test data.
        batch_size: samples per forward pass.
        num_workers: data-loading worker processes.
        progress: called as ``progress(what, done, total)``.
    """

    def __init__(
        self,
        encoder: Encoder,
        data: Labelled[D],
        *,
        batch_size: int = 64,
        num_workers: int = 0,
        progress: Progress | None = None,
    ) -> None:
        self.encoder = encoder
        self.data = data
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.progress = progress or (lambda what, done, total: None)
        self.skipped: dict[str, str] = {}
        """Images that could not be read so far: path -> reason."""
        self._memo: dict[Hashable, Any] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Test files, relative to the data set."""
        return self.data.test.names

    @property
    def evaluated(self) -> str:
        """Name of the evaluated samples in messages, such as ``val images``."""
        return self.data.evaluated

    @property
    def shown(self) -> tuple[int, ...]:
        """Indices of the test samples whose predictions are kept for figures: a few, evenly spaced."""
        return spread(len(self.data.test), NUM_SHOWN)

    @property
    def device(self) -> torch.device:
        """Device of the encoder."""
        return next(self.encoder.parameters()).device

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """Cache of values that several protocols need, computed on first use."""
        if key not in self._memo:
            self._memo[key] = compute()
        return self._memo[key]
