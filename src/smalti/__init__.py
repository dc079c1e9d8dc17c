"""Patch-level self-supervised learning for vision transformers.

Pretrain and post-train on your own images, evaluate patch tokens, rank patches, and export plain timm models. The
names below are the public API; heavy modules are imported on first use, so that ``import smalti`` and
``smalti --help`` are quick.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from smalti import errors

try:
    __version__ = version("smalti")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

_LAZY = {
    "Encoder": "smalti.models.encoder",
    "PatchFeatures": "smalti.models.encoder",
    "load_images": "smalti.data.images.labelled",
    "open_images": "smalti.data.images.folders",
    "load": "smalti.models.loading",
    "train": "smalti.runs.train",
    "resume": "smalti.runs.train",
    "resume_or_start": "smalti.runs.train",
    "compare": "smalti.comparison.run",
    **dict.fromkeys(("doctor", "embed", "evaluate", "export", "generate", "load_ranked", "rank"), "smalti.api"),
}

__all__ = [
    "Encoder",
    "PatchFeatures",
    "__version__",
    "compare",
    "doctor",
    "embed",
    "errors",
    "evaluate",
    "export",
    "generate",
    "load",
    "load_images",
    "load_ranked",
    "open_images",
    "rank",
    "resume",
    "resume_or_start",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'smalti' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
