"""Hypnograms: names and numbers of stages, labels with and without times, and which window gets which stage."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from edf import write_edf, write_hypnogram
from signal_files import noise, save
from smalti.data.signals.hypnograms import Labels, Scoring, read_hypnogram, time_labels
from smalti.data.signals.signal_config import SignalConfig
from smalti.data.signals.signal_set import open_signals
from smalti.errors import DataError


def test_each_window_gets_the_stage_of_most_of_its_time():
    scoring = Scoring(np.arange(18) * 5.0, np.full(18, 5.0), np.array([0] * 4 + [1] * 2 + [2] * 3 + [3] * 3 + [-1] * 6))
    # four of W; three of N2 and three of N3, a tie that goes to N2; nothing scored
    assert_array_equal(scoring.windows(np.arange(3) * 30.0, 30.0), [0, 2, -1])


def test_a_window_that_is_mostly_unscored_has_no_stage():
    for seconds, stage in ((14.0, -1), (16.0, 2)):
        scoring = Scoring(np.array([0.0]), np.array([seconds]), np.array([2]))
        assert_array_equal(scoring.windows(np.array([0.0, 30.0]), 30.0), [stage, -1])


def test_stages_in_edf_annotations_and_tables(tmp_path):
    stages = [(0, 30, "Sleep stage W"), (30, 30, "Sleep stage 4"), (60, 30, "Sleep stage R"), (90, 30, "Sleep stage ?")]
    scoring = read_hypnogram(write_hypnogram(tmp_path / "x-Hypnogram.edf", [*stages, (5, 0, "Lights off")]))
    assert_array_equal(scoring.windows(np.arange(4) * 30.0, 30.0), [0, 3, 4, -1])
    (tmp_path / "x.stages.csv").write_text("onset_s,duration_s,stage\n0,30,W\n30,60,N2\n")
    assert_array_equal(read_hypnogram(tmp_path / "x.stages.csv").windows(np.arange(3) * 30.0, 30.0), [0, 2, 2])
    (tmp_path / "y.txt").write_text("[Hypnogram]\n" + "5\n4\n3\n2\n1\n0\n-1\n")
    assert_array_equal(read_hypnogram(tmp_path / "y.txt", "dreams").stages, [0, 4, 1, 2, 3, 3, -1])


def test_labels_of_a_text_are_as_long_as_fits_the_recording(tmp_path):
    np.save(tmp_path / "a.npy", noise(300))
    (tmp_path / "a_hypnogram.txt").write_text("W\nN1\nN2\nN2\nN3\nREM\nREM\nW\nW\nN1\n")
    assert_array_equal(open_signals(tmp_path, SignalConfig(rate_hz=100)).stages, [0, 1, 2, 2, 3, 4, 4, 0, 0, 1])
    with pytest.warns(UserWarning, match=r"lasts 300 s, its stages end at 50 s with data\.signal\.stage_s=5"):
        open_signals(tmp_path, SignalConfig(rate_hz=100, stage_s=5))


def test_neither_rate_nor_length_of_labels_is_refused(tmp_path):
    np.save(tmp_path / "r1.npy", noise(600))
    (tmp_path / "r1_hypnogram.txt").write_text("W\nN2\n" * 10)
    with pytest.raises(
        DataError, match=r"neither how long its 20 labels last .* give data\.signal\.stage_s, or data\.signal\.rate_hz"
    ):
        open_signals(tmp_path, SignalConfig())
    assert len(open_signals(tmp_path, SignalConfig(stage_s=30))) == 20
    assert len(open_signals(tmp_path, SignalConfig(rate_hz=100))) == 20


def test_an_undefined_label_may_run_past_the_end(tmp_path):
    save(tmp_path / "r.npz", noise(600))
    table = tmp_path / "r.stages.csv"
    table.write_text("onset_s,duration_s,stage\n0,570,N2\n570,6900,?\n")
    assert open_signals(tmp_path, SignalConfig()).stages.tolist() == [2] * 19 + [-1]
    table.write_text("onset_s,duration_s,stage\n0,570,N2\n570,6900,W\n")
    with pytest.raises(DataError, match="lasts 600 s, its stages 7470 s; do they belong to this recording"):
        open_signals(tmp_path, SignalConfig())


def scored(folder: Path, name: str, text: str, seconds: int = 240, **settings: object) -> list[int]:
    """Stages of the windows of a recording with a hypnogram of that name and text."""
    write_edf(folder / "n.edf", {"C3-M2": noise(seconds)[0]}, 100)
    (folder / name).write_text(text)
    return open_signals(folder, dataclasses.replace(SignalConfig(), **settings)).stages.tolist()


@pytest.mark.parametrize("name", ["n_hypnogram.txt", "n_hypnogram.csv"])
def test_bare_numbers_need_a_named_code(tmp_path, name):
    text = "stage\n" * name.endswith("csv") + "0\n1\n2\n3\n4\n4\n0\n0\n"
    with pytest.raises(DataError) as error:
        scored(tmp_path, name, text)
    assert str(error.value) == (
        f"{tmp_path / name}: has bare numbers as stages; name their code with data.signal.codes="
        "aasm (0 W, 1 N1, 2 N2, 3 N3, 4 REM) or nsrr (0 W, 1 N1, 2 N2, 3 N3, 4 N3) or "
        "dreams (0 N3, 1 N3, 2 N2, 3 N1, 4 REM)"
    )
    assert scored(tmp_path, name, text, codes="aasm") == [0, 1, 2, 3, 4, 4, 0, 0]
    assert scored(tmp_path, name, text, codes="nsrr") == [0, 1, 2, 3, 3, 3, 0, 0]
    assert scored(tmp_path, name, text, codes="dreams") == [3, 3, 2, 1, 4, 4, 3, 3]


def test_bare_numbers_in_an_npz_need_a_code_too(tmp_path):
    save(tmp_path / "n.npz", noise(60), stages=[0, 5])
    with pytest.raises(DataError, match=r"codes=nsrr \(0 W, 5 REM\) or dreams \(0 N3, 5 W\)"):
        open_signals(tmp_path, SignalConfig())
    assert open_signals(tmp_path, SignalConfig(codes="nsrr")).stages.tolist() == [0, 4]


def test_numbers_that_a_code_does_not_have_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"line 2 holds 5, which is no stage under data\.signal\.codes=aasm; name"):
        scored(tmp_path, "n_hypnogram.txt", "0\n5\n" * 4, codes="aasm")
    with pytest.raises(DataError, match="none of aasm, nsrr, dreams has all of 0, 77; write them as W, N1"):
        scored(tmp_path, "n_hypnogram.txt", "0\n77\n" * 4)


def test_numbers_beside_names_are_the_stages_of_rechtschaffen_and_kales(tmp_path):
    assert scored(tmp_path, "n_hypnogram.txt", "W\n1\n2\n3\n4\nR\nM\n?\n") == [0, 1, 2, 3, 3, 4, -1, -1]
    with pytest.raises(DataError, match="line 8 holds '0', which is no sleep stage"):
        scored(tmp_path, "n_hypnogram.txt", "W\n1\n2\n3\n4\nR\nM\n0\n")


@pytest.mark.parametrize(("count", "stages"), [(24, 8), (12, 8), (8, 8), (48, 8)])
def test_labels_are_as_long_as_fits_whatever_the_format(tmp_path, count, stages):
    assert scored(tmp_path, "n.stages.csv", "stage\n" + "N2\n" * count) == [2] * stages
    assert time_labels(Labels(tmp_path, np.full(count, 2)), tmp_path, 240.0).end_s == 240


def test_labels_that_fit_no_length_or_several_are_refused(tmp_path):
    with pytest.raises(DataError) as error:
        scored(tmp_path, "n_hypnogram.txt", "N3\n" * 6)
    assert "6 labels fit no label length (30 s at 5 s, 60 s at 10 s, 120 s at 20 s, 180 s at 30 s; the" in str(
        error.value
    )
    with pytest.raises(DataError, match=r"2 labels fit 2 label lengths \(40 s at 20 s, 60 s at 30 s"):
        scored(tmp_path, "n_hypnogram.txt", "N3\nW\n", seconds=50)
    assert scored(tmp_path, "n_hypnogram.txt", "N3\nW\n", seconds=50, stage_s=30) == [3]
    assert scored(tmp_path, "n_hypnogram.txt", "N3\nW\n", seconds=71) == [3, 0]  # the last part was not scored


def test_labels_that_may_or_may_not_count_a_gap_are_refused(tmp_path):
    write_edf(tmp_path / "n.edf", {"C3-M2": noise(240)[0]}, 100, onsets=[*range(120), *range(240, 360)])
    hypnogram = tmp_path / "n_hypnogram.txt"
    for settings in ({}, {"stage_s": 30}):
        hypnogram.write_text("W\n" * 8)
        with pytest.raises(DataError, match=r"labels of (30|20) s fit n\.edf without its gaps of 120 s, so"):
            open_signals(tmp_path, SignalConfig(**settings))
    hypnogram.write_text("W\n" * 12)  # 30 s with the gap, 20 s without
    with pytest.raises(DataError, match=r"12 labels of 20 s fit n\.edf without its gaps"):
        open_signals(tmp_path, SignalConfig())
    hypnogram.write_text("W\n" * 4 + "?\n" * 4 + "N2\n" * 4)
    assert open_signals(tmp_path, SignalConfig(stage_s=30)).stages.tolist() == [0] * 4 + [2] * 4


def test_durations_that_are_missing_follow_from_even_onsets_or_the_setting(tmp_path):
    assert scored(tmp_path, "n.stages.csv", "onset_s,stage\n60,N2\n30,W\n90,R\n", 120) == [-1, 0, 2, 4]
    uneven = "onset_s,stage\n0,W\n90,R\n"
    with pytest.raises(DataError, match="how long its labels last, and they are not evenly spaced by 5, 10, 20, 30 s"):
        scored(tmp_path, "n.stages.csv", uneven, 120)
    assert scored(tmp_path, "n.stages.csv", uneven, 120, stage_s=30) == [0, -1, -1, 4]
    points = write_hypnogram(tmp_path / "p.edf", [(0, 0, "Sleep stage W"), (30, 0, "Sleep stage R")])
    assert_array_equal(read_hypnogram(points).durations, [30, 30])


def test_two_scorings_in_one_file_are_refused(tmp_path):
    table = "onset_s,duration_s,stage\n0,30,W\n0,30,N1\n30,30,N2\n30,30,N2\n"
    with pytest.raises(DataError, match="from 0 s on it says both W and N1; keep one scoring"):
        scored(tmp_path, "n.stages.csv", table, 60)
    assert scored(tmp_path, "n.stages.csv", "onset_s,duration_s,stage\n0,31,W\n30,30,N1\n", 60) == [0, 1]


@pytest.mark.parametrize("row", ["nan,30,W", "0,inf,W", "0,-30,W", "x,30,W"])
def test_times_that_are_no_seconds_are_refused(tmp_path, row):
    with pytest.raises(DataError, match="seconds"):
        scored(tmp_path, "n.stages.csv", f"onset_s,duration_s,stage\n{row}\n", 60)


def test_two_columns_of_one_name_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("stage,onset_s,stage\nW,0,N2\nW,30,N2\n")
    with pytest.raises(DataError, match="has two columns named 'stage'; keep one"):
        read_hypnogram(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text("stage,,\nW,,\nN2,,\n")
    assert_array_equal(read_hypnogram(tmp_path / "b.csv").stages, [0, 2])


def test_an_annotation_of_an_unknown_sleep_stage_is_refused(tmp_path):
    path = write_hypnogram(tmp_path / "h.edf", [(0, 30, "Sleep stage W"), (30, 30, "Sleep stage 7")])
    with pytest.raises(DataError, match="'Sleep stage 7' at 30 s is no sleep stage; W, N1, N2, N3, R or"):
        read_hypnogram(path)
    path = write_hypnogram(tmp_path / "h.edf", [(0, 30, "Lights off"), (30, 0, "Stage fright")])
    with pytest.raises(DataError, match="has no annotations of sleep stages"):
        read_hypnogram(path)
