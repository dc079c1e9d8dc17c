import math
import re

import cv2
import numpy as np
import pytest
import torch

from smalti.errors import ConfigError
from smalti.functional.components import reduce_patches
from smalti.report.figures import (
    crop_images,
    hero_figure,
    image_uri,
    line_chart,
    patch_tokens,
    pca_maps,
    quantise,
    telling_patch,
)


def test_two_materials_get_two_colours():
    patches = torch.zeros(1, 16, 5)
    patches[0, 8:, 2] = 3.0
    colours = pca_maps(reduce_patches(patches, 3)[0], (4, 4))
    assert colours.shape == (1, 4, 4, 3)
    assert len(np.unique(colours.reshape(-1, 3), axis=0)) == 2
    assert (colours[0, :2] == colours[0, 0, 0]).all() and (colours[0, 2:] == colours[0, 3, 3]).all()


def test_equal_patches_are_grey_and_give_no_nan():
    coordinates, share = reduce_patches(torch.ones(2, 4, 3), 3)
    assert share == 1.0 and (pca_maps(coordinates, (2, 2)) == 128).all()
    assert not quantise(coordinates).any()


def test_rounding_to_bytes_keeps_cosines():
    coordinates = torch.randn(2, 50, 32, generator=torch.Generator().manual_seed(0))
    unit = torch.nn.functional.normalize(coordinates.flatten(0, 1), dim=-1)
    rounded = torch.nn.functional.normalize(quantise(coordinates).flatten(0, 1).float(), dim=-1)
    assert (rounded @ rounded.T - unit @ unit.T).abs().max() < 0.02


def test_the_telling_patch_lies_in_the_middle():
    codes = quantise(torch.randn(3, 64, 8, generator=torch.Generator().manual_seed(0)))
    image, patch = telling_patch(codes, (8, 8))
    assert 0 <= image < 3 and 2 <= patch // 8 < 6 and 2 <= patch % 8 < 6


def test_a_chart_takes_its_colours_from_the_page():
    lines = {"a <b>": ([1.0, 2.0, 3.0], [1.0, math.nan, 3.0]), "c": ([1.0, 2.0, 1.0], [2.0, 1.0, 0.5])}
    svg = line_chart('Loss "&" more', lines, marks=(2.0,), levels={"c": 1.5})
    assert svg.startswith('<svg role="img" aria-label="Loss &quot;&amp;&quot; more"')
    assert "currentColor" in svg and "var(--c1)" in svg and "var(--c2)" in svg
    assert "a &lt;b&gt;" in svg and "http" not in svg and "nan" not in svg.lower()
    colours = set(re.findall(r"#[0-9a-f]{6}\b", svg))
    assert not colours


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
    import base64

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


def test_the_hero_is_a_picture_of_three_columns(encoder, tmp_path):
    images = list(np.random.default_rng(0).integers(0, 256, (2, 80, 70, 3), dtype=np.uint8))
    path = hero_figure(encoder, images, tmp_path / "hero.png")
    height, width = cv2.imread(str(path)).shape[:2]
    assert width > height > 300
    with pytest.raises(ConfigError, match="can't be written"):
        hero_figure(encoder, images, tmp_path / "hero.png" / "below.png")
