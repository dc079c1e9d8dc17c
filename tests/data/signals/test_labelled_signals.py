"""Labelled recordings in two parts: every class in both, if it has the subjects. Sleep stages: test_signal_set.py."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from signal_files import noise, save
from smalti.data.signals.labelled_signals import draw_subjects, open_labelled_signals, strata
from smalti.data.signals.signal_config import SignalConfig
from smalti.errors import DataError

SECONDS = SignalConfig(window_s=2)


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    """20 recordings of dogs, 5 of cats, 1 of a cow, a subject each."""
    root = tmp_path_factory.mktemp("pets")
    labels = ["dog"] * 20 + ["cat"] * 5 + ["cow"]
    for number in range(len(labels)):
        save(root / f"r{number:02d}.npz", noise(4, seed=number))
    rows = [f"r{number:02d}.npz,{label}" for number, label in enumerate(labels)]
    (root / "recordings.csv").write_text("\n".join(["file,label", *rows]))
    return root


def classes_of(signals):
    return {signals.classes[place] for place in signals.window_classes}


@given(seed=st.integers(0, 1000))
@settings(max_examples=20)
def test_every_class_is_split_alike(pets, seed):
    labelled = open_labelled_signals(pets, SECONDS, target="classes", seed=seed)
    assert labelled.classes == ("cat", "cow", "dog") and labelled.train.target == "classes"
    assert classes_of(labelled.test) == {"cat", "dog"}  # the only cow is to learn from
    assert classes_of(labelled.train) == {"cat", "cow", "dog"}
    counts = labelled.test.count_classes()
    assert counts == {"cat": 2 * 1, "cow": 0, "dog": 2 * 4}
    assert not set(labelled.train.subjects) & set(labelled.test.subjects)


@given(seed=st.integers(0, 1000), small=st.floats(0.01, 1), large=st.floats(0.01, 1))
@settings(max_examples=20)
def test_every_draw_has_all_classes_and_is_part_of_a_larger_one(pets, seed, small, large):
    small, large = sorted((small, large))
    train = open_labelled_signals(pets, SECONDS, target="classes").train
    part, whole = (draw_subjects(train, share, seed) for share in (small, large))
    assert classes_of(part) == classes_of(train) and set(part.subjects) <= set(whole.subjects)


def test_subjects_with_several_classes_belong_to_their_rarest(tmp_path):
    for name in ("a", "b", "c"):
        save(tmp_path / f"{name}.npz", noise(4))
    rows = ["a.npz,0,2,walk", "a.npz,2,4,fall", "b.npz,0,4,walk", "c.npz,0,4,walk"]
    (tmp_path / "labels.csv").write_text("\n".join(["file,start_s,end_s,label", *rows]))
    labelled = open_labelled_signals(tmp_path, SECONDS, target="classes")
    assert {*labelled.train.subjects, *labelled.test.subjects} <= {"a", "b", "c"}
    assert "a" in labelled.train.subjects  # the only one who falls
    assert strata(labelled.train)[0] == ("a",)


def test_missing_labels_say_where_they_stand(tmp_path):
    save(tmp_path / "a.npz", noise(60), ["W", "N2"])
    with pytest.raises(
        DataError, match=r"no recording has class labels; they stand in labels\.csv .* \(eval\.signal\.labels=folders\)"
    ):
        open_labelled_signals(tmp_path, SignalConfig(), target="classes")
    (tmp_path / "labels.csv").write_text("file,start_s,end_s,label\na.npz,0,4,walk\n")
    with pytest.raises(
        DataError, match=r"no window of 30 s has a class for most of its time; set eval\.signal\.window_s"
    ):
        open_labelled_signals(tmp_path, SignalConfig(), target="classes")
