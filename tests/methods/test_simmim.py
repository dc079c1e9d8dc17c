import torch

from smalti.methods.simmim import SimMIM, SimMIMConfig
from smalti.models.build import build_encoder


def test_a_head_of_zeros_has_the_mean_absolute_pixel_as_its_error() -> None:
    encoder = build_encoder(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=3, seed=0
    )
    method = SimMIM(encoder, SimMIMConfig(mask_ratio=0.5))
    torch.nn.init.zeros_(method.head.weight)
    torch.nn.init.zeros_(method.head.bias)
    assert method.networks() == {"encoder": encoder} and method.config.mask_ratio == 0.5
