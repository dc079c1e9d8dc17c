"""What is said about small folders of our own: as it is read, counted, and what will go wrong."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from tests.command import smalti
from tests.signal_files import noise, save

from smalti.errors import ConfigError, DataError
from smalti.preflight.dataset import look_at_data
from smalti.preflight.report import doctor
from smalti.runs.config import DataConfig


def photo(seed: int, height: int = 90, width: int = 120) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def put(path: Path, image: np.ndarray, *options: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image, options)


def cells() -> np.ndarray:
    mask = np.zeros((90, 120), np.uint8)
    mask[20:50, 30:90] = 1
    return mask


@pytest.fixture
def leaky(tmp_path: Path) -> Path:
    """Classes with splits; one picture of train is saved again in val, and one copied."""
    root = tmp_path / "leaky"
    for number in range(6):
        put(root / "train" / ("blue", "red")[number % 2] / f"{number}.png", photo(number))
    for number in range(3):
        put(root / "val/blue" / f"{number}.png", photo(10 + number))
    half = cv2.resize(photo(3), None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    put(root / "val/red/again.jpg", half, cv2.IMWRITE_JPEG_QUALITY, 60)
    (root / "val/red/copied.png").write_bytes((root / "train/blue/4.png").read_bytes())
    return root


def test_pictures_of_train_that_are_evaluated_are_a_problem(leaky):
    report = look_at_data(str(leaky))
    text = report.lines()
    assert text[1] == "read as      classes: 11 images (train 6, val 5), 2 classes"
    assert text[text.index("classes      2; images of train, val:") + 1 :][:2] == ["  blue: 3, 3", "  red: 3, 2"]
    assert "repeated     0 of 6 training images repeat an earlier one" in text
    assert "shared       2 of 5 val images are also trained on (1 identical, 1 near-duplicate)" in text
    assert f"  {leaky}/val/red/again.jpg = {leaky}/train/red/3.png (near-duplicate)" in text
    (problem,) = report.problems
    assert f"such as {leaky}/val/red/copied.png = {leaky}/train/blue/4.png: these results would be too high" in problem


def test_a_folder_is_not_compared_with_itself(leaky, photos):
    text = look_at_data(str(leaky), against=str(leaky)).lines()
    assert sum(line.startswith("shared") for line in text) == 1
    assert text[-1] == "against      the same folder: its own splits are compared"
    plain = look_at_data(str(photos), against=f"folder={photos}")
    assert plain.lines()[-1] == "against      the same folder, which has no splits: nothing to compare"
    assert not plain.problems
    (problem,) = look_at_data(f"folder={leaky}", against=str(leaky)).problems  # reads val as training images
    assert problem.startswith(f"5 of 5 val images of {leaky} are also trained on (5 identical, 0 near-duplicate)")


def test_a_second_set_is_compared_by_its_evaluated_split(leaky, tmp_path):
    put(tmp_path / "own/a.png", photo(3)), put(tmp_path / "own/b.png", photo(10))
    calls: list[tuple[int, int]] = []
    report = look_at_data(
        str(tmp_path / "own"), against=str(leaky), progress=lambda done, total: calls.append((done, total))
    )
    assert calls == [(done, 7) for done in range(1, 8)]
    shared = report.copies[-1]
    assert shared.of == f"val images of {leaky}" and shared.count == 5
    assert [one.name for one, _ in (*shared.identical, *shared.near)] == ["0.png", "again.jpg"]


def test_a_folder_without_a_training_split_says_so(leaky):
    for path in (leaky / "train").rglob("*.png"):
        path.unlink()
    report = look_at_data(str(leaky))
    assert report.copies == () and report.trained_on == 0
    assert any("holds the split val, but no train" in problem for problem in report.problems)


def test_masks_are_said_with_their_values_and_classes(tmp_path):
    for number in range(3):
        put(tmp_path / f"images/{number}.jpg", photo(number)), put(tmp_path / f"masks/{number}.png", cells())
    (tmp_path / "classes.txt").write_text("background\ncell\n")
    report = look_at_data(str(tmp_path))
    text = report.lines()
    place = text.index("masks        3; values in 3 of them, a sample:")
    assert text[place + 1 : place + 3] == [
        "  0 background: 27,000 pixels (83.3%)",
        "  1 cell: 5,400 pixels (16.7%)",
    ]
    assert report.mask_like is None and not report.problems
    put(tmp_path / "masks/1.png", cells() * 9)
    assert "masks hold the values 9, but classes.txt names 2" in look_at_data(str(tmp_path)).problems[0]


def test_images_of_which_many_look_like_masks_are_a_problem(tmp_path):
    for number in range(6):
        put(tmp_path / "a" / f"{number}.jpg", photo(number)), put(tmp_path / "b" / f"seg{number}.png", cells())
    report = look_at_data(str(tmp_path))
    assert report.account.startswith("classes: 12 images")
    assert any("6 of 12 sampled images have as few values as masks" in text for text in report.problems)


def test_more_than_twenty_classes_are_cut(tmp_path):
    for number in range(23):
        put(tmp_path / f"{number:02d}/a.png", photo(number))
    text = look_at_data(str(tmp_path)).lines()
    assert "classes      23; images:" in text
    assert "  19: 1" in text and "  20: 1" not in text and "  ... and 3 more" in text


def test_channels_come_with_their_setting(tmp_path):
    tifffile = pytest.importorskip("tifffile", reason="tifffile comes with scikit-image")
    for number in range(2):
        values = np.random.default_rng(number).integers(0, 256, (40, 50, 5), dtype=np.uint8)
        tifffile.imwrite(tmp_path / f"{number}.tif", values, photometric="minisblack", planarconfig="contig")
    report = look_at_data(str(tmp_path))
    assert "channels     5: 2; they need data.channels=5" in report.lines()
    assert "data.channels=3 doesn't fit 2 of 2 images" in report.problems[0]
    assert "set data.channels=5" in report.problems[0]
    assert not look_at_data(str(tmp_path), DataConfig(channels=5)).problems
    put(tmp_path / "a.png", photo(0))
    (problem,) = look_at_data(str(tmp_path), DataConfig(channels=5)).problems
    assert problem.endswith("a.png (3 channels); convert or remove the images that don't fit")


def test_the_settings_of_the_data_are_used(tmp_path):
    for name in ("x/a", "x/b", "y/a"):
        put(tmp_path / name / "1.png", photo(sum(name.encode())))
    assert look_at_data(str(tmp_path)).classes is None
    assert look_at_data(str(tmp_path), DataConfig(class_depth=1)).classes == {"x": {"images": 2}, "y": {"images": 1}}
    small = look_at_data(str(tmp_path), DataConfig(max_pixels=100))
    assert len(small.files.unreadable) == 3 and small.trained_on == 0
    done = smalti("doctor", tmp_path, "data.class_depth=2")
    assert "  x/b: 1" in done.stdout and "needs memory" not in done.stdout
    assert "data has no field 'depth'" in smalti("doctor", tmp_path, "data.depth=2", code=2).stderr


def test_values_in_a_small_part_of_16_bits_come_with_the_scale_to_set(tmp_path):
    values = np.arange(1024, dtype=np.uint16).reshape(32, 32) * 4
    put(tmp_path / "a.png", values)
    report = look_at_data(str(tmp_path))
    assert "values       0 to 4092 in uint16 files" in report.lines()
    assert report.problems == ["values reach 4092 of 65535; data.scale=[0,4095] spreads them (12 bits)"]
    assert not look_at_data(str(tmp_path), DataConfig(scale=(0, 4095))).problems
    put(tmp_path / "a.png", values * 16)
    assert not look_at_data(str(tmp_path)).problems


def test_what_could_be_read_in_two_ways_is_refused(tmp_path):
    for number in range(3):
        put(tmp_path / f"a/{number}.png", photo(number)), put(tmp_path / f"b/{number}.png", cells())
    with pytest.raises(DataError, match="those in b/ look like masks"):
        look_at_data(str(tmp_path))


def test_recordings_are_accounted_for(tmp_path):
    for number in range(2):
        save(tmp_path / f"{number}.npz", noise(90, seed=number))
    done = smalti("doctor", tmp_path, "data.signal.rate_hz=100")
    assert "read as      signals: 2 recordings" in done.stdout and done.stdout.endswith("no problems found\n")
    report = look_at_data(f"signals={tmp_path}")
    assert report.files is None and report.account in done.stdout
    with pytest.raises(ConfigError, match="--against compares images"):
        look_at_data(str(tmp_path), against=str(tmp_path))


def test_the_json_holds_the_same_facts(leaky, tmp_path):
    smalti("doctor", leaky, "--json", tmp_path / "facts.json")
    plain = json.loads((tmp_path / "facts.json").read_text())
    data = plain["data"]
    assert data["account"] == look_at_data(str(leaky)).account
    assert data["classes"] == {"blue": {"train": 3, "val": 3}, "red": {"train": 3, "val": 2}}
    assert [(one["of"], len(one["identical"]), len(one["near"])) for one in data["copies"]] == [
        ("training", 0, 0),
        ("val", 1, 1),
    ]
    assert plain["problems"] == doctor(str(leaky)).problems
