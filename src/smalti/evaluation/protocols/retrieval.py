"""Retrieval of patches or images: which of the nearest training patches or images have the query's class.

No vote and no temperature: training patches (with masks) or training images (class folders) by cosine similarity, in
descending order. Queries are of test images, so nothing retrieves itself.
Letters: B images in a batch, N = h*w patches, K neighbours, Q queries, M images to retrieve.
"""

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from smalti.config import field_names, settings
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
from smalti.evaluation.tally import Tally, tally_mean

FEWER_K = (1, 5)
"""Precision is reported at these k in addition to the chosen one."""
RECALL_K = (1, 5, 10)
"""Recall of images is reported at these k, and at the chosen one."""
MAP_UNIT = "mean average precision over all training images, 0 to 1, higher is better"
_CHUNK = 2**22  # similarities in memory at a time
_DECIMALS = 6  # cosines that are equal after rounding are ties


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


def ranked_precision(sims: Float[Tensor, "Q M"], relevant: Bool[Tensor, "Q M"]) -> Float[Tensor, " Q"]:
    """Average precision of rankings of the whole gallery, as scikit-learn's ``average_precision_score``.

    Args:
        sims: similarities in descending order; equal ones share the precision at the last of them, so that a constant
            similarity scores the fraction of relevant images.
        relevant: in that order; a row without any scores 0.
    """
    last = torch.ones_like(relevant)
    last[:, :-1] = sims[:, :-1] != sims[:, 1:]
    places = torch.arange(1, sims.shape[1] + 1, device=sims.device)
    # rank of the last one with the same similarity
    ends = torch.where(last, places, sims.shape[1]).flip(1).cummin(1).values.flip(1)
    precision = relevant.double().cumsum(1).gather(1, ends - 1) / ends
    return (precision * relevant).sum(1) / relevant.sum(1).clamp(min=1)


@settings
class RetrievalConfig(MemoryConfig):
    """Settings of ``retrieval``; on class folders only ``k`` has an effect."""


@register_protocol(
    "retrieval",
    need="masks",
    prefers=("masks", "labels"),
    settings=RetrievalConfig,
    takes_norm=True,
    takes_pool=True,
)
@torch.no_grad()
def retrieval(features: Features, config: EvalConfig) -> Scores:
    """Retrieval of training patches of the same class (masks), or of training images (class folders)."""
    samples = features.data.test.samples
    if any(sample.mask is not None or sample.instances is not None for sample in samples):
        return _retrieve_patches(features, config)
    return _retrieve_images(features, config)


def _retrieve_images(features: Features, config: EvalConfig) -> Scores:
    """Rank all training images for each test image."""
    own: RetrievalConfig = config.of("retrieval")
    unused = [name for name in field_names(RetrievalConfig) if name != "k" and getattr(own, name) is not None]
    if unused:
        warnings.warn(f"{', '.join(f'eval.retrieval.{name}' for name in unused)}: no effect on images", stacklevel=2)
    size = features.image_size(config.image_size)
    train, test = (features.image_level(split, size, config.pool) for split in ("train", "test"))
    classes = features.data.classes
    # ties are in this order, so it must not be the order of classes
    shuffled = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(config.seed))
    labels = train.labels[shuffled]
    gallery = F.normalize(train.pool(config.pool)[shuffled].to(features.device), dim=1)
    queries = F.normalize(test.pool(config.pool).to(features.device), dim=1)
    counts = sorted({k for k in (*RECALL_K, own.k or RECALL_K[0]) if k <= len(labels)})
    found: dict[str, list[Tensor]] = {"map": [], **{f"recall_at_{k}": [] for k in counts}}
    for chunk, targets in zip(
        *(torch.split(one, max(1, _CHUNK // len(labels))) for one in (queries, test.labels)), strict=True
    ):
        sims, order = (chunk @ gallery.T).round(decimals=_DECIMALS).sort(dim=1, descending=True, stable=True)
        relevant = labels[order.cpu()] == targets[:, None]
        found["map"].append(ranked_precision(sims.cpu(), relevant))
        for k in counts:
            found[f"recall_at_{k}"].append(relevant[:, :k].any(1).double())
    values = {name: torch.cat(parts).numpy() for name, parts in found.items()}
    tallies = {name: tally_mean(_by_place(of, test.places, len(features.data.test))) for name, of in values.items()}
    of_class = labels.bincount(minlength=len(classes))
    settings = {
        "retrieved": "images",
        **({"k": own.k} if own.k in counts else {}),
        **(
            {"k_wanted": own.k, "k_note": f"there are only {len(labels)} training images"}
            if own.k is not None and own.k > len(labels)
            else {}
        ),
        "num_gallery": len(labels),
        "pool": test.auto if config.pool == "auto" else config.pool,
        "image_size": size,
        "resize": "short side, then center crop",
        "comparable": "no published numbers for this protocol",
        "chance": float(of_class[test.labels].double().mean() / len(labels)),
    }
    per_class = {
        name: {
            label: float(of[is_own].mean()) if (is_own := test.labels.numpy() == number).any() else float("nan")
            for number, label in enumerate(classes)
        }
        for name, of in values.items()
        if name in ("map", "recall_at_1")
    }
    return Scores(
        {name: tally.score() for name, tally in tallies.items()},
        settings,
        per_class,
        units={"map": MAP_UNIT, **{f"recall_at_{k}": _recall_unit(k) for k in counts}},
        tallies=tallies,
    )


def _by_place(values: np.ndarray, places: Sequence[int], number: int) -> np.ndarray:
    """``(n,)`` values by image; NaN for unreadable ones."""
    row = np.full(number, np.nan)
    row[list(places)] = values
    return row


def _recall_unit(k: int) -> str:
    nearest = "the most similar training image has" if k == 1 else f"one of the {k} most similar training images has"
    return f"fraction of images for which {nearest} their class"


def _retrieve_patches(features: Features, config: EvalConfig) -> Scores:
    """Rank the nearest training patches for each patch of the test images."""
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
