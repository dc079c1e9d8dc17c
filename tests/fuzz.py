"""Readers against damaged files: every case ends in success or in one of our errors, soon, in bounded memory.

``python tests/fuzz.py FOLDER SEED FIRST COUNT`` runs cases ``FIRST .. FIRST + COUNT`` of a seed in this process and
prints a line for each that fails; a case is a function of (SEED, number), so one number repeats it.
"""

import contextlib
import dataclasses
import io
import json
import resource
import shutil
import signal
import sys
import tarfile
import traceback
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save_file

from edf import write_edf, write_hypnogram
from mutations import WORDS, mutate
from smalti.config import parse_overrides
from smalti.data.images.decode import image_size, read_image
from smalti.data.images.folders import open_images
from smalti.data.images.labelled import eval_image, open_labelled, read_mask
from smalti.data.order_files import read_orders, write_orders
from smalti.data.signals.signal_set import SignalConfig, open_signals
from smalti.errors import DataError, SmaltiError
from smalti.exporters.timm import export_timm, timm_model
from smalti.models.build import build_encoder
from smalti.models.loading import load
from smalti.preflight.dataset import look_at_data
from smalti.report.run_page import write_report
from smalti.report.rundir import read_run
from smalti.runs import folder as run_folder
from smalti.runs import train as runs
from smalti.runs.build import load_method
from smalti.training.checkpoint import TrainingState

CASE_S = 20
"""Longest time of a case."""
CASE_MIB = 2048
"""Most memory that a case may add."""
TINY = {"name": "vit_tiny_patch16_224", "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
DECODER = {"decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}


class Hang(BaseException):
    """A case that took too long; no reader may catch it."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of input."""

    name: str
    make: Callable[[Path], None]
    """Writes whole files into an empty folder."""
    read: Callable[[Path], object]
    """Reads a folder of which one file is damaged."""


def run_case(base: Path, seed: int, number: int) -> str:
    """Damage one file of one kind and read it; returns what went wrong, empty where nothing did."""
    rng = np.random.default_rng([seed, number])
    kind = KINDS[number % len(KINDS)]
    folder = base / "case"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base / kind.name, folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = files[rng.integers(len(files))]
    path.write_bytes(mutate(path.read_bytes(), rng))
    what = f"{number} {kind.name} {path.relative_to(folder)}"
    before = _peak_mib(reset=True)
    signal.alarm(CASE_S)
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kind.read(folder)
    except SmaltiError as error:
        if len(str(error).splitlines()) != 1:
            return f"{what}: an error of {len(str(error).splitlines())} lines: {error}"
    except Hang:
        return f"{what}: more than {CASE_S} s\n{traceback.format_exc()}"
    except BaseException:
        return f"{what}: {traceback.format_exc()}"
    finally:
        signal.alarm(0)
    added = _peak_mib() - before
    return f"{what}: {added:.0f} MiB of memory" if added > CASE_MIB else ""


def _peak_mib(reset: bool = False) -> float:
    """Highest resident memory since the last reset; Linux tells, elsewhere since the start."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _picture(seed: int, shape: tuple[int, ...] = (24, 32, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def make_images(folder: Path) -> None:
    picture = Image.fromarray(_picture(0))
    for name, options in (
        *(
            ("a.jpg", {}),
            ("b.jpg", {"progressive": True}),
            ("c.png", {}),
            ("d.webp", {}),
            ("e.webp", {"lossless": True}),
        ),
        *(("f.bmp", {}), ("g.tif", {}), ("h.tif", {"compression": "tiff_lzw"}), ("i.tif", {"compression": "jpeg"})),
    ):
        picture.save(folder / name, **options)
    picture.quantize(8).save(folder / "j.png")
    cv2.imwrite(str(folder / "k.png"), _picture(1, (24, 32)).astype(np.uint16) * 257)
    cv2.imwritemulti(str(folder / "l.tif"), [_picture(page, (24, 32)) for page in range(3)])
    cv2.imwrite(str(folder / "m.tif"), _picture(2).astype(np.float32) / 255)


def read_images(folder: Path) -> None:
    images = open_images(folder)
    look_at_data(str(folder))
    for path in images.paths:
        for read in (image_size, read_image, lambda path: eval_image(path, 16, 3, "crop")):
            with contextlib.suppress(DataError):
                read(path)


def make_masks(folder: Path) -> None:
    for part in ("images", "masks"):
        (folder / part).mkdir()
    for number, ending in enumerate(("png", "png", "tif", "bmp")):
        Image.fromarray(_picture(number)).save(folder / f"images/{number}.jpg")
        mask = Image.fromarray(_picture(number, (24, 32)) % 3)
        (mask.convert("P") if number == 1 else mask).save(folder / f"masks/{number}.{ending}")
    (folder / "classes.txt").write_text("sky\nsea\nland\n")
    (folder / "train.txt").write_text("0\n1\n")
    (folder / "val.txt").write_text("2\n3\n")


def read_masks(folder: Path) -> None:
    look_at_data(str(folder))
    data = open_labelled(folder, need="masks")
    for sample in (*data.train.samples, *data.test.samples):
        with contextlib.suppress(DataError):
            read_mask(sample, len(data.classes))


def make_tables(folder: Path) -> None:
    for name in "ab":
        cv2.imwrite(str(folder / f"{name}.png"), np.full((24, 32, 3), 90, np.uint8))
    rows = [{"path": f"{name}.png", "label": name, "split": "train", "group": "1"} for name in "ab"]
    (folder / "t.csv").write_text("path,label,split,group\n" + "".join(",".join(row.values()) + "\n" for row in rows))
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), folder / "t.parquet")
    (folder / "list.txt").write_text("a.png 1\nb.png 2\n")


def read_tables(folder: Path) -> None:
    for name in ("t.csv", "t.jsonl", "t.parquet", "list.txt"):
        with contextlib.suppress(SmaltiError):  # each is read, though another is damaged
            open_images(folder / name)


def make_archives(folder: Path) -> None:
    files = {f"{label}/{label}.png": io.BytesIO() for label in "ab"}
    for stream in files.values():
        Image.fromarray(_picture(3)).save(stream, "png")
    content = {name: stream.getvalue() for name, stream in files.items()}
    with (
        tarfile.open(folder / "x.tar", "w") as tar,
        zipfile.ZipFile(folder / "y.zip", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name, data in content.items():
            packed.writestr(name, data)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    images = [{"bytes": data, "path": name} for name, data in content.items()]
    table = pa.table(
        {"image": pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())])), "label": [0, 1]}
    )
    pq.write_table(table, folder / "z.parquet")
    (folder / "hf").mkdir()
    with pa.OSFile(str(folder / "hf/data.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    (folder / "hf/dataset_info.json").write_text("{}")
    (folder / "hf/state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    for name in ("x.tar", "y.zip"):
        open_images(folder / name)  # with an index beside it


def read_archives(folder: Path) -> None:
    for name in ("x.tar", "y.zip", "z.parquet", "hf"):
        with contextlib.suppress(SmaltiError):  # each is read, though another is damaged
            for sample in open_images(folder / name).samples:
                with contextlib.suppress(SmaltiError):
                    sample.read()


def make_coco(folder: Path) -> None:
    objects = []
    for split in ("train", "val"):
        (folder / "images" / split).mkdir(parents=True)
        for number in range(2):
            Image.fromarray(_picture(number)).save(folder / "images" / split / f"{number}.jpg")
        rows = [{"id": number, "file_name": f"{number}.jpg", "width": 32, "height": 24} for number in range(2)]
        outline = [[4, 4, 20, 4, 20, 16, 4, 16]]
        objects = [
            {"id": n, "image_id": n, "category_id": 3, "bbox": [4, 4, 16, 12], "area": 192, "segmentation": outline}
            for n in range(2)
        ]
        tree = {
            "images": rows,
            "annotations": objects,
            "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
        }
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / f"annotations/instances_{split}.json").write_text(json.dumps(tree, indent=1))


def make_recipe(folder: Path) -> None:
    text = (
        f"method:\n  name: mae\n  mask_ratio: 0.6\n{_lines(DECODER)}encoder:\n{_lines(TINY)}data:\n"
        "  image_size: 16\n  mean: [0.5, 0.5, 0.5]\n  std: [0.2, 0.2, 0.2]\nsteps: 2\nbatch_size: 4\nseed: 1\n"
        "optim: &optim\n  lr: 1e-3\n  betas: [0.9, 0.95]\n  weight_decay: 0.05\nlog: {every: 1}\ncheckpoint.every: 1\n"
    )
    (folder / "recipe.yaml").write_text(text)
    (folder / "data").mkdir()
    for number in range(2):
        Image.fromarray(_picture(number)).save(folder / f"data/{number}.png")


def _lines(tree: dict[str, object]) -> str:
    return "".join(f"  {key}: {value}\n" for key, value in tree.items())


def read_recipe(folder: Path) -> None:
    runs.train(data=folder / "data", out=folder / "run", recipe=folder / "recipe.yaml", quiet=True)


OVERRIDDEN = (
    *("steps", "batch_size", "micro_batch", "seed", "devices", "precision", "drop_path", "pool", "init", "weights"),
    *("encoder", "encoder.patch_size", "encoder.num_heads", "encoder.depth", "encoder.embed_dim", "encoder.mlp_ratio"),
    *("encoder.reg_tokens", "data.image_size", "data.channels", "data.num_workers", "data.mean", "data.std", "method"),
    *("method.mask_ratio", "method.decoder_depth", "method.decoder_num_heads", "method.decoder_dim", "optim.lr"),
    *("method.crop_scale", "method.positions", "optim.betas", "optim.warmup_ratio", "optim.clip_norm", "eval.every"),
    *("eval.data", "checkpoint.every", "checkpoint.keep", "log.every", "log.trackers", "load.img_size", "tokens.kind"),
)


def make_overrides(folder: Path) -> None:
    make_recipe(folder)
    (folder / "recipe.yaml").unlink()
    words = {f"encoder.{key}": value for key, value in TINY.items()}
    words |= {f"method.{key}": value for key, value in DECODER.items()} | {"data.image_size": 16, "batch_size": 4}
    (folder / "words").write_text("\n".join(f"{key}={value}" for key, value in words.items()))


def read_overrides(folder: Path) -> None:
    # The damaged file is the seed of the words, so that a case stays a function of its bytes.
    rng = np.random.default_rng(list((folder / "words").read_bytes()[:2000]))
    words = [line for line in (folder / "words").read_text(errors="replace").split("\n") if line]
    for _ in range(rng.integers(1, 4)):
        words.append(f"{OVERRIDDEN[rng.integers(len(OVERRIDDEN))]}={WORDS[rng.integers(len(WORDS))]}")
    tree = parse_overrides(words)
    runs.train("mae", folder / "data", folder / "run", overrides=tree, quiet=True)


def make_weights(folder: Path) -> None:
    encoder = build_encoder(**TINY, img_size=16, seed=0)
    state = timm_model(encoder).state_dict()
    export_timm(encoder, folder / "timm")
    torch.save({"model": state, "epoch": 3, "args": {"lr": 0.1}}, folder / "weights.pth")
    save_file(state, folder / "weights.safetensors")
    np.savez(folder / "weights.npz", **{key: value.numpy() for key, value in state.items()})


def read_weights(folder: Path) -> None:
    with contextlib.suppress(SmaltiError):
        load(folder / "timm" / "model.safetensors", quiet=True)
    for ending in ("pth", "safetensors", "npz"):
        for spec in (folder / f"weights.{ending}", f"timm:vit_tiny_patch16_224@{folder}/weights.{ending}"):
            with contextlib.suppress(SmaltiError):
                load(spec, partial=True, quiet=True)


def make_run(folder: Path) -> None:
    data = folder / "data"
    for split in ("train", "val"):
        for label in ("a", "b"):
            (data / split / label).mkdir(parents=True)
            for number in range(2):
                Image.fromarray(_picture(number)).save(data / split / label / f"{number}.png")
    settings = {
        "encoder": TINY,
        "data": {"image_size": 16},
        "method": DECODER,
        **{"steps": 2, "batch_size": 4, "devices": "cpu"},
        "checkpoint": {"every": 1, "keep": 1},
        "log": {"every": 1},
        "eval": {"data": str(data), "protocols": ["knn"], "every": 1},
    }
    runs.train("mae", data, folder / "run", overrides=settings, quiet=True)
    shutil.rmtree(folder / "run/checkpoints/step_00000000")


def read_run_directory(folder: Path) -> None:
    run = folder / "run"
    text = (run / "config.yaml").read_bytes()  # the data have moved with the run
    (run / "config.yaml").write_bytes(text.replace(bytes(folder.parent / "run"), bytes(folder)))
    for read in (
        read_run,
        lambda run: write_report(run, num_images=0),
        lambda run: load(run, quiet=True),
        lambda run: load(run / "best", quiet=True),
        load_method,
        run_folder.read_run_file,
        lambda run: runs.resume(run, quiet=True),
    ):
        with contextlib.suppress(SmaltiError):
            read(run)


def make_orders(folder: Path) -> None:
    orders = torch.stack([torch.randperm(4) for _ in range(4)])
    write_orders(
        folder / "orders.parquet",
        images=["a.png", "a.png", "b.png", "b.png"],
        splits=["train", "train", None, None],
        flips=[False, True, False, True],
        orders={"collapse": orders},
        scores={"collapse": orders.float()},
        grid=(2, 2),
        image_size=16,
        root="data",
        source="a test",
        seconds={"collapse": 0.1},
    )


def read_orders_file(folder: Path) -> None:
    cache = read_orders(folder / "orders.parquet")
    for name in cache.names:
        with contextlib.suppress(SmaltiError):
            cache.orders(name, cache.images, list(map(bool, cache.flips)))


def make_edf(folder: Path) -> None:
    rng = np.random.default_rng(0)
    write_edf(folder / "a.edf", {"C3": rng.normal(0, 50, 100 * 90), "EOG": rng.normal(0, 50, 100 * 90)}, 100)
    write_hypnogram(folder / "a-Hypnogram.edf", [(0, 30, "Sleep stage W"), (30, 60, "Sleep stage 2")])


def read_edf(folder: Path) -> None:
    open_signals(f"signals={folder}", SignalConfig())


KINDS = (
    Kind("images", make_images, read_images),
    Kind("masks", make_masks, read_masks),
    Kind("tables", make_tables, read_tables),
    Kind("archives", make_archives, read_archives),
    Kind("coco", make_coco, lambda folder: open_labelled(folder, need="boxes")),
    Kind("recipe", make_recipe, read_recipe),
    Kind("overrides", make_overrides, read_overrides),
    Kind("weights", make_weights, read_weights),
    Kind("run", make_run, read_run_directory),
    Kind("orders", make_orders, read_orders_file),
    Kind("edf", make_edf, read_edf),
)


def main(base: Path, seed: int, first: int, count: int) -> None:
    """Run the cases; a line of JSON for each that fails, and ``{"done": count}`` at the end."""
    for kind in KINDS:
        (base / kind.name).mkdir(parents=True)
        kind.make(base / kind.name)
    # From here on nothing is trained: a damaged setting may ask for years of it.
    runs.run_loop = lambda *_, state=None, **__: state or TrainingState()  # type: ignore[assignment]
    limit = _virtual_bytes() + (CASE_MIB + 1024) * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    def stop(*_: object) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, stop)
    for number in range(first, first + count):
        if problem := run_case(base, seed, number):
            print(json.dumps({"failed": problem}), flush=True)
    print(json.dumps({"done": count}), flush=True)


def _virtual_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        return 8 * 2**30


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:5]))
