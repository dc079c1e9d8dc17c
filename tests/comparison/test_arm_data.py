"""Comparisons on recordings: four methods from the command line, resumed, and each arm with its own reading."""

from pathlib import Path

import pytest
import yaml

from command import smalti
from htmlpage import check_page
from signal_files import noise, save
from smalti.comparison import run as module
from smalti.comparison.arm_data import read_recordings
from smalti.comparison.cell import digest, images_digest
from smalti.comparison.plan import read_plan
from smalti.comparison.run import compare
from smalti.data.images.folders import open_images
from smalti.data.signals.motion_samples import write_motion
from smalti.data.signals.signal_config import SignalConfig
from smalti.data.signals.signal_set import open_signals
from smalti.errors import ConfigError, DataError, RunError

PROTOCOL = "window-classification"
ENCODER = {"name": "vit_tiny_patch16_224", "patch_size": 50, "depth": 1, "embed_dim": 16, "num_heads": 2}
DECODER = {"method.decoder_dim": 16, "method.decoder_depth": 1, "method.decoder_num_heads": 2}
ARMS = {
    "part": {"method": "part"},
    "mae": {"method": "mae", **DECODER},
    "droppos": {"method": "droppos", **DECODER},
    "mp3": {"method": "mp3"},
}


@pytest.fixture(scope="module")
def motion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings of six people with activities."""
    return write_motion(tmp_path_factory.mktemp("motion") / "motion", num_train=4, num_test=2, minutes=1)


@pytest.fixture
def plan(motion: Path) -> dict:
    """Two seeds of one arm, windows of 4 s."""
    return {
        "data": str(motion),
        "evaluate": [{"data": str(motion), "protocols": [PROTOCOL], PROTOCOL: {"steps": 2, "batch_size": 4}}],
        "budget": {"steps": 2},
        "seeds": [0, 1],
        "settings": {
            **{"encoder": ENCODER, "batch_size": 4, "devices": "cpu"},
            **{"data.signal.window_s": 4, "data.signal.resample_hz": 50},
        },
        "arms": {"mp3": {"method": "mp3"}},
    }


def run(plan, out):
    return compare(plan, out, quiet=True, isolate=False)


def test_four_methods_are_compared_each_with_its_untrained_network(plan, tmp_path, monkeypatch):
    plan |= {"arms": {**ARMS, "start": {"load": "random"}, "dino": {"method": "dino"}}, "seeds": [0]}
    result = run(plan, tmp_path / "out")
    assert result.arms == (*ARMS, "start")
    assert result.failures == {
        "dino": "settings: dino learns from images, but the data are signals; use droppos, mae, mp3, part"
    }
    rows = {row.arm: row for row in result.rows if row.is_headline}
    assert {row.metric for row in rows.values()} == {"balanced_top1"}
    assert all(rows[arm].gain_over == "untrained" and rows[arm].gain is not None for arm in ARMS)
    assert rows["start"].gain is None and rows["start"].difference is not None
    assert {row.score.over for row in rows.values()} == {"recordings"}
    assert "resamplings of recordings and seeds" in result.info["intervals"]
    assert result.info["few_seeds"].startswith("One seed: the intervals cover the evaluated recordings, not")
    assert result.costs["part"].images_seen == 8
    said = (tmp_path / "out" / "comparison.md").read_text()
    assert "windows seen" in said and "images" not in said.replace("learns from images", "")

    monkeypatch.setattr(module, "_run", lambda job, isolate: pytest.fail(f"{job.name} was done again"))
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    done = smalti("compare", tmp_path / "plan.yaml", "--out", tmp_path / "out", code=2)  # dino fails
    assert "train on: signals: 6 recordings" in done.stderr and "windows seen" in done.stdout
    page = check_page(tmp_path / "out" / "report.html").text
    assert "Intervals of 95 % over evaluated recordings and seeds" in page and "same recordings, same seeds" in page
    assert "Classes over time" in page


def test_cells_read_recordings_as_they_were_trained(plan, motion, tmp_path):
    plan["seeds"] = [0]
    windows = {"short": {"data.signal.window_s": 2, "data.path": str(motion)}, "long": {"data.signal.window_s": 400}}
    plan["arms"] = {**{arm: {"method": "mp3", **own} for arm, own in windows.items()}, "start": {"load": "random"}}
    result = run(plan, tmp_path / "out")
    assert result.arms == ("short", "start") and "a window is 400 s" in result.failures["long"]
    for cell in result.cells:
        signal = cell.results[0].settings["signal"]
        assert signal["window_s"] == (2.0 if cell.arm == "short" else 4.0)
        assert list(signal["channels"]) == ["x", "y", "z"]
    (folder,) = (cell.folder for cell in result.cells if cell.arm == "short")
    known = read_plan(plan)
    read = read_recordings({"load": str(folder / "run")}, known, known.evaluate)  # a run is read as it was trained
    assert read.entries[0]["signal"]["window_s"] == 2


def test_the_digest_of_recordings_changes_with_their_labels_and_not_with_their_folder(motion, tmp_path):
    config = SignalConfig(window_s=4, resample_hz=50)
    before = images_digest(open_signals(motion, config))
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in motion.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    assert images_digest(open_signals(moved, config)) == before
    labels = (moved / "labels.csv").read_text()
    (moved / "labels.csv").write_text(labels.replace("walk", "run"))
    assert images_digest(open_signals(moved, config)) != before


def test_what_can_not_be_compared_is_one_line_and_writes_nothing(plan, photos, motion, tmp_path):
    entry = plan["evaluate"][0]
    mixed = {**plan, "data": str(photos)}
    with pytest.raises(ConfigError, match=f"{motion} holds recordings, {photos} holds images; a plan"):
        run(mixed, tmp_path / "out")
    own = {"mp3": {"method": "mp3", "data.path": str(photos)}}
    with pytest.raises(ConfigError, match=f"{motion} holds recordings, {photos} holds images; a plan"):
        run({**plan, "arms": own}, tmp_path / "out")
    with pytest.raises(DataError, match="no such file or folder"):
        run({**plan, "data": str(tmp_path / "none")}, tmp_path / "out")
    with pytest.raises(DataError, match="protocol knn needs images, but the data are signals"):
        run({**plan, "evaluate": [{"data": str(motion), "protocols": ["knn"]}]}, tmp_path / "out")
    with pytest.raises(RunError, match=r"all arms failed; dino: .* learns from images"):
        run({**plan, "arms": {"dino": {"method": "dino"}}}, tmp_path / "broken")
    with pytest.raises(DataError, match="no recording has sleep stages"):
        run({**plan, "evaluate": [{"data": str(motion), "protocols": ["sleep-staging"]}]}, tmp_path / "out")
    other = save(tmp_path / "other" / "a.npz", noise(60, channels=2), channels=["u", "v"])
    save(other.parent / "b.npz", noise(60, channels=2), channels=["u", "w"])
    other.with_name("labels.csv").write_text("file,start_s,end_s,label\na.npz,0,60,one\nb.npz,0,60,two\n")
    with pytest.raises(DataError, match="has no channel x, y, z; it has: u, v"):
        run({**plan, "evaluate": [{**entry, "data": str(other.parent)}]}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_digest_of_images_is_that_of_their_files(class_folders):  # cells of earlier comparisons are found again
    images = open_images(class_folders)
    rows = [(sample.path.name, sample.path.stat().st_size, sample.label, sample.split) for sample in images.samples]
    assert images_digest(images) == digest([((name, size), *rest) for name, size, *rest in rows], images.classes)
