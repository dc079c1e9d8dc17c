"""The five ways to name an encoder: ``RUN | FILE.safetensors | timm:NAME | timm:NAME@FILE | random:NAME``."""

import contextlib
import json
import socket
import sys
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import timm

from smalti.errors import SmaltiError, WeightsError
from smalti.models.encoder import Encoder, build_encoder, encoder_from_config
from smalti.models.weights import LoadReport, load_vit, read_tensors, to_timm_names

FORMS = "RUN | FILE.safetensors | timm:NAME | timm:NAME@FILE | random:NAME"
CHECKPOINTS = "checkpoints"
WEIGHTS_FILE, STATE_FILE = "weights.safetensors", "state.json"


def load(
    spec: str | Path,
    *,
    seed: int = 0,
    network: str | None = None,
    img_size: int | None = None,
    in_chans: int | None = None,
    partial: bool = False,
    pos_antialias: bool | None = None,
    quiet: bool = False,
) -> Encoder:
    """An encoder, in eval mode on the CPU, by any of its five names.

    Args:
        spec: ``RUN`` (a run directory or one of its checkpoints), ``FILE.safetensors`` (an export, its config.json
            beside it), ``timm:NAME`` (pretrained weights from the hub), ``timm:NAME@FILE`` (local weights) or
            ``random:NAME`` (seeded random weights).
        seed: of ``random:``.
        network: which network of a run: ``student`` or ``teacher``; None takes the one that its method hands on.
        img_size: native image size for ``timm:`` and ``random:``, in pixels; None takes the architecture's own.
        in_chans: input channels for ``random:``.
        partial: allow weights that fill only a part of the model.
        pos_antialias: how positions are resampled away from the native grid, see :class:`Encoder`.
        quiet: don't print how many tensors matched to stderr.

    Raises:
        WeightsError: if there is no such run or file, or its weights can't be read or don't fit.
        ConfigError: if timm has no such architecture.
    """
    text = str(spec)
    kind, _, rest = text.partition(":")
    report: LoadReport | None = None
    if kind == "random" and rest:
        encoder = build_encoder(rest, seed=seed, img_size=img_size, in_chans=in_chans or 3)
    elif kind == "timm" and rest:
        name, at, file = rest.partition("@")
        encoder = build_encoder(name, seed=seed, img_size=img_size, in_chans=in_chans or 3)
        report = (
            _fill(encoder, name, Path(file).expanduser(), partial) if at else _fill_from_hub(encoder, name, partial)
        )
        encoder.pretrained = True
        encoder.source = report.source
    else:
        path = Path(text).expanduser()
        encoder, report = _load_file(path, partial) if path.suffix == ".safetensors" else _load_run(path, network)
        encoder.pretrained = True
        encoder.source = report.source
    if pos_antialias is not None:
        encoder.pos_antialias = pos_antialias
    if report is not None and not quiet:
        print(f"{report}; images normalised with mean {encoder.mean}, std {encoder.std}", file=sys.stderr)
    return encoder.eval()


def _fill(encoder: Encoder, name: str, file: Path, partial: bool) -> LoadReport:
    """Local weights; a tag in the name (``vit_..._224.augreg_in21k``) says how they want images normalised."""
    try:
        tensors = to_timm_names(read_tensors(file))
    except WeightsError as error:
        text = str(error)
        raise WeightsError(text if text.startswith(str(file)) else f"{file}: {text}") from error
    if "." in name:
        _normalize_as_published(encoder, name)
    return load_vit(encoder.vit, tensors, str(file), partial)


def _normalize_as_published(encoder: Encoder, name: str) -> None:
    """Mean and deviation that timm keeps beside the pretrained weights of this name and tag."""
    settings = timm.get_pretrained_cfg(name)
    if settings is not None and len(settings.mean) == encoder.in_chans:
        encoder.set_normalization(settings.mean, settings.std)


def _fill_from_hub(encoder: Encoder, name: str, partial: bool) -> LoadReport:
    """Pretrained weights by timm's own door; only a user who names ``timm:NAME`` comes here."""
    try:
        with _hub_cache_only_when_unreachable():
            source = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # hub clients raise many kinds; the line below says what to do about all of them
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsError(
            f"timm:{name}: its pretrained weights could not be fetched ({reason[:200]}); "
            f"give a local file as timm:{name}@FILE, or take random weights with random:{name}"
        ) from error
    _normalize_as_published(encoder, name)
    return load_vit(encoder.vit, to_timm_names(source.state_dict()), f"timm:{name}", partial)


@contextlib.contextmanager
def _hub_cache_only_when_unreachable() -> Iterator[None]:
    """Without a name server answer for the hub, look in its cache only: its client would retry for a minute."""
    host = urllib.parse.urlparse(huggingface_hub.constants.ENDPOINT).hostname
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = before


def _load_file(path: Path, partial: bool) -> tuple[Encoder, LoadReport]:
    """An exported encoder: ``FILE.safetensors`` with ``config.json`` beside it."""
    tensors = read_tensors(path)
    config_path = path.with_name("config.json")
    config = _read_json(
        config_path, f"{path}: its config.json is needed beside it; for bare weights use timm:NAME@{path}"
    )
    description = config.get("smalti") or _from_timm_config(config)
    encoder = _described(description, config_path)
    return encoder, load_vit(encoder.vit, to_timm_names(tensors), str(path), partial)


def _from_timm_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our description of an encoder from timm's own config.json."""
    arguments = {
        key: value
        for key, value in dict(config.get("model_args") or {}).items()
        if key not in ("num_classes", "global_pool", "fc_norm", "dynamic_img_size")
    }
    normalization = config.get("pretrained_cfg") or {}
    return {
        "architecture": config.get("architecture", ""),
        "model_args": arguments,
        "mean": normalization.get("mean"),
        "std": normalization.get("std"),
    }


def _load_run(path: Path, network: str | None) -> tuple[Encoder, LoadReport]:
    """The encoder in a run's newest checkpoint, or in the checkpoint given."""
    if not path.exists():
        raise WeightsError(f"{path}: no such run or file; an encoder is named by {FORMS}")
    folder = path if (path / STATE_FILE).is_file() else latest_checkpoint(path)
    if folder is None:
        raise WeightsError(f"{path}: holds no finished checkpoint; an encoder is named by {FORMS}")
    state = _read_json(folder / STATE_FILE, f"{folder}: the checkpoint lacks its {STATE_FILE}")
    networks = state.get("networks") or {}
    name = network or state.get("export_network", "")
    if name not in networks:
        raise WeightsError(f"{folder}: has no network '{name}'; it has {', '.join(networks) or 'none'}")
    encoder = _described(state.get("encoder") or {}, folder / STATE_FILE)
    tensors = read_tensors(folder / WEIGHTS_FILE, prefix=f"{networks[name]}.vit.")
    return encoder, load_vit(encoder.vit, tensors, f"{folder} ({name})")


def latest_checkpoint(run: Path) -> Path | None:
    """The finished checkpoint of a run with the highest step; None where there is none."""
    found = [
        (int(folder.name.removeprefix("step_")), folder)
        for folder in (run / CHECKPOINTS).glob("step_*")
        if folder.name.removeprefix("step_").isdigit() and (folder / STATE_FILE).is_file()
    ]
    return max(found)[1] if found else None


def encoder_description(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of its encoder, for :func:`smalti.models.encoder.encoder_from_config`.

    Raises:
        WeightsError: if it can't be read.
    """
    return (
        _read_json(checkpoint / STATE_FILE, f"{checkpoint}: the checkpoint lacks its {STATE_FILE}").get("encoder") or {}
    )


def _described(description: Mapping[str, Any], where: Path) -> Encoder:
    try:
        return encoder_from_config(description)
    except SmaltiError as error:
        raise WeightsError(f"{where}: {error}") from error


def _read_json(path: Path, missing: str) -> dict[str, Any]:
    if not path.is_file():
        raise WeightsError(missing)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, needs a mapping")
    return content
