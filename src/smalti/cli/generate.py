"""``smalti generate``: images drawn by a run of MAR or CMAR."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smalti.cli.options import Debug, Out, Quiet, needed
from smalti.config import build
from smalti.errors import ConfigError
from smalti.files import check_folder, is_free, remove_leftovers, write_atomically
from smalti.reading import reading

if TYPE_CHECKING:
    from torch import Tensor

NAME = "generate"
FILM_IMAGES, GRID_IMAGES = 8, 64
SETTINGS, GRID, FILM = "samples.json", "grid.png", "film.png"
"""Written first (and again at the end, with the rate), and the pictures of the first images."""


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run of mar or cmar.", show_default=False)],
    num: Annotated[int, typer.Option("--num", help="How many images.")] = 64,
    labels: Annotated[
        str | None,
        typer.Option(
            "--labels", metavar="A,B", help="Classes in turn, by name or number; none: without; default: all."
        ),
    ] = None,
    cfg: Annotated[float, typer.Option("--cfg", help="Guidance towards the class; 1: none, and half the cost.")] = 1.0,
    cfg_schedule: Annotated[
        str, typer.Option("--cfg-schedule", help="linear: grows as the image does; constant.")
    ] = "linear",
    iterations: Annotated[
        int | None, typer.Option("--iterations", help="Steps an image is drawn in; default: 256, or one a token.")
    ] = None,
    order: Annotated[
        str | None,
        typer.Option("--order", metavar="NAME", help="collapse, random, halton ...; default: what the run learned."),
    ] = None,
    orders: Annotated[
        Path | None, typer.Option("--orders", metavar="FILE", help="The file of smalti rank, for orders found there.")
    ] = None,
    order_source: Annotated[
        str,
        typer.Option("--order-source", help="bank: of a training image of the class; class_mean; global_mean."),
    ] = "bank",
    steps: Annotated[int, typer.Option("--steps", help="Diffusion steps for a token.")] = 100,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="Of the noise; default: 1, and 0.95 without guidance.")
    ] = None,
    decoder: Annotated[
        str, typer.Option("--decoder", help="all: as trained; needed: without mask tokens of later steps, faster.")
    ] = "all",
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="The same seed draws the same images.")] = 0,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Images at a time; default: as many as fit.")
    ] = None,
    out: Out = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Draw images: PNG files, a grid of them, and a film strip of what was drawn first.

    The grid and the strip also stand in the run's page (smalti report RUN), until others are drawn. The same command
    resumes where it was stopped: images that are there are not drawn again.
    """
    out = needed(out, "--out", "DIR")
    for option, value in (("--num", num), ("--batch-size", batch_size)):
        if value is not None and value < 1:
            raise ConfigError(f"{option} {value}: at least 1 is needed")
    if not is_free(out) and not (out / SETTINGS).is_file():
        raise ConfigError(f"{out}: is not empty; choose another --out")
    check_folder(out)

    import torch
    from rich.console import Console
    from rich.progress import Progress, TimeRemainingColumn

    from smalti.cli.options import best_device, write_json
    from smalti.data.images.folders import read_image
    from smalti.data.order_files import CACHED
    from smalti.methods.mar import SamplerConfig
    from smalti.models.loading import weights_digest
    from smalti.report.samples import FOLDER, as_pixels, film_strip, picture_grid, write_png
    from smalti.runs.generate import (
        choose_classes,
        choose_orders,
        draw_images,
        image_keys,
        load_generator,
        open_cache,
        own_order,
    )
    from smalti.runs.lock import locked

    given = {
        "iterations": iterations,
        "cfg": cfg,
        "cfg_schedule": cfg_schedule,
        "temperature": temperature,
        "steps": steps,
        "decoder": decoder,
    }
    sampler = build(SamplerConfig, given)
    generator = load_generator(run)
    method, classes = generator.method, generator.classes
    method.plan(sampler)
    numbers = choose_classes(labels, classes, num)
    trained_for, its_file = own_order(method)
    name, file = order or trained_for, orders or its_file
    if orders is not None and name not in CACHED:
        hint = "choose an order that it has, say --order collapse" if order is None else "leave it out"
        raise ConfigError(f"--orders {orders}: order '{name}' stands in no file; {hint}")
    chosen = choose_orders(
        name,
        order_source,
        open_cache(name, file),
        numbers,
        image_keys(seed, range(num)),
        method.tokens.grid,
        classes,
    )
    method = method.to(best_device())
    names = [classes[number] if number < len(classes) else "" for number in numbers]
    files = [out / "images" / name / f"{place:05d}.png" for place, name in enumerate(names)]
    settings = {
        "run": str(run),
        "weights": weights_digest(str(run)),
        "num": num,
        "seed": seed,
        "labels": names,
        "order": name,
        "orders": None if file is None else str(file),
        "order_source": order_source,
        **given,
    }

    def keep(first: int, images: "Tensor") -> None:
        for place, image in enumerate(images.unbind(), start=first):
            pixels = as_pixels(image)
            if pixels.shape[2] not in (1, 3):
                raise ConfigError(f"images of {pixels.shape[2]} channels can't be PNG files; 1 or 3 can")
            write_png(files[place], pixels)

    def is_kept(place: int) -> bool:
        return files[place].is_file() and (place >= FILM_IMAGES or (out / FILM).is_file())

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
            seed=seed,
            sampler=sampler,
            batch_size=batch_size,
            keep=keep,
            is_kept=is_kept,
            progress=progress,
            film_images=FILM_IMAGES,
        )
        if film is not None:
            write_png(out / FILM, film_strip(film))
        shown = [
            torch.from_numpy(read_image(path, 1 if method.tokens.in_chans == 1 else 3)) for path in files[:GRID_IMAGES]
        ]
        write_png(out / GRID, picture_grid(torch.stack(shown).permute(0, 3, 1, 2) / 255))
        for picture in (FILM, GRID):
            with contextlib.suppress(ConfigError):  # the run may be somebody else's
                write_atomically(run / FOLDER / picture, (out / picture).read_bytes())
        write_json(out / SETTINGS, {**settings, "images_per_s": round(rate, 3)})
    print(f"written: {num} images in {out / 'images'}, {out / GRID} and {FILM}; {rate:.3g} images/s")


def _begin(out: Path, settings: Mapping[str, Any]) -> None:
    """Note the settings, or compare them with those of the command that began here.

    Raises:
        ConfigError: if images of other settings lie here, or all are drawn.
    """
    from smalti.cli.options import write_json

    remove_leftovers(out)
    if not (out / SETTINGS).is_file():
        write_json(out / SETTINGS, settings)
        return
    with reading(out / SETTINGS, "the settings of generated images", ConfigError, "choose another --out"):
        known = dict(json.loads((out / SETTINGS).read_bytes()))
    if "images_per_s" in known:
        raise ConfigError(f"{out}: is not empty, all its images are drawn; choose another --out")
    for name, value in settings.items():
        if known.get(name) != value:
            raise ConfigError(
                f"{out}: is not empty and was begun with another {name} ({known.get(name)}, now {value}); "
                "choose another --out"
            )
