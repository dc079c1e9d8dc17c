"""The encoder adapter over timm's vision transformers, and the ways to load one."""

from smalti.models.build import build_encoder
from smalti.models.encoder import Encoder, PatchFeatures
from smalti.models.loading import load

__all__ = ["Encoder", "PatchFeatures", "build_encoder", "load"]
