"""Uniformity of image vectors on the unit sphere. No labels, nothing learned.

Source: Wang & Isola, 2020, arXiv:2005.10242, Sec. 4.1.2, with t = 2.
"""

import torch
from torch.nn import functional as F

from smalti.config import Count, settings
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.context import spread
from smalti.evaluation.features import Features
from smalti.evaluation.protocol import Scores, register_protocol


@settings
class UniformityConfig:
    """Settings, ``eval.uniformity.*`` on the command line."""

    num_images: Count = 1000
    """Number of images, evenly spaced over the data set."""


@register_protocol("uniformity", need="images", settings=UniformityConfig, takes_pool=True)
def uniformity(features: Features, config: EvalConfig) -> Scores:
    """How evenly image vectors are spread on the unit sphere; needs no labels."""
    own: UniformityConfig = config.of("uniformity")
    size = features.image_size(config.image_size)
    vectors = F.normalize(features.image_level("test", size, config.pool).pool(config.pool), dim=1)  # (n, D)
    vectors = vectors[list(spread(len(vectors), own.num_images))]
    value = torch.pdist(vectors).square().mul(-2).exp().mean().log()
    return Scores(
        metrics={"uniformity": float(value)},
        settings={"image_size": size, "num_images": len(vectors)},
        per_class={},
        units={"uniformity": "log of a mean potential, lower is better"},
    )
