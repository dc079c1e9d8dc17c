"""The page of a run: what training was worth, its curves, its features, and how to repeat it."""

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smalti.charts import Line, LineChart, floats, read_chart
from smalti.config import flatten
from smalti.data.images.folders import ImageSet
from smalti.errors import ConfigError, DataError, SmaltiError
from smalti.evaluation.protocol import over_steps_of
from smalti.evaluation.result import Baseline
from smalti.files import write_atomically
from smalti.methods.base import Method, get_method, method_names
from smalti.models.encoder import Encoder
from smalti.models.loading import load
from smalti.reading import read_mapping
from smalti.report.details import ClassBars, DetailSections, class_bars, detail_sections
from smalti.report.feature_maps import FeatureMaps, choose_images, compute_maps
from smalti.report.formats import as_float, decimals
from smalti.report.parts import Fact, Figure, Summary, Table, TableCell, text_table
from smalti.report.patch_pictures import crop_images
from smalti.report.render import render
from smalti.report.rundir import RunFiles, read_run
from smalti.report.training_curves import TrainingCurves, training_curves
from smalti.report.verdict import TRAINED, Pair, conclude, label_of, pair_results, results_lead, results_table, value_of
from smalti.runs.baseline import baseline_of
from smalti.runs.posttrain import VERDICT_COLUMNS, verdict_cells
from smalti.training.logs import log_facts

NUM_IMAGES = 12
"""Images whose patch tokens are shown."""
VIEW_PX = 256
"""Longer side of a picture on the page, in pixels."""
_MAX_LISTED = 500


@dataclass(frozen=True)
class Results:
    """Final scores and scores during training."""

    lead: str
    table: Table | None
    classes: Sequence[ClassBars]
    during: Sequence[Figure]
    missing: str
    """What to do where there are no scores."""


@dataclass(frozen=True)
class ProbeSection:
    """Results of ``smalti probe``."""

    uri: str
    """Its picture as a ``data:`` URI; empty if it is missing."""
    table: Table


@dataclass(frozen=True)
class Drawn:
    """Images of ``smalti generate``, as ``data:`` URIs."""

    grid: str
    film: str
    certainty: Figure | None
    """A classifier's certainty while they were drawn; None if it was not measured."""


@dataclass(frozen=True)
class RunPage:
    """All that the page shows."""

    title: str
    subtitle: str
    summary: Summary
    before_and_after: Table | None
    """Of post-training."""
    before_and_after_lead: str
    facts: Sequence[Fact]
    results: Results
    curves: TrainingCurves | None
    details: DetailSections
    features: FeatureMaps | None
    no_features: str
    """Why there are no feature maps; empty if the page shall not mention them."""
    probe: ProbeSection | None
    drawn: Drawn | None
    events: Table | None
    unreadable: Table | None
    num_unreadable: int
    info: Mapping[str, Any]
    notes: Sequence[str]
    """What could not be read."""
    config: Mapping[str, Any]
    command: str
    commit: str


def write_report(
    run: Path,
    *,
    out: Path | None = None,
    num_images: int = NUM_IMAGES,
    encoder: Encoder | None = None,
    baseline: Baseline | None = None,
    images: ImageSet | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> Path:
    """Write the report of a run as one HTML file that loads nothing.

    What the run directory doesn't hold is left out, and the page says so.

    Args:
        run: a run directory.
        out: the file; None: ``report.html`` in the run directory.
        num_images: number of images whose patch tokens are shown; 0 leaves these sections out.
        encoder: encoder whose tokens are shown; None: the run's newest checkpoint.
        baseline: encoder to compare with; None: that of :func:`smalti.runs.baseline.baseline_of`.
        images: data set from which images are chosen evenly; None: ``data.path`` of the run.
        image_size: image size in pixels at the encoder's input, for finer maps; None: its native size.

    Returns:
        The file written.

    Raises:
        RunError: if ``run`` is no run directory.
        ConfigError: if ``out`` can't be written.
        ShapeError: if the patch size does not divide ``image_size``.
    """
    if num_images < 0:
        raise ConfigError(f"num_images={num_images}: 0 or more is needed")
    out = out or run / "report.html"
    if out.is_dir():
        raise ConfigError(f"{out}: is a folder, the report needs a file name such as {out / 'report.html'}")
    files = read_run(run)
    features, problem = None, "No images were asked for."
    if method_without_encoder(files) is not None:
        problem = ""
    elif files.setting("data.signal.window_s"):
        problem = "Feature maps and nearest patches are of images; this run was trained on signals."
    elif num_images:
        try:
            encoder = encoder or load(run, quiet=True)
            chosen, where = choose_images(files, images, num_images, encoder.in_chans)
            size = (image_size, image_size) if isinstance(image_size, int) else image_size or encoder.img_size
            encoder.check_size(*size)
            shown = crop_images(list(chosen), list(chosen.values()), size, VIEW_PX)
            features = compute_maps(shown, where, encoder, TRAINED, baseline or baseline_of(encoder))
        except (DataError, OSError) as error:
            problem = f"Left out: {error}."
        except SmaltiError as error:
            if encoder is not None:
                raise
            problem = f"Left out, as there is no encoder to evaluate: {error}."
    write_atomically(out, render("run", run_page(files, features, problem)))
    return out


def run_page(files: RunFiles, features: FeatureMaps | None = None, no_features: str = "") -> RunPage:
    """The data of the page.

    Args:
        files: what the run directory holds.
        features: of its encoder.
        no_features: why there are none.
    """
    pairs = pair_results(files.newest_results)
    details = detail_sections([pair.evaluated for pair in pairs], with_tokens=False)
    rows = files.unreadable[:_MAX_LISTED]
    is_posttraining = files.verdict is not None
    return RunPage(
        title=files.path.resolve().name,
        subtitle=_subtitle(files),
        summary=_summary(files, pairs),
        before_and_after=_before_and_after(files) if is_posttraining else None,
        before_and_after_lead=_before_and_after_lead(files) if is_posttraining else "",
        facts=_facts(files),
        results=_results(files, pairs),
        curves=training_curves(files, _method(files)) if files.log else None,
        details=details,
        features=features,
        no_features="" if features else no_features,
        probe=_probe(files.path / "probes"),
        drawn=_drawn(files.path / "samples"),
        events=text_table(("step", "event", "detail"), files.events) if files.events else None,
        unreadable=text_table(("path", "reason"), rows) if rows else None,
        num_unreadable=len(files.unreadable),
        info={key: value for key, value in files.info.items() if key not in ("command", "reference")},
        notes=files.notes,
        config=flatten(files.config),
        command=files.command,
        commit=str(next((v for k, v in flatten(files.info).items() if k.rpartition(".")[2] == "commit"), None) or ""),
    )


def method_without_encoder(files: RunFiles) -> type[Method] | None:
    """The run's method, if it trains on tokens and exports no encoder."""
    method = _method(files)
    return method if method is not None and not method.has_encoder else None


def _method(files: RunFiles) -> type[Method] | None:
    name = files.setting("method")
    return get_method(str(name)) if name in method_names() else None


def _summary(files: RunFiles, pairs: Sequence[Pair]) -> Summary:
    reference = files.info.get("reference")
    learned = str(reference.get("sentence") or "") if isinstance(reference, dict) else ""
    learned = f"{learned[0].upper()}{learned[1:]}." if learned else ""
    if (verdict := files.verdict) is not None:
        sentences = tuple(filter(None, (f"Post-training: {verdict.sentence}.", learned)))
        return Summary(verdict.kind, sentences, " ".join(verdict.notes))  # type: ignore[arg-type]
    kind, sentence = conclude(pairs, method_without_encoder(files))
    is_first = learned.startswith("Nothing")
    sentences = tuple(filter(None, (learned, sentence) if is_first else (sentence, learned)))
    when = "" if files.results or not files.during else f"Measured during training, at step {files.during[-1][0]:,}. "
    note = f"{when}One run with one seed: a small difference may be chance." if pairs else ""
    return Summary(kind, sentences, note)


def _before_and_after(files: RunFiles) -> Table:
    assert files.verdict is not None
    return Table(VERDICT_COLUMNS, tuple(tuple(cells) for cells in verdict_cells(files.verdict)))


def _before_and_after_lead(files: RunFiles) -> str:
    assert files.verdict is not None
    return f"On {files.verdict.rows[0].data}, {files.verdict.images}. In brackets: 95 % intervals."


def _subtitle(files: RunFiles) -> str:
    method, architecture = files.setting("method", "a method"), files.setting("encoder", "an encoder")
    if method_without_encoder(files) is not None:
        architecture = f"tokens of {files.setting('tokens.patch_size')} px patches ({files.setting('tokens.kind')})"
    steps, batch = files.setting("steps"), files.setting("batch_size")
    length = f", {steps:,} steps" if isinstance(steps, int) else ""
    kind = "windows" if files.setting("data.signal.window_s") else "images"
    length += f" of {batch:,} {kind}" if isinstance(steps, int) and isinstance(batch, int) else ""
    data, init = files.setting("data.path"), files.setting("init")
    start = f", started from the weights of {init}" if init else ""
    return f"{method} on {architecture}{start}{length}{f' from {data}' if data else ''}"


def _facts(files: RunFiles) -> list[Fact]:
    facts = []
    if files.log:
        steps = files.setting("steps")
        of = f" / {steps:,}" if isinstance(steps, int) else ""
        done = Fact(f"{int(max(files.log['step'])):,}{of}", "steps, of those planned" if of else "steps")
        facts = [done, *(Fact(*fact) for fact in log_facts(files.log))]
    return [*facts, Fact(str(files.setting("seed", "–")), "seed")]


def _results(files: RunFiles, pairs: Sequence[Pair]) -> Results:
    missing = ""
    if not pairs and (method := method_without_encoder(files)) is not None:
        missing = f"Next: {method.next_command.format(run=files.path)}"
    elif not pairs:
        missing = f"No results yet. Evaluate the encoder: smalti evaluate {files.path} --data LABELLED"
    return Results(
        lead=results_lead(pairs) if pairs else "",
        table=results_table(pairs) if pairs else None,
        classes=[bars for pair in pairs for bars in class_bars(pair.evaluated)],
        during=_during(files),
        missing=missing,
    )


def _during(files: RunFiles) -> list[Figure]:
    """Evaluations during training as lines, a chart for each protocol and data set."""
    figures = []
    scored = [(step, result) for step, result in files.during if result.metrics]
    baselines = {(r.protocol, r.data): r for r in [*files.results, *(r for _, r in files.during)] if r.is_baseline}
    for protocol, data in dict.fromkeys((result.protocol, result.data) for _, result in scored):
        points = [(step, result) for step, result in scored if (result.protocol, result.data) == (protocol, data)]
        metric = points[0][1].headline[0]
        baseline = baselines.get((protocol, data))
        level = value_of(baseline, metric)
        line = Line(
            floats(value_of(result, metric) for _, result in points),
            floats(step for step, _ in points),
            TRAINED,
            level=level,
        )
        dashed = f"; dashed: {label_of(baseline)}" if math.isfinite(level) else ""
        unit = points[0][1].units.get(metric, "")
        explanation = f"Score of the encoder at steps of its training{dashed}{f' ({unit})' if unit else ''}."
        title = f"{protocol} {metric} on {data}"
        chart = LineChart(f"{title} against the step", explanation, (line,), x_label="step", has_points=True)
        figures.append(Figure(title, explanation, chart))
        trained = [(step, result.metrics) for step, result in points if result.baseline != "untrained"]
        over_steps = over_steps_of(protocol)
        whole = over_steps(*map(list, zip(*trained, strict=True))) if over_steps and trained else None
        if whole is not None:
            figures.append(Figure(f"{whole.title} on {data}", whole.explanation, whole))
    return figures


def _probe(folder: Path) -> ProbeSection | None:
    """Results of ``smalti probe --what positions``; None if it did not run."""
    try:
        probe = read_mapping(folder / "positions.json")
        rows = tuple(
            (name, TableCell(decimals(as_float(value)), "number"), str(probe["units"].get(name, "")))
            for name, value in probe["metrics"].items()
        )
        picture = folder / "positions.png"
        uri = _png_uri(picture) if picture.is_file() else ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return ProbeSection(uri, Table(("probe", TableCell("value", "number"), "meaning"), rows))


def _drawn(folder: Path) -> Drawn | None:
    """Newest images of ``smalti generate``; None if it did not run."""
    try:
        pictures = _png_uri(folder / "grid.png"), _png_uri(folder / "film.png")
    except OSError:
        return None
    return Drawn(*pictures, _certainty(folder / "certainty.json"))


def _certainty(path: Path) -> Figure | None:
    try:
        chart = read_chart(read_mapping(path)["chart"])
    except (SmaltiError, KeyError, TypeError, ValueError):
        return None
    return Figure(chart.title, chart.explanation, chart)


def _png_uri(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
