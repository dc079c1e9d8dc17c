"""The files around the package agree: versions, dependencies, links of the README, YAML."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def names(requirements: list[str]) -> set[str]:
    """Of distributions, as they are compared."""
    return {re.split(r"[\[<>=!~; ]", text)[0].lower().replace("_", "-") for text in requirements}


def test_the_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]


def test_pre_commit_and_make_check_use_the_same_ruff() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    pins = {pin for repo in config["repos"] for hook in repo["hooks"] for pin in hook["additional_dependencies"]}
    assert len(pins) == 1
    assert pins <= set(PROJECT["optional-dependencies"]["dev"])


def test_what_the_package_imports_is_declared() -> None:
    declared = names(
        [*PROJECT["dependencies"], *(r for extra in PROJECT["optional-dependencies"].values() for r in extra)]
    )
    homes = packages_distributions()
    undeclared = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for module in {name.partition(".")[0] for name in modules} - {"smalti", "triton"} - sys.stdlib_module_names:
                if not declared & names(homes.get(module, [module])):  # triton comes with torch, where it exists
                    undeclared.add(module)
    assert not undeclared


def test_the_readme_has_absolute_links_to_files_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert links and all(
        link.startswith(("https://", "#")) for link in links
    )  # the page on PyPI has no files beside it
    source = re.escape(PROJECT["urls"]["Source"])
    web = rf"{source}/(?:blob|tree)/main/|{source.replace('github.com', 'raw.githubusercontent.com')}/main/"
    paths = [re.sub(web, "", link).partition("#")[0] for link in links if re.match(web, link)]
    assert len(paths) > 5
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_files_of_github_are_yaml(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


def test_the_commands_of_the_workflows_and_of_the_guide_exist() -> None:
    verbs = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    files = [*(ROOT / ".github" / "workflows").glob("*.yml"), ROOT / "CONTRIBUTING.md"]
    used = {
        verb
        for path in files
        for words in re.findall(r"(?:run: |`)(?:[A-Z]+=\d+ )?make ([a-z -]+)", path.read_text(encoding="utf-8"))
        for verb in words.split()
    }
    assert {"check", "test", "docs", "dist"} <= used <= verbs


def test_the_docker_build_gets_what_it_copies() -> None:
    docker = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    sources = {path for line in re.findall(r"^COPY (.+) \S+$", docker, re.M) for path in line.split()}
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] == "!"}
    assert sources == kept
    assert all((ROOT / path).exists() for path in sources)
    torch = re.findall(r'"(torch(?:vision)?>=[\d.]+)"', docker)
    assert len(torch) == 2 and set(torch) <= set(PROJECT["dependencies"])
