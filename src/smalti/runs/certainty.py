"""Certainty of a classifier while images are drawn: the probability of each image's class after each step.

Source: Guo et al., arXiv:2511.22281v2, Fig. 1, which shows such a certainty of one image for two orders and does not
define it. Here it is the softmax probability of a linear head on an encoder's image feature, and places that are not
drawn yet are grey, as in the film strip; a classifier that has never seen grey places may be wrong for that reason.
Letters: F images, S frames, K classes of the classifier.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from smalti.charts import Line, LineChart, chart_tree, floats
from smalti.errors import ConfigError
from smalti.models.encoder import Encoder, eval_mode
from smalti.models.loading import open_encoder
from smalti.models.weights import LoadConfig
from smalti.runs.generate import Film

CERTAIN_IMAGES = 64
"""Maximum number of images whose certainty is measured."""
_BATCH = 32


@dataclass(frozen=True)
class Classifier:
    """An encoder with a classification head."""

    name: str
    """As the user calls it."""
    encoder: Encoder
    classes: tuple[str, ...]
    """K names."""


@dataclass(frozen=True)
class Certainty:
    """Probabilities of the classes that the images are drawn of."""

    classifier: str
    labels: tuple[str, ...]
    """Class of each of the F images."""
    num_classes: int
    """K; chance is 1/K."""
    fractions: tuple[float, ...]
    """Fraction of the image that is drawn in each of the S frames, from 0 to 1."""
    values: Float[Tensor, "F S"]
    """Probability of the image's class."""
    predicted: Int[Tensor, "F S"]
    """The most probable class, 0..K-1."""
    classes: tuple[str, ...]

    @property
    def chart(self) -> LineChart:
        """Mean over the images, with the quarter of them below and above."""
        low, high = (self.values.quantile(q, dim=0).tolist() for q in (0.25, 0.75))
        line = Line(
            floats(self.values.mean(0).tolist()),
            self.fractions,
            "mean",
            low=floats(low),
            high=floats(high),
            level=1 / self.num_classes,
        )
        explanation = (
            f"Probability that {self.classifier} gives to the class that an image is drawn of, while it is drawn (what "
            f"is not drawn yet is grey): mean over {len(self.values)} images; band: the middle half of them; dashed: "
            "chance."
        )
        return LineChart(
            "Certainty while drawing", explanation, (line,), x_axis="fraction", x_label="drawn", has_points=True
        )

    def to_json(self, files: Sequence[str]) -> dict[str, Any]:
        """Plain values.

        Args:
            files: names of the F images.
        """
        right = self.predicted[:, -1] == torch.tensor([self.classes.index(label) for label in self.labels])
        return {
            "classifier": self.classifier,
            "measure": "softmax probability of the class that the image is drawn of; what is not drawn yet is grey",
            "num_images": len(self.values),
            "num_classes": self.num_classes,
            "drawn": [round(fraction, 4) for fraction in self.fractions],
            "mean": _rounded(self.values.mean(0)),
            "sd": _rounded(self.values.std(0, correction=0)),
            "top1_at_the_end": round(float(right.double().mean()), 4),
            "images": [
                {
                    "file": file,
                    "label": label,
                    "certainty": _rounded(values),
                    "predicted": [self.classes[number] for number in predicted.tolist()],
                }
                for file, label, values, predicted in zip(files, self.labels, self.values, self.predicted, strict=True)
            ],
            "chart": chart_tree(self.chart),
        }


def open_classifier(spec: str, labels: Sequence[str], channels: int) -> Classifier:
    """Load a classifier.

    Args:
        spec: an encoder by any of its names.
        labels: class of each image that will be drawn; empty for one without.
        channels: of these images.

    Raises:
        ConfigError: if it has no head, does not know a class, needs other channels, or images have no classes.
        RunError, WeightsError: if it can't be loaded.
    """
    if not all(labels):
        raise ConfigError(
            f"--classifier {spec}: needs images of classes, but these are drawn without; choose labels, or leave it out"
        )
    encoder = open_encoder(spec, LoadConfig(), quiet=True)
    head = encoder.class_head
    if head is None or not head.classes:
        raise ConfigError(
            f"--classifier {spec}: has no classification head with names of classes; a run of supervised or cvit has "
            "one"
        )
    if unknown := [label for label in dict.fromkeys(labels) if label not in head.classes]:
        raise ConfigError(
            f"--classifier {spec}: does not know the class '{unknown[0]}', only {_listed(head.classes)}; train it on "
            "the same classes"
        )
    if encoder.in_chans != channels:
        raise ConfigError(
            f"--classifier {spec}: takes images of {encoder.in_chans} channels, these have {channels}; train it on the "
            "same images"
        )
    return Classifier(spec, encoder, tuple(head.classes))


@torch.no_grad()
def measure_certainty(classifier: Classifier, film: Film, labels: Sequence[str]) -> Certainty:
    """Classify the frames of a film, after an empty one.

    Args:
        classifier: on any device.
        film: of F images.
        labels: class of each of them; further ones are ignored.
    """
    num = len(film.frames)
    frames = torch.cat([torch.full_like(film.frames[:, :1], 0.5), film.frames], dim=1)
    encoder, head = classifier.encoder, classifier.encoder.class_head
    assert head is not None
    device = next(encoder.parameters()).device
    found = []
    with eval_mode(encoder):
        for images in torch.split(frames.flatten(0, 1), _BATCH):
            if images.shape[-2:] != encoder.img_size:
                images = F.interpolate(images, encoder.img_size, mode="bilinear", antialias=True, align_corners=False)
            vectors = encoder.image_features(encoder.normalize(images.clamp(0, 1).to(device)))
            logits = F.linear(vectors.float(), head.weight.to(device).float(), head.bias.to(device).float())
            found.append(logits.softmax(1).cpu())
    probabilities = torch.cat(found).view(num, frames.shape[1], -1)
    numbers = torch.tensor([classifier.classes.index(label) for label in labels[:num]])
    total = film.ranks.shape[1]
    return Certainty(
        classifier=classifier.name,
        labels=tuple(labels[:num]),
        num_classes=len(classifier.classes),
        fractions=(0.0, *(drawn / total for drawn in film.drawn)),
        values=probabilities[torch.arange(num), :, numbers],
        predicted=probabilities.argmax(-1),
        classes=classifier.classes,
    )


def _rounded(values: Tensor) -> list[float]:
    return np.round(values.double().numpy(), 5).tolist()


def _listed(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
