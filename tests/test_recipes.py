"""Every recipe can be started: its settings are known and its encoder can be built."""

from pathlib import Path

import pytest

from smalti.config import read_yaml
from smalti.methods.base import TokenMethod, get_method
from smalti.runs.build import starting_encoder
from smalti.runs.config import resolve

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipes_encoder_can_be_built(recipe: Path) -> None:
    tree = read_yaml(recipe)
    named = tree["method"]
    method = get_method(named if isinstance(named, str) else named["name"])
    if issubclass(method, TokenMethod) and method.needs_start:
        tree["init"] = "RUN"  # brings its tokens
        assert resolve(tree, recipe.name).method.name == method.name
        return
    config = resolve(tree, recipe.name)
    if issubclass(method, TokenMethod) and config.tokens is not None and config.tokens.kind == "vae":
        assert config.data.image_size == 256  # the autoencoder is the user's
    elif issubclass(method, TokenMethod):
        data = config.data
        assert method.make_tokens(config.tokens, config.method, data.image_size, data.channels).num_tokens >= 2
    elif not method.is_posttraining:  # its encoder comes with --init
        assert starting_encoder(config).depth >= 1


def test_an_exponent_needs_no_point(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: 1e-5\nb: -2E3\nc: 1.5e-2\nd: 1e\ne: e5\nf: 12\n")
    assert read_yaml(tmp_path / "a.yaml") == {"a": 1e-5, "b": -2000.0, "c": 0.015, "d": "1e", "e": "e5", "f": 12}
