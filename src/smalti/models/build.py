"""Encoders from an architecture's name and arguments."""

import copy
import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed
from timm.models import is_model_in_modules
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from smalti.config import build, unknown_key
from smalti.errors import ConfigError
from smalti.layers.pooling import PRRConfig
from smalti.layers.position_field import PositionField
from smalti.models.adaptation import attach_lora
from smalti.models.encoder import IMAGENET_MEAN, IMAGENET_STD, TIMM_MODULES, Encoder, plain_pooling
from smalti.reading import reason, shorten

_SIZES: Mapping[str, tuple[float, float]] = {
    "img_size": (1, 16384),
    "patch_size": (1, 16384),
    "in_chans": (1, 65536),
    "embed_dim": (1, 65536),
    "depth": (1, 1024),
    "num_heads": (1, 1024),
    "mlp_ratio": (0.01, 64),
    "reg_tokens": (0, 4096),
    "num_reg_tokens": (0, 4096),
}
"""Arguments of timm's ``VisionTransformer`` and ``Eva``, and what is far below and above any that was ever trained."""


AUGMENTATIONS = ("shift_coords", "jitter_coords", "rescale_coords")
"""Random changes of rotary coordinates in training mode; ``encoder.rope_rescale_coords=2.0`` asks for one."""


def build_encoder(
    name: str,
    *,
    img_size: int | Sequence[int] | None = None,
    in_chans: int = 3,
    seed: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    **model_args: Any,
) -> Encoder:
    """Build an encoder with random weights.

    Args:
        name: a timm vision transformer such as ``vit_small_patch16_224``; a tag after a dot is ignored.
        img_size: native image size in pixels; None: the architecture's own.
        in_chans: input channels, 1..N.
        seed: of the weights; torch's global random state is unchanged.
        mean: mean per channel for normalisation; None: ImageNet's for three channels, else 0.5.
        std: standard deviation per channel; None: ImageNet's for three channels, else 0.25.
        model_args: further arguments of timm's class, such as ``reg_tokens`` (``VisionTransformer``),
            ``num_reg_tokens`` (``Eva``) or ``drop_path_rate``.

    Raises:
        ConfigError: if timm has no such model, or it is neither a ``VisionTransformer`` nor an ``Eva``.
        ShapeError: if the patch size does not divide ``img_size``.
    """
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        vits = timm.list_models(module="vision_transformer")
        near = difflib.get_close_matches(architecture, vits, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else "for example vit_small_patch16_224"
        raise ConfigError(f"timm has no model '{architecture}'; {hint}")
    if not any(is_model_in_modules(architecture, [module]) for module in TIMM_MODULES) or "distilled" in architecture:
        raise ConfigError(_other_kind(architecture))
    model = timm_class(architecture)
    known_args = set(inspect.signature(model.__init__).parameters)
    for argument in model_args:
        if argument not in known_args:
            raise ConfigError(unknown_key(argument, known_args - {"self"}, "encoder"))
    if model_args.get("global_pool") in ("map", "prr"):
        raise ConfigError(f"encoder.global_pool={model_args['global_pool']}: write pool={model_args['global_pool']}")
    if model_args.get("pool_include_prefix"):
        raise ConfigError("encoder.pool_include_prefix=true: an image vector is pooled from patches only; leave it out")
    arguments = {**model_args, "in_chans": in_chans}
    _check_arguments({**arguments, **({} if img_size is None else {"img_size": img_size})})
    if img_size is not None:
        arguments["img_size"] = [img_size, img_size] if isinstance(img_size, int) else list(img_size)
    try:
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            vit = timm.create_model(
                architecture,
                **{
                    **arguments,
                    "num_classes": 0,
                    "global_pool": "",
                    **plain_pooling(model),
                    "dynamic_img_size": True,
                },
            )
    except Exception as error:  # timm checks little: zero divides, widths that don't fit, memory that isn't there
        raise ConfigError(
            f"timm can't build '{architecture}' with {shorten(str(arguments))} as a vision transformer: {reason(error)}"
        ) from error
    if type(vit) is not model or type(vit.patch_embed) is not PatchEmbed:
        raise ConfigError(_other_kind(architecture))
    if model is Eva and vit.rope is not None:
        for name in AUGMENTATIONS:  # some architectures have them by default
            if model_args.get(f"rope_{name}") is None:
                setattr(vit.rope, name, None)
        vit.rope.aug_active = any(getattr(vit.rope, name) is not None for name in AUGMENTATIONS)
    known = in_chans == 3
    encoder = Encoder(
        vit,
        architecture,
        model_args,
        mean or (IMAGENET_MEAN if known else (0.5,)),
        std or (IMAGENET_STD if known else (0.25,)),
    )
    encoder.check_size(*encoder.img_size)
    return encoder


def timm_class(architecture: str) -> type[VisionTransformer] | type[Eva]:
    """The class of a timm architecture from :data:`~smalti.models.encoder.TIMM_MODULES`."""
    return Eva if is_model_in_modules(architecture, ["eva"]) else VisionTransformer


def _other_kind(architecture: str) -> str:
    """Error message for an architecture that can't be wrapped."""
    return (
        f"timm's '{architecture}' is neither a VisionTransformer nor an Eva with plain patch embedding, which Smalti "
        "needs; for example vit_small_patch16_224 or vit_small_patch16_dinov3"
    )


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse sizes that no vision transformer has, before memory is taken for them.

    Raises:
        ConfigError: for the first of them.
    """
    for name, (least, most) in _SIZES.items():
        given = arguments.get(name)
        for value in given if isinstance(given, (list, tuple)) else (given,):
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (is_number and least <= value <= most):
                raise ConfigError(f"encoder.{name}={shorten(repr(given))}: a number from {least} to {most} is needed")


def encoder_from_config(config: Mapping[str, Any], seed: int = 0) -> Encoder:
    """The architecture that :meth:`Encoder.config` describes, with random weights from a seed.

    Raises:
        ConfigError: if a part of the description is missing or timm can't build it.
    """
    missing = {"architecture", "model_args", "mean", "std"} - set(config)
    if missing:
        raise ConfigError(f"the encoder's description lacks {', '.join(sorted(missing))}")
    encoder = build_encoder(
        config["architecture"], seed=seed, mean=config["mean"], std=config["std"], **dict(config["model_args"])
    )
    encoder.set_pos_resampling(
        str(config.get("pos_mode", "bicubic")),
        bool(config.get("pos_antialias", True)),
        float(config.get("pos_offset", 0.0)),
    )
    with torch.random.fork_rng(devices=[]):  # a pooling with parameters is drawn from the seed, too
        torch.default_generator.manual_seed(seed % 2**63)
        encoder.set_pool(config.get("pool", "auto"), build(PRRConfig, config.get("prr", {}), group="prr"), fresh=True)
    if config.get("norm_eps") is not None:
        encoder.set_norm_eps(float(config["norm_eps"]))
    if config.get("gaug"):
        encoder.attach_gaug(_gaug_grid(config["gaug"]), seed)
    if config.get("lora") is not None:
        attach_lora(encoder, int(config["lora"]), seed)
    encoder.fixed_positions = bool(config.get("fixed_positions", False))
    if config.get("position_free", False):
        encoder.drop_positions()
    if config.get("position_field"):
        encoder.attach_field(_field_from_config(config["position_field"], encoder))
    return encoder


def _gaug_grid(given: Any) -> tuple[int, int]:
    """The training grid of the Gaussian bias."""
    if isinstance(given, (list, tuple)) and len(given) == 2 and all(type(side) is int for side in given):
        return int(given[0]), int(given[1])
    raise ConfigError(f"the encoder's description has gaug={shorten(repr(given))}; two numbers of patches are needed")


def _field_from_config(config: Any, encoder: Encoder) -> PositionField:
    """The field that :meth:`PositionField.config` describes."""
    try:
        return PositionField(
            encoder.embed_dim,
            (int(config["grid"][0]), int(config["grid"][1])),
            encoder.has_class_token,
            str(config["mode"]),
            bool(config["align_corners"]),
        )
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ConfigError(f"the encoder's description has a position field that can't be built ({error})") from error


def clone_encoder(encoder: Encoder) -> Encoder:
    """A second encoder with equal weights and no shared tensors (a teacher, say)."""
    return copy.deepcopy(encoder)
