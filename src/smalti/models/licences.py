"""Licences of published weights, as timm or a model's own card states them."""

import re
from pathlib import Path

import timm

PERMISSIVE = ("apache-2.0", "mit", "bsd-3-clause", "cc0-1.0", "cc-by-4.0")
"""Licences that ask for no more than attribution."""
HUB_NAMES = (*PERMISSIVE, "bsd-2-clause", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "openrail", "apple-amlr")
"""Licences with a name on the Hugging Face hub; all others are ``other`` there, with a ``license_name``."""
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
        for key in ("license_name", "license"):
            found = re.search(rf"^{key}:\s*([\w.-]+)\s*$", head, re.MULTILINE)
            if found:
                return found.group(1)
    if config.is_file() and '"dinov3_vit"' in config.read_text("utf-8", errors="replace"):
        return _DINOV3
    return None


def hub_name(spec: str) -> str | None:
    """``OWNER/NAME`` of published weights on the Hugging Face hub; None: a local file, or not known.

    Args:
        spec: as in :func:`smalti.load`.
    """
    kind, _, rest = spec.partition(":")
    if kind == "timm" and "@" not in rest and timm.is_model(rest.split(".")[0]):
        settings = timm.get_pretrained_cfg(rest)
        if settings is None or not settings.hf_hub_id:
            return None
        name = f"{settings.architecture}.{settings.tag}" if settings.tag else settings.architecture
        return f"{settings.hf_hub_id}{name}" if settings.hf_hub_id.endswith("/") else settings.hf_hub_id
    is_hub = kind == "hf" and rest.count("/") == 1 and not Path(rest).expanduser().exists()
    return rest if is_hub and not rest.startswith((".", "/", "~")) else None


def licence_note(spec: str) -> str:
    """One line about a licence that binds what is trained from these weights; empty for permissive and unknown ones."""
    licence = licence_of(spec)
    if licence is None or licence.lower() in PERMISSIVE:
        return ""
    source = "as timm states it" if spec.startswith("timm:") else "as its files state it"
    return f"licence of the start weights: {licence} ({source}); it also binds what is trained from them"
