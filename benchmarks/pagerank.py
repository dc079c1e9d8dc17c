"""PageRank of a batch of dependency graphs: against a bare loop of batched products, and against networkx.

    python benchmarks/pagerank.py

Goals: at 64 graphs of 256 patches at most 1.2 of a loop that only multiplies (``torch.baddbmm``, P made beforehand, as
many steps as ours takes); at most 0.001 of networkx on one of the graphs, per graph.
"""

import sys
from pathlib import Path

import networkx
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from _bench import interleave, report
from smalti.functional import graphs
from smalti.functional.graphs import pagerank

BATCH, PATCHES = 64, 256


def main() -> None:
    torch.set_num_threads(1)
    weights = torch.rand(BATCH, PATCHES, PATCHES, generator=torch.Generator().manual_seed(0))
    weights.diagonal(dim1=1, dim2=2).zero_()
    stochastic = (weights / weights.sum(-1, keepdim=True)).mT.contiguous()
    teleport = torch.full((BATCH, PATCHES, 1), 0.15 / PATCHES)

    steps = 0
    plain = graphs._propagate

    def counted(*words: Tensor) -> Tensor:
        nonlocal steps
        steps += 1
        return plain(*words)

    graphs._propagate = counted
    pagerank(weights[:1])
    graphs._propagate = plain

    def loop() -> Tensor:
        scores = torch.full((BATCH, PATCHES, 1), 1 / PATCHES)
        for _ in range(steps):
            scores = torch.baddbmm(teleport, stochastic, scores, alpha=0.85)
        return scores

    def ours() -> Tensor:
        return pagerank(weights)

    print(f"{steps} steps; largest difference {float((loop()[..., 0] - ours()).abs().max()) * PATCHES:.1e} / N")
    report(
        f"pagerank {BATCH}x{PATCHES}x{PATCHES} power",
        interleave({"ours": ours, "loop": loop}, rounds=21),
        "ours",
        "loop",
        1.2,
    )
    table = weights[0].double().numpy()

    def by_networkx() -> object:
        graph = networkx.from_numpy_array(table, create_using=networkx.DiGraph)
        return networkx.pagerank(graph, tol=1e-10 / PATCHES)

    timings = interleave({"ours": ours, "networkx": by_networkx}, rounds=5)
    each = {"networkx": timings["networkx"], "ours": type(timings["ours"])(*(t / BATCH for t in timings["ours"]))}
    report(f"pagerank of one graph of {PATCHES}", each, "ours", "networkx", 0.001)


if __name__ == "__main__":
    main()
