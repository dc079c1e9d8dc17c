"""Pictures of images, masks, boxes and patch tokens, as pages show them.

Letters: B images, N = h*w patches, K components kept.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import matplotlib
import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from smalti.data.images.decode import as_picture
from smalti.functional.colours import palette
from smalti.models.encoder import Encoder, eval_mode


@dataclass(frozen=True)
class ShownImages:
    """The images that a report shows, as the encoder and as a reader see them."""

    names: tuple[str, ...]
    """One per image, for captions."""
    inputs: tuple[np.ndarray, ...]
    """``(H, W, C)`` uint8 or float32 in 0..1, at the encoder's input size."""
    pictures: tuple[np.ndarray, ...]
    """``(H', W', 3)`` uint8 RGB: the same crop with more pixels, where the file has them."""


def crop_images(names: Sequence[str], images: Sequence[np.ndarray], size: tuple[int, int], view_px: int) -> ShownImages:
    """Centre crops of one shape.

    Args:
        names: for captions.
        images: ``(H, W, C)`` uint8 or float32 in 0..1, of any sizes.
        size: ``(height, width)`` in pixels that the encoder is given.
        view_px: the longer side of what is shown, in pixels; never more than the crop has, never less than ``size``.
    """
    inputs, pictures = [], []
    for image in images:
        crop = _centre(image, size[1] / size[0])
        inputs.append(_resize(crop, size))
        scale = max(1.0, min(view_px, max(crop.shape[:2])) / max(size))
        pictures.append(as_picture(_resize(crop, (round(size[0] * scale), round(size[1] * scale)))))
    return ShownImages(tuple(names), tuple(inputs), tuple(pictures))


@torch.inference_mode()
def patch_tokens(encoder: Encoder, inputs: Sequence[np.ndarray], batch_size: int = 8) -> tuple[Tensor, tuple[int, int]]:
    """Patch tokens of images of one size.

    Args:
        encoder: on any device; left in the mode in which it came.
        inputs: ``(H, W, C)`` arrays, uint8 or float32 in 0..1.
        batch_size: images at a time.

    Returns:
        ``(B, N, D)`` tokens on the CPU in float32, and the grid ``(h, w)``.
    """
    device = next(encoder.parameters()).device
    tokens, grid = [], (0, 0)
    with eval_mode(encoder):
        for start in range(0, len(inputs), batch_size):
            batch = torch.stack([to_input(image) for image in inputs[start : start + batch_size]])
            features = encoder.encode(encoder.normalize(batch.to(device)))
            tokens.append(features.patches.float().cpu())
            grid = features.grid
    return torch.cat(tokens), grid


def to_input(image: np.ndarray) -> Float[Tensor, "C H W"]:
    """An image ``(H, W, C)``, uint8 or float32 in 0..1, as a tensor in 0..1."""
    pixels = image.astype(np.float32) / 255 if image.dtype == np.uint8 else image.astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def pca_maps(coordinates: Float[Tensor, "B N K"], grid: tuple[int, int]) -> np.ndarray:
    """The first three principal components of all images' patches as red, green and blue.

    Args:
        coordinates: from :func:`reduce_patches`.
        grid: ``(h, w)`` of every image.

    Returns:
        ``(B, h, w, 3)`` uint8; each component runs from its 1st to its 99th percentile over all images.
    """
    first = coordinates.flatten(0, 1)[:, :3]
    low, high = (torch.quantile(first, q, dim=0) for q in (0.01, 0.99))
    spread = high - low
    scaled = ((first - low) / spread.clamp(min=1e-12)).clamp(0, 1)
    colours = torch.full((len(first), 3), 0.5)
    colours[:, : first.shape[1]] = torch.where(spread > 1e-12, scaled, 0.5)
    return (colours * 255).round().byte().view(len(coordinates), *grid, 3).numpy()


def image_uri(image: np.ndarray, ending: str = ".jpg") -> str:
    """An image ``(H, W, 3)`` uint8 RGB as a ``data:`` URI; ``.png`` is lossless."""
    options = [cv2.IMWRITE_JPEG_QUALITY, 82] if ending == ".jpg" else []
    _, data = cv2.imencode(ending, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)
    kind = {".jpg": "jpeg", ".png": "png"}[ending]
    return f"data:image/{kind};base64,{base64.b64encode(data.tobytes()).decode()}"


def overlay(picture: UInt8[np.ndarray, "H W 3"], classes: Int[np.ndarray, "M1 M2"]) -> UInt8[np.ndarray, "H W 3"]:
    """A grey picture with the colours of its classes on top and white lines between them.

    Args:
        picture: RGB.
        classes: of each pixel, by nearest pixel where the size differs; -1 is ignored and stays grey.
    """
    height, width = picture.shape[:2]
    rows, columns = (np.arange(side) * classes.shape[axis] // side for axis, side in enumerate((height, width)))
    classes = classes[rows[:, None], columns[None, :]]
    colours = palette(int(classes.max(initial=0)) + 1)
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)[..., None].astype(np.float32)
    known = (classes >= 0)[..., None]
    mixed = np.where(known, 0.3 * grey + 0.7 * colours[classes.clip(0)], 0.6 * grey + 100)
    edges = np.zeros(classes.shape, bool)
    edges[1:] |= classes[1:] != classes[:-1]
    edges[:, 1:] |= classes[:, 1:] != classes[:, :-1]
    mixed[edges] = 255
    return mixed.clip(0, 255).astype(np.uint8)


def boxes_picture(
    picture: UInt8[np.ndarray, "H W 3"], boxes: Float[np.ndarray, "n 4"], labels: Int[np.ndarray, " n"]
) -> UInt8[np.ndarray, "H2 W2 3"]:
    """A paler picture at twice the size, with a frame around each object in the colour of its class.

    Args:
        picture: RGB.
        boxes: x0 y0 x1 y1 as fractions of the picture's sides.
        labels: of each; class 0 has the palette's second colour, as the first is for backgrounds.
    """
    height, width = (2 * side for side in picture.shape[:2])
    pale = (0.65 * cv2.resize(picture, (width, height), interpolation=cv2.INTER_LINEAR) + 60).astype(np.uint8)
    colours = palette(int(labels.max(initial=0)) + 2)
    corners = (boxes.clip(0, 1) * np.array([width - 1, height - 1] * 2)).round().astype(int)
    for (x0, y0, x1, y1), label in zip(corners.tolist(), labels.tolist(), strict=True):
        for colour, thickness in (((20, 20, 20), 5), (tuple(colours[label + 1].tolist()), 3)):  # a rim on any picture
            cv2.rectangle(pale, (x0, y0), (x1, y1), colour, thickness)
    return pale


def similarity_picture(
    picture: UInt8[np.ndarray, "H W 3"], coordinates: Float[Tensor, "N K"], grid: tuple[int, int], query: int
) -> UInt8[np.ndarray, "H W 3"]:
    """Cosine similarity of each patch to one of them, from dark (0 or less) to pale (1), over the picture.

    Args:
        picture: RGB.
        coordinates: of the image's patches, from :func:`~smalti.functional.components.reduce_patches`.
        grid: ``(h, w)``.
        query: number of the patch, which gets a frame.
    """
    unit = torch.nn.functional.normalize(coordinates.float(), dim=-1)
    sims = (unit @ unit[query]).view(grid).clamp(0, 1).numpy()
    height, width = picture.shape[:2]
    heat = matplotlib.colormaps["magma"](sims)[..., :3] * 255
    heat = cv2.resize(heat.astype(np.float32), (width, height), interpolation=cv2.INTER_NEAREST)
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)[..., None]
    mixed = (0.2 * grey + 0.8 * heat).clip(0, 255).astype(np.uint8)
    return _framed(mixed, grid, query)


def _framed(picture: np.ndarray, grid: tuple[int, int], query: int) -> np.ndarray:
    down, across = divmod(query, grid[1])
    height, width = picture.shape[:2]
    top, bottom = (down * height // grid[0], (down + 1) * height // grid[0] - 1)
    left, right = (across * width // grid[1], (across + 1) * width // grid[1] - 1)
    cv2.rectangle(picture, (left, top), (right, bottom), (0, 0, 0), 4)
    cv2.rectangle(picture, (left, top), (right, bottom), (255, 255, 255), 2)
    return picture


def _centre(image: np.ndarray, aspect: float) -> np.ndarray:
    """The largest centred part of an image with ``width = aspect * height``."""
    height, width = image.shape[:2]
    crop_h = min(height, max(1, round(width / aspect)))
    crop_w = min(width, max(1, round(height * aspect)))
    top, left = (height - crop_h) // 2, (width - crop_w) // 2
    return image[top : top + crop_h, left : left + crop_w]


def _resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    is_smaller = size[0] < image.shape[0]
    interpolation = cv2.INTER_AREA if is_smaller else cv2.INTER_CUBIC
    planes = [
        cv2.resize(image[..., c], size[::-1], interpolation=interpolation) for c in range(image.shape[2])
    ]  # any number
    resized = np.stack(planes, axis=-1)
    return resized if resized.dtype == np.uint8 else resized.clip(0, 1)
