"""NeCo's loss, forward and backward: ours against diffsort, time in one interleaved run and memory in processes apart.

    python benchmarks/sorting.py            # R in 16, 49, 64, 128, 256; both networks (odd-even up to 64 for diffsort)

Goals: at 784 rows of 49 (bitonic) at most 0.16 of diffsort's time; at 256 references at most 0.08; there at most 80 MiB
above the inputs, growing at most 1.3 times when the rows grow 8 times. diffsort needs 16 GiB at 784 rows of 256: its
time there is that of fewer rows, scaled; both are linear in the rows. Memory is the growth of the resident set's peak,
with an allocator that returns what is freed.
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
ODD_EVEN_PEER_ROWS = {16: 784, 49: 392, 64: 196, 128: 14}


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


def main() -> None:
    torch.set_num_threads(1)
    for network in ("bitonic", "odd_even"):
        for size in (16, 49, 64, 128, 256):
            peer_rows = (PEER_ROWS if network == "bitonic" else ODD_EVEN_PEER_ROWS).get(size)
            mine = sims(ROWS, size)
            ways = {"ours": lambda m=mine, n=network: ours(*m, n)}
            if peer_rows is not None:
                theirs, sorter = sims(peer_rows, size), DiffSortNet(network, size, steepness=100.0)
                ways["diffsort"] = lambda t=theirs, s=sorter: peer(*t, s)
            timings = interleave(ways, rounds=5 if size < 128 else 3)
            memory = extra_mib("ours", network, size, ROWS)
            name = f"sorting {network} {ROWS}x{size}"
            if peer_rows is None:
                print(f"BENCH {name} ours={timings['ours']} memory={memory:.0f} MiB (diffsort: not run, too large)")
                continue
            scale = ROWS / peer_rows
            timings["diffsort"] = type(timings["ours"])(*(scale * value for value in timings["diffsort"]))
            theirs_memory = scale * extra_mib("diffsort", network, size, peer_rows)
            scaled = f" (of {peer_rows} rows, scaled)" if scale > 1 else ""
            report(f"{name}{scaled}", timings, "ours", "diffsort", GOALS.get((network, size), 1.0))
            print(f"      memory above inputs: ours {memory:.0f} MiB, diffsort{scaled} {theirs_memory:,.0f} MiB")
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
