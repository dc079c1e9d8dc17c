"""One module that ranks patches and encodes the best: the encoder's numbers for them, and timm's interface."""

import pytest
import timm.data
import torch
from torch.testing import assert_close

import smalti
from smalti.errors import ConfigError
from smalti.exporters.ranked import RankedModel
from smalti.methods.ranker import DistilledRanker, RankerConfig
from smalti.models.build import build_encoder
from smalti.models.encoder import Encoder


def tiny(seed: int = 0, **arguments) -> Encoder:
    sizes = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 24, "num_heads": 2}
    return build_encoder("vit_tiny_patch16_224", seed=seed, **{**sizes, **arguments}).eval()


def small_ranker(**arguments) -> DistilledRanker:
    encoder = tiny(1, **arguments)
    encoder.set_normalization((0.2,), (0.7,))  # another than the encoder's
    method = DistilledRanker(encoder, RankerConfig(order="halton"))
    torch.nn.init.normal_(method.head.weight)
    return method.eval()


@pytest.mark.parametrize(
    "arguments", [{}, {"reg_tokens": 2, "class_token": False, "global_pool": "avg"}], ids=["class token", "registers"]
)
@torch.no_grad()
def test_it_gives_the_encoder_s_numbers_for_the_best_patches(arguments):
    encoder, ranker = tiny(**arguments), small_ranker()
    model = RankedModel(encoder, ranker, 5).eval()
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images = encoder.normalize(pixels)
    best = ranker.scores(ranker.encoder.normalize(pixels)).argsort(dim=1, descending=True)[:, :5]
    assert (model.choose(images) == best).all()
    expected = encoder.encode(images, ids_keep=best)
    tokens = model.forward_features(images)
    assert_close(tokens[:, encoder.num_prefix_tokens :], expected.patches)
    assert_close(tokens[:, : encoder.num_prefix_tokens], expected.prefix)
    assert_close(model(images), encoder.pooled(expected))
    assert_close(model.forward_head(tokens), model(images))


def test_timm_reads_its_input_format():
    model = RankedModel(tiny(), small_ranker(), 5)
    wanted = timm.data.resolve_model_data_config(model)
    assert (tuple(wanted["input_size"]), tuple(wanted["mean"])) == ((3, 32, 32), tuple(tiny().mean))
    assert model.num_features == 24


@pytest.mark.parametrize("keep", [0, 17])
def test_a_number_of_patches_that_the_image_lacks_is_refused(keep):
    with pytest.raises(ConfigError, match=rf"keep={keep}: .* has 16 patches; 1\.\.16 is needed"):
        RankedModel(tiny(), small_ranker(), keep)


def test_a_ranker_of_another_grid_is_refused():
    with pytest.raises(ConfigError, match=r"scores 2x2 patches of 32x32 px .* takes 4x4"):
        RankedModel(tiny(), small_ranker(patch_size=16), 3)


def test_a_run_of_another_method_is_refused(photos, tmp_path):
    nets = {"encoder_dim": 16, "encoder_depth": 1, "decoder_dim": 32, "decoder_depth": 1}
    settings = {"data": {"image_size": 32}, "tokens": {"patch_size": 8}, "method": nets, "batch_size": 4, "steps": 1}
    smalti.train("comae", photos, tmp_path / "run", overrides={**settings, "devices": "cpu"}, quiet=True)
    with pytest.raises(ConfigError, match="is a run of comae; a run of ranker is needed"):
        smalti.load_ranked(tiny(), tmp_path / "run", keep=3)
