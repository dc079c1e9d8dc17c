import numpy as np
import pytest

from smalti.functional.colours import OKABE_ITO, palette, seen


def test_known_colours_have_known_lightness():
    full, protan, deutan = seen(np.array([[255, 255, 255], [0, 0, 0], [255, 0, 0]]))
    assert full[0] == pytest.approx([100, 0, 0], abs=0.01) and full[1] == pytest.approx([0, 0, 0], abs=0.01)
    assert full[2] == pytest.approx([53.24, 80.09, 67.20], abs=0.05)  # CIE 1976, D65
    assert protan[0, 0] == pytest.approx(100, abs=0.1) and deutan[0, 0] == pytest.approx(100, abs=0.1)
    assert protan[2, 0] < full[2, 0] - 10  # red is dark to protanopes


@pytest.mark.parametrize(("number", "least"), [(8, 15), (20, 15), (40, 10), (60, 8)])
def test_every_kind_of_eye_tells_the_colours_apart(number, least):
    views = seen(palette(number))
    apart = np.linalg.norm(views[:, :, None] - views[:, None], axis=-1) + 1e3 * np.eye(number)
    assert apart.min() > least  # just noticeable: about 2.3


def test_more_colours_leave_the_first_as_they_are():
    assert (palette(8) == np.array(OKABE_ITO)).all() and (palette(200)[:30] == palette(30)).all()
    assert palette(0).shape == (0, 3) and len({tuple(colour) for colour in palette(256)}) == 256
