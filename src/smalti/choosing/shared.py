"""Features of several layers of an encoder from one pass, so that a further layer costs no further pass.

Letters: n images, N patches, D embed_dim of one layer.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from smalti.data.dataset import Labelled
from smalti.data.images.folders import ImageSet
from smalti.data.images.labelled import EvalCrop
from smalti.evaluation.features import Features
from smalti.models.encoder import Encoder
from smalti.models.inner_layers import InnerLayers, joined
from smalti.models.pooling import PatchFeatures

_Batch = tuple[list[PatchFeatures], list[int]]


class Passes:
    """Tokens of all wanted layers of an encoder, of the passes so far.

    Args:
        encoder: whose blocks are read.
        layers: numbers of all blocks that any candidate reads, 1 the first.
        limit_mib: memory for tokens; a larger pass is computed again for each candidate.
    """

    def __init__(self, encoder: Encoder, layers: Sequence[int], limit_mib: int) -> None:
        self.encoder = encoder
        self.layers = tuple(sorted(set(layers)))
        self.left = limit_mib * 2**20
        """Bytes left."""
        self.found: dict[Any, tuple[list[_Batch], dict[str, str]]] = {}
        """Images, size, crop and norm -> its batches, and the images that could not be read."""


class SharedFeatures(Features):
    """Features of an encoder's inner layers that keep what a pass computes for the other layers, too."""

    def __init__(self, encoder: InnerLayers, data: Labelled[ImageSet], *, passes: Passes, **options: Any) -> None:
        super().__init__(encoder, data, **options)
        self._passes = passes
        self._layers = encoder.layers

    def encode(
        self, images: ImageSet, size: int, mode: EvalCrop, batch_size: int, what: str, norm: bool = True
    ) -> Iterator[tuple[PatchFeatures, list[int]]]:
        """As in :class:`Features`, from the memory of the pass where it fits."""
        passes = self._passes
        key = (images.paths, size, mode, norm)
        if key not in passes.found:
            height, width = self.encoder.check_size(size, size)
            width_of_all = len(passes.layers) * self.encoder.vit.embed_dim
            needed = len(images) * height * width * width_of_all * self.dtype.itemsize
            if needed > passes.left:
                yield from super().encode(images, size, mode, batch_size, what, norm)
                return
            passes.left -= needed
            passes.found[key] = self._pass(images, size, mode, batch_size, what, norm)
        batches, skipped = passes.found[key]
        self.skipped.update(skipped)
        for layers, positions in batches:
            chosen = joined([layers[passes.layers.index(layer)] for layer in self._layers])
            patches, prefix = (part.to(self.device).float() for part in (chosen.patches, chosen.prefix))
            yield PatchFeatures(patches, prefix, chosen.grid), positions

    def _pass(
        self, images: ImageSet, size: int, mode: EvalCrop, batch_size: int, what: str, norm: bool
    ) -> tuple[list[_Batch], dict[str, str]]:
        """All layers of all images, rounded as patch tokens are."""
        together = Features(
            InnerLayers(self._passes.encoder, self._passes.layers),
            self.data,
            batch_size=batch_size,
            num_workers=self.num_workers,
            progress=self.progress,
        )
        width = self.encoder.vit.embed_dim
        batches: list[_Batch] = []
        for features, positions in together.encode(images, size, mode, batch_size, what, norm):
            parts = zip(
                *(torch.split(part, width, dim=-1) for part in (features.patches, features.prefix)), strict=True
            )
            layers = [
                PatchFeatures(self.round(patches).cpu(), prefix.cpu(), features.grid) for patches, prefix in parts
            ]
            batches.append((layers, positions))
        return batches, dict(together.skipped)
