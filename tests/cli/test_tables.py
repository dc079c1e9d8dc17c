"""Tables are printed whole."""

import pytest
from rich.table import Table
from rich.text import Text

from smalti.cli.tables import plain_table, print_table

NAMES = ("effective_rank_within_image", "foreground_iou_best_head")


def table_of(num_columns: int) -> Table:
    table = plain_table("metric", *(f"column {number}" for number in range(num_columns)))
    for name in NAMES:
        table.add_row(name, *(f"0.{number}09 [0.{number}00, 0.{number}18]" for number in range(num_columns)))
    return table


def test_in_a_pipe_a_row_is_a_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    print_table(table_of(8))
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.strip().endswith("column 7")
    assert [row.split()[0] for row in rows] == list(NAMES) and all("0.709 [0.700, 0.718]" in row for row in rows)


@pytest.mark.parametrize(("num_columns", "fits"), [(1, True), (4, True), (12, False)])
def test_on_a_terminal_columns_are_folded_between_words_and_nothing_is_lost(
    num_columns: int, fits: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    print_table(table_of(num_columns))
    shown = Text.from_ansi(capsys.readouterr().out).plain
    words = [word for name in NAMES for word in (name, "0.009", "[0.000,", "0.018]")]
    assert "…" not in shown and set(words) <= set(shown.split())
    assert len(shown.split()) == 1 + 2 * num_columns + 2 * (1 + 3 * num_columns)
    assert (max(map(len, shown.splitlines())) <= 80) == fits


def test_brackets_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    table = plain_table("a")
    table.add_row("[red]x[/red]")
    print_table(table)
    assert "[red]x[/red]" in capsys.readouterr().out
