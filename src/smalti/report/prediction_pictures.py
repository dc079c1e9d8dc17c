"""Pictures of predictions: classes of pixels, objects, and what protocols drew themselves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from smalti.functional.colours import palette
from smalti.report.evaluated import Evaluated
from smalti.report.parts import LegendEntry, Picture, PictureBlock, PictureGroup, css_colour
from smalti.report.patch_pictures import boxes_picture, image_uri, overlay


@dataclass(frozen=True)
class TestImage:
    """A test image, with its mask if there is one."""

    __test__ = False  # pytest

    name: str
    pixels: np.ndarray
    truth: np.ndarray | None
    aspect: float


def shown_images(evaluated: Sequence[Evaluated]) -> dict[str, TestImage]:
    """Image name -> image, from whichever arm has it, with its mask if any arm has that."""
    found: dict[str, TestImage] = {}
    for one in evaluated:
        for details in one.details.values():
            if (shown := details.shown) is None:
                continue
            for number, place in enumerate(shown.places):
                name, truth = details.images[place], shown.truths.get(place)
                known = found.get(name)
                if known is None or (known.truth is None and truth is not None):
                    found[name] = TestImage(name, shown.pictures[place], truth, shown.aspects[number])
    return found


def prediction_groups(evaluated: Sequence[Evaluated]) -> list[PictureGroup]:
    """Predicted classes of pixels beside the true ones, for every arm."""
    groups = []
    for one in evaluated:
        details = {arm: found for arm, found in one.details.items() if found.predictions}
        if not details:
            continue
        by_name = {arm: {d.images[place]: p for place, p in d.predictions.items()} for arm, d in details.items()}
        classes = next(iter(details.values())).classes
        images = shown_images([one])
        names = dict.fromkeys(name for of_arm in by_name.values() for name in of_arm)
        blocks = [
            _prediction_block(name, images.get(name), {a: m[name] for a, m in by_name.items() if name in m}, classes)
            for name in names
        ]
        hidden = "" if images else " The images themselves were not kept with these results."
        lead = f"Predicted class of each pixel on evaluated images, by seed {one.seed}.{hidden}"
        groups.append(PictureGroup(one.name, tuple(blocks), lead))
    return groups


def _prediction_block(
    name: str, known: TestImage | None, predicted: Mapping[str, np.ndarray], classes: Sequence[str]
) -> PictureBlock:
    image = known or TestImage(name, np.full((224, 224, 3), 128, np.uint8), None, 1.0)
    pictures = [Picture("image", image_uri(image.pixels), name)] if known else []
    maps = list(predicted.values())
    if image.truth is not None:
        uri = image_uri(overlay(image.pixels, image.truth))
        pictures.append(Picture("truth", uri, f"true classes of {name}"))
        maps.insert(0, image.truth)
    pictures += [
        Picture(arm, image_uri(overlay(image.pixels, one)), f"classes that {arm} predicts for {name}")
        for arm, one in predicted.items()
    ]
    return PictureBlock(name, tuple(pictures), image.aspect, _legend(maps, classes))


def object_groups(evaluated: Sequence[Evaluated]) -> list[PictureGroup]:
    """Frames around true objects and around those that each arm detected."""
    groups = []
    for one in evaluated:
        details = {arm: found for arm, found in one.details.items() if found.found}
        images = shown_images([one])
        if not details or not images:
            continue
        classes = next(iter(details.values())).classes
        by_name = {arm: {d.images[place]: both for place, both in d.found.items()} for arm, d in details.items()}
        blocks = []
        for name in dict.fromkeys(name for of_arm in by_name.values() for name in of_arm if name in images):
            both = {arm: of_arm[name] for arm, of_arm in by_name.items() if name in of_arm}
            rows = {"truth": next(iter(both.values()))[0], **{arm: detected for arm, (_, detected) in both.items()}}
            pixels = images[name].pixels
            pictures = tuple(
                Picture(arm, image_uri(boxes_picture(pixels, boxes.boxes, boxes.labels)), f"{arm}: {name}")
                for arm, boxes in rows.items()
            )
            labels = [boxes.labels + 1 for boxes in rows.values()]
            blocks.append(PictureBlock(name, pictures, images[name].aspect, _legend(labels, ("", *classes))))
        lead = (
            f"Objects on evaluated images, by seed {one.seed}: true ones (crowds, too), and those that were detected "
            "with a score of at least 0.3."
        )
        groups.append(PictureGroup(one.name, tuple(blocks), lead))
    return groups


def sheet_groups(evaluated: Sequence[Evaluated]) -> list[PictureGroup]:
    """Pictures that protocols made themselves, as they are; their captions are headings."""
    groups = []
    for one in evaluated:
        for arm, details in one.details.items():
            title = one.name if len(one.details) == 1 else f"{one.name}, {arm}"
            blocks = tuple(
                PictureBlock(caption, (Picture("", image_uri(picture, ".png"), caption),), 1.0)
                for caption, picture in details.pictures.items()
            )
            groups += [PictureGroup(title, blocks)] if blocks else []
    return groups


def _legend(maps: Sequence[np.ndarray], classes: Sequence[str]) -> tuple[LegendEntry, ...]:
    """The classes that a block shows, the most frequent first."""
    counts: dict[int, float] = {}
    for one in maps:
        values, numbers = np.unique(one[one >= 0], return_counts=True)
        for value, number in zip(values.tolist(), numbers.tolist(), strict=True):
            counts[value] = counts.get(value, 0) + number / one.size
    colours = palette(max(counts, default=0) + 1)
    return tuple(
        LegendEntry(css_colour(colours[value]), classes[value] if value < len(classes) else str(value))
        for value in sorted(counts, key=lambda value: -counts[value])
    )
