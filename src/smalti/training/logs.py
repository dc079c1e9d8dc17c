"""Listeners of the loop: CSV files of a run directory, progress bar, Accelerate's trackers."""

import csv
import io
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from smalti.charts import LogColumn
from smalti.errors import DataError
from smalti.files import set_aside, write_atomically
from smalti.reading import read_csv

LOG_FILE, EVENTS_FILE = "log.csv", "events.csv"
LOG_COLUMNS: Mapping[str, LogColumn] = {
    "lr": LogColumn("Learning rate", "Step size of the optimiser for parameters without a scale of their own."),
    "weight_decay": LogColumn("Weight decay", "Strength with which the optimiser pulls weights towards zero."),
    "grad_norm": LogColumn("Gradient norm", "Length of the gradient before clipping; spikes mean instability.", True),
    "feature_std": LogColumn(
        "Feature standard deviation", "Mean over the dimensions of patch tokens; near 0 the features have collapsed."
    ),
    "effective_rank": LogColumn(
        "Effective rank", "Number of directions that the patch tokens use; near 1 the features have collapsed."
    ),
    "images_per_s": LogColumn("Throughput", "Images per second.", True),
    "memory_mib": LogColumn("Memory", "MiB: the highest use of a GPU so far, or what the process uses on a CPU."),
}
"""Columns that every run logs, as pages show them; those of a method are :attr:`Method.log_columns`."""
UNDRAWN_COLUMNS = ("step", "progress", "elapsed_s", "loss")
"""Columns that need no chart of their own."""


class CSVLog:
    """``log.csv`` and ``events.csv``: always written, row by row, so that a killed run keeps its log."""

    def __init__(self, run: Path) -> None:
        self.log, self.events = run / LOG_FILE, run / EVENTS_FILE
        self._columns: list[str] = []

    def started(self, step: int, steps: int) -> None:
        """Drop rows after ``step``, which will be written again. A damaged log is renamed and a new one started."""
        self._columns = []
        if not self.log.exists():
            return
        try:
            rows = read_csv(self.log)
            kept = [row for row in rows if float(row["step"]) <= step]
        except (DataError, KeyError, ValueError) as error:
            set_aside(self.log, error)
            return
        self._columns = list(rows[0]) if rows else []
        self._rewrite(kept)

    def step(self, step: int) -> None:
        """Rows are enough."""

    def row(self, row: dict[str, float]) -> None:
        """Append a row; a new column rewrites the file with it."""
        if self._columns and (new := [name for name in row if name not in self._columns]):
            rows = read_csv(self.log)
            self._columns += new
            self._rewrite(rows)
        if not self._columns:
            self._columns = list(row)
            self._rewrite([])
        _append(self.log, [_cell(row.get(name)) for name in self._columns])

    def event(self, step: int, event: str, detail: str) -> None:
        """Append to ``events.csv``; if the run was rolled back, drop rows after ``step``."""
        if not self.events.exists():
            _append(self.events, ["step", "event", "detail"])
        _append(self.events, [str(step), event, detail])
        if event == "rolled back":
            self.started(step, 0)

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.log, text.getvalue())


def _append(path: Path, values: list[str]) -> None:
    with path.open("a", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerow(values)


class Screen:
    """Progress on stderr: a live bar on a terminal, a line a row elsewhere; with ETA, throughput and memory."""

    def __init__(self, name: str, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.name = name
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self.progress.add_task(name, total=None, note="")
        self._steps = self._first = 0

    def started(self, step: int, steps: int) -> None:
        """Show the bar."""
        self._steps, self._first = steps or self._steps, step
        self.progress.update(self._task, total=self._steps, completed=step)
        self.progress.start()

    def step(self, step: int) -> None:
        """Move the bar."""
        self.progress.update(self._task, completed=step)

    def row(self, row: dict[str, float]) -> None:
        """Show what matters of a row."""
        step = int(row["step"])
        rate, memory = row.get("images_per_s", math.nan), row.get("memory_mib", math.nan)
        note = f"loss {row['loss']:.4g}  {rate:.3g} images/s  {memory / 1024:.2f} GiB"
        self.progress.update(self._task, completed=step, note=note)
        if not self.console.is_terminal:
            made = max(step - self._first, 1)
            left = row.get("elapsed_s", 0.0) / made * (self._steps - step)
            print(
                f"{self.name} step {step}/{self._steps}  {note}  about {_duration(left)} left",
                file=sys.stderr,
                flush=True,
            )

    def event(self, step: int, event: str, detail: str) -> None:
        """A line above the bar."""
        self.progress.console.print(f"{self.name} step {step}: {event}: {detail}", highlight=False, markup=False)

    def close(self) -> None:
        """Restore the terminal."""
        self.progress.stop()


class Trackers:
    """Pass rows to the trackers that Accelerate was set up with."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    def started(self, step: int, steps: int) -> None:
        """Nothing to do."""

    def step(self, step: int) -> None:
        """Rows are enough."""

    def row(self, row: dict[str, float]) -> None:
        """Log a row under its step."""
        self.accelerator.log({name: value for name, value in row.items() if name != "step"}, step=int(row["step"]))

    def event(self, step: int, event: str, detail: str) -> None:
        """Nothing to do: trackers accept numbers only."""


def log_facts(log: Mapping[str, Sequence[float]]) -> list[tuple[str, str]]:
    """The most important numbers of a log, each as text with what it is.

    Args:
        log: column -> values; columns may be missing.
    """
    described: tuple[tuple[str, str, Callable[[Sequence[float]], str]], ...] = (
        ("loss", "loss at the end", lambda values: _short(values[-1])),
        ("effective_rank", "effective rank at the end", lambda values: _short(values[-1])),
        ("images_per_s", "images per second, median", lambda values: _rate(statistics.median(values))),
        ("elapsed_s", "training time", lambda values: _duration(values[-1])),
        ("memory_mib", "highest memory use", lambda values: f"{max(values) / 1024:.1f} GiB"),
    )
    finite = {name: [value for value in values if math.isfinite(value)] for name, values in log.items()}
    return [(text(finite[name]), label) for name, label, text in described if finite.get(name)]


def _short(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _cell(value: float | None) -> str:
    return "" if value is None else str(int(value)) if value == value and value.is_integer() else format(value, ".7g")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
