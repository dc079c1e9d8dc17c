"""In-context segmentation: pixel classes by retrieval of labelled patches, without training.

Source: Balazevic et al., "Towards in-context scene understanding", arXiv:2306.01667, Sec. 3, in the form of the public
code open-hummingbird-eval, which NeCo's and CrIBo's comparisons use.
Differs from the code: search is exact (theirs: approximate by default); the choice of patches doesn't depend on
batches. With ``preset=small`` and ``full``, pixels without a label are ignored (theirs: class 0) and predicted classes
aren't matched (theirs: Hungarian matching, which can only raise the score); ``preset=paper`` follows their code.
Letters: B images in a batch, N = h*w patches, K neighbours, C classes, S side of the masks.
"""

from typing import Annotated

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from smalti.config import ImageSize, settings
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.dense import ignored_value, upsampling
from smalti.evaluation.features import Features
from smalti.evaluation.memory import (
    DEFAULT_K,
    MemoryConfig,
    choose_k,
    choose_recipe,
    comparable,
    masks_of,
    memory_settings,
    neighbours,
    patch_memory,
    unlabelled_places,
)
from smalti.evaluation.metrics import MATCHINGS, Absent, Matching, accuracy, class_iou, mean_iou
from smalti.evaluation.protocol import Scores, register_protocol
from smalti.evaluation.tally import PixelTally
from smalti.functional.neighbours import mix_labels


@settings
class InContextConfig(MemoryConfig):
    """Settings of ``in-context``."""

    temperature: Annotated[float, Field(gt=0)] = 0.02
    """Temperature of the softmax over neighbours."""
    matching: Matching | None = None
    """Predicted classes as they are (``direct``), or matched to the true ones (``hungarian``); None: the preset's."""
    mask_size: ImageSize | None = None
    """Side of the masks in pixels; None: the preset's."""
    absent: Absent | None = None
    """mIoU: a class in neither masks nor predictions counts zero, or is skipped; None: the preset's."""


def upsampled_argmax(fractions: Float[Tensor, "h w C"], size: int) -> Int[Tensor, "S S"]:
    """Class with the largest fraction at each pixel, after bilinear upsampling; ties go to the lowest.

    Args:
        fractions: ``(h, w, C)`` class fractions of the patches of one image.
        size: S.
    """
    rows, columns = (upsampling(side, size).to(fractions.device) for side in fractions.shape[:2])
    up = (rows @ fractions.flatten(1)).view(size, *fractions.shape[1:])  # (h, w, C) -> (S, w, C)
    return torch.matmul(columns, up).argmax(-1)


@register_protocol("in-context", need="masks", settings=InContextConfig, takes_norm=True, priority=40)
@torch.no_grad()
def in_context(features: Features, config: EvalConfig) -> Scores:
    """Semantic segmentation by retrieving the labels of the nearest training patches; needs masks."""
    own: InContextConfig = config.of("in-context")
    recipe = choose_recipe(features, config, own)
    images, classes = features.data.test, features.data.classes
    grid = features.encoder.check_size(recipe.image_size, recipe.image_size)
    size = own.mask_size or recipe.image_size
    is_paper = config.preset == "paper"
    absent: Absent = own.absent or ("zero" if is_paper else "skip")
    matching: Matching = own.matching or ("hungarian" if is_paper else "direct")
    unlabelled = unlabelled_places(features)
    memory = patch_memory(features, recipe, config.seed)
    k, about_k = choose_k(config, own, DEFAULT_K, len(memory.keys))

    tally = PixelTally(len(classes), len(images), ignored_value(len(classes)), features.device)
    predictions: dict[int, np.ndarray] = {}
    for sims, found, places in neighbours(features, recipe, config.seed, k):
        weights = (sims / own.temperature).softmax(-1)
        labels = mix_labels(weights.flatten(0, 1), found.flatten(0, 1), memory.counts).view(len(places), *grid, -1)
        for fractions, place in zip(labels, places, strict=True):
            if place in unlabelled and place not in features.shown:
                continue
            pred = upsampled_argmax(fractions, size)
            if place not in unlabelled:
                tally.update(masks_of(images, [place], len(classes), size).to(pred.device), pred[None], [place])
            if place in features.shown:
                predictions[place] = pred.cpu().numpy().astype(np.int32)
    mapping = MATCHINGS[matching](tally.confusion.matrix)
    tally = tally.renamed(mapping)
    matrix = tally.confusion.matrix
    settings = {
        **memory_settings(features, recipe, memory, config),
        "comparable": comparable(
            config, "void pixels ignored, predicted classes not matched, absent classes skipped, one pass"
        ),
        "mask_size": size,
        **about_k,
        "temperature": own.temperature,
        "matching": matching,
        "absent": absent,
        "ignored_value": ignored_value(len(classes)) if len(classes) <= 255 else None,
    }
    iou = dict(zip(classes, class_iou(matrix).tolist(), strict=True))
    return Scores(
        {"miou": mean_iou(matrix, absent), "pixel_accuracy": accuracy(matrix)},
        settings,
        {"iou": iou},
        tallies={"miou": tally.iou(absent), "pixel_accuracy": tally.pixel_accuracy()},
        confusion=matrix.cpu().numpy(),
        predictions={place: mapping.numpy()[pred].astype(np.int32) for place, pred in predictions.items()},
    )
