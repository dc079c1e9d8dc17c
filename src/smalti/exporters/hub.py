"""Upload an exported folder to the Hugging Face hub."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import yaml

from smalti.errors import ConfigError, RunError
from smalti.exporters.card import CARD
from smalti.models.hub import hub_cache_only_when_unreachable

_PART = r"(?![-.])(?![^/]*(?:--|\.\.))[\w.-]+(?<![-.])(?<!\.git)"
NAME = re.compile(f"{_PART}/{_PART}", re.ASCII)
"""A name on the hub, ``OWNER/NAME``."""


class Upload(NamedTuple):
    """What an upload sends."""

    repository: str
    """``OWNER/NAME``."""
    files: tuple[tuple[str, int], ...]
    """Name and size in bytes of each file, in alphabetical order."""
    front_matter: dict[str, Any]
    """Of the model card: licence, library, tags, base model."""


def check_repository(name: str) -> str:
    """``OWNER/NAME``, if it can be one on the hub.

    Raises:
        ConfigError: if it can't.
    """
    if not NAME.fullmatch(name) or len(name) > 96:
        raise ConfigError(
            f"--push {name}: is no name of a repository on the hub; OWNER/NAME is needed, of letters, digits and - _ ."
        )
    return name


def plan_upload(folder: Path, repository: str) -> Upload:
    """What :func:`push` would send; needs no network.

    Args:
        folder: an exported folder, with its card.
        repository: ``OWNER/NAME``.
    """
    files = sorted((str(path.relative_to(folder)), path.stat().st_size) for path in folder.rglob("*") if path.is_file())
    head = (folder / CARD).read_text("utf-8").split("---\n")[1]
    return Upload(repository, tuple(files), yaml.safe_load(head))


def push(folder: Path, repository: str) -> str:
    """Upload an exported folder in one commit; a repository that doesn't exist is created, private.

    Args:
        folder: an exported folder.
        repository: ``OWNER/NAME``.

    Returns:
        Address of the repository.

    Raises:
        RunError: if the hub can't be reached, or refuses; the folder stays.
    """
    try:
        with hub_cache_only_when_unreachable():
            api = huggingface_hub.HfApi()
            address = api.create_repo(repository, private=True, exist_ok=True)
            api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export of Smalti")
    except Exception as error:  # hub clients raise many kinds
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise RunError(
            f"--push {repository}: could not be uploaded ({lines[0][:200]}); {folder} is complete, upload it later "
            f"with: hf upload {repository} {folder}"
        ) from error
    return str(address)
