"""The nearest name: the one that few typing errors lead to."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smalti.nearest import nearest, num_typos
from smalti.registry import listed


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("mea", "mae"), ("maee", "mae"), ("MAE", "mae"), ("dinvo2", "dinov2"), ("drop_pos", "droppos")],
)
def test_the_likelier_method_is_named(wrong: str, right: str) -> None:
    assert nearest(wrong, listed("method")) == right


def test_longer_names_are_found_by_what_they_have_in_common() -> None:
    assert nearest("num_prototype_vectors", ["num_prototypes", "hidden_dim"]) == "num_prototypes"


def test_nothing_is_nearest_where_nothing_is_near() -> None:
    assert nearest("zzz", ["steps", "seed"]) is None and nearest("x", []) is None


words = st.text("abc", max_size=6)


@given(words, words)
def test_typos_are_symmetric_and_none_only_between_equals(one: str, other: str) -> None:
    assert num_typos(one, other) == num_typos(other, one)
    assert (num_typos(one, other) == 0) == (one == other)
    assert abs(len(one) - len(other)) <= num_typos(one, other) <= max(len(one), len(other))


@given(
    st.text(
        "abcdef",
        min_size=2,
        max_size=6,
    ),
    st.data(),
)
def test_swapped_neighbours_are_one_typo(text: str, data: st.DataObject) -> None:
    i = data.draw(st.integers(0, len(text) - 2))
    swapped = text[:i] + text[i + 1] + text[i] + text[i + 2 :]
    assert num_typos(text, swapped) == (0 if text == swapped else 1)
