"""Inner layers: equal to a network cut there, side by side where several are read."""

import pytest
import torch

from smalti.errors import ConfigError
from smalti.models.build import build_encoder
from smalti.models.inner_layers import InnerLayers
from smalti.models.loading import load


@pytest.fixture(scope="module", params=["vit_tiny_patch16_224", "vit_small_patch16_dinov3"])
def encoder(request):
    return build_encoder(request.param, img_size=32, patch_size=8, depth=4, seed=0).eval()


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (2, 3, 32, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_the_last_layer_is_the_encoder(encoder, images):
    read, whole = InnerLayers(encoder, [4]).encode(images), encoder.encode(images)
    assert torch.equal(read.patches, whole.patches) and torch.equal(read.prefix, whole.prefix)


@torch.no_grad()
def test_layers_lie_side_by_side_in_the_order_they_are_named(encoder, images):
    both, plain = InnerLayers(encoder, [3, 1]), InnerLayers(encoder, [3, 1]).encode(images, norm=False)
    assert both.embed_dim == 2 * encoder.embed_dim
    third, first = (InnerLayers(encoder, [layer]).encode(images) for layer in (3, 1))
    assert torch.equal(both.encode(images).patches, torch.cat([third.patches, first.patches], -1))
    assert both.pooled(both.encode(images)).shape == (2, 2 * encoder.embed_dim)
    assert not torch.allclose(plain.patches, both.encode(images).patches)


@torch.no_grad()
def test_an_encoder_of_fewer_blocks_is_the_inner_layer(images):
    whole = load("random:vit_tiny_patch16_224", img_size=32)
    images = images[..., :32]
    cut = load("random:vit_tiny_patch16_224", img_size=32, depth=5)
    assert cut.depth == 5 and cut.config()["model_args"]["depth"] == 5
    assert torch.equal(cut.encode(images).patches, InnerLayers(whole, [5]).encode(images).patches)


def test_what_can_not_be_read(encoder, images):
    for layers in ([], [0], [5]):
        with pytest.raises(ConfigError, match=r"has the blocks 1 to 4"):
            InnerLayers(encoder, layers)
    with pytest.raises(ConfigError, match="for whole images only"):
        InnerLayers(encoder, [2]).encode(images, ids_keep=torch.zeros(2, 1, dtype=torch.int64))
    with pytest.raises(ConfigError, match="take avg or cls"):
        read = InnerLayers(encoder, [2])
        read.pooled(read.encode(images), "map")
    with pytest.raises(ConfigError, match=r"load.depth=13: vit_tiny_patch16_224 has 12 blocks"):
        load("random:vit_tiny_patch16_224", depth=13)
    with pytest.raises(ConfigError, match="rotary positions for each block"):
        load("random:vit_small_patch16_rope_mixed_224", depth=3)
