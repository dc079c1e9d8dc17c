"""Off-grid patches: sampling of boxes, and cropping them from a whole batch at once.

The functions serve images ``(B, C, H, W)`` and signals ``(B, C, T)``. Sizes are in the order of the tensor, ``(H, W)``
or ``(T,)``; boxes have x first, as everywhere: ``(x0, y0, x1, y1)``, or ``(t0, t1)``; pixel edges are whole numbers.
Letters: B images, C channels, N patches, A axes (2 or 1), E = 2*A numbers per box, S extent of an axis, P patch side.

Source of the distributions: Ayoughi et al., PART, arXiv:2506.03682, and its released code (modes v1, v2 and v3). That
code samples from a bank of boxes drawn beforehand; here the same distribution is sampled directly.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from smalti.errors import ConfigError
from smalti.functional.random import sample_uniform
from smalti.functional.transfer import move

KINDS = ("grid", "offgrid", "offgrid_scale", "nonoverlapping", "saliency", "hierarchical")
"""Ways to draw boxes, see :class:`PatchSampler`."""
SIZE_DISTRIBUTIONS = ("official", "uniform", "log_uniform")
NUM_WHOLES = 4
"""Number of large boxes of ``hierarchical``, which are the first of the N patches."""
UNIFORM_RATIO = 0.2
"""``saliency``: fraction of patches that are sampled uniformly."""
MOST_SEPARATE = 0.35
"""Fraction of the image that non-overlapping patches may cover: placed one by one at random, they jam at 0.56."""
_IN_CACHE = 625_000  # image values that a CPU samples at a time: 2.5 MB stay in its cache
_DARTS = 128  # tries per non-overlapping patch
_POSITION, _SIZE, _ORDER, _CHOICE, _ANGLE = range(16, 21)  # random streams of a sample


class Patches(NamedTuple):
    """Patches of a batch, their boxes and angles."""

    pixels: Tensor
    """``(B, N, C, ph, pw)``, or ``(B, N, C, P)`` of signals."""
    boxes: Tensor
    """``(B, N, E)`` float32; for a rotated patch, the box before rotation about its centre."""
    angles: Tensor | None
    """``(B, N)`` radians, from x to y (clockwise on the screen); None without rotation."""


def grid_boxes(size: tuple[int, ...], patch_size: tuple[int, ...]) -> Float[Tensor, "N E"]:
    """The cells of the patch grid in raster order; incomplete cells at the end are omitted."""
    starts = torch.cartesian_prod(
        *(torch.arange(0, s - p + 1, p) for s, p in zip(size, patch_size, strict=True))
    ).reshape(-1, len(size))
    return _boxes(starts.flip(1).float(), torch.tensor(patch_size[::-1]).float())


def offgrid_boxes(
    keys: Int[Tensor, " B"],
    num_patches: int,
    size: tuple[int, ...],
    patch_size: tuple[int, ...],
    *,
    subpixel: bool = False,
    margin: int = 0,
) -> Float[Tensor, "B N E"]:
    """Independent patches of one size at any position: starts uniform over 0, 1, ..., S - P.

    Args:
        keys: ``(B,)`` seeds of the samples.
        num_patches: N.
        size: of the image, ``(H, W)`` or ``(T,)``.
        patch_size: ``(ph, pw)`` or ``(P,)``.
        subpixel: starts are real numbers in [0, S - P).
        margin: pixels left free at every border.

    Raises:
        ConfigError: if a patch with its margin is larger than the image.
    """
    draws = _draws(keys, num_patches, len(size), _POSITION)
    room = []
    for extent, side in zip(size[::-1], patch_size[::-1], strict=True):
        if extent < side + 2 * margin:
            raise ConfigError(f"a patch of {side} pixels with a margin of {margin} does not fit into {extent} pixels")
        room.append(extent - side - 2 * margin)
    free = move(torch.tensor(room, dtype=torch.float64), keys.device)
    starts = (draws * free if subpixel else (draws * (free + 1)).floor()) + margin
    return _boxes(starts.float(), move(torch.tensor(patch_size[::-1]).float(), keys.device))


def side_distribution(extent: int, low: int, high: int, distribution: str = "official") -> Float[Tensor, " n"]:
    """Probabilities of the sides low, low + 1, ..., high of a box along an axis of ``extent`` pixels.

    ``official``: proportional to ``extent - d``, the distribution of the distance of two uniform pixels given that it
    lies in the range; ``uniform``; ``log_uniform``: the integer part of ``exp(U(log low, log(high + 1)))``.

    Raises:
        ConfigError: if the range holds no side that fits, or the distribution is unknown.
    """
    most = extent - 1 if distribution == "official" else extent
    if not 1 <= low <= high <= most:
        raise ConfigError(
            f"sides {low}..{high} of a box in {extent} pixels: 1 <= smallest <= largest <= {most} is needed"
        )
    sides = torch.arange(low, high + 1, dtype=torch.float64)
    if distribution == "official":
        weights = extent - sides
    elif distribution == "uniform":
        weights = torch.ones_like(sides)
    elif distribution == "log_uniform":
        weights = torch.log1p(1 / sides)
    else:
        raise ConfigError(f"size_distribution={distribution!r}: one of {', '.join(SIZE_DISTRIBUTIONS)} is needed")
    return weights / weights.sum()


def scaled_boxes(
    keys: Int[Tensor, " B"],
    num_patches: int,
    size: tuple[int, ...],
    sides: tuple[int, int],
    *,
    distribution: str = "official",
    aspect: bool = True,
    subpixel: bool = False,
) -> Float[Tensor, "B N E"]:
    """Boxes of random sides at any position.

    With ``official``, starts are uniform over 0, ..., S - 1 - d, so that the last row and column are never seen, as in
    the released code; otherwise over 0, ..., S - d.

    Args:
        keys: ``(B,)`` seeds of the samples.
        num_patches: N.
        size: of the image, ``(H, W)`` or ``(T,)``.
        sides: smallest and largest side in pixels, whole numbers.
        distribution: of the sides, see :func:`side_distribution`.
        aspect: width and height are independent; otherwise boxes are square, with the shorter axis's distribution.
        subpixel: starts are real numbers; sides stay whole.

    Raises:
        ConfigError: if the range of sides does not fit.
    """
    axes, device = len(size), keys.device
    draws = _draws(keys, num_patches, axes, _SIZE)
    extents = size[::-1]
    lengths = []
    for axis in range(axes):
        extent = extents[axis] if aspect else min(extents)
        cumulative = move(side_distribution(extent, *sides, distribution).cumsum(0), device)
        draw = draws[..., axis if aspect else 0].contiguous()
        lengths.append(torch.searchsorted(cumulative, draw, right=True).clamp(max=sides[1] - sides[0]) + sides[0])
    side = torch.stack(lengths, dim=-1).double()  # (B, N, A)
    draws = _draws(keys, num_patches, axes, _POSITION)
    room = move(torch.tensor(extents, dtype=torch.float64), device) - side - (1 if distribution == "official" else 0)
    starts = draws * room if subpixel else (draws * (room + 1)).floor()
    return _boxes(starts.float(), side.float())


def separate_boxes(
    keys: Int[Tensor, " B"],
    num_patches: int,
    size: tuple[int, ...],
    patch_size: tuple[int, ...],
    *,
    subpixel: bool = False,
) -> Float[Tensor, "B N E"]:
    """Non-overlapping patches, placed one after the other, each at the first free one of 128 random positions.

    If none is free, the position farthest from its neighbours is taken, so a crowded image may hold a small overlap.
    Costs ``128 * N**2`` comparisons per image.

    Raises:
        ConfigError: if the patches would cover more than :data:`MOST_SEPARATE` of the image.
    """
    most = int(MOST_SEPARATE * math.prod(size) / math.prod(patch_size))
    if num_patches > most:
        raise ConfigError(
            f"sampling=nonoverlapping: {num_patches} patches don't fit into {size} pixels; at most {most} do"
        )
    darts = offgrid_boxes(keys, num_patches * _DARTS, size, patch_size, subpixel=subpixel)
    starts = darts[..., : len(size)].reshape(len(keys), num_patches, _DARTS, len(size))
    side = move(torch.tensor(patch_size[::-1]).float(), keys.device)
    chosen = starts[:, :1, 0]  # (B, n, A)
    for number in range(1, num_patches):
        apart = ((starts[:, number, :, None] - chosen[:, None]).abs() / side).amax(-1).amin(-1)  # (B, 128), 1: touching
        free = apart >= 1
        place = torch.where(free.any(1), free.int().argmax(1), apart.argmax(1))
        taken = starts[:, number].gather(1, place[:, None, None].expand(-1, 1, len(size)))
        chosen = torch.cat([chosen, taken], dim=1)
    return _boxes(chosen, side)


def salient_boxes(
    keys: Int[Tensor, " B"],
    num_patches: int,
    images: Float[Tensor, "B C *S"],
    patch_size: tuple[int, ...],
    uniform_ratio: float = UNIFORM_RATIO,
) -> Float[Tensor, "B N E"]:
    """Salient patches: the probability of a position is proportional to the gradient energy inside the patch.

    Args:
        keys: ``(B,)`` seeds of the samples.
        num_patches: N.
        images: normalised.
        patch_size: ``(ph, pw)`` or ``(P,)``.
        uniform_ratio: probability that a patch is sampled uniformly instead, in [0, 1].
    """
    axes = images.ndim - 2
    last = images.movedim(1, -1).float().contiguous()  # (B, *S, C)
    under = last.new_zeros(last.shape[:-1], dtype=torch.float64)
    for dim in range(1, axes + 1):
        under.narrow(dim, 0, last.shape[dim] - 1).add_(last.diff(dim=dim).square_().mean(-1))
    for dim, side in enumerate(patch_size, start=1):  # sum inside every patch, from cumulative sums
        sums = under.cumsum(dim)
        rest = sums.narrow(dim, side - 1, sums.shape[dim] - side + 1).clone()
        rest.narrow(dim, 1, rest.shape[dim] - 1).sub_(sums.narrow(dim, 0, rest.shape[dim] - 1))
        under = rest.clamp_(min=0)
    places = under.shape[1:]
    flat = under.flatten(1)
    flat = flat + (flat.amax(1, keepdim=True) * 1e-9).clamp(min=1e-30)  # a blank image is sampled uniformly
    cumulative = flat.cumsum(1)
    draw = sample_uniform(keys, num_patches, _CHOICE).double() * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, draw, right=True).clamp(max=flat.shape[1] - 1)
    starts = [index % places[-1]] if axes == 1 else [index % places[-1], index // places[-1]]  # x, y
    uniform = offgrid_boxes(keys, num_patches, tuple(images.shape[2:]), patch_size)
    take = sample_uniform(keys, num_patches, _ORDER) < uniform_ratio
    by_energy = _boxes(torch.stack(starts, dim=-1).float(), move(torch.tensor(patch_size[::-1]).float(), images.device))
    return torch.where(take[..., None], uniform, by_energy)


def nested_boxes(
    keys: Int[Tensor, " B"],
    num_patches: int,
    size: tuple[int, ...],
    patch_size: tuple[int, ...],
    num_wholes: int,
    sides: tuple[int, int],
) -> Float[Tensor, "B N E"]:
    """A few large boxes (wholes) first, then patches inside them (parts), which are dealt out to the wholes in turn.

    Args:
        keys: ``(B,)`` seeds of the samples.
        num_patches: N, wholes and parts together.
        size: of the image.
        patch_size: of a part.
        num_wholes: number of wholes among the N, 1..N-1.
        sides: smallest and largest side of a whole, which is square.

    Raises:
        ConfigError: if a whole is smaller than a part or larger than the image, or there is no part.
    """
    if not 1 <= num_wholes < num_patches:
        raise ConfigError(f"{num_wholes} wholes of {num_patches} patches: at least one whole and one part are needed")
    if sides[0] < max(patch_size):
        raise ConfigError(f"wholes of {sides[0]} pixels are smaller than their parts of {max(patch_size)}")
    wholes = scaled_boxes(keys, num_wholes, size, sides, distribution="uniform", aspect=False)
    count, axes = num_patches - num_wholes, len(size)
    home = wholes[:, torch.arange(count, device=keys.device) % num_wholes]  # (B, n, E)
    side = move(torch.tensor(patch_size[::-1]).float(), keys.device)
    room = home[..., axes:] - home[..., :axes] - side
    parts = home[..., :axes] + (_draws(keys, count, axes, _CHOICE) * (room + 1)).floor().float()
    return torch.cat([wholes, _boxes(parts, side)], dim=1)


def cut_windows(
    images: Float[Tensor, "B C *S"], starts: Float[Tensor, "B N A"], window: tuple[int, ...]
) -> Float[Tensor, "B N C *P"]:
    """Copies of the pixels under windows of one size at whole-pixel starts.

    Args:
        images: of any memory layout; channels-last is fastest, and the result is channels-last.
        starts: ``(B, N, A)`` whole numbers, x first, inside the image.
        window: ``(h, w)`` or ``(n,)`` pixels.
    """
    last = images.movedim(1, -1).contiguous()  # (B, *S, C): a row of a window is contiguous
    sizes, strides = last.shape[1:-1], last.stride()
    channels = last.shape[-1]
    places = [s - w + 1 for s, w in zip(sizes, window, strict=True)]
    # every window as a view: (B, places..., rows..., w * C)
    view = last.as_strided(
        (len(last), *places, *window[:-1], window[-1] * channels), (*strides[:-1], *strides[1:-2], 1)
    )
    rows = torch.arange(len(last), device=images.device)[:, None]
    cut = view[(rows, *starts.long().flip(-1).unbind(-1))]
    return cut.reshape(*cut.shape[:-1], window[-1], channels).movedim(-1, 2)


def resample_boxes(
    images: Float[Tensor, "B C *S"],
    boxes: Float[Tensor, "B N E"],
    patch_size: tuple[int, ...],
    *,
    max_side: int,
    angles: Float[Tensor, "B N"] | None = None,
    mode: str = "bilinear",
    square: bool = False,
) -> Float[Tensor, "B N C *P"]:
    """Crop boxes of any size and position and resize them to the patch size, without a loop over boxes.

    Bilinear with antialiasing: where a box is not larger than the patch, the filter is a triangle of half-width
    1 pixel; where it shrinks, of 2, 4, ... pixels, the power of two nearest (in logarithm) to the shrink factor, per
    axis. The wider filters come from blurring the image with (1/4, 1/2, 1/4) over growing distances: bilinear sampling
    of the blurred image is exactly the wider triangle. Half a pixel beyond a box contributes; the image's edge is
    repeated.

    Args:
        images: ``(B, C, H, W)`` or ``(B, C, T)``.
        boxes: ``(B, N, E)`` inside the images.
        patch_size: ``(ph, pw)`` or ``(P,)``.
        max_side: the largest side of a box in pixels; determines the number of blurred images.
        angles: ``(B, N)`` radians; each box is rotated about its centre, from x to y. Images only.
        mode: ``bilinear``, or ``nearest`` without antialiasing.
        square: every box shrinks by the same factor along x and y, so fewer blurred images are needed.

    Returns:
        ``(B, N, C, ph, pw)``, or ``(B, N, C, P)``.
    """
    if images.ndim == 3:  # treat a signal as an image of one row
        start, end = boxes.unbind(-1)
        flat = torch.stack([start, torch.zeros_like(start), end, torch.ones_like(end)], dim=-1)
        sampled = resample_boxes(images[:, :, None], flat, (1, patch_size[0]), max_side=max_side, mode=mode)
        return sampled.squeeze(-2)
    batch, channels, height, width = images.shape
    num_patches, (ph, pw) = boxes.shape[1], patch_size
    num_levels = _num_levels(max_side, pw, width), _num_levels(max_side, ph, height)
    if mode != "bilinear":
        num_levels = 1, 1
    count = num_levels[0] if square else num_levels[0] * num_levels[1]
    start, end = boxes[..., :2].float(), boxes[..., 2:].float()
    centre, side = (start + end) / 2, end - start
    across = ((torch.arange(pw, device=boxes.device) + 0.5) / pw - 0.5) * side[..., :1]  # (B, N, pw) from the centre
    down = ((torch.arange(ph, device=boxes.device) + 0.5) / ph - 0.5) * side[..., 1:]
    if angles is None:
        x, y = (centre[..., :1] + across)[..., None, :], (centre[..., 1:] + down)[..., None]
    else:
        cos, sin = angles.cos()[..., None, None], angles.sin()[..., None, None]
        x = centre[..., 0, None, None] + cos * across[..., None, :] - sin * down[..., None]
        y = centre[..., 1, None, None] + sin * across[..., None, :] + cos * down[..., None]
    y = y.clamp(0.5, height - 0.5)  # levels are stacked along y and must not mix
    if count > 1:
        limits = move(torch.tensor(num_levels), boxes.device) - 1.0
        level = (side / move(torch.tensor([pw, ph]), boxes.device)).log2().round().clamp(min=0).minimum(limits)
        place = level[..., 0] if square else level[..., 1] * num_levels[0] + level[..., 0]
        y = y + (place * height)[..., None, None]
    x, y = (x * (2 / width) - 1).expand(-1, -1, ph, pw), (y * (2 / (count * height)) - 1).expand(-1, -1, ph, pw)
    at_once = max(1, _IN_CACHE // (count * channels * height * width)) if images.device.type == "cpu" else batch
    at_once = min(at_once, batch)
    # allocate buffers once: fresh memory costs as much as the sampling
    grid = torch.empty(at_once, num_patches, ph, pw, 2, device=images.device)
    stack = torch.empty(at_once, count, height, width, channels, device=images.device) if count > 1 else None
    result = images.new_empty(batch, num_patches, channels, ph, pw)
    for first in range(0, batch, at_once):
        now = slice(first, min(first + at_once, batch))
        source = images[now].float()
        if stack is not None:
            source = _blurred(source, stack[: len(source)], num_levels[0], square)
        where = grid[: len(source)]
        where[..., 0], where[..., 1] = x[now], y[now]
        sampled = F.grid_sample(source, where.flatten(1, 2), mode=mode, padding_mode="border", align_corners=False)
        result[now] = sampled.view(len(source), channels, num_patches, ph, pw).transpose(1, 2)
    return result


def turn_patches(patches: Float[Tensor, "B N C P P"], quarters: Int[Tensor, "B N"]) -> Float[Tensor, "B N C P P"]:
    """Rotate square patches by multiples of 90 degrees, in the direction of :func:`resample_boxes`; exact."""
    turned = [torch.rot90(patches, k, (-1, -2)) for k in range(4)]
    result = patches
    for k in (1, 2, 3):
        result = torch.where((quarters % 4 == k)[..., None, None, None], turned[-k], result)
    return result


@dataclass(frozen=True)
class PatchSampler:
    """Samples and crops the patches of a batch.

    Raises:
        ConfigError: for settings that don't fit together.
    """

    patch_size: tuple[int, ...]
    """``(ph, pw)`` of images, ``(P,)`` of signals."""
    kind: str = "offgrid"
    """``grid``: the cells of the grid in random order; ``offgrid``: patches of one size at any position;
    ``offgrid_scale``: of random sides; ``nonoverlapping``: without overlap; ``saliency``: by gradient energy;
    ``hierarchical``: :data:`NUM_WHOLES` large boxes and patches inside them."""
    num_patches: int | None = None
    """N; None: as many as the grid has, or a third of that for ``nonoverlapping``."""
    subpixel: bool = False
    """Starts are real numbers."""
    sides: tuple[int, int] | None = None
    """Smallest and largest side: of ``offgrid_scale``, None takes half and twice the patch; of the large boxes of
    ``hierarchical``, None takes a quarter and half of the image."""
    size_distribution: str = "official"
    """Distribution of the sides of ``offgrid_scale``, see :func:`side_distribution`."""
    max_angle: float = 0.0
    """Largest rotation of a patch, in radians."""
    quarters: bool = False
    """Rotate by multiples of 90 degrees instead."""
    mode: str = "bilinear"
    """Interpolation, see :func:`resample_boxes`."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"sampling={self.kind!r}: one of {', '.join(KINDS)} is needed")
        if self.num_patches is not None and self.num_patches < 2:
            raise ConfigError(f"num_patches={self.num_patches}: at least 2 are needed")
        if self.subpixel and self.kind not in ("offgrid", "offgrid_scale", "nonoverlapping"):
            raise ConfigError(f"subpixel starts are for offgrid, offgrid_scale and nonoverlapping, not {self.kind}")
        is_turned = self.max_angle > 0 or self.quarters
        if is_turned and (self.kind != "offgrid" or len(set(self.patch_size)) > 1 or len(self.patch_size) != 2):
            raise ConfigError(f"rotation needs square patches and sampling=offgrid, not {self.kind} {self.patch_size}")
        if not 0 <= self.max_angle <= math.pi or (self.quarters and self.max_angle):
            raise ConfigError(f"max_angle={self.max_angle:g}: 0..pi is needed, and 0 with quarters")
        if self.mode not in ("bilinear", "nearest"):
            raise ConfigError(f"resample={self.mode!r}: one of bilinear, nearest is needed")

    @property
    def has_sizes(self) -> bool:
        """Whether boxes differ in size."""
        return self.kind in ("offgrid_scale", "hierarchical")

    def count(self, size: tuple[int, ...]) -> int:
        """N for images of this size."""
        if self.kind == "grid":
            return math.prod(s // p for s, p in zip(size, self.patch_size, strict=True))
        if self.num_patches is not None:
            return self.num_patches
        cells = math.prod(s // p for s, p in zip(size, self.patch_size, strict=True))
        return max(2, cells // 3) if self.kind == "nonoverlapping" else cells

    def largest_side(self, size: tuple[int, ...]) -> int:
        """The largest side that a box may have."""
        return self._sides(size)[1] if self.has_sizes else max(self.patch_size)

    def boxes(self, keys: Int[Tensor, " B"], images: Float[Tensor, "B C *S"]) -> Float[Tensor, "B N E"]:
        """Sample boxes; only ``saliency`` uses the pixels."""
        size, patch = tuple(images.shape[2:]), self.patch_size
        num_patches = self.count(size)
        if self.kind == "grid":
            boxes = move(grid_boxes(size, patch), images.device).expand(len(keys), -1, -1)
            order = sample_uniform(keys, num_patches, _ORDER).argsort(dim=1, stable=True)
            return boxes.gather(1, order[..., None].expand_as(boxes))
        if self.kind == "offgrid":
            return offgrid_boxes(keys, num_patches, size, patch, subpixel=self.subpixel, margin=self._margin())
        if self.kind == "offgrid_scale":
            return scaled_boxes(
                keys,
                num_patches,
                size,
                self._sides(size),
                distribution=self.size_distribution,
                subpixel=self.subpixel,
            )
        if self.kind == "nonoverlapping":
            return separate_boxes(keys, num_patches, size, patch, subpixel=self.subpixel)
        if self.kind == "saliency":
            return salient_boxes(keys, num_patches, images, patch)
        return nested_boxes(keys, num_patches, size, patch, NUM_WHOLES, self._sides(size))

    def angles(self, keys: Int[Tensor, " B"], num_patches: int) -> Float[Tensor, "B N"] | None:
        """Rotations of the patches in radians; None without rotation."""
        if not self.max_angle and not self.quarters:
            return None
        draws = sample_uniform(keys, num_patches, _ANGLE)
        return (draws * 4).floor() * (math.pi / 2) if self.quarters else (2 * draws - 1) * self.max_angle

    def cut(
        self, images: Float[Tensor, "B C *S"], boxes: Float[Tensor, "B N E"], angles: Float[Tensor, "B N"] | None = None
    ) -> Float[Tensor, "B N C *P"]:
        """Crop the boxes of :meth:`boxes`: copied where they lie on whole pixels, resampled where not."""
        size, patch, axes = tuple(images.shape[2:]), self.patch_size, images.ndim - 2
        if self.kind == "hierarchical":
            wholes = resample_boxes(
                images,
                boxes[:, :NUM_WHOLES],
                patch,
                max_side=self.largest_side(size),
                mode=self.mode,
                square=True,
            )
            return torch.cat([wholes, cut_windows(images, boxes[:, NUM_WHOLES:, :axes], patch)], dim=1)
        if self.has_sizes or self.subpixel or (angles is not None and not self.quarters):
            return resample_boxes(images, boxes, patch, max_side=self.largest_side(size), angles=angles, mode=self.mode)
        pixels = cut_windows(images, boxes[..., :axes], patch)
        return pixels if angles is None else turn_patches(pixels, (angles / (math.pi / 2)).round().long())

    def __call__(self, keys: Int[Tensor, " B"], images: Float[Tensor, "B C *S"]) -> Patches:
        """Sample boxes and crop them.

        Args:
            keys: ``(B,)`` seeds of the samples: equal keys give equal boxes.
            images: normalised, ``(B, C, H, W)`` or ``(B, C, T)``.
        """
        boxes = self.boxes(keys, images)
        angles = self.angles(keys, boxes.shape[1])
        return Patches(self.cut(images, boxes, angles), boxes, angles)

    def _sides(self, size: tuple[int, ...]) -> tuple[int, int]:
        if self.sides is not None:
            return self.sides
        if self.kind == "hierarchical":
            return max(max(self.patch_size), min(size) // 4), min(size) // 2
        return max(1, min(self.patch_size) // 2), min(2 * max(self.patch_size), min(size) - 1)

    def _margin(self) -> int:
        """How far a rotated patch reaches beyond its box; the same for all, so that positions don't reveal angles."""
        angle = min(self.max_angle, math.pi / 4)
        return math.ceil(self.patch_size[0] / 2 * (math.cos(angle) + math.sin(angle) - 1) - 1e-9)


def _draws(keys: Tensor, num_patches: int, axes: int, stream: int) -> Tensor:
    """``(B, N, A)`` uniform numbers; float64, so that a draw times S stays below S."""
    return sample_uniform(keys, num_patches * axes, stream).double().view(len(keys), num_patches, axes)


def _boxes(starts: Tensor, sides: Tensor) -> Tensor:
    return torch.cat([starts, starts + sides], dim=-1)


def _num_levels(max_side: int, side: int, extent: int) -> int:
    """Filter widths needed to resize boxes of up to ``max_side`` pixels to ``side``; 1 for an axis of one pixel."""
    return 1 + max(0, round(math.log2(max_side / side))) if extent > 1 else 1


def _blurred(
    images: Float[Tensor, "B C H W"], stack: Float[Tensor, "B L H W C"], num_x: int, square: bool
) -> Float[Tensor, "B C LH W"]:
    """Images blurred for filters of 1, 2, 4, ... pixels along x and y, stacked along the height; x varies fastest.

    Args:
        images: ``(B, C, H, W)``.
        stack: output buffer.
        num_x: filter widths along x.
        square: one sequence of levels, equally wide in x and y.
    """
    stack[:, 0] = images.movedim(1, -1)
    for place in range(1, stack.shape[1]):
        if square:
            distance = 2 ** (place - 1)
            half = torch.empty_like(stack[:, place])
            _widen(stack[:, place - 1], half, 1, distance)
            _widen(half, stack[:, place], 2, distance)
        else:
            y, x = divmod(place, num_x)
            source, dim, level = (place - 1, 2, x) if x else (place - num_x, 1, y)
            _widen(stack[:, source], stack[:, place], dim, 2 ** (level - 1))
    return stack.flatten(1, 2).movedim(-1, 1)


def _widen(source: Tensor, target: Tensor, dim: int, distance: int) -> None:
    """Blur with (1/4, 1/2, 1/4) over ``distance`` pixels: doubles the filter width of bilinear sampling."""
    extent = source.shape[dim]
    beyond = min(distance, extent)
    torch.mul(source, 0.5, out=target)
    for start, edge in ((0, 0), (extent - beyond, extent - 1)):
        if beyond < extent:
            inner = beyond if start == 0 else 0
            target.narrow(dim, inner, extent - beyond).add_(
                source.narrow(dim, beyond - inner, extent - beyond), alpha=0.25
            )
        target.narrow(dim, start, beyond).add_(source.narrow(dim, edge, 1), alpha=0.25)  # the edge is repeated
