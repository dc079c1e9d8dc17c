"""The Triton form of NeCo's loss against the torch form, in Triton's interpreter: no GPU is needed.

The interpreter has to be asked for before the kernel is made, so it runs in a process of its own: this file as a
script. So does the compiler, which makes code for a GPU that need not be there.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from smalti.errors import ConfigError
from smalti.functional.sorting import check_backend, neco_loss
from smalti.functional.sorting_networks import network_layers

SIZES = (2, 3, 5, 16, 49)
has_triton = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not has_triton, reason="triton is not installed; PyTorch's CUDA builds bring it")


def sims(rows, size):
    g = torch.Generator().manual_seed(size)
    student, teacher = (torch.randn(rows, size, generator=g) for _ in range(2))
    return (0.3 + 0.15 * student).requires_grad_(), 0.3 + 0.15 * teacher


def loss_and_gradient(student, teacher, backend, **options):
    loss = neco_loss(student, teacher, backend=backend, **options)
    return loss.item(), torch.autograd.grad(loss, student)[0]


def measure(student, teacher, **options):
    """Both forms: losses, and how far apart they and their gradients are."""
    (expected, exact), (found, gradient) = (
        loss_and_gradient(student, teacher, backend, **options) for backend in ("torch", "triton")
    )
    return {
        "losses": [expected, found],
        "loss_off": abs(found / expected - 1),
        "gradient_off": float((gradient - exact).norm() / exact.norm()),
    }


def run_interpreter():
    """All that the tests below look at, as JSON."""
    answers = {}
    for size in SIZES:
        student, teacher = sims(2 if size == 49 else 3, size)
        answers[str(size)] = measure(student, teacher)
    student, teacher = sims(7, 5)
    answers["chunks"] = measure(student, teacher, chunk=3)
    answers["steepness"] = measure(student, teacher, steepness_student=20.0, steepness_teacher=700.0)
    answers["gaussian"] = measure(student, teacher, distribution="gaussian", steepness_student=7.0)
    one, two = (loss_and_gradient(student, teacher, "triton") for _ in range(2))
    answers["same_bits"] = one[0] == two[0] and torch.equal(one[1], two[1])
    with torch.no_grad():
        answers["without_gradient"] = [neco_loss(student, teacher, backend="triton").item(), one[0]]
    half = neco_loss(student.bfloat16(), teacher.bfloat16(), backend="triton")
    answers["half"] = [str(half.dtype), half.item(), neco_loss(student.bfloat16(), teacher.bfloat16()).item()]

    small = torch.tensor([[0.0, 0.7], [0.0, 0.01]], requires_grad=True)  # exp(-70), below the smallest; and above it
    answers["clamped"] = measure(small, torch.tensor([[0.01, 0.0]] * 2), distribution="logistic")
    _, gradient = loss_and_gradient(small, torch.tensor([[0.01, 0.0]] * 2), "triton", distribution="logistic")
    answers["clamped"]["gradient"] = gradient.tolist()

    broken = student.detach().clone()
    broken[2, 1] = math.nan
    loss, gradient = loss_and_gradient(broken.requires_grad_(), teacher, "triton")
    answers["nan"] = [math.isnan(loss), gradient.isnan().any(1).tolist()]
    try:
        neco_loss(student.double(), teacher.double(), backend="triton")
    except ConfigError as error:
        answers["double"] = str(error)
    print(json.dumps(answers))


def run_compiler(size, capability):
    """Machine code for a GPU, with the gradient and without; shared memory and assembly as JSON."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from smalti.functional import sorting_kernel

    layers = network_layers("bitonic", size)
    inputs, warps = sorting_kernel.program_shape(layers)
    fixed = {
        "SIZE": size,
        "WIRES": 2 * layers[0].groups,
        "WIDTHS": tuple(layer.width for layer in layers),
        "INPUTS": inputs,
        "SMALLEST": 1e-30,
    }
    answers = []
    for absent in ({}, {"of_gammas": None}):
        constants = {**fixed, **absent}
        names = sorting_kernel._order_kernel.arg_names
        signature = {name: "constexpr" if name in constants else "*fp32" for name in names}
        source = ASTSource(sorting_kernel._order_kernel, signature, constexprs=constants)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
        answers.append({"shared": made.metadata.shared, "bytes": len(made.asm["cubin"]), "ptx": made.asm["ptx"]})
    print(json.dumps(answers))


def answers_of(*arguments, **environment):
    done = subprocess.run(
        [sys.executable, __file__, *arguments], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def interpreted():
    return answers_of("interpret", TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.parametrize("size", SIZES)
def test_loss_and_gradient_equal_the_torch_forms(size, interpreted):
    found = interpreted[str(size)]
    assert found["loss_off"] < 1e-6
    assert found["gradient_off"] < 1e-5


@needs_triton
@pytest.mark.parametrize("case", ["chunks", "steepness", "gaussian", "clamped"])
def test_other_settings_equal_the_torch_forms(case, interpreted):
    assert interpreted[case]["loss_off"] < 1e-6
    assert interpreted[case]["gradient_off"] < 1e-5


@needs_triton
def test_weights_below_the_smallest_have_no_gradient(interpreted):
    clamped, free = interpreted["clamped"]["gradient"]
    assert max(map(abs, clamped)) < 1e-6 < 1e-3 < min(map(abs, free))


@needs_triton
def test_the_same_input_gives_the_same_bits_with_and_without_gradient(interpreted):
    assert interpreted["same_bits"]
    without, with_gradient = interpreted["without_gradient"]
    assert without == with_gradient


@needs_triton
def test_lower_precision_is_raised_and_float64_refused(interpreted):
    dtype, found, expected = interpreted["half"]
    assert dtype == "torch.float32" and math.isclose(found, expected, rel_tol=1e-6)
    assert interpreted["double"] == ("backend='triton' supports only float32, not float64; use backend='torch'")


@needs_triton
def test_what_is_not_finite_is_not_hidden(interpreted):
    assert interpreted["nan"] == [True, [row == 2 for row in range(7)]]


@needs_triton
@pytest.mark.parametrize(("size", "capability"), [(5, 80), pytest.param(49, 90, marks=pytest.mark.slow)])
def test_it_compiles_for_a_gpu_into_registers_alone(size, capability, tmp_path):
    if importlib.util.find_spec("triton.backends.nvidia") is None:
        pytest.skip("this triton does not compile for NVIDIA's GPUs")
    for made in answers_of("compile", str(size), str(capability), TRITON_CACHE_DIR=str(tmp_path)):
        assert made["bytes"] > 0
        assert made["shared"] <= 48 * 1024
        assert ".local" not in made["ptx"]  # arrays that did not become registers
        assert "atom." not in made["ptx"] and "red.global" not in made["ptx"]  # sums in no fixed order


@needs_triton
@pytest.mark.parametrize("size", [3, 49, 128, 256])
def test_what_a_program_keeps_fits_into_its_registers(size):
    from smalti.functional.sorting_kernel import program_shape, rows_at_once

    layers = network_layers("bitonic", size)
    inputs, warps = program_shape(layers)
    comparators = len(layers) * layers[0].groups
    assert inputs & (inputs - 1) == 0 and inputs <= 2 * layers[0].groups
    assert comparators * inputs / (32 * warps) <= 96
    rows = rows_at_once(layers, size, 2**30)
    parts = -(-size // inputs)
    assert rows * 4 * comparators * (parts + 12) <= 2**30 < (rows + 1) * 4 * comparators * (parts + 12)


@pytest.mark.gpu
@pytest.mark.skipif(not (has_triton and torch.cuda.is_available()), reason="needs a CUDA device and triton")
@pytest.mark.parametrize("size", [*SIZES, 64, 128, 256])
def test_a_gpu_gives_the_torch_forms_loss_and_gradient(size):
    student, teacher = (one.detach().cuda() for one in sims(300, size))
    for options in ({}, {"chunk": 128}):
        found = measure(student.requires_grad_(), teacher, **options)
        assert found["loss_off"] < 1e-6
        assert found["gradient_off"] < 1e-5


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"backend": "cuda"}, "backend='cuda': one of torch, triton is needed"),
        ({"network": "odd_even"}, "supports only network='bitonic', not 'odd_even'; use backend='torch'"),
        ({"size": 289}, "supports only up to 256 numbers, not 289; use backend='torch'"),
        ({"dtype": torch.float64}, "supports only float32, not float64; use backend='torch'"),
    ],
)
def test_what_the_kernel_does_not_sort_is_refused(arguments, line):
    known = {"backend": "triton", "network": "bitonic", "size": 49, "device": torch.device("cuda")}
    with pytest.raises(ConfigError, match=line):
        check_backend(**{**known, **arguments})


@needs_triton
def test_a_cpu_is_refused():
    rows = torch.rand(2, 4)
    with pytest.raises(ConfigError, match="needs a GPU, not the device cpu; use backend='torch'"):
        neco_loss(rows, rows, backend="triton")


def test_without_triton_the_line_says_where_it_comes_from(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    rows = torch.rand(2, 4)
    with pytest.raises(ConfigError, match="needs the package triton, which comes with PyTorch's CUDA builds"):
        neco_loss(rows, rows, backend="triton")


if __name__ == "__main__":
    sys.path[:] = [place for place in sys.path if place != str(Path(__file__).parent)]
    if sys.argv[1] == "interpret":
        run_interpreter()
    else:
        run_compiler(int(sys.argv[2]), int(sys.argv[3]))
