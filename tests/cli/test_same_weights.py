"""Training on a data source equals training on the folder of its images, bit for bit."""

import zipfile

import pytest
from safetensors.numpy import load_file

from command import smalti

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


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("make", [shards, zipped])
def test_every_source_trains_the_same_weights(make, workers, weights, photos, tmp_path):
    assert trained(make(photos, tmp_path / "source"), tmp_path / "run", workers) == weights
