"""``smalti shard``: write images as tar shards."""

import sys
from typing import Annotated

import typer

from smalti.cli.options import Debug, Out, Progress, Quiet, needed, take
from smalti.cli.setting_docs import Setting, describe
from smalti.config import Count, settings

NAME = "shard"


@settings
class ShardConfig:
    """How shards are written."""

    size_mib: Count = 512
    """Size of a shard in MiB; it ends with the file that makes it larger."""


def own_settings() -> list[Setting]:
    """For ``smalti settings shard``."""
    return list(describe(ShardConfig))


def command(
    data: Annotated[
        str, typer.Argument(metavar="IMAGES", help="Images, as for `--data` of other commands.", show_default=False)
    ],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings, such as size_mib=1024.", show_default=False),
    ] = None,
    out: Out = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write images as tar shards.

    Files are copied as they are, with masks and lists of splits. Training on the shards (`--data DIR`) equals training
    on the folder.

    Settings: `size_mib`. `smalti settings shard` explains it.
    """
    out = needed(out, "--out", "shards")
    given = take(words, ShardConfig)

    from smalti.data.archives.shard_writer import write_shards
    from smalti.data.images.folders import open_images

    images = open_images(data)
    show = None if quiet else Progress()
    if show:
        print(f"data: {images.account()}", file=sys.stderr)
    written = write_shards(
        images, out, given.size_mib, None if show is None else lambda done, total: show("files", done, total)
    )
    shards = f"{written.num_shards:,} shard{'s' * (written.num_shards != 1)}"
    print(f"written: {written.folder}, {written.num_files:,} files in {shards}")
