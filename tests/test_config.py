"""Settings: strict, documented, with a nearest name for every wrong one."""

from pathlib import Path

import pytest

from smalti.config import build, field_docs, merge, parse_overrides, read_yaml, settings, unfold
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


def test_numbers_that_yaml_reads_as_text_are_converted() -> None:
    assert build(Outer, parse_overrides(["inner.rate=1e-4"])).inner.rate == 1e-4


def test_a_wrong_key_names_its_group_and_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"inner has no field 'rat'; did you mean 'rate'\?"):
        build(Outer, {"inner": {"rat": 1}})


def test_a_wrong_key_far_from_all_lists_what_there_is() -> None:
    with pytest.raises(ConfigError, match="it has: inner, steps"):
        build(Outer, {"zzz": 1})


def test_a_value_that_does_not_fit_is_named_with_its_key() -> None:
    with pytest.raises(ConfigError, match=r"here: steps='many': input should be a valid integer"):
        build(Outer, {"steps": "many"}, "here")


def test_a_word_without_equals_sign_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'steps' is not a setting; write key=value"):
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
