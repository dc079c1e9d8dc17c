"""Certainty while drawing: what a classifier says of each frame, and which classifiers are refused."""

import math

import pytest
import torch
from torch.testing import assert_close

from smalti.charts import chart_tree, read_chart
from smalti.errors import ConfigError
from smalti.models.build import build_encoder
from smalti.models.encoder import ClassHead
from smalti.runs import certainty
from smalti.runs.certainty import Classifier, measure_certainty, open_classifier
from smalti.runs.generate import Film


def classifier(weight=0.0, bias=(0.0, 0.0, 0.0), side=32):
    encoder = build_encoder("vit_tiny_patch16_224", img_size=side, patch_size=8, depth=1, seed=0).eval()
    weights = weight * torch.randn(3, encoder.embed_dim, generator=torch.Generator().manual_seed(0))
    encoder.class_head = ClassHead(weights, torch.tensor(bias), ("a", "b", "c"))
    return Classifier("mine", encoder, ("a", "b", "c"))


def film(side=32):
    frames = torch.rand(4, 3, 3, side, side, generator=torch.Generator().manual_seed(1))
    return Film(frames, (4, 8, 16), torch.arange(16).expand(4, -1), (4, 4))


def test_a_head_that_ignores_the_image_gives_its_prior_to_each_class():
    found = measure_certainty(classifier(bias=(0.0, math.log(2), math.log(5))), film(), ["a", "b", "c", "b", "more"])
    assert found.fractions == (0.0, 0.25, 0.5, 1.0)
    assert_close(found.values, torch.tensor([[1 / 8], [2 / 8], [5 / 8], [2 / 8]]).expand(-1, 4))
    assert (found.predicted == 2).all()
    written = found.to_json(["a.png", "b.png", "c.png", "d.png"])
    assert written["mean"] == [0.3125] * 4 and written["top1_at_the_end"] == 0.25
    assert written["images"][2] == {
        "file": "c.png",
        "label": "c",
        "certainty": [0.625] * 4,
        "predicted": ["c"] * 4,
    }


def test_each_frame_is_classified_after_an_empty_one():
    one, shown = classifier(weight=0.05), film()
    found = measure_certainty(one, shown, ["b"] * 4)
    for column in range(4):
        images = shown.frames[:, column - 1] if column else torch.full((4, 3, 32, 32), 0.5)
        with torch.no_grad():
            vectors = one.encoder.image_features(one.encoder.normalize(images))
        logits = vectors @ one.encoder.class_head.weight.T
        assert_close(found.values[:, column], logits.softmax(1)[:, 1])
        assert torch.equal(found.predicted[:, column], logits.argmax(1))
    assert found.values[:, 0].std() < 1e-6 < found.values[:, 1].std()
    line = found.chart.lines[0]
    assert line.x == found.fractions and line.level == 1 / 3
    assert line.y == pytest.approx(found.values.mean(0).tolist())
    assert_close(torch.tensor(line.low), found.values.quantile(0.25, dim=0))
    assert read_chart(chart_tree(found.chart)) == found.chart


def test_images_are_resized_to_the_classifiers_size():
    flat = Film(torch.full((2, 1, 3, 16, 16), 0.25), (4,), torch.arange(4).expand(2, -1), (2, 2))
    large = Film(torch.full((2, 1, 3, 32, 32), 0.25), (4,), torch.arange(4).expand(2, -1), (2, 2))
    small, same = (measure_certainty(classifier(weight=0.05), one, ["a", "a"]) for one in (flat, large))
    assert_close(small.values, same.values)


def test_classifiers_that_do_not_fit_are_refused(monkeypatch):
    encoder = classifier().encoder
    monkeypatch.setattr(certainty, "open_encoder", lambda *a, **k: encoder)
    assert open_classifier("x", ["a", "c"], 3).classes == ("a", "b", "c")
    with pytest.raises(ConfigError, match="does not know the class 'd', only a, b, c; train it on the same classes"):
        open_classifier("x", ["a", "d"], 3)
    with pytest.raises(ConfigError, match="takes images of 3 channels, these have 1"):
        open_classifier("x", ["a"], 1)
    with pytest.raises(ConfigError, match="needs images of classes, but these are drawn without"):
        open_classifier("x", ["a", ""], 3)
    encoder.class_head = None
    with pytest.raises(ConfigError, match="has no classification head with names of classes"):
        open_classifier("x", ["a"], 3)
