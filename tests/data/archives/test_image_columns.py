"""Images in Parquet files and in data sets of Hugging Face; also ``hub``."""

import sys
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smalti.data.archives import image_columns
from smalti.data.images.folders import open_images, read_image
from smalti.data.images.labelled import open_labelled
from smalti.errors import DataError, MissingExtraError, RunError

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
LABELS = (
    '{"info": {"features": {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}'
)


@pytest.fixture
def files(write):
    """Six images."""
    return [write(f"{number}.png") for number in range(6)]


def table(files, paths=True, **columns):
    """As Hugging Face's library writes images."""
    images = [{"bytes": path.read_bytes(), "path": path.name if paths else None} for path in files]
    content = pa.table({"image": pa.array(images, STRUCT), **columns})
    return content.replace_schema_metadata({"huggingface": LABELS})


def holds(images, files):
    """Whether the images are these, in this order."""
    assert len(images) == len(files)
    for sample, path in zip(images.samples, files, strict=True):
        assert np.array_equal(sample.read(), read_image(path))
    return True


@pytest.mark.parametrize("group", [2, 100])
def test_parquet_files_hold_images(group, files, tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(table(files, label=pa.array([0, 1, 0, 1, 0, 1])), path, row_group_size=group)
    images = open_images(path)
    assert images.account() == "parquet: 6 images in a Parquet file, 2 classes" and holds(images, files)
    assert images.classes == ("cat", "dog") and images.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert images.names == tuple(file.name for file in files)
    assert images.fingerprint() == open_images(f"folder={tmp_path}").fingerprint()
    assert holds(open_images(tmp_path / "?.parquet"), files)
    assert len(open_labelled(path, need="labels").test) == 2


def test_row_groups_that_are_kept_have_a_bound(files, tmp_path, monkeypatch):
    pq.write_table(table(files), tmp_path / "x.parquet", row_group_size=1)
    images = open_images(tmp_path / "x.parquet")
    monkeypatch.setattr(image_columns, "_KEPT_BYTES", 2 * files[0].stat().st_size + 500)
    assert holds(images, files) and holds(images, files)
    archive = image_columns.open_parquet(tmp_path / "x.parquet", [tmp_path / "x.parquet"])
    for place in range(6):
        archive.read(place)
    assert 1 <= len(archive._groups) <= 2


def test_splits_come_from_columns_and_from_the_names_of_files(files, tmp_path):
    for split, part in (("train", files[:4]), ("validation", files[4:])):
        pq.write_table(table(part, paths=False), tmp_path / f"{split}-00000-of-00001.parquet")
    images = open_images(tmp_path / "*.parquet")
    assert images.splits == ("train", "val") and holds(images.training(), files[:4])
    assert images.names[0] == "0000000"
    assert holds(open_images(f"hf={tmp_path}").subset("val"), files[4:])
    content = {"name": pa.array(["a"] * 6), "jpg": [path.read_bytes() for path in files], "split": ["train", "dev"] * 3}
    pq.write_table(pa.table(content), tmp_path / "y.parquet")
    assert holds(open_images(tmp_path / "y.parquet").subset("val"), files[1::2])


def test_a_table_of_paths_stays_one(files, tmp_path):
    pq.write_table(pa.table({"path": [path.name for path in files], "embedding": [b"x"] * 6}), tmp_path / "t.parquet")
    assert open_images(tmp_path / "t.parquet").layout == "table"


def test_bad_parquet_files_are_one_line(files, tmp_path):
    path = tmp_path / "x.parquet"
    path.write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"x\.parquet: can't be read as Parquet"):
        open_images(path)
    pq.write_table(pa.table({"a": pa.array([None], STRUCT), "b": pa.array([None], STRUCT)}), path)
    with pytest.raises(DataError, match=r"several columns of images \(a, b\); keep one"):
        open_images(path)
    pq.write_table(pa.table({"image": pa.array([{"bytes": None, "path": "/etc/passwd"}], STRUCT)}), path)
    with pytest.raises(DataError, match=r"x\.parquet/0000000: holds no bytes"):
        open_images(path).samples[0].read()
    pq.write_table(table(files), path)
    images = open_images(path)
    pq.write_table(table(files[:2]), path)
    with pytest.raises(RunError, match=r"has changed since it was opened"):
        images.samples[5].read()


def save_to_disk(folder, content, shards=1):
    """As the library lays a split out."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05d}-of-{shards:05d}.arrow" for number in range(shards)]
    for number, name in enumerate(names):
        part = content.take(pa.array(np.array_split(np.arange(len(content)), shards)[number]))
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, part.schema) as stream:
            stream.write_table(part, max_chunksize=2)
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(str({"_data_files": [{"filename": name} for name in names]}).replace("'", '"'))


@pytest.mark.parametrize("how", ["", "hf="])
def test_a_data_set_on_disk_is_read(how, files, tmp_path):
    save_to_disk(tmp_path / "d", table(files, label=pa.array([0, 1] * 3)), shards=2)
    images = open_images(f"{how}{tmp_path / 'd'}")
    assert images.account() == "hf: 6 images in a Hugging Face data set, 2 classes" and holds(images, files)


def test_splits_of_a_data_set_on_disk_are_read(files, tmp_path):
    save_to_disk(tmp_path / "d/train", table(files[:4], label=pa.array([0, 1] * 2)))
    save_to_disk(tmp_path / "d/test", table(files[4:], label=pa.array([-1, -1])))
    (tmp_path / "d/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    images = open_images(tmp_path / "d")
    assert images.splits == ("train", "test") and holds(images.training(), files[:4])
    assert images.training().labels.tolist() == [0, 1, 0, 1] and images.subset("test").labels is None


def test_bad_data_sets_are_one_line(files, tmp_path):
    with pytest.raises(DataError, match=r"holds no data set of Hugging Face"):
        open_images(f"hf={tmp_path}")
    save_to_disk(tmp_path / "d", table(files))
    (tmp_path / "d/state.json").write_text('{"_data_files": [{"filename": "../x.arrow"}]}')
    with pytest.raises(DataError, match=r"names files outside of its folder"):
        open_images(tmp_path / "d")
    (tmp_path / "d/state.json").write_text("[]")
    with pytest.raises(DataError, match=r"state\.json: can't be read"):
        open_images(tmp_path / "d")
    save_to_disk(tmp_path / "e", table(files))
    arrow = tmp_path / "e/data-00000-of-00001.arrow"
    images = open_images(tmp_path / "e")
    arrow.write_bytes(arrow.read_bytes()[:500])
    with pytest.raises(RunError, match=r"has changed since it was opened"):
        images.samples[0].read()
    with pytest.raises(DataError, match=r"can't be read as an Arrow file"):
        open_images(tmp_path / "e")


def test_a_name_is_downloaded_by_the_library(files, tmp_path, monkeypatch):
    save_to_disk(tmp_path / "d", table(files))
    (tmp_path / "d/state.json").unlink()  # as in the library's cache
    (tmp_path / "d/data-00000-of-00001.arrow").rename(tmp_path / "d/name-train.arrow")
    found = {"train": types.SimpleNamespace(cache_files=[{"filename": str(tmp_path / "d/name-train.arrow")}])}
    asked = []
    fake = types.SimpleNamespace(load_dataset=lambda *words: asked.append(words) or found)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert holds(open_images("hf=owner/name"), files) and asked == [("owner/name",)]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r'needs datasets: pip install "smalti\[hf\]"'):
        open_images("hf=owner/name")
    with pytest.raises(DataError, match=r"hf=PATH needs a folder, or OWNER/NAME"):
        open_images("hf=nothing")


def test_the_library_writes_what_is_read(files, tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs Hugging Face's datasets")
    content = {"image": [str(path) for path in files], "label": [0, 1] * 3}
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"]))
    whole = datasets.Dataset.from_dict(content, features=features)
    datasets.DatasetDict(train=whole, test=whole.select([0, 1])).save_to_disk(tmp_path / "d")
    images = open_images(tmp_path / "d")
    assert images.splits == ("train", "test") and images.classes == ("cat", "dog")
    assert holds(images.training(), files)
    datasets.load_from_disk(tmp_path / "d")["train"].to_parquet(tmp_path / "x.parquet")
    assert holds(open_images(tmp_path / "x.parquet"), files)
