"""Choosing an encoder: rounds, costs, the sentence, and what is refused."""

import dataclasses
import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats

from smalti.choosing.adapt import parse_way
from smalti.choosing.candidates import Candidate, candidates_of, layers_of, short_name
from smalti.choosing.choose import (
    CHOICE,
    ChooseConfig,
    adapt_in_time,
    choose,
    export_command,
    spearman_interval,
    write_choice,
)
from smalti.choosing.cost import pareto
from smalti.choosing.frozen import Round, Search, few, is_below, search, survivors
from smalti.choosing.shared import Passes, SharedFeatures
from smalti.errors import ConfigError, RunError
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.evaluate import open_sets
from smalti.evaluation.features import Features
from smalti.evaluation.intervals import Interval
from smalti.evaluation.paired import Row
from smalti.models.build import build_encoder
from smalti.models.inner_layers import InnerLayers
from smalti.report.choice import write_choice_page

LINEAR = {"linear-segmentation": {"epochs": 1}}


def small(depth: int = 4):
    return build_encoder("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=depth, seed=0).eval()


def load(spec: str):
    return small({"deep": 4, "flat": 1}[spec])


def row(name: str, mean: float, low: float = math.nan, high: float = math.nan) -> Row:
    gap = None if math.isnan(low) else Interval((low + high) / 2, low, high, "images")
    return Row("data", "knn", "top1", "higher", name, Interval(mean, mean, mean, "images"), {0: mean}, gap, True)


def test_readings_are_blocks():
    assert [layers_of(reading, 12) for reading in ("last", "3/4", "1/2", "last4")] == [
        (12,),
        (9,),
        (6,),
        (9, 10, 11, 12),
    ]
    assert layers_of("1/2", 1) == (1,) and layers_of("last4", 2) == (1, 2)
    found = list(candidates_of("flat", small(1), ("last", "3/4", "1/2", "last4"), ()))
    assert [(one.layers, one.image_size) for one in found] == [((1,), 32), ((1,), 64)]
    assert len(list(candidates_of("flat", small(1), ("last",), (), own_size_only=True))) == 1
    assert found[0].name == "flat, last layer (1), 32 px"
    assert Candidate("x", (3,), 4, 32).reading == "layer 3 of 4"
    assert short_name("timm:vit@/a/b/c.safetensors") == "timm:vit@c.safetensors" and short_name("a/runs/b") == "runs/b"


def test_layers_share_a_pass(scenes):
    encoder = small()
    config = EvalConfig(protocols=("in-context",), image_size=32)
    data = open_sets(str(scenes), config)["masks"]
    passes, blocks = Passes(encoder, [4, 2, 3], 64), list[int]()
    assert passes.layers == (2, 3, 4)
    for layers in ([4], [2], [3, 4]):
        read = InnerLayers(encoder, layers)
        (expected, places), *_ = Features(read, data, batch_size=4).tokens("test", 32).batches(batch_size=8)
        hook = encoder.vit.blocks[0].register_forward_hook(lambda *_: blocks.append(1))
        shared = SharedFeatures(read, data, passes=passes, batch_size=4)
        (tokens, same), *_ = shared.tokens("test", 32).batches(batch_size=8)
        hook.remove()
        assert same == places and torch.equal(tokens, expected)
    assert len(blocks) == 2 and len(passes.found) == 1  # two batches of the first of three readings
    without = SharedFeatures(InnerLayers(encoder, [2]), data, passes=Passes(encoder, [2], 0), batch_size=4)
    assert len(list(without.tokens("test", 32).batches())) and not without._passes.found


def test_intervals_decide_then_the_lower_half_is_dropped():
    rows = (row("a", 0.9), row("b", 0.8, -0.3, 0.1), row("c", 0.7, -0.4, -0.1), *(row(x, 0.5, -1, 1) for x in "defgh"))
    kept, dropped = survivors(Round(8, 8, (), rows))
    assert kept == ["a", "b", "d", "e"]
    assert dropped["c"] == "its interval lies below the best" and "lower half" in dropped["f"]
    assert is_below(rows[2].difference) and not is_below(rows[0].difference)


def test_draws_are_nested(scenes):
    data = open_sets(str(scenes), EvalConfig(protocols=("in-context",)))["masks"]
    names = [set(few(data, number, 0).train.paths) for number in (3, 6, 99)]
    assert [len(one) for one in names] == [3, 6, 16] and names[0] < names[1] < names[2]


def test_search_ends_with_all_images(scenes):
    config = EvalConfig(protocols=("in-context", "knn-patch"), baseline=False)
    what = Search(str(scenes), open_sets(str(scenes), config), config, config.protocols, load)
    candidates = [one for spec in ("deep", "flat") for one in candidates_of(spec, load(spec), ("last", "1/2"), [32])]
    rounds, unscored = search(candidates, what, 1e9, 4)
    assert not unscored and len(rounds[0].scores) == 3 and rounds[0].num_test == 4
    assert len(rounds[1].scores) <= 2 and set(rounds[1].scores[0].results) == {"in-context", "knn-patch"}
    assert rounds[0].dropped and not rounds[-1].dropped
    scores = [one.score.mean for one in rounds[0].rows]
    assert scores == sorted(scores, reverse=True)
    _, left_out = search(candidates, what, 0.0, 4)
    assert len(left_out) == 2  # the first candidate is scored whatever it takes


def test_the_front_and_the_correlation():
    points = {"slow": (9.0, 0.5), "best": (4.0, 0.9), "fast": (1.0, 0.3), "beaten": (5.0, 0.8), "same": (1.0, 0.2)}
    assert pareto(points) == ["fast", "best"]
    rng = np.random.default_rng(1)
    first = rng.normal(size=12)
    second = first + rng.normal(size=12)
    mean, low, high = spearman_interval(first, second)
    assert mean == pytest.approx(stats.spearmanr(first, second).statistic) and low < mean < high
    assert math.isnan(spearman_interval(np.zeros(5), np.arange(5))[0])


def test_what_the_budget_does_not_allow_is_not_tried(choice):
    found, _ = choice
    done = dataclasses.replace(found.rounds[-1], scores=(dataclasses.replace(found.best, seconds=10.0),))
    ways, asked = [parse_way("neco"), parse_way("diet")], []

    def run(best, encoder, ways, *, config, minutes):
        asked.append(([way.name for way in ways], minutes))
        raise RunError("stopped")

    what = Search("x", {}, EvalConfig(), ("dense-structure",), load)
    adapt = partial(adapt_in_time, done, {found.best.candidate.encoder: small()}, ways, what)
    assert adapt(60 / 60, run) == ([], dict.fromkeys(("neco", "diet"), "not tried, no time was left of the budget"))
    assert adapt(80 / 60, run)[1]["neco"] == "stopped" and adapt(140 / 60, run)[1] == dict.fromkeys(
        ("neco", "diet"), "stopped"
    )
    assert asked == [(["neco"], pytest.approx(0.5)), (["neco", "diet"], pytest.approx(25 / 60))]


@pytest.fixture(scope="module")
def choice(greys, tmp_path_factory):
    out = tmp_path_factory.mktemp("choice") / "out"
    config = ChooseConfig(
        layers=("last", "1/2"), image_sizes=(32,), adapt=("diet",), protocols=("knn",), first_images=4
    )
    return (
        choose(["deep", "flat"], str(greys), out, load, config, EvalConfig(), minutes=60.0, quiet=True, isolate=False),
        out,
    )


def test_the_choice_is_a_sentence_and_a_page(choice):
    found, out = choice
    first = found.sentences[0]
    assert first.startswith("Use ") and "knn top1" in first and found.best.candidate.name in first
    assert found.sentences[-1].startswith("Adapting: ")  # "deep" is no name that a run can load
    path = write_choice(found, out)
    content = json.loads(path.read_text())
    assert path.name == CHOICE and content["sentences"] == found.sentences
    assert set(content["agreement"]) <= {"dense-structure dse", "effective-rank rankme_patches", "position position_r2"}
    text = write_choice_page(found, out, "smalti choose").read_text()
    assert "Quality against time" in text and first.split(":")[0] in text
    assert set(found.front(found.rounds[-1])) <= {one.arm for one in found.rounds[-1].rows}
    few_left = dataclasses.replace(found, unscored=("x",))
    assert "did not suffice for 1 of" in few_left.sentences[-1]


def test_the_command_that_exports_the_best(choice):
    found, _ = choice

    def best(layers):
        score = dataclasses.replace(found.rounds[-1].scores[0], candidate=Candidate("runs/a", layers, 4, 32))
        last = dataclasses.replace(found.rounds[-1], scores=(score,))
        return export_command(dataclasses.replace(found, rounds=(last,)))

    assert best((4,)) == "smalti export runs/a to=timm --out DIR"
    assert best((3,)) == "smalti export runs/a to=timm load.depth=3 --out DIR"
    assert "forward_intermediates(indices=[2, 3])" in best((3, 4))


def test_what_is_refused(greys, tmp_path):
    def run(encoders=("deep",), minutes=1.0, out=tmp_path / "new", **settings):
        choose(encoders, str(greys), out, load, ChooseConfig(**settings), minutes=minutes)

    with pytest.raises(ConfigError, match="named twice"):
        run(["deep", "deep"])
    with pytest.raises(ConfigError, match="no encoders are named"):
        run([])
    with pytest.raises(ConfigError, match="a number above 0 is needed"):
        run(minutes=0)
    with pytest.raises(ConfigError, match="holds no earlier choice"):
        (tmp_path / "else").mkdir()
        (tmp_path / "else" / "file").write_text("x")
        run(out=tmp_path / "else")
    with pytest.raises(ConfigError, match=r"adapt=lora:0: full, norms, last:N or lora:R is needed"):
        run(adapt=("neco:lora:0",))
    with pytest.raises(ConfigError, match=r"image_sizes=\[32, 64\]: dense-structure depends on the image size itself"):
        run(image_sizes=(32, 64), protocols=("dense-structure",))
    with pytest.raises(ConfigError, match="recipe"):
        parse_way("mea")
    assert not (tmp_path / "new").exists()
