"""``smalti methods``: quick, complete, and nothing cut off at 80 columns or in a pipe."""

import subprocess
import sys

import pytest

from command import smalti
from smalti.registry import listed
from smalti.runs.recipes import recipe_files


@pytest.mark.parametrize("columns", ["60", "80", "200"])
def test_names_stand_uncut_at_any_width(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    words = smalti("methods").stdout.replace(",", " ").split()
    assert {*listed("method"), *(path.name for path in recipe_files())} <= set(words)
    assert max(len(line) for line in smalti("methods").stdout.splitlines()) <= int(columns)
    assert "…" not in smalti("methods").stdout


def test_one_method_is_shown_with_what_to_type_next() -> None:
    shown = smalti("methods", "mae").stdout
    for text in ("He et al. 2021", "mae_vitb16.yaml", "smalti settings mae", "smalti train mae --data IMAGES"):
        assert text in shown
    assert "There is no" not in shown
    assert "there is no method 'mea'; did you mean 'mae'?" in smalti("methods", "mea", code=2).stderr


def test_a_markdown_table_has_a_row_per_method() -> None:
    head, _, *rows = smalti("methods", "--markdown").stdout.splitlines()
    assert head.startswith("| method |")
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == list(listed("method"))


def test_listing_takes_less_than_a_second_and_no_torch() -> None:
    code = (
        "import sys, time; from smalti.cli.main import run\n"
        "try: run(['methods'])\n"
        "except SystemExit: print(time.process_time(), 'torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, has_torch = done.stderr.split()
    assert has_torch == "False" and float(seconds) < 1
