import errno
import json
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from smalti.data.images.folders import open_images
from smalti.data.images.labelled import eval_image
from smalti.errors import ConfigError, DataError, ShapeError
from smalti.exporters import embeddings
from smalti.exporters.embeddings import embed
from smalti.models.build import build_encoder
from smalti.models.encoder import Encoder


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return build_encoder("vit_tiny_patch16_224", img_size=32, seed=0, depth=1, embed_dim=24).eval()


@pytest.fixture
def images(tmp_path: Path):
    """Seven images of different shapes, the third of them broken."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(7):
        shape = (40 + 3 * number, 60 - 2 * number, 3)
        cv2.imwrite(str(folder / f"{number}.png"), rng.integers(0, 256, shape, dtype=np.uint8))
    (folder / "2.png").write_bytes(b"broken")
    return open_images(folder)


def expected(encoder: Encoder, images, level: str) -> np.ndarray:
    rows = []
    for path in images.paths:
        if path.name != "2.png":
            pixels = eval_image(path, 32, 3, "crop" if level == "image" else "squash")
            with torch.no_grad():
                features = encoder.encode(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None])
            rows.append(features.prefix[:, 0] if level == "image" else features.patches)
    return torch.cat(rows).numpy()


def read(path: Path, level: str) -> tuple[list[str], np.ndarray]:
    """Paths and features in a file of either format."""
    if path.suffix == ".npz":
        with np.load(path) as file:
            if level == "patch":
                assert set(file["grid_h"].tolist()) == set(file["grid_w"].tolist()) == {2}
            return file["path"].tolist(), file["embedding" if level == "image" else "tokens"]
    table = pq.read_table(path)
    dim = int(table.schema.metadata[b"embed_dim"])
    numbers = table["embedding" if level == "image" else "tokens"].combine_chunks()
    rows = numbers.flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1, dim)
    if level == "patch":
        assert set(table["grid_h"].to_pylist()) == set(table["grid_w"].to_pylist()) == {2}
    return table["path"].to_pylist(), rows[:, 0] if level == "image" else rows


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("level", ["image", "patch"])
@pytest.mark.parametrize("ending", [".parquet", ".npz"])
def test_what_is_written_is_what_the_encoder_says(encoder, images, tmp_path, ending, level, dtype):
    calls = []
    done = embed(
        encoder,
        images,
        tmp_path / "new" / f"features{ending}",
        level=level,
        batch_size=3,
        dtype=dtype,
        progress=lambda *numbers: calls.append(numbers),
    )
    paths, rows = read(done.path, level)
    assert paths == [str(path) for path in images.paths if path.name != "2.png"]
    assert rows.dtype == dtype and rows.shape == (6, *done.shape)
    tolerance = 1e-5 if dtype == "float32" else 4e-3
    np.testing.assert_allclose(rows, expected(encoder, images, level), atol=tolerance)
    assert done.count == 6 and [path.name for path, _ in done.skipped] == ["2.png"]
    assert calls == [(3, 7), (6, 7), (7, 7)]
    assert "6 images" in str(done) and "unreadable and skipped: 1, the first" in str(done)
    assert [path.name for path in done.path.parent.iterdir()] == [done.path.name]


@pytest.mark.parametrize("level", ["image", "patch"])
def test_both_formats_have_the_same_columns(encoder, images, tmp_path, level):
    table = pq.read_table(embed(encoder, images, tmp_path / "f.parquet", level=level).path)
    with np.load(embed(encoder, images, tmp_path / "f.npz", level=level).path) as file:
        assert set(file) == {*table.column_names, "smalti"}
        assert {len(file[name]) for name in table.column_names} == {len(table)}
        assert json.loads(str(file["smalti"])) == json.loads(table.schema.metadata[b"smalti"])


def test_many_batches_make_few_row_groups(encoder, images, tmp_path, monkeypatch):
    embed(encoder, images, tmp_path / "one.parquet", batch_size=1)
    assert pq.ParquetFile(tmp_path / "one.parquet").num_row_groups == 1
    monkeypatch.setattr(embeddings, "_ROW_GROUP_BYTES", 1)
    embed(encoder, images, tmp_path / "more.parquet", batch_size=2)
    assert pq.ParquetFile(tmp_path / "more.parquet").num_row_groups == 4
    more, one = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("more", "one"))
    assert more["path"].equals(one["path"])
    vectors = [np.stack(table["embedding"].to_numpy()) for table in (more, one)]
    np.testing.assert_allclose(*vectors, atol=1e-5)  # the size of a batch moves rounding, with two threads


def test_the_mean_patch_can_stand_for_an_image(encoder, images, tmp_path):
    _, rows = read(embed(encoder, images, tmp_path / "f.npz", pool="avg").path, "image")
    pixels = torch.from_numpy(eval_image(images.paths[0], 32, 3, "crop").copy()).permute(2, 0, 1)[None]
    with torch.no_grad():
        np.testing.assert_allclose(rows[0], encoder.encode(pixels).patches.mean(1)[0].numpy(), atol=1e-5)


def test_the_settings_stand_in_the_file(encoder, images, tmp_path):
    embed(encoder, images, tmp_path / "f.parquet", image_size=48)
    note = json.loads(pq.read_schema(tmp_path / "f.parquet").metadata[b"smalti"])
    assert note["image_size"] == 48 and note["encoder"] == encoder.config()


def test_what_can_not_be_used_is_one_line(encoder, images, tmp_path):
    for change, match in (
        (dict(out=tmp_path / "f.csv"), r"ends in \.parquet or \.npz"),
        (dict(level="token"), "level=token: one of image, patch"),
        (dict(dtype="int8"), "dtype=int8: one of float32, float16"),
        (dict(pool="max"), "pool='max'"),
        (dict(batch_size=0), "batch_size=0"),
    ):
        with pytest.raises(ConfigError, match=match):
            embed(encoder, images, **{"out": tmp_path / "f.npz", **change})
    with pytest.raises(ShapeError, match="does not divide"):
        embed(encoder, images, tmp_path / "f.npz", image_size=50)
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(ConfigError, match="is a folder"):
        embed(encoder, images, tmp_path / "folder.npz")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="can't be written"):
        embed(encoder, images, tmp_path / "file" / "f.npz")


@pytest.mark.parametrize("ending", [".parquet", ".npz"])
def test_without_a_readable_image_no_file_is_left(encoder, images, tmp_path, ending):
    for path in images.paths:
        path.write_bytes(b"broken")
    with pytest.raises(DataError, match=r"none of 7 images can be read; the first: .*0.png"):
        embed(encoder, images, tmp_path / "out" / f"f{ending}")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(("ending", "sink"), [(".parquet", "_Parquet"), (".npz", "_Npz")])
def test_a_full_disk_leaves_the_old_file(encoder, images, tmp_path, monkeypatch, ending, sink):
    out = tmp_path / "out" / f"f{ending}"
    out.parent.mkdir()
    out.write_text("old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(getattr(embeddings, sink), "write", full)
    with pytest.raises(ConfigError, match=r"can't be written \(No space left on device\)"):
        embed(encoder, images, out)
    assert out.read_text() == "old" and list(out.parent.iterdir()) == [out]


def test_numbers_too_large_for_half_precision_are_refused(images, tmp_path):
    encoder = build_encoder("vit_tiny_patch16_224", img_size=32, seed=0, depth=1, embed_dim=24)
    with torch.no_grad():
        encoder.vit.norm.weight.fill_(1e6)
    with pytest.raises(ConfigError, match="not finite as float16; use dtype=float32"):
        embed(encoder.eval(), images, tmp_path / "f.npz", dtype="float16")
