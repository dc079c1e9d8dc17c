"""Class labels of windows: from labels.csv, from a column, from folders; what could be read in two ways is refused."""

from pathlib import Path

import pytest

from signal_files import noise, save
from smalti.data.signals.signal_config import SignalConfig
from smalti.data.signals.signal_set import SignalSet, open_signals, target_of
from smalti.data.signals.window_labels import class_names
from smalti.errors import DataError

SECONDS = SignalConfig(window_s=2)


def labelled(root: Path, table: str, seconds: float = 20) -> SignalSet:
    if not (root / "a.npz").exists():
        save(root / "a.npz", noise(seconds))
        save(root / "b.npz", noise(seconds, seed=1))
    (root / "labels.csv").write_text(table)
    return open_signals(root, SECONDS)


def test_a_window_has_the_class_of_most_of_its_time(tmp_path):
    table = "file,start_s,end_s,label\na.npz,4,7.5,walk\na.npz,7.5,10.8,run\nb.npz,0,20,walk\n"
    signals = labelled(tmp_path, table)
    assert signals.classes == ("run", "walk")
    # of a.npz 0-2, 2-4: none; 4-6 walk; 6-8: 1.5 s walk; 8-10 run; 10-12: 0.8 s run, 1.2 s none; then none
    assert signals.window_classes.tolist() == [-1, -1, 1, 1, 0, -1, -1, -1, -1, -1] + [1] * 10
    assert (signals.stages == -1).all() and signals.labels is None
    assert "classes run 1, walk 12; 7 windows without a class" in signals.describe()
    assert "no stages" not in signals.describe()
    assert target_of(tmp_path) == "classes"


def test_windows_begin_where_the_first_label_does(tmp_path):
    signals = labelled(tmp_path, "file,start_s,end_s,label\na.npz,0.5,20,walk\n")
    assert signals.recordings[0].starts_s.tolist() == [0.5 + 2 * i for i in range(9)]
    assert signals.recordings[1].starts_s.tolist() == [2.0 * i for i in range(10)]
    assert signals.window_classes.tolist() == [0] * 9 + [-1] * 10


def test_a_column_labels_whole_recordings(tmp_path):
    save(tmp_path / "a.npz", noise(9))
    save(tmp_path / "b.npz", noise(6))
    (tmp_path / "recordings.csv").write_text("file,label,split\na.npz,10,train\nb.npz,9,test\n")
    signals = open_signals(tmp_path, SECONDS)
    assert signals.classes == ("9", "10") and signals.window_classes.tolist() == [1] * 4 + [0] * 3
    assert signals.labels is not None and signals.splits == ("train", "test")


def test_folders_are_classes_only_if_asked(tmp_path):
    for name in ("train/dog/1.npz", "train/cat/2.npz", "test/dog/3.npz"):
        save(tmp_path / name, noise(4))
    assert open_signals(tmp_path, SECONDS).classes is None and target_of(tmp_path) == "stages"
    by_folder = SignalConfig(window_s=2, labels="folders")
    signals = open_signals(tmp_path, by_folder)
    assert signals.names == ("test/dog/3.npz", "train/cat/2.npz", "train/dog/1.npz")
    assert signals.classes == ("cat", "dog") and signals.window_classes.tolist() == [1, 1, 0, 0, 1, 1]
    assert signals.splits == ("train", "test") and target_of(tmp_path, by_folder) == "classes"
    assert open_signals(tmp_path / "train", by_folder).window_classes.tolist() == [0, 0, 1, 1]
    for place in ("5.npz", "train/6.npz", "train/dog/night/7.npz", "yard/dog/8.npz"):
        save(tmp_path / place, noise(4))
        with pytest.raises(DataError, match=rf"{Path(place).name}: CLASS/FILE or SPLIT/CLASS/FILE is needed"):
            open_signals(tmp_path, by_folder)
        (tmp_path / place).unlink()


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ("a.npz,0,4,walk\na.npz,3,6,run\n", "a.npz is both walk and run from 3 s on; one class at a time is needed"),
        ("a.npz,0,9,walk\na.npz,1,2,walk\na.npz,5,6,run\n", "both walk and run from 5 s on"),
        ("a.npz,0,4,walk\nb.npz,0,4,Walk\n", "has the classes 'Walk' and 'walk'; are they one"),
        ("a.npz,4,4,walk\n", "line 2: from 4 to 4 s; 0 <= start_s < end_s is needed"),
        ("a.npz,-1,4,walk\n", "line 2: from -1 to 4 s"),
        ("a.npz,0,inf,walk\n", "line 2: from 0 to inf s"),
        ("a.npz,0,nan,walk\n", "line 2: from 0 to nan s"),
        ("a.npz,zero,4,walk\n", "line 2: start_s 'zero' and end_s '4' must be seconds"),
        ("a.npz,0,4,\n", "line 2: has no label; leave the line out"),
        ("a.npz,0,2000,walk\n", "lasts 20 s, but is labelled 'walk' from 0 to 2000 s; start_s and end_s are seconds"),
        ("a.npz,20,21,walk\n", "lasts 20 s, but is labelled 'walk' from 20 to 21 s"),
        ("c.npz,0,4,walk\n", "c.npz is no recording of this folder; no such file"),
        ("", "labels nothing"),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(tmp_path, rows, match):
    with pytest.raises(DataError, match=match) as error:
        labelled(tmp_path, "file,start_s,end_s,label\n" + rows)
    assert "\n" not in str(error.value)


def test_other_columns_and_two_sources_are_refused(tmp_path):
    with pytest.raises(
        DataError, match=r"has the columns file, label; file, start_s, end_s, label are needed, no others"
    ):
        labelled(tmp_path, "file,label\na.npz,walk\n")
    labelled(tmp_path, "file,start_s,end_s,label\na.npz,0,4,walk\n")
    with pytest.raises(DataError, match=r"has labels from labels\.csv and from data\.signal\.labels=folders; keep one"):
        open_signals(tmp_path, SignalConfig(window_s=2, labels="folders"))
    (tmp_path / "recordings.csv").write_text("file,label\na.npz,walk\n")
    with pytest.raises(DataError, match=r"labels from labels\.csv and from the column label of recordings\.csv"):
        open_signals(tmp_path, SECONDS)


def test_a_changed_label_is_read_again(tmp_path):
    first = labelled(tmp_path, "file,start_s,end_s,label\na.npz,0,4,walk\n")
    second = labelled(tmp_path, "file,start_s,end_s,label\na.npz,0,4,sits\n")
    assert (first.classes, second.classes) == (("walk",), ("sits",))


def test_classes_are_in_the_order_of_their_names_or_numbers():
    assert class_names(Path(), ["10", "9", "9"]) == ("9", "10")
    assert class_names(Path(), ["10", "9", "x"]) == ("10", "9", "x")
