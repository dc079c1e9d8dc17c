"""Robustness: areas under curves by hand, models whose answer is known, and settings that can't be used."""

import numpy as np
import pytest
import torch

from smalti.errors import ConfigError
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.protocols.robustness import (
    FAMILIES,
    RobustnessConfig,
    changed,
    curves_of,
    measure,
    robustness,
)
from smalti.functional.orders import random_orders
from smalti.models.build import clone_encoder


def config(**own) -> EvalConfig:
    return EvalConfig(own={"robustness": own})


def test_areas_are_those_of_the_trapezoidal_rule():
    curves = curves_of(RobustnessConfig(drop_ratios=(0.5, 0.1), scales=(0.5, 4)))
    assert curves["random_drop"].levels == (0.0, 0.1, 0.5)
    assert curves["scale"].levels == (0.5, 1.0, 4.0) and curves["scale"].axis == (-1.0, 0.0, 2.0)
    accuracy = np.array([0.9, 0.7, 0.2])
    for name in ("random_drop", "scale"):
        axis = np.array(curves[name].axis)
        expected = np.trapezoid(accuracy, axis) / (axis[-1] - axis[0])
        assert float(curves[name].weights @ torch.from_numpy(accuracy)) == pytest.approx(expected)


def test_a_model_that_is_always_right_has_area_one_and_a_constant_one_the_share_of_its_class(tiny, greys, features_of):
    features = features_of(tiny, greys, "labels")
    curves, test = curves_of(RobustnessConfig()), features.data.test
    labels = torch.tensor([sample.label for sample in test.samples])

    def right(images):  # one batch holds all images, in their order
        return torch.nn.functional.one_hot(labels, len(features.data.classes)).float()[: len(images)]

    found, places = measure(features, right, curves, tuple(range(len(test))), 32, "test")
    assert sorted(places) == list(range(len(test)))
    assert all(one.all() and one.shape == (len(test), len(curves[family].levels)) for family, one in found.items())
    constant, _ = measure(
        features, lambda images: torch.eye(len(features.data.classes))[[2] * len(images)], curves, tuple(places), 32, ""
    )
    share = (labels == 2).double().mean()
    assert all(one.double().mean() == pytest.approx(float(share)) for one in constant.values())


def test_every_level_of_an_occlusion_hides_its_fraction_and_larger_ones_hold_smaller_ones():
    images = torch.ones(3, 3, 32, 32)
    keys, grid = torch.arange(3), (8, 8)
    orders = {"random_drop": random_orders(keys, 64)}
    before = torch.zeros_like(images, dtype=torch.bool)
    for level in (0.25, 0.5, 0.75):
        hidden = changed(images, "random_drop", level, orders, keys, grid) == 0
        assert hidden.double().mean() == pytest.approx(level)
        assert (before <= hidden).all()
        before = hidden


def test_scores_follow_from_the_curves_and_each_head_has_its_own(tiny, greys, features_of):
    scores = robustness(features_of(tiny, greys, "labels"), config(num_images=12))
    assert list(scores.metrics)[:2] == ["auc", "top1"]
    for prefix, head in (("", "linear"), ("finetune_", "finetune")):
        curves = scores.settings["curves"][head]
        assert set(curves) == set(FAMILIES)
        areas = []
        for family, curve in curves.items():
            axis = np.log2(curve["level"]) if family == "scale" else np.array(curve["level"])
            area = np.trapezoid(curve["top1"], axis) / (axis[-1] - axis[0])
            assert scores.metrics[f"{prefix}auc_{family}"] == pytest.approx(area)
            areas.append(area)
        assert scores.metrics[f"{prefix}auc"] == pytest.approx(np.mean(areas))
        for family, curve in curves.items():
            unchanged = curve["level"].index(1.0 if family == "scale" else 0.0)
            assert curve["top1"][unchanged] == pytest.approx(scores.metrics[f"{prefix}top1"])
    # flat grey images: hiding most of one changes its mean, moving it hardly does
    assert scores.metrics["finetune_auc_rotation"] > scores.metrics["finetune_auc_random_drop"]
    assert scores.settings["num_images"] == 12 and len(scores.charts) == 14
    assert np.isfinite(scores.tallies["auc"].part).sum() == scores.tallies["auc"].part.size


def test_two_encoders_see_the_same_changes(tiny, greys, features_of):
    other = clone_encoder(tiny)
    torch.nn.init.normal_(other.vit.patch_embed.proj.weight)
    seen = []
    for encoder in (tiny, other):
        features = features_of(encoder, greys, "labels")
        inputs = []

        def model(images, inputs=inputs, features=features):
            inputs.append(images.clone())
            return torch.zeros(len(images), len(features.data.classes))

        measure(features, model, curves_of(RobustnessConfig(drop_ratios=(0.5,))), (0, 1, 2), 32, "")
        seen.append(inputs)
    assert len(seen[0]) == len(seen[1])
    assert all(torch.equal(one, other) for one, other in zip(*seen, strict=True))


@pytest.mark.parametrize(
    ("own", "line"),
    [
        ({"heads": ()}, r"eval.robustness.heads=\[\]"),
        ({"heads": ("linear", "linear")}, "linear, finetune or both"),
        ({"angles": ()}, r"eval.robustness.angles=\[\]: different levels are needed, 0 is added"),
        ({"scales": (0.5, 1.0)}, "1 is added"),
    ],
)
def test_mistakes_are_one_line(own, line, tiny, greys, features_of):
    with pytest.raises(ConfigError, match=line):
        robustness(features_of(tiny, greys, "labels"), config(**own))
