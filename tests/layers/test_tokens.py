"""Token sources: scale, principal directions, and the way back."""

import pytest
import torch
from sklearn.decomposition import PCA
from torch.testing import assert_close

from smalti.errors import ConfigError, DataError, ShapeError
from smalti.functional.patches import patchify
from smalti.layers.tokens import PatchTokenSource, TokenConfig, build_tokens


def images(count: int = 32, channels: int = 3, size: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    smooth = torch.randn(count, channels, 4, 4, generator=generator)
    noise = torch.randn(count, channels, size, size, generator=generator)
    grown = torch.nn.functional.interpolate(smooth, size=(size, size), mode="bilinear") + 0.3 * noise
    return (grown * 30 + 120).clamp(0, 255).byte()


@pytest.mark.parametrize(("kind", "dim", "expected"), [("pixels", None, 48), ("pca", 6, 6), ("pca", None, 16)])
def test_tokens_have_mean_zero_and_unit_mean_variance(kind: str, dim: int | None, expected: int) -> None:
    source = build_tokens(TokenConfig(kind=kind, patch_size=4, dim=dim), 16, 3)
    source.fit([images()[:20], images()[20:]])
    tokens = source.encode(images())
    assert tokens.shape == (32, 16, expected) == (32, source.num_tokens, source.token_dim)
    flat = tokens.flatten(0, 1).double()
    assert_close(flat.mean(0), torch.zeros(expected, dtype=torch.float64), atol=1e-5, rtol=0)
    assert_close(flat.var(0, correction=0).mean(), torch.tensor(1.0, dtype=torch.float64), atol=1e-5, rtol=0)


def test_directions_are_scikit_learn_s() -> None:
    source = PatchTokenSource(16, 3, 4, 6)
    source.fit([images()])
    patches = patchify(images().float() / 255, (4, 4)).flatten(0, 1).double().numpy()
    known = PCA(6, svd_solver="full").fit(patches)
    overlap = torch.from_numpy(known.components_) @ source.basis.double()
    assert_close(overlap.abs(), torch.eye(6, dtype=torch.float64), atol=1e-3, rtol=0)
    variances = source.encode(images()).flatten(0, 1).double().var(0) * source.scale.double() ** 2
    assert_close(variances, torch.from_numpy(known.explained_variance_), rtol=1e-4, atol=0)


def test_pixels_and_all_directions_come_back_whole() -> None:
    for dim in (None, 48):
        source = PatchTokenSource(16, 3, 4, dim)
        source.fit([images()])
        assert_close(source.decode(source.encode(images())), images().float() / 255, atol=2e-6, rtol=0)


def test_fewer_directions_lose_exactly_their_variance() -> None:
    source = PatchTokenSource(16, 3, 4, 6)
    source.fit([images()])
    patches = patchify(images().float() / 255, (4, 4)).flatten(0, 1).double()
    whole = (patches - patches.mean(0)).square().mean(0).sum()
    kept = source.encode(images()).flatten(0, 1).double().square().mean(0).sum() * source.scale.double() ** 2
    back = (source.encode(images()) * source.scale) @ source.basis.mT + source.mean
    lost = (back.flatten(0, 1).double() - patches).square().mean(0).sum()
    assert_close(lost, whole - kept, rtol=1e-3, atol=1e-7)


def test_batches_of_the_fit_do_not_matter_and_floats_are_as_good_as_bytes() -> None:
    one, many = PatchTokenSource(16, 3, 4, 6), PatchTokenSource(16, 3, 4, 6)
    one.fit([images()])
    many.fit(list(images().float().div(255).split(5)))
    assert_close(one.encode(images()), many.encode(images()), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TokenConfig(kind="vq"), "tokens.kind=vq: one of"),
        (TokenConfig(patch_size=5), "tokens.patch_size=5: must divide data.image_size=16"),
        (TokenConfig(patch_size=4, dim=49), "tokens.dim=49: a patch of 4 pixels has 48 values"),
        (TokenConfig(kind="pixels", dim=3), "leave it out"),
    ],
)
def test_settings_that_fit_nothing(config: TokenConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_tokens(config, 16, 3)


def test_images_that_fit_nothing() -> None:
    source = PatchTokenSource(16, 3, 4)
    with pytest.raises(DataError, match="all patches of the images are equal"):
        source.fit([torch.full((4, 3, 16, 16), 7, dtype=torch.uint8)])
    with pytest.raises(ShapeError, match=r"images of shape \(1, 16, 16\)"):
        source.encode(images(channels=1))
