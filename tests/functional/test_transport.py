"""Sinkhorn's iteration against its definition."""

from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from smalti.errors import ConfigError
from smalti.functional.processes import mean_over_processes, of_all_processes, sum_over_processes, weighted_mean
from smalti.functional.transport import sinkhorn


def by_plain_divisions(logits: torch.Tensor, temp: float, iterations: int, softmax_first: bool) -> torch.Tensor:
    q = (logits.double() / temp).softmax(1) if softmax_first else (logits.double() / temp).exp()
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(0, keepdim=True) / q.shape[1]
        q = q / q.sum(1, keepdim=True) / q.shape[0]
    return q * len(q)  # as SwAV's and DINOv2's code have it, factors and all


@given(m=st.integers(1, 6), k=st.integers(1, 5), softmax_first=st.booleans(), iterations=st.integers(1, 4))
def test_it_is_the_definition(m: int, k: int, softmax_first: bool, iterations: int) -> None:
    logits = torch.randn(m, k)
    q = sinkhorn(logits, 0.3, iterations, softmax_first)
    assert_close(q.double(), by_plain_divisions(logits, 0.3, iterations, softmax_first), rtol=1e-4, atol=1e-6)
    assert_close(q.sum(1), torch.ones(m))


def test_many_rounds_use_all_prototypes_alike() -> None:
    q = sinkhorn(torch.randn(12, 4), 0.5, 200)
    assert_close(q.sum(0), torch.full((4,), 3.0), rtol=1e-4, atol=1e-4)
    assert_close(q, sinkhorn(torch.randn(12, 4) * 0 + q.log() * 0.5, 0.5, 1), rtol=1e-3, atol=1e-4)


def test_where_the_rounds_begin_matters_after_three() -> None:
    logits = torch.tensor([[3.0, 0.0], [0.0, 0.5], [1.0, 0.0]])
    assert (sinkhorn(logits, 0.5, 3) - sinkhorn(logits, 0.5, 3, softmax_first=True)).abs().max() > 1e-3
    assert_close(sinkhorn(logits, 0.5, 0, softmax_first=True), (logits / 0.5).softmax(1))


def test_small_temperatures_do_not_overflow() -> None:
    q = sinkhorn(torch.tensor([[1.0, 0.0], [0.9, 0.0]]) * 100, 0.01)
    assert q.isfinite().all()
    assert_close(q.sum(1), torch.ones(2))
    assert sinkhorn(torch.zeros(0, 3), 0.1).shape == (0, 3)


def test_targets_have_no_gradient() -> None:
    assert not sinkhorn(torch.randn(3, 2, requires_grad=True), 0.1).requires_grad


def test_mistakes_are_one_line_each() -> None:
    with pytest.raises(ConfigError, match=r"Sinkhorn-Knopp with temp=0.0 and iterations=3"):
        sinkhorn(torch.zeros(2, 2), 0.0)


def test_one_process_is_all_processes() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    assert torch.equal(of_all_processes(x, 0), x) and torch.equal(mean_over_processes(x), x)
    assert torch.equal(sum_over_processes(x), x.detach())
    assert_close(weighted_mean(x, torch.tensor([[1, 0, 3], [0, 0, 0]])), (x[0, 0] + 3 * x[0, 2]) / 4)
    assert weighted_mean(x, torch.zeros(2, 3)) == 0


def _worker(rank: int, store: str, results: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    logits, values, weights, rows = _data()
    own = slice(*((0, 2), (2, 7))[rank])  # the processes have unequal numbers of tokens
    x = values.clone().requires_grad_()
    half = slice(4 * rank, 4 * rank + 4)
    mean = weighted_mean(x[half], weights[half])
    curved = mean_over_processes(x[half].mean()).square()
    (gradient,) = torch.autograd.grad(mean + curved, x)
    found = {
        "q": sinkhorn(logits[own], 0.2),
        "empty": sinkhorn(logits[: 7 * rank], 0.2),
        "rows": of_all_processes(rows[rank : rank + 1], 0),
        "loss": (mean + curved).detach(),
        "gradient": gradient,
    }
    torch.save(found, f"{results}/{rank}.pt")
    torch.distributed.destroy_process_group()


def _data() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    logits, values = torch.randn(7, 4, generator=generator), torch.randn(8, generator=generator)
    return logits, values, torch.arange(8.0), torch.randn(2, 3, generator=generator)


@pytest.mark.usefixtures("forked")
def test_two_processes_see_the_tokens_of_both(tmp_path: Path) -> None:
    mp.spawn(_worker, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    logits, values, weights, rows = _data()
    together = sinkhorn(logits, 0.2)
    assert_close(torch.cat([first["q"], second["q"]]), together)
    assert first["empty"].shape == (0, 4)
    assert_close(second["empty"], together)
    assert torch.equal(first["rows"], rows) and torch.equal(second["rows"], rows)

    x = values.requires_grad_()
    loss = (x * weights).sum() / weights.sum() + x.mean().square()
    (gradient,) = torch.autograd.grad(loss, x)
    assert_close((first["loss"] + second["loss"]) / 2, loss.detach())
    assert_close((first["gradient"] + second["gradient"]) / 2, gradient)  # as data-parallel training averages
