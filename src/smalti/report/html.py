"""Common markup of all pages: elements, tables, and the frame of a self-contained page."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from importlib.metadata import version
from typing import Any

SIZED = "sized"
_PX_PER_POINT = (1.3, 1.45)  # text of 7 points is at least 9 pixels high
_LOGO = (
    '<svg viewBox="0 0 8 8" aria-hidden="true"><path fill="#b9472a" d="M0 0h2.4v2.4H0z"/>'
    '<path fill="#e8a33d" d="M2.8 0h2.4v2.4H2.8z"/><path fill="#2a6f97" d="M5.6 0H8v2.4H5.6zM0 2.8h2.4v2.4H0z"/>'
    '<path fill="#7fb069" d="M2.8 2.8h2.4v2.4H2.8z"/><path fill="#b9472a" d="M5.6 2.8H8v2.4H5.6z"/>'
    '<path fill="#e8a33d" d="M0 5.6h2.4V8H0z"/><path fill="#13496b" d="M2.8 5.6h2.4V8H2.8z"/>'
    '<path fill="#7fb069" d="M5.6 5.6H8V8H5.6z"/></svg>'
)


class Html(str):
    """Text that is markup already; every other text is escaped by :func:`tag`."""


def tag(name: str, /, *content: Any, **attributes: Any) -> Html:
    """An element; content and attributes are escaped unless they are :class:`Html`, None is left out.

    Example:
        >>> tag("p", "a < b", class_="lead")
        '<p class="lead">a &lt; b</p>'
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inside = join(content)
    return Html(f"<{name}{written}>" if name in ("img", "meta", "link") else f"<{name}{written}>{inside}</{name}>")


def join(content: Iterable[Any]) -> Html:
    """Pieces one after the other, escaped where they aren't :class:`Html`."""
    return Html("".join(p if isinstance(p, Html) else escape(str(p)) for p in content if p is not None))


def whole_page(
    title: str,
    subtitle: str,
    verdict: Html,
    sections: Mapping[str, tuple[str, Html | None]],
    *,
    facts: Html | None = None,
    script: str | None = None,
) -> str:
    """A page that opens offline; its policy forbids the browser to load anything.

    Args:
        title: the name of what the page is about.
        subtitle: one line below it.
        verdict: what is said first, from :func:`verdict_box`.
        sections: anchor -> heading and content, in order; those without content are left out.
        facts: a row of :func:`fact_boxes`.
        script: JavaScript of the page's own.
    """
    present = {anchor: section for anchor, section in sections.items() if section[1] is not None}
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    icon = f"data:image/svg+xml,{_LOGO.replace('<svg', '<svg xmlns=%22http://www.w3.org/2000/svg%22')}"
    icon = icon.replace("#", "%23").replace('"', "'").replace("<", "%3C").replace(">", "%3E").replace("%22", "'")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{title} · Smalti"),
        tag("link", rel="icon", href=icon),
        tag("style", Html((resources.files("smalti.report") / "page.css").read_text(encoding="utf-8"))),
    )
    name = tag("div", tag("h1", title), tag("div", subtitle, class_="muted"))
    body = tag(
        "body",
        tag("header", tag("div", Html(_LOGO), name, class_="inner")),
        tag("nav", tag("div", *(tag("a", t, href=f"#{n}") for n, (t, _) in present.items()), class_="inner")),
        tag(
            "main",
            verdict,
            facts,
            *(tag("section", tag("h2", t), content, id=n) for n, (t, content) in present.items()),
        ),
        tag("footer", f"Smalti {version('smalti')} · this page holds everything it shows and asks no network."),
        tag("div", class_="tip", hidden="hidden") if script else None,
        tag("script", Html(script)) if script else None,
    )
    return "<!doctype html>\n" + tag("html", head, body, lang="en") + "\n"


def verdict_box(kind: str, sentences: Sequence[str], caution: str | None) -> Html:
    """What is said first: ``better``, ``same``, ``worse`` or ``unknown``, a paragraph a sentence, and small print."""
    small = tag("p", caution, class_="small muted") if caution else None
    return tag("section", *(tag("p", one) for one in sentences), small, id="verdict", class_=f"verdict {kind}")


def fact_boxes(facts: Iterable[tuple[str, str]]) -> Html:
    """Numbers and what they are, side by side."""
    cells = (tag("div", tag("b", value), tag("span", label), class_="fact") for value, label in facts)
    return tag("div", *cells, class_="facts")


def chart_figure(title: str, meaning: str, svg: str, kind: str | None = None) -> Html:
    """An SVG with its title and, where one is needed, a sentence; of its own size, if its kind is ``sized``."""
    caption = tag("figcaption", meaning) if meaning else None
    width = re.search(r'viewBox="0 0 ([\d.]+)', svg)
    style = None
    if kind == SIZED and width:
        least, most = (float(width[1]) * scale for scale in _PX_PER_POINT)
        style = f"min-width:min(100%, {least:.0f}px);max-width:{most:.0f}px"
    return tag("figure", tag("h3", title), Html(svg), caption, class_=kind, style=style)


def text_table(columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> Html:
    """A table of plain text; cells that a row lacks stay empty."""
    head = tag("thead", tag("tr", *(tag("th", column) for column in columns)))
    body = (tag("tr", *(tag("td", row.get(column, ""), class_="path") for column in columns)) for row in rows)
    return tag("div", tag("table", head, tag("tbody", *body)), class_="scroll")


def settings_table(values: Mapping[str, Any]) -> Html:
    """Names and values, a row each."""
    rows = (tag("tr", tag("td", tag("code", key)), tag("td", plain(value))) for key, value in values.items())
    return tag("div", tag("table", tag("tbody", *rows), class_="pairs"), class_="scroll")


def plain(value: Any) -> str:
    """A value of a setting as people write it."""
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "–"
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(one)}" for key, one in value.items()) or "–"
    return "–" if value is None else str(value)


def missing(text: str) -> Html:
    """A sentence about what isn't there."""
    return tag("p", text, class_="missing")


def as_float(value: Any) -> float:
    """A number, or NaN for what is none."""
    return float(value) if isinstance(value, (int, float)) else math.nan


def decimals(value: float) -> str:
    """Three decimals, or one for large numbers; a dash for what isn't finite."""
    if not math.isfinite(value):
        return "–"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as far as they matter."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
