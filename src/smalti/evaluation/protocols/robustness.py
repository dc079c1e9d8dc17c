"""Robustness: classification accuracy under occlusion and geometric change of the test images.

Occlusion: patches of the encoder's grid are set to the mean color. As in Naseer et al., "Intriguing properties of
vision transformers", arXiv:2105.10497, Sec. 3.1, they are chosen at random or by saliency; here also as one block.
Saliency is computed from the pixels (Hou & Zhang, CVPR 2007), where that paper takes the attention of a DINO: the same
pixels are hidden from every encoder. Geometric change: rotation, shear, translation and scale about the centre; pixels
without a source get the mean color. PART (arXiv:2506.03682) claims robustness of this kind; it gives no protocol, so
the families and their ranges are ours and there are no published numbers to compare with.
A score is the area under the curve of top-1 over the range of a family, the unchanged image included, divided by the
range: a mean accuracy in 0..1. Larger changes contain smaller ones, and an image is changed the same way for every
encoder and seed.
Letters: n images, L levels of a family, B images in a batch, S side in pixels, K classes.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from smalti.charts import Line, LineChart, XAxis, floats
from smalti.config import Count, settings
from smalti.data.images.labelled import eval_batches
from smalti.errors import ConfigError, DataError
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.context import spread
from smalti.evaluation.features import Features
from smalti.evaluation.protocol import Scores, register_protocol
from smalti.evaluation.protocols.finetune import fine_tune
from smalti.evaluation.protocols.linear_probe import BATCH_SIZE, fit_probe
from smalti.evaluation.tally import Tally, tally_mean
from smalti.functional.orders import random_orders
from smalti.functional.perturbations import contiguous_orders, hidden_patches, hide, salient_orders, warp
from smalti.models.encoder import eval_mode

Head = Literal["linear", "finetune"]
OCCLUSIONS = ("random_drop", "contiguous_drop", "salient_drop")
GEOMETRIC = ("rotation", "shear", "translation", "scale")
FAMILIES = (*OCCLUSIONS, *GEOMETRIC)
Fraction = Annotated[float, Field(gt=0, lt=1)]
Degrees = Annotated[float, Field(gt=0, le=180)]
Slant = Annotated[float, Field(gt=0, lt=90)]
Factor = Annotated[float, Field(gt=0, le=10)]


@settings
class RobustnessConfig:
    """Settings of ``robustness``."""

    heads: tuple[Head, ...] = get_args(Head)
    """``linear``: a linear classifier on the frozen encoder; ``finetune``: the encoder fine-tuned on unchanged images.
    The first is the headline."""
    drop_ratios: tuple[Fraction, ...] = (0.1, 0.25, 0.5, 0.75, 0.9)
    """Fractions of hidden patches."""
    angles: tuple[Degrees, ...] = (15, 30, 45, 60, 90)
    """Rotations in degrees, clockwise or counter-clockwise for each image."""
    shears: tuple[Slant, ...] = (10, 20, 30, 40)
    """Shears in degrees, to the left or to the right for each image."""
    translations: tuple[Fraction, ...] = (0.1, 0.2, 0.3, 0.4)
    """Translations as fractions of the side, in one of four directions for each image."""
    scales: tuple[Factor, ...] = (0.5, 0.7, 1.4, 2.0)
    """Scale factors; below 1 the image shrinks."""
    num_images: Count = 500
    """Number of test images to measure, evenly spaced over the set."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """Levels of a family with the unchanged image among them, ascending on an axis."""

    levels: tuple[float, ...]
    axis: tuple[float, ...]
    """Where each level lies: the level itself, of scales its base-2 logarithm."""

    @property
    def weights(self) -> Float[Tensor, " L"]:
        """Weights of the trapezoidal rule, which add up to 1: the score is the mean of top-1 with them."""
        gaps = torch.tensor(self.axis, dtype=torch.float64).diff()
        weights = torch.zeros(len(self.axis), dtype=torch.float64)
        weights[:-1] += gaps / 2
        weights[1:] += gaps / 2
        return weights / gaps.sum()


def curves_of(own: RobustnessConfig) -> dict[str, Curve]:
    """The curve of each family.

    Raises:
        ConfigError: for a family without levels, or with a level twice.
    """
    wanted = {
        **dict.fromkeys(OCCLUSIONS, ("drop_ratios", own.drop_ratios, 0.0)),
        "rotation": ("angles", own.angles, 0.0),
        "shear": ("shears", own.shears, 0.0),
        "translation": ("translations", own.translations, 0.0),
        "scale": ("scales", own.scales, 1.0),
    }
    curves = {}
    for family, (name, levels, unchanged) in wanted.items():
        every = tuple(sorted((*levels, unchanged)))
        if not levels or len(set(every)) < len(every):
            raise ConfigError(
                f"eval.robustness.{name}={list(levels)}: different levels are needed, {unchanged:g} is added"
            )
        curves[family] = Curve(every, tuple(map(math.log2, every)) if family == "scale" else every)
    return curves


def changed(
    images: Float[Tensor, "B C S S"],
    family: str,
    level: float,
    orders: Mapping[str, Tensor],
    keys: Int[Tensor, " B"],
    grid: tuple[int, int],
) -> Float[Tensor, "B C S S"]:
    """Normalised images at one level of a family.

    Args:
        images: normalised.
        family: one of :data:`FAMILIES`.
        level: of the change.
        orders: of each occlusion, ``(B, N)`` in which patches are hidden.
        keys: ``(B,)`` int64, of the images.
        grid: ``(h, w)`` of the encoder.
    """
    if family in orders:
        return hide(images, hidden_patches(orders[family], level), grid)
    return warp(images, family, level, keys)  # type: ignore[arg-type]


def measure(
    features: Features,
    model: Callable[[Tensor], Tensor],
    curves: Mapping[str, Curve],
    chosen: tuple[int, ...],
    size: int,
    what: str,
) -> tuple[dict[str, Bool[Tensor, "n L"]], list[int]]:
    """Whether each image is classified correctly at each level.

    Args:
        features: the encoder and the test images.
        model: ``(B, C, S, S)`` normalised images -> ``(B, K)`` class scores.
        curves: of each family.
        chosen: indices of the test images to measure.
        size: S.
        what: name for the progress line.

    Returns:
        Correctness by family, and the indices of the images that could be read.
    """
    encoder, test = features.encoder, features.data.test
    few = dataclasses.replace(test, samples=tuple(test.samples[place] for place in chosen))
    batches = eval_batches(
        few, size, encoder.in_chans, mode="crop", batch_size=features.batch_size, num_workers=features.num_workers
    )
    grid = encoder.check_size(size, size)
    found: dict[str, list[Tensor]] = {family: [] for family in curves}
    places, done = list[int](), 0
    for pixels, positions, skipped in batches:
        features.skipped.update({str(item.path): item.reason for item in skipped})
        done += len(positions) + len(skipped)
        if positions:
            images = encoder.normalize(pixels.to(features.device))
            there = [chosen[position] for position in positions]
            keys = torch.tensor(there, device=features.device)
            labels = torch.tensor([int(test.samples[place].label or 0) for place in there])
            orders = {
                "random_drop": random_orders(keys, grid[0] * grid[1]),
                "contiguous_drop": contiguous_orders(keys, grid),
                "salient_drop": salient_orders(images, grid),
            }
            clean = model(images).argmax(1).cpu() == labels
            for family, curve in curves.items():
                columns = [
                    clean
                    if level == (family == "scale")
                    else model(changed(images, family, level, orders, keys, grid)).argmax(1).cpu() == labels
                    for level in curve.levels
                ]
                found[family].append(torch.stack(columns, dim=1))
            places += there
        features.progress(what, done, len(few))
    if not places:
        raise DataError(f"{test.root}: none of the {len(few)} {features.evaluated} can be read")
    return {family: torch.cat(parts) for family, parts in found.items()}, places


def linear_model(features: Features, config: EvalConfig, size: int) -> Callable[[Tensor], Tensor]:
    """A linear classifier on the frozen encoder, fitted as ``linear-probe`` does."""
    encoder = features.encoder
    train = features.image_level("train", size, config.pool)
    inputs = train.pool(config.pool).to(features.device)
    probe = fit_probe(
        inputs,
        train.labels,
        len(features.data.classes),
        torch.ones(1, inputs.shape[1], dtype=torch.bool),
        epochs=None,
        batch_size=BATCH_SIZE,
        seed=config.seed,
        root=features.data.train.root,
        progress=features.progress,
    )
    pool = config.pool
    return lambda images: probe.logits(encoder.pooled(encoder.encode(images), pool).float(), len(features.data.classes))


@register_protocol("robustness", need="labels", settings=RobustnessConfig, takes_pool=True, by_default=False)
def robustness(features: Features, config: EvalConfig) -> Scores:
    """Classification accuracy under hidden patches, rotation, shear, translation and scale; needs class folders."""
    own: RobustnessConfig = config.of("robustness")
    if not own.heads or len(set(own.heads)) < len(own.heads):
        raise ConfigError(f"eval.robustness.heads={list(own.heads)}: linear, finetune or both are needed")
    size, test, curves = features.image_size(config.image_size), features.data.test, curves_of(own)
    chosen = spread(len(test), own.num_images)
    metrics: dict[str, float] = {}
    tallies: dict[str, Tally] = {}
    levels: dict[str, Any] = {}
    heads: dict[str, str] = {}
    charts: dict[str, LineChart] = {}
    network: nn.Module
    for head in own.heads:
        if head == "linear":
            model, network = linear_model(features, config, size), features.encoder
            heads[head] = "frozen encoder, linear classifier as in linear-probe"
        else:
            tuned = fine_tune(features, config)
            model, network, size = tuned.model, tuned.model, tuned.recipe.image_size
            heads[head] = f"fine-tuned on unchanged images as in finetune, {tuned.recipe.epochs} epochs"
        with eval_mode(network), torch.no_grad():
            right, places = measure(features, model, curves, chosen, size, f"robustness, {head}")
        prefix = "" if head == own.heads[0] else f"{head}_"
        values = {family: right[family].double() @ curve.weights for family, curve in curves.items()}
        columns = {
            "auc": torch.stack(list(values.values())).mean(0),
            "top1": right["scale"][:, curves["scale"].levels.index(1.0)].double(),
            **{f"auc_{family}": value for family, value in values.items()},
        }
        for name, column in columns.items():
            numbers = np.full(len(test), np.nan)
            numbers[places] = column.numpy()
            tallies[prefix + name] = tally_mean(numbers)
            metrics[prefix + name] = tallies[prefix + name].score()
        charts |= {f"{head}-{family}": _chart(head, family, curve, right[family]) for family, curve in curves.items()}
        levels[head] = {
            family: {"level": list(curve.levels), "top1": right[family].double().mean(0).tolist()}
            for family, curve in curves.items()
        }
    return Scores(
        metrics,
        {
            "preset": config.preset,
            "heads": heads,
            "image_size": size,
            "resize": "short side, then centre crop",
            "num_images": len(places),
            "hidden_pixels": "the mean color",
            "curves": levels,
        },
        {},
        tallies=tallies,
        charts=charts,
    )


_AXES: Mapping[str, tuple[XAxis, str]] = {
    **dict.fromkeys(OCCLUSIONS, ("fraction", "hidden patches")),
    "rotation": ("count", "degrees"),
    "shear": ("count", "degrees"),
    "translation": ("fraction", "of the side"),
    "scale": ("log", "factor"),
}


def _chart(head: Head, family: str, curve: Curve, right: Bool[Tensor, "n L"]) -> LineChart:
    axis, label = _AXES[family]
    words = {"linear": "linear classifier on the frozen encoder", "finetune": "fine-tuned encoder"}[head]
    return LineChart(
        title=f"{family.replace('_', ' ')}, {head}",
        explanation=f"Top-1 of a {words} against the change of the test images; higher is better.",
        lines=(Line(floats(right.double().mean(0).tolist()), curve.levels),),
        section="Robustness",
        x_axis=axis,
        x_label=label,
        has_points=True,
    )
