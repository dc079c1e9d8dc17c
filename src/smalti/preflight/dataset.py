"""The data section of ``smalti doctor``: how a folder is read, what is in it, and which problems it has."""

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from smalti.data.images.copies import Copies, Pair, find_copies
from smalti.data.images.folders import ImageSet, open_images
from smalti.data.images.image_set import as_text
from smalti.data.images.mask_folders import looks_like_mask
from smalti.data.images.mask_values import MaskValues, count_values
from smalti.data.images.pixels import PixelConfig
from smalti.data.images.scan import ScannedImage, ScanReport, scan_files, summarise
from smalti.data.loader import MAX_UNREADABLE
from smalti.data.signals.preparation import highest_hz
from smalti.data.signals.signal_config import SignalConfig
from smalti.data.signals.signal_set import is_signals
from smalti.errors import ConfigError, DataError
from smalti.preflight.recording_scan import WHOLE, RecordingScan, scan_recordings
from smalti.runs.config import DataConfig

_SHOWN = 3
_SHOWN_CLASSES = 20
_MOST_LOOKED_AT = 40
_MANY_MASKS = 0.3  # fraction of mask-like images from which a mistake is likely
_UNSPLIT = "images"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class MaskLike:
    """How many images of a sample look like masks."""

    looked_at: int
    found: tuple[Path, ...]


@dataclass(frozen=True)
class DataReport:
    """Content of a folder of images or recordings, and how a run would use it."""

    source: str
    """Path or ``NAME=PATH``, as given."""
    account: str
    """Layout, splits, and which files are skipped."""
    files: ScanReport | None = None
    """Scan of the images; None for recordings."""
    recordings: RecordingScan | None = None
    """Scan of the recordings; None for images."""
    classes: dict[str, dict[str, int]] | None = None
    """``{class: {split: images}}``; None if images have no classes."""
    masks: MaskValues | None = None
    mask_like: MaskLike | None = None
    """For layouts without masks."""
    copies: tuple[Copies, ...] = ()
    """Duplicates among training images, and between these and each evaluated split and the second set."""
    against: str | None = None
    """Why the comparison with a second set was skipped."""
    refused: tuple[str, ...] = ()
    """Reasons for which training would fail."""
    trained_on: int = 0
    """Readable images of the training split."""
    has_scale: bool = False
    """Whether ``data.scale`` is set."""

    @property
    def problems(self) -> list[str]:
        """Problems that will cause errors or misleading results, one sentence each."""
        found = list(self.refused)
        if self.recordings is not None:
            found += self.recordings.problems
        if self.files is not None:
            found += _file_problems(self.files)
            found += [self.files.scale_hint] if self.files.scale_hint and not self.has_scale else []
        found += self.masks.problems if self.masks is not None else []
        if self.mask_like is not None and len(self.mask_like.found) >= _MANY_MASKS * self.mask_like.looked_at:
            found.append(
                f"{len(self.mask_like.found)} of {self.mask_like.looked_at} sampled images have as few values as "
                f"masks, such as {as_text(self.mask_like.found[0])}, and would be trained on as images; "
                "put masks into masks/ and images into images/, with the same file stems"
            )
        found += [
            f"{_counted(one)}, such as {_pair((one.identical or one.near)[0])}: these results would be "
            "too high; remove them from one of the two"
            for one in self.copies
            if one.is_leak
        ]
        return found

    def lines(self) -> list[str]:
        """The report as text, one fact per line."""
        result = [fact_line("data", as_text(self.source)), fact_line("read as", self.account)]
        if self.recordings is not None:
            result += _recording_lines(self.recordings)
        if self.files is not None:
            result += _file_lines(self.files)
        if self.classes is not None:
            result += _class_lines(self.classes)
        if self.masks is not None:
            result += _mask_lines(self.masks)
        for one in self.copies:
            result.append(fact_line("repeated" if one.of == one.among else "shared", _counted(one)))
            result += _some([f"{_pair(pair)} (identical)" for pair in one.identical])
            result += _some([f"{_pair(pair)} (near-duplicate)" for pair in one.near])
        if self.against is not None:
            result.append(fact_line("against", self.against))
        return result


def look_at_data(
    data: str,
    settings: DataConfig | None = None,
    *,
    against: str | None = None,
    progress: Progress | None = None,
) -> DataReport:
    """Read data as a run would, and describe them.

    Every image or recording is read once. Duplicates are searched among training images, and between these and each
    evaluated split of the same data and of a second set.

    Args:
        data: images as for :func:`~smalti.data.images.folders.open_images`, or recordings.
        settings: how the data are read; None: the defaults. Their path is ignored.
        against: a second set, to evaluate on: its val split, else test, else all images.
        progress: called as ``progress(done, total)``, counting files.

    Raises:
        ConfigError: for recordings with ``against``.
        DataError: if nothing can be read, or the layout is ambiguous.
    """
    settings = settings or DataConfig()
    if is_signals(data):
        if against is not None:
            raise ConfigError(f"--against compares images; {data} holds recordings")
        account, scan = scan_recordings(data, settings.signal or SignalConfig(), progress)
        return DataReport(data, account, recordings=scan)
    images = open_images(data, class_depth=settings.class_depth)
    other, note = None, None
    if against is not None:
        other, note = _to_compare(images, open_images(against, class_depth=settings.class_depth))
    images = images.with_pixels(PixelConfig(max_pixels=settings.max_pixels))
    scanned = list(_scan_all(images, other, settings.max_pixels, progress))
    own, others = scanned[: len(images)], scanned[len(images) :]
    training = [
        one for one, sample in zip(own, images.samples, strict=True) if sample.split == "train" or not images.splits
    ]
    masks = count_values(images)
    return DataReport(
        data,
        images.account(),
        files=summarise(own, settings.channels),
        classes=_count_classes(images),
        masks=masks,
        mask_like=_look_for_masks(images) if masks is None else None,
        copies=tuple(_all_copies(images, own, training, other, others)),
        against=note,
        refused=_refused(images),
        trained_on=sum(not isinstance(one.facts, str) for one in training),
        has_scale=settings.scale is not None,
    )


def _to_compare(images: ImageSet, other: ImageSet) -> tuple[ImageSet | None, str | None]:
    """The evaluated images of a second set, or the reason why they are not compared."""
    pairs = zip(images.samples, other.samples, strict=False)
    if len(images) == len(other) and all(
        one.split == two.split and (one.path == two.path or one.path.resolve() == two.path.resolve())
        for one, two in pairs
    ):
        if images.splits:
            return None, "the same folder: its own splits are compared"
        return None, "the same folder, which has no splits: nothing to compare"
    split = next((name for name in ("val", "test") if name in other.splits), None)
    return (other.subset(split) if split else other), None


def _scan_all(
    images: ImageSet, other: ImageSet | None, max_pixels: int, progress: Progress | None
) -> Iterator[ScannedImage]:
    paths = [*images.paths, *(other.paths if other is not None else ())]
    for done, one in enumerate(scan_files(paths, max_pixels), 1):
        yield one
        if progress is not None:
            progress(done, len(paths))


def _all_copies(
    images: ImageSet,
    own: Sequence[ScannedImage],
    training: Sequence[ScannedImage],
    other: ImageSet | None,
    others: Sequence[ScannedImage],
) -> Iterator[Copies]:
    if not training:
        return
    yield find_copies(training, of="training", others="training")
    for split in images.splits:
        if split != "train":
            evaluated = [one for one, sample in zip(own, images.samples, strict=True) if sample.split == split]
            yield find_copies(evaluated, training, of=split, others="training")
    if other is not None:
        name = other.samples[0].split
        of = f"{name} images of {as_text(other.root)}" if name else f"images of {as_text(other.root)}"
        yield find_copies(others, training, of=of, others="training")


def _refused(images: ImageSet) -> tuple[str, ...]:
    try:
        images.training()
    except DataError as error:
        return (str(error),)
    return ()


def _count_classes(images: ImageSet) -> dict[str, dict[str, int]] | None:
    """``{class: {split: images}}``, also of classes without images in a split."""
    if not images.classes or all(sample.label is None for sample in images.samples):
        return None
    counts = Counter((sample.label, sample.split) for sample in images.samples)
    splits: list[str | None] = [*images.splits] or [None]
    return {
        name: {split or _UNSPLIT: counts[place, split] for split in splits} for place, name in enumerate(images.classes)
    }


def _look_for_masks(images: ImageSet) -> MaskLike:
    """Count mask-like images in a random sample; every n-th image wouldn't do, since images and masks may alternate."""
    paths = random.Random(0).sample(images.paths, min(_MOST_LOOKED_AT, len(images)))
    return MaskLike(len(paths), tuple(sorted(filter(looks_like_mask, paths))))


def _file_problems(files: ScanReport) -> list[str]:
    found = []
    if files.count and len(files.unreadable) > MAX_UNREADABLE * files.count:
        found.append(
            f"{len(files.unreadable):,} of {files.count:,} images can't be read; training stops at more than a tenth"
        )
    if files.wrong_channels:
        path, what = files.wrong_channels[0]
        remedy = f"set data.channels={files.best_channels}, and " if files.best_channels != files.set_channels else ""
        found.append(
            f"data.channels={files.set_channels} doesn't fit {len(files.wrong_channels):,} of {files.count:,} "
            f"images, such as {as_text(path)} ({what}); {remedy}convert or remove the images that don't fit"
        )
    return found


def _file_lines(files: ScanReport) -> list[str]:
    result = [fact_line("images", f"{files.count:,} ({files.total_bytes / 2**20:,.1f} MiB)")]
    if files.count > len(files.unreadable):
        result += [
            fact_line("size", f"height {_range(files.height)}, width {_range(files.width)} px"),
            fact_line("channels", f"{_counts(files.channels)}; {_channel_setting(files)}"),
            fact_line("bit depth", _counts(files.bit_depths)),
            fact_line("format", _counts(files.formats)),
            *(
                fact_line("values", f"{low:g} to {high:g} in {kind} files")
                for kind, (low, high) in files.values.items()
            ),
        ]
    result.append(fact_line("unreadable", f"{len(files.unreadable):,}"))
    return result + _some([f"{as_text(path)}: {reason}" for path, reason in files.unreadable])


def _recording_lines(scan: RecordingScan) -> list[str]:
    config, lengths = scan.config, scan.lengths_s
    result = [
        fact_line("recordings", f"{scan.count:,} ({scan.total_bytes / 2**20:,.1f} MiB)"),
        fact_line("channels", f"{_counts(scan.channels)}; read: {', '.join(scan.read) or 'none'}"),
    ]
    if scan.rates_hz:
        result.append(fact_line("rate", ", ".join(f"{rate:g} Hz: {count:,}" for rate, count in scan.rates_hz.items())))
    if lengths:
        middle = lengths[len(lengths) // 2]
        spread = f"{lengths[0]:g}" if lengths[0] == lengths[-1] else f"{lengths[0]:g} to {lengths[-1]:g}"
        result.append(fact_line("length", f"{spread} s (median {middle:g})"))
    high_hz = highest_hz(min(scan.rates_hz, default=math.inf), config)
    kept = f"windows of {config.window_s:g} s, {config.low_hz:g} to {high_hz:g} Hz at {config.resample_hz:g} Hz"
    result.append(fact_line("kept", kept))
    if scan.classes is not None:
        result += _class_lines(scan.classes, "windows")
    if scan.stages is not None:
        result += _class_lines(scan.stages, "windows", "stages")
    result.append(fact_line("unusable", f"{len(scan.unusable):,}"))
    result += _some([as_text(one.reason) for one in scan.unusable], _SHOWN_CLASSES)
    if scan.doubtful:
        result.append(fact_line("doubtful", f"{len(scan.doubtful):,}"))
        result += _some([as_text(text) for text in scan.doubtful], _SHOWN_CLASSES)
    proposed = " ".join(f"{name}={value}" for name, value in scan.proposed.items())
    return [*result, fact_line("settings", proposed or "those above fit")]


def _class_lines(classes: dict[str, dict[str, int]], samples: str = "images", title: str = "classes") -> list[str]:
    splits = list(next(iter(classes.values())))
    of = "" if splits in ([_UNSPLIT], [WHOLE]) else f" of {', '.join(splits)}"
    result = [fact_line(title, f"{len(classes):,}; {samples}{of}:")]
    for name, counts in list(classes.items())[:_SHOWN_CLASSES]:
        result.append(f"  {name}: {', '.join(f'{count:,}' for count in counts.values())}")
    more = len(classes) - _SHOWN_CLASSES
    return [*result, f"  ... and {more:,} more"] if more > 0 else result


def _mask_lines(masks: MaskValues) -> list[str]:
    usable = masks.looked_at - len(masks.unreadable)
    result = [fact_line("masks", f"{masks.masks:,}; values in {usable:,} of them, a sample:")]
    total = sum(masks.pixels.values())
    for value, count in list(masks.pixels.items())[:_SHOWN_CLASSES]:
        name = masks.names.get(value, "no class")
        result.append(f"  {value} {name}: {count:,} pixels ({count / total:.1%})")
    more = len(masks.pixels) - _SHOWN_CLASSES
    return [*result, f"  ... and {more:,} more"] if more > 0 else result


def _channel_setting(files: ScanReport) -> str:
    """The setting for the channels that were found."""
    if set(files.channels) == {1} and files.set_channels == 3:
        return "data.channels=3, the default, repeats the channel; data.channels=1 reads it once"
    best = f"data.channels={files.best_channels}"
    return f"read with {best}" if files.best_channels == files.set_channels else f"they need {best}"


def _counted(copies: Copies) -> str:
    """The number of copies, as a sentence."""
    number = len(copies.identical) + len(copies.near)
    what = copies.of if " " in copies.of else f"{copies.of} images"
    where = "repeat an earlier one" if copies.of == copies.among else "are also trained on"
    kinds = f" ({len(copies.identical):,} identical, {len(copies.near):,} near-duplicate)" if number else ""
    return f"{number:,} of {copies.count:,} {what} {where}{kinds}"


def _pair(pair: Pair) -> str:
    return f"{as_text(pair[0])} = {as_text(pair[1])}"


def _range(spread: tuple[int, float, int]) -> str:
    low, median, high = spread
    return f"{low}" if low == high else f"{low} to {high} (median {median:g})"


def _counts(counts: dict[int, int] | dict[str, int]) -> str:
    return ", ".join(f"{value}: {count:,}" for value, count in counts.items())


def _some(texts: Sequence[str], most: int = _SHOWN) -> list[str]:
    more = [f"  ... and {len(texts) - most:,} more"] if len(texts) > most else []
    return [f"  {text}" for text in texts[:most]] + more


def fact_line(label: str, text: str) -> str:
    """A line of the report: label and text."""
    return f"{label:<13}{text}"
