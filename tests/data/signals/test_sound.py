"""WAV and FLAC: the samples that soundfile wrote, by block; missing packages and damaged files in one line."""

import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose

from smalti.data.signals import sound
from smalti.data.signals.recordings import channel_names, read_signal
from smalti.data.signals.signal_config import SignalConfig
from smalti.data.signals.signal_set import is_signals, open_signals
from smalti.errors import ConfigError, DataError, MissingExtraError

HEARD = SignalConfig(resample_hz=4000, low_hz=50, high_hz=1500, window_s=0.5)


def write_wav(path: Path, values: np.ndarray, rate_hz: int = 8000) -> Path:
    """16-bit PCM, by the format's definition."""
    stored = np.rint(values * 32767).astype("<i2").T.tobytes()
    channels = len(values)
    form = struct.pack("<HHIIHH", 1, channels, rate_hz, rate_hz * 2 * channels, 2 * channels, 16)
    content = b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", len(stored)) + stored
    path.write_bytes(b"RIFF" + struct.pack("<I", len(content)) + content)
    return path


def tone(hz: float, seconds: float = 2, rate_hz: int = 8000) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hz * np.arange(int(seconds * rate_hz)) / rate_hz)


@pytest.mark.parametrize("ending", ["wav", "flac", "WAV"])
def test_samples_and_rate_are_those_of_the_file(tmp_path, ending, monkeypatch):
    soundfile = pytest.importorskip("soundfile")
    monkeypatch.setattr(sound, "_BLOCK_FRAMES", 1000)  # several blocks
    values = np.stack([tone(200), tone(900)])
    path = tmp_path / f"a.{ending}"
    if ending == "flac":
        soundfile.write(path, values.T, 8000)
    else:
        write_wav(path, values)
    assert channel_names(path) == ("ch1", "ch2")
    raw = read_signal(path, ("ch2", "ch1"))
    assert raw.rates_hz == (8000, 8000)
    assert_allclose(np.stack(raw.pieces[0].values), values[::-1], atol=1e-4)


def test_a_folder_of_sound_is_signals_and_keeps_its_band(tmp_path):
    pytest.importorskip("soundfile")
    for name, hz in (("a", 300.0), ("b", 1000.0)):
        write_wav(tmp_path / f"{name}.wav", tone(hz)[None])
    assert is_signals(tmp_path)
    signals = open_signals(tmp_path, HEARD)
    assert len(signals) == 8 and signals.channels == ("ch1",)
    peaks = [np.abs(np.fft.rfft(signals.read(i)[0, :, 0])).argmax() * 2 for i in (0, 4)]  # bins of 2 Hz
    assert peaks == [300, 1000]


def test_sound_is_not_read_as_eeg(tmp_path):
    pytest.importorskip("soundfile")
    write_wav(tmp_path / "a.wav", tone(300)[None])
    with pytest.raises(ConfigError, match=r"a\.wav: is sound, but 0\.3 to 35 Hz at 100 Hz are kept, as for EEG; set"):
        open_signals(tmp_path, SignalConfig())


def test_damaged_sound_is_one_line(tmp_path):
    pytest.importorskip("soundfile")
    path = write_wav(tmp_path / "a.wav", tone(300)[None])
    for content in (b"", b"RIFF", path.read_bytes()[:30], b"\x00" * 100):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.wav: can't be read as sound") as error:
            open_signals(tmp_path, HEARD)
        assert "\n" not in str(error.value)


def test_without_soundfile_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    write_wav(tmp_path / "a.wav", tone(300)[None])
    with pytest.raises(
        MissingExtraError, match=r'a\.wav: reading sound needs soundfile: pip install "smalti\[audio\]"'
    ):
        open_signals(tmp_path, HEARD)
