"""The file of orders: what is written is read, and a file that doesn't fit is named in one line."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from smalti.data.images.image_set import ImageSample, ImageSet
from smalti.data.order_files import ORDERS, check_fits, check_order, grid_order, read_orders, write_orders
from smalti.errors import ConfigError, DataError, ShapeError
from smalti.functional.orders import fixed_random, halton, static_order

GRID = (3, 4)


def orders_of(rows: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(12, generator=generator) for _ in range(rows)])


def written(path: Path, images: int = 6, flips=(False, True), **changes) -> tuple[Path, torch.Tensor]:
    """A file of some images: the first two thirds are train, the others test."""
    rows = [(f"c/{n}.png", "train" if n < images * 2 // 3 else "test", flip) for n in range(images) for flip in flips]
    table = orders_of(len(rows))
    arguments = {
        "images": [row[0] for row in rows],
        "splits": [row[1] for row in rows],
        "flips": [row[2] for row in rows],
        "orders": {"collapse": table, "in_strength": table.flip(1)},
        "scores": {"collapse": torch.rand(len(rows), 12)},
        "grid": GRID,
        "image_size": 48,
        "root": "/data/set",
        "source": "a test",
    }
    write_orders(path, **{**arguments, **changes})
    return path, table


def image_set(names) -> ImageSet:
    root = Path("/data/set")
    return ImageSet(root, "folder", tuple(ImageSample(root / name) for name in names), None)


def test_what_is_written_is_read(tmp_path):
    path, table = written(tmp_path / "orders.parquet")
    cache = read_orders(path)
    assert (cache.grid, cache.image_size, cache.root, cache.source) == (GRID, 48, "/data/set", "a test")
    found = cache.orders("collapse", ["c/3.png", "c/0.png"], [True, False])
    assert torch.equal(found, table[[7, 0]])
    assert torch.equal(cache.orders("in_strength", ["c/3.png"], [True]), table[7:8].flip(1))
    assert cache.scores["collapse"].shape == (12, 12)
    assert torch.equal(cache.table("collapse", ["c/5.png"]).long(), table[10:12][None])


def test_derived_orders_follow_from_collapse(tmp_path):
    path, table = written(tmp_path / "orders.parquet")
    cache = read_orders(path)
    names = [f"c/{n}.png" for n in range(6)]
    assert torch.equal(cache.orders("collapse_reversed", names, [False] * 6), table[::2].flip(1))
    static = cache.orders("collapse_static", names, [True] * 6)
    assert torch.equal(static, static_order(table[:8]).expand(6, -1))  # four images of train, both flip states


def test_every_order_of_images_has_a_static_one(tmp_path):
    path, table = written(tmp_path / "orders.parquet")
    cache = read_orders(path)
    assert {"collapse_static", "in_strength_static"} <= set(cache.names)
    assert not {name for name in cache.names if name.startswith("variance") and name.endswith("_static")}
    static = cache.orders("in_strength_static", ["c/0.png", "c/5.png"], [False, True])
    assert torch.equal(static, static_order(table.flip(1)[:8]).expand(2, -1))


def test_static_order_is_over_all_images_where_nothing_is_called_train(tmp_path):
    path, table = written(tmp_path / "orders.parquet", splits=[None] * 12)
    assert torch.equal(read_orders(path).static_of("collapse"), static_order(table))


def test_shuffled_order_is_another_images_of_the_same_split_and_flip_state(tmp_path):
    path, table = written(tmp_path / "orders.parquet", images=12)
    cache = read_orders(path)
    for flip in (0, 1):
        own = table[flip::2]
        found = cache.orders("collapse_shuffled", [f"c/{n}.png" for n in range(12)], [bool(flip)] * 12)
        donors = [int((own == row).all(1).nonzero()) for row in found]
        assert sorted(donors) == list(range(12))  # each is used once
        assert all(donor != image for image, donor in enumerate(donors))
        assert all((donor < 8) == (image < 8) for image, donor in enumerate(donors))  # train from train
    assert torch.equal(
        found, read_orders(path).orders("collapse_shuffled", [f"c/{n}.png" for n in range(12)], [True] * 12)
    )


def test_image_alone_in_its_split_cannot_be_shuffled(tmp_path):
    path, _ = written(tmp_path / "orders.parquet", images=2)
    with pytest.raises(DataError, match="split 'train' has one image"):
        read_orders(path).orders("collapse_shuffled", ["c/0.png"], [False])


def test_geometric_orders_need_no_file():
    assert torch.equal(grid_order("halton", GRID), halton(GRID))
    assert torch.equal(grid_order("fixed_random", GRID), fixed_random(12, 0))
    assert torch.equal(grid_order("fixed_random:3", GRID), fixed_random(12, 3))
    for name in ORDERS:
        order = grid_order(name, GRID)
        assert order is None or sorted(order.tolist()) == list(range(12))
    assert grid_order("random", GRID) is None and grid_order("collapse", GRID) is None


@pytest.mark.parametrize("name", ["colapse", "fixed_random:x", "raster:1", ""])
def test_unknown_order_is_named(name):
    with pytest.raises(ConfigError, match="there is no order"):
        check_order(name)


def test_orders_of_another_set_are_refused(tmp_path):
    cache = read_orders(written(tmp_path / "orders.parquet")[0])
    check_fits(cache, image_set(["c/0.png", "c/5.png"]), GRID, flips_needed=True)
    with pytest.raises(DataError, match="has orders of 1 of the 2 images of /data/set; it was made from /data/set"):
        check_fits(cache, image_set(["c/0.png", "d/5.png"]), GRID, flips_needed=False)
    with pytest.raises(DataError, match=r"has no order of d/1\.png"):
        cache.orders("collapse", ["d/1.png"], [False])


def test_orders_of_another_grid_are_refused(tmp_path):
    cache = read_orders(written(tmp_path / "orders.parquet")[0])
    with pytest.raises(ShapeError, match="orders of 3x4 patches, the images have 4x4"):
        check_fits(cache, image_set(["c/0.png"]), (4, 4), flips_needed=False)


def test_missing_flip_state_is_named(tmp_path):
    cache = read_orders(written(tmp_path / "orders.parquet", flips=(False,))[0])
    check_fits(cache, image_set(["c/0.png"]), GRID, flips_needed=False)
    with pytest.raises(DataError, match=r"no orders of mirrored images .*rank again with both flip states"):
        check_fits(cache, image_set(["c/0.png"]), GRID, flips_needed=True)


def test_order_that_is_not_in_the_file_is_named(tmp_path):
    cache = read_orders(written(tmp_path / "orders.parquet")[0])
    with pytest.raises(DataError, match="holds no order 'coverage'; it can give collapse, in_strength, collapse_rev"):
        cache.orders("coverage", ["c/0.png"], [False])


def test_files_that_hold_no_orders_are_refused(tmp_path):
    with pytest.raises(DataError, match="is not a file"):
        read_orders(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("no parquet")
    with pytest.raises(DataError, match="can't be read as a Parquet file"):
        read_orders(tmp_path / "text.parquet")
    pq.write_table(pa.table({"path": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match="is no file of orders"):
        read_orders(tmp_path / "other.parquet")


def test_damaged_files_are_refused(tmp_path):
    path, _ = written(tmp_path / "orders.parquet")
    table = pq.read_table(path)
    note = json.loads(table.schema.metadata[b"smalti"])
    wrong = pa.FixedSizeListArray.from_arrays(pa.array([0] * 144, pa.int16()), 12)
    place = table.column_names.index("collapse")
    pq.write_table(table.set_column(place, table.schema.field("collapse"), wrong), path)
    with pytest.raises(DataError, match="'collapse' is no permutation"):
        read_orders(path)
    pq.write_table(table.replace_schema_metadata({"smalti": json.dumps({**note, "grid": [5, 5]})}), path)
    with pytest.raises(DataError, match=r"orders.parquet: can't be read as a file of orders"):
        read_orders(path)
    pq.write_table(table.drop_columns(["flip"]), path)
    with pytest.raises(DataError, match=r"orders.parquet: can't be read as a file of orders"):
        read_orders(path)
    for grid in ("[Infinity, 1]", "[-3, -4]", "[0, 12]", '"34"', "[[3], 4]", "[1e999, 4]"):
        damaged = json.dumps({**note, "grid": None}).replace("null", grid, 1)
        pq.write_table(table.replace_schema_metadata({"smalti": damaged}), path)
        with pytest.raises(DataError, match=r"orders.parquet: can't be read as a file of orders"):
            read_orders(path)
    pq.write_table(table.replace_schema_metadata({"smalti": "[" * 100_000}), path)
    with pytest.raises(DataError, match=r"orders.parquet: is no file of orders"):
        read_orders(path)
    for name, value in (("image", None), ("image", 3), ("split", 1.5), ("flip", "no"), ("collapse", "text")):
        column = pa.array([value] * len(table), pa.string() if value is None else None)
        pq.write_table(table.drop_columns([name]).append_column(name, column), path)
        with pytest.raises(DataError, match=r"orders.parquet: can't be read as a file of orders"):
            read_orders(path)


def test_what_is_no_order_is_not_written(tmp_path):
    with pytest.raises(ShapeError, match="is no permutation"):
        written(tmp_path / "orders.parquet", orders={"collapse": torch.zeros(12, 12, dtype=torch.long)})
    with pytest.raises(ShapeError, match="6 splits for 12 images"):
        written(tmp_path / "orders.parquet", splits=[None] * 6)
    with pytest.raises(ConfigError, match=r"ends in \.parquet"):
        written(tmp_path / "orders.csv")
    assert not list(tmp_path.iterdir())


def test_images_that_could_not_be_read_are_excused(tmp_path):
    path, table = written(tmp_path / "orders.parquet", unreadable=["c/broken.png"], seconds={"collapse": 0.5})
    cache = read_orders(path)
    check_fits(cache, image_set(["c/0.png", "c/broken.png"]), GRID, flips_needed=True)
    found = cache.table("collapse", ["c/broken.png", "c/0.png"]).long()
    assert torch.equal(found, torch.stack([torch.arange(12).expand(2, -1), table[:2]]))
    assert torch.equal(cache.table("collapse", ["c/1.png"], flips=False).long(), table[None, 2:3])
    assert cache.seconds == {"collapse": 0.5}
    with pytest.raises(DataError, match=r"has no order of c/broken\.png"):
        cache.orders("collapse", ["c/broken.png"], [False])
