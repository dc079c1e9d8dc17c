"""Whatever a parser raises about a user's file becomes one of our errors, in one line."""

import json
from pathlib import Path

import pytest

from smalti.errors import ConfigError, DataError, WeightsError
from smalti.reading import read_csv, read_json, read_mapping, reading, shorten


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (KeyError("grid"), "it lacks 'grid'"),
        (
            TypeError("string indices must be integers"),
            "it has an unexpected structure: string indices must be integers",
        ),
        (RecursionError("maximum recursion depth exceeded"), "it is nested too deeply"),
        (MemoryError(), "it needs more memory than is available"),
        (FileNotFoundError(2, "No such file or directory"), "No such file or directory"),
        (OverflowError("cannot convert float infinity to integer\nmore"), "cannot convert float infinity to integer"),
        (ValueError(), "ValueError"),
    ],
)
def test_every_exception_becomes_one_line_that_names_the_file(problem: Exception, expected: str) -> None:
    with (
        pytest.raises(WeightsError) as refused,
        reading(Path("a.bin"), "a file of numbers", WeightsError, "make another"),
    ):
        raise problem
    assert str(refused.value) == f"a.bin: can't be read as a file of numbers ({expected}); make another"
    assert refused.value.__cause__ is problem


def test_errors_of_ours_and_interruptions_pass_as_they_are() -> None:
    for kind in (ConfigError, KeyboardInterrupt):
        with pytest.raises(kind, match=r"^as it is$"), reading(Path("a"), "a file"):
            raise kind("as it is")


@pytest.mark.parametrize(
    "content", [b"", b"[" * 100_000, b"\xff\xfe", b"9" * 5000, b'{"a": 1', b'{"a": "' + b"x" * 10_000]
)
def test_json_that_is_none_is_refused_in_a_short_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.json: can't be read as a JSON file \(") as refused:
        read_json(tmp_path / "a.json")
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < len(str(tmp_path)) + 300


def test_a_mapping_is_needed_where_a_reader_asks_for_one(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([1, 2]))
    with pytest.raises(DataError, match=r"a\.json: .*it holds a list, an object is needed"):
        read_mapping(tmp_path / "a.json", "notes")
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert read_mapping(tmp_path / "a.json") == {"a": 1}


def test_a_table_leaves_out_a_row_that_was_cut_short_and_refuses_bytes(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("step,loss\n1,2.0\n2")
    assert read_csv(path) == [{"step": "1", "loss": "2.0"}]
    path.write_bytes(b"step,loss\n\xff\x00,2")
    with pytest.raises(DataError, match=r"log\.csv: can't be read as a CSV file \(it isn't UTF-8 text"):
        read_csv(path)


def test_long_texts_keep_their_ends() -> None:
    assert shorten("one\ntwo") == "one"
    assert len(shorten("a" * 5000 + "end")) <= 200 and shorten("a" * 5000 + "end").endswith("end")
