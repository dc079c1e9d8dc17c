"""Damaged files of every kind that is read, in a process of its own; ``fuzz.py`` says how to repeat a case."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.parametrize(
    ("seed", "count", "timeout_s"),
    [
        (0, 40, 600),
        pytest.param(0, 300, 1200, marks=pytest.mark.slow),
        pytest.param(1, 3000, 7200, marks=pytest.mark.slow),
    ],
)
def test_a_damaged_file_is_read_or_refused_in_one_line_and_never_hangs(
    tmp_path: Path, seed: int, count: int, timeout_s: int
) -> None:
    command = [sys.executable, str(TESTS / "fuzz.py"), str(tmp_path), str(seed), "0", str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["failed"] for line in lines if "failed" in line] == []
    assert lines and lines[-1] == {"done": count}, f"the process ended with {done.returncode}: {done.stderr[-2000:]}"
