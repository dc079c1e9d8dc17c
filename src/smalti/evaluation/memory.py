"""Memory bank of labelled patches for nearest-neighbour protocols: unit-length tokens of the training images.

Source: Balazevic et al., "Towards in-context scene understanding", arXiv:2306.01667, in the form of the public code
open-hummingbird-eval: class fractions of patches, augmented training images, and a memory of limited size that prefers
patches with the image's rare classes.
Letters: n images, B of them in a batch, N = h*w patches, D embed_dim, M patches in memory, C classes, K neighbours.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor
from torch.nn import functional as F

from smalti.config import Count, CountFromZero, settings
from smalti.data.color import ColorConfig, recolor
from smalti.data.crops import random_resized_crop
from smalti.data.images.folders import ImageSet
from smalti.data.images.labelled import eval_mask
from smalti.data.loader import epoch_order, sample_key
from smalti.errors import DataError
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.dense import augmented_tokens, ignored_value, mask_of_readable, read_masks, warn_unlabelled
from smalti.evaluation.features import Features
from smalti.functional.neighbours import nearest, patch_counts
from smalti.functional.random import sample_uniform
from smalti.models.encoder import Encoder

PAPER_SIZE = 512
"""Default side of the images in pixels, at most; 504 for patches of 14 pixels."""
PAPER_MEMORY, SMALL_MEMORY = 10_240_000, 50_000
DEFAULT_K = 30
FEW_KEYS, FEW_K = 5_000, 10
"""The small preset uses fewer neighbours if the memory has fewer keys."""
LABEL_K = 20
"""Neighbours that vote on a patch's class, or are ranked in retrieval; as in k-NN on images."""
CROP_AREA, CROP_ASPECT = (0.5, 2.0), (3 / 4, 4 / 3)
JITTER, JITTER_PROB = 0.1, 0.5
IMAGENET_STD, HBIRD_STD = (0.229, 0.224, 0.225), (0.229, 0.224, 0.255)
"""ImageNet's standard deviation, and the one in the public code."""
_AT_ONCE = 16  # images whose patches are queried at a time
_KEPT_BYTES = 2**26  # neighbours up to this size are cached for the next protocol


@settings
class MemoryConfig:
    """Settings of the memory of training patches and of the nearest-neighbour search."""

    k: Count | None = None
    """Nearest neighbours; None: the preset's."""
    memory_size: CountFromZero | None = None
    """Maximum number of training patches; 0: all; None: the preset's."""
    void: Literal["ignore", "class0"] | None = None
    """Pixels without a label in the memory: ignored, or class 0; None: the preset's."""
    augment: bool | None = None
    """Random crops and color jitter of the training images; None: the preset's."""


@dataclass(frozen=True)
class MemoryRecipe:
    """A preset with the settings that the user changed."""

    image_size: int
    memory_size: int
    """Maximum number of patches; 0: all."""
    void: Literal["ignore", "class0"]
    augment: bool
    epochs: int
    """Passes through the training images; more than one only makes sense with augmentation."""
    std: Literal["encoder", "hbird"]


class PatchMemory(NamedTuple):
    """Memory of labelled patches of the training images."""

    keys: Float[Tensor, "M D"]
    """Unit tokens; float16 on a GPU, else float32."""
    counts: Integer[Tensor, "M C"]
    """Number of pixels of each class; no row is empty."""
    num_images: int
    """Number of training images in the memory."""

    @property
    def classes(self) -> Int[Tensor, " M"]:
        """Majority class of each patch; ties go to the lowest."""
        return self.counts.argmax(1)


def choose_recipe(features: Features, config: EvalConfig, own: MemoryConfig) -> MemoryRecipe:
    """The preset with the user's settings.

    Raises:
        ConfigError: if the encoder's own image size isn't square and none is given.
        ShapeError: if the patch size does not divide the image size.
    """
    if config.preset == "small":
        size = features.dense_size(config.image_size)
        recipe = MemoryRecipe(size, SMALL_MEMORY, "ignore", False, 1, "encoder")
    else:
        step = max(features.encoder.patch_size)
        size = features.image_size(config.image_size or PAPER_SIZE // step * step)
        recipe = MemoryRecipe(size, PAPER_MEMORY, "ignore", True, 1, "encoder")
        if config.preset == "paper":
            recipe = dataclasses.replace(recipe, void="class0", epochs=2, std="hbird")
    changed: dict[str, Any] = {"memory_size": own.memory_size, "void": own.void, "augment": own.augment}
    recipe = dataclasses.replace(recipe, **{name: value for name, value in changed.items() if value is not None})
    if not recipe.augment:  # further passes would be identical
        recipe = dataclasses.replace(recipe, epochs=1)
    if not _has_imagenet_std(features.encoder):
        recipe = dataclasses.replace(recipe, std="encoder")
    return recipe


def choose_k(config: EvalConfig, own: MemoryConfig, default: int, num_keys: int) -> tuple[int, dict[str, Any]]:
    """Number of neighbours, and its entries in the settings of a result."""
    if own.k is None and config.preset == "small" and num_keys < FEW_KEYS:
        default = min(default, FEW_K)
    wanted = own.k or default
    if wanted <= num_keys:
        return wanted, {"k": wanted}
    return num_keys, {
        "k": num_keys,
        "k_wanted": wanted,
        "k_note": f"reduced: the memory has only {num_keys} patches",
    }


def patch_memory(features: Features, recipe: MemoryRecipe, seed: int) -> PatchMemory:
    """The memory, built on first use.

    Raises:
        DataError: if no training image can be read, a mask is invalid, or no patch has a label.
    """
    return features.once(("memory", recipe, seed), partial(_make_memory, features, recipe, seed))


def neighbours(
    features: Features, recipe: MemoryRecipe, seed: int, k: int
) -> Iterator[tuple[Float[Tensor, "B N K"], Int[Tensor, "B N K"], list[int]]]:
    """Cosine similarities in descending order, indices in the memory, and indices of the test images.

    The search is done once, for as many neighbours as any protocol needs by default, and cached if the result isn't too
    large.
    """
    memory = patch_memory(features, recipe, seed)
    h, w = features.encoder.check_size(recipe.image_size, recipe.image_size)
    most = min(max(k, DEFAULT_K), len(memory.keys))
    if len(features.data.test) * h * w * most * 8 > _KEPT_BYTES:
        found: Iterable[tuple[Tensor, Tensor, list[int]]] = _search(features, recipe, memory, k)
    else:
        found = features.once(
            ("neighbours", recipe, seed, most),
            lambda: [
                (sims.cpu(), places.int().cpu(), images)
                for sims, places, images in _search(features, recipe, memory, most)
            ],
        )
    done = 0
    for sims, places, images in found:
        yield sims[..., :k].to(features.device), places[..., :k].long().to(features.device), images
        done += len(images)
    if not done:
        test = features.data.test
        raise DataError(f"{test.root}: none of the {len(test)} {features.evaluated} can be read")


def unlabelled_places(features: Features) -> frozenset[int]:
    """Indices of the test images whose masks have no labelled pixel; they are skipped with a warning.

    All masks of the test images are read, so that errors in them are found before anything is encoded.

    Raises:
        DataError: if a mask is invalid, or no test image has a label.
    """

    def look() -> frozenset[int]:
        images, num_classes = features.data.test, len(features.data.classes)
        ignore = ignored_value(num_classes)
        empty = []
        for place, sample in enumerate(images.samples):
            mask = mask_of_readable(sample, num_classes)
            if mask is not None and (mask == ignore).all():
                empty.append(place)
        if len(empty) == len(images):
            raise DataError(f"{images.root}: no labelled pixel in the masks of all {len(images)} {features.evaluated}")
        warn_unlabelled(images, empty, features.evaluated)
        return frozenset(empty)

    return features.once("unlabelled", look)


def masks_of(images: ImageSet, places: Sequence[int], num_classes: int, size: int) -> Integer[Tensor, "B M M"]:
    """Masks of some of the images, as in :func:`read_masks`."""
    chosen = dataclasses.replace(images, samples=tuple(images.samples[place] for place in places))
    return read_masks(chosen, num_classes, size)


def patch_classes(features: Features, recipe: MemoryRecipe, places: Sequence[int]) -> Int[Tensor, "B N"]:
    """Majority class of the labelled pixels of each patch of test images; ties go to the lowest; ``ignore`` if none."""
    num_classes = len(features.data.classes)
    ignore = ignored_value(num_classes)
    masks = masks_of(features.data.test, places, num_classes, recipe.image_size)
    counts = patch_counts(masks, features.encoder.patch_size, num_classes, ignore)
    return counts.argmax(2).masked_fill(counts.sum(2) == 0, ignore)


def memory_settings(
    features: Features, recipe: MemoryRecipe, memory: PatchMemory, config: EvalConfig
) -> dict[str, Any]:
    """Settings of a result that describe how the memory was built."""
    half = memory.keys.dtype != torch.float32
    return {
        "preset": config.preset,
        "image_size": recipe.image_size,
        "resize": "to a square, aspect ratio ignored",
        "memory_size": len(memory.keys),
        "memory_size_limit": recipe.memory_size or "none",
        "memory_images": memory.num_images,
        "memory_sampling": "equally many patches per image, first those with the image's rare classes"
        if recipe.memory_size
        else "all patches",
        "void": recipe.void,
        "augment": recipe.augment,
        "augment_epochs": recipe.epochs,
        "std": "blue divided by 0.255, as in the public code" if recipe.std == "hbird" else "the encoder's own",
        "search": f"exact, cosine; {'float16, the best 2k again in float32' if half else 'float32'}",
        "num_unlabelled": len(unlabelled_places(features)),
        "cache_dtype": config.cache_dtype,
    }


def comparable(config: EvalConfig, ours: str) -> str:
    """Whether scores are comparable with published ones; ``ours``: differences of ``preset=full``."""
    if config.preset == "small":
        return "small preset: not comparable with published numbers"
    known = "open-hummingbird-eval's settings, unless changed"
    return known if config.preset == "paper" else f"{known}; {ours}"


def patch_scores(counts: Integer[Tensor, "B N C"], noise: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
    """Priority of patches: the smallest scores are kept, which favours patches with rare classes of their image.

    Args:
        counts: ``(B, N, C)`` pixels of each class.
        noise: ``(B, N)``, uniform in 0..1.

    Returns:
        For each patch, the sum over its classes of the number of the image's patches with this class, times the noise;
        infinite for a patch without any class.
    """
    has = (counts > 0).float()
    frequency = has.sum(1)  # (B, C)
    scores = torch.einsum("bnc,bc->bn", has, frequency) * noise
    return scores.masked_fill(~has.any(2), math.inf)


def jitter_and_crop(
    image: np.ndarray, mask: np.ndarray, *, size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A random crop of an image with color jitter, and the same crop of its mask; neither is mirrored.

    Brightness, contrast, saturation and hue change by up to 10 %, each with probability 0.5. The published range of
    areas exceeds the image, so crops show half of it to all of it.

    Args:
        image: ``(H, W, C)``.
        mask: ``(H, W)``.
        size: side of the results; bilinear and antialiased, the mask by nearest pixel.
        rng: source of randomness.
    """
    brightness, contrast, saturation, hue = (JITTER if rng.random() < JITTER_PROB else 0.0 for _ in range(4))
    colors = ColorConfig(
        brightness=brightness, contrast=contrast, saturation=saturation, hue=hue, jitter_prob=1.0, gray_prob=0.0
    )
    image = recolor(image, colors, rng).reshape(image.shape)  # OpenCV drops a single channel's axis
    top, left, height, width = random_resized_crop(rng, mask.shape[0], mask.shape[1], CROP_AREA, CROP_ASPECT)
    window = np.s_[top : top + height, left : left + width]
    pixels = torch.from_numpy(np.ascontiguousarray(image[window])).permute(2, 0, 1)[None]
    resized = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)[0]
    return resized.permute(1, 2, 0).numpy(), eval_mask(mask[window], size)


def _make_memory(features: Features, recipe: MemoryRecipe, seed: int) -> PatchMemory:
    encoder, images, device = features.encoder, features.data.train, features.device
    num_classes = len(features.data.classes)
    ignore = ignored_value(num_classes)
    grid = encoder.check_size(recipe.image_size, recipe.image_size)
    num_patches = grid[0] * grid[1]
    order: Sequence[int] = range(len(images))
    num_kept = num_patches
    if recipe.memory_size:
        most = max(1, recipe.memory_size // recipe.epochs)
        if most < len(images):
            order = sorted(epoch_order(seed, 0, len(images))[:most].tolist())
        num_kept = min(num_patches, most // len(order))
    room = recipe.epochs * len(order) * num_kept
    half = device.type == "cuda"
    keys = torch.empty(room, encoder.embed_dim, dtype=torch.float16 if half else torch.float32, device=device)
    counts = torch.empty(0, device=device)
    size, empty, seen = 0, set[int](), set[int]()
    for epoch in range(recipe.epochs):
        for tokens, masks, places in _train_batches(features, recipe, order, seed, epoch):
            if recipe.void == "class0":
                masks = masks.where(masks != ignore, 0)
            found = patch_counts(masks.to(device), encoder.patch_size, num_classes, ignore)
            if not size:
                counts = torch.empty(room, num_classes, dtype=found.dtype, device=device)
            luck = torch.tensor([sample_key(seed, epoch, place) for place in places], device=device)
            scores = patch_scores(found, sample_uniform(luck, num_patches, stream=1))
            for one, truth, score, place in zip(tokens, found, scores, places, strict=True):
                best = score.argsort(stable=True)[:num_kept]
                best = best[score[best].isfinite()].sort().values
                keys[size : size + len(best)] = F.normalize(one[best], dim=1)
                counts[size : size + len(best)] = truth[best]
                size += len(best)
                seen.add(place)
                if not len(best):
                    empty.add(place)
    if not seen:
        raise DataError(f"{images.root}: none of the {len(order)} train images can be read")
    if not size:
        raise DataError(f"{images.root}: no labelled pixel in the masks of all {len(seen)} training images")
    warn_unlabelled(images, sorted(empty), "train images")
    return PatchMemory(keys[:size], counts[:size], len(seen) - len(empty))


def _train_batches(
    features: Features, recipe: MemoryRecipe, order: Sequence[int], seed: int, epoch: int
) -> Iterator[tuple[Float[Tensor, "B N D"], Integer[Tensor, "B S S"], list[int]]]:
    """Tokens of training images, and their masks at the size of the images."""
    images, num_classes = features.data.train, len(features.data.classes)
    if recipe.augment:
        alter = partial(jitter_and_crop, size=recipe.image_size)
        with _normalization(features.encoder, recipe):
            yield from augmented_tokens(features, order, _AT_ONCE, seed, epoch, alter)
        return
    for tokens, places in _batches(features, recipe, "train", order):
        yield tokens, masks_of(images, places, num_classes, recipe.image_size), places


def _batches(
    features: Features, recipe: MemoryRecipe, split: Literal["train", "test"], order: Sequence[int] | None = None
) -> Iterator[tuple[Float[Tensor, "B N D"], list[int]]]:
    """Tokens with the normalisation of the recipe; only those with the encoder's own are shared with other
    protocols."""
    if recipe.std == "encoder":
        yield from features.tokens(split, recipe.image_size).batches(order, _AT_ONCE)
        return
    images = features.data.train if split == "train" else features.data.test
    order = range(len(images)) if order is None else order
    chosen = dataclasses.replace(images, samples=tuple(images.samples[place] for place in order))
    with _normalization(features.encoder, recipe):
        for encoded, positions in features.encode(
            chosen, recipe.image_size, "squash", _AT_ONCE, f"{split} tokens", norm=features.norm
        ):
            yield features.round(encoded.patches).float(), [order[position] for position in positions]


def _search(
    features: Features, recipe: MemoryRecipe, memory: PatchMemory, k: int
) -> Iterator[tuple[Float[Tensor, "B N K"], Int[Tensor, "B N K"], list[int]]]:
    done = 0
    for tokens, places in _batches(features, recipe, "test"):
        queries = F.normalize(tokens.flatten(0, 1), dim=1)
        sims, found = nearest(queries, memory.keys, k, dtype=memory.keys.dtype)
        done += len(places)
        features.progress("nearest patches", done, len(features.data.test))
        yield sims.view(*tokens.shape[:2], k), found.view(*tokens.shape[:2], k), places


@contextlib.contextmanager
def _normalization(encoder: Encoder, recipe: MemoryRecipe) -> Iterator[None]:
    """Within the block, the encoder has the normalisation of the recipe."""
    own = encoder.std
    if recipe.std == "hbird":
        encoder.set_normalization(encoder.mean, HBIRD_STD)
    try:
        yield
    finally:
        encoder.set_normalization(encoder.mean, own)


def _has_imagenet_std(encoder: Encoder) -> bool:
    return len(encoder.std) == 3 and np.allclose(encoder.std, IMAGENET_STD, atol=5e-4)
