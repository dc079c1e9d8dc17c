"""A maker of dependency graphs that is no CoMAE."""

import torch
from torch import Tensor

from smalti.layers.tokens import PatchTokenSource


class Bright:
    """Patches lean on others by how bright these are."""

    def __init__(self, size: int = 32, patch: int = 8) -> None:
        self.tokens = PatchTokenSource(size, 3, patch)
        self.chunks: list[int | None] = []

    def dependency(self, images: Tensor, chunk: int | None = None) -> Tensor:
        """Mean brightness of patch j, for each n."""
        self.chunks.append(chunk)
        side = self.tokens.image_size // self.tokens.grid[0]
        values = images.float() / 255 if images.dtype == torch.uint8 else images
        light = torch.nn.functional.avg_pool2d(values.mean(1, keepdim=True), side).flatten(1)
        graph = light[:, None].repeat(1, light.shape[1], 1)
        return graph * (1 - torch.eye(light.shape[1]))
