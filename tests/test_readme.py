"""What the README says works: its commands run, in order, made small; its table is the registry's."""

import contextlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from command import smalti

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SMALL = (
    "encoder=vit_tiny_patch16_224 encoder.patch_size=8 encoder.embed_dim=24 encoder.depth=1 encoder.num_heads=3 "
    "data.image_size=32 batch_size=4 steps=4 method.decoder_dim=16 method.decoder_depth=1 method.decoder_num_heads=2"
).split()


def commands() -> list[list[str]]:
    """Every ``smalti`` command in the README's console blocks."""
    blocks = re.findall(r"```console\n(.*?)```", README, re.S)
    lines = [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    return [shlex.split(line)[1:] for line in lines if line.startswith("smalti ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, photos: Path, class_folders: Path) -> Path:
    """A working folder with IMAGES and LABELLED in it, in which the README's commands have run."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "IMAGES").symlink_to(photos)
    (folder / "LABELLED").symlink_to(class_folders)
    for words in commands():
        small = SMALL if words[0] in ("train", "doctor") and "--resume" not in words else []
        with contextlib.chdir(folder):
            smalti(*words, *small)
    return folder


def test_the_commands_run_in_order(folder: Path) -> None:
    assert len(commands()) >= 7
    assert (folder / "runs" / "a" / "report.html").is_file()
    assert (folder / "exported" / "config.json").is_file()
    assert (folder / "features.parquet").is_file()


def test_the_lines_of_python_run(folder: Path) -> None:
    code = (
        re.findall(r"```python\n(.*?)```", README, re.S)[0]
        .replace('"RUN"', '"runs/a"')
        .replace("PATHS", "sorted(__import__('pathlib').Path('IMAGES').iterdir())[:2]")
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("torch.Size([2, ")


def test_the_table_of_methods_is_the_registry_s() -> None:
    done = smalti("methods", "--markdown")
    assert done.stdout.strip() in README


def test_the_verbs_that_the_readme_names_exist() -> None:
    makefile = (Path(__file__).parents[1] / "Makefile").read_text(encoding="utf-8")
    for verb in set(re.findall(r"`?make ([a-z-]+)", README)):
        assert re.search(rf"^{verb}:", makefile, re.M), verb
