"""The scripts of evidence/ fit the package as it is now, and the pages of docs/evidence/ fit the files of results."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from smalti.comparison.plan import read_plan, source_arm, train_job
from smalti.data.images.folders import open_images

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "evidence").glob("*.py"))
RESULTS = sorted((ROOT / "evidence" / "results").iterdir())
PLANS = sorted((ROOT / "evidence").glob("*.yaml"))
PAGES = sorted((ROOT / "docs" / "evidence").glob("*.md"))
PAGES_TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_each_script_imports_what_exists(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(path.parent))  # some share code with one another
    monkeypatch.setenv("MPLBACKEND", "agg")
    spec = importlib.util.spec_from_file_location(f"evidence_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    assert callable(module.main)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_page_has_the_command_of_each_script(path: Path) -> None:
    assert f"python evidence/{path.name}" in PAGES_TEXT


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_page_links_to_each_file_of_results(path: Path) -> None:
    assert json.loads(path.read_text(encoding="utf-8"))
    assert f"](../../evidence/results/{path.name})" in PAGES_TEXT


def test_links_and_images_of_the_pages_exist() -> None:
    for page in PAGES:
        links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
        missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
        assert not missing, page.name


def test_the_index_names_each_page() -> None:
    index = (ROOT / "docs" / "evidence" / "README.md").read_text(encoding="utf-8")
    missing = [page.name for page in PAGES if page.name != "README.md" and f"]({page.name})" not in index]
    assert not missing


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_the_arms_of_each_plan_can_be_trained(path: Path, photos: Path, tmp_path: Path) -> None:
    plan, images, jobs = read_plan(path), open_images(photos), {}
    for name, arm in plan.arms.items():
        source = source_arm(name, plan)
        what = {"name": name, "seed": 0}
        jobs[name] = train_job(arm, 0, tmp_path, plan, images, what, jobs[source] if source else None)
    assert len({job.folder for job in jobs.values()}) == len(plan.arms)
    assert jobs["neco"].cpu_minutes == plan.budget["cpu_minutes"]
    if "dinov2" in jobs:
        assert jobs["neco"].start == jobs["dinov2"].folder


def test_what_has_run_is_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    spec = importlib.util.spec_from_file_location("evidence_run", ROOT / "evidence" / "run.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["run.py", "--list", "--out", str(tmp_path)])
    module.main()
    printed = capsys.readouterr().out
    assert all(f"| {run.name} |" in printed for run in module.RUNS)
    readme = (ROOT / "evidence" / "README.md").read_text()
    assert all(f"`{run.name}`" in readme and f"| {run.hours:g} |" in readme for run in module.RUNS)
