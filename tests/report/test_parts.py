"""Parts of pages as data."""

from smalti.report.parts import Picture, PictureBlock, PictureGroup, css_colour, text_table


def test_cells_that_a_row_lacks_are_empty():
    assert text_table(("a", "b"), [{"b": "1"}]).rows == (("", "1"),)


def test_extreme_aspects_are_cut_on_the_page():
    assert [PictureBlock("", (), aspect).shown_aspect for aspect in (0.1, 1.5, 9.0)] == [0.5, 1.5, 2.0]


def test_maps_of_patches_are_not_smoothed_and_photographs_are():
    assert Picture("", "data:image/png;base64,x", "").is_pixelated
    assert not Picture("", "data:image/jpeg;base64,x", "").is_pixelated


def test_a_group_is_as_wide_as_its_largest_block():
    one = Picture("", "", "")
    assert PictureGroup("", (PictureBlock("", (one,), 1.0), PictureBlock("", (one, one), 1.0))).num_columns == 2
    assert css_colour([1, 2, 3]) == "rgb(1,2,3)"
