"""Pictures of attention: a row for each query, pale where the weight is."""

import numpy as np
import torch

from smalti.evaluation.attention_pictures import GAP_PX, TILE_PX, attention_picture

STEP = TILE_PX + GAP_PX


def tile(picture, row, column):
    return picture[row * STEP : row * STEP + TILE_PX, column * STEP : column * STEP + TILE_PX].astype(int)


def test_the_attended_patch_is_pale_and_the_query_framed():
    attention = torch.zeros(2, 2, 16)  # two heads, two queries
    attention[0, :, 5] = 1
    attention[1, :, 10] = 1
    grey = np.full((64, 64, 3), 90, np.uint8)
    picture = attention_picture(grey, attention, (4, 4), [None, 3])
    assert picture.shape == (2 * STEP - GAP_PX, 4 * STEP - GAP_PX, 3)
    cell = TILE_PX // 4
    for row in (0, 1):
        first, second = tile(picture, row, 2), tile(picture, row, 3)
        assert first[cell + 5, cell + 5].sum() > 600 and first[2 * cell + 5, 2 * cell + 5].sum() < 20
        assert second[2 * cell + 5, 2 * cell + 5].sum() > 600 and second[cell + 5, cell + 5].sum() < 20
        mean = tile(picture, row, 1)
        assert mean[cell + 5, cell + 5].sum() == mean[2 * cell + 5, 2 * cell + 5].sum() > 600
    assert (tile(picture, 0, 0) == 90).all()
    framed = tile(picture, 1, 0)
    assert (framed[:cell, 3 * cell :] != 90).any() and (framed[cell + 3 :] == 90).all()


def test_wide_images_have_wide_tiles_and_equal_weights_are_all_pale():
    picture = attention_picture(np.zeros((8, 8, 3), np.uint8), torch.full((1, 1, 4), 0.25), (2, 2), [None], aspect=1.5)
    assert picture.shape[1] == 3 * round(1.5 * TILE_PX) + 2 * GAP_PX
    assert picture[5, -5].sum() > 600
