"""Reads a page as a browser would, and checks what holds for every page."""

import re
from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "link", "img", "input", "br"}
ADDRESSES = ("src", "href", "xlink:href", "action", "data", "poster", "srcset")


class Page(HTMLParser):
    """Elements of a page; fails on one that is not closed."""

    def __init__(self, path: Path):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.data = ""
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.data = self.data or (data if dict(self.elements[-1][1]).get("type") == "application/json" else "")
        else:
            self.text += data

    def attributes(self, name: str) -> list[str]:
        return [value for _, attributes in self.elements for key, value in attributes.items() if key == name and value]


def check_page(path: Path) -> Page:
    """A page that asks no network, whose pictures have texts and whose anchors have sections."""
    page = Page(path)
    for name in ADDRESSES:
        assert all(value.startswith(("#", "data:")) for value in page.attributes(name)), name
    source = path.read_text(encoding="utf-8")
    assert not re.search(r"url\(\s*['\"]?(?!#)|@import|https?://(?!www\.w3\.org/2000/svg)", source)
    assert "default-src 'none'" in " ".join(page.attributes("content"))
    assert all(attributes.get("alt") for tag, attributes in page.elements if tag == "img")
    assert all(
        attributes.get("aria-label") for tag, attributes in page.elements if tag == "svg" and "role" in attributes
    )
    ids = page.attributes("id")
    assert {link[1:] for link in page.attributes("href") if link.startswith("#")} <= set(ids)
    assert len(ids) == len(set(ids))
    return page
