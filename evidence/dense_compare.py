"""Dense features under one budget: MAE and DINO from scratch, random init, and imported weights.

    python evidence/dense_compare.py --clothing CLOTHING_SMALL --ccp CCP --weights WEIGHTS.safetensors --out runs/dense

Trains on clothing photographs without labels. Evaluates with k-NN on their classes, and with four dense protocols on
the masks of another clothing data set. Fixed before the first run: everything below, and no choice of checkpoints.
Finished cells in ``--out`` are kept. Ends within two hours on two cores.
"""

import argparse
from pathlib import Path
from typing import Any

import smalti

SEEDS = [0, 1, 2]
IMAGES_SEEN = 16_000
SIZE, DENSE_SIZE, KNN_SIZE = 96, 224, 112
"""Pixels in training, in evaluation with masks (a grid of 14 x 14 or 16 x 16) and in evaluation with classes."""


def plan(clothing: Path, ccp: Path, weights: Path) -> dict[str, Any]:
    """All arms; the encoder is six blocks of ViT-Ti/16."""
    dense: dict[str, Any] = {
        "data": str(ccp),
        "protocols": ["in-context", "linear-segmentation", "overclustering", "knn-patch"],
        "image_size": DENSE_SIZE,
        "linear-segmentation": {"epochs": 7},
    }
    return {
        "data": str(clothing / "train"),
        "evaluate": [
            dense,
            {"data": str(clothing), "split": "test", "protocols": ["knn"], "image_size": KNN_SIZE},
        ],
        "budget": {"images": IMAGES_SEEN},
        "seeds": SEEDS,
        "settings": {
            "encoder": {"name": "vit_tiny_patch16_224", "depth": 6},
            "data.image_size": SIZE,
            "checkpoint.every": 100,
        },
        "arms": {
            "random": {"load": "random"},
            "mae": {"method": "mae", "method.decoder_depth": 2, "batch_size": 64, "optim.lr": 1e-3},
            "dino": {
                "method": "dino",
                "method.num_prototypes": 1024,
                "method.hidden_dim": 512,
                "method.num_local_views": 4,
                "method.momentum": 0.99,
                "drop_path": 0.0,
                "batch_size": 32,
                "optim.lr": 5e-4,
                "optim.weight_decay_end": 0.1,
            },
            "imported ViT-S/14": {"load": f"timm:vit_small_patch14_dinov2@{weights}"},
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clothing", type=Path, required=True, help="class folders with train and test")
    parser.add_argument("--ccp", type=Path, required=True, help="images and masks with train.txt and val.txt")
    parser.add_argument("--weights", type=Path, required=True, help="of timm's vit_small_patch14_dinov2")
    parser.add_argument("--out", type=Path, default=Path("runs/dense"), help="folder of cells and tables")
    options = parser.parse_args()
    smalti.compare(plan(options.clothing.resolve(), options.ccp.resolve(), options.weights.resolve()), options.out)
    print((options.out / "comparison.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
