"""Write images as tar shards: the files as they are, in the order in which they are trained on."""

import io
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from smalti.data.archives.members import read_bytes
from smalti.data.archives.packed_index import index_files
from smalti.data.images.image_set import ImageSample, ImageSet, as_text
from smalti.data.images.splits import split_of
from smalti.errors import ConfigError, DataError
from smalti.files import folder_beside, is_free
from smalti.reading import reading

_OWN = ("folder", "classes", "masks")
"""Layouts whose names say everything; of others the class and the split become folders."""


class Written(NamedTuple):
    """What was written."""

    folder: Path
    num_files: int
    """Images, masks and lists."""
    num_shards: int


def write_shards(
    images: ImageSet, out: Path, size_mib: int = 512, progress: Callable[[int, int], None] | None = None
) -> Written:
    """Copy images into tar shards of a new folder, with their index.

    Masks, ``classes.txt`` and lists of splits are copied, too. Reading the shards gives the same images in the same
    order, with the same classes, splits and masks; of a list, a table or a Hugging Face data set, ``SPLIT/CLASS/NAME``
    keeps class and split but not the order.

    Args:
        images: as they were read.
        out: a folder that is missing or empty.
        size_mib: a shard ends with the file that makes it larger than this.
        progress: called as ``progress(done, total)``, counting files.

    Raises:
        ConfigError: if ``out`` isn't empty, or can't be written.
        DataError: if a file can't be read, or the layout is one of a public data set.
    """
    if not is_free(out):
        raise ConfigError(f"{out}: is not empty; choose another --out")
    files = _files_of(images)
    names = sorted(files)
    shards = 0
    try:
        with folder_beside(out) as temporary:
            place = 0
            while place < len(names):
                with tarfile.open(temporary / f"{shards:06d}.tar", "w", format=tarfile.PAX_FORMAT) as tar:
                    start = place
                    while place < len(names) and (place == start or tar.offset < size_mib * 2**20):
                        _add(tar, names[place], files[names[place]])
                        place += 1
                        if progress is not None:
                            progress(place, len(names))
                shards += 1
            index_files([temporary / f"{number:06d}.tar" for number in range(shards)])
    except OSError as error:
        raise ConfigError(f"{out}: can't be written ({error.strerror or error}); nothing is left there") from error
    return Written(out, len(names), shards)


def _add(tar: tarfile.TarFile, name: str, source: Path | bytes) -> None:
    if isinstance(source, Path):
        with reading(source, "a file"):
            content = read_bytes(source)
    else:
        content = source
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _files_of(images: ImageSet) -> dict[str, Path | bytes]:
    """``{member: file, or content of a list}``."""
    files: dict[str, Path | bytes] = {}
    if images.layout in _OWN:
        names = [path.relative_to(images.root).as_posix() for path in images.paths]
        files = {path.relative_to(images.root).as_posix(): path for path in _with_masks(images)}
        if any(
            split_of(name.partition("/")[0]) != sample.split for name, sample in zip(names, images.samples, strict=True)
        ):
            for split in images.splits:
                listed = [name for name, sample in zip(names, images.samples, strict=True) if sample.split == split]
                files[f"{split}.txt"] = "".join(f"{name}\n" for name in listed).encode(errors="surrogateescape")
        if images.layout == "masks" and images.classes is not None:
            files["classes.txt"] = "".join(f"{name}\n" for name in images.classes).encode()
        return files
    if any(sample.mask or sample.instances or sample.annotations for sample in images.samples):
        raise DataError(
            f"{as_text(images.root)}: shards of layout '{images.layout}' would lose its masks or boxes; write "
            f"folder={as_text(images.root)} to pack every image without them"
        )
    for sample, name in zip(images.samples, images.names, strict=True):
        member = _named(images, sample, name)
        if member in files:
            raise DataError(f"{as_text(images.root)}: two images would be called {as_text(member)} in a shard")
        files[member] = sample.path
    return files


def _with_masks(images: ImageSet) -> Iterator[Path]:
    for sample in images.samples:
        yield sample.path
        yield from (path for path in (sample.mask, sample.instances) if path is not None)


def _named(images: ImageSet, sample: ImageSample, name: str) -> str:
    """``SPLIT/CLASS/NAME``, the name without folders."""
    label = None if sample.label is None or images.classes is None else images.classes[sample.label]
    folders = [part for part in (sample.split, label) if part is not None]
    return "/".join(part.replace("/", "_").replace(os.sep, "_").lstrip("._") or "_" for part in (*folders, name))
