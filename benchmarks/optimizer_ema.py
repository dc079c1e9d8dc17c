"""Is one step of the optimiser and the teacher cheap? Ours against a for-loop AdamW alone.

Ours: fused AdamW over the two parameter groups of DINO's student and one foreach call for the teacher. Peer:
``torch.optim.AdamW(foreach=False, fused=False)`` on the same parameters, without any teacher. ViT-S/16 and its head;
one thread, CPU time, interleaved. Goal: ratio <= 0.45.
"""

import copy

import torch

from _bench import interleave, report
from smalti.methods.dino import DINO, DINOConfig
from smalti.models.build import build_encoder
from smalti.training.optim import OptimConfig, apply_schedules, build_optimizer


def main() -> None:
    torch.set_num_threads(1)
    ours = DINO(build_encoder("vit_small_patch16_224", seed=0), DINOConfig())
    peer = copy.deepcopy(ours)
    config = OptimConfig()
    optimizer = build_optimizer(ours.param_groups(), config)
    loop = torch.optim.AdamW([p for p in peer.parameters() if p.requires_grad], lr=1e-4, foreach=False, fused=False)
    for method in (ours, peer):
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn_like(parameter) * 1e-3

    def our_step() -> None:
        apply_schedules(optimizer, config, peak=1e-4, progress=0.5)
        optimizer.step()
        ours.teacher.update(ours.student, 0.996)

    report("optimizer_ema", interleave({"ours": our_step, "peer": loop.step}, rounds=15), "ours", "peer", goal=0.45)


if __name__ == "__main__":
    main()
