"""What doctor says of recordings: facts, files that can't be used, and settings that fit."""

import json
from pathlib import Path

import numpy as np

from command import smalti
from signal_files import noise, save
from smalti.data.signals.signal_config import SignalConfig
from smalti.preflight.dataset import look_at_data
from smalti.preflight.recording_scan import scan_recordings


def recording(path: Path, seconds: float, channels: tuple[str, ...], rate_hz: float = 100.0) -> Path:
    values = noise(seconds, rate_hz=rate_hz, channels=len(channels), seed=len(path.name))
    return save(path, values, channels=np.array(channels), rate_hz=rate_hz)


def test_facts_and_a_table_of_classes(tmp_path):
    recording(tmp_path / "a.npz", 60, ("x", "y"), 50)
    recording(tmp_path / "b.npz", 100, ("x", "y"), 50)
    (tmp_path / "recordings.csv").write_text("file,split,label\na.npz,train,up\nb.npz,test,down\n")
    report = look_at_data(str(tmp_path), None)
    text, size = report.lines(), sum(file.stat().st_size for file in tmp_path.glob("*.npz")) / 2**20
    assert text[1].startswith("read as      signals: 2 recordings of 2 subjects (train 1, test 1); 5 windows of 30 s")
    assert text[2:7] == [
        f"recordings   2 ({size:,.1f} MiB)",
        "channels     x: 2, y: 2; read: x, y",
        "rate         50 Hz: 2",
        "length       60 to 100 s (median 100)",
        "kept         windows of 30 s, 0.3 to 22.5 Hz at 100 Hz",
    ]
    assert text[7:] == [
        "classes      2; windows of train, test:",
        "  down: 0, 3",
        "  up: 2, 0",
        "unusable     0",
        "settings     data.signal.resample_hz=50",
    ]
    assert report.problems == []
    assert scan_recordings(str(tmp_path), SignalConfig(resample_hz=50))[1].proposed == {}


def test_every_file_that_can_not_be_used_has_a_line(tmp_path):
    for name in "abc":
        recording(tmp_path / f"{name}.npz", 90, ("C3-M2", "C4-M1"))
    (tmp_path / "b.npz").write_bytes((tmp_path / "b.npz").read_bytes()[:1000])
    flat = noise(90, channels=2)
    flat[1] = 3.0
    save(tmp_path / "d.npz", flat, channels=np.array(("C3-M2", "C4-M1")))
    done = smalti("doctor", tmp_path, "--json", tmp_path / "facts.json")
    lines = done.stdout.splitlines()
    place = lines.index("unusable     2")
    assert lines[place + 1].startswith(f"  {tmp_path}/b.npz: can't be read as an array of numbers")
    assert lines[place + 2] == f"  {tmp_path}/d.npz: channel C4-M1 is flat; choose others with data.signal.channels"
    assert "read as      signals: 2 recordings of 2 subjects" in done.stdout
    assert "! 2 of 4 recordings can't be used, and training refuses the folder; repair or remove them" in lines[-1]
    plain = json.loads((tmp_path / "facts.json").read_text())["data"]["recordings"]
    assert [one["path"].rpartition("/")[2] for one in plain["unusable"]] == ["b.npz", "d.npz"]
    assert plain["count"] == 4 and plain["read"] == ["C3-M2", "C4-M1"]


def test_settings_follow_from_channels_lengths_and_labels(tmp_path):
    recording(tmp_path / "a.npz", 90, ("C3-M2", "C4-M1"))
    recording(tmp_path / "b.npz", 25, ("C4-M1", "EMG"))
    _, scan = scan_recordings(str(tmp_path), SignalConfig())
    assert scan.channels == {"C3-M2": 1, "C4-M1": 2, "EMG": 1} and scan.lengths_s == (25.0, 90.0)
    assert scan.proposed == {"data.signal.channels": "C4-M1", "data.signal.window_s": "20"}
    assert "lasts 25.0 s at 100 Hz, a window is 30 s" in scan.unusable[0].reason
    assert scan_recordings(str(tmp_path), SignalConfig(channels=("C4-M1",), window_s=20))[1].proposed == {}
    rows = ["a.npz,0,40,calm", "a.npz,45,52,jump", "a.npz,55,90,calm", "b.npz,0,25,calm"]
    (tmp_path / "labels.csv").write_text("\n".join(["file,start_s,end_s,label", *rows]))
    _, scan = scan_recordings(str(tmp_path), SignalConfig(channels=("C4-M1",), window_s=20))
    assert scan.problems == ["no window of 20 s has class jump for most of its time"]
    assert scan.proposed == {"data.signal.window_s": "5"}
    assert scan_recordings(str(tmp_path), SignalConfig(channels=("C4-M1",), window_s=5))[1].problems == []
    _, scan = scan_recordings(str(tmp_path), SignalConfig(channels=("C4-M1",), window_s=2.56, resample_hz=100))
    assert scan.proposed["encoder.patch_size"] == "64"  # of the divisors of 256, the nearest to 50


def test_a_subject_in_two_splits_and_stages(tmp_path):
    for number in range(2):
        save(tmp_path / f"{number}.npz", noise(90, seed=number), ["W", "N2", "N2"])
    (tmp_path / "recordings.csv").write_text("file,subject,split\n0.npz,anna,train\n1.npz,anna,test\n")
    report = look_at_data(str(tmp_path))
    assert report.problems == ["subject anna is in several splits, which evaluation refuses; a split is by subject"]
    text = report.lines()
    assert text[text.index("stages       5; windows of train, test:") + 1 :][:3] == [
        "  W: 1, 1",
        "  N1: 0, 0",
        "  N2: 2, 2",
    ]


def test_no_recordings_and_no_common_channel_are_one_line(tmp_path):
    done = smalti("doctor", f"signals={tmp_path}", code=2)
    assert "no recordings found" in done.stderr and done.stderr.count("\n") == 1
    recording(tmp_path / "a.npz", 40, ("x",))
    recording(tmp_path / "b.npz", 40, ("y",))
    done = smalti("doctor", tmp_path, code=2)
    assert "has none of the channels x of a.npz; it has: y" in done.stderr and done.stderr.count("\n") == 1
    for name in ("a.npz", "b.npz"):
        (tmp_path / name).write_bytes(b"nothing")
    report = look_at_data(str(tmp_path))
    assert report.account == "signals: 2 recordings, none can be used"
    assert "unusable     2" in report.lines()
