"""Pictures of predictions: classes of pixels and objects, for every arm."""

import dataclasses

import numpy as np

from smalti.evaluation.details import read_details, write_details
from smalti.evaluation.result import Boxes
from smalti.report.details import detail_sections
from smalti.report.evaluated import Evaluated
from smalti.report.prediction_pictures import sheet_groups

EVIL = "<script>alert(1)</script>"


def test_without_kept_pictures_predictions_are_shown_alone_and_the_page_says_so(make_result, page_of):
    page = page_of(detail_sections([Evaluated("d", "p", {"a": [make_result(0, keep=False)]})]))
    assert "The images themselves were not kept" in page.text and "No patch tokens were kept" in page.text
    assert sum(tag == "img" for tag, _ in page.elements) == 2


def test_objects_found_stand_beside_the_true_ones_also_when_read_from_disk(make_result, page_of, tmp_path):
    true = Boxes(np.array([[0.1, 0.2, 0.5, 0.6]]), np.array([1]), np.ones(1))
    nothing = Boxes(np.zeros((0, 4)), np.zeros(0, np.int64), np.zeros(0))
    results = []
    for seed, found in ((0, true), (1, nothing)):
        plain = make_result(seed)
        details = dataclasses.replace(plain.details, predictions={}, found={0: (true, found), 2: (nothing, nothing)})
        results.append(dataclasses.replace(plain, protocol="detection", details=details))
    write_details(tmp_path / "details", results)
    again = read_details(tmp_path / "details", results)
    for old, new in zip(results, again, strict=True):
        assert old.details.found.keys() == new.details.found.keys()
        for pair, other in zip(old.details.found.values(), new.details.found.values(), strict=True):
            for one, two in zip(pair, other, strict=True):
                assert np.array_equal(one.boxes, two.boxes) and np.array_equal(one.labels, two.labels)
                assert np.array_equal(one.scores, two.scores)
    arms = {"ours": [again[0]], "untrained": [again[1]]}
    page = page_of(detail_sections([Evaluated("d", "detection", arms)], with_tokens=False))
    alts = [alt for alt in page.attributes("alt") if alt.endswith("a.png")]
    assert sorted(alts) == ["ours: a.png", "truth: a.png", "untrained: a.png"]
    assert EVIL in page.text


def test_sheets_of_protocols_are_shown_with_their_captions(make_result, page_of):
    plain = make_result(0)
    sheet = np.zeros((8, 8, 3), np.uint8)
    details = dataclasses.replace(plain.details, pictures={"generated <b>": sheet})
    one = Evaluated("d", "p", {"a": [dataclasses.replace(plain, details=details)]})
    assert [group.title for group in sheet_groups([one])] == ["p on d"]
    page = page_of(detail_sections([one]))
    assert "generated <b>" in page.attributes("alt") and "generated <b>" in page.text
