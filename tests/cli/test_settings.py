"""``smalti settings``: all settings, of the classes themselves."""

import re

import pytest

from command import smalti
from smalti.cli import settings as settings_command
from smalti.config import all_keys, field_names
from smalti.methods.base import get_method, method_names
from smalti.runs.config import RunConfig


def keys(*words: str) -> list[str]:
    return re.findall(r"^([\w.*-]+) \(", smalti("settings", *words).stdout, re.M)


def test_all_settings_of_training_are_listed_once() -> None:
    assert set(keys()) == {key for key in all_keys(RunConfig) if key.partition(".")[0] != "method"}
    assert len(keys()) == len(set(keys()))


def test_every_setting_has_a_meaning() -> None:
    for method in method_names():
        assert all(setting.meaning for setting in settings_command.run_settings(method))


def test_a_group_a_key_and_a_method_are_found() -> None:
    assert keys("optim") == keys("optim.*") == [key for key in all_keys(RunConfig) if key.startswith("optim.")]
    assert keys("optim.lr") == ["optim.lr"] and keys("steps") == ["steps"]
    assert keys("mae") == [f"method.{name}" for name in field_names(get_method("mae").Config)]
    shown = smalti("settings", "method.mask_ratio", "--method", "mae").stdout
    assert shown.startswith("method.mask_ratio (float, default 0.75)\n    ")


def test_a_method_has_defaults_of_its_own() -> None:
    assert "optim.weight_decay (float >= 0, default 0.05)" in smalti("settings", "optim", "--method", "mae").stdout
    assert "optim.clip_norm (float > 0 or null, default null)" in smalti("settings", "optim", "--method", "mae").stdout
    assert "optim.clip_norm (float > 0 or null, default 3.0)" in smalti("settings", "optim").stdout


@pytest.mark.parametrize("verb", settings_command.VERBS)
def test_commands_with_settings_of_their_own_have_them_in_help(verb: str) -> None:
    shown, own = " ".join(smalti(verb, "--help").stdout.split()), keys(verb)
    assert own
    for key in own:
        group = key.partition(".")[0] + ".*"
        assert f" {key}" in shown or group in shown or f"{key}.*" in shown, key


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["optim.lrr"], "optim has no setting 'lrr'; did you mean 'lr'?"),
        (["channels"], "'channels'; did you mean 'data.channels'?"),
        (["mask_ratio"], "'mask_ratio'; did you mean 'method.mask_ratio'?"),
        (["lr"], "'lr'; did you mean 'optim.lr'?"),
        (["mea"], "'mea'; did you mean 'mae'?"),
        (["exprot"], "'exprot'; did you mean 'export'?"),
        (
            ["method.mask_ratio"],
            "depends on the method; name it, for example smalti settings method.mask_ratio --method",
        ),
        (["method.mask_ration", "--method", "mae"], "method has no setting 'mask_ration'; did you mean 'mask_ratio'?"),
        (["optim", "--method", "mea"], "there is no method 'mea'; did you mean 'mae'?"),
    ],
)
def test_a_wrong_name_gets_the_nearest(words: list[str], line: str) -> None:
    done = smalti("settings", *words, code=2)
    assert line in done.stderr and len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
