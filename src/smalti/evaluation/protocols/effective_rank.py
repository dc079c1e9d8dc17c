"""Effective rank of patch tokens and image features; needs no labels and no training.

Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007; Garrido et al., RankMe, arXiv:2210.02885v3.
A low rank indicates collapse. A high rank doesn't prove good features (noise has the highest), so only compare runs of
one method, for which RankMe was designed.
Differs from RankMe: only encoder features (the paper: also the projector's); also patch tokens; by default far fewer
images than its 25,600 (``num_images``).
Letters: n images, N = h*w patches, D embed_dim.
"""

import dataclasses

import numpy as np
import torch

from smalti.config import Count, settings
from smalti.errors import DataError
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.context import spread
from smalti.evaluation.features import Features
from smalti.evaluation.protocol import Scores, register_protocol
from smalti.evaluation.tally import tally_mean
from smalti.functional.spectra import effective_rank, rankme, singular_values, sum_moments

UNIT = "dimensions, 1 to the width of a token"


@settings
class EffectiveRankConfig:
    """Settings of ``effective-rank``."""

    num_images: Count = 64
    """Number of images to measure, spread evenly over the set."""


@register_protocol("effective-rank", need="images", settings=EffectiveRankConfig, takes_pool=True, has_presets=False)
@torch.no_grad()
def effective_rank_of_features(features: Features, config: EvalConfig) -> Scores:
    """Effective rank of patch tokens and image features; needs no labels."""
    own: EffectiveRankConfig = config.of("effective-rank")
    size = features.dense_size(config.image_size)
    encoder, images = features.encoder, features.data.test
    pool = encoder.pool if config.pool == "auto" else config.pool
    chosen = spread(len(images), own.num_images)
    subset = dataclasses.replace(images, samples=tuple(images.samples[place] for place in chosen))
    all_patches, pooled = sum_moments([]), []
    within = np.full(len(images), np.nan)
    for found, positions in features.encode(subset, size, "squash", features.batch_size, "rank"):
        for tokens, position in zip(found.patches, positions, strict=True):
            moments = sum_moments([tokens.float()])
            within[chosen[position]] = effective_rank(singular_values(moments, centred=True))
            all_patches = all_patches.plus(moments)
        pooled.append(encoder.pooled(found, pool).float())
    if not pooled:
        raise DataError(f"{images.root}: none of the {len(subset)} {features.evaluated} can be read")
    all_images = sum_moments(pooled)
    metrics = {}
    for name, moments in (("patches", all_patches), ("images", all_images)):
        metrics[f"rankme_{name}"] = rankme(singular_values(moments, centred=False))
        metrics[f"effective_rank_{name}"] = effective_rank(singular_values(moments, centred=True))
    tally = tally_mean(within)
    metrics["effective_rank_within_image"] = tally.score()
    settings = {
        "image_size": size,
        "resize": "to a square, aspect ratio ignored",
        "num_images": all_images.count,
        "num_patches": all_patches.count,
        "embed_dim": encoder.embed_dim,
        "pool": pool,
        "images_note": f"{all_images.count} images have at most rank {all_images.count}; "
        "set a larger eval.effective-rank.num_images"
        if all_images.count < 2 * encoder.embed_dim
        else "",
        "centred": "effective_rank: yes; rankme: no",
    }
    return Scores(
        metrics, settings, {}, units=dict.fromkeys(metrics, UNIT), tallies={"effective_rank_within_image": tally}
    )
