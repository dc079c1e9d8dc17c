"""Training on a data source equals training on the folder of its images, bit for bit."""

import zipfile

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from command import smalti
from smalti.data.images import folders

RUN = (
    "mae encoder=vit_tiny_patch16_224 encoder.patch_size=8 encoder.embed_dim=24 encoder.depth=1 encoder.num_heads=3 "
    "data.image_size=16 batch_size=4 optim.lr=1e-3 steps=20 method.decoder_dim=16 method.decoder_depth=1 "
    "method.decoder_num_heads=2 devices=cpu"
).split()


def trained(data, out, workers):
    """Weights after training on data."""
    smalti("train", *RUN, "--data", data, "--out", out, f"data.num_workers={workers}", "--quiet")
    return {
        name: array.tobytes()
        for name, array in load_file(out / "checkpoints/step_00000020/weights.safetensors").items()
    }


@pytest.fixture(scope="session")
def weights(photos, tmp_path_factory):
    """Of the folder."""
    return trained(photos, tmp_path_factory.mktemp("runs") / "folder", 0)


def shards(photos, out):
    smalti("shard", photos, "--out", out, "--quiet")
    return out


def zipped(photos, out):
    with zipfile.ZipFile(out.with_suffix(".zip"), "w") as archive:
        for path in photos.iterdir():
            archive.write(path, path.name)
    return out.with_suffix(".zip")


def content(photos):
    paths = sorted(photos.iterdir())
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.table({"image": pa.array([{"bytes": p.read_bytes(), "path": p.name} for p in paths], kind)})


def parquet(photos, out):
    pq.write_table(content(photos), out.with_suffix(".parquet"), row_group_size=5)
    return out.with_suffix(".parquet")


def hugging_face(photos, out):
    out.mkdir()
    with pa.OSFile(str(out / "data.arrow"), "wb") as file, pa.ipc.new_stream(file, content(photos).schema) as stream:
        stream.write_table(content(photos))
    (out / "dataset_info.json").write_text("{}", encoding="utf-8")
    (out / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}', encoding="utf-8")
    return f"hf={out}"


def remote(photos, out):
    for path in shards(photos, out).iterdir():
        fsspec.filesystem("memory").pipe_file(f"/same/{path.name}", path.read_bytes())
    return "memory://same/*.tar"


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("make", [shards, zipped, parquet, hugging_face, remote])
def test_every_source_trains_the_same_weights(make, workers, weights, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("SMALTI_CACHE", str(tmp_path / "cache"))
    assert trained(make(photos, tmp_path / "source"), tmp_path / "run", workers) == weights


def test_a_start_scans_a_folder_once(photos, tmp_path, monkeypatch):
    scanned = []
    scan = folders.find_images
    monkeypatch.setattr(folders, "find_images", lambda root: scanned.append(root) or scan(root))
    trained(photos, tmp_path / "run", 0)
    smalti("train", "--resume", tmp_path / "run", "--quiet")
    assert scanned == [photos, photos], "one by the start, one by its resumption"
