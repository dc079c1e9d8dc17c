"""NeCo's loss on a GPU: the torch form, the same through torch.compile, the Triton kernel; memory, share of a step.

    python benchmarks/sorting_gpu.py        # 31,360 rows of 49, a batch of 64 images; needs a CUDA device

Goals of the kernel: at most 3 % of a step of ViT-S/14 at 518 px and 64 images, and at most 1 GB above its inputs.
Forward and backward, student and teacher; times are those between CUDA events, all ways in turn in each round. The step
is bfloat16 (the loss is float32), with random weights and no optimiser; 8 images are measured and the time taken 8
times.
torch.compile of torch 2.14 can't trace writing into parts of the matrices (``out=``): it leaves merges as they are.
"""

import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from _bench import Timing, report
from smalti.functional.sorting import _OrderLoss, neco_loss
from smalti.functional.sorting_networks import layers_for

IMAGES, ROWS_AN_IMAGE, SIZE = 64, 490, 49
STEP_IMAGES = 8
SHARE_GOAL, MEMORY_GOAL = 0.03, 1e9
ROUNDS = 20


def interleave(ways: Mapping[str, Callable[[], object]]) -> dict[str, Timing]:
    """Seconds of each way on the GPU, after three rounds that don't count: kernels are compiled there."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(ROUNDS + 3):
        for name, way in ways.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            way()
            end.record()
            end.synchronize()
            if i >= 3:
                times[name].append(start.elapsed_time(end) / 1e3)
    return {name: Timing(statistics.median(all_), min(all_), max(all_)) for name, all_ in times.items()}


def peak_bytes(way: Callable[[], object]) -> int:
    """Above what is allocated before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    way()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def errors(loss: Tensor, gradient: Tensor, student: Tensor, teacher: Tensor) -> tuple[float, float]:
    """Relative error of the loss, and of the gradient in L2, against float64."""
    exact = student.detach().double().requires_grad_()
    expected = neco_loss(exact, teacher.double())
    (theirs,) = torch.autograd.grad(expected, exact)
    return abs(loss.double() / expected - 1).item(), ((gradient - theirs).norm() / theirs.norm()).item()


def main() -> None:
    if not torch.cuda.is_available():
        print("BENCH sorting_gpu: no CUDA device here, nothing was measured")
        return
    from neco_step import make  # here: it needs diffsort

    device = torch.device("cuda")
    g = torch.Generator(device).manual_seed(0)
    student, teacher = (
        0.3 + 0.15 * torch.randn(IMAGES * ROWS_AN_IMAGE, SIZE, generator=g, device=device) for _ in range(2)
    )
    student.requires_grad_()
    layers = layers_for("bitonic", SIZE, device, torch.float32)  # before: compiled code keeps no cache of them
    options = (None, layers, "cauchy", (100.0, 100.0), None, "torch")
    compiled = torch.compile(lambda student, teacher: _OrderLoss.apply(student, teacher, *options))
    forms: dict[str, Callable[[], Tensor]] = {
        "torch": lambda: neco_loss(student, teacher),
        "compiled": lambda: compiled(student, teacher),
        "triton": lambda: neco_loss(student, teacher, backend="triton"),
    }
    ways = {name: lambda form=form: torch.autograd.grad(form(), student) for name, form in forms.items()}
    method, views = make(518, STEP_IMAGES, sorter="triton")
    method, views = method.to(device), views.to(device)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = method(views, 0.5)["neco"]
        loss.backward()

    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}")
    timings = interleave({**ways, "step": step})
    scale = IMAGES // STEP_IMAGES
    timings["step"] = Timing(*(scale * value for value in timings["step"]))
    question = f"sorting_gpu {len(student):,} rows of {SIZE}"
    for name in ("compiled", "triton"):
        report(f"{question}: {name} against torch", timings, name, "torch", 1.0)
    report(
        f"{question}: share of a step at 518 px, {STEP_IMAGES} images times {scale}",
        timings,
        "triton",
        "step",
        SHARE_GOAL,
    )
    for name, way in ways.items():
        memory = peak_bytes(way)
        loss = forms[name]()
        off, gradient_off = errors(loss.detach(), torch.autograd.grad(loss, student)[0], student, teacher)
        verdict = "met" if memory <= MEMORY_GOAL else "MISSED"
        print(
            f"      {name}: {memory / 1e9:.2f} GB above the inputs, goal<={MEMORY_GOAL / 1e9:.0f} GB {verdict}; "
            f"against float64: loss {off:.1e}, gradient {gradient_off:.1e}"
        )


if __name__ == "__main__":
    main()
