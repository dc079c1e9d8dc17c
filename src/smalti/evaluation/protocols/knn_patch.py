"""k-NN classification of patches: predicts the majority class of a patch's pixels by a vote of labelled training
patches.

As the image protocol ``knn``, for patches: neighbours by cosine similarity s vote for their class with exp(s / 0.07).
Letters: B images in a batch, N = h*w patches, K neighbours, C classes.
"""

from typing import Annotated

import numpy as np
import torch
from pydantic import Field

from smalti.config import settings
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.dense import ignored_value
from smalti.evaluation.features import Features
from smalti.evaluation.memory import (
    LABEL_K,
    MemoryConfig,
    choose_k,
    choose_recipe,
    memory_settings,
    neighbours,
    patch_classes,
    patch_memory,
    unlabelled_places,
)
from smalti.evaluation.metrics import accuracy, balanced_accuracy, class_recall
from smalti.evaluation.protocol import Scores, register_protocol
from smalti.evaluation.protocols.knn import TEMPERATURE, vote
from smalti.evaluation.tally import PixelTally


@settings
class KNNPatchConfig(MemoryConfig):
    """Settings of ``knn-patch``."""

    temperature: Annotated[float, Field(gt=0)] = TEMPERATURE
    """Neighbours vote with exp(similarity / temperature)."""


@register_protocol("knn-patch", need="masks", settings=KNNPatchConfig, takes_norm=True, priority=30)
@torch.no_grad()
def knn_patch(features: Features, config: EvalConfig) -> Scores:
    """Patch classification by k nearest neighbours; needs masks."""
    own: KNNPatchConfig = config.of("knn-patch")
    recipe = choose_recipe(features, config, own)
    images, classes = features.data.test, features.data.classes
    grid = features.encoder.check_size(recipe.image_size, recipe.image_size)
    unlabelled = unlabelled_places(features)
    memory = patch_memory(features, recipe, config.seed)
    k, about_k = choose_k(config, own, LABEL_K, len(memory.keys))

    tally = PixelTally(len(classes), len(images), ignored_value(len(classes)), features.device)
    predictions: dict[int, np.ndarray] = {}
    for sims, found, places in neighbours(features, recipe, config.seed, k):
        labels = memory.classes[found]
        fractions = vote(sims.flatten(0, 1), labels.flatten(0, 1), len(classes), own.temperature)
        pred = fractions.argmax(1).view(len(places), *grid)
        target = patch_classes(features, recipe, places).view_as(pred).to(pred.device)
        for truth, guess, place in zip(target, pred, places, strict=True):
            if place not in unlabelled:
                tally.update(truth[None], guess[None], [place])
            if place in features.shown:
                predictions[place] = guess.cpu().numpy().astype(np.int32)
    matrix = tally.confusion.matrix
    settings = {
        **memory_settings(features, recipe, memory, config),
        "comparable": "no published numbers for this protocol",
        **about_k,
        "temperature": own.temperature,
        "num_patches": int(matrix.sum()),
        "patch_class": "majority of its labelled pixels; ties go to the first in classes.txt",
    }
    return Scores(
        {"top1": accuracy(matrix), "balanced_top1": balanced_accuracy(matrix)},
        settings,
        {"recall": dict(zip(classes, class_recall(matrix).tolist(), strict=True))},
        tallies={"top1": tally.pixel_accuracy(), "balanced_top1": tally.recall()},
        confusion=matrix.cpu().numpy(),
        predictions=predictions,
    )
