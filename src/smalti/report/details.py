"""Details of evaluations, side by side for every arm: classes, confusion, predictions, patches.

An arm is whatever is compared: methods, checkpoints, or an encoder and its baseline. Everything is drawn from the
details that results carry; what isn't there is left out, and where a whole part is missing the page says so.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smalti.evaluation.result import BASELINE_LABELS, Details, Result
from smalti.evaluation.shown import Shown
from smalti.functional.colours import palette
from smalti.functional.components import align_components
from smalti.report.figures import (
    FEW_CLASSES,
    SweepPoint,
    boxes_picture,
    confusion_chart,
    hypnogram_chart,
    image_uri,
    line_chart,
    overlay,
    pca_maps,
    quantise,
    similarity_picture,
    sweep_chart,
    telling_patch,
)
from smalti.report.html import Html, as_float, chart_figure, decimals, join, missing, tag

BASELINES = tuple(BASELINE_LABELS.values())
"""Names of arms that are drawn in grey: a baseline, not a competitor."""
KEEP_CURVE = "keep-curve"
"""Protocol whose scores are plotted against the fraction of dropped patches."""
_CONTROLS = ("random", "fixed_random", "collapse_static")
STAGING = "sleep-staging"
"""Protocol whose predictions are hypnograms."""
_MAX_CLASSES = 500
_OPEN_CLASSES = 24
_LOSS = "loss"
_MANY = 48
"""Points of a curve from which on they are a line."""
_BLOCK_PX = 118
"""Least width of a picture on the page, in pixels."""
_ASPECTS = (0.5, 2.0)
_OPEN_IMAGES = 4


@dataclass(frozen=True)
class Evaluated:
    """One protocol on one data set."""

    data: str
    protocol: str
    arms: Mapping[str, Sequence[Result]]
    """Arm -> its results, one a seed. Means are over seeds, pictures are of the first."""

    @property
    def name(self) -> str:
        """For titles."""
        return f"{self.protocol} on {self.data}"

    @property
    def details(self) -> dict[str, Details]:
        """Arm -> details of the first seed that has any."""
        found = {arm: next((r.details for r in results if r.details), None) for arm, results in self.arms.items()}
        return {arm: details for arm, details in found.items() if details is not None}


@dataclass(frozen=True)
class _Picture:
    """A test image, with what is known of it."""

    name: str
    pixels: np.ndarray
    truth: np.ndarray | None
    aspect: float


def detail_sections(judged: Sequence[Evaluated], *, tokens: bool = True) -> dict[str, tuple[str, Html | None]]:
    """Sections of a page: anchor -> heading and content; no content where there is nothing to show.

    Args:
        judged: in the order in which they are shown; the same arms in the same order.
        tokens: also PCA maps of the patches and similarities among them.
    """
    sections: dict[str, tuple[str, Html | None]] = {
        "labels": ("Fewer labels", _label_sweeps(judged)),
        "keep": ("Patches dropped", _keep_curves(judged)),
        "hypnograms": ("Hypnograms", _hypnograms(judged)),
        "classes": ("Per class", _some(class_bars(one) for one in judged)),
        "pictures": ("Pictures", _sheets(judged)),
        "predictions": ("Predictions", _some(part for part in (_predictions(judged), _objects(judged)))),
        "confusion": ("Confusion", _confusion(judged)),
        "layers": ("Curves of the evaluations", _curves(judged)),
    }
    if tokens:
        sections |= {"maps": ("Feature maps", _maps(judged)), "similarity": ("Similarity", _similarity(judged))}
    return sections


def class_bars(judged: Evaluated) -> Html | None:
    """Every metric that is known class by class as bars, mean over seeds; the best class of all arms first."""
    parts = []
    arms = judged.arms
    for metric in dict.fromkeys(metric for results in arms.values() for r in results for metric in r.per_class):
        values = {arm: _class_means(results, metric) for arm, results in arms.items()}
        values = {arm: of_class for arm, of_class in values.items() if of_class}
        names = list(dict.fromkeys(name for of_class in values.values() for name in of_class))
        table = np.array([[values[arm].get(name, np.nan) for arm in values] for name in names])
        known = np.isfinite(table)
        top = max(float(table[known].max(initial=0)), 1e-9)
        mean = np.where(known, table, 0).sum(1) / known.sum(1).clip(1)
        order = sorted(range(len(names)), key=lambda i: (not known[i].any(), -mean[i]))
        bars = [
            tag(
                "div",
                tag("span", names[i], class_="name", title=names[i]),
                tag("span", *(_bar(list(arms).index(arm), arm, table[i, n], top) for n, arm in enumerate(values))),
                class_="bar",
            )
            for i in order[:_MAX_CLASSES]
        ]
        summary = tag("summary", f"{judged.name}: {metric} of each class ({len(names)})")
        key = _key(values, list(arms))
        is_open = "open" if len(names) <= _OPEN_CLASSES else None
        parts.append(tag("details", summary, key, tag("div", *bars, class_="bars"), open=is_open))
    return join(parts) if parts else None


def _class_means(results: Sequence[Result], metric: str) -> dict[str, float]:
    """Mean over seeds; NaN if no seed has a value."""
    found: dict[str, list[float]] = {}
    for result in results:
        for name, value in result.per_class.get(metric, {}).items():
            found.setdefault(name, []).append(as_float(value))
    known = {name: [v for v in values if np.isfinite(v)] for name, values in found.items()}
    return {name: float(np.mean(values)) if values else np.nan for name, values in known.items()}


def _bar(number: int, arm: str, value: float, top: float) -> Html:
    width = max(value, 0) / top * 100 if np.isfinite(value) else 0
    bar = tag("i", style=f"width:{width:.1f}%;background:{_colour(number, arm)}")
    return tag("span", tag("span", bar), tag("span", decimals(value), class_="value"), class_="one", title=arm)


def _colour(number: int, arm: str) -> str:
    return "var(--none)" if arm in BASELINES else f"var(--c{number % 6 + 1})"


def _key(shown: Mapping[str, object], arms: Sequence[str]) -> Html:
    entries = (
        tag("span", tag("i", style=f"background:{_colour(number, arm)}"), arm)
        for number, arm in enumerate(arms)
        if arm in shown
    )
    return tag("p", *entries, class_="key muted")


def _sheets(judged: Sequence[Evaluated]) -> Html | None:
    """Pictures that protocols made themselves, as they are."""
    parts = []
    for one in judged:
        for arm, details in one.details.items():
            head = one.name if len(one.details) == 1 else f"{one.name}, {arm}"
            figures = [
                tag("figure", tag("img", src=image_uri(picture, ".png"), alt=caption), tag("figcaption", caption))
                for caption, picture in details.pictures.items()
            ]
            parts += [tag("h3", head), *figures] if figures else []
    return join(parts) if parts else None


def _predictions(judged: Sequence[Evaluated]) -> Html | None:
    parts = []
    for one in judged:
        details = {arm: found for arm, found in one.details.items() if found.predictions}
        if not details or one.protocol == STAGING:
            continue
        drawn = {arm: {d.images[place]: p for place, p in d.predictions.items()} for arm, d in details.items()}
        classes = next(iter(details.values())).classes
        pictures = _pictures([one])
        names = dict.fromkeys(name for of_arm in drawn.values() for name in of_arm)
        blocks = []
        for name in names:
            guesses = {arm: of_arm[name] for arm, of_arm in drawn.items() if name in of_arm}
            picture = pictures.get(name) or _Picture(name, np.full((224, 224, 3), 128, np.uint8), None, 1.0)
            cells = [("image", image_uri(picture.pixels), f"{name}")] if name in pictures else []
            if picture.truth is not None:
                uri = image_uri(overlay(picture.pixels, picture.truth))
                cells.append(("truth", uri, f"true classes of {name}"))
            cells += [
                (arm, image_uri(overlay(picture.pixels, guess)), f"classes that {arm} predicts for {name}")
                for arm, guess in guesses.items()
            ]
            maps = [picture.truth, *guesses.values()] if picture.truth is not None else list(guesses.values())
            blocks.append(picture_block(name, cells, picture.aspect, _legend(maps, classes)))
        hidden = "" if pictures else " The images themselves were not kept with these results."
        lead = tag("p", f"Classes of pixels on evaluated images, by seed {_seed(one)}.{hidden}", class_="lead")
        parts.append(join((tag("h3", one.name), lead, picture_blocks(blocks))))
    return join(parts) if parts else None


def _label_sweeps(judged: Sequence[Evaluated]) -> Html | None:
    """Kappa against the fraction of training subjects, with intervals over the evaluated recordings."""
    parts = []
    for one in judged:
        lines: dict[str, list[SweepPoint]] = {}
        for arm, results in one.arms.items():
            sweep = results[0].settings.get("label_sweep") if results else None
            if one.protocol == STAGING and isinstance(sweep, Sequence) and len(sweep) > 1:
                values = ((as_float(point.get(key)) for key in ("share", "mean", "low", "high")) for point in sweep)
                lines[arm] = [SweepPoint(*point) for point in values]
        if lines:
            svg = sweep_chart(f"{one.name}: kappa against the share of labelled subjects", lines, muted=BASELINES)
            meaning = (
                "against the share of the training subjects, on a logarithmic scale; bands: 95 % over the test "
                "recordings. The grey line starts from the baseline: of an untrained encoder, training from scratch."
            )
            parts.append(chart_figure(f"{one.name}: kappa with fewer labels", meaning, svg, "wide"))
    return tag("div", *parts, class_="charts") if parts else None


def _keep_curves(judged: Sequence[Evaluated]) -> Html | None:
    """Accuracy against the fraction of dropped patches (also for image-independent orders), and against speed."""
    parts = []
    for one in judged:
        known = {
            arm: results[0].settings
            for arm, results in one.arms.items()
            if one.protocol == KEEP_CURVE and results and results[0].settings.get("keep_curve")
        }
        trained = [arm for arm in known if arm not in BASELINES]
        charts = []
        if len(trained) > 1:
            lines = {f"{arm}: {known[arm]['order']}": _keep_line(known[arm], known[arm]["order"]) for arm in known}
            first = known[trained[0]]
            lines |= {
                f"{trained[0]}: {name}": _keep_line(first, name)
                for name in _CONTROLS
                if name in first["keep_curve"] and name != first["order"]
            }
            svg = sweep_chart(f"{one.name}: arms", lines, axis="rates")
            meaning = "top-1 of each arm by its own order, and of the first by orders that are one for all images"
            charts.append(chart_figure(f"{one.name}: arms", meaning, svg, "wide"))
        for arm in trained:
            lines = {name: _keep_line(known[arm], name) for name in known[arm]["keep_curve"]}
            lines |= {name: _keep_line(known[name], known[name]["order"]) for name in BASELINES if name in known}
            title = f"{one.name}: {arm}"
            svg = sweep_chart(f"{title}, by order", lines, muted=BASELINES, axis="rates")
            meaning = (
                "top-1 against the share of patches that is dropped, for each order of what is kept; bands: 95 % over "
                "the evaluated images. random, fixed_random and collapse_static look at no image: what an order says "
                "of the image must lie above them."
            )
            charts.append(chart_figure(title, meaning, svg, "wide"))
            if speed := _speed_lines(known[arm]):
                unknown = [name for name, cost in known[arm]["ranking_s"].items() if cost is None]
                meaning = (
                    f"top-1 against images a second ({known[arm]['speed_note']}), the cost of ranking an image's "
                    "patches included"
                ) + (f"; not known, so left out: {', '.join(unknown)}" if unknown else "")
                svg = sweep_chart(f"{title}: accuracy against images a second", speed, axis="speed")
                charts.append(chart_figure(f"{title}: speed", meaning, svg, "wide"))
        parts += charts
    return tag("div", *parts, class_="charts") if parts else None


def _keep_line(settings: Mapping[str, Any], order: str) -> list[SweepPoint]:
    curve = settings["keep_curve"][order]
    columns = ([as_float(value) for value in curve[key]] for key in ("rate", "top1", "low", "high"))
    return [SweepPoint(*point) for point in zip(*columns, strict=True)]


def _speed_lines(settings: Mapping[str, Any]) -> dict[str, list[SweepPoint]]:
    """Accuracy against images a second, for the orders of which it is known what ranking costs."""
    if not settings.get("speed"):
        return {}
    lines = {}
    for name, cost in settings["ranking_s"].items():
        if cost is not None:
            points = zip(_keep_line(settings, name), settings["speed"]["image_s"], strict=True)
            lines[name] = [point._replace(share=1 / (seconds + cost)) for point, seconds in points]
    return lines


def _hypnograms(judged: Sequence[Evaluated]) -> Html | None:
    """Scored and predicted stages of a few test recordings, one below the other."""
    parts = []
    for one in judged:
        details = {arm: found for arm, found in one.details.items() if found.predictions}
        if not details or one.protocol != STAGING:
            continue
        first = next(iter(details.values()))
        for place in sorted(first.predictions):
            name = first.images[place]
            lines = {"scored": first.predictions[place][0]}
            lines |= {arm: d.predictions[place][1] for arm, d in details.items() if place in d.predictions}
            svg = hypnogram_chart(f"Stages of {name}, {one.name}", lines, first.classes, muted=BASELINES)
            parts.append(chart_figure(name, f"{one.name}; against the number of the window", svg, "wide"))
    return tag("div", *parts, class_="charts") if parts else None


def _objects(judged: Sequence[Evaluated]) -> Html | None:
    """Frames around true objects and around those that each arm found."""
    parts = []
    for one in judged:
        details = {arm: found for arm, found in one.details.items() if found.found}
        pictures = _pictures([one])
        if not details or not pictures:
            continue
        classes = next(iter(details.values())).classes
        by_name = {arm: {d.images[place]: both for place, both in d.found.items()} for arm, d in details.items()}
        blocks = []
        for name in dict.fromkeys(name for of_arm in by_name.values() for name in of_arm if name in pictures):
            picture = pictures[name]
            drawn = {arm: of_arm[name] for arm, of_arm in by_name.items() if name in of_arm}
            true = next(iter(drawn.values()))[0]
            rows = {"truth": true, **{arm: found for arm, (_, found) in drawn.items()}}
            cells = [
                (arm, image_uri(boxes_picture(picture.pixels, objects.boxes, objects.labels)), f"{arm}: {name}")
                for arm, objects in rows.items()
            ]
            labels = [objects.labels + 1 for objects in rows.values()]
            blocks.append(picture_block(name, cells, picture.aspect, _legend(labels, ("", *classes))))
        lead = tag(
            "p",
            f"Objects on evaluated images by seed {_seed(one)}: true ones, crowds among them, and those found with a "
            "score of 0.3 or more.",
            class_="lead",
        )
        parts.append(join((tag("h3", one.name), lead, picture_blocks(blocks))))
    return join(parts) if parts else None


def _seed(judged: Evaluated) -> str:
    seeds = [r.settings.get("seed") for results in judged.arms.values() for r in results[:1]]
    return str(next((seed for seed in seeds if seed is not None), 0))


def _legend(maps: Sequence[np.ndarray], classes: Sequence[str]) -> Html:
    """Names of the classes that a row shows, the most frequent first."""
    counts: dict[int, float] = {}
    for one in maps:
        values, numbers = np.unique(one[one >= 0], return_counts=True)
        for value, number in zip(values.tolist(), numbers.tolist(), strict=True):
            counts[value] = counts.get(value, 0) + number / one.size
    colours = palette(max(counts, default=0) + 1)
    names = (
        tag(
            "span",
            tag("i", style="background:rgb({},{},{})".format(*colours[value])),
            classes[value] if value < len(classes) else str(value),
        )
        for value in sorted(counts, key=lambda value: -counts[value])
    )
    return tag("span", *names, class_="legend")


def _confusion(judged: Sequence[Evaluated]) -> Html | None:
    parts = []
    for one in judged:
        charts = []
        for arm, results in one.arms.items():
            found = [r.details for r in results if r.details is not None and r.details.confusion is not None]
            if not found:
                continue
            same = [d for d in found if d.confusion is not None and d.confusion.shape == found[0].confusion.shape]  # type: ignore[union-attr]
            matrix = np.sum([d.confusion for d in same if d.confusion is not None], axis=0)
            svg = confusion_chart(f"Confusion of {arm}, {one.name}", matrix, found[0].classes)
            charts.append(chart_figure(arm, "", svg, "sized"))
        if charts:
            parts.append(join((tag("h3", one.name), tag("div", *charts, class_="matrices"))))
    if not parts:
        return None
    lead = (
        "Each row is a true class and sums to 100 %: blue is where it went, the diagonal is right. "
        "Counts of all seeds together; rows of classes that don't occur are empty. With more than "
        f"{FEW_CLASSES} classes the blue grows with the square root of the share."
    )
    return join((tag("p", lead, class_="lead"), *parts))


def _curves(judged: Sequence[Evaluated]) -> Html | None:
    charts = []
    for one in judged:
        for name in dict.fromkeys(name for details in one.details.values() for name in details.curves):
            lines = {}
            for arm, results in one.arms.items():
                curves = [list(r.details.curves[name]) for r in results if r.details and name in r.details.curves]
                curves = [curve for curve in curves if len(curve) == len(curves[0]) and curve]
                if curves:
                    mean = np.mean(np.array(curves, dtype=np.float64), axis=0)
                    lines[arm] = (list(map(float, range(1, len(mean) + 1))), mean.tolist())
            if not lines:
                continue
            is_loss = name.startswith(_LOSS)
            few = max(len(y) for _, y in lines.values()) <= _MANY and not is_loss
            title = f"{one.name}: {name.replace('_', ' ')} against the {'step' if is_loss else 'layer'}"
            meaning = "of what is fitted on the tokens; not a score" if is_loss else "the first block at the left"
            svg = line_chart(title, lines, points=few, smooth=is_loss, muted=BASELINES)
            charts.append(chart_figure(f"{one.name}: {name.replace('_', ' ')}", meaning, svg))
    return tag("div", *charts, class_="charts") if charts else None


def _maps(judged: Sequence[Evaluated]) -> Html | None:
    parts = []
    for data, of_arm in _token_groups(judged):
        first = next(iter(of_arm.values()))
        pictures = _pictures([one for one in judged if one.data == data])
        maps = {}
        for arm, (names, coordinates, shown) in of_arm.items():
            aligned = align_components(coordinates, shown.grid, first[1], first[2].grid)
            maps[arm] = dict(zip(names, pca_maps(aligned, shown.grid), strict=True))
        blocks = [
            picture_block(
                name,
                [
                    ("image", image_uri(pictures[name].pixels), name),
                    *((arm, image_uri(m[name], ".png"), f"PCA map of {name} by {arm}") for arm, m in maps.items()),
                ],
                pictures[name].aspect,
            )
            for name in first[0]
        ]
        sizes = "; ".join(
            f"{arm}: {s.grid[0]} × {s.grid[1]} patches of an image of {s.image_size} px"
            for arm, (_, _, s) in of_arm.items()
        )
        parts.append(join((tag("h3", data), tag("p", f"{sizes}.", class_="lead"), picture_blocks(blocks))))
    if parts:
        lead = (
            "The first three principal components of the patch tokens as red, green and blue, fitted for each arm over "
            "all images of a data set together: patches of like colour have like tokens, also across images. Colours "
            "are the arm's own directions, in the order and with the signs in which they correlate most with those of "
            "the first arm; they are never mixed."
        )
        parts.insert(0, tag("p", lead, class_="lead"))
        return join(parts)
    return missing("No patch tokens were kept with these results: evaluate anew for feature maps.") if judged else None


def _similarity(judged: Sequence[Evaluated]) -> Html | None:
    parts = []
    for data, of_arm in _token_groups(judged):
        names, reference, first = next(iter(of_arm.values()))
        pictures = _pictures([one for one in judged if one.data == data])
        blocks = []
        for number, name in enumerate(names):
            _, patch = telling_patch(quantise(reference[number : number + 1]), first.grid)
            down, across = divmod(patch, first.grid[1])
            cells = [("image", image_uri(pictures[name].pixels), name)]
            for arm, (_, coordinates, shown) in of_arm.items():
                row = int((down + 0.5) / first.grid[0] * shown.grid[0])
                column = int((across + 0.5) / first.grid[1] * shown.grid[1])
                query = row * shown.grid[1] + column
                heat = similarity_picture(pictures[name].pixels, coordinates[number], shown.grid, query)
                cells.append((arm, image_uri(heat), f"similarity of the patches of {name} to one, by {arm}"))
            blocks.append(picture_block(name, cells, pictures[name].aspect))
        num = reference.shape[-1]
        lead = tag(
            "p",
            "Cosine similarity of every patch to the framed one, ",
            tag("span", "0 ", tag("span", class_="ramp magma"), " 1", class_="nowrap"),
            f", of tokens less their mean over these images in their first {num} principal components. The framed "
            "patch is the same for all arms: the one from which the first arm tells most apart.",
            class_="lead",
        )
        parts.append(join((tag("h3", data), lead, picture_blocks(blocks))))
    return join(parts) if parts else None


def _token_groups(
    judged: Sequence[Evaluated],
) -> Iterator[tuple[str, dict[str, tuple[list[str], Tensor, Shown]]]]:
    """Data set -> arm -> names of the images that all arms have, their coordinates in that order, and the rest."""
    for data in dict.fromkeys(one.data for one in judged):
        found: dict[str, tuple[Details, Shown]] = {}
        for one in judged:
            for arm, details in one.details.items():
                if one.data == data and details.shown is not None:
                    found.setdefault(arm, (details, details.shown))
        if not found:
            continue
        names = {arm: [details.images[place] for place in shown.places] for arm, (details, shown) in found.items()}
        common = [name for name in next(iter(names.values())) if all(name in others for others in names.values())]
        if not common:
            continue
        groups = {}
        for arm, (_, shown) in found.items():
            rows = torch.tensor([names[arm].index(name) for name in common])
            groups[arm] = (common, shown.coordinates[rows].float(), shown)
        yield data, groups


def _pictures(judged: Sequence[Evaluated]) -> dict[str, _Picture]:
    """Image name -> the picture, from whichever arm has it."""
    found: dict[str, _Picture] = {}
    for one in judged:
        for details in one.details.values():
            shown = details.shown
            for number, place in enumerate(shown.places if shown else ()):
                assert shown is not None
                name, truth = details.images[place], shown.truths.get(place)
                known = found.get(name)
                if known is None or (known.truth is None and truth is not None):
                    found[name] = _Picture(name, shown.pictures[place], truth, shown.aspects[number])
    return found


def picture_block(name: str, cells: Sequence[tuple[str, str, str]], aspect: float, more: Html | None = None) -> Html:
    """Pictures of one image side by side, each with its heading."""
    return tag(
        "figure",
        *(tag("span", heading, class_="heading", title=heading) for heading, _, _ in cells),
        *(tag("img", src=uri, alt=alt, class_="pixels" if "image/png" in uri[:20] else None) for _, uri, alt in cells),
        tag("figcaption", name, title=name),
        more,
        class_="triple",
        style=f"--aspect:{min(max(aspect, _ASPECTS[0]), _ASPECTS[1]):.3f};--columns:{len(cells)}",
    )


def picture_blocks(blocks: Sequence[Html]) -> Html:
    columns = max((block.count("<img") for block in blocks), default=1)
    style = f"--block:{columns * _BLOCK_PX}px"
    first = tag("div", *blocks[:_OPEN_IMAGES], class_="maps", style=style)
    if len(blocks) <= _OPEN_IMAGES:
        return first
    rest = tag("div", *blocks[_OPEN_IMAGES:], class_="maps", style=style)
    return join((first, tag("details", tag("summary", f"{len(blocks) - _OPEN_IMAGES} more images"), rest)))


def _some(parts: Iterator[Html | None]) -> Html | None:
    there = [part for part in parts if part is not None]
    return join(there) if there else None
