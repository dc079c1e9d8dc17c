"""The public face is a short list of names, and importing it is quick."""

import subprocess
import sys

import pytest

import smalti


def test_every_public_name_is_there() -> None:
    assert sorted(smalti.__all__) == dir(smalti)
    for name in smalti.__all__:
        assert getattr(smalti, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = smalti.nothing


def test_importing_the_command_line_imports_nothing_heavy() -> None:
    code = (
        "import sys, smalti.cli.main; print([m for m in ('torch', 'timm', 'cv2', 'numpy', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
