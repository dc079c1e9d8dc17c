"""``smalti rank``: rank the patches of all images and compare the orders with image-independent ones."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from smalti.cli.options import Data, Debug, Json, Out, Quiet, needed, pixels_of_run, settings_of_run
from smalti.cli.setting_docs import Setting, describe
from smalti.config import build, parse_overrides
from smalti.errors import ConfigError
from smalti.files import check_writable, is_free, unfinished_folder

if TYPE_CHECKING:
    from smalti.ranking.rank import Ranking

NAME = "rank"


def command(
    spec: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="A run of `comae` or `ranker`, or an encoder: `RUN`, `FILE.safetensors`, `timm:NAME[@FILE]`, "
            "`random:NAME`.",
            show_default=False,
        ),
    ],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="Settings, such as batch_size=8 image_size=224.", show_default=False
        ),
    ] = None,
    data: Data = None,
    out: Out = None,
    orders: Annotated[
        str | None,
        typer.Option("--orders", metavar="A,B", help="Names of orders; default: all that RUN provides."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="OTHER", help="File of orders, or run of another seed, to compare with."),
    ] = None,
    predictor: Annotated[
        str | None,
        typer.Option("--predictor", metavar="RUN", help="A run of `prefix`, which scores the orders."),
    ] = None,
    flips: Annotated[
        bool, typer.Option("--flips/--no-flips", help="Also rank mirrored images, for training with flips.")
    ] = True,
    json: Json = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Rank the patches of all images by importance.

    `--out` is a folder or `FILE.parquet`. Writes the orders, their statistics (.json) and a page (.html) with
    pictures (.png).

    Settings: `batch_size` `image_size` `weights` `load.*` `num_workers` `chunk` `damping` `num_scored` `num_shown`
    `scale` `max_pixels`. `smalti settings rank` explains them.
    """
    data, out = needed(data, "--data", "DIR"), needed(out, "--out", "orders")
    from smalti.ranking.rank import ORDERS_FILE, RankConfig, rank, ranking_content, write_ranking

    config = build(RankConfig, {**pixels_of_run(settings_of_run(spec)), **parse_overrides(words or [])})
    names = [name.strip() for name in (orders or "").split(",") if name.strip()]
    if orders is not None and not names:
        raise ConfigError("--orders names none; leave it out for all")
    file = _file_of(Path(out).expanduser(), ORDERS_FILE)

    from smalti.cli.options import Progress, best_device, print_data, write_json
    from smalti.report.ranking import write_page

    for path in (json, *(file.with_suffix(ending) for ending in (".json", ".html", ".png"))):
        if path is not None:
            check_writable(path)
    if not quiet:
        print_data(str(data))
    ranking = rank(
        spec,
        str(data),
        file,
        config,
        orders=names,
        both_flips=flips,
        against=against,
        predictor=predictor,
        device=best_device(),
        progress=None if quiet else Progress(),
    )
    line = shlex.join(["smalti", *sys.argv[1:]])
    write_ranking(file.with_suffix(".json"), ranking, line)
    page = write_page(file.with_suffix(".html"), ranking, config.num_shown, line)
    if json:
        write_json(json, ranking_content(ranking, line))
    _print(ranking)
    for sentence in ranking.sentences:
        print(sentence)
    if ranking.skipped:
        from smalti.data.images.image_set import as_text

        path, reason = ranking.skipped[0]
        print(f"unreadable and skipped: {len(ranking.skipped):,}, the first: {as_text(path)}: {reason}")
    print(f"written: {file}: orders {', '.join(ranking.cache.stored)} of {len(ranking.images):,} images")
    print(f"numbers: {file.with_suffix('.json')}, page: {page}")


def own_settings() -> list[Setting]:
    """For ``smalti settings rank``."""
    from smalti.ranking.rank import RankConfig

    return list(describe(RankConfig))


def _file_of(out: Path, name: str) -> Path:
    """Path of the file of orders.

    Raises:
        ConfigError: for a file with another suffix, or a folder of other files.
    """
    if out.suffix.lower() == ".parquet":
        return out
    if out.suffix and not out.is_dir():
        raise ConfigError(f"{out}: is neither a folder nor a .parquet file; choose another --out")
    if not is_free(out) and not (out / name).is_file() and not unfinished_folder(out / name).is_dir():
        raise ConfigError(f"{out}: is not empty and holds no {name}; choose another --out")
    return out / name


def _print(ranking: "Ranking") -> None:
    described = (
        "position_variance_ratio",
        "static_correlation",
        "top_overlap",
        "neighbour_correlation",
        "nearest_distance",
    )
    title = f"orders of {len(ranking.images):,} images by {ranking.source}"
    _print_table(title, described, ranking.described)
    if ranking.curve_scores:
        curve_scores = {
            order: {name: one.value for name, one in of.items()} for order, of in ranking.curve_scores.items()
        }
        _print_table(
            f"how well the first patches predict the others, by {ranking.predictor}",
            ("auc_q", "auc_full", "left_22"),
            curve_scores,
        )


def _print_table(title: str, columns: Sequence[str], rows: Mapping[str, Mapping[str, float]]) -> None:
    """One row per order; at most 80 columns wide, since a wrapped number can't be read."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from smalti.cli.tables import print_table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("order", no_wrap=True)
    for column in columns:
        words = column.split("_") if column.endswith(("ratio", "correlation", "overlap", "distance")) else [column]
        table.add_column("\n".join(words), justify="right", no_wrap=True)
    for order, numbers in rows.items():
        table.add_row(order, *(f"{numbers[name]:.3f}" if name in numbers else "" for name in columns))
    print_table(table)
