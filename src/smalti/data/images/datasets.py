"""Public data sets in the folders they come in: their files, their official splits and what their masks' values mean.

A layout is found by its folders; several spellings are accepted, those of the data sets' own archives and those that
published code and its documentation use.
Sources: Everingham et al., IJCV 2015 (VOC); Hariharan et al., ICCV 2011 (its trainaug list); Zhou et al., CVPR 2017
(ADE20K, the scene parsing challenge of 2016); Cordts et al., CVPR 2016 (Cityscapes); Lin et al., ECCV 2014 (COCO);
Caesar et al., CVPR 2018 (COCO-Stuff); Kirillov et al., CVPR 2019 (panoptic COCO); the groups of COCO's categories as
Leopart (arXiv:2204.13101), NeCo (arXiv:2408.11054) and PiCIE (arXiv:2103.17070) score them.
"""

import functools
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from smalti.data.images.coco import read_annotations
from smalti.data.images.image_files import image_names
from smalti.data.images.image_set import (
    IGNORED,
    REFUSED,
    SPLITS,
    ImageSample,
    ImageSet,
    LabelMap,
    by_stem,
    read_lines,
)
from smalti.data.images.splits import folder_splits, split_of, stray_note
from smalti.errors import DataError
from smalti.reading import read_json, reading

VOC_CLASSES = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor"
).split()
ADE20K_CLASSES = (
    "wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door, "
    "table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field, "
    "armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, "
    "chest of drawers, counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, "
    "case, pool table, pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, "
    "book, hill, bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, "
    "hovel, bus, towel, light, truck, tower, chandelier, awning, streetlight, booth, television receiver, airplane, "
    "dirt track, apparel, pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship, "
    "fountain, conveyer belt, canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag, "
    "minibike, cradle, oven, ball, food, step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, "
    "screen, blanket, sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate, "
    "monitor, bulletin board, shower, radiator, glass, clock, flag"
).split(", ")
"""The first name of each."""
CITYSCAPES_CLASSES = (
    "road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, vegetation, terrain, sky, person, "
    "rider, car, truck, bus, train, motorcycle, bicycle"
).split(", ")
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_THINGS: Mapping[str, tuple[int, ...]] = {
    "accessory": (27, 28, 31, 32, 33),
    "animal": tuple(range(16, 26)),
    "appliance": (78, 79, 80, 81, 82),
    "electronic": (72, 73, 74, 75, 76, 77),
    "food": tuple(range(52, 62)),
    "furniture": (62, 63, 64, 65, 67, 70),
    "indoor": (84, 85, 86, 87, 88, 89, 90),
    "kitchen": (44, 46, 47, 48, 49, 50, 51),
    "outdoor": (10, 11, 13, 14, 15),
    "person": (1,),
    "sports": tuple(range(34, 44)),
    "vehicle": tuple(range(2, 10)),
}
_STUFF: Mapping[str, tuple[int, ...]] = {
    "building": (95, 96, 128, 151, 158, 166),
    "ceiling": (102, 103),
    "floor": (101, 114, 115, 116, 117, 118),
    "food-stuff": (121, 122, 153, 170),
    "furniture-stuff": (98, 107, 108, 110, 112, 123, 130, 133, 156, 161, 165),
    "ground": (111, 125, 126, 136, 140, 144, 145, 147, 149, 154, 159),
    "plant": (94, 97, 119, 124, 129, 134, 142, 163, 169),
    "raw-material": (100, 132, 139, 143),
    "sky": (106, 157),
    "solid": (127, 135, 150, 160, 162, 182),
    "structural": (99, 113, 138, 146, 164),
    "textile": (92, 93, 104, 105, 109, 131, 137, 141, 152, 167, 168),
    "wall": (171, 172, 173, 174, 175, 176, 177),
    "water": (120, 148, 155, 178, 179),
    "window": (180, 181),
}
# Folders, relative to the data set's own; {split} is train2017 or val2017. Of several, the first that is there.
_COCO_IMAGES = ("images/{split}", "coco/images/{split}", "{split}")
_COCO_MASKS = {
    "coco-stuff": (
        "annotations/stuff_annotations/stuff_{split}_pixelmaps",
        "annotations/annotations/stuff_annotations/stuff_{split}_pixelmaps",
        "annotations/stuff_{split}_pixelmaps",
    ),
    "coco-stuff27": (
        "annotations/stuffthingmaps/{split}",
        "stuffthingmaps/{split}",
        "stuffthingmaps_trainval2017/{split}",
    ),
    "coco-things": (
        "annotations/panoptic_annotations/semantic_segmenations_{split}",
        "annotations/annotations/panoptic_annotations/semantic_segmenations_{split}",
        "annotations/panoptic_annotations/semantic_segmentations_{split}",
        "annotations/{split}",
    ),
}
_COCO_SPLITS = {"train": "train2017", "val": "val2017"}
_PANOPTIC = (
    "annotations/panoptic_annotations/panoptic_val2017.json",
    "annotations/annotations/panoptic_annotations/panoptic_val2017.json",
    "annotations/panoptic_val2017.json",
)
_INSTANCES = ("annotations", "annotations/annotations", "annotations/instances_annotations")
_ROBOFLOW = "_annotations.coco.json"
_ADE20K_SPLITS = {"train": "training", "val": "validation"}


def detect(root: Path) -> str | None:
    """Name of the reader whose folders are there, or None.

    Data of one's own may lie in the folders of VOC or ADE20K; where files aren't named as theirs, a warning says what
    they are taken for.
    """
    if _is_voc(root):
        return _warn_unless(root, "voc", _voc_folder(root) / "SegmentationClass*", "[0-9]" * 4 + "_" + "[0-9]" * 6)
    home = _ade20k_folder(root)
    if all(
        any((home / kind / split).is_dir() for split in _ADE20K_SPLITS.values()) for kind in ("images", "annotations")
    ):
        return _warn_unless(root, "ade20k", home / "annotations/*", "ADE_*")
    if _find(root, ("leftImg8bit",)) and _find(root, ("gtFine",)):
        return "cityscapes"
    if _roboflow(root):
        return "coco"
    files = _instances(root)
    has_images = any(_find(root, _COCO_IMAGES, name) for name in (*files, *_COCO_SPLITS.values()))
    if not has_images and not (files and _find(root, ("images",))):
        return None
    with_masks = [name for name in _COCO_MASKS if _has_masks(root, name)]
    return with_masks[0] if len(with_masks) == 1 else "coco"


def read_voc(root: Path) -> ImageSet:
    """Pascal VOC 2012: ``JPEGImages``, ``SegmentationClass``, ``ImageSets/Segmentation``, or ``images`` and ``sets``.

    Learned from ``trainaug`` where it and ``SegmentationClassAug`` are there, else from ``train``.
    """
    home = _voc_folder(root)
    images_in = _need(home, "voc", ("JPEGImages", "images"))
    lists = _need(home, "voc", ("ImageSets/Segmentation", "sets"))
    extra, own = _find(home, ("SegmentationClassAug",)), _find(home, ("SegmentationClass",))
    if extra is None and own is None:
        raise _missing(home, "voc", ("SegmentationClass", "SegmentationClassAug"))
    train = "trainaug" if extra and (lists / "trainaug.txt").is_file() else "train"
    sources = {"train": (lists / f"{train}.txt", extra or own), "val": (lists / "val.txt", own or extra)}
    if not any(path.is_file() for path, _ in sources.values()):
        raise DataError(f"{lists}: no trainaug.txt, train.txt or val.txt; layout 'voc' takes its splits from them")
    label_map = _label_map(
        "voc", {i: i for i in range(21)}, f"Pascal VOC's 21 classes (train list: {train}); {IGNORED} is ignored"
    )
    images = by_stem(images_in, image_names(images_in))
    samples: list[ImageSample] = []
    list_of: dict[str, Path] = {}
    for split, (path, masks_in) in sources.items():
        if path.is_file() and masks_in is not None:
            # A list has a name a line; some lists of trainaug have the paths of image and mask.
            stems = {PurePosixPath(line.split()[0]).stem: number for number, line in read_lines(path)}
            if missing := [stem for stem in stems if stem not in images]:
                raise DataError(
                    f"{path}: {len(missing):,} of {len(stems):,} names have no image in {images_in.name}/, "
                    f"the first: {missing[0]} (line {stems[missing[0]]})"
                )
            if twice := [stem for stem in stems if list_of.setdefault(stem, path) != path]:
                raise DataError(f"{lists}: image '{twice[0]}' is in both {list_of[twice[0]].name} and {path.name}")
            listed = {stem: images[stem] for stem in stems}
            masks = by_stem(masks_in, image_names(masks_in))
            samples += _pair(home, listed, {stem: masks[stem] for stem in stems if stem in masks}, split, label_map)
    return ImageSet(root, "voc", tuple(samples), tuple(VOC_CLASSES))


def read_ade20k(root: Path, with_other: bool = False) -> ImageSet:
    """ADE20K in the scene parsing challenge's form: ``images`` and ``annotations``, ``training`` and ``validation``.

    Args:
        root: of the data set, or the folder that ``ADEChallengeData2016`` lies in.
        with_other: 151 classes, the first of which is "other" and has no pixels.
    """
    name = "ade20k-151" if with_other else "ade20k"
    home = _ade20k_folder(root)
    if with_other:
        note = f"ADE20K's 151 classes, of which 0 (other) is {IGNORED}, ignored: with absent=zero its IoU of 0 counts"
        values = {0: IGNORED, **{i: i for i in range(1, 151)}}
    else:
        note = f"ADE20K's 150 classes, values less 1; 0 (other) is {IGNORED}, ignored"
        values = {0: IGNORED, **{i: i - 1 for i in range(1, 151)}}
    folders = {split: ((f"images/{name}",), (f"annotations/{name}",)) for split, name in _ADE20K_SPLITS.items()}
    classes = ("other", *ADE20K_CLASSES) if with_other else tuple(ADE20K_CLASSES)
    return ImageSet(root, name, _read_pairs(home, name, folders, _label_map(name, values, note)), classes)


def read_cityscapes(root: Path) -> ImageSet:
    """Cityscapes: ``leftImg8bit`` and ``gtFine`` with ``labelIds``; its test split has no masks and is left out."""
    ids = {label_id: place for place, label_id in enumerate(_CITYSCAPES_IDS)}
    note = f"Cityscapes' 19 training classes of its label ids; all other ids are {IGNORED}, ignored"
    label_map = _label_map("cityscapes", ids, note, others=IGNORED)
    folders = {split: ((f"leftImg8bit/{split}",), (f"gtFine/{split}",)) for split in ("train", "val")}
    samples = _read_pairs(root, "cityscapes", folders, label_map, endings=("_leftImg8bit", "_gtFine_labelIds"))
    return ImageSet(root, "cityscapes", samples, tuple(CITYSCAPES_CLASSES))


def read_coco_masks(root: Path, name: str) -> ImageSet:
    """COCO with masks of classes: ``coco-stuff`` (15), ``coco-stuff27`` or ``coco-things`` (12)."""
    if name == "coco-things":
        groups, source = _things(root)
        ids = _ids(groups)
        note = (
            f"COCO's {len(groups)} super-categories of things ({source}); stuff and unlabelled are {IGNORED}, ignored"
        )
        label_map = _label_map(name, ids, note, others=IGNORED)
    elif name == "coco-stuff":
        # 1..91 are refused: masks with things are of another kind, in which all values are one less.
        groups, ids = _STUFF, _ids(_STUFF) | {0: IGNORED, 183: IGNORED, 255: IGNORED}
        note = f"COCO's 15 super-categories of stuff; things (0) and other (183) are {IGNORED}, ignored"
        label_map = _label_map(name, ids, note)
    else:
        groups = {**_THINGS, **_STUFF}
        ids = {label_id - 1: place for label_id, place in _ids(groups).items()}
        note = (
            f"COCO's 12 super-categories of things and 15 of stuff (values: ids less 1); others are {IGNORED}, ignored"
        )
        label_map = _label_map(name, ids, note, others=IGNORED)
    folders = {split: (_COCO_IMAGES, _COCO_MASKS[name]) for split in _COCO_SPLITS}
    samples = _read_pairs(root, name, folders, label_map, _COCO_SPLITS)
    return ImageSet(root, name, samples, tuple(groups))


def read_coco(root: Path) -> ImageSet:
    """COCO's images, with the file of their boxes and outlines if there is one; that file isn't read if it needn't.

    ``annotations/instances_NAME.json`` with ``images/NAME`` (or ``NAME``), or with all images in ``images``. Without
    such files, ``train2017`` and ``val2017``, each by itself or in ``images``. Or as Roboflow exports it:
    ``SPLIT/_annotations.coco.json`` among the split's images.
    """
    if exported := _roboflow(root):
        return _read_roboflow(root, exported)
    files: dict[str, Path | None] = {**_instances(root)} or dict.fromkeys(_COCO_SPLITS.values())
    folders = {name: folder for name in files if (folder := _find(root, _COCO_IMAGES, name))}
    if not folders and (not _instances(root) or _find(root, ("images",)) is None):
        raise _missing(root, "coco", _spell(_COCO_IMAGES, "train2017"))
    samples: list[ImageSample] = []
    seen: dict[str | None, str] = {}
    for name, path in files.items():
        if folders and name not in folders:  # the archive of annotations has both splits, whichever images there are
            continue
        split = SPLITS.get(name.rstrip("0123456789"))
        if seen.setdefault(split, name) != name or (None in seen and len(seen) > 1):
            raise DataError(
                f"{root}: {' and '.join([*seen.values(), name][:2])} aren't distinguished as train, val and test; "
                "keep one, or rename them"
            )
        paths = [folders[name] / image for image in image_names(folders[name])] if folders else []
        if not folders and path is not None:
            paths = _listed(root / "images", path)
        samples += [ImageSample(image, split=split, annotations=path) for image in paths]
    return ImageSet(root, "coco", tuple(samples), None)


def _read_roboflow(root: Path, files: Mapping[str, Path]) -> ImageSet:
    names = image_names(root)
    splits = folder_splits(root, names) or tuple(files)
    if without := [split for split in splits if split not in files]:
        raise DataError(f"{root}: {without[0]}/ has no {_ROBOFLOW}, and {next(iter(files))}/ has one")
    samples = tuple(
        ImageSample(root / name, split=split_of(name.parts[0]), annotations=files[name.parts[0]])
        for name in names
        if name.parts[0] in files
    )
    strays = [name for name in names if name.parts[0] not in files]
    notes = (stray_note(strays, f"beside the folders with {_ROBOFLOW}"),) if strays else ()
    return ImageSet(root, "coco", samples, None, not_read=notes)


READERS: dict[str, Callable[[Path], ImageSet]] = {
    "voc": read_voc,
    "ade20k": read_ade20k,
    "ade20k-151": functools.partial(read_ade20k, with_other=True),
    "cityscapes": read_cityscapes,
    "coco": read_coco,
    **{name: functools.partial(read_coco_masks, name=name) for name in _COCO_MASKS},
}
"""Name -> what reads a data set in its official folders."""


def _read_pairs(
    root: Path,
    name: str,
    folders: Mapping[str, tuple[Sequence[str], Sequence[str]]],
    label_map: LabelMap,
    spellings: Mapping[str, str] | None = None,
    endings: tuple[str, str] = ("", ""),
) -> tuple[ImageSample, ...]:
    """Images and masks of each split that is there.

    Args:
        root: of the data set.
        name: of the layout.
        folders: split -> candidates for the folder of its images, and of its masks.
        label_map: of the masks.
        spellings: split -> replacement for ``{split}`` in the candidates.
        endings: of the stems of images and masks, which are cut off; other files are left out.
    """
    samples: list[ImageSample] = []
    for split, (image_folders, mask_folders) in folders.items():
        spelt = (spellings or {}).get(split, split)
        images_in, masks_in = _find(root, image_folders, spelt), _find(root, mask_folders, spelt)
        if images_in is None and masks_in is None:
            continue
        if images_in is None or masks_in is None:
            raise _missing(root, name, _spell(image_folders if images_in is None else mask_folders, spelt))
        images, masks = (
            _cut(by_stem(folder, image_names(folder)), ending)
            for folder, ending in ((images_in, endings[0]), (masks_in, endings[1]))
        )
        samples += _pair(root, images, masks, split, label_map)
    if not samples:
        image_folders, mask_folders = folders["train"]
        spelt = (spellings or {}).get("train", "train")
        first = image_folders if not _find(root, image_folders, spelt) else mask_folders
        raise _missing(root, name, _spell(first, spelt))
    return tuple(samples)


def _pair(
    root: Path, images: Mapping[str, Path], masks: Mapping[str, Path], split: str, label_map: LabelMap
) -> Iterable[ImageSample]:
    """Images with the masks of the same stem; an image without a mask is refused, a mask without an image counted."""
    if missing := [stem for stem in images if stem not in masks]:
        raise DataError(
            f"{root}: {len(missing):,} of {len(images):,} {split} images have no mask, "
            f"the first: {images[missing[0]].relative_to(root).as_posix()}"
        )
    if extra := [stem for stem in masks if stem not in images]:
        warnings.warn(
            f"{root}: {len(extra):,} of {len(masks):,} {split} masks have no image and are left out, "
            f"the first: {masks[extra[0]].relative_to(root).as_posix()}",
            stacklevel=2,
        )
    return [ImageSample(path, mask=masks[stem], split=split, label_map=label_map) for stem, path in images.items()]


def _cut(files: Mapping[str, Path], ending: str) -> dict[str, Path]:
    """``{stem without its ending: file}`` of the stems that end so."""
    return {stem.removesuffix(ending): path for stem, path in files.items() if stem.endswith(ending)}


def _label_map(name: str, values: Mapping[int, int], note: str, others: int = REFUSED) -> LabelMap:
    """``values`` as a table; ``others`` is the class of all other values, apart from 255."""
    return LabelMap(name, note, tuple(values.get(i, IGNORED if i == IGNORED else others) for i in range(256)), others)


def _ids(groups: Mapping[str, Iterable[int]]) -> dict[int, int]:
    """``{category id: place of its group}``."""
    return {label_id: place for place, ids in enumerate(groups.values()) for label_id in ids}


def _things(root: Path) -> tuple[Mapping[str, Sequence[int]], str]:
    """``{super-category: ids of its things}``, sorted, and where it is from: the table beside the masks, or COCO's."""
    path = next((root / name for name in _PANOPTIC if (root / name).is_file()), None)
    if path is None:
        return _THINGS, "COCO's own table"
    groups: dict[str, list[int]] = {}
    table: Any = read_json(path)
    with reading(path, "a table of things"):
        for category in table["categories"]:
            if category["isthing"]:
                groups.setdefault(str(category["supercategory"]), []).append(int(category["id"]))
    if not groups or not all(0 <= label_id < 256 for ids in groups.values() for label_id in ids):
        raise DataError(f"{path}: no table of things; 'categories' need id (0..255), supercategory and isthing")
    return {name: groups[name] for name in sorted(groups)}, f"table of {path.name}"


def _roboflow(root: Path) -> dict[str, Path]:
    """``{folder: its file of annotations}`` of Roboflow's export, in order."""
    with os.scandir(root) as listing:
        folders = sorted(entry.name for entry in listing if entry.is_dir())
    return {name: path for name in folders if (path := root / name / _ROBOFLOW).exists()}


def _instances(root: Path) -> dict[str, Path]:
    """``{train2017: annotations/instances_train2017.json}`` and so on, in order."""
    folder = next((root / name for name in _INSTANCES if any((root / name).glob("instances_*.json"))), root)
    files = sorted(name for name in os.listdir(folder) if name.startswith("instances_") and name.endswith(".json"))  # noqa: PTH208
    return {Path(name).stem.removeprefix("instances_"): folder / name for name in files}


def _listed(folder: Path, path: Path) -> list[Path]:
    """Images that a file of annotations names, where they have no folder of their own."""
    names = sorted(read_annotations(path).images)
    if outside := [name for name in names if Path(name).is_absolute() or ".." in PurePosixPath(name).parts]:
        raise DataError(f"{path}: the image '{outside[0]}' lies outside of {folder}; names are relative to that folder")
    paths = [folder / name.removeprefix("images/") for name in names]
    if missing := [image for image in paths if not image.is_file()]:
        raise DataError(f"{path}: {len(missing):,} of {len(paths):,} images don't exist, the first: {missing[0]}")
    return paths


def _has_masks(root: Path, name: str) -> bool:
    """Whether there are masks of that kind; ``annotations/train2017`` may be anything without the table beside it."""
    has_table = any((root / table).is_file() for table in _PANOPTIC)
    candidates = [folder for folder in _COCO_MASKS[name] if folder != "annotations/{split}" or has_table]
    return any(_find(root, candidates, split) for split in _COCO_SPLITS.values())


def _voc_folder(root: Path) -> Path:
    """Where VOC's own folders begin: the archive's, torchvision's and NeCo's parents are accepted, too."""
    homes = [root / name for name in ("", "VOC2012", "VOCdevkit/VOC2012", "VOCSegmentation")]
    return next((home for home in homes if _find(home, ("ImageSets/Segmentation", "sets"))), root)


def _is_voc(root: Path) -> bool:
    home = _voc_folder(root)
    needed = (
        ("JPEGImages", "images"),
        ("ImageSets/Segmentation", "sets"),
        ("SegmentationClass", "SegmentationClassAug"),
    )
    lists = _find(home, needed[1])
    has_lists = lists is not None and any((lists / f"{name}.txt").is_file() for name in ("trainaug", "train", "val"))
    return has_lists and all(_find(home, names) for names in needed)


def _ade20k_folder(root: Path) -> Path:
    return next((home for home in (root, root / "ADEChallengeData2016") if (home / "annotations").is_dir()), root)


def _warn_unless(root: Path, layout: str, folder: Path, pattern: str) -> str:
    """``layout``, with a warning if no mask is named as in that data set."""
    if not any(folder.parent.glob(f"{folder.name}/{pattern}.*")):
        warnings.warn(
            f"{root}: read as {layout} by its folders, though its files have other names; for classes of your own, "
            "bring images/, masks/ and classes.txt",
            stacklevel=2,
        )
    return layout


def _spell(names: Iterable[str], split: str) -> list[str]:
    return [name.format(split=split) for name in names]


def _find(root: Path, names: Iterable[str], split: str = "") -> Path | None:
    """The first of the folders that is there."""
    return next((root / name for name in _spell(names, split) if (root / name).is_dir()), None)


def _need(root: Path, layout: str, names: Sequence[str]) -> Path:
    found = _find(root, names)
    if found is None:
        raise _missing(root, layout, names)
    return found


def _missing(root: Path, layout: str, names: Sequence[str]) -> DataError:
    there = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    it_has = f"it has: {', '.join(there[:8])}" if there else "it has no folders"
    return DataError(f"{root}: layout '{layout}' needs {' or '.join(names)}; {it_has}")
