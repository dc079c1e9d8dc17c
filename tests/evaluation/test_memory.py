"""The memory of patches: rare classes stay, altered images and masks match, and nothing depends on batches."""

import dataclasses

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from smalti.data.crops import random_resized_crop
from smalti.errors import DataError
from smalti.evaluation import memory as memory_module
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.memory import (
    CROP_AREA,
    CROP_ASPECT,
    HBIRD_STD,
    IMAGENET_STD,
    MemoryConfig,
    MemoryRecipe,
    choose_k,
    choose_recipe,
    jitter_and_crop,
    neighbours,
    patch_memory,
    patch_scores,
    unlabelled_places,
)
from smalti.functional.neighbours import patch_counts
from smalti.models.build import build_encoder

SMALL = MemoryRecipe(32, 0, "ignore", False, 1, "encoder")
"""All patches of the scenes, which have 16 training images of 16 patches."""


def test_e8_patches_with_rare_classes_have_the_smallest_scores():
    masks = torch.tensor([[[0, 0, 1, 1], [0, 2, 1, 1], [0, 0, 2, 2], [0, 0, 2, 0]]])
    scores = patch_scores(patch_counts(masks, (2, 2), 3, 255), torch.ones(1, 4))
    assert scores.tolist() == [[5, 1, 3, 5]] and scores.argmin() == 1  # the first to be kept is class 1 alone
    void = torch.full((1, 2, 2), 255)
    assert patch_scores(patch_counts(void, (2, 2), 3, 255), torch.ones(1, 1)).isinf().all()


def test_presets_are_what_their_sources_say(tiny, scenes, features_of):
    tiny.set_normalization((0.485, 0.456, 0.406), IMAGENET_STD)
    features = features_of(tiny, scenes, "masks")
    assert choose_recipe(features, EvalConfig(), MemoryConfig()) == MemoryRecipe(
        32, 50_000, "ignore", False, 1, "encoder"
    )
    assert choose_recipe(features, EvalConfig(preset="full"), MemoryConfig()) == MemoryRecipe(
        512, 10_240_000, "ignore", True, 1, "encoder"
    )
    paper = choose_recipe(features, EvalConfig(preset="paper"), MemoryConfig())
    assert paper == MemoryRecipe(512, 10_240_000, "class0", True, 2, "hbird")
    still = choose_recipe(
        features, EvalConfig(preset="paper", image_size=64), MemoryConfig(augment=False, memory_size=7)
    )
    assert still == MemoryRecipe(64, 7, "class0", False, 1, "hbird")  # a second pass would say the same again
    tiny.set_normalization((0.5,), (0.5,))
    assert (
        choose_recipe(features, EvalConfig(preset="paper"), MemoryConfig()).std == "encoder"
    )  # their slip is about ImageNet's numbers


def test_patches_of_14_pixels_get_images_of_504(scenes, features_of):
    encoder = build_encoder("vit_tiny_patch16_224", img_size=28, patch_size=14, depth=1, seed=0)
    assert (
        choose_recipe(features_of(encoder, scenes, "masks"), EvalConfig(preset="full"), MemoryConfig()).image_size
        == 504
    )


def test_all_labelled_patches_are_kept_in_order(perfect, scenes, features_of):
    memory = patch_memory(features_of(perfect, scenes, "masks"), SMALL, seed=0)
    assert memory.keys.shape == (256, 192) and memory.num_images == 16
    assert memory.counts.dtype == torch.uint8 and memory.counts.sum(1).tolist() == ([60] + [64] * 15) * 16
    assert_close(memory.keys.norm(dim=1), torch.ones(256))
    masks = [cv2.imread(str(scenes / "masks" / f"train{i}.png"), cv2.IMREAD_UNCHANGED)[7::8, 7::8] for i in range(16)]
    names = sorted(range(16), key=lambda i: f"train{i}")
    assert memory.classes.tolist() == np.concatenate([masks[i].ravel() for i in names]).tolist()


@pytest.mark.parametrize(("size", "expected", "images"), [(64, 64, 16), (100, 96, 16), (5, 5, 5), (1000, 256, 16)])
def test_a_bounded_memory_takes_as_many_patches_of_each_image(tiny, scenes, features_of, size, expected, images):
    recipe = dataclasses.replace(SMALL, memory_size=size)
    memory = patch_memory(features_of(tiny, scenes, "masks"), recipe, seed=0)
    assert len(memory.keys) == expected and memory.num_images == images
    again = patch_memory(features_of(tiny, scenes, "masks", batch_size=3, cache_mib=0), recipe, seed=0)
    assert torch.equal(again.counts, memory.counts)
    assert_close(again.keys, memory.keys, atol=1e-3, rtol=0)


def test_a_bounded_memory_has_more_of_the_rare_class(tiny, scenes, features_of):
    def share(size):
        memory = patch_memory(features_of(tiny, scenes, "masks"), dataclasses.replace(SMALL, memory_size=size), 0)
        return float((memory.classes == 2).float().mean())

    assert share(64) > 1.3 * share(0)


def test_void_is_no_class_or_class_0(perfect, scenes, tmp_path, features_of):
    for name in ("images", "train.txt", "val.txt", "classes.txt"):
        (tmp_path / name).symlink_to(scenes / name)
    (tmp_path / "masks").mkdir()
    for path in (scenes / "masks").iterdir():
        mask = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        mask[:8, :8] = 255  # a whole patch
        cv2.imwrite(str(tmp_path / "masks" / path.name), mask)
    ignored = patch_memory(features_of(perfect, tmp_path, "masks"), SMALL, 0)
    as_class = patch_memory(features_of(perfect, tmp_path, "masks"), dataclasses.replace(SMALL, void="class0"), 0)
    assert len(ignored.keys) == 240 and len(as_class.keys) == 256
    assert as_class.counts[::16].tolist() == [[64, 0, 0]] * 16
    assert (ignored.counts.sum(1) == 64).all() and (as_class.counts.sum(1) == 64).all()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_altered_images_do_not_depend_on_batches_or_workers(perfect, scenes, features_of, num_workers):
    recipe = MemoryRecipe(32, 200, "ignore", True, 2, "encoder")
    memory = patch_memory(features_of(perfect, scenes, "masks"), recipe, 0)
    assert len(memory.keys) == 2 * 16 * 6
    other = patch_memory(features_of(perfect, scenes, "masks", batch_size=3, num_workers=num_workers), recipe, 0)
    assert torch.equal(memory.counts, other.counts) and torch.equal(memory.keys, other.keys)
    again = patch_memory(features_of(perfect, scenes, "masks"), recipe, 1)
    assert not torch.equal(memory.counts, again.counts)


@given(seed=st.integers(0, 1000), height=st.integers(20, 60), width=st.integers(20, 60))
def test_image_and_mask_show_the_same_part(seed, height, width):
    rows, columns = np.mgrid[:height, :width]
    mask = (rows + columns).astype(np.uint8)
    image = np.repeat(mask[..., None], 3, axis=2)
    pixels, labels = jitter_and_crop(image, mask, size=32, rng=np.random.default_rng(seed))
    assert pixels.shape == (32, 32, 3) and labels.shape == (32, 32)
    # jitter is affine and monotone in grey, so the two stay linearly related
    assert np.corrcoef(pixels.mean(2).ravel(), labels.ravel())[0, 1] > 0.99
    assert labels[0, 0] < labels[-1, -1] and labels[0, -1] < labels.max()  # not mirrored


def test_crops_of_up_to_twice_the_area_are_what_the_source_says():
    rng = np.random.default_rng(0)
    crops = [random_resized_crop(rng, 375, 500, CROP_AREA, CROP_ASPECT) for _ in range(20_000)]
    areas = np.array([h * w for _, _, h, w in crops]) / (375 * 500)
    is_whole = areas == 1
    assert is_whole.mean() == pytest.approx(0.146, abs=0.01)  # ten draws that don't fit
    assert areas[~is_whole].mean() == pytest.approx(0.66, abs=0.01)


def test_the_public_codes_blue_is_undone_afterwards(perfect, scenes, features_of):
    encoder = build_encoder("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, seed=0)
    before = encoder._std.clone()
    hbird = dataclasses.replace(SMALL, std="hbird")
    features = features_of(encoder, scenes, "masks")
    ours, theirs = patch_memory(features, SMALL, 0), patch_memory(features, hbird, 0)
    assert torch.equal(encoder._std, before) and tuple(encoder.std) == pytest.approx(IMAGENET_STD)
    assert not torch.equal(ours.keys, theirs.keys) and torch.equal(ours.counts, theirs.counts)
    encoder.set_normalization(encoder.mean, HBIRD_STD)
    assert_close(patch_memory(features_of(encoder, scenes, "masks"), SMALL, 0).keys, theirs.keys)
    sims = next(neighbours(features, hbird, 0, 3))[0]
    assert torch.equal(encoder._std.flatten(), torch.tensor(HBIRD_STD)) and sims.shape == (6, 16, 3)


def test_the_search_is_done_once_where_it_fits_and_gives_the_same_anyway(tiny, scenes, features_of, monkeypatch):
    features = features_of(tiny, scenes, "masks")
    searched = []
    search = memory_module.nearest
    monkeypatch.setattr(memory_module, "nearest", lambda *a, **b: (searched.append(a[2]), search(*a, **b))[1])
    kept = [[part for part in batch] for k in (20, 5) for batch in neighbours(features, SMALL, 0, k)]
    assert searched == [30]
    monkeypatch.setattr(memory_module, "_KEPT_BYTES", 0)
    streamed = [[part for part in batch] for k in (20, 5) for batch in neighbours(features, SMALL, 0, k)]
    assert searched == [30, 20, 5]
    for one, other in zip(kept, streamed, strict=True):
        assert one[2] == other[2] and torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_the_number_of_neighbours_follows_the_memory():
    assert choose_k(EvalConfig(), MemoryConfig(), 30, 5000) == (30, {"k": 30})
    assert choose_k(EvalConfig(), MemoryConfig(), 30, 4999) == (10, {"k": 10})
    assert choose_k(EvalConfig(preset="full"), MemoryConfig(), 30, 4999) == (30, {"k": 30})
    k, about = choose_k(EvalConfig(), MemoryConfig(k=40), 30, 12)
    assert k == 12 and about["k_wanted"] == 40 and "reduced: the memory has only 12 patches" in about["k_note"]


def test_images_without_a_label_are_counted_and_those_without_any_are_refused(tiny, scenes, tmp_path, features_of):
    for name in ("images", "train.txt", "val.txt", "classes.txt"):
        (tmp_path / name).symlink_to(scenes / name)
    (tmp_path / "masks").mkdir()
    for mask in (scenes / "masks").iterdir():
        (tmp_path / "masks" / mask.name).symlink_to(mask)

    def blank(name):
        (tmp_path / "masks" / name).unlink()
        cv2.imwrite(str(tmp_path / "masks" / name), np.full((32, 32), 255, dtype=np.uint8))

    blank("train3.png")
    with pytest.warns(UserWarning, match=r"1 of 16 train images have no labelled pixel .*\(the first is train3\.png"):
        memory = patch_memory(features_of(tiny, tmp_path, "masks"), SMALL, 0)
    assert memory.num_images == 15 and len(memory.keys) == 240
    blank("val2.png")
    with pytest.warns(UserWarning, match=r"1 of 6 val images have no labelled pixel .*\(the first is val2\.png"):
        assert len(unlabelled_places(features_of(tiny, tmp_path, "masks"))) == 1
    for number in (0, 1, 3, 4, 5):
        blank(f"val{number}.png")
    with pytest.raises(DataError, match="no labelled pixel in the masks of all 6 val images"):
        unlabelled_places(features_of(tiny, tmp_path, "masks"))
    features = features_of(tiny, tmp_path, "masks")
    for number in (*range(3), *range(4, 16)):
        blank(f"train{number}.png")
    with pytest.raises(DataError, match="no labelled pixel in the masks of all 16 training images"):
        patch_memory(features, SMALL, 0)
