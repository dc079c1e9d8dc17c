"""Object detection and instance segmentation: a copy of the encoder in Mask R-CNN, fine-tuned on data in COCO format.

Source: Li et al., ViTDet, arXiv:2203.16527, Sec. 3 and App. A.2, without window attention and relative positions; the
lengths and learning rates of Liu et al., "Self-Supervised Learning of Intertwined Content and Positional Features for
Object Detection", ICML 2025. Region proposals, RoI align, heads and losses are torchvision's.
Differs from them: torchvision's box loss is smooth L1 with beta 1/9 and its RoI align has no half-pixel shift; class
token, registers and layer scale are kept; biases have no weight decay; batches cross epochs; padding is zero after
normalisation. Strides and anchors follow the patch size: values given for 16 pixels are scaled.
Letters: B images, n objects, K classes, S side of the input in pixels, h x w the patch grid, D embed_dim.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from timm.layers import LayerNorm2d
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

from smalti.charts import loss_chart
from smalti.config import BatchSize, Count, CountFromZero, settings
from smalti.data.images.coco import CocoImage, CocoObject, annotated_image
from smalti.data.images.decode import image_size
from smalti.data.images.folders import ImageSample, ImageSet
from smalti.data.views import Skipped
from smalti.errors import ConfigError, DataError, SmaltiError
from smalti.evaluation.coco_ap import (
    MOST,
    UNIT,
    Detections,
    average_precision,
    encode_masks,
    has_outline,
    is_only_box,
    need_extra,
    outline_mask,
)
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.features import Features
from smalti.evaluation.protocol import Scores, register_protocol
from smalti.evaluation.protocols.segmenter import nearest_to, resize_to
from smalti.evaluation.result import Boxes
from smalti.evaluation.tuning import (
    Example,
    check_micro_batch,
    normalized,
    rate_positions,
    seeded,
    stream,
    train,
    trainable_copy,
    warm_steps,
)
from smalti.functional.precision import has_bf16
from smalti.layers.feature_pyramid import SCALES, SimpleFeaturePyramid
from smalti.models.encoder import Encoder

FLIP_PROB = 0.5
BETAS = (0.9, 0.999)
MILESTONES = (19_667 / 22_128, 21_306 / 22_128)
"""Fractions of the steps after which the learning rate is divided by 10."""
ANCHOR_STRIDES = 8
"""Anchor size of a map in units of its stride: 32 pixels at stride 4."""
ASPECTS = (0.5, 1.0, 2.0)
CANONICAL_PATCHES = 224 / 16
"""Canonical size, in patches, of the boxes assigned to the map of stride 1 patch."""
LEAST_SCORE = 0.05
LEAST_SIDE = 1.0
"""Minimum side in pixels of objects used for training, after cropping."""
SHOWN_SCORE = 0.3
"""Minimum score of detections shown in figures."""
_BY_PROPOSALS = ("0", "1", "2", "3", "pool")
_FULL_STEPS, _FULL_BATCH, _FULL_SIZE = 22_128, 64, 1024
_SMALL_WIDTH = 384  # of a ViT-S


@dataclass(frozen=True)
class DetectionRecipe:
    """A preset with the settings that the user changed."""

    image_size: int
    """S in pixels."""
    steps: int
    batch_size: int
    learning_rate: float
    num_warmup: int
    """Number of warm-up steps."""
    scale: tuple[float, float]
    """Range of the random scale before cropping, relative to an image whose longer side fills the input."""
    channels: int
    """Channels of the feature pyramid."""
    rpn_convs: int
    box_convs: int
    box_fc: tuple[int, ...]
    """Widths of the box head's linear layers."""
    mask_convs: int
    num_proposals: int
    """Proposals per image in training, before sampling; evaluation uses half as many."""
    num_rois: int
    """Proposals per image used to train the heads."""
    final_norm: bool
    """Whether to keep the encoder's final norm."""
    layer_decay: float = 0.7
    weight_decay: float = 0.1
    drop_path: float = 0.1


@settings
class DetectionConfig:
    """Settings of ``detection``."""

    steps: Count | None = None
    """Training steps; None: the preset's."""
    batch_size: BatchSize | None = None
    """Images per training step; None: the preset's."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Highest learning rate; None: the preset's."""
    micro_batch: BatchSize | None = None
    """Images per forward pass in training, a divisor of the batch; gradients are accumulated. None: the whole batch."""
    checkpointing: bool = False
    """Recompute the encoder's activations in the backward pass: less memory, more time, the same numbers."""
    masks: bool | None = None
    """Also train and evaluate instance masks; None: if the annotations have more than boxes."""
    frozen_blocks: CountFromZero = 0
    """Freeze this many first blocks of the encoder and everything before them; 0: train everything."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Training precision; ``auto``: bf16 on GPUs that support it."""


def choose_recipe(features: Features, config: EvalConfig) -> DetectionRecipe:
    """The preset with the user's settings.

    Raises:
        ConfigError: if the encoder's patches aren't square, it has fewer blocks than ``frozen_blocks``, its own image
            size isn't square and none is given, or ``micro_batch`` doesn't divide the batch.
        ShapeError: if the patch size does not divide the image size that was given.
    """
    own: DetectionConfig = config.of("detection")
    encoder = features.encoder
    height, width = encoder.patch_size
    if height != width:
        raise ConfigError(f"{encoder.name} has patches of {height}x{width} pixels; detection needs square ones")
    if own.frozen_blocks > encoder.depth:
        raise ConfigError(
            f"eval.detection.frozen_blocks={own.frozen_blocks}: {encoder.name} has only {encoder.depth} blocks"
        )
    if config.preset == "small":
        size, steps = features.dense_size(config.image_size), own.steps or 400
        recipe = DetectionRecipe(
            size, steps, 4, 2e-4, math.ceil(steps / 10), (0.6, 1.4), 128, 1, 0, (512, 512), 2, 500, 64, True
        )
    else:
        size = _FULL_SIZE // height * height if config.image_size is None else features.image_size(config.image_size)
        steps = own.steps or _FULL_STEPS
        rate = 1e-4 if encoder.embed_dim <= _SMALL_WIDTH else 3e-4
        num_warmup = min(250, math.ceil(steps / 10))
        recipe = DetectionRecipe(
            size, steps, _FULL_BATCH, rate, num_warmup, (0.1, 2.0), 256, 2, 4, (1024,), 4, 2000, 512, False
        )
    changed: dict[str, Any] = {"batch_size": own.batch_size, "learning_rate": own.learning_rate}
    recipe = replace(recipe, **{name: value for name, value in changed.items() if value is not None})
    check_micro_batch("detection", recipe.batch_size, own.micro_batch)
    return recipe


class PatchAnchors(AnchorGenerator):  # type: ignore[misc]  # torchvision has no types
    """Anchors of a pyramid for patches of any size, whose strides may be fractions of a pixel.

    Args:
        patch_size: patch size in pixels.
    """

    def __init__(self, patch_size: int) -> None:
        self.exact = tuple(patch_size / scale for scale in SCALES)
        sizes = tuple((ANCHOR_STRIDES * stride,) for stride in self.exact)
        super().__init__(sizes, (ASPECTS,) * len(sizes))

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """``(A, 4)`` x0 y0 x1 y1 in pixels, equal for each image, always float32."""
        device = feature_maps[0].device
        strides = [[torch.tensor(stride, device=device)] * 2 for stride in self.exact]
        self.set_cell_anchors(torch.float32, device)
        anchors = torch.cat(self.grid_anchors([list(one.shape[-2:]) for one in feature_maps], strides))
        return [anchors for _ in image_list.image_sizes]


class InFloat32(nn.Module):
    """A head with float32 outputs, since bfloat16 is too coarse for coordinates and scores."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, *inputs: Any) -> Any:
        """The outputs of the head as float32."""
        return _as_float32(self.head(*inputs))


def _as_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) else type(value)(map(_as_float32, value))


class Backbone(nn.Module):
    """The encoder and a feature pyramid on its patches.

    Args:
        encoder: a copy, modified in place.
        channels: channels of the maps.
        final_norm: whether the encoder's final norm is kept.
    """

    def __init__(self, encoder: Encoder, channels: int, final_norm: bool) -> None:
        super().__init__()
        self.encoder, self.out_channels = encoder, channels
        if not final_norm:
            encoder.vit.norm = nn.Identity()
        self.pyramid = SimpleFeaturePyramid(encoder.embed_dim, channels)

    def forward(self, images: Float[Tensor, "B C S S"]) -> dict[str, Tensor]:
        """Maps by name, finest first."""
        patches, _, (h, w) = self.encoder.encode(images)
        tokens = patches.mT.reshape(len(images), -1, h, w)  # (B, N, D) -> (B, D, h, w)
        return OrderedDict(zip(_BY_PROPOSALS, self.pyramid(tokens), strict=True))


class Detector(nn.Module):
    """Faster or Mask R-CNN on an encoder's pyramid, for square images that are already resized and normalised.

    Args:
        encoder: a copy, modified in place.
        recipe: sizes of the network.
        num_classes: K.
        masks: whether it has a mask head.
    """

    def __init__(self, encoder: Encoder, recipe: DetectionRecipe, num_classes: int, masks: bool) -> None:
        super().__init__()
        patch, channels = encoder.patch_size[0], recipe.channels
        anchors = PatchAnchors(patch)
        box_head = FastRCNNConvFCHead(
            (channels, 7, 7), [channels] * recipe.box_convs, list(recipe.box_fc), norm_layer=LayerNorm2d
        )
        parts: dict[str, Any] = {
            "rpn_anchor_generator": anchors,
            "rpn_head": InFloat32(RPNHead(channels, anchors.num_anchors_per_location()[0], recipe.rpn_convs)),
            "rpn_pre_nms_top_n_train": recipe.num_proposals,
            "rpn_pre_nms_top_n_test": recipe.num_proposals // 2,
            "rpn_post_nms_top_n_train": recipe.num_proposals,
            "rpn_post_nms_top_n_test": recipe.num_proposals // 2,
            "box_roi_pool": _roi_align(7, patch),
            "box_head": box_head,
            "box_predictor": InFloat32(FastRCNNPredictor(recipe.box_fc[-1], num_classes + 1)),
            "box_score_thresh": LEAST_SCORE,
            "box_detections_per_img": MOST,
            "box_batch_size_per_image": recipe.num_rois,
        }
        if masks:
            parts |= {
                "mask_roi_pool": _roi_align(14, patch),
                "mask_head": MaskRCNNHeads(channels, [channels] * recipe.mask_convs, 1, norm_layer=LayerNorm2d),
                "mask_predictor": InFloat32(MaskRCNNPredictor(channels, channels, num_classes + 1)),
            }
        backbone = Backbone(encoder, channels, recipe.final_norm)
        whole = (MaskRCNN if masks else FasterRCNN)(backbone, **parts)
        # No transform: images are already preprocessed.
        self.backbone, self.rpn, self.roi_heads = backbone, whole.rpn, whole.roi_heads

    def forward(
        self,
        images: Float[Tensor, "B C S S"],
        sizes: Sequence[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections in eval mode, losses in training mode.

        Args:
            images: normalised, padded on the right and at the bottom.
            sizes: ``(height, width)`` of the images without padding.
            targets: boxes ``(n, 4)`` in pixels of the input, labels ``(n,)`` 1..K, and masks ``(n, S, S)`` if there
                is a mask head.

        Returns:
            For each image boxes, labels 1..K, scores, and masks ``(n, 1, 28, 28)`` within the boxes; the named losses.
        """
        batch = ImageList(images, list(sizes))
        maps = self.backbone(images)
        proposals, losses = self.rpn(batch, maps, targets)
        detections, more = self.roi_heads(maps, proposals, list(sizes), targets)
        return detections, {**losses, **more}


def _roi_align(size: int, patch: int) -> MultiScaleRoIAlign:
    """RoI align with exact scales; by default, it would round them to powers of 2."""
    pool = MultiScaleRoIAlign(list(_BY_PROPOSALS[:4]), size, sampling_ratio=2)
    pool.scales = [scale / patch for scale in SCALES[:4]]
    pool.map_levels = initLevelMapper(2, 5, canonical_scale=CANONICAL_PATCHES * patch, canonical_level=4)
    return pool


@dataclass(frozen=True)
class DetectionExamples:
    """Loads and augments training images and their objects; see :func:`~smalti.evaluation.tuning.train`."""

    samples: Sequence[ImageSample]
    recipe: DetectionRecipe
    masks: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, place: int, key: int) -> Example | Skipped:
        """``(C, S, S)`` normalised image: scaled, cropped, flipped, padded; and its objects without crowds."""
        sample, size = self.samples[place], self.recipe.image_size
        try:
            image = sample.read(len(self.mean))
        except DataError as error:
            return Skipped(sample.path, str(error).removeprefix(f"{sample.path}: "))
        objects = [item for item in annotated_image(sample).objects if not item.is_crowd]
        rng = np.random.default_rng(key)
        full_height, full_width = image.shape[:2]
        factor = rng.uniform(*self.recipe.scale) * size / max(full_height, full_width)
        height, width = (max(1, round(side * factor)) for side in (full_height, full_width))
        top, left = (int(rng.integers(max(side - size, 0) + 1)) for side in (height, width))
        window = np.s_[top : min(top + size, height), left : min(left + size, width)]
        view = resize_to(image, height, width)[window]
        is_flipped = bool(rng.random() < FLIP_PROB)
        shown_height, shown_width = view.shape[:2]
        boxes = np.array([item.box for item in objects], np.float32).reshape(-1, 4)
        boxes *= np.array([width / full_width, height / full_height] * 2, np.float32)
        boxes -= np.array([left, top] * 2, np.float32)
        boxes = boxes.clip(0, np.array([shown_width, shown_height] * 2, np.float32))
        if is_flipped:
            view = view[:, ::-1]
            boxes[:, [0, 2]] = shown_width - boxes[:, [2, 0]]
        kept = np.flatnonzero((boxes[:, 2:] - boxes[:, :2] >= LEAST_SIDE).all(1))
        beyond = (0, size - shown_width, 0, size - shown_height)
        target = {
            "boxes": torch.from_numpy(boxes[kept]),
            "labels": torch.tensor([objects[i].label + 1 for i in kept], dtype=torch.int64),
            "size": torch.tensor([shown_height, shown_width]),
        }
        if self.masks:
            masks = torch.zeros(len(kept), size, size, dtype=torch.uint8)
            for row, i in enumerate(kept):
                mask = _outline_of(sample, objects[i], full_height, full_width)
                mask = nearest_to(mask, height, width)[window]
                mask = mask[:, ::-1] if is_flipped else mask
                masks[row, :shown_height, :shown_width] = torch.from_numpy(mask.copy())
            target["masks"] = masks
        return F.pad(normalized(view, self.mean, self.std), beyond), target


class _PaddedImages(Dataset[Any]):
    """Test images, resized by their longer side, normalised and padded, with their size without padding."""

    def __init__(self, images: ImageSet, size: int, encoder: Encoder) -> None:
        self._samples, self._size, self._mean, self._std = images.samples, size, encoder.mean, encoder.std

    def __getitem__(self, place: int) -> tuple[Tensor, tuple[int, int]] | Skipped | SmaltiError:
        sample, size = self._samples[place], self._size
        try:
            image = sample.read(len(self._mean))
        except DataError as error:
            return Skipped(sample.path, str(error).removeprefix(f"{sample.path}: "))
        factor = size / max(image.shape[:2])
        height, width = (max(1, min(size, round(side * factor))) for side in image.shape[:2])
        pixels = normalized(resize_to(image, height, width), self._mean, self._std)
        return F.pad(pixels, (0, size - width, 0, size - height)), (height, width)


def optimizer_of(model: Detector, recipe: DetectionRecipe, encoder: Encoder) -> torch.optim.Optimizer:
    """AdamW with layer-wise decay of the learning rate in the encoder; pyramid and heads have the full rate.

    Args:
        model: detector on its device.
        recipe: rates and decays.
        encoder: the original.
    """
    vit = model.backbone.encoder.vit
    if any(parameter.requires_grad for parameter in vit.parameters()):
        optimizer = create_optimizer_v2(
            vit,
            "adamw",
            lr=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            layer_decay=recipe.layer_decay,
            betas=BETAS,
        )
        for group in optimizer.param_groups:
            group["lr_scale"] *= recipe.layer_decay  # timm's decay starts at the last block, ViTDet's after it
        rate_positions(optimizer, encoder, model.backbone.encoder)
    else:
        optimizer = torch.optim.AdamW([{"params": []}], lr=recipe.learning_rate, betas=BETAS)
    known = {id(parameter) for parameter in vit.parameters()}
    fresh = [parameter for parameter in model.parameters() if id(parameter) not in known]
    for is_vector, decay in ((False, recipe.weight_decay), (True, 0.0)):
        params = [parameter for parameter in fresh if (parameter.ndim < 2) == is_vector]
        optimizer.add_param_group({"params": params, "lr_scale": 1.0, "weight_decay": decay})
    return optimizer


def freeze_blocks(encoder: Encoder, count: int) -> None:
    """Freeze the first ``count`` blocks, patch embedding, prefix tokens and positions; 0: nothing."""
    if count:
        encoder.requires_grad_(False)
        for part in (*encoder.vit.blocks[count:], encoder.vit.norm):
            part.requires_grad_(True)


def detection_loss(
    model: Detector, images: Float[Tensor, "B C S S"], targets: list[dict[str, Tensor]]
) -> Float[Tensor, ""]:
    """The sum of the losses of a batch, with the targets of :class:`DetectionExamples`.

    Losses of boxes and classes are means over regions, of which each image has as many (if it has enough); that of
    masks is a mean over the regions of objects, of which images have different numbers. So with ``micro_batch`` the
    former are those of the whole batch, and in the latter each part counts as much, as in ViTDet on one GPU for each.
    """
    sizes = [(int(height), int(width)) for height, width in (target["size"].tolist() for target in targets)]
    _, losses = model(images, sizes, targets)
    return torch.stack(list(losses.values())).sum()


@register_protocol(
    "detection",
    need="boxes",
    settings=DetectionConfig,
    by_default=False,
    priority=10,
)
def detection(features: Features, config: EvalConfig) -> Scores:
    """Object detection and instance segmentation with Mask R-CNN, fine-tuned; needs data in COCO format."""
    own: DetectionConfig = config.of("detection")
    need_extra()
    recipe = choose_recipe(features, config)
    encoder, classes = features.encoder, features.data.classes
    masks = _check_objects(features, own.masks)
    bf16 = own.precision == "bf16" or (own.precision == "auto" and has_bf16(features.device.type))
    with seeded(config.seed, features.device):
        copy = trainable_copy(encoder, recipe.drop_path)
        freeze_blocks(copy, own.frozen_blocks)
        copy.checkpointing = own.checkpointing
        model = Detector(copy, recipe, len(classes), masks).to(features.device)
        curve = train(
            model,
            optimizer_of(model, recipe, encoder),
            features,
            DetectionExamples(features.data.train.samples, recipe, masks, encoder.mean, encoder.std),
            partial(detection_loss, model),
            lambda step: warm_steps(
                step,
                recipe.steps,
                peak=recipe.learning_rate,
                num_warmup=recipe.num_warmup,
                milestones=MILESTONES,
            ),
            num_steps=recipe.steps,
            batch_size=recipe.batch_size,
            seed=config.seed,
            what="detection",
            bf16=bf16,
            micro_batch=own.micro_batch,
        )
        truth, found, shown = _evaluate_detector(model, features, recipe)
    metrics: dict[str, float] = {}
    per_class: dict[str, dict[str, float]] = {}
    kinds: dict[Literal["bbox", "segm"], str] = {"bbox": "", **({"segm": "mask_"} if masks else {})}
    for kind, prefix in kinds.items():
        scores, of_class = average_precision(truth, found, len(classes), kind)
        metrics |= {prefix + name: value for name, value in scores.items()}
        per_class |= {
            prefix + name: dict(zip(classes, values.tolist(), strict=True)) for name, values in of_class.items()
        }
    settings = {
        "preset": config.preset,
        "comparable": "small preset: not comparable with published numbers"
        if config.preset == "small"
        else "ViTDet's recipe for 12 epochs of COCO, without window attention and relative positions, with "
        "torchvision's components, unless changed",
        "trained": _what_is_trained(encoder, own.frozen_blocks),
        "masks": masks,
        "image_size": recipe.image_size,
        "resize": f"longer side to {recipe.image_size}, padded to a square",
        "steps": recipe.steps,
        "epochs": round(recipe.steps * recipe.batch_size / len(features.data.train), 2),
        "warmup_steps": recipe.num_warmup,
        "head_batch_size": recipe.batch_size,
        "micro_batch": own.micro_batch or recipe.batch_size,
        "learning_rate": recipe.learning_rate,
        "optimiser": f"AdamW, betas {BETAS}, weight decay {recipe.weight_decay} (none on vectors and positions), "
        f"lr / 10 at step {' and '.join(str(math.ceil(ratio * recipe.steps)) for ratio in MILESTONES)}",
        "layer_decay": recipe.layer_decay,
        "drop_path": recipe.drop_path,
        "final_norm": recipe.final_norm,
        "augmentation": f"scale {recipe.scale[0]:g}-{recipe.scale[1]:g}, crop, flip",
        "network": f"pyramid with {recipe.channels} channels at strides of {', '.join(f'{1 / s:g}' for s in SCALES)} "
        "patches; "
        f"{recipe.rpn_convs} convolution(s) for proposals, {recipe.box_convs} and {len(recipe.box_fc)} linear for "
        f"boxes{f', {recipe.mask_convs} for masks' if masks else ''}; {recipe.num_rois} regions per image",
        "precision": "bfloat16 in training" if bf16 else "float32",
        "least_score": LEAST_SCORE,
        "detections_per_image": MOST,
        "num_objects": sum(not item.is_crowd for image in truth for item in image.objects),
        "num_crowds": sum(item.is_crowd for image in truth for item in image.objects),
        "interval": "none: AP ranks the detections of all images together, so it isn't a sum over images",
        "reported": "last step",
    }
    return Scores(
        metrics,
        settings,
        per_class,
        units=dict.fromkeys(metrics, UNIT),
        charts={"loss": loss_chart(curve)},
        found=shown,
    )


def _what_is_trained(encoder: Encoder, frozen_blocks: int) -> str:
    if frozen_blocks:
        return f"a copy of the encoder from block {frozen_blocks + 1} of {encoder.depth}; the layers before are frozen"
    new = " (new, as it was trained without)" if encoder.position_free else ""
    return f"a copy of the whole encoder, including positions{new}"


@torch.no_grad()
def _evaluate_detector(
    model: Detector, features: Features, recipe: DetectionRecipe
) -> tuple[list[CocoImage], list[Detections], dict[int, tuple[Boxes, Boxes]]]:
    """True objects and detections of the readable test images, and both for the images in figures.

    Raises:
        DataError: if no image can be read.
    """
    images = features.data.test
    truth, found = list[CocoImage](), list[Detections]()
    shown: dict[int, tuple[Boxes, Boxes]] = {}
    waiting: list[tuple[int, Tensor, tuple[int, int]]] = []
    at_once = min(features.batch_size, recipe.batch_size)
    items = _PaddedImages(images, recipe.image_size, features.encoder)

    def flush() -> None:
        if not waiting:
            return
        pixels = torch.stack([image for _, image, _ in waiting]).to(features.device)
        results, _ = model(pixels, [size for _, _, size in waiting])
        for (place, _, size), result in zip(waiting, results, strict=True):
            image = annotated_image(images.samples[place])
            truth.append(image)
            found.append(_in_pixels(result, size, image))
            if place in features.shown:
                shown[place] = _shown_boxes(image, found[-1])
        waiting.clear()

    for place, item in enumerate(stream(items, len(images), features.num_workers)):
        if isinstance(item, Skipped):
            features.skipped[str(item.path)] = item.reason
        else:
            waiting.append((place, *item))
        if len(waiting) == at_once or place + 1 == len(images):
            flush()
        features.progress(f"detection: {features.evaluated}", place + 1, len(images))
    if not truth:
        raise DataError(f"{images.root}: none of the {len(images)} {features.evaluated} can be read")
    return truth, found, shown


def _in_pixels(result: dict[str, Tensor], size: tuple[int, int], image: CocoImage) -> Detections:
    """Detections in pixel coordinates of the original image.

    Args:
        result: detections of one image.
        size: ``(height, width)`` of the image in the input.
        image: holds its original size.
    """
    scale = torch.tensor([image.width / size[1], image.height / size[0]] * 2, device=result["boxes"].device)
    boxes = result["boxes"] * scale
    outlines = None
    if "masks" in result:
        pasted = paste_masks_in_image(result["masks"], boxes, (image.height, image.width))
        outlines = encode_masks((pasted[:, 0] > 0.5).cpu().numpy())
    return Detections(boxes.cpu().numpy(), result["labels"].cpu().numpy() - 1, result["scores"].cpu().numpy(), outlines)


def _shown_boxes(image: CocoImage, found: Detections) -> tuple[Boxes, Boxes]:
    """True and predicted boxes, relative to the image's width and height."""
    sides = np.array([image.width, image.height] * 2, np.float64)
    true_boxes = np.array([item.box for item in image.objects], np.float64).reshape(-1, 4)
    true = Boxes(
        true_boxes / sides,
        np.array([item.label for item in image.objects], np.int64),
        np.array([0.0 if item.is_crowd else 1.0 for item in image.objects]),
    )
    kept = found.scores >= SHOWN_SCORE
    return true, Boxes(found.boxes[kept] / sides, found.labels[kept], found.scores[kept].astype(np.float64))


def _check_objects(features: Features, masks: bool | None) -> bool:
    """Check before training that both splits have objects, and whether instance masks can be used.

    Args:
        features: the images.
        masks: the setting ``masks``.

    Returns:
        Whether instance masks are trained and evaluated.

    Raises:
        DataError: if a split has no objects, a file has another size than its annotations say, or masks were
            requested but are missing.
    """
    lacking: tuple[ImageSample, CocoObject] | None = None
    only_boxes = True
    for called, images in (("train images", features.data.train), (features.evaluated, features.data.test)):
        count = 0
        for sample in images.samples:
            image = annotated_image(sample)
            _check_size(sample, image)
            for item in image.objects:
                count += not item.is_crowd
                if not has_outline(item):
                    lacking = lacking or (sample, item)
                elif not item.is_crowd and not is_only_box(item):
                    only_boxes = False
        if not count:
            raise DataError(f"{images.root}: no object in the annotations of the {len(images)} {called}")
    if masks and (lacking is not None or only_boxes):
        which = "all outlines are the rectangles of their boxes"
        if lacking is not None:
            x0, y0, x1, y1 = lacking[1].box
            which = f"{lacking[0].path.name} has none for the object at x {x0:g}..{x1:g}, y {y0:g}..{y1:g}"
        raise DataError(
            f"{features.data.test.root}: eval.detection.masks=true needs an outline (segmentation) of each object; "
            f"{which}; leave it out to evaluate boxes only"
        )
    wanted = masks is not False and lacking is None and not only_boxes
    if wanted:
        for images in (features.data.train, features.data.test):
            for sample in images.samples:
                image = annotated_image(sample)
                for item in image.objects:
                    _outline_of(sample, item, image.height, image.width)  # report a damaged one before training
    return wanted


def _outline_of(sample: ImageSample, item: CocoObject, height: int, width: int) -> np.ndarray:
    """``(H, W)`` uint8 mask of an object; errors name the image."""
    try:
        return outline_mask(item, height, width)
    except DataError as error:
        raise DataError(f"{sample.path}: {error}") from None


def _check_size(sample: ImageSample, image: CocoImage) -> None:
    try:
        size = image_size(sample.path)
    except DataError:  # counted as unreadable later
        return
    if size != (image.height, image.width):
        raise DataError(
            f"{sample.path}: {size[1]}x{size[0]} pixels, but {image.width}x{image.height} in its annotations; "
            "boxes would be misplaced"
        )
