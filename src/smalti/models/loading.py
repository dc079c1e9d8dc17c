"""Load encoders by name: ``RUN | FILE.safetensors | timm:NAME | timm:NAME@FILE | hf:FOLDER | hf:NAME | random:NAME``.

``RUN`` is the newest checkpoint of a run, ``RUN/best`` the best one according to evaluation during training.
"""

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import timm
from timm.models import is_model_in_modules
from torch import nn

from smalti.config import build
from smalti.errors import ConfigError, ShapeError, SmaltiError, WeightsError
from smalti.layers.token_pruning import PredictionModule, TokenPruning
from smalti.models.adaptation import merge_lora
from smalti.models.build import build_encoder, encoder_from_config
from smalti.models.encoder import ClassHead, Encoder, Origin
from smalti.models.hub import hub_cache_only_when_unreachable
from smalti.models.huggingface import read_folder
from smalti.models.layouts import ForeignViT, Tensors, describe, fold_layer_scale, likely_names, to_timm_names
from smalti.models.pooling import MODULES
from smalti.models.weights import SUFFIXES, LoadConfig, load_vit, read_checkpoint, read_tensors
from smalti.reading import read_mapping, reading, reason

FORMS = "RUN | FILE.safetensors | timm:NAME | timm:NAME@FILE | hf:FOLDER | hf:NAME | random:NAME"
CHECKPOINTS = "checkpoints"
WEIGHTS_FILE, STATE_FILE = "weights.safetensors", "state.json"
BEST = "best"
"""As in ``RUN/best``."""
_FIELD = "position_field."


def load(
    spec: str | Path,
    *,
    seed: int = 0,
    network: str | None = None,
    img_size: int | None = None,
    in_chans: int | None = None,
    partial: bool = False,
    registers: str = "keep",
    fold_layer_scale: bool = False,
    patch_size: int | None = None,
    patch_resample: str = "pinv",
    pos_mode: str | None = None,
    pos_antialias: bool | None = None,
    pos_offset: float | None = None,
    depth: int | None = None,
    quiet: bool = False,
) -> Encoder:
    """Load an encoder by name, in eval mode on the CPU.

    Args:
        spec: ``RUN`` (a run directory, one of its checkpoints, or ``RUN/best``: the best one according to
            evaluation during training), ``FILE.safetensors`` (an export, with config.json in the same folder),
            ``timm:NAME`` (pretrained weights from the hub), ``timm:NAME@FILE`` (local weights, also of other projects),
            ``hf:FOLDER`` or ``hf:NAME`` (a model of Hugging Face transformers, in a folder or from the hub) or
            ``random:NAME`` (seeded random weights).
        seed: for ``random:``.
        network: which network of a run or a file: ``student`` or ``teacher``; None: the one that its method
            exports.
        img_size: native image size in pixels; None: the architecture's own.
        in_chans: input channels for ``random:`` and ``timm:``.
        partial: allow weights that fill only a part of the model.
        registers: ``drop`` removes register tokens; this and the following as in :class:`LoadConfig`.
        fold_layer_scale: multiply LayerScale into the preceding layers.
        patch_size: resample the patch embedding to this patch size in pixels.
        patch_resample: method for this, ``pinv`` or ``bicubic``.
        pos_mode: how positions are resampled away from the native grid: ``bicubic`` or ``bilinear``.
        pos_antialias: antialias this resampling (timm does, the code of the DINO family doesn't).
        pos_offset: see :class:`smalti.functional.positions.Resampling`.
        depth: keep only the first blocks, and the final norm.
        quiet: don't print how many tensors matched to stderr.

    Raises:
        WeightsError: if there is no such run or file, or its weights can't be read or don't fit.
        ConfigError: if timm has no such architecture, or a setting can't be used.
    """
    config = build(
        LoadConfig,
        {
            "weights": network,
            "img_size": img_size,
            "registers": registers,
            "fold_layer_scale": fold_layer_scale,
            "patch_size": patch_size,
            "patch_resample": patch_resample,
            "pos_mode": pos_mode,
            "pos_antialias": pos_antialias,
            "pos_offset": pos_offset,
            "depth": depth,
        },
        group="load",
    )
    return open_encoder(spec, config, seed=seed, in_chans=in_chans, partial=partial, quiet=quiet)


def open_encoder(
    spec: str | Path,
    config: LoadConfig,
    *,
    seed: int = 0,
    in_chans: int | None = None,
    partial: bool = False,
    quiet: bool = False,
) -> Encoder:
    """As :func:`load`, with its settings as one object."""
    text = str(spec)
    kind, _, rest = text.partition(":")
    if kind == "random" and rest:
        for name in ("weights", "patch_size", "registers", "fold_layer_scale"):
            if getattr(config, name) != getattr(LoadConfig(), name):
                raise ConfigError(f"load.{name}: {text} has no weights that it could apply to; leave it out")
        arguments = _arguments(config, rest.split(".")[0])
        encoder = build_encoder(rest, seed=seed, img_size=config.img_size, in_chans=in_chans or 3, **arguments)
        encoder.set_pos_resampling(config.pos_mode, config.pos_antialias, config.pos_offset)
        keep_blocks(encoder, config.depth)
        return encoder.eval()
    with reading(text, "an encoder", WeightsError):
        encoder = _open_weights(text, config, seed, in_chans, partial)
    encoder.pretrained = True
    keep_blocks(encoder, config.depth)
    if encoder.report is not None and not quiet:
        print(f"{encoder.report}; images normalised with mean {encoder.mean}, std {encoder.std}", file=sys.stderr)
    return encoder.eval()


def _open_weights(text: str, config: LoadConfig, seed: int, in_chans: int | None, partial: bool) -> Encoder:
    """An encoder that isn't random, from a file, a run or the hub."""
    kind, _, rest = text.partition(":")
    if kind == "timm" and rest:
        name, at, file = rest.partition("@")
        foreign, source = _from_file(Path(file).expanduser(), config) if at else _from_hub(name, config)
        arguments = {"in_chans": in_chans or 3}
        description = {"architecture": name.split(".")[0], "model_args": arguments, "mean": None, "std": None}
        encoder = _fill(description, foreign, source, config, seed, partial)
        if not at or "." in name:  # a tag (vit_..._224.augreg_in21k) selects the normalisation of these weights
            _normalize_as_published(encoder, name)
    elif kind == "hf" and rest:
        if config.weights is not None:
            raise ConfigError(f"weights={config.weights}: {text} has one network; leave it out")
        folder = _hf_folder(rest)
        found, tensors = read_folder(folder)
        if in_chans is not None and in_chans != found["model_args"]["in_chans"]:
            raise ConfigError(f"{text} takes {found['model_args']['in_chans']} channels, not {in_chans}")
        encoder = _fill(found, to_timm_names(tensors), text, config, seed, partial, folder / "config.json")
    else:
        path = Path(text).expanduser()
        if path.suffix in SUFFIXES and not path.is_dir():
            description, foreign = _exported(path, config.weights)
            encoder = _fill(description, foreign, str(path), config, seed, partial, path.with_name("config.json"))
        else:
            try:
                description, tensors, folder, name = _in_run(path, config.weights)
            except WeightsError as error:
                older = _checkpoints(path)[-2:-1]  # training falls back to it, but here the user decides
                raise WeightsError(f"{error}{f'; the checkpoint before it is {older[0]}' if older else ''}") from error
            encoder = _from_run(description, tensors, f"{folder} ({name})", config, folder / STATE_FILE)
            encoder.class_head = _class_head(folder, name)
            encoder.token_pruning = _token_pruning(folder, name, encoder)
            encoder.origin = Origin(folder, name, config)
    return encoder


def as_loaded(encoder: Encoder, config: LoadConfig = LoadConfig()) -> Encoder:
    """A copy of an encoder in memory as :func:`open_encoder` would read it from a checkpoint, in eval mode on the CPU.

    Args:
        encoder: any; not modified.
        config: how the weights are loaded: native size, patches, registers, positions.

    Raises:
        ConfigError, WeightsError: as :func:`open_encoder`.
    """
    tensors = {key: value.detach().cpu() for key, value in encoder.state_dict().items()}
    copy = _from_run(encoder.config(), tensors, encoder.source or encoder.name, config)
    copy.pretrained, copy.class_head = encoder.pretrained, encoder.class_head
    copy.token_pruning = encoder.token_pruning
    keep_blocks(copy, config.depth)
    return copy.eval()


def keep_blocks(encoder: Encoder, depth: int | None) -> None:
    """Remove all but the first blocks; the final norm follows them. What was trained on the last block, an attention
    pooling or a classification head, is removed with it.

    Args:
        encoder: modified in place.
        depth: number of blocks to keep; None or all of them: nothing changes.

    Raises:
        ConfigError: if the encoder has fewer blocks, or rotary positions that belong to blocks.
    """
    if depth is None or depth == encoder.depth:
        return
    if depth > encoder.depth:
        raise ConfigError(f"load.depth={depth}: {encoder.name} has {encoder.depth} blocks")
    if getattr(encoder.vit, "rope_mixed", False):
        raise ConfigError(f"load.depth={depth}: {encoder.name} has rotary positions for each block; keep all blocks")
    encoder.vit.blocks = encoder.vit.blocks[:depth]
    encoder.model_args["depth"] = depth
    encoder.class_head = encoder.token_pruning = None
    if encoder.pool in MODULES:
        encoder.set_pool("avg")


def _from_run(
    description: Mapping[str, Any], tensors: Tensors, source: str, config: LoadConfig, where: Path | None = None
) -> Encoder:
    """An encoder from its description and state, as checkpoints hold them."""
    vit = {key.removeprefix("vit."): value for key, value in tensors.items() if key.startswith("vit.")}
    field = {key.removeprefix(_FIELD): value for key, value in tensors.items() if key.startswith(_FIELD)}
    encoder = _fill(description, ForeignViT(vit), source, config, where=where)
    _fill_field(encoder, field, config)
    merge_lora(encoder)
    return encoder


def _arguments(config: LoadConfig, architecture: str) -> dict[str, Any]:
    """Arguments of the architecture that the settings change."""
    is_eva = is_model_in_modules(architecture, ["eva"])
    arguments: dict[str, Any] = {}
    if config.registers == "drop":
        arguments["num_reg_tokens" if is_eva else "reg_tokens"] = 0
    if config.fold_layer_scale and not is_eva:
        arguments["init_values"] = 0.0  # timm treats None as not given
    return arguments | ({"patch_size": config.patch_size} if config.patch_size else {})


def _fill(
    description: Mapping[str, Any],
    foreign: ForeignViT,
    source: str,
    config: LoadConfig,
    seed: int = 0,
    partial: bool = False,
    where: Path | None = None,
) -> Encoder:
    """Build an encoder from a description, a file and the settings, and load the file's weights.

    Args:
        description: as returned by :meth:`Encoder.config`, or a part of it.
        foreign: the file's network.
        source: name of the file in messages.
        config: the settings.
        seed: of weights that the file doesn't have.
        partial: allow weights that fill only a part.
        where: the file with the description, for error messages.
    """
    arguments = {**(description.get("model_args") or {}), **foreign.model_args}
    arguments |= _arguments(config, str(description.get("architecture", "")))
    arguments |= {"img_size": config.img_size} if config.img_size else {}
    whole = {**description, "model_args": arguments} if "model_args" in description else description
    if any(name.startswith("attn_pool.") for name in foreign.tensors) and "pool" not in description:
        whole = {**whole, "pool": "map"}  # weights with attention pooling, such as SigLIP's
    try:
        encoder = encoder_from_config(whole, seed)
    except SmaltiError as error:
        if where is not None:
            raise WeightsError(f"{where}: {error}") from error
        if isinstance(error, ShapeError):
            raise ConfigError(f"{source}: {error}; load.img_size, in pixels, chooses the native size") from error
        raise
    encoder.set_pos_resampling(config.pos_mode, config.pos_antialias, config.pos_offset)
    if config.fold_layer_scale:
        folded = fold_layer_scale(foreign.tensors)
        note = "LayerScale folded" if len(folded) < len(foreign.tensors) else "no LayerScale to fold"
        foreign = replace(foreign, tensors=folded, notes=(*foreign.notes, note))
    encoder.report = load_vit(encoder.vit, foreign, source, partial, config, encoder.pos_resampling)
    encoder.source = source
    return encoder


def _fill_field(encoder: Encoder, tensors: Tensors, config: LoadConfig) -> None:
    """The weights of a position field, which is read at the grid of use: no table is resampled.

    Raises:
        ConfigError: for a setting that says how it should be.
        WeightsError: if the tensors aren't those of the field that the description has.
    """
    if encoder.position_field is None:
        return
    for name in ("pos_mode", "pos_antialias", "pos_offset"):
        if getattr(config, name) is not None:
            raise ConfigError(
                f"load.{name}: {encoder.source} reads its positions from a field, nothing is resampled; leave it out"
            )
    own = encoder.position_field.state_dict()
    if {key: value.shape for key, value in own.items()} != {key: value.shape for key, value in tensors.items()}:
        raise WeightsError(f"{encoder.source}: the weights of its position field don't fit its description")
    encoder.position_field.load_state_dict(tensors)
    if encoder.report is not None:
        rows, columns = encoder.position_field.grid
        encoder.report = replace(
            encoder.report, notes=(*encoder.report.notes, f"positions from a field of {rows}x{columns}")
        )


def _from_file(file: Path, config: LoadConfig) -> tuple[ForeignViT, str]:
    """The network in a local file of any layout."""
    try:
        held = read_checkpoint(file, config.weights)
        wanted = config.weights if held.network is None else None
        foreign = to_timm_names(held.tensors, wanted, held.beside)
    except WeightsError as error:
        raise _of(file, error) from error
    return foreign, f"{file} ({held.network})" if held.network else str(file)


def _normalize_as_published(encoder: Encoder, name: str) -> None:
    """Set mean and standard deviation to timm's for the pretrained weights of this name and tag."""
    settings = timm.get_pretrained_cfg(name)
    if settings is not None and len(settings.mean) == encoder.in_chans:
        encoder.set_normalization(settings.mean, settings.std)


def _from_hub(name: str, config: LoadConfig) -> tuple[ForeignViT, str]:
    """Pretrained weights, downloaded by timm; only for ``timm:NAME``."""
    if config.weights is not None:
        raise ConfigError(f"weights={config.weights}: timm:{name} has one network; leave it out")
    try:
        with hub_cache_only_when_unreachable():
            source = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # hub clients raise many kinds; the line below says what to do about all of them
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsError(
            f"timm:{name}: its pretrained weights could not be fetched ({reason[:200]}); "
            f"give a local file as timm:{name}@FILE, or take random weights with random:{name}"
        ) from error
    return to_timm_names(source.state_dict()), f"timm:{name}"


def _hf_folder(name: str) -> Path:
    """The folder of a transformers model: a local one, or one of the hub, downloaded because the user named it."""
    folder = Path(name).expanduser()
    if folder.is_dir() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        if not folder.is_dir():
            raise WeightsError(f"hf:{name}: no such folder; hf:OWNER/NAME names a model of the hub")
        return folder
    try:
        with hub_cache_only_when_unreachable():
            kinds = ["config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json"]
            return Path(huggingface_hub.snapshot_download(name, allow_patterns=kinds))
    except Exception as error:  # hub clients raise many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsError(
            f"hf:{name}: could not be fetched ({reason[:200]}); give a local folder as hf:FOLDER"
        ) from error


def _exported(path: Path, network: str | None) -> tuple[dict[str, Any], ForeignViT]:
    """An exported encoder: ``FILE.safetensors`` with ``config.json`` in the same folder."""
    config_path = path.with_name("config.json")
    if path.suffix != ".safetensors" or not config_path.is_file():
        raise WeightsError(_bare(path))
    config = _read_json(config_path, "")
    try:
        foreign = to_timm_names(read_tensors(path), network)
    except WeightsError as error:
        raise _of(path, error) from error
    return config.get("smalti") or _from_timm_config(config), foreign


def _of(file: Path, error: WeightsError) -> WeightsError:
    """The error with the file's name prepended, unless it is there already."""
    return error if str(error).startswith(str(file)) else WeightsError(f"{file}: {error}")


def _bare(path: Path) -> str:
    """Error message for weights without a description, with their probable name in timm."""
    try:
        tensors = to_timm_names(read_checkpoint(path).tensors).tensors
        network = ""
    except WeightsError as error:
        if "choose weights=" not in str(error):
            return str(_of(path, error))
        tensors = to_timm_names(read_checkpoint(path).tensors, "student").tensors
        network = " weights=student"
    known = [name for name in likely_names(tensors) if timm.is_model(name)]
    name = known[0] if known else "NAME"
    extras = " load.registers=drop" if "reg_token" in tensors and known and "_reg" not in name else ""
    if "blocks.0.ls1.gamma" in tensors and known and "dinov2" not in name:
        extras += " load.fold_layer_scale=true"
    which = "try" if known else "its proportions have no name that Smalti knows in timm; if timm has one:"
    return (
        f"{path}: weights without a config.json beside them don't say their architecture; it is {describe(tensors)}: "
        f"{which} timm:{name}@{path}{network}{extras}"
    )


def _from_timm_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our description of an encoder from timm's own config.json."""
    arguments = {
        key: value
        for key, value in dict(config.get("model_args") or {}).items()
        if key
        not in ("num_classes", "global_pool", "fc_norm", "use_fc_norm", "dynamic_img_size", "pool_include_prefix")
    }
    normalization = config.get("pretrained_cfg") or {}
    pool = (config.get("model_args") or {}).get("global_pool") or config.get("global_pool")
    return {
        "architecture": config.get("architecture", ""),
        "model_args": arguments,
        "mean": normalization.get("mean"),
        "std": normalization.get("std"),
        "pool": pool if pool in ("map", "prr") else "auto",
    }


def _in_run(path: Path, network: str | None) -> tuple[dict[str, Any], Tensors, Path, str]:
    """The encoder in a run's newest or best checkpoint, or in the checkpoint given: description, tensors, folder,
    name."""
    folder = find_checkpoint(path)
    if folder is None and not path.exists():
        if names_best(path):
            raise WeightsError(
                f"{path}: no evaluation in training has chosen a best step (it needs eval.data=LABELLED eval.every=N); "
                f"take {path.parent}, the newest"
            )
        raise WeightsError(f"{path}: no such run or file; an encoder is one of {FORMS}")
    if folder is None:
        raise WeightsError(f"{path}: contains no complete checkpoint; an encoder is one of {FORMS}")
    state = _read_json(folder / STATE_FILE, f"{folder}: the checkpoint lacks its {STATE_FILE}")
    networks = state.get("networks") or {}
    if not networks:
        raise WeightsError(f"{folder}: {state.get('method')} trains no encoder that could be taken from it")
    name = network or state.get("export_network", "")
    if name not in networks:
        raise WeightsError(f"{folder}: has no network '{name}'; it has {', '.join(networks) or 'none'}")
    description = state.get("encoder") or {}
    return description, read_tensors(folder / WEIGHTS_FILE, prefix=f"{networks[name]}."), folder, name


def _class_head(folder: Path, name: str) -> ClassHead | None:
    """Classification head of a network in a checkpoint, if its method trained one."""
    known = (_read_json(folder / STATE_FILE, "").get("class_heads") or {}).get(name)
    if known is None:
        return None
    try:
        found = read_tensors(folder / WEIGHTS_FILE, keys=(known["weight"], known["bias"]))
        return ClassHead(
            found[known["weight"]],
            found[known["bias"]],
            tuple(map(str, known["classes"])),
            str(known["order"]),
            str(known["orders"]),
        )
    except (KeyError, TypeError) as error:
        raise WeightsError(
            f"{folder}: what its {STATE_FILE} says of the head for classes is damaged ({error})"
        ) from None


def _token_pruning(folder: Path, name: str, encoder: Encoder) -> TokenPruning | None:
    """Learned pruning of a network in a checkpoint, if its method trained one."""
    known = (_read_json(folder / STATE_FILE, "").get("token_prunings") or {}).get(name)
    if known is None:
        return None
    try:
        blocks, ratio = tuple(int(block) for block in known["blocks"]), float(known["keep_ratio"])
        predictors = nn.ModuleList(PredictionModule(encoder.embed_dim) for _ in blocks)
        predictors.load_state_dict(read_tensors(folder / WEIGHTS_FILE, prefix=f"{known['predictors']}."))
        return TokenPruning(blocks, ratio, predictors).check(encoder.depth)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise WeightsError(
            f"{folder}: what its {STATE_FILE} says of the prediction modules is damaged ({reason(error)})"
        ) from None


def find_checkpoint(path: Path) -> Path | None:
    """The checkpoint at a path: itself, the newest of a run, or ``RUN/best``; None if there is none."""
    if (path / STATE_FILE).is_file():
        return path
    if not names_best(path):
        return latest_checkpoint(path)
    newest = latest_checkpoint(path.parent)
    state = {} if newest is None else _read_json(newest / STATE_FILE, "").get("state") or {}
    best = path.parent / CHECKPOINTS / f"step_{state.get('best_step') or 0:08d}"
    return best if state.get("best_step") is not None and (best / STATE_FILE).is_file() else None


def weights_digest(spec: str) -> str:
    """Fingerprint of the weights that an encoder's name refers to, as far as known from local files."""
    kind, _, rest = spec.partition(":")
    if kind == "random":
        return spec
    if kind == "timm":
        name, at, file = rest.partition("@")
        return f"timm:{name}@{file_digest(Path(file).expanduser())}" if at else spec
    if kind == "hf":
        files = sorted(Path(rest).expanduser().glob("*.safetensors"))
        return f"hf:{','.join(map(file_digest, files))}" if files else spec
    path = Path(spec).expanduser()
    checkpoint = find_checkpoint(path)
    return file_digest(path if checkpoint is None else checkpoint / WEIGHTS_FILE)


def file_digest(path: Path) -> str:
    """Sixteen letters that change with what a file holds."""
    if not path.is_file():
        return f"missing {path}"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def names_best(path: Path) -> bool:
    """Whether this is ``RUN/best``, and no folder of that name."""
    return path.name == BEST and (path.parent / CHECKPOINTS).is_dir() and not path.exists()


def latest_checkpoint(run: Path) -> Path | None:
    """The finished checkpoint of a run with the highest step; None if there is none."""
    found = _checkpoints(run)
    return found[-1] if found else None


def _checkpoints(run: Path) -> list[Path]:
    """The finished checkpoints of a run, by their steps."""
    found = [
        (int(folder.name.removeprefix("step_")), folder)
        for folder in (run / CHECKPOINTS).glob("step_*")
        if folder.name.removeprefix("step_").isdecimal() and (folder / STATE_FILE).is_file()
    ]
    return [folder for _, folder in sorted(found)]


def encoder_description(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of its encoder, for :func:`smalti.models.encoder.encoder_from_config`.

    Raises:
        WeightsError: if it can't be read.
    """
    return (
        _read_json(checkpoint / STATE_FILE, f"{checkpoint}: the checkpoint lacks its {STATE_FILE}").get("encoder") or {}
    )


def _read_json(path: Path, missing: str) -> dict[str, Any]:
    if not path.is_file():
        raise WeightsError(missing)
    return read_mapping(path, error=WeightsError)
