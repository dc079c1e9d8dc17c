"""One paper, one file. Importing this package fills the registry."""

from smalti.methods import (
    autoencoder,
    comae,
    cvit,
    dino,
    dinov2,
    droppos,
    ibot,
    intertwined,
    loca,
    mae,
    mp3,
    neco,
    part,
    prefix,
    supervised,
)
from smalti.methods.base import Method, get_method, method_names

__all__ = [
    "Method",
    "autoencoder",
    "comae",
    "cvit",
    "dino",
    "dinov2",
    "droppos",
    "get_method",
    "ibot",
    "intertwined",
    "loca",
    "mae",
    "method_names",
    "mp3",
    "neco",
    "part",
    "prefix",
    "supervised",
]
