"""What there is: the methods, their recipes, and the numbers that were reached with them. Nothing heavy is imported."""

import re
from pathlib import Path

from smalti.config import unknown_key
from smalti.errors import ConfigError
from smalti.registry import listed

COLUMNS = ("method", "what", "paper", "file", "recipe", "reached")
NOT_MEASURED = "*not yet measured*"


def recipe_files() -> list[Path]:
    """The recipes that come with Smalti: in the package, or in the checkout it runs from."""
    package = Path(__file__).parents[1]
    for folder in (package / "recipes", package.parents[1] / "recipes"):
        if folder.is_dir():
            return sorted(folder.glob("*.yaml"))
    return []


def find_recipe(name: str | Path) -> Path:
    """A recipe by its path, or by the name of one that comes with Smalti (with or without ending).

    Raises:
        ConfigError: if there is neither; the closest name is suggested.
    """
    path = Path(name).expanduser()
    shipped = {recipe.name: recipe for recipe in recipe_files()}
    if path.is_file() or path.parent != Path():
        return path
    found = shipped.get(path.name) or shipped.get(f"{path.name}.yaml")
    if found is None:
        raise ConfigError(unknown_key(str(name), shipped, kind="recipe"))
    return found


def catalogue() -> list[tuple[str, ...]]:
    """A row of text per method, in the order of :data:`COLUMNS`; ``reached`` is the recipe's own line of that name."""
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
