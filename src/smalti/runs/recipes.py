"""What there is: the methods, their recipes, and the numbers that were reached with them."""

import inspect
import re
from pathlib import Path

from smalti.config import unknown_key
from smalti.errors import ConfigError
from smalti.methods.base import get_method, method_names

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
        ConfigError: if there is neither; the nearest name is suggested.
    """
    path = Path(name).expanduser()
    shipped = {recipe.name: recipe for recipe in recipe_files()}
    if path.is_file() or path.parent != Path():
        return path
    found = shipped.get(path.name) or shipped.get(f"{path.name}.yaml")
    if found is None:
        raise ConfigError(unknown_key(str(name), shipped).replace("settings has no field", "there is no recipe"))
    return found


def catalogue() -> list[tuple[str, ...]]:
    """A row of text a method, in the order of :data:`COLUMNS`; ``reached`` is the recipe's own line of that name."""
    rows: list[tuple[str, ...]] = []
    for name in method_names():
        method = get_method(name)
        recipes = [path for path in recipe_files() if path.stem.split("_")[0] == name]
        reached = [line for path in recipes for line in re.findall(r"^# Reached: (.+)$", path.read_text("utf-8"), re.M)]
        file = Path(inspect.getfile(method)).name
        rows.append(
            (
                name,
                method.title,
                method.paper,
                f"methods/{file}",
                ", ".join(path.name for path in recipes) or "none",
                "; ".join(reached) or NOT_MEASURED,
            )
        )
    return rows
