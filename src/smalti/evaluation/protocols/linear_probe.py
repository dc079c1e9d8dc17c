"""Linear classification of frozen features, with a grid of learning rates trained in parallel.

Presets small and full: Oquab et al., DINOv2, arXiv:2304.07193, the linear evaluation of their code: 13 learning rates
times combinations of features, all heads on the same batches. Features are standardised as in He et al., MAE,
arXiv:2111.06377v3, App. A.1 (a batch norm without affine part), here with mean and deviation of all training images.
Differs from both: features of the last block only, class token without and with mean patch; they are computed once, on
whole images, without augmentation; the best of the grid is selected on 20 % of the *training* images and refitted on
all of them, so nothing is selected on test images.
Letters: n images, D features, K classes, H heads.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from smalti.charts import loss_chart
from smalti.config import BatchSize, Count, settings
from smalti.data.images.folders import ImageSample
from smalti.data.loader import epoch_order
from smalti.data.views import Skipped
from smalti.errors import ConfigError, DataError
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.context import Progress
from smalti.evaluation.features import ATTENTIVE, Features, ImageFeatures
from smalti.evaluation.metrics import ConfusionMatrix, accuracy, balanced_accuracy, class_recall
from smalti.evaluation.protocol import Scores, register_protocol
from smalti.evaluation.tally import tally_labels
from smalti.evaluation.tuning import Example, evaluate_labels, normalized, random_view, seeded, train
from smalti.layers.gaussian_bias import Places
from smalti.models.encoder import Encoder
from smalti.models.pooling import PatchFeatures, check_pool, pool_features

LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
"""Grid of learning rates, multiplied by head_batch_size / 256."""
MOMENTUM = 0.9
BATCH_SIZE, EPOCHS = 256, 100
FEWEST_STEPS, MOST_STEPS = 500, 12_500  # minimum for small data sets; DINOv2 has 12 500
HELD_OUT = 0.2
DINO_RATE, DINO_BATCH_SIZE, DINO_CROP_AREA = 0.001, 1024, (0.08, 1.0)
"""The learning rate is for 256 images; the batch is 128 images on each of eight GPUs."""
WIDE = 768
"""From this width (ViT-B), the class token of one block is used instead of four."""


class Heads(NamedTuple):
    """H linear classifiers in parallel."""

    weight: Float[Tensor, "D H*K"]
    bias: Float[Tensor, " H*K"]

    def logits(self, inputs: Float[Tensor, "n D"], num_classes: int) -> Float[Tensor, "n H K"]:
        """Class scores of each head."""
        return torch.addmm(self.bias, inputs, self.weight).view(len(inputs), -1, num_classes)


class Probe(NamedTuple):
    """The head selected by :func:`fit_probe`."""

    heads: Heads
    """One head, on standardised features."""
    mean: Float[Tensor, " D"]
    std: Float[Tensor, " D"]
    reads: Bool[Tensor, " D"]
    """Mask of the features it uses; ``heads`` has only these."""
    combination: int
    """Index of its combination of features."""
    rate: int
    """Index of its learning rate in :data:`LEARNING_RATES`."""
    epochs: int
    num_held_out: int
    held_out_top1: float

    def logits(self, inputs: Float[Tensor, "n D"], num_classes: int) -> Float[Tensor, "n K"]:
        """Class scores of features that aren't standardised."""
        return self.heads.logits(((inputs - self.mean) / self.std)[:, self.reads], num_classes)[:, 0]


def train_heads(
    inputs: Float[Tensor, "n D"],
    labels: Int[Tensor, " n"],
    num_classes: int,
    learning_rates: Float[Tensor, " H"],
    sees: Bool[Tensor, "H D"],
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    progress: Progress | None = None,
) -> Heads:
    """Fit H softmax classifiers at once: SGD with momentum 0.9, cosine learning rate, no weight decay.

    One matrix product per step for all heads: their weights are the columns of one matrix.

    Args:
        inputs: ``(n, D)`` standardised features.
        labels: ``(n,)`` classes.
        num_classes: K.
        learning_rates: ``(H,)`` initial learning rate of each head.
        sees: ``(H, D)`` True where a head uses a feature.
        epochs: passes over the images; the order depends on (seed, epoch) only.
        batch_size: images per step.
        seed: seed of the order and of the initial weights, N(0, 0.01), the same for all heads.
        progress: called as ``progress("linear-probe", step, steps)``.
    """
    num_images, width = inputs.shape
    device, num_heads = inputs.device, len(learning_rates)
    g = torch.Generator().manual_seed(seed)
    start = torch.randn(width, num_classes, generator=g).mul_(0.01).to(device)
    is_read = sees.to(device).T.repeat_interleave(num_classes, dim=1)  # (D, H*K)
    weight = start.repeat(1, num_heads) * is_read
    bias = torch.zeros(num_heads * num_classes, device=device)
    weight_velocity, bias_velocity = torch.zeros_like(weight), torch.zeros_like(bias)
    rates = learning_rates.to(device).repeat_interleave(num_classes)
    one_hot = F.one_hot(labels, num_classes).to(inputs.dtype)
    steps = epochs * math.ceil(num_images / batch_size)
    step = 0
    for epoch in range(epochs):
        order = torch.from_numpy(epoch_order(seed, epoch, num_images)).to(device)
        for batch in torch.split(order, batch_size):
            x = inputs[batch]
            probs = Heads(weight, bias).logits(x, num_classes).softmax(-1)
            # gradient of the cross-entropy in closed form, mean over the batch; heads are independent
            error = (probs - one_hot[batch, None]).flatten(1) / len(batch)
            weight_velocity.mul_(MOMENTUM).add_(torch.mm(x.T, error))
            bias_velocity.mul_(MOMENTUM).add_(error.sum(0))
            now = rates * (0.5 * (1 + math.cos(math.pi * step / steps)))
            weight -= now * weight_velocity * is_read
            bias -= now * bias_velocity
            step += 1
            if progress is not None and (step % 100 == 0 or step == steps):
                progress("linear-probe", step, steps)
    return Heads(weight, bias)


def stratified_fifth(labels: Int[Tensor, " n"], seed: int) -> Bool[Tensor, " n"]:
    """True for a random 20 % of each class, at least one image of every class that has two."""
    g = torch.Generator().manual_seed(seed)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in sorted(set(labels.tolist())):
        members = (labels == label).nonzero()[:, 0]
        count = max(1, round(HELD_OUT * len(members))) if len(members) > 1 else 0
        held_out[members[torch.randperm(len(members), generator=g)[:count]]] = True
    return held_out


@dataclass(frozen=True)
class LastBlocks:
    """DINO's features of an image: class tokens of the last blocks, each after the final norm.

    Four blocks for ViT-S; for wider encoders the last block, with its mean patch.
    """

    encoder: Encoder
    pool: str = "auto"
    """``prr`` pools the tokens of each block by PRR, as in the linear evaluation of the paper's DINO variant
    (arXiv:2603.04892, released code); ``avg`` uses only mean patches."""

    @property
    def num_blocks(self) -> int:
        """Number of blocks whose class tokens are used."""
        return min(4, self.encoder.depth) if self.encoder.embed_dim < WIDE else 1

    @property
    def has_mean_patch(self) -> bool:
        """Whether the mean patch of the last block is also used."""
        return self.encoder.embed_dim >= WIDE and self.encoder.has_class_token and self.pool != "avg"

    @property
    def width(self) -> int:
        """Total number of features."""
        return self.encoder.embed_dim * (self.num_blocks + self.has_mean_patch)

    def __str__(self) -> str:
        token = "class token" if self.encoder.has_class_token else "mean patch (no class token)"
        if self.pool in ("avg", "prr"):
            token = {"avg": "mean patch", "prr": "tokens pooled by PRR"}[self.pool]
        return f"{token} of the last {self.num_blocks} blocks" + (", mean patch" if self.has_mean_patch else "")

    def __call__(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D"]:
        """Features of normalised images."""
        encoder, first = self.encoder, self.encoder.num_prefix_tokens
        tokens, grid = encoder.embed_patches(images)
        sequence = encoder.assemble(tokens, encoder.positions(grid))
        layers = encoder.forward_layers(sequence, range(-self.num_blocks, 0), places=Places(grid))
        pool = "auto" if self.pool == "cls" else self.pool
        parts = [
            pool_features(PatchFeatures(layer[:, first:], layer[:, :first], grid), pool, encoder.has_class_token)
            if pool != "prr"
            else encoder.pooled(PatchFeatures(layer[:, first:], layer[:, :first], grid), pool)
            for layer in layers
        ]
        if self.has_mean_patch:
            parts.append(layers[-1][:, first:].mean(1))
        return torch.cat(parts, dim=1)


@dataclass(frozen=True)
class _CroppedExamples:
    """Loads and crops training images; see :func:`~smalti.evaluation.tuning.train`."""

    samples: Sequence[ImageSample]
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, place: int, key: int) -> Example | Skipped:
        sample = self.samples[place]
        view = random_view(sample, len(self.mean), self.size, DINO_CROP_AREA, key, mode="bilinear")
        if isinstance(view, Skipped):
            return view
        return normalized(view, self.mean, self.std), torch.tensor(sample.label)


@settings
class LinearProbeConfig:
    """Settings of ``linear-probe``."""

    epochs: Count | None = None
    """Passes over the training images; None: the preset's."""
    batch_size: BatchSize | None = None
    """Images per training step; None: the preset's."""


def dino_probe(features: Features, config: EvalConfig) -> Scores:
    """The linear probe in DINO's form."""
    own: LinearProbeConfig = config.of("linear-probe")
    encoder, num_classes = features.encoder, len(features.data.classes)
    size = features.image_size(config.image_size or 224)
    epochs, batch_size = own.epochs or EPOCHS, own.batch_size or DINO_BATCH_SIZE
    num_images, peak = len(features.data.train), DINO_RATE * batch_size / BATCH_SIZE
    num_steps = math.ceil(epochs * num_images / batch_size)
    if config.pool == "map":
        raise ConfigError(
            "eval.pool=map is trained for the last block only, but eval.preset=paper uses several; choose another"
        )
    check_pool(config.pool, encoder.has_class_token)
    read = LastBlocks(encoder, config.pool)

    def frozen(images: Tensor) -> Tensor:
        # float32 although the loop trains in bfloat16, since only a linear layer is trained
        with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
            return torch.cat([read(part) for part in torch.split(images, features.batch_size)])

    with seeded(config.seed):
        head = nn.Linear(read.width, num_classes)
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
    head.to(features.device)
    curve = train(
        head,
        torch.optim.SGD(head.parameters(), peak, MOMENTUM),
        features,
        _CroppedExamples(features.data.train.samples, size, encoder.mean, encoder.std),
        lambda images, labels: F.cross_entropy(head(frozen(images)), labels),
        lambda step: peak * (1 + math.cos(math.pi * (step * batch_size // num_images) / epochs)) / 2,
        num_steps=num_steps,
        batch_size=batch_size,
        seed=config.seed,
        what="linear-probe",
    )
    metrics, per_class, tallies, confusion = evaluate_labels(lambda images: head(read(images)), features, size)
    settings = {
        "preset": config.preset,
        "form": "DINO's: random crops and flips, one learning rate",
        "comparable": "DINO's settings, unless changed, but the last epoch instead of the best",
        "features": str(read),
        "learning_rate": peak,
        "optimiser": f"SGD, momentum {MOMENTUM}, cosine to 0 per epoch",
        "epochs": epochs,
        "steps": num_steps,
        "head_batch_size": batch_size,
        "augmentation": "random resized crop of {:g}-{:g} of the area, bilinear, flip".format(*DINO_CROP_AREA),
        "image_size": size,
        "resize": "short side, then centre crop",
        "reported": "last epoch",
    }
    return Scores(
        metrics,
        settings,
        per_class,
        tallies=tallies,
        confusion=confusion.matrix.numpy(),
        charts={"loss": loss_chart(curve)},
    )


def fit_probe(
    inputs: Float[Tensor, "n D"],
    labels: Int[Tensor, " n"],
    num_classes: int,
    sees: Bool[Tensor, "F D"],
    *,
    epochs: int | None,
    batch_size: int,
    seed: int,
    root: Path,
    progress: Progress | None = None,
) -> Probe:
    """Fit the grid of learning rates and features on 80 %, select on the rest, and refit the best one on all images.

    Args:
        inputs: ``(n, D)`` features of the training images, on the device to compute on.
        labels: ``(n,)`` classes, on the CPU.
        num_classes: K.
        sees: ``(F, D)`` True where one of the F combinations uses a feature.
        epochs: passes over the images; None: depends on the number of images.
        batch_size: images per step.
        seed: seed of the held-out 20 %, the order of images and the initial weights.
        root: folder of the images, for errors.
        progress: as in :func:`train_heads`.

    Raises:
        DataError: if no class has two images.
    """
    held_out = stratified_fifth(labels, seed)
    if not held_out.any():
        raise DataError(
            f"{root}: {len(labels)} training images, one of each class; linear-probe selects "
            "its learning rate on held-out images, so at least one class needs two"
        )
    device = inputs.device
    labels, sees = labels.to(device), sees.to(device)
    rates = torch.tensor(LEARNING_RATES) * (batch_size / BATCH_SIZE)
    heads_rates, heads_sees = rates.repeat(len(sees)), sees.repeat_interleave(len(rates), dim=0)

    fit = ~held_out.to(device)
    mean, std = _moments(inputs[fit])
    heads = train_heads(
        (inputs[fit] - mean) / std,
        labels[fit],
        num_classes,
        heads_rates,
        heads_sees,
        epochs=epochs or _epochs(int(fit.sum()), batch_size),
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )
    best, held_out_top1 = _choose(heads.logits((inputs[~fit] - mean) / std, num_classes), labels[~fit])
    combination, rate = divmod(best, len(rates))

    mean, std = _moments(inputs)
    passes = epochs or _epochs(len(labels), batch_size)
    chosen = sees[combination]
    head = train_heads(
        ((inputs - mean) / std)[:, chosen],
        labels,
        num_classes,
        rates[rate : rate + 1],
        chosen[None, chosen],
        epochs=passes,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )
    return Probe(head, mean, std, chosen, combination, rate, passes, int(held_out.sum()), held_out_top1)


@register_protocol("linear-probe", need="labels", settings=LinearProbeConfig, takes_pool=True)
@torch.no_grad()
def linear_probe(features: Features, config: EvalConfig) -> Scores:
    """Image classification with a linear head on frozen features; needs class folders."""
    own: LinearProbeConfig = config.of("linear-probe")
    if config.preset == "paper":
        return dino_probe(features, config)
    size = features.image_size(config.image_size)
    train, test = (features.image_level(split, size, config.pool) for split in ("train", "test"))
    num_classes, device = len(features.data.classes), features.device
    batch_size = own.batch_size or BATCH_SIZE
    inputs, sees, names = _grid(train, config.pool)
    probe = fit_probe(
        inputs.to(device),
        train.labels,
        num_classes,
        sees,
        epochs=own.epochs,
        batch_size=batch_size,
        seed=config.seed,
        root=features.data.train.root,
        progress=features.progress,
    )
    confusion = ConfusionMatrix(num_classes)
    preds = probe.logits(_grid(test, config.pool)[0].to(device), num_classes).argmax(1).cpu()
    confusion.update(test.labels, preds)
    settings = {
        "preset": config.preset,
        "form": "fast: cached features of whole images, no augmentation",
        "features": names[probe.combination],
        "learning_rate": LEARNING_RATES[probe.rate] * batch_size / BATCH_SIZE,
        "learning_rate_is_at_edge_of_grid": probe.rate in (0, len(LEARNING_RATES) - 1),
        "chosen_by": "top1 on held-out 20 % of the training images; then refitted on all of them",
        "num_held_out": probe.num_held_out,
        "held_out_top1": probe.held_out_top1,
        "grid": f"{len(LEARNING_RATES)} learning rates x {' | '.join(names)}",
        "standardised": "mean and deviation of the training images",
        "optimiser": f"SGD, momentum {MOMENTUM}, cosine to 0",
        "epochs": probe.epochs,
        "head_batch_size": batch_size,
        "image_size": size,
        "resize": "short side, then centre crop",
    }
    metrics = {"top1": accuracy(confusion.matrix), "balanced_top1": balanced_accuracy(confusion.matrix)}
    recall = class_recall(confusion.matrix).tolist()
    return Scores(
        metrics,
        settings,
        {"recall": dict(zip(features.data.classes, recall, strict=True))},
        tallies=tally_labels(test.labels, preds, num_classes, test.places, len(features.data.test)),
        confusion=confusion.matrix.numpy(),
    )


def _grid(images: ImageFeatures, pool: str) -> tuple[Float[Tensor, "n D"], Bool[Tensor, "F D"], list[str]]:
    """All features concatenated, which of them each of the F combinations uses, and the combinations' names.

    ``auto``: class token if there is one; ``prr`` or ``map`` if the encoder uses it.
    """
    avg = images.pool("avg")
    if pool == "auto":
        pool = images.auto if images.auto in ATTENTIVE else "cls" if images.has_class_token else "avg"
    if pool == "avg":
        return avg, torch.ones(1, avg.shape[1], dtype=torch.bool), ["avg"]
    sees = torch.ones(2, 2 * avg.shape[1], dtype=torch.bool)
    sees[0, avg.shape[1] :] = False
    return torch.cat([images.pool(pool), avg], dim=1), sees, [pool, f"{pool}+avg"]


def _choose(logits: Float[Tensor, "n H K"], labels: Int[Tensor, " n"]) -> tuple[int, float]:
    """The head with the highest accuracy (ties: with the lowest cross-entropy), and its accuracy."""
    top1 = (logits.argmax(-1) == labels[:, None]).double().mean(0)
    target = labels[:, None].expand(-1, logits.shape[1])
    loss = F.cross_entropy(logits.transpose(1, 2), target, reduction="none").mean(0).nan_to_num(torch.inf)
    best = min(range(len(top1)), key=lambda head: (-float(top1[head]), float(loss[head])))
    return best, float(top1[best])


def _moments(inputs: Float[Tensor, "n D"]) -> tuple[Float[Tensor, " D"], Float[Tensor, " D"]]:
    """Mean and standard deviation as in batch norm: constant features become 0 instead of noise."""
    return inputs.mean(0), (inputs.var(0, correction=0) + 1e-6).sqrt()


def _epochs(num_images: int, batch_size: int) -> int:
    steps = math.ceil(num_images / batch_size)  # per epoch
    return max(1, min(max(EPOCHS, math.ceil(FEWEST_STEPS / steps)), MOST_STEPS // steps))
