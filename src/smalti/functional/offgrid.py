"""Patches off the grid: where they are drawn, and how they are cut out, those of a whole batch at once.

One code serves images ``(B, C, H, W)`` and signals ``(B, C, T)``. Sizes are in the order of the tensor, ``(H, W)`` or
``(T,)``; boxes have x first, as everywhere: ``(x0, y0, x1, y1)``, or ``(t0, t1)``; pixel edges are whole numbers.
Letters: B images, C channels, N patches, A axes (2 or 1), E = 2*A numbers a box, S extent of an axis, P patch side.

Source of the laws: Ayoughi et al., PART, arXiv:2506.03682, and its released code (there called v1, v2 and v3). Where
that draws boxes beforehand into a bank, the same law is drawn here directly.
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
MOST_SEPARATE = 0.35
"""Share of the image that patches which don't overlap may cover: dropped one by one at random, they jam at 0.56."""
_IN_CACHE = 625_000  # numbers of the images that a CPU samples at a time: 2.5 MB stay in its cache
_DARTS = 128  # tries for each patch that must not overlap
_POSITION, _SIZE, _ORDER, _CHOICE, _ANGLE = range(16, 21)  # streams of a sample's random numbers


class Patches(NamedTuple):
    """Patches of a batch and where they come from."""

    pixels: Tensor
    """``(B, N, C, ph, pw)``, or ``(B, N, C, P)`` of signals."""
    boxes: Tensor
    """``(B, N, E)`` float32; of a turned patch, before it was turned about its centre."""
    angles: Tensor | None
    """``(B, N)`` radians, from x to y (clockwise on the screen); None where nothing is turned."""


def grid_boxes(size: tuple[int, ...], patch_size: tuple[int, ...]) -> Float[Tensor, "N E"]:
    """The cells of the patch grid in raster order; a rest at the far end that holds no whole patch is left out."""
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
    """Patches of one size anywhere, independent of one another: starts uniform over 0, 1, ..., S - P.

    Args:
        keys: ``(B,)`` the samples' randomness.
        num_patches: N, any number.
        size: of the image, ``(H, W)`` or ``(T,)``.
        patch_size: ``(ph, pw)`` or ``(P,)``.
        subpixel: starts are real numbers in [0, S - P).
        margin: pixels kept free at every border.

    Raises:
        ConfigError: if a patch with its margins is larger than the image.
    """
    draws = _draws(keys, num_patches, len(size), _POSITION)
    room = []
    for extent, side in zip(size[::-1], patch_size[::-1], strict=True):
        if extent < side + 2 * margin:
            raise ConfigError(f"a patch of {side} with a margin of {margin} does not fit into {extent} pixels")
        room.append(extent - side - 2 * margin)
    free = move(torch.tensor(room, dtype=torch.float64), keys.device)
    starts = (draws * free if subpixel else (draws * (free + 1)).floor()) + margin
    return _boxes(starts.float(), move(torch.tensor(patch_size[::-1]).float(), keys.device))


def side_distribution(extent: int, low: int, high: int, law: str = "official") -> Float[Tensor, " n"]:
    """Probabilities of the sides low, low + 1, ..., high of a box along an axis of ``extent`` pixels.

    ``official``: proportional to ``extent - d``, as of the distance of two uniform pixels that is kept when it lies in
    the range; ``uniform``; ``log_uniform``: of the whole part of ``exp(U(log low, log(high + 1)))``.

    Raises:
        ConfigError: if the range holds no side that fits, or the law is unknown.
    """
    most = extent - 1 if law == "official" else extent
    if not 1 <= low <= high <= most:
        raise ConfigError(f"sides {low}..{high} of a box in {extent} pixels: 1 <= smallest <= largest <= {most} needed")
    sides = torch.arange(low, high + 1, dtype=torch.float64)
    if law == "official":
        weights = extent - sides
    elif law == "uniform":
        weights = torch.ones_like(sides)
    elif law == "log_uniform":
        weights = torch.log1p(1 / sides)
    else:
        raise ConfigError(f"size_distribution={law!r}: one of {', '.join(SIZE_DISTRIBUTIONS)} is needed")
    return weights / weights.sum()


def scaled_boxes(
    keys: Int[Tensor, " B"],
    num_patches: int,
    size: tuple[int, ...],
    sides: tuple[int, int],
    *,
    law: str = "official",
    aspect: bool = True,
    subpixel: bool = False,
) -> Float[Tensor, "B N E"]:
    """Boxes of random sides anywhere.

    Under the official law a start is uniform over 0, ..., S - 1 - d, so that the last row and column are never seen,
    as in the released code; under the others over 0, ..., S - d.

    Args:
        keys: ``(B,)`` the samples' randomness.
        num_patches: N.
        size: of the image, ``(H, W)`` or ``(T,)``.
        sides: smallest and largest side in pixels, whole numbers.
        law: of the sides, see :func:`side_distribution`.
        aspect: width and height are independent; otherwise boxes are square, by the law of the shorter axis.
        subpixel: starts are real numbers; sides stay whole.

    Raises:
        ConfigError: if the range of sides does not fit.
    """
    axes, device = len(size), keys.device
    draws = _draws(keys, num_patches, axes, _SIZE)
    extents = size[::-1]
    lengths = []
    for axis in range(axes):
        cumulative = move(side_distribution(extents[axis] if aspect else min(extents), *sides, law).cumsum(0), device)
        draw = draws[..., axis if aspect else 0].contiguous()
        lengths.append(torch.searchsorted(cumulative, draw, right=True).clamp(max=sides[1] - sides[0]) + sides[0])
    side = torch.stack(lengths, dim=-1).double()  # (B, N, A)
    draws = _draws(keys, num_patches, axes, _POSITION)
    room = move(torch.tensor(extents, dtype=torch.float64), device) - side - (1 if law == "official" else 0)
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
    """Patches that do not overlap: dropped one after the other, each at the first of 128 places that is free.

    Where none is, the place with the most room is taken, so a crowded image may hold a small overlap. Costs
    ``128 * N**2`` comparisons an image.

    Raises:
        ConfigError: if the patches would cover more than :data:`MOST_SEPARATE` of the image.
    """
    most = int(MOST_SEPARATE * math.prod(size) / math.prod(patch_size))
    if num_patches > most:
        raise ConfigError(f"{num_patches} patches that don't overlap are too many for {size}; at most {most} fit well")
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
    uniform_ratio: float = 0.2,
) -> Float[Tensor, "B N E"]:
    """Patches where something happens: the chance of a place grows with the gradient energy under the patch.

    Args:
        keys: ``(B,)`` the samples' randomness.
        num_patches: N.
        images: normalised.
        patch_size: ``(ph, pw)`` or ``(P,)``.
        uniform_ratio: chance that a patch is drawn uniformly instead, in [0, 1].
    """
    axes = images.ndim - 2
    last = images.movedim(1, -1).float().contiguous()  # (B, *S, C)
    under = last.new_zeros(last.shape[:-1], dtype=torch.float64)
    for dim in range(1, axes + 1):
        under.narrow(dim, 0, last.shape[dim] - 1).add_(last.diff(dim=dim).square_().mean(-1))
    for dim, side in enumerate(patch_size, start=1):  # sums under every patch, from running sums
        sums = under.cumsum(dim)
        rest = sums.narrow(dim, side - 1, sums.shape[dim] - side + 1).clone()
        rest.narrow(dim, 1, rest.shape[dim] - 1).sub_(sums.narrow(dim, 0, rest.shape[dim] - 1))
        under = rest.clamp_(min=0)
    places = under.shape[1:]
    flat = under.flatten(1)
    flat = flat + (flat.amax(1, keepdim=True) * 1e-9).clamp(min=1e-30)  # a blank image is drawn uniformly
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
    """A few large boxes, and patches inside them: wholes first, then parts, which take turns among the wholes.

    Args:
        keys: ``(B,)`` the samples' randomness.
        num_patches: N, wholes and parts together.
        size: of the image.
        patch_size: of a part.
        num_wholes: how many of the N are wholes, 1..N-1.
        sides: smallest and largest side of a whole, which is square.

    Raises:
        ConfigError: if a whole is smaller than a part or larger than the image, or there is no part.
    """
    if not 1 <= num_wholes < num_patches:
        raise ConfigError(f"{num_wholes} wholes of {num_patches} patches: at least one whole and one part are needed")
    if sides[0] < max(patch_size):
        raise ConfigError(f"wholes of {sides[0]} pixels are smaller than their parts of {max(patch_size)}")
    wholes = scaled_boxes(keys, num_wholes, size, sides, law="uniform", aspect=False)
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
        images: of any memory layout; channels-last is copied fastest, and the result has it, too.
        starts: ``(B, N, A)`` whole numbers, x first, inside the image.
        window: ``(h, w)`` or ``(n,)`` pixels.
    """
    last = images.movedim(1, -1).contiguous()  # (B, *S, C): a row of a window is one piece of memory
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
    """What lies in boxes of any size and place, resized to the patch size, without a loop over boxes.

    Bilinear, that is with a tent of one pixel's half-width where a box is not larger than the patch; where it shrinks,
    with tents of 2, 4, ... pixels, the power of two nearest (in logarithm) to how much it shrinks, each axis on its
    own. The wider tents come from blurring the image with (1/4, 1/2, 1/4) over growing distances before it is sampled:
    bilinear sampling of that is exactly the wider tent. Half a pixel beyond a box is seen, the image's edge is
    repeated.

    Args:
        images: ``(B, C, H, W)`` or ``(B, C, T)``.
        boxes: ``(B, N, E)`` inside the images.
        patch_size: ``(ph, pw)`` or ``(P,)``.
        max_side: the largest side of a box in pixels; says how many blurred images are needed.
        angles: ``(B, N)`` radians; each box is turned about its centre, from x to y. Only for images.
        mode: ``bilinear``; ``nearest`` and ``bicubic`` sample the image as it is, without antialiasing.
        square: every box shrinks as much along x as along y, so fewer blurred images are needed.

    Returns:
        ``(B, N, C, ph, pw)``, or ``(B, N, C, P)``.
    """
    if images.ndim == 3:  # a signal is an image of one row
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
    # buffers are taken once: fresh memory costs as much as the sampling
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
    """Square patches turned by quarters of a circle, as :func:`resample_boxes` turns by angles; no pixel changes."""
    turned = [torch.rot90(patches, k, (-1, -2)) for k in range(4)]
    result = patches
    for k in (1, 2, 3):
        result = torch.where((quarters % 4 == k)[..., None, None, None], turned[-k], result)
    return result


@dataclass(frozen=True)
class PatchSampler:
    """Draws the patches of a batch; what a method's settings say in one object.

    Raises:
        ConfigError: for settings that don't fit together.
    """

    patch_size: tuple[int, ...]
    """``(ph, pw)`` of images, ``(P,)`` of signals."""
    kind: str = "offgrid"
    """``grid``: the cells of the grid, ``offgrid``: patches of one size anywhere, ``offgrid_scale``: of random sides,
    ``nonoverlapping``: anywhere but on each other, ``saliency``: where gradients are, ``hierarchical``: wholes and
    their parts."""
    num_patches: int | None = None
    """N; None: as many as the grid has, or a third of that for ``nonoverlapping``."""
    shuffle: bool = True
    """``grid``: cells in random order."""
    subpixel: bool = False
    """Starts are real numbers."""
    sides: tuple[int, int] | None = None
    """Smallest and largest side: of ``offgrid_scale``, None takes half and twice the patch; of the wholes of
    ``hierarchical``, None takes a quarter and half of the image."""
    size_distribution: str = "official"
    """Law of the sides of ``offgrid_scale``, see :func:`side_distribution`."""
    aspect: bool = True
    """``offgrid_scale``: width and height are independent."""
    num_wholes: int = 4
    """Large boxes of ``hierarchical``."""
    uniform_ratio: float = 0.2
    """``saliency``: share of patches that are drawn uniformly."""
    max_angle: float = 0.0
    """Largest angle by which a patch is turned, in radians."""
    quarters: bool = False
    """Turn by whole quarters of a circle instead."""
    mode: str = "bilinear"
    """How pixels are interpolated where they must be, see :func:`resample_boxes`."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"sampling={self.kind!r}: one of {', '.join(KINDS)} is needed")
        if self.num_patches is not None and self.num_patches < 2:
            raise ConfigError(f"num_patches={self.num_patches}: at least 2 are needed")
        if self.subpixel and self.kind not in ("offgrid", "offgrid_scale", "nonoverlapping"):
            raise ConfigError(f"subpixel starts are for offgrid, offgrid_scale and nonoverlapping, not {self.kind}")
        turned = self.max_angle > 0 or self.quarters
        if turned and (self.kind != "offgrid" or len(set(self.patch_size)) > 1 or len(self.patch_size) != 2):
            raise ConfigError(f"only square patches of sampling=offgrid are turned, not {self.kind} {self.patch_size}")
        if not 0 <= self.max_angle <= math.pi or (self.quarters and self.max_angle):
            raise ConfigError(f"max_angle={self.max_angle:g}: 0..pi is needed, and 0 where quarters are turned")
        if self.mode not in ("bilinear", "nearest", "bicubic"):
            raise ConfigError(f"resample={self.mode!r}: one of bilinear, nearest, bicubic is needed")

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
        """Where the patches are; only ``saliency`` looks into the images."""
        size, patch = tuple(images.shape[2:]), self.patch_size
        num_patches = self.count(size)
        if self.kind == "grid":
            boxes = move(grid_boxes(size, patch), images.device).expand(len(keys), -1, -1)
            if not self.shuffle:
                return boxes
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
                law=self.size_distribution,
                aspect=self.aspect,
                subpixel=self.subpixel,
            )
        if self.kind == "nonoverlapping":
            return separate_boxes(keys, num_patches, size, patch, subpixel=self.subpixel)
        if self.kind == "saliency":
            return salient_boxes(keys, num_patches, images, patch, self.uniform_ratio)
        return nested_boxes(keys, num_patches, size, patch, self.num_wholes, self._sides(size))

    def angles(self, keys: Int[Tensor, " B"], num_patches: int) -> Float[Tensor, "B N"] | None:
        """How the patches are turned, radians; None if they aren't."""
        if not self.max_angle and not self.quarters:
            return None
        draws = sample_uniform(keys, num_patches, _ANGLE)
        return (draws * 4).floor() * (math.pi / 2) if self.quarters else (2 * draws - 1) * self.max_angle

    def cut(
        self, images: Float[Tensor, "B C *S"], boxes: Float[Tensor, "B N E"], angles: Float[Tensor, "B N"] | None = None
    ) -> Float[Tensor, "B N C *P"]:
        """The pixels of boxes that :meth:`boxes` drew: copied where they can be, resampled where they must be."""
        size, patch, axes = tuple(images.shape[2:]), self.patch_size, images.ndim - 2
        if self.kind == "hierarchical":
            wholes = resample_boxes(
                images,
                boxes[:, : self.num_wholes],
                patch,
                max_side=self.largest_side(size),
                mode=self.mode,
                square=True,
            )
            return torch.cat([wholes, cut_windows(images, boxes[:, self.num_wholes :, :axes], patch)], dim=1)
        if self.has_sizes or self.subpixel or (angles is not None and not self.quarters):
            return resample_boxes(images, boxes, patch, max_side=self.largest_side(size), angles=angles, mode=self.mode)
        pixels = cut_windows(images, boxes[..., :axes], patch)
        return pixels if angles is None else turn_patches(pixels, (angles / (math.pi / 2)).round().long())

    def __call__(self, keys: Int[Tensor, " B"], images: Float[Tensor, "B C *S"]) -> Patches:
        """Draw and cut.

        Args:
            keys: ``(B,)`` the samples' randomness: equal keys draw equal boxes.
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
        """How far a patch reaches beyond its box when it is turned; the same for all, so that angles say nothing."""
        angle = min(self.max_angle, math.pi / 4)
        return math.ceil(self.patch_size[0] / 2 * (math.cos(angle) + math.sin(angle) - 1) - 1e-9)


def _draws(keys: Tensor, num_patches: int, axes: int, stream: int) -> Tensor:
    """``(B, N, A)`` uniform numbers; float64, so that times a number of pixels they stay below it."""
    return sample_uniform(keys, num_patches * axes, stream).double().view(len(keys), num_patches, axes)


def _boxes(starts: Tensor, sides: Tensor) -> Tensor:
    return torch.cat([starts, starts + sides], dim=-1)


def _num_levels(max_side: int, side: int, extent: int) -> int:
    """How many tents are needed for boxes of up to ``max_side`` pixels that become ``side``: an axis of one pixel has
    nothing to blur."""
    return 1 + max(0, round(math.log2(max_side / side))) if extent > 1 else 1


def _blurred(
    images: Float[Tensor, "B C H W"], stack: Float[Tensor, "B L H W C"], num_x: int, square: bool
) -> Float[Tensor, "B C LH W"]:
    """Images for tents of 1, 2, 4, ... pixels along x and y, one below the other: x runs faster.

    Args:
        images: ``(B, C, H, W)``.
        stack: is filled.
        num_x: tents along x.
        square: there is one run of levels, as wide in x as in y.
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
    """(1/4, 1/2, 1/4) over ``distance`` pixels: bilinear sampling of ``target`` has a tent twice as wide."""
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
