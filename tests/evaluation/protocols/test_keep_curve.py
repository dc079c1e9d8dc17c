"""Keep curve: areas and knees by hand and by the paper's figure, known heads, orders from a file, mistakes."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import smalti
from smalti.data.images.folders import open_images
from smalti.data.order_files import write_orders
from smalti.errors import ConfigError, DataError, ShapeError
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.evaluate import random_init
from smalti.evaluation.features import Features
from smalti.evaluation.protocols.keep_curve import OWN_HEAD, PAPER_RATES, RATES, TABLE, keep_curve
from smalti.evaluation.result import Result, describe_result, read_results, write_results
from smalti.functional.orders import area_under, knee, num_kept, random_orders
from smalti.layers.token_pruning import PredictionModule, TokenPruning
from smalti.models.build import build_encoder
from smalti.models.encoder import ClassHead, Encoder
from smalti.models.pooling import PatchFeatures
from smalti.models.pruning import encode_pruned
from smalti.runs.baseline import evaluate

STEP = 40
"""Grey value of class k of ``greys`` is k * STEP."""


def tiny_encoder(cls: type[Encoder] = Encoder) -> Encoder:
    built = build_encoder("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, seed=0)
    return built if cls is Encoder else cls(built.vit, built.name, built.model_args, mean=(0.0,), std=(1.0,))


class CornerEncoder(Encoder):
    """Knows an image's class exactly as long as it sees patch 5; the class token holds it as one of five numbers."""

    def encode(self, images: Tensor, norm: bool = True, ids_keep: Tensor | None = None) -> PatchFeatures:
        label = (images.mean((1, 2, 3)) * 255 / STEP).round().long().clamp(0, 4)
        one_hot = torch.nn.functional.one_hot(label, self.embed_dim).float()
        if ids_keep is not None:
            one_hot = one_hot * (ids_keep == 5).any(1, keepdim=True)
        num_patches = 16 if ids_keep is None else ids_keep.shape[1]
        return PatchFeatures(one_hot[:, None].expand(-1, num_patches, -1), one_hot[:, None], (4, 4))


def known_head(classes: tuple[str, ...], order: str = "", orders: str = "") -> ClassHead:
    """Tells class k by number k of the vector, and the last class where there is none."""
    weight = torch.zeros(5, 192)
    weight[torch.arange(5), torch.arange(5)] = 1
    return ClassHead(weight, torch.tensor([0.0, 0.0, 0.0, 0.0, 0.5]), classes, order, orders)


def classes_of(folder: Path) -> tuple[str, ...]:
    return open_images(folder).classes or ()


def orders_file(path: Path, folder: Path, size: int = 4) -> Path:
    images = open_images(folder)
    write_orders(
        path,
        images=images.names,
        splits=[sample.split for sample in images.samples],
        flips=[False] * len(images),
        orders={"collapse": random_orders(torch.arange(len(images)), size * size)},
        grid=(size, size),
        image_size=32,
        root=str(folder),
        source="a test",
        seconds={"collapse": 0.25},
    )
    return path


def test_area_of_a_constant_is_the_span() -> None:
    rates = torch.tensor(PAPER_RATES)
    assert area_under(torch.full((99,), 0.8), rates) == pytest.approx((0.98 * 0.8, 0.8))


def test_area_and_knee_of_the_paper_s_figure() -> None:  # digitised; plotted x is the rate + 0.01
    text = """0.8393 0.8351 0.8367 0.8282 0.8375 0.8363 0.8270 0.8265 0.8294 0.8282 0.8277 0.8266 0.8296 0.8244 0.8246
    0.8258 0.8274 0.8249 0.8271 0.8231 0.8251 0.8287 0.8224 0.8213 0.8202 0.8211 0.8243 0.8237 0.8214 0.8200 0.8223
    0.8212 0.8171 0.8117 0.8115 0.8135 0.8154 0.8103 0.8095 0.8125 0.8111 0.8052 0.8070 0.8077 0.8033 0.8003 0.8063
    0.7986 0.7977 0.7994 0.8042 0.8036 0.7969 0.7948 0.7936 0.7895 0.7841 0.7869 0.7859 0.7811 0.7787 0.7802 0.7767
    0.7854 0.7644 0.7635 0.7625 0.7620 0.7567 0.7477 0.7605 0.7399 0.7379 0.7336 0.7293 0.7203 0.7109 0.7090 0.7045
    0.6947 0.6796 0.6724 0.6653 0.6449 0.6311 0.6212 0.6025 0.5831 0.5707 0.5456 0.5244 0.4889 0.4407 0.4103 0.3586
    0.3128 0.2394 0.1710 0.0711"""
    curve = torch.tensor([float(word) for word in text.split()])
    rates = torch.tensor(PAPER_RATES)
    assert area_under(curve, rates)[0] == pytest.approx(0.7261, abs=5e-5)
    assert knee(curve, rates + 0.01) == pytest.approx(0.79)


def test_an_order_is_worth_what_it_keeps(greys: Path, features_of: Callable[..., Features]) -> None:
    encoder = tiny_encoder(CornerEncoder)
    encoder.class_head = known_head(classes_of(greys))
    scores = keep_curve(
        features_of(encoder, greys, "labels"),
        EvalConfig(own={"keep-curve": {"orders": ("raster", "border_in"), "speed": False}}),
    )
    curve = scores.settings["keep_curve"]
    last_share = 2 / 16  # of the test images, those of the last class
    for rate, top1 in zip(curve["raster"]["rate"], curve["raster"]["top1"], strict=True):
        assert top1 == pytest.approx(1.0 if num_kept(16, rate) > 5 else last_share)  # raster keeps 5 with six patches
    for rate, top1 in zip(curve["border_in"]["rate"], curve["border_in"]["top1"], strict=True):
        assert top1 == pytest.approx(1.0 if num_kept(16, rate) > 12 else last_share)  # it is of the four in the middle
    metrics = scores.metrics
    in_grid = torch.tensor(
        [top1 for rate, top1 in zip(*(curve["raster"][key] for key in ("rate", "top1")), strict=True) if rate in RATES]
    )
    assert metrics["auc"] == pytest.approx(area_under(in_grid, torch.tensor(RATES))[0], abs=1e-6)
    assert metrics["mean_top1"] == pytest.approx(metrics["auc"] / 0.95)
    assert metrics["top1"] == 1.0 and metrics["top1_drop78"] == pytest.approx(last_share)
    assert set(curve) == {"raster", "border_in", "random", "fixed_random"}
    assert scores.tallies["auc"].score() == metrics["auc"]
    assert scores.settings["kept"]["0.78"] == 4 and set(TABLE) <= set(curve["raster"]["rate"])
    assert scores.per_class["recall"] == dict.fromkeys(classes_of(greys), 1.0)
    low, high = curve["raster"]["low"][0], curve["raster"]["high"][0]
    assert low == pytest.approx(1 / (1 + 1.96**2 / 16), abs=1e-3) and high == 1.0  # Wilson's for 16 of 16


def test_a_head_is_fitted_where_the_encoder_has_none(greys: Path, features_of: Callable[..., Features]) -> None:
    scores = keep_curve(
        features_of(tiny_encoder(CornerEncoder), greys, "labels"), EvalConfig(own={"keep-curve": {"speed": False}})
    )
    assert scores.metrics["top1"] == 1.0 and "fitted" in scores.settings["head"]
    assert list(scores.settings["orders"]) == ["halton", "variance", "random", "fixed_random"]
    strange = tiny_encoder(CornerEncoder)
    strange.class_head = known_head(("a", "b", "c", "d", "e"), "raster")
    scores = keep_curve(features_of(strange, greys, "labels"), EvalConfig(own={"keep-curve": {"speed": False}}))
    assert scores.settings["head_note"] == "the run's own head is for other classes"


def test_the_own_order_comes_first_from_its_file_with_the_static_one(
    greys: Path, features_of: Callable[..., Features], tmp_path: Path
) -> None:
    path = orders_file(tmp_path / "orders.parquet", greys)
    encoder = tiny_encoder(CornerEncoder)
    encoder.class_head = known_head(classes_of(greys), "collapse", str(path))
    features = features_of(encoder, greys, "labels")
    scores = keep_curve(features, EvalConfig())
    assert scores.settings["orders"] == ["collapse", "random", "fixed_random", "collapse_static"]
    means = {name: scores.metrics[f"mean_top1_{name}"] for name in ("random", "collapse_static")}
    gain = scores.metrics["mean_top1"] - means["random"]
    ratio = scores.metrics["static_ratio_collapse"]
    assert (
        math.isnan(ratio)
        if gain < 0.005
        else ratio == pytest.approx((means["collapse_static"] - means["random"]) / gain)
    )
    assert scores.settings["ranking_s"] == {
        "collapse": 0.25, "random": 0.0, "fixed_random": 0.0, "collapse_static": 0.0,
    }  # fmt: skip
    assert len(scores.settings["speed"]["image_s"]) == len(scores.settings["keep_curve"]["collapse"]["rate"])
    table = random_orders(torch.arange(len(open_images(greys))), 16)
    test = open_images(greys).subset("val")
    rows = [open_images(greys).names.index(name) for name in test.names]
    is_last = torch.tensor([sample.label == 4 for sample in test.samples])
    expected = ((table[rows][:, :4] == 5).any(1) | is_last).double().mean()  # 0.78 keeps four
    assert scores.metrics["top1_drop78"] == pytest.approx(float(expected))


def test_a_file_among_others_means_all_its_orders_and_the_first_that_was_asked_for_counts(
    greys: Path, features_of: Callable[..., Features], tmp_path: Path
) -> None:
    path = orders_file(tmp_path / "orders.parquet", greys)
    encoder = tiny_encoder(CornerEncoder)
    encoder.class_head = known_head(classes_of(greys), "raster")
    both = {"file first": (str(path), "halton"), "name first": ("halton", str(path))}
    found = {
        case: keep_curve(
            features_of(encoder, greys, "labels"),
            EvalConfig(own={"keep-curve": {"orders": orders, "rates": (0.0, 0.5), "speed": False}}),
        )
        for case, orders in both.items()
    }
    controls = ["random", "fixed_random", "collapse_static"]
    assert found["file first"].settings["orders"] == ["collapse", "halton", "raster", *controls]
    assert found["name first"].settings["orders"] == ["halton", "collapse", "raster", *controls]
    for case, order in (("file first", "collapse"), ("name first", "halton")):
        told = found[case].settings
        assert (told["order"], told["order_note"]) == (order, "the first requested order")
        assert f"order {order}" in describe_result(Result("keep-curve", "", "", {}, {}, told))
    assert found["file first"].metrics["mean_top1"] == found["name first"].metrics["mean_top1_collapse"]
    own = keep_curve(
        features_of(encoder, greys, "labels"), EvalConfig(own={"keep-curve": {"rates": (0.0, 0.5), "speed": False}})
    ).settings
    assert (own["order"], own["order_note"]) == ("raster", "the encoder's training order")


def test_a_real_encoder_whole_is_the_same_by_any_order(greys: Path, features_of: Callable[..., Features]) -> None:
    names = ("attention", "variance", "halton", "fixed_random:3")
    scores = keep_curve(
        features_of(tiny_encoder(), greys, "labels"),
        EvalConfig(own={"keep-curve": {"orders": names, "rates": (0.0, 0.5), "epochs": 5, "speed": True}}),
    )
    curve = scores.settings["keep_curve"]
    assert len({points["top1"][0] for points in curve.values()}) == 1
    assert all(cost is not None for cost in scores.settings["ranking_s"].values())
    assert scores.settings["ranking_s"]["attention"] > 0 == scores.settings["ranking_s"]["halton"]


def test_results_come_back_from_their_file_and_the_twin_is_asked_in_the_same_order(greys: Path, tmp_path: Path) -> None:
    encoder = tiny_encoder()
    encoder.class_head = known_head(classes_of(greys), "raster")
    config = EvalConfig(protocols=("keep-curve",), own={"keep-curve": {"rates": (0.0, 0.5, 0.9), "epochs": 3}})
    results = evaluate(encoder, "run", str(greys), config)
    assert [result.settings["order"] for result in results] == ["raster", "raster"]
    # timm's random initialisation has no head of its own, so both have fitted ones
    assert all("fitted" in result.settings["head"] for result in results)
    assert results[0].settings["head_note"] == "the baseline has no head of its own, so both have fitted ones"
    assert "head_note" not in results[1].settings
    (alone,) = evaluate(encoder, "run", str(greys), dataclasses.replace(config, baseline=False))
    assert alone.settings["head"] == OWN_HEAD
    write_results(tmp_path / "results.json", results)
    read = read_results(tmp_path / "results.json")[0]
    assert read.metrics == pytest.approx(results[0].metrics, nan_ok=True)
    assert read.settings["keep_curve"] == results[0].settings["keep_curve"]


def test_learned_pruning_stands_in_the_place_of_an_order(greys: Path, features_of: Callable[..., Features]) -> None:
    encoder = build_encoder(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, embed_dim=24, num_heads=3, seed=0
    )
    torch.manual_seed(1)
    predictors = torch.nn.ModuleList(PredictionModule(24) for _ in range(3))
    for parameter in predictors.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    encoder.token_pruning = TokenPruning((1, 2, 3), 0.6, predictors)
    encoder.class_head = ClassHead(torch.randn(5, 24), torch.zeros(5), classes_of(greys))
    rates = (0.0, 0.5, 0.9)
    features = features_of(encoder, greys, "labels")
    scores = keep_curve(features, EvalConfig(own={"keep-curve": {"rates": rates}}))
    told, curve = scores.settings, scores.settings["keep_curve"]
    assert told["orders"] == ["pruning", "random", "fixed_random"] and told["order"] == "pruning"
    assert told["order_note"] == "the encoder's own pruning"
    assert curve["pruning"]["rate"] == [0.0, 0.3, 0.4, 0.5, 0.78, 0.9]
    test = open_images(greys).subset("val")
    labels = torch.tensor([sample.label for sample in test.samples])
    images = encoder.normalize(smalti.load_images(test.paths, 32, mode="centre"))
    for rate, top1 in zip(curve["pruning"]["rate"], curve["pruning"]["top1"], strict=True):
        with torch.no_grad():
            vectors = encoder.pooled(encode_pruned(encoder, images, encoder.token_pruning, 1 - rate))
        right = (vectors @ encoder.class_head.weight.T).argmax(1) == labels
        assert top1 == pytest.approx(float(right.double().mean()), abs=1e-5)
        assert curve["random"]["top1"][0] == curve["pruning"]["top1"][0]  # whole images
        if rate == 0.4:
            assert scores.metrics["top1_trained_ratio"] == top1
    assert told["pruning"]["kept"]["0.5"] == [8, 4, 2] and told["pruning"]["kept"]["0.9"] == [1, 1, 1]
    assert told["pruning"]["mean_kept"]["0.5"] == pytest.approx((16 + 8 + 4 + 2) / 64, abs=1e-4)
    assert told["ranking_s"]["pruning"] == 0 and len(told["speed"]["pruning_s"]) == 6
    assert {"together", "together_speed"} <= scores.charts.keys()
    line = scores.charts["together_speed"].lines[0]
    assert (line.name, line.x[-1]) == ("pruning", 1 / told["speed"]["pruning_s"][-1])
    asked = keep_curve(
        features, EvalConfig(own={"keep-curve": {"orders": ("halton", "pruning"), "rates": rates, "speed": False}})
    )
    assert asked.settings["orders"] == ["halton", "pruning", "random", "fixed_random"]
    assert asked.metrics["mean_top1_pruning"] == scores.metrics["mean_top1"]
    fresh, again = (random_init(encoder, 0).token_pruning for _ in range(2))
    assert fresh is not None and again is not None and fresh.blocks == (1, 2, 3)
    assert_close(fresh.predictors.state_dict(), again.predictors.state_dict())
    assert not torch.equal(fresh.predictors[0].embed[1].weight, predictors[0].embed[1].weight)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"orders": ("pruning",)}, "pruning needs an encoder that has learned it, as a run of dynamicvit; vit_tiny"),
        ({"orders": ("colapse",)}, "there is no order 'colapse'"),
        ({"orders": ("coverage",)}, "order 'coverage' comes from a file of smalti rank"),
        ({"orders": ("nowhere.parquet",)}, "is not a file"),
        ({"rates": (0.5,)}, "at least two ascending"),
        ({"rates": (0.5, 0.2)}, "at least two ascending"),
    ],
)
def test_mistakes_are_one_line_each(more, line: str, greys: Path, features_of: Callable[..., Features]) -> None:
    with pytest.raises((ConfigError, DataError), match=line):
        keep_curve(features_of(tiny_encoder(), greys, "labels"), EvalConfig(own={"keep-curve": more}))


def test_orders_of_other_images_or_another_grid_are_refused(
    greys: Path, scenes: Path, features_of: Callable[..., Features], tmp_path: Path
) -> None:
    other = orders_file(tmp_path / "other.parquet", scenes)
    with pytest.raises(DataError, match="has orders of 0 of the 16 images"):
        keep_curve(
            features_of(tiny_encoder(), greys, "labels"), EvalConfig(own={"keep-curve": {"orders": (str(other),)}})
        )
    fine = orders_file(tmp_path / "fine.parquet", greys, size=8)
    with pytest.raises(ShapeError, match="orders of 8x8 patches, the images have 4x4"):
        keep_curve(
            features_of(tiny_encoder(), greys, "labels"), EvalConfig(own={"keep-curve": {"orders": (str(fine),)}})
        )
