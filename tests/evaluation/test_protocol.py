"""The contract of all protocols: the encoder comes back as it was, a twin stands beside it, mistakes get one line."""

import dataclasses
import json
import math
import shutil
import warnings

import cv2
import numpy as np
import pytest
import torch

from smalti.config import build, field_docs, field_names
from smalti.errors import ConfigError, DataError, ShapeError
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.evaluate import TARGETS, fitting_protocols, random_init
from smalti.evaluation.features import Features
from smalti.evaluation.metrics import class_iou
from smalti.evaluation.protocol import find_protocol, protocol_names
from smalti.evaluation.protocols import detection as detection_module
from smalti.evaluation.protocols import finetune as finetune_module
from smalti.evaluation.protocols import linear_probe as linear_probe_module
from smalti.evaluation.result import FRACTION, Result, describe_result, read_results, write_results
from smalti.runs.baseline import evaluate

NAMES = tuple(
    name for name in protocol_names() if find_protocol(name).need not in TARGETS and find_protocol(name).has_baseline
)
"""Those that judge an encoder on images; of signals: test_sleep_staging.py and
test_window_classification.py, generated images: test_generation.py."""
QUICK: dict[str, object] = {
    **{"epochs": 2, "steps": 2, "speed": False},
    **{"drop_ratios": (0.5,), "angles": (30,), "shears": (20,), "translations": (0.2,), "scales": (0.5, 2)},
}
"""Settings that make any protocol end in a moment, given to those that have them."""


@pytest.fixture(autouse=True)
def short_presets(monkeypatch):
    """Few steps and narrow heads where a protocol has no settings for them."""
    recipe = detection_module.choose_recipe
    narrow = {"channels": 16, "box_fc": (32,), "num_proposals": 50, "num_rois": 16}
    monkeypatch.setattr(detection_module, "choose_recipe", lambda *it: dataclasses.replace(recipe(*it), **narrow))
    monkeypatch.setattr(finetune_module, "FEWEST_STEPS", 2)


@pytest.fixture
def data(scenes, greys, photos, shapes):
    """What each protocol needs."""
    folders = {"labels": str(greys), "masks": str(scenes), "images": str(photos), "boxes": str(shapes)}
    return {name: folders[find_protocol(name).need] for name in NAMES}


def quick(name, **settings):
    own = {key: value for key, value in QUICK.items() if key in field_names(find_protocol(name).settings)}
    return EvalConfig(protocols=(name,), own={name: own}, **settings)


def test_names_and_what_fits_the_data(scenes, greys, photos):
    for folder, need in ((greys, "labels"), (scenes, "masks"), (photos, "images")):
        fitting = fitting_protocols(str(folder))
        assert {find_protocol(name).need for name in fitting} <= {need}
        assert set(fitting) == {n for n in NAMES if find_protocol(n).need == need and find_protocol(n).by_default}


@pytest.mark.parametrize("name", NAMES)
def test_results_are_scores_with_their_settings(name, tiny, data):
    ours, baseline = evaluate(tiny, "mine", data[name], quick(name))
    assert (ours.protocol, ours.encoder, ours.data) == (name, "mine", data[name])
    for result in (ours, baseline):
        assert set(result.units) == set(result.metrics)
        assert all(0 <= value <= 1 for name, value in result.metrics.items() if result.units[name] == FRACTION)
        assert set(result.details.tallies) <= set(result.metrics)
        # a rank is of all images together, and so is an average precision: no mean over them
        assert result.headline[0] in result.details.tallies or result.units[result.headline[0]] != FRACTION
        for metric, tally in result.details.tallies.items():
            assert len(tally) == len(result.details.images)
            assert math.isclose(tally.score(), result.metrics[metric], rel_tol=1e-6), metric
        assert {"architecture", "split", "num_train", "num_test", "seed", "image_size"} <= set(result.settings)
        assert result.headline[0] == next(iter(result.metrics))
        json.dumps(result.to_json(), allow_nan=False)
    assert not ours.is_baseline
    assert baseline.baseline == "random-init" and baseline.encoder == "mine (random init)"


@pytest.mark.parametrize("name", NAMES)
def test_the_encoder_comes_back_as_it_was_and_no_global_randomness_is_drawn(name, tiny, data):
    tiny.train()
    tiny.vit.blocks[0].eval()
    modes = [part.training for part in tiny.modules()]
    weights = {key: value.clone() for key, value in tiny.state_dict().items()}
    numpy_state = np.random.get_state()[1].copy()  # noqa: NPY002
    torch_state = torch.get_rng_state()  # Python's own state is drawn from by the type checks of the tests
    evaluate(tiny, "mine", data[name], quick(name))
    assert [part.training for part in tiny.modules()] == modes
    assert all(torch.equal(value, weights[key]) for key, value in tiny.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in tiny.parameters() if p is not tiny.vit.pos_embed)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


@pytest.mark.parametrize("name", NAMES)
def test_batch_size_and_workers_do_not_change_the_numbers(name, tiny, data):
    (whole,) = evaluate(tiny, "mine", data[name], quick(name, baseline=False))
    (parts,) = evaluate(tiny, "mine", data[name], quick(name, baseline=False, batch_size=5, num_workers=1))
    assert parts.metrics == pytest.approx(whole.metrics, abs=2e-3, nan_ok=True)  # no large objects, no AP of them
    assert parts.settings == whole.settings or name == "linear-probe"  # held-out ties may fall the other way


def test_a_training_step_on_dropout_does_not_leak_into_the_numbers(scenes):
    from smalti.models.build import build_encoder

    noisy = build_encoder("vit_tiny_patch16_224", img_size=32, depth=1, seed=0, drop_path_rate=0.5, proj_drop_rate=0.5)
    noisy.train()
    first, again = (
        evaluate(noisy, "mine", str(scenes), EvalConfig(baseline=False, own={"linear-segmentation": {"epochs": 1}}))[
            0
        ].metrics
        for _ in range(2)
    )
    assert first == again


def test_protocols_that_need_the_same_features_share_them(tiny, data, monkeypatch):
    seen = []
    encode = Features.encode
    monkeypatch.setattr(Features, "encode", lambda self, *a: (seen.append(a[-1]), encode(self, *a))[1])
    evaluate(tiny, "mine", data["knn"], EvalConfig(baseline=False, own={"linear-probe": {"epochs": 2}}))
    assert seen == ["train images", "val images"]


def test_the_order_of_results_is_that_of_the_protocols(tiny, data):
    results = evaluate(
        tiny, "mine", data["knn"], EvalConfig(protocols=("linear-probe", "knn"), own={"linear-probe": {"epochs": 2}})
    )
    assert [(r.protocol, r.is_baseline) for r in results] == [
        ("linear-probe", False),
        ("linear-probe", True),
        ("knn", False),
        ("knn", True),
    ]


def test_the_baseline_is_random_and_has_the_same_shape(tiny):
    one, again, other = random_init(tiny, 3), random_init(tiny, 3), random_init(tiny, 4)
    weight = "vit.blocks.0.attn.qkv.weight"
    assert {k: v.shape for k, v in one.state_dict().items()} == {k: v.shape for k, v in tiny.state_dict().items()}
    assert torch.equal(one.state_dict()[weight], again.state_dict()[weight])
    assert not torch.equal(one.state_dict()[weight], other.state_dict()[weight])
    assert (one.mean, one.std, one.pool) == (tiny.mean, tiny.std, tiny.pool)


def test_progress_is_told_to_the_end(tiny, data):
    calls = []
    config = EvalConfig(protocols=("knn",), baseline=False)
    evaluate(tiny, "mine", data["knn"], config, progress=lambda *call: calls.append(call))
    assert ("train images", 32, 32) in calls and ("val images", 16, 16) in calls


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("knnn", "no protocol 'knnn'; did you mean 'knn'"),
        ("linear-segmentatoin", "did you mean 'linear-segmentation'"),
        ("xyz", "no protocol 'xyz'; there are: .*knn-patch, linear-probe, linear-segmentation"),
    ],
)
def test_unknown_protocols(name, line, tiny, data):
    with pytest.raises(ConfigError, match=line):
        evaluate(tiny, "mine", data["knn"], EvalConfig(protocols=(name,)))


def test_data_that_lacks_what_a_protocol_needs(tiny, data):
    with pytest.raises(DataError, match="this needs masks"):
        evaluate(tiny, "mine", data["knn"], EvalConfig(protocols=("linear-segmentation",)))
    with pytest.raises(DataError, match="no split 'test'; it has: train, val"):
        evaluate(tiny, "mine", data["knn"], EvalConfig(protocols=("knn",), split="test"))
    with pytest.raises(ShapeError, match="patch_size=8 does not divide"):
        evaluate(tiny, "mine", data["knn"], EvalConfig(protocols=("knn",), image_size=30))


def test_no_image_that_can_be_read(tiny, data, tmp_path):
    for split in ("train", "val"):
        for label in "ab":
            (tmp_path / split / label).mkdir(parents=True)
            (tmp_path / split / label / "x.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="none of the 2 train images can be read"):
        evaluate(tiny, "mine", str(tmp_path), EvalConfig(protocols=("knn",)))


def test_an_oblong_encoder_asks_for_a_square(data):
    from smalti.models.build import build_encoder

    oblong = build_encoder("vit_tiny_patch16_224", img_size=(32, 64), depth=1, seed=0)
    with pytest.raises(ConfigError, match=r"takes 32x64 images; choose a square eval\.image_size"):
        evaluate(oblong, "mine", data["knn"], EvalConfig(protocols=("knn",)))


def test_settings_without_effect_are_named_once(tiny, data):
    with pytest.warns(UserWarning, match=r"eval\.norm, eval\.in-context, eval\.knn: no effect on linear-probe"):
        evaluate(
            tiny,
            "mine",
            data["knn"],
            EvalConfig(
                protocols=("linear-probe",),
                baseline=False,
                norm=False,
                own={"knn": {"k": 5}, "in-context": {"augment": True}, "linear-probe": {"epochs": 1}},
            ),
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(
            tiny,
            "mine",
            data["knn"],
            EvalConfig(protocols=("knn",), split="val", baseline=False, own={"knn": {"k": 5}}),
        )


def test_every_setting_is_documented_and_checked():
    for cls in (EvalConfig, *EvalConfig.open_groups().values()):
        assert all(meaning for _, meaning in field_docs(cls).values())
    for key, value in (("batch_size", 0), ("cache_mib", -1), ("preset", "tiny")):
        with pytest.raises(ConfigError, match=f"eval: {key}="):
            build(EvalConfig, {key: value}, "eval")
    with pytest.raises(ConfigError, match=r"^eval: eval.knn.k=0: at least 1 is needed$"):
        build(EvalConfig, {"knn": {"k": 0}}, "eval")
    with pytest.raises(ConfigError, match=r"eval.knn has no field 'kk'; did you mean 'k'"):
        build(EvalConfig, {"knn": {"kk": 1}}, "eval")
    with pytest.raises(ConfigError, match=r"eval.knn=3: needs settings, such as eval.knn.KEY=VALUE"):
        build(EvalConfig, {"knn": 3}, "eval")
    with pytest.raises(ConfigError, match="did you mean 'image_size'"):
        build(EvalConfig, {"img_size": 3}, "eval")


def test_results_survive_their_file(tmp_path):
    nan = float(class_iou(torch.zeros(1, 1, dtype=torch.int64))[0])
    result = Result("knn", "runs/a", "DIR", {"top1": 0.5}, {"top1": "share"}, {"k": 20}, {"iou": {"ghost": nan}})
    write_results(tmp_path / "r.json", [result])
    (again,) = read_results(tmp_path / "r.json")
    assert (again.metrics, again.settings, again.headline) == (result.metrics, result.settings, ("top1", 0.5))
    assert math.isnan(nan) and math.isnan(again.per_class["iou"]["ghost"])
    for text in ("[]", '{"results": [{"metrics": 3}]}', "{"):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(DataError, match="can't be read as a file of results"):
            read_results(tmp_path / "bad.json")


def test_the_learning_rate_grid_is_dinov2s():
    assert len(linear_probe_module.LEARNING_RATES) == 13
    assert (min(linear_probe_module.LEARNING_RATES), max(linear_probe_module.LEARNING_RATES)) == (1e-5, 0.1)


@pytest.mark.parametrize("name", [name for name in NAMES if find_protocol(name).need != "images"])
def test_every_protocol_learns_from_the_drawn_images_alone(name, tiny, data):
    results = [
        evaluate(tiny, "mine", data[name], quick(name, seed=seed, baseline=False, train_size=8))[0]
        for seed in (0, 0, 1)
    ]
    drawn = [result.settings["train_images"] for result in results]
    assert [len(set(names)) for names in drawn] == [8, 8, 8] and drawn[0] == drawn[1] != drawn[2]
    assert results[0].metrics == pytest.approx(results[1].metrics, rel=0, abs=0, nan_ok=True)
    assert results[0].settings["num_train"] == 8
    assert "; 8 of the " in results[0].settings["split"]
    whole = evaluate(tiny, "mine", data[name], quick(name, baseline=False))[0]
    assert "train_images" not in whole.settings and whole.settings["num_train"] > 8


def test_the_split_seed_draws_the_same_images_for_all_seeds(tiny, greys):
    config = EvalConfig(protocols=("knn",), split_seed=3, train_size=0.25, baseline=False)
    one, other = (evaluate(tiny, "", str(greys), dataclasses.replace(config, seed=seed))[0] for seed in (0, 1))
    assert one.settings["train_images"] == other.settings["train_images"]


def test_results_say_what_the_values_of_the_masks_mean(tiny, tmp_path):
    rng = np.random.default_rng(0)
    for split, stem in (("training", "ADE_train_{}"), ("validation", "ADE_val_{}")):
        for number in range(4):
            values = np.kron(rng.choice((0, 1, 150), (4, 4)), np.ones((8, 8))).astype(np.uint8)
            for folder, ending in (("images", "jpg"), ("annotations", "png")):
                path = tmp_path / folder / split / f"{stem.format(number)}.{ending}"
                path.parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(path), values)
    config = EvalConfig(
        protocols=("linear-segmentation",), baseline=False, own={"linear-segmentation": {"epochs": 2, "absent": "zero"}}
    )
    (plain,) = evaluate(tiny, "", str(tmp_path), config)
    assert plain.settings["layout"] == "ade20k" and plain.settings["num_classes"] == 150
    assert plain.settings["labels"] == "ADE20K's 150 classes, values less 1; 0 (other) is 255, ignored"
    assert set(plain.per_class["iou"]) >= {"wall", "flag"} and "other" not in plain.per_class["iou"]
    (trap,) = evaluate(tiny, "", f"ade20k-151={tmp_path}", config)
    assert trap.settings["layout"] == "ade20k-151" and trap.settings["num_classes"] == 151
    assert not trap.per_class["iou"]["other"] > 0, "a class without pixels"


def test_masks_of_ones_own_have_their_meaning_in_classes_txt(tiny, scenes):
    (result,) = evaluate(tiny, "", str(scenes), quick("linear-segmentation", baseline=False))
    assert result.settings["layout"] == "masks" and "labels" not in result.settings


@pytest.mark.parametrize("protocol", ["knn-patch", "in-context", "retrieval", "linear-segmentation", "overclustering"])
def test_dense_tokens_are_never_refined_and_lose_the_norm_only_when_told_to(protocol, tiny, scenes):
    def judge(**more):
        [result] = evaluate(tiny, "mine", str(scenes), quick(protocol, baseline=False, **more))
        return result

    plain = judge()
    assert plain.settings["tokens"] == "after the final norm"
    with torch.no_grad():  # a norm that says nothing of the tokens: scores with it can only be a constant's
        tiny.vit.norm.weight.zero_()
    raw, silenced = judge(norm=False), judge()
    assert raw.settings["tokens"] == "of the last block, without final norm"
    assert raw.metrics != silenced.metrics
    torch.nn.init.ones_(tiny.vit.norm.weight)
    tiny.set_pool("prr")
    assert judge().metrics == plain.metrics


def test_the_baseline_of_an_encoder_with_a_trained_pooling_has_a_random_one(tiny, greys):
    tiny.set_pool("map", fresh=True)
    one, two = random_init(tiny, 1), random_init(tiny, 1)
    assert torch.equal(one.vit.attn_pool.latent, two.vit.attn_pool.latent)
    assert not torch.equal(one.vit.attn_pool.latent, tiny.vit.attn_pool.latent)
    results = evaluate(tiny, "mine", str(greys), EvalConfig(protocols=("knn",)))
    assert [result.settings["pool"] for result in results] == ["map", "map"]


def test_a_result_says_what_it_is_about_and_what_was_left_out(tiny, greys, tmp_path):
    (plain,) = evaluate(tiny, "", str(greys), EvalConfig(protocols=("knn",), baseline=False))
    assert describe_result(plain) == "16 val images, 32 px"
    shutil.copytree(greys, tmp_path / "greys")
    for split in ("train", "val"):
        (tmp_path / "greys" / split / "grey0" / "0.png").write_bytes(b"no image")
    (damaged,) = evaluate(
        tiny,
        "",
        str(tmp_path / "greys"),
        EvalConfig(protocols=("linear-probe",), baseline=False, own={"linear-probe": {"epochs": 2}}),
    )
    assert describe_result(damaged) == (
        "16 val images, 32 px, preset small; skipped: 1 unreadable, 1 unreadable in train"
    )
    assert describe_result(Result("knn", "", "", {}, {}, {})) == ""


def test_classes_without_evaluated_images_are_skipped_and_reported(tiny, greys, tmp_path):
    shutil.copytree(greys, tmp_path / "greys")
    for label in (1, 3):
        shutil.rmtree(tmp_path / "greys" / "val" / f"grey{label}")
    for protocol in ("knn", "linear-probe"):
        (result,) = evaluate(tiny, "", str(tmp_path / "greys"), quick(protocol, baseline=False))
        assert describe_result(result).endswith("skipped: 2 of 5 classes, which have no such images (grey1, grey3)")
        assert 0 <= result.metrics["balanced_top1"] <= 1 and math.isnan(result.per_class["recall"]["grey1"])


def test_the_evaluated_split_has_its_own_name(tiny, greys, scenes, photos):
    (held_out,) = evaluate(tiny, "", str(greys / "train"), EvalConfig(protocols=("knn",), baseline=False))
    assert describe_result(held_out) == "7 held-out images, 32 px"
    (few,) = evaluate(
        tiny,
        "",
        str(photos),
        EvalConfig(protocols=("effective-rank",), baseline=False, own={"effective-rank": {"num_images": 5}}),
    )
    assert describe_result(few) == "5 of 24 images, 32 px"
    config = EvalConfig(protocols=("overclustering",), baseline=False, own={"overclustering": {"repeats": 1}})
    (clusters,) = evaluate(tiny, "", str(scenes), config)
    assert describe_result(clusters) == (
        "6 val images, 32 px, preset small, 96 patches; skipped: K = 300, 500 (too few patches)"
    )
