"""Compare generated images with real ones in the features of an encoder.

Fréchet distance (Heusel et al., arXiv:1706.08500v6), kernel distance (Binkowski et al., arXiv:1801.01401v5), precision
and recall by neighbours (Kynkäänniemi et al., arXiv:1904.06991v3), and a classifier score of the form of Salimans et
al., arXiv:1606.03498v1, with a linear classifier trained on the same features of labelled real images.
Differs from the papers: they use features of an Inception network; the names FID, KID and inception score are used here
only with its weights. Each metric is also computed for real images in place of the generated ones, and has a standard
error from resampling both sets.
Letters: n images, D dimensions, R resamples, C classes.
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from smalti.config import Count, PathText, settings
from smalti.data.images.decode import as_picture, image_size
from smalti.data.images.folders import ImageSet, open_images
from smalti.data.images.labelled import eval_batches, eval_image
from smalti.errors import ConfigError, DataError
from smalti.evaluation.config import EvalConfig
from smalti.evaluation.context import spread
from smalti.evaluation.features import Features
from smalti.evaluation.inception import LIBRARY, Inception
from smalti.evaluation.protocol import Scores, register_protocol
from smalti.evaluation.tally import tally_mean
from smalti.functional.distributions import (
    REPEATS,
    as_counts,
    bootstrap_error,
    classifier_score,
    fit_gaussian,
    frechet_between,
    frechet_distance,
    kernel_distance,
    resamples,
    within_manifold,
)
from smalti.functional.neighbours import nearest

DEFAULT_K = 5
DISTANCE = "distance in the encoder's features, 0 or more, lower is better"
KERNEL = "distance in the encoder's features, about 0 or more, lower is better"
CLASSES = "1 to the number of classes, higher is better"
INCEPTION_UNITS = {
    "fid": "FID, 0 or more, lower is better",
    "kid": "KID, about 0 or more, lower is better",
    "inception_score": "1 to 1008, higher is better",
    "fid_real": "FID, 0 or more, lower is better",
    "kid_real": "KID, about 0 or more, lower is better",
}
FLOOR = "_real"
"""Suffix of a metric's name: its value for real images in place of the generated ones."""
ERRORS = "standard_error"
"""Setting that holds the standard error of each metric that has one."""
_MOST_CLASSIFIED = 10_000
"""Maximum number of training images of the classifier."""
_SHEET_PX = 64
_NUM_NEIGHBOURS = 5
_NUM_ROWS = 8


class Distances(NamedTuple):
    """Distances between two sets."""

    values: dict[str, float]
    errors: dict[str, float]


@settings
class GenerationConfig:
    """Settings of ``generation``."""

    generated: PathText | None = None
    """Generated images, in any form that ``--data`` accepts, or the ``--out`` of ``smalti generate``; required."""
    inception: PathText | None = None
    """Weights of FID's Inception network; adds FID, KID and inception score to the metrics."""
    k: Count | None = None
    """Neighbours for precision and recall; None: the default, or fewer if there are few images."""
    repeats: Annotated[int, Field(ge=20, lt=2**31)] = REPEATS
    """Bootstrap resamples for the standard errors."""


def check_generated(config: EvalConfig) -> None:
    """Check the settings before anything is encoded.

    Raises:
        ConfigError: if no generated images are named, or there are too few resamples for a standard error.
        DataError: if there are no images at that path.
        MissingExtraError, WeightsError: if ``eval.generation.inception`` can't be used.
    """
    own: GenerationConfig = config.of("generation")
    if own.generated is None:
        raise ConfigError("generation needs generated images; set eval.generation.generated=FOLDER")
    open_generated(own.generated)
    if own.inception is not None:
        Inception(Path(own.inception).expanduser())
    resamples(1, own.repeats, config.seed)


def open_generated(place: str) -> ImageSet:
    """Open images at a path; of the output of ``smalti generate``, only the samples, without grid and film strip.

    Raises:
        DataError: if there are none.
    """
    folder = Path(place).expanduser()
    return open_images(folder / "images" if (folder / "samples.json").is_file() else place)


@register_protocol(
    "generation",
    need="images",
    prefers=("labels",),
    settings=GenerationConfig,
    takes_pool=True,
    has_presets=False,
    by_default=False,
    has_baseline=False,
    check=check_generated,
)
@torch.no_grad()
def generation(features: Features, config: EvalConfig) -> Scores:
    """Fréchet distance, precision and recall of generated images; needs eval.generation.generated=FOLDER."""
    own: GenerationConfig = config.of("generation")
    size, seed = features.image_size(config.image_size), config.seed
    repeats = own.repeats
    pool = features.encoder.pool if config.pool == "auto" else config.pool
    drawn = open_generated(str(own.generated))
    encode = _Encode(features, size, pool)
    fake, fake_places = encode(drawn, "generated images")
    real, real_places = encode(features.data.test, "real images")
    has_train = len(features.data.train) > 0
    train, train_places = encode(features.data.train, "training images") if has_train else (real[:0], [])
    note = _too_few(min(len(fake), len(real)), real.shape[1])

    if has_train:
        stand_in, reference = train[_draw(len(train), min(len(fake), len(train)), seed)], real
        floor = f"{len(stand_in)} random training images in place of the generated ones"
    else:
        halves = _draw(len(real), len(real), seed)
        stand_in, reference = real[halves[: len(real) // 2]], real[halves[len(real) // 2 :]]
        floor = f"{len(stand_in)} real images against {len(reference)} others, since there is no train split"
    most = min(len(fake), len(real), len(stand_in), len(reference)) - 1
    if most < 1:
        raise DataError(
            f"{features.data.test.root}: {len(real)} real images without a train split; at least 4 are needed"
        )
    if own.k is not None and own.k > most:
        raise ConfigError(f"eval.generation.k={own.k}: the images have only 1..{most} neighbours; choose one of these")
    k = min(own.k or DEFAULT_K, most)  # the same for all, so that precision is comparable with its floor

    metrics, errors = dict[str, float](), dict[str, float]()
    against = distances(fake, real, repeats, seed)
    covers = within_manifold(real, fake, k)
    looks_real = within_manifold(fake, real, k)
    metrics |= against.values | {"precision": _fraction(looks_real), "recall": _fraction(covers)}
    errors |= against.errors | {"precision": _fraction_error(looks_real), "recall": _fraction_error(covers)}
    if has_train:
        against_train = distances(fake, train, repeats, seed)
        metrics |= {f"{name}_train": value for name, value in against_train.values.items()}
        errors |= {f"{name}_train": value for name, value in against_train.errors.items()}
    metrics[f"frechet_distance{FLOOR}"] = frechet_distance(stand_in, reference)
    metrics[f"kernel_distance{FLOOR}"] = float(kernel_distance(stand_in, reference))
    metrics[f"precision{FLOOR}"] = _fraction(within_manifold(stand_in, reference, k))
    metrics[f"recall{FLOOR}"] = _fraction(within_manifold(reference, stand_in, k))

    units = {name: DISTANCE if name.startswith("frechet") else KERNEL for name in metrics if "distance" in name}
    settings = {
        "generated": str(own.generated),
        "num_generated": len(fake),
        "num_real": len(real),
        "num_train_compared": len(train),
        "embed_dim": real.shape[1],
        "features": f"{features.encoder.name}, pool {pool}; not Inception's, so no number is an FID",
        "images_note": note,
        "floor": floor,
        "k": k,
        "repeats": repeats,
        "errors_note": "both sets resampled with replacement; for precision and recall with fixed manifolds",
        "pool": pool,
        "image_size": size,
        "resize": "central square, bicubic",
    }
    if has_train and features.data.classes:
        labels = torch.tensor(
            [-1 if (label := features.data.train.samples[p].label) is None else label for p in train_places]
        )
        if (labels >= 0).all() and labels.min() < labels.max():
            classify = fit_classifier(train, labels, seed)
            of_fake, of_real = classify(fake), classify(real)
            truth = torch.tensor([features.data.test.samples[place].label for place in real_places])
            metrics |= {
                "classifier_score": classifier_score(of_fake),
                f"classifier_score{FLOOR}": classifier_score(of_real),
            }
            places = resamples(len(fake), repeats, seed)
            errors["classifier_score"] = bootstrap_error(lambda rows: classifier_score(of_fake[rows]), places)
            units |= dict.fromkeys(("classifier_score", f"classifier_score{FLOOR}"), CLASSES)
            settings["classifier"] = (
                f"logistic regression on standardised features of {min(len(labels), _MOST_CLASSIFIED)} training images"
            )
            settings["classifier_accuracy"] = float((of_real.argmax(1) == truth).double().mean())
    if own.inception is not None:
        side = generated_side(drawn)
        inception = _inception_distances(features, drawn, side, config.seed, own)
        metrics, errors, units = metrics | inception.values, errors | inception.errors, units | INCEPTION_UNITS
        settings["inception"] = f"{LIBRARY}, {own.inception}"
        settings["inception_image_size"] = side
    settings[ERRORS] = errors
    headline = next(iter(metrics))
    settings["reference"] = {"name": "real images", "score": metrics[f"{headline}{FLOOR}"]}
    recall = np.full(len(features.data.test), np.nan)
    recall[real_places] = covers.cpu().double().numpy()
    return Scores(
        metrics,
        settings,
        {},
        units=units,
        tallies={"recall": tally_mean(recall)},
        pictures=_sheets(
            _Encoded(drawn, fake_places, fake),
            _Encoded(features.data.test, real_places, real),
            _Encoded(features.data.train, train_places, train) if has_train else None,
            features.encoder.in_chans,
        ),
    )


def generated_side(drawn: ImageSet) -> int:
    """Side in pixels of the central squares of the generated images; the smallest, if they differ.

    Inception gets generated and real images at this size, independent of the encoder's size, and resizes them.

    Raises:
        DataError: if none can be read.
    """
    sides = []
    for path in drawn.paths:
        with contextlib.suppress(DataError):  # skipped and counted when images are read
            sides.append(min(image_size(path)))
    if not sides:
        raise DataError(f"{drawn.root}: none of the {len(drawn)} generated images can be read")
    return min(sides)


def _inception_distances(features: Features, drawn: ImageSet, size: int, seed: int, own: GenerationConfig) -> Distances:
    """FID, KID and inception score, with the same floors as for the encoder's features."""
    network = Inception(Path(str(own.inception)).expanduser()).to(features.device)
    repeats = own.repeats

    def encode(images: ImageSet, what: str) -> tuple[Tensor, Tensor]:
        pooled, probabilities, done = list[Tensor](), list[Tensor](), 0
        batches = eval_batches(
            images, size, 3, mode="centre", batch_size=features.batch_size, num_workers=features.num_workers
        )
        for pixels, positions, skipped in batches:
            done += len(positions) + len(skipped)
            if len(positions):
                whole = pixels if pixels.dtype == torch.uint8 else (pixels * 255).round().clamp(0, 255).byte()
                found = network(whole.to(features.device))
                pooled.append(found[0].cpu())
                probabilities.append(found[1].cpu())
            features.progress(f"Inception, {what}", done, len(images))
        return torch.cat(pooled), torch.cat(probabilities)

    fake, probabilities = encode(drawn, "generated images")
    real, _ = encode(features.data.test, "real images")
    if len(features.data.train):
        chosen_rows = _draw(len(features.data.train), min(len(fake), len(features.data.train)), seed).tolist()
        chosen = tuple(features.data.train.samples[place] for place in chosen_rows)
        stand_in, reference = (
            encode(dataclasses.replace(features.data.train, samples=chosen), "training images")[0],
            real,
        )
    else:
        halves = _draw(len(real), len(real), seed)
        stand_in, reference = real[halves[: len(real) // 2]], real[halves[len(real) // 2 :]]
    against = distances(fake, real, repeats, seed)
    names = {"frechet_distance": "fid", "kernel_distance": "kid"}
    places = resamples(len(fake), repeats, seed)
    return Distances(
        {
            **{names[name]: value for name, value in against.values.items()},
            "inception_score": classifier_score(probabilities),
            f"fid{FLOOR}": frechet_distance(stand_in, reference),
            f"kid{FLOOR}": float(kernel_distance(stand_in, reference)),
        },
        {
            **{names[name]: value for name, value in against.errors.items()},
            "inception_score": bootstrap_error(lambda rows: classifier_score(probabilities[rows]), places),
        },
    )


def distances(a: Float[Tensor, "n D"], b: Float[Tensor, "m D"], repeats: int, seed: int) -> Distances:
    """Fréchet and kernel distance of two sets, with standard errors from resampling both."""
    rows_a, rows_b = resamples(len(a), repeats, seed), resamples(len(b), repeats, seed + 1)
    values = {
        "frechet_distance": frechet_distance(a, b),
        "kernel_distance": float(kernel_distance(a, b)),
    }
    redrawn = [
        frechet_between(fit_gaussian(a[here]), fit_gaussian(b[there]))
        for here, there in zip(rows_a, rows_b, strict=True)
    ]
    errors = {
        "frechet_distance": float(torch.tensor(redrawn, dtype=torch.float64).std()),
        "kernel_distance": float(kernel_distance(a, b, as_counts(rows_a), as_counts(rows_b)).std()),
    }
    return Distances(values, errors)


def fit_classifier(
    vectors: Float[Tensor, "n D"], labels: Int[Tensor, " n"], seed: int
) -> Callable[[Float[Tensor, "m D"]], Float[Tensor, "m C"]]:
    """Fit a linear classifier; returns a function from features to class probabilities."""
    from sklearn.linear_model import LogisticRegression  # heavy, and only needed here
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    chosen_rows = _draw(len(vectors), min(len(vectors), _MOST_CLASSIFIED), seed)
    fitted = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    fitted.fit(vectors[chosen_rows].cpu().double().numpy(), labels[chosen_rows].numpy())

    def classify(others: Tensor) -> Tensor:
        return torch.from_numpy(fitted.predict_proba(others.cpu().double().numpy()))

    return classify


class _Encode:
    """Computes feature vectors of a set of images, and the indices of the readable ones."""

    def __init__(self, features: Features, size: int, pool: str) -> None:
        self.features, self.size, self.pool = features, size, pool

    def __call__(self, images: ImageSet, what: str) -> tuple[Float[Tensor, "n D"], list[int]]:
        """Feature vectors on the CPU, float32, and indices.

        Raises:
            DataError: if fewer than three images can be read.
        """
        source, found, places = self.features, list[Tensor](), list[int]()
        for encoded, positions in source.encode(images, self.size, "centre", source.batch_size, what):
            found.append(source.encoder.pooled(encoded, self.pool).float().cpu())
            places += positions
        if len(places) < 3:
            raise DataError(f"{images.root}: only {len(places)} {what} can be read; at least 3 are needed")
        return torch.cat(found), places


def _too_few(count: int, dim: int) -> str:
    """A note, which is also a warning, if there are too few vectors for their covariance; else empty."""
    if count >= 2 * dim:
        return ""
    note = (
        f"{count} images for features of {dim} dimensions: the Fréchet distance is mostly bias; use at least "
        f"{2 * dim}, or the kernel distance"
    )
    warnings.warn(f"generation: {note}", stacklevel=2)
    return note


def _draw(count: int, size: int, seed: int) -> Int[Tensor, " n"]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:size]


def _fraction(hits: Bool[Tensor, " n"]) -> float:
    return float(hits.double().mean())


def _fraction_error(hits: Bool[Tensor, " n"]) -> float:
    """Standard error of a fraction, without resampling."""
    fraction = _fraction(hits)
    return float((fraction * (1 - fraction) / len(hits)) ** 0.5)


class _Encoded(NamedTuple):
    """Images and their vectors."""

    images: ImageSet
    places: list[int]
    """Indices of the readable images, one per vector."""
    vectors: Tensor


def _sheets(fake: _Encoded, real: _Encoded, train: _Encoded | None, channels: int) -> dict[str, np.ndarray]:
    """Figures for the report: generated and real images, and generated images with their nearest (training) images."""

    def picture(of: _Encoded, number: int) -> np.ndarray:
        path = of.images.paths[of.places[number]]
        return as_picture(eval_image(path, _SHEET_PX, channels, "centre", of.images.pixels))

    def grid(rows: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
        return np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)

    wide = 2 * _NUM_ROWS
    sheets = {}
    for title, of in (("Generated", fake), ("Real", real)):
        chosen = [picture(of, number) for number in spread(len(of.places), 4 * wide)]
        whole = len(chosen) // wide * wide or len(chosen)
        sheets[f"{title}, evenly chosen"] = grid([chosen[first : first + wide] for first in range(0, whole, wide)])
    chosen_rows = list(spread(len(fake.places), _NUM_ROWS))
    known, what = (real, "real") if train is None else (train, "training")
    middle = known.vectors.mean(0)
    keys = known.vectors - middle
    keys = torch.cat([keys, -keys.square().sum(1, keepdim=True) / 2], 1)  # so that the nearest have the largest product
    queries = torch.nn.functional.pad(fake.vectors[chosen_rows] - middle, (0, 1), value=1.0)
    near = nearest(queries, keys, min(_NUM_NEIGHBOURS, len(keys)))[1].tolist()
    sheets[f"Generated (first column) and the nearest of {len(keys)} {what} images in feature space"] = grid(
        [[picture(fake, n), *(picture(known, m) for m in found)] for n, found in zip(chosen_rows, near, strict=True)]
    )
    return sheets
