"""What does a ViT cost that looks at 22 % of the patches, and does ranking them pay?

Ours: ViT-S/16 at 224 px on the first 43 of 196 patches, normalisation, embedding and choice of the patches included.
Peer: the same network on all patches. Eager, and exported by ``smalti export to=onnx`` to ONNX Runtime; batches of 2,
4 and 8; one thread, CPU time, interleaved. Goals: eager <= 0.31, ONNX Runtime <= 0.23.

Then with ranking included: a ``ranker`` of two blocks of width 96 (random weights: the cost is the same) reads an
image once and chooses its patches for the encoder; eager, and exported as one ONNX model. Goals: 0.30 and 0.26.

Then CoMAE's own ranking in its one-pass form (``readout=cross``, width 64, depth 12: the whole graph, and PageRank)
against one pass of the network on all patches. Goal: 2.

Then the same with ranking counted: by the variance of the pixels, and by CoMAE's graph in the paper's form (a pass for
each of the 196 patches, and PageRank). What a pass costs is measured on some of them, for one image; the paper's
ranking has no goal: nobody expects it to pay for one look. Written out is after how many looks at an image, its order
kept, it has paid. For a static order the plain ratio holds.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from _bench import Timing, interleave, report
from smalti.exporters.onnx import KEEP, RANKED, WHOLE, export_onnx
from smalti.exporters.ranked import RankedModel
from smalti.functional.graphs import descending, pagerank
from smalti.functional.orders import num_kept, random_orders
from smalti.functional.patches import patch_variance
from smalti.layers.tokens import PatchTokenSource
from smalti.methods.comae import CoMAE, CoMAEConfig
from smalti.methods.ranker import DistilledRanker, RankerConfig
from smalti.models.build import build_encoder

SIDE, PATCH = 224, 16
RANKED_TARGETS = 14
"""Of 196: a pass costs the same for each."""


def sessions(folder: Path) -> tuple[Callable[..., object], Callable[..., object], Callable[..., object]]:
    """The three models, each on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    whole, few, best = (
        onnxruntime.InferenceSession(folder / name, options, providers=["CPUExecutionProvider"])
        for name in (WHOLE, KEEP, RANKED)
    )
    return (
        lambda images: whole.run(["vector"], {"images": images.numpy()}),
        lambda images, ids: few.run(["vector"], {"images": images.numpy(), "ids_keep": ids.numpy()}),
        lambda images: best.run(["vector"], {"images": images.numpy()}),
    )


@torch.inference_mode()
def comae_seconds(images: torch.Tensor) -> float:
    """CPU seconds of ranking an image: its graph's rows, from some of them, and PageRank."""
    method = CoMAE(PatchTokenSource(SIDE, 3, PATCH, 16), CoMAEConfig()).eval()
    tokens = method.tokens.encode(images[:1])
    targets = torch.arange(RANKED_TARGETS)[None]
    method.selector(tokens, targets)
    start = time.process_time()
    method.selector(tokens, targets)
    passes = (time.process_time() - start) * tokens.shape[1] / RANKED_TARGETS
    graph = torch.rand(1, tokens.shape[1], tokens.shape[1])
    start = time.process_time()
    descending(pagerank(graph))
    return passes + time.process_time() - start


def ranked(name: str, batch: int, few: Timing, full: Timing, ranking: float) -> None:
    """Print what keeping costs with ranking counted, and when it pays."""
    saved = (full.median - few.median) / batch
    looks = ranking / saved if saved > 0 else float("inf")
    print(
        f"      {name}: with ranking {(few.median / batch + ranking) / (full.median / batch):.3f} of the full model's "
        f"time; ranking an image {ranking * 1e3:.2f} ms, paid back after {looks:.1f} looks at it"
    )


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 4, 8])
    given = parser.parse_args()
    torch.set_num_threads(1)
    encoder = build_encoder("vit_small_patch16_224", seed=0).eval()
    num_patches = (SIDE // PATCH) ** 2
    keep = num_kept(num_patches, 0.785)
    assert keep == 43, keep
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(False):
        small = build_encoder("vit_tiny_patch16_224", embed_dim=96, depth=2, num_heads=3, seed=0)
        ranker = DistilledRanker(small, RankerConfig(order="halton")).eval()
        export_onnx(encoder, Path(folder) / "fixed", keep=keep, ranker=ranker)
        export_onnx(encoder, Path(folder) / "free")
        (Path(folder) / "free" / RANKED).write_bytes((Path(folder) / "fixed" / RANKED).read_bytes())
        whole, few, best = sessions(Path(folder) / "free")
    model = RankedModel(encoder, ranker, keep).eval()
    comae = comae_seconds(torch.rand(1, 3, SIDE, SIDE))
    cross = CoMAE(PatchTokenSource(SIDE, 3, PATCH, 16), CoMAEConfig(readout="cross")).eval()
    for batch in given.batches:
        images = torch.rand(batch, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(batch))
        ids = random_orders(torch.arange(batch), num_patches)[:, :keep]
        ways: dict[str, Callable[[], object]] = {
            "keep": lambda images=images, ids=ids: encoder.image_features(encoder.normalize(images), ids),  # type: ignore[misc]
            "full": lambda images=images: encoder.image_features(encoder.normalize(images)),  # type: ignore[misc]
            "keep_onnx": lambda images=images, ids=ids: few(images, ids),  # type: ignore[misc]
            "full_onnx": lambda images=images: whole(images),  # type: ignore[misc]
            "ranked": lambda images=images: model(encoder.normalize(images)),  # type: ignore[misc]
            "ranked_onnx": lambda images=images: best(images),  # type: ignore[misc]
            "cross": lambda images=images: descending(pagerank(cross.dependency(images))),  # type: ignore[misc]
            "variance": lambda images=images: descending(patch_variance(images, (PATCH, PATCH))),  # type: ignore[misc]
        }
        taken = interleave(ways, given.rounds)
        for ours, peer, goal in (("keep", "full", 0.31), ("keep_onnx", "full_onnx", 0.23)):
            report(f"keep_speed 43 of 196 patches, batch {batch}", taken, ours, peer, goal)
            ranked("variance", batch, taken[ours], taken[peer], taken["variance"].median / batch)
            ranked("collapse", batch, taken[ours], taken[peer], comae)
        report(f"keep_speed CoMAE's ranking in one pass, batch {batch}", taken, "cross", "full", 2.0)
        for ours, peer, goal in (("ranked", "full", 0.30), ("ranked_onnx", "full_onnx", 0.26)):
            report(f"keep_speed ranker and 43 of 196 patches, batch {batch}", taken, ours, peer, goal)


if __name__ == "__main__":
    main()
