"""What finetune and segmenter share: schedules, borrowed randomness, batches, and the copy that is trained."""

import math
import random

import numpy as np
import pytest
import timm.scheduler
import torch
from torch import nn
from torch.testing import assert_close

from evaluation.conftest import tiny_encoder
from smalti.data.loader import epoch_order, sample_key
from smalti.data.views import Skipped
from smalti.errors import DataError, RunError
from smalti.evaluation.tuning import (
    _TuningBatches,
    normalized,
    seeded,
    stream,
    train,
    trainable_copy,
    warm_cosine,
    warm_poly,
)


def test_e16_the_polynomial_schedule_has_segmenters_values():
    first, middle, last = (warm_poly(step, 160_000, peak=1e-3, least=1e-5) for step in (0, 80_000, 159_999))
    assert first == 1e-3
    assert middle == pytest.approx(9.9e-4 * 0.5**0.9 + 1e-5, rel=1e-9) and round(middle, 9) == 5.40528e-4
    assert last == pytest.approx(1.0021e-5, abs=1e-9)


def test_after_the_warm_up_both_schedules_are_timms():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2e-3)
    cosine = timm.scheduler.CosineLRScheduler(optimizer, 40, lr_min=1e-5, warmup_prefix=True, warmup_t=10)
    poly = timm.scheduler.PolyLRScheduler(optimizer, 40, power=0.9, lr_min=1e-5, warmup_prefix=True, warmup_t=10)
    for step in range(10, 50):
        ours = warm_cosine(step, 50, peak=2e-3, least=1e-5, num_warmup=10)
        assert math.isclose(ours, cosine._get_lr(step)[0], rel_tol=1e-9)
        ours = warm_poly(step, 50, peak=2e-3, least=1e-5, num_warmup=10)
        assert math.isclose(ours, poly._get_lr(step)[0], rel_tol=1e-9)


@pytest.mark.parametrize("schedule", [warm_cosine, warm_poly])
def test_the_warm_up_climbs_in_equal_strides_and_never_stands_at_zero(schedule):
    rates = [schedule(step, 20, peak=4.0, least=0.0, num_warmup=4) for step in range(5)]
    assert rates == pytest.approx([1.0, 2.0, 3.0, 4.0, 4.0])
    assert schedule(0, 1, peak=4.0, least=0.0, num_warmup=0) == 4.0


def test_borrowed_randomness_follows_the_seed_and_is_given_back():
    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    with seeded(7):
        first = draw()
    with pytest.raises(KeyError), seeded(-1):
        draw()
        raise KeyError
    with seeded(7):
        again = draw()
    with seeded(8):
        other = draw()
    assert first == again
    assert not set(first) & set(other)
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


def test_the_copy_trains_everything_and_shares_nothing():
    encoder = tiny_encoder(proj_drop_rate=0.5, drop_path_rate=0.5)
    encoder.requires_grad_(False)
    copy = trainable_copy(encoder, 0.0)
    assert all(p.requires_grad for p in copy.parameters()) and not any(p.requires_grad for p in encoder.parameters())
    theirs = {p.data_ptr() for p in encoder.parameters()}
    assert not theirs & {p.data_ptr() for p in copy.parameters()}
    images = torch.rand(2, 3, 32, 32)
    copy.train()
    with seeded(0):  # without dropout and dropped paths, training mode is eval mode
        assert_close(copy.encode(images).patches, encoder.eval().encode(images).patches)


def test_normalized_is_what_the_encoder_does(tiny):
    tiny.set_normalization((0.1, 0.5, 0.9), (0.2, 0.3, 0.4))
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    theirs = tiny.normalize(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0]
    assert_close(normalized(pixels, tiny.mean, tiny.std), theirs)
    assert_close(normalized((pixels / 255).astype(np.float32), tiny.mean, tiny.std), theirs)


def as_example(place, key):
    return torch.tensor([float(place)]), torch.tensor(key)


class Unreadable:
    def __init__(self, *places):
        self.places = places

    def __call__(self, place, key):
        return Skipped(f"{place}.png", "damaged") if place in self.places else as_example(place, key)


def test_epochs_run_into_one_another_and_each_image_has_its_own_key_in_each():
    steps = _TuningBatches(as_example, 5, 4, seed=3)
    batches = list(stream(steps, 5, 0))  # 20 images: four epochs
    places = torch.cat([images[:, 0] for images, _, _ in batches]).long().tolist()
    keys = torch.cat([targets for _, targets, _ in batches]).tolist()
    assert places == [int(i) for epoch in range(4) for i in epoch_order(3, epoch, 5)]
    assert keys == [sample_key(3, number // 5, place) for number, place in enumerate(places)]


def test_an_unreadable_image_is_replaced_by_the_next():
    order = epoch_order(0, 0, 4).tolist()
    images, targets, skipped = next(stream(_TuningBatches(Unreadable(order[1]), 4, 4, seed=0), 1, 0))
    assert images[:, 0].tolist() == [order[0], order[2], order[2], order[3]]
    assert targets.tolist() == [sample_key(0, 0, place) for place in order]
    assert [item.path for item in skipped] == [f"{order[1]}.png"]
    with pytest.raises(DataError, match="none of the 4 train images can be read"):
        next(stream(_TuningBatches(Unreadable(0, 1, 2, 3), 4, 4, seed=0), 1, 0))


def test_errors_of_a_worker_arrive_in_one_line():
    with pytest.raises(DataError, match=r"^none of the 2 train images can be read, the first: [01]\.png$"):
        list(stream(_TuningBatches(Unreadable(0, 1), 2, 1, seed=0), 1, 1))


def test_a_loss_that_is_not_finite_ends_the_training(tiny, greys, features_of):
    features = features_of(tiny, greys, "labels")
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    arguments = {"num_steps": 60, "batch_size": 2, "seed": 0, "what": "finetune"}
    with pytest.raises(RunError, match=r"finetune: the loss is not finite at step 0; lower the learning_rate"):
        train(
            model,
            optimizer,
            features,
            as_example,
            lambda x, _: model(x).sum() * math.nan,
            lambda step: 1.0,
            **arguments,
        )


def test_a_groups_own_scale_multiplies_the_learning_rate(tiny, greys, features_of):
    features = features_of(tiny, greys, "labels")
    model = nn.Linear(1, 1)
    groups = [{"params": [model.weight], "lr_scale": 0.5}, {"params": [model.bias]}]
    optimizer = torch.optim.SGD(groups, 1.0)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    told = []
    features.progress = lambda *call: told.append(call)
    with torch.no_grad():  # an evaluation during training may be
        curve = train(
            model,
            optimizer,
            features,
            lambda place, key: (torch.ones(1), torch.tensor(key)),
            lambda x, _: model(x).mean(),
            lambda step: 0.1 * (step + 1),
            num_steps=3,
            batch_size=2,
            seed=0,
            what="x",
        )
    assert_close(model.weight.item(), -0.3)  # 0.5 * (0.1 + 0.2 + 0.3)
    assert_close(model.bias.item(), -0.6)
    assert curve == pytest.approx([0.0, -0.15, -0.45])
    assert told == [("x", 1, 3), ("x", 3, 3)]
    assert not model.training
