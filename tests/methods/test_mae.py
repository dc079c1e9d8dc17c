"""MAE against its definition."""

import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close

from smalti.data.views import Views
from smalti.errors import ConfigError
from smalti.functional.positions import sincos_positions
from smalti.methods.mae import MAE, MAEConfig, mean_patch_error, reconstruction_loss
from smalti.models.build import build_encoder


def tiny(img_size: int = 32, **config: object) -> MAE:
    encoder = build_encoder("vit_tiny_patch16_224", img_size=img_size, patch_size=8, embed_dim=24, depth=2, num_heads=3)
    return MAE(encoder, MAEConfig(decoder_dim=16, decoder_depth=1, decoder_num_heads=2, **config))


def views(images: torch.Tensor, keys: torch.Tensor | None = None) -> Views:
    batch = len(images)
    return Views(
        crops=(images,),
        boxes=torch.zeros(batch, 4),
        flips=torch.zeros(batch, dtype=torch.bool),
        source_size=torch.full((batch, 2), 32),
        index=torch.arange(batch),
        keys=torch.arange(batch) if keys is None else keys,
        skipped=(),
    )


def test_the_loss_is_the_papers_by_plain_loops() -> None:
    prediction, pixels = torch.randn(2, 3, 12), torch.randn(2, 3, 12)
    total = 0.0
    for image in range(2):
        for patch in range(3):
            values = pixels[image, patch].tolist()
            mean = sum(values) / 12
            variance = sum((v - mean) ** 2 for v in values) / 11  # unbiased
            target = [(v - mean) / math.sqrt(variance + 1e-6) for v in values]
            total += sum((p - t) ** 2 for p, t in zip(prediction[image, patch].tolist(), target, strict=True)) / 12
    assert_close(reconstruction_loss(prediction, pixels, True).item(), total / 6, rtol=1e-5, atol=1e-6)


def test_a_perfect_prediction_costs_nothing_and_zero_costs_the_variance() -> None:
    pixels = torch.randn(2, 5, 64)
    standardised = (pixels - pixels.mean(-1, keepdim=True)) / pixels.std(-1, keepdim=True)
    assert reconstruction_loss(standardised, pixels, True) < 1e-9
    assert_close(reconstruction_loss(torch.zeros_like(pixels), pixels, True).item(), 63 / 64, rtol=1e-4, atol=0)


def test_the_mean_of_all_hidden_patches_costs_what_the_log_says() -> None:
    target = torch.randn(3, 5, 12) * torch.arange(1.0, 4.0)[:, None, None] + 2.0
    mean = target.flatten(0, 1).mean(0).expand_as(target)
    assert_close(mean_patch_error(target, False), reconstruction_loss(mean, target, False))
    assert mean_patch_error(target, True) <= 1.0  # standardised patches: the mean costs at most their variance


def test_the_loss_has_the_right_gradient() -> None:
    prediction = torch.randn(1, 2, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(
        lambda p: reconstruction_loss(p, torch.ones(1, 2, 4, dtype=torch.float64).cumsum(-1), True), prediction
    )


def test_a_vit_keeps_49_of_196_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = build_encoder("vit_tiny_patch16_224", img_size=224, embed_dim=24, depth=1, num_heads=3)
    mae = MAE(encoder, MAEConfig(decoder_depth=1))
    seen = []
    original = encoder.forward_tokens
    monkeypatch.setattr(encoder, "forward_tokens", lambda x, **more: seen.append(x.shape) or original(x, **more))
    mae(views(torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)), 0.0)
    assert seen == [(2, 1 + 49, 24)]


def test_the_step_is_the_papers_computed_the_long_way() -> None:
    mae = tiny().eval()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    loss = mae(views(images), 0.0)["reconstruction"]

    encoder, decoder = mae.encoder, mae.decoder
    from smalti.functional.masking import random_mask
    from smalti.functional.random import sample_uniform

    x = encoder.normalize(images)
    ids_keep, mask, ids_restore = random_mask(sample_uniform(torch.arange(2), 16), 4)
    tokens = encoder.vit.patch_embed(x).flatten(1, 2) + encoder.vit.pos_embed[:, 1:]  # 1: embed all, add positions
    kept = torch.stack([t[i] for t, i in zip(tokens, ids_keep, strict=True)])
    kept = torch.cat([(encoder.vit.cls_token + encoder.vit.pos_embed[:, :1]).expand(2, -1, -1), kept], 1)
    latent = decoder.embed(encoder.vit.norm(encoder.vit.blocks(kept)))
    full = torch.cat([latent[:, 1:], decoder.mask_token.expand(2, 12, -1)], 1)
    full = torch.stack([t[i] for t, i in zip(full, ids_restore, strict=True)]) + sincos_positions(16, (4, 4))
    out = decoder.head(decoder.norm(decoder.blocks(torch.cat([latent[:, :1], full], 1))))[:, 1:]
    patches = x.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).reshape(2, 16, -1)
    target = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    by_definition = ((out - target).square().mean(-1) * mask).sum() / mask.sum()
    assert_close(loss, by_definition, rtol=1e-5, atol=1e-6)


def test_hidden_pixels_do_not_reach_the_encoder() -> None:
    mae = tiny(norm_pix_loss=False).eval()
    images = torch.rand(1, 3, 32, 32)
    latents = []
    handle = mae.encoder.vit.norm.register_forward_hook(lambda module, inputs, output: latents.append(output))
    mae(views(images), 0.0)
    from smalti.functional.masking import random_mask
    from smalti.functional.random import sample_uniform

    _, mask, _ = random_mask(sample_uniform(torch.arange(1), 16), 4)
    where = mask.view(1, 1, 4, 1, 4, 1).expand(1, 3, 4, 8, 4, 8).reshape(1, 3, 32, 32)
    mae(views(torch.where(where, torch.zeros(()), images)), 0.0)
    handle.remove()
    assert torch.equal(latents[0], latents[1])


def test_positions_are_fixed_sines_and_pretrained_ones_stay() -> None:
    mae = tiny()
    assert not mae.encoder.vit.pos_embed.requires_grad
    assert_close(mae.encoder.vit.pos_embed[0, 1:], sincos_positions(24, (4, 4)))
    assert mae.encoder.vit.pos_embed[0, 0].abs().max() == 0
    encoder = build_encoder("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=1, num_heads=3)
    encoder.pretrained = True
    before = encoder.vit.pos_embed.clone()
    assert torch.equal(MAE(encoder, MAEConfig()).encoder.vit.pos_embed, before)


def test_the_default_decoder_of_a_vit_base_is_the_papers() -> None:
    encoder = build_encoder("vit_base_patch16_224", depth=1)
    decoder = MAE(encoder, MAEConfig()).decoder
    assert (decoder.embed.out_features, len(decoder.blocks), decoder.blocks[0].attn.num_heads) == (512, 8, 16)
    assert decoder.head.out_features == 768


def test_mistakes_are_one_line_each() -> None:
    with pytest.raises(ConfigError, match=r"method.mask_ratio=1.0: must be strictly between 0 and 1"):
        tiny(mask_ratio=1.0)
    with pytest.raises(ValueError, match="'sincos' or 'learned'"):
        tiny(positions="rope")
    with pytest.raises(ConfigError, match="leaves 0 of 16"):
        tiny(mask_ratio=0.99)(views(torch.zeros(1, 3, 32, 32)), 0.0)
