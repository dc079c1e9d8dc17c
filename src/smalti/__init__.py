"""Smalti learns from the pieces of an image.

Patch-level pretraining and post-training of vision transformers on your own images, evaluation of their patch
tokens, and the encoder handed on as a plain timm model. The names below are the public face; everything heavy is
imported when it is first used, so that ``import smalti`` and ``smalti --help`` are quick.
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
    "load": "smalti.models.loading",
    "train": "smalti.runs.train",
    "evaluate": "smalti.runs.baseline",
    "compare": "smalti.comparison.run",
    "embed": "smalti.exporters.embeddings",
    "load_images": "smalti.data.images.labelled",
    "open_images": "smalti.data.images.folders",
}

__all__ = [
    "Encoder",
    "PatchFeatures",
    "__version__",
    "compare",
    "embed",
    "errors",
    "evaluate",
    "load",
    "load_images",
    "open_images",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'smalti' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
