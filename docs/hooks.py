"""Hooks of the documentation site: generated API pages, folders in the navigation, links to files outside of docs/.

The API pages follow the package as it is: the public names first (``smalti.__all__``), then a section for each package.
"""

import ast
import importlib
import logging
import os
import posixpath
import re
from pathlib import Path
from typing import Any

log = logging.getLogger("mkdocs.hooks.smalti")  # a warning below "mkdocs" fails a strict build

ROOT = Path(__file__).resolve().parents[1]
DOCS, PACKAGE = ROOT / "docs", ROOT / "src" / "smalti"
SHOWN = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
"""Pages of the site to the files at the top of the repository that they show."""
FIRST = ("load", "train", "evaluate", "compare", "embed")
"""Public names in the order in which they are needed; the others follow, functions before classes."""
_LINK = re.compile(r"(?<!!)(\[[^\]]*\]\()([^)\s]+)(\))")
_CODE = re.compile(r"(^ *```.*?^ *```|`[^`\n]+`(?!\]\())", re.M | re.S)


def public_names() -> list[tuple[str, str]]:
    """Each public name of ``smalti`` that is defined in the package, with the place where it is."""
    package = importlib.import_module("smalti")
    values = {name: getattr(package, name) for name in package.__all__}
    known = {name: value for name, value in values.items() if hasattr(value, "__qualname__")}
    others = sorted(known.keys() - set(FIRST), key=lambda name: (isinstance(known[name], type), name))
    names = [*(name for name in FIRST if name in known), *others]
    return [(name, f"{known[name].__module__}.{known[name].__qualname__}") for name in names]


def packages() -> list[Path]:
    """All packages but the command line, the top one first."""
    found = sorted(path.parent for path in PACKAGE.rglob("__init__.py"))
    return [path for path in found if path.relative_to(PACKAGE).parts[:1] != ("cli",)]


def dotted(path: Path) -> str:
    """A package or a module as it is imported."""
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


def docstring(file: Path) -> str:
    """Of a module, without roles."""
    return re.sub(r":\w+:(?=`)", "", ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "")


def api() -> tuple[dict[str, str], list[Any]]:
    """The generated pages, path below docs/ to Markdown, and their navigation: a section for each package."""
    face = ["# Python API", "The names that `import smalti` gives. The sections beside this page have all modules.", ""]
    for name, place in public_names():
        options = f"heading: smalti.{name}, toc_label: {name}, skip_local_inventory: true"
        face += [f"::: {place}", f"    options: {{{options}}}", ""]
    pages, sections = {"api/index.md": "\n".join(face)}, ["api/index.md"]
    for package in packages():
        modules = sorted(path for path in package.glob("*.py") if not path.name.startswith("_"))
        if not modules:
            continue
        name = dotted(package)
        lines = [f"# {name}", "", docstring(package / "__init__.py"), "", "| module | |", "|---|---|"]
        section = [f"api/{name}.md"]
        for module in modules:
            path = f"{dotted(module)}.md"
            first = docstring(module).partition("\n\n")[0].replace("\n", " ").replace("|", "\\|")
            lines.append(f"| [{module.stem}]({path}) | {first} |")
            pages[f"api/{path}"] = f"::: {dotted(module)}\n    options: {{heading_level: 1}}\n"
            section.append({module.stem: f"api/{path}"})
        pages[f"api/{name}.md"] = "\n".join(lines)
        sections.append({name: section})
    return pages, sections


def folder_pages(folder: str) -> list[str]:
    """Pages of a folder of docs/, the one that introduces it first."""
    names = sorted(path.name for path in (DOCS / folder).glob("*.md"))
    names.sort(key=lambda name: name not in ("index.md", "README.md"))
    return [posixpath.join(folder, name) for name in names]


def expand(entries: list[Any], generated: list[Any]) -> list[Any]:
    """A navigation whose folders are their pages."""
    out: list[Any] = []
    for entry in entries:
        ((title, value),) = entry.items()
        if isinstance(value, list):
            value = expand(value, generated)
        elif value == "api/":
            value = generated
        elif value.endswith("/"):
            value = folder_pages(value)
        out.append({title: value})
    return out


def site_link(link: str, page: str, repository: str) -> str:
    """A link as the site needs it: files of the repository outside of docs/ are linked to where it is published.

    Args:
        link: as in the Markdown.
        page: path of the page below docs/.
        repository: its web address.
    """
    path, mark, anchor = link.partition("#")
    if not path or ":" in path or path.startswith("/"):
        return link
    source = ROOT / SHOWN[page] if page in SHOWN else DOCS / page
    target = Path(os.path.normpath(source.parent / path))
    shown = {ROOT / file: name for name, file in SHOWN.items()}
    if target in shown or (page in SHOWN and target.is_relative_to(DOCS)):
        inside = shown.get(target) or target.relative_to(DOCS).as_posix()
        return posixpath.relpath(inside, posixpath.dirname(page) or ".") + mark + anchor
    if target.is_relative_to(DOCS):
        return link  # the site checks it
    if not target.exists() or not target.is_relative_to(ROOT):
        log.warning("%s: there is no file %s in the repository", page, link)
        return link
    kind = "tree" if target.is_dir() else "blob"
    return f"{repository}/{kind}/main/{target.relative_to(ROOT).as_posix()}{mark}{anchor}"


def site_links(markdown: str, page: str, repository: str) -> str:
    """A page with all its links through :func:`site_link`, except in code."""
    parts = _CODE.split(markdown)
    for i in range(0, len(parts), 2):
        parts[i] = _LINK.sub(lambda m: m[1] + site_link(m[2], page, repository) + m[3], parts[i])
    return "".join(parts)


# what MkDocs calls


def on_config(config: Any) -> Any:
    """Fill in the folders of the navigation."""
    config.nav = expand(config.nav, api()[1])
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages and those of the repository's top."""
    from mkdocs.structure.files import File

    for path, text in api()[0].items():
        files.append(File.generated(config, path, content=text))
    for page, name in SHOWN.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Mend links that leave docs/."""
    return site_links(markdown, page.file.src_uri, config.extra["repository"])
