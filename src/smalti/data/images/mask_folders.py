"""Images with masks in folders of one's own: ``images/`` with ``masks/`` under their usual names, paired by stem."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from smalti.data.archives.members import open_binary
from smalti.data.images.decode import PILLOW_ERRORS
from smalti.data.images.image_files import Found, FoundNames, find_images
from smalti.data.images.image_set import SPLITS, ImageSample, ImageSet, as_text, read_class_names
from smalti.data.images.splits import (
    check_same_splits,
    folder_splits,
    image_keys,
    read_split_lists,
    resembled_splits,
    split_of,
    stray_note,
    words,
)
from smalti.errors import DataError

IMAGE_FOLDERS = ("images", "image", "imgs", "img", "img_dir", "jpegimages", "input", "inputs")
"""Usual names of a folder of images beside one of masks, in lower case."""
MASK_FOLDERS = (
    "masks",
    "mask",
    "labels",
    "label",
    "annotations",
    "annotation",
    "ann_dir",
    "segmentationclass",
    "segmentations",
    "segmentation",
    "groundtruth",
    "ground_truth",
    "gt",
    "targets",
    "target",
)
"""Usual names of the folder of masks, in lower case."""
_INSTANCES = "instances"
_MASK_ENDING = re.compile(
    r"(.+?)[_-](masks?|labels?|seg|segmentation|gt|ground_?truth|labelids|annotation)([_-]?\d+)?", re.IGNORECASE
)
"""What the stem of a mask may have behind that of its image."""
_MASK_STARTS = ("mask", "label", "seg", "gt", "ground", "annotation")
"""How what :data:`_MASK_ENDING` matches begins."""
_IMAGE_ENDING = re.compile(r"(.+?)[_-](image|img|sat|rgb|leftimg8bit)", re.IGNORECASE)
_IMAGE_WORDS = {"image", "images", "img", "imgs", "input", "inputs"}
_MASK_WORDS = {
    "mask",
    "masks",
    "label",
    "labels",
    "annotation",
    "annotations",
    "annot",
    "segmentation",
    "segmentations",
    "truth",
    "groundtruth",
    "gt",
}
"""Words that say what a folder holds, as in ``imagesTr`` and ``labelsTr``, in lower case."""
_MOST_SISTERS = 4
"""More folders with the same file names are classes with numbered files."""
_LOOKED_AT = 8
_MOST_VALUES = 32
"""A picture with more values or colours than this is no mask of classes."""

Prefix = tuple[str, ...]


@dataclass
class _Place:
    """A folder that holds a folder of images and one of masks."""

    images: str
    masks: str | None
    instances: str | None
    image_names: list[PurePosixPath] = field(default_factory=list)
    mask_names: list[PurePosixPath] = field(default_factory=list)
    instance_names: list[PurePosixPath] = field(default_factory=list)


def find_mask_folders(root: Path, names: Sequence[PurePosixPath]) -> dict[Prefix, _Place]:
    """The places where a folder of images lies beside one of masks, by the folders above them; empty if nowhere.

    Raises:
        DataError: if two folders could be the images, or the masks, of one place.
    """
    places: dict[Prefix, _Place] = {}
    for prefix, inside in sorted(_children(names).items()):
        lower = {name.lower() for name in inside}
        if lower.isdisjoint(IMAGE_FOLDERS) or lower.isdisjoint((*MASK_FOLDERS, _INSTANCES)):
            continue
        if not any(prefix[:depth] in places for depth in range(len(prefix))):
            images, masks = _only(root, inside, IMAGE_FOLDERS), _only(root, inside, MASK_FOLDERS)
            assert images is not None
            places[prefix] = _Place(images, masks, _only(root, inside, (_INSTANCES,)))
    return places


def _children(names: Sequence[PurePosixPath]) -> dict[Prefix, set[str]]:
    """The names of the folders in each folder."""
    children: dict[Prefix, set[str]] = defaultdict(set)
    for folders in {name.parts[:-1] for name in names}:
        for depth, folder in enumerate(folders):
            children[folders[:depth]].add(folder)
    return children


def read_masks(root: Path, found: Found | None = None) -> ImageSet:
    """Images with masks: ``images/`` beside ``masks/`` or ``instances/``, or other usual names, at the root, in each
    split, or in a folder for each image.

    Args:
        root: the folder.
        found: its images, where the layout was not forced.

    Raises:
        DataError: if there are no such folders, masks don't belong to the images, the splits are not clear, or, unless
            the layout was forced, most images lie elsewhere.
    """
    is_forced = found is None
    found = found or find_images(root)
    places = find_mask_folders(root, found.names)
    if not places:
        raise DataError(
            f"{as_text(root)}: layout 'masks' needs the folders images/ and masks/ (or images/ and instances/)"
        )
    others = _distribute(places, found.names)
    inside = sum(len(place.image_names) for place in places.values())
    elsewhere = [name for name in others if not split_of(name.parts[0])]
    if not is_forced and () not in places and len(elsewhere) > inside:
        prefix, place = next(iter(places.items()))
        home = as_text("/".join(prefix))
        raise DataError(
            f"{as_text(root)}: {home}/{as_text(place.images)}/ and {home}/{as_text(place.masks or _INSTANCES)}/ look "
            f"like images and masks, but {len(elsewhere):,} images lie elsewhere, such as "
            f"{as_text(str(elsewhere[0]))}; move one or the other away, or write masks={as_text(root)} to read only "
            "images in such folders"
        )
    masks, instances, notes = _pair(root, places)
    images = [name for place in places.values() for name in place.image_names]
    split_names = _splits(root, places, images, others)
    first = next(iter(places.values()))
    samples = tuple(
        ImageSample(
            root / name,
            mask=root / masks[name] if name in masks else None,
            instances=root / instances[name] if name in instances else None,
            split=split_names.get(name.as_posix()),
        )
        for name in sorted(images)
    )
    beside = [stray_note(others, f"outside of {first.images}/ and {first.masks or first.instances}/")] if others else []
    if split_names and (unlisted := [name for name in sorted(images) if name.as_posix() not in split_names]):
        notes.append(stray_note(unlisted, "in no split"))
    classes = read_class_names(root)
    if classes is None and not any(place.masks for place in places.values()):
        classes = ("background", "object")
    return ImageSet(root, "masks", samples, classes, left_out=tuple(notes), not_read=(*beside, *found.not_read))


def masks_beside(names: Sequence[PurePosixPath]) -> dict[PurePosixPath, list[PurePosixPath]]:
    """``{image: its masks}`` where ``x_mask.png`` lies beside ``x.png`` or ``x_sat.png``; empty if none is so."""
    if isinstance(names, FoundNames):  # a million names are looked through in a moment
        text = "\n".join(names.texts).lower()
        if not any(f"{sign}{word}" in text for sign in "_-" for word in _MASK_STARTS):
            return {}
    stems = {name.with_suffix(""): name for name in names}
    images = {
        stem.with_name(match[1]): name for stem, name in stems.items() if (match := _IMAGE_ENDING.fullmatch(stem.name))
    } | stems
    result: dict[PurePosixPath, list[PurePosixPath]] = defaultdict(list)
    for stem, name in stems.items():
        match = _MASK_ENDING.fullmatch(stem.name)
        if match and (image := images.get(stem.with_name(match[1]))):
            result[image].append(name)
    return dict(result)


def refuse_masks_as_classes(root: Path, names: FoundNames) -> None:
    """Refuse folders side by side that would be classes, though some are masks of the others: by the words of their
    names, or by files of the same names that look like masks in one folder and not in another.

    Raises:
        DataError: if that is so.
    """
    for inside in _children(names.one_each).values():
        said = {folder: _said(folder) for folder in sorted(inside)}
        masks = [folder for folder in said if said[folder] & _MASK_WORDS and not said[folder] & _IMAGE_WORDS]
        split_like = [folder for folder in said if resembled_splits(folder)]
        are_splits = any(split_of(folder) == "train" for folder in said) or 2 * len(split_like) >= max(4, len(said))
        images = [
            folder
            for folder in said
            if (said[folder] & _IMAGE_WORDS or (are_splits and split_of(folder))) and not said[folder] & _MASK_WORDS
        ]
        if masks and images:
            raise DataError(
                f"{as_text(root)}: {as_text(images[0])}/ and {as_text(masks[0])}/ are named as images and masks"
                + _rename(root, images)
            )
    sisters = Counter(name.parts[:-2] for name in names.one_each if len(name.parts) > 1)
    few = {prefix for prefix, count in sisters.items() if 2 <= count <= _MOST_SISTERS}
    children: dict[Prefix, dict[str, dict[str, PurePosixPath]]] = defaultdict(lambda: defaultdict(dict))
    for name in names if few else ():
        if len(name.parts) > 1 and name.parts[:-2] in few:
            children[name.parts[:-2]][name.parts[-2]][name.stem] = name
    for folders in children.values():
        if not 2 <= len(folders) <= _MOST_SISTERS:
            continue
        common = sorted(set.intersection(*(set(files) for files in folders.values())))
        if len(common) < 0.9 * min(map(len, folders.values())):
            continue
        seen = common[:: max(1, len(common) // _LOOKED_AT)][:_LOOKED_AT]
        is_mask = {
            folder: [looks_like_mask(root / files[stem]) for stem in seen] for folder, files in sorted(folders.items())
        }
        masks = [folder for folder, answers in is_mask.items() if all(answers)]
        images = [folder for folder, answers in is_mask.items() if not any(answers)]
        if masks and images:
            raise DataError(
                f"{as_text(root)}: {as_text(images[0])}/ and {as_text(masks[0])}/ hold files of the same names, and "
                f"those in {as_text(masks[0])}/ look like masks" + _rename(root, images)
            )


def _said(folder: str) -> set[str]:
    """The words of a folder's name in lower case, and ``masks`` of ``trainmasks``."""
    whole = {word.lower() for word in words(folder)}
    return whole | {word.removeprefix(split) for word in whole for split in SPLITS}


def _rename(root: Path, images: Sequence[str]) -> str:
    alone = min(images, key=lambda folder: "train" not in resembled_splits(folder))
    return (
        "; rename the folders to images/ and masks/ (in each split: train/images/ and train/masks/), give "
        f"{as_text(alone)}/ alone to train without masks, or write classes={as_text(root)} if they are classes"
    )


def looks_like_mask(path: Path) -> bool:
    """Whether an image file has the few values or colours of a map of classes."""
    try:
        with open_binary(path) as file, Image.open(file) as image:
            if image.width * image.height > 2**26:
                return False
            pixels = np.asarray(image.convert("RGB") if image.mode in ("CMYK", "YCbCr") else image)
    except (*PILLOW_ERRORS, DataError):
        return False
    if pixels.ndim == 3:
        pixels = pixels.reshape(-1, pixels.shape[2])
        return len(np.unique(pixels[:: max(1, len(pixels) // 4096)], axis=0)) <= _MOST_VALUES
    return len(np.unique(pixels)) <= _MOST_VALUES and pixels.size > 4 * _MOST_VALUES


def _only(root: Path, inside: set[str], known: Sequence[str]) -> str | None:
    """The one folder of a known name; the first of the known names wins, two others are refused."""
    there = sorted((name for name in inside if name.lower() in known), key=lambda name: known.index(name.lower()))
    if len(there) > 1 and there[0].lower() != known[0]:
        raise DataError(
            f"{as_text(root)}: {there[0]}/ and {there[1]}/ could both be the {known[0]}; "
            f"name one of them {known[0]}/, or move the other away"
        )
    return there[0] if there else None


def _distribute(places: Mapping[Prefix, _Place], names: Sequence[PurePosixPath]) -> list[PurePosixPath]:
    """Put each file where it belongs; those that belong nowhere come back."""
    others = []
    for name in names:
        for depth in range(len(name.parts) - 1):
            place = places.get(name.parts[:depth])
            if place is not None:
                folder = name.parts[depth]
                lists = {place.images: place.image_names, place.masks: place.mask_names}
                lists[place.instances] = place.instance_names
                if folder in lists:
                    lists[folder].append(name)
                    break
        else:
            others.append(name)
    return others


def _pair(
    root: Path, places: Mapping[Prefix, _Place]
) -> tuple[dict[PurePosixPath, PurePosixPath], dict[PurePosixPath, PurePosixPath], list[str]]:
    """``{image: mask}``, ``{image: instances}``, and what was left out."""
    masks: dict[PurePosixPath, PurePosixPath] = {}
    instances: dict[PurePosixPath, PurePosixPath] = {}
    several = 0
    lonely: list[PurePosixPath] = []
    for prefix, place in places.items():
        images = _by_stem(root, place.image_names, len(prefix) + 1)
        if prefix and len(images) == 1 and len(place.mask_names) > 1:  # a folder for each image, a mask an object
            several += len(place.mask_names)
            continue
        if prefix and len(images) == len(place.mask_names) == 1:  # whatever they are called
            masks[place.image_names[0]] = place.mask_names[0]
            continue
        for files, result in ((place.mask_names, masks), (place.instance_names, instances)):
            found = _match(images, _by_stem(root, files, len(prefix) + 1))
            result.update({images[stem]: file for stem, file in found.items() if stem in images})
            lonely += [file for stem, file in found.items() if stem not in images]
    notes = []
    if several:
        notes.append(f"{several:,} masks, because they are several for an image")
    elif not masks and not instances:
        place = next(iter(places.values()))
        mask = (place.mask_names or place.instance_names)[0]
        raise DataError(
            f"{as_text(root)}: none of the masks has the stem of an image, such as "
            f"{as_text(str(place.image_names[0]))} and {as_text(str(mask))}; rename the masks, give "
            f"{as_text(place.images)}/ alone to train without masks, or write classes={as_text(root)} if they are "
            "classes"
        )
    if lonely:
        notes.append(stray_note(lonely, "of masks without an image"))
    return masks, instances, notes


def _by_stem(root: Path, names: Sequence[PurePosixPath], depth: int) -> dict[str, PurePosixPath]:
    """``{path below its folder without the ending: file}``."""
    result: dict[str, PurePosixPath] = {}
    for name in names:
        stem = PurePosixPath(*name.parts[depth:]).with_suffix("").as_posix()
        if stem in result:
            raise DataError(
                f"{as_text(root / name.parent)}: {as_text(result[stem].name)} and {as_text(name.name)} have the same "
                "stem; masks are found by stem"
            )
        result[stem] = name
    return result


def _match(images: Mapping[str, PurePosixPath], masks: Mapping[str, PurePosixPath]) -> dict[str, PurePosixPath]:
    """Masks by the stem of their image, where all masks (and perhaps all images) end alike: ``x_mask`` for ``x``."""
    if images.keys() & masks.keys():
        return dict(masks)
    without = {stem: _MASK_ENDING.fullmatch(stem) for stem in masks}
    if masks and all(without.values()):
        found = {match[1]: masks[stem] for stem, match in without.items() if match}
        if images.keys() & found.keys() and len(found) == len(masks):
            return found
        own = {match[1]: stem for stem in images if (match := _IMAGE_ENDING.fullmatch(stem))}
        if len(own) == len(images) and len(found) == len(masks):
            return {own.get(stem, stem): file for stem, file in found.items()}
    return dict(masks)


def _splits(
    root: Path, places: Mapping[Prefix, _Place], images: Sequence[PurePosixPath], others: Sequence[PurePosixPath]
) -> dict[str, str]:
    """``{image: split}`` by lists at the root, else by a folder: ``SPLIT/images/`` or ``images/SPLIT/``."""
    folders = {place.images for place in places.values()}
    lists = read_split_lists(root, image_keys(images, folders))
    if () in places:
        below = [PurePosixPath(*name.parts[1:]) for name in images]
        splits = (
            dict.fromkeys(folder_splits(root, below, has_masks=True))
            if any(len(name.parts) > 1 for name in below)
            else {}
        )
        by_folder = {
            name.as_posix(): split
            for name, path in zip(images, below, strict=True)
            if splits and (split := split_of(path.parts[0]))
        }
    else:
        splits = dict.fromkeys(folder_splits(root, [*images, *others], has_masks=True))
        by_folder = {name.as_posix(): split for name in images if splits and (split := split_of(name.parts[0]))}
    check_same_splits(root, by_folder, lists)
    return lists or by_folder
