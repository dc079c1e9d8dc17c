"""What the patch tokens of evaluated images show, side by side for every arm: principal components and similarities.

Letters: B images, N = h*w patches, K components kept.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smalti.evaluation.result import Details
from smalti.evaluation.shown import Shown
from smalti.functional.components import align_components
from smalti.report.evaluated import Evaluated
from smalti.report.explorer import distinctive_patch, quantise
from smalti.report.parts import Picture, PictureBlock, PictureGroup
from smalti.report.patch_pictures import image_uri, pca_maps, similarity_picture
from smalti.report.prediction_pictures import TestImage, shown_images


@dataclass(frozen=True)
class ArmTokens:
    """Patch tokens of one arm on the images that all arms have."""

    names: list[str]
    coordinates: Tensor
    """``(B, N, K)``."""
    shown: Shown


@dataclass(frozen=True)
class TokenMaps:
    """Pictures of patch tokens, a group for each data set; empty if no result has tokens."""

    components: tuple[PictureGroup, ...]
    similarities: tuple[tuple[int, PictureGroup], ...]
    """Number of components compared, and pictures."""


def token_maps(evaluated: Sequence[Evaluated]) -> TokenMaps:
    """Maps of all data sets."""
    components, similarities = [], []
    for data, of_arm in _token_groups(evaluated):
        images = shown_images([one for one in evaluated if one.data == data])
        components.append(PictureGroup(data, _component_blocks(of_arm, images), _sizes(of_arm)))
        first = next(iter(of_arm.values()))
        group = PictureGroup(data, _similarity_blocks(of_arm, images))
        similarities.append((first.coordinates.shape[-1], group))
    return TokenMaps(tuple(components), tuple(similarities))


def _sizes(of_arm: Mapping[str, ArmTokens]) -> str:
    sizes = (
        f"{arm}: {one.shown.grid[0]} × {one.shown.grid[1]} patches of an image of {one.shown.image_size} px"
        for arm, one in of_arm.items()
    )
    return f"{'; '.join(sizes)}."


def _component_blocks(of_arm: Mapping[str, ArmTokens], images: Mapping[str, TestImage]) -> tuple[PictureBlock, ...]:
    first = next(iter(of_arm.values()))
    maps = {}
    for arm, one in of_arm.items():
        aligned = align_components(one.coordinates, one.shown.grid, first.coordinates, first.shown.grid)
        maps[arm] = dict(zip(one.names, pca_maps(aligned, one.shown.grid), strict=True))
    blocks = []
    for name in first.names:
        pictures = [Picture("image", image_uri(images[name].pixels), name)]
        for arm, of_name in maps.items():
            pictures.append(Picture(arm, image_uri(of_name[name], ".png"), f"PCA map of {name} by {arm}"))
        blocks.append(PictureBlock(name, tuple(pictures), images[name].aspect))
    return tuple(blocks)


def _similarity_blocks(of_arm: Mapping[str, ArmTokens], images: Mapping[str, TestImage]) -> tuple[PictureBlock, ...]:
    first = next(iter(of_arm.values()))
    blocks = []
    for number, name in enumerate(first.names):
        _, patch = distinctive_patch(quantise(first.coordinates[number : number + 1]), first.shown.grid)
        down, across = divmod(patch, first.shown.grid[1])
        pictures = [Picture("image", image_uri(images[name].pixels), name)]
        for arm, one in of_arm.items():
            rows, columns = one.shown.grid  # the patch at the same place of another grid
            row = int((down + 0.5) / first.shown.grid[0] * rows)
            column = int((across + 0.5) / first.shown.grid[1] * columns)
            heat = similarity_picture(
                images[name].pixels, one.coordinates[number], one.shown.grid, row * columns + column
            )
            alt = f"similarity of the patches of {name} to one, by {arm}"
            pictures.append(Picture(arm, image_uri(heat), alt))
        blocks.append(PictureBlock(name, tuple(pictures), images[name].aspect))
    return tuple(blocks)


def _token_groups(evaluated: Sequence[Evaluated]) -> Iterator[tuple[str, dict[str, ArmTokens]]]:
    """Data set -> arm -> tokens of the images that all arms have."""
    for data in dict.fromkeys(one.data for one in evaluated):
        found: dict[str, tuple[Details, Shown]] = {}
        for one in evaluated:
            for arm, details in one.details.items():
                if one.data == data and details.shown is not None:
                    found.setdefault(arm, (details, details.shown))
        if not found:
            continue
        names = {arm: [details.images[place] for place in shown.places] for arm, (details, shown) in found.items()}
        common = [name for name in next(iter(names.values())) if all(name in others for others in names.values())]
        if not common:
            continue
        groups = {}
        for arm, (_, shown) in found.items():
            rows = torch.tensor([names[arm].index(name) for name in common])
            groups[arm] = ArmTokens(common, shown.coordinates[rows].float(), shown)
        yield data, groups
