"""Any chart becomes SVG in the page's colours, with its names as text and legible at the page's width."""

import base64
import math
import re

import cv2
import numpy as np
import pytest

from smalti.charts import ForestChart, ForestRow, Line, LineChart, MatrixChart
from smalti.report.svg import draw


def lines(*ys: tuple[float, ...], names: str = "abcdefg", **changes) -> LineChart:
    return LineChart("x", "y", tuple(Line(y, name=name) for y, name in zip(ys, names, strict=False)), **changes)


def test_a_chart_takes_its_colours_from_the_page():
    drawn = (
        Line((1.0, math.nan, 3.0), (1.0, 2.0, 3.0), "a <b>"),
        Line((2.0, 1.0, 0.5), (1.0, 2.0, 1.0), "c", level=1.5),
    )
    svg = draw(LineChart('Loss "&" more', "y", drawn, marks=(2.0,)))
    assert svg.startswith('<svg role="img" aria-label="Loss &quot;&amp;&quot; more"')
    assert "currentColor" in svg and "var(--c1)" in svg and "var(--c2)" in svg
    assert "a &lt;b&gt;" in svg and "http" not in svg and "nan" not in svg.lower()
    colours = set(re.findall(r"#[0-9a-f]{6}\b", svg))
    assert not colours


def test_names_with_dollars_are_no_mathematics():
    assert ">a$b$<" in draw(LineChart("x", "y", (Line((1.0, 2.0), name="a$b$"), Line((1.0, 2.0), name="c"))))


def test_more_lines_than_colours_are_dashed():
    assert "stroke-dasharray" in draw(lines(*[(n, n, n + 1.0) for n in range(7)]))
    assert "stroke-dasharray" not in draw(lines(*[(n, n, n + 1.0) for n in range(6)]))


def test_a_baseline_is_grey_in_a_chart_and_layers_are_whole_numbers():
    svg = draw(LineChart("x", "y", (Line((0.0, 1.0), name="a"), Line((1.0, 0.0), name="b", is_baseline=True))))
    assert "var(--none)" in svg and "var(--c1)" in svg and "var(--c2)" not in svg
    assert "1.25" not in svg


def test_fractions_are_ticks_in_percent_and_intervals_are_bands():
    line = Line((0.5, 0.6, 0.7), (0.05, 0.2, 1.0), "a", low=(0.4, 0.5, 0.6), high=(0.6, 0.7, 0.8))
    svg = draw(LineChart("x", "y", (line,), x_axis="log fraction"))
    assert ">5 %<" in svg and ">20 %<" in svg and ">100 %<" in svg and "opacity: 0.15" in svg
    assert ">50 %<" in draw(LineChart("x", "y", (line,), x_axis="fraction", is_wide=True))
    svg = draw(LineChart("x", "y", (line,), x_axis="fraction"))  # narrow: labels must not overlap
    assert ">40 %<" in svg and ">50 %<" not in svg and ">100 %<" in svg
    short = draw(LineChart("x", "y", (Line((0.1, 0.2), (0.0, 0.4)),), x_axis="fraction"))
    assert ">10 %<" in short and ">40 %<" in short and ">60 %<" not in short
    svg = draw(LineChart("x", "y", (line,), x_axis="log"))
    assert ">50 %<" not in svg and ">0.2<" in svg and "mathdefault" not in svg


def test_named_levels_are_steps_in_a_panel_for_each_line():
    truth, guess = Line((0.0, math.nan, 2.0), name="scored", role="truth"), Line((0.0, 1.0, 2.0), name="ours")
    svg = draw(LineChart("Night", "y", (truth, guess), levels=("deep", "light", "awake"), x_label="window"))
    assert svg.count(">awake<") == 2 and ">scored<" in svg and ">ours<" in svg and ">window<" in svg
    assert "var(--c1)" in svg and "var(--c2)" not in svg  # what is true has the colour of text


def test_a_confusion_matrix_shows_fractions_of_each_row_and_leaves_empty_rows_empty():
    svg = draw(MatrixChart("Confusion", np.array([[3, 1], [0, 0]]), ("a <b>", "c")))
    assert ">75<" in svg and ">25<" in svg and "nan" not in svg.lower()
    assert "a &lt;b&gt;" in svg and "data:image/png;base64" in svg


def test_sixty_classes_stay_legible():
    names = tuple(f"class number {number}, a long name" for number in range(60))
    svg = draw(MatrixChart("Confusion", np.eye(60, dtype=np.int64), names))
    width = float(svg.split('viewBox="0 0 ')[1].split()[0])
    assert svg.count("…") == 120 and 7 * min(1.45, 1060 / width) >= 9  # text of 7 points on the page's 1060 pixels


def test_small_confusions_among_many_classes_are_seen():
    matrix = np.full((20, 20), 1) + 80 * np.eye(20, dtype=np.int64)
    data = draw(MatrixChart("x", matrix, ("y",) * 20)).split("data:image/png;base64,")[1].split('"')[0]
    pixels = cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_UNCHANGED)
    assert pixels[..., 3].min() == pytest.approx(0.1 * 255, abs=2)  # the root of one in a hundred


def test_a_forest_fills_the_marks_of_differences_that_exclude_zero():
    rows = (
        ForestRow("first", 0.5, 0.4, 0.6, (0.45, 0.55)),
        ForestRow("better", 0.7, 0.6, 0.8, (), 0.2, 0.1, 0.3),
        ForestRow("same", 0.5, float("nan"), float("nan"), (), 0.01, -0.1, 0.1),
    )
    svg = draw(ForestChart("Forest", rows, "first"))
    assert svg.count("var(--card)") >= 1 and "difference to first" in svg and "nan" not in svg.lower()
    assert draw(ForestChart("Forest", rows[:2], "first")).count("var(--card)") == 0


def test_a_line_may_run_backwards_except_over_steps():
    back = Line((0.9, 0.7, 0.2), (10.0, 5.0, 50.0))
    for x_axis, parts in (("log", 1), ("count", 2)):
        svg = draw(LineChart("x", "y", (back,), x_axis=x_axis))
        (drawn,) = re.findall(r'<path d="([^"]*)"[^>]*stroke: var\(--c1\)', svg)
        assert drawn.count("M") == parts
