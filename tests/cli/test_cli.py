"""The command line, as a stranger types it: in this process, and in its own where start and end of one matter."""

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from command import Done, smalti, smalti_process
from smalti.models.loading import latest_checkpoint
from smalti.reading import read_csv

TINY = (
    "encoder=vit_tiny_patch16_224 encoder.patch_size=8 encoder.embed_dim=24 encoder.depth=2 encoder.num_heads=3 "
    "data.image_size=32 batch_size=4 optim.lr=1e-3 checkpoint.every=4 log.every=2"
).split()
MAE = "method.decoder_dim=16 method.decoder_depth=1 method.decoder_num_heads=2".split()
NECO = (
    "method.roi_size=3 method.hidden_dim=32 method.out_dim=16 method.num_local_views=2 method.local_size=16 "
    "method.from_scratch=true"
).split()
LOCA = "method.num_prototypes=16 method.hidden_dim=32 method.bottleneck_dim=8 method.num_small_queries=2".split()
DINO = "method.num_prototypes=16 method.hidden_dim=32 method.bottleneck_dim=8 method.num_local_views=2".split()


def weights(run: Path) -> dict[str, torch.Tensor]:
    folder = latest_checkpoint(run)
    assert folder is not None
    return load_file(folder / "weights.safetensors")


def fails(match: str, *words: object) -> None:
    """A mistake is one line on stderr that says ``match``, and exit code 2."""
    is_one_line(match, smalti(*words, code=2))


def is_one_line(match: str, done: Done) -> None:
    said = [line for line in done.stderr.splitlines() if line.strip() and "tensors matched" not in line]
    lines = [line for line in said if not line.startswith("data: ")]
    assert len(lines) == 1 and lines[0].startswith("smalti: "), done.stderr
    assert match in lines[0], lines[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    """A finished MAE run of eight steps."""
    out = tmp_path_factory.mktemp("runs") / "a"
    done = smalti_process("train", "mae", "--data", photos, "--out", out, "steps=8", *TINY, *MAE)
    assert f"trained: {out}" in done.stdout
    assert "images/s" in done.stderr and "left" in done.stderr
    precision = json.loads((out / "run.json").read_text())["precision"]
    assert f"precision=auto: {precision} on this" in done.stderr
    return out


def test_settings_of_load_go_from_weights_through_a_run_to_its_export(photos: Path, tmp_path: Path) -> None:
    smalti(
        "export", "random:vit_tiny_patch16_224", "--out", tmp_path / "e", "load.img_size=64", "load.pos_mode=bilinear"
    )
    start = tmp_path / "e" / "model.safetensors"
    words = "load.pos_antialias=false load.pos_offset=0.1 data.image_size=32 steps=1 batch_size=2".split()
    smalti("train", "mae", "--init", start, "--data", photos, "--out", tmp_path / "r", "--quiet", *words, *MAE)
    done = smalti("export", tmp_path / "r", "--out", tmp_path / "x", "--debug")
    assert "unused: none" in done.stderr
    kept = json.loads((tmp_path / "x" / "config.json").read_text())["smalti"]
    assert (kept["pos_mode"], kept["pos_antialias"], kept["pos_offset"]) == ("bilinear", False, 0.1)
    assert kept["model_args"]["img_size"] == [64, 64]
    fails(
        "load.* applies to the weights of --init", "train", "mae", "--data", photos, "--out", tmp_path / "y", words[0]
    )
    fails("did you mean 'pos_offset'?", "export", start, "--out", tmp_path / "y", "load.pos_ofset=0.1")


def test_kill_minus_nine_and_resume_give_the_same_bits(run: Path, photos: Path, tmp_path: Path) -> None:
    words = ["train", "mae", "--data", photos, "--out", tmp_path / "b", "steps=8", *TINY, *MAE, "checkpoint.every=1"]
    process = subprocess.Popen([sys.executable, "-m", "smalti", *map(str, words)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not (tmp_path / "b" / "checkpoints" / "step_00000002").exists():
        assert process.poll() is None or latest_checkpoint(tmp_path / "b") is not None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    smalti("train", "--resume", tmp_path / "b", "--quiet")
    ours, theirs = weights(run), weights(tmp_path / "b")
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_signal_gives_a_checkpoint_a_line_and_143_and_resuming_the_same_bits(
    devices: int, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "b"
    words = ["train", "mae", "--data", photos, "steps=200", *TINY, *MAE, "checkpoint.every=500", f"devices={devices}"]
    command = [sys.executable, "-m", "smalti", *map(str, words), "--quiet"]
    process = subprocess.Popen([*command, "--out", str(out)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while not (out / "log.csv").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    addresses = [
        connection.laddr.ip
        for one in psutil.Process(process.pid).children(recursive=True)
        for connection in one.net_connections()
        if connection.status == psutil.CONN_LISTEN
    ]
    assert set(addresses) == ({"127.0.0.1"} if devices == 2 else set())
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    checkpoint = latest_checkpoint(out)
    assert process.returncode == 143
    assert said == (
        f"smalti: interrupted by SIGTERM; checkpoint: {checkpoint}; resume with: smalti train --resume {out}\n"
    )
    step = int(checkpoint.name.removeprefix("step_"))
    assert 0 < step < 200 and step % 500
    smalti("train", "--resume", out, "--quiet")
    smalti(*words, "--out", tmp_path / "a", "--quiet")
    ours, theirs = weights(tmp_path / "a"), weights(out)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_two_evaluations_in_the_same_second_leave_two_files(
    run: Path, class_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "strftime", lambda *_: "20261130-060000")
    for _ in range(2):
        smalti("evaluate", run, "--data", class_folders, "--protocol", "knn", "eval.baseline=false", "--quiet")
    names = sorted(path.name for path in (run / "results").glob("evaluate_20261130-060000*.json"))
    assert names == ["evaluate_20261130-060000-2.json", "evaluate_20261130-060000.json"]
    for path in (run / "results").glob("evaluate_20261130-060000*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_results_that_cannot_be_written_are_known_before_the_work(
    run: Path, class_folders: Path, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    inside = tmp_path / "file" / "x"
    fails("can't be written", "evaluate", run, "--data", class_folders, "--protocol", "knn", "--json", inside)
    fails("can't be written", "evaluate", run, "--data", class_folders, "--protocol", "knn", "--out", inside)
    fails("can't be written", "train", "mae", "--data", photos, "--out", inside, *TINY, *MAE)
    fails("can't be written", "doctor", photos, "--json", inside)
    other = tmp_path / "run"
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("results"))
    (other / "results").write_text("in the way")
    fails("results: can't be written", "evaluate", other, "--data", class_folders, "--protocol", "knn")


TWO_PROCESSES = {  # mae, part and plain droppos: tests/training/test_loop.py
    "dino": [*DINO, "drop_path=0"],
    "droppos": [*MAE, "method.ignore_confident=true"],
    "loca": [*LOCA, "drop_path=0"],
    "neco": [*NECO, "drop_path=0"],
    "neco queue": [*NECO, "drop_path=0", "method.references=queue"],
    "neco other images": [*NECO, "drop_path=0", "method.exclude_self=true"],
}


@pytest.mark.parametrize("kind", TWO_PROCESSES)
def test_two_processes_equal_one(kind: str, photos: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if kind != "droppos":  # one pair is started as a user's
        request.getfixturevalue("forked")
    own, method = TWO_PROCESSES[kind], kind.split()[0]
    # a larger epsilon: keys' biases have no gradient but rounding, which Adam would blow up to full steps
    common = ["train", method, "--data", photos, "steps=4", "optim.eps=1e-4", *TINY, *own, "--quiet"]
    smalti(*common, "--out", tmp_path / "two", "devices=2", "batch_size=8")
    smalti(*common, "--out", tmp_path / "one", "batch_size=8")
    two, one = weights(tmp_path / "two"), weights(tmp_path / "one")
    assert two.keys() == one.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.usefixtures("forked")
def test_two_processes_are_judged_at_steps_of_their_own(photos: Path, class_folders: Path, tmp_path: Path) -> None:
    judged = [f"eval.data={class_folders}", "eval.every=3", "eval.protocols=[knn]", "eval.image_size=32"]
    words = ["train", "mae", "--data", photos, "steps=8", *TINY, *MAE, *judged, "devices=2", "--quiet"]
    smalti(*words, "--out", tmp_path / "two")  # steps 3 and 6: the first is neither logged nor saved
    results = sorted(path.name for path in (tmp_path / "two" / "results").iterdir())
    assert results == [f"step_{step:08d}.json" for step in (0, 3, 6, 8)]


@pytest.mark.usefixtures("forked")
def test_two_processes_stop_early_together(photos: Path, class_folders: Path, tmp_path: Path) -> None:
    judged = [f"eval.data={class_folders}", "eval.every=1", "eval.patience=1", "eval.protocols=[knn]"]
    words = ["train", "mae", "--data", photos, "steps=40", *TINY, *MAE, *judged, "eval.image_size=32", "devices=2"]
    smalti(*words, "--out", tmp_path / "two", "--quiet")  # ends within its time limit: neither process waits forever
    with (tmp_path / "two" / "events.csv").open() as file:
        (event,) = csv.DictReader(file)
    assert event["event"] == "stopped early" and int(event["step"]) < 40
    assert (tmp_path / "two" / "checkpoints" / f"step_{int(event['step']):08d}").is_dir()


@pytest.mark.slow
def test_plain_torchrun_starts_the_processes_too(photos: Path, tmp_path: Path) -> None:
    common = ["-m", "smalti", "train", "mae", "--data", str(photos), "steps=4", *TINY, *MAE, "--quiet"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    subprocess.run([*launcher, *common, "--out", str(tmp_path / "torchrun")], check=True, timeout=300)
    smalti(*common[2:], "--out", tmp_path / "two", "devices=2")
    ours, theirs = weights(tmp_path / "torchrun"), weights(tmp_path / "two")
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_run_is_evaluated_reported_exported_and_embedded(
    run: Path, class_folders: Path, photos: Path, tmp_path: Path
) -> None:
    done = smalti(
        "evaluate", run, "--data", class_folders, "--protocol", "knn,linear-probe", "--json", tmp_path / "r.json"
    )
    assert "untrained" in done.stdout and "top1" in done.stdout
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    assert [r["protocol"] for r in results] == ["knn", "knn", "linear-probe", "linear-probe"]
    assert all(0 <= value <= 1 for r in results for value in r["metrics"].values())
    (written,) = (run / "results").glob("evaluate_*.json")
    assert (written.with_suffix("") / "details.json").is_file()

    page = smalti("report", run, "--out", tmp_path / "page.html")
    assert "written" in page.stdout
    text = (tmp_path / "page.html").read_text()
    assert "<html" in text[:200] and "Confusion of trained, knn" in text

    smalti("export", run, "to=timm", "--out", tmp_path / "exported")
    code = (
        "import timm, torch\n"
        f"model = timm.create_model('local-dir:{tmp_path / 'exported'}', pretrained=True).eval()\n"
        "print(model(torch.zeros(1, 3, 32, 32)).shape)"
    )
    assert "24" in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    spec, judged = tmp_path / "exported" / "model.safetensors", tmp_path / "judged"
    again = smalti("evaluate", spec, "--data", class_folders, "--protocol", "knn", "--out", judged)
    assert "tensors matched" in again.stderr and str(judged / "report.html") in again.stdout
    assert "PCA map" in (judged / "report.html").read_text()
    (judged / "report.html").unlink()
    assert str(judged / "report.html") in smalti("report", judged).stdout
    assert "PCA map" in (judged / "report.html").read_text()
    fails("leave out --data, --images", "report", judged, "--images", "3")
    fails("holds no evaluation; choose another --out", "evaluate", spec, "--data", class_folders, "--out", run)

    smalti("embed", run, "--data", photos, "--level", "patch", "--out", tmp_path / "f.parquet")
    smalti("embed", run, "--data", photos, "--level", "image", "--out", tmp_path / "f.npz")


def test_evaluation_in_training_is_shown_at_the_end(photos: Path, class_folders: Path, tmp_path: Path) -> None:
    words = [f"eval.data={class_folders}", "eval.every=2", "eval.protocols=[knn]", "eval.image_size=32"]
    done = smalti("train", "dino", "--data", photos, "--out", tmp_path / "r", "steps=4", *TINY, *DINO, *words)
    assert "knn" in done.stdout and "untrained" in done.stdout


def test_the_machine_and_the_images_are_looked_at(photos: Path) -> None:
    done = smalti("doctor", photos, "--against", photos, "--method", "mae", "steps=100", *TINY, *MAE)
    for word in ("torch", "24", "repeat an earlier one", "the same folder", "GiB", "batch"):
        assert word in done.stdout, done.stdout
    assert "24" in smalti("doctor", f"folder={photos}").stdout
    fails("layout 'voc' needs", "doctor", f"voc={photos}")


def test_the_version_is_printed() -> None:
    assert "smalti" in smalti_process("--version").stdout


def test_mistakes_are_one_line_and_exit_code_two(run: Path, photos: Path, class_folders: Path, tmp_path: Path) -> None:
    x = tmp_path / "x"
    train = ("train", "mae", "--data", photos, "--out", x)
    wrong = (*train, "method.mask_ration=0.5")
    for done in (smalti(*wrong, code=2), smalti_process(*wrong, code=2)):
        is_one_line("method has no field 'mask_ration'; did you mean 'mask_ratio'?", done)
    fails("settings has no field 'step'; did you mean 'steps'?", *train, "step=5")
    fails("there is no method 'maee'; did you mean 'mae'?", "train", "maee", "--data", photos, "--out", x)
    fails("timm has no model 'vit_tini_patch16_224'", *train, "encoder=vit_tini_patch16_224")
    fails("which patch_size=16 does not divide", *train, "encoder=vit_tiny_patch16_224", "data.image_size=100")
    (tmp_path / "empty").mkdir()
    fails(str(tmp_path / "empty"), "train", "mae", "--data", tmp_path / "empty", "--out", x)
    fails(str(tmp_path / "none"), "train", "mae", "--data", tmp_path / "none", "--out", x)
    (tmp_path / "file").write_text("x")
    fails("is a file", "train", "mae", "--data", photos, "--out", tmp_path / "file", *TINY)
    fails("is not empty", "train", "mae", "--data", photos, "--out", run, *TINY)
    fails("no images are given", "train", "mae", "--out", x)
    fails("no run directory is given", "train", "mae", "--data", photos)
    fails("--resume uses the settings of the run", "train", "mae", "--resume", run)
    fails("No such option", "train", "--dat", photos)
    fails("--data is needed", "evaluate", run)
    fails("did you mean 'eval.image_size'?", "evaluate", run, "--data", class_folders, "image_size=32")
    fails("did you mean 'data.image_size' or 'eval.image_size'?", *train, "image_size=32")
    fails("did you mean 'method.mask_ratio'?", *train, "mask_ratio=0.5")
    fails("there is no method 'mea'; did you mean 'mae'?", "train", "mea", "--data", photos, "--out", x)
    fails("did you mean 'knn'", "evaluate", run, "--data", class_folders, "--protocol", "knm")
    fails("masks", "evaluate", run, "--data", class_folders, "--protocol", "linear-segmentation")
    fails("no such run or file", "evaluate", tmp_path / "none", "--data", class_folders)
    fails("has no network 'teacher'", "evaluate", run, "--data", class_folders, "weights=teacher")
    fails("num_train='abc'", "samples", "--out", x, "num_train=abc")
    fails("batch_size='abc'", "embed", run, "--data", photos, "--out", x, "batch_size=abc")
    fails("is a folder", "evaluate", run, "--data", class_folders, "--json", tmp_path)
    fails("data.channels", *train, "data.channels=5", *TINY)
    fails("input should be 'timm', 'hf' or 'onnx'", "export", run, "to=tensorrt", "--out", x)
    fails(str(run), "export", run, "--out", run)
    fails(".parquet", "embed", run, "--data", photos, "--out", tmp_path / "f.csv")
    fails(str(photos), "report", photos)
    assert not x.exists()


def test_debug_shows_the_traceback(photos: Path, tmp_path: Path) -> None:
    done = smalti_process("train", "maee", "--data", photos, "--out", tmp_path / "x", "--debug", code=1)
    assert "Traceback" in done.stderr


def test_a_warning_is_one_line_and_comes_once(tmp_path: Path) -> None:
    code = (
        "import warnings; from smalti import streams\n"
        "streams.warn_in_one_line()\n"
        "for _ in range(2):\n"
        "    with warnings.catch_warnings():\n"
        "        pass\n"  # which makes Python forget what it has shown
        "    warnings.warn('two images have no mask', stacklevel=1)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "smalti: warning: two images have no mask\n"


def test_a_run_resumed_on_another_number_of_devices_is_the_same_run(photos: Path, tmp_path: Path) -> None:
    words = ["train", "mae", "--data", photos, "steps=8", *TINY, *MAE, "batch_size=8", "log.every=1"]
    words += ["optim.lr=null", "optim.base_lr=0.3", "optim.eps=0.1", "--quiet"]
    smalti(*words, "--out", tmp_path / "undisturbed")
    smalti(*words, "--out", tmp_path / "moved", "devices=2")
    shutil.rmtree(tmp_path / "moved" / "checkpoints" / "step_00000008")  # as if killed after step 4
    smalti("train", "--resume", tmp_path / "moved", "devices=1", "--quiet")
    rows = [read_csv(tmp_path / name / "log.csv") for name in ("undisturbed", "moved")]
    assert [row["lr"] for row in rows[0]] == [row["lr"] for row in rows[1]] and len(rows[0]) == 8
    ours, theirs = weights(tmp_path / "undisturbed"), weights(tmp_path / "moved")
    assert max((ours[key] - theirs[key]).abs().max().item() for key in ours) < 1e-6
    (event,) = read_csv(tmp_path / "moved" / "events.csv")
    assert event["detail"].endswith("processes 2 -> 1; micro_batch 4 -> 8")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["batch_size=10", "micro_batch=4"], "micro_batch=2 or micro_batch=5"),
        (["micro_batch=0"], "micro_batch=0: at least 1"),
        (["devices=3", "batch_size=64"], "batch_size=63 or batch_size=66"),
    ],
)
def test_a_batch_that_cannot_be_divided_is_one_line(words: list[str], line: str, photos: Path, tmp_path: Path) -> None:
    done = smalti("train", "mae", "--data", photos, "--out", tmp_path / "run", *TINY, *MAE, *words, code=2)
    assert line in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()
