"""Details survive their folder."""

import dataclasses

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import Image

from smalti.errors import DataError
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.details import read_details, write_details
from smalti.evaluation.tally import Tally, join_repetitions
from smalti.functional.colours import palette
from smalti.runs.baseline import evaluate


def test_details_survive_their_folder(tiny, scenes, greys, tmp_path):
    config = {"baseline": False, "own": {"linear-segmentation": {"epochs": 2}}}
    results = evaluate(tiny, "a", str(scenes), EvalConfig(protocols=("linear-segmentation",), **config))
    results += evaluate(tiny, "a", str(greys), EvalConfig(protocols=("knn",), baseline=False))
    write_details(tmp_path, results)
    for before, after in zip(results, read_details(tmp_path, results), strict=True):
        old, new = before.details, after.details
        assert (old.images, old.classes, dict(old.charts)) == (new.images, new.classes, dict(new.charts))
        assert old.tallies.keys() == new.tallies.keys()
        for metric, tally in old.tallies.items():
            assert_array_equal(tally.part, new.tallies[metric].part)
            assert_array_equal(tally.whole, new.tallies[metric].whole)
            assert tally.absent == new.tallies[metric].absent
        assert_array_equal(old.confusion, new.confusion)
        assert old.predictions.keys() == new.predictions.keys()
        for place, classes in old.predictions.items():
            assert_array_equal(classes, new.predictions[place])


def test_repetitions_and_many_classes_survive(tiny, greys, tmp_path):
    (result,) = evaluate(tiny, "a", str(greys), EvalConfig(protocols=("knn",), baseline=False))
    rng = np.random.default_rng(0)
    number = len(result.details.images)
    tally = join_repetitions([Tally(rng.random((number, 4)), np.ones((number, 4)), "zero") for _ in range(3)])
    maps = {0: np.array([[0, 700], [3, 65_000]])}
    details = dataclasses.replace(result.details, tallies={"x": tally}, predictions=maps)
    write_details(tmp_path, [dataclasses.replace(result, details=details)])
    (again,) = read_details(tmp_path, [result])
    assert_array_equal(again.details.tallies["x"].part, tally.part)
    assert again.details.tallies["x"].absent == "zero"
    assert_array_equal(again.details.predictions[0], maps[0])


def test_predictions_open_in_any_viewer_with_distinct_colours(tiny, scenes, tmp_path):
    config = EvalConfig(protocols=("linear-segmentation",), baseline=False, own={"linear-segmentation": {"epochs": 1}})
    write_details(tmp_path, evaluate(tiny, "a", str(scenes), config))
    with Image.open(next(tmp_path.glob("*/predictions/*.png"))) as image:
        assert image.mode == "P"
    colours = palette(256)
    assert len({tuple(colour) for colour in colours[:60]}) == 60


def test_what_pages_show_is_kept_once_for_all_protocols_of_an_encoder(tiny, scenes, tmp_path):
    config = EvalConfig(protocols=("linear-segmentation",), own={"linear-segmentation": {"epochs": 1}})
    ours, twin = evaluate(tiny, "a", str(scenes), config, figures=True)
    shown = ours.details.shown
    height, width = shown.grid
    assert shown.places == tuple(ours.details.predictions) == twin.details.shown.places
    assert shown.coordinates.shape[:2] == (len(shown.places), height * width)
    assert set(shown.pictures) == set(shown.truths) == set(shown.places)
    write_details(tmp_path, [ours, dataclasses.replace(ours), twin])
    assert len(list(tmp_path.glob("shown_*"))) == 2
    for before, result in zip((ours, ours, twin), read_details(tmp_path, [ours, ours, twin]), strict=True):
        after, before = result.details.shown, before.details.shown
        assert_array_equal(after.coordinates.numpy(), before.coordinates.numpy())
        assert (after.places, after.aspects, after.grid) == (before.places, before.aspects, before.grid)
        for place, truth in before.truths.items():
            assert_array_equal(after.truths[place], truth)
        assert after.pictures[shown.places[0]].shape == before.pictures[shown.places[0]].shape


def test_pages_show_nothing_that_was_not_asked_for(tiny, greys):
    (result,) = evaluate(tiny, "a", str(greys), EvalConfig(protocols=("knn",), baseline=False))
    assert result.details.shown is None
    (result,) = evaluate(tiny, "a", str(greys), EvalConfig(protocols=("knn",), baseline=False), figures=True)
    assert result.details.shown.places and not result.details.shown.truths


def test_a_folder_of_something_else_is_named(tmp_path):
    with pytest.raises(DataError, match="can't be read as a folder of details"):
        read_details(tmp_path, [])
