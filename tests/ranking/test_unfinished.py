"""A ranking that is stopped goes on where it was, with the same orders; parts of other rankings are not used."""

from pathlib import Path

import pytest
import torch

from smalti.cli.rank import _file_of
from smalti.data.images.folders import open_images
from smalti.data.order_files import read_orders
from smalti.ranking import rank as ranking
from smalti.ranking import rankers
from smalti.ranking.rank import RankConfig, rank
from smalti.ranking.unfinished import Rows, Unfinished, join

SPEC = "random:vit_tiny_patch16_224"
CONFIG = RankConfig(batch_size=2, image_size=32)


class Stop(Exception):
    """Stops a ranking after some images."""


def stop_after(count: int):
    def progress(what: str, done: int, total: int) -> None:
        if what == "images ranked" and done >= count:
            raise Stop

    return progress


def rows(first: int, count: int, names: tuple[str, ...] = ("a",)) -> Rows:
    values = torch.arange(count * 4).view(count, 4)
    return Rows(
        done=count,
        places=list(range(first, first + count)),
        flips=[False] * count,
        orders={name: values.short() for name in names},
        scores={"a": values.float()},
        degenerate={"a": torch.zeros(count, dtype=torch.bool)},
        seconds=dict.fromkeys(names, 0.5),
        skipped=[(f"x{first}.png", "damaged")],
    )


def test_parts_come_back_as_they_were_and_joined_in_order(tmp_path: Path) -> None:
    out = tmp_path / "orders.parquet"
    first = Unfinished(out, "key")
    for part in (rows(0, 2), rows(2, 3)):
        first.add(part)
        first.flush()
    again = Unfinished(out, "key")
    assert again.done == 5
    found, expected = join(again.parts), join([rows(0, 2), rows(2, 3)])
    assert found.places == [0, 1, 2, 3, 4] and found.skipped == expected.skipped and found.seconds == {"a": 1.0}
    for group in ("orders", "scores", "degenerate"):
        assert torch.equal(getattr(found, group)["a"], getattr(expected, group)["a"])
        assert getattr(found, group)["a"].dtype == getattr(expected, group)["a"].dtype


def test_another_key_starts_anew_and_a_damaged_part_is_ranked_again(tmp_path: Path) -> None:
    out = tmp_path / "orders.parquet"
    first = Unfinished(out, "key")
    for start in (0, 2, 4):
        first.add(rows(start, 2))
        first.flush()
    parts = sorted(first.folder.glob("*.safetensors"))
    parts[1].write_bytes(parts[1].read_bytes()[:40])
    assert Unfinished(out, "key").done == 2  # what follows the damaged part is removed, too
    assert [path.name for path in sorted(first.folder.glob("*.safetensors"))] == [parts[0].name]
    assert Unfinished(out, "other").done == 0 and not first.folder.exists()


def test_a_stopped_ranking_continues_and_gives_the_same_file(pictures: Path, tmp_path: Path, monkeypatch) -> None:
    total = len(open_images(pictures))
    assert total >= 5
    whole = rank(SPEC, str(pictures), tmp_path / "whole.parquet", CONFIG).cache
    with pytest.raises(Stop):
        rank(SPEC, str(pictures), tmp_path / "o.parquet", CONFIG, progress=stop_after(3))
    assert not (tmp_path / "o.parquet").exists() and (tmp_path / ".o.parquet.unfinished").is_dir()
    seen = []
    original = rankers._rank_batches

    def counted(ranker, images, start, *rest):
        seen.append((start, len(images)))
        return original(ranker, images, start, *rest)

    monkeypatch.setattr(rankers, "_rank_batches", counted)
    again = rank(SPEC, str(pictures), tmp_path / "o.parquet", CONFIG).cache
    assert seen == [(4, total - 4)]
    assert list(again.images) == list(whole.images) and list(again.flips) == list(whole.flips)
    assert all(torch.equal(again.stored[name], whole.stored[name]) for name in whole.stored)
    assert not (tmp_path / ".o.parquet.unfinished").exists()
    assert torch.equal(read_orders(tmp_path / "o.parquet").scores["attention"], whole.scores["attention"])


def test_other_settings_do_not_use_the_parts(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        rank(SPEC, str(pictures), tmp_path / "o.parquet", CONFIG, progress=stop_after(2))
    images = open_images(pictures)
    keys = {
        ranking._key(SPEC, images, config, names, flips)
        for config in (CONFIG, RankConfig(batch_size=3, image_size=32))
        for names in (("attention",), ("variance",))
        for flips in (True, False)
    }
    assert len(keys) == 8
    same = RankConfig(batch_size=2, image_size=32, num_shown=0, num_workers=1)
    assert ranking._key(SPEC, images, same, ("variance",), True) in keys


def test_the_command_accepts_a_folder_with_an_unfinished_ranking(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(Stop):
        rank(SPEC, str(pictures), tmp_path / "out" / "orders.parquet", CONFIG, progress=stop_after(2))
    assert _file_of(tmp_path / "out", "orders.parquet") == tmp_path / "out" / "orders.parquet"
