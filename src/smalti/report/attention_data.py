"""Attention of every patch in every block and head, small enough for a page.

Letters: F images, L blocks, H heads, Q query cells (the class token, if any, then cells of patches), M key cells,
N = h*w patches.
"""

import base64
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from smalti.layers.attention import attention_modules
from smalti.models.block_attention import block_attention
from smalti.models.encoder import Encoder, eval_mode
from smalti.report.patch_pictures import to_input

ATTENTION_BYTES = 8 * 2**20
"""Maximum number of bytes of attention on a page, over all encoders."""
FEW_IMAGES = 3
"""Patches are merged to cells until at least so many images fit."""


@dataclass(frozen=True)
class AttentionPlan:
    """Which images have their attention on the page, and how finely."""

    images: tuple[int, ...]
    """Ascending."""
    query_step: int
    """Queries are cells of so many patches in each direction, of which the mean is taken."""
    key_step: int
    """Keys are cells, of which the sum is taken."""


def plan_attention(
    num_maps: int, grid: tuple[int, int], num_images: int, first: int, limit: int = ATTENTION_BYTES
) -> AttentionPlan:
    """The finest cells with which :data:`FEW_IMAGES` images fit, and all the images that then do.

    Args:
        num_maps: number of heads, over all blocks of all encoders.
        grid: ``(h, w)`` of every image.
        num_images: images on the page.
        first: the image that has its attention in any case.
        limit: bytes over all encoders.
    """
    for step in itertools.count():
        query_step, key_step = 1 + (step + 1) // 2, 1 + step // 2
        room = limit // (num_maps * (1 + _num_cells(grid, query_step)) * _num_cells(grid, key_step))
        if room >= min(FEW_IMAGES, num_images) or key_step >= max(grid):
            break
    count = max(1, min(room, num_images))
    others = [image for image in range(num_images) if image != first]
    chosen = {others[place * len(others) // (count - 1)] for place in range(count - 1)}
    return AttentionPlan(tuple(sorted({first, *chosen})), query_step, key_step)


def cells(grid: tuple[int, int], step: int) -> Int[Tensor, " N"]:
    """The cell of each patch: squares of ``step`` patches, smaller at the lower and right border."""
    rows, columns = torch.meshgrid(*(torch.arange(side) // step for side in grid), indexing="ij")
    return (rows * -(-grid[1] // step) + columns).flatten()


def merge_patches(
    attention: Float[Tensor, "heads Q N"], grid: tuple[int, int], plan: AttentionPlan
) -> Float[Tensor, "heads Q2 M"]:
    """Attention between cells: mean over the queries of a cell, sum over the keys of a cell.

    Args:
        attention: rows of the class token, if any, and of all patches.
        grid: ``(h, w)``.
        plan: sizes of cells.
    """
    num_prefix = attention.shape[1] - grid[0] * grid[1]
    queries, keys = (_membership(grid, step).to(attention) for step in (plan.query_step, plan.key_step))
    merged = attention @ keys
    of_cells = (queries / queries.sum(0)).T @ merged[:, num_prefix:]
    return torch.cat([merged[:, :num_prefix], of_cells], dim=1)


def quantise_rows(attention: Float[Tensor, "*B M"]) -> tuple[np.ndarray, np.ndarray]:
    """Weights as ``(code / 255) ** 2 * scale``: uint8 codes, and each row's largest weight as float32.

    The square root keeps small weights apart: the error is at most 1/255 of the geometric mean of weight and largest
    weight (and 1/255**2 of the latter).
    """
    scale = attention.amax(-1, keepdim=True).clamp(min=1e-30)
    codes = ((attention / scale).sqrt() * 255).round().to(torch.uint8)
    return codes.cpu().numpy(), scale[..., 0].float().cpu().numpy()


def attention_data(
    encoders: Mapping[str, Encoder], inputs: Sequence[np.ndarray], grid: tuple[int, int], first: int
) -> dict[str, Any]:
    """Data of the page's script; plain values.

    Args:
        encoders: name -> encoder.
        inputs: images as the encoders are given them, ``(H, W, C)``.
        grid: ``(h, w)``.
        first: image that is shown first.

    Raises:
        ConfigError: if the attention weights of an encoder can't be computed.
    """
    num_maps = sum(
        module.num_heads
        for encoder in encoders.values()
        for module in attention_modules(encoder.vit.blocks, encoder.name)
    )
    plan = plan_attention(num_maps, grid, len(inputs), first)
    return {
        "images": list(plan.images),
        "query_step": plan.query_step,
        "key_step": plan.key_step,
        "encoders": [_of_encoder(encoder, inputs, grid, plan) for encoder in encoders.values()],
    }


def _of_encoder(
    encoder: Encoder, inputs: Sequence[np.ndarray], grid: tuple[int, int], plan: AttentionPlan
) -> dict[str, Any]:
    device = next(encoder.parameters()).device
    codes, scales = [], []
    with eval_mode(encoder):
        for image in plan.images:
            pixels = encoder.normalize(to_input(inputs[image])[None].to(device))
            for block in block_attention(encoder, pixels):
                code, scale = quantise_rows(merge_patches(block, grid, plan))
                codes.append(code)
                scales.append(scale)
    return {
        "blocks": len(encoder.vit.blocks),
        "heads": len(codes[0]),
        "class_token": encoder.has_class_token,
        "codes": base64.b64encode(np.stack(codes).tobytes()).decode(),
        "scales": base64.b64encode(np.stack(scales).astype("<f4").tobytes()).decode(),
    }


def _membership(grid: tuple[int, int], step: int) -> Float[Tensor, "N M"]:
    return torch.nn.functional.one_hot(cells(grid, step), _num_cells(grid, step)).float()


def _num_cells(grid: tuple[int, int], step: int) -> int:
    return -(-grid[0] // step) * -(-grid[1] // step)
