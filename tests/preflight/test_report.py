import json
import math
import shutil
import time
from pathlib import Path

import pytest
import torch

from smalti.errors import ConfigError
from smalti.preflight import report as doctor_file
from smalti.preflight.dataset import look_at_data
from smalti.preflight.devices import find_devices
from smalti.preflight.report import Measured, StepEstimate, doctor, measure_step


def estimate(**changes) -> StepEstimate:
    """A step that costs 0.1 s and 100 MiB, and 0.01 s and 50 MiB more an image."""
    values = dict(
        device="the CPU",
        batch_size=32,
        micro_batch=32,
        accumulate=1,
        steps=3600,
        measured=(Measured(4, 0.14, 300.0), Measured(12, 0.22, 700.0)),
        free_mib=10_000.0,
        checkpoint_mib=100.0,
        keep=2,
    )
    return StepEstimate(**{**values, **changes})


def test_a_line_through_two_batch_sizes_gives_every_number():
    step = estimate()
    assert step.seconds == pytest.approx(0.42)
    assert step.hours == pytest.approx(0.42)
    assert step.memory_mib == pytest.approx(1700)
    assert step.largest_micro_batch == math.floor((9000 - 100) / 50)
    assert step.fits and step.disk_mib == 400
    assert "largest micro_batch about 178" in "\n".join(step.lines())


def test_memory_that_does_not_grow_sets_no_limit():
    step = estimate(measured=(Measured(4, 0.1, 300.0), Measured(12, 0.1, 299.0)))
    assert step.largest_micro_batch is None and step.memory_mib == 299


def test_the_error_for_a_batch_that_does_not_fit_names_one_that_does():
    report = doctor(step=estimate(free_mib=1000.0))
    (problem,) = [text for text in report.problems if "micro_batch=32 needs" in text]
    assert "use micro_batch=16" in problem
    tiny = doctor(step=estimate(free_mib=50.0)).problems[0]
    assert "use a smaller encoder" in tiny


def test_an_accumulated_step_takes_the_time_of_its_parts():
    step = estimate(batch_size=4096, micro_batch=32, accumulate=64)  # two devices
    assert step.seconds == pytest.approx(64 * 0.42) and step.memory_mib == pytest.approx(1700)
    assert step.proposed_micro_batch == 128  # of 2048 images of a device, 178 fit
    assert "batch_size=4,096 on 2 devices: micro_batch=32 x 64 accumulated" in "\n".join(step.lines())


def test_checkpoints_larger_than_the_disk_are_a_problem(tmp_path):
    report = doctor(step=estimate(checkpoint_mib=1e12), out=tmp_path / "not" / "there")
    assert "lower checkpoint.keep" in report.problems[0]
    assert report.disk_free_mib == pytest.approx(shutil.disk_usage(tmp_path).free / 2**20, rel=0.05)


@pytest.fixture
def clock(monkeypatch):
    """A clock that only steps move."""
    now = [0.0]
    monkeypatch.setattr(doctor_file.time, "perf_counter", lambda: now[0])
    return now


def test_time_is_the_fastest_step_after_the_first_and_grows_with_the_batch(clock):
    made = []

    def make_step(batch_size: int):
        made.append(batch_size)
        cost = 0.1 + 0.05 * batch_size
        durations = iter([0.01, cost + 2, cost, cost + 3, cost + 1, cost + 1])  # the first is left out

        def step() -> None:
            clock[0] += next(durations)

        return step

    step = measure_step(make_step, batch_size=64, steps=7200)
    assert made == [4, 64]
    assert step.seconds == pytest.approx(3.3) and step.hours == pytest.approx(6.6)


def test_slow_steps_are_measured_with_fewer_images(clock):
    made = []

    def make_step(batch_size: int):
        made.append(batch_size)

        def step() -> None:
            clock[0] += 2 + batch_size

        return step

    step = measure_step(make_step, batch_size=1000, steps=1)
    assert made == [4, 12] and step.seconds == pytest.approx(1002)


def test_memory_is_what_a_step_holds_at_its_peak(clock):
    def make_step(batch_size: int):
        def step() -> None:
            clock[0] += 1.0
            block = torch.ones(batch_size, 2**22)  # 16 MiB an image, much beside what else comes and goes
            time.sleep(0.3)  # a busy machine looks at memory late
            del block

        return step

    step = measure_step(make_step, batch_size=64, steps=100, batch_sizes=(2, 18))
    each = (step.measured[1].memory_mib - step.measured[0].memory_mib) / 16
    assert each == pytest.approx(16, rel=0.3)
    assert 18 < step.largest_micro_batch < step.free_mib / 2
    assert step.free_mib <= find_devices().total_mib * 1.01


def test_small_batches_are_measured_at_growing_sizes(clock):
    made: list[int] = []

    def make_step(batch_size: int):
        made.append(batch_size)

        def step() -> None:
            clock[0] += 0.5

        return step

    step = measure_step(make_step, batch_size=1, steps=10)
    assert made == [2, 4] and step.seconds == pytest.approx(0.5)
    with pytest.raises(ConfigError, match="two ascending numbers"):
        measure_step(make_step, batch_size=8, steps=1, batch_sizes=(4, 4))


@pytest.mark.parametrize(("limit", "sizes"), [(100, [8, 16]), (10, [4, 8]), (2, [1, 2]), (1, [1, 1])])
def test_out_of_memory_halves_the_sizes(clock, limit, sizes):
    def make_step(batch_size: int):
        def step() -> None:
            clock[0] += 1.0
            if batch_size > limit:
                raise torch.OutOfMemoryError("out of memory")

        return step

    step = measure_step(make_step, batch_size=16, steps=1, batch_sizes=(8, 16))
    assert [one.batch_size for one in step.measured] == sizes
    assert limit > 1 or (step.largest_micro_batch == 1 and not step.fits)


def test_an_image_that_does_not_fit_is_one_line():
    def make_step(batch_size: int):
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(ConfigError, match="not even a batch of 1 image fits"):
        measure_step(make_step, batch_size=4, steps=1, batch_sizes=(2, 4))


def test_the_report_tells_versions_devices_images_and_problems(photos: Path, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for number, path in enumerate(sorted(photos.iterdir())[:4]):
        shutil.copy(path, copy / f"{number}.jpg")
    (copy / "broken.jpg").write_bytes(b"broken")
    report = doctor(str(copy), against=str(photos), step=estimate())
    text = "\n".join(report.lines())
    for words in (
        "torch ",
        "timm ",
        "python ",
        "extras",
        "processor",
        "GiB free",
        "unreadable   1",
        "shared       4 of 24 images of",
        "! 1 of 5 images can't be read",
        "! 4 of 24 images of",
        "! fewer images than a batch of 32",
    ):
        assert words in text, words
    assert report.data == look_at_data(str(copy), against=str(photos))


def test_the_json_has_what_was_worked_out(photos: Path):
    plain = json.loads(json.dumps(doctor(str(photos), step=estimate(free_mib=1000.0)).to_json()))
    assert plain["step"]["largest_micro_batch"] == 16 and plain["step"]["fits"] is False
    assert plain["data"]["files"]["count"] == 24 and len(plain["problems"]) == 2


def test_a_sound_folder_has_no_problems(photos: Path):
    report = doctor(str(photos), step=estimate(batch_size=8, micro_batch=8))
    assert not report.problems and report.lines()[-1] == "no problems found"


def test_against_alone_is_refused(photos: Path):
    with pytest.raises(ConfigError, match="also name the first"):
        doctor(against=str(photos))
