"""Training on augmented images, for finetune, segmenter and the DINO form of linear-probe.

Only copies of an encoder are trained. The images of a step and their augmentation are functions of (seed, epoch,
image), as in training; stochastic depth and mixup use global generators, whose state is restored afterwards.
Letters: B images per step, n training images, T steps.
"""

import contextlib
import functools
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import Dataset

from smalti.data.crops import random_resized_crop, resize
from smalti.data.images.folders import ImageSample
from smalti.data.images.labelled import eval_batches
from smalti.data.loader import epoch_order, key_of_step, sample_key
from smalti.data.views import Skipped
from smalti.data.workers import load_items
from smalti.errors import ConfigError, DataError, RunError, SmaltiError
from smalti.evaluation.context import EvaluationContext
from smalti.evaluation.features import Features
from smalti.evaluation.metrics import ConfusionMatrix, accuracy, balanced_accuracy, class_recall
from smalti.evaluation.tally import Tally, tally_labels
from smalti.functional.precision import has_bf16
from smalti.functional.schedules import half_cosine
from smalti.layers.stochastic_depth import StepPart, part_of_step
from smalti.models.build import clone_encoder
from smalti.models.encoder import Encoder

Example = tuple[Tensor, Any]
"""An input image of the network, and its class, its mask, or a dictionary of tensors."""
CROP_ASPECT, FLIP_PROB = (3 / 4, 4 / 3), 0.5
_CHECK_EVERY = 50  # reading a loss waits for the GPU
_TELL_EVERY_S = 10.0
_CURVE_POINTS = 100


def trainable_copy(encoder: Encoder, drop_path: float) -> Encoder:
    """A copy with all parameters trainable, including positions; with stochastic depth, without dropout.

    An encoder trained without positions gets new ones, initialised from torch's generator.

    Args:
        encoder: the original, which isn't modified.
        drop_path: stochastic depth rate of the last block, in [0, 1).
    """
    copy = clone_encoder(encoder)
    copy.draw_positions()
    for parameter in copy.parameters():
        parameter.requires_grad_(True)
        parameter.grad = None
    for part in copy.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    copy.set_drop_path(drop_path)
    return copy


def with_linear_head(copy: Encoder, num_outputs: int) -> Encoder:
    """Give the copy a new linear ``head``: weights from a truncated normal of 0.02, zero bias."""
    head = nn.Linear(copy.embed_dim, num_outputs)
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    copy.vit.head = head.to(next(copy.parameters()).device)
    return copy


def rate_positions(optimizer: torch.optim.Optimizer, encoder: Encoder, copy: Encoder) -> None:
    """Set the learning rates of positions, which have no weight decay.

    A new table has the full rate, without layer-wise decay (PART, arXiv:2506.03682, released code). Trainable rotary
    frequencies are shared by all blocks and have the rate of the first layer, where timm gives them the last one's.

    Args:
        optimizer: optimiser of the copy, whose groups have an ``lr_scale``.
        encoder: the original; the table is new if it was trained without positions.
        copy: result of :func:`trainable_copy`; parameters that the optimiser doesn't have stay out of it.
    """
    first = min(group["lr_scale"] for group in optimizer.param_groups)
    frequencies = getattr(getattr(copy.vit, "rope", None), "freqs", None)
    rated = [(copy.vit.pos_embed if encoder.position_free else None, 1.0), (frequencies, first)]
    for positions, scale in rated:
        if positions is None:
            continue
        for group in optimizer.param_groups:
            others = [parameter for parameter in group["params"] if parameter is not positions]
            if len(others) < len(group["params"]):
                group["params"] = others
                optimizer.add_param_group({"params": [positions], "lr_scale": scale, "weight_decay": 0.0})
                break


@contextlib.contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Within the block, seed Python's, NumPy's and torch's global generators; their state is restored afterwards.

    For libraries that can't be given a generator.

    Args:
        seed: any integer.
        device: device whose generator is also seeded, besides the CPU's.
    """
    device = torch.device(device)
    on_cuda = [device] if device.type == "cuda" else []
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=on_cuda):
        try:
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            torch.default_generator.manual_seed(seed % 2**63)  # torch.manual_seed would also seed other devices
            for one in on_cuda:
                with torch.cuda.device(one):
                    torch.cuda.manual_seed(seed % 2**63)
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)  # noqa: NPY002


def normalized(pixels: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> Float[Tensor, "C H W"]:
    """``(C, H, W)`` float32, ``(x - mean) / std``.

    Args:
        pixels: ``(H, W, C)`` uint8, or float32 in 0..1.
        mean: mean per channel, of images in 0..1.
        std: standard deviation per channel, of images in 0..1.
    """
    scaled = pixels.astype(np.float32) / 255 if pixels.dtype == np.uint8 else pixels
    image = (scaled - np.array(mean, dtype=np.float32)) / np.array(std, dtype=np.float32)
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def random_view(
    sample: ImageSample,
    channels: int,
    size: int,
    area: tuple[float, float],
    key: int,
    mode: Literal["bicubic", "bilinear"] = "bicubic",
) -> np.ndarray | Skipped:
    """``(size, size, C)``: a random resized crop of an image, mirrored with probability 0.5.

    Args:
        sample: the image.
        channels: C.
        size: side in pixels.
        area: smallest and largest fraction of the image's area.
        key: random key.
        mode: interpolation mode, antialiased.
    """
    try:
        image = sample.read(channels)
    except DataError as error:
        return Skipped(sample.path, str(error).removeprefix(f"{sample.path}: "))
    rng = np.random.default_rng(key)
    top, left, height, width = random_resized_crop(rng, image.shape[0], image.shape[1], area, CROP_ASPECT)
    view = resize(image[top : top + height, left : left + width], size, mode).reshape(size, size, -1)
    return view[:, ::-1] if rng.random() < FLIP_PROB else view


def warm_cosine(step: int, num_steps: int, *, peak: float, least: float, num_warmup: int) -> float:
    """Learning rate: linear warm-up to ``peak`` in ``num_warmup`` steps, then cosine decay to ``least``.

    Source: He et al., MAE, arXiv:2111.06377v3, Table 9; there, the first step has learning rate 0.
    """
    if step < num_warmup:
        return peak * (step + 1) / num_warmup
    return half_cosine(peak, least, (step - num_warmup) / max(num_steps - num_warmup, 1))


def warm_poly(
    step: int, num_steps: int, *, peak: float, least: float, num_warmup: int = 0, power: float = 0.9
) -> float:
    """Learning rate: as :func:`warm_cosine` to ``peak``, then ``(peak - least) (1 - t)^power + least``, t in [0, 1).

    Source: Strudel et al., Segmenter, arXiv:2105.05633, Sec. 4.1.
    """
    if step < num_warmup:
        return peak * (step + 1) / num_warmup
    fraction = (step - num_warmup) / max(num_steps - num_warmup, 1)
    return (peak - least) * (1 - fraction) ** power + least


def warm_steps(
    step: int, num_steps: int, *, peak: float, num_warmup: int, milestones: tuple[float, ...], factor: float = 0.1
) -> float:
    """Learning rate: as :func:`warm_cosine` to ``peak``, then multiplied by ``factor`` at each milestone.

    Args:
        step: 0..num_steps-1.
        num_steps: T.
        peak: highest learning rate.
        num_warmup: number of warm-up steps.
        milestones: fractions of all steps.
        factor: multiplier at each milestone.

    Source: Li et al., ViTDet, arXiv:2203.16527, App. A.2.
    """
    if step < num_warmup:
        return peak * (step + 1) / num_warmup
    return peak * factor ** sum(step >= fraction * num_steps for fraction in milestones)


class _TuningBatches(Dataset[Any]):
    """Consecutive batches; errors are returned, so that workers pass them on unchanged."""

    def __init__(
        self, make: Callable[[int, int], Example | Skipped], num_images: int, batch_size: int, seed: int
    ) -> None:
        self._make, self._num_images, self._batch_size, self._seed = make, num_images, batch_size, seed

    def __getitem__(self, number: int) -> tuple[Tensor, Any, list[Skipped]] | SmaltiError:
        skipped: list[Skipped] = []
        first = number * self._batch_size
        try:
            made = [self._example(position, skipped) for position in range(first, first + self._batch_size)]
        except SmaltiError as error:
            return error
        targets = [target for _, target in made]
        stacked = torch.stack(targets) if isinstance(targets[0], Tensor) else targets
        return torch.stack([image for image, _ in made]), stacked, skipped

    def _example(self, position: int, skipped: list[Skipped]) -> Example:
        """The image at a position in the infinite sequence of epochs, or the next readable one."""
        epoch, offset = divmod(position, self._num_images)
        order = _cached_order(self._seed, epoch, self._num_images)
        key = sample_key(self._seed, epoch, int(order[offset]))  # a replacement has its own key
        failed: list[Skipped] = []
        for attempt in range(self._num_images):
            example = self._make(int(order[(offset + attempt) % self._num_images]), key)
            if not isinstance(example, Skipped):
                skipped += failed
                return example
            failed.append(example)
        raise DataError(f"none of the {len(failed)} train images can be read, the first: {failed[0].path}")


@functools.lru_cache(maxsize=2)
def _cached_order(seed: int, epoch: int, num_images: int) -> np.ndarray:
    return epoch_order(seed, epoch, num_images)


def stream(items: Dataset[Any], count: int, num_workers: int) -> Iterator[Any]:
    """Yield ``items[0]`` to ``items[count - 1]`` in order, loaded by worker processes if there are any.

    Raises:
        SmaltiError: if an item is an error.
    """
    for item in load_items(items, range(count), num_workers):
        if isinstance(item, SmaltiError):
            raise item
        yield item


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    features: EvaluationContext[Any],
    make: Callable[[int, int], Example | Skipped],
    loss_of: Callable[[Tensor, Any], Float[Tensor, ""]],
    rate: Callable[[int], float],
    *,
    num_steps: int,
    batch_size: int,
    seed: int,
    what: str,
    num_images: int | None = None,
    bf16: bool | None = None,
    micro_batch: int | None = None,
    weight_of: Callable[[Any], Tensor] | None = None,
) -> list[float]:
    """Train a model on the training images; it is in eval mode afterwards.

    Every batch is full: batches cross epochs, and an unreadable image is replaced by the next.

    Args:
        model: model on the device of the encoder.
        optimizer: its optimiser; ``lr_scale`` of a group multiplies its learning rate.
        features: the training images and the progress callback.
        make: ``make(place, key)``: the training image of that index, augmented with that random key.
        loss_of: ``loss_of(images, targets)`` of a batch; targets are stacked, or a list if they are dictionaries.
        rate: learning rate of each step, 0..num_steps-1.
        num_steps: T.
        batch_size: B.
        seed: seed of the order of images and of their keys.
        what: label in progress and errors.
        num_images: size of the training set, if it is a subset of that of ``features``.
        bf16: whether to use bfloat16 autocast; None: on GPUs that support it.
        micro_batch: images per forward pass, a divisor of ``batch_size``; gradients are accumulated. None: all.
        weight_of: weight of a micro-batch's loss in that of the step, from its targets; None: all are equal. With the
            number of terms of a mean over pixels, the gradient is that of the whole batch.

    Returns:
        The loss, averaged over at most 100 intervals of equal length.

    Raises:
        DataError: if no image can be read, or a target can't be read.
        RunError: if the loss is not finite.
    """
    device = features.device
    at_once = micro_batch or batch_size
    assert batch_size % at_once == 0, "checked by check_micro_batch"
    parts = batch_size // at_once
    batches = _TuningBatches(make, num_images or len(features.data.train), at_once, seed)
    bf16 = has_bf16(device.type) if bf16 is None else bf16
    losses: list[Tensor] = []
    last_report = time.monotonic()
    model.train()
    with torch.enable_grad():
        found: list[tuple[Tensor, Tensor]] = []  # loss and weight of each part of a step
        for number, (images, targets, skipped) in enumerate(stream(batches, num_steps * parts, features.num_workers)):
            features.skipped.update({str(item.path): item.reason for item in skipped})
            step, part = divmod(number, parts)
            targets = _to(device, targets)
            whole = StepPart(key_of_step(seed, step), batch_size, part * at_once, at_once)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16), part_of_step(whole):
                loss = loss_of(images.to(device), targets)
            if part == 0:
                optimizer.zero_grad(set_to_none=True)
                found.clear()
            weight = torch.ones_like(loss) if weight_of is None else weight_of(targets).to(loss)
            torch.autograd.backward(loss if parts == 1 else loss * weight)
            found.append((loss.detach(), weight))
            if part + 1 < parts:
                continue
            for group in optimizer.param_groups:
                group["lr"] = rate(step) * group.get("lr_scale", 1.0)
            loss = found[0][0] if parts == 1 else _scale_gradients(optimizer, found)
            optimizer.step()
            losses.append(loss)
            if step % _CHECK_EVERY == 0 or step + 1 == num_steps:
                if not torch.stack(losses[-_CHECK_EVERY:]).isfinite().all():
                    raise RunError(f"{what}: the loss is not finite at step {step}; lower the learning_rate")
                last_report = -math.inf
            if time.monotonic() - last_report > _TELL_EVERY_S:
                last_report = time.monotonic()
                features.progress(what, step + 1, num_steps)
    model.eval()
    spans = torch.stack(losses).float().cpu().tensor_split(min(_CURVE_POINTS, len(losses)))
    return [float(span.mean()) for span in spans]


def check_micro_batch(protocol: str, batch_size: int, micro_batch: int | None) -> None:
    """Refuse a ``micro_batch`` that does not divide the batch.

    Raises:
        ConfigError: names the nearest that does.
    """
    if micro_batch is not None and batch_size % micro_batch:
        fits = max(size for size in range(1, min(micro_batch, batch_size) + 1) if batch_size % size == 0)
        raise ConfigError(
            f"eval.{protocol}.micro_batch={micro_batch} does not divide the batch of {batch_size} images; use {fits}"
        )


def _scale_gradients(optimizer: torch.optim.Optimizer, found: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Divide the summed gradients by the sum of the weights; returns the weighted mean of the losses."""
    total = torch.stack([weight for _, weight in found]).sum()
    factor = torch.where(total > 0, 1 / total, 0.0)
    gradients = [one.grad for group in optimizer.param_groups for one in group["params"] if one.grad is not None]
    torch._foreach_mul_(gradients, factor)
    return torch.stack([loss * weight for loss, weight in found]).sum() * factor


def _to(device: torch.device, targets: Any) -> Any:
    if isinstance(targets, Tensor):
        return targets.to(device)
    return [{name: value.to(device) for name, value in target.items()} for target in targets]


def evaluate_labels(
    model: Callable[[Tensor], Tensor], features: Features, size: int
) -> tuple[dict[str, float], dict[str, dict[str, float]], dict[str, Tally], ConfusionMatrix]:
    """Evaluate a classifier on the test images: short side resized, center crop.

    Args:
        model: ``(B, C, S, S)`` normalised images -> ``(B, K)`` class scores.
        features: the test images.
        size: S in pixels.

    Returns:
        ``top1``, ``balanced_top1`` and, from five classes on, ``top5``; the recall of each class; the tally of each
        score; the confusion matrix.

    Raises:
        DataError: if no image can be read.
    """
    images, encoder, classes = features.data.test, features.encoder, features.data.classes
    batches = eval_batches(
        images, size, encoder.in_chans, mode="crop", batch_size=features.batch_size, num_workers=features.num_workers
    )
    parts, places = list[Tensor](), list[int]()
    for pixels, positions, skipped in batches:
        features.skipped.update({str(item.path): item.reason for item in skipped})
        if positions:
            with torch.no_grad():
                parts.append(model(encoder.normalize(pixels.to(features.device))).cpu())
            places += positions
    if not places:
        raise DataError(f"{images.root}: none of the {len(images)} {features.evaluated} can be read")
    logits = torch.cat(parts)
    preds = logits.argmax(1)
    labels = torch.tensor([images.samples[place].label for place in places])
    confusion = ConfusionMatrix(len(classes))
    confusion.update(labels, preds)
    metrics = {"top1": accuracy(confusion.matrix), "balanced_top1": balanced_accuracy(confusion.matrix)}
    tallies = tally_labels(labels, preds, len(classes), places, len(images))
    if len(classes) >= 5:
        part, whole = np.zeros((2, len(images), 1))
        part[places, 0] = (logits.topk(5, dim=1).indices == labels[:, None]).any(1).numpy()
        whole[places] = 1
        tallies["top5"] = Tally(part, whole)
        metrics["top5"] = tallies["top5"].score()
    recall = dict(zip(classes, class_recall(confusion.matrix).tolist(), strict=True))
    return metrics, {"recall": recall}, tallies, confusion
