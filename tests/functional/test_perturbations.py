import itertools
import math

import pytest
import torch
from scipy import ndimage
from torch.testing import assert_close

from smalti.errors import ShapeError
from smalti.functional.perturbations import (
    contiguous_orders,
    hidden_patches,
    hide,
    saliency,
    salient_orders,
    warp,
)

KEYS = torch.arange(64) * 7919 + 3


def pictures(count=64, side=16, channels=3):
    return torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(0))


def test_a_quarter_turn_is_torchs_and_half_of_the_images_turn_the_other_way():
    images = pictures()
    turned = warp(images, "rotation", 90, KEYS)
    left = [torch.allclose(a, b, atol=1e-5) for a, b in zip(turned, torch.rot90(images, 1, (2, 3)), strict=True)]
    right = [torch.allclose(a, b, atol=1e-5) for a, b in zip(turned, torch.rot90(images, -1, (2, 3)), strict=True)]
    assert all(one != other for one, other in zip(left, right, strict=True))
    assert 16 < sum(left) < 48


def test_half_a_turn_mirrors_both_axes():
    images = pictures(4)
    assert_close(warp(images, "rotation", 180, KEYS[:4]), images.flip(2, 3), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("kind", "amount"), [("rotation", 0), ("shear", 0), ("translation", 0), ("scale", 1)])
def test_no_change_is_the_image_itself(kind, amount):
    images = pictures(4)
    assert_close(warp(images, kind, amount, KEYS[:4]), images, atol=1e-5, rtol=0)


def test_a_translation_by_whole_pixels_moves_in_four_directions_and_leaves_zeros():
    images = pictures()
    moved = warp(images, "translation", 4 / 16, KEYS)
    seen = set()
    for image, other in zip(images, moved, strict=True):
        for axis, step in ((1, 4), (1, -4), (2, 4), (2, -4)):
            expected = torch.roll(image, step, axis)
            gone = [slice(None)] * 3
            gone[axis] = slice(0, 4) if step > 0 else slice(-4, None)
            expected[tuple(gone)] = 0
            if torch.allclose(other, expected, atol=1e-5):
                seen.add((axis, step))
                break
        else:
            raise AssertionError("moved in no direction")
    assert len(seen) == 4


def test_scale_by_two_enlarges_the_centre_as_scipy_does():
    images = pictures(1, side=12, channels=1)
    # output pixel x reads the input at (x - c) / 2 + c, c the centre of the image
    offset = 5.5 - 5.5 / 2
    expected = ndimage.affine_transform(images[0, 0].numpy(), [0.5, 0.5], offset=[offset, offset], order=1)
    assert_close(warp(images, "scale", 2, KEYS[:1])[0, 0], torch.from_numpy(expected), atol=1e-5, rtol=0)


def test_shear_slants_upright_lines_by_its_angle_and_keeps_rows():
    images = torch.zeros(1, 1, 33, 33)
    images[0, 0, :, 16] = 1
    slanted = warp(images, "shear", 45, KEYS[:1])[0, 0]
    columns = [int(row.argmax()) for row in slanted]
    steps = {after - before for before, after in itertools.pairwise(columns)}
    assert steps in ({1}, {-1})  # tan 45 degrees: one pixel across for each pixel down


def test_an_image_moves_the_same_way_at_every_amount_and_in_any_batch():
    images = pictures(8)
    both = warp(images, "rotation", 90, KEYS[:8])
    alone = torch.cat([warp(images[i : i + 1], "rotation", 90, KEYS[i : i + 1]) for i in range(8)])
    assert_close(both, alone)


def test_contiguous_parts_are_connected_blocks_of_the_asked_size():
    orders = contiguous_orders(KEYS, (7, 9))
    assert (orders.sort(1).values == torch.arange(63)).all()
    for ratio in (0.1, 0.5, 0.9):
        mask = hidden_patches(orders, ratio).view(-1, 7, 9)
        assert (mask.sum((1, 2)) == round(63 * ratio)).all()
        assert all(ndimage.label(one.numpy())[1] == 1 for one in mask)
    assert len({int(order[0]) for order in orders}) > 20


def test_larger_parts_hold_smaller_ones():
    orders = contiguous_orders(KEYS, (8, 8))
    assert (hidden_patches(orders, 0.25) <= hidden_patches(orders, 0.5)).all()


def test_hidden_patches_are_zero_and_the_others_as_they_were():
    images = pictures(2)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, 5] = mask[1, 15] = True
    hidden = hide(images, mask, (4, 4))
    assert (hidden[0, :, 4:8, 4:8] == 0).all() and (hidden[1, :, 12:, 12:] == 0).all()
    changed = (hidden != images).any(1)
    assert int(changed.sum()) == 2 * 16
    with pytest.raises(ShapeError, match="16x16 pixels can't be cut into 3x4 patches"):
        hide(images, torch.zeros(2, 12, dtype=torch.bool), (3, 4))


def test_an_object_on_a_texture_is_more_salient_than_the_texture():
    generator = torch.Generator().manual_seed(1)
    images = 0.1 * torch.rand(6, 3, 96, 96, generator=generator)
    places = [(1, 1), (4, 2), (0, 5), (3, 3), (5, 5), (2, 4)]
    for image, (row, column) in zip(images, places, strict=True):
        image[:, 16 * row + 3 : 16 * row + 13, 16 * column + 3 : 16 * column + 13] += 0.8
    first = salient_orders(images, (6, 6))[:, 0]
    assert [(int(one) // 6, int(one) % 6) for one in first] == places


def test_saliency_is_that_of_its_equations_in_numpy():
    import numpy as np

    image = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(2))
    spectrum = np.fft.fft2(image[0, 0].double().numpy())
    log = np.log(np.abs(spectrum))
    residual = log - ndimage.uniform_filter(log, 3, mode="wrap")
    found = np.abs(np.fft.ifft2(np.exp(residual + 1j * np.angle(spectrum)))) ** 2
    expected = ndimage.gaussian_filter(found, 2.5, mode="nearest", radius=math.ceil(7.5))
    assert_close(saliency(image)[0].double(), torch.from_numpy(expected), rtol=1e-3, atol=1e-7)
