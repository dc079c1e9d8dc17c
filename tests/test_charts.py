"""Charts as data: what they say of themselves, and their way to JSON and back."""

import json
import math

from hypothesis import given
from hypothesis import strategies as st

from smalti.charts import Line, LineChart, chart_tree, layer_chart, loss_chart, read_chart

numbers = st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), min_size=1, max_size=5).map(tuple)


@given(
    y=numbers, name=st.text(max_size=5), section=st.text(max_size=5), levels=st.lists(st.text(max_size=3)).map(tuple)
)
def test_a_chart_comes_back_from_json(y, name, section, levels):
    chart = LineChart("t", "e", (Line(y, name=name, low=y, role="control"),), section, levels=levels, is_wide=True)
    text = json.dumps(chart_tree(chart), allow_nan=False)
    assert repr(read_chart(json.loads(text))) == repr(chart)  # NaN differs from itself


def test_a_line_without_places_starts_at_one():
    assert Line((5.0, 6.0)).steps == (1.0, 2.0) and Line((5.0,), (9.0,)).steps == (9.0,)


def test_a_chart_in_which_nothing_changes_is_constant():
    assert loss_chart([0.5, 0.5, math.nan]).is_constant and layer_chart("t", "e", []).is_constant
    assert not loss_chart([0.5, 0.6]).is_constant
    assert not LineChart("t", "e", (Line((0.0, 0.0), low=(0.0, 0.0), high=(0.1, 0.1)),)).is_constant
    assert not LineChart("t", "e", (Line((0.5, 0.5)), Line((0.7, 0.7)))).is_constant
