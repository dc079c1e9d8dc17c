"""Short adaptations of the best encoder: does further training on the user's own images help?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smalti.choosing.candidates import Candidate
from smalti.comparison.outcome import Comparison
from smalti.comparison.run import compare
from smalti.config import to_tree
from smalti.errors import ConfigError
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.paired import Row
from smalti.models.adaptation import FULL, parse_adapt
from smalti.models.encoder import Encoder
from smalti.runs.recipes import find_recipe

LARGEST = 224
"""Pixels of training images, at most."""
SEED = 0


@dataclass(frozen=True)
class Way:
    """How an encoder is adapted."""

    name: str
    method: str
    adapt: str

    @property
    def recipe(self) -> str:
        """The recipe for thousands of images that comes with Smalti."""
        return f"{self.method}_small224.yaml"


def parse_way(text: str) -> Way:
    """``METHOD`` or ``METHOD:ADAPT``, such as ``neco:last:2``.

    Raises:
        ConfigError: if there is no such recipe, or ``ADAPT`` is none of full, norms, last:N and lora:R.
    """
    method, colon, adapt = text.partition(":")
    way = Way(text, method, adapt if colon else "")
    if colon and parse_adapt(adapt)[0] == FULL:
        raise ConfigError(f"adapt=[{text}]: full is what {method} does; leave it out")
    find_recipe(way.recipe)
    return way


def adapt_best(
    best: Candidate,
    encoder: Encoder,
    ways: Sequence[Way],
    images: str,
    config: EvalConfig,
    minutes: float,
    load_settings: Mapping[str, Any],
    out: Path,
    quiet: bool,
    isolate: bool = True,
) -> Comparison:
    """Train the best encoder in each way and compare it with itself before, by its last layer.

    Args:
        best: the candidate; its image size is that of the evaluation.
        encoder: its encoder.
        ways: how it is adapted; at least one.
        images: to train on.
        config: the evaluation: labelled images, the deciding protocol, number of training images.
        minutes: wall-clock time of training in each way.
        load_settings: ``load.*`` of the start weights.
        out: folder of the comparison; finished parts in it are kept.
        quiet: show no progress.
        isolate: whether each part runs in its own process.

    Raises:
        RunError: if no way can be trained.
    """
    patch = max(encoder.patch_size)
    size = max(2 * patch, min(best.image_size, LARGEST) // patch * patch)
    arms: dict[str, dict[str, Any]] = {
        way.name: {"recipe": way.recipe, **({"adapt": way.adapt} if way.adapt else {})} for way in ways
    }
    evaluation = {key: value for key, value in to_tree(config).items() if value is not None and key != "baseline"}
    plan = {
        "data": images,
        "evaluate": [{**evaluation, "image_size": best.image_size}],
        "budget": {"minutes": minutes},
        "seeds": [SEED],
        "settings": {
            "init": best.encoder,
            "data.image_size": size,
            "checkpoint.every": 10**6,
            "load": dict(load_settings),
        },
        "arms": arms,
    }
    return compare(plan, out, quiet=quiet, isolate=isolate)


def gains(comparison: Comparison) -> list[Row]:
    """The deciding metric of each way, with its gain over the weights before."""
    return [row for row in comparison.rows if row.is_headline and row.gain is not None]
