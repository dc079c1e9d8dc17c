"""Tar and zip files as folders: also ``opening``, ``members``, ``names`` and ``packed_index``."""

import io
import multiprocessing
import os
import pickle
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from smalti.data.archives import members, packed_index
from smalti.data.archives.names import Names
from smalti.data.images.folders import open_images, read_image
from smalti.data.images.labelled import open_labelled
from smalti.errors import DataError, RunError


def tar(path, files, **more):
    """A tar file of ``{member: file or bytes}``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **more) as archive:
        for name, source in files.items():
            content = source if isinstance(source, bytes) else source.read_bytes()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def zipped(path, files, how=zipfile.ZIP_DEFLATED):
    """The same as a zip file."""
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, source in files.items():
            archive.writestr(name, source if isinstance(source, bytes) else source.read_bytes())
    return path


@pytest.fixture
def folder(write, tmp_path):
    """Two classes of three images, of several formats."""
    for label in ("cat", "dog"):
        for number, ending in enumerate(("png", "jpg", "bmp")):
            write(f"images/{label}/{number}.{ending}")
    return tmp_path / "images"


@pytest.fixture
def files(folder):
    """``{name: path}`` of the folder."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*.*"))}


def same(found, folder):
    """Whether a set holds the images of a folder in the same order, with the same labels and splits."""
    expected = open_images(folder)
    assert found.names == expected.names and found.fingerprint() == expected.fingerprint()
    assert found.classes == expected.classes and found.splits == expected.splits
    for one, other in zip(found.samples, expected.samples, strict=True):
        assert (one.label, one.split) == (other.label, other.split)
        assert np.array_equal(one.read(), other.read())
    return True


@pytest.mark.parametrize("how", ["a tar file", "a folder of shards", "a pattern", "shards=", "stored", "deflated"])
def test_archives_are_read_as_the_folder_is(how, files, folder, tmp_path):
    names = [*files]
    if how == "a tar file":
        data = tar(tmp_path / "x.tar", files)
    elif how in ("stored", "deflated"):
        data = zipped(tmp_path / "x.zip", files, {"stored": 0, "deflated": 8}[how])
    else:
        for number, part in enumerate((names[::2], names[1::2])):
            tar(tmp_path / f"shards/{number}.tar", {name: files[name] for name in part})
        path = tmp_path / "shards"
        data = {"a folder of shards": path, "a pattern": path / "?.tar", "shards=": f"shards={path}"}[how]
    assert same(open_images(data), folder)
    assert same(open_images(data), folder), "read by its index"


def test_an_archive_says_what_it_is(files, tmp_path):
    account = open_images(tar(tmp_path / "x.tar", files)).account()
    assert account == "classes: 6 images in a tar file, 2 classes"


def test_splits_come_from_folders_and_from_the_names_of_shards(write, tmp_path):
    for split in ("train", "val"):
        for label in ("a", "b"):
            write(f"whole/{split}/{label}/0.png")
    whole = tmp_path / "whole"
    found = {path.relative_to(whole).as_posix(): path for path in sorted(whole.rglob("*.png"))}
    assert same(open_images(zipped(tmp_path / "x.zip", found)), whole)
    for split in ("train", "val"):
        inside = {name.removeprefix(f"{split}/"): path for name, path in found.items() if name.startswith(split)}
        tar(tmp_path / f"shards/set-{split}-000.tar", inside)
    assert same(open_images(tmp_path / "shards"), whole)
    assert open_images(tmp_path / "shards/set-val-*.tar").splits == ()
    tar(tmp_path / "shards/more.tar", {"a/1.png": next(iter(found.values()))})
    with pytest.raises(DataError, match=r"set-train-000\.tar is named as a split, and more\.tar is not; .*pattern"):
        open_images(tmp_path / "shards")


def test_labels_of_webdataset_are_classes(write, tmp_path):
    image = write("x.png")
    for shard in range(2):
        rows = {
            f"{shard}{n}.{kind}": image if kind == "png" else str(9 + n).encode()
            for n in (0, 1)
            for kind in ("png", "cls")
        }
        tar(tmp_path / f"shards/{shard}.tar", rows)
    images = open_images(tmp_path / "shards")
    assert images.layout == "classes" and images.classes == ("9", "10")
    assert images.labels.tolist() == [0, 1, 0, 1]
    tar(tmp_path / "shards/2.tar", {"20.png": image})
    with pytest.raises(DataError, match=r"1 of 5 images have no \.cls member"):
        open_labelled(tmp_path / "shards", need="labels")


def test_shards_may_repeat_names(write, tmp_path):
    for shard in range(2):
        tar(tmp_path / f"shards/s{shard}.tar", {"0.png": write(f"{shard}.png"), "0.cls": str(shard).encode()})
    images = open_images(tmp_path / "shards")
    assert images.names == ("s0/0.png", "s1/0.png") and images.labels.tolist() == [0, 1]
    assert np.array_equal(images.samples[1].read(), read_image(tmp_path / "1.png"))


def test_masks_and_lists_are_read(write, tmp_path):
    files = {"classes.txt": b"sky\r\nsea\r\n", "train.txt": b"images/0.png\nimages/1.png", "val.txt": b"images/2.png\n"}
    for number in range(3):
        files[f"images/{number}.png"] = write(f"{number}.png")
        files[f"masks/{number}.png"] = write(f"m{number}.png", np.full((24, 32), number % 2, np.uint8))
    data = open_labelled(zipped(tmp_path / "x.zip", files), need="masks")
    assert data.classes == ("sky", "sea") and (len(data.train), len(data.test)) == (2, 1)


def test_members_that_lead_out_of_an_archive_are_left_out(files, tmp_path):
    one = next(iter(files.values()))
    extra = {"../evil.png": one, "a/../../evil.png": one, "/abs/0.png": one, "./abs/1.png": one, ".hid.png": one}
    with pytest.warns(UserWarning, match=r"2 members with '\.\.' in their paths"):
        images = open_images(f"folder={tar(tmp_path / 'x.tar', files | extra)}")
    assert {name for name in images.names if "abs" in name} == {"abs/0.png", "abs/1.png"}
    assert len(images) == 8 and not (tmp_path / "evil.png").exists()


def test_links_lead_to_their_targets(files, tmp_path):
    path = tar(tmp_path / "x.tar", files)
    with tarfile.open(path, "a") as archive:
        for name, target, kind in (
            ("dog/9.png", "cat/0.png", tarfile.LNKTYPE),
            ("dog/8.png", "0.png", tarfile.SYMTYPE),
        ):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, target
            archive.addfile(link)
    with pytest.warns(UserWarning, match=r"1 members that are links"):
        images = open_images(path)
    place = images.names.index("dog/9.png")
    assert np.array_equal(images.samples[place].read(), read_image(files["cat/0.png"]))


def test_long_and_odd_names_are_kept(files, tmp_path):
    image = next(iter(files.values()))
    names = sorted([f"{'long' * 40}/{'n' * 120}.png", "ä/ß.png", "a b/c.png"])
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        images = open_images(f"folder={tar(tmp_path / f'{form}.tar', dict.fromkeys(names, image), format=form)}")
        assert list(images.names) == names
        assert all(sample.read().shape == (24, 32, 3) for sample in images.samples)


@pytest.mark.parametrize("left", [0.3, 0.6, 0.97])
def test_a_cut_tar_is_one_line(left, files, tmp_path):
    path = tar(tmp_path / "x.tar", files)
    with tarfile.open(path) as archive:
        end = archive.getmembers()[-1].offset_data + archive.getmembers()[-1].size
    path.write_bytes(path.read_bytes()[: int(left * end)])
    with pytest.raises(DataError, match=r"x\.tar: .*(cut short|can't be read as a tar file)") as error:
        open_images(path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / packed_index.INDEX_FILE).exists()


def test_a_tar_that_ends_between_members_is_cut_short(files, tmp_path):
    path = tar(tmp_path / "x.tar", files)
    with tarfile.open(path) as archive:
        end = archive.getmembers()[3].offset
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(DataError, match=r"cut short at byte"):
        open_images(path)


def test_a_cut_zip_and_rare_kinds_are_one_line(files, tmp_path):
    path = zipped(tmp_path / "x.zip", files)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"x\.zip: can't be read as a zip file"):
        open_images(path)
    with pytest.raises(DataError, match=r"compressed by method 12"):
        open_images(zipped(tmp_path / "y.zip", files, zipfile.ZIP_BZIP2))
    with tarfile.open(tmp_path / "z.tar.gz", "w:gz") as archive:
        archive.add(next(iter(files.values())), "0.png")
    with pytest.raises(DataError, match=r"z\.tar\.gz: a compressed archive.*decompress it to \.tar"):
        open_images(tmp_path / "z.tar.gz")


def test_archives_without_images_are_one_line(tmp_path):
    with pytest.raises(DataError, match=r"no images found \(its members end in none of jpg"):
        open_images(tar(tmp_path / "x.tar", {"a.pth": b"cos\nsystem\n", "b.pyd": b"."}))
    with pytest.raises(DataError, match=r"layout 'shards' needs"):
        open_images(f"shards={tmp_path / 'nothing*.tar'}")
    with pytest.raises(DataError, match=r"isn't read from a tar file; unpack it"):
        open_images(f"voc={tmp_path / 'x.tar'}")


def test_a_name_twice_is_one_line(files, tmp_path):
    image = next(iter(files.values()))
    path = tar(tmp_path / "x.tar", {"a.png": image, "./a.png": image})
    with pytest.raises(DataError, match=r"x\.tar: holds a\.png 2 times"):
        open_images(path)


def test_a_shard_that_changes_is_indexed_again(files, folder, tmp_path):
    path = tar(tmp_path / "x.tar", files)
    first = open_images(path)
    reordered = dict(reversed([*files.items()]))
    tar(path, reordered)
    os.utime(path, ns=(1, 1))
    with pytest.raises(RunError, match=r"x\.tar: has changed since it was opened; start or resume again"):
        [sample.read() for sample in first.samples]
    assert same(open_images(path), folder)
    path.unlink()
    with pytest.raises(RunError, match=r"x\.tar: can't be read \(No such file"):
        first.samples[0].read()


def test_a_damaged_member_of_a_zip_is_an_unreadable_image(files, tmp_path):
    path = zipped(tmp_path / "x.zip", files, zipfile.ZIP_STORED)
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"x\.zip/cat/0\.png: damaged: its checksum is wrong"):
        open_images(path).samples[0].read()


def test_the_index_is_kept_and_a_damaged_one_is_made_again(files, folder, tmp_path, monkeypatch):
    path = tar(tmp_path / "x.tar", files)
    open_images(path)
    index = tmp_path / packed_index.INDEX_FILE
    with monkeypatch.context() as patch:
        patch.setitem(packed_index.INDEXERS, ".tar", None)  # not called again
        assert same(open_images(path), folder)
        zipped(tmp_path / "y.zip", files)
        assert same(open_images(tmp_path / "y.zip"), folder)
        assert same(open_images(path), folder), "the index of another file keeps this one"
    for damaged in (b"", b"PK", index.read_bytes()[:-300], index.read_bytes().replace(b"cat", b"\0\0\0")):
        index.write_bytes(damaged)
        assert same(open_images(path), folder)


def test_without_permission_the_index_is_in_the_cache_folder(files, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("SMALTI_CACHE", str(tmp_path / "cache"))
    path = tar(tmp_path / "data/x.tar", files)
    (path.parent / packed_index.INDEX_FILE).mkdir()  # nothing can be written there, for root as well
    assert same(open_images(path), folder)
    assert len([*(tmp_path / "cache/indices").iterdir()]) == 1
    monkeypatch.setitem(packed_index.INDEXERS, ".tar", None)
    assert same(open_images(path), folder)


def _read_there(source, index):
    members._opened.clear()  # as in a process that was not forked
    return source.read(index)


def test_other_processes_open_the_archive_themselves(files, tmp_path):
    tar(tmp_path / "shards/0.tar", files)
    source = pickle.loads(pickle.dumps(open_images(tmp_path / "shards").source(3)))
    with multiprocessing.get_context("fork").Pool(1) as pool:
        found = pool.apply(_read_there, (source, 1))
    assert np.array_equal(found, read_image([*files.values()][1]))


def test_a_folder_with_images_is_no_folder_of_shards(files, folder):
    tar(folder / "copy.tar", files)
    assert same(open_images(folder), folder) and open_images(folder).container == ""
    shutil.rmtree(folder / "cat")
    assert len(open_images(folder)) == 3


def test_names_are_found_by_their_place():
    words = sorted(["", "a", "ab", "b/ä", "\udcff"], key=os.fsencode)
    names = Names(words)
    assert list(names) == words == [names[place] for place in range(5)] and names[-1] == words[-1]
    assert [names.find(word) for word in words] == [0, 1, 2, 3, 4] and names.find("aa") is None
    assert list(names[1:3]) == words[1:3] and list(names.take(np.array([3, 0]))) == [words[3], words[0]]
    assert len(Names([])) == 0 and Names([]).find("a") is None
    with pytest.raises(IndexError):
        names[5]
    assert Path("x") / names[1] == Path("x/a")
