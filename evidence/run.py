"""Run what is missing of the long evidence: single-thread processes at the lowest priority, safe to kill.

    python evidence/run.py --list
    python evidence/run.py methods --out runs/evidence
    python evidence/run.py --out runs/evidence --shared DATA --processes 2

Each run of :data:`RUNS` has parts (seeds of a plan, presets of a script) that don't depend on each other. What a
stopped part has finished is kept, and the same command goes on. When all parts of a run are finished, its result file
is written. ``README.md`` beside this file says what each run is and how long it takes.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smalti.comparison.plan import CELLS, STEPS, read_plan
from smalti.comparison.run import PLAN_FILE
from smalti.config import to_tree, write_yaml
from smalti.files import write_atomically

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PART_DONE = "done"
"""Marks a finished part; its folder holds it."""
POLL_S = 2.0


@dataclass(frozen=True)
class Run:
    """One piece of evidence that takes longer than one sitting."""

    name: str
    what: str
    hours: float
    """Hours of one core for all parts."""
    parts: tuple[str, ...]
    """What can run beside each other."""
    result: str
    """File in ``results/``."""
    script: str = ""
    """Script in this folder; empty: the plan ``NAME.yaml``, whose parts are its seeds."""
    arguments: tuple[str, ...] = ()
    """Arguments of the script, with ``{out}``, ``{shared}`` and ``{part}`` to fill in."""
    samples: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Folder -> settings of the ``smalti samples`` that a plan needs."""
    needs_shared: bool = False
    """Whether it needs data that ``smalti samples`` does not write; in a plan they are the folder ``data``."""
    needs_weights: bool = False
    """Whether it starts from a ViT-S/14; in a plan it is the file ``weights.safetensors``."""


RUNS = (
    Run(
        "methods",
        "gain of every encoder method over its untrained network, 20 CPU minutes each, on scenes",
        26.0,
        ("0", "1", "2"),
        "methods.json",
        samples={
            "unlabelled": ("num_train=20000", "num_val=1", "num_objects_train=1", "num_objects_val=1", "seed=1"),
            "labelled": (),
        },
    ),
    Run(
        "methods_photos",
        "the same on photographs of clothing",
        18.0,
        ("0", "1"),
        "methods-photos.json",
        needs_shared=True,
    ),
    Run(
        "posttrain",
        "gain of post-training objectives over a pretrained ViT-S/14, 8 CPU minutes each, on photographs of clothing",
        4.0,
        ("0", "1", "2"),
        "posttrain.json",
        needs_shared=True,
        needs_weights=True,
    ),
    Run(
        "comae-hubs",
        "CoMAE in a painted world with known dependencies, five schedules of the budget",
        4.0,
        tuple(
            f"{preset}:{seed}"
            for preset in ("cross, ramp", "cross", "cross, paper", "ramp", "ramp, alternate")
            for seed in (0, 1, 2)
        ),
        "comae-hubs.json",
        "comae_hubs.py",
        ("--out", "{out}", "--only", "{part}"),
    ),
)


def done_parts(run: Run, out: Path) -> list[str]:
    """The finished parts of a run: those of ``out``, and those of the committed result file."""
    known = RESULTS / run.result
    stored = json.loads(known.read_text(encoding="utf-8")) if known.is_file() else {}
    if run.script:
        cells = stored.get("cells", {})
        committed = [f"{preset}:{seed}" for preset, seeds in cells.items() for seed in seeds]
    else:
        committed = [str(seed) for seed in stored.get("seeds", ())]
    return [part for part in run.parts if part in committed or (out / run.name / PART_DONE / slug(part)).is_file()]


def slug(part: str) -> str:
    """A part as a file name."""
    return "".join(letter if letter.isalnum() else "-" for letter in part)


def command_of(run: Run, part: str, out: Path, shared: Path | None) -> list[str]:
    """The command of a part."""
    folder = out / run.name
    if run.script:
        filled = [text.format(out=folder, shared=shared, part=part) for text in run.arguments]
        return [sys.executable, str(HERE / run.script), *filled]
    plan, target = folder / f"seed-{part}.yaml", folder / f"seed-{part}"
    return [sys.executable, "-m", "smalti", "compare", str(plan), "--out", str(target)]


def prepare(run: Run, out: Path, shared: Path | None, weights: Path | None) -> None:
    """Samples or links to data and weights, and one plan per seed."""
    folder = out / run.name
    folder.mkdir(parents=True, exist_ok=True)
    if run.script:
        return
    if shared is not None and run.needs_shared and not (folder / "data").exists():
        (folder / "data").symlink_to(shared.resolve(), target_is_directory=True)
    if weights is not None and run.needs_weights and not (folder / "weights.safetensors").exists():
        (folder / "weights.safetensors").symlink_to(weights.resolve())
    for name, settings in run.samples.items():
        if not (folder / "samples" / name).is_dir():
            what = ["samples", *settings, "--out", str(folder / "samples" / name), "--quiet"]
            subprocess.run([sys.executable, "-m", "smalti", *what], check=True)
    here = Path.cwd()
    os.chdir(folder)  # the plan names samples/...
    plan = to_tree(read_plan(HERE / f"{run.name}.yaml"))
    os.chdir(here)
    for part in run.parts:
        write_yaml(folder / f"seed-{part}.yaml", {**plan, "seeds": [int(part)]})


def share_steps(run: Run, out: Path) -> None:
    """Copy measured numbers of steps to the seeds that lack them."""
    folders = [out / run.name / f"seed-{part}" / STEPS for part in run.parts]
    for file in (file for folder in folders if folder.is_dir() for file in sorted(folder.glob("*.json"))):
        for folder in folders:
            if not (folder / file.name).exists():
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, folder / file.name)
                if not (folder.parent / PLAN_FILE).exists():  # compare refuses a folder with other files
                    shutil.copy2(folder.parent.with_suffix(".yaml"), folder.parent / PLAN_FILE)


def gather(run: Run, out: Path) -> None:
    """The comparison of all seeds that are finished, from their cells, and the result file."""
    folder = out / run.name
    seeds = [int(part) for part in run.parts if (folder / PART_DONE / slug(part)).is_file()]
    if run.script or not seeds:
        return
    whole = folder / "all"
    plan = {**to_tree(read_plan(folder / f"seed-{seeds[0]}.yaml")), "seeds": seeds}
    (whole / CELLS).mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        for cell in (folder / f"seed-{seed}" / CELLS).iterdir():
            if not (whole / CELLS / cell.name).exists():
                (whole / CELLS / cell.name).symlink_to(cell.resolve(), target_is_directory=True)
    write_yaml(whole / "plan.yaml", plan)
    command = [sys.executable, "-m", "smalti", "compare", str(whole / "plan.yaml"), "--out", str(whole)]
    subprocess.run(command, check=False)
    summary = json.loads((whole / "compare.json").read_text(encoding="utf-8"))
    measured = {
        file.stem: json.loads(file.read_text()) for file in sorted((folder / f"seed-{seeds[0]}" / STEPS).iterdir())
    }
    content = {
        "seeds": seeds,
        "plan": plan["arms"],
        "budget": plan["budget"],
        "steps": {name: {key: row[key] for key in ("steps", "step_s", "minutes")} for name, row in measured.items()},
        **{key: summary[key] for key in ("rows", "costs", "failures", "info")},
    }
    write_atomically(RESULTS / run.result, json.dumps(content, indent=1) + "\n")


def low_priority() -> None:
    """In the child, before it starts."""
    os.nice(19)
    os.setsid()


def work(queue: list[tuple[Run, str]], out: Path, shared: Path | None, processes: int) -> int:
    """Run the parts, some at a time; returns the number that failed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    running: dict[subprocess.Popen[bytes], tuple[Run, str, float]] = {}
    failed = 0
    stopped: list[int] = []

    def stop(number: int, _: Any) -> None:
        stopped.append(number)
        for process in running:
            process.send_signal(signal.SIGTERM)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    while (queue and not stopped) or running:
        while queue and len(running) < processes and not stopped:
            run, part = queue.pop(0)
            share_steps(run, out)
            command = command_of(run, part, out, shared)
            with (out / run.name / f"{slug(part)}.log").open("ab") as log:
                process = subprocess.Popen(
                    command, env=environment, stdout=log, stderr=log, preexec_fn=low_priority, cwd=out / run.name
                )
            running[process] = (run, part, time.monotonic())
            print(f"{run.name} {part}: started; {log.name}", flush=True)
        time.sleep(POLL_S)
        for process in [process for process in running if process.poll() is not None]:
            run, part, started = running.pop(process)
            minutes = (time.monotonic() - started) / 60
            if process.returncode == 0:
                write_atomically(out / run.name / PART_DONE / slug(part), "")
                print(f"{run.name} {part}: finished after {minutes:.0f} min", flush=True)
            elif not stopped:
                failed += 1
                print(f"{run.name} {part}: exit code {process.returncode} after {minutes:.0f} min", flush=True)
    return failed


def show(runs: Sequence[Run], out: Path) -> None:
    """What has run and what has not."""
    print("| run | what | parts finished | missing | core hours in all |\n|---|---|---|---|---|")
    for run in runs:
        done = done_parts(run, out)
        missing = ", ".join(part for part in run.parts if part not in done) or "–"
        print(f"| {run.name} | {run.what} | {len(done)} of {len(run.parts)} | {missing} | {run.hours:g} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="which; default: all")
    parser.add_argument("--list", action="store_true", help="say what has run, and stop")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"), help="folder of all runs")
    parser.add_argument("--shared", type=Path, help="folder of the data sets that some runs need")
    parser.add_argument("--weights", type=Path, help="ViT-S/14 that some runs start from")
    parser.add_argument("--processes", type=int, default=2, help="how many run at a time")
    options = parser.parse_args()
    if unknown := set(options.names) - {run.name for run in RUNS}:
        parser.error(f"no run is named {', '.join(unknown)}; known: {', '.join(run.name for run in RUNS)}")
    out = options.out.resolve()
    runs = [run for run in RUNS if not options.names or run.name in options.names]
    if options.list:
        show(runs, out)
        return
    queue = []
    for run in runs:
        needed = {"--shared": run.needs_shared and options.shared is None}
        needed["--weights"] = run.needs_weights and options.weights is None
        if any(needed.values()):
            print(f"{run.name}: left out; it needs {' and '.join(name for name in needed if needed[name])}", flush=True)
            continue
        missing = [part for part in run.parts if part not in done_parts(run, out)]
        if missing:
            prepare(run, out, options.shared, options.weights)
            queue += [(run, part) for part in missing]
    failed = work(queue, out, options.shared, options.processes)
    for run in runs:
        gather(run, out)
    show(runs, out)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
