"""Which of timm's vision transformers Smalti wraps, and whether their tokens are timm's.

    python evidence/encoders.py

Every architecture of timm's modules ``vision_transformer``, ``deit`` and ``eva`` is built with two blocks of width 96
and random weights (perturbed, so that nothing hides at its initialisation), at a grid of 4x4 patches. Tokens of
``Encoder.encode`` are compared with ``forward_features`` of the timm model at 4x4 and at 3x6 patches, in float32. The
licences are those that timm states for the pretrained weights of each architecture. Half a minute of one core.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import is_model_in_modules

from smalti.errors import SmaltiError
from smalti.files import write_atomically
from smalti.models.build import build_encoder
from smalti.models.encoder import TIMM_MODULES
from smalti.runs.machine import describe_machine

FAMILIES = (
    "dinov3", "lingbot", "sapiens2", "pe_core", "pe_lang", "pe_spatial", "eva02", "rope", "eva", "dinov2", "siglip",
    "clip", "aimv2", "beit3", "radio", "tips", "flexivit", "deit3", "deit",
)  # fmt: skip
"""Parts of names; the first that fits names the family, all others are plain ViTs."""
GRIDS = ((4, 4), (3, 6))


def family_of(name: str) -> str:
    """The family of an architecture."""
    return next((family for family in FAMILIES if family in name), "other ViTs")


def difference(name: str) -> float:
    """Largest absolute difference between our tokens and timm's.

    Raises:
        SmaltiError: if the architecture can't be wrapped.
    """
    patch = int(found.group(1)) if (found := re.search(r"patch(\d+)", name)) else 16
    more: dict[str, Any] = {"num_kv_heads": (2, 2)} if "sapiens2" in name else {}
    encoder = build_encoder(name, img_size=4 * patch, seed=0, depth=2, embed_dim=96, num_heads=4, **more).eval()
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        for rows, columns in GRIDS:
            height, width = encoder.patch_size
            images = torch.randn(2, encoder.in_chans, rows * height, columns * width, generator=generator)
            features = encoder.encode(images)
            tokens = torch.cat([features.prefix, features.patches], dim=1)
            worst = max(worst, float((tokens - encoder.vit.forward_features(images)).abs().max()))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("evidence/results"), help="folder of the JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, dict[str, Any]] = {}
    names = [name for name in timm.list_models() if is_model_in_modules(name, TIMM_MODULES)]
    for name in names:
        row = rows.setdefault(
            family_of(name), {"wrapped": 0, "refused": [], "tags": 0, "largest_difference": 0.0, "licences": set()}
        )
        tags = timm.list_pretrained(f"{name}.*") or timm.list_pretrained(name)
        configs = [timm.get_pretrained_cfg(tag) for tag in tags]
        row["licences"] |= {config.license for config in configs if config is not None and config.license}
        try:
            row["largest_difference"] = max(row["largest_difference"], difference(name))
        except SmaltiError as error:
            row["refused"].append(f"{name}: {error}")
        else:
            row["wrapped"] += 1
            row["tags"] += len(tags)
    print("| family | architectures | pretrained tags | largest difference | licences |\n|---|---|---|---|---|")
    for family in sorted(rows, key=lambda one: (one == "other ViTs", one)):
        row = rows[family]
        row["licences"] = sorted(row["licences"])
        print(
            f"| {family} | {row['wrapped']} | {row['tags']} | {row['largest_difference']:.1e} | "
            f"{', '.join(row['licences']) or 'not stated'} |"
        )
    refused = [line for row in rows.values() for line in row["refused"]]
    print(f"\nwrapped: {sum(row['wrapped'] for row in rows.values())} of {len(names)}; refused: {len(refused)}")
    for line in refused:
        print(line)
    content = {"families": rows, "timm": timm.__version__, **describe_machine()}
    write_atomically(options.results / "encoders.json", json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
