import numpy as np
import torch

from smalti.data.color import ColorConfig
from smalti.data.crops import MultiCrop, ViewSpec
from smalti.data.views import Skipped, collate

DINO = (
    ViewSpec(count=2, size=32, scale=(0.4, 1.0), color=ColorConfig(), blur_prob=(1.0, 0.1), solarize_prob=(0.0, 0.2)),
    ViewSpec(count=3, size=16, scale=(0.05, 0.4), color=ColorConfig(), blur_prob=0.5),
)


def noise(height=40, width=50, channels=3, dtype=np.uint8, seed=0):
    values = np.random.default_rng(seed).random((height, width, channels), np.float32)
    return values if dtype == np.float32 else (255 * values).astype(np.uint8)


def test_collate_is_view_major_and_channels_last():
    crop = MultiCrop(DINO)
    samples = [crop(noise(seed=i), np.random.default_rng(i)) for i in range(4)]
    for i, sample in enumerate(samples):
        sample.index, sample.key = 10 + i, 100 + i
    views = collate(samples, [Skipped("x.png", "broken")])
    assert views.num_views == (2, 3) and views.batch_size == 4 and views.global_crops is views.crops[0]
    assert [crops.shape for crops in views.crops] == [(8, 3, 32, 32), (12, 3, 16, 16)]
    assert all(crops.is_contiguous(memory_format=torch.channels_last) for crops in views.crops)
    assert views.index.tolist() == [10, 11, 12, 13] and views.keys.tolist() == [100, 101, 102, 103]
    for b, sample in enumerate(samples):
        for v in range(5):
            place = v * 4 + b
            assert views.boxes[place].tolist() == sample.boxes[v].tolist()
            assert views.flips[place] == sample.flips[v]
            crops, inside = (views.crops[0], place) if v < 2 else (views.crops[1], place - 8)
            own = sample.crops[0][v] if v < 2 else sample.crops[1][v - 2]
            np.testing.assert_array_equal(crops[inside].permute(1, 2, 0).numpy(), own)
    assert views.skipped == (Skipped("x.png", "broken"),)
    moved = views.to("cpu")
    assert torch.equal(moved.boxes, views.boxes) and moved.skipped == views.skipped


def test_a_batch_of_eight_and_sixteen_bit_images_is_float():
    crop = MultiCrop([ViewSpec(size=8)])
    eight, sixteen = noise(), noise(dtype=np.float32)
    views = collate([crop(image, np.random.default_rng(0)) for image in (eight, sixteen)])
    assert views.crops[0].dtype == torch.float32 and views.crops[0].max() <= 1 and views.crops[0][0].max() > 0.5
