"""The report of a run: one self-contained HTML page that opens offline."""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from smalti.config import flatten
from smalti.data.images.folders import ImageSet, open_images
from smalti.data.images.pixels import trained_pixels
from smalti.errors import ConfigError, DataError, SmaltiError
from smalti.evaluation.paired import result_cells
from smalti.evaluation.result import BASELINE_LABELS, Baseline, Result, describe_result
from smalti.files import write_atomically
from smalti.functional.components import reduce_patches
from smalti.methods.base import Method, get_method, method_names
from smalti.models.encoder import Encoder
from smalti.models.loading import load
from smalti.reading import read_mapping
from smalti.report.details import Evaluated, class_bars, detail_sections
from smalti.report.figures import (
    EXPLORER_DIMS,
    ShownImages,
    crop_images,
    explorer_data,
    image_uri,
    line_chart,
    patch_tokens,
    pca_maps,
    quantise,
)
from smalti.report.html import (
    Html,
    as_float,
    chart_figure,
    decimals,
    duration,
    fact_boxes,
    join,
    missing,
    settings_table,
    tag,
    text_table,
    verdict_box,
    whole_page,
)
from smalti.report.rundir import RunFiles, read_run
from smalti.runs.baseline import baseline_of
from smalti.runs.posttrain import VERDICT_COLUMNS, Verdict, verdict_cells

NUM_IMAGES = 12
"""Images whose patch tokens are shown."""
VIEW_PX = 256
"""Longer side of a picture on the page, in pixels."""
SAME = 0.005
"""Scores in 0..1 that differ by less are called equal,"""
SLIGHT = 0.02
"""and by less than this, slightly different."""
_BASELINES_IN_WORDS = {
    "untrained": "the same network untrained",
    "before": "the weights that it started from",
    "random init": "a random initialisation of its architecture",
    "baseline": "the baseline",
}
_DENSE_FIRST = ("linear-segmentation", "segmenter", "in-context", "knn-patch", "overclustering", "detection")
_SPLITS_SHOWN = ("val", "test", "train")
_MAX_LISTED = 500
_CURVES = {
    "lr": ("Learning rate", ""),
    "weight_decay": ("Weight decay", ""),
    "grad_norm": ("Gradient norm", "before clipping"),
    "feature_std": ("Feature standard deviation", "mean over dimensions; near 0 the features have collapsed"),
    "effective_rank": ("Effective rank", "how many directions the features use; near 1 they have collapsed"),
    "images_per_s": ("Throughput", "images per second"),
    "memory_mib": ("Memory", "MiB"),
}
_NO_CURVE = ("step", "progress", "elapsed_s", "loss")
_NOISY = ("grad_norm", "images_per_s")


@dataclass(frozen=True)
class Comparison:
    """One protocol on one data set: the trained encoder, and its baseline beside it."""

    trained: Result
    baseline: Result | None

    @property
    def name(self) -> str:
        """Protocol, headline metric and data set."""
        return f"{self.trained.protocol} {self.trained.headline[0]} on {self.trained.data}"

    @property
    def label(self) -> str:
        """Name of the baseline."""
        return _label(self.baseline) or "baseline"

    def values(self, metric: str) -> tuple[float, float]:
        """The metric of both; NaN if there is none."""
        return _value(self.trained, metric), _value(self.baseline, metric)

    def gain(self, metric: str) -> float:
        """How much better the trained encoder is, whatever the metric's direction; NaN if it can't be said."""
        trained, baseline = self.values(metric)
        unit = self.trained.units.get(metric, "")
        if "lower is better" in unit:
            return baseline - trained
        return trained - baseline if "higher is better" in unit else math.nan


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
    """Write the report of a run as one HTML file that needs nothing beside it, network included.

    What the run directory doesn't hold is left out, and the page says so.

    Args:
        run: a run directory.
        out: the file; None takes ``report.html`` in the run directory.
        num_images: how many images show their patch tokens; 0 leaves these parts out.
        encoder: whose tokens are shown; None: the run's newest checkpoint.
        baseline: encoder to compare with; None: its own baseline, for a run the untrained network.
        images: where the images are taken from, evenly; None opens ``data.path`` of the run.
        image_size: pixels that the encoder is given, for finer maps than its native size gives.

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
    shown: tuple[Html, Html] | str | None = "No images were asked for."
    if _without_encoder(files) is not None:
        shown = None
    elif files.setting("data.signal.window_s"):
        shown = "Feature maps and nearest patches are of images; this run learned from signals."
    elif num_images:
        try:
            encoder = encoder or load(run, quiet=True)
            chosen, where = _choose_images(files, images, num_images, encoder.in_chans)
            size = (image_size, image_size) if isinstance(image_size, int) else image_size or encoder.img_size
            encoder.check_size(*size)
            pictures = crop_images(list(chosen), list(chosen.values()), size, VIEW_PX)
            shown = _features(pictures, where, encoder, baseline or baseline_of(encoder))
        except (DataError, OSError) as error:
            shown = f"Left out: {error}."
        except SmaltiError as error:
            if encoder is not None:
                raise
            shown = f"Left out, as there is no encoder to ask: {error}."
    write_atomically(out, _page(files, shown))
    return out


def compare(results: Sequence[Result]) -> list[Comparison]:
    """Results of trained encoders, each with its baseline on the same protocol and data; dense protocols first."""
    baselines = {(result.protocol, result.data): result for result in results if result.is_baseline}
    pairs = [
        Comparison(result, baselines.get((result.protocol, result.data)))
        for result in results
        if not result.is_baseline and result.metrics
    ]
    rank = {name: number for number, name in enumerate(_DENSE_FIRST)}
    return sorted(pairs, key=lambda pair: rank.get(pair.trained.protocol, len(rank)))


def verdict(comparisons: Sequence[Comparison], method: type[Method] | None = None) -> tuple[str, str]:
    """Whether training helped: ``better``, ``same``, ``worse`` or ``unknown``, and one sentence; ``method`` names one
    that exports no encoder."""
    measured = [pair for pair in comparisons if math.isfinite(pair.gain(pair.trained.headline[0]))]
    if not measured:
        if not comparisons and method is not None:
            return "unknown", f"A run of {method.name} hands on no encoder, so there are no features to judge."
        if not comparisons:
            return "unknown", "Not evaluated: nothing says yet whether training improved these features."
        metric, value = comparisons[0].trained.headline
        real = comparisons[0].trained.metrics.get(f"{metric}_real")  # generated images, evaluated with given features
        if real is not None:
            return "unknown", (
                f"{comparisons[0].name} is {decimals(as_float(value))}; real images get {decimals(as_float(real))}."
            )
        if comparisons[0].baseline is not None and "is better" not in comparisons[0].trained.units.get(metric, ""):
            return "unknown", (
                f"{comparisons[0].name} is {decimals(as_float(value))}; neither more nor less of it is better, so it "
                "does not say whether training helped."
            )
        return "unknown", (
            f"No comparison with a baseline: {comparisons[0].name} is {decimals(as_float(value))}, "
            f"and {metric} alone does not say whether training helped."
        )
    first = measured[0]
    metric = first.trained.headline[0]
    gain = first.gain(metric)
    low, high = (first.trained.intervals.get(metric, {}).get(f"difference_{end}", math.nan) for end in ("low", "high"))
    holds_zero = low <= 0 <= high
    kind = "same" if abs(gain) < SAME or holds_zero else "better" if gain > 0 else "worse"
    word = {"better": "better", "same": "not better", "worse": "worse"}[kind]
    word = f"slightly {word}" if SAME <= abs(gain) < SLIGHT and not holds_zero else word
    trained, baseline = first.values(metric)
    span = f", 95 % interval {low:+.3f} to {high:+.3f}" if math.isfinite(low) else ""
    sentence = (
        f"{word.capitalize()} than {_BASELINES_IN_WORDS[first.label]}: {first.name} is {decimals(trained)}, "
        f"against {decimals(baseline)} ({_signed(gain, first)}{span})"
    )
    if len(measured) > 1:
        improved = sum(pair.gain(pair.trained.headline[0]) >= SAME for pair in measured)
        sentence += f"; {improved} of {len(measured)} evaluations improve"
    return kind, sentence + "."


def _signed(gain: float, pair: Comparison) -> str:
    lower = "lower is better" in pair.trained.units.get(pair.trained.headline[0], "")
    return f"{-gain if lower else gain:+.3f}"


def _without_encoder(files: RunFiles) -> type[Method] | None:
    """The method, if it trains on tokens and exports no encoder."""
    name = files.setting("method")
    method = get_method(str(name)) if name in method_names() else None
    return method if method is not None and not method.has_encoder else None


def _page(files: RunFiles, shown: tuple[Html, Html] | str | None) -> str:
    comparisons = compare(files.judged)
    kind, sentence = verdict(comparisons, _without_encoder(files))
    maps, nearest = (None, None) if shown is None else (missing(shown), None) if isinstance(shown, str) else shown
    details = detail_sections([judged(pair) for pair in comparisons], tokens=False)
    sections = {
        "results": ("Results", _results(files, comparisons)),
        "curves": ("Curves", _curves(files)),
        **{name: section for name, section in details.items() if name != "classes"},  # these stand with the results
        "features": ("Feature maps", maps),
        "nearest": ("Nearest patches", nearest),
        "positions": ("Positions", _positions(files)),
        "drawn": ("Drawn images", _drawn(files)),
        "events": ("Events", _events(files)),
        "settings": ("What was run", _settings(files)),
        "reproduce": ("Reproduce", _reproduce(files)),
    }
    learned = _learned(files)
    said = (
        [sentence] if learned is None else [learned, sentence] if learned.startswith("Nothing") else [sentence, learned]
    )
    return whole_page(
        files.path.resolve().name,
        _one_line(files),
        verdict_box(kind, said, _caution(files) if comparisons else None)
        if files.verdict is None
        else _before_and_after(files.verdict, learned),
        sections,
        facts=_facts(files),
        script=(resources.files("smalti.report") / "page.js").read_text(encoding="utf-8"),
    )


def _learned(files: RunFiles) -> str | None:
    """The loss at the end beside that of a predictor that ignores the image, a sentence; None if none is known."""
    reference = files.info.get("reference")
    sentence = str(reference.get("sentence") or "") if isinstance(reference, dict) else ""
    return f"{sentence[0].upper()}{sentence[1:]}." if sentence else None


def _before_and_after(verdict: Verdict, learned: str | None) -> Html:
    """What post-training was worth, said first, with its table."""
    sentences = [f"Post-training: {verdict.sentence}.", *([learned] if learned else [])]
    rows = [dict(zip(VERDICT_COLUMNS, cells, strict=True)) for cells in verdict_cells(verdict)]
    title = tag("h2", "Before and after")
    lead = tag("p", f"On {verdict.rows[0].data}, {verdict.images}. In brackets: 95 % intervals.", class_="lead")
    table = tag("section", title, lead, text_table(VERDICT_COLUMNS, rows), id="before-and-after")
    return join((verdict_box(verdict.kind, sentences, " ".join(verdict.notes)), table))


def _one_line(files: RunFiles) -> str:
    method, architecture = files.setting("method", "a method"), files.setting("encoder", "an encoder")
    if _without_encoder(files) is not None:
        architecture = f"tokens of {files.setting('tokens.patch_size')} px patches ({files.setting('tokens.kind')})"
    steps, batch = files.setting("steps"), files.setting("batch_size")
    length = f", {steps:,} steps" if isinstance(steps, int) else ""
    kind = "windows" if files.setting("data.signal.window_s") else "images"
    length += f" of {batch:,} {kind}" if isinstance(steps, int) and isinstance(batch, int) else ""
    data = files.setting("data.path")
    return f"{method} on {architecture}{length}{f' from {data}' if data else ''}"


def _caution(files: RunFiles) -> str:
    when = "" if files.results else f"Measured in training, at step {files.during[-1][0]:,}. "
    return f"{when}One run with one seed: a small difference may be chance."


def _facts(files: RunFiles) -> Html:
    log = files.log
    facts: list[tuple[str, str]] = []
    if log:
        steps = files.setting("steps")
        of = f" / {steps:,}" if isinstance(steps, int) else ""
        facts.append((f"{int(max(log['step'])):,}{of}", "steps, of those asked for" if of else "steps"))
        for column, label, write in (
            ("loss", "loss at the end", decimals),
            ("effective_rank", "effective rank at the end", decimals),
            ("images_per_s", "images per second, median", lambda v: f"{v:,.0f}" if v >= 10 else f"{v:.2g}"),
            ("elapsed_s", "training time", duration),
            ("memory_mib", "memory, highest", lambda v: f"{v / 1024:.1f} GiB"),
        ):
            values = [value for value in log.get(column, []) if math.isfinite(value)]
            if values:
                one = {"images_per_s": float(np.median(values)), "memory_mib": max(values)}.get(column, values[-1])
                facts.append((write(one), label))
    facts.append((str(files.setting("seed", "–")), "seed"))
    return fact_boxes(facts)


def _results(files: RunFiles, comparisons: Sequence[Comparison]) -> Html:
    if not comparisons and (method := _without_encoder(files)) is not None:
        return missing(f"Next: {method.next_command.format(run=files.path)}")
    if not comparisons:
        text = f"No results yet. smalti evaluate {files.path} --data DIR --protocol knn measures them."
        return join((missing(text), _during(files)))
    bars = map(class_bars, map(judged, comparisons))
    return join((results_table(comparisons), *bars, _during(files)))


def results_table(comparisons: Sequence[Comparison]) -> Html:
    """All metrics of trained encoders, with their baselines beside them where these were evaluated, too."""
    rows = []
    is_alone = all(pair.baseline is None for pair in comparisons)
    for pair in comparisons:
        headline = pair.trained.headline[0]
        for metric in pair.trained.metrics:
            gain = pair.gain(metric)
            told = result_cells(pair.trained, pair.baseline, metric)
            shown, before, change = (*told, "", "")[:3]
            is_first = metric == headline
            kind = "good" if gain >= SAME else "bad" if gain <= -SAME else ""
            cells = (
                tag("td", pair.trained.protocol if is_first else ""),
                tag("td", *_where(pair.trained), class_="path") if is_first else tag("td"),
                tag("td", metric, title=pair.trained.units.get(metric)),
                tag("td", shown, class_="number"),
            )
            beside = (
                tag("td", before or "–", class_="number"),
                tag("td", change or "–", class_=f"number {kind if is_first else ''}"),
            )
            listed = cells if is_alone else (*cells, *beside)
            rows.append(tag("tr", *listed, class_="headline" if is_first else "muted"))
    labels = ", ".join(dict.fromkeys(pair.label for pair in comparisons if pair.baseline is not None))
    first = "value" if labels == BASELINE_LABELS["random-init"] else "trained"
    head = ("protocol", "data", "metric", *(("value",) if is_alone else (first, labels, "difference")))
    names = (tag("th", t, class_="number" if n > 2 else None) for n, t in enumerate(head))
    table = tag("table", tag("thead", tag("tr", *names)), tag("tbody", *rows))
    encoders = ", ".join(dict.fromkeys(pair.trained.encoder for pair in comparisons))
    drawn = dict.fromkeys(str(pair.trained.settings.get("intervals", "")) for pair in comparisons)
    brackets = "".join(f" In brackets: {one}; differences are paired." for one in drawn if one)
    lead = tag(
        "p",
        f"{'Features' if is_alone else 'Trained'}: {encoders}. "
        f"Scores lie in 0..1 unless the metric says otherwise (hover over its name).{brackets}",
        class_="lead",
    )
    return join((lead, tag("div", table, class_="scroll")))


def _where(result: Result) -> tuple[Any, ...]:
    """The data set, and below it what must be known to read the numbers."""
    told = describe_result(result)
    return (result.data, tag("div", told, class_="muted")) if told else (result.data,)


def judged(pair: Comparison) -> Evaluated:
    """The two as arms."""
    beside = {pair.label: [pair.baseline]} if pair.baseline else {}
    return Evaluated(pair.trained.data, pair.trained.protocol, {"trained": [pair.trained], **beside})


def _label(result: Result | None) -> str:
    return BASELINE_LABELS[result.baseline] if result is not None and result.baseline is not None else ""


def _during(files: RunFiles) -> Html | None:
    """Evaluations in training as curves, a chart for each protocol and data set."""
    charts = []
    trained = [(step, result) for step, result in files.during if result.metrics]
    levels = {(r.protocol, r.data): r for r in [*files.results, *(r for _, r in files.during)] if r.is_baseline}
    for key in dict.fromkeys((result.protocol, result.data) for _, result in trained):
        points = [(step, result) for step, result in trained if (result.protocol, result.data) == key]
        metric = points[0][1].headline[0]
        steps = [float(step) for step, _ in points]
        level = levels.get(key)
        baseline = _value(level, metric)
        has_level = math.isfinite(baseline)
        title = f"{key[0]} {metric} on {key[1]}"
        chart = line_chart(
            f"{title} against the step",
            {"trained": (steps, [_value(result, metric) for _, result in points])},
            levels={"trained": baseline} if has_level else None,
            points=True,
        )
        charts.append(chart_figure(title, "in training" + (f"; dashed: {_label(level)}" if has_level else ""), chart))
    return tag("div", *charts, class_="charts", style="margin-top:18px") if charts else None


def _curves(files: RunFiles) -> Html:
    log = files.log
    if not log:
        return missing("No log.csv to draw from.")
    steps = log["step"]
    marks = [float(e["step"]) for e in files.events if e.get("step", "").isdecimal()]
    terms = {key.removeprefix("loss/"): values for key, values in log.items() if key.startswith("loss/")}
    losses = {"loss": log["loss"]} if "loss" in log else {}
    if len(terms) > 1:
        losses |= terms
    charts = []
    if losses:
        drawn = {name: (steps, values) for name, values in losses.items()}
        chart = line_chart("Loss against the step", drawn, size=(9.2, 2.7), marks=marks, smooth=True)
        only = f"its one term: {next(iter(terms))}" if len(terms) == 1 else ""
        charts.append(chart_figure("Loss", only, chart, "wide"))
    for column, values in log.items():
        if column in _NO_CURVE or column.startswith("loss/") or not any(map(math.isfinite, values)):
            continue
        title, meaning = _CURVES.get(column, (column, ""))
        chart = line_chart(f"{title} against the step", {title: (steps, values)}, marks=marks, smooth=column in _NOISY)
        charts.append(chart_figure(title, meaning, chart))
    lead = "Against the step. Bold: running mean." + (" Dotted: an event, listed below." if marks else "")
    return join((tag("p", lead, class_="lead"), tag("div", *charts, class_="charts")))


def _choose_images(
    files: RunFiles, images: ImageSet | None, num_images: int, channels: int
) -> tuple[dict[str, np.ndarray], str]:
    """Readable images spread evenly over a data set (held-out ones where there are), and where they are from.

    Raises:
        DataError: if the data set is not there, or none of it can be read.
    """
    if images is None:
        path = files.setting("data.path")
        if path is None:
            raise DataError("the run's settings name no data.path")
        images = open_images(str(path)).with_pixels(trained_pixels(files.config))
    split = next((split for split in _SPLITS_SHOWN if split in images.splits), None)
    samples = (images.subset(split) if split else images).samples
    paths = [sample.path for sample in samples]
    tries = np.linspace(0, len(paths) - 1, min(len(paths), 2 * num_images)).round().astype(int)
    order = dict.fromkeys(
        [*tries[::2].tolist(), *tries[1::2].tolist()]
    )  # the second half stands in for unreadable ones
    chosen: dict[int, np.ndarray] = {}
    for number in order:
        if len(chosen) == num_images:
            break
        try:
            chosen[number] = samples[number].read(channels)
        except DataError:
            continue
    if not chosen:
        raise DataError(f"{images.root}: none of {len(order)} images tried can be read")
    root = images.root if images.root.is_dir() else images.root.parent
    names = {n: paths[n].relative_to(root) if paths[n].is_relative_to(root) else paths[n] for n in sorted(chosen)}
    return {str(name): chosen[n] for n, name in names.items()}, f"{images.root}{f', split {split}' if split else ''}"


def _features(shown: ShownImages, where: str, encoder: Encoder, baseline: Baseline | None) -> tuple[Html, Html]:
    """The sections of PCA maps and nearest patches."""
    encoders = {"trained": encoder} | ({} if baseline is None else {baseline.label: baseline.make()})
    grid = encoder.check_size(*shown.inputs[0].shape[:2])
    maps, codes = {}, {}
    for name, one in encoders.items():
        coordinates, share = reduce_patches(patch_tokens(one, shown.inputs)[0], EXPLORER_DIMS)
        maps[name] = pca_maps(coordinates, grid)
        codes[name] = quantise(coordinates), share
    uris = [image_uri(picture) for picture in shown.pictures]
    aspect = f"--aspect:{grid[1] * encoder.patch_size[1]}/{grid[0] * encoder.patch_size[0]}"
    triples = [
        tag(
            "figure",
            *(tag("span", text, class_="heading") for text in ("image", *maps)),
            tag("img", src=uris[number], alt=f"{name}"),
            *(
                tag("img", src=image_uri(m[number], ".png"), class_="pixels", alt=f"PCA map of {name}, {which} encoder")
                for which, m in maps.items()
            ),
            tag("figcaption", f"{number + 1} · {name}", title=name),
            class_="triple",
        )
        for number, name in enumerate(shown.names)
    ]
    lead = tag(
        "p",
        f"The first three principal components of the patch tokens as red, green and blue, fitted over all {len(uris)} "
        f"images together ({where}): patches of like colour have like tokens, also across images. "
        f"Each map is {grid[0]} × {grid[1]} patches of {encoder.patch_size[0]} × {encoder.patch_size[1]} pixels.",
        class_="lead",
    )
    features = join((lead, tag("div", *triples, class_="maps", style=f"{aspect};--columns:{len(maps) + 1}")))
    return features, _explorer(shown, uris, explorer_data(codes, grid, shown.names), aspect)


def _explorer(shown: ShownImages, uris: Sequence[str], data: Mapping[str, Any], aspect: str) -> Html:
    dims = data["encoders"][0]["dims"]
    shares = ", ".join(f"{one['share']:.0%} {one['name']}" for one in data["encoders"])
    lead = tag(
        "p",
        "Click a patch in any image: all patches show their cosine similarity to it. Arrow keys move it, hovering "
        "reads values. Compared are tokens less their mean over these images, in their first "
        f"{dims} principal components, which hold this much of the variance: {shares}.",
        class_="lead",
    )
    buttons = (
        tag("button", e["name"], type="button", aria_pressed="true" if n == 0 else "false")
        for n, e in enumerate(data["encoders"])
    )
    several = len(uris) > 1
    tools = tag(
        "div",
        tag("span", *buttons, class_="switch", role="group", aria_label="encoder"),
        tag("label", Html('<input type="checkbox" id="heat" checked> '), "heat"),
        tag(
            "label",
            Html(f'<input type="checkbox" id="other-images"{" checked" if several else ""}> '),
            "list other images only",
            hidden=None if several else "hidden",
        ),
        tag("span", "similarity 0", tag("span", class_="ramp"), "1", class_="muted"),
        class_="tools",
    )
    tiles = (
        tag(
            "figure",
            tag(
                "div",
                tag("img", src=uri, alt=name),
                tag("canvas"),
                class_="frame",
                tabindex="0",
                role="application",
                aria_label=f"{name}: choose a patch with the arrow keys",
            ),
            tag("figcaption", f"{number + 1} · {name}", title=name),
            class_="tile",
        )
        for number, (name, uri) in enumerate(zip(shown.names, uris, strict=True))
    )
    nearest = tag("div", tag("h3", "Nearest patches"), tag("ol"), class_="nearest", aria_live="polite")
    # "<" written as an escape keeps a file name from ending the script element
    written = Html(json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"))
    return join(
        (
            lead,
            tools,
            tag("div", tag("div", *tiles, class_="tiles"), nearest, class_="explorer", style=aspect),
            tag("script", written, type="application/json", id="patch-data"),
        )
    )


def _positions(files: RunFiles) -> Html | None:
    """Results of ``smalti probe --what positions`` in the run directory; None if it did not run."""
    path, picture = (files.path / "probes" / f"positions.{ending}" for ending in ("json", "png"))
    try:
        probe = read_mapping(path)
        rows = [
            {"probe": name, "value": decimals(as_float(value)), "meaning": str(probe["units"].get(name, ""))}
            for name, value in probe["metrics"].items()
        ]
        drawn = base64.b64encode(picture.read_bytes()).decode() if picture.is_file() else ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    image = tag("img", src=f"data:image/png;base64,{drawn}", alt="predicted and true offsets", style="max-width:100%")
    lead = tag("p", "What the encoder and its head know of where patches are, on images as in training.", class_="lead")
    return join((lead, image if drawn else None, text_table(("probe", "value", "meaning"), rows)))


def _drawn(files: RunFiles) -> Html | None:
    """Latest images of ``smalti generate``; None if it did not run."""
    folder = files.path / "samples"
    try:
        grid, film = (base64.b64encode((folder / name).read_bytes()).decode() for name in ("grid.png", "film.png"))
    except OSError:
        return None
    told = (
        "How some of them came about, a row each: frames from first to last, what is not drawn yet in grey; at the end "
        "when each place was "
    )
    return join(
        (
            tag("p", "Images that the run drew last.", class_="lead"),
            tag("img", src=f"data:image/png;base64,{grid}", alt="drawn images", style="max-width:100%"),
            tag("p", f"{told}drawn, dark first.", class_="lead"),
            tag("img", src=f"data:image/png;base64,{film}", alt="how they were drawn", style="max-width:100%"),
        )
    )


def _events(files: RunFiles) -> Html:
    parts: list[Html] = []
    if files.events:
        parts.append(text_table(("step", "event", "detail"), files.events))
    else:
        parts.append(tag("p", "None: no roll-back, no resumption.", class_="muted"))
    if files.unreadable:
        rows = files.unreadable[:_MAX_LISTED]
        more = len(files.unreadable) - len(rows)
        title = f"Unreadable images, skipped: {len(files.unreadable):,}"
        rest = tag("p", f"… and {more:,} more in unreadable.csv", class_="muted") if more else None
        parts.append(tag("details", tag("summary", title), text_table(("path", "reason"), rows), rest))
    else:
        parts.append(tag("p", "No unreadable image was met.", class_="muted"))
    return join(parts)


def _settings(files: RunFiles) -> Html:
    info = {key: value for key, value in files.info.items() if key not in ("command", "reference")}
    parts = [settings_table(info) if info else None]
    parts += [tag("p", note, class_="missing") for note in files.notes]
    parts.append(
        tag("details", tag("summary", "All settings (config.yaml)"), settings_table(flatten(files.config)), open="open")
    )
    return join(parts)


def _reproduce(files: RunFiles) -> Html:
    command = files.command
    if not command:
        return missing("The command isn't known, as run.json doesn't hold it; config.yaml above holds every setting.")
    commit = next((value for key, value in flatten(files.info).items() if key.rpartition(".")[2] == "commit"), None)
    from_commit = f" at commit {commit}" if commit else ""
    lead = f"With Smalti{from_commit} and the same data; one process on a CPU gives the same bits."
    return join((tag("p", lead, class_="lead"), tag("pre", command)))


def _value(result: Result | None, metric: str) -> float:
    return as_float(result.metrics.get(metric)) if result else math.nan
