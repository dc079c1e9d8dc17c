"""One cell of a comparison: an arm with one seed, trained and evaluated in its own process.

A cell's folder is named by a digest of what determines its weights; in it, each evaluation has a folder named by a
digest of its settings and data. Finished work is never repeated; interrupted training is resumed.
``python -m smalti.comparison.cell JOB.json PARENT`` runs one; :mod:`smalti.comparison.run` writes the jobs.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import shutil
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

import smalti
from smalti.config import Seed, build, merge, settings, to_tree
from smalti.data.images.folders import ImageSet
from smalti.data.signals.preparation import Recording
from smalti.data.signals.signal_set import SignalSet
from smalti.errors import RunError, SmaltiError, machine_error
from smalti.evaluation.config import EvalConfig, determining
from smalti.evaluation.details import write_details
from smalti.evaluation.evaluate import evaluate
from smalti.evaluation.result import write_results
from smalti.files import remove_leftovers, write_atomically
from smalti.methods.base import get_method
from smalti.models.encoder import Encoder
from smalti.models.loading import as_loaded, file_digest, find_checkpoint, load, weights_digest
from smalti.preflight.report import measure_step
from smalti.preflight.step import step_maker
from smalti.reading import reading
from smalti.runs.baseline import untrained_network
from smalti.runs.build import count_classes, new_encoder, open_training
from smalti.runs.config import DataConfig, resolve
from smalti.runs.folder import CONFIG_FILE
from smalti.runs.machine import describe_machine
from smalti.runs.train import resume, train
from smalti.streams import protect_streams, warn_in_one_line
from smalti.training.launch import num_processes, resolve_devices
from smalti.training.processes import end_with

RANDOM = "random"
"""As ``load`` of an arm: the encoder that the plan's trained arms start from."""
RUN, TRAINED, FAILED, RESULTS_FILE, DETAILS = "run", "trained.json", "failed.txt", "results.json", "details"
FREE = ("eval", "checkpoint", "log")
"""Groups of settings that don't change the weights."""
COSTLESS = ("batch_size", "num_workers", "cache_mib", "every", "patience", "data", "baseline", "groups")
"""Evaluation settings that don't change the scores or are set elsewhere."""


@settings
class Job:
    """Arguments of the process that runs one cell."""

    folder: str
    """Folder of the cell."""
    name: str
    """Arm and seed, shown in progress messages."""
    seed: int
    load: str | None = None
    """Weights to evaluate as they are; None trains."""
    load_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """``network`` and ``pool`` of the loaded weights."""
    train: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Settings of the training run as a nested dict."""
    untrained: bool = False
    """Evaluate the network that ``train`` describes before its first step."""
    minutes: float | None = None
    """Wall-clock budget of training in minutes, converted to steps; None: ``train`` sets the steps."""
    cpu_minutes: float | None = None
    """Budget of processor time on one thread, converted to steps."""
    steps_file: str = ""
    """JSON file of the steps that fit into a budget of time, shared by all seeds of the arm."""
    start: str | None = None
    """Folder of the cell whose trained weights this one starts from; None: ``init`` of ``train``, or random weights."""
    measures: bool = False
    """Only measure the steps that fit into the budget."""
    evaluations: tuple[dict[str, Any], ...] = ()
    """``key``, ``data`` and ``settings`` of each evaluation."""
    quiet: bool = False


def is_trained(job: Job) -> bool:
    """Whether the cell trains."""
    return job.load is None and not job.untrained


def digest(*parts: Any) -> str:
    """Digest of plain values, 12 hexadecimal digits."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def images_digest(images: ImageSet | SignalSet) -> str:
    """Digest of the names, sizes, labels, masks and splits of the files, and of the subjects of recordings; independent
    of the folder's location."""
    if isinstance(images, SignalSet):
        return digest([_recording_parts(recording) for recording in images.recordings], images.classes)
    rows = []
    for sample in images.samples:
        files = [path for path in (sample.path, sample.mask, sample.instances) if path is not None]
        rows.append((*map(_name_and_size, files), sample.label, sample.split))
    return digest(rows, images.classes)


def _recording_parts(recording: Recording) -> list[Any]:
    """What determines a recording, with the labels of its windows."""
    files = [path for path in (recording.path, recording.hypnogram) if path is not None]
    labels = [None if one is None else one.tolist() for one in (recording.stages, recording.labels)]
    return [recording.name, *map(_name_and_size, files), recording.subject, recording.split, *labels]


def training_key(
    tree: Mapping[str, Any], budget: Mapping[str, Any], images: ImageSet | SignalSet, start: str | None = None
) -> str:
    """Cache key of a cell's weights: settings, budget, images, initial weights and Smalti's version.

    Args:
        tree: settings of the run.
        budget: the plan's budget.
        images: training images.
        start: identifies the initial weights; None: computed from the files that ``init`` names.
    """
    config = resolve(tree)
    plain = {name: value for name, value in to_tree(config).items() if name not in FREE}
    del plain["checkpointing"]  # changes no weights
    for name, default in (("prr", None), ("gaug", False), ("adapt", "full")):
        if plain[name] == default:
            del plain[name]  # cells written before these settings existed keep their digest
    if plain["method"].get("orders"):
        plain["method"] = {**plain["method"], "orders": _with_digest(plain["method"]["orders"])}
    plain["data"] = {name: value for name, value in plain["data"].items() if name not in ("path", "num_workers")}
    if start is not None:
        del plain["init"]
    return digest(plain, dict(budget), images_digest(images), _start(config.init, start), smalti.__version__)


def untrained_key(tree: Mapping[str, Any], start: str | None = None) -> str:
    """Cache key of an initial network: architecture, the method's settings, seed and initial weights."""
    config = resolve(tree)
    data = {name: getattr(config.data, name) for name in ("image_size", "channels", "mean", "std", "signal")}
    parts = {name: getattr(config, name) for name in ("method", "encoder", "load", "seed", "pool", "prr")}
    parts |= {"gaug": True} if config.gaug else {}
    return digest(to_tree(data), to_tree(parts), _start(config.init, start), smalti.__version__)


def _start(init: str | None, start: str | None) -> str | None:
    """What identifies the initial weights."""
    return start or (weights_digest(init) if init else None)


def evaluation_key(settings: Mapping[str, Any], images: ImageSet | SignalSet, seed: int) -> str:
    """Cache key of an evaluation, apart from the weights."""
    plain = determining(build(EvalConfig, settings, "evaluate"), COSTLESS)
    if (curve := plain.get("keep-curve")) is not None:
        plain["keep-curve"] = {**curve, "orders": [_with_digest(order) for order in curve["orders"]]}
    return digest(plain, seed, images_digest(images), images.layout, smalti.__version__)


def _with_digest(orders: str) -> str:
    """The name of an order unchanged; a file of orders with a digest of its content."""
    path = Path(orders)
    return file_digest(path) if path.suffix == ".parquet" and path.is_file() else orders


def run_cell(job: Job) -> None:
    """Train and evaluate, except for what is already done.

    Raises:
        SmaltiError: if training or an evaluation fails.
    """
    folder = Path(job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    if job.measures:
        _steps_within(job)
        return
    if job.start and find_checkpoint(Path(job.start) / RUN) is None:
        raise RunError(f"{job.start}: the weights that this arm starts from are gone; remove this folder to train them")
    if is_trained(job) and not (folder / TRAINED).is_file():
        _train(job, folder)
    if all((folder / entry["key"] / RESULTS_FILE).is_file() for entry in job.evaluations):
        return
    encoder = _encoder(job, folder)
    for entry in job.evaluations:
        target = folder / entry["key"]
        if (target / RESULTS_FILE).is_file():
            continue
        started, cpu = time.perf_counter(), cpu_seconds()
        # scores don't depend on groups: only the tables resample them
        own = {**entry["settings"], "seed": job.seed, "groups": None}
        config = build(EvalConfig, own, "evaluate")
        progress = None if job.quiet else _progress_printer(job.name)
        results = evaluate(encoder, job.name, entry["data"], config, progress=progress, figures=True)
        cost = {"wall_s": time.perf_counter() - started, "cpu_s": cpu_seconds() - cpu, "peak_mib": peak_mib()}
        cost["parameters"] = num_parameters(encoder)
        shutil.rmtree(target, ignore_errors=True)
        write_details(target / DETAILS, results)
        write_atomically(target / "cost.json", json.dumps(cost, indent=1))
        write_results(target / RESULTS_FILE, results)  # last: marks the folder as complete


def _train(job: Job, folder: Path) -> None:
    run = folder / RUN
    was_begun = (run / CONFIG_FILE).is_file()
    if run.exists() and not was_begun:
        shutil.rmtree(run)
    tree = dict(job.train)
    with contextlib.ExitStack() as stack:
        if job.cpu_minutes is not None:
            stack.enter_context(_one_thread())
        if job.steps_file:
            tree["steps"] = _steps_within(job)
        started, cpu = time.perf_counter(), cpu_seconds()
        if was_begun:
            resume(run, quiet=job.quiet)
        else:
            train(out=run, overrides=tree, quiet=job.quiet)
    config = resolve(merge(tree, {}))
    wall = time.perf_counter() - started
    devices = resolve_devices(config.devices)
    on_gpu = devices.kind == "cuda"
    cost = {
        "steps": config.steps,
        "images_seen": config.steps * config.batch_size,
        "wall_s": wall,
        "cpu_s": cpu_seconds() - cpu,
        "gpu_s": wall * devices.processes if on_gpu else 0.0,
        "peak_mib": torch.cuda.max_memory_allocated() / 2**20 if on_gpu else peak_mib(),
        "peak_is_of": "GPU" if on_gpu else "process",
        "resumed": was_begun,
    }
    write_atomically(folder / TRAINED, json.dumps(cost, indent=1))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _steps_within(job: Job) -> int:
    """Steps that fit into the budget; measured once per arm and stored, so that all seeds train as many, also when they
    are resumed."""
    kept = Path(job.steps_file)
    if kept.is_file():
        with reading(kept, "the steps of an arm", RunError, "remove it to measure them again"):
            return int(json.loads(kept.read_bytes())["steps"])
    config = resolve(merge(job.train, {"steps": 1000}))
    device = torch.device(resolve_devices(config.devices).kind)
    make_step, _ = step_maker(config, device)
    with _one_thread() if job.cpu_minutes is not None else contextlib.nullcontext():
        estimate = measure_step(
            make_step,
            batch_size=config.batch_size,
            micro_batch=config.micro_batch,
            processes=num_processes(config.devices),
            steps=1000,
            device=device,
            clock=time.perf_counter if job.cpu_minutes is None else time.process_time,
        )
    if not estimate.seconds > 0:
        raise RunError("the time of a step could not be measured; give the budget in steps or images")
    minutes = job.cpu_minutes or job.minutes or 0.0
    steps = max(1, math.floor(minutes * 60 / estimate.seconds))
    measured = {"steps": steps, "step_s": estimate.seconds, "minutes": minutes, **describe_machine()}
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(kept, json.dumps(measured, indent=1))
    return steps


def _encoder(job: Job, folder: Path) -> Encoder:
    options = dict(job.load_options)
    pool = options.pop("pool", None)
    if job.untrained:
        config = resolve(job.train)
        images = open_training(config)
        config = count_classes(config, images)
        classes = images.classes or ()
        network = get_method(config.method.name).export_network
        encoder = as_loaded(untrained_network(config, network, classes))
    elif job.load == RANDOM:
        encoder = build(RandomEncoder, job.train).make().eval()
    else:
        encoder = load(job.load or str(folder / RUN), seed=job.seed, quiet=True, **options)
    if pool:
        encoder.set_pool(pool)
    return encoder.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


@settings
class RandomEncoder:
    """The encoder of ``load: random``, from the settings of a plan."""

    encoder: str | dict[str, Any] | None = None
    """Architecture, as in the settings of a training run."""
    data: DataConfig = DataConfig()
    """Size, channels and normalisation of the images."""
    seed: Seed = 0
    """Seed of timm's random initialisation."""

    def make(self) -> Encoder:
        """The encoder, on the CPU."""
        encoder = new_encoder(self.encoder, self.data, self.seed)
        encoder.check_size(*encoder.img_size)
        return encoder


def num_parameters(encoder: Encoder) -> int:
    """Number of parameters of the exported encoder."""
    return sum(parameter.numel() for parameter in encoder.parameters())


def cpu_seconds() -> float:
    """Processor time of this process and of its children that have ended."""
    return sum(psutil.Process().cpu_times()[:4])  # user, system, and those of children where the system counts them


def peak_mib() -> float:
    """Peak memory of this process; current memory if the system doesn't report the peak."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024
    except (OSError, StopIteration):
        return psutil.Process().memory_info().rss / 2**20


def _name_and_size(path: Path) -> tuple[str, int]:
    try:
        size = path.stat().st_size
    except OSError:
        size = -1
    return path.name, size


def _progress_printer(name: str) -> Any:
    last = [0.0]

    def progress(what: str, done: int, total: int) -> None:
        if done >= total or time.monotonic() - last[0] > 10:
            last[0] = time.monotonic()
            print(f"{name}: {what}: {done} of {total}", file=sys.stderr, flush=True)

    return progress


def main(path: str, parent: int) -> int:
    """Run the job in a file and return the exit code; an error is written to the cell's folder.

    Args:
        path: JSON file of the job.
        parent: process id of the comparison; this process ends when the comparison does.
    """
    end_with(parent)
    protect_streams()
    warn_in_one_line()
    job = build(Job, json.loads(Path(path).read_text(encoding="utf-8")), path)
    failed = Path(job.folder) / FAILED
    failed.unlink(missing_ok=True)
    try:
        run_cell(job)
    except SmaltiError as error:
        write_atomically(failed, f"{error}\n")
        return 2
    except Exception as error:
        if (line := machine_error(error)) is not None:
            write_atomically(failed, f"{line}\n")
            return 2
        traceback.print_exc()
        write_atomically(failed, f"{type(error).__name__}: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
