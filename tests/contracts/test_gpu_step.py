"""The first step of each method on a GPU, on machines without one: devices, types, waits of the host, half precision.

The step is the training loop's own, :func:`smalti.training.step.training_step`.
"""

import numpy as np
import pytest
import torch
from test_methods import NAMES, build
from torch import Tensor

from fake_cuda import FakeCuda, HalfLinalgRefused, backward, bf16_autocast
from smalti.data.views import Views, collate
from smalti.methods.base import Method
from smalti.training.health import Health, feature_health
from smalti.training.optim import OptimConfig, build_optimizer
from smalti.training.step import PlainEngine, training_step

OTHER_SETTINGS: list[tuple[str, dict[str, object]]] = [
    ("cmar", {"order": "random"}),
    ("comae", {"alternate": True}),
    ("comae", {"readout": "cross", "contrast_over": "batch"}),
    ("diet", {"normalize": False}),
    ("dino", {"gram_weight": 2.0, "pretrained": True}),
    ("dinov2", {"gram_weight": 2.0, "pretrained": True}),
    ("dinov2", {"targets": "centering", "koleo_weight": 0.0}),
    ("droppos", {"reconstruct": True, "attentive": False, "pos_token": "zeros"}),
    ("ibot", {"targets": "sinkhorn", "separate_heads": True}),
    ("loca", {"cluster": False}),
    ("mar", {"dequantization": 0.004, "ema_momentum": 0.9}),
    ("mp3", {"loss_patches": "hidden"}),
    ("neco", {"references": "queue"}),
    ("neco", {"network": "odd_even"}),
    ("neco", {"network": "none", "exclude_self": True}),
    ("paka", {"estimator": "unbiased", "normalize": False, "clean_teacher": False}),
    ("part", {"sampling": "grid", "positions": "sincos"}),
    ("part", {"sampling": "offgrid_scale", "weighting": "schedule", "subpixel": True}),
    ("part", {"sampling": "nonoverlapping", "normalize": "image", "weighting": "variance"}),
    ("part", {"sampling": "saliency", "contrastive": 0.1, "weighting": "uncertainty"}),
    ("part", {"sampling": "hierarchical"}),
    ("part", {"angles": "quad"}),
    ("supervised", {"mixup": 0.8, "cutmix": 1.0}),
]
"""Settings under which a step takes other paths."""
CASES = [(name, {}) for name in NAMES] + OTHER_SETTINGS
PROGRESS = 0.5


def batch(method: Method) -> Views:
    """A batch of noise, on the CPU."""
    crops, samples = method.make_views(32), []
    for place in range(4):
        rng = np.random.default_rng([0, place])
        samples.append(crops(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8), rng))
    views = collate(samples)
    views.keys = torch.arange(4)
    views.labels = torch.arange(4)
    return views


class FakeEngine(PlainEngine):
    """Backward along the recorded graph: torch's own wants a real GPU."""

    def backward(self, loss: Tensor) -> None:
        backward(loss)


def case_name(value: object) -> str:
    return value if isinstance(value, str) else ",".join(f"{k}={v}" for k, v in value.items()) or "defaults"


@pytest.mark.parametrize("name, settings", CASES, ids=case_name)
def test_a_step_on_a_gpu_has_one_device_float32_losses_and_no_wait(name: str, settings: dict[str, object]) -> None:
    method, health, config = build(name, **settings), Health(), OptimConfig()
    on_cpu = batch(method)
    with FakeCuda() as gpu:
        method.to("cuda")
        optimizer = build_optimizer(method.param_groups(), config)
        on_cpu = on_cpu.pin_memory()  # as the loader does where there is a GPU

        def model(views: Views, progress: float) -> dict[str, Tensor]:
            with bf16_autocast("cuda"):
                return method(views, progress)

        with gpu.waits_are_listed():
            views = on_cpu.to("cuda")
            done = training_step(
                method, optimizer, [views], config, peak=1e-3, progress=PROGRESS, model=model, engine=FakeEngine()
            )
            losses = done.losses
            assert {term: loss.dtype for term, loss in losses.items()} == dict.fromkeys(losses, torch.float32)
            assert all(loss.device.type == "cuda" and loss.shape == () for loss in losses.values())
            health.observe(1, losses, done.grad_norm, done.observations)
        assert gpu.waits == [], "each makes the GPU idle until the host has caught up"
        # when the log is written the host reads numbers
        reading = health.read(1, method.state_dict().values())
        assert reading.means.keys() >= {f"loss/{term}" for term in losses}
        if method.export_network:
            encoder = method.networks()[method.export_network]
            with bf16_autocast("cuda"):
                feature_health(encoder, encoder.normalize(views.global_crops))
        method.diagnose(views, PROGRESS)


@pytest.mark.parametrize("name, settings", CASES, ids=case_name)
def test_no_decomposition_gets_half_precision(name: str, settings: dict[str, object]) -> None:
    method = build(name, **settings)
    views = batch(method)
    with HalfLinalgRefused(), bf16_autocast("cpu"):
        losses = method(views, PROGRESS)
        torch.stack(list(losses.values())).sum().backward()
        method.after_backward(PROGRESS)
        method.after_step(PROGRESS)
        if method.export_network:
            encoder = method.networks()[method.export_network]
            assert feature_health(encoder, encoder.normalize(views.global_crops))["effective_rank"] > 1
        method.diagnose(views, PROGRESS)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
