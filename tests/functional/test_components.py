import pytest
import torch

from smalti.functional.components import align_components, reduce_patches


def test_principal_components_are_those_of_the_singular_value_decomposition():
    patches = torch.randn(3, 16, 10, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 11)
    coordinates, share = reduce_patches(patches, 4)
    flat = patches.flatten(0, 1).double()
    u, s, _ = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    torch.testing.assert_close(coordinates.flatten(0, 1).abs(), (u * s)[:, :4].abs().float(), atol=1e-4, rtol=1e-4)
    assert share == pytest.approx((s[:4].square().sum() / s.square().sum()).item())


def test_the_sign_of_a_component_does_not_depend_on_the_order_of_the_images():
    patches = torch.randn(4, 9, 6, generator=torch.Generator().manual_seed(1))
    there, _ = reduce_patches(patches, 3)
    back, _ = reduce_patches(patches.flip(0), 3)
    torch.testing.assert_close(there, back.flip(0), atol=1e-5, rtol=1e-5)


def test_swapped_and_mirrored_components_come_back_to_the_reference():
    reference = torch.randn(3, 16, 5, generator=torch.Generator().manual_seed(2))
    other = torch.stack([-reference[..., 2], reference[..., 0], -3 * reference[..., 1]], dim=-1)
    aligned = align_components(other, (4, 4), reference, (4, 4))
    torch.testing.assert_close(aligned, reference[..., :3] * torch.tensor([1.0, 3.0, 1.0]))


def test_alignment_never_mixes_components():
    generator = torch.Generator().manual_seed(3)
    ours, theirs = (torch.randn(2, n, 4, generator=generator) for n in (36, 9))
    aligned = align_components(ours, (6, 6), theirs, (3, 3)).flatten(0, 1)
    flat = ours.flatten(0, 1)[:, :3]
    same = torch.stack([(aligned == sign * c[:, None]).all(0) for c in flat.T for sign in (1, -1)])
    assert same.any(0).all() and same.sum() == 3


def test_fewer_components_than_colours_are_filled_with_zeros():
    flat = torch.ones(1, 4, 2) * torch.tensor([1.0, 2.0])
    assert align_components(flat, (2, 2), flat, (2, 2)).shape == (1, 4, 3)
