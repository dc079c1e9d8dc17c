"""Exact Gaussian worlds: conditioning, the chain rule, greedy orders, and numbers known from CIFAR-10."""

import itertools
import math
import os
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from smalti.errors import ConfigError, ShapeError
from smalti.functional.gaussian import (
    area_under_prefix,
    chain_entropy,
    greedy_order,
    hub_world,
    mixed_world,
    pairwise_r_squared,
    remaining_entropy,
    remaining_variance,
    smooth_world,
)
from smalti.functional.graphs import coverage_order, descending, pagerank
from smalti.functional.orders import border_in, centre_out, halton, raster
from smalti.functional.patches import patchify


def covariance(num: int, dim: int, seed: int = 0) -> torch.Tensor:
    factors = torch.randn(num * dim, num * dim + 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return factors @ factors.mT / (num * dim)


def test_what_remains_is_a_schur_complement() -> None:
    known, order = covariance(5, 2), torch.tensor([3, 0, 4, 1, 2])
    entropy, variance = remaining_entropy(known, order, 0.01), remaining_variance(known, order)
    for k in range(6):
        seen = [2 * token + i for token in order[:k].tolist() for i in range(2)]
        hidden = [i for i in range(10) if i not in seen]
        left = known[hidden][:, hidden]
        if seen:
            cross = known[hidden][:, seen]
            left = left - cross @ torch.linalg.inv(known[seen][:, seen]) @ cross.mT
        blocks = [left[i : i + 2, i : i + 2] for i in range(0, len(hidden), 2)]
        expected = sum(0.5 * torch.logdet(torch.eye(2) + block / 0.01) for block in blocks)
        assert_close(entropy[k], torch.as_tensor(expected, dtype=torch.float64), atol=1e-8, rtol=1e-8)
        assert_close(variance[k], left.diagonal().sum() / known.diagonal().sum(), atol=1e-10, rtol=1e-8)


def test_entropies_given_all_before_add_up_to_the_joint_one_in_any_order() -> None:
    known = hub_world()
    joint = 0.5 * torch.logdet(2 * math.pi * math.e * known)
    for seed in range(3):
        order = torch.randperm(64, generator=torch.Generator().manual_seed(seed))
        assert_close(chain_entropy(known, order), joint, atol=1e-8, rtol=0)
    two = covariance(4, 3)
    expected = 0.5 * torch.logdet(2 * math.pi * math.e * two)
    for order in itertools.permutations(range(4)):
        assert_close(chain_entropy(two, torch.tensor(order)), expected, atol=1e-8, rtol=0)


def test_greedy_takes_the_best_next_token() -> None:
    known = covariance(5, 1)
    order = greedy_order(known)
    for k in range(4):
        taken, rest = order[:k].tolist(), order[k:].tolist()
        left = {}
        for token in rest:
            others = [n for n in rest if n != token]
            left[token] = float(remaining_entropy(known, torch.tensor([*taken, token, *others]))[k + 1])
        assert min(left, key=lambda token: left[token]) == order[k]
    assert sorted(greedy_order(covariance(4, 2), 2, None).tolist()) == [0, 1, 2, 3]


def test_areas_of_known_curves() -> None:
    assert area_under_prefix(torch.full((65,), 3.0)) == pytest.approx(1)
    line = torch.linspace(1, 0, 65)
    assert area_under_prefix(line) == pytest.approx(0.5)
    assert area_under_prefix(line, 0.25) == pytest.approx(1 - 0.125)
    with pytest.raises(ConfigError, match="at least one token and at most all are needed"):
        area_under_prefix(line, 0.01)
    with pytest.raises(ShapeError, match="order of 5 tokens"):
        remaining_entropy(covariance(3, 2), torch.arange(5))


def test_worlds_are_what_they_say() -> None:
    for world in (smooth_world(), hub_world(), mixed_world()):
        assert world.shape == (64, 64) and torch.allclose(world, world.mT, rtol=0, atol=1e-15)
        assert float(torch.linalg.eigvalsh(world).min()) > 0
    assert_close(hub_world().diagonal(), torch.ones(64, dtype=torch.float64))
    assert float(hub_world()[:4, :4].fill_diagonal_(0).abs().max()) == 0
    assert float(smooth_world()[0, 1]) == pytest.approx(math.exp(-1 / 8))
    middle, corner = mixed_world()[27, 28], mixed_world()[0, 1]  # neighbours in the centre, and at the border
    assert float(middle) == pytest.approx(math.exp(-1 / 18)) and float(corner) == pytest.approx(math.exp(-1 / 0.98))


def test_r_squared_of_pairs_is_the_square_of_correlations() -> None:
    known = covariance(6, 1)
    deviations = known.diagonal().sqrt()
    correlations = (known / deviations[:, None] / deviations).fill_diagonal_(0)
    assert_close(pairwise_r_squared(known), correlations**2, atol=1e-10, rtol=0)


@pytest.fixture(scope="module")
def cifar() -> torch.Tensor:
    """Covariance of 64 patches of 4x4 pixels with 6 principal values each, on the 10,000 test images of CIFAR-10."""
    shared = Path(os.environ.get("SMALTI_SHARED", Path(__file__).parents[3] / "shared"))
    archive = shared / "data" / "cifar10-jpeg" / "test.tar.xz"
    if not archive.is_file():
        pytest.skip(f"needs CIFAR-10 at {archive}")
    decoded = []
    with tarfile.open(archive) as files:
        for member in files:
            if member.name.endswith(".jpg") and (file := files.extractfile(member)) is not None:
                decoded.append(cv2.imdecode(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_COLOR_RGB))
    images = torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).float() / 255
    patches = patchify(images, (4, 4)).double()
    flat = patches.flatten(0, 1) - patches.mean((0, 1))
    directions = torch.linalg.eigh(flat.mT @ flat).eigenvectors.flip(-1)[:, :6]
    values = (patches @ directions - (patches @ directions).mean(0)).flatten(1)
    known = values.mT @ values / len(values)
    known = known / known.diagonal().mean()
    return known + 1e-6 * torch.eye(len(known), dtype=torch.float64)


def test_numbers_known_from_cifar(cifar: torch.Tensor) -> None:
    """A spiral is left out: where it starts and turns moves its number by more than the tolerance."""
    grid = (8, 8)
    graph = pairwise_r_squared(cifar, 6)
    variances = cifar.diagonal().view(64, 6).sum(-1)
    orders = {
        "greedy": (greedy_order(cifar, 6, None), 0.370, 0.133, 0.191),
        "coverage": (coverage_order(graph[None])[0], 0.371, 0.141, 0.193),
        "halton": (halton(grid), 0.414, 0.151, 0.215),
        "pagerank": (descending(pagerank(graph[None], method="solve"))[0], 0.509, 0.241, 0.379),
        "border-in": (border_in(grid), 0.516, 0.250, 0.398),
        "variance": (descending(variances), 0.621, 0.289, 0.518),
        "raster": (raster(grid), 0.635, 0.322, 0.541),
        "centre-out": (centre_out(grid), 0.661, 0.265, 0.488),
    }
    for name, (order, quarter, full, after) in orders.items():
        curve = remaining_variance(cifar, order)
        found = (area_under_prefix(curve, 0.25), area_under_prefix(curve), float(curve[14]))
        assert found == pytest.approx((quarter, full, after), abs=0.012), name
    drawn = [
        area_under_prefix(
            remaining_variance(cifar, torch.randperm(64, generator=torch.Generator().manual_seed(seed))), 0.25
        )
        for seed in range(12)
    ]
    assert np.mean(drawn) == pytest.approx(0.443, abs=0.03)
