"""What pages show of a log: its most important numbers. The listeners themselves are tested in ``test_loop.py``."""

import math

from smalti.training.logs import LOG_COLUMNS, UNDRAWN_COLUMNS, log_facts


def test_the_facts_of_a_log_are_those_of_the_columns_that_it_has():
    log = {"loss": [2.0, 1.5, math.nan], "memory_mib": [1024.0, 2048.0], "images_per_s": [3.0, 5.0, 400.0]}
    assert log_facts(log) == [
        ("1.500", "loss at the end"),
        ("5", "images per second, median"),
        ("2.0 GiB", "highest memory use"),
    ]
    assert log_facts({"loss": [math.nan]}) == []


def test_every_column_is_explained_or_needs_no_chart():
    assert not set(LOG_COLUMNS) & set(UNDRAWN_COLUMNS)
    assert all(column.title and column.meaning.endswith(".") for column in LOG_COLUMNS.values())
