"""What finds a GPU's faults without a GPU finds them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from fake_cuda import FakeCuda, HalfLinalgRefused, backward, bf16_autocast
from smalti.functional.transfer import move


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x[0, 0].item(),
        lambda x: float(x.sum()),
        lambda x: int(x.sum()),
        lambda x: "yes" if (x > 0).any() else "no",
        lambda x: [0, 1][x.long()[0, 0]],
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x[[0, 2]],
        lambda x: x[torch.tensor([0, 2])],
        lambda x: x + torch.tensor([1.0, 2.0, 3.0], device=x.device),
        lambda x: x + torch.ones(3).to(x.device),
        lambda x: x + torch.ones(3).to(x.device, non_blocking=True),
        lambda x: x.copy_(torch.ones(3, 3)),
    ],
)
def test_waits_are_listed(wait: Callable[[Tensor], object]) -> None:
    with FakeCuda() as gpu:
        x = torch.zeros(3, 3, device="cuda")
        wait(x)
        assert gpu.waits == [], "not yet asked for"
        with gpu.waits_are_listed():
            wait(x)
        assert len(gpu.waits) >= 1


@pytest.mark.parametrize("shape_unknown", [lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: x.unique()])
def test_shapes_that_only_the_gpu_knows_are_refused(shape_unknown: Callable[[Tensor], object]) -> None:
    with FakeCuda(), pytest.raises(AssertionError, match="the host must wait for the result of"):
        shape_unknown(torch.zeros(3, device="cuda"))


def test_what_the_host_need_not_wait_for_is_not_listed() -> None:
    with FakeCuda() as gpu, gpu.waits_are_listed():
        x = torch.zeros(3, 3, device="cuda")
        x = x + move(torch.tensor([1.0, 2.0, 3.0]), x.device) * 2.0 + torch.tensor(0.5)
        x = torch.where(x > 0, x, 0.0)[:, 1:].masked_fill(x[:, 1:] > 1, 0.0)
        on_cpu = torch.arange(4)
        chosen = on_cpu[on_cpu > 1]  # real, so masks may be planned there
        assert chosen.tolist() == [2, 3] and x.shape == (3, 2) and x.device.type == "cuda"
    assert gpu.waits == []


@pytest.mark.parametrize(
    "mixed",
    [lambda x: x + torch.ones(3), lambda x: torch.stack([x.sum(), torch.tensor(1.0)]), lambda x: x @ torch.ones(3)],
)
def test_two_devices_are_refused(mixed: Callable[[Tensor], object]) -> None:
    with FakeCuda(), pytest.raises(RuntimeError, match="cpu"):
        mixed(torch.zeros(3, device="cuda"))


def test_decompositions_in_half_precision_are_refused() -> None:
    x = torch.eye(3)
    with FakeCuda(), bf16_autocast("cuda"), pytest.raises(RuntimeError, match="no half precision"):
        y = x.to("cuda")
        torch.linalg.eigvalsh(y @ y)
    with HalfLinalgRefused(), bf16_autocast("cpu"):
        torch.linalg.eigvalsh(x)
        for of_half in (
            torch.linalg.eigvalsh,
            torch.linalg.svdvals,
            torch.linalg.qr,
            torch.svd,
            lambda y: torch.cdist(y, y),
        ):
            with pytest.raises(RuntimeError, match="no half precision"):
                of_half(x @ x)


class Cube(torch.autograd.Function):
    """With an argument that is no tensor, and one without gradient."""

    @staticmethod
    def forward(ctx, power: int, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return scale * x**power

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor, None]:
        x, scale = ctx.saved_tensors
        return None, 3 * grad * scale * x.square(), None


def test_gradients_along_the_graph_are_those_of_torch() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.LayerNorm(6), nn.Linear(6, 6))
    x = torch.randn(5, 4)

    def loss() -> Tensor:
        y = net(x)
        first, _ = y.chunk(2, dim=1)  # two outputs, one of them not used
        return (Cube.apply(3, first, torch.tensor(2.0)) + y[:, :1]).square().mean()

    loss().backward()
    wanted = [parameter.grad for parameter in net.parameters()]
    net.zero_grad()
    backward(loss())
    for parameter, grad in zip(net.parameters(), wanted, strict=True):
        assert_close(parameter.grad, grad)
