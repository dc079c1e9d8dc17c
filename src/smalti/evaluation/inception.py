"""FID's Inception network, from a local file of weights.

The network is torch-fidelity's (extra ``gen``), which reproduces the published graph bit for bit; its weights file is
``pt_inception-2015-12-05-6726825d.pth``. The file is read without unpickling, and never downloaded. FID values of
different libraries are not comparable: these are torch-fidelity's, including its resizing.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from smalti.errors import MissingExtraError, WeightsError
from smalti.models.weights import read_tensors

LIBRARY = "torch-fidelity"


class Inception(nn.Module):
    """Pool features and class probabilities of images.

    Args:
        path: file of weights.

    Raises:
        MissingExtraError: without torch-fidelity.
        WeightsError: if the file doesn't hold these weights.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        extractor = _extractor_class()
        tensors = read_tensors(path)
        with tempfile.TemporaryDirectory() as folder:
            # torch-fidelity unpickles its file, so it gets a copy with only tensors, read without unpickling
            safe = Path(folder) / "weights.pth"
            torch.save(tensors, safe)
            try:
                self.network = extractor("inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=safe)
            except RuntimeError as error:
                lines = str(error).splitlines()
                raise WeightsError(
                    f"{path}: not the weights of FID's Inception network; {lines[min(1, len(lines) - 1)].strip()[:120]}"
                ) from error

    @torch.no_grad()
    def forward(self, images: UInt8[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B 2048"], Float[Tensor, "B 1008"]]:
        """Features and class probabilities of images of any size; the network resizes them."""
        pooled, logits = self.network(images)
        return pooled.flatten(1), logits.softmax(1)


def _extractor_class() -> Any:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise MissingExtraError('eval.generation.inception needs torch-fidelity: pip install "smalti[gen]"') from None
    return FeatureExtractorInceptionV3
