"""Detection: learns boxes and outlines of a few shapes, has exact strides for any patch size, refuses what can't be."""

import json
import shutil
import sys
from functools import partial

import numpy as np
import pycocotools.mask
import pytest
import torch
from torch.testing import assert_close
from torchvision.models.detection.image_list import ImageList

from evaluation.conftest import write_shapes
from smalti.data.images.coco import annotated_image
from smalti.data.images.labelled import open_labelled
from smalti.errors import ConfigError, DataError, MissingExtraError
from smalti.evaluation import coco_ap
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.protocols import detection as module
from smalti.evaluation.protocols.detection import (
    DetectionExamples,
    DetectionRecipe,
    Detector,
    PatchAnchors,
    _roi_align,
    choose_recipe,
    detection,
    detection_loss,
    freeze_blocks,
    optimizer_of,
)
from smalti.evaluation.tuning import seeded, train, trainable_copy, warm_steps
from smalti.layers.feature_pyramid import pyramid_sizes
from smalti.models.build import build_encoder, clone_encoder


def small_recipe(**changed):
    values = {"image_size": 64, "steps": 1, "batch_size": 2, "learning_rate": 1e-3, "num_warmup": 1, "channels": 16}
    values |= {"scale": (1.0, 1.0), "rpn_convs": 1, "box_convs": 1, "box_fc": (32,), "mask_convs": 1}
    values |= {"num_proposals": 50, "num_rois": 16, "final_norm": True}
    return DetectionRecipe(**{**values, **changed})


@pytest.fixture
def encoder64():
    built = build_encoder("vit_tiny_patch16_224", img_size=64, patch_size=8, depth=2, seed=0)
    built.set_normalization((0.5,), (0.5,))
    return built


@pytest.fixture
def quick(monkeypatch):
    """Narrow heads, which learn a few shapes in seconds."""

    def choose(features, config):
        size = config.image_size or 64
        own = config.of("detection")
        rate = own.learning_rate or 1e-3
        return small_recipe(image_size=size, steps=own.steps, learning_rate=rate, num_warmup=own.steps // 10)

    monkeypatch.setattr(module, "choose_recipe", choose)


def listed(root, split="train"):
    return json.loads((root / f"annotations/instances_{split}.json").read_text())


def rewritten(root, table, split="train"):
    (root / f"annotations/instances_{split}.json").write_text(json.dumps(table))


def test_it_learns_boxes_and_outlines_and_leaves_the_encoder_alone(quick, encoder64, tmp_path, features_of):
    root = write_shapes(tmp_path, {"train": 3}, seed=3)
    table = listed(root)
    for row in table["images"]:  # evaluated on the training images, to overfit them
        shutil.copy(root / "images" / row["file_name"], root / "images" / f"v{row['file_name']}")
        row["file_name"] = f"v{row['file_name']}"
    rewritten(root, table, "val")
    before = clone_encoder(encoder64).state_dict()
    scores = detection(
        features_of(encoder64, root, "boxes"), EvalConfig(own={"detection": {"steps": 120, "learning_rate": 1e-3}})
    )
    assert scores.metrics["ap50"] > 0.8 and scores.metrics["mask_ap50"] > 0.8
    assert scores.charts["loss"].lines[0].y[-1] < 0.5 * scores.charts["loss"].lines[0].y[0]
    assert scores.settings["num_crowds"] == 1 and scores.settings["masks"]
    after = encoder64.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert all(p.grad is None for p in encoder64.parameters())
    true, found = next(both for place, both in scores.found.items() if len(both[0].labels) > 1)
    assert (true.boxes >= 0).all() and (true.boxes <= 1).all() and len(found.labels)


def test_the_same_seed_gives_the_same_numbers_with_any_number_of_workers(quick, tiny, shapes, features_of):
    config = EvalConfig(image_size=32, seed=5, own={"detection": {"steps": 3, "frozen_blocks": 1}})
    first = detection(features_of(tiny, shapes, "boxes"), config)
    again = detection(features_of(tiny, shapes, "boxes", num_workers=1, batch_size=3), config)
    other = detection(features_of(tiny, shapes, "boxes"), EvalConfig(**{**vars(config), "seed": 6}))
    assert first.charts == again.charts and list(first.metrics) == list(again.metrics)
    assert list(first.metrics.values()) == pytest.approx(list(again.metrics.values()), abs=1e-6, nan_ok=True)
    assert first.charts != other.charts
    assert "block 2 of 1" in first.settings["trained"]


@pytest.mark.parametrize("patch", [8, 14, 16])
def test_anchors_lie_at_the_exact_strides_of_the_patches(patch):
    grid = 5
    maps = [torch.zeros(1, 1, h, w) for h, w in pyramid_sizes((grid, grid))]
    batch = ImageList(torch.zeros(1, 3, grid * patch, grid * patch), [(grid * patch, grid * patch)])
    (anchors,) = PatchAnchors(patch)(batch, maps)
    per_map = anchors.split([3 * one.shape[-1] ** 2 for one in maps])
    for of_map, scale, one in zip(per_map, (4, 2, 1, 0.5, 0.25), maps, strict=True):
        stride, side = patch / scale, one.shape[-1]
        centres = (of_map[:, :2] + of_map[:, 2:]) / 2
        assert_close(centres[::3].view(side, side, 2)[..., 0], (torch.arange(side) * stride).expand(side, side))
        assert_close(centres[::3].view(side, side, 2)[..., 1].T, (torch.arange(side) * stride).expand(side, side))
        sides = of_map[:3, 2:] - of_map[:3, :2]
        assert_close(sides.prod(1).sqrt(), torch.full((3,), 8 * stride), rtol=0.05, atol=1.0)  # rounded to pixels


@pytest.mark.parametrize("patch", [8, 14, 16])
def test_regions_are_read_from_the_place_of_the_box(patch):
    """Maps that hold their own coordinates give back the middle of the box, on whichever map it is looked at."""
    grid = 24
    maps = {}
    for name, scale in zip("0123", (4, 2, 1, 0.5), strict=True):
        middle = (torch.arange(int(grid * scale)) + 0.0) * patch / scale  # aligned=False: place i is pixel i * stride
        maps[name] = torch.stack(torch.meshgrid(middle, middle, indexing="xy"))[None]
    sides = torch.tensor([2.0, 6.0, 12.0, 20.0]) * patch
    boxes = torch.stack([torch.full((4,), 1.0 * patch), torch.full((4,), 2.0 * patch), sides, sides + patch], dim=1)
    pooled = _roi_align(2, patch)(maps, [boxes], [(grid * patch, grid * patch)])
    assert_close(pooled.mean((2, 3)), (boxes[:, :2] + boxes[:, 2:]) / 2)
    levels = _roi_align(2, patch).map_levels([torch.tensor([[0.0, 0, s, s]]) * patch for s in (6, 7, 14, 28, 60)])
    assert levels.tolist() == [0, 1, 2, 3, 3]  # as at 16 pixels: 112, 224 and 448


def test_gradient_reaches_all_that_learns_at_rates_that_shrink_with_depth(encoder64):
    recipe = small_recipe(layer_decay=0.5)
    torch.manual_seed(0)
    model = Detector(trainable_copy(encoder64, 0.0), recipe, 2, masks=True).train()
    optimizer = optimizer_of(model, recipe, encoder64)
    target = {"boxes": torch.tensor([[4.0, 4, 30, 40]]), "labels": torch.tensor([2])}
    target["masks"] = torch.zeros(1, 64, 64, dtype=torch.uint8)
    target["masks"][:, 4:40, 4:30] = 1
    _, losses = model(torch.randn(1, 3, 64, 64), [(64, 64)], [target])
    assert {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"} == set(losses)
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    scale_of = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    decay_of = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert set(scale_of) == {id(p) for p in model.parameters()}
    vit = model.backbone.encoder.vit
    for part, scale in ((vit.patch_embed.proj, 0.125), (vit.blocks[0].attn.qkv, 0.25), (vit.blocks[1].mlp.fc1, 0.5)):
        assert scale_of[id(part.weight)] == scale and part.weight.grad.abs().sum() > 0
        assert (decay_of[id(part.weight)], decay_of[id(part.bias)]) == (0.1, 0.0)
    assert scale_of[id(vit.pos_embed)] == 0.125 and decay_of[id(vit.pos_embed)] == 0.0
    assert all(scale_of[id(p)] == 1.0 for p in (*model.backbone.pyramid.parameters(), *model.rpn.parameters()))


def test_frozen_blocks_stay_and_the_others_learn(encoder64):
    for count, free in ((1, {"blocks.1", "norm"}), (2, {"norm"})):
        copy = trainable_copy(encoder64, 0.0)
        freeze_blocks(copy, count)
        learning = {name for name, p in copy.vit.named_parameters() if p.requires_grad}
        assert all(any(name.startswith(part) for part in free) for name in learning)
    copy.requires_grad_(False)
    model = Detector(copy, small_recipe(final_norm=False), 2, masks=False)
    known = {id(p) for group in optimizer_of(model, small_recipe(), encoder64).param_groups for p in group["params"]}
    assert known == {id(p) for p in model.parameters() if p.requires_grad}


def test_published_recipes(encoder64, shapes, features_of):
    features = features_of(encoder64, shapes, "boxes")
    recipe = choose_recipe(features, EvalConfig(preset="paper"))
    assert (recipe.image_size, recipe.steps, recipe.batch_size, recipe.num_warmup) == (1024, 22_128, 64, 250)
    assert (recipe.learning_rate, recipe.layer_decay, recipe.weight_decay, recipe.drop_path) == (1e-4, 0.7, 0.1, 0.1)
    assert (recipe.channels, recipe.rpn_convs, recipe.box_convs, recipe.box_fc) == (256, 2, 4, (1024,))
    assert (recipe.scale, recipe.final_norm, recipe.mask_convs) == ((0.1, 2.0), False, 4)
    rates = [warm_steps(s, 22_128, peak=1e-4, num_warmup=250, milestones=module.MILESTONES) for s in range(22_128)]
    assert rates[:2] == pytest.approx([4e-7, 8e-7]) and rates[249] == rates[19_666] == 1e-4
    assert rates[19_667] == rates[21_305] == pytest.approx(1e-5) and rates[21_306] == pytest.approx(1e-6)
    changed = EvalConfig(image_size=32, own={"detection": {"steps": 10, "learning_rate": 1e-3, "batch_size": 2}})
    recipe = choose_recipe(features, changed)
    assert (recipe.steps, recipe.batch_size, recipe.learning_rate, recipe.image_size) == (10, 2, 1e-3, 32)
    with pytest.raises(ConfigError, match=r"eval.detection.frozen_blocks=3: vit_tiny_patch16_224 has only 2 blocks"):
        choose_recipe(features, EvalConfig(own={"detection": {"frozen_blocks": 3}}))


def test_augmented_boxes_and_masks_stay_on_their_object(shapes):
    samples = open_labelled(shapes, need="boxes").train.samples
    make = DetectionExamples(samples, small_recipe(scale=(0.5, 2.0)), True, (0.0,), (1.0,))
    seen = 0
    for place, sample in enumerate(samples):
        for key in range(8):
            pixels, target = make(place, key)
            again, _ = make(place, key)
            assert torch.equal(pixels, again) and pixels.shape == (1, 64, 64)
            height, width = target["size"].tolist()
            assert not pixels[:, height:].any() and not pixels[:, :, width:].any()
            assert len(target["labels"]) <= sum(not item.is_crowd for item in annotated_image(sample).objects)
            for box, label, mask in zip(target["boxes"], target["labels"], target["masks"], strict=True):
                x0, y0, x1, y1 = box.tolist()
                assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
                if mask.sum() < 40:  # a corner that the crop left over
                    continue
                ys, xs = mask.nonzero().T
                assert min(xs) >= x0 - 2 and max(xs) <= x1 + 2 and min(ys) >= y0 - 2 and max(ys) <= y1 + 2
                inside = pixels[0][mask.bool()].mean().item() * 255
                assert abs(inside - {1: 240, 2: 150}[int(label)]) < 40
                seen += 1
    assert seen > 30


def test_boxes_alone_where_outlines_are_rectangles_or_not_wanted(quick, tiny, tmp_path, features_of):
    root = write_shapes(tmp_path, {"train": 3, "val": 3})
    config = EvalConfig(image_size=32, own={"detection": {"steps": 1, "masks": False}})
    assert set(detection(features_of(tiny, root, "boxes"), config).metrics) == set(coco_ap.NAMES)
    for split in ("train", "val"):
        table = listed(root, split)
        for item in table["annotations"]:
            if not item["iscrowd"]:
                x, y, width, height = item["bbox"]
                item["segmentation"] = [[x, y, x + width, y, x + width, y + height, x, y + height]]
        rewritten(root, table, split)
    scores = detection(features_of(tiny, root, "boxes"), EvalConfig(image_size=32, own={"detection": {"steps": 1}}))
    assert set(scores.metrics) == set(coco_ap.NAMES) and not scores.settings["masks"]
    with pytest.raises(
        DataError, match=r"eval.detection.masks=true needs an outline .* all outlines are the rectangles of their boxes"
    ):
        detection(features_of(tiny, root, "boxes"), EvalConfig(own={"detection": {"steps": 1, "masks": True}}))
    table["annotations"][0]["segmentation"] = []
    rewritten(root, table, "val")
    with pytest.raises(DataError, match=r"png has none for the object at x .* leave it out"):
        detection(features_of(tiny, root, "boxes"), EvalConfig(own={"detection": {"steps": 1, "masks": True}}))


def no_categories(root, table):
    table["categories"] = []
    table["annotations"] = []


def other_categories(root, table):
    table["categories"][0]["name"] = "ball"


def no_image(root, table):
    (root / "images" / table["images"][0]["file_name"]).unlink()


def outside(root, table):
    table["annotations"][0]["bbox"] = [70, 3, 5, 5]


def no_objects(root, table):
    table["annotations"] = []


def wrong_size(root, table):
    table["images"][0]["width"] = 80


def damaged_outline(root, table):
    table["annotations"][0]["segmentation"] = {"size": [64, 64], "counts": [3]}


MISTAKES = [
    (no_categories, "'categories' is empty"),
    (other_categories, r"its categories aren't those of instances_train.json \(2 and 2\)"),
    (no_image, r"1 of 3 images don't exist, the first"),
    (outside, r"object 0 of image 'val\d.png' has the box x 70..75, y 3..8, outside of its 64x64 pixels"),
    (no_objects, "no object in the annotations of the 3 val images"),
    (wrong_size, "64x64 pixels, but 80x64 in its annotations"),
    (damaged_outline, r"val\d\.png: the outline of the object at .* can't be used"),
]


@pytest.mark.parametrize(("mistake", "line"), MISTAKES, ids=lambda value: getattr(value, "__name__", ""))
def test_what_cannot_be_used_gets_one_line_before_anything_is_trained(mistake, line, tiny, tmp_path, features_of):
    root = write_shapes(tmp_path, {"train": 3, "val": 3})
    table = listed(root, "val")
    mistake(root, table)
    rewritten(root, table, "val")
    with pytest.raises(DataError, match=line) as caught:
        detection(features_of(tiny, root, "boxes"), EvalConfig(own={"detection": {"steps": 10**9}}))
    assert "\n" not in str(caught.value)


def test_other_layouts_splits_and_a_missing_library(tiny, shapes, scenes, greys, features_of, monkeypatch):
    with pytest.raises(DataError, match="has layout 'masks', but this needs boxes"):
        open_labelled(scenes, need="boxes")
    with pytest.raises(DataError, match="no split 'test'; it has: train, val"):
        open_labelled(shapes, need="boxes", split="test")
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(MissingExtraError, match=r'pip install "smalti\[detection\]"'):
        detection(features_of(tiny, shapes, "boxes"), EvalConfig(own={"detection": {"steps": 10**9}}))


def test_images_without_annotations_are_left_out_and_boxes_over_the_border_clipped(tmp_path):
    root = write_shapes(tmp_path, {"train": 3, "val": 2})
    table = listed(root)
    left_out = table["images"].pop()
    table["annotations"] = [item for item in table["annotations"] if item["image_id"] != left_out["id"]]
    table["annotations"][0]["bbox"] = [40, 40, 60, 60]
    rewritten(root, table)
    for split, names in (("train", [row["file_name"] for row in table["images"]]), ("val", ["val0.png", "val1.png"])):
        (root / "images" / split).mkdir()
        for name in [*names, left_out["file_name"]] if split == "train" else names:
            shutil.move(root / "images" / name, root / "images" / split / name)
    with pytest.warns(UserWarning) as caught:
        data = open_labelled(root, need="boxes")
    lines = [str(warning.message) for warning in caught]
    assert any("1 boxes reach over the border" in line for line in lines)
    assert any("1 of 5 images are in no file of annotations" in line for line in lines)
    assert len(data.train) == 2 and data.classes == ("rectangle", "diamond")


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools with NumPy 2
def test_real_coco_is_read_whole_with_its_crowds(shared):
    data = open_labelled(shared / "data/coco-tiny", need="boxes")
    assert (len(data.train), len(data.test), len(data.classes)) == (32, 6, 80)
    objects = {
        s: [o for x in images.samples for o in annotated_image(x).objects]
        for s, images in (("train", data.train), ("test", data.test))
    }
    assert {s: len(o) for s, o in objects.items()} == {"train": 288, "test": 136}
    assert {s: sum(item.is_crowd for item in o) for s, o in objects.items()} == {"train": 4, "test": 1}
    assert all(coco_ap.has_outline(item) for o in objects.values() for item in o)
    for sample in (*data.train.samples, *data.test.samples):
        image = annotated_image(sample)
        for item in image.objects:
            mask = coco_ap.outline_mask(item, image.height, image.width)
            assert mask.shape == (image.height, image.width)
            codes = pycocotools.mask.frPyObjects(item.outline, image.height, image.width)
            codes = pycocotools.mask.merge(codes) if isinstance(codes, list) else codes
            assert np.array_equal(mask, pycocotools.mask.decode(codes))
    truth = [annotated_image(sample) for sample in data.test.samples]
    perfect = []
    for image in truth:
        plain = [item for item in image.objects if not item.is_crowd][: coco_ap.MOST]
        boxes = np.array([item.box for item in plain]).reshape(-1, 4)
        outlines = tuple(coco_ap.run_lengths(item, image.height, image.width) for item in plain)
        labels = np.array([item.label for item in plain], int)
        perfect.append(coco_ap.Detections(boxes, labels, np.ones(len(plain)), outlines))
    for kind in ("bbox", "segm"):
        metrics, of_class = coco_ap.average_precision(truth, perfect, 80, kind)
        assert metrics["ap"] == pytest.approx(1)
        assert np.nanmin(of_class["ap"]) == pytest.approx(1)


@pytest.mark.parametrize("own", [{"micro_batch": 1}, {"checkpointing": True}])
def test_accumulation_and_checkpointing_change_no_gradient_of_boxes(own, encoder64, shapes, features_of, monkeypatch):
    """With as many regions of each image and the first ones instead of random ones, as in a step of one batch."""
    monkeypatch.setattr(torch, "randperm", lambda count, **more: torch.arange(count, device=more.get("device")))
    features, found = features_of(encoder64, shapes, "boxes"), []
    recipe = small_recipe(learning_rate=1.0, drop_path=0.3, num_rois=8)
    for more in ({}, own):
        with seeded(0):
            copy = trainable_copy(encoder64, recipe.drop_path)
            copy.checkpointing = more.get("checkpointing", False)
            model = Detector(copy, recipe, len(features.data.classes), masks=False)
            model.rpn.fg_bg_sampler.batch_size_per_image = 16
            curve = train(
                model,
                torch.optim.SGD(model.parameters(), 1.0),
                features,
                DetectionExamples(features.data.train.samples, recipe, False, encoder64.mean, encoder64.std),
                partial(detection_loss, model),
                lambda step: 0.1,
                num_steps=1,
                batch_size=2,
                seed=0,
                what="detection",
                micro_batch=more.get("micro_batch"),
            )
        found.append((curve, model.state_dict()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for key, value in found[0][1].items():
        assert_close(found[1][1][key], value, rtol=1e-4, atol=1e-5)
    moved = found[0][1]["backbone.encoder.vit.blocks.0.attn.qkv.weight"] - encoder64.vit.blocks[0].attn.qkv.weight
    assert moved.abs().max() > 1e-3


def test_a_micro_batch_divides_the_batch(encoder64, shapes, features_of):
    config = EvalConfig(preset="paper", own={"detection": {"micro_batch": 3, "checkpointing": True}})
    with pytest.raises(
        ConfigError, match=r"eval.detection.micro_batch=3 does not divide the batch of 64 images; use 2"
    ):
        choose_recipe(features_of(encoder64, shapes, "boxes"), config)
