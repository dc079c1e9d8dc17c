"""``smalti compare``: arms and seeds under one budget, one table with intervals."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from smalti.cli import completion
from smalti.cli.options import Debug, Imports, Out, Quiet, needed
from smalti.errors import RunError

if TYPE_CHECKING:
    from smalti.comparison.outcome import Comparison

NAME = "compare"


def command(
    plan: Annotated[
        Path,
        typer.Argument(
            metavar="PLAN.yaml",
            help="The plan: a file, or the name of one that comes with Smalti.",
            show_default=False,
            autocompletion=completion.plans,
        ),
    ],
    out: Out = None,
    imports: Imports = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare methods and checkpoints under one budget, with seeds.

    A plan is YAML:

    ```yaml
    data: IMAGES  # or recordings
    evaluate: [{data: LABELLED, protocols: [knn]}]
    budget: {steps: 2000}  # or images, or minutes
    seeds: [0, 1, 2]
    settings: {encoder: vit_tiny_patch16_224}  # of all arms
    arms:
      mae: {method: mae, method.mask_ratio: 0.6}
      imported: {load: timm:NAME@FILE}
      control: {load: random}  # the encoder of settings, untrained
    ```

    Differences are to the first arm. The same command resumes an interrupted comparison.
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
    from smalti.cli.tables import plain_table, print_table
    from smalti.comparison.tables import cost_cells, cost_columns
    from smalti.evaluation.paired import about_lines, gain_cells, table_cells

    first = next(iter(comparison.plan.arms))
    for title, rows in comparison.table():
        print(f"{title} ({rows[0].unit})")
        print("\n".join(about_lines(rows)))
        table = plain_table("arm", "mean", f"difference to {first}", "")
        for cells in table_cells(rows):
            arm, mean, _, gap, verdict = cells
            table.add_row(arm, mean, gap, verdict)
        print_table(table)
        if over := dict.fromkeys(row.gain_over for row in rows if row.gain_over):
            gains = plain_table("arm", f"gain over {' or '.join(over)}", "")
            for row in rows:
                if row.gain is not None:
                    gains.add_row(row.arm, *gain_cells(row))
            print()
            print_table(gains)
        print()
    print("cost, mean over seeds")
    costs = plain_table("arm", *cost_columns(comparison))
    for arm, cost in comparison.costs.items():
        costs.add_row(arm, *cost_cells(cost))
    print_table(costs)
    print()
    notes = [f"In brackets: {comparison.info['intervals']}.", str(comparison.info.get("few_seeds", ""))]
    print("\n".join(filter(None, notes)))
