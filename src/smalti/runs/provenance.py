"""Where an encoder comes from, for the model card of an export: method, data, start weights and their licence, gain."""

from pathlib import Path

import smalti
from smalti.config import read_yaml
from smalti.errors import SmaltiError
from smalti.methods.base import get_method
from smalti.models.encoder import Encoder
from smalti.models.licences import licence_of
from smalti.runs.config import resolve
from smalti.runs.folder import CONFIG_FILE, read_run_file
from smalti.runs.posttrain import read_verdict


def history(encoder: Encoder, spec: str) -> list[str]:
    """What is known of an encoder's training, one line of Markdown each.

    Args:
        encoder: loaded from ``spec``.
        spec: its name, as in :func:`smalti.load`.
    """
    lines = [] if encoder.origin is None else _of_run(encoder.origin.checkpoint.parent.parent)
    if encoder.origin is None:
        lines = [f"**Weights**: `{_short(spec)}`", f"**Licence**: {_licence(spec)}"]
    return [*lines, f"**Exported by**: Smalti {smalti.__version__}"]


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
    start = Path(spec).expanduser()
    if (start / CONFIG_FILE).is_file():
        init = read_yaml(start / CONFIG_FILE).get("init")
        return _licence(str(init)) if init else "that of your data and run"
    licence = licence_of(spec)
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
