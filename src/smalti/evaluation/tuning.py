"""Training on augmented images, for finetune, segmenter and the DINO form of linear-probe.

An encoder that is trained is always a copy. Which images a step sees, and every random number of their
augmentation, are functions of (seed, epoch, image), as in training; dropped paths and mixed images are drawn from
generators whose state is restored afterwards.
Letters: B images a step, n training images, T steps.
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
from smalti.data.loader import epoch_order, sample_key
from smalti.data.views import Skipped
from smalti.data.workers import load_items
from smalti.errors import DataError, RunError, SmaltiError
from smalti.evaluation.context import EvaluationContext
from smalti.evaluation.features import Features
from smalti.evaluation.metrics import ConfusionMatrix, accuracy, balanced_accuracy, class_recall
from smalti.evaluation.tally import Tally, tally_labels
from smalti.functional.precision import has_bf16
from smalti.functional.schedules import half_cosine
from smalti.models.build import clone_encoder
from smalti.models.encoder import Encoder

Example = tuple[Tensor, Any]
"""An image as the network takes it, and its class or mask, or a dictionary of tensors."""
CROP_ASPECT, FLIP_PROB = (3 / 4, 4 / 3), 0.5
_CHECK_EVERY = 50  # reading a loss waits for the GPU
_TELL_EVERY_S = 10.0
_CURVE_POINTS = 100


def trainable_copy(encoder: Encoder, drop_path: float) -> Encoder:
    """A copy with all parameters trainable, including positions; with stochastic depth and without dropout.

    Weights that were trained without positions get fresh ones, drawn from torch's generator.

    Args:
        encoder: not changed.
        drop_path: rate of the last block, in [0, 1).
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
    """The same copy with a new linear layer as its own ``head``: truncated normal 0.02, no bias at the start."""
    head = nn.Linear(copy.embed_dim, num_outputs)
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    copy.vit.head = head.to(next(copy.parameters()).device)
    return copy


def rate_fresh_positions(optimizer: torch.optim.Optimizer, encoder: Encoder, copy: Encoder) -> None:
    """Positions that were just drawn learn at the full rate, whatever the layers' decay; without weight decay.

    Args:
        optimizer: of the copy, its groups with an ``lr_scale``.
        encoder: the original: nothing happens unless it is without positions.
        copy: from :func:`trainable_copy`.

    Source: PART, arXiv:2506.03682, released code.
    """
    positions = copy.vit.pos_embed
    if not encoder.position_free or positions is None:
        return
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if parameter is not positions]
    optimizer.add_param_group({"params": [positions], "lr_scale": 1.0, "weight_decay": 0.0})


@contextlib.contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Python's, NumPy's and torch's own random numbers follow from the seed; afterwards they go on as if unused.

    For libraries that can't be given a generator.

    Args:
        seed: any integer.
        device: whose generator is meant, beside that of the CPU.
    """
    device = torch.device(device)
    on_cuda = [device] if device.type == "cuda" else []
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=on_cuda):
        try:
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            torch.default_generator.manual_seed(seed % 2**63)  # torch.manual_seed would reach other devices, too
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
        mean: per channel, of images in 0..1.
        std: per channel, of images in 0..1.
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
    """``(size, size, C)``: a random resized crop of an image, mirrored half of the time.

    Args:
        sample: the image.
        channels: C.
        size: side in pixels.
        area: smallest and largest fraction of the image's area.
        key: of the randomness.
        mode: interpolation, antialiased.
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
    """Learning rate: in equal strides to ``peak`` in ``num_warmup`` steps, then half a cosine to ``least``.

    Source: He et al., MAE, arXiv:2111.06377v3, Table 9; there the first step's is 0.
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
    share = (step - num_warmup) / max(num_steps - num_warmup, 1)
    return (peak - least) * (1 - share) ** power + least


def warm_steps(
    step: int, num_steps: int, *, peak: float, num_warmup: int, milestones: tuple[float, ...], factor: float = 0.1
) -> float:
    """Learning rate: as :func:`warm_cosine` to ``peak``, then ``factor`` times as much from each milestone on.

    Args:
        step: 0..num_steps-1.
        num_steps: T.
        peak: the highest.
        num_warmup: steps of the warm-up.
        milestones: as fractions of all steps.
        factor: multiplier at each milestone.

    Source: Li et al., ViTDet, arXiv:2203.16527, App. A.2.
    """
    if step < num_warmup:
        return peak * (step + 1) / num_warmup
    return peak * factor ** sum(step >= share * num_steps for share in milestones)


class _Steps(Dataset[Any]):
    """The batch of a step; errors are returned, so that they cross from a worker as they are."""

    def __init__(
        self, make: Callable[[int, int], Example | Skipped], num_images: int, batch_size: int, seed: int
    ) -> None:
        self._make, self._num_images, self._batch_size, self._seed = make, num_images, batch_size, seed

    def __getitem__(self, step: int) -> tuple[Tensor, Any, list[Skipped]] | SmaltiError:
        skipped: list[Skipped] = []
        first = step * self._batch_size
        try:
            made = [self._example(position, skipped) for position in range(first, first + self._batch_size)]
        except SmaltiError as error:
            return error
        targets = [target for _, target in made]
        stacked = torch.stack(targets) if isinstance(targets[0], Tensor) else targets
        return torch.stack([image for image, _ in made]), stacked, skipped

    def _example(self, position: int, skipped: list[Skipped]) -> Example:
        """The image at a place of the endless row of epochs, or the next that can be read."""
        epoch, offset = divmod(position, self._num_images)
        order = _cached_order(self._seed, epoch, self._num_images)
        key = sample_key(self._seed, epoch, int(order[offset]))  # also a replacement's: it has a turn of its own
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
    """``items[0]`` to ``items[count - 1]`` in order, made by worker processes where there are any.

    Raises:
        SmaltiError: if an item is one.
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
) -> list[float]:
    """Fit a model to the training images; it ends in eval mode.

    Every batch is full: epochs run into one another, and an image that can't be read is replaced by the next.

    Args:
        model: on the device of the encoder.
        optimizer: of its parameters; ``lr_scale`` of a group multiplies its learning rate.
        features: the training images and the progress callback.
        make: ``make(place, key)``: the image at a place of the training set, augmented as the key says.
        loss_of: ``loss_of(images, targets)`` of a batch; targets are stacked, or a list where they are dictionaries.
        rate: learning rate of a step, 0..num_steps-1.
        num_steps: T.
        batch_size: B.
        seed: of the order of images, and their keys.
        what: named in the progress, and in errors.
        num_images: of the training set, where it is a part of that of ``features``.
        bf16: whether products are in bfloat16; None: where a GPU has it.

    Returns:
        The loss, as means over at most 100 spans of equal length.

    Raises:
        DataError: if no image can be read, or a target can't.
        RunError: if the loss is not finite.
    """
    device = features.device
    steps = _Steps(make, num_images or len(features.data.train), batch_size, seed)
    bf16 = has_bf16(device.type) if bf16 is None else bf16
    losses: list[Tensor] = []
    told = time.monotonic()
    model.train()
    with torch.enable_grad():
        for step, (images, targets, skipped) in enumerate(stream(steps, num_steps, features.num_workers)):
            features.skipped.update({str(item.path): item.reason for item in skipped})
            for group in optimizer.param_groups:
                group["lr"] = rate(step) * group.get("lr_scale", 1.0)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = loss_of(images.to(device), _to(device, targets))
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
            losses.append(loss.detach())
            if step % _CHECK_EVERY == 0 or step + 1 == num_steps:
                if not torch.stack(losses[-_CHECK_EVERY:]).isfinite().all():
                    raise RunError(f"{what}: the loss is not finite at step {step}; lower its learning_rate")
                told = -math.inf
            if time.monotonic() - told > _TELL_EVERY_S:
                told = time.monotonic()
                features.progress(what, step + 1, num_steps)
    model.eval()
    spans = torch.stack(losses).float().cpu().tensor_split(min(_CURVE_POINTS, len(losses)))
    return [float(span.mean()) for span in spans]


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
        ``top1``, ``balanced_top1`` and, from five classes on, ``top5``; the recall of each class; what each image
        contributes to each score; the confusion matrix.

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
