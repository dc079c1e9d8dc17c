"""Export an encoder to a folder that timm loads; the tokens are checked to be equal."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from smalti.config import to_tree
from smalti.errors import ConfigError, WeightsError
from smalti.exporters.card import CARD, Provenance, model_card
from smalti.files import first_entry, folder_beside, write_atomically
from smalti.layers.pooling import PRRConfig
from smalti.models.build import clone_encoder
from smalti.models.encoder import Encoder
from smalti.models.pooling import MODULES, PatchFeatures

TOLERANCE = 1e-6
"""Largest allowed absolute difference of a token."""


class TimmExport(NamedTuple):
    """Result of :func:`export_timm`."""

    path: Path
    """The folder, for ``timm.create_model("local-dir:FOLDER", pretrained=True)``."""
    difference: float
    """Largest absolute difference over all tokens of one random image and its vector, at most :data:`TOLERANCE`."""


def export_timm(encoder: Encoder, out: Path, provenance: Provenance = Provenance()) -> TimmExport:
    """Write an encoder as ``model.safetensors`` and ``config.json``, which timm loads without Smalti, and a model card.

    The folder is written under a temporary name, loaded through timm, compared with the encoder on a random image, and
    only then renamed to ``out``. ``smalti.load("OUT/model.safetensors")`` rebuilds the encoder from the key ``smalti``
    of ``config.json``. At other image sizes timm resamples positions with antialiasing; ``pos_antialias=False`` is
    respected only by ``smalti.load``.

    Args:
        encoder: on any device; the comparison runs on the CPU in float32.
        out: a folder that does not exist yet, or is empty.
        provenance: of the weights, for the model card.

    Raises:
        ConfigError: if ``out`` is a file, isn't empty or can't be written; or if timm's models don't have the encoder's
            pooling (such as PRR with norms).
        WeightsError: if timm's model differs by more than :data:`TOLERANCE`; nothing is written.
    """
    check_target(out)
    try:
        with folder_beside(out) as temporary:
            state = {key: value.contiguous() for key, value in timm_model(encoder).state_dict().items()}
            save_file(state, temporary / "model.safetensors", metadata={"format": "pt"})
            write_atomically(temporary / "config.json", json.dumps(timm_config(encoder), indent=2) + "\n")
            place = f"hf-hub:{provenance.repository}" if provenance.repository else f"local-dir:{out}"
            usage = f"""import timm

model = timm.create_model("{place}", pretrained=True).eval()
features = model.forward_features(images)"""
            write_atomically(
                temporary / CARD, model_card(encoder, "timm", "normalized", encoder.img_size, usage, provenance)
            )
            difference = compare(encoder, temporary)
            if not difference <= TOLERANCE:  # also NaN
                raise WeightsError(
                    f"timm's model differs from the encoder by {difference:.3g} on a random image, "
                    f"at most {TOLERANCE:g} is allowed; {out} was not written"
                )
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{out}: can't be written ({getattr(error, 'strerror', None) or error})") from error
    return TimmExport(out, difference)


def timm_model(encoder: Encoder) -> VisionTransformer | Eva:
    """A plain timm model with the weights of an encoder, on the CPU, in eval mode.

    ``forward_features`` equals the tokens of :meth:`Encoder.encode` (prefix first) at the native size, ``forward``
    equals :meth:`Encoder.image_features`.

    Raises:
        ConfigError: for settings of ``pool=prr`` that timm's models don't have.
    """
    model = timm.create_model(encoder.name, **timm_arguments(encoder))
    state = encoder.vit.state_dict()
    if encoder.position_field is not None:
        table, token = encoder.position_table()
        state |= {name: value for name, value in (("pos_embed", table), ("cls_token", token)) if value is not None}
    model.load_state_dict({key: value.detach().cpu() for key, value in state.items()}, strict=True)
    return model.eval()


def timm_arguments(encoder: Encoder) -> dict[str, Any]:
    """Arguments with which ``timm.create_model(encoder.name, ...)`` builds the model of :func:`timm_model`.

    Raises:
        ConfigError: as :func:`timm_model`.
    """
    if encoder.gaug is not None:
        raise ConfigError(
            "gaug=true adds a Gaussian bias to the attention logits, which timm's models don't have; export it with "
            "to=onnx, or load the run with smalti.load"
        )
    if encoder.norm_eps is not None:
        raise ConfigError(
            f"the layer norms of these weights have eps={encoder.norm_eps:g}, which timm's {encoder.name} can't be "
            "told; export to=onnx or to=hf"
        )
    if encoder.is_rotary and encoder.position_free:
        raise ConfigError(
            f"these weights were trained without positions, and timm's {encoder.name} always rotates by them; load the "
            "run with smalti.load, or fine-tune it first"
        )
    if encoder.is_rotary and encoder.pool == "prr":
        raise ConfigError("timm's Eva models have no PRR pooling; export the same tokens with pool=auto")
    prr = encoder.prr
    if encoder.pool == "prr" and replace(prr, num_heads=prr.num_heads or encoder.num_heads) != PRRConfig(
        num_heads=encoder.num_heads
    ):
        raise ConfigError(
            "timm's PRR pooling has the backbone's number of heads, no norms and all tokens; this encoder "
            f"has {', '.join(f'prr.{name}={value}' for name, value in to_tree(prr).items())}; "
            "export the same tokens with pool=auto"
        )
    pool = {"global_pool": encoder.pool} if encoder.pool in MODULES else {}
    return {**encoder.timm_args(), **pool}


def check_target(out: Path) -> None:
    """Check that a path is a new or empty folder.

    Raises:
        ConfigError: if it isn't; names the first file in it.
    """
    if out.is_dir():
        if (held := first_entry(out)) is not None:
            raise ConfigError(f"{out}: the folder is not empty (it holds {held.name}); name a new or an empty folder")
    elif out.exists() or out.is_symlink():
        raise ConfigError(f"{out}: is a file, a folder is needed; name a new or an empty folder")


def timm_config(encoder: Encoder) -> dict[str, Any]:
    """Content of ``config.json`` in timm's local-dir layout, with the encoder's own description under ``smalti``."""
    height, width = encoder.img_size
    arguments = timm_arguments(encoder)
    return {
        "architecture": encoder.name,
        "num_classes": 0,
        "num_features": encoder.embed_dim,
        "global_pool": arguments["global_pool"],
        # transformers' AutoModel passes num_classes itself
        "model_args": {key: value for key, value in arguments.items() if key != "num_classes"},
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [encoder.in_chans, height, width],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(encoder.mean),
            "std": list(encoder.std),
            "num_classes": 0,
            "pool_size": None,
            # Older releases of timm assume three input channels, and reinitialise the first convolution otherwise.
            "first_conv": "patch_embed.proj" if encoder.in_chans == 3 else None,
            "classifier": "head",
        },
        # A position field is exported as a table at the native grid.
        "smalti": {key: value for key, value in encoder.config().items() if key != "position_field"},
    }


@torch.inference_mode()
def compare(encoder: Encoder, folder: Path) -> float:
    """Largest absolute difference between an encoder's tokens and image vector and those of the timm model in a
    folder.

    Args:
        encoder: on any device; a copy on the CPU is compared.
        folder: in timm's local-dir layout.
    """
    ours = clone_encoder(encoder).cpu().float().eval()
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    generator = torch.Generator().manual_seed(0)
    images = ours.normalize(torch.rand(1, encoder.in_chans, *encoder.img_size, generator=generator))
    features = ours.encode(images)
    tokens = torch.cat([features.prefix, features.patches], dim=1)
    of_tokens = (tokens - theirs.forward_features(images)).abs().max()
    # float64: sums of many tokens in another order differ by more than the tolerance
    pooled = ours.double().pooled(PatchFeatures(features.patches.double(), features.prefix.double(), features.grid))
    of_vector = (pooled - theirs.double().forward_head(tokens.double())).abs().max()
    return max(of_tokens.item(), of_vector.item())
