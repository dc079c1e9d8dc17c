"""Does post-training help? NeCo, NeCo without sorting, DINO continued: from the same weights, on the same images.

    python evidence/neco_posttrain.py --ccp CCP --weights WEIGHTS.safetensors --out runs/neco
    python evidence/neco_posttrain.py --ccp CCP --clothing CLOTHING_SMALL --run runs/dino --out runs/neco-own

The first form starts from imported weights and trains on CCP's training and unlabelled photographs at 224 px. The
second starts from a DINO run of ``smalti train --recipe dino_tiny64.yaml`` and trains on the photographs of that run.
Both are evaluated on CCP's validation masks.

Fixed before the first run: everything below, and no choice of checkpoints. It is a form for a CPU: 200 steps where the
paper has tens of thousands. Finished cells in ``--out`` are kept.
"""

import argparse
from pathlib import Path
from typing import Any

import smalti

PROTOCOLS = ["in-context", "linear-segmentation", "overclustering"]


def plan(images: Path, ccp: Path, start: str, form: dict[str, Any], seeds: int) -> dict[str, Any]:
    """All arms; differences are to the first one, no training."""
    neco = {"method": "neco", "method.num_local_views": 2, "init": start, **form["load"], **form["neco"]}
    return {
        "data": str(images),
        "evaluate": [
            {
                "data": str(ccp),
                "protocols": PROTOCOLS,
                "image_size": form["dense_size"],
                "linear-segmentation": {"epochs": 7},
            }
        ],
        "budget": {"images": form["images"]},
        "seeds": list(range(seeds)),
        "settings": {"batch_size": form["batch_size"], "checkpoint.every": 50, **form["settings"]},
        "arms": {
            "no training": {"load": start, **form["load"]},
            "neco": neco,
            "neco without sorting": {**neco, "method.network": "none"},
            "dino continued": {"method": "dino", "init": start, **form["load"], **form["dino"]},
        },
    }


IMPORTED = {  # ViT-S/14 at 224 px
    "images": 400,
    "batch_size": 2,
    "dense_size": 224,
    "load": {"load.pos_antialias": False},  # as DINOv2 resamples its positional embeddings
    "settings": {
        "data.image_size": 224,
        "precision": "bf16",
        "optim.lr": 3e-5,  # of all arms' encoders: three times NeCo's, for a hundredth of its steps
        "optim.warmup_ratio": 0.0,
        "optim.freeze_encoder_ratio": 0.1,
    },
    "neco": {"method.hidden_dim": 1024, "method.references": "queue"},
    "dino": {"method.num_local_views": 2, "method.num_prototypes": 4096},
}
OWN = {  # six blocks of ViT-Ti/16 at 64 px, like the DINO run they start from
    "images": 6400,
    "batch_size": 32,
    "dense_size": 224,
    "load": {},
    "settings": {
        "data.image_size": 64,
        "optim.lr": 1e-4,
        "optim.warmup_ratio": 0.0,
        "optim.freeze_encoder_ratio": 0.1,
    },
    "neco": {"method.roi_size": 4, "method.hidden_dim": 512, "method.local_size": 32},
    "dino": {
        "method.num_prototypes": 1024,
        "method.hidden_dim": 512,
        "method.num_local_views": 2,
        "method.momentum": 0.99,
    },
}


def ccp_images(ccp: Path, out: Path) -> Path:
    """A list of CCP's training photographs and those without masks."""
    names = [line.strip() for line in (ccp / "train.txt").read_text(encoding="utf-8").splitlines() if line.strip()]
    paths = [ccp / "images" / f"{Path(name).stem}.jpg" for name in names]
    paths += sorted((ccp / "unlabelled").glob("*.jpg"))
    out.parent.mkdir(parents=True, exist_ok=True)
    target = out.with_name(f"{out.name}-images.txt")
    target.write_text("".join(f"{path}\n" for path in paths), encoding="utf-8")
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ccp", type=Path, required=True, help="images and masks with train.txt and val.txt")
    parser.add_argument("--weights", type=Path, help="of timm's vit_small_patch14_dinov2")
    parser.add_argument("--run", type=Path, help="a DINO run of dino_tiny64.yaml; trained on --clothing if missing")
    parser.add_argument("--clothing", type=Path, help="class folders with train")
    parser.add_argument("--out", type=Path, default=Path("runs/neco"), help="folder of cells and tables")
    parser.add_argument("--seeds", type=int, default=2, help="number of seeds, from 0")
    options = parser.parse_args()
    ccp = options.ccp.resolve()
    if options.weights:
        start = f"timm:vit_small_patch14_dinov2@{options.weights.resolve()}"
        what = plan(ccp_images(ccp, options.out), ccp, start, IMPORTED, options.seeds)
    elif options.run and options.clothing:
        images = options.clothing.resolve() / "train"
        if not (options.run / "run.json").exists():
            smalti.train(None, images, options.run, recipe="dino_tiny64.yaml")
        what = plan(images, ccp, str(options.run.resolve()), OWN, options.seeds)
    else:
        parser.error("give --weights, or --run and --clothing")
    smalti.compare(what, options.out)
    print((options.out / "comparison.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
