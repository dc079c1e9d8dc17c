"""How long does ``smalti evaluate`` take to start?

CPU time of importing what the command imports before it reads data, against ``import torch, torchvision, timm``; each
in a process of its own, one thread, interleaved, ``--rounds`` times. Modules are compiled before the first round. The
page of an evaluation imports matplotlib; it is measured apart.

Goal: at most 1.1 of the bare import; with the page 1.3.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from _bench import Timing, report

WAYS = {
    "bare": "import torch, torchvision, timm",
    "smalti evaluate": "import smalti.cli.evaluate, smalti.evaluation.evaluate, smalti.runs.baseline",
    "with its page": "import smalti.cli.evaluate, smalti.evaluation.evaluate, smalti.report.evaluation",
}
"""Name -> what is imported."""


def cpu_seconds(code: str) -> float:
    """CPU time of a Python process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for number in range(rounds + 1):
        for name, code in WAYS.items():
            taken = cpu_seconds(code)
            if number:  # the first compiles
                times[name].append(taken)
    timings = {name: Timing(statistics.median(all_), min(all_), max(all_)) for name, all_ in times.items()}
    report("start", timings, "smalti evaluate", "bare", 1.1)
    report("start", timings, "with its page", "bare", 1.3)


if __name__ == "__main__":
    main()
