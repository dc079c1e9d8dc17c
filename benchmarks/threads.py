"""How many threads should train, and how long should they spin?

The demo's MAE (or another ``--width``, ``--depth``, ``--batch``): images per second of wall time, with reading, views,
forward, backward and optimiser. Each setting of threads and spinning runs in a process of its own; one after the other
trains for ``--seconds``, alone (quiet) and beside one and two processes that keep a core busy. Cells are interleaved,
``--rounds`` times; medians, minimum and maximum. Ratios are to ``default``: as many threads as cores, and libgomp's own
spinning. Every process has a session of its own, like commands of several terminals. ``--priority -19`` (root, Linux)
puts all of them before other work, which starves meanwhile: only where that harms nobody.

Goals, for what the command chooses: at least 0.95 of the default when quiet, 10 times the default beside two busy
processes.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from smalti.threads import SPIN_COUNT

HANDLED = ("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")
SPINS = (0, 1_000, 3_000, 10_000, 100_000)
LOADS = {"quiet": 0, "one busy": 1, "two busy": 2}
GOALS = {"quiet": 0.95, "two busy": 10.0}


def settings(cores: int) -> dict[str, dict[str, str]]:
    """What each process finds in its environment, by name."""
    spins = {f"{cores} threads, spin {spin:,}": {"GOMP_SPINCOUNT": str(spin)} for spin in SPINS}
    return {
        "default": {},
        **spins,
        f"{cores} threads, passive": {"OMP_WAIT_POLICY": "passive"},
        "1 thread": {"OMP_NUM_THREADS": "1"},
    }


def train(samples: Path, width: int, depth: int, batch: int) -> None:
    """Train for as many seconds as each line of stdin says, and answer with images per second."""
    import torch

    from smalti.config import merge
    from smalti.preflight.step import step_maker
    from smalti.runs.config import resolve
    from smalti.runs.demo import SETTINGS

    heads = max(1, width // 32)
    chosen = {"encoder": {"embed_dim": width, "depth": depth, "num_heads": heads}, "batch_size": batch}
    config = resolve({**merge(SETTINGS, {**chosen, "data": {"path": str(samples)}}), "method": "mae"})
    step = step_maker(config, torch.device("cpu"))[0](batch)
    for _ in range(3):
        step()
    print("ready", flush=True)
    for line in sys.stdin:
        end, steps, start = time.perf_counter() + float(line), 0, time.perf_counter()
        while time.perf_counter() < end:
            step()
            steps += 1
        print(steps * batch / (time.perf_counter() - start), flush=True)


def in_front(priority: int) -> None:
    """Runs in a new process: sets the priority of its session (Linux autogroup)."""
    if priority:
        Path("/proc/self/autogroup").write_text(str(priority))


class Trainer:
    """A process that trains when asked to."""

    def __init__(self, words: list[str], env: dict[str, str], priority: int) -> None:
        base = {key: value for key, value in os.environ.items() if key not in HANDLED}
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--train", *words],
            env={**base, **env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: in_front(priority),
        )
        assert self._ask(None) == "ready\n"

    def _ask(self, seconds: float | None) -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        if seconds is not None:
            print(seconds, file=self._process.stdin, flush=True)
        return self._process.stdout.readline()

    def rate(self, seconds: float) -> float:
        """Images per second."""
        return float(self._ask(seconds))

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


@contextmanager
def busy(count: int, priority: int) -> Iterator[None]:
    """Processes that take all the time they get."""
    command = [sys.executable, "-c", "while True: pass"]
    processes = [
        subprocess.Popen(command, start_new_session=True, preexec_fn=lambda: in_front(priority)) for _ in range(count)
    ]
    try:
        time.sleep(0.5 if count else 0)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--priority", type=int, default=0)
    given = parser.parse_args()
    if given.train:
        train(given.train, given.width, given.depth, given.batch)
        return
    from smalti.data.samples import write_samples

    cores = len(os.sched_getaffinity(0))
    rates: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        samples = write_samples(
            Path(folder) / "s", num_train=256, num_val=8, num_objects_train=2, num_objects_val=2, size=96
        )
        words = [str(samples), f"--width={given.width}", f"--depth={given.depth}", f"--batch={given.batch}"]
        trainers = {name: Trainer(words, env, given.priority) for name, env in settings(cores).items()}
        for trainer in trainers.values():
            stack.callback(trainer.close)
        for number in range(given.rounds):
            for load, count in LOADS.items():
                with busy(count, given.priority):
                    for name, trainer in trainers.items():
                        rates.setdefault((load, name), []).append(trainer.rate(given.seconds))
            print(f"round {number + 1} of {given.rounds}", file=sys.stderr, flush=True)
    for load in LOADS:
        base = statistics.median(rates[load, "default"])
        for name in trainers:
            cell = rates[load, name]
            ratio, goal = statistics.median(cell) / base, ""
            if load in GOALS and name == f"{cores} threads, spin {SPIN_COUNT:,}":  # what the command chooses
                goal = f" goal>={GOALS[load]} {'met' if ratio >= GOALS[load] else 'MISSED'}"
            print(
                f"BENCH threads width {given.width} {load}: {name} ratio={ratio:.3f}{goal} "
                f"{statistics.median(cell):.1f} images/s ({min(cell):.1f} to {max(cell):.1f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
