"""Templates: all text is escaped, a missing name is an error, and no page knows a protocol or a method by name."""

import ast
import dataclasses
import re
from pathlib import Path

import jinja2
import pytest

import smalti.report
from htmlpage import Page
from smalti.charts import LineChart
from smalti.evaluation.protocol import protocol_names
from smalti.methods.base import method_names
from smalti.report.parts import (
    Fact,
    Figure,
    LegendEntry,
    Picture,
    PictureBlock,
    PictureGroup,
    Summary,
    Table,
    TableCell,
)
from smalti.report.render import _environment, render

EVIL = "<b>'\"&amp;</b>"
FOLDER = Path(smalti.report.__file__).parent
SOURCES = sorted([*FOLDER.glob("*.py"), *FOLDER.glob("templates/*.jinja")])
PLAIN_WORDS = {
    "position",
    "attention",
    "detection",
    "generation",
    "part",
    "prefix",
    "retrieval",
    "supervised",
    "segmenter",
}
"""Names that are also words of the language: only as text of their own do they name a protocol or a method."""
METRICS = {"miou", "kappa", "top1", "auc_q", "r2", "psnr", "ranking_s", "keep_curve", "label_sweep", "frechet_distance"}


def render_text(source: str, **data) -> str:
    imports = "{% import 'macros.html.jinja' as m with context %}"
    return _environment().from_string(imports + source).render(nav=[], **data)


PIXEL = "data:image/png;base64,AA=="
PARTS = {
    "verdict": Summary("same", (EVIL,), EVIL),
    "facts": [Fact(EVIL, EVIL)],
    "lead": EVIL,
    "missing": EVIL,
    "table": Table((EVIL, TableCell(EVIL, hint=EVIL)), ((EVIL, TableCell(EVIL, EVIL, EVIL, EVIL, EVIL)),)),
    "settings": {EVIL: [EVIL, {EVIL: EVIL}]},
    "legend": (LegendEntry(EVIL, EVIL),),
    "picture": Picture(EVIL, PIXEL, EVIL),
    "picture_block": PictureBlock(EVIL, (Picture(EVIL, PIXEL, EVIL),), 1.0, (LegendEntry("red", EVIL),)),
    "picture_group": PictureGroup(EVIL, (PictureBlock(EVIL, (Picture(EVIL, PIXEL, EVIL),), 1.0),) * 6, EVIL),
    "figure": Figure(EVIL, EVIL, LineChart(EVIL, EVIL, ())),
}


@pytest.mark.parametrize("name", PARTS)
def test_every_part_escapes_its_text(name: str, tmp_path: Path):
    (tmp_path / "part.html").write_text(render_text("{{ m." + name + "(data) }}", data=PARTS[name]))
    page = Page(tmp_path / "part.html")
    written = [*page.attributes("title"), *page.attributes("alt"), *page.attributes("style"), page.text]
    assert any(EVIL in text for text in written)
    bold = [attributes for tag, attributes in page.elements if tag == "b"]
    assert len(bold) == (1 if name == "facts" else 0)


def test_headings_of_sections_are_escaped_and_listed(tmp_path: Path):
    source = "{% call m.section('a', title) %}x{% endcall %}{{ nav[0][1] }}"
    assert "<b>" not in render_text(source, title=EVIL)


def test_a_name_that_the_data_lack_is_an_error():
    @dataclasses.dataclass
    class Empty:
        title: str = "x"

    with pytest.raises(jinja2.UndefinedError, match="summary"):
        render("evaluation", Empty())


def test_data_of_a_script_can_not_end_it():
    assert "</script>" not in render_text("{{ data | json_data }}", data={"name": "</script><b>"})


def names() -> set[str]:
    return {*protocol_names(), *method_names()}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_page_knows_a_protocol_a_method_or_a_metric(path: Path):
    text = path.read_text(encoding="utf-8")
    spelled = {form for name in names() - PLAIN_WORDS for form in (name, name.replace("-", "_"))} | METRICS
    assert not spelled & set(re.findall(r"[\w-]+", text)), path
    if path.suffix == ".py":
        texts = {node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)}
    else:
        texts = {match[1] for match in re.finditer(r"[\"']([^\"']*)[\"']", text)}
    assert not names() & {one for one in texts if isinstance(one, str)}, path


def test_the_words_of_that_test_are_names_of_protocols_and_methods():
    assert names() >= PLAIN_WORDS and {"knn", "mae", "keep-curve", "sleep-staging"} <= names()


def test_all_templates_are_pages_or_parts_of_pages():
    for template in _environment().list_templates():
        _environment().get_template(template)
