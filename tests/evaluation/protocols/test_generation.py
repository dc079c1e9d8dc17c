"""Generated images against real ones: equal sets, noise, the numbers by hand, the floor, errors, the page."""

import json
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.testing import assert_close
from torchmetrics.image.fid import FrechetInceptionDistance

from command import smalti
from smalti.config import build
from smalti.data.images.labelled import load_images
from smalti.errors import ConfigError, DataError, MissingExtraError, WeightsError
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.details import read_details, write_details
from smalti.evaluation.evaluate import open_sets
from smalti.evaluation.inception import Inception
from smalti.evaluation.protocols import generation as module
from smalti.evaluation.result import read_results
from smalti.models.build import build_encoder
from smalti.report.evaluation import save_evaluation
from smalti.runs.baseline import evaluate

SHARES = ("precision", "recall", "precision_real", "recall_real")


def small(dim: int = 6):
    """An encoder of so few dimensions that a handful of images is enough."""
    return build_encoder(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=dim, depth=1, num_heads=3, seed=0
    ).eval()


def judge(data, generated, encoder=None, **settings):
    shared = {name: settings.pop(name) for name in ("image_size", "seed", "baseline", "pool") if name in settings}
    own = {"generation": {"generated": str(generated), **settings}}
    config = EvalConfig(protocols=("generation",), own=own, **shared)
    (result,) = evaluate(encoder or small(), "mine", str(data), config)
    return result


def copy_of(greys: Path, split: str, to: Path) -> Path:
    to.mkdir()
    for number, path in enumerate(sorted((greys / split).rglob("*.png"))):
        shutil.copy(path, to / f"{number:03d}.png")
    return to


def noise(to: Path, count: int = 16) -> Path:
    """Blue noise of one kind: none of the grey images is like it."""
    to.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        pixels = rng.integers(0, 60, (32, 32, 3), dtype=np.uint8) + np.array([195, 0, 0], np.uint8)
        assert cv2.imwrite(str(to / f"{number:03d}.png"), pixels)
    return to


def vectors(encoder, paths):
    with torch.no_grad():
        return encoder.image_features(encoder.normalize(load_images(sorted(paths), 32, mode="centre")))


def test_real_images_in_the_place_of_generated_ones_are_at_no_distance(greys, tmp_path):
    result = judge(greys, copy_of(greys, "val", tmp_path / "same"))
    assert result.headline == ("frechet_distance", pytest.approx(0, abs=1e-9))
    assert result.metrics["precision"] == result.metrics["recall"] == 1
    assert result.metrics["frechet_distance_real"] > 0 and result.metrics["frechet_distance_train"] > 0
    assert_close(result.metrics["classifier_score"], result.metrics["classifier_score_real"])


def test_noise_is_further_than_real_images_and_nothing_of_it_looks_real(greys, tmp_path):
    found = judge(greys, noise(tmp_path / "noise"), k=1).metrics
    assert found["frechet_distance"] > 3 * found["frechet_distance_real"]
    assert found["kernel_distance"] > max(3 * found["kernel_distance_real"], 0)
    assert found["precision"] == found["recall"] == 0 and found["recall_real"] > 0.5
    assert found["classifier_score"] < found["classifier_score_real"]  # one class for all of it


def test_the_distance_is_torchmetrics_on_the_same_features(greys, tmp_path):
    folder = copy_of(greys, "train", tmp_path / "fake")
    encoder = small()

    class Same(torch.nn.Module):
        num_features = 6

        def forward(self, x):
            return x.flatten(1)

    metric = FrechetInceptionDistance(feature=Same(), normalize=True, input_img_size=(6, 1, 1))
    metric.set_dtype(torch.float64)
    metric.update(vectors(encoder, (greys / "val").rglob("*.png")).double().view(-1, 6, 1, 1), real=True)
    metric.update(vectors(encoder, folder.glob("*.png")).double().view(-1, 6, 1, 1), real=False)
    found = judge(greys, folder, encoder)
    assert_close(found.metrics["frechet_distance"], metric.compute().item(), rtol=1e-4, atol=1e-7)


def test_units_settings_and_errors_say_what_was_measured(greys, tmp_path):
    result = judge(greys, noise(tmp_path / "noise"), repeats=25)
    assert set(result.units) == set(result.metrics)
    assert all(0 <= result.metrics[name] <= 1 for name in SHARES)
    assert all("lower is better" in result.units[name] for name in result.metrics if "distance" in name)
    assert all("higher is better" in result.units[name] for name in result.metrics if "distance" not in name)
    assert not any("fid" in name for name in result.metrics) and "no number is an FID" in result.settings["features"]
    assert (result.settings["num_generated"], result.settings["num_real"], result.settings["repeats"]) == (16, 16, 25)
    assert result.settings["floor"] == "16 random training images in place of the generated ones"
    assert result.settings["images_note"] == ""
    assert 0 <= result.settings["classifier_accuracy"] <= 1
    errors = result.settings["standard_error"]
    assert set(errors) == {name for name in result.metrics if not name.endswith("_real")}
    assert all(error >= 0 for error in errors.values()) and errors["frechet_distance"] > 0
    assert not result.is_baseline
    json.dumps(result.to_json(), allow_nan=False)
    assert judge(greys, tmp_path / "noise", repeats=25).metrics == result.metrics


def test_without_a_train_split_the_floor_is_of_halves(greys, tmp_path):
    real = copy_of(greys, "train", tmp_path / "real")
    result = judge(real, noise(tmp_path / "noise"))
    assert result.settings["floor"] == "16 real images against 16 others, since there is no train split"
    assert not any(name.endswith("_train") or name.startswith("classifier") for name in result.metrics)
    assert result.metrics["frechet_distance"] > result.metrics["frechet_distance_real"]


def test_too_few_images_for_the_features_are_said_so(greys, tmp_path):
    with pytest.warns(
        UserWarning, match="16 images for features of 12 dimensions: the Fréchet distance is mostly bias"
    ):
        result = judge(greys, noise(tmp_path / "noise"), small(12))
    assert "use at least 24" in result.settings["images_note"]


def test_mistakes_are_found_before_there_is_an_encoder(greys, tmp_path):
    folder = noise(tmp_path / "noise", 2)
    for settings, error, message in (
        ({}, ConfigError, "set eval.generation.generated=FOLDER"),
        ({"generated": str(tmp_path / "no")}, DataError, "no such file or folder"),
        ({"generated": str(folder), "repeats": 5}, ConfigError, "eval.generation.repeats=5: at least 20 is needed"),
        ({"generated": str(folder), "inception": str(tmp_path / "no.pth")}, WeightsError, "does not exist"),
    ):
        with pytest.raises(error, match=message):
            open_sets(str(greys), build(EvalConfig, {"protocols": ["generation"], "generation": settings}))
    with pytest.raises(DataError, match="2 generated images can be read; at least 3 are needed"):
        judge(greys, folder)


def test_a_classifier_of_features_separates_separable_classes():
    centres = torch.tensor([[5.0, 0.0], [0.0, 5.0], [-5.0, -5.0]])
    labels = torch.arange(3).repeat(20)
    points = centres[labels] + torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    shares = module.fit_classifier(points, labels, 0)(centres)
    assert_close(shares.sum(1), torch.ones(3, dtype=torch.float64))
    assert shares.argmax(1).tolist() == [0, 1, 2] and shares.max(1).values.min() > 0.9


def test_errors_shrink_with_the_number_of_images():
    g = torch.Generator().manual_seed(0)
    few, many = (module.distances(*torch.randn(2, n, 4, generator=g), 40, 0).errors for n in (50, 800))
    assert all(many[name] < few[name] / 2 for name in few)


def test_pictures_are_kept_and_shown(greys, tmp_path):
    result = judge(greys, noise(tmp_path / "noise"))
    pictures = result.details.pictures
    assert len(pictures) == 3
    nearest = next(picture for caption, picture in pictures.items() if "nearest of" in caption)
    assert nearest.shape == (8 * 64, 6 * 64, 3) and nearest.dtype == np.uint8
    write_details(tmp_path / "details", [result])
    (again,) = read_details(tmp_path / "details", [result])
    assert list(again.details.pictures) == list(pictures)
    assert all(np.array_equal(again.details.pictures[name], pictures[name]) for name in pictures)
    page = save_evaluation(tmp_path / "out", [result]).read_text()
    assert "Generated (first column) and the nearest of 32 training images" in page
    assert "real images get" in page and "training helped" not in page


def test_the_nearest_training_image_of_a_copy_is_the_original(greys, tmp_path):
    result = judge(greys, copy_of(greys, "train", tmp_path / "same"))
    sheet = next(picture for caption, picture in result.details.pictures.items() if "nearest of" in caption)
    assert np.array_equal(sheet[:, :64], sheet[:, 64:128])


def test_the_command_line_prints_the_numbers_with_their_errors(greys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    folder, out = noise(tmp_path / "noise", 40), tmp_path / "found.json"
    words = ["--data", greys, "--protocol", "generation", "--quiet", "eval.image_size=32"]
    words += [f"eval.generation.generated={folder}", "--json", out]
    done = smalti("evaluate", "random:vit_tiny_patch16_224", *words)
    assert "±" in done.stdout and "mostly bias" in done.stderr
    assert read_results(out)[0].settings["num_generated"] == 40


def test_of_a_folder_of_smalti_generate_the_samples_alone_are_judged(greys, tmp_path):
    (tmp_path / "out" / "images").mkdir(parents=True)
    noise(tmp_path / "out" / "images" / "cat")
    (tmp_path / "out" / "samples.json").write_text("{}")
    shutil.copy(tmp_path / "out" / "images" / "cat" / "000.png", tmp_path / "out" / "grid.png")
    assert judge(greys, tmp_path / "out").settings["num_generated"] == 16


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the form of FID's file."""
    extractor = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", reason="extra gen is not installed")
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extractor, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *_, **__: None)
        torch.manual_seed(0)
        network = extractor.FeatureExtractorInceptionV3("inception", ["2048"])
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def few(greys, tmp_path_factory) -> Path:
    """Two of the classes, six images to train and five to judge on: Inception sees them in 299x299 pixels."""
    root = tmp_path_factory.mktemp("few")
    for place, count in (("train/grey0", 3), ("train/grey1", 3), ("val/grey0", 3), ("val/grey1", 2)):
        (root / place).mkdir(parents=True)
        for path in sorted((greys / place).iterdir())[:count]:
            shutil.copy(path, root / place)
    return root


@pytest.mark.filterwarnings("ignore:generation")
def test_with_inception_s_weights_the_numbers_are_called_fid(few, tmp_path, inception, monkeypatch):
    kept = []

    def distances(a, b, *_):
        kept.append((a, b))
        names = ("frechet_distance", "kernel_distance")
        return module.Distances(dict(zip(names, (1.0, 2.0), strict=True)), dict.fromkeys(names, 0.1))

    monkeypatch.setattr(module, "distances", distances)  # of 2048 dimensions they take a while
    monkeypatch.setattr(module, "frechet_distance", lambda a, b: float(len(a)))
    folder = noise(tmp_path / "noise", 4)
    result = judge(few, folder, inception=str(inception), k=2)
    assert {"fid", "kid", "inception_score", "fid_real", "kid_real"} <= set(result.metrics) == set(result.units)
    assert result.metrics["fid"] == 1.0 and result.metrics["kid"] == 2.0 and result.metrics["fid_real"] == 4
    assert result.settings["inception"].startswith("torch-fidelity")
    assert result.settings["inception_image_size"] == 32
    fake, real = kept[-1]
    assert fake.shape == (4, 2048) and real.shape == (5, 2048)
    expected, _ = Inception(inception)(load_images(sorted(folder.glob("*.png")), 32, mode="centre"))
    assert_close(fake, expected)


@pytest.mark.filterwarnings("ignore:generation")
def test_inception_looks_at_the_size_of_what_was_generated_and_not_at_the_encoder_s(
    few, tmp_path, inception, monkeypatch
):
    kept = []

    def distances(a, b, *_):
        kept.append(a)
        names = ("frechet_distance", "kernel_distance")
        return module.Distances(dict.fromkeys(names, 1.0), dict.fromkeys(names, 0.1))

    monkeypatch.setattr(module, "distances", distances)
    monkeypatch.setattr(module, "frechet_distance", lambda a, b: 0.0)
    folder = noise(tmp_path / "noise", 4)
    result = judge(few, folder, inception=str(inception), k=2, image_size=16)
    assert result.settings["image_size"] == 16 and result.settings["inception_image_size"] == 32
    assert_close(kept[-1], Inception(inception)(load_images(sorted(folder.glob("*.png")), 32, mode="centre"))[0])


@pytest.mark.filterwarnings("ignore:generation")
def test_neighbours_are_as_many_everywhere_and_those_that_are_told(greys, tmp_path):
    folder = noise(tmp_path / "noise", 4)
    assert judge(greys, folder).settings["k"] == 3
    with pytest.raises(ConfigError, match=r"eval.generation.k=4: the images have only 1\.\.3 neighbours"):
        judge(greys, folder, k=4)


def test_weights_of_something_else_are_not_inception_s(tmp_path, inception):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match="not the weights of FID's Inception network"):
        Inception(tmp_path / "other.pth")


def test_without_torch_fidelity_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(
        MissingExtraError, match=r'eval.generation.inception needs torch-fidelity: pip install "smalti\[gen\]"'
    ):
        Inception(tmp_path / "weights.pth")
