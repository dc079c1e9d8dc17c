"""From a folder of images to a verdict: train on it, then compare the encoder with the same network before training.

    python examples/folder_to_verdict.py IMAGES LABELLED runs/a

IMAGES is any folder tree of images. LABELLED holds class folders (CLASS/image), or images/ and masks/.
"""

import argparse

import smalti


def main() -> None:
    """Train, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", help="what to train on")
    parser.add_argument("labelled", help="what to evaluate on")
    parser.add_argument("out", help="the run directory, which must not exist yet")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--size", type=int, default=96, help="side of the training crops in pixels, divisible by 8")
    options = parser.parse_args()

    settings = {
        "encoder": {"name": "vit_tiny_patch16_224", "patch_size": 8, "depth": 4},
        "data": {"image_size": options.size},
        "steps": options.steps,
        "batch_size": 64,
        "optim": {"lr": 1e-3},
    }
    run = smalti.train("mae", options.images, options.out, overrides=settings)

    results = smalti.evaluate(run, options.labelled)
    trained = [result for result in results if result.baseline is None]
    untrained = {result.protocol: result for result in results if result.baseline}
    for result in trained:
        metric, score = result.headline  # the metric of the protocol that counts most
        before = untrained[result.protocol].metrics[metric]
        print(f"{result.protocol} {metric}: {score:.3f}, untrained {before:.3f}, gain {score - before:+.3f}")


if __name__ == "__main__":
    main()
