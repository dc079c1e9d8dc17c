"""Protocols of nearest neighbours: theory's scores come out, conventions are what they say, mistakes get one line."""

import dataclasses

import cv2
import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch.nn import functional as F

from smalti.errors import DataError
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.features import Features
from smalti.evaluation.protocols.in_context import in_context, upsampled_argmax
from smalti.evaluation.protocols.knn_patch import knn_patch
from smalti.evaluation.protocols.retrieval import average_precision_at, precision_at, retrieval
from smalti.runs.baseline import evaluate

PROTOCOLS = {"in-context": in_context, "knn-patch": knn_patch, "retrieval": retrieval}


@pytest.fixture(params=PROTOCOLS)
def protocol(request):
    """Each of the three."""
    return PROTOCOLS[request.param]


def masks_of(root, names):
    """Class of each 8x8 patch, ``(n, 4, 4)``."""
    return np.stack(
        [cv2.imread(str(root / "masks" / f"{name}.png"), cv2.IMREAD_UNCHANGED)[7::8, 7::8] for name in names]
    )


def copy_with(scenes, root, masks=(), images=()):
    """The scenes at another place, some of whose masks and images are replaced: name -> array or bytes."""
    for name in ("train.txt", "val.txt", "classes.txt"):
        (root / name).symlink_to(scenes / name)
    for folder, changed in (("masks", dict(masks)), ("images", dict(images))):
        (root / folder).mkdir()
        for path in (scenes / folder).iterdir():
            new = changed.get(path.stem)
            if new is None:
                (root / folder / path.name).symlink_to(path)
            elif isinstance(new, bytes):
                (root / folder / path.name).write_bytes(new)
            else:
                assert cv2.imwrite(str(root / folder / path.name), new)
    return root


def test_upsampling_is_bilinear_and_ties_go_to_the_lowest_class():
    shares = torch.rand(3, 5, 4, generator=torch.Generator().manual_seed(0))
    up = F.interpolate(shares.permute(2, 0, 1)[None], (16, 16), mode="bilinear", align_corners=False)[0]
    assert torch.equal(upsampled_argmax(shares, 16), up.argmax(0))
    assert not upsampled_argmax(torch.full((2, 2, 3), 0.25), 8).any()


def test_e18_a_perfect_encoder_gets_everything_right(perfect, scenes, features_of):
    features = features_of(perfect, scenes, "masks")
    scores = in_context(
        features, EvalConfig(own={"in-context": {"mask_size": 4, "k": 5}})
    )  # a pixel of the mask is a patch
    assert scores.metrics == {"miou": 1.0, "pixel_accuracy": 1.0}
    assert list(scores.per_class["iou"]) == ["ground", "leaf", "stone"]
    assert (
        0.85 < in_context(features, EvalConfig(own={"in-context": {"k": 5}})).metrics["miou"] < 1
    )  # corners go to the bilinear majority
    assert knn_patch(features, EvalConfig(own={"knn-patch": {"k": 5}})).metrics == {"top1": 1.0, "balanced_top1": 1.0}
    found = retrieval(features, EvalConfig()).metrics
    assert found == {"precision_at_10": 1.0, "precision_at_1": 1.0, "precision_at_5": 1.0, "map_at_10": 1.0}


def test_e18_a_constant_encoder_gets_the_prior_of_the_memory(constant, scenes, features_of):
    features = features_of(constant, scenes, "masks")
    labels = masks_of(scenes, [f"val{i}" for i in range(6)])
    share = float((labels == 0).mean())  # the first class is the most frequent
    segmented = in_context(features, EvalConfig(own={"in-context": {"mask_size": 4, "k": 10**6}}))
    assert all((prediction == 0).all() for prediction in segmented.predictions.values())
    first_pixels = masks_of(scenes, [f"val{i}" for i in range(6)])
    counted = np.ones_like(first_pixels, dtype=bool)
    counted[:, 0, 0] = False  # nearest pixel (0, 0) is void
    assert segmented.metrics["pixel_accuracy"] == pytest.approx(float((labels[counted] == 0).mean()))
    assert segmented.metrics["miou"] == pytest.approx(segmented.metrics["pixel_accuracy"] / 3)
    assert segmented.per_class["iou"]["leaf"] == segmented.per_class["iou"]["stone"] == 0.0
    assert knn_patch(features, EvalConfig(own={"knn-patch": {"k": 10**6}})).metrics == {
        "top1": pytest.approx(share),
        "balanced_top1": 1 / 3,
    }
    found = retrieval(features, EvalConfig(own={"retrieval": {"k": 10**6}}))
    train = masks_of(scenes, [f"train{i}" for i in range(16)])
    prior = np.bincount(train.ravel(), minlength=3) / train.size
    expected = float((np.bincount(labels.ravel(), minlength=3) / labels.size) @ prior)
    assert found.metrics["precision_at_256"] == pytest.approx(expected) == found.settings["chance"]


def test_e18_order_of_judged_images_batches_and_cache_do_not_matter(protocol, tiny, scenes, features_of):
    whole = protocol(features_of(tiny, scenes, "masks"), EvalConfig())
    turned = features_of(tiny, scenes, "masks", batch_size=3, cache_mib=0)
    test = dataclasses.replace(turned.data.test, samples=turned.data.test.samples[::-1])
    turned.data = dataclasses.replace(turned.data, test=test)
    again = protocol(turned, EvalConfig())
    assert again.metrics == pytest.approx(whole.metrics, abs=2e-3)  # a float may round the other way
    assert again.settings == whole.settings


def test_training_images_are_encoded_once_for_all_three(tiny, scenes, monkeypatch):
    seen = []
    encode = Features.encode
    monkeypatch.setattr(Features, "encode", lambda self, *a, **k: (seen.append(a[-1]), encode(self, *a, **k))[1])
    evaluate(tiny, "mine", str(scenes), EvalConfig(protocols=tuple(PROTOCOLS), baseline=False, cache_mib=0))
    assert seen == [
        "tokens of train images",
        "tokens of val images",
    ]  # memory and neighbours are shared, though no token is kept


def test_the_paper_preset_is_what_the_public_code_does(tiny, scenes, features_of):
    features = features_of(tiny, scenes, "masks")
    paper = in_context(features, EvalConfig(preset="paper", image_size=32, own={"in-context": {"memory_size": 200}}))
    said = {key: paper.settings[key] for key in ("void", "matching", "absent", "augment_epochs", "temperature", "k")}
    assert said == {
        "void": "class0",
        "matching": "hungarian",
        "absent": "zero",
        "augment_epochs": 2,
        "temperature": 0.02,
        "k": 30,
    }
    assert paper.settings["memory_size"] == 2 * 16 * 6 and paper.settings["comparable"].startswith("open-hummingbird")
    ours = in_context(
        features,
        EvalConfig(preset="paper", image_size=32, own={"in-context": {"memory_size": 200, "matching": "direct"}}),
    )
    assert paper.metrics["miou"] >= ours.metrics["miou"]  # a matching can only raise it
    small = in_context(features, EvalConfig())
    assert small.settings["comparable"] == "small preset: not comparable with published numbers"
    assert (small.settings["void"], small.settings["matching"], small.settings["absent"]) == (
        "ignore",
        "direct",
        "skip",
    )


def test_matching_renames_predictions_and_tallies_alike(perfect, scenes, tmp_path, features_of):
    turned = {}  # training masks with classes 0 and 1 exchanged: retrieval then predicts them the wrong way round
    for path in (scenes / "masks").glob("train*.png"):
        mask = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        turned[path.stem] = np.where(mask < 2, 1 - np.minimum(mask, 1), mask).astype(np.uint8)
    features = features_of(perfect, copy_with(scenes, tmp_path, masks=turned), "masks")
    config = EvalConfig(own={"in-context": {"mask_size": 4, "k": 5}})
    direct = in_context(features, config)
    matched = in_context(features, EvalConfig(own={"in-context": {"mask_size": 4, "k": 5, "matching": "hungarian"}}))
    assert direct.metrics["miou"] == pytest.approx(1 / 3) and matched.metrics["miou"] == 1.0
    for scores in (direct, matched):
        assert scores.tallies["miou"].score() == pytest.approx(scores.metrics["miou"])
        assert scores.tallies["pixel_accuracy"].score() == pytest.approx(scores.metrics["pixel_accuracy"])
    truth = masks_of(scenes, ["val0"])[0]
    assert (matched.predictions[0] == truth).all() and not (direct.predictions[0] == truth).all()


def test_classes_that_occur_nowhere_count_as_the_convention_says(perfect, scenes, tmp_path, features_of):
    root = copy_with(scenes, tmp_path)
    (root / "classes.txt").unlink()
    (root / "classes.txt").write_text("ground\nleaf\nstone\nghost\n")
    features = features_of(perfect, root, "masks")
    skip, zero = (
        in_context(features, EvalConfig(own={"in-context": {"mask_size": 4, "k": 5, "absent": absent}}))
        for absent in ("skip", "zero")
    )
    assert (skip.metrics["miou"], zero.metrics["miou"]) == (1.0, 0.75)
    assert np.isnan(skip.per_class["iou"]["ghost"])
    assert np.isnan(retrieval(features, EvalConfig()).per_class["map_at_10"]["ghost"])


def test_a_temperature_decides_between_the_nearest_and_the_many(tiny, scenes, features_of):
    features = features_of(tiny, scenes, "masks")
    cold, warm = (
        in_context(features, EvalConfig(own={"in-context": {"k": 200, "temperature": t}})) for t in (1e-4, 100.0)
    )
    one = in_context(features, EvalConfig(own={"in-context": {"k": 1}}))
    assert cold.metrics == pytest.approx(one.metrics, abs=0.01) and warm.metrics != cold.metrics
    assert (cold.settings["temperature"], one.settings["temperature"]) == (1e-4, 0.02)


def test_retrieval_scores_equal_scikit_learns():
    g = torch.Generator().manual_seed(0)
    relevant = torch.rand(20, 30, generator=g) < 0.3
    relevant[3] = False
    ap = average_precision_at(relevant, relevant.sum(1))  # all relevant ones are among the neighbours
    falling = -np.arange(30.0)
    for row, value in zip(relevant.numpy(), ap, strict=True):
        assert float(value) == pytest.approx(average_precision_score(row, falling) if row.any() else 0.0)
    assert average_precision_at(torch.ones(1, 5, dtype=torch.bool), torch.tensor([100])).item() == 1.0
    assert average_precision_at(torch.tensor([[True, False, True]]), torch.tensor([2])).item() == pytest.approx(5 / 6)
    assert precision_at(torch.tensor([[True, False, False, True]]), 2).item() == 0.5


def test_a_memory_smaller_than_k_is_used_entirely_and_reported(protocol, tiny, scenes, features_of):
    settings = protocol(
        features_of(tiny, scenes, "masks"), EvalConfig(own={key: {"k": 30, "memory_size": 16} for key in PROTOCOLS})
    ).settings
    assert (settings["k"], settings["k_wanted"], settings["memory_size"]) == (16, 30, 16)
    assert settings["k_note"] == "reduced: the memory has only 16 patches"


VOID = np.full((32, 32), 255, dtype=np.uint8)


def test_an_evaluated_image_without_a_label_is_skipped_with_a_warning(protocol, tiny, scenes, tmp_path, features_of):
    features = features_of(tiny, copy_with(scenes, tmp_path, masks={"val0": VOID}), "masks")
    with pytest.warns(UserWarning, match="1 of 6 val images have no labelled pixel and are skipped"):
        scores = protocol(features, EvalConfig())
    assert scores.settings["num_unlabelled"] == 1
    tally = next(iter(scores.tallies.values()))
    assert len(tally) == 6 and not tally.whole[0].any() and tally.whole[1:].any(1).all()


@pytest.mark.parametrize(
    ("mask", "line"),
    [
        (np.full((32, 32), 7, np.uint8), r"val1\.png: holds the value 7, but classes\.txt names 3 classes"),
        (
            np.zeros((16, 32), np.uint8),
            r"val1\.png: 32x16 pixels, its image val1\.png has 32x32; they must be the same",
        ),
        (np.zeros((32, 32, 3), np.uint8), r"val1\.png: a mask of mode RGB, it needs one number a pixel"),
        (b"no image", r"val1\.png: can't be read as a mask"),
    ],
)
@pytest.mark.parametrize("name", [*PROTOCOLS, "linear-segmentation", "segmenter"])
def test_a_wrong_mask_gets_one_line_in_every_dense_protocol(name, mask, line, tiny, scenes, tmp_path):
    root = copy_with(scenes, tmp_path, masks={"val1": mask})
    with pytest.raises(DataError, match=line) as caught:
        own = {name: {"steps": 1} if name == "segmenter" else {}}  # it reads masks to evaluate after training
        evaluate(tiny, "mine", str(root), EvalConfig(protocols=(name,), baseline=False, own=own))
    assert "\n" not in str(caught.value)


def test_wrong_masks_of_judged_images_are_found_before_anything_is_encoded(
    protocol, tiny, scenes, tmp_path, features_of
):
    features = features_of(tiny, copy_with(scenes, tmp_path, masks={"val1": b"no image"}), "masks")
    features.encode = None
    with pytest.raises(DataError, match=r"val1\.png: can't be read"):
        protocol(features, EvalConfig())


def test_a_wrong_mask_of_a_training_image_is_named(protocol, tiny, scenes, tmp_path, features_of):
    root = copy_with(scenes, tmp_path, masks={"train1": np.zeros((32, 32, 3), np.uint8)})
    for augment in (False, True):
        with pytest.raises(DataError, match=r"train1\.png: a mask of mode RGB"):
            protocol(features_of(tiny, root, "masks"), EvalConfig(own={key: {"augment": augment} for key in PROTOCOLS}))


@pytest.mark.parametrize("name", [*PROTOCOLS, "linear-segmentation"])
def test_a_missing_mask_gets_one_line(name, tiny, scenes, tmp_path):
    root = copy_with(scenes, tmp_path)
    (root / "masks" / "val1.png").unlink()
    with pytest.raises(DataError, match=r"1 of 6 images have no mask, the first: val1.png; add masks"):
        evaluate(tiny, "mine", str(root), EvalConfig(protocols=(name,), baseline=False))


def test_unreadable_images_are_left_out_and_counted(protocol, tiny, scenes, tmp_path, features_of):
    cut = {name: (scenes / "images" / f"{name}.png").read_bytes()[:60] for name in ("train3", "val2")}
    features = features_of(tiny, copy_with(scenes, tmp_path, images=cut), "masks")
    scores = protocol(features, EvalConfig())
    assert scores.settings["memory_images"] == 15 and scores.settings["num_unlabelled"] == 0
    assert not next(iter(scores.tallies.values())).whole[2].any()
    assert sorted(path[-10:] for path in features.skipped) == ["s/val2.png", "train3.png"]


def test_no_image_that_can_be_read(protocol, tiny, scenes, tmp_path, features_of):
    cut = {path.stem: b"" for path in (scenes / "images").glob("val*.png")}
    with pytest.raises(DataError, match="none of the 6 val images can be read"):
        protocol(features_of(tiny, copy_with(scenes, tmp_path, images=cut), "masks"), EvalConfig())
