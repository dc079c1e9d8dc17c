"""Maps of patch tokens: the same images for all arms."""

from smalti.report.details import detail_sections
from smalti.report.evaluated import Evaluated
from smalti.report.patch_maps import token_maps


def test_only_images_that_all_arms_have_get_feature_maps(make_result, page_of):
    arms = {"a": [make_result(0)], "b": [make_result(1, places=(2,))]}
    page = page_of(detail_sections([Evaluated("d", "p", arms)]))
    maps = [alt for alt in page.attributes("alt") if alt.startswith("PCA map")]
    assert maps == ["PCA map of c <b>.png by a", "PCA map of c <b>.png by b"]


def test_each_group_says_its_grids_and_components(evaluated):
    maps = token_maps([evaluated])
    assert "two: 2 × 3 patches of an image of 64 px" in maps.components[0].lead
    assert maps.similarities[0][0] == 5 and maps.components[0].num_columns == 4


def test_without_tokens_there_is_no_group(make_result):
    assert not token_maps([Evaluated("d", "p", {"a": [make_result(0, keep=False)]})]).components
