"""Trained autoencoders as sources of tokens: architecture and weights.

A run stores both in its settings and checkpoints, so the original files are needed only at its start.
"""

import dataclasses
from pathlib import Path
from typing import Any

from torch import nn

from smalti.config import read_yaml
from smalti.errors import ConfigError, WeightsError
from smalti.layers.kl_vae import CLASS, KLVAE
from smalti.layers.tokens import CODED, DEFAULT_DIM, CodeTokenSource, TokenConfig, TokenSource
from smalti.models.layouts import Tensors
from smalti.models.loading import WEIGHTS_FILE, latest_checkpoint
from smalti.models.weights import read_tensors
from smalti.reading import read_mapping, reading

VAE_FILE = "diffusion_pytorch_model.safetensors"
METHOD = "autoencoder"
NETWORK_SHAPE = ("width", "num_blocks")
"""Settings of the method that shape its network."""
_RUN_PREFIX = "tokens.network."


def describe_tokens(path: str, kind: str) -> dict[str, Any]:
    """``tokens.*`` as the autoencoder at a path has it, and its ``channels``.

    Args:
        path: a run of ``smalti train autoencoder``, or a KL autoencoder in diffusers' form.
        kind: ``autoencoder`` or ``vae``.

    Raises:
        ConfigError: for another kind, a run of another method, or a configuration of another class.
        WeightsError: if there is nothing to be read.
    """
    place = Path(path).expanduser()
    if kind == "autoencoder":
        with reading(place, f"a run of {METHOD}", WeightsError):
            known = _run_settings(place)
            tokens = known["tokens"]
            return {
                "patch_size": tokens["patch_size"],
                "dim": tokens["dim"] or DEFAULT_DIM,
                "network": {key: known["method"][key] for key in NETWORK_SHAPE},
                "channels": known["data"]["channels"],
            }
    if kind == "vae":
        with reading(place, "a KL autoencoder", WeightsError):
            shape = _vae_settings(place)
            network = KLVAE(shape)
            return {
                "patch_size": network.patch_size,
                "dim": network.code_dim,
                "network": shape,
                "channels": network.in_chans,
            }
    raise ConfigError(f"tokens.path={path}: tokens.kind={kind} reads none; kinds that do: {', '.join(CODED)}")


def fill_tokens(source: TokenSource, config: TokenConfig) -> None:
    """Load the weights of the autoencoder at ``tokens.path``; a source without a network is unchanged.

    Raises:
        WeightsError: if they can't be read, or don't fit.
    """
    if not isinstance(source, CodeTokenSource):
        return
    place = Path(config.path or "").expanduser()
    if config.kind == "autoencoder":
        checkpoint = latest_checkpoint(place)
        if checkpoint is None:
            raise WeightsError(f"{place}: contains no complete checkpoint; give a run of smalti train autoencoder")
        file, tensors = checkpoint / WEIGHTS_FILE, read_tensors(checkpoint / WEIGHTS_FILE, _RUN_PREFIX)
        own: nn.Module = source.network
    else:
        file = _vae_file(place)
        tensors = _old_attention_names(read_tensors(file))
        own = source.network.get_submodule("vae")
    wanted = own.state_dict()
    misfits = sorted({*tensors} ^ {*wanted}) or [key for key in wanted if wanted[key].shape != tensors[key].shape]
    if misfits:
        raise WeightsError(f"{file}: is not of the shape that its settings say; '{misfits[0]}' does not fit")
    own.load_state_dict({key: tensor.float() for key, tensor in tensors.items()})


def with_network(config: TokenConfig, given: dict[str, Any], channels: int) -> TokenConfig:
    """The settings with what ``tokens.path`` fixes.

    Args:
        config: ``tokens.*``.
        given: of these, what a user said.
        channels: of the run's images.

    Raises:
        ConfigError: if that contradicts the autoencoder.
        WeightsError: if there is none at the path.
    """
    if config.path is None or config.network is not None:
        return config
    found = describe_tokens(config.path, config.kind)
    for key in ("patch_size", "dim"):
        if given.get(key) is not None and given[key] != found[key]:
            raise ConfigError(f"tokens.{key}={given[key]}: {config.path} makes tokens of {found[key]}; leave it out")
    if channels != found["channels"]:
        raise ConfigError(f"data.channels={channels}: {config.path} takes images of {found['channels']} channels")
    known = {key: found[key] for key in ("patch_size", "dim", "network")}
    return dataclasses.replace(config, **known)


def _run_settings(run: Path) -> dict[str, Any]:
    if not (run / "config.yaml").is_file():
        raise WeightsError(f"tokens.path={run}: is not a run directory; give the --out of smalti train {METHOD}")
    known = read_yaml(run / "config.yaml")
    if known["method"]["name"] != METHOD:
        raise ConfigError(f"tokens.path={run}: is a run of {known['method']['name']}; one of {METHOD} is needed")
    return known


def _vae_file(place: Path) -> Path:
    return place / VAE_FILE if place.is_dir() else place


def _vae_settings(place: Path) -> dict[str, Any]:
    """The shape in the ``config.json`` beside a VAE's weights."""
    file = _vae_file(place)
    path = file.with_name("config.json")
    if not file.is_file() or not path.is_file():
        missing = file if not file.is_file() else path
        raise WeightsError(
            f"tokens.path={place}: lacks {missing.name}; a folder with config.json and {VAE_FILE} is needed"
        )
    known = read_mapping(path, error=WeightsError)
    found = known.get("_class_name", CLASS)
    if found != CLASS:
        raise ConfigError(f"{path}: describes {found}; tokens.kind=vae takes {CLASS}")
    return {key: value for key, value in known.items() if not key.startswith("_")}


def _old_attention_names(tensors: Tensors) -> Tensors:
    """Names of attention layers as diffusers has them today; older files have ``query key value proj_attn``."""
    new = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
    renamed = {}
    for key, tensor in tensors.items():
        for old, name in new.items():
            if "attentions" in key and old in key:
                key = key.replace(old, name)
                tensor = tensor.flatten(1) if tensor.ndim == 4 else tensor
        renamed[key] = tensor
    return renamed
