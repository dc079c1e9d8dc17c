"""Intertwined content and positional features against its definition."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import timm
import torch
import torch.distributed
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import smalti
from smalti.data.images.folders import open_images
from smalti.data.loader import TrainLoader
from smalti.data.views import Views, collate
from smalti.errors import ConfigError
from smalti.evaluation.config import EvalConfig
from smalti.functional.boxes import normalize_boxes
from smalti.functional.positions import patch_centres
from smalti.functional.transport import sinkhorn
from smalti.layers.position_field import PositionField
from smalti.methods.intertwined import CONTENT, POSITION, Intertwined, IntertwinedConfig, IntertwinedNetwork
from smalti.methods.masked_tokens import token_weights
from smalti.models.build import build_encoder
from smalti.models.loading import latest_checkpoint
from smalti.models.weights import read_tensors
from smalti.runs import train as runs
from smalti.runs.baseline import evaluate

SMALL: dict[str, Any] = {
    "num_prototypes": 16,
    "hidden_dim": 32,
    "bottleneck_dim": 8,
    "num_local_views": 2,
    "field_grid": (9, 9),
}
TINY: dict[str, Any] = {
    "encoder": {"name": "vit_tiny_patch16_224", "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3},
    "data": {"image_size": 32},
    "steps": 6,
    "batch_size": 4,
    "optim": {"lr": 1e-3},
    "checkpoint": {"every": 3},
    "log": {"every": 2},
    "devices": "cpu",
    "method": {**SMALL, "field_grid": [9, 9], "position_init": "sincos", "linear_init": "fan_in"},
}


def tiny(seed: int = 0, registers: int = 0, **config: Any) -> Intertwined:
    torch.manual_seed(seed)
    encoder = build_encoder(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=24,
        depth=2,
        num_heads=3,
        reg_tokens=registers,
        seed=seed,
    )
    return Intertwined(encoder, IntertwinedConfig(**SMALL | config)).train()


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images that say where each pixel is: red 4 x, green 4 y; of three shapes."""
    folder = tmp_path_factory.mktemp("places")
    for number, (height, width) in enumerate([(40, 60), (60, 40), (50, 50), (44, 62), (61, 48)]):
        y, x = np.mgrid[:height, :width]
        image = np.stack([np.zeros_like(x), 4 * y, 4 * x], axis=2).astype(np.uint8)  # OpenCV writes BGR
        cv2.imwrite(str(folder / f"{number}.png"), image)
    return folder


def batch(method: Intertwined, folder: Path, count: int = 4) -> Views:
    return next(iter(TrainLoader(open_images(folder), method.make_views(32), batch_size=count, seed=3)))


def set_coordinates(method: Intertwined) -> None:
    """A field whose first two channels are x and y."""
    field = method.student.encoder.position_field
    rows, columns = torch.meshgrid(*(torch.linspace(0, 1, n) for n in field.grid), indexing="ij")
    with torch.no_grad():
        field.field.zero_()
        field.field[0, 0], field.field[0, 1] = columns, rows


PLAIN = {"color_strength": 0.0, "gray_prob": 0.0, "blur_prob": (0.0, 0.0, 0.0), "solarize_prob": 0.0}


@pytest.mark.parametrize("flip", ["box", "field", "image"])
def test_from_file_to_token_patches_read_the_place_that_they_show(flip: str, places: Path) -> None:
    # known answer, through the whole data path: the pixels themselves say where they come from
    method = tiny(flip=flip, scale_distribution="const", **PLAIN)
    method.student.encoder.position_field.mode = "bilinear"
    set_coordinates(method)
    views = batch(method, places, count=5)
    sizes, first = views.source_size.repeat(sum(views.num_views), 1), 0
    seen = set()
    for crops, boxes in zip(views.crops, method.view_boxes(views), strict=True):
        grid = method.student.encoder.check_size(*crops.shape[-2:])
        read = method.student.encoder.positions(grid, boxes)[0].unflatten(1, grid)
        shown = torch.nn.functional.avg_pool2d(crops.float(), 8)  # mean colour of each patch
        for number in range(len(crops)):
            height, width = sizes[first + number].tolist()
            x = (shown[number, 0] / 4 + 0.5) / width
            y = (shown[number, 1] / 4 + 0.5) / height
            is_mirrored = bool(views.flips[first + number])
            seen.add(is_mirrored)
            if flip == "image" and read[number, 0, 0, 0] < read[number, 0, -1, 0] and x[0, 0] > x[0, -1]:
                x = 1 - x  # the whole image was mirrored, and its places with it
            if flip == "box" and is_mirrored:
                x = x.flip(1)  # pixels are mirrored, positions not
            # bicubic resizing bends the outermost pixels
            assert_close(read[number, ..., 0], x, atol=0.012, rtol=0)
            assert_close(read[number, ..., 1], y, atol=0.012, rtol=0)
        first += len(crops)
    assert seen == ({False} if flip == "image" else {False, True})


def test_one_scale_and_shift_for_all_views_of_an_image(photos: Path) -> None:
    method = tiny(flip="field")
    views = batch(method, photos)
    plain = tiny(flip="field", scale_distribution="const").field_boxes(views).reshape(4, 4, 4)  # (V, B, 4)
    placed = method.field_boxes(views).reshape(4, 4, 4)
    scale = (placed[..., 2:] - placed[..., :2]) / (plain[..., 2:] - plain[..., :2])
    assert_close(scale, scale[:1, :, :1].expand_as(scale), rtol=1e-4, atol=1e-5)
    offset = placed[..., :2] - scale * plain[..., :2]
    assert_close(offset, offset[:1].expand_as(offset), rtol=0, atol=1e-5)
    assert scale[0, :, 0].unique().numel() == 4  # each image its own
    assert placed.min().item() >= 0 and placed.max().item() <= 1


@pytest.mark.parametrize(("law", "mean"), [("beta", 0.2 + 0.8 * 2 / 7), ("uniform", 0.6)])
def test_the_area_follows_its_law(law: str, mean: float) -> None:
    method, count = tiny(scale_distribution=law, anchor="crops"), 4000
    inner = torch.tensor([30.0, 30.0, 70.0, 70.0])
    views = Views(
        crops=(torch.zeros(2 * count, 3, 8, 8, dtype=torch.uint8),),
        boxes=inner.repeat(2 * count, 1),
        flips=torch.zeros(2 * count, dtype=torch.bool),
        source_size=torch.full((count, 2), 100),
        index=torch.arange(count),
        keys=torch.arange(count),
    )
    placed = method.field_boxes(views)[:count]
    area = (placed[:, 2:] - placed[:, :2]).prod(1)
    assert area.mean().item() == pytest.approx(mean, abs=0.01)
    assert area.min().item() >= 0.2 and area.max().item() <= 1


def test_mirrored_crops_read_as_the_flip_mode_says(photos: Path) -> None:
    box, field = tiny(), tiny(flip="field")
    views = batch(box, photos)
    kept, turned = box.field_boxes(views), field.field_boxes(views)
    assert views.flips.any() and not views.flips.all()
    assert torch.equal(kept[~views.flips], turned[~views.flips])
    assert torch.equal(kept[views.flips][:, [2, 1, 0, 3]], turned[views.flips])
    unflipped = replace(views, flips=torch.zeros_like(views.flips))
    assert torch.equal(box.field_boxes(unflipped), kept)  # the bit is ignored
    image = tiny(flip="image").make_views(32)
    assert image.flip_image_prob == 0.5 and all(spec.flip_prob == 0 for spec in image.specs)


@given(share=st.sampled_from([0.0, 0.3, 0.5, 1.0]), seed=st.integers(0, 2**40), dealing=st.booleans())
def test_no_crop_loses_content_and_positions(share: float, seed: int, dealing: bool) -> None:
    method = tiny(mask_sample_prob=share, mask_sampling="stratified" if dealing else "independent")
    keys = torch.arange(5) + seed
    masks = method.draw_masks(keys, (7, 7))
    content, position = masks[CONTENT], masks[POSITION]
    assert not (content.any(1) & position.any(1)).any()
    counts = method.mask_counts(keys, (7, 7))
    assert torch.equal(position.sum(1), counts[1])  # crosses hide just as many as asked
    if dealing:
        assert (counts[0] > 0).sum().item() == int(10 * share)
        assert (counts[1] > 0).sum().item() == 10 - int(10 * share)


def test_ratios_are_dealt_out_one_from_each_stratum() -> None:
    method = tiny(mask_ratio=(0.1, 0.5), position_mask_ratio=(0.2, 0.6))
    content, position = method.mask_counts(torch.arange(20), (100, 100))
    for counts, low in ((content, 0.1), (position, 0.2)):
        ratios = counts[counts > 0].sort().values / 10_000
        edges = torch.linspace(low, low + 0.4, 21)
        assert ((ratios >= edges[:-1] - 1e-3) & (ratios <= edges[1:] + 1e-3)).all()


def test_boxes_may_hide_positions_too() -> None:
    keys = torch.arange(6)
    cross, box = tiny(), tiny(position_mask="box")
    assert not torch.equal(cross.draw_masks(keys, (8, 8))[POSITION], box.draw_masks(keys, (8, 8))[POSITION])
    assert (box.draw_masks(keys, (8, 8))[POSITION].sum(1) <= box.mask_counts(keys, (8, 8))[1]).all()


@pytest.mark.parametrize("field", [True, False])
@pytest.mark.parametrize("registers", [0, 2])
def test_masks_act_on_their_own_part_of_a_token(field: bool, registers: int) -> None:
    network = tiny(field=field, registers=registers).student
    encoder, images = network.encoder, torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    boxes = torch.tensor([[0.1, 0.2, 0.6, 0.8], [0.3, 0.1, 0.9, 0.7]]) if field else None
    u, grid = encoder.embed_patches(encoder.normalize(images))
    q, prefix = encoder.positions(grid, boxes)
    everything = torch.ones(2, 16, dtype=torch.bool)
    inside = slice(encoder.num_prefix_tokens, None)
    assert_close(network.embed(images, {}, boxes)[:, inside], u + q)
    assert_close(network.embed(images, {CONTENT: everything}, boxes)[:, inside], q.expand(2, -1, -1))
    assert_close(network.embed(images, {POSITION: everything}, boxes)[:, inside], u)
    with torch.no_grad():
        network.mask_token.fill_(3.0)
        network.position_token.fill_(5.0)
    some = torch.arange(16).remainder(3).eq(0).expand(2, -1)
    sequence = network.embed(images, {CONTENT: some}, boxes)[:, inside]
    assert_close(sequence, torch.where(some[..., None], 3.0, u) + q)
    sequence = network.embed(images, {POSITION: some}, boxes)
    assert_close(sequence[:, inside], u + torch.where(some[..., None], 5.0, q.expand(2, -1, -1)))
    assert_close(sequence[:, :1], (encoder.vit.cls_token + prefix[:, :1]).expand(2, -1, -1))  # never masked
    if field and registers:  # which have no position
        assert_close(sequence[:, 1 : 1 + registers], encoder.vit.reg_token.expand(2, -1, -1))


def test_each_crop_s_mean_is_over_its_masked_tokens_and_the_sum_over_all_crops() -> None:  # known answer: (a + b) / 4
    masks = torch.tensor([[True, True, False, False], [False, False, False, False]])
    assert token_weights(masks).tolist() == [0.25, 0.25]


def whole_logits(
    network: IntertwinedNetwork, images: torch.Tensor, boxes: torch.Tensor | None, masks: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Logits of all tokens by all heads, token by token, every one through every block."""
    encoder = network.encoder
    u, grid = encoder.embed_patches(encoder.normalize(images))
    table, prefix = encoder.positions(grid) if boxes is None else (None, encoder.position_field.class_position)
    rows = []
    for number in range(len(images)):
        q = table[0] if boxes is None else encoder.position_field(boxes[number : number + 1], grid)[0]
        tokens = []
        for place in range(u.shape[1]):
            content = network.mask_token[0] if CONTENT in masks and masks[CONTENT][number, place] else u[number, place]
            position = network.position_token[0] if POSITION in masks and masks[POSITION][number, place] else q[place]
            tokens.append(content + position)
        rows.append(torch.stack([encoder.vit.cls_token[0, 0] + prefix[0, 0], *tokens]))
    sequence = encoder.forward_tokens(torch.stack(rows))
    return {name: head(sequence[:, 0] if name == "image" else sequence[:, 1:]) for name, head in network.heads.items()}


@pytest.mark.parametrize("targets", ["centering", "sinkhorn"])
@pytest.mark.parametrize(
    "switches",
    [{}, {"field": False}, {"position_loss": False}, {"loss_tokens": "all"}, {"flip": "field", "anchor": "image"}],
    ids=str,
)
def test_a_step_is_the_papers_by_plain_loops(targets: str, switches: dict[str, Any], photos: Path) -> None:
    method = tiny(targets=targets, **switches).eval()
    views = batch(method, photos)
    config, count = method.config, views.batch_size
    if targets == "centering":
        for name in ("image", *method.token_heads):
            getattr(method, f"{name}_center").copy_(torch.randn(16) / 10)
    losses = method(views, 0.5)

    boxes = method.view_boxes(views)
    masks = method.draw_masks(views.keys, (4, 4))
    teacher = whole_logits(method.teacher.module, views.crops[0], boxes[0], {})
    student = whole_logits(method.student, views.crops[0], boxes[0], masks)
    local = whole_logits(method.student, views.crops[1], boxes[1], {})["image"]

    def targets_of(name: str, rows: torch.Tensor) -> torch.Tensor:
        if targets == "sinkhorn":
            return sinkhorn(rows, 0.04)
        return ((rows - getattr(method, f"{name}_center")) / 0.04).softmax(-1)

    def cost(target: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return -(target * (logits / 0.1).log_softmax(-1)).sum()

    image = targets_of("image", teacher["image"]).split(count)
    seen = [*student["image"].split(count), *local.split(count)]
    pairs = [cost(image[g][b], seen[v][b]) for g in range(2) for v in range(len(seen)) if v != g for b in range(count)]
    expected = {"image": torch.stack(pairs).mean()}
    for name in method.token_heads:
        mask = masks[name]
        if config.loss_tokens == "all":
            mask = mask.any(1, keepdim=True).expand_as(mask)
        target = targets_of(name, teacher[name][mask])
        terms = [cost(t, s) for t, s in zip(target, student[name][mask], strict=True)]
        each = mask.sum(1)[mask.nonzero()[:, 0]]
        expected[name] = (torch.stack(terms) / each).sum() / len(mask)
    assert set(losses) == {*expected, "koleo"}
    for name, value in expected.items():
        assert_close(losses[name], value, rtol=1e-4, atol=1e-5)


def test_each_component_is_switched_on_its_own() -> None:
    assert tiny().token_heads == ("content", "position")
    assert set(tiny().student.heads) == {"image", "content", "position"}
    plain = tiny(field=False, position_loss=False)
    assert plain.student.encoder.position_field is None and plain.student.encoder.vit.pos_embed.requires_grad
    assert set(plain.student.heads) == {"image", "content"}
    masks = plain.draw_masks(torch.arange(4), (8, 8))
    assert set(masks) == {CONTENT} and masks[CONTENT].any(1).sum().item() == 4  # of 8 crops
    only = tiny(field=False)
    assert only.student.position_token is not None and only.student.encoder.position_field is None
    with_field = tiny(position_loss=False)
    assert with_field.student.position_token is None and with_field.student.encoder.position_field is not None
    assert with_field.student.encoder.vit.pos_embed is None  # neither added nor trained


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("targets", ["centering", "sinkhorn"])
def test_without_a_masked_token_of_a_kind_all_gets_a_gradient_and_stays_finite(
    share: float, targets: str, photos: Path
) -> None:
    method = tiny(mask_sample_prob=share, targets=targets)
    losses = method(batch(method, photos), 0.5)
    torch.stack(list(losses.values())).sum().backward()
    method.after_step(0.5)
    assert losses[CONTENT if share == 0 else POSITION].item() == 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters() if p.requires_grad)
    assert all(value.isfinite().all() for value in method.state_dict().values())


def test_the_field_is_trained_and_followed_by_the_teacher(photos: Path) -> None:
    method = tiny()
    field, copy = (network.position_field for network in method.networks().values())
    grouped = {id(p) for group in method.param_groups() if group["weight_decay_scale"] for p in group["params"]}
    assert id(field.field) in grouped and id(field.class_position) in grouped  # decayed, as positions are
    before = copy.field.clone()
    with torch.no_grad():
        field.field.add_(1)
    method(batch(method, photos), 0.0)
    method.after_step(0.0)
    assert_close(copy.field, before + (1 - method.config.momentum))


def _independent() -> Intertwined:
    """Images meet in targets alone, so that a batch may be parted between processes."""
    return tiny(koleo_weight=0.0, mask_sampling="independent")


def _batch_of_noise(method: Intertwined, rows: slice) -> Views:
    samples = []
    for number in range(4):
        rng = np.random.default_rng(number)
        samples.append(method.make_views(32)(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8), rng))
        samples[-1].key = 11 * number
    return collate(samples[rows])


def _trained(method: Intertwined, views: Views, wrap: bool) -> dict[str, torch.Tensor]:
    """Weights after two plain steps."""
    model = DistributedDataParallel(method) if wrap else method
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    for progress in (0.5, 0.6):
        torch.stack(list(model(views, progress).values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(progress)
    return method.state_dict()


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    method = _independent()
    views = _batch_of_noise(method, slice(2 * rank, 2 * rank + 2))
    torch.save(_trained(method, views, True), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("forked")
def test_two_processes_are_one_with_the_double_batch(tmp_path: Path) -> None:
    mp.spawn(_worker, (str(tmp_path),), nprocs=2)
    method = _independent()
    together = _trained(method, _batch_of_noise(method, slice(None)), False)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in together.items():
            assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_layer_decay_reaches_both_mask_tokens_and_the_field() -> None:
    method = tiny(layer_decay=0.5)
    scale = {p: group["lr_scale"] for group in method.param_groups() for p in group["params"]}
    network = method.student
    below = (network.mask_token, network.position_token, *network.encoder.position_field.parameters())
    assert [scale[p] for p in below] == [0.125] * 4  # before the first of two blocks
    assert all(scale[p] == 1 for p in network.heads.parameters() if p.requires_grad)


def test_a_field_starts_as_small_as_a_table_or_as_large_as_embedded_patches() -> None:
    assert tiny().student.encoder.position_field.field.std().item() == pytest.approx(0.02, rel=0.1)
    method = tiny(position_init="sincos", linear_init="fan_in")
    encoder = method.student.encoder
    patches, _ = encoder.embed_patches(torch.randn(64, 3, 32, 32))
    rms = encoder.position_field.field.square().mean().sqrt().item()
    assert rms == pytest.approx(patches.square().mean().sqrt().item(), rel=0.1)
    table = tiny(position_init="sincos", linear_init="fan_in", field=False).student.encoder.vit.pos_embed[:, 1:]
    assert rms == pytest.approx(table.square().mean().sqrt().item(), rel=1e-5)  # arms without a field start alike


def test_settings_that_cannot_be_used_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"scale_range=\(0, 1\)"):
        tiny(scale_range=(0.0, 1.0))
    with pytest.raises(ConfigError, match=r"position_mask_ratio=\(0.6, 0.5\)"):
        tiny(position_mask_ratio=(0.6, 0.5))
    bare = build_encoder("vit_tiny_patch16_224", embed_dim=24, depth=1, num_heads=3, pos_embed="none")
    with pytest.raises(ConfigError, match="no positional embeddings"):
        Intertwined(bare, IntertwinedConfig(**SMALL))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Iterator[Path]:
    yield smalti.train("intertwined", photos, tmp_path_factory.mktemp("runs") / "a", overrides=TINY, quiet=True)


def test_a_run_is_evaluated_with_its_field(run: Path, class_folders: Path) -> None:
    encoder = smalti.load(run, quiet=True)
    assert encoder.position_field is not None and encoder.vit.pos_embed is None
    stored = read_tensors(latest_checkpoint(run) / "weights.safetensors")
    assert torch.equal(encoder.position_field.field, stored["teacher.module.encoder.position_field.field"])
    student = smalti.load(run, network="student", quiet=True)
    assert not torch.equal(student.position_field.field, encoder.position_field.field)
    images = torch.randint(0, 256, (1, 3, 64, 48), dtype=torch.uint8)
    tokens, grid = encoder.embed_patches(encoder.normalize(images))
    q = encoder.position_field(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), grid)
    sequence = torch.cat([encoder.vit.cls_token + encoder.position_field.class_position, tokens + q], dim=1)
    assert_close(encoder.encode(images).patches, encoder.forward_tokens(sequence)[:, 1:])
    result = evaluate(encoder, "run", str(class_folders), EvalConfig(protocols=("knn",), baseline=False))[0]
    assert result.settings["position_field"]["grid"] == [9, 9]
    with pytest.raises(ConfigError, match="reads its positions from a field"):
        smalti.load(run, pos_antialias=False, quiet=True)


@pytest.mark.parametrize("size", [None, 64, 48])
def test_the_export_at_any_grid_is_a_plain_timm_model_with_equal_outputs(
    run: Path, size: int | None, tmp_path: Path
) -> None:
    from smalti.exporters.timm import export_timm

    encoder = smalti.load(run, img_size=size, quiet=True)
    written = export_timm(encoder, tmp_path / "x")
    assert written.difference <= 1e-6
    plain = timm.create_model(f"local-dir:{written.path}", pretrained=True).eval()
    images = torch.randn(2, 3, size or 32, size or 32)
    with torch.no_grad():
        live = smalti.load(run, quiet=True).encode(images)  # native size as trained: the field is read at this grid
        assert_close(plain.forward_features(images)[:, 1:], live.patches, atol=1e-6, rtol=0)
    described = json.loads((written.path / "config.json").read_text())["smalti"]
    assert "position_field" not in described
    again = smalti.load(written.path / "model.safetensors", quiet=True)
    assert again.position_field is None


def test_a_resumed_run_ends_with_the_same_bits(
    run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, made = Intertwined.after_step, []

    def stop(self: Intertwined, progress: float) -> None:
        original(self, progress)
        made.append(progress)
        if len(made) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Intertwined, "after_step", stop)
    with pytest.raises(KeyboardInterrupt):
        smalti.train("intertwined", photos, tmp_path / "b", overrides=TINY, quiet=True)
    monkeypatch.setattr(Intertwined, "after_step", original)
    runs.resume(tmp_path / "b", quiet=True)
    ours, theirs = (read_tensors(latest_checkpoint(path) / "weights.safetensors") for path in (run, tmp_path / "b"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_training_goes_on_from_a_run_with_its_field_and_others_get_a_table(
    run: Path, photos: Path, tmp_path: Path
) -> None:
    again = {key: value for key, value in TINY.items() if key != "encoder"} | {"steps": 1}
    on = smalti.train("intertwined", photos, tmp_path / "on", init=str(run), overrides=again, quiet=True)
    first = read_tensors(on / "checkpoints" / "step_00000001" / "weights.safetensors")
    start = smalti.load(run, quiet=True)
    close = first["student.encoder.position_field.field"] - start.position_field.field
    assert close.abs().max().item() < 1e-3  # one step at a low rate
    mae = {"decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
    other = smalti.train("mae", photos, tmp_path / "mae", init=str(run), overrides={**again, "method": mae}, quiet=True)
    encoder = smalti.load(other, quiet=True)
    assert encoder.position_field is None and encoder.vit.pos_embed is not None
    runs.resume(other, {"checkpoint": {"every": 1}}, quiet=True)


def test_a_trained_table_becomes_a_field_that_reads_the_same_at_its_grid() -> None:
    encoder = build_encoder(
        "vit_tiny_patch16_224", img_size=64, patch_size=8, embed_dim=24, depth=2, num_heads=3, seed=0
    )
    encoder.pretrained = True
    smooth = PositionField(24, (3, 3), mode="bicubic").whole((8, 8)).detach()
    with torch.no_grad():
        encoder.vit.pos_embed[:, 1:] = 10 * smooth
    before, prefix = encoder.positions((8, 8))
    method = Intertwined(encoder, IntertwinedConfig(**SMALL | {"field_grid": (50, 50)}))
    after, row = method.student.encoder.positions((8, 8))
    assert (after - before).square().mean().sqrt() < 0.1 * before.square().mean().sqrt()
    assert_close(row[:, :1], prefix)


def test_a_whole_image_is_read_where_the_crop_of_all_of_it_is(photos: Path) -> None:
    method = tiny(scale_distribution="const")
    across, down = patch_centres(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), (4, 4))
    assert across[0, 0].item() == down[0, 0].item() == 0.125
    boxes = normalize_boxes(torch.tensor([[0.0, 0.0, 48.0, 40.0]]), torch.tensor([[40, 48]]))
    encoder = method.student.encoder
    assert_close(encoder.positions((4, 4), boxes)[0], encoder.positions((4, 4))[0])


def test_settings_of_a_field_that_weights_bring_are_not_dropped_in_silence() -> None:
    encoder = build_encoder("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=3)
    small = {"num_prototypes": 8, "hidden_dim": 16, "bottleneck_dim": 8}
    brought = Intertwined(encoder, IntertwinedConfig(field_grid=(10, 10), **small)).student.encoder
    with pytest.raises(ConfigError, match=r"field_grid=\[24, 24\], but the initial weights have a field of \[10, 10\]"):
        Intertwined(brought, IntertwinedConfig(field_grid=(24, 24), **small))
    again = Intertwined(brought, IntertwinedConfig(**small)).student.encoder.position_field
    assert again is not None and tuple(again.grid) == (10, 10)
