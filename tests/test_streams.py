"""Losing the screen: what can't be printed is dropped, the work goes on."""

import subprocess
import sys
from pathlib import Path

import pytest

WORK = """
import sys
from smalti.streams import lost_output, protect_streams
protect_streams()
for _ in range(3):
    print("x" * 100_000)
    print("y" * 100_000, file=sys.stderr)
error = lost_output()
open(sys.argv[1], "w").write("done, output " + ("lost" if error else "arrived or not wanted"))
"""


def work(tmp_path: Path, redirect: str) -> str:
    """Run :data:`WORK` in a shell with its streams redirected; what it wrote into its file."""
    script, out = tmp_path / "work.py", tmp_path / "out.txt"
    script.write_text(WORK)
    subprocess.run(["bash", "-c", f"set -o pipefail; {sys.executable} {script} {out} {redirect}"], check=True)
    return out.read_text()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full")
def test_full_disks_behind_streams_do_not_end_the_work_and_lost_output_is_known(tmp_path: Path) -> None:
    assert work(tmp_path, "2>/dev/full >/dev/null").endswith("not wanted")
    assert work(tmp_path, ">/dev/full 2>/dev/null").endswith("lost")


def test_a_reader_that_leaves_does_not_end_the_work(tmp_path: Path) -> None:
    assert work(tmp_path, "2>&1 | head -c 10 >/dev/null").endswith("not wanted")


def test_closed_streams_do_not_end_the_work_nor_reach_its_files(tmp_path: Path) -> None:
    assert work(tmp_path, "<&- >&- 2>&-") == "done, output arrived or not wanted"
