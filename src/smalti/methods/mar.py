"""MAR: images drawn token by token, in any order, each token by a small diffusion model.

Paper: Li et al., "Autoregressive image generation without vector quantization", 2024, arXiv:2406.11838v3; what it
leaves open is as in its released code.
Letters: B images, N tokens, L visible and M hidden ones, d values a token, D width, K classes.
Orders list tokens from the first drawn to the last: in training the first L of an order are visible, in sampling the
first are drawn first. (Released code lists them the other way round: its orders begin with what is hidden.)
Differs from the paper: the share of hidden tokens is a function of the step, not of a process's own draws, so that the
loss doesn't depend on how many processes there are; the decoder reads its tokens in another sequence (visible, then
hidden), which attention doesn't see; weights are averaged over the last tenth of a run, where 0.9999 would be longer
than that; ``head=mixture`` is ours.
"""

import math
from collections.abc import Callable
from functools import partial
from statistics import NormalDist
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from smalti.config import Count, Depth, DepthFromZero, Few, NumHeads, Width, settings
from smalti.data.views import CentreCrop, Views
from smalti.errors import ConfigError, ShapeError
from smalti.functional.orders import random_orders
from smalti.functional.random import fork_keys, place_keys, sample_uniform, step_key
from smalti.layers.diffusion_head import DiffusionHead
from smalti.layers.last_block import Chosen, block_at
from smalti.layers.mixture_head import MixtureHead
from smalti.layers.tokens import TokenSource
from smalti.methods.base import Method, MethodConfig, TokenMethod, register
from smalti.methods.teacher import Teacher

_LABELS, _NOISE, _LEVELS, _DRAWN = 1, 2, 3, 4  # branches of a sample's keys
_RATIO_STREAM = 81
AVERAGED_SHARE, MAX_MOMENTUM = 0.1, 0.9999


@settings
class MARConfig(MethodConfig):
    """Settings of MAR; the paper's values for MAR-B."""

    name: str = "mar"
    num_classes: int | None = None
    """K; None: as many as the data has, 0: don't look at classes."""
    embed_dim: Width = 768
    """Width of encoder and decoder."""
    depth: Depth = 12
    """Blocks of the encoder."""
    decoder_depth: DepthFromZero = 12
    """Blocks of the decoder."""
    num_heads: NumHeads = 12
    """Attention heads of both."""
    buffer_size: int = 64
    """Slots in front of the tokens that hold the class."""
    dropout: float = 0.1
    """Of attention and of what blocks add, in training."""
    head: Literal["diffusion", "mixture"] = "diffusion"
    """What a token is drawn by: a diffusion, or a mixture of Gaussians whose likelihood is exact (not in the paper)."""
    head_depth: DepthFromZero = 6
    """Residual blocks of the head."""
    head_width: Width = 1024
    """Their width."""
    diffusion_steps: Count = 1000
    """Steps of the diffusion in training."""
    diffusion_repeats: Few = 4
    """Noise levels at which a token is seen in a step."""
    clip: float | None = None
    """Largest absolute value of estimates of a token in sampling; None: none, as in the paper. Short runs need one: at
    the noisiest step an error of the head stands in the estimate 20,000 times as large."""
    num_components: Few = 8
    """Gaussians of the mixture."""
    min_std: float = 0.01
    """Smallest standard deviation of a mixture's Gaussians."""
    dequantization: float = 0.0
    """Width of the uniform noise added to pixels in 0..1 before tokens are made: one level of theirs makes the
    mixture's likelihood a bound on that of images with levels; 0: none."""
    label_drop: float = 0.1
    """Share of images that are learned without their class, so that guidance has something to go from."""
    mask_ratio_min: float = 0.7
    """Smallest share of hidden tokens; it is normal around 1, cut off above 1 and below this."""
    mask_ratio_std: float = 0.25
    """Standard deviation of that."""
    ema_momentum: float | None = None
    """Of the averaged weights, which draw; None: 1 - 10 / steps, at most 0.9999."""
    flip_prob: float = 0.5
    """Share of images that are mirrored left to right."""


@settings
class SamplerConfig:
    """How images are drawn."""

    iterations: int | None = None
    """Steps in which an image is drawn, 1..N; None: 256, or N where that is less."""
    cfg: float = 1.0
    """Guidance: how far to go beyond what is drawn without a class; 1: not at all, and at half the cost."""
    cfg_schedule: Literal["linear", "constant"] = "linear"
    """Whether guidance grows from 1 with the tokens drawn, or is the same throughout."""
    temperature: float | None = None
    """What the noise added in drawing a token is multiplied by; None: 1, and without guidance 0.95, as released."""
    steps: int = 100
    """Steps of the diffusion, evenly spread."""
    decoder: Literal["all", "needed"] = "all"
    """Which tokens the decoder is given: ``all``, as it was trained; ``needed``: of the hidden ones only those drawn in
    this step, which costs less and isn't what it was trained on."""


def truncated_ratio(share: float, low: float, std: float) -> float:
    """The quantile of a normal law around 1, cut to ``low..1``: how many tokens a step hides (Sec. 3.4).

    Args:
        share: 0..1.
        low: smallest ratio, below 1.
        std: of the law before it was cut.
    """
    law = NormalDist(1.0, std)
    floor = law.cdf(low)
    return min(max(law.inv_cdf(floor + share * (0.5 - floor)), low), 1.0) if share < 1 else 1.0


def drawn_per_step(num_tokens: int, iterations: int) -> list[int]:
    """How many tokens each step of sampling draws, few first: a cosine leaves ``N cos(pi/2 k/K)`` after k steps.

    Each draws one at least, the last whatever is left. Source: Chang et al., MaskGIT, arXiv:2202.04200v1, Sec. 3.3.

    Raises:
        ConfigError: for more steps than tokens, or none.
    """
    if not 1 <= iterations <= num_tokens:
        raise ConfigError(f"iterations={iterations}: images of {num_tokens} tokens are drawn in 1..{num_tokens} steps")
    counts, left = [], num_tokens
    for step in range(1, iterations):
        kept = math.floor(num_tokens * math.cos(math.pi / 2 * step / iterations))
        # each later step needs a token of its own
        kept = max(1, min(kept, left - 1))
        counts.append(left - kept)
        left = kept
    return [*counts, left]


class MaskedAutoregressor(nn.Module):
    """An encoder of the visible tokens, a decoder of all places, and a head that knows one token's law.

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
        self.classes = nn.Embedding(self.null_class + 1, width)  # the last is no class
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
        num_wanted: int | None = None,
    ) -> Float[Tensor, "B Q D"]:
        """What the head is told of hidden tokens: Sec. 3.4, "MAE-style".

        Args:
            visible: tokens that are known.
            visible_ids: their places, in raster order's numbers.
            hidden_ids: places of mask tokens.
            classes: 0..K-1, or K for none.
            num_wanted: Q: only the first so many of the hidden are answered; None: all. The others take part all the
                same, but for the last block's output.
        """
        wanted = hidden_ids.shape[1] if num_wanted is None else num_wanted
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
        if wanted < hidden_ids.shape[1]:
            ids = torch.arange(first, first + wanted, device=x.device).expand(len(x), -1)
            chosen = Chosen(ids, torch.arange(ids.numel(), device=x.device))
            x = block_at(last, x, chosen).view(len(x), wanted, -1)
        else:
            x = last(x)[:, first:]
        return self.decoder_norm(x) + self.head_positions[hidden_ids[:, :wanted]]

    def _at(self, table: Tensor, ids: Tensor) -> Tensor:
        """Positions of the slots and of tokens: ``(B, slots + n, D)``."""
        slots = table[: self.num_slots].expand(len(ids), -1, -1)
        return torch.cat([slots, table[self.num_slots + ids]], dim=1)


@register("mar")
class MAR(TokenMethod):
    """Hide most tokens, encode the rest, and learn the law of each hidden one."""

    Config = MARConfig
    title = "masked autoregressive generation: images drawn token by token"
    paper = "Li et al. 2024, arXiv:2406.11838v3"
    next_command = "smalti generate {run} --num 64 --out SAMPLES"
    takes_labels: ClassVar[bool] = True
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
        """The same on the CPU: reading the buffer in a step would wait for the device."""
        self._steps: int | None = None

    @property
    def num_classes(self) -> int:
        """K; 0 where there are none."""
        return self.network.null_class

    def make_views(self, image_size: int) -> CentreCrop:
        """The central square, mirrored now and then."""
        return CentreCrop(image_size, self.config.flip_prob)

    def forward(self, views: Views, progress: float) -> dict[str, Tensor]:
        """``{"noise": ..., "bound": ...}``, or ``{"likelihood": ...}`` of a mixture; of hidden tokens only."""
        tokens = self.encode(views.global_crops, views.keys)
        _batch, num_tokens = tokens.shape[:2]
        num_hidden = min(max(math.ceil(self.mask_ratio(progress) * num_tokens), 1), num_tokens)
        orders = self.orders(views)
        visible, hidden = orders[:, : num_tokens - num_hidden], orders[:, num_tokens - num_hidden :]
        told = self.network(_pick(tokens, visible), visible, hidden, self.told_classes(views))
        keys = place_keys(fork_keys(views.keys, _NOISE), num_tokens).gather(1, hidden)
        losses = self.network.head(
            _pick(tokens, hidden).flatten(0, 1), told.flatten(0, 1), keys.flatten(), self.config.diffusion_repeats
        )
        self.observations = {"hidden_ratio": tokens.new_full((), num_hidden / num_tokens)}
        return {name: loss.mean() for name, loss in losses.items()}

    def orders(self, views: Views) -> Int[Tensor, "B N"]:
        """The order of each image's tokens: random, another in each epoch."""
        return random_orders(views.keys, self.tokens.num_tokens)

    def mask_ratio(self, progress: float) -> float:
        """Share of hidden tokens in a step; one for the whole batch, so that it is a rectangle."""
        return truncated_ratio(step_uniform(progress), self.config.mask_ratio_min, self.config.mask_ratio_std)

    def told_classes(self, views: Views) -> Int[Tensor, " B"]:
        """The class that each image is learned with: its own, or none; in eval mode always its own."""
        null = torch.full_like(views.keys, self.num_classes)
        if views.labels is None or not self.num_classes:
            return null
        if not self.training:
            return views.labels
        is_dropped = sample_uniform(fork_keys(views.keys, _LABELS), 1)[:, 0] < self.config.label_drop
        return torch.where(is_dropped, null, views.labels)

    def encode(self, images: Tensor, keys: Int[Tensor, " B"]) -> Float[Tensor, "B N d"]:
        """Tokens of images, uint8 or float in 0..1, with ``dequantization``."""
        width = self.config.dequantization
        if width:
            levels = sample_uniform(fork_keys(keys, _LEVELS), images[0].numel()).view(images.shape)
            images = (images.float() / 255 if images.dtype == torch.uint8 else images) + width * (levels - 0.5)
        return self.tokens.encode(images, keys)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module; steps are counted from those that the weights have seen."""
        result = super().load_state_dict(*args, **kwargs)
        self._num_updates = int(self.num_updates)
        return result

    def after_step(self, progress: float) -> None:
        """Move the averaged weights."""
        self.average.update(self.network, self.momentum(progress))
        self.num_updates += 1
        self._num_updates += 1

    def momentum(self, progress: float) -> float:
        """Of the averaged weights: 1 - 10 / steps, at most 0.9999; how many steps there are follows from ``progress``
        and the steps made. The first step's weights replace those before it."""
        if self.config.ema_momentum is not None:
            return self.config.ema_momentum
        if self._steps is None:
            made = self._num_updates
            if not made or not progress:
                return 0.0
            self._steps = round(made / progress)
        return min(max(1 - 1 / (AVERAGED_SHARE * max(self._steps, 1)), 0.0), MAX_MOMENTUM)

    def param_groups(self) -> list[dict[str, Any]]:
        """As usual, but that nothing of the head is decayed."""
        decayed, plain = super().param_groups()
        of_head = {id(parameter) for parameter in self.network.head.parameters()}
        spared = [parameter for parameter in decayed["params"] if id(parameter) in of_head]
        decayed["params"] = [parameter for parameter in decayed["params"] if id(parameter) not in of_head]
        plain["params"] = [*plain["params"], *spared]
        return [decayed, plain]

    def start_from(self, other: Method) -> None:
        """Start from the averaged weights of another run, and average anew."""
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
        """Images as tokens, by the averaged weights: Sec. 3.4 and App. B.

        Args:
            orders: the order in which each image's tokens are drawn, the first one first.
            keys: randomness of each image: what is drawn at a place depends on nothing but them, the class and what
                was drawn before; not on the batch.
            classes: 0..K-1 or K for none; None: none.
            sampler: how.
            watch: called after each step with the number of tokens drawn so far, and the tokens (0 where not drawn).

        Raises:
            ConfigError: for more iterations than tokens, guidance where there is no class or no diffusion, or
                diffusion steps that there aren't.
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
            told: Tensor
            without: Tensor | None = None
            if sampler.cfg == 1:
                told = network(known, visible, masks, classes, count)
            else:  # with the class and without it as one batch
                twice = (torch.cat([part, part]) for part in (known, visible, masks))
                told, without = network(*twice, torch.cat([classes, null]), count).flatten(0, 1).chunk(2)
            values = network.head.sample(
                told.reshape(batch * count, -1),
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
        """How many tokens each step draws, with every mistake in the sampler found.

        Raises:
            ConfigError: as :meth:`draw`.
        """
        num_tokens = self.tokens.num_tokens
        counts = drawn_per_step(num_tokens, min(num_tokens, 256) if sampler.iterations is None else sampler.iterations)
        if sampler.cfg != 1 and not self.num_classes:
            raise ConfigError(f"cfg={sampler.cfg:g}: this run knows no classes, so there is nothing to guide towards")
        if sampler.cfg != 1 and not self.network.head.takes_guidance:
            raise ConfigError(f"cfg={sampler.cfg:g}: guidance needs method.head=diffusion; a mixture predicts no noise")
        for name, value in (("cfg", sampler.cfg), ("temperature", temperature(sampler))):
            if not 0 <= value < math.inf:  # also false for what is no number
                raise ConfigError(f"{name}={value:g}: a finite number of at least 0 is needed")
        if self.network.head.takes_guidance and not 2 <= sampler.steps <= self.config.diffusion_steps:
            raise ConfigError(f"steps={sampler.steps}: the diffusion has 2..{self.config.diffusion_steps} steps")
        return counts

    def guidance(self, sampler: SamplerConfig, drawn: int) -> float:
        """Guidance in a step after which so many tokens are drawn; in the last as if one were still left."""
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
        """Log density of images' tokens, each given those before it in an order, by the averaged weights; exact.

        Args:
            tokens: of images.
            orders: the order of each; the law is this model's *in that order*: another order has another.
            classes: 0..K-1 or K for none; None: none.
            iterations: steps in which they are seen, tokens of a step independent of each other; None: one by one.

        Returns:
            In nats, by place: entry n is that of token n, so the sum over an image is the image's.

        Raises:
            ConfigError: if the head is no mixture, or for more iterations than tokens.
            ShapeError: for orders of another number of tokens.
        """
        network, num_tokens = self.average.module, self.tokens.num_tokens
        if not isinstance(network.head, MixtureHead):
            raise ConfigError("a likelihood needs method.head=mixture; a diffusion has none that is exact")
        _check_orders(orders, num_tokens)
        null = torch.full((len(orders),), self.num_classes, dtype=torch.int64, device=orders.device)
        result, seen = torch.zeros(tokens.shape[:2], device=tokens.device), 0
        for count in drawn_per_step(num_tokens, num_tokens if iterations is None else iterations):
            visible, hidden = orders[:, :seen], orders[:, seen:]
            new = hidden[:, :count]
            told = network(_pick(tokens, visible), visible, hidden, null if classes is None else classes, count)
            found = network.head.log_likelihood(_pick(tokens, new).flatten(0, 1), told.flatten(0, 1))
            result.scatter_(1, new, found.view(len(tokens), count).to(result))
            seen += count
        return result


def temperature(sampler: SamplerConfig) -> float:
    """Of the sampler, where it names none: 1 with guidance, 0.95 without."""
    if sampler.temperature is not None:
        return sampler.temperature
    return 0.95 if sampler.cfg == 1 else 1.0


def step_uniform(progress: float) -> float:
    """A number in [0, 1) that is a step's own, the same in all processes."""
    return float(sample_uniform(step_key(progress), 1, _RATIO_STREAM))


def _pick(x: Tensor, ids: Tensor) -> Tensor:
    """Tokens at some places: ``(B, N, d)``, ``(B, n)`` -> ``(B, n, d)``."""
    return x.gather(1, _wide(ids, x))


def _wide(ids: Tensor, like: Tensor) -> Tensor:
    return ids[..., None].expand(-1, -1, like.shape[-1])


def _check_orders(orders: Tensor, num_tokens: int) -> None:
    if orders.shape[1] != num_tokens:
        raise ShapeError(f"orders of {orders.shape[1]} tokens; this run's images have {num_tokens}")


def _check(config: MARConfig) -> None:
    for name in ("embed_dim", "depth", "decoder_depth", "num_heads", "buffer_size", "diffusion_repeats"):
        if getattr(config, name) < 1:
            raise ConfigError(f"method.{name}={getattr(config, name)}: at least 1 is needed")
    if config.embed_dim % config.num_heads:
        raise ConfigError(f"method.embed_dim={config.embed_dim}: must be a multiple of num_heads={config.num_heads}")
    for name in ("dropout", "label_drop", "mask_ratio_min"):
        if not 0 <= getattr(config, name) < 1:
            raise ConfigError(f"method.{name}={getattr(config, name)}: a share in 0..1 (1 excluded) is needed")
    if not 0 <= config.flip_prob <= 1 or not 0 <= config.dequantization <= 1:
        raise ConfigError(
            f"method.flip_prob={config.flip_prob}, method.dequantization={config.dequantization}: shares in 0..1"
        )
    if not config.mask_ratio_std > 0:
        raise ConfigError(f"method.mask_ratio_std={config.mask_ratio_std}: a number above 0 is needed")
    if config.clip is not None and not config.clip > 0:
        raise ConfigError(f"method.clip={config.clip}: a number above 0, or none, is needed")
    if config.ema_momentum is not None and not 0 <= config.ema_momentum <= 1:
        raise ConfigError(f"method.ema_momentum={config.ema_momentum}: a number in 0..1 is needed")
    if config.num_classes is not None and config.num_classes < 0:
        raise ConfigError(f"method.num_classes={config.num_classes}: 0 or more are needed")
