"""NeCo's loss, forward and backward: ours against diffsort, time in one interleaved run and memory in processes apart.

    python benchmarks/sorting.py            # R in 16, 49, 64, 128, 256; both networks

Goals: at 784 rows of 49 (bitonic) at most 0.16 of diffsort's time; at 256 references at most 0.08; there at most 80 MiB
above the inputs, growing at most 1.3 times when the rows grow 8 times; loss within 1e-6 and gradient within 1e-5 (L2)
of float64. diffsort needs 16 GiB at 784 rows of 256: where rows are many for it, or odd-even networks long, fewer are
sorted and the time scaled, as said beside; both are linear in the rows. Memory is the growth of the resident set's
peak, with an allocator that returns what is freed.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch
from diffsort import DiffSortNet
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from _bench import interleave, report
from smalti.functional.sorting import neco_loss

ROWS = 784
GOALS = {("bitonic", 49): 0.16, ("bitonic", 256): 0.08}
PEER_ROWS = {16: 784, 49: 784, 64: 392, 128: 56, 256: 14}
ODD_EVEN_PEER_ROWS = {16: 784, 49: 392, 64: 196, 128: 14, 256: 4}
ODD_EVEN_ROWS = {128: 196, 256: 48}


def sims(rows: int, size: int) -> tuple[Tensor, Tensor]:
    """Similarities as spread as NeCo's."""
    g = torch.Generator().manual_seed(0)
    student, teacher = (0.3 + 0.15 * torch.randn(rows, size, generator=g) for _ in range(2))
    return student.requires_grad_(), teacher


def ours(student: Tensor, teacher: Tensor, network: str) -> None:
    student.grad = None
    neco_loss(student, teacher, network).backward()


def peer(student: Tensor, teacher: Tensor, sorter: DiffSortNet) -> None:
    student.grad = None
    pred = sorter(student)[1]
    with torch.no_grad():
        target = sorter(teacher)[1]
    (-(target * pred.log()).sum(2).mean()).backward()


def extra_mib(which: str, network: str, size: int, rows: int) -> float:
    """Peak above the inputs in MiB, in a process of its own."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "memory", which, network, str(size), str(rows)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


def measure_memory(which: str, network: str, size: int, rows: int) -> None:
    """Print the growth of the peak of the resident set over a call that comes after a small one."""

    def status(key: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))

    def call(number: int) -> None:
        student, teacher = inputs if number == rows else sims(number, size)
        if which == "ours":
            ours(student, teacher, network)
        else:
            peer(student, teacher, sorter)

    inputs = sims(rows, size)
    sorter = DiffSortNet(network, size, steepness=100.0, distribution="cauchy")
    call(2)  # loads code
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    call(rows)
    print(status("VmHWM") - before)


def errors(network: str, size: int, rows: int) -> tuple[float, float]:
    """Relative error of the loss, and of the gradient in L2, against float64."""
    found = []
    for dtype in (torch.float32, torch.float64):
        student, teacher = (one.detach().to(dtype) for one in sims(rows, size))
        student.requires_grad_()
        loss = neco_loss(student, teacher, network)
        loss.backward()
        found.append((loss.double().item(), student.grad.double()))
    (loss, gradient), (exact_loss, exact) = found
    return abs(loss / exact_loss - 1), float((gradient - exact).norm() / exact.norm())


def main() -> None:
    torch.set_num_threads(1)
    for network in ("bitonic", "odd_even"):
        for size in (16, 49, 64, 128, 256):
            rows = ROWS if network == "bitonic" else ODD_EVEN_ROWS.get(size, ROWS)
            peer_rows = (PEER_ROWS if network == "bitonic" else ODD_EVEN_PEER_ROWS)[size]
            mine, theirs = sims(rows, size), sims(peer_rows, size)
            sorter = DiffSortNet(network, size, steepness=100.0, distribution="cauchy")
            ways = {
                "ours": lambda m=mine, n=network: ours(*m, n),
                "diffsort": lambda t=theirs, s=sorter: peer(*t, s),
            }
            timings = interleave(ways, rounds=5 if size < 128 else 3)
            for way, number in (("ours", rows), ("diffsort", peer_rows)):
                timings[way] = type(timings[way])(*(ROWS / number * value for value in timings[way]))
            scaled = [f"{way} of {n} rows" for way, n in (("ours", rows), ("diffsort", peer_rows)) if n < ROWS]
            note = f" ({', '.join(scaled)}, scaled)" if scaled else ""
            goal = GOALS.get((network, size), 1.0)
            report(f"sorting {network} {ROWS}x{size}{note}", timings, "ours", "diffsort", goal)
            memory = extra_mib("ours", network, size, rows)
            theirs_memory = ROWS / peer_rows * extra_mib("diffsort", network, size, peer_rows)
            loss, gradient = errors(network, size, min(rows, 196))
            print(
                f"      memory above inputs: ours {memory:.0f} MiB, diffsort {theirs_memory:,.0f} MiB; "
                f"against float64: loss {loss:.1e}, gradient {gradient:.1e}",
                flush=True,
            )
    small, large = (extra_mib("ours", "bitonic", 256, rows) for rows in (ROWS, 8 * ROWS))
    gradient = 7 * ROWS * 256 * 4 * 2 / 2**20  # what comes out is as large as the inputs
    grown = (large - gradient) / small
    print(
        f"BENCH sorting memory at 256 references: {small:.0f} MiB goal<=80 {'met' if small <= 80 else 'MISSED'}; "
        f"8 times the rows: {large:.0f} MiB, {grown:.2f} times without the gradient that is handed out, "
        f"{large / small:.2f} with it, goal<=1.3 {'met' if large / small <= 1.3 else 'MISSED'}"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["memory"]:
        torch.set_num_threads(1)
        measure_memory(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    else:
        main()
