"""MP3 against its definition."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.testing import assert_close

from smalti.data.views import Views
from smalti.errors import ConfigError
from smalti.functional.masking import random_mask
from smalti.functional.positions import sincos_positions
from smalti.functional.random import sample_uniform
from smalti.methods.mp3 import MP3, MP3Config, position_loss
from smalti.models.build import build_encoder
from smalti.runs.train import train
from smalti.training.logs import LOG_FILE, read_csv


def tiny(**config: object) -> MP3:
    torch.manual_seed(0)
    encoder = build_encoder(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, seed=0
    )
    return MP3(encoder, MP3Config(**config))


def noise(batch: int = 3) -> Views:
    generator = torch.Generator().manual_seed(1)
    return Views(
        crops=(torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8, generator=generator),),
        boxes=torch.zeros(batch, 4),
        flips=torch.zeros(batch, dtype=torch.bool),
        source_size=torch.full((batch, 2), 32),
        index=torch.arange(batch),
        keys=torch.arange(batch),
        skipped=(),
    )


def shuffled(images: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The 8x8 patches of 32x32 images in another order."""
    cells = images.unflatten(3, (4, 8)).unflatten(2, (4, 8)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)[:, order]
    return cells.unflatten(1, (4, 4)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def test_equal_logits_cost_log_n() -> None:
    labels = torch.arange(9).expand(2, -1)
    assert_close(position_loss(torch.zeros(2, 9, 9), labels).item(), math.log(9), rtol=1e-6, atol=0)


def test_the_loss_is_the_mean_by_plain_loops() -> None:
    logits, labels = torch.randn(2, 3, 5), torch.randint(0, 5, (2, 3))
    terms = [-logits[b, m].log_softmax(-1)[labels[b, m]] for b in range(2) for m in range(3)]
    assert_close(position_loss(logits, labels), torch.stack(terms).mean())


def test_the_loss_has_the_right_gradient() -> None:
    logits = torch.randn(2, 2, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: position_loss(x, torch.tensor([[0, 3], [1, 1]])), logits)


def test_permuted_patches_give_permuted_tokens() -> None:
    method = tiny().eval()
    images, order = method.encoder.normalize(noise().crops[0]), torch.randperm(16)
    with torch.no_grad():
        tokens, other = method.encode(images), method.encode(shuffled(images, order))
    assert (other - tokens[:, order]).abs().max() <= 1e-4 * tokens.abs().max()


def test_positions_would_show_in_that_probe() -> None:  # by design
    method = tiny().eval()
    encoder, order = method.encoder, torch.randperm(16)
    images = encoder.normalize(noise().crops[0])
    positions = (sincos_positions(24, (4, 4))[None], None)
    with torch.no_grad():
        tokens, other = (
            encoder.forward_tokens(encoder.assemble(encoder.embed_patches(x)[0], positions))[:, 1:]
            for x in (images, shuffled(images, order))
        )
    assert (other - tokens[:, order]).abs().max() > 0.01 * tokens.abs().max()


@pytest.mark.parametrize("loss_patches", ["all", "hidden"])
def test_the_step_is_the_papers_computed_the_long_way(loss_patches: str) -> None:
    method, batch = tiny(loss_patches=loss_patches, key_mask_ratio=0.75), noise()
    loss = method(batch, 0.0)["position"]

    vit = method.encoder.vit
    x = vit.patch_embed(method.encoder.normalize(batch.crops[0])).flatten(1, 2)
    keys, mask, _ = random_mask(sample_uniform(batch.keys, 16), 4)
    x = torch.cat([vit.cls_token.expand(3, -1, -1), x], 1)
    seen = torch.cat([torch.zeros(3, 1, dtype=torch.long), keys + 1], 1)  # the class token and four patches
    for block in vit.blocks:
        normed, heads = block.norm1(x), []
        q, k, v = block.attn.qkv(normed).chunk(3, -1)
        k, v = (part.gather(1, seen[..., None].expand(-1, -1, 24)) for part in (k, v))
        for head in range(3):
            part = slice(8 * head, 8 * head + 8)
            heads.append((q[..., part] @ k[..., part].mT / math.sqrt(8)).softmax(-1) @ v[..., part])
        x = x + block.attn.proj(torch.cat(heads, -1))
        x = x + block.mlp(block.norm2(x))
    log_pred = method.head(vit.norm(x)[:, 1:]).log_softmax(-1)
    costs = -log_pred.diagonal(dim1=1, dim2=2)  # token n is the patch of cell n
    assert_close(loss, costs.mean() if loss_patches == "all" else costs[mask].mean(), rtol=1e-5, atol=1e-6)


def test_a_patch_that_nobody_looks_at_changes_its_own_token_only() -> None:
    method, batch = tiny(), noise(1)
    mask = method.draw_mask(batch, 16)
    assert mask.sum() == 8
    images = method.encoder.normalize(batch.crops[0])
    hidden = int(mask[0].nonzero()[0])
    changed = images.clone()
    y, x = 8 * (hidden // 4), 8 * (hidden % 4)
    changed[:, :, y : y + 8, x : x + 8] += 1
    moved = (method.encode(images, mask) - method.encode(changed, mask)).abs().amax((0, 2))
    assert moved[hidden] > 1e-3
    assert moved[torch.arange(16) != hidden].max() == 0


def test_all_patches_are_looked_at_in_eval_mode_and_without_masking() -> None:
    assert tiny().eval().draw_mask(noise(), 16) is None
    assert tiny(key_mask_ratio=0.0).draw_mask(noise(), 16) is None


def test_the_encoder_is_exported_without_positions() -> None:
    encoder = tiny().networks()["encoder"]
    assert encoder.position_free and encoder.vit.pos_embed.abs().max() == 0
    assert not encoder.vit.pos_embed.requires_grad


def test_cross_entropy_of_cells_needs_no_shuffling() -> None:  # the label is the place, whatever the content
    method, batch = tiny(key_mask_ratio=0.0), noise()
    order = torch.randperm(16)
    logits = method.head(method.encode(method.encoder.normalize(batch.crops[0])))
    batch.crops = (shuffled(batch.crops[0], order),)
    expected = F.cross_entropy(logits[:, order].flatten(0, 1), torch.arange(16).repeat(3))
    assert_close(method(batch, 0.0)["position"], expected, rtol=1e-4, atol=1e-5)


def test_a_short_run_finds_positions(graded_photos: Path, tmp_path: Path) -> None:
    settings = {
        "encoder": {"name": "vit_tiny_patch16_224", "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3},
        "data": {"image_size": 32},
        "method": {"crop_scale": [0.8, 1.0], "color_jitter": 0.1},
        "steps": 120,
        "batch_size": 16,
        "drop_path": 0.0,
        "optim": {"lr": 5e-3},
        "log": {"every": 40},
    }
    rows = read_csv(train("mp3", graded_photos, tmp_path / "run", overrides=settings, quiet=True) / LOG_FILE)
    rows_alone, chance = math.log(4), math.log(16)  # columns can't be told apart: the best is 1 of the 4 cells of a row
    assert float(rows[-1]["loss/position"]) - rows_alone < (chance - rows_alone) / 4
    assert float(rows[-1]["position_accuracy"]) - 1 / 16 > (1 / 4 - 1 / 16) / 3


def test_mistakes_are_one_line_each() -> None:
    with pytest.raises(ConfigError, match=r"MP3Config.key_mask_ratio=1.0: less than 1 is needed"):
        tiny(key_mask_ratio=1.0)
    with pytest.raises(ConfigError, match=r"method.loss_patches=hidden needs method.key_mask_ratio"):
        tiny(loss_patches="hidden", key_mask_ratio=0.0)
    with pytest.raises(ConfigError, match=r"color_jitter=-1.0: at least 0"):
        tiny(color_jitter=-1.0)


def test_positions_of_signals_are_those_of_a_row() -> None:
    torch.manual_seed(0)
    sizes = {"embed_dim": 24, "depth": 1, "num_heads": 3, "patch_size": [1, 8], "mean": (0.0,), "std": (1.0,)}
    encoder = build_encoder("vit_tiny_patch16_224", img_size=(1, 80), in_chans=2, seed=0, **sizes)
    method = MP3(encoder, MP3Config(key_mask_ratio=0.0)).train()
    assert method.head.out_features == 10 and not encoder.vit.pos_embed.any()
    crops = torch.randn(3, 2, 1, 80, generator=torch.Generator().manual_seed(1))
    batch = dataclasses.replace(noise(), crops=(crops,))
    tokens, _ = encoder.embed_patches(crops)
    logits = method.head(encoder.forward_tokens(encoder.assemble(tokens, None))[:, 1:])
    expected = F.cross_entropy(logits.flatten(0, 1), torch.arange(10).repeat(3))
    assert_close(method(batch, 0.0)["position"], expected)
    window = np.ones((1, 80, 2), np.float32)
    seen = {float(method.make_views(0)(window, np.random.default_rng(seed)).crops[0].max()) for seed in range(5)}
    assert len(seen) == 5 and 0.8 <= min(seen) and max(seen) <= 1.2
    with pytest.raises(ConfigError, match=r"color_jitter=0.1 applies to images, but the data are signals"):
        MP3(encoder, MP3Config(color_jitter=0.1))
