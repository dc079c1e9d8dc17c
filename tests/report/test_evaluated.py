"""Charts of protocols, merged over arms; a page draws those of protocols that it has never heard of."""

import dataclasses

import numpy as np
import pytest

from htmlpage import check_page
from smalti.charts import Line, LineChart, floats
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.evaluate import evaluate
from smalti.evaluation.protocol import _REGISTRY, Scores, register_protocol
from smalti.evaluation.protocols.keep_curve import accuracy_charts, speed_charts
from smalti.evaluation.result import Details, Result
from smalti.report.details import detail_sections
from smalti.report.evaluated import Evaluated, chart_sections
from smalti.report.evaluation import save_evaluation, write_evaluation
from smalti.report.parts import Figure


def result_with(*charts: LineChart) -> Result:
    details = Details((), (), {}, charts={chart.title: chart for chart in charts})
    return Result("p", "x", "d", {"score": 0.5}, {}, {}, {}, details)


def figures(arms: dict[str, list[Result]]) -> list[Figure]:
    return [figure for of_section in chart_sections([Evaluated("d", "p", arms)]).values() for figure in of_section]


def rising(**changes) -> LineChart:
    return LineChart("rising", "It rises.", (Line((1.0, 2.0)),), **changes)


def test_arms_share_a_chart_and_the_baseline_is_grey():
    (figure,) = figures({"ours": [result_with(rising())], "untrained": [result_with(rising())]})
    assert [(line.name, line.is_baseline) for line in figure.chart.lines] == [("ours", False), ("untrained", True)]
    assert figure.explanation == "It rises." and figure.title == "rising (p on d)"


def test_lines_are_means_over_seeds():
    high = dataclasses.replace(rising(), lines=(Line((3.0, 6.0)),))
    (figure,) = figures({"ours": [result_with(rising()), result_with(high)]})
    assert figure.chart.lines[0].y == (2.0, 4.0)


def test_a_chart_in_which_nothing_changes_is_left_out():
    flat = LineChart("flat", "It is flat.", (Line((1.0, 1.0)),))
    assert [figure.title for figure in figures({"ours": [result_with(flat, rising())]})] == ["rising (p on d)"]


def test_what_is_true_is_drawn_once_and_controls_are_those_of_the_first_arm():
    lines = (
        Line((0.0, 1.0), name="scored", role="truth"),
        Line((1.0, 0.0)),
        Line((0.5, 0.4), name="r", role="control"),
    )
    charts = [result_with(LineChart("t", "e", lines))]
    (figure,) = figures({"a": charts, "b": charts})
    assert [line.name for line in figure.chart.lines] == ["scored", "a", "b", "a: r"]


def keep_result(order: str, ranking: float | None = 0.0) -> Result:
    curve = {"rate": [0.0, 0.5, 0.9], "top1": [0.9, 0.7, 0.2], "low": [0.8, 0.6, 0.1], "high": [0.95, 0.8, 0.3]}
    orders = [order, "random", "fixed_random", "collapse_static"]
    settings = {
        "keep_curve": dict.fromkeys(orders, curve),
        "speed": {"rate": [0.0, 0.5, 0.9], "image_s": [0.1, 0.05, 0.02]},
        "ranking_s": {**dict.fromkeys(orders, 0.0), order: ranking},
        "speed_note": "seconds an image",
    }
    charts = accuracy_charts(settings["keep_curve"]) | speed_charts(settings)
    details = Details((), (), {}, charts=charts)
    return Result("keep-curve", "x", "d", {"mean_top1": 0.6}, {}, settings, {}, details)


def test_keep_curves_have_their_controls_in_every_figure(page_of):
    arms = {"c": [keep_result("collapse", None)], "h": [keep_result("halton")], "untrained": [keep_result("halton")]}
    page = page_of(detail_sections([Evaluated("d", "keep-curve", arms)], with_tokens=False))
    labels = page.attributes("aria-label")
    assert [label for label in labels if "keep-curve" in label] == [
        "Encoders compared (keep-curve on d)",
        "c: Accuracy by order of the patches (keep-curve on d)",
        "h: Accuracy by order of the patches (keep-curve on d)",
        "c: Accuracy against images per second (keep-curve on d)",
        "h: Accuracy against images per second (keep-curve on d)",
    ]
    assert page.text.count("fixed_random") >= 3 and "not known, so left out: collapse" in page.text
    assert "Patches dropped" in page.text and "untrained: halton" in page.text
    both = figures({"c": [keep_result("collapse")], "h": [keep_result("halton")], "untrained": [keep_result("halton")]})
    together = next(figure for figure in both if figure.title == "Encoders compared by time (p on d)")
    assert [line.name for line in together.chart.lines] == ["c: collapse", "h: halton", "untrained: halton"]
    alone = figures({"c": [keep_result("collapse")], "untrained": [keep_result("halton")]})
    assert (
        next(figure.title for figure in alone) == "c: Accuracy by order of the patches (p on d)"
    )  # one arm has nothing to compare


@pytest.fixture
def third_party():
    """A protocol of another package, with a chart under a heading of its own."""

    @register_protocol("sharpness", need="labels", by_default=False)
    def sharpness(features, config):
        """How sharp the features are."""
        line = Line(floats(np.linspace(0, 1, 5)), name="a$b$ <b>")
        chart = LineChart("sharpness by depth", "Sharper is better.", (line,), "Sharpness & <more>", x_label="depth")
        return Scores({"sharpness": 0.7}, {}, {}, charts={"depth": chart})

    yield
    _REGISTRY.pop("sharpness", None)


def test_the_chart_of_an_unknown_protocol_is_shown_also_when_the_protocol_is_gone(
    third_party, encoder, class_folders, tmp_path
):
    config = EvalConfig(protocols=("sharpness",), image_size=64)
    results = evaluate(encoder, "x", str(class_folders), config)
    save_evaluation(tmp_path / "out", results)
    _REGISTRY.pop("sharpness")
    page = check_page(write_evaluation(tmp_path / "out"))
    for words in ("Sharpness & <more>", "Sharper is better.", "a$b$ <b>", "sharpness by depth"):
        assert words in page.text, words
    assert "charts-sharpness-more" in page.attributes("id")
