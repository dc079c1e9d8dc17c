"""Shell completion: names, quickly."""

import subprocess
import sys

import pytest

from smalti.registry import listed


def complete(line: str) -> list[str]:
    """What bash is offered for the last word of a line."""
    words = line.split(" ")
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "smalti"],
        capture_output=True,
        text=True,
        env={
            "_SMALTI_COMPLETE": "complete_bash",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(words) - 1),
            "PYTHONPATH": ":".join(sys.path),
        },
    )
    assert "| torch\n" not in done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("smalti ev", ["evaluate"]),
        ("smalti train ", list(listed("method"))),
        ("smalti train mp", ["mp3"]),
        ("smalti train mae m", []),
        ("smalti train --recipe comae_t", ["comae_tiny64.yaml"]),
        ("smalti methods drop", ["droppos"]),
        ("smalti doctor x --method ne", ["neco"]),
        ("smalti evaluate x --protocol knn", ["knn", "knn-patch"]),
        ("smalti evaluate x --protocol knn,kn", ["knn,knn-patch"]),
    ],
)
def test_names_are_offered(line: str, offered: list[str]) -> None:
    assert complete(line) == offered
