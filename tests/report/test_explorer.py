"""Data of the nearest-patch explorer: small, and precise enough for cosine similarities."""

import torch

from smalti.functional.components import reduce_patches
from smalti.report.explorer import distinctive_patch, quantise


def test_equal_patches_have_no_direction():
    assert not quantise(reduce_patches(torch.ones(2, 4, 3), 3)[0]).any()


def test_rounding_to_bytes_keeps_cosines():
    coordinates = torch.randn(2, 50, 32, generator=torch.Generator().manual_seed(0))
    unit = torch.nn.functional.normalize(coordinates.flatten(0, 1), dim=-1)
    rounded = torch.nn.functional.normalize(quantise(coordinates).flatten(0, 1).float(), dim=-1)
    assert (rounded @ rounded.T - unit @ unit.T).abs().max() < 0.02


def test_the_distinctive_patch_lies_in_the_middle():
    codes = quantise(torch.randn(3, 64, 8, generator=torch.Generator().manual_seed(0)))
    image, patch = distinctive_patch(codes, (8, 8))
    assert 0 <= image < 3 and 2 <= patch // 8 < 6 and 2 <= patch % 8 < 6
