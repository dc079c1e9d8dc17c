"""The comparison: what is finished stays finished, what breaks breaks alone, and the words follow the numbers."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

import smalti
from smalti.comparison import run as module
from smalti.comparison.cell import TRAINED, Job, _steps_within, digest, images_digest
from smalti.comparison.plan import read_plan
from smalti.comparison.run import compare, read_comparison
from smalti.errors import ConfigError, DataError, RunError
from smalti.evaluation.intervals import Interval
from smalti.evaluation.paired import Row, about_lines, metric_rows, shared_headline
from smalti.evaluation.result import Result
from smalti.models.loading import weights_digest

ENCODER = {"name": "vit_tiny_patch16_224", "patch_size": 8, "depth": 1, "embed_dim": 16, "num_heads": 2}


@pytest.fixture
def plan(photos, class_folders) -> dict:
    """Two seeds of a tiny MAE, the encoder it starts from, and another random one."""
    return {
        "data": str(photos),
        "evaluate": [{"data": str(class_folders), "protocols": ["knn"], "image_size": 32}],
        "budget": {"steps": 2},
        "seeds": [0, 1],
        "settings": {"encoder": ENCODER, "batch_size": 4, "data.image_size": 32, "data.num_workers": 0},
        "arms": {"start": {"load": "random"}, "mae": {"method": "mae", "method.decoder_depth": 1}},
    }


def run(plan, out, **options):
    return compare(plan, out, quiet=True, isolate=False, **options)


def test_every_arm_gets_every_seed_a_score_a_difference_and_a_cost(plan, tmp_path):
    result = run(plan, tmp_path / "out")
    assert result.arms == ("start", "mae") and not result.failures
    assert {(cell.arm, cell.seed) for cell in result.cells} == {(a, s) for a in plan["arms"] for s in (0, 1)}
    (title, rows), *_ = result.table()
    assert title == "classes0: knn top1"
    start, mae = rows
    assert start.difference is None and start.verdict == ""
    assert set(mae.seeds) == {0, 1}
    expected = np.mean([mae.seeds[s] - start.seeds[s] for s in (0, 1)])
    assert math.isclose(mae.difference.mean, expected) and mae.difference.over == "images and seeds"
    assert 0 <= mae.score.low <= mae.score.mean <= mae.score.high <= 1
    assert result.costs["mae"].steps == 2 and result.costs["mae"].images_seen == 8
    assert result.costs["mae"].cpu_s > 0 and result.costs["start"].cpu_s == 0
    assert result.costs["mae"].parameters == result.costs["start"].parameters > 0


def test_the_tables_say_the_same_in_every_form(plan, tmp_path):
    result = run(plan, tmp_path / "out")
    table = pq.read_table(tmp_path / "out" / "comparison.parquet").to_pylist()
    assert [row["mean"] for row in table] == [row.score.mean for row in result.rows]
    assert [row["verdict"] for row in table] == [row.verdict for row in result.rows]
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert f"{result.rows[0].score.mean:.3f}" in text and "Seeds: 0, 1" in text
    summary = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert len(summary["rows"]) == len(result.rows)


def test_finished_cells_are_not_done_again(plan, tmp_path, monkeypatch):
    first = run(plan, tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").rglob("*") if path.is_file()}
    monkeypatch.setattr(module, "_run", lambda job, isolate: pytest.fail(f"{job.name} was done again"))
    again = run(plan, tmp_path / "out")
    assert [row.score for row in again.rows] == [row.score for row in first.rows]
    now = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").rglob("*") if path.is_file()}
    assert now == times


def test_groups_and_few_seeds_change_what_is_said_and_no_cell(plan, tmp_path, monkeypatch):
    plain = run(plan, tmp_path / "out")
    assert plain.rows[0].score.over == "images and seeds"
    plan["evaluate"][0]["groups"] = r"/(\d)\.png"
    monkeypatch.setattr(module, "_run", lambda job, isolate: pytest.fail(f"{job.name} was done again"))
    grouped = run(plan, tmp_path / "out")
    assert {row.score.over for row in grouped.rows if row.is_headline} == {"groups and seeds"}
    assert [row.seeds for row in grouped.rows] == [row.seeds for row in plain.rows]
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "Two seeds: their spread is uncertain" in text and "of groups" in text
    plan["evaluate"][0]["groups"] = "red/(.)"
    with pytest.raises(DataError, match=r"does not match val/blue/0\.png"):
        run(plan, tmp_path / "out")


def test_a_longer_plan_does_only_what_is_new(plan, tmp_path, monkeypatch):
    run(plan, tmp_path / "out")
    done = []
    monkeypatch.setattr(
        module, "_run", lambda job, isolate, old=module._run: done.append(job.name) or old(job, isolate)
    )
    plan["arms"]["other"] = {"method": "mae", "method.decoder_depth": 1, "method.mask_ratio": 0.5}
    plan["seeds"] = [0, 1, 2]
    run(plan, tmp_path / "out")
    assert sorted(done) == sorted(
        ["other seed 0", "other seed 1", "start seed 2", "mae seed 2", "other seed 2", "mae seed 2, untrained"]
        + [f"other seed {seed}, untrained" for seed in (0, 1, 2)]
    )


def test_another_evaluation_leaves_the_training_alone(plan, tmp_path):
    run(plan, tmp_path / "out")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").rglob(TRAINED)}
    plan["evaluate"][0]["knn"] = {"k": 3}
    run(plan, tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").rglob(TRAINED)} == stamps


def test_a_failed_arm_does_not_hold_up_the_others(plan, tmp_path, capsys):
    plan["arms"] |= {"typo": {"method": "maee"}, "gone": {"load": str(tmp_path / "no.safetensors")}}
    result = run(plan, tmp_path / "out")
    assert result.arms == ("start", "mae")
    assert "did you mean 'mae'" in result.failures["typo"] and "does not exist" in result.failures["gone"]
    assert "arm 'typo' can't run" in capsys.readouterr().err
    assert "**Arm typo failed**" in (tmp_path / "out" / "comparison.md").read_text()


def test_an_arm_that_fails_while_it_runs_costs_the_others_nothing(plan, tmp_path, capsys):
    plan["arms"] |= {
        "late": {"method": "mae", "method.decoder_depth": 1, "method.mask_ratio": 0.5, "eval.image_size": 33},
        "unknown": {"method": "mae", "eval.protocols": ["knnn"]},
    }
    result = run(plan, tmp_path / "out")
    assert result.arms == ("start", "mae") and list(result.failures) == ["unknown", "late"]
    assert result.failures["late"].startswith("seed 0: images are 33x33 pixels")
    assert "did you mean 'knn'" in result.failures["unknown"]  # before anything is trained
    assert "arm 'late' failed at seed 1" in capsys.readouterr().err
    del plan["arms"]["late"]["eval.image_size"]
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").rglob(TRAINED)}
    assert run(plan, tmp_path / "out").arms == ("start", "mae", "late")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").rglob(TRAINED)} == times


@pytest.mark.parametrize(
    ("code", "line"), [(1, "ended with exit code 1"), (-9, r"ended with signal 9 \(out of memory\?\)")]
)
def test_a_process_that_ends_without_a_word_is_named(code, line, plan, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "run_process", lambda *_: (code, 0))
    with pytest.raises(RunError, match=line):
        compare(plan, tmp_path / "out", quiet=True)


def test_an_arm_that_is_taken_as_it_is_says_how_its_weights_are_fitted(plan, tmp_path):
    spec = "random:vit_tiny_patch16_224"
    plan = {key: plan[key] for key in ("evaluate",)} | {"seeds": [0]}
    plan["arms"] = {"timm": {"load": spec}, "dino": {"load": spec, "load.pos_antialias": False}}
    plan["arms"]["typo"] = {"load": spec, "load.pos_antialas": False}
    result = run(plan, tmp_path / "out")
    assert list(result.failures) == ["typo"]
    assert "load has no field 'pos_antialas'; did you mean 'pos_antialias'?" in result.failures["typo"]
    written = [path.read_text() for path in (tmp_path / "out" / "cells").rglob("*.json")]
    said = [json.dumps({"antialias": value})[1:-1] for value in (True, False)]
    assert [sum(word in text for text in written) > 0 for word in said] == [True, True]


def test_no_arm_that_comes_through_is_an_error(plan, tmp_path):
    plan["arms"] = {"typo": {"method": "maee"}}
    with pytest.raises(RunError, match="all arms failed; typo: there is no method 'maee'"):
        run(plan, tmp_path / "out")


def test_a_first_arm_that_breaks_leaves_no_differences(plan, tmp_path):
    plan["arms"] = {"typo": {"method": "maee"}, **plan["arms"]}
    result = run(plan, tmp_path / "out")
    assert all(row.difference is None and row.verdict == "" for row in result.rows)


def test_a_budget_of_images_becomes_steps_by_the_batch(plan, tmp_path):
    plan["budget"], plan["seeds"] = {"images": 10}, [0]
    result = run(plan, tmp_path / "out")
    assert result.costs["mae"].steps == 3 and result.costs["mae"].images_seen == 12


@pytest.mark.parametrize("kind", ["minutes", "cpu_minutes"])
def test_a_budget_of_minutes_is_measured_once_per_arm(kind, plan, tmp_path):
    plan["budget"] = {kind: 0.002}
    threads = torch.get_num_threads()
    result = run(plan, tmp_path / "out")
    (file,) = (tmp_path / "out" / "steps").iterdir()
    kept = json.loads(file.read_text())
    trained = [json.loads((cell.folder / TRAINED).read_text()) for cell in result.cells if cell.arm == "mae"]
    assert [cost["steps"] for cost in trained] == 2 * [kept["steps"]]  # both seeds
    assert kept["steps"] == max(1, math.floor(0.12 / kept["step_s"])) and kept["machine"]
    assert torch.get_num_threads() == threads


def test_steps_are_measured_before_the_first_arm_is_trained(plan, tmp_path, monkeypatch):
    plan["budget"], plan["seeds"] = {"minutes": 0.002}, [0]
    plan["arms"]["other"] = {"method": "mae", "method.decoder_depth": 1, "method.mask_ratio": 0.5}
    seen = []
    monkeypatch.setattr(module, "_run", lambda job, isolate, old=module._run: seen.append(job) or old(job, isolate))
    run(plan, tmp_path / "out")
    assert [job.measures for job in seen].index(False) == 2 and sum(job.measures for job in seen) == 2


def test_an_arm_starts_from_the_trained_weights_of_another_arm(plan, tmp_path, monkeypatch):
    plan["arms"]["longer"] = {"method": "mae", "method.decoder_depth": 1, "init": "arm:mae"}
    result = run(plan, tmp_path / "out")
    assert not result.failures
    rows = {row.arm: row for row in result.rows if row.is_headline}
    assert rows["longer"].gain_over == "before" and rows["mae"].gain_over == "untrained"
    cells = {(cell.arm, cell.seed): cell for cell in result.cells}
    for seed in (0, 1):
        source, cell = cells["mae", seed], cells["longer", seed]
        (before,) = cell.baseline_of(0)
        (trained,) = source.results_of(0)
        assert before.metrics["top1"] == trained.metrics["top1"]  # before its first step it is the other arm
        config = yaml.safe_load((cell.folder / "run" / "config.yaml").read_text())
        assert config["init"] == str(source.folder / "run") and config["encoder"] is None
    shutil.move(tmp_path / "out", tmp_path / "moved")
    monkeypatch.setattr(module, "_run", lambda job, isolate: pytest.fail(f"{job.name} was done again"))
    assert not run(plan, tmp_path / "moved").failures  # keys don't depend on the folder


def test_an_arm_trains_on_its_own_images(plan, class_folders, tmp_path):
    plan["seeds"] = [0]
    plan["arms"]["supervised"] = {"method": "supervised", "data.path": str(class_folders)}
    result = run(plan, tmp_path / "out")
    assert not result.failures
    cell = next(cell for cell in result.cells if cell.arm == "supervised")
    config = yaml.safe_load((cell.folder / "run" / "config.yaml").read_text())
    assert config["data"]["path"] == str(class_folders)


def test_an_arm_whose_start_is_gone_says_so(plan, tmp_path):
    plan["arms"]["longer"] = {"method": "mae", "method.decoder_depth": 1, "init": "arm:mae"}
    plan["seeds"] = [0]
    (cell,) = (cell for cell in run(plan, tmp_path / "out").cells if cell.arm == "mae")
    shutil.rmtree(cell.folder / "run")
    plan["arms"]["longer"]["method.mask_ratio"] = 0.5
    line = run(plan, tmp_path / "out").failures["longer"]
    assert "the weights that this arm starts from are gone; remove this folder to train them" in line


@pytest.mark.parametrize(
    ("init", "line"),
    [
        ("arm:maee", "there is no arm 'maee'; did you mean 'mae'"),
        ("arm:longer", "init=arm:longer: list arm 'longer' above arm 'longer'"),
        ("arm:start", "init=arm:start: arm 'start' is not trained; write init: random"),
        ("arm:typo", "arm 'typo', whose weights it starts from, can't run"),
    ],
)
def test_a_wrong_start_is_one_line(plan, tmp_path, init, line):
    plan["seeds"] = [0]
    plan["arms"] |= {"typo": {"method": "maee"}, "longer": {"method": "mae", "init": init}}
    assert line in run(plan, tmp_path / "out").failures["longer"]


def test_processor_time_is_that_of_one_process(plan, tmp_path):
    plan["budget"], plan["arms"]["mae"]["devices"] = {"cpu_minutes": 1}, 2
    plan["arms"]["mae"]["batch_size"] = 4
    assert "devices=2: a budget of cpu_minutes needs devices: cpu" in run(plan, tmp_path / "out").failures["mae"]


@pytest.mark.parametrize("content", ["[" * 100_000, "{}", "", '{"steps": "many"}'])
def test_damaged_steps_of_an_arm_are_one_line(tmp_path, content):
    (tmp_path / "steps.json").write_text(content)
    job = Job(folder=str(tmp_path), name="mae", seed=0, minutes=1.0, steps_file=str(tmp_path / "steps.json"))
    with pytest.raises(RunError, match=r"steps\.json: can't be read as the steps of an arm .*; remove it to measure"):
        _steps_within(job)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"arms": {}}, "no arms"),
        ({"evaluate": []}, "evaluate is empty"),
        ({"evaluate": [{"protocols": ["knn"]}]}, r"evaluate\[0\] names no data"),
        ({"seeds": [1, 1]}, r"seeds=\[1, 1\]: at least one seed is needed, and no seed twice"),
        ({"budget": {"steps": 2, "minutes": 1}}, "exactly one of steps, images, minutes, cpu_minutes"),
        ({"budget": {"epochs": 2}}, "exactly one of steps, images, minutes"),
        ({"budget": {"steps": 0}}, "a number above 0"),
        ({"data": None}, "arm 'mae' is trained, but no training images are given"),
        ({"arm": {}}, "no field 'arm'; did you mean 'arms'"),
    ],
)
def test_a_plan_that_can_not_be_used_gets_one_line(change, line, plan):
    with pytest.raises(ConfigError, match=line):
        read_plan({**plan, **change})


def test_a_protocol_that_is_not_there_and_data_without_labels_stop_the_plan(plan, photos, tmp_path):
    entry = plan["evaluate"][0]
    with pytest.raises(ConfigError, match="did you mean 'knn'"):
        run({**plan, "evaluate": [{**entry, "protocols": ["knnn"]}]}, tmp_path / "out")
    with pytest.raises(DataError, match="layout 'folder'"):
        run({**plan, "evaluate": [{**entry, "data": str(photos)}]}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["steps", "seed"])
def test_what_the_plan_sets_an_arm_can_not(key, plan, tmp_path):
    plan["arms"]["mae"][key] = 5
    result = run(plan, tmp_path / "out")
    assert f"{key}=5: is set by the plan's budget and seeds" in result.failures["mae"]


def test_a_folder_of_something_else_is_left_alone(plan, tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ConfigError, match="not a comparison"):
        run(plan, tmp_path)


def test_paths_may_be_relative_to_the_plan(plan, photos, class_folders, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    plan["data"] = "photos"
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    assert read_plan(tmp_path / "plan.yaml").data == str((tmp_path / "photos").resolve())


def test_arms_with_other_numbers_of_clusters_share_a_headline():
    def result(*clusters: int) -> Result:
        metrics = {f"miou_k{k}": 0.01 * k for k in clusters}
        told = {"num_test": 6, "image_size": 32, "num_patches": 96, "clusters": sorted(clusters)}
        left_out = [k for k in (300, 500) if k not in clusters]
        units = dict.fromkeys(metrics, "0 to 1, higher is better")
        return Result("overclustering", "", "", metrics, units, {**told, "clusters_left_out": left_out})

    arms = {"large": {0: result(500, 300, 21)}, "small": {0: result(300, 21)}}
    headline = shared_headline([results[0] for results in arms.values()])
    assert headline == "miou_k300"
    rows = metric_rows(arms, "miou_k300", "d", headline=headline)
    assert [row.is_headline for row in rows] == [True, True]
    (row,) = metric_rows({"large": arms["large"]}, "miou_k500", "d", headline=headline)
    assert not row.is_headline
    assert about_lines(rows) == [
        "large: 6 images, 32 px, 96 patches",
        "small: 6 images, 32 px, 96 patches; skipped: K = 500 (too few patches)",
    ]
    assert about_lines(rows[:1]) == ["6 images, 32 px, 96 patches"]
    assert shared_headline([result(500), result(21)]) is None


def test_words_follow_the_interval_and_the_direction():
    def verdict(low, high, unit="0 to 1, higher is better"):
        gap = Interval((low + high) / 2, low, high, "images")
        return Row("d", "p", "m", unit, "a", gap, {0: 0.0}, gap, True).verdict

    assert verdict(-0.1, 0.2) == "no difference found"
    assert verdict(0.1, 0.2) == "better" and verdict(-0.2, -0.1) == "worse"
    assert verdict(0.1, 0.2, "pixels, lower is better") == "worse"
    assert verdict(0.1, 0.2, "pixels, no direction") == "higher"
    row = Row(
        "d", "p", "m", "u", "a", Interval(0, 0, 0, ""), {0: 0.0}, Interval(0.1, math.nan, math.nan, "nothing"), True
    )
    assert row.verdict == "no interval: one seed"


def test_what_determines_a_cell_is_in_its_name(photos, tmp_path):
    from smalti.data.images.folders import open_images

    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})
    shutil.copytree(photos, tmp_path / "moved")
    before = images_digest(open_images(photos))
    assert images_digest(open_images(tmp_path / "moved")) == before
    cv2.imwrite(str(tmp_path / "moved" / "00.jpg"), np.zeros((9, 9, 3), np.uint8))
    assert images_digest(open_images(tmp_path / "moved")) != before
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(b"one")
    first = weights_digest(f"timm:vit@{weights}")
    weights.write_bytes(b"two")
    assert weights_digest(f"timm:vit@{weights}") != first


@pytest.mark.slow
def test_a_comparison_that_was_killed_goes_on_where_it_was(plan, tmp_path):
    plan["budget"] = {"steps": 6}
    plan["arms"]["long"] = {"method": "mae", "method.decoder_depth": 1, "method.mask_ratio": 0.5}
    straight = compare(plan, tmp_path / "straight", quiet=True)
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    command = [sys.executable, "-m", "smalti", "compare", str(tmp_path / "plan.yaml")]
    process = subprocess.Popen([*command, "--out", str(tmp_path / "out")], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("[4/6]"):
            break
    process.kill()
    process.wait()
    process.stderr.close()
    finished = {path for path in (tmp_path / "out" / "cells").rglob("results.json")}
    assert len(finished) >= 2
    stamps = {path: path.stat().st_mtime_ns for path in finished}
    result = compare(plan, tmp_path / "out", quiet=True)
    assert {path: path.stat().st_mtime_ns for path in finished} == stamps
    assert [dataclasses.asdict(row) for row in result.rows] == [dataclasses.asdict(row) for row in straight.rows]


@pytest.mark.slow
def test_a_signal_ends_a_comparison_with_a_checkpoint_of_its_cell_and_the_same_command_resumes(plan, tmp_path):
    plan |= {"seeds": [0], "budget": {"steps": 300}}
    del plan["arms"]["start"]
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    command = [sys.executable, "-m", "smalti", "compare", str(tmp_path / "plan.yaml")]
    process = subprocess.Popen([*command, "--out", str(tmp_path / "out")], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while not (logs := list((tmp_path / "out").rglob("log.csv"))):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    with pytest.raises(RunError, match=f"out: process {process.pid} on .* is writing here"):
        compare(plan, tmp_path / "out", quiet=True)
    process.terminate()
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 143
    assert said.splitlines()[-1] == "smalti: interrupted by SIGTERM; the same command resumes"
    assert (logs[0].parent / "events.csv").read_text().endswith("interrupted,SIGTERM\n")
    result = compare(plan, tmp_path / "out", quiet=True)
    straight = compare(plan, tmp_path / "straight", quiet=True)
    assert [row.seeds for row in result.rows] == [row.seeds for row in straight.rows]


def test_a_cell_in_a_process_of_its_own_gives_the_same_numbers(plan, tmp_path):
    plan["seeds"] = [0]
    here, there = run(plan, tmp_path / "here"), compare(plan, tmp_path / "there", quiet=True)
    assert [row.seeds for row in here.rows] == [row.seeds for row in there.rows]
    assert Path(there.cells[0].folder, "job.json").is_file()


def test_the_gain_of_a_trained_arm_is_over_its_own_network_untrained(plan, tmp_path):
    result = run(plan, tmp_path / "out")
    rows = {row.arm: row for row in result.rows if row.is_headline}
    assert rows["start"].gain is None and rows["mae"].gain_over == "untrained"
    cells = [cell for cell in result.cells if cell.arm == "mae"]
    scores = [[one(0)[0].headline[1] for one in (cell.results_of, cell.baseline_of)] for cell in cells]
    assert rows["mae"].gain.mean == pytest.approx(np.mean([trained - before for trained, before in scores]))
    for cell in cells:
        run_folder = cell.folder / "run"
        first = smalti.load(run_folder / "checkpoints" / "step_00000000", quiet=True)
        data = plan["evaluate"][0]["data"]
        (alone,) = smalti.evaluate(first, data, ["knn"], image_size=32, seed=cell.seed)
        assert alone.metrics == cell.baseline_of(0)[0].metrics
    again = read_comparison(tmp_path / "out")
    assert [row.gain for row in again.rows] == [row.gain for row in result.rows]
    assert "gain" in pq.read_table(tmp_path / "out" / "comparison.parquet").column_names
    said = (tmp_path / "out" / "comparison.md").read_text()
    assert "over its own network before training" in said
