"""Patch retrieval: how many of a patch's nearest training patches have its class, and at which ranks.

No vote and no temperature: neighbours by cosine similarity, in descending order. Queries are patches of test images,
the memory has patches of training images, so a patch never retrieves its own image.
Letters: B images in a batch, N = h*w patches, K neighbours.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

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
from smalti.evaluation.protocol import Scores, register_protocol
from smalti.evaluation.tally import Tally

FEWER_K = (1, 5)
"""Precision is reported at these k in addition to the chosen one."""


def precision_at(relevant: Bool[Tensor, "Q K"], k: int) -> Float[Tensor, " Q"]:
    """Precision at k: fraction of the first k that are relevant."""
    return relevant[:, :k].double().mean(1)


def average_precision_at(relevant: Bool[Tensor, "Q K"], num_relevant: Int[Tensor, " Q"]) -> Float[Tensor, " Q"]:
    """Average precision at K: precision at each relevant neighbour's rank, summed, over the largest possible number.

    Args:
        relevant: ``(Q, K)``, nearest first.
        num_relevant: ``(Q,)`` relevant keys in the whole memory; 0 gives a score of 0.

    Returns:
        ``sum over ranks r of [relevant at r] * precision_at(r) / min(K, num_relevant)``, 1 if the first ranks are all
        relevant.
    """
    ranks = torch.arange(1, relevant.shape[1] + 1, device=relevant.device)
    precision = relevant.double().cumsum(1) / ranks
    return (precision * relevant).sum(1) / num_relevant.clamp(1, relevant.shape[1])


@settings
class RetrievalConfig(MemoryConfig):
    """Settings of ``retrieval``."""


@register_protocol("retrieval", need="masks", settings=RetrievalConfig, takes_norm=True)
@torch.no_grad()
def retrieval(features: Features, config: EvalConfig) -> Scores:
    """Precision of patch retrieval: do the nearest training patches have the same class; needs masks."""
    own: RetrievalConfig = config.of("retrieval")
    recipe = choose_recipe(features, config, own)
    images, classes = features.data.test, features.data.classes
    ignore = ignored_value(len(classes))
    unlabelled = unlabelled_places(features)
    memory = patch_memory(features, recipe, config.seed)
    k, about_k = choose_k(config, own, LABEL_K, len(memory.keys))
    num_of_class = memory.classes.bincount(minlength=len(classes))

    names = [*(f"precision_at_{fewer}" for fewer in FEWER_K if fewer < k), f"map_at_{k}"]
    names = [f"precision_at_{k}", *names]  # the headline first
    parts = {name: np.zeros((len(images), len(classes))) for name in names}
    wholes = np.zeros((len(images), len(classes)))
    for _, found, places in neighbours(features, recipe, config.seed, k):
        targets = patch_classes(features, recipe, places).to(found.device)
        for target, neighbour, place in zip(targets, memory.classes[found], places, strict=True):
            if place in unlabelled:
                continue
            is_labelled = target != ignore
            truth = target[is_labelled]
            relevant = neighbour[is_labelled] == truth[:, None]
            wholes[place] = truth.bincount(minlength=len(classes)).cpu().numpy()
            for name in names:
                value = (
                    average_precision_at(relevant, num_of_class[truth])
                    if name.startswith("map")
                    else precision_at(relevant, int(name.rpartition("_")[2]))
                )
                parts[name][place] = truth.bincount(value, minlength=len(classes)).cpu().numpy()
    tallies = {name: Tally(part.sum(1, keepdims=True), wholes.sum(1, keepdims=True)) for name, part in parts.items()}
    with np.errstate(invalid="ignore"):  # NaN for a class without patches
        per_class = {name: (part.sum(0) / wholes.sum(0)).tolist() for name, part in parts.items()}
    settings = {
        **memory_settings(features, recipe, memory, config),
        "comparable": "no published numbers for this protocol",
        **about_k,
        "num_patches": int(wholes.sum()),
        "patch_class": "majority of its labelled pixels; ties go to the first in classes.txt",
        "chance": float((wholes.sum(0) @ num_of_class.cpu().numpy()) / max(1.0, wholes.sum()) / len(memory.keys)),
    }
    return Scores(
        {name: tally.score() for name, tally in tallies.items()},
        settings,
        {name: dict(zip(classes, values, strict=True)) for name, values in per_class.items()},
        tallies=tallies,
    )
