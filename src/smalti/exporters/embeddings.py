"""Write the features of a set of images to one ``.parquet`` or ``.npz`` file, batch by batch, so that any number fits.

Letters: n images, N = h*w patches an image, D embed_dim.
"""

import json
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from smalti.data.images.folders import ImageSet
from smalti.data.images.image_set import as_text
from smalti.data.images.labelled import eval_batches
from smalti.data.views import Skipped
from smalti.errors import ConfigError, DataError
from smalti.files import check_writable, written_beside
from smalti.models.encoder import Encoder
from smalti.models.pooling import check_pool

LEVELS, DTYPES, ENDINGS = ("image", "patch"), ("float32", "float16"), (".parquet", ".npz")
_ROW_GROUP_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Embedded:
    """Result of :func:`embed`."""

    path: Path
    count: int
    """Number of images in the file."""
    shape: tuple[int, ...]
    """Shape of one image's features: ``(D,)``, or ``(N, D)`` for patches."""
    skipped: tuple[Skipped, ...]
    """Images that could not be read; they are not in the file."""

    def __str__(self) -> str:
        """One line for the terminal, and one for the first unreadable image."""
        text = f"{self.path}: {self.count:,} images, {' x '.join(map(str, self.shape))} numbers each"
        if self.skipped:
            path, reason = self.skipped[0]
            text += f"\nunreadable and skipped: {len(self.skipped):,}, the first: {path}: {reason}"
        return text


def embed(
    encoder: Encoder,
    images: ImageSet,
    out: Path,
    *,
    level: str = "image",
    pool: str = "auto",
    image_size: int | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    dtype: str = "float32",
    progress: Callable[[int, int], None] | None = None,
) -> Embedded:
    """Write the features of all images in order.

    Images are preprocessed as in evaluations: the central square for one vector per image; for patches the whole image,
    resized to ``image_size`` x ``image_size``, so that patch (i, j) of the grid is part (i, j) of the image.

    Both formats have the columns ``path`` and ``embedding``, or ``path``, ``grid_h``, ``grid_w`` and ``tokens`` (in
    raster order). In ``.parquet``, ``embedding`` is a list of D numbers and ``tokens`` one of N*D; the schema's
    metadata has ``embed_dim``, and ``smalti``: the settings as JSON. In ``.npz``, columns are arrays: ``path`` and
    ``grid_h``, ``grid_w`` ``(n,)``, ``embedding`` ``(n, D)``, ``tokens`` ``(n, N, D)``; ``smalti`` is a string.

    Args:
        encoder: in eval mode, on the device to run on.
        images: the images.
        out: a ``.parquet`` or ``.npz`` file; an existing file is replaced once the new one is complete.
        level: ``image`` or ``patch``.
        pool: ``auto`` (the encoder's own), ``cls``, ``avg``, ``map`` or ``prr``, for ``level="image"``.
        image_size: side in pixels; None: the encoder's own.
        batch_size: images per batch.
        num_workers: data-loading worker processes; 0: load in the main process.
        dtype: data type of the features in the file, ``float32`` or ``float16``.
        progress: called as ``progress(done, total)``, counting images.

    Raises:
        ConfigError: for another suffix, level, pool or dtype, or if ``out`` can't be written.
        ShapeError: if the patch size does not divide ``image_size``.
        DataError: if no image can be read.
    """
    for name, value, known in (("level", level, LEVELS), ("dtype", dtype, DTYPES)):
        if value not in known:
            raise ConfigError(f"{name}={value}: one of {', '.join(known)} is needed")
    if out.suffix.lower() not in ENDINGS:
        raise ConfigError(f"{out}: unknown file format; name a file that ends in {' or '.join(ENDINGS)}")
    check_writable(out)
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}: 1 or more is needed")
    check_pool(pool, encoder.has_class_token)
    height, width = encoder.img_size
    if image_size is None and height != width:
        raise ConfigError(f"{encoder.name} takes {height}x{width} images; choose a square image_size")
    side = height if image_size is None else image_size
    grid = encoder.check_size(side, side)
    is_patches = level == "patch"
    shape = (grid[0] * grid[1], encoder.embed_dim) if is_patches else (encoder.embed_dim,)
    note = {
        "encoder": encoder.config(),
        "level": level,
        "pool": None if is_patches else pool,
        "image_size": side,
        "images": str(images.root),
    }
    batches = eval_batches(images, side, encoder.in_chans, "squash" if is_patches else "crop", batch_size, num_workers)
    skipped: list[Skipped] = []
    count = done = 0
    make_sink = _Parquet if out.suffix.lower() == ".parquet" else _Npz
    with (
        written_beside(out) as temporary,
        make_sink(temporary, shape, dtype, grid if is_patches else None, note) as sink,
    ):
        for pixels, places, unreadable in batches:
            skipped += unreadable
            if places:
                with np.errstate(over="ignore"):  # the check below raises instead
                    rows = _features(encoder, pixels, pool, is_patches).astype(dtype)
                if not np.isfinite(rows).all():
                    raise ConfigError(f"features are not finite as {dtype}; {_remedy(dtype, encoder)}")
                sink.write([as_text(images.samples[place].path) for place in places], rows)
            count, done = count + len(places), done + len(places) + len(unreadable)
            if progress is not None:
                progress(done, len(images))
        if not count:
            first = f"; the first: {skipped[0].path}: {skipped[0].reason}" if skipped else ""
            raise DataError(f"{images.root}: none of {len(images):,} images can be read{first}")
    return Embedded(out, count, shape, tuple(skipped))


@torch.inference_mode()
def _features(encoder: Encoder, pixels: torch.Tensor, pool: str, is_patches: bool) -> np.ndarray:
    """``(B, N, D)`` or ``(B, D)`` float32."""
    device = next(encoder.parameters()).device
    features = encoder.encode(encoder.normalize(pixels.to(device)))
    chosen = features.patches if is_patches else encoder.pooled(features, pool)
    return chosen.float().cpu().numpy()


def _remedy(dtype: str, encoder: Encoder) -> str:
    return "use dtype=float32" if dtype == "float16" else f"the weights of {encoder.name} are damaged or diverged"


class _Parquet:
    """Writes row groups of several batches: one group per batch would be slow to read."""

    def __init__(
        self, path: Path, shape: tuple[int, ...], dtype: str, grid: tuple[int, int] | None, note: dict[str, Any]
    ) -> None:
        self.grid = grid
        numbers = pa.list_(pa.float16() if dtype == "float16" else pa.float32(), int(np.prod(shape)))
        if grid is None:
            fields = [("path", pa.string()), ("embedding", numbers)]
        else:
            fields = [("path", pa.string()), ("grid_h", pa.int32()), ("grid_w", pa.int32()), ("tokens", numbers)]
        metadata = {"embed_dim": str(shape[-1]), "smalti": json.dumps(note)}
        self.schema = pa.schema(fields, metadata=metadata)
        self.writer = pq.ParquetWriter(path, self.schema)
        self.paths: list[str] = []
        self.rows: list[np.ndarray] = []

    def write(self, paths: Sequence[str], rows: np.ndarray) -> None:
        self.paths += paths
        self.rows.append(rows)
        if sum(part.nbytes for part in self.rows) >= _ROW_GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if not self.paths:
            return
        numbers = self.schema.field(-1).type
        values = pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate(self.rows).reshape(-1)), type=numbers)
        columns = [pa.array(self.paths), values]
        if self.grid is not None:
            columns[1:1] = [pa.array([side] * len(self.paths), pa.int32()) for side in self.grid]
        self.writer.write_table(pa.table(columns, schema=self.schema))
        self.paths, self.rows = [], []

    def __enter__(self) -> "_Parquet":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is None:
                self._flush()
        finally:
            self.writer.close()


class _Npz:
    """Writes features to an unnamed temporary file first, since an array's header contains their number."""

    def __init__(
        self, path: Path, shape: tuple[int, ...], dtype: str, grid: tuple[int, int] | None, note: dict[str, Any]
    ) -> None:
        self.path, self.shape, self.dtype, self.grid, self.note = path, shape, np.dtype(dtype), grid, note
        self.paths: list[str] = []
        self.numbers = tempfile.TemporaryFile(dir=path.parent)  # closed in __exit__

    def write(self, paths: Sequence[str], rows: np.ndarray) -> None:
        self.paths += paths
        self.numbers.write(np.ascontiguousarray(rows).data)

    def __enter__(self) -> "_Npz":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with self.numbers:
            if kind is not None:
                return
            arrays = {"path": np.array(self.paths), "smalti": np.array(json.dumps(self.note))}
            if self.grid is not None:
                sides = zip(("grid_h", "grid_w"), self.grid, strict=True)
                arrays |= {name: np.full(len(self.paths), side, np.int32) for name, side in sides}
            with zipfile.ZipFile(self.path, "w") as archive:
                for name, array in arrays.items():
                    with archive.open(f"{name}.npy", "w") as file:
                        np.lib.format.write_array(file, array, allow_pickle=False)
                name = "embedding" if self.grid is None else "tokens"
                shape = (len(self.paths), *self.shape)
                header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape}
                self.numbers.seek(0)
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array_header_2_0(file, header)
                    shutil.copyfileobj(self.numbers, file, 2**22)
