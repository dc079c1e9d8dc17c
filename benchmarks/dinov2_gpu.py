"""DINOv2's step on a GPU: images a second, memory, waits for the device, graph breaks.

    python benchmarks/dinov2_gpu.py        # ViT-S/16, 2 x 224 + 8 x 96 px, 65,536 prototypes, 64 images; needs CUDA
    python benchmarks/dinov2_gpu.py tiny   # the same code at tiny sizes, on any machine: does it run?

Crops are noise that lies on the device; a step is forward (bfloat16), backward, AdamW and the teacher. *Compiled* runs
the blocks through torch.compile, as ``compile=true`` does; the last one is run in parts and stays as it is. Waits are
what CUDA's synchronisation warnings find in one step; goal: 0. Graph breaks are those of all that comes after the plan
of masks, which is made on the CPU; goal: 0. (A run compiles the blocks only.) Never run on a GPU so far.
"""

import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
from timm.models.vision_transformer import Block

sys.path.insert(0, str(Path(__file__).parent))
from smalti.data.views import Views
from smalti.methods.dinov2 import DINOv2, DINOv2Config
from smalti.models.build import build_encoder
from smalti.training.optim import OptimConfig, apply_schedules, build_optimizer

ROUNDS, WARM_UP = 20, 5
FULL = {"images": 64, "size": 224, "local_size": 96, "num_prototypes": 65536, "encoder": {}}
TINY = {
    "images": 2,
    "size": 32,
    "local_size": 16,
    "num_prototypes": 64,
    "encoder": {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3},
}


class Trainer:
    """A method on a device and what a step needs."""

    def __init__(self, sizes: dict[str, object], device: torch.device, compiled: bool) -> None:
        torch.manual_seed(0)
        images, size, local = sizes["images"], sizes["size"], sizes["local_size"]
        encoder = build_encoder("vit_small_patch16_224", img_size=size, seed=0, **sizes["encoder"])
        encoder.set_drop_path(0.1)
        config = DINOv2Config(num_prototypes=sizes["num_prototypes"], local_size=local)
        self.method, self.device = DINOv2(encoder, config).train().to(device), device
        if compiled:
            for module in self.method.modules():
                if isinstance(module, Block):
                    module.compile()
        self.optimizer = build_optimizer(self.method.param_groups(), OptimConfig())
        apply_schedules(self.optimizer, OptimConfig(), peak=1e-4, progress=0.5)
        self.images, self.number = images, 0
        keys = torch.arange(images)
        self.views = Views(
            crops=tuple(
                torch.randint(0, 256, (count * images, 3, side, side), dtype=torch.uint8)
                for count, side in ((2, size), (8, local))
            ),
            boxes=torch.zeros(10 * images, 4),
            flips=torch.zeros(10 * images, dtype=torch.bool),
            source_size=torch.full((images, 2), size),
            index=keys,
            keys=keys,
        ).to(device)

    def step(self) -> torch.Tensor:
        """One step, with masks of its own; the loss, on the device."""
        self.number += 1
        self.views.host_keys = torch.arange(self.images) + self.number * self.images
        self.views.keys = self.views.host_keys if self.device.type == "cpu" else self.views.keys
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = torch.stack(list(self.method(self.views, 0.5).values())).sum()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.method.after_step(0.5)
        return loss.detach()


def seconds(trainer: Trainer, rounds: int) -> list[float]:
    """Of each step, from the start of one to that of the next, with the device at rest in between."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        trainer.step().item()
        times.append(time.perf_counter() - start)
    return times


def waits(trainer: Trainer) -> int:
    """Places in a step at which the CPU waits for the device."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.step()
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


def main() -> None:
    tiny = sys.argv[1:] == ["tiny"]
    if not torch.cuda.is_available() and not tiny:
        print("BENCH dinov2_gpu: no CUDA device here, nothing was measured")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu, sizes = device.type == "cuda", TINY if tiny else FULL
    print(f"{torch.cuda.get_device_name(device) if on_gpu else 'CPU'}, torch {torch.__version__}")
    for compiled in (False, True):
        trainer = Trainer(sizes, device, compiled)
        seconds(trainer, 2 if tiny else WARM_UP)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        times = seconds(trainer, 2 if tiny else ROUNDS)
        rate = sizes["images"] / statistics.median(times)
        name = "compiled" if compiled else "eager"
        if tiny:  # a time of such sizes says nothing
            print(f"BENCH dinov2_gpu tiny, {name}: a step runs, loss {trainer.step():.3f}")
            continue
        memory = torch.cuda.max_memory_allocated() / 1e9
        print(
            f"BENCH dinov2_gpu {name}: {rate:.0f} images/s ({sizes['images'] / max(times):.0f} to "
            f"{sizes['images'] / min(times):.0f}), {memory:.1f} GB, waits={waits(trainer)} goal<=0"
        )
    trainer = Trainer(sizes, device, False)
    found = torch._dynamo.explain(trainer.method.losses)(trainer.views, trainer.method.plan(trainer.views), 0.5)
    print(f"BENCH dinov2_gpu graph breaks: {found.graph_break_count} goal<=0, {found.graph_count} graphs")
    for reason in found.break_reasons:
        print(f"        {reason.reason.splitlines()[0][:150]}")


if __name__ == "__main__":
    main()
