"""A step of NeCo at ViT-S/14, 224 px: the share of its loss, and what a teacher without gradient saves.

    python benchmarks/neco_step.py          # 4 images, random weights, forward and backward, one thread

Goal: all that comes after the networks (cells, references, similarities, sort) takes at most a tenth of the step.
Arithmetic is counted (without running it) for our step and for the official graph, in which the teacher has a gradient
through its references; there it should save 28 % (224 px) to 33 % (518 px) of all.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from diffsort import DiffSortNet
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent))
from _bench import interleave, report
from smalti.data.views import Views, collate
from smalti.functional.sorting import neco_loss
from smalti.methods.neco import NeCo, NeCoConfig
from smalti.models.build import build_encoder

BATCH = 4


def make(size: int, images: int = BATCH, sorter: Literal["torch", "triton"] = "torch") -> tuple[NeCo, Views]:
    encoder = build_encoder("vit_small_patch14_dinov2", img_size=518, seed=0)
    encoder.set_drop_path(0.1)
    method = NeCo(encoder, NeCoConfig(sorter=sorter)).train()
    crops, samples = method.make_views(size), []
    for place in range(images):
        rng = np.random.default_rng(place)
        samples.append(crops(rng.integers(0, 256, (480, 640, 3), dtype=np.uint8), rng))
    views = collate(samples)
    views.keys = torch.arange(images)
    return method, views


def flops(size: int, official: bool) -> int:
    """Of both networks in a step of one image, counted on tensors without contents."""
    method, views = make(size, 1)
    method, views = method.to("meta"), views.to("meta")
    network = method.teacher.module.requires_grad_(official)
    with FlopCounterMode(display=False) as counter:
        with torch.set_grad_enabled(official):
            maps = network((views.global_crops,))
        torch.stack([one.sum() for one in [*maps, *method.student(views.crops)]]).sum().backward()
    return counter.get_total_flops()


def diffsort_loss(student: Tensor, teacher: Tensor, sorter: DiffSortNet) -> Tensor:
    with torch.no_grad():
        target = sorter(teacher)[1]
    return -(target * sorter(student)[1].log()).sum(2).mean()


def main() -> None:
    torch.set_num_threads(1)
    for size in (224, 518):
        ours, official = (flops(size, graph) for graph in (False, True))
        print(
            f"BENCH neco_step arithmetic of the networks, {size} px: {ours / 1e9:.0f} GFLOP an image, "
            f"with a teacher that has a gradient {official / 1e9:.0f}: saved {1 - ours / official:.1%}"
        )

    method, views = make(224)
    with torch.no_grad():
        targets = method._teacher_maps(views.global_crops)
        maps = method.student(views.crops)
    leaves = [one.clone().requires_grad_() for one in maps]
    seen: list[tuple[Tensor, Tensor]] = []
    after = make(224)[0]  # with networks that answer at once
    after._teacher_maps = lambda images: targets
    after.student.forward = lambda crops: leaves
    original = after.order_loss

    def spy(student: Tensor, teacher: Tensor, rows: Tensor | None) -> Tensor:
        seen.append((student.detach(), teacher))
        return original(student, teacher, rows)

    after.order_loss = spy
    after(views, 0.5)
    after.order_loss = original
    student, teacher = seen[0][0].requires_grad_(), seen[0][1]
    sorter = DiffSortNet("bitonic", student.shape[1], steepness=100.0, distribution="cauchy")

    def backward(loss: Callable[[], Tensor]) -> Callable[[], None]:
        return lambda: loss().backward()

    timings = interleave(
        {
            "step": backward(lambda: method(views, 0.5)["neco"]),
            "after the networks": backward(lambda: after(views, 0.5)["neco"]),
            "sort": backward(lambda: neco_loss(student, teacher)),
            "diffsort": backward(lambda: diffsort_loss(student, teacher, sorter)),
        },
        rounds=3,
    )
    step, after_networks, sort, peer = (
        timings[name].median for name in ("step", "after the networks", "sort", "diffsort")
    )
    report(f"neco_step share of the loss, {BATCH} images", timings, "after the networks", "step", 0.1)
    print(
        f"      the sort alone ({len(student)} rows twice): {timings['sort']}, {sort / step:.1%} of the step; "
        f"diffsort {timings['diffsort']}: with it the loss would take {(after_networks - sort + peer) / step:.1%} "
        "of today's step"
    )


if __name__ == "__main__":
    main()
