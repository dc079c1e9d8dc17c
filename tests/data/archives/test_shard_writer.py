"""Shards that Smalti writes; also the command ``smalti shard``."""

import tarfile

import numpy as np
import pytest

from command import smalti
from smalti.data.archives import shard_writer
from smalti.data.archives.shard_writer import write_shards
from smalti.data.images.folders import open_images
from smalti.data.images.labelled import open_labelled
from smalti.errors import ConfigError, DataError


def described(images):
    """What a set holds, apart from where it lies."""
    return [
        (name, sample.label, sample.split, sample.mask and sample.mask.name, sample.read().tobytes())
        for name, sample in zip(images.names, images.samples, strict=True)
    ]


@pytest.fixture
def folder(write, tmp_path):
    """Class folders with splits."""
    for split, label in (("train", "cat"), ("train", "dog"), ("val", "cat"), ("val", "dog")):
        for number in range(3):
            write(f"images/{split}/{label}/{number}.png")
    return tmp_path / "images"


def test_the_command_writes_shards_that_are_read_as_the_folder(folder, tmp_path):
    out = tmp_path / "shards"
    done = smalti("shard", folder, "--out", out)
    assert done.stdout == f"written: {out}, 12 files in 1 shard\n" and "12 of 12" in done.stderr
    assert described(open_images(out)) == described(open_images(folder))
    error = smalti("shard", folder, "--out", out, code=2).stderr
    assert "is not empty; choose another --out" in error
    assert smalti("shard", folder, "--out", tmp_path / "more", "--quiet").stderr == ""
    assert (tmp_path / "more/000000.tar").read_bytes() == (out / "000000.tar").read_bytes()


def test_a_shard_ends_once_it_is_large_enough(write, tmp_path):
    for number in range(5):
        write(f"images/{number}.bmp", np.zeros((400, 400, 3), np.uint8))
    written = write_shards(open_images(tmp_path / "images"), tmp_path / "shards", size_mib=1)
    assert written[1:] == (5, 2)
    images = open_images(tmp_path / "shards")
    assert images.container == "2 tar shards" and described(images) == described(open_images(tmp_path / "images"))


def test_masks_and_lists_are_kept(write, tmp_path):
    for number in range(4):
        write(f"data/images/{number}.png")
        write(f"data/masks/{number}.png", np.full((24, 32), number % 2, np.uint8))
    (tmp_path / "data/classes.txt").write_text("sky\nsea\n", encoding="utf-8")
    (tmp_path / "data/train.txt").write_text("0\n1\n2\n", encoding="utf-8")
    (tmp_path / "data/val.txt").write_text("3\n", encoding="utf-8")
    write_shards(open_images(tmp_path / "data"), tmp_path / "shards")
    found, expected = (open_labelled(tmp_path / name, need="masks") for name in ("shards", "data"))
    assert found.classes == expected.classes
    for part in ("train", "test"):
        assert described(getattr(found, part)) == described(getattr(expected, part))


def test_class_and_split_of_a_table_become_folders(write, tmp_path):
    rows = [
        f"{write(f'files/{number}.png').name},{'ab'[number % 2]},{'train' if number < 4 else 'val'}"
        for number in range(6)
    ]
    (tmp_path / "files/t.csv").write_text("\n".join(["path,label,split", *rows]), encoding="utf-8")
    write_shards(open_images(tmp_path / "files/t.csv"), tmp_path / "shards")
    images = open_images(tmp_path / "shards")
    assert images.classes == ("a", "b") and images.splits == ("train", "val")
    assert images.names[:2] == ("train/a/0.png", "train/a/2.png")


def test_nothing_is_left_of_shards_that_could_not_be_written(folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(
        ConfigError, match=r"shards: can't be written \(No space left on device\); nothing is left there"
    ):
        write_shards(open_images(folder), tmp_path / "shards")
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_an_image_that_disappears_is_one_line(folder, tmp_path):
    images = open_images(folder)
    (folder / "val/dog/2.png").unlink()
    with pytest.raises(DataError, match=r"val/dog/2\.png: can't be read as a file"):
        write_shards(images, tmp_path / "shards")
    assert not (tmp_path / "shards").exists()


def test_layouts_that_shards_would_not_keep_are_refused(write, tmp_path):
    for split in ("training", "validation"):
        write(f"images/{split}/ADE_0.jpg")
        write(f"annotations/{split}/ADE_0.png", np.ones((24, 32), np.uint8))
    with pytest.raises(DataError, match=r"layout 'ade20k' would lose its masks"):
        write_shards(open_images(tmp_path), tmp_path / "shards")
    assert shard_writer.write_shards(open_images(f"folder={tmp_path}"), tmp_path / "shards").num_files == 4
