"""DynamicViT: masked attention by slow loops, decisions and their gradients, losses by hand, removal.

Also of layers/token_pruning.py and models/pruning.py.
"""

import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import smalti
from smalti.config import merge, read_yaml
from smalti.data.images.folders import open_images
from smalti.data.loader import TrainLoader
from smalti.data.views import Views
from smalti.errors import ConfigError, DataError, WeightsError
from smalti.functional.random import sample_uniform
from smalti.layers.gaussian_bias import Places
from smalti.layers.token_pruning import PredictionModule, TokenPruning, stage_blocks
from smalti.methods.dynamicvit import (
    DynamicViT,
    DynamicViTConfig,
    class_divergence,
    encode_masked,
    gumbel_keep,
    kept_distillation,
    masked_block,
    masked_softmax,
    ratio_loss,
)
from smalti.models.build import build_encoder
from smalti.models.encoder import Encoder
from smalti.models.loading import latest_checkpoint
from smalti.models.pruning import encode_pruned
from smalti.reading import read_csv
from smalti.runs import train as runs
from smalti.runs.build import build_method
from smalti.runs.config import resolve

TINY: dict[str, Any] = {
    "encoder": {"name": "vit_tiny_patch16_224", "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3},
    "data": {"image_size": 32},
    "batch_size": 4,
    "steps": 6,
    "optim": {"lr": 2e-3, "warmup_ratio": 0.0, "freeze_encoder_ratio": 0.0},
    "drop_path": 0.0,
}


def tiny_encoder(**arguments: Any) -> Encoder:
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3, "seed": 0}
    return build_encoder("vit_tiny_patch16_224", **{**shape, **arguments})


def build(pool: str = "auto", **config: Any) -> DynamicViT:
    torch.manual_seed(0)
    encoder = tiny_encoder()
    encoder.set_pool(pool, fresh=True)
    return DynamicViT(encoder, DynamicViTConfig(**{"num_classes": 2, **config})).train()


def sharp_pruning(encoder: Encoder, keep_ratio: float = 0.7) -> TokenPruning:
    """Prediction modules with large random weights, so that scores differ clearly between tokens."""
    torch.manual_seed(3)
    modules = torch.nn.ModuleList(PredictionModule(encoder.embed_dim) for _ in stage_blocks(encoder.depth))
    for parameter in modules.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return TokenPruning(stage_blocks(encoder.depth), keep_ratio, modules)


def views_of(method: DynamicViT, folder: Path, count: int = 4) -> Views:
    images = open_images(folder).subset("train")
    return next(iter(TrainLoader(images, method.make_views(32), batch_size=count, seed=0)))


def test_stages_are_those_of_the_released_code() -> None:
    assert [stage_blocks(depth) for depth in (12, 16, 20)] == [(3, 6, 9), (4, 8, 12), (5, 10, 15)]
    assert [stage_blocks(depth) for depth in (1, 2, 3, 4)] == [(), (1,), (1, 2), (1, 2, 3)]


def test_kept_patches_of_the_paper() -> None:
    pruning = TokenPruning((3, 6, 9), 0.7, torch.nn.ModuleList())
    assert pruning.counts(196) == (137, 96, 67)  # "66 %" are dropped in the end
    assert pruning.counts(196, 1.0) == (196, 196, 196)
    assert pruning.counts(10, 0.3) == (3, 1, 1)
    assert pruning.mean_kept(196, 12) == pytest.approx((196 + 137 + 96 + 67) / (4 * 196))


def test_masked_attention_is_the_sum_over_kept_tokens_and_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 5, 5, generator=generator, dtype=torch.float64)
    keep = torch.tensor([[1.0, 0, 1, 0, 1], [1, 1, 1, 1, 1]], dtype=torch.float64)
    found = masked_softmax(logits, keep)
    for b in range(2):
        for head in range(3):
            for i in range(5):
                weights = [
                    math.exp(logits[b, head, i, j]) if j == i else math.exp(logits[b, head, i, j]) * float(keep[b, j])
                    for j in range(5)
                ]
                assert found[b, head, i].tolist() == pytest.approx([w / sum(weights) for w in weights])
    assert_close(found[1], logits[1].softmax(-1))


def test_masked_attention_has_a_gradient_where_a_token_is_dropped() -> None:
    logits = torch.randn(1, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    keep = torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(masked_softmax, (logits.requires_grad_(), keep))
    (gradient,) = torch.autograd.grad(masked_softmax(logits, keep)[0, 0, 0, 1], keep)
    assert gradient[0, 1] > 0  # to keep it would raise its weight


def test_masked_attention_stays_finite_when_a_dropped_token_outweighs_all_others() -> None:
    logits = torch.tensor([[[[0.0, 500.0], [0.0, 500.0]]]], requires_grad=True)
    weights = masked_softmax(logits, torch.tensor([[1.0, 0.0]]))
    weights.sum().backward()
    assert weights.isfinite().all() and logits.grad is not None and logits.grad.isfinite().all()


@pytest.mark.parametrize("gaug", [False, True])
def test_kept_tokens_do_not_see_dropped_ones_and_dropped_ones_see_themselves(gaug: bool) -> None:
    encoder = tiny_encoder(init_values=0.1, qk_norm=True)
    if gaug:
        encoder.attach_gaug((4, 4), seed=1)
    block = encoder.vit.blocks[0].eval()
    x = torch.randn(2, 17, 24, generator=torch.Generator().manual_seed(0))
    keep = torch.ones(2, 17)
    keep[:, [3, 7, 8]] = 0
    changed = x.clone()
    changed[:, 7] += 5
    one, other = (masked_block(block, values, keep, Places((4, 4)), 1) for values in (x, changed))
    others = [token for token in range(17) if token != 7]
    assert_close(one[:, others], other[:, others])  # the largest logit, which is subtracted, may be another
    assert (one[:, 7] - other[:, 7]).abs().max() > 1
    assert_close(
        masked_block(block, x, torch.ones(2, 17), Places((4, 4)), 1), encoder.run_block(block, x, Places((4, 4)))
    )


@pytest.mark.parametrize(
    "arguments",
    [{}, {"reg_tokens": 2, "init_values": 0.1}, {"class_token": False, "global_pool": "avg"}, {"gaug": True}],
)
def test_removing_tokens_gives_what_masking_them_gave(arguments: dict[str, Any]) -> None:
    gaug = arguments.get("gaug", False)
    encoder = tiny_encoder(**{key: value for key, value in arguments.items() if key != "gaug"}).eval()
    if gaug:
        encoder.attach_gaug((4, 4), seed=1)
    pruning = sharp_pruning(encoder)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    counts, before = pruning.counts(16), [torch.ones(3, 16)]

    def best(stage: int, log_probs: Tensor) -> Tensor:
        score = log_probs[..., 1].masked_fill(before[-1] == 0, -math.inf)
        keep = torch.zeros(3, 16).scatter(1, score.topk(counts[stage], dim=1).indices, 1.0)
        before.append(keep)
        return keep

    with torch.no_grad():
        masked, decisions = encode_masked(encoder, images, pruning, best)
        pruned = encode_pruned(encoder, images, pruning)
    assert counts == (11, 7, 5) and [int(keep.sum(1)[0]) for keep in decisions] == [11, 7, 5]
    places = decisions[-1].nonzero()[:, 1].view(3, 5)  # in raster order
    kept = masked.patches.gather(1, places[..., None].expand(-1, -1, 24))
    assert_close(pruned.patches, kept, rtol=1e-4, atol=1e-5)
    assert_close(pruned.prefix, masked.prefix, rtol=1e-4, atol=1e-5)
    assert len({tuple(row) for row in places.tolist()}) == 3  # each image has its own


def test_keeping_everything_is_the_plain_network() -> None:
    encoder = tiny_encoder().eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        pruned = encode_pruned(encoder, images, sharp_pruning(encoder), 1.0)
        assert torch.equal(pruned.patches, encoder.encode(images).patches)


def test_a_prediction_module_sees_the_token_and_the_mean_of_kept_ones() -> None:
    encoder = tiny_encoder()
    module = sharp_pruning(encoder).predictors[0]
    tokens = torch.randn(2, 6, 24, generator=torch.Generator().manual_seed(0))
    keep = torch.tensor([[1.0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0]])
    found = module(tokens, keep)
    assert_close(found.exp().sum(-1), torch.ones(2, 6))
    features = module.embed(tokens)
    mean = (features[0, 0, 12:] + features[0, 1, 12:] + features[0, 4, 12:]) / 3
    by_hand = torch.stack([torch.cat([features[0, i, :12], mean]) for i in range(6)])
    assert_close(found[0], module.decide(by_hand).log_softmax(-1))
    changed = tokens.clone()
    changed[0, 3] += 1
    again = module(changed, keep)
    assert torch.equal(again[0, :3], found[0, :3]) and not torch.equal(again[0, 3], found[0, 3])
    assert found[1].isfinite().all()  # nothing is left


def test_decisions_have_the_probabilities_and_their_gradient() -> None:
    probs = torch.tensor([0.1, 0.5, 0.8])
    log_probs = torch.stack([1 - probs, probs], dim=-1).log()[None].requires_grad_()
    uniform = sample_uniform(torch.arange(20_000), 6).double().add(2.0**-25).view(-1, 3, 2)
    keep = gumbel_keep(log_probs.expand(len(uniform), -1, -1), uniform)
    assert set(keep.unique().tolist()) == {0.0, 1.0}
    assert_close(keep.mean(0), probs, rtol=0, atol=0.015)  # four standard errors
    one = gumbel_keep(log_probs, uniform[:1])
    soft = (log_probs - (-uniform[:1].log()).log().float()).softmax(-1)[..., 1]
    (found,), (expected,) = (torch.autograd.grad(values.sum(), log_probs) for values in (one, soft))
    assert_close(found, expected)
    assert torch.equal(one, (soft > 0.5).float())


def test_the_ratio_loss_by_hand() -> None:
    first = torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 0]])  # 0.5 and 0.75, the target is 0.5
    second = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0]])  # 0.25 and 0.5, the target is 0.25
    assert ratio_loss([first, second], 0.5).item() == pytest.approx((0 + 0.25**2 + 0 + 0.25**2) / 4)
    assert ratio_loss([first[:1], second[:1]], 0.5) == 0


def test_the_teachers_losses_by_hand() -> None:
    tokens = torch.tensor([[[1.0, 0.0], [5.0, 5.0], [0.0, 2.0]], [[7.0, 7.0]] * 3])
    keep = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]], requires_grad=True)
    loss = kept_distillation(tokens.requires_grad_(), torch.zeros(2, 3, 2), keep)
    assert loss.item() == pytest.approx((0.5 + 2.0) / 2 / 2)  # two kept tokens; the second image has none
    loss.backward()
    assert keep.grad is None
    ours, theirs = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    p = 1 / (1 + math.exp(-2))
    assert class_divergence(ours, theirs).item() == pytest.approx((math.log(0.5 / p) + math.log(0.5 / (1 - p))) / 4)


def test_the_classes_teach_the_prediction_modules_and_what_is_dropped_stays_dropped(class_folders: Path) -> None:
    method = build(ratio_weight=0.0)
    views = views_of(method, class_folders)
    method(views, 0.5)["class"].backward()
    for name, parameter in method.predictors.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    images = method.encoder.normalize(views.global_crops)
    _, decisions = encode_masked(
        method.encoder, images, method.pruning, lambda s, p: gumbel_keep(p, method.noise(views.keys, s, 16))
    )
    assert len(decisions) == 3
    for before, after in itertools.pairwise(decisions):
        assert (after <= before).all() and after.sum() < before.sum()


def test_the_mean_of_kept_patches_is_classified_without_a_class_token(class_folders: Path) -> None:
    method = build("avg")
    features = method.encoder.encode(method.encoder.normalize(views_of(method, class_folders).global_crops))
    keep = torch.zeros(4, 16)
    keep[:, [2, 9]] = 1
    assert_close(method.pooled_kept(features, keep), features.patches[:, [2, 9]].mean(1))


@pytest.fixture(scope="module")
def classifier(class_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("classifier") / "run"
    return smalti.train("supervised", class_folders, out, overrides=merge(TINY, {"steps": 30}), quiet=True)


def weights_at_start(run: Path) -> dict[str, Tensor]:
    config = resolve(read_yaml(run / "config.yaml"))
    return build_method(config).state_dict()


def fine_tune(out: Path, start: Path, folder: Path, **more: Any) -> Path:
    settings = {key: value for key, value in TINY.items() if key != "encoder"}
    return smalti.train("dynamicvit", folder, out, init=str(start), overrides=merge(settings, more), quiet=True)


def test_a_run_learns_to_classify_from_what_it_keeps(class_folders: Path, tmp_path: Path) -> None:
    run = smalti.train("dynamicvit", class_folders, tmp_path / "run", overrides=merge(TINY, {"steps": 60}), quiet=True)
    encoder = smalti.load(run, quiet=True)
    pruning, head = encoder.token_pruning, encoder.class_head
    assert pruning is not None and (pruning.blocks, pruning.keep_ratio) == ((1, 2, 3), 0.7) and head is not None
    assert not any("predictor" in key for key in encoder.state_dict())  # exported without
    test = open_images(class_folders)
    pixels = smalti.load_images(test.paths, 32, mode="centre")
    with torch.no_grad():
        features = encode_pruned(encoder, pixels, pruning)
        guesses = (encoder.pooled(features) @ head.weight.T + head.bias).argmax(1)
    assert features.patches.shape[1] == 5
    assert (guesses == torch.tensor([sample.label for sample in test.samples])).float().mean() > 0.9


def test_a_run_from_a_classifier_has_it_as_teacher_and_starts_as_it(
    classifier: Path, class_folders: Path, tmp_path: Path
) -> None:
    run = fine_tune(tmp_path / "run", classifier, class_folders, log={"every": 1})
    assert {"loss/class", "loss/ratio", "loss/kl", "loss/distill"} <= read_csv(run / "log.csv")[0].keys()
    start, before = smalti.load(classifier, quiet=True), weights_at_start(run)
    assert torch.equal(before["head.weight"], start.class_head.weight)  # type: ignore[union-attr]
    assert torch.equal(before["teacher_head.module.weight"], before["head.weight"])
    for key, value in start.state_dict().items():
        assert torch.equal(before[f"teacher.module.{key}"], value), key
    plain = fine_tune(tmp_path / "plain", classifier, class_folders, method={"distill": False})
    assert not any(key.startswith("teacher") for key in weights_at_start(plain))


def test_a_resumed_run_goes_on_to_the_bit_even_if_its_start_is_gone(
    classifier: Path, class_folders: Path, tmp_path: Path
) -> None:
    start = tmp_path / "start"
    start.symlink_to(classifier)
    whole = fine_tune(tmp_path / "whole", start, class_folders, checkpoint={"every": 3})
    expected = smalti.load(whole, quiet=True).vit.state_dict()
    last = latest_checkpoint(whole)
    assert last is not None
    last.rename(tmp_path / "aside")
    start.unlink()
    again = smalti.load(runs.resume(whole, quiet=True), quiet=True).vit.state_dict()
    assert all(torch.equal(again[key], value) for key, value in expected.items())


def test_what_a_checkpoint_says_of_its_prediction_modules_is_checked(
    classifier: Path, class_folders: Path, tmp_path: Path
) -> None:
    last = latest_checkpoint(fine_tune(tmp_path / "run", classifier, class_folders, steps=1))
    assert last is not None
    state = json.loads((last / "state.json").read_text())
    for wrong in ({"blocks": [4]}, {"blocks": []}, {"keep_ratio": 2}, {"predictors": "none"}, {"blocks": None}):
        pruning = {**state["token_prunings"]["encoder"], **wrong}
        (last / "state.json").write_text(json.dumps({**state, "token_prunings": {"encoder": pruning}}))
        with pytest.raises(WeightsError, match=r"its state\.json says of the prediction modules is damaged"):
            smalti.load(last, quiet=True)


def test_prediction_modules_learn_faster_than_the_network_they_start_in() -> None:
    encoder = tiny_encoder()
    encoder.pretrained = True
    method = DynamicViT(encoder, DynamicViTConfig(num_classes=2))
    rates = {id(one): group["lr_scale"] for group in method.param_groups() for one in group["params"]}
    assert {rates[id(one)] for one in method.predictors.parameters()} == {1.0}
    assert {rates[id(one)] for one in (*method.encoder.parameters(), *method.head.parameters())} == {0.01}
    assert {group["lr_scale"] for group in build().param_groups()} == {1.0}


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"method": {"keep_ratio": 1.0}}, "method.keep_ratio=1.0: less than 1 is needed"),
        ({"method": {"keep_ratio": 0.0}}, "method.keep_ratio=0.0: more than 0 is needed"),
        ({"method": {"encoder_lr_scale": 0}}, "method.encoder_lr_scale=0"),
        ({"method": {"keep": 0.5}}, "method has no field 'keep'"),
        ({"pool": "map"}, "pool=map: dynamicvit classifies the class token or the mean of the kept patches"),
        ({"encoder": {"depth": 1}}, "has 1 block; dynamicvit drops tokens between blocks"),
    ],
)
def test_mistakes_are_one_line_each(more: dict[str, Any], line: str, class_folders: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=line):
        smalti.train("dynamicvit", class_folders, tmp_path / "run", overrides=merge(TINY, more), quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_start_that_cannot_teach_is_refused_before_anything_is_written(
    classifier: Path, class_folders: Path, photos: Path, tmp_path: Path
) -> None:
    no_head = smalti.train("mae", photos, tmp_path / "mae", overrides=merge(TINY, {"steps": 1}), quiet=True)
    with pytest.raises(ConfigError, match=r"is no classifier, so there is no teacher .* method\.distill=false"):
        fine_tune(tmp_path / "run", no_head, class_folders)
    three, other = tmp_path / "three", tmp_path / "other"
    for folder, names in ((three, ("a", "b", "c")), (other, ("green", "red"))):
        for name in names:
            shutil.copytree(class_folders / "train" / "red", folder / "train" / name)
    with pytest.raises(ConfigError, match="classifies 2 classes, the data have 3, so there is no teacher"):
        fine_tune(tmp_path / "run", classifier, three)
    with pytest.raises(DataError, match="has a class 'green' where the classifier of init has 'blue'"):
        fine_tune(tmp_path / "run", classifier, other)
    assert not (tmp_path / "run").exists()
    fine_tune(tmp_path / "run", no_head, class_folders, steps=1, method={"distill": False})
