"""Where an encoder comes from, for the model card of an export: method, data, start weights and their licence, gain."""

from pathlib import Path
from typing import Any

import smalti
from smalti.config import read_yaml
from smalti.errors import SmaltiError
from smalti.exporters.card import Provenance
from smalti.methods.base import get_method
from smalti.models.encoder import Encoder
from smalti.models.licences import hub_name, licence_of
from smalti.runs.config import resolve
from smalti.runs.folder import CONFIG_FILE, read_run_file
from smalti.runs.posttrain import read_verdict


def history(encoder: Encoder, spec: str, repository: str | None = None) -> Provenance:
    """What is known of an encoder's training.

    Args:
        encoder: loaded from ``spec``.
        spec: its name, as in :func:`smalti.load`.
        repository: ``OWNER/NAME`` on the hub to which an export is uploaded.
    """
    exported = f"**Exported by**: Smalti {smalti.__version__}"
    start, method = spec, None
    if encoder.origin is None:
        lines = [f"**Weights**: `{_short(spec)}`", f"**Licence**: {_licence(spec)}"]
    else:
        run = encoder.origin.checkpoint.parent.parent
        lines = _of_run(run)
        start, method = _start(str(run)), str(_settings(run).get("method", {}).get("name", "")) or None
    return Provenance((*lines, exported), licence_of(start), hub_name(start), method, repository)


def _settings(run: Path) -> dict[str, Any]:
    """The settings of a run; empty if there are none."""
    return read_yaml(run / CONFIG_FILE) if (run / CONFIG_FILE).is_file() else {}


def _start(spec: str) -> str:
    """The first weights of a chain of runs, each of which starts from the one before; empty: random ones."""
    seen: set[str] = set()
    while spec and spec not in seen and (settings := _settings(Path(spec).expanduser())):
        seen.add(spec)
        spec = str(settings.get("init") or "")
    return spec


def _of_run(run: Path) -> list[str]:
    about = read_run_file(run)
    try:
        config = resolve(read_yaml(run / CONFIG_FILE))
        verdict = read_verdict(run)
    except SmaltiError:
        return [f"**Run**: `{run.name}`, whose settings can't be read"]
    method = get_method(config.method.name)
    versions, commit = about.get("versions", {}), about.get("commit")
    trained_by = f"Smalti {versions.get('smalti', 'of unknown version')}{f' (commit {commit})' if commit else ''}"
    lines = [
        f"**Method**: {config.method.name} ({method.paper})",
        f"**Training**: {config.steps} steps of {config.batch_size} images of {config.data.image_size} px, seed "
        f"{config.seed}, by {trained_by}",
        f"**Data**: {about.get('images', 'unknown')}; fingerprint {about.get('names_digest', 'unknown')}",
    ]
    if config.init:
        lines.append(f"**Start weights**: `{_short(config.init)}`; licence: {_licence(config.init)}")
    else:
        lines.append("**Start weights**: none, random initialisation")
    lines.append(f"**Measured**: {verdict.sentence}" if verdict else "**Measured**: nothing on labelled images")
    return lines


def _licence(spec: str) -> str:
    """The licence of published weights, in words; of a run, that of the weights it started from."""
    first = _start(spec)
    if not first:
        return "that of your data and run"
    licence, spec = licence_of(first), first
    if licence is None:
        return "not stated; check where the weights come from"
    return f"{licence}, as timm states it for its own weights of this name" if spec.startswith("timm:") else licence


def _short(spec: str) -> str:
    """A name without the folders of this machine."""
    head, at, path = spec.rpartition("@")
    if at:
        return f"{head}@{Path(path).name}"
    kind, colon, rest = spec.partition(":")
    return f"{kind}:{Path(rest).name}" if colon and "/" in rest and Path(rest).exists() else Path(spec).name or spec
