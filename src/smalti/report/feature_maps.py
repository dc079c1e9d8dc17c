"""Feature maps and the nearest-patch explorer of a run's page: patch tokens of a few images, computed now."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from smalti.data.images.folders import ImageSet, open_images
from smalti.data.images.pixels import trained_pixels
from smalti.errors import ConfigError, DataError
from smalti.evaluation.result import Baseline
from smalti.functional.components import reduce_patches
from smalti.models.encoder import Encoder
from smalti.report.attention_data import attention_data
from smalti.report.explorer import EXPLORER_DIMS, explorer_data, quantise
from smalti.report.parts import Picture, PictureBlock
from smalti.report.patch_pictures import ShownImages, image_uri, patch_tokens, pca_maps
from smalti.report.rundir import RunFiles

_SPLITS_SHOWN = ("val", "test", "train")


@dataclass(frozen=True)
class FeatureMaps:
    """Data of the two sections."""

    where: str
    """Where the images are from."""
    grid: tuple[int, int]
    patch_size: tuple[int, int]
    maps: tuple[PictureBlock, ...]
    uris: Mapping[str, str]
    """Name of an image -> ``data:`` URI."""
    explorer: Mapping[str, Any]
    """See :func:`smalti.report.explorer.explorer_data`; ``weights``: see
    :func:`smalti.report.attention_data.attention_data`, None without attention."""
    no_attention: str
    """Why there is no attention; empty if there is."""

    @property
    def aspect(self) -> str:
        """Width over height of the images, as CSS writes it."""
        return f"{self.grid[1] * self.patch_size[1]}/{self.grid[0] * self.patch_size[0]}"

    @property
    def query_note(self) -> str:
        """What a query of the attention maps is, if not a patch."""
        step = (self.explorer["weights"] or {}).get("query_step", 1)
        return f" To keep the page small, it is the mean over a cell of {step} × {step} patches." if step > 1 else ""

    @property
    def explained(self) -> str:
        """Fraction of the variance that the components hold, for each encoder."""
        return ", ".join(f"{one['explained']:.0%} ({one['name']})" for one in self.explorer["encoders"])


def choose_images(
    files: RunFiles, images: ImageSet | None, num_images: int, channels: int
) -> tuple[dict[str, np.ndarray], str]:
    """Readable images spread evenly over a data set (its held-out images, if any), and where they are from.

    Raises:
        DataError: if the data set is not there, or none of it can be read.
    """
    if images is None:
        path = files.setting("data.path")
        if path is None:
            raise DataError("the run's settings name no data.path")
        images = open_images(str(path)).with_pixels(trained_pixels(files.config))
    split = next((split for split in _SPLITS_SHOWN if split in images.splits), None)
    samples = (images.subset(split) if split else images).samples
    paths = [sample.path for sample in samples]
    tried = np.linspace(0, len(paths) - 1, min(len(paths), 2 * num_images)).round().astype(int)
    order = dict.fromkeys([*tried[::2].tolist(), *tried[1::2].tolist()])  # the second half replaces unreadable ones
    chosen: dict[int, np.ndarray] = {}
    for number in order:
        if len(chosen) == num_images:
            break
        try:
            chosen[number] = samples[number].read(channels)
        except DataError:
            continue
    if not chosen:
        raise DataError(f"{images.root}: none of {len(order)} images tried can be read")
    root = images.root if images.root.is_dir() else images.root.parent
    names = {n: paths[n].relative_to(root) if paths[n].is_relative_to(root) else paths[n] for n in sorted(chosen)}
    return {str(name): chosen[n] for n, name in names.items()}, f"{images.root}{f', split {split}' if split else ''}"


def compute_maps(shown: ShownImages, where: str, encoder: Encoder, name: str, baseline: Baseline | None) -> FeatureMaps:
    """Maps of the patch tokens, and the data of the explorer.

    Args:
        shown: the images.
        where: where they are from.
        encoder: the encoder of the run.
        name: how the page calls it.
        baseline: shown beside it.
    """
    encoders = {name: encoder} | ({} if baseline is None else {baseline.label: baseline.make()})
    grid = encoder.check_size(*shown.inputs[0].shape[:2])
    maps, codes = {}, {}
    for one, network in encoders.items():
        coordinates, explained = reduce_patches(patch_tokens(network, shown.inputs)[0], EXPLORER_DIMS)
        maps[one] = pca_maps(coordinates, grid)
        codes[one] = quantise(coordinates), explained
    uris = [image_uri(picture) for picture in shown.pictures]
    blocks = tuple(_block(number, shown.names[number], uri, maps, grid, encoder) for number, uri in enumerate(uris))
    data, problem = explorer_data(codes, grid, shown.names), ""
    data["weights"] = None
    try:
        data["weights"] = attention_data(encoders, shown.inputs, grid, data["start"][0])
    except ConfigError as error:
        problem = f"No attention: {error}."
    pictures = dict(zip(shown.names, uris, strict=True))
    return FeatureMaps(where, grid, encoder.patch_size, blocks, pictures, data, problem)


def _block(
    number: int, name: str, uri: str, maps: Mapping[str, np.ndarray], grid: tuple[int, int], encoder: Encoder
) -> PictureBlock:
    aspect = grid[1] * encoder.patch_size[1] / (grid[0] * encoder.patch_size[0])
    pictures = [Picture("image", uri, name)]
    for one, of_images in maps.items():
        alt = f"PCA map of {name}, {one} encoder"
        pictures.append(Picture(one, image_uri(of_images[number], ".png"), alt))
    return PictureBlock(f"{number + 1} · {name}", tuple(pictures), aspect)
