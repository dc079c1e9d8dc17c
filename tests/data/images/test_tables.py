import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smalti.data.images.folders import LeftOut, open_images
from smalti.data.images.labelled import open_labelled
from smalti.errors import DataError

ROWS = [
    {"path": "a.png", "label": "cat", "split": "train", "group": "p1"},
    {"path": "b.png", "label": "dog", "split": "train", "group": "p1"},
    {"path": "sub/c.png", "label": "cat", "split": "valid", "group": "p2"},
]


@pytest.fixture
def files(write, tmp_path):
    for row in ROWS:
        write(row["path"])
    return tmp_path


def save(path, rows):
    if path.suffix == ".csv":
        lines = [",".join(rows[0]), *(",".join(str(value) for value in row.values()) for row in rows)]
        path.write_text("\ufeff" + "\r\n".join(lines) + "\r\n", encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_a_table_has_labels_splits_and_groups(files, ending):
    table = save(files / f"labels{ending}", ROWS)
    images = open_images(table)
    assert images == open_images(f"table={table}")
    assert images.describe() == "table: 3 images (train 2, val 1), 2 classes"
    assert [(sample.label, sample.split, sample.group) for sample in images.samples] == [
        (0, "train", "p1"),
        (1, "train", "p1"),
        (0, "val", "p2"),
    ]
    assert open_labelled(table, need="labels").note == "learned from train (2), evaluated on val (1)"


def test_a_table_of_paths_alone_has_no_classes(files):
    images = open_images(save(files / "t.csv", [{"path": row["path"], "when": "now"} for row in ROWS]))
    assert images.classes is None and images.account() == "table: 3 images; not read: column when"


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ([("a.png", "cat", "train"), ("./a.png", "dog", "train")], "a.png has two labels; an image needs one row"),
        ([("a.png", "cat", "train"), ("a.png", "cat", "test")], "a.png has two splits; an image needs one row"),
        ([("~nobody-here/a.png", "cat", "train")], "1 of 1 files don't exist, the first: ~nobody-here/a.png"),
    ],
    ids=["labels", "splits", "no such user"],
)
def test_rows_that_contradict_each_other_or_name_nothing_are_refused(files, rows, line):
    table = save(files / "t.csv", [dict(zip(("path", "label", "split"), row, strict=True)) for row in rows])
    with pytest.raises(DataError, match=re.escape(line)):
        open_images(table)


def test_a_row_that_repeats_an_image_is_counted_and_read_once(files):
    with pytest.warns(LeftOut, match="1 row that repeats an image"):
        assert len(open_images(save(files / "t.csv", [ROWS[0], *ROWS]))) == 3


def test_a_file_that_is_no_table_is_one_line(files):
    (files / "t.tsv").write_text("path\tlabel\n")
    with pytest.raises(DataError, match=r"t.tsv: no table that can be read; save it as .csv, .jsonl, .parquet"):
        open_images(f"table={files / 't.tsv'}")


def test_whole_numbers_as_labels_are_sorted_by_value(files):
    rows = [{"path": row["path"], "label": number} for row, number in zip(ROWS, (10, 2, 1), strict=True)]
    assert open_images(save(files / "t.parquet", rows)).classes == ("1", "2", "10")


def test_groups_of_a_table_stay_whole_in_a_seeded_split(write, tmp_path):
    rows = [{"path": f"{i}.png", "label": "ab"[i % 2], "group": f"g{i // 4}"} for i in range(20)]
    for row in rows:
        write(row["path"])
    data = open_labelled(save(tmp_path / "t.csv", rows), need="labels")
    parts = [{sample.group for sample in part.samples} for part in (data.train, data.test)]
    assert len(parts[0]) == 4 and len(parts[1]) == 1 and not parts[0] & parts[1]
    assert "by groups" in data.note


def test_rows_without_a_split_are_counted(files):
    with pytest.warns(LeftOut, match="left out: 1 row without a split"):
        assert len(open_images(save(files / "t.csv", [*ROWS[:2], ROWS[2] | {"split": ""}]))) == 2


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ([{"file": "a.png"}], "has no column 'path'; it has: file. Columns that are read: path, label, split, group"),
        ([{"path": "no.png"}], r"1 of 1 files don't exist, the first: no.png \(row 2\); paths are relative to the tab"),
        ([{"path": "a.png", "split": "holdout"}], "'holdout' is no split; known are train or training; val"),
        (
            [{"path": "a.png", "label": "x"}, {"path": "b.png", "label": ""}],
            "1 of 2 rows have no label, the first: row",
        ),
    ],
)
def test_tables_that_can_t_be_used_are_one_line(files, rows, line):
    with pytest.raises(DataError, match=line):
        open_images(save(files / "t.csv", rows))


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("t.csv", b"path\n\xff\n", "not a CSV table in UTF-8"),
        ("t.csv", b"path\na.png,b.png\n", "row 2 has more cells than the first row"),
        ("t.csv", b"path\n", "a table without rows"),
        ("t.csv", b"[" * 100_000, "has no column 'path'"),
        ("t.txt", b"[" * 100_000, "1 of 1 files don't exist"),
        ("t.csv", b"path,label,label\na.png,cat,dog\n", "has two columns named 'label'; keep one"),
        ("t.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("t.jsonl", b'["a.png"]\n', "line 1 needs an object with 'path'"),
        ("t.jsonl", b'{"path": "a.png", "label": 1.5}\n', "row 1 holds 1.5; cells need text or whole numbers"),
        ("t.parquet", b"PAR1", "can't be read as Parquet"),
        ("t.csv", b"path\na\x00.png\n", "don't exist"),
    ],
)
def test_damaged_tables_are_one_line(files, name, content, line):
    (files / name).write_bytes(content)
    with pytest.raises(DataError, match=line) as refused:
        open_images(files / name)
    assert len(str(refused.value)) < 1000


def test_a_list_may_have_labels(files):
    (files / "l.txt").write_text("a.png cat\nb.png dog\nsub/c.png cat\n")
    images = open_images(files / "l.txt")
    assert images.layout == "list" and images.classes == ("cat", "dog")
    assert [sample.label for sample in images.samples] == [0, 1, 0]


def test_a_list_finds_decomposed_names(write, tmp_path):
    write("\u00e9t\u00e9.png")
    (tmp_path / "l.txt").write_text("e\u0301te\u0301.png\n", encoding="utf-8")
    assert open_images(tmp_path / "l.txt").paths == (tmp_path / "\u00e9t\u00e9.png",)
