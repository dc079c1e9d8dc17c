import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from torch.testing import assert_close
from torchvision.transforms.functional import gaussian_blur

from smalti.functional.attention import blur_maps, drop_specks, foreground, keep_mass


def test_e12_the_patches_with_six_tenths_of_the_attention_stay() -> None:  # known answer
    attention = torch.tensor([[0.05, 0.30, 0.10, 0.25, 0.02, 0.18, 0.06, 0.03, 0.01]])
    assert keep_mass(attention).nonzero()[:, 1].tolist() == [1, 3, 5]
    assert keep_mass(3 * attention)[0].equal(keep_mass(attention)[0])
    assert keep_mass(torch.tensor([[0.5, 0.5]]), 0.5).sum() == 1  # exactly half may go
    assert keep_mass(torch.ones(2, 10), 1.0).all()


def test_e12_diagonal_neighbours_are_one_part() -> None:  # known answer
    mask = torch.zeros(1, 3, 3, dtype=torch.bool)
    mask[0, 0, 1] = mask[0, 1, 0] = mask[0, 1, 2] = True
    assert drop_specks(mask).equal(mask)


@given(seed=st.integers(0, 10_000), h=st.integers(1, 12), w=st.integers(1, 12), share=st.floats(0.05, 0.9))
def test_parts_of_one_or_two_patches_go_and_no_others(seed: int, h: int, w: int, share: float) -> None:
    mask = torch.rand(3, h, w, generator=torch.Generator().manual_seed(seed)) < share
    for one, found in zip(mask, drop_specks(mask), strict=True):
        labels, _ = ndimage.label(one.numpy(), structure=[[1] * 3] * 3)
        sizes = torch.from_numpy(ndimage.sum_labels(one.numpy(), labels, labels.reshape(-1)).reshape(h, w))
        assert found.equal(one & (sizes > 2))


def test_the_blur_is_torchvisions() -> None:
    maps = torch.rand(2, 9, 14)
    assert_close(blur_maps(maps), gaussian_blur(maps, [7, 7], [0.6, 0.6]))
    small = blur_maps(torch.ones(1, 1, 2))
    assert_close(small, torch.ones(1, 1, 2))


def test_a_bright_square_is_the_foreground() -> None:
    attention = torch.full((2, 3, 8, 8), 0.1)
    attention[:, :, 2:5, 3:6] = 10.0
    attention[:, :, 7, 0] = 1.0
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[2:5, 3:6] = True
    found = foreground(attention.flatten(2), (8, 8))
    assert found.equal(found & expected) and found[:, 3, 4].all()
