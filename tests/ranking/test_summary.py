"""A ranking as pages show it: which orders, columns and curves, and what they are called."""

from pathlib import Path

import numpy as np

from small_ranking import small_ranking
from smalti.ranking.summary import (
    agreement_tables,
    class_ranks,
    class_table,
    curve_charts,
    curve_table,
    order_table,
    pictured_images,
)


def test_tables_have_a_row_for_each_order_and_explain_their_columns(photos: Path):
    ranking = small_ranking(photos)
    table = order_table(ranking)
    assert [row[0] for row in table.rows] == ["collapse", "variance"]
    assert table.columns[1] == "position variance ratio" and set(table.meanings) == set(table.columns[1:])
    assert all(len(row) == len(table.columns) for row in table.rows) and "for random sets" in str(table.meanings)
    tables = agreement_tables(ranking)
    assert tables[""].rows[0][:2] == ("collapse", "variance")
    assert tables["Another training"].rows[0][:3] == ("collapse", "the other training", "1.000")


def test_curves_are_charted_with_the_random_order_in_grey_and_scored_best_first(photos: Path):
    ranking = small_ranking(photos)
    charts = curve_charts(ranking)
    assert [chart.title for chart in charts] == ["Variance left", "Entropy left"]
    assert [(line.name, line.is_baseline) for line in charts[0].lines] == [("random", True), ("collapse", False)]
    table = curve_table(ranking)
    assert [row[0] for row in table.rows] == ["random", "collapse", "collapse_shuffled"]
    assert table.rows[0][-2] == "" and table.rows[1][-2].startswith("+0.")


def test_pictured_images_have_their_own_order_and_a_random_one(photos: Path):
    first, *others = list(pictured_images(small_ranking(photos), 3))
    assert len(others) == 2 and first.main == "collapse" and first.has_scores
    assert list(first.orders) == ["collapse", "collapse_static", "random"]
    assert np.argmax(first.values) == first.orders["collapse"][0]


def test_classes_have_a_row_each_and_colours_of_one_scale(photos: Path):
    classes = small_ranking(photos, num_classes=3).by_class["collapse"]
    table = class_table(classes)
    assert [row[0] for row in table.rows] == ["<class> 0", "<class> 1", "<class> 2"]
    assert table.columns == ("class", "num images", "static ratio", "same class", "other classes")
    assert set(table.meanings) == set(table.columns[1:]) and table.rows[0][1] == str(classes[0].num_images)
    everything, *each = class_ranks(classes)
    assert everything.name == "all images" and [one.name for one in each] == [row[0] for row in table.rows]
    values = np.stack([everything.values, *(one.values for one in each)])
    assert (values.min(), values.max()) == (0, 1)
    assert np.argmax(each[1].values) == int(classes[1].mean_rank.argmin())  # pale: first
    sizes = np.array([one.num_images for one in classes])
    assert np.allclose(sizes / sizes.sum() @ values[1:], everything.values)
    assert everything.static_ratio < min(one.static_ratio for one in each)  # chance: 1 / images
