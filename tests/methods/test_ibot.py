"""iBOT against its definition."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from masked_methods import SMALL, batch, tiny
from smalti.data.views import Views
from smalti.errors import ConfigError
from smalti.functional.transport import sinkhorn
from smalti.methods.dinov2 import DINOv2, DINOv2Config, koleo
from smalti.methods.ibot import IBOT, IBOTConfig
from smalti.methods.masked_tokens import MaskedNetwork, Reading, other_views, token_weights
from smalti.models.build import build_encoder


def whole_logits(network: MaskedNetwork, images: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """Logits of class token and of patches, by the dense way: every token through every block and head."""
    encoder = network.encoder
    tokens, grid = encoder.embed_patches(encoder.normalize(images))
    if mask is not None:
        for crop, patch in mask.nonzero().tolist():
            tokens[crop, patch] = network.mask_token[0]
    sequence = encoder.forward_tokens(encoder.assemble(tokens, encoder.positions(grid)))
    patch_head = network.heads["patch"] if "patch" in network.heads else network.heads["image"]
    return network.heads["image"](sequence[:, 0]), patch_head(sequence[:, encoder.num_prefix_tokens :])


def by_plain_loops(method: IBOT, views: Views, progress: float) -> dict[str, torch.Tensor]:
    """A step's loss terms, pair by pair and token by token."""
    config, count = method.config, views.batch_size
    mask = method.draw_masks(views.keys, (4, 4))["patch"]
    with torch.no_grad():
        teacher_image, teacher_patch = whole_logits(method.teacher.module, views.crops[0], None)
    student_image, student_patch = whole_logits(method.student, views.crops[0], mask)
    local_image, _ = whole_logits(method.student, views.crops[1], None)

    masked = [(crop, patch) for crop, patch in mask.nonzero().tolist()]
    rows = torch.stack([teacher_patch[place] for place in masked])
    temps = [method.teacher_temp(name, progress) for name in ("image", "patch")]
    if config.targets == "sinkhorn":
        image_targets, patch_targets = sinkhorn(teacher_image, temps[0]), sinkhorn(rows, temps[1])
    else:
        image_targets = ((teacher_image - method.image_center) / temps[0]).softmax(-1)
        patch_targets = ((rows - method.patch_center) / temps[1]).softmax(-1)

    views_of = [student_image[:count], student_image[count:], *local_image.split(count)]
    terms = [
        -(image_targets[g * count + b] * (views_of[v][b] / 0.1).log_softmax(-1)).sum()
        for g in range(2)
        for v in range(len(views_of))
        if v != g
        for b in range(count)
    ]
    losses = {"image": torch.stack(terms).mean(), "patch": torch.zeros(())}
    for place, target in zip(masked, patch_targets, strict=True):
        cost = -(target * (student_patch[place] / 0.1).log_softmax(-1)).sum()
        losses["patch"] = losses["patch"] + cost / mask[place[0]].sum() / len(mask)
    return losses


@pytest.mark.parametrize("cls", [IBOT, DINOv2])
@pytest.mark.parametrize("targets", ["centering", "sinkhorn"])
@pytest.mark.parametrize("separate", [True, False])
def test_a_step_is_that_of_plain_loops(cls: type[IBOT], targets: str, separate: bool) -> None:
    method = tiny(
        cls,
        registers=2 * separate,
        targets=targets,
        separate_heads=separate,
        mask_sample_prob=0.7,
    )
    views = batch(method)
    if targets == "centering":
        method.image_center.copy_(torch.randn(16))
        method.patch_center.copy_(torch.randn(16))
    parameters = [parameter for parameter in method.parameters() if parameter.requires_grad]
    results = []
    for losses in (method(views, 0.1), by_plain_loops(method, views, 0.1)):
        losses = {name: losses[name] for name in ("image", "patch")}
        results.append([*losses.values(), *torch.autograd.grad(losses["image"] + 2 * losses["patch"], parameters)])
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs, rtol=2e-4, atol=2e-5)


def test_four_pairs_by_hand() -> None:  # known answer
    sources, weights = other_views(1, 3, torch.device("cpu"))
    assert sources.tolist() == [[1, 1], [0, 0], [0, 1]]
    teacher = torch.tensor([[0.8, 0.2], [0.3, 0.7]])
    student = torch.tensor([[0.1, 0.0], [0.0, 0.2], [0.05, -0.05]])
    log_pred = (student / 0.1).log_softmax(-1)
    pairs = -(teacher[sources] * log_pred[:, None]).sum(-1)  # (view, source)
    assert_close(
        pairs, torch.tensor([[1.013262, 1.013262], [1.726928, 1.726928], [0.513262, 1.013262]]), rtol=0, atol=1e-6
    )
    assert_close((weights * pairs.mean(1)).sum().item(), 1.066678, rtol=0, atol=1e-6)


def test_masked_tokens_count_by_crop_and_unmasked_crops_count() -> None:  # known answer: (a + b) / 4
    mask = torch.tensor([[True, False, True, False], [False] * 4])
    assert_close(token_weights(mask), torch.tensor([0.25, 0.25]))
    assert token_weights(torch.zeros(2, 4, dtype=torch.bool)).shape == (0,)


def test_centering_by_hand() -> None:  # known answer
    method = tiny(num_prototypes=2, center_momentum=0.9)
    logits, center = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), torch.tensor([0.5, 0.0])
    method.image_center.copy_(center)
    targets = (logits / 0.5 - method._offsets("image", logits, 0.5)).softmax(-1)
    expected = [[0.731059, 0.268941], [0.047426, 0.952574], [0.268941, 0.731059]]
    assert_close(targets, torch.tensor(expected), rtol=0, atol=1e-6)
    method._keep_sums({"image": logits}, {"image": torch.eye(2)})
    method.after_step(0.5)
    assert_close(method.image_center, torch.tensor([0.516667, 0.066667]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("cls", [IBOT, DINOv2])
def test_centers_follow_the_teacher_s_mean_logits(cls: type[IBOT]) -> None:
    method = tiny(cls, targets="centering", separate_heads=False)
    views = batch(method)
    mask = method.draw_masks(views.keys, (4, 4))["patch"]
    image, patches = whole_logits(method.teacher.module, views.crops[0], None)
    method(views, 0.5)
    method.after_step(0.5)
    assert_close(method.image_center, 0.1 * image.mean(0).detach())
    mean = patches.flatten(0, 1).mean(0) if cls is IBOT else patches[mask].mean(0)
    assert_close(method.patch_center, 0.1 * mean.detach())


def test_a_batch_without_masks_has_gradients_and_leaves_the_center() -> None:
    method = tiny(DINOv2, mask_sample_prob=0.0, targets="centering", separate_heads=True)
    losses = method(batch(method), 0.5)
    assert losses["patch"] == 0
    (losses["image"] + losses["patch"]).backward()
    for name in ("mask_token", "heads.patch.prototypes.weight", "heads.patch.projection.mlp.0.weight"):
        assert (method.student.get_parameter(name).grad == 0).all(), name  # data-parallel training waits for all
    method.after_step(0.5)
    assert (method.patch_center == 0).all() and (method.image_center != 0).any()


def test_half_of_the_crops_are_masked_by_shares_of_their_own() -> None:
    masks = tiny().draw_masks(torch.arange(300), (14, 14))["patch"]
    counts = masks.sum(1)
    assert 0.42 < (counts > 0).double().mean() < 0.58
    assert counts.max() <= 98 and 50 < counts[counts > 0].double().mean() < 65
    assert not torch.equal(masks[:300], masks[300:])  # the two views of an image differ


def test_a_reading_knows_each_token_s_row() -> None:
    mask = torch.tensor([[True, False, True], [False, False, False]])
    tokens = torch.arange(10.0).reshape(2, 5, 1)  # class token, register, three patches
    reading = Reading.of({"patch": mask}, 2)
    found = reading.split(reading.chosen.pick(tokens))
    assert found["image"].flatten().tolist() == [0, 5] and found["patch"].flatten().tolist() == [2, 4]


def test_temperatures_warm_up_each_on_its_own() -> None:
    method = tiny(teacher_temp=0.07, warmup_patch_teacher_temp=0.05, patch_teacher_temp=0.06)
    assert_close([method.teacher_temp("image", p) for p in (0.0, 0.15, 1.0)], [0.04, 0.055, 0.07])
    assert_close([method.teacher_temp("patch", p) for p in (0.0, 0.15, 1.0)], [0.05, 0.055, 0.06])


def test_prototypes_stay_fixed_at_first() -> None:
    method = tiny(separate_heads=True, freeze_last_layer_ratio=0.1)
    for parameter in method.parameters():
        parameter.grad = torch.ones_like(parameter)
    method.after_backward(0.2)
    assert all(head.prototypes.weight.grad is not None for head in method.student.heads.values())
    method.after_backward(0.05)
    assert all(head.prototypes.weight.grad is None for head in method.student.heads.values())
    assert method.student.heads["patch"].projection.mlp[0].weight.grad is not None


def test_narrow_networks_start_larger() -> None:
    encoder = build_encoder("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, seed=0)
    method = IBOT(encoder, IBOTConfig(**SMALL, linear_init="fan_in", position_init="sincos"))
    weights = {name: w for name, w in method.student.named_parameters() if name.endswith(("fc1.weight", "proj.weight"))}
    for name, weight in weights.items():
        fan_in = weight[0].numel()
        assert_close(weight.std().item(), fan_in**-0.5, rtol=0.05, atol=0, msg=name)
    tokens, _ = encoder.embed_patches(torch.randn(64, 3, 32, 32))
    positions = encoder.positions((4, 4))[0]
    assert_close(positions.square().mean().sqrt(), tokens.square().mean().sqrt(), rtol=0.05, atol=0)
    assert positions.requires_grad
    teacher = method.teacher.module.encoder
    assert torch.equal(teacher.vit.pos_embed, encoder.vit.pos_embed)


def test_an_encoder_that_was_trained_keeps_its_weights() -> None:
    encoder = build_encoder(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=3, seed=0
    )
    encoder.pretrained = True
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    IBOT(encoder, IBOTConfig(**SMALL, linear_init="fan_in", position_init="sincos"))
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_views_are_two_global_and_some_local_ones() -> None:
    crops = tiny().make_views(32)
    assert [(spec.count, spec.size, spec.scale) for spec in crops.specs] == [
        (2, 32, (0.25, 1.0)),
        (2, 16, (0.05, 0.25)),
    ]
    assert crops.specs[0].blur_prob == (1.0, 0.1) and crops.specs[0].solarize_prob == (0.0, 0.2)
    mild = tiny(color_strength=0.5, gray_prob=0.0).make_views(32).specs[1].color
    assert mild is not None and mild.brightness == 0.2 and mild.gray_prob == 0.0


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"teacher_temp": 0.0}, "must be above 0"),
        ({"mask_sample_prob": 1.5}, "mask_sample_prob=1.5: at most 1 is needed"),
        ({"mask_ratio": (0.5, 0.1)}, r"mask_ratio=\(0.5, 0.1\)"),
    ],
)
def test_settings_that_can_t_be_used_are_refused(config: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        tiny(**config)


def test_a_class_token_is_needed() -> None:
    encoder = build_encoder("vit_tiny_patch16_224", embed_dim=24, depth=1, num_heads=3, class_token=False)
    with pytest.raises(ConfigError, match="has no class token"):
        IBOT(encoder, IBOTConfig(**SMALL))


def _independent(targets: str) -> DINOv2:
    """A method whose loss over a batch is the mean of the losses over its halves, but for what targets share."""
    config = {"targets": targets, "koleo_weight": 0.0, "mask_sampling": "independent", "freeze_last_layer_ratio": 0.0}
    return tiny(DINOv2, **config)


def _rows(views: Views, rows: slice) -> Views:
    def pick(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(0, (-1, views.batch_size))[:, rows].flatten(0, 1)

    return Views(
        crops=tuple(pick(crops) for crops in views.crops),
        boxes=pick(views.boxes),
        flips=pick(views.flips),
        source_size=views.source_size[rows],
        index=views.index[rows],
        keys=views.keys[rows],
    )


def _trained(method: DINOv2, views: Views, wrap: bool) -> dict[str, torch.Tensor]:
    """The method after two steps."""
    model = DistributedDataParallel(method) if wrap else method
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        torch.stack(list(model(views, 0.5).values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(0.5)
    return method.state_dict()


def _worker(rank: int, folder: str, targets: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    method = _independent(targets)
    views = batch(method, 4)
    torch.save(_trained(method, _rows(views, slice(2 * rank, 2 * rank + 2)), True), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("targets", ["centering", "sinkhorn"])
def test_two_processes_are_one_with_the_double_batch(targets: str, tmp_path: Path) -> None:
    mp.spawn(_worker, (str(tmp_path), targets), nprocs=2)
    method = _independent(targets)
    together = _trained(method, batch(method, 4), False)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found.keys() == together.keys()
        for name, value in together.items():
            assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_koleo_is_not_asked_of_one_image() -> None:
    method = tiny(DINOv2)
    with pytest.raises(ValueError, match="KoLeo needs at least 2 images, got 1"):
        method(batch(method, 1), 0.5)
    assert math.isfinite(sum(v.item() for v in tiny(DINOv2, koleo_weight=0.0)(batch(method, 1), 0.5).values()))
    assert isinstance(DINOv2Config(), IBOTConfig) and koleo(torch.eye(2)) < 0
