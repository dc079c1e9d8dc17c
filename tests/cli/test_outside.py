"""Methods and protocols of other packages: by ``--import``, and by entry points. (src/smalti/registry.py)"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from command import smalti
from smalti import registry
from smalti.evaluation import protocol
from smalti.methods import base

METHOD = '''
from smalti.config import settings
from smalti.methods.base import register
from smalti.methods.mae import MAE, MAEConfig

@settings
class OwnConfig(MAEConfig):
    name: str = "NAME"
    twist: float = 0.25
    """How far to twist."""

@register("NAME")
class Own(MAE):
    Config = OwnConfig
    title = "a method of my own"
    paper = "none"
'''
PROTOCOL = '''
from smalti.evaluation.protocol import Scores, register_protocol

@register_protocol("own-score", need="images")
def own_score(features, config):
    """A score of my own."""
    return Scores({"half": 0.5}, {}, {})
'''
UNNAMED = """
from smalti.methods.base import register
from smalti.methods.mae import MAE

@register("unnamed")
class Unnamed(MAE):
    title = "settings of another method"
    paper = "none"
"""
TINY = (
    "encoder=vit_tiny_patch16_224 encoder.patch_size=8 encoder.embed_dim=24 encoder.depth=1 encoder.num_heads=3 "
    "data.image_size=32 batch_size=4 steps=1 method.decoder_dim=16 method.decoder_depth=1 method.decoder_num_heads=2"
).split()


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Registries, imported modules and search path are as before afterwards; the working directory is empty."""
    monkeypatch.setattr(base, "_REGISTRY", {**base._REGISTRY})
    monkeypatch.setattr(protocol, "_REGISTRY", {**protocol._REGISTRY})
    monkeypatch.setattr(registry, "_imported", set())
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv(registry.IMPORTS, "")
    monkeypatch.chdir(tmp_path)
    yield
    for name, module in list(sys.modules.items()):
        if str(tmp_path) in str(getattr(module, "__file__", "")):
            del sys.modules[name]


def install(folder: Path, package: str, group: str, source: str | None) -> None:
    """A package with an entry point, as pip would leave it; without a source its module is missing."""
    folder.mkdir(exist_ok=True)
    if source is not None:
        (folder / f"{package}_module.py").write_text(source)
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\nanything = {package}_module\n")
    sys.path.append(str(folder))


def test_a_method_of_a_file_is_listed_explained_and_trained(tmp_path: Path, photos: Path) -> None:
    file = tmp_path / "own_method.py"
    file.write_text(METHOD.replace("NAME", "own"))
    assert "a method of my own" in smalti("methods", "--import", file).stdout
    assert "own_method" not in sys.modules
    assert "method.twist (float, default 0.25)\n    How far" in smalti("settings", "own", "--import", file).stdout
    done = smalti("train", "own", "--import", file, "--data", photos, "--out", tmp_path / "run", *TINY, "--quiet")
    assert "trained:" in done.stdout
    assert "method.twist" in smalti("settings", "method.twist", "--method", "own").stdout  # known from here on


def test_a_protocol_of_a_module_in_the_working_directory_is_listed_and_run(tmp_path: Path, photos: Path) -> None:
    (tmp_path / "own_protocol.py").write_text(PROTOCOL)
    words = ("random:vit_tiny_patch16_224", "--data", photos, "--protocol", "own-score", "--quiet")
    assert "there is no protocol 'own-score'" in smalti("evaluate", *words, code=2).stderr
    done = smalti("evaluate", *words, "--import", "own_protocol")
    assert "own-score" in done.stdout and "0.500" in done.stdout
    assert "own-score: A score of my own" in " ".join(smalti("evaluate", "--help").stdout.split())


def test_child_processes_know_what_was_imported(tmp_path: Path) -> None:
    (tmp_path / "own_method.py").write_text(METHOD.replace("NAME", "own"))
    registry.use_modules([str(tmp_path / "own_method.py")])
    code = "from smalti.methods.base import get_method; print(get_method('own').title)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "a method of my own\n"


def test_entry_points_are_listed_and_imported(tmp_path: Path) -> None:
    install(tmp_path / "site", "own", "smalti.methods", METHOD.replace("NAME", "own"))
    install(tmp_path / "site", "scores", "smalti.protocols", PROTOCOL)
    assert registry.listed("method")["own"].summary == "a method of my own"
    assert registry.listed("protocol")["own-score"].summary == "A score of my own"
    assert not {"own_module", "scores_module"} & sys.modules.keys()
    assert base.get_method("own").title == "a method of my own"
    assert protocol.find_protocol("own-score").summary == "A score of my own."


def test_a_clash_of_names_is_one_line_that_names_the_package(tmp_path: Path) -> None:
    install(tmp_path / "site", "thief", "smalti.methods", METHOD.replace("NAME", "mae"))
    for words in (["methods"], ["settings", "mae"]):
        done = smalti(*words, code=2)
        assert "package thief (entry point anything): two methods are named 'mae': " in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_package_that_cannot_be_imported_is_left_out_with_a_line(tmp_path: Path) -> None:
    install(tmp_path / "site", "broken", "smalti.methods", "import nothing_of_that_name\n")
    with pytest.warns(
        UserWarning, match="package broken .*can't be imported .ModuleNotFoundError.*methods are not available"
    ):
        assert "mae" in base.method_names()
    assert "mae" in base.method_names()  # said once
    install(tmp_path / "site", "gone", "smalti.methods", None)
    with pytest.warns(UserWarning, match="package gone"):
        base.method_names()
    assert "mae" in registry.listed("method")


@pytest.mark.parametrize(
    ("module", "source", "line"),
    [
        ("nowhere", None, "--import nowhere: "),
        ("wrong.py", "def f(:\n", "wrong.py: can't be imported (SyntaxError: "),
        ("wrong", "raise RuntimeError('because')\n", "--import wrong: can't be imported (RuntimeError: because)"),
        ("json.py", "x = 1\n", "json.py: another module is named 'json'"),
        (
            "wrong.py",
            METHOD.replace("NAME", "mae"),
            "two methods are named 'mae': smalti.methods.mae and wrong; rename",
        ),
    ],
)
def test_a_mistake_in_import_is_one_line(module: str, source: str | None, line: str, tmp_path: Path) -> None:
    if source is not None:
        (tmp_path / f"{module.removesuffix('.py')}.py").write_text(source)
    done = smalti("settings", "optim", "--method", "dino", "--import", module, code=2)
    assert line in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_missing_module_is_said_by_the_list_of_methods() -> None:
    assert "--import nowhere: the module doesn't exist" in smalti("methods", "--import", "nowhere", code=2).stderr


def test_a_method_whose_settings_name_another_is_refused(tmp_path: Path) -> None:
    (tmp_path / "unnamed.py").write_text(UNNAMED)
    done = smalti("settings", "unnamed", "--import", "unnamed.py", code=2)
    assert "method unnamed: the field name of MAEConfig says 'mae'; add name: str = \"unnamed\"" in done.stderr
