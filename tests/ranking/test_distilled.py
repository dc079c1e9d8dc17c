"""Orders of a run of ranker, and their agreement with the teacher."""

from pathlib import Path

import pytest
import torch

from methods.test_ranker import bright_patches, write
from smalti.data.images.folders import open_images
from smalti.data.order_files import read_orders
from smalti.errors import ConfigError
from smalti.functional.orders import rank_correlation, static_order
from smalti.ranking.distilled import TeacherAgreement, agree_with_teacher
from smalti.ranking.rank import RankConfig, open_ranker, rank
from smalti.runs.train import train


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Images in two splits, the teacher's file of both, and a run of ranker trained on the train split."""
    root = tmp_path_factory.mktemp("taught")
    orders = bright_patches(root / "flat", 12)
    for split, numbers in (("train", range(8)), ("val", range(8, 12))):
        (root / "images" / split).mkdir(parents=True)
        for number in numbers:
            (root / "flat" / f"{number:03d}.png").rename(root / "images" / split / f"{number:03d}.png")
    file = write(root / "orders.parquet", root / "images", orders)
    run = root / "run"
    train(
        "ranker",
        out=run,
        overrides={
            "data": {"path": str(root / "images"), "image_size": 32},
            "encoder": {"name": "vit_tiny_patch16_224", "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3},
            "method": {"orders": str(file)},
            "batch_size": 4,
            "steps": 3,
        },
        quiet=True,
    )
    return root / "images", file, run


def test_agreement_is_measured_on_images_that_were_not_trained_on(taught, tmp_path: Path) -> None:
    images, file, run = taught
    ranking = rank(str(run), str(images), tmp_path / "distilled.parquet")
    assert ranking.names == ("distilled",)
    found = agree_with_teacher(
        open_ranker(str(run), RankConfig(), (), torch.device("cpu")), ranking.cache, ranking.images
    )
    assert found is not None and found.held_out and found.num_images == 4 and found.order == "collapse"
    teacher, ours = read_orders(file), read_orders(tmp_path / "distilled.parquet")
    names = [name for name in open_images(images).names if name.startswith("val/")]
    trained = [name for name in open_images(images).names if name.startswith("train/")]
    theirs = teacher.orders("collapse", names, [False] * 4)
    assert found.distilled == pytest.approx(
        float(rank_correlation(ours.orders("distilled", names, [False] * 4), theirs).mean())
    )
    static = static_order(teacher.orders("collapse", trained, [False] * 8))
    assert found.static == pytest.approx(float(rank_correlation(static.expand(4, -1), theirs).mean()))
    assert found.other_image == pytest.approx(float(rank_correlation(theirs.roll(1, 0), theirs).mean()))
    assert found.sentence in ranking.sentences


def test_without_held_out_images_the_sentence_says_so(taught, tmp_path: Path) -> None:
    images, _, run = taught
    ranking = rank(str(run), str(images / "train"), tmp_path / "o.parquet")
    assert not any("correlate" in sentence for sentence in ranking.sentences)  # other names: the teacher has no orders
    found = TeacherAgreement("collapse", "f", 7, False, 0.9, 0.5, 0.4)
    assert "on 7 images that it was trained on" in found.sentence and "look at the image" in found.sentence
    found = TeacherAgreement("collapse", "f", 7, True, 0.5, 0.5, 0.4)
    assert "not trained on" in found.sentence and "one order for all images is as good" in found.sentence


def test_settings_of_other_rankers_are_refused(taught) -> None:
    _, _, run = taught
    with pytest.raises(ConfigError, match=r"damping: does not apply to .*, a run of ranker"):
        open_ranker(str(run), RankConfig(damping=0.5), (), torch.device("cpu"))


def test_the_order_can_train_a_classifier(taught, tmp_path: Path) -> None:
    images, _, run = taught
    ranking = rank(str(run), str(images), tmp_path / "distilled.parquet")
    assert ranking.cache.stored.keys() == {"distilled"}
    orders = ranking.cache.orders("distilled", ranking.images.names[:2], [False, True])
    assert (orders.sort(1).values == torch.arange(16)).all()
