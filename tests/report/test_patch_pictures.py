import base64

import cv2
import numpy as np
import torch

from smalti.functional.colours import palette
from smalti.functional.components import reduce_patches
from smalti.report.patch_pictures import (
    boxes_picture,
    crop_images,
    image_uri,
    overlay,
    patch_tokens,
    pca_maps,
    similarity_picture,
)


def test_two_materials_get_two_colours():
    patches = torch.zeros(1, 16, 5)
    patches[0, 8:, 2] = 3.0
    colours = pca_maps(reduce_patches(patches, 3)[0], (4, 4))
    assert colours.shape == (1, 4, 4, 3)
    assert len(np.unique(colours.reshape(-1, 3), axis=0)) == 2
    assert (colours[0, :2] == colours[0, 0, 0]).all() and (colours[0, 2:] == colours[0, 3, 3]).all()


def test_equal_patches_are_grey_and_give_no_nan():
    coordinates, explained = reduce_patches(torch.ones(2, 4, 3), 3)
    assert explained == 1.0 and (pca_maps(coordinates, (2, 2)) == 128).all()


def test_crops_have_the_encoders_shape_and_the_pictures_more_pixels():
    image = np.zeros((300, 500, 3), np.uint8)
    image[100:200, 200:300] = 255
    shown = crop_images(["x"], [image], (32, 64), view_px=256)
    assert shown.inputs[0].shape == (32, 64, 3) and shown.pictures[0].shape == (128, 256, 3)
    small = crop_images(["x"], [image[:20, :20]], (32, 64), view_px=256)
    assert small.pictures[0].shape == (32, 64, 3)


def test_any_channels_become_a_picture():
    for channels in (1, 2, 3, 5):
        image = np.linspace(0, 0.1, 16 * 16 * channels, dtype=np.float32).reshape(16, 16, channels)
        picture = crop_images(["x"], [image], (16, 16), 16).pictures[0]
        assert picture.shape == (16, 16, 3) and picture.dtype == np.uint8 and picture.max() == 255


def test_an_image_address_keeps_its_pixels():
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    uri = image_uri(image, ".png")
    data = np.frombuffer(base64.b64decode(uri.removeprefix("data:image/png;base64,")), np.uint8)
    assert (cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB) == image).all()


def test_patch_tokens_are_those_of_the_encoder_in_eval_mode(encoder):
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    encoder.train()
    tokens, grid = patch_tokens(encoder, list(images), batch_size=2)
    assert encoder.training
    with torch.no_grad():
        features = encoder.eval().encode(torch.from_numpy(images).permute(0, 3, 1, 2))
    assert grid == features.grid
    torch.testing.assert_close(tokens, features.patches, atol=1e-5, rtol=1e-5)


def test_an_overlay_shows_the_colours_of_its_classes_and_void_stays_grey():
    classes = np.array([[0, 1], [2, -1]])
    picture = overlay(np.full((40, 40, 3), 120, np.uint8), classes)
    for (row, column), value in np.ndenumerate(classes):
        colour = picture[row * 20 + 10, column * 20 + 10].astype(int)
        wanted = 0.3 * 120 + 0.7 * palette(3)[value].astype(float) if value >= 0 else np.full(3, 0.6 * 120 + 100)
        assert np.abs(colour - wanted).max() <= 1


def test_frames_lie_around_their_objects_in_the_colours_of_their_classes():
    boxes = np.array([[0.1, 0.2, 0.5, 0.6], [0.6, 0.6, 1.0, 1.0]])
    picture = boxes_picture(np.full((50, 100, 3), 120, np.uint8), boxes, np.array([0, 2]))
    assert picture.shape == (100, 200, 3)
    for (x0, y0, x1, y1), label in zip(boxes * np.array([199, 99, 199, 99]), (0, 2), strict=True):
        for row, column in ((y0, (x0 + x1) / 2), (y1, (x0 + x1) / 2), ((y0 + y1) / 2, x0), ((y0 + y1) / 2, x1)):
            assert picture[round(row), round(column)].tolist() == palette(4)[label + 1].tolist()
        assert len(set(picture[round((y0 + y1) / 2), round((x0 + x1) / 2)].tolist())) == 1
    empty = boxes_picture(np.zeros((8, 8, 3), np.uint8), np.zeros((0, 4)), np.zeros(0, np.int64))
    assert empty.shape == (16, 16, 3) and np.ptp(empty) == 0


def test_the_framed_patch_is_most_similar_to_itself():
    coordinates = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    picture = similarity_picture(np.zeros((160, 160, 3), np.uint8), coordinates, (4, 4), 5)
    centres = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)[20::40, 20::40]
    assert centres.argmax() == 5 and picture[40, 60].tolist() == [255, 255, 255]
