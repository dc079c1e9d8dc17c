"""k-NN classification with frozen features; nothing is trained or tuned.

Source: Wu et al., "Unsupervised feature learning via non-parametric instance discrimination", arXiv:1805.01978v1,
Sec. 3.4, in the form of Caron et al., DINO, arXiv:2104.14294v2, Sec. 3.2 and their code: neighbours by cosine
similarity s vote with exp(s / 0.07).
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from smalti.config import Count, settings
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.features import Features
from smalti.evaluation.metrics import ConfusionMatrix, accuracy, balanced_accuracy, class_recall
from smalti.evaluation.protocol import Scores, register_protocol
from smalti.evaluation.tally import tally_labels, tally_mean

TEMPERATURE = 0.07
EXTRA_K = (10, 20, 100)
"""Numbers of neighbours reported in addition to the chosen one."""
_CHUNK = 2**24  # similarities in memory at a time


@settings
class KNNConfig:
    """Settings of ``knn``."""

    k: Count = 20
    """Number of nearest neighbours that vote."""


def nearest(
    queries: Float[Tensor, "Q D"], keys: Float[Tensor, "M D"], k: int
) -> tuple[Float[Tensor, "Q K"], Int[Tensor, "Q K"]]:
    """The k keys most similar to each query by cosine similarity; exact.

    Args:
        queries: ``(Q, D)``, of any norm; zero vectors have similarity 0.
        keys: ``(M, D)``, of any norm, with ``M >= k``.
        k: K, neighbours per query.

    Returns:
        ``(Q, K)`` cosine similarities in descending order, and the indices of those keys.
    """
    queries, keys = F.normalize(queries, dim=1), F.normalize(keys, dim=1)
    chunks = [(chunk @ keys.T).topk(k, dim=1) for chunk in torch.split(queries, max(1, _CHUNK // len(keys)))]
    return torch.cat([chunk.values for chunk in chunks]), torch.cat([chunk.indices for chunk in chunks])


def vote(
    sims: Float[Tensor, "Q K"], labels: Int[Tensor, "Q K"], num_classes: int, temperature: float = TEMPERATURE
) -> Float[Tensor, "Q C"]:
    """Fraction of the votes for each class; each neighbour votes with exp(s / temperature).

    Args:
        sims: ``(Q, K)`` cosine similarities.
        labels: ``(Q, K)`` classes of the neighbours.
        num_classes: C.
        temperature: small: the nearest decides; large: the majority.
    """
    weights = (sims / temperature).softmax(dim=1)  # exp(s / T), scaled to sum to one
    return weights.new_zeros(len(sims), num_classes).scatter_add_(1, labels, weights)


@register_protocol("knn", need="labels", settings=KNNConfig, takes_pool=True, has_presets=False)
def knn(features: Features, config: EvalConfig) -> Scores:
    """Image classification by k nearest neighbours; needs class folders."""
    own: KNNConfig = config.of("knn")
    size = features.image_size(config.image_size)
    train, test = (features.image_level(split, size, config.pool) for split in ("train", "test"))
    num_train, num_classes = len(train.labels), len(features.data.classes)
    k = min(own.k, num_train)
    more = [other for other in EXTRA_K if other <= num_train and other != k]
    device = features.device
    sims, indices = nearest(test.pool(config.pool).to(device), train.pool(config.pool).to(device), max(k, *more, 0))
    sims, neighbours = sims.cpu(), train.labels[indices.cpu()]

    def classify(count: int) -> tuple[Tensor, ConfusionMatrix]:
        fractions = vote(sims[:, :count], neighbours[:, :count], num_classes)
        confusion = ConfusionMatrix(num_classes)
        confusion.update(test.labels, fractions.argmax(1))
        return fractions, confusion

    fractions, confusion = classify(k)
    metrics = {"top1": accuracy(confusion.matrix), "balanced_top1": balanced_accuracy(confusion.matrix)}
    right: dict[str, Tensor] = {}
    if num_classes >= 5:
        found = (fractions.topk(5, dim=1).indices == test.labels[:, None]).any(1)
        metrics["top5"] = float(found.double().mean())
        right["top5"] = found
    for other in more:
        other_fractions, matrix = classify(other)
        metrics[f"top1_k{other}"] = accuracy(matrix.matrix)
        right[f"top1_k{other}"] = other_fractions.argmax(1) == test.labels
    settings = {
        "k": k,
        **(
            {"k_wanted": own.k, "k_note": "all training images vote, since there are fewer than k"} if k < own.k else {}
        ),
        "temperature": TEMPERATURE,
        "pool": train.auto if config.pool == "auto" else config.pool,
        "image_size": size,
        "resize": "short side, then center crop",
    }
    num_images = len(features.data.test)
    tallies = tally_labels(test.labels, fractions.argmax(1), num_classes, test.places, num_images)
    for name, found in right.items():
        values = np.full(num_images, np.nan)
        values[list(test.places)] = found.double().numpy()
        tallies[name] = tally_mean(values)
    recall = class_recall(confusion.matrix).tolist()
    return Scores(
        metrics,
        settings,
        {"recall": dict(zip(features.data.classes, recall, strict=True))},
        tallies=tallies,
        confusion=confusion.matrix.numpy(),
    )
