"""Evaluate post-training: paired scores before and after on the same images, and a one-sentence verdict.

Scores on the images used for selection (best step, early stopping) are biased upwards. Selection therefore uses
``eval.split`` (by default ``val``), and the verdict uses the ``test`` split. Without a ``test`` split, the verdict is
about the last step, which isn't selected; the best step's score is shown without a claim.
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smalti.data.images.folders import SPLITS, open_images
from smalti.errors import DataError
from smalti.evaluation.config import EvalConfig, determining
from smalti.evaluation.details import read_details, write_details
from smalti.evaluation.evaluate import evaluate, fitting_protocols
from smalti.evaluation.intervals import LEVEL, RESAMPLINGS, Interval
from smalti.evaluation.paired import Row, metric_rows, read_row, row_tree, table_cells
from smalti.evaluation.result import Result, describe_result, read_results, write_results
from smalti.files import write_atomically
from smalti.models.encoder import Encoder
from smalti.reading import read_json, reading

VERDICT_FILE = "posttrain.json"
BEFORE, LAST, BEST = "before", "last", "best"
_FOLDER, _SETTINGS = "posttrain", "settings.json"
_PLAIN = ("subject", "steps", "best_step", "images", "network", "exported")
COSTLESS = ("batch_size", "num_workers", "cache_mib", "every", "patience", "baseline", "groups")
"""Settings of an evaluation that don't change its scores."""


@dataclass(frozen=True)
class Verdict:
    """Effect of post-training."""

    rows: tuple[Row, ...]
    """Each metric before, at the last and at the best step; differences are against before."""
    steps: Mapping[str, int]
    """Step of ``before``, ``last`` and, if it differs from these, ``best``."""
    subject: str
    """Key of ``steps`` that the sentence is about."""
    best_step: int | None
    """Step selected by evaluation during training; 0: the initial weights; None: no selection."""
    images: str
    """Images on which the verdict was evaluated."""
    notes: tuple[str, ...]
    """Notes for reading the numbers, a sentence each."""
    network: str = ""
    """Network that was evaluated."""
    exported: str = ""
    """Network that is exported by default."""

    @property
    def headline(self) -> Row:
        """The first protocol's headline metric at the step that the sentence is about."""
        return next(row for row in self.rows if row.arm == self.subject and row.is_headline)

    @property
    def kind(self) -> str:
        """``better``, ``worse``, or ``same``: no difference found."""
        found_nothing = self.best_step == 0 and self.headline.verdict == "better"
        return self.headline.verdict if self.headline.verdict in ("better", "worse") and not found_nothing else "same"

    @property
    def sentence(self) -> str:
        """One plain sentence."""
        row, gap = self.headline, self.headline.difference
        assert gap is not None
        before = next(r for r in self.rows if r.arm == BEFORE and (r.protocol, r.metric) == (row.protocol, row.metric))
        span = f", {LEVEL * 100:.0f} % interval {gap.low:.3f} to {gap.high:.3f}" if math.isfinite(gap.low) else ""
        numbers = (
            f"{row.protocol} {row.metric} {before.score.mean:.3f} -> {row.score.mean:.3f} ({gap.mean:+.3f}{span}) "
            f"at step {self.steps[self.subject]}"
        )
        if self.network != self.exported:
            numbers += (
                f", of the {self.network}; export writes the {self.exported} unless weights={self.network} is set"
            )
        numbers += _unknown(gap)
        if self.kind == "better":
            return f"better by {abs(gap.mean):.3f}: {numbers}"
        word = f"not better, worse by {abs(gap.mean):.3f}" if self.kind == "worse" else "not better"
        if self.best_step == 0:
            return f"{word}: no step scored better than the initial weights; {numbers}"
        return f"{word}: {numbers}" + ("" if span else "; this score has no interval with one seed")


class BeforeAfter:
    """Evaluate before and after training on one set of images, and store the results.

    Args:
        run: the run directory.
        config: settings of evaluation in training; ``data`` is given.
        network: name of the network that is evaluated.
        exported: name of the network that is exported by default.
        progress: called with the progress of an evaluation; may stop it by raising an exception.
    """

    def __init__(
        self,
        run: Path,
        config: EvalConfig,
        network: str = "encoder",
        exported: str = "encoder",
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        data = str(config.data)
        self.progress = progress
        self.run, self.data = run, data
        self.network, self.exported = network, exported
        self.chosen_on, self.is_apart = _splits(data, config)
        self.config = dataclasses.replace(
            config,
            protocols=config.protocols or fitting_protocols(data, config),
            split="test" if self.is_apart else config.split,
        )

    def record(self, step: int, results: Sequence[Result]) -> None:
        """Store results of evaluation during training, if they use the images of the verdict."""
        if not self.is_apart:
            self._keep(step, results)

    def has(self, step: int) -> bool:
        """Whether a step was evaluated with these settings."""
        try:
            return bool(read_json(self._folder(step) / _SETTINGS) == self._settings())
        except DataError:
            return False

    def evaluate(self, step: int, encoder: Encoder) -> None:
        """Evaluate a step's encoder on the images of the verdict."""
        self._keep(step, evaluate(encoder, f"{self.run} (step {step})", self.data, self.config, progress=self.progress))

    def conclude(self, last: int, best: int | None, encoder_of: Callable[[int], Encoder]) -> Verdict:
        """The verdict, also written to ``results/posttrain.json``.

        Args:
            last: the step at which training ended.
            best: the step selected by evaluation during training; 0: the initial weights; None: no selection.
            encoder_of: returns a step's encoder; called for those of 0, ``last`` and ``best`` not evaluated yet.
        """
        steps = {BEFORE: 0, LAST: last}
        if best not in (None, 0, last):
            steps[BEST] = best
        for step in steps.values():
            if not self.has(step):
                self.evaluate(step, encoder_of(step))
        results = {arm: self._results(step) for arm, step in steps.items()}
        rows: list[Row] = []
        for number, first in enumerate(results[BEFORE]):
            for metric in first.metrics:
                by_arm = {arm: {self.config.seed: found[number]} for arm, found in results.items()}
                rows += metric_rows(by_arm, metric, self.data, groups=self.config.groups)
        if not self.is_apart:  # selected on the same images: no claim
            rows = [dataclasses.replace(row, difference=None) if row.arm == BEST else row for row in rows]
        subject = BEST if self.is_apart and BEST in steps else LAST
        images = describe_result(results[BEFORE][0]) or str(results[BEFORE][0].settings["split"])
        grouped = any("groups" in row.score.over for row in rows)
        of = f"groups of images ({self.config.groups or 'from the table'})" if grouped else "images"
        notes = tuple(self._notes(steps, best, of))
        verdict = Verdict(tuple(rows), steps, subject, best, images, notes, self.network, self.exported)
        tree = {
            "sentence": verdict.sentence,
            "kind": verdict.kind,
            **{name: getattr(verdict, name) for name in (*_PLAIN, "notes")},
            "intervals": f"{LEVEL:.0%}, percentile bootstrap with {RESAMPLINGS} resamplings of the "
            f"{'groups of images' if grouped else 'images'}, paired",
            "rows": [row_tree(row) for row in rows],
        }
        write_atomically(verdict_path(self.run), json.dumps(tree, indent=1, ensure_ascii=False) + "\n")
        for folder in self._folder(0).parent.iterdir():
            if folder not in map(self._folder, steps.values()):
                shutil.rmtree(folder, ignore_errors=True)
        return verdict

    def _notes(self, steps: Mapping[str, int], best: int | None, of: str) -> list[str]:
        notes = []
        if best is None:
            notes.append(
                "Only the last step was evaluated, so no step was selected; the verdict is about the last step."
            )
        elif self.is_apart:
            notes.append(
                f"Step {best} was selected on {self.chosen_on}; the verdict uses test, on which no step was selected."
            )
        else:
            notes.append(
                "The best step was selected on the same images, since the data has no test split; so the verdict is "
                "about the last step, which isn't selected."
            )
            if BEST in steps:
                notes.append(
                    f"The score of step {best} is the best of several on these images, so it is biased upwards."
                )
            if self.config.patience:
                notes.append("If eval.patience stopped training, that was also decided on these images.")
        notes.append(f"The interval is over the {of}; it doesn't include the variation between seeds.")
        return notes

    def _folder(self, step: int) -> Path:
        return verdict_path(self.run).parent / _FOLDER / f"step_{step:08d}"

    def _settings(self) -> dict[str, Any]:
        plain: dict[str, Any] = json.loads(json.dumps(determining(self.config, COSTLESS)))
        return plain

    def _keep(self, step: int, results: Sequence[Result]) -> None:
        folder = self._folder(step)
        shutil.rmtree(folder, ignore_errors=True)
        write_details(folder / "results", results)
        write_results(folder / "results.json", list(results))
        write_atomically(
            folder / _SETTINGS, json.dumps(self._settings(), indent=1)
        )  # last: marks the folder as complete

    def _results(self, step: int) -> list[Result]:
        folder = self._folder(step)
        return read_details(folder / "results", read_results(folder / "results.json"))


def _unknown(gap: Interval) -> str:
    """Sources of variation missing from an interval of one run, to append to its numbers."""
    if gap.over == "nothing":
        return ""
    groups = (
        "without eval.groups, related images (frames of a video, slices of a patient) count as independent"
        if gap.over == "images"
        else "groups of images were resampled"
    )
    return f"; one seed, another may differ; {groups}"


def verdict_path(run: Path) -> Path:
    """Where a run's verdict is written."""
    return run / "results" / VERDICT_FILE


def read_verdict(run: Path) -> Verdict | None:
    """The verdict of a run; None if it has none.

    Raises:
        DataError: if the file is damaged.
    """
    path = verdict_path(run)
    if not path.is_file():
        return None
    with reading(path, "a verdict"):
        tree = json.loads(path.read_bytes())
        return Verdict(
            rows=tuple(read_row(row) for row in tree["rows"]),
            notes=tuple(tree["notes"]),
            **{name: tree[name] for name in _PLAIN if name in tree or name not in ("network", "exported")},
        )


VERDICT_COLUMNS = ("protocol", "metric", "weights", "score", "difference to before", "")


def verdict_cells(verdict: Verdict) -> list[tuple[str, ...]]:
    """Text for :data:`VERDICT_COLUMNS`, one headline metric after another."""
    rows = [row for row in verdict.rows if row.is_headline]
    cells: list[tuple[str, ...]] = []
    for row, (arm, score, _, gap, word) in zip(rows, table_cells(rows), strict=True):
        is_first = arm == BEFORE
        name = arm if is_first else f"{arm}, step {verdict.steps[arm]}"
        cells.append((row.protocol if is_first else "", row.metric if is_first else "", name, score, gap, word))
    return cells


def _splits(data: str, config: EvalConfig) -> tuple[str, bool]:
    """The split on which the best step is selected, and whether there is a separate test split."""
    known = open_images(data).splits
    default = next((split for split in ("val", "test") if split in known), "a random 20 %")
    chosen = SPLITS.get(config.split, config.split) if config.split else default
    return chosen, {"train", "test"} <= set(known) and chosen != "test"
