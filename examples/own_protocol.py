"""An evaluation protocol of your own, outside of the package, beside k-NN and with the untrained baseline.

    python examples/own_protocol.py ENCODER LABELLED

The protocol measures uniformity (Wang & Isola, 2020, arXiv:2005.10242, Sec. 4.1.2, with t = 2): the logarithm
of the mean Gaussian potential between image vectors on the unit sphere. It needs no labels. 0 means that all vectors
are equal; lower is more uniform.
"""

import argparse

import torch
from torch.nn import functional as F

import smalti
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


def main() -> None:
    """Evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder", help="a run, a weights file, timm:NAME or random:NAME")
    parser.add_argument("labelled", help="class folders")
    parser.add_argument("--size", type=int, help="image size in pixels")
    options = parser.parse_args()
    results = smalti.evaluate(options.encoder, options.labelled, ["uniformity", "knn"], image_size=options.size)
    for result in results:
        name, value = result.headline
        print(f"{result.protocol} {name}: {value:.3f} ({result.baseline or 'encoder'})")


if __name__ == "__main__":
    main()
