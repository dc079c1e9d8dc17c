"""Licences of published weights, as timm or a model's own card states them."""

import re
from pathlib import Path

import timm

PERMISSIVE = ("apache-2.0", "mit", "bsd-3-clause", "cc0-1.0", "cc-by-4.0")
"""Licences that ask for no more than attribution."""
_DINOV3 = "dinov3-license"


def licence_of(spec: str) -> str | None:
    """The licence of the weights that an encoder's name refers to; None: not stated, or not published weights.

    Args:
        spec: as in :func:`smalti.load`. Of ``timm:NAME@FILE`` it is the licence of timm's own weights for NAME, which
            need not be those in the file.
    """
    kind, _, rest = spec.partition(":")
    if kind == "timm":
        name = rest.partition("@")[0]
        settings = timm.get_pretrained_cfg(name) if timm.is_model(name.split(".")[0]) else None
        return settings.license if settings is not None else None
    if kind == "hf":
        return _of_folder(Path(rest).expanduser())
    return None


def _of_folder(folder: Path) -> str | None:
    """The licence in the card of a folder of Hugging Face, or that of its family."""
    card, config = folder / "README.md", folder / "config.json"
    if card.is_file():
        head = card.read_text("utf-8", errors="replace")[:4000]
        found = re.search(r"^license(?:_name)?:\s*([\w.-]+)\s*$", head, re.MULTILINE)
        if found:
            return found.group(1)
    if config.is_file() and '"dinov3_vit"' in config.read_text("utf-8", errors="replace"):
        return _DINOV3
    return None


def licence_note(spec: str) -> str:
    """One line about a licence that binds what is trained from these weights; empty for permissive and unknown ones."""
    licence = licence_of(spec)
    if licence is None or licence.lower() in PERMISSIVE:
        return ""
    source = "as timm states it" if spec.startswith("timm:") else "as its files state it"
    return f"licence of the start weights: {licence} ({source}); it also binds what is trained from them"
