import csv
import itertools
import multiprocessing
import pickle
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smalti.data.color import ColorConfig
from smalti.data.crops import MultiCrop, ViewSpec
from smalti.data.images.folders import open_images
from smalti.data.loader import TrainLoader, UnreadableLog, epoch_order, sample_key
from smalti.data.views import Skipped
from smalti.errors import DataError, RunError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

COLOR = ColorConfig(jitter_prob=1)
VIEWS = MultiCrop(
    [
        ViewSpec(count=2, size=16, color=COLOR, blur_prob=0.5, solarize_prob=0.2),
        ViewSpec(count=3, size=8, scale=(0.1, 0.4), color=COLOR, blur_prob=0.5),
    ]
)

ORDER = [5, 6, 4, 0, 7, 8, 3, 2, 9, 1]
KEY = 4635879678023765015


def take(images, count, batch_size=4, views=VIEWS, **options):
    loader = TrainLoader(images, views, batch_size=batch_size, seed=7, **options)
    return list(itertools.islice(loader, count))


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        for name in ("boxes", "flips", "source_size", "index", "keys"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert all(torch.equal(x, y) for x, y in zip(a.crops, b.crops, strict=True))


@pytest.mark.parametrize("num_workers", [1, 3])
def test_any_number_of_workers_gives_the_same_bits(coordinate_images, num_workers):
    assert_same(take(coordinate_images, 6), take(coordinate_images, 6, num_workers=num_workers))


@pytest.mark.parametrize(("start_step", "num_workers"), [(1, 0), (4, 0), (4, 2)])
def test_starting_at_a_step_equals_running_to_it(coordinate_images, start_step, num_workers):
    resumed = take(coordinate_images, 2, start_step=start_step, num_workers=num_workers)
    assert_same(take(coordinate_images, start_step + 2)[start_step:], resumed)


@pytest.mark.parametrize("world_size", [2, 3])
def test_several_processes_see_what_one_with_their_batches_together_sees(coordinate_images, world_size):
    together = take(coordinate_images, 3, batch_size=2 * world_size)
    parts = [take(coordinate_images, 3, batch_size=2, rank=r, world_size=world_size) for r in range(world_size)]
    for step, whole in enumerate(together):
        assert torch.cat([part[step].index for part in parts]).tolist() == whole.index.tolist()
        assert torch.cat([part[step].keys for part in parts]).tolist() == whole.keys.tolist()
        ours = torch.cat([part[step].crops[0].unflatten(0, (2, 2)) for part in parts], dim=1).flatten(0, 1)
        assert torch.equal(ours, whole.crops[0])


def test_every_epoch_sees_every_image_once_in_its_own_order(coordinate_images):
    seen = torch.cat([views.index for views in take(coordinate_images, 10, batch_size=3)]).tolist()
    epochs = [seen[5 * i : 5 * i + 5] for i in range(6)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


@given(seed=st.integers(0, 2**63), epoch=st.integers(0, 1000), n=st.integers(1, 300))
def test_an_epochs_order_is_a_permutation(seed, epoch, n):
    assert sorted(epoch_order(seed, epoch, n)) == list(range(n))


def test_order_and_keys_are_these_numbers_for_ever():
    """Runs must be repeatable with later versions of this library and of NumPy."""
    assert epoch_order(0, 0, 10).tolist() == ORDER
    assert sample_key(0, 0, 0) == KEY
    assert sample_key(2**64 - 1, 3, 10**9) == sample_key(-1, 3, 10**9)


def test_keys_are_all_different_and_spread_over_63_bits():
    keys = np.array([sample_key(s, e, i) for s in range(5) for e in range(5) for i in range(40)])
    assert len(set(keys.tolist())) == 1000 and keys.min() >= 0
    bits = (keys[:, None] >> np.arange(63)) & 1
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 0.08


def test_the_same_image_looks_different_in_another_epoch_and_under_another_seed(coordinate_images):
    one = coordinate_images.samples[:1]
    images = type(coordinate_images)(coordinate_images.root, "folder", one, None)
    first, second = take(images, 2, batch_size=1)
    assert not torch.equal(first.boxes, second.boxes)


def test_iterating_leaves_torchs_own_generator_alone(coordinate_images):
    state = torch.random.get_rng_state()
    take(coordinate_images, 2)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_an_unreadable_image_is_replaced_by_the_next_and_reported(coordinate_images):
    healthy = take(coordinate_images, 5, batch_size=1)
    broken = coordinate_images.paths[2]
    broken.write_bytes(broken.read_bytes()[:100])
    order = epoch_order(7, 0, 5).tolist()
    for num_workers in (0, 2):
        views = take(coordinate_images, 5, batch_size=1, num_workers=num_workers)
        place = order.index(2)
        substitute = views[place]
        assert substitute.skipped == (Skipped(broken, "a PNG cut short after 100 bytes"),)
        following = order[place + 1] if place < 4 else order[0]
        assert substitute.index.tolist() == [following]
        assert substitute.keys.tolist() == healthy[place].keys.tolist()  # not the key of its own turn
        others = [i for i in range(5) if i != place]
        assert_same([views[i] for i in others], [healthy[i] for i in others])
        assert not any(views[i].skipped for i in others)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_only_unreadable_images_are_our_error_even_from_a_worker(tmp_path, num_workers):
    for i in range(40):
        (tmp_path / f"{i:02}.png").write_bytes(b"nothing")
    images = open_images(tmp_path)
    first = images.paths[epoch_order(7, 0, 40)[0]]
    line = f"32 images in a row can't be read, the first: {first}: can't be decoded; it is damaged, or not an image"
    with pytest.raises(DataError, match=f"^{re.escape(line)}$"):
        take(images, 1, num_workers=num_workers)


def test_a_wrong_number_of_channels_reaches_the_user(coordinate_images):
    with pytest.raises(DataError, match=r"3 channels, but data.channels=5; set data.channels=3"):
        take(coordinate_images, 1, channels=5)


def test_what_goes_to_a_worker_can_be_pickled(coordinate_images):
    batches = TrainLoader(coordinate_images, VIEWS, batch_size=2, seed=7)._batches
    assert_same([pickle.loads(pickle.dumps(batches))[3]], [batches[3]])


@pytest.mark.slow
def test_workers_may_be_spawned(coordinate_images):
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("spawn", force=True)
    try:
        assert_same(take(coordinate_images, 3, num_workers=1), take(coordinate_images, 3))
    finally:
        multiprocessing.set_start_method(before, force=True)


def test_sixteen_bit_and_many_channel_images_are_trained_on(write, tmp_path):
    tifffile = pytest.importorskip("tifffile", reason="tifffile comes with scikit-image")
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 65536, (30, 40, 5)).astype(np.uint16)
        tifffile.imwrite(tmp_path / f"{i}.tif", pixels, photometric="minisblack", planarconfig="contig")
    (views,) = take(open_images(tmp_path), 1, channels=5)
    assert views.crops[0].shape == (8, 5, 16, 16) and views.crops[0].dtype == torch.float32


def test_unreadable_images_are_listed_once_and_counted_over_processes(tmp_path):
    path = tmp_path / "run" / "unreadable.csv"
    first, second = UnreadableLog(path, 100), UnreadableLog(path, 100)
    first.add([Skipped(tmp_path / "a, b.png", 'cut "short"')])
    second.add([Skipped(tmp_path / "c.png", "empty"), Skipped(tmp_path / "a, b.png", "again")])
    first.add([Skipped(tmp_path / "c.png", "empty")])
    assert (first.count, second.count) == (2, 2)
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [["path", "reason"], [str(tmp_path / "a, b.png"), 'cut "short"'], [str(tmp_path / "c.png"), "empty"]]
    assert UnreadableLog(path, 100).count == 2  # a resumed run goes on counting


def test_more_than_a_tenth_unreadable_stops_the_run(tmp_path):
    log = UnreadableLog(tmp_path / "unreadable.csv", 20)
    log.add([Skipped(tmp_path / "a.png", "cut short"), Skipped(tmp_path / "b.png", "empty")])
    line = f"3 of 20 images can't be read, more than a tenth; the first: {tmp_path / 'a.png'}: cut short; all of them: "
    with pytest.raises(DataError, match=re.escape(line)):
        log.add([Skipped(tmp_path / "c.png", "empty")])


def test_nothing_skipped_writes_nothing(tmp_path):
    UnreadableLog(tmp_path / "unreadable.csv", 20).add([])
    assert not (tmp_path / "unreadable.csv").exists()


def test_a_list_that_cant_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"unreadable.csv: can't be written \(Not a directory|File exists"):
        UnreadableLog(tmp_path / "file" / "unreadable.csv", 20).add([Skipped(tmp_path / "a.png", "x")])
