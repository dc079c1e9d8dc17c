"""Post-training's verdict: which images it is about, what it says, and that it is never lost."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import smalti
from smalti.cli.train import command
from smalti.config import merge, read_yaml
from smalti.errors import DataError
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.intervals import Interval
from smalti.evaluation.paired import Row
from smalti.evaluation.result import FRACTION, Result, read_results
from smalti.models.build import build_encoder
from smalti.models.encoder import Encoder
from smalti.models.loading import latest_checkpoint
from smalti.models.pooling import PatchFeatures
from smalti.report.run_page import write_report
from smalti.runs import train as runs
from smalti.runs.baseline import evaluate
from smalti.runs.config import posttrain_note, resolve
from smalti.runs.evaluation_hook import EvaluationHook
from smalti.runs.posttrain import BeforeAfter, Verdict, read_verdict, verdict_cells, verdict_path

ENCODER = {"name": "vit_tiny_patch16_224", "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
TINY: dict[str, Any] = {
    "data": {"image_size": 32},
    "method": {"num_prototypes": 16, "hidden_dim": 32, "bottleneck_dim": 8, "num_local_views": 2},
    "steps": 4,
    "batch_size": 4,
    "checkpoint": {"every": 2},
    "log": {"every": 2},
}


def write_masks(folder: Path, **splits: int) -> Path:
    """``images/`` and ``masks/``: noise whose left part is a little brighter, in two classes: no encoder tells all."""
    rng = np.random.default_rng(3)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    (folder / "classes.txt").write_text("dark\nbright\n")
    for split, count in splits.items():
        names = [f"{split}{number}" for number in range(count)]
        (folder / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
        for name in names:
            mask = np.zeros((32, 32), dtype=np.uint8)
            mask[:, : int(rng.integers(8, 24))] = 1
            image = rng.integers(0, 90, (32, 32, 3)).astype(np.uint8) + 8 * mask[..., None]
            cv2.imwrite(str(folder / "images" / f"{name}.png"), image)
            cv2.imwrite(str(folder / "masks" / f"{name}.png"), mask)
    return folder


@pytest.fixture(scope="module")
def with_test(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_masks(tmp_path_factory.mktemp("masks") / "abc", train=6, val=4, test=5)


@pytest.fixture(scope="module")
def without_test(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_masks(tmp_path_factory.mktemp("masks") / "ab", train=6, val=4)


@pytest.fixture(scope="module")
def start(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to begin from."""
    out = tmp_path_factory.mktemp("runs") / "start"
    return smalti.train("dino", photos, out, overrides=merge(TINY, {"encoder": ENCODER, "steps": 1}), quiet=True)


def evaluation(data: Path, **more: Any) -> dict[str, Any]:
    return {"data": str(data), "every": 2, "protocols": ["knn-patch"], "image_size": 32, "baseline": False, **more}


def post_train(out: Path, photos: Path, start: Path, **more: Any) -> Path:
    return smalti.train("dino", photos, out, init=str(start), overrides=merge(TINY, more), quiet=True)


def choose(monkeypatch: pytest.MonkeyPatch, *scores: float) -> None:
    """What evaluation in training finds, step by step; what stands behind it stays."""
    original = EvaluationHook.__call__

    def call(hook: EvaluationHook, step: int, method: Any) -> float | None:
        original(hook, step, method)
        return scores[step // 2]

    monkeypatch.setattr(EvaluationHook, "__call__", call)


def test_the_best_step_is_selected_on_val_and_evaluated_on_test(
    photos: Path, start: Path, with_test: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch, 0.1, 0.9, 0.5)
    more = {"optim": {"lr": 3e-2}, "method": {"momentum": 0.0}}  # a teacher that moves
    run = post_train(tmp_path / "a", photos, start, eval=evaluation(with_test), **more)
    verdict = read_verdict(run)
    assert verdict is not None
    headlines = {row.arm: row.score.mean for row in verdict.rows if row.is_headline}
    assert len({round(score, 3) for score in headlines.values()}) == 3, "arms that are swapped can be told"
    assert (verdict.subject, dict(verdict.steps)) == ("best", {"before": 0, "last": 4, "best": 2})
    assert verdict.images.startswith("5 test images, ") and "Step 2 was selected on val" in verdict.notes[0]
    assert {
        json.loads(f.read_text())["results"][0]["settings"]["num_test"] for f in run.glob("results/step_*.json")
    } == {4}
    # each number is what smalti.evaluate says of these weights
    config = EvalConfig(protocols=("knn-patch",), image_size=32, baseline=False, split="test")
    for arm, spec in {"before": start, "last": run, "best": run / "best"}.items():
        encoder = smalti.load(spec, network="teacher", quiet=True)
        again = evaluate(encoder, "again", str(with_test), config)[0]
        assert {r.metric: r.score.mean for r in verdict.rows if r.arm == arm} == pytest.approx(dict(again.metrics))
    assert all(
        row.difference is not None and row.difference.over == "images" for row in verdict.rows if row.arm != "before"
    )
    assert verdict.headline.difference.mean == pytest.approx(verdict.headline.score.mean - verdict.rows[0].score.mean)


def test_without_a_test_split_the_verdict_is_about_the_last_step(
    photos: Path, start: Path, without_test: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch, 0.1, 0.9, 0.5)
    run = post_train(tmp_path / "a", photos, start, eval=evaluation(without_test))
    verdict = read_verdict(run)
    assert verdict is not None and verdict.subject == "last"
    assert (
        verdict.notes[0].startswith("The best step was selected on the same images")
        and "biased upwards" in verdict.notes[1]
    )
    assert all(row.difference is None for row in verdict.rows if row.arm == "best")
    for arm, step in verdict.steps.items():  # nothing was judged twice: these are the evaluations in training
        during = read_results(run / "results" / f"step_{step:08d}.json")[0]
        assert {r.metric: r.score.mean for r in verdict.rows if r.arm == arm} == pytest.approx(dict(during.metrics))
    kept = sorted(path.name for path in (run / "results" / "posttrain").iterdir())
    assert kept == ["step_00000000", "step_00000002", "step_00000004"]


def test_the_verdict_changes_no_weight_and_a_resumed_run_has_the_same(
    photos: Path, start: Path, with_test: Path, tmp_path: Path
) -> None:
    plain = post_train(tmp_path / "a", photos, start)
    judged = post_train(tmp_path / "b", photos, start, eval=evaluation(with_test))
    stored = [load_file(latest_checkpoint(run) / "weights.safetensors") for run in (plain, judged)]
    assert all(torch.equal(stored[0][key], stored[1][key]) for key in stored[0])
    verdict = verdict_path(judged).read_text()
    verdict_path(judged).unlink()
    shutil.rmtree(judged / "results" / "posttrain" / "step_00000000")
    runs.resume(judged, quiet=True)
    assert verdict_path(judged).read_text() == verdict
    # a run that was never judged gets its verdict afterwards
    runs.resume(plain, {"eval": evaluation(with_test, every=0)}, quiet=True)
    late, early = read_verdict(plain), read_verdict(judged)
    assert late is not None and early is not None
    rows = [
        [dataclasses.replace(row, data="") for row in v.rows if row.arm in ("before", "last")] for v in (late, early)
    ]
    assert rows[0] == rows[1]


def test_pretraining_from_random_weights_has_no_verdict(photos: Path, with_test: Path, tmp_path: Path) -> None:
    more = {"encoder": ENCODER, "eval": evaluation(with_test, every=0)}
    run = smalti.train("dino", photos, tmp_path / "a", overrides=merge(TINY, more), quiet=True)
    assert read_verdict(run) is None


class Blind(Encoder):
    """Says the same of every patch."""

    def encode(self, images: torch.Tensor, norm: bool = True) -> PatchFeatures:
        found = super().encode(images, norm)
        return found._replace(patches=torch.ones_like(found.patches))


class Seeing(Encoder):
    """Says how bright a patch is."""

    def encode(self, images: torch.Tensor, norm: bool = True) -> PatchFeatures:
        found = super().encode(images, norm)
        bright = F.avg_pool2d(images.mean(1, keepdim=True), self.patch_size).flatten(2).mT
        return found._replace(patches=torch.cat([bright, 1 - bright, torch.zeros_like(found.patches)[..., 2:]], -1))


def double(cls: type[Encoder]) -> Encoder:
    built = build_encoder(img_size=32, seed=0, **ENCODER)
    return cls(built.vit, built.name, built.model_args, mean=(0.0,), std=(1.0,)).eval()


def test_before_is_what_training_began_from_and_after_what_it_came_to(
    with_test: Path, without_test: Path, tmp_path: Path
) -> None:
    blind, seeing = double(Blind), double(Seeing)

    def conclude(data: Path, best: int | None, **steps: Encoder) -> Verdict:
        config = EvalConfig(data=str(data), protocols=("knn-patch",), image_size=32)
        judge = BeforeAfter(tmp_path / f"{data.name}-{best}-{steps['s0'] is blind}", config)
        return judge.conclude(4, best, lambda step: steps[f"s{step}"])

    for data, best, judged in ((with_test, 2, "best"), (without_test, 2, "last"), (with_test, None, "last")):
        better = conclude(data, best, s0=blind, s2=seeing if judged == "best" else blind, s4=seeing)
        worse = conclude(data, best, s0=seeing, s2=blind if judged == "best" else seeing, s4=blind)
        assert (better.kind, better.subject, worse.kind, worse.subject) == ("better", judged, "worse", judged)
        before, gap = better.rows[0], better.headline.difference
        assert before.arm == "before" and gap is not None and gap.mean > 0.2
        assert better.headline.score.mean == pytest.approx(before.score.mean + gap.mean)
        assert worse.rows[0].score.mean == pytest.approx(better.headline.score.mean)
        assert f"{before.score.mean:.3f} -> {better.headline.score.mean:.3f}" in better.sentence
        assert better.sentence.startswith("better by ") and worse.sentence.startswith("not better, worse by ")


@pytest.mark.parametrize("apart", [True, False])
def test_of_one_score_nothing_is_chosen(
    apart: bool, photos: Path, start: Path, with_test: Path, without_test: Path, tmp_path: Path
) -> None:
    run = post_train(tmp_path / "a", photos, start)
    data = with_test if apart else without_test
    runs.resume(run, {"eval": evaluation(data)}, quiet=True)
    verdict = read_verdict(run)
    assert verdict is not None
    assert (verdict.subject, verdict.best_step, dict(verdict.steps)) == ("last", None, {"before": 0, "last": 4})
    assert (
        verdict.notes[0]
        == "Only the last step was evaluated, so no step was selected; the verdict is about the last step."
    )
    assert not any("selected on" in note or "biased" in note for note in verdict.notes)


def test_the_sentence_names_a_network_that_is_not_exported(
    photos: Path, start: Path, with_test: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"optim": {"lr": 3e-2}, "eval": evaluation(with_test, every=0)}
    run = post_train(tmp_path / "a", photos, start, weights="student", **more)
    verdict = read_verdict(run)
    assert verdict is not None
    assert "of the student; export writes the teacher unless weights=student is set" in verdict.sentence
    config = EvalConfig(protocols=("knn-patch",), image_size=32, baseline=False, split="test")
    student = evaluate(smalti.load(run, network="student", quiet=True), "again", str(with_test), config)[0]
    assert verdict.headline.score.mean == pytest.approx(student.headline[1])
    capsys.readouterr()
    command(resume=run, quiet=True)
    lines = capsys.readouterr().out
    assert "to=timm --out DIR weights=student" in lines and "--data LABELLED weights=student" in lines
    plain = read_verdict(post_train(tmp_path / "b", photos, start, **more))
    assert plain is not None and "student" not in plain.sentence and plain.network == "teacher"


def verdict_of(gap: Interval, judged: str = "last", best: int | None = 10, unit: str = FRACTION) -> Verdict:
    before = Row("d", "in-context", "miou", unit, "before", Interval(0.31, 0.29, 0.33, "images"), {0: 0.31}, None, True)
    score = Interval(0.31 + gap.mean, 0.0, 1.0, "images")
    after = dataclasses.replace(before, arm=judged, score=score, seeds={0: score.mean}, difference=gap)
    return Verdict((before, after), {"before": 0, "last": 10, judged: 10}, judged, best, "test (5)", ())


def test_the_sentence_says_what_the_interval_allows_and_does_not_know() -> None:
    alone = (
        "; one seed, another may differ; without eval.groups, related images (frames of a video, slices of a "
        "patient) count as independent"
    )
    better = verdict_of(Interval(0.03, 0.01, 0.05, "images"))
    assert (better.kind, better.sentence) == (
        "better",
        f"better by 0.030: in-context miou 0.310 -> 0.340 (+0.030, 95 % interval 0.010 to 0.050) at step 10{alone}",
    )
    grouped = verdict_of(Interval(0.03, 0.01, 0.05, "groups"))
    assert "one seed, another may differ; groups of images" in grouped.sentence
    unsure = verdict_of(Interval(0.01, -0.01, 0.03, "images"))
    assert (unsure.kind, unsure.sentence) == (
        "same",
        f"not better: in-context miou 0.310 -> 0.320 (+0.010, 95 % interval -0.010 to 0.030) at step 10{alone}",
    )
    worse = verdict_of(Interval(-0.02, -0.03, -0.01, "images"))
    assert worse.kind == "worse" and worse.sentence.startswith(
        "not better, worse by 0.020: in-context miou 0.310 -> 0.290"
    )
    unchosen = verdict_of(Interval(0.03, 0.01, 0.05, "images"), best=0)
    assert unchosen.kind == "same" and "no step scored better than the initial weights" in unchosen.sentence
    single = verdict_of(Interval(0.03, float("nan"), float("nan"), "nothing"))
    assert single.kind == "same" and single.sentence.endswith("; this score has no interval with one seed")
    lower = verdict_of(Interval(-0.02, -0.03, -0.01, "images"), unit="distance, lower is better")
    assert lower.kind == "better" and lower.sentence.startswith("better by 0.020")


def test_low_rates_where_training_starts_from_weights(photos: Path, start: Path, tmp_path: Path) -> None:
    def optim(**tree: Any) -> Any:
        return resolve({"method": "dino", **tree}).optim

    fresh, after = optim(), optim(init="runs/x")
    assert (fresh.lr, fresh.freeze_encoder_ratio, fresh.weight_decay_end) == (None, 0.0, 0.4)
    assert (after.lr, after.freeze_encoder_ratio, after.weight_decay_end) == (1e-5, 0.1, 0.04)
    assert optim(init="runs/x", optim={"lr": 1e-3}).lr == 1e-3
    named = optim(init="runs/x", optim={"base_lr": 1e-3})
    assert (named.lr, named.base_lr) == (None, 1e-3)  # a rate that was asked for isn't hidden by a default
    tree = {"method": "dino", "init": "runs/x", "optim": {"lr": 1e-5, "weight_decay_end": 0.2}}
    note = posttrain_note(tree, resolve(tree))
    assert note == "starting from weights: optim.freeze_encoder_ratio=0.1 by default"
    assert posttrain_note({"method": "dino"}, resolve({"method": "dino"})) == ""
    run = post_train(tmp_path / "a", photos, start)
    assert read_yaml(run / "config.yaml")["optim"]["lr"] == 1e-5


def test_the_command_ends_with_the_table_and_the_sentence_and_so_does_the_report(
    photos: Path,
    start: Path,
    with_test: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    choose(monkeypatch, 0.1, 0.9, 0.5)
    monkeypatch.setenv("COLUMNS", "160")
    run = tmp_path / "a"
    words = "steps=4 batch_size=4 data.image_size=32 method.num_prototypes=16 method.hidden_dim=32"
    words += " method.bottleneck_dim=8 method.num_local_views=2 eval.every=2 eval.protocols=[knn-patch]"
    words += " eval.image_size=32 eval.baseline=false"
    command(["dino", *words.split(), f"eval.data={with_test}"], data=str(photos), out=run, init=str(start))
    said = capsys.readouterr()
    verdict = read_verdict(run)
    assert verdict is not None
    lines = said.out.splitlines()
    assert verdict.sentence in lines and f"  {verdict.notes[0]}" in lines
    assert all(any(cells[3] in line and cells[2] in line for line in lines) for cells in verdict_cells(verdict))
    assert f"trained: {run} (the last step, 4); the best step, 2, is {run / 'best'}" in lines
    assert "starting from weights: optim.lr=1e-05" in said.err
    page = write_report(run, num_images=0).read_text()
    assert "Before and after" in page and verdict.notes[0] in page
    assert f"{verdict.headline.protocol} {verdict.headline.metric} " in page
    verdict_path(run).write_text("{}")
    with pytest.raises(DataError, match=r"posttrain.json: can't be read as a verdict"):
        read_verdict(run)
    assert "be read as a verdict" in write_report(run, num_images=0).read_text()


def test_without_labelled_images_the_command_says_how_to_get_a_verdict(
    photos: Path, start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = post_train(tmp_path / "a", photos, start)
    command(resume=run, quiet=True)
    line = f"not evaluated yet: smalti train --resume {run} eval.data=LABELLED evaluates before and after"
    assert line in capsys.readouterr().out.splitlines()


def test_images_used_for_selection_are_not_used_for_the_verdict(
    with_test: Path, without_test: Path, class_folders: Path
) -> None:
    def about(data: Path, **more: Any) -> tuple[str, bool]:
        judge = BeforeAfter(Path("run"), EvalConfig(data=str(data), **more))
        return judge.chosen_on, judge.is_apart

    assert about(with_test) == ("val", True)
    assert about(with_test, split="validation") == ("val", True)
    assert about(with_test, split="test") == ("test", False)
    assert about(without_test) == ("val", False)
    assert about(class_folders) == ("val", False)


def test_other_settings_are_evaluated_again(with_test: Path, tmp_path: Path) -> None:
    def before_after(**more: Any) -> BeforeAfter:
        return BeforeAfter(tmp_path, EvalConfig(data=str(with_test), protocols=("knn-patch",), split="test", **more))

    result = Result("knn-patch", "e", "d", {"miou": 0.5}, {"miou": FRACTION}, {"split": "x"})
    before_after().record(3, [result])
    assert before_after().has(3) and before_after(batch_size=1).has(3)
    assert not before_after().has(4) and not before_after(own={"knn-patch": {"k": 7}}).has(3)
