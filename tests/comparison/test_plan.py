"""Plans that come with Smalti: found by name, on data that ``smalti samples`` writes, and every arm can train."""

import dataclasses
from pathlib import Path

import pytest

from command import smalti
from smalti.comparison.plan import read_plan
from smalti.comparison.run import compare
from smalti.errors import ConfigError
from smalti.runs.recipes import plan_files


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> Path:
    """The images that the plans name, fewer of them."""
    folder = tmp_path_factory.mktemp("plans")
    few = ("num_train=4", "num_val=4", "num_objects_train=24", "num_objects_val=12")
    smalti("samples", "--out", folder / "samples", "--quiet", *few)
    return folder


@pytest.mark.parametrize("file", plan_files(), ids=lambda file: file.stem)
def test_each_arm_of_a_plan_trains(file, samples, tmp_path, monkeypatch):
    monkeypatch.chdir(samples)
    plan = read_plan(file.name)
    assert plan == read_plan(file.stem) and len(plan.seeds) >= 3 and len(plan.arms) > 1
    assert Path(plan.data) == samples / "samples/objects"
    arms = {name: {**arm, "batch_size": 4} for name, arm in plan.arms.items()}
    few = tuple({**entry, "protocols": ["knn"]} for entry in plan.evaluate)
    settings = {**plan.settings, "encoder": {**plan.settings["encoder"], "depth": 1, "embed_dim": 48}, "batch_size": 4}
    small = dataclasses.replace(plan, arms=arms, evaluate=few, settings=settings, budget={"steps": 2}, seeds=(0,))
    result = compare(small, tmp_path / "out", quiet=True, isolate=False)
    assert not result.failures and result.arms == tuple(plan.arms)


def test_an_unknown_plan_names_the_nearest():
    with pytest.raises(ConfigError, match=r"part_head\.yaml.*part_heads\.yaml"):
        read_plan("part_head.yaml")
