"""The encoder adapter over timm's vision transformers, and the ways to load one."""

from smalti.models.build import build_encoder
from smalti.models.encoder import Encoder
from smalti.models.loading import load
from smalti.models.pooling import PatchFeatures

__all__ = ["Encoder", "PatchFeatures", "build_encoder", "load"]
