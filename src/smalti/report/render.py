"""Renders pages from templates: each is one HTML file that opens offline and loads nothing."""

import json
import re
from functools import cache
from importlib import resources
from importlib.metadata import version
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from smalti.charts import Chart
from smalti.report import svg
from smalti.report.formats import decimals, duration, plain

_PX_PER_POINT = (1.3, 1.45)


def render(template: str, page: Any) -> str:
    """A page as text.

    Args:
        template: name of its template, such as ``run``.
        page: its data; templates read the attributes. All text is escaped.
    """
    return _environment().get_template(f"{template}.html.jinja").render(page=page, nav=[])


@cache
def _environment() -> Environment:
    """Templates with autoescape; a name that the data lack is an error."""
    environment = Environment(
        loader=PackageLoader("smalti.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.do"],
    )
    environment.filters |= {"draw": _draw, "json_data": _json_data, "plain": plain, "decimals": decimals}
    environment.filters |= {"duration": duration, "legible_width": _legible_width, "anchor": _anchor}
    environment.globals |= {"version": version("smalti"), "style": _asset("page.css"), "script": _asset("page.js")}
    return environment


def _asset(name: str) -> Markup:
    return Markup((resources.files("smalti.report") / name).read_text(encoding="utf-8"))


def _draw(chart: Chart) -> Markup:
    return Markup(svg.draw(chart))


def _anchor(heading: str) -> str:
    """Id of a section whose heading comes from elsewhere; differs from those that templates name."""
    return "charts-" + re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-")


def _legible_width(drawn: str) -> str:
    """Smallest and largest width of a chart as CSS: text of 7 points is at least 9 pixels high."""
    width = re.search(r'viewBox="0 0 ([\d.]+)', drawn)
    assert width is not None, "matplotlib writes a viewBox"
    least, most = (float(width[1]) * scale for scale in _PX_PER_POINT)
    return f"min-width:min(100%, {least:.0f}px);max-width:{most:.0f}px"


def _json_data(data: Any) -> Markup:
    """JSON for a script element; ``<`` is written as an escape, so that a file name can't end the element."""
    return Markup(json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"))
