"""``smalti generate``: generate images with a run of MAR or CMAR."""

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smalti.cli.options import Debug, Out, Quiet, needed
from smalti.cli.setting_docs import Setting, describe
from smalti.config import build, parse_overrides, to_tree
from smalti.errors import ConfigError
from smalti.files import check_folder, is_free, remove_leftovers, write_atomically
from smalti.reading import reading

if TYPE_CHECKING:
    from torch import Tensor

    from smalti.runs.certainty import Certainty
    from smalti.runs.generate import Film

NAME = "generate"
FILM_IMAGES, GRID_IMAGES = 8, 64
SETTINGS, GRID, FILM = "samples.json", "grid.png", "film.png"
"""Written first (and again at the end, with the rate), and the pictures of the first images."""
CERTAINTY, CURVE = "certainty.json", "certainty.png"
"""With a classifier: its numbers, and their curve."""


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run of `mar` or `cmar`.", show_default=False)],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="Settings, such as num=16 labels=cat,dog cfg=2.", show_default=False
        ),
    ] = None,
    orders: Annotated[
        Path | None, typer.Option("--orders", metavar="FILE", help="File of `smalti rank`, for orders found there.")
    ] = None,
    classifier: Annotated[
        str | None,
        typer.Option(
            "--classifier",
            metavar="RUN",
            help="A run of `supervised` or `cvit` with the same classes: how certain it is while images are drawn.",
        ),
    ] = None,
    out: Out = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Generate images with a run of MAR or CMAR.

    Writes PNG files, a grid of them, and a film strip of the steps; with `--classifier` also the probability of each
    image's class after each step (certainty.json, certainty.png, and below the frames of the strip).

    The run's report (`smalti report RUN`) shows the grid and the strip. The same command resumes an interrupted run:
    images that exist are kept.

    Settings: `num` `labels` `cfg` `cfg_schedule` `iterations` `temperature` `steps` `decoder` `order` `order_source`
    `seed` `batch_size`. `smalti settings generate` explains them.
    """
    out = needed(out, "--out", "DIR")
    tree = parse_overrides(words or [])
    if not is_free(out) and not (out / SETTINGS).is_file():
        raise ConfigError(f"{out}: is not empty; choose another --out")
    check_folder(out)

    from rich.console import Console
    from rich.progress import Progress, TimeRemainingColumn

    from smalti.cli.options import best_device, write_json
    from smalti.data.order_files import CACHED
    from smalti.models.loading import weights_digest
    from smalti.report.samples import as_pixels, write_png
    from smalti.runs.certainty import CERTAIN_IMAGES, measure_certainty, open_classifier
    from smalti.runs.generate import (
        GenerateConfig,
        choose_classes,
        choose_orders,
        draw_images,
        image_keys,
        load_generator,
        open_cache,
        own_order,
    )
    from smalti.runs.lock import locked

    config = build(GenerateConfig, tree)
    sampler = config.sampler
    generator = load_generator(run)
    method, classes = generator.method, generator.classes
    method.plan(sampler)
    numbers = choose_classes(config.words, classes, config.num)
    trained_for, its_file = own_order(method)
    name, file = config.order or trained_for, orders or its_file
    if orders is not None and name not in CACHED:
        hint = "choose an order from the file, such as order=collapse" if config.order is None else "leave it out"
        raise ConfigError(f"--orders {orders}: is not needed for order '{name}'; {hint}")
    chosen = choose_orders(
        name,
        config.order_source,
        open_cache(name, file),
        numbers,
        image_keys(config.seed, range(config.num)),
        method.tokens.grid,
        classes,
    )
    device = best_device()
    names = [classes[number] if number < len(classes) else "" for number in numbers]
    scorer = None if classifier is None else open_classifier(classifier, names, method.tokens.in_chans)
    num_filmed = FILM_IMAGES if scorer is None else CERTAIN_IMAGES
    method = method.to(device)
    files = [out / "images" / name / f"{place:05d}.png" for place, name in enumerate(names)]
    settings = {
        "run": str(run),
        "weights": weights_digest(str(run)),
        "num": config.num,
        "seed": config.seed,
        "labels": names,
        "order": name,
        "orders": None if file is None else str(file),
        "order_source": config.order_source,
        **({} if classifier is None else {"classifier": classifier}),
        **to_tree(sampler),
    }

    def keep(first: int, images: "Tensor") -> None:
        for place, image in enumerate(images.unbind(), start=first):
            pixels = as_pixels(image)
            if pixels.shape[2] not in (1, 3):
                raise ConfigError(
                    f"images of {pixels.shape[2]} channels can't be written as PNG files; 1 or 3 channels are needed"
                )
            write_png(files[place], pixels)

    def is_kept(place: int) -> bool:
        is_filmed = (out / FILM).is_file() and (scorer is None or (out / CERTAINTY).is_file())
        return files[place].is_file() and (place >= num_filmed or is_filmed)

    with (
        locked(out),
        Progress(
            *Progress.get_default_columns()[:-1],
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=quiet,
        ) as bar,
    ):
        _begin(out, settings)
        task = bar.add_task("drawing", total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        film, rate = draw_images(
            method,
            chosen,
            numbers,
            seed=config.seed,
            sampler=sampler,
            batch_size=config.batch_size,
            keep=keep,
            is_kept=is_kept,
            progress=progress,
            film_images=num_filmed,
        )
        certainty = None
        if scorer is not None and film is not None:
            scorer.encoder.to(device)
            certainty = measure_certainty(scorer, film, names)
            shown = [file.relative_to(out).as_posix() for file in files[: len(certainty.values)]]
            write_json(out / CERTAINTY, certainty.to_json(shown))
        _write_pictures(run, out, files[:GRID_IMAGES], film, certainty, 1 if method.tokens.in_chans == 1 else 3)
        write_json(out / SETTINGS, {**settings, "images_per_s": round(rate, 3)})
    print(f"written: {config.num} images in {out / 'images'}, {out / GRID} and {FILM}; {rate:.3g} images/s")
    if certainty is not None:
        drawn, mean = certainty.fractions, certainty.values.mean(0).tolist()
        steps = ", ".join(f"{value:.0%} at {fraction:.0%}" for fraction, value in zip(drawn, mean, strict=True))
        chance = f"chance: {1 / certainty.num_classes:.0%}"
        print(f"certainty of {classifier} while drawing, mean of {len(certainty.values)} images ({chance}): {steps}")
        print(f"numbers: {out / CERTAINTY}, curve: {out / CURVE}")


def own_settings() -> list[Setting]:
    """For ``smalti settings generate``."""
    from smalti.runs.generate import GenerateConfig

    return list(describe(GenerateConfig))


def _write_pictures(
    run: Path, out: Path, files: Sequence[Path], film: "Film | None", certainty: "Certainty | None", channels: int
) -> None:
    """Write the grid of ``files``, the film strip and the curve, and copy them into the run directory for its page."""
    import torch

    from smalti.data.images.folders import read_image
    from smalti.report.samples import FOLDER, certainty_picture, film_strip, picture_grid, write_png

    if film is not None:
        first = dataclasses.replace(film, frames=film.frames[:FILM_IMAGES], ranks=film.ranks[:FILM_IMAGES])
        write_png(out / FILM, film_strip(first, None if certainty is None else certainty.values[:FILM_IMAGES, 1:]))
    if certainty is not None:
        write_png(out / CURVE, certainty_picture(certainty))
    shown = [torch.from_numpy(read_image(path, channels)) for path in files]
    write_png(out / GRID, picture_grid(torch.stack(shown).permute(0, 3, 1, 2) / 255))
    for picture in (FILM, GRID):
        with contextlib.suppress(ConfigError):  # the run directory may be read-only
            write_atomically(run / FOLDER / picture, (out / picture).read_bytes())
    with contextlib.suppress(ConfigError, OSError):
        if (out / CERTAINTY).is_file():
            write_atomically(run / FOLDER / CERTAINTY, (out / CERTAINTY).read_bytes())
        else:  # of older images
            (run / FOLDER / CERTAINTY).unlink(missing_ok=True)


def _begin(out: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings, or compare them with those of the interrupted command.

    Raises:
        ConfigError: if the folder holds images of other settings, or all images are there already.
    """
    from smalti.cli.options import write_json

    remove_leftovers(out)
    if not (out / SETTINGS).is_file():
        write_json(out / SETTINGS, settings)
        return
    with reading(out / SETTINGS, "the settings of generated images", ConfigError, "choose another --out"):
        known = dict(json.loads((out / SETTINGS).read_bytes()))
    if "images_per_s" in known:
        raise ConfigError(f"{out}: already holds all images; choose another --out")
    for name, value in settings.items():
        if known.get(name) != value:
            raise ConfigError(f"{out}: holds images with {name}={known.get(name)}, not {value}; choose another --out")
