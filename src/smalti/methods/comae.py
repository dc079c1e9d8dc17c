"""CoMAE: learns which other patches each patch depends on.

Paper: Guo et al., "The Collapse of Patches", 2025, arXiv:2511.22281v2; no code was released. Equation numbers are
those of the paper; where it is silent or contradicts itself, the choice is ours and marked.
Letters: B images, N tokens, d values per token, n a target, T targets per image and step, w_n in [0, 1]^N its
selection, A the dependency graph whose row n is w_n.
Differs from the paper: w = (1 + tanh z) / 2, as its tanh alone is not in [0, 1]; a lower bound of the contrast's
temperature, which otherwise diverges; T targets per step, as all N at its size would take a year; a budget on how much
is selected (``budget_weight``; 0 is the paper's), since nothing else prevents a target from selecting everything.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Num
from timm.layers import Mlp
from torch import Tensor, nn

from smalti.charts import LogColumn
from smalti.config import Depth, DepthFromZero, Few, NonNegative, NumHeads, Positive, Ratio, Width, settings
from smalti.data.crops import CentreCrop
from smalti.data.views import Views
from smalti.errors import ConfigError
from smalti.functional.graphs import descending, pagerank
from smalti.functional.orders import image_dependence
from smalti.functional.precision import at_least_float32
from smalti.functional.random import sample_normal, sample_uniform
from smalti.layers.cross_attention import CrossAttentionBlock
from smalti.layers.rotary_blocks import RotaryBlocks
from smalti.layers.tokens import TokenSource
from smalti.methods.base import Findings, MethodConfig, TokenMethod, register
from smalti.models.encoder import eval_mode

DEGENERATE, STATIC = 0.02, 0.9
"""Spread of scores below which a graph is degenerate, and fraction of the ranks' variance explained by position above
which the orders are the same for all images."""
_WARN_FROM = 0.25  # progress of training; before it every graph is nearly uniform
_TARGETS, _NOISE = 0, 1  # random streams of a sample


@settings
class CoMAEConfig(MethodConfig):
    """Settings of CoMAE: the values of the paper's main text where given, and the budget."""

    name: str = "comae"
    encoder_dim: Width = 64
    """Width of the selecting network; 256 in the paper's supplement, where graphs cost 11 times as much."""
    encoder_depth: Depth = 12
    """Blocks of the selecting network."""
    encoder_num_heads: NumHeads = 4
    """Attention heads of the selecting network; its width must be a multiple of four times the heads."""
    decoder_dim: Width = 256
    """Width of the reconstructing network; 64 in the supplement."""
    decoder_depth: DepthFromZero = 12
    """Blocks of the reconstructing network."""
    decoder_num_heads: NumHeads = 8
    """Attention heads of the reconstructing network."""
    readout: Literal["removed", "cross"] = "removed"
    """``removed``: one forward pass of both networks per target, with that token removed (the paper's); ``cross``: all
    targets in one pass, as queries that attend to all tokens but their own, while tokens don't attend to each other
    (ours, cheaper by the number of targets)."""
    activation: Literal["half", "relu", "abs"] = "half"
    """From z to w: ``(1 + tanh z) / 2``, ``tanh(max(z, 0))`` or ``|tanh z|``."""
    sigma: Positive = 0.3
    """sigma of the noise in Eq. (3); the paper gives no value."""
    num_targets: Few = 16
    """T: targets per image and step, at most N."""
    contrast_weight: NonNegative = 0.01
    """Weight of L_c in the loss; 0: none."""
    contrast_over: Literal["image", "batch"] = "image"
    """Selections that L_c separates: those of the same image, or of the whole batch."""
    temperature: Positive = 0.1
    """Temperature of L_c at the start; it is learned."""
    temperature_floor: Positive = 0.05
    """Lower bound of the temperature."""
    budget: Ratio = 0.15
    """kappa: mean selection above which the budget loss applies."""
    budget_ramp: tuple[Ratio, Ratio] = (0.0, 0.0)
    """Progress of training at which the budget starts to fall from 1, and at which it reaches ``budget``, so that the
    reconstructor learns before selections are priced; (0, 0): ``budget`` from the first step."""
    budget_weight: NonNegative = 0.25
    """lambda_b / d: weight of the budget loss, per value of a token; 0: none (the paper's)."""
    alternate: bool = True
    """Even steps update the selecting network, odd ones the reconstructing one; False: both at every step."""
    flip_prob: Ratio = 0.5
    """Probability of a horizontal flip, in 0..1."""
    num_diagnosed: Few = 16
    """Images of a batch whose graphs are computed when the log is written, N forward passes each; 0: none."""


def select_weights(logits: Float[Tensor, "*B"], activation: str) -> Float[Tensor, "*B"]:
    """w in [0, 1] from the selecting network's outputs, in float32."""
    squashed = at_least_float32(logits)
    if activation == "half":
        return torch.sigmoid(2 * squashed)  # (1 + tanh z) / 2
    return torch.tanh(squashed.clamp(min=0)) if activation == "relu" else torch.tanh(squashed).abs()


def signal_ratio(weights: Float[Tensor, "*B"], sigma: float) -> Float[Tensor, "*B"]:
    """alpha of Eq. (3): 1 where w = 1, ``exp(-1 / (2 sigma^2))`` where w = 0."""
    return torch.exp(-((1 - weights) ** 2) / (2 * sigma**2))


def corrupt(
    tokens: Float[Tensor, "*B d"], weights: Float[Tensor, "*B"], noise: Float[Tensor, "*B d"], sigma: float
) -> Float[Tensor, "*B d"]:
    """Eq. (3) and (4): mix each token with noise; less selected tokens get more.

    Args:
        tokens: tokens of unit mean variance.
        weights: w of each token.
        noise: standard normal noise.
        sigma: sigma of Eq. (3).
    """
    alpha = signal_ratio(weights, sigma)[..., None]
    return alpha * tokens + (1 - alpha) * noise


def contrast(weights: Float[Tensor, "G T N"], log_temperature: Float[Tensor, ""], floor: float) -> Float[Tensor, ""]:
    """L_c: cross-entropy of identifying each selection among those of its group by cosine similarity.

    Args:
        weights: selections, in groups.
        log_temperature: log temperature of the softmax over cosines.
        floor: lower bound of the temperature.
    """
    rows = F.normalize(at_least_float32(weights), dim=-1)
    with torch.autocast(rows.device.type, enabled=False):  # cosines are divided by a small temperature
        logits = rows @ rows.mT / log_temperature.exp().clamp(min=floor)
    return -logits.log_softmax(-1).diagonal(dim1=-2, dim2=-1).mean()


def budget_at(progress: float, config: CoMAEConfig) -> float:
    """kappa at some progress of training: 1, then falling linearly to ``budget``.

    Example:
        >>> config = CoMAEConfig(budget=0.2, budget_ramp=(0.4, 0.8))
        >>> tuple(round(budget_at(progress, config), 3) for progress in (0.4, 0.6, 0.8))
        (1.0, 0.6, 0.2)
    """
    start, end = config.budget_ramp
    fallen = 1.0 if progress >= end else max(0.0, progress - start) / (end - start)
    return 1 - (1 - config.budget) * fallen


def mask_entropy(weights: Float[Tensor, "*B N"]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Eq. (7), ``-sum_j w ln w``, as written; and ``exp`` of the entropy of w / sum w: how many tokens are selected.
    The paper's numbers fit the second. Means over selections."""
    raw = torch.special.entr(weights).sum(-1)
    shares = weights / weights.sum(-1, keepdim=True).clamp(min=1e-12)
    return raw.mean(), torch.special.entr(shares).sum(-1).exp().mean()


class Selection(NamedTuple):
    """Selections of a step."""

    targets: Tensor
    """``(B, T)`` raster indices of the targets."""
    weights: Tensor
    """``(B, T, N)`` w, 0 at the target itself."""


class Selector(nn.Module):
    """f of Eq. (2): from all tokens but the target, how much each of them is needed.

    ``removed``: rotary blocks process the other tokens and a class token that encodes the target's position.
    """

    def __init__(self, source: TokenSource, config: CoMAEConfig) -> None:
        super().__init__()
        dim, num = config.encoder_dim, source.num_tokens
        self.activation = config.activation
        self.embed = nn.Linear(source.token_dim, dim)
        self.cls_token = nn.Parameter(torch.empty(dim))
        self.targets = nn.Parameter(torch.empty(num, dim))
        self.blocks = RotaryBlocks(dim, config.encoder_depth, config.encoder_num_heads, source.grid)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num)
        _init(self)

    def forward(self, tokens: Float[Tensor, "B N d"], targets: Int[Tensor, "B T"]) -> Float[Tensor, "B T N"]:
        """Selections for some targets of each image."""
        others = _others(tokens.shape[1], tokens.device)[targets].flatten(0, 1)  # (B*T, N-1)
        embedded = _take(self.embed(tokens), others, targets.shape[1])
        first = (self.cls_token + self.targets[targets]).flatten(0, 1)[:, None]
        sequence = self.blocks(torch.cat([first, embedded], dim=1), others)
        logits = self.head(self.norm(sequence[:, 0])).view(*targets.shape, -1)
        return select_weights(logits, self.activation).scatter(-1, targets[..., None], 0.0)


class CrossSelector(nn.Module):
    """Variant of f in one pass: a query per target attends to all tokens but its own; tokens attend to nothing.

    As tokens are never mixed, no information about a target reaches its query indirectly.
    """

    def __init__(self, source: TokenSource, config: CoMAEConfig) -> None:
        super().__init__()
        dim, num = config.encoder_dim, source.num_tokens
        self.activation, self.num_heads = config.activation, config.encoder_num_heads
        self.embed = nn.Linear(source.token_dim, dim)
        self.places = nn.Parameter(torch.empty(num, dim))
        self.cls_token = nn.Parameter(torch.empty(dim))
        self.targets = nn.Parameter(torch.empty(num, dim))
        self.blocks = nn.ModuleList(CrossAttentionBlock(dim, self.num_heads) for _ in range(config.encoder_depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num)
        _init(self)

    def forward(self, tokens: Float[Tensor, "B N d"], targets: Int[Tensor, "B T"]) -> Float[Tensor, "B T N"]:
        """Selections for some targets of each image."""
        keys = self.embed(tokens) + self.places
        queries = self.cls_token + self.targets[targets]
        own = F.one_hot(targets, tokens.shape[1]).bool()
        for block in self.blocks:
            queries = block(queries, keys, hidden=own)
        return select_weights(self.head(self.norm(queries)), self.activation).scatter(-1, targets[..., None], 0.0)


class Reconstructor(nn.Module):
    """g of Eq. (5): reconstructs the target's token from the other, mostly noisy ones."""

    def __init__(self, source: TokenSource, config: CoMAEConfig) -> None:
        super().__init__()
        dim = config.decoder_dim
        self.embed = nn.Linear(source.token_dim, dim)
        self.tgt_token = nn.Parameter(torch.empty(dim))
        self.targets = nn.Parameter(torch.empty(source.num_tokens, dim))
        self.blocks = RotaryBlocks(dim, config.decoder_depth, config.decoder_num_heads, source.grid)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = reconstruction_head(dim, source.token_dim)
        _init(self)

    def forward(self, corrupted: Float[Tensor, "B T M d"], targets: Int[Tensor, "B T"]) -> Float[Tensor, "B T d"]:
        """The targets' tokens.

        Args:
            corrupted: ``(B, T, N-1, d)`` corrupted tokens without the target, in raster order.
            targets: raster indices of the targets.
        """
        others = _others(corrupted.shape[2] + 1, corrupted.device)[targets].flatten(0, 1)
        first = (self.tgt_token + self.targets[targets]).flatten(0, 1)[:, None]
        sequence = self.blocks(torch.cat([first, self.embed(corrupted.flatten(0, 1))], dim=1), others)
        return self.head(self.norm(sequence[:, 0])).view(*targets.shape, -1)


class MixedBlock(nn.Module):
    """Pre-norm block of queries, one per target, that attend to tokens which are corrupted differently for each target.

    Keys and values are linear in the corrupted token ``alpha_nj e_j + (1 - alpha_nj) eps_j``, so those of tokens and of
    noise are computed once and mixed in the logits and in the sum: N^2 numbers per head instead of N^2 tokens.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ConfigError(f"method.decoder_num_heads={num_heads}: must divide method.decoder_dim={dim}")
        self.num_heads = num_heads
        self.norm, self.mlp_norm = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.query, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim, bias=False)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(
        self,
        queries: Float[Tensor, "B T D"],
        parts: tuple[Float[Tensor, "B N D"], Float[Tensor, "B N D"], Float[Tensor, "N D"]],
        alpha: Float[Tensor, "B T N"],
        hidden: Bool[Tensor, "B T N"],
    ) -> Float[Tensor, "B T D"]:
        """The queries after the block.

        Args:
            queries: one per target.
            parts: embeddings of the tokens, of their noise, and of their positions, which are never corrupted.
            alpha: mixing weight of each token for each target, Eq. (3).
            hidden: True where a target must not look: at itself.
        """
        query = self._heads(self.query(self.norm(queries))) * (queries.shape[-1] // self.num_heads) ** -0.5
        token, noise, place = (tuple(map(self._heads, self.key_value(part).chunk(2, -1))) for part in parts)
        kept = alpha[:, None]  # the same for all heads
        logits = kept * (query @ token[0].mT) + (1 - kept) * (query @ noise[0].mT) + query @ place[0].mT
        weights = logits.masked_fill(hidden[:, None], -torch.inf).softmax(-1)
        read = (weights * kept) @ token[1] + (weights * (1 - kept)) @ noise[1] + weights @ place[1]
        queries = queries + self.out(read.transpose(1, 2).flatten(2))
        return queries + self.mlp(self.mlp_norm(queries))

    def _heads(self, x: Float[Tensor, "*B S D"]) -> Float[Tensor, "*B H S E"]:
        return x.view(*x.shape[:-1], self.num_heads, -1).transpose(-2, -3)


class CrossReconstructor(nn.Module):
    """Variant of g for all targets in one pass: a query per target attends to corrupted tokens, which are not mixed.

    A token's noise is the same for all targets of a pass: each target's loss has the same expectation as with noise of
    its own.
    """

    def __init__(self, source: TokenSource, config: CoMAEConfig) -> None:
        super().__init__()
        dim = config.decoder_dim
        self.embed = nn.Linear(source.token_dim, dim, bias=False)
        self.places = nn.Parameter(torch.empty(source.num_tokens, dim))
        self.tgt_token = nn.Parameter(torch.empty(dim))
        self.targets = nn.Parameter(torch.empty(source.num_tokens, dim))
        self.blocks = nn.ModuleList(MixedBlock(dim, config.decoder_num_heads) for _ in range(config.decoder_depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = reconstruction_head(dim, source.token_dim)
        _init(self)

    def forward(
        self,
        tokens: Float[Tensor, "B N d"],
        noise: Float[Tensor, "B N d"],
        alpha: Float[Tensor, "B T N"],
        targets: Int[Tensor, "B T"],
    ) -> Float[Tensor, "B T d"]:
        """The targets' tokens, from all others mixed with noise by ``alpha``."""
        parts = self.embed(tokens), self.embed(noise), self.places
        own = F.one_hot(targets, tokens.shape[1]).bool()
        queries = self.tgt_token + self.targets[targets]
        for block in self.blocks:
            queries = block(queries, parts, alpha, own)
        return self.head(self.norm(queries))


def reconstruction_head(dim: int, token_dim: int) -> nn.Sequential:
    """The "four-layer residual MLP", a norm, and a linear layer to the values of a token."""
    layers = (ResidualPerceptron(dim) for _ in range(4))
    return nn.Sequential(*layers, nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, token_dim))


class ResidualPerceptron(nn.Module):
    """One layer of the reconstructor's head: norm, linear, SiLU, linear, added to its input."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """The input plus its transform."""
        return x + self.inner(x)


@register("comae")
class CoMAE(TokenMethod):
    """Select tokens softly, add noise to the rest, reconstruct: the selections form a dependency graph."""

    Config = CoMAEConfig
    title = "learns which other patches each patch depends on; smalti rank orders patches by it"
    paper = "Guo et al. 2025, arXiv:2511.22281v2"
    next_command = "smalti rank {run} --data IMAGES --out ORDERS"
    log_columns: ClassVar[Mapping[str, LogColumn]] = {
        "temperature": LogColumn("Temperature", "Of the selector's sigmoid; a low one gives weights near 0 and 1."),
        "mean_weight": LogColumn("Mean weight", "Mean weight of a token in a selection; the budget lowers it."),
        "share_above_0.9": LogColumn("Weights above 0.9", "Fraction of tokens that are selected almost fully."),
        "share_below_0.1": LogColumn("Weights below 0.1", "Fraction of tokens that are almost ignored."),
        "mask_entropy_raw": LogColumn(
            "Mask entropy", "Eq. (7) of the paper, in nats; lower means a clearer selection."
        ),
        "mask_effective_count": LogColumn("Tokens selected", "Effective number of tokens selected for a target."),
        "row_cosine": LogColumn(
            "Similarity of selections", "Mean cosine of the selections for different targets; at 1 all are the same."
        ),
        "score_spread": LogColumn(
            "Spread of scores", "Range of PageRank scores relative to their mean; near 0 they define no order."
        ),
        "static_correlation": LogColumn(
            "Static correlation", "Correlation of an image's ranks with the mean ranks of others; at 1 all are alike."
        ),
        "position_variance_ratio": LogColumn(
            "Position variance ratio",
            "Fraction of the variance of ranks that position explains; chance is 1 / images, 1 is one order for all.",
        ),
    }
    defaults: ClassVar[dict[str, Any]] = {
        "optim": {
            "lr": 1e-4,
            "betas": [0.9, 0.95],
            "weight_decay": 0.05,
            "warmup_ratio": 0.02,
            "min_lr": 0.0,
            "clip_norm": None,
        },
    }

    def __init__(self, tokens: TokenSource, config: CoMAEConfig) -> None:
        super().__init__(tokens, config)
        _check(config, tokens)
        self.selector = (Selector if config.readout == "removed" else CrossSelector)(tokens, config)
        self.log_temperature = nn.Parameter(torch.tensor(config.temperature).log())
        self.reconstructor = (Reconstructor if config.readout == "removed" else CrossReconstructor)(tokens, config)
        self.register_buffer("steps_made", torch.zeros((), dtype=torch.int64))
        self.steps_made: Tensor
        self._steps_made = 0
        """The same on the CPU: reading the buffer in a step would wait for the device."""

    def make_views(self, image_size: int) -> CentreCrop:
        """The central square, flipped at random: orders of patches must apply to the same image later."""
        return CentreCrop(image_size, self.config.flip_prob)

    def forward(self, views: Views, progress: float) -> dict[str, Tensor]:
        """Loss terms ``reconstruction`` (L_r), ``contrast`` (L_c) and ``budget``, without those of weight 0."""
        config = self.config
        tokens = self.tokens.encode(views.global_crops, views.keys)
        selection = self.select(tokens, views.keys)
        losses = {"reconstruction": self.reconstruction(tokens, selection, views.keys)}
        rows = selection.weights
        if config.contrast_weight:
            grouped = rows if config.contrast_over == "image" else rows.flatten(0, 1)[None]
            contrasted = contrast(grouped, self.log_temperature, config.temperature_floor)
            losses["contrast"] = config.contrast_weight * contrasted
        if config.budget_weight:
            mean = rows.sum(-1) / (rows.shape[-1] - 1)
            weight = config.budget_weight * self.tokens.token_dim
            losses["budget"] = weight * (mean - budget_at(progress, config)).clamp(min=0).mean()
        self.observations = self._observe(selection)
        return losses

    def couplings(self) -> dict[str, bool]:
        """The contrast may be taken over the batch."""
        return {"contrast_over=batch": bool(self.config.contrast_weight) and self.config.contrast_over == "batch"}

    def select(self, tokens: Float[Tensor, "B N d"], keys: Int[Tensor, " B"]) -> Selection:
        """Selections for T targets per image, sampled without replacement."""
        num = tokens.shape[1]
        drawn = sample_uniform(keys, num, _TARGETS).argsort(dim=1, stable=True)
        targets = drawn[:, : min(self.config.num_targets, num)]
        return Selection(targets, self.selector(tokens, targets))

    def reconstruction(
        self, tokens: Float[Tensor, "B N d"], selection: Selection, keys: Int[Tensor, " B"]
    ) -> Float[Tensor, ""]:
        """L_r of Eq. (6): L1 between the targets' tokens and their reconstructions; sum over values, mean over targets
        and images."""
        targets, sigma = selection.targets, self.config.sigma
        if isinstance(self.reconstructor, CrossReconstructor):
            noise = sample_normal(keys, tokens[0].numel(), _NOISE).view_as(tokens)
            made = self.reconstructor(tokens, noise, signal_ratio(selection.weights, sigma), targets)
        else:
            num_targets, num = selection.weights.shape[1:]
            others = _others(num, tokens.device)[targets]
            around = _take(tokens, others.flatten(0, 1), num_targets).view(*others.shape, -1)  # (B, T, N-1, d)
            noise = sample_normal(keys, around[0].numel(), _NOISE).view_as(around)
            made = self.reconstructor(corrupt(around, selection.weights.gather(-1, others), noise, sigma), targets)
        truth = tokens.gather(1, targets[..., None].expand(-1, -1, tokens.shape[-1]))
        return (at_least_float32(made) - truth).abs().sum(-1).mean()

    @torch.no_grad()
    def dependency(self, images: Num[Tensor, "B C S S"], chunk: int | None = None) -> Float[Tensor, "B N N"]:
        """A: the selections of all targets, one forward pass each (one in all with ``cross``).

        Args:
            images: uint8, or float in 0..1, cropped as in training.
            chunk: targets per forward pass; does not change the result. None: as many as fit into 256 MiB.
        """
        tokens = self.tokens.encode(images)
        batch, num = tokens.shape[:2]
        if chunk is None:
            chunk = max(1, 2**26 // (max(1, batch) * num * self.config.encoder_dim * 16))
        every = torch.arange(num, device=tokens.device)
        with eval_mode(self.selector):
            rows = [self.selector(tokens, part[None].expand(batch, -1)) for part in torch.split(every, max(1, chunk))]
        return torch.cat(rows, dim=1)

    def diagnose(self, views: Views, progress: float) -> Findings:
        """Statistics of the graphs of a few images: ``score_spread`` (N times the range of PageRank), and
        ``static_correlation`` and ``position_variance_ratio`` of their orders (chance of the latter: 1 / images)."""
        images = views.global_crops[: self.config.num_diagnosed]
        if len(images) < 2 or self.tokens.num_tokens < 2:
            return Findings()
        scores = pagerank(self.dependency(images), method="solve")
        spread = float((scores.shape[-1] * (scores.amax(-1) - scores.amin(-1))).mean())
        numbers = {"score_spread": spread, **image_dependence(descending(scores))}
        warnings = {}
        if progress >= _WARN_FROM and spread < DEGENERATE:
            warnings["degenerate graph"] = (
                f"scores differ by only {spread:.3f} of their mean, so they define no order of patches"
            )
        elif progress >= _WARN_FROM and numbers["position_variance_ratio"] > STATIC:
            ratio = numbers["position_variance_ratio"]
            warnings["static order"] = (
                f"position alone explains {ratio:.2f} of the variance of ranks over {len(images)} images"
            )
        return Findings(numbers, warnings)

    def after_backward(self, progress: float) -> None:
        """Alternation (Sec. 3): even steps don't update the reconstructor, odd ones not the selector."""
        if not self.config.alternate:
            return
        selects = self._steps_made % 2 == 0
        idle = self.reconstructor.parameters() if selects else [*self.selector.parameters(), self.log_temperature]
        for parameter in idle:
            parameter.grad = None

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As for any module; the step count continues from the loaded one."""
        result = super().load_state_dict(*args, **kwargs)
        self._steps_made = int(self.steps_made)
        return result

    def after_step(self, progress: float) -> None:
        """Count the steps."""
        self.steps_made += 1
        self._steps_made += 1

    def param_groups(self) -> list[dict[str, Any]]:
        """As in :class:`~smalti.methods.base.Method`, without weight decay on embeddings of positions and targets."""
        plain_names = ("targets", "places")
        decayed, plain = list[nn.Parameter](), list[nn.Parameter]()
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                is_plain = parameter.ndim < 2 or name.rpartition(".")[-1] in plain_names
                (plain if is_plain else decayed).append(parameter)
        return [
            {"params": decayed, "lr_scale": 1.0, "weight_decay_scale": 1.0},
            {"params": plain, "lr_scale": 1.0, "weight_decay_scale": 0.0},
        ]

    @torch.no_grad()
    def _observe(self, selection: Selection) -> dict[str, Tensor]:
        rows = selection.weights.detach()
        off = torch.ones_like(rows, dtype=torch.bool).scatter(-1, selection.targets[..., None], False)
        count = rows.numel() * (rows.shape[-1] - 1) / rows.shape[-1]
        raw, effective = mask_entropy(rows)
        cosines = F.normalize(rows, dim=-1) @ F.normalize(rows, dim=-1).mT
        num = cosines.shape[-1]
        between = (cosines.sum((-1, -2)) - cosines.diagonal(dim1=-2, dim2=-1).sum(-1)).mean() / max(1, num * (num - 1))
        return {
            "temperature": self.log_temperature.detach().exp().clamp(min=self.config.temperature_floor),
            "mean_weight": rows.sum() / count,
            "share_above_0.9": ((rows > 0.9) & off).sum() / count,
            "share_below_0.1": ((rows < 0.1) & off).sum() / count,
            "mask_entropy_raw": raw,
            "mask_effective_count": effective,
            "row_cosine": between,
        }


def _others(num: int, device: torch.device) -> Int[Tensor, "N M"]:
    """``(N, N-1)``: row n has all raster indices but n, ascending."""
    below = torch.arange(num - 1, device=device)
    return below + (below >= torch.arange(num, device=device)[:, None]).long()


def _take(tokens: Float[Tensor, "B N D"], places: Int[Tensor, "S L"], repeats: int) -> Float[Tensor, "S L D"]:
    """Tokens at some indices, ``repeats`` rows of indices per image."""
    image = torch.arange(len(tokens), device=tokens.device).repeat_interleave(repeats)
    return tokens[image[:, None], places]


def _init(module: nn.Module) -> None:
    """Xavier uniform for linear layers, zero biases; tokens and tables normal 0.02."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    for name, parameter in module.named_parameters(recurse=False):
        nn.init.normal_(parameter, std=0.02)
        assert name in ("cls_token", "tgt_token", "targets", "places")


def _check(config: CoMAEConfig, tokens: TokenSource) -> None:
    if tokens.num_tokens < 2:
        raise ConfigError(f"comae needs at least 2 tokens per image, got {tokens.num_tokens}; lower tokens.patch_size")
    start, end = config.budget_ramp
    if start > end:
        raise ConfigError(f"method.budget_ramp={[start, end]}: the first number must not exceed the second")
    if config.num_targets < 1:
        raise ConfigError(f"method.num_targets={config.num_targets}: at least 1 is needed")
