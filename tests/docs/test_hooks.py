"""Hooks of the documentation site: links, navigation and API pages follow the repository."""

import importlib.util
import logging
from pathlib import Path

import pytest

import smalti

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
assert SPEC and SPEC.loader
hooks = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(hooks)
WEB = "https://example.org/repo"


@pytest.mark.parametrize(
    ("link", "page", "wanted"),
    [
        ("training.md#seeds", "index.md", "training.md#seeds"),
        ("../pooling.md", "methods/mae.md", "../pooling.md"),
        ("#here", "index.md", "#here"),
        ("https://arxiv.org", "index.md", "https://arxiv.org"),
        ("../../pyproject.toml", "methods/mae.md", f"{WEB}/blob/main/pyproject.toml"),
        ("../README.md#methods", "index.md", f"{WEB}/blob/main/README.md#methods"),
        ("../recipes", "index.md", f"{WEB}/tree/main/recipes"),
        ("../CHANGELOG.md", "index.md", "changelog.md"),
        ("../../CHANGELOG.md#unreleased", "methods/mae.md", "../changelog.md#unreleased"),
        ("docs/data.md", "changelog.md", "data.md"),
        ("README.md", "contributing.md", f"{WEB}/blob/main/README.md"),
    ],
)
def test_links_that_leave_the_pages_lead_to_the_repository(link: str, page: str, wanted: str) -> None:
    assert hooks.site_links(f"See [it]({link}).", page, WEB) == f"See [it]({wanted})."


def test_links_in_code_stay() -> None:
    text = "`[a](../README.md)`\n\n```\n[a](../README.md)\n```\n"
    assert hooks.site_links(text, "index.md", WEB) == text


def test_a_link_to_a_missing_file_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "mkdocs.hooks.smalti"):
        hooks.site_links("[a](../nothing.py)", "index.md", WEB)
    assert "index.md: there is no file ../nothing.py in the repository" in caplog.text


def test_folders_in_the_navigation_are_their_pages() -> None:
    nav = hooks.expand([{"A": "index.md"}, {"B": [{"C": "evidence/"}]}, {"API": "api/"}], ["api/index.md"])
    assert nav[0] == {"A": "index.md"} and nav[2] == {"API": ["api/index.md"]}
    pages = nav[1]["B"][0]["C"]
    assert pages[0] == "evidence/README.md"
    assert sorted(pages) == sorted(f"evidence/{path.name}" for path in (ROOT / "docs" / "evidence").glob("*.md"))


def test_every_public_name_and_every_module_has_its_place() -> None:
    pages, sections = hooks.api()
    for name in ("load", "train", "evaluate", "compare", "embed", "Encoder"):
        assert name in smalti.__all__ and f"heading: smalti.{name}," in pages["api/index.md"]
    assert [name for name, _ in hooks.public_names()][:2] == ["load", "train"]
    assert len(hooks.public_names()) == len([name for name in smalti.__all__ if name not in ("__version__", "errors")])
    shown = {page.removeprefix("api/").removesuffix(".md") for page in pages}
    for path in (ROOT / "src" / "smalti").rglob("[!_]*.py"):
        module = ".".join(path.relative_to(ROOT / "src").with_suffix("").parts)
        assert module in shown or module.startswith("smalti.cli"), module
    named = [sections[0], *(part for section in sections[1:] for parts in section.values() for part in parts)]
    assert {part if isinstance(part, str) else next(iter(part.values())) for part in named} == set(pages)
