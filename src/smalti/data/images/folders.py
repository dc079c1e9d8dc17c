"""Readers: a folder tree, an archive, a list or table of files, class folders, images with masks or a public data set
becomes one :class:`ImageSet`.

The layout is detected, or forced by ``NAME=PATH``; what could be read in two ways is refused. Images are not decoded
here, apart from a few where one of two folders may hold masks; order never depends on the file system.
"""

import itertools
import os
import re
import unicodedata
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np

from smalti.config import unknown_key
from smalti.data.archives.hub import download
from smalti.data.archives.image_columns import ImageColumns, is_hf, open_hf
from smalti.data.archives.members import Archive, archive_at, remember
from smalti.data.archives.names import Names
from smalti.data.archives.opening import PACKED, PARQUET, open_archive, shards_in
from smalti.data.archives.remote import as_url
from smalti.data.images import datasets
from smalti.data.images.decode import read_image as read_image
from smalti.data.images.image_files import Found, FoundNames, find_images, first_of, has_images
from smalti.data.images.image_set import SPLIT_ORDER, PlainSamples, as_text, expand_home, read_class_names
from smalti.data.images.image_set import SPLITS as SPLITS
from smalti.data.images.image_set import ImageSample as ImageSample
from smalti.data.images.image_set import ImageSet as ImageSet
from smalti.data.images.mask_folders import (
    IMAGE_FOLDERS,
    find_mask_folders,
    masks_beside,
    read_masks,
    refuse_masks_as_classes,
)
from smalti.data.images.splits import (
    check_same_splits,
    folder_splits,
    image_keys,
    lists_images,
    read_split_lists,
    split_of,
    stray_note,
    text_files,
)
from smalti.data.images.tables import TABLES, read_list, read_table, rows_as_set, sorted_labels
from smalti.errors import ConfigError, DataError

ClassDepth = int | Literal["deepest"]
"""How many folders name a class: 1 the outermost, 2 ``a/b``, and so on; ``deepest`` the folder of the image alone."""
SHARDS = "shards"
"""Reader of tar and zip files."""
HF = "hf"
"""Reader of data sets of Hugging Face, in a folder or by name."""
_MOST_STRAYS = 0.02
_ENOUGH_FOR_ONE = 10
"""Images outside of class folders are left out if they are at most this fraction, or one beside this many; beyond it,
the folders are no classes."""
_OWN = ("folder", "classes", "masks")
"""Layouts of one's own, which take splits from lists."""


class LeftOut(UserWarning):
    """Images of a data set that are left out, and why; or a folder that is read in an unexpected way."""


def open_images(data: str | Path, layout: str | None = None, *, class_depth: ClassDepth | None = None) -> ImageSet:
    """The images at a path, their layout detected or forced.

    Images that are left out are counted in ``left_out`` and in a warning.

    Args:
        data: a folder; a tar, zip or Parquet file with images, or a pattern of several; a data set of Hugging Face; a
            list or a table. ``NAME=PATH`` forces the reader NAME.
        layout: forces a reader as well: ``folder``, ``list``, ``table``, ``classes``, ``masks``, ``shards`` (tar and
            zip files, whose members are read as files of a folder would be) or ``hf``. ``folder`` takes all
            images of the tree as one set; ``list`` a text file with a path a line, relative to it or absolute, perhaps
            with a label; ``table`` CSV, JSONL or Parquet with the columns path and label, split, group; ``classes``
            ``CLASS/img`` or ``SPLIT/CLASS/img``; ``masks`` ``images/`` with ``masks/`` or ``instances/``, by stem.
            Those of :mod:`~smalti.data.images.datasets` take the folders that a public data set comes in.
        class_depth: how many folders name a class, where class folders are nested; None: one is expected.

    Raises:
        ConfigError: if there is no reader of that name.
        DataError: if the path is missing, holds no images, doesn't fit the layout, or could be read in two ways; one
            line.
    """
    path, layout = _split_name(data, layout)
    if layout is not None and layout not in READERS:
        raise ConfigError(unknown_key(layout, READERS, "--data", kind="reader"))
    if (archive := _archive_at(path, layout)) is not None:
        images = _read_archive(archive, layout, class_depth)
    elif (url := as_url(path)) is not None:
        raise DataError(f"{as_text(url)}: only tar and zip files are read from other machines; name one, or x/*.tar")
    elif not path.exists():
        raise DataError(f"{as_text(path)}: no such file or folder")
    elif not (path.is_file() or path.is_dir()):  # reading a pipe may never end
        raise DataError(f"{as_text(path)}: is neither a file nor a folder")
    else:
        images = _read(path, layout, class_depth)
    if notes := [*images.remarks, *([f"left out: {', '.join(images.left_out)}"] if images.left_out else [])]:
        warnings.warn(f"{as_text(images.root)}: {'; '.join(notes)}", LeftOut, stacklevel=2)
    return images


def _split_name(data: str | Path, layout: str | None) -> tuple[Path, str | None]:
    """``NAME=PATH`` apart; a path that exists is a path, whatever signs are in it."""
    path = expand_home(data)
    if layout is None and not path.exists():
        match = re.fullmatch(r"([A-Za-z][\w-]*)=(.*)", str(data), re.DOTALL)
        if match:
            return expand_home(match[2]), match[1]
    return path, layout


def _archive_at(path: Path, layout: str | None) -> Archive | None:
    """The archive that a path names, opened; None for files and folders.

    Raises:
        DataError: if it can't be read, or there is none but one is named.
    """
    if layout == HF and not path.exists():
        path = download(str(path))
    if layout == HF or (layout is None and is_hf(path)):
        found = open_hf(path) if path.is_dir() else None
        if found is None:
            raise DataError(
                f"{as_text(path)}: holds no data set of Hugging Face (dataset_info.json, dataset_dict.json or Parquet "
                "files with images)"
            )
        remember(found)
        return found
    if path.is_dir() and layout not in (None, SHARDS):
        return None
    if path.is_dir():
        shards = None if layout is None and has_images(path) else shards_in(path)
        if shards is None:
            if layout is None:
                _name_archives(path)
                return None
            raise DataError(f"{as_text(path)}: holds no tar file; layout 'shards' needs some")
        path = shards
    archive = None if layout in ("list", "table") and not path.suffix.lower() == PARQUET else open_archive(path)
    if archive is not None:
        remember(archive)
    elif layout == SHARDS:
        raise DataError(f"{as_text(path)}: names no tar or zip file; layout 'shards' needs one")
    return archive


def _name_archives(folder: Path) -> None:
    """Refuse a folder without images that holds archives, with the name of one.

    Raises:
        DataError: for the first.
    """
    if not has_images(folder):
        endings = (*PACKED, PARQUET)
        if names := sorted(name for name in os.listdir(folder) if name.lower().endswith(endings)):  # noqa: PTH208
            raise DataError(
                f"{as_text(folder)}: no images found, but {as_text(names[0])}; give the path of the file, or a pattern "
                f"such as '{as_text(folder)}/*{Path(names[0]).suffix}'"
            )


def _read_archive(archive: Archive, layout: str | None, class_depth: ClassDepth | None) -> ImageSet:
    """The members of an archive, read as the files of a folder are; labels of members count where folders give none."""
    root = archive.root
    if isinstance(archive, ImageColumns):
        if layout not in (None, "folder", "table", HF):
            raise DataError(f"{as_text(root)}: layout '{layout}' isn't read from {archive.container}")
        rows = [(number, row if layout != "folder" else {}) for number, row in enumerate(archive.rows)]
        named = HF if layout == HF or root.is_dir() else "parquet"
        images = rows_as_set(root, named, rows, [root / name for name in archive.row_names])
    elif not archive.has_folders:
        images = _read_folder(root)
    elif layout in (None, SHARDS):
        found = find_images(root)
        images = _detect_own(root, found, class_depth)
        if images.layout in _OWN and not images.splits:
            _refuse_other_lists(root, images, found.lists)
    elif layout == "classes":
        images = _read_classes(root, class_depth)
    elif layout in _OWN:
        images = READERS[layout](root)
    else:
        raise DataError(f"{as_text(root)}: layout '{layout}' isn't read from {archive.container}; unpack it")
    if archive.labels is not None and images.layout == "folder":
        images = _with_member_labels(images, archive)
    return replace(images, container=archive.container, left_out=(*images.left_out, *archive.left_out))


def _with_member_labels(images: ImageSet, archive: Archive) -> ImageSet:
    """The classes that an archive gives its members; unchanged unless every image has one."""
    assert archive.labels is not None
    start = len(f"{archive.root}/")
    places = [archive.names.find(str(path)[start:]) for path in images.paths]
    labels = [archive.labels[place] for place in places if place is not None]
    if missing := labels.count(""):
        return replace(images, no_labels=f"{missing:,} of {len(labels):,} images have no .cls member")
    classes = sorted_labels(set(labels))
    number_of = {name: place for place, name in enumerate(classes)}
    samples = tuple(
        replace(sample, label=number_of[label]) for sample, label in zip(images.samples, labels, strict=True)
    )
    return replace(images, layout="classes", samples=samples, classes=tuple(map(as_text, classes)))


def _read(path: Path, layout: str | None, class_depth: ClassDepth | None) -> ImageSet:
    is_table = path.suffix.lower() in TABLES
    if layout is None and path.is_file():
        if path.suffix.lower() != ".txt" and not is_table:
            raise DataError(
                f"{as_text(path)}: a file; give a folder of images, an archive ({', '.join(PACKED)}), a .txt list with "
                f"one path a line, or a table ({', '.join(TABLES)})"
            )
        layout = "table" if is_table else "list"
    if layout is None:
        return _detect(path, class_depth)
    of_file = {"list": "a text file with one path a line", "table": f"a file ({', '.join(TABLES)})"}
    if path.is_dir() == (layout in of_file):
        raise DataError(
            f"{as_text(path)}: layout '{layout}' needs {of_file.get(layout, 'a folder')}, this is a "
            f"{'folder' if path.is_dir() else 'file'}"
        )
    if layout == "classes":
        return _read_classes(path, class_depth)
    return READERS[layout](path)


def _detect(root: Path, class_depth: ClassDepth | None) -> ImageSet:
    if known := _known_folders(root):
        return READERS[known](root)
    found = find_images(root)
    images = _detect_own(root, found, class_depth)
    if images.layout in _OWN and not images.splits:
        _refuse_other_lists(root, images, found.lists)
    tables = sorted(name for name in os.listdir(root) if name.lower().endswith(TABLES) and not name.startswith("."))  # noqa: PTH208
    if tables:
        note = f"{len(tables)} table{'s' * (len(tables) > 1)}, which table=FILE reads ({first_of(tables)})"
        images = replace(images, not_read=(*images.not_read, note))
    return images


def _known_folders(root: Path) -> str | None:
    """The reader of a public data set whose folders are there; None if folders called masks say that it is none."""
    with os.scandir(root) as listing:  # quicker than iterdir, where it holds a million images
        folders = {entry.name.lower() for entry in listing if entry.is_dir()}
    return None if "images" in folders and folders & {"masks", "instances"} else datasets.detect(root)


def _detect_own(root: Path, found: Found, class_depth: ClassDepth | None) -> ImageSet:
    """Masks, class folders or one set of images, perhaps in an outer folder, as archives are packed."""
    has_masks = () in find_mask_folders(root, found.names)
    if not has_masks and (folder := _only_folder(found.names.counts)):
        inside = found.inside(folder)
        known = None if archive_at(root) else _known_folders(root / folder)
        images = READERS[known](root / folder) if known else _detect_own(root / folder, inside, class_depth)
        images = _with_lists(images, root) if images.layout in _OWN else images
        if images.layout == "masks" and images.classes is None:
            images = replace(images, classes=read_class_names(root))
        if images.layout != "folder" or images.splits:
            start = f"{folder}/"
            strays = FoundNames([text for text in found.names.texts if not text.startswith(start)])
            beside = [stray_note(strays, f"beside {as_text(folder)}/")] if strays else []
            notes = [note for note in images.not_read if note not in inside.not_read]
            return replace(images, not_read=(*notes, *beside, *found.not_read))
    if find_mask_folders(root, found.names.one_each):
        return read_masks(root, found)
    return _detect_plain(root, found, class_depth)


def _only_folder(counts: Mapping[str, int]) -> str | None:
    """The outermost folder that holds all images, apart from a few that lie less deep; None if folders at the top
    are splits or classes.

    Args:
        counts: how many images lie right in each folder.
    """
    tops = Counter[str]()
    for folder, count in counts.items():
        tops[folder.partition("/")[0]] += count
    if any(split_of(top) for top in tops if top):
        return None
    outer, count = tops.most_common(1)[0]
    depth_of = {folder: folder.count("/") + 2 if folder else 1 for folder in counts}
    depths = [depth for folder, depth in depth_of.items() if folder.partition("/")[0] == outer]
    stray_depths = [depth for folder, depth in depth_of.items() if folder.partition("/")[0] != outer]
    is_outer = max(depths) > 2 and (not stray_depths or max(2, *stray_depths) < min(depths))
    return outer if is_outer and _are_few(sum(counts.values()) - count, count) else None


def _are_few(strays: int, inside: int) -> bool:
    """Whether so many images in other places may be left out."""
    return strays <= max(inside >= _ENOUGH_FOR_ONE, _MOST_STRAYS * (inside + strays))


def _with_lists(images: ImageSet, home: Path) -> ImageSet:
    """Splits by the lists in a folder that all images lie in; unchanged if it has none.

    Raises:
        DataError: for lists that can't be understood or contradict the folders of splits.
    """
    if not text_files(home):
        return images
    names = _names_from(home, images)
    lists = read_split_lists(home, _list_keys(names), partial=len(images.splits) > 0)
    if images.splits:
        by_folder = {name.as_posix(): sample.split for name, sample in zip(names, images.samples, strict=True)}
        check_same_splits(home, by_folder, lists)
        return images
    if not lists:
        return images
    split = [lists.get(name.as_posix()) for name in names]
    samples = tuple(replace(sample, split=one) for sample, one in zip(images.samples, split, strict=True))
    unlisted = [name for name, one in zip(names, split, strict=True) if one is None]
    notes = (stray_note(unlisted, "in no list"),) if unlisted else ()
    return replace(images, samples=samples, left_out=(*notes, *images.left_out))


def _names_from(home: Path, images: ImageSet) -> list[PurePosixPath]:
    return [PurePosixPath(path.relative_to(home)) for path in images.paths]


def _list_keys(names: Sequence[PurePosixPath]) -> dict[str, str]:
    """What a line of a list may say: a path, perhaps from a folder of images, a split or the only outer folder on."""
    folders = {name.parts[:-1] for name in names}
    outer = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*folders, strict=False))
    parts = {part for parents in folders for part in parents}
    starts = {part for part in parts if part.lower() in IMAGE_FOLDERS or split_of(part)}
    return image_keys(names, starts | {level[0] for level in outer})


def _refuse_other_lists(root: Path, images: ImageSet, lists: Sequence[str]) -> None:
    """Refuse lists of splits in folders that are not searched, such as ``meta/train.txt``."""
    keys = _list_keys(_names_from(root, images)) if lists else {}
    if found := [name for name in lists if lists_images(root / name, keys)]:
        raise DataError(
            f"{as_text(root)}: images are listed in {', '.join(map(as_text, found[:3]))}, where lists are not read; "
            f"move them to {as_text(root)}, or write folder={as_text(root)} to read every image as one set"
        )


def _detect_plain(root: Path, found: Found, class_depth: ClassDepth | None) -> ImageSet:
    """Class folders, or one set of images; with splits where folders or lists name them."""
    beside = masks_beside(found.names)
    masks = {mask for some in beside.values() for mask in some}
    names = found.names.without(masks)
    refuse_masks_as_classes(root, names)
    splits = folder_splits(root, names.one_each)
    kept, strays = names.parted(lambda depth: depth > 0 or not splits)
    notes = [stray_note(strays, "beside the split folders")] if strays else []
    labelled = _class_set(root, kept, len(splits) > 0, class_depth)
    images = replace(
        labelled or ImageSet(root, "folder", PlainSamples(root, Names(kept.texts)), None),
        no_labels="" if labelled else _why_no_classes(kept, len(splits) > 0, class_depth),
    )
    if not splits:
        images = replace(images, remarks=_no_splits(kept, "a class" if labelled else "any other folder"))
    images = _with_lists(_with_splits(images) if splits else images, root)
    if masks and labelled is None and all(len(some) == 1 for some in beside.values()):
        mask_of = {root / image: root / some[0] for image, some in beside.items()}
        samples = tuple(replace(sample, mask=mask_of.get(sample.path)) for sample in images.samples)
        images = replace(images, layout="masks", samples=samples, classes=read_class_names(root))
    elif masks:
        notes.append(stray_note(sorted(masks), "named as masks of others" + ", beside class folders" * bool(labelled)))
        images = replace(images, no_masks=f"{len(masks):,} masks lie beside their images; put them into masks/")
    return replace(images, left_out=(*notes, *images.left_out), not_read=found.not_read)


def _with_splits(images: ImageSet) -> ImageSet:
    """Splits by the outermost folders."""
    old = images.samples
    assert isinstance(old, PlainSamples)
    tops = [name.partition("/")[0] for name in old.names]
    places = {top: SPLIT_ORDER.index(SPLITS[top.lower()]) for top in set(tops)}
    splits = np.fromiter(map(places.__getitem__, tops), np.int8, len(tops))
    return replace(images, samples=PlainSamples(old.root, old.names, old.labels, splits, old.pixels))


def _no_splits(names: FoundNames, as_what: str) -> tuple[str, ...]:
    """A note on folders that are named like a split but aren't one."""
    tops = {folder.partition("/")[0] for folder in names.counts}
    odd = sorted(f"{as_text(top)}/" for top in tops if split_of(top))
    return (f"no split: {', '.join(odd)} is read as {as_what}",) if odd else ()


def _read_folder(root: Path) -> ImageSet:
    found = find_images(root)
    samples = PlainSamples(root, Names(found.names.texts))
    return ImageSet(root, "folder", samples, None, not_read=found.not_read)


def _read_classes(root: Path, class_depth: ClassDepth | None = None) -> ImageSet:
    found = find_images(root)
    folders = [folder for folder in found.names.counts if folder]
    tops = {split_of(folder.partition("/")[0]) for folder in folders}
    has_splits = None not in tops and all("/" in folder for folder in folders)
    images = _class_set(root, found.names, has_splits, class_depth, forced=True)
    if images is None:
        why = _why_no_classes(found.names, has_splits, class_depth)
        raise DataError(f"{as_text(root)}: {why}; layout 'classes' needs CLASS/image or SPLIT/CLASS/image everywhere")
    images = _with_splits(images) if has_splits else replace(images, remarks=_no_splits(found.names, "a class"))
    return replace(_with_lists(images, root), not_read=found.not_read)


def _class_set(
    root: Path,
    names: FoundNames,
    has_splits: bool,
    class_depth: ClassDepth | None,
    forced: bool = False,
) -> ImageSet | None:
    """Images with the class of their folder; None if the folders are no classes.

    A few images that lie elsewhere are left out; no split is set.

    Raises:
        DataError: if two folders have the same name in different Unicode forms.
    """
    inside, strays = _class_level(names, has_splits, class_depth)
    if not inside or not _are_few(len(strays), len(inside)):
        return None
    name_of = {name.parent.as_posix(): _class_name(name, has_splits, class_depth) for name in inside.one_each}
    folders = sorted(set(name_of.values()))
    if len(folders) < 2 and not forced:
        return None
    forms: dict[str, list[str]] = defaultdict(list)
    for folder in folders:
        forms[unicodedata.normalize("NFC", folder)].append(folder)
    if repeated := [form for form, same in forms.items() if len(same) > 1]:
        raise DataError(
            f"{as_text(root)}: two class folders are both called '{repeated[0]}', in different Unicode forms (NFC and "
            "NFD); merge or rename them"
        )
    number = {folder: place for place, folder in enumerate(folders)}
    number_of = {folder: number[name] for folder, name in name_of.items()}
    labels = np.fromiter(map(number_of.__getitem__, inside.folder_of), np.int32, len(inside))
    samples = PlainSamples(root, Names(inside.texts), labels)
    notes: tuple[str, ...] = (stray_note(strays, "outside of the class folders"),) if strays else ()
    return ImageSet(root, "classes", samples, tuple(map(as_text, folders)), left_out=notes)


def _class_level(names: FoundNames, has_splits: bool, class_depth: ClassDepth | None) -> tuple[FoundNames, FoundNames]:
    """The images at the depth where classes are, and the others."""
    if isinstance(class_depth, int):
        return names.parted(lambda depth: depth >= has_splits + class_depth)
    if class_depth == "deepest":
        return names.parted(lambda depth: depth > has_splits)
    return names.parted(lambda depth: depth == has_splits + 1)


def _class_name(name: PurePosixPath, has_splits: bool, class_depth: ClassDepth | None) -> str:
    folders = name.parts[has_splits:-1]
    return folders[-1] if class_depth == "deepest" else "/".join(folders[: class_depth or 1])


def _why_no_classes(names: FoundNames, has_splits: bool, class_depth: ClassDepth | None) -> str:
    depths = {len(name.parts) - has_splits - 1 for name in names.one_each}
    deepest = max(depths)
    inside, strays = _class_level(names, has_splits, class_depth)
    if class_depth is None and deepest > 1 and len(depths) == 1:
        first = "/".join(names[0].parts[has_splits:-1])
        return (
            f"folders are nested {deepest} deep ({as_text(first)}); say which name the class: class_depth=1 for the "
            f"outermost, class_depth=deepest for the innermost"
        )
    if inside and strays:
        few, most = sorted((strays, inside), key=len)
        return (
            f"{len(few):,} of {len(names):,} images don't lie where the others do, such as "
            f"{as_text(str(few[0]))} beside {as_text(str(most[0]))}"
        )
    if inside:
        return "there is only one class folder"
    return f"{as_text(str(names[0]))} has no class folder"


def _read_shards(path: Path) -> ImageSet:
    return open_images(path, SHARDS)


def _read_hf(path: Path) -> ImageSet:
    return open_images(path, HF)


READERS: dict[str, Callable[[Path], ImageSet]] = {
    "folder": _read_folder,
    "classes": _read_classes,
    "list": read_list,
    "table": read_table,
    "masks": read_masks,
    SHARDS: _read_shards,
    HF: _read_hf,
    **datasets.READERS,
}
"""Name -> reader, for ``NAME=PATH``."""
