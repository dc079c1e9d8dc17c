"""Tables of a comparison, for pages and the terminal."""

from pathlib import Path

from smalti.comparison.outcome import Comparison, Cost
from smalti.comparison.plan import Plan
from smalti.evaluation.paired import (
    about_lines,
    gain_cells,
    table_cells,
)


def markdown(comparison: Comparison) -> str:
    """The tables as Markdown: headlines first, all other metrics below."""
    plan, info = comparison.plan, comparison.info
    samples = samples_name(comparison)
    budget = ", ".join(f"{value:g} {samples if name == 'images' else name}" for name, value in plan.budget.items())
    budget = budget or "none: nothing is trained"
    machine = info["machine"]
    lines = [
        "# Comparison",
        "",
        f"Budget: {budget}. Seeds: {', '.join(map(str, plan.seeds))}. Trained on: {plan.data or 'nothing'}.",
        f"In brackets: {info['intervals']}. Differences are against **{next(iter(plan.arms))}**, paired. The gain of a "
        "trained arm is over its own network before training (untrained, or before where it started from weights).",
        *([info["few_seeds"]] if info.get("few_seeds") else []),
        f"Commit {info['commit']}, {machine['processor']}, {machine['cores']} cores, "
        f"{', '.join(machine['gpus']) or 'no GPU'}; {info['finished']}.",
        "",
    ]
    for arm, error in comparison.failures.items():
        lines += [f"**Arm {arm} failed**: {error}", ""]
    for only_headlines in (True, False):
        if not only_headlines:
            lines += ["## All metrics", ""]
        for title, rows in comparison.table(only_headlines):
            lines += [f"{'##' if only_headlines else '###'} {title} ({rows[0].unit})", ""]
            lines += [*("  \n".join(about_lines(rows)),), ""]
            lines += ["| arm | mean | seeds | difference | | gain | |", "|---|---|---|---|---|---|---|"]
            pairs = zip(table_cells(rows), map(gain_cells, rows), strict=True)
            lines += [f"| {' | '.join((*cells, *gain))} |" for cells, gain in pairs]
            lines.append("")
    columns = ("arm", *cost_columns(comparison))
    lines += ["## Cost", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [f"| {arm} | {' | '.join(cost_cells(cost))} |" for arm, cost in comparison.costs.items()]
    return "\n".join(lines) + "\n"


def samples_name(comparison: Comparison) -> str:
    """What a sample is: images, or windows of recordings."""
    return str(comparison.info.get("samples", "images"))


def cost_columns(comparison: Comparison) -> tuple[str, ...]:
    """Titles of the columns of costs."""
    seen = f"{samples_name(comparison)} seen"
    return ("steps", seen, "training", "CPU", "GPU", "peak memory", "eval", "parameters")


def cost_cells(cost: Cost) -> tuple[str, ...]:
    """Text for :func:`cost_columns`, mean over seeds."""
    more = "≥ " if cost.is_partial else ""
    return (
        f"{cost.steps:,.0f}",
        f"{cost.images_seen:,.0f}",
        f"{more}{cost.wall_s:,.0f} s",
        f"{more}{cost.cpu_s:,.0f} s",
        f"{more}{cost.gpu_s:,.0f} s" if cost.gpu_s else "–",
        f"{cost.peak_mib:,.0f} MiB",
        f"{cost.eval_s:,.0f} s",
        f"{cost.parameters / 1e6:.2f} M",
    )


def short_name(data: str, plan: Plan) -> str:
    """The shortest path suffixes that distinguish the plan's evaluation sets."""
    parts = [Path(str(entry["data"])).parts for entry in plan.evaluate]
    mine = Path(data).parts
    for depth in range(1, len(mine) + 1):
        if len({other[-depth:] for other in parts}) == len(set(parts)):
            return "/".join(mine[-depth:])
    return data
