"""Masked-token machinery of iBOT, DINOv2 and Intertwined: which tokens are masked and compared, and their heads.

Letters: B images, G = 2 global views, M = G B global crops (view-major), V all views, N patches of a global crop, D
embed_dim, S tokens whose output is needed.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor, nn

from smalti.functional.random import fork_keys
from smalti.functional.transfer import move
from smalti.layers.gaussian_bias import Places
from smalti.layers.heads import PrototypeHead
from smalti.layers.last_block import Chosen, place_of
from smalti.methods.self_distillation import NUM_GLOBAL, SelfDistillationConfig
from smalti.models.encoder import Encoder

IMAGE, PATCH = "image", "patch"


class MaskedNetwork(nn.Module):
    """An encoder with a mask token, and heads on its image and patch tokens.

    Args:
        encoder: with a class token.
        config: sizes of the heads.
        heads: names of the heads, ``image`` first; tokens of other names use the ``image`` head.
    """

    def __init__(self, encoder: Encoder, config: SelfDistillationConfig, heads: tuple[str, ...]) -> None:
        super().__init__()
        self.encoder = encoder
        self.mask_token = nn.Parameter(torch.zeros(1, encoder.embed_dim))
        sizes = (encoder.embed_dim, config.hidden_dim, config.bottleneck_dim, config.num_prototypes)
        self.heads = nn.ModuleDict({name: PrototypeHead(*sizes, not config.norm_last_layer) for name in heads})

    def head_name(self, name: str) -> str:
        """The head for tokens of this name: its own, or the shared one."""
        return name if name in self.heads else IMAGE

    def head(self, name: str) -> PrototypeHead:
        """The head for tokens of this name."""
        head = self.heads[self.head_name(name)]
        assert isinstance(head, PrototypeHead)
        return head

    def embed(
        self, images: Num[Tensor, "V C H W"], masks: Mapping[str, Tensor], boxes: Float[Tensor, "V 4"] | None
    ) -> Float[Tensor, "V T D"]:
        """Input sequence of the blocks; masked patches are replaced before positions are added.

        Args:
            images: of views, not normalised.
            masks: ``(V, N)`` by name, True where a patch is masked; here ``patch``, or nothing.
            boxes: of the crops; unused here, see :meth:`smalti.methods.ibot.IBOT.view_boxes`.

        Source: Zhou et al., iBOT, arXiv:2111.07832v3, Sec. 3.1.
        """
        tokens, grid = self.encoder.embed_patches(self.encoder.normalize(images))
        if PATCH in masks:
            tokens = torch.where(masks[PATCH][..., None], self.mask_token.to(tokens.dtype), tokens)
        return self.encoder.assemble(tokens, self.encoder.positions(grid))

    def forward(
        self,
        images: Num[Tensor, "V C H W"],
        masks: Mapping[str, Tensor],
        boxes: Float[Tensor, "V 4"] | None,
        chosen: Chosen,
    ) -> Float[Tensor, "S D"]:
        """Output of the chosen tokens, for crops of one size."""
        grid = self.encoder.check_size(*images.shape[-2:])
        places = Places(grid, boxes=boxes if self.encoder.is_rotary else None)
        return self.encoder.forward_chosen(self.embed(images, masks, boxes), chosen, places)

    def project(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Bottleneck vectors of tokens by name; one call per head."""
        vectors: dict[str, Tensor] = {}
        for head in self.heads:
            names = [name for name in tokens if self.head_name(name) == head]
            joined = self.head(head).projection(torch.cat([tokens[name] for name in names]))
            vectors |= dict(zip(names, joined.split([len(tokens[name]) for name in names]), strict=True))
        return vectors

    def prototypes(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Prototype matrices by name, computed once per head."""
        matrices = {head: self.head(head).prototypes.matrix() for head in self.heads}
        return {name: matrices[self.head_name(name)] for name in names}


@dataclass(frozen=True)
class Reading:
    """Which output tokens of the global crops are needed, by name."""

    chosen: Chosen
    rows: dict[str, Tensor]
    """By name, indices into the chosen tokens; those of ``image`` are the class tokens of all crops."""

    @staticmethod
    def of(compared: Mapping[str, Bool[Tensor, "M N"]], num_prefix: int) -> "Reading":
        """Class tokens, and by name the marked patches."""
        num_crops, num_patches = next(iter(compared.values())).shape
        is_needed = torch.zeros(num_crops, num_prefix + num_patches, dtype=torch.bool)
        is_needed[:, 0] = True
        for mask in compared.values():
            is_needed[:, num_prefix:] |= mask
        chosen = Chosen.where(is_needed)
        place = place_of(chosen, is_needed.shape[1])
        return Reading(
            chosen, {IMAGE: place[:, 0], **{name: place[:, num_prefix:][mask] for name, mask in compared.items()}}
        )

    def to(self, device: torch.device) -> "Reading":
        """A copy on a device."""
        return Reading(self.chosen.to(device), {name: move(rows, device) for name, rows in self.rows.items()})

    def split(self, tokens: Float[Tensor, "S D"]) -> dict[str, Tensor]:
        """Chosen tokens by name."""
        return {name: tokens[rows] for name, rows in self.rows.items()}


@dataclass(frozen=True)
class MaskPlan:
    """Masks and compared tokens of a step, computed on the CPU so that all shapes are known to the GPU step."""

    masks: dict[str, Tensor]
    """``(M, N)`` by name, True where the student's input is masked."""
    student: Reading
    """Output tokens of the student's global crops that are needed."""
    teacher: Reading
    """Those of the teacher: the same, or all patches where its center averages all."""
    compared_rows: dict[str, Tensor]
    """By name, indices of the teacher's rows that are compared, where they aren't all."""
    weights: dict[str, Tensor]
    """By name, loss weights of the compared tokens."""


def crop_keys(keys: Int[Tensor, " B"]) -> Int[Tensor, " M"]:
    """A seed for each global crop of each image, view-major."""
    return torch.cat([fork_keys(keys, view) for view in range(NUM_GLOBAL)])


def token_weights(compared: Bool[Tensor, "M N"]) -> Float[Tensor, " S"]:
    """Weights of the marked tokens: a mean over those of a crop, then over all crops, also those without any."""
    weights = 1 / (len(compared) * compared.sum(1, keepdim=True).clamp(min=1))
    return weights.expand_as(compared)[compared]


def other_views(batch: int, num_views: int, device: torch.device) -> tuple[Int[Tensor, "VB 2"], Float[Tensor, " VB"]]:
    """The global views that each view is compared with, and its loss weight.

    Returns:
        ``(V B, 2)`` rows of the teacher's ``(2 B, ...)``: for a global view the other one twice, for a local one both;
        ``(V B,)`` weights whose weighted sum is the mean over all pairs of different views and over images.
    """
    one = torch.arange(batch, device=device)
    first, second = one, one + batch
    local = torch.stack([first, second], 1).repeat(num_views - NUM_GLOBAL, 1)
    sources = torch.cat([torch.stack([second, second], 1), torch.stack([first, first], 1), local])
    pairs = torch.full((num_views * batch,), 2.0, device=device)  # of each view
    pairs[: NUM_GLOBAL * batch] = 1.0
    return sources, pairs / (NUM_GLOBAL * (num_views - 1) * batch)
