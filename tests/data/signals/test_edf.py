"""EDF, EDF+ and BDF: the same values and times as another reader, gaps, and headers that contradict the file."""

import datetime
import random
import resource
import warnings
from pathlib import Path

import mne
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from edf import write_edf, write_hypnogram
from signal_files import noise
from smalti.data.signals.edf import Timeline, open_edf, read_channels, read_timeline
from smalti.data.signals.signal_config import SignalConfig
from smalti.data.signals.signal_set import open_signals
from smalti.errors import SmaltiError

STAGES = [(0, 30, "Sleep stage W"), (30, 30, "Sleep stage N2")]


def changed(path: Path, place: int, content: bytes) -> Path:
    """A file with other bytes at a place."""
    whole = path.read_bytes()
    path.write_bytes(whole[:place] + content + whole[place + len(content) :])
    return path


@pytest.mark.parametrize("ending", ["edf", "bdf"])
def test_values_and_rates_are_those_that_mne_reads(tmp_path, ending):
    values = {"C3-M2": noise(40)[0], "EMG": noise(40, seed=1)[0] * 30}
    path = write_edf(tmp_path / f"a.{ending}", values, 100, stages=STAGES)
    ours = open_edf(path)
    read = mne.io.read_raw_edf if ending == "edf" else mne.io.read_raw_bdf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = read(path, preload=True, verbose="error")
    assert [channel.label for channel in ours.channels] == theirs.ch_names[:2]
    assert_allclose(np.stack(read_channels(ours, ours.channels)), theirs.get_data()[:2] * 1e6, atol=1e-6)
    assert {channel.rate_hz for channel in ours.channels} == {theirs.info["sfreq"]}
    annotations = [(onset, duration, text) for onset, duration, text in read_timeline(ours).annotations]
    assert annotations == [tuple(one) for one in STAGES]
    assert (ours.start, ours.num_records, ours.is_discontinuous) == (datetime.datetime(2000, 1, 1), 40, False)


def test_each_channel_has_its_own_rate(tmp_path):
    values = {"slow": noise(10, 10)[0], "fast": noise(10, 250)[0]}
    file = open_edf(write_edf(tmp_path / "a.edf", values, [10, 250]))
    assert [channel.rate_hz for channel in file.channels] == [10, 250]
    for read, name in zip(read_channels(file, file.channels), values, strict=True):
        assert_allclose(read, values[name], atol=0.02)


def test_records_that_follow_each_other_are_one_piece():
    evenly = Timeline(np.arange(6) * 0.1, ())
    assert evenly.pieces(0.1, 100) == ((0, 6),)
    assert Timeline(np.array([0.0, 0.3333, 0.6667, 1.0]), ()).pieces(1 / 3, 512) == ((0, 4),)  # rounded onsets
    assert Timeline(np.array([0.0, 1, 2, 2.9, 4]), ()).pieces(1, 100) == ((0, 3), (3, 1), (4, 1))
    drifting = Timeline(np.arange(1000) * 1.0003, ())  # set right every 0.1 s
    assert drifting.pieces(1, 100) == ((0, 334), (334, 334), (668, 332))


def test_onsets_that_are_missing_or_overlap_are_refused_in_a_discontinuous_file(tmp_path):
    path = write_edf(tmp_path / "a.edf", {"C3": noise(4)[0]}, 100, onsets=[0, 1, 1.5, 9])
    with pytest.raises(SmaltiError, match="is EDF\\+D, but record 3 of 4 has no onset or begins before the one before"):
        read_timeline(open_edf(path))
    plain = write_edf(tmp_path / "b.edf", {"C3": noise(4)[0]}, 100)
    with pytest.raises(SmaltiError, match="is EDF\\+D, but has no annotations that say when its records begin"):
        read_timeline(open_edf(changed(plain, 192, b"EDF+D")))


def test_a_record_that_begins_centuries_late_is_refused(tmp_path):
    path = write_edf(tmp_path / "a.edf", {"C3": noise(4)[0]}, 100, onsets=[0, 1, 2, 999999])
    path.write_bytes(path.read_bytes().replace(b"+999999\x14\x14" + bytes(6), b"+999999999999\x14\x14"))
    with pytest.raises(
        SmaltiError, match=r"record 4 of 4 begins 1e\+12 s after the start in the header; fewer than 1e"
    ):
        read_timeline(open_edf(path))


def test_a_continuous_file_whose_onsets_say_otherwise_has_gaps(tmp_path):
    path = write_edf(tmp_path / "a.edf", {"C3": noise(4)[0]}, 100, onsets=[0, 1, 7, 8])
    assert_array_equal(read_timeline(open_edf(changed(path, 196, b"C"))).onsets, [0, 1, 7, 8])
    zeros = write_edf(tmp_path / "b.edf", {"C3": noise(4)[0]}, 100, onsets=[0, 0, 0, 0])
    assert_array_equal(read_timeline(open_edf(changed(zeros, 196, b"C"))).onsets, [0, 1, 2, 3])  # nobody kept time


@pytest.mark.parametrize(
    ("start", "is_known"),
    [
        ("01.01.2022.30.00", True),
        ("01/01/2022:30:00", True),
        ("01.01.8500.00.00", False),
        ("00.00.0000.00.00", False),
        ("31.02.2000.00.00", False),
        ("XX.XX.XXXX.XX.XX", False),
    ],
)
def test_a_start_that_is_no_date_is_unknown(tmp_path, start, is_known):
    file = open_edf(write_edf(tmp_path / "a.edf", {"C3": noise(2)[0]}, 100, start=start))
    assert file.start == (datetime.datetime(2020, 1, 1, 22, 30) if is_known else None)


@pytest.mark.parametrize(
    ("place", "content", "match"),
    [
        (0, b"EDF", "doesn't begin with the header of one"),
        (252, b"9999", r"a header of 512 bytes for 9999 signals in a file of"),
        (252, b"-1  ", r"a header of 512 bytes for -1 signals"),
        (252, b"2   ", r"a header of 512 bytes for 2 signals"),
        (252, b"many", "its number of signals is 'many'"),
        (236, b"0       ", "holds 4 whole records of data, its header counts 0"),
        (236, b"1e999   ", "its number of records is '1e999'"),
        (244, b"0       ", "records of 0 s with 100 samples"),
        (244, b"nan     ", "records of nan s"),
        (472, b"0       ", "with 0 samples or more"),
        (472, b"99999999", "holds 0 whole records of data, its header counts 4"),
    ],
)
def test_a_header_that_contradicts_its_file_is_refused(tmp_path, place, content, match):
    path = write_edf(tmp_path / "a.edf", {"C3": noise(4)[0]}, 100)
    with pytest.raises(SmaltiError, match=match):
        open_edf(changed(path, place, content))


def test_a_header_that_promises_a_billion_records_needs_no_more_memory_than_the_file_holds(tmp_path):
    path = write_edf(tmp_path / "a.edf", {"C3": noise(4)[0]}, 100, counted=99_999_999)
    file = open_edf(path)
    assert (file.num_records, file.counted_records) == (4, 99_999_999)
    assert [len(values) for values in read_channels(file, file.channels)] == [400]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_damage_to_a_file_ends_in_anything_but_one_line(tmp_path, seed):
    rng = random.Random(seed)
    signals = {"C3-M2": noise(40)[0], "C4-M1": noise(40, seed=1)[0]}
    write_edf(tmp_path / "a.edf", signals, 100, stages=STAGES, onsets=[*range(35), *range(50, 55)])
    write_hypnogram(tmp_path / "a_hypnogram.edf", STAGES)
    originals = {path: path.read_bytes() for path in sorted(tmp_path.iterdir())}
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(50):
        path, content = rng.choice(list(originals.items()))
        damaged, header = bytearray(content), 256 * (1 + int(content[252:256]))
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(header if rng.random() < 0.8 else len(damaged))
            damaged[place] = rng.choice(b"0123456789-.e \x00\x14\x15\xffXn")
        path.write_bytes(bytes(damaged[: rng.choice([len(damaged), rng.randrange(len(damaged))])]))
        try:
            open_signals(tmp_path, SignalConfig(window_s=10.0))
        except SmaltiError as error:
            assert "\n" not in str(error)
        path.write_bytes(content)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 500_000


def test_records_of_annotations_alone_may_last_no_time(tmp_path):
    path = write_hypnogram(tmp_path / "h.edf", STAGES)
    annotations = read_timeline(open_edf(changed(path, 244, b"0       "))).annotations
    assert [text for _, _, text in annotations] == ["Sleep stage W", "Sleep stage N2"]
