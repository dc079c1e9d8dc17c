"""``smalti compare``: arms and seeds under one budget, one table with intervals."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from smalti.cli.options import Debug, Out, Quiet, needed
from smalti.errors import RunError

if TYPE_CHECKING:
    from smalti.comparison.run import Comparison

NAME = "compare"


def command(
    plan: Annotated[Path, typer.Argument(metavar="PLAN.yaml", help="What is compared with what.", show_default=False)],
    out: Out = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare methods and checkpoints on your own images, under one budget, with seeds and intervals.

    A plan is YAML: data: DIR, evaluate: [{data: DIR, protocols: [knn]}], budget: {steps: 2000} (or images, or minutes),
    seeds: [0, 1, 2], settings: {encoder: ...} for all arms, arms: {NAME: {method: mae, method.mask_ratio: 0.6}, OTHER:
    {load: timm:NAME@FILE}, CONTROL: {load: random}}; load: random is the encoder of settings before training.
    Differences are against the first arm. The same command goes on where a comparison was stopped.
    """
    folder = needed(out, "--out", "DIR")

    from smalti.comparison.run import compare
    from smalti.report.comparison import write_comparison

    comparison = compare(plan, folder, quiet=quiet)
    page = write_comparison(comparison)
    _print(comparison)
    print(f"tables: {folder / 'comparison.md'}, {folder / 'comparison.parquet'}")
    print(f"report: {page}")
    if comparison.failures:
        broken = "; ".join(f"{arm}: {error}" for arm, error in comparison.failures.items())
        number, all_arms = len(comparison.failures), len(comparison.plan.arms)
        raise RunError(f"{number} of {all_arms} arms failed, the others are finished; {broken}")


def _print(comparison: "Comparison") -> None:
    from rich.console import Console
    from rich.table import Table

    from smalti.comparison.run import COST_COLUMNS, cost_cells
    from smalti.evaluation.paired import about_lines, gain_cells, table_cells

    console = Console(markup=False)
    first = next(iter(comparison.plan.arms))
    for title, rows in comparison.table():
        print(f"{title} ({rows[0].unit})")
        print("\n".join(about_lines(rows)))
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for name in ("arm", "mean", f"difference to {first}", ""):
            table.add_column(name, overflow="fold")
        for cells in table_cells(rows):
            arm, mean, _, gap, verdict = cells
            table.add_row(arm, mean, gap, verdict)
        console.print(table)
        if over := dict.fromkeys(row.gain_over for row in rows if row.gain_over):
            gains = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
            for name in ("arm", f"gain over {' or '.join(over)}", ""):
                gains.add_column(name, overflow="fold")
            for row in rows:
                if row.gain is not None:
                    gains.add_row(row.arm, *gain_cells(row))
            print()
            console.print(gains)
        print()
    print("cost, mean over seeds")
    costs = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("arm", *COST_COLUMNS):
        costs.add_column(name, overflow="fold")
    for arm, cost in comparison.costs.items():
        costs.add_row(arm, *cost_cells(cost))
    console.print(costs)
    print()
    notes = [f"In brackets: {comparison.info['intervals']}.", str(comparison.info.get("few_seeds", ""))]
    console.print("\n".join(filter(None, notes)), highlight=False, markup=False)
