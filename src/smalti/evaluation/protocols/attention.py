"""Attention: its diversity over queries, its distance, whether the class token attends to objects, and pictures of it.

Source: normalised mutual information and distance: Park et al., "What do self-supervised vision transformers learn?",
arXiv:2305.00729v1, in the form of their code, with one epsilon of 1e-8 for both (theirs: 1e-32 for the
distance). Foreground: Caron et al., DINO, arXiv:2104.14294v2, Sec. 4.2.2, in the form of the code of Pariza et al.,
NeCo, arXiv:2408.11054.
Differs from the latter: void pixels are ignored and every class but the first is an object, unless ``parity``;
the mean is over the processed images (their code divides by all images, but its loader drops the last batch);
register tokens are excluded (their code treats them as patches).
Letters: n images, B of them in a batch, H heads, T tokens (prefix and patches), N = h*w patches, S side of the images.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from smalti.charts import layer_chart
from smalti.config import Count, CountFromZero, Ratio, settings
from smalti.data.images.decode import as_picture, image_size
from smalti.data.images.folders import ImageSet
from smalti.data.images.labelled import eval_batches, eval_image, eval_mask, read_mask
from smalti.errors import DataError
from smalti.evaluation.attention_pictures import attention_picture
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.context import spread
from smalti.evaluation.dense import ignored_value
from smalti.evaluation.features import Features, Observer
from smalti.evaluation.protocol import Scores, register_protocol
from smalti.evaluation.tally import tally_mean
from smalti.functional.attention import EPS, between_patches, foreground, keep_mass
from smalti.layers.attention import AnyAttention, attention_modules, attention_weights
from smalti.models.block_attention import block_attention
from smalti.models.encoder import Encoder

NAME = "attention"
NMI_UNIT = "normalised mutual information, 0: all queries attend equally, 1: each to its own key"
DISTANCE_UNIT = "pixels of the resized image"


def mutual_information(attention: Float[Tensor, "*B N N"]) -> Float[Tensor, "*B"]:
    """Normalised mutual information of queries and keys: 0 if all queries attend equally, 1 if each to its own key.

    Args:
        attention: ``(..., N, N)`` positive, rows sum to 1; queries are assumed to be equally likely.

    Returns:
        ``I(q; k) / sqrt(H(q) H(k))``, 0..1; 0 for a single patch.

    Source: Park et al., arXiv:2305.00729v1.
    """
    count = attention.shape[-1]
    of_keys = attention.mean(-2, keepdim=True)  # p(k)
    information = torch.xlogy(attention, attention / of_keys).sum((-2, -1)) / count
    entropy = torch.special.entr(of_keys).sum((-2, -1))
    scale = (entropy * float(np.log(count))).clamp(min=1e-12).sqrt()
    return (information / scale).clamp(0, 1)  # only rounding errors exceed this range


def attention_distance(attention: Float[Tensor, "*B N N"], distances: Float[Tensor, "N N"]) -> Float[Tensor, "*B"]:
    """Attention-weighted distance between queries and keys, mean over queries, in the unit of ``distances``.

    Source: Dosovitskiy et al., ViT, arXiv:2010.11929v2, Fig. 7; as :func:`mutual_information`.
    """
    # (..., N, N) -> (..., N) first: a single sum over all pairs loses four digits in float32
    return (attention * distances.to(attention)).sum(-1).mean(-1)


def patch_distances(grid: tuple[int, int], patch_size: tuple[int, int]) -> Float[Tensor, "N N"]:
    """Distances between the centres of patches in pixels."""
    rows, columns = torch.meshgrid(*(torch.arange(side, dtype=torch.float32) for side in grid), indexing="ij")
    centres = torch.stack([rows.flatten() * patch_size[0], columns.flatten() * patch_size[1]], dim=1)
    return torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist")


class AttentionObserver(Observer):
    """Collects summary statistics of each layer's attention, since all of it has T * T values per head and layer.

    Args:
        num_images: maximum number of images for attention between patches, evenly spaced.
    """

    def __init__(self, num_images: int) -> None:
        self._num_images = num_images

    @contextlib.contextmanager
    def watch(self, encoder: Encoder, size: int, images: ImageSet) -> Iterator[None]:
        """See :class:`~smalti.evaluation.features.Observer`.

        Raises:
            ConfigError: if the attention weights of a block can't be computed.
        """
        modules = attention_modules(encoder.vit.blocks, encoder.name)
        self.nmi: dict[int, Float[Tensor, "layers H"]] = {}
        """Index of a test image -> normalised mutual information."""
        self.distance: dict[int, Float[Tensor, "layers H"]] = {}
        """Index of a test image -> attention distance in pixels."""
        self.of_class_token: dict[int, Float[Tensor, "H N"]] = {}
        """Index of a test image -> attention of the class token to the patches in the last layer; only with masks."""
        self._first = 0  # index of the next image among the readable ones
        self._chosen = set(spread(len(images), self._num_images))
        self._waiting: dict[int, tuple[Tensor, Tensor]] = {}  # row of the batch -> statistics of the layers so far
        self._rows: Tensor | None = None
        self._num_prefix = encoder.num_prefix_tokens
        self._keeps_rows = encoder.has_class_token and _has_masks(images)
        self._distances = patch_distances(encoder.check_size(size, size), encoder.patch_size)
        hooks = [
            module.register_forward_pre_hook(
                lambda module, args, given, i=i: self._look(
                    module, args[0], given.get("attn_mask"), given.get("rope"), i == len(modules) - 1
                ),
                with_kwargs=True,
            )
            for i, module in enumerate(modules)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def saw(self, places: Sequence[int]) -> None:
        """See :class:`~smalti.evaluation.features.Observer`."""
        for row, place in enumerate(places):
            if row in self._waiting:
                nmi, distance = self._waiting[row]
                self.nmi[place], self.distance[place] = nmi, distance
            if self._rows is not None:
                self.of_class_token[place] = self._rows[row]
        self._first += len(places)
        self._waiting, self._rows = {}, None

    @torch.no_grad()
    def _look(self, module: nn.Module, tokens: Tensor, bias: Tensor | None, rope: Tensor | None, is_last: bool) -> None:
        assert isinstance(module, AnyAttention)
        for row in range(len(tokens)):
            if self._first + row not in self._chosen:
                continue
            # one image at a time: N * N values per head
            own = None if bias is None else bias[row : row + 1]
            weights = attention_weights(module, tokens[row : row + 1], bias=own, rope=rope)[0]
            between = between_patches(weights, self._num_prefix)
            numbers = mutual_information(between), attention_distance(between, self._distances)
            ours = tuple(one.cpu()[None] for one in numbers)
            before = self._waiting.get(row)
            nmi, distance = ours if before is None else (torch.cat(pair) for pair in zip(before, ours, strict=True))
            self._waiting[row] = nmi, distance
        if is_last and self._keeps_rows:
            rows = attention_weights(module, tokens, num_queries=1, rope=rope)
            self._rows = rows[:, :, 0, self._num_prefix :].cpu()


@dataclass(frozen=True)
class Foreground:
    """IoU of an image's attention with its objects; NaN if it has none."""

    merged: float
    best_head: float


def foreground_scores(
    attention: Float[Tensor, "H N"], mask: np.ndarray, grid: tuple[int, int], *, void: int, parity: bool
) -> Foreground:
    """IoU between the class token's attention and the objects of one image.

    ``merged``: heads averaged and blurred, patches with 60 % of the mass, without components of one or two patches; IoU
    with the union of all objects. ``best_head``: for each class, the best IoU over heads of the patches with 60 % of
    the mass; mean over classes.

    Args:
        attention: ``(H, N)`` attention of the class token to the patches.
        mask: ``(S, S)`` classes; 0 is the background.
        grid: ``(h, w)``, which divides S.
        void: value of pixels without a class.
        parity: as in the published code: void pixels are foreground; objects are the values in the mask except the
            first and the last, which count as background and void even if there are none.
    """
    scale = (mask.shape[0] // grid[0], mask.shape[1] // grid[1])
    merged = _pixels(foreground(attention[None], grid)[0], scale)
    heads = [_pixels(head.view(grid), scale) for head in keep_mass(attention)]
    values = np.unique(mask).tolist()
    if parity:
        counted, objects = np.ones_like(mask, dtype=bool), values[1:-1]
    else:
        counted, objects = mask != void, [value for value in values if value not in (0, void)]
    truth = mask != 0
    return Foreground(
        _iou(merged, truth, counted) if parity or objects else float("nan"),
        float(np.mean([max(_iou(head, mask == value, counted) for head in heads) for value in objects]))
        if objects
        else float("nan"),
    )


@settings
class AttentionConfig:
    """Settings of ``attention``."""

    num_images: Count = 64
    """Number of images to measure, spread evenly over the set."""
    parity: bool = False
    """Treat void pixels and objects as the published code does."""
    num_shown: CountFromZero = 4
    """Evaluated images whose attention in the last block is drawn."""
    queries: tuple[tuple[Ratio, Ratio], ...] = ((0.5, 0.5), (0.2, 0.2))
    """Patches whose attention is drawn, each by its place in the image: fractions of height and width. The same places
    for all encoders, so that their pictures can be compared."""


@register_protocol(
    NAME,
    need="images",
    prefers=("masks",),
    settings=AttentionConfig,
    observer=lambda own: AttentionObserver(own.num_images),
)
@torch.no_grad()
def attention(features: Features, config: EvalConfig) -> Scores:
    """Mutual information and distance of attention per layer; with masks, foreground IoU; needs no labels."""
    own: AttentionConfig = config.of("attention")
    size = features.dense_size(config.image_size) if config.preset == "small" else config.image_size or 448
    encoder, images = features.encoder, features.data.test
    grid = encoder.check_size(size, size)
    note = _why_no_foreground(features)
    seen = _observe_subset(features, size, own.num_images) if note else features.observed(NAME, size)
    assert isinstance(seen, AttentionObserver)
    places = sorted(seen.nmi)
    if not places:
        raise DataError(f"{images.root}: none of the {len(images)} {features.evaluated} can be read")
    nmi, distance = (torch.stack([of[place] for place in places]) for of in (seen.nmi, seen.distance))  # (n, layers, H)
    metrics: dict[str, float] = {}
    tallies = {}
    units: dict[str, str] = {}

    def add(name: str, values: np.ndarray, unit: str | None = None) -> None:
        tally = tallies[name] = tally_mean(values)
        metrics[name] = tally.score()
        if unit:
            units[name] = unit

    foreground: dict[int, Foreground] = {}
    if not note:
        void = ignored_value(len(features.data.classes))
        for place, rows in seen.of_class_token.items():
            mask = eval_mask(read_mask(images.samples[place], len(features.data.classes)), size)
            foreground[place] = foreground_scores(rows, mask, grid, void=void, parity=own.parity)
        for name, values in (
            ("foreground_iou", {place: one.merged for place, one in foreground.items()}),
            ("foreground_iou_best_head", {place: one.best_head for place, one in foreground.items()}),
        ):
            if np.isfinite(list(values.values())).any():
                add(name, _by_place(values, len(images)))
            else:
                note = "omitted: no evaluated image has an object"
    for name, layer in (("last", -1), ("mean", slice(None))):
        for quantity, numbers, unit in (("nmi", nmi, NMI_UNIT), ("distance_px", distance, DISTANCE_UNIT)):
            of_images = numbers[:, layer].flatten(1).mean(1).tolist()
            add(f"{quantity}_{name}", _by_place(dict(zip(places, of_images, strict=True)), len(images)), unit)
    settings: dict[str, Any] = {
        "preset": config.preset,
        "image_size": size,
        "resize": "to a square, aspect ratio ignored",
        "num_images": len(places),
        "chosen": f"spread evenly over the {features.evaluated}" if len(places) < len(images) else "all",
        "layers": encoder.depth,
        "num_prefix_tokens": encoder.num_prefix_tokens,
        "prefix": "removed from the attention, rows renormalised" if encoder.num_prefix_tokens else "none",
        "eps": EPS,
        "queries": [list(place) for place in own.queries],
        "foreground": note or ("void is foreground, objects as published" if own.parity else "void is ignored"),
        **({"background": features.data.classes[0], "num_with_foreground": _count(foreground)} if foreground else {}),
    }
    return Scores(
        metrics,
        settings,
        {},
        units=units,
        tallies=tallies,
        pictures=_pictures(features, size, own),
        charts={
            "nmi": layer_chart(
                "Mutual information of attention",
                "Normalised mutual information of queries and keys in each block, the first on the left: at 0 all "
                "patches attend to the same places, at 1 each to a place of its own.",
                nmi.mean((0, 2)).tolist(),
            ),
            "distance_px": layer_chart(
                "Attention distance",
                "Mean distance in pixels between a patch and the patches it attends to in each block, the first on "
                "the left: small values mean local attention.",
                distance.mean((0, 2)).tolist(),
            ),
        },
    )


def _pictures(features: Features, size: int, own: AttentionConfig) -> dict[str, np.ndarray]:
    """Caption -> attention of the class token and of the chosen patches in the last block, for a few images."""
    encoder, images = features.encoder, features.data.test
    grid = encoder.check_size(size, size)
    patches = [query_patch(place, grid) for place in own.queries]
    if not patches and not encoder.has_class_token:
        return {}
    chosen = spread(len(images), own.num_shown) if own.num_shown else ()
    subset = dataclasses.replace(images, samples=tuple(images.samples[place] for place in chosen))
    # one by one: all weights of a block
    batches = eval_batches(subset, size, encoder.in_chans, mode="squash", batch_size=1, num_workers=0)
    has_class = encoder.has_class_token
    rows = ["class token"] if has_class else []
    rows += [f"patch in row {patch // grid[1] + 1}, column {patch % grid[1] + 1}" for patch in patches]
    pictures = {}
    for pixels, positions, _ in batches:
        for position in positions:
            image = encoder.normalize(pixels.to(features.device))
            block = next(block_attention(encoder, image, [encoder.depth - 1]))
            queries = [0] * has_class + [has_class + patch for patch in patches]
            path = subset.samples[position].path
            caption = (
                f"{subset.names[position]}: attention in the last block. Rows: {'; '.join(rows)}. Columns: the image, "
                f"the mean over heads, heads 1 to {len(block)}. From dark (0) to pale (a map's largest weight), by the "
                "square root."
            )
            pictures[caption] = attention_picture(
                as_picture(eval_image(path, size, encoder.in_chans, "squash", subset.samples[position].pixels)),
                block[:, queries].cpu(),
                grid,
                [None] * has_class + list(patches),
                aspect=np.divide(*image_size(path)[::-1]),
            )
    return pictures


def query_patch(place: tuple[float, float], grid: tuple[int, int]) -> int:
    """Number of the patch at a place given as fractions of height and width."""
    row, column = (min(int(fraction * side), side - 1) for fraction, side in zip(place, grid, strict=True))
    return row * grid[1] + column


def _why_no_foreground(features: Features) -> str:
    """Why foreground scores are omitted; empty if there are masks and a class token."""
    if not features.encoder.has_class_token:
        return "omitted: the encoder has no class token"
    if not features.data.classes or not _has_masks(features.data.test):
        return "omitted: the images were opened without masks"
    return ""


def _has_masks(images: ImageSet) -> bool:
    return any(sample.mask is not None or sample.instances is not None for sample in images.samples)


def _observe_subset(features: Features, size: int, num_images: int) -> AttentionObserver:
    """Observe a subset of the images, if the others aren't needed."""
    images = features.data.test
    chosen = spread(len(images), num_images)
    subset = dataclasses.replace(images, samples=tuple(images.samples[place] for place in chosen))
    observer = AttentionObserver(num_images)
    with observer.watch(features.encoder, size, subset):
        for _, positions in features.encode(subset, size, "squash", features.batch_size, "attention"):
            observer.saw([chosen[position] for position in positions])
    return observer


def _pixels(patches: Bool[Tensor, "h w"], scale: tuple[int, int]) -> np.ndarray:
    return patches.numpy().repeat(scale[0], axis=0).repeat(scale[1], axis=1)


def _iou(pred: np.ndarray, truth: np.ndarray, counted: np.ndarray) -> float:
    union = ((pred | truth) & counted).sum()
    return float((pred & truth & counted).sum() / union) if union else 0.0


def _by_place(values: dict[int, float], number: int) -> np.ndarray:
    """``(n,)`` values by image index; NaN for images without a value."""
    row = np.full(number, np.nan)
    row[list(values)] = list(values.values())
    return row


def _count(foreground: dict[int, Foreground]) -> int:
    return sum(one.merged == one.merged for one in foreground.values())
