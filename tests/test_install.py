"""The core install stays light."""

import re
from importlib.metadata import PackageNotFoundError, requires

from packaging.requirements import Requirement

CUDA = re.compile(r"^(nvidia|cuda|triton)")


def installed_with(
    name: str, extras: frozenset[str] = frozenset(), seen: set[tuple[str, str]] | None = None
) -> set[str]:
    """Names of all distributions that installing ``name`` brings, itself included."""
    seen = set() if seen is None else seen
    names = {name}
    for text in requires(name) or []:
        requirement = Requirement(text)
        wanted = not requirement.marker or any(requirement.marker.evaluate({"extra": e}) for e in (*extras, ""))
        key = requirement.name.lower().replace("_", "-")
        if wanted and (key, str(sorted(requirement.extras))) not in seen:
            seen.add((key, str(sorted(requirement.extras))))
            try:
                names |= installed_with(key, frozenset(requirement.extras), seen)
            except PackageNotFoundError:
                continue  # for another platform
    return names


def test_the_core_brings_at_most_62_packages_beside_cuda() -> None:
    names = {name for name in installed_with("smalti") if not CUDA.match(name)}
    assert {"torch", "timm", "accelerate"} <= names
    assert len(names) <= 62, sorted(names)
