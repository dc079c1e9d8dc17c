"""Stochastic depth in which a block computes only the samples that it keeps.

Source: Huang et al., arXiv:1603.09382v3; Oquab et al., DINOv2, arXiv:2304.07193v2, Sec. 5
("Efficient stochastic depth").
Letters: B samples of a forward pass, K of them kept, S samples of the same pass in the whole optimiser step, p the drop
rate.
Differs from DINOv2's code: the subset is drawn from the whole step, so it depends neither on micro-batches nor on the
number of devices; the number of kept samples is S (1 - p), rounded at random, and the factor 1 / (1 - p), so that each
sample is kept with probability 1 - p exactly, at any batch size.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from timm.models.eva import EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock
from torch import Tensor, nn

from smalti.functional.random import sample_uniform
from smalti.functional.transfer import move


@dataclass
class StepPart:
    """The images of a forward pass within those of the optimiser step; a new one for each micro-batch."""

    key: int
    """Random key of the step, the same in all its parts."""
    total: int
    """Images of the step, over all processes and micro-batches."""
    first: int
    """Number of this part's first image, in 0..total-1."""
    count: int
    """Images of this part."""
    draws: dict[int, int] = field(default_factory=dict)
    """Number of draws so far of each branch: a method may run its encoder several times in a step."""


_PART: ContextVar[StepPart | None] = ContextVar("part", default=None)


@contextlib.contextmanager
def part_of_step(part: StepPart | None) -> Iterator[None]:
    """Within the block, stochastic depth draws from the whole step; with None, from each batch that it sees."""
    token = _PART.set(part)
    try:
        yield
    finally:
        _PART.reset(token)


class Kept(NamedTuple):
    """The samples for which a branch is computed."""

    ids: Tensor
    """``(K,)`` int64 places in the batch, ascending; at least one."""
    scale: float
    """Factor on the branch: 1 / (1 - p). 0 if no sample is kept: one is computed for nothing, so that every parameter
    has a gradient, as several processes need."""


class StochasticDepth(nn.Module):
    """Drops a branch of a block for a part of the samples, in training mode only.

    As a module it multiplies an output that was computed for all samples; :func:`run_kept` computes the kept ones only.

    Args:
        drop_prob: p, in [0, 1).
        number: of the branch in the encoder; branches draw independently.
    """

    def __init__(self, drop_prob: float, number: int) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.number = number

    def draw(self, batch: int, device: torch.device) -> Kept:
        """The samples to keep of a batch.

        Rows of the batch are numbered view by view: all images of the part, once for each view. A batch of another form
        (not a multiple of the part's images) is drawn from by itself, as all batches are outside of a step.

        Args:
            batch: B.
            device: of the indices.
        """
        part = _PART.get()
        if part is None or batch % part.count:
            key = int(torch.randint(2**62, ()))
            part = StepPart(key, batch, 0, batch)
        views = batch // part.count
        turn = part.draws[self.number] = part.draws.get(self.number, -1) + 1
        is_kept = choose_kept(part.key, views * part.total, self.drop_prob, (turn << 20) + self.number)
        own = is_kept.view(views, part.total)[:, part.first : part.first + part.count].flatten()
        ids = own.nonzero()[:, 0]
        if not len(ids):
            return Kept(torch.zeros(1, dtype=torch.int64, device=device), 0.0)
        return Kept(move(ids, device), 1 / (1 - self.drop_prob))

    def forward(self, x: Float[Tensor, "B *S"]) -> Float[Tensor, "B *S"]:
        """The branch's output, times 1 / (1 - p) or 0 for each sample."""
        if not self.training:
            return x
        kept = self.draw(len(x), x.device)
        factors = x.new_zeros(len(x)).index_fill(0, kept.ids, kept.scale)
        return x * factors.view(-1, *(1 for _ in x.shape[1:]))


def choose_kept(key: int, count: int, drop_prob: float, stream: int) -> Tensor:
    """``(S,)`` bool on the CPU: which samples of a step a branch keeps, a random subset of fixed size up to rounding.

    Args:
        key: of the step.
        count: S.
        drop_prob: p.
        stream: separates branches and forward passes.
    """
    numbers = sample_uniform(torch.tensor([key], dtype=torch.int64), count + 1, stream)[0]
    wanted = int(count * (1 - drop_prob) + float(numbers[-1]))  # rounded up with the probability of its fraction
    is_kept = torch.zeros(count, dtype=torch.bool)
    is_kept[numbers[:-1].argsort(stable=True)[:wanted]] = True
    return is_kept


def set_rates(blocks: nn.Module, rate: float) -> None:
    """Give blocks stochastic depth whose rate grows linearly from 0 in the first to ``rate`` in the last.

    Args:
        blocks: those of a timm model; drop rates that timm gave them are removed.
        rate: in [0, 1); 0: none.

    Source: Huang et al., arXiv:1603.09382v3, Sec. 3 (linear decay rule).
    """
    parts: list[Any] = list(blocks.children())
    for number, block in enumerate(parts):
        share = rate * number / max(len(parts) - 1, 1)
        for module in block.modules():
            if hasattr(module, "drop_path"):
                module.drop_path = nn.Identity()
        block.drop_path1, block.drop_path2 = (
            StochasticDepth(share, 2 * number + branch) if share else nn.Identity() for branch in (0, 1)
        )


def draw_kept(block: nn.Module, x: Float[Tensor, "B T D"]) -> tuple[Kept, Kept] | None:
    """The samples to compute in each of the two branches of a block; None: all, without stochastic depth.

    Args:
        block: after :func:`set_rates`.
        x: its input.
    """
    first, second = getattr(block, "drop_path1", None), getattr(block, "drop_path2", None)
    if not (isinstance(first, StochasticDepth) and isinstance(second, StochasticDepth) and block.training):
        return None
    return first.draw(len(x), x.device), second.draw(len(x), x.device)  # len() would fix B in an exported graph


def run_kept(
    block: nn.Module,
    x: Float[Tensor, "B T D"],
    kept: tuple[Kept, Kept],
    mask_of: Callable[[Tensor, Tensor], Tensor | None],
    rope: Tensor | None = None,
) -> Float[Tensor, "B T D"]:
    """A block whose branches are computed for the kept samples only; equal to multiplying whole branches.

    Blocks other than timm's plain one, the one with norms after its branches, and those of ``Eva`` are dropped as a
    whole, by the first draw.

    Args:
        block: of a timm model.
        x: its input.
        kept: from :func:`draw_kept`.
        mask_of: ``mask_of(samples, ids)``: attention mask of the chosen samples, or None.
        rope: rotary positions, for blocks that take them; with four axes, the first is that of the samples.
    """
    kind = type(block)

    def options(samples: Tensor, ids: Tensor) -> dict[str, Any]:
        mask = mask_of(samples, ids)
        own = rope[ids] if rope is not None and rope.ndim == 4 else rope
        return {**({} if mask is None else {"attn_mask": mask}), **({} if own is None else {"rope": own})}

    if kind in (Block, ResPostBlock, EvaBlock, EvaBlockPostNorm):
        x = _add(x, kept[0], lambda samples, ids: _attend(block, samples, options(samples, ids)))
        return _add(x, kept[1], lambda samples, _: _transform(block, samples))
    return _add(x, kept[0], lambda samples, ids: block(samples, **options(samples, ids)) - samples)


def _add(
    x: Float[Tensor, "B T D"],
    kept: Kept,
    branch: Callable[[Float[Tensor, "K T D"], Int[Tensor, " K"]], Float[Tensor, "K T D"]],
) -> Float[Tensor, "B T D"]:
    """Add a branch, computed for the kept samples, to these."""
    out = branch(x if len(kept.ids) == len(x) else x.index_select(0, kept.ids), kept.ids)
    return x.index_add(0, kept.ids, out.to(x.dtype), alpha=kept.scale)


def _attend(block: Any, x: Float[Tensor, "K T D"], options: dict[str, Any]) -> Float[Tensor, "K T D"]:
    """Output of a block's attention branch."""
    kind = type(block)
    if kind in (ResPostBlock, EvaBlockPostNorm):
        return block.norm1(block.attn(x, **options))
    out = block.attn(block.norm1(x), **options)
    if kind is Block:
        return block.ls1(out)
    return out if block.gamma_1 is None else block.gamma_1 * out


def _transform(block: Any, x: Float[Tensor, "K T D"]) -> Float[Tensor, "K T D"]:
    """Output of a block's MLP branch."""
    kind = type(block)
    if kind in (ResPostBlock, EvaBlockPostNorm):
        return block.norm2(block.mlp(x))
    out = block.mlp(block.norm2(x))
    if kind is Block:
        return block.ls2(out)
    return out if block.gamma_2 is None else block.gamma_2 * out
