"""Settings: strict, documented, with a nearest name for every wrong one."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from smalti.config import (
    Count,
    Seed,
    build,
    field_docs,
    merge,
    parse_overrides,
    read_yaml,
    settings,
    unfold,
    unknown_key,
)
from smalti.errors import ConfigError


@settings
class Inner:
    rate: float = 0.1
    """A rate."""


@settings
class Outer:
    steps: int = 10
    """How many."""
    inner: Inner = Inner()
    """Nested."""
    method: dict[str, Any] | None = None
    """A group that is a plain mapping."""


def test_numbers_that_yaml_reads_as_text_are_converted() -> None:
    assert build(Outer, parse_overrides(["inner.rate=1e-4"])).inner.rate == 1e-4


def test_a_wrong_key_names_its_group_and_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"inner has no field 'rat'; did you mean 'rate'\?"):
        build(Outer, {"inner": {"rat": 1}})


def test_a_wrong_key_far_from_all_lists_what_there_is() -> None:
    with pytest.raises(ConfigError, match="it has: inner, method, steps"):
        build(Outer, {"zzz": 1})


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("rate=1", "settings has no field 'rate'; did you mean 'inner.rate'?"),
        ("rat=1", "settings has no field 'rat'; did you mean 'inner.rate'?"),
        ("inner.steps=1", "inner has no field 'steps'; did you mean 'steps'?"),
        ("step=1", "settings has no field 'step'; did you mean 'steps'?"),
        ("inner.mask_ratio=1", "inner has no field 'mask_ratio'; did you mean 'method.mask_ratio'?"),
        ("mask_ratoi=1", "settings has no field 'mask_ratoi'; did you mean 'method.mask_ratio'?"),
        ("inner.rae=1", "inner has no field 'rae'; did you mean 'rate'?"),
    ],
)
def test_hints_look_across_groups(word: str, hint: str) -> None:
    with pytest.raises(ConfigError) as refused:
        build(Outer, {"method": {"mask_ratio": 0.5}, **parse_overrides([word])})
    assert str(refused.value) == f"settings: {hint}"


def test_of_equal_names_with_a_typing_error_an_outermost_is_named() -> None:
    assert "'data.channels'?" in unknown_key("chanels", ["seed"], elsewhere=["data.channels", "eval.signal.channels"])


def test_other_groups_are_named_only_for_typing_errors() -> None:
    line = unknown_key("steps", ["seed", "pool"], elsewhere=["eval.signal.stage_s"])
    assert line == "settings has no field 'steps'; it has: pool, seed"


def test_of_equal_names_the_outermost_are_named() -> None:
    line = unknown_key("every", ["seed"], elsewhere=["eval.every", "log.every", "data.signal.every"])
    assert line == "settings has no field 'every'; did you mean 'eval.every' or 'log.every'?"


def test_a_wrong_name_says_of_what_kind_it_is() -> None:
    assert unknown_key("knnn", ["knn"], kind="protocol") == "there is no protocol 'knnn'; did you mean 'knn'?"
    assert unknown_key("x", ["a", "b"], kind="recipe") == "there is no recipe 'x'; there are: a, b"
    assert unknown_key("x", ["a"], "--data", kind="reader") == "--data has no reader 'x'; it has: a"


def test_a_value_that_does_not_fit_is_named_with_its_key() -> None:
    with pytest.raises(ConfigError, match=r"here: steps='many': input should be a valid integer$"):
        build(Outer, {"steps": "many"}, "here")


def test_a_word_without_equals_sign_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'steps' is not of the form key=value"):
        parse_overrides(["steps"])


def test_a_name_and_dotted_keys_stand_together() -> None:
    assert unfold({"method": "mae", "method.mask_ratio": 0.6}) == {"method": {"name": "mae", "mask_ratio": 0.6}}
    assert merge({"method": {"name": "mae"}}, {"method": "dino"}) == {"method": {"name": "dino"}}


def test_settings_are_frozen_and_their_docs_are_kept() -> None:
    with pytest.raises(Exception, match="cannot assign"):
        Outer().steps = 3  # type: ignore[misc]
    assert field_docs(Outer)["steps"] == (10, "How many.")


def test_yaml_that_is_broken_or_no_mapping_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: [1,\nb: 2")
    with pytest.raises(ConfigError, match=r"a.yaml: not valid YAML at line 2"):
        read_yaml(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="holds a list, needs a mapping"):
        read_yaml(tmp_path / "b.yaml")
    with pytest.raises(ConfigError, match="can't be read"):
        read_yaml(tmp_path / "none.yaml")


@settings
class Counted:
    steps: Count = 1
    seed: Seed = 0
    rate: float = 0.1
    free: int = 0


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("steps=2001-99-99", "2001-99-99"),
        ("steps=2001-01-01", "2001-01-01"),
        ("steps=0x_", "0x_"),
        ("steps=!!int abc", "!!int abc"),
        ("steps=&a [*a]", "&a [*a]"),
        ("steps=" + "[" * 3000, "[" * 3000),
        ("steps=" + "9" * 5000, "9" * 5000),
    ],
)
def test_a_value_that_yaml_cannot_read_is_text_which_the_settings_type_refuses(word, value):
    assert parse_overrides([word]) == {"steps": value}
    with pytest.raises(ConfigError, match=r"steps=.*: (input should be a|unable to parse)") as refused:
        build(Counted, parse_overrides([word]))
    assert len(str(refused.value)) < 400 and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"steps": 0}, "steps=0: at least 1 is needed"),
        ({"steps": 2**63}, "steps=9223372036854775808: less than 2147483648 is needed"),
        ({"seed": 10**40}, "seed=1000.*: less than 4294967296 is needed"),
        ({"seed": -1}, "seed=-1: at least 0 is needed"),
        ({"rate": float("nan")}, "rate=nan: input should be a finite number"),
        ({"rate": "1e999"}, "rate='1e999': input should be a finite number"),
        ({"free": 2**63}, "free=9223372036854775808: an integer of at most 64 bits is needed"),
        ({"free": 16**9000}, "an integer of at most 64 bits is needed"),
    ],
)
def test_numbers_have_ranges_and_are_finite(tree, words):
    with pytest.raises(ConfigError, match=words):
        build(Counted, tree)


BOMB = "a: &a [1, 2]\n" + "".join(f"{b}: &{b} [{f'*{a}, ' * 10}]\n" for a, b in itertools.pairwise("abcdefg"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &a [*a]", "at line 1 .an alias contains itself"),
        ("a: " + "[" * 3000, "it is nested too deeply"),
        ("steps: !!int abc", "can't be read as a YAML file .invalid literal for int"),
        ("steps: " + "9" * 5000, "can't be read as a YAML file"),
        (BOMB, "its aliases expand to more than 100,000 values"),
        (f"{'a.' * 40}b: 1", "at most 16 dots"),
    ],
)
def test_a_recipe_that_is_a_trap_is_one_line(tmp_path, text, words):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words) as refused:
        read_yaml(path)
    assert "\n" not in str(refused.value)


def test_aliases_of_ordinary_size_and_dates_as_text_are_read(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("x: &x {a: 1}\ny: {<<: *x, b: 2}\nz: *x\nwhen: 2001-02-03\n")
    assert read_yaml(path) == {"x": {"a": 1}, "y": {"a": 1, "b": 2}, "z": {"a": 1}, "when": "2001-02-03"}
