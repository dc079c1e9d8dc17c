"""MAR: masked autoregressive image generation, with a small diffusion model per token.

Paper: Li et al., "Autoregressive image generation without vector quantization", 2024, arXiv:2406.11838v3; what it
leaves open follows its released code.
Letters: B images, N tokens, L visible and M masked ones, d values per token, D width, K classes.
Orders list tokens from the first generated to the last: in training the first L of an order are visible, in sampling
the first are generated first. (The released code reverses them: its orders start with the masked tokens.)
Differs from the paper: the fraction of masked tokens depends on the step, not on each process, so that the loss does
not depend on the number of processes; the decoder's tokens are in another order (visible, then masked), which attention
does not see; weights are averaged over the last tenth of a run, where momentum 0.9999 would be longer than that;
``head=mixture`` is ours.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from statistics import NormalDist
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from smalti.charts import LogColumn
from smalti.config import Count, Depth, DepthFromZero, Few, NumHeads, Positive, Ratio, RatioBelowOne, Width, settings
from smalti.data.crops import CentreCrop
from smalti.data.views import Views
from smalti.errors import ConfigError, ShapeError
from smalti.functional.orders import random_orders
from smalti.functional.random import fork_keys, place_keys, sample_uniform, step_key
from smalti.layers.diffusion_head import DiffusionHead
from smalti.layers.last_block import Chosen, block_at
from smalti.layers.mixture_head import MixtureHead
from smalti.layers.tokens import TokenSource
from smalti.methods.base import Method, MethodConfig, TokenMethod, register
from smalti.methods.teacher import Teacher

_LABELS, _NOISE, _LEVELS, _DRAWN = 1, 2, 3, 4  # branches of a sample's random seed
_RATIO_STREAM = 81
AVERAGED_RATIO, MAX_MOMENTUM = 0.1, 0.9999


@settings
class MARConfig(MethodConfig):
    """Settings of MAR; the paper's values for MAR-B."""

    name: str = "mar"
    num_classes: int | None = None
    """K; None: as many as the data has, 0: unconditional."""
    embed_dim: Width = 768
    """Width of encoder and decoder."""
    depth: Depth = 12
    """Blocks of the encoder."""
    decoder_depth: DepthFromZero = 12
    """Blocks of the decoder."""
    num_heads: NumHeads = 12
    """Attention heads of encoder and decoder."""
    buffer_size: int = 64
    """Class tokens in front of the image tokens."""
    dropout: RatioBelowOne = 0.1
    """Dropout of attention and of the blocks' outputs, in training."""
    head: Literal["diffusion", "mixture"] = "diffusion"
    """Distribution of a token: a diffusion model (the paper's), or a mixture of Gaussians, whose likelihood is exact
    (ours)."""
    head_depth: DepthFromZero = 6
    """Residual blocks of the head."""
    head_width: Width = 1024
    """Width of the head."""
    diffusion_steps: Count = 1000
    """Diffusion steps in training."""
    diffusion_repeats: Few = 4
    """Noise levels per token and training step."""
    clip: Positive | None = None
    """Largest absolute value of token estimates in sampling; None: no limit (the paper's). Short runs need one: at the
    noisiest step, the estimate amplifies errors of the head 20,000 times."""
    num_components: Few = 8
    """Components of the mixture."""
    min_std: float = 0.01
    """Smallest standard deviation of a component."""
    dequantization: Ratio = 0.0
    """Width of uniform noise added to pixels in 0..1. With the width of one grey level, the mixture's likelihood bounds
    that of discrete images; 0: none."""
    label_drop: RatioBelowOne = 0.1
    """Fraction of images trained without their class, for classifier-free guidance."""
    mask_ratio_min: RatioBelowOne = 0.7
    """Smallest fraction of masked tokens: a normal distribution around 1, truncated to between this and 1."""
    mask_ratio_std: Positive = 0.25
    """Standard deviation of that distribution."""
    ema_momentum: Ratio | None = None
    """Momentum of the averaged weights, which generate; None: 1 - 10 / steps, at most 0.9999."""
    flip_prob: Ratio = 0.5
    """Probability of a horizontal flip, in 0..1."""


@settings
class SamplerConfig:
    """Settings of image generation."""

    iterations: int | None = None
    """Autoregressive steps per image, 1..N; None: 256, or N where that is less."""
    cfg: float = 1.0
    """Scale of classifier-free guidance; 1: none, at half the cost."""
    cfg_schedule: Literal["linear", "constant"] = "linear"
    """``linear``: guidance increases from 1 with the number of generated tokens; ``constant``: the same throughout."""
    temperature: float | None = None
    """Factor on the noise in sampling; None: 1, and without guidance 0.95, as in the released code."""
    steps: int = 100
    """Diffusion steps per token, evenly spaced."""
    decoder: Literal["all", "needed"] = "all"
    """Tokens in the decoder: ``all``, as in training; ``needed``: of the masked ones only those generated in this step,
    which costs less but differs from training."""


def truncated_ratio(quantile: float, low: float, std: float) -> float:
    """Quantile of a normal distribution around 1, truncated to ``low..1``: the mask ratio of a step (Sec. 3.4).

    Args:
        quantile: 0..1.
        low: smallest ratio, below 1.
        std: standard deviation before truncation.
    """
    normal = NormalDist(1.0, std)
    floor = normal.cdf(low)
    return min(max(normal.inv_cdf(floor + quantile * (0.5 - floor)), low), 1.0) if quantile < 1 else 1.0


def drawn_per_step(num_tokens: int, iterations: int) -> list[int]:
    """Tokens that each sampling step generates, few first: ``N cos(pi/2 k/K)`` remain after k steps.

    Each step generates at least one, the last all that remain. Source: Chang et al., MaskGIT,
    arXiv:2202.04200v1, Sec. 3.3.

    Raises:
        ConfigError: for more steps than tokens, or none.
    """
    if not 1 <= iterations <= num_tokens:
        raise ConfigError(f"iterations={iterations}: images of {num_tokens} tokens need 1..{num_tokens} iterations")
    counts, left = [], num_tokens
    for step in range(1, iterations):
        kept = math.floor(num_tokens * math.cos(math.pi / 2 * step / iterations))
        # each later step needs a token of its own
        kept = max(1, min(kept, left - 1))
        counts.append(left - kept)
        left = kept
    return [*counts, left]


class MaskedAutoregressor(nn.Module):
    """An encoder of visible tokens, a decoder over all positions, and a head that models one token's distribution.

    Args:
        num_tokens: N.
        token_dim: d.
        config: of MAR.
    """

    def __init__(self, num_tokens: int, token_dim: int, config: MARConfig) -> None:
        super().__init__()
        width, slots = config.embed_dim, config.buffer_size
        self.num_tokens, self.num_slots = num_tokens, slots
        self.null_class = config.num_classes or 0
        norm_layer = partial(nn.LayerNorm, eps=1e-6)
        block = partial(
            Block,
            width,
            config.num_heads,
            qkv_bias=True,
            proj_drop=config.dropout,
            attn_drop=config.dropout,
            norm_layer=norm_layer,
        )
        self.classes = nn.Embedding(self.null_class + 1, width)  # the last means no class
        self.embed = nn.Linear(token_dim, width)
        self.encoder_positions = nn.Parameter(torch.empty(slots + num_tokens, width))
        self.encoder_start = norm_layer(width)
        self.encoder = nn.Sequential(*(block() for _ in range(config.depth)))
        self.encoder_norm = norm_layer(width)
        self.decoder_embed = nn.Linear(width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.decoder_positions = nn.Parameter(torch.empty(slots + num_tokens, width))
        self.decoder = nn.Sequential(*(block() for _ in range(config.decoder_depth)))
        self.decoder_norm = norm_layer(width)
        self.head_positions = nn.Parameter(torch.empty(num_tokens, width))
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        for table in (
            self.classes.weight,
            self.encoder_positions,
            self.mask_token,
            self.decoder_positions,
            self.head_positions,
        ):
            nn.init.normal_(table, std=0.02)
        self.head: DiffusionHead | MixtureHead
        if config.head == "diffusion":
            self.head = DiffusionHead(token_dim, width, config.head_width, config.head_depth, config.diffusion_steps)
        else:
            self.head = MixtureHead(
                token_dim, width, config.head_width, config.head_depth, config.num_components, config.min_std
            )

    def forward(
        self,
        visible: Float[Tensor, "B L d"],
        visible_ids: Int[Tensor, "B L"],
        hidden_ids: Int[Tensor, "B M"],
        classes: Int[Tensor, " B"],
        num_needed: int | None = None,
    ) -> Float[Tensor, "B Q D"]:
        """Conditions of the head for masked tokens: Sec. 3.4, "MAE-style".

        Args:
            visible: known tokens.
            visible_ids: their raster indices.
            hidden_ids: raster indices of mask tokens.
            classes: 0..K-1, or K for none.
            num_needed: Q: return only the first Q masked tokens; None: all. The others still take part, except in the
                output of the last block.
        """
        num_outputs = hidden_ids.shape[1] if num_needed is None else num_needed
        slots = self.classes(classes)[:, None].expand(-1, self.num_slots, -1)
        x = torch.cat([slots, self.embed(visible)], dim=1) + self._at(self.encoder_positions, visible_ids)
        x = self.encoder_norm(self.encoder(self.encoder_start(x)))

        masks = self.mask_token.to(x.dtype).expand(*hidden_ids.shape, -1)
        places = torch.cat([visible_ids, hidden_ids], dim=1)
        x = torch.cat([self.decoder_embed(x), masks], dim=1) + self._at(self.decoder_positions, places)
        first = x.shape[1] - hidden_ids.shape[1]
        *blocks, last = self.decoder
        for block in blocks:
            x = block(x)
        if num_outputs < hidden_ids.shape[1]:
            ids = torch.arange(first, first + num_outputs, device=x.device).expand(len(x), -1)
            chosen = Chosen(ids, torch.arange(ids.numel(), device=x.device))
            x = block_at(last, x, chosen).view(len(x), num_outputs, -1)
        else:
            x = last(x)[:, first:]
        return self.decoder_norm(x) + self.head_positions[hidden_ids[:, :num_outputs]]

    def _at(self, table: Tensor, ids: Tensor) -> Tensor:
        """Positional embeddings of class and image tokens: ``(B, slots + n, D)``."""
        slots = table[: self.num_slots].expand(len(ids), -1, -1)
        return torch.cat([slots, table[self.num_slots + ids]], dim=1)


@register("mar")
class MAR(TokenMethod):
    """Mask most tokens, encode the rest, and learn the distribution of each masked one."""

    Config = MARConfig
    title = "masked autoregressive image generation with a diffusion loss per token"
    paper = "Li et al. 2024, arXiv:2406.11838v3"
    next_command = "smalti generate {run} num=64 --out SAMPLES"
    takes_labels: ClassVar[bool] = True
    log_columns: ClassVar[Mapping[str, LogColumn]] = {
        "hidden_ratio": LogColumn("Hidden tokens", "Fraction of the tokens of an image that are predicted in a step."),
    }
    defaults: ClassVar[dict[str, Any]] = {
        "optim": {
            "base_lr": 1e-4,
            "betas": [0.9, 0.95],
            "weight_decay": 0.02,
            "warmup_ratio": 0.25,
            "after_warmup": "constant",
            "clip_norm": 3.0,
        }
    }

    def __init__(self, tokens: TokenSource, config: MARConfig) -> None:
        super().__init__(tokens, config)
        _check(config)
        self.network = MaskedAutoregressor(tokens.num_tokens, tokens.token_dim, config)
        self.average = Teacher(self.network)
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        self.num_updates: Tensor
        self._num_updates = 0
        """Copy on the CPU: reading the buffer in a step would wait for the device."""
        self._steps: int | None = None

    @property
    def num_classes(self) -> int:
        """K; 0 for unconditional models."""
        return self.network.null_class

    def make_views(self, image_size: int) -> CentreCrop:
        """The central square, flipped at random."""
        return CentreCrop(image_size, self.config.flip_prob)

    def forward(self, views: Views, progress: float) -> dict[str, Tensor]:
        """Loss terms ``noise`` and ``bound``, or ``likelihood`` of a mixture; over masked tokens."""
        tokens = self.encode(views.global_crops, views.keys)
        _batch, num_tokens = tokens.shape[:2]
        num_hidden = min(max(math.ceil(self.mask_ratio(progress) * num_tokens), 1), num_tokens)
        orders = self.orders(views)
        visible, hidden = orders[:, : num_tokens - num_hidden], orders[:, num_tokens - num_hidden :]
        condition = self.network(_pick(tokens, visible), visible, hidden, self.class_conditions(views))
        keys = place_keys(fork_keys(views.keys, _NOISE), num_tokens).gather(1, hidden)
        losses = self.network.head(
            _pick(tokens, hidden).flatten(0, 1), condition.flatten(0, 1), keys.flatten(), self.config.diffusion_repeats
        )
        self.observations = {"hidden_ratio": tokens.new_full((), num_hidden / num_tokens)}
        return {name: loss.mean() for name, loss in losses.items()}

    def orders(self, views: Views) -> Int[Tensor, "B N"]:
        """The order of each image's tokens: random, new in each epoch."""
        return random_orders(views.keys, self.tokens.num_tokens)

    def mask_ratio(self, progress: float) -> float:
        """Fraction of masked tokens in a step; the same for the whole batch."""
        return truncated_ratio(step_uniform(progress), self.config.mask_ratio_min, self.config.mask_ratio_std)

    def class_conditions(self, views: Views) -> Int[Tensor, " B"]:
        """Class condition of each image in training: its own, or none; in eval mode always its own."""
        null = torch.full_like(views.keys, self.num_classes)
        if views.labels is None or not self.num_classes:
            return null
        if not self.training:
            return views.labels
        is_dropped = sample_uniform(fork_keys(views.keys, _LABELS), 1)[:, 0] < self.config.label_drop
        return torch.where(is_dropped, null, views.labels)

    def encode(self, images: Tensor, keys: Int[Tensor, " B"]) -> Float[Tensor, "B N d"]:
        """Tokens of uint8 images, or float in 0..1, with ``dequantization``."""
        width = self.config.dequantization
        if width:
            levels = sample_uniform(fork_keys(keys, _LEVELS), images[0].numel()).view(images.shape)
            images = (images.float() / 255 if images.dtype == torch.uint8 else images) + width * (levels - 0.5)
        return self.tokens.encode(images, keys)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As for any module; the step count continues from the loaded one."""
        result = super().load_state_dict(*args, **kwargs)
        self._num_updates = int(self.num_updates)
        return result

    def after_step(self, progress: float) -> None:
        """Update the averaged weights."""
        self.average.update(self.network, self.momentum(progress))
        self.num_updates += 1
        self._num_updates += 1

    def momentum(self, progress: float) -> float:
        """Momentum of the averaged weights: 1 - 10 / steps, at most 0.9999. The number of steps is computed from
        ``progress`` and the steps so far. The first step's weights replace the initial ones."""
        if self.config.ema_momentum is not None:
            return self.config.ema_momentum
        if self._steps is None:
            made = self._num_updates
            if not made or not progress:
                return 0.0
            self._steps = round(made / progress)
        return min(max(1 - 1 / (AVERAGED_RATIO * max(self._steps, 1)), 0.0), MAX_MOMENTUM)

    def param_groups(self) -> list[dict[str, Any]]:
        """As in :class:`~smalti.methods.base.Method`, without weight decay on the head."""
        decayed, plain = super().param_groups()
        of_head = {id(parameter) for parameter in self.network.head.parameters()}
        spared = [parameter for parameter in decayed["params"] if id(parameter) in of_head]
        decayed["params"] = [parameter for parameter in decayed["params"] if id(parameter) not in of_head]
        plain["params"] = [*plain["params"], *spared]
        return [decayed, plain]

    def start_from(self, other: Method) -> None:
        """Start from the averaged weights of another run, and restart the average."""
        super().start_from(other)
        self.network.load_state_dict(self.average.module.state_dict())
        self.num_updates.zero_()
        self._num_updates = 0

    @torch.no_grad()
    def draw(
        self,
        orders: Int[Tensor, "B N"],
        keys: Int[Tensor, " B"],
        classes: Int[Tensor, " B"] | None = None,
        sampler: SamplerConfig = SamplerConfig(),
        watch: Callable[[int, Float[Tensor, "B N d"]], None] | None = None,
    ) -> Float[Tensor, "B N d"]:
        """Generate images as tokens, with the averaged weights: Sec. 3.4 and App. B.

        Args:
            orders: generation order of each image's tokens.
            keys: ``(B,)`` seeds of the images: a token depends only on them, the class and the tokens before it, not on
                the batch.
            classes: 0..K-1 or K for none; None: none.
            sampler: settings.
            watch: called after each step with the number of generated tokens, and the tokens (0 where not generated).

        Raises:
            ConfigError: for more iterations than tokens, guidance without classes or diffusion, or too many diffusion
                steps.
            ShapeError: for orders of another number of tokens.
        """
        network, num_tokens = self.average.module, self.tokens.num_tokens
        counts = self.plan(sampler)
        _check_orders(orders, num_tokens)
        batch = len(orders)
        null = torch.full((batch,), self.num_classes, dtype=torch.int64, device=orders.device)
        classes = null if classes is None else classes
        tokens = torch.zeros(batch, num_tokens, self.tokens.token_dim, device=orders.device)
        places = place_keys(fork_keys(keys, _DRAWN), num_tokens)
        drawn = 0
        for count in counts:
            visible, hidden = orders[:, :drawn], orders[:, drawn:]
            new = hidden[:, :count]
            masks = hidden if sampler.decoder == "all" else new
            drawn += count
            known, guidance = _pick(tokens, visible), self.guidance(sampler, drawn)
            condition: Tensor
            without: Tensor | None = None
            if sampler.cfg == 1:
                condition = network(known, visible, masks, classes, count)
            else:  # with and without the class, as one batch
                twice = (torch.cat([part, part]) for part in (known, visible, masks))
                condition, without = network(*twice, torch.cat([classes, null]), count).flatten(0, 1).chunk(2)
            values = network.head.sample(
                condition.reshape(batch * count, -1),
                places.gather(1, new).flatten(),
                num_steps=sampler.steps,
                temperature=temperature(sampler),
                null_condition=without,
                guidance=guidance,
                clip=self.config.clip,
            )
            tokens.scatter_(1, _wide(new, tokens), values.view(batch, count, -1).to(tokens))
            if watch is not None:
                watch(drawn, tokens)
        return tokens

    def plan(self, sampler: SamplerConfig) -> list[int]:
        """Number of tokens that each step generates; checks all sampler settings.

        Raises:
            ConfigError: as :meth:`draw`.
        """
        num_tokens = self.tokens.num_tokens
        counts = drawn_per_step(num_tokens, min(num_tokens, 256) if sampler.iterations is None else sampler.iterations)
        if sampler.cfg != 1 and not self.num_classes:
            raise ConfigError(f"cfg={sampler.cfg:g}: guidance needs classes, but this run was trained without")
        if sampler.cfg != 1 and not self.network.head.takes_guidance:
            raise ConfigError(f"cfg={sampler.cfg:g}: guidance needs method.head=diffusion; a mixture predicts no noise")
        for name, value in (("cfg", sampler.cfg), ("temperature", temperature(sampler))):
            if not 0 <= value < math.inf:  # also false for NaN
                raise ConfigError(f"{name}={value:g}: a finite number of at least 0 is needed")
        if self.network.head.takes_guidance and not 2 <= sampler.steps <= self.config.diffusion_steps:
            raise ConfigError(f"steps={sampler.steps}: the diffusion has 2..{self.config.diffusion_steps} steps")
        return counts

    def guidance(self, sampler: SamplerConfig, drawn: int) -> float:
        """Guidance scale in a step after which ``drawn`` tokens are generated; in the last step as if one were left."""
        if sampler.cfg_schedule == "constant":
            return sampler.cfg
        num_tokens = self.tokens.num_tokens
        return 1 + (sampler.cfg - 1) * min(drawn, num_tokens - 1) / num_tokens

    @torch.no_grad()
    def log_likelihood(
        self,
        tokens: Float[Tensor, "B N d"],
        orders: Int[Tensor, "B N"],
        classes: Int[Tensor, " B"] | None = None,
        iterations: int | None = None,
    ) -> Float[Tensor, "B N"]:
        """Exact log density of tokens, each given those before it in an order, with the averaged weights.

        Args:
            tokens: of images.
            orders: the order of each image; the model's density depends on the order.
            classes: 0..K-1 or K for none; None: none.
            iterations: steps, with tokens of a step independent of each other; None: one token per step.

        Returns:
            In nats, by raster index; the sum over tokens is the image's.

        Raises:
            ConfigError: without a mixture head, or for more iterations than tokens.
            ShapeError: for orders of another number of tokens.
        """
        network, num_tokens = self.average.module, self.tokens.num_tokens
        if not isinstance(network.head, MixtureHead):
            raise ConfigError("an exact likelihood needs a run with method.head=mixture")
        _check_orders(orders, num_tokens)
        null = torch.full((len(orders),), self.num_classes, dtype=torch.int64, device=orders.device)
        result, seen = torch.zeros(tokens.shape[:2], device=tokens.device), 0
        for count in drawn_per_step(num_tokens, num_tokens if iterations is None else iterations):
            visible, hidden = orders[:, :seen], orders[:, seen:]
            new = hidden[:, :count]
            condition = network(_pick(tokens, visible), visible, hidden, null if classes is None else classes, count)
            found = network.head.log_likelihood(_pick(tokens, new).flatten(0, 1), condition.flatten(0, 1))
            result.scatter_(1, new, found.view(len(tokens), count).to(result))
            seen += count
        return result


def temperature(sampler: SamplerConfig) -> float:
    """The sampler's temperature; by default 1 with guidance, 0.95 without."""
    if sampler.temperature is not None:
        return sampler.temperature
    return 0.95 if sampler.cfg == 1 else 1.0


def step_uniform(progress: float) -> float:
    """A random number in [0, 1) for a step, the same in all processes."""
    return float(sample_uniform(step_key(progress), 1, _RATIO_STREAM))


def _pick(x: Tensor, ids: Tensor) -> Tensor:
    """Gather tokens: ``(B, N, d)``, ``(B, n)`` -> ``(B, n, d)``."""
    return x.gather(1, _wide(ids, x))


def _wide(ids: Tensor, like: Tensor) -> Tensor:
    return ids[..., None].expand(-1, -1, like.shape[-1])


def _check_orders(orders: Tensor, num_tokens: int) -> None:
    if orders.shape[1] != num_tokens:
        raise ShapeError(f"orders have {orders.shape[1]} tokens, but this run's images have {num_tokens}")


def _check(config: MARConfig) -> None:
    for name in ("embed_dim", "depth", "decoder_depth", "num_heads", "buffer_size", "diffusion_repeats"):
        if getattr(config, name) < 1:
            raise ConfigError(f"method.{name}={getattr(config, name)}: at least 1 is needed")
    if config.embed_dim % config.num_heads:
        raise ConfigError(f"method.embed_dim={config.embed_dim}: must be a multiple of num_heads={config.num_heads}")
    if config.num_classes is not None and config.num_classes < 0:
        raise ConfigError(f"method.num_classes={config.num_classes}: a number of at least 0 is needed")
