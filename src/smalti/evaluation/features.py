"""Features of an encoder on labelled data, computed once and shared by the protocols.

Letters: n images, N patches per image, D embed_dim.
"""

import abc
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from smalti.data.dataset import Labelled
from smalti.data.images.folders import ImageSet
from smalti.data.images.labelled import EvalCrop, eval_batches
from smalti.errors import ConfigError, DataError, RunError
from smalti.evaluation.context import EvaluationContext, Progress, own_head
from smalti.models.encoder import ClassHead, Encoder
from smalti.models.pooling import PatchFeatures, pool_features

Split = Literal["train", "test"]
DENSE_SIZE = 448
"""Default image size of dense protocols, at most: that of the papers."""
ATTENTIVE = ("map", "prr")
"""Poolings that need all tokens of an image."""


class Observer(abc.ABC):
    """Observes the encoder while it encodes all test images once, in order, for :meth:`Features.tokens`."""

    @abc.abstractmethod
    def watch(self, encoder: Encoder, size: int, images: ImageSet) -> contextlib.AbstractContextManager[object]:
        """Context manager around one pass over these images, resized to ``size``; resets the state."""

    @abc.abstractmethod
    def saw(self, places: Sequence[int]) -> None:
        """Called after each batch with the indices of its images in the test set."""


@dataclasses.dataclass(frozen=True)
class ImageFeatures:
    """One vector per image, for all poolings that need only the mean patch, and for one that needs all tokens."""

    pooled: PatchFeatures
    """Prefix tokens, and the mean patch as the only patch."""
    labels: Int[Tensor, " n"]
    """Class of each readable image."""
    places: tuple[int, ...]
    """Indices of the readable images in the split."""
    has_class_token: bool
    auto: str
    """The encoder's own pooling."""
    attended: tuple[str, Float[Tensor, "n D"]] | None = None
    """Name (``prr`` or ``map``) and vectors of the requested pooling, if any."""

    def pool(self, pool: str) -> Float[Tensor, "n D"]:
        """Image vectors: ``cls``, ``avg`` (mean patch), the requested one of ``prr`` and ``map``, or ``auto``: the
        encoder's own output.

        Raises:
            ConfigError: for ``cls`` without a class token.
        """
        pool = self.auto if pool == "auto" else pool
        if pool not in ATTENTIVE:
            return pool_features(self.pooled, pool, self.has_class_token)
        assert self.attended is not None and self.attended[0] == pool, pool
        return self.attended[1]


class PatchTokens:
    """Patch tokens of one split, cached in memory or recomputed in each pass.

    In both cases they are rounded to ``Features.dtype``, so that the memory limit changes the time but not the
    scores.
    """

    def __init__(self, features: "Features", images: ImageSet, size: int, what: str, keep: bool, split: Split) -> None:
        self._split: Split = split
        self._features = features
        self._images = images
        self._size = size
        self._what = what
        self.grid = features.encoder.check_size(size, size)
        """``(h, w)`` of the patch grid."""
        self.is_kept = keep
        """Whether they are cached in memory."""
        self._kept: Tensor | None = None
        self._places: dict[int, int] = {}
        if keep:
            num_patches = self.grid[0] * self.grid[1]
            self._kept = torch.empty(len(images), num_patches, features.encoder.embed_dim, dtype=features.dtype)
            for tokens, positions in self._compute(range(len(images)), features.batch_size, what):
                start = len(self._places)
                self._kept[start : start + len(tokens)] = tokens
                self._places.update({position: start + i for i, position in enumerate(positions)})

    def batches(
        self, order: Sequence[int] | None = None, batch_size: int = 64
    ) -> Iterator[tuple[Float[Tensor, "B N D"], list[int]]]:
        """Tokens batch by batch.

        Args:
            order: indices of images in the split; None: all, in order.
            batch_size: images per batch; the last batch may be smaller, and unreadable images are skipped.

        Yields:
            ``(B, N, D)`` float32 tokens on the encoder's device, and the indices of their images in the split.
        """
        order = range(len(self._images)) if order is None else order
        device = self._features.device
        if self._kept is None:
            waiting, places = torch.empty(0), list[int]()
            for tokens, positions in self._compute(order, min(batch_size, self._features.batch_size), self._what):
                waiting = torch.cat([waiting, tokens]) if places else tokens
                places += positions
                while len(places) >= batch_size:
                    yield waiting[:batch_size].float(), places[:batch_size]
                    waiting, places = waiting[batch_size:], places[batch_size:]
            if places:
                yield waiting.float(), places
            return
        readable = [position for position in order if position in self._places]
        for start in range(0, len(readable), batch_size):
            positions = readable[start : start + batch_size]
            rows = torch.tensor([self._places[position] for position in positions])
            yield self._kept[rows].to(device).float(), positions

    def _compute(self, order: Sequence[int], batch_size: int, what: str) -> Iterator[tuple[Tensor, list[int]]]:
        chosen = dataclasses.replace(self._images, samples=tuple(self._images.samples[i] for i in order))
        is_whole = self._split == "test" and list(order) == list(range(len(self._images)))
        with self._features.observing(self._size if is_whole else None) as saw:
            encoded = self._features.encode(chosen, self._size, "squash", batch_size, what, norm=self._features.norm)
            for features, positions in encoded:
                places = [order[position] for position in positions]
                saw(places)
                yield self._features.round(features.patches), places


class Features(EvaluationContext[ImageSet]):
    """Features of one encoder on one labelled data set, computed on first use and cached.

    Args:
        encoder: encoder in eval mode, on the device to use.
        data: training and test images.
        batch_size: images per forward pass.
        num_workers: data-loading worker processes.
        cache_dtype: precision of patch tokens, ``float16`` or ``float32``.
        cache_mib: memory for cached patch tokens; larger sets are recomputed for each pass.
        norm: whether patch tokens of dense protocols go through the encoder's final norm; see ``EvalConfig``.
        progress: called as ``progress(what, done, total)``.
        observers: by name, objects that observe the encoder while it encodes the test images.
        own_heads: whether the head stored with the encoder may be used; false if the baseline has none.
    """

    def __init__(
        self,
        encoder: Encoder,
        data: Labelled[ImageSet],
        *,
        batch_size: int = 64,
        num_workers: int = 0,
        cache_dtype: str = "float16",
        cache_mib: int = 2048,
        norm: bool = True,
        progress: Progress | None = None,
        observers: Mapping[str, Observer] | None = None,
        own_heads: bool = True,
    ) -> None:
        super().__init__(encoder, data, batch_size=batch_size, num_workers=num_workers, progress=progress)
        self.norm = norm
        self.dtype = {"float16": torch.float16, "float32": torch.float32}[cache_dtype]
        """Data type to which patch tokens are rounded."""
        self._bytes_left = cache_mib * 2**20
        self._image_level: dict[tuple[Split, int, str], ImageFeatures] = {}
        self._tokens: dict[tuple[Split, int], PatchTokens] = {}
        self._observers = dict(observers or {})
        self._observed: set[tuple[str, int]] = set()
        self._own_heads = own_heads

    @property
    def class_head(self) -> ClassHead | None:
        """The encoder's own head, if it classifies the classes of the data and may be used."""
        return own_head(self.encoder, self.data.classes) if self._own_heads else None

    def observed(self, name: str, size: int) -> Observer:
        """The observer ``name`` after it has seen all test images at ``size``.

        It watches while another protocol computes :meth:`tokens`; otherwise the images are encoded now.
        """
        if (name, size) not in self._observed:
            for _ in self.tokens("test", size).batches(batch_size=self.batch_size):
                pass
        assert (name, size) in self._observed, name
        return self._observers[name]

    @contextlib.contextmanager
    def observing(self, size: int | None) -> Iterator[Callable[[Sequence[int]], None]]:
        """Attach observers that haven't seen this size; None: no observers."""
        names = [name for name in self._observers if size is not None and (name, size) not in self._observed]
        with contextlib.ExitStack() as stack:
            for name in names:
                stack.enter_context(self._observers[name].watch(self.encoder, size or 0, self.data.test))

            def saw(places: Sequence[int]) -> None:
                for name in names:
                    self._observers[name].saw(places)

            yield saw
        # not reached if the pass was interrupted
        self._observed.update((name, size or 0) for name in names)

    def image_size(self, wanted: int | None) -> int:
        """Image size in pixels: the requested one, else the encoder's own.

        Raises:
            ConfigError: if the encoder's own size isn't square and none is given.
            ShapeError: if the patch size does not divide it.
        """
        height, width = self.encoder.img_size
        if wanted is None and height != width:
            raise ConfigError(f"{self.encoder.name} takes {height}x{width} images; choose a square eval.image_size")
        size = height if wanted is None else wanted
        self.encoder.check_size(size, size)
        return size

    def dense_size(self, wanted: int | None) -> int:
        """Image size of a dense protocol: the requested one, else the smaller of the encoder's own and 448.

        Raises:
            ConfigError: if the encoder's own size isn't square and none is given.
            ShapeError: if the patch size does not divide it.
        """
        if wanted is not None:
            return self.image_size(wanted)
        own, step = self.image_size(None), max(self.encoder.patch_size)
        return min(own, max(step, DENSE_SIZE // step * step))

    def image_level(self, split: Split, size: int, pool: str = "auto") -> ImageFeatures:
        """One vector per image; images are resized by their short side and center-cropped.

        Args:
            split: ``train`` or ``test``.
            size: side of the images in pixels.
            pool: which vector to compute in addition to ``cls`` and ``avg``.

        Raises:
            ConfigError: if the encoder doesn't have it.
            DataError: if no image of the split can be read.
        """
        pool = self.encoder.pool if pool == "auto" else pool
        pool = pool if pool in ATTENTIVE else ""
        key = (split, size, pool)
        if key not in self._image_level:
            images = self._split(split)
            patches, prefix, places, attended = [], [], list[int](), list[Tensor]()
            for features, positions in self.encode(images, size, "crop", self.batch_size, self._called(split)):
                patches.append(features.patches.mean(1, keepdim=True).float().cpu())
                prefix.append(features.prefix.float().cpu())
                if pool:
                    with torch.no_grad():
                        attended.append(self.encoder.pooled(features, pool).float().cpu())
                places += positions
            if not places:
                first = str(images.paths[0])
                why = f"; {first}: {self.skipped[first]}" if first in self.skipped else ""
                raise DataError(f"{images.root}: none of the {len(images)} {self._called(split)} can be read{why}")
            self._image_level[key] = ImageFeatures(
                PatchFeatures(torch.cat(patches), torch.cat(prefix), (1, 1)),
                torch.tensor(
                    [-1 if images.samples[place].label is None else images.samples[place].label for place in places]
                ),
                tuple(places),
                self.encoder.has_class_token,
                self.encoder.pool,
                (pool, torch.cat(attended)) if pool else None,
            )
        return self._image_level[key]

    def tokens(self, split: Split, size: int, keep: bool = True) -> PatchTokens:
        """Patch tokens of images that were resized to a square, whatever their aspect ratio.

        Args:
            split: ``train`` or ``test``.
            size: side of the images in pixels.
            keep: whether they will be read more than once, so that they are cached if they fit into the memory limit.
        """
        key = (split, size)
        if key not in self._tokens:
            images = self._split(split)
            height, width = self.encoder.check_size(size, size)
            needed = len(images) * height * width * self.encoder.embed_dim * self.dtype.itemsize
            fits = keep and needed <= self._bytes_left
            tokens = PatchTokens(self, images, size, f"tokens of {self._called(split)}", fits, split)
            if not fits:
                return tokens
            self._bytes_left -= needed
            self._tokens[key] = tokens
        return self._tokens[key]

    def encode(
        self,
        images: ImageSet,
        size: int,
        mode: EvalCrop,
        batch_size: int,
        what: str,
        norm: bool = True,
    ) -> Iterator[tuple[PatchFeatures, list[int]]]:
        """Features batch by batch on the encoder's device, without gradients, and the indices of their images; after
        the final norm if ``norm``."""
        batches = eval_batches(
            images, size, self.encoder.in_chans, mode=mode, batch_size=batch_size, num_workers=self.num_workers
        )
        done = 0
        for pixels, positions, skipped in batches:
            self.skipped.update({str(item.path): item.reason for item in skipped})
            done += len(positions) + len(skipped)
            if len(positions):
                yield self._encode(pixels, norm), positions
            self.progress(what, done, len(images))

    def patches(self, pixels: Num[Tensor, "B C S S"]) -> Float[Tensor, "B N D"]:
        """Patch tokens of images that aren't normalised yet, without gradients, rounded to ``dtype``; after the final
        norm if ``norm``."""
        return self.round(self._encode(pixels, self.norm).patches)

    def round(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """Tokens rounded to ``dtype``.

        Raises:
            RunError: if a value overflows.
        """
        rounded = tokens.to(self.dtype)
        if not rounded.isfinite().all():
            raise RunError(
                f"patch tokens overflow {self.dtype}: the largest is {tokens.abs().max():g}; "
                "set eval.cache_dtype=float32"
            )
        return rounded

    def _encode(self, pixels: Num[Tensor, "B C S S"], norm: bool) -> PatchFeatures:
        with torch.no_grad():
            images = self.encoder.normalize(pixels.to(self.device))
            features = self.encoder.encode(images) if norm else self.encoder.encode(images, norm=False)
        if not features.patches.isfinite().all() or not features.prefix.isfinite().all():
            raise RunError(
                f"{self.encoder.name}: features are not finite; the weights are damaged, or training diverged"
            )
        return features

    def _called(self, split: Split) -> str:
        return "train images" if split == "train" else self.evaluated

    def _split(self, split: Split) -> ImageSet:
        return self.data.train if split == "train" else self.data.test
