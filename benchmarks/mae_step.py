"""What does an MAE step cost beyond its networks?

Ours: forward and backward of the method, masking, positions, targets and loss included. Floor: the bare encoder on 49
visible patches and the class token, and the bare decoder's blocks on 196 patches and the class token, forward and
backward. ViT-S/16, 224 px, batch 8; one thread, CPU time, interleaved. Goal: ratio <= 1.09.
"""

import torch

from _bench import interleave, report
from smalti.data.views import Views
from smalti.methods.mae import MAE, MAEConfig
from smalti.models.build import build_encoder

BATCH = 8


def main() -> None:
    torch.set_num_threads(1)
    method = MAE(build_encoder("vit_small_patch16_224", seed=0), MAEConfig())
    encoder, decoder = method.encoder, method.decoder
    views = Views(
        crops=(torch.randint(0, 256, (BATCH, 3, 224, 224), dtype=torch.uint8),),
        boxes=torch.zeros(BATCH, 4),
        flips=torch.zeros(BATCH, dtype=torch.bool),
        source_size=torch.full((BATCH, 2), 224),
        index=torch.arange(BATCH),
        keys=torch.arange(BATCH),
        skipped=(),
    )
    visible = torch.randn(BATCH, 50, encoder.embed_dim, requires_grad=True)
    everything = torch.randn(BATCH, 197, decoder.embed.out_features, requires_grad=True)

    def step() -> None:
        method.zero_grad()
        method(views, 0.5)["reconstruction"].backward()

    def floor() -> None:
        method.zero_grad()
        encoder.vit.norm(encoder.vit.blocks(visible)).sum().backward()
        decoder.norm(decoder.blocks(everything)).sum().backward()

    report("mae_step", interleave({"ours": step, "floor": floor}, rounds=11), "ours", "floor", goal=1.09)


if __name__ == "__main__":
    main()
