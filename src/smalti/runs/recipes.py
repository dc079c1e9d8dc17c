"""Catalogue of methods, recipes and measured results; imports nothing heavy."""

import re
from pathlib import Path

from smalti.config import unknown_key
from smalti.errors import ConfigError
from smalti.registry import listed

COLUMNS = ("method", "what", "paper", "file", "recipe", "reached")
NOT_MEASURED = "*not yet measured*"


def recipe_files() -> list[Path]:
    """Files of the recipes that come with Smalti, in the package or in the checkout."""
    return _shipped("*.yaml")


def plan_files() -> list[Path]:
    """Files of the plans of ``smalti compare`` that come with Smalti."""
    return _shipped("plans/*.yaml")


def find_recipe(name: str | Path) -> Path:
    """Path of a recipe, given its path or the name of one that comes with Smalti (with or without suffix).

    Raises:
        ConfigError: if it doesn't exist; the closest name is suggested.
    """
    return _find(name, recipe_files(), "recipe")


def find_plan(name: str | Path) -> Path:
    """Path of a plan, given as for :func:`find_recipe`.

    Raises:
        ConfigError: if it doesn't exist; the closest name is suggested.
    """
    return _find(name, plan_files(), "plan")


def _shipped(pattern: str) -> list[Path]:
    package = Path(__file__).parents[1]
    for folder in (package / "recipes", package.parents[1] / "recipes"):
        if folder.is_dir():
            return sorted(folder.glob(pattern))
    return []


def _find(name: str | Path, files: list[Path], kind: str) -> Path:
    path = Path(name).expanduser()
    shipped = {file.name: file for file in files}
    if path.is_file() or path.parent != Path():
        return path
    found = shipped.get(path.name) or shipped.get(f"{path.name}.yaml")
    if found is None:
        raise ConfigError(unknown_key(str(name), shipped, kind=kind))
    return found


def catalogue() -> list[tuple[str, ...]]:
    """A row of text per method with :data:`COLUMNS`; ``reached`` comes from the recipe's line ``# Reached: ...``."""
    rows: list[tuple[str, ...]] = []
    for name, method in listed("method").items():
        recipes = [path for path in recipe_files() if path.stem.split("_")[0] == name]
        reached = [line for path in recipes for line in re.findall(r"^# Reached: (.+)$", path.read_text("utf-8"), re.M)]
        rows.append(
            (
                name,
                method.summary,
                method.facts.get("paper", ""),
                method.place,
                ", ".join(path.name for path in recipes) or "none",
                "; ".join(reached) or NOT_MEASURED,
            )
        )
    return rows
