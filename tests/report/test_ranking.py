"""The page of a ranking: tables, curves and pictures, with text from elsewhere escaped."""

from pathlib import Path

from htmlpage import check_page
from small_ranking import small_ranking
from smalti.report.ranking import write_page


def test_the_page_has_orders_agreement_curves_and_pictures(photos: Path, tmp_path: Path):
    page = check_page(write_page(tmp_path / "orders.html", small_ranking(photos), 2, "smalti rank <x>"))
    for words in (
        "Ranking by a <b> toy",
        "images ranked",
        "Another training",
        "Variance left",
        "What the first patches reveal",
        "order of collapse",
        "random, 8 of 16",
        "smalti rank <x>",
        "1 min 01 s",
    ):
        assert words in page.text, words
    assert (tmp_path / "orders.png").is_file()
    assert {"Variance left", "Entropy left"} <= set(page.attributes("aria-label"))


def test_without_a_predictor_and_pictures_these_sections_are_missing(photos: Path, tmp_path: Path):
    page = check_page(write_page(tmp_path / "orders.html", small_ranking(photos, with_curves=False), 0))
    assert not {"curves", "pictures"} & set(page.attributes("id")) and not (tmp_path / "orders.png").exists()


def test_images_of_classes_have_a_map_of_each_class(photos: Path, tmp_path: Path):
    page = check_page(write_page(tmp_path / "orders.html", small_ranking(photos, num_classes=2), 0))
    assert "classes" in page.attributes("id") and "<class> 1 · 0." in page.text and "static ratio" in page.text
    assert sum(alt.startswith("mean ranks of collapse: ") for alt in page.attributes("alt")) == 3
    without = check_page(write_page(tmp_path / "orders.html", small_ranking(photos), 0))
    assert "classes" not in without.attributes("id")
